//! Where hosts stand beside each other: the fleet, its zones, their racks. A tree is made of layers, one a scope: in the fleet's
//! layer zones and racks stand like hosts, in a rack's layer its hosts. So the rules of placing know nothing of racks, and
//! a stripe comes into a rack over its entrance, which has one slot.

use std::sync::Arc;

use treeboot_types::Labels;

/// The label that names a host's rack; racks of one name in different zones are different racks.
pub const RACK_LABEL: &str = "rack";
/// The label that names a host's zone.
pub const ZONE_LABEL: &str = "zone";

/// A part of the fleet whose members feed each other.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Scope {
    /// All of it.
    Fleet,
    /// Hosts and racks with one `zone`.
    Zone(Arc<str>),
    /// Hosts with one `rack`, in a zone or in none.
    Rack(Option<Arc<str>>, Arc<str>),
}

impl Scope {
    /// Where a host with such labels is a member. An empty label is none.
    pub(super) fn of(labels: &Labels) -> Self {
        let label = |key: &str| labels.get(key).filter(|value| !value.is_empty());
        let label = |key: &str| label(key).map(|value| Arc::from(value.as_str()));
        match (label(ZONE_LABEL), label(RACK_LABEL)) {
            (zone, Some(rack)) => Self::Rack(zone, rack),
            (Some(zone), None) => Self::Zone(zone),
            (None, None) => Self::Fleet,
        }
    }

    /// The scope that this one is a member of; none for the fleet.
    pub(super) fn outer(&self) -> Option<Self> {
        match self {
            Self::Fleet => None,
            Self::Rack(Some(zone), _) => Some(Self::Zone(zone.clone())),
            Self::Zone(_) | Self::Rack(None, _) => Some(Self::Fleet),
        }
    }

    /// This scope and those around it, from here outward; the fleet is the last.
    pub(super) fn outward(&self) -> Vec<Self> {
        let mut all = vec![self.clone()];
        while let Some(outer) = all.last().and_then(Self::outer) {
            all.push(outer);
        }
        all
    }
}
