//! Removal under load, failures and kills at every step, and parents that die.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;
use treeboot_iscsi::lio::{CONFIGFS, Lio, LioError, Outcome};
use treeboot_iscsi::open_iscsi::{SessionState, Settings};
use treeboot_iscsi::target::Access;

use super::bench::{self, Bench, Served, is, wait};

/// Port of treeboot's own target.
const OWN_PORT: u16 = 3270;

/// How long the logout of a dead session may take: the logout's own limit, and what stops it.
const LOGOUT_WITHIN: Duration = Duration::from_secs(6);

fn listed(bench: &Bench) -> Access {
    Access::Initiators([bench.initiator.initiator().clone()].into())
}

/// Reads a device again and again until that fails or it is told to stop.
struct Reader {
    stop: Arc<AtomicBool>,
    reads: Arc<AtomicU64>,
    thread: JoinHandle<std::io::Result<()>>,
}

impl Reader {
    fn start(device: PathBuf) -> Self {
        let (stop, reads) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let thread = std::thread::spawn({
            let (stop, reads) = (stop.clone(), reads.clone());
            move || {
                for page in (0..2048).cycle() {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    bench::read_direct(&device, page * 4096)?;
                    reads.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            }
        });
        Self { stop, reads, thread }
    }

    fn goes_on(&self) -> Result<()> {
        let before = self.reads.load(Ordering::Relaxed);
        wait("reads to go on", || {
            ensure!(!self.thread.is_finished(), "reading ended");
            Ok((self.reads.load(Ordering::Relaxed) > before + 20).then_some(()))
        })
    }

    fn end(self) -> std::io::Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or(Ok(()))
    }
}

pub(crate) fn removal_drains() -> Result<()> {
    let bench = Bench::new("drains")?;
    bench.export(false, listed(&bench))?;
    let session = bench.initiator.login(&bench.endpoint(), None, &[0])?;
    let unit = session.unit(0).context("LUN 0")?;
    bench::wait_for_node(unit)?;
    let reader = Reader::start(unit.path());
    reader.goes_on()?;
    let drain = Duration::from_secs(15);
    let (lio, target) = (bench.lio.clone(), bench.target.clone());
    let began = Instant::now();
    let removal = std::thread::spawn(move || lio.remove_target(&target, drain));
    let portals = Path::new(CONFIGFS)
        .join("target/iscsi")
        .join(bench.target.as_str())
        .join("tpgt_1/np");
    wait("the portals to go", || {
        Ok(portals.read_dir()?.next().is_none().then_some(()))
    })?;
    // Nobody new gets in, and who is in goes on.
    ensure!(
        bench.initiator.login(&bench.endpoint_6(), None, &[0]).is_err(),
        "a new session was let in"
    );
    reader.goes_on()?;
    reader.end().context("reading while the target drained")?;
    bench.initiator.logout(&bench.endpoint())?;
    let done = removal
        .join()
        .map_err(|_| anyhow::anyhow!("the removal panicked"))?;
    is(done?, Outcome::Changed)?;
    ensure!(began.elapsed() < drain, "the whole drain was waited for");
    bench.end()
}

pub(crate) fn removal_ends_who_does_not_leave() -> Result<()> {
    let bench = Bench::new("ends")?;
    bench.export(false, listed(&bench))?;
    let session = bench.initiator.login(&bench.endpoint(), None, &[0, 1])?;
    let unit = session.unit(0).context("LUN 0")?;
    bench::wait_for_node(unit)?;
    let readers: Vec<Reader> = (0..4).map(|_| Reader::start(unit.path())).collect();
    readers.iter().try_for_each(Reader::goes_on)?;
    let began = Instant::now();
    let drain = Duration::from_secs(1);
    is(bench.lio.remove_target(&bench.target, drain)?, Outcome::Changed)?;
    let took = began.elapsed();
    ensure!((drain..drain * 5).contains(&took), "the removal took {took:?}");
    bench.remove_with(&bench.lio)?;
    ensure!(bench.lio.found()?.targets.is_empty() && bench.lio.found()?.backstores.is_empty());
    for reader in readers {
        let ended = reader.thread.join().unwrap_or(Ok(()));
        ensure!(ended.is_err(), "reading went on without a target");
    }
    let failed = began.elapsed();
    ensure!(failed < took + bench_limit(), "reads failed after {failed:?}");
    println!(
        "FIGURE a target removed under 4 readers: removed after {took:.1?} (drain {drain:?}), reads failed after {failed:.1?}"
    );
    logout_is_quick(&bench)?;
    bench.end()
}

fn bench_limit() -> Duration {
    Settings::default().fails_within()
}

/// The session's target is dead.
fn logout_is_quick(bench: &Bench) -> Result<()> {
    let began = Instant::now();
    for session in bench.initiator.sessions()? {
        bench.initiator.logout(&session.endpoint)?;
    }
    let took = began.elapsed();
    println!("FIGURE logout of a dead session: {took:.1?}");
    ensure!(took < LOGOUT_WITHIN, "the logout of a dead session took {took:?}");
    ensure!(bench.initiator.sessions()?.is_empty());
    Ok(())
}

/// An observer that lets so many steps pass.
fn stops_before(step: u64) -> Lio {
    Lio::observed(CONFIGFS, Arc::new(move |now, _, _| now != step))
}

pub(crate) fn fail_at_every_step() -> Result<()> {
    let bench = Bench::new("fail-at")?;
    let (data, hashes, export) = bench.wanted(
        false,
        Access::Each([(bench.initiator.initiator().clone(), Some(bench::chap()?))].into()),
    );
    let mut steps = 0;
    loop {
        let lio = stops_before(steps);
        match bench.build_with(&lio, &data, &hashes, &export) {
            Ok(()) => break,
            Err(error) => ensure!(is_stop(&error), "step {steps}: {error:#}"),
        }
        after_a_broken_build(&bench, steps)?;
        steps += 1;
    }
    ensure!(steps > 30, "only {steps} steps");
    let mut removals = 0;
    loop {
        bench.build(&data, &hashes, &export)?;
        match bench.remove_with(&stops_before(removals)) {
            Ok(()) => break,
            Err(error) => ensure!(is_stop(&error), "step {removals}: {error:#}"),
        }
        after_a_broken_removal(&bench, removals)?;
        removals += 1;
    }
    println!("FIGURE failed at each of {steps} steps of building and {removals} of removing");
    bench.end()
}

fn is_stop(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(LioError::Stopped { .. }))
}

/// A half-built target is either mended or removed; by turns, so that both are tried at every other step.
fn after_a_broken_build(bench: &Bench, step: u64) -> Result<()> {
    let (data, hashes, export) = bench.wanted(
        false,
        Access::Each([(bench.initiator.initiator().clone(), Some(bench::chap()?))].into()),
    );
    let mend = || -> Result<()> {
        bench.build(&data, &hashes, &export).context("the retry")?;
        let found = bench.lio.found()?;
        let whole = found
            .targets
            .first()
            .is_some_and(|t| t.enabled && t.luns.len() == 2 && t.portals.len() == 2);
        ensure!(whole && found.backstores.len() == 2, "{found:?}");
        is(bench.lio.ensure_target(&export)?, Outcome::Identity)
    };
    if step.is_multiple_of(2) {
        mend().with_context(|| format!("after step {step} of building"))?;
    }
    clean_by_what_is_found(bench)
        .and_then(|()| bench.expect_nothing())
        .with_context(|| format!("after step {step} of building"))?;
    if !step.is_multiple_of(2) {
        mend().with_context(|| format!("after step {step} of building and its removal"))?;
        clean_by_what_is_found(bench)?;
    }
    Ok(())
}

fn after_a_broken_removal(bench: &Bench, step: u64) -> Result<()> {
    clean_by_what_is_found(bench)
        .and_then(|()| bench.expect_nothing())
        .with_context(|| format!("after step {step} of removing"))
}

/// As an agent does after a restart that knows nothing but what it finds.
fn clean_by_what_is_found(bench: &Bench) -> Result<()> {
    let lio = Lio::default();
    let found = lio.found()?;
    for target in found.targets {
        lio.remove_target(&target.name, Duration::ZERO)?;
    }
    for backstore in found.backstores {
        lio.remove_backstore(&backstore.name)?;
    }
    // What neither list names: an HBA without backstores.
    bench.remove_with(&lio)
}

/// A `Lio` that kills its process before a step.
fn dies_before(step: u64) -> Lio {
    Lio::observed(
        CONFIGFS,
        Arc::new(move |now, _, _| {
            if now == step {
                // By its own pid: nothing of it runs on, and nothing is undone.
                let _ = nix::sys::signal::raise(Signal::SIGKILL);
            }
            true
        }),
    )
}

/// `build CASE LOOP STEP`
pub(crate) fn build_until(args: &[String]) -> Result<()> {
    let (bench, step) = of_parent(args)?;
    let access = Access::Each([(bench.initiator.initiator().clone(), Some(bench::chap()?))].into());
    let (data, hashes, export) = bench.wanted(false, access);
    let built = bench.build_with(&dies_before(step), &data, &hashes, &export);
    bench.leave();
    built
}

/// `remove CASE LOOP STEP`
pub(crate) fn remove_until(args: &[String]) -> Result<()> {
    let (bench, step) = of_parent(args)?;
    let removed = bench.remove_with(&dies_before(step));
    bench.leave();
    removed
}

fn of_parent(args: &[String]) -> Result<(Bench, u64)> {
    let [case, device, step] = args else {
        bail!("CASE LOOP STEP");
    };
    Ok((Bench::of_parent(case, device)?, step.parse()?))
}

/// Whether a helper ended by itself, not by its own kill.
fn helper_ends(bench: &Bench, helper: &str, step: u64) -> Result<bool> {
    let status = Command::new(std::env::current_exe()?)
        .args(["helper", "iscsi", helper])
        .args(bench.for_child())
        .arg(step.to_string())
        .status()?;
    let killed = std::os::unix::process::ExitStatusExt::signal(&status) == Some(9);
    ensure!(
        killed || status.success(),
        "the helper {helper} at step {step}: {status}"
    );
    Ok(!killed)
}

pub(crate) fn killed_at_every_step() -> Result<()> {
    let bench = Bench::new("killed-at")?;
    let mut steps = 0;
    while !helper_ends(&bench, "build", steps)? {
        after_a_broken_build(&bench, steps)?;
        steps += 1;
    }
    ensure!(steps > 30, "only {steps} steps");
    let access = Access::Each([(bench.initiator.initiator().clone(), Some(bench::chap()?))].into());
    let (data, hashes, export) = bench.wanted(false, access);
    let mut removals = 0;
    loop {
        bench.build(&data, &hashes, &export)?;
        if helper_ends(&bench, "remove", removals)? {
            break;
        }
        after_a_broken_removal(&bench, removals)?;
        removals += 1;
    }
    println!("FIGURE killed at each of {steps} steps of building and {removals} of removing");
    bench.end()
}

/// A session to a target in a process of its own, its device, and the process.
fn session_to_a_process(bench: &Bench) -> Result<(Served, PathBuf)> {
    let served = bench.serve(OWN_PORT)?;
    let mut endpoint = bench.endpoint();
    endpoint.portal.set_port(OWN_PORT);
    let session = bench.initiator.login(&endpoint, None, &[0])?;
    let unit = session.unit(0).context("LUN 0")?;
    bench::wait_for_node(unit)?;
    bench::expect(&bench::read_all(&unit.path())?, &bench.data)?;
    Ok((served, unit.path()))
}

/// Reads fail within the time that the settings promise; how long it took.
fn reads_fail(bench: &Bench, reader: Reader, began: Instant) -> Result<Duration> {
    let ended = reader.thread.join().unwrap_or(Ok(()));
    let took = began.elapsed();
    let error = ended.err().context("reading never failed")?;
    ensure!(took <= bench_limit(), "reads failed after {took:?} only: {error}");
    let session = bench.initiator.sessions()?.pop().context("the session")?;
    ensure!(session.state != SessionState::LoggedIn, "{session:?}");
    Ok(took)
}

/// The session comes back by itself once the target does.
fn comes_back(bench: &Bench, device: &Path) -> Result<()> {
    let began = Instant::now();
    wait("the session to come back", || {
        let sessions = bench.initiator.sessions()?;
        let back = sessions
            .iter()
            .any(|session| session.state == SessionState::LoggedIn);
        Ok((back && bench::read_direct(device, 0).is_ok()).then_some(()))
    })?;
    println!("FIGURE back after the target came back: {:.1?}", began.elapsed());
    Ok(())
}

pub(crate) fn a_dead_parent_fails_within_seconds() -> Result<()> {
    let bench = Bench::new("dead")?;
    let (served, device) = session_to_a_process(&bench)?;
    let reader = Reader::start(device.clone());
    reader.goes_on()?;
    let began = Instant::now();
    drop(served);
    let took = reads_fail(&bench, reader, began)?;
    println!(
        "FIGURE a parent killed: reads failed after {took:.1?} (limit {:?})",
        bench_limit()
    );
    let served = bench.serve(OWN_PORT)?;
    comes_back(&bench, &device)?;
    drop(served);
    wait("the loss to be seen", || {
        Ok(bench
            .initiator
            .sessions()?
            .iter()
            .all(|s| s.state != SessionState::LoggedIn)
            .then_some(()))
    })?;
    logout_is_quick(&bench)?;
    bench.end()
}

pub(crate) fn a_silent_parent_fails_within_seconds() -> Result<()> {
    let bench = Bench::new("silent")?;
    let (served, device) = session_to_a_process(&bench)?;
    let reader = Reader::start(device.clone());
    reader.goes_on()?;
    let began = Instant::now();
    served.signal(Signal::SIGSTOP)?;
    let took = reads_fail(&bench, reader, began)?;
    println!(
        "FIGURE a parent stopped: reads failed after {took:.1?} (limit {:?})",
        bench_limit()
    );
    served.signal(Signal::SIGCONT)?;
    comes_back(&bench, &device)?;
    // A logout from a target that says nothing has its limit as well.
    served.signal(Signal::SIGSTOP)?;
    logout_is_quick(&bench)?;
    drop(served);
    bench.end()
}

pub(crate) fn iscsid_restarts_under_a_session() -> Result<()> {
    let bench = Bench::new("iscsid")?;
    let (served, device) = session_to_a_process(&bench)?;
    bench::kill_iscsid()?;
    ensure!(
        bench.initiator.sessions()?.len() == 1,
        "the session went with its daemon"
    );
    bench::expect(&bench::read_all(&device)?, &bench.data)?;
    let began = Instant::now();
    bench::start_iscsid()?;
    // The daemon takes the session over, for which it connects anew; reads may fail meanwhile, as if the parent had gone for a
    // moment, and then go on.
    let reader = wait("reads to last after the daemon's restart", || {
        comes_back(&bench, &device)?;
        let reader = Reader::start(device.clone());
        let lasts = bench::wait_at_most(Duration::from_secs(3), || {
            reader.thread.is_finished().then_some(())
        })
        .is_none();
        if lasts {
            return Ok(Some(reader));
        }
        println!(
            "FIGURE after the restart of iscsid reads failed once: {:?}",
            reader.end().err()
        );
        Ok(None)
    })?;
    println!(
        "FIGURE reads last after the restart of iscsid: {:.1?}, 3 s of which are the look",
        began.elapsed()
    );
    reader.goes_on()?;
    let began = Instant::now();
    drop(served);
    let took = reads_fail(&bench, reader, began)?;
    println!("FIGURE a parent killed after iscsid was restarted: reads failed after {took:.1?}");
    let _served = bench.serve(OWN_PORT)?;
    comes_back(&bench, &device)?;
    bench.end()
}
