//! Progress of long work, on standard error: a bar on a terminal, a plain line now and then elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// How often a plain line is written where there is no terminal: rare enough for a CI log.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Bytes of an image.
    Bytes,
    /// Things, such as VMs.
    Items,
}

/// A running account of work done. Ends with [`finish`](Self::finish), or vanishes when dropped.
#[derive(Debug)]
pub(crate) struct Progress {
    what: String,
    unit: Unit,
    total: u64,
    done: u64,
    bar: Option<ProgressBar>,
    last_line: Instant,
}

impl Progress {
    /// Begins an account of `total` bytes.
    pub(crate) fn of_bytes(what: &str, total: u64) -> Self {
        Self::begin(what, total, Unit::Bytes)
    }

    /// Begins an account of `total` things.
    pub(crate) fn of_items(what: &str, total: u64) -> Self {
        Self::begin(what, total, Unit::Items)
    }

    fn begin(what: &str, total: u64, unit: Unit) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let template = match unit {
                Unit::Bytes => {
                    "{msg} [{bar:30}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}"
                }
                Unit::Items => "{msg} [{bar:30}] {pos}/{len} {elapsed}",
            };
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
            // The template is ours; were it wrong, the default style would do.
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.set_message(what.to_owned());
            bar
        });
        Self {
            what: what.to_owned(),
            unit,
            total,
            done: 0,
            bar,
            last_line: Instant::now(),
        }
    }

    /// Sets how much is done.
    pub(crate) fn set(&mut self, done: u64) {
        self.done = done.min(self.total);
        if let Some(bar) = &self.bar {
            bar.set_position(self.done);
        } else if self.last_line.elapsed() >= LINE_EVERY {
            self.last_line = Instant::now();
            eprintln!("{}", self.line());
        }
    }

    /// Sets the total, where it becomes known late.
    pub(crate) fn set_total(&mut self, total: u64) {
        if total != self.total {
            self.total = total;
            if let Some(bar) = &self.bar {
                bar.set_length(total);
            }
        }
    }

    /// One more is done.
    pub(crate) fn step(&mut self) {
        self.set(self.done.saturating_add(1));
    }

    /// Writes a line beside the bar.
    pub(crate) fn note(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{line}")),
            None => eprintln!("{line}"),
        }
    }

    /// Takes the bar away; what comes next says how it ended.
    pub(crate) fn finish(self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn line(&self) -> String {
        let percent = (u128::from(self.done) * 100)
            .checked_div(u128::from(self.total))
            .unwrap_or(100);
        match self.unit {
            Unit::Bytes => {
                format!(
                    "{}: {} of {} ({percent} %)",
                    self.what,
                    super::bytes(self.done),
                    super::bytes(self.total)
                )
            }
            Unit::Items => format!("{}: {} of {}", self.what, self.done, self.total),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_line_counts_in_the_unit() {
        let mut progress = Progress::of_bytes("import", 2048);
        progress.set(1024);
        assert_eq!(progress.line(), "import: 1.00 KiB of 2.00 KiB (50 %)");
        progress.set(u64::MAX);
        assert_eq!(progress.line(), "import: 2.00 KiB of 2.00 KiB (100 %)");
        let mut progress = Progress::of_items("VMs ready", 3);
        progress.step();
        assert_eq!(progress.line(), "VMs ready: 1 of 3");
    }
}
