//! LIO, the kernel's iSCSI target, through configfs.
//!
//! A [`Backstore`] is a block device or a file that LIO has opened; an [`Export`] is a target that shows backstores as LUNs.
//! Both are reached by saying what is wanted, again and again: what is there already is left as it is. [`Lio::found`]
//! reads what a former life of the agent left behind. An object is treeboot's only if all that marks it says so: a target has
//! a name of our grammar and no LUN of anybody else's backstore; a backstore lies in our HBA and has our prefix.
//!
//! Everything blocks: call it where blocking is allowed, with a limit around it. Deliberately absent: targetcli, its saved
//! configuration (the agent's journal is the memory), shells, and any knowledge of what the devices hold.

mod backstore;
mod chap;
mod configfs;
mod counters;
mod error;
mod found;
mod target;
#[cfg(test)]
mod tests;

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use treeboot_types::Iqn;

use crate::target::Access;
use configfs::Tree;

pub use configfs::Observer;
pub(crate) use configfs::wait_until;
pub use counters::{LunCounters, SessionCounters, TargetCounters};
pub use error::{Act, LioError};
pub use found::{Found, FoundBackstore, FoundLun, FoundTarget};

/// Where Linux mounts configfs.
pub const CONFIGFS: &str = "/sys/kernel/config";

/// What the name of every backstore of ours begins with.
pub const BACKSTORE_PREFIX: &str = "treeboot-";

/// Longest backstore name in bytes: a prefix, a digest and a kind, with room; LIO takes up to 255.
const MAX_BACKSTORE_NAME_BYTES: usize = 127;

/// A backstore's name: [`BACKSTORE_PREFIX`] and letters, digits, `-`, `.`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BackstoreName(Box<str>);

/// Why a text names no backstore of ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{}' is no name of a backstore of treeboot: '{BACKSTORE_PREFIX}', then lower-case letters, digits, '-' and '.', at \
     most {MAX_BACKSTORE_NAME_BYTES} bytes", .0.escape_debug()
)]
pub struct BackstoreNameError(pub String);

impl BackstoreName {
    /// Puts the prefix before `what`, for instance `data-` and a digest.
    ///
    /// # Errors
    /// [`BackstoreNameError`].
    pub fn new(what: &str) -> Result<Self, BackstoreNameError> {
        Self::parse(&format!("{BACKSTORE_PREFIX}{what}"))
    }

    /// Takes a whole name.
    ///
    /// # Errors
    /// [`BackstoreNameError`]: it is somebody else's.
    pub fn parse(name: &str) -> Result<Self, BackstoreNameError> {
        let good = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.');
        let ours = name.strip_prefix(BACKSTORE_PREFIX).is_some_and(|what| {
            !what.is_empty() && what.bytes().all(good) && name.len() <= MAX_BACKSTORE_NAME_BYTES
        });
        if ours {
            Ok(Self(name.into()))
        } else {
            Err(BackstoreNameError(name.into()))
        }
    }

    /// The name as text, with its prefix.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for BackstoreName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for BackstoreName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a backstore reads and writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backing {
    /// A block device (LIO's iblock). LIO holds it alone: no dm device may lie over it, nor a second backstore.
    Block {
        /// Its node.
        path: PathBuf,
    },
    /// A file, through the page cache (LIO's fileio). LIO opens it for writing even where nobody may write.
    File {
        /// The file.
        path: PathBuf,
        /// How much of it is shown, in bytes; a multiple of 512.
        bytes: u64,
    },
}

impl Backing {
    /// The device or file.
    pub fn path(&self) -> &Path {
        match self {
            Self::Block { path } | Self::File { path, .. } => path,
        }
    }
}

/// A device or file for LIO to open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backstore {
    /// Its name on this host.
    pub name: BackstoreName,
    /// What it reads and writes.
    pub backing: Backing,
    /// May it be written? A block device that may not is opened for reading only.
    pub writable: bool,
    /// Unit serial number (SPC-4 §7.8.16), of which the unit's NAA name is made: equal wherever the same content is served, best
    /// a digest. At most 64 printable characters.
    pub serial: String,
}

/// A target to export. Whether its LUNs may be written is the export's word, on top of each backstore's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Export {
    /// Its name: of an image or of a disk.
    pub name: Iqn,
    /// Where it listens. Several targets may share a portal.
    pub portals: Vec<SocketAddr>,
    /// LUN and backstore, each LUN once. A backstore may be in several targets.
    pub luns: Vec<(u16, BackstoreName)>,
    /// Who may log in.
    pub access: Access,
    /// May initiators write?
    pub writable: bool,
}

/// What reaching a wanted state took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It was not there.
    Created,
    /// It was there and something about it was changed.
    Changed,
    /// Nothing was to be done.
    Identity,
}

/// LIO on this host.
#[derive(Debug, Clone)]
pub struct Lio {
    tree: Tree,
}

impl Default for Lio {
    fn default() -> Self {
        Self::new(CONFIGFS)
    }
}

impl Lio {
    /// LIO below a mount point of configfs; nothing is looked at yet.
    pub fn new(configfs: impl Into<PathBuf>) -> Self {
        Self {
            tree: Tree::new(configfs.into(), None),
        }
    }

    /// The same, with somebody who sees each change before it is made and can stop the work there.
    pub fn observed(configfs: impl Into<PathBuf>, observer: Arc<Observer>) -> Self {
        Self {
            tree: Tree::new(configfs.into(), Some(observer)),
        }
    }

    /// Is everything there that LIO needs? Loads nothing.
    ///
    /// # Errors
    /// [`LioError::NoConfigfs`], [`LioError::NoModule`].
    pub fn check(&self) -> Result<(), LioError> {
        if self.tree.target().join("core").is_dir() {
            return Ok(());
        }
        let root = self.tree.root();
        // A mount point that nothing is mounted on is an empty directory of sysfs on the same device.
        let device = |path: &Path| std::fs::metadata(path).map(|m| std::os::unix::fs::MetadataExt::dev(&m));
        let mounted = match (device(root), root.parent().map(device)) {
            (Ok(own), Some(Ok(above))) => own != above,
            _ => false,
        };
        if mounted {
            Err(LioError::NoModule {
                module: "target_core_mod",
                source: None,
            })
        } else {
            Err(LioError::NoConfigfs { root: root.into() })
        }
    }

    /// How many changes of configfs were begun through this value and its clones.
    pub fn steps(&self) -> u64 {
        self.tree.steps()
    }

    /// Does the kernel's LIO run at all? If not there can be nothing of ours.
    fn runs(&self) -> bool {
        self.tree.target().is_dir()
    }

    fn fabric(&self) -> PathBuf {
        self.tree.target().join("iscsi")
    }

    fn target_path(&self, name: &Iqn) -> PathBuf {
        self.fabric().join(name.as_str())
    }
}

/// Is this a name under which treeboot exports?
fn is_ours(name: &Iqn) -> bool {
    name.image().is_some() || name.disk().is_some()
}
