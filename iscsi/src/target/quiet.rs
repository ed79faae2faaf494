//! A brake for the log: whoever can reach a portal can make us write lines, so of such lines only some are written.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// Lines in one [`SPAN`]: enough to see what goes on.
const LINES: u32 = 20;
/// The span. At 20 lines of some 200 bytes a day of attack is 35 MB of log.
const SPAN: Duration = Duration::from_secs(10);

/// Counts lines about connections that are not logged in.
#[derive(Debug, Default)]
pub(super) struct Brake(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    since: Option<Instant>,
    lines: u32,
    withheld: u64,
}

impl Brake {
    /// May a line be written? Says how many were left out since the last one that was.
    pub(super) fn admit(&self, now: Instant) -> Option<u64> {
        let mut state = self.0.lock();
        if state
            .since
            .is_none_or(|since| now.saturating_duration_since(since) >= SPAN)
        {
            state.since = Some(now);
            state.lines = 0;
        }
        if state.lines >= LINES {
            state.withheld += 1;
            return None;
        }
        state.lines += 1;
        Some(std::mem::take(&mut state.withheld))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_flood_the_first_lines_are_written_and_the_rest_is_counted() {
        let (brake, start) = (Brake::default(), Instant::now());
        let written = (0..1000).filter(|_| brake.admit(start).is_some()).count();
        assert_eq!(written, LINES as usize);
        assert_eq!(brake.admit(start + SPAN), Some(980));
        assert_eq!(brake.admit(start + SPAN), Some(0));
    }
}
