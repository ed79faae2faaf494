//! Snapshots of a VM whose guest agent is played by the test: whatever it says, does not say or does too late, the guest goes on, and the
//! snapshot says what it is. QEMU is played, too: a process that waits, and its sockets.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;

use crate::common::rig::*;
use crate::common::*;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;
use treeboot_agent::desired::{Change, DiskState, VmState};
use treeboot_agent::host::{Freeze, HostError, Snapshotted};
use treeboot_agent::journal::Journal;
use treeboot_agent::plane::faulty::FaultMode;
use treeboot_hypervisor::{DiskSource, Instance, Readiness, VmSpec};

/// How the guest's agent is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Guest {
    Honest,
    /// QEMU is of a version without the channel.
    NoChannel,
    /// Nobody listens in the guest.
    Nobody,
    Silent,
    Garbage,
    Endless,
    /// It does nothing of that kind, and says so.
    Refuses,
    /// It has nothing to freeze.
    Nothing,
    /// It hangs up when it is asked to freeze, which it did.
    HangsUp,
    /// It does not go on so many times.
    Stuck(u32),
}

/// What the guest was asked, and whether it holds still.
#[derive(Debug)]
struct Seen {
    guest: Guest,
    asked: Vec<String>,
    frozen: bool,
}

struct Qemu {
    process: std::process::Child,
    seen: Arc<Mutex<Seen>>,
    stop: CancellationToken,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.stop.cancel();
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Qemu {
    /// What is found in a run directory of a VM that was started there.
    fn start(dir: &Path, guest: Guest) -> Self {
        let run_dir = dir.join("vms/web-1");
        std::fs::create_dir_all(&run_dir).unwrap();
        let pid_file = run_dir.join("qemu.pid");
        let process = std::process::Command::new("sh")
            .arg0("qemu")
            .args(["-c", "read line", "-pidfile"])
            .arg(&pid_file)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        std::fs::write(&pid_file, process.id().to_string()).unwrap();
        let spec = VmSpec {
            name: vm("web-1"),
            instance: Instance([7; 16]),
            disk: DiskSource::Raw { path: "/none".into() },
            memory_mib: 64,
            cpus: 1,
            seed: None,
            ready: Readiness::Started,
            network: false,
            run_dir: run_dir.clone(),
        };
        let kept = json!({ "spec": spec, "forward": null });
        std::fs::write(run_dir.join("vm.json"), kept.to_string()).unwrap();
        std::fs::write(run_dir.join("console.log"), "").unwrap();
        let seen = Arc::new(Mutex::new(Seen {
            guest,
            asked: Vec::new(),
            frozen: false,
        }));
        let stop = CancellationToken::new();
        for name in ["qmp.sock", "events.sock", "agent.sock"] {
            let path: PathBuf = run_dir.join(name);
            let _ = std::fs::remove_file(&path);
            let listener = UnixListener::bind(&path).unwrap();
            let (seen, is_agent) = (Arc::clone(&seen), name == "agent.sock");
            let serving = async move {
                while let Ok((stream, _)) = listener.accept().await {
                    match is_agent {
                        true => drop(tokio::spawn(answer_guest(stream, Arc::clone(&seen)))),
                        false => drop(tokio::spawn(answer_qmp(stream, seen.lock().guest))),
                    }
                }
            };
            let stop = stop.clone();
            tokio::spawn(async move {
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = serving => {}
                }
            });
        }
        Self { process, seen, stop }
    }

    fn asked(&self, command: &str) -> usize {
        let seen = self.seen.lock();
        seen.asked.iter().filter(|asked| asked.contains(command)).count()
    }

    fn frozen(&self) -> bool {
        self.seen.lock().frozen
    }
}

async fn answer_qmp(stream: UnixStream, guest: Guest) {
    let mut stream = BufReader::new(stream);
    let greeting = b"{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n";
    let _ = stream.get_mut().write_all(greeting).await;
    let mut line = String::new();
    while let Ok(1..) = stream.read_line(&mut line).await {
        let question: Value = serde_json::from_str(&line).unwrap();
        line.clear();
        let value = match question["execute"].as_str().unwrap() {
            "query-chardev" => match guest {
                Guest::NoChannel => json!([{ "label": "qmp", "frontend-open": true }]),
                guest => json!([{ "label": "agent", "frontend-open": guest != Guest::Nobody }]),
            },
            "query-status" => json!({ "status": "running" }),
            "query-blockstats" => json!([]),
            _ => json!({}),
        };
        let answer = json!({ "return": value, "id": question["id"] });
        let _ = stream
            .get_mut()
            .write_all(format!("{answer}\r\n").as_bytes())
            .await;
    }
}

async fn answer_guest(stream: UnixStream, seen: Arc<Mutex<Seen>>) {
    let mut stream = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        if !matches!(stream.read_until(b'\n', &mut line).await, Ok(1..)) {
            return;
        }
        let text = line.strip_prefix(b"\xff").unwrap_or(&line);
        let question: Value = serde_json::from_slice(text).unwrap();
        let command = question["execute"].as_str().unwrap().to_owned();
        let guest = seen.lock().guest;
        let mut delimiter: &[u8] = b"";
        let said = match (command.as_str(), guest) {
            (_, Guest::Silent) => None,
            (_, Guest::Garbage) => Some("\u{ff}\u{1}no JSON\n".to_owned()),
            (_, Guest::Endless) => {
                while stream.get_mut().write_all(&[b'['; 4096]).await.is_ok() {}
                return;
            }
            ("guest-sync-delimited", _) => {
                delimiter = b"\xff";
                Some(json!({ "return": question["arguments"]["id"] }).to_string())
            }
            (_, Guest::Refuses) => {
                Some(json!({ "error": { "class": "GenericError", "desc": "disabled" } }).to_string())
            }
            ("guest-fsfreeze-freeze", Guest::Nothing) => Some(json!({ "return": 0 }).to_string()),
            ("guest-fsfreeze-freeze", guest) => {
                seen.lock().frozen = true;
                (guest != Guest::HangsUp).then(|| json!({ "return": 2 }).to_string())
            }
            ("guest-fsfreeze-thaw", Guest::Stuck(times)) if times > 0 => {
                seen.lock().guest = Guest::Stuck(times - 1);
                Some(json!({ "error": { "class": "GenericError", "desc": "not yet" } }).to_string())
            }
            ("guest-fsfreeze-thaw", _) => {
                let was = std::mem::take(&mut seen.lock().frozen);
                Some(json!({ "return": if was { 2 } else { 0 } }).to_string())
            }
            ("guest-fsfreeze-status", _) => {
                let status = if seen.lock().frozen { "frozen" } else { "thawed" };
                Some(json!({ "return": status }).to_string())
            }
            (other, _) => panic!("the guest is asked for {other}"),
        };
        seen.lock().asked.push(command);
        match said {
            Some(said) => {
                let said = [delimiter, said.as_bytes(), b"\n"].concat();
                let _ = stream.get_mut().write_all(&said).await;
            }
            None if guest == Guest::HangsUp => return,
            None => {}
        }
    }
}

/// A host with a VM that its journal says runs.
struct Scene {
    dir: tempfile::TempDir,
    coordinator: std::net::SocketAddr,
    stop: CancellationToken,
    rig: Option<Rig>,
    qemu: Qemu,
}

impl Scene {
    async fn start(guest: Guest, frozen: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let stop = CancellationToken::new();
        let coordinator = Play::default().start(None, stop.clone()).await;
        let rig = Rig::start(dir.path(), "h1", coordinator).await;
        until("it is known", || rig.host.connected()).await;
        let image = import(&rig.host, "debian", &content(BLOCKS)).await;
        let image = format!("{}@{}", image.name, image.version).parse().unwrap();
        rig.host.create(&vm("web-1"), &image).await.unwrap();
        rig.write("web-1", &[1], 1).await;
        rig.alone("web-1").await;
        let run_dirs = dir.path().join("vms");
        rig.end().await;
        assert!(!run_dirs.exists() || std::fs::read_dir(&run_dirs).unwrap().count() == 0);
        // It is started by a predecessor, which ended at the wrong moment where it was frozen then.
        let journal = Journal::open(dir.path()).unwrap().0;
        let there = journal.desired().disks[&vm("web-1")].clone();
        let (name, state) = (vm("web-1"), VmState::Running);
        let disk = DiskState { frozen, ..there };
        let changes = [
            Change::Vm {
                vm: name.clone(),
                state,
            },
            Change::Disk { vm: name, disk },
        ];
        journal.commit(changes).await.unwrap();
        drop(journal);
        let qemu = Qemu::start(dir.path(), guest);
        qemu.seen.lock().frozen = frozen;
        let rig = Some(Rig::start(dir.path(), "h1", coordinator).await);
        Self {
            dir,
            coordinator,
            stop,
            rig,
            qemu,
        }
    }

    fn rig(&self) -> &Rig {
        self.rig.as_ref().unwrap()
    }

    async fn snapshot(&self, name: &str, freeze: Freeze) -> Result<Snapshotted, HostError> {
        let host = &self.rig().host;
        host.snapshot_with(&vm("web-1"), &snapshot(name), freeze).await
    }

    fn journal_says_frozen(&self) -> bool {
        self.rig().host.desired().disks[&vm("web-1")].frozen
    }

    async fn goes_on(&self, what: &str) {
        until(&format!("{what}: the guest goes on"), || {
            !self.qemu.frozen() && !self.journal_says_frozen()
        })
        .await;
    }

    /// What the snapshot's layer says of itself, also after a restart.
    async fn is_frozen(&self, name: &str) -> bool {
        let layers = self.rig().host.layers(&vm("web-1"), false).await.unwrap();
        let named = layers.into_iter().filter_map(|layer| layer.snapshot);
        named
            .into_iter()
            .find(|s| s.name.as_str() == name)
            .unwrap()
            .frozen
    }

    async fn end(mut self) {
        self.rig.take().unwrap().end().await;
        self.stop.cancel();
    }
}

#[tokio::test]
async fn a_guest_that_can_holds_still_and_goes_on() {
    let mut scene = Scene::start(Guest::Honest, false).await;
    let taken = scene.snapshot("a", Freeze::Require).await.unwrap();
    assert!(
        taken.created && taken.not_frozen.is_none() && taken.trouble.is_none(),
        "{taken:?}"
    );
    assert!(scene.is_frozen("a").await && !scene.qemu.frozen() && !scene.journal_says_frozen());
    assert_eq!(scene.qemu.asked("freeze-freeze"), 1);
    // The same call again asks for nothing.
    let again = scene.snapshot("a", Freeze::Auto).await.unwrap();
    assert!(!again.created && again.layer.snapshot.unwrap().frozen);
    let taken = scene.snapshot("b", Freeze::Never).await.unwrap();
    assert!(taken.not_frozen.is_some() && !scene.is_frozen("b").await);
    assert_eq!(scene.qemu.asked("freeze-freeze"), 1);
    // What cannot be taken is not left frozen, whichever step failed.
    for at in 0..3 {
        scene.rig().plane.arm(at, FaultMode::Error);
        let name = format!("c{at}");
        let taken = scene.snapshot(&name, Freeze::Auto).await;
        let struck = scene.rig().plane.struck();
        scene.rig().plane.arm(usize::MAX, FaultMode::Error);
        assert!(
            !scene.qemu.frozen() && !scene.journal_says_frozen(),
            "{at}: {taken:?}"
        );
        assert!(struck || taken.is_ok(), "{at}: {taken:?}");
    }
    scene.rig.take().unwrap().end().await;
    scene.rig = Some(Rig::start(scene.dir.path(), "h1", scene.coordinator).await);
    assert!(
        scene.is_frozen("a").await && !scene.is_frozen("b").await,
        "after a restart"
    );
    scene.end().await;
}

#[tokio::test]
async fn whatever_a_guest_says_there_is_a_snapshot_unless_it_was_to_be_frozen() {
    let guests = [
        (Guest::NoChannel, "without a channel"),
        (Guest::Nobody, "no guest agent listens"),
        (Guest::Silent, "did not answer"),
        (Guest::Garbage, "did not answer"),
        (Guest::Endless, "does not speak its protocol"),
        (Guest::Refuses, "refused 'guest-fsfreeze-freeze': disabled"),
        (Guest::Nothing, "no file system"),
        (Guest::HangsUp, "cannot talk to the guest agent"),
    ];
    // At once, because most of it is waiting.
    let tries = guests.map(async |(guest, why)| {
        let scene = Scene::start(guest, false).await;
        let refused = scene.snapshot("a", Freeze::Require).await.unwrap_err();
        assert!(
            matches!(&refused, HostError::NotFrozen { why: said, .. } if said.contains(why)),
            "{guest:?}: {refused}"
        );
        let taken = scene.snapshot("a", Freeze::Auto).await.unwrap();
        let said = taken.not_frozen.unwrap();
        assert!(taken.created && said.contains(why), "{guest:?}: {said}");
        assert!(!scene.is_frozen("a").await);
        scene.goes_on(&format!("{guest:?}")).await;
        scene.end().await;
    });
    futures_util::future::join_all(tries).await;
}

#[tokio::test]
async fn a_guest_that_does_not_go_on_at_once_is_asked_until_it_does() {
    let scene = Scene::start(Guest::Stuck(2), false).await;
    let taken = scene.snapshot("a", Freeze::Auto).await.unwrap();
    let trouble = taken.trouble.unwrap();
    assert!(
        taken.not_frozen.is_none() && trouble.contains("not yet"),
        "{trouble}"
    );
    scene.goes_on("stuck").await;
    assert!(scene.qemu.asked("freeze-thaw") >= 3);
    scene.end().await;
    // Its agent died before it went on: the successor has it go on.
    let scene = Scene::start(Guest::Stuck(1), true).await;
    scene.goes_on("after a death").await;
    assert_eq!(scene.qemu.asked("freeze-freeze"), 0);
    scene.end().await;
    // QEMU ended meanwhile: nothing holds still any more.
    let scene = Scene::start(Guest::Stuck(u32::MAX), true).await;
    until("it is asked", || scene.qemu.asked("freeze-thaw") > 0).await;
    assert!(scene.journal_says_frozen());
    let Scene {
        rig,
        qemu,
        dir,
        coordinator,
        stop,
    } = scene;
    drop(qemu);
    rig.unwrap().end().await;
    let rig = Rig::start(dir.path(), "h1", coordinator).await;
    until("nothing holds still", || {
        !rig.host.desired().disks[&vm("web-1")].frozen
    })
    .await;
    rig.end().await;
    stop.cancel();
}
