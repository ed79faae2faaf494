//! What a disk may hold after a power cut: a sequence of writes and flushes that a seed gives, blocks that say which write they are of, and
//! the check of what is found against what had been flushed.
//!
//! The writer runs inside of a host and is ended with it. What it had flushed it has told to the outside before.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt as _;
use std::str::FromStr;

use crate::image::{BLOCK_BYTES, Pattern};

/// First bytes of a block that the writer wrote.
const MAGIC: &[u8; 8] = b"tb-stamp";
/// Blocks of one write, at most: 32 KiB, so that writes cross the chunks of every kind of delta.
const MAX_BLOCKS: u64 = 8;
/// Writes between two flushes, at most.
const MAX_WRITES: u64 = 24;

/// One write of the sequence, and whether a flush follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Op {
    /// Its number, from 1.
    pub number: u64,
    /// Its first block.
    pub first: u64,
    /// How many.
    pub blocks: u64,
    /// Whether all until here is flushed after it.
    pub flush: bool,
}

/// The endless sequence of a seed on a disk of so many blocks.
#[derive(Debug, Clone)]
pub struct Ops {
    state: u64,
    blocks: u64,
    number: u64,
}

impl Ops {
    /// On blocks 0 to `blocks`, at least one.
    #[must_use]
    pub fn new(seed: u64, blocks: u64) -> Self {
        Self {
            state: seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1,
            blocks: blocks.max(1),
            number: 0,
        }
    }

    fn random(&mut self, below: u64) -> u64 {
        // xorshift64*: the high bits are the good ones.
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        (self.state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 32) % below.max(1)
    }
}

impl Iterator for Ops {
    type Item = Op;

    fn next(&mut self) -> Option<Op> {
        self.number += 1;
        let first = self.random(self.blocks);
        let blocks = (1 + self.random(MAX_BLOCKS)).min(self.blocks - first);
        let flush = self.random(MAX_WRITES) == 0;
        Some(Op {
            number: self.number,
            first,
            blocks,
            flush,
        })
    }
}

/// What a block holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stamp {
    /// What the image has there.
    Image,
    /// What this write of this round wrote there, wholly.
    Written {
        /// The writer's round.
        round: u32,
        /// [`Op::number`].
        number: u64,
    },
    /// Anything else: torn, another block's, or rubbish.
    Damaged,
}

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Image => f.write_str("image"),
            Self::Written { round, number } => write!(f, "{round}:{number}"),
            Self::Damaged => f.write_str("damaged"),
        }
    }
}

impl FromStr for Stamp {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        Ok(match (text, text.split_once(':')) {
            ("image", _) => Self::Image,
            ("damaged", _) => Self::Damaged,
            (_, Some((round, number))) => Self::Written {
                round: round.parse()?,
                number: number.parse()?,
            },
            _ => anyhow::bail!("'{text}' is no stamp"),
        })
    }
}

/// What the writer writes into a block.
#[must_use]
pub fn block(round: u32, number: u64, index: u64) -> [u8; BLOCK_BYTES] {
    let mut bytes = [0; BLOCK_BYTES];
    let mut state = (u64::from(round) << 48) ^ (number << 20) ^ index ^ 0x5851_F42D_4C95_7F2D;
    for word in bytes.chunks_exact_mut(8) {
        state = state
            .wrapping_mul(0x5851_F42D_4C95_7F2D)
            .wrapping_add(0x1405_7B7E_F767_814F);
        word.copy_from_slice(&state.to_le_bytes());
    }
    let head = [
        &MAGIC[..],
        &u64::from(round).to_le_bytes(),
        &number.to_le_bytes(),
        &index.to_le_bytes(),
    ]
    .concat();
    bytes[..head.len()].copy_from_slice(&head);
    bytes
}

/// What a block that was read holds.
#[must_use]
pub fn stamp(read: &[u8], index: u64, image: Pattern) -> Stamp {
    if read == image.block(index) {
        return Stamp::Image;
    }
    let number_at = |at: usize| {
        read.get(at..at + 8)
            .and_then(|bytes| bytes.try_into().ok())
            .map(u64::from_le_bytes)
    };
    if let (Some(round), Some(number)) = (number_at(8), number_at(16))
        && let Ok(round) = u32::try_from(round)
        && read == block(round, number, index)
    {
        return Stamp::Written { round, number };
    }
    Stamp::Damaged
}

/// Writes the sequence of a seed until it is ended; `F N` on `report` says that all writes until N were flushed.
///
/// # Errors
/// A write, a flush or the report failed.
pub fn write(disk: &File, seed: u64, round: u32, blocks: u64, report: &mut impl Write) -> io::Result<()> {
    writeln!(report, "BEGIN")?;
    report.flush()?;
    for op in Ops::new(seed, blocks) {
        let bytes: Vec<u8> = (op.first..op.first + op.blocks)
            .flat_map(|index| block(round, op.number, index))
            .collect();
        disk.write_all_at(&bytes, op.first * BLOCK_BYTES as u64)?;
        if op.flush {
            disk.sync_data()?;
            writeln!(report, "F {}", op.number)?;
            report.flush()?;
        }
    }
    Ok(())
}

/// What a disk holds, block by block.
///
/// # Errors
/// It cannot be read.
pub fn read(disk: &File, blocks: u64, image: Pattern) -> io::Result<Vec<Stamp>> {
    let mut bytes = [0; BLOCK_BYTES];
    (0..blocks)
        .map(|index| {
            disk.read_exact_at(&mut bytes, index * BLOCK_BYTES as u64)?;
            Ok(stamp(&bytes, index, image))
        })
        .collect()
}

/// What a disk is known to hold.
#[derive(Debug, Clone)]
pub struct Model {
    blocks: Vec<Stamp>,
}

impl Model {
    /// A disk on which nothing was written.
    #[must_use]
    pub fn new(blocks: u64) -> Self {
        Self {
            blocks: (0..blocks).map(|_| Stamp::Image).collect(),
        }
    }

    /// Takes in what was found after a round that was cut when writes until `flushed` were known to be durable.
    ///
    /// Each block must hold what it held after the last flushed write, or what a later write of the round wrote there. What was found is
    /// what the disk is known to hold from now on.
    ///
    /// # Errors
    /// The blocks that hold anything else, and what they might have held.
    pub fn after_cut(
        &mut self,
        seed: u64,
        round: u32,
        flushed: u64,
        found: Vec<Stamp>,
    ) -> anyhow::Result<()> {
        anyhow::ensure!(
            found.len() == self.blocks.len(),
            "{} blocks were found, not {}",
            found.len(),
            self.blocks.len()
        );
        let last = found
            .iter()
            .filter_map(|stamp| match stamp {
                Stamp::Written { round: of, number } if *of == round => Some(*number),
                _ => None,
            })
            .max()
            .unwrap_or(0)
            .max(flushed);
        let mut allowed: Vec<BTreeSet<Stamp>> =
            self.blocks.iter().map(|stamp| BTreeSet::from([*stamp])).collect();
        for op in Ops::new(seed, self.blocks.len() as u64).take_while(|op| op.number <= last) {
            let stamp = Stamp::Written {
                round,
                number: op.number,
            };
            let range = usize::try_from(op.first)?..usize::try_from(op.first + op.blocks)?;
            for block in &mut allowed[range] {
                if op.number <= flushed {
                    block.clear();
                }
                block.insert(stamp);
            }
        }
        let wrong: Vec<String> = found
            .iter()
            .zip(&allowed)
            .enumerate()
            .filter(|(_, (found, allowed))| !allowed.contains(found))
            .map(|(index, (found, allowed))| {
                let allowed: Vec<String> = allowed.iter().map(ToString::to_string).collect();
                format!("block {index} holds {found}, not {}", allowed.join(" or "))
            })
            .collect();
        anyhow::ensure!(
            wrong.is_empty(),
            "round {round}, seed {seed}, flushed until {flushed}: {} wrong blocks: {}",
            wrong.len(),
            wrong.iter().take(10).cloned().collect::<Vec<_>>().join("; ")
        );
        self.blocks = found;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IMAGE: Pattern = Pattern {
        seed: 3,
        bytes: 64 * BLOCK_BYTES as u64,
    };

    /// The disk after writes until `last` of a round.
    fn after(model: &Model, seed: u64, round: u32, last: u64) -> Vec<Stamp> {
        let mut blocks = model.blocks.clone();
        for op in Ops::new(seed, blocks.len() as u64).take_while(|op| op.number <= last) {
            for index in op.first..op.first + op.blocks {
                blocks[index as usize] = Stamp::Written {
                    round,
                    number: op.number,
                };
            }
        }
        blocks
    }

    #[test]
    fn what_was_flushed_must_be_there_and_what_came_later_may() {
        for seed in 0..50 {
            let mut model = Model::new(64);
            let found = after(&model, seed, 1, 40);
            model.clone().after_cut(seed, 1, 40, found.clone()).unwrap();
            model.after_cut(seed, 1, 20, found).unwrap();
            // A later round begins with what was found.
            let lost = after(&model, seed + 1, 2, 9);
            let again = model.clone().after_cut(seed + 1, 2, 30, lost);
            assert!(
                again.is_err(),
                "seed {seed}: writes 10 to 30 were flushed and are lost"
            );
        }
    }

    #[test]
    fn a_torn_block_and_one_of_another_place_are_damaged() {
        let mut torn = block(1, 9, 5);
        torn[2048..].copy_from_slice(&block(1, 8, 5)[2048..]);
        assert_eq!(stamp(&torn, 5, IMAGE), Stamp::Damaged);
        assert_eq!(stamp(&block(1, 9, 6), 5, IMAGE), Stamp::Damaged);
        let whole = Stamp::Written { round: 1, number: 9 };
        assert_eq!(stamp(&block(1, 9, 5), 5, IMAGE), whole);
        assert_eq!(stamp(&IMAGE.block(5), 5, IMAGE), Stamp::Image);
        for one in [whole, Stamp::Image, Stamp::Damaged] {
            assert_eq!(one.to_string().parse::<Stamp>().unwrap(), one);
        }
    }
}
