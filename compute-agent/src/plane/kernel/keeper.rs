//! One task for each base that is cached: it takes the base over to the cache once a parent is up, and brings the image in; again
//! where the cache is begun anew. When the cache is being left, it lets go of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use treeboot_dm::group::{FillError, Filler, Kind, Pace};

use super::cached;
use super::feed::Feed;
use super::record::BaseRecord;
use super::serving::Use;
use super::sys::{Sys, within};
use crate::host::chain;
use crate::plane::PlaneError;

/// Between two looks whether a parent is up.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Pause after something failed.
const RETRY: Duration = Duration::from_secs(5);
/// How long the end of the task is waited for: a read that no parent answers is told to fail before.
const ENDS_WITHIN: Duration = Duration::from_secs(10);
/// Chunks between two savings of what is filled: what is lost of it is read once more, from the cache.
const SAVE_EVERY: u64 = 1024;
/// How far ahead of the beginning the filler begins, in chunks: 8 MiB. Whoever reads an image from its beginning does so when it is attached, as the
/// filler does, and bcache lets both of two reads of a chunk that it lacks through. So the filler goes ahead of them.
const LEAD: u64 = 128;

/// The task.
pub(super) struct Keeper {
    stop: CancellationToken,
    task: JoinHandle<()>,
    filled: Arc<AtomicU64>,
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Keeper {
    /// Starts it.
    pub(super) fn start(sys: &Arc<Sys>, feed: &Arc<Feed>, base: BaseRecord) -> Self {
        let (stop, filled) = (CancellationToken::new(), Arc::<AtomicU64>::default());
        let work = Work {
            sys: Arc::clone(sys),
            feed: Arc::downgrade(feed),
            base,
            stop: stop.clone(),
            filled: Arc::clone(&filled),
        };
        Self {
            stop,
            task: tokio::spawn(work.run()),
            filled,
        }
    }

    /// Bytes brought in.
    pub(super) fn filled_bytes(&self) -> u64 {
        self.filled.load(Ordering::Relaxed)
    }

    /// Ends it and waits until it holds no device.
    pub(super) async fn end(mut self) -> Result<(), PlaneError> {
        self.stop.cancel();
        match tokio::time::timeout(ENDS_WITHIN, &mut self.task).await {
            Ok(_) => Ok(()),
            Err(_) => Err(PlaneError::TooLong {
                what: "the end of bringing in".into(),
                limit_ms: ENDS_WITHIN.as_millis() as u64,
            }),
        }
    }
}

struct Work {
    sys: Arc<Sys>,
    feed: std::sync::Weak<Feed>,
    base: BaseRecord,
    stop: CancellationToken,
    filled: Arc<AtomicU64>,
}

impl Work {
    async fn run(self) {
        self.keep().await;
        // What is closed is nobody's trouble any more.
        self.sys.cached.serving.tell(self.base.content.digest, None);
    }

    async fn keep(&self) {
        while !self.stop.is_cancelled() {
            if !self.serves() {
                self.pause(LOOK_EVERY).await;
                continue;
            }
            match self.feed.upgrade() {
                None => return,
                Some(feed) if !feed.is_up() => {
                    drop(feed);
                    self.pause(LOOK_EVERY).await;
                    continue;
                }
                Some(_) => {}
            }
            let (sys, base) = (Arc::clone(&self.sys), self.base);
            match within("taking the base over to the cache", move || {
                cached::take_in(&sys, &base)
            })
            .await
            {
                Ok((filler, used)) => {
                    self.sys.cached.serving.tell(self.base.content.digest, None);
                    self.fill(filler, used).await;
                    self.pause_while_it_serves(Duration::MAX).await;
                }
                // It is being left, by nobody's fault.
                Err(_) if !self.serves() => {}
                Err(error) => {
                    let why = chain(&error);
                    self.sys.cached.serving.tell(self.base.content.digest, Some(why));
                    tracing::warn!(
                        content = %self.base.content.digest.short(), error = %chain(&error),
                        "the content is not cached; tried again"
                    );
                    self.pause(RETRY).await;
                }
            }
        }
    }

    /// Two rounds for bcache, which misses some at its first reading; one for dm-cache. Each begins [`LEAD`] behind the beginning, which comes last.
    async fn fill(&self, mut filler: Filler, _used: Use) {
        let Some(settings) = self.sys.settings.group.as_ref() else {
            return;
        };
        if settings.fill_bytes_per_second == 0 {
            return;
        }
        let rounds = match settings.kind {
            Kind::Bcache => 2,
            Kind::DmCache => 1,
        };
        let begun = Instant::now();
        let mut pace = Pace::new(settings.fill_bytes_per_second, Duration::ZERO);
        for round in 0..rounds {
            if round > 0 {
                filler.again();
            }
            let lead = LEAD.min(filler.chunks() / 2);
            for span in [lead..filler.chunks(), 0..lead] {
                let mut next = span.start;
                while let Some(chunk) = filler.missing(next..span.end) {
                    if self.stop.is_cancelled() || !self.serves() {
                        let _ = filler.save();
                        return;
                    }
                    next = chunk;
                    let Ok((back, filled)) = fill_one(filler, chunk).await else {
                        return;
                    };
                    filler = back;
                    match filled {
                        Ok(bytes) => {
                            if round == 0 {
                                self.filled.fetch_add(bytes, Ordering::Relaxed);
                            }
                            let wait = pace.after(bytes, begun.elapsed());
                            if !wait.is_zero() {
                                self.pause(wait).await;
                            }
                            if chunk % SAVE_EVERY == SAVE_EVERY - 1 {
                                let _ = filler.save();
                            }
                        }
                        Err(error) => {
                            tracing::debug!(
                                content = %self.base.content.digest.short(), error = %chain(&error),
                                "a chunk was not brought in; tried again"
                            );
                            self.pause_while_it_serves(RETRY).await;
                        }
                    }
                }
            }
            // What cannot be saved is read once more after a restart.
            let _ = filler.save();
        }
    }

    fn serves(&self) -> bool {
        self.sys.cached.serving.serves()
    }

    /// Whoever waits longer than a moment looks whether the cache is being left.
    async fn pause_while_it_serves(&self, time: Duration) {
        let begun = Instant::now();
        while self.serves() && !self.stop.is_cancelled() && begun.elapsed() < time {
            self.pause(LOOK_EVERY.min(time)).await;
        }
    }

    async fn pause(&self, time: Duration) {
        let _ = tokio::time::timeout(time, self.stop.cancelled()).await;
    }
}

async fn fill_one(
    mut filler: Filler,
    chunk: u64,
) -> Result<(Filler, Result<u64, FillError>), tokio::task::JoinError> {
    tokio::task::spawn_blocking(move || {
        let filled = filler.fill(chunk);
        (filler, filled)
    })
    .await
}
