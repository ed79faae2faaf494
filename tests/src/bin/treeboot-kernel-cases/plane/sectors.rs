//! An image that counts in blocks of 512 bytes, on a disk whose blocks have 4 KiB: how a host mounts it.

use std::path::Path;

use treeboot_agent::conformance::Rig as _;
use treeboot_dm::group::Kind;
use treeboot_types::VmName;

use super::caching::{attached, leave, reach};
use super::rig::{self, Setup};
use crate::devices::command;

const SECTOR: usize = 512;
/// Where the partition begins; no multiple of 4 KiB, as of images of old.
const FIRST: u32 = 63;
const BLOCKS: usize = 4096;

fn run(program: &str, arguments: &[&str]) -> String {
    let said = command(program, arguments).unwrap_or_else(|error| panic!("{error:#}"));
    said.trim().to_owned()
}

/// A partition table of one Linux partition, in units of 512 bytes.
fn table(sectors: u32) -> Vec<u8> {
    let mut sector = vec![0; SECTOR];
    sector[446 + 4] = 0x83;
    sector[446 + 8..446 + 12].copy_from_slice(&FIRST.to_le_bytes());
    sector[446 + 12..446 + 16].copy_from_slice(&(sectors - FIRST).to_le_bytes());
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

/// A loop device of 512-byte blocks over the disk has its partitions; a file system of 1 KiB blocks in one is mounted, written and
/// found again, after a restart of the agent too.
pub(super) async fn a_partition_in_units_of_512_bytes() {
    let mut rig = rig::rig_with(Setup {
        blocks: BLOCKS,
        ..Some(Kind::Bcache).into()
    })
    .await;
    let image = rig.image(0);
    reach(&rig, &attached([&image])).await;
    let vm: VmName = "vm-0".parse().expect("a name");
    let disk = rig.disk(&vm).display().to_string();
    assert_eq!(run("blockdev", &["--getss", &disk]), "4096");
    let over = || {
        run(
            "losetup",
            &["--find", "--show", "--partscan", "--sector-size", "512", &disk],
        )
    };

    let device = over();
    assert_eq!(run("blockdev", &["--getss", &device]), "512");
    std::fs::OpenOptions::new()
        .write(true)
        .open(&device)
        .and_then(|file| {
            std::os::unix::fs::FileExt::write_all_at(&file, &table((BLOCKS * 8) as u32), 0)?;
            file.sync_all()
        })
        .expect("a partition table");
    run("blockdev", &["--rereadpt", &device]);
    run(
        "mkfs.ext4",
        &[
            "-q",
            "-F",
            "-b",
            "1024",
            "-O",
            "^has_journal",
            &format!("{device}p1"),
        ],
    );
    let place = rig.dir.join("mounted");
    std::fs::create_dir(&place).expect("a folder");
    let (file, place) = (place.join("file"), place.display().to_string());
    run("mount", &["-t", "ext4", &format!("{device}p1"), &place]);
    let bytes: Vec<u8> = (0..3_000_001_u32).map(|i| (i % 251) as u8).collect();
    std::fs::write(&file, &bytes).expect("written");
    run("umount", &[&place]);
    run("losetup", &["--detach", &device]);

    rig.restart().await;
    let device = over();
    run("mount", &["-t", "ext4", &format!("{device}p1"), &place]);
    assert!(
        std::fs::read(&file).expect("readable") == bytes,
        "the file differs"
    );
    run("umount", &[&place]);
    run("losetup", &["--detach", &device]);
    assert!(!Path::new(&format!("{device}p1")).exists(), "a partition stayed");
    leave(&rig).await;
    assert_eq!(rig.residue().await, Vec::<String>::new());
}
