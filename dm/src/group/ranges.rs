//! Which content has which range of the group's address space. Pure.
//!
//! A cache knows its blocks by address, so an address that once was image A's must never be image B's while the cache lives:
//! the published code reused positions and served one image's blocks for another's. Ranges are handed out in rising order and
//! never again; only a new life (an empty cache) begins at 0.

use std::collections::BTreeMap;

use treeboot_types::Digest;

use crate::Sectors;

/// The address space: 2 PiB. dm-cache finds its hash tables' sizes from its cache, not from this; at 15 GB an image it lasts
/// for 140,000 images.
pub const SPACE: Sectors = Sectors(1 << 42);

/// A content's range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// First sector; a multiple of the block.
    pub start: Sectors,
    /// Sectors of the content itself.
    pub length: Sectors,
    /// Sectors up to the next multiple of the block. The cache holds whole blocks, so what is behind the content is zeroes.
    pub room: Sectors,
}

/// The ranges of one life of a cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ranges {
    block: Sectors,
    next: Sectors,
    placed: BTreeMap<Digest, Range>,
}

/// Why there is no range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// All addresses were handed out. Only a new life helps.
    #[error("the cache group has no addresses left; rebuild it")]
    Exhausted,
    /// A content has no bytes, or other bytes than it had.
    #[error("a content of {asked} sectors, which has a range of {placed}")]
    Length {
        /// As asked.
        asked: Sectors,
        /// As placed; 0 where it is not.
        placed: Sectors,
    },
}

impl Ranges {
    /// Nothing is placed; ranges are multiples of `block`, at least 1.
    pub fn new(block: Sectors) -> Self {
        Self {
            block: Sectors(block.0.max(1)),
            next: Sectors(0),
            placed: BTreeMap::new(),
        }
    }

    /// The ranges as they were saved; `None` where they overlap, pass the next address, or are not whole blocks.
    pub fn restore(block: Sectors, next: Sectors, placed: &[(Digest, Sectors, Sectors)]) -> Option<Self> {
        let mut ranges = Self::new(block);
        let mut sorted = placed.to_vec();
        sorted.sort_by_key(|&(_, start, _)| start);
        let mut free = 0;
        for (content, start, length) in sorted {
            let range = ranges.range(start, length).ok()?;
            if start.0 < free || !start.0.is_multiple_of(ranges.block.0) {
                return None;
            }
            free = start.0 + range.room.0;
            if ranges.placed.insert(content, range).is_some() {
                return None;
            }
        }
        let whole = next.0.is_multiple_of(ranges.block.0);
        (free <= next.0 && next <= SPACE && whole).then(|| {
            ranges.next = next;
            ranges
        })
    }

    /// The content's range, a new one where it has none. Save before it is used: see [`super::State`].
    ///
    /// # Errors
    /// [`RangeError`].
    pub fn place(&mut self, content: Digest, length: Sectors) -> Result<Range, RangeError> {
        if let Some(&range) = self.placed.get(&content) {
            return if range.length == length {
                Ok(range)
            } else {
                Err(RangeError::Length {
                    asked: length,
                    placed: range.length,
                })
            };
        }
        let range = self.range(self.next, length)?;
        self.next = Sectors(range.start.0 + range.room.0);
        self.placed.insert(content, range);
        Ok(range)
    }

    /// Takes the content's range away for ever; its addresses are not handed out again.
    pub fn forget(&mut self, content: &Digest) -> Option<Range> {
        self.placed.remove(content)
    }

    /// The content's range.
    pub fn get(&self, content: &Digest) -> Option<Range> {
        self.placed.get(content).copied()
    }

    /// All ranges, by content.
    pub fn iter(&self) -> impl Iterator<Item = (&Digest, &Range)> {
        self.placed.iter()
    }

    /// The first address that was never handed out.
    pub fn next(&self) -> Sectors {
        self.next
    }

    /// Unit of all ranges.
    pub fn block(&self) -> Sectors {
        self.block
    }

    fn range(&self, start: Sectors, length: Sectors) -> Result<Range, RangeError> {
        if length.0 == 0 {
            return Err(RangeError::Length {
                asked: length,
                placed: Sectors(0),
            });
        }
        let room = length.0.checked_next_multiple_of(self.block.0);
        match room.and_then(|room| Some((room, start.0.checked_add(room)?))) {
            Some((room, end)) if end <= SPACE.0 => Ok(Range {
                start,
                length,
                room: Sectors(room),
            }),
            _ => Err(RangeError::Exhausted),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Step {
        Place(u8, u64),
        Forget(u8),
        /// The process is killed and reads what was saved last.
        Restore,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..6_u8, 1..1000_u64).prop_map(|(content, length)| Step::Place(content, length)),
            2 => (0..6_u8).prop_map(Step::Forget),
            1 => Just(Step::Restore),
        ]
    }

    fn saved(ranges: &Ranges) -> Ranges {
        let placed: Vec<_> = ranges
            .iter()
            .map(|(content, range)| (*content, range.start, range.length))
            .collect();
        Ranges::restore(ranges.block(), ranges.next(), &placed).unwrap()
    }

    proptest! {
        #[test]
        fn no_block_is_ever_two_contents(steps in vec(step(), 0..80)) {
            let mut ranges = Ranges::new(Sectors(128));
            // By the slow and obvious way: who ever had each block.
            let mut owner = std::collections::BTreeMap::<u64, (u8, u64)>::new();
            let mut generation = [0_u64; 6];
            for step in steps {
                match step {
                    Step::Place(content, length) => {
                        let Ok(range) = ranges.place(Digest([content; 32]), Sectors(length)) else {
                            // Only where it is placed with another length.
                            prop_assert!(ranges.get(&Digest([content; 32])).is_some());
                            continue;
                        };
                        prop_assert!(range.room.0 >= length && range.start.0 % 128 == 0 && range.room.0 % 128 == 0);
                        for block in range.start.0 / 128..(range.start.0 + range.room.0) / 128 {
                            let mine = (content, generation[usize::from(content)]);
                            prop_assert_eq!(*owner.entry(block).or_insert(mine), mine);
                        }
                    }
                    Step::Forget(content) => {
                        if ranges.forget(&Digest([content; 32])).is_some() {
                            generation[usize::from(content)] += 1;
                        }
                    }
                    Step::Restore => {
                        let restored = saved(&ranges);
                        prop_assert_eq!(&restored, &ranges);
                        ranges = restored;
                    }
                }
            }
            let starts: BTreeSet<_> = ranges.iter().map(|(_, range)| range.start).collect();
            prop_assert_eq!(starts.len(), ranges.iter().count());
        }
    }

    #[test]
    fn the_space_ends() {
        let mut ranges = Ranges::new(Sectors(128));
        assert!(ranges.place(Digest([1; 32]), SPACE).is_ok());
        assert_eq!(
            ranges.place(Digest([2; 32]), Sectors(1)),
            Err(RangeError::Exhausted)
        );
        assert_eq!(
            ranges.place(Digest([3; 32]), Sectors(u64::MAX)),
            Err(RangeError::Exhausted)
        );
        assert!(ranges.place(Digest([4; 32]), Sectors(0)).is_err());
    }

    #[test]
    fn broken_ranges_are_not_restored() {
        let content = |byte| Digest([byte; 32]);
        let restore = |next, placed: &[(Digest, Sectors, Sectors)]| {
            Ranges::restore(Sectors(128), Sectors(next), placed)
        };
        assert!(restore(256, &[(content(1), Sectors(0), Sectors(129))]).is_some());
        assert!(restore(128, &[(content(1), Sectors(0), Sectors(129))]).is_none());
        assert!(restore(256, &[(content(1), Sectors(64), Sectors(1))]).is_none());
        let overlapping = [
            (content(1), Sectors(0), Sectors(200)),
            (content(2), Sectors(128), Sectors(1)),
        ];
        assert!(restore(512, &overlapping).is_none());
        let twice = [
            (content(1), Sectors(0), Sectors(1)),
            (content(1), Sectors(128), Sectors(1)),
        ];
        assert!(restore(512, &twice).is_none());
    }
}
