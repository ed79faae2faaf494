//! Fail at k on the user plane, by kill -9 of real agents (`treeboot_tests::steps`): at a part of the moments, which `TREEBOOT_SEED`
//! chooses; with `TREEBOOT_STEPS=all` at all of them (`cargo xtask soak steps`), and with a verb's name at all of its own.

use std::time::Duration;

use anyhow::{Result, ensure};
use treeboot_tests::need::{Need, require};
use treeboot_tests::steps::{self, Choice, USER_PLANE};
use treeboot_types::PlaneKind;

use crate::support::{Machine, on_own_thread_within};

const NEEDS: [Need; 2] = [Need::Root, Need::Program("qemu-system-x86_64", "qemu-system-x86")];
/// Where not all are asked for: one moment of so many, and of `create` and `destroy`.
const STRIDES: (u64, u64) = (24, 6);

#[test]
fn a_verb_whose_agent_is_killed_at_any_step_leaves_nothing_and_is_finished_by_its_retry() -> Result<()> {
    if !require(&NEEDS) {
        return Ok(());
    }
    let choice = Choice::of_environment(STRIDES.0, STRIDES.1);
    let limit = Duration::from_secs(if choice.whole.is_some() { 7200 } else { 400 });
    on_own_thread_within(limit, Machine::Shared, async move || {
        let cluster = steps::cluster("steps", PlaneKind::User).await?;
        let sum = steps::verb_by_verb(&cluster, PlaneKind::User, USER_PLANE, &choice).await?;
        ensure!(sum.kills > 0, "nobody was killed");
        cluster.pass();
        Ok(())
    })
}
