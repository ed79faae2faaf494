use treeboot_types::{Endpoint, Epoch};

use super::*;
use crate::stack::{PathTo, WantedDisk};

fn content(n: u8) -> Content {
    Content {
        digest: Digest([n; 32]),
        bytes: 1 << 20,
        chunk_bytes: 1 << 16,
    }
}

fn disk() -> DiskState {
    let disk = WantedDisk {
        digest: content(1).digest,
        bytes: 1 << 20,
    };
    DiskState::new("a@1".parse().unwrap(), disk, [0; 16])
}

fn placed(image: &str, n: u8, portal: &str) -> Change {
    let image: ImageId = image.parse().unwrap();
    let parent = PlacedParent {
        path: PathTo {
            host: None,
            endpoint: Endpoint {
                portal: portal.parse().unwrap(),
                target: treeboot_types::Iqn::of_image(&image),
                data_lun: 0,
                hash_lun: Some(1),
            },
        },
        origin: true,
        depth: 0,
    };
    Change::Placed {
        image,
        content: content(n),
        place: Place {
            epoch: Epoch::default(),
            unit_bytes: 1 << 20,
            stripes: vec![PlacedStripe {
                active: vec![parent],
                depth: 1,
                ..PlacedStripe::default()
            }],
            children: BTreeSet::new(),
        },
    }
}

fn folded(changes: impl IntoIterator<Item = Change>) -> Desired {
    let mut desired = Desired::default();
    changes.into_iter().for_each(|change| desired.fold(change));
    desired
}

fn pinned(image: &str, pinned: bool) -> Change {
    Change::Pinned {
        image: image.parse().unwrap(),
        pinned,
    }
}

#[test]
fn a_base_is_wanted_while_it_is_pinned_or_a_disk_stands_on_it() {
    let vm = VmName::new("web-1").unwrap();
    let mut desired = folded([placed("a@1", 1, "h:1")]);
    assert_eq!(desired.wanted().bases.len(), 0);
    desired.fold(Change::Disk {
        vm: vm.clone(),
        disk: disk(),
    });
    assert_eq!(desired.wanted().bases.len(), 1);
    desired.disks.get_mut(&vm).unwrap().doomed = true;
    assert_eq!(desired.wanted().bases.len(), 0);
    assert!(desired.wanted().doomed_disks.contains(&vm));
    desired.fold(pinned("a@1", true));
    assert_eq!(desired.wanted().bases.len(), 1);
}

#[test]
fn two_names_of_one_content_share_a_base_and_each_has_its_export() {
    let desired = folded([
        placed("a@1", 1, "h:1"),
        placed("b@1", 1, "h:2"),
        pinned("a@1", true),
        pinned("b@1", true),
    ]);
    let wanted = desired.wanted();
    let base = &wanted.bases[&content(1).digest];
    assert_eq!(base.exports.len(), 2);
    assert_eq!(base.sources.stripes[0].active.len(), 2);
}

#[test]
fn the_latest_caches_are_kept_and_one_that_is_used_again_is_no_longer_idle() {
    let mut desired = Desired::default();
    for n in 0..6 {
        let name = format!("i{n}@1");
        desired.fold(placed(&name, n, "h:1"));
        desired.fold(Change::Detached {
            image: name.parse().unwrap(),
            keep_cache: true,
        });
    }
    assert_eq!(desired.kept_caches, [2, 3, 4, 5].map(|n| content(n).digest));
    desired.fold(placed("i3@1", 3, "h:1"));
    assert_eq!(desired.kept_caches, [2, 4, 5].map(|n| content(n).digest));
}

#[test]
fn a_store_that_another_name_holds_is_not_doomed() {
    let stored = |image: &str| Change::Stored {
        image: image.parse().unwrap(),
        content: content(1),
        stored: Stored {
            backing: Backing::Store,
            sources: Sources::default(),
        },
    };
    let doom = |image: &str| Change::StoreDoomed {
        image: image.parse().unwrap(),
    };
    let mut desired = folded([stored("a@1"), stored("b@1"), doom("a@1")]);
    assert!(desired.doomed_stores.is_empty());
    assert_eq!(desired.wanted().bases.len(), 1);
    desired.fold(doom("b@1"));
    assert_eq!(desired.doomed_stores.len(), 1);
    assert_eq!(desired.wanted().bases.len(), 0);
}

#[test]
fn a_vm_that_moves_is_served_by_nobody_and_its_coming_is_remembered() {
    let vm = VmName::new("v").unwrap();
    let mut desired = folded([placed("a@1", 1, "h:1")]);
    let mut fold = |moving: Option<Move>, transfer| {
        let disk = DiskState {
            moving,
            transfer: Some(transfer),
            ..disk()
        };
        desired.fold(Change::Disk { vm: vm.clone(), disk });
        let (all, one) = (desired.wanted(), desired.wanted_disk(&vm));
        assert_eq!(all.disks, one.disks);
        assert_eq!(all.resting_disks, one.resting_disks);
        assert_eq!(all.bases.len(), 1, "its base stays");
        (one.disks.len(), desired.taken.clone())
    };
    let leaving = |stage| {
        Some(Move::Leaving {
            transfer: 9,
            to: "h2".parse().unwrap(),
            address: "h2:1".into(),
            stage,
        })
    };
    assert_eq!(fold(Some(Move::Arriving), 7), (0, vec![]));
    assert_eq!(fold(None, 7), (1, vec![7]));
    for (stage, served) in [(Stage::Stopping, 1), (Stage::Fenced, 0), (Stage::Asked, 0)] {
        assert_eq!(fold(leaving(stage), 7), (served, vec![7]));
    }
    assert_eq!(fold(None, 7), (1, vec![7]), "it stayed");
    for n in 0..KEPT_TRANSFERS as u64 {
        fold(Some(Move::Arriving), n);
        fold(None, n);
    }
    let taken = fold(None, 1).1;
    assert_eq!((taken.len(), taken.first()), (KEPT_TRANSFERS, Some(&0)));
}
