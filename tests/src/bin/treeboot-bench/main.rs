//! `treeboot-bench`, which `cargo xtask bench` builds and becomes: our figures beside those of peers, in interleaved rounds.

#![forbid(unsafe_code)]

mod boot;
mod coordinator;
mod create;
mod links;
mod memory;
mod target;

use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Parser;
use treeboot_tests::scratch::{MARK, Scratch};

/// Measures treeboot beside its peers.
#[derive(Debug, Parser)]
#[command(name = "treeboot-bench")]
enum Bench {
    /// QEMU's own time for a read during a boot: raw file, tgt, treeboot from a warm cache.
    Boot(boot::Options),
    /// One coordinator and many hosts, each with a connection of its own, beside a bare service: burst, steady state, deaths, restart.
    Coordinator(coordinator::Options),
    /// The bare service.
    #[command(hide = true)]
    CoordinatorBare(coordinator::bare::Options),
    /// 1,024 disks by one call, and the way from `create` to the first byte.
    Create(create::Options),
    /// Hosts on shaped links that read one image at the same moment, for each shape of the trees: uploads and times.
    Links(links::Options),
    /// What our processes on a host hold in memory with 50 guests that run, and with 500 VMs that do nothing.
    Memory(memory::Options),
    /// Our target beside tgt, with iscsi-perf as the client: IOPS, MB/s, the server's processor time for each read.
    Target(target::Options),
}

fn main() -> ExitCode {
    let result = match std::env::var_os(MARK) {
        None => supervise(),
        Some(_) => work(Bench::parse()),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs this program once more as a process that belongs to a scratch folder, so that the guests that it starts itself end with it.
fn supervise() -> Result<ExitCode> {
    // Errors of the command line are told before anything is made.
    let _ = Bench::parse();
    let scratch = Scratch::new(std::env::temp_dir().join("treeboot.evidence"))?;
    let status = scratch
        .command(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .status()
        .context("could not start the bench")?;
    scratch.pass();
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn work(bench: Bench) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    match bench {
        Bench::Boot(options) => runtime.block_on(boot::run(&options))?,
        Bench::Coordinator(options) => runtime.block_on(coordinator::run(&options))?,
        Bench::CoordinatorBare(options) => runtime.block_on(coordinator::bare::run(&options))?,
        Bench::Create(options) => runtime.block_on(create::run(&options))?,
        // Its networks are entered thread by thread.
        Bench::Links(options) => links::run(&options)?,
        Bench::Memory(options) => runtime.block_on(memory::run(&options))?,
        Bench::Target(options) => runtime.block_on(target::run(&options))?,
    }
    Ok(ExitCode::SUCCESS)
}
