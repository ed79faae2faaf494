//! `cargo xtask sim`: builds `treeboot-sim` and becomes it.
//!
//! In the profile for development, in which the trees and the simulation are optimised anyway (`Cargo.toml`), so that a look at a seed
//! does not wait for a release build of everything.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::{demo, workspace};

/// Options of `cargo xtask sim`: those of the program.
#[derive(Debug, clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Args {
    /// Handed on, for instance `--seeds 1000 --hosts 200`; `--help` lists what there is
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "OPTIONS")]
    options: Vec<String>,
}

/// Builds and becomes the simulation.
///
/// # Errors
/// It cannot be built or started. It does not return otherwise.
pub(crate) fn run(args: &Args) -> Result<()> {
    demo::become_program(Command::new(build()?).args(&args.options))
}

/// Builds the program, with the bugs that it can plant.
///
/// # Errors
/// It cannot be built.
pub(crate) fn build() -> Result<PathBuf> {
    workspace::run(workspace::cargo()?.args([
        "build",
        "--quiet",
        "--locked",
        "-p",
        "treeboot-sim",
        "--features",
        "planted-bugs",
        "--bin",
        "treeboot-sim",
    ]))?;
    Ok(workspace::target_dir()?.join("debug").join("treeboot-sim"))
}
