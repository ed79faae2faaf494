//! A disk is stopped at every point of what it wrote, and failed at every operation.
//!
//! The oracle knows for each sector what it may hold now, and what it may hold after a power cut: what the last flush
//! that was acknowledged made durable, or anything written since.

use std::collections::BTreeSet;
use std::sync::Arc;

use proptest::prelude::*;

use super::BootId;
use super::tests::{
    BOOT, DISK_BYTES, NEXT_BOOT, SECTOR_BYTES, base_sector, block_on, open, pattern, read_all,
};
use crate::storage::model::{Fault, ModelStorage, coin};
use crate::{BlockDevice, Disk};

const SECTORS: u64 = DISK_BYTES / SECTOR_BYTES;
/// Tags from here on are the base's own.
const BASE: u64 = 1_000_000;

#[derive(Debug, Clone)]
enum Step {
    Write { sector: u64, sectors: u64 },
    Discard { sector: u64, sectors: u64 },
    Flush,
}

fn step() -> impl Strategy<Value = Step> {
    let sectors = || prop_oneof![Just(8u64), 1u64..30];
    // Half of them are whole blocks; few blocks, so that each is changed often.
    let sector = || prop_oneof![(0..SECTORS / 8).prop_map(|block| block * 8), 0..SECTORS, 0..24u64];
    prop_oneof![
        5 => (sector(), sectors()).prop_map(|(sector, sectors)| Step::Write { sector, sectors }),
        3 => (sector(), sectors()).prop_map(|(sector, sectors)| Step::Discard { sector, sectors }),
        2 => Just(Step::Flush),
    ]
}

/// A step that was done, and which part of the storage's log is its.
struct Done {
    step: Step,
    tag: u64,
    ok: bool,
    log: std::ops::Range<usize>,
}

async fn run(disk: &Disk, storage: &ModelStorage, steps: &[Step], first_tag: u64) -> Vec<Done> {
    let mut done = vec![];
    for (tag, step) in (first_tag..).zip(steps) {
        let start = storage.log_len();
        let (tag, result) = match *step {
            Step::Write { sector, sectors } => {
                let sectors = sectors.min(SECTORS - sector);
                let data = pattern(tag).repeat(sectors as usize);
                (tag, disk.write(sector * SECTOR_BYTES, &data).await)
            }
            Step::Discard { sector, sectors } => {
                let bytes = sectors.min(SECTORS - sector) * SECTOR_BYTES;
                (0, disk.discard(sector * SECTOR_BYTES, bytes).await)
            }
            Step::Flush => (0, disk.flush().await),
        };
        done.push(Done {
            step: step.clone(),
            tag,
            ok: result.is_ok(),
            log: start..storage.log_len(),
        });
    }
    done
}

/// For each sector the tags that it may hold.
struct Oracle {
    now: Vec<BTreeSet<u64>>,
    after_power_cut: Vec<BTreeSet<u64>>,
}

impl Oracle {
    fn new() -> Self {
        let base: Vec<_> = (0..SECTORS)
            .map(|sector| BTreeSet::from([BASE + sector]))
            .collect();
        Self {
            now: base.clone(),
            after_power_cut: base,
        }
    }

    /// What may be there once the first `point` operations of the log were done.
    fn at(done: &[Done], point: usize) -> Self {
        let mut oracle = Self::new();
        for step in done
            .iter()
            .take_while(|step| step.log.start < point || step.log.end <= point)
        {
            oracle.apply(step, step.ok && step.log.end <= point);
        }
        oracle
    }

    fn apply(&mut self, done: &Done, ok: bool) {
        let (sector, sectors) = match done.step {
            Step::Flush => {
                if ok {
                    self.after_power_cut.clone_from(&self.now);
                }
                return;
            }
            Step::Write { sector, sectors } | Step::Discard { sector, sectors } => (sector, sectors),
        };
        for at in sector..(sector + sectors).min(SECTORS) {
            let now = &mut self.now[at as usize];
            if ok {
                now.clear();
            }
            now.insert(done.tag);
            self.after_power_cut[at as usize].insert(done.tag);
        }
    }
}

fn check(content: &[u8], allowed: &[BTreeSet<u64>], what: &str) {
    for (sector, (bytes, allowed)) in content.chunks(512).zip(allowed).enumerate() {
        let found = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        assert!(
            allowed.contains(&found) && bytes == pattern(found),
            "{what}: sector {sector} holds {found}, allowed are {allowed:?}"
        );
        debug_assert_eq!(base_sector(0), pattern(BASE));
    }
}

/// Goes on with a disk after a crash, in `boot`: it takes writes, keeps them when its process is killed, flushes them,
/// and keeps them through a power cut.
async fn goes_on(storage: &Arc<ModelStorage>, disk: Disk, boot: BootId) {
    let mut expected = read_all(&disk).await;
    for (sector, sectors) in [(3, 2), (8, 8), (20, 30)] {
        let data = pattern(777_777).repeat(sectors);
        disk.write(sector as u64 * SECTOR_BYTES, &data).await.unwrap();
        expected[sector * 512..(sector + sectors) * 512].copy_from_slice(&data);
    }
    assert!(read_all(&disk).await == expected);
    drop(disk);
    let disk = open(storage, boot);
    assert!(read_all(&disk).await == expected);
    disk.flush().await.unwrap();
    drop(disk);
    let lost = Arc::new(storage.crash(storage.log_len(), &mut || false));
    assert!(read_all(&open(&lost, BootId([3; 16]))).await == expected);
}

/// Up to the point `booted` of the log the machine was in the boot `NEXT_BOOT`, then in `BOOT`.
async fn crash_everywhere(storage: &Arc<ModelStorage>, done: &[Done], booted: usize, seed: u64) {
    let mut keep = coin(seed);
    for point in 0..=storage.log_len() {
        let oracle = Oracle::at(done, point);
        for round in 0..3 {
            let crashed = match round {
                0 => storage.crash(point, &mut || false),
                1 => storage.crash(point, &mut || true),
                _ => storage.crash(point, &mut keep),
            };
            let crashed = Arc::new(crashed);
            let boot = BootId([4; 16]);
            let disk = open(&crashed, boot);
            let what = format!("power cut after {point}, round {round}");
            check(&read_all(&disk).await, &oracle.after_power_cut, &what);
            goes_on(&crashed, disk, boot).await;
        }
        // A kill leaves the operation after `point` done in part.
        let killed = Arc::new(storage.killed(point, &mut keep));
        let partly = Oracle::at(done, point + 1);
        let both: Vec<BTreeSet<u64>> = oracle.now.iter().zip(&partly.now).map(|(a, b)| a | b).collect();
        let boot = if point < booted { NEXT_BOOT } else { BOOT };
        let disk = open(&killed, boot);
        check(&read_all(&disk).await, &both, &format!("killed after {point}"));
        goes_on(&killed, disk, boot).await;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn at_every_crash_point_what_was_flushed_and_what_was_acknowledged_is_there(
        steps in prop::collection::vec(step(), 1..14),
        seed in any::<u64>(),
    ) {
        block_on(async {
            let storage = Arc::new(ModelStorage::new());
            let disk = open(&storage, BOOT);
            let done = run(&disk, &storage, &steps, 1).await;
            assert!(done.iter().all(|step| step.ok));
            drop(disk);
            crash_everywhere(&storage, &done, 0, seed).await;
        });
    }

    #[test]
    fn the_same_holds_after_a_restart_within_the_boot_and_after_a_reboot(
        before in prop::collection::vec(step(), 1..8),
        after in prop::collection::vec(step(), 1..8),
        seed in any::<u64>(),
        reboot in any::<bool>(),
    ) {
        block_on(async {
            let storage = Arc::new(ModelStorage::new());
            let disk = open(&storage, NEXT_BOOT);
            let mut done = run(&disk, &storage, &before, 1).await;
            if reboot {
                done.extend(run(&disk, &storage, &[Step::Flush], 100).await);
            }
            drop(disk);
            let boot = if reboot { BOOT } else { NEXT_BOOT };
            let booted = storage.log_len();
            let disk = open(&storage, boot);
            done.extend(run(&disk, &storage, &after, 200).await);
            drop(disk);
            let point = storage.log_len();
            let mut keep = coin(seed);
            for round in 0..8 {
                let crashed = Arc::new(storage.crash(point, &mut keep));
                let boot = BootId([9; 16]);
                let disk = open(&crashed, boot);
                let oracle = Oracle::at(&done, point);
                check(&read_all(&disk).await, &oracle.after_power_cut, &format!("round {round}"));
                goes_on(&crashed, disk, boot).await;
            }
            if reboot {
                crash_everywhere(&storage, &done, booted, seed).await;
            }
        });
    }

    #[test]
    fn an_error_at_any_operation_leaves_the_disk_consistent(
        steps in prop::collection::vec(step(), 1..10),
        seed in any::<u64>(),
        full in any::<bool>(),
    ) {
        block_on(async {
            let fault = if full { Fault::NoSpace } else { Fault::Io };
            let operations = {
                let storage = Arc::new(ModelStorage::new());
                run(&open(&storage, BOOT), &storage, &steps, 1).await;
                storage.operations()
            };
            let mut keep = coin(seed);
            for k in 0..operations {
                let storage = Arc::new(ModelStorage::new());
                // The operations of opening are not failed here.
                let disk = open(&storage, BOOT);
                storage.fail_at(storage.operations() + k, fault);
                let mut done = run(&disk, &storage, &steps, 1).await;
                let oracle = Oracle::at(&done, storage.log_len());
                check(&read_all(&disk).await, &oracle.now, &format!("operation {k} failed"));
                // Whatever failed, a retry succeeds and then holds.
                done.extend(run(&disk, &storage, &[Step::Flush, Step::Flush], 300).await);
                drop(disk);
                let oracle = Oracle::at(&done, storage.log_len());
                let crashed = Arc::new(storage.crash(storage.log_len(), &mut keep));
                let what = format!("power cut after operation {k} failed");
                check(&read_all(&open(&crashed, NEXT_BOOT)).await, &oracle.after_power_cut, &what);
                let killed = Arc::new(storage.killed(storage.log_len(), &mut keep));
                let disk = open(&killed, BOOT);
                check(&read_all(&disk).await, &oracle.now, &format!("killed after operation {k} failed"));
                goes_on(&killed, disk, BOOT).await;
            }
        });
    }
}
