//! Binary values in text: `0x…` and `0b…` (RFC 7143 §6.1).

use std::fmt::Write;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

/// How a binary value is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::login) enum Encoding {
    /// `0x…`
    Hex,
    /// `0b…`
    Base64,
}

impl Encoding {
    pub(super) fn print(self, bytes: &[u8]) -> String {
        match self {
            Self::Hex => bytes.iter().fold("0x".to_owned(), |mut text, byte| {
                let _ = write!(text, "{byte:02x}"); // a String takes everything
                text
            }),
            Self::Base64 => format!("0b{}", STANDARD.encode(bytes)),
        }
    }
}

/// Reads a value of 1 to `most` bytes; `None` for anything else.
pub(super) fn parse(text: &str, most: usize) -> Option<(Vec<u8>, Encoding)> {
    let prefixed = |lower: &str, upper: &str| text.strip_prefix(lower).or_else(|| text.strip_prefix(upper));
    let (bytes, encoding) = if let Some(digits) = prefixed("0x", "0X") {
        (hex(digits, most)?, Encoding::Hex)
    } else {
        let digits = prefixed("0b", "0B")?;
        // Four digits are three bytes.
        if digits.len() > most.div_ceil(3) * 4 {
            return None;
        }
        (STANDARD.decode(digits).ok()?, Encoding::Base64)
    };
    (1..=most).contains(&bytes.len()).then_some((bytes, encoding))
}

/// Digits from the most significant on; of an odd number the first is a byte of its own, so that n digits are
/// (n + 1) / 2 bytes.
fn hex(digits: &str, most: usize) -> Option<Vec<u8>> {
    if digits.len() > most * 2 {
        return None;
    }
    let digit = |byte: &u8| char::from(*byte).to_digit(16).map(|value| value as u8);
    let digits: Vec<u8> = digits.as_bytes().iter().map(digit).collect::<Option<_>>()?;
    let (first, rest) = digits.split_at(digits.len() % 2);
    let pairs = rest.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]);
    Some(first.iter().copied().chain(pairs).collect())
}
