//! Carrying an [`Action`](crate::scsi::Action) out on a device.

use std::sync::Arc;

use treeboot_block::{BlockError, Provisioning};

use super::buffers::Block;
use super::registry::Unit;
use crate::scsi::reservation::{InitiatorPort, Out, Refused};
use crate::scsi::{Nexus, OutAction, Sense, status};

/// How a command ended.
#[derive(Debug)]
pub(super) enum Outcome {
    Good,
    Data(Vec<u8>),
    Check(Sense),
    Conflict,
    /// GOOD, and the tasks of these initiators are to be aborted.
    Preempted(Vec<InitiatorPort>),
}

impl From<Result<(), Sense>> for Outcome {
    fn from(result: Result<(), Sense>) -> Self {
        result.map_or_else(Self::Check, |()| Self::Good)
    }
}

/// The piece in which devices are read for comparing and written for WRITE SAME, in bytes.
const PIECE_BYTES: u64 = 256 * 1024;

/// Descriptors of one GET LBA STATUS.
const MAX_LBA_STATUS: usize = 64;

/// Sense data of a device's error.
pub(super) fn sense_of(error: &BlockError, writing: bool, block_bytes: u32) -> Sense {
    let information = |offset: u64| u32::try_from(offset / u64::from(block_bytes)).ok();
    match error {
        BlockError::OutOfRange { .. } => Sense::LBA_OUT_OF_RANGE,
        BlockError::ReadOnly => Sense::WRITE_PROTECTED,
        BlockError::NoSpace { .. } => Sense::NO_SPACE,
        BlockError::Unavailable { .. } => Sense::BECOMING_READY,
        BlockError::Corrupt { .. } => Sense::READ_ERROR,
        BlockError::Io { offset, .. } => Sense {
            information: information(*offset),
            ..if writing {
                Sense::WRITE_ERROR
            } else {
                Sense::READ_ERROR
            }
        },
        BlockError::Unsupported { .. } => Sense::INTERNAL,
    }
}

impl Unit {
    fn failed(&self, error: &BlockError, writing: bool) -> Sense {
        let cause = error as &(dyn std::error::Error + 'static);
        // A line for each failure, none for each I/O; the front end sees the sense data.
        tracing::warn!(target = %self.target, lun = self.logical.number(), error = cause, "device failed");
        sense_of(error, writing, self.logical.geometry().block_bytes)
    }
}

/// Reads `bytes` into `block` from `at` on.
pub(super) async fn read(
    unit: Arc<Unit>,
    offset: u64,
    mut block: Block,
    at: usize,
    bytes: usize,
) -> (Block, Result<(), Sense>) {
    let result = unit
        .device
        .read(offset, &mut block.as_mut()[at..at + bytes])
        .await;
    let result = result.map_err(|error| unit.failed(&error, false));
    (block, result)
}

/// Reads into memory of its own, for transfers that are no multiple of the block.
pub(super) async fn read_whole(unit: Arc<Unit>, offset: u64, bytes: u64) -> Outcome {
    let mut data = vec![0; bytes as usize];
    match unit.device.read(offset, &mut data).await {
        Ok(()) => Outcome::Data(data),
        Err(error) => Outcome::Check(unit.failed(&error, false)),
    }
}

pub(super) async fn flush(unit: Arc<Unit>) -> Outcome {
    unit.device
        .flush()
        .await
        .map_err(|error| unit.failed(&error, true))
        .into()
}

pub(super) async fn verify(unit: Arc<Unit>, offset: u64, bytes: u64) -> Outcome {
    let mut buffer = vec![0; bytes.min(PIECE_BYTES) as usize];
    let mut done = 0;
    while done < bytes {
        let piece = (bytes - done).min(PIECE_BYTES);
        if let Err(error) = unit
            .device
            .read(offset + done, &mut buffer[..piece as usize])
            .await
        {
            return Outcome::Check(unit.failed(&error, false));
        }
        done += piece;
    }
    Outcome::Good
}

/// The default self-test: the first and the last block can be read. More is known of a device only when it is used.
pub(super) async fn self_test(unit: Arc<Unit>) -> Outcome {
    let geometry = *unit.logical.geometry();
    let block = u64::from(geometry.block_bytes);
    let mut buffer = vec![0; geometry.block_bytes as usize];
    for offset in [0, geometry.bytes.saturating_sub(block)] {
        if let Err(error) = unit.device.read(offset, &mut buffer).await {
            return Outcome::Check(match unit.failed(&error, false) {
                // It waits for its data; nothing has failed.
                Sense::BECOMING_READY => Sense::BECOMING_READY,
                _ => Sense::FAILED_SELF_TEST,
            });
        }
    }
    Outcome::Good
}

pub(super) async fn discard(unit: Arc<Unit>, offset: u64, bytes: u64) -> Outcome {
    let _shared = unit.atomic.read().await;
    zero(&unit, offset, bytes).await.into()
}

/// Zeroes a range: by a discard where the device can, otherwise by writing.
async fn zero(unit: &Unit, offset: u64, bytes: u64) -> Result<(), Sense> {
    if unit.logical.geometry().thin {
        return unit
            .device
            .discard(offset, bytes)
            .await
            .map_err(|error| unit.failed(&error, true));
    }
    repeat(unit, offset, bytes, &[0]).await
}

/// Writes `pattern` over and over.
async fn repeat(unit: &Unit, offset: u64, bytes: u64, pattern: &[u8]) -> Result<(), Sense> {
    let piece = bytes.min(PIECE_BYTES) as usize;
    let mut buffer = pattern.repeat(piece.div_ceil(pattern.len().max(1)));
    buffer.truncate(piece);
    let mut done = 0;
    while done < bytes {
        let piece = (bytes - done).min(PIECE_BYTES);
        let written = unit.device.write(offset + done, &buffer[..piece as usize]).await;
        written.map_err(|error| unit.failed(&error, true))?;
        done += piece;
    }
    Ok(())
}

/// GET LBA STATUS (SBC-3 §5.6).
pub(super) async fn lba_status(unit: Arc<Unit>, offset: u64, allocation: u32) -> Outcome {
    let geometry = *unit.logical.geometry();
    let block = u64::from(geometry.block_bytes);
    let room = (allocation as usize).saturating_sub(8) / 16;
    let mut out = vec![0; 8];
    let mut at = offset;
    for _ in 0..room.clamp(1, MAX_LBA_STATUS) {
        if at >= geometry.bytes {
            break;
        }
        // A run's length has 32 bits.
        let longest = (geometry.bytes - at).min(u64::from(u32::MAX) * block);
        let extent = match unit.device.extent(at, longest).await {
            Ok(extent) => extent,
            Err(error) => return Outcome::Check(unit.failed(&error, false)),
        };
        let bytes = extent.bytes.clamp(block, longest);
        out.extend_from_slice(&(at / block).to_be_bytes());
        out.extend_from_slice(&((bytes / block) as u32).to_be_bytes());
        out.extend_from_slice(&[
            u8::from(extent.state == Provisioning::Hole && geometry.thin),
            0,
            0,
            0,
        ]);
        at += bytes;
    }
    let bytes = (out.len() - 4) as u32;
    out[..4].copy_from_slice(&bytes.to_be_bytes());
    out.truncate(allocation as usize);
    Outcome::Data(out)
}

/// Does what the data were sent for; gives their buffer back.
pub(super) async fn out(
    unit: Arc<Unit>,
    nexus: Arc<Nexus>,
    then: OutAction,
    data: Vec<u8>,
) -> (Outcome, Vec<u8>) {
    let outcome = match then {
        OutAction::Write {
            offset,
            durable,
            verify,
        } => write(&unit, offset, &data, durable, verify).await.into(),
        OutAction::Compare {
            offset,
            bytes,
            repeated,
        } => compare(&unit, offset, bytes, &data, repeated).await.into(),
        OutAction::CompareAndWrite {
            offset,
            bytes,
            durable,
        } => compare_and_write(&unit, offset, bytes, &data, durable)
            .await
            .into(),
        OutAction::OrWrite { offset, durable } => or_write(&unit, offset, &data, durable).await.into(),
        OutAction::WriteSame {
            offset,
            bytes,
            unmap,
            durable,
        } => write_same(&unit, offset, bytes, &data, unmap, durable)
            .await
            .into(),
        OutAction::Unmap => unmap(&unit, &data).await.into(),
        OutAction::ModeSelect { long } => unit.logical.mode_select(&nexus, long, &data).into(),
        OutAction::Reserve { action, scope, kind } => {
            match reserve_out(&unit, nexus, Out { action, scope, kind }, &data).await {
                Ok(aborts) if aborts.is_empty() => Outcome::Good,
                Ok(aborts) => Outcome::Preempted(aborts),
                Err(Refused::Conflict) => Outcome::Conflict,
                Err(Refused::Check(sense)) => Outcome::Check(sense),
            }
        }
    };
    (outcome, data)
}

/// PERSISTENT RESERVE OUT; beside the runtime where it has to wait for a disk.
async fn reserve_out(
    unit: &Arc<Unit>,
    nexus: Arc<Nexus>,
    out: Out,
    data: &[u8],
) -> Result<Vec<InitiatorPort>, Refused> {
    if !unit.logical.waits_for_keeper() {
        return unit.logical.reserve_out(&nexus, out, data);
    }
    let (unit, data) = (Arc::clone(unit), data.to_vec());
    let change = tokio::task::spawn_blocking(move || unit.logical.reserve_out(&nexus, out, &data));
    // It fails only by a panic or while the runtime ends.
    change.await.unwrap_or(Err(Refused::Check(Sense::INTERNAL)))
}

async fn write(unit: &Unit, offset: u64, data: &[u8], durable: bool, verify: bool) -> Result<(), Sense> {
    let _shared = unit.atomic.read().await;
    store(unit, offset, data, durable).await?;
    if verify {
        compare(unit, offset, data.len() as u64, data, false).await?;
    }
    Ok(())
}

async fn store(unit: &Unit, offset: u64, data: &[u8], durable: bool) -> Result<(), Sense> {
    if data.is_empty() {
        return Ok(());
    }
    let failed = |error: BlockError| unit.failed(&error, true);
    unit.device.write(offset, data).await.map_err(failed)?;
    if durable {
        unit.device.flush().await.map_err(failed)?;
    }
    Ok(())
}

async fn compare(unit: &Unit, offset: u64, bytes: u64, data: &[u8], repeated: bool) -> Result<(), Sense> {
    let mut buffer = vec![0; bytes.min(PIECE_BYTES) as usize];
    let mut done = 0;
    while done < bytes {
        let piece = (bytes - done).min(PIECE_BYTES) as usize;
        let buffer = &mut buffer[..piece];
        unit.device
            .read(offset + done, buffer)
            .await
            .map_err(|error| unit.failed(&error, false))?;
        // Mostly all is equal, and slices compare faster than bytes do one by one.
        let equal = match repeated {
            true => buffer
                .chunks(data.len().max(1))
                .all(|piece| data.starts_with(piece)),
            false => data
                .get(done as usize..)
                .is_some_and(|data| data.starts_with(buffer)),
        };
        let differs = match repeated {
            _ if equal => None,
            // Pieces are whole blocks, so each begins where the pattern does.
            true => buffer.iter().zip(data.iter().cycle()).position(|(a, b)| a != b),
            false => {
                let data = data.get(done as usize..).unwrap_or(&[]);
                buffer.iter().zip(data).position(|(a, b)| a != b)
            }
        };
        if let Some(at) = differs {
            return Err(Sense {
                information: u32::try_from(done + at as u64).ok(),
                ..Sense::MISCOMPARE
            });
        }
        done += piece as u64;
    }
    Ok(())
}

async fn compare_and_write(
    unit: &Unit,
    offset: u64,
    bytes: u64,
    data: &[u8],
    durable: bool,
) -> Result<(), Sense> {
    // Nobody writes to the unit between the comparison and the write (SBC-3 §5.2).
    let _alone = unit.atomic.write().await;
    let (expected, new) = data.split_at_checked(bytes as usize).ok_or(Sense::DATA_PHASE)?;
    compare(unit, offset, bytes, expected, false).await?;
    store(unit, offset, new, durable).await
}

async fn or_write(unit: &Unit, offset: u64, data: &[u8], durable: bool) -> Result<(), Sense> {
    // Nobody writes to the unit between the read and the write (SBC-3 §5.14).
    let _alone = unit.atomic.write().await;
    let mut new = vec![0; data.len()];
    let read = unit.device.read(offset, &mut new).await;
    read.map_err(|error| unit.failed(&error, false))?;
    new.iter_mut().zip(data).for_each(|(new, bits)| *new |= bits);
    store(unit, offset, &new, durable).await
}

async fn write_same(
    unit: &Unit,
    offset: u64,
    bytes: u64,
    block: &[u8],
    unmap: bool,
    durable: bool,
) -> Result<(), Sense> {
    let _shared = unit.atomic.read().await;
    if unmap && block.iter().all(|&byte| byte == 0) {
        zero(unit, offset, bytes).await?;
    } else {
        repeat(unit, offset, bytes, block).await?;
    }
    if durable {
        unit.device
            .flush()
            .await
            .map_err(|error| unit.failed(&error, true))?;
    }
    Ok(())
}

async fn unmap(unit: &Unit, parameters: &[u8]) -> Result<(), Sense> {
    let ranges = unit.logical.unmap_ranges(parameters)?;
    let _shared = unit.atomic.read().await;
    for (offset, bytes) in ranges.into_iter().filter(|(_, bytes)| *bytes > 0) {
        unit.device
            .discard(offset, bytes)
            .await
            .map_err(|error| unit.failed(&error, true))?;
    }
    Ok(())
}

/// The SCSI status of an outcome.
pub(super) fn status_of(outcome: &Outcome) -> u8 {
    match outcome {
        Outcome::Good | Outcome::Data(_) | Outcome::Preempted(_) => status::GOOD,
        Outcome::Check(_) => status::CHECK_CONDITION,
        Outcome::Conflict => status::RESERVATION_CONFLICT,
    }
}
