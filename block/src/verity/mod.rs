//! The hash tree of an image, in dm-verity's on-disk format 1.
//!
//! SHA-256, 4 KiB data and hash blocks, no salt. The hash device begins with one block that holds the superblock
//! (cryptsetup's `VERITY` on-disk format, 512 bytes, the rest zero); the tree follows, its top level first, as
//! the kernel's `Documentation/admin-guide/device-mapper/verity.rst` says. `veritysetup verify DATA HASH ROOT`
//! agrees. A data size that is no multiple of 4 KiB is padded with zeroes: the tree covers the padded bytes, and
//! a data file that `veritysetup` is to read must have them too.
//!
//! Deliberately absent: where hashes are fetched from or whether they are trusted (that is `cache`).

mod builder;

use sha2::{Digest as _, Sha256};
use treeboot_types::{Digest, VERITY_BLOCK_BYTES};

pub use builder::VerityBuilder;

/// Bytes in a block of data and of hashes.
const BLOCK: u64 = VERITY_BLOCK_BYTES as u64;
/// Bytes in a block, as a length.
pub(crate) const BLOCK_LEN: usize = VERITY_BLOCK_BYTES as usize;
/// Bytes in a SHA-256 digest.
const DIGEST_BYTES: usize = 32;
/// Digests in a hash block.
pub(crate) const FANOUT: u64 = BLOCK / DIGEST_BYTES as u64;
/// Levels that the largest number of blocks can have: 128^9 = 2^63 > 2^52 blocks in 2^64 bytes.
const MAX_LEVELS: usize = 9;
/// The block of the hash device that holds the superblock.
pub const SUPERBLOCK: u64 = 0;

/// The SHA-256 digest of `bytes`.
pub fn sha256(bytes: &[u8]) -> Digest {
    Digest(Sha256::digest(bytes).into())
}

/// What a block of the hash device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HashBlock {
    /// The superblock, made from the layout and the root.
    Superblock,
    /// A block of the tree.
    Node {
        /// Its level: 0 holds the digests of data blocks.
        level: u32,
        /// Which of its level, counted from 0.
        index: u64,
    },
}

/// Where a digest is to be found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parent {
    /// It is the root.
    Root,
    /// In a block of the hash device.
    Slot {
        /// The block's number on the hash device.
        block: u64,
        /// Which of its digests, 0..128.
        slot: usize,
    },
}

/// Where everything is on the hash device of an image of some size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VerityLayout {
    data_bytes: u64,
    data_blocks: u64,
    levels: u32,
    /// First block and number of blocks of each level, from level 0 (digests of data) up.
    level: [(u64, u64); MAX_LEVELS],
    hash_blocks: u64,
}

impl VerityLayout {
    /// The layout for `data_bytes` of data, padded to 4 KiB. One block of data has no tree: its digest is the root.
    pub fn new(data_bytes: u64) -> Self {
        let data_blocks = data_bytes.div_ceil(BLOCK);
        let mut level = [(0, 0); MAX_LEVELS];
        let mut levels = 0;
        let mut below = data_blocks;
        while below > 1 {
            below = below.div_ceil(FANOUT);
            level[levels].1 = below;
            levels += 1;
        }
        let mut next = SUPERBLOCK + 1;
        for (first, blocks) in level[..levels].iter_mut().rev() {
            *first = next;
            next += *blocks;
        }
        Self {
            data_bytes,
            data_blocks,
            levels: levels as u32,
            level,
            hash_blocks: next,
        }
    }

    /// Bytes of data without padding.
    pub fn data_bytes(&self) -> u64 {
        self.data_bytes
    }

    /// Bytes of data, padded.
    pub fn padded_bytes(&self) -> u64 {
        self.data_blocks * BLOCK
    }

    /// 4 KiB blocks of data.
    pub fn data_blocks(&self) -> u64 {
        self.data_blocks
    }

    /// Bytes of the hash device, superblock and all.
    pub fn hash_bytes(&self) -> u64 {
        self.hash_blocks * BLOCK
    }

    /// 4 KiB blocks of the hash device, the superblock's too.
    pub fn hash_blocks(&self) -> u64 {
        self.hash_blocks
    }

    /// Levels of the tree; 0 for one block of data.
    pub fn levels(&self) -> u32 {
        self.levels
    }

    /// What the `block`-th block of the hash device is; `None` beyond its end.
    pub fn locate(&self, block: u64) -> Option<HashBlock> {
        if block == SUPERBLOCK {
            return Some(HashBlock::Superblock);
        }
        let levels = &self.level[..self.levels as usize];
        levels
            .iter()
            .position(|&(first, blocks)| (first..first + blocks).contains(&block))
            .map(|level| HashBlock::Node {
                level: level as u32,
                index: block - levels[level].0,
            })
    }

    /// Where the digest of the `block`-th block of data is.
    pub fn parent_of_data(&self, block: u64) -> Parent {
        self.slot(0, block)
    }

    /// Where the digests of blocks of data begin on the hash device, in bytes: 128 of them a block. `None` for one block of data, whose
    /// digest is the root.
    pub fn data_digests(&self) -> Option<u64> {
        (self.levels > 0).then(|| self.level[0].0 * BLOCK)
    }

    /// Where the digest of a block of the tree is.
    pub fn parent_of_node(&self, level: u32, index: u64) -> Parent {
        self.slot(level as usize + 1, index)
    }

    fn slot(&self, level: usize, index: u64) -> Parent {
        if level >= self.levels as usize {
            return Parent::Root;
        }
        Parent::Slot {
            block: self.level[level].0 + index / FANOUT,
            slot: (index % FANOUT) as usize,
        }
    }

    /// The block of the hash device that begins with the superblock. Its UUID comes from `root` (RFC 9562 version 8),
    /// so that equal content has an equal hash device.
    pub fn superblock(&self, root: &Digest) -> [u8; BLOCK_LEN] {
        let mut uuid: [u8; 16] = std::array::from_fn(|i| root.0[i]);
        uuid[6] = uuid[6] & 0x0f | 0x80;
        uuid[8] = uuid[8] & 0x3f | 0x80;
        let mut block = [0; BLOCK_LEN];
        let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"verity\0\0");
        put(8, &1u32.to_le_bytes()); // version of the superblock
        put(12, &1u32.to_le_bytes()); // hash type: 1, the digest is of salt, then data
        put(16, &uuid);
        put(32, b"sha256");
        put(64, &VERITY_BLOCK_BYTES.to_le_bytes()); // data block
        put(68, &VERITY_BLOCK_BYTES.to_le_bytes()); // hash block
        put(72, &self.data_blocks.to_le_bytes());
        block // the salt's length (80) and the salt are zero
    }
}

/// The `slot`-th digest of a hash block.
pub fn digest_in(block: &[u8], slot: usize) -> Option<Digest> {
    let start = slot.checked_mul(DIGEST_BYTES)?;
    let bytes = block.get(start..start + DIGEST_BYTES)?;
    Digest::from_slice(bytes).ok()
}

#[cfg(test)]
mod tests;
