//! What the issue calls bad input: each gets an error that names the thing and says what to do, and leaves nothing
//! behind.

// Helpers are outside of what clippy takes for a test.
#![allow(clippy::unwrap_used)]

mod support;

use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use support::fake::Fakes;
use support::{has, run, text, tool, wait_for};

#[test]
fn names_are_refused_before_anything_is_sent() {
    for name in [
        "a:b",
        "a/b",
        "a b",
        "übung",
        "A",
        "",
        "-a",
        "a..b",
        "debian@0",
        "debian@x",
        &"a".repeat(64),
    ] {
        let shown = run(&["image", "show", name]);
        assert_eq!(shown.exit, 2, "{shown:?}");
        assert!(shown.stderr.starts_with("treeboot: "), "{shown:?}");
        let created = run(&[
            "vm",
            "create",
            name.split('@').next().unwrap(),
            "--image",
            "debian",
        ]);
        if !name.contains('@') {
            assert_eq!(created.exit, 2, "{created:?}");
        }
    }
    let shown = run(&["vm", "stop", "web:1"]);
    assert!(
        shown.stderr.contains("'web:1' holds ':'; use lower-case letters"),
        "{shown:?}"
    );
    let shown = run(&["host", "show", "a b"]);
    assert!(
        shown.stderr.contains("the host name 'a b' holds ' '"),
        "{shown:?}"
    );
    assert_eq!(run(&["image", "register", "http://a/b", "--name", "a"]).exit, 2);
    assert_eq!(
        run(&["fleet", "boot", "--image", "debian", "--count", "0"]).exit,
        2
    );
    assert_eq!(run(&["image", "attach", "debian"]).exit, 2);
}

#[test]
fn files_that_are_no_images_are_refused_by_name_before_anything_is_sent() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let import = |content: &[u8]| {
        std::fs::write(&path, content).unwrap();
        // Nothing listens there: had it got that far, the code would be another one.
        run(&[
            "image",
            "import",
            text(&path),
            "debian",
            "--coordinator",
            "http://127.0.0.1:1",
        ])
    };
    import(b"").fails(1, &["disk", "empty"]);
    import(&[0; 1000]).fails(1, &["disk", "1000 bytes", "multiple of 512"]);
    import(&b"just a note\n".repeat(128)).fails(1, &["disk", "a text file"]);
    import(b"short").fails(1, &["disk", "a text file"]);
    let elf = std::fs::read(env!("CARGO_BIN_EXE_treeboot")).unwrap();
    import(&elf[..elf.len() / 512 * 512]).fails(1, &["disk", "an ELF program"]);
    import(b"\x1f\x8b and more").fails(1, &["disk", "gzip"]);
    import(b"QFI\xfb\0\0\0\x03").fails(1, &["disk", "qcow2", "truncated"]);
    run(&["image", "import", text(dir.path()), "debian"])
        .fails(1, &["neither a regular file nor a block device"]);
    run(&["image", "import", "/nowhere/disk.raw", "debian"]).fails(3, &["/nowhere/disk.raw", "no such file"]);
}

#[test]
fn a_truncated_qcow2_image_is_refused() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let raw = dir.path().join("disk.raw");
    std::fs::write(&raw, [7; 1 << 20]).unwrap();
    tool("qemu-img", &["convert", "-O", "qcow2", text(&raw), text(&path)]);
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(file.metadata().unwrap().len() - 65536 * 2).unwrap();
    run(&["image", "import", text(&path), "debian"]).fails(1, &["disk.qcow2", "truncated"]);
    // Compressed images are left to qemu-img, which would read what is missing as zeroes.
    tool(
        "qemu-img",
        &["convert", "-c", "-O", "qcow2", text(&raw), text(&path)],
    );
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(file.metadata().unwrap().len() - 4096).unwrap();
    run(&["image", "import", text(&path), "debian"]).fails(1, &["disk.qcow2", "truncated"]);
}

#[test]
fn an_image_that_leads_to_other_files_is_refused() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (base, child) = (dir.path().join("base.raw"), dir.path().join("child.qcow2"));
    std::fs::write(&base, [7; 1 << 20]).unwrap();
    tool(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "raw",
            "-b",
            text(&base),
            text(&child),
        ],
    );
    let refused = run(&["image", "import", text(&child), "debian"])
        .fails(1, &["child.qcow2", "backing file", "base.raw"]);
    assert!(refused.stderr.contains("qemu-img convert"), "{refused:?}");
}

#[test]
fn without_qemu_img_the_package_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(1 << 20).unwrap();
    file.write_all_at(b"vhdxfile", 0).unwrap();
    let mut command = support::treeboot();
    command
        .env("PATH", dir.path())
        .args(["image", "import", text(&path), "debian"]);
    let refused =
        support::Run::of(command.output().unwrap()).fails(1, &["VHDX", "qemu-img", "not installed"]);
    assert!(refused.stderr.contains("qemu-utils"), "{refused:?}");
}

/// A VHDX image and a `qemu-img` that does what a script says; the second is to be put first in `PATH`.
fn played_qemu_img(dir: &Path, convert: &str) -> (PathBuf, String) {
    let image = dir.join("disk.vhdx");
    let file = std::fs::File::create(&image).unwrap();
    file.set_len(1 << 20).unwrap();
    file.write_all_at(b"vhdxfile", 0).unwrap();
    let programs = dir.join("bin");
    std::fs::create_dir(&programs).unwrap();
    let program = programs.join("qemu-img");
    // The converted file is the last argument.
    let script =
        format!("#!/bin/sh\nfor out; do :; done\ncase $1 in info) echo '{{}}';; convert) {convert};; esac\n");
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
    (image, path)
}

/// It is gone, or dead and only waits for somebody to ask: in a container the first process may never do that.
fn has_ended(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    matches!(state, None | Some('Z' | 'X'))
}

#[test]
fn an_interrupted_conversion_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let pid_file = dir.path().join("pid");
    let convert = format!(
        "echo $$ > '{}'; echo data > $out; exec sleep 1000",
        pid_file.display()
    );
    let (image, path) = played_qemu_img(dir.path(), &convert);
    let scratch = dir.path().join("scratch");
    std::fs::create_dir(&scratch).unwrap();
    for (signal, verb) in [
        (
            rustix::process::Signal::INT,
            &["image", "import", text(&image), "debian"][..],
        ),
        (
            rustix::process::Signal::TERM,
            &["serve", text(&image), "--portal", "127.0.0.1:0"],
        ),
    ] {
        let child = support::treeboot()
            .env("PATH", &path)
            .args(verb)
            .args(["--scratch", text(&scratch)])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let converter = wait_for("the conversion", || {
            let half = std::fs::read_dir(&scratch)
                .unwrap()
                .next()?
                .unwrap()
                .path()
                .join("disk.raw");
            let pid = std::fs::read_to_string(&pid_file).ok()?.trim().parse().ok()?;
            half.exists().then_some(pid)
        });
        std::fs::remove_file(&pid_file).unwrap();
        rustix::process::kill_process(rustix::process::Pid::from_child(&child), signal).unwrap();
        let ended = support::Run::of(child.wait_with_output().unwrap());
        assert_eq!(ended.exit, 130, "{ended:?}");
        assert_eq!(std::fs::read_dir(&scratch).unwrap().count(), 0, "{verb:?}");
        wait_for("the end of qemu-img", || has_ended(converter).then_some(()));
    }
}

#[test]
fn a_conversion_without_room_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let (image, path) = played_qemu_img(
        dir.path(),
        "echo 'qemu-img: error while writing: No space left on device' >&2; exit 1",
    );
    let scratch = dir.path().join("scratch");
    std::fs::create_dir(&scratch).unwrap();
    let mut command = support::treeboot();
    command.env("PATH", &path).args([
        "image",
        "import",
        text(&image),
        "debian",
        "--scratch",
        text(&scratch),
    ]);
    support::Run::of(command.output().unwrap()).fails(9, &["disk.vhdx", "No space left"]);
    assert_eq!(std::fs::read_dir(&scratch).unwrap().count(), 0);
}

#[test]
fn a_coordinator_that_cannot_be_reached_is_named() {
    // A port that was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let url = format!("http://127.0.0.1:{port}");
    for verb in [
        &["image", "list"][..],
        &["host", "list"],
        &["tree", "debian"],
        &["vm", "list"],
        &["fleet", "stop"],
    ] {
        let arguments = [verb, &["--coordinator", &url]].concat();
        run(&arguments).fails(5, &["cannot reach the coordinator", &url, "connection refused"]);
    }
    run(&["image", "list", "--coordinator", "http://[::1]:1"]).fails(5, &["http://[::1]:1"]);
    run(&["image", "list", "--coordinator", "::1:7400"]).fails(2, &["::1:7400", "not the URL"]);
    run(&["image", "list", "--coordinator", "https://a:1"])
        .fails(2, &["https://a:1", "needs an identity", "treeboot login"]);
}

#[test]
fn a_coordinator_that_is_none_is_told_apart_and_bounded() {
    // It accepts and says nothing.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    run(&["image", "list", "--coordinator", &url, "--timeout", "300ms"])
        .fails(8, &["did not answer within", &url]);
}

#[test]
fn an_agent_that_is_gone_is_named() {
    let fakes = Fakes::start(&[("origin", &["store"])]);
    {
        let mut world = fakes.world.lock().unwrap();
        let mut gone = world.hosts[0].clone();
        let info = gone.info.as_mut().unwrap();
        info.name = "gone".into();
        info.agent_address = "127.0.0.1:1".into();
        gone.connected = false;
        world.hosts.push(gone);
    }
    let refused = fakes
        .run(&["host", "show", "gone"])
        .fails(5, &["agent of host 'gone'", "127.0.0.1:1", "refused"]);
    assert!(
        refused.stderr.contains("has not heard it for 1.50 s"),
        "{refused:?}"
    );
    fakes
        .run(&["host", "show", "absent"])
        .fails(3, &["knows no host 'absent'"]);
}

#[test]
fn what_is_not_there_and_what_is_in_use_have_codes_of_their_own() {
    let fakes =
        Fakes::start(&[("origin", &["store"]), ("host-1", &["vms"])]).with_image("debian", 1, "origin");
    fakes.run(&["image", "show", "absent"]).fails(3, &["absent"]);
    fakes.run(&["tree", "absent"]).fails(3, &["absent"]);
    fakes.run(&["vm", "stop", "absent"]).fails(3, &["absent"]);
    fakes.run(&["fleet", "stop"]).fails(3, &["fleet"]);
    fakes
        .run(&[
            "fleet", "boot", "--image", "debian", "--count", "1", "--hosts", "origin",
        ])
        .fails(7, &["origin"]);
    fakes.world.lock().unwrap().nodes.push(Default::default());
    fakes
        .run(&["image", "remove", "debian"])
        .fails(7, &["debian@1", "attached"]);
    assert_eq!(fakes.seen(), Vec::<String>::new());
    fakes.run(&["image", "remove", "debian", "--force"]).ok();
    assert_eq!(fakes.seen(), ["remove image", "drop debian on origin"]);
}

#[test]
fn without_a_store_an_import_says_how_to_start_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    std::fs::write(&path, [0; 4096]).unwrap();
    let fakes = Fakes::start(&[("host-1", &["vms"]), ("origin", &["store", "silent"])]);
    let refused = fakes
        .run(&["image", "import", text(&path), "debian"])
        .fails(3, &["store"]);
    assert!(refused.stderr.contains("--store DIR"), "{refused:?}");
    fakes
        .run(&["image", "import", text(&path), "debian", "--to", "host-1"])
        .fails(7, &["host-1", "no store"]);
}
