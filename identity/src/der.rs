//! The few fields of certificates and requests that treeboot reads: names, dates, keys (RFC 5280 §4.1, RFC 2986 §4.2).
//! Whether a certificate is good is rustls' to say; these are read of good ones.

use ring::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};

const INTEGER: u8 = 0x02;
const BIT_STRING: u8 = 0x03;
const OBJECT_IDENTIFIER: u8 = 0x06;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
/// The version of a certificate, explicitly tagged.
const VERSION: u8 = 0xa0;

/// id-at-commonName, 2.5.4.3.
const COMMON_NAME: [u8; 3] = [0x55, 0x04, 0x03];
/// id-at-organizationalUnitName, 2.5.4.11.
const ORGANIZATIONAL_UNIT: [u8; 3] = [0x55, 0x04, 0x0b];
/// The algorithm of a P-256 key: id-ecPublicKey, prime256v1 (RFC 5480 §2.1.1).
const P256: [u8; 19] = [
    0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03,
    0x01, 0x07,
];

/// Values one after another.
#[derive(Clone, Copy)]
struct Values<'a>(&'a [u8]);

struct Value<'a> {
    tag: u8,
    content: &'a [u8],
    /// With tag and length.
    whole: &'a [u8],
}

impl<'a> Values<'a> {
    fn next(&mut self) -> Option<Value<'a>> {
        let tag = *self.0.first()?;
        let first = *self.0.get(1)?;
        let (length, header) = match first {
            0..=0x7f => (usize::from(first), 2),
            // More than 64 KiB is nothing that we read.
            0x81 => (usize::from(*self.0.get(2)?), 3),
            0x82 => (
                usize::from(u16::from_be_bytes([*self.0.get(2)?, *self.0.get(3)?])),
                4,
            ),
            _ => return None,
        };
        let end = header + length;
        let value = Value {
            tag,
            content: self.0.get(header..end)?,
            whole: self.0.get(..end)?,
        };
        self.0 = self.0.get(end..)?;
        Some(value)
    }

    fn take(&mut self, tag: u8) -> Option<Value<'a>> {
        self.next().filter(|value| value.tag == tag)
    }

    fn sequence(&mut self) -> Option<Self> {
        self.take(SEQUENCE).map(|value| Self(value.content))
    }

    /// The content of a bit string of whole bytes.
    fn bits(&mut self) -> Option<&'a [u8]> {
        match self.take(BIT_STRING)?.content.split_first()? {
            (0, bits) => Some(bits),
            _ => None,
        }
    }

    /// The key of a SubjectPublicKeyInfo, which must be of P-256.
    fn key(&mut self) -> Option<&'a [u8]> {
        let mut info = self.sequence()?;
        let algorithm = info.sequence()?;
        let key = info.bits()?;
        (algorithm.0 == P256).then_some(key)
    }
}

/// What treeboot reads of a certificate.
pub(crate) struct Parsed<'a> {
    /// The subject's organizational unit, where there is exactly one.
    pub(crate) unit: Option<&'a str>,
    /// The subject's common name, where there is exactly one.
    pub(crate) name: Option<&'a str>,
    /// Seconds since 1970.
    pub(crate) from: u64,
    /// Seconds since 1970.
    pub(crate) until: u64,
    /// The public key, a point of P-256.
    pub(crate) key: &'a [u8],
}

/// Reads a certificate; `None` where it is not one, or its key is of another kind.
pub(crate) fn certificate(der: &[u8]) -> Option<Parsed<'_>> {
    let mut body = Values(der).sequence()?.sequence()?;
    body.take(VERSION)?;
    body.take(INTEGER)?; // serial number
    body.sequence()?; // algorithm of the signature
    body.sequence()?; // issuer
    let mut validity = body.sequence()?;
    let (from, until) = (moment(&validity.next()?)?, moment(&validity.next()?)?);
    let subject = body.sequence()?;
    Some(Parsed {
        unit: only(subject, ORGANIZATIONAL_UNIT),
        name: only(subject, COMMON_NAME),
        from,
        until,
        key: body.key()?,
    })
}

/// The public key of a request that was signed with it.
pub(crate) fn request(der: &[u8]) -> Option<&[u8]> {
    let mut request = Values(der).sequence()?;
    let signed = request.take(SEQUENCE)?;
    request.sequence()?; // algorithm of the signature: there is one for such a key
    let signature = request.bits()?;
    let mut body = Values(signed.content);
    body.take(INTEGER)?; // version
    body.sequence()?; // subject, which claims what it likes
    let key = body.key()?;
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, key)
        .verify(signed.whole, signature)
        .ok()?;
    Some(key)
}

/// The value of an attribute that a name has exactly once.
fn only<'a>(mut name: Values<'a>, attribute: [u8; 3]) -> Option<&'a str> {
    let mut found = None;
    while let Some(set) = name.next() {
        let mut pair = (set.tag == SET).then_some(Values(set.content))?.sequence()?;
        if pair.take(OBJECT_IDENTIFIER)?.content != attribute {
            continue;
        }
        if found.is_some() {
            return None;
        }
        found = Some(std::str::from_utf8(pair.next()?.content).ok()?);
    }
    found
}

/// A date as seconds since 1970; zero for one before.
fn moment(value: &Value<'_>) -> Option<u64> {
    let text = std::str::from_utf8(value.content).ok()?.strip_suffix('Z')?;
    if !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let (year, rest) = match value.tag {
        UTC_TIME => {
            let (year, rest) = text.split_at_checked(2)?;
            let year: i64 = year.parse().ok()?;
            // RFC 5280 §4.1.2.5.1.
            (if year < 50 { 2000 + year } else { 1900 + year }, rest)
        }
        GENERALIZED_TIME => {
            let (year, rest) = text.split_at_checked(4)?;
            (year.parse().ok()?, rest)
        }
        _ => return None,
    };
    let part = |index: usize| rest.get(index * 2..index * 2 + 2)?.parse::<i64>().ok();
    if rest.len() != 10 {
        return None;
    }
    let (month, day) = (part(0)?, part(1)?);
    if !(1..=12).contains(&month) {
        return None;
    }
    // Days of the Gregorian calendar, counted in years that begin in March, so that a leap day is the last.
    let (year, month) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 1 - 719_468;
    let seconds = ((days * 24 + part(2)?) * 60 + part(3)?) * 60 + part(4)?;
    Some(u64::try_from(seconds).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unix(tag: u8, text: &str) -> Option<u64> {
        moment(&Value {
            tag,
            content: text.as_bytes(),
            whole: &[],
        })
    }

    #[test]
    fn dates_become_seconds_since_1970() {
        // From `date -u -d '…' +%s`.
        for (tag, text, seconds) in [
            (UTC_TIME, "700101000000Z", 0),
            (UTC_TIME, "261121193000Z", 1_795_289_400),
            (UTC_TIME, "240229235959Z", 1_709_251_199),
            (UTC_TIME, "491231235959Z", 2_524_607_999),
            (GENERALIZED_TIME, "20500101000000Z", 2_524_608_000),
            (GENERALIZED_TIME, "21000301000000Z", 4_107_542_400),
            (GENERALIZED_TIME, "19691231235959Z", 0),
        ] {
            assert_eq!(unix(tag, text), Some(seconds), "{text}");
        }
        for bad in [
            "",
            "Z",
            "7001010000Z",
            "701301000000Z",
            "70010100000éZ",
            "+00101000000Z",
        ] {
            assert_eq!(unix(UTC_TIME, bad), None, "{bad}");
        }
    }

    #[test]
    fn what_is_cut_off_or_changed_is_not_read_as_something_else() {
        let key = crate::NewKey::generate().unwrap();
        let whole = key.request().unwrap();
        assert!(request(&whole).is_some());
        for length in 0..whole.len() {
            assert!(request(&whole[..length]).is_none(), "{length} bytes");
        }
        for place in 0..whole.len() {
            let mut changed = whole.clone();
            changed[place] ^= 1;
            // The algorithm's name beside the signature is not signed, and not read.
            let read = request(&changed);
            assert!(read.is_none() || read == request(&whole), "byte {place}");
        }
    }
}
