//! A VM's disk with snapshots: a stack of layers over the base, of which the highest takes the writes.
//!
//! A snapshot freezes the live layer and begins a new one; the moment at which it counts is one rename, of the manifest. What no
//! snapshot names any more is merged into the layer above it while the disk is in use: its blocks are copied, made durable, and
//! only then the manifest stops naming it. A read looks up the live layer's map, then one map of all frozen layers
//! (`docs/decisions/0150-snapshots-are-layers.md`).
//!
//! Deliberately absent: who may take snapshots and when (the agent), and merges of whole images (the store).

mod disk;
mod files;
mod folder;
mod frozen;
mod incoming;
mod tree;

pub use disk::{LayerError, LayerReport, LayeredDisk};
pub use files::{DELTA_SUFFIX, DiskFiles, MANIFEST_SUFFIX, check, delete, is_in_use, owner_of};
pub use folder::{Directory, Folder};
pub use frozen::{Content, Frozen};
pub use incoming::{
    Arrival, Arrivals, Incoming, adopt, arrivals, discard_incoming, discard_received, finish_layers,
    sweep_arrivals,
};
pub use tree::{Layer, LayerId, LayerTree, MAX_LAYERS, SHIFT, Snapshot, Tidy, TreeError};

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
