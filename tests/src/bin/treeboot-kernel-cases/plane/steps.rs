//! Fail at k on the kernel plane, by kill -9 of the real agent (`treeboot_tests::steps`): at a part of the moments, and where
//! `TREEBOOT_STEPS` names a verb, at all of its own.

use anyhow::{Result, ensure};
use treeboot_tests::steps::{self, Choice, KERNEL_PLANE};
use treeboot_types::PlaneKind;

/// Where not all are asked for: one moment of so many. A kill takes some seconds in a guest.
const STRIDE: u64 = 24;

/// The case.
pub(super) async fn killed_at_any() {
    killed().await.unwrap_or_else(|error| panic!("{error:#}"));
}

async fn killed() -> Result<()> {
    let choice = Choice::of_environment(STRIDE, STRIDE);
    let cluster = steps::cluster("plane-steps", PlaneKind::Kernel).await?;
    let sum = steps::verb_by_verb(&cluster, PlaneKind::Kernel, KERNEL_PLANE, &choice).await?;
    ensure!(sum.kills > 0, "nobody was killed");
    for host in &cluster.hosts {
        host.terminate().await?;
    }
    cluster.pass();
    Ok(())
}
