//! Where the record is kept: a batch is there as a whole and for good, or not at all.

mod codec;
mod memory;
mod sled;

use crate::tree::{Change, Key, Record};

pub use self::sled::SledStore;
pub use codec::FORMAT;
pub use memory::MemoryStore;

/// Keeps the record. Calls block: the owner makes them off the async threads.
pub trait Store: Send + Sync + 'static {
    /// All that is kept.
    ///
    /// # Errors
    /// [`StoreError`] names the entry that cannot be read.
    fn load(&self) -> Result<Vec<(Key, Record)>, StoreError>;

    /// Makes all changes, as one; durable when it returns.
    ///
    /// # Errors
    /// [`StoreError`]; nothing of the batch is certain then, and making it again does no harm.
    fn apply(&self, changes: &[Change]) -> Result<(), StoreError>;
}

/// What a person can do about a record that is damaged.
pub(crate) const WAY_OUT: &str = "restore the state directory from a backup, or start once with --rebuild, which puts the record aside and \
                                  learns from the hosts where they stand";

/// Why the record cannot be kept or read.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process has it.
    #[error(
        "the state directory {dir} is in use by another process; stop the other coordinator, or give this one a --state \
         directory of its own"
    )]
    Locked {
        /// Which.
        dir: String,
    },
    /// It cannot be opened.
    #[error("the state directory {dir} cannot be opened; check that it exists, can be written and has room")]
    Open {
        /// Which.
        dir: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It was written by a later version.
    #[error(
        "{what} has format {found}, but this version reads formats up to {FORMAT}; run the version that wrote it, or a \
         later one"
    )]
    Newer {
        /// Which entry.
        what: String,
        /// Its format.
        found: u8,
    },
    /// An entry cannot be read.
    #[error("the entry {key} of the record is damaged; {WAY_OUT}")]
    Damaged {
        /// Which.
        key: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Entries are gone or read otherwise than they were written.
    #[error(
        "the record in {dir} is damaged: of {said} entries that were written it has {found}, or some read otherwise; {WAY_OUT}"
    )]
    Lost {
        /// Which state directory.
        dir: String,
        /// Entries that are there.
        found: u64,
        /// Entries of which the last change spoke.
        said: u64,
    },
    /// Its files make no sense.
    #[error("the files of the record in {dir} are damaged; {WAY_OUT}")]
    Unreadable {
        /// Where they are.
        dir: String,
        /// What is wrong with them.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It cannot be written.
    #[error("the record cannot be written to {dir}; make room or mend the disk, then try again")]
    Write {
        /// Where.
        dir: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

#[cfg(test)]
mod tests;
