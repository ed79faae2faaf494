//! Simulates installations in virtual time, one from each seed, and says which law broke. `cargo xtask sim` becomes this program.

#![forbid(unsafe_code)]

use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use clap::Parser;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use treeboot_sim::bugs::{self, Bug};
use treeboot_sim::campaign::{Campaign, REGRESSIONS, Report, run_seed};
use treeboot_sim::{Options, Outcome, Scenario, shrink};

/// Broken seeds that are told in full; the rest are counted.
const TOLD: usize = 5;
/// Runs that finding a smaller case may take.
const SHRINK_TRIES: usize = 120;

/// Simulates installations in virtual time.
#[derive(Debug, Parser)]
#[command(name = "treeboot-sim", version)]
struct Cli {
    /// How many seeds
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// The first seed
    #[arg(long, default_value_t = 1)]
    first: u64,
    /// This seed alone
    #[arg(long, conflicts_with_all = ["seeds", "first"])]
    seed: Option<u64>,
    /// Hosts of a fleet
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    hosts: u64,
    /// Leaves out the faults of these numbers
    #[arg(long, value_delimiter = ',', value_name = "NUMBER")]
    without: Vec<usize>,
    /// Prints what happened, with --seed
    #[arg(long, requires = "seed")]
    trace: bool,
    /// Plants this bug, to see that it is found; 'list' names them
    #[arg(long, value_name = "BUG")]
    planted: Option<String>,
    /// Seeds side by side
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Writes the figures to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Does not look for a smaller case
    #[arg(long)]
    no_shrink: bool,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("treeboot-sim: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<bool> {
    if cli.planted.as_deref() == Some("list") {
        bugs::ALL.iter().for_each(|(name, _)| println!("{name}"));
        return Ok(true);
    }
    let bug = match &cli.planted {
        None => None,
        Some(_) if cfg!(not(feature = "planted-bugs")) => {
            bail!("this program was built without the feature planted-bugs");
        }
        Some(name) => Some(
            bugs::find(name)
                .with_context(|| format!("there is no bug '{name}'; --planted list names them"))?,
        ),
    };
    let options = Options {
        hosts: cli.hosts as usize,
        trace: cli.trace,
        without: cli.without.iter().copied().collect(),
    };
    if let Some(seed) = cli.seed {
        return Ok(one(cli, bug, seed, &options));
    }
    if bug.is_none() && !regressions(cli) {
        return Ok(false);
    }
    let campaign = Campaign {
        first: cli.first,
        count: cli.seeds,
        options,
        bug,
        threads: cli.threads,
        stops: bug.is_some(),
        until: None,
    };
    let bar = bar(cli.seeds);
    let began = Instant::now();
    let report = campaign.run(&|outcome: &Outcome| {
        if let Some(violation) = &outcome.violation {
            bar.println(format!("seed {}: {}", outcome.seed, violation.law));
        }
        bar.inc(1);
    });
    bar.finish_and_clear();
    let seconds = began.elapsed().as_secs_f64();
    bugs::plant(bug);
    for outcome in report.broken.iter().take(TOLD) {
        tell(cli, outcome, &campaign.options);
    }
    summary(&report, cli.hosts, seconds);
    if let Some(file) = &cli.json {
        write_json(file, &report, cli, seconds)?;
    }
    Ok(report.broken.is_empty())
}

/// One seed, in full.
fn one(cli: &Cli, bug: Option<Bug>, seed: u64, options: &Options) -> bool {
    bugs::plant(bug);
    let outcome = run_seed(seed, options);
    let mut out = std::io::stdout().lock();
    for line in &outcome.trace {
        // Whoever reads may have had enough.
        if writeln!(out, "{line}").is_err() {
            break;
        }
    }
    drop(out);
    let counts = outcome.counts;
    println!(
        "seed {seed}: {} events, {} faults, settled after {} ms, {} changes of parents for {} disturbances",
        counts.events, counts.faults, counts.settled_ms, counts.moved, counts.disturbances
    );
    if outcome.violation.is_some() {
        tell(cli, &outcome, options);
    }
    outcome.violation.is_none()
}

/// Seeds that found something once.
fn regressions(cli: &Cli) -> bool {
    let mut holds = true;
    for &(seed, hosts) in REGRESSIONS {
        let options = Options {
            hosts,
            ..Options::default()
        };
        let outcome = run_seed(seed, &options);
        if outcome.violation.is_some() {
            tell(cli, &outcome, &options);
            holds = false;
        }
    }
    holds
}

/// A broken law: what, from which seed, after which faults, and what to type to see it again.
fn tell(cli: &Cli, outcome: &Outcome, options: &Options) {
    let Some(violation) = &outcome.violation else {
        return;
    };
    let planted = cli
        .planted
        .as_ref()
        .map_or_else(String::new, |name| format!(" --planted {name}"));
    println!("\nseed {}: {}", outcome.seed, violation.law);
    println!("  at {} ms: {}", violation.at, violation.why);
    let small = if cli.no_shrink || cli.planted.is_some() {
        options.clone()
    } else {
        shrink(outcome.seed, options, violation.law, SHRINK_TRIES)
    };
    let scenario = Scenario::new(outcome.seed, small.hosts);
    println!(
        "  {} hosts of {}, {}; faults:",
        scenario.members.len(),
        small.hosts,
        scenario.policy_name
    );
    for (number, fault) in scenario.faults.iter().enumerate() {
        if !small.without.contains(&number) {
            println!("    {number}: {fault}");
        }
    }
    let without: Vec<String> = small.without.iter().map(ToString::to_string).collect();
    let without = if without.is_empty() {
        String::new()
    } else {
        format!(" --without {}", without.join(","))
    };
    println!(
        "  again: cargo xtask sim --seed {} --hosts {}{without}{planted} --trace",
        outcome.seed, small.hosts
    );
}

fn summary(report: &Report, hosts: u64, seconds: f64) {
    let counts = &report.counts;
    println!(
        "{} seeds of up to {hosts} hosts in {seconds:.1} s: {} events, {} steps of the trees, {} writes, {} faults, {} deaths of the \
         coordinator; {} changes of parents for {} hosts that came, went or complained; the last settled {} ms after the faults",
        report.seeds,
        counts.events,
        counts.steps,
        counts.writes,
        counts.faults,
        counts.deaths,
        counts.moved,
        counts.disturbances,
        counts.settled_ms
    );
    if report.broken.is_empty() {
        println!("no law was broken");
    } else {
        println!("{} seeds broke a law", report.broken.len());
    }
}

fn write_json(file: &std::path::Path, report: &Report, cli: &Cli, seconds: f64) -> Result<()> {
    let broken: Vec<_> = report
        .broken
        .iter()
        .filter_map(|outcome| {
            let violation = outcome.violation.as_ref()?;
            Some(serde_json::json!({
                "seed": outcome.seed, "law": violation.law, "at_ms": violation.at, "why": violation.why,
            }))
        })
        .collect();
    let figures = serde_json::json!({
        "first": cli.first, "seeds": report.seeds, "hosts": cli.hosts, "threads": cli.threads, "seconds": seconds,
        "planted": cli.planted, "counts": report.counts, "broken": broken,
    });
    std::fs::write(file, format!("{figures:#}\n")).with_context(|| format!("cannot write {}", file.display()))
}

fn bar(seeds: u64) -> ProgressBar {
    let bar = ProgressBar::new(seeds);
    if !std::io::stderr().is_terminal() {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {pos}/{len} seeds, {eta} left") {
        bar.set_style(style);
    }
    bar
}
