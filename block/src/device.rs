//! The interface that every device implements.

use std::future::Future;
use std::pin::Pin;

/// What an operation on a device returns: boxed, so that devices stack as `Arc<dyn BlockDevice>`.
pub type IoFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, BlockError>> + Send + 'a>>;

/// The fixed properties of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Size in bytes, a multiple of `block_bytes`.
    pub bytes: u64,
    /// Logical block in bytes: 512 or 4096.
    pub block_bytes: u32,
    /// The unit in bytes below which a write costs a read first; a power-of-two multiple of `block_bytes`.
    pub physical_block_bytes: u32,
    /// Writes are refused with [`BlockError::ReadOnly`].
    pub read_only: bool,
    /// Discards give space back ([`BlockDevice::discard`]); `false` on a fully allocated device.
    pub thin: bool,
}

/// How a run of bytes is backed (SBC-3 §4.7.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Provisioning {
    /// Storage is assigned.
    Mapped,
    /// No storage is assigned; reads give zeroes.
    Hole,
}

/// A run of bytes from the asked offset on that share one state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes, at least one block.
    pub bytes: u64,
    /// Its state.
    pub state: Provisioning,
}

/// Why an operation failed. The caller turns it into its protocol's words (sense data, an errno).
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// Beyond the end, or not a multiple of the block.
    #[error("{bytes} bytes at {offset} lie outside the device of {device_bytes} bytes or are not aligned")]
    OutOfRange {
        /// First byte.
        offset: u64,
        /// Length in bytes.
        bytes: u64,
        /// Size of the device in bytes.
        device_bytes: u64,
    },
    /// A write to a read-only device.
    #[error("the device is read-only")]
    ReadOnly,
    /// No room to store a write.
    #[error("no space left to store {bytes} bytes at {offset}")]
    NoSpace {
        /// First byte.
        offset: u64,
        /// Length in bytes.
        bytes: u64,
    },
    /// The bytes cannot be had now; the same request may succeed later.
    #[error("not available at the moment: {what}")]
    Unavailable {
        /// What is missing, for a person.
        what: String,
    },
    /// The bytes that are there are not the right ones.
    #[error("damaged: {what}")]
    Corrupt {
        /// Where and what, for a person.
        what: String,
    },
    /// The operating system refused.
    #[error("I/O failed at {offset}")]
    Io {
        /// First byte.
        offset: u64,
        /// The operating system's reason.
        #[source]
        source: std::io::Error,
    },
    /// The device cannot do this at all.
    #[error("not supported: {what}")]
    Unsupported {
        /// The operation.
        what: &'static str,
    },
}

/// Random access to a fixed number of bytes.
///
/// Offsets and lengths are in bytes and multiples of [`Geometry::block_bytes`]. Operations may run at once; two
/// that overlap have no order between them unless one's future ended before the other was made. A write is
/// durable only once a [`flush`](Self::flush) made after its end has ended. Dropping a future may leave its
/// write done, undone or done in part (by whole blocks).
///
/// An implementation completes at once (the future is ready at its first poll) whenever it can do so without
/// blocking, because the iSCSI target answers such commands without a task switch.
pub trait BlockDevice: Send + Sync + 'static {
    /// The device's fixed properties.
    fn geometry(&self) -> Geometry;

    /// Fills `buf` from `offset` on.
    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> IoFuture<'a, ()>;

    /// Stores `data` from `offset` on.
    fn write<'a>(&'a self, offset: u64, data: &'a [u8]) -> IoFuture<'a, ()>;

    /// Makes every ended write durable.
    fn flush(&self) -> IoFuture<'_, ()>;

    /// Makes `bytes` from `offset` on read as zeroes, and gives their storage back where the device is thin.
    fn discard(&self, offset: u64, bytes: u64) -> IoFuture<'_, ()>;

    /// The state of the run that begins at `offset`, no longer than `bytes`.
    fn extent(&self, offset: u64, bytes: u64) -> IoFuture<'_, Extent>;

    /// Checks a range against the geometry; every implementation calls it first.
    ///
    /// # Errors
    /// [`BlockError::OutOfRange`].
    fn check_range(&self, offset: u64, bytes: u64) -> Result<(), BlockError> {
        let geometry = self.geometry();
        let block = u64::from(geometry.block_bytes);
        let aligned = offset.is_multiple_of(block) && bytes.is_multiple_of(block);
        match offset.checked_add(bytes) {
            Some(end) if aligned && end <= geometry.bytes => Ok(()),
            _ => Err(BlockError::OutOfRange {
                offset,
                bytes,
                device_bytes: geometry.bytes,
            }),
        }
    }
}
