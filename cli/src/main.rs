//! `treeboot`, what a person types.
//!
//! One module a noun. Every verb ends in `Ok` or a [`Failure`]: what failed, what to do, and an exit code.

#![forbid(unsafe_code)]

mod cache;
mod client;
mod clone;
mod delta;
mod describe;
mod doctor;
mod exported;
mod failure;
mod fleet;
mod follow;
mod host;
mod image;
mod import;
mod login;
mod migrate;
mod output;
mod parallel;
mod publish;
mod search;
mod serve;
mod signals;
mod snapshot;
mod tree;
mod vm;

use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};

use crate::client::Options;
use crate::failure::{Exit, Failure};

const EXIT_CODES: &str = "Exit codes:
  0 done                     5 coordinator or agent cannot be reached
  1 failed                   6 partly failed: some of several
  2 not a valid command line 7 the present state does not allow it
  3 not found                8 not done in time
  4 exists already           9 no room left
  130 ended by a signal

Example:
  treeboot image import debian.qcow2 debian
  treeboot fleet boot --image debian --count 8
  treeboot tree debian";

/// Boots a fleet of alike VMs from one image over a tree of iSCSI targets
#[derive(Debug, Parser)]
#[command(name = "treeboot", version, after_help = EXIT_CODES, arg_required_else_help = true)]
struct Cli {
    #[command(flatten)]
    options: Options,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(serve::ServeArgs),
    /// Import, register, list, show, remove, attach and detach images
    #[command(subcommand)]
    Image(image::ImageVerb),
    /// List the hosts, or show one
    #[command(subcommand)]
    Host(host::HostVerb),
    Tree(tree::TreeArgs),
    Search(search::SearchArgs),
    Doctor(doctor::DoctorArgs),
    /// Create, start, stop, destroy and list virtual machines
    #[command(subcommand)]
    Vm(vm::VmVerb),
    /// Take, list, go back to and delete snapshots of VMs' disks
    #[command(subcommand)]
    Snapshot(snapshot::SnapshotVerb),
    Clone(clone::CloneArgs),
    Publish(publish::PublishArgs),
    Migrate(migrate::MigrateArgs),
    Describe(describe::DescribeArgs),
    /// Check what a VM wrote, and export it
    #[command(subcommand)]
    Delta(delta::DeltaVerb),
    /// Show, grow, shrink, pin and drop what hosts cache
    #[command(subcommand)]
    Cache(cache::CacheVerb),
    /// Boot and stop many virtual machines at once
    #[command(subcommand)]
    Fleet(fleet::FleetVerb),
    Login(login::LoginArgs),
    /// Print a completion script for a shell
    #[command(after_help = "Example:\n  treeboot completions bash > /etc/bash_completion.d/treeboot")]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return report(&Failure::io("cannot start", &error)),
    };
    let done = runtime.block_on(async {
        match cli.command {
            // These have an orderly end of their own.
            Command::Serve(args) => serve::run(args).await,
            command @ Command::Tree(tree::TreeArgs { watch: true, .. }) => run(&cli.options, command).await,
            command => {
                let mut signals = signals::Signals::catch()?;
                tokio::select! {
                    done = run(&cli.options, command) => done,
                    // Dropping the work ends its calls and removes what it left in a scratch directory.
                    signal = signals.next() => Err(Failure::new(Exit::Interrupted, signal)),
                }
            }
        }
    });
    // Blocking reads of a slow disk must not hold up the end.
    runtime.shutdown_background();
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => report(&failure),
    }
}

async fn run(options: &Options, command: Command) -> Result<(), Failure> {
    if !matches!(command, Command::Login(_) | Command::Completions { .. }) {
        client::identify(options)?;
    }
    match command {
        Command::Login(args) => login::run(options, args).await,
        Command::Serve(args) => serve::run(args).await,
        Command::Image(verb) => image::run(options, verb).await,
        Command::Host(verb) => host::run(options, verb).await,
        Command::Tree(args) => tree::run(options, args).await,
        Command::Search(args) => search::run(options, args).await,
        Command::Doctor(args) => doctor::run(options, args).await,
        Command::Vm(verb) => vm::run(options, verb).await,
        Command::Snapshot(verb) => snapshot::run(options, verb).await,
        Command::Publish(args) => publish::run(options, args).await,
        Command::Clone(args) => clone::run(options, args).await,
        Command::Migrate(args) => migrate::run(options, args).await,
        Command::Describe(args) => describe::run(options, args).await,
        Command::Delta(verb) => delta::run(options, verb).await,
        Command::Cache(verb) => cache::run(options, verb).await,
        Command::Fleet(verb) => fleet::run(options, verb).await,
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "treeboot", &mut script);
            output::print_text(&String::from_utf8_lossy(&script))
        }
    }
}

fn report(failure: &Failure) -> ExitCode {
    eprintln!("{failure}");
    failure.exit.into()
}

/// Help and version go to standard output; everything else begins like our own errors.
fn usage(error: &clap::Error) -> ExitCode {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        let _ = error.print(); // a closed pipe is no failure
        return ExitCode::SUCCESS;
    }
    let text = error.render().to_string();
    let text = text
        .strip_prefix("error: ")
        .map_or(text.clone(), |text| format!("treeboot: {text}"));
    eprint!("{text}");
    Exit::Usage.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_verbs_help_shows_an_example() {
        fn walk(command: &clap::Command, path: &str) {
            let path = format!("{path} {}", command.get_name());
            let verbs: Vec<_> = command
                .get_subcommands()
                .filter(|verb| verb.get_name() != "help")
                .collect();
            if verbs.is_empty() {
                let help = command
                    .get_after_help()
                    .map(ToString::to_string)
                    .unwrap_or_default();
                assert!(help.contains("Example:\n  treeboot "), "{path}");
            }
            verbs.into_iter().for_each(|verb| walk(verb, &path));
        }
        walk(&Cli::command(), "");
    }
}
