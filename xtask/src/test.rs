//! `cargo xtask test`: everything that must hold before a change goes in, in the order of how fast it can fail, but for clippy and
//! the simulation, which run beside the other tests.
//!
//! One profile and one set of features for all of it, so that nothing is compiled twice: `cargo build --all-targets` makes
//! what `cargo test` then runs, and the daemons that its real-process tests start.

use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};

use crate::demo;
use crate::guest::{self, Kind};
use crate::workspace;

/// What the tests need from Debian.
const PACKAGES: &[&str] = &[
    "cryptsetup-bin",
    "e2fsprogs",
    "dmsetup",
    "fio",
    "iproute2",
    "kmod",
    "libclang-dev",
    "libdevmapper-dev",
    "libfaketime",
    "libiscsi-bin",
    "open-iscsi",
    "pkg-config",
    "qemu-block-extra",
    "qemu-system-x86",
    "qemu-utils",
    "shellcheck",
    "tgt",
    "user-mode-linux",
    "vagrant",
];

/// Everything is built once, with the kernel plane in it; the default features are checked beside it.
const FEATURES: [&str; 2] = ["--features", "kernel-plane"];

/// Tests that compute all the time, and run beside the others.
const SIMULATION: [&str; 2] = ["no_law_is_broken_in_any_seed", "every_planted_bug_is_found"];

/// For the simulation's seeds, where all other tests come first.
const SIMULATION_SECONDS: &str = "900";

/// Options of `cargo xtask test`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Leaves out rustfmt and clippy.
    #[arg(long)]
    no_lint: bool,
    /// Handed on to `cargo test`, for instance `-p treeboot-block` or `-- cache`.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    cargo_args: Vec<String>,
}

/// Runs the tests; `ci` makes a skipped test a failure.
///
/// # Errors
/// The first step that failed.
pub(crate) fn run(args: &Args, ci: bool) -> Result<()> {
    let began = Instant::now();
    let say = |what: &str| eprintln!("xtask: {:>4} s  {what}", began.elapsed().as_secs());

    if !args.no_lint {
        components()?;
        say("cargo fmt --check");
        workspace::run(workspace::cargo()?.args(["fmt", "--all", "--", "--check"]))
            .context("`cargo fmt` mends it")?;
    }
    say("Debian packages");
    crate::apt::ensure_packages(PACKAGES)?;
    say("busybox guest");
    let busybox = guest::ensure(Kind::Busybox)?;
    say("cargo build");
    workspace::run(
        workspace::cargo()?
            .args(["build", "--workspace", "--all-targets", "--locked"])
            .args(FEATURES),
    )?;
    // Tests mostly wait; what they leave of the processor is enough for the rest.
    let whole = args.cargo_args.is_empty();
    let (lints, simulation) = (!args.no_lint, whole);
    let beside = std::thread::spawn(move || beside(lints, simulation));
    say("cargo test, and beside it clippy and the simulation");
    let mut test = workspace::cargo()?;
    // All that fails, not the first alone. `--all-targets` leaves out only doctests: examples live in `examples/`.
    test.args([
        "test",
        "--workspace",
        "--all-targets",
        "--locked",
        "--no-fail-fast",
    ])
    .args(FEATURES)
    .args(&args.cargo_args)
    .env(demo::BIN_DIR, workspace::target_dir()?.join("debug"))
    .env("TREEBOOT_GUEST_BUSYBOX", busybox);
    if ci {
        // The same random cases in every run: a change is judged by what it does. Runs by hand draw new ones.
        test.env("CI", "1").env("PROPTEST_RNG_SEED", "20261121");
    }
    if whole {
        test.arg("--");
        for name in SIMULATION {
            test.args(["--skip", name]);
        }
    }
    // Nothing is printed after this where all is well: whoever reads the log finds cargo's own results at its end.
    let tested = workspace::run(&mut test);
    let beside = beside
        .join()
        .unwrap_or_else(|_| bail!("what runs beside the tests panicked"));
    tested.and(beside)
}

/// What computes, and waits for nothing, at the lowest priority.
fn beside(lints: bool, simulation: bool) -> Result<()> {
    let told = |result: Result<()>| {
        if let Err(error) = &result {
            eprintln!("xtask: {error:#}");
        }
        result
    };
    let linted = if lints { told(lint()) } else { Ok(()) };
    let simulated = if simulation { told(simulate()) } else { Ok(()) };
    linted.and(simulated)
}

/// The simulation's long tests, whose time limit is for a machine of their own.
fn simulate() -> Result<()> {
    let mut test = workspace::patient_cargo()?;
    test.args(["test", "--workspace", "--locked", "--test", "simulation"])
        .args(FEATURES)
        // How many seeds it came to.
        .args(["--", "--nocapture"])
        .args(SIMULATION)
        .env("TREEBOOT_SIM_SECONDS", SIMULATION_SECONDS);
    let output = test.output().context("could not start the simulation")?;
    let words = String::from_utf8_lossy(&output.stdout);
    println!("{words}");
    if !output.status.success() {
        bail!("the simulation: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// clippy, of everything with the kernel plane, and of what is built by default. In a folder of its own: cargo's lock on the other one would
/// have the tests wait.
fn lint() -> Result<()> {
    let target = workspace::target_dir()?.join("lints");
    let everything = ["--all-targets", FEATURES[0], FEATURES[1]];
    for chosen in [&everything[..], &[]] {
        let mut clippy = workspace::patient_cargo()?;
        clippy
            .args(["clippy", "--workspace", "--locked", "--quiet"])
            .args(chosen)
            .args(["--", "-D", "warnings"])
            .env("CARGO_TARGET_DIR", &target);
        let output = clippy.output().context("could not start clippy")?;
        if !output.status.success() {
            bail!("clippy: {}", String::from_utf8_lossy(&output.stderr));
        }
    }
    Ok(())
}

/// rustfmt and clippy, which a minimal toolchain leaves out.
fn components() -> Result<()> {
    for (subcommand, component) in [("fmt", "rustfmt"), ("clippy", "clippy")] {
        let there = workspace::cargo()?
            .args([subcommand, "--version"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()?
            .success();
        if !there {
            workspace::run(std::process::Command::new("rustup").args(["component", "add", component]))
                .with_context(|| format!("this toolchain has no {component}"))?;
        }
    }
    Ok(())
}
