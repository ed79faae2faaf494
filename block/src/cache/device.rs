//! The two read-only devices of a cache.

use std::sync::Arc;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::counters::add;
use super::owner::{Answer, Request};
use super::shared::{Key, Shared, zero_digest};
use super::{ChunkCache, Reader, Region};
use crate::blocking::{self, read_storage};
use crate::verity::{BLOCK_LEN, Parent, SUPERBLOCK, digest_in};
use crate::{BlockDevice, BlockError, Extent, Geometry, IoFuture, Provisioning};

const BLOCK: u64 = BLOCK_LEN as u64;

fn geometry(bytes: u64, thin: bool) -> Geometry {
    Geometry {
        bytes,
        block_bytes: 512,
        physical_block_bytes: BLOCK_LEN as u32,
        read_only: true,
        thin,
    }
}

/// A part of a read that lies within one chunk, or one hash block.
struct Piece {
    key: Key,
    /// Where in the reader's buffer.
    at: std::ops::Range<usize>,
    /// Where in the chunk.
    from: usize,
}

/// The pieces of `bytes` bytes from `offset` on, in units of `unit` bytes.
fn pieces(region: Region, unit: u64, offset: u64, bytes: usize) -> impl Iterator<Item = Piece> {
    let end = offset + bytes as u64;
    (offset / unit..end.div_ceil(unit)).map(move |index| {
        let first = offset.max(index * unit);
        let last = end.min((index + 1) * unit);
        Piece {
            key: Key { region, index },
            at: (first - offset) as usize..(last - offset) as usize,
            from: (first - index * unit) as usize,
        }
    })
}

impl ChunkCache {
    async fn ask(&self, key: Key, bytes: bool) -> Result<oneshot::Receiver<Answer>, BlockError> {
        let (reply, answer) = oneshot::channel();
        match self.requests.send(Request::Load { key, bytes, reply }).await {
            Ok(()) => Ok(answer),
            Err(_) => Err(closed()),
        }
    }

    /// Fills `buf` from pieces, some of which are not ready: those that are missing are asked for first, all at once.
    async fn read_pieces(
        &self,
        region: Region,
        unit: u64,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<(), BlockError> {
        let shared = &self.shared;
        let mut asked = vec![];
        for piece in pieces(region, unit, offset, buf.len()) {
            if let Some(block) = shared.made_or_remembered(piece.key) {
                copy(&block, &piece, buf);
                continue;
            }
            if shared.is_ready(piece.key) || shared.check_now(piece.key) {
                asked.push((piece, None));
            } else {
                let answer = self.ask(piece.key, false).await?;
                asked.push((piece, Some(answer)));
            }
        }
        for (piece, answer) in asked {
            let hit = answer.is_none();
            if let Some(answer) = answer
                && let Some(bytes) = answer.await.map_err(|_| closed())??
            {
                copy(&bytes, &piece, buf);
                continue;
            }
            if self.read_piece(offset, &piece, buf).await {
                if hit {
                    self.hit(region);
                }
                continue;
            }
            // It went, or the disk under the cache fails: the bytes themselves are asked for.
            match self.ask(piece.key, true).await?.await.map_err(|_| closed())?? {
                Some(bytes) => copy(&bytes, &piece, buf),
                None => return Err(closed()),
            }
        }
        Ok(())
    }

    /// Fills the piece's part of `buf` from the file, if the piece is there and still is afterwards.
    async fn read_piece(&self, offset: u64, piece: &Piece, buf: &mut [u8]) -> bool {
        let shared = &self.shared;
        let Some(located) = shared
            .held
            .locate(piece.key)
            .filter(|_| shared.is_ready(piece.key))
        else {
            return false;
        };
        let at = offset + piece.at.start as u64;
        let storage = located.part.storage(piece.key.region);
        match read_storage(storage, at, at, &mut buf[piece.at.clone()]).await {
            Ok(()) if shared.held.is_still(piece.key, &located) => {
                if piece.key.region == Region::Data {
                    shared.held.touch(piece.key, &located);
                }
                true
            }
            Ok(()) => false,
            Err(error) => {
                shared.read_failed(piece.key, &located, &error);
                false
            }
        }
    }

    fn hit(&self, region: Region) {
        if region == Region::Data {
            add(&self.shared.counters.chunk_hits, 1);
        }
    }
}

fn copy(bytes: &[u8], piece: &Piece, buf: &mut [u8]) {
    let length = piece.at.len();
    buf[piece.at.clone()].copy_from_slice(&bytes[piece.from..piece.from + length]);
}

fn closed() -> BlockError {
    BlockError::Unavailable {
        what: "the cache is being closed".into(),
    }
}

/// The image's data.
pub(super) struct BaseDevice {
    cache: Arc<ChunkCache>,
    reader: Reader,
}

impl BaseDevice {
    pub(super) fn new(cache: Arc<ChunkCache>, reader: Reader) -> Self {
        Self { cache, reader }
    }
}

impl BlockDevice for BaseDevice {
    fn geometry(&self) -> Geometry {
        geometry(self.cache.shared.content.bytes, true)
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> IoFuture<'a, ()> {
        let bytes = buf.len() as u64;
        if let Err(error) = self.check_range(offset, bytes) {
            return blocking::ready(Err(error));
        }
        if bytes == 0 {
            return blocking::ready(Ok(()));
        }
        let shared: &Shared = &self.cache.shared;
        shared.counters.read_by(self.reader, bytes);
        if self.reader == Reader::Guest {
            shared.access.record(offset, bytes);
        }
        let chunk = u64::from(shared.content.chunk_bytes);
        let (first, last) = (offset / chunk, (offset + bytes - 1) / chunk);
        if shared.held.read_now(Region::Data, chunk, offset, buf) {
            add(&shared.counters.chunk_hits, last - first + 1);
            return blocking::ready(Ok(()));
        }
        Box::pin(async move {
            let begun = Instant::now();
            let result = self.cache.read_pieces(Region::Data, chunk, offset, buf).await;
            self.cache.shared.counters.stalled(begun.elapsed());
            result
        })
    }

    fn write<'a>(&'a self, _offset: u64, _data: &'a [u8]) -> IoFuture<'a, ()> {
        blocking::ready(Err(BlockError::ReadOnly))
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        blocking::ready(Ok(()))
    }

    fn discard(&self, _offset: u64, _bytes: u64) -> IoFuture<'_, ()> {
        blocking::ready(Err(BlockError::ReadOnly))
    }

    /// A hole is told where a checked hash block is at hand and says zeroes; nothing is fetched for it.
    fn extent(&self, offset: u64, bytes: u64) -> IoFuture<'_, Extent> {
        if let Err(error) = self.check_range(offset, bytes) {
            return blocking::ready(Err(error));
        }
        blocking::ready(Ok(self.cache.shared.extent_now(offset, bytes)))
    }
}

impl Shared {
    /// The superblock, or a checked hash block that is at hand.
    fn made_or_remembered(&self, key: Key) -> Option<bytes::Bytes> {
        match key.region {
            Region::Hash if key.index == SUPERBLOCK => Some(self.superblock.clone()),
            Region::Hash => self.hash_block_now(key.index),
            Region::Data => None,
        }
    }

    fn extent_now(&self, offset: u64, bytes: u64) -> Extent {
        let mut held: Option<(u64, bytes::Bytes)> = None;
        let mut state_of = |block: u64| -> Option<Provisioning> {
            let digest = match self.layout.parent_of_data(block) {
                Parent::Root => self.content.digest,
                Parent::Slot { block: number, slot } => {
                    if held.as_ref().is_none_or(|(same, _)| *same != number) {
                        held = Some((number, self.hash_block_now(number)?));
                    }
                    digest_in(&held.as_ref()?.1, slot)?
                }
            };
            Some(match digest == zero_digest() {
                true => Provisioning::Hole,
                false => Provisioning::Mapped,
            })
        };
        let end = offset + bytes.max(512);
        let mut block = offset / BLOCK;
        let Some(state) = state_of(block) else {
            return Extent {
                bytes: end - offset,
                state: Provisioning::Mapped,
            };
        };
        while (block + 1) * BLOCK < end && state_of(block + 1) == Some(state) {
            block += 1;
        }
        Extent {
            bytes: end.min((block + 1) * BLOCK) - offset,
            state,
        }
    }
}

/// The image's superblock and hash tree.
pub(super) struct HashDevice {
    cache: Arc<ChunkCache>,
}

impl HashDevice {
    pub(super) fn new(cache: Arc<ChunkCache>) -> Self {
        Self { cache }
    }
}

impl BlockDevice for HashDevice {
    fn geometry(&self) -> Geometry {
        geometry(self.cache.shared.layout.hash_bytes(), false)
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> IoFuture<'a, ()> {
        let bytes = buf.len() as u64;
        if let Err(error) = self.check_range(offset, bytes) {
            return blocking::ready(Err(error));
        }
        if bytes == 0 {
            return blocking::ready(Ok(()));
        }
        let shared = &self.cache.shared;
        add(&shared.counters.hash_read_bytes, bytes);
        if offset / BLOCK != SUPERBLOCK && shared.held.read_now(Region::Hash, BLOCK, offset, buf) {
            return blocking::ready(Ok(()));
        }
        Box::pin(self.cache.read_pieces(Region::Hash, BLOCK, offset, buf))
    }

    fn write<'a>(&'a self, _offset: u64, _data: &'a [u8]) -> IoFuture<'a, ()> {
        blocking::ready(Err(BlockError::ReadOnly))
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        blocking::ready(Ok(()))
    }

    fn discard(&self, _offset: u64, _bytes: u64) -> IoFuture<'_, ()> {
        blocking::ready(Err(BlockError::ReadOnly))
    }

    fn extent(&self, offset: u64, bytes: u64) -> IoFuture<'_, Extent> {
        blocking::ready(self.check_range(offset, bytes).map(|()| Extent {
            bytes: bytes.max(512),
            state: Provisioning::Mapped,
        }))
    }
}
