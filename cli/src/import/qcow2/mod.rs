//! A careful, read-only reader of qcow2 images, version 2 and 3 (QEMU `docs/interop/qcow2.rst`).
//!
//! Opening walks every table once, so that what is damaged or cut off is refused before a byte is used. Deliberately
//! absent: writing, snapshots, encryption, the content of a backing file, external data files; compressed clusters and extended
//! L2 entries are recognised and left to `qemu-img`.

mod header;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use treeboot_block::{BlockDevice, BlockError, Extent, Geometry, IoFuture, Provisioning};

pub(crate) use header::Qcow2Error;
use header::{Header, be64};

/// How many L2 tables are kept in memory: 4 MiB with the usual clusters of 64 KiB, and 128 MiB with the largest. They
/// map 32 GiB at once with the usual clusters.
const L2_TABLES_KEPT: usize = 64;

/// Where a standard L2 or an L1 entry keeps its offset: bits 9 to 55.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bit 62 of an L2 entry: the cluster is compressed.
const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of an L2 entry of version 3: the cluster reads as zeroes.
const ZERO: u64 = 1;

/// One L2 table: an entry for each cluster.
type L2Table = Arc<[u64]>;

/// How a run of bytes is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Not stored: the backing file's, or zeroes where there is none.
    Absent,
    /// Reads as zeroes.
    Zero,
    /// In the file from this offset on.
    At(u64),
    /// Compressed, which is not read here.
    Compressed,
}

/// What a file says of a run of its disk by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Own {
    /// Nothing: it is the backing file's.
    Below,
    /// It is zero.
    Zero,
    /// It has bytes.
    Data,
}

/// An open image.
#[derive(Debug)]
pub(crate) struct Qcow2 {
    inner: Arc<Inner>,
    block_bytes: u32,
}

#[derive(Debug)]
struct Inner {
    file: File,
    file_bytes: u64,
    header: Header,
    l1: Vec<u64>,
    kept: Mutex<VecDeque<(u64, L2Table)>>,
    compressed: bool,
    stored_bytes: u64,
}

impl Qcow2 {
    /// Opens an image as a device of logical blocks of `block_bytes` (512 or 4096), and checks all its tables. Blocks.
    ///
    /// # Errors
    /// [`Qcow2Error`] says what is damaged or not supported, such as a backing file.
    pub(crate) fn open(path: &Path, block_bytes: u32) -> Result<Self, Qcow2Error> {
        let image = Self::open_over(path, block_bytes)?;
        match image.backing().map(str::to_owned) {
            None => Ok(image),
            Some(backing) => Err(Qcow2Error::Backing(backing)),
        }
    }

    /// As [`open`](Self::open), also of an image that has only the difference to a backing file. That file is not opened; read as a
    /// device, what is the backing file's is zero.
    pub(crate) fn open_over(path: &Path, block_bytes: u32) -> Result<Self, Qcow2Error> {
        let file = File::open(path)?;
        let file_bytes = file.metadata()?.len();
        let header = Header::read(&file, file_bytes)?;
        if !header.bytes.is_multiple_of(u64::from(block_bytes)) {
            return Err(Qcow2Error::Unsupported(
                "a disk whose size is not a multiple of its block",
            ));
        }
        let mut inner = Inner {
            file,
            file_bytes,
            l1: Vec::new(),
            header,
            kept: Mutex::new(VecDeque::new()),
            compressed: false,
            stored_bytes: 0,
        };
        if inner.header.extended_l2 {
            // Its tables are laid out otherwise; `qemu-img` checks them.
            return Ok(Self {
                inner: Arc::new(inner),
                block_bytes,
            });
        }
        let entries = usize::try_from(inner.header.l1_entries)
            .map_err(|_| Qcow2Error::Damaged("its L1 table is too large"))?;
        let mut table = vec![0; entries * 8];
        inner.file.read_exact_at(&mut table, inner.header.l1_offset)?;
        inner.l1 = table.chunks_exact(8).map(be64).collect();
        inner.check()?;
        Ok(Self {
            inner: Arc::new(inner),
            block_bytes,
        })
    }

    /// Why only `qemu-img` can read this image's content, where that is so.
    pub(crate) fn needs_qemu_img(&self) -> Option<&'static str> {
        if self.inner.header.extended_l2 {
            Some("extended L2 entries")
        } else {
            self.inner.compressed.then_some("compressed clusters")
        }
    }

    /// The file that has what this one does not, as its writer named it.
    pub(crate) fn backing(&self) -> Option<&str> {
        self.inner.header.backing.as_deref()
    }

    /// Size of a cluster in bytes: no run of [`own`](Self::own) begins or ends within one, but at the disk's end.
    pub(crate) fn cluster_bytes(&self) -> u64 {
        self.inner.header.cluster_bytes()
    }

    /// What the file has by itself from `offset` of the disk on, and for how many bytes, at most `most`. Blocks.
    ///
    /// # Errors
    /// The operating system's, or what is damaged.
    pub(crate) fn own(&self, offset: u64, most: u64) -> Result<(Own, u64), Qcow2Error> {
        let (place, bytes) = self.inner.run(offset, most)?;
        let own = match place {
            Place::Absent if self.inner.header.backing.is_some() => Own::Below,
            Place::Absent | Place::Zero => Own::Zero,
            Place::At(_) | Place::Compressed => Own::Data,
        };
        Ok((own, bytes))
    }

    /// Bytes of the disk that have storage in the file.
    pub(crate) fn stored_bytes(&self) -> u64 {
        self.inner.stored_bytes
    }
}

impl Inner {
    /// Walks all tables: every entry lies within the file and is aligned, and none is of a kind not known.
    fn check(&mut self) -> Result<(), Qcow2Error> {
        let cluster = self.header.cluster_bytes();
        for index in 0..self.l1.len() as u64 {
            let Some(table) = self.l2_from_file(index)? else {
                continue;
            };
            for (entry, guest) in table
                .iter()
                .zip((index * self.header.l2_reach()..).step_by(cluster as usize))
            {
                if guest >= self.header.bytes {
                    break;
                }
                match self.place(*entry, guest)? {
                    Place::Absent | Place::Zero => {}
                    Place::At(_) => self.stored_bytes += cluster.min(self.header.bytes - guest),
                    Place::Compressed => self.compressed = true,
                }
            }
        }
        Ok(())
    }

    /// What an L2 entry says of the cluster at `guest`.
    fn place(&self, entry: u64, guest: u64) -> Result<Place, Qcow2Error> {
        let cluster = self.header.cluster_bytes();
        if entry & COMPRESSED != 0 {
            let (offset, bytes) = self.header.compressed(entry);
            // The length is rounded up to sectors, and the last sector of a file need not be whole.
            let end = offset.saturating_add(bytes).saturating_sub(511);
            return if end > self.file_bytes {
                Err(self.cut_off(guest, end))
            } else {
                Ok(Place::Compressed)
            };
        }
        if entry & ZERO != 0 && self.header.version >= 3 {
            return Ok(Place::Zero);
        }
        let offset = entry & OFFSET_MASK;
        if offset == 0 {
            return Ok(Place::Absent);
        }
        if !offset.is_multiple_of(cluster) {
            return Err(Qcow2Error::Damaged("a cluster's offset is not aligned"));
        }
        // The last cluster of a disk need not be whole.
        let end = offset.saturating_add(cluster.min(self.header.bytes - guest));
        if end > self.file_bytes {
            Err(self.cut_off(guest, end))
        } else {
            Ok(Place::At(offset))
        }
    }

    fn cut_off(&self, guest: u64, needed: u64) -> Qcow2Error {
        Qcow2Error::CutOff {
            guest,
            needed,
            file_bytes: self.file_bytes,
        }
    }

    /// The L2 table of an L1 index, from memory or from the file; none where nothing below is stored.
    fn l2(&self, index: u64) -> Result<Option<L2Table>, Qcow2Error> {
        {
            let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some((_, table)) = kept.iter().find(|(kept, _)| *kept == index) {
                return Ok(Some(Arc::clone(table)));
            }
        }
        let Some(table) = self.l2_from_file(index)? else {
            return Ok(None);
        };
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= L2_TABLES_KEPT {
            kept.pop_front();
        }
        kept.push_back((index, Arc::clone(&table)));
        Ok(Some(table))
    }

    fn l2_from_file(&self, index: u64) -> Result<Option<L2Table>, Qcow2Error> {
        let entry = usize::try_from(index)
            .ok()
            .and_then(|index| self.l1.get(index))
            .copied()
            .unwrap_or(0);
        let offset = entry & OFFSET_MASK;
        if offset == 0 {
            return Ok(None);
        }
        let cluster = self.header.cluster_bytes();
        if !offset.is_multiple_of(cluster) {
            return Err(Qcow2Error::Damaged("an L2 table's offset is not aligned"));
        }
        let end = offset.saturating_add(cluster);
        if end > self.file_bytes {
            return Err(self.cut_off(index * self.header.l2_reach(), end));
        }
        let mut table = vec![0; cluster as usize]; // at most 2 MiB
        self.file.read_exact_at(&mut table, offset)?;
        Ok(Some(table.chunks_exact(8).map(be64).collect()))
    }

    /// The run that begins at `guest`: its place and its length, which is at most `most` and stays within one L2
    /// table. Clusters that follow each other in the file are one run.
    fn run(&self, guest: u64, most: u64) -> Result<(Place, u64), Qcow2Error> {
        let cluster = self.header.cluster_bytes();
        let reach = self.header.l2_reach();
        let most = most.min(reach - guest % reach);
        let Some(table) = self.l2(guest / reach)? else {
            return Ok((Place::Absent, most));
        };
        let within = guest % cluster;
        let mut first = None;
        let mut bytes = 0;
        while bytes < most {
            let at = guest + bytes;
            let entry = table.get(((at % reach) / cluster) as usize).copied().unwrap_or(0);
            let place = self.place(entry, at - at % cluster)?;
            let fits = match (first, place) {
                (None, _) => true,
                (Some(Place::At(first)), Place::At(here)) => first + (at - guest + within) == here,
                (Some(first), here) => first == here,
            };
            if !fits {
                break;
            }
            first = first.or(Some(place));
            bytes += cluster - at % cluster;
        }
        let place = match first.unwrap_or(Place::Absent) {
            Place::At(offset) => Place::At(offset + within),
            other => other,
        };
        Ok((place, bytes.min(most)))
    }

    fn read(&self, mut guest: u64, mut buffer: &mut [u8]) -> Result<(), Qcow2Error> {
        while !buffer.is_empty() {
            let (place, bytes) = self.run(guest, buffer.len() as u64)?;
            let (now, rest) = buffer.split_at_mut(bytes as usize); // at most the buffer's length
            match place {
                Place::Absent | Place::Zero => now.fill(0),
                Place::At(offset) => self.file.read_exact_at(now, offset)?,
                Place::Compressed => {
                    return Err(Qcow2Error::Damaged(
                        "a cluster became compressed while it was read",
                    ));
                }
            }
            guest += bytes;
            buffer = rest;
        }
        Ok(())
    }
}

fn block_error(error: Qcow2Error, offset: u64) -> BlockError {
    match error {
        Qcow2Error::Io(source) => BlockError::Io { offset, source },
        other => BlockError::Corrupt {
            what: other.to_string(),
        },
    }
}

async fn blocking<T: Send + 'static>(
    offset: u64,
    work: impl FnOnce() -> Result<T, Qcow2Error> + Send + 'static,
) -> Result<T, BlockError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|_| {
        Err(Qcow2Error::Io(io::Error::other(
            "the reader of a qcow2 image failed",
        )))
    })
    .map_err(|error| block_error(error, offset))
}

impl BlockDevice for Qcow2 {
    fn geometry(&self) -> Geometry {
        Geometry {
            bytes: self.inner.header.bytes,
            block_bytes: self.block_bytes,
            physical_block_bytes: 4096,
            read_only: true,
            thin: true,
        }
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> IoFuture<'a, ()> {
        Box::pin(async move {
            self.check_range(offset, buf.len() as u64)?;
            let (inner, mut bytes) = (Arc::clone(&self.inner), vec![0; buf.len()]);
            let read = blocking(offset, move || inner.read(offset, &mut bytes).map(|()| bytes)).await?;
            buf.copy_from_slice(&read);
            Ok(())
        })
    }

    fn write<'a>(&'a self, _offset: u64, _data: &'a [u8]) -> IoFuture<'a, ()> {
        Box::pin(std::future::ready(Err(BlockError::ReadOnly)))
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn discard(&self, _offset: u64, _bytes: u64) -> IoFuture<'_, ()> {
        Box::pin(std::future::ready(Err(BlockError::ReadOnly)))
    }

    fn extent(&self, offset: u64, bytes: u64) -> IoFuture<'_, Extent> {
        Box::pin(async move {
            self.check_range(offset, bytes)?;
            let inner = Arc::clone(&self.inner);
            blocking(offset, move || {
                let (place, mut length) = inner.run(offset, bytes)?;
                let state = match place {
                    Place::Absent | Place::Zero => Provisioning::Hole,
                    Place::At(_) | Place::Compressed => Provisioning::Mapped,
                };
                // Empty parts of a large image are told at once, not table by table.
                while state == Provisioning::Hole && length < bytes {
                    match inner.run(offset + length, bytes - length)? {
                        (Place::Absent | Place::Zero, more) => length += more,
                        _ => break,
                    }
                }
                Ok(Extent { bytes: length, state })
            })
            .await
        })
    }
}
