//! A storage that keeps only what differs from another one, block by block.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::Storage;
use crate::{Extent, Provisioning};

/// Bytes in a block: what is kept, or is the other's.
pub const PATCH_BLOCK: u64 = 4096;
const BITS: u64 = u64::BITS as u64;

/// Which blocks are a [`Patched`]'s own: a bit each.
#[derive(Debug)]
pub struct OwnBlocks {
    blocks: u64,
    words: Vec<AtomicU64>,
}

impl OwnBlocks {
    /// None of those that `bytes` bytes have.
    pub fn none(bytes: u64) -> Self {
        let blocks = bytes.div_ceil(PATCH_BLOCK);
        let words = (0..blocks.div_ceil(BITS)).map(|_| AtomicU64::new(0)).collect();
        Self { blocks, words }
    }

    /// From what [`to_bytes`](Self::to_bytes) gave; `None` where its length is not that of `bytes` bytes of storage.
    pub fn from_bytes(bytes: u64, map: &[u8]) -> Option<Self> {
        let own = Self::none(bytes);
        let (words, rest) = map.as_chunks::<8>();
        if words.len() != own.words.len() || !rest.is_empty() {
            return None;
        }
        for (word, bytes) in own.words.iter().zip(words) {
            word.store(u64::from_le_bytes(*bytes), Ordering::Relaxed);
        }
        Some(own)
    }

    /// Eight bytes for 64 blocks, the first block in the lowest bit, little-endian.
    pub fn to_bytes(&self) -> Vec<u8> {
        let word = |word: &AtomicU64| word.load(Ordering::Relaxed).to_le_bytes();
        self.words.iter().flat_map(word).collect()
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        let ones = |word: &AtomicU64| u64::from(word.load(Ordering::Relaxed).count_ones());
        self.words.iter().map(ones).sum()
    }

    /// Whether it is an own one. What lies beyond the end is nobody's.
    pub fn has(&self, block: u64) -> bool {
        let word = self.words.get((block / BITS) as usize);
        word.is_some_and(|word| word.load(Ordering::Acquire) >> (block % BITS) & 1 == 1)
    }

    fn add(&self, block: u64) {
        if let Some(word) = self.words.get((block / BITS) as usize) {
            word.fetch_or(1 << (block % BITS), Ordering::Release);
        }
    }

    /// Whether the block is an own one, and how many from it on are alike, at most `most`.
    fn run(&self, block: u64, most: u64) -> (bool, u64) {
        let own = self.has(block);
        let mut count = 1;
        while count < most {
            let next = block + count;
            let whole = if own { u64::MAX } else { 0 };
            let word = self.words.get((next / BITS) as usize);
            if next.is_multiple_of(BITS)
                && next + BITS <= self.blocks
                && word.is_some_and(|word| word.load(Ordering::Acquire) == whole)
            {
                count += BITS;
            } else if self.has(next) == own {
                count += 1;
            } else {
                break;
            }
        }
        (own, count.min(most))
    }
}

/// Own blocks over those of another storage, which stays as it is. What is written is compared with what is there, and what is
/// equal takes no room.
pub struct Patched {
    own: Arc<dyn Storage>,
    blocks: OwnBlocks,
    below: Arc<dyn Storage>,
    writable: bool,
}

impl Patched {
    /// To be filled: `own` is empty and has the length of `below`, in bytes.
    pub fn begin(own: Arc<dyn Storage>, below: Arc<dyn Storage>, bytes: u64) -> Self {
        Self {
            own,
            blocks: OwnBlocks::none(bytes),
            below,
            writable: true,
        }
    }

    /// As it was filled. Nothing is written to it any more.
    pub fn sealed(own: Arc<dyn Storage>, blocks: OwnBlocks, below: Arc<dyn Storage>) -> Self {
        Self {
            own,
            blocks,
            below,
            writable: false,
        }
    }

    /// Which blocks are its own.
    pub fn own_blocks(&self) -> &OwnBlocks {
        &self.blocks
    }

    fn at(&self, offset: u64, bytes: u64) -> (&Arc<dyn Storage>, u64) {
        let block = offset / PATCH_BLOCK;
        let most = (offset + bytes).div_ceil(PATCH_BLOCK) - block;
        let (own, count) = self.blocks.run(block, most);
        let run = ((block + count) * PATCH_BLOCK - offset).min(bytes);
        (if own { &self.own } else { &self.below }, run)
    }

    /// Whole blocks, or less at the end.
    fn writes(&self, offset: u64) -> io::Result<()> {
        if !self.writable {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        if !offset.is_multiple_of(PATCH_BLOCK) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(())
    }
}

impl Storage for Patched {
    fn read_at(&self, mut offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
        while !buf.is_empty() {
            let (storage, run) = self.at(offset, buf.len() as u64);
            let (now, rest) = buf.split_at_mut(run as usize);
            storage.read_at(offset, now)?;
            (buf, offset) = (rest, offset + run);
        }
        Ok(())
    }

    fn try_read_at(&self, mut offset: u64, mut buf: &mut [u8]) -> io::Result<Option<()>> {
        while !buf.is_empty() {
            let (storage, run) = self.at(offset, buf.len() as u64);
            let (now, rest) = buf.split_at_mut(run as usize);
            if storage.try_read_at(offset, now)?.is_none() {
                return Ok(None);
            }
            (buf, offset) = (rest, offset + run);
        }
        Ok(Some(()))
    }

    /// As [`Storage::write_at`], from a multiple of [`PATCH_BLOCK`] on.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.writes(offset)?;
        let mut there = [0; PATCH_BLOCK as usize];
        let zero = [0; PATCH_BLOCK as usize];
        for (index, block) in (0..).zip(data.chunks(PATCH_BLOCK as usize)) {
            let at = offset + index * PATCH_BLOCK;
            let there = &mut there[..block.len()];
            self.read_at(at, there)?;
            if there == block {
                continue;
            }
            let number = at / PATCH_BLOCK;
            // Zeroes are a hole, where nothing else was before.
            if block != &zero[..block.len()] || self.blocks.has(number) {
                self.own.write_at(at, block)?;
            }
            self.blocks.add(number);
        }
        Ok(())
    }

    /// As [`Storage::punch`], from a multiple of [`PATCH_BLOCK`] on. What is a hole already stays one.
    fn punch(&self, mut offset: u64, bytes: u64) -> io::Result<()> {
        self.writes(offset)?;
        let zero = [0; PATCH_BLOCK as usize];
        let end = offset + bytes;
        while offset < end {
            let extent = self.extent(offset, end - offset)?;
            let hole = match extent.state {
                Provisioning::Hole if extent.bytes >= end - offset => break,
                Provisioning::Hole => extent.bytes / PATCH_BLOCK * PATCH_BLOCK,
                _ => 0,
            };
            if hole == 0 {
                self.write_at(offset, &zero[..(end - offset).min(PATCH_BLOCK) as usize])?;
            }
            offset += hole.max(PATCH_BLOCK);
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.own.sync()
    }

    fn len(&self) -> io::Result<u64> {
        self.own.len()
    }

    fn set_len(&self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        self.own.allocated_bytes()
    }

    fn extent(&self, offset: u64, bytes: u64) -> io::Result<Extent> {
        let (storage, run) = self.at(offset, bytes);
        storage.extent(offset, run)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::model::ModelStorage;

    const BYTES: u64 = 300 * PATCH_BLOCK;

    fn below() -> Arc<ModelStorage> {
        let below = ModelStorage::new();
        below.set_len(BYTES).unwrap();
        for block in (0..300).step_by(3) {
            below
                .write_at(
                    block * PATCH_BLOCK,
                    &[(block % 255) as u8 + 1; PATCH_BLOCK as usize],
                )
                .unwrap();
        }
        Arc::new(below)
    }

    fn empty() -> Arc<ModelStorage> {
        let own = ModelStorage::new();
        own.set_len(BYTES).unwrap();
        Arc::new(own)
    }

    fn content(storage: &dyn Storage) -> Vec<u8> {
        let mut content = vec![0; BYTES as usize];
        storage.read_at(0, &mut content).unwrap();
        content
    }

    #[test]
    fn what_is_equal_takes_no_room_and_all_reads_as_written() {
        let (below, own) = (below(), empty());
        let mut expected = content(&*below);
        let before = expected.clone();
        let patched = Patched::begin(own.clone(), below.clone(), BYTES);
        patched.write_at(0, &before[..64 * 4096]).unwrap();
        assert_eq!(patched.own_blocks().count(), 0);
        // Another one, a zero one where data was, and a short one at a hole.
        patched.write_at(5 * 4096, &[9; 4096]).unwrap();
        expected[5 * 4096..6 * 4096].fill(9);
        patched.write_at(6 * 4096, &[0; 4096]).unwrap();
        expected[6 * 4096..7 * 4096].fill(0);
        patched.write_at(298 * 4096, &[8; 512]).unwrap();
        expected[298 * 4096..298 * 4096 + 512].fill(8);
        assert_eq!(patched.own_blocks().count(), 3);
        assert!(content(&patched) == expected);
        // Written twice, the second time zeroes.
        patched.write_at(5 * 4096, &[0; 4096]).unwrap();
        expected[5 * 4096..6 * 4096].fill(0);
        assert!(content(&patched) == expected && content(&*below) == before);
        let map = patched.own_blocks().to_bytes();
        let blocks = OwnBlocks::from_bytes(BYTES, &map).unwrap();
        let again = Patched::sealed(own, blocks, below);
        assert!(content(&again) == expected);
        assert_eq!(
            again.write_at(0, &[1; 4096]).unwrap_err().kind(),
            io::ErrorKind::ReadOnlyFilesystem
        );
        assert!(OwnBlocks::from_bytes(BYTES, &map[8..]).is_none());
        assert!(OwnBlocks::from_bytes(BYTES, &map[1..]).is_none());
    }

    #[test]
    fn zeroes_cover_what_is_there_and_holes_stay_holes() {
        for (offset, bytes) in [
            (0, BYTES),
            (4096, 4096),
            (2 * 4096, 5 * 4096),
            (297 * 4096, 3 * 4096),
            (128 * 4096, 64 * 4096),
        ] {
            let (below, own) = (below(), empty());
            let mut expected = content(&*below);
            expected[offset as usize..(offset + bytes) as usize].fill(0);
            let patched = Patched::begin(own.clone(), below, BYTES);
            patched.punch(offset, bytes).unwrap();
            assert!(content(&patched) == expected, "{offset} {bytes}");
            let data = (offset / 4096..(offset + bytes) / 4096).filter(|block| block % 3 == 0);
            assert_eq!(patched.own_blocks().count(), data.count() as u64);
            assert_eq!(own.allocated_bytes().unwrap(), 0);
        }
    }

    #[test]
    fn runs_are_found_across_words() {
        let own = OwnBlocks::none(BYTES);
        assert_eq!(own.run(0, 300), (false, 300));
        for block in 60..200 {
            own.add(block);
        }
        assert_eq!(own.run(0, 300), (false, 60));
        assert_eq!(own.run(60, 300), (true, 140));
        assert_eq!(own.run(200, 100), (false, 100));
        assert_eq!(own.run(130, 7), (true, 7));
    }
}
