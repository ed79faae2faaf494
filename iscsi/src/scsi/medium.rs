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

    /// READ CAPACITY (10): the last block and the length of a block.
    pub(super) fn capacity_10(&self) -> Vec<u8> {
        let last = self.geometry.bytes / u64::from(self.geometry.block_bytes) - 1;
        let mut out = u32::try_from(last).unwrap_or(u32::MAX).to_be_bytes().to_vec();
        out.extend_from_slice(&self.geometry.block_bytes.to_be_bytes());
        out
    }

    /// READ CAPACITY (16) (SBC-3 §5.16.2).
    pub(super) fn capacity_16(&self) -> Vec<u8> {
        let mut out = vec![0; 32];
        let last = self.geometry.bytes / u64::from(self.geometry.block_bytes) - 1;
        out[..8].copy_from_slice(&last.to_be_bytes());
        out[8..12].copy_from_slice(&self.geometry.block_bytes.to_be_bytes());
        let ratio = (self.geometry.physical_block_bytes / self.geometry.block_bytes).max(1);
        out[13] = ratio.ilog2() as u8;
        if self.geometry.thin {
            out[14] = 0xc0; // LBPME, LBPRZ
        }
        out
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

    /// The bytes that a command is to change. What is wrong with the command itself is told before the protection of the
    /// medium, and a command that changes no block is none that it stops; then there is nothing to do.
    fn change(&self, blocks: Blocks) -> Result<Option<(u64, u64)>, Sense> {
        let (offset, bytes) = self.transfer(blocks)?;
        if bytes == 0 {
            return Ok(None);
        }
        self.writable()?;
        Ok(Some((offset, bytes)))
    }

    pub(super) fn write(&self, blocks: Blocks, fua: bool, verify: bool) -> Result<Action, Sense> {
        Ok(match self.change(blocks)? {
            None => Action::Good,
            Some((offset, bytes)) => Action::Out {
                bytes,
                then: OutAction::Write {
                    offset,
                    durable: self.durable(fua),
                    verify,
                },
            },
        })
    }

    pub(super) fn or_write(&self, blocks: Blocks, fua: bool) -> Result<Action, Sense> {
        Ok(match self.change(blocks)? {
            None => Action::Good,
            Some((offset, bytes)) => Action::Out {
                bytes,
                then: OutAction::OrWrite {
                    offset,
                    durable: self.durable(fua),
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
        if blocks.count > u64::from(max_compare_and_write_blocks(&self.geometry)) {
            return Err(Sense::cdb_field(13, Some(7)));
        }
        // No block is planned too: an initiator that sends data for none has put 256 into the field of eight bits, and is told.
        let (offset, bytes) = self.change(blocks)?.unwrap_or_default();
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
        self.writable()?;
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
