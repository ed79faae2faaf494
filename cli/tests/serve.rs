//! `treeboot serve`, read and written by foreign initiators.

// Helpers are outside of what clippy takes for a test.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use support::{Run, has, run, text, tool, treeboot, wait_for};

const DISK: usize = 4 << 20;

/// A running server; killed when dropped.
struct Served {
    child: Option<Child>,
    ready_file: PathBuf,
    /// The content of its ready file.
    ready: serde_json::Value,
}

impl Served {
    fn start(dir: &Path, image: &Path, arguments: &[&str]) -> Self {
        let ready_file = dir.join("ready.json");
        let mut command = treeboot();
        command
            .args(["serve", text(image), "--ready-file", text(&ready_file)])
            .args(arguments);
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let content = wait_for("its being ready", || {
            let ended = child.try_wait().unwrap();
            assert!(ended.is_none(), "it ended: {:?}", Run::of_ended(&mut child));
            std::fs::read_to_string(&ready_file).ok()
        });
        Self {
            child: Some(child),
            ready_file,
            ready: serde_json::from_str(&content).unwrap(),
        }
    }

    fn url(&self) -> &str {
        self.ready["urls"][0].as_str().unwrap()
    }

    fn portal(&self) -> &str {
        self.ready["portal"].as_str().unwrap()
    }

    /// Sends a signal and waits for the end.
    fn end(mut self, signal: rustix::process::Signal) -> Run {
        let child = self.child.take().unwrap();
        rustix::process::kill_process(rustix::process::Pid::from_child(&child), signal).unwrap();
        let run = Run::of(child.wait_with_output().unwrap());
        assert!(!self.ready_file.exists(), "the ready file is left behind");
        run
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill(); // it may have ended
            let _ = child.wait();
        }
    }
}

/// Whether QEMU's tools speak iSCSI, which Debian ships apart.
fn has_qemu_iscsi() -> bool {
    if !has("qemu-img", "qemu-utils") || !has("qemu-io", "qemu-utils") {
        return false;
    }
    let tried = Command::new("qemu-img")
        .args(["info", "iscsi://127.0.0.1:1/iqn.2026-11.a:b/0"])
        .output()
        .unwrap();
    let unknown = String::from_utf8_lossy(&tried.stderr).contains("Unknown protocol");
    if unknown {
        assert!(
            std::env::var_os("CI").is_none(),
            "QEMU has no iSCSI (Debian: qemu-block-extra)"
        );
        eprintln!("SKIPPED: QEMU has no iSCSI (Debian: qemu-block-extra)");
    }
    !unknown
}

/// A disk in which each block of 512 bytes is of its own kind.
fn disk(path: &Path) -> Vec<u8> {
    let content: Vec<u8> = (0..DISK / 8)
        .flat_map(|index| (index as u64 / 64 * 0x9e37_79b9).to_le_bytes())
        .collect();
    std::fs::write(path, &content).unwrap();
    content
}

#[test]
fn qemu_reads_back_what_is_served_from_raw_and_from_qcow2() {
    if !has_qemu_iscsi() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("disk.raw");
    let content = disk(&raw);
    let qcow2 = dir.path().join("disk.qcow2");
    tool("qemu-img", &["convert", "-O", "qcow2", text(&raw), text(&qcow2)]);
    for (image, arguments) in [
        (&raw, &["--portal", "127.0.0.1:0"][..]),
        (&qcow2, &["--portal", "127.0.0.1:0"]),
        (&raw, &["--portal", "127.0.0.1:0", "--block-size", "4096"]),
        (
            &raw,
            &["--portal", "[::1]:0", "--name", "iqn.2026-11.org.example:disk"],
        ),
    ] {
        let served = Served::start(dir.path(), image, arguments);
        let out = dir.path().join("out.raw");
        tool(
            "qemu-img",
            &["convert", "-f", "raw", "-O", "raw", served.url(), text(&out)],
        );
        assert!(std::fs::read(&out).unwrap() == content, "{arguments:?}");
        let ended = served.end(rustix::process::Signal::TERM).ok();
        assert!(
            ended.stdout.contains("served 4.00 MiB read and 0 B written in "),
            "{ended:?}"
        );
        assert!(
            ended.stdout.contains("qemu-system-x86_64 -drive file=iscsi://"),
            "{ended:?}"
        );
    }
}

#[test]
fn libiscsis_tools_find_it() {
    if !has("iscsi-inq", "libiscsi-bin") || !has("iscsi-ls", "libiscsi-bin") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("Disk One.raw");
    disk(&raw);
    let served = Served::start(dir.path(), &raw, &["--portal", "127.0.0.1:0"]);
    assert_eq!(served.ready["target"], "iqn.2026-11.dev.treeboot:serve:disk-one");
    let listed = tool("iscsi-ls", &["-s", &format!("iscsi://{}", served.portal())]);
    assert!(
        listed.contains("iqn.2026-11.dev.treeboot:serve:disk-one") && listed.contains("Lun:0"),
        "{listed}"
    );
    let inquired = tool("iscsi-inq", &[served.url()]);
    assert!(inquired.contains("DIRECT_ACCESS"), "{inquired}");
    served.end(rustix::process::Signal::INT).ok();
}

#[test]
fn writes_reach_the_file_only_where_they_are_allowed() {
    if !has_qemu_iscsi() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("disk.raw");
    let mut content = disk(&raw);
    let write = |url: &str| {
        let arguments = ["-f", "raw", "-c", "write -P 0x5a 4096 8192", url];
        Command::new("qemu-io")
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    };
    let served = Served::start(dir.path(), &raw, &["--portal", "127.0.0.1:0"]);
    let output = write(served.url());
    assert!(
        !String::from_utf8_lossy(&output.stdout).contains("wrote 8192"),
        "{output:?}"
    );
    served.end(rustix::process::Signal::TERM).ok();
    assert!(std::fs::read(&raw).unwrap() == content);

    let served = Served::start(dir.path(), &raw, &["--portal", "127.0.0.1:0", "--writable"]);
    let output = write(served.url());
    assert!(
        String::from_utf8_lossy(&output.stdout).contains("wrote 8192"),
        "{output:?}"
    );
    let again = run(&["serve", text(&raw), "--portal", "127.0.0.1:0", "--writable"]);
    again.fails(7, &["disk.raw", "in use"]);
    served.end(rustix::process::Signal::TERM).ok();
    content[4096..4096 + 8192].fill(0x5a);
    assert!(std::fs::read(&raw).unwrap() == content);
}

#[test]
fn what_cannot_be_served_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("disk.raw");
    disk(&raw);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let portal = taken.local_addr().unwrap().to_string();
    let ready = dir.path().join("ready.json");
    run(&[
        "serve",
        text(&raw),
        "--portal",
        &portal,
        "--ready-file",
        text(&ready),
    ])
    .fails(
        4,
        &[&format!("cannot listen on {portal}"), "address already in use"],
    );
    assert!(!ready.exists());
    // An address reserved for documentation is of no machine.
    run(&["serve", text(&raw), "--portal", "192.0.2.1:3260"]).fails(3, &["192.0.2.1:3260"]);
    for (portal, words) in [
        ("::1:3260", "brackets"),
        ("localhost", "ADDR:PORT"),
        ("127.0.0.1:99999", "ADDR:PORT"),
    ] {
        let refused = run(&["serve", text(&raw), "--portal", portal]);
        assert!(refused.exit == 2 && refused.stderr.contains(words), "{refused:?}");
    }
    let refused = run(&["serve", text(&raw), "--name", "disk one"]);
    assert!(
        refused.exit == 2 && refused.stderr.starts_with("treeboot: "),
        "{refused:?}"
    );
    run(&["serve", "/nowhere/disk.raw"]).fails(3, &["/nowhere/disk.raw"]);
    std::fs::write(&raw, "a note\n").unwrap();
    run(&["serve", text(&raw)]).fails(1, &["disk.raw", "a text file"]);
    std::fs::write(&raw, [0; 1536]).unwrap();
    run(&["serve", text(&raw), "--block-size", "4096"]).fails(1, &["1536 bytes", "multiple of 4096"]);
    std::fs::write(&raw, []).unwrap();
    run(&["serve", text(&raw)]).fails(1, &["disk.raw", "empty"]);
}

const SECRET: &str = "0123456789abcdef0123";
const MUTUAL_SECRET: &str = "fedcba9876543210fedc";

/// Runs one of libiscsi's tools; whether it logged in, and what it said.
fn inquire(url: &str) -> (bool, String) {
    let output = Command::new("iscsi-inq")
        .arg(url)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    (said.contains("DIRECT_ACCESS"), said)
}

#[test]
fn foreign_initiators_authenticate_and_are_authenticated_to() {
    if !has("iscsi-inq", "libiscsi-bin") || !has("iscsi-ls", "libiscsi-bin") || !has_qemu_iscsi() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("disk.raw");
    let content = disk(&raw);
    let secret = dir.path().join("secret");
    let mutual = dir.path().join("mutual");
    std::fs::write(&secret, format!("{SECRET}\n")).unwrap();
    std::fs::write(&mutual, MUTUAL_SECRET).unwrap();
    let arguments = [
        "--portal",
        "127.0.0.1:0",
        "--chap-user",
        "alice",
        "--chap-secret-file",
        text(&secret),
        "--mutual-user",
        "disk",
        "--mutual-secret-file",
        text(&mutual),
    ];
    let served = Served::start(dir.path(), &raw, &arguments);
    let url = |who: &str, more: &str| {
        format!(
            "{}{more}",
            served.url().replace("iscsi://", &format!("iscsi://{who}"))
        )
    };
    let right = format!("alice%{SECRET}@");
    let both = format!("?target_user=disk&target_password={MUTUAL_SECRET}");
    for (url, lets_in) in [
        (url(&right, ""), true),
        (url(&right, &both), true),
        (url(&right, &format!("{both}&header_digest=crc32c")), true),
        // Refused here.
        (url("", ""), false),
        (url("alice%0123456789abcdef012@", ""), false),
        (url(&format!("bob%{SECRET}@"), ""), false),
        // Refused by the initiator.
        (
            url(&right, "?target_user=disk&target_password=not-the-secret"),
            false,
        ),
        (
            url(
                &right,
                &format!("?target_user=other&target_password={MUTUAL_SECRET}"),
            ),
            false,
        ),
    ] {
        let (let_in, said) = inquire(&url);
        assert_eq!(let_in, lets_in, "{url}: {said}");
    }
    let portal = format!("iscsi://{right}{}", served.portal());
    let listed = tool("iscsi-ls", &["-s", &portal]);
    assert!(listed.contains("Lun:0"), "{listed}");
    let out = dir.path().join("out.raw");
    tool(
        "qemu-img",
        &[
            "convert",
            "-f",
            "raw",
            "-O",
            "raw",
            &url(&right, &both),
            text(&out),
        ],
    );
    assert!(std::fs::read(&out).unwrap() == content);

    let ended = served.end(rustix::process::Signal::TERM).ok();
    assert!(
        ended
            .stdout
            .contains("by CHAP as 'alice', and the target to them as 'disk'"),
        "{ended:?}"
    );
    let lines: Vec<_> = ended
        .stderr
        .lines()
        .filter(|line| line.contains("authentication failed"))
        .collect();
    assert_eq!(lines.len(), 3, "{ended:?}");
    assert!(
        lines
            .iter()
            .all(|line| line.contains("iqn.") && line.contains("127.0.0.1:")),
        "{lines:?}"
    );
    for secret in [SECRET, MUTUAL_SECRET] {
        assert!(
            !ended.stderr.contains(secret) && !ended.stdout.contains(secret),
            "{ended:?}"
        );
    }
}

#[test]
fn only_initiators_on_the_list_are_let_in() {
    if !has("iscsi-inq", "libiscsi-bin") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("disk.raw");
    disk(&raw);
    let inquire = |url: &str, name: &str| {
        let output = Command::new("iscsi-inq")
            .args(["-i", name, url])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        String::from_utf8_lossy(&output.stdout).contains("DIRECT_ACCESS")
    };
    let names = ["iqn.2026-11.org.example:one", "iqn.2026-11.org.example:two"];
    let mut arguments = vec!["--portal", "127.0.0.1:0"];
    for name in names {
        arguments.extend(["--allow-initiator", name]);
    }
    let served = Served::start(dir.path(), &raw, &arguments);
    assert!(inquire(served.url(), names[0]) && inquire(served.url(), names[1]));
    assert!(!inquire(served.url(), "iqn.2026-11.org.example:three"));
    served.end(rustix::process::Signal::TERM).ok();

    let secret = dir.path().join("secret");
    std::fs::write(&secret, SECRET).unwrap();
    arguments.extend(["--chap-user", "alice", "--chap-secret-file", text(&secret)]);
    let served = Served::start(dir.path(), &raw, &arguments);
    let with_secret = served
        .url()
        .replace("iscsi://", &format!("iscsi://alice%{SECRET}@"));
    assert!(inquire(&with_secret, names[1]));
    assert!(!inquire(&with_secret, "iqn.2026-11.org.example:three"));
    assert!(!inquire(served.url(), names[1]));
    served.end(rustix::process::Signal::TERM).ok();
}

#[test]
fn secrets_that_cannot_be_used_are_refused_without_being_shown() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("disk.raw");
    disk(&raw);
    let file = |name: &str, content: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        text(&path).to_owned()
    };
    let good = file("good", "0123456789ab\n");
    let short = file("short", "0123456789a\n");
    let long = file("long", &"x".repeat(300));
    let serve = |arguments: &[&str]| {
        let mut all = vec!["serve", text(&raw), "--portal", "127.0.0.1:0"];
        all.extend(arguments);
        run(&all)
    };
    serve(&["--chap-user", "a", "--chap-secret-file", &short])
        .fails(2, &["'a'", "short", "11 bytes", "at least 12"]);
    serve(&["--chap-user", "a", "--chap-secret-file", &long]).fails(2, &["long", "255"]);
    serve(&["--chap-user", "a", "--chap-secret-file", "/nowhere/secret"]).fails(3, &["/nowhere/secret"]);
    serve(&["--chap-user", "", "--chap-secret-file", &good]).fails(2, &["CHAP name"]);
    let same = [
        "--chap-user",
        "a",
        "--chap-secret-file",
        &good,
        "--mutual-user",
        "b",
        "--mutual-secret-file",
        &good,
    ];
    serve(&same).fails(2, &["same secret"]);
    for lacking in [
        &["--chap-user", "a"][..],
        &["--chap-secret-file", &good],
        &["--mutual-user", "b", "--mutual-secret-file", &good],
        &[
            "--chap-user",
            "a",
            "--chap-secret-file",
            &good,
            "--mutual-user",
            "b",
        ],
        &["--allow-initiator", "not a name"],
    ] {
        let refused = serve(lacking);
        assert!(
            refused.exit == 2 && !refused.stderr.contains("0123456789"),
            "{refused:?}"
        );
    }
}
