//! bcache's superblocks, byte by byte (kernel `drivers/md/bcache/bcache_ondisk.h`, once `include/uapi/linux/bcache.h`). Pure.
//!
//! Little-endian, at sector 8 of the device. Fields by offset: checksum 0, own sector 8, version 16, magic 24, UUID 40, UUID of
//! the set 56, label 72, flags 104, sequence 112, features 120 to 143, reserved 144 to 183; then of a cache: buckets 184, block
//! 192, bucket 194, devices in the set 196, index 198; of a backing device: data offset 184, block 192; then time of the last
//! mount 200, first bucket 204, number of journal buckets 206, journal buckets from 208.

use super::Uuid;
use crate::Sectors;

/// Where a superblock stands.
pub const SUPERBLOCK: Sectors = Sectors(8);

/// A backing device's data begins here, so these sectors must be local. The least that the kernel takes.
pub const DATA_OFFSET: Sectors = Sectors(16);

/// A superblock with its room.
pub const SUPERBLOCK_BYTES: usize = 4096;

/// Version of a cache device; it has its UUID in the superblock.
const CACHE_VERSION: u64 = 3;

/// Version of a backing device that says where its data begins.
const BACKING_VERSION: u64 = 4;

const MAGIC: [u8; 16] = [
    0xc6, 0x85, 0x73, 0xf6, 0x4e, 0x1a, 0x45, 0xca, 0x82, 0x65, 0xf5, 0x7f, 0x48, 0xba, 0x6d, 0x81,
];

/// End of the fixed fields; journal buckets follow, 8 bytes each.
const FIXED_BYTES: usize = 208;

/// Journal buckets that a superblock has room for.
const MAX_JOURNAL_BUCKETS: u16 = 256;

/// The kernel makes its reserve of free buckets from the 1024th part of their number, and takes no cache whose reserve is
/// empty.
const MIN_BUCKETS: u64 = 1024;

/// Buckets to aim for. The reserve of free buckets is their 1024th part, and a read that finds it empty is not cached: of
/// 16 MiB read at 20 MB/s, 2,560 buckets missed 4.7 % and 16,384 missed 3.0 % (docs/kernel-plane.md).
const WANTED_BUCKETS: u64 = 16_384;

/// Smallest bucket, 64 KiB. A set's table of images fills one bucket, 128 bytes each: 512 images in a cache's life.
const MIN_BUCKET: u64 = 128;

/// Largest bucket, 512 KiB, which is what bcache's own tools use.
const MAX_BUCKET: u64 = 1024;

/// A cache device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheSuperblock {
    /// The device's own.
    pub uuid: Uuid,
    /// The set's.
    pub set: Uuid,
    /// Number of buckets.
    pub buckets: u64,
    /// Length of a bucket.
    pub bucket: Sectors,
}

/// A backing device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackingSuperblock {
    /// The device's own. A set knows its cached blocks by it, so it follows from the content: see [`Uuid::of_content`].
    pub uuid: Uuid,
    /// The set to attach to at registration; zero for none.
    pub set: Uuid,
    /// Where the data begins.
    pub data_offset: Sectors,
}

/// Why bytes are not a superblock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SuperblockError {
    /// Not bcache's.
    #[error("no bcache superblock")]
    NotBcache,
    /// Damaged.
    #[error("a bcache superblock whose checksum is wrong")]
    Checksum,
    /// Another kind, or a version that is not written here.
    #[error("a bcache superblock of version {0}")]
    Version(u64),
}

impl CacheSuperblock {
    /// A new cache on a device of `length`, with buckets as [`WANTED_BUCKETS`] says; `None` where the device is too small,
    /// which is below 64 MiB.
    pub fn new(uuid: Uuid, set: Uuid, length: Sectors) -> Option<Self> {
        let mut bucket = MIN_BUCKET;
        while bucket < MAX_BUCKET && length.0 / (bucket * 2) >= WANTED_BUCKETS {
            bucket *= 2;
        }
        let buckets = length.0 / bucket;
        (buckets >= MIN_BUCKETS).then_some(Self {
            uuid,
            set,
            buckets,
            bucket: Sectors(bucket),
        })
    }

    /// The superblock of a cache that is empty.
    pub fn encode(&self) -> [u8; SUPERBLOCK_BYTES] {
        let bucket = self.bucket.0.min(u64::from(u16::MAX)) as u16;
        let mut bytes = common(CACHE_VERSION, self.uuid, self.set);
        put(&mut bytes, 184, &self.buckets.to_le_bytes());
        put(&mut bytes, 194, &bucket.to_le_bytes());
        put(&mut bytes, 196, &1_u16.to_le_bytes());
        // Whole buckets that cover the superblock, which ends before sector 24.
        let first = 23 / bucket.max(1) + 1;
        put(&mut bytes, 204, &first.to_le_bytes());
        sealed(bytes)
    }

    /// Reads a cache's superblock.
    ///
    /// # Errors
    /// [`SuperblockError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, SuperblockError> {
        let fields = Fields::checked(bytes)?;
        match fields.number(16)? {
            // 0 and 3 differ in the table of images alone, 5 has features.
            0 | 3 | 5 => {}
            version => return Err(SuperblockError::Version(version)),
        }
        Ok(Self {
            uuid: fields.uuid(40)?,
            set: fields.uuid(56)?,
            buckets: fields.number(184)?,
            bucket: Sectors(u64::from(fields.short(194)?)),
        })
    }
}

impl BackingSuperblock {
    /// The superblock of a device that was never attached.
    pub fn encode(&self) -> [u8; SUPERBLOCK_BYTES] {
        let mut bytes = common(BACKING_VERSION, self.uuid, self.set);
        put(&mut bytes, 184, &self.data_offset.0.to_le_bytes());
        sealed(bytes)
    }

    /// Reads a backing device's superblock.
    ///
    /// # Errors
    /// [`SuperblockError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, SuperblockError> {
        let fields = Fields::checked(bytes)?;
        match fields.number(16)? {
            4 | 6 => {}
            version => return Err(SuperblockError::Version(version)),
        }
        Ok(Self {
            uuid: fields.uuid(40)?,
            set: fields.uuid(56)?,
            data_offset: Sectors(fields.number(184)?),
        })
    }
}

fn common(version: u64, uuid: Uuid, set: Uuid) -> [u8; SUPERBLOCK_BYTES] {
    let mut bytes = [0; SUPERBLOCK_BYTES];
    put(&mut bytes, 8, &SUPERBLOCK.0.to_le_bytes());
    put(&mut bytes, 16, &version.to_le_bytes());
    put(&mut bytes, 24, &MAGIC);
    put(&mut bytes, 40, &uuid.0);
    put(&mut bytes, 56, &set.0);
    // Blocks of 4 KiB: the kernel takes none below the device's own, verity's are that long, and a set takes no image whose
    // blocks are shorter than its own.
    put(&mut bytes, 192, &8_u16.to_le_bytes());
    bytes
}

fn put(bytes: &mut [u8; SUPERBLOCK_BYTES], offset: usize, field: &[u8]) {
    bytes[offset..offset + field.len()].copy_from_slice(field);
}

fn sealed(mut bytes: [u8; SUPERBLOCK_BYTES]) -> [u8; SUPERBLOCK_BYTES] {
    let checksum = crc64(&bytes[8..FIXED_BYTES]);
    put(&mut bytes, 0, &checksum.to_le_bytes());
    bytes
}

struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn checked(bytes: &'a [u8]) -> Result<Self, SuperblockError> {
        let fields = Self(bytes);
        if fields.array::<16>(24)? != MAGIC || fields.number(8)? != SUPERBLOCK.0 {
            return Err(SuperblockError::NotBcache);
        }
        let journal_buckets = fields.short(206)?;
        if journal_buckets > MAX_JOURNAL_BUCKETS {
            return Err(SuperblockError::Checksum);
        }
        let end = FIXED_BYTES + usize::from(journal_buckets) * 8;
        let covered = bytes.get(8..end).ok_or(SuperblockError::NotBcache)?;
        if crc64(covered) == fields.number(0)? {
            Ok(fields)
        } else {
            Err(SuperblockError::Checksum)
        }
    }

    fn array<const N: usize>(&self, offset: usize) -> Result<[u8; N], SuperblockError> {
        self.0
            .get(offset..offset + N)
            .and_then(|field| field.try_into().ok())
            .ok_or(SuperblockError::NotBcache)
    }

    fn number(&self, offset: usize) -> Result<u64, SuperblockError> {
        self.array(offset).map(u64::from_le_bytes)
    }

    fn short(&self, offset: usize) -> Result<u16, SuperblockError> {
        self.array(offset).map(u16::from_le_bytes)
    }

    fn uuid(&self, offset: usize) -> Result<Uuid, SuperblockError> {
        self.array(offset).map(Uuid)
    }
}

/// CRC-64 with ECMA-182's polynomial, highest bit first, beginning with all ones and inverted at the end.
fn crc64(bytes: &[u8]) -> u64 {
    const POLYNOMIAL: u64 = 0x42f0_e1eb_a9ea_3693;
    let step = |crc: u64, _| (crc << 1) ^ if crc >> 63 == 1 { POLYNOMIAL } else { 0 };
    let crc = bytes.iter().fold(u64::MAX, |crc, byte| {
        (0..8).fold(crc ^ u64::from(*byte) << 56, step)
    });
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_checksum_is_the_one_that_the_catalogue_gives() {
        // CRC-64/WE: the same polynomial, start and end.
        assert_eq!(crc64(b"123456789"), 0x62ec_59e3_f1a4_f00a);
    }

    #[test]
    fn buckets_are_many_and_never_too_few() {
        let bucket = |mib: u64| {
            CacheSuperblock::new(Uuid([1; 16]), Uuid([2; 16]), Sectors(mib * 2048))
                .map(|superblock| (superblock.bucket.0, superblock.buckets))
        };
        assert_eq!(bucket(63), None);
        assert_eq!(bucket(64), Some((128, 1024)));
        assert_eq!(bucket(1024), Some((128, 16_384)));
        assert_eq!(bucket(8192), Some((1024, 16_384)));
        assert_eq!(bucket(1 << 20), Some((1024, 2_097_152)));
    }

    proptest! {
        #[test]
        fn a_superblock_decodes_as_it_was_encoded(uuid in any::<[u8; 16]>(), set in any::<[u8; 16]>(), mib in 64..1_u64 << 22) {
            let cache = CacheSuperblock::new(Uuid(uuid), Uuid(set), Sectors(mib * 2048)).unwrap();
            prop_assert_eq!(CacheSuperblock::decode(&cache.encode()), Ok(cache.clone()));
            let backing = BackingSuperblock { uuid: Uuid(uuid), set: Uuid(set), data_offset: DATA_OFFSET };
            prop_assert_eq!(BackingSuperblock::decode(&backing.encode()), Ok(backing.clone()));
            prop_assert_eq!(BackingSuperblock::decode(&cache.encode()), Err(SuperblockError::Version(3)));
        }

        #[test]
        fn no_bytes_make_it_panic_and_a_changed_one_is_seen(at in 0..208_usize, bit in 0..8_u8, cut in 0..4096_usize) {
            let mut bytes = BackingSuperblock { uuid: Uuid([1; 16]), set: Uuid([2; 16]), data_offset: DATA_OFFSET }.encode();
            let _ = BackingSuperblock::decode(&bytes[..cut]);
            bytes[at] ^= 1 << bit;
            prop_assert!(BackingSuperblock::decode(&bytes).is_err());
        }
    }
}
