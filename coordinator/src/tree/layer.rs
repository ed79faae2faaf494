//! One scope of one stripe of one image as a graph: who reads from whom, and where there is room. Structure only: which
//! place a member gets is decided in `place`, and who is told in `publish`.
//!
//! A slot is divided into as many *shares* as a host has active parents, so that a host with two parents takes half
//! a slot of each. Every edge leads from a vertex to one of smaller depth, which is why there can be no cycle.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use treeboot_types::HostName;

use crate::planted::{Bug, planted};

use super::scope::Scope;

/// A vertex of a layer, or, where layers are put together, of a stripe's whole tree: then an origin or a host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Node {
    /// The image's origin with this index; in the fleet's layer.
    Origin(u16),
    /// Where a stripe comes into a zone or a rack; whoever reads from it reads from the parents of the whole scope.
    Entrance,
    /// A host.
    Host(HostName),
    /// A zone or a rack; whoever reads from it reads from the host at its entrance.
    Group(Scope),
}

impl Node {
    /// Whether it reads from nobody in its layer.
    pub(super) fn is_root(&self) -> bool {
        matches!(self, Self::Origin(_) | Self::Entrance)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Vertex {
    /// Shares held at each parent.
    pub(super) parents: BTreeMap<Node, u32>,
    /// Shares that each child holds here.
    pub(super) children: BTreeMap<Node, u32>,
    /// Shares that there are.
    pub(super) capacity: u32,
    /// Shares that are held.
    pub(super) used: u32,
    /// 0 for a root, otherwise one more than the deepest parent's.
    pub(super) depth: u32,
    /// Who came first stands before who came later, all else being equal.
    pub(super) joined: u64,
}

impl Vertex {
    pub(super) fn free(&self) -> u32 {
        let used = if planted(Bug::SlotTwice) { 0 } else { self.used };
        self.capacity.saturating_sub(used)
    }
}

/// What a member held when it was taken out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Taken {
    pub(super) parents: BTreeMap<Node, u32>,
    pub(super) orphans: BTreeMap<Node, u32>,
    pub(super) capacity: u32,
    pub(super) depth: u32,
    pub(super) joined: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Layer {
    /// Asked for by name only: a search by order compares a dozen names that lie far apart.
    vertices: HashMap<Node, Vertex>,
    /// Those of them that read from nobody.
    roots: BTreeSet<Node>,
    /// Vertices with a free share: nearest the root first, then the least used, then the oldest.
    free: BTreeSet<(u32, u32, u64, Node)>,
    /// Members by depth.
    levels: BTreeMap<u32, BTreeSet<Node>>,
    /// Members that offer no shares and have no children, by depth.
    idle: BTreeSet<(u32, Node)>,
    members: usize,
    /// Shares of all vertices.
    capacity: u32,
    /// What changed since it was taken last.
    changes: Changes,
}

/// Vertices of a layer that changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Changes {
    /// Those that read from others than before, and those that what is told of them changed otherwise.
    pub(super) read: BTreeSet<Node>,
    /// Those that others read from than before.
    pub(super) feed: BTreeSet<Node>,
    /// Those at another depth.
    pub(super) sunk: BTreeSet<Node>,
}

impl Layer {
    pub(super) fn get(&self, node: &Node) -> Option<&Vertex> {
        self.vertices.get(node)
    }

    /// In no order.
    pub(super) fn vertices(&self) -> impl Iterator<Item = (&Node, &Vertex)> {
        self.vertices.iter()
    }

    /// The first of those that read from nobody.
    pub(super) fn root(&self) -> Option<&Node> {
        self.roots.first()
    }

    /// Vertices with a free share: nearest the root first, then the least used, then the oldest.
    pub(super) fn with_room(&self) -> impl Iterator<Item = (&Node, &Vertex)> {
        self.free
            .iter()
            .filter_map(|(_, _, _, node)| Some((node, self.vertices.get(node)?)))
    }

    /// All but the roots, nearest them first.
    pub(super) fn members(&self) -> impl Iterator<Item = &Node> {
        self.levels.values().flatten()
    }

    pub(super) fn count(&self) -> usize {
        self.members
    }

    /// Members that offer no shares and have no children, with their depths: nearest the root first.
    pub(super) fn idle(&self) -> impl Iterator<Item = (u32, &Node)> {
        self.idle.iter().map(|(depth, member)| (*depth, member))
    }

    /// Shares of all vertices, held or not.
    pub(super) fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Depth of the deepest member; 0 where there is none.
    pub(super) fn deepest(&self) -> u32 {
        self.levels.last_key_value().map_or(0, |(&depth, _)| depth)
    }

    pub(super) fn level(&self, depth: u32) -> impl Iterator<Item = &Node> {
        self.levels.get(&depth).into_iter().flatten()
    }

    /// What changed since this was asked last.
    pub(super) fn take_changes(&mut self) -> Changes {
        std::mem::take(&mut self.changes)
    }

    /// What hosts are told of a vertex may read otherwise now.
    pub(super) fn touch(&mut self, node: &Node) {
        self.changes.read.insert(node.clone());
    }

    pub(super) fn touch_all(&mut self) {
        self.changes.read.extend(self.vertices.keys().cloned());
    }

    /// Changes a vertex and keeps both indices true.
    fn change(&mut self, node: &Node, change: impl FnOnce(&mut Vertex)) {
        let Some(vertex) = self.vertices.get_mut(node) else {
            return;
        };
        let (old_depth, old_used, old_capacity) = (vertex.depth, vertex.used, vertex.capacity);
        let was_free = vertex.free() > 0;
        let was_idle = vertex.capacity == 0 && vertex.children.is_empty();
        change(vertex);
        let (depth, used, joined) = (vertex.depth, vertex.used, vertex.joined);
        let is_free = vertex.free() > 0;
        let is_idle = vertex.capacity == 0 && vertex.children.is_empty();
        self.capacity = self.capacity - old_capacity + vertex.capacity;
        if (was_free, old_depth, old_used) != (is_free, depth, used) {
            if was_free {
                self.free.remove(&(old_depth, old_used, joined, node.clone()));
            }
            if is_free {
                self.free.insert((depth, used, joined, node.clone()));
            }
        }
        if node.is_root() {
            return;
        }
        if depth != old_depth {
            self.drop_from_level(node, old_depth);
            self.levels.entry(depth).or_default().insert(node.clone());
        }
        if (was_idle, old_depth) != (is_idle, depth) {
            if was_idle {
                self.idle.remove(&(old_depth, node.clone()));
            }
            if is_idle {
                self.idle.insert((depth, node.clone()));
            }
        }
    }

    fn drop_from_level(&mut self, member: &Node, depth: u32) {
        if let Some(level) = self.levels.get_mut(&depth) {
            level.remove(member);
            if level.is_empty() {
                self.levels.remove(&depth);
            }
        }
    }

    /// A vertex without parents; one that exists stays as it is.
    fn insert(&mut self, node: Node, capacity: u32, depth: u32, joined: u64) {
        if self.vertices.contains_key(&node) {
            return;
        }
        let vertex = Vertex {
            parents: BTreeMap::new(),
            children: BTreeMap::new(),
            capacity,
            used: 0,
            depth,
            joined,
        };
        if capacity > 0 {
            self.free.insert((depth, 0, joined, node.clone()));
        }
        self.capacity += capacity;
        if node.is_root() {
            self.roots.insert(node.clone());
        } else {
            self.levels.entry(depth).or_default().insert(node.clone());
            if capacity == 0 {
                self.idle.insert((depth, node.clone()));
            }
            self.members += 1;
        }
        self.vertices.insert(node, vertex);
    }

    /// An origin or an entrance.
    pub(super) fn insert_root(&mut self, root: Node, capacity: u32) {
        let order = match root {
            Node::Origin(index) => index.into(),
            _ => 0,
        };
        self.insert(root, capacity, 0, order);
    }

    /// Puts a member without children under `parents`.
    pub(super) fn insert_member(
        &mut self,
        member: &Node,
        capacity: u32,
        joined: u64,
        parents: impl IntoIterator<Item = (Node, u32)>,
    ) {
        self.insert(member.clone(), capacity, 1, joined);
        for (parent, shares) in parents {
            self.link(member, &parent, shares);
        }
    }

    /// A vertex offers so many shares from now on; what children hold stays held.
    pub(super) fn set_capacity(&mut self, node: &Node, capacity: u32) {
        self.change(node, |vertex| vertex.capacity = capacity);
    }

    /// A child takes shares of a parent; its depth and that of all below follow.
    pub(super) fn link(&mut self, child: &Node, parent: &Node, shares: u32) {
        if shares == 0 || !self.vertices.contains_key(child) || !self.vertices.contains_key(parent) {
            return;
        }
        self.change(parent, |p| {
            p.used += shares;
            *p.children.entry(child.clone()).or_default() += shares;
        });
        self.change(child, |c| *c.parents.entry(parent.clone()).or_default() += shares);
        self.changes.read.insert(child.clone());
        self.changes.feed.insert(parent.clone());
        // Also where its depth here stays 1, the whole way to an origin may be another.
        self.changes.sunk.insert(child.clone());
        self.settle(child);
    }

    /// A child gives its shares of a parent back; returns how many. Depths stay until the child is linked again.
    pub(super) fn unlink(&mut self, child: &Node, parent: &Node) -> u32 {
        let mut shares = 0;
        self.changes.read.insert(child.clone());
        self.changes.feed.insert(parent.clone());
        self.change(parent, |p| {
            shares = p.children.remove(child).unwrap_or(0);
            p.used -= shares;
        });
        self.change(child, |c| {
            c.parents.remove(parent);
        });
        shares
    }

    /// Takes a member out with all its edges.
    pub(super) fn take(&mut self, member: &Node) -> Option<Taken> {
        let vertex = self.vertices.get(member)?;
        let taken = Taken {
            parents: vertex.parents.clone(),
            orphans: vertex.children.clone(),
            capacity: vertex.capacity,
            depth: vertex.depth,
            joined: vertex.joined,
        };
        for parent in taken.parents.keys() {
            self.unlink(member, parent);
        }
        for orphan in taken.orphans.keys() {
            self.unlink(orphan, member);
        }
        if let Some(vertex) = self.vertices.remove(member) {
            self.free
                .remove(&(vertex.depth, vertex.used, vertex.joined, member.clone()));
            self.drop_from_level(member, vertex.depth);
            self.idle.remove(&(vertex.depth, member.clone()));
            self.members -= 1;
            self.capacity -= vertex.capacity;
        }
        Some(taken)
    }

    /// Makes the depths of a member and of all below it true again.
    fn settle(&mut self, member: &Node) {
        // Ends: a depth changes only when a parent's did, and the graph has no cycle; the bound holds even if it had.
        let mut steps = self.vertices.len().saturating_mul(self.vertices.len());
        let mut waiting = vec![member.clone()];
        while let Some(node) = waiting.pop() {
            let Some(vertex) = self.vertices.get(&node) else {
                continue;
            };
            let deepest = vertex
                .parents
                .keys()
                .filter_map(|p| Some(self.vertices.get(p)?.depth))
                .max();
            // Between two parents a member has none; its depth stays what it was.
            let depth = deepest.map_or(vertex.depth, |d| d.saturating_add(1));
            if depth != vertex.depth && steps > 0 {
                steps -= 1;
                waiting.extend(vertex.children.keys().cloned());
                self.change(&node, |v| v.depth = depth);
                self.changes.sunk.insert(node);
            }
        }
    }

    /// All that read from a vertex, directly or not.
    pub(super) fn below(&self, node: &Node) -> BTreeSet<Node> {
        let mut below = BTreeSet::new();
        let mut waiting = vec![node];
        while let Some(node) = waiting.pop() {
            let children = self
                .vertices
                .get(node)
                .into_iter()
                .flat_map(|v| v.children.keys());
            for child in children {
                if below.insert(child.clone()) {
                    waiting.push(child);
                }
            }
        }
        below
    }
}
