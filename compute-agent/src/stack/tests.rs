use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use treeboot_types::{HostName, Iqn};

use super::*;

fn digest(n: u8) -> Digest {
    Digest([n; 32])
}

fn image(n: u8) -> ImageId {
    format!("image-{n}@1").parse().unwrap()
}

fn vm(n: u8) -> VmName {
    VmName::new(&format!("vm-{n}")).unwrap()
}

fn host(n: u8) -> HostName {
    HostName::new(&format!("host-{n}")).unwrap()
}

fn content(n: u8) -> Content {
    Content {
        digest: digest(n),
        bytes: 1 << 20,
        chunk_bytes: 1 << 16,
    }
}

fn path(n: u8) -> PathTo {
    PathTo {
        host: Some(host(n)),
        endpoint: Endpoint {
            portal: format!("127.0.0.{n}:3260").parse().unwrap(),
            target: Iqn::of_image(&image(0)),
            data_lun: 0,
            hash_lun: Some(1),
        },
    }
}

/// Contents 0 to 3, hosts 0 to 4, VMs 0 to 5: small enough that runs collide.
fn any_access() -> impl Strategy<Value = Access> {
    prop_oneof![
        Just(Access::Anyone),
        prop::collection::btree_set((0u8..5).prop_map(host), 0..4).prop_map(Access::Hosts),
    ]
}

fn any_sources() -> impl Strategy<Value = Sources> {
    let stripe = (
        prop::collection::vec((1u8..5).prop_map(path), 1..3),
        prop::collection::vec((1u8..5).prop_map(path), 0..3),
    );
    prop::collection::vec(stripe, 1..3).prop_map(|stripes| Sources {
        unit_bytes: 1 << 20,
        stripes: stripes
            .into_iter()
            .map(|(active, fallbacks)| StripePaths {
                active,
                fallbacks,
                policy: PathPolicy::RoundRobin,
            })
            .collect(),
    })
}

prop_compose! {
    fn any_wanted()(
        bases in prop::collection::btree_map(
            0u8..4,
            (any_sources(), any_access(), 0u8..4),
            0..4,
        ),
        disks in prop::collection::btree_map(0u8..6, 0u8..4, 0..5),
        doomed in prop::collection::btree_set(0u8..6, 0..3),
        kept in prop::collection::btree_set(0u8..4, 0..2),
        doomed_stores in prop::collection::btree_set(0u8..4, 0..2),
        device in any::<bool>(),
        limited in any::<bool>(),
    ) -> Wanted {
        let bases: BTreeMap<_, _> = bases
            .into_iter()
            .map(|(n, (sources, access, shape))| {
                let backing = match shape {
                    0 => Backing::Store,
                    1 => Backing::Adopted,
                    _ => Backing::Cache,
                };
                let sources = if backing == Backing::Store { Sources::default() } else { sources };
                let base = WantedBase {
                    content: content(n),
                    backing,
                    sources,
                    exports: BTreeMap::from([(image(n), access)]),
                };
                (digest(n), base)
            })
            .collect();
        let disks: BTreeMap<_, _> = disks
            .into_iter()
            .map(|(n, base)| (vm(n), WantedDisk { digest: digest(base), bytes: 1 << 20 }))
            .collect();
        // Every second wish has limits.
        let limits = disks.keys().filter(|_| limited).map(|vm| (vm.clone(), 1 << 20));
        Wanted {
            limits: limits.collect(),
            devices: disks.keys().filter(|_| device).cloned().collect(),
            standing: BTreeSet::new(),
            resting_disks: BTreeSet::new(),
            doomed_disks: doomed.into_iter().map(vm).filter(|vm| !disks.contains_key(vm)).collect(),
            doomed_stores: doomed_stores.into_iter().map(digest).filter(|d| !bases.contains_key(d)).collect(),
            kept_caches: kept.into_iter().map(digest).collect(),
            bases,
            disks,
        }
    }
}

/// A world in which the store holds everything that could be asked of it.
fn stocked() -> World {
    let mut world = World::default();
    world.found.stores = (0..4).map(digest).collect();
    world
}

fn run(world: &mut World, wanted: &Wanted) -> Plan {
    let plan = plan(wanted, &world.found);
    for step in &plan.steps {
        world.apply(step).unwrap();
    }
    plan
}

/// The world is what was wanted, but for what the plan named as obstacles.
fn check_reached(world: &World, wanted: &Wanted, obstacles: &[Obstacle]) {
    let found = &world.found;
    let lost: BTreeSet<_> = obstacles
        .iter()
        .filter_map(|o| match o {
            Obstacle::StoreMissing { digest } => Some(*digest),
            _ => None,
        })
        .collect();
    for (digest, base) in wanted.bases.iter().filter(|(d, _)| !lost.contains(d)) {
        let open = found.bases.get(digest).expect("open");
        assert_eq!((open.content, open.backing), (base.content, base.backing));
        let paths = found.paths.get(digest).cloned().unwrap_or_default();
        assert_eq!(paths.stripes, base.sources.stripes);
        for (image, access) in &base.exports {
            assert_eq!(
                found.exports.get(image),
                Some(&FoundExport {
                    digest: *digest,
                    access: access.clone()
                })
            );
        }
    }
    assert!(
        found.bases.keys().all(|d| wanted.bases.contains_key(d)),
        "no other base"
    );
    assert!(
        found.paths.keys().all(|d| wanted.bases.contains_key(d)),
        "no other paths"
    );
    let stuck: BTreeSet<_> = obstacles
        .iter()
        .filter_map(|o| match o {
            Obstacle::DeltaDamaged { vm, .. }
            | Obstacle::DeltaOfOther { vm, .. }
            | Obstacle::NoBase { vm, .. } => Some(vm.clone()),
            Obstacle::StoreMissing { .. } => None,
        })
        .collect();
    for (vm, disk) in wanted.disks.iter().filter(|(vm, _)| !stuck.contains(*vm)) {
        assert_eq!(found.disks.get(vm), Some(&disk.digest));
        assert_eq!(found.deltas.get(vm), Some(&FoundDelta::Sound(*disk)));
    }
    assert!(
        found.disks.keys().all(|vm| wanted.disks.contains_key(vm)),
        "no other disk"
    );
    assert!(
        wanted
            .doomed_disks
            .iter()
            .all(|vm| !found.deltas.contains_key(vm))
    );
    assert!(wanted.doomed_stores.iter().all(|d| !found.stores.contains(d)));
    assert!(found.leftovers.is_empty());
}

proptest! {
    #[test]
    fn from_any_state_the_plan_reaches_what_is_wanted_and_then_there_is_nothing_to_do(
        first in any_wanted(),
        second in any_wanted(),
    ) {
        let mut world = stocked();
        run(&mut world, &first);
        world.found.leftovers.insert("half-made".into());
        let done = run(&mut world, &second);
        check_reached(&world, &second, &done.obstacles);
        let again = plan(&second, &world.found);
        prop_assert_eq!(again.steps, vec![]);
        prop_assert_eq!(again.obstacles, done.obstacles);
    }

    #[test]
    fn a_crash_behind_any_step_leaves_a_state_from_which_the_plan_goes_on(
        first in any_wanted(),
        second in any_wanted(),
        crash_at in 0usize..40,
        reboot: bool,
    ) {
        let mut world = stocked();
        run(&mut world, &first);
        let steps = plan(&second, &world.found).steps;
        for step in steps.iter().take(crash_at) {
            world.apply(step).unwrap();
        }
        if reboot {
            // What lived in the process is gone; what lies on the disk is not.
            let kept = &world.found;
            world.found = Found {
                caches: kept.caches.clone(),
                stores: kept.stores.clone(),
                deltas: kept.deltas.clone(),
                ..Found::default()
            };
        }
        let done = run(&mut world, &second);
        check_reached(&world, &second, &done.obstacles);
    }

    #[test]
    fn what_is_nobodys_to_touch_is_not_touched(first in any_wanted(), second in any_wanted()) {
        let mut world = stocked();
        run(&mut world, &first);
        let strange = VmName::new("strange").unwrap();
        let delta = FoundDelta::Sound(WantedDisk { digest: digest(9), bytes: 4096 });
        world.found.deltas.insert(strange.clone(), delta.clone());
        world.found.stores.insert(digest(9));
        let before = world.found.deltas.clone();
        run(&mut world, &second);
        prop_assert!(world.found.stores.contains(&digest(9)));
        for (vm, delta) in before {
            if !second.doomed_disks.contains(&vm) {
                prop_assert_eq!(world.found.deltas.get(&vm), Some(&delta));
            }
        }
    }

    #[test]
    fn removals_come_before_what_is_built_and_top_down(first in any_wanted(), second in any_wanted()) {
        let mut world = stocked();
        run(&mut world, &first);
        let rank = |step: &Step| match step {
            Step::Sweep { .. } => 0,
            Step::DetachDevice { .. } => 0,
            Step::StopDisk { .. } => 1,
            Step::DeleteDelta { .. } => 2,
            Step::Unexport { .. } => 3,
            Step::CloseBase { .. } => 4,
            Step::DropPaths { .. } => 5,
            Step::DropCache { .. } | Step::DropStore { .. } => 6,
            Step::SetPaths { .. } | Step::OpenBase { .. } | Step::Export { .. } | Step::SetAccess { .. } => 7,
            Step::CreateDelta { .. }
            | Step::LimitDisk { .. }
            | Step::ServeDisk { .. }
            | Step::AttachDevice { .. } => 8,
            Step::Layers { .. } => unreachable!("layers are changed by a verb, never by a plan"),
        };
        let ranks: Vec<_> = plan(&second, &world.found).steps.iter().map(rank).collect();
        prop_assert!(ranks.is_sorted(), "{ranks:?}");
    }

    #[test]
    fn a_new_parent_is_taken_only_after_children_of_the_old_place_are_gone(
        sources in any_sources(), other in any_sources(), old in any_access(), new in any_access(),
    ) {
        let base = |sources: &Sources, access: &Access| Wanted {
            bases: BTreeMap::from([(digest(0), WantedBase {
                content: content(0),
                backing: Backing::Cache,
                sources: sources.clone(),
                exports: BTreeMap::from([(image(0), access.clone())]),
            })]),
            ..Wanted::default()
        };
        let mut world = World::default();
        run(&mut world, &base(&sources, &old));
        for step in plan(&base(&other, &new), &world.found).steps {
            if matches!(step, Step::SetPaths { .. }) {
                let now = &world.found.exports[&image(0)].access;
                prop_assert_eq!(&now.narrowed_to(&new), now, "nobody who may not stay is left");
            }
            world.apply(&step).unwrap();
        }
    }
}

#[test]
fn a_delta_of_another_image_is_named_and_left_alone() {
    let mut world = World::default();
    let disk = |n| WantedDisk {
        digest: digest(n),
        bytes: 1 << 20,
    };
    world.found.deltas.insert(vm(1), FoundDelta::Sound(disk(1)));
    world
        .found
        .deltas
        .insert(vm(2), FoundDelta::Damaged("bad checksum in the head".into()));
    let wanted = Wanted {
        bases: BTreeMap::from([(
            digest(0),
            WantedBase {
                content: content(0),
                backing: Backing::Cache,
                sources: Sources {
                    unit_bytes: 1 << 20,
                    stripes: vec![StripePaths::default()],
                },
                exports: BTreeMap::new(),
            },
        )]),
        disks: BTreeMap::from([(vm(1), disk(0)), (vm(2), disk(0)), (vm(3), disk(3))]),
        ..Wanted::default()
    };
    let before = world.found.deltas.clone();
    let done = run(&mut world, &wanted);
    assert_eq!(world.found.deltas, before);
    assert!(matches!(
        done.obstacles[..],
        [
            Obstacle::DeltaOfOther { .. },
            Obstacle::DeltaDamaged { .. },
            Obstacle::NoBase { .. }
        ]
    ));
    assert!(done.obstacles[0].to_string().contains("vm-1"));
}
