//! With a real QEMU, under whatever acceleration the probe finds. The guest is the probe's boot sector, which halts for
//! ever once it has spoken.

use tempfile::TempDir;
use treeboot_types::VmName;

use tokio::time::Instant;

use super::*;
use crate::{Acceleration, Instance, ProbeError, Seed, boot_sector, probe};

/// Longest boot of the boot sector on a machine that does much else.
const LIMIT: Duration = Duration::from_secs(60);

/// QEMU, or nothing on a laptop without it. CI has it, or fails.
async fn hypervisor(dir: &TempDir) -> Option<Hypervisor> {
    match probe(dir.path()).await {
        Err(ProbeError::NoQemu) if std::env::var_os("CI").is_none() => {
            println!("SKIPPED: no QEMU here");
            None
        }
        found => Some(found.expect("QEMU runs a guest")),
    }
}

/// Ends its VM even if the test fails.
struct Guard(RunningVm);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.process.kill();
    }
}

impl std::ops::Deref for Guard {
    type Target = RunningVm;
    fn deref(&self) -> &RunningVm {
        &self.0
    }
}

fn spec(dir: &TempDir, name: &str) -> VmSpec {
    let disk = dir.path().join(format!("{name}.raw"));
    std::fs::write(&disk, boot_sector::disk()).expect("writes");
    VmSpec {
        name: VmName::new(name).expect("valid"),
        instance: Instance([0x42; 16]),
        disk: DiskSource::Raw { path: disk },
        memory_mib: 16,
        cpus: 1,
        seed: Some(Seed::default()),
        ready: Readiness::Console {
            any_of: vec![boot_sector::READY.into()],
        },
        network: false,
        run_dir: dir.path().join(name),
    }
}

#[tokio::test]
async fn the_probe_finds_the_iscsi_driver_and_remembers() {
    let dir = tempfile::tempdir().expect("a directory");
    let Some(found) = hypervisor(&dir).await else {
        return;
    };
    found
        .require_iscsi()
        .expect("qemu-block-extra is installed where QEMU is");
    let begin = Instant::now();
    assert_eq!(probe(dir.path()).await.expect("is remembered"), found);
    assert!(begin.elapsed() < Duration::from_millis(100), "probed again");
}

#[tokio::test]
async fn a_vm_gets_ready_is_adopted_and_ends() {
    let dir = tempfile::tempdir().expect("a directory");
    let Some(hypervisor) = hypervisor(&dir).await else {
        return;
    };
    let spec = spec(&dir, "vm-1");
    let vm = start(&hypervisor, spec.clone()).await.expect("starts");
    let line = vm.wait_ready(LIMIT).await.expect("is ready");
    assert!(line.contains(boot_sector::READY), "{line}");
    let again = start(&hypervisor, spec.clone()).await.expect_err("runs already");
    assert!(
        matches!(again, StartError::Running { pid, .. } if pid == vm.pid()),
        "{again}"
    );
    let pid = vm.pid();
    drop(vm);

    let vm = Guard(RunningVm::adopt(&spec.run_dir).expect("outlives its handle"));
    assert_eq!((vm.pid(), vm.spec()), (pid, &spec));
    // A session that began outside of our PID namespace has the number 0, at which rustix panics.
    let qemu = nix::unistd::Pid::from_raw(i32::try_from(pid).expect("fits"));
    let session = nix::unistd::getsid(Some(qemu)).expect("runs");
    assert_ne!(
        session,
        nix::unistd::getsid(None).expect("runs"),
        "QEMU is in our session"
    );
    assert_eq!(vm.state().await.expect("answers"), VmState::Running);
    let stats = vm.block_stats().await.expect("answers");
    assert!(
        stats.read_bytes >= 512 && stats.read_operations >= 1 && stats.read_time_ns > 0,
        "{stats:?}"
    );
    assert_eq!((stats.failed_reads, stats.failed_writes), (0, 0));

    // The guest ignores its power button.
    let stopped = vm
        .stop(StopMode::Graceful {
            limit: Duration::from_millis(50),
        })
        .await
        .expect("stops");
    assert_eq!(stopped, Stopped::Quit);
    assert_eq!(vm.state().await.expect("knows"), VmState::Ended);
    assert_eq!(vm.stop(StopMode::Kill).await.expect("is over"), Stopped::Already);
    let gone = RunningVm::adopt(&spec.run_dir).expect_err("has ended");
    assert!(matches!(gone, AdoptError::NotRunning { .. }), "{gone}");
    assert!(
        start(&hypervisor, spec)
            .await
            .expect("starts again")
            .stop(StopMode::Kill)
            .await
            .is_ok()
    );
}

#[tokio::test]
async fn a_killed_vm_fails_its_wait_at_once() {
    let dir = tempfile::tempdir().expect("a directory");
    let Some(hypervisor) = hypervisor(&dir).await else {
        return;
    };
    let mut spec = spec(&dir, "vm-2");
    spec.ready = Readiness::Console {
        any_of: vec!["never said".into()],
    };
    let vm = Guard(start(&hypervisor, spec).await.expect("starts"));
    let (waited, stopped) = tokio::join!(vm.wait_ready(LIMIT), vm.stop(StopMode::Kill));
    assert_eq!(stopped.expect("ends"), Stopped::Killed);
    let error = waited.expect_err("cannot get ready");
    assert!(matches!(error, ReadyError::Ended { .. }), "{error}");
}

#[tokio::test]
async fn a_wait_ends_at_its_limit_and_leaves_the_vm() {
    let dir = tempfile::tempdir().expect("a directory");
    let Some(hypervisor) = hypervisor(&dir).await else {
        return;
    };
    let mut spec = spec(&dir, "vm-3");
    // The port is accepted by QEMU's user network; the guest behind it says nothing.
    spec.ready = Readiness::Port {
        guest_port: 22,
        send: vec![],
    };
    let vm = Guard(start(&hypervisor, spec).await.expect("starts"));
    assert!(vm.forwarded_port().is_some());
    let error = vm
        .wait_ready(Duration::from_millis(500))
        .await
        .expect_err("cannot get ready");
    assert!(matches!(error, ReadyError::TimedOut { .. }), "{error}");
    assert!(!vm.ended());
    assert_eq!(vm.stop(StopMode::Quit).await.expect("stops"), Stopped::Quit);
}

#[tokio::test]
async fn a_disk_that_is_not_there_is_told_in_qemus_words_and_leaves_no_process() {
    let dir = tempfile::tempdir().expect("a directory");
    let Some(hypervisor) = hypervisor(&dir).await else {
        return;
    };
    let mut raw = spec(&dir, "vm-4");
    raw.disk = DiskSource::Raw {
        path: dir.path().join("absent.raw"),
    };
    let error = start(&hypervisor, raw.clone()).await.expect_err("no disk");
    assert!(error.to_string().contains("absent.raw"), "{error}");
    assert!(RunningVm::adopt(&raw.run_dir).is_err());

    // Bound and never listened on, so that nobody else can answer.
    let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
    socket.bind(([127, 0, 0, 1], 0).into()).expect("binds");
    let port = socket.local_addr().expect("is bound").port();
    let mut lun = spec(&dir, "vm-5");
    lun.disk = DiskSource::Iscsi {
        url: format!("iscsi://127.0.0.1:{port}/iqn.2026-11.dev.treeboot:disk:vm-5/0")
            .parse()
            .expect("a URL"),
        initiator: treeboot_types::Iqn::new("iqn.2026-11.dev.treeboot:vm:vm-5").expect("a name"),
        secret_file: None,
    };
    let error = start(&hypervisor, lun).await.expect_err("no portal");
    let message = error.to_string();
    assert!(
        message.contains("vm-5") && message.contains("iSCSI: Failed to connect"),
        "{message}"
    );
}

#[tokio::test]
async fn a_stranger_with_our_number_is_neither_adopted_nor_killed() {
    let dir = tempfile::tempdir().expect("a directory");
    let spec = spec(&dir, "vm-6");
    prepare(&spec).expect("prepares");
    write_spec(&spec, None).expect("writes");
    for pid in [
        "1",
        "0",
        "-1",
        "999999999999",
        "x",
        "",
        &std::process::id().to_string(),
    ] {
        std::fs::write(RunDir(&spec.run_dir).pid(), pid).expect("writes");
        let error = RunningVm::adopt(&spec.run_dir).expect_err("not ours");
        assert!(matches!(error, AdoptError::NotRunning { .. }), "{pid}: {error}");
    }
    std::fs::write(RunDir(&spec.run_dir).spec(), "{").expect("writes");
    assert!(matches!(
        RunningVm::adopt(&spec.run_dir),
        Err(AdoptError::File { .. })
    ));
    assert!(matches!(
        RunningVm::adopt(dir.path()),
        Err(AdoptError::Nothing { .. })
    ));
}

#[tokio::test]
async fn a_disk_error_pauses_the_guest_and_is_repeated() {
    let dir = tempfile::tempdir().expect("a directory");
    let Some(hypervisor) = hypervisor(&dir).await else {
        return;
    };
    let spec = spec(&dir, "vm-7");
    // blkdebug fails the first three reads: QEMU's own guess of the geometry, which it does without, and two of the guest's.
    prepare(&spec).expect("prepares");
    write_spec(&spec, None).expect("writes");
    let DiskSource::Raw { path } = &spec.disk else {
        unreachable!("made above")
    };
    let error = json!({ "event": "none", "iotype": "read", "errno": 5, "once": true });
    let failing = json!({
        "driver": "blkdebug", "node-name": DISK_NODE, "inject-error": [error, error, error],
        "image": { "driver": "file", "filename": path.to_string_lossy() },
    });
    let mut words = command::arguments(&spec, Acceleration::Tcg, None);
    let at = words
        .iter()
        .position(|word| word == "-blockdev")
        .expect("has a disk");
    words[at + 1] = failing.to_string().into();
    let status = tokio::process::Command::new(&hypervisor.qemu)
        .args(words)
        .status()
        .await
        .expect("runs");
    assert!(status.success());
    let vm = Guard(RunningVm::adopt(&spec.run_dir).expect("runs"));
    let paused = async {
        let mut period = tokio::time::interval(Duration::from_millis(10));
        while vm.state().await.expect("answers") != VmState::DiskError {
            period.tick().await;
        }
    };
    tokio::time::timeout(LIMIT, paused)
        .await
        .expect("the guest is paused");
    vm.wait_ready(LIMIT).await.expect("is ready after a pause");
    let stats = vm.block_stats().await.expect("answers");
    assert_eq!(stats.failed_reads, 0, "the guest has seen an error: {stats:?}");
    vm.stop(StopMode::Kill).await.expect("ends");
}
