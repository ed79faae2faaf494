//! Disks with snapshots against byte arrays, and layers that are not what they should be.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use treeboot_types::{Digest, SnapshotName, VmName};

use super::model::ModelFolder;
use super::tree::{LayerTree, MAX_LAYERS, Snapshot, Tidy, TreeError};
use super::*;
use crate::delta::tests::{BOOT, Base, DISK_BYTES, META, base_sector, block_on, pattern};
use crate::{BlockDevice, BlockError, BootId, Delta, DeltaError, DeltaMeta};

pub(super) fn name(text: &str) -> SnapshotName {
    SnapshotName::new(text).unwrap()
}

pub(super) fn snapshot(text: &str) -> Snapshot {
    Snapshot {
        name: name(text),
        created_unix_ms: 7,
        frozen: false,
    }
}

pub(super) fn files(folder: &Arc<ModelFolder>, boot: BootId) -> DiskFiles {
    let folder: Arc<dyn Folder> = folder.clone();
    DiskFiles::new(folder, VmName::new("vm").unwrap(), META, boot)
}

pub(super) fn open(folder: &Arc<ModelFolder>, boot: BootId) -> LayeredDisk {
    LayeredDisk::open(files(folder, boot), Arc::new(Base(DISK_BYTES))).unwrap()
}

pub(super) fn folder() -> Arc<ModelFolder> {
    Arc::new(ModelFolder::new(&["vm.delta"]))
}

pub(super) async fn read_device(device: &dyn BlockDevice) -> Vec<u8> {
    let mut all = vec![0xEE; device.geometry().bytes as usize];
    device.read(0, &mut all).await.unwrap();
    all
}

pub(super) async fn tidy_all(disk: &LayeredDisk) {
    while disk.tidy().await.unwrap() {}
}

#[derive(Debug, Clone)]
enum Step {
    Write { sector: u64, sectors: u64 },
    Discard { sector: u64, sectors: u64 },
    Flush,
    Snapshot(u8),
    RollBack(u8),
    Forget(u8),
    Tidy,
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    let place = || (0..DISK_BYTES / 512, 1u64..40);
    prop_oneof![
        6 => place().prop_map(|(sector, sectors)| Step::Write { sector, sectors }),
        2 => place().prop_map(|(sector, sectors)| Step::Discard { sector, sectors }),
        1 => Just(Step::Flush),
        4 => (0..5u8).prop_map(Step::Snapshot),
        2 => (0..5u8).prop_map(Step::RollBack),
        3 => (0..5u8).prop_map(Step::Forget),
        3 => Just(Step::Tidy),
        1 => Just(Step::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn a_disk_and_all_its_snapshots_read_like_byte_arrays(steps in prop::collection::vec(step(), 1..40)) {
        block_on(async {
            let folder = folder();
            let mut disk = Some(open(&folder, BOOT));
            let mut now: Vec<u8> = (0..DISK_BYTES / 512).flat_map(base_sector).collect();
            let mut kept: BTreeMap<SnapshotName, Vec<u8>> = BTreeMap::new();
            for (tag, step) in (1u64..).zip(steps) {
                let there = disk.as_ref().unwrap();
                let span = |sector: u64, sectors: u64| {
                    let from = (sector * 512) as usize;
                    from..(from + (sectors * 512) as usize).min(DISK_BYTES as usize)
                };
                match step {
                    Step::Write { sector, sectors } => {
                        let span = span(sector, sectors);
                        let data = pattern(tag).repeat(span.len() / 512);
                        there.write(sector * 512, &data).await.unwrap();
                        now[span].copy_from_slice(&data);
                    }
                    Step::Discard { sector, sectors } => {
                        let span = span(sector, sectors);
                        there.discard(sector * 512, span.len() as u64).await.unwrap();
                        now[span].fill(0);
                    }
                    Step::Flush => there.flush().await.unwrap(),
                    Step::Snapshot(n) => {
                        let snapshot = snapshot(&format!("s{n}"));
                        let known = kept.get(&snapshot.name);
                        match there.snapshot(snapshot.clone()).await {
                            Ok(new) => {
                                assert!(new == known.is_none() && (new || known == Some(&now)));
                                kept.insert(snapshot.name, now.clone());
                            }
                            Err(LayerError::Tree(TreeError::Exists { .. })) => assert!(known.is_some()),
                            Err(other) => panic!("{other}"),
                        }
                    }
                    Step::RollBack(n) => {
                        let name = name(&format!("s{n}"));
                        match (there.roll_back(&name).await, kept.get(&name)) {
                            (Ok(()), Some(then)) => now.clone_from(then),
                            (Err(LayerError::Tree(TreeError::Unknown { .. })), None) => {}
                            (result, _) => panic!("{result:?}"),
                        }
                    }
                    Step::Forget(n) => {
                        let name = name(&format!("s{n}"));
                        assert_eq!(there.forget(&name).await.is_ok(), kept.remove(&name).is_some());
                    }
                    Step::Tidy => tidy_all(there).await,
                    Step::Reopen => {
                        drop(disk.take());
                        disk = Some(open(&folder, BOOT));
                    }
                }
                let there = disk.as_ref().unwrap();
                assert!(read_device(there).await == now, "the disk after step {tag}");
                let tree = there.tree();
                assert_eq!(tree.audit(), Ok(()));
                assert_eq!(tree.snapshots().count(), kept.len());
                for (layer, snapshot) in tree.snapshots() {
                    let then = read_device(&there.frozen(layer)).await;
                    assert!(then == kept[&snapshot.name], "{} after step {tag}", snapshot.name);
                }
            }
            let there = disk.unwrap();
            tidy_all(&there).await;
            // A spare layer stays only where several stand on it.
            let tree = there.tree();
            let spare = tree.layers().iter().filter(|(id, layer)| **id != tree.live() && layer.snapshot.is_none());
            for (&id, _) in spare {
                assert!(tree.children(id).len() > 1);
            }
            for layer in there.report(true).await.unwrap() {
                assert_eq!(layer.check.damage, vec![]);
                assert_eq!(layer.check.sealed, !layer.live);
            }
        });
    }
}

#[test]
fn the_manifest_is_read_back_and_damage_to_it_is_seen() {
    let mut tree = LayerTree::default();
    for n in 0..3 {
        tree.snapshot(snapshot(&format!("s{n}"))).unwrap();
    }
    tree.roll_back(&name("s0")).unwrap();
    tree.forget(&name("s1"));
    tree.hold(0, 17);
    let text = tree.encode();
    assert_eq!(LayerTree::decode(&text), Ok(tree.clone()));
    for at in 0..text.len() - 1 {
        let mut wrong = text.clone();
        wrong[at] ^= 1;
        assert!(LayerTree::decode(&wrong).is_err(), "byte {at}");
        assert!(LayerTree::decode(&text[..at]).is_err(), "cut at {at}");
    }
    assert_eq!(tree.tidy(), Some(Tidy::Remove(3)));
}

#[test]
fn a_spare_layer_on_which_several_stand_stays_until_one_is_left() {
    let mut tree = LayerTree::default();
    tree.snapshot(snapshot("a")).unwrap();
    tree.snapshot(snapshot("b")).unwrap();
    tree.roll_back(&name("a")).unwrap();
    assert_eq!(tree.tidy(), Some(Tidy::Remove(2)), "what was written after b");
    tree.tidied(Tidy::Remove(2));
    tree.forget(&name("a"));
    assert_eq!(tree.tidy(), None, "b and the live layer stand on a");
    tree.forget(&name("b"));
    assert_eq!(tree.tidy(), Some(Tidy::Remove(1)));
    tree.tidied(Tidy::Remove(1));
    assert_eq!(tree.tidy(), Some(Tidy::Merge { layer: 0, into: 3 }));
    tree.tidied(Tidy::Merge { layer: 0, into: 3 });
    assert_eq!((tree.tidy(), tree.chain(tree.live())), (None, vec![3]));
}

#[test]
fn what_a_transfer_holds_stays_and_layers_have_an_end() {
    let mut tree = LayerTree::default();
    let held = tree.hold_live(9).unwrap();
    tree.snapshot(snapshot("a")).unwrap();
    assert_eq!((tree.tidy(), tree.held_by(9)), (None, Some(held)));
    assert!(tree.release(Some(9)) && !tree.release(Some(9)));
    assert_eq!(tree.tidy(), Some(Tidy::Merge { layer: held, into: 1 }));
    for n in tree.layers().len()..MAX_LAYERS {
        tree.snapshot(snapshot(&format!("s{n}"))).unwrap();
    }
    assert_eq!(tree.snapshot(snapshot("more")), Err(TreeError::Full));
    assert_eq!(tree.roll_back(&name("a")), Err(TreeError::Full));
}

#[test]
fn a_snapshot_while_somebody_writes_holds_all_that_was_acknowledged_before() {
    block_on(async {
        let folder = folder();
        let disk = Arc::new(open(&folder, BOOT));
        let writing = {
            let disk = Arc::clone(&disk);
            tokio::spawn(async move {
                for tag in 1..400u64 {
                    disk.write(tag % 40 * 4096, &pattern(tag)).await.unwrap();
                }
            })
        };
        for n in 0..6 {
            let before = read_all_tags(&*disk).await;
            disk.snapshot(snapshot(&format!("s{n}"))).await.unwrap();
            let after = read_all_tags(&*disk).await;
            let tree = disk.tree();
            let layer = tree.find(&name(&format!("s{n}"))).unwrap();
            let kept = read_all_tags(&disk.frozen(layer)).await;
            for (at, tag) in kept.iter().enumerate() {
                // Tags only grow, but for the base's own.
                let grow = |a: u64, b: u64| a == b || a >= 1_000_000 || a < b;
                assert!(grow(before[at], *tag) && grow(*tag, after[at]), "sector {at}");
            }
            tokio::task::yield_now().await;
            if n % 2 == 1 {
                disk.forget(&name(&format!("s{}", n - 1))).await.unwrap();
                tidy_all(&disk).await;
            }
        }
        writing.await.unwrap();
        let now = read_all_tags(&*disk).await;
        for (block, tag) in (1..40).zip(361..) {
            assert_eq!(now[block * 8], tag);
        }
    });
}

async fn read_all_tags(device: &dyn BlockDevice) -> Vec<u64> {
    let all = read_device(device).await;
    let tag = |sector: &[u8]| u64::from_le_bytes(sector[..8].try_into().unwrap());
    all.chunks(512).map(tag).collect()
}

#[test]
fn damage_to_a_frozen_layer_is_located_and_its_bytes_go_nowhere() {
    block_on(async {
        let folder = folder();
        let disk = open(&folder, BOOT);
        disk.write(3 * 4096, &[7; 3 * 4096]).await.unwrap();
        disk.snapshot(snapshot("a")).await.unwrap();
        disk.write(0, &[9; 4096]).await.unwrap();
        tidy_all(&disk).await;
        // Headers, two maps, then the data at its own place.
        folder.damage("vm.delta", 4096 * 4 + 4 * 4096 + 512, &[1; 16]);
        let report = disk.report(true).await.unwrap();
        let wrong: Vec<_> = report[0]
            .check
            .damage
            .iter()
            .map(|d| (d.offset, d.bytes))
            .collect();
        assert_eq!(wrong, [(4 * 4096, 4096)]);
        assert_eq!((report[0].check.data_blocks, report[0].check.zero_blocks), (3, 0));
        assert_eq!(report[1].check.damage, []);
        let mut buf = vec![0; 4096];
        disk.read(3 * 4096, &mut buf).await.unwrap();
        for (offset, bytes) in [(4 * 4096, 4096), (4 * 4096 + 512, 512), (3 * 4096, 3 * 4096)] {
            let mut buf = vec![0; bytes];
            let error = disk.read(offset, &mut buf).await.unwrap_err();
            assert!(
                matches!(&error, BlockError::Corrupt { what } if what.contains("at 16384 ")),
                "{error}"
            );
        }
        // Nor are they merged into what is not damaged.
        disk.forget(&name("a")).await.unwrap();
        let error = disk.tidy().await.unwrap_err();
        assert!(matches!(error, LayerError::Damaged { layer: 0, .. }), "{error}");
        // What is written over the damage is good again, and the merge has no need of what lies below.
        disk.read(0, &mut buf).await.unwrap();
        assert_eq!(buf, [9; 4096]);
    });
}

#[test]
fn layers_that_are_missing_damaged_or_anothers_are_refused_by_name() {
    block_on(async {
        let folder = folder();
        let disk = open(&folder, BOOT);
        disk.write(0, &[7; 8192]).await.unwrap();
        disk.snapshot(snapshot("a")).await.unwrap();
        disk.snapshot(snapshot("b")).await.unwrap();
        tidy_all(&disk).await;
        drop(disk);
        let again = || LayeredDisk::open(files(&folder, BOOT), Arc::new(Base(DISK_BYTES)));
        let refused = |part: &str| {
            let error = again().err().unwrap().to_string();
            assert!(error.contains(part), "{error}");
        };
        let layer = |n: u64| 4096 * (4 + 41) + n;
        folder.damage("vm.delta", layer(8), &[1]);
        refused("'/deltas/vm.delta' is damaged: its seal");
        folder.damage("vm.delta", layer(0), &[0; 4096]);
        drop(again().unwrap());
        let other = DeltaMeta {
            digest: Digest([3; 32]),
            ..META
        };
        let moved = DiskFiles::new(folder.clone(), VmName::new("vm").unwrap(), other, BOOT);
        let error = LayeredDisk::open(moved, Arc::new(Base(DISK_BYTES)))
            .err()
            .unwrap();
        assert!(
            matches!(error, LayerError::Delta(DeltaError::OtherBase { .. })),
            "{error}"
        );
        Folder::remove(&*folder, "vm+1.layer").unwrap();
        refused("'/deltas/vm+1.layer' is gone");
        Folder::replace(&*folder, "vm.layers", b"{}\nx\n").unwrap();
        refused("'/deltas/vm.layers' is damaged: its checksum");
        files(&folder, BOOT).delete().unwrap();
        assert_eq!(folder.names().unwrap(), [""; 0]);
    });
}

#[test]
fn files_of_a_directory_tell_whose_they_are() {
    let owner = |file: &str| owner_of(file).map(|vm| vm.to_string());
    assert_eq!(owner("web-1.delta").as_deref(), Some("web-1"));
    assert_eq!(owner("web-1.layers").as_deref(), Some("web-1"));
    assert_eq!(owner("a.layers.delta").as_deref(), Some("a.layers"));
    for file in ["web-1+3.layer", "web-1.layers.new", "x", ".delta"] {
        assert_eq!(owner(file), None, "{file}");
    }
}

#[test]
fn on_real_files_a_disk_goes_through_its_life() {
    let dir = tempfile::tempdir().unwrap();
    let folder: Arc<dyn Folder> = Arc::new(Directory::new(dir.path()));
    let vm = VmName::new("vm").unwrap();
    drop(Delta::create(&dir.path().join("vm.delta"), META, BOOT).unwrap());
    let open = || {
        let files = DiskFiles::new(Arc::clone(&folder), vm.clone(), META, BOOT);
        LayeredDisk::open(files, Arc::new(Base(DISK_BYTES))).unwrap()
    };
    block_on(async {
        let disk = open();
        disk.write(0, &pattern(5).repeat(8)).await.unwrap();
        disk.snapshot(snapshot("a")).await.unwrap();
        disk.write(0, &pattern(6).repeat(16)).await.unwrap();
        tidy_all(&disk).await;
        drop(disk);
        let disk = open();
        let held = disk.hold(4).await.unwrap();
        assert_eq!(disk.hold(4).await.unwrap(), held);
        let frozen = disk.frozen(held);
        assert_eq!(frozen.content(0, 1 << 16), (Content::Data, 8192));
        assert_eq!(frozen.content(8192, 4096), (Content::Base, 4096));
        disk.roll_back(&name("a")).await.unwrap_err();
        disk.release(Some(4)).await.unwrap();
        disk.roll_back(&name("a")).await.unwrap();
        tidy_all(&disk).await;
        let mut buf = vec![0; 512];
        disk.read(0, &mut buf).await.unwrap();
        assert_eq!(buf, pattern(5));
        disk.forget(&name("a")).await.unwrap();
        tidy_all(&disk).await;
        assert_eq!(disk.tree().layers().len(), 1);
        assert!(read_all_is(&disk).await);
        let boot = BootId([8; 16]);
        let in_use = check(dir.path(), &vm, boot).unwrap_err();
        assert!(matches!(in_use, DeltaError::InUse { .. }), "{in_use}");
        disk.snapshot(snapshot("b")).await.unwrap();
        disk.write(4096, &pattern(6).repeat(8)).await.unwrap();
        disk.flush().await.unwrap();
        tidy_all(&disk).await;
        drop(disk);
        let report = check(dir.path(), &vm, boot).unwrap();
        let counts: Vec<_> = report.iter().map(|l| (l.live, l.check.data_blocks)).collect();
        assert_eq!(counts, [(false, 1), (true, 1)]);
        assert!(report.iter().all(|layer| layer.check.damage.is_empty()));
        let frozen = dir.path().join(format!("vm+{}.layer", report[0].layer));
        let file = std::fs::OpenOptions::new().write(true).open(&frozen).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"x", 4096 * 4 + 100).unwrap();
        let report = check(dir.path(), &vm, boot).unwrap();
        assert_eq!(
            (report[0].check.damage[0].offset, report[0].check.damage[0].bytes),
            (0, 4096)
        );
        std::fs::remove_file(&frozen).unwrap();
        let report = check(dir.path(), &vm, boot).unwrap();
        assert!(report[0].check.damage[0].what.contains("is gone"), "{report:?}");
        let missing = check(dir.path(), &VmName::new("other").unwrap(), boot).unwrap_err();
        assert!(matches!(missing, DeltaError::Missing { .. }), "{missing}");
        let mut names = folder.names().unwrap();
        names.sort();
        assert_eq!(names.len(), 2, "the live layer and the manifest: {names:?}");
        DiskFiles::new(Arc::clone(&folder), vm.clone(), META, BOOT)
            .delete()
            .unwrap();
        assert_eq!(folder.names().unwrap(), [""; 0]);
    });
}

async fn read_all_is(disk: &LayeredDisk) -> bool {
    let all = read_device(disk).await;
    all[..4096] == pattern(5).repeat(8) && all[4096..4608] == base_sector(8)
}

#[test]
fn a_limit_counts_written_blocks_of_all_layers_and_gives_back_what_was_discarded() {
    const BLOCK: u64 = 4096;
    block_on(async {
        let folder = folder();
        let disk = open(&folder, BOOT);
        let full = |written: Result<(), BlockError>| matches!(written, Err(BlockError::NoSpace { .. }));
        let write = async |block: u64, blocks: u64| {
            let data = vec![7; (blocks * BLOCK) as usize];
            disk.write(block * BLOCK, &data).await
        };
        disk.set_limit(Some(4 * BLOCK));
        write(0, 3).await.unwrap();
        assert!(
            full(write(8, 2).await),
            "two more are one too many, and none of them is taken"
        );
        assert_eq!(disk.data_bytes(), 3 * BLOCK);
        write(8, 1).await.unwrap();
        assert!(
            full(disk.write(9 * BLOCK + 512, &[1; 512]).await),
            "a part of a block is a block"
        );
        write(0, 3).await.unwrap();
        // A snapshot's blocks count, and so does what is written over them.
        disk.snapshot(snapshot("a")).await.unwrap();
        assert!(full(write(0, 1).await));
        disk.set_limit(Some(6 * BLOCK));
        write(0, 2).await.unwrap();
        assert!(full(write(2, 1).await));
        // Given back: blocks of the live layer at once, those of a snapshot with it.
        disk.discard(BLOCK, BLOCK).await.unwrap();
        write(20, 1).await.unwrap();
        assert!(full(write(21, 1).await));
        disk.forget(&name("a")).await.unwrap();
        tidy_all(&disk).await;
        assert_eq!(disk.data_bytes(), 4 * BLOCK, "blocks 0, 2, 8 and 20");
        write(30, 2).await.unwrap();
        assert!(full(write(36, 1).await));
        disk.flush().await.unwrap();
        drop(disk);
        // What is there is counted anew where it is opened; below what is there nothing new is taken, and all else is.
        let disk = open(&folder, BOOT);
        assert_eq!(disk.data_bytes(), 6 * BLOCK);
        disk.set_limit(Some(BLOCK));
        assert!(full(disk.write(37 * BLOCK, &[1; 4096]).await));
        disk.write(0, &[1; 4096]).await.unwrap();
        disk.set_limit(None);
        disk.write(37 * BLOCK, &[1; 4096]).await.unwrap();
    });
}
