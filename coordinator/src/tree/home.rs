//! In which stripe a member of a layer is inner, where the policy tells stripes apart, and who changes over when too few are.
//!
//! Each layer must have as many shares as its members take. A host that goes takes its shares with it from one stripe
//! only, so another one may have to change its home. All of this finds nothing to do where every vertex has slots in every
//! stripe.

use std::collections::BTreeMap;

use treeboot_types::{HostName, StripeIndex};

use crate::planted::{Bug, planted};

use super::layer::Node;
use super::place::{Around, At};
use super::scope::Scope;
use super::{Grove, Role};

/// For each stripe, the shares that its layer must be able to spare.
type Needs = BTreeMap<usize, i64>;

impl Around<'_> {
    /// In how many stripes of an image a host stands: all, or the first alone where it cannot read them apart. It then
    /// reads everything from its parents there.
    pub(super) fn stands_in(&self, grove: &Grove, host: &HostName) -> usize {
        let all = grove.stripes.len();
        let splits = self
            .hosts
            .get(host)
            .is_some_and(|h| usize::from(h.info.max_stripes) >= all);
        if splits { all } else { all.min(1) }
    }

    /// The home of a newcomer that stands in so many stripes: the one that has the fewest shares to spare.
    pub(super) fn home_for(&self, grove: &Grove, scope: &Scope, stands_in: usize) -> StripeIndex {
        (0..)
            .map(StripeIndex)
            .take(stands_in)
            .min_by_key(|stripe| {
                let stripe = usize::from(stripe.0);
                self.spare(grove, At { stripe, scope })
            })
            .unwrap_or_default()
    }

    /// Shares that a member offers in a stripe. A group offers what one host would.
    pub(super) fn capacity(&self, grove: &Grove, stripe: usize, member: &Node, home: StripeIndex) -> u32 {
        let weight = match member {
            Node::Host(host) => self.hosts.get(host).map_or(1, |h| h.info.weight),
            _ => 1,
        };
        let index = StripeIndex(u16::try_from(stripe).unwrap_or(u16::MAX));
        let role = Role::Host { home, weight };
        self.settings
            .shares(self.settings.policy.slots(index, grove.image.stripes, role))
    }

    /// Shares that a layer has beyond those that its members take; below 0 some member has none.
    pub(super) fn spare(&self, grove: &Grove, at: At<'_>) -> i64 {
        let Some(tree) = grove.at(at) else {
            return 0;
        };
        let taken = (tree.count() as u64).saturating_mul(self.settings.active_parents.into());
        i64::from(tree.capacity()).saturating_sub_unsigned(taken)
    }

    /// Before a member comes: where another stripe than its home would have too few shares with it, others make that one theirs.
    pub(super) fn make_room_for(
        &self,
        grove: &mut Grove,
        scope: &Scope,
        comer: &Node,
        home: StripeIndex,
        stripes: &[usize],
    ) {
        let share = i64::from(self.settings.active_parents);
        let others = stripes.iter().filter(|stripe| **stripe != usize::from(home.0));
        let needs = others.map(|stripe| (*stripe, share)).collect();
        self.make_room(grove, scope, comer, &needs);
    }

    /// In several stripes at once: what one of them needs is not taken from it for another.
    fn make_room(&self, grove: &mut Grove, scope: &Scope, not: &Node, needs: &Needs) {
        for &stripe in needs.keys() {
            self.provide(grove, At { stripe, scope }, needs, not);
        }
        for (&stripe, &shares) in needs {
            self.lend(grove, At { stripe, scope }, shares, not);
        }
    }

    /// Before a member goes from some stripes: where there would be too few shares without it, others make it their home.
    pub(super) fn make_up_for(&self, grove: &mut Grove, scope: &Scope, leaver: &Node, stripes: &[usize]) {
        let share = i64::from(self.settings.active_parents);
        let offers = |grove: &Grove, at: At<'_>| -> Option<i64> {
            let offered = grove.at(at).and_then(|tree| tree.get(leaver));
            offered.map(|vertex| i64::from(vertex.capacity) - share)
        };
        let needs = stripes
            .iter()
            .filter_map(|&stripe| Some((stripe, offers(grove, At { stripe, scope })?)))
            .collect();
        self.make_room(grove, scope, leaver, &needs);
    }

    /// Before a member goes from some stripes and stays in others, as a rack does when those hosts go that can read stripes apart:
    /// it is inner in one where it stays, or it would take shares there and offer none anywhere.
    pub(super) fn stay_inner(&self, grove: &mut Grove, scope: &Scope, member: &Node, goes_from: &[usize]) {
        let stays = |stripe: &usize| {
            let layer = grove.layer(*stripe, scope);
            !goes_from.contains(stripe) && layer.is_some_and(|layer| layer.get(member).is_some())
        };
        let is_homeless = grove
            .home(member)
            .is_some_and(|home| goes_from.contains(&home.0.into()));
        let others = (0..grove.stripes.len()).filter(stays);
        let Some(stripe) = others.min_by_key(|&stripe| self.spare(grove, At { stripe, scope })) else {
            return;
        };
        if is_homeless {
            let home = StripeIndex(u16::try_from(stripe).unwrap_or(u16::MAX));
            grove.set_home(member, home);
            let offers = self.capacity(grove, stripe, member, home);
            if let Some(tree) = grove.at_mut(At { stripe, scope }) {
                tree.set_capacity(member, offers);
            }
        }
    }

    /// Has members other than `not` change their home until a layer can spare the shares that are needed of it.
    fn provide(&self, grove: &mut Grove, at: At<'_>, needs: &Needs, not: &Node) {
        let shares = needs.get(&at.stripe).copied().unwrap_or(0);
        // Each turn gains a slot or is the last.
        for _ in 0..grove.places.len() {
            if self.spare(grove, at) >= shares || !self.change_home(grove, at, needs, not) {
                return;
            }
        }
    }

    /// Where no home could change, somebody in the rack feeds more than its slots are for: links into a rack are scarcer. It
    /// happens with three stripes and more, where homes cannot be even.
    fn lend(&self, grove: &mut Grove, at: At<'_>, shares: i64, not: &Node) {
        let missing = u32::try_from(shares - self.spare(grove, at)).unwrap_or(0);
        if missing == 0 || *at.scope == Scope::Fleet {
            return;
        }
        if let Some(tree) = grove.at_mut(at) {
            let offers = |member: &&Node| tree.get(member).is_some_and(|v| v.capacity > 0);
            let others = || tree.members().filter(|member| *member != not);
            let lender = others().find(offers).or_else(|| others().next()).cloned();
            if let Some(lender) = lender {
                let offered = tree.get(&lender).map_or(0, |v| v.capacity);
                tree.set_capacity(&lender, offered.saturating_add(missing));
            }
        }
    }

    /// One member that is inner elsewhere, where there is more than enough, and its home: one without children if there is one,
    /// so that nobody moves.
    fn who_changes<'a>(
        &self,
        grove: &'a Grove,
        at: At<'_>,
        needs: &Needs,
        not: &Node,
    ) -> Option<(usize, &'a Node)> {
        let all = grove.stripes.len();
        let others = (0..all).filter(|stripe| *stripe != at.stripe);
        let candidates = others.filter_map(|donor| {
            let from = At { stripe: donor, ..at };
            let needed = needs.get(&donor).copied().unwrap_or(0).max(0);
            let (tree, spare) = (grove.at(from)?, self.spare(grove, from) - needed);
            // Nobody can be missed where there is nothing to spare, and then nobody need be asked.
            (spare > 0).then_some((donor, tree, spare))
        });
        let candidates = candidates.flat_map(|(donor, tree, spare)| {
            tree.members().filter_map(move |member| {
                if grove.stands_in(member) != all {
                    return None;
                }
                let vertex = tree.get(member)?;
                let home = grove.home(member)?;
                let is_at_home = usize::from(home.0) == donor && member != not;
                let can_be_missed = vertex.capacity > 0 && i64::from(vertex.capacity) <= spare;
                let rank = (
                    self.is_dying(member),
                    vertex.children.len(),
                    !self.is_heard(member),
                    u32::MAX - vertex.depth,
                    vertex.joined,
                );
                (is_at_home && can_be_missed).then_some((rank, donor, member))
            })
        });
        candidates.min().map(|(_, donor, member)| (donor, member))
    }

    /// A member makes a stripe its home; false where nobody can.
    fn change_home(&self, grove: &mut Grove, at: At<'_>, needs: &Needs, not: &Node) -> bool {
        let Some((donor, member)) = self.who_changes(grove, at, needs, not) else {
            return false;
        };
        let (member, from) = (member.clone(), At { stripe: donor, ..at });
        let home = StripeIndex(u16::try_from(at.stripe).unwrap_or(u16::MAX));
        grove.set_home(&member, home);
        let offers = [donor, at.stripe].map(|stripe| self.capacity(grove, stripe, &member, home));
        let vertex = grove.at(from).and_then(|tree| tree.get(&member));
        let joined = vertex
            .filter(|vertex| !vertex.children.is_empty() && !planted(Bug::HomeWithChildren))
            .map(|v| v.joined);
        if let Some(joined) = joined {
            self.vacate(grove, from, &member);
            self.admit_as_leaf(grove, from, &member, offers[0], joined);
        } else if let Some(tree) = grove.at_mut(from) {
            tree.set_capacity(&member, offers[0]);
        }
        if let Some(tree) = grove.at_mut(at) {
            tree.set_capacity(&member, offers[1]);
        }
        true
    }
}

impl Grove {
    /// The stripe that a member is inner in.
    pub(super) fn home(&self, member: &Node) -> Option<StripeIndex> {
        match member {
            Node::Host(host) => self.places.get(host).map(|place| place.home),
            Node::Group(group) => self.groups.get(group).copied(),
            Node::Origin(_) | Node::Entrance => None,
        }
    }

    fn set_home(&mut self, member: &Node, home: StripeIndex) {
        match member {
            Node::Host(host) => {
                if let Some(place) = self.places.get_mut(host) {
                    place.home = home;
                }
                // Read from the record after a restart, so it must stand there.
                self.changed_homes.insert(host.clone());
            }
            Node::Group(group) => {
                self.groups.insert(group.clone(), home);
            }
            Node::Origin(_) | Node::Entrance => {}
        }
    }

    /// In how many stripes a member stands.
    pub(super) fn stands_in(&self, member: &Node) -> usize {
        match member {
            Node::Host(host) => self.places.get(host).map_or(0, |place| place.stripes),
            Node::Group(group) => {
                let outer = group.outer().unwrap_or(Scope::Fleet);
                let stands = |stripe: &usize| {
                    let layer = self.layer(*stripe, &outer);
                    layer.is_some_and(|layer| layer.get(member).is_some())
                };
                (0..self.stripes.len()).filter(stands).count()
            }
            Node::Origin(_) | Node::Entrance => 0,
        }
    }
}
