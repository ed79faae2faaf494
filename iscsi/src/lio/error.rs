//! What can go wrong with LIO.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use treeboot_types::Iqn;

use super::BackstoreName;

/// One operation on configfs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Act {
    /// Read an attribute or a directory.
    Read,
    /// Make a directory, which makes LIO make an object.
    Make,
    /// Write this to an attribute.
    Write(String),
    /// Write what must not be printed to an attribute.
    WriteSecret,
    /// Make a link to this.
    Link(PathBuf),
    /// Remove a link.
    Unlink,
    /// Remove a directory and with it the object.
    Remove,
}

impl fmt::Display for Act {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Read => f.write_str("read"),
            Self::Make => f.write_str("make"),
            Self::Write(what) => write!(f, "write '{}' to", what.escape_debug()),
            Self::WriteSecret => f.write_str("write a secret to"),
            Self::Link(to) => write!(f, "link {} at", to.display()),
            Self::Unlink => f.write_str("remove the link"),
            Self::Remove => f.write_str("remove"),
        }
    }
}

/// Why LIO is not as it was asked to be.
#[derive(Debug, thiserror::Error)]
pub enum LioError {
    /// The kernel's configfs is not there.
    #[error(
        "configfs is not mounted at {}; as root: modprobe configfs && mount -t configfs none {}",
        root.display(), root.display()
    )]
    NoConfigfs {
        /// Where it was looked for.
        root: PathBuf,
    },
    /// A kernel module is not loaded and cannot be loaded by the kernel itself.
    #[error(
        "LIO's module {module} is not loaded; as root: modprobe {module} (it comes with the kernel's package, on Debian \
         linux-image-amd64; the cloud kernel has it not)"
    )]
    NoModule {
        /// The module.
        module: &'static str,
        /// What the kernel said when it was asked for what needs the module.
        #[source]
        source: Option<io::Error>,
    },
    /// Not root.
    #[error("{act} {}: only root may; run the agent as root or use the user plane", path.display())]
    NoRight {
        /// What was to be done.
        act: Act,
        /// Where.
        path: PathBuf,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// The kernel refused.
    #[error("cannot {act} {}", path.display())]
    Refused {
        /// What was to be done.
        act: Act,
        /// Where.
        path: PathBuf,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// The device or file of a backstore cannot be had.
    #[error(
        "LIO cannot open {} for the backstore {name}{}", device.display(),
        if source.raw_os_error() == Some(16) { ": another holder has the device; LIO wants it alone" } else { "" }
    )]
    Device {
        /// The backstore.
        name: BackstoreName,
        /// The device or file.
        device: PathBuf,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// An attribute whose text is not understood.
    #[error("{} says '{}', which is not understood", path.display(), text.escape_debug())]
    Unreadable {
        /// The attribute.
        path: PathBuf,
        /// Its text.
        text: String,
    },
    /// A name outside of treeboot's grammar.
    #[error("'{0}' is not a name under which treeboot exports")]
    NotOurs(Iqn),
    /// Somebody else's object under one of our names.
    #[error("{} is not treeboot's ({why}); it is left alone", path.display())]
    Stranger {
        /// The object.
        path: PathBuf,
        /// How it is known.
        why: &'static str,
    },
    /// A backstore that targets still export.
    #[error("the backstore {name} is exported by {}; remove that first", by.join(", "))]
    InUse {
        /// The backstore.
        name: BackstoreName,
        /// The targets.
        by: Vec<String>,
    },
    /// A backstore that a LUN needs is not there.
    #[error("the backstore {name} for LUN {lun} of {target} is not there; make it first")]
    NoBackstore {
        /// The backstore.
        name: BackstoreName,
        /// The target.
        target: Iqn,
        /// The LUN.
        lun: u16,
    },
    /// A path that LIO's parser cannot take.
    #[error("LIO cannot take the path {}: {why}", path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A CHAP name or secret that LIO cannot hold.
    #[error("LIO cannot hold the CHAP {what} for {whose}: {why}")]
    Chap {
        /// `name` or `secret`.
        what: &'static str,
        /// The initiator, or all.
        whose: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Sessions or commands outlived their limit.
    #[error("{} still in use {waited:?} after its sessions were ended; a command may hang below it", path.display())]
    Busy {
        /// What could not be removed.
        path: PathBuf,
        /// How long it was tried.
        waited: Duration,
    },
    /// The observer of a test ended the work before this step.
    #[error("stopped before step {step}")]
    Stopped {
        /// Counted from 0.
        step: u64,
    },
}
