//! One command, and who waits for it.

use bytes::Bytes;
use tokio::sync::oneshot;

use super::NO_DATA;
use crate::initiator::error::CommandError;
use crate::pdu::{LunField, Residual};

/// Which way the data goes.
#[derive(Debug, Clone)]
pub(in crate::initiator) enum Transfer {
    /// There is none.
    None,
    /// In, up to this many bytes.
    Read(u32),
    /// Out.
    Write(Bytes),
}

/// A command that ended with GOOD.
#[derive(Debug)]
pub(in crate::initiator) struct Completed {
    /// What came in.
    pub(in crate::initiator) data: Bytes,
    /// What the target says was left over.
    pub(in crate::initiator) residual: Residual,
}

type Reply = oneshot::Sender<Result<Completed, CommandError>>;

/// A command on its way.
#[derive(Debug)]
pub(in crate::initiator) struct Job {
    pub(super) lun: LunField,
    pub(super) cdb: [u8; 16],
    transfer: Transfer,
    reply: Option<Reply>,
}

impl Job {
    pub(in crate::initiator) fn new(lun: u16, cdb: [u8; 16], transfer: Transfer, reply: Reply) -> Self {
        Self {
            lun: LunField::new(lun),
            cdb,
            transfer,
            reply: Some(reply),
        }
    }

    /// The caller is gone, or has had its answer.
    pub(super) fn is_abandoned(&self) -> bool {
        self.reply.as_ref().is_none_or(oneshot::Sender::is_closed)
    }

    pub(super) fn read_bytes(&self) -> u32 {
        match self.transfer {
            Transfer::Read(bytes) => bytes,
            _ => 0,
        }
    }

    pub(super) fn write_bytes(&self) -> u32 {
        match &self.transfer {
            Transfer::Write(data) => data.len() as u32,
            _ => 0,
        }
    }

    /// The data of a write from `at` to `end`, which lie within it.
    pub(super) fn write_data(&self, at: u32, end: u32) -> Bytes {
        match &self.transfer {
            Transfer::Write(data) if at < end && end as usize <= data.len() => {
                data.slice(at as usize..end as usize)
            }
            _ => NO_DATA,
        }
    }

    // In both, a caller that is gone needs no answer.

    pub(super) fn complete(&mut self, completed: Completed) {
        if let Some(reply) = self.reply.take() {
            drop(reply.send(Ok(completed)));
        }
    }

    pub(in crate::initiator) fn fail(&mut self, error: CommandError) {
        if let Some(reply) = self.reply.take() {
            drop(reply.send(Err(error)));
        }
    }
}
