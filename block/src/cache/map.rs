//! Which chunks and hash blocks a cache directory holds: the file `present`.
//!
//! One 4 KiB header, then one bit for each chunk of data, then one for each block of the hash device (each bitmap
//! begins on a 4 KiB boundary; little-endian 64-bit words). A bit is set after the bytes were written, and nothing
//! is synced: the file is a hint. Whatever it says, bytes are checked against the hash tree before their first use
//! in a process, so that a bit that a crash left behind costs a fetch and never a wrong byte.

use std::io;
use std::path::Path;
use std::sync::Arc;

use treeboot_types::Digest;

use super::bitmap::Bitmap;
use super::{CacheError, ImageContent, Region};
use crate::storage::Storage;
use crate::verity::{VerityLayout, sha256};

const MAGIC: &[u8; 8] = b"TBCACHE\0";
/// The format that this code reads and writes.
const VERSION: u32 = 1;
const HEADER_BYTES: u64 = 4096;
/// Bytes of the header that are used, before the checksum: magic, version, chunk, digest, size.
const USED: usize = 8 + 4 + 4 + 32 + 8;

/// The open file, for writing bits.
pub(super) struct PresentMap {
    storage: Arc<dyn Storage>,
    hash_offset: u64,
    bytes: u64,
}

/// What the file said when it was opened.
pub(super) struct Present {
    pub(super) data: Bitmap,
    pub(super) hash: Bitmap,
}

impl PresentMap {
    /// Reads the file, or begins it where it is empty or damaged: then nothing is present.
    pub(super) fn open(
        storage: Arc<dyn Storage>,
        path: &Path,
        content: &ImageContent,
        layout: &VerityLayout,
    ) -> Result<(Self, Present), CacheError> {
        let io = |source| CacheError::Io {
            path: path.into(),
            source,
        };
        let chunks = content.chunks();
        let (data_bytes, hash_bytes) = bitmap_bytes(content, layout);
        let map = Self {
            hash_offset: HEADER_BYTES + data_bytes,
            bytes: Self::bytes_for(content, layout),
            storage,
        };
        let expected = header(content);
        let mut found = [0; USED + 32];
        map.storage.read_at(0, &mut found).map_err(io)?;
        if found[..] != expected[..] {
            check_foreign(&found, path, content)?;
            if map.storage.len().map_err(io)? > 0 {
                tracing::warn!(path = %path.display(), "the cache's map is damaged; what it told of is fetched again");
            }
            // Empty before it has a header again, so that no old bit comes back after a crash between the two.
            map.storage.set_len(0).map_err(io)?;
            map.storage.set_len(map.bytes).map_err(io)?;
            map.storage.write_at(0, &expected).map_err(io)?;
        }
        let read = |offset, bytes: u64| -> io::Result<Vec<u8>> {
            let mut all = vec![0; bytes as usize];
            map.storage.read_at(offset, &mut all)?;
            Ok(all)
        };
        let data = read(HEADER_BYTES, data_bytes).map_err(io)?;
        let hash = read(map.hash_offset, hash_bytes).map_err(io)?;
        let present = Present {
            data: Bitmap::from_bytes(chunks, &data),
            hash: Bitmap::from_bytes(layout.hash_blocks(), &hash),
        };
        Ok((map, present))
    }

    /// The length of the file.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The length of an image's file.
    pub(super) fn bytes_for(content: &ImageContent, layout: &VerityLayout) -> u64 {
        let (data, hash) = bitmap_bytes(content, layout);
        HEADER_BYTES + data + hash
    }

    /// Which image a file is of; `None` where it is not whole, or of another format.
    pub(super) fn content(storage: &dyn Storage) -> io::Result<Option<ImageContent>> {
        let mut found = [0; USED + 32];
        storage.read_at(0, &mut found)?;
        let (_, rest) = found.split_at(8 + 4);
        let (chunk_bytes, rest) = rest.split_at(4);
        let (digest, rest) = rest.split_at(32);
        let parsed = (|| {
            Some(ImageContent {
                digest: Digest(digest.try_into().ok()?),
                bytes: u64::from_le_bytes(*rest.first_chunk()?),
                chunk_bytes: u32::from_le_bytes(*chunk_bytes.first_chunk()?),
            })
        })();
        Ok(parsed.filter(|content| found[..] == header(content)[..]))
    }

    /// Writes the word of `bitmap` that holds `bit`.
    pub(super) fn write(&self, region: Region, bitmap: &Bitmap, bit: u64) -> io::Result<()> {
        let start = match region {
            Region::Data => HEADER_BYTES,
            Region::Hash => self.hash_offset,
        };
        let (offset, word) = bitmap.word_of(bit);
        self.storage.write_at(start + offset, &word)
    }
}

/// How long the two bitmaps are.
fn bitmap_bytes(content: &ImageContent, layout: &VerityLayout) -> (u64, u64) {
    let padded = |bits: u64| bits.div_ceil(8).next_multiple_of(4096);
    (padded(content.chunks()), padded(layout.hash_blocks()))
}

fn header(content: &ImageContent) -> [u8; USED + 32] {
    let mut header = [0; USED + 32];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, MAGIC);
    put(8, &VERSION.to_le_bytes());
    put(12, &content.chunk_bytes.to_le_bytes());
    put(16, &content.digest.0);
    put(48, &content.bytes.to_le_bytes());
    let checksum = sha256(&header[..USED]);
    header[USED..].copy_from_slice(&checksum.0);
    header
}

/// A whole header that is not ours is no damage: whoever gave the path erred.
fn check_foreign(found: &[u8], path: &Path, content: &ImageContent) -> Result<(), CacheError> {
    if found[..8] != MAGIC[..] || sha256(&found[..USED]).0 != found[USED..] {
        return Ok(());
    }
    let version = u32::from_le_bytes([found[8], found[9], found[10], found[11]]);
    Err(if version == VERSION {
        CacheError::OtherImage {
            path: path.into(),
            expected: *content,
        }
    } else {
        CacheError::Version {
            path: path.into(),
            found: version,
            known: VERSION,
        }
    })
}
