//! What all processes of ours on one host hold in memory: with nothing, with running guests, and with many VMs that do nothing.
//!
//! The guests are real ones under QEMU, each of which writes to its disk; QEMU's own memory is not ours. A VM that does nothing is a disk whose
//! front end is logged in and has read one block.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::unistd::Pid;
use serde::Serialize;
use treeboot_proto::v1;
use treeboot_tests::cluster::{Cluster, Plan};
use treeboot_tests::daemon::Daemon;
use treeboot_tests::measure::newest;
use treeboot_tests::reader::log_in;
use treeboot_tests::table::draw;
use treeboot_tests::{fleet, guest};

const IMAGE: &str = "busybox";
/// Guests that boot at once: more of them only wait for each other.
const BOOTS: usize = 4;
/// What each guest writes and reads back.
const WRITTEN: &str = "write_mb=4";

/// What to measure.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Options {
    /// Guests that run.
    #[arg(long, default_value_t = 50)]
    running: u32,
    /// VMs that do nothing, beside them.
    #[arg(long, default_value_t = 500)]
    idle: u32,
    /// One VM has a block device, so that the host has a holder process (root).
    #[arg(long)]
    device: bool,
    /// Writes the figures to this file as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct Report {
    running: u32,
    idle: u32,
    /// How many processes of ours the host has.
    processes: usize,
    /// Resident, in bytes.
    with_nothing: u64,
    /// To reach with 50: 100,000,000.
    with_running: u64,
    with_idle_too: u64,
}

pub(crate) async fn run(options: &Options) -> Result<()> {
    let file =
        guest::busybox().context("there is no busybox guest; build it with: cargo xtask guest busybox")?;
    let plan = Plan {
        hosts: 1,
        secure: true,
        ..Plan::default()
    };
    let cluster = Cluster::start("bench-memory", &plan).await?;
    cluster.import(&file, IMAGE).await?;
    let host = &cluster.hosts[0];
    let create = v1::CreateRequest {
        vm: "first".into(),
        image: Some(newest(IMAGE)),
        device: options.device,
        limit_bytes: None,
    };
    host.agent().await?.create(create).await?;
    let (with_nothing, _) = of_host(&cluster, host)?;
    let orders: Vec<_> = (0..options.running)
        .map(|n| guest::order_with_jobs(&format!("runs-{n}"), IMAGE, &[WRITTEN, "verify_mb=4"]))
        .collect();
    for orders in orders.chunks(BOOTS) {
        let boots = orders.iter().map(|order| fleet::boot(host, order));
        futures_util::future::try_join_all(boots).await?;
        eprintln!("bench: {} runs", orders[orders.len() - 1].vm);
    }
    let (with_running, processes) = of_host(&cluster, host)?;
    let mut sessions = Vec::new();
    for n in 0..options.idle {
        let (session, lun) = log_in(host, IMAGE, &format!("idle-{n}")).await?;
        session.read(lun, 0, 4096).await?;
        sessions.push(session);
    }
    let (with_idle_too, _) = of_host(&cluster, host)?;
    let report = Report {
        running: options.running,
        idle: options.idle,
        processes,
        with_nothing,
        with_running,
        with_idle_too,
    };
    let row = |what: String, bytes: u64, goal: &str| {
        vec![what, format!("{:.1}", bytes as f64 / 1e6), goal.to_owned()]
    };
    let rows = [
        row("one disk, MB".into(), report.with_nothing, ""),
        row(
            format!("{} guests run, MB", report.running),
            report.with_running,
            "100",
        ),
        row(
            format!("and {} VMs do nothing, MB", report.idle),
            report.with_idle_too,
            "",
        ),
    ];
    println!("{}", draw(&["", "resident", "goal"], &rows));
    if let Some(path) = &options.json {
        std::fs::write(path, serde_json::to_vec_pretty(&report)?)?;
    }
    // Their sessions before their agent.
    for session in sessions {
        let _ = tokio::time::timeout(Duration::from_secs(5), session.close()).await;
    }
    // A block device does not go with the agent's process.
    let destroy = v1::DestroyRequest {
        vm: "first".into(),
        instance_only: true,
    };
    host.agent().await?.destroy(destroy).await?;
    cluster.pass();
    Ok(())
}

/// Resident memory in bytes of the host's agent and of holders, and how many processes they are.
fn of_host(cluster: &Cluster, host: &Daemon) -> Result<(u64, usize)> {
    let agent = host.pid().context("the agent does not run")?;
    let mut pids = vec![Pid::from_raw(agent.try_into()?)];
    pids.extend(cluster.scratch().processes().into_iter().filter(|pid| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).any(|word| word == b"holder")
    }));
    let resident: Result<Vec<u64>> = pids.iter().map(|pid| resident(*pid)).collect();
    Ok((resident?.iter().sum(), pids.len()))
}

/// Resident memory of a process, in bytes.
pub(crate) fn resident(pid: Pid) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    Ok(kib.context("no VmRSS")?.parse::<u64>()? * 1024)
}
