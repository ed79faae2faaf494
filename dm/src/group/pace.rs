//! How fast a filler may go. Pure: the caller has the clock and does the waiting.

use std::time::Duration;

/// A rate in bytes per second that is kept over time, not between any two steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    bytes_per_second: u64,
    /// When the bytes so far are paid for.
    due: Duration,
}

/// A filler that was held up does not catch up with a burst longer than this.
const BURST: Duration = Duration::from_millis(100);

impl Pace {
    /// A pace from `now`, on a clock of the caller's; at least one byte per second.
    pub fn new(bytes_per_second: u64, now: Duration) -> Self {
        Self {
            bytes_per_second: bytes_per_second.max(1),
            due: now,
        }
    }

    /// How long to wait before the next step, `bytes` having been read just now.
    pub fn after(&mut self, bytes: u64, now: Duration) -> Duration {
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second);
        let cost = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        self.due = self.due.max(now.saturating_sub(BURST)).saturating_add(cost);
        self.due.saturating_sub(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_kept_over_time() {
        let mut pace = Pace::new(20_000_000, Duration::ZERO);
        let mut now = Duration::ZERO;
        for step in 0..1000_u64 {
            // Each step takes a while itself.
            now += Duration::from_micros(step % 7 * 100);
            now += pace.after(65_536, now);
        }
        let rate = 1000.0 * 65_536.0 / now.as_secs_f64();
        assert!((19_500_000.0..=20_500_000.0).contains(&rate), "{rate}");
    }

    #[test]
    fn a_filler_that_was_held_up_does_not_burst() {
        let mut pace = Pace::new(1_000_000, Duration::ZERO);
        let later = Duration::from_secs(60);
        let mut waited = Duration::ZERO;
        for _ in 0..10 {
            waited += pace.after(100_000, later + waited);
        }
        assert!(waited >= Duration::from_millis(890), "{waited:?}");
    }
}
