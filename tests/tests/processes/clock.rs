//! A clock that jumps: the time of day is set forward and back by years under a coordinator and its agents, and nobody notices.
//!
//! libfaketime stands before the C library of each daemon and shifts what it says the time of day is, by what a file says at that moment;
//! the monotonic clock stays as it is. What a jump does to certificates and tokens stands in `docs/identity.md`.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use treeboot_proto::v1;
use treeboot_tests::cluster::{Cluster, Plan};
use treeboot_tests::image::Pattern;
use treeboot_tests::need::{Need, library, require};
use treeboot_tests::reader::{log_in, read_whole};
use treeboot_tests::wait::wait_until;
use treeboot_tests::{fleet, measure};

use crate::support::{Machine, on_own_thread};

const IMAGE: &str = "pattern";
const PATTERN: Pattern = Pattern {
    seed: 67,
    bytes: 4 << 20,
};
const LEASE: Duration = Duration::from_secs(3);
const SOON: Duration = Duration::from_secs(60);
const LIBRARY: &str = "faketime/libfaketime.so.1";

/// Sets the daemons' time of day, as one step.
fn set(clock: &Path, shift: &str) -> Result<()> {
    let next = clock.with_extension("next");
    fs::write(&next, format!("{shift}\n"))?;
    Ok(fs::rename(next, clock)?)
}

/// Who reads from whom, in which stripe, and since which decision.
async fn trees(cluster: &Cluster) -> Result<(Vec<(u32, String, u32, Vec<String>)>, Option<v1::Epoch>)> {
    let tree = measure::tree(cluster, IMAGE).await?;
    ensure!(tree.nodes.iter().all(|node| node.connected), "{:?}", tree.nodes);
    let node = |node: v1::TreeNode| (node.stripe, node.host, node.depth, node.parents);
    let mut shape: Vec<_> = tree.nodes.into_iter().map(node).collect();
    shape.sort();
    Ok((shape, tree.epoch))
}

#[test]
fn a_clock_that_jumps_by_years_moves_nobody_and_ends_no_lease() -> Result<()> {
    if !require(&[Need::Library(LIBRARY, "libfaketime")]) {
        return Ok(());
    }
    on_own_thread(Machine::Shared, async move || {
        let plan = Plan {
            hosts: 3,
            ..Plan::default()
        };
        let plan = plan.with_leases(LEASE);
        let cluster = Cluster::prepare("clock", &plan)?;
        let clock = cluster.path().join("clock");
        set(&clock, "+0")?;
        let library = library(LIBRARY).context("libfaketime")?;
        for daemon in cluster.agents().chain([&cluster.coordinator]) {
            daemon.set_env("LD_PRELOAD", &library.to_string_lossy());
            daemon.set_env("FAKETIME_TIMESTAMP_FILE", &clock.to_string_lossy());
            daemon.set_env("FAKETIME_NO_CACHE", "1");
            daemon.set_env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        }
        cluster.coordinator.start(cluster.scratch()).await?;
        cluster.start_agents().await?;
        let file = cluster.path().join("pattern.raw");
        PATTERN.write(&file)?;
        cluster.import(&file, IMAGE).await?;
        for host in &cluster.hosts {
            fleet::attach(host, IMAGE).await?;
        }
        let [h1, _, h3] = &cluster.hosts[..] else {
            bail!("three hosts");
        };
        let (session, lun) = log_in(h3, IMAGE, "reader").await?;
        let before = trees(&cluster).await?;
        for shift in ["+10y", "-10y", "+1d", "+0"] {
            set(&clock, shift)?;
            // That nothing happens shows only after the time in which it would: two leases, in which everything is read.
            let end = std::time::Instant::now() + 2 * LEASE;
            while std::time::Instant::now() < end {
                read_whole(&session, lun, PATTERN).await?;
                ensure!(
                    trees(&cluster).await? == before,
                    "it moved after a jump of {shift}"
                );
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        // A host that dies loses its place as ever.
        set(&clock, "-10y")?;
        h1.kill()?;
        wait_until(SOON, "the dead host's place to be gone", async || {
            let tree = measure::tree(&cluster, IMAGE).await?;
            let there = tree.nodes.iter().any(|node| node.host == h1.name());
            Ok((!there).then_some(()))
        })
        .await?;
        // The jumps were seen: what the log says of this is dated ten years before its beginning.
        let log = fs::read_to_string(cluster.coordinator.log_path())?;
        let year = |line: &str| line.get(..4).and_then(|year| year.parse::<u32>().ok());
        let years: Vec<u32> = log.lines().filter_map(year).collect();
        let (first, last) = (years.first().context("a dated line")?, years.last().unwrap_or(&0));
        ensure!(last + 9 <= *first, "the years of the log's lines: {years:?}");
        cluster.pass();
        Ok(())
    })
}
