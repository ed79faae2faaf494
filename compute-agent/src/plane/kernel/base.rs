//! A content's devices from the paths up to the base: built from below, taken down from above.

use std::path::PathBuf;

use treeboot_dm::{DeviceNumber, DmDevice, Mode, Sectors, loops};
use treeboot_types::{Digest, StripeIndex, VERITY_BLOCK_BYTES};

use super::sys::{Sys, attach, detach, loop_error, mapper_error};
use super::tables::{self, SECTOR, StripeDevices};
use super::{cached, failed, record};
use crate::plane::PlaneError;
use crate::stack::{Backing, Content, Sources};

pub(super) fn table_error(error: treeboot_dm::TableError) -> PlaneError {
    failed("a table", error)
}

/// Makes the multipath devices of a content, and the switch over them where there are several; gives what verity reads. Surplus
/// stripes of an earlier shape go last, when nothing reads them any more.
pub(super) fn feed(
    sys: &Sys,
    digest: Digest,
    bytes: u64,
    sources: &Sources,
    devices: &[StripeDevices],
) -> Result<DeviceNumber, PlaneError> {
    let sectors = Sectors(bytes / SECTOR);
    let mut numbers = Vec::new();
    for (index, (stripe, devices)) in (0u16..).zip(sources.stripes.iter().zip(devices)) {
        let device = DmDevice::Multipath(digest, StripeIndex(index));
        let table = tables::multipath(sectors, stripe.policy, devices).map_err(table_error)?;
        sys.ensure(&device, &table, Mode::ReadOnly)?;
        numbers.push(sys.number(&device)?);
    }
    let data = match numbers.as_slice() {
        [] => {
            return Err(PlaneError::Missing {
                what: format!("a stripe of content {}", digest.short()),
            });
        }
        [one] => *one,
        several => {
            let switch = DmDevice::Switch(digest);
            let table = tables::switch(sectors, sources.unit_bytes, several).map_err(table_error)?;
            sys.ensure(&switch, &table, Mode::ReadOnly)?;
            // A table that was loaded anew sends all to the first stripe, whose parents have everything too, until it is told.
            let message = tables::switch_mappings(sectors, sources.unit_bytes, several.len() as u64);
            sys.mapper
                .message(&switch, Sectors(0), &message)
                .map_err(mapper_error)?;
            sys.number(&switch)?
        }
    };
    Ok(data)
}

/// Removes stripes that are more than `stripes`, and a switch over one.
pub(super) fn drop_surplus(sys: &Sys, digest: Digest, stripes: usize) -> Result<(), PlaneError> {
    if stripes < 2 {
        sys.remove(&DmDevice::Switch(digest))?;
    }
    for seen in sys.mapper.list().map_err(mapper_error)? {
        if let DmDevice::Multipath(of, index) = &seen.device
            && *of == digest
            && usize::from(index.0) >= stripes
        {
            sys.remove(&seen.device)?;
        }
    }
    Ok(())
}

/// Makes verity read from `data`, the hash tree from its file.
pub(super) fn check(
    sys: &Sys,
    content: &Content,
    backing: Backing,
    data: DeviceNumber,
) -> Result<DeviceNumber, PlaneError> {
    let digest = content.digest;
    let file = sys
        .hash_file(&digest, backing)
        .ok_or_else(|| PlaneError::Missing {
            what: format!("a store for content {}", digest.short()),
        })?;
    let hashes = attach(&file, Mode::ReadOnly)?;
    let device = DmDevice::Verity(digest);
    let table = tables::verity(content.bytes, data, hashes.number, digest).map_err(table_error)?;
    sys.ensure(&device, &table, Mode::ReadOnly)?;
    sys.number(&device)
}

/// Makes the device through which everything above reads from verity. VMs, children and the filler often want a chunk at the same
/// moment; nothing above this joins them.
pub(super) fn join_reads(sys: &Sys, digest: &Digest) -> Result<DeviceNumber, PlaneError> {
    // The name in `/dev/mapper` is for people, and may lag behind.
    let verity = sys.number(&DmDevice::Verity(*digest))?;
    let device = loops::join_reads(&verity_node(verity), VERITY_BLOCK_BYTES).map_err(loop_error)?;
    Ok(device.number)
}

/// device-mapper's own node.
fn verity_node(verity: DeviceNumber) -> PathBuf {
    PathBuf::from(format!("/dev/dm-{}", verity.minor))
}

/// Puts the base over the cache group's part for the content.
pub(super) fn finish(sys: &Sys, content: &Content, below: DeviceNumber) -> Result<(), PlaneError> {
    let device = DmDevice::Base(content.digest);
    let table = tables::linear(Sectors(content.bytes / SECTOR), below).map_err(table_error)?;
    sys.ensure(&device, &table, Mode::ReadOnly).map(drop)
}

/// The device that verity checks for a stored content: the data's file.
pub(super) fn stored_data(sys: &Sys, content: &Content) -> Result<DeviceNumber, PlaneError> {
    let file = sys
        .data_file(&content.digest)
        .ok_or_else(|| PlaneError::Missing {
            what: format!("a store for content {}", content.digest.short()),
        })?;
    Ok(attach(&file, Mode::ReadOnly)?.number)
}

/// Removes everything between the paths and the base, the base first; whatever is not there is gone already. Sessions, the hash file
/// and what the cache holds stay.
pub(super) fn tear_down(sys: &Sys, digest: &Digest) -> Result<(), PlaneError> {
    let mut devices: Vec<DmDevice> = sys
        .mapper
        .list()
        .map_err(mapper_error)?
        .into_iter()
        .map(|seen| seen.device)
        .filter(|device| content_of(device) == Some(digest))
        .collect();
    // The grammar's order is from below.
    devices.sort();
    let above = |device: &&DmDevice| matches!(device, DmDevice::Base(_) | DmDevice::Export(_));
    // Whoever waits for a parent below has a device open. Nobody uses the base any more, so nobody is to wait.
    for device in devices
        .iter()
        .filter(|device| matches!(device, DmDevice::Multipath(..)))
    {
        // One that is half-made takes no message, and has nobody waiting.
        let _ = sys.mapper.message(device, Sectors(0), "fail_if_no_path");
    }
    for device in devices.iter().rev().filter(above) {
        sys.remove(device)?;
    }
    cached::release(sys, digest)?;
    let of_group = |device: &DmDevice| {
        matches!(
            device,
            DmDevice::Backing(_) | DmDevice::Cached(_) | DmDevice::Served(_)
        )
    };
    if let Some(verity) = sys
        .mapper
        .number(&DmDevice::Verity(*digest))
        .map_err(mapper_error)?
    {
        loops::part_reads(&verity_node(verity)).map_err(loop_error)?;
    }
    let below = devices.iter().rev().filter(|device| !above(device));
    for device in below.filter(|device| !of_group(device)) {
        sys.remove(device)?;
    }
    for backing in [Backing::Cache, Backing::Store] {
        if let Some(file) = sys.hash_file(digest, backing) {
            detach(&file)?;
        }
    }
    if let Some(file) = sys.data_file(digest) {
        detach(&file)?;
    }
    Ok(())
}

/// The content to which a device belongs.
pub(super) fn content_of(device: &DmDevice) -> Option<&Digest> {
    match device {
        DmDevice::Multipath(digest, _)
        | DmDevice::Switch(digest)
        | DmDevice::Verity(digest)
        | DmDevice::Backing(digest)
        | DmDevice::Cached(digest)
        | DmDevice::Served(digest)
        | DmDevice::Base(digest)
        | DmDevice::Export(digest) => Some(digest),
        DmDevice::Origins
        | DmDevice::CacheData
        | DmDevice::CacheGuard
        | DmDevice::CacheMetadata
        | DmDevice::CacheGroup
        | DmDevice::Disk(_) => None,
    }
}

/// Deletes a content's cache directory.
pub(super) fn drop_cache(sys: &Sys, digest: &Digest) -> Result<(), PlaneError> {
    let dir = sys.cache_dir(digest);
    cached::forget(sys, digest)?;
    record::gone(std::fs::remove_dir_all(&dir))
        .map_err(|error| PlaneError::io(format!("removing {}", dir.display()), error))?;
    cached::end_if_unused(sys)
}
