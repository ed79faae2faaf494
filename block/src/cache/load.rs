//! One job: gets a chunk or a hash block from the file or the source, and checks it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use treeboot_types::Digest;

use super::counters::add;
use super::group::Located;
use super::owner::Request;
use super::shared::{Key, Shared, matches, zero_digest};
use super::{FetchError, Fetched, Region, SourceId};
use crate::BlockError;
use crate::blocking;
use crate::verity::{Parent, digest_in};

/// The first pause after a source that gave nothing; it doubles. The source has waited for its paths already, so
/// the pauses only keep a source that fails at once from being asked in a tight loop.
const FIRST_PAUSE: Duration = Duration::from_millis(5);

/// Why a job failed; cloned for each who waits.
#[derive(Debug, Clone)]
pub(super) enum LoadError {
    Unavailable(String),
    Corrupt(String),
}

impl From<LoadError> for BlockError {
    fn from(error: LoadError) -> Self {
        match error {
            LoadError::Unavailable(what) => BlockError::Unavailable { what },
            LoadError::Corrupt(what) => BlockError::Corrupt { what },
        }
    }
}

/// Checked bytes, and whether they are still to be stored.
pub(super) struct Loaded {
    pub(super) bytes: Bytes,
    pub(super) store: bool,
}

/// What a job needs: the cache, and the owner's inner door for the hash blocks above.
#[derive(Clone)]
pub(super) struct Job {
    pub(super) shared: Arc<Shared>,
    /// Unbounded, because a job must not wait for the queue that waits for it. What is in it is bounded by the jobs,
    /// each of which asks for one hash block at a time.
    pub(super) inner: mpsc::UnboundedSender<Request>,
}

impl Job {
    /// Gets `key`, checked.
    pub(super) async fn load(&self, key: Key) -> Result<Loaded, LoadError> {
        let shared = &self.shared;
        if key.region == Region::Hash
            && let Some(bytes) = shared.hash_block_now(key.index)
        {
            let store = !shared.is_ready(key);
            return Ok(Loaded { bytes, store });
        }
        if shared.held.locate(key).is_some() {
            let expected = self.expected(key).await?;
            // Located again: what was found before the wait may be elsewhere.
            if let Some(located) = shared.held.locate(key)
                && let Some(bytes) = self.read_file(key, &located).await
            {
                if matches(&bytes, &expected) {
                    shared.group.confirm(&shared.held, key, &located);
                    return Ok(self.loaded(key, bytes, false));
                }
                shared.set_damaged(key, &located);
            }
        }
        if let Some(expected) = shared.expected_now(key)
            && key.region == Region::Data
            && expected.iter().all(|digest| *digest == zero_digest())
        {
            add(&shared.counters.zero_chunks, 1);
            let (_, length) = shared.span(key);
            return Ok(self.loaded(key, Bytes::from(vec![0; length as usize]), true));
        }
        if key.region == Region::Data {
            add(&shared.counters.chunk_misses, 1);
            add(&shared.group.misses, 1);
        }
        let bytes = self.fetch_checked(key).await?;
        Ok(self.loaded(key, bytes, true))
    }

    fn loaded(&self, key: Key, bytes: Bytes, store: bool) -> Loaded {
        if key.region == Region::Hash {
            self.shared.remember_hash_block(key.index, bytes.clone());
        }
        Loaded { bytes, store }
    }

    /// What is in the file, unless it cannot be read; then nobody looks there again.
    async fn read_file(&self, key: Key, located: &Located) -> Option<Bytes> {
        let (offset, length) = self.shared.span(key);
        let mut bytes = vec![0; length as usize];
        let storage = located.part.storage(key.region);
        match blocking::read_storage(storage, offset, offset, &mut bytes).await {
            Ok(()) => Some(bytes.into()),
            Err(error) => {
                tracing::warn!(region = ?key.region, offset, %error, "the cache's file cannot be read");
                self.shared.read_failed(key, located, &error);
                None
            }
        }
    }

    /// The digests of the key's 4 KiB blocks, from checked hash blocks.
    async fn expected(&self, key: Key) -> Result<Vec<Digest>, LoadError> {
        if let Some(expected) = self.shared.expected_now(key) {
            return Ok(expected);
        }
        let mut digests = vec![];
        let mut last: Option<(u64, Bytes)> = None;
        for (parent, _) in self.shared.parents(key) {
            let (number, slot) = match parent {
                Parent::Root => {
                    digests.push(self.shared.content.digest);
                    continue;
                }
                Parent::Slot { block, slot } => (block, slot),
            };
            let block = match last.take() {
                Some((same, block)) if same == number => block,
                _ => self.hash_block(number).await?,
            };
            digests.push(digest_in(&block, slot).expect("a hash block has 128 digests"));
            last = Some((number, block));
        }
        Ok(digests)
    }

    async fn hash_block(&self, block: u64) -> Result<Bytes, LoadError> {
        if let Some(bytes) = self.shared.hash_block_now(block) {
            return Ok(bytes);
        }
        let key = Key::hash(block);
        let (reply, answer) = oneshot::channel();
        let gone = || LoadError::Unavailable("the cache is being closed".into());
        let request = Request::Load {
            key,
            bytes: true,
            reply,
        };
        self.inner.send(request).map_err(|_| gone())?;
        let bytes = answer.await.map_err(|_| gone())??;
        bytes.ok_or_else(|| LoadError::Unavailable(format!("the hash block {block} was not handed over")))
    }

    async fn fetch_checked(&self, key: Key) -> Result<Bytes, LoadError> {
        let (offset, length) = self.shared.span(key);
        let mut avoid: Vec<SourceId> = vec![];
        let mut pause = FIRST_PAUSE;
        let mut last_error = None;
        // The digests are fetched while the bytes are on their way.
        let (mut fetched, expected) = tokio::join!(self.fetch(key, &avoid), self.expected(key));
        let expected = expected?;
        for attempt in 1.. {
            match fetched {
                Ok(Fetched { bytes, source }) => {
                    let counter = match key.region {
                        Region::Data => &self.shared.counters.fetched_data_bytes,
                        Region::Hash => &self.shared.counters.fetched_hash_bytes,
                    };
                    add(counter, bytes.len() as u64);
                    if bytes.len() == length as usize && matches(&bytes, &expected) {
                        return Ok(bytes);
                    }
                    add(&self.shared.counters.bad_chunks, 1);
                    self.current_source().report_wrong(source, key.region, offset);
                    if !avoid.contains(&source) {
                        avoid.push(source);
                    }
                }
                Err(FetchError::NoSource { what }) => {
                    last_error = Some(what);
                    break;
                }
                Err(FetchError::Unavailable { what }) => {
                    last_error = Some(what);
                    if attempt < self.shared.options.tries {
                        tokio::time::sleep(pause).await;
                        pause *= 2;
                    }
                }
            }
            if attempt >= self.shared.options.tries {
                break;
            }
            fetched = self.fetch(key, &avoid).await;
        }
        let at = format!(
            "{:?} at {offset} of image {}",
            key.region, self.shared.content.digest
        );
        Err(match last_error {
            None => LoadError::Corrupt(format!(
                "{at}: each of {} sources delivered other bytes than the hash tree says",
                avoid.len()
            )),
            Some(what) if avoid.is_empty() => LoadError::Unavailable(format!("{at}: {what}")),
            Some(what) => LoadError::Unavailable(format!(
                "{at}: {what} ({} other sources delivered wrong bytes)",
                avoid.len()
            )),
        })
    }

    fn current_source(&self) -> Arc<dyn super::ChunkSource> {
        Arc::clone(&self.shared.source.read())
    }

    async fn fetch(&self, key: Key, avoid: &[SourceId]) -> Result<Fetched, FetchError> {
        let source = self.current_source();
        let (offset, length) = self.shared.span(key);
        let timeout = self.shared.options.fetch_timeout;
        match tokio::time::timeout(timeout, source.fetch(key.region, offset, length, avoid)).await {
            Ok(result) => result,
            Err(_) => Err(FetchError::Unavailable {
                what: format!("no answer within {} s", timeout.as_secs()),
            }),
        }
    }
}
