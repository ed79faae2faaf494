//! The kernel's parts that the plane works with, and what all of its modules share.
//!
//! Everything here may block and has no limit of its own; [`within`] gives it a thread and a limit.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::Flock;
use treeboot_dm::loops::{self, LoopDevice, LoopError};
use treeboot_dm::{DeviceNumber, DmDevice, Mapper, MapperError, Mode, Outcome, Table};
use treeboot_iscsi::lio::Lio;
use treeboot_iscsi::open_iscsi::OpenIscsi;
use treeboot_types::{Digest, Iqn};

use super::cached::Cached;
use super::record::{Deltas, Records};
use super::{KernelSettings, failed};
use crate::plane::PlaneError;
use crate::stack::Backing;

/// The file of a content's hash tree, in its cache or store.
const HASH_FILE: &str = "hash";
/// The file of a stored content's data.
const DATA_FILE: &str = "data";

/// How long a step's part may block. Table loads, configfs and loop devices take milliseconds; what takes longer has a device below that
/// hangs, and whoever waits is told so instead of waiting for ever.
pub(super) const LIMIT: Duration = Duration::from_secs(30);

/// The host as the plane sees it.
pub(super) struct Sys {
    pub(super) settings: KernelSettings,
    pub(super) initiator: Iqn,
    pub(super) mapper: Arc<Mapper>,
    pub(super) cached: Cached,
    pub(super) lio: Lio,
    pub(super) iscsi: OpenIscsi,
    pub(super) records: Records,
    pub(super) deltas: Deltas,
    /// Held for as long as any thread works here: one that was left behind must not meet the next plane.
    pub(super) _lock: Flock<File>,
}

impl Sys {
    /// Makes sure that nobody has a device open, nor mounted.
    pub(super) fn unused(&self, device: &DmDevice) -> Result<(), PlaneError> {
        match self.mapper.find(device).map_err(mapper_error)? {
            Some(seen) if seen.open_count > 0 => {
                let why = format!("it is in use on this host, open {} times", seen.open_count);
                Err(used(device, why))
            }
            _ => Ok(()),
        }
    }

    /// The directory of a content's cache.
    pub(super) fn cache_dir(&self, digest: &Digest) -> PathBuf {
        self.settings.cache.join(digest.to_string())
    }

    /// The directory of a content in the store.
    pub(super) fn store_dir(&self, digest: &Digest) -> Option<PathBuf> {
        Some(self.settings.store.as_ref()?.join(digest.to_string()))
    }

    /// The file that holds a content's hash tree.
    pub(super) fn hash_file(&self, digest: &Digest, backing: Backing) -> Option<PathBuf> {
        let dir = match backing {
            Backing::Cache => self.cache_dir(digest),
            Backing::Store | Backing::Adopted => self.store_dir(digest)?,
        };
        Some(dir.join(HASH_FILE))
    }

    /// The file that holds a stored content's data.
    pub(super) fn data_file(&self, digest: &Digest) -> Option<PathBuf> {
        Some(self.store_dir(digest)?.join(DATA_FILE))
    }

    /// Makes a device map a table.
    pub(super) fn ensure(&self, device: &DmDevice, table: &Table, mode: Mode) -> Result<Outcome, PlaneError> {
        self.mapper.ensure(device, table, mode).map_err(mapper_error)
    }

    /// The number of a device that must be there.
    pub(super) fn number(&self, device: &DmDevice) -> Result<DeviceNumber, PlaneError> {
        match self.mapper.number(device).map_err(mapper_error)? {
            Some(number) => Ok(number),
            None => Err(PlaneError::Missing {
                what: format!("the device {device}"),
            }),
        }
    }

    /// Removes a device; it may be gone.
    pub(super) fn remove(&self, device: &DmDevice) -> Result<(), PlaneError> {
        self.mapper.remove(device).map(drop).map_err(mapper_error)
    }
}

/// Makes a file a block device.
pub(super) fn attach(file: &Path, mode: Mode) -> Result<LoopDevice, PlaneError> {
    loops::attach(file, mode, 0).map_err(loop_error)
}

/// Detaches whatever has `file`.
pub(super) fn detach(file: &Path) -> Result<(), PlaneError> {
    for found in loops::find(file).map_err(loop_error)? {
        loops::detach(&found).map_err(loop_error)?;
    }
    Ok(())
}

pub(super) fn mapper_error(error: MapperError) -> PlaneError {
    match &error {
        MapperError::InUse { device, .. } => used(device, error.to_string()),
        _ => failed("a device-mapper call", error),
    }
}

fn used(device: &DmDevice, why: String) -> PlaneError {
    PlaneError::Unfit {
        what: format!("the end of '{device}'"),
        why: format!("{why}; unmount it, or close what has it open"),
    }
}

pub(super) fn loop_error(error: LoopError) -> PlaneError {
    failed("a loop device", error)
}

pub(super) fn record_error(error: io::Error) -> PlaneError {
    PlaneError::io("the plane's records", error)
}

/// Runs what blocks on a thread of its own and waits for it no longer than [`LIMIT`]. What hangs goes on hanging there; its outcome
/// is seen by the next look.
pub(super) async fn within<T: Send + 'static>(
    what: impl Into<String>,
    work: impl FnOnce() -> Result<T, PlaneError> + Send + 'static,
) -> Result<T, PlaneError> {
    match tokio::time::timeout(LIMIT, tokio::task::spawn_blocking(work)).await {
        Ok(Ok(result)) => result,
        Ok(Err(panic)) => Err(failed(what, panic)),
        Err(_) => Err(PlaneError::TooLong {
            what: what.into(),
            limit_ms: LIMIT.as_millis() as u64,
        }),
    }
}

/// What the kernel counts of a block device (kernel `Documentation/block/stat.rst`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct BlockCounts {
    pub(super) read_bytes: u64,
    pub(super) written_bytes: u64,
    pub(super) in_flight: u64,
    pub(super) reads: u64,
    pub(super) read_ms: u64,
}

/// A block device's counters; `None` where it is gone.
pub(super) fn block_counts(number: DeviceNumber) -> Option<BlockCounts> {
    let text = std::fs::read_to_string(format!("/sys/dev/block/{number}/stat")).ok()?;
    parse_counts(&text)
}

fn parse_counts(text: &str) -> Option<BlockCounts> {
    let numbers: Vec<u64> = text
        .split_whitespace()
        .map_while(|word| word.parse().ok())
        .collect();
    Some(BlockCounts {
        reads: *numbers.first()?,
        read_bytes: numbers.get(2)? * super::tables::SECTOR,
        read_ms: *numbers.get(3)?,
        written_bytes: numbers.get(6)? * super::tables::SECTOR,
        in_flight: *numbers.get(8)?,
    })
}

/// Size of a block device in bytes; `None` where it is gone.
pub(super) fn block_bytes(number: DeviceNumber) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/sys/dev/block/{number}/size")).ok()?;
    Some(text.trim().parse::<u64>().ok()? * super::tables::SECTOR)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_by_their_place() {
        let text = "  11  0  88  7  3  1  24  5  2  9  12 0 0 0 0 0 0\n";
        let expected = BlockCounts {
            reads: 11,
            read_bytes: 88 * 512,
            read_ms: 7,
            written_bytes: 24 * 512,
            in_flight: 2,
        };
        assert_eq!(parse_counts(text), Some(expected));
        assert_eq!(parse_counts("1 2 3"), None);
    }
}
