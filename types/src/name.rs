//! What people call things. A name ends up in an IQN, in a device-mapper name and in a path, so it is limited
//! to what all three allow: lower-case ASCII letters, digits, `-` and `.` (RFC 3722 §6.2 limits an IQN to
//! these and `:`, which treeboot keeps as its separator).

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Longest name in bytes: a label of DNS, so that a VM's name can be its host name.
pub const MAX_NAME_BYTES: usize = 63;

/// Why a text is not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nothing there.
    #[error("the {kind} name is empty; give 1 to {MAX_NAME_BYTES} lower-case letters, digits, '-' or '.'")]
    Empty {
        /// What was to be named.
        kind: &'static str,
    },
    /// More than [`MAX_NAME_BYTES`] bytes.
    #[error("the {kind} name '{name}' has {bytes} bytes; the limit is {MAX_NAME_BYTES}")]
    TooLong {
        /// What was to be named.
        kind: &'static str,
        /// The text.
        name: String,
        /// Its length in bytes.
        bytes: usize,
    },
    /// A character outside the set.
    #[error(
        "the {kind} name '{name}' holds {character:?}; use lower-case letters a-z, digits, '-' and '.' only"
    )]
    Character {
        /// What was to be named.
        kind: &'static str,
        /// The text.
        name: String,
        /// The first character that is not allowed.
        character: char,
    },
    /// `-` or `.` at an end, or two dots in a row.
    #[error(
        "the {kind} name '{name}' must begin and end with a letter or a digit, and '.' may not follow '.'"
    )]
    Shape {
        /// What was to be named.
        kind: &'static str,
        /// The text.
        name: String,
    },
    /// The part behind `@` is not a positive number.
    #[error("'{text}' is not a version of an image; write NAME or NAME@VERSION, for instance debian@2")]
    Version {
        /// The text.
        text: String,
    },
}

fn check(kind: &'static str, name: &str) -> Result<(), NameError> {
    if name.is_empty() {
        return Err(NameError::Empty { kind });
    }
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
    if let Some(character) = name.chars().find(|&c| !allowed(c)) {
        return Err(NameError::Character {
            kind,
            name: name.into(),
            character,
        });
    }
    if name.len() > MAX_NAME_BYTES {
        return Err(NameError::TooLong {
            kind,
            name: name.into(),
            bytes: name.len(),
        });
    }
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    if !edge(name.chars().next()) || !edge(name.chars().last()) || name.contains("..") {
        return Err(NameError::Shape {
            kind,
            name: name.into(),
        });
    }
    Ok(())
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        // Shared: a name stands in many places of the trees, and each copy of them would be an allocation.
        pub struct $type(Arc<str>);

        impl $type {
            /// Checks and wraps `name`.
            ///
            /// # Errors
            /// [`NameError`] names the text and the first thing wrong with it.
            pub fn new(name: &str) -> Result<Self, NameError> {
                check($kind, name)?;
                Ok(Self(name.into()))
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $type {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                Self::new(text)
            }
        }

        impl TryFrom<String> for $type {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                Self::new(&text)
            }
        }

        impl From<$type> for String {
            fn from(name: $type) -> String {
                name.0.as_ref().into()
            }
        }
    };
}

name!(
    /// A compute node's name: its identity with the coordinator, never its address.
    HostName,
    "host"
);
name!(
    /// A virtual machine's name, unique on its host.
    VmName,
    "VM"
);
name!(
    /// An image's name without its version.
    ImageName,
    "image"
);

name!(
    /// A snapshot's name, unique on its VM's disk.
    SnapshotName,
    "snapshot"
);

/// One version of an image: immutable, written `name@version`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageId {
    /// The image's name.
    pub name: ImageName,
    /// Its version, counted from 1.
    pub version: u32,
}

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.name, self.version)
    }
}

impl fmt::Debug for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for ImageId {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let reference: ImageRef = text.parse()?;
        let version = reference
            .version
            .ok_or_else(|| NameError::Version { text: text.into() })?;
        Ok(Self {
            name: reference.name,
            version,
        })
    }
}

impl TryFrom<String> for ImageId {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<ImageId> for String {
    fn from(id: ImageId) -> String {
        id.to_string()
    }
}

/// What a person types for an image: `debian` (its newest version) or `debian@2`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRef {
    /// The image's name.
    pub name: ImageName,
    /// The version asked for; the newest where absent.
    pub version: Option<u32>,
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.version {
            Some(version) => write!(f, "{}@{version}", self.name),
            None => write!(f, "{}", self.name),
        }
    }
}

impl FromStr for ImageRef {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let Some((name, version)) = text.split_once('@') else {
            return Ok(Self {
                name: ImageName::new(text)?,
                version: None,
            });
        };
        let digits = !version.is_empty() && version.bytes().all(|b| b.is_ascii_digit());
        let version = version
            .parse()
            .ok()
            .filter(|&v: &u32| digits && v > 0 && !version.starts_with('0'))
            .ok_or_else(|| NameError::Version { text: text.into() })?;
        Ok(Self {
            name: ImageName::new(name)?,
            version: Some(version),
        })
    }
}

impl From<ImageId> for ImageRef {
    fn from(id: ImageId) -> Self {
        Self {
            name: id.name,
            version: Some(id.version),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_anything_but_lower_case_digits_dash_and_dot_is_refused_by_name() {
        for (text, character) in [
            ("a:b", ':'),
            ("a/b", '/'),
            ("a b", ' '),
            ("grün", 'ü'),
            ("Debian", 'D'),
            ("a_b", '_'),
        ] {
            let error = ImageName::new(text).unwrap_err();
            assert_eq!(
                error,
                NameError::Character {
                    kind: "image",
                    name: text.into(),
                    character
                }
            );
            assert!(error.to_string().contains(text));
        }
        for text in ["-a", "a-", ".a", "a.", "a..b"] {
            assert!(
                matches!(VmName::new(text), Err(NameError::Shape { .. })),
                "{text}"
            );
        }
        assert_eq!(HostName::new(""), Err(NameError::Empty { kind: "host" }));
        assert!(HostName::new(&"a".repeat(63)).is_ok());
        assert!(matches!(
            HostName::new(&"a".repeat(64)),
            Err(NameError::TooLong { bytes: 64, .. })
        ));
    }

    #[test]
    fn hosts_whose_names_share_a_prefix_are_different_hosts() {
        assert_ne!(
            HostName::new("10.0.0.1").unwrap(),
            HostName::new("10.0.0.10").unwrap()
        );
    }

    #[test]
    fn an_image_id_prints_as_it_parses() {
        let id: ImageId = "debian-12.5@3".parse().unwrap();
        assert_eq!((id.name.as_str(), id.version), ("debian-12.5", 3));
        assert_eq!(id.to_string(), "debian-12.5@3");
        for bad in [
            "debian",
            "debian@",
            "debian@0",
            "debian@01",
            "debian@-1",
            "debian@+1",
            "debian@4294967296",
        ] {
            assert!(
                matches!(bad.parse::<ImageId>(), Err(NameError::Version { .. })),
                "{bad}"
            );
        }
        assert_eq!("debian".parse::<ImageRef>().unwrap().version, None);
    }
}
