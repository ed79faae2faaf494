//! What a store directory says of itself, so that a store is known even without the agent's journal.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::Path;

use serde::{Deserialize, Serialize};
use treeboot_types::{Digest, ImageId, IscsiUrl};

use super::{MANIFEST, StoreError};
use crate::stack::Content;

/// `image.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Root of the hash tree; also the directory's name.
    pub digest: Digest,
    /// Size in bytes.
    pub bytes: u64,
    /// The unit of caching in bytes.
    pub chunk_bytes: u32,
    /// Bytes without holes.
    pub allocated_bytes: u64,
    /// The names that it has.
    pub names: BTreeSet<ImageId>,
    /// Where the data is, for an adopted image; none for an imported one.
    #[serde(default)]
    pub adopted_from: Vec<IscsiUrl>,
    /// What it is a version of and shares blocks with; for people, the directory's `own` says what counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<Digest>,
}

impl Manifest {
    /// What it is.
    pub fn content(&self) -> Content {
        Content {
            digest: self.digest,
            bytes: self.bytes,
            chunk_bytes: self.chunk_bytes,
        }
    }

    /// Reads the manifest in `dir`.
    ///
    /// # Errors
    /// It is not there, is no manifest, or is another image's.
    pub fn load(dir: &Path) -> Result<Self, StoreError> {
        let path = dir.join(MANIFEST);
        let damaged = |why: String| StoreError::Damaged {
            path: dir.to_owned(),
            why,
        };
        let text = std::fs::read(&path).map_err(|error| damaged(format!("{MANIFEST}: {error}")))?;
        let manifest: Self =
            serde_json::from_slice(&text).map_err(|error| damaged(format!("{MANIFEST}: {error}")))?;
        let name = dir.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if manifest.digest.to_string() != name {
            return Err(damaged(format!("{MANIFEST} says digest {}", manifest.digest)));
        }
        Ok(manifest)
    }

    /// Writes it into `dir`, wholly or not at all.
    ///
    /// # Errors
    /// The operating system's.
    pub fn save(&self, dir: &Path) -> std::io::Result<()> {
        let new = dir.join(format!("{MANIFEST}.new"));
        let mut file = std::fs::File::create(&new)?;
        let mut text = serde_json::to_vec_pretty(self).map_err(std::io::Error::other)?;
        text.push(b'\n');
        file.write_all(&text)?;
        file.sync_all()?;
        std::fs::rename(&new, dir.join(MANIFEST))?;
        std::fs::File::open(dir)?.sync_all()
    }
}
