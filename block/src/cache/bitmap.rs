//! Bits that many threads read and set without a lock.

use std::sync::atomic::{AtomicU64, Ordering};

/// A fixed number of bits. What was done before a bit was set is seen by whoever then finds it set.
#[derive(Debug)]
pub(super) struct Bitmap {
    words: Box<[AtomicU64]>,
    bits: u64,
}

impl Bitmap {
    pub(super) fn new(bits: u64, set: bool) -> Self {
        let word = if set { u64::MAX } else { 0 };
        Self {
            words: (0..bits.div_ceil(64)).map(|_| AtomicU64::new(word)).collect(),
            bits,
        }
    }

    /// From the little-endian words of a file; what is missing is not set.
    pub(super) fn from_bytes(bits: u64, bytes: &[u8]) -> Self {
        let bitmap = Self::new(bits, false);
        for (word, bytes) in bitmap.words.iter().zip(bytes.as_chunks::<8>().0) {
            word.store(u64::from_le_bytes(*bytes), Ordering::Relaxed);
        }
        bitmap
    }

    pub(super) fn get(&self, bit: u64) -> bool {
        let word = self.words[(bit / 64) as usize].load(Ordering::Acquire);
        bit < self.bits && word & (1 << (bit % 64)) != 0
    }

    /// Whether the bit was not set before.
    pub(super) fn set(&self, bit: u64) -> bool {
        let mask = 1 << (bit % 64);
        self.words[(bit / 64) as usize].fetch_or(mask, Ordering::AcqRel) & mask == 0
    }

    /// Whether the bit was set before.
    pub(super) fn clear(&self, bit: u64) -> bool {
        let mask = 1 << (bit % 64);
        self.words[(bit / 64) as usize].fetch_and(!mask, Ordering::AcqRel) & mask != 0
    }

    /// Whether all bits of `first..=last` are set.
    pub(super) fn all(&self, first: u64, last: u64) -> bool {
        let (from, to) = (first / 64, last / 64);
        (from..=to).all(|index| {
            let low = if index == from { first % 64 } else { 0 };
            let high = if index == to { last % 64 } else { 63 };
            let mask = (u64::MAX >> (63 - high)) & (u64::MAX << low);
            self.words[index as usize].load(Ordering::Acquire) & mask == mask
        })
    }

    /// Clears `first..=last`; calls `cleared` for each bit that was set.
    pub(super) fn clear_range(&self, first: u64, last: u64, mut cleared: impl FnMut(u64)) {
        (first..=last)
            .filter(|&bit| self.clear(bit))
            .for_each(&mut cleared);
    }

    /// How many bits of `first..=last` are set.
    pub(super) fn count_range(&self, first: u64, last: u64) -> u64 {
        (first..=last).filter(|&bit| self.get(bit)).count() as u64
    }

    /// The word of the file that holds `bit`: where in bytes, and its bytes.
    pub(super) fn word_of(&self, bit: u64) -> (u64, [u8; 8]) {
        let index = bit / 64;
        let word = self.words[index as usize].load(Ordering::Acquire);
        (index * 8, word.to_le_bytes())
    }

    /// How many bits are set.
    pub(super) fn count(&self) -> u64 {
        (0..self.bits).filter(|&bit| self.get(bit)).count() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_all_set_only_if_each_bit_is() {
        let bitmap = Bitmap::new(200, false);
        (60..=130).for_each(|bit| assert!(bitmap.set(bit)));
        assert!(!bitmap.set(60));
        for first in 50..140 {
            for last in first..140 {
                assert_eq!(
                    bitmap.all(first, last),
                    first >= 60 && last <= 130,
                    "{first}..={last}"
                );
            }
        }
        assert_eq!(bitmap.count(), 71);
        assert!(bitmap.clear(100) && !bitmap.clear(100) && !bitmap.get(100));
        let (offset, word) = bitmap.word_of(64);
        assert_eq!(offset, 8);
        let mut bytes = vec![0; 8];
        bytes.extend(word);
        assert_eq!(Bitmap::from_bytes(200, &bytes).count(), 63);
    }
}
