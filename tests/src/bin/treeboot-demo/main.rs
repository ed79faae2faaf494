//! `treeboot-demo`, which `cargo xtask demo` builds and becomes: a coordinator, an origin and hosts as processes of their own on
//! loopback addresses, one image, a tree, real VMs at its leaves, and what it cost.
//!
//! Uses what a user has: the daemons, their services and the program `treeboot`. Everything ends and goes with it, also on Ctrl-C.

#![forbid(unsafe_code)]

mod report;
mod run;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;

/// Boots a fleet from one image through a tree of hosts on this machine.
#[derive(Debug, Clone, Parser)]
#[command(name = "treeboot-demo")]
struct Options {
    /// Hosts besides the origin.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u16).range(1..=200))]
    hosts: u16,
    /// VMs on each of the deepest hosts; every second host has VMs.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=100))]
    vms_per_host: u16,
    /// The disk image to boot.
    #[arg(long)]
    image: PathBuf,
    /// What the report calls the guest.
    #[arg(long, default_value = "image")]
    guest: String,
    /// The text on the serial console that says a VM is up.
    #[arg(long, default_value = "login:")]
    ready_line: String,
    /// For how many seconds a VM may take to be up.
    #[arg(long, default_value_t = 300)]
    boot_limit_s: u64,
    /// Memory of a VM in MiB; 0 for the agent's default.
    #[arg(long, default_value_t = 0)]
    memory_mib: u32,
    /// Writes the figures to this file as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
}

impl Options {
    fn boot_limit(&self) -> Duration {
        Duration::from_secs(self.boot_limit_s)
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let options = Options::parse();
    match run::run(&options).await {
        Ok(report) if report.vms_failed == 0 => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}
