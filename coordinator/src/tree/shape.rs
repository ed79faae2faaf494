//! Keeps a stripe's tree shallow: who goes up where it is deeper than it need be, and planting it anew where nothing smaller helps.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use treeboot_types::Image;

use super::Grove;
use super::layer::{Layer, Node};
use super::place::{Around, At, DEPTH_SLACK, Prefers, Seeker, or_root};

impl Around<'_> {
    /// Moves deepest leaves up while the tree is deeper than it need be.
    pub(super) fn rebalance(&self, grove: &mut Grove, at: At<'_>) {
        let image = grove.image.clone();
        let members = grove.at(at).map_or(0, Layer::count);
        let best = self.best_depth(grove, at);
        // Each turn brings one member nearer to the root, so there are hardly more turns than members.
        for _ in 0..members {
            let Some(tree) = grove.at(at) else {
                return;
            };
            let deepest = tree.deepest();
            if deepest <= best.saturating_add(DEPTH_SLACK) {
                return;
            }
            if self.lift(&image, grove, at) {
                continue;
            }
            let Some(leaf) = self.leaf_to_move(grove, at) else {
                return;
            };
            let Some(tree) = grove.at_mut(at) else {
                return;
            };
            // Taken out first, because its own shares may be the ones that are missing near the root.
            let Some(place) = tree.take(&leaf) else {
                return;
            };
            let seeker = Seeker {
                member: &leaf,
                wanted: self.settings.active_parents,
                limit: deepest.saturating_sub(2),
                not: &BTreeSet::new(),
                prefers: Prefers::Heard,
            };
            let parents = self.choose(&image, tree, &seeker);
            let is_stuck = parents.is_none();
            let parents = parents.unwrap_or_else(|| place.parents.into_iter().collect());
            tree.insert_member(&leaf, place.capacity, place.joined, parents);
            if is_stuck {
                // In a stripe with hosts that offer nothing, those may stand anywhere in the way.
                let is_mixed = tree.idle().next().is_some();
                return self.replant(&image, tree, if is_mixed { 0 } else { best });
            }
        }
    }

    /// A leaf of the deepest level: one that is alive and ready rather than another.
    fn leaf_to_move(&self, grove: &Grove, at: At<'_>) -> Option<Node> {
        let tree = grove.at(at)?;
        let leaves = tree.level(tree.deepest()).filter_map(|leaf| {
            let vertex = tree.get(leaf)?;
            let rank = (self.is_dying(leaf), !self.is_heard(leaf), !grove.is_ready(leaf));
            vertex.children.is_empty().then_some((rank, vertex.joined, leaf))
        });
        leaves.min().map(|(_, _, leaf)| leaf.clone())
    }

    /// The deepest host that offers shares takes the place of the one nearest the root that offers none, if that brings it
    /// up by at least two levels.
    fn lift(&self, image: &Image, grove: &mut Grove, at: At<'_>) -> bool {
        let Some(tree) = grove.at_mut(at) else {
            return false;
        };
        let offers = |member: &&Node| tree.get(member).is_some_and(|v| v.capacity > 0);
        let deepest = (1..=tree.deepest())
            .rev()
            .find_map(|depth| Some((depth, tree.level(depth).find(offers)?.clone())));
        let Some((depth, member)) = deepest else {
            return false;
        };
        let Some(leaf) = self.idle_above(image, tree, &member, Some(depth.saturating_sub(1)), u32::MAX)
        else {
            return false;
        };
        let Some(below) = tree.get(&member).map(|v| v.parents.clone()) else {
            return false;
        };
        let Some(above) = tree.take(&leaf) else {
            return false;
        };
        for parent in below.keys() {
            tree.unlink(&member, parent);
        }
        for (parent, shares) in above.parents {
            tree.link(&member, &parent, shares);
        }
        tree.insert_member(&leaf, above.capacity, above.joined, below);
        true
    }

    /// The least depth that a layer could have.
    pub(super) fn best_depth(&self, grove: &Grove, at: At<'_>) -> u32 {
        let layer = grove.at(at);
        layer.map_or(0, |layer| {
            self.best_depth_of(layer, layer.count(), grove.image.stripes)
        })
    }

    /// The least depth that a layer could have with so many members.
    pub(super) fn best_depth_of(&self, layer: &Layer, members: usize, stripes: u16) -> u32 {
        let policy = &self.settings.policy;
        if layer.get(&Node::Entrance).is_some() {
            policy.best_depth_within(members, stripes)
        } else {
            policy.best_depth(members, stripes)
        }
    }

    /// Puts all hosts below a depth anew, those that offer most first. Needed where shares near the root are held one by one by
    /// hosts whose other parents are deep, so that no leaf finds all of its shares there; and where the last free shares
    /// lie below the host that looks for some. Each takes the place nearest the root that there is, under a silent host too:
    /// if all who are heard stood under each other only, as after a restart that few came back from, the tree could be as
    /// deep as before. Silent hosts offer their places last among equals, and so stand below those that are heard.
    pub(super) fn replant(&self, image: &Image, tree: &mut Layer, below: u32) {
        let mut taken = Vec::new();
        while tree.deepest() > below {
            let level: Vec<Node> = tree.level(tree.deepest()).cloned().collect();
            for member in level {
                if let Some(place) = tree.take(&member) {
                    let offers = (self.is_dying(&member), Reverse(place.capacity));
                    let rank = (place.capacity == 0, offers, !self.is_heard(&member), place.joined);
                    taken.push((rank, member, place.capacity));
                }
            }
        }
        taken.sort();
        for ((.., joined), member, capacity) in taken {
            if !self.put(image, tree, &member, (capacity, joined), Prefers::Shallow) {
                let root = or_root(tree, None, self.settings.active_parents);
                tree.insert_member(&member, capacity, joined, root);
            }
        }
    }
}
