//! What readers, jobs and the owner share: what is held of the image, verified hash blocks.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::OnceLock;

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use treeboot_types::Digest;

use super::counters::{AccessMap, Counters, add};
use super::group::{CacheGroup, Held, Located};
use super::{CacheOptions, ChunkSource, ImageContent, Region};
use crate::verity::{BLOCK_LEN, HashBlock, Parent, VerityLayout, digest_in, sha256};

/// Hash blocks kept in memory: 4 MiB, the digests of 512 MiB of data. It is what makes a cache without room for its
/// hash file usable.
const HASH_BLOCKS_IN_MEMORY: usize = 1024;

/// A chunk or a hash block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) region: Region,
    pub(super) index: u64,
}

impl Key {
    pub(super) fn data(chunk: u64) -> Self {
        Self {
            region: Region::Data,
            index: chunk,
        }
    }

    pub(super) fn hash(block: u64) -> Self {
        Self {
            region: Region::Hash,
            index: block,
        }
    }
}

pub(super) struct Shared {
    pub(super) content: ImageContent,
    pub(super) layout: VerityLayout,
    pub(super) options: CacheOptions,
    pub(super) superblock: Bytes,
    pub(super) group: Arc<CacheGroup>,
    pub(super) held: Held,
    hash_memory: Mutex<HashMemory>,
    pub(super) source: RwLock<Arc<dyn ChunkSource>>,
    pub(super) counters: Counters,
    pub(super) access: AccessMap,
}

impl Shared {
    pub(super) fn new(
        group: Arc<CacheGroup>,
        held: Held,
        source: Arc<dyn ChunkSource>,
        options: CacheOptions,
    ) -> Self {
        let (content, layout) = (held.content, held.layout);
        Self {
            superblock: Bytes::copy_from_slice(&layout.superblock(&content.digest)),
            group,
            held,
            hash_memory: Mutex::default(),
            source: RwLock::new(source),
            counters: Counters::default(),
            access: AccessMap::new(layout.data_blocks()),
            content,
            layout,
            options,
        }
    }

    /// Where on its device, in bytes, and how long.
    pub(super) fn span(&self, key: Key) -> (u64, u32) {
        self.held.span(key)
    }

    pub(super) fn is_ready(&self, key: Key) -> bool {
        self.held.is_ready(key)
    }

    /// What a file holds is wrong.
    pub(super) fn set_damaged(&self, key: Key, located: &Located) {
        if self.group.damaged(&self.held, key, located) {
            self.tell_damage(key);
        }
    }

    /// What a file holds cannot be read.
    pub(super) fn read_failed(&self, key: Key, located: &Located, error: &dyn std::error::Error) {
        if self.group.read_failed(&self.held, key, located, error) {
            self.tell_damage(key);
        }
    }

    fn tell_damage(&self, key: Key) {
        add(&self.counters.damaged_chunks, 1);
        let (offset, _) = self.span(key);
        tracing::warn!(
            image = %self.content.digest.short(), region = ?key.region, offset,
            "the cache's file does not hold what the hash tree says; it is fetched again"
        );
    }

    /// Writes checked bytes to where there is room, then to the map. Blocks.
    pub(super) fn store(&self, key: Key, bytes: &[u8]) -> io::Result<()> {
        self.group.store(&self.held, key, bytes)
    }

    /// A checked hash block, if it can be had without waiting. One that is in the file is checked here and now, with
    /// those above it.
    pub(super) fn hash_block_now(&self, block: u64) -> Option<Bytes> {
        if let Some(bytes) = self.hash_memory.lock().get(block) {
            return Some(bytes);
        }
        let key = Key::hash(block);
        if !self.is_ready(key) && !self.check_now(key) {
            return None;
        }
        let located = self.held.locate(key)?;
        let bytes = Bytes::from(self.read_located(key, &located)?);
        self.remember_hash_block(block, bytes.clone());
        Some(bytes)
    }

    /// Keeps a checked hash block in memory.
    pub(super) fn remember_hash_block(&self, block: u64, bytes: Bytes) {
        self.hash_memory.lock().insert(block, bytes);
    }

    /// The hash blocks whose digests a key is checked against, none where its digest is the root.
    pub(super) fn parents(&self, key: Key) -> impl Iterator<Item = (Parent, u64)> + '_ {
        let blocks = match key.region {
            Region::Data => {
                let (offset, bytes) = self.span(key);
                let first = offset / BLOCK_LEN as u64;
                first..first + u64::from(bytes).div_ceil(BLOCK_LEN as u64)
            }
            Region::Hash => key.index..key.index + 1,
        };
        blocks.map(move |block| {
            let parent = match key.region {
                Region::Data => self.layout.parent_of_data(block),
                Region::Hash => match self.layout.locate(block) {
                    Some(HashBlock::Node { level, index }) => self.layout.parent_of_node(level, index),
                    // Never asked for: the superblock is made, not fetched.
                    _ => Parent::Root,
                },
            };
            (parent, block)
        })
    }

    /// The digests of a key's 4 KiB blocks, if they can be had without waiting.
    pub(super) fn expected_now(&self, key: Key) -> Option<Vec<Digest>> {
        let mut last: Option<(u64, Bytes)> = None;
        self.parents(key)
            .map(|(parent, _)| match parent {
                Parent::Root => Some(self.content.digest),
                Parent::Slot { block, slot } => {
                    if last.as_ref().is_none_or(|(number, _)| *number != block) {
                        last = Some((block, self.hash_block_now(block)?));
                    }
                    digest_in(&last.as_ref()?.1, slot)
                }
            })
            .collect()
    }

    /// Whether a chunk or hash block in the file is right, if that can be found out without waiting; a right one is
    /// ready then.
    pub(super) fn check_now(&self, key: Key) -> bool {
        let Some(located) = self.held.locate(key) else {
            return false;
        };
        let Some(expected) = self.expected_now(key) else {
            return false;
        };
        let bytes = self.read_located(key, &located);
        let right = bytes.is_some_and(|bytes| matches(&bytes, &expected));
        if right {
            self.group.confirm(&self.held, key, &located);
        }
        right
    }

    /// What is there, if it can be read without waiting and is still there afterwards.
    fn read_located(&self, key: Key, located: &Located) -> Option<Vec<u8>> {
        let (offset, length) = self.span(key);
        let mut bytes = vec![0; length as usize];
        located
            .part
            .storage(key.region)
            .try_read_at(offset, &mut bytes)
            .ok()??;
        self.held.is_still(key, located).then_some(bytes)
    }
}

/// Whether each 4 KiB block of `bytes`, the last padded with zeroes, has its digest.
pub(super) fn matches(bytes: &[u8], expected: &[Digest]) -> bool {
    let blocks = bytes.chunks(BLOCK_LEN);
    blocks.len() == expected.len()
        && blocks.zip(expected).all(|(block, digest)| {
            if block.len() == BLOCK_LEN {
                return sha256(block) == *digest;
            }
            let mut padded = [0; BLOCK_LEN];
            padded[..block.len()].copy_from_slice(block);
            sha256(&padded) == *digest
        })
}

/// The digest of 4 KiB of zeroes.
pub(super) fn zero_digest() -> Digest {
    static ZERO: OnceLock<Digest> = OnceLock::new();
    *ZERO.get_or_init(|| sha256(&[0; BLOCK_LEN]))
}

/// Checked hash blocks; the oldest goes first.
#[derive(Default)]
struct HashMemory {
    blocks: HashMap<u64, Bytes>,
    order: VecDeque<u64>,
}

impl HashMemory {
    fn get(&self, block: u64) -> Option<Bytes> {
        self.blocks.get(&block).cloned()
    }

    fn insert(&mut self, block: u64, bytes: Bytes) {
        if self.blocks.insert(block, bytes).is_some() {
            return;
        }
        self.order.push_back(block);
        if self.order.len() > HASH_BLOCKS_IN_MEMORY
            && let Some(oldest) = self.order.pop_front()
        {
            self.blocks.remove(&oldest);
        }
    }
}
