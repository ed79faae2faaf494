//! Where hosts stand, from their labels alone, and what that asks of the trees: one link a stripe and rack, and slots layer by layer.

use std::collections::{BTreeMap, BTreeSet};

use treeboot_coordinator::tree::{RACK_LABEL, Role, Settings, TreeView, ZONE_LABEL};
use treeboot_types::{HostName, Labels, Placement, StripeIndex};

/// Zone and rack of a host, by number; a group of hosts is written the same way. All of the fleet has neither.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Stand {
    /// Its zone.
    pub zone: Option<u16>,
    /// Its rack, which is another one in each zone.
    pub rack: Option<u16>,
}

/// Where hosts stand, as somebody knows it.
pub type Stands = BTreeMap<HostName, Stand>;

impl Stand {
    /// As labels say it.
    #[must_use]
    pub fn of(labels: &Labels) -> Self {
        let number = |key: &str| labels.get(key)?.get(1..)?.parse().ok();
        Self {
            zone: number(ZONE_LABEL),
            rack: number(RACK_LABEL),
        }
    }

    /// The labels of a host that stands here.
    #[must_use]
    pub fn labels(self) -> Labels {
        let mut labels = Labels::new();
        if let Some(zone) = self.zone {
            labels.insert(ZONE_LABEL.into(), format!("z{zone}"));
        }
        if let Some(rack) = self.rack {
            labels.insert(RACK_LABEL.into(), format!("r{rack}"));
        }
        labels
    }

    /// The zone and the rack that a host is in, outermost first, with the fleet before them.
    fn groups(self) -> impl Iterator<Item = Self> {
        let zone = self.zone.map(|_| Self { rack: None, ..self });
        let rack = self.rack.map(|_| self);
        [Some(Self::default()), zone, rack].into_iter().flatten()
    }

    fn innermost(self) -> Self {
        self.groups().last().unwrap_or_default()
    }

    /// Whether a host that stands here is in a group.
    fn is_in(self, group: Self) -> bool {
        self.groups().any(|own| own == group)
    }

    /// The smallest group that two hosts are both in.
    fn common(self, other: Self) -> Self {
        let both = self.groups().filter(|group| other.is_in(*group));
        both.last().unwrap_or_default()
    }
}

/// Children that a member of a layer may have beyond its slots, in shares. In a rack, where a second link would be worse, somebody lends
/// what cannot be had because homes cannot be even: with three stripes and more, or where hosts offer unlike numbers of slots.
fn lent(settings: &Settings, stripes: u16, group: Stand, is_odd: bool) -> u32 {
    let can_be_even = stripes < 2 || stripes == 2 && !is_odd;
    if can_be_even || group == Stand::default() {
        return 0;
    }
    2 * u32::from(stripes - 1) * settings.active_parents
}

/// Nobody has more children than slots. A host has its own slots for those beside it, and as the head of its rack or zone those of one host
/// for other racks and zones; and it is inner in its home only.
///
/// # Errors
/// The law, and what was seen.
pub fn check_slots(
    settings: &Settings,
    host: &HostName,
    weight: u32,
    placement: &Placement,
    stands: &Stands,
    is_odd: bool,
) -> Result<(), (&'static str, String)> {
    let stripes = placement.image.stripes;
    let of = |host: &HostName| stands.get(host).copied().unwrap_or_default();
    let own = of(host);
    let mut children: BTreeMap<(Stand, u16), u32> = BTreeMap::new();
    for child in placement.children.iter().filter(|child| !child.fallback) {
        *children
            .entry((own.common(of(&child.host)), child.stripe.0))
            .or_default() += 1;
    }
    let mut inner: BTreeMap<Stand, u32> = BTreeMap::new();
    for (&(group, stripe), &count) in &children {
        let is_own = group == own.innermost();
        let role = Role::Host {
            home: StripeIndex(stripe),
            weight: if is_own { weight } else { 1 },
        };
        let slots = settings.policy.slots(StripeIndex(stripe), stripes, role) * settings.active_parents;
        let most = slots + lent(settings, stripes, group, is_odd);
        if count > most {
            let why =
                format!("{host} has {count} children in stripe {stripe} of {group:?} and {most} shares");
            return Err(("nobody has more children than slots", why));
        }
        let inner = inner.entry(group).or_default();
        *inner += 1;
        if stripes > 1 && *inner > 1 && lent(settings, stripes, group, is_odd) == 0 {
            let why = format!("{host} has children in {inner} stripes: {:?}", placement.children);
            return Err(("a host is inner in its home only", why));
        }
    }
    Ok(())
}

/// A stripe comes into a rack, and into a zone, over one host.
///
/// # Errors
/// The law, and over whom it comes.
pub fn check_links(tree: &TreeView, stands: &Stands) -> Result<(), (&'static str, String)> {
    let of = |host: &HostName| stands.get(host).copied().unwrap_or_default();
    let mut heads: BTreeMap<(u16, Stand), BTreeSet<&HostName>> = BTreeMap::new();
    for vertex in tree.vertices.iter().filter(|vertex| !vertex.origin) {
        let Some(host) = &vertex.host else { continue };
        for group in of(host).groups().skip(1) {
            // An origin is nowhere; its own rack reads from it over one link too.
            let is_outside = |parent: &String| match HostName::new(parent) {
                Ok(parent) => !stands.get(&parent).is_some_and(|stand| stand.is_in(group)),
                Err(_) => true,
            };
            if vertex.parents.iter().any(is_outside) {
                heads.entry((vertex.stripe.0, group)).or_default().insert(host);
            }
        }
    }
    match heads.iter().find(|(_, heads)| heads.len() > 1) {
        None => Ok(()),
        Some(((stripe, group), heads)) => {
            let why = format!("stripe {stripe} comes into {group:?} by {heads:?}");
            Err(("a stripe comes into a rack over one link", why))
        }
    }
}

/// How deep a stripe may be: the depths of its layers put together, each with `slack` beyond the best.
#[must_use]
pub fn depth_allowed(
    settings: &Settings,
    tree: &TreeView,
    stripe: u16,
    stands: &Stands,
    slack: impl Fn(u32) -> u32,
) -> u32 {
    let mut members: BTreeMap<Stand, BTreeSet<(Stand, Option<&HostName>)>> = BTreeMap::new();
    let of_stripe = tree.vertices.iter().filter(|v| !v.origin && v.stripe.0 == stripe);
    for host in of_stripe.filter_map(|vertex| vertex.host.as_ref()) {
        let groups: Vec<Stand> = stands.get(host).copied().unwrap_or_default().groups().collect();
        for (at, group) in groups.iter().enumerate() {
            let member = match groups.get(at + 1) {
                Some(inner) => (*inner, None),
                None => (*group, Some(host)),
            };
            members.entry(*group).or_default().insert(member);
        }
    }
    let policy = &settings.policy;
    let (mut fleet, mut zones, mut racks) = (0, 0, 0);
    for (group, members) in &members {
        let (count, stripes) = (members.len(), tree.image.stripes);
        if *group == Stand::default() {
            let best = policy.best_depth(count, stripes);
            fleet = best + slack(best);
        } else {
            // Whoever stands at the entrance stands where the group does.
            let best = policy.best_depth_within(count, stripes);
            let layer = if group.rack.is_some() {
                &mut racks
            } else {
                &mut zones
            };
            *layer = (*layer).max((best + slack(best)).saturating_sub(1));
        }
    }
    fleet + zones + racks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rack_is_another_one_in_each_zone() {
        let stand = |zone, rack| Stand { zone, rack };
        let here = stand(Some(1), Some(2));
        assert_eq!(Stand::of(&here.labels()), here);
        assert_eq!(here.common(stand(Some(1), Some(3))), stand(Some(1), None));
        assert_eq!(here.common(stand(Some(2), Some(2))), Stand::default());
        assert_eq!(here.common(here), here);
        assert_eq!(stand(None, Some(2)).common(here), Stand::default());
    }
}
