//! A whole installation in virtual time, from one seed: the coordinator's real trees and outbox, the agents' real judging and planning, and
//! a modelled network between them. A seed and a commit replay any failure.
//!
//! `scenario` draws what a seed stands for, `volt` is the coordinator's process, `host` an agent's, `world` the loop and the network,
//! `check` the laws, looked at from outside. Deliberately absent: clocks, threads and chance other than the seed's, and a second
//! implementation of anything that the daemons decide.

pub mod bugs;
pub mod campaign;
pub mod chance;
pub mod check;
pub mod edges;
pub mod host;
pub mod racks;
pub mod scenario;
pub mod settled;
pub mod volt;
pub mod world;

use std::collections::{BTreeSet, VecDeque};

pub use check::Violation;
pub use scenario::{Fault, Scenario};
use world::World;

/// Beats within which everything is settled once nothing goes wrong any more: a lease, the longest pauses of streams and of people, and
/// as much again.
pub const SETTLE_BEATS: u64 = 30;
/// Changes of parents that each host that comes, goes or complains may cause, on the average.
const MOVES_EACH: u64 = 8;

/// What is to be simulated.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Hosts of the fleet.
    pub hosts: usize,
    /// Keep a trace.
    pub trace: bool,
    /// Numbers of faults that do not happen.
    pub without: BTreeSet<usize>,
}

/// What happened in one seed, in numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counts {
    /// Events of the simulation.
    pub events: u64,
    /// Steps of the trees.
    pub steps: u64,
    /// Batches written to the record.
    pub writes: u64,
    /// Deaths of the coordinator.
    pub deaths: u64,
    /// Faults.
    pub faults: u64,
    /// Changes of parents.
    pub moved: u64,
    /// Hosts that came, went or complained.
    pub disturbances: u64,
    /// Hosts in the trees at the end.
    pub hosts: u64,
    /// Depth of the deepest at the end.
    pub deepest: u64,
    /// From the end of the faults until everything was settled, in milliseconds of virtual time.
    pub settled_ms: u64,
}

/// What came of one seed.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The seed.
    pub seed: u64,
    /// The first broken law, if any.
    pub violation: Option<Violation>,
    /// What happened.
    pub counts: Counts,
    /// What happened in words, where it was asked for.
    pub trace: VecDeque<String>,
}

/// Simulates one seed.
#[must_use]
pub fn run(seed: u64, options: &Options) -> Outcome {
    let scenario = Scenario::new(seed, options.hosts).leave_out(&options.without);
    let (violation, counts, trace) = World::new(scenario, options.trace).run();
    Outcome {
        seed,
        violation,
        counts,
        trace,
    }
}

/// A smaller fleet, and fewer faults, that break the same law of a seed; at most so many tries.
#[must_use]
pub fn shrink(seed: u64, options: &Options, law: &str, mut tries: usize) -> Options {
    let mut best = options.clone();
    best.trace = false;
    let mut breaks = |options: &Options| {
        tries = tries.saturating_sub(1);
        tries > 0 && run(seed, options).violation.is_some_and(|found| found.law == law)
    };
    // Another size is another history, so each is tried by itself.
    for hosts in [2, 3, 4, 6, 8, 12, 20, 32, 50, 100] {
        let smaller = Options {
            hosts,
            ..best.clone()
        };
        if hosts < options.hosts && options.without.is_empty() && breaks(&smaller) {
            best = smaller;
            break;
        }
    }
    let faults = Scenario::new(seed, best.hosts).faults.len();
    let mut part = faults.div_ceil(2);
    while part > 0 {
        let mut at = 0;
        while at < faults {
            let mut fewer = best.clone();
            fewer.without.extend(at..(at + part).min(faults));
            if fewer.without.len() > best.without.len() && breaks(&fewer) {
                best = fewer;
            }
            at += part;
        }
        part /= 2;
    }
    best
}
