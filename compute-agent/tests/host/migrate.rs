//! A VM that moves between two hosts, of which either fails or dies at each of its steps in turn: it is on one of them, never on both and
//! never on none; no byte and no snapshot is lost; nothing is left on the other; and the same call succeeds.

use std::time::Duration;

use crate::common::pair::*;
use crate::common::rig::*;
use crate::common::*;
use treeboot_agent::host::{HostError, MigrateRequest, Phase};
use treeboot_agent::plane::faulty::FaultMode;

/// Which of the two hosts goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Source,
    Destination,
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
