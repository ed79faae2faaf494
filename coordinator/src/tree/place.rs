//! Where hosts go: into the free slot nearest the root; and who moves when one goes: as few as keep the tree shallow.
//!
//! A host moves upwards or sideways only, or it is a leaf. So a host that takes a new place never has children whose
//! edge would lead to a smaller depth no longer.

use std::collections::{BTreeMap, BTreeSet};

use treeboot_types::{AttachState, HostName, Image, Labels, StripeIndex};

use super::stripe::{Node, Stripe, Taken};
use super::{Grove, Host, Settings};

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
pub(super) struct Seeker<'a> {
    pub(super) host: &'a HostName,
    pub(super) wanted: u32,
    /// Greatest depth of a parent.
    pub(super) limit: u32,
    /// Vertices that cannot be its parents: itself, those below, and those that it has already.
    pub(super) not: &'a BTreeSet<Node>,
}

pub(super) type Parents = Vec<(Node, u32)>;

impl Around<'_> {
    /// Gives a new host a place in one stripe; false where there is no room at all.
    pub(super) fn admit(
        &self,
        grove: &mut Grove,
        stripe: usize,
        host: &HostName,
        home: StripeIndex,
        joined: u64,
    ) -> bool {
        let capacity = self.capacity(grove, stripe, host, home);
        let image = grove.image.clone();
        let Some(tree) = grove.stripes.get_mut(stripe) else {
            return false;
        };
        let is_placed = self.put(&image, tree, host, capacity, joined);
        // Finds nothing to do, but where silent hosts were passed over while shares ran out near the root.
        self.rebalance(grove, stripe);
        is_placed
    }

    /// Gives a host a place where it takes nobody's; false where there is no room at all.
    pub(super) fn admit_as_leaf(
        &self,
        grove: &mut Grove,
        stripe: usize,
        host: &HostName,
        capacity: u32,
        joined: u64,
    ) -> bool {
        let image = grove.image.clone();
        let Some(tree) = grove.stripes.get_mut(stripe) else {
            return false;
        };
        let is_placed = self.put_free(&image, tree, host, capacity, joined);
        self.rebalance(grove, stripe);
        is_placed
    }

    /// Puts a host where it is nearest the root: into free shares, or, if it offers shares itself, into those of a host
    /// that offers none, which then goes one level down.
    pub(super) fn put(
        &self,
        image: &Image,
        tree: &mut Stripe,
        host: &HostName,
        capacity: u32,
        joined: u64,
    ) -> bool {
        let free = self.choose(image, tree, &self.newcomer(host, &BTreeSet::new()));
        let depth = free.as_ref().map(|parents| depth_under(tree, parents));
        let Some(leaf) = self.idle_above(image, tree, host, depth, capacity) else {
            return self.put_free(image, tree, host, capacity, joined);
        };
        let Some(taken) = tree.take(&leaf) else {
            return false;
        };
        tree.insert_host(host, capacity, joined, taken.parents);
        self.put_free(image, tree, &leaf, taken.capacity, taken.joined)
    }

    /// Puts a host into the free shares nearest the root; false where there are too few.
    fn put_free(
        &self,
        image: &Image,
        tree: &mut Stripe,
        host: &HostName,
        capacity: u32,
        joined: u64,
    ) -> bool {
        let not = BTreeSet::from([Node::Host(host.clone())]);
        match self.choose(image, tree, &self.newcomer(host, &not)) {
            Some(parents) => {
                tree.insert_host(host, capacity, joined, parents);
                true
            }
            None => false,
        }
    }

    fn newcomer<'a>(&self, host: &'a HostName, not: &'a BTreeSet<Node>) -> Seeker<'a> {
        Seeker {
            host,
            wanted: self.settings.active_parents,
            limit: u32::MAX,
            not,
        }
    }

    /// The host nearest the root that offers no shares, above `depth`, if `host` offers some and can take its place.
    pub(super) fn idle_above(
        &self,
        image: &Image,
        tree: &Stripe,
        host: &HostName,
        depth: Option<u32>,
        capacity: u32,
    ) -> Option<HostName> {
        if capacity < self.settings.active_parents {
            return None;
        }
        let idle = || {
            let above = tree
                .idle()
                .take_while(|(at, _)| depth.is_none_or(|depth| *at < depth));
            above.map(|(_, leaf)| leaf)
        };
        let suits = |leaf: &&HostName| {
            let parents = tree.host(leaf).map(|vertex| vertex.parents.keys());
            parents.is_some_and(|mut parents| parents.all(|parent| self.is_fit(image, parent, host)))
        };
        let suitable = idle().find(suits);
        // Where there is no free share, under whom matters less than that there is a place.
        suitable
            .or_else(|| idle().next().filter(|_| depth.is_none()))
            .cloned()
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
            let mut all_placed = true;
            for (orphan, shares) in inner {
                all_placed &= self.reattach(&image, grove, stripe, &orphan, shares, taken.depth);
            }
            for (orphan, shares) in leaves {
                all_placed &= self.reattach(&image, grove, stripe, &orphan, shares, u32::MAX);
            }
            if !all_placed && let Some(tree) = grove.stripes.get_mut(stripe) {
                self.replant(&image, tree, 0);
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
        let image = grove.image.clone();
        let needed: u32 = taken.orphans.values().sum();
        let Some(filler) = self.host_to_move(grove, stripe, |host| {
            let own = taken.orphans.get(host).copied();
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
        // Leaves, all of them: what the filler left is free, so there is room.
        let mut all_placed = true;
        for (orphan, shares) in place.orphans {
            all_placed &= self.reattach(&image, grove, stripe, &orphan, shares, u32::MAX);
        }
        if !all_placed && let Some(tree) = grove.stripes.get_mut(stripe) {
            self.replant(&image, tree, 0);
        }
        true
    }

    /// Who goes up into the place of an inner host: a deepest leaf, or where no leaf offers enough shares, as they do not in a
    /// stripe that is not their home, a deepest inner host whose children are all leaves. `asks` tells of a host whether it
    /// must move anyway, and what it must carry; one that must move anyway, that is alive and ready, goes rather than another.
    fn host_to_move(
        &self,
        grove: &Grove,
        stripe: usize,
        asks: impl Fn(&HostName) -> (bool, u32),
    ) -> Option<HostName> {
        let tree = grove.stripes.get(stripe)?;
        let is_leaf = |host: &HostName| tree.host(host).is_some_and(|v| v.children.is_empty());
        let of_level = |depth: u32, with_leaves: bool| {
            let hosts = tree.level(depth).filter_map(|host| {
                let vertex = tree.host(host)?;
                let (must_move, carries) = asks(host);
                let ready = grove.places.get(host).map(|p| p.state) == Some(AttachState::Ready);
                let fits = vertex.capacity >= carries
                    && vertex.children.is_empty() != with_leaves
                    && vertex.children.keys().all(is_leaf);
                let rank = (
                    self.dying.contains(host),
                    !self.is_heard(host),
                    !must_move,
                    !ready,
                );
                fits.then_some((rank, vertex.joined, host))
            });
            hosts.min().map(|(_, _, host)| host.clone())
        };
        let levels = || (1..=tree.deepest()).rev();
        levels()
            .find_map(|depth| of_level(depth, false))
            .or_else(|| levels().find_map(|depth| of_level(depth, true)))
    }

    /// Gives a host shares of other parents, none deeper than `limit`; its own subtree never. False where there are too few,
    /// so that an origin has one child too many.
    fn reattach(
        &self,
        image: &Image,
        grove: &mut Grove,
        stripe: usize,
        host: &HostName,
        shares: u32,
        limit: u32,
    ) -> bool {
        let Some(tree) = grove.stripes.get_mut(stripe) else {
            return false;
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
        let is_placed = parents.is_some();
        for (parent, shares) in or_origin(parents, shares) {
            tree.link(host, &parent, shares);
        }
        is_placed
    }

    /// Moves a host away from one of its parents, where there is room; true if it moved. A leaf may go anywhere; an
    /// inner host not deeper, so that its children keep their place.
    pub(super) fn move_away(&self, grove: &mut Grove, stripe: usize, host: &HostName, from: &Node) -> bool {
        let image = grove.image.clone();
        let hosts = grove.stripes.get(stripe).map_or(0, Stripe::hosts);
        let best = self.best_depth(grove, hosts);
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
            best
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

    /// Takes a host's children away by putting a deepest leaf in its place; the host becomes a leaf. False where nobody can
    /// stand there.
    pub(super) fn demote(&self, grove: &mut Grove, stripe: usize, host: &HostName) -> bool {
        let vertex = |grove: &Grove| Some(grove.stripes.get(stripe)?.host(host)?.clone());
        let (Some(place), Some(old)) = (grove.places.get(host), vertex(grove)) else {
            return false;
        };
        let joined = place.joined;
        // Where its own shares are needed it stays; its children then go to their fallbacks by themselves.
        let is_needed = self.spare(grove, stripe) < i64::from(old.capacity);
        let is_mixed = grove
            .stripes
            .get(stripe)
            .is_some_and(|tree| tree.idle().next().is_some());
        if old.children.is_empty() || is_needed && is_mixed {
            return false;
        }
        self.vacate(grove, stripe, host);
        self.admit_as_leaf(grove, stripe, host, old.capacity, joined)
    }

    /// The free shares nearest the root: of hosts that are heard if that costs no depth, otherwise of any.
    pub(super) fn choose(&self, image: &Image, tree: &Stripe, seeker: &Seeker<'_>) -> Option<Parents> {
        let best = self.settings.policy.best_depth(tree.hosts() + 1, image.stripes);
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

    pub(super) fn is_heard(&self, host: &HostName) -> bool {
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
pub(super) fn or_origin(parents: Option<Parents>, shares: u32) -> Parents {
    parents.unwrap_or_else(|| vec![(Node::Origin(0), shares)])
}

/// The depth of a host under such parents.
fn depth_under(tree: &Stripe, parents: &Parents) -> u32 {
    let depths = parents
        .iter()
        .filter_map(|(parent, _)| Some(tree.get(parent)?.depth));
    depths.max().map_or(u32::MAX, |depth| depth.saturating_add(1))
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
