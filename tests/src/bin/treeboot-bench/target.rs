//! Our target beside `tgt`, with `iscsi-perf` as the client of both, in interleaved rounds; `iperf3` says what the loopback can carry.
//!
//! Both serve the same content from a warm page cache to the same client, one right after the other, so each round gives a pair. What
//! a server costs is its processor time for each request: on a machine that others use too, it is steadier than any rate.

mod idle;
mod load;
mod report;

use std::io::{IsTerminal as _, Write as _};
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use treeboot_tests::scratch::Scratch;
use treeboot_tests::tgt::Tgt;
use treeboot_tests::wait::wait_until;

use self::load::{Iperf, Load, Sample};
use self::report::{Conditions, Report};

/// From `treeboot serve` to its first answer.
const READY_WITHIN: Duration = Duration::from_secs(10);
const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// What to measure.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Options {
    /// Measured rounds; each runs every load against both targets.
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Seconds of one run of a client.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=60))]
    seconds: u32,
    /// Size of the disk that both serve, in MiB.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(16..=65_536))]
    disk_mib: u32,
    /// Sessions that do nothing, whose memory is measured; 0: none.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(..=4000))]
    idle_sessions: u32,
    /// Only the loads whose name holds this text.
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// Writes the figures to this file as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// What both targets did in one round under one load.
#[derive(Debug, Clone, Copy, serde::Serialize)]
struct Pair {
    treeboot: Sample,
    tgt: Sample,
}

/// A server under test.
struct Server {
    name: &'static str,
    pid: u32,
    url: String,
}

pub(crate) async fn run(options: &Options) -> Result<()> {
    // Both are built together, into one folder.
    let own = std::env::current_exe().context("this program does not know where it is")?;
    let treeboot = own.with_file_name("treeboot");
    if !treeboot.is_file() {
        bail!(
            "{} is not there; `cargo xtask bench target` builds it",
            treeboot.display()
        );
    }
    let scratch = Scratch::new(own.with_file_name("evidence").join("bench-target"))?;
    let loads: Vec<Load> = load::LOADS
        .into_iter()
        .filter(|load| load.name().contains(&options.only))
        .collect();
    if loads.is_empty() {
        let names: Vec<String> = load::LOADS.iter().map(Load::name).collect();
        bail!(
            "no load's name holds '{}'; there are: {}",
            options.only,
            names.join(", ")
        );
    }
    // Written, so that it is in the page cache; and no holes, because they would cost less than data.
    let disk = scratch.path().join("disk.raw");
    write_noise(&disk, u64::from(options.disk_mib) << 20)?;

    let idle = match options.idle_sessions {
        0 => None,
        sessions => {
            eprintln!("bench: {sessions} sessions that do nothing, with each target");
            Some(idle::measure(&scratch, &treeboot, &disk, sessions).await?)
        }
    };
    let (_serve, treeboot) = serve(&scratch, &treeboot, "treeboot", &disk).await?;
    let tgtd = Tgt::serve(&scratch, "tgt", LOOPBACK, &disk, false).await?;
    let tgt = Server {
        name: "tgt",
        pid: tgtd.pid(),
        url: tgtd.url(),
    };
    let iperf = Iperf::start(&scratch, LOOPBACK).await?;

    let progress = Progress::new(options.rounds, loads.len(), options.seconds);
    for server in [&treeboot, &tgt] {
        progress.say(&format!("warm-up of {}", server.name));
        load::run(&scratch, server, &loads[0], 1).await?;
    }
    let mut pairs = vec![Vec::new(); loads.len()];
    let mut loopback = Vec::new();
    for round in 0..options.rounds {
        for (load, pairs) in loads.iter().zip(&mut pairs) {
            // By turns who is first.
            let order = if round % 2 == 0 {
                [&treeboot, &tgt]
            } else {
                [&tgt, &treeboot]
            };
            let mut samples = Vec::new();
            for server in order {
                progress.step(round, &format!("{}, {}", load.name(), server.name));
                samples.push(load::run(&scratch, server, load, options.seconds).await?);
            }
            if round % 2 == 1 {
                samples.reverse();
            }
            let [treeboot, tgt] = samples[..] else { continue };
            pairs.push(Pair { treeboot, tgt });
        }
        progress.step(round, "the loopback, iperf3");
        loopback.push(iperf.run(&scratch).await?);
        progress.round_done(round, &loads, &pairs);
    }
    progress.end();
    tgtd.kill()?;
    let conditions = Conditions::of(options)?;
    let report = Report::new(conditions, &loads, pairs, &loopback, idle)?;
    println!("{}", report.text());
    if let Some(file) = &options.json {
        let mut json = serde_json::to_string_pretty(&report)?;
        json.push('\n');
        std::fs::write(file, json).with_context(|| format!("could not write {}", file.display()))?;
    }
    scratch.pass();
    Ok(())
}

/// Fills a file with bytes that no file system can leave out.
fn write_noise(path: &Path, bytes: u64) -> Result<()> {
    let mut file = std::io::BufWriter::with_capacity(1 << 20, std::fs::File::create(path)?);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..bytes / 8 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        file.write_all(&state.to_le_bytes())?;
    }
    // On the disk too, so that no write-back runs beside the rounds.
    file.into_inner()
        .context("the disk could not be written")?
        .sync_all()?;
    Ok(())
}

/// Starts `treeboot serve` on a file.
async fn serve(
    scratch: &Scratch,
    program: &Path,
    name: &'static str,
    disk: &Path,
) -> Result<(Child, Server)> {
    let folder = scratch.path().join(name);
    std::fs::create_dir_all(&folder)?;
    let ready_file = folder.join("ready.json");
    let log = std::fs::File::create(folder.join("serve.log"))?;
    let mut child = scratch
        .command(program)
        .arg("serve")
        .arg(disk)
        .args(["--portal", "127.0.0.1:0", "--ready-file"])
        .arg(&ready_file)
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("could not start treeboot serve")?;
    let url = wait_until(READY_WITHIN, "treeboot serve to be ready", async || {
        if let Some(status) = child.try_wait()? {
            bail!("treeboot serve ended with {status}");
        }
        let Ok(json) = std::fs::read(&ready_file) else {
            return Ok(None);
        };
        let value: serde_json::Value = serde_json::from_slice(&json)?;
        let url = value["urls"][0].as_str().context("a ready file without a URL")?;
        Ok(Some(url.to_owned()))
    })
    .await?;
    let pid = child.id();
    Ok((child, Server { name, pid, url }))
}

/// A bar on a terminal, a line for each round elsewhere.
struct Progress {
    bar: ProgressBar,
    rounds: u32,
    terminal: bool,
}

impl Progress {
    fn new(rounds: u32, loads: usize, seconds: u32) -> Self {
        let steps = u64::from(rounds) * (2 * loads as u64 + 1);
        let terminal = std::io::stderr().is_terminal();
        let bar = ProgressBar::new(steps);
        let style = "{bar:30} {pos}/{len}  {elapsed} of about {duration}  {wide_msg}";
        bar.set_style(ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()));
        if !terminal {
            eprintln!(
                "bench: {rounds} rounds of {loads} loads, about {} s",
                steps * u64::from(seconds)
            );
        }
        Self {
            bar,
            rounds,
            terminal,
        }
    }

    fn say(&self, what: &str) {
        self.bar.set_message(what.to_owned());
    }

    fn step(&self, round: u32, what: &str) {
        self.bar
            .set_message(format!("round {} of {}: {what}", round + 1, self.rounds));
        self.bar.inc(1);
    }

    fn round_done(&self, round: u32, loads: &[Load], pairs: &[Vec<Pair>]) {
        if self.terminal {
            return;
        }
        let ratio = |pairs: &Vec<Pair>| {
            pairs
                .last()
                .map_or(0.0, |pair| pair.treeboot.iops / pair.tgt.iops)
        };
        let ratios: Vec<String> = loads
            .iter()
            .zip(pairs)
            .map(|(load, pairs)| format!("{} {:.2}", load.name(), ratio(pairs)))
            .collect();
        eprintln!("bench: round {}, IOPS by tgt's: {}", round + 1, ratios.join(", "));
    }

    fn end(&self) {
        self.bar.finish_and_clear();
    }
}
