//! `treeboot-agent`: the daemon's command line, its log, its signals.

#![forbid(unsafe_code)]

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use treeboot_agent::daemon::{Daemon, Options};
use treeboot_agent::holder::{self, HOLDER};
use treeboot_daemon::config::{self, ConfigCommand, ConfigFile, Read};

/// Attaches images, caches them, gives VMs their disks, and serves other hosts.
///
/// Example: treeboot-agent --name host1 --state /var/lib/treeboot/agent --coordinator http://10.0.0.1:7400
/// --listen 10.0.0.2:7401 --portal 10.0.0.2:3260
#[derive(Debug, Parser)]
#[command(name = "treeboot-agent", version)]
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
}

fn main() -> ExitCode {
    let mut words = std::env::args_os().skip(1);
    if words.next().is_some_and(|word| word == HOLDER)
        && let (Some(state), None) = (words.next(), words.next())
    {
        return hold(Path::new(&state));
    }
    let Read { options, settings } = match config::parse::<Arguments>() {
        Ok(read) => read,
        Err(code) => return code,
    };
    if let Some(Command::Config(ConfigCommand::Check { json })) = options.command {
        println!("{}", config::show(&settings, json));
        return ExitCode::SUCCESS;
    }
    treeboot_daemon::log_to_stderr();
    // Each disk is an open file and each front end a connection, and what a process gets unless it asks for more is often 1,024.
    treeboot_daemon::take_all_files("disks beyond it cannot be served");
    match run(&options.options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// What the agent starts by itself (`treeboot_agent::holder`); it has no options, so the command line does not know it.
fn hold(state: &Path) -> ExitCode {
    match holder::run(state) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: the holder of {} ended: {error}", state.display());
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
        tracing::info!(host = %options.name, rpc = %daemon.address(), portal = daemon.portal(), "ready");
        let failed = tokio::select! {
            _ = terminate.recv() => None,
            _ = interrupt.recv() => None,
            error = daemon.failed() => Some(error),
        };
        daemon.stop().await;
        tracing::info!("stopped");
        match failed {
            Some(error) => Err(error.into()),
            None => Ok(()),
        }
    })
}
