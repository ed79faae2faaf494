//! What nobody claims: found, explained, kept for its grace period and then removed; and left alone where whoever could claim it is silent.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::common::*;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _};
use tokio_util::sync::CancellationToken;
use treeboot_agent::daemon::{Daemon, Options};
use treeboot_agent::desired::{Change, VmState};
use treeboot_agent::doctor::{Condition, Finding};
use treeboot_agent::journal::{self, Journal};
use treeboot_agent::stack::{PathTo, Sources, Step, StripePaths};
use treeboot_block::layers::{Arrival, Incoming};
use treeboot_block::{BootId, Delta, DeltaMeta};
use treeboot_hypervisor::{DiskSource, Instance, Readiness, VmSpec};
use treeboot_proto::v1;
use treeboot_types::{Digest, Endpoint, Iqn, Portal};

const LONG: Duration = Duration::from_secs(3600);
const SHORT: Duration = Duration::from_millis(20);
const META: DeltaMeta = DeltaMeta {
    digest: Digest([7; 32]),
    bytes: 1 << 20,
};

/// An agent that is an origin, with a coordinator that a test plays.
struct Rig {
    dir: tempfile::TempDir,
    options: Options,
    play: Play,
    stop: CancellationToken,
    daemon: Daemon,
}

async fn rig(before: impl AsyncFnOnce(&Path)) -> Rig {
    let dir = tempfile::tempdir().unwrap();
    let (play, stop) = (Play::default(), CancellationToken::new());
    let coordinator = play.start(None, stop.clone()).await;
    let options = options(dir.path(), "origin", coordinator);
    std::fs::create_dir_all(&options.state).unwrap();
    before(&options.state).await;
    let daemon = Daemon::start(&options).await.unwrap();
    Rig {
        dir,
        options,
        play,
        stop,
        daemon,
    }
}

impl Rig {
    fn state(&self) -> &Path {
        &self.options.state
    }

    fn deltas(&self) -> PathBuf {
        self.state().join("deltas")
    }

    async fn restart(mut self) -> Self {
        self.daemon.stop().await;
        self.daemon = Daemon::start(&self.options).await.unwrap();
        self
    }

    async fn doctor(&self, fix: bool, grace: Duration) -> (BTreeMap<String, Finding>, Vec<String>) {
        let (findings, failures) = self.daemon.host().doctor(fix, grace).await.unwrap();
        let found = findings.into_iter().map(|finding| (finding.key(), finding));
        (found.collect(), failures)
    }

    /// Looks until each orphan has been nobody's for the short grace period.
    async fn outlast(&self) {
        let looking = async {
            loop {
                let (found, _) = self.doctor(false, LONG).await;
                let mut unclaimed = found.values().filter_map(|finding| finding.unclaimed.as_ref());
                if unclaimed.all(|unclaimed| unclaimed.so_far >= SHORT) {
                    return;
                }
            }
        };
        tokio::time::timeout(SOON, looking).await.unwrap();
    }

    /// Newer than the journal can have forgotten.
    fn renew(&self, path: &Path) {
        let forgot = journal::forgot(self.state()).unwrap().unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
        file.set_modified(forgot + Duration::from_secs(1)).unwrap();
    }

    fn delta(&self, vm: &str) -> PathBuf {
        let path = self.deltas().join(format!("{vm}.delta"));
        std::fs::write(&path, "").unwrap();
        path
    }

    /// A run directory as QEMU leaves it.
    fn run(&self, vm_name: &str) -> PathBuf {
        let run_dir = self.state().join("vms").join(vm_name);
        std::fs::create_dir_all(&run_dir).unwrap();
        let spec = VmSpec {
            name: vm(vm_name),
            instance: Instance([0; 16]),
            disk: DiskSource::Raw {
                path: "/dev/null".into(),
            },
            memory_mib: 64,
            cpus: 1,
            seed: None,
            ready: Readiness::Started,
            network: false,
            run_dir: run_dir.clone(),
        };
        let kept = serde_json::json!({ "spec": spec, "forward": null });
        std::fs::write(run_dir.join("vm.json"), kept.to_string()).unwrap();
        run_dir
    }

    async fn end(self) {
        self.daemon.stop().await;
        self.stop.cancel();
        self.dir.close().unwrap();
    }
}

/// A process that is called like the QEMU of a run directory, and waits for the end of its input.
fn pretend_qemu(run: &Path) -> tokio::process::Child {
    let pid_file = run.join("qemu.pid");
    let child = tokio::process::Command::new("sh")
        .args(["-c", "read -r _", "sh", "-pidfile"])
        .arg(&pid_file)
        .stdin(std::process::Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    std::fs::write(pid_file, format!("{}\n", child.id().unwrap())).unwrap();
    child
}

/// Answers as QEMU's monitor does; its process ends when it is told to quit.
fn pretend_monitor(run: &Path, qemu: &mut tokio::process::Child) -> tokio::task::JoinHandle<()> {
    let mut life = qemu.stdin.take();
    let listener = tokio::net::UnixListener::bind(run.join("qmp.sock")).unwrap();
    tokio::spawn(async move {
        while let (Ok((stream, _)), true) = (listener.accept().await, life.is_some()) {
            let (reads, mut writes) = stream.into_split();
            let greeting = "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n";
            let _ = writes.write_all(greeting.as_bytes()).await;
            let mut lines = tokio::io::BufReader::new(reads).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                if line.contains("\"quit\"") {
                    life = None;
                }
                let asked: serde_json::Value = serde_json::from_str(&line).unwrap();
                let answer = serde_json::json!({ "return": { "status": "running" }, "id": asked["id"] });
                if writes
                    .write_all(format!("{answer}\r\n").as_bytes())
                    .await
                    .is_err()
                {
                    break;
                }
            }
        }
    })
}

fn boot() -> BootId {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    boot.parse().unwrap()
}

/// The session of an image that nobody wants.
fn session_of(digest: Digest) -> Step {
    let endpoint = Endpoint {
        portal: Portal::new("127.0.0.1:1").unwrap(),
        target: Iqn::new("iqn.2026-11.dev.treeboot:image:x:1").unwrap(),
        data_lun: 0,
        hash_lun: Some(1),
    };
    let active = vec![PathTo { host: None, endpoint }];
    Step::SetPaths {
        digest,
        sources: Sources {
            unit_bytes: 1 << 20,
            stripes: vec![StripePaths {
                active,
                ..StripePaths::default()
            }],
        },
    }
}

/// A record that names the origin, which does not hold it.
fn record(name: &str, digest: Vec<u8>, origins: &[&str]) -> v1::Image {
    let origin = |host: &&str| v1::Origin {
        endpoint: Some(v1::Endpoint {
            portal: "127.0.0.1:1".into(),
            target: format!("iqn.2026-11.dev.treeboot:image:{name}:1"),
            data_lun: 0,
            hash_lun: Some(1),
        }),
        host: (*host).into(),
        labels: Default::default(),
    };
    v1::Image {
        id: Some(v1::ImageId {
            name: name.into(),
            version: 1,
        }),
        digest,
        bytes: 1 << 20,
        chunk_bytes: 65536,
        stripes: 1,
        stripe_unit_bytes: 1 << 20,
        origins: origins.iter().map(origin).collect(),
        created_unix_ms: 0,
        allocated_bytes: 0,
    }
}

fn orphans(found: &BTreeMap<String, Finding>) -> Vec<&str> {
    let orphaned = found.iter().filter(|(_, it)| it.condition == Condition::Orphaned);
    orphaned.map(|(key, _)| key.as_str()).collect()
}

#[tokio::test]
async fn each_kind_is_found_explained_kept_for_the_grace_period_and_then_removed() {
    let rig = rig(async |state| {
        // A destroy that was killed between the disk's end and the VM's.
        let journal = Journal::open(state).unwrap().0;
        let state = VmState::Stopped;
        let vm = vm("record");
        journal.commit([Change::Vm { vm, state }]).await.unwrap();
    })
    .await;
    let digest = Digest([9; 32]);
    rig.daemon
        .host()
        .plane()
        .apply(&session_of(digest))
        .await
        .unwrap();
    let delta = rig.delta("lost");
    rig.renew(&delta);
    let (over, runs) = (rig.run("over"), rig.run("runs"));
    for run in [&over, &runs] {
        rig.renew(&run.join("vm.json"));
    }
    let mut qemu = pretend_qemu(&runs);
    let monitor = pretend_monitor(&runs, &mut qemu);
    let arrival = Arrival {
        vm: vm("half"),
        transfer: 5,
        layer: None,
        meta: META,
        data_bytes: 4096,
    };
    drop(Incoming::begin(&rig.deltas(), &arrival, boot()).unwrap());
    let other = record("others", vec![4; 32], &["origin", "elsewhere"]);
    let alone = record("alone", vec![3; 32], &["origin"]);
    rig.play.0.lock().images.extend([other, alone]);

    let paths = format!("paths {digest}");
    let mut made = vec![
        "delta lost",
        "incoming half",
        &paths,
        "record alone@1",
        "run over",
        "run runs",
        "vm record",
    ];
    made.sort_unstable();
    let (found, failures) = rig.doctor(false, LONG).await;
    assert!(failures.is_empty(), "{failures:?}");
    assert_eq!(orphans(&found), made);
    for key in &made {
        let finding = &found[*key];
        assert!(!finding.why.is_empty() && !finding.fix.is_empty(), "{finding:?}");
        assert!(
            finding.unclaimed.unwrap().left > Duration::from_secs(3500),
            "{finding:?}"
        );
    }
    assert_eq!(found["record others@1"].condition, Condition::Damaged);

    let (found, failures) = rig.doctor(true, LONG).await;
    assert_eq!(orphans(&found), made, "{failures:?}");
    assert!(delta.exists() && over.exists() && qemu.try_wait().unwrap().is_none());

    rig.outlast().await;
    let (found, failures) = rig.doctor(true, SHORT).await;
    assert!(failures.is_empty(), "{failures:?}");
    // The coordinator's record is for a person with that right to remove.
    assert_eq!(orphans(&found), ["record alone@1"]);
    assert!(found["record alone@1"].is_due());
    assert!(!delta.exists() && !over.exists() && !runs.exists());
    assert_eq!(rig.daemon.host().desired().vms, BTreeMap::new());
    let ended = tokio::time::timeout(SOON, qemu.wait()).await.unwrap();
    assert!(!ended.unwrap().success());
    let left: Vec<_> = std::fs::read_dir(rig.deltas()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
    monitor.abort();
    rig.end().await;
}

#[tokio::test]
async fn a_grace_period_goes_on_after_a_restart_and_begins_anew_for_what_was_claimed() {
    let rig = rig(async |_| {}).await;
    let delta = rig.delta("lost");
    rig.renew(&delta);
    rig.outlast().await;
    let (found, _) = rig.doctor(false, LONG).await;
    let before = found["delta lost"].unclaimed.unwrap().so_far;
    assert!(before >= SHORT, "{before:?}");
    let rig = rig.restart().await;
    let (found, _) = rig.doctor(false, LONG).await;
    let after = found["delta lost"].unclaimed.unwrap().so_far;
    assert!(after >= SHORT, "{after:?} after {before:?}");
    // It is away for one look, as if it were claimed.
    let aside = rig.dir.path().join("aside");
    std::fs::rename(&delta, &aside).unwrap();
    assert!(!rig.doctor(false, LONG).await.0.contains_key("delta lost"));
    std::fs::rename(&aside, &delta).unwrap();
    let (found, _) = rig.doctor(false, LONG).await;
    assert_eq!(found["delta lost"].unclaimed.unwrap().so_far, Duration::ZERO);
    rig.end().await;
}

#[tokio::test]
async fn nothing_is_an_orphan_where_whoever_could_claim_it_is_silent_or_fails() {
    let rig = rig(async |_| {}).await;
    // QEMU runs and its monitor does not answer; and one whose directory cannot be read.
    let (mute, damaged) = (rig.run("mute"), rig.run("damaged"));
    let mut qemu = pretend_qemu(&mute);
    let listener = tokio::net::UnixListener::bind(mute.join("qmp.sock")).unwrap();
    std::fs::write(damaged.join("vm.json"), "{").unwrap();
    // What such a QEMU may write to.
    let written = rig.delta("mute");
    for path in [&mute.join("vm.json"), &damaged.join("vm.json"), &written] {
        rig.renew(path);
    }
    // Older than the journal, which was begun anew.
    let old = rig.delta("old");
    let file = std::fs::OpenOptions::new().write(true).open(&old).unwrap();
    let forgot = journal::forgot(rig.state()).unwrap().unwrap();
    file.set_modified(forgot - Duration::from_secs(1)).unwrap();
    // The coordinator's answer is none.
    let broken = record("broken", vec![1, 2, 3], &["origin"]);
    let alone = record("alone", vec![3; 32], &["origin"]);
    rig.play.0.lock().images.extend([broken, alone]);

    let mut listener = Some(listener);
    for (fix, silence) in [
        (true, "does not answer"),
        (false, "cannot talk"),
        (true, "cannot talk"),
    ] {
        tokio::time::sleep(SHORT).await;
        let (found, failures) = rig.doctor(fix, SHORT).await;
        assert_eq!(orphans(&found), [""; 0], "{failures:?}");
        for (key, why) in [
            ("run mute", silence),
            ("run damaged", "vm.json"),
            ("delta mute", "a QEMU of that name runs"),
            ("delta old", "begun anew or mended"),
        ] {
            let finding = &found[key];
            assert_eq!(finding.condition, Condition::Unknown, "{finding:?}");
            assert!(finding.why.contains(why), "{finding:?}");
        }
        assert_eq!(failures.len(), 1, "{failures:?}");
        assert!(
            failures[0].contains("not known whether records of images"),
            "{failures:?}"
        );
        listener = None;
    }
    assert!(written.exists() && old.exists() && mute.exists() && damaged.exists());
    assert!(qemu.try_wait().unwrap().is_none());
    assert!(listener.is_none());

    // The coordinator is away.
    rig.play.0.lock().images.remove(0);
    assert_eq!(orphans(&rig.doctor(false, SHORT).await.0), ["record alone@1"]);
    rig.stop.cancel();
    let mut failures = Vec::new();
    let deadline = tokio::time::Instant::now() + SOON;
    while failures.is_empty() && tokio::time::Instant::now() < deadline {
        failures = rig.doctor(true, SHORT).await.1;
    }
    assert!(
        failures[0].contains("not known whether records of images"),
        "{failures:?}"
    );
    assert_eq!(orphans(&rig.doctor(true, SHORT).await.0), [""; 0]);
    rig.end().await;
}

#[tokio::test]
async fn a_delta_that_another_process_has_open_stays() {
    let rig = rig(async |_| {}).await;
    let path = rig.deltas().join("open.delta");
    let open = Delta::create(&path, META, boot()).unwrap();
    rig.renew(&path);
    rig.outlast().await;
    let (found, failures) = rig.doctor(true, SHORT).await;
    assert_eq!(orphans(&found), ["delta open"]);
    assert!(
        failures[0].contains("another process has it open"),
        "{failures:?}"
    );
    assert!(path.exists());
    drop(open);
    // A process that another test makes may hold what this one had open until it is that process.
    let deadline = tokio::time::Instant::now() + SOON;
    while path.exists() && tokio::time::Instant::now() < deadline {
        rig.doctor(true, SHORT).await;
    }
    assert!(!path.exists());
    rig.end().await;
}
