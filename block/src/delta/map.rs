//! The states of a disk's blocks, in memory.

use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use super::DeltaError;
use super::format::{BLOCKS_A_WORD, Layout};
use crate::storage::Storage;
use crate::{Extent, Provisioning};

/// Words in a page: 4 KiB of memory for 64 MiB of disk.
const PAGE_WORDS: u64 = 512;
/// Read at once when a map is loaded.
const LOAD_BYTES: u64 = 64 * 1024;

/// Where a block's content is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Base,
    Data,
    Zero,
}

impl State {
    fn bits(self) -> u64 {
        match self {
            Self::Base => 0,
            Self::Data => 1,
            Self::Zero => 2,
        }
    }

    fn from_bits(bits: u64) -> Option<Self> {
        match bits & 3 {
            0 => Some(Self::Base),
            1 => Some(Self::Data),
            2 => Some(Self::Zero),
            _ => None,
        }
    }
}

/// How many blocks of data a word of a map has: of the states data alone has the lower bit.
pub(super) fn data_blocks_of(word: u64) -> u64 {
    u64::from((word & 0x5555_5555_5555_5555).count_ones())
}

type Page = Box<[AtomicU64]>;

/// Two bits a block. Read without a lock; written by whoever holds the delta's writer lock. Pages without a written
/// block take no memory, so that a thousand fresh disks are cheap.
pub(super) struct StateMap {
    pages: Box<[OnceLock<Page>]>,
}

impl StateMap {
    pub(super) fn new(layout: &Layout) -> Self {
        Self {
            pages: (0..layout.words.div_ceil(PAGE_WORDS))
                .map(|_| OnceLock::new())
                .collect(),
        }
    }

    /// Reads a map of the file; holes are skipped.
    pub(super) fn load(
        storage: &dyn Storage,
        offset: u64,
        layout: &Layout,
        path: &Path,
    ) -> Result<Self, DeltaError> {
        let io = |source| DeltaError::Io {
            path: path.into(),
            source,
        };
        let map = Self::new(layout);
        let mut done = 0;
        let mut bytes = vec![0; LOAD_BYTES as usize];
        while done < layout.map_bytes {
            let left = (layout.map_bytes - done).min(LOAD_BYTES);
            let Extent { bytes: run, state } = storage
                .extent(offset + done, layout.map_bytes - done)
                .map_err(io)?;
            if state == Provisioning::Hole && run >= 8 {
                done += run / 8 * 8;
                continue;
            }
            let part = &mut bytes[..left as usize];
            storage.read_at(offset + done, part).map_err(io)?;
            for (n, word) in part.as_chunks::<8>().0.iter().enumerate() {
                let (index, word) = (done / 8 + n as u64, u64::from_le_bytes(*word));
                if word == 0 || index >= layout.words {
                    continue;
                }
                for slot in 0..BLOCKS_A_WORD {
                    if State::from_bits(word >> (2 * slot)).is_none() {
                        let block = index * BLOCKS_A_WORD + slot;
                        return Err(DeltaError::Damaged {
                            path: path.into(),
                            what: format!("its map has no valid state for block {block}"),
                        });
                    }
                }
                map.set_word(index, word);
            }
            done += left;
        }
        Ok(map)
    }

    pub(super) fn word(&self, index: u64) -> u64 {
        match self.pages[(index / PAGE_WORDS) as usize].get() {
            Some(page) => page[(index % PAGE_WORDS) as usize].load(Ordering::Acquire),
            None => 0,
        }
    }

    pub(super) fn set_word(&self, index: u64, word: u64) {
        let page = self.pages[(index / PAGE_WORDS) as usize]
            .get_or_init(|| (0..PAGE_WORDS).map(|_| AtomicU64::new(0)).collect());
        page[(index % PAGE_WORDS) as usize].store(word, Ordering::Release);
    }

    /// The indexes of the words in which a block is not the base's.
    pub(super) fn used_words(&self) -> impl Iterator<Item = u64> + '_ {
        self.pages.iter().enumerate().flat_map(|(number, page)| {
            let words = page.get().into_iter().flat_map(|page| page.iter().enumerate());
            words
                .filter(|(_, word)| word.load(Ordering::Acquire) != 0)
                .map(move |(n, _)| number as u64 * PAGE_WORDS + n as u64)
        })
    }

    pub(super) fn get(&self, block: u64) -> State {
        let word = self.word(block / BLOCKS_A_WORD);
        State::from_bits(word >> (2 * (block % BLOCKS_A_WORD))).unwrap_or(State::Base)
    }

    /// The state at `block` and how many blocks, up to `most`, share it.
    pub(super) fn run(&self, block: u64, most: u64) -> (State, u64) {
        let state = self.get(block);
        let alike = state.bits() * 0x5555_5555_5555_5555;
        let mut count = 1;
        while count < most {
            let next = block + count;
            if next.is_multiple_of(BLOCKS_A_WORD) && self.word(next / BLOCKS_A_WORD) == alike {
                count += BLOCKS_A_WORD;
            } else if self.get(next) == state {
                count += 1;
            } else {
                break;
            }
        }
        (state, count.min(most))
    }

    /// The words as they are to be once the blocks `first..end` are `state`: those that change only.
    pub(super) fn changes(&self, first: u64, end: u64, state: State) -> Vec<(u64, u64)> {
        (first / BLOCKS_A_WORD..end.div_ceil(BLOCKS_A_WORD))
            .filter_map(|index| {
                let start = index * BLOCKS_A_WORD;
                let from = first.max(start) - start;
                let to = end.min(start + BLOCKS_A_WORD) - start;
                let mask = (u64::MAX >> (64 - 2 * (to - from))) << (2 * from);
                let old = self.word(index);
                let new = (old & !mask) | ((state.bits() * 0x5555_5555_5555_5555) & mask);
                (new != old).then_some((index, new))
            })
            .collect()
    }
}
