//! Versions of an image that keep only what differs from the version that they were made of.
//!
//! Such a directory has, beside its sparse `data` and `hash`, the file `own`, which says which blocks of them are its own, and the
//! directory `base`: hard links to the files of the version below, with its `own` and its `base` where it has them. So a version
//! stands by itself whatever becomes of the one below, and bytes that two versions share are on the disk once. Which block is right is not for this
//! file to say: the cache checks all of them against the hash tree.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use treeboot_block::cache::{CacheError, CacheFiles, ChunkCache, DATA_FILE, HASH_FILE};
use treeboot_block::storage::{FileStorage, OpenMode, OwnBlocks, PATCH_BLOCK, Patched, Storage};
use treeboot_block::verity::{VerityBuilder, VerityLayout};
use treeboot_block::{CacheOptions, ChunkSource, ImageContent, Provisioning};
use treeboot_types::Digest;

/// Which blocks are a version's own.
const OWN_FILE: &str = "own";
/// Links to the version below.
const BASE_DIR: &str = "base";
/// How `own` begins.
const MAGIC: [u8; 8] = *b"TBOWN\0\0\x01";
/// Versions under one another; one that would be deeper keeps all of its blocks.
pub(super) const MAX_DEPTH: usize = if cfg!(test) { 6 } else { 32 };
/// Bytes of digests that are read at once.
const DIGESTS_BYTES: u64 = 256 << 10;
const DIGEST_BYTES: u64 = 32;

/// Data and hash tree of an image in the store, however many versions it stands on.
pub(super) struct Halves {
    pub(super) data: Arc<dyn Storage>,
    pub(super) hash: Arc<dyn Storage>,
}

/// Which blocks of both halves are a version's own.
struct Own {
    data: OwnBlocks,
    hash: OwnBlocks,
}

impl Own {
    fn to_bytes(data: &OwnBlocks, hash: &OwnBlocks) -> Vec<u8> {
        let (data, hash) = (data.to_bytes(), hash.to_bytes());
        let mut bytes = MAGIC.to_vec();
        bytes.extend((data.len() as u64).to_le_bytes());
        bytes.extend(data);
        bytes.extend(hash);
        let checksum = crc32c::crc32c(&bytes);
        bytes.extend(checksum.to_le_bytes());
        bytes
    }

    fn parse(bytes: &[u8], data_bytes: u64, hash_bytes: u64) -> Option<Self> {
        let (body, checksum) = bytes.split_last_chunk::<4>()?;
        if crc32c::crc32c(body) != u32::from_le_bytes(*checksum) {
            return None;
        }
        let body = body.strip_prefix(&MAGIC)?;
        let (length, maps) = body.split_first_chunk::<8>()?;
        let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
        let (data, hash) = maps.split_at_checked(length)?;
        Some(Self {
            data: OwnBlocks::from_bytes(data_bytes, data)?,
            hash: OwnBlocks::from_bytes(hash_bytes, hash)?,
        })
    }

    /// `None` where the version has all its blocks.
    fn load(dir: &Path, data_bytes: u64, hash_bytes: u64) -> io::Result<Option<Self>> {
        let bytes = match std::fs::read(dir.join(OWN_FILE)) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let damaged = || {
            let why = format!("{OWN_FILE} is damaged; import the image again");
            io::Error::new(io::ErrorKind::InvalidData, why)
        };
        Self::parse(&bytes, data_bytes, hash_bytes)
            .map(Some)
            .ok_or_else(damaged)
    }
}

/// Whether a directory of the store shares blocks with others.
pub(crate) fn shares(dir: &Path) -> bool {
    dir.join(OWN_FILE).exists()
}

/// How many versions lie under one.
pub(super) fn depth(dir: &Path) -> usize {
    let mut dir = dir.to_owned();
    let mut depth = 0;
    while shares(&dir) && depth < MAX_DEPTH {
        dir.push(BASE_DIR);
        depth += 1;
    }
    depth
}

impl Halves {
    /// `mode` is for the files of this version; those below are nobody's to write.
    pub(super) fn open(dir: &Path, mode: OpenMode) -> io::Result<Self> {
        Self::open_at(dir, mode, 0)
    }

    fn open_at(dir: &Path, mode: OpenMode, depth: usize) -> io::Result<Self> {
        let file = |name: &str| -> io::Result<(Arc<dyn Storage>, u64)> {
            let file = FileStorage::open(&dir.join(name), mode)?;
            let bytes = file.len()?;
            Ok((Arc::new(file), bytes))
        };
        let ((data, data_bytes), (hash, hash_bytes)) = (file(DATA_FILE)?, file(HASH_FILE)?);
        let Some(own) = Own::load(dir, data_bytes, hash_bytes)? else {
            return Ok(Self { data, hash });
        };
        if depth >= MAX_DEPTH {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "versions without end"));
        }
        let below = Self::open_at(&dir.join(BASE_DIR), OpenMode::Beside, depth + 1)?;
        Ok(Self {
            data: Arc::new(Patched::sealed(data, own.data, below.data)),
            hash: Arc::new(Patched::sealed(hash, own.hash, below.hash)),
        })
    }
}

/// Opens what is in the store; errors as those of [`ChunkCache::open`].
pub(crate) fn open(
    dir: &Path,
    image: ImageContent,
    source: Arc<dyn ChunkSource>,
    options: CacheOptions,
) -> Result<Arc<ChunkCache>, CacheError> {
    if !shares(dir) {
        return ChunkCache::open(dir, image, source, options);
    }
    let path = dir.to_owned();
    let halves = Halves::open(dir, OpenMode::ReadWrite).map_err(|source| match source.kind() {
        io::ErrorKind::WouldBlock => CacheError::InUse { path },
        _ => CacheError::Io { path, source },
    })?;
    let files = CacheFiles {
        directory: dir.to_owned(),
        data: halves.data,
        hash: halves.hash,
        present: None,
    };
    ChunkCache::open_files(files, image, source, options)
}

/// A version that a new one is made of.
pub(super) struct Below {
    pub(super) dir: PathBuf,
    digest: Digest,
    layout: VerityLayout,
    halves: Halves,
}

/// A new version in the making: what is written into it is compared with the one below.
pub(super) struct Patching {
    pub(super) data: Arc<Patched>,
    pub(super) hash: Arc<Patched>,
    own: (Arc<dyn Storage>, Arc<dyn Storage>),
}

impl Below {
    /// # Errors
    /// The operating system's.
    pub(super) fn open(dir: &Path, digest: Digest, bytes: u64) -> io::Result<Self> {
        Ok(Self {
            dir: dir.to_owned(),
            digest,
            layout: VerityLayout::new(bytes),
            halves: Halves::open(dir, OpenMode::Beside)?,
        })
    }

    /// Over it, with empty files of the lengths of both halves.
    pub(super) fn patch(&self, data: FileStorage, hash: FileStorage) -> Patching {
        let own: (Arc<dyn Storage>, Arc<dyn Storage>) = (Arc::new(data), Arc::new(hash));
        let begin = |own: &Arc<dyn Storage>, below: &Arc<dyn Storage>, bytes| {
            Arc::new(Patched::begin(Arc::clone(own), Arc::clone(below), bytes))
        };
        Patching {
            data: begin(&own.0, &self.halves.data, self.layout.padded_bytes()),
            hash: begin(&own.1, &self.halves.hash, self.layout.hash_bytes()),
            own,
        }
    }

    /// Hands the digests of `count` blocks of data to a tree.
    pub(super) fn digests(&self, tree: &mut VerityBuilder<'_>, first: u64, count: u64) -> io::Result<()> {
        let Some(at) = self.layout.data_digests() else {
            return match count {
                0 => Ok(()),
                _ => tree.update_digests(&[self.digest.0]),
            };
        };
        let (mut offset, end) = (at + first * DIGEST_BYTES, at + (first + count) * DIGEST_BYTES);
        let mut buffer = Vec::new();
        while offset < end {
            let now = (end - offset).min(DIGESTS_BYTES);
            buffer.resize(now as usize, 0);
            self.halves.hash.read_at(offset, &mut buffer)?;
            tree.update_digests(buffer.as_chunks().0)?;
            offset += now;
        }
        Ok(())
    }

    /// Whether its tree is what its digest says: a new version takes over most of it. Written through `patching`, so that what is
    /// already there is not written again.
    pub(super) fn is_sound(&self, patching: &Patching) -> io::Result<bool> {
        let mut tree = VerityBuilder::new(self.layout, &*patching.hash);
        self.digests(&mut tree, 0, self.layout.data_blocks())?;
        Ok(tree.finish()? == self.digest && patching.hash.own_blocks().count() == 0)
    }
}

impl Patching {
    /// Bytes that are its own.
    pub(super) fn own_bytes(&self) -> u64 {
        self.data.own_blocks().count() * PATCH_BLOCK
    }

    /// Makes the directory one that shares with the version below. `false`: this file system has no links across these
    /// directories, and nothing has changed.
    pub(super) fn share(&self, dir: &Path, below: &Below) -> io::Result<bool> {
        let base = dir.join(BASE_DIR);
        if let Err(error) = link(&below.dir, &base, 0) {
            std::fs::remove_dir_all(&base)?;
            return match error.kind() {
                io::ErrorKind::Unsupported
                | io::ErrorKind::CrossesDevices
                | io::ErrorKind::TooManyLinks
                | io::ErrorKind::PermissionDenied => Ok(false),
                _ => Err(error),
            };
        }
        let own = Own::to_bytes(self.data.own_blocks(), self.hash.own_blocks());
        let mut file = File::create_new(dir.join(OWN_FILE))?;
        file.write_all(&own)?;
        file.sync_all()?;
        Ok(true)
    }

    /// Takes a copy of everything that is not its own.
    pub(super) fn fill(&self, below: &Below) -> io::Result<()> {
        let halves = [
            (&self.own.0, &self.data, &below.halves.data),
            (&self.own.1, &self.hash, &below.halves.hash),
        ];
        for (own, patched, below) in halves {
            let bytes = own.len()?;
            copy(&**below, patched.own_blocks(), bytes, |offset, data| {
                own.write_at(offset, data)
            })?;
        }
        Ok(())
    }
}

/// Links the files of a version, and of those below it.
fn link(from: &Path, to: &Path, depth: usize) -> io::Result<()> {
    std::fs::create_dir(to)?;
    for name in [DATA_FILE, HASH_FILE] {
        std::fs::hard_link(from.join(name), to.join(name))?;
    }
    if shares(from) && depth < MAX_DEPTH {
        std::fs::hard_link(from.join(OWN_FILE), to.join(OWN_FILE))?;
        link(&from.join(BASE_DIR), &to.join(BASE_DIR), depth + 1)?;
    }
    File::open(to)?.sync_all()
}

/// Gives `write` each block that is not an own one and no hole.
fn copy(
    below: &dyn Storage,
    own: &OwnBlocks,
    bytes: u64,
    mut write: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut block = [0; PATCH_BLOCK as usize];
    let mut offset = 0;
    while offset < bytes {
        let extent = below.extent(offset, bytes - offset)?;
        let hole = extent.bytes / PATCH_BLOCK * PATCH_BLOCK;
        if extent.state == Provisioning::Hole && hole > 0 {
            offset += hole;
            continue;
        }
        if !own.has(offset / PATCH_BLOCK) {
            below.read_at(offset, &mut block)?;
            write(offset, &block)?;
        }
        offset += PATCH_BLOCK;
    }
    Ok(())
}

/// Gives a version that shares blocks a copy of all of them, also while it is served. Whether it shared any. What is damaged stays
/// so, and is an error to whoever reads it. `progress` hears done and total bytes.
///
/// # Errors
/// The operating system's; it goes on sharing then.
pub(crate) fn flatten(dir: &Path, mut progress: impl FnMut(u64, u64)) -> io::Result<bool> {
    let lengths = |name: &str| Ok::<_, io::Error>(std::fs::metadata(dir.join(name))?.len());
    let Some(own) = Own::load(dir, lengths(DATA_FILE)?, lengths(HASH_FILE)?)? else {
        // What a flattening that was cut off at its end left.
        return remove_base(dir).map(|()| false);
    };
    let halves = Halves::open(dir, OpenMode::Beside)?;
    for (name, own, half) in [
        (DATA_FILE, &own.data, &halves.data),
        (HASH_FILE, &own.hash, &halves.hash),
    ] {
        // Whoever serves it holds the file, and never reads there what is not an own block.
        let file = File::options().write(true).open(dir.join(name))?;
        let bytes = half.len()?;
        copy(&**half, own, bytes, |offset, data| {
            file.write_all_at(data, offset)?;
            if name == DATA_FILE {
                progress(offset, bytes);
            }
            Ok(())
        })?;
        file.sync_all()?;
    }
    // From here on it counts as whole.
    std::fs::remove_file(dir.join(OWN_FILE))?;
    File::open(dir)?.sync_all()?;
    remove_base(dir)?;
    Ok(true)
}

/// Removes the links of a version that shares no more.
pub(super) fn sweep(dir: &Path) -> io::Result<()> {
    if shares(dir) { Ok(()) } else { remove_base(dir) }
}

fn remove_base(dir: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(dir.join(BASE_DIR)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
