//! The simulation in CI: seeds that must hold, and planted bugs that must be found within as many. `cargo xtask sim` runs more.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use treeboot_sim::Options;
use treeboot_sim::campaign::{Campaign, REGRESSIONS, run_seed};

/// Hosts of a fleet.
const HOSTS: usize = 200;
/// Seeds, from 1; the same in every run, and TREEBOOT_SIM_SEEDS asks for more.
const SEEDS: u64 = 1000;
/// So long they may take: with the planted bugs, four minutes of CI. A slower machine runs fewer of them and says how many. Where others come
/// first on the machine, TREEBOOT_SIM_SECONDS gives them more.
const LIMIT_S: u64 = 210;
/// Fewer than these are no answer.
const FEWEST: u64 = 100;

fn asked(name: &str, otherwise: u64) -> u64 {
    let asked = std::env::var(name).ok();
    asked.and_then(|number| number.parse().ok()).unwrap_or(otherwise)
}

fn seeds() -> u64 {
    asked("TREEBOOT_SIM_SEEDS", SEEDS)
}

fn campaign() -> Campaign {
    Campaign {
        first: 1,
        count: seeds(),
        options: Options {
            hosts: HOSTS,
            ..Options::default()
        },
        bug: None,
        threads: 2,
        stops: true,
        until: Some(Instant::now() + Duration::from_secs(asked("TREEBOOT_SIM_SECONDS", LIMIT_S))),
    }
}

#[test]
fn no_law_is_broken_in_any_seed() {
    for &(seed, hosts) in REGRESSIONS {
        let options = Options {
            hosts,
            ..Options::default()
        };
        let outcome = run_seed(seed, &options);
        assert_eq!(
            outcome.violation, None,
            "again: cargo xtask sim --seed {seed} --hosts {hosts}"
        );
    }
    let report = campaign().run(&|_| {});
    let broken: Vec<String> = report
        .broken
        .iter()
        .filter_map(|outcome| {
            let violation = outcome.violation.as_ref()?;
            Some(format!(
                "{}: {}; again: cargo xtask sim --seed {} --hosts {HOSTS}",
                violation.law, violation.why, outcome.seed
            ))
        })
        .collect();
    assert!(broken.is_empty(), "\n{}\n", broken.join("\n"));
    println!("{} of {} seeds", report.seeds, seeds());
    assert!(
        report.seeds >= FEWEST.min(seeds()),
        "too slow: {} seeds",
        report.seeds
    );
}

/// A seed says the same twice, whatever ran before it.
#[test]
fn a_seed_gives_the_same_history_twice() {
    let options = Options {
        hosts: 60,
        trace: true,
        ..Options::default()
    };
    for seed in 1..6 {
        let (first, second) = (run_seed(seed, &options), run_seed(seed, &options));
        assert_eq!(first.counts, second.counts, "seed {seed}");
        assert!(first.trace == second.trace, "seed {seed} tells two histories");
    }
}

/// Each of them alone, stopping at the first seed that finds it. In small fleets, where a seed takes less.
#[cfg(feature = "planted-bugs")]
#[test]
fn every_planted_bug_is_found() {
    use treeboot_sim::bugs;

    assert!(bugs::ALL.len() >= 12);
    let mut unfound = Vec::new();
    for (name, bug) in bugs::ALL {
        let planted = Campaign {
            first: 1,
            count: 60,
            options: Options {
                hosts: 60,
                ..Options::default()
            },
            bug: Some(*bug),
            threads: 2,
            stops: true,
            until: None,
        };
        let report = planted.run(&|_| {});
        match report.broken.first() {
            Some(outcome) => {
                let law = outcome.violation.as_ref().map_or("", |violation| violation.law);
                println!("{name:<28} seed {:>4}  {law}", outcome.seed);
                // What is found by a panic is found by the system itself.
                assert_ne!(law, "nothing panics", "{name}");
            }
            None => unfound.push(*name),
        }
    }
    assert!(unfound.is_empty(), "not found: {unfound:?}");
}
