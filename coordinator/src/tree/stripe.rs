//! One stripe of one image: its layers, and what they come to when they are put together: who really reads from whom.

use std::collections::{BTreeMap, BTreeSet};

use treeboot_types::HostName;

use crate::planted::{Bug, planted};

use super::Grove;
use super::layer::{Changes, Layer, Node};
use super::scope::Scope;

/// How many levels above its parents a host may fall back to, before it goes to the origins: its grandparents and
/// theirs. Each level more makes every host admit fan-out times as many others, and be told of each of them.
pub(super) const FALLBACK_LEVELS: usize = 2;

/// What of a placement may read otherwise than before.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Doubt {
    /// Parents and fallbacks.
    pub(super) paths: bool,
    /// Children.
    pub(super) children: bool,
}

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

    /// Who reads from a host or an origin, in order.
    pub(super) fn children(&self, stripe: usize, node: &Node) -> Vec<Node> {
        let mut children = Vec::new();
        for (scope, member) in self.stands(stripe, node) {
            let vertex = self.layer(stripe, &scope).and_then(|layer| layer.get(&member));
            let inner = vertex.into_iter().flat_map(|vertex| vertex.children.keys());
            children.extend(inner.filter_map(|child| self.real(stripe, child)));
        }
        // Of one member they are in order, unless groups are among them.
        children.sort_unstable();
        children.dedup();
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
            let mut parents = Vec::new();
            if let Node::Host(host) = node
                && let Some(scope) = self.scope_of(host)
            {
                self.add_parents(stripe, scope, node, &mut parents);
            }
            parents.sort_unstable();
            parents.dedup();
            parents
        })
    }

    /// From whom a member of a scope really reads.
    fn add_parents(&self, stripe: usize, scope: &Scope, member: &Node, into: &mut Vec<Node>) {
        let vertex = self.layer(stripe, scope).and_then(|layer| layer.get(member));
        for parent in vertex.into_iter().flat_map(|vertex| vertex.parents.keys()) {
            match (parent, scope.outer()) {
                (Node::Entrance, Some(outer)) => {
                    self.add_parents(stripe, &outer, &Node::Group(scope.clone()), into);
                }
                _ => into.extend(self.real(stripe, parent)),
            }
        }
    }

    /// The hosts on the way down, nearest first, in at most `levels` levels; each once.
    pub(super) fn below(&self, stripe: usize, node: &Node, levels: usize) -> Vec<Vec<Node>> {
        walk(node, levels, |node| self.children(stripe, node))
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
    pub(super) fn take_touched(&mut self) -> BTreeMap<Node, Doubt> {
        let mut touched = BTreeMap::new();
        for stripe in 0..self.stripes.len() {
            // Those that may read otherwise and feed others, and those that may feed others only.
            let (mut moved, mut feeders) = (BTreeSet::new(), BTreeSet::new());
            for (scope, changes) in self.take_changes(stripe) {
                // Who stands at the entrance reads what the whole group reads.
                let entrance = [&changes.read, &changes.feed]
                    .iter()
                    .any(|nodes| nodes.contains(&Node::Entrance));
                if entrance {
                    moved.extend(self.head(stripe, &scope).map(Node::Host));
                }
                moved.extend(changes.read.iter().filter_map(|node| self.real(stripe, node)));
                feeders.extend(changes.feed.iter().filter_map(|node| self.real(stripe, node)));
                for node in changes.sunk {
                    match &node {
                        Node::Group(group) => self.all_of(stripe, group, &mut moved),
                        _ => drop(moved.insert(node)),
                    }
                }
            }
            let levels = FALLBACK_LEVELS + 1;
            for seed in feeders.union(&moved) {
                let reads = moved.contains(seed) || planted(Bug::FallbackBelow);
                let mut doubt = |node: Node, paths, children| {
                    let doubt: &mut Doubt = touched.entry(node).or_default();
                    doubt.paths |= paths;
                    doubt.children |= children;
                };
                for node in self.above(stripe, seed, levels).into_iter().flatten() {
                    doubt(node, false, true);
                }
                for node in self.below(stripe, seed, levels).into_iter().flatten() {
                    doubt(node, reads, false);
                }
                doubt(seed.clone(), reads, true);
            }
        }
        touched
    }

    fn take_changes(&mut self, stripe: usize) -> Vec<(Scope, Changes)> {
        let Some(tree) = self.stripes.get_mut(stripe) else {
            return Vec::new();
        };
        let touched = std::mem::take(&mut tree.touched).into_iter();
        let changes = touched.filter_map(|scope| {
            let changes = tree.layers.get_mut(&scope)?.take_changes();
            Some((scope, changes))
        });
        changes.collect()
    }
}

fn walk(from: &Node, levels: usize, next: impl Fn(&Node) -> Vec<Node>) -> Vec<Vec<Node>> {
    let mut seen = Seen::default();
    seen.insert(from);
    let mut rows: Vec<Vec<Node>> = Vec::new();
    for _ in 0..levels {
        let row = rows.last().map_or(std::slice::from_ref(from), Vec::as_slice);
        let mut following = Vec::new();
        for node in row {
            let mut nodes = next(node);
            nodes.retain(|node| seen.insert(node));
            following.append(&mut nodes);
        }
        if following.is_empty() {
            break;
        }
        rows.push(following);
    }
    rows
}

/// Up to so many vertices are compared one by one, which takes less than to keep them in order. Most walks meet fewer.
const FEW: usize = 32;

/// Vertices that a walk met.
#[derive(Default)]
struct Seen {
    few: Vec<Node>,
    /// All of them, once they are more than a few.
    many: BTreeSet<Node>,
}

impl Seen {
    /// False where it was met before.
    fn insert(&mut self, node: &Node) -> bool {
        if !self.many.is_empty() {
            return self.many.insert(node.clone());
        }
        if self.few.contains(node) {
            return false;
        }
        self.few.push(node.clone());
        if self.few.len() > FEW {
            self.many.extend(self.few.drain(..));
        }
        true
    }
}
