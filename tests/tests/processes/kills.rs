//! The coordinator killed at one write of its record after another while hosts come, go, move and images change: what is on the disk is the
//! state before the write or the one after it, never a mixture, and reads through agents go on.
//!
//! `TREEBOOT_KILLS=N` says how many, `TREEBOOT_SEED` chooses others. The ignored test kills at *every* write, three times:
//! `cargo test -p treeboot-tests --test processes -- --ignored every_write`.

use std::cell::Cell;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use treeboot_coordinator::store::{SledStore, Store as _};
use treeboot_coordinator::tree::{Forest, Settings, Striped};
use treeboot_tests::cluster::{Cluster, Plan};
use treeboot_tests::daemon::Daemon;
use treeboot_tests::image::Pattern;
use treeboot_tests::reader::{log_in, read_whole};
use treeboot_tests::wait::wait_until;
use treeboot_tests::{fleet, measure};
use treeboot_types::{PathPolicy, Tick};

use crate::support::{Machine, on_own_thread_within};

const BASE: &str = "base";
const SECOND: &str = "second";
const PATTERN: Pattern = Pattern {
    seed: 53,
    bytes: 4 << 20,
};
/// In the ordinary run.
const KILLS: u32 = 24;
const SEED: u64 = 4;
/// For one step of the scenario, with all the coordinator's deaths in between.
const STEP_LIMIT: Duration = Duration::from_secs(120);
/// What one read may take. The coordinator is not asked for reads, so that its deaths must not show at all; a busy machine does.
const STALL_LIMIT: Duration = Duration::from_secs(10);

/// Before, within, after.
const MOMENTS: [&str; 3] = ["before", "within", "after"];

struct Dooms {
    random: u64,
    kills: Cell<u32>,
    limit: Option<u32>,
    /// Each write three times, in the order of [`MOMENTS`].
    every: bool,
}

impl Dooms {
    fn next(&mut self) -> u64 {
        // splitmix64.
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.random;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Which write of the next process, when, and how many microseconds into it.
    fn doom(&mut self) -> (u64, &'static str, u64) {
        if self.limit.is_some_and(|limit| self.kills.get() >= limit) {
            return (0, MOMENTS[0], 0);
        }
        let microseconds = self.next() % 400;
        if self.every {
            // The first write of a process is that of its start; each later one is met three times, and passed with the third.
            let moment = MOMENTS[self.kills.get() as usize % MOMENTS.len()];
            return (2, moment, microseconds);
        }
        // Passing more often than not, so that the scenario comes to its end.
        let moment = ["before", "within", "within", "after", "after"][self.next() as usize % 5];
        (1 + self.next() % 4, moment, microseconds)
    }
}

/// The lines of a record, as the doomed coordinator leaves them.
fn lines(dir: &Path) -> Result<String> {
    let mut records = SledStore::open(dir)?.load()?;
    records.sort_by(|(a, _), (b, _)| a.cmp(b));
    let settings = Settings {
        policy: Arc::new(Striped { stripes: 2 }),
        active_parents: 1,
        path_policy: PathPolicy::RoundRobin,
        beat_ms: 1_000,
        lease_ms: 8_000,
        pending_lease_ms: 8_000,
    };
    // It makes trees, whose every law holds.
    let mut effects = Vec::new();
    let mut forest = Forest::load(settings, records.clone(), &mut effects)?;
    forest.step(Tick(0), treeboot_coordinator::tree::Event::Clock, &mut effects);
    forest.audit().map_err(anyhow::Error::msg)?;
    Ok(records
        .iter()
        .map(|(key, record)| format!("{key:?} {record:?}\n"))
        .collect())
}

/// What the kill left, in a copy, against what was there before the write and what was to be after it.
fn check_what_is_left(cluster: &Cluster, states: &Path, death: u32) -> Result<()> {
    let copy = cluster.path().join(format!("copy-{death}"));
    fs::create_dir_all(copy.join("record"))?;
    for entry in fs::read_dir(cluster.coordinator_state().join("record"))? {
        let entry = entry?;
        if entry.path().is_file() {
            fs::copy(entry.path(), copy.join("record").join(entry.file_name()))?;
        }
    }
    let left = lines(&copy)?;
    let [before, after] = ["before", "after"].map(|name| fs::read_to_string(states.join(name)));
    let (before, after) = (before?, after?);
    ensure!(
        left == before || left == after,
        "the record is neither of both\n--- left\n{left}\n--- before\n{before}\n--- after\n{after}"
    );
    fs::remove_dir_all(&copy)?;
    Ok(())
}

/// Keeps a coordinator running that is killed again and again, until `done`.
async fn keep_killing(cluster: &Cluster, dooms: &mut Dooms, done: &Cell<bool>) -> Result<()> {
    let states = cluster.path().join("states");
    fs::create_dir_all(&states)?;
    let coordinator = &cluster.coordinator;
    coordinator.set_env("TREEBOOT_DOOM_STATES", &states.to_string_lossy());
    loop {
        let (write, when, microseconds) = dooms.doom();
        coordinator.set_env("TREEBOOT_DOOM_WRITE", &write.to_string());
        coordinator.set_env("TREEBOOT_DOOM_WHEN", when);
        coordinator.set_env("TREEBOOT_DOOM_MICROSECONDS", &microseconds.to_string());
        // Where it dies at its first write it is never ready.
        coordinator.spawn(cluster.scratch())?;
        let ended = wait_until(STEP_LIMIT * 2, "the coordinator's next death", async || {
            if !coordinator.is_running() {
                return Ok(Some(true));
            }
            Ok(done.get().then_some(false))
        })
        .await?;
        if !ended {
            return Ok(());
        }
        let status = coordinator.wait_exit(STEP_LIMIT).await?;
        dooms.kills.set(dooms.kills.get() + 1);
        let what = format!(
            "kill {} ({when} write {write}, {microseconds} µs)",
            dooms.kills.get()
        );
        ensure!(
            std::os::unix::process::ExitStatusExt::signal(&status) == Some(9),
            "{what}: it ended with {status}: {}",
            coordinator.log_tail()
        );
        check_what_is_left(cluster, &states, dooms.kills.get()).context(what)?;
    }
}

/// Does something that asks the coordinator, again and again until it comes through.
async fn insist(what: &str, mut attempt: impl AsyncFnMut() -> Result<()>) -> Result<()> {
    let last = parking_lot::Mutex::new(None);
    let done = wait_until(STEP_LIMIT, what, async || match attempt().await {
        Ok(()) => Ok(Some(())),
        Err(error) => {
            *last.lock() = Some(format!("{error:#}"));
            Ok(None)
        }
    });
    done.await
        .with_context(|| format!("its last words: {:?}", last.lock()))
}

async fn attach(host: &Daemon, image: &str) -> Result<()> {
    insist("an attachment", async || {
        fleet::attach(host, image).await?;
        Ok(())
    })
    .await
}

/// What the coordinator has to write: images that come and go, hosts that join, leave, die and come back.
async fn scenario(cluster: &Cluster) -> Result<()> {
    let file = cluster.path().join("second.raw");
    Pattern { seed: 54, ..PATTERN }.write(&file)?;
    let [h1, h2, h3, h4] = &cluster.hosts[..] else {
        bail!("four hosts");
    };
    insist("an import", async || cluster.import(&file, SECOND).await).await?;
    futures_util::future::try_join_all([h1, h2, h3, h4].map(|host| attach(host, SECOND))).await?;
    attach(h4, BASE).await?;
    // One leaves in order, one dies and is away for longer than its lease; both come back.
    h2.terminate().await?;
    cluster.restart(h2).await?;
    attach(h2, BASE).await?;
    h1.kill()?;
    insist("the dead host's children to have other parents", async || {
        let tree = measure::tree(cluster, BASE).await?;
        let orphan = tree
            .nodes
            .iter()
            .find(|node| node.parents.iter().any(|p| p == h1.name()));
        ensure!(orphan.is_none(), "{orphan:?}");
        Ok(())
    })
    .await?;
    cluster.restart(h1).await?;
    attach(h1, BASE).await?;
    insist("an image's removal", async || {
        let args = ["image", "remove", &format!("{SECOND}@1"), "--force"];
        let said = cluster.treeboot_output(&args).await?;
        let words = String::from_utf8_lossy(&said.stderr);
        // An attempt before may have done it, and died before it answered.
        ensure!(said.status.success() || words.contains("no image"), "{words}");
        Ok(())
    })
    .await
}

fn killed_at(label: &'static str, limit: Option<u32>, every: bool) -> Result<()> {
    on_own_thread_within(Duration::from_secs(900), Machine::Alone, async move || {
        let plan = Plan {
            hosts: 4,
            coordinator_program: Some("treeboot-doomed-coordinator"),
            ..Plan::default()
        };
        let plan = plan.with_leases(Duration::from_secs(3));
        let cluster = Cluster::start(label, &plan).await?;
        let file = cluster.path().join("base.raw");
        PATTERN.write(&file)?;
        cluster.import(&file, BASE).await?;
        for host in &cluster.hosts[..3] {
            fleet::attach(host, BASE).await?;
        }
        // The reader's own host stays through it all; those it reads from come and go.
        let (session, lun) = log_in(&cluster.hosts[2], BASE, "reader").await?;
        cluster.coordinator.kill()?;
        let seed = std::env::var("TREEBOOT_SEED")
            .ok()
            .and_then(|text| text.parse().ok());
        let mut dooms = Dooms {
            random: seed.unwrap_or(SEED),
            kills: Cell::new(0),
            limit,
            every,
        };
        println!("kills: TREEBOOT_SEED={}", dooms.random);
        let done = Cell::new(false);
        let began = Instant::now();
        let reading = async {
            let (mut rounds, mut longest) = (0, Duration::ZERO);
            while !done.get() {
                longest = longest.max(read_whole(&session, lun, PATTERN).await?.longest);
                rounds += 1;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Ok::<_, anyhow::Error>((rounds, longest))
        };
        let living = async {
            let outcome = scenario(&cluster).await;
            done.set(true);
            outcome
        };
        let killing = keep_killing(&cluster, &mut dooms, &done);
        let ((rounds, longest), (), ()) = futures_util::future::try_join3(reading, living, killing).await?;
        println!(
            "{} kills in {:.1} s; the image was read {rounds} times meanwhile, one read took at most {longest:?}",
            dooms.kills.get(),
            began.elapsed().as_secs_f64()
        );
        ensure!(longest < STALL_LIMIT, "one read took {longest:?}");
        ensure!(dooms.kills.get() > 0, "nobody was killed");
        // It ends as it would have without: all are there, and a last death changes nothing.
        if cluster.coordinator.is_running() {
            cluster.coordinator.kill()?;
        } else {
            cluster.coordinator.wait_exit(STEP_LIMIT).await?;
        }
        cluster.coordinator.set_env("TREEBOOT_DOOM_WRITE", "0");
        cluster.restart(&cluster.coordinator).await?;
        cluster.wait_known().await?;
        wait_until(STEP_LIMIT, "all hosts in the tree", async || {
            let tree = measure::tree(&cluster, BASE).await?;
            let there = |name: &str| tree.nodes.iter().any(|node| node.host == name && node.connected);
            Ok(cluster.hosts.iter().all(|host| there(host.name())).then_some(()))
        })
        .await?;
        let before = cluster.treeboot(&["tree", BASE, "--json"]).await?;
        cluster.coordinator.kill()?;
        cluster.restart(&cluster.coordinator).await?;
        cluster.wait_known().await?;
        let after = cluster.treeboot(&["tree", BASE, "--json"]).await?;
        assert_eq!(places(&before)?, places(&after)?);
        let images = cluster.treeboot(&["image", "list", "--json"]).await?;
        let images: Vec<serde_json::Value> = serde_json::from_str(&images)?;
        assert_eq!(images.len(), 1, "the second image was removed");
        cluster.pass();
        Ok(())
    })
}

/// Of `tree --json`, what does not depend on who has beaten already.
fn places(tree: &str) -> Result<Vec<String>> {
    let tree: serde_json::Value = serde_json::from_str(tree)?;
    let nodes = tree["nodes"].as_array().context("a tree without nodes")?;
    let place = |node: &serde_json::Value| {
        let field = |name: &str| node[name].to_string();
        ["host", "stripe", "depth", "parents", "children"]
            .map(field)
            .join(" ")
    };
    Ok(nodes.iter().map(place).collect())
}

#[test]
fn a_coordinator_killed_at_writes_of_its_record_has_the_state_before_or_after() -> Result<()> {
    let kills = std::env::var("TREEBOOT_KILLS")
        .ok()
        .and_then(|text| text.parse().ok());
    killed_at("kills", Some(kills.unwrap_or(KILLS)), false)
}

#[test]
#[ignore = "a soak: every write of the scenario, killed before, within and after it"]
fn a_coordinator_killed_at_every_write() -> Result<()> {
    killed_at("kills-every", None, true)
}
