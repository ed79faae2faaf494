//! Where hosts go: into the free slot nearest the root; and who moves when one goes: as few as keep the tree shallow.
//!
//! A host moves upwards or sideways only, or it is a leaf. So a host that takes a new place never has children whose
//! edge would lead to a smaller depth no longer.

use std::collections::{BTreeMap, BTreeSet};

use treeboot_types::{AttachState, HostName, Image, Labels, StripeIndex};

use crate::planted::{Bug, planted};

use super::layer::{Layer, Node, Taken};
use super::scope::{RACK_LABEL, Scope, ZONE_LABEL};
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

/// One layer of an image's trees.
#[derive(Clone, Copy)]
pub(super) struct At<'a> {
    pub(super) stripe: usize,
    pub(super) scope: &'a Scope,
}

/// Who looks for shares.
pub(super) struct Seeker<'a> {
    pub(super) member: &'a Node,
    pub(super) wanted: u32,
    /// Greatest depth of a parent.
    pub(super) limit: u32,
    /// Vertices that cannot be its parents: itself, those below, and those that it has already.
    pub(super) not: &'a BTreeSet<Node>,
    pub(super) prefers: Prefers,
}

/// What counts for more where not both can be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Prefers {
    /// A parent that is heard, as long as the tree does not get too deep with that.
    Heard,
    /// A place near the root.
    Shallow,
}

pub(super) type Parents = Vec<(Node, u32)>;

impl Around<'_> {
    /// Gives a new host a place in one stripe; false where there is no room at all.
    pub(super) fn admit(
        &self,
        grove: &mut Grove,
        at: At<'_>,
        member: &Node,
        home: StripeIndex,
        joined: u64,
    ) -> bool {
        let capacity = self.capacity(grove, at.stripe, member, home);
        let image = grove.image.clone();
        let Some(tree) = grove.at_mut(at) else {
            return false;
        };
        let is_placed = self.put(&image, tree, member, (capacity, joined), Prefers::Heard);
        // Finds nothing to do, but where silent hosts were passed over while shares ran out near the root.
        self.rebalance(grove, at);
        is_placed
    }

    /// Gives a host a place where it takes nobody's; false where there is no room at all.
    pub(super) fn admit_as_leaf(
        &self,
        grove: &mut Grove,
        at: At<'_>,
        member: &Node,
        capacity: u32,
        joined: u64,
    ) -> bool {
        let image = grove.image.clone();
        let Some(tree) = grove.at_mut(at) else {
            return false;
        };
        let is_placed = self.put_free(&image, tree, member, (capacity, joined), Prefers::Heard);
        self.rebalance(grove, at);
        is_placed
    }

    /// Puts a host where it is nearest the root: into free shares, or, if it offers shares itself, into those of a host
    /// that offers none, which then goes one level down.
    pub(super) fn put(
        &self,
        image: &Image,
        tree: &mut Layer,
        member: &Node,
        (capacity, joined): (u32, u64),
        prefers: Prefers,
    ) -> bool {
        let free = self.choose(image, tree, &self.newcomer(member, &BTreeSet::new(), prefers));
        let depth = free.as_ref().map(|parents| depth_under(tree, parents));
        let Some(leaf) = self.idle_above(image, tree, member, depth, capacity) else {
            return self.put_free(image, tree, member, (capacity, joined), prefers);
        };
        let Some(taken) = tree.take(&leaf) else {
            return false;
        };
        tree.insert_member(member, capacity, joined, taken.parents);
        self.put_free(image, tree, &leaf, (taken.capacity, taken.joined), prefers)
    }

    /// Puts a host into the free shares nearest the root; false where there are too few.
    fn put_free(
        &self,
        image: &Image,
        tree: &mut Layer,
        member: &Node,
        (capacity, joined): (u32, u64),
        prefers: Prefers,
    ) -> bool {
        let not = BTreeSet::from([member.clone()]);
        match self.choose(image, tree, &self.newcomer(member, &not, prefers)) {
            Some(parents) => {
                tree.insert_member(member, capacity, joined, parents);
                true
            }
            None => false,
        }
    }

    fn newcomer<'a>(&self, member: &'a Node, not: &'a BTreeSet<Node>, prefers: Prefers) -> Seeker<'a> {
        Seeker {
            member,
            wanted: self.settings.active_parents,
            limit: u32::MAX,
            not,
            prefers,
        }
    }

    /// The host nearest the root that offers no shares, above `depth`, if `host` offers some and can take its place.
    pub(super) fn idle_above(
        &self,
        image: &Image,
        tree: &Layer,
        member: &Node,
        depth: Option<u32>,
        capacity: u32,
    ) -> Option<Node> {
        if capacity < self.settings.active_parents {
            return None;
        }
        let idle = || {
            let above = tree
                .idle()
                .take_while(|(at, _)| depth.is_none_or(|depth| *at < depth));
            above.map(|(_, leaf)| leaf)
        };
        let suits = |leaf: &&Node| {
            let parents = tree.get(leaf).map(|vertex| vertex.parents.keys());
            parents.is_some_and(|mut parents| parents.all(|parent| self.is_fit(image, parent, member)))
        };
        let suitable = idle().find(suits);
        // Where there is no free share, under whom matters less than that there is a place.
        suitable
            .or_else(|| idle().next().filter(|_| depth.is_none()))
            .cloned()
    }

    /// Takes a host out of a stripe and gives its children other parents with the fewest moves.
    pub(super) fn vacate(&self, grove: &mut Grove, at: At<'_>, member: &Node) {
        let image = grove.image.clone();
        let Some(tree) = grove.at_mut(at) else {
            return;
        };
        let Some(taken) = tree.take(member) else {
            return;
        };
        let is_inner =
            |tree: &Layer, orphan: &Node| tree.get(orphan).is_some_and(|vertex| !vertex.children.is_empty());
        let (inner, leaves): (Vec<_>, Vec<_>) = taken
            .orphans
            .clone()
            .into_iter()
            .partition(|(orphan, _)| is_inner(tree, orphan));
        let needed: u32 = inner.iter().map(|(_, shares)| shares).sum();
        if self.room_up_to(tree, taken.depth, needed) || !self.fill(grove, at, &taken) {
            let mut all_placed = true;
            for (orphan, shares) in inner {
                all_placed &= self.reattach(&image, grove, at, &orphan, shares, taken.depth);
            }
            for (orphan, shares) in leaves {
                all_placed &= self.reattach(&image, grove, at, &orphan, shares, u32::MAX);
            }
            if !all_placed && let Some(tree) = grove.at_mut(at) {
                self.replant(&image, tree, 0);
            }
        }
        if planted(Bug::MovesEverybody)
            && let Some(tree) = grove.at_mut(at)
        {
            self.replant(&image, tree, 0);
        }
        self.rebalance(grove, at);
    }

    /// Whether so many shares are free no deeper than `depth`.
    fn room_up_to(&self, tree: &Layer, depth: u32, needed: u32) -> bool {
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
    fn fill(&self, grove: &mut Grove, at: At<'_>, taken: &Taken) -> bool {
        let image = grove.image.clone();
        let needed: u32 = taken.orphans.values().sum();
        let Some(filler) = self.member_to_move(grove, at, |member| {
            let own = taken.orphans.get(member).copied();
            (own.is_some(), needed - own.unwrap_or(0))
        }) else {
            return false;
        };
        let Some(tree) = grove.at_mut(at) else {
            return false;
        };
        let Some(place) = tree.take(&filler) else {
            return false;
        };
        tree.insert_member(&filler, place.capacity, place.joined, taken.parents.clone());
        for (orphan, &shares) in taken.orphans.iter().filter(|(orphan, _)| **orphan != filler) {
            tree.link(orphan, &filler, shares);
        }
        // Leaves, all of them: what the filler left is free, so there is room.
        let mut all_placed = true;
        for (orphan, shares) in place.orphans {
            all_placed &= self.reattach(&image, grove, at, &orphan, shares, u32::MAX);
        }
        if !all_placed && let Some(tree) = grove.at_mut(at) {
            self.replant(&image, tree, 0);
        }
        true
    }

    /// Who goes up into the place of an inner host: a deepest leaf, or where no leaf offers enough shares, as they do not in a
    /// stripe that is not their home, a deepest inner host whose children are all leaves. `asks` tells of a host whether it
    /// must move anyway, and what it must carry; one that must move anyway, that is alive and ready, goes rather than another.
    fn member_to_move(&self, grove: &Grove, at: At<'_>, asks: impl Fn(&Node) -> (bool, u32)) -> Option<Node> {
        let tree = grove.at(at)?;
        let is_leaf = |member: &Node| tree.get(member).is_some_and(|v| v.children.is_empty());
        let of_level = |depth: u32, with_leaves: bool| {
            let members = tree.level(depth).filter_map(|member| {
                let vertex = tree.get(member)?;
                let (must_move, carries) = asks(member);
                let fits = vertex.capacity >= carries
                    && vertex.children.is_empty() != with_leaves
                    && vertex.children.keys().all(is_leaf);
                let rank = (
                    self.is_dying(member),
                    !self.is_heard(member),
                    !must_move,
                    !grove.is_ready(member),
                );
                fits.then_some((rank, vertex.joined, member))
            });
            members.min().map(|(_, _, member)| member.clone())
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
        at: At<'_>,
        member: &Node,
        shares: u32,
        limit: u32,
    ) -> bool {
        let Some(tree) = grove.at_mut(at) else {
            return false;
        };
        let mut not: BTreeSet<Node> = if limit == u32::MAX {
            tree.below(member)
        } else {
            BTreeSet::new()
        };
        not.insert(member.clone());
        let with_parents: BTreeSet<Node> = tree
            .get(member)
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
            member,
            wanted: shares,
            limit,
            not,
            prefers: Prefers::Heard,
        };
        let mut parents = self
            .choose(image, tree, &seeker(&with_parents, limit))
            .or_else(|| self.choose(image, tree, &seeker(&not, limit)));
        if parents.is_none() {
            // Nowhere near its old depth: anywhere that is not below it. Its subtree sinks with it.
            let mut anywhere = not.clone();
            anywhere.extend(tree.below(member));
            parents = self.choose(image, tree, &seeker(&anywhere, u32::MAX));
        }
        let is_placed = parents.is_some();
        for (parent, shares) in or_root(tree, parents, shares) {
            tree.link(member, &parent, shares);
        }
        is_placed
    }

    /// Moves a host away from one of its parents, where there is room; true if it moved. A leaf may go anywhere; an
    /// inner host not deeper, so that its children keep their place.
    pub(super) fn move_away(&self, grove: &mut Grove, at: At<'_>, member: &Node, from: &Node) -> bool {
        let image = grove.image.clone();
        let best = self.best_depth(grove, at);
        let Some(tree) = grove.at_mut(at) else {
            return false;
        };
        let Some(vertex) = tree.get(member) else {
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
        let not = BTreeSet::from([from.clone(), member.clone()]);
        let seeker = Seeker {
            member,
            wanted: shares,
            limit,
            not: &not,
            prefers: Prefers::Heard,
        };
        let Some(parents) =
            self.choose_where(&image, tree, &seeker, |node| self.is_fit(&image, node, member))
        else {
            return false;
        };
        tree.unlink(member, from);
        for (parent, shares) in parents {
            tree.link(member, &parent, shares);
        }
        self.rebalance(grove, at);
        true
    }

    /// Takes a host's children away by putting a deepest leaf in its place; the host becomes a leaf. False where nobody can
    /// stand there.
    pub(super) fn demote(&self, grove: &mut Grove, at: At<'_>, member: &Node) -> bool {
        let Some(old) = grove.at(at).and_then(|tree| tree.get(member)).cloned() else {
            return false;
        };
        // Where its own shares are needed it stays; its children then go to their fallbacks by themselves.
        let is_needed = self.spare(grove, at) < i64::from(old.capacity);
        let is_mixed = grove.at(at).is_some_and(|tree| tree.idle().next().is_some());
        if old.children.is_empty() || is_needed && is_mixed {
            return false;
        }
        self.vacate(grove, at, member);
        self.admit_as_leaf(grove, at, member, old.capacity, old.joined)
    }

    /// The free shares nearest the root: of hosts that are heard if the tree does not get too deep with that, or if that costs no
    /// depth at all where the seeker would rather stand near the root; otherwise of any.
    pub(super) fn choose(&self, image: &Image, tree: &Layer, seeker: &Seeker<'_>) -> Option<Parents> {
        let best = self.best_depth_of(tree, tree.count() + 1, image.stripes);
        let near = Seeker {
            limit: seeker.limit.min(best),
            ..*seeker
        };
        let heard = self.choose_where(image, tree, &near, |node| self.is_fit(image, node, seeker.member));
        if heard.is_some() && seeker.prefers == Prefers::Heard {
            return heard;
        }
        let alive = self
            .choose_where(image, tree, seeker, |node| !self.is_dying(node))
            .or_else(|| self.choose_where(image, tree, seeker, |_| true));
        let depth = |parents: &Option<Parents>| parents.as_ref().map(|p| depth_under(tree, p));
        if heard.is_some() && depth(&heard) <= depth(&alive) {
            heard
        } else {
            alive
        }
    }

    fn choose_where(
        &self,
        image: &Image,
        tree: &Layer,
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
            Node::Origin(index) => (0, self.distance(image, *index, seeker.member)),
            _ => (1, 0),
        });
        Some(spread(&found, wanted))
    }

    /// How far an origin is from a host or a group: 0 in its rack, 1 in its zone, 2 elsewhere.
    pub(super) fn distance(&self, image: &Image, origin: u16, member: &Node) -> u8 {
        let labels_of = |host: &HostName| self.hosts.get(host).map(|h| &h.info.labels);
        let Some(origin) = image.origins.get(usize::from(origin)) else {
            return 2;
        };
        let of_agent = origin.host.as_ref().and_then(labels_of);
        let theirs = Stand::labelled(if origin.labels.is_empty() {
            of_agent.unwrap_or(&origin.labels)
        } else {
            &origin.labels
        });
        let own = match member {
            Node::Host(host) => labels_of(host).map(Stand::labelled).unwrap_or_default(),
            Node::Group(Scope::Rack(zone, rack)) => Stand {
                zone: zone.as_deref(),
                rack: Some(rack),
            },
            Node::Group(Scope::Zone(zone)) => Stand {
                zone: Some(zone),
                rack: None,
            },
            Node::Group(Scope::Fleet) | Node::Origin(_) | Node::Entrance => Stand::default(),
        };
        let equal = |a: Option<&str>, b: Option<&str>| a.is_some() && a == b;
        let (zone, rack) = (equal(own.zone, theirs.zone), equal(own.rack, theirs.rack));
        // Racks are numbered anew in each zone, so an equal rack counts where the zones do not differ.
        let one_zone = zone || own.zone.is_none() || theirs.zone.is_none();
        match (rack && one_zone, zone) {
            (true, _) => 0,
            (false, true) => 1,
            (false, false) => 2,
        }
    }

    /// Whether a host's stream is open; of a group somebody's is.
    pub(super) fn is_heard(&self, node: &Node) -> bool {
        match node {
            Node::Host(host) => self.hosts.get(host).is_some_and(|h| h.stream.is_some()),
            Node::Group(_) | Node::Entrance | Node::Origin(_) => true,
        }
    }

    pub(super) fn is_dying(&self, node: &Node) -> bool {
        matches!(node, Node::Host(host) if self.dying.contains(host))
    }

    /// Alive, and not one that the seeker complained of.
    fn is_fit(&self, image: &Image, node: &Node, seeker: &Node) -> bool {
        let agent = match node {
            Node::Host(name) => Some(name),
            Node::Origin(index) => {
                let origin = image.origins.get(usize::from(*index));
                origin.and_then(|o| o.host.as_ref())
            }
            // Who stands at its head changes where that one is no good.
            Node::Group(_) | Node::Entrance => return true,
        };
        let avoided = match seeker {
            Node::Host(host) => self
                .hosts
                .get(host)
                .is_some_and(|h| h.avoids.contains(&agent.cloned())),
            _ => false,
        };
        let is_heard = |name: &HostName| self.hosts.get(name).is_some_and(|h| h.stream.is_some());
        !self.is_dying(node) && !avoided && agent.is_none_or(is_heard)
    }
}

/// Where something stands, as labels say; an empty one says nothing.
#[derive(Clone, Copy, Default)]
struct Stand<'a> {
    zone: Option<&'a str>,
    rack: Option<&'a str>,
}

impl<'a> Stand<'a> {
    fn labelled(labels: &'a Labels) -> Self {
        let label = |key: &str| labels.get(key).map(String::as_str).filter(|v| !v.is_empty());
        Self {
            zone: label(ZONE_LABEL),
            rack: label(RACK_LABEL),
        }
    }
}

impl Grove {
    pub(super) fn at(&self, at: At<'_>) -> Option<&Layer> {
        self.layer(at.stripe, at.scope)
    }

    pub(super) fn at_mut(&mut self, at: At<'_>) -> Option<&mut Layer> {
        self.layer_mut(at.stripe, at.scope)
    }

    /// Whether a host's export is up; a group is as ready as it will be.
    pub(super) fn is_ready(&self, member: &Node) -> bool {
        match member {
            Node::Host(host) => self.places.get(host).map(|p| p.state) == Some(AttachState::Ready),
            _ => true,
        }
    }
}

/// Where a policy has no room at all, reaching an origin matters more than the origin's fan-out.
pub(super) fn or_root(tree: &Layer, parents: Option<Parents>, shares: u32) -> Parents {
    parents.unwrap_or_else(|| {
        tree.root()
            .map(|root| (root.clone(), shares))
            .into_iter()
            .collect()
    })
}

/// The depth of a host under such parents.
fn depth_under(tree: &Layer, parents: &Parents) -> u32 {
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
