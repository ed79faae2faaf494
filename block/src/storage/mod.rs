//! Blocking byte storage: what lies under devices, caches and deltas.
//!
//! [`Storage`] is narrow so that a model can stand in for a real file: [`model::ModelStorage`] keeps a log of
//! operations and gives back what a crash could leave of them. Deliberately absent: async (the callers decide
//! where blocking is allowed) and any format.

mod file;
pub mod model;
mod patched;

use std::io;

use crate::{BlockError, Extent};

pub use file::{FileStorage, OpenMode};
pub use patched::{OwnBlocks, PATCH_BLOCK, Patched};

/// A sparse run of bytes that can be read, written and made durable. Offsets and lengths are in bytes.
///
/// All methods but [`try_read_at`](Self::try_read_at) may block.
pub trait Storage: Send + Sync + 'static {
    /// Fills `buf` from `offset` on; beyond the end there are zeroes.
    ///
    /// # Errors
    /// Whatever the operating system says; then the content of `buf` is unspecified.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Like [`read_at`](Self::read_at) if that can be done without waiting for a device, else `None`; then the
    /// content of `buf` is unspecified.
    ///
    /// # Errors
    /// As `read_at`.
    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<Option<()>>;

    /// Stores all of `data` from `offset` on; durable after the next [`sync`](Self::sync).
    ///
    /// # Errors
    /// Whatever the operating system says; a part of `data` may have been stored.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Makes `bytes` from `offset` on read as zeroes and gives their space back, where the storage can.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] where it cannot; nothing has changed then.
    fn punch(&self, offset: u64, bytes: u64) -> io::Result<()>;

    /// Makes every write, punch and change of length that has ended durable.
    ///
    /// # Errors
    /// Whatever the operating system says. After an error what was written since the last success is in doubt,
    /// and a later success does not change that (the kernel reports a lost page once only).
    fn sync(&self) -> io::Result<()>;

    /// The length in bytes.
    ///
    /// # Errors
    /// Whatever the operating system says.
    fn len(&self) -> io::Result<u64>;

    /// Whether there are no bytes.
    ///
    /// # Errors
    /// As [`len`](Self::len).
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Cuts off or adds a hole, so that the length is `bytes`.
    ///
    /// # Errors
    /// Whatever the operating system says.
    fn set_len(&self, bytes: u64) -> io::Result<()>;

    /// Bytes of disk that are in use for it.
    ///
    /// # Errors
    /// Whatever the operating system says.
    fn allocated_bytes(&self) -> io::Result<u64>;

    /// The run that begins at `offset`, no longer than `bytes` (> 0): hole or data. Beyond the end: a hole.
    ///
    /// # Errors
    /// Whatever the operating system says.
    fn extent(&self, offset: u64, bytes: u64) -> io::Result<Extent>;
}

/// Whether the operating system had no room: ENOSPC or EDQUOT.
pub fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

/// What a device says when storing `bytes` at `offset` (the device's own offset) failed.
pub(crate) fn write_error(error: io::Error, offset: u64, bytes: u64) -> BlockError {
    if is_full(&error) {
        BlockError::NoSpace { offset, bytes }
    } else {
        BlockError::Io {
            offset,
            source: error,
        }
    }
}

#[cfg(test)]
mod tests;
