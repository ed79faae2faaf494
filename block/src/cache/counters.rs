//! What a cache counts, and which blocks the guests asked for.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::Reader;
use super::bitmap::Bitmap;
use treeboot_types::VERITY_BLOCK_BYTES;

const BLOCK: u64 = VERITY_BLOCK_BYTES as u64;

/// A cache's counts since it was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheCounters {
    /// Bytes that guests asked of the base.
    pub guest_read_bytes: u64,
    /// Bytes of the distinct 4 KiB blocks of these.
    pub guest_unique_bytes: u64,
    /// Bytes that children asked of the base.
    pub child_read_bytes: u64,
    /// Bytes that children asked of the hash device.
    pub hash_read_bytes: u64,
    /// Chunk-sized parts of reads that were in the cache.
    pub chunk_hits: u64,
    /// Fetches of chunks begun (a fetch that is tried again counts once).
    pub chunk_misses: u64,
    /// Reads of a chunk that waited for another's fetch.
    pub chunk_joined: u64,
    /// Bytes of chunks that sources delivered, wrong ones too.
    pub fetched_data_bytes: u64,
    /// Bytes of hash blocks that sources delivered, wrong ones too.
    pub fetched_hash_bytes: u64,
    /// Chunks and hash blocks that were fetched and are not what the hash tree says.
    pub bad_chunks: u64,
    /// Chunks and hash blocks found in the cache's files that are not what the hash tree says.
    pub damaged_chunks: u64,
    /// Chunks known to be zero from the hash tree, and so not fetched.
    pub zero_chunks: u64,
    /// Bytes of data that the cache holds.
    pub cached_bytes: u64,
    /// Bytes of data passed through because they could not be stored.
    pub uncached_bytes: u64,
    /// The longest that one read of the base waited, in microseconds.
    pub longest_stall_us: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) guest_read_bytes: AtomicU64,
    pub(super) child_read_bytes: AtomicU64,
    pub(super) hash_read_bytes: AtomicU64,
    pub(super) chunk_hits: AtomicU64,
    pub(super) chunk_misses: AtomicU64,
    pub(super) chunk_joined: AtomicU64,
    pub(super) fetched_data_bytes: AtomicU64,
    pub(super) fetched_hash_bytes: AtomicU64,
    pub(super) bad_chunks: AtomicU64,
    pub(super) damaged_chunks: AtomicU64,
    pub(super) zero_chunks: AtomicU64,
    pub(super) uncached_bytes: AtomicU64,
    pub(super) longest_stall_us: AtomicU64,
}

pub(super) fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::Relaxed);
}

impl Counters {
    pub(super) fn read_by(&self, reader: Reader, bytes: u64) {
        match reader {
            Reader::Guest => add(&self.guest_read_bytes, bytes),
            Reader::Child => add(&self.child_read_bytes, bytes),
        }
    }

    pub(super) fn stalled(&self, time: Duration) {
        let us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.longest_stall_us.fetch_max(us, Ordering::Relaxed);
    }

    pub(super) fn snapshot(&self, access: &AccessMap, cached_bytes: u64) -> CacheCounters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        CacheCounters {
            guest_read_bytes: get(&self.guest_read_bytes),
            guest_unique_bytes: get(&access.unique) * BLOCK,
            child_read_bytes: get(&self.child_read_bytes),
            hash_read_bytes: get(&self.hash_read_bytes),
            chunk_hits: get(&self.chunk_hits),
            chunk_misses: get(&self.chunk_misses),
            chunk_joined: get(&self.chunk_joined),
            fetched_data_bytes: get(&self.fetched_data_bytes),
            fetched_hash_bytes: get(&self.fetched_hash_bytes),
            bad_chunks: get(&self.bad_chunks),
            damaged_chunks: get(&self.damaged_chunks),
            zero_chunks: get(&self.zero_chunks),
            cached_bytes,
            uncached_bytes: get(&self.uncached_bytes),
            longest_stall_us: get(&self.longest_stall_us),
        }
    }
}

/// The 4 KiB blocks that guests read, in the order of their first reading.
#[derive(Debug)]
pub(super) struct AccessMap {
    seen: Bitmap,
    unique: AtomicU64,
    /// First block and count. The lock is taken for blocks not read before only.
    runs: Mutex<Vec<(u32, u32)>>,
}

impl AccessMap {
    pub(super) fn new(blocks: u64) -> Self {
        Self {
            seen: Bitmap::new(blocks, false),
            unique: AtomicU64::new(0),
            runs: Mutex::default(),
        }
    }

    pub(super) fn record(&self, offset: u64, bytes: u64) {
        if bytes == 0 {
            return;
        }
        let (first, last) = (offset / BLOCK, (offset + bytes - 1) / BLOCK);
        if self.seen.all(first, last) {
            return;
        }
        let mut runs = self.runs.lock();
        for block in (first..=last).filter(|&block| self.seen.set(block)) {
            add(&self.unique, 1);
            // An image has at most 2^32 blocks (ImageContent::check).
            let block = block as u32;
            match runs.last_mut() {
                Some((first, count)) if first.checked_add(*count) == Some(block) => *count += 1,
                _ => runs.push((block, 1)),
            }
        }
    }

    pub(super) fn runs(&self) -> Vec<(u32, u32)> {
        self.runs.lock().clone()
    }
}
