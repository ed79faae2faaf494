//! `cargo xtask lab`: builds what a lab of user-mode Linux hosts needs, then becomes the program `treeboot-lab` of the tests' crate.
//!
//! The development build serves, so that a lab costs no build that the tests do not need too; `--release` takes the other one.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, bail};

use crate::demo;
use crate::workspace;

/// What a lab needs from Debian.
pub(crate) const PACKAGES: &[&str] = &[
    "dmsetup",
    "e2fsprogs",
    "fio",
    "iproute2",
    "kmod",
    "libclang-dev",
    "libdevmapper-dev",
    "open-iscsi",
    "pkg-config",
    "user-mode-linux",
];

/// Most hosts that a lab holds; `treeboot-lab` says the same.
const MAX_HOSTS: i64 = 60;

/// What to do with the lab.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  cargo xtask lab up --hosts 6 --rate 1000
  cargo xtask lab shell h1
  cargo xtask lab shell h1 -- treeboot host list
  cargo xtask lab down

It needs root and no hypervisor. docs/lab.md says what a lab is made of.")]
pub(crate) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Starts a coordinator, an origin and hosts, and leaves them running
    #[command(
        after_help = "Example:\n  cargo xtask lab up\n  cargo xtask lab up --hosts 3 --plane kernel --rate 100"
    )]
    Up {
        /// Hosts besides the origin
        #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u16).range(1..=MAX_HOSTS))]
        hosts: u16,
        /// Speed of every link in Mbit/s, the origin's too [default: as fast as the machine]
        #[arg(long, value_name = "MBIT", value_parser = clap::value_parser!(u32).range(1..=100_000))]
        rate: Option<u32>,
        /// How blocks move on the hosts
        #[arg(long, value_enum, default_value_t = Plane::User)]
        plane: Plane,
        /// Memory of a host
        #[arg(long, value_name = "MIB", default_value_t = 160, value_parser = clap::value_parser!(u32).range(96..=16_384))]
        memory_mib: u32,
        /// Children a host, in trees of one stripe; without it two stripes
        #[arg(long, value_parser = clap::value_parser!(u32).range(1..=64))]
        fan_out: Option<u32>,
        /// Builds for release
        #[arg(long)]
        release: bool,
    },
    /// Runs the lab's tests, each in a lab of its own
    #[command(after_help = "Example:\n  cargo xtask lab test\n  cargo xtask lab test --power-cuts 50 power")]
    Test {
        /// How often the tests of power cuts kill a host
        #[arg(long, value_name = "N")]
        power_cuts: Option<u32>,
        /// The seed of what is random in them
        #[arg(long, value_name = "N")]
        seed: Option<u64>,
        /// Only tests whose names hold this
        name: Option<String>,
    },
    /// Ends everything and removes it; nothing to do is fine
    Down,
    /// A shell on a host, or a command; the programs are on its PATH
    #[command(
        after_help = "Example:\n  cargo xtask lab shell h1\n  cargo xtask lab shell h2 -- dmsetup table"
    )]
    Shell {
        /// h1, h2, ...
        host: String,
        /// A command to run instead of a shell
        #[arg(last = true)]
        command: Vec<String>,
    },
}

/// As the agent has it.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Plane {
    User,
    Kernel,
}

/// Does it.
///
/// # Errors
/// We are not root, something cannot be installed or built, or the lab said why.
pub(crate) fn run(args: &Args) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!(
            "a lab makes network namespaces, taps and mounts, and needs root; paste: sudo env \"PATH=$PATH\" cargo xtask lab …"
        );
    }
    match &args.verb {
        Verb::Up {
            hosts,
            rate,
            plane,
            memory_mib,
            fan_out,
            release,
        } => {
            crate::apt::ensure_packages(PACKAGES)?;
            let mut lab = program(*release, true)?;
            lab.arg("up")
                .arg("--state")
                .arg(state()?)
                .args(["--hosts", &hosts.to_string()])
                .args(["--memory-mib", &memory_mib.to_string()]);
            if let Some(fan_out) = fan_out {
                lab.args(["--fan-out", &fan_out.to_string()]);
            }
            lab.args([
                "--plane",
                match plane {
                    Plane::User => "user",
                    Plane::Kernel => "kernel",
                },
            ]);
            if let Some(rate) = rate {
                lab.args(["--rate", &rate.to_string()]);
            }
            demo::become_program(&mut lab)
        }
        Verb::Test {
            power_cuts,
            seed,
            name,
        } => test(*power_cuts, *seed, name.as_deref()),
        Verb::Down => {
            let mut lab = program(false, false)?;
            demo::become_program(lab.arg("down").arg("--state").arg(state()?))
        }
        Verb::Shell { host, command } => {
            let mut lab = program(false, false)?;
            lab.arg("shell").arg("--state").arg(state()?).arg(host);
            demo::become_program(lab.arg("--").args(command))
        }
    }
}

fn state() -> Result<PathBuf> {
    Ok(workspace::target_dir()?.join("lab"))
}

/// `treeboot-lab`, built with all that a lab runs, or as it was built before.
fn program(release: bool, build: bool) -> Result<Command> {
    let programs = |profile: &str| Ok::<_, anyhow::Error>(workspace::target_dir()?.join(profile));
    let profile = if release { "release" } else { "debug" };
    let mut folder = programs(profile)?;
    if !build {
        // Whichever built the lab that runs.
        if !folder.join("treeboot-lab").exists() {
            folder = programs("release")?;
        }
        if !folder.join("treeboot-lab").exists() {
            bail!("no lab was ever built here; `cargo xtask lab up` starts one");
        }
    } else {
        eprintln!("xtask: building the programs ({profile})");
        let mut cargo = workspace::cargo()?;
        cargo.args([
            "build",
            "--workspace",
            "--bins",
            "--locked",
            "--features",
            "kernel-plane",
        ]);
        if release {
            cargo.arg("--release");
        }
        workspace::run(&mut cargo)?;
    }
    let mut lab = Command::new(folder.join("treeboot-lab"));
    lab.env(demo::BIN_DIR, &folder);
    Ok(lab)
}

fn test(power_cuts: Option<u32>, seed: Option<u64>, name: Option<&str>) -> Result<()> {
    crate::apt::ensure_packages(PACKAGES)?;
    eprintln!("xtask: building the programs (debug)");
    workspace::run(workspace::cargo()?.args([
        "build",
        "--workspace",
        "--all-targets",
        "--locked",
        "--features",
        "kernel-plane",
    ]))?;
    let mut test = workspace::cargo()?;
    test.args([
        "test",
        "--workspace",
        "--locked",
        "--features",
        "kernel-plane",
        "--test",
        "lab",
    ])
    .arg("--")
    .args(["--nocapture", "--include-ignored"])
    .args(name)
    // A test that cannot run has failed.
    .env("CI", "1")
    .env(demo::BIN_DIR, workspace::target_dir()?.join("debug"));
    if let Some(power_cuts) = power_cuts {
        test.env("TREEBOOT_POWER_CUTS", power_cuts.to_string());
    }
    if let Some(seed) = seed {
        test.env("TREEBOOT_SEED", seed.to_string());
    }
    workspace::run(&mut test)
}
