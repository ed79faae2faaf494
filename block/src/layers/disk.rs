//! The disk: what writes, reads and changes of the layers share.

mod transfers;

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::RwLock;
use treeboot_types::SnapshotName;

use super::files::DiskFiles;
use super::frozen::Frozen;
use super::tree::{LayerId, LayerTree, Snapshot, Tidy, TreeError};
use crate::delta::{BLOCK, Core, DeltaDamage, DeltaReport, State};
use crate::{BlockDevice, BlockError, Delta, DeltaError, Disk, DiskError, Extent, Geometry, IoFuture};

/// Blocks that a merge copies at once: a guest's write waits for as long as that takes.
const COPY_BLOCKS: u64 = 64;

/// How long a change of the live layer waits for writes that are under way, while later ones wait for it. A write may itself wait
/// for a block of the base whose parents are down.
const GATE_LIMIT: Duration = Duration::from_secs(5);

/// Why the layers of a disk could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// They do not allow it.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// A file.
    #[error(transparent)]
    Delta(#[from] DeltaError),
    /// The base is another.
    #[error(transparent)]
    Base(#[from] DiskError),
    /// A layer is not what was written.
    #[error("layer {layer} is damaged at {} of the disk ({}); what it holds there is not passed on", damage.offset, damage.what)]
    Damaged {
        /// The layer.
        layer: LayerId,
        /// Where.
        damage: DeltaDamage,
    },
    /// A write did not end.
    #[error("a write to the disk has been under way for more than {} s, so there is no point in time to keep; try again", GATE_LIMIT.as_secs())]
    Busy,
    /// The process ends.
    #[error("the disk is being closed; try again when it is served")]
    Stopping,
}

/// One layer and how it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerReport {
    /// Its number.
    pub layer: LayerId,
    /// What it stands on.
    pub parent: Option<LayerId>,
    /// The snapshot that it is.
    pub snapshot: Option<Snapshot>,
    /// Writes go there.
    pub live: bool,
    /// Bytes of disk in use for it.
    pub allocated_bytes: u64,
    /// What a check found, where one was asked for.
    pub check: DeltaReport,
}

/// The layers at one moment. Changes make another one.
struct Now {
    tree: LayerTree,
    /// All of them.
    open: BTreeMap<LayerId, Delta>,
    disk: Disk,
}

impl Now {
    fn new(
        base: &Arc<dyn BlockDevice>,
        tree: LayerTree,
        open: BTreeMap<LayerId, Delta>,
    ) -> Result<Self, LayerError> {
        let mut chain: Vec<Delta> = tree
            .chain(tree.live())
            .iter()
            .filter_map(|id| open.get(id).cloned())
            .collect();
        // The tree names its live layer, and all of the tree is open.
        let live = chain.pop().ok_or(LayerError::Stopping)?;
        let below: Arc<dyn BlockDevice> = match chain.is_empty() {
            true => Arc::clone(base),
            false => Arc::new(Frozen::new(Arc::clone(base), chain)),
        };
        let disk = Disk::new(below, live)?;
        Ok(Self { tree, open, disk })
    }

    fn core(&self, id: LayerId) -> Option<Arc<Core>> {
        self.open.get(&id).map(|delta| Arc::clone(delta.core()))
    }

    fn data_bytes(&self) -> u64 {
        self.open.values().map(|delta| delta.core().data_bytes()).sum()
    }
}

/// A disk whose layers can change while it is in use.
pub struct LayeredDisk {
    shared: Arc<Shared>,
    /// Writes hold it to read, a change of the live layer to write.
    gate: Arc<tokio::sync::RwLock<()>>,
    /// One change at a time.
    changing: tokio::sync::Mutex<()>,
}

struct Shared {
    /// No more changes of the layers.
    closed: AtomicBool,
    files: DiskFiles,
    base: Arc<dyn BlockDevice>,
    now: RwLock<Arc<Now>>,
    /// The most bytes of blocks of data that all layers together may have; `u64::MAX`: as many as there is room for.
    most: AtomicU64,
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, LayerError> + Send + 'static,
) -> Result<T, LayerError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(LayerError::Stopping),
    }
}

impl Shared {
    fn check_open(&self) -> Result<(), LayerError> {
        match self.closed.load(Ordering::Acquire) {
            true => Err(LayerError::Stopping),
            false => Ok(()),
        }
    }

    fn now(&self) -> Arc<Now> {
        Arc::clone(&self.now.read())
    }

    fn io(&self, id: LayerId) -> impl FnOnce(io::Error) -> LayerError {
        let path = self.files.path(id);
        move |source| DeltaError::Io { path, source }.into()
    }

    /// From now on the layers are `tree`, of which `open` are open.
    fn switch(&self, tree: LayerTree, open: BTreeMap<LayerId, Delta>) -> Result<(), LayerError> {
        let now = Arc::new(Now::new(&self.base, tree, open)?);
        let mut place = self.now.write();
        self.limit(&now);
        *place = now;
        Ok(())
    }

    /// The live layer may have what the others leave. Called while nobody else changes what the layers are.
    fn limit(&self, now: &Now) {
        let most = self.most.load(Ordering::Relaxed);
        if let Some(live) = now.core(now.tree.live()) {
            let others = now.data_bytes().saturating_sub(live.data_bytes());
            live.set_most(match most {
                u64::MAX => u64::MAX,
                most => most.saturating_sub(others),
            });
        }
    }

    /// The tree changes and its layers do not.
    fn rename(&self, tree: LayerTree) -> Result<(), LayerError> {
        self.check_open()?;
        self.files.save(&tree)?;
        let open = self.now().open.clone();
        self.switch(tree, open)
    }

    /// Before the gate: most of what is to be flushed, and the new live layer's file.
    fn prepare(&self, tree: &LayerTree) -> Result<Delta, LayerError> {
        self.check_open()?;
        let now = self.now();
        let old = now.tree.live();
        if let Some(core) = now.core(old) {
            core.flush_now().map_err(self.io(old))?;
        }
        if tree.live() == 1 {
            // The first manifest: from here on a file that nobody names is found.
            self.files.save(&now.tree)?;
        }
        Ok(self.files.create(tree.live())?)
    }

    /// Within the gate: nobody writes.
    fn begin_live(&self, tree: LayerTree, live: Delta) -> Result<(), LayerError> {
        let now = self.now();
        let old = now.tree.live();
        let core = now.core(old).ok_or(LayerError::Stopping)?;
        core.set_frozen(true);
        let saved = core
            .flush_now()
            .map_err(self.io(old))
            .and_then(|()| Ok(self.files.save(&tree)?));
        if let Err(error) = saved {
            core.set_frozen(false);
            // Which manifest is there is not known; both lead to the same bytes, and the old one is the right one.
            let _best_effort = self.files.save(&now.tree);
            return Err(error);
        }
        let mut open = now.open.clone();
        open.insert(tree.live(), live);
        self.switch(tree, open)
    }

    fn tidy(&self, tidy: Tidy) -> Result<(), LayerError> {
        let (layer, into) = match tidy {
            Tidy::Remove(layer) => (layer, None),
            Tidy::Merge { layer, into } => (layer, Some(into)),
        };
        let now = self.now();
        if let Some(into) = into {
            let from = now.core(layer).ok_or(LayerError::Stopping)?;
            let to = now.core(into).ok_or(LayerError::Stopping)?;
            to.unseal().map_err(self.io(into))?;
            self.copy(layer, &from, into, &to)?;
            to.flush_now().map_err(self.io(into))?;
        }
        self.check_open()?;
        let mut tree = now.tree.clone();
        tree.tidied(tidy);
        self.files.save(&tree)?;
        let mut open = now.open.clone();
        open.remove(&layer);
        self.switch(tree, open)?;
        // Reads that are under way keep the file until they end.
        Ok(self.files.remove(layer)?)
    }

    fn copy(&self, layer: LayerId, from: &Core, into: LayerId, to: &Core) -> Result<(), LayerError> {
        for (first, state, count) in from.runs(COPY_BLOCKS) {
            self.check_open()?;
            let data = match state {
                State::Base => continue,
                State::Zero => None,
                State::Data => Some(read_checked(layer, from, first, count).map_err(
                    |error| match error {
                        ReadError::Io(source) => self.io(layer)(source),
                        ReadError::Damaged(damage) => LayerError::Damaged { layer, damage },
                    },
                )?),
            };
            to.take_over(first, count, data.as_deref())
                .map_err(self.io(into))?;
        }
        Ok(())
    }

    fn seal(&self) -> Result<(), LayerError> {
        let now = self.now();
        for (&id, delta) in now.open.iter().filter(|(id, _)| **id != now.tree.live()) {
            self.check_open()?;
            delta.core().seal().map_err(self.io(id))?;
        }
        Ok(())
    }

    fn report(&self, check: bool) -> Result<Vec<LayerReport>, LayerError> {
        let now = self.now();
        let layers = now.tree.layers().iter();
        let reports = layers.filter_map(|(&id, layer)| Some((id, layer, now.open.get(&id)?)));
        reports
            .map(|(id, layer, delta)| {
                let check = match check {
                    true => delta.core().check().map_err(self.io(id))?,
                    false => DeltaReport {
                        sealed: delta.core().is_sealed(),
                        ..DeltaReport::default()
                    },
                };
                Ok(LayerReport {
                    layer: id,
                    parent: layer.parent,
                    snapshot: layer.snapshot.clone(),
                    live: id == now.tree.live(),
                    allocated_bytes: delta.allocated_bytes().map_err(self.io(id))?,
                    check,
                })
            })
            .collect()
    }
}

enum ReadError {
    Io(io::Error),
    Damaged(DeltaDamage),
}

/// Blocks of data of a layer, compared with their checksums where it is sealed.
fn read_checked(layer: LayerId, core: &Core, first: u64, count: u64) -> Result<Vec<u8>, ReadError> {
    let mut data = vec![0; (count * BLOCK) as usize];
    core.storage()
        .read_at(core.place(first * BLOCK), &mut data)
        .map_err(ReadError::Io)?;
    if core.is_sealed() {
        let seal = core.seal_of(first, count).map_err(ReadError::Io)?;
        if let Some(block) = seal.wrong(&data) {
            tracing::error!(layer, path = %core.path().display(), offset = block * BLOCK, "a layer is damaged");
            return Err(ReadError::Damaged(DeltaDamage {
                offset: block * BLOCK,
                bytes: BLOCK,
                what: "its checksum is wrong".into(),
            }));
        }
    }
    Ok(data)
}

impl LayeredDisk {
    /// Opens all layers. Blocks.
    ///
    /// # Errors
    /// A file is missing, in use, damaged or another's; or the base has another size.
    pub fn open(files: DiskFiles, base: Arc<dyn BlockDevice>) -> Result<Self, LayerError> {
        let (tree, has_manifest) = files.tree()?;
        if has_manifest {
            files.sweep(&tree)?;
        }
        let mut open = BTreeMap::new();
        for &id in tree.layers().keys() {
            let delta = files.open(id)?;
            delta.core().set_frozen(id != tree.live());
            open.insert(id, delta);
        }
        let now = RwLock::new(Arc::new(Now::new(&base, tree, open)?));
        Ok(Self {
            shared: Arc::new(Shared {
                closed: AtomicBool::new(false),
                files,
                base,
                now,
                most: AtomicU64::new(u64::MAX),
            }),
            gate: Arc::default(),
            changing: tokio::sync::Mutex::default(),
        })
    }

    /// Its layers as they are.
    pub fn tree(&self) -> LayerTree {
        self.shared.now().tree.clone()
    }

    /// Bytes of disk in use for all layers. Blocks for a moment.
    ///
    /// # Errors
    /// The operating system's.
    pub fn allocated_bytes(&self) -> io::Result<u64> {
        let now = self.shared.now();
        now.open.values().map(Delta::allocated_bytes).sum()
    }

    /// Bytes of the blocks that were written and not discarded, in all layers: what [`set_limit`](Self::set_limit) limits.
    pub fn data_bytes(&self) -> u64 {
        self.shared.now().data_bytes()
    }

    /// Writes that would make more bytes of written blocks than these find no room ([`BlockError::NoSpace`]) from now on; those that
    /// change a block that is there are taken however many there are. `None`: as many as there is room for.
    pub fn set_limit(&self, bytes: Option<u64>) {
        let now = self.shared.now.write();
        self.shared
            .most
            .store(bytes.unwrap_or(u64::MAX), Ordering::Relaxed);
        self.shared.limit(&now);
    }

    /// Its layers, how large they are, and with `check` what is wrong with them: reads all of them then.
    ///
    /// # Errors
    /// A file cannot be read.
    pub async fn report(&self, check: bool) -> Result<Vec<LayerReport>, LayerError> {
        let _one = match check {
            // A merge moves what is being looked at.
            true => Some(self.changing.lock().await),
            false => None,
        };
        let shared = Arc::clone(&self.shared);
        blocking(move || shared.report(check)).await
    }

    /// Freezes the live layer under a name; whatever was acknowledged before is in it, and writes wait meanwhile. The same call
    /// again, with nothing written since, is the same snapshot. Returns whether it is new.
    ///
    /// # Errors
    /// The name is taken, there are too many layers, or a file; nothing changed then.
    pub async fn snapshot(&self, snapshot: Snapshot) -> Result<bool, LayerError> {
        let _one = self.changing.lock().await;
        let now = self.shared.now();
        if let Ok(there) = now.tree.find(&snapshot.name) {
            let live = now.tree.live();
            let on_it = now.tree.layers().get(&live).and_then(|layer| layer.parent) == Some(there);
            if on_it && now.core(live).is_some_and(|core| core.is_untouched()) {
                return Ok(false);
            }
        }
        let mut tree = now.tree.clone();
        tree.snapshot(snapshot)?;
        self.begin_live(tree).await?;
        Ok(true)
    }

    /// Goes back to a snapshot: what was written since is given up. Front ends that cache must be gone.
    ///
    /// # Errors
    /// There is no such snapshot, there are too many layers, or a file; nothing changed then.
    pub async fn roll_back(&self, to: &SnapshotName) -> Result<(), LayerError> {
        let _one = self.changing.lock().await;
        let mut tree = self.tree();
        if tree.held() {
            return Err(TreeError::Held.into());
        }
        tree.roll_back(to)?;
        self.begin_live(tree).await
    }

    async fn begin_live(&self, tree: LayerTree) -> Result<(), LayerError> {
        let (shared, preparing) = (Arc::clone(&self.shared), tree.clone());
        let live = blocking(move || shared.prepare(&preparing)).await?;
        let alone = tokio::time::timeout(GATE_LIMIT, Arc::clone(&self.gate).write_owned())
            .await
            .map_err(|_| LayerError::Busy)?;
        let shared = Arc::clone(&self.shared);
        // To its end even if nobody waits any more.
        blocking(move || {
            let begun = shared.begin_live(tree, live);
            drop(alone);
            begun
        })
        .await
    }

    /// A snapshot's name goes. What only it needed goes with [`tidy`](Self::tidy).
    ///
    /// # Errors
    /// There is no such snapshot, or the manifest cannot be written.
    pub async fn forget(&self, snapshot: &SnapshotName) -> Result<(), LayerError> {
        let _one = self.changing.lock().await;
        let mut tree = self.tree();
        tree.find(snapshot)?;
        tree.forget(snapshot);
        let shared = Arc::clone(&self.shared);
        blocking(move || shared.rename(tree)).await
    }

    /// Removes or merges one spare layer, or gives frozen layers their checksums where that was not done. Whether there may be more
    /// to do. While it works the disk is in use as ever.
    ///
    /// # Errors
    /// A file, or a layer that is damaged; the next call goes on from there.
    pub async fn tidy(&self) -> Result<bool, LayerError> {
        let _one = self.changing.lock().await;
        let shared = Arc::clone(&self.shared);
        blocking(move || {
            let next = shared.now().tree.tidy();
            match next {
                Some(tidy) => shared.tidy(tidy).map(|()| true),
                None => shared.seal().map(|()| false),
            }
        })
        .await
    }

    /// Ends a merge that is under way, and lets no other change of the layers begin; reads and writes go on.
    pub async fn close(&self) {
        self.shared.closed.store(true, Ordering::Release);
        let _ended = self.changing.lock().await;
    }

    /// The base it stands on.
    pub fn meta(&self) -> crate::DeltaMeta {
        self.shared.files.meta()
    }
}

impl BlockDevice for LayeredDisk {
    fn geometry(&self) -> Geometry {
        self.shared.now().disk.geometry()
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> IoFuture<'a, ()> {
        // A change of layers changes no byte, so a read may end on those with which it began.
        let now = self.shared.now();
        Box::pin(async move { now.disk.read(offset, buf).await })
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8]) -> IoFuture<'a, ()> {
        Box::pin(async move {
            let _live = self.gate.read().await;
            let now = self.shared.now();
            now.disk.write(offset, data).await
        })
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        // What was written to a layer that is frozen now was flushed when it was frozen.
        let now = self.shared.now();
        Box::pin(async move { now.disk.flush().await })
    }

    fn discard(&self, offset: u64, bytes: u64) -> IoFuture<'_, ()> {
        Box::pin(async move {
            let _live = self.gate.read().await;
            let now = self.shared.now();
            now.disk.discard(offset, bytes).await
        })
    }

    fn extent(&self, offset: u64, bytes: u64) -> IoFuture<'_, Extent> {
        let now = self.shared.now();
        Box::pin(async move { now.disk.extent(offset, bytes).await })
    }
}

impl From<LayerError> for BlockError {
    fn from(error: LayerError) -> Self {
        Self::Unavailable {
            what: error.to_string(),
        }
    }
}
