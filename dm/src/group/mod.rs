//! The cache group: a host's cache devices, shared by all its images.
//!
//! `verity` in what follows is the device that has the content's checked bytes: its verity device, or one that only joins reads of it
//! ([`crate::loops::join_reads`]), as in the agent's stack.
//!
//! [`Group::open`] brings it up over the cache devices, [`Group::add`] gives the table of a content's base over it,
//! [`Group::remove`] and [`Group::release`] take a content out, for ever or for now, while others are in use. The base itself
//! is the caller's to make and to remove, and must be gone before its content leaves the group.
//!
//! | | kind bcache (the default) | kind dm-cache |
//! | --- | --- | --- |
//! | what a read caches | what it read, at once; some is missed at full speed | nothing; only the filler caches |
//! | the filler | reads through it, paced | reads from verity once, writes whole blocks through the cache; the writes to the image vanish below (`Target::DropWrites`) |
//! | cache device fails | each read goes on to verity and the parents; [`Group::health`] sees it | the same |
//! | devices added | rebuild | in use, by opening the group again with more devices |
//! | images in a cache's life | 512 (buckets of 64 KiB) to 4,096 (512 KiB) | 140,000 of 15 GB |
//!
//! **A rebuild**, for devices taken away, a failed cache or no place left: give every base the table of [`uncached`], which its
//! users do not notice, then [`Group::discard`], then open it again and add the contents anew.
//!
//! **A cache that fails is passed over by the kernel.** Below a base is a dm-multipath of two devices that hold the same bytes, the
//! cache's and verity's. And under bcache lies a dm-multipath of one path, which takes the cache devices away at their first error: bcache counts
//! what it could not write as cached where the error comes at once (seen on 6.1), and would serve what lay there before.
//!
//! **A cache that may be stale is thrown away.** Neither kind promises that a block whose address is on the disk has its bytes
//! there too when the power goes, so a cache that was not closed before its machine restarted is begun anew.

mod ranges;
mod state;

#[cfg(feature = "kernel-plane")]
mod bcached;
#[cfg(feature = "kernel-plane")]
mod dm_cached;
#[cfg(feature = "kernel-plane")]
mod error;
#[cfg(feature = "kernel-plane")]
mod fill;
#[cfg(feature = "kernel-plane")]
mod label;
#[cfg(feature = "kernel-plane")]
mod open;
mod pace;
#[cfg(feature = "kernel-plane")]
mod probe;

use std::fmt;
use std::str::FromStr;

use crate::{DeviceNumber, Sectors, Table, TableError, Target};
#[cfg(feature = "kernel-plane")]
use crate::{DmDevice, Mapper, Mode, table::Multipath};
#[cfg(feature = "kernel-plane")]
pub use error::GroupError;
#[cfg(feature = "kernel-plane")]
pub use fill::{FillError, Filler};
#[cfg(feature = "kernel-plane")]
pub use open::{CacheDevice, Config, Group, Health};
pub use pace::Pace;
pub use ranges::{Range, RangeError, Ranges, SPACE};
pub use state::{State, StateError, StateFile};
#[cfg(feature = "kernel-plane")]
use treeboot_types::Digest;

/// Unit of caching of the dm-cache kind, 64 KiB: that of the user plane's chunks.
pub const BLOCK: Sectors = Sectors(128);

/// How a group caches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kind {
    /// bcache: one set, one backing device a content.
    #[default]
    Bcache,
    /// dm-cache: one cache over all contents.
    DmCache,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bcache => "bcache",
            Self::DmCache => "dm-cache",
        })
    }
}

/// Why a text is not a kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a kind of cache group: bcache or dm-cache")]
pub struct KindError(pub String);

impl FromStr for Kind {
    type Err = KindError;
    fn from_str(text: &str) -> Result<Self, KindError> {
        match text {
            "bcache" => Ok(Self::Bcache),
            "dm-cache" => Ok(Self::DmCache),
            _ => Err(KindError(text.into())),
        }
    }
}

/// Makes the device that reads from `cached` and, from its first error on, from the verity device, which has the same bytes: no read
/// fails because the cache does. [`Group::reinstate`] has it ask the cache again. It is not the base itself, because device-mapper never
/// gives a multipath another target. Gives the table of a base over it.
#[cfg(feature = "kernel-plane")]
fn served(
    mapper: &Mapper,
    content: Digest,
    cached: DeviceNumber,
    verity: DeviceNumber,
    length: Sectors,
) -> Result<Table, GroupError> {
    let device = DmDevice::Served(content);
    let target = Target::Multipath(Multipath::in_turn(&[cached, verity]));
    mapper.ensure(&device, &Table::whole(length, target)?, Mode::ReadOnly)?;
    match mapper.number(&device)? {
        Some(number) => Ok(uncached(number, length)?),
        None => Err(GroupError::Absent(content)),
    }
}

/// The table of a base that is served from its verity device, past every cache.
///
/// # Errors
/// [`TableError`] where `length` is 0.
pub fn uncached(verity: DeviceNumber, length: Sectors) -> Result<Table, TableError> {
    let offset = Sectors(0);
    Table::whole(
        length,
        Target::Linear {
            device: verity,
            offset,
        },
    )
}
