//! A target lets in hosts, not stripes of hosts. So a host that still acts on an earlier place could read one stripe from a parent that was
//! given it as a child in another stripe, and that may stand below it by now: a cycle that no tree has. Such a parent is given the
//! child only when the child says that it acts on its new place; until then the child goes to its other parents and fallbacks. The other
//! way round, a host is told of a parent that let it in before, for another stripe or where the parent stood below it, only when that
//! parent says that it acts on the place in which it has this child; until then those above the parent stand in for it.

use std::collections::BTreeSet;

use treeboot_types::{Child, Epoch, HostName, ImageId, StripeIndex, StripePlacement};

use super::layer::Node;
use super::{Forest, Grove, Place};

/// Hosts that somebody reads from, or falls back to, in a stripe. Origins are not among them: they read from nobody.
pub(super) type Paths = BTreeSet<(StripeIndex, HostName)>;

/// The hosts of a placement.
pub(super) fn paths_of(stripes: &[StripePlacement]) -> Paths {
    let mut paths = Paths::new();
    for stripe in stripes {
        let parents = stripe.active.iter().chain(&stripe.fallbacks);
        let hosts = parents
            .filter(|parent| !parent.origin)
            .filter_map(|p| p.host.clone());
        paths.extend(hosts.map(|host| (stripe.stripe, host)));
    }
    paths
}

impl Place {
    /// The host is about to be told of these parents, but for those that are held back; says whose admission of it changed
    /// with that.
    pub(super) fn bar(&mut self, stripes: &[StripePlacement]) -> BTreeSet<HostName> {
        let old = paths_of(&self.told.stripes);
        let mut new = paths_of(stripes);
        let told_soon = new.clone();
        new.extend(self.held_back.iter().cloned());
        self.stale.extend(old.difference(&told_soon).cloned());
        self.stale.retain(|path| !told_soon.contains(path));
        let is_risky = |path: &(StripeIndex, HostName)| {
            let mut stale = self.stale.iter();
            stale.any(|(stripe, host)| *host == path.1 && *stripe != path.0)
                || self.unsure && !old.contains(path)
        };
        let keeps = |path: &&(StripeIndex, HostName)| self.barred.contains(*path) || is_risky(path);
        let barred: Paths = new.iter().filter(keeps).cloned().collect();
        let differ = barred.symmetric_difference(&self.barred);
        let hosts = differ.map(|(_, host)| host.clone()).collect();
        self.barred = barred;
        hosts
    }

    /// Something of an earlier place is not over yet, so that what it is to be told, or who lets it in, may change although
    /// its place does not.
    pub(super) fn is_in_between(&self) -> bool {
        !(self.held_back.is_empty() && self.stale.is_empty() && self.barred.is_empty())
    }

    /// This host is about to be told of these children.
    pub(super) fn note_children(&mut self, children: &[Child]) {
        self.is_confirmed = false;
        let gone = self
            .told
            .children
            .iter()
            .filter(|child| !children.contains(child));
        self.lets_in
            .extend(gone.map(|child| (child.stripe, child.host.clone())));
    }

    /// Whether this host may let a new child in already, by another place than the one in which it has it in this stripe, and does not yet
    /// know of that one.
    fn is_early_for(&self, stripe: StripeIndex, child: &HostName) -> bool {
        let mut given = self.told.children.iter().filter(|given| given.host == *child);
        let knows = self.is_confirmed && given.clone().any(|given| given.stripe == stripe);
        let may_otherwise = self.lets_in_others
            || given.any(|given| given.stripe != stripe)
            || self.lets_in.iter().any(|(_, host)| host == child);
        !knows && may_otherwise
    }

    /// Whether a parent must wait before it lets this host in.
    pub(super) fn is_barred(&self, stripe: StripeIndex, parent: &HostName) -> bool {
        let mut barred = self.barred.iter();
        barred.any(|(of, host)| *of == stripe && host == parent)
    }
}

impl Grove {
    /// Of the paths that a host would be told of, those that it is not told of yet.
    pub(super) fn held_back(&self, host: &HostName, stripes: &[StripePlacement]) -> Paths {
        let Some(place) = self.places.get(host) else {
            return Paths::new();
        };
        let mut known = paths_of(&place.told.stripes);
        if place.told.epoch == Epoch::default() {
            // It reads from them already, as it says itself, and goes on if it keeps that place.
            known.extend(place.stale.iter().cloned());
        }
        let mut paths = paths_of(stripes);
        paths.retain(|path| {
            let parent = self.places.get(&path.1);
            !known.contains(path) && parent.is_some_and(|parent| parent.is_early_for(path.0, host))
        });
        paths
    }
}

impl Forest {
    /// A host says what it acts on. If that is what it was told last, nothing stands in its way any more.
    pub(super) fn acts_on(
        &mut self,
        image: &ImageId,
        host: &HostName,
        is_told: bool,
        theirs: &[StripePlacement],
    ) {
        let Some(grove) = self.images.get_mut(image) else {
            return;
        };
        let Some(place) = grove.places.get_mut(host) else {
            return;
        };
        if !is_told {
            if std::mem::take(&mut place.unsure) {
                let told = paths_of(&place.told.stripes);
                place.stale.extend(paths_of(theirs).difference(&told).cloned());
            }
            return;
        }
        place.unsure = false;
        place.is_confirmed = true;
        place.stale.clear();
        place.lets_in.clear();
        place.lets_in_others = false;
        let children: Vec<HostName> = place
            .told
            .children
            .iter()
            .map(|child| child.host.clone())
            .collect();
        let waits = |child: &HostName| {
            let place = grove.places.get(child)?;
            let mut held = place.held_back.iter();
            held.any(|(_, parent)| parent == host)
                .then(|| place.scope.clone())
        };
        let waiting: Vec<_> = children
            .iter()
            .filter_map(|child| Some((waits(child)?, child)))
            .collect();
        for (scope, child) in waiting {
            grove.touch(&scope, &Node::Host(child.clone()));
            self.changed.insert(image.clone());
        }
        let Some(place) = grove.places.get_mut(host) else {
            return;
        };
        if !std::mem::take(&mut place.barred).is_empty() {
            let scope = place.scope.clone();
            grove.touch(&scope, &Node::Host(host.clone()));
            self.changed.insert(image.clone());
            self.unsaved.insert((image.clone(), host.clone()));
        }
    }

    /// A host without a place acts on parents nevertheless.
    pub(super) fn acts_without(&mut self, image: &ImageId, host: &HostName, theirs: Paths) {
        if let Some(host) = self.hosts.get_mut(host)
            && !theirs.is_empty()
        {
            host.acts.entry(image.clone()).or_default().extend(theirs);
        }
    }
}
