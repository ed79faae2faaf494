//! The laws, looked at slowly and obviously: no index is believed, everything is counted again.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use super::layer::{Layer, Node, Vertex};
use super::place::Around;
use super::scope::Scope;
use super::{Forest, Grove};

impl Forest {
    /// Checks every law that holds at every moment.
    ///
    /// # Errors
    /// Says which law is broken, where.
    pub fn audit(&self) -> Result<(), String> {
        for (id, grove) in &self.images {
            for stripe in 0..grove.stripes.len() {
                audit_layers(grove, stripe).map_err(|why| format!("image {id}: {why}"))?;
                audit_links(grove, stripe).map_err(|why| format!("image {id}: {why}"))?;
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
                if place.scope != Scope::of(&known.info.labels) {
                    return Err(format!("{id}: '{host}' stands in another rack than it is in"));
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

    /// Checks that no layer is deeper than the best one by more than the slack. A host's depth is that of its rack among the racks
    /// and its own within the rack, so it is at most the sum of the best depths of both and twice the slack, less the entrance.
    ///
    /// # Errors
    /// Says which tree is.
    pub fn audit_depth(&self) -> Result<(), String> {
        let around = Around {
            hosts: &self.hosts,
            dying: &self.dying,
            settings: &self.settings,
        };
        for (id, grove) in &self.images {
            for (scope, layer) in grove.stripes.iter().flat_map(|stripe| stripe.layers()) {
                let (deepest, members) = (layer.deepest(), layer.count());
                let best = around.best_depth_of(layer, members, grove.image.stripes);
                if deepest > best + super::place::DEPTH_SLACK {
                    return Err(format!(
                        "{id}: {members} members of {scope:?} at depth {deepest}; the best is {best}"
                    ));
                }
            }
        }
        Ok(())
    }
}

/// Hosts stand in exactly the layers that their places say, and groups where hosts are.
fn audit_layers(grove: &Grove, stripe: usize) -> Result<(), String> {
    let mut expected: BTreeMap<Scope, BTreeSet<Node>> = BTreeMap::from([(Scope::Fleet, BTreeSet::new())]);
    let standing = grove.places.iter().filter(|(_, place)| stripe < place.stripes);
    for (host, place) in standing {
        let mut member = Node::Host(host.clone());
        for scope in place.scope.outward() {
            expected.entry(scope.clone()).or_default().insert(member);
            member = Node::Group(scope);
        }
    }
    let Some(tree) = grove.stripes.get(stripe) else {
        return Err("a stripe is missing".into());
    };
    let scopes: BTreeSet<&Scope> = tree.layers().map(|(scope, _)| scope).collect();
    if scopes != expected.keys().collect() {
        return Err(format!("layers of {scopes:?}, but places in {expected:?}"));
    }
    for (scope, layer) in tree.layers() {
        let members: BTreeSet<Node> = layer.members().cloned().collect();
        if expected.get(scope) != Some(&members) || layer.count() != members.len() {
            return Err(format!("{scope:?} has {members:?}, but places say {expected:?}"));
        }
        audit_layer(layer).map_err(|why| format!("{scope:?}: {why}"))?;
    }
    Ok(())
}

/// What layers come to when they are put together: depths fall along every edge, children know their parents, and a stripe
/// comes into a rack or a zone over one link.
fn audit_links(grove: &Grove, stripe: usize) -> Result<(), String> {
    let mut crossings: BTreeMap<Scope, BTreeSet<&str>> = BTreeMap::new();
    let standing = grove.places.iter().filter(|(_, place)| stripe < place.stripes);
    for (host, place) in standing {
        let node = Node::Host(host.clone());
        let depth = grove
            .depth(stripe, &node)
            .ok_or(format!("'{host}' has no depth"))?;
        let parents = grove.parents(stripe, &node);
        if parents.is_empty() {
            return Err(format!("'{host}' reads from nobody"));
        }
        for parent in parents.keys() {
            let above = grove
                .depth(stripe, parent)
                .ok_or(format!("{parent:?} has no depth"))?;
            if above >= depth {
                return Err(format!("'{host}' at {depth} reads from {parent:?} at {above}"));
            }
            if !grove.children(stripe, parent).contains(&node) {
                return Err(format!("{parent:?} has child '{host}', which it does not know"));
            }
            let around = match parent {
                Node::Host(parent) => grove.scope_of(parent).map(Scope::outward).unwrap_or_default(),
                _ => vec![Scope::Fleet],
            };
            for scope in place.scope.outward().into_iter().filter(|s| !around.contains(s)) {
                crossings.entry(scope).or_default().insert(host.as_str());
            }
        }
    }
    match crossings.iter().find(|(_, heads)| heads.len() > 1) {
        Some((scope, heads)) => Err(format!("stripe {stripe} comes into {scope:?} by {heads:?}")),
        None => Ok(()),
    }
}

fn audit_layer(layer: &Layer) -> Result<(), String> {
    let vertices: BTreeMap<_, _> = layer.vertices().collect();
    let capacity: u32 = vertices.values().map(|vertex| vertex.capacity).sum();
    if capacity != layer.capacity() {
        return Err(format!("{capacity} shares, but it says {}", layer.capacity()));
    }
    let indexed = Indexed::of(layer);
    for (node, vertex) in &vertices {
        let used: u32 = vertex.children.values().sum();
        if used != vertex.used || used > vertex.capacity {
            return Err(format!(
                "{node:?} gives {used} shares, says {}, has {}",
                vertex.used, vertex.capacity
            ));
        }
        for (child, shares) in &vertex.children {
            let back = layer.get(child).and_then(|c| c.parents.get(*node));
            if back != Some(shares) {
                return Err(format!("{node:?} has child {child:?}, which does not know"));
            }
        }
        for (parent, shares) in &vertex.parents {
            let above = vertices.get(parent).ok_or(format!("{parent:?} is not there"))?;
            if above.children.get(*node) != Some(shares) {
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
        match (node.is_root(), deepest) {
            (true, None) if vertex.depth == 0 => {}
            (false, Some(deepest)) if vertex.depth == deepest + 1 => {}
            _ => {
                return Err(format!(
                    "{node:?} has depth {}, its parents {deepest:?}",
                    vertex.depth
                ));
            }
        }
        indexed.audit(node, vertex)?;
    }
    Ok(())
}

/// What the indices of a layer say, so that each is walked once.
struct Indexed<'a> {
    with_room: HashSet<&'a Node>,
    idle: HashSet<(u32, &'a Node)>,
    levels: HashSet<(u32, &'a Node)>,
}

impl<'a> Indexed<'a> {
    fn of(layer: &'a Layer) -> Self {
        let depths: BTreeSet<u32> = layer.vertices().map(|(_, vertex)| vertex.depth).collect();
        let level = |depth| layer.level(depth).map(move |member| (depth, member));
        Self {
            with_room: layer.with_room().map(|(node, _)| node).collect(),
            idle: layer.idle().collect(),
            levels: depths.into_iter().flat_map(level).collect(),
        }
    }

    fn audit(&self, node: &Node, vertex: &Vertex) -> Result<(), String> {
        if self.with_room.contains(node) != (vertex.free() > 0) {
            return Err(format!("{node:?} is in the wrong index"));
        }
        if node.is_root() {
            return Ok(());
        }
        let is_idle = vertex.capacity == 0 && vertex.children.is_empty();
        if self.idle.contains(&(vertex.depth, node)) != is_idle {
            return Err(format!("{node:?} is idle or not, the index says otherwise"));
        }
        if !self.levels.contains(&(vertex.depth, node)) {
            return Err(format!("{node:?} is not in its level"));
        }
        Ok(())
    }
}
