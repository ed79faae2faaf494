//! What the user plane counts: on the sockets of its server, in its caches, on its paths.

use treeboot_types::{Digest, Iqn, VmName};

use super::UserPlane;
use crate::plane::{BaseStats, DiskStats, ParentFault};

impl UserPlane {
    pub(super) fn faults_of_parents(&self) -> Vec<ParentFault> {
        let sources: Vec<_> = self.state.lock().paths.values().cloned().collect();
        let now = tokio::time::Instant::now();
        sources
            .iter()
            .flat_map(|source| source.take_faults(now))
            .collect()
    }

    pub(super) fn count_base(&self, digest: &Digest) -> Option<BaseStats> {
        let (base, source, images, past) = {
            let state = self.state.lock();
            let exports = state
                .exports
                .iter()
                .filter(|(_, export)| export.digest == *digest);
            let images: Vec<_> = exports.map(|(image, _)| image.clone()).collect();
            (
                state.bases.get(digest).cloned()?,
                state.paths.get(digest).cloned(),
                images,
                state.shipped.get(digest).copied().unwrap_or(0),
            )
        };
        let live = images
            .iter()
            .filter_map(|image| self.server.stats(&Iqn::of_image(image)));
        let counters = base.cache.counters();
        let (parent_bytes, fallback_bytes) = source.as_ref().map_or((0, 0), |source| source.totals());
        Some(BaseStats {
            shipped_wire_bytes: past + live.map(|stats| stats.wire_bytes_out).sum::<u64>(),
            parent_bytes,
            fallback_bytes,
            hash_bytes: counters.fetched_hash_bytes,
            guest_read_bytes: counters.guest_read_bytes,
            guest_unique_bytes: counters.guest_unique_bytes,
            child_read_bytes: counters.child_read_bytes,
            chunk_hits: counters.chunk_hits,
            chunk_misses: counters.chunk_misses,
            chunk_joined: counters.chunk_joined,
            bad_chunks: counters.bad_chunks,
            cached_bytes: counters.cached_bytes,
            uncached_bytes: counters.uncached_bytes,
            longest_stall_us: counters.longest_stall_us,
            paths: source.map(|source| source.paths()).unwrap_or_default(),
        })
    }

    pub(super) fn count_disk(&self, vm: &VmName) -> Option<DiskStats> {
        let open = self.state.lock().disks.get(vm).cloned()?;
        let target = self.server.stats(&Iqn::of_disk(vm)).unwrap_or_default();
        Some(DiskStats {
            delta_bytes: open.layers.allocated_bytes().unwrap_or(0),
            data_bytes: open.layers.data_bytes(),
            read_bytes: target.read_bytes,
            written_bytes: target.written_bytes,
            sessions: u32::try_from(target.sessions.len()).unwrap_or(u32::MAX),
        })
    }
}
