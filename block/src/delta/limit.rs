//! How many blocks of data a delta has, and how many it may have.
//!
//! Counted is what the map calls data: what a discard gives back is free at once, and no file system's own way of counting has a part in
//! it. The file's head and maps, and a frozen layer's checksums, are not counted.

use std::sync::atomic::{AtomicU64, Ordering};

use super::Core;
use super::format::BLOCK;
use super::map::data_blocks_of;

/// Both, in blocks.
#[derive(Debug)]
pub(super) struct Limit {
    data: AtomicU64,
    most: AtomicU64,
}

impl Limit {
    pub(super) fn new(data_blocks: u64) -> Self {
        Self {
            data: AtomicU64::new(data_blocks),
            most: AtomicU64::new(u64::MAX),
        }
    }
}

impl Core {
    /// Bytes of the blocks of data.
    pub(crate) fn data_bytes(&self) -> u64 {
        self.limit.data.load(Ordering::Relaxed).saturating_mul(BLOCK)
    }

    /// Writes that would make more bytes of blocks of data than these find no room from now on.
    pub(crate) fn set_most(&self, bytes: u64) {
        let blocks = match bytes {
            u64::MAX => u64::MAX,
            bytes => bytes / BLOCK,
        };
        self.limit.most.store(blocks, Ordering::Relaxed);
    }

    /// Whether these blocks may be data, those that are already among them. The writer's lock is held.
    pub(super) fn may_have(&self, changes: &[(u64, u64)]) -> bool {
        let (new, old) = self.counts(changes);
        let data = self.limit.data.load(Ordering::Relaxed);
        // What makes no new block is written however full it is.
        new <= old || data.saturating_add(new - old) <= self.limit.most.load(Ordering::Relaxed)
    }

    /// These words of the map are about to change. The writer's lock is held.
    pub(super) fn count(&self, changes: &[(u64, u64)]) {
        let (new, old) = self.counts(changes);
        let data = self.limit.data.load(Ordering::Relaxed);
        let now = data.saturating_add(new).saturating_sub(old);
        self.limit.data.store(now, Ordering::Relaxed);
    }

    /// Blocks of data in these words of the map, as they are to be and as they are.
    fn counts(&self, changes: &[(u64, u64)]) -> (u64, u64) {
        let new = changes.iter().map(|&(_, word)| data_blocks_of(word)).sum();
        let old = changes
            .iter()
            .map(|&(index, _)| data_blocks_of(self.map.word(index)));
        (new, old.sum())
    }
}
