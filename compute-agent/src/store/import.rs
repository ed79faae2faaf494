//! Writing an image as it comes, with its hash tree.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::mpsc;
use treeboot_block::storage::{FileStorage, OpenMode, Storage};
use treeboot_block::verity::{VerityBuilder, VerityLayout};
use treeboot_types::{Digest, IscsiUrl, VERITY_BLOCK_BYTES};

use super::shared::{Below, MAX_DEPTH, Patching, depth};
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
    /// What it is a new version of: what no part says is as there.
    pub base: Option<BaseImage>,
}

/// An image in the same store that a new version is made of.
#[derive(Debug, Clone)]
pub struct BaseImage {
    /// Which.
    pub digest: Digest,
    /// Whether what is alike is kept once, or else copied.
    pub share: bool,
}

/// Some of the data. Parts grow; what lies between them is a hole, or the base's, and then parts are whole blocks of 4096.
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
            base: None,
        },
    };
    let layout = VerityLayout::new(header.bytes);
    let open = |name: &str, bytes: u64| {
        let path = dir.join(name);
        FileStorage::open(&path, OpenMode::CreateNew)
            .and_then(|file| file.set_len(bytes).map(|()| file))
            .map_err(StoreError::io(image, &path, "made"))
    };
    let full = |doing| StoreError::io(image, store, doing);
    let hash = open(treeboot_block::cache::HASH_FILE, layout.hash_bytes())?;
    let data = || open(treeboot_block::cache::DATA_FILE, layout.padded_bytes());
    let mut base = None;
    let (data, hash): (Option<Arc<dyn Storage>>, Arc<dyn Storage>) = match &header.base {
        Some(of) => {
            let (below, patching) = begin(store, header, of, data()?, hash)?;
            let halves = (patching.data.clone(), patching.hash.clone());
            base = Some((of, below, patching));
            (Some(halves.0), halves.1)
        }
        None if header.adopted_from.is_empty() => (Some(Arc::new(data()?)), Arc::new(hash)),
        None => (None, Arc::new(hash)),
    };
    let mut builder = VerityBuilder::new(layout, &*hash);
    let below = base.as_ref().map(|(_, below, _)| below);
    let skip = |builder: &mut VerityBuilder<'_>, bytes: u64| match below {
        None => builder.skip_zeroes(bytes),
        Some(below) => below.digests(
            builder,
            builder.done_bytes() / BLOCK as u64,
            bytes.div_ceil(BLOCK as u64),
        ),
    };
    let grain = if below.is_some() { BLOCK as u64 } else { 512 };
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
        let whole =
            bytes.is_multiple_of(grain) || bytes.is_multiple_of(512) && part.offset + bytes == header.bytes;
        if !fits || !part.offset.is_multiple_of(grain) || !whole {
            return Err(StoreError::Part {
                image: header.image.clone(),
                offset: part.offset,
                bytes,
                done,
                total: header.bytes,
            });
        }
        skip(&mut builder, part.offset - done).map_err(full("written"))?;
        builder.update(&part.data).map_err(full("written"))?;
        match &data {
            Some(data) if below.is_some() => {
                data.write_at(part.offset, &part.data).map_err(full("written"))?
            }
            Some(data) => {
                written.manifest.allocated_bytes += write_sparse(&**data, &part).map_err(full("written"))?;
            }
            None => written.manifest.allocated_bytes += bytes,
        }
    }
    let rest = header.bytes - builder.done_bytes();
    skip(&mut builder, rest).map_err(full("written"))?;
    written.manifest.digest = builder.finish().map_err(full("written"))?;
    if let Some((of, below, patching)) = &base {
        written.manifest.allocated_bytes = patching.own_bytes();
        let shared = of.share && depth(&below.dir) < MAX_DEPTH;
        let shared = shared && patching.share(&dir, below).map_err(full("linked"))?;
        if shared {
            written.manifest.base = Some(of.digest);
        } else {
            patching.fill(below).map_err(full("written"))?;
            written.manifest.allocated_bytes = data_bytes(&dir).map_err(full("read"))?;
        }
    }
    if let Some(data) = &data {
        data.sync().map_err(full("synced"))?;
    }
    hash.sync().map_err(full("synced"))?;
    Ok(written)
}

/// Opens what a new version is made of, and checks that it is what it was.
fn begin(
    store: &Path,
    header: &ImportHeader,
    of: &BaseImage,
    data: FileStorage,
    hash: FileStorage,
) -> Result<(Below, Patching), StoreError> {
    let dir = store.join(of.digest.to_string());
    let io = |doing| StoreError::io(&header.image, &dir, doing);
    let base_bytes = Manifest::load(&dir)?.bytes;
    if base_bytes != header.bytes {
        return Err(StoreError::OtherSize {
            image: header.image.clone(),
            bytes: header.bytes,
            base_bytes,
        });
    }
    let below = Below::open(&dir, of.digest, base_bytes).map_err(io("read"))?;
    let patching = below.patch(data, hash);
    if !below.is_sound(&patching).map_err(io("read"))? {
        return Err(StoreError::Damaged {
            path: dir.clone(),
            why: "its hash tree is not that of its digest".into(),
        });
    }
    Ok((below, patching))
}

/// Bytes on disk of a directory's data.
pub(crate) fn data_bytes(dir: &Path) -> std::io::Result<u64> {
    let path = dir.join(treeboot_block::cache::DATA_FILE);
    FileStorage::open(&path, OpenMode::Beside)?.allocated_bytes()
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
