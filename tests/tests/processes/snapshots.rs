//! Snapshots of a disk that a front end writes to: taken, gone back to, deleted in any order, through kills of the agent; and damage
//! that is found.

use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use treeboot_iscsi::initiator::Session;
use treeboot_proto::v1;
use treeboot_tests::cluster::{Cluster, Plan};
use treeboot_tests::daemon::Daemon;
use treeboot_tests::image::Pattern;
use treeboot_tests::reader::log_in;
use treeboot_tests::wait::wait_until;

use crate::support::{Machine, with_cluster};

const IMAGE: &str = "pattern";
const PATTERN: Pattern = Pattern {
    seed: 71,
    bytes: 8 << 20,
};
const SOON: Duration = Duration::from_secs(60);
const BLOCK: usize = 4096;
const VM: &str = "web-1";

async fn import(cluster: &Cluster) -> Result<()> {
    let file = cluster.path().join("pattern.raw");
    PATTERN.write(&file)?;
    cluster.import(&file, IMAGE).await
}

/// What a disk is to hold: the image, and blocks written over it.
#[derive(Clone, Default)]
struct Expected(std::collections::BTreeMap<u64, u8>);

impl Expected {
    /// Writes whole blocks, and has them flushed.
    async fn write(&mut self, session: &Session, lun: u16, blocks: &[u64], fill: u8) -> Result<()> {
        for &block in blocks {
            let data = vec![fill; BLOCK].into();
            session.write(lun, block * BLOCK as u64, data).await?;
            self.0.insert(block, fill);
        }
        session.flush(lun).await?;
        Ok(())
    }

    async fn check(&self, session: &Session, lun: u16, what: &str) -> Result<()> {
        const AT_ONCE: u64 = 65536;
        for offset in (0..PATTERN.bytes).step_by(AT_ONCE as usize) {
            let read = session.read(lun, offset, AT_ONCE as u32).await?;
            for (n, block) in read.chunks(BLOCK).enumerate() {
                let number = offset / BLOCK as u64 + n as u64;
                let right = match self.0.get(&number) {
                    Some(fill) => block.iter().all(|byte| byte == fill),
                    None => PATTERN.first_wrong_block(number * BLOCK as u64, block).is_none(),
                };
                ensure!(right, "{what}: block {number} is not what it should be");
            }
        }
        Ok(())
    }
}

async fn snapshot(agent: &Daemon, name: &str) -> Result<v1::SnapshotResponse> {
    let request = v1::SnapshotRequest {
        vm: VM.into(),
        snapshot: name.into(),
        ..v1::SnapshotRequest::default()
    };
    Ok(agent.agent().await?.snapshot(request).await?.into_inner())
}

async fn roll_back(agent: &Daemon, name: &str) -> Result<(), tonic::Status> {
    let request = v1::RollBackRequest {
        vm: VM.into(),
        snapshot: name.into(),
    };
    let mut client = agent
        .agent()
        .await
        .map_err(|error| tonic::Status::unknown(error.to_string()))?;
    client.roll_back(request).await.map(drop)
}

async fn delete(agent: &Daemon, name: &str) -> Result<()> {
    let request = v1::DeleteSnapshotRequest {
        vm: VM.into(),
        snapshot: name.into(),
    };
    agent.agent().await?.delete_snapshot(request).await?;
    Ok(())
}

async fn layers(agent: &Daemon) -> Result<Vec<v1::Layer>> {
    let request = v1::ListSnapshotsRequest { vm: VM.into() };
    Ok(agent
        .agent()
        .await?
        .list_snapshots(request)
        .await?
        .into_inner()
        .layers)
}

/// Waits until so many layers are left, and the frozen ones have their checksums.
async fn wait_layers(agent: &Daemon, count: usize) -> Result<()> {
    let seen = parking_lot::Mutex::new(Vec::new());
    let settled = wait_until(SOON, "the layers to settle", async || {
        let layers = layers(agent).await?;
        let settled = layers.len() == count && layers.iter().all(|layer| layer.live || layer.sealed);
        *seen.lock() = layers;
        Ok(settled.then_some(()))
    });
    settled.await.with_context(|| format!("{:?}", seen.lock()))
}

/// A roll-back needs the session to be gone, which the agent sees a moment after the client.
async fn roll_back_soon(agent: &Daemon, name: &str) -> Result<()> {
    wait_until(SOON, "the roll-back", async || {
        match roll_back(agent, name).await {
            Ok(()) => Ok(Some(())),
            Err(status) if status.code() == tonic::Code::FailedPrecondition => Ok(None),
            Err(status) => Err(status.into()),
        }
    })
    .await
}

#[test]
fn snapshots_are_taken_gone_back_to_and_deleted_while_the_disk_is_written_through_kills() -> Result<()> {
    with_cluster("snapshots", Machine::Shared, Plan::default(), async |cluster| {
        import(cluster).await?;
        let agent = &cluster.hosts[0];
        let (session, lun) = log_in(agent, IMAGE, VM).await?;
        let mut now = Expected::default();
        now.write(&session, lun, &[0, 1, 2, 700, 2047], 1).await?;
        ensure!(snapshot(agent, "a").await?.created);
        let a = now.clone();
        ensure!(!snapshot(agent, "a").await?.created, "nothing was written since");
        now.write(&session, lun, &[1, 2, 3], 2).await?;
        let error = snapshot(agent, "a").await.expect_err("the name is taken");
        ensure!(
            format!("{error:#}").contains("snapshot 'a' exists already"),
            "{error:#}"
        );
        snapshot(agent, "b").await?;
        let b = now.clone();
        now.write(&session, lun, &[2, 1000], 3).await?;
        snapshot(agent, "c").await?;
        now.write(&session, lun, &[0, 5], 4).await?;
        now.check(&session, lun, "with three snapshots").await?;
        wait_layers(agent, 4).await?;
        // In the middle, while the front end is logged in.
        delete(agent, "b").await?;
        wait_layers(agent, 3).await?;
        now.check(&session, lun, "after b was deleted").await?;
        snapshot(agent, "d").await?;
        let d = now.clone();

        let refused = roll_back(agent, "a").await.expect_err("a front end is logged in");
        ensure!(
            refused.message().contains("front ends are logged in"),
            "{refused}"
        );
        drop(session);
        roll_back_soon(agent, "a").await?;
        let (session, lun) = log_in(agent, IMAGE, VM).await?;
        a.check(&session, lun, "back at a").await?;
        let mut now = a.clone();
        now.write(&session, lun, &[9], 5).await?;
        drop(session);

        agent.kill()?;
        cluster.restart(agent).await?;
        let (session, lun) = log_in(agent, IMAGE, VM).await?;
        now.check(&session, lun, "after a kill").await?;
        drop(session);
        // Forward again: what came after is another branch, and was kept.
        roll_back_soon(agent, "d").await?;
        // A merge is cut off, and goes on by itself after the restart.
        delete(agent, "c").await?;
        agent.kill()?;
        cluster.restart(agent).await?;
        wait_layers(agent, 3).await?;
        let (session, lun) = log_in(agent, IMAGE, VM).await?;
        d.check(&session, lun, "at d").await?;
        delete(agent, "a").await?;
        delete(agent, "d").await?;
        wait_layers(agent, 1).await?;
        d.check(&session, lun, "without snapshots").await?;
        drop(session);
        ensure!(b.0 != d.0);

        for (name, words) in [
            ("x", "there is no snapshot 'x'; there is none"),
            ("A b", "the snapshot name"),
        ] {
            let error = roll_back(agent, name)
                .await
                .expect_err("there is no such snapshot");
            ensure!(error.message().contains(words), "{error}");
        }
        let unknown = v1::SnapshotRequest {
            vm: "web-9".into(),
            snapshot: "a".into(),
            ..v1::SnapshotRequest::default()
        };
        let error = agent
            .agent()
            .await?
            .snapshot(unknown)
            .await
            .expect_err("no such VM");
        ensure!(error.message().contains("there is no VM 'web-9'"), "{error}");
        cluster.treeboot(&["vm", "destroy", VM]).await?;
        let left: Vec<_> = std::fs::read_dir(cluster.path().join("h1/state/deltas"))?.collect();
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
}

#[test]
fn a_damaged_layer_is_located_and_not_served_and_the_verbs_say_so() -> Result<()> {
    with_cluster("delta-check", Machine::Shared, Plan::default(), async |cluster| {
        import(cluster).await?;
        let agent = &cluster.hosts[0];
        let (session, lun) = log_in(agent, IMAGE, VM).await?;
        let mut now = Expected::default();
        now.write(&session, lun, &[4, 5, 6, 900], 7).await?;
        drop(session);
        let taken = cluster.treeboot(&["snapshot", "create", VM, "before"]).await?;
        ensure!(
            taken.starts_with("took 'before' of 'web-1' on host 'h1'"),
            "{taken}"
        );
        wait_layers(agent, 2).await?;
        let told = cluster.treeboot(&["describe", VM]).await?;
        for part in [
            "pattern@1",
            "before",
            "(now)",
            "stripe 0 from origin",
            "0 logged in",
        ] {
            ensure!(told.contains(part), "{part} is not in {told}");
        }
        let described: serde_json::Value =
            serde_json::from_str(&cluster.treeboot(&["describe", VM, "--json"]).await?)?;
        ensure!(described["layers"][0]["snapshot"] == "before", "{described}");
        let listed: serde_json::Value =
            serde_json::from_str(&cluster.treeboot(&["snapshot", "list", VM, "--json"]).await?)?;
        ensure!(listed.as_array().map(Vec::len) == Some(1), "{listed}");
        let good = cluster.treeboot(&["delta", "check", VM]).await?;
        ensure!(
            good.contains("layer 0 of 'web-1' before: 16.0 KiB of data"),
            "{good}"
        );

        let deltas = cluster.path().join("h1/state/deltas");
        let file = std::fs::OpenOptions::new()
            .write(true)
            .open(deltas.join("web-1.delta"))?;
        // Two headers, two maps of a page each, then every block at its own place.
        file.write_all_at(b"damage", (4 + 5) * BLOCK as u64 + 100)?;
        let output = cluster.treeboot_output(&["delta", "check", VM]).await?;
        let (text, words) = (
            String::from_utf8_lossy(&output.stdout).into_owned(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        );
        ensure!(
            output.status.code() == Some(1),
            "{}: {text}{words}",
            output.status
        );
        ensure!(
            text.contains("damaged: 4.00 KiB at byte 20480 of the disk: its checksum is wrong"),
            "{text}"
        );
        ensure!(
            words.contains("what VM 'web-1' wrote is damaged in 1 places"),
            "{words}"
        );
        let (session, lun) = log_in(agent, IMAGE, VM).await?;
        if session.read(lun, 5 * BLOCK as u64, BLOCK as u32).await.is_ok() {
            bail!("damaged bytes were served");
        }
        session.read(lun, 4 * BLOCK as u64, BLOCK as u32).await?;
        // Writing the block anew is one way out.
        now.write(&session, lun, &[5], 8).await?;
        now.check(&session, lun, "written anew").await?;
        drop(session);

        let at_work =
            ["delta", "check", VM, "--offline", &deltas.display().to_string()].map(ToOwned::to_owned);
        let refused = cluster.treeboot_output(&at_work).await?;
        ensure!(refused.status.code() == Some(7), "{refused:?}");
        agent.terminate().await?;
        let found = cluster.treeboot_output(&at_work).await?;
        let text = String::from_utf8_lossy(&found.stdout);
        ensure!(
            found.status.code() == Some(1) && text.contains("at byte 20480 of the disk"),
            "{found:?}"
        );
        Ok(())
    })
}
