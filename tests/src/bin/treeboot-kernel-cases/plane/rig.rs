//! A host with the kernel plane, and two parents of the user plane to read from, all in one guest.

use std::fs::OpenOptions;
use std::net::SocketAddr;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use treeboot_agent::apply::Applier;
use treeboot_agent::conformance::{Rig, TestImage};
use treeboot_agent::journal::Journal;
use treeboot_agent::plane::kernel::{
    CacheSettings, DELTA_CHUNK_BYTES, KernelPlane, KernelSettings, OpenError,
};
use treeboot_agent::plane::{DiskPlace, Plane, Scope};
use treeboot_agent::stack::{Content, Found, PathTo, Sources, StripePaths, Wanted};
use treeboot_block::storage::{FileStorage, OpenMode};
use treeboot_block::{CacheOptions, ChunkCache, ImageContent, Reader, VerityBuilder, VerityLayout};
use treeboot_dm::group::Kind;
use treeboot_iscsi::initiator::{Session, SessionOptions};
use treeboot_iscsi::lio::Lio;
use treeboot_iscsi::open_iscsi::{OpenIscsi, Settings};
use treeboot_iscsi::target::{Access, LunSpec, Server, ServerConfig, TargetSpec};
use treeboot_types::{DATA_LUN, Endpoint, HASH_LUN, HostName, ImageId, Iqn, VmName};

/// Where LIO listens.
const PORTAL: &str = "127.0.0.1:3260";
/// Any free port of a parent.
const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);
/// A login with a parent that does not answer takes seconds.
const OPENS_WITHIN: Duration = Duration::from_secs(60);
/// More than either kind needs at least.
const CACHE_BYTES: u64 = 128 << 20;
const HOST: &str = "under-test";
const BLOCK: usize = 4096;
/// O_DIRECT, so that what is read is what the device says.
const DIRECT: i32 = nix::fcntl::OFlag::O_DIRECT.bits();

/// What the rig before this one left: laws do not tidy up.
static BEFORE: Mutex<Option<(PathBuf, Setup)>> = Mutex::new(None);

/// Rigs so far.
static COUNT: AtomicU32 = AtomicU32::new(0);

/// Starts iscsid where it does not run.
pub(crate) fn start_iscsid() {
    let run = |program: &str, args: &[&str]| {
        let _ = std::process::Command::new(program).args(args).status();
    };
    if !Path::new("/run/iscsid.pid").exists() {
        run("iscsid", &[]);
    }
}

/// How a host is set up.
#[derive(Debug, Clone)]
pub(crate) struct Setup {
    pub(crate) cache: Option<Kind>,
    /// Cache devices or files; none: the agent's own file.
    pub(crate) devices: Vec<PathBuf>,
    pub(crate) fill_bytes_per_second: u64,
    pub(crate) delta_step: Option<u64>,
    /// Blocks of each image.
    pub(crate) blocks: usize,
}

impl From<Option<Kind>> for Setup {
    fn from(cache: Option<Kind>) -> Self {
        Self {
            cache,
            devices: Vec::new(),
            fill_bytes_per_second: 20 << 20,
            delta_step: None,
            blocks: 300,
        }
    }
}

struct Parent {
    server: Server,
}

pub(crate) struct KernelRig {
    pub(crate) dir: PathBuf,
    plane: Option<Arc<KernelPlane>>,
    journal: Option<Journal>,
    pub(crate) images: [TestImage; 2],
    pub(crate) setup: Setup,
    /// They serve as long as they are here.
    parents: [Parent; 2],
}

/// Where cases keep their files: a file system that loop devices work on.
fn cases_dir() -> PathBuf {
    std::env::var_os("TREEBOOT_CASES_DIR").map_or_else(std::env::temp_dir, PathBuf::from)
}

/// Writes a store directory; returns what it holds.
fn stored(dir: &Path, n: u8, bytes: usize) -> (Content, Vec<u8>) {
    // Every 4 KiB block is another, and some are zero.
    let data: Vec<u8> = (0..bytes)
        .map(|i| match i / BLOCK % 11 {
            3 => 0,
            _ => (i / BLOCK * 31 + i % 251) as u8 ^ n,
        })
        .collect();
    std::fs::create_dir_all(dir).expect("a directory");
    let layout = VerityLayout::new(bytes as u64);
    std::fs::write(dir.join("data"), &data).expect("written");
    let hash = FileStorage::open(&dir.join("hash"), OpenMode::CreateNew).expect("made");
    let mut builder = VerityBuilder::new(layout, &hash);
    builder.update(&data).expect("hashed");
    let content = Content {
        digest: builder.finish().expect("a root"),
        bytes: bytes as u64,
        chunk_bytes: 65536,
    };
    (content, data)
}

fn serve(server: &Server, cache: &Arc<ChunkCache>, id: &ImageId) {
    let lun = |lun: u16, device| LunSpec {
        lun,
        device,
        serial: "test".into(),
        product: "test".into(),
        ident: [lun as u8; 16],
    };
    server
        .add_target(TargetSpec {
            name: Iqn::of_image(id),
            luns: vec![
                lun(DATA_LUN, cache.base(Reader::Child)),
                lun(HASH_LUN, cache.hash_device()),
            ],
            access: Access::Anyone,
        })
        .expect("served");
}

fn path(server: &Server, id: &ImageId, host: &str) -> PathTo {
    PathTo {
        host: Some(HostName::new(host).expect("a name")),
        endpoint: Endpoint {
            portal: server.local_addrs()[0].to_string().parse().expect("a portal"),
            target: Iqn::of_image(id),
            data_lun: DATA_LUN,
            hash_lun: Some(HASH_LUN),
        },
    }
}

fn sources(active: PathTo) -> Sources {
    Sources {
        unit_bytes: 1 << 20,
        stripes: vec![StripePaths {
            active: vec![active],
            ..StripePaths::default()
        }],
    }
}

pub(crate) fn settings(dir: &Path, setup: &Setup) -> KernelSettings {
    KernelSettings {
        host: HostName::new(HOST).expect("a name"),
        state: dir.join("kernel"),
        deltas: dir.join("deltas"),
        cache: dir.join("cache"),
        store: None,
        portals: vec![PORTAL.parse().expect("an address")],
        advertise: None,
        keys: std::sync::Arc::new(treeboot_agent::keys::Keys::none()),
        delta_step: setup.delta_step,
        delta_chunk_bytes: DELTA_CHUNK_BYTES,
        queue_limit: Duration::from_secs(20),
        group: setup.cache.map(|kind| CacheSettings {
            kind,
            devices: setup.devices.clone(),
            file_bytes: CACHE_BYTES,
            fill_bytes_per_second: setup.fill_bytes_per_second,
        }),
    }
}

fn image(dir: &Path, n: u8, blocks: usize, parents: &[Parent; 2]) -> TestImage {
    let id: ImageId = format!("image-{n}@1").parse().expect("an image");
    let store = dir.join(format!("store-{n}"));
    let (content, bytes) = stored(&store, n, blocks * BLOCK);
    let cache = ChunkCache::open(
        &store,
        ImageContent {
            digest: content.digest,
            bytes: content.bytes,
            chunk_bytes: content.chunk_bytes,
        },
        Arc::new(treeboot_block::cache::NoSource),
        CacheOptions::complete(),
    )
    .expect("a whole store");
    for parent in parents {
        serve(&parent.server, &cache, &id);
    }
    TestImage {
        content,
        bytes: Arc::new(bytes),
        sources: [0, 1].map(|n| sources(path(&parents[n].server, &id, &format!("parent-{n}")))),
        id,
    }
}

/// Removes all that a former rig left, by the plane's own means.
async fn tidy(dir: &Path, setup: &Setup) {
    let plane = open(dir, setup).await;
    let journal = Journal::open(dir).expect("a journal").0;
    let found = plane.inspect(&Scope::All).await.expect("a look");
    let nothing = Wanted {
        doomed_disks: found.deltas.into_keys().collect(),
        ..Wanted::default()
    };
    let applier = Applier {
        plane: Arc::clone(&plane) as Arc<dyn Plane>,
        journal,
    };
    applier.reach(&Scope::All, &nothing).await.expect("removed");
    assert_eq!(
        plane.inspect(&Scope::All).await.expect("a look"),
        Found::default()
    );
}

/// Opens a plane as soon as all threads of the one before have ended, as they would have with its process.
async fn open(dir: &Path, setup: &Setup) -> Arc<KernelPlane> {
    let begun = Instant::now();
    loop {
        match KernelPlane::open(settings(dir, setup)) {
            Err(OpenError::InUse) if begun.elapsed() < OPENS_WITHIN => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            opened => return Arc::new(opened.expect("opens")),
        }
    }
}

/// Removes what the last rig left.
pub(crate) async fn tidy_up() {
    let before = BEFORE.lock().take();
    if let Some((dir, setup)) = before {
        tidy(&dir, &setup).await;
        std::fs::remove_dir_all(&dir).expect("removed");
    }
}

/// A fresh host.
pub(crate) async fn rig(cache: Option<Kind>) -> KernelRig {
    rig_with(cache.into()).await
}

/// A fresh host that is set up so.
pub(crate) async fn rig_with(setup: Setup) -> KernelRig {
    tidy_up().await;
    let dir = cases_dir().join(format!("rig-{}", COUNT.fetch_add(1, Ordering::Relaxed)));
    std::fs::create_dir_all(&dir).expect("a directory");
    *BEFORE.lock() = Some((dir.clone(), setup.clone()));
    let parent = || Parent {
        server: Server::bind(&[LOOPBACK], ServerConfig::default()).expect("bound"),
    };
    let parents = [parent(), parent()];
    let images = [0, 1].map(|n| image(&dir, n, setup.blocks, &parents));
    KernelRig {
        plane: Some(open(&dir, &setup).await),
        journal: Some(Journal::open(&dir).expect("a journal").0),
        dir,
        images,
        setup,
        parents,
    }
}

/// Reads a block device past the page cache; offset and length are multiples of a block.
pub(crate) fn read_device(path: &Path, at: u64, bytes: usize) -> std::io::Result<Vec<u8>> {
    let device = OpenOptions::new().read(true).custom_flags(DIRECT).open(path)?;
    let mut buffer = vec![0; bytes + BLOCK];
    let skip = buffer.as_ptr().align_offset(BLOCK);
    device.read_exact_at(&mut buffer[skip..skip + bytes], at)?;
    Ok(buffer[skip..skip + bytes].to_vec())
}

pub(crate) fn write_device(path: &Path, at: u64, data: &[u8]) -> std::io::Result<()> {
    let device = OpenOptions::new().write(true).custom_flags(DIRECT).open(path)?;
    let mut buffer = vec![0; data.len() + BLOCK];
    let skip = buffer.as_ptr().align_offset(BLOCK);
    buffer[skip..skip + data.len()].copy_from_slice(data);
    device.write_all_at(&buffer[skip..skip + data.len()], at)
}

async fn waiting<T: Send + 'static>(
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T, String> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|e| e.to_string())?.map_err(|e| e.to_string())
}

impl KernelRig {
    /// Ends the plane, so that another process can have this kernel.
    pub(crate) fn away(&mut self) {
        self.plane = None;
        self.journal = None;
    }
    /// A parent dies: its sessions are cut, and nobody listens there any more.
    pub(crate) async fn kill_parent(&self, n: usize) {
        self.parents[n].server.shutdown(Duration::ZERO).await;
    }
    /// Opens the plane again.
    pub(crate) async fn back(&mut self) {
        *BEFORE.lock() = Some((self.dir.clone(), self.setup.clone()));
        self.plane = Some(open(&self.dir, &self.setup).await);
        self.journal = Some(Journal::open(&self.dir).expect("a journal").0);
    }
    pub(crate) fn disk(&self, vm: &VmName) -> PathBuf {
        match self.plane().disk_place(vm).expect("a place") {
            DiskPlace::Device(path) => path,
            DiskPlace::Lun(url) => panic!("a LUN: {url}"),
        }
    }

    async fn export(&self, id: &ImageId, host: &HostName) -> Result<Session, String> {
        let options = SessionOptions::new(PORTAL, Iqn::of_image(id), Iqn::of_host(host));
        Session::connect(options).await.map_err(|e| e.to_string())
    }
}

impl Rig for KernelRig {
    fn plane(&self) -> Arc<dyn Plane> {
        Arc::clone(self.plane.as_ref().expect("open")) as Arc<dyn Plane>
    }
    fn journal(&self) -> Journal {
        self.journal.clone().expect("open")
    }
    fn image(&self, n: usize) -> TestImage {
        self.images[n].clone()
    }
    async fn restart(&mut self) {
        let old = self.plane.take().expect("open");
        let weak = Arc::downgrade(&old);
        drop(old);
        assert!(weak.upgrade().is_none(), "nobody else holds the plane");
        self.journal = None;
        self.back().await;
    }
    async fn read_export(
        &self,
        id: &ImageId,
        host: &HostName,
        at: u64,
        bytes: usize,
    ) -> Result<Vec<u8>, String> {
        let session = self.export(id, host).await?;
        let read = session.read(DATA_LUN, at, bytes as u32).await;
        let read = read.map(|bytes| bytes.to_vec()).map_err(|e| e.to_string());
        session.close().await;
        read
    }
    async fn write_export(&self, id: &ImageId, host: &HostName, at: u64, data: &[u8]) -> Result<(), String> {
        let session = self.export(id, host).await?;
        let written = session.write(DATA_LUN, at, data.to_vec().into()).await;
        session.close().await;
        written.map_err(|e| e.to_string())
    }
    async fn read_disk(&self, vm: &VmName, at: u64, bytes: usize) -> Result<Vec<u8>, String> {
        let path = self.disk(vm);
        waiting(move || read_device(&path, at, bytes)).await
    }
    async fn write_disk(&self, vm: &VmName, at: u64, data: &[u8]) -> Result<(), String> {
        let (path, data) = (self.disk(vm), data.to_vec());
        waiting(move || write_device(&path, at, &data)).await
    }
    async fn flush_disk(&self, vm: &VmName) -> Result<(), String> {
        let path = self.disk(vm);
        waiting(move || OpenOptions::new().write(true).open(&path)?.sync_all()).await
    }
    async fn residue(&self) -> Vec<String> {
        let mut residue = Vec::new();
        for dir in ["deltas", "cache", "kernel"] {
            for entry in std::fs::read_dir(self.dir.join(dir)).expect("a directory") {
                residue.push(entry.expect("an entry").path().display().to_string());
            }
        }
        let mapper = treeboot_dm::Mapper::new().expect("device-mapper");
        for seen in mapper.list().expect("a list") {
            residue.push(format!("device {}", seen.device));
        }
        for device in treeboot_dm::loops::list().expect("a list") {
            residue.push(format!(
                "{} over {}",
                device.path.display(),
                device.file.display()
            ));
        }
        let lio = Lio::default().found().expect("a look");
        residue.extend(lio.targets.iter().map(|target| format!("target {}", target.name)));
        residue.extend(
            lio.backstores
                .iter()
                .map(|store| format!("backstore {}", store.name)),
        );
        let iscsi = OpenIscsi::new(&HostName::new(HOST).expect("a name"), Settings::default());
        for session in iscsi.sessions().expect("a look") {
            residue.push(format!("session {}", session.endpoint));
        }
        let found = self.plane().inspect(&Scope::All).await.expect("a look");
        if found != Found::default() {
            residue.push(format!("{found:?}"));
        }
        residue
    }
}
