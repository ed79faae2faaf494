//! Commands on the medium: which bytes they mean, and what they come to (SBC-3 §5).

use std::sync::atomic::Ordering;

use super::action::{Action, OutAction};
use super::cdb::{Blocks, ByteCheck};
use super::inquiry::max_compare_and_write_blocks;
use super::sense::Sense;
use super::unit::{LogicalUnit, MAX_TRANSFER_BYTES, MAX_WRITE_SAME_BYTES};

impl LogicalUnit {
    /// The bytes of a range, which must lie within the unit.
    pub(super) fn range(&self, blocks: Blocks) -> Result<(u64, u64), Sense> {
        let block = u64::from(self.geometry.block_bytes);
        let capacity = self.geometry.bytes / block;
        match blocks.lba.checked_add(blocks.count) {
            Some(end) if end <= capacity => Ok((blocks.lba * block, blocks.count * block)),
            _ => Err(Sense::LBA_OUT_OF_RANGE),
        }
    }

    pub(super) fn transfer(&self, blocks: Blocks) -> Result<(u64, u64), Sense> {
        let (offset, bytes) = self.range(blocks)?;
        if bytes > MAX_TRANSFER_BYTES {
            return Err(Sense::INVALID_FIELD_IN_CDB);
        }
        Ok((offset, bytes))
    }

    pub(super) fn writable(&self) -> Result<(), Sense> {
        if self.geometry.read_only || self.write_protect.load(Ordering::Relaxed) {
            return Err(Sense::WRITE_PROTECTED);
        }
        Ok(())
    }

    pub(super) fn durable(&self, fua: bool) -> bool {
        fua || !self.write_cache.load(Ordering::Relaxed)
    }

    pub(super) fn write(&self, blocks: Blocks, fua: bool, verify: bool) -> Result<Action, Sense> {
        self.writable()?;
        Ok(match self.transfer(blocks)? {
            (_, 0) => Action::Good,
            (offset, bytes) => Action::Out {
                bytes,
                then: OutAction::Write {
                    offset,
                    durable: self.durable(fua),
                    verify,
                },
            },
        })
    }

    pub(super) fn verify(&self, blocks: Blocks, check: ByteCheck) -> Result<Action, Sense> {
        let (offset, bytes) = self.transfer(blocks)?;
        let block = u64::from(self.geometry.block_bytes);
        Ok(match check {
            _ if bytes == 0 => Action::Good,
            ByteCheck::Medium => Action::Verify { offset, bytes },
            ByteCheck::All | ByteCheck::Repeated => Action::Out {
                bytes: if check == ByteCheck::All { bytes } else { block },
                then: OutAction::Compare {
                    offset,
                    bytes,
                    repeated: check == ByteCheck::Repeated,
                },
            },
        })
    }

    pub(super) fn compare_and_write(&self, blocks: Blocks) -> Result<Action, Sense> {
        self.writable()?;
        if blocks.count > u64::from(max_compare_and_write_blocks(&self.geometry)) {
            return Err(Sense::cdb_field(13, Some(7)));
        }
        let (offset, bytes) = self.range(blocks)?;
        Ok(Action::Out {
            bytes: bytes * 2,
            then: OutAction::CompareAndWrite {
                offset,
                bytes,
                durable: self.durable(false),
            },
        })
    }

    pub(super) fn write_same(
        &self,
        blocks: Blocks,
        unmap: bool,
        anchor: bool,
        no_data: bool,
    ) -> Result<Action, Sense> {
        self.writable()?;
        if anchor {
            return Err(Sense::cdb_field(1, Some(4)));
        }
        if unmap && !self.geometry.thin {
            return Err(Sense::cdb_field(1, Some(3)));
        }
        let (offset, bytes) = self.range(blocks)?;
        // Block limits say WSNZ and the maximum.
        if bytes == 0 || bytes > MAX_WRITE_SAME_BYTES {
            return Err(Sense::INVALID_FIELD_IN_CDB);
        }
        Ok(match no_data {
            true => Action::Discard { offset, bytes },
            false => Action::Out {
                bytes: self.geometry.block_bytes.into(),
                then: OutAction::WriteSame {
                    offset,
                    bytes,
                    unmap,
                    durable: self.durable(false),
                },
            },
        })
    }
}
