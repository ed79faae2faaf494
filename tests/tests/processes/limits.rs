//! A limit of what a VM writes: alarms before it, a VM that stands still at it, and room again when it is raised or when something is discarded.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use treeboot_proto::v1;
use treeboot_tests::cluster::{Cluster, Plan};
use treeboot_tests::daemon::Daemon;
use treeboot_tests::image::Pattern;
use treeboot_tests::need::{Need, require};
use treeboot_tests::{fleet, guest};
use treeboot_types::{Iqn, IscsiUrl, VmName};

use crate::support::{Machine, with_cluster};

const IMAGE: &str = "image";
const VM: &str = "web-1";
const PATTERN: Pattern = Pattern {
    seed: 11,
    bytes: 32 << 20,
};
/// Under emulation, beside other tests.
const SOON: Duration = Duration::from_secs(100);

/// What QEMU's own iSCSI client says to one command on the VM's disk.
async fn qemu_io(url: &IscsiUrl, command: &str) -> Result<String> {
    let initiator = Iqn::of_vm(&VmName::new(VM)?);
    let disk = format!(
        "driver=raw,discard=unmap,file.driver=iscsi,file.discard=unmap,file.transport=tcp,file.portal={},file.target={},file.lun={},file.initiator-name={initiator}",
        url.portal(),
        url.target,
        url.lun
    );
    let output = tokio::process::Command::new("qemu-io")
        .args(["-d", "unmap", "--image-opts", &disk, "-c", command])
        .kill_on_drop(true)
        .output()
        .await?;
    let said = [output.stdout, output.stderr].concat();
    Ok(String::from_utf8_lossy(&said).into_owned())
}

/// Whether there was room for it.
async fn has_room(url: &IscsiUrl, write: &str) -> Result<bool> {
    let said = qemu_io(url, &format!("write -P 7 {write}")).await?;
    match (said.contains("wrote "), said.contains("No space left on device")) {
        (true, false) => Ok(true),
        (false, true) => Ok(false),
        _ => bail!("qemu-io, write {write}: {said}"),
    }
}

async fn row(cluster: &Cluster, host: &Daemon) -> Result<Value> {
    let listed = cluster
        .treeboot(&["vm", "list", "--host", host.name(), "--json"])
        .await?;
    let rows: Value = serde_json::from_str(&listed)?;
    let row = rows.as_array().and_then(|rows| rows.first());
    row.cloned().context("no VM")
}

#[test]
fn a_front_end_at_its_limit_finds_no_room_until_it_discards_or_the_limit_is_raised() -> Result<()> {
    if !require(&[Need::Program("qemu-io", "qemu-utils qemu-block-extra")]) {
        return Ok(());
    }
    with_cluster("limits", Machine::Shared, Plan::default(), async |cluster| {
        let file = cluster.path().join("pattern.raw");
        PATTERN.write(&file)?;
        cluster.import(&file, IMAGE).await?;
        front_end(cluster).await
    })
}

async fn front_end(cluster: &Cluster) -> Result<()> {
    let host = &cluster.hosts[0];
    let create = async |limit| {
        let args = [
            "vm",
            "create",
            VM,
            "--image",
            IMAGE,
            "--host",
            host.name(),
            "--json",
        ];
        cluster
            .treeboot_output(&[&args[..], &["--delta-limit", limit]].concat())
            .await
    };
    let created = create("8M").await?;
    ensure!(created.status.success(), "{created:?}");
    ensure!(create("8M").await?.status.success(), "the same again");
    let other = create("9M").await?;
    ensure!(
        !other.status.success() && String::from_utf8_lossy(&other.stderr).contains("treeboot vm limit"),
        "{other:?}"
    );
    let row_of = async || row(cluster, host).await;
    let url: IscsiUrl = row_of().await?["url"].as_str().context("no URL")?.parse()?;
    let level = async |level: Option<v1::LimitLevel>| {
        let status = host
            .agent()
            .await?
            .status(v1::StatusRequest {})
            .await?
            .into_inner();
        let found = status.near_limit.first().map(v1::NearLimit::level);
        ensure!(found == level, "{status:?}");
        anyhow::Ok(())
    };

    level(None).await?;
    ensure!(has_room(&url, "0 7M").await?);
    level(Some(v1::LimitLevel::High)).await?;
    ensure!(has_room(&url, "7M 1M").await?);
    level(Some(v1::LimitLevel::Critical)).await?;
    ensure!(!has_room(&url, "16M 4k").await?);
    ensure!(has_room(&url, "1M 4M").await?, "what is there may change");
    let doctor = cluster.treeboot(&["doctor", "--host", host.name()]).await?;
    ensure!(
        doctor
            .lines()
            .any(|line| line.contains("filling") && line.contains(VM)),
        "{doctor}"
    );
    let now = row_of().await?;
    ensure!(
        now["limit_bytes"] == 8 << 20 && now["data_bytes"] == 8 << 20 && now["limit_level"] == "critical",
        "{now}"
    );

    // It is the limit of the next agent, too, from its first moment on.
    host.kill()?;
    host.start(cluster.scratch()).await?;
    ensure!(!has_room(&url, "16M 4k").await?);

    let discarded = qemu_io(&url, "discard 0 4M").await?;
    ensure!(discarded.contains("discard "), "{discarded}");
    level(None).await?;
    ensure!(has_room(&url, "16M 4M").await?);
    ensure!(!has_room(&url, "24M 4k").await?);

    let raised = cluster.treeboot(&["vm", "limit", VM, "12M"]).await?;
    ensure!(raised.contains("12.0 MiB"), "{raised}");
    ensure!(has_room(&url, "24M 4M").await?);
    ensure!(!has_room(&url, "28M 4k").await?);
    cluster.treeboot(&["vm", "limit", VM, "none"]).await?;
    ensure!(has_room(&url, "28M 4M").await?);
    ensure!(row_of().await?["limit_bytes"].is_null());
    for bad in ["1k", "0M", "12"] {
        let refused = cluster.treeboot_output(&["vm", "limit", VM, bad]).await?;
        ensure!(!refused.status.success(), "{bad}");
    }
    // A layer's blocks are a snapshot's and count.
    cluster.treeboot(&["snapshot", "create", VM, "a"]).await?;
    cluster.treeboot(&["vm", "limit", VM, "17M"]).await?;
    ensure!(has_room(&url, "28M 1M").await?);
    ensure!(!has_room(&url, "29M 4k").await?);
    Ok(())
}

#[test]
fn a_guest_at_its_limit_stands_still_and_goes_on_when_it_is_raised() -> Result<()> {
    let Some(file) = guest::busybox() else {
        return Ok(());
    };
    with_cluster("limited", Machine::Alone, Plan::default(), async move |cluster| {
        cluster.import(&file, IMAGE).await?;
        stands_still(cluster).await
    })
}

async fn stands_still(cluster: &Cluster) -> Result<()> {
    let host = &cluster.hosts[0];
    let order = guest::order_with_jobs(VM, IMAGE, &["write_mb=24", "verify_mb=24"]);
    let args = ["vm", "create", VM, "--image", IMAGE, "--host", host.name()];
    cluster
        .treeboot(&[&args[..], &["--delta-limit", "12M"]].concat())
        .await?;
    fleet::start(host, &order).await?;
    fleet::await_paused(host, &order.vm, SOON).await?;
    host.kill()?;
    host.start(cluster.scratch()).await?;
    fleet::await_paused(host, &order.vm, SOON).await?;
    let console = guest::console(&fleet::describe(host, &order.vm).await?)?;
    ensure!(!console.contains("wrote"), "there was room: {console}");
    let written = row(cluster, host).await?["data_bytes"]
        .as_u64()
        .context("no figure")?;
    ensure!(written <= 12 << 20, "{written} bytes are more than it may write");
    cluster.treeboot(&["vm", "limit", VM, "64M"]).await?;
    let vm = fleet::await_ready(host, &order.vm, SOON).await?;
    let console = guest::console(&vm)?;
    ensure!(
        console.contains("wrote 24 MiB") && console.contains("verified 24 MiB"),
        "{console}"
    );
    ensure!(!vm.paused && vm.pauses > 0, "{vm:?}");
    guest::check_no_errors(&vm)
}
