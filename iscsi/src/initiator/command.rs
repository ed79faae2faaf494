//! The SCSI commands that an initiator needs, and the answers to them (SBC-3, SPC-4).

/// A unit's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Size in bytes.
    pub bytes: u64,
    /// Logical block in bytes: a power of two from 512.
    pub block_bytes: u32,
    /// Physical block in bytes.
    pub physical_block_bytes: u32,
    /// The unit is thin: it can give space back.
    pub thin: bool,
}

/// What a unit says it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Peripheral device type; 0 is a disk.
    pub device_type: u8,
    /// Vendor, without the spaces at its end.
    pub vendor: String,
    /// Product, likewise.
    pub product: String,
    /// Revision, likewise.
    pub revision: String,
}

pub(super) type Cdb = [u8; 16];

fn cdb(bytes: &[u8]) -> Cdb {
    let mut cdb = [0; 16];
    for (to, from) in cdb.iter_mut().zip(bytes) {
        *to = *from;
    }
    cdb
}

pub(super) fn test_unit_ready() -> Cdb {
    cdb(&[0x00])
}

pub(super) fn inquiry(allocation: u16) -> Cdb {
    let [high, low] = allocation.to_be_bytes();
    cdb(&[0x12, 0, 0, high, low])
}

/// INQUIRY of a page of vital product data.
pub(super) fn inquiry_page(page: u8, allocation: u16) -> Cdb {
    let [high, low] = allocation.to_be_bytes();
    cdb(&[0x12, 1, page, high, low])
}

/// REPORT TARGET PORT GROUPS, in the short form.
pub(super) fn report_target_port_groups(allocation: u32) -> Cdb {
    let [a, b, c, d] = allocation.to_be_bytes();
    cdb(&[0xa3, 0x0a, 0, 0, 0, 0, a, b, c, d])
}

pub(super) fn read_capacity_10() -> Cdb {
    cdb(&[0x25])
}

/// SERVICE ACTION IN(16), READ CAPACITY(16).
pub(super) fn read_capacity_16(allocation: u32) -> Cdb {
    let [a, b, c, d] = allocation.to_be_bytes();
    cdb(&[0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, a, b, c, d])
}

pub(super) fn report_luns(allocation: u32) -> Cdb {
    let [a, b, c, d] = allocation.to_be_bytes();
    cdb(&[0xa0, 0, 0, 0, 0, 0, a, b, c, d])
}

/// MODE SENSE(6), all pages, without block descriptors: its header tells of write protection.
pub(super) fn mode_sense_6(allocation: u8) -> Cdb {
    cdb(&[0x1a, 0x08, 0x3f, 0, allocation])
}

/// READ(10) where it suffices, because older targets know nothing else; READ(16) beyond.
pub(super) fn read(lba: u64, blocks: u32) -> Cdb {
    match (u32::try_from(lba), u16::try_from(blocks)) {
        (Ok(lba), Ok(blocks)) => {
            let ([a, b, c, d], [high, low]) = (lba.to_be_bytes(), blocks.to_be_bytes());
            cdb(&[0x28, 0, a, b, c, d, 0, high, low])
        }
        _ => long(0x88, lba, blocks),
    }
}

pub(super) fn write(lba: u64, blocks: u32) -> Cdb {
    long(0x8a, lba, blocks)
}

/// SYNCHRONIZE CACHE(16) of the whole unit.
pub(super) fn synchronize_cache() -> Cdb {
    long(0x91, 0, 0)
}

/// The common layout of commands of 16 bytes with LBA and length.
fn long(opcode: u8, lba: u64, blocks: u32) -> Cdb {
    let mut cdb = cdb(&[opcode]);
    cdb[2..10].copy_from_slice(&lba.to_be_bytes());
    cdb[10..14].copy_from_slice(&blocks.to_be_bytes());
    cdb
}

/// Reads the answer to READ CAPACITY(16); `None` where it makes no sense.
pub(super) fn parse_capacity_16(data: &[u8]) -> Option<Capacity> {
    let last_lba = u64::from_be_bytes(*data.first_chunk()?);
    let block_bytes = u32::from_be_bytes(*data.get(8..)?.first_chunk()?);
    let exponent = u32::from(data.get(13).copied().unwrap_or(0) & 0x0f);
    let thin = data.get(14).copied().unwrap_or(0) & 0x80 != 0;
    capacity(last_lba, block_bytes, exponent, thin)
}

/// Reads the answer to READ CAPACITY(10).
pub(super) fn parse_capacity_10(data: &[u8]) -> Option<Capacity> {
    let last_lba = u32::from_be_bytes(*data.first_chunk()?);
    let block_bytes = u32::from_be_bytes(*data.get(4..)?.first_chunk()?);
    if last_lba == u32::MAX {
        return None; // "too large for this command"
    }
    capacity(last_lba.into(), block_bytes, 0, false)
}

fn capacity(last_lba: u64, block_bytes: u32, exponent: u32, thin: bool) -> Option<Capacity> {
    if !block_bytes.is_power_of_two() || !(512..=65_536).contains(&block_bytes) {
        return None;
    }
    Some(Capacity {
        bytes: last_lba.checked_add(1)?.checked_mul(block_bytes.into())?,
        block_bytes,
        physical_block_bytes: block_bytes
            .checked_shl(exponent)
            .filter(|bytes| *bytes >= block_bytes)?,
        thin,
    })
}

pub(super) fn parse_inquiry(data: &[u8]) -> Option<Identity> {
    let text = |from: usize, to: usize| {
        let field = data.get(from..to)?;
        // Printable ASCII (SPC-4 §6.6.2), and nothing that a terminal would obey.
        let shown = |&byte: &u8| {
            if byte == b' ' || byte.is_ascii_graphic() {
                char::from(byte)
            } else {
                '?'
            }
        };
        let text: String = field.iter().map(shown).collect();
        Some(text.trim_end().to_owned())
    };
    Some(Identity {
        device_type: data.first()? & 0x1f,
        vendor: text(8, 16)?,
        product: text(16, 32)?,
        revision: text(32, 36)?,
    })
}

/// Reads the answer to REPORT LUNS; LUNs of several levels are left out.
pub(super) fn parse_luns(data: &[u8]) -> Option<Vec<u16>> {
    let bytes = u32::from_be_bytes(*data.first_chunk()?) as usize;
    let list = data.get(8..)?;
    let list = &list[..bytes.min(list.len())];
    let number = |field: &[u8; 8]| crate::pdu::LunField(u64::from_be_bytes(*field)).number();
    Some(list.as_chunks().0.iter().filter_map(number).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_short_read_is_used_while_it_can() {
        assert_eq!(read(7, 8)[0], 0x28);
        assert_eq!(read(7, 8)[2..9], [0, 0, 0, 7, 0, 0, 8]);
        assert_eq!(read(1 << 32, 8)[0], 0x88);
        assert_eq!(read(0, 1 << 16)[0], 0x88);
    }

    #[test]
    fn answers_are_read_and_nonsense_is_not() {
        let mut data = [0; 32];
        data[..8].copy_from_slice(&99u64.to_be_bytes());
        data[8..12].copy_from_slice(&512u32.to_be_bytes());
        data[13] = 3;
        data[14] = 0x80;
        let capacity = parse_capacity_16(&data).unwrap();
        assert_eq!(
            (capacity.bytes, capacity.physical_block_bytes, capacity.thin),
            (51_200, 4096, true)
        );
        data[..8].copy_from_slice(&u64::MAX.to_be_bytes());
        assert_eq!(parse_capacity_16(&data), None);
        assert_eq!(parse_capacity_16(&data[..11]), None);
        assert_eq!(parse_capacity_10(&[0xff, 0xff, 0xff, 0xff, 0, 0, 2, 0]), None);
        assert_eq!(parse_capacity_10(&[0, 0, 0, 1, 0, 0, 0, 3]), None);
        let luns = [
            0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0,
        ];
        assert_eq!(parse_luns(&luns).unwrap(), [0, 1]);
        assert_eq!(parse_luns(&luns[..5]), None);
    }
}
