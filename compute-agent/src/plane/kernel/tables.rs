//! The tables of a content's stack and of a disk: values from values.
//!
//! From below: multipath (one a stripe) → switch (where there are several stripes) → verity → cache → base → export. All of it is
//! read-only. The export is a device of its own because LIO claims what it serves, and device-mapper claims the base for the disks.

use treeboot_dm::table::{
    Multipath, OnCorruption, Path, PathGroup, PathSelector, Persistence, Table, Target, Verity,
};
use treeboot_dm::{DeviceNumber, Sectors, TableError};
use treeboot_types::{Digest, PathPolicy, VERITY_BLOCK_BYTES};

/// All paths of a stripe get the same share of a service-time selector's estimate to begin with.
const THROUGHPUT: u32 = 1;
/// Bytes of a sector.
pub(super) const SECTOR: u64 = 512;
/// The block of the hash device at which the tree begins, behind its superblock.
const TREE_BLOCK: u64 = 1;

/// A stripe's devices, as far as there are any: parents that share the load, then each fallback by itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct StripeDevices {
    pub(super) active: Vec<DeviceNumber>,
    pub(super) fallbacks: Vec<DeviceNumber>,
}

impl StripeDevices {
    /// Whether a device is one of them.
    pub(super) fn holds(&self, device: DeviceNumber) -> bool {
        self.active.contains(&device) || self.fallbacks.contains(&device)
    }
}

/// The multipath device of a stripe. Without any device its reads wait.
pub(super) fn multipath(
    sectors: Sectors,
    policy: PathPolicy,
    devices: &StripeDevices,
) -> Result<Table, TableError> {
    let selector = match policy {
        PathPolicy::RoundRobin => PathSelector::RoundRobin,
        PathPolicy::ServiceTime => PathSelector::ServiceTime,
        PathPolicy::QueueLength => PathSelector::QueueLength,
    };
    let group = |devices: &[DeviceNumber]| PathGroup {
        selector,
        paths: devices
            .iter()
            .map(|&device| Path {
                device,
                throughput: THROUGHPUT,
            })
            .collect(),
    };
    let active = (!devices.active.is_empty()).then(|| group(&devices.active));
    let fallbacks = devices.fallbacks.chunks(1).map(group);
    let groups: Vec<_> = active.into_iter().chain(fallbacks).collect();
    Table::whole(
        sectors,
        Target::Multipath(Multipath {
            queue_if_no_path: true,
            bio_based: false,
            first_group: u32::from(!groups.is_empty()),
            groups,
        }),
    )
}

/// The device that routes each stripe unit to its stripe. Which goes where is told by [`switch_mappings`].
pub(super) fn switch(
    sectors: Sectors,
    unit_bytes: u64,
    stripes: &[DeviceNumber],
) -> Result<Table, TableError> {
    Table::whole(
        sectors,
        Target::Switch {
            region: Sectors((unit_bytes / SECTOR).max(1)),
            paths: stripes.iter().map(|&device| (device, Sectors(0))).collect(),
        },
    )
}

/// The message by which stripe units go to `stripes` devices by turns (`dm-switch.rst`): the first turn by name, then "as before".
pub(super) fn switch_mappings(sectors: Sectors, unit_bytes: u64, stripes: u64) -> String {
    let region = (unit_bytes / SECTOR).max(1);
    let regions = sectors.0.div_ceil(region);
    let first = (0..stripes.min(regions)).map(|stripe| {
        if stripe == 0 {
            " 0:0".to_owned()
        } else {
            format!(" :{stripe:x}")
        }
    });
    let mut message = String::from("set_region_mappings");
    message.extend(first);
    if regions > stripes {
        message.push_str(&format!(" R{stripes:x},{:x}", regions - stripes));
    }
    message
}

/// What checks each block.
pub(super) fn verity(
    bytes: u64,
    data: DeviceNumber,
    hashes: DeviceNumber,
    root: Digest,
) -> Result<Table, TableError> {
    Table::whole(
        Sectors(bytes / SECTOR),
        Target::Verity(Verity {
            data,
            hashes,
            data_blocks: bytes / u64::from(VERITY_BLOCK_BYTES),
            hash_start_block: TREE_BLOCK,
            root,
            on_corruption: OnCorruption::Fail,
            ignore_zero_blocks: false,
            check_at_most_once: false,
        }),
    )
}

/// A run of another device from its beginning.
pub(super) fn linear(sectors: Sectors, device: DeviceNumber) -> Result<Table, TableError> {
    Table::whole(
        sectors,
        Target::Linear {
            device,
            offset: Sectors(0),
        },
    )
}

/// A VM's disk.
pub(super) fn disk(
    sectors: Sectors,
    base: DeviceNumber,
    delta: DeviceNumber,
    chunk: Sectors,
) -> Result<Table, TableError> {
    Table::whole(
        sectors,
        Target::Snapshot {
            origin: base,
            delta,
            persistence: Persistence::Persistent,
            chunk,
        },
    )
}

/// Bytes that a delta can come to need: every chunk written, and the areas that say where each lies (kernel `dm-snap-persistent.c`: a
/// header, then areas of one chunk of 16-byte entries before as many chunks of data).
pub(super) fn largest_delta_bytes(disk_bytes: u64, chunk: Sectors) -> u64 {
    let chunk_bytes = (chunk.0 * SECTOR).max(SECTOR);
    let chunks = disk_bytes.div_ceil(chunk_bytes);
    let entries = chunk_bytes / 16;
    let areas = chunks.div_ceil(entries) + 1;
    (1 + chunks + areas) * chunk_bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(minor: u32) -> DeviceNumber {
        DeviceNumber { major: 8, minor }
    }

    #[test]
    fn parents_share_a_group_and_each_fallback_has_its_own() {
        let devices = StripeDevices {
            active: vec![device(0), device(16)],
            fallbacks: vec![device(32), device(48)],
        };
        let cases = [
            (
                devices.clone(),
                PathPolicy::RoundRobin,
                "0 800 multipath 1 queue_if_no_path 0 3 1 round-robin 0 2 1 8:0 1 8:16 1 round-robin 0 1 1 8:32 1 round-robin 0 1 1 8:48 1",
            ),
            (
                StripeDevices {
                    fallbacks: vec![],
                    ..devices.clone()
                },
                PathPolicy::ServiceTime,
                "0 800 multipath 1 queue_if_no_path 0 1 1 service-time 0 2 2 8:0 1 1 8:16 1 1",
            ),
            (
                StripeDevices {
                    active: vec![],
                    fallbacks: vec![device(32)],
                },
                PathPolicy::QueueLength,
                "0 800 multipath 1 queue_if_no_path 0 1 1 queue-length 0 1 1 8:32 1",
            ),
            (
                StripeDevices::default(),
                PathPolicy::RoundRobin,
                "0 800 multipath 1 queue_if_no_path 0 0 0",
            ),
        ];
        for (devices, policy, expected) in cases {
            let table = multipath(Sectors(800), policy, &devices).unwrap();
            assert_eq!(table.to_string().trim_end(), expected);
        }
    }

    #[test]
    fn stripe_units_go_to_stripes_by_turns() {
        // 5 units of 1 MiB over two stripes; the last one is short.
        let sectors = Sectors(4 * 2048 + 8);
        assert_eq!(
            switch_mappings(sectors, 1 << 20, 2),
            "set_region_mappings 0:0 :1 R2,3"
        );
        assert_eq!(
            switch_mappings(Sectors(2048), 1 << 20, 2),
            "set_region_mappings 0:0"
        );
        assert_eq!(
            switch_mappings(Sectors(4096), 1 << 20, 2),
            "set_region_mappings 0:0 :1"
        );
        let table = switch(sectors, 1 << 20, &[device(1), device(2)]).unwrap();
        assert_eq!(table.to_string().trim_end(), "0 8200 switch 2 2048 0 8:1 0 8:2 0");
    }

    #[test]
    fn a_delta_has_room_for_every_chunk() {
        // 4 KiB chunks: 256 entries an area.
        let bytes = largest_delta_bytes(256 * 4096, Sectors(8));
        assert_eq!(bytes, (1 + 256 + 2) * 4096);
        assert!(largest_delta_bytes(1 << 40, Sectors(8)) > 1 << 40);
    }
}
