//! A guest with Debian's own guest agent: it holds its file systems still while a snapshot is taken, and goes on.

use anyhow::{Context as _, Result, ensure};
use treeboot_proto::v1;
use treeboot_tests::cluster::{Cluster, Plan};
use treeboot_tests::daemon::Daemon;
use treeboot_tests::fleet::{self, Order};
use treeboot_tests::guest;
use treeboot_tests::reader::log_in;
use treeboot_tests::wait::wait_until;

use crate::support::{Machine, refused, with_cluster};

const IMAGE: &str = "busybox";

/// The last line that the guest said is on its disk.
async fn line(host: &Daemon) -> Result<u32> {
    let vm = fleet::describe(host, "web-1").await?;
    let console = guest::console(&vm)?;
    let said = console.lines().rev().find_map(|line| line.rsplit_once(" line "));
    Ok(said.map_or(0, |(_, number)| number.trim().parse().unwrap_or(0)))
}

/// Whether the ext4 file system on the disk of this VM, which nobody mounted, has a journal that is to be replayed. It is the disk's first
/// partition; the superblock lies 1 KiB in it (magic at 0x38, incompatible features at 0x60, of which 0x4 is "needs recovery").
async fn needs_recovery(host: &Daemon, vm: &str) -> Result<bool> {
    let (session, lun) = log_in(host, IMAGE, vm).await?;
    let table = session.read(lun, 0, 512).await?;
    let start = table.get(446 + 8..446 + 12).context("no partition table")?;
    let start = u64::from(u32::from_le_bytes(start.try_into()?)) * 512;
    let superblock = session.read(lun, start + 1024, 512).await?;
    ensure!(
        superblock.get(0x38..0x3a) == Some(&[0x53, 0xef][..]),
        "no ext4 on '{vm}'"
    );
    Ok(superblock.get(0x60).context("a short read")? & 4 != 0)
}

async fn take(cluster: &Cluster, snapshot: &str, freeze: &str) -> Result<serde_json::Value> {
    let told = cluster
        .treeboot(&[
            "snapshot", "create", "web-1", snapshot, "--freeze", freeze, "--json",
        ])
        .await?;
    Ok(serde_json::from_str(&told)?)
}

#[test]
fn a_guest_with_an_agent_holds_still_while_a_snapshot_is_taken_and_goes_on() -> Result<()> {
    let Some(file) = guest::busybox() else {
        return Ok(());
    };
    let plan = Plan {
        hosts: 1,
        ..Plan::default()
    };
    with_cluster("freeze", Machine::Alone, plan, async move |cluster| {
        cluster.import(&file, IMAGE).await?;
        let host = &cluster.hosts[0];
        let order = Order {
            user_data: "guest_agent=1\nsteady=10000".into(),
            ..guest::order("web-1", IMAGE)
        };
        fleet::boot(host, &order).await?;
        wait_until(order.limit, "the guest's agent to answer", async || {
            let request = v1::SnapshotRequest {
                vm: "web-1".into(),
                snapshot: "first".into(),
                freeze: v1::Freeze::Require.into(),
            };
            match host.agent().await?.snapshot(request).await {
                Ok(answer) => Ok(answer.into_inner().layer.filter(|layer| layer.frozen)),
                Err(error) if error.code() == tonic::Code::FailedPrecondition => Ok(None),
                Err(error) => Err(error.into()),
            }
        })
        .await?;
        for (snapshot, freeze, consistency) in [
            ("still", "auto", "frozen"),
            ("rough", "never", "crash-consistent"),
            ("again", "require", "frozen"),
        ] {
            let before = line(host).await?;
            wait_until(order.limit, "the guest to write", async || {
                Ok((line(host).await? > before).then_some(()))
            })
            .await?;
            let told = take(cluster, snapshot, freeze).await?;
            ensure!(
                told["consistency"] == consistency && told["trouble"].is_null(),
                "{told}"
            );
            ensure!(
                told["not_frozen"].is_null() == (consistency == "frozen"),
                "{told}"
            );
        }
        let before = line(host).await?;
        wait_until(order.limit, "the guest to go on", async || {
            Ok((line(host).await? > before + 2).then_some(()))
        })
        .await?;
        guest::check_no_errors(&fleet::describe(host, "web-1").await?)?;
        let listed = cluster.treeboot(&["snapshot", "list", "web-1"]).await?;
        for (name, consistency) in [
            ("still", "frozen"),
            ("rough", "crash-consistent"),
            ("again", "frozen"),
        ] {
            let row = listed.lines().find(|line| line.trim_start().starts_with(name));
            ensure!(
                row.is_some_and(|row| row.trim_end().ends_with(consistency)),
                "{listed}"
            );
        }
        // What is on the disk says the same: the journal of a file system that was held still is empty.
        for (snapshot, expected) in [("still", false), ("rough", true), ("again", false)] {
            let vm = format!("of-{snapshot}");
            cluster
                .treeboot(&["clone", "web-1", &vm, "--snapshot", snapshot])
                .await?;
            ensure!(needs_recovery(host, &vm).await? == expected, "{snapshot}");
        }
        // Without a guest that runs there is nobody to hold still.
        fleet::stop(host, "web-1", true).await?;
        let create = ["snapshot", "create", "web-1", "late", "--freeze", "require"];
        refused(cluster, &create, 7, "cannot be frozen: the VM does not run").await?;
        let told = take(cluster, "late", "auto").await?;
        ensure!(told["consistency"] == "crash-consistent", "{told}");
        Ok(())
    })
}
