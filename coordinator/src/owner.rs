//! The one task that owns the trees: requests in through a bounded queue; what they decide is saved as one batch,
//! and only then answered and pushed.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};
use treeboot_types::Tick;

use crate::figures::Figures;
use crate::note;
use crate::outbox::Outbox;
use crate::store::{Store, StoreError};
use crate::tree::{Answer, Beat, Call, CallId, Change, Effect, Event, Forest, Push, Refusal, StreamId};

/// Requests that wait for the owner. A burst of 1,000 joins fits; what is beyond waits in its own connection.
const QUEUE: usize = 4_096;
/// Requests that share one flush of the record.
const BATCH: usize = 1_024;
/// Messages that wait for one host. A host that leaves so many unread is disconnected: when it comes back it is told
/// the newest placements, which is all that it missed.
pub(crate) const OUTGOING: usize = 256;
/// In a box: tokio's channels keep 32 places for each host whether they are used or not.
pub(crate) type Outgoing = Box<Push>;

/// Why a call came to nothing.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CallError {
    /// It was refused.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The decision could not be made durable; it is tried again with the next one.
    #[error("{0}")]
    NotSaved(String),
    /// The coordinator ends.
    #[error("the coordinator is stopping; try again when it is back")]
    Stopping,
}

/// What somebody who watches the coordinator is to know; always current, without a question to the owner.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Health {
    /// Why the record cannot be written now. Questions are answered from memory, whoever asks for a change is refused, and hosts are told
    /// nothing new until it can be written again.
    pub not_saved: Option<String>,
    /// Changes that wait for it.
    pub waiting: usize,
    /// Whether places are being learned from hosts, and none given out.
    pub rebuilding: bool,
}

type Reply = oneshot::Sender<Result<Answer, CallError>>;
type Question = Box<dyn FnOnce(&Forest) + Send>;

enum Request {
    Open(StreamId, mpsc::Sender<Outgoing>),
    Beat(StreamId, Box<Beat>),
    Closed(StreamId),
    Call(Box<Call>, Reply),
    Ask(Question),
}

/// The way to the owner.
#[derive(Debug, Clone)]
pub struct Handle {
    requests: mpsc::Sender<Request>,
    health: watch::Receiver<Health>,
    figures: Arc<Figures>,
}

impl std::fmt::Debug for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Open(..) => "Open",
            Self::Beat(..) => "Beat",
            Self::Closed(..) => "Closed",
            Self::Call(..) => "Call",
            Self::Ask(..) => "Ask",
        })
    }
}

impl Handle {
    /// A call that changes something, answered when it is durable.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn call(&self, call: Call) -> Result<Answer, CallError> {
        let (reply, answer) = oneshot::channel();
        let request = Request::Call(Box::new(call), reply);
        self.requests
            .send(request)
            .await
            .map_err(|_| CallError::Stopping)?;
        answer.await.map_err(|_| CallError::Stopping)?
    }

    /// A question that changes nothing.
    ///
    /// # Errors
    /// [`CallError::Stopping`].
    pub async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&Forest) -> T + Send + 'static,
    ) -> Result<T, CallError> {
        let (reply, answer) = oneshot::channel();
        let question: Question = Box::new(move |forest| {
            // Whoever asked may be gone.
            let _ = reply.send(question(forest));
        });
        let request = Request::Ask(question);
        self.requests
            .send(request)
            .await
            .map_err(|_| CallError::Stopping)?;
        answer.await.map_err(|_| CallError::Stopping)
    }

    /// How the owner is.
    pub fn health(&self) -> watch::Receiver<Health> {
        self.health.clone()
    }

    /// What the owner counts.
    pub(crate) fn figures(&self) -> &Figures {
        &self.figures
    }

    /// Requests that wait, and how many may.
    pub(crate) fn queue(&self) -> (usize, usize) {
        let room = self.requests.max_capacity();
        (room - self.requests.capacity(), room)
    }

    pub(crate) async fn open(
        &self,
        stream: StreamId,
        pushes: mpsc::Sender<Outgoing>,
    ) -> Result<(), CallError> {
        let request = Request::Open(stream, pushes);
        self.requests.send(request).await.map_err(|_| CallError::Stopping)
    }

    pub(crate) async fn beat(&self, stream: StreamId, beat: Beat) -> Result<(), CallError> {
        let request = Request::Beat(stream, Box::new(beat));
        self.requests.send(request).await.map_err(|_| CallError::Stopping)
    }

    pub(crate) async fn closed(&self, stream: StreamId) {
        // When the owner is gone there is nothing to tell.
        let _ = self.requests.send(Request::Closed(stream)).await;
    }
}

/// Starts the owner; it ends when `stop` says so, after it has saved and answered what it had taken.
pub fn spawn(
    forest: Forest,
    store: Arc<dyn Store>,
    stop: watch::Receiver<bool>,
) -> (Handle, tokio::task::JoinHandle<()>) {
    let (requests, queue) = mpsc::channel(QUEUE);
    let (told, health) = watch::channel(Health::default());
    let figures = Arc::new(Figures::default());
    let owner = Owner {
        forest,
        store,
        started: Instant::now(),
        streams: HashMap::new(),
        calls: HashMap::new(),
        next_call: 0,
        outbox: Outbox::default(),
        not_saved: None,
        health: told,
        figures: Arc::clone(&figures),
    };
    let task = tokio::spawn(owner.run(queue, stop));
    let handle = Handle {
        requests,
        health,
        figures,
    };
    (handle, task)
}

struct Owner {
    forest: Forest,
    store: Arc<dyn Store>,
    started: Instant,
    streams: HashMap<StreamId, mpsc::Sender<Outgoing>>,
    calls: HashMap<CallId, Reply>,
    next_call: u64,
    outbox: Outbox,
    /// Why the newest attempt to make decisions durable failed.
    not_saved: Option<String>,
    health: watch::Sender<Health>,
    figures: Arc<Figures>,
}

impl Owner {
    async fn run(mut self, mut queue: mpsc::Receiver<Request>, mut stop: watch::Receiver<bool>) {
        // Four times a beat: a lease is at least three beats, so ends are seen soon after they are due.
        let period = Duration::from_millis((self.forest.settings().beat_ms / 4).max(10));
        let mut clock = tokio::time::interval(period);
        clock.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut looked = Instant::now();
        let mut batch = Vec::with_capacity(BATCH);
        loop {
            let mut stopping = false;
            tokio::select! {
                // Requests before the clock: a beat that arrived in time must not lose to the lease it renews.
                biased;
                _ = stop.wait_for(|stop| *stop) => stopping = true,
                taken = queue.recv_many(&mut batch, BATCH) => stopping = taken == 0,
                _ = clock.tick() => {}
            }
            for request in batch.drain(..) {
                self.take(request);
            }
            // Also when requests never cease.
            if looked.elapsed() >= period {
                looked = Instant::now();
                self.step(Event::Clock);
            }
            self.settle().await;
            self.tell_health();
            if stopping {
                break;
            }
        }
    }

    fn take(&mut self, request: Request) {
        match request {
            Request::Open(stream, pushes) => {
                self.streams.insert(stream, pushes);
            }
            // A stream that was closed from here may still have had beats on their way.
            Request::Beat(stream, beat) if self.streams.contains_key(&stream) => {
                self.figures.beats.add(1);
                self.step(Event::Beat(stream, beat));
            }
            Request::Beat(..) => {}
            Request::Closed(stream) => {
                self.streams.remove(&stream);
                self.step(Event::StreamClosed(stream));
            }
            Request::Call(call, reply) => {
                let id = CallId(self.next_call);
                self.next_call += 1;
                self.figures.calls.add(1);
                self.calls.insert(id, reply);
                self.step(Event::Call(id, call));
            }
            Request::Ask(question) => question(&self.forest),
        }
    }

    fn step(&mut self, event: Event) {
        let now = Tick(u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX));
        let mut effects = Vec::new();
        self.forest.step(now, event, &mut effects);
        for note in self.outbox.take(effects) {
            self.figures.note(&note);
            note::log(&note);
        }
    }

    /// Makes decisions durable, then answers and pushes them.
    async fn settle(&mut self) {
        let changes = self.outbox.unsaved().len();
        if changes > 0
            && let Err(error) = self.save().await
        {
            let why = chain(&error);
            // Tried again several times a beat: a word when it begins, or when the reason changes.
            if self.not_saved.as_ref() != Some(&why) {
                tracing::error!(changes, "{why}");
            }
            self.not_saved = Some(why.clone());
            let (calls, acks) = self.outbox.not_saved();
            for call in calls {
                self.answer(call, Err(CallError::NotSaved(why.clone())));
            }
            for (stream, ack) in acks {
                self.push(stream, ack);
            }
            return;
        }
        if self.not_saved.take().is_some() {
            tracing::info!("the record can be written again; nothing was lost");
        }
        let held = self.outbox.saved();
        for effect in held {
            match effect {
                Effect::Answer(call, answer) => self.answer(call, answer.map_err(CallError::Refused)),
                Effect::Push(stream, push) => self.push(stream, push),
                Effect::Close(stream) => drop(self.streams.remove(&stream)),
                Effect::Save(_) | Effect::Note(_) => {}
            }
        }
    }

    fn tell_health(&self) {
        let now = Health {
            not_saved: self.not_saved.clone(),
            waiting: self.outbox.unsaved().len(),
            rebuilding: self.forest.is_rebuilding(),
        };
        self.health.send_if_modified(|told| {
            let differs = *told != now;
            if differs {
                *told = now;
            }
            differs
        });
    }

    async fn save(&mut self) -> Result<(), StoreError> {
        let changes: Vec<Change> = self.outbox.unsaved().cloned().collect();
        let store = Arc::clone(&self.store);
        let began = Instant::now();
        let saved = tokio::task::spawn_blocking(move || store.apply(&changes)).await;
        self.figures.write(began.elapsed(), !matches!(saved, Ok(Ok(()))));
        match saved {
            Ok(result) => result?,
            Err(error) => {
                return Err(StoreError::Write {
                    dir: "the state directory".into(),
                    source: error.into(),
                });
            }
        }
        Ok(())
    }

    fn answer(&mut self, call: CallId, answer: Result<Answer, CallError>) {
        if let Some(reply) = self.calls.remove(&call) {
            // Whoever called may be gone.
            let _ = reply.send(answer);
        }
    }

    fn push(&mut self, stream: StreamId, push: Push) {
        let Some(pushes) = self.streams.get(&stream) else {
            return;
        };
        self.figures.push(&push);
        if pushes.try_send(Box::new(push)).is_err() {
            self.figures.slow_hosts.add(1);
            tracing::warn!(
                stream = stream.0,
                "a host does not read what it is sent and is disconnected"
            );
            self.streams.remove(&stream);
            self.step(Event::StreamClosed(stream));
        }
    }
}

/// An error with its causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
