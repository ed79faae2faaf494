//! The one grammar of names of device-mapper devices.
//!
//! `treeboot:KIND:…`, the parts separated by `:`, which no treeboot name may hold, so that a name parses back to
//! exactly what it names and `web-1` is never taken for `web-10`. What belongs to an image is named after its content
//! (all 64 digits of its digest), because one content may be exported under several names. device-mapper allows 127
//! bytes; the longest of ours has 85. Each device's UUID is [`UUID_PREFIX`] and its name: a device with our name and
//! another UUID is somebody else's and is left alone.

use std::fmt;
use std::str::FromStr;

use treeboot_types::{Digest, StripeIndex, VmName};

/// What the UUID of every device of ours begins with.
pub const UUID_PREFIX: &str = "TREEBOOT-";

const NAME_PREFIX: &str = "treeboot";

/// A device of ours, by what it is for; bottom of the stack first.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DmDevice {
    /// The paths to the parents of one stripe of a content. Read-only.
    Multipath(Digest, StripeIndex),
    /// Routes stripe units to the stripes' multipath devices. Read-only; only where there are several stripes.
    Switch(Digest),
    /// Checks every block that comes from a parent. Read-only.
    Verity(Digest),
    /// Cache group of kind dm-cache: every content at its range of one address space, the rest of it errors. Passes
    /// reads on and drops writes, because the filler writes through the cache what it has read.
    Origins,
    /// All cache devices of a cache group, one behind another; the cache device of either kind.
    CacheData,
    /// The metadata of a cache group of kind dm-cache.
    CacheMetadata,
    /// Kind bcache: all cache devices, until the first error of one: from then on, none.
    CacheGuard,
    /// Kind dm-cache: the cache over [`Self::Origins`].
    CacheGroup,
    /// Kind dm-cache: a content's range of [`Self::CacheGroup`]. Read-only.
    Cached(Digest),
    /// Kind bcache: a content behind 16 local sectors that hold its superblock; what bcache registers.
    Backing(Digest),
    /// A content's part of the cache group and, where that fails, its [`Self::Verity`]. Read-only.
    Served(Digest),
    /// A content's base: its [`Self::Served`], or, past the cache, its [`Self::Verity`]. Read-only.
    Base(Digest),
    /// The same again for LIO, which claims what it exports, as device-mapper claims a base for the disks over it. Read-only.
    Export(Digest),
    /// A VM's disk: base and delta.
    Disk(VmName),
}

/// Why a text is not a name of ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not the name of a device-mapper device of treeboot")]
pub struct NotOurs(pub String);

impl DmDevice {
    /// The UUID that marks the device as ours.
    pub fn uuid(&self) -> String {
        format!("{UUID_PREFIX}{self}")
    }

    /// The device that both its name and its UUID say is ours.
    ///
    /// # Errors
    /// [`NotOurs`]: leave the device alone.
    pub fn recognise(name: &str, uuid: Option<&str>) -> Result<Self, NotOurs> {
        let device: Self = name.parse()?;
        if uuid.is_some_and(|uuid| uuid == device.uuid()) {
            Ok(device)
        } else {
            Err(NotOurs(name.into()))
        }
    }
}

impl fmt::Display for DmDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(NAME_PREFIX)?;
        match self {
            Self::Multipath(content, stripe) => write!(f, ":mpath:{content}:{stripe}"),
            Self::Switch(content) => write!(f, ":switch:{content}"),
            Self::Verity(content) => write!(f, ":verity:{content}"),
            Self::Origins => f.write_str(":origins"),
            Self::CacheData => f.write_str(":cachedata"),
            Self::CacheMetadata => f.write_str(":cachemeta"),
            Self::CacheGuard => f.write_str(":cacheguard"),
            Self::CacheGroup => f.write_str(":cache"),
            Self::Cached(content) => write!(f, ":cached:{content}"),
            Self::Backing(content) => write!(f, ":backing:{content}"),
            Self::Served(content) => write!(f, ":served:{content}"),
            Self::Base(content) => write!(f, ":base:{content}"),
            Self::Export(content) => write!(f, ":export:{content}"),
            Self::Disk(vm) => write!(f, ":disk:{vm}"),
        }
    }
}

impl FromStr for DmDevice {
    type Err = NotOurs;
    fn from_str(text: &str) -> Result<Self, NotOurs> {
        let not_ours = || NotOurs(text.into());
        let content = |digest: &str| digest.parse::<Digest>().map_err(|_| not_ours());
        let parts: Vec<&str> = text.split(':').collect();
        let device = match parts.as_slice() {
            [NAME_PREFIX, "mpath", digest, stripe] => Self::Multipath(
                content(digest)?,
                stripe.parse().map(StripeIndex).map_err(|_| not_ours())?,
            ),
            [NAME_PREFIX, "switch", digest] => Self::Switch(content(digest)?),
            [NAME_PREFIX, "verity", digest] => Self::Verity(content(digest)?),
            [NAME_PREFIX, "origins"] => Self::Origins,
            [NAME_PREFIX, "cachedata"] => Self::CacheData,
            [NAME_PREFIX, "cachemeta"] => Self::CacheMetadata,
            [NAME_PREFIX, "cacheguard"] => Self::CacheGuard,
            [NAME_PREFIX, "cache"] => Self::CacheGroup,
            [NAME_PREFIX, "cached", digest] => Self::Cached(content(digest)?),
            [NAME_PREFIX, "backing", digest] => Self::Backing(content(digest)?),
            [NAME_PREFIX, "served", digest] => Self::Served(content(digest)?),
            [NAME_PREFIX, "base", digest] => Self::Base(content(digest)?),
            [NAME_PREFIX, "export", digest] => Self::Export(content(digest)?),
            [NAME_PREFIX, "disk", vm] => Self::Disk(VmName::new(vm).map_err(|_| not_ours())?),
            _ => return Err(not_ours()),
        };
        // A number and a digest can be written in several ways; only ours is ours.
        if device.to_string() == text {
            Ok(device)
        } else {
            Err(not_ours())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_parses_back_to_what_it_names() {
        let content = Digest([0xa5; 32]);
        for device in [
            DmDevice::Multipath(content, StripeIndex(u16::MAX)),
            DmDevice::Switch(content),
            DmDevice::Verity(content),
            DmDevice::Origins,
            DmDevice::CacheData,
            DmDevice::CacheMetadata,
            DmDevice::CacheGuard,
            DmDevice::CacheGroup,
            DmDevice::Cached(content),
            DmDevice::Backing(content),
            DmDevice::Served(content),
            DmDevice::Base(content),
            DmDevice::Export(content),
            DmDevice::Disk("web-1".parse().unwrap()),
        ] {
            let name = device.to_string();
            assert!(name.len() < 128 && device.uuid().len() < 129, "{name}");
            assert_eq!(name.parse(), Ok(device.clone()));
            assert_eq!(DmDevice::recognise(&name, Some(&device.uuid())), Ok(device));
        }
    }

    #[test]
    fn what_only_looks_like_ours_is_left_alone() {
        let digest = "a5".repeat(32);
        for name in [
            "",
            "treeboot",
            "treeboot:",
            "treeboot:base:a5",
            "treeboot:disk:web_1",
            "treeboot:disk:web-1:0",
            "treeboot-disk-web",
            "vg-treeboot:disk:web",
            "treeboot:origins:x",
            &format!("treeboot:base:{}", digest.to_uppercase()),
            &format!("treeboot:base:{digest}0"),
            &format!("treeboot:base:{digest}:0"),
            &format!("treeboot:mpath:{digest}"),
            &format!("treeboot:mpath:{digest}:+1"),
            &format!("treeboot:mpath:{digest}:01"),
        ] {
            assert!(name.parse::<DmDevice>().is_err(), "{name}");
        }
        let disk = DmDevice::Disk("web-1".parse().unwrap());
        assert!(DmDevice::recognise("treeboot:disk:web-1", None).is_err());
        assert!(DmDevice::recognise("treeboot:disk:web-1", Some("LVM-abc")).is_err());
        assert!(DmDevice::recognise("treeboot:disk:web-10", Some(&disk.uuid())).is_err());
    }
}
