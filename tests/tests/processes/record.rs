//! The coordinator's record lost, damaged, of a later version, or without room: told clearly, and nobody's reads notice.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use treeboot_proto::v1;
use treeboot_tests::cluster::{Cluster, Plan};
use treeboot_tests::image::Pattern;
use treeboot_tests::need::{Need, require};
use treeboot_tests::reader::{log_in, read_whole};
use treeboot_tests::wait::wait_until;
use treeboot_tests::{fleet, measure};

use crate::support::{Machine, on_own_thread, with_cluster};

const IMAGE: &str = "pattern";
const PATTERN: Pattern = Pattern {
    seed: 61,
    bytes: 4 << 20,
};
const SOON: Duration = Duration::from_secs(60);

fn plan(hosts: usize) -> Plan {
    let args = [
        "--beat-ms",
        "500",
        "--lease-ms",
        "6000",
        "--rebuild-window-ms",
        "5000",
    ];
    Plan {
        hosts,
        coordinator_args: args.map(Into::into).to_vec(),
        ..Plan::default()
    }
}

async fn import_and_attach(cluster: &Cluster) -> Result<()> {
    let file = cluster.path().join("pattern.raw");
    PATTERN.write(&file)?;
    cluster.import(&file, IMAGE).await?;
    for host in &cluster.hosts {
        fleet::attach(host, IMAGE).await?;
    }
    Ok(())
}

/// Who reads from whom, in which stripe.
async fn shape(cluster: &Cluster) -> Result<Vec<(u32, String, u32, Vec<String>)>> {
    let tree = measure::tree(cluster, IMAGE).await?;
    let node = |node: v1::TreeNode| (node.stripe, node.host, node.depth, node.parents);
    let mut shape: Vec<_> = tree.nodes.into_iter().map(node).collect();
    shape.sort();
    Ok(shape)
}

/// Waits until the trees are again what they were, with everybody connected.
async fn wait_shape(cluster: &Cluster, before: &[(u32, String, u32, Vec<String>)]) -> Result<()> {
    let seen = parking_lot::Mutex::new(Vec::new());
    let same = wait_until(SOON, "the same trees", async || {
        // The image itself may not be known yet.
        let shape = shape(cluster).await.unwrap_or_default();
        let same = shape == before;
        *seen.lock() = shape;
        Ok(same.then_some(()))
    });
    same.await
        .with_context(|| format!("before: {before:?}\nnow: {:?}", seen.lock()))
}

/// Runs a disk's reads beside something that must not disturb them.
async fn while_reading(cluster: &Cluster, work: impl Future<Output = Result<()>>) -> Result<()> {
    let reader = cluster.hosts.last().context("a host")?;
    let (session, lun) = log_in(reader, IMAGE, "reader").await?;
    let done = std::cell::Cell::new(false);
    let reading = async {
        while !done.get() {
            read_whole(&session, lun, PATTERN).await?;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok::<_, anyhow::Error>(())
    };
    let work = async {
        let outcome = work.await;
        done.set(true);
        outcome
    };
    futures_util::future::try_join(reading, work).await?;
    Ok(())
}

/// Nobody got other parents since the log had so many bytes.
fn nobody_moved(cluster: &Cluster, since: usize) -> Result<()> {
    let log = fs::read_to_string(cluster.coordinator.log_path())?;
    let moved = log[since..]
        .lines()
        .find(|line| line.contains("got other parents"));
    ensure!(moved.is_none(), "somebody was moved: {moved:?}");
    Ok(())
}

fn log_bytes(cluster: &Cluster) -> Result<usize> {
    Ok(fs::read(cluster.coordinator.log_path())?.len())
}

#[test]
fn a_record_deleted_under_a_running_fleet_comes_back_and_nobody_moves() -> Result<()> {
    with_cluster("record-deleted", Machine::Shared, plan(5), async |cluster| {
        import_and_attach(cluster).await?;
        let before = shape(cluster).await?;
        while_reading(cluster, async {
            cluster.coordinator.kill()?;
            fs::remove_dir_all(cluster.coordinator_state().join("record"))?;
            let since = log_bytes(cluster)?;
            cluster.restart(&cluster.coordinator).await?;
            cluster.wait_known().await?;
            wait_shape(cluster, &before).await?;
            nobody_moved(cluster, since)
        })
        .await?;
        // What is new gets its place as ever.
        let file = cluster.path().join("other.raw");
        Pattern { seed: 62, ..PATTERN }.write(&file)?;
        cluster.import(&file, "other").await?;
        fleet::attach(&cluster.hosts[0], "other").await?;
        Ok(())
    })
}

/// Starts a coordinator that must refuse; gives its words.
async fn refuses(cluster: &Cluster) -> Result<String> {
    match cluster.restart(&cluster.coordinator).await {
        Ok(_) => bail!("it serves"),
        Err(error) => {
            cluster.coordinator.wait_exit(SOON).await?;
            Ok(format!("{error:#}"))
        }
    }
}

/// Changes the record behind the coordinator's back.
fn spoil(state: &Path, change: impl FnOnce(&sled::Db) -> sled::Result<()>) -> Result<()> {
    let db = sled::open(state.join("record"))?;
    change(&db)?;
    db.flush()?;
    Ok(())
}

#[test]
fn a_record_that_cannot_be_relied_on_is_refused_and_rebuilt_when_told_to() -> Result<()> {
    on_own_thread(Machine::Shared, async || {
        let mut cluster = Cluster::start("record-damaged", &plan(3)).await?;
        import_and_attach(&cluster).await?;
        let before = shape(&cluster).await?;
        cluster.coordinator.terminate().await?;
        let state = cluster.coordinator_state();
        // A later version's.
        let own = sled::open(state.join("record"))?
            .get("epoch")?
            .context("an epoch")?;
        let mut later = own.to_vec();
        later[0] = 9;
        spoil(&state, |db| db.insert("epoch", later).map(drop))?;
        let words = refuses(&cluster).await?;
        ensure!(words.contains("the entry epoch"), "{words}");
        ensure!(words.contains("format 9"), "{words}");
        // An entry gone.
        spoil(&state, |db| {
            db.insert("epoch", own)?;
            db.remove("host/h2").map(drop)
        })?;
        let words = refuses(&cluster).await?;
        ensure!(
            words.contains("is damaged: of ") && words.contains("--rebuild"),
            "{words}"
        );
        // Its files cut short, the worst way: nothing of them can be read.
        for name in ["db", "conf"] {
            fs::write(state.join("record").join(name), b"not a record")?;
        }
        let words = refuses(&cluster).await?;
        ensure!(words.contains("record") && words.contains("--rebuild"), "{words}");
        let since = log_bytes(&cluster)?;
        cluster.coordinator.add_args(["--rebuild"]);
        cluster.restart(&cluster.coordinator).await?;
        cluster.wait_known().await?;
        wait_shape(&cluster, &before).await?;
        nobody_moved(&cluster, since)?;
        ensure!(
            state.join("record.old-1").join("db").exists(),
            "the old one is kept"
        );
        cluster.pass();
        Ok(())
    })
}

#[test]
fn a_coordinator_without_room_serves_from_memory_and_writes_again_when_there_is_some() -> Result<()> {
    if !require(&[Need::Root]) {
        return Ok(());
    }
    on_own_thread(Machine::Shared, async || {
        let cluster = Cluster::prepare("record-full", &plan(3))?;
        let state = cluster.coordinator_state();
        fs::create_dir_all(&state)?;
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=6m", "tmpfs"])
            .arg(&state)
            .status()?;
        ensure!(mounted.success(), "mount ended with {mounted}");
        cluster.restart(&cluster.coordinator).await?;
        cluster.start_agents().await?;
        import_and_attach(&cluster).await?;
        let before = shape(&cluster).await?;
        while_reading(&cluster, full_and_not(&cluster, &state, &before)).await?;
        // What was decided when there was room again is there after a death.
        let images = cluster.treeboot(&["image", "list", "--json"]).await?;
        cluster.coordinator.kill()?;
        cluster.restart(&cluster.coordinator).await?;
        assert_eq!(images, cluster.treeboot(&["image", "list", "--json"]).await?);
        wait_shape(&cluster, &before).await?;
        cluster.pass();
        Ok(())
    })
}

async fn full_and_not(
    cluster: &Cluster,
    state: &Path,
    before: &[(u32, String, u32, Vec<String>)],
) -> Result<()> {
    let filler = state.join("filler");
    let mut byte_by_byte = fs::File::create(&filler)?;
    while std::io::Write::write_all(&mut byte_by_byte, &[7; 4096]).is_ok() {}
    drop(byte_by_byte);
    // What sled still has room for in what it has allocated.
    let mut client = cluster.coordinator.coordinator().await?;
    let mut number = 0;
    let status = loop {
        number += 1;
        ensure!(number < 5_000, "it never had too little room");
        let request = v1::AddImageRequest {
            image: Some(foreign(&format!("image-{number}"))),
        };
        if let Err(status) = client.add_image(request).await {
            break status;
        }
    };
    println!("{} images were written before there was no room", number - 1);
    assert_eq!(status.code(), tonic::Code::Unavailable, "{status}");
    ensure!(status.message().contains("make room"), "{status}");
    // For longer than a lease: beats are heard, questions answered, nobody loses its place.
    let until = tokio::time::Instant::now() + Duration::from_secs(8);
    while tokio::time::Instant::now() < until {
        ensure!(shape(cluster).await? == before, "the trees changed");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    ensure!(
        cluster.coordinator.is_running(),
        "{}",
        cluster.coordinator.log_tail()
    );
    let log = fs::read_to_string(cluster.coordinator.log_path())?;
    ensure!(!log.contains("host lost"), "{log}");
    fs::remove_file(&filler)?;
    wait_until(SOON, "an image to be added", async || {
        let request = v1::AddImageRequest {
            image: Some(foreign("room-again")),
        };
        Ok(client.add_image(request).await.ok().map(drop))
    })
    .await?;
    let log = fs::read_to_string(cluster.coordinator.log_path())?;
    ensure!(log.contains("the record can be written again"), "{log}");
    Ok(())
}

fn foreign(name: &str) -> v1::Image {
    v1::Image {
        id: Some(measure::newest(name)),
        digest: vec![7; 32],
        bytes: 1 << 30,
        origins: vec![v1::Origin {
            endpoint: Some(v1::Endpoint {
                portal: "10.9.9.9:3260".into(),
                target: format!("iqn.2026-11.org.example:{name}"),
                data_lun: 0,
                hash_lun: None,
            }),
            ..Default::default()
        }],
        ..Default::default()
    }
}

#[test]
fn a_coordinator_that_stood_still_for_longer_than_a_lease_loses_nobody() -> Result<()> {
    with_cluster("stood-still", Machine::Shared, plan(3), async |cluster| {
        import_and_attach(cluster).await?;
        let before = shape(cluster).await?;
        while_reading(cluster, async {
            // A lease is 6 s. What passes for the process is what passes when a laptop sleeps, or a clock jumps.
            cluster.coordinator.freeze()?;
            tokio::time::sleep(Duration::from_secs(8)).await;
            cluster.coordinator.thaw()
        })
        .await?;
        cluster.wait_known().await?;
        wait_shape(cluster, &before).await?;
        let log = fs::read_to_string(cluster.coordinator.log_path())?;
        ensure!(!log.contains("host lost"), "{log}");
        ensure!(log.contains("did not run for a while"), "{log}");
        Ok(())
    })
}

#[test]
fn labels_with_odd_characters_are_kept_and_shown_as_they_are() -> Result<()> {
    const RACK: &str = "α/β \"quoted\" {x} <y> 'z' = \\ %s";
    let plan = Plan {
        agent_args: vec!["--label".into(), format!("rack={RACK}")],
        ..plan(2)
    };
    with_cluster("odd-labels", Machine::Shared, plan, async |cluster| {
        import_and_attach(cluster).await?;
        let shown = async || -> Result<()> {
            let hosts = cluster.treeboot(&["host", "list", "--json"]).await?;
            let hosts: Vec<serde_json::Value> = serde_json::from_str(&hosts)?;
            ensure!(
                hosts.iter().all(|host| host["labels"]["rack"] == RACK),
                "{hosts:?}"
            );
            cluster.treeboot(&["tree", IMAGE]).await?;
            Ok(())
        };
        shown().await?;
        cluster.coordinator.kill()?;
        cluster.restart(&cluster.coordinator).await?;
        cluster.wait_known().await?;
        shown().await
    })
}
