//! `treeboot-agent`: the daemon's command line, its log, its signals.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;
use treeboot_agent::daemon::{Daemon, Options};

/// Attaches images, caches them, gives VMs their disks, and serves other hosts.
///
/// Example: treeboot-agent --name host1 --state /var/lib/treeboot/agent --coordinator http://10.0.0.1:7400
/// --listen 10.0.0.2:7401 --portal 10.0.0.2:3260
#[derive(Debug, Parser)]
#[command(name = "treeboot-agent", version)]
struct Arguments {
    #[command(flatten)]
    options: Options,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_from_env("TREEBOOT_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    match run(&arguments.options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
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
        notify_ready();
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

/// Tells systemd, where it started us (sd_notify(3)). Nothing depends on it, so a failure is only logged.
fn notify_ready() {
    use std::os::linux::net::SocketAddrExt as _;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let address = match path.to_str().and_then(|path| path.strip_prefix('@')) {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&path),
    };
    let sent = address.and_then(|address| UnixDatagram::unbound()?.send_to_addr(b"READY=1", &address));
    if let Err(error) = sent {
        tracing::warn!(%error, "the service manager is not told");
    }
}
