//! Keys as text, values as a format number and JSON: what is wrong can be read with the naked eye.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::tree::{Key, Record};

use super::StoreError;

/// The format that this version writes, the first byte of every value.
pub const FORMAT: u8 = 1;

/// `epoch`, `newest/NAME`, `image/NAME@VERSION`, `host/NAME`, `place/NAME@VERSION/HOST`; names hold no `/`.
pub(super) fn key(key: &Key) -> String {
    match key {
        Key::Epoch => "epoch".into(),
        Key::Newest(name) => format!("newest/{name}"),
        Key::Image(id) => format!("image/{id}"),
        Key::Host(host) => format!("host/{host}"),
        Key::Attachment(image, host) => format!("place/{image}/{host}"),
    }
}

#[derive(Debug, thiserror::Error)]
enum Damage {
    #[error("the key is not one of ours")]
    Key,
    #[error("the value is empty")]
    Empty,
}

fn damaged(key: &str, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> StoreError {
    StoreError::Damaged {
        key: key.into(),
        source: source.into(),
    }
}

pub(super) fn entry(key: &[u8], value: &[u8]) -> Result<(Key, Record), StoreError> {
    let text = String::from_utf8_lossy(key).into_owned();
    let json = json_of(&text, value)?;
    let (kind, rest) = text.split_once('/').unwrap_or((&text, ""));
    let name = |error| damaged(&text, error);
    let parsed = match kind {
        "epoch" if rest.is_empty() => (Key::Epoch, Record::Epoch(value_of(&text, json)?)),
        "newest" => (
            Key::Newest(rest.parse().map_err(name)?),
            Record::Newest(value_of(&text, json)?),
        ),
        "image" => (
            Key::Image(rest.parse().map_err(name)?),
            Record::Image(value_of(&text, json)?),
        ),
        "host" => (
            Key::Host(rest.parse().map_err(name)?),
            Record::Host(value_of(&text, json)?),
        ),
        "place" => {
            let (image, host) = rest.split_once('/').ok_or_else(|| damaged(&text, Damage::Key))?;
            (
                Key::Attachment(image.parse().map_err(name)?, host.parse().map_err(name)?),
                Record::Attachment(value_of(&text, json)?),
            )
        }
        _ => return Err(damaged(&text, Damage::Key)),
    };
    Ok(parsed)
}

/// How many entries a record has and what they come to, in any order: a word of its own in each batch, by which a loss is found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Sum {
    pub(super) entries: u64,
    /// Exclusive or of each entry's hash.
    hash: u64,
}

impl Sum {
    /// An entry comes; none is no entry.
    pub(super) fn with(&mut self, key: &str, value: Option<&[u8]>) {
        if let Some(value) = value {
            self.entries = self.entries.wrapping_add(1);
            self.hash ^= hash_of(key, value);
        }
    }

    /// An entry goes.
    pub(super) fn without(&mut self, key: &str, value: Option<&[u8]>) {
        if let Some(value) = value {
            self.entries = self.entries.wrapping_sub(1);
            self.hash ^= hash_of(key, value);
        }
    }

    pub(super) fn value(self) -> Result<Vec<u8>, serde_json::Error> {
        put(&self)
    }

    pub(super) fn of_value(key: &str, value: &[u8]) -> Result<Self, StoreError> {
        value_of(key, json_of(key, value)?)
    }
}

/// FNV-1a, 64 bits: it finds accidents, and nobody gains by fooling it who can write the record.
fn hash_of(key: &str, value: &[u8]) -> u64 {
    let bytes = key.bytes().chain([0]).chain(value.iter().copied());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// What follows the format, where that is one that we read.
pub(super) fn json_of<'a>(key: &str, value: &'a [u8]) -> Result<&'a [u8], StoreError> {
    let (&format, json) = value.split_first().ok_or_else(|| damaged(key, Damage::Empty))?;
    if format > FORMAT {
        return Err(StoreError::Newer {
            what: format!("the entry {key} of the record"),
            found: format,
        });
    }
    Ok(json)
}

fn value_of<T: DeserializeOwned>(key: &str, json: &[u8]) -> Result<T, StoreError> {
    serde_json::from_slice(json).map_err(|error| damaged(key, error))
}

fn put<T: Serialize>(value: &T) -> Result<Vec<u8>, serde_json::Error> {
    let mut bytes = vec![FORMAT];
    serde_json::to_writer(&mut bytes, value)?;
    Ok(bytes)
}

pub(super) fn value(record: &Record) -> Result<Vec<u8>, serde_json::Error> {
    match record {
        Record::Epoch(epoch) => put(epoch),
        Record::Newest(version) => put(version),
        Record::Image(image) => put(image),
        Record::Host(host) => put(host),
        Record::Attachment(attachment) => put(attachment),
    }
}
