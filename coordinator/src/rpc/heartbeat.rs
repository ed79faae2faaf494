//! One heartbeat stream: beats inward, pushes outward through a bounded queue.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Status, Streaming};
use treeboot_identity::tls::Peer;
use treeboot_proto::v1;

use crate::owner::{CallError, Handle, OUTGOING, Outgoing};
use crate::rpc::{Edges, convert};
use crate::rules::Rules;
use crate::tree::{HostState, StreamId};

/// In a box for the reason of [`Outgoing`].
type Sender = mpsc::Sender<Box<v1::Push>>;

/// What a host is sent.
pub(super) type Pushes = Pin<Box<dyn Stream<Item = Result<v1::Push, Status>> + Send>>;

/// Messages between this task and the connection. Small: what waits, waits in the owner's queue, where it is counted.
const IN_TRANSIT: usize = 4;

pub(super) async fn open(
    owner: Handle,
    next: &AtomicU64,
    mut stop: watch::Receiver<bool>,
    peer: Peer,
    edges: Edges,
    rules: Arc<Rules>,
    beats: Streaming<v1::Beat>,
) -> Result<Pushes, CallError> {
    let stream = StreamId(next.fetch_add(1, Ordering::Relaxed));
    let (pushes, queued) = mpsc::channel(OUTGOING);
    owner.open(stream, pushes).await?;
    let (sender, receiver) = mpsc::channel(IN_TRANSIT);
    tokio::spawn(async move {
        let outward = forward(queued, sender.clone(), &peer, &edges, &owner);
        let inward = take_in(beats, sender.clone(), stream, &peer, &edges, &rules, &owner);
        tokio::select! {
            () = inward => {}
            () = outward => {}
            _ = stop.wait_for(|stop| *stop) => {}
        }
        owner.closed(stream).await;
    });
    Ok(Box::pin(ReceiverStream::new(receiver).map(|push| Ok(*push))))
}

/// Takes beats in until the host is gone or says what cannot be.
async fn take_in(
    mut beats: Streaming<v1::Beat>,
    sender: Sender,
    stream: StreamId,
    peer: &Peer,
    edges: &Edges,
    rules: &Rules,
    owner: &Handle,
) {
    while let Ok(Some(message)) = beats.message().await {
        let beat = convert::beat(&message)
            .map_err(|error| format!("the beat is not valid: {error}"))
            .and_then(|beat| {
                super::own_name(peer, &beat.speaker.host).map_err(|status| status.message().to_owned())?;
                Ok(beat)
            });
        match beat {
            Ok(mut beat) => {
                if let Some(state) = &mut beat.state {
                    leave_out(rules, state);
                    edges.saw(&state.info);
                }
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
                let _ = sender.send(Box::new(refused)).await;
                return;
            }
        }
    }
}

/// A host comes into no tree by saying that it is in it.
fn leave_out(rules: &Rules, state: &mut HostState) {
    let info = &state.info;
    state.attachments.retain(|attachment| {
        let image = &attachment.image;
        match rules.host(&image.name, &info.name, &info.labels) {
            Ok(()) => true,
            Err(denied) => {
                tracing::warn!(host = %info.name, %image, reason = %denied, "an attachment does not count");
                false
            }
        }
    });
}

async fn forward(
    mut queued: mpsc::Receiver<Outgoing>,
    sender: Sender,
    peer: &Peer,
    edges: &Edges,
    owner: &Handle,
) {
    use v1::push::Push as Message;
    while let Some(push) = queued.recv().await {
        let mut push = convert::push(&push);
        // In boxes: what they hold is held for moments, and this for as long as the host beats.
        match &mut push.push {
            Some(Message::Welcome(welcome)) => Box::pin(edges.welcome(peer, owner, welcome)).await,
            Some(Message::Placement(placement)) => Box::pin(edges.fill(peer, owner, placement)).await,
            _ => {}
        }
        if sender.send(Box::new(push)).await.is_err() {
            return;
        }
    }
}
