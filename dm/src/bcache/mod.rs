//! bcache: superblocks of our own making, and the kernel's sysfs files.
//!
//! One cache set on the cache group's device, one backing device a content. bcache caches what is read through it at the
//! first reading, which dm-cache does not; what it misses is in `docs/kernel-plane.md`.
//!
//! Two of its defaults would break a base: it stops a device for good after 64 errors of the parents, and it reads past the
//! cache what looks sequential or what comes while the cache is busy. [`Bcache::tune`] sets all three.

mod superblock;
#[cfg(feature = "kernel-plane")]
mod sys;

use std::fmt;
use std::str::FromStr;

use treeboot_types::Digest;

pub use superblock::{
    BackingSuperblock, CacheSuperblock, DATA_OFFSET, SUPERBLOCK, SUPERBLOCK_BYTES, SuperblockError,
};
#[cfg(feature = "kernel-plane")]
pub use sys::{Backing, Bcache, BcacheError, Stats};

/// A UUID, by its bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Uuid(pub [u8; 16]);

/// Why a text is not a UUID.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a UUID")]
pub struct UuidError(pub String);

impl Uuid {
    /// The backing UUID of a content: a set keeps a stopped image's blocks under it, and they may be used again only for the
    /// same bytes.
    pub fn of_content(content: &Digest) -> Self {
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&content.0[..16]);
        // bcache takes a UUID of zeroes for a free place in its table.
        bytes[15] |= 1;
        Self(bytes)
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            if matches!(index, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Uuid {
    type Err = UuidError;
    fn from_str(text: &str) -> Result<Self, UuidError> {
        let error = || UuidError(text.into());
        let digits: String = text.chars().filter(|&c| c != '-').collect();
        let mut bytes = [0; 16];
        if digits.len() != 32 || !digits.is_ascii() {
            return Err(error());
        }
        for (index, byte) in bytes.iter_mut().enumerate() {
            let pair = digits.get(index * 2..index * 2 + 2).ok_or_else(error)?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| error())?;
        }
        let uuid = Self(bytes);
        if uuid.to_string() == text {
            Ok(uuid)
        } else {
            Err(error())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_prints_as_it_parses() {
        let text = "00112233-4455-6677-8899-aabbccddeeff";
        assert_eq!(text.parse::<Uuid>().unwrap().to_string(), text);
        for bad in [
            "",
            "00112233445566778899aabbccddeeff",
            "0+112233-4455-6677-8899-aabbccddeeff",
        ] {
            assert!(bad.parse::<Uuid>().is_err(), "{bad}");
        }
    }
}
