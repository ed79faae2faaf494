//! How blocks move on a host: the one narrow trait behind which each plane stands.
//!
//! A plane carries out [`Step`]s and says what it finds; it chooses nothing and remembers nothing that is not on the
//! host itself. Deliberately absent: the coordinator, VMs, and any order between steps (that is the planner's).

pub mod caching;
pub mod faulty;
#[cfg(feature = "kernel-plane")]
pub mod kernel;
mod links;
pub mod model;
pub mod user;

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;

use treeboot_block::layers::{Arrival, Frozen, Incoming, LayerId, LayerReport, LayerTree};
use treeboot_block::{LayerError, LayeredDisk};
use treeboot_types::{DATA_LUN, Digest, HostName, ImageId, Iqn, IscsiUrl, VmName};

use crate::stack::{Found, Step, Violation};

/// What an operation of a plane returns: boxed, so that a plane can be a trait object.
pub type PlaneFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, PlaneError>> + Send + 'a>>;

/// Blocks of data and of zeroes that each layer has.
pub type LayerBlocks = BTreeMap<LayerId, (u64, u64)>;

/// Which kind of plane it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlaneKind {
    /// Everything in this process.
    User,
    /// open-iscsi, device-mapper and LIO.
    Kernel,
    /// A model in memory, for tests.
    Model,
}

/// A verb that not every plane can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verb {
    /// A point in time of a disk, as a layer; going back to it, and deleting it.
    Snapshot,
    /// A check of all that a VM wrote.
    CheckDelta,
    /// A copy of a VM's disk here or on another host.
    Clone,
    /// What a VM's disk has, for a file or a new version of its image.
    Export,
    /// A VM's disk moved to another host.
    Migrate,
    /// A limit of what a VM writes.
    Limit,
    /// A look at the cache group, and a change of what is in it.
    Cache,
}

impl Verb {
    /// Why a kind of plane cannot do it, and what to do instead; `None` where it can.
    pub fn refusal(self, plane: PlaneKind) -> Option<&'static str> {
        match (plane, self) {
            (PlaneKind::User, _) => None,
            (PlaneKind::Kernel, Self::Snapshot) => Some(
                "dm-snapshot keeps one layer of writes over a base and cannot freeze it; run the VM on a host of the user plane",
            ),
            (PlaneKind::Kernel, Self::CheckDelta) => Some(
                "what dm-snapshot writes has no checksums; the kernel calls a delta that it cannot read invalid, and 'treeboot doctor' says so",
            ),
            (PlaneKind::Kernel, Self::Clone | Self::Export | Self::Migrate) => Some(
                "what dm-snapshot wrote cannot be read while the VM runs; run the VM on a host of the user plane",
            ),
            (PlaneKind::Kernel, Self::Limit) => Some(
                "dm-snapshot calls a delta that finds no room invalid, and all of it is lost then; its file may grow to what the disk can come to \
                 need, and '--delta-step' says how fast. Run the VM on a host of the user plane",
            ),
            (PlaneKind::Model, Self::Limit) => None,
            (PlaneKind::Kernel, Self::Cache) => Some(
                "bcache and dm-cache choose by themselves what they keep; give the agent other devices with --cache-device, or run a host of the \
                 user plane",
            ),
            (PlaneKind::Model, Self::Cache) => Some("a model caches nothing; use a real plane"),
            (PlaneKind::Model, _) => Some("a model has no layers; use a real plane"),
        }
    }

    /// A word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Snapshot => "snapshot",
            Self::CheckDelta => "delta check",
            Self::Clone => "clone",
            Self::Export => "export",
            Self::Migrate => "migrate",
            Self::Limit => "a limit of what a VM writes",
            Self::Cache => "cache",
        }
    }
}

/// What a plane can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Abilities {
    /// How many stripes it can read apart; 1 where it cannot split.
    pub max_stripes: u32,
}

/// Which part of the host to look at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// Everything.
    All,
    /// One content: its paths, base, exports, cache and store.
    Base(Digest),
    /// One VM: its delta and disk.
    Disk(VmName),
}

/// Where a VM's front end finds its disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskPlace {
    /// A LUN at the plane's portal.
    Lun(IscsiUrl),
    /// A block device of this host.
    Device(PathBuf),
}

/// Why a plane could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum PlaneError {
    /// No room on the disk.
    #[error("no space left for {what}; free some, or give the agent another directory")]
    NoSpace {
        /// What was to be stored, and where.
        what: String,
    },
    /// The step does not fit what is there.
    #[error(transparent)]
    Rule(#[from] Violation),
    /// What lies on the disk is not what it should be.
    #[error("{what} is damaged: {why}")]
    Damaged {
        /// The thing.
        what: String,
        /// What is wrong with it.
        why: String,
    },
    /// Not there.
    #[error("{what} is not there")]
    Missing {
        /// The thing.
        what: String,
    },
    /// A part under the plane refused.
    #[error("{what} failed")]
    Failed {
        /// What was tried, with names.
        what: String,
        /// The reason.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It did not end in time.
    #[error("{what} took longer than {limit_ms} ms")]
    TooLong {
        /// What was waited for.
        what: String,
        /// The limit in milliseconds.
        limit_ms: u64,
    },
    /// This plane cannot have it.
    #[error("{what} cannot be had here: {why}")]
    Unfit {
        /// The thing.
        what: String,
        /// What is in the way, and what to do.
        why: String,
    },
    /// A step failed, and so did its undoing: what is left is swept at the next attempt.
    #[error("{cause}, and what was begun could not be undone")]
    Undo {
        /// Why the step failed.
        cause: Box<PlaneError>,
        /// Why it could not be undone.
        #[source]
        undo: Box<PlaneError>,
    },
    /// The layers of a VM's disk.
    #[error("VM '{vm}': {source}")]
    Layers {
        /// The VM.
        vm: VmName,
        /// The reason.
        source: Box<LayerError>,
    },
    /// A test asked for it.
    #[error("injected fault at step {at}")]
    Injected {
        /// Which step, counted from 0.
        at: usize,
    },
}

impl PlaneError {
    /// An operating system's error, told apart by whether room was lacking.
    pub fn io(what: impl Into<String>, source: std::io::Error) -> Self {
        match source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                Self::NoSpace { what: what.into() }
            }
            _ => Self::Failed {
                what: what.into(),
                source: source.into(),
            },
        }
    }
}

/// What a path does at the moment.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PathStats {
    /// The stripe.
    pub stripe: u32,
    /// The host behind it; absent for a foreign target.
    pub host: Option<HostName>,
    /// `host:port`.
    pub portal: String,
    /// `false`: a fallback.
    pub active: bool,
    /// connecting, up, suspect, down, distrusted.
    pub state: &'static str,
    /// Commands in flight.
    pub in_flight: u32,
    /// Payload read.
    pub bytes: u64,
    /// Commands that failed or were given up.
    pub failures: u64,
    /// Smoothed service time in microseconds.
    pub service_time_us: u64,
}

/// What a base did since the agent started; bytes or numbers of events.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BaseStats {
    /// Sent by the exports' sockets, headers too.
    pub shipped_wire_bytes: u64,
    /// Payload from active parents.
    pub parent_bytes: u64,
    /// Payload from fallbacks.
    pub fallback_bytes: u64,
    /// Payload of the hash tree, from whomever.
    pub hash_bytes: u64,
    /// Asked for by VMs here.
    pub guest_read_bytes: u64,
    /// Distinct 4 KiB blocks of these, in bytes.
    pub guest_unique_bytes: u64,
    /// Asked for by children.
    pub child_read_bytes: u64,
    /// Chunk-sized parts of reads that were in the cache.
    pub chunk_hits: u64,
    /// Fetches begun.
    pub chunk_misses: u64,
    /// Reads that waited for another's fetch.
    pub chunk_joined: u64,
    /// Fetched, and not what the hash tree says.
    pub bad_chunks: u64,
    /// In the cache.
    pub cached_bytes: u64,
    /// Passed through because the cache had no room.
    pub uncached_bytes: u64,
    /// The longest that one read took, in microseconds.
    pub longest_stall_us: u64,
    /// The paths.
    pub paths: Vec<PathStats>,
}

/// What a disk did since the agent started, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DiskStats {
    /// Allocated for the VM's writes.
    pub delta_bytes: u64,
    /// Of the blocks that it wrote and did not discard: what a limit counts. 0 where nobody counts.
    pub data_bytes: u64,
    /// Read by the VM.
    pub read_bytes: u64,
    /// Written by the VM.
    pub written_bytes: u64,
    /// Front ends logged in at the moment.
    pub sessions: u32,
}

/// What a parent did wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// Bytes that the hash tree does not know.
    WrongBytes,
    /// No answer.
    Unreachable,
}

/// A parent that did something wrong.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ParentFault {
    /// The content that was read.
    pub digest: Digest,
    /// The stripe.
    pub stripe: u32,
    /// The host; absent for a foreign target.
    pub host: Option<HostName>,
    /// `host:port`.
    pub portal: String,
    /// What.
    pub fault: Fault,
    /// How often since it was last told.
    pub count: u64,
}

/// Something that does not work as it was set, while reads and writes go on without it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Trouble {
    /// What kind of thing it is, in the words of the doctor.
    pub kind: &'static str,
    /// Which.
    pub name: String,
    /// What is wrong, what is done instead, and what to do.
    pub why: String,
}

/// How blocks move on a host.
///
/// Every operation may be called at any time and from many tasks; operations on different contents and VMs do not
/// wait for each other. A step that is done already succeeds and changes nothing.
pub trait Plane: Send + Sync + 'static {
    /// Which it is.
    fn kind(&self) -> PlaneKind;

    /// What it can do.
    fn abilities(&self) -> Abilities;

    /// What is there, of ours; never what others made.
    fn inspect<'a>(&'a self, scope: &'a Scope) -> PlaneFuture<'a, Found>;

    /// Carries out one step. Either all of it is there afterwards, or what is left is reported by `inspect` (as a
    /// layer or a leftover).
    fn apply<'a>(&'a self, step: &'a Step) -> PlaneFuture<'a, ()>;

    /// Ends when the base can be read through its paths: a first block came and was checked. Bounded in time.
    fn readable(&self, digest: Digest) -> PlaneFuture<'_, ()>;

    /// Counters of an open base, its exports together.
    fn base_stats(&self, digest: &Digest) -> Option<BaseStats>;

    /// Counters of a served disk.
    fn disk_stats(&self, vm: &VmName) -> Option<DiskStats>;

    /// Runs of 4 KiB blocks (first, count) that VMs here read of a base, in the order of their first reading.
    fn access_map(&self, digest: &Digest) -> Vec<(u32, u32)>;

    /// Where the disk of a VM is found, whether it is served at the moment or not.
    ///
    /// # Errors
    /// The portal cannot stand in a URL.
    fn disk_place(&self, vm: &VmName) -> Result<DiskPlace, PlaneError> {
        let url = format!("iscsi://{}/{}/{DATA_LUN}", self.portal(), Iqn::of_disk(vm));
        match url.parse() {
            Ok(url) => Ok(DiskPlace::Lun(url)),
            Err(source) => Err(PlaneError::Failed {
                what: format!("naming the disk of VM '{vm}'"),
                source: Box::<treeboot_types::IscsiUrlError>::new(source),
            }),
        }
    }

    /// The layers of a served disk; with `check` all of them are read and what is wrong is told.
    fn layers<'a>(&'a self, vm: &'a VmName, check: bool) -> PlaneFuture<'a, Vec<LayerReport>> {
        let _ = check;
        let kind = self.kind();
        Box::pin(async move { Err(no_layers(vm, kind)) })
    }

    /// The stable name of a disk's block device, where it has one.
    fn device(&self, _vm: &VmName) -> Option<PathBuf> {
        None
    }

    /// What a transfer holds of a disk, to be read.
    ///
    /// # Errors
    /// Nothing is held, or the plane has no layers.
    fn held(&self, vm: &VmName, transfer: u64) -> Result<Arc<Frozen>, PlaneError> {
        let _ = transfer;
        Err(no_layers(vm, self.kind()))
    }

    /// Begins to take in a disk for a VM that is not there yet, or goes on with it. [`Step::CreateDelta`] takes what was finished.
    fn receive<'a>(&'a self, arrival: &'a Arrival) -> PlaneFuture<'a, Arc<Incoming>> {
        let kind = self.kind();
        Box::pin(async move { Err(no_layers(&arrival.vm, kind)) })
    }

    /// The layers of a served disk, to be read one by one while a transfer holds them, also after the disk is served no more.
    ///
    /// # Errors
    /// It is not served, or the plane has no layers.
    fn layered(&self, vm: &VmName) -> Result<Arc<LayeredDisk>, PlaneError> {
        Err(no_layers(vm, self.kind()))
    }

    /// All layers of a disk came: [`Step::CreateDelta`] takes them. Done already, it changes nothing.
    fn finish<'a>(
        &'a self,
        arrival: &'a Arrival,
        tree: &'a LayerTree,
        blocks: &'a LayerBlocks,
    ) -> PlaneFuture<'a, ()> {
        let _ = (tree, blocks);
        let kind = self.kind();
        Box::pin(async move { Err(no_layers(&arrival.vm, kind)) })
    }

    /// Removes what came for a VM that is not to be: what was received, or what a transfer left that nobody goes on with.
    fn discard<'a>(&'a self, vm: &'a VmName, transfer: Option<u64>) -> PlaneFuture<'a, ()> {
        let _ = (vm, transfer);
        Box::pin(async { Ok(()) })
    }

    /// At the start, when the VMs that are `owned` have what is theirs: removes what came for others. Returns transfers that may be
    /// gone on with.
    fn arrivals(&self, owned: BTreeSet<VmName>) -> PlaneFuture<'_, BTreeSet<(VmName, u64)>> {
        let _ = owned;
        Box::pin(async { Ok(BTreeSet::new()) })
    }

    /// The host's cache group, where this process has it.
    fn cache(&self) -> Option<&Arc<caching::Caching>> {
        None
    }

    /// What does not work as it was set at the moment, for a person.
    fn troubles(&self) -> Vec<Trouble> {
        Vec::new()
    }

    /// Takes the host's secrets as they are now, for sessions to come; those that stand go on.
    fn rekey(&self) -> PlaneFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    /// What parents did wrong since the last call.
    fn take_faults(&self) -> Vec<ParentFault>;

    /// `host:port` under which children and front ends reach the exports.
    fn portal(&self) -> String;

    /// Ends every session and export in good order; what is durable stays.
    fn close(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>>;

    /// The target under which an image is exported.
    fn export_name(&self, image: &ImageId) -> treeboot_types::Iqn {
        treeboot_types::Iqn::of_image(image)
    }
}

/// What a plane says whose disks have no layers.
pub(crate) fn no_layers(vm: &VmName, plane: PlaneKind) -> PlaneError {
    PlaneError::Unfit {
        what: format!("the layers of VM '{vm}'"),
        why: Verb::Snapshot.refusal(plane).unwrap_or_default().into(),
    }
}

#[cfg(test)]
mod model_tests;
