//! The agent itself, as a process with a coordinator and an origin, on the kernel plane: a disk under its stable name.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use tonic::{Code, Status};
use treeboot_dm::DmDevice;
use treeboot_proto::v1;
use treeboot_tests::cluster::{Cluster, Plan};
use treeboot_tests::image::{BLOCK_BYTES, Pattern};
use treeboot_tests::measure::newest;
use treeboot_tests::reader::{Blocks, check_read};
use treeboot_tests::wait::wait_until;

use super::COMES_WITHIN;

const IMAGE: &str = "base";
const PATTERN: Pattern = Pattern {
    seed: 29,
    bytes: 1 << 20,
};
const FOLDER: &str = "/dev/treeboot";

fn link(vm: &str) -> PathBuf {
    Path::new(FOLDER).join(vm)
}

fn request(vm: &str, image: &str) -> v1::CreateRequest {
    v1::CreateRequest {
        vm: vm.to_owned(),
        image: Some(newest(image)),
        device: true,
        limit_bytes: None,
    }
}

async fn create(cluster: &Cluster, request: v1::CreateRequest) -> Result<Result<v1::Disk, Status>> {
    let made = cluster.hosts[0].agent().await?.create(request).await;
    Ok(made.map(|made| made.into_inner().disk.unwrap_or_default()))
}

async fn destroy(cluster: &Cluster, vm: &str) -> Result<Result<(), Status>> {
    let request = v1::DestroyRequest {
        vm: vm.to_owned(),
        instance_only: false,
    };
    let destroyed = cluster.hosts[0].agent().await?.destroy(request).await;
    Ok(destroyed.map(drop))
}

fn refused<T: std::fmt::Debug>(answer: Result<T, Status>, code: Code, part: &str) -> Result<()> {
    let error = answer.err().context("it was not refused")?;
    ensure!(
        error.code() == code && error.message().contains(part),
        "{error}, not {code:?} and '{part}'"
    );
    Ok(())
}

/// The disk has these blocks, read through its name.
async fn holds(vm: &str, written: &[(u64, u8)]) -> Result<()> {
    let (path, blocks): (_, Blocks) = (link(vm), written.iter().copied().collect());
    let read = tokio::task::spawn_blocking(move || {
        let mut bytes = vec![0; usize::try_from(PATTERN.bytes)?];
        File::open(path)?.read_exact_at(&mut bytes, 0)?;
        check_read(0, &bytes, PATTERN, &blocks)
    });
    read.await?.with_context(|| vm.to_owned())
}

async fn write(vm: &str, block: u64, fill: u8) -> Result<()> {
    let path = link(vm);
    let written = tokio::task::spawn_blocking(move || {
        let device = OpenOptions::new().write(true).open(path)?;
        device.write_all_at(&[fill; BLOCK_BYTES], block * BLOCK_BYTES as u64)?;
        device.sync_all()
    });
    Ok(written.await??)
}

/// A disk is asked for as a device, written and read by its name, through the agent's death, until it is destroyed.
pub(super) async fn a_disk_has_a_stable_name() {
    device().await.unwrap_or_else(|error| panic!("{error:#}"));
}

async fn device() -> Result<()> {
    let plan = Plan {
        hosts: 1,
        kernel_plane: true,
        ..Plan::default()
    };
    let cluster = Cluster::start("plane-device", &plan).await?;
    let file = cluster.path().join("base.raw");
    PATTERN.write(&file)?;
    cluster.import(&file, IMAGE).await?;
    let host = &cluster.hosts[0];
    // Asked for without, it is a device all the same, with no name there.
    let without = v1::CreateRequest {
        device: false,
        ..request("web-1", IMAGE)
    };
    let disk = create(&cluster, without).await??;
    ensure!(disk.device.starts_with("/dev/mapper/"), "{disk:?}");
    ensure!(!link("web-1").exists());
    for vm in ["web-1", "web-2"] {
        let disk = create(&cluster, request(vm, IMAGE)).await??;
        ensure!(Path::new(&disk.device) == link(vm), "{disk:?}");
        let leads_to = std::fs::read_link(link(vm))?;
        ensure!(
            leads_to == Path::new(&format!("/dev/mapper/treeboot:disk:{vm}")),
            "{leads_to:?}"
        );
    }
    write("web-1", 7, 1).await?;
    holds("web-1", &[(7, 1)]).await?;
    holds("web-2", &[]).await?;

    // Bad input, and a disk in use.
    refused(
        create(&cluster, request("web-3", "nobody")).await?,
        Code::NotFound,
        "nobody",
    )?;
    symlink("/dev/null", link("web-4"))?;
    refused(
        create(&cluster, request("web-4", IMAGE)).await?,
        Code::FailedPrecondition,
        "another agent",
    )?;
    ensure!(
        std::fs::read_link(link("web-4"))? == Path::new("/dev/null"),
        "another's name was taken"
    );
    std::fs::remove_file(link("web-4"))?;
    let open = File::open(link("web-2"))?;
    refused(
        destroy(&cluster, "web-2").await?,
        Code::FailedPrecondition,
        "in use",
    )?;
    holds("web-2", &[]).await?;
    drop(open);

    // The kernel goes on without the agent, and the next one finds what there is; what was refused is not done later.
    host.kill()?;
    write("web-1", 8, 2).await?;
    holds("web-1", &[(7, 1), (8, 2)]).await?;
    cluster.restart(host).await?;
    holds("web-1", &[(7, 1), (8, 2)]).await?;
    holds("web-2", &[]).await?;
    destroy(&cluster, "web-2").await??;
    let disk = create(&cluster, request("web-1", IMAGE)).await??;
    ensure!(Path::new(&disk.device) == link("web-1"), "{disk:?}");
    // A name that somebody took away is made again by whoever asks.
    std::fs::remove_file(link("web-1"))?;
    create(&cluster, request("web-1", IMAGE)).await??;
    write("web-1", 7, 3).await?;
    holds("web-1", &[(7, 3), (8, 2)]).await?;

    destroy(&cluster, "web-1").await??;
    for vm in ["web-1", "web-2"] {
        ensure!(link(vm).symlink_metadata().is_err(), "the name of {vm} is left");
    }
    refused(destroy(&cluster, "web-1").await?, Code::NotFound, "web-1")?;
    wait_until(COMES_WITHIN, "the base to be gone", async || {
        let listed = treeboot_dm::Mapper::new()?.list()?;
        let left = listed
            .iter()
            .any(|seen| matches!(seen.device, DmDevice::Disk(_) | DmDevice::Base(_)));
        Ok((!left).then_some(()))
    })
    .await?;
    host.terminate().await?;
    cluster.pass();
    Ok(())
}
