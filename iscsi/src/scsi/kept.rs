//! What is kept of persistent reservations through a loss of power: a few lines of text, for one unit.
//!
//! Text, because whoever stands before a cluster that does not start wants to read who holds the disk. The sum at its
//! end and the unit's identity at its beginning make sure that nothing else is taken for it. Deliberately absent: I/O.

use std::fmt::Write as _;

use treeboot_types::Iqn;

use super::reservation::{Held, InitiatorPort, Kind, MAX_REGISTRATIONS, Registration, Reservations};

const FIRST_LINE: &str = "treeboot reservations 1";

/// The longest text in bytes: 256 registrations with names of 223 bytes (RFC 7143 §4.2.7.1) take 70 KiB.
pub const MAX_KEPT_BYTES: u64 = 128 * 1024;

/// Why a text is not what was kept of a unit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeptError {
    /// Something else, or of a version that we do not know.
    #[error("it does not begin with '{FIRST_LINE}'")]
    NotOurs,
    /// The sum at the end lacks or does not fit.
    #[error("it was cut off or changed: the checksum at its end is wrong")]
    Sum,
    /// Another unit's.
    #[error("it belongs to the unit {found}, and this is {expected}")]
    OtherUnit {
        /// Whose it is.
        found: String,
        /// Whose is wanted.
        expected: String,
    },
    /// A line that means nothing, though the sum fits.
    #[error("line {line} makes no sense")]
    Line {
        /// Counted from 1.
        line: usize,
    },
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn port(text: &str) -> Option<InitiatorPort> {
    let (isid, name) = text.split_once(' ')?;
    if isid.len() != 12 || !isid.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let number = u64::from_str_radix(isid, 16).ok()?;
    let [_, _, isid @ ..] = number.to_be_bytes();
    Some(InitiatorPort {
        name: Iqn::new(name).ok()?,
        isid,
    })
}

impl Reservations {
    /// What a [`Keeper`](super::reservation::Keeper) is to keep; without APTPL only that there is nothing.
    pub fn to_text(&self, unit: &[u8; 16]) -> String {
        let mut text = format!("{FIRST_LINE}\nunit {}\n", hex(unit));
        let of = |port: &InitiatorPort| format!("{} {}", hex(&port.isid), port.name);
        if self.kept {
            text.push_str("kept\n");
            for Registration { port, key } in &self.registrations {
                let _ = writeln!(text, "key {key:016x} {}", of(port));
            }
            if let Some(Held { holder, kind }) = &self.held {
                let _ = writeln!(text, "held {} {}", *kind as u8, of(holder));
            }
        }
        let sum = crc32c::crc32c(text.as_bytes());
        let _ = writeln!(text, "sum {sum:08x}");
        text
    }

    /// Reads what was kept of this unit.
    ///
    /// # Errors
    /// [`KeptError`]; a reservation that cannot be read must not be taken for none.
    pub fn from_text(text: &str, unit: &[u8; 16]) -> Result<Self, KeptError> {
        let body = text.strip_suffix('\n').unwrap_or(text);
        if !body.starts_with(FIRST_LINE) {
            return Err(KeptError::NotOurs);
        }
        let (body, last) = body.rsplit_once('\n').ok_or(KeptError::Sum)?;
        // The sum covers the line's end, too.
        let summed = text.get(..body.len() + 1).ok_or(KeptError::Sum)?;
        let sum = last
            .strip_prefix("sum ")
            .and_then(|sum| u32::from_str_radix(sum, 16).ok());
        if sum != Some(crc32c::crc32c(summed.as_bytes())) {
            return Err(KeptError::Sum);
        }
        let mut read = Self::default();
        for (index, line) in body.lines().enumerate() {
            let wrong = KeptError::Line { line: index + 1 };
            let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
            match (index, word) {
                (0, _) if line == FIRST_LINE => {}
                (0, _) => return Err(KeptError::NotOurs),
                (1, "unit") if rest == hex(unit) => {}
                (1, "unit") => {
                    return Err(KeptError::OtherUnit {
                        found: rest.to_owned(),
                        expected: hex(unit),
                    });
                }
                (2, "kept") => read.kept = true,
                (3.., "key") => read.registrations.push(registration(rest).ok_or(wrong)?),
                (3.., "held") if read.held.is_none() => read.held = Some(held(rest).ok_or(wrong)?),
                _ => return Err(wrong),
            }
        }
        let last = KeptError::Line {
            line: body.lines().count(),
        };
        // No reservation without a registrant, none of them twice, not more than there is room for.
        let ports: std::collections::HashSet<_> = read.registrations.iter().map(|r| &r.port).collect();
        let orphan = read.held.is_some() && read.registrations.is_empty();
        if orphan || ports.len() != read.registrations.len() || ports.len() > MAX_REGISTRATIONS {
            return Err(last);
        }
        Ok(read)
    }
}

fn registration(text: &str) -> Option<Registration> {
    let (key, rest) = text.split_once(' ')?;
    let key = u64::from_str_radix(key, 16).ok().filter(|key| *key != 0)?;
    Some(Registration {
        port: port(rest)?,
        key,
    })
}

fn held(text: &str) -> Option<Held> {
    let (kind, rest) = text.split_once(' ')?;
    Some(Held {
        holder: port(rest)?,
        kind: Kind::from_code(kind.parse().ok()?)?,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::scsi::reservation::{Access, Out};

    const UNIT: [u8; 16] = [0xa5; 16];

    fn initiator(number: u8) -> InitiatorPort {
        InitiatorPort {
            name: Iqn::new("iqn.a:i").unwrap(),
            isid: [number; 6],
        }
    }

    fn parameters(key: u64, action_key: u64, aptpl: bool) -> Vec<u8> {
        let mut out = key.to_be_bytes().to_vec();
        out.extend_from_slice(&action_key.to_be_bytes());
        out.extend_from_slice(&[0, 0, 0, 0, aptpl.into(), 0, 0, 0]);
        out
    }

    proptest! {
        /// Whatever was done, what is kept is what was there, and nothing without APTPL.
        #[test]
        fn what_is_kept_reads_as_what_was(
            steps in prop::collection::vec((0u8..3, 0u8..7, prop::sample::select(vec![1u8, 3, 5, 6, 7, 8]), 0u64..4, 0u64..4, any::<bool>()), 0..40),
        ) {
            let mut state = Reservations::default();
            state.allow_keeping();
            for (number, action, kind, key, action_key, aptpl) in steps {
                let out = Out { action, scope: 0, kind };
                let _ = state.change(&initiator(number), out, &parameters(key, action_key, aptpl));
                let read = Reservations::from_text(&state.to_text(&UNIT), &UNIT).unwrap();
                if !state.is_kept() {
                    prop_assert_eq!(read, Reservations::default());
                    continue;
                }
                prop_assert!(read.is_kept());
                prop_assert_eq!(&read.registrations, &state.registrations);
                prop_assert_eq!(&read.held, &state.held);
                for other in 0..4 {
                    for access in [Access::Always, Access::Read, Access::Write] {
                        let (read, state) = (
                            read.conflicts(&initiator(other), access),
                            state.conflicts(&initiator(other), access),
                        );
                        prop_assert_eq!(read, state);
                    }
                }
            }
        }

        #[test]
        fn a_text_that_was_changed_anywhere_is_refused(at in any::<prop::sample::Index>(), to in 0x20u8..0x7f) {
            let mut state = Reservations::default();
            state.allow_keeping();
            let register = Out { action: 0, scope: 0, kind: 0 };
            state.change(&initiator(1), register, &parameters(0, 7, true)).unwrap();
            state.change(&initiator(1), Out { action: 1, scope: 0, kind: 3 }, &parameters(7, 0, false)).unwrap();
            let text = state.to_text(&UNIT);
            let mut bytes = text.clone().into_bytes();
            let at = at.index(bytes.len() - 1);
            prop_assume!(bytes[at] != to);
            bytes[at] = to;
            let changed = String::from_utf8(bytes).unwrap();
            // Hexadecimal digits of the sum may change their case.
            prop_assume!(!changed.eq_ignore_ascii_case(&text));
            prop_assert!(Reservations::from_text(&changed, &UNIT).is_err());
            prop_assert!(Reservations::from_text(&text[..at], &UNIT).is_err());
        }

        #[test]
        fn no_text_makes_it_panic(text in "[ -~\n]{0,200}") {
            let _ = Reservations::from_text(&text, &UNIT);
            let summed = format!("{FIRST_LINE}\nunit {}\nkept\n{text}\n", hex(&UNIT));
            let sum = crc32c::crc32c(summed.as_bytes());
            let _ = Reservations::from_text(&format!("{summed}sum {sum:08x}\n"), &UNIT);
        }
    }

    #[test]
    fn another_units_text_is_named_as_such() {
        let text = Reservations::default().to_text(&UNIT);
        let error = Reservations::from_text(&text, &[1; 16]).unwrap_err();
        assert!(matches!(error, KeptError::OtherUnit { .. }), "{error}");
        assert_eq!(Reservations::from_text("", &UNIT), Err(KeptError::NotOurs));
        assert_eq!(Reservations::from_text(FIRST_LINE, &UNIT), Err(KeptError::Sum));
    }
}
