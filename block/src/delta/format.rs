//! The delta's file: where things are, and its two headers.
//!
//! | offset | bytes | what |
//! | --- | --- | --- |
//! | 0 | 4096 | header: what the file is and which base it belongs to |
//! | 4096 | 4096 | boot header: in which boot of the machine the volatile map was written |
//! | 8192 | M | durable map: 2 bits a block, written only after the data was synced |
//! | 8192 + M | M | volatile map: the same, written before each write is acknowledged |
//! | 8192 + 2 M | size of the disk | data, each block at its own place, sparse |
//! | 8192 + 2 M + size | 4096 | seal of a frozen layer: checksums of the map and of the checksums' place |
//! | after it | 4 bytes a block | CRC32C of each block of data of a sealed layer, sparse |
//!
//! M is a quarter of a byte a block, rounded up to 4096. Numbers are little-endian. Each header fits a sector of 512
//! bytes, which a disk writes wholly or not at all.

use std::path::Path;

use treeboot_types::Digest;

use super::{BootId, DeltaError, DeltaMeta};
use crate::verity::sha256;

/// The unit of copy on write, in bytes.
pub(super) const BLOCK: u64 = 4096;
/// Blocks whose states fit a word of the map.
pub(super) const BLOCKS_A_WORD: u64 = 32;

const MAGIC: &[u8; 8] = b"TBDELTA\0";
const BOOT_MAGIC: &[u8; 8] = b"TBBOOT\0\0";
/// The format that this code reads and writes.
const VERSION: u32 = 1;
/// Bytes of the header before its checksum: magic, version, block, digest, size.
const USED: usize = 8 + 4 + 4 + 32 + 8;
/// Bytes of the boot header before its checksum: magic, boot id, flag.
const BOOT_USED: usize = 8 + 16 + 1;
/// Bytes of a header that are ever written.
pub(super) const SECTOR: usize = 512;

pub(super) const BOOT_OFFSET: u64 = 4096;
pub(super) const DURABLE_OFFSET: u64 = 8192;

/// Where things are in the file of a disk of some size.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    pub(super) disk_bytes: u64,
    pub(super) blocks: u64,
    pub(super) words: u64,
    pub(super) map_bytes: u64,
    pub(super) volatile_offset: u64,
    pub(super) data_offset: u64,
    pub(super) file_bytes: u64,
}

impl Layout {
    pub(super) fn new(disk_bytes: u64) -> Self {
        let blocks = disk_bytes.div_ceil(BLOCK);
        let words = blocks.div_ceil(BLOCKS_A_WORD);
        let map_bytes = (words * 8).next_multiple_of(BLOCK);
        let volatile_offset = DURABLE_OFFSET + map_bytes;
        let data_offset = volatile_offset + map_bytes;
        Self {
            disk_bytes,
            blocks,
            words,
            map_bytes,
            volatile_offset,
            data_offset,
            file_bytes: data_offset + blocks * BLOCK,
        }
    }
}

/// What the first sector is.
pub(super) enum Header {
    /// All zero: never written, or lost in a crash before the first flush.
    Absent,
    /// This delta's.
    Ours,
}

pub(super) fn encode_header(meta: &DeltaMeta) -> [u8; SECTOR] {
    let mut sector = [0; SECTOR];
    let mut put = |at: usize, bytes: &[u8]| sector[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, MAGIC);
    put(8, &VERSION.to_le_bytes());
    put(12, &(BLOCK as u32).to_le_bytes());
    put(16, &meta.digest.0);
    put(48, &meta.bytes.to_le_bytes());
    let checksum = sha256(&sector[..USED]);
    sector[USED..USED + 32].copy_from_slice(&checksum.0);
    sector
}

/// The base that a header names, whatever else may be wrong with the file.
pub(super) fn base_of(sector: &[u8; SECTOR]) -> Option<DeltaMeta> {
    let (bytes, _) = sector.get(48..56)?.split_first_chunk::<8>()?;
    let meta = DeltaMeta {
        digest: Digest::from_slice(&sector[16..48]).ok()?,
        bytes: u64::from_le_bytes(*bytes),
    };
    (*sector == encode_header(&meta)).then_some(meta)
}

pub(super) fn check_header(
    sector: &[u8; SECTOR],
    path: &Path,
    meta: &DeltaMeta,
) -> Result<Header, DeltaError> {
    if *sector == encode_header(meta) {
        return Ok(Header::Ours);
    }
    if sector.iter().all(|&byte| byte == 0) {
        return Ok(Header::Absent);
    }
    let path = path.into();
    if sector[..8] != MAGIC[..] {
        return Err(DeltaError::NotADelta { path });
    }
    // The version first: what follows it belongs to the version, the checksum too.
    let number = |at: usize| u32::from_le_bytes([sector[at], sector[at + 1], sector[at + 2], sector[at + 3]]);
    let found = number(8);
    if found > VERSION {
        return Err(DeltaError::Version {
            path,
            found,
            known: VERSION,
        });
    }
    if sha256(&sector[..USED]).0 != sector[USED..USED + 32] {
        return Err(DeltaError::Damaged {
            path,
            what: "its header's checksum is wrong".into(),
        });
    }
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&sector[48..56]);
    Err(DeltaError::OtherBase {
        path,
        found: DeltaMeta {
            digest: Digest::from_slice(&sector[16..48]).unwrap_or(Digest([0; 32])),
            bytes: u64::from_le_bytes(bytes),
        },
        expected: *meta,
    })
}

/// What the boot header says.
pub(super) struct Boot {
    pub(super) id: BootId,
    /// A sync failed in that boot, so what is in the operating system's cache may not be on the disk.
    pub(super) doubtful: bool,
}

pub(super) fn encode_boot(boot: &Boot) -> [u8; SECTOR] {
    let mut sector = [0; SECTOR];
    sector[..8].copy_from_slice(BOOT_MAGIC);
    sector[8..24].copy_from_slice(&boot.id.0);
    sector[24] = boot.doubtful.into();
    let checksum = sha256(&sector[..BOOT_USED]);
    sector[BOOT_USED..BOOT_USED + 32].copy_from_slice(&checksum.0);
    sector
}

/// `None` where there is none or it is damaged: then the volatile map is not to be trusted.
pub(super) fn decode_boot(sector: &[u8; SECTOR]) -> Option<Boot> {
    let mut id = [0; 16];
    id.copy_from_slice(&sector[8..24]);
    let boot = Boot {
        id: BootId(id),
        doubtful: sector[24] == 1,
    };
    (*sector == encode_boot(&boot)).then_some(boot)
}
