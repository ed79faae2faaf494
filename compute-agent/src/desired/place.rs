//! A host's place in an image's trees, as the journal keeps it.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use treeboot_types::{
    Endpoint, Epoch, HostName, Parent, PathPolicy, Placement, StripeIndex, StripePlacement,
};

use crate::stack::{PathTo, Sources, StripePaths};

/// A parent, and where it stands in its tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlacedParent {
    /// Where to read.
    pub path: PathTo,
    /// It holds the whole image.
    pub origin: bool,
    /// Its depth; an origin has 0.
    pub depth: u32,
}

/// A host's place in one stripe's tree.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PlacedStripe {
    /// Parents that share the load.
    pub active: Vec<PlacedParent>,
    /// Where reads go when none of them answers, in this order.
    pub fallbacks: Vec<PlacedParent>,
    /// How the load is shared.
    pub policy: PathPolicy,
    /// The host's own depth.
    pub depth: u32,
}

/// A host's place in an image's trees, as the coordinator last gave it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// When it was decided.
    pub epoch: Epoch,
    /// Stripe unit in bytes.
    pub unit_bytes: u64,
    /// One for each stripe.
    pub stripes: Vec<PlacedStripe>,
    /// Who may attach here.
    pub children: BTreeSet<HostName>,
}

impl PlacedParent {
    fn of(parent: &Parent) -> Self {
        Self {
            path: PathTo {
                host: parent.host.clone(),
                endpoint: Endpoint::clone(&parent.endpoint),
            },
            origin: parent.origin,
            depth: parent.depth,
        }
    }

    fn told(&self) -> Parent {
        Parent {
            host: self.path.host.clone(),
            endpoint: Arc::new(self.path.endpoint.clone()),
            origin: self.origin,
            depth: self.depth,
        }
    }
}

impl Place {
    /// What the coordinator says, as the journal keeps it.
    pub fn of(placement: &Placement) -> Self {
        let parents = |parents: &[Parent]| parents.iter().map(PlacedParent::of).collect();
        Self {
            epoch: placement.epoch,
            unit_bytes: placement.image.stripe_unit_bytes,
            stripes: placement
                .stripes
                .iter()
                .map(|stripe| PlacedStripe {
                    active: parents(&stripe.active),
                    fallbacks: parents(&stripe.fallbacks),
                    policy: stripe.policy,
                    depth: stripe.depth,
                })
                .collect(),
            children: placement
                .children
                .iter()
                .map(|child| child.host.clone())
                .collect(),
        }
    }

    /// The stripes as they are told to the coordinator.
    pub fn told(&self) -> Vec<StripePlacement> {
        let parents = |parents: &[PlacedParent]| parents.iter().map(PlacedParent::told).collect();
        (0u16..)
            .zip(&self.stripes)
            .map(|(index, stripe)| StripePlacement {
                stripe: StripeIndex(index),
                active: parents(&stripe.active),
                fallbacks: parents(&stripe.fallbacks),
                policy: stripe.policy,
                depth: stripe.depth,
            })
            .collect()
    }

    /// The paths that follow from it.
    pub fn sources(&self) -> Sources {
        let paths = |parents: &[PlacedParent]| parents.iter().map(|p| p.path.clone()).collect();
        Sources {
            unit_bytes: self.unit_bytes,
            stripes: self
                .stripes
                .iter()
                .map(|stripe| StripePaths {
                    active: paths(&stripe.active),
                    fallbacks: paths(&stripe.fallbacks),
                    policy: stripe.policy,
                })
                .collect(),
        }
    }
}
