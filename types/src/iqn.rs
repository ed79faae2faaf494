//! iSCSI names (RFC 7143 §4.2.7), and the one grammar by which treeboot names its own.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{HostName, ImageId, VmName};

/// The naming authority of every name that treeboot makes.
pub const TREEBOOT_AUTHORITY: &str = "iqn.2026-11.dev.treeboot";

/// Longest iSCSI name in bytes (RFC 7143 §4.2.7.2).
pub const MAX_IQN_BYTES: usize = 223;

/// An iSCSI name of type `iqn.`, `eui.` or `naa.`, in lower case.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Iqn(Box<str>);

/// Why a text is not an iSCSI name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IqnError {
    /// None of the three types.
    #[error("'{0}' is not an iSCSI name; one looks like iqn.2026-11.org.example:disk1")]
    Type(String),
    /// A character that RFC 3722 does not allow.
    #[error("the iSCSI name '{name}' holds {character:?}; letters, digits, '-', '.' and ':' are allowed")]
    Character {
        /// The text.
        name: String,
        /// The first character that is not allowed.
        character: char,
    },
    /// More than [`MAX_IQN_BYTES`].
    #[error("the iSCSI name '{name}' has {bytes} bytes; the limit is {MAX_IQN_BYTES}")]
    TooLong {
        /// The text.
        name: String,
        /// Its length.
        bytes: usize,
    },
}

impl Iqn {
    /// Parses a name; upper case is folded, as RFC 3722 asks.
    ///
    /// # Errors
    /// [`IqnError`] names the text and what is wrong with it.
    pub fn new(text: &str) -> Result<Self, IqnError> {
        let name = text.to_ascii_lowercase();
        if name.len() > MAX_IQN_BYTES {
            return Err(IqnError::TooLong {
                bytes: name.len(),
                name,
            });
        }
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | ':');
        if let Some(character) = name.chars().find(|&c| !allowed(c)) {
            return Err(IqnError::Character { name, character });
        }
        let typed = ["iqn.", "eui.", "naa."]
            .iter()
            .any(|t| name.len() > t.len() && name.starts_with(t));
        if !typed {
            return Err(IqnError::Type(text.into()));
        }
        Ok(Self(name.into()))
    }

    fn of_ours(rest: fmt::Arguments<'_>) -> Self {
        // Names and versions are bounded (63 and 10 bytes) and of the right characters, so this fits.
        Self(format!("{TREEBOOT_AUTHORITY}:{rest}").into())
    }

    /// The target under which a host exports an image's base.
    pub fn of_image(image: &ImageId) -> Self {
        Self::of_ours(format_args!("image:{}:{}", image.name, image.version))
    }

    /// The target under which a VM's disk is served on its host.
    pub fn of_disk(vm: &VmName) -> Self {
        Self::of_ours(format_args!("disk:{vm}"))
    }

    /// The name under which a host's initiator logs in to its parents.
    pub fn of_host(host: &HostName) -> Self {
        Self::of_ours(format_args!("host:{host}"))
    }

    /// The name under which a VM's front end logs in to its disk.
    pub fn of_vm(vm: &VmName) -> Self {
        Self::of_ours(format_args!("vm:{vm}"))
    }

    /// The image whose base this target exports, where it is one of ours.
    pub fn image(&self) -> Option<ImageId> {
        let (name, version) = self.ours()?.strip_prefix("image:")?.split_once(':')?;
        format!("{name}@{version}").parse().ok()
    }

    /// The host that this initiator belongs to, where it is one of ours.
    pub fn host(&self) -> Option<HostName> {
        HostName::new(self.ours()?.strip_prefix("host:")?).ok()
    }

    /// The VM whose disk this target serves, where it is one of ours.
    pub fn disk(&self) -> Option<VmName> {
        VmName::new(self.ours()?.strip_prefix("disk:")?).ok()
    }

    fn ours(&self) -> Option<&str> {
        self.0.strip_prefix(TREEBOOT_AUTHORITY)?.strip_prefix(':')
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Iqn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Iqn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Iqn {
    type Err = IqnError;
    fn from_str(text: &str) -> Result<Self, IqnError> {
        Self::new(text)
    }
}

impl TryFrom<String> for Iqn {
    type Error = IqnError;
    fn try_from(text: String) -> Result<Self, IqnError> {
        Self::new(&text)
    }
}

impl From<Iqn> for String {
    fn from(iqn: Iqn) -> String {
        iqn.0.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_names_parse_back_to_what_they_name() {
        let image: ImageId = "debian-12.5@3".parse().unwrap();
        assert_eq!(
            Iqn::of_image(&image).as_str(),
            "iqn.2026-11.dev.treeboot:image:debian-12.5:3"
        );
        assert_eq!(Iqn::of_image(&image).image(), Some(image));
        let host = HostName::new("10.0.0.1").unwrap();
        assert_eq!(Iqn::of_host(&host).host(), Some(host));
        let vm = VmName::new("web-1").unwrap();
        assert_eq!(Iqn::of_disk(&vm).disk(), Some(vm.clone()));
        assert_eq!(Iqn::of_vm(&vm).disk(), None);
        assert_eq!(
            Iqn::new("iqn.2026-11.dev.treebooter:disk:web-1").unwrap().disk(),
            None
        );
    }

    #[test]
    fn the_longest_names_still_fit_an_iqn() {
        let name = "a".repeat(63);
        let image = ImageId {
            name: name.parse().unwrap(),
            version: u32::MAX,
        };
        assert!(Iqn::new(Iqn::of_image(&image).as_str()).is_ok());
    }

    #[test]
    fn what_is_no_iscsi_name_is_refused_by_name() {
        assert!(matches!(Iqn::new("disk"), Err(IqnError::Type(_))));
        assert!(matches!(Iqn::new("iqn."), Err(IqnError::Type(_))));
        assert!(matches!(
            Iqn::new("iqn.2026-11.a:b c"),
            Err(IqnError::Character { character: ' ', .. })
        ));
        assert!(matches!(
            Iqn::new(&format!("iqn.{}", "a".repeat(300))),
            Err(IqnError::TooLong { .. })
        ));
        assert_eq!(
            Iqn::new("IQN.2026-11.org.Example:A").unwrap().as_str(),
            "iqn.2026-11.org.example:a"
        );
    }
}
