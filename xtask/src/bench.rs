//! `cargo xtask bench`: builds for release, then becomes `treeboot-bench` of the tests' crate.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::demo;
use crate::guest::{self, Kind};

/// What is measured.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// QEMU's own time for a read during a boot: raw file, tgt, treeboot from a warm cache, in interleaved rounds
    Boot {
        /// The guest to boot
        #[arg(long, value_enum, default_value_t = Kind::Debian)]
        guest: Kind,
        /// Measured boots of each kind
        #[arg(long, default_value_t = 9)]
        rounds: u32,
        /// Writes the figures to this file as JSON
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// One coordinator and many hosts, each with a key, a certificate and a connection of its own, beside a bare service with the same TLS: until
    /// all have places, what keeping them costs, how soon orphans have parents, how soon a restart serves
    Coordinator {
        /// Hosts
        #[arg(long, default_value_t = 10_000)]
        hosts: u32,
        /// Hosts that connect or join at the same moment
        #[arg(long, default_value_t = 10_000)]
        at_once: u32,
        /// How long the fleet is watched while it only beats
        #[arg(long, default_value_t = 30)]
        seconds: u32,
        /// Writes the figures to this file as JSON
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// 1,024 disks by one call, what they take of disk and memory, and the way from `create` to the first byte
    Create {
        /// Measured rounds
        #[arg(long, default_value_t = 5)]
        rounds: u32,
        /// Disks of one call
        #[arg(long, default_value_t = 1024)]
        disks: u32,
        /// With an authority: TLS, and a secret for each disk
        #[arg(long)]
        secure: bool,
        /// Writes the figures to this file as JSON
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// Hosts on shaped links that read one image at the same moment: what each uploads, and how long it takes, by the shape of the
    /// trees. Needs root
    Links {
        /// Hosts, besides the origin
        #[arg(long, default_value_t = 8)]
        hosts: u32,
        /// The image, in MiB
        #[arg(long, default_value_t = 256)]
        mib: u32,
        /// Speed of every link, in Mbit/s, in each direction
        #[arg(long, default_value_t = 100)]
        mbit: u32,
        /// Rounds; each runs every policy once
        #[arg(long, default_value_t = 1)]
        rounds: u32,
        /// Writes the figures to this file as JSON
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// What our processes on one host hold in memory with guests that run, and with VMs that do nothing beside them
    Memory {
        /// Guests that run
        #[arg(long, default_value_t = 50)]
        running: u32,
        /// VMs that do nothing
        #[arg(long, default_value_t = 500)]
        idle: u32,
        /// One VM has a block device, so that the host has a holder process. Needs root
        #[arg(long)]
        device: bool,
        /// Writes the figures to this file as JSON
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// Our target and tgt with iscsi-perf as the client, in interleaved rounds: IOPS, MB/s, the server's processor time a read
    Target {
        /// Measured rounds; each runs every load against both targets
        #[arg(long, default_value_t = 9)]
        rounds: u32,
        /// Seconds of one run of a client
        #[arg(long, default_value_t = 2)]
        seconds: u32,
        /// Only the loads whose name holds this text, for instance "4K" or "1 client"
        #[arg(long, value_name = "TEXT")]
        only: Option<String>,
        /// Writes the figures to this file as JSON
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
}

/// What `bench target` needs from Debian: the peer, the client, and what says how much the loopback carries.
const TARGET_PACKAGES: &[&str] = &["iperf3", "libiscsi-bin", "tgt"];

/// Builds and becomes the bench.
///
/// # Errors
/// Something cannot be installed, built or started. It does not return otherwise.
pub(crate) fn run(args: &Args) -> Result<()> {
    let (mut bench, json) = match &args.what {
        What::Boot { guest, rounds, json } => (boot(*guest, *rounds)?, json),
        What::Coordinator {
            hosts,
            at_once,
            seconds,
            json,
        } => (coordinator([*hosts, *at_once, *seconds])?, json),
        What::Create {
            rounds,
            disks,
            secure,
            json,
        } => (create([*rounds, *disks], *secure)?, json),
        What::Links {
            hosts,
            mib,
            mbit,
            rounds,
            json,
        } => (links([*hosts, *mib, *mbit, *rounds])?, json),
        What::Memory {
            running,
            idle,
            device,
            json,
        } => (memory([*running, *idle], *device)?, json),
        What::Target {
            rounds,
            seconds,
            only,
            json,
        } => (target(*rounds, *seconds, only.as_deref())?, json),
    };
    if let Some(file) = json {
        bench.arg("--json").arg(file);
    }
    demo::become_program(&mut bench)
}

fn boot(guest: Kind, rounds: u32) -> Result<Command> {
    crate::apt::ensure_packages(demo::PACKAGES)?;
    crate::apt::ensure_packages(&["tgt"])?;
    let image = guest::ensure(guest)?;
    let programs = demo::build_release(&["--workspace", "--exclude", "xtask"])?;
    let mut bench = Command::new(programs.join("treeboot-bench"));
    bench
        .env(demo::BIN_DIR, &programs)
        .arg("boot")
        .arg("--image")
        .arg(image)
        .args(["--rounds", &rounds.to_string()])
        .args(["--ready-line", demo::GUEST_READY]);
    Ok(bench)
}

fn coordinator(numbers: [u32; 3]) -> Result<Command> {
    let programs = demo::build_release(&["--workspace", "--exclude", "xtask"])?;
    let mut bench = Command::new(programs.join("treeboot-bench"));
    bench.env(demo::BIN_DIR, &programs).arg("coordinator");
    for (option, number) in ["--hosts", "--at-once", "--seconds"].iter().zip(numbers) {
        bench.arg(option).arg(number.to_string());
    }
    Ok(bench)
}

fn create(numbers: [u32; 2], secure: bool) -> Result<Command> {
    let programs = demo::build_release(&["--workspace", "--exclude", "xtask"])?;
    let mut bench = Command::new(programs.join("treeboot-bench"));
    bench.env(demo::BIN_DIR, &programs).arg("create");
    for (option, number) in ["--rounds", "--disks"].iter().zip(numbers) {
        bench.arg(option).arg(number.to_string());
    }
    if secure {
        bench.arg("--secure");
    }
    Ok(bench)
}

fn memory(numbers: [u32; 2], device: bool) -> Result<Command> {
    crate::apt::ensure_packages(demo::PACKAGES)?;
    guest::ensure(Kind::Busybox)?;
    let programs = demo::build_release(&["--workspace", "--exclude", "xtask"])?;
    let mut bench = Command::new(programs.join("treeboot-bench"));
    bench.env(demo::BIN_DIR, &programs).arg("memory");
    for (option, number) in ["--running", "--idle"].iter().zip(numbers) {
        bench.arg(option).arg(number.to_string());
    }
    if device {
        bench.arg("--device");
    }
    Ok(bench)
}

fn links(numbers: [u32; 4]) -> Result<Command> {
    crate::apt::ensure_packages(&["iproute2"])?;
    let programs = demo::build_release(&["--workspace", "--exclude", "xtask"])?;
    let mut bench = Command::new(programs.join("treeboot-bench"));
    bench.env(demo::BIN_DIR, &programs).arg("links");
    for (option, number) in ["--hosts", "--mib", "--mbit", "--rounds"].iter().zip(numbers) {
        bench.arg(option).arg(number.to_string());
    }
    Ok(bench)
}

fn target(rounds: u32, seconds: u32, only: Option<&str>) -> Result<Command> {
    crate::apt::ensure_packages(TARGET_PACKAGES)?;
    let programs = demo::build_release(&["-p", "treeboot", "-p", "treeboot-tests"])?;
    let mut bench = Command::new(programs.join("treeboot-bench"));
    bench
        .arg("target")
        .args(["--rounds", &rounds.to_string()])
        .args(["--seconds", &seconds.to_string()]);
    if let Some(only) = only {
        bench.args(["--only", only]);
    }
    Ok(bench)
}
