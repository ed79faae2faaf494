//! The laws themselves.

use std::sync::Arc;

use super::{Rig, applier, children, disk, host, nothing, pattern, reach, vm, wanted};
use crate::apply::Applier;
use crate::plane::faulty::{FaultMode, FaultyPlane};
use crate::plane::{Plane, Scope};
use crate::stack::{FoundDelta, Wanted, plan};

/// What one read of a law takes: some chunks, and no multiple of one.
const PIECE: usize = 36 * 4096;

async fn check_export<R: Rig>(rig: &R, n: usize, reader: u8) {
    let image = rig.image(n);
    for at in (0..image.bytes.len()).step_by(PIECE) {
        let bytes = PIECE.min(image.bytes.len() - at);
        let read = rig
            .read_export(&image.id, &host(reader), at as u64, bytes)
            .await
            .expect("readable");
        assert!(
            read == image.bytes[at..at + bytes],
            "{} at {at} differs",
            image.id
        );
    }
}

async fn check_disk<R: Rig>(rig: &R, n: usize, expected: &[u8]) {
    for at in (0..expected.len()).step_by(PIECE) {
        let bytes = PIECE.min(expected.len() - at);
        let read = rig.read_disk(&vm(n), at as u64, bytes).await.expect("readable");
        assert!(
            read == expected[at..at + bytes],
            "the disk of {} at {at} differs",
            vm(n)
        );
    }
}

async fn write(rig: &impl Rig, n: usize, at: usize, data: &[u8], expected: &mut [u8]) {
    rig.write_disk(&vm(n), at as u64, data).await.expect("writable");
    expected[at..at + data.len()].copy_from_slice(data);
}

pub(super) async fn a_base_is_what_the_parents_have_and_cannot_be_written<R: Rig>(rig: R) {
    let image = rig.image(0);
    reach(&rig, &wanted(&image, 0, &[1], [])).await.expect("attached");
    rig.plane()
        .readable(image.content.digest)
        .await
        .expect("readable");
    check_export(&rig, 0, 1).await;
    let refused = rig.write_export(&image.id, &host(1), 0, &pattern(1, 4096)).await;
    assert!(refused.is_err(), "a base is read-only");
    check_export(&rig, 0, 1).await;
}

pub(super) async fn only_the_children_that_were_named_may_read<R: Rig>(rig: R) {
    let image = rig.image(0);
    let read = async |reader| rig.read_export(&image.id, &host(reader), 0, 4096).await;
    reach(&rig, &wanted(&image, 0, &[1], [])).await.expect("attached");
    assert!(read(1).await.is_ok());
    assert!(read(10).await.is_err(), "10.0.0.10 is not 10.0.0.1");
    reach(&rig, &wanted(&image, 0, &[10], [])).await.expect("changed");
    assert!(read(1).await.is_err(), "who is no child any more is refused");
    assert!(read(10).await.is_ok());
}

pub(super) async fn each_disk_sees_its_own_writes_alone<R: Rig>(rig: R) {
    let image = rig.image(0);
    reach(&rig, &wanted(&image, 0, &[1], 0..2))
        .await
        .expect("created");
    let mut expected = [image.bytes.to_vec(), image.bytes.to_vec()];
    for (n, expected) in expected.iter_mut().enumerate() {
        check_disk(&rig, n, expected).await;
        // Within a chunk, over the edge of one, and the last block; both disks write at the same places.
        for (k, at) in [0, 65536 - 4096, image.bytes.len() - 8192]
            .into_iter()
            .enumerate()
        {
            write(&rig, n, at, &pattern((n * 7 + k) as u8, 8192), expected).await;
        }
    }
    for (n, expected) in expected.iter().enumerate() {
        check_disk(&rig, n, expected).await;
    }
    check_export(&rig, 0, 1).await;
}

pub(super) async fn what_was_written_is_there_after_a_restart<R: Rig>(mut rig: R) {
    let image = rig.image(0);
    let all = wanted(&image, 0, &[1], 0..2);
    reach(&rig, &all).await.expect("created");
    let mut expected = [image.bytes.to_vec(), image.bytes.to_vec()];
    write(&rig, 0, 4096, &pattern(3, 16384), &mut expected[0]).await;
    rig.flush_disk(&vm(0)).await.expect("flushed");
    // Acknowledged and not flushed: the death of the agent alone must not lose it.
    write(&rig, 1, 8192, &pattern(4, 4096), &mut expected[1]).await;
    rig.restart().await;
    let found = rig.plane().inspect(&Scope::All).await.expect("a look");
    assert!(found.bases.is_empty() && found.disks.is_empty() || plan(&all, &found).obstacles.is_empty());
    reach(&rig, &all).await.expect("served again");
    for (n, expected) in expected.iter().enumerate() {
        check_disk(&rig, n, expected).await;
    }
    check_export(&rig, 0, 1).await;
}

pub(super) async fn a_step_done_twice_changes_nothing<R: Rig>(rig: R) {
    let image = rig.image(0);
    let all = wanted(&image, 0, &[1], 0..1);
    let found = rig.plane().inspect(&Scope::All).await.expect("a look");
    for step in plan(&all, &found).steps {
        rig.plane().apply(&step).await.expect("once");
        let before = rig.plane().inspect(&Scope::All).await.expect("a look");
        rig.plane().apply(&step).await.expect("twice");
        let after = rig.plane().inspect(&Scope::All).await.expect("a look");
        assert_eq!(before, after, "{}", step.name());
    }
    let mut expected = image.bytes.to_vec();
    write(&rig, 0, 0, &pattern(9, 4096), &mut expected).await;
    reach(&rig, &all).await.expect("nothing to do");
    check_disk(&rig, 0, &expected).await;
    let found = rig.plane().inspect(&Scope::All).await.expect("a look");
    for step in plan(&nothing(0..1), &found).steps {
        for time in ["once", "twice"] {
            rig.plane()
                .apply(&step)
                .await
                .unwrap_or_else(|e| panic!("{time}: {e}"));
        }
    }
    assert_eq!(rig.residue().await, Vec::<String>::new());
}

pub(super) async fn what_is_wanted_is_what_is_listed<R: Rig>(rig: R) {
    let image = rig.image(0);
    let all = wanted(&image, 0, &[1, 2], 0..3);
    reach(&rig, &all).await.expect("created");
    let plane = rig.plane();
    let found = plane.inspect(&Scope::All).await.expect("a look");
    assert!(plan(&all, &found).steps.is_empty());
    assert_eq!(found.disks.len(), 3);
    assert_eq!(found.exports[&image.id].access, children(&[1, 2]));
    assert!(
        found
            .deltas
            .values()
            .all(|d| *d == FoundDelta::Sound(disk(&image)))
    );
    let one = plane.inspect(&Scope::Disk(vm(1))).await.expect("a look");
    assert_eq!((one.disks.len(), one.deltas.len(), one.bases.len()), (1, 1, 0));
    let base = plane
        .inspect(&Scope::Base(image.content.digest))
        .await
        .expect("a look");
    assert_eq!(
        (base.disks.len(), base.bases.len(), base.exports.len()),
        (0, 1, 1)
    );
    assert!(plane.base_stats(&image.content.digest).is_some());
    assert!(plane.disk_stats(&vm(2)).is_some());
    assert!(plane.disk_stats(&vm(3)).is_none());
}

pub(super) async fn new_parents_under_reads_are_not_noticed<R: Rig>(rig: R) {
    let image = rig.image(0);
    reach(&rig, &wanted(&image, 0, &[1], 0..1))
        .await
        .expect("attached");
    let reads = async {
        for _ in 0..3 {
            check_export(&rig, 0, 1).await;
            check_disk(&rig, 0, &image.bytes).await;
        }
    };
    let moves = async {
        for n in 1..8 {
            reach(&rig, &wanted(&image, n % 2, &[1], 0..1))
                .await
                .expect("moved");
            tokio::task::yield_now().await;
        }
    };
    futures_util::future::join(reads, moves).await;
}

pub(super) async fn many_disks_at_once<R: Rig>(rig: R) {
    const DISKS: usize = 32;
    let image = rig.image(0);
    reach(&rig, &wanted(&image, 0, &[1], [])).await.expect("attached");
    let one = async |n: usize| {
        let slice = Wanted {
            standing: [image.content.digest].into(),
            disks: [(vm(n), disk(&image))].into(),
            ..Wanted::default()
        };
        applier(&rig)
            .reach(&Scope::Disk(vm(n)), &slice)
            .await
            .expect("created");
        let mut expected = image.bytes[..16384].to_vec();
        write(&rig, n, 4096, &pattern(n as u8, 4096), &mut expected).await;
        check_disk(&rig, n, &expected).await;
    };
    futures_util::future::join_all((0..DISKS).map(one)).await;
    reach(&rig, &nothing(0..DISKS)).await.expect("removed");
    assert_eq!(rig.residue().await, Vec::<String>::new());
}

pub(super) async fn a_name_used_again_has_none_of_the_old_bytes<R: Rig>(rig: R) {
    let (first, second) = (rig.image(0), rig.image(1));
    reach(&rig, &wanted(&first, 0, &[1], 0..1))
        .await
        .expect("created");
    write(&rig, 0, 0, &pattern(5, 65536), &mut first.bytes.to_vec()).await;
    rig.flush_disk(&vm(0)).await.expect("flushed");
    reach(&rig, &nothing(0..1)).await.expect("removed");
    reach(&rig, &wanted(&second, 0, &[1], 0..1))
        .await
        .expect("created again");
    check_disk(&rig, 0, &second.bytes).await;
    check_export(&rig, 1, 1).await;
}

pub(super) async fn removal_leaves_nothing<R: Rig>(mut rig: R) {
    let image = rig.image(0);
    let all = wanted(&image, 0, &[1], 0..2);
    reach(&rig, &all).await.expect("created");
    check_export(&rig, 0, 1).await;
    write(&rig, 0, 0, &pattern(6, 4096), &mut image.bytes.to_vec()).await;
    reach(&rig, &nothing(0..2)).await.expect("removed");
    assert_eq!(rig.residue().await, Vec::<String>::new());
    // Also what a process left that is no more.
    reach(&rig, &all).await.expect("created");
    rig.restart().await;
    reach(&rig, &nothing(0..2)).await.expect("removed");
    assert_eq!(rig.residue().await, Vec::<String>::new());
    // A cache may be kept for the next time.
    reach(&rig, &all).await.expect("created");
    let mut keep = nothing(0..2);
    keep.kept_caches.insert(image.content.digest);
    reach(&rig, &keep).await.expect("removed but for the cache");
    assert_ne!(rig.residue().await, Vec::<String>::new());
    reach(&rig, &all).await.expect("created warm");
    check_disk(&rig, 0, &image.bytes).await;
    reach(&rig, &nothing(0..2)).await.expect("removed");
    assert_eq!(rig.residue().await, Vec::<String>::new());
}

/// Reaches `wanted` through a plane that fails at step `at`. Whether the step was there to fail.
async fn strike(rig: &impl Rig, wanted: &Wanted, at: usize, mode: FaultMode) -> bool {
    let faulty = Arc::new(FaultyPlane::new(rig.plane(), at, mode));
    let struck = Arc::clone(&faulty);
    let applier = Applier {
        plane: faulty as Arc<dyn Plane>,
        ..applier(rig)
    };
    let result = applier.reach(&Scope::All, wanted).await;
    assert_eq!(
        struck.struck(),
        result.is_err(),
        "an error is told, and no other happens: {result:?}"
    );
    struck.struck()
}

/// The most steps that building or removing takes in these scenarios; more is a loop.
const MOST_STEPS: usize = 64;

pub(super) async fn fail_at_every_step<R: Rig>(
    make: impl AsyncFn() -> R,
    removing: bool,
    mode: FaultMode,
) -> usize {
    let mut tried = 0;
    for at in 0..=MOST_STEPS {
        assert!(at < MOST_STEPS, "the plan does not end");
        let mut rig = make().await;
        let image = rig.image(0);
        let all = wanted(&image, 0, &[1], 0..2);
        let none = nothing(0..2);
        if removing {
            reach(&rig, &all).await.expect("created");
        }
        let target = if removing { &none } else { &all };
        if !strike(&rig, target, at, mode).await {
            break;
        }
        tried += 1;
        if mode != FaultMode::Error {
            rig.restart().await;
        }
        // The same again succeeds.
        reach(&rig, target).await.expect("a retry succeeds");
        if !removing {
            check_disk(&rig, 0, &image.bytes).await;
            check_export(&rig, 0, 1).await;
            // And so does giving up, at the same point.
            reach(&rig, &none).await.expect("removed");
            assert_eq!(rig.residue().await, Vec::<String>::new());
            assert!(strike(&rig, &all, at, mode).await);
            if mode != FaultMode::Error {
                rig.restart().await;
            }
            reach(&rig, &none).await.expect("given up");
        }
        assert_eq!(rig.residue().await, Vec::<String>::new(), "step {at}, {mode:?}");
        reach(&rig, &all).await.expect("from scratch");
        check_disk(&rig, 1, &image.bytes).await;
    }
    tried
}

pub(super) async fn build_and_remove(rig: &impl Rig) {
    let image = rig.image(0);
    reach(rig, &wanted(&image, 0, &[1], 0..2)).await.expect("created");
    check_disk(rig, 1, &image.bytes).await;
    check_export(rig, 0, 1).await;
    reach(rig, &nothing(0..2)).await.expect("removed");
}
