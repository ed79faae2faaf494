//! Keeps a stripe's tree shallow: who goes up where it is deeper than it need be, and planting it anew where nothing smaller helps.

use std::collections::BTreeSet;

use treeboot_types::{AttachState, HostName, Image};

use super::Grove;
use super::place::{Around, DEPTH_SLACK, Seeker, or_origin};
use super::stripe::{Node, Stripe};

impl Around<'_> {
    /// Moves deepest leaves up while the tree is deeper than it need be.
    pub(super) fn rebalance(&self, grove: &mut Grove, stripe: usize) {
        let image = grove.image.clone();
        let hosts = grove.stripes.get(stripe).map_or(0, Stripe::hosts);
        let best = self.best_depth(grove, hosts);
        // Each turn brings one host nearer to the root, so there are hardly more turns than hosts.
        for _ in 0..hosts {
            let Some(tree) = grove.stripes.get(stripe) else {
                return;
            };
            let deepest = tree.deepest();
            if deepest <= best.saturating_add(DEPTH_SLACK) {
                return;
            }
            if self.lift(&image, grove, stripe) {
                continue;
            }
            let Some(leaf) = self.leaf_to_move(grove, stripe) else {
                return;
            };
            let Some(tree) = grove.stripes.get_mut(stripe) else {
                return;
            };
            // Taken out first, because its own shares may be the ones that are missing near the root.
            let Some(place) = tree.take(&leaf) else {
                return;
            };
            let seeker = Seeker {
                host: &leaf,
                wanted: self.settings.active_parents,
                limit: deepest.saturating_sub(2),
                not: &BTreeSet::new(),
            };
            let parents = self.choose(&image, tree, &seeker);
            let is_stuck = parents.is_none();
            let parents = parents.unwrap_or_else(|| place.parents.into_iter().collect());
            tree.insert_host(&leaf, place.capacity, place.joined, parents);
            if is_stuck {
                // In a stripe with hosts that offer nothing, those may stand anywhere in the way.
                let is_mixed = tree.idle().next().is_some();
                return self.replant(&image, tree, if is_mixed { 0 } else { best });
            }
        }
    }

    /// A leaf of the deepest level: one that is alive and ready rather than another.
    fn leaf_to_move(&self, grove: &Grove, stripe: usize) -> Option<HostName> {
        let tree = grove.stripes.get(stripe)?;
        let leaves = tree.level(tree.deepest()).filter_map(|leaf| {
            let vertex = tree.host(leaf)?;
            let ready = grove.places.get(leaf).map(|p| p.state) == Some(AttachState::Ready);
            let rank = (self.dying.contains(leaf), !self.is_heard(leaf), !ready);
            vertex.children.is_empty().then_some((rank, vertex.joined, leaf))
        });
        leaves.min().map(|(_, _, leaf)| leaf.clone())
    }

    /// The deepest host that offers shares takes the place of the one nearest the root that offers none, if that brings it
    /// up by at least two levels.
    fn lift(&self, image: &Image, grove: &mut Grove, stripe: usize) -> bool {
        let Some(tree) = grove.stripes.get_mut(stripe) else {
            return false;
        };
        let offers = |host: &&HostName| tree.host(host).is_some_and(|v| v.capacity > 0);
        let deepest = (1..=tree.deepest())
            .rev()
            .find_map(|depth| Some((depth, tree.level(depth).find(offers)?.clone())));
        let Some((depth, host)) = deepest else {
            return false;
        };
        let Some(leaf) = self.idle_above(image, tree, &host, Some(depth.saturating_sub(1)), u32::MAX) else {
            return false;
        };
        let Some(below) = tree.get(&Node::Host(host.clone())).map(|v| v.parents.clone()) else {
            return false;
        };
        let Some(above) = tree.take(&leaf) else {
            return false;
        };
        for parent in below.keys() {
            tree.unlink(&host, parent);
        }
        for (parent, shares) in above.parents {
            tree.link(&host, &parent, shares);
        }
        tree.insert_host(&leaf, above.capacity, above.joined, below);
        true
    }

    pub(super) fn best_depth(&self, grove: &Grove, hosts: usize) -> u32 {
        self.settings.policy.best_depth(hosts, grove.image.stripes)
    }

    /// Puts all hosts below a depth anew, those that offer shares first. Needed where shares near the root are held one by one by
    /// hosts whose other parents are deep, so that no leaf finds all of its shares there; and where the last free shares
    /// lie below the host that looks for some.
    pub(super) fn replant(&self, image: &Image, tree: &mut Stripe, below: u32) {
        let mut taken: Vec<(bool, u64, HostName, u32)> = Vec::new();
        while tree.deepest() > below {
            let level: Vec<HostName> = tree.level(tree.deepest()).cloned().collect();
            for host in level {
                if let Some(place) = tree.take(&host) {
                    taken.push((place.capacity == 0, place.joined, host, place.capacity));
                }
            }
        }
        taken.sort();
        for (_, joined, host, capacity) in taken {
            if !self.put(image, tree, &host, capacity, joined) {
                tree.insert_host(
                    &host,
                    capacity,
                    joined,
                    or_origin(None, self.settings.active_parents),
                );
            }
        }
    }
}
