//! `key=value` pairs, each ended by a zero byte (RFC 7143 §6.1).

/// Longest name of a key in bytes (RFC 7143 §6.1).
pub const MAX_KEY_BYTES: usize = 63;

/// Longest value in bytes (RFC 7143 §6.1: 8192 for binary values, less for the others).
pub const MAX_VALUE_BYTES: usize = 8192;

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
