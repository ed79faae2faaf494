//! What the kernel counts: of block devices, of LIO's LUNs, of the cache.

use treeboot_dm::DmDevice;
use treeboot_types::{Digest, VmName};

use super::keeper::Keeper;
use super::sys::block_counts;
use super::{KernelPlane, exports};
use crate::plane::{BaseStats, DiskStats};

impl KernelPlane {
    pub(super) fn count_base(&self, digest: &Digest) -> Option<BaseStats> {
        if !self.bases.lock().contains(digest) {
            return None;
        }
        let count = |device: &DmDevice| {
            let number = self.sys.mapper.number(device).ok().flatten()?;
            block_counts(number)
        };
        let base = count(&DmDevice::Base(*digest)).unwrap_or_default();
        let children = count(&DmDevice::Export(*digest)).unwrap_or_default();
        let feed = self.feed(digest);
        let (parent_bytes, fallback_bytes) = feed.as_ref().map_or((0, 0), |feed| feed.totals());
        Some(BaseStats {
            shipped_wire_bytes: exports::shipped_bytes(&self.sys, digest),
            parent_bytes,
            fallback_bytes,
            // Everything that reads the base reads it through device-mapper: disks, and the export, whose reads are counted here too.
            guest_read_bytes: base.read_bytes.saturating_sub(children.read_bytes),
            child_read_bytes: children.read_bytes,
            paths: feed.map(|feed| feed.path_stats()).unwrap_or_default(),
            cached_bytes: self.keepers.lock().get(digest).map_or(0, Keeper::filled_bytes),
            ..BaseStats::default()
        })
    }

    pub(super) fn count_disk(&self, vm: &VmName) -> Option<DiskStats> {
        if !self.disks.lock().contains(vm) {
            return None;
        }
        let seen = self.sys.mapper.find(&DmDevice::Disk(vm.clone())).ok().flatten()?;
        let counts = block_counts(seen.number).unwrap_or_default();
        let delta = std::fs::metadata(self.sys.deltas.blocks(vm)).ok();
        let allocated = delta.map_or(0, |delta| std::os::unix::fs::MetadataExt::blocks(&delta) * 512);
        Some(DiskStats {
            delta_bytes: allocated,
            data_bytes: 0,
            read_bytes: counts.read_bytes,
            written_bytes: counts.written_bytes,
            sessions: seen.open_count,
        })
    }
}
