//! A VM's disk as a new version of its image: the origin keeps what differs, and other VMs boot from it. And as a qcow2 file, which `qemu-img`
//! reads.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use treeboot_iscsi::initiator::{CommandData, Session};
use treeboot_proto::v1;
use treeboot_tests::cluster::{Cluster, Plan};
use treeboot_tests::daemon::Daemon;
use treeboot_tests::image::Pattern;
use treeboot_tests::need::{Need, require};
use treeboot_tests::reader::log_in;
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

async fn write(session: &Session, lun: u16, fill: u8, first: u64) -> Result<()> {
    for n in 0..WRITTEN {
        let at = (first + n * STEP) * BLOCK;
        session.write(lun, at, vec![fill; BLOCK as usize].into()).await?;
    }
    session.flush(lun).await?;
    Ok(())
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
    write(&session, lun, 7, 0).await?;
    cluster
        .treeboot(&["snapshot", "create", "web-1", "updated"])
        .await?;
    // Not part of it.
    write(&session, lun, 8, 1).await?;
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
    write(&second, second_lun, 9, 2).await?;
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
    write(&session, lun, 3, 0).await?;
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

#[test]
fn a_disk_goes_into_a_qcow2_file_which_qemu_img_reads() -> Result<()> {
    if !require(&[Need::Program("qemu-img", "qemu-utils")]) {
        return Ok(());
    }
    with_cluster("export", Machine::Shared, plan(), exported)
}

/// UNMAP of one range (SBC-3, 5.28), in the LUN's blocks of 512.
async fn unmap(session: &Session, lun: u16, offset: u64, bytes: u64) -> Result<()> {
    let mut list = vec![0, 22, 0, 16, 0, 0, 0, 0];
    list.extend((offset / 512).to_be_bytes());
    list.extend(u32::try_from(bytes / 512)?.to_be_bytes());
    list.extend([0; 4]);
    let cdb = [0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0];
    session.command(lun, &cdb, CommandData::Out(list.into())).await?;
    Ok(())
}

fn qemu_img(cluster: &Cluster, args: &[&str]) -> Result<String> {
    let mut command = cluster.scratch().command("qemu-img");
    let output = command.current_dir(cluster.path()).args(args).output()?;
    let words = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "qemu-img {args:?}: {words}");
    Ok(String::from_utf8(output.stdout)?)
}

async fn exported(cluster: &Cluster) -> Result<()> {
    import(cluster).await?;
    let here = &cluster.hosts[0];
    let (session, lun) = log_in(here, IMAGE, "web-1").await?;
    write(&session, lun, 5, 0).await?;
    // Zeroes where the image has bytes, and a run of them.
    write(&session, lun, 0, 3).await?;
    unmap(&session, lun, 4096 * BLOCK, 2048 * BLOCK).await?;
    let mut expected = std::fs::read(cluster.path().join("pattern.raw"))?;
    for n in 0..WRITTEN {
        for (fill, first) in [(5, 0), (0, 3)] {
            let at = ((first + n * STEP) * BLOCK) as usize;
            expected[at..at + BLOCK as usize].fill(fill);
        }
    }
    expected[(4096 * BLOCK) as usize..(6144 * BLOCK) as usize].fill(0);
    let at = |name: &str| cluster.path().join(name).display().to_string();
    let (whole, over) = (at("whole.qcow2"), at("over.qcow2"));
    cluster.treeboot(&["delta", "export", "web-1", &whole]).await?;
    let told = cluster
        .treeboot(&[
            "delta",
            "export",
            "web-1",
            &over,
            "--backing",
            &at("pattern.raw"),
            "--json",
        ])
        .await?;
    let told: serde_json::Value = serde_json::from_str(&told)?;
    let bytes = told["file_bytes"].as_u64().context("a size")?;
    ensure!(
        bytes == std::fs::metadata(&over)?.len() && bytes < 4 << 20,
        "{told}"
    );
    for file in [&whole, &over] {
        let checked = qemu_img(cluster, &["check", file])?;
        ensure!(checked.contains("No errors were found"), "{checked}");
        qemu_img(cluster, &["convert", "-O", "raw", file, "plain.raw"])?;
        let plain = std::fs::read(cluster.path().join("plain.raw"))?;
        ensure!(plain == expected, "{file} has other bytes than the disk");
    }
    // The file, imported, is what would be published.
    let published = cluster.treeboot(&["publish", "web-1", "--json"]).await?;
    let imported = cluster
        .treeboot(&["image", "import", &whole, "again", "--json"])
        .await?;
    let digest = |text: &str| -> Result<String> {
        let told: serde_json::Value = serde_json::from_str(text)?;
        Ok(told["digest"].as_str().context("a digest")?.to_owned())
    };
    ensure!(
        digest(&published)? == digest(&imported)?,
        "{published} {imported}"
    );
    refused(cluster, &["delta", "export", "web-1", &whole], 4, "exists").await?;
    refused(
        cluster,
        &["delta", "export", "nobody", &at("none.qcow2")],
        3,
        "nobody",
    )
    .await?;
    std::fs::write(cluster.path().join("small.raw"), [1; 8192])?;
    let small = at("small.raw");
    refused(
        cluster,
        &["delta", "export", "web-1", &at("none.qcow2"), "--backing", &small],
        7,
        "8192",
    )
    .await?;
    ensure!(
        !cluster.path().join("none.qcow2").exists(),
        "a file of nothing is left"
    );
    Ok(())
}
