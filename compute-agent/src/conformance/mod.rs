//! What every plane must show: one source, run on each.
//!
//! A [`Rig`] is a host with a plane under test and parents to read from. Each law builds what it needs through the
//! planner and the journal, as the agent does, and looks at it from outside, as a child or a VM does. A law panics
//! where it does not hold. Deliberately absent: the coordinator and the rpc surface, which no plane sees.

mod laws;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use treeboot_types::{HostName, ImageId, VmName};

use crate::apply::{Applier, ReachError};
use crate::journal::Journal;
use crate::plane::faulty::FaultMode;
use crate::plane::{Plane, Scope};
use crate::stack::{Access, Backing, Content, Sources, Wanted, WantedBase, WantedDisk};

/// An image that the rig's parents serve.
#[derive(Clone)]
pub struct TestImage {
    /// Its name.
    pub id: ImageId,
    /// What it is.
    pub content: Content,
    /// Its bytes.
    pub bytes: Arc<Vec<u8>>,
    /// Two different parents, each with everything.
    pub sources: [Sources; 2],
}

/// A host under test. Offsets and lengths are multiples of 4096.
#[allow(async_fn_in_trait, reason = "used generically, by tests in one task")]
pub trait Rig {
    /// The plane.
    fn plane(&self) -> Arc<dyn Plane>;
    /// Its journal.
    fn journal(&self) -> Journal;
    /// Image `n` (0 or 1) of the rig; the same one at each call.
    fn image(&self, n: usize) -> TestImage;
    /// The process dies (no good order) and starts again: a new plane and a new journal over the same host.
    async fn restart(&mut self);
    /// Reads an export as `host`.
    async fn read_export(
        &self,
        id: &ImageId,
        host: &HostName,
        at: u64,
        bytes: usize,
    ) -> Result<Vec<u8>, String>;
    /// Tries to write to an export as `host`.
    async fn write_export(&self, id: &ImageId, host: &HostName, at: u64, data: &[u8]) -> Result<(), String>;
    /// Reads a VM's disk.
    async fn read_disk(&self, vm: &VmName, at: u64, bytes: usize) -> Result<Vec<u8>, String>;
    /// Writes to a VM's disk.
    async fn write_disk(&self, vm: &VmName, at: u64, data: &[u8]) -> Result<(), String>;
    /// Makes what was written durable.
    async fn flush_disk(&self, vm: &VmName) -> Result<(), String>;
    /// Everything of ours that is on the host, durable or not; none when nothing is wanted.
    async fn residue(&self) -> Vec<String>;
}

/// Runs every law, each on a fresh rig from `make`.
pub async fn run<R: Rig>(make: impl AsyncFn() -> R) {
    laws::a_base_is_what_the_parents_have_and_cannot_be_written(make().await).await;
    laws::only_the_children_that_were_named_may_read(make().await).await;
    laws::each_disk_sees_its_own_writes_alone(make().await).await;
    laws::what_was_written_is_there_after_a_restart(make().await).await;
    laws::a_step_done_twice_changes_nothing(make().await).await;
    laws::what_is_wanted_is_what_is_listed(make().await).await;
    laws::new_parents_under_reads_are_not_noticed(make().await).await;
    laws::many_disks_at_once(make().await).await;
    laws::a_name_used_again_has_none_of_the_old_bytes(make().await).await;
    laws::removal_leaves_nothing(make().await).await;
}

/// Fails every step of building and of removing in turn, as an error and as a crash; afterwards nothing may leak,
/// and a retry must succeed. Returns how many faults were tried.
pub async fn fail_at_every_step<R: Rig>(make: impl AsyncFn() -> R) -> usize {
    let mut tried = 0;
    for removing in [false, true] {
        for mode in [FaultMode::Error, FaultMode::CrashBefore, FaultMode::CrashAfter] {
            tried += laws::fail_at_every_step(&make, removing, mode).await;
        }
    }
    tried
}

/// [`fail_at_every_step`] of building or of removing alone, in one mode, for rigs that take their time.
pub async fn fail_at_every_step_of<R: Rig>(
    make: impl AsyncFn() -> R,
    removing: bool,
    mode: FaultMode,
) -> usize {
    laws::fail_at_every_step(make, removing, mode).await
}

/// Builds a base and two disks, looks at them, and removes all: for tests of what happens beside it.
pub async fn build_and_remove(rig: &impl Rig) {
    laws::build_and_remove(rig).await;
}

fn host(n: u8) -> HostName {
    HostName::new(&format!("10.0.0.{n}")).expect("a valid name")
}

fn vm(n: usize) -> VmName {
    VmName::new(&format!("vm-{n}")).expect("a valid name")
}

fn disk(image: &TestImage) -> WantedDisk {
    WantedDisk {
        digest: image.content.digest,
        bytes: image.content.bytes,
    }
}

fn children(hosts: &[u8]) -> Access {
    Access::Hosts(hosts.iter().map(|&n| host(n)).collect())
}

/// The image attached under its parent number `parent`, for the children given, with disks for the VMs given.
fn wanted(image: &TestImage, parent: usize, hosts: &[u8], vms: impl IntoIterator<Item = usize>) -> Wanted {
    Wanted {
        bases: BTreeMap::from([(
            image.content.digest,
            WantedBase {
                content: image.content,
                backing: Backing::Cache,
                sources: image.sources[parent].clone(),
                exports: BTreeMap::from([(image.id.clone(), children(hosts))]),
            },
        )]),
        disks: vms.into_iter().map(|n| (vm(n), disk(image))).collect(),
        ..Wanted::default()
    }
}

/// Nothing, and the deltas of these VMs are to go.
fn nothing(vms: impl IntoIterator<Item = usize>) -> Wanted {
    Wanted {
        doomed_disks: vms.into_iter().map(vm).collect::<BTreeSet<_>>(),
        ..Wanted::default()
    }
}

fn applier(rig: &impl Rig) -> Applier {
    Applier {
        plane: rig.plane(),
        journal: rig.journal(),
    }
}

async fn reach(rig: &impl Rig, wanted: &Wanted) -> Result<(), ReachError> {
    applier(rig).reach(&Scope::All, wanted).await
}

/// Some bytes that are neither the image's nor another call's.
fn pattern(seed: u8, bytes: usize) -> Vec<u8> {
    (0..bytes)
        .map(|i| (i as u8).wrapping_mul(31) ^ seed.wrapping_mul(157) ^ 0x5a)
        .collect()
}
