//! A VM's disk: a delta over a base that everybody shares.

use std::sync::Arc;

use crate::blocking::{self, read_storage};
use crate::delta::{BLOCK, BlockWrite, Core, State};
use crate::runs::{self, Runs};
use crate::{BlockDevice, BlockError, Delta, Extent, Geometry, IoFuture, Provisioning};

/// Why a base and a delta do not make a disk.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the base has {base_bytes} bytes, the delta is for {delta_bytes}; open the delta of that base")]
pub struct DiskError {
    /// Size of the base in bytes.
    pub base_bytes: u64,
    /// Size of the disk in bytes that the delta is for.
    pub delta_bytes: u64,
}

/// Base and delta, joined block by block (4 KiB).
///
/// A read of blocks that were never written is the base's own read. A write of less than a block reads the rest of
/// the block from the base once.
pub struct Disk {
    base: Arc<dyn BlockDevice>,
    delta: Delta,
    geometry: Geometry,
}

impl Disk {
    /// Joins them.
    ///
    /// # Errors
    /// [`DiskError`] where their sizes differ.
    pub fn new(base: Arc<dyn BlockDevice>, delta: Delta) -> Result<Self, DiskError> {
        let (base_bytes, delta_bytes) = (base.geometry().bytes, delta.core().disk_bytes());
        if base_bytes != delta_bytes {
            return Err(DiskError {
                base_bytes,
                delta_bytes,
            });
        }
        Ok(Self {
            geometry: Geometry {
                bytes: base_bytes,
                block_bytes: base.geometry().block_bytes,
                physical_block_bytes: BLOCK as u32,
                read_only: false,
                thin: true,
            },
            base,
            delta,
        })
    }

    /// The delta.
    pub fn delta(&self) -> &Delta {
        &self.delta
    }

    fn core(&self) -> &Arc<Core> {
        self.delta.core()
    }

    /// The bytes of the base in `range` of `blocks`, which begins at `start` on the disk, if `block` is the base's.
    async fn copy_up(
        &self,
        block: u64,
        range: std::ops::Range<u64>,
        start: u64,
        blocks: &mut [u8],
    ) -> Result<(), BlockError> {
        let range = range.start..range.end.min(self.geometry.bytes);
        if range.is_empty() || self.core().state(block) != State::Base {
            return Ok(());
        }
        let buf = &mut blocks[(range.start - start) as usize..(range.end - start) as usize];
        self.base.read(range.start, buf).await
    }

    async fn write_bytes(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        let end = offset + data.len() as u64;
        let (first, last) = (offset / BLOCK, (end - 1) / BLOCK);
        let start = first * BLOCK;
        let mut blocks = vec![0; ((last + 1) * BLOCK - start) as usize];
        blocks[(offset - start) as usize..(end - start) as usize].copy_from_slice(data);
        // A block never becomes the base's again, so what is the base's later is so now.
        self.copy_up(first, start..offset, start, &mut blocks).await?;
        self.copy_up(last, end..(last + 1) * BLOCK, start, &mut blocks)
            .await?;
        let write = BlockWrite {
            offset,
            bytes: data.len() as u64,
            blocks,
        };
        let core = Arc::clone(self.core());
        blocking::run(move || core.write(write)).await
    }
}

impl Runs for Disk {
    type Who = State;

    fn run(&self, offset: u64, bytes: u64) -> (State, u64) {
        let block = offset / BLOCK;
        let most = (offset + bytes).div_ceil(BLOCK) - block;
        let (state, count) = self.core().run(block, most);
        (state, ((block + count) * BLOCK - offset).min(bytes))
    }

    fn read_run<'a>(&'a self, state: State, offset: u64, buf: &'a mut [u8]) -> IoFuture<'a, ()> {
        let core = self.core();
        match state {
            State::Base => self.base.read(offset, buf),
            State::Data => read_storage(core.storage(), core.place(offset), offset, buf),
            State::Zero => {
                buf.fill(0);
                blocking::ready(Ok(()))
            }
        }
    }
}

impl BlockDevice for Disk {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> IoFuture<'a, ()> {
        runs::read(self, offset, buf)
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8]) -> IoFuture<'a, ()> {
        match self.check_range(offset, data.len() as u64) {
            Err(error) => blocking::ready(Err(error)),
            Ok(()) if data.is_empty() => blocking::ready(Ok(())),
            Ok(()) => Box::pin(self.write_bytes(offset, data)),
        }
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        Box::pin(self.core().flush())
    }

    fn discard(&self, offset: u64, bytes: u64) -> IoFuture<'_, ()> {
        match self.check_range(offset, bytes) {
            Err(error) => return blocking::ready(Err(error)),
            Ok(()) if bytes == 0 => return blocking::ready(Ok(())),
            Ok(()) => {}
        }
        Box::pin(async move {
            let end = offset + bytes;
            let first_whole = offset.next_multiple_of(BLOCK);
            // The last block of the disk is whole even if the disk ends within it.
            let end_whole = match end == self.geometry.bytes {
                true => end.next_multiple_of(BLOCK),
                false => end / BLOCK * BLOCK,
            };
            if first_whole >= end_whole {
                return self.zero_part(offset, end).await;
            }
            self.zero_part(offset, first_whole).await?;
            self.zero_part(end_whole, end).await?;
            let core = Arc::clone(self.core());
            blocking::run(move || core.discard(first_whole / BLOCK, end_whole / BLOCK)).await
        })
    }

    fn extent(&self, offset: u64, bytes: u64) -> IoFuture<'_, Extent> {
        if let Err(error) = self.check_range(offset, bytes) {
            return blocking::ready(Err(error));
        }
        let bytes = bytes.max(u64::from(self.geometry.block_bytes));
        let (state, run) = self.run(offset, bytes);
        let state = match state {
            State::Base => return self.base.extent(offset, run),
            State::Data => Provisioning::Mapped,
            State::Zero => Provisioning::Hole,
        };
        blocking::ready(Ok(Extent { bytes: run, state }))
    }
}

impl Disk {
    /// Writes zeroes to less than a block on each side.
    async fn zero_part(&self, from: u64, to: u64) -> Result<(), BlockError> {
        if from >= to {
            return Ok(());
        }
        let (state, run) = self.run(from, to - from);
        if state == State::Zero && run == to - from {
            return Ok(());
        }
        self.write_bytes(from, &vec![0; (to - from) as usize]).await
    }
}
