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
}

/// Builds and becomes the bench.
///
/// # Errors
/// Something cannot be installed, built or started. It does not return otherwise.
pub(crate) fn run(args: &Args) -> Result<()> {
    let What::Boot { guest, rounds, json } = &args.what;
    crate::apt::ensure_packages(demo::PACKAGES)?;
    crate::apt::ensure_packages(&["tgt"])?;
    let image = guest::ensure(*guest)?;
    let programs = demo::build_release()?;
    let mut bench = Command::new(programs.join("treeboot-bench"));
    bench
        .env(demo::BIN_DIR, &programs)
        .arg("boot")
        .arg("--image")
        .arg(image)
        .args(["--rounds", &rounds.to_string()])
        .args(["--ready-line", demo::GUEST_READY]);
    if let Some(file) = json {
        bench.arg("--json").arg(file);
    }
    demo::become_program(&mut bench)
}
