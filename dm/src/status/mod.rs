//! What targets report of themselves (kernel `Documentation/admin-guide/device-mapper/`), parsed once.
//!
//! Kernels append words to a status line over time, so what follows the last word that is known is left out of account.

mod cache;
mod multipath;

use std::fmt;

use crate::Sectors;
pub use cache::{CacheCounts, CacheStatus};
pub use multipath::{GroupState, GroupStatus, MultipathStatus, PathStatus};

/// A line of a device's status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatusLine {
    /// First sector of the run in the device.
    pub start: Sectors,
    /// Its length.
    pub length: Sectors,
    /// What its target says.
    pub status: Status,
}

/// What a target says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// Nothing: linear, error, zero, flakey, snapshot-origin, switch.
    Quiet,
    /// Paths that are up and down.
    Multipath(MultipathStatus),
    /// Hits and misses, or that the cache has failed.
    Cache(CacheStatus),
    /// How full the delta is.
    Snapshot(SnapshotStatus),
    /// Whether a wrong block was seen.
    Verity(VerityStatus),
}

/// What a snapshot says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotStatus {
    /// In use.
    Active {
        /// Sectors of the delta that are taken, metadata included.
        used: Sectors,
        /// Sectors of the delta device, as it was last looked at.
        total: Sectors,
        /// Sectors of `used` that hold metadata.
        metadata: Sectors,
    },
    /// Full or unreadable, and of no more use: every access fails.
    Invalid,
    /// Full, with a table that says `PO`: writes fail, what was written stays.
    Overflow,
    /// Merging into its origin failed.
    MergeFailed,
    /// The kernel does not say.
    Unknown,
}

/// What a verity target says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VerityStatus {
    /// No wrong block was seen (`V`).
    Valid,
    /// A wrong block was seen (`C`).
    Corrupted,
}

/// Why a text is not a status.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the status '{text}' of a {kind} target is not understood: no {what}")]
pub struct StatusError {
    /// The target's type.
    pub kind: String,
    /// What the kernel reported.
    pub text: String,
    /// What could not be read.
    pub what: &'static str,
}

impl Status {
    /// The status of a target of type `kind`.
    ///
    /// # Errors
    /// [`StatusError`]: the text is not what that type reports.
    pub fn parse(kind: &str, text: &str) -> Result<Self, StatusError> {
        let words = &mut Words::new(kind, text);
        Ok(match kind {
            "multipath" => Self::Multipath(MultipathStatus::parse(words)?),
            "cache" => Self::Cache(CacheStatus::parse(words)?),
            "snapshot" => Self::Snapshot(parse_snapshot(words)?),
            "verity" => Self::Verity(match words.next("state")? {
                "V" => VerityStatus::Valid,
                "C" => VerityStatus::Corrupted,
                _ => return Err(words.error("state of V or C")),
            }),
            _ => Self::Quiet,
        })
    }
}

fn parse_snapshot(words: &mut Words<'_>) -> Result<SnapshotStatus, StatusError> {
    let first = words.next("use")?;
    Ok(match first {
        "Invalid" => SnapshotStatus::Invalid,
        "Overflow" => SnapshotStatus::Overflow,
        "Merge" => SnapshotStatus::MergeFailed,
        "Unknown" => SnapshotStatus::Unknown,
        _ => {
            let (used, total) = words.fraction_of(first, "use")?;
            SnapshotStatus::Active {
                used: Sectors(used),
                total: Sectors(total),
                metadata: Sectors(words.number("metadata sectors")?),
            }
        }
    })
}

impl fmt::Display for SnapshotStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Active { used, total, .. } => write!(f, "{used} of {total} sectors"),
            Self::Invalid => f.write_str("invalid"),
            Self::Overflow => f.write_str("overflow"),
            Self::MergeFailed => f.write_str("merge failed"),
            Self::Unknown => f.write_str("unknown"),
        }
    }
}

/// A status line word by word.
pub(crate) struct Words<'a> {
    kind: &'a str,
    text: &'a str,
    words: std::str::SplitAsciiWhitespace<'a>,
}

/// No status of ours counts more of anything; a larger count is a broken text.
const MAX_COUNT: u64 = 1024;

impl<'a> Words<'a> {
    fn new(kind: &'a str, text: &'a str) -> Self {
        Self {
            kind,
            text,
            words: text.split_ascii_whitespace(),
        }
    }

    fn next(&mut self, what: &'static str) -> Result<&'a str, StatusError> {
        self.words.next().ok_or_else(|| self.error(what))
    }

    fn number(&mut self, what: &'static str) -> Result<u64, StatusError> {
        let word = self.next(what)?;
        word.parse().map_err(|_| self.error(what))
    }

    fn count(&mut self, what: &'static str) -> Result<u64, StatusError> {
        match self.number(what)? {
            count if count <= MAX_COUNT => Ok(count),
            _ => Err(self.error(what)),
        }
    }

    /// A count and as many words.
    fn list(&mut self, what: &'static str) -> Result<Vec<&'a str>, StatusError> {
        let count = self.count(what)?;
        (0..count).map(|_| self.next(what)).collect()
    }

    /// `used/total`.
    fn fraction(&mut self, what: &'static str) -> Result<(u64, u64), StatusError> {
        let word = self.next(what)?;
        self.fraction_of(word, what)
    }

    fn fraction_of(&self, word: &str, what: &'static str) -> Result<(u64, u64), StatusError> {
        let parse = |(used, total): (&str, &str)| Some((used.parse().ok()?, total.parse().ok()?));
        word.split_once('/')
            .and_then(parse)
            .ok_or_else(|| self.error(what))
    }

    fn error(&self, what: &'static str) -> StatusError {
        StatusError {
            kind: self.kind.into(),
            text: self.text.into(),
            what,
        }
    }
}

#[cfg(test)]
mod tests;
