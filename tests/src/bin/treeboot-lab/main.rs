//! `treeboot-lab`, which `cargo xtask lab` builds and becomes: starts a lab of user-mode Linux hosts and leaves it running, gives a shell on
//! its hosts, ends it. The same program runs inside of the hosts, where it takes commands and writes disks for the tests.

#![forbid(unsafe_code)]

mod shell;
mod up;

use std::fs::File;
use std::io::{self, Read as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Parser;
use treeboot_tests::image::Pattern;
use treeboot_tests::lab::{self, inside, model};

/// A lab of user-mode Linux hosts.
#[derive(Debug, Parser)]
#[command(name = "treeboot-lab", disable_help_subcommand = true)]
struct Options {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Starts coordinator, origin and hosts, and leaves them running
    Up(up::Options),
    /// A shell, or a command, on a host
    Shell(shell::Options),
    /// Ends everything and removes it
    Down {
        /// The lab's folder
        #[arg(long)]
        state: PathBuf,
    },
    /// Inside of a host: takes commands
    #[command(hide = true)]
    Serve {
        /// Where
        address: SocketAddr,
    },
    /// Inside of a host: writes a disk until it is ended, and says what was flushed
    #[command(hide = true)]
    Write {
        /// The block device
        device: PathBuf,
        #[arg(long)]
        seed: u64,
        #[arg(long)]
        round: u32,
        /// How many blocks of 4 KiB
        #[arg(long)]
        blocks: u64,
    },
    /// Inside of a host: reads a disk once
    #[command(hide = true)]
    Read {
        /// The block device
        device: PathBuf,
        /// Bytes a second, at most
        #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
        rate: u64,
    },
    /// Inside of a host: says of which write each block of a disk is
    #[command(hide = true)]
    Stamps {
        /// The block device
        device: PathBuf,
        #[arg(long)]
        blocks: u64,
        /// The seed of the image's pattern
        #[arg(long)]
        image_seed: u64,
        /// The image's length
        #[arg(long)]
        image_bytes: u64,
    },
}

fn main() -> ExitCode {
    match run(Options::parse().verb) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> Result<ExitCode> {
    match verb {
        Verb::Up(options) => up::run(&options)?,
        Verb::Shell(options) => return shell::run(&options),
        Verb::Down { state } => {
            if lab::down(&state)? {
                eprintln!("lab: all hosts ended, all files removed");
            } else {
                eprintln!("lab: there is none");
            }
        }
        Verb::Serve { address } => inside::serve(address)?,
        Verb::Write {
            device,
            seed,
            round,
            blocks,
        } => {
            let disk = File::options()
                .write(true)
                .open(&device)
                .with_context(|| format!("cannot open {}", device.display()))?;
            model::write(&disk, seed, round, blocks, &mut io::stdout())?;
        }
        Verb::Read { device, rate } => read_paced(&device, rate)?,
        Verb::Stamps {
            device,
            blocks,
            image_seed,
            image_bytes,
        } => {
            let disk = File::open(&device).with_context(|| format!("cannot open {}", device.display()))?;
            let image = Pattern {
                seed: image_seed,
                bytes: image_bytes,
            };
            let stamps = model::read(&disk, blocks, image)?;
            let lines: Vec<String> = stamps.iter().map(ToString::to_string).collect();
            println!("{}", lines.join("\n"));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Reads a device to its end, no faster than so many bytes a second.
#[expect(
    clippy::disallowed_methods,
    reason = "a pace is a sleep; nothing else is waited for"
)]
fn read_paced(device: &Path, rate: u64) -> Result<()> {
    let mut disk = File::open(device).with_context(|| format!("cannot open {}", device.display()))?;
    let mut buffer = vec![0; 64 * 1024];
    let (began, mut bytes) = (Instant::now(), 0_u64);
    loop {
        let count = disk
            .read(&mut buffer)
            .with_context(|| format!("cannot read {} at {bytes}", device.display()))?;
        if count == 0 {
            return Ok(());
        }
        bytes += count as u64;
        let due = Duration::from_secs_f64(bytes as f64 / rate as f64);
        std::thread::sleep(due.saturating_sub(began.elapsed()));
    }
}
