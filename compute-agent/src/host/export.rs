//! A disk's content for whoever asks: what was written, or with the image's blocks, as parts in order.
//!
//! The layers are frozen and held while they are read, as for a clone, so what arrives is one point in time. Nothing is kept for a stream that
//! breaks: whoever asks begins anew.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use treeboot_block::layers::Frozen;
use treeboot_block::{BlockDevice as _, Provisioning};
use treeboot_proto::v1;
use treeboot_proto::v1::disk_part::Part;
use treeboot_types::{SnapshotName, VmName};

use super::ship::{BLOCK, PART_BYTES, Reader, header};
use super::{Host, HostError, chain};
use crate::plane::Verb;
use crate::stack::LayerChange;

/// Parts that wait for whoever asked.
const PARTS: usize = 8;
/// How long one part may wait: the other side writes it to a disk.
const TAKE_LIMIT: Duration = Duration::from_secs(120);

/// What is asked of an export.
#[derive(Debug, Clone)]
pub struct ExportRequest {
    /// The VM.
    pub vm: VmName,
    /// The point in time; now where there is none.
    pub snapshot: Option<SnapshotName>,
    /// With the image's blocks.
    pub whole: bool,
}

/// The parts of an export, or why no more come.
pub type Exported = mpsc::Receiver<Result<v1::DiskPart, HostError>>;

impl Host {
    /// Reads a disk's content. Dropping what is returned ends it.
    ///
    /// # Errors
    /// No such VM or snapshot, a plane that cannot, or layers that cannot be frozen.
    pub async fn export(&self, request: ExportRequest) -> Result<Exported, HostError> {
        self.has_disk(&request.vm)?;
        self.can(Verb::Export)?;
        let transfer: u64 = rand::random();
        let hold = LayerChange::Hold {
            transfer,
            snapshot: request.snapshot.clone(),
        };
        self.change_layers(&request.vm, hold).await?;
        let (parts, exported) = mpsc::channel(PARTS);
        let host = self.clone();
        self.shared.tasks.clone().spawn(async move {
            let sent = tokio::select! {
                sent = host.send_parts(&request, transfer, &parts) => sent,
                () = host.shared.stop.cancelled() => Err(host.shared.stopping()),
            };
            let release = LayerChange::Release {
                transfer: Some(transfer),
            };
            if let Err(error) = host.change_layers(&request.vm, release).await {
                // The next start lets it go.
                tracing::warn!(vm = %request.vm, error = %chain(&error), "the export's hold stays for now");
            }
            if let Err(error) = sent {
                tracing::warn!(vm = %request.vm, error = %chain(&error), "an export ended early");
                // Whoever went away hears nothing.
                let _ = parts.try_send(Err(error));
            }
        });
        Ok(exported)
    }

    async fn send_parts(
        &self,
        request: &ExportRequest,
        transfer: u64,
        parts: &mpsc::Sender<Result<v1::DiskPart, HostError>>,
    ) -> Result<(), HostError> {
        let disk = self.plane().held(&request.vm, transfer)?;
        let desired = self.desired();
        let state = desired.disks.get(&request.vm);
        let state = state.ok_or_else(|| self.shared.stopping())?;
        let send = async |part| {
            let sending = parts.send(Ok(v1::DiskPart { part: Some(part) }));
            match tokio::time::timeout(TAKE_LIMIT, sending).await {
                Ok(Ok(())) => Ok(()),
                _ => Err(HostError::Cancelled {
                    what: format!("the export of VM '{}'", request.vm),
                }),
            }
        };
        let bytes = disk.geometry().bytes;
        let (data_blocks, _) = self.count(&disk).await?;
        send(Part::Header(v1::DiskHeader {
            transfer,
            data_bytes: if request.whole { bytes } else { data_blocks * BLOCK },
            ..header(&request.vm, state)
        }))
        .await?;
        let mut end = v1::DiskEnd::default();
        let mut reader = Reader::new(Arc::clone(&disk));
        let mut at = 0;
        loop {
            let part = reader.next().await?;
            let next = match &part {
                Some(Part::Data(data)) => data.offset,
                Some(Part::Zero(zero)) => zero.offset,
                _ => bytes,
            };
            if request.whole {
                while at < next {
                    let (part, upto) = of_image(&disk, at, next).await?;
                    at = upto;
                    if let Some(data) = part {
                        end.data_blocks += (data.data.len() as u64).div_ceil(BLOCK);
                        send(Part::Data(data)).await?;
                    }
                }
            }
            match &part {
                Some(Part::Data(data)) => {
                    end.data_blocks += (data.data.len() as u64).div_ceil(BLOCK);
                    at = data.offset + data.data.len() as u64;
                }
                Some(Part::Zero(zero)) => {
                    end.zero_blocks += zero.bytes.div_ceil(BLOCK);
                    at = zero.offset + zero.bytes;
                }
                _ => {}
            }
            match part {
                Some(part) => send(part).await?,
                None => return send(Part::End(end)).await,
            }
        }
    }
}

/// The image's bytes from `at` on, but none at `end`, and up to where that is; none where they are zeroes.
async fn of_image(
    disk: &Frozen,
    at: u64,
    end: u64,
) -> Result<(Option<v1::DiskData>, u64), treeboot_block::BlockError> {
    let extent = disk.extent(at, end - at).await?;
    let hole = extent.bytes / BLOCK * BLOCK;
    if extent.state == Provisioning::Hole && hole > 0 {
        return Ok((None, (at + hole).min(end)));
    }
    let mut data = vec![0; (end - at).min(PART_BYTES) as usize];
    disk.read(at, &mut data).await?;
    let upto = at + data.len() as u64;
    if data.iter().all(|byte| *byte == 0) {
        return Ok((None, upto));
    }
    let checksum = crc32c::crc32c(&data);
    let part = v1::DiskData {
        offset: at,
        data,
        checksum,
    };
    Ok((Some(part), upto))
}
