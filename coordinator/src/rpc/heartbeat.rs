//! One heartbeat stream: beats inward, pushes outward through a bounded queue.

use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};
use treeboot_identity::tls::Peer;
use treeboot_proto::v1;

use crate::owner::{CallError, Handle, OUTGOING};
use crate::rpc::convert;
use crate::tree::{Push, StreamId};

type Sender = mpsc::Sender<Result<v1::Push, Status>>;

/// Messages between this task and the connection. Small: what waits, waits in the owner's queue, where it is counted.
const IN_TRANSIT: usize = 4;

pub(super) async fn open(
    owner: Handle,
    next: &AtomicU64,
    stop: watch::Receiver<bool>,
    peer: Peer,
    beats: Streaming<v1::Beat>,
) -> Result<ReceiverStream<Result<v1::Push, Status>>, CallError> {
    let stream = StreamId(next.fetch_add(1, Ordering::Relaxed));
    let (pushes, queued) = mpsc::channel(OUTGOING);
    owner.open(stream, pushes).await?;
    let (sender, receiver) = mpsc::channel(IN_TRANSIT);
    tokio::spawn(async move {
        serve(&owner, stream, &peer, beats, queued, sender, stop).await;
        owner.closed(stream).await;
    });
    Ok(ReceiverStream::new(receiver))
}

/// Ends when either side does, when the owner closes the stream, or when the daemon stops.
async fn serve(
    owner: &Handle,
    stream: StreamId,
    peer: &Peer,
    mut beats: Streaming<v1::Beat>,
    queued: mpsc::Receiver<Push>,
    sender: Sender,
    mut stop: watch::Receiver<bool>,
) {
    let inward = async {
        while let Ok(Some(message)) = beats.message().await {
            let beat = convert::beat(&message)
                .map_err(|error| format!("the beat is not valid: {error}"))
                .and_then(|beat| {
                    super::own_name(peer, &beat.speaker.host)
                        .map_err(|status| status.message().to_owned())?;
                    Ok(beat)
                });
            match beat {
                Ok(beat) => {
                    if owner.beat(stream, beat).await.is_err() {
                        return;
                    }
                }
                Err(reason) => {
                    tracing::warn!(stream = stream.0, "{reason}");
                    let refused = v1::Push {
                        push: Some(convert::refused(reason)),
                    };
                    // The host may be gone; the stream ends either way.
                    let _ = sender.send(Ok(refused)).await;
                    return;
                }
            }
        }
    };
    let outward = forward(queued, sender.clone());
    tokio::select! {
        () = inward => {}
        () = outward => {}
        _ = stop.wait_for(|stop| *stop) => {}
    }
}

async fn forward(mut queued: mpsc::Receiver<Push>, sender: Sender) {
    while let Some(push) = queued.recv().await {
        if sender.send(Ok(convert::push(&push))).await.is_err() {
            return;
        }
    }
}
