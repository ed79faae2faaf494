//! Reads of the cache devices themselves. A dm-cache whose device fails says nothing of it: what it has cached cannot be read, and
//! its status is that of a good one until it next writes its metadata. So whoever watches the group reads.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::OFlags;

use super::open::Layout;
use super::{BLOCK, Kind};
use crate::{DmDevice, Mapper, Sectors, Table};

/// Direct I/O takes memory and lengths at multiples of this on every device.
const ALIGNMENT: usize = 4096;

/// Where the last look ended.
#[derive(Debug, Default)]
pub(super) struct Probe(AtomicU64);

impl Probe {
    /// Reads the first block of each device, and of kind dm-cache one block more, the next at each look: a block that cannot be
    /// read is a VM's read that fails there, while bcache reads it from the parents. Says what is wrong.
    pub(super) fn look(&self, kind: Kind, layout: &Layout) -> Option<String> {
        let metadata = layout
            .metadata
            .iter()
            .map(|table| (DmDevice::CacheMetadata, table));
        for (device, table) in metadata.chain([(DmDevice::CacheData, &layout.data)]) {
            for line in table.lines() {
                if let Err(error) = read(&device, line.start, ALIGNMENT) {
                    return Some(format!(
                        "the cache device under {device} at sector {} cannot be read: {error}",
                        line.start
                    ));
                }
            }
        }
        if kind == Kind::DmCache {
            let at = self.next(&layout.data);
            if let Err(error) = read(&DmDevice::CacheData, at, BLOCK.0 as usize * 512) {
                return Some(format!(
                    "sector {at} of {} cannot be read: {error}",
                    DmDevice::CacheData
                ));
            }
        }
        None
    }

    fn next(&self, data: &Table) -> Sectors {
        let blocks = (data.length().0 / BLOCK.0).max(1);
        Sectors(self.0.fetch_add(1, Ordering::Relaxed) % blocks * BLOCK.0)
    }
}

/// Reads past the page cache, which would answer for a device that is gone.
fn read(device: &DmDevice, at: Sectors, bytes: usize) -> io::Result<()> {
    let mut buffer = vec![0; bytes + ALIGNMENT];
    let start = buffer.as_ptr().align_offset(ALIGNMENT);
    let Some(aligned) = buffer.get_mut(start..start + bytes) else {
        return Ok(());
    };
    OpenOptions::new()
        .read(true)
        .custom_flags(OFlags::DIRECT.bits() as i32)
        .open(Mapper::path(device))?
        .read_exact_at(aligned, at.0 * 512)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Target;

    #[test]
    fn every_block_has_its_turn() {
        let data = Table::whole(Sectors(3 * BLOCK.0), Target::Error).unwrap();
        let probe = Probe::default();
        let looked: Vec<u64> = (0..4).map(|_| probe.next(&data).0 / BLOCK.0).collect();
        assert_eq!(looked, [0, 1, 2, 0]);
    }
}
