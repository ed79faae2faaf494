//! `treeboot-lab`, which `cargo xtask lab` builds and becomes: starts a lab of user-mode Linux hosts and leaves it running, gives a shell on
//! its hosts, ends it. The same program runs inside of the hosts, where it takes commands and writes disks for the tests.

#![forbid(unsafe_code)]

mod shell;
mod up;

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

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
