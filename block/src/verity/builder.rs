//! Makes the tree while the data goes by.

use std::io;

use sha2::{Digest as _, Sha256};
use treeboot_types::Digest;

use super::{BLOCK, BLOCK_LEN, DIGEST_BYTES, FANOUT, MAX_LEVELS, SUPERBLOCK, VerityLayout, sha256};
use crate::storage::Storage;

/// Bytes written at once where the same hash block repeats, over a hole.
const REPEAT_BYTES: usize = 256 * 1024;

/// One level's block in the making.
struct Level {
    block: Box<[u8; BLOCK_LEN]>,
    /// Digests in it.
    filled: u64,
    /// Where on the hash device it goes, in bytes.
    offset: u64,
}

/// Takes an image's data in ascending order and writes its hash device.
///
/// Holes cost next to nothing to hash: the digest of a zero block, and of each level above zero blocks, is
/// computed once. Memory: one block a level.
pub struct VerityBuilder<'a> {
    layout: VerityLayout,
    hash: &'a dyn Storage,
    levels: Vec<Level>,
    /// For each level the digest of what it holds digests of, all zero below: 0 is a zero block of data.
    zero: Vec<[u8; DIGEST_BYTES]>,
    /// Data that did not fill a block yet.
    rest: Vec<u8>,
    done_bytes: u64,
    root: Option<[u8; DIGEST_BYTES]>,
}

impl<'a> VerityBuilder<'a> {
    /// A builder for `layout` that writes to `hash`, which is empty.
    pub fn new(layout: VerityLayout, hash: &'a dyn Storage) -> Self {
        let levels = layout.level[..layout.levels as usize]
            .iter()
            .map(|&(first, _)| Level {
                block: Box::new([0; BLOCK_LEN]),
                filled: 0,
                offset: first * BLOCK,
            })
            .collect();
        let mut zero: Vec<[u8; DIGEST_BYTES]> = vec![sha256(&[0; BLOCK_LEN]).0];
        for level in 0..MAX_LEVELS {
            let repeated = zero[level].repeat(FANOUT as usize);
            zero.push(Sha256::digest(&repeated).into());
        }
        Self {
            layout,
            hash,
            levels,
            zero,
            rest: Vec::with_capacity(BLOCK_LEN),
            done_bytes: 0,
            root: None,
        }
    }

    /// Bytes taken so far.
    pub fn done_bytes(&self) -> u64 {
        self.done_bytes
    }

    /// Takes the next bytes.
    ///
    /// # Errors
    /// Where the hash device could not be written, or [`io::ErrorKind::InvalidInput`] where more comes than the
    /// layout has.
    pub fn update(&mut self, mut data: &[u8]) -> io::Result<()> {
        self.take(data.len() as u64)?;
        if !self.rest.is_empty() {
            let missing = (BLOCK_LEN - self.rest.len()).min(data.len());
            let (head, tail) = data.split_at(missing);
            self.rest.extend_from_slice(head);
            data = tail;
            self.end_rest()?;
        }
        let (blocks, rest) = data.as_chunks::<BLOCK_LEN>();
        for block in blocks {
            self.push(0, Sha256::digest(block).into())?;
        }
        self.rest.extend_from_slice(rest);
        Ok(())
    }

    /// Takes the digests of the next blocks of data instead of the blocks themselves. What came before must end with a whole block.
    ///
    /// # Errors
    /// As [`update`](Self::update), and [`io::ErrorKind::InvalidInput`] within a block.
    pub fn update_digests(&mut self, digests: &[[u8; DIGEST_BYTES]]) -> io::Result<()> {
        if !self.rest.is_empty() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let bytes = digests.len() as u64 * BLOCK;
        // The last block may be a short one.
        let short = self.layout.padded_bytes() - self.layout.data_bytes;
        let left = self.layout.data_bytes - self.done_bytes;
        self.take(if bytes == left + short { left } else { bytes })?;
        digests.iter().try_for_each(|digest| self.push(0, *digest))
    }

    /// Takes `bytes` zeroes.
    ///
    /// # Errors
    /// As [`update`](Self::update).
    pub fn skip_zeroes(&mut self, mut bytes: u64) -> io::Result<()> {
        self.take(bytes)?;
        if !self.rest.is_empty() {
            let missing = ((BLOCK_LEN - self.rest.len()) as u64).min(bytes);
            self.rest.resize(self.rest.len() + missing as usize, 0);
            bytes -= missing;
            self.end_rest()?;
        }
        self.push_zeroes(0, bytes / BLOCK)?;
        self.rest.resize(self.rest.len() + (bytes % BLOCK) as usize, 0);
        Ok(())
    }

    /// Ends the tree, pads data that ends within a block with zeroes, writes the superblock, and says the root.
    /// Nothing is synced.
    ///
    /// # Errors
    /// Where the hash device could not be written, or [`io::ErrorKind::UnexpectedEof`] where data is missing.
    pub fn finish(mut self) -> io::Result<Digest> {
        if self.done_bytes != self.layout.data_bytes || self.done_bytes == 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!(
                    "the image ends after {} of {} bytes",
                    self.done_bytes, self.layout.data_bytes
                ),
            ));
        }
        if !self.rest.is_empty() {
            self.rest.resize(BLOCK_LEN, 0);
            self.end_rest()?;
        }
        for level in 0..self.levels.len() {
            if self.levels[level].filled > 0 {
                self.end_block(level)?;
            }
        }
        let root = Digest(self.root.expect("the top level's only block was ended"));
        self.hash
            .write_at(SUPERBLOCK * BLOCK, &self.layout.superblock(&root))?;
        Ok(root)
    }

    fn take(&mut self, bytes: u64) -> io::Result<()> {
        match self.done_bytes.checked_add(bytes) {
            Some(done) if done <= self.layout.data_bytes => {
                self.done_bytes = done;
                Ok(())
            }
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("more than the image's {} bytes came", self.layout.data_bytes),
            )),
        }
    }

    fn end_rest(&mut self) -> io::Result<()> {
        if self.rest.len() < BLOCK_LEN {
            return Ok(());
        }
        let digest = Sha256::digest(&self.rest).into();
        self.rest.clear();
        self.push(0, digest)
    }

    fn push(&mut self, level: usize, digest: [u8; DIGEST_BYTES]) -> io::Result<()> {
        let Some(at) = self.levels.get_mut(level) else {
            self.root = Some(digest);
            return Ok(());
        };
        let start = at.filled as usize * DIGEST_BYTES;
        at.block[start..start + DIGEST_BYTES].copy_from_slice(&digest);
        at.filled += 1;
        if at.filled == FANOUT {
            self.end_block(level)?;
        }
        Ok(())
    }

    /// Writes the block of `level`, whose unused slots are zero, and hands its digest up.
    fn end_block(&mut self, level: usize) -> io::Result<()> {
        let at = &mut self.levels[level];
        self.hash.write_at(at.offset, &at.block[..])?;
        let digest = Sha256::digest(&at.block[..]).into();
        at.block.fill(0);
        at.filled = 0;
        at.offset += BLOCK;
        self.push(level + 1, digest)
    }

    /// `count` times the digest of zeroes at `level`; whole blocks of them are neither hashed nor made one by one.
    fn push_zeroes(&mut self, level: usize, mut count: u64) -> io::Result<()> {
        let Some(at) = self.levels.get(level) else {
            if count > 0 {
                self.root = Some(self.zero[level]);
            }
            return Ok(());
        };
        let digest = self.zero[level];
        let to_boundary = (FANOUT - at.filled) % FANOUT;
        for _ in 0..to_boundary.min(count) {
            self.push(level, digest)?;
            count -= 1;
        }
        let whole = count / FANOUT;
        if whole > 0 {
            let total = whole * BLOCK;
            let pattern = digest.repeat(total.min(REPEAT_BYTES as u64) as usize / DIGEST_BYTES);
            let offset = self.levels[level].offset;
            let mut written = 0;
            while written < total {
                let now = (total - written).min(pattern.len() as u64);
                self.hash.write_at(offset + written, &pattern[..now as usize])?;
                written += now;
            }
            self.levels[level].offset += total;
            self.push_zeroes(level + 1, whole)?;
        }
        for _ in 0..count % FANOUT {
            self.push(level, digest)?;
        }
        Ok(())
    }
}
