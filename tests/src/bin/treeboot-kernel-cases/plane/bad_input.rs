//! What a host lacks and what people get wrong: an error that says what, and what to do.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use treeboot_agent::apply::Applier;
use treeboot_agent::conformance::Rig as _;
use treeboot_agent::plane::Scope;
use treeboot_agent::plane::kernel::KernelPlane;
use treeboot_dm::group::Kind;

use super::caching::{attached, leave, reach};
use super::rig::{self, KernelRig, Setup};
use super::{COMES_WITHIN, until};
use crate::devices::{Failing, command, empty_loop, scratch};

/// The helper: starts a plane and says why it does not start.
pub(super) fn open(args: &[String]) -> Result<()> {
    let [dir, kind] = args else {
        bail!("DIR KIND");
    };
    let setup = Setup::from(Some(kind.parse::<Kind>()?));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        match KernelPlane::open(rig::settings(Path::new(dir), &setup)) {
            Ok(_) => println!("it starts"),
            Err(error) => println!("{:#}", anyhow::Error::from(error)),
        }
    });
    Ok(())
}

/// What a plane says that is started so.
fn said(dir: &Path, kind: Kind, change: impl FnOnce(&mut Command)) -> String {
    let mut helper = Command::new(std::env::current_exe().expect("a path"));
    helper
        .args(["helper", "plane-cache", "open"])
        .arg(dir)
        .arg(kind.to_string());
    change(&mut helper);
    let output = helper.output().expect("started");
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

fn must(program: &str, arguments: &[&str]) {
    command(program, arguments).unwrap_or_else(|error| panic!("{error:#}"));
}

/// No root, no module, no open-iscsi, no configfs.
pub(super) async fn what_a_host_lacks() {
    let dir = scratch("lacking").expect("a folder");
    std::fs::create_dir_all(&dir).expect("a folder");
    let check = |said: String, words: &[&str]| {
        for word in words {
            assert!(said.contains(word), "'{word}' is not in: {said}");
        }
    };
    let as_nobody = |helper: &mut Command| {
        std::os::unix::process::CommandExt::uid(helper, 65534);
    };
    check(
        said(&dir, Kind::Bcache, as_nobody),
        &["needs root", "sudo", "--plane user"],
    );

    // Nothing finds a program, and so neither modprobe nor iscsiadm is there.
    let without_programs = |helper: &mut Command| {
        helper.env("PATH", "/nonexistent");
    };
    must("modprobe", &["-r", "dm_flakey"]);
    let no_module = said(&dir, Kind::DmCache, without_programs);
    must("modprobe", &["dm_flakey"]);
    check(
        no_module,
        &["'dm_flakey'", "modprobe dm_flakey", "linux-image-amd64"],
    );
    check(
        said(&dir, Kind::DmCache, without_programs),
        &["iscsiadm", "apt-get install open-iscsi"],
    );

    must("umount", &["/sys/kernel/config"]);
    let no_configfs = said(&dir, Kind::Bcache, |_| {});
    must("mount", &["-t", "configfs", "configfs", "/sys/kernel/config"]);
    check(no_configfs, &["configfs", "mount -t configfs"]);
    check(said(&dir, Kind::Bcache, |_| {}), &["it starts"]);
}

/// An image that is no whole number of blocks is refused by its size, with the way out, and nothing of it stays.
pub(super) async fn half_a_block() {
    let rig = rig::rig(Some(Kind::Bcache)).await;
    let image = rig.image(0);
    let mut wanted = attached([&image]);
    wanted.disks.clear();
    for base in wanted.bases.values_mut() {
        base.content.bytes -= 512;
    }
    let applier = Applier {
        plane: rig.plane(),
        journal: rig.journal(),
    };
    let error = applier
        .reach(&Scope::All, &wanted)
        .await
        .expect_err("half a block");
    let text = format!("{:#}", anyhow::Error::from(error));
    let bytes = (image.content.bytes - 512).to_string();
    for word in [bytes.as_str(), "4096", "truncate -s %4096", "user plane"] {
        assert!(text.contains(word), "'{word}' is not in: {text}");
    }
    drop(applier);
    // A login that was under way may end after its paths were dropped; the next plan sweeps it.
    let begun = Instant::now();
    loop {
        leave(&rig).await;
        let residue = rig.residue().await;
        if residue.is_empty() {
            break;
        }
        assert!(begun.elapsed() < COMES_WITHIN, "{residue:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// What the agent says of a cache that it cannot have; its images are served all the same.
async fn refused(rig: &KernelRig) -> String {
    let image = rig.image(0);
    reach(rig, &attached([&image])).await;
    until("the complaint", || !rig.plane().troubles().is_empty()).await;
    let read = rig::read_device(&rig.disk(&"vm-0".parse().expect("a name")), 0, image.bytes.len());
    assert!(read.expect("readable") == *image.bytes, "other bytes");
    let troubles = rig.plane().troubles();
    assert_eq!(troubles[0].name, image.content.digest.to_string());
    let why = troubles[0].why.clone();
    leave(rig).await;
    why
}

/// A cache device that somebody uses, and one that holds something, are named, and stay as they are.
pub(super) async fn a_cache_device_of_somebody() {
    let taken = Failing::make(160 << 20).expect("a device");
    let rig = rig::rig_with(Setup {
        devices: vec![taken.below.path.clone()],
        ..Some(Kind::Bcache).into()
    })
    .await;
    let why = refused(&rig).await;
    assert!(
        why.contains(&taken.below.number.to_string()) && why.contains("in use by failing"),
        "{why}"
    );
    drop(rig);
    rig::tidy_up().await;
    taken.remove().expect("nobody uses it");

    let disk = empty_loop("disk", 160 << 20).expect("a device");
    let path = scratch("disk").expect("a path");
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(path)
        .expect("a file");
    std::os::unix::fs::FileExt::write_all_at(&file, b"EFI PART", 512).expect("written");
    file.sync_all().expect("written");
    let rig = rig::rig_with(Setup {
        devices: vec![disk.path.clone()],
        ..Some(Kind::Bcache).into()
    })
    .await;
    let why = refused(&rig).await;
    assert!(why.contains("not empty") && why.contains("wipefs"), "{why}");
}
