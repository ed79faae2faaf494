//! The verbs that stream.

use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::Status;
use treeboot_identity::Role;
use treeboot_proto::v1::disk_answer::Answer;
use treeboot_proto::v1::disk_part::Part as DiskPart;
use treeboot_proto::v1::import_part::Part;
use treeboot_proto::{image_id, image_id_or_newest, v1};
use treeboot_types::{DEFAULT_CHUNK_BYTES, ImageId, ImageRef, IscsiUrl};

use super::{convert, invalid, status, whole};
use crate::host::{
    Begun, Exported, Host, HostError, Imported, Phase, Progress, Receiving, Underway, VmReport, VmRun, chain,
};
use crate::store::{ImportHeader, ImportPart, SentPart};

/// What a verb streams back.
pub(super) type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Runs of an access map in one message: 64 KiB of numbers.
const RUNS: usize = 8192;
/// Most targets that one image is adopted from.
const MAX_URLS: usize = 16;
/// Answers that may wait for whoever asked.
const ANSWERS: usize = 8;
/// How long a sender of a disk may be silent: it may wait for its own disk.
const PART_LIMIT: Duration = Duration::from_secs(60);
/// Zeroes that are handed on at once.
static ZEROES: [u8; 1 << 20] = [0; 1 << 20];
/// How much is read between two words of progress.
const PROGRESS_BYTES: u64 = 8 << 20;

pub(super) fn access_map(map: Vec<(u32, u32)>) -> Answers<v1::AccessMapPart> {
    let parts: Vec<_> = map
        .chunks(RUNS)
        .map(|runs| {
            let (first_blocks, counts) = runs.iter().copied().unzip();
            Ok(v1::AccessMapPart { first_blocks, counts })
        })
        .collect();
    Box::pin(tokio_stream::iter(parts))
}

pub(super) async fn import(
    host: &Host,
    mut stream: tonic::Streaming<v1::ImportPart>,
) -> Result<Imported, Status> {
    let first = stream.message().await?.and_then(|part| part.part);
    let Some(Part::Header(header)) = first else {
        return Err(invalid("the first part of an import must be its header"));
    };
    let image: ImageRef = image_id_or_newest(header.image.as_ref()).map_err(invalid)?;
    let base = match &header.base {
        Some(base) => {
            let base = image_id(Some(base)).map_err(invalid)?;
            Some(host.base_of(&base).map_err(status)?)
        }
        None => None,
    };
    let header = ImportHeader {
        image: image.to_string(),
        bytes: header.bytes,
        chunk_bytes: match (&base, header.chunk_bytes) {
            (Some((_, chunk_bytes)), _) => *chunk_bytes,
            (None, 0) => DEFAULT_CHUNK_BYTES,
            (None, chunk_bytes) => chunk_bytes,
        },
        adopted_from: Vec::new(),
        base: base.map(|(base, _)| base),
    };
    let (parts, inbox) = Host::import_parts();
    let importing = {
        let host = host.clone();
        whole(async move { host.import(image, header, inbox).await })
    };
    let reading = async move {
        let mut data_bytes = 0;
        loop {
            let part = match stream.message().await.map(|part| part.and_then(|part| part.part)) {
                Ok(Some(Part::Data(data))) => {
                    data_bytes += data.data.len() as u64;
                    Ok(ImportPart {
                        offset: data.offset,
                        data: data.data.into(),
                    })
                }
                Ok(Some(Part::Zero(zero))) => {
                    if !send_zeroes(&parts, &zero).await {
                        return;
                    }
                    continue;
                }
                Ok(Some(Part::End(end))) if end.data_bytes == data_bytes => return,
                Ok(Some(Part::End(end))) => Err(format!(
                    "its end speaks of {} bytes of data, and {data_bytes} came",
                    end.data_bytes
                )),
                Ok(Some(Part::Header(_))) => Err("a second header".to_owned()),
                // A sender that gave up can look like this; what it did not send is not a hole.
                Ok(None) => Err("the stream ended without a part that says so".to_owned()),
                Err(error) => Err(chain(&error)),
            };
            let last = part.is_err();
            // A writer that gave up says why itself.
            if parts.send(part).await.is_err() || last {
                return;
            }
        }
    };
    // The import outlives this call where the sender goes away: then its own part is to clean up.
    let reading = tokio::spawn(reading);
    let imported = importing.await;
    reading.abort();
    imported
}

/// Zeroes as parts of data; `false` where nobody takes them.
async fn send_zeroes(parts: &mpsc::Sender<SentPart>, zero: &v1::ImportZero) -> bool {
    let (mut offset, mut left) = (zero.offset, zero.bytes);
    while left > 0 {
        let now = left.min(ZEROES.len() as u64);
        let data = Bytes::from_static(&ZEROES[..now as usize]);
        if parts.send(Ok(ImportPart { offset, data })).await.is_err() {
            return false;
        }
        // What has no end is refused by whoever takes it.
        (offset, left) = (offset.saturating_add(now), left - now);
    }
    true
}

/// What a disk has, as it is read.
pub(super) fn export(exported: Exported) -> Answers<v1::DiskPart> {
    Box::pin(ReceiverStream::new(exported).map(|part| part.map_err(status)))
}

/// How far a flattening is, then what came of it. It goes on where nobody listens.
pub(super) fn flatten(host: &Host, image: ImageId) -> Answers<v1::FlattenProgress> {
    let (answers, stream) = mpsc::channel(ANSWERS);
    let host = host.clone();
    tokio::spawn(async move {
        let progress = answers.clone();
        let mut said = 0;
        let tell = move |done_bytes: u64, total_bytes: u64| {
            if done_bytes >= said + PROGRESS_BYTES {
                said = done_bytes;
                // A word of progress that nobody reads is lost, no more.
                let _ = progress.try_send(Ok(v1::FlattenProgress {
                    done_bytes,
                    total_bytes,
                    result: None,
                }));
            }
        };
        let answer = match host.flatten(&image, tell).await {
            Ok((shared, allocated_bytes)) => Ok(v1::FlattenProgress {
                result: Some(v1::FlattenResult {
                    shared,
                    allocated_bytes,
                }),
                ..v1::FlattenProgress::default()
            }),
            Err(error) => Err(status(error)),
        };
        let _ = answers.send(answer).await;
    });
    Box::pin(ReceiverStream::new(stream))
}

/// The progress of a clone or a move as messages, then its end. Whoever goes away cancels it.
pub(super) fn follow<T, M>(underway: Underway<T>, step: fn(Progress, Option<T>) -> M) -> Answers<M>
where
    T: Send + 'static,
    M: Send + 'static,
{
    let (answers, stream) = mpsc::channel(ANSWERS);
    tokio::spawn(async move {
        let Underway {
            mut progress,
            cancel,
            mut end,
        } = underway;
        let (mut said, mut phase) = (0, Phase::default());
        let result = loop {
            tokio::select! {
                result = &mut end => break result,
                () = answers.closed() => {
                    cancel.cancel();
                    break (&mut end).await;
                }
                Ok(()) = progress.changed() => {
                    let now = *progress.borrow_and_update();
                    let far = now.done_bytes >= said + PROGRESS_BYTES || now.done_bytes == now.total_bytes;
                    if far || now.phase != phase {
                        (said, phase) = (now.done_bytes, now.phase);
                        // A word of progress that nobody reads is lost, no more.
                        let _ = answers.try_send(Ok(step(now, None)));
                    }
                }
            }
        };
        let answer = match result {
            Ok(Ok(ended)) => Ok(step(*progress.borrow(), Some(ended))),
            Ok(Err(error)) => Err(status(error)),
            Err(error) => Err(Status::internal(format!(
                "a bug ended the call, see the agent's log: {error}"
            ))),
        };
        let _ = answers.send(answer).await;
    });
    Box::pin(ReceiverStream::new(stream))
}

/// A disk from another host, or from a person, whose role is looked at. What a broken stream leaves is kept for a while.
pub(super) async fn receive_disk(
    host: &Host,
    person: Option<Role>,
    mut stream: tonic::Streaming<v1::DiskPart>,
) -> Result<Answers<v1::DiskAnswer>, Status> {
    let first = tokio::time::timeout(PART_LIMIT, stream.message()).await;
    let first = first.map_err(|_| Status::deadline_exceeded("the disk's header did not come"))??;
    let Some(DiskPart::Header(header)) = first.and_then(|part| part.part) else {
        return Err(invalid("the first part of a disk must be its header"));
    };
    if let Some(role) = person {
        if header.layer.is_some() || header.runs {
            return Err(invalid("only a host sends the disk of a VM that moves"));
        }
        let image = image_id_or_newest(header.image.as_ref()).map_err(invalid)?;
        if role < Role::Admin {
            host.may_use(&image, role).await.map_err(status)?;
        }
    }
    let (answers, answered) = mpsc::channel(ANSWERS);
    let say = |answer| Ok(v1::DiskAnswer { answer: Some(answer) });
    let receiving = match host.receive(header).await.map_err(status)? {
        Begun::Taken => {
            let _ = answers.try_send(say(Answer::Taken(v1::DiskTaken {})));
            return Ok(Box::pin(ReceiverStream::new(answered)));
        }
        Begun::From(receiving, from) => {
            let _ = answers.try_send(say(Answer::WantedFrom(from)));
            receiving
        }
    };
    let host = host.clone();
    tokio::spawn(async move {
        let end = match take_in(&host, receiving, stream).await {
            Ok(()) => say(Answer::Taken(v1::DiskTaken {})),
            Err(error) => Err(error),
        };
        let _ = answers.send(end).await;
    });
    Ok(Box::pin(ReceiverStream::new(answered)))
}

async fn take_in(
    host: &Host,
    mut receiving: Receiving,
    mut stream: tonic::Streaming<v1::DiskPart>,
) -> Result<(), Status> {
    loop {
        let part = tokio::select! {
            part = tokio::time::timeout(PART_LIMIT, stream.message()) => part,
            () = receiving.outdated() => return Err(Status::aborted("the transfer has a newer connection")),
        };
        let part = match part {
            Ok(Ok(Some(part))) => part.part,
            Ok(Ok(None)) => None,
            Ok(Err(_)) | Err(_) => None,
        };
        match part {
            None => {
                host.keep_for_a_while(receiving);
                return Err(Status::aborted("the disk broke off before its end"));
            }
            Some(DiskPart::GivenUp(_)) => {
                receiving.discard().await;
                return Err(Status::cancelled("the disk was given up"));
            }
            Some(part) => match receiving.take(part).await {
                Ok(false) => {}
                Ok(true) => return host.received(receiving).await.map_err(status),
                Err(error @ HostError::Shipped { .. }) => {
                    // What came before is right, and the sender may go on from there.
                    host.keep_for_a_while(receiving);
                    return Err(status(error));
                }
                Err(error) => {
                    receiving.discard().await;
                    return Err(status(error));
                }
            },
        }
    }
}

pub(super) fn adopt(host: &Host, request: &v1::AdoptRequest) -> Result<Answers<v1::AdoptProgress>, Status> {
    let image = image_id_or_newest(request.image.as_ref()).map_err(invalid)?;
    if request.urls.is_empty() || request.urls.len() > MAX_URLS {
        return Err(invalid(format_args!(
            "{} targets were named; give 1 to {MAX_URLS}, for instance iscsi://HOST/TARGET/LUN",
            request.urls.len()
        )));
    }
    let urls: Result<Vec<IscsiUrl>, _> = request.urls.iter().map(|url| url.parse()).collect();
    let urls = urls.map_err(|error: treeboot_types::IscsiUrlError| invalid(chain(&error)))?;
    let (answers, stream) = mpsc::channel(ANSWERS);
    let host = host.clone();
    tokio::spawn(async move {
        let progress = answers.clone();
        let mut said = 0;
        let tell = move |done: u64, total: u64| {
            if done >= said + PROGRESS_BYTES || done == total {
                said = done;
                // Whoever asked does not read as fast as the disk: a word of progress is lost, no more.
                let _ = progress.try_send(Ok(v1::AdoptProgress {
                    done_bytes: done,
                    total_bytes: total,
                    result: None,
                }));
            }
        };
        let result = tokio::select! {
            result = host.adopt(image, urls, tell) => result,
            () = answers.closed() => return,
        };
        let answer = match result {
            Ok(imported) => Ok(v1::AdoptProgress {
                done_bytes: imported.image.bytes,
                total_bytes: imported.image.bytes,
                result: Some(convert::imported(&imported)),
            }),
            Err(error) => Err(status(error)),
        };
        let _ = answers.send(answer).await;
    });
    Ok(Box::pin(ReceiverStream::new(stream)))
}

/// The VM's present state, then each change, until it is ready, failed or stopped.
pub(super) fn watch(mut report: watch::Receiver<VmReport>) -> Answers<v1::Vm> {
    let (answers, stream) = mpsc::channel(ANSWERS);
    tokio::spawn(async move {
        loop {
            let now = report.borrow_and_update().clone();
            let now = now.with_stats().await;
            let last = !matches!(now.run, VmRun::Starting);
            if answers.send(Ok(convert::vm(&now))).await.is_err() || last {
                return;
            }
            tokio::select! {
                changed = report.changed() => if changed.is_err() {
                    return;
                },
                () = answers.closed() => return,
            }
        }
    });
    Box::pin(ReceiverStream::new(stream).map(|answer: Result<v1::Vm, HostError>| answer.map_err(status)))
}
