//! A disk with snapshots dies at each operation of its files and of its directory, by a kill and by a power cut; whatever comes
//! back is what was acknowledged.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use proptest::prelude::*;
use treeboot_types::SnapshotName;

use super::model::ModelFolder;
use super::tests::{folder, name, open, read_device, snapshot};
use super::*;
use crate::BlockDevice;
use crate::delta::tests::{BOOT, DISK_BYTES, NEXT_BOOT, block_on, pattern};
use crate::storage::model::coin;

const SECTORS: usize = (DISK_BYTES / 512) as usize;
/// Tags from here on are the base's own.
const BASE: u64 = 1_000_000;

#[derive(Debug, Clone)]
enum Step {
    Write { block: u64, blocks: u64 },
    Discard { block: u64, blocks: u64 },
    Flush,
    Snapshot(u8),
    RollBack(u8),
    Forget(u8),
    Hold,
    Release,
    Tidy,
}

fn step() -> impl Strategy<Value = Step> {
    let place = || (0..20u64, 1u64..6);
    prop_oneof![
        5 => place().prop_map(|(block, blocks)| Step::Write { block, blocks }),
        1 => place().prop_map(|(block, blocks)| Step::Discard { block, blocks }),
        1 => Just(Step::Flush),
        4 => (0..3u8).prop_map(Step::Snapshot),
        1 => (0..3u8).prop_map(Step::RollBack),
        2 => (0..3u8).prop_map(Step::Forget),
        1 => Just(Step::Hold),
        1 => Just(Step::Release),
        3 => Just(Step::Tidy),
    ]
}

/// What the disk may hold: for each sector of it the tags, and the snapshots with theirs.
#[derive(Debug, Clone)]
struct World {
    now: Vec<u64>,
    /// After a power cut: what was durable last, or anything since.
    cut: Vec<BTreeSet<u64>>,
    kept: BTreeMap<SnapshotName, Vec<u64>>,
    /// A transfer holds a layer.
    held: bool,
}

impl World {
    fn new() -> Self {
        let now: Vec<u64> = (0..SECTORS as u64).map(|sector| BASE + sector).collect();
        Self {
            cut: now.iter().map(|tag| BTreeSet::from([*tag])).collect(),
            now,
            kept: BTreeMap::new(),
            held: false,
        }
    }

    fn settle(&mut self) {
        self.cut = self.now.iter().map(|tag| BTreeSet::from([*tag])).collect();
    }

    fn fill(&mut self, block: u64, blocks: u64, tag: u64) {
        for sector in (block * 8) as usize..((block + blocks) * 8) as usize {
            self.now[sector] = tag;
            self.cut[sector].insert(tag);
        }
    }

    fn apply(&mut self, step: &Step, tag: u64) {
        let name = |n: &u8| name(&format!("s{n}"));
        match step {
            Step::Write { block, blocks } => self.fill(*block, *blocks, tag),
            Step::Discard { block, blocks } => self.fill(*block, *blocks, 0),
            Step::Flush => self.settle(),
            // What is held stays what it is, and nothing is flushed for it a second time.
            Step::Hold if self.held => {}
            Step::Hold => {
                self.settle();
                self.held = true;
            }
            Step::Snapshot(n) => {
                self.kept.entry(name(n)).or_insert_with(|| self.now.clone());
                self.settle();
            }
            Step::RollBack(n) => {
                self.now = self.kept[&name(n)].clone();
                self.settle();
            }
            Step::Forget(n) => {
                self.kept.remove(&name(n));
            }
            Step::Release => self.held = false,
            Step::Tidy => {}
        }
    }
}

/// Whether the step could be asked for.
fn fits(world: &World, step: &Step) -> bool {
    let has = |n: &u8| world.kept.contains_key(&name(&format!("s{n}")));
    match step {
        Step::Snapshot(n) => !has(n),
        Step::RollBack(n) => has(n) && !world.held,
        Step::Forget(n) => has(n),
        _ => true,
    }
}

async fn take(disk: &LayeredDisk, step: &Step, tag: u64) -> Result<(), String> {
    let text = |error: LayerError| error.to_string();
    let words = |error: crate::BlockError| error.to_string();
    match step {
        Step::Write { block, blocks } => {
            let data = pattern(tag).repeat((blocks * 8) as usize);
            disk.write(block * 4096, &data).await.map_err(words)
        }
        Step::Discard { block, blocks } => disk.discard(block * 4096, blocks * 4096).await.map_err(words),
        Step::Flush => disk.flush().await.map_err(words),
        Step::Snapshot(n) => disk
            .snapshot(snapshot(&format!("s{n}")))
            .await
            .map(drop)
            .map_err(text),
        Step::RollBack(n) => disk.roll_back(&name(&format!("s{n}"))).await.map_err(text),
        Step::Forget(n) => disk.forget(&name(&format!("s{n}"))).await.map_err(text),
        Step::Hold => disk.hold(5).await.map(drop).map_err(text),
        Step::Release => disk.release(None).await.map_err(text),
        Step::Tidy => loop {
            if !disk.tidy().await.map_err(text)? {
                return Ok(());
            }
        },
    }
}

fn tags(content: &[u8]) -> Vec<u64> {
    let tag = |sector: &[u8]| {
        let tag = u64::from_le_bytes(sector[..8].try_into().unwrap());
        assert_eq!(sector, pattern(tag), "a torn sector");
        tag
    };
    content.chunks(512).map(tag).collect()
}

/// The worlds in one of which the disk must be: before and after the step at which it died.
async fn check(disk: &LayeredDisk, worlds: &[&World], power_cut: bool, what: &str) {
    let tree = disk.tree();
    assert_eq!(tree.audit(), Ok(()), "{what}");
    let found: BTreeSet<_> = tree.snapshots().map(|(_, s)| s.name.clone()).collect();
    let names = |world: &World| world.kept.keys().cloned().collect::<BTreeSet<_>>();
    assert!(
        worlds.iter().any(|world| names(world) == found),
        "{what}: {found:?}"
    );
    for (layer, snapshot) in tree.snapshots() {
        let content = tags(&read_device(&disk.frozen(layer)).await);
        let right = worlds
            .iter()
            .any(|world| world.kept.get(&snapshot.name) == Some(&content));
        assert!(right, "{what}: {} holds other bytes", snapshot.name);
    }
    let content = tags(&read_device(disk).await);
    for (sector, tag) in content.iter().enumerate() {
        let allowed = worlds.iter().any(|world| match power_cut {
            true => world.cut[sector].contains(tag),
            false => world.now[sector] == *tag,
        });
        assert!(allowed, "{what}: sector {sector} holds {tag}");
    }
}

/// It takes writes and snapshots as ever, nothing is spare, and all checksums are right.
async fn goes_on(folder: &Arc<ModelFolder>, disk: LayeredDisk, what: &str) {
    disk.release(None).await.unwrap();
    disk.write(8192, &pattern(777).repeat(16)).await.unwrap();
    disk.snapshot(snapshot("after")).await.unwrap();
    let content = read_device(&disk).await;
    while disk.tidy().await.unwrap() {}
    drop(disk);
    let disk = open(folder, BOOT);
    assert!(read_device(&disk).await == content, "{what}");
    for layer in disk.report(true).await.unwrap() {
        assert_eq!(
            (layer.check.damage, layer.check.sealed),
            (vec![], !layer.live),
            "{what}"
        );
    }
    let named = disk.tree().layers().len() + 1;
    assert_eq!(folder.names().unwrap().len(), named, "{what}: strays");
}

async fn dies_everywhere(steps: &[Step], seed: u64) {
    // Those that can be asked for, and how many operations all of them take.
    let (mut world, mut asked) = (World::new(), vec![]);
    let rehearsal = folder();
    let disk = open(&rehearsal, BOOT);
    for (step, tag) in steps.iter().zip(1..) {
        if fits(&world, step) {
            take(&disk, step, tag).await.unwrap();
            world.apply(step, tag);
            asked.push((step.clone(), tag));
        }
    }
    drop(disk);
    let mut keep = coin(seed);
    for at in 0..rehearsal.operations() {
        let folder = folder();
        let disk = open(&folder, BOOT);
        let begun = folder.operations();
        folder.die_after(begun + at);
        let mut before = World::new();
        let mut after = before.clone();
        for (step, tag) in &asked {
            after.apply(step, *tag);
            if take(&disk, step, *tag).await.is_err() {
                break;
            }
            before = after.clone();
        }
        drop(disk);
        for power_cut in [false, true] {
            let left = Arc::new(folder.after(power_cut, &mut keep));
            let what = format!("died at {at}, power cut: {power_cut}, in {asked:?}");
            let disk = open(&left, if power_cut { NEXT_BOOT } else { BOOT });
            check(&disk, &[&before, &after], power_cut, &what).await;
            goes_on(&left, disk, &what).await;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]
    #[test]
    fn at_every_operation_at_which_it_dies_the_disk_and_its_snapshots_come_back(
        steps in prop::collection::vec(step(), 1..12),
        seed in any::<u64>(),
    ) {
        block_on(dies_everywhere(&steps, seed));
    }
}

#[test]
fn a_life_with_a_merge_into_a_snapshot_dies_everywhere() {
    let steps = [
        Step::Write { block: 1, blocks: 4 },
        Step::Snapshot(0),
        Step::Write { block: 3, blocks: 4 },
        Step::Discard { block: 1, blocks: 1 },
        Step::Snapshot(1),
        Step::Write { block: 5, blocks: 1 },
        Step::Tidy,
        Step::Forget(0),
        Step::Tidy,
        Step::RollBack(1),
        Step::Tidy,
        Step::Forget(1),
        Step::Tidy,
    ];
    block_on(dies_everywhere(&steps, 11));
}

#[test]
fn a_hold_that_is_held_flushes_nothing_and_loses_nothing() {
    let write = || Step::Write { block: 0, blocks: 1 };
    let steps = [
        Step::Hold,
        write(),
        Step::Hold,
        Step::Snapshot(0),
        write(),
        Step::Hold,
        Step::Release,
        Step::Tidy,
    ];
    for seed in 0..8 {
        block_on(dies_everywhere(&steps, seed));
    }
}
