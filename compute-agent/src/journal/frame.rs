//! Records in a file: length, CRC-32C, JSON. A record that was cut off or damaged ends what is read.

use std::io::Read;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longest record in bytes. A snapshot of some 10,000 disks fits; a length beyond it is damage, not data.
pub(crate) const MAX_RECORD_BYTES: usize = 16 << 20;

const HEAD_BYTES: usize = 8;

/// Appends one record to `out`.
pub(crate) fn encode<T: Serialize>(record: &T, out: &mut Vec<u8>) -> Result<(), serde_json::Error> {
    let payload = serde_json::to_vec(record)?;
    out.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    out.extend_from_slice(&crc32c::crc32c(&payload).to_le_bytes());
    out.extend_from_slice(&payload);
    Ok(())
}

/// What a file held.
pub(crate) struct Decoded<T> {
    pub(crate) records: Vec<T>,
    /// Bytes up to the end of the last whole record.
    pub(crate) good_bytes: u64,
    /// Why reading ended before the file did.
    pub(crate) damage: Option<String>,
}

/// Reads records until the end or the first one that is not whole.
pub(crate) fn decode<T: DeserializeOwned>(input: &mut impl Read) -> std::io::Result<Decoded<T>> {
    let mut bytes = Vec::new();
    input.read_to_end(&mut bytes)?;
    let mut decoded = Decoded {
        records: Vec::new(),
        good_bytes: 0,
        damage: None,
    };
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        match one(rest) {
            Ok((record, length)) => {
                decoded.records.push(record);
                decoded.good_bytes += length as u64;
                rest = &rest[length..];
            }
            Err(why) => {
                decoded.damage = Some(why);
                break;
            }
        }
    }
    Ok(decoded)
}

fn one<T: DeserializeOwned>(bytes: &[u8]) -> Result<(T, usize), String> {
    let head = |at: usize| -> Option<u32> {
        let field = bytes.get(at..at + 4)?;
        Some(u32::from_le_bytes(field.try_into().ok()?))
    };
    let (Some(length), Some(sum)) = (head(0), head(4)) else {
        return Err("the head of a record is cut off".into());
    };
    let length = length as usize;
    if length > MAX_RECORD_BYTES {
        return Err(format!("a record claims {length} bytes"));
    }
    let payload = bytes
        .get(HEAD_BYTES..HEAD_BYTES + length)
        .ok_or_else(|| format!("a record of {length} bytes is cut off"))?;
    if crc32c::crc32c(payload) != sum {
        return Err("a record's checksum is wrong".into());
    }
    let record =
        serde_json::from_slice(payload).map_err(|error| format!("a record does not parse: {error}"))?;
    Ok((record, HEAD_BYTES + length))
}
