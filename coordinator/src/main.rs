//! `treeboot-coordinator`: the daemon's command line, its log, its signals.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use treeboot_coordinator::daemon::{Daemon, Options};
use treeboot_coordinator::identity;
use treeboot_daemon::config::{self, ConfigCommand, ConfigFile, Read, Setting};

/// Keeps the attach tree of every image, and tells each host where to read.
///
/// Example: treeboot-coordinator --state /var/lib/treeboot/coordinator --listen 127.0.0.1:7400
#[derive(Debug, Parser)]
#[command(name = "treeboot-coordinator", version)]
struct Arguments {
    #[command(flatten)]
    options: Options,
    #[command(flatten)]
    file: ConfigFile,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// The configuration file
    #[command(subcommand)]
    Config(ConfigCommand),
    #[command(flatten)]
    Identity(identity::Command),
}

/// The verbs of the authority, by themselves: they want `--state` and nothing else of what a start wants.
#[derive(Debug, Parser)]
#[command(name = "treeboot-coordinator", version)]
struct Verbs {
    #[command(subcommand)]
    command: identity::Command,
}

impl Verbs {
    /// The words that they begin with.
    const FIRST: [&str; 3] = ["init", "token", "user"];
}

fn main() -> ExitCode {
    if std::env::args()
        .nth(1)
        .is_some_and(|word| Verbs::FIRST.contains(&word.as_str()))
    {
        return say(&Verbs::parse().command);
    }
    let Read { options, settings } = match config::parse::<Arguments>() {
        Ok(read) => read,
        Err(code) => return code,
    };
    match options.command {
        Some(Command::Config(ConfigCommand::Check { json })) => {
            return check(&options.options, &settings, json);
        }
        Some(Command::Identity(command)) => return say(&command),
        None => {}
    }
    treeboot_daemon::log_to_stderr();
    // Each host is an open connection, and what a process gets unless it asks for more is often 1,024.
    treeboot_daemon::take_all_files("hosts beyond it find no connection");
    match run(&options.options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Does a verb of the authority, and prints what came of it.
fn say(command: &identity::Command) -> ExitCode {
    match command.run() {
        Ok(text) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
            eprintln!("error: {error}{}", cause.unwrap_or_default());
            ExitCode::FAILURE
        }
    }
}

/// What a start would say of its options, without one.
fn check(options: &Options, settings: &[Setting], json: bool) -> ExitCode {
    match options.settings() {
        Ok(_) => {
            println!("{}", config::show(settings, json));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Runtime::new().context("cannot start the async runtime")?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
        let mut daemon = Daemon::start(options).await?;
        treeboot_daemon::notify_ready();
        tracing::info!(rpc = %daemon.address(), "ready");
        tokio::select! {
            _ = terminate.recv() => tracing::info!("SIGTERM: stopping"),
            _ = interrupt.recv() => tracing::info!("SIGINT: stopping"),
            () = daemon.failed() => anyhow::bail!("the coordinator ended by itself; the log says why"),
        }
        daemon.stop().await?;
        tracing::info!("stopped");
        Ok(())
    })
}
