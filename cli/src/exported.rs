//! A disk's content as an agent streams it: checked part by part.

use std::time::Duration;

use tonic::Streaming;
use treeboot_proto::v1;
use treeboot_proto::v1::disk_part::Part;

use crate::client::{Agent, incomplete, refused};
use crate::failure::{Exit, Failure};
use crate::output;

/// How long no part may come: the host may have to freeze a disk, or to fetch what its image lacks.
const STALL_LIMIT: Duration = Duration::from_secs(120);
const BLOCK_BYTES: u64 = 4096;

/// Some of a disk.
#[derive(Debug)]
pub(crate) enum Piece {
    /// Bytes from an offset on.
    Data(u64, Vec<u8>),
    /// From an offset on, so many zeroes.
    Zero(u64, u64),
}

/// The stream, and what has come.
pub(crate) struct Exported {
    stream: Streaming<v1::DiskPart>,
    peer: String,
    doing: String,
    patience: Duration,
    /// What the stream is of.
    pub(crate) header: v1::DiskHeader,
    /// Blocks of data and of zeroes.
    came: (u64, u64),
    /// Up to where it has come, in bytes.
    at: u64,
}

impl Exported {
    /// Begins; `doing` is what follows "cannot".
    pub(crate) async fn begin(
        agent: &Agent,
        request: v1::ExportDiskRequest,
        doing: String,
        timeout: Duration,
    ) -> Result<Self, Failure> {
        let stream = agent
            .call(&doing, agent.client.clone().export_disk(request))
            .await?;
        let mut exported = Self {
            stream,
            peer: agent.peer.clone(),
            doing,
            patience: timeout.max(STALL_LIMIT),
            header: v1::DiskHeader::default(),
            came: (0, 0),
            at: 0,
        };
        match exported.part().await? {
            Some(Part::Header(header)) => exported.header = header,
            _ => return Err(incomplete(&exported.peer, "header")),
        }
        Ok(exported)
    }

    async fn part(&mut self) -> Result<Option<Part>, Failure> {
        let message = tokio::time::timeout(self.patience, self.stream.message()).await;
        let message = message.map_err(|_| {
            let words = format!(
                "cannot {}: {} sent nothing for {}",
                self.doing,
                self.peer,
                output::duration(self.patience)
            );
            Failure::new(Exit::TimedOut, words).advice("see what its agent logs")
        })?;
        let message = message.map_err(|status| refused(&self.peer, &self.doing, &status))?;
        Ok(message.and_then(|message| message.part))
    }

    fn broken(&self, why: &str) -> Failure {
        let words = format!("cannot {}: {} sent {why}", self.doing, self.peer);
        Failure::new(Exit::Failed, words).advice("try it again; nothing was kept")
    }

    /// The next piece; `None` once all have come.
    pub(crate) async fn next(&mut self) -> Result<Option<Piece>, Failure> {
        let (piece, offset, bytes) = match self.part().await? {
            Some(Part::Data(data)) => {
                if crc32c::crc32c(&data.data) != data.checksum {
                    return Err(self.broken("bytes that are not those of its checksum"));
                }
                let (offset, bytes) = (data.offset, data.data.len() as u64);
                self.came.0 += bytes.div_ceil(BLOCK_BYTES);
                (Piece::Data(offset, data.data), offset, bytes)
            }
            Some(Part::Zero(zero)) => {
                self.came.1 += zero.bytes.div_ceil(BLOCK_BYTES);
                (Piece::Zero(zero.offset, zero.bytes), zero.offset, zero.bytes)
            }
            Some(Part::End(end)) if (end.data_blocks, end.zero_blocks) == self.came => return Ok(None),
            Some(Part::End(_)) => return Err(self.broken("another number of blocks than its end says")),
            _ => return Err(self.broken("an end too early")),
        };
        let end = offset.checked_add(bytes).filter(|end| *end <= self.header.bytes);
        match end {
            Some(end) if offset >= self.at && offset.is_multiple_of(BLOCK_BYTES) && bytes > 0 => {
                self.at = end
            }
            _ => return Err(self.broken("a part that is out of order, or beyond the disk's end")),
        }
        Ok(Some(piece))
    }
}
