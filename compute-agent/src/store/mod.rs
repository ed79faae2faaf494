//! An origin's store: one directory an image, named by its content, in the format of the chunk cache, complete.
//!
//! An import is written into a hidden directory beside it, which becomes the image by one rename; whatever interrupts it
//! leaves nothing that counts, and the hidden directory is removed at once or at the next start.

mod import;
mod manifest;
mod shared;

use std::io;
use std::path::{Path, PathBuf};

use treeboot_types::ImageId;

pub(crate) use import::data_bytes;
pub use import::{BaseImage, ImportHeader, ImportPart, SentPart, Written, write};
pub use manifest::Manifest;
#[cfg(any(test, feature = "kernel-plane"))]
pub(crate) use shared::shares;
pub(crate) use shared::{flatten, open};

/// What a store directory holds besides the cache's files.
pub(crate) const MANIFEST: &str = "image.json";
/// How the directories of unfinished imports begin.
pub(crate) const UNFINISHED: &str = ".import-";

/// Largest image in bytes: 16 TiB. Beyond it the tree's levels and the maps' sizes were never tried.
pub const MAX_IMAGE_BYTES: u64 = 16 << 40;

/// Why an image was not taken into the store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The agent has no store.
    #[error(
        "host '{host}' holds no store; start its agent with --store DIR, or import at an origin (see `treeboot host list`)"
    )]
    NoStore {
        /// The host.
        host: String,
    },
    /// The size is none.
    #[error(
        "image {image} has {bytes} bytes; an image is a positive multiple of 512 bytes, at most {MAX_IMAGE_BYTES}"
    )]
    Size {
        /// The image.
        image: String,
        /// Its size.
        bytes: u64,
    },
    /// The chunk is none.
    #[error("{chunk_bytes} bytes are no chunk; give a power of two from 4096 to 4194304")]
    Chunk {
        /// What was asked.
        chunk_bytes: u32,
    },
    /// A part that is not where it should be.
    #[error(
        "the import of {image} sent {bytes} bytes at {offset}, but {done} of {total} bytes are done; parts must grow and be whole blocks of 512"
    )]
    Part {
        /// The image.
        image: String,
        /// Where.
        offset: u64,
        /// How many.
        bytes: u64,
        /// Up to where it was done.
        done: u64,
        /// The image's size.
        total: u64,
    },
    /// Whoever sent it went away.
    #[error("the import of {image} ended early ({why}); nothing was kept")]
    Interrupted {
        /// The image.
        image: String,
        /// What was seen.
        why: String,
    },
    /// No room.
    #[error("no space left in {} for image {image}; free some, nothing was kept", path.display())]
    NoSpace {
        /// The image.
        image: String,
        /// The store.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("{} cannot be {doing}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// A directory of the store that is not one.
    #[error("{} is not an image of the store: {why}; move it away or import the image again", path.display())]
    Damaged {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A new version of another size.
    #[error(
        "the new version of {image} has {bytes} bytes, and the image that it is made of has {base_bytes}"
    )]
    OtherSize {
        /// The image.
        image: String,
        /// The new version's.
        bytes: u64,
        /// That of the one below.
        base_bytes: u64,
    },
    /// Its data is not here.
    #[error(
        "image {image} is only registered at host '{host}', its data is at {at}; import it as an image of its own, and make VMs of that"
    )]
    Elsewhere {
        /// The image.
        image: ImageId,
        /// The host.
        host: String,
        /// Its first target.
        at: String,
    },
    /// VMs or hosts read it.
    #[error("image {image} is not in the store of host '{host}'")]
    NotStored {
        /// The image.
        image: ImageId,
        /// The host.
        host: String,
    },
    /// None of the targets could be read.
    #[error("image {image} cannot be read from any of its targets: {why}")]
    Unreadable {
        /// The image.
        image: String,
        /// What each said.
        why: String,
    },
}

impl StoreError {
    pub(crate) fn io(image: &str, path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        let (image, path) = (image.to_owned(), path.to_owned());
        move |source| {
            if treeboot_block::storage::is_full(&source) {
                Self::NoSpace { image, path }
            } else {
                Self::Io { path, doing, source }
            }
        }
    }
}

/// What is in a store: manifests that can be read, and what is wrong with the rest.
pub fn scan(dir: &Path) -> io::Result<Vec<Result<Manifest, StoreError>>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        if name.parse::<treeboot_types::Digest>().is_ok() {
            found.push(Manifest::load(&path));
        }
    }
    Ok(found)
}

/// Removes the directories of imports that were interrupted, and what a flattening left. Returns how many imports there were.
pub fn sweep(dir: &Path) -> io::Result<usize> {
    let mut swept = 0;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
            std::fs::remove_dir_all(entry.path())?;
            swept += 1;
        } else if entry.path().join(MANIFEST).exists() {
            shared::sweep(&entry.path())?;
        }
    }
    Ok(swept)
}

#[cfg(test)]
mod tests;
