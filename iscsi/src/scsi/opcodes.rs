//! The table of commands that we know: their codes, lengths, and which bits of a CDB mean anything.
//!
//! It answers REPORT SUPPORTED OPERATION CODES (SPC-4 §6.35) and refuses reserved bits, so that both always agree.

use super::sense::Sense;

/// One command.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// Operation code.
    pub opcode: u8,
    /// Service action, where the command has one (bits 0 to 4 of byte 1).
    pub action: Option<u8>,
    /// CDB usage data: its length is the CDB's; each set bit is one that is looked at.
    pub usage: &'static [u8],
    /// Only on a device that gives space back.
    pub thin: bool,
}

const fn entry(opcode: u8, usage: &'static [u8]) -> Entry {
    Entry {
        opcode,
        action: None,
        usage,
        thin: false,
    }
}

const fn action(opcode: u8, action: u8, usage: &'static [u8]) -> Entry {
    Entry {
        opcode,
        action: Some(action),
        usage,
        thin: false,
    }
}

const F: u8 = 0xff;

/// Sorted by operation code and service action.
pub const TABLE: &[Entry] = &[
    entry(0x00, &[0x00, 0, 0, 0, 0, 0]),
    entry(0x03, &[0x03, 1, 0, 0, F, 0]),
    entry(0x08, &[0x08, 0x1f, F, F, F, 0]),
    entry(0x0a, &[0x0a, 0x1f, F, F, F, 0]),
    entry(0x12, &[0x12, 1, F, F, F, 0]),
    entry(0x15, &[0x15, 0x11, 0, 0, F, 0]),
    entry(0x16, &[0x16, 0, 0, 0, 0, 0]),
    entry(0x17, &[0x17, 0, 0, 0, 0, 0]),
    entry(0x1a, &[0x1a, 0x08, F, F, F, 0]),
    entry(0x1b, &[0x1b, 1, 0, 0x0f, 0xf7, 0]),
    entry(0x1d, &[0x1d, 0xe7, 0, F, F, 0]),
    entry(0x25, &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
    entry(0x28, &[0x28, 0xfa, F, F, F, F, 0x1f, F, F, 0]),
    entry(0x2a, &[0x2a, 0xfa, F, F, F, F, 0x1f, F, F, 0]),
    entry(0x2e, &[0x2e, 0xf6, F, F, F, F, 0x1f, F, F, 0]),
    entry(0x2f, &[0x2f, 0xf6, F, F, F, F, 0x1f, F, F, 0]),
    entry(0x34, &[0x34, 0x02, F, F, F, F, 0x1f, F, F, 0]),
    entry(0x35, &[0x35, 0x06, F, F, F, F, 0x1f, F, F, 0]),
    entry(0x37, &[0x37, 0, 0x1f, 0, 0, 0, 0, F, F, 0]),
    entry(0x41, &[0x41, 0xfa, F, F, F, F, 0x1f, F, F, 0]),
    Entry {
        thin: true,
        ..entry(0x42, &[0x42, 1, 0, 0, 0, 0, 0x1f, F, F, 0])
    },
    entry(0x55, &[0x55, 0x11, 0, 0, 0, 0, 0, F, F, 0]),
    entry(0x5a, &[0x5a, 0x18, F, F, 0, 0, 0, F, F, 0]),
    action(0x5e, 0, &[0x5e, 0, 0, 0, 0, 0, 0, F, F, 0]),
    action(0x5e, 1, &[0x5e, 1, 0, 0, 0, 0, 0, F, F, 0]),
    action(0x5e, 2, &[0x5e, 2, 0, 0, 0, 0, 0, F, F, 0]),
    action(0x5e, 3, &[0x5e, 3, 0, 0, 0, 0, 0, F, F, 0]),
    action(0x5f, 0, &[0x5f, 0, F, 0, 0, F, F, F, F, 0]),
    action(0x5f, 1, &[0x5f, 1, F, 0, 0, F, F, F, F, 0]),
    action(0x5f, 2, &[0x5f, 2, F, 0, 0, F, F, F, F, 0]),
    action(0x5f, 3, &[0x5f, 3, F, 0, 0, F, F, F, F, 0]),
    action(0x5f, 4, &[0x5f, 4, F, 0, 0, F, F, F, F, 0]),
    action(0x5f, 5, &[0x5f, 5, F, 0, 0, F, F, F, F, 0]),
    action(0x5f, 6, &[0x5f, 6, F, 0, 0, F, F, F, F, 0]),
    entry(0x88, &[0x88, 0xfa, F, F, F, F, F, F, F, F, F, F, F, F, 0x1f, 0]),
    entry(0x89, &[0x89, 0xfa, F, F, F, F, F, F, F, F, 0, 0, 0, F, 0x1f, 0]),
    entry(0x8a, &[0x8a, 0xfa, F, F, F, F, F, F, F, F, F, F, F, F, 0x1f, 0]),
    entry(0x8b, &[0x8b, 0xfa, F, F, F, F, F, F, F, F, F, F, F, F, 0x1f, 0]),
    entry(0x8e, &[0x8e, 0xf6, F, F, F, F, F, F, F, F, F, F, F, F, 0x1f, 0]),
    entry(0x8f, &[0x8f, 0xf6, F, F, F, F, F, F, F, F, F, F, F, F, 0x1f, 0]),
    entry(0x90, &[0x90, 0x02, F, F, F, F, F, F, F, F, F, F, F, F, 0x1f, 0]),
    entry(0x91, &[0x91, 0x06, F, F, F, F, F, F, F, F, F, F, F, F, 0x1f, 0]),
    entry(0x93, &[0x93, 0xfb, F, F, F, F, F, F, F, F, F, F, F, F, 0x1f, 0]),
    action(
        0x9e,
        0x10,
        &[0x9e, 0x10, F, F, F, F, F, F, F, F, F, F, F, F, 1, 0],
    ),
    action(
        0x9e,
        0x12,
        &[0x9e, 0x12, F, F, F, F, F, F, F, F, F, F, F, F, 0, 0],
    ),
    entry(0xa0, &[0xa0, 0, F, 0, 0, 0, F, F, F, F, 0, 0]),
    action(0xa3, 0x0a, &[0xa3, 0xea, 0, 0, 0, 0, F, F, F, F, 0, 0]),
    action(0xa3, 0x0c, &[0xa3, 0x0c, 0x87, F, F, F, F, F, F, F, 0, 0]),
    action(0xa3, 0x0d, &[0xa3, 0x0d, 0x80, 0, 0, 0, F, F, F, F, 0, 0]),
    entry(0xa8, &[0xa8, 0xfa, F, F, F, F, F, F, F, F, 0x1f, 0]),
    entry(0xaa, &[0xaa, 0xfa, F, F, F, F, F, F, F, F, 0x1f, 0]),
    entry(0xae, &[0xae, 0xf6, F, F, F, F, F, F, F, F, 0x1f, 0]),
    entry(0xaf, &[0xaf, 0xf6, F, F, F, F, F, F, F, F, 0x1f, 0]),
    entry(0xb7, &[0xb7, 0x1f, F, F, F, F, F, F, F, F, 0, 0]),
];

/// What is known about an operation code and, where it has them, its service action.
#[derive(Debug, Clone, Copy)]
pub enum Known {
    /// The command.
    Command(&'static Entry),
    /// The operation code has other service actions.
    OtherAction,
    /// Nothing.
    No,
}

/// Looks a command up. It is on the path of every command, so reads and writes come without a search.
pub fn find(opcode: u8, service_action: u8, thin: bool) -> Known {
    let mut seen = false;
    for entry in TABLE.iter().filter(|entry| entry.opcode == opcode) {
        seen = true;
        let fits = entry.action.is_none_or(|action| action == service_action & 0x1f);
        if fits && (thin || !entry.thin) {
            return Known::Command(entry);
        }
    }
    match seen
        && TABLE
            .iter()
            .any(|entry| entry.opcode == opcode && entry.action.is_some())
    {
        true => Known::OtherAction,
        false => Known::No,
    }
}

/// The first bit of `cdb` that the command does not know.
pub fn reserved_bit(entry: &Entry, cdb: &[u8; 16]) -> Option<(u16, u8)> {
    entry
        .usage
        .iter()
        .zip(cdb)
        .enumerate()
        .skip(1)
        .find_map(|(at, (mask, byte))| {
            let wrong = byte & !mask;
            (wrong != 0).then(|| (at as u16, 7 - wrong.leading_zeros() as u8))
        })
}

/// REPORT SUPPORTED OPERATION CODES. `options` tells which: all, or one by its code and service action.
///
/// # Errors
/// The [`Sense`] of an option that does not exist or does not fit the command.
pub fn report(thin: bool, timeouts: bool, options: u8, opcode: u8, action: u16) -> Result<Vec<u8>, Sense> {
    let mut known = TABLE
        .iter()
        .filter(|e| e.opcode == opcode && (thin || !e.thin))
        .peekable();
    let has_actions = known.peek().is_some_and(|entry| entry.action.is_some());
    let entry = match options {
        0 => return Ok(report_all(timeouts, thin)),
        1 if has_actions => return Err(Sense::cdb_field(2, Some(2))),
        2 if known.peek().is_some() && !has_actions => return Err(Sense::cdb_field(2, Some(2))),
        1 => known.next(),
        2 | 3 => known.find(|entry| entry.action.map_or(action == 0, |own| u16::from(own) == action)),
        _ => return Err(Sense::cdb_field(2, Some(2))),
    };
    Ok(report_one(entry, timeouts))
}

/// COMMAND TIMEOUTS DESCRIPTOR with no value stated.
const NO_TIMEOUTS: [u8; 12] = [0, 0x0a, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// REPORT SUPPORTED OPERATION CODES, all of them.
fn report_all(timeouts: bool, thin: bool) -> Vec<u8> {
    let mut out = vec![0; 4];
    for entry in TABLE.iter().filter(|entry| thin || !entry.thin) {
        let flags = u8::from(entry.action.is_some()) | if timeouts { 2 } else { 0 };
        out.extend_from_slice(&[entry.opcode, 0, 0, entry.action.unwrap_or(0), 0, flags]);
        out.extend_from_slice(&(entry.usage.len() as u16).to_be_bytes());
        if timeouts {
            out.extend_from_slice(&NO_TIMEOUTS);
        }
    }
    let bytes = (out.len() - 4) as u32;
    out[..4].copy_from_slice(&bytes.to_be_bytes());
    out
}

/// REPORT SUPPORTED OPERATION CODES, one of them; `None` is a command that is not supported.
fn report_one(entry: Option<&Entry>, timeouts: bool) -> Vec<u8> {
    let Some(entry) = entry else {
        return vec![0, 1, 0, 0];
    };
    let mut out = vec![0, 3 | if timeouts { 0x80 } else { 0 }];
    out.extend_from_slice(&(entry.usage.len() as u16).to_be_bytes());
    out.extend_from_slice(entry.usage);
    if timeouts {
        out.extend_from_slice(&NO_TIMEOUTS);
    }
    out
}
