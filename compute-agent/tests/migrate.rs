//! A VM that moves between two hosts, of which either fails or dies at each of its steps in turn: it is on one of them, never on both and
//! never on none; no byte and no snapshot is lost; nothing is left on the other; and the same call succeeds.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::time::Duration;

use common::rig::*;
use common::*;
use tokio_util::sync::CancellationToken;
use treeboot_agent::host::{HostError, MigrateRequest, Moved, Phase};
use treeboot_agent::plane::Plane as _;
use treeboot_agent::plane::faulty::FaultMode;

/// Which of the two hosts goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Source,
    Destination,
}

/// Two hosts, and a VM on the first that has written, was snapshot, and has written on.
struct Pair {
    dirs: [tempfile::TempDir; 2],
    hosts: [Option<Rig>; 2],
    coordinator: std::net::SocketAddr,
    stop: CancellationToken,
    old: Vec<u8>,
    written: Vec<u8>,
}

impl Pair {
    async fn start() -> Self {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let stop = CancellationToken::new();
        let coordinator = Play::default().start(None, stop.clone()).await;
        let h1 = Rig::start(dirs[0].path(), "h1", coordinator).await;
        let h2 = Rig::start(dirs[1].path(), "h2", coordinator).await;
        until("both are known", || h1.host.connected() && h2.host.connected()).await;
        let base = content(BLOCKS);
        let image = import(&h1.host, "debian", &base).await;
        let image = format!("{}@{}", image.name, image.version).parse().unwrap();
        h1.host.create(&vm("web-1"), &image).await.unwrap();
        h1.write("web-1", &[1, 2, 3], 1).await;
        h1.host.snapshot(&vm("web-1"), &snapshot("old")).await.unwrap();
        h1.write("web-1", &[3, 4], 2).await;
        h1.alone("web-1").await;
        let old = with(&base, &[1, 2, 3], 1);
        Self {
            written: with(&old, &[3, 4], 2),
            old,
            dirs,
            hosts: [Some(h1), Some(h2)],
            coordinator,
            stop,
        }
    }

    fn host(&self, n: usize) -> &Rig {
        self.hosts[n].as_ref().unwrap()
    }

    /// It dies, and its successor finds what it left.
    async fn replace(&mut self, n: usize) {
        let old = self.hosts[n].take().unwrap();
        let (address, portal) = (old.address, old.plane.portal().parse().unwrap());
        old.end().await;
        let name = ["h1", "h2"][n];
        let new = Rig::start_at(self.dirs[n].path(), name, self.coordinator, address, portal).await;
        self.hosts[n] = Some(new);
    }

    fn request(&self) -> MigrateRequest {
        let to = self.host(1);
        MigrateRequest {
            vm: vm("web-1"),
            to: (to.host.info().name, to.address.to_string()),
        }
    }

    async fn migrate(&self) -> Result<Moved, HostError> {
        let underway = self.host(0).host.begin_migration(self.request());
        underway.end.await.unwrap()
    }

    /// On which hosts it is, where that is decided.
    fn whereabouts(&self) -> Option<usize> {
        let web = vm("web-1");
        let desired = [0, 1].map(|n| self.host(n).host.desired());
        let there = desired.iter().map(|desired| desired.disks.get(&web));
        let there: Vec<_> = there.collect();
        match there.as_slice() {
            [Some(disk), None] if disk.moving.is_none() && !disk.doomed => Some(0),
            [None, Some(disk)] if disk.moving.is_none() && !disk.doomed => Some(1),
            _ => None,
        }
    }

    /// It is on this host with all that it had, and nothing else is on either.
    async fn settled(&self, n: usize, what: &str) {
        let reason = format!("{what}: the VM is on host {n} alone");
        until(&reason, || self.whereabouts() == Some(n)).await;
        let rig = self.host(n);
        let web = vm("web-1");
        until(&format!("{what}: it is served"), || {
            rig.plane.disk_stats(&web).is_some()
        })
        .await;
        let reason = format!("{what}: nothing is left on the other");
        until(&reason, || files(self.dirs[1 - n].path()).is_empty()).await;
        assert!(rig.read("web-1").await == self.written, "{what}: its disk");
        rig.alone("web-1").await;
        // Where the merging itself went wrong, the next change goes on with it.
        rig.host.snapshot(&web, &snapshot("poke")).await.unwrap();
        rig.host.delete_snapshot(&web, &snapshot("poke")).await.unwrap();
        let layers = async || rig.host.layers(&web, false).await.unwrap();
        let waited = tokio::time::timeout(SOON, async {
            while layers().await.len() != 2 || files(self.dirs[n].path()).len() != 3 {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        });
        let settled = waited.await;
        let left = files(self.dirs[n].path());
        assert!(
            settled.is_ok(),
            "{what}: left are {left:?} of {:?}",
            layers().await
        );
    }

    async fn end(mut self) {
        for host in &mut self.hosts {
            host.take().unwrap().end().await;
        }
        self.stop.cancel();
    }
}

/// One move that goes wrong at step `at` of one side. Whether that step was reached.
async fn try_at(side: Side, mode: FaultMode, at: usize) -> bool {
    let what = format!("{side:?}, {mode:?} at {at}");
    let mut pair = Pair::start().await;
    let n = side as usize;
    pair.host(n).plane.arm(at, mode);
    let mut underway = pair.host(0).host.begin_migration(pair.request());
    let mut first = None;
    let struck = loop {
        if pair.host(n).plane.struck() {
            break true;
        }
        tokio::select! {
            end = &mut underway.end => {
                first = Some(end.unwrap());
                break pair.host(n).plane.struck();
            }
            () = tokio::time::sleep(Duration::from_micros(200)) => {}
        }
    };
    if mode != FaultMode::Error {
        pair.replace(n).await;
    }
    let first = match first {
        Some(first) => first,
        None => underway.end.await.unwrap(),
    };
    pair.host(n).plane.arm(usize::MAX, FaultMode::Error);
    let reason = format!("{what}: it is decided, after {:?}", first.as_ref().err());
    until(&reason, || pair.whereabouts().is_some()).await;
    if pair.whereabouts() == Some(0) {
        assert!(first.is_err(), "{what}");
        pair.settled(0, &what).await;
        let second = pair.migrate().await;
        assert!(
            second.is_ok(),
            "{what}: {:?}, then {:?}",
            first.err(),
            second.err()
        );
    }
    pair.settled(1, &what).await;
    let h2 = pair.host(1);
    h2.host.roll_back(&vm("web-1"), &snapshot("old")).await.unwrap();
    assert!(h2.read("web-1").await == pair.old, "{what}: its snapshot");
    pair.end().await;
    struck
}

async fn at_each_step(side: Side, least: usize) {
    for mode in [FaultMode::Error, FaultMode::CrashBefore, FaultMode::CrashAfter] {
        let mut at = 0;
        while try_at(side, mode, at).await {
            at += 1;
        }
        assert!(at >= least, "{side:?} has {at} steps only");
    }
}

#[tokio::test]
async fn a_move_that_goes_wrong_at_any_step_of_the_host_that_it_leaves() {
    // The hold, the checksums, the disk's end, the layers' end.
    at_each_step(Side::Source, 3).await;
}

#[tokio::test]
async fn a_move_that_goes_wrong_at_any_step_of_the_host_that_it_goes_to() {
    // The paths, the base, its export, the disk's layers, the disk.
    at_each_step(Side::Destination, 5).await;
}

#[tokio::test]
async fn what_is_written_while_it_is_shipped_goes_too_and_a_front_end_that_stays_keeps_it_here() {
    let pair = Pair::start().await;
    let h1 = pair.host(0);
    let session = h1.front_end("web-1").await;
    let mut underway = h1.host.begin_migration(pair.request());
    let stopping = underway
        .progress
        .wait_for(|progress| progress.phase == Phase::Stopping)
        .await;
    drop(stopping.unwrap());
    // A second call for it, and other verbs, wait for its end.
    let error = pair.migrate().await.unwrap_err();
    assert!(matches!(error, HostError::Moving { .. }), "{error}");
    until("it is about to leave", || {
        h1.host.desired().disks[&vm("web-1")].moving.is_some()
    })
    .await;
    for error in [
        h1.host.destroy(&vm("web-1"), false).await.unwrap_err(),
        h1.host
            .snapshot(&vm("web-1"), &snapshot("new"))
            .await
            .unwrap_err(),
        h1.host
            .roll_back(&vm("web-1"), &snapshot("old"))
            .await
            .unwrap_err(),
    ] {
        assert!(matches!(error, HostError::Moving { .. }), "{error}");
    }
    // The front end writes on.
    session
        .write(0, 5 * BLOCK as u64, vec![7; BLOCK].into())
        .await
        .unwrap();
    session.flush(0).await.unwrap();
    underway.cancel.cancel();
    let error = underway.end.await.unwrap().unwrap_err();
    assert!(matches!(error, HostError::Cancelled { .. }), "{error}");
    assert_eq!(pair.whereabouts(), Some(0));
    until("nothing of it is there", || files(pair.dirs[1].path()).is_empty()).await;

    let mut underway = h1.host.begin_migration(pair.request());
    let stopping = underway
        .progress
        .wait_for(|progress| progress.phase == Phase::Stopping)
        .await;
    drop(stopping.unwrap());
    session
        .write(0, 6 * BLOCK as u64, vec![8; BLOCK].into())
        .await
        .unwrap();
    session.flush(0).await.unwrap();
    drop(session);
    let moved = underway.end.await.unwrap().unwrap();
    assert!(moved.trouble.is_empty() && !moved.was_there, "{moved:?}");
    let expected = with(&with(&pair.written, &[5], 7), &[6], 8);
    let h2 = pair.host(1);
    assert!(h2.read("web-1").await == expected, "what was written meanwhile");
    // The same call again has nothing to do, and one that comes too late says so.
    let again = MigrateRequest {
        to: (h2.host.info().name, String::new()),
        ..pair.request()
    };
    let again = h2.host.begin_migration(again).end.await.unwrap().unwrap();
    assert!(again.was_there);
    let error = pair.migrate().await.unwrap_err();
    assert!(matches!(error, HostError::UnknownVm { .. }), "{error}");
    pair.end().await;
}
