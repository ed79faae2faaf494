//! The census says what the trees say.

use super::racks::come_in;
use super::world::{World, host, image_ref};

#[test]
fn a_census_counts_what_the_trees_show_in_racks_and_zones_too() {
    for (mut world, racks, zones) in [
        (World::new(2, 1), 1, 0),
        (World::new(3, 2), 5, 0),
        (World::striped(2, 1), 7, 3),
        (World::striped(3, 1), 4, 2),
    ] {
        for n in 0..60 {
            come_in(&mut world, n, racks, zones);
            world.join(&host(n)).unwrap();
            if n % 3 > 0 {
                world.register(&host(n)).unwrap();
            }
        }
        world.disconnect(&host(5));
        let census = world.forest.census();
        let tree = world.forest.tree(&image_ref()).unwrap();
        let [image] = census.images.as_slice() else {
            panic!("{census:?}");
        };
        assert_eq!((image.ready, image.pending, image.lost), (40, 20, 1));
        assert_eq!((census.connected, census.silent), (59, 1));
        assert_eq!(image.depths.len(), usize::from(tree.image.stripes));
        for (stripe, depth) in (0..).zip(&image.depths) {
            let deepest = tree
                .vertices
                .iter()
                .filter(|v| v.stripe.0 == stripe)
                .map(|v| v.depth)
                .max();
            assert_eq!(
                Some(*depth),
                deepest,
                "stripe {stripe}, {racks} racks, {zones} zones"
            );
        }
    }
}
