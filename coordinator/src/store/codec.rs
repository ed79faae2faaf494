//! Keys as text, values as a format number and JSON: what is wrong can be read with the naked eye.

use serde::Serialize;
use serde::de::DeserializeOwned;

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
    let (&format, json) = value.split_first().ok_or_else(|| damaged(&text, Damage::Empty))?;
    if format > FORMAT {
        return Err(StoreError::Newer {
            what: format!("the entry {text} of the record"),
            found: format,
        });
    }
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

fn value_of<T: DeserializeOwned>(key: &str, json: &[u8]) -> Result<T, StoreError> {
    serde_json::from_slice(json).map_err(|error| damaged(key, error))
}

pub(super) fn value(record: &Record) -> Result<Vec<u8>, serde_json::Error> {
    fn put<T: Serialize>(value: &T) -> Result<Vec<u8>, serde_json::Error> {
        let mut bytes = vec![FORMAT];
        serde_json::to_writer(&mut bytes, value)?;
        Ok(bytes)
    }
    match record {
        Record::Epoch(epoch) => put(epoch),
        Record::Newest(version) => put(version),
        Record::Image(image) => put(image),
        Record::Host(host) => put(host),
        Record::Attachment(attachment) => put(attachment),
    }
}
