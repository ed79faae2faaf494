//! A record that is lost comes back from the hosts, and nobody moves.

use proptest::prelude::*;

use super::racks::come_in;
use super::world::{BEAT_MS, LEASE_MS, World, host, image_ref, name};
use crate::tree::{Event, Note};

type Edges = Vec<(u16, Option<String>, Vec<String>)>;

fn edges(world: &World) -> Edges {
    let tree = world.forest.tree(&image_ref()).unwrap();
    let vertices = tree.vertices.into_iter().filter(|v| !v.origin);
    let mut edges: Edges = vertices
        .map(|v| (v.stripe.0, v.host.map(|h| h.to_string()), v.parents))
        .collect();
    edges.sort();
    edges
}

/// The same hosts before a coordinator that knows nothing; `with_image` its image is there again.
fn lost(world: &World, stripes: u16, with_image: bool) -> World {
    let mut lost = match (stripes, with_image) {
        (1, true) => World::new(2, 1),
        (_, true) => World::striped(stripes, 1),
        (_, false) => World::empty(world.forest.settings().clone()),
    };
    lost.agents = world.agents.clone();
    lost.agents.values_mut().for_each(|agent| agent.stream = None);
    lost
}

fn pass_window(world: &mut World) {
    let hosts: Vec<String> = world.agents.keys().cloned().collect();
    let hosts: Vec<&str> = hosts.iter().map(String::as_str).collect();
    world.pass(LEASE_MS + BEAT_MS, &hosts);
}

proptest! {
    #![proptest_config(super::laws::config())]

    #[test]
    fn hosts_that_come_back_in_any_order_keep_their_places(
        // With three, a slot that was lent (decision 0026) is not known to be one.
        stripes in 1u16..3,
        count in 1usize..30,
        racks in 1usize..6,
        gone in 0usize..30,
        order in Just((0..30usize).collect::<Vec<_>>()).prop_shuffle(),
    ) {
        let mut world = if stripes == 1 { World::new(2, 1) } else { World::striped(stripes, 1) };
        for n in 0..count {
            come_in(&mut world, n, racks, 0);
            world.join(&host(n)).unwrap();
            world.register(&host(n)).unwrap();
        }
        if gone < count {
            world.leave(&host(gone)).unwrap();
            world.agents.remove(&host(gone));
        }
        // What hosts act on is what can be learned from them.
        world.hear_all();
        let before = edges(&world);
        let mut lost = lost(&world, stripes, true);
        for n in order {
            if lost.agents.contains_key(&host(n)) {
                lost.connect(&host(n));
            }
        }
        pass_window(&mut lost);
        prop_assert_eq!(before, edges(&lost));
        prop_assert_eq!(lost.forest.audit(), Ok(()));
        prop_assert_eq!(lost.check_told(), Ok(()));
        if !lost.agents.is_empty() {
            prop_assert!(lost.forest.epoch() > world.forest.epoch());
            prop_assert_eq!(lost.forest.epoch().incarnation, 2);
        }
    }
}

#[test]
fn nobody_is_given_a_place_while_the_window_is_open_and_who_asked_gets_one_when_it_closes() {
    let mut world = World::new(2, 1);
    (0..6).for_each(|n| world.grow(&host(n)));
    let mut lost = lost(&world, 1, true);
    lost.connect("h5");
    assert!(lost.forest.is_rebuilding());
    assert!(edges(&lost).is_empty());
    let call = crate::tree::CallId(99);
    let join = crate::tree::Call::Join {
        speaker: lost.agents["h5"].speaker("h5"),
        image: image_ref(),
        endpoint: super::world::endpoint(&lost.agents["h5"].portal),
    };
    assert!(lost.step(Event::Call(call, Box::new(join))).is_none());
    (0..5).for_each(|n| lost.connect(&host(n)));
    lost.pass(LEASE_MS / 2, &["h0", "h1", "h2", "h3", "h4", "h5"]);
    assert!(lost.forest.is_rebuilding());
    pass_window(&mut lost);
    assert!(!lost.forest.is_rebuilding());
    assert_eq!(edges(&world), edges(&lost));
    lost.grow("new");
    lost.forest.audit().unwrap();
}

#[test]
fn an_image_whose_record_is_lost_comes_back_with_its_origin_and_its_hosts_stay() {
    let mut world = World::striped(2, 1);
    (0..9).for_each(|n| world.grow(&host(n)));
    for origin_comes_late in [false, true] {
        let mut lost = lost(&world, 2, false);
        let image = super::world::image(vec![super::world::foreign("10.9.9.9:3260")]);
        (0..9).rev().for_each(|n| lost.connect(&host(n)));
        assert!(lost.forest.is_rebuilding());
        if origin_comes_late {
            pass_window(&mut lost);
        }
        lost.add_image(image).unwrap();
        pass_window(&mut lost);
        assert_eq!(edges(&world), edges(&lost));
        assert!(lost.agents.values().all(|agent| agent.detached.is_empty()));
        lost.forest.audit().unwrap();
        lost.check_told().unwrap();
    }
}

#[test]
fn who_says_what_cannot_be_is_placed_anew_and_the_others_stay() {
    let mut world = World::new(2, 1);
    (0..14).for_each(|n| world.grow(&host(n)));
    let before = edges(&world);
    let mut lost = lost(&world, 1, true);
    // A circle, a parent that never comes, and somebody else's export.
    let of = |world: &World, host: &str| world.agents[host].placements.clone();
    let (a, b) = (of(&lost, "h12"), of(&lost, "h13"));
    lost.agents.get_mut("h12").unwrap().placements = b;
    lost.agents.get_mut("h13").unwrap().placements = a;
    lost.agents.get_mut("h11").unwrap().portal = lost.agents["h10"].portal.clone();
    lost.agents.remove("h0");
    let hosts: Vec<String> = lost.agents.keys().cloned().collect();
    hosts.iter().for_each(|host| lost.connect(host));
    pass_window(&mut lost);
    lost.forest.audit().unwrap();
    let after = edges(&lost);
    let kept = after.iter().filter(|edge| before.contains(edge)).count();
    assert!(kept >= 8, "{kept} of {}: {after:?}", before.len());
    assert!(lost.notes.iter().any(|n| matches!(n, Note::StateLost { .. })));
    assert_eq!(lost.forest.list_hosts().len(), 13);
    assert!(lost.forest.search(&image_ref(), Some(&name("h1")), 4).is_ok());
}

#[test]
fn a_part_of_the_record_that_is_lost_comes_back_too() {
    let mut world = World::striped(2, 1);
    (0..8).for_each(|n| world.grow(&host(n)));
    // A backup from before the last hosts came.
    let backup = world.record.clone();
    (8..20).for_each(|n| world.grow(&host(n)));
    world.leave("h3").unwrap();
    let before = edges(&world);
    world.record = backup;
    world.restart();
    let hosts: Vec<String> = world.agents.keys().filter(|h| *h != "h3").cloned().collect();
    hosts.iter().for_each(|host| world.connect(host));
    let beating: Vec<&str> = hosts.iter().map(String::as_str).collect();
    world.pass(2 * LEASE_MS, &beating);
    let moved = edges(&world).iter().filter(|edge| !before.contains(edge)).count();
    assert!(moved <= 6, "{moved} edges: only about the host that is gone");
    world.forest.audit().unwrap();
}
