//! A frozen delta's seal: a checksum for each of its blocks, so that damage is seen before anybody reads it.
//!
//! The seal lies behind the data. Its head holds a checksum of the map; then come four bytes a block, CRC-32C (RFC 3385 shows
//! why that polynomial for storage). It is written once, when the delta is frozen, and taken off before a merge writes into it.
//! It finds damage; it does not keep out somebody who can write the file.

use std::io;
use std::path::Path;
use std::sync::atomic::Ordering;

use treeboot_types::Digest;

use super::format::{BLOCK, BLOCKS_A_WORD, Layout, SECTOR};
use super::map::{State, StateMap};
use super::{Core, DeltaError};
use crate::storage::Storage;
use crate::verity::sha256;
use crate::{Extent, Provisioning};

const MAGIC: &[u8; 8] = b"TBSEAL\0\0";
/// Bytes of the head before its checksum: magic, the map's checksum.
const USED: usize = 8 + 32;
/// Bytes of a block's checksum.
const SUM: u64 = 4;
/// Blocks whose data is read at once.
const AT_ONCE: u64 = 64;

/// Where a block's checksum lies in the file.
fn sum_place(layout: &Layout, block: u64) -> u64 {
    layout.file_bytes + BLOCK + block * SUM
}

fn sum_of_map(map: &StateMap) -> Digest {
    let words = map.used_words();
    let text: Vec<u8> = words
        .flat_map(|index| [index.to_le_bytes(), map.word(index).to_le_bytes()].concat())
        .collect();
    sha256(&text)
}

fn encode(map: &StateMap) -> [u8; SECTOR] {
    let mut sector = [0; SECTOR];
    sector[..8].copy_from_slice(MAGIC);
    sector[8..USED].copy_from_slice(&sum_of_map(map).0);
    let sum = sha256(&sector[..USED]);
    sector[USED..USED + 32].copy_from_slice(&sum.0);
    sector
}

/// Whether the file is sealed.
///
/// # Errors
/// It is, and its map is not the one that was sealed.
pub(super) fn look(
    storage: &dyn Storage,
    path: &Path,
    layout: &Layout,
    map: &StateMap,
) -> Result<bool, DeltaError> {
    let io = |source| DeltaError::Io {
        path: path.into(),
        source,
    };
    if storage.len().map_err(io)? <= layout.file_bytes {
        return Ok(false);
    }
    let mut sector = [0; SECTOR];
    storage.read_at(layout.file_bytes, &mut sector).map_err(io)?;
    if sector.iter().all(|&byte| byte == 0) {
        return Ok(false);
    }
    let damaged = |what: &str| DeltaError::Damaged {
        path: path.into(),
        what: what.into(),
    };
    if sector[..8] != MAGIC[..] || sha256(&sector[..USED]).0 != sector[USED..USED + 32] {
        return Err(damaged("its seal's checksum is wrong"));
    }
    if sector != encode(map) {
        return Err(damaged("its map is not the one that was sealed"));
    }
    Ok(true)
}

/// A part of a delta that is not as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeltaDamage {
    /// The disk's byte at which it begins.
    pub offset: u64,
    /// Its length in bytes.
    pub bytes: u64,
    /// What is wrong.
    pub what: String,
}

/// What a check of one delta found. Every block of the disk is in one of the first three counts.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DeltaReport {
    /// Blocks of 4 KiB that are what lies below.
    pub base_blocks: u64,
    /// Blocks of data.
    pub data_blocks: u64,
    /// Blocks of zeroes that take no space.
    pub zero_blocks: u64,
    /// Every block of data has a checksum, and it was compared.
    pub sealed: bool,
    /// Bytes of the file that are in use for no block of data: space that a discard could not give back.
    pub stray_bytes: u64,
    /// What is wrong, by offset.
    pub damage: Vec<DeltaDamage>,
}

/// What a run of a sealed delta's blocks is compared with.
pub(crate) struct Seal {
    first: u64,
    sums: Vec<u8>,
}

impl Seal {
    /// The first block of `data`, which are whole blocks, that is not what was sealed.
    pub(crate) fn wrong(&self, data: &[u8]) -> Option<u64> {
        let blocks = data.chunks(BLOCK as usize).zip(self.sums.as_chunks::<4>().0);
        let mut numbered = (self.first..).zip(blocks);
        let wrong = numbered.find(|(_, (block, sum))| crc32c::crc32c(block).to_le_bytes() != **sum);
        wrong.map(|(number, _)| number)
    }
}

impl Core {
    pub(crate) fn is_sealed(&self) -> bool {
        self.sealed.load(Ordering::Acquire)
    }

    /// Whether nothing was ever written to it.
    pub(crate) fn is_untouched(&self) -> bool {
        self.map.used_words().next().is_none()
    }

    /// What `count` blocks from `first` on are compared with. Blocks.
    pub(crate) fn seal_of(&self, first: u64, count: u64) -> io::Result<Seal> {
        let mut sums = vec![0; (count * SUM) as usize];
        self.storage.read_at(sum_place(&self.layout, first), &mut sums)?;
        Ok(Seal { first, sums })
    }

    /// As [`seal_of`](Self::seal_of), if that needs no waiting.
    pub(crate) fn try_seal_of(&self, first: u64, count: u64) -> io::Result<Option<Seal>> {
        let mut sums = vec![0; (count * SUM) as usize];
        let read = self
            .storage
            .try_read_at(sum_place(&self.layout, first), &mut sums)?;
        Ok(read.map(|()| Seal { first, sums }))
    }

    /// Runs of blocks that are not what lies below, in order: first block, state, number.
    pub(crate) fn runs(&self, most: u64) -> impl Iterator<Item = (u64, State, u64)> + '_ {
        let words: Vec<u64> = self.map.used_words().collect();
        words.into_iter().flat_map(move |index| {
            let mut block = index * BLOCKS_A_WORD;
            let end = (block + BLOCKS_A_WORD).min(self.layout.blocks);
            std::iter::from_fn(move || {
                while block < end {
                    let (state, count) = self.map.run(block, (end - block).min(most));
                    let first = block;
                    block += count;
                    if state != State::Base {
                        return Some((first, state, count));
                    }
                }
                None
            })
        })
    }

    /// Gives each block of data its checksum. What was written must have been flushed, and nothing may be written meanwhile.
    /// Blocks.
    pub(crate) fn seal(&self) -> io::Result<()> {
        if self.is_sealed() {
            return Ok(());
        }
        let end = sum_place(&self.layout, self.layout.blocks);
        if self.storage.len()? < end {
            self.storage.set_len(end)?;
        }
        let mut data = vec![0; (AT_ONCE * BLOCK) as usize];
        for (first, state, count) in self.runs(AT_ONCE) {
            if state == State::Data {
                let data = &mut data[..(count * BLOCK) as usize];
                self.storage.read_at(self.place(first * BLOCK), data)?;
                let blocks = data.chunks(BLOCK as usize);
                let sums: Vec<u8> = blocks
                    .flat_map(|block| crc32c::crc32c(block).to_le_bytes())
                    .collect();
                self.storage.write_at(sum_place(&self.layout, first), &sums)?;
            }
        }
        // The head last: a crash leaves no seal, or a whole one.
        self.storage.sync()?;
        self.storage
            .write_at(self.layout.file_bytes, &encode(&self.map))?;
        self.storage.sync()?;
        self.sealed.store(true, Ordering::Release);
        Ok(())
    }

    /// Takes the seal off before a merge writes. Blocks.
    pub(crate) fn unseal(&self) -> io::Result<()> {
        if !self.is_sealed() {
            return Ok(());
        }
        self.sealed.store(false, Ordering::Release);
        self.storage.write_at(self.layout.file_bytes, &[0; SECTOR])?;
        self.storage.sync()
    }

    /// Reads everything and compares it with what is known of it. Blocks.
    pub(crate) fn check(&self) -> io::Result<DeltaReport> {
        let mut report = DeltaReport {
            sealed: self.is_sealed(),
            ..DeltaReport::default()
        };
        let mut data = vec![0; (AT_ONCE * BLOCK) as usize];
        let mut used = 0;
        for (first, state, count) in self.runs(AT_ONCE) {
            if state == State::Zero {
                report.zero_blocks += count;
                continue;
            }
            report.data_blocks += count;
            let data = &mut data[..(count * BLOCK) as usize];
            let place = self.place(first * BLOCK);
            if let Err(error) = self.storage.read_at(place, data) {
                report.damage.push(DeltaDamage {
                    offset: first * BLOCK,
                    bytes: count * BLOCK,
                    what: format!("it cannot be read: {error}"),
                });
                continue;
            }
            used += self.mapped(place, count * BLOCK)?;
            if report.sealed {
                let seal = self.seal_of(first, count)?;
                for block in 0..count {
                    let at = (block * BLOCK) as usize;
                    let one = Seal {
                        first: first + block,
                        sums: seal.sums[(block * SUM) as usize..((block + 1) * SUM) as usize].to_vec(),
                    };
                    if one.wrong(&data[at..at + BLOCK as usize]).is_some() {
                        report.add_damage((first + block) * BLOCK, "its checksum is wrong");
                    }
                }
            }
        }
        report.base_blocks = self.layout.blocks - report.data_blocks - report.zero_blocks;
        let all = self.mapped(self.layout.data_offset, self.layout.blocks * BLOCK)?;
        report.stray_bytes = all.saturating_sub(used);
        Ok(report)
    }

    /// How many bytes of a part of the file have storage.
    fn mapped(&self, offset: u64, bytes: u64) -> io::Result<u64> {
        let (mut at, end, mut mapped) = (offset, offset + bytes, 0);
        while at < end {
            let Extent { bytes, state } = self.storage.extent(at, end - at)?;
            if state == Provisioning::Mapped {
                mapped += bytes;
            }
            at += bytes.max(1);
        }
        Ok(mapped)
    }
}

impl DeltaReport {
    /// Notes a block; neighbours that are wrong alike are one damage.
    fn add_damage(&mut self, offset: u64, what: &str) {
        match self.damage.last_mut() {
            Some(last) if last.offset + last.bytes == offset && last.what == what => last.bytes += BLOCK,
            _ => self.damage.push(DeltaDamage {
                offset,
                bytes: BLOCK,
                what: what.into(),
            }),
        }
    }
}
