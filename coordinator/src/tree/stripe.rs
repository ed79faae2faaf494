//! One stripe of one image as a graph: who reads from whom, and where there is room. Structure only: which place a
//! host gets is decided in `place`, and who is told in `publish`.
//!
//! A slot is divided into as many *shares* as a host has active parents, so that a host with two parents takes half
//! a slot of each. Every edge leads from a vertex to one of smaller depth, which is why there can be no cycle.

use std::collections::{BTreeMap, BTreeSet};

use treeboot_types::HostName;

/// A vertex of a stripe's tree.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Node {
    /// The image's origin with this index.
    Origin(u16),
    /// A host.
    Host(HostName),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Vertex {
    /// Shares held at each parent.
    pub(super) parents: BTreeMap<Node, u32>,
    /// Shares that each child holds here.
    pub(super) children: BTreeMap<HostName, u32>,
    /// Shares that there are.
    pub(super) capacity: u32,
    /// Shares that are held.
    pub(super) used: u32,
    /// 0 for an origin, otherwise one more than the deepest parent's.
    pub(super) depth: u32,
    /// Who came first stands before who came later, all else being equal.
    pub(super) joined: u64,
}

impl Vertex {
    pub(super) fn free(&self) -> u32 {
        self.capacity.saturating_sub(self.used)
    }
}

/// What a host held when it was taken out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Taken {
    pub(super) parents: BTreeMap<Node, u32>,
    pub(super) orphans: BTreeMap<HostName, u32>,
    pub(super) capacity: u32,
    pub(super) depth: u32,
    pub(super) joined: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Stripe {
    vertices: BTreeMap<Node, Vertex>,
    /// Vertices with a free share: nearest the root first, then the least used, then the oldest.
    free: BTreeSet<(u32, u32, u64, Node)>,
    /// Hosts by depth.
    levels: BTreeMap<u32, BTreeSet<HostName>>,
    /// Hosts that offer no shares and have no children, by depth.
    idle: BTreeSet<(u32, HostName)>,
    hosts: usize,
    /// Shares of all vertices.
    capacity: u32,
    /// Whose placement may read differently since this was taken last.
    touched: BTreeSet<Node>,
}

/// How many levels above its parents a host may fall back to, before it goes to the origins: its grandparents and
/// theirs. Each level more makes every host admit fan-out times as many others, and be told of each of them.
pub(super) const FALLBACK_LEVELS: usize = 2;

impl Stripe {
    pub(super) fn get(&self, node: &Node) -> Option<&Vertex> {
        self.vertices.get(node)
    }

    pub(super) fn host(&self, host: &HostName) -> Option<&Vertex> {
        self.vertices.get(&Node::Host(host.clone()))
    }

    pub(super) fn vertices(&self) -> impl Iterator<Item = (&Node, &Vertex)> {
        self.vertices.iter()
    }

    /// Vertices with a free share: nearest the root first, then the least used, then the oldest.
    pub(super) fn with_room(&self) -> impl Iterator<Item = (&Node, &Vertex)> {
        self.free
            .iter()
            .filter_map(|(_, _, _, node)| Some((node, self.vertices.get(node)?)))
    }

    pub(super) fn host_names(&self) -> impl Iterator<Item = &HostName> {
        self.levels.values().flatten()
    }

    pub(super) fn hosts(&self) -> usize {
        self.hosts
    }

    /// Hosts that offer no shares and have no children, with their depths: nearest the root first.
    pub(super) fn idle(&self) -> impl Iterator<Item = (u32, &HostName)> {
        self.idle.iter().map(|(depth, host)| (*depth, host))
    }

    /// Shares of all vertices, held or not.
    pub(super) fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Depth of the deepest host; 0 where there is none.
    pub(super) fn deepest(&self) -> u32 {
        self.levels.last_key_value().map_or(0, |(&depth, _)| depth)
    }

    pub(super) fn level(&self, depth: u32) -> impl Iterator<Item = &HostName> {
        self.levels.get(&depth).into_iter().flatten()
    }

    /// Whose placement may read differently since this was asked last.
    pub(super) fn take_touched(&mut self) -> BTreeSet<Node> {
        std::mem::take(&mut self.touched)
    }

    /// Marks a vertex and all whose placement names it: as a parent, a fallback or a child.
    pub(super) fn touch(&mut self, node: &Node) {
        let levels = FALLBACK_LEVELS + 1;
        let near = self
            .above(node, levels)
            .into_iter()
            .chain(self.below(node, levels));
        let near: Vec<Node> = near.flatten().collect();
        self.touched.extend(near);
        self.touched.insert(node.clone());
    }

    /// Changes a vertex and keeps both indices true.
    fn change(&mut self, node: &Node, change: impl FnOnce(&mut Vertex)) {
        let Some(vertex) = self.vertices.get_mut(node) else {
            return;
        };
        let (old_depth, old_used, old_capacity) = (vertex.depth, vertex.used, vertex.capacity);
        change(vertex);
        self.free
            .remove(&(old_depth, old_used, vertex.joined, node.clone()));
        self.capacity = self.capacity - old_capacity + vertex.capacity;
        if vertex.free() > 0 {
            self.free
                .insert((vertex.depth, vertex.used, vertex.joined, node.clone()));
        }
        let depth = vertex.depth;
        let is_idle = vertex.capacity == 0 && vertex.children.is_empty();
        if let Node::Host(host) = node {
            if depth != old_depth {
                self.drop_from_level(host, old_depth);
                self.levels.entry(depth).or_default().insert(host.clone());
            }
            self.idle.remove(&(old_depth, host.clone()));
            if is_idle {
                self.idle.insert((depth, host.clone()));
            }
        }
    }

    fn drop_from_level(&mut self, host: &HostName, depth: u32) {
        if let Some(level) = self.levels.get_mut(&depth) {
            level.remove(host);
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
        if let Node::Host(host) = &node {
            self.levels.entry(depth).or_default().insert(host.clone());
            if capacity == 0 {
                self.idle.insert((depth, host.clone()));
            }
            self.hosts += 1;
        }
        self.vertices.insert(node, vertex);
    }

    pub(super) fn insert_origin(&mut self, index: u16, capacity: u32) {
        self.insert(Node::Origin(index), capacity, 0, index.into());
    }

    /// Puts a host without children under `parents`.
    pub(super) fn insert_host(
        &mut self,
        host: &HostName,
        capacity: u32,
        joined: u64,
        parents: impl IntoIterator<Item = (Node, u32)>,
    ) {
        self.insert(Node::Host(host.clone()), capacity, 1, joined);
        for (parent, shares) in parents {
            self.link(host, &parent, shares);
        }
    }

    /// A host offers so many shares from now on; what children hold stays held.
    pub(super) fn set_capacity(&mut self, host: &HostName, capacity: u32) {
        self.change(&Node::Host(host.clone()), |vertex| vertex.capacity = capacity);
    }

    /// A child takes shares of a parent; its depth and that of all below follow.
    pub(super) fn link(&mut self, child: &HostName, parent: &Node, shares: u32) {
        let key = Node::Host(child.clone());
        if shares == 0 || !self.vertices.contains_key(&key) || !self.vertices.contains_key(parent) {
            return;
        }
        self.change(parent, |p| {
            p.used += shares;
            *p.children.entry(child.clone()).or_default() += shares;
        });
        self.change(&key, |c| *c.parents.entry(parent.clone()).or_default() += shares);
        self.settle(child);
        self.touch(&key);
    }

    /// A child gives its shares of a parent back; returns how many. Depths stay until the child is linked again.
    pub(super) fn unlink(&mut self, child: &HostName, parent: &Node) -> u32 {
        let mut shares = 0;
        self.touch(&Node::Host(child.clone()));
        self.change(parent, |p| {
            shares = p.children.remove(child).unwrap_or(0);
            p.used -= shares;
        });
        self.change(&Node::Host(child.clone()), |c| {
            c.parents.remove(parent);
        });
        shares
    }

    /// Takes a host out with all its edges.
    pub(super) fn take(&mut self, host: &HostName) -> Option<Taken> {
        let node = Node::Host(host.clone());
        let vertex = self.vertices.get(&node)?;
        let taken = Taken {
            parents: vertex.parents.clone(),
            orphans: vertex.children.clone(),
            capacity: vertex.capacity,
            depth: vertex.depth,
            joined: vertex.joined,
        };
        for parent in taken.parents.keys() {
            self.unlink(host, parent);
        }
        for orphan in taken.orphans.keys() {
            self.unlink(orphan, &node);
        }
        if let Some(vertex) = self.vertices.remove(&node) {
            self.free
                .remove(&(vertex.depth, vertex.used, vertex.joined, node));
            self.drop_from_level(host, vertex.depth);
            self.idle.remove(&(vertex.depth, host.clone()));
            self.hosts -= 1;
            self.capacity -= vertex.capacity;
        }
        Some(taken)
    }

    /// Makes the depths of a host and of all below it true again.
    fn settle(&mut self, host: &HostName) {
        // Ends: a depth changes only when a parent's did, and the graph has no cycle; the bound holds even if it had.
        let mut steps = self.vertices.len().saturating_mul(self.vertices.len());
        let mut waiting = vec![host.clone()];
        while let Some(host) = waiting.pop() {
            let node = Node::Host(host);
            let Some(vertex) = self.vertices.get(&node) else {
                continue;
            };
            let deepest = vertex
                .parents
                .keys()
                .filter_map(|p| Some(self.vertices.get(p)?.depth))
                .max();
            // Between two parents a host has none; its depth stays what it was.
            let depth = deepest.map_or(vertex.depth, |d| d.saturating_add(1));
            if depth != vertex.depth && steps > 0 {
                steps -= 1;
                waiting.extend(vertex.children.keys().cloned());
                self.change(&node, |v| v.depth = depth);
                self.touch(&node);
            }
        }
    }

    /// The vertices on the way up, nearest first, in at most `levels` levels; each once.
    pub(super) fn above(&self, node: &Node, levels: usize) -> Vec<Vec<Node>> {
        self.walk(node, levels, |vertex| vertex.parents.keys().cloned().collect())
    }

    /// The hosts on the way down, nearest first, in at most `levels` levels; each once.
    pub(super) fn below(&self, node: &Node, levels: usize) -> Vec<Vec<Node>> {
        self.walk(node, levels, |vertex| {
            vertex.children.keys().cloned().map(Node::Host).collect()
        })
    }

    fn walk(&self, from: &Node, levels: usize, next: impl Fn(&Vertex) -> Vec<Node>) -> Vec<Vec<Node>> {
        let mut seen = BTreeSet::from([from.clone()]);
        let mut rows: Vec<Vec<Node>> = Vec::new();
        let mut row = vec![from.clone()];
        for _ in 0..levels {
            let mut following = Vec::new();
            for node in row.iter().filter_map(|n| self.vertices.get(n)).flat_map(&next) {
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
}
