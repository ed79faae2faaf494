//! Writing an image as it comes, with its hash tree.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use tokio::sync::mpsc;
use treeboot_block::storage::{FileStorage, OpenMode, Storage};
use treeboot_block::verity::{VerityBuilder, VerityLayout};
use treeboot_types::{Digest, IscsiUrl, VERITY_BLOCK_BYTES};

use super::{MAX_IMAGE_BYTES, Manifest, StoreError, UNFINISHED};

const BLOCK: usize = VERITY_BLOCK_BYTES as usize;
/// Bounds of a chunk: a block of the tree, and what one iSCSI read carries without trouble.
const CHUNK_BYTES: (u32, u32) = (VERITY_BLOCK_BYTES, 4 << 20);

/// What is known before the data comes.
#[derive(Debug, Clone)]
pub struct ImportHeader {
    /// Its name, for people.
    pub image: String,
    /// Size in bytes.
    pub bytes: u64,
    /// The unit of caching in bytes.
    pub chunk_bytes: u32,
    /// Where the data stays, for an adopted image, whose data is hashed and not written.
    pub adopted_from: Vec<IscsiUrl>,
}

/// Some of the data. Parts grow; what lies between them is a hole.
#[derive(Debug, Clone)]
pub struct ImportPart {
    /// Where it begins.
    pub offset: u64,
    /// The bytes.
    pub data: Bytes,
}

/// A part, or why no more come.
pub type SentPart = Result<ImportPart, String>;

/// An image that is written and not yet in its place. Dropping it removes it.
#[derive(Debug)]
pub struct Written {
    dir: PathBuf,
    /// What was written.
    pub manifest: Manifest,
}

impl ImportHeader {
    /// Checks what can be known without the data.
    ///
    /// # Errors
    /// The size or the chunk is none.
    pub fn check(&self) -> Result<(), StoreError> {
        if self.bytes == 0 || !self.bytes.is_multiple_of(512) || self.bytes > MAX_IMAGE_BYTES {
            return Err(StoreError::Size {
                image: self.image.clone(),
                bytes: self.bytes,
            });
        }
        let chunk_bytes = self.chunk_bytes;
        if !chunk_bytes.is_power_of_two() || !(CHUNK_BYTES.0..=CHUNK_BYTES.1).contains(&chunk_bytes) {
            return Err(StoreError::Chunk { chunk_bytes });
        }
        Ok(())
    }
}

/// Writes an image into a hidden directory of `store`, until the parts end. Blocks; meant for a thread of its own.
///
/// # Errors
/// [`StoreError`]; nothing is left then.
pub fn write(
    store: &Path,
    header: &ImportHeader,
    mut parts: mpsc::Receiver<SentPart>,
) -> Result<Written, StoreError> {
    header.check()?;
    let image = header.image.as_str();
    let dir = store.join(format!("{UNFINISHED}{:016x}", rand::random::<u64>()));
    std::fs::create_dir(&dir).map_err(StoreError::io(image, &dir, "made"))?;
    let mut written = Written {
        dir: dir.clone(),
        manifest: Manifest {
            digest: Digest([0; 32]),
            bytes: header.bytes,
            chunk_bytes: header.chunk_bytes,
            allocated_bytes: 0,
            names: BTreeSet::new(),
            adopted_from: header.adopted_from.clone(),
        },
    };
    let layout = VerityLayout::new(header.bytes);
    let open = |name: &str, bytes: u64| {
        let path = dir.join(name);
        FileStorage::open(&path, OpenMode::CreateNew)
            .and_then(|file| file.set_len(bytes).map(|()| file))
            .map_err(StoreError::io(image, &path, "made"))
    };
    let hash = open(treeboot_block::cache::HASH_FILE, layout.hash_bytes())?;
    let data = if header.adopted_from.is_empty() {
        Some(open(treeboot_block::cache::DATA_FILE, layout.padded_bytes())?)
    } else {
        None
    };
    let full = |doing| StoreError::io(image, store, doing);
    let mut builder = VerityBuilder::new(layout, &hash);
    while let Some(part) = parts.blocking_recv() {
        let part = part.map_err(|why| StoreError::Interrupted {
            image: header.image.clone(),
            why,
        })?;
        let bytes = part.data.len() as u64;
        let done = builder.done_bytes();
        let fits = part
            .offset
            .checked_add(bytes)
            .is_some_and(|end| end <= header.bytes && part.offset >= done);
        if !fits || !part.offset.is_multiple_of(512) || !bytes.is_multiple_of(512) {
            return Err(StoreError::Part {
                image: header.image.clone(),
                offset: part.offset,
                bytes,
                done,
                total: header.bytes,
            });
        }
        builder.skip_zeroes(part.offset - done).map_err(full("written"))?;
        builder.update(&part.data).map_err(full("written"))?;
        if let Some(data) = &data {
            written.manifest.allocated_bytes += write_sparse(data, &part).map_err(full("written"))?;
        } else {
            written.manifest.allocated_bytes += bytes;
        }
    }
    let rest = header.bytes - builder.done_bytes();
    builder.skip_zeroes(rest).map_err(full("written"))?;
    written.manifest.digest = builder.finish().map_err(full("written"))?;
    if let Some(data) = &data {
        data.sync().map_err(full("synced"))?;
    }
    hash.sync().map_err(full("synced"))?;
    Ok(written)
}

/// Writes what is not zero, in runs, and returns how much that was.
fn write_sparse(data: &dyn Storage, part: &ImportPart) -> std::io::Result<u64> {
    let mut written = 0;
    // Blocks are those of the image, so that a part that begins in the middle of one leaves no ragged holes.
    let first = (BLOCK - (part.offset % BLOCK as u64) as usize) % BLOCK;
    let first = first.min(part.data.len());
    let (head, rest) = part.data.split_at(first);
    let blocks = std::iter::once(head)
        .chain(rest.chunks(BLOCK))
        .filter(|b| !b.is_empty());
    let mut at = 0;
    let mut run = None;
    for block in blocks {
        if block.iter().all(|&byte| byte == 0) {
            if let Some(begin) = run.take() {
                data.write_at(part.offset + begin as u64, &part.data[begin..at])?;
                written += (at - begin) as u64;
            }
        } else {
            run.get_or_insert(at);
        }
        at += block.len();
    }
    if let Some(begin) = run {
        data.write_at(part.offset + begin as u64, &part.data[begin..at])?;
        written += (at - begin) as u64;
    }
    Ok(written)
}

impl Written {
    /// Puts the image in its place in `store`. One that is there already stays as it is. Returns the directory.
    ///
    /// # Errors
    /// [`StoreError`]; nothing is left then.
    pub fn publish(mut self, store: &Path) -> Result<PathBuf, StoreError> {
        let digest = self.manifest.digest.to_string();
        let place = store.join(&digest);
        if Manifest::load(&place).is_ok() {
            return Ok(place);
        }
        self.manifest
            .save(&self.dir)
            .map_err(StoreError::io(&digest, &self.dir, "written"))?;
        std::fs::rename(&self.dir, &place).map_err(StoreError::io(&digest, &place, "put in its place"))?;
        // From here on there is nothing to remove.
        self.dir = PathBuf::new();
        std::fs::File::open(store)
            .and_then(|dir| dir.sync_all())
            .map_err(StoreError::io(&digest, store, "synced"))?;
        Ok(place)
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        if self.dir.as_os_str().is_empty() {
            return;
        }
        if let Err(error) = std::fs::remove_dir_all(&self.dir) {
            tracing::warn!(path = %self.dir.display(), %error, "an unfinished import is left; the next start removes it");
        }
    }
}
