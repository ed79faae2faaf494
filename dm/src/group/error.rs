//! Why a cache group did not do what it was asked.

use std::io;
use std::path::PathBuf;

use treeboot_types::Digest;

use super::RangeError;
use crate::bcache::BcacheError;
use crate::loops::LoopError;
use crate::{DeviceNumber, MapperError, Sectors, TableError};

/// Why a cache group did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum GroupError {
    /// device-mapper refuses.
    #[error(transparent)]
    Mapper(#[from] MapperError),
    /// bcache refuses.
    #[error(transparent)]
    Bcache(#[from] BcacheError),
    /// A file as a block device.
    #[error(transparent)]
    Loop(#[from] LoopError),
    /// A table with no length.
    #[error(transparent)]
    Table(#[from] TableError),
    /// No range for a content.
    #[error("no place for the content {} in the cache group", content.short())]
    Place {
        /// The content.
        content: Digest,
        /// Why.
        #[source]
        source: RangeError,
    },
    /// A cache device holds something that is not treeboot's.
    #[error(
        "the device {device} is not empty and no cache device of this host; to give it to the cache, type: wipefs -a and dd if=/dev/zero count=8 over it"
    )]
    Foreign {
        /// The device.
        device: DeviceNumber,
    },
    /// A cache device is new to the group, and somebody's device lies over it. device-mapper itself would not mind.
    #[error(
        "the device {device} is in use by {}; remove what is over it, or give the cache another device", holders.join(", ")
    )]
    InUse {
        /// The device.
        device: DeviceNumber,
        /// What lies over it.
        holders: Vec<String>,
    },
    /// A cache device is too small, or there is none.
    #[error("the cache devices have {have} sectors in all, of which at least {need} are needed")]
    TooSmall {
        /// Sectors there are.
        have: Sectors,
        /// Sectors needed.
        need: Sectors,
    },
    /// The kernel runs a cache group that is not this one: of an earlier life, another kind or other devices. Rebuild it.
    #[error("a cache group is running that does not fit the state in {}; it must be rebuilt", folder.display())]
    Other {
        /// The state's folder.
        folder: PathBuf,
    },
    /// The content is not in the group.
    #[error("the content {} is not in the cache group", .0.short())]
    Absent(Digest),
    /// A file or a device cannot be read or written.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// What was to be done.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl GroupError {
    /// Whether this life of the cache has no place left for one more content: a rebuild makes room.
    pub fn is_full(&self) -> bool {
        match self {
            Self::Place { source, .. } => *source == RangeError::Exhausted,
            // The kernel says EINVAL for this and for much else; its log tells them apart.
            Self::Bcache(BcacheError::File { reason, .. }) => {
                reason.iter().any(|line| line.contains("no room for UUID"))
            }
            _ => false,
        }
    }
}

/// An [`io::Error`] with what was to be done.
pub(super) fn io_error(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> GroupError {
    let path = path.into();
    move |source| GroupError::Io { what, path, source }
}
