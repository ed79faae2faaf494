//! Many seeds, in threads. What comes of a seed does not depend on the others, nor on the threads.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use std::time::Instant;

use parking_lot::Mutex;

use super::bugs::{self, Bug};
use super::{Counts, Options, Outcome, Violation};

/// Seeds that found something once, with the size of their fleet: they are run first. What each found stands in `docs/simulation.md`.
pub const REGRESSIONS: &[(u64, usize)] = &[
    (24, 40),
    (34, 40),
    (46, 40),
    (116, 24),
    (1945, 24),
    (2167, 12),
    (6996, 8),
    (17_706, 8),
    (20_034, 24),
    (23_830, 12),
    (26_626, 8),
    (37_269, 8),
    (923, 24),
    (200_004, 12),
    (200_052, 12),
];

/// Which seeds are run, and how.
#[derive(Debug, Clone)]
pub struct Campaign {
    /// The first seed.
    pub first: u64,
    /// How many.
    pub count: u64,
    /// For each.
    pub options: Options,
    /// Planted in all of them.
    pub bug: Option<Bug>,
    /// Side by side.
    pub threads: usize,
    /// Ends with the first broken law.
    pub stops: bool,
    /// Begins no seed after this; the rest is left for another run.
    pub until: Option<Instant>,
}

/// What came of a campaign.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Seeds that were run.
    pub seeds: u64,
    /// All of them together; the latest to settle, and the deepest.
    pub counts: Counts,
    /// Those that broke a law, by seed.
    pub broken: Vec<Outcome>,
}

/// One seed; a panic breaks a law too.
#[must_use]
pub fn run_seed(seed: u64, options: &Options) -> Outcome {
    catch_unwind(AssertUnwindSafe(|| super::run(seed, options))).unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Outcome {
            seed,
            violation: Some(Violation {
                law: "nothing panics",
                at: 0,
                why: text.unwrap_or_else(|| "without a text".into()),
            }),
            counts: Counts::default(),
            trace: std::collections::VecDeque::new(),
        }
    })
}

impl Campaign {
    /// Runs it; `done` hears of each seed.
    pub fn run(&self, done: &(dyn Fn(&Outcome) + Sync)) -> Report {
        let next = AtomicU64::new(0);
        let stop = AtomicBool::new(false);
        let report = Mutex::new(Report::default());
        std::thread::scope(|scope| {
            for _ in 0..self.threads.max(1) {
                scope.spawn(|| {
                    bugs::plant(self.bug);
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        let is_late = self.until.is_some_and(|until| Instant::now() > until);
                        if number >= self.count || is_late || stop.load(Ordering::Relaxed) {
                            return;
                        }
                        let outcome = run_seed(self.first + number, &self.options);
                        done(&outcome);
                        let mut report = report.lock();
                        report.seeds += 1;
                        report.counts.add(&outcome.counts);
                        if outcome.violation.is_some() {
                            report.broken.push(outcome);
                            stop.fetch_or(self.stops, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        let mut report = report.into_inner();
        report.broken.sort_by_key(|outcome| outcome.seed);
        report
    }
}

impl Counts {
    fn add(&mut self, other: &Self) {
        self.events += other.events;
        self.steps += other.steps;
        self.writes += other.writes;
        self.deaths += other.deaths;
        self.faults += other.faults;
        self.moved += other.moved;
        self.disturbances += other.disturbances;
        self.hosts += other.hosts;
        self.deepest = self.deepest.max(other.deepest);
        self.settled_ms = self.settled_ms.max(other.settled_ms);
    }
}
