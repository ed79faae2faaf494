//! Where hosts go: into the free slot nearest the root; and who moves when one goes: as few as keep the tree shallow.
//!
//! A host moves upwards or sideways only, or it is a leaf. So a host that takes a new place never has children whose
//! edge would lead to a smaller depth no longer.

use std::collections::{BTreeMap, BTreeSet};

use treeboot_types::{AttachState, HostName, Image, Labels, StripeIndex};

use super::stripe::{Node, Stripe, Taken};
use super::{Grove, Host, Role, Settings};

/// By how many levels a tree may be deeper than the best one before leaves are moved up. 0 would move a host at
/// nearly every departure; 1 costs one more hop for some and moves hardly anybody.
pub(super) const DEPTH_SLACK: u32 = 1;

/// What a choice of place looks at beside the tree.
#[derive(Clone, Copy)]
pub(super) struct Around<'a> {
    pub(super) hosts: &'a BTreeMap<HostName, Host>,
    pub(super) dying: &'a BTreeSet<HostName>,
    pub(super) settings: &'a Settings,
}

/// Who looks for shares.
struct Seeker<'a> {
    host: &'a HostName,
    wanted: u32,
    /// Greatest depth of a parent.
    limit: u32,
    /// Vertices that cannot be its parents: itself, those below, and those that it has already.
    not: &'a BTreeSet<Node>,
}

type Parents = Vec<(Node, u32)>;

impl Around<'_> {
    /// Gives a new host a place in one stripe; false where there is no room at all.
    pub(super) fn admit(&self, grove: &mut Grove, stripe: usize, host: &HostName, joined: u64) -> bool {
        let is_placed = self.put(grove, stripe, host, joined);
        // Finds nothing to do, but where silent hosts were passed over while shares ran out near the root.
        self.rebalance(grove, stripe);
        is_placed
    }

    fn put(&self, grove: &mut Grove, stripe: usize, host: &HostName, joined: u64) -> bool {
        let capacity = self.capacity(grove, stripe, host, joined);
        let seeker = Seeker {
            host,
            wanted: self.settings.active_parents,
            limit: u32::MAX,
            not: &BTreeSet::from([Node::Host(host.clone())]),
        };
        let image = grove.image.clone();
        let Some(stripe) = grove.stripes.get_mut(stripe) else {
            return false;
        };
        let Some(parents) = self.choose(&image, stripe, &seeker) else {
            return false;
        };
        stripe.insert_host(host, capacity, joined, parents);
        true
    }

    /// Shares that a host offers.
    pub(super) fn capacity(&self, grove: &Grove, stripe: usize, host: &HostName, joined: u64) -> u32 {
        let weight = self.hosts.get(host).map_or(1, |h| h.info.weight);
        let index = StripeIndex(u16::try_from(stripe).unwrap_or(u16::MAX));
        let role = Role::Host { joined, weight };
        self.settings
            .shares(self.settings.policy.slots(index, grove.image.stripes, role))
    }

    /// Takes a host out of a stripe and gives its children other parents with the fewest moves.
    pub(super) fn vacate(&self, grove: &mut Grove, stripe: usize, host: &HostName) {
        let image = grove.image.clone();
        let Some(tree) = grove.stripes.get_mut(stripe) else {
            return;
        };
        let Some(taken) = tree.take(host) else {
            return;
        };
        let is_inner = |tree: &Stripe, orphan: &HostName| {
            tree.host(orphan)
                .is_some_and(|vertex| !vertex.children.is_empty())
        };
        let (inner, leaves): (Vec<_>, Vec<_>) = taken
            .orphans
            .clone()
            .into_iter()
            .partition(|(orphan, _)| is_inner(tree, orphan));
        let needed: u32 = inner.iter().map(|(_, shares)| shares).sum();
        if self.room_up_to(tree, taken.depth, needed) || !self.fill(grove, stripe, &taken) {
            for (orphan, shares) in inner {
                self.reattach(&image, grove, stripe, &orphan, shares, taken.depth);
            }
            for (orphan, shares) in leaves {
                self.reattach(&image, grove, stripe, &orphan, shares, u32::MAX);
            }
        }
        self.rebalance(grove, stripe);
    }

    /// Whether so many shares are free no deeper than `depth`.
    fn room_up_to(&self, tree: &Stripe, depth: u32, needed: u32) -> bool {
        let mut room = 0;
        for (node, vertex) in tree.with_room() {
            if room >= needed || vertex.depth > depth {
                break;
            }
            if !self.is_dying(node) {
                room += vertex.free();
            }
        }
        room >= needed
    }

    /// Puts a deepest leaf where `taken` was, with all its children; false where nobody can stand there.
    fn fill(&self, grove: &mut Grove, stripe: usize, taken: &Taken) -> bool {
        let needed: u32 = taken.orphans.values().sum();
        let Some(filler) = self.leaf_to_move(grove, stripe, |leaf| {
            let own = taken.orphans.get(leaf).copied();
            (own.is_some(), needed - own.unwrap_or(0))
        }) else {
            return false;
        };
        let Some(tree) = grove.stripes.get_mut(stripe) else {
            return false;
        };
        let Some(place) = tree.take(&filler) else {
            return false;
        };
        tree.insert_host(&filler, place.capacity, place.joined, taken.parents.clone());
        let parent = Node::Host(filler.clone());
        for (orphan, &shares) in taken.orphans.iter().filter(|(orphan, _)| **orphan != filler) {
            tree.link(orphan, &parent, shares);
        }
        true
    }

    /// A leaf of the deepest level that can take so many shares of children: one that must move anyway, that is alive
    /// and ready, rather than another. `asks` tells of a leaf whether it must move anyway, and what it must carry.
    fn leaf_to_move(
        &self,
        grove: &Grove,
        stripe: usize,
        asks: impl Fn(&HostName) -> (bool, u32),
    ) -> Option<HostName> {
        let tree = grove.stripes.get(stripe)?;
        tree.level(tree.deepest())
            .filter_map(|leaf| {
                let vertex = tree.host(leaf)?;
                let (must_move, carries) = asks(leaf);
                let ready = grove.places.get(leaf).map(|p| p.state) == Some(AttachState::Ready);
                let fits = vertex.children.is_empty() && vertex.capacity >= carries;
                let rank = (
                    self.dying.contains(leaf),
                    !self.is_heard(leaf),
                    !must_move,
                    !ready,
                );
                fits.then_some((rank, vertex.joined, leaf))
            })
            .min()
            .map(|(_, _, leaf)| leaf.clone())
    }

    /// Gives a host shares of other parents, none deeper than `limit`; its own subtree never.
    fn reattach(
        &self,
        image: &Image,
        grove: &mut Grove,
        stripe: usize,
        host: &HostName,
        shares: u32,
        limit: u32,
    ) {
        let Some(tree) = grove.stripes.get_mut(stripe) else {
            return;
        };
        let node = Node::Host(host.clone());
        let mut not: BTreeSet<Node> = if limit == u32::MAX {
            tree.below(&node, usize::MAX).into_iter().flatten().collect()
        } else {
            BTreeSet::new()
        };
        not.insert(node.clone());
        let with_parents: BTreeSet<Node> = tree
            .get(&node)
            .map(|vertex| {
                vertex
                    .parents
                    .keys()
                    .cloned()
                    .chain(not.iter().cloned())
                    .collect()
            })
            .unwrap_or_default();
        let seeker = |not, limit| Seeker {
            host,
            wanted: shares,
            limit,
            not,
        };
        let mut parents = self
            .choose(image, tree, &seeker(&with_parents, limit))
            .or_else(|| self.choose(image, tree, &seeker(&not, limit)));
        if parents.is_none() {
            // Nowhere near its old depth: anywhere that is not below it. Its subtree sinks with it.
            let mut anywhere = not.clone();
            anywhere.extend(tree.below(&node, usize::MAX).into_iter().flatten());
            parents = self.choose(image, tree, &seeker(&anywhere, u32::MAX));
        }
        for (parent, shares) in or_origin(parents, shares) {
            tree.link(host, &parent, shares);
        }
    }

    /// Moves deepest leaves up while the tree is deeper than it need be.
    pub(super) fn rebalance(&self, grove: &mut Grove, stripe: usize) {
        let image = grove.image.clone();
        let hosts = grove.stripes.get(stripe).map_or(0, Stripe::hosts);
        // Each turn brings one leaf nearer to the root, so there are not more turns than hosts.
        for _ in 0..hosts {
            let Some(tree) = grove.stripes.get(stripe) else {
                return;
            };
            let deepest = tree.deepest();
            if deepest <= self.settings.policy.best_depth(hosts).saturating_add(DEPTH_SLACK) {
                return;
            }
            let Some(leaf) = self.leaf_to_move(grove, stripe, |_| (false, 0)) else {
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
                return self.replant(&image, tree);
            }
        }
    }

    /// Puts all hosts below the best depth anew. Needed only with several active parents, when shares near the root are
    /// held one by one by hosts whose other parents are deep, so that no leaf finds all of its shares there.
    fn replant(&self, image: &Image, tree: &mut Stripe) {
        let best = self.settings.policy.best_depth(tree.hosts());
        let mut taken: Vec<(u64, HostName, u32)> = Vec::new();
        while tree.deepest() > best {
            let level: Vec<HostName> = tree.level(tree.deepest()).cloned().collect();
            for host in level {
                if let Some(place) = tree.take(&host) {
                    taken.push((place.joined, host, place.capacity));
                }
            }
        }
        taken.sort();
        for (joined, host, capacity) in taken {
            let seeker = Seeker {
                host: &host,
                wanted: self.settings.active_parents,
                limit: u32::MAX,
                not: &BTreeSet::new(),
            };
            let parents = self.choose(image, tree, &seeker);
            tree.insert_host(&host, capacity, joined, or_origin(parents, seeker.wanted));
        }
    }

    /// Moves a host away from one of its parents, where there is room; true if it moved. A leaf may go anywhere; an
    /// inner host not deeper, so that its children keep their place.
    pub(super) fn move_away(&self, grove: &mut Grove, stripe: usize, host: &HostName, from: &Node) -> bool {
        let image = grove.image.clone();
        let Some(tree) = grove.stripes.get_mut(stripe) else {
            return false;
        };
        let Some(vertex) = tree.host(host) else {
            return false;
        };
        let Some(&shares) = vertex.parents.get(from) else {
            return false;
        };
        let limit = if vertex.children.is_empty() {
            self.settings.policy.best_depth(tree.hosts())
        } else {
            vertex.depth.saturating_sub(1)
        };
        let not = BTreeSet::from([from.clone(), Node::Host(host.clone())]);
        let seeker = Seeker {
            host,
            wanted: shares,
            limit,
            not: &not,
        };
        let Some(parents) = self.choose_where(&image, tree, &seeker, |node| self.is_fit(&image, node, host))
        else {
            return false;
        };
        tree.unlink(host, from);
        for (parent, shares) in parents {
            tree.link(host, &parent, shares);
        }
        self.rebalance(grove, stripe);
        true
    }

    /// Takes a host's children away by putting a deepest leaf in its place; the host becomes a leaf.
    pub(super) fn demote(&self, grove: &mut Grove, stripe: usize, host: &HostName) -> bool {
        let inner = |tree: &Stripe| tree.host(host).is_some_and(|v| !v.children.is_empty());
        let Some(joined) = grove.places.get(host).map(|p| p.joined) else {
            return false;
        };
        if !grove.stripes.get(stripe).is_some_and(inner) {
            return false;
        }
        self.vacate(grove, stripe, host);
        self.admit(grove, stripe, host, joined)
    }

    /// The free shares nearest the root: of hosts that are heard if that costs no depth, otherwise of any.
    fn choose(&self, image: &Image, tree: &Stripe, seeker: &Seeker<'_>) -> Option<Parents> {
        let best = self.settings.policy.best_depth(tree.hosts() + 1);
        let near = Seeker {
            limit: seeker.limit.min(best),
            ..*seeker
        };
        self.choose_where(image, tree, &near, |node| self.is_fit(image, node, seeker.host))
            .or_else(|| self.choose_where(image, tree, seeker, |node| !self.is_dying(node)))
            .or_else(|| self.choose_where(image, tree, seeker, |_| true))
    }

    fn choose_where(
        &self,
        image: &Image,
        tree: &Stripe,
        seeker: &Seeker<'_>,
        fits: impl Fn(&Node) -> bool,
    ) -> Option<Parents> {
        let wanted = seeker.wanted;
        let mut found: Vec<(&Node, u32)> = Vec::new();
        let (mut room, mut level) = (0u32, 0);
        for (node, vertex) in tree.with_room() {
            let enough = room >= wanted;
            let distinct = found.len() >= wanted as usize;
            // Of origins all are looked at, because the nearest need not be the least used.
            if vertex.depth > seeker.limit || enough && (vertex.depth > level || level > 0 && distinct) {
                break;
            }
            if fits(node) && !seeker.not.contains(node) {
                room = room.saturating_add(vertex.free());
                level = vertex.depth;
                found.push((node, vertex.free()));
            }
        }
        if room < wanted {
            return None;
        }
        found.sort_by_key(|(node, _)| match node {
            Node::Origin(index) => (0, self.distance(image, *index, seeker.host)),
            Node::Host(_) => (1, 0),
        });
        Some(spread(&found, wanted))
    }

    /// How far an origin is from a host: 0 in its rack, 1 in its zone, 2 elsewhere.
    pub(super) fn distance(&self, image: &Image, origin: u16, host: &HostName) -> u8 {
        let labels_of = |host: &HostName| self.hosts.get(host).map(|h| &h.info.labels);
        let (Some(origin), Some(own)) = (image.origins.get(usize::from(origin)), labels_of(host)) else {
            return 2;
        };
        let of_agent = origin.host.as_ref().and_then(labels_of);
        let theirs = if origin.labels.is_empty() {
            of_agent.unwrap_or(&origin.labels)
        } else {
            &origin.labels
        };
        let equal = |key: &str, a: &Labels, b: &Labels| a.get(key).is_some_and(|v| b.get(key) == Some(v));
        let (zone, rack) = (equal("zone", own, theirs), equal("rack", own, theirs));
        // Racks are numbered anew in each zone, so an equal rack counts where the zones do not differ.
        let one_zone = zone || !own.contains_key("zone") || !theirs.contains_key("zone");
        match (rack && one_zone, zone) {
            (true, _) => 0,
            (false, true) => 1,
            (false, false) => 2,
        }
    }

    fn is_heard(&self, host: &HostName) -> bool {
        self.hosts.get(host).is_some_and(|h| h.stream.is_some())
    }

    fn is_dying(&self, node: &Node) -> bool {
        matches!(node, Node::Host(host) if self.dying.contains(host))
    }

    /// Alive, and not one that the host complained of.
    fn is_fit(&self, image: &Image, node: &Node, host: &HostName) -> bool {
        let name = match node {
            Node::Host(name) => Some(name),
            Node::Origin(index) => image
                .origins
                .get(usize::from(*index))
                .and_then(|o| o.host.as_ref()),
        };
        let avoided = self
            .hosts
            .get(host)
            .is_some_and(|h| h.avoids.contains(&name.cloned()));
        !self.is_dying(node) && !avoided && name.is_none_or(|name| self.is_heard(name))
    }
}

/// Where a policy has no room at all, reaching an origin matters more than the origin's fan-out.
fn or_origin(parents: Option<Parents>, shares: u32) -> Parents {
    parents.unwrap_or_else(|| vec![(Node::Origin(0), shares)])
}

/// Divides `wanted` shares by turns, so that as many parents as possible carry them.
fn spread(found: &[(&Node, u32)], wanted: u32) -> Parents {
    let mut given = vec![0u32; found.len()];
    let mut left = wanted;
    while left > 0 {
        let before = left;
        for (given, (_, free)) in given.iter_mut().zip(found) {
            if left > 0 && *given < *free {
                *given += 1;
                left -= 1;
            }
        }
        if left == before {
            break;
        }
    }
    let chosen = found.iter().zip(given).filter(|(_, shares)| *shares > 0);
    chosen
        .map(|((node, _), shares)| ((*node).clone(), shares))
        .collect()
}
