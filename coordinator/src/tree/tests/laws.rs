//! Random histories: after each event every law holds, seen from inside and from the hosts.

use std::collections::BTreeMap;

use proptest::prelude::*;

use treeboot_types::{Fault, Placement};

use super::super::bar::paths_of;
use super::world::{World, host, image_id, image_ref};
use crate::tree::{Event, Key, Note, Record};

const HOSTS: usize = 24;

/// A second or two; PROPTEST_CASES asks for more. A failure prints the shortest history that shows it, which then
/// becomes a test with a name, so no file of seeds is kept.
pub(super) fn config() -> ProptestConfig {
    let mut config = ProptestConfig::default();
    if std::env::var_os("PROPTEST_CASES").is_none() {
        config.cases = 192;
    }
    config.failure_persistence = None;
    config
}

#[derive(Debug, Clone, Copy)]
enum Op {
    Join(usize),
    Register(usize),
    Remove(usize),
    Leave(usize),
    Disconnect(usize),
    Connect(usize),
    Beat(usize),
    Report(usize),
    /// Everybody who is connected beats while this many beats pass.
    Pass(u64),
    Restart,
}

fn op() -> impl Strategy<Value = Op> {
    let host = 0..HOSTS;
    prop_oneof![
        8 => host.clone().prop_map(Op::Join),
        3 => host.clone().prop_map(Op::Register),
        2 => host.clone().prop_map(Op::Remove),
        2 => host.clone().prop_map(Op::Leave),
        2 => host.clone().prop_map(Op::Disconnect),
        3 => host.clone().prop_map(Op::Connect),
        2 => host.clone().prop_map(Op::Beat),
        2 => host.prop_map(Op::Report),
        2 => (1u64..12).prop_map(Op::Pass),
        1 => Just(Op::Restart),
    ]
}

fn apply(world: &mut World, op: Op) {
    let known = |world: &World, number| world.agents.contains_key(&host(number));
    match op {
        Op::Join(n) => {
            if !known(world, n) {
                world.come(&host(n));
            } else if world.agents[&host(n)].stream.is_none() {
                world.connect(&host(n));
            }
            world.join(&host(n)).unwrap();
        }
        Op::Register(n) if known(world, n) => drop(world.register(&host(n))),
        Op::Remove(n) if known(world, n) => drop(world.remove(&host(n))),
        Op::Leave(n) if known(world, n) => drop(world.leave(&host(n))),
        Op::Disconnect(n) if known(world, n) => world.disconnect(&host(n)),
        Op::Connect(n) if known(world, n) => world.connect(&host(n)),
        Op::Beat(n) if known(world, n) => world.beat(&host(n)),
        Op::Report(n) if known(world, n) => {
            let tree = world.forest.tree(&image_ref()).unwrap();
            let me = tree
                .vertices
                .iter()
                .find(|v| v.host.as_ref().is_some_and(|h| h.as_str() == host(n)));
            let parent = me
                .and_then(|v| v.parents.first())
                .filter(|p| known_name(world, p));
            if let Some(parent) = parent {
                let parent = parent.clone();
                world.report(&host(n), &parent, Fault::WrongBytes);
            }
        }
        Op::Pass(beats) => {
            let connected: Vec<String> = world
                .agents
                .iter()
                .filter(|(_, a)| a.stream.is_some())
                .map(|(h, _)| h.clone())
                .collect();
            let connected: Vec<&str> = connected.iter().map(String::as_str).collect();
            world.pass(beats * super::world::BEAT_MS, &connected);
        }
        Op::Restart => world.restart(),
        _ => {}
    }
}

fn known_name(world: &World, name: &str) -> bool {
    world.agents.contains_key(name)
}

/// What the record must say, told from the trees alone.
fn check_record(world: &World) -> Result<(), String> {
    let tree = world.forest.tree(&image_ref()).map_err(|e| e.to_string())?;
    let in_tree: std::collections::BTreeSet<_> = tree
        .vertices
        .iter()
        .filter(|v| !v.origin)
        .filter_map(|v| v.host.clone())
        .collect();
    let recorded = world
        .record
        .keys()
        .filter(|k| matches!(k, Key::Attachment(..)))
        .count();
    if recorded != in_tree.len() {
        return Err(format!(
            "{recorded} places in the record, {} in the tree",
            in_tree.len()
        ));
    }
    match world.record.get(&Key::Epoch) {
        Some(Record::Epoch(epoch)) if *epoch == world.forest.epoch() => Ok(()),
        other => Err(format!(
            "the record has {other:?}, the trees {}",
            world.forest.epoch()
        )),
    }
}

fn check(world: &World) -> Result<(), String> {
    world.forest.audit()?;
    // A host that comes back after its lease keeps its old place even where that is deep: nobody moves for it, and the
    // next departure puts it right.
    let adopted = |note: &Note| matches!(note, Note::Attached { adopted: true, .. });
    if !world.notes.iter().any(adopted) {
        world.forest.audit_depth()?;
    }
    world.check_told()?;
    check_record(world)
}

/// What the agents act on that hear all that they are told.
fn heard(world: &World) -> BTreeMap<String, Placement> {
    let connected = world.agents.iter().filter(|(_, agent)| agent.stream.is_some());
    let placed = connected
        .filter_map(|(host, agent)| Some((host.clone(), agent.placements.get(&image_id())?.clone())));
    placed.collect()
}

/// Who acts on a place of old and lets a host in by it is no new parent of that host, in the same stripe neither: it may stand below it.
fn check_new_parents(before: &BTreeMap<String, Placement>, world: &World) -> Result<(), String> {
    for (host, after) in heard(world) {
        let Some(before) = before.get(&host) else { continue };
        for (stripe, parent) in paths_of(&after.stripes).difference(&paths_of(&before.stripes)) {
            let told = world.forest.placement(&image_id(), parent).map(|told| told.epoch);
            let agent = world.agents.get(parent.as_str());
            if let Some(acts) = agent.and_then(|agent| agent.placements.get(&image_id()))
                && told.is_some_and(|told| acts.epoch < told)
                && acts.children.iter().any(|child| child.host.as_str() == host)
            {
                return Err(format!(
                    "{host} is told of {parent} in {stripe}, which acts on {} still and lets it in",
                    acts.epoch
                ));
            }
        }
    }
    Ok(())
}

/// Nobody reads from itself, over what hosts hold: those that are cut off act on places of old, and let in whom those gave them.
fn check_cycles(world: &World) -> Result<(), String> {
    let placement = |host: &str| world.agents.get(host)?.placements.get(&image_id());
    let lets_in = |parent: &str, child: &str| {
        placement(parent).is_some_and(|p| p.children.iter().any(|c| c.host.as_str() == child))
    };
    let parents = |host: &str, stripe: u16| -> Vec<String> {
        let told = placement(host).and_then(|p| p.stripes.iter().find(|s| s.stripe.0 == stripe));
        let paths = told.iter().flat_map(|s| s.active.iter().chain(&s.fallbacks));
        let hosts = paths.filter_map(|path| path.host.as_ref().map(ToString::to_string));
        hosts.filter(|parent| lets_in(parent, host)).collect()
    };
    for stripe in 0..world.forest.image(&image_ref()).map_or(1, |image| image.stripes) {
        for from in world.agents.keys() {
            let mut seen = std::collections::BTreeSet::new();
            let mut waiting = parents(from, stripe);
            while let Some(host) = waiting.pop() {
                if host == *from {
                    return Err(format!("{from} reads stripe {stripe} from itself: {seen:?}"));
                }
                if seen.insert(host.clone()) {
                    waiting.extend(parents(&host, stripe));
                }
            }
        }
    }
    Ok(())
}

/// After each step in racks every law holds; hosts come to stand by their numbers.
fn check_in_racks(world: &mut World, racks: usize, zones: usize, ops: &[Op]) -> Result<(), String> {
    for (at, op) in ops.iter().enumerate() {
        let told = |why| format!("after step {at} {op:?}: {why}");
        if let Op::Join(n) = op
            && !world.agents.contains_key(&host(*n))
        {
            super::racks::come_in(world, *n, racks, zones);
        }
        apply(world, *op);
        world.forest.audit().map_err(told)?;
        world.hear_all();
        check(world).map_err(told)?;
    }
    Ok(())
}

/// Found by random histories: a host got another parent, of which it was not told yet, and the record kept the one before.
#[test]
fn a_restart_knows_the_parents_of_hosts_that_are_not_told_of_them_yet() {
    let mut world = World::striped(2, 1);
    let ops = [
        Op::Join(12),
        Op::Join(0),
        Op::Pass(5),
        Op::Join(16),
        Op::Join(1),
        Op::Join(0),
        Op::Join(12),
    ];
    for op in ops {
        if let Op::Join(n) = op
            && !world.agents.contains_key(&host(n))
        {
            super::racks::come_in(&mut world, n, 3, 0);
        }
        apply(&mut world, op);
    }
    world.restart();
    world.forest.audit().unwrap();
}

#[test]
fn twelve_in_a_rack_stand_three_deep_after_a_restart_that_few_came_back_from() {
    let mut ops: Vec<Op> = [0, 0, 0, 2, 7].map(Op::Join).into();
    ops.push(Op::Disconnect(0));
    ops.extend([3, 8, 5, 9, 0].map(Op::Join));
    ops.push(Op::Restart);
    ops.extend([10, 4, 1, 6, 11].map(Op::Join));
    let mut world = World::striped(3, 1);
    check_in_racks(&mut world, 1, 0, &ops).unwrap();
}

/// No host has children in two stripes, nor more than there are stripes.
fn check_homes(world: &World, stripes: u16, active_parents: u32) -> Result<(), String> {
    for host in world.agents.keys() {
        let (homes, children) = world.feeds(host);
        if homes.len() > 1 || children > usize::from(stripes) * active_parents as usize {
            return Err(format!("{host} feeds {children} hosts in the stripes {homes:?}"));
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn every_law_holds_after_every_event(
        fan_out in 1u32..4,
        active_parents in 1u32..4,
        ops in proptest::collection::vec(op(), 1..80),
    ) {
        let mut world = World::new(fan_out, active_parents);
        for (at, op) in ops.iter().enumerate() {
            apply(&mut world, *op);
            if let Err(why) = check(&world) {
                return Err(TestCaseError::fail(format!("after step {at} {op:?}: {why}")));
            }
        }
    }

    #[test]
    fn every_law_holds_of_stripes_after_every_event(
        stripes in 2u16..4,
        active_parents in 1u32..3,
        whole in 0..HOSTS,
        ops in proptest::collection::vec(op(), 1..80),
    ) {
        let mut world = World::striped(stripes, active_parents);
        for (at, op) in ops.iter().enumerate() {
            // Some hosts cannot read stripes apart.
            if let Op::Join(n) = op && n % 6 == whole % 6 && !world.agents.contains_key(&host(*n)) {
                world.come(&host(*n));
                world.agents.get_mut(&host(*n)).unwrap().max_stripes = 1;
                world.beat(&host(*n));
            }
            apply(&mut world, *op);
            world.forest.audit().map_err(TestCaseError::fail)?;
            world.hear_all();
            let checked = check(&world).and_then(|()| check_homes(&world, stripes, active_parents));
            if let Err(why) = checked {
                return Err(TestCaseError::fail(format!("after step {at} {op:?}: {why}")));
            }
        }
    }

    /// Whoever is cut off acts on a place of old, also when the coordinator starts again.
    #[test]
    fn nobody_reads_from_itself_nor_from_one_of_old_whoever_is_cut_off(
        stripes in 2u16..4,
        active_parents in 1u32..3,
        ops in proptest::collection::vec(op(), 1..120),
    ) {
        let mut world = World::striped(stripes, active_parents);
        for (at, op) in ops.iter().enumerate() {
            let before = heard(&world);
            apply(&mut world, *op);
            let checked = check_cycles(&world).and_then(|()| check_new_parents(&before, &world));
            if let Err(why) = checked {
                return Err(TestCaseError::fail(format!("after step {at} {op:?}: {why}")));
            }
        }
    }

    #[test]
    fn every_law_holds_in_racks_after_every_event(
        stripes in 1u16..4,
        fan_out in 1u32..4,
        active_parents in 1u32..3,
        racks in 1usize..7,
        zones in 0usize..3,
        ops in proptest::collection::vec(op(), 1..80),
    ) {
        let mut world = match stripes {
            1 => World::new(fan_out, active_parents),
            stripes => World::striped(stripes, active_parents),
        };
        check_in_racks(&mut world, racks, zones, &ops).map_err(TestCaseError::fail)?;
    }

    /// Hosts that cannot read stripes apart, and hosts of weight 2, in racks: whoever comes finds a place.
    #[test]
    fn everybody_finds_a_place_in_racks_of_unequal_hosts(
        stripes in 2u16..4,
        active_parents in 1u32..3,
        racks in 1usize..7,
        zones in 0usize..3,
        odd in proptest::collection::vec((0usize..4, 0usize..4), HOSTS),
        ops in proptest::collection::vec(op(), 1..60),
    ) {
        let mut world = World::striped(stripes, active_parents);
        for (at, op) in ops.iter().enumerate() {
            if let Op::Join(n) = op && !world.agents.contains_key(&host(*n)) {
                super::racks::come_in(&mut world, *n, racks, zones);
                let agent = world.agents.get_mut(&host(*n)).unwrap();
                agent.max_stripes = if odd[*n].0 == 0 { 1 } else { 8 };
                agent.weight = if odd[*n].1 == 0 { 2 } else { 1 };
                world.beat(&host(*n));
            }
            if let Op::Join(n) = op && world.agents[&host(*n)].stream.is_some()
                && let Err(refusal) = world.join(&host(*n))
            {
                return Err(TestCaseError::fail(format!("after step {at} {op:?}: {refusal}")));
            }
            apply(&mut world, *op);
            world.forest.audit().map_err(TestCaseError::fail)?;
        }
    }

    #[test]
    fn a_restart_gives_exactly_the_tree_of_racks(
        ops in proptest::collection::vec(op(), 1..60),
        racks in 1usize..7,
        zones in 0usize..3,
    ) {
        let mut world = World::striped(2, 1);
        for op in &ops {
            if let Op::Join(n) = op && !world.agents.contains_key(&host(*n)) {
                super::racks::come_in(&mut world, *n, racks, zones);
            }
            apply(&mut world, *op);
        }
        let before = world.forest.tree(&image_ref()).unwrap();
        world.restart();
        let edges = |tree: crate::tree::TreeView| -> Vec<_> {
            let vertices = tree.vertices.into_iter();
            vertices.map(|v| (v.stripe, v.host, v.depth, v.parents)).collect()
        };
        prop_assert_eq!(edges(before), edges(world.forest.tree(&image_ref()).unwrap()));
        prop_assert_eq!(world.forest.audit(), Ok(()));
    }

    #[test]
    fn a_restart_gives_exactly_the_tree(ops in proptest::collection::vec(op(), 1..60), active_parents in 1u32..3) {
        let mut world = World::new(2, active_parents);
        for op in &ops {
            apply(&mut world, *op);
        }
        let shape = |world: &World| {
            let tree = world.forest.tree(&image_ref()).unwrap();
            let vertices = tree.vertices.into_iter();
            let vertices: Vec<_> = vertices
                .map(|v| (v.host, v.portal, v.depth, v.state, v.parents, v.children))
                .collect();
            (tree.epoch, vertices)
        };
        let before = shape(&world);
        world.restart();
        prop_assert_eq!(&before, &shape(&world));
        // Those who come back are told nothing new.
        let pushed = |world: &World| world.agents.values().map(|a| a.pushed).sum::<usize>();
        let told = pushed(&world);
        let attached: Vec<String> = before.1.iter().filter_map(|v| v.0.as_ref().map(ToString::to_string)).collect();
        for host in attached {
            if world.agents[&host].placements.contains_key(&image_id()) {
                world.connect(&host);
            }
        }
        prop_assert_eq!(before.1, shape(&world).1);
        prop_assert!(pushed(&world) - told <= ops.len());
    }

    #[test]
    fn an_equal_event_changes_nothing(ops in proptest::collection::vec(op(), 1..40), again in 0..HOSTS) {
        let mut world = World::new(2, 1);
        for op in &ops {
            apply(&mut world, *op);
        }
        apply(&mut world, Op::Join(again));
        world.beat(&host(again));
        let (epoch, record) = (world.forest.epoch(), world.record.clone());
        let first = world.join(&host(again)).unwrap();
        world.beat(&host(again));
        let second = world.join(&host(again)).unwrap();
        world.step(Event::Clock);
        prop_assert_eq!(first, second);
        prop_assert_eq!(epoch, world.forest.epoch());
        prop_assert_eq!(record, world.record);
    }
}
