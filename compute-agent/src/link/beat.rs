//! The heartbeat stream.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use treeboot_proto::v1;
use treeboot_proto::v1::coordinator_client::CoordinatorClient;
use treeboot_proto::v1::push::Push;

use crate::identity::reason;

use crate::keys::Keys;

use super::talk::{Talk, state_digest};
use super::{Identity, LinkEvent, Stream, Unwanted};

/// First and longest pause before the stream is tried again.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// Longest wait for the coordinator's first word on a stream.
const WELCOME_LIMIT: Duration = Duration::from_secs(5);
/// Beats that may be under way; beyond it the stream is stuck and silence ends it.
const BEATS: usize = 8;
/// Bounds of the pace that a coordinator may ask for, in milliseconds: a zero would spin, a day would be silence.
const BEAT_MS: (u64, u64) = (20, 60_000);

/// What a host tells of itself.
pub trait HostView: Send + Sync + 'static {
    /// Its whole state, attachments sorted by image.
    fn state(&self) -> v1::HostState;
    /// What parents did wrong since the last call.
    fn complaints(&mut self) -> Vec<v1::BadParent>;
    /// Ends when the state may have changed since the last call of `state`.
    fn changed(&mut self) -> impl Future<Output = ()> + Send;
}

pub(super) struct Heart<V> {
    pub(super) client: CoordinatorClient<Channel>,
    pub(super) address: String,
    pub(super) identity: Identity,
    pub(super) keys: Arc<Keys>,
    pub(super) view: V,
    pub(super) state: watch::Sender<Stream>,
    pub(super) events: mpsc::Sender<LinkEvent>,
}

/// Why one stream ended.
enum End {
    Stopped,
    Refused,
    Lost(String),
}

/// A stream, and what was said on it.
struct Line {
    beats: mpsc::Sender<v1::Beat>,
    talk: Talk<v1::BadParent>,
}

impl<V: HostView> Heart<V> {
    pub(super) async fn run(mut self, stop: CancellationToken) {
        let mut pause = BACKOFF.0;
        let mut complaints = Vec::new();
        let mut said_down = false;
        loop {
            let mut welcomed = false;
            match self.stream(&stop, &mut complaints, &mut welcomed).await {
                End::Stopped | End::Refused => return,
                End::Lost(why) => {
                    if welcomed {
                        pause = BACKOFF.0;
                        said_down = false;
                    }
                    // Once for each loss, not once for each attempt.
                    if !said_down {
                        tracing::warn!(
                            coordinator = %self.address, reason = %why,
                            "the coordinator cannot be reached; attached images and VMs go on, new ones wait; trying again"
                        );
                        said_down = true;
                    }
                    self.state.send_replace(Stream::Down(why));
                }
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(self.spread(pause)) => {}
            }
            pause = (pause * 2).min(BACKOFF.1);
        }
    }

    /// A pause between a half and the whole of `pause`, different from host to host, so that a fleet whose
    /// coordinator comes back does not come at once.
    fn spread(&self, pause: Duration) -> Duration {
        let share = crc32c::crc32c(self.identity.instance.as_bytes()) % 1000;
        pause / 2 + pause / 2 * share / 1000
    }

    async fn stream(
        &mut self,
        stop: &CancellationToken,
        complaints: &mut Vec<v1::BadParent>,
        welcomed: &mut bool,
    ) -> End {
        let (beats, outbox) = mpsc::channel(BEATS);
        let mut line = Line {
            beats,
            talk: Talk::new(std::mem::take(complaints)),
        };
        let end = self.talk(&mut line, outbox, stop, welcomed).await;
        *complaints = line.talk.unheard();
        end
    }

    async fn talk(
        &mut self,
        line: &mut Line,
        outbox: mpsc::Receiver<v1::Beat>,
        stop: &CancellationToken,
        welcomed: &mut bool,
    ) -> End {
        if !self.beat(line, true) {
            return End::Lost("the stream is full".into());
        }
        let open = self.client.heartbeat(ReceiverStream::new(outbox));
        let opened = tokio::select! {
            () = stop.cancelled() => return End::Stopped,
            opened = tokio::time::timeout(WELCOME_LIMIT, open) => opened,
        };
        let mut pushes = match opened {
            Ok(Ok(response)) => response.into_inner(),
            Ok(Err(status)) => return End::Lost(reason(&status)),
            Err(_) => return End::Lost("no answer to the first beat".into()),
        };
        let mut beat_every = WELCOME_LIMIT;
        let mut silence = WELCOME_LIMIT;
        let mut heard = tokio::time::Instant::now();
        let mut next_beat = heard + beat_every;
        loop {
            let push = tokio::select! {
                () = stop.cancelled() => return End::Stopped,
                () = self.view.changed(), if *welcomed => {
                    if !self.beat(line, false) {
                        return End::Lost("beats are not taken".into());
                    }
                    continue;
                }
                () = tokio::time::sleep_until(next_beat), if *welcomed => {
                    next_beat = tokio::time::Instant::now() + beat_every;
                    if !self.beat(line, false) {
                        return End::Lost("beats are not taken".into());
                    }
                    continue;
                }
                () = tokio::time::sleep_until(heard + silence) => {
                    return End::Lost(format!("silent for {} ms", silence.as_millis()));
                }
                push = pushes.next() => push,
            };
            heard = tokio::time::Instant::now();
            let push = match push {
                Some(Ok(push)) => push.push,
                Some(Err(status)) => return End::Lost(reason(&status)),
                None => return End::Lost("the stream was closed".into()),
            };
            match push {
                Some(Push::Welcome(welcome)) => {
                    *welcomed = true;
                    self.keys.welcomed(&welcome).await;
                    beat_every = Duration::from_millis(welcome.beat_ms.clamp(BEAT_MS.0, BEAT_MS.1));
                    // Each beat is acknowledged: three without one, and the coordinator or the way to it is gone.
                    silence = (beat_every * 3).max(Duration::from_secs(1));
                    next_beat = heard + beat_every;
                    tracing::info!(coordinator = %self.address, "connected");
                    let epoch = welcome.epoch.map(Into::into).unwrap_or_default();
                    self.state.send_replace(Stream::Up);
                    self.tell(LinkEvent::Connected { epoch }).await;
                }
                Some(Push::Ack(ack)) => line.talk.acknowledged(ack.sequence),
                Some(Push::Placement(placement)) => {
                    // Before anybody acts on the place.
                    self.keys.placed(&placement).await;
                    match (&placement).try_into() {
                        Ok(placement) => self.tell(LinkEvent::Placed(Box::new(placement))).await,
                        Err(error) => tracing::warn!(%error, "a placement that cannot be used"),
                    }
                }
                Some(Push::SendState(_)) if !self.beat(line, true) => {
                    return End::Lost("beats are not taken".into());
                }
                Some(Push::SendState(_)) => {}
                Some(Push::Detach(detach)) => match treeboot_proto::image_id(detach.image.as_ref()) {
                    Ok(image) => {
                        let unwanted = Unwanted {
                            image,
                            epoch: detach.epoch.map(Into::into).unwrap_or_default(),
                            reason: detach.reason,
                            drop_cache: detach.drop_cache,
                        };
                        self.tell(LinkEvent::Detach(unwanted)).await;
                    }
                    Err(error) => tracing::warn!(%error, "a detach that cannot be used"),
                },
                Some(Push::Refused(refused)) => {
                    self.state.send_replace(Stream::Down(refused.reason.clone()));
                    self.tell(LinkEvent::Refused {
                        reason: refused.reason,
                    })
                    .await;
                    return End::Refused;
                }
                None => {}
            }
        }
    }

    /// Puts a beat on the stream, with the whole state where it changed or was asked for.
    fn beat(&mut self, line: &mut Line, whole: bool) -> bool {
        let state = self.view.state();
        let digest = state_digest(&state);
        let sign = line.talk.beat(&digest, self.view.complaints(), whole);
        let beat = v1::Beat {
            sequence: sign.sequence,
            host: self.identity.host.to_string(),
            instance: self.identity.instance.clone(),
            state_digest: digest,
            state: sign.whole.then_some(state),
            bad_parents: sign.complaints,
        };
        line.beats.try_send(beat).is_ok()
    }

    async fn tell(&self, event: LinkEvent) {
        // The host ends before its link does only when the whole agent ends.
        let _ = self.events.send(event).await;
    }
}
