//! `cargo xtask demo`: builds what the demo needs (daemons, guest), then becomes the program `treeboot-demo` of the tests' crate.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::guest::{self, Kind};
use crate::workspace;

/// What running guests needs from Debian.
pub(crate) const PACKAGES: &[&str] = &["qemu-block-extra", "qemu-system-x86", "qemu-utils"];

/// The folder that holds the programs under test; `treeboot-tests` reads it.
pub(crate) const BIN_DIR: &str = "TREEBOOT_BIN_DIR";

/// What our guests print when they are up (`docs/guests.md`).
pub(crate) const GUEST_READY: &str = " is up, boot ";

/// Options of `cargo xtask demo`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  cargo xtask demo\n  cargo xtask demo --hosts 15 --guest busybox --json demo.json"
)]
pub(crate) struct Args {
    /// Hosts besides the origin; every second one, from the deepest upwards, has VMs
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u16).range(1..=200))]
    hosts: u16,
    /// VMs on each host that has VMs
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=100))]
    vms_per_host: u16,
    /// A disk image of your own (raw, qcow2), which boots through a BIOS and talks on its serial console
    #[arg(long, value_name = "FILE", conflicts_with = "guest")]
    image: Option<PathBuf>,
    /// The guest to build and boot
    #[arg(long, value_enum, default_value_t = Kind::Debian)]
    guest: Kind,
    /// The text on the serial console that says a VM is up [default: what the guest prints, else login:]
    #[arg(long, value_name = "TEXT")]
    ready_line: Option<String>,
    /// For how many seconds a VM may take to be up
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    boot_limit_s: u64,
    /// Memory of a VM in MiB [default: what the guest needs]
    #[arg(long, value_name = "MIB")]
    memory_mib: Option<u32>,
    /// Writes the figures to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Builds and becomes the demo.
///
/// # Errors
/// Something cannot be installed, built or started. It does not return otherwise.
pub(crate) fn run(args: &Args) -> Result<()> {
    crate::apt::ensure_packages(PACKAGES)?;
    let (image, name) = match &args.image {
        Some(file) => (std::path::absolute(file)?, "own image"),
        None => (guest::ensure(args.guest)?, args.guest.name()),
    };
    let programs = build_release(&["--workspace", "--exclude", "xtask", "--exclude", "treeboot-sim"])?;
    let mut demo = Command::new(programs.join("treeboot-demo"));
    demo.env(BIN_DIR, &programs)
        .arg("--hosts")
        .arg(args.hosts.to_string())
        .arg("--vms-per-host")
        .arg(args.vms_per_host.to_string())
        .arg("--image")
        .arg(image)
        .args(["--guest", name])
        .arg("--boot-limit-s")
        .arg(args.boot_limit_s.to_string());
    match (&args.ready_line, &args.image) {
        (Some(line), _) => demo.args(["--ready-line", line]),
        (None, None) => demo.args(["--ready-line", GUEST_READY]),
        (None, Some(_)) => &mut demo,
    };
    let busybox = args.image.is_none() && args.guest == Kind::Busybox;
    match (args.memory_mib, busybox) {
        (Some(memory_mib), _) => demo.args(["--memory-mib", &memory_mib.to_string()]),
        (None, true) => demo.args(["--memory-mib", "96"]),
        (None, false) => &mut demo,
    };
    if let Some(file) = &args.json {
        demo.arg("--json").arg(file);
    }
    become_program(&mut demo)
}

/// Builds the programs of the packages that cargo's arguments name, for release; gives their folder.
///
/// # Errors
/// The build failed.
pub(crate) fn build_release(packages: &[&str]) -> Result<PathBuf> {
    eprintln!("xtask: building the programs for release");
    workspace::run(
        workspace::cargo()?
            .args(["build", "--release", "--bins", "--locked"])
            .args(packages),
    )?;
    Ok(workspace::target_dir()?.join("release"))
}

/// Replaces xtask by the program, so that Ctrl-C and the exit code are between a person and it.
///
/// # Errors
/// It could not be started. It does not return otherwise.
pub(crate) fn become_program(command: &mut Command) -> Result<()> {
    let error = command.exec();
    let program = Path::new(command.get_program()).display().to_string();
    Err(error).with_context(|| format!("could not start {program}"))
}
