//! How many slots a vertex has in a stripe. Where a host goes follows from that: to the free slot nearest the root.
//!
//! `striped` fits here: it gives an origin one slot a stripe, and a host all its slots in one stripe (its ordinal
//! modulo k) and none in the others.

use std::fmt;

use treeboot_types::StripeIndex;

/// Who offers slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// One of the image's origins.
    Origin,
    /// A host, with the number of its joining, by which a policy can spread hosts over stripes.
    Host {
        /// Grows with every joining.
        joined: u64,
        /// The host's own share, from 1.
        weight: u32,
    },
}

/// Shapes the trees of an image.
pub trait Policy: fmt::Debug + Send + Sync {
    /// Slots of a vertex in one of `stripes` stripes.
    fn slots(&self, stripe: StripeIndex, stripes: u16, role: Role) -> u32;

    /// The least depth of a tree of so many hosts under one origin; what rebalancing measures against.
    fn best_depth(&self, hosts: usize) -> u32;

    /// The most children that a host can have, for people.
    fn fan_out(&self) -> u32;
}

/// The same number of slots everywhere; 2 is the paper's binary tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KAry {
    /// Slots of each vertex, from 1.
    pub fan_out: u32,
}

impl Policy for KAry {
    fn slots(&self, _stripe: StripeIndex, _stripes: u16, _role: Role) -> u32 {
        self.fan_out
    }

    fn best_depth(&self, hosts: usize) -> u32 {
        if self.fan_out <= 1 {
            return u32::try_from(hosts).unwrap_or(u32::MAX);
        }
        let (mut depth, mut room, mut level) = (0, 0usize, 1usize);
        while room < hosts {
            level = level.saturating_mul(self.fan_out as usize);
            room = room.saturating_add(level);
            depth += 1;
        }
        depth
    }

    fn fan_out(&self) -> u32 {
        self.fan_out
    }
}
