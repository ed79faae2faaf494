//! Chance from a seed: the same numbers on every machine, and nothing else to be asked.

/// SplitMix64: small, and good enough to choose faults with.
#[derive(Debug, Clone)]
pub struct Chance(u64);

impl Chance {
    /// The stream `lane` of a seed. What one stream is asked does not change another.
    #[must_use]
    pub fn new(seed: u64, lane: u64) -> Self {
        let mut chance = Self(seed ^ lane.wrapping_mul(0xa076_1d64_78bd_642f));
        chance.draw();
        chance
    }

    /// The next 64 bits.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    /// From `low` to `high`, without `high`; `low` where there is nothing between.
    pub fn within(&mut self, low: u64, high: u64) -> u64 {
        low + self.draw() % high.saturating_sub(low).max(1)
    }

    /// One of so many, counted from 0.
    pub fn one_of(&mut self, count: usize) -> usize {
        (self.draw() % count.max(1) as u64) as usize
    }

    /// True so many times in a thousand.
    pub fn permille(&mut self, times: u64) -> bool {
        self.draw() % 1000 < times
    }
}
