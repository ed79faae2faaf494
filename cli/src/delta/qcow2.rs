//! Writing a qcow2 image, version 3, front to back (QEMU `docs/interop/qcow2.rst`).
//!
//! The disk's bytes come in ascending order, so one L2 table and one cluster are in memory at a time. The L1 table's place is kept free behind
//! the header; reference counts come last, when it is known how many clusters there are. Deliberately absent: compression, snapshots, encryption.

use std::fs::File;
use std::io::{self, BufWriter, Seek as _, SeekFrom, Write as _};
use std::path::Path;

/// Bit 63 of an L1 or L2 entry: its cluster has one reference.
const COPIED: u64 = 1 << 63;
/// Bit 0 of an L2 entry: the cluster reads as zeroes.
const ZERO: u64 = 1;
/// Length of the header.
const HEADER_BYTES: u32 = 104;
/// Reference counts are of 2^4 bits.
const REFCOUNT_ORDER: u32 = 4;
const REFCOUNT_BYTES: u64 = 2;
/// The header extension that names a backing file's format.
const BACKING_FORMAT: u32 = 0xe279_2aca;
/// QEMU's own limit on an L1 table (`QCOW_MAX_L1_SIZE`), in bytes.
const MAX_L1_BYTES: u64 = 32 << 20;
/// The longest name of a backing file that the format allows, and that fits beside the header into the smallest cluster.
const MAX_BACKING_NAME: usize = 1023;

/// What lies below an image.
#[derive(Debug, Clone, Copy)]
pub(super) struct Backing<'a> {
    /// As the file will name it.
    pub(super) name: &'a str,
    /// `raw` or `qcow2`.
    pub(super) format: &'static str,
}

/// An image in the making.
pub(super) struct Writer<'a> {
    file: BufWriter<File>,
    cluster_bits: u32,
    bytes: u64,
    backing: Option<Backing<'a>>,
    l1: Vec<u64>,
    /// The L2 table in the making, and its number.
    l2: (u64, Vec<u64>),
    /// The cluster in the making, and its number.
    cluster: Option<(u64, Vec<u8>)>,
    /// The file's next cluster.
    next: u64,
}

impl<'a> Writer<'a> {
    /// Begins an image of a disk of `bytes` in clusters of two to the power of `cluster_bits`; what is not written is a backing file's, or zeroes.
    ///
    /// # Errors
    /// The file exists or cannot be written, or the disk is too large for clusters of this size.
    pub(super) fn create(
        path: &Path,
        bytes: u64,
        cluster_bits: u32,
        backing: Option<Backing<'a>>,
    ) -> io::Result<Self> {
        let cluster = 1u64 << cluster_bits;
        let reach = cluster / 8 * cluster;
        let l1_entries = bytes.div_ceil(reach);
        let too_long = backing.is_some_and(|backing| backing.name.len() > MAX_BACKING_NAME);
        if l1_entries * 8 > MAX_L1_BYTES || too_long {
            let why = "the disk is too large, or the backing file's name too long, for a qcow2 image";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        let mut writer = Self {
            file: BufWriter::with_capacity(1 << 20, File::create_new(path)?),
            cluster_bits,
            bytes,
            backing,
            l1: vec![0; l1_entries as usize],
            l2: (0, Vec::new()),
            cluster: None,
            next: 1 + (l1_entries * 8).div_ceil(cluster),
        };
        writer.file.seek(SeekFrom::Start(writer.next * cluster))?;
        Ok(writer)
    }

    fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Takes bytes of the disk; `offset` is no less than where the last ones ended.
    ///
    /// # Errors
    /// The operating system's.
    pub(super) fn data(&mut self, mut offset: u64, mut data: &[u8]) -> io::Result<()> {
        let bytes = self.cluster_bytes();
        while !data.is_empty() {
            let (number, within) = (offset / bytes, (offset % bytes) as usize);
            let now = (bytes as usize - within).min(data.len());
            if self.cluster.as_ref().is_none_or(|(open, _)| *open != number) {
                self.end_cluster()?;
                self.cluster = Some((number, vec![0; bytes as usize]));
            }
            if let Some((_, cluster)) = &mut self.cluster {
                cluster[within..within + now].copy_from_slice(&data[..now]);
            }
            offset += now as u64;
            data = &data[now..];
        }
        Ok(())
    }

    /// Takes zeroes, which hide what lies below. Only whole clusters; the last one of the disk may be a short one.
    ///
    /// # Errors
    /// The operating system's.
    pub(super) fn zeroes(&mut self, offset: u64, bytes: u64) -> io::Result<()> {
        if self.backing.is_none() {
            return Ok(());
        }
        self.end_cluster()?;
        let cluster = self.cluster_bytes();
        for number in offset / cluster..(offset + bytes).div_ceil(cluster) {
            self.entry(number, ZERO)?;
        }
        Ok(())
    }

    fn end_cluster(&mut self) -> io::Result<()> {
        let Some((number, cluster)) = self.cluster.take() else {
            return Ok(());
        };
        if self.backing.is_none() && cluster.iter().all(|byte| *byte == 0) {
            return Ok(());
        }
        // The table before it in the file, where this is the first of another one.
        self.table_of(number)?;
        let place = self.append(&cluster)?;
        self.entry(number, place | COPIED)
    }

    /// Writes at the end of the file; where, in bytes.
    fn append(&mut self, cluster: &[u8]) -> io::Result<u64> {
        let place = self.next * self.cluster_bytes();
        self.file.write_all(cluster)?;
        self.next += (cluster.len() as u64).div_ceil(self.cluster_bytes());
        Ok(place)
    }

    fn table_of(&mut self, number: u64) -> io::Result<()> {
        let table = number / (self.cluster_bytes() / 8);
        if self.l2.0 != table {
            self.end_table()?;
            self.l2.0 = table;
        }
        Ok(())
    }

    fn entry(&mut self, number: u64, entry: u64) -> io::Result<()> {
        self.table_of(number)?;
        let entries = self.cluster_bytes() / 8;
        self.l2.1.resize(entries as usize, 0);
        self.l2.1[(number % entries) as usize] = entry;
        Ok(())
    }

    fn end_table(&mut self) -> io::Result<()> {
        let table = std::mem::take(&mut self.l2.1);
        if !table.is_empty() {
            let place = self.append(&big_endian(&table))?;
            self.l1[self.l2.0 as usize] = place | COPIED;
        }
        Ok(())
    }

    /// Ends the image and makes it durable. Its size in bytes.
    ///
    /// # Errors
    /// The operating system's.
    pub(super) fn finish(mut self) -> io::Result<u64> {
        self.end_cluster()?;
        self.end_table()?;
        let cluster = self.cluster_bytes();
        // Counts for all clusters before them, for themselves, and for the table that names them.
        let counts = cluster / REFCOUNT_BYTES;
        let (mut blocks, mut table) = (1, 1);
        while blocks * counts < self.next + blocks + table || table * cluster < blocks * 8 {
            blocks = (self.next + blocks + table).div_ceil(counts);
            table = (blocks * 8).div_ceil(cluster);
        }
        let first = self.next;
        let used = first + blocks + table;
        for block in 0..blocks {
            let ones = used.saturating_sub(block * counts).min(counts);
            let mut counted = [0, 1].repeat(ones as usize);
            counted.resize(cluster as usize, 0);
            self.append(&counted)?;
        }
        let places: Vec<_> = (first..first + blocks).map(|number| number * cluster).collect();
        let mut places = big_endian(&places);
        places.resize((table * cluster) as usize, 0);
        let table_at = self.append(&places)?;
        self.file.seek(SeekFrom::Start(0))?;
        let header = self.header(table_at, table);
        self.file.write_all(&header)?;
        self.file.seek(SeekFrom::Start(cluster))?;
        let l1 = big_endian(&self.l1);
        self.file.write_all(&l1)?;
        let file = self.file.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_all()?;
        Ok(used * cluster)
    }

    fn header(&self, refcount_table: u64, refcount_clusters: u64) -> Vec<u8> {
        let mut header = Vec::with_capacity(4096);
        let mut put = |bytes: &[u8]| header.extend_from_slice(bytes);
        let name = self.backing.map_or("", |backing| backing.name);
        // Behind the header come one extension, padded to 8 bytes, the end of extensions, and the name.
        let extension = self.backing.map(|backing| backing.format.as_bytes());
        let extension_bytes = extension.map_or(0, |format| 8 + format.len().next_multiple_of(8));
        let name_at = match name.is_empty() {
            true => 0,
            false => u64::from(HEADER_BYTES) + extension_bytes as u64 + 8,
        };
        put(b"QFI\xfb");
        put(&3u32.to_be_bytes());
        put(&name_at.to_be_bytes());
        put(&(name.len() as u32).to_be_bytes());
        put(&self.cluster_bits.to_be_bytes());
        put(&self.bytes.to_be_bytes());
        put(&0u32.to_be_bytes()); // no encryption
        put(&(self.l1.len() as u32).to_be_bytes());
        put(&self.cluster_bytes().to_be_bytes()); // the L1 table, behind the header
        put(&refcount_table.to_be_bytes());
        put(&(refcount_clusters as u32).to_be_bytes());
        put(&[0; 4 + 8]); // no snapshots
        put(&[0; 3 * 8]); // no features
        put(&REFCOUNT_ORDER.to_be_bytes());
        put(&HEADER_BYTES.to_be_bytes());
        if let Some(format) = extension {
            put(&BACKING_FORMAT.to_be_bytes());
            put(&(format.len() as u32).to_be_bytes());
            put(format);
            put(&vec![0; format.len().next_multiple_of(8) - format.len()]);
        }
        put(&[0; 8]);
        put(name.as_bytes());
        header
    }
}

fn big_endian(entries: &[u64]) -> Vec<u8> {
    entries.iter().flat_map(|entry| entry.to_be_bytes()).collect()
}
