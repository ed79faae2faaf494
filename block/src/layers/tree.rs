//! Which layers a disk has and how they stand on each other: a pure value, and what its manifest holds.
//!
//! A layer without a parent stands on the base. One layer is *live*: writes go there, and nothing stands on it. The others
//! are frozen. A frozen layer that no snapshot names and no transfer holds is *spare*: it goes when nothing stands on it, and
//! is merged into what stands on it when that is one layer.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use treeboot_types::SnapshotName;

use crate::verity::sha256;

/// Layers of one disk at most: every one is an open file, and a block's layer is a byte of the map.
pub const MAX_LAYERS: usize = 128;

/// By how much the number of a layer grows when it is shipped.
pub const SHIFT: LayerId = 1;

/// The format of the manifest that this code reads and writes.
const VERSION: u32 = 1;

/// A layer's number, never used again on its disk. Layer 0 is the delta that a disk begins with.
pub type LayerId = u32;

/// A point in time that was given a name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Its name.
    pub name: SnapshotName,
    /// When, in milliseconds since 1970, for people.
    pub created_unix_ms: u64,
    /// The guest held its file systems still. Else what is on it is what a guest finds that lost its power.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub frozen: bool,
}

/// One layer.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Layer {
    /// What it stands on; the base where there is none.
    pub parent: Option<LayerId>,
    /// The point in time at which it was frozen, where that has a name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<Snapshot>,
    /// Transfers that read it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub holds: Vec<u64>,
}

/// The layers of one disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerTree {
    version: u32,
    next: LayerId,
    live: LayerId,
    layers: BTreeMap<LayerId, Layer>,
}

/// Why the layers cannot be changed as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    /// The name is taken.
    #[error("snapshot '{snapshot}' exists already; delete it, or give the new one another name")]
    Exists {
        /// The name.
        snapshot: SnapshotName,
    },
    /// There is no such snapshot.
    #[error("there is no snapshot '{snapshot}'; there is {}", words(.known))]
    Unknown {
        /// The name.
        snapshot: SnapshotName,
        /// Those that there are.
        known: Vec<SnapshotName>,
    },
    /// Too many layers.
    #[error("the disk has {MAX_LAYERS} layers already; delete snapshots first")]
    Full,
    /// A transfer reads the layers that would go.
    #[error("a clone or a migration reads the disk; wait for its end, or cancel it")]
    Held,
}

fn words(known: &[SnapshotName]) -> String {
    let names: Vec<_> = known.iter().map(|name| format!("'{name}'")).collect();
    match names.is_empty() {
        true => "none".into(),
        false => names.join(", "),
    }
}

/// What is to be done with a spare layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tidy {
    /// Nothing stands on it.
    Remove(LayerId),
    /// One layer stands on it, and takes over what it does not have itself.
    Merge {
        /// What goes.
        layer: LayerId,
        /// What stays.
        into: LayerId,
    },
}

impl Default for LayerTree {
    /// A disk without snapshots.
    fn default() -> Self {
        Self {
            version: VERSION,
            next: 1,
            live: 0,
            layers: [(0, Layer::default())].into(),
        }
    }
}

impl LayerTree {
    /// Where writes go.
    pub fn live(&self) -> LayerId {
        self.live
    }

    /// The number that the next layer will have.
    pub fn next(&self) -> LayerId {
        self.next
    }

    /// All layers.
    pub fn layers(&self) -> &BTreeMap<LayerId, Layer> {
        &self.layers
    }

    /// Snapshots with their layers, the oldest first.
    pub fn snapshots(&self) -> impl Iterator<Item = (LayerId, &Snapshot)> {
        self.layers
            .iter()
            .filter_map(|(&id, layer)| Some((id, layer.snapshot.as_ref()?)))
    }

    /// The layer of a snapshot.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn find(&self, snapshot: &SnapshotName) -> Result<LayerId, TreeError> {
        let found = self.snapshots().find(|(_, s)| s.name == *snapshot);
        found.map(|(id, _)| id).ok_or_else(|| TreeError::Unknown {
            snapshot: snapshot.clone(),
            known: self.snapshots().map(|(_, s)| s.name.clone()).collect(),
        })
    }

    /// From the base up to `id`, which is the last.
    pub fn chain(&self, id: LayerId) -> Vec<LayerId> {
        let mut chain = vec![id];
        let mut at = id;
        while let Some(parent) = self.layers.get(&at).and_then(|layer| layer.parent) {
            chain.push(parent);
            at = parent;
        }
        chain.reverse();
        chain
    }

    /// What stands on `id`.
    pub fn children(&self, id: LayerId) -> Vec<LayerId> {
        let on = self.layers.iter().filter(|(_, layer)| layer.parent == Some(id));
        on.map(|(&child, _)| child).collect()
    }

    fn begin_live(&mut self, parent: Option<LayerId>) {
        self.live = self.next;
        self.next += 1;
        let layer = Layer {
            parent,
            ..Layer::default()
        };
        self.layers.insert(self.live, layer);
    }

    fn freeze(&mut self, snapshot: Option<Snapshot>, hold: Option<u64>) -> Result<LayerId, TreeError> {
        if self.layers.len() >= MAX_LAYERS {
            return Err(TreeError::Full);
        }
        let frozen = self.live;
        if let Some(layer) = self.layers.get_mut(&frozen) {
            layer.snapshot = snapshot;
            layer.holds.extend(hold);
        }
        self.begin_live(Some(frozen));
        Ok(frozen)
    }

    /// Freezes the live layer under a name and begins a new one over it. Returns the frozen one.
    ///
    /// # Errors
    /// The name is taken, or there are too many layers.
    pub fn snapshot(&mut self, snapshot: Snapshot) -> Result<LayerId, TreeError> {
        if self.find(&snapshot.name).is_ok() {
            return Err(TreeError::Exists {
                snapshot: snapshot.name,
            });
        }
        self.freeze(Some(snapshot), None)
    }

    /// Freezes the live layer for a transfer. Returns the frozen one.
    ///
    /// # Errors
    /// There are too many layers.
    pub fn hold_live(&mut self, transfer: u64) -> Result<LayerId, TreeError> {
        self.freeze(None, Some(transfer))
    }

    /// Freezes the live layer for a transfer, which keeps it and every layer that there was before: as they are, so that each can be
    /// read by itself.
    ///
    /// # Errors
    /// There are too many layers.
    pub fn hold_all(&mut self, transfer: u64) -> Result<(), TreeError> {
        self.hold_live(transfer)?;
        let live = self.live;
        let frozen: Vec<_> = self.layers.keys().copied().filter(|id| *id != live).collect();
        for id in frozen {
            self.hold(id, transfer);
        }
        Ok(())
    }

    /// The same layers for another host, where nobody holds them. Their numbers there are by [`SHIFT`] higher, so that none is 0: what
    /// has come is a disk by its manifest alone.
    pub fn shipped(&self) -> Self {
        let layer = |layer: &Layer| Layer {
            parent: layer.parent.map(|parent| parent + SHIFT),
            snapshot: layer.snapshot.clone(),
            holds: Vec::new(),
        };
        Self {
            version: VERSION,
            next: self.next + SHIFT,
            live: self.live + SHIFT,
            layers: self.layers.iter().map(|(id, l)| (id + SHIFT, layer(l))).collect(),
        }
    }

    /// Keeps a frozen layer for a transfer.
    pub fn hold(&mut self, id: LayerId, transfer: u64) {
        if let Some(layer) = self.layers.get_mut(&id)
            && !layer.holds.contains(&transfer)
        {
            layer.holds.push(transfer);
        }
    }

    /// Whether a transfer holds layers.
    pub fn held(&self) -> bool {
        self.layers.values().any(|layer| !layer.holds.is_empty())
    }

    /// Whether another transfer than this one holds layers.
    pub fn held_by_another(&self, transfer: u64) -> bool {
        let mut holds = self.layers.values().flat_map(|layer| &layer.holds);
        holds.any(|hold| *hold != transfer)
    }

    /// The layer that a transfer holds.
    pub fn held_by(&self, transfer: u64) -> Option<LayerId> {
        let held = self
            .layers
            .iter()
            .find(|(_, layer)| layer.holds.contains(&transfer));
        held.map(|(&id, _)| id)
    }

    /// A transfer has ended; without one, all have. Whether any held anything.
    pub fn release(&mut self, transfer: Option<u64>) -> bool {
        let mut held = false;
        for layer in self.layers.values_mut() {
            let before = layer.holds.len();
            layer
                .holds
                .retain(|hold| transfer.is_some_and(|ended| *hold != ended));
            held |= layer.holds.len() != before;
        }
        held
    }

    /// Begins a new live layer over a snapshot; what was written since is spare then. Other snapshots stay.
    ///
    /// # Errors
    /// There is no such snapshot, or there are too many layers.
    pub fn roll_back(&mut self, to: &SnapshotName) -> Result<(), TreeError> {
        let id = self.find(to)?;
        if self.layers.len() >= MAX_LAYERS {
            return Err(TreeError::Full);
        }
        self.begin_live(Some(id));
        Ok(())
    }

    /// A snapshot's name goes; its layer is spare then. Whether there was one.
    pub fn forget(&mut self, snapshot: &SnapshotName) -> bool {
        let layer = self
            .layers
            .values_mut()
            .find(|layer| layer.snapshot.as_ref().is_some_and(|s| s.name == *snapshot));
        match layer {
            Some(layer) => {
                layer.snapshot = None;
                true
            }
            None => false,
        }
    }

    /// What is to be done next with spare layers.
    pub fn tidy(&self) -> Option<Tidy> {
        let spare = self
            .layers
            .iter()
            .filter(|(id, layer)| **id != self.live && layer.snapshot.is_none() && layer.holds.is_empty());
        let mut merge = None;
        for (&layer, _) in spare {
            match self.children(layer).as_slice() {
                [] => return Some(Tidy::Remove(layer)),
                // A held layer is being read as it is.
                [into] if self.layers.get(into).is_some_and(|l| l.holds.is_empty()) => {
                    merge.get_or_insert(Tidy::Merge { layer, into: *into });
                }
                _ => {}
            }
        }
        merge
    }

    /// What [`tidy`](Self::tidy) said is done.
    pub fn tidied(&mut self, tidy: Tidy) {
        match tidy {
            Tidy::Remove(layer) => {
                self.layers.remove(&layer);
            }
            Tidy::Merge { layer, into } => {
                let parent = self.layers.remove(&layer).and_then(|layer| layer.parent);
                if let Some(into) = self.layers.get_mut(&into) {
                    into.parent = parent;
                }
            }
        }
    }

    /// As text, with its checksum.
    pub fn encode(&self) -> Vec<u8> {
        let mut text = serde_json::to_vec(self).unwrap_or_default();
        let sum = sha256(&text);
        text.extend_from_slice(format!("\n{sum}\n").as_bytes());
        text
    }

    /// What [`encode`](Self::encode) made.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        let text = std::str::from_utf8(bytes).map_err(|_| "it is not text")?;
        let mut lines = text.split('\n');
        let (body, sum) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
        if sha256(body.as_bytes()).to_string() != sum {
            return Err("its checksum is wrong".into());
        }
        let tree: Self = serde_json::from_str(body).map_err(|error| error.to_string())?;
        if tree.version > VERSION {
            return Err(format!(
                "it has format {}, this treeboot knows up to {VERSION}; use the newer one",
                tree.version
            ));
        }
        tree.audit()?;
        Ok(tree)
    }

    /// # Errors
    /// What cannot be.
    pub fn audit(&self) -> Result<(), String> {
        if !self.layers.contains_key(&self.live) {
            return Err(format!("the live layer {} is not among its layers", self.live));
        }
        if !self.children(self.live).is_empty() {
            return Err(format!("something stands on the live layer {}", self.live));
        }
        for (&id, layer) in &self.layers {
            if id >= self.next {
                return Err(format!("layer {id} is not below the next number, {}", self.next));
            }
            // Parents are older, so there is no cycle.
            if let Some(parent) = layer.parent
                && (parent >= id || !self.layers.contains_key(&parent))
            {
                return Err(format!("layer {id} stands on {parent}, which cannot be"));
            }
        }
        if self.layers.len() > MAX_LAYERS {
            return Err(format!("{} layers are too many", self.layers.len()));
        }
        Ok(())
    }
}
