//! Trees from what is known of who reads from whom: from the record after a restart, or from what the hosts say when
//! the record is lost. Nobody moves whose parents are there, have room and stand in the right scope; the rest is placed anew.

use std::collections::{BTreeMap, BTreeSet};

use treeboot_types::{HostName, StripeIndex};

use super::Grove;
use super::layer::Node;
use super::place::{Around, At, Parents};
use super::scope::Scope;

/// Where a host stands, as somebody knows it.
#[derive(Debug, Clone)]
pub(super) struct Claim {
    pub(super) scope: Scope,
    /// None where it is to be learned from who reads from it.
    pub(super) home: Option<StripeIndex>,
    pub(super) joined: u64,
    /// For each stripe that it stands in, origins and hosts with its shares of them; empty where it is to be placed anew.
    pub(super) parents: Vec<Parents>,
}

pub(super) type Claims = BTreeMap<HostName, Claim>;

/// One step of a host's way in: a member of a layer below such parents.
pub(super) struct Link {
    scope: Scope,
    member: Node,
    parents: Parents,
}

impl Around<'_> {
    /// How a host could stand below exactly these parents; none where they are not there, have no room (if that matters), or
    /// where the stripe would come into its rack or zone over a second link.
    pub(super) fn way_in(
        &self,
        grove: &Grove,
        at: At<'_>,
        host: &HostName,
        parents: &[(Node, u32)],
        needs_room: bool,
    ) -> Option<Vec<Link>> {
        let mut links = Vec::new();
        let (mut scope, mut member) = (at.scope.clone(), Node::Host(host.clone()));
        loop {
            let layer = grove.layer(at.stripe, &scope);
            let mut here = Parents::new();
            for (parent, shares) in parents {
                let node = grove.as_member(at.stripe, &scope, parent);
                let vertex = node.as_ref().and_then(|node| layer?.get(node));
                match (node, vertex) {
                    (Some(node), Some(vertex)) if !needs_room || vertex.free() >= *shares => {
                        here.push((node, *shares));
                    }
                    _ => break,
                }
            }
            if here.len() == parents.len() && !here.is_empty() {
                links.push(Link {
                    scope,
                    member,
                    parents: here,
                });
                return Some(links);
            }
            let outer = scope.outer()?;
            let is_taken = layer.is_some_and(|layer| layer.count() > 0);
            if is_taken {
                return None;
            }
            let share = self.settings.shares(1);
            links.push(Link {
                scope: scope.clone(),
                member,
                parents: vec![(Node::Entrance, share)],
            });
            member = Node::Group(scope);
            scope = outer;
        }
    }

    /// Puts a host where it was found to fit.
    pub(super) fn link_in(
        &self,
        grove: &mut Grove,
        stripe: usize,
        home: StripeIndex,
        joined: u64,
        way: Vec<Link>,
    ) {
        // The outermost first, so that each depth is known where it is built upon.
        for link in way.into_iter().rev() {
            let home = match &link.member {
                Node::Group(group) => *grove.groups.entry(group.clone()).or_insert(home),
                _ => home,
            };
            if let (Node::Group(group), Some(tree)) = (&link.member, grove.stripes.get_mut(stripe)) {
                let entrance = tree.open(group);
                entrance.insert_root(Node::Entrance, self.settings.shares(1));
            }
            let capacity = self.capacity(grove, stripe, &link.member, home);
            let at = At {
                stripe,
                scope: &link.scope,
            };
            if let Some(layer) = grove.at_mut(at) {
                layer.insert_member(&link.member, capacity, joined, link.parents);
            }
        }
    }

    /// Builds the layers of an image, whose places are noted already, from claims; returns who was placed anew somewhere.
    pub(super) fn graft(
        &self,
        grove: &mut Grove,
        claims: &mut Claims,
        needs_room: bool,
    ) -> BTreeSet<HostName> {
        self.learn_homes(grove, claims);
        for (host, claim) in claims.iter() {
            if let (Some(place), Some(home)) = (grove.places.get_mut(host), claim.home) {
                place.home = home;
            }
        }
        let mut moved = BTreeSet::new();
        for stripe in 0..grove.stripes.len() {
            let stands = claims.iter().filter(|(_, claim)| stripe < claim.parents.len());
            let mut waiting = Waiting::new(stripe, stands);
            loop {
                while let Some(host) = waiting.next_ready() {
                    let Some(claim) = claims.get(&host) else {
                        continue;
                    };
                    let parents = claim.parents.get(stripe).map_or(&[][..], Vec::as_slice);
                    let at = At {
                        stripe,
                        scope: &claim.scope,
                    };
                    match self.way_in(grove, at, &host, parents, needs_room) {
                        Some(way) => {
                            let home = claim.home.unwrap_or_default();
                            self.link_in(grove, stripe, home, claim.joined, way);
                            waiting.stands(&host);
                        }
                        None => waiting.put_off(host),
                    }
                }
                // Only when all who fit have their places does anybody get a new one.
                let Some(host) = waiting.next_misfit() else {
                    break;
                };
                if let Some(claim) = claims.get(&host) {
                    self.enter_stripe(grove, stripe, &host, claim);
                }
                waiting.stands(&host);
                moved.insert(host);
            }
            self.offer_what_is_used(grove, stripe);
        }
        moved
    }

    /// Places a host anew in one stripe.
    fn enter_stripe(&self, grove: &mut Grove, stripe: usize, host: &HostName, claim: &Claim) {
        for group in claim.scope.outward().into_iter().rev() {
            if let Some(outer) = group.outer() {
                let home = grove.groups.get(&group).copied().unwrap_or_default();
                let member = Node::Group(group);
                self.enter_scope(grove, &outer, &member, home, claim.joined, &[stripe]);
            }
        }
        let (member, home) = (Node::Host(host.clone()), claim.home.unwrap_or_default());
        self.enter_scope(grove, &claim.scope, &member, home, claim.joined, &[stripe]);
    }

    /// A changed `--fan-out` leaves places as they are.
    fn offer_what_is_used(&self, grove: &mut Grove, stripe: usize) {
        let Some(tree) = grove.stripes.get_mut(stripe) else {
            return;
        };
        let scopes: Vec<Scope> = tree.layers().map(|(scope, _)| scope.clone()).collect();
        for scope in scopes {
            if let Some(layer) = tree.layer_mut(&scope) {
                let over = layer.vertices().filter(|(_, v)| v.used > v.capacity);
                let over: Vec<(Node, u32)> = over.map(|(node, v)| (node.clone(), v.used)).collect();
                for (node, used) in over {
                    layer.set_capacity(&node, used);
                }
            }
        }
    }

    /// A host's home is where others of its rack read from it, a rack's where other racks do; who feeds nobody makes that
    /// stripe its home which has the fewest slots.
    fn learn_homes(&self, grove: &mut Grove, claims: &mut Claims) {
        let mut feeds: BTreeMap<Node, BTreeMap<usize, usize>> = BTreeMap::new();
        let mut members: BTreeMap<Scope, BTreeMap<Node, usize>> = BTreeMap::new();
        for (host, claim) in claims.iter() {
            let mut member = Node::Host(host.clone());
            for scope in claim.scope.outward() {
                let stands = members.entry(scope.clone()).or_default();
                let stands = stands.entry(member).or_default();
                *stands = (*stands).max(claim.parents.len());
                member = Node::Group(scope);
            }
            for (stripe, parents) in claim.parents.iter().enumerate() {
                let hosts = parents.iter().filter_map(|(parent, _)| match parent {
                    Node::Host(parent) => Some((parent, claims.get(parent)?)),
                    _ => None,
                });
                for (parent, above) in hosts {
                    let feeder = common_member(parent, above, claim);
                    *feeds.entry(feeder).or_default().entry(stripe).or_default() += 1;
                }
            }
        }
        for members in members.values() {
            self.learn_homes_of(grove, claims, members, &feeds);
        }
    }

    fn learn_homes_of(
        &self,
        grove: &mut Grove,
        claims: &mut Claims,
        members: &BTreeMap<Node, usize>,
        feeds: &BTreeMap<Node, BTreeMap<usize, usize>>,
    ) {
        let mut spare = vec![0i64; grove.stripes.len()];
        let mut settle =
            |grove: &mut Grove, claims: &mut Claims, member: &Node, stands: usize, home: usize| {
                let home = StripeIndex(u16::try_from(home).unwrap_or(u16::MAX));
                for (stripe, spare) in spare.iter_mut().enumerate().take(stands) {
                    *spare += i64::from(self.capacity(grove, stripe, member, home));
                    *spare -= i64::from(self.settings.active_parents);
                }
                match member {
                    Node::Host(host) => {
                        if let Some(claim) = claims.get_mut(host) {
                            claim.home = Some(home);
                        }
                    }
                    Node::Group(group) => {
                        grove.groups.insert(group.clone(), home);
                    }
                    Node::Origin(_) | Node::Entrance => {}
                }
                spare.clone()
            };
        let mut left = Vec::new();
        let mut have = vec![0i64; grove.stripes.len()];
        for (member, &stands) in members {
            let known = match member {
                Node::Host(host) => claims.get(host).and_then(|claim| claim.home),
                _ => None,
            };
            let most = || {
                let stripes = feeds.get(member)?.iter();
                let most = stripes.max_by_key(|(stripe, count)| (**count, std::cmp::Reverse(**stripe)));
                most.map(|(stripe, _)| *stripe)
            };
            match known.map(|home| usize::from(home.0)).or_else(most) {
                Some(home) => have = settle(grove, claims, member, stands, home),
                None => left.push((member, stands)),
            }
        }
        for (member, stands) in left {
            let fewest = (0..stands).min_by_key(|stripe| have.get(*stripe).copied());
            have = settle(grove, claims, member, stands, fewest.unwrap_or(0));
        }
    }
}

/// Who feeds, in the smallest scope that both stand in: the parent itself, or its rack or zone.
fn common_member(parent: &HostName, above: &Claim, below: &Claim) -> Node {
    let around = below.scope.outward();
    let mut member = Node::Host(parent.clone());
    for scope in above.scope.outward() {
        if around.contains(&scope) {
            break;
        }
        member = Node::Group(scope);
    }
    member
}

impl Grove {
    /// An origin or a host as a member of a scope; of a group only its head speaks for it.
    fn as_member(&self, stripe: usize, scope: &Scope, node: &Node) -> Option<Node> {
        let stands = self.stands(stripe, node).into_iter();
        let mut stands = stands.filter(|(at, _)| at == scope);
        stands.next().map(|(_, member)| member)
    }
}

/// Hosts of one stripe in the order in which their places can be known: parents first.
struct Waiting {
    ready: Vec<HostName>,
    /// Parents that do not stand yet.
    missing: BTreeMap<HostName, usize>,
    below: BTreeMap<HostName, Vec<HostName>>,
    misfits: BTreeSet<HostName>,
    /// Who came first is placed anew first where nothing else decides.
    order: BTreeSet<(u64, HostName)>,
    joined: BTreeMap<HostName, u64>,
}

impl Waiting {
    fn new<'a>(stripe: usize, claims: impl Iterator<Item = (&'a HostName, &'a Claim)>) -> Self {
        let claims: BTreeMap<&HostName, &Claim> = claims.collect();
        let mut waiting = Self {
            ready: Vec::new(),
            missing: BTreeMap::new(),
            below: BTreeMap::new(),
            misfits: BTreeSet::new(),
            order: BTreeSet::new(),
            joined: BTreeMap::new(),
        };
        for (&host, claim) in &claims {
            let parents = claim.parents.get(stripe).into_iter().flatten();
            let hosts = parents.filter_map(|(parent, _)| match parent {
                Node::Host(parent) => Some(parent),
                _ => None,
            });
            let mut count = 0;
            for parent in hosts {
                if !claims.contains_key(parent) {
                    // That one will never come.
                    waiting.misfits.insert(host.clone());
                }
                let below = waiting.below.entry(parent.clone()).or_default();
                below.push(host.clone());
                count += 1;
            }
            if count == 0 {
                waiting.ready.push(host.clone());
            }
            waiting.missing.insert(host.clone(), count);
            waiting.order.insert((claim.joined, host.clone()));
            waiting.joined.insert(host.clone(), claim.joined);
        }
        waiting
    }

    fn next_ready(&mut self) -> Option<HostName> {
        self.ready.pop()
    }

    fn put_off(&mut self, host: HostName) {
        self.misfits.insert(host);
    }

    /// A host has its place; those below it whose parents all have one come next.
    fn stands(&mut self, host: &HostName) {
        self.misfits.remove(host);
        if let Some(joined) = self.joined.remove(host) {
            self.order.remove(&(joined, host.clone()));
        }
        for child in self.below.remove(host).unwrap_or_default() {
            if let Some(missing) = self.missing.get_mut(&child) {
                *missing = missing.saturating_sub(1);
                if *missing == 0 && self.joined.contains_key(&child) {
                    self.ready.push(child);
                }
            }
        }
    }

    /// Who is to be placed anew next: one that does not fit, or one whose parents are not there or lead in a circle.
    fn next_misfit(&self) -> Option<HostName> {
        let in_circle = || self.order.first().map(|(_, host)| host);
        self.misfits.first().or_else(in_circle).cloned()
    }
}
