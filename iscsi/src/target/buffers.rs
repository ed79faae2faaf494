//! A connection's buffers: bytes that came, bytes that go, and buffers kept for the next reply.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::wire::Wire;

/// What an idle connection keeps for input: more than 80 commands at once. It is most of what an idle session costs.
const INPUT_BYTES: usize = 4 * 1024;
/// Input buffers beyond this are given back once they are empty.
const INPUT_KEEP_BYTES: usize = 64 * 1024;

/// Bytes that came and are not yet parsed.
#[derive(Debug)]
pub(super) struct Input {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
    need: usize,
}

impl Input {
    pub(super) fn new() -> Self {
        Self {
            bytes: Vec::new(),
            start: 0,
            end: 0,
            need: 1,
        }
    }

    pub(super) fn unparsed(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    pub(super) fn consume(&mut self, bytes: usize) {
        self.start += bytes;
        debug_assert!(self.start <= self.end);
        self.need = 1;
    }

    /// Nothing can be parsed before `need` bytes are there.
    pub(super) fn require(&mut self, need: usize) {
        self.need = need;
    }

    /// Reads once from the socket; 0 is the end of the stream.
    pub(super) fn poll_fill(
        &mut self,
        socket: &mut Wire,
        cx: &mut Context<'_>,
    ) -> Poll<std::io::Result<usize>> {
        self.make_room();
        let mut free = ReadBuf::new(&mut self.bytes[self.end..]);
        ready!(Pin::new(socket).poll_read(cx, &mut free))?;
        let bytes = free.filled().len();
        self.end += bytes;
        Poll::Ready(Ok(bytes))
    }

    /// Gives memory back where nothing waits in it; the next read takes what it needs.
    pub(super) fn rest(&mut self) {
        // A header is what an idle connection waits for.
        if self.start == self.end && self.need <= INPUT_BYTES {
            *self = Self::new();
        }
    }

    fn make_room(&mut self) {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            if self.bytes.len() > INPUT_KEEP_BYTES && self.need <= INPUT_BYTES {
                self.bytes = Vec::new();
            }
        }
        let wanted = self.need.max(INPUT_BYTES);
        if self.start > 0 && self.bytes.len() - self.start < wanted {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        if self.bytes.len() < wanted {
            // A PDU with data: room for it and for what follows it.
            self.bytes
                .resize(wanted + if wanted > INPUT_BYTES { INPUT_BYTES } else { 0 }, 0);
        }
        if self.end == self.bytes.len() {
            self.bytes.resize(self.bytes.len() + INPUT_BYTES, 0);
        }
    }
}

/// A buffer whose memory stays initialised when it is used again, so that nothing is cleared for a read.
#[derive(Debug, Default)]
pub(super) struct Block {
    bytes: Vec<u8>,
    end: usize,
}

impl Block {
    pub(super) fn as_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.end]
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.end]
    }
}

impl From<Vec<u8>> for Block {
    fn from(bytes: Vec<u8>) -> Self {
        Self {
            end: bytes.len(),
            bytes,
        }
    }
}

/// Buffers kept by a connection in all, in bytes: a deep queue of 4 KiB reads, or two large pieces.
const POOL_BYTES: usize = 512 * 1024;
/// Buffers of this size or less are of the small kind.
const SMALL_BYTES: usize = 4096 + 64;

/// Buffers to use again, of two kinds so that a small reply does not hold a large one.
#[derive(Debug, Default)]
pub(super) struct Pool {
    small: Vec<Block>,
    large: Vec<Block>,
    bytes: usize,
}

impl Pool {
    /// A buffer of `bytes`, with any content.
    pub(super) fn take(&mut self, bytes: usize) -> Block {
        let kind = if bytes <= SMALL_BYTES {
            &mut self.small
        } else {
            &mut self.large
        };
        let mut block = kind.pop().unwrap_or_default();
        self.bytes -= block.bytes.len();
        if block.bytes.len() < bytes {
            let least = if bytes <= SMALL_BYTES { SMALL_BYTES } else { bytes };
            block.bytes.resize(least, 0);
        }
        block.end = bytes;
        block
    }

    pub(super) fn give(&mut self, block: Block) {
        let bytes = block.bytes.len();
        if bytes == 0 || self.bytes + bytes > POOL_BYTES {
            return;
        }
        self.bytes += bytes;
        let kind = if bytes <= SMALL_BYTES {
            &mut self.small
        } else {
            &mut self.large
        };
        kind.push(block);
    }
}

/// Slices handed to one `writev`.
const MAX_SLICES: usize = 64;

/// Bytes that go, in order.
#[derive(Debug, Default)]
pub(super) struct Output {
    queue: VecDeque<Block>,
    /// Bytes of the first that are gone.
    sent: usize,
    bytes: usize,
}

impl Output {
    pub(super) fn push(&mut self, block: Block) {
        self.bytes += block.end;
        self.queue.push_back(block);
    }

    /// Bytes that wait.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Writes what the socket takes; ready with the bytes written, 0 where nothing waits.
    pub(super) fn poll_flush(
        &mut self,
        socket: &mut Wire,
        pool: &mut Pool,
        cx: &mut Context<'_>,
    ) -> Poll<std::io::Result<usize>> {
        let written = match self.queue.len() {
            0 => return Poll::Ready(Ok(0)),
            1 => {
                let first = &self.queue[0];
                ready!(Pin::new(socket).poll_write(cx, &first.as_slice()[self.sent..]))?
            }
            _ => {
                let mut slices = [IoSlice::new(&[]); MAX_SLICES];
                let mut count = 0;
                for (slice, block) in slices.iter_mut().zip(&self.queue) {
                    let skip = if count == 0 { self.sent } else { 0 };
                    *slice = IoSlice::new(&block.as_slice()[skip..]);
                    count += 1;
                }
                ready!(Pin::new(socket).poll_write_vectored(cx, &slices[..count]))?
            }
        };
        if written == 0 {
            return Poll::Ready(Err(std::io::ErrorKind::WriteZero.into()));
        }
        self.bytes -= written;
        self.sent += written;
        while let Some(first) = self.queue.front()
            && self.sent >= first.end
        {
            self.sent -= first.end;
            if let Some(done) = self.queue.pop_front() {
                pool.give(done);
            }
        }
        Poll::Ready(Ok(written))
    }
}
