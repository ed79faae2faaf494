//! One stripe of one image: its layers, and what they come to when they are put together: who really reads from whom.

use std::collections::{BTreeMap, BTreeSet};

use treeboot_types::HostName;

use super::Grove;
use super::layer::{Layer, Node};
use super::scope::Scope;

/// How many levels above its parents a host may fall back to, before it goes to the origins: its grandparents and
/// theirs. Each level more makes every host admit fan-out times as many others, and be told of each of them.
pub(super) const FALLBACK_LEVELS: usize = 2;

/// The layers of one stripe; the fleet's is always there.
#[derive(Debug, Clone, Default)]
pub(super) struct Stripe {
    layers: BTreeMap<Scope, Layer>,
    /// Layers that were handed out to be changed.
    touched: BTreeSet<Scope>,
}

impl Stripe {
    pub(super) fn layer(&self, scope: &Scope) -> Option<&Layer> {
        self.layers.get(scope)
    }

    pub(super) fn layer_mut(&mut self, scope: &Scope) -> Option<&mut Layer> {
        let layer = self.layers.get_mut(scope)?;
        if !self.touched.contains(scope) {
            self.touched.insert(scope.clone());
        }
        Some(layer)
    }

    pub(super) fn layers(&self) -> impl Iterator<Item = (&Scope, &Layer)> {
        self.layers.iter()
    }

    /// A layer, without vertices if it was not there.
    pub(super) fn open(&mut self, scope: &Scope) -> &mut Layer {
        self.touched.insert(scope.clone());
        self.layers.entry(scope.clone()).or_default()
    }

    /// What everybody is told may read otherwise now.
    pub(super) fn touch_all(&mut self) {
        for (scope, layer) in &mut self.layers {
            layer.touch_all();
            self.touched.insert(scope.clone());
        }
    }

    /// A layer that nobody is left in goes.
    pub(super) fn close(&mut self, scope: &Scope) {
        self.layers.remove(scope);
    }
}

impl Grove {
    pub(super) fn layer(&self, stripe: usize, scope: &Scope) -> Option<&Layer> {
        self.stripes.get(stripe)?.layer(scope)
    }

    pub(super) fn layer_mut(&mut self, stripe: usize, scope: &Scope) -> Option<&mut Layer> {
        self.stripes.get_mut(stripe)?.layer_mut(scope)
    }

    /// What is told of a member may read otherwise now.
    pub(super) fn touch(&mut self, scope: &Scope, member: &Node) {
        let layers = self
            .stripes
            .iter_mut()
            .filter_map(|stripe| stripe.layer_mut(scope));
        layers.for_each(|layer| layer.touch(member));
    }

    /// Where a host is a member.
    pub(super) fn scope_of(&self, host: &HostName) -> Option<&Scope> {
        self.places.get(host).map(|place| &place.scope)
    }

    /// The host that takes a stripe in for a whole zone or rack.
    pub(super) fn head(&self, stripe: usize, group: &Scope) -> Option<HostName> {
        let mut group = group;
        // As many turns as scopes lie within each other.
        loop {
            let entrance = self.layer(stripe, group)?.get(&Node::Entrance)?;
            match entrance.children.keys().next()? {
                Node::Host(host) => return Some(host.clone()),
                Node::Group(inner) => group = inner,
                Node::Origin(_) | Node::Entrance => return None,
            }
        }
    }

    /// A member as its readers see it: itself, or the head of a group.
    pub(super) fn real(&self, stripe: usize, node: &Node) -> Option<Node> {
        match node {
            Node::Group(group) => self.head(stripe, group).map(Node::Host),
            Node::Entrance => None,
            Node::Host(_) | Node::Origin(_) => Some(node.clone()),
        }
    }

    /// From whom a member of a scope really reads, with its shares of each.
    pub(super) fn parents_in(&self, stripe: usize, scope: &Scope, member: &Node) -> BTreeMap<Node, u32> {
        let mut parents = BTreeMap::new();
        let Some(vertex) = self.layer(stripe, scope).and_then(|layer| layer.get(member)) else {
            return parents;
        };
        for (parent, shares) in &vertex.parents {
            let found = match (parent, scope.outer()) {
                (Node::Entrance, Some(outer)) => self.parents_in(stripe, &outer, &Node::Group(scope.clone())),
                _ => BTreeMap::from_iter(self.real(stripe, parent).map(|node| (node, *shares))),
            };
            for (node, shares) in found {
                *parents.entry(node).or_default() += shares;
            }
        }
        parents
    }

    /// From whom a host reads, with its shares of each; nobody for an origin.
    pub(super) fn parents(&self, stripe: usize, node: &Node) -> BTreeMap<Node, u32> {
        match node {
            Node::Host(host) => {
                let scope = self.scope_of(host);
                scope.map_or_else(BTreeMap::new, |scope| self.parents_in(stripe, scope, node))
            }
            _ => BTreeMap::new(),
        }
    }

    /// The places of a host, or an origin, in the layers of a stripe: its own, then those of the groups that it is the head of.
    pub(super) fn stands(&self, stripe: usize, node: &Node) -> Vec<(Scope, Node)> {
        let Node::Host(host) = node else {
            return vec![(Scope::Fleet, node.clone())];
        };
        let Some(scope) = self.scope_of(host) else {
            return Vec::new();
        };
        let mut stands = vec![(scope.clone(), node.clone())];
        let mut scope = scope.clone();
        while let Some(outer) = scope.outer() {
            if self.head(stripe, &scope).as_ref() != Some(host) {
                break;
            }
            stands.push((outer.clone(), Node::Group(scope)));
            scope = outer;
        }
        stands
    }

    /// Who reads from a host or an origin.
    pub(super) fn children(&self, stripe: usize, node: &Node) -> BTreeSet<Node> {
        let mut children = BTreeSet::new();
        for (scope, member) in self.stands(stripe, node) {
            let vertex = self.layer(stripe, &scope).and_then(|layer| layer.get(&member));
            let inner = vertex.into_iter().flat_map(|vertex| vertex.children.keys());
            children.extend(inner.filter_map(|child| self.real(stripe, child)));
        }
        children
    }

    /// In which layer a host reads from a parent: the scope, the member that stands for the host there, and the parent's.
    pub(super) fn edge(&self, stripe: usize, host: &HostName, parent: &Node) -> Option<(Scope, Node, Node)> {
        let (mut scope, mut member) = (self.scope_of(host)?.clone(), Node::Host(host.clone()));
        loop {
            let vertex = self.layer(stripe, &scope)?.get(&member)?;
            let mut parents = vertex.parents.keys();
            if let Some(found) = parents.find(|node| self.real(stripe, node).as_ref() == Some(parent)) {
                return Some((scope, member, found.clone()));
            }
            let outer = scope.outer()?;
            member = Node::Group(scope);
            scope = outer;
        }
    }

    /// Steps from an origin; none where a host does not stand in the stripe.
    pub(super) fn depth(&self, stripe: usize, node: &Node) -> Option<u32> {
        let Node::Host(host) = node else {
            return Some(0);
        };
        let mut scope = self.scope_of(host)?.clone();
        let mut depth = self.layer(stripe, &scope)?.get(node)?.depth;
        while let Some(outer) = scope.outer() {
            // Whoever stands at the entrance stands where the group does.
            let group = Node::Group(scope);
            depth = depth
                .saturating_add(self.layer(stripe, &outer)?.get(&group)?.depth)
                .saturating_sub(1);
            scope = outer;
        }
        Some(depth)
    }

    /// The vertices on the way up, nearest first, in at most `levels` levels; each once.
    pub(super) fn above(&self, stripe: usize, node: &Node, levels: usize) -> Vec<Vec<Node>> {
        walk(node, levels, |node| {
            self.parents(stripe, node).into_keys().collect()
        })
    }

    /// The hosts on the way down, nearest first, in at most `levels` levels; each once.
    pub(super) fn below(&self, stripe: usize, node: &Node, levels: usize) -> Vec<Vec<Node>> {
        walk(node, levels, |node| {
            self.children(stripe, node).into_iter().collect()
        })
    }

    /// All hosts of a scope that stand in a stripe.
    fn all_of(&self, stripe: usize, scope: &Scope, into: &mut BTreeSet<Node>) {
        let members = self.layer(stripe, scope).into_iter().flat_map(Layer::members);
        for member in members {
            match member {
                Node::Group(group) => self.all_of(stripe, group, into),
                _ => {
                    into.insert(member.clone());
                }
            }
        }
    }

    /// Origins and hosts whose placement may read otherwise since this was asked last: who changed, and all whose placement
    /// names one of those as a parent, a fallback or a child.
    pub(super) fn take_touched(&mut self) -> BTreeSet<Node> {
        let mut touched = BTreeSet::new();
        for stripe in 0..self.stripes.len() {
            let mut changed = Vec::new();
            if let Some(tree) = self.stripes.get_mut(stripe) {
                for scope in std::mem::take(&mut tree.touched) {
                    if let Some(layer) = tree.layers.get_mut(&scope) {
                        changed.push((scope, layer.take_touched()));
                    }
                }
            }
            let mut seeds = BTreeSet::new();
            for (scope, (edges, sunk)) in changed {
                for node in edges {
                    match node {
                        Node::Entrance => seeds.extend(self.head(stripe, &scope).map(Node::Host)),
                        _ => seeds.extend(self.real(stripe, &node)),
                    }
                }
                for node in sunk {
                    match &node {
                        Node::Group(group) => self.all_of(stripe, group, &mut seeds),
                        _ => {
                            seeds.insert(node);
                        }
                    }
                }
            }
            for seed in seeds {
                let levels = FALLBACK_LEVELS + 1;
                let near = self.above(stripe, &seed, levels).into_iter();
                let near = near.chain(self.below(stripe, &seed, levels));
                touched.extend(near.flatten());
                touched.insert(seed);
            }
        }
        touched
    }
}

fn walk(from: &Node, levels: usize, next: impl Fn(&Node) -> Vec<Node>) -> Vec<Vec<Node>> {
    let mut seen = BTreeSet::from([from.clone()]);
    let mut rows: Vec<Vec<Node>> = Vec::new();
    let mut row = vec![from.clone()];
    for _ in 0..levels {
        let mut following = Vec::new();
        for node in row.iter().flat_map(&next) {
            if seen.insert(node.clone()) {
                following.push(node);
            }
        }
        if following.is_empty() {
            break;
        }
        rows.push(following.clone());
        row = following;
    }
    rows
}
