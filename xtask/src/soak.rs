//! `cargo xtask soak`: what only time finds. Each fuzz target under libFuzzer, then the oracle of the target's data, then the
//! simulation, then the verbs against a model, then the coordinator killed at every write of its record, one after another, so that they do not take each other's processor.
//!
//! libFuzzer needs flags that stable Rust keeps to itself; `RUSTC_BOOTSTRAP=1` lends them to this one build, so that
//! nobody needs a second toolchain. Our crates have no `unsafe` of their own to sanitise, so no sanitizer is linked.

mod kernel;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::workspace;

/// The fuzz targets, as in `fuzz/Cargo.toml`.
const TARGETS: &[&str] = &["pdu", "login", "cdb", "session", "dm"];

/// Not fuzz targets: faults of the kernel plane, deaths below a guest, and agents killed at each step of each verb. They need root, so they run only where they are asked for.
const KERNEL: &str = "kernel";
const ENDURE: &str = "endure";
const STEPS: &str = "steps";

/// The longest input; a session of some dozen PDUs.
const LONGEST_BYTES: u32 = 4096;
/// An input that takes longer hangs.
const HANG_S: u32 = 25;
/// A process that holds more leaks, or lets itself be filled.
const MEMORY_MB: u32 = 2048;

/// Options of `cargo xtask soak`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Minutes for each target, and for the oracle
    #[arg(long, default_value_t = 60)]
    minutes: u64,
    /// Seeds of the simulation
    #[arg(long, default_value_t = 100_000)]
    seeds: u64,
    /// Hosts of a simulated fleet
    #[arg(long, default_value_t = 200)]
    hosts: u64,
    /// Restarts of each process below a guest
    #[arg(long, default_value_t = 50)]
    restarts: u32,
    /// Kills of each process below a guest
    #[arg(long, default_value_t = 20)]
    kills: u32,
    /// Only these; 'oracle', 'sim', 'model' and 'writes' (once) are of them too [default: all], and, all root's and without a limit of time, 'steps' (once), 'endure' and 'kernel' (once) [default: not]
    #[arg(value_name = "TARGET", value_parser = targets())]
    only: Vec<String>,
}

fn targets() -> clap::builder::PossibleValuesParser {
    TARGETS
        .iter()
        .copied()
        .chain(["oracle", "sim", "model", "writes", STEPS, ENDURE, KERNEL])
        .collect::<Vec<_>>()
        .into()
}

/// What came of one of them.
struct Outcome {
    name: &'static str,
    seconds: u64,
    executions: Option<u64>,
    corpus: Option<usize>,
    /// What was found, or why it could not run.
    finding: Option<String>,
}

/// Runs them all; a finding in one does not keep the others from running.
///
/// # Errors
/// cargo-fuzz is missing, or something was found.
pub(crate) fn run(args: &Args) -> Result<()> {
    let wanted = |name: &str| args.only.is_empty() || args.only.iter().any(|only| only == name);
    let targets: Vec<_> = TARGETS.iter().copied().filter(|name| wanted(name)).collect();
    let limit = Duration::from_secs(args.minutes * 60);
    let logs = workspace::target_dir()?.join("soak");
    std::fs::create_dir_all(&logs).with_context(|| format!("cannot make {}", logs.display()))?;
    if !targets.is_empty() {
        has_cargo_fuzz()?;
    }
    let mut outcomes = Vec::new();
    for name in targets {
        begin(&format!("{name} for {} min", args.minutes), &logs, name);
        outcomes.push(fuzz(name, limit, &logs)?);
    }
    if wanted("oracle") {
        begin(&format!("oracle for {} min", args.minutes), &logs, "oracle");
        outcomes.push(oracle(limit, &logs)?);
    }
    if wanted("sim") {
        begin(&format!("{} seeds of the simulation", args.seeds), &logs, "sim");
        outcomes.push(sim(args, &logs)?);
    }
    if wanted("model") {
        begin(
            &format!("the model of the verbs for {} min", args.minutes),
            &logs,
            "model",
        );
        outcomes.push(model(limit, &logs)?);
    }
    if wanted("writes") {
        begin("the coordinator killed at every write, once", &logs, "writes");
        outcomes.push(writes(&logs)?);
    }
    if args.only.iter().any(|only| only == STEPS) {
        begin("agents killed at each step of each verb, once", &logs, STEPS);
        outcomes.push(steps(&logs)?);
    }
    if args.only.iter().any(|only| only == ENDURE) {
        begin("a guest at each front end while others die", &logs, ENDURE);
        outcomes.push(endure(args, &logs)?);
    }
    if args.only.iter().any(|only| only == KERNEL) {
        begin("kernel, once", &logs, KERNEL);
        outcomes.push(kernel::run(&logs)?);
    }
    println!("target     seconds   executions   corpus   found");
    for outcome in &outcomes {
        let shown = |number: Option<u64>| number.map_or_else(|| "-".to_owned(), |number| number.to_string());
        println!(
            "{:<8} {:>9} {:>12} {:>8}   {}",
            outcome.name,
            outcome.seconds,
            shown(outcome.executions),
            shown(outcome.corpus.map(|files| files as u64)),
            outcome.finding.as_deref().unwrap_or("nothing"),
        );
    }
    ensure!(
        outcomes.iter().all(|outcome| outcome.finding.is_none()),
        "the soak found something"
    );
    Ok(())
}

/// Says what runs now, and where to watch it.
fn begin(what: &str, logs: &Path, name: &str) {
    eprintln!("xtask: {what}; its log is {}", log_of(logs, name).display());
}

fn log_of(logs: &Path, name: &str) -> PathBuf {
    logs.join(format!("{name}.log"))
}

fn has_cargo_fuzz() -> Result<()> {
    let there = workspace::cargo()?
        .args(["fuzz", "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()?
        .success();
    if !there {
        bail!(
            "cargo-fuzz is missing; install it with: cargo install cargo-fuzz (it also needs a C++ compiler: apt-get install g++)"
        );
    }
    Ok(())
}

/// Runs a command with all its output in a log.
fn logged(command: &mut Command, log: &Path) -> Result<(bool, Duration, String)> {
    let file = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    let began = Instant::now();
    let status = command
        .stdout(file.try_clone()?)
        .stderr(file)
        .status()
        .with_context(|| format!("could not start {command:?}"))?;
    let text = std::fs::read(log).with_context(|| format!("cannot read {}", log.display()))?;
    let text = String::from_utf8_lossy(&text).into_owned();
    Ok((status.success(), began.elapsed(), text))
}

fn cargo_fuzz(verb: &str) -> Result<Command> {
    let mut cargo = workspace::cargo()?;
    cargo
        .env("RUSTC_BOOTSTRAP", "1")
        .args(["fuzz", verb, "--sanitizer", "none"]);
    Ok(cargo)
}

fn fuzz(name: &'static str, limit: Duration, logs: &Path) -> Result<Outcome> {
    let fuzz = workspace::root()?.join("fuzz");
    let (corpus, seeds) = (fuzz.join("corpus").join(name), fuzz.join("seeds").join(name));
    std::fs::create_dir_all(&corpus).with_context(|| format!("cannot make {}", corpus.display()))?;
    let kept = fuzz.join("kept").join(format!("{name}.tar.gz"));
    if kept.exists() {
        let mut unpack = Command::new("tar");
        unpack.arg("--skip-old-files").arg("-C").arg(&corpus).arg("-xzf");
        workspace::run(unpack.arg(&kept))?;
    }
    // Apart, so that building counts for nobody's time.
    workspace::run(cargo_fuzz("build")?.arg(name))?;
    let log = log_of(logs, name);
    let (well, took, text) = logged(
        // New inputs go to the first folder and stay there.
        cargo_fuzz("run")?
            .arg(name)
            .args([&corpus, &seeds])
            .arg("--")
            .args([
                format!("-max_total_time={}", limit.as_secs()),
                format!("-max_len={LONGEST_BYTES}"),
                format!("-timeout={HANG_S}"),
                format!("-rss_limit_mb={MEMORY_MB}"),
                "-print_final_stats=1".to_owned(),
            ]),
        &log,
    )?;
    let executions = text
        .lines()
        .find_map(|line| line.strip_prefix("stat::number_of_executed_units:"))
        .and_then(|number| number.trim().parse().ok());
    let artifact = text.lines().find_map(|line| {
        line.split_once("Test unit written to ")
            .map(|(_, path)| path.to_owned())
    });
    let finding = match (well, artifact) {
        (true, _) => None,
        (false, Some(input)) => Some(input),
        (false, None) => Some(format!("it could not run, see {}", log.display())),
    };
    let files = std::fs::read_dir(&corpus).map(Iterator::count).ok();
    if finding.is_none() {
        keep(name, &[&corpus, &seeds], &kept)?;
    }
    Ok(Outcome {
        name,
        seconds: took.as_secs(),
        executions,
        corpus: files,
        finding,
    })
}

/// Packs the inputs that the coverage needs, to be committed: what one machine found, the next begins with.
fn keep(name: &str, inputs: &[&PathBuf], kept: &Path) -> Result<()> {
    let chosen = tempfile::tempdir().context("cannot make a folder for the chosen inputs")?;
    workspace::run(
        cargo_fuzz("run")?
            .arg(name)
            .arg(chosen.path())
            .args(inputs)
            .args(["--", "-merge=1", &format!("-max_len={LONGEST_BYTES}")])
            .stderr(Stdio::null()),
    )?;
    if let Some(folder) = kept.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    // Equal inputs, equal bytes.
    let mut pack = Command::new("tar");
    pack.args([
        "--sort=name",
        "--mtime=@0",
        "--owner=0",
        "--group=0",
        "--numeric-owner",
        "-C",
    ])
    .arg(chosen.path())
    .arg("-czf")
    .arg(kept)
    .arg(".");
    workspace::run(&mut pack)?;
    eprintln!(
        "xtask: {} holds what the coverage needs; commit it",
        kept.display()
    );
    Ok(())
}

fn oracle(limit: Duration, logs: &Path) -> Result<Outcome> {
    let mut cargo = workspace::cargo()?;
    cargo
        .args([
            "test",
            "--locked",
            "-p",
            "treeboot-iscsi",
            "--test",
            "oracle",
            "--",
            "--nocapture",
        ])
        .env("TREEBOOT_ORACLE_SECONDS", limit.as_secs().to_string())
        // Another one each time; the log holds it.
        .env("TREEBOOT_SEED", std::process::id().to_string());
    let log = log_of(logs, "oracle");
    let (well, took, text) = logged(&mut cargo, &log)?;
    let commands = text.lines().find_map(|line| {
        let (_, rest) = line.split_once(" rounds, ")?;
        rest.split_once(" commands")?.0.parse().ok()
    });
    Ok(Outcome {
        name: "oracle",
        seconds: took.as_secs(),
        executions: commands,
        corpus: None,
        finding: (!well).then(|| format!("see {}", log.display())),
    })
}

fn sim(args: &Args, logs: &Path) -> Result<Outcome> {
    let mut sim = Command::new(crate::sim::build()?);
    sim.args(["--seeds", &args.seeds.to_string()])
        .args(["--hosts", &args.hosts.to_string()])
        .arg("--json")
        .arg(logs.join("sim.json"));
    let log = log_of(logs, "sim");
    let (well, took, _) = logged(&mut sim, &log)?;
    Ok(Outcome {
        name: "sim",
        seconds: took.as_secs(),
        executions: Some(args.seeds),
        corpus: None,
        finding: (!well).then(|| format!("see {}", log.display())),
    })
}

/// A test of real daemons.
fn processes(arguments: &[&str]) -> Result<Command> {
    // The test starts the daemons as processes, which `cargo test` of one package does not build.
    workspace::run(workspace::cargo()?.args(["build", "--locked", "--workspace"]))?;
    let mut cargo = workspace::cargo()?;
    cargo
        .args([
            "test",
            "--locked",
            "-p",
            "treeboot-tests",
            "--test",
            "processes",
            "--",
            "--nocapture",
        ])
        .args(arguments)
        .env(crate::demo::BIN_DIR, workspace::target_dir()?.join("debug"));
    Ok(cargo)
}

/// Random verbs with kills against a model, one life after another.
fn model(limit: Duration, logs: &Path) -> Result<Outcome> {
    let mut cargo = processes(&["those_of_a_model"])?;
    cargo
        .env("TREEBOOT_MODEL_SECONDS", limit.as_secs().to_string())
        // Another one each time; the log holds it.
        .env("TREEBOOT_SEED", std::process::id().to_string());
    let log = log_of(logs, "model");
    let (well, took, text) = logged(&mut cargo, &log)?;
    let verbs = text.lines().find_map(|line| {
        line.strip_prefix("model: ")?
            .split_once(" verbs in ")?
            .0
            .parse()
            .ok()
    });
    Ok(Outcome {
        name: "model",
        seconds: took.as_secs(),
        executions: verbs,
        corpus: None,
        finding: (!well).then(|| format!("see {}", log.display())),
    })
}

/// The coordinator killed before, within and after each write of a scenario, with real agents.
fn writes(logs: &Path) -> Result<Outcome> {
    let mut cargo = processes(&["--ignored", "every_write"])?;
    let log = log_of(logs, "writes");
    let (well, took, text) = logged(&mut cargo, &log)?;
    let kills = text
        .lines()
        .find_map(|line| line.split_once(" kills in ")?.0.parse().ok());
    Ok(Outcome {
        name: "writes",
        seconds: took.as_secs(),
        executions: kills,
        corpus: None,
        finding: (!well).then(|| format!("see {}", log.display())),
    })
}

/// Agents killed before and after each step of each verb of the user plane; prints a line for each verb.
fn steps(logs: &Path) -> Result<Outcome> {
    let mut cargo = processes(&["killed_at_any_step"])?;
    cargo.env("TREEBOOT_STEPS", "all");
    let log = log_of(logs, STEPS);
    let (well, took, text) = logged(&mut cargo, &log)?;
    for line in text.lines().filter(|line| line.contains(" kills")) {
        println!("{line}");
    }
    let kills = text
        .lines()
        .find_map(|line| line.strip_prefix("steps: ")?.split_once(" kills")?.0.parse().ok());
    let skipped = text.contains("SKIPPED");
    Ok(Outcome {
        name: STEPS,
        seconds: took.as_secs(),
        executions: kills,
        corpus: None,
        finding: (!well || skipped).then(|| format!("see {}", log.display())),
    })
}

/// A guest at each front end while everything between it and its bytes is restarted and killed; prints the pauses that it saw.
fn endure(args: &Args, logs: &Path) -> Result<Outcome> {
    let guest = crate::guest::ensure(crate::guest::Kind::Busybox)?;
    let mut cargo = processes(&["--include-ignored", "--test-threads=1", "endure::"])?;
    cargo
        .env("TREEBOOT_ENDURE_RESTARTS", args.restarts.to_string())
        .env("TREEBOOT_ENDURE_KILLS", args.kills.to_string())
        .env("TREEBOOT_GUEST_BUSYBOX", guest);
    let log = log_of(logs, ENDURE);
    let (well, took, text) = logged(&mut cargo, &log)?;
    let mut rounds = 0;
    for row in text.lines().filter(|line| line.starts_with("| ")) {
        println!("{row}");
        let times = row
            .split('|')
            .nth(3)
            .and_then(|times| times.trim().parse::<u64>().ok());
        rounds += times.unwrap_or(0);
    }
    let skipped = text.contains("SKIPPED");
    Ok(Outcome {
        name: ENDURE,
        seconds: took.as_secs(),
        executions: Some(rounds),
        corpus: None,
        finding: (!well || skipped).then(|| format!("see {}", log.display())),
    })
}
