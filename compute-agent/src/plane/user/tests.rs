//! The user plane under the suite that every plane must pass: a real server, real sessions, on loopback.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use treeboot_block::storage::{FileStorage, OpenMode};
use treeboot_block::{
    CacheOptions, ChunkCache, ImageContent, MemberSpec, Reader, VerityBuilder, VerityLayout,
};
use treeboot_iscsi::initiator::{AccessReported, Session, SessionOptions};
use treeboot_iscsi::target::{Access, LunSpec, Server, ServerConfig, TargetSpec};
use treeboot_types::{DATA_LUN, Endpoint, HASH_LUN, HostName, ImageId, Iqn, VmName};

use super::{UserPlane, UserSettings};
use crate::conformance::{self, Rig, TestImage};
use crate::journal::Journal;
use crate::plane::{Plane, Scope};
use crate::stack::{Content, Found, PathTo, Sources, StripePaths};

const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

/// A parent: a store served by a server of its own.
struct ParentHost {
    server: Server,
}

struct UserRig {
    dir: tempfile::TempDir,
    plane: Option<Arc<UserPlane>>,
    journal: Option<Journal>,
    images: [TestImage; 2],
    parents: [ParentHost; 2],
}

/// Writes a store directory; returns what it holds.
fn stored(dir: &Path, n: u8, bytes: usize) -> (Content, Vec<u8>) {
    // Every 4 KiB block is another, and some are zero.
    let data: Vec<u8> = (0..bytes)
        .map(|i| {
            if i / 4096 % 11 == 3 {
                0
            } else {
                (i / 4096 * 31 + i % 251) as u8 ^ n
            }
        })
        .collect();
    std::fs::create_dir_all(dir).unwrap();
    let layout = VerityLayout::new(bytes as u64);
    let mut padded = data.clone();
    padded.resize(layout.padded_bytes() as usize, 0);
    std::fs::write(dir.join("data"), &padded).unwrap();
    let hash = FileStorage::open(&dir.join("hash"), OpenMode::CreateNew).unwrap();
    let mut builder = VerityBuilder::new(layout, &hash);
    builder.update(&data).unwrap();
    let content = Content {
        digest: builder.finish().unwrap(),
        bytes: bytes as u64,
        chunk_bytes: 65536,
    };
    (content, data)
}

fn serve(server: &Server, cache: &Arc<ChunkCache>, id: &ImageId) {
    let lun = |lun, device| LunSpec {
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
        .unwrap();
}

fn path(server: &Server, id: &ImageId, host: &str) -> PathTo {
    PathTo {
        host: Some(HostName::new(host).unwrap()),
        endpoint: Endpoint {
            portal: server.local_addrs()[0].to_string().parse().unwrap(),
            target: Iqn::of_image(id),
            data_lun: DATA_LUN,
            hash_lun: Some(HASH_LUN),
        },
    }
}

fn sources(active: PathTo, fallback: Option<PathTo>) -> Sources {
    Sources {
        unit_bytes: 1 << 20,
        stripes: vec![StripePaths {
            active: vec![active],
            fallbacks: fallback.into_iter().collect(),
            ..StripePaths::default()
        }],
    }
}

fn plane(dir: &Path) -> Arc<UserPlane> {
    let settings = UserSettings {
        host: HostName::new("under-test").unwrap(),
        state: dir.to_owned(),
        deltas: dir.join("deltas"),
        cache: vec![MemberSpec {
            path: dir.join("cache"),
            budget: None,
        }],
        store: None,
        portals: vec![LOOPBACK],
        advertise: None,
        keys: Arc::new(crate::keys::Keys::none()),
    };
    Arc::new(UserPlane::open(settings).unwrap())
}

/// A store of image `n` below `dir`, served by both parents.
fn image(dir: &Path, n: u8, parents: &[ParentHost; 2]) -> TestImage {
    let id: ImageId = format!("image-{n}@1").parse().unwrap();
    let store = dir.join(format!("store-{n}"));
    let (content, bytes) = stored(&store, n, 300 * 4096 + 512 * 3);
    let cache = ChunkCache::open(
        &store,
        ImageContent {
            digest: content.digest,
            bytes: content.bytes,
            chunk_bytes: content.chunk_bytes,
        },
        Arc::new(treeboot_block::cache::NoSource),
        CacheOptions::complete(),
    );
    let cache = cache.unwrap();
    for parent in parents {
        serve(&parent.server, &cache, &id);
    }
    TestImage {
        content,
        bytes: Arc::new(bytes),
        sources: [0, 1].map(|n| sources(path(&parents[n].server, &id, &format!("parent-{n}")), None)),
        id,
    }
}

async fn rig() -> UserRig {
    let dir = tempfile::tempdir().unwrap();
    let parent = || ParentHost {
        server: Server::bind(&[LOOPBACK], ServerConfig::default()).unwrap(),
    };
    let parents = [parent(), parent()];
    let images = [0, 1].map(|n| image(dir.path(), n, &parents));
    UserRig {
        plane: Some(plane(dir.path())),
        journal: Some(Journal::open(dir.path()).unwrap().0),
        dir,
        images,
        parents,
    }
}

async fn session(portal: &str, target: Iqn, initiator: Iqn) -> Result<Session, String> {
    let options = SessionOptions::new(portal, target, initiator);
    Session::connect(options).await.map_err(|e| e.to_string())
}

impl UserRig {
    fn portal(&self) -> String {
        Plane::portal(self.plane().as_ref())
    }

    async fn export(&self, id: &ImageId, host: &HostName) -> Result<Session, String> {
        session(&self.portal(), Iqn::of_image(id), Iqn::of_host(host)).await
    }

    async fn disk(&self, vm: &VmName) -> Result<Session, String> {
        session(&self.portal(), Iqn::of_disk(vm), Iqn::of_vm(vm)).await
    }
}

impl Rig for UserRig {
    fn plane(&self) -> Arc<dyn Plane> {
        Arc::clone(self.plane.as_ref().unwrap()) as Arc<dyn Plane>
    }
    fn journal(&self) -> Journal {
        self.journal.clone().unwrap()
    }
    fn image(&self, n: usize) -> TestImage {
        self.images[n].clone()
    }
    async fn restart(&mut self) {
        let old = self.plane.take().unwrap();
        let weak = Arc::downgrade(&old);
        // A process that dies closes its sockets and files. Here the tasks must be made to.
        old.close().await;
        drop(old);
        assert!(weak.upgrade().is_none(), "nobody else holds the plane");
        self.journal = None;
        self.plane = Some(plane(self.dir.path()));
        self.journal = Some(Journal::open(self.dir.path()).unwrap().0);
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
        let session = self.disk(vm).await?;
        let read = session.read(DATA_LUN, at, bytes as u32).await;
        let read = read.map(|bytes| bytes.to_vec()).map_err(|e| e.to_string());
        session.close().await;
        read
    }
    async fn write_disk(&self, vm: &VmName, at: u64, data: &[u8]) -> Result<(), String> {
        let session = self.disk(vm).await?;
        let written = session.write(DATA_LUN, at, data.to_vec().into()).await;
        session.close().await;
        written.map_err(|e| e.to_string())
    }
    async fn flush_disk(&self, vm: &VmName) -> Result<(), String> {
        let session = self.disk(vm).await?;
        let flushed = session.flush(DATA_LUN).await;
        session.close().await;
        flushed.map_err(|e| e.to_string())
    }
    async fn residue(&self) -> Vec<String> {
        let mut residue: Vec<_> = ["deltas", "cache"]
            .iter()
            .flat_map(|dir| std::fs::read_dir(self.dir.path().join(dir)).unwrap())
            .map(|entry| entry.unwrap().path().display().to_string())
            .collect();
        let plane = self.plane.as_ref().unwrap();
        residue.extend(
            plane
                .server
                .targets()
                .iter()
                .map(|target| format!("target {target}")),
        );
        let found = plane.inspect(&Scope::All).await.unwrap();
        if found != Found::default() {
            residue.push(format!("{found:?}"));
        }
        // Sessions with parents end in the background.
        let ended = async {
            while self.sessions_with_parents() > 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        if tokio::time::timeout(Duration::from_secs(5), ended).await.is_err() {
            residue.push(format!("{} sessions with parents", self.sessions_with_parents()));
        }
        residue
    }
}

impl UserRig {
    fn sessions_with_parents(&self) -> usize {
        let sessions = |parent: &ParentHost, image: &TestImage| {
            parent
                .server
                .stats(&Iqn::of_image(&image.id))
                .map_or(0, |stats| stats.sessions.len())
        };
        let pairs = self
            .parents
            .iter()
            .flat_map(|parent| self.images.iter().map(move |i| (parent, i)));
        pairs.map(|(parent, image)| sessions(parent, image)).sum()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_user_plane_conforms() {
    conformance::run(rig).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_user_plane_survives_a_fault_at_every_step() {
    assert!(conformance::fail_at_every_step(rig).await >= 3 * (7 + 7));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_child_that_comes_before_its_parents_export_is_let_in_when_it_is_there() {
    let rig = rig().await;
    let image = rig.image(0);
    let child = HostName::new("10.0.0.1").unwrap();
    let early = rig.read_export(&image.id, &child, 0, 4096);
    let late = async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let applier = crate::apply::Applier {
            plane: Rig::plane(&rig),
            journal: rig.journal(),
        };
        let base = crate::stack::WantedBase {
            content: image.content,
            backing: crate::stack::Backing::Cache,
            sources: image.sources[0].clone(),
            exports: [(
                image.id.clone(),
                crate::stack::Access::Hosts([child.clone()].into()),
            )]
            .into(),
        };
        let wanted = crate::stack::Wanted {
            bases: [(image.content.digest, base)].into(),
            ..crate::stack::Wanted::default()
        };
        applier.reach(&Scope::All, &wanted).await.unwrap();
    };
    let (read, ()) = futures_util::future::join(early, late).await;
    assert_eq!(read.unwrap(), image.bytes[..4096]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_export_says_that_it_attaches_until_its_base_is_readable_and_serves_reads_all_the_while() {
    let rig = rig().await;
    let image = rig.image(0);
    let child = HostName::new("10.0.0.1").unwrap();
    let applier = crate::apply::Applier {
        plane: Rig::plane(&rig),
        journal: rig.journal(),
    };
    let base = crate::stack::WantedBase {
        content: image.content,
        backing: crate::stack::Backing::Cache,
        sources: image.sources[0].clone(),
        exports: [(
            image.id.clone(),
            crate::stack::Access::Hosts([child.clone()].into()),
        )]
        .into(),
    };
    let wanted = crate::stack::Wanted {
        bases: [(image.content.digest, base)].into(),
        ..crate::stack::Wanted::default()
    };
    applier.reach(&Scope::All, &wanted).await.unwrap();
    let session = rig.export(&image.id, &child).await.unwrap();
    let access = || async { session.access(DATA_LUN).await.unwrap() };
    assert_eq!(access().await, Some(AccessReported::Transitioning));
    let read = session.read(DATA_LUN, 0, 4096).await.unwrap();
    assert_eq!(read, image.bytes[..4096], "nobody is refused");
    Rig::plane(&rig).readable(image.content.digest).await.unwrap();
    assert_eq!(access().await, Some(AccessReported::Optimized));
    session.close().await;
}
