//! The eight bytes that address a logical unit (SAM-5 §4.7).

/// A LUN as it travels, most significant byte first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct LunField(pub u64);

impl LunField {
    /// The field for LUN `number` (0 to 16,383): peripheral addressing below 256, flat space addressing from there.
    pub fn new(number: u16) -> Self {
        if number < 256 {
            Self(u64::from(number) << 48)
        } else {
            Self((0x4000 | u64::from(number & 0x3fff)) << 48)
        }
    }

    /// The LUN's number; `None` for a field of several levels or another method of addressing.
    pub fn number(self) -> Option<u16> {
        if self.0 & 0x0000_ffff_ffff_ffff != 0 {
            return None;
        }
        let first = (self.0 >> 48) as u16;
        match first >> 14 {
            // Peripheral: bus 0 only.
            0 if first < 256 => Some(first),
            1 => Some(first & 0x3fff),
            _ => None,
        }
    }
}
