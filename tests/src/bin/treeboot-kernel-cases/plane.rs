//! The kernel plane of the agent: the suite that every plane must pass.
//!
//! What takes longer is a group of its own, `plane-faults`, which `cargo xtask soak kernel` runs.

mod agents;
mod bad_input;
mod caching;
mod growing;
mod killed;
mod paths;
mod reading;
mod rig;
mod sectors;
mod steps;
mod strangers;

use std::future::Future;
use std::time::{Duration, Instant};

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
        ("a_disk_of_the_agent_has_a_stable_name", || {
            case(agents::a_disk_has_a_stable_name())
        }),
    ],
    helpers: &[],
    sweep: super::devices::sweep,
};

/// The cache of an agent that runs fails, or is full; and a disk with partitions is mounted.
pub(crate) const CACHING: Group = Group {
    name: "plane-cache",
    cases: &[
        ("the_agent_leaves_a_bcache_that_dies_while_it_is_filled", || {
            case(caching::a_device_dies(Kind::Bcache, true))
        }),
        ("the_agent_leaves_a_dm_cache_whose_device_dies", || {
            case(caching::a_device_dies(Kind::DmCache, false))
        }),
        ("a_full_bcache_is_begun_anew", || {
            case(caching::no_place_left(Kind::Bcache))
        }),
        ("a_partition_in_units_of_512_bytes_is_mounted", || {
            case(sectors::a_partition_in_units_of_512_bytes())
        }),
        ("what_a_host_lacks_is_named_with_the_command", || {
            case(bad_input::what_a_host_lacks())
        }),
        ("an_image_of_half_a_block_is_refused", || {
            case(bad_input::half_a_block())
        }),
        ("a_cache_device_of_somebody_is_left_alone", || {
            case(bad_input::a_cache_device_of_somebody())
        }),
    ],
    helpers: &[("open", bad_input::open)],
    sweep: super::devices::sweep,
};

/// The real agent, killed by -9 right before and right after a step or a change of its journal.
pub(crate) const STEPS: Group = Group {
    name: "plane-steps",
    cases: &[(
        "a_verb_whose_agent_is_killed_at_any_step_leaves_nothing_and_is_finished_by_its_retry",
        || case(steps::killed_at_any()),
    )],
    helpers: &[],
    sweep: super::devices::sweep,
};

/// The suite without a cache; more of what fails and changes under a cache; and each step of building and of removing, failed and cut
/// off. `cargo xtask soak kernel` runs it.
pub(crate) const FAULTS: Group = Group {
    name: "plane-faults",
    cases: &[
        ("the_kernel_plane_conforms_without_a_cache", || {
            case(conformance::run(|| rig::rig(None)))
        }),
        ("an_agent_killed_20_times_leaves_nothing_unknown", || {
            case(killed::twenty_times())
        }),
        ("the_agent_leaves_a_bcache_whose_device_dies", || {
            case(caching::a_device_dies(Kind::Bcache, false))
        }),
        ("the_agent_leaves_a_dm_cache_that_dies_while_it_is_filled", || {
            case(caching::a_device_dies(Kind::DmCache, true))
        }),
        ("bcache_on_several_devices_is_rebuilt_with_one_more", || {
            case(caching::several_devices(Kind::Bcache))
        }),
        ("dm_cache_on_several_devices_grows_by_one_more", || {
            case(caching::several_devices(Kind::DmCache))
        }),
        ("a_full_dm_cache_is_begun_anew", || {
            case(caching::no_place_left(Kind::DmCache))
        }),
        (
            "a_delta_grows_by_steps_under_writes",
            || case(growing::by_steps()),
        ),
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

/// Whatever a case waits for comes within seconds, on a busy machine within ten times as many.
const COMES_WITHIN: Duration = Duration::from_secs(90);

/// Looks again and again until it is so.
async fn until(what: &str, is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(
            begun.elapsed() < COMES_WITHIN,
            "{what} did not come within {COMES_WITHIN:?}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

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
