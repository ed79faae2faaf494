//! The user plane: parents, cache, disks and exports inside this process.
//!
//! A base is a [`ChunkCache`] over paths to its parents; exports and disks are targets of one iSCSI server, which has this
//! host's one portal. What lies on the disk: `<member of the cache group>/<digest>/`, `STORE/<digest>/` and `STATE/deltas/<vm>.delta`. The rest
//! lives in this process and is made again by the plan after a restart.

mod bases;
mod device;
mod disks;
mod exports;
mod files;
pub mod foreign;
mod look;
mod source;
mod stats;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use treeboot_block::layers::{self, Arrival, Directory, Frozen, Incoming, LayerReport, LayerTree};
use treeboot_block::{
    BlockDevice, BootId, ChunkCache, Delta, DeltaError, GroupError, LayeredDisk, MemberSpec, Reader,
};
use treeboot_iscsi::target::{BindError, LunSpec, Server, ServerConfig, TargetSpec};
use treeboot_types::{DATA_LUN, Digest, HostName, ImageId, Iqn, VERITY_BLOCK_BYTES, VmName};

use super::caching::Caching;
use super::{
    Abilities, BaseStats, DiskStats, LayerBlocks, ParentFault, Plane, PlaneError, PlaneFuture, PlaneKind,
    Scope, Trouble,
};
use crate::keys::Keys;
use crate::stack::{Backing, Content, Found, FoundExport, Sources, Step, Violation, WantedDisk};
use device::Devices;
use disks::meta;
use files::{blocking, gone, remove_dir};
use source::StripedSource;
#[cfg(feature = "kernel-plane")]
pub(in crate::plane) use source::spec;

/// How long initiators of a target that goes may take to log out by themselves.
const DRAIN: Duration = Duration::from_millis(200);
/// How long a child may come before its parent was told of it, or has opened its base.
const PATIENCE: Duration = Duration::from_millis(150);
/// How long a base waits for its first block; the paths' own limit is the same.
const READABLE_LIMIT: Duration = Duration::from_secs(10);
/// Stripes are read apart by as many path groups.
const MAX_STRIPES: u32 = 16;

/// Where things lie and who serves them.
#[derive(Debug, Clone)]
pub struct UserSettings {
    /// This host: the name under which it logs in to its parents.
    pub host: HostName,
    /// Where devices are mounted and the holder is found.
    pub state: PathBuf,
    /// Deltas.
    pub deltas: PathBuf,
    /// The members of the cache group.
    pub cache: Vec<MemberSpec>,
    /// Imported images, where the host is an origin.
    pub store: Option<PathBuf>,
    /// Where the target server listens.
    pub portals: Vec<SocketAddr>,
    /// The host or address by which others reach the first portal, where it is not the one listened on.
    pub advertise: Option<String>,
    /// Secrets of parents, children and disks.
    pub keys: Arc<Keys>,
}

/// Why the plane does not start.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The portal.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// A directory.
    #[error("the directory {} cannot be used", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
    /// None of the cache group's directories.
    #[error("no directory of the cache group can be used")]
    Cache(#[from] GroupError),
    /// The machine does not tell its boots apart.
    #[error("/proc/sys/kernel/random/boot_id cannot be read; is /proc mounted?")]
    BootId(#[source] std::io::Error),
}

/// The plane.
pub struct UserPlane {
    settings: UserSettings,
    boot: BootId,
    portal: String,
    server: Server,
    devices: Devices,
    caching: Arc<Caching>,
    state: Mutex<State>,
}

/// What lives in this process. The lock is held for a look-up, never while anything waits.
#[derive(Default)]
struct State {
    paths: HashMap<Digest, Arc<StripedSource>>,
    bases: HashMap<Digest, OpenBase>,
    exports: BTreeMap<ImageId, FoundExport>,
    disks: BTreeMap<VmName, OpenDisk>,
    /// The most bytes of written blocks of disks that are served, or about to be.
    limits: BTreeMap<VmName, u64>,
    /// Bytes that exports shipped that are gone.
    shipped: HashMap<Digest, u64>,
}

#[derive(Clone)]
struct OpenBase {
    content: Content,
    backing: Backing,
    cache: Arc<ChunkCache>,
    /// A block of it was read, so what it exports is ready for everybody.
    readable: bool,
}

#[derive(Clone)]
struct OpenDisk {
    disk: WantedDisk,
    layers: Arc<LayeredDisk>,
}

impl UserPlane {
    /// Listens, and makes the directories. Call it within a tokio runtime.
    ///
    /// # Errors
    /// The portal is taken, or a directory cannot be made.
    pub fn open(settings: UserSettings) -> Result<Self, OpenError> {
        for path in [&settings.deltas].into_iter().chain(&settings.store) {
            std::fs::create_dir_all(path).map_err(|source| OpenError::Directory {
                path: path.clone(),
                source,
            })?;
        }
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map_err(OpenError::BootId)?;
        let boot = boot
            .parse()
            .map_err(|error| OpenError::BootId(std::io::Error::other(error)))?;
        let config = ServerConfig {
            patience: PATIENCE,
            ..ServerConfig::default()
        };
        let caching = Caching::open(&settings.state, settings.cache.clone())?;
        let server = Server::bind(&settings.portals, config)?;
        let bound = server.local_addrs();
        let portal = match (&settings.advertise, bound.first()) {
            (Some(host), Some(bound)) if host.contains(':') => format!("[{host}]:{}", bound.port()),
            (Some(host), Some(bound)) => format!("{host}:{}", bound.port()),
            (_, bound) => bound.map(ToString::to_string).unwrap_or_default(),
        };
        Ok(Self {
            devices: Devices::new(&settings.state),
            caching: Arc::new(caching),
            settings,
            boot,
            portal,
            server,
            state: Mutex::default(),
        })
    }

    fn store_dir(&self, digest: &Digest) -> Option<PathBuf> {
        Some(self.settings.store.as_ref()?.join(digest.to_string()))
    }

    fn delta_path(&self, vm: &VmName) -> PathBuf {
        self.settings.deltas.join(format!("{vm}.delta"))
    }

    fn base(&self, digest: &Digest) -> Option<OpenBase> {
        self.state.lock().bases.get(digest).cloned()
    }

    fn set_paths(&self, digest: Digest, sources: &Sources) {
        let source = {
            let mut state = self.state.lock();
            let initiator = Iqn::of_host(&self.settings.host);
            let keys = Arc::clone(&self.settings.keys);
            let source = state
                .paths
                .entry(digest)
                .or_insert_with(|| Arc::new(StripedSource::new(digest, initiator, keys)));
            Arc::clone(source)
        };
        source.set(sources);
    }

    fn drop_paths(&self, digest: &Digest) {
        // Dropping the group ends its sessions.
        self.state.lock().paths.remove(digest);
    }

    async fn close_base(&self, step: &Step, digest: &Digest) -> Result<(), PlaneError> {
        let base = {
            let mut state = self.state.lock();
            let export = state.exports.iter().find(|(_, export)| export.digest == *digest);
            let export = export.map(|(image, _)| format!("the export of {image}"));
            let disk = state.disks.iter().find(|(_, open)| open.disk.digest == *digest);
            let disk = disk.map(|(vm, _)| format!("the disk of VM '{vm}'"));
            if let Some(user) = export.or(disk) {
                return Err(Violation::InUse {
                    step: step.name(),
                    what: digest.short(),
                    user,
                }
                .into());
            }
            state.bases.remove(digest)
        };
        if let Some(base) = base {
            base.cache.quiesce().await;
        }
        Ok(())
    }

    async fn create_delta(&self, vm: &VmName, disk: WantedDisk) -> Result<(), PlaneError> {
        let (path, boot, vm) = (self.delta_path(vm), self.boot, vm.clone());
        let deltas = self.settings.deltas.clone();
        blocking(move || {
            // What was received for this VM is its delta.
            if layers::adopt(&deltas, &vm).map_err(|error| delta_error(&vm, error))? {
                return Ok(());
            }
            match Delta::create(&path, meta(disk), boot) {
                Ok(_) | Err(DeltaError::Exists { .. }) => Ok(()),
                Err(error) => Err(delta_error(&vm, error)),
            }
        })
        .await
    }

    async fn delete_delta(&self, step: &Step, vm: &VmName) -> Result<(), PlaneError> {
        if self.state.lock().disks.contains_key(vm) {
            return Err(Violation::InUse {
                step: step.name(),
                what: vm.to_string(),
                user: "its disk".into(),
            }
            .into());
        }
        self.state.lock().limits.remove(vm);
        let (folder, vm) = (Directory::new(&self.settings.deltas), vm.clone());
        blocking(move || layers::delete(&folder, &vm).map_err(|error| delta_error(&vm, error))).await
    }

    async fn serve_disk(&self, step: &Step, vm: &VmName, wanted: WantedDisk) -> Result<(), PlaneError> {
        if let Some(open) = self.state.lock().disks.get(vm) {
            if open.disk == wanted {
                return Ok(());
            }
            return Err(differs(step, vm).into());
        }
        let base = self
            .base(&wanted.digest)
            .ok_or_else(|| missing(step, vm, "its base"))?;
        let disk = Arc::new(
            self.open_layers(vm, wanted, base.cache.base(Reader::Guest))
                .await?,
        );
        disk.set_limit(self.state.lock().limits.get(vm).copied());
        let ident = treeboot_block::verity::sha256(format!("disk:{}:{vm}", self.settings.host).as_bytes()).0;
        let mut short = [0; 16];
        short.copy_from_slice(&ident[..16]);
        let added = self.server.add_target(TargetSpec {
            name: Iqn::of_disk(vm),
            luns: vec![LunSpec {
                lun: DATA_LUN,
                device: Arc::clone(&disk) as Arc<dyn BlockDevice>,
                serial: vm.to_string(),
                product: "disk".into(),
                ident: short,
            }],
            access: exports::front_end(&self.settings.keys, vm),
        });
        added.map_err(|source| failed(format!("serving the disk of VM '{vm}'"), source))?;
        let open = OpenDisk {
            disk: wanted,
            layers: disk,
        };
        self.state.lock().disks.insert(vm.clone(), open);
        Ok(())
    }

    async fn stop_disk(&self, vm: &VmName) {
        self.server.remove_target(&Iqn::of_disk(vm), DRAIN).await;
        let open = self.state.lock().disks.get(vm).cloned();
        if let Some(open) = open {
            // A merge that is under way ends, so that nobody writes to files that are somebody else's then.
            open.layers.close().await;
        }
        let mut state = self.state.lock();
        state.disks.remove(vm);
        state.limits.remove(vm);
    }

    async fn drop_store(&self, step: &Step, digest: &Digest) -> Result<(), PlaneError> {
        if self.base(digest).is_some_and(|base| base.backing.in_store()) {
            return Err(Violation::InUse {
                step: step.name(),
                what: digest.short(),
                user: "its base".into(),
            }
            .into());
        }
        let Some(dir) = self.store_dir(digest) else {
            return Ok(());
        };
        // Out of sight first: half a store must never look like one, and what is hidden is swept at the next start.
        let hidden = dir.with_file_name(format!("{}dropped-{digest}", crate::store::UNFINISHED));
        let renamed = gone(std::fs::rename(&dir, &hidden));
        renamed.map_err(|error| PlaneError::io(format!("removing {}", dir.display()), error))?;
        remove_dir(hidden).await
    }

    async fn carry_out(&self, step: &Step) -> Result<(), PlaneError> {
        match step {
            // Nothing here is made in two parts.
            Step::Sweep { .. } => Ok(()),
            Step::DetachDevice { vm } => self.devices.detach(vm).await,
            Step::AttachDevice { vm } => self.attach_device(step, vm).await,
            Step::StopDisk { vm } => {
                self.stop_disk(vm).await;
                Ok(())
            }
            Step::DeleteDelta { vm } => self.delete_delta(step, vm).await,
            Step::Unexport { image } => {
                self.unexport(image).await;
                Ok(())
            }
            Step::CloseBase { digest } => self.close_base(step, digest).await,
            Step::DropPaths { digest } => {
                self.drop_paths(digest);
                Ok(())
            }
            Step::DropCache { digest } => self.drop_cache(step, digest).await,
            Step::DropStore { digest } => self.drop_store(step, digest).await,
            Step::SetPaths { digest, sources } => {
                self.set_paths(*digest, sources);
                Ok(())
            }
            Step::OpenBase { content, backing } => self.open_base(step, content, *backing).await,
            Step::Export {
                image,
                digest,
                access,
            } => self.export(step, image, digest, access),
            Step::SetAccess { image, access } => self.set_access(step, image, access),
            Step::CreateDelta { vm, disk } => self.create_delta(vm, *disk).await,
            Step::LimitDisk { vm, bytes } => {
                self.limit_disk(vm, *bytes);
                Ok(())
            }
            Step::ServeDisk { vm, disk } => self.serve_disk(step, vm, *disk).await,
            Step::Layers { vm, layers } => self.change_layers(step, vm, layers).await,
        }
    }

    async fn read_first_block(&self, digest: Digest) -> Result<(), PlaneError> {
        let what = || format!("content {}", digest.short());
        let base = self
            .base(&digest)
            .ok_or_else(|| PlaneError::Missing { what: what() })?;
        let hash = base.cache.hash_device();
        let block = u64::from(VERITY_BLOCK_BYTES);
        let mut buffer = vec![0; VERITY_BLOCK_BYTES as usize];
        // The tree's top block: every check needs it, so reading it costs nothing that would not be read anyway.
        let read = if hash.geometry().bytes > block {
            hash.read(block, &mut buffer).await
        } else {
            let data = base.cache.base(Reader::Child);
            let bytes = data.geometry().bytes.min(block) as usize;
            data.read(0, &mut buffer[..bytes]).await
        };
        read.map_err(|source| failed(format!("reading {}", what()), source))?;
        self.became_readable(&digest);
        Ok(())
    }
}

pub(crate) fn delta_error(vm: &VmName, error: DeltaError) -> PlaneError {
    let what = format!("the delta of VM '{vm}'");
    match error {
        DeltaError::Io { path, source } => PlaneError::io(format!("{what} ({})", path.display()), source),
        DeltaError::Missing { .. } => PlaneError::Missing { what },
        DeltaError::InUse { .. } => failed(what, error),
        damaged => PlaneError::Damaged {
            what,
            why: damaged.to_string(),
        },
    }
}

fn failed(what: String, source: impl std::error::Error + Send + Sync + 'static) -> PlaneError {
    PlaneError::Failed {
        what,
        source: Box::new(source),
    }
}

fn missing(step: &Step, what: impl ToString, missing: &str) -> Violation {
    Violation::Missing {
        step: step.name(),
        what: what.to_string(),
        missing: missing.into(),
    }
}

fn differs(step: &Step, what: impl ToString) -> Violation {
    Violation::Differs {
        step: step.name(),
        what: what.to_string(),
    }
}

impl Plane for UserPlane {
    fn kind(&self) -> PlaneKind {
        PlaneKind::User
    }

    fn abilities(&self) -> Abilities {
        Abilities {
            max_stripes: MAX_STRIPES,
        }
    }

    fn inspect<'a>(&'a self, scope: &'a Scope) -> PlaneFuture<'a, Found> {
        Box::pin(self.look(scope))
    }

    fn apply<'a>(&'a self, step: &'a Step) -> PlaneFuture<'a, ()> {
        Box::pin(self.carry_out(step))
    }

    fn readable(&self, digest: Digest) -> PlaneFuture<'_, ()> {
        Box::pin(async move {
            let read = self.read_first_block(digest);
            match tokio::time::timeout(READABLE_LIMIT, read).await {
                Ok(result) => result,
                Err(_) => Err(PlaneError::TooLong {
                    what: format!("the first block of content {}", digest.short()),
                    limit_ms: READABLE_LIMIT.as_millis() as u64,
                }),
            }
        })
    }

    fn base_stats(&self, digest: &Digest) -> Option<BaseStats> {
        self.count_base(digest)
    }

    fn disk_stats(&self, vm: &VmName) -> Option<DiskStats> {
        self.count_disk(vm)
    }

    fn held(&self, vm: &VmName, transfer: u64) -> Result<Arc<Frozen>, PlaneError> {
        self.read_held(vm, transfer)
    }

    fn receive<'a>(&'a self, arrival: &'a Arrival) -> PlaneFuture<'a, Arc<Incoming>> {
        Box::pin(self.begin_receiving(arrival))
    }

    fn layered(&self, vm: &VmName) -> Result<Arc<LayeredDisk>, PlaneError> {
        self.layers_of(vm)
    }

    fn finish<'a>(
        &'a self,
        arrival: &'a Arrival,
        tree: &'a LayerTree,
        blocks: &'a LayerBlocks,
    ) -> PlaneFuture<'a, ()> {
        Box::pin(self.finish_arrival(arrival, tree, blocks))
    }

    fn discard<'a>(&'a self, vm: &'a VmName, transfer: Option<u64>) -> PlaneFuture<'a, ()> {
        Box::pin(self.discard_arrival(vm, transfer))
    }

    fn arrivals(&self, owned: BTreeSet<VmName>) -> PlaneFuture<'_, BTreeSet<(VmName, u64)>> {
        Box::pin(self.find_arrivals(owned))
    }

    fn layers<'a>(&'a self, vm: &'a VmName, check: bool) -> PlaneFuture<'a, Vec<LayerReport>> {
        Box::pin(self.report_layers(vm, check))
    }

    fn access_map(&self, digest: &Digest) -> Vec<(u32, u32)> {
        self.base(digest)
            .map(|base| base.cache.access_map())
            .unwrap_or_default()
    }

    fn rekey(&self) -> PlaneFuture<'_, ()> {
        // Exports look their children's secrets up at each login.
        let sources: Vec<_> = self.state.lock().paths.values().cloned().collect();
        for source in sources {
            source.set(&source.sources());
        }
        Box::pin(async { Ok(()) })
    }

    fn cache(&self) -> Option<&Arc<Caching>> {
        Some(&self.caching)
    }

    fn troubles(&self) -> Vec<Trouble> {
        self.caching.troubles()
    }

    fn device(&self, vm: &VmName) -> Option<PathBuf> {
        self.devices.path(vm)
    }

    fn take_faults(&self) -> Vec<ParentFault> {
        self.faults_of_parents()
    }

    fn portal(&self) -> String {
        self.portal.clone()
    }

    fn close(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(async move {
            self.devices.close().await;
            // Front ends are not asked to log out: they are to come back to the next agent, not to give up.
            self.server.shutdown(Duration::ZERO).await;
            let state = std::mem::take(&mut *self.state.lock());
            for base in state.bases.values() {
                base.cache.quiesce().await;
            }
        })
    }
}
