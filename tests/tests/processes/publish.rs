//! A VM's disk as a new version of its image: the origin keeps what differs, and other VMs boot from it.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use treeboot_proto::v1;
use treeboot_tests::cluster::{Cluster, Plan};
use treeboot_tests::daemon::Daemon;
use treeboot_tests::image::Pattern;
use treeboot_tests::reader::{log_in, write_blocks};
use treeboot_tests::wait::wait_until;

use crate::support::{Machine, refused, with_cluster};

const IMAGE: &str = "pattern";
const PATTERN: Pattern = Pattern {
    seed: 91,
    bytes: 32 << 20,
};
const BLOCK: u64 = 4096;
const SOON: Duration = Duration::from_secs(60);
/// Blocks that a VM writes, each eighth of the disk.
const WRITTEN: u64 = 256;
const STEP: u64 = 8;
/// What a new version may take beside its own blocks: the changed part of its hash tree, two maps, file system blocks.
const BESIDE: u64 = 300 << 10;

fn plan() -> Plan {
    Plan {
        hosts: 2,
        secure: true,
        ..Plan::default()
    }
}

async fn import(cluster: &Cluster) -> Result<()> {
    let file = cluster.path().join("pattern.raw");
    PATTERN.write(&file)?;
    cluster.import(&file, IMAGE).await
}

/// Blocks, each eighth of the disk from `first` on.
fn each(first: u64) -> Vec<u64> {
    (0..WRITTEN).map(|n| first + n * STEP).collect()
}

/// A new VM's disk has `fill` at each eighth block from `first` on, for each of `written`, and the image's bytes elsewhere.
async fn check(agent: &Daemon, vm: &str, written: &[(u8, u64)]) -> Result<()> {
    let (session, lun) = log_in(agent, IMAGE, vm).await?;
    for part in (0..PATTERN.bytes).step_by(1 << 18) {
        let read = session.read(lun, part, 1 << 18).await?;
        for (n, block) in (part / BLOCK..).zip(read.chunks(BLOCK as usize)) {
            let mine = written
                .iter()
                .find(|(_, first)| n % STEP == *first && n / STEP < WRITTEN);
            let right = match mine {
                Some((fill, _)) => block.iter().all(|byte| byte == fill),
                None => PATTERN.first_wrong_block(n * BLOCK, block).is_none(),
            };
            ensure!(right, "{vm}: block {n} is not what it should be");
        }
    }
    Ok(())
}

/// Blocks on disk of each of the store's directories; a file with several links counts once, where it is met first.
fn stored(origin: &Daemon) -> Result<Vec<(PathBuf, u64)>> {
    use std::os::unix::fs::MetadataExt as _;
    let mut seen = std::collections::BTreeSet::new();
    let mut stored = Vec::new();
    let store = origin.folder().join("store");
    let mut images: Vec<_> = std::fs::read_dir(store)?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    images.sort_by_key(|path| std::fs::metadata(path).and_then(|data| data.created()).ok());
    for image in images {
        let (mut bytes, mut dirs) = (0, vec![image.clone()]);
        while let Some(dir) = dirs.pop() {
            for entry in std::fs::read_dir(dir)? {
                let entry = entry?;
                let data = entry.metadata()?;
                if data.is_dir() {
                    dirs.push(entry.path());
                } else if seen.insert(data.ino()) {
                    bytes += data.blocks() * 512;
                }
            }
        }
        stored.push((image, bytes));
    }
    Ok(stored)
}

#[test]
fn a_fleet_is_updated_from_a_vm_and_the_origin_keeps_what_differs() -> Result<()> {
    with_cluster("publish", Machine::Shared, plan(), updated)
}

async fn updated(cluster: &Cluster) -> Result<()> {
    import(cluster).await?;
    let origin = &cluster.origin;
    let (here, there) = (&cluster.hosts[0], &cluster.hosts[1]);
    let whole = stored(origin)?;
    let (session, lun) = log_in(here, IMAGE, "web-1").await?;
    write_blocks(&session, lun, &each(0), 7).await?;
    cluster
        .treeboot(&["snapshot", "create", "web-1", "updated"])
        .await?;
    // Not part of it.
    write_blocks(&session, lun, &each(1), 8).await?;
    let told = cluster
        .treeboot(&["publish", "web-1", "--snapshot", "updated", "--json"])
        .await?;
    let told: serde_json::Value = serde_json::from_str(&told)?;
    ensure!(
        told["image"] == "pattern@2" && told["allocated_bytes"] == WRITTEN * BLOCK && told["created"] == true,
        "{told}"
    );
    let both = stored(origin)?;
    let added: u64 = both.iter().map(|(_, bytes)| bytes).sum::<u64>() - whole[0].1;
    ensure!(
        (WRITTEN * BLOCK..=WRITTEN * BLOCK + BESIDE).contains(&added),
        "{added} bytes were added for {} of blocks",
        WRITTEN * BLOCK
    );
    println!("{added} bytes for {} of blocks", WRITTEN * BLOCK);
    // The newest; a VM of it on another host, and the old VM as it was.
    check(there, "web-2", &[(7, 0)]).await?;
    let old = session.read(lun, BLOCK, BLOCK as u32).await?;
    ensure!(old.iter().all(|byte| *byte == 8), "the VM lost what it wrote");

    // A version of a version, of the disk as it is now, after the agent of the origin was killed.
    let (second, second_lun) = log_in(there, IMAGE, "web-3").await?;
    write_blocks(&second, second_lun, &each(2), 9).await?;
    origin.kill()?;
    cluster.restart(origin).await?;
    let told = cluster.treeboot(&["publish", "web-3", "pattern@3"]).await?;
    ensure!(told.starts_with("pattern@3  32.0 MiB, 1.00 MiB stored"), "{told}");
    check(here, "web-4", &[(7, 0), (9, 2)]).await?;
    // The same content again is the same version.
    let again = cluster.treeboot(&["publish", "web-3", "pattern@3"]).await?;
    ensure!(again.contains("was there already"), "{again}");

    // The versions below are removed; what stands on them stays.
    drop((session, second));
    for vm in ["web-1", "web-2", "web-3"] {
        cluster.treeboot(&["vm", "destroy", vm]).await?;
    }
    for version in ["pattern@1", "pattern@2"] {
        cluster.treeboot(&["image", "remove", version, "--force"]).await?;
    }
    let gone = wait_until(SOON, "the old versions to be gone", || async {
        Ok((stored(origin)?.len() == 1).then_some(()))
    });
    gone.await?;
    cluster.treeboot(&["vm", "destroy", "web-4"]).await?;
    check(there, "web-5", &[(7, 0), (9, 2)]).await?;
    let told = cluster.treeboot(&["image", "flatten", "pattern@3"]).await?;
    ensure!(told.contains("stands by itself"), "{told}");
    let flat = stored(origin)?[0].1;
    ensure!(flat >= whole[0].1, "{flat} bytes of {}", whole[0].1);
    let shown = cluster
        .treeboot(&["image", "show", "pattern@3", "--json"])
        .await?;
    let shown: serde_json::Value = serde_json::from_str(&shown)?;
    ensure!(
        shown["allocated_bytes"].as_u64() > Some(PATTERN.bytes / 2),
        "the coordinator tells what it took before: {shown}"
    );
    let told = cluster
        .treeboot(&["image", "flatten", "pattern@3", "--json"])
        .await?;
    ensure!(told.contains("\"shared\": false"), "{told}");
    let (directory, _) = stored(origin)?.pop().context("the version")?;
    ensure!(
        !directory.join("base").exists(),
        "links are left in {}",
        directory.display()
    );
    origin.kill()?;
    cluster.restart(origin).await?;
    check(here, "web-6", &[(7, 0), (9, 2)]).await
}

#[test]
fn what_cannot_be_published_is_refused_and_leaves_nothing() -> Result<()> {
    with_cluster("publish-refused", Machine::Shared, plan(), refusals)
}

async fn refusals(cluster: &Cluster) -> Result<()> {
    import(cluster).await?;
    let (origin, here) = (&cluster.origin, &cluster.hosts[0]);
    let (session, lun) = log_in(here, IMAGE, "web-1").await?;
    write_blocks(&session, lun, &each(0), 3).await?;
    refused(cluster, &["publish", "nobody"], 3, "treeboot vm list").await?;
    refused(cluster, &["publish", "web-1", "--snapshot", "never"], 3, "never").await?;
    refused(cluster, &["publish", "web-1", "--to", "h9"], 3, "h9").await?;
    // A host without a store, and a version that is another content.
    refused(cluster, &["publish", "web-1", "--to", "h2"], 7, "--store").await?;
    refused(cluster, &["publish", "web-1", "pattern@1"], 4, "never changes").await?;
    refused(cluster, &["image", "flatten", "pattern@9"], 3, "pattern@9").await?;
    let whole = stored(origin)?;
    ensure!(whole.len() == 1, "{whole:?}");
    // The origin dies while it takes it in.
    let header = v1::ImportHeader {
        image: Some(v1::ImageId {
            name: IMAGE.into(),
            version: 0,
        }),
        bytes: PATTERN.bytes,
        chunk_bytes: 0,
        base: Some(v1::ImageId {
            name: IMAGE.into(),
            version: 1,
        }),
    };
    let (parts, stream) = tokio::sync::mpsc::channel(4);
    let part = |part| v1::ImportPart { part: Some(part) };
    parts.send(part(v1::import_part::Part::Header(header))).await?;
    let data = v1::ImportData {
        offset: 0,
        data: vec![1; 1 << 20],
    };
    parts.send(part(v1::import_part::Part::Data(data))).await?;
    let mut agent = origin.agent().await?;
    let importing = tokio::spawn(async move {
        agent
            .import_image(tokio_stream::wrappers::ReceiverStream::new(stream))
            .await
    });
    let begun = wait_until(SOON, "the import to begin", || async {
        Ok((stored(origin)?.len() == 2).then_some(()))
    });
    begun.await?;
    origin.kill()?;
    ensure!(importing.await?.is_err(), "an import outlived its agent");
    refused(cluster, &["publish", "web-1", "--to", "origin"], 5, "origin").await?;
    cluster.restart(origin).await?;
    let left = stored(origin)?;
    ensure!(left.len() == 1, "{left:?}");
    drop(parts);
    let told = cluster.treeboot(&["publish", "web-1"]).await?;
    ensure!(told.starts_with("pattern@2"), "{told}");
    check(&cluster.hosts[1], "web-2", &[(3, 0)]).await
}
