//! The kernel plane of the agent: the suite that every plane must pass.
//!
//! What takes longer is a group of its own, `plane-faults`, which is run by hand.

mod killed;
mod paths;
mod rig;
mod strangers;

use std::future::Future;
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use treeboot_agent::conformance;
use treeboot_agent::plane::faulty::FaultMode;
use treeboot_dm::group::Kind;

use super::Group;

/// The suite, with each kind of cache.
pub(crate) const GROUP: Group = Group {
    name: "plane",
    cases: &[
        ("the_kernel_plane_conforms_with_bcache", || {
            case(conformance::run(|| rig::rig(Some(Kind::Bcache))))
        }),
        ("the_kernel_plane_conforms_with_dm_cache", || {
            case(conformance::run(|| rig::rig(Some(Kind::DmCache))))
        }),
        ("two_stripes_come_from_two_parents", || case(paths::two_stripes())),
        ("reads_survive_the_death_of_the_active_parent", || {
            case(paths::a_parent_dies())
        }),
        ("what_only_looks_like_ours_is_left_alone", || {
            case(strangers::are_left_alone())
        }),
    ],
    helpers: &[],
    sweep: super::devices::sweep,
};

/// The suite without a cache; and each step of building and of removing, failed and cut off.
pub(crate) const FAULTS: Group = Group {
    name: "plane-faults",
    cases: &[
        ("the_kernel_plane_conforms_without_a_cache", || {
            case(conformance::run(|| rig::rig(None)))
        }),
        ("an_agent_killed_20_times_leaves_nothing_unknown", || {
            case(killed::twenty_times())
        }),
        ("building_survives_an_error_at_every_step", || {
            faults(false, FaultMode::Error)
        }),
        ("building_survives_a_death_before_every_step", || {
            faults(false, FaultMode::CrashBefore)
        }),
        ("building_survives_a_death_after_every_step", || {
            faults(false, FaultMode::CrashAfter)
        }),
        ("removing_survives_an_error_at_every_step", || {
            faults(true, FaultMode::Error)
        }),
        ("removing_survives_a_death_before_every_step", || {
            faults(true, FaultMode::CrashBefore)
        }),
        ("removing_survives_a_death_after_every_step", || {
            faults(true, FaultMode::CrashAfter)
        }),
    ],
    helpers: &[("agent", killed::agent)],
    sweep: super::devices::sweep,
};

/// Fewer steps than these and the scenario builds nothing.
const LEAST_STEPS: usize = 7;

fn faults(removing: bool, mode: FaultMode) -> Result<()> {
    let mut tried = 0;
    case(async {
        tried = conformance::fail_at_every_step_of(|| rig::rig(Some(Kind::Bcache)), removing, mode).await;
    })?;
    println!("{tried} faults");
    ensure!(tried >= LEAST_STEPS, "{tried} faults");
    Ok(())
}

/// Runs a case on a runtime of its own.
fn case(case: impl Future<Output = ()>) -> Result<()> {
    rig::start_iscsid();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let ran = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        runtime.block_on(async {
            case.await;
            rig::tidy_up().await;
        });
    }));
    // What hangs in the kernel must not keep the others from being tried.
    runtime.shutdown_timeout(Duration::from_secs(1));
    ran.map_err(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied());
        anyhow!("{}", text.unwrap_or("it panicked"))
    })
}
