//! The record of images.

use treeboot_types::{Digest, ImageRef};

use super::world::{World, foreign, image, image_id, image_ref, name, settings};
use crate::tree::{Answer, Call, Key, Refusal};

fn newest() -> ImageRef {
    "debian".parse().unwrap()
}

#[test]
fn an_equal_content_is_the_same_version_with_another_origin() {
    let mut world = World::new(2, 1);
    world.come("a");
    world.join("a").unwrap();
    let mut again = image(vec![foreign("10.9.9.8:3260")]);
    again.id.version = 0;
    let Answer::Image { image, created } = world.add_image(again.clone()).unwrap() else {
        panic!("no image");
    };
    assert_eq!((image.id.version, image.origins.len(), created), (1, 2, false));
    let fallbacks = &world.agents["a"].placements[&image_id()].stripes[0].fallbacks;
    assert_eq!(fallbacks.len(), 1, "who is attached hears of it");
    let epoch = world.forest.epoch();
    world.add_image(again).unwrap();
    assert_eq!(world.forest.epoch(), epoch, "an equal call changes nothing");
}

#[test]
fn another_content_is_the_next_version_and_never_the_same_one() {
    let mut world = World::new(2, 1);
    let mut other = image(vec![foreign("10.9.9.8:3260")]);
    other.digest = Digest([8; 32]);
    let refusal = world.add_image(other.clone()).unwrap_err();
    assert!(matches!(&refusal, Refusal::ImageExists { .. }), "{refusal}");
    other.id.version = 0;
    let Answer::Image { image, created } = world.add_image(other).unwrap() else {
        panic!("no image");
    };
    assert_eq!((image.id.version, created), (2, true));
    assert_eq!(world.forest.image(&newest()).unwrap().id.version, 2);
    let unknown = world.forest.image(&"debian@3".parse().unwrap()).unwrap_err();
    assert!(unknown.to_string().contains("debian@3"));
}

#[test]
fn an_image_in_use_is_not_removed_but_by_force_and_then_hosts_are_told() {
    let mut world = World::new(2, 1);
    world.grow("a");
    let remove = |force| Call::RemoveImage {
        image: image_ref(),
        force,
    };
    let refusal = world.call(remove(false)).unwrap_err();
    assert!(refusal.to_string().contains("such as a"), "{refusal}");
    world.call(remove(true)).unwrap();
    assert_eq!(world.agents["a"].detached.len(), 1);
    assert!(
        world.agents["a"].detached[0].1.drop_cache,
        "nobody has it any more"
    );
    let left: Vec<&Key> = world.record.keys().collect();
    let newest = Key::Newest(image_id().name);
    assert_eq!(left, [&Key::Epoch, &newest, &Key::Host(name("a"))]);
    assert!(matches!(world.join("a"), Err(Refusal::UnknownImage { .. })));
    world.restart();
    // A version that was removed is never given to another content.
    let mut other = image(vec![foreign("10.9.9.8:3260")]);
    other.id.version = 0;
    other.digest = Digest([8; 32]);
    let Answer::Image { image, .. } = world.add_image(other).unwrap() else {
        panic!("no image");
    };
    assert_eq!(image.id.version, 2);
}

#[test]
fn an_agents_export_does_not_become_foreign_nor_anothers() {
    let mut world = World::empty(settings(2, 1));
    world.come("store");
    let portal = world.agents["store"].portal.clone();
    let mut own = foreign(&portal);
    own.host = Some(name("store"));
    world.add_image(image(vec![own.clone()])).unwrap();
    world.add_image(image(vec![foreign(&portal)])).unwrap();
    assert_eq!(world.forest.image(&image_ref()).unwrap().origins, [own.clone()]);
    let mut thief = own;
    thief.host = Some(name("thief"));
    let refusal = world.add_image(image(vec![thief])).unwrap_err();
    assert!(matches!(refusal, Refusal::EndpointTaken { .. }));
}

#[test]
fn a_host_that_becomes_an_origin_gives_its_place_up() {
    let mut world = World::new(2, 1);
    world.grow("a");
    world.grow("b");
    world.grow("c");
    let mut own = foreign(&world.agents["a"].portal.clone());
    own.host = Some(name("a"));
    world.add_image(image(vec![own])).unwrap();
    world.forest.audit().unwrap();
    let tree = world.forest.tree(&image_ref()).unwrap();
    let of_a: Vec<_> = tree
        .vertices
        .iter()
        .filter(|v| v.host == Some(name("a")))
        .collect();
    assert_eq!(of_a.len(), 1);
    assert!(of_a[0].origin);
}
