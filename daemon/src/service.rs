//! The log, the limit of open files, and systemd.

use std::io::IsTerminal as _;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing_subscriber::EnvFilter;

/// Logs to standard error from now on, as `TREEBOOT_LOG` says (`info` where it says nothing), in colour on a terminal.
pub fn log_to_stderr() {
    let filter = EnvFilter::try_from_env("TREEBOOT_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}

/// Tells systemd that the daemon serves, where systemd started it (sd_notify(3)). Nothing depends on it, so a failure is only logged.
pub fn notify_ready() {
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

/// Asks for as many open files as the process may have: what it gets unless it asks is often 1,024. `beyond` ends the warning: what happens to
/// those past the limit.
pub fn take_all_files(beyond: &str) {
    let limit = getrlimit(Resource::Nofile);
    let all = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, all) {
        tracing::warn!(%error, "the limit of open files stays as it is: {beyond}");
    }
}
