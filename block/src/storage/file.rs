//! A regular file or a block device as [`Storage`].

use std::fs::{File, OpenOptions};
use std::io::{self, IoSliceMut};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FallocateFlags, FlockOperation, SeekFrom};
use rustix::io::{Errno, ReadWriteFlags};

use super::Storage;
use crate::{Extent, Provisioning};

/// How [`FileStorage::open`] opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenMode {
    /// An existing file, not written by us.
    ReadOnly,
    /// An existing file that nobody writes, and that whoever serves it may hold: no lock.
    Beside,
    /// An existing file.
    ReadWrite,
    /// An existing file, or a new and empty one.
    Create,
    /// A new and empty file; an error where there is one.
    CreateNew,
}

/// A regular file or a block device.
///
/// It holds an advisory lock (`flock`) on the file, shared where it only reads, so that no two processes write one
/// file and none writes what another serves; the kernel drops it with the process. Where a file system has no
/// such locks there is none.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    /// `false` once the file system has said that it does not know `RWF_NOWAIT`.
    pub(super) nowait: AtomicBool,
}

impl Drop for FileStorage {
    fn drop(&mut self) {
        // Not by closing it: a process that is just being started may have it until its program runs, and with it the lock.
        let _ = rustix::fs::flock(&self.file, FlockOperation::NonBlockingUnlock);
    }
}

impl FileStorage {
    /// Opens `path`.
    ///
    /// # Errors
    /// The operating system's; [`io::ErrorKind::WouldBlock`] where another process holds the file.
    pub fn open(path: &Path, mode: OpenMode) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true);
        match mode {
            OpenMode::ReadOnly | OpenMode::Beside => {}
            OpenMode::ReadWrite => {
                options.write(true);
            }
            OpenMode::Create => {
                options.write(true).create(true).truncate(false);
            }
            OpenMode::CreateNew => {
                options.write(true).create_new(true);
            }
        }
        let file = options.open(path)?;
        let lock = match mode {
            OpenMode::Beside => None,
            OpenMode::ReadOnly => Some(FlockOperation::NonBlockingLockShared),
            _ => Some(FlockOperation::NonBlockingLockExclusive),
        };
        match lock.map(|lock| rustix::fs::flock(&file, lock)) {
            Some(Err(Errno::WOULDBLOCK)) => Err(io::ErrorKind::WouldBlock.into()),
            // A file system without locks is not a reason to refuse the file.
            _ => Ok(Self {
                file,
                nowait: AtomicBool::new(true),
            }),
        }
    }

    /// Whether the path named a regular file or a block device, that is something with random access.
    ///
    /// # Errors
    /// The operating system's.
    pub fn has_random_access(&self) -> io::Result<bool> {
        let kind = self.file.metadata()?.file_type();
        Ok(kind.is_file() || kind.is_block_device())
    }

    /// Gives every hole of the first `bytes` its storage; what is there stays. No write into them runs out of room then, except
    /// on a file system that copies on write.
    ///
    /// # Errors
    /// The operating system's: no room, or a file system that cannot.
    pub fn allocate(&self, bytes: u64) -> io::Result<()> {
        loop {
            match rustix::fs::fallocate(&self.file, FallocateFlags::empty(), 0, bytes) {
                Err(Errno::INTR) => {}
                other => return Ok(other?),
            }
        }
    }
}

impl Storage for FileStorage {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < buf.len() {
            match self.file.read_at(&mut buf[done..], offset + done as u64) {
                Ok(0) => {
                    buf[done..].fill(0);
                    break;
                }
                Ok(bytes) => done += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<Option<()>> {
        if !self.nowait.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let mut done = 0;
        while done < buf.len() {
            let mut parts = [IoSliceMut::new(&mut buf[done..])];
            match rustix::io::preadv2(
                &self.file,
                &mut parts,
                offset + done as u64,
                ReadWriteFlags::NOWAIT,
            ) {
                Ok(0) => {
                    buf[done..].fill(0);
                    break;
                }
                Ok(bytes) => done += bytes,
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                    self.nowait.store(false, Ordering::Relaxed);
                    return Ok(None);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Some(()))
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        loop {
            match rustix::fs::fallocate(&self.file, mode, offset, bytes) {
                Err(Errno::INTR) => {}
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Err(io::ErrorKind::Unsupported.into()),
                other => return Ok(other?),
            }
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn len(&self) -> io::Result<u64> {
        // A block device's metadata says 0; its end is where a seek to the end goes.
        Ok(rustix::fs::seek(&self.file, SeekFrom::End(0))?)
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.file.set_len(bytes)
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        // st_blocks counts 512 bytes, whatever the file system's block (stat(2)).
        Ok(self.file.metadata()?.blocks() * 512)
    }

    fn extent(&self, offset: u64, bytes: u64) -> io::Result<Extent> {
        let end = offset.saturating_add(bytes);
        let data = match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) => data.min(end),
            Err(Errno::NXIO) => end,
            // Block devices and some file systems cannot tell; then everything is data.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => offset,
            Err(error) => return Err(error.into()),
        };
        if data > offset {
            return Ok(Extent {
                bytes: data - offset,
                state: Provisioning::Hole,
            });
        }
        let hole = match rustix::fs::seek(&self.file, SeekFrom::Hole(offset)) {
            Ok(hole) if hole > offset => hole.min(end),
            Ok(_) | Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NXIO) => end,
            Err(error) => return Err(error.into()),
        };
        Ok(Extent {
            bytes: hole - offset,
            state: Provisioning::Mapped,
        })
    }
}
