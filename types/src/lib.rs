//! Names, ids and units that every crate of treeboot shares.
//!
//! Everything here is a value: parsed once at the edge, valid from then on. Deliberately absent: I/O, async,
//! clocks and anything that knows a protocol.

#![forbid(unsafe_code)]

mod iqn;
mod name;
mod placement;
mod unit;
mod url;

pub use iqn::{Iqn, IqnError, MAX_IQN_BYTES, TREEBOOT_AUTHORITY};
pub use name::{HostName, ImageId, ImageName, ImageRef, MAX_NAME_BYTES, NameError, SnapshotName, VmName};
pub use placement::{
    AttachState, Attachment, BadParent, Child, Endpoint, Fault, HostInfo, Image, Labels, Origin, Parent,
    PathPolicy, Placement, PlaneKind, Portal, PortalError, StripePlacement,
};
pub use unit::{Digest, DigestError, Epoch, StripeIndex, Tick, parse_size};
pub use url::{IscsiUrl, IscsiUrlError};

/// The TCP port that IANA assigned to iSCSI targets (RFC 7143 §4.2.7.1).
pub const ISCSI_PORT: u16 = 3260;

/// Bytes in a chunk, the unit of caching and fetching, unless an image says otherwise.
pub const DEFAULT_CHUNK_BYTES: u32 = 64 * 1024;

/// Bytes in a block of the dm-verity hash tree, of data and of hashes alike
/// (kernel `Documentation/admin-guide/device-mapper/verity.rst`).
pub const VERITY_BLOCK_BYTES: u32 = 4096;

/// LUN that holds the data of an image.
pub const DATA_LUN: u16 = 0;
/// LUN that holds the image's dm-verity superblock and hash tree.
pub const HASH_LUN: u16 = 1;
