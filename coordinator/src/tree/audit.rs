//! The laws, looked at slowly and obviously: no index is believed, everything is counted again.

use std::collections::{BTreeMap, BTreeSet};

use super::stripe::{Node, Stripe};
use super::{Forest, Grove};

impl Forest {
    /// Checks every law that holds at every moment.
    ///
    /// # Errors
    /// Says which law is broken, where.
    pub fn audit(&self) -> Result<(), String> {
        for (id, grove) in &self.images {
            for (index, stripe) in grove.stripes.iter().enumerate() {
                audit_stripe(grove, index, stripe).map_err(|why| format!("image {id}: {why}"))?;
            }
            for (host, place) in &grove.places {
                // No slot without a lease, and no lease without a host.
                let known = self
                    .hosts
                    .get(host)
                    .ok_or(format!("{id}: '{host}' is not known"))?;
                if place.lease_until_ms > self.clock.heard_ms.saturating_add(self.settings.lease_ms) {
                    return Err(format!("{id}: '{host}' has a lease longer than any"));
                }
                if known.lease_until_ms.saturating_add(self.settings.beat_ms * 2) < self.clock.heard_ms {
                    return Err(format!("{id}: '{host}' outlived its lease"));
                }
                if grove.is_origin(host) {
                    return Err(format!("{id}: origin '{host}' is a child"));
                }
                let (stripes, children) = self.view(grove, host);
                if place.told.stripes != stripes || place.told.children != children {
                    return Err(format!("{id}: '{host}' was told otherwise than the tree says"));
                }
                if place.told.epoch > self.epoch || place.position > place.told.epoch {
                    return Err(format!("{id}: '{host}' has an epoch from the future"));
                }
            }
        }
        for (stream, host) in &self.streams {
            if self.hosts.get(host).and_then(|h| h.stream) != Some(*stream) {
                return Err(format!("stream {} is not that of '{host}'", stream.0));
            }
        }
        Ok(())
    }

    /// Checks that no tree is deeper than the best one by more than the slack.
    ///
    /// # Errors
    /// Says which tree is.
    pub fn audit_depth(&self) -> Result<(), String> {
        for (id, grove) in &self.images {
            for stripe in &grove.stripes {
                let (deepest, hosts) = (stripe.deepest(), stripe.hosts());
                let best = self.settings.policy.best_depth(hosts, grove.image.stripes);
                if deepest > best + super::place::DEPTH_SLACK {
                    return Err(format!(
                        "{id}: {hosts} hosts at depth {deepest}; the best is {best}"
                    ));
                }
            }
        }
        Ok(())
    }
}

fn audit_stripe(grove: &Grove, index: usize, stripe: &Stripe) -> Result<(), String> {
    let vertices: BTreeMap<_, _> = stripe.vertices().collect();
    let hosts: BTreeSet<_> = vertices
        .keys()
        .filter_map(|n| match n {
            Node::Host(host) => Some(host),
            Node::Origin(_) => None,
        })
        .collect();
    let standing = grove.places.iter().filter(|(_, place)| index < place.stripes);
    let places: BTreeSet<_> = standing.map(|(host, _)| host).collect();
    let capacity: u32 = vertices.values().map(|vertex| vertex.capacity).sum();
    if capacity != stripe.capacity() {
        return Err(format!("{capacity} shares, but it says {}", stripe.capacity()));
    }
    if hosts != places || stripe.hosts() != hosts.len() {
        return Err(format!("slots of {hosts:?}, but places of {places:?}"));
    }
    for (node, vertex) in &vertices {
        let used: u32 = vertex.children.values().sum();
        if used != vertex.used || used > vertex.capacity {
            return Err(format!(
                "{node:?} gives {used} shares, says {}, has {}",
                vertex.used, vertex.capacity
            ));
        }
        for (child, shares) in &vertex.children {
            let back = stripe.host(child).and_then(|c| c.parents.get(node));
            if back != Some(shares) {
                return Err(format!("{node:?} has child '{child}', which does not know"));
            }
        }
        for (parent, shares) in &vertex.parents {
            let above = vertices.get(parent).ok_or(format!("{parent:?} is not there"))?;
            if let Node::Host(host) = node
                && above.children.get(host) != Some(shares)
            {
                return Err(format!("{node:?} reads from {parent:?}, which does not know"));
            }
            // With this for every edge there is no cycle, and going up ends at depth 0.
            if above.depth >= vertex.depth {
                return Err(format!("{node:?} at {} reads from {parent:?}", vertex.depth));
            }
        }
        let deepest = vertex
            .parents
            .keys()
            .filter_map(|p| Some(vertices.get(p)?.depth))
            .max();
        match (node, deepest) {
            (Node::Origin(_), None) if vertex.depth == 0 => {}
            (Node::Host(_), Some(deepest)) if vertex.depth == deepest + 1 => {}
            _ => {
                return Err(format!(
                    "{node:?} has depth {}, its parents {deepest:?}",
                    vertex.depth
                ));
            }
        }
        let indexed = stripe.with_room().any(|(n, _)| n == *node);
        if indexed != (vertex.free() > 0) {
            return Err(format!("{node:?} is in the wrong index"));
        }
        let is_idle = vertex.capacity == 0 && vertex.children.is_empty();
        if let Node::Host(host) = node
            && stripe.idle().any(|(at, h)| at == vertex.depth && h == host) != is_idle
        {
            return Err(format!("{node:?} is idle or not, the index says otherwise"));
        }
        if let Node::Host(host) = node
            && !stripe.level(vertex.depth).any(|h| h == host)
        {
            return Err(format!("{node:?} is not in its level"));
        }
    }
    Ok(())
}
