//! A VM whose other host dies at each of its steps once it was asked to take it, and is declared gone for good: the VM is taken back, the
//! host that does so fails or dies at each of its own steps, and a host that comes back after all finds that it lost what it took.

use crate::common::pair::*;
use crate::common::rig::*;
use crate::common::*;
use treeboot_agent::desired::Move;
use treeboot_agent::host::{HostError, Moved, TakenBack, Underway};
use treeboot_agent::plane::Plane as _;
use treeboot_agent::plane::faulty::FaultMode;
use treeboot_proto::v1;
use treeboot_types::HostName;

fn host_name(name: &str) -> HostName {
    HostName::new(name).unwrap()
}

impl Pair {
    fn moving(&self, n: usize) -> Option<Move> {
        let desired = self.host(n).host.desired();
        desired
            .disks
            .get(&vm("web-1"))
            .and_then(|disk| disk.moving.clone())
    }

    fn taken(&self, n: usize) -> bool {
        !self.host(n).host.desired().taken.is_empty()
    }

    /// It is to move, and once the other host is asked to take it neither hears the other.
    async fn begin_unheard(&self) -> (Underway<Moved>, Gate) {
        self.gate.close();
        let deaf = Gate::open().await;
        deaf.leads_to(self.host(1).address);
        deaf.loses_answers();
        let mut request = self.request();
        request.to.1 = deaf.address.to_string();
        (self.host(0).host.begin_migration(request), deaf)
    }

    /// The other host is asked to take it and dies at its step `at`, or once it has taken it; its host, whose successor runs, did not hear
    /// of it. Whether that step was reached, and the transfer.
    async fn undecided(at: usize, mode: FaultMode) -> (Self, bool, u64) {
        let mut pair = Self::start().await;
        pair.host(1).plane.arm(at, mode);
        let (_underway, deaf) = pair.begin_unheard().await;
        until("it is there, or dies", || {
            let h2 = pair.host(1);
            h2.plane.struck() || pair.taken(1) && h2.plane.disk_stats(&vm("web-1")).is_some()
        })
        .await;
        let struck = pair.host(1).plane.struck();
        deaf.cut();
        pair.hosts[1].take().unwrap().end().await;
        pair.replace(0).await;
        pair.gate.leads_to(pair.host(0).address);
        let Some(Move::Leaving { transfer, .. }) = pair.moving(0) else {
            panic!("{mode:?} at {at}: it is {:?}", pair.moving(0));
        };
        (pair, struck, transfer)
    }

    async fn take_back(&self, n: usize, gone: &str) -> Result<TakenBack, HostError> {
        self.host(n).host.take_back(&vm("web-1"), &host_name(gone)).await
    }
}

/// It was taken back to the first host; the second one comes back, and has nothing that it serves.
async fn comes_back(mut pair: Pair, transfer: u64, what: &str) {
    let h1 = pair.host(0);
    until(&format!("{what}: it is served"), || {
        h1.plane.disk_stats(&vm("web-1")).is_some()
    })
    .await;
    assert!(h1.read("web-1").await == pair.written, "{what}: its disk");
    h1.write("web-1", &[9], 9).await;
    h1.alone("web-1").await;
    pair.written = with(&pair.written, &[9], 9);
    pair.come_back(1, false).await;
    match pair.taken(1) {
        true => {
            until(&format!("{what}: it learns that it lost it"), || {
                pair.moving(1) == Some(Move::Lost)
            })
            .await;
            let h2 = &pair.host(1).host;
            let error = h2.snapshot(&vm("web-1"), &snapshot("new")).await.unwrap_err();
            assert!(matches!(error, HostError::Lost { .. }), "{what}: {error}");
            assert!(
                pair.host(1).plane.disk_stats(&vm("web-1")).is_none(),
                "{what}: it is served"
            );
            // Also by its successors.
            pair.replace(1).await;
            assert_eq!(pair.moving(1), Some(Move::Lost), "{what}");
            pair.host(1).host.destroy(&vm("web-1"), false).await.unwrap();
        }
        false => {
            let request = v1::SettleVmRequest {
                vm: "web-1".into(),
                transfer,
            };
            assert!(
                !pair.host(1).host.settle_vm(request).await.unwrap(),
                "{what}: it took it"
            );
        }
    }
    pair.settled(0, what).await;
    let moved = pair.migrate().await;
    assert!(moved.is_ok(), "{what}: {:?}", moved.err());
    pair.settled(1, what).await;
    pair.end().await;
}

#[tokio::test]
async fn a_vm_is_taken_back_whatever_the_other_host_had_done_and_that_host_learns_so() {
    for mode in [FaultMode::CrashBefore, FaultMode::CrashAfter] {
        let mut at = 0;
        loop {
            let what = format!("{mode:?} at {at}");
            let (pair, struck, transfer) = Pair::undecided(at, mode).await;
            let error = pair.host(0).host.destroy(&vm("web-1"), false).await.unwrap_err();
            assert!(matches!(error, HostError::Undecided { .. }), "{what}: {error}");
            assert!(error.to_string().contains("--take-back --gone h2"), "{error}");
            let error = pair.take_back(0, "h3").await.unwrap_err();
            assert!(matches!(error, HostError::OtherHost { .. }), "{what}: {error}");
            assert_eq!(
                pair.take_back(0, "h2").await.unwrap(),
                TakenBack::ByForce,
                "{what}"
            );
            assert_eq!(
                pair.take_back(0, "h2").await.unwrap(),
                TakenBack::WasHere,
                "{what}"
            );
            comes_back(pair, transfer, &what).await;
            if !struck {
                break;
            }
            at += 1;
        }
        assert!(at >= 5, "{mode:?} has {at} steps only");
    }
}

#[tokio::test]
async fn a_host_that_fails_or_dies_at_any_step_of_taking_back_has_taken_it_back() {
    for mode in [FaultMode::Error, FaultMode::CrashBefore, FaultMode::CrashAfter] {
        let mut at = 0;
        loop {
            let what = format!("{mode:?} at {at}");
            let (mut pair, _, transfer) = Pair::undecided(usize::MAX, FaultMode::Error).await;
            pair.host(0).plane.arm(at, mode);
            let first = pair.take_back(0, "h2").await;
            assert_eq!(first.unwrap(), TakenBack::ByForce, "{what}");
            // What follows from it is done by then, or goes on.
            let struck = pair.host(0).plane.struck();
            if mode != FaultMode::Error {
                pair.replace(0).await;
            }
            pair.host(0).plane.arm(usize::MAX, FaultMode::Error);
            assert_eq!(
                pair.take_back(0, "h2").await.unwrap(),
                TakenBack::WasHere,
                "{what}"
            );
            comes_back(pair, transfer, &what).await;
            at += 1;
            if !struck {
                break;
            }
        }
        assert!(at >= 2, "{mode:?} has {at} steps only");
    }
}

#[tokio::test]
async fn a_host_that_answers_or_that_the_coordinator_hears_is_not_gone() {
    // It took it, and says so.
    let (mut pair, _, _) = Pair::undecided(usize::MAX, FaultMode::Error).await;
    pair.come_back(1, false).await;
    until("it is known to be there", || pair.whereabouts() == Some(1)).await;
    let error = pair.take_back(0, "h2").await.unwrap_err();
    assert!(matches!(error, HostError::UnknownVm { .. }), "{error}");
    assert_eq!(pair.take_back(1, "h1").await.unwrap(), TakenBack::WasHere);
    pair.settled(1, "it was taken").await;
    pair.end().await;

    // Its answer alone is lost: it tells by itself, and the move is done.
    let pair = Pair::start().await;
    let (underway, _deaf) = pair.begin_unheard().await;
    pair.gate.leads_to(pair.host(0).address);
    let moved = underway.end.await.unwrap().unwrap();
    assert!(!moved.was_there && moved.trouble.is_empty(), "{moved:?}");
    pair.settled(1, "it told so").await;
    pair.end().await;

    // It lives, and no agent reaches it.
    let pair = Pair::start().await;
    pair.host(1).plane.arm(0, FaultMode::CrashBefore);
    let (underway, _deaf) = pair.begin_unheard().await;
    until("it is asked", || pair.host(1).plane.struck()).await;
    let error = pair.take_back(0, "h2").await.unwrap_err();
    assert!(matches!(error, HostError::Moving { .. }), "{error}");
    pair.host(1).fall_silent();
    underway.end.abort();
    let mut pair = pair;
    pair.replace(0).await;
    pair.gate.leads_to(pair.host(0).address);
    let error = pair.take_back(0, "h2").await.unwrap_err();
    assert!(matches!(error, HostError::NotGone { .. }), "{error}");
    // It comes back elsewhere, and is found there.
    pair.hosts[1].take().unwrap().end().await;
    pair.come_back(1, false).await;
    until("it stays", || pair.whereabouts() == Some(0)).await;
    pair.settled(0, "it was not taken").await;
    pair.end().await;
}

#[tokio::test]
async fn a_vm_that_came_from_a_host_that_is_gone_is_kept_by_a_persons_word() {
    let (mut pair, _, _) = Pair::undecided(usize::MAX, FaultMode::Error).await;
    pair.hosts[0].take().unwrap().end().await;
    pair.come_back(1, false).await;
    let h2 = pair.host(1);
    assert_eq!(pair.moving(1), Some(Move::Unsure));
    assert!(h2.plane.disk_stats(&vm("web-1")).is_none(), "it is served");
    let error = h2.host.destroy(&vm("web-1"), false).await.unwrap_err();
    assert!(matches!(error, HostError::Unsure { .. }), "{error}");
    let error = pair.take_back(1, "h3").await.unwrap_err();
    assert!(matches!(error, HostError::OtherHost { .. }), "{error}");
    assert_eq!(pair.take_back(1, "h1").await.unwrap(), TakenBack::ByForce);
    assert_eq!(pair.take_back(1, "h1").await.unwrap(), TakenBack::WasHere);
    assert!(
        pair.host(1).plane.disk_stats(&vm("web-1")).is_some(),
        "it is not served"
    );
    // The other one comes back, asks, and hears.
    pair.come_back(0, true).await;
    until("it is on one of both", || pair.whereabouts() == Some(1)).await;
    pair.settled(1, "it was kept").await;
    pair.end().await;
}
