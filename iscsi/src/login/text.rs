//! `key=value` pairs, each ended by a zero byte (RFC 7143 §6.1).

use std::fmt;

/// Longest name of a key in bytes (RFC 7143 §6.1).
pub const MAX_KEY_BYTES: usize = 63;

/// Longest value in bytes (RFC 7143 §6.1: 8192 for binary values, less for the others).
pub const MAX_VALUE_BYTES: usize = 8192;

/// Most bytes of a peer's text that an error keeps.
const MAX_SHOWN_BYTES: usize = 96;

/// Text of a peer, fit for a log and a terminal: on one line, without control characters, and short. Errors keep
/// peers' text as this and as nothing else, so that nobody who can reach a portal writes lines into our log.
#[derive(Clone, PartialEq, Eq)]
pub struct PeerText(Box<str>);

impl PeerText {
    /// Escapes and cuts `text`.
    pub fn new(text: &str) -> Self {
        let mut shown = String::new();
        for c in text.chars() {
            let before = shown.len();
            // What is not ASCII may look like anything else, or turn the line around.
            if c.is_ascii_graphic() && !matches!(c, '\'' | '\\') || c == ' ' {
                shown.push(c);
            } else {
                shown.extend(c.escape_default());
            }
            if shown.len() > MAX_SHOWN_BYTES {
                shown.truncate(before);
                shown.push_str(&format!("... ({} bytes)", text.len()));
                break;
            }
        }
        Self(shown.into())
    }
}

impl From<&str> for PeerText {
    fn from(text: &str) -> Self {
        Self::new(text)
    }
}

impl fmt::Display for PeerText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for PeerText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "'{}'", self.0)
    }
}

/// Longest TargetAddress in bytes: a name of DNS, port and group.
const MAX_ADDRESS_BYTES: usize = 300;

/// Can this be a TargetAddress (RFC 7143 §13.8)? Addresses of a peer reach people's terminals.
pub fn is_address(text: &str) -> bool {
    (1..=MAX_ADDRESS_BYTES).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// Why a data segment is not text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TextError {
    /// No `=`.
    #[error("a text key without '='")]
    NoValue,
    /// A name that is empty, too long, or of other characters than RFC 7143 §6.1 allows.
    #[error(
        "a text key whose name is empty, longer than {MAX_KEY_BYTES} bytes, or of characters not allowed"
    )]
    Name,
    /// A value that is too long or not text.
    #[error("a text value longer than {MAX_VALUE_BYTES} bytes or not UTF-8")]
    Value,
}

/// Parses a whole text; the zero after the last pair may lack.
///
/// # Errors
/// [`TextError`] for the first pair that is none.
pub fn parse_keys(data: &[u8]) -> Result<Vec<(&str, &str)>, TextError> {
    data.split(|&byte| byte == 0)
        .filter(|pair| !pair.is_empty())
        .map(parse_pair)
        .collect()
}

fn parse_pair(pair: &[u8]) -> Result<(&str, &str), TextError> {
    let at = pair
        .iter()
        .position(|&byte| byte == b'=')
        .ok_or(TextError::NoValue)?;
    let (name, value) = (&pair[..at], &pair[at + 1..]);
    let allowed = |&byte: &u8| byte.is_ascii_alphanumeric() || b".-+@_/".contains(&byte);
    if name.is_empty() || name.len() > MAX_KEY_BYTES || !name.iter().all(allowed) {
        return Err(TextError::Name);
    }
    if value.len() > MAX_VALUE_BYTES {
        return Err(TextError::Value);
    }
    let name = std::str::from_utf8(name).map_err(|_| TextError::Name)?;
    let value = std::str::from_utf8(value).map_err(|_| TextError::Value)?;
    Ok((name, value))
}

/// Appends one pair.
pub fn append_key(out: &mut Vec<u8>, name: &str, value: &str) {
    out.extend_from_slice(name.as_bytes());
    out.push(b'=');
    out.extend_from_slice(value.as_bytes());
    out.push(0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_s_text_is_one_short_line_whatever_it_holds() {
        assert_eq!(PeerText::new("None,CRC32C").to_string(), "None,CRC32C");
        assert_eq!(
            PeerText::new("a\n2026 ERROR \u{1b}[2J'\u{202e}").to_string(),
            "a\\n2026 ERROR \\u{1b}[2J\\'\\u{202e}"
        );
        for text in ["x".repeat(8192), "\u{10ffff}".repeat(2048)] {
            let shown = PeerText::new(&text).to_string();
            assert!(
                shown.len() < MAX_SHOWN_BYTES + 20 && shown.ends_with("(8192 bytes)"),
                "{shown}"
            );
        }
    }
}
