//! What readers, jobs and the owner share: files, bitmaps, verified hash blocks.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::OnceLock;

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use treeboot_types::Digest;

use super::bitmap::Bitmap;
use super::counters::{AccessMap, Counters, add};
use super::map::{Present, PresentMap};
use super::{
    CacheError, CacheFiles, CacheOptions, ChunkSource, Completeness, DATA_FILE, HASH_FILE, ImageContent,
    PRESENT_FILE, Region,
};
use crate::storage::{Storage, is_full};
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

/// One of the two regions.
pub(super) struct Half {
    pub(super) storage: Arc<dyn Storage>,
    /// In the file, as far as is known.
    present: Bitmap,
    /// In the file and checked since the cache was opened.
    ready: Bitmap,
}

pub(super) struct Shared {
    pub(super) content: ImageContent,
    pub(super) layout: VerityLayout,
    pub(super) options: CacheOptions,
    pub(super) superblock: Bytes,
    data: Half,
    hash: Half,
    map: Option<PresentMap>,
    hash_memory: Mutex<HashMemory>,
    pub(super) source: RwLock<Arc<dyn ChunkSource>>,
    pub(super) counters: Counters,
    pub(super) access: AccessMap,
}

impl Shared {
    pub(super) fn open(
        files: CacheFiles,
        content: ImageContent,
        source: Arc<dyn ChunkSource>,
        options: CacheOptions,
    ) -> Result<Self, CacheError> {
        let layout = VerityLayout::new(content.bytes);
        for (storage, completeness, bytes, name) in [
            (&files.data, options.data, layout.padded_bytes(), DATA_FILE),
            (&files.hash, options.hash, layout.hash_bytes(), HASH_FILE),
        ] {
            let path = files.directory.join(name);
            let io = |source| CacheError::Io {
                path: path.clone(),
                source,
            };
            let found = storage.len().map_err(io)?;
            match completeness {
                Completeness::All if found < bytes => {
                    return Err(CacheError::Incomplete {
                        path,
                        found_bytes: found,
                        expected_bytes: bytes,
                    });
                }
                Completeness::Partial if found != bytes => storage.set_len(bytes).map_err(io)?,
                _ => {}
            }
        }
        let path = files.directory.join(PRESENT_FILE);
        let (map, present) = match files.present {
            None => (None, None),
            Some(storage) => match PresentMap::open(storage, &path, &content, &layout) {
                Ok((map, present)) => (Some(map), Some(present)),
                // A cache without room is still a cache in memory.
                Err(CacheError::Io { source, .. }) if is_full(&source) => (None, None),
                Err(error) => return Err(error),
            },
        };
        let Present { data, hash } = present.unwrap_or_else(|| Present {
            data: Bitmap::new(content.chunks(), false),
            hash: Bitmap::new(layout.hash_blocks(), false),
        });
        let half = |storage, completeness, bits, partial| Half {
            storage,
            present: match completeness {
                Completeness::All => Bitmap::new(bits, true),
                Completeness::Partial => partial,
            },
            ready: Bitmap::new(bits, false),
        };
        let shared = Self {
            superblock: Bytes::copy_from_slice(&layout.superblock(&content.digest)),
            data: half(files.data, options.data, content.chunks(), data),
            hash: half(files.hash, options.hash, layout.hash_blocks(), hash),
            map,
            hash_memory: Mutex::default(),
            source: RwLock::new(source),
            counters: Counters::default(),
            access: AccessMap::new(layout.data_blocks()),
            content,
            layout,
            options,
        };
        add(&shared.counters.cached_bytes, shared.present_bytes());
        Ok(shared)
    }

    fn present_bytes(&self) -> u64 {
        let whole = self.data.present.count() * u64::from(self.content.chunk_bytes);
        let last = Key::data(self.content.chunks() - 1);
        let missing = u64::from(self.content.chunk_bytes) - u64::from(self.span(last).1);
        if self.data.present.get(last.index) {
            whole - missing
        } else {
            whole
        }
    }

    pub(super) fn half(&self, region: Region) -> &Half {
        match region {
            Region::Data => &self.data,
            Region::Hash => &self.hash,
        }
    }

    /// Where on its device, in bytes, and how long.
    pub(super) fn span(&self, key: Key) -> (u64, u32) {
        match key.region {
            Region::Data => {
                let chunk = u64::from(self.content.chunk_bytes);
                let offset = key.index * chunk;
                (offset, (self.content.bytes - offset).min(chunk) as u32)
            }
            Region::Hash => (key.index * BLOCK_LEN as u64, BLOCK_LEN as u32),
        }
    }

    pub(super) fn is_ready(&self, key: Key) -> bool {
        self.half(key.region).ready.get(key.index)
    }

    pub(super) fn all_ready(&self, region: Region, first: u64, last: u64) -> bool {
        self.half(region).ready.all(first, last)
    }

    pub(super) fn is_present(&self, key: Key) -> bool {
        self.half(key.region).present.get(key.index)
    }

    /// What the file holds is right.
    pub(super) fn set_ready(&self, key: Key) {
        self.half(key.region).ready.set(key.index);
    }

    /// What the file holds is wrong, or cannot be read. Its bit in the map's file stays until the chunk is stored anew: it is a hint.
    pub(super) fn set_damaged(&self, key: Key) {
        self.half(key.region).ready.clear(key.index);
        if self.half(key.region).present.clear(key.index) && key.region == Region::Data {
            let bytes = u64::from(self.span(key).1);
            self.counters
                .cached_bytes
                .fetch_sub(bytes, std::sync::atomic::Ordering::Relaxed);
        }
        add(&self.counters.damaged_chunks, 1);
        let (offset, _) = self.span(key);
        tracing::warn!(
            image = %self.content.digest.short(), region = ?key.region, offset,
            "the cache's file does not hold what the hash tree says; it is fetched again"
        );
    }

    /// Writes checked bytes to the file, then to the map. Blocks.
    pub(super) fn store(&self, key: Key, bytes: &[u8]) -> io::Result<()> {
        let half = self.half(key.region);
        let (offset, length) = self.span(key);
        let zero = key.region == Region::Data && bytes.iter().all(|&byte| byte == 0);
        // Sparse stays sparse; a punch also removes what a damaged chunk has left.
        if !zero || half.storage.punch(offset, u64::from(length)).is_err() {
            half.storage.write_at(offset, bytes)?;
        }
        if half.present.set(key.index) && key.region == Region::Data {
            add(&self.counters.cached_bytes, u64::from(length));
        }
        half.ready.set(key.index);
        if let Some(map) = &self.map {
            // A map that cannot be written costs a fetch after the next start, nothing now.
            let _only_a_hint = map.write(key.region, &half.present, key.index);
        }
        Ok(())
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
        let mut bytes = vec![0; BLOCK_LEN];
        let (offset, _) = self.span(key);
        self.hash.storage.try_read_at(offset, &mut bytes).ok()??;
        let bytes = Bytes::from(bytes);
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
        if !self.is_present(key) {
            return false;
        }
        let Some(expected) = self.expected_now(key) else {
            return false;
        };
        let (offset, length) = self.span(key);
        let mut bytes = vec![0; length as usize];
        let read = self.half(key.region).storage.try_read_at(offset, &mut bytes);
        let right = matches!(read, Ok(Some(()))) && matches(&bytes, &expected);
        if right {
            self.set_ready(key);
        }
        right
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
