//! The verbs that change a disk's layers, and clones, over a real user plane that fails or dies at each step in turn: nothing is
//! left, no byte is lost, and the same call succeeds.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use common::*;
use tokio_util::sync::CancellationToken;
use treeboot_agent::host::{CloneRequest, Host, HostError, Settings, chain};
use treeboot_agent::journal::Journal;
use treeboot_agent::keys::Keys;
use treeboot_agent::plane::Plane as _;
use treeboot_agent::plane::faulty::{FaultMode, FaultyPlane};
use treeboot_agent::plane::user::{UserPlane, UserSettings};
use treeboot_types::{HostName, Iqn, Labels, SnapshotName};

const BLOCKS: usize = 64;
const BLOCK: usize = 4096;

/// One agent, which holds the image itself.
struct Rig {
    host: Host,
    plane: Arc<FaultyPlane>,
}

async fn rig(dir: &Path, coordinator: std::net::SocketAddr) -> Rig {
    let name = HostName::new("h1").unwrap();
    let keys = Arc::new(Keys::none());
    let user = UserPlane::open(UserSettings {
        host: name.clone(),
        state: dir.to_owned(),
        deltas: dir.join("deltas"),
        cache: dir.join("cache"),
        store: Some(dir.join("store")),
        portals: vec![([127, 0, 0, 1], 0).into()],
        advertise: None,
        keys: Arc::clone(&keys),
    })
    .unwrap();
    let plane = Arc::new(FaultyPlane::new(Arc::new(user), usize::MAX, FaultMode::Error));
    let settings = Settings {
        name,
        instance: "test".into(),
        state_dir: dir.to_owned(),
        deltas_dir: dir.join("deltas"),
        store_dir: Some(dir.join("store")),
        keys,
        dialer: treeboot_identity::tls::Dialer::Insecure,
        coordinator: format!("http://{coordinator}"),
        agent_address: "127.0.0.1:1".into(),
        labels: Labels::new(),
        weight: 1,
    };
    let journal = Journal::open(dir).unwrap().0;
    let (host, _refused) = Host::start(settings, Arc::clone(&plane) as _, journal)
        .await
        .unwrap();
    Rig { host, plane }
}

impl Rig {
    async fn write(&self, name: &str, blocks: &[usize], fill: u8) {
        let session = self.front_end(name).await;
        for block in blocks {
            let data = vec![fill; BLOCK].into();
            session.write(0, (block * BLOCK) as u64, data).await.unwrap();
        }
        session.flush(0).await.unwrap();
    }

    async fn front_end(&self, name: &str) -> treeboot_iscsi::initiator::Session {
        let vm = vm(name);
        session(&self.plane.portal(), Iqn::of_disk(&vm), Iqn::of_vm(&vm))
            .await
            .unwrap()
    }

    async fn read(&self, name: &str) -> Vec<u8> {
        read_all(&self.front_end(name).await, BLOCKS * BLOCK).await
    }

    /// No front end is logged in, as the target sees it.
    async fn alone(&self, name: &str) {
        let vm = vm(name);
        until("the front ends are gone", || {
            self.plane.disk_stats(&vm).unwrap_or_default().sessions == 0
        })
        .await;
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verb {
    Snapshot,
    RollBack,
    Delete,
    Clone,
    Destroy,
}

fn snapshot(name: &str) -> SnapshotName {
    name.parse().unwrap()
}

impl Verb {
    async fn call(self, rig: &Rig) -> Result<(), HostError> {
        let (host, web) = (&rig.host, vm("web-1"));
        match self {
            Self::Snapshot => host.snapshot(&web, &snapshot("new")).await.map(drop),
            Self::RollBack => host.roll_back(&web, &snapshot("old")).await,
            Self::Delete => host.delete_snapshot(&web, &snapshot("old")).await,
            Self::Clone => {
                let cloning = host.begin_clone(CloneRequest {
                    vm: web,
                    snapshot: None,
                    to: (host.info().name, String::new()),
                    new_vm: vm("web-2"),
                });
                cloning.end.await.unwrap().map(drop)
            }
            Self::Destroy => host.destroy(&web, false).await,
        }
    }

    /// What the same call may say that follows one that died: that there is nothing left to do.
    fn may_say(self, mode: FaultMode, error: &HostError) -> bool {
        match self {
            Self::Delete => mode == FaultMode::CrashAfter && matches!(error, HostError::Layers { .. }),
            Self::Clone => mode == FaultMode::CrashAfter && matches!(error, HostError::VmExists { .. }),
            // What was doomed is finished by the start.
            Self::Destroy => mode != FaultMode::Error && matches!(error, HostError::UnknownVm { .. }),
            Self::Snapshot | Self::RollBack => false,
        }
    }
}

fn files(dir: &Path) -> BTreeSet<String> {
    std::fs::read_dir(dir.join("deltas"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect()
}

fn with(content: &[u8], blocks: &[usize], fill: u8) -> Vec<u8> {
    let mut content = content.to_vec();
    for block in blocks {
        content[block * BLOCK..(block + 1) * BLOCK].fill(fill);
    }
    content
}

/// One verb that goes wrong at step `at`. Whether that step was reached.
async fn try_at(verb: Verb, mode: FaultMode, at: usize) -> bool {
    let what = format!("{verb:?}, {mode:?} at {at}");
    let dir = tempfile::tempdir().unwrap();
    let play = Play::default();
    let stop = CancellationToken::new();
    let coordinator = play.start(None, stop.clone()).await;
    let mut now = rig(dir.path(), coordinator).await;
    let base = content(BLOCKS);
    let image = import(&now.host, "debian", &base).await;
    let image = format!("{}@{}", image.name, image.version).parse().unwrap();
    now.host.create(&vm("web-1"), &image).await.unwrap();
    now.write("web-1", &[1, 2, 3], 1).await;
    let old = with(&base, &[1, 2, 3], 1);
    now.host.snapshot(&vm("web-1"), &snapshot("old")).await.unwrap();
    now.write("web-1", &[3, 4], 2).await;
    let written = with(&old, &[3, 4], 2);
    now.alone("web-1").await;
    // What follows the snapshot by itself is done, so that steps are this verb's.
    let sealed = async || {
        let layers = now.host.layers(&vm("web-1"), false).await.unwrap();
        layers.iter().all(|layer| layer.live || layer.check.sealed)
    };
    let waited = tokio::time::timeout(SOON, async {
        while !sealed().await {
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
    });
    waited.await.unwrap();

    now.plane.arm(at, mode);
    let first = verb.call(&now).await;
    let struck = now.plane.struck();
    if mode == FaultMode::Error {
        now.plane.arm(usize::MAX, mode);
    } else {
        // It is dead from that step on; its successor finds what it left.
        now.host.end().await;
        drop(now);
        now = rig(dir.path(), coordinator).await;
    }
    if let Err(error) = &first {
        match verb.call(&now).await {
            Ok(()) => {}
            Err(second) => assert!(
                verb.may_say(mode, &second),
                "{what}: {}, then {}",
                chain(error),
                chain(&second)
            ),
        }
    }
    let wanted: &[&str] = match verb {
        Verb::Destroy => &[],
        Verb::Clone => &["web-1", "web-2"],
        _ => &["web-1"],
    };
    let disks: Vec<_> = now.host.desired().disks.keys().map(ToString::to_string).collect();
    assert_eq!(disks, wanted, "{what}");
    for name in wanted {
        let expected = if verb == Verb::RollBack { &old } else { &written };
        assert!(now.read(name).await == *expected, "{what}: the disk of {name}");
    }
    let layers = match verb {
        Verb::Destroy => 0,
        Verb::Delete => 1,
        Verb::Snapshot => 3,
        Verb::RollBack | Verb::Clone => 2,
    };
    // A merge that failed or was cut off is gone on with at the next change or start.
    let settled = async || {
        if layers == 0 {
            return files(dir.path()).is_empty();
        }
        let there = now.host.layers(&vm("web-1"), false).await.unwrap();
        let wanted_files = layers + usize::from(verb == Verb::Clone);
        let left = files(dir.path());
        let left = left.iter().filter(|name| !name.contains(".layers")).count();
        there.len() == layers && left == wanted_files
    };
    let waited = tokio::time::timeout(SOON, async {
        while !settled().await {
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
    });
    assert!(waited.await.is_ok(), "{what}: left are {:?}", files(dir.path()));
    now.host.end().await;
    stop.cancel();
    struck
}

async fn at_each_step(verb: Verb, steps: usize) {
    for mode in [FaultMode::Error, FaultMode::CrashBefore, FaultMode::CrashAfter] {
        for at in 0..steps {
            assert!(try_at(verb, mode, at).await, "{verb:?} has no step {at}");
        }
    }
}

#[tokio::test]
async fn a_snapshot_that_goes_wrong_at_any_step() {
    at_each_step(Verb::Snapshot, 1).await;
}

#[tokio::test]
async fn a_roll_back_that_goes_wrong_at_any_step() {
    at_each_step(Verb::RollBack, 1).await;
}

#[tokio::test]
async fn a_snapshots_end_that_goes_wrong_at_any_step() {
    at_each_step(Verb::Delete, 1).await;
}

#[tokio::test]
async fn a_clone_that_goes_wrong_at_any_step() {
    // The hold, the new delta, the new disk, the release.
    at_each_step(Verb::Clone, 4).await;
}

#[tokio::test]
async fn a_destroy_that_goes_wrong_at_any_step() {
    // The disk, the delta.
    at_each_step(Verb::Destroy, 2).await;
}
