//! Disk images whose every block is known, so that a reader can tell a wrong byte without the file.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::Result;

/// The unit in which contents differ.
pub const BLOCK_BYTES: usize = 4096;

/// One block in so many is a hole, and reads as zeroes: images are sparse.
const HOLE_EVERY: u64 = 16;

/// An image that is a function of a seed.
#[derive(Debug, Clone, Copy)]
pub struct Pattern {
    /// Images of different seeds share no block but the holes.
    pub seed: u64,
    /// Length of the image, a multiple of [`BLOCK_BYTES`].
    pub bytes: u64,
}

impl Pattern {
    /// What block number `index` holds.
    #[must_use]
    pub fn block(&self, index: u64) -> [u8; BLOCK_BYTES] {
        let mut block = [0; BLOCK_BYTES];
        if index % HOLE_EVERY == HOLE_EVERY - 1 {
            return block;
        }
        // xorshift64* by Vigna, seeded so that neighbours differ in every word.
        let mut state = (self.seed ^ index.wrapping_mul(0x9E37_79B9_7F4A_7C15)) | 1;
        for word in block.chunks_exact_mut(8) {
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            word.copy_from_slice(&state.wrapping_mul(0x2545_F491_4F6C_DD1D).to_le_bytes());
        }
        block
    }

    /// How many blocks there are.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.bytes / BLOCK_BYTES as u64
    }

    /// Whether bytes read at `offset` (a multiple of [`BLOCK_BYTES`]) are the image's; gives the first block that is not.
    #[must_use]
    pub fn first_wrong_block(&self, offset: u64, read: &[u8]) -> Option<u64> {
        let first = offset / BLOCK_BYTES as u64;
        read.chunks(BLOCK_BYTES)
            .zip(first..)
            .find(|(bytes, index)| self.block(*index)[..bytes.len()] != **bytes)
            .map(|(_, index)| index)
    }

    /// Writes the image as a raw file with holes.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let file = File::create(path)?;
        file.set_len(self.bytes)?;
        for index in 0..self.blocks() {
            let block = self.block(index);
            if block != [0; BLOCK_BYTES] {
                file.write_all_at(&block, index * BLOCK_BYTES as u64)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_differ_between_places_and_seeds_and_a_wrong_one_is_found() {
        let pattern = Pattern {
            seed: 1,
            bytes: 1 << 20,
        };
        let other = Pattern { seed: 2, ..pattern };
        assert_ne!(pattern.block(0), pattern.block(1));
        assert_ne!(pattern.block(0), other.block(0));
        assert_eq!(pattern.block(15), [0; BLOCK_BYTES]);
        let mut read = [pattern.block(3), pattern.block(4)].concat();
        assert_eq!(pattern.first_wrong_block(3 * 4096, &read), None);
        read[4096] ^= 1;
        assert_eq!(pattern.first_wrong_block(3 * 4096, &read), Some(4));
    }
}
