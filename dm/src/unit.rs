//! Units of device-mapper tables.

use std::fmt;
use std::str::FromStr;

/// A count of 512-byte sectors, whatever the block size of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Sectors(pub u64);

impl Sectors {
    /// The sectors in `bytes`, where they are a whole number.
    pub fn from_bytes(bytes: u64) -> Option<Self> {
        bytes.is_multiple_of(512).then_some(Self(bytes / 512))
    }

    /// The bytes in them; the largest number where that overflows.
    pub fn bytes(self) -> u64 {
        self.0.saturating_mul(512)
    }

    /// The sum, where it does not overflow.
    pub fn checked_add(self, other: Self) -> Option<Self> {
        self.0.checked_add(other.0).map(Self)
    }
}

impl fmt::Display for Sectors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// A block device as the kernel reports it in tables: `major:minor`. Paths are resolved before a table is built,
/// because a path may come to mean another device while the table lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceNumber {
    /// The driver.
    pub major: u32,
    /// The device of that driver.
    pub minor: u32,
}

impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl FromStr for DeviceNumber {
    type Err = ();
    fn from_str(text: &str) -> Result<Self, ()> {
        let (major, minor) = text.split_once(':').ok_or(())?;
        Ok(Self {
            major: major.parse().map_err(|_| ())?,
            minor: minor.parse().map_err(|_| ())?,
        })
    }
}

/// Who may write to a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Nobody. What lies below must be opened read-only too, as multipath over write-protected LUNs must.
    ReadOnly,
    /// Whoever opens it.
    ReadWrite,
}
