//! Imports against an agent that is played: what arrives is the disk, and nothing of it twice.

// Helpers are outside of what clippy takes for a test.
#![allow(clippy::unwrap_used)]

mod support;

use std::os::unix::fs::FileExt;

use support::fake::Fakes;
use support::{has, text, tool, treeboot, wait_for};

const DISK: usize = 8 << 20;

/// A sparse disk with a little in it, some of it zeroes that are stored.
fn disk(path: &std::path::Path) -> Vec<u8> {
    let file = std::fs::File::create(path).unwrap();
    file.set_len(DISK as u64).unwrap();
    for (offset, byte, length) in [
        (0, 1, 512),
        (70_000, 2, 100_000),
        (3 << 20, 0, 1 << 20),
        (DISK - 10, 3, 10),
    ] {
        file.write_all_at(&vec![byte; length], offset as u64).unwrap();
    }
    std::fs::read(path).unwrap()
}

#[test]
fn every_format_arrives_as_the_same_disk_and_stays_sparse() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("disk.raw");
    let content = disk(&raw);
    let fakes = Fakes::start(&[("origin", &["store"]), ("host-1", &["vms"])]);
    // The names lie on purpose: formats are told by content.
    for (format, options, name) in [
        ("raw", "", "a.qcow2"),
        ("qcow2", "", "b.raw"),
        ("qcow2", "-c", "c"),
        ("vmdk", "", "d.vdi"),
        ("vdi", "", "e"),
        ("vhdx", "", "f"),
        ("vpc", "", "g"),
        ("qed", "", "h"),
    ] {
        let path = dir.path().join(name);
        let mut arguments = vec!["convert", "-f", "raw", "-O", format];
        arguments.extend((!options.is_empty()).then_some(options));
        // Other than that, VHD rounds a disk's size to a geometry.
        arguments.extend(["-o", "force_size=on"].iter().filter(|_| format == "vpc"));
        arguments.extend([text(&raw), text(&path)]);
        tool("qemu-img", &arguments);
        fakes.world.lock().unwrap().import_payload = 0;
        let scratch = dir.path().join("scratch");
        std::fs::create_dir_all(&scratch).unwrap();
        let imported = fakes
            .run(&[
                "image",
                "import",
                text(&path),
                "debian",
                "--json",
                "--scratch",
                text(&scratch),
            ])
            .ok();
        let json = imported.json();
        assert_eq!(
            (&json["image"], &json["host"]),
            (&"debian@1".into(), &"origin".into()),
            "{format}"
        );
        assert_eq!(
            json["urls"][0],
            "iscsi://127.0.0.1:3260/iqn.2026-11.dev.treeboot:image:debian:1/0"
        );
        let world = fakes.world.lock().unwrap();
        assert!(world.imports.last().unwrap()[..] == content[..], "{format}");
        // 1 + 25 + 1 blocks of 4 KiB are not zero.
        assert_eq!(world.import_payload, 27 * 4096, "{format}");
        assert_eq!(json["sent_bytes"], 27 * 4096, "{format}");
        assert_eq!(
            std::fs::read_dir(&scratch).unwrap().count(),
            0,
            "{format} left a converted copy"
        );
    }
}

#[test]
fn it_says_where_the_bytes_go_and_which_process_serves_them() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("disk.raw");
    disk(&raw);
    let fakes = Fakes::start(&[("origin", &["store"])]);
    let imported = fakes.run(&["image", "import", text(&raw), "debian@3"]).ok();
    assert!(
        imported.stderr.contains("into the store of host 'origin'"),
        "{imported:?}"
    );
    for words in [
        "debian@3  8.00 MiB",
        "/store/0707 on host 'origin'",
        "serves    iscsi://",
        "treeboot-agent on host 'origin'",
    ] {
        assert!(imported.stdout.contains(words), "{words}: {imported:?}");
    }
}

#[test]
fn a_refusal_of_the_agent_keeps_its_words_and_its_code() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("disk.raw");
    disk(&raw);
    let fakes = Fakes::start(&[("origin", &["store"])]);
    for (status, exit) in [
        (
            tonic::Status::already_exists(
                "the image 'debian@1' has other content; import it as another version",
            ),
            4,
        ),
        (
            tonic::Status::resource_exhausted("no room left in /store; 12 MiB are needed"),
            9,
        ),
    ] {
        fakes.world.lock().unwrap().refuse_imports = Some(status.clone());
        let refused = fakes.run(&["image", "import", text(&raw), "debian@1"]);
        assert_eq!(refused.exit, exit, "{refused:?}");
        assert!(
            refused
                .stderr
                .contains(status.message().split(';').next().unwrap()),
            "{refused:?}"
        );
    }
}

/// Starts an import whose first part the agent has and whose last it cannot have: it holds still, and the disk is
/// larger than all that is buffered on the way.
fn import_under_way(dir: &std::path::Path, fakes: &Fakes) -> (std::process::Child, std::fs::File) {
    let raw = dir.join("disk.raw");
    let file = std::fs::File::create(&raw).unwrap();
    for index in 0..64_u64 {
        file.write_all_at(&[1; 1 << 20], index << 20).unwrap();
    }
    fakes.world.lock().unwrap().hold_imports = true;
    let child = treeboot()
        .env("TREEBOOT_COORDINATOR", &fakes.coordinator)
        .args(["image", "import", text(&raw), "debian"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    wait_for("the first part", || {
        (fakes.world.lock().unwrap().import_payload > 0).then_some(())
    });
    (child, file)
}

/// Waits for the end of the only import and checks that the agent did not take it for a complete one.
fn expect_broken(fakes: &Fakes) {
    wait_for("the broken stream", || {
        let world = fakes.world.lock().unwrap();
        (world.broken_imports + world.imports.len() > 0).then_some(())
    });
    let world = fakes.world.lock().unwrap();
    assert_eq!((world.broken_imports, world.imports.len()), (1, 0));
}

#[test]
fn an_import_that_is_killed_is_never_taken_for_a_complete_one() {
    let dir = tempfile::tempdir().unwrap();
    let fakes = Fakes::start(&[("origin", &["store"])]);
    let (mut child, _) = import_under_way(dir.path(), &fakes);
    child.kill().unwrap();
    child.wait().unwrap();
    fakes.world.lock().unwrap().hold_imports = false;
    expect_broken(&fakes);
}

#[test]
fn an_image_that_changes_while_it_is_read_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let fakes = Fakes::start(&[("origin", &["store"])]);
    let (child, file) = import_under_way(dir.path(), &fakes);
    file.write_all_at(&[2; 512], 0).unwrap();
    fakes.world.lock().unwrap().hold_imports = false;
    let run = support::Run::of(child.wait_with_output().unwrap());
    run.fails(7, &["disk.raw", "changed while it was read"]);
    expect_broken(&fakes);
}

#[test]
fn a_foreign_target_is_registered_through_an_origin() {
    let fakes = Fakes::start(&[("origin", &["store"])]);
    let url = "iscsi://[fd00::1]:3260/iqn.2001-04.com.example:golden/1";
    let registered = fakes
        .run(&["image", "register", url, "--name", "golden", "--json"])
        .ok();
    assert_eq!(registered.json()["image"], "golden@1");
    assert_eq!(fakes.seen(), [format!("adopt {url} on origin")]);
}
