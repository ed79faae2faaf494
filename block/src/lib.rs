//! Block devices: what the iSCSI target serves and what VMs read.
//!
//! [`BlockDevice`] is the one interface between a protocol and storage. Deliberately absent: networks (a cache
//! fetches through [`ChunkSource`], which its owner implements) and anything that knows iSCSI.

#![forbid(unsafe_code)]

mod blocking;
pub mod cache;
pub mod delta;
mod device;
mod disk;
mod file;
pub mod layers;
mod runs;
pub mod storage;
pub mod verity;

pub use cache::group::{CacheGroup, GroupError, GroupReport, MemberReport, MemberSpec, MemberState};
pub use cache::{
    CacheCounters, CacheError, CacheOptions, ChunkCache, ChunkSource, Completeness, FetchError, FetchFuture,
    Fetched, ImageContent, Reader, Region, SourceId,
};
pub use delta::{BootId, BootIdError, Delta, DeltaDamage, DeltaError, DeltaMeta, DeltaReport};
pub use device::{BlockDevice, BlockError, Extent, Geometry, IoFuture, Provisioning};
pub use disk::{Disk, DiskError};
pub use file::{FileDevice, FileOptions, OpenError};
pub use layers::{DiskFiles, LayerError, LayeredDisk};
pub use verity::{VerityBuilder, VerityLayout};
