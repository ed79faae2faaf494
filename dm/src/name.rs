//! The one grammar of names of device-mapper devices.
//!
//! `treeboot:KIND:…`, the parts separated by `:`, which no treeboot name may hold, so that a name parses back to
//! exactly what it names and `web-1` is never taken for `web-10`. device-mapper allows 127 bytes; the longest
//! of ours has 95. Each device's UUID is [`UUID_PREFIX`] and its name: a device with our name and another UUID is
//! somebody else's and is left alone.

use std::fmt;
use std::str::FromStr;

use treeboot_types::{ImageId, StripeIndex, VmName};

/// What the UUID of every device of ours begins with.
pub const UUID_PREFIX: &str = "TREEBOOT-";

const NAME_PREFIX: &str = "treeboot";

/// A device of ours, by what it is for; bottom of the stack first.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DmDevice {
    /// The paths to the parents of one stripe of an image.
    Multipath(ImageId, StripeIndex),
    /// The same for the image's hash tree.
    HashMultipath(ImageId, StripeIndex),
    /// Routes stripe units to the stripes' multipath devices.
    Switch(ImageId),
    /// Checks every block that comes from a parent.
    Verity(ImageId),
    /// All images of a cache group, one behind another.
    Origins,
    /// All cache devices of a cache group, one behind another.
    CacheData,
    /// The metadata of the cache group.
    CacheMetadata,
    /// The cache over [`Self::Origins`].
    CacheGroup,
    /// An image's read-only base: its part of the cache group.
    Base(ImageId),
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
        let of_image = |f: &mut fmt::Formatter<'_>, kind: &str, image: &ImageId| {
            write!(f, "{NAME_PREFIX}:{kind}:{}:{}", image.name, image.version)
        };
        match self {
            Self::Multipath(image, stripe) => {
                of_image(f, "mpath", image)?;
                write!(f, ":{stripe}")
            }
            Self::HashMultipath(image, stripe) => {
                of_image(f, "hashes", image)?;
                write!(f, ":{stripe}")
            }
            Self::Switch(image) => of_image(f, "switch", image),
            Self::Verity(image) => of_image(f, "verity", image),
            Self::Base(image) => of_image(f, "base", image),
            Self::Origins => write!(f, "{NAME_PREFIX}:origins"),
            Self::CacheData => write!(f, "{NAME_PREFIX}:cachedata"),
            Self::CacheMetadata => write!(f, "{NAME_PREFIX}:cachemeta"),
            Self::CacheGroup => write!(f, "{NAME_PREFIX}:cache"),
            Self::Disk(vm) => write!(f, "{NAME_PREFIX}:disk:{vm}"),
        }
    }
}

impl FromStr for DmDevice {
    type Err = NotOurs;
    fn from_str(text: &str) -> Result<Self, NotOurs> {
        let not_ours = || NotOurs(text.into());
        let image = |name: &str, version: &str| format!("{name}@{version}").parse().map_err(|_| not_ours());
        let stripe = |stripe: &str| stripe.parse().map(StripeIndex).map_err(|_| not_ours());
        let parts: Vec<&str> = text.split(':').collect();
        let device = match parts.as_slice() {
            [NAME_PREFIX, "mpath", name, version, index] => {
                Self::Multipath(image(name, version)?, stripe(index)?)
            }
            [NAME_PREFIX, "hashes", name, version, index] => {
                Self::HashMultipath(image(name, version)?, stripe(index)?)
            }
            [NAME_PREFIX, "switch", name, version] => Self::Switch(image(name, version)?),
            [NAME_PREFIX, "verity", name, version] => Self::Verity(image(name, version)?),
            [NAME_PREFIX, "base", name, version] => Self::Base(image(name, version)?),
            [NAME_PREFIX, "origins"] => Self::Origins,
            [NAME_PREFIX, "cachedata"] => Self::CacheData,
            [NAME_PREFIX, "cachemeta"] => Self::CacheMetadata,
            [NAME_PREFIX, "cache"] => Self::CacheGroup,
            [NAME_PREFIX, "disk", vm] => Self::Disk(VmName::new(vm).map_err(|_| not_ours())?),
            _ => return Err(not_ours()),
        };
        // A number can be written in several ways; only ours is ours.
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

    fn image(text: &str) -> ImageId {
        text.parse().unwrap()
    }

    #[test]
    fn every_name_parses_back_to_what_it_names() {
        let long = ImageId {
            name: "a".repeat(63).parse().unwrap(),
            version: u32::MAX,
        };
        for device in [
            DmDevice::Multipath(image("debian-12.5@3"), StripeIndex(1)),
            DmDevice::HashMultipath(long.clone(), StripeIndex(u16::MAX)),
            DmDevice::Switch(image("a@1")),
            DmDevice::Verity(image("a@1")),
            DmDevice::Origins,
            DmDevice::CacheData,
            DmDevice::CacheMetadata,
            DmDevice::CacheGroup,
            DmDevice::Base(long),
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
        for name in [
            "",
            "treeboot",
            "treeboot:",
            "treeboot:base:a",
            "treeboot:base:a:01",
            "treeboot:base:a:0",
            "treeboot:base:A:1",
            "treeboot:disk:web_1",
            "treeboot:disk:web-1:0",
            "treeboot-disk-web",
            "treeboot:mpath:a:1:+1",
            "vg-treeboot:disk:web",
            "treeboot:origins:x",
        ] {
            assert!(name.parse::<DmDevice>().is_err(), "{name}");
        }
        let disk = DmDevice::Disk("web-1".parse().unwrap());
        assert!(DmDevice::recognise("treeboot:disk:web-1", None).is_err());
        assert!(DmDevice::recognise("treeboot:disk:web-1", Some("LVM-abc")).is_err());
        assert!(DmDevice::recognise("treeboot:disk:web-10", Some(&disk.uuid())).is_err());
    }
}
