//! The verbs that change a disk's layers, and clones, over a real user plane that fails or dies at each step in turn: nothing is
//! left, no byte is lost, and the same call succeeds.

use crate::common::rig::*;
use crate::common::*;
use tokio_util::sync::CancellationToken;
use treeboot_agent::host::{CloneRequest, HostError, chain};
use treeboot_agent::plane::faulty::FaultMode;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verb {
    Snapshot,
    RollBack,
    Delete,
    Clone,
    Destroy,
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

/// One verb that goes wrong at step `at`. Whether that step was reached.
async fn try_at(verb: Verb, mode: FaultMode, at: usize) -> bool {
    let what = format!("{verb:?}, {mode:?} at {at}");
    let dir = tempfile::tempdir().unwrap();
    let play = Play::default();
    let stop = CancellationToken::new();
    let coordinator = play.start(None, stop.clone()).await;
    let mut now = Rig::start(dir.path(), "h1", coordinator).await;
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
        now.end().await;
        now = Rig::start(dir.path(), "h1", coordinator).await;
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
    now.end().await;
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
