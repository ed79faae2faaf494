//! The kernel plane: open-iscsi, device-mapper, the kernel's caches and LIO, so that data stays in the kernel.
//!
//! For each content, from below: sessions with parents → dm-multipath, one a stripe → dm-switch over several → dm-verity with the hash
//! tree in a local file → cache group → base. Over the base: an export through LIO, and each VM's disk as a persistent dm-snapshot with
//! a `/dev/mapper` path. All of it outlives the agent: VMs and children go on while it is away. What the agent alone does is to take
//! paths back, to end a wait for parents that are all gone, to fill the cache and to extend deltas.
//!
//! What the kernel cannot tell of itself lies in records ([`record`]); everything else is read from the kernel at each look.

mod base;
mod cached;
mod disks;
mod exports;
mod feed;
mod hashes;
mod keeper;
mod links;
mod look;
mod needs;
mod record;
mod serving;
mod stats;
mod steps;
mod sys;
mod tables;

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::net::SocketAddr;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use parking_lot::Mutex;
use tokio::task::AbortHandle;
use treeboot_dm::{DmDevice, Mapper};
use treeboot_iscsi::open_iscsi::OpenIscsi;
use treeboot_types::{Digest, HostName, Iqn, VERITY_BLOCK_BYTES, VmName};

use super::links as stable;
use super::{
    Abilities, BaseStats, DiskPlace, DiskStats, ParentFault, Plane, PlaneError, PlaneFuture, PlaneKind,
    Scope, Trouble,
};
use crate::keys::Keys;
use crate::stack::{Backing, Found, Step};
use disks::Growth;
use feed::Feed;
use keeper::Keeper;
use record::{BaseRecord, Deltas, Records};
use sys::{Sys, within};

pub use cached::CacheSettings;
use cached::Cached;
pub use needs::{Need, NeedError};

/// How long a base waits for its first block.
const READABLE_LIMIT: Duration = Duration::from_secs(10);
/// Stripes are read apart by as many multipath devices.
const MAX_STRIPES: u32 = 16;
/// Between two looks at how full the deltas are: a VM that writes more than half a step between two looks loses its disk.
const DELTAS_EVERY: Duration = Duration::from_millis(200);
/// Between two looks at the cache: where a base gave up both the cache and its parents, its reads fail until the look.
const CACHE_EVERY: Duration = Duration::from_millis(250);
/// How long reads wait while no parent answers, unless it is set: longer than a parent's restart, shorter than the 120 s after which the
/// kernel calls a task hung.
pub const QUEUE_LIMIT: Duration = Duration::from_secs(60);
/// Unit of copying of a disk, unless it is set. `docs/kernel-plane.md` has the measurement.
pub const DELTA_CHUNK_BYTES: u32 = 4096;
/// The file that keeps a second agent from this kernel's devices.
const LOCK: &str = "/run/treeboot-kernel-plane.lock";

/// Where things lie and how the plane behaves.
#[derive(Debug, Clone)]
pub struct KernelSettings {
    /// This host: the name under which it logs in to its parents.
    pub host: HostName,
    /// Records of what was made.
    pub state: PathBuf,
    /// Deltas.
    pub deltas: PathBuf,
    /// Hash trees, and what the cache group keeps in files.
    pub cache: PathBuf,
    /// Imported images, where the host is an origin.
    pub store: Option<PathBuf>,
    /// Where LIO listens; no port 0.
    pub portals: Vec<SocketAddr>,
    /// The host or address by which others reach the first portal, where it is not the one listened on.
    pub advertise: Option<String>,
    /// Secrets of parents and children.
    pub keys: Arc<Keys>,
    /// By how many bytes a delta's file grows; `None`: it has its full size, sparse, from the beginning.
    pub delta_step: Option<u64>,
    /// Unit of copying of disks in bytes: a power of two from 4096.
    pub delta_chunk_bytes: u32,
    /// How long reads wait while no parent answers.
    pub queue_limit: Duration,
    /// How it caches; `None`: not at all.
    pub group: Option<CacheSettings>,
}

/// Why the plane does not start.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The host lacks something.
    #[error(transparent)]
    Need(#[from] NeedError),
    /// The portal has no port.
    #[error("LIO cannot take a free port by itself; give the portal {0} a port, for instance --portal {ip}:3260", ip = .0.ip())]
    NoPort(SocketAddr),
    /// No portal.
    #[error("no portal was given; say --portal ADDRESS:PORT")]
    NoPortal,
    /// A directory.
    #[error("the directory {} cannot be used", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
    /// Another agent.
    #[error(
        "another agent of the kernel plane runs on this kernel (it holds {LOCK}); device-mapper's names and LIO's targets are the \
         whole machine's, so stop that one, or give this one --plane user"
    )]
    InUse,
    /// What is there cannot be read.
    #[error("what is on this host cannot be seen")]
    Look(#[from] PlaneError),
}

/// The plane.
pub struct KernelPlane {
    sys: Arc<Sys>,
    portal: String,
    max_stripes: u32,
    feeds: Mutex<HashMap<Digest, Arc<Feed>>>,
    keepers: Mutex<HashMap<Digest, Keeper>>,
    bases: Mutex<HashSet<Digest>>,
    disks: Arc<Mutex<HashSet<VmName>>>,
    watchers: [AbortHandle; 2],
}

impl Drop for KernelPlane {
    fn drop(&mut self) {
        self.end_tasks();
    }
}

impl KernelPlane {
    /// Looks whether the host has what is needed, takes up what a former life of the agent left, and keeps its paths. Blocks for a
    /// moment; call it within a tokio runtime.
    ///
    /// # Errors
    /// [`OpenError`] names what is missing and what to type.
    pub fn open(settings: KernelSettings) -> Result<Self, OpenError> {
        let portal = match settings.portals.first() {
            None => return Err(OpenError::NoPortal),
            Some(portal) if portal.port() == 0 => return Err(OpenError::NoPort(*portal)),
            Some(portal) => match &settings.advertise {
                Some(host) if host.contains(':') => format!("[{host}]:{}", portal.port()),
                Some(host) => format!("{host}:{}", portal.port()),
                None => portal.to_string(),
            },
        };
        let (mapper, lio) = needs::meet(settings.group.as_ref().map(|group| group.kind))?;
        let iscsi = OpenIscsi::new(&settings.host, treeboot_iscsi::open_iscsi::Settings::default());
        iscsi.check().map_err(NeedError::from)?;
        let lock = lock()?;
        let directory = |path: &PathBuf| {
            let path = path.clone();
            move |source| OpenError::Directory { path, source }
        };
        for path in [&settings.cache].into_iter().chain(&settings.store) {
            std::fs::create_dir_all(path).map_err(directory(path))?;
        }
        let records = Records::open(settings.state.clone()).map_err(directory(&settings.state))?;
        let deltas = Deltas::open(settings.deltas.clone()).map_err(directory(&settings.deltas))?;
        let sys = Arc::new(Sys {
            initiator: Iqn::of_host(&settings.host),
            settings,
            mapper: Arc::new(mapper),
            cached: Cached::default(),
            lio,
            iscsi,
            records,
            deltas,
            _lock: lock,
        });
        let disks = Arc::new(Mutex::new(HashSet::new()));
        let watchers = [
            tokio::spawn(watch_deltas(Arc::clone(&sys), Arc::clone(&disks))).abort_handle(),
            tokio::spawn(watch_cache(Arc::clone(&sys))).abort_handle(),
        ];
        let plane = Self {
            sys,
            portal,
            max_stripes: if needs::splits_stripes() { MAX_STRIPES } else { 1 },
            feeds: Mutex::default(),
            keepers: Mutex::default(),
            bases: Mutex::default(),
            disks,
            watchers,
        };
        plane.take_up()?;
        Ok(plane)
    }

    /// Goes on keeping what was there before this process.
    fn take_up(&self) -> Result<(), PlaneError> {
        let found = look::look(&self.sys, &Scope::All)?;
        self.bases.lock().extend(found.bases.keys());
        self.disks.lock().extend(found.disks.keys().cloned());
        let mut feeds = self.feeds.lock();
        for (digest, sources) in found.paths {
            let base = found.bases.get(&digest).map(|base| BaseRecord {
                content: base.content,
                backing: base.backing,
            });
            let feed = Feed::start(&self.sys, digest, sources, base);
            if let Some(base) = base {
                self.keep(&feed, base);
            }
            feeds.insert(digest, feed);
        }
        Ok(())
    }

    /// Has a base taken over to the cache.
    fn keep(&self, feed: &Arc<Feed>, base: BaseRecord) {
        if base.backing == Backing::Cache && self.sys.settings.group.is_some() {
            let keeper = Keeper::start(&self.sys, feed, base);
            self.keepers.lock().insert(base.content.digest, keeper);
        }
    }

    fn end_tasks(&self) {
        for watcher in &self.watchers {
            watcher.abort();
        }
        self.keepers.lock().clear();
        for feed in self.feeds.lock().values() {
            feed.stop();
        }
    }

    fn feed(&self, digest: &Digest) -> Option<Arc<Feed>> {
        self.feeds.lock().get(digest).cloned()
    }

    async fn look(&self, scope: Scope) -> Result<Found, PlaneError> {
        let sys = Arc::clone(&self.sys);
        within("looking at this host", move || look::look(&sys, &scope)).await
    }

    async fn read_first_block(&self, digest: Digest) -> Result<(), PlaneError> {
        let path = Mapper::path(&DmDevice::Base(digest));
        let read = tokio::task::spawn_blocking(move || {
            let mut block = [0; VERITY_BLOCK_BYTES as usize];
            File::open(&path)?.read_exact_at(&mut block, 0)
        });
        match read.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) if error.kind() == std::io::ErrorKind::NotFound => Err(PlaneError::Missing {
                what: format!("the base of content {}", digest.short()),
            }),
            Ok(Err(error)) => Err(PlaneError::io(
                format!("reading content {}", digest.short()),
                error,
            )),
            Err(panic) => Err(failed(format!("reading content {}", digest.short()), panic)),
        }
    }
}

/// Keeps a second agent from this kernel; released with the process.
fn lock() -> Result<Flock<File>, OpenError> {
    let path = PathBuf::from(LOCK);
    let file = std::fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|source| OpenError::Directory {
            path: path.clone(),
            source,
        })?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        nix::errno::Errno::EWOULDBLOCK => OpenError::InUse,
        errno => OpenError::Directory {
            path,
            source: errno.into(),
        },
    })
}

/// Looks whether the cache serves; leaves it where it does not.
async fn watch_cache(sys: Arc<Sys>) {
    let mut said = None;
    loop {
        tokio::time::sleep(CACHE_EVERY).await;
        let looked = Arc::clone(&sys);
        let error = within("looking at the cache", move || cached::watch(&looked))
            .await
            .err();
        let error = error.map(|error| crate::host::chain(&error));
        // Once, not twice a second.
        if let Some(error) = error.as_ref().filter(|_| error != said) {
            tracing::warn!(%error, "the cache was not looked at, or not left; tried again");
        }
        said = error;
    }
}

/// Extends deltas before they fill, where they grow by steps; tells of those that are lost.
async fn watch_deltas(sys: Arc<Sys>, disks: Arc<Mutex<HashSet<VmName>>>) {
    let mut lost = HashSet::new();
    loop {
        tokio::time::sleep(DELTAS_EVERY).await;
        let vms: Vec<VmName> = disks.lock().iter().cloned().collect();
        for vm in vms {
            let (sys, name) = (Arc::clone(&sys), vm.clone());
            let step = sys.settings.delta_step.unwrap_or(0);
            match within("looking at a delta", move || disks::grow(&sys, &name, step)).await {
                Ok(Growth::Grown(bytes)) => tracing::info!(%vm, bytes, "the delta's file was extended"),
                Ok(Growth::Lost) => {
                    if lost.insert(vm.clone()) {
                        tracing::error!(%vm, "the delta is lost: its file system had no room left, or a write to it failed");
                    }
                }
                Ok(Growth::Enough | Growth::Largest) => {}
                Err(error) => {
                    tracing::warn!(%vm, error = %crate::host::chain(&error), "the delta was not looked at");
                }
            }
        }
    }
}

fn failed(
    what: impl Into<String>,
    source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> PlaneError {
    PlaneError::Failed {
        what: what.into(),
        source: source.into(),
    }
}

/// File operations and checks on a thread that may wait.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, PlaneError> + Send + 'static,
) -> Result<T, PlaneError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(failed("a file operation", error)),
    }
}

impl Plane for KernelPlane {
    fn kind(&self) -> PlaneKind {
        PlaneKind::Kernel
    }

    fn abilities(&self) -> Abilities {
        Abilities {
            max_stripes: self.max_stripes,
        }
    }

    fn inspect<'a>(&'a self, scope: &'a Scope) -> PlaneFuture<'a, Found> {
        Box::pin(self.look(scope.clone()))
    }

    fn apply<'a>(&'a self, step: &'a Step) -> PlaneFuture<'a, ()> {
        Box::pin(self.carry_out(step))
    }

    fn readable(&self, digest: Digest) -> PlaneFuture<'_, ()> {
        Box::pin(async move {
            match tokio::time::timeout(READABLE_LIMIT, self.read_first_block(digest)).await {
                Ok(result) => result,
                Err(_) => {
                    let why = self.feed(&digest).map(|feed| feed.why()).unwrap_or_default();
                    Err(PlaneError::TooLong {
                        what: format!("the first block of content {} ({why})", digest.short()),
                        limit_ms: READABLE_LIMIT.as_millis() as u64,
                    })
                }
            }
        })
    }

    fn base_stats(&self, digest: &Digest) -> Option<BaseStats> {
        self.count_base(digest)
    }

    fn disk_stats(&self, vm: &VmName) -> Option<DiskStats> {
        self.count_disk(vm)
    }

    fn access_map(&self, _: &Digest) -> Vec<(u32, u32)> {
        // The kernel does not tell which blocks were read.
        Vec::new()
    }

    fn disk_place(&self, vm: &VmName) -> Result<DiskPlace, PlaneError> {
        Ok(DiskPlace::Device(Mapper::path(&DmDevice::Disk(vm.clone()))))
    }

    fn device(&self, vm: &VmName) -> Option<PathBuf> {
        let device = Mapper::path(&DmDevice::Disk(vm.clone()));
        (stable::target(vm)? == device).then(|| stable::path(vm))
    }

    fn troubles(&self) -> Vec<Trouble> {
        let troubles = self.sys.cached.serving.troubles().into_iter();
        troubles
            .map(|(content, why)| Trouble {
                kind: "cache",
                name: content.map_or_else(|| "group".into(), |content| content.to_string()),
                why,
            })
            .collect()
    }

    fn rekey(&self) -> PlaneFuture<'_, ()> {
        // Sessions with parents are made with the secrets of the moment.
        Box::pin(self.rekey_exports())
    }

    fn take_faults(&self) -> Vec<ParentFault> {
        let feeds: Vec<_> = self.feeds.lock().values().cloned().collect();
        let now = tokio::time::Instant::now();
        feeds.iter().flat_map(|feed| feed.take_faults(now)).collect()
    }

    fn portal(&self) -> String {
        self.portal.clone()
    }

    fn close(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        // VMs and children go on without the agent, so the kernel's part stays.
        Box::pin(async move { self.end_tasks() })
    }
}
