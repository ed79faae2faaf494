//! One raw file, or one block device, as a device.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::blocking::{self, read_storage};
use crate::storage::{FileStorage, OpenMode, Storage, write_error};
use crate::{BlockDevice, BlockError, Extent, Geometry, IoFuture, Provisioning};

/// What [`FileDevice::open`] needs to know beside the path.
#[derive(Debug, Clone, Copy)]
pub struct FileOptions {
    /// Writes are refused.
    pub read_only: bool,
    /// Logical block in bytes: 512 or 4096.
    pub block_bytes: u32,
    /// Physical block in bytes: 512 or 4096, at least the logical one.
    pub physical_block_bytes: u32,
    /// The device is not thin: all its bytes have storage, which no discard gives back. Opening a file for writing fills its
    /// holes, so that later writes need no more room.
    pub fully_allocated: bool,
}

impl Default for FileOptions {
    fn default() -> Self {
        Self {
            read_only: true,
            block_bytes: 512,
            physical_block_bytes: 4096,
            fully_allocated: false,
        }
    }
}

/// Why a file cannot be a device.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The operating system refused.
    #[error("cannot open '{path}'")]
    Open {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// A directory, a pipe, a terminal.
    #[error("'{path}' is neither a regular file nor a block device; give a raw disk image")]
    Kind {
        /// The file.
        path: PathBuf,
    },
    /// Nothing in it.
    #[error("'{path}' is empty (0 bytes); a disk image needs at least one block of {block_bytes} bytes")]
    Empty {
        /// The file.
        path: PathBuf,
        /// Logical block in bytes.
        block_bytes: u32,
    },
    /// Not a whole number of blocks.
    #[error(
        "'{path}' has {bytes} bytes, not a multiple of {block_bytes}: it is truncated or not a raw disk image; \
         'truncate --size=%{block_bytes} {path}' pads it with zeroes if it is one"
    )]
    Size {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        bytes: u64,
        /// Logical block in bytes.
        block_bytes: u32,
    },
    /// A block size that the device cannot have.
    #[error("a block of {block_bytes} bytes is not supported; give 512 or 4096")]
    Block {
        /// What was asked for.
        block_bytes: u32,
    },
    /// A physical block that is none, or smaller than the logical one.
    #[error(
        "a physical block of {physical_block_bytes} bytes under blocks of {block_bytes} is not supported; give 512 or 4096, \
         and no less than the block"
    )]
    PhysicalBlock {
        /// What was asked for.
        physical_block_bytes: u32,
        /// Logical block in bytes.
        block_bytes: u32,
    },
    /// The file's holes cannot be filled.
    #[error("cannot allocate all {bytes} bytes of '{path}'")]
    Allocate {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        bytes: u64,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// Another process (or another device of this one) has it.
    #[error("'{path}' is in use by another process that writes or serves it; stop that one first")]
    InUse {
        /// The file.
        path: PathBuf,
    },
}

/// A device over a raw file.
#[derive(Debug)]
pub struct FileDevice {
    storage: Arc<FileStorage>,
    geometry: Geometry,
}

impl FileDevice {
    /// Opens a raw image.
    ///
    /// # Errors
    /// [`OpenError`]: it names the path and what to do.
    pub fn open(path: impl AsRef<Path>, options: FileOptions) -> Result<Self, OpenError> {
        let path = path.as_ref();
        let FileOptions {
            read_only,
            block_bytes,
            physical_block_bytes,
            fully_allocated,
        } = options;
        if block_bytes != 512 && block_bytes != 4096 {
            return Err(OpenError::Block { block_bytes });
        }
        if !matches!(physical_block_bytes, 512 | 4096) || physical_block_bytes < block_bytes {
            return Err(OpenError::PhysicalBlock {
                physical_block_bytes,
                block_bytes,
            });
        }
        let mode = if read_only {
            OpenMode::ReadOnly
        } else {
            OpenMode::ReadWrite
        };
        let open_error = |source: io::Error| match source.kind() {
            io::ErrorKind::WouldBlock => OpenError::InUse { path: path.into() },
            io::ErrorKind::IsADirectory => OpenError::Kind { path: path.into() },
            _ => OpenError::Open {
                path: path.into(),
                source,
            },
        };
        // Looked at before it is opened: to open a pipe would wait for its other end.
        let kind = std::fs::metadata(path).map_err(open_error)?.file_type();
        if !kind.is_file() && !std::os::unix::fs::FileTypeExt::is_block_device(&kind) {
            return Err(OpenError::Kind { path: path.into() });
        }
        let storage = FileStorage::open(path, mode).map_err(open_error)?;
        if !storage.has_random_access().map_err(open_error)? {
            return Err(OpenError::Kind { path: path.into() });
        }
        let bytes = storage.len().map_err(open_error)?;
        if bytes == 0 {
            return Err(OpenError::Empty {
                path: path.into(),
                block_bytes,
            });
        }
        if !bytes.is_multiple_of(u64::from(block_bytes)) {
            return Err(OpenError::Size {
                path: path.into(),
                bytes,
                block_bytes,
            });
        }
        if fully_allocated && !read_only && kind.is_file() {
            storage.allocate(bytes).map_err(|source| OpenError::Allocate {
                path: path.into(),
                bytes,
                source,
            })?;
        }
        Ok(Self {
            storage: Arc::new(storage),
            geometry: Geometry {
                bytes,
                block_bytes,
                physical_block_bytes,
                read_only,
                thin: !fully_allocated,
            },
        })
    }

    /// Bytes of disk in use for the file.
    ///
    /// # Errors
    /// The operating system's.
    pub fn allocated_bytes(&self) -> io::Result<u64> {
        self.storage.allocated_bytes()
    }

    fn check_write(&self, offset: u64, bytes: u64) -> Result<(), BlockError> {
        if self.geometry.read_only {
            return Err(BlockError::ReadOnly);
        }
        self.check_range(offset, bytes)
    }
}

impl BlockDevice for FileDevice {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> IoFuture<'a, ()> {
        match self.check_range(offset, buf.len() as u64) {
            Ok(()) => read_storage(&self.storage, offset, offset, buf),
            Err(error) => blocking::ready(Err(error)),
        }
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8]) -> IoFuture<'a, ()> {
        let bytes = data.len() as u64;
        if let Err(error) = self.check_write(offset, bytes) {
            return blocking::ready(Err(error));
        }
        let storage = Arc::clone(&self.storage);
        let data = data.to_vec();
        Box::pin(blocking::run(move || {
            storage
                .write_at(offset, &data)
                .map_err(|error| write_error(error, offset, bytes))
        }))
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        if self.geometry.read_only {
            return blocking::ready(Ok(()));
        }
        let storage = Arc::clone(&self.storage);
        Box::pin(blocking::run(move || {
            storage.sync().map_err(|error| write_error(error, 0, 0))
        }))
    }

    fn discard(&self, offset: u64, bytes: u64) -> IoFuture<'_, ()> {
        if let Err(error) = self.check_write(offset, bytes) {
            return blocking::ready(Err(error));
        }
        let storage = Arc::clone(&self.storage);
        let thin = self.geometry.thin;
        Box::pin(blocking::run(move || {
            zero(&*storage, offset, bytes, thin).map_err(|error| write_error(error, offset, bytes))
        }))
    }

    fn extent(&self, offset: u64, bytes: u64) -> IoFuture<'_, Extent> {
        if let Err(error) = self.check_range(offset, bytes) {
            return blocking::ready(Err(error));
        }
        if !self.geometry.thin {
            return blocking::ready(Ok(Extent {
                bytes,
                state: Provisioning::Mapped,
            }));
        }
        let storage = Arc::clone(&self.storage);
        let block = u64::from(self.geometry.block_bytes);
        Box::pin(blocking::run(move || {
            let extent = storage
                .extent(offset, bytes.max(1))
                .map_err(|source| BlockError::Io { offset, source })?;
            // A hole is told in whole blocks; a block that is a hole only in part is mapped.
            Ok(match extent.state {
                Provisioning::Hole if extent.bytes >= block => Extent {
                    bytes: extent.bytes / block * block,
                    ..extent
                },
                _ => Extent {
                    bytes: extent.bytes.next_multiple_of(block).min(bytes.max(block)),
                    state: Provisioning::Mapped,
                },
            })
        }))
    }
}

/// Punches, or writes zeroes where the storage cannot or is to be kept.
fn zero(storage: &dyn Storage, offset: u64, bytes: u64, punch: bool) -> io::Result<()> {
    match punch.then(|| storage.punch(offset, bytes)) {
        None => {}
        Some(Err(error)) if error.kind() == io::ErrorKind::Unsupported => {}
        Some(other) => return other,
    }
    let zeroes = vec![0; bytes.min(1 << 20) as usize];
    let mut done = 0;
    while done < bytes {
        let now = (bytes - done).min(zeroes.len() as u64);
        storage.write_at(offset + done, &zeroes[..now as usize])?;
        done += now;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    fn image(bytes: u64) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.raw");
        std::fs::File::create(&path).unwrap().set_len(bytes).unwrap();
        (dir, path)
    }

    #[test]
    fn what_is_not_a_disk_image_is_refused_by_name() {
        let open = |path: &Path| FileDevice::open(path, FileOptions::default()).unwrap_err();
        let (dir, path) = image(0);
        assert!(matches!(open(&path), OpenError::Empty { .. }));
        std::fs::write(&path, [0; 513]).unwrap();
        assert!(matches!(open(&path), OpenError::Size { bytes: 513, .. }));
        assert!(open(&path).to_string().contains("disk.raw"));
        assert!(matches!(open(dir.path()), OpenError::Kind { .. }));
        assert!(matches!(open(&dir.path().join("absent")), OpenError::Open { .. }));
        let options = FileOptions {
            block_bytes: 1024,
            ..FileOptions::default()
        };
        assert!(matches!(
            FileDevice::open(&path, options),
            Err(OpenError::Block { block_bytes: 1024 })
        ));
        let options = FileOptions {
            block_bytes: 4096,
            physical_block_bytes: 512,
            ..FileOptions::default()
        };
        assert!(matches!(
            FileDevice::open(&path, options),
            Err(OpenError::PhysicalBlock { .. })
        ));
    }

    #[test]
    fn a_file_that_is_written_cannot_be_opened_again() {
        let (_dir, path) = image(4096);
        let writable = FileOptions {
            read_only: false,
            ..FileOptions::default()
        };
        let device = FileDevice::open(&path, writable).unwrap();
        assert!(matches!(
            FileDevice::open(&path, writable),
            Err(OpenError::InUse { .. })
        ));
        drop(device);
        FileDevice::open(&path, writable).unwrap();
    }

    #[tokio::test]
    async fn bytes_come_back_and_discarded_ones_are_zero() {
        let (_dir, path) = image(1 << 20);
        let options = FileOptions {
            read_only: false,
            ..FileOptions::default()
        };
        let device = FileDevice::open(&path, options).unwrap();
        device.write(8192, &[5; 8192]).await.unwrap();
        device.flush().await.unwrap();
        let mut buf = [0; 1024];
        device
            .read(8192, &mut buf)
            .now_or_never()
            .expect("in the page cache")
            .unwrap();
        assert_eq!(buf, [5; 1024]);
        let extent = device.extent(0, 1 << 20).await.unwrap();
        assert_eq!((extent.bytes, extent.state), (8192, Provisioning::Hole));
        device.discard(8192, 4096).await.unwrap();
        device.read(11776, &mut buf).await.unwrap();
        assert_eq!((buf[0], buf[1023]), (0, 5));
        for (offset, bytes) in [(1, 512), (0, 511), (1 << 20, 512), (u64::MAX - 511, 512)] {
            let mut buf = vec![0; bytes];
            assert!(matches!(
                device.read(offset, &mut buf).await,
                Err(BlockError::OutOfRange { .. })
            ));
        }
    }

    #[tokio::test]
    async fn a_fully_allocated_device_has_all_its_storage_and_keeps_it() {
        let (_dir, path) = image(1 << 20);
        let options = FileOptions {
            read_only: false,
            fully_allocated: true,
            ..FileOptions::default()
        };
        let device = FileDevice::open(&path, options).unwrap();
        assert!(!device.geometry().thin);
        assert!(device.allocated_bytes().unwrap() >= 1 << 20);
        device.write(8192, &[5; 8192]).await.unwrap();
        device.discard(8192, 4096).await.unwrap();
        assert!(device.allocated_bytes().unwrap() >= 1 << 20);
        let mut buf = [1; 8192];
        device.read(8192, &mut buf).await.unwrap();
        assert_eq!((buf[0], buf[4095], buf[4096]), (0, 0, 5));
        let extent = device.extent(0, 1 << 20).await.unwrap();
        assert_eq!((extent.bytes, extent.state), (1 << 20, Provisioning::Mapped));
    }

    #[tokio::test]
    async fn a_read_only_device_refuses_every_change() {
        let (_dir, path) = image(4096);
        let device = FileDevice::open(&path, FileOptions::default()).unwrap();
        assert!(matches!(
            device.write(0, &[1; 512]).await,
            Err(BlockError::ReadOnly)
        ));
        assert!(matches!(device.discard(0, 512).await, Err(BlockError::ReadOnly)));
        device.flush().await.unwrap();
    }
}
