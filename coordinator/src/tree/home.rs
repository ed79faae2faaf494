//! In which stripe a host is inner, where the policy tells stripes apart, and who changes over when too few are.
//!
//! Each stripe must have as many shares as its hosts take. A host that goes takes its shares with it from one stripe
//! only, so another one may have to change its home. All of this finds nothing to do where every vertex has slots in every
//! stripe.

use treeboot_types::{HostName, StripeIndex};

use super::place::Around;
use super::{Grove, Role};

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

    /// The home of a new host: the stripe that has the fewest shares to spare.
    pub(super) fn home_for(&self, grove: &Grove, host: &HostName) -> StripeIndex {
        let stands_in = self.stands_in(grove, host);
        (0..)
            .map(StripeIndex)
            .take(stands_in)
            .min_by_key(|stripe| self.spare(grove, usize::from(stripe.0)))
            .unwrap_or_default()
    }

    /// Shares that a host offers in a stripe.
    pub(super) fn capacity(&self, grove: &Grove, stripe: usize, host: &HostName, home: StripeIndex) -> u32 {
        let weight = self.hosts.get(host).map_or(1, |h| h.info.weight);
        let index = StripeIndex(u16::try_from(stripe).unwrap_or(u16::MAX));
        let role = Role::Host { home, weight };
        self.settings
            .shares(self.settings.policy.slots(index, grove.image.stripes, role))
    }

    /// Shares that a stripe has beyond those that its hosts take; below 0 some host has none.
    pub(super) fn spare(&self, grove: &Grove, stripe: usize) -> i64 {
        let Some(tree) = grove.stripes.get(stripe) else {
            return 0;
        };
        let taken = (tree.hosts() as u64).saturating_mul(self.settings.active_parents.into());
        i64::from(tree.capacity()).saturating_sub_unsigned(taken)
    }

    /// Before a host comes: where another stripe than its home would have too few shares with it, others make that one theirs.
    pub(super) fn make_room_for(&self, grove: &mut Grove, comer: &HostName, home: StripeIndex) {
        let share = i64::from(self.settings.active_parents);
        for stripe in (0..self.stands_in(grove, comer)).filter(|stripe| *stripe != usize::from(home.0)) {
            self.provide(grove, stripe, share, comer);
        }
    }

    /// Before a host goes: where its stripe would have too few shares without it, others make it their home.
    pub(super) fn make_up_for(&self, grove: &mut Grove, leaver: &HostName) {
        let share = i64::from(self.settings.active_parents);
        for stripe in 0..grove.stripes.len() {
            let offered = grove.stripes.get(stripe).and_then(|tree| tree.host(leaver));
            if let Some(offered) = offered.map(|vertex| i64::from(vertex.capacity)) {
                self.provide(grove, stripe, offered - share, leaver);
            }
        }
    }

    /// Has hosts other than `not` change their home until a stripe can spare so many shares.
    fn provide(&self, grove: &mut Grove, stripe: usize, shares: i64, not: &HostName) {
        // Each turn gains a slot or is the last.
        for _ in 0..grove.places.len() {
            if self.spare(grove, stripe) >= shares || !self.change_home(grove, stripe, not) {
                return;
            }
        }
    }

    /// One host that is inner elsewhere, where there is more than enough, and its home: one without children if there is one,
    /// so that nobody moves.
    fn who_changes<'a>(
        &self,
        grove: &'a Grove,
        stripe: usize,
        not: &HostName,
    ) -> Option<(usize, &'a HostName)> {
        let all = grove.stripes.len();
        let others = grove.stripes.iter().enumerate().filter(|(i, _)| *i != stripe);
        let candidates = others.flat_map(|(donor, tree)| {
            let spare = self.spare(grove, donor);
            tree.host_names().filter_map(move |host| {
                let place = grove.places.get(host).filter(|place| place.stripes == all)?;
                let vertex = tree.host(host)?;
                let is_at_home = usize::from(place.home.0) == donor && host != not;
                let can_be_missed = vertex.capacity > 0 && i64::from(vertex.capacity) <= spare;
                let rank = (
                    self.dying.contains(host),
                    vertex.children.len(),
                    !self.is_heard(host),
                    u32::MAX - vertex.depth,
                    vertex.joined,
                );
                (is_at_home && can_be_missed).then_some((rank, donor, host))
            })
        });
        candidates.min().map(|(_, donor, host)| (donor, host))
    }

    /// A host makes `stripe` its home; false where nobody can.
    fn change_home(&self, grove: &mut Grove, stripe: usize, not: &HostName) -> bool {
        let Some((donor, host)) = self.who_changes(grove, stripe, not) else {
            return false;
        };
        let host = host.clone();
        let home = StripeIndex(u16::try_from(stripe).unwrap_or(u16::MAX));
        if let Some(place) = grove.places.get_mut(&host) {
            place.home = home;
        }
        let offers = [donor, stripe].map(|s| self.capacity(grove, s, &host, home));
        let has_children = |grove: &Grove| {
            let vertex = grove.stripes.get(donor).and_then(|tree| tree.host(&host));
            vertex.is_some_and(|vertex| !vertex.children.is_empty())
        };
        if has_children(grove) {
            let joined = grove.places.get(&host).map_or(0, |place| place.joined);
            self.vacate(grove, donor, &host);
            self.admit_as_leaf(grove, donor, &host, offers[0], joined);
        } else if let Some(tree) = grove.stripes.get_mut(donor) {
            tree.set_capacity(&host, offers[0]);
        }
        if let Some(tree) = grove.stripes.get_mut(stripe) {
            tree.set_capacity(&host, offers[1]);
        }
        true
    }
}
