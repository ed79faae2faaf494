//! The chunk cache: the read-only base of an image on a host, and an origin's store.
//!
//! A directory holds three files: `data` (the image, sparse, padded to 4 KiB), `hash` (its dm-verity superblock and
//! tree) and `present` (which parts of the two are there; absent where all are). A read of a chunk that was checked
//! since the cache was opened is one `pread` into the caller's buffer. All else goes to one owner task (`owner`),
//! which lets one job (`load`) a chunk find, check, hand over and store it, however many wait.
//!
//! No byte leaves that was not checked against the hash tree in this process. Therefore nothing is ever synced
//! here, and a crash costs fetches, not correctness.
//!
//! Memory: one bit for each chunk twice, one for each 4 KiB of data (the guests' access map), and two for each hash
//! block: 37 KiB for each GiB of image at 64 KiB chunks, and at most 4 MiB of hash blocks.
//!
//! What is in which file, and what goes when there is no more room, is the [`group`]'s: a directory alone is a group of one without a
//! limit.
//!
//! Deliberately absent: writes, networks ([`ChunkSource`] has them).

mod bitmap;
mod counters;
mod device;
pub mod group;
mod load;
mod map;
mod owner;
mod shared;

use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use treeboot_types::{Digest, VERITY_BLOCK_BYTES};

use crate::BlockDevice;
use crate::storage::{FileStorage, OpenMode, Storage};
use device::{BaseDevice, HashDevice};
use group::{CacheGroup, Held};
use owner::{Owner, Request};
use shared::Shared;

pub use counters::CacheCounters;

/// The file of a cache directory that holds the image.
pub const DATA_FILE: &str = "data";
/// The file of a cache directory that holds the dm-verity superblock and hash tree.
pub const HASH_FILE: &str = "hash";
/// The file of a cache directory that says what of the other two is there.
pub const PRESENT_FILE: &str = "present";

/// The largest chunk: a fetch and its store are one piece of memory.
const MAX_CHUNK_BYTES: u32 = 4 * 1024 * 1024;

/// What identifies an image's bytes and their division.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageContent {
    /// The root of the dm-verity tree over the data.
    pub digest: Digest,
    /// Size in bytes, a multiple of 512.
    pub bytes: u64,
    /// The unit of caching and fetching: a power of two from 4 KiB to 4 MiB.
    pub chunk_bytes: u32,
}

impl ImageContent {
    /// How many chunks there are; the last may be shorter.
    pub fn chunks(&self) -> u64 {
        self.bytes.div_ceil(u64::from(self.chunk_bytes))
    }

    fn check(&self) -> Result<(), CacheError> {
        let blocks = self.bytes.div_ceil(u64::from(VERITY_BLOCK_BYTES));
        let sound = self.bytes > 0
            && self.bytes.is_multiple_of(512)
            && blocks <= u64::from(u32::MAX)
            && self.chunk_bytes.is_power_of_two()
            && (VERITY_BLOCK_BYTES..=MAX_CHUNK_BYTES).contains(&self.chunk_bytes);
        if sound {
            Ok(())
        } else {
            Err(CacheError::Content { content: *self })
        }
    }
}

/// Which path bytes came from, in the source's own numbering.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SourceId(pub u64);

/// Which of an image's two devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Region {
    /// The data, LUN 0.
    Data,
    /// The superblock and the hash tree, LUN 1.
    Hash,
}

/// Bytes from a source.
#[derive(Debug, Clone)]
pub struct Fetched {
    /// As many as were asked for.
    pub bytes: Bytes,
    /// Where they came from.
    pub source: SourceId,
}

/// Why a source gave nothing.
#[derive(Debug, Clone, thiserror::Error)]
pub enum FetchError {
    /// Not now; asked again it may.
    #[error("{what}")]
    Unavailable {
        /// What was tried, for a person.
        what: String,
    },
    /// There is nobody to ask (any more).
    #[error("{what}")]
    NoSource {
        /// What is missing, for a person.
        what: String,
    },
}

/// What a fetch returns.
pub type FetchFuture<'a> = Pin<Box<dyn Future<Output = Result<Fetched, FetchError>> + Send + 'a>>;

/// Where a cache gets what it does not hold. Its owner implements it over a network.
pub trait ChunkSource: Send + Sync + 'static {
    /// `bytes` bytes from `offset` on, from none of `avoid` unless there is nobody else. The source waits, moves on
    /// to other paths and gives up in bounded time by itself; the cache's own deadline is only a safety net.
    fn fetch<'a>(&'a self, region: Region, offset: u64, bytes: u32, avoid: &'a [SourceId])
    -> FetchFuture<'a>;

    /// What `source` delivered for `offset` is not what the hash tree says.
    fn report_wrong(&self, source: SourceId, region: Region, offset: u64);
}

/// The source of a store that has everything.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoSource;

impl ChunkSource for NoSource {
    fn fetch<'a>(&'a self, _: Region, _: u64, _: u32, _: &'a [SourceId]) -> FetchFuture<'a> {
        Box::pin(std::future::ready(Err(FetchError::NoSource {
            what: "the store is damaged and has nowhere to fetch from; import the image again".into(),
        })))
    }

    fn report_wrong(&self, _: SourceId, _: Region, _: u64) {}
}

/// Whether a region of a directory has all its bytes, or those that its map says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Completeness {
    /// What `present` says.
    #[default]
    Partial,
    /// Everything.
    All,
}

/// How a cache works.
#[derive(Debug, Clone, Copy)]
pub struct CacheOptions {
    /// Of the data.
    pub data: Completeness,
    /// Of the superblock and the hash tree.
    pub hash: Completeness,
    /// Chunks fetched at once. 64 of 64 KiB are 4 MiB in flight: the bandwidth-delay product of 10 Gbit/s at 3 ms.
    pub fetches: usize,
    /// How often a chunk is asked of the source before its readers get an error.
    pub tries: u32,
    /// How long one fetch may take: a safety net above the source's own limits.
    pub fetch_timeout: Duration,
    /// How long after a failed store (no room) nothing is stored.
    pub store_retry: Duration,
}

impl Default for CacheOptions {
    fn default() -> Self {
        Self {
            data: Completeness::Partial,
            hash: Completeness::Partial,
            fetches: 64,
            tries: 5,
            fetch_timeout: Duration::from_secs(15),
            store_retry: Duration::from_secs(5),
        }
    }
}

impl CacheOptions {
    /// For an origin's store: everything is there.
    pub fn complete() -> Self {
        Self {
            data: Completeness::All,
            hash: Completeness::All,
            ..Self::default()
        }
    }
}

/// Why a directory cannot be a cache of an image.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// An image that cannot be.
    #[error(
        "an image of {} bytes in chunks of {} bytes is not possible: the size must be a multiple of 512 up to 16 TiB, \
         the chunk a power of two from 4096 to {MAX_CHUNK_BYTES}", content.bytes, content.chunk_bytes
    )]
    Content {
        /// What was asked for.
        content: ImageContent,
    },
    /// The operating system refused.
    #[error("cannot use '{path}'")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// Another process, or another cache of this one, holds it.
    #[error(
        "'{path}' is in use by another process; stop the other agent or give this one a directory of its own"
    )]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// A store that should be complete lacks bytes.
    #[error(
        "'{path}' has {found_bytes} of {expected_bytes} bytes; the store is damaged, import the image again"
    )]
    Incomplete {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        found_bytes: u64,
        /// What it should be.
        expected_bytes: u64,
    },
    /// The directory belongs to another image or another chunk size.
    #[error(
        "'{path}' belongs to another image than {} of {} bytes in chunks of {}; remove that directory, it is only a cache",
        expected.digest, expected.bytes, expected.chunk_bytes
    )]
    OtherImage {
        /// The file.
        path: PathBuf,
        /// What was asked for.
        expected: ImageContent,
    },
    /// Written by a newer treeboot.
    #[error(
        "'{path}' has format {found}, this treeboot knows up to {known}; use the newer one or remove the directory"
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// The newest known.
        known: u32,
    },
}

/// The files of a cache, opened; [`ChunkCache::open`] makes it from a directory.
pub struct CacheFiles {
    /// Where they are, for errors.
    pub directory: PathBuf,
    /// The image.
    pub data: Arc<dyn Storage>,
    /// The superblock and the hash tree.
    pub hash: Arc<dyn Storage>,
    /// The map; `None` where both regions are complete.
    pub present: Option<Arc<dyn Storage>>,
}

/// Who reads a base; they are counted apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reader {
    /// A VM of this host, by way of its disk.
    Guest,
    /// Another host.
    Child,
}

/// One image's cache, or store; see the module.
pub struct ChunkCache {
    shared: Arc<Shared>,
    requests: mpsc::Sender<Request>,
}

impl ChunkCache {
    /// Opens the cache in `dir`, which is created where it is missing. Blocks for a few file operations.
    ///
    /// # Errors
    /// [`CacheError`]: it names the path and what to do.
    ///
    /// # Panics
    /// Outside a tokio runtime: the owner task is spawned here. It ends with the last handle and device.
    pub fn open(
        dir: &Path,
        content: ImageContent,
        source: Arc<dyn ChunkSource>,
        options: CacheOptions,
    ) -> Result<Arc<Self>, CacheError> {
        content.check()?;
        let complete = options.data == Completeness::All && options.hash == Completeness::All;
        if !complete {
            std::fs::create_dir_all(dir).map_err(|source| CacheError::Io {
                path: dir.into(),
                source,
            })?;
        }
        let open = |name: &str, completeness| -> Result<Arc<dyn Storage>, CacheError> {
            let path = dir.join(name);
            let mode = match completeness {
                Completeness::Partial => OpenMode::Create,
                Completeness::All => OpenMode::ReadWrite,
            };
            match FileStorage::open(&path, mode) {
                Ok(storage) => Ok(Arc::new(storage)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(CacheError::InUse { path }),
                Err(source) => Err(CacheError::Io { path, source }),
            }
        };
        let files = CacheFiles {
            directory: dir.into(),
            data: open(DATA_FILE, options.data)?,
            hash: open(HASH_FILE, options.hash)?,
            present: match complete {
                true => None,
                false => Some(open(PRESENT_FILE, Completeness::Partial)?),
            },
        };
        Self::open_files(files, content, source, options)
    }

    /// Opens the cache on files that are already open, or on models of them.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    ///
    /// # Panics
    /// As `open`.
    pub fn open_files(
        files: CacheFiles,
        content: ImageContent,
        source: Arc<dyn ChunkSource>,
        options: CacheOptions,
    ) -> Result<Arc<Self>, CacheError> {
        content.check()?;
        let (group, held) = CacheGroup::solitary(files, content, &options)?;
        Ok(Self::start(group, held, source, options))
    }

    /// Opens the cache that a group has of an image: what is there, and room for more. Blocks for a few file operations.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    ///
    /// # Panics
    /// As `open`.
    pub fn open_in(
        group: &Arc<CacheGroup>,
        content: ImageContent,
        source: Arc<dyn ChunkSource>,
    ) -> Result<Arc<Self>, CacheError> {
        content.check()?;
        let held = group.hold(content)?;
        Ok(Self::start(
            Arc::clone(group),
            held,
            source,
            CacheOptions::default(),
        ))
    }

    fn start(
        group: Arc<CacheGroup>,
        held: Held,
        source: Arc<dyn ChunkSource>,
        options: CacheOptions,
    ) -> Arc<Self> {
        let shared = Arc::new(Shared::new(group, held, source, options));
        let (requests, incoming) = mpsc::channel(owner::REQUESTS);
        tokio::spawn(Owner::new(Arc::clone(&shared), incoming).run());
        Arc::new(Self { shared, requests })
    }

    /// The image's data as a read-only device, LUN 0; what is read through it counts for `reader`.
    pub fn base(self: &Arc<Self>, reader: Reader) -> Arc<dyn BlockDevice> {
        Arc::new(BaseDevice::new(Arc::clone(self), reader))
    }

    /// The image's superblock and hash tree as a read-only device, LUN 1.
    pub fn hash_device(self: &Arc<Self>) -> Arc<dyn BlockDevice> {
        Arc::new(HashDevice::new(Arc::clone(self)))
    }

    /// Which image.
    pub fn content(&self) -> ImageContent {
        self.shared.content
    }

    /// The counts since it was opened.
    pub fn counters(&self) -> CacheCounters {
        let cached_bytes = self.shared.held.cached.load(Ordering::Relaxed);
        self.shared.counters.snapshot(&self.shared.access, cached_bytes)
    }

    /// The 4 KiB blocks that guests asked for, as runs (first, count), in the order of their first reading.
    pub fn access_map(&self) -> Vec<(u32, u32)> {
        self.shared.access.runs()
    }

    /// From the next fetch on, asks `source`.
    pub fn set_source(&self, source: Arc<dyn ChunkSource>) {
        *self.shared.source.write() = source;
    }

    /// Waits until whatever is being fetched was fetched and stored, or failed.
    pub async fn quiesce(&self) {
        let (reply, done) = oneshot::channel();
        if self.requests.send(Request::Quiesce(reply)).await.is_ok() {
            let _ended_otherwise = done.await;
        }
    }
}

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod tests;
