//! A disk's private writes, kept in one sparse file beside the base that they belong to.
//!
//! Each 4 KiB block is the base's, data, or zero. Two kinds of crash are told apart
//! (`docs/decisions/0002-io-outlives-the-agent.md`):
//! - The process is killed: the operating system's cache lives on. Each write puts its data, then the *volatile* map
//!   into that cache before it is acknowledged. The map counts only in the same boot of the machine.
//! - The power is cut: the *durable* map counts. A flush syncs the data, then writes the durable map, then syncs
//!   again; so a block that the durable map calls data has its data on the disk.
//!
//! The file is empty until the first write. Memory: two bits a block, by pages of 64 MiB of disk that were written to.
//!
//! A delta that is frozen, as a layer of a disk with snapshots, gets a checksum for each block of data (`seal.rs`).
//!
//! Deliberately absent: the base (a [`Disk`](crate::Disk) joins the two), layers (`crate::layers`), checksums of data that may
//! still be written.

mod format;
mod limit;
mod map;
mod seal;
mod writer;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

use parking_lot::Mutex;
use treeboot_types::Digest;

use crate::storage::{FileStorage, OpenMode, Storage};
use format::{BOOT_OFFSET, DURABLE_OFFSET, Header, Layout, SECTOR};
use map::StateMap;
use writer::Writer;

pub use seal::{DeltaDamage, DeltaReport};

pub(crate) use map::State;
pub(crate) use writer::BlockWrite;

/// The unit of copy on write, in bytes.
pub(crate) const BLOCK: u64 = format::BLOCK;

/// The base that a delta belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeltaMeta {
    /// The base's digest.
    pub digest: Digest,
    /// The base's size in bytes, a multiple of 512.
    pub bytes: u64,
}

/// One boot of a machine: `/proc/sys/kernel/random/boot_id`. Read by the caller, so that a test can reboot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BootId(pub [u8; 16]);

/// Why a text is not a boot id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a boot id, a UUID of 32 hexadecimal digits")]
pub struct BootIdError(pub String);

impl FromStr for BootId {
    type Err = BootIdError;
    fn from_str(text: &str) -> Result<Self, BootIdError> {
        let error = || BootIdError(text.trim().into());
        let digits: Vec<u8> = text.trim().bytes().filter(|&byte| byte != b'-').collect();
        let nibble = |digit: u8| char::from(digit).to_digit(16).map(|value| value as u8);
        if digits.len() != 32 {
            return Err(error());
        }
        let mut id = [0; 16];
        for (byte, pair) in id.iter_mut().zip(digits.as_chunks::<2>().0) {
            *byte = nibble(pair[0]).ok_or_else(error)? << 4 | nibble(pair[1]).ok_or_else(error)?;
        }
        Ok(Self(id))
    }
}

/// Why a delta cannot be used. Each says which file and what to do.
#[derive(Debug, thiserror::Error)]
pub enum DeltaError {
    /// The operating system refused.
    #[error("cannot use the delta '{path}'")]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// There is a file already.
    #[error("the delta '{path}' exists already; destroy the VM it belongs to, or choose another name")]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// There is no file.
    #[error("the delta '{path}' is gone, and with it the VM's writes; destroy the VM and create it again")]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// Another process, or another disk of this one, holds it.
    #[error("the delta '{path}' is in use by another process; stop that one first")]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// Some other file.
    #[error("'{path}' is not a delta of treeboot; check the path")]
    NotADelta {
        /// The file.
        path: PathBuf,
    },
    /// Not as it was written.
    #[error(
        "the delta '{path}' is damaged: {what}; restore it from a copy, or destroy the VM and create it again"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where and what.
        what: String,
    },
    /// Bytes at its end are missing.
    #[error(
        "the delta '{path}' has {found_bytes} of {expected_bytes} bytes: it was cut off; restore it from a copy, or \
         destroy the VM and create it again"
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        found_bytes: u64,
        /// What it should be.
        expected_bytes: u64,
    },
    /// It belongs to another image.
    #[error(
        "the delta '{path}' belongs to image {} of {} bytes, not to {} of {} bytes; attach the image it was made on",
        found.digest, found.bytes, expected.digest, expected.bytes
    )]
    OtherBase {
        /// The file.
        path: PathBuf,
        /// The base it was made on.
        found: DeltaMeta,
        /// The base at hand.
        expected: DeltaMeta,
    },
    /// Written by a newer treeboot.
    #[error("the delta '{path}' has format {found}, this treeboot knows up to {known}; use the newer one")]
    Version {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// The newest known.
        known: u32,
    },
}

impl DeltaError {
    /// What the operating system said when the file was to be opened.
    pub(crate) fn of_opening(path: &Path, source: io::Error) -> Self {
        let path = path.into();
        match source.kind() {
            io::ErrorKind::AlreadyExists => Self::Exists { path },
            io::ErrorKind::NotFound => Self::Missing { path },
            io::ErrorKind::WouldBlock => Self::InUse { path },
            _ => Self::Io { path, source },
        }
    }
}

/// The writes of one disk.
#[derive(Clone)]
pub struct Delta {
    core: Arc<Core>,
}

impl fmt::Debug for Delta {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delta")
            .field("path", &self.core.path)
            .field("meta", &self.core.meta)
            .finish_non_exhaustive()
    }
}

/// What a delta's operations share.
pub(crate) struct Core {
    storage: Arc<dyn Storage>,
    path: PathBuf,
    /// The file's folder, which a first flush makes durable.
    directory: Option<PathBuf>,
    meta: DeltaMeta,
    boot: BootId,
    layout: Layout,
    map: StateMap,
    /// Held by whoever changes the file or the map, on a blocking thread only.
    writer: Mutex<Writer>,
    /// Held during a flush, on a blocking thread only; never while `writer` is.
    flushing: Mutex<()>,
    /// Whose flush it is; see `flush`.
    turn: tokio::sync::Mutex<()>,
    flushes_wanted: AtomicU64,
    flushes_done: AtomicU64,
    /// Whether each block of data has a checksum in the file. On a frozen layer only.
    sealed: AtomicBool,
    limit: limit::Limit,
}

impl Delta {
    /// Makes an empty delta: an empty file, until the first write.
    ///
    /// # Errors
    /// [`DeltaError`].
    pub fn create(path: &Path, meta: DeltaMeta, boot: BootId) -> Result<Self, DeltaError> {
        Self::open_file(path, meta, boot, OpenMode::CreateNew)
    }

    /// Opens a delta that [`create`](Self::create) made.
    ///
    /// # Errors
    /// [`DeltaError`].
    pub fn open(path: &Path, meta: DeltaMeta, boot: BootId) -> Result<Self, DeltaError> {
        Self::open_file(path, meta, boot, OpenMode::ReadWrite)
    }

    fn open_file(path: &Path, meta: DeltaMeta, boot: BootId, mode: OpenMode) -> Result<Self, DeltaError> {
        let storage = FileStorage::open(path, mode).map_err(|source| DeltaError::of_opening(path, source))?;
        let directory = path.parent().map(|folder| match folder.as_os_str().is_empty() {
            true => PathBuf::from("."),
            false => folder.into(),
        });
        Self::open_parts(Arc::new(storage), path, directory, meta, boot)
    }

    /// Opens a delta on storage that is already open, or on a model of it; `path` is for errors.
    ///
    /// # Errors
    /// [`DeltaError`].
    pub fn open_storage(
        storage: Arc<dyn Storage>,
        path: &Path,
        meta: DeltaMeta,
        boot: BootId,
    ) -> Result<Self, DeltaError> {
        Self::open_parts(storage, path, None, meta, boot)
    }

    /// As [`open_storage`](Self::open_storage), of a file whose folder a first flush makes durable.
    pub(crate) fn open_in(
        storage: Arc<dyn Storage>,
        path: &Path,
        directory: Option<PathBuf>,
        meta: DeltaMeta,
        boot: BootId,
    ) -> Result<Self, DeltaError> {
        Self::open_parts(storage, path, directory, meta, boot)
    }

    fn open_parts(
        storage: Arc<dyn Storage>,
        path: &Path,
        directory: Option<PathBuf>,
        meta: DeltaMeta,
        boot: BootId,
    ) -> Result<Self, DeltaError> {
        let layout = Layout::new(meta.bytes);
        let (map, writer) = Found::look(&*storage, path, &meta, boot, &layout)?;
        let sealed = seal::look(&*storage, path, &layout, &map)?;
        let data = map.used_words().map(|index| map::data_blocks_of(map.word(index)));
        let limit = limit::Limit::new(data.sum());
        Ok(Self {
            core: Arc::new(Core {
                storage,
                path: path.into(),
                directory,
                meta,
                boot,
                layout,
                map,
                writer: Mutex::new(writer),
                flushing: Mutex::default(),
                turn: tokio::sync::Mutex::default(),
                flushes_wanted: AtomicU64::new(0),
                flushes_done: AtomicU64::new(0),
                sealed: AtomicBool::new(sealed),
                limit,
            }),
        })
    }

    /// The base it belongs to.
    pub fn meta(&self) -> DeltaMeta {
        self.core.meta
    }

    /// Bytes of disk in use for it. Blocks for a moment.
    ///
    /// # Errors
    /// The operating system's.
    pub fn allocated_bytes(&self) -> io::Result<u64> {
        self.core.storage.allocated_bytes()
    }

    /// The base that a file's header names; `None` where nothing was written yet, or the header is damaged. Blocks.
    pub(crate) fn base_of(storage: &dyn Storage) -> io::Result<Option<DeltaMeta>> {
        let mut sector = [0; SECTOR];
        storage.read_at(0, &mut sector)?;
        Ok(format::base_of(&sector))
    }

    pub(crate) fn core(&self) -> &Arc<Core> {
        &self.core
    }
}

/// What opening finds in the file.
struct Found;

impl Found {
    fn look(
        storage: &dyn Storage,
        path: &Path,
        meta: &DeltaMeta,
        boot: BootId,
        layout: &Layout,
    ) -> Result<(StateMap, Writer), DeltaError> {
        let io = |source| DeltaError::Io {
            path: path.into(),
            source,
        };
        let file_bytes = storage.len().map_err(io)?;
        if file_bytes == 0 {
            return Ok((StateMap::new(layout), Writer::default()));
        }
        let read = |offset| -> Result<[u8; SECTOR], DeltaError> {
            let mut sector = [0; SECTOR];
            storage.read_at(offset, &mut sector).map_err(io)?;
            Ok(sector)
        };
        let durable = || StateMap::load(storage, DURABLE_OFFSET, layout, path);
        let header = format::check_header(&read(0)?, path, meta)?;
        if let Header::Absent = header {
            // The first flush makes the header durable before the map, so a crash cannot leave the map alone.
            if durable()?.used_words().next().is_some() {
                return Err(DeltaError::Damaged {
                    path: path.into(),
                    what: "its header is gone".into(),
                });
            }
            return Ok((StateMap::new(layout), Writer::default()));
        }
        let same_boot = format::decode_boot(&read(BOOT_OFFSET)?).filter(|found| found.id == boot);
        let (map, writer) = match same_boot {
            None => (durable()?, Writer::default()),
            Some(found) => {
                let map = StateMap::load(storage, layout.volatile_offset, layout, path)?;
                let durable = durable()?;
                let mut dirty: std::collections::BTreeSet<u64> =
                    map.used_words().chain(durable.used_words()).collect();
                dirty.retain(|&index| map.word(index) != durable.word(index));
                let whole = file_bytes >= layout.file_bytes;
                (map, Writer::same_boot(dirty, found.doubtful, whole))
            }
        };
        // A flush makes the length durable before the map, so a crash cannot shorten a file with a map.
        if file_bytes < layout.file_bytes && map.used_words().next().is_some() {
            return Err(DeltaError::Truncated {
                path: path.into(),
                found_bytes: file_bytes,
                expected_bytes: layout.file_bytes,
            });
        }
        Ok((map, writer))
    }
}

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
pub(crate) mod tests;
