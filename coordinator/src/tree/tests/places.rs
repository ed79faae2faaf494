//! Where hosts are put, and who moves when one goes.

use treeboot_types::Fault;

use super::world::{
    BEAT_MS, LEASE_MS, PENDING_MS, World, endpoint, host, image, image_id, image_ref, labels, name,
};
use crate::tree::{Answer, Call, Note, Refusal};

/// A small generator with a seed, so that a failure repeats.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        usize::try_from(self.0 >> 33).unwrap() % sides
    }
}

fn grown(hosts: usize) -> World {
    let mut world = World::new(2, 1);
    (0..hosts).for_each(|n| world.grow(&host(n)));
    world
}

/// Moves: edges to a parent that were not there before.
fn edges(world: &World) -> std::collections::BTreeSet<(String, String)> {
    let tree = world.forest.tree(&image_ref()).unwrap();
    let of = |v: crate::tree::VertexView| {
        let child = v.host.map(|h| h.to_string()).unwrap_or_default();
        v.parents.into_iter().map(move |p| (child.clone(), p))
    };
    tree.vertices.into_iter().flat_map(of).collect()
}

#[test]
fn a_new_host_goes_to_the_free_slot_nearest_the_root() {
    let world = grown(14);
    let depths: Vec<u32> = (0..14).map(|n| world.depth(&host(n))).collect();
    assert_eq!(depths, [1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3]);
}

#[test]
fn a_cold_burst_is_admitted_at_once_under_parents_that_are_pending() {
    let mut world = World::new(2, 1);
    for n in 0..1_000 {
        world.come(&host(n));
    }
    for n in 0..1_000 {
        world.join(&host(n)).unwrap();
    }
    assert_eq!(world.forest.tree(&image_ref()).unwrap().vertices.len(), 1_001);
    assert_eq!(world.deepest(), 9, "2 + 4 + ... + 512 = 1022 places");
    world.forest.audit().unwrap();
    world.check_told().unwrap();
}

#[test]
fn leave_terminates_when_both_children_are_pending() {
    let mut world = World::new(2, 1);
    world.grow("a");
    world.grow("b");
    for child in ["c", "d", "e", "f"] {
        world.come(child);
        world.join(child).unwrap();
    }
    world.leave("a").unwrap();
    world.check_told().unwrap();
    assert_eq!(world.attached().len(), 5);
    assert!(world.deepest() <= 3);
}

#[test]
fn a_failed_deploy_frees_its_pending_slot() {
    let mut world = World::new(2, 1);
    world.come("a");
    world.join("a").unwrap();
    // Its deploy fails and forgets the attachment; the agent itself lives on.
    world.agents.get_mut("a").unwrap().states.clear();
    world.beat("a");
    world.pass(PENDING_MS, &["a"]);
    assert_eq!(world.forest.tree(&image_ref()).unwrap().vertices.len(), 1);
    assert_eq!(world.agents["a"].detached.len(), 1, "and it is told so");
    assert!(!world.agents["a"].detached[0].1.drop_cache, "it may come back");
    assert!(world.notes.iter().any(|n| matches!(n, Note::LeaseEnded { .. })));
    assert_eq!(world.join("a").unwrap().stripes[0].depth, 1);
}

#[test]
fn a_pending_slot_lasts_while_its_host_speaks_of_it() {
    let mut world = World::new(2, 1);
    world.come("a");
    world.join("a").unwrap();
    world.beat("a");
    world.pass(10 * PENDING_MS, &["a"]);
    assert_eq!(world.forest.tree(&image_ref()).unwrap().vertices.len(), 2);
}

#[test]
fn depth_does_not_drift_over_300_leaves_and_joins_of_100_hosts() {
    let mut world = grown(100);
    assert_eq!(world.deepest(), 6);
    let mut dice = Dice(1);
    for turn in 0..300 {
        let leaver = host(dice.roll(100));
        world.leave(&leaver).unwrap();
        world
            .forest
            .audit_depth()
            .unwrap_or_else(|why| panic!("turn {turn}: {why}"));
        world.connect(&leaver);
        world.join(&leaver).unwrap();
        world.register(&leaver).unwrap();
        assert!(world.deepest() <= 7, "turn {turn}");
    }
    world.forest.audit().unwrap();
    world.check_told().unwrap();
}

#[test]
fn a_departure_moves_no_more_than_the_children_and_one_leaf() {
    let mut world = grown(60);
    let mut dice = Dice(7);
    for _ in 0..40 {
        let tree = world.forest.tree(&image_ref()).unwrap();
        let leaver = host(dice.roll(60));
        let children = tree
            .vertices
            .iter()
            .find(|v| v.host.as_ref() == Some(&name(&leaver)))
            .map_or(0, |v| v.children as usize);
        let before = edges(&world);
        world.leave(&leaver).unwrap();
        let moved = edges(&world).difference(&before).count();
        assert!(
            moved <= children + 1,
            "{leaver} had {children} children, {moved} moved"
        );
        world.connect(&leaver);
        world.join(&leaver).unwrap();
        world.register(&leaver).unwrap();
    }
}

#[test]
fn hosts_that_die_together_are_replaced_by_those_that_live() {
    let mut world = grown(63);
    let alive: Vec<String> = (0..63).filter(|n| n % 3 != 0).map(host).collect();
    let beating: Vec<&str> = alive.iter().map(String::as_str).collect();
    world.pass(LEASE_MS + BEAT_MS, &beating);
    let dead: Vec<String> = (0..63).filter(|n| n % 3 == 0).map(host).collect();
    for host in &dead {
        world.agents.get_mut(host).unwrap().placements.clear();
    }
    assert_eq!(world.attached().len(), alive.len());
    world.forest.audit().unwrap();
    world.forest.audit_depth().unwrap();
    world.check_told().unwrap();
}

#[test]
fn the_placement_that_takes_children_away_is_sent_first_and_parents_before_their_children() {
    let mut world = grown(14);
    // h0 has two children with two children each; a leaf of the deepest level takes its place.
    world.leave("h0").unwrap();
    let order = world.order.clone();
    let at = |host: &str| {
        order
            .iter()
            .position(|h| h == host)
            .unwrap_or_else(|| panic!("{host} in {order:?}"))
    };
    let filler = world
        .attached()
        .into_iter()
        .find(|h| world.depth(h) == 1 && h != "h1")
        .unwrap();
    let old_parent = order.first().unwrap();
    assert_ne!(*old_parent, filler, "who lost the filler hears first");
    for child in world.agents[&filler].placements[&image_id()].children.clone() {
        // Who lost the filler and becomes its child hears first all the same: it must drop it before it reads from it.
        if !child.fallback && child.host.as_str() != old_parent {
            assert!(at(&filler) < at(child.host.as_str()), "{order:?}");
        }
    }
}

#[test]
fn fallbacks_are_the_grandparents_upward_and_then_the_origins() {
    let world = grown(30);
    let deepest = (0..30).map(host).find(|h| world.depth(h) == 4).unwrap();
    let stripe = &world.agents[&deepest].placements[&image_id()].stripes[0];
    let depths: Vec<u32> = stripe.fallbacks.iter().map(|p| p.depth).collect();
    assert_eq!(stripe.active[0].depth, 3);
    assert_eq!(depths, [2, 1, 0]);
    assert!(stripe.fallbacks[2].origin);
}

#[test]
fn several_active_parents_share_a_slot_each_and_keep_the_tree_as_shallow() {
    let mut world = World::new(2, 2);
    (0..62).for_each(|n| world.grow(&host(n)));
    assert_eq!(world.deepest(), 5, "as with one parent");
    let of_two = (0..62).filter(|&n| world.active(&host(n)).len() == 2).count();
    assert_eq!(of_two, 60, "all but those below the only origin have two");
    world.forest.audit().unwrap();
    world.leave("h0").unwrap();
    world.forest.audit().unwrap();
    world.forest.audit_depth().unwrap();
}

#[test]
fn origins_are_nearest_first_by_rack_then_zone_then_order() {
    let mut world = World::empty(super::world::settings(2, 1));
    let origin = |portal: &str, pairs: &[(&str, &str)]| treeboot_types::Origin {
        endpoint: endpoint(portal),
        host: None,
        labels: labels(pairs),
    };
    world
        .add_image(image(vec![
            origin("10.9.9.1:3260", &[("zone", "a"), ("rack", "1")]),
            origin("10.9.9.2:3260", &[("zone", "b"), ("rack", "1")]),
            origin("10.9.9.3:3260", &[("zone", "b"), ("rack", "2")]),
        ]))
        .unwrap();
    world.come_at("near3", "10.0.0.1:3260", &[("zone", "b"), ("rack", "2")]);
    world.come_at("far", "10.0.0.2:3260", &[]);
    let portals = |placement: &treeboot_types::Placement| -> Vec<String> {
        let stripe = &placement.stripes[0];
        let all = stripe.active.iter().chain(&stripe.fallbacks);
        all.map(|p| p.endpoint.portal.to_string()).collect()
    };
    let near = world.join("near3").unwrap();
    // A zone takes an image in as one, from an origin of the zone; falling back each host goes to the nearest.
    assert_eq!(
        portals(&near),
        ["10.9.9.2:3260", "10.9.9.3:3260", "10.9.9.1:3260"]
    );
    assert_eq!(near.image.origins[0].endpoint.portal.as_str(), "10.9.9.3:3260");
    let far = world.join("far").unwrap();
    assert_eq!(portals(&far), ["10.9.9.1:3260", "10.9.9.2:3260", "10.9.9.3:3260"]);
}

#[test]
fn a_child_that_got_wrong_bytes_gets_another_parent_or_the_parent_loses_its_children() {
    let mut world = grown(6);
    // h0 feeds h2 and h4 or the like; both complain.
    let child = (2..6).map(host).find(|h| world.active(h) == ["h0"]).unwrap();
    world.report(&child, "h0", Fault::WrongBytes);
    assert_ne!(world.active(&child), ["h0"]);
    let hosts = world.forest.list_hosts();
    let accused = hosts.iter().find(|h| h.info.name == name("h0")).unwrap();
    assert_eq!(accused.wrong_bytes_reports, 1);
    world.forest.audit().unwrap();
    world.forest.audit_depth().unwrap();
    // An inner host cannot move without its children, so the accused parent makes room instead.
    let mut world = grown(14);
    let child = (2..6).map(host).find(|h| world.active(h) == ["h0"]).unwrap();
    world.report(&child, "h0", Fault::WrongBytes);
    assert_ne!(world.active(&child), ["h0"]);
    assert!(world.depth("h0") > 1);
    world.check_told().unwrap();
}

#[test]
fn only_a_child_can_report_a_parent_and_nobody_is_moved_twice_in_a_lease() {
    let mut world = grown(14);
    world.report("h1", "h0", Fault::WrongBytes);
    assert!(
        world
            .forest
            .list_hosts()
            .iter()
            .all(|h| h.wrong_bytes_reports == 0)
    );
    let child = (2..6).map(host).find(|h| world.active(h) == ["h0"]).unwrap();
    world.report(&child, "h0", Fault::WrongBytes);
    let parent = world.active(&child)[0].clone();
    let before = edges(&world);
    if world.agents.contains_key(&parent) {
        world.report(&child, &parent, Fault::WrongBytes);
    }
    world.report(&child, "h0", Fault::Slow);
    let moved = edges(&world).difference(&before).count();
    assert_eq!(moved, 0);
    world.forest.audit().unwrap();
}

#[test]
fn an_export_cannot_be_registered_by_anybody_but_its_holder() {
    let mut world = grown(2);
    world.come_at("thief", &world.agents["h0"].portal.clone(), &[]);
    let refusal = world.join("thief").unwrap_err();
    assert!(
        matches!(&refusal, Refusal::EndpointTaken { holder, .. } if holder.contains("h0")),
        "{refusal}"
    );
    // Nor with another's name, without its instance.
    let speaker = crate::tree::Speaker {
        host: name("h0"),
        instance: "guessed".into(),
    };
    let refusal = world.call(Call::Leave { speaker }).unwrap_err();
    assert!(matches!(refusal, Refusal::OtherInstance { .. }));
    assert_eq!(world.attached().len(), 2);
}

#[test]
fn names_and_addresses_with_colons_and_shared_prefixes_stay_apart() {
    let mut world = World::new(2, 1);
    world.come_at("10.0.0.1", "[fe80::1]:3260", &[]);
    world.come_at("10.0.0.10", "[fe80::10]:3260", &[]);
    world.come_at("c", "[fe80::1]:32601", &[]);
    for host in ["10.0.0.1", "10.0.0.10", "c"] {
        world.join(host).unwrap();
        world.register(host).unwrap();
        world.beat(host);
    }
    world.leave("10.0.0.1").unwrap();
    assert_eq!(world.attached(), ["10.0.0.10".to_owned(), "c".to_owned()].into());
    world.restart();
    world.forest.audit().unwrap();
    assert_eq!(world.forest.tree(&image_ref()).unwrap().vertices.len(), 3);
}

#[test]
fn an_origins_own_host_takes_no_slot_and_is_told_of_its_children() {
    let mut world = World::empty(super::world::settings(2, 1));
    world.come("store");
    let mut origin = super::world::foreign(&world.agents["store"].portal.clone());
    origin.host = Some(name("store"));
    world.add_image(image(vec![origin])).unwrap();
    let own = world.join("store").unwrap();
    assert_eq!((own.stripes[0].depth, own.stripes[0].active.len()), (0, 0));
    world.come("a");
    world.join("a").unwrap();
    assert_eq!(world.active("a"), ["store"]);
    let children = &world.agents["store"].placements[&image_id()].children;
    assert_eq!(children.len(), 1);
    assert!(matches!(world.register("store"), Ok(Answer::Registered(_))));
    // After a restart of the coordinator it is told again when it comes.
    world.restart();
    world.connect("store");
    assert_eq!(world.agents["store"].placements[&image_id()].children.len(), 1);
    world.forest.audit().unwrap();
}

#[test]
fn search_lists_the_best_parents_first_and_says_why() {
    let world = grown(5);
    let found = world.forest.search(&image_ref(), Some(&name("h0")), 3).unwrap();
    assert_eq!(found.len(), 3);
    assert!(found[0].free_slots > 0, "{found:?}");
    assert!(found.iter().all(|c| !c.reason.is_empty()));
    let all = world.forest.search(&image_ref(), Some(&name("h0")), 100).unwrap();
    let below_itself = ["h0", "h2", "h4"];
    assert!(
        all.iter().all(|c| c
            .parent
            .host
            .as_ref()
            .is_none_or(|h| !below_itself.contains(&h.as_str()))),
        "{all:?}"
    );
    assert!(all.last().unwrap().reason.contains("no slot free"));
    // A part of the list is its beginning, and each says what put it behind the one before.
    assert_eq!(found[..], all[..3]);
    let room = |c: &crate::tree::Candidate| c.free_slots > 0;
    assert!(
        all.is_sorted_by_key(|c| !room(c)),
        "those with room come first: {all:?}"
    );
    let with_room: Vec<_> = all.iter().filter(|c| room(c)).collect();
    assert!(
        with_room.is_sorted_by_key(|c| c.parent.depth),
        "nearest the origin first: {all:?}"
    );
    for candidate in &all {
        let slots = match candidate.free_slots {
            0 => "no slot free".to_owned(),
            1 => "1 slot free".to_owned(),
            free => format!("{free} slots free"),
        };
        assert!(candidate.reason.contains(&slots), "{candidate:?}");
    }
}

#[test]
fn search_names_the_stripe_of_each_export_and_those_that_are_pending_or_lost() {
    let mut world = World::striped(2, 1);
    for n in 0..6 {
        world.come(&host(n));
        world.join(&host(n)).unwrap();
        if n != 1 {
            world.register(&host(n)).unwrap();
        }
    }
    world.disconnect(&host(2));
    let found = world.forest.search(&image_ref(), None, 100).unwrap();
    let stripes: std::collections::BTreeSet<u16> = found.iter().map(|c| c.stripe.0).collect();
    assert_eq!((stripes.len(), found.len()), (2, 2 * (6 + 1)));
    for candidate in &found {
        let host_is = |n: usize| candidate.parent.host.as_ref() == Some(&name(&host(n)));
        assert_eq!(
            candidate.reason.contains("still attaching"),
            host_is(1),
            "{candidate:?}"
        );
        assert_eq!(
            candidate.reason.contains("its agent is not connected"),
            host_is(2),
            "{candidate:?}"
        );
    }
    assert!(
        found.is_sorted_by_key(|c| c.reason.contains("not connected")),
        "the lost come last"
    );
}

#[test]
fn in_stripes_inner_hosts_stand_on_top_and_an_origin_has_one_child_in_each() {
    let mut world = World::striped(2, 1);
    for n in 0..1_000 {
        world.come(&host(n));
        world.join(&host(n)).unwrap();
    }
    world.forest.audit().unwrap();
    world.check_told().unwrap();
    assert_eq!(
        world.deepest(),
        10,
        "1 + 2 + 4 + ... places, offered by half of the hosts"
    );
    let tree = world.forest.tree(&image_ref()).unwrap();
    for origin in tree.vertices.iter().filter(|v| v.origin) {
        assert_eq!(origin.children, 1, "in {}", origin.stripe);
    }
    let mut fed = 0;
    for n in 0..1_000 {
        let (homes, children) = world.feeds(&host(n));
        assert!(homes.len() <= 1 && children <= 2, "{homes:?}");
        fed += children;
    }
    assert_eq!(fed, 2 * 1_000 - 2, "all but the origin's");
}

#[test]
fn stripes_do_not_drift_over_300_leaves_and_joins_of_100_hosts() {
    let mut world = World::striped(2, 1);
    (0..100).for_each(|n| world.grow(&host(n)));
    let mut dice = Dice(3);
    let mut moved = 0;
    for turn in 0..300 {
        let leaver = host(dice.roll(100));
        let before = edges(&world);
        world.leave(&leaver).unwrap();
        let audits = [world.forest.audit(), world.forest.audit_depth()];
        audits
            .into_iter()
            .for_each(|audit| audit.unwrap_or_else(|why| panic!("turn {turn}: {why}")));
        moved += edges(&world).difference(&before).count();
        world.connect(&leaver);
        world.join(&leaver).unwrap();
        world.register(&leaver).unwrap();
    }
    // Until those that came back say that they act on their places, others stand in for some of them.
    world.hear_all();
    world.check_told().unwrap();
    println!(
        "{:.2} edges moved a departure",
        f64::from(u32::try_from(moved).unwrap()) / 3e2
    );
    assert!(moved < 6 * 300, "{moved} edges moved in 300 departures");
}

#[test]
fn a_host_that_cannot_read_stripes_apart_gets_one_parent_for_all() {
    let mut world = World::striped(2, 1);
    (0..6).for_each(|n| world.grow(&host(n)));
    world.come("whole");
    world.agents.get_mut("whole").unwrap().max_stripes = 1;
    world.beat("whole");
    let placement = world.join("whole").unwrap();
    assert_eq!(placement.stripes.len(), 1);
    assert_eq!(placement.stripes[0].active.len(), 1);
    (7..40).for_each(|n| world.grow(&host(n)));
    world.forest.audit().unwrap();
    world.check_told().unwrap();
}

#[test]
fn others_change_their_home_where_a_stripe_would_have_too_few_slots() {
    let mut world = World::striped(2, 1);
    (0..8).for_each(|n| world.grow(&host(n)));
    // All hosts of one home go, one after another: others make it theirs.
    for leaver in [1, 3, 5] {
        world.leave(&host(leaver)).unwrap();
        world.forest.audit().unwrap();
        world.check_told().unwrap();
    }
    let tree = world.forest.tree(&image_ref()).unwrap();
    assert!(tree.vertices.iter().filter(|v| v.origin).all(|v| v.children == 1));
}

/// Found by random histories: both that are left have one home, and a third stripe is nobody's.
#[test]
fn a_newcomer_finds_room_where_all_that_are_left_have_one_home() {
    for stripes in 2..5 {
        let mut world = World::striped(stripes, 1);
        (0..12).for_each(|n| world.grow(&host(n)));
        for leaver in (0..12).filter(|n| n % usize::from(stripes) != 0) {
            world.leave(&host(leaver)).unwrap();
        }
        (20..30).for_each(|n| world.grow(&host(n)));
        world.forest.audit().unwrap();
        world.check_told().unwrap();
    }
}
