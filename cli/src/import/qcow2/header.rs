//! The header of a qcow2 image (QEMU `docs/interop/qcow2.rst`, "Header").

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::output::printable;

/// Length of the header of version 2, and the part of version 3's that is looked at.
const V2_BYTES: usize = 72;
const V3_BYTES: usize = 104;

/// QEMU's own limit on an L1 table (`QCOW_MAX_L1_SIZE`).
const MAX_L1_BYTES: u64 = 32 << 20;

/// The longest name of a backing file that the format allows.
const MAX_BACKING_NAME: u32 = 1023;

const DIRTY: u64 = 1;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION_TYPE: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

/// Why a qcow2 image cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Qcow2Error {
    /// The operating system refused.
    #[error("reading it failed")]
    Io(#[from] io::Error),
    /// The file ends before what its tables speak of.
    #[error(
        "it is truncated: the disk's byte {guest} needs a file of {needed} bytes, and there are {file_bytes}"
    )]
    CutOff {
        /// Offset in the disk.
        guest: u64,
        /// How long the file must be at least.
        needed: u64,
        /// How long it is.
        file_bytes: u64,
    },
    /// The file is shorter than its header.
    #[error("it is truncated: {0} bytes do not hold a header")]
    NoHeader(u64),
    /// A value that no writer makes.
    #[error("it is damaged: {0}")]
    Damaged(&'static str),
    /// Something that is not read here.
    #[error("{0} is not supported")]
    Unsupported(&'static str),
    /// A difference to another image.
    #[error("it has the backing file '{0}'")]
    Backing(String),
}

impl Qcow2Error {
    /// What to do about it.
    pub(crate) fn advice(&self, path: &Path) -> Option<String> {
        let path = path.display();
        match self {
            Self::CutOff { .. } | Self::NoHeader(_) => {
                Some("copy or download it again; 'qemu-img check' tells more".into())
            }
            Self::Damaged(_) => Some(format!("see what can be saved: qemu-img check {path}")),
            Self::Unsupported(_) | Self::Backing(_) => Some(format!(
                "convert it to a plain image first: qemu-img convert -O raw {path} PLAIN.raw"
            )),
            Self::Io(_) => None,
        }
    }
}

/// What the header says, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    /// 2 or 3.
    pub(super) version: u32,
    /// A cluster is two to this power in bytes: 9 to 21.
    pub(super) cluster_bits: u32,
    /// Size of the disk.
    pub(super) bytes: u64,
    /// Where the L1 table is.
    pub(super) l1_offset: u64,
    /// As many of its entries as the disk's size needs.
    pub(super) l1_entries: u64,
    /// L2 entries are of 128 bits, for subclusters.
    pub(super) extended_l2: bool,
    /// The file that has what is not stored here, as its writer named it.
    pub(super) backing: Option<String>,
}

impl Header {
    /// Reads and checks the header of a file of `file_bytes` bytes.
    pub(super) fn read(file: &File, file_bytes: u64) -> Result<Self, Qcow2Error> {
        let mut head = vec![0; V3_BYTES.min(usize::try_from(file_bytes).unwrap_or(V3_BYTES))];
        file.read_exact_at(&mut head, 0)?;
        let mut header = Self::parse(&head, file_bytes)?;
        let (offset, length) = (field64(&head, 8)?, field32(&head, 16)?);
        if offset != 0 {
            if length > MAX_BACKING_NAME {
                return Err(Qcow2Error::Damaged("the name of its backing file is too long"));
            }
            let mut name = vec![0; length as usize];
            file.read_exact_at(&mut name, offset)?;
            header.backing = Some(printable(&String::from_utf8_lossy(&name)));
        }
        Ok(header)
    }

    fn parse(head: &[u8], file_bytes: u64) -> Result<Self, Qcow2Error> {
        let short = || Qcow2Error::NoHeader(file_bytes);
        if head.len() < V2_BYTES {
            return Err(short());
        }
        if !head.starts_with(b"QFI\xfb") {
            return Err(Qcow2Error::Damaged("it does not begin like a qcow2 image"));
        }
        let version = field32(head, 4)?;
        let extended_l2 = match version {
            2 => false,
            3 if head.len() < V3_BYTES => return Err(short()),
            3 => features(field64(head, 72)?)?,
            _ => return Err(Qcow2Error::Unsupported("its version (neither 2 nor 3)")),
        };
        if field32(head, 32)? != 0 {
            return Err(Qcow2Error::Unsupported("encryption"));
        }
        let cluster_bits = field32(head, 20)?;
        if !(9..=21).contains(&cluster_bits) {
            return Err(Qcow2Error::Damaged(
                "its cluster size is not between 512 bytes and 2 MiB",
            ));
        }
        let bytes = field64(head, 24)?;
        if bytes == 0 || !bytes.is_multiple_of(512) || i64::try_from(bytes).is_err() {
            return Err(Qcow2Error::Damaged(
                "its disk is empty or its size is no multiple of 512",
            ));
        }
        let mut header = Self {
            version,
            cluster_bits,
            bytes,
            l1_offset: field64(head, 40)?,
            l1_entries: 0,
            extended_l2,
            backing: None,
        };
        let needed = bytes.div_ceil(header.l2_reach());
        if needed > u64::from(field32(head, 36)?) {
            return Err(Qcow2Error::Damaged(
                "its L1 table is too short for the disk's size",
            ));
        }
        if needed > MAX_L1_BYTES / 8 {
            return Err(Qcow2Error::Unsupported("an L1 table of more than 32 MiB"));
        }
        if !header.l1_offset.is_multiple_of(header.cluster_bytes()) || header.l1_offset == 0 {
            return Err(Qcow2Error::Damaged("its L1 table's offset is not aligned"));
        }
        let end = header.l1_offset.saturating_add(needed * 8);
        if end > file_bytes {
            return Err(Qcow2Error::CutOff {
                guest: 0,
                needed: end,
                file_bytes,
            });
        }
        header.l1_entries = needed;
        Ok(header)
    }

    /// Size of a cluster in bytes.
    pub(super) fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// How many bytes of the disk one L2 table maps.
    pub(super) fn l2_reach(&self) -> u64 {
        let entry_bits = if self.extended_l2 { 4 } else { 3 };
        1 << (2 * self.cluster_bits - entry_bits)
    }

    /// Offset and length in bytes of a compressed cluster ("Compressed Clusters Descriptor").
    pub(super) fn compressed(&self, entry: u64) -> (u64, u64) {
        let split = 62 - (self.cluster_bits - 8);
        let offset = entry & ((1 << split) - 1);
        let more_sectors = (entry & ((1 << 62) - 1)) >> split;
        (offset, (more_sectors + 1) * 512 - offset % 512)
    }
}

/// Checks the incompatible features; whether L2 entries are extended.
fn features(features: u64) -> Result<bool, Qcow2Error> {
    if features & CORRUPT != 0 {
        return Err(Qcow2Error::Damaged("its writer marked it as corrupt"));
    }
    if features & EXTERNAL_DATA != 0 {
        return Err(Qcow2Error::Unsupported("an external data file"));
    }
    // Dirty means that reference counts may be wrong, and these are not looked at; the type of compression matters
    // to qemu-img only.
    if features & !(DIRTY | COMPRESSION_TYPE | EXTENDED_L2) != 0 {
        return Err(Qcow2Error::Unsupported(
            "a feature that this version does not know",
        ));
    }
    Ok(features & EXTENDED_L2 != 0)
}

/// Eight bytes as a number; fewer, which no caller has, are zero.
pub(super) fn be64(bytes: &[u8]) -> u64 {
    bytes.try_into().map_or(0, u64::from_be_bytes)
}

fn field64(head: &[u8], at: usize) -> Result<u64, Qcow2Error> {
    let bytes = head.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
    bytes
        .map(u64::from_be_bytes)
        .ok_or(Qcow2Error::NoHeader(head.len() as u64))
}

fn field32(head: &[u8], at: usize) -> Result<u32, Qcow2Error> {
    let bytes = head.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
    bytes
        .map(u32::from_be_bytes)
        .ok_or(Qcow2Error::NoHeader(head.len() as u64))
}
