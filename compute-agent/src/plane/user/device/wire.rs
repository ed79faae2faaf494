//! FUSE messages as far as one regular file needs them (kernel `include/uapi/linux/fuse.h`, protocol 7.31 and later): parse requests, print
//! replies. No I/O.

/// Largest write or read of one request. The kernel splits what is larger.
pub(super) const MAX_IO_BYTES: usize = 1 << 20;
/// What a read of the connection must have room for: a header and a write of full size.
pub(super) const BUFFER_BYTES: usize = MAX_IO_BYTES + 4096;

const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;
/// The version that replies are laid out by.
const MAJOR: u32 = 7;
const MINOR: u32 = 31;
/// Bytes of a page, the unit of `max_pages`.
const PAGE: usize = 4096;

const ASYNC_READ: u64 = 1;
const BIG_WRITES: u64 = 1 << 5;
const ASYNC_DIO: u64 = 1 << 15;
const MAX_PAGES: u64 = 1 << 22;
const INIT_EXT: u64 = 1 << 30;
const HAS_RESEND: u64 = 1 << 39;
/// Reads and writes come here one by one, past the page cache: the device above has one.
const DIRECT_IO: u32 = 1;
/// `FUSE_NOTIFY_RESEND`: Linux 6.9.
const NOTIFY_RESEND: u32 = 7;
/// Requests that the kernel may have under way by itself at once; a queue of a block device holds 128.
const BACKGROUND: u16 = 128;
const REGULAR_FILE: u32 = 0o100_600;

const PUNCH_HOLE: u32 = 2;
const ZERO_RANGE: u32 = 16;

/// A request of the kernel.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request<'a> {
    /// What its reply must carry.
    pub(super) unique: u64,
    pub(super) operation: Operation<'a>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Operation<'a> {
    /// With what the kernel can do, and its own version.
    Init {
        minor: u32,
        abilities: u64,
    },
    Attributes,
    Open,
    Read {
        offset: u64,
        bytes: usize,
    },
    Write {
        offset: u64,
        data: &'a [u8],
    },
    /// Make durable what was written.
    Sync,
    /// Zeroes, and their room back.
    Discard {
        offset: u64,
        bytes: u64,
    },
    /// The room of the file system it pretends to be.
    Room,
    /// Nothing to be done, and an answer is waited for.
    Nothing,
    /// No answer is waited for.
    Unanswered,
    /// Not for a disk of fixed size.
    Refused,
    /// Not known here; the kernel then does without.
    Unknown,
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn long(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// Parses what one read of the connection gave; `None` where it is no request.
pub(super) fn parse(message: &[u8]) -> Option<Request<'_>> {
    let bytes = word(message, 0)? as usize;
    let message = message.get(..bytes)?;
    let (opcode, unique) = (word(message, 4)?, long(message, 8)?);
    let body = message.get(IN_HEADER..)?;
    let operation = match opcode {
        26 => Operation::Init {
            minor: word(body, 4)?,
            abilities: u64::from(word(body, 12)?) | u64::from(word(body, 16).unwrap_or(0)) << 32,
        },
        3 => Operation::Attributes,
        4 => Operation::Refused,
        14 => Operation::Open,
        15 => Operation::Read {
            offset: long(body, 8)?,
            bytes: (word(body, 16)? as usize).min(MAX_IO_BYTES),
        },
        16 => {
            let bytes = word(body, 16)? as usize;
            Operation::Write {
                offset: long(body, 8)?,
                data: body.get(40..)?.get(..bytes)?,
            }
        }
        17 => Operation::Room,
        20 => Operation::Sync,
        43 if word(body, 24)? & (PUNCH_HOLE | ZERO_RANGE) != 0 => Operation::Discard {
            offset: long(body, 8)?,
            bytes: long(body, 16)?,
        },
        43 => Operation::Refused,
        // RELEASE, FLUSH (of a closed descriptor), ACCESS, DESTROY.
        18 | 25 | 34 | 38 => Operation::Nothing,
        // FORGET, INTERRUPT, BATCH_FORGET.
        2 | 36 | 42 => Operation::Unanswered,
        _ => Operation::Unknown,
    };
    Some(Request { unique, operation })
}

/// A reply.
pub(super) fn reply(unique: u64, errno: Option<i32>, body: &[u8]) -> Vec<u8> {
    let body = if errno.is_some() { &[] } else { body };
    let mut out = Vec::with_capacity(OUT_HEADER + body.len());
    out.extend(((OUT_HEADER + body.len()) as u32).to_ne_bytes());
    out.extend((-errno.unwrap_or(0)).to_ne_bytes());
    out.extend(unique.to_ne_bytes());
    out.extend(body);
    out
}

/// Asks the kernel to send again what was read from the connection and never answered.
pub(super) fn resend() -> Vec<u8> {
    let mut out = (OUT_HEADER as u32).to_ne_bytes().to_vec();
    out.extend(NOTIFY_RESEND.to_ne_bytes());
    out.extend(0u64.to_ne_bytes());
    out
}

/// `fuse_init_out`.
pub(super) fn init(minor: u32, abilities: u64) -> Vec<u8> {
    let wanted = ASYNC_READ | BIG_WRITES | ASYNC_DIO | MAX_PAGES | INIT_EXT | HAS_RESEND;
    let taken = wanted & abilities;
    let mut out = Vec::with_capacity(64);
    out.extend(MAJOR.to_ne_bytes());
    out.extend(minor.min(MINOR).to_ne_bytes());
    out.extend(0u32.to_ne_bytes());
    out.extend((taken as u32).to_ne_bytes());
    out.extend(BACKGROUND.to_ne_bytes());
    out.extend((BACKGROUND * 3 / 4).to_ne_bytes());
    out.extend((MAX_IO_BYTES as u32).to_ne_bytes());
    out.extend(1u32.to_ne_bytes());
    out.extend(((MAX_IO_BYTES / PAGE) as u16).to_ne_bytes());
    out.extend(0u16.to_ne_bytes());
    out.extend(((taken >> 32) as u32).to_ne_bytes());
    out.resize(64, 0);
    out
}

/// `fuse_attr_out`, valid for ever: the size never changes.
pub(super) fn attributes(bytes: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(104);
    out.extend(u64::MAX.to_ne_bytes());
    out.extend([0; 8]);
    // ino, size, blocks of 512
    for field in [1, bytes, bytes / 512] {
        out.extend(u64::to_ne_bytes(field));
    }
    // three times, their nanoseconds
    out.extend([0; 36]);
    // mode, links, uid, gid, rdev, block size, flags
    for field in [REGULAR_FILE, 1, 0, 0, 0, PAGE as u32, 0] {
        out.extend(field.to_ne_bytes());
    }
    out
}

/// `fuse_open_out`.
pub(super) fn open() -> Vec<u8> {
    let mut out = vec![0; 8];
    out.extend(DIRECT_IO.to_ne_bytes());
    out.extend([0; 4]);
    out
}

/// `fuse_write_out`.
pub(super) fn written(bytes: usize) -> Vec<u8> {
    let mut out = (bytes as u32).to_ne_bytes().to_vec();
    out.extend([0; 4]);
    out
}

/// `fuse_statfs_out`. Its block is what the loop driver takes for the unit of a discard.
pub(super) fn room(bytes: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(80);
    out.extend((bytes / PAGE as u64).to_ne_bytes());
    out.extend([0; 32]);
    for field in [PAGE as u32, 255, PAGE as u32] {
        out.extend(field.to_ne_bytes());
    }
    out.resize(80, 0);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(opcode: u32, body: &[u8]) -> Vec<u8> {
        let mut out = ((IN_HEADER + body.len()) as u32).to_ne_bytes().to_vec();
        out.extend(opcode.to_ne_bytes());
        out.extend(77u64.to_ne_bytes());
        out.resize(IN_HEADER, 0);
        out.extend(body);
        out
    }

    fn operation(message: &[u8]) -> Option<Operation<'_>> {
        let request = parse(message)?;
        assert_eq!(request.unique, 77);
        Some(request.operation)
    }

    #[test]
    fn a_write_has_the_bytes_that_it_says() {
        let mut body = vec![0; 8];
        body.extend(4096u64.to_ne_bytes());
        body.extend(3u32.to_ne_bytes());
        body.resize(40, 0);
        body.extend([1, 2, 3]);
        let whole = message(16, &body);
        let expected = Operation::Write {
            offset: 4096,
            data: &[1, 2, 3],
        };
        assert_eq!(operation(&whole), Some(expected));
        for end in 0..whole.len() {
            assert_eq!(parse(&whole[..end]), None, "cut at {end}");
        }
    }

    #[test]
    fn a_discard_is_told_from_room_that_is_asked_for() {
        let body = |mode: u32| {
            let mut body = vec![0; 8];
            body.extend(8192u64.to_ne_bytes());
            body.extend(4096u64.to_ne_bytes());
            body.extend(mode.to_ne_bytes());
            body.extend([0; 4]);
            message(43, &body)
        };
        let discard = Operation::Discard {
            offset: 8192,
            bytes: 4096,
        };
        assert_eq!(operation(&body(3)), Some(discard));
        assert_eq!(operation(&body(0)), Some(Operation::Refused));
    }

    #[test]
    fn replies_have_the_kernels_sizes() {
        let sizes = [init(40, u64::MAX).len(), attributes(1 << 20).len(), open().len()];
        assert_eq!(sizes, [64, 104, 16]);
        assert_eq!([written(1).len(), room(1 << 20).len()], [8, 80]);
        let error = reply(5, Some(28), &[1, 2]);
        assert_eq!(error.len(), 16);
        assert_eq!(error[4..8], (-28i32).to_ne_bytes());
    }
}
