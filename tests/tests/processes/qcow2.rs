//! A VM's disk as a qcow2 file which `qemu-img` reads, and as one which `qemu-img` wrote.

use anyhow::{Context as _, Result, ensure};
use treeboot_iscsi::initiator::{CommandData, Session};
use treeboot_proto::v1;
use treeboot_tests::cluster::{Cluster, Plan};
use treeboot_tests::daemon::Daemon;
use treeboot_tests::image::Pattern;
use treeboot_tests::need::{Need, require};
use treeboot_tests::reader::{log_in, write_blocks};

use crate::support::{Machine, refused, with_cluster};

const IMAGE: &str = "pattern";
const PATTERN: Pattern = Pattern {
    seed: 97,
    bytes: 32 << 20,
};
const BLOCK: u64 = 4096;
/// Blocks that a VM writes, each eighth of the disk.
const WRITTEN: u64 = 256;
const STEP: u64 = 8;

fn with_qemu_img(name: &str, test: impl AsyncFnOnce(&Cluster) -> Result<()> + Send + 'static) -> Result<()> {
    if !require(&[Need::Program("qemu-img", "qemu-utils")]) {
        return Ok(());
    }
    let plan = Plan {
        hosts: 1,
        secure: true,
        ..Plan::default()
    };
    with_cluster(name, Machine::Shared, plan, test)
}

async fn import(cluster: &Cluster) -> Result<()> {
    let file = cluster.path().join("pattern.raw");
    PATTERN.write(&file)?;
    cluster.import(&file, IMAGE).await
}

/// A VM's disk, through its LUN.
async fn content(agent: &Daemon, vm: &str) -> Result<Vec<u8>> {
    let (session, lun) = log_in(agent, IMAGE, vm).await?;
    let mut content = Vec::new();
    for part in (0..PATTERN.bytes).step_by(1 << 18) {
        content.extend_from_slice(&session.read(lun, part, 1 << 18).await?);
    }
    Ok(content)
}

#[test]
fn a_disk_goes_into_a_qcow2_file_which_qemu_img_reads() -> Result<()> {
    with_qemu_img("export", exported)
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

fn qemu(cluster: &Cluster, program: &str, args: &[&str]) -> Result<String> {
    let mut command = cluster.scratch().command(program);
    let output = command.current_dir(cluster.path()).args(args).output()?;
    let words = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {args:?}: {words}");
    Ok(String::from_utf8(output.stdout)?)
}

fn qemu_img(cluster: &Cluster, args: &[&str]) -> Result<String> {
    qemu(cluster, "qemu-img", args)
}

/// What QEMU reads of a file.
fn plain(cluster: &Cluster, file: &str) -> Result<Vec<u8>> {
    qemu_img(cluster, &["convert", "-O", "raw", file, "plain.raw"])?;
    Ok(std::fs::read(cluster.path().join("plain.raw"))?)
}

async fn exported(cluster: &Cluster) -> Result<()> {
    import(cluster).await?;
    let here = &cluster.hosts[0];
    let (session, lun) = log_in(here, IMAGE, "web-1").await?;
    let each = |first| (0..WRITTEN).map(|n| first + n * STEP).collect::<Vec<_>>();
    write_blocks(&session, lun, &each(0), 5).await?;
    // Zeroes where the image has bytes, and a run of them.
    write_blocks(&session, lun, &each(3), 0).await?;
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
        ensure!(
            plain(cluster, file)? == expected,
            "{file} has other bytes than the disk"
        );
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

#[test]
fn a_disk_comes_from_a_qcow2_file_which_qemu_wrote() -> Result<()> {
    with_qemu_img("delta-import", imported)
}

async fn imported(cluster: &Cluster) -> Result<()> {
    import(cluster).await?;
    let here = &cluster.hosts[0];
    let at = |name: &str| cluster.path().join(name).display().to_string();
    let over = |name: &str, options: &str| {
        let options = format!("backing_file=pattern.raw,backing_fmt=raw,{options}");
        qemu_img(cluster, &["create", "-q", "-f", "qcow2", "-o", &options, name])
    };
    let written = |name: &str| {
        let writes = ["write -P 17 1M 70k", "write -P 34 31M 1M", "write -z 5M 640k"];
        let mut args = vec!["-f", "qcow2"];
        args.extend(writes.iter().flat_map(|write| ["-c", *write]));
        args.push(name);
        qemu(cluster, "qemu-io", &args)
    };
    over("over.qcow2", "cluster_size=64k")?;
    written("over.qcow2")?;
    let expected = plain(cluster, "over.qcow2")?;
    let told = cluster
        .treeboot(&[
            "delta",
            "import",
            "web-1",
            &at("over.qcow2"),
            "--image",
            "pattern@1",
            "--host",
            "h1",
            "--backing",
            &at("pattern.raw"),
            "--json",
        ])
        .await?;
    let told: serde_json::Value = serde_json::from_str(&told)?;
    // The clusters that were written, as whole ones.
    ensure!(
        told["data_bytes"] == (128 << 10) + (1 << 20)
            && told["zero_bytes"] == 640 << 10
            && told["compared"] == true
            && told["backing"] == "pattern.raw",
        "{told}"
    );
    ensure!(content(here, "web-1").await? == expected, "web-1 has other bytes");

    // There and back again; and a file that stands by itself.
    let again = at("again.qcow2");
    cluster
        .treeboot(&[
            "delta",
            "export",
            "web-1",
            &again,
            "--backing",
            &at("pattern.raw"),
        ])
        .await?;
    qemu_img(cluster, &["convert", "-O", "qcow2", "over.qcow2", "whole.qcow2"])?;
    for (vm, file) in [("web-2", &again), ("web-3", &at("whole.qcow2"))] {
        let args = ["delta", "import", vm, file, "--image", IMAGE, "--host", "h1"];
        let told = cluster.treeboot(&args).await?;
        ensure!(told.contains(&format!("treeboot vm start {vm}")), "{told}");
        ensure!(content(here, vm).await? == expected, "{vm} has other bytes");
    }

    // What cannot be one.
    std::fs::write(
        cluster.path().join("other.raw"),
        vec![0x99; PATTERN.bytes as usize],
    )?;
    over("small-clusters.qcow2", "cluster_size=512")?;
    qemu_img(
        cluster,
        &["convert", "-c", "-O", "qcow2", "over.qcow2", "packed.qcow2"],
    )?;
    qemu_img(cluster, &["create", "-q", "-f", "qcow2", "longer.qcow2", "33M"])?;
    let cut = std::fs::read(cluster.path().join("over.qcow2"))?;
    std::fs::write(cluster.path().join("cut.qcow2"), &cut[..cut.len() - (1 << 20)])?;
    for (file, exit, words) in [
        ("small-clusters.qcow2", 7, "-B pattern.raw"),
        ("packed.qcow2", 7, "compressed clusters"),
        ("longer.qcow2", 7, "34603008"),
        ("cut.qcow2", 1, "truncated"),
        ("pattern.raw", 1, "does not begin like a qcow2 image"),
        ("none.qcow2", 3, "none.qcow2"),
    ] {
        let file = at(file);
        let args = [
            "delta", "import", "web-9", &file, "--image", IMAGE, "--host", "h1",
        ];
        refused(cluster, &args, exit, words).await?;
    }
    let file = at("over.qcow2");
    for (vm, image, host, backing, exit, words) in [
        ("web-1", IMAGE, "h1", "pattern.raw", 4, "web-1"),
        ("web-9", "pattern@9", "h1", "pattern.raw", 3, "pattern@9"),
        ("web-9", IMAGE, "h9", "pattern.raw", 3, "h9"),
        ("web-9", IMAGE, "h1", "other.raw", 7, "another content"),
    ] {
        let backing = at(backing);
        let args = [
            "delta",
            "import",
            vm,
            &file,
            "--image",
            image,
            "--host",
            host,
            "--backing",
            &backing,
        ];
        refused(cluster, &args, exit, words).await?;
    }
    // A person sends no layer of a VM that moves.
    let header = v1::DiskHeader {
        vm: "web-9".into(),
        layer: Some(1),
        ..v1::DiskHeader::default()
    };
    let part = Some(v1::disk_part::Part::Header(header));
    let sent = tokio_stream::iter([v1::DiskPart { part }]);
    let answer = here.agent().await?.receive_disk(sent).await;
    ensure!(
        answer.is_err_and(|status| status.code() == tonic::Code::InvalidArgument),
        "a layer was taken"
    );
    let left = std::fs::read_dir(here.folder().join("state/deltas"))?;
    for entry in left {
        let name = entry?.file_name().into_string().ok().context("a name")?;
        ensure!(
            !name.contains("web-9") && !name.ends_with(".incoming"),
            "{name} is left"
        );
    }
    Ok(())
}
