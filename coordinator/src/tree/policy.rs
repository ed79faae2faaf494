//! How many slots a vertex has in a stripe. Where a host goes follows from that: to the free slot nearest the root.

use std::fmt;

use treeboot_types::StripeIndex;

/// Who offers slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// One of the image's origins.
    Origin,
    /// A host.
    Host {
        /// The stripe that it is to be inner in, where the policy tells stripes apart.
        home: StripeIndex,
        /// The host's own share, from 1.
        weight: u32,
    },
}

/// Shapes the trees of an image.
pub trait Policy: fmt::Debug + Send + Sync {
    /// In how many stripes a new image is read.
    fn stripes(&self) -> u16;

    /// Slots of a vertex in one of `stripes` stripes.
    fn slots(&self, stripe: StripeIndex, stripes: u16, role: Role) -> u32;

    /// The least depth of a tree of so many hosts under one origin; what rebalancing measures against.
    fn best_depth(&self, hosts: usize, stripes: u16) -> u32;

    /// The same below the entrance of a zone or a rack, which has one slot.
    fn best_depth_within(&self, members: usize, stripes: u16) -> u32 {
        self.best_depth(members, stripes).saturating_add(1)
    }

    /// The most children that a host of weight 1 can have in a stripe, for people. The host at the entrance of a rack or a zone
    /// feeds as many others of these.
    fn fan_out(&self) -> u32;
}

/// The same number of slots everywhere, times a host's weight; 2 is the paper's binary tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KAry {
    /// Slots of each vertex, from 1.
    pub fan_out: u32,
}

impl Policy for KAry {
    fn stripes(&self) -> u16 {
        1
    }

    fn slots(&self, _stripe: StripeIndex, _stripes: u16, role: Role) -> u32 {
        match role {
            Role::Origin => self.fan_out,
            Role::Host { weight, .. } => self.fan_out.saturating_mul(weight.max(1)),
        }
    }

    fn best_depth(&self, hosts: usize, _stripes: u16) -> u32 {
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

    fn best_depth_within(&self, members: usize, stripes: u16) -> u32 {
        match members.checked_sub(1) {
            None => 0,
            Some(below) => self.best_depth(below, stripes).saturating_add(1),
        }
    }

    fn fan_out(&self) -> u32 {
        self.fan_out
    }
}

/// Each host is inner in one stripe, its home, with as many slots as there are stripes, and a leaf in the others. So a
/// host uploads an image about once, as often as it downloads it, whatever the number of hosts; and so does an origin,
/// which has one slot a stripe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Striped {
    /// Stripes of a new image, from 2.
    pub stripes: u16,
}

impl Striped {
    /// An image that is read in one stripe has a binary tree.
    const WHOLE: KAry = KAry { fan_out: 2 };

    /// Below a root with `slots` slots, inner members on top, in the stripe that has the fewest of them.
    fn depth_below(slots: usize, members: usize, stripes: u16) -> u32 {
        let each = usize::from(stripes);
        let mut inner = members / each;
        let (mut depth, mut room, mut level) = (0, 0usize, slots);
        while room < members && level > 0 {
            room = room.saturating_add(level);
            depth += 1;
            let of_level = level.min(inner);
            inner -= of_level;
            level = of_level.saturating_mul(each);
        }
        // Where homes cannot be even, somebody feeds one more than its slots are for.
        depth + u32::from(room < members)
    }
}

impl Policy for Striped {
    fn stripes(&self) -> u16 {
        self.stripes
    }

    fn slots(&self, stripe: StripeIndex, stripes: u16, role: Role) -> u32 {
        match role {
            _ if stripes < 2 => Self::WHOLE.slots(stripe, stripes, role),
            // With more than two stripes the homes may be uneven by up to so many slots.
            Role::Origin => u32::from(stripes) - 1,
            Role::Host { home, weight } if home == stripe => u32::from(stripes).saturating_mul(weight.max(1)),
            Role::Host { .. } => 0,
        }
    }

    fn best_depth(&self, hosts: usize, stripes: u16) -> u32 {
        if stripes < 2 {
            return Self::WHOLE.best_depth(hosts, stripes);
        }
        Self::depth_below(usize::from(stripes) - 1, hosts, stripes)
    }

    fn best_depth_within(&self, members: usize, stripes: u16) -> u32 {
        if stripes < 2 {
            return Self::WHOLE.best_depth_within(members, stripes);
        }
        Self::depth_below(1, members, stripes)
    }

    fn fan_out(&self) -> u32 {
        self.stripes.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn best_depths_of_stripes() {
        let policy = Striped { stripes: 2 };
        let depths: Vec<u32> = [0, 1, 2, 3, 7, 8, 15, 100, 1_000]
            .map(|n| policy.best_depth(n, 2))
            .into();
        // 1 + 2 + 4 + ... places as long as half of the hosts are enough to offer them.
        assert_eq!(depths, [0, 1, 2, 2, 3, 4, 4, 7, 10]);
        assert_eq!(policy.best_depth(14, 1), KAry { fan_out: 2 }.best_depth(14, 1));
        // Room for everybody whatever the rest of the division.
        for stripes in 2..6 {
            for hosts in 0..200 {
                let slots = (stripes as usize - 1) + hosts / stripes as usize * stripes as usize;
                assert!(slots >= hosts);
                assert!(Striped { stripes }.best_depth(hosts, stripes) < 200);
            }
        }
    }
}
