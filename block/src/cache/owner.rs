//! The owner: one task a cache that knows what is on its way, so that there is one job a chunk, however many wait.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{Id, JoinHandle, JoinSet};
use tokio::time::Instant;

use super::Region;
use super::counters::add;
use super::load::{Job, LoadError, Loaded};
use super::shared::{Key, Shared};
use crate::storage::is_full;

/// Requests that wait before the owner; readers wait when it is full.
pub(super) const REQUESTS: usize = 256;
/// Chunks asked for, on their way or being stored. At 64 KiB and with `MAX_STORING` of them in memory this bounds
/// what many guests at once can pile up; beyond it readers wait in the queue before the owner.
const MAX_ENTRIES: usize = 4096;
/// Chunks in memory that wait for being stored; while there are more no fetch begins. 128 of 64 KiB are 8 MiB.
const MAX_STORING: usize = 128;

/// `None`: it is in the file now, and right.
pub(super) type Answer = Result<Option<Bytes>, LoadError>;

/// What the owner is asked.
pub(super) enum Request {
    Load {
        key: Key,
        /// The bytes are wanted even if they are in the file.
        bytes: bool,
        reply: oneshot::Sender<Answer>,
    },
    Quiesce(oneshot::Sender<()>),
}

enum Entry {
    /// A job is or will be on it.
    Coming(Vec<oneshot::Sender<Answer>>),
    /// Handed over already, still to be stored; whoever comes now gets it from memory.
    Storing(Bytes),
}

type Stored = Vec<(Key, Bytes, io::Result<()>)>;

pub(super) struct Owner {
    shared: Arc<Shared>,
    job: Job,
    requests: mpsc::Receiver<Request>,
    inner: mpsc::UnboundedReceiver<Request>,
    entries: HashMap<Key, Entry>,
    /// Chunks whose job has not begun.
    waiting: VecDeque<Key>,
    jobs: JoinSet<Result<Loaded, LoadError>>,
    job_keys: HashMap<Id, Key>,
    /// Jobs for chunks; those for hash blocks are not limited, because chunks wait for them.
    fetching: usize,
    to_store: Vec<(Key, Bytes)>,
    storing: Option<JoinHandle<Stored>>,
    being_stored: usize,
    /// Nothing is stored before then: there was no room.
    store_again: Option<Instant>,
    quiesce: Vec<oneshot::Sender<()>>,
}

enum Event {
    Request(Request),
    Loaded(Id, Result<Loaded, LoadError>),
    Stored(Stored),
    Closed,
}

impl Owner {
    pub(super) fn new(shared: Arc<Shared>, requests: mpsc::Receiver<Request>) -> Self {
        let (sender, inner) = mpsc::unbounded_channel();
        Self {
            job: Job {
                shared: Arc::clone(&shared),
                inner: sender,
            },
            shared,
            requests,
            inner,
            entries: HashMap::new(),
            waiting: VecDeque::new(),
            jobs: JoinSet::new(),
            job_keys: HashMap::new(),
            fetching: 0,
            to_store: vec![],
            storing: None,
            being_stored: 0,
            store_again: None,
            quiesce: vec![],
        }
    }

    /// Works until the last handle is gone and whatever was begun has ended.
    pub(super) async fn run(mut self) {
        let mut open = true;
        while open || !self.idle() {
            match self.next(open).await {
                Event::Request(Request::Load { key, bytes, reply }) => self.asked(key, bytes, reply),
                Event::Request(Request::Quiesce(reply)) => self.quiesce.push(reply),
                Event::Loaded(id, result) => self.loaded(id, result),
                Event::Stored(stored) => self.stored(stored),
                Event::Closed => open = false,
            }
            self.begin_jobs();
            self.begin_store();
            if self.idle() {
                self.quiesce.drain(..).for_each(|reply| {
                    let _nobody_waits = reply.send(());
                });
            }
        }
    }

    fn idle(&self) -> bool {
        self.entries.is_empty()
    }

    async fn next(&mut self, open: bool) -> Event {
        let room = self.entries.len() < MAX_ENTRIES;
        tokio::select! {
            Some(joined) = self.jobs.join_next_with_id() => match joined {
                Ok((id, result)) => Event::Loaded(id, result),
                Err(error) => {
                    tracing::error!(%error, "a fetch ended abnormally");
                    let failed = LoadError::Unavailable("a fetch ended abnormally".into());
                    Event::Loaded(error.id(), Err(failed))
                }
            },
            stored = async {
                match &mut self.storing {
                    Some(handle) => handle.await,
                    None => std::future::pending().await,
                }
            } => {
                self.storing = None;
                Event::Stored(stored.unwrap_or_else(|error| {
                    tracing::error!(%error, "storing chunks ended abnormally");
                    vec![]
                }))
            },
            // The owner holds a sender itself, so this never ends.
            Some(request) = self.inner.recv() => Event::Request(request),
            request = self.requests.recv(), if open && room => request.map_or(Event::Closed, Event::Request),
        }
    }

    fn asked(&mut self, key: Key, bytes: bool, reply: oneshot::Sender<Answer>) {
        // Whoever no longer waits does not mind; hence the results of `send` are dropped below.
        if !bytes && self.shared.is_ready(key) {
            let _gone = reply.send(Ok(None));
            return;
        }
        match self.entries.get_mut(&key) {
            Some(Entry::Coming(waiters)) => {
                waiters.push(reply);
                if key.region == Region::Data {
                    add(&self.shared.counters.chunk_joined, 1);
                }
            }
            Some(Entry::Storing(bytes)) => {
                let _gone = reply.send(Ok(Some(bytes.clone())));
                if key.region == Region::Data {
                    add(&self.shared.counters.chunk_hits, 1);
                }
            }
            None => {
                self.entries.insert(key, Entry::Coming(vec![reply]));
                match key.region {
                    Region::Data => self.waiting.push_back(key),
                    Region::Hash => self.spawn(key),
                }
            }
        }
    }

    fn begin_jobs(&mut self) {
        while self.fetching < self.shared.options.fetches
            && self.to_store.len() + self.being_stored < MAX_STORING
        {
            let Some(key) = self.waiting.pop_front() else {
                return;
            };
            self.fetching += 1;
            self.spawn(key);
        }
    }

    fn spawn(&mut self, key: Key) {
        let job = self.job.clone();
        let handle = self.jobs.spawn(async move { job.load(key).await });
        self.job_keys.insert(handle.id(), key);
    }

    fn loaded(&mut self, id: Id, result: Result<Loaded, LoadError>) {
        let Some(key) = self.job_keys.remove(&id) else {
            debug_assert!(false, "a job without a key");
            return;
        };
        if key.region == Region::Data {
            self.fetching -= 1;
        }
        let answer = result.as_ref().map(|loaded| Some(loaded.bytes.clone()));
        if let Some(Entry::Coming(waiters)) = self.entries.remove(&key) {
            for reply in waiters {
                let _gone = reply.send(answer.clone().map_err(Clone::clone));
            }
        }
        let Ok(Loaded { bytes, store: true }) = result else {
            return;
        };
        if self.store_again.is_some_and(|again| Instant::now() < again) {
            self.passed_through(key, &bytes);
            return;
        }
        self.entries.insert(key, Entry::Storing(bytes.clone()));
        self.to_store.push((key, bytes));
    }

    fn passed_through(&self, key: Key, bytes: &Bytes) {
        if key.region == Region::Data {
            add(&self.shared.counters.uncached_bytes, bytes.len() as u64);
        }
    }

    fn begin_store(&mut self) {
        if self.storing.is_some() || self.to_store.is_empty() {
            return;
        }
        let batch = std::mem::take(&mut self.to_store);
        self.being_stored = batch.len();
        let shared = Arc::clone(&self.shared);
        self.storing = Some(tokio::task::spawn_blocking(move || {
            let mut stored: Stored = vec![];
            for (key, bytes) in batch {
                let full = matches!(stored.last(), Some((_, _, Err(_))));
                let result = match full {
                    // No second attempt within one batch.
                    true => Err(io::ErrorKind::StorageFull.into()),
                    false => shared.store(key, &bytes),
                };
                stored.push((key, bytes, result));
            }
            stored
        }));
    }

    fn stored(&mut self, stored: Stored) {
        self.being_stored = 0;
        if stored.is_empty() {
            // The store panicked: whatever it had is forgotten, so that it is fetched again.
            self.entries.retain(|_, entry| matches!(entry, Entry::Coming(_)));
            let queued: Vec<(Key, Bytes)> = self.to_store.drain(..).collect();
            queued
                .iter()
                .for_each(|(key, bytes)| self.passed_through(*key, bytes));
            return;
        }
        let mut failure = None;
        for (key, bytes, result) in stored {
            if let Some(Entry::Coming(_)) = self.entries.get(&key) {
                debug_assert!(false, "a key is loaded while it is being stored");
            }
            self.entries.remove(&key);
            match result {
                Ok(()) if key.region == Region::Data => self.store_again = None,
                Ok(()) => {}
                Err(error) => {
                    self.passed_through(key, &bytes);
                    failure.get_or_insert(error);
                }
            }
        }
        let Some(error) = failure else { return };
        if self.store_again.is_none() {
            tracing::warn!(
                image = %self.shared.content.digest.short(), %error, full = is_full(&error),
                "the cache cannot store; reads go on, passed through, and storing is tried again from time to time"
            );
        }
        self.store_again = Some(Instant::now() + self.shared.options.store_retry);
    }
}
