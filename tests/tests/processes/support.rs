//! What the tests share: a cluster for each, on a thread of its own, with a limit.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use treeboot_tests::cluster::{Cluster, Plan};
use treeboot_tests::wait::within;

/// For one test as a whole, guests' boots on a busy machine of two cores included. A healthy one takes 1 to 20 s.
const TEST_LIMIT: Duration = Duration::from_secs(180);

/// How a test shares the machine with others.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Machine {
    /// It mostly waits, or computes little.
    Shared,
    /// It boots guests or measures time.
    Alone,
}

static MACHINE: parking_lot::RwLock<()> = parking_lot::RwLock::new(());

/// Runs a test on a thread and runtime of its own (a thread that entered a network namespace does not come back).
pub(crate) fn on_own_thread<T>(machine: Machine, test: T) -> Result<()>
where
    T: AsyncFnOnce() -> Result<()> + Send + 'static,
{
    on_own_thread_within(TEST_LIMIT, machine, test)
}

/// As [`on_own_thread`], for a test that takes longer than others.
pub(crate) fn on_own_thread_within<T>(limit: Duration, machine: Machine, test: T) -> Result<()>
where
    T: AsyncFnOnce() -> Result<()> + Send + 'static,
{
    let thread = std::thread::spawn(move || {
        let (_shared, _alone) = match machine {
            Machine::Shared => (Some(MACHINE.read()), None),
            Machine::Alone => (None, Some(MACHINE.write())),
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("no runtime")?;
        runtime.block_on(async { within(limit, "the test", test()).await? })
    });
    match thread.join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// Runs a test with a started cluster, whose logs are kept where the test fails.
pub(crate) fn with_cluster<T>(label: &str, machine: Machine, plan: Plan, test: T) -> Result<()>
where
    T: AsyncFnOnce(&Cluster) -> Result<()> + Send + 'static,
{
    let label = label.to_owned();
    on_own_thread(machine, async move || {
        let cluster = Cluster::start(&label, &plan).await?;
        test(&cluster).await?;
        cluster.pass();
        Ok(())
    })
}

/// mount(8) with these arguments before the folder, which is made. What is mounted below a cluster's folder goes with it.
pub(crate) fn mount(args: &[impl AsRef<OsStr>], at: &Path) -> Result<()> {
    std::fs::create_dir_all(at)?;
    let output = Command::new("mount")
        .args(args)
        .arg(at)
        .output()
        .context("could not start mount")?;
    ensure!(
        output.status.success(),
        "mount: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// `treeboot` with these arguments ends with this exit code, and with words that have this part.
pub(crate) async fn refused(cluster: &Cluster, args: &[&str], code: i32, part: &str) -> Result<()> {
    let output = cluster.treeboot_output(args).await?;
    let words = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(code) && words.contains(part),
        "{args:?}: {}, {words}, not {code} and '{part}'",
        output.status
    );
    Ok(())
}
