//! Disks made by one call, and the way from `create` to the first byte, on a host that has the image attached.
//!
//! The disk in use is what the file system says of the state directory before and after: journal, secrets, deltas, directory entries.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use futures_util::stream::{StreamExt as _, TryStreamExt as _};
use serde::Serialize;
use treeboot_proto::v1;
use treeboot_tests::cluster::{Cluster, Plan};
use treeboot_tests::daemon::Daemon;
use treeboot_tests::image::Pattern;
use treeboot_tests::measure::newest;
use treeboot_tests::reader::log_in_to;
use treeboot_tests::stats::Median;
use treeboot_tests::table::draw;

const IMAGE: &str = "bench";
/// Destroys under way at once.
const DESTROYS: usize = 64;

/// What to measure.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Options {
    /// Measured rounds.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Disks of one call.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=4096))]
    disks: u32,
    /// Single creates of each round, each with a login and a read of 4 KiB.
    #[arg(long, default_value_t = 20)]
    singles: u32,
    /// With an authority: TLS, and a secret for each disk.
    #[arg(long)]
    secure: bool,
    /// Writes the figures to this file as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct Round {
    /// From the call to its answer.
    many_ms: f64,
    /// Of disk, for each, before a first write.
    bytes_a_disk: f64,
    /// Resident memory of the agent, for each.
    memory_a_disk: f64,
}

#[derive(Debug, Serialize)]
struct Report {
    disks: u32,
    secure: bool,
    rounds: Vec<Round>,
    /// To reach: 1,000.
    many_ms: Median,
    /// To reach: 4,096.
    bytes_a_disk: Median,
    memory_a_disk: Median,
    /// From `create` to its answer.
    create_ms: Median,
    /// From `create` to the first byte: with login and read. To reach: 5.
    first_byte_ms: Median,
}

pub(crate) async fn run(options: &Options) -> Result<()> {
    let plan = Plan {
        hosts: 1,
        secure: options.secure,
        ..Plan::default()
    };
    let cluster = Cluster::start("bench-create", &plan).await?;
    let file = cluster.path().join("image.raw");
    let pattern = Pattern {
        seed: 1,
        bytes: 64 << 20,
    };
    pattern.write(&file)?;
    cluster.import(&file, IMAGE).await?;
    let host = &cluster.hosts[0];
    let attach = v1::AttachRequest {
        image: Some(newest(IMAGE)),
    };
    host.agent().await?.attach(attach).await?;
    let (mut rounds, mut creates, mut firsts) = (Vec::new(), Vec::new(), Vec::new());
    for number in 0..=options.rounds {
        let round = many(host, number, options.disks).await?;
        let singles = single(host, options.singles).await?;
        if number == 0 {
            continue;
        }
        eprintln!(
            "bench: {} disks in {:.0} ms, {:.0} bytes each",
            options.disks, round.many_ms, round.bytes_a_disk
        );
        rounds.push(round);
        creates.extend(singles.iter().map(|one| one.0.as_secs_f64() * 1e3));
        firsts.extend(singles.iter().map(|one| one.1.as_secs_f64() * 1e3));
    }
    let median = |sample: &dyn Fn(&Round) -> f64| {
        let sample: Vec<f64> = rounds.iter().map(sample).collect();
        Median::of(&sample).context("no rounds")
    };
    let report = Report {
        disks: options.disks,
        secure: options.secure,
        many_ms: median(&|round| round.many_ms)?,
        bytes_a_disk: median(&|round| round.bytes_a_disk)?,
        memory_a_disk: median(&|round| round.memory_a_disk)?,
        create_ms: Median::of(&creates).context("no creates")?,
        first_byte_ms: Median::of(&firsts).context("no creates")?,
        rounds,
    };
    let row = |what: &str, figure: &Median, goal: &str| {
        vec![what.to_owned(), format!("{:.2}", figure.median), goal.to_owned()]
    };
    let rows = [
        row("one call for all disks, ms", &report.many_ms, "1000"),
        row("disk in use a disk, bytes", &report.bytes_a_disk, "4096"),
        row("agent's memory a disk, bytes", &report.memory_a_disk, ""),
        row("create to its answer, ms", &report.create_ms, ""),
        row("create to the first byte, ms", &report.first_byte_ms, "5"),
    ];
    println!("{}", draw(&["", "median", "goal"], &rows));
    if let Some(path) = &options.json {
        std::fs::write(path, serde_json::to_vec_pretty(&report)?)?;
    }
    cluster.pass();
    Ok(())
}

async fn many(host: &Daemon, round: u32, disks: u32) -> Result<Round> {
    let state = host.folder().join("state");
    let before = (used(&state)?, resident(host)?);
    let vms: Vec<String> = (0..disks).map(|n| format!("r{round}-{n}")).collect();
    let request = v1::CreateManyRequest {
        vms: vms.clone(),
        image: Some(newest(IMAGE)),
        device: false,
        limit_bytes: None,
    };
    let mut agent = host.agent().await?;
    let began = Instant::now();
    let answer = agent.create_many(request).await?.into_inner();
    let took = began.elapsed();
    if let Some(failed) = answer.created.iter().find(|created| created.code != 0) {
        bail!("{}: {}", failed.vm, failed.error);
    }
    let after = (used(&state)?, resident(host)?);
    futures_util::stream::iter(vms)
        .map(|vm| {
            let mut agent = agent.clone();
            async move {
                let request = v1::DestroyRequest {
                    vm,
                    instance_only: true,
                };
                agent.destroy(request).await
            }
        })
        .buffer_unordered(DESTROYS)
        .try_for_each(|_| async { Ok(()) })
        .await?;
    Ok(Round {
        many_ms: took.as_secs_f64() * 1e3,
        bytes_a_disk: after.0.saturating_sub(before.0) as f64 / f64::from(disks),
        memory_a_disk: after.1.saturating_sub(before.1) as f64 / f64::from(disks),
    })
}

/// Each: until the answer, and until the first bytes of a new disk are read.
async fn single(host: &Daemon, count: u32) -> Result<Vec<(Duration, Duration)>> {
    let mut took = Vec::new();
    let mut agent = host.agent().await?;
    for number in 0..count {
        let vm = format!("single-{number}");
        let began = Instant::now();
        let request = v1::CreateRequest {
            vm: vm.clone(),
            image: Some(newest(IMAGE)),
            device: false,
            limit_bytes: None,
        };
        let answer = agent.create(request).await?.into_inner();
        let created = began.elapsed();
        let (session, lun) = log_in_to(answer, &vm).await?;
        session.read(lun, 0, 4096).await?;
        took.push((created, began.elapsed()));
        session.close().await;
        let request = v1::DestroyRequest {
            vm,
            instance_only: true,
        };
        agent.destroy(request).await?;
    }
    Ok(took)
}

/// Bytes of disk that a folder takes, its own entries too.
fn used(folder: &Path) -> Result<u64> {
    let mut bytes = std::fs::metadata(folder)?.blocks() * 512;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        // The cache is not the disks'.
        if entry.file_type()?.is_dir() && entry.file_name() != "cache" {
            bytes += used(&entry.path())?;
        } else {
            bytes += entry.metadata()?.blocks() * 512;
        }
    }
    Ok(bytes)
}

fn resident(daemon: &Daemon) -> Result<u64> {
    let pid = daemon.pid().context("the agent does not run")?;
    crate::memory::resident(nix::unistd::Pid::from_raw(pid.try_into()?))
}
