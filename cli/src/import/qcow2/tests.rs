//! The reader against images that `qemu-img` and `qemu-io` made, and against damaged ones.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::*;

/// Whether `qemu-img` is there; where `CI` is set it must be.
fn has_qemu_img() -> bool {
    let there = Command::new("qemu-img").arg("--version").output().is_ok();
    if !there {
        assert!(
            std::env::var_os("CI").is_none(),
            "qemu-img is not installed (Debian: qemu-utils)"
        );
        eprintln!("SKIPPED: qemu-img is not installed (Debian: qemu-utils)");
    }
    there
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// An image made with these options, written to by `qemu-io` commands, and the same as raw.
fn image(dir: &Path, options: &str, size: &str, writes: &[&str]) -> (PathBuf, PathBuf) {
    let (qcow2, raw) = (dir.join("disk.qcow2"), dir.join("disk.raw"));
    let path = qcow2.to_str().unwrap();
    run(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-o", options, path, size],
    );
    for write in writes {
        run("qemu-io", &["-f", "qcow2", "-c", write, path]);
    }
    run(
        "qemu-img",
        &["convert", "-f", "qcow2", "-O", "raw", path, raw.to_str().unwrap()],
    );
    (qcow2, raw)
}

/// Reads the whole disk in pieces that straddle clusters.
async fn content(device: &Qcow2) -> Vec<u8> {
    let bytes = device.geometry().bytes;
    let mut all = vec![0xee; bytes as usize];
    for (index, piece) in all.chunks_mut(5 * 512).enumerate() {
        device.read(index as u64 * 5 * 512, piece).await.unwrap();
    }
    all
}

#[tokio::test]
async fn an_image_reads_as_qemu_reads_it() {
    if !has_qemu_img() {
        return;
    }
    for (options, size) in [
        ("compat=1.1", "4M"),
        ("compat=0.10", "4M"),
        ("compat=1.1,cluster_size=512", "300K"),
        ("compat=1.1,cluster_size=2M", "7M"),
        ("compat=1.1,cluster_size=4096,preallocation=metadata", "3000K"),
        ("compat=1.1,lazy_refcounts=on", "2M"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let writes = [
            "write -P 0x11 0 4k",
            "write -P 0x22 65024 1024",
            "write -P 0x33 200k 70k",
            "write -z 210k 16k",
        ];
        let (qcow2, raw) = image(dir.path(), options, size, &writes);
        let device = Qcow2::open(&qcow2, 512).unwrap_or_else(|error| panic!("{options}: {error}"));
        assert_eq!(device.needs_qemu_img(), None);
        assert!(
            content(&device).await == std::fs::read(&raw).unwrap(),
            "{options}"
        );
    }
}

#[tokio::test]
async fn what_was_never_written_is_a_hole() {
    if !has_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (qcow2, _) = image(dir.path(), "compat=1.1", "2G", &["write -P 1 1G 64k"]);
    let device = Qcow2::open(&qcow2, 512).unwrap();
    assert_eq!(device.stored_bytes(), 65536);
    let mut extents = Vec::new();
    let mut offset = 0;
    while offset < 2 << 30 {
        let extent = device.extent(offset, (2 << 30) - offset).await.unwrap();
        extents.push((offset, extent.bytes, extent.state));
        offset += extent.bytes;
    }
    assert_eq!(
        extents,
        [
            (0, 1 << 30, Provisioning::Hole),
            (1 << 30, 65536, Provisioning::Mapped),
            ((1 << 30) + 65536, (1 << 30) - 65536, Provisioning::Hole)
        ]
    );
}

#[test]
fn compressed_clusters_are_recognised() {
    if !has_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (_, raw) = image(dir.path(), "compat=1.1", "4M", &["write -P 0x11 0 1M"]);
    let packed = dir.path().join("packed.qcow2");
    run(
        "qemu-img",
        &[
            "convert",
            "-c",
            "-O",
            "qcow2",
            raw.to_str().unwrap(),
            packed.to_str().unwrap(),
        ],
    );
    assert_eq!(
        Qcow2::open(&packed, 512).unwrap().needs_qemu_img(),
        Some("compressed clusters")
    );
}

#[test]
fn a_backing_file_is_refused_by_name() {
    if !has_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (base, _) = image(dir.path(), "compat=1.1", "4M", &[]);
    let child = dir.path().join("child.qcow2");
    let arguments = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-F",
        "qcow2",
        "-b",
        base.to_str().unwrap(),
        child.to_str().unwrap(),
    ];
    run("qemu-img", &arguments);
    assert!(
        matches!(Qcow2::open(&child, 512), Err(Qcow2Error::Backing(name)) if name == base.to_str().unwrap())
    );
}

#[test]
fn an_image_cut_off_anywhere_is_refused() {
    if !has_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (qcow2, _) = image(
        dir.path(),
        "compat=1.1,cluster_size=4096",
        "1M",
        &["write -P 1 0 100k"],
    );
    let whole = std::fs::read(&qcow2).unwrap();
    let cut = dir.path().join("cut.qcow2");
    for length in (0..whole.len()).step_by(1024) {
        std::fs::write(&cut, &whole[..length]).unwrap();
        let error = Qcow2::open(&cut, 512).expect_err(&length.to_string());
        assert!(
            matches!(error, Qcow2Error::CutOff { .. } | Qcow2Error::NoHeader(_)),
            "{length}: {error}"
        );
    }
}

#[test]
fn no_damaged_header_or_table_makes_it_panic() {
    if !has_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (qcow2, _) = image(
        dir.path(),
        "compat=1.1,cluster_size=4096",
        "1M",
        &["write -P 1 0 100k"],
    );
    let whole = std::fs::read(&qcow2).unwrap();
    let bad = dir.path().join("bad.qcow2");
    let file = std::fs::OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .open(&bad)
        .unwrap();
    file.write_all_at(&whole, 0).unwrap();
    let tables = 0..whole.len();
    // Every byte of the header, and a byte of each word of the tables, takes extreme values.
    for at in (0..112).chain(tables.step_by(8 * 17)) {
        for value in [0x00, 0x01, 0x7f, 0x80, 0xff] {
            file.write_all_at(&[value], at as u64).unwrap();
            if let Ok(device) = Qcow2::open(&bad, 512) {
                let mut buffer = vec![0; 4096];
                let _ = device.inner.read(0, &mut buffer); // may fail, may not panic
            }
        }
        file.write_all_at(&whole[at..=at], at as u64).unwrap();
    }
    assert!(Qcow2::open(&bad, 512).is_ok(), "every byte was put back");
}

#[test]
fn header_fields_out_of_range_are_named() {
    let check = |at: usize, value: &[u8], expect: &str| {
        let mut head = vec![0; V3];
        for (at, value) in [
            (0, b"QFI\xfb".as_slice()),
            (4, &3_u32.to_be_bytes()),
            (20, &16_u32.to_be_bytes()),
            (24, &(1_u64 << 30).to_be_bytes()),
            (36, &2_u32.to_be_bytes()),
            (40, &(3_u64 << 16).to_be_bytes()),
            (at, value),
        ] {
            head[at..at + value.len()].copy_from_slice(value);
        }
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&head, 0).unwrap();
        file.set_len(4 << 16).unwrap();
        let found = Header::read(&file, 4 << 16).map_or_else(|error| error.to_string(), |_| "valid".into());
        assert_eq!(found, expect);
    };
    const V3: usize = 104;
    check(0, b"Q", "valid");
    check(
        4,
        &4_u32.to_be_bytes(),
        "its version (neither 2 nor 3) is not supported",
    );
    check(
        20,
        &22_u32.to_be_bytes(),
        "it is damaged: its cluster size is not between 512 bytes and 2 MiB",
    );
    check(
        20,
        &8_u32.to_be_bytes(),
        "it is damaged: its cluster size is not between 512 bytes and 2 MiB",
    );
    check(
        24,
        &[0; 8],
        "it is damaged: its disk is empty or its size is no multiple of 512",
    );
    check(
        24,
        &u64::MAX.to_be_bytes(),
        "it is damaged: its disk is empty or its size is no multiple of 512",
    );
    check(32, &1_u32.to_be_bytes(), "encryption is not supported");
    check(
        36,
        &1_u32.to_be_bytes(),
        "it is damaged: its L1 table is too short for the disk's size",
    );
    check(
        40,
        &1_u64.to_be_bytes(),
        "it is damaged: its L1 table's offset is not aligned",
    );
    check(
        72,
        &2_u64.to_be_bytes(),
        "it is damaged: its writer marked it as corrupt",
    );
    check(72, &4_u64.to_be_bytes(), "an external data file is not supported");
    check(
        72,
        &(1_u64 << 40).to_be_bytes(),
        "a feature that this version does not know is not supported",
    );
}
