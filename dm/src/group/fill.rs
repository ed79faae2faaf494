//! Filling: what VMs and children will want is brought in before they ask.
//!
//! A filler brings in chunk after chunk and knows which it has. The pace is the caller's: see [`super::Pace`]. Kind bcache:
//! a chunk is read through the cache, which keeps it, unless its allocator lags; the more slowly, the more is kept, and a
//! second round (after [`Filler::again`]) reads from the parents only what is still missing. Kind dm-cache: a chunk is read
//! from the verity device, once, and written through the cache as whole blocks.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range as Span;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use treeboot_types::Digest;

use super::error::{GroupError, io_error};
use super::label::node;
use super::open::Group;
use super::{BLOCK, Range};
use crate::bcache::Uuid;
use crate::{DeviceNumber, DmDevice, Mapper, Sectors};

/// How a content's file of filled chunks ends; before it stands the digest.
const SUFFIX: &str = ".filled";

/// Direct I/O takes memory at multiples of this on every device.
const ALIGNMENT: usize = 4096;

/// Brings a content into the cache.
#[derive(Debug)]
pub struct Filler {
    source: File,
    /// Kind dm-cache: where what was read is written.
    sink: Option<(File, Sectors)>,
    range: Range,
    life: Uuid,
    file: PathBuf,
    filled: Vec<u8>,
    buffer: Vec<u8>,
}

/// Why a chunk could not be brought in.
#[derive(Debug, thiserror::Error)]
pub enum FillError {
    /// The parents, or what lies between, gave no bytes or wrong ones.
    #[error("cannot read chunk {chunk}")]
    Read {
        /// The chunk.
        chunk: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The cache took no bytes.
    #[error("cannot write chunk {chunk} to the cache")]
    Write {
        /// The chunk.
        chunk: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Filler {
    /// Bytes of a chunk.
    pub const CHUNK_BYTES: u64 = BLOCK.0 * 512;

    pub(super) fn open(
        group: &Group,
        content: &Digest,
        range: Range,
        verity: DeviceNumber,
        through: Option<DeviceNumber>,
    ) -> Result<Self, GroupError> {
        let direct = OFlags::DIRECT.bits() as i32;
        let path = node(through.unwrap_or(verity));
        let source = OpenOptions::new()
            .read(true)
            .custom_flags(direct)
            .open(&path)
            .map_err(io_error("open", &path))?;
        let sink = if through.is_none() {
            let path = Mapper::path(&DmDevice::CacheGroup);
            let sink = OpenOptions::new().write(true).custom_flags(direct).open(&path);
            Some((sink.map_err(io_error("open", &path))?, range.start))
        } else {
            None
        };
        let file = filled_file(&group.folder, content);
        let life = group.life();
        let chunks = range.room.0 / BLOCK.0;
        let bytes = usize::try_from(chunks.div_ceil(8)).unwrap_or(0);
        Ok(Self {
            source,
            sink,
            range,
            life,
            filled: load(&file, life, bytes).unwrap_or_else(|| vec![0; bytes]),
            file,
            buffer: vec![0; BLOCK.0 as usize * 512 + ALIGNMENT],
        })
    }

    /// Chunks there are; the last may be shorter than the others.
    pub fn chunks(&self) -> u64 {
        self.range.room.0 / BLOCK.0
    }

    /// Chunks that were filled.
    pub fn filled(&self) -> u64 {
        (0..self.chunks()).filter(|&chunk| self.has(chunk)).count() as u64
    }

    /// Whether a chunk was filled. A full cache may have given it up since.
    pub fn has(&self, chunk: u64) -> bool {
        let (byte, bit) = place(chunk);
        self.filled.get(byte).is_some_and(|byte| byte & bit != 0)
    }

    /// The first chunk of `span` that was not filled.
    pub fn missing(&self, span: Span<u64>) -> Option<u64> {
        (span.start..span.end.min(self.chunks())).find(|&chunk| !self.has(chunk))
    }

    /// Brings a chunk in; gives the bytes that it took to, 0 where it was filled or is none of the content's.
    ///
    /// # Errors
    /// [`FillError`]; the chunk counts as not filled.
    pub fn fill(&mut self, chunk: u64) -> Result<u64, FillError> {
        if chunk >= self.chunks() || self.has(chunk) {
            return Ok(0);
        }
        let at = chunk * BLOCK.0;
        let sectors = BLOCK.0.min(self.range.length.0 - at);
        let whole = BLOCK.0 as usize * 512;
        let start = self.buffer.as_ptr().align_offset(ALIGNMENT);
        let aligned = &mut self.buffer[start..start + whole];
        let (content, behind) = aligned.split_at_mut(sectors as usize * 512);
        self.source
            .read_exact_at(content, at * 512)
            .map_err(|source| FillError::Read { chunk, source })?;
        if let Some((sink, begin)) = &self.sink {
            // Behind a content's end there are zeroes, up to a whole block: only whole blocks are taken in at once.
            behind.fill(0);
            sink.write_all_at(aligned, (begin.0 + at) * 512)
                .map_err(|source| FillError::Write { chunk, source })?;
        }
        let (byte, bit) = place(chunk);
        if let Some(byte) = self.filled.get_mut(byte) {
            *byte |= bit;
        }
        Ok(sectors * 512)
    }

    /// Begins another round: no chunk counts as filled.
    pub fn again(&mut self) {
        self.filled.fill(0);
    }

    /// Keeps what is filled for a later process. What is lost of it is filled again.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self) -> io::Result<()> {
        fs::write(&self.file, [self.life.0.as_slice(), &self.filled].concat())
    }
}

/// Byte and bit of a chunk.
fn place(chunk: u64) -> (usize, u8) {
    (usize::try_from(chunk / 8).unwrap_or(usize::MAX), 1 << (chunk % 8))
}

fn load(file: &Path, life: Uuid, bytes: usize) -> Option<Vec<u8>> {
    let saved = fs::read(file).ok()?;
    let filled = saved.strip_prefix(life.0.as_slice())?;
    (filled.len() == bytes).then(|| filled.to_vec())
}

fn filled_file(folder: &Path, content: &Digest) -> PathBuf {
    folder.join(format!("{content}{SUFFIX}"))
}

/// A content's chunks are no longer filled.
pub(super) fn forget(folder: &Path, content: &Digest) {
    // One that stays is of use to nobody: it holds the life of its cache.
    let _ = fs::remove_file(filled_file(folder, content));
}

/// No content's chunks are.
pub(super) fn forget_all(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().ends_with(SUFFIX) {
            let _ = fs::remove_file(entry.path());
        }
    }
}
