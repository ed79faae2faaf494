//! VMs' disks: a persistent dm-snapshot over the base, its delta in a file.
//!
//! A delta's file is sparse. By default it has the size that it can come to need at most, so that a disk never fills while the agent is
//! away; with a step set, it begins with one and is extended by one whenever less than half of one is left.

use std::fs::OpenOptions;

use treeboot_dm::status::SnapshotStatus;
use treeboot_dm::{DeviceNumber, DmDevice, Mode, Sectors, Status, loops};
use treeboot_types::VmName;

use super::failed;
use super::sys::{Sys, attach, detach, loop_error, mapper_error, record_error};
use super::tables::{self, SECTOR, largest_delta_bytes};
use crate::plane::PlaneError;
use crate::stack::WantedDisk;

/// The least that a delta's file begins with: header, one area and some chunks, whatever the step.
const LEAST_DELTA_BYTES: u64 = 1 << 20;

impl Sys {
    fn chunk(&self) -> Sectors {
        Sectors(u64::from(self.settings.delta_chunk_bytes) / SECTOR)
    }
}

/// Makes an empty delta.
pub(super) fn create(sys: &Sys, vm: &VmName, disk: WantedDisk) -> Result<(), PlaneError> {
    let most = largest_delta_bytes(disk.bytes, sys.chunk());
    let bytes = match sys.settings.delta_step {
        Some(step) => step.max(LEAST_DELTA_BYTES).min(most),
        None => most,
    };
    sys.deltas
        .create(vm, disk, bytes)
        .map_err(|error| PlaneError::io(format!("making the delta of VM '{vm}'"), error))
}

/// Makes the disk: the delta over the base.
pub(super) fn serve(sys: &Sys, vm: &VmName, disk: WantedDisk) -> Result<DeviceNumber, PlaneError> {
    let device = DmDevice::Disk(vm.clone());
    let base = sys.number(&DmDevice::Base(disk.digest))?;
    let delta = attach(&sys.deltas.blocks(vm), Mode::ReadWrite)?;
    let table = tables::disk(Sectors(disk.bytes / SECTOR), base, delta.number, sys.chunk())
        .map_err(|error| failed("a table", error))?;
    let made = sys.ensure(&device, &table, Mode::ReadWrite);
    let invalid = made.is_ok() && matches!(status(sys, vm)?, Some(SnapshotStatus::Invalid));
    if made.is_err() || invalid {
        // Nothing half-made stays.
        let undone = stop(sys, vm);
        made?;
        undone?;
        return Err(PlaneError::Damaged {
            what: format!("the delta of VM '{vm}'"),
            why: "dm-snapshot calls it invalid: it was full, or a write to it failed".into(),
        });
    }
    sys.number(&device)
}

/// Removes the disk; the delta stays.
pub(super) fn stop(sys: &Sys, vm: &VmName) -> Result<(), PlaneError> {
    sys.remove(&DmDevice::Disk(vm.clone()))?;
    detach(&sys.deltas.blocks(vm))
}

/// Deletes a delta that no disk uses.
pub(super) fn delete(sys: &Sys, vm: &VmName) -> Result<(), PlaneError> {
    detach(&sys.deltas.blocks(vm))?;
    sys.deltas
        .remove(vm)
        .map_err(|error| PlaneError::io(format!("removing the delta of VM '{vm}'"), error))
}

/// How full a disk's delta is; `None` where there is no such disk.
pub(super) fn status(sys: &Sys, vm: &VmName) -> Result<Option<SnapshotStatus>, PlaneError> {
    let lines = sys
        .mapper
        .status(&DmDevice::Disk(vm.clone()))
        .map_err(mapper_error)?;
    Ok(lines.into_iter().find_map(|line| match line.status {
        Status::Snapshot(status) => Some(status),
        _ => None,
    }))
}

/// What a look at a disk's delta led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Growth {
    /// There is room.
    Enough,
    /// It was extended to this many bytes.
    Grown(u64),
    /// It is as large as it can come to need.
    Largest,
    /// It is of no more use.
    Lost,
}

/// Extends a delta where it begins to fill.
pub(super) fn grow(sys: &Sys, vm: &VmName, step: u64) -> Result<Growth, PlaneError> {
    let (used, total) = match status(sys, vm)? {
        Some(SnapshotStatus::Active { used, total, .. }) => (used.0 * SECTOR, total.0 * SECTOR),
        Some(SnapshotStatus::Invalid | SnapshotStatus::Overflow) => return Ok(Growth::Lost),
        _ => return Ok(Growth::Enough),
    };
    let Some(super::record::DeltaFiles::Whole(disk)) = sys.deltas.look(vm).map_err(record_error)? else {
        return Ok(Growth::Enough);
    };
    let most = largest_delta_bytes(disk.bytes, sys.chunk());
    if total.saturating_sub(used) > step / 2 {
        return Ok(Growth::Enough);
    }
    let path = sys.deltas.blocks(vm);
    let what = || format!("extending the delta of VM '{vm}'");
    let file = OpenOptions::new()
        .write(true)
        .open(&path)
        .map_err(|error| PlaneError::io(what(), error))?;
    let bytes = file
        .metadata()
        .map_err(|error| PlaneError::io(what(), error))?
        .len();
    // The kernel tells the size that it saw at the last allocation, so the file may be larger already.
    if bytes > total && bytes.saturating_sub(used) > step / 2 {
        return Ok(Growth::Enough);
    }
    // Whoever wrote faster than was foreseen gets more.
    let wanted = (bytes + step).max(used + 2 * step).min(most);
    if wanted <= bytes {
        return Ok(Growth::Largest);
    }
    file.set_len(wanted)
        .map_err(|error| PlaneError::io(what(), error))?;
    for device in loops::find(&path).map_err(loop_error)? {
        loops::set_capacity(&device).map_err(loop_error)?;
    }
    Ok(Growth::Grown(wanted))
}
