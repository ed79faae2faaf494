//! What a host should hold, what it holds, and the steps between: pure values and one pure function.
//!
//! [`plan`] makes every choice; whoever applies its steps makes none. Equal input gives no steps. Deliberately
//! absent: clocks, I/O, async, and anything that only one plane has (a plane gives a step its meaning).
//!
//! The layers, bottom up, are the same for every plane: paths to parents, the base over them, the base's exports
//! for children, a VM's delta, the VM's disk. A layer is built after what it stands on and removed before it.

mod plan;
mod world;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use treeboot_types::{Digest, Endpoint, HostName, ImageId, PathPolicy, SnapshotName, VmName};

pub use plan::{Obstacle, Plan, plan};
pub use world::{Violation, World};

/// What an image is, apart from its names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Content {
    /// Root of the dm-verity tree: the identity.
    pub digest: Digest,
    /// Size in bytes.
    pub bytes: u64,
    /// The unit of caching in bytes, a power of two.
    pub chunk_bytes: u32,
}

/// Where a base keeps its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Backing {
    /// In the host's cache: what was read so far, and what does not fit passes through.
    Cache,
    /// In the host's store: the whole image, put there by an import.
    Store,
    /// In the host's store, but only the hash tree for certain; data is read from foreign targets and kept.
    Adopted,
}

impl Backing {
    /// Whether the directory belongs to the store, whose contents are removed only when a person says so.
    pub fn in_store(self) -> bool {
        matches!(self, Self::Store | Self::Adopted)
    }
}

/// One place to read a base from.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PathTo {
    /// The host behind it; absent for a foreign target.
    pub host: Option<HostName>,
    /// Where it is served.
    pub endpoint: Endpoint,
}

/// The paths of one stripe.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct StripePaths {
    /// Parents that share the load.
    pub active: Vec<PathTo>,
    /// Where reads go when no active path answers, in this order.
    pub fallbacks: Vec<PathTo>,
    /// How the load is shared.
    pub policy: PathPolicy,
}

/// Where a base's bytes come from.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Sources {
    /// Bytes of consecutive addresses that one stripe holds before the next one's turn.
    pub unit_bytes: u64,
    /// One for each stripe; none where the store holds everything.
    pub stripes: Vec<StripePaths>,
}

/// Who may read an export.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// Every initiator: an origin.
    Anyone,
    /// These hosts, by their initiators' names.
    Hosts(BTreeSet<HostName>),
}

impl Access {
    /// What both allow.
    fn narrowed_to(&self, other: &Self) -> Self {
        match (self, other) {
            (Self::Anyone, other) => other.clone(),
            (this, Self::Anyone) => this.clone(),
            (Self::Hosts(a), Self::Hosts(b)) => Self::Hosts(a.intersection(b).cloned().collect()),
        }
    }
}

/// A base as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WantedBase {
    /// What it is.
    pub content: Content,
    /// Where it keeps its bytes.
    pub backing: Backing,
    /// Where they come from.
    pub sources: Sources,
    /// Under which names it is exported, and to whom.
    pub exports: BTreeMap<ImageId, Access>,
}

/// A VM's disk as it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WantedDisk {
    /// The base under it.
    pub digest: Digest,
    /// Its size in bytes.
    pub bytes: u64,
}

/// All that a host, or the part of it that is planned, should hold.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Wanted {
    /// Bases, by content.
    pub bases: BTreeMap<Digest, WantedBase>,
    /// Bases that another plan keeps: disks may stand on them, and nothing of them is planned here.
    pub standing: BTreeSet<Digest>,
    /// Disks, by VM.
    pub disks: BTreeMap<VmName, WantedDisk>,
    /// Disks that are block devices of the host, too.
    pub devices: BTreeSet<VmName>,
    /// The most bytes of blocks that VMs may have written, of those that have a limit.
    pub limits: BTreeMap<VmName, u64>,
    /// Disks whose deltas are to be deleted. A delta in neither set is nobody's to delete.
    pub doomed_disks: BTreeSet<VmName>,
    /// Disks that are served to nobody, and whose deltas stay: their VMs are on their way from or to another host.
    pub resting_disks: BTreeSet<VmName>,
    /// Caches without a base that stay for the next time.
    pub kept_caches: BTreeSet<Digest>,
    /// Stores that are to be deleted. A store in no set stays.
    pub doomed_stores: BTreeSet<Digest>,
}

/// An open base.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundBase {
    /// What it is.
    pub content: Content,
    /// Where it keeps its bytes.
    pub backing: Backing,
}

/// An export of a base.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundExport {
    /// The base.
    pub digest: Digest,
    /// Who may read it.
    pub access: Access,
}

/// A VM's delta on stable storage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FoundDelta {
    /// Whole, as far as a look at its head tells.
    Sound(WantedDisk),
    /// Not readable as a delta.
    Damaged(String),
    /// Not looked into: whose it is shows when it is served, and serving another's is refused.
    Unopened,
}

/// A disk's block device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FoundDevice {
    /// It works.
    Whole,
    /// Some of it is there: it was made by half, or its agent died and its I/O waits for this one.
    Parts,
}

/// All that `inspect` saw.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Found {
    /// Paths that are set, by the base they feed.
    pub paths: BTreeMap<Digest, Sources>,
    /// Open bases.
    pub bases: BTreeMap<Digest, FoundBase>,
    /// Exports of bases.
    pub exports: BTreeMap<ImageId, FoundExport>,
    /// Cache directories.
    pub caches: BTreeSet<Digest>,
    /// Store directories, finished ones only.
    pub stores: BTreeSet<Digest>,
    /// Deltas.
    pub deltas: BTreeMap<VmName, FoundDelta>,
    /// Disks that are served, and the base each stands on.
    pub disks: BTreeMap<VmName, Digest>,
    /// Block devices of disks.
    pub devices: BTreeMap<VmName, FoundDevice>,
    /// Limits of what VMs write.
    pub limits: BTreeMap<VmName, u64>,
    /// What an interrupted step of ours left lying, by the plane's own name for it.
    pub leftovers: BTreeSet<String>,
}

/// One change of the layers of a VM's disk, which is served meanwhile.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "change")]
pub enum LayerChange {
    /// Freezes what was written, under a name.
    Snapshot {
        /// The name.
        snapshot: SnapshotName,
        /// When, in milliseconds since 1970, for people.
        created_unix_ms: u64,
        /// The guest holds its file systems still meanwhile.
        frozen: bool,
    },
    /// Gives up what was written since a snapshot.
    RollBack {
        /// The snapshot.
        snapshot: SnapshotName,
    },
    /// A snapshot's name goes.
    Forget {
        /// The snapshot.
        snapshot: SnapshotName,
    },
    /// Keeps a point in time for a transfer: now, or a snapshot.
    Hold {
        /// The transfer, a random number.
        transfer: u64,
        /// The snapshot.
        snapshot: Option<SnapshotName>,
    },
    /// A transfer has ended, or all have.
    Release {
        /// The transfer.
        transfer: Option<u64>,
    },
    /// Freezes what was written for a transfer, and keeps every layer as it is.
    HoldAll {
        /// The transfer, a random number.
        transfer: u64,
    },
    /// Merges what no snapshot needs any more, and gives what is frozen its checksums.
    Tidy,
}

/// One change of one layer. Applying one that is done already changes nothing and succeeds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "step")]
pub enum Step {
    /// Removes what an interrupted step left lying.
    Sweep {
        /// The plane's name for it.
        leftover: String,
    },
    /// Takes a disk's block device away, whatever there is of it. Refused while somebody holds it.
    DetachDevice {
        /// The VM.
        vm: VmName,
    },
    /// Ends serving a VM's disk; its delta stays.
    StopDisk {
        /// The VM.
        vm: VmName,
    },
    /// Deletes a VM's delta.
    DeleteDelta {
        /// The VM.
        vm: VmName,
    },
    /// Ends an export of a base.
    Unexport {
        /// The name it has there.
        image: ImageId,
    },
    /// Closes a base; its cache or store stays.
    CloseBase {
        /// The base.
        digest: Digest,
    },
    /// Ends the paths of a base.
    DropPaths {
        /// The base.
        digest: Digest,
    },
    /// Deletes a cache that no base uses.
    DropCache {
        /// The content.
        digest: Digest,
    },
    /// Deletes an image from the store.
    DropStore {
        /// The content.
        digest: Digest,
    },
    /// Sets where a base reads from; paths that stay keep their sessions. Does not wait for any to be up.
    SetPaths {
        /// The base.
        digest: Digest,
        /// The paths.
        sources: Sources,
    },
    /// Opens a base over its paths, making the cache where it is missing.
    OpenBase {
        /// What it is.
        content: Content,
        /// Where it keeps its bytes.
        backing: Backing,
    },
    /// Exports a base.
    Export {
        /// Under this name.
        image: ImageId,
        /// The base.
        digest: Digest,
        /// To whom.
        access: Access,
    },
    /// Changes who may read an export; sessions of those who no longer may are closed.
    SetAccess {
        /// The export.
        image: ImageId,
        /// To whom.
        access: Access,
    },
    /// Makes an empty delta.
    CreateDelta {
        /// The VM.
        vm: VmName,
        /// On which base, and how large.
        disk: WantedDisk,
    },
    /// Limits what a VM writes, whether its disk is served or is about to be. A write beyond it finds no room.
    LimitDisk {
        /// The VM.
        vm: VmName,
        /// The most bytes of blocks; none: as many as there is room for.
        bytes: Option<u64>,
    },
    /// Serves a VM's disk: its delta over the base.
    ServeDisk {
        /// The VM.
        vm: VmName,
        /// On which base, and how large.
        disk: WantedDisk,
    },
    /// Changes the layers of a disk that is served.
    Layers {
        /// The VM.
        vm: VmName,
        /// What is to be changed.
        layers: LayerChange,
    },
    /// Makes a served disk a block device of the host, under its stable name. Where I/O of one waits for its agent, it goes on.
    AttachDevice {
        /// The VM.
        vm: VmName,
    },
}

impl Step {
    /// A short name for logs and for tests that count steps.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Sweep { .. } => "sweep",
            Self::DetachDevice { .. } => "detach_device",
            Self::StopDisk { .. } => "stop_disk",
            Self::DeleteDelta { .. } => "delete_delta",
            Self::Unexport { .. } => "unexport",
            Self::CloseBase { .. } => "close_base",
            Self::DropPaths { .. } => "drop_paths",
            Self::DropCache { .. } => "drop_cache",
            Self::DropStore { .. } => "drop_store",
            Self::SetPaths { .. } => "set_paths",
            Self::OpenBase { .. } => "open_base",
            Self::Export { .. } => "export",
            Self::SetAccess { .. } => "set_access",
            Self::CreateDelta { .. } => "create_delta",
            Self::LimitDisk { .. } => "limit_disk",
            Self::ServeDisk { .. } => "serve_disk",
            Self::Layers { layers, .. } => match layers {
                LayerChange::Snapshot { .. } => "snapshot",
                LayerChange::RollBack { .. } => "roll_back",
                LayerChange::Forget { .. } => "delete_snapshot",
                LayerChange::Hold { .. } | LayerChange::HoldAll { .. } => "hold_layers",
                LayerChange::Release { .. } => "release_layers",
                LayerChange::Tidy => "tidy_layers",
            },
            Self::AttachDevice { .. } => "attach_device",
        }
    }
}

#[cfg(test)]
mod tests;
