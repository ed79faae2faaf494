//! `cargo xtask`: the one tool of the workspace. Each subcommand is a module with `Args` and `run`.
//!
//! Deliberately absent: the product's crates. What xtask needs of the product it builds and starts, as a person would.

#![forbid(unsafe_code)]

mod apt;
mod bench;
mod demo;
mod guest;
mod lab;
mod sim;
mod soak;
mod test;
mod workspace;

use std::process::ExitCode;

use clap::Parser;

/// The one tool of the workspace.
#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    disable_help_subcommand = true
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Boots a fleet of guests through a tree of hosts on this machine, and shows what it cost.
    Demo(demo::Args),
    /// Measures ours beside peers, in interleaved rounds.
    Bench(bench::Args),
    /// The guests' disk images: built once and kept.
    Guest(guest::Args),
    /// Real Linux hosts on this machine, as user-mode Linux guests, with a coordinator and an origin; needs root.
    Lab(lab::Args),
    /// Simulates installations in virtual time, one from each seed: hosts, faults and a coordinator, and looks for broken laws.
    Sim(sim::Args),
    /// Everything that must hold: formatting, lints, and all tests, with real daemons and guests.
    Test(test::Args),
    /// Fuzzes each target, runs the oracle and simulates for long; fuzzing needs cargo-fuzz.
    Soak(soak::Args),
    /// As `test`, but a test that had to be skipped is a failure.
    Ci(test::Args),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Demo(args) => demo::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Guest(args) => guest::run(args),
        Command::Lab(args) => lab::run(&args),
        Command::Sim(args) => sim::run(&args),
        Command::Soak(args) => soak::run(&args),
        Command::Test(args) => test::run(&args, std::env::var_os("CI").is_some()),
        Command::Ci(args) => test::run(&args, true),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
