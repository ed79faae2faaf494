//! Cutting a byte stream into PDUs and back: lengths, padding, digests (RFC 7143 §11.2.1 and §11.2.3).

use super::{BHS_BYTES, Bhs, Pdu};

/// The longest additional header: its length is one byte that counts words of four.
pub const MAX_AHS_BYTES: usize = 255 * 4;

/// Length of a digest in bytes.
const DIGEST_BYTES: usize = 4;

/// How PDUs are laid out on one direction of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Framing {
    /// A CRC32C follows the header.
    pub header_digest: bool,
    /// A CRC32C follows a data segment that is not empty.
    pub data_digest: bool,
    /// The longest data segment in bytes that the receiving side accepts (its MaxRecvDataSegmentLength).
    pub max_data_bytes: u32,
}

/// One PDU in a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    /// The basic header segment.
    pub bhs: &'a Bhs,
    /// The additional header segments, padded; see [`Framing::append`].
    pub ahs: &'a [u8],
    /// The data segment without its padding.
    pub data: &'a [u8],
    /// Bytes of the stream that the PDU takes, with padding and digests.
    pub bytes: usize,
}

/// What [`Framing::split`] found at the start of a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split<'a> {
    /// Not yet a whole PDU: the buffer must hold at least this many bytes first.
    Need(usize),
    /// A whole PDU.
    Frame(Frame<'a>),
}

/// Why the stream cannot be followed any further.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A data segment beyond what was negotiated.
    #[error("a PDU with a data segment of {bytes} bytes, while {limit} were agreed on")]
    TooLong {
        /// The length that the header states.
        bytes: u32,
        /// The limit in force.
        limit: u32,
    },
    /// The header's CRC32C does not match.
    #[error("a PDU whose header digest is wrong")]
    HeaderDigest,
    /// The data segment's CRC32C does not match.
    #[error("a PDU whose data digest is wrong")]
    DataDigest,
}

impl Framing {
    /// The layout while a login lasts: no digests, 8192 bytes of data (RFC 7143 §13.12).
    pub const LOGIN: Self = Self {
        header_digest: false,
        data_digest: false,
        max_data_bytes: 8192,
    };

    /// Takes the first PDU off `buffer`, or says how many bytes it needs. The length is checked before anything
    /// is waited for, so a caller never needs more than `48 + 1020 + 4 + max_data_bytes + 3 + 4` bytes.
    ///
    /// # Errors
    /// [`FrameError`]; the stream is lost after it.
    #[inline]
    pub fn split<'a>(&self, buffer: &'a [u8]) -> Result<Split<'a>, FrameError> {
        let Some((bhs, rest)) = buffer.split_first_chunk::<BHS_BYTES>() else {
            return Ok(Split::Need(BHS_BYTES));
        };
        let ahs_bytes = usize::from(bhs[4]) * 4;
        let data_bytes = u32::from_be_bytes([0, bhs[5], bhs[6], bhs[7]]);
        if data_bytes > self.max_data_bytes {
            return Err(FrameError::TooLong {
                bytes: data_bytes,
                limit: self.max_data_bytes,
            });
        }
        let data_bytes = data_bytes as usize;
        let digest_at = ahs_bytes;
        let data_at = digest_at + if self.header_digest { DIGEST_BYTES } else { 0 };
        let padded_end = data_at + padded(data_bytes);
        let end = padded_end + self.data_digest_bytes(data_bytes);
        let Some(rest) = rest.get(..end) else {
            return Ok(Split::Need(BHS_BYTES + end));
        };
        if self.header_digest {
            let crc = crc32c::crc32c(&buffer[..BHS_BYTES + ahs_bytes]);
            if rest[digest_at..data_at] != crc.to_le_bytes() {
                return Err(FrameError::HeaderDigest);
            }
        }
        if padded_end < end
            && rest[padded_end..end] != crc32c::crc32c(&rest[data_at..padded_end]).to_le_bytes()
        {
            return Err(FrameError::DataDigest);
        }
        Ok(Split::Frame(Frame {
            bhs,
            ahs: &rest[..ahs_bytes],
            data: &rest[data_at..data_at + data_bytes],
            bytes: BHS_BYTES + end,
        }))
    }

    /// Appends `pdu` with its data segment to `out`.
    pub fn append(&self, out: &mut Vec<u8>, pdu: &Pdu, data: &[u8]) {
        self.append_with_ahs(out, pdu, &[], data);
    }

    /// Appends `pdu` with additional header segments, whose length is a multiple of four, at most
    /// [`MAX_AHS_BYTES`], and a data segment of less than 16 MiB.
    pub fn append_with_ahs(&self, out: &mut Vec<u8>, pdu: &Pdu, ahs: &[u8], data: &[u8]) {
        debug_assert!(ahs.len().is_multiple_of(4) && ahs.len() <= MAX_AHS_BYTES);
        let mut bhs = pdu.encode();
        bhs[4] = (ahs.len() / 4) as u8;
        put_data_bytes(&mut bhs, data.len());
        let start = out.len();
        out.extend_from_slice(&bhs);
        out.extend_from_slice(ahs);
        if self.header_digest {
            let crc = crc32c::crc32c(&out[start..]);
            out.extend_from_slice(&crc.to_le_bytes());
        }
        let data_at = out.len();
        out.extend_from_slice(data);
        out.resize(data_at + padded(data.len()), 0);
        if self.data_digest && !data.is_empty() {
            let crc = crc32c::crc32c(&out[data_at..]);
            out.extend_from_slice(&crc.to_le_bytes());
        }
    }

    /// Where the data segment of a PDU without additional header begins.
    #[inline]
    pub fn data_at(&self) -> usize {
        BHS_BYTES + if self.header_digest { DIGEST_BYTES } else { 0 }
    }

    /// The bytes of a PDU without additional header and with `data_bytes` of data.
    #[inline]
    pub fn frame_bytes(&self, data_bytes: usize) -> usize {
        self.data_at() + padded(data_bytes) + self.data_digest_bytes(data_bytes)
    }

    /// Completes a PDU in place: `frame` is [`frame_bytes`](Self::frame_bytes) long and holds `data_bytes` of data at
    /// [`data_at`](Self::data_at). A device can so read straight into what is sent.
    #[inline]
    pub fn seal(&self, frame: &mut [u8], mut bhs: Bhs, data_bytes: usize) {
        debug_assert_eq!(frame.len(), self.frame_bytes(data_bytes));
        put_data_bytes(&mut bhs, data_bytes);
        frame[..BHS_BYTES].copy_from_slice(&bhs);
        let data_at = self.data_at();
        if self.header_digest {
            frame[BHS_BYTES..data_at].copy_from_slice(&crc32c::crc32c(&bhs).to_le_bytes());
        }
        let padded_end = data_at + padded(data_bytes);
        frame[data_at + data_bytes..padded_end].fill(0);
        if padded_end < frame.len() {
            let crc = crc32c::crc32c(&frame[data_at..padded_end]);
            frame[padded_end..].copy_from_slice(&crc.to_le_bytes());
        }
    }

    #[inline]
    fn data_digest_bytes(&self, data_bytes: usize) -> usize {
        if self.data_digest && data_bytes > 0 {
            DIGEST_BYTES
        } else {
            0
        }
    }
}

/// Segments are padded with zeroes to words of four bytes.
#[inline]
fn padded(bytes: usize) -> usize {
    bytes.next_multiple_of(4)
}

fn put_data_bytes(bhs: &mut Bhs, bytes: usize) {
    debug_assert!(bytes < 1 << 24, "a data segment's length has 24 bits");
    bhs[5..8].copy_from_slice(&(bytes as u32).to_be_bytes()[1..]);
}
