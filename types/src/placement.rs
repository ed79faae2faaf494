//! What coordinator and agents say of images, hosts and places in a tree, as values.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::{Digest, Epoch, HostName, ImageId, Iqn, StripeIndex};

/// `host:port` of a target or service; an IPv6 address stands in brackets.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Portal(Box<str>);

/// Why a text is not a portal.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not an address; write HOST:PORT, an IPv6 address in brackets, for instance [::1]:3260")]
pub struct PortalError(pub String);

/// Longest portal in bytes: the longest DNS name (253), a colon and five digits.
const MAX_PORTAL_BYTES: usize = 259;

impl Portal {
    /// Checks and wraps `text`.
    ///
    /// # Errors
    /// [`PortalError`] where it is not `host:port`.
    pub fn new(text: &str) -> Result<Self, PortalError> {
        let error = || PortalError(text.chars().take(MAX_PORTAL_BYTES).collect());
        if text.len() > MAX_PORTAL_BYTES {
            return Err(error());
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(error)?;
        let digits = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
        if !digits || port.parse::<u16>().map_or(true, |port| port == 0) {
            return Err(error());
        }
        let valid = match host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
            // A zone (`fe80::1%eth0`) is for the host that wrote it and nobody else, so it is refused with the rest.
            Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
            None => {
                !host.is_empty()
                    && host
                        .bytes()
                        .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'))
            }
        };
        if valid {
            Ok(Self(text.into()))
        } else {
            Err(error())
        }
    }

    /// The portal as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Portal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Portal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Portal {
    type Err = PortalError;
    fn from_str(text: &str) -> Result<Self, PortalError> {
        Self::new(text)
    }
}

impl TryFrom<String> for Portal {
    type Error = PortalError;
    fn try_from(text: String) -> Result<Self, PortalError> {
        Self::new(&text)
    }
}

impl From<Portal> for String {
    fn from(portal: Portal) -> String {
        portal.0.into()
    }
}

/// What describes a host: `zone`, `rack` and whatever else an installation wants.
pub type Labels = BTreeMap<String, String>;

/// A place from which an image's base can be read.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Endpoint {
    /// Where the target listens.
    pub portal: Portal,
    /// The target's name.
    pub target: Iqn,
    /// LUN of the data.
    pub data_lun: u16,
    /// LUN of the hash tree; absent on a foreign target.
    pub hash_lun: Option<u16>,
}

/// One of an image's origins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// Where it is served.
    pub endpoint: Endpoint,
    /// The agent whose store it is; absent for a foreign target.
    pub host: Option<HostName>,
    /// Where it stands.
    pub labels: Labels,
}

/// An image's record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Name and version.
    pub id: ImageId,
    /// Root of its dm-verity tree: its content's identity.
    pub digest: Digest,
    /// Its size.
    pub bytes: u64,
    /// Bytes in a chunk, a power of two.
    pub chunk_bytes: u32,
    /// In how many parts it is read.
    pub stripes: u16,
    /// Bytes that belong to one stripe before the next one's turn; a multiple of `chunk_bytes`.
    pub stripe_unit_bytes: u64,
    /// Who has all of it; never empty.
    pub origins: Vec<Origin>,
    /// When it was made, for people only.
    pub created_unix_ms: u64,
    /// Its size without holes.
    pub allocated_bytes: u64,
}

/// How blocks move on a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum PlaneKind {
    /// Embedded initiator, cache and target.
    User,
    /// open-iscsi, device-mapper and LIO.
    Kernel,
}

/// What a host says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostInfo {
    /// Its name.
    pub name: HostName,
    /// Random, kept in the agent's state directory: tells a restart from a second agent of one name.
    pub instance: String,
    /// Where its `Agent` service listens.
    pub agent_address: String,
    /// Where its target listens.
    pub portal: String,
    /// How blocks move on it.
    pub plane: PlaneKind,
    /// How many stripes it can read apart; 1 where it cannot split.
    pub max_stripes: u16,
    /// Where it stands.
    pub labels: Labels,
    /// Of its agent.
    pub version: String,
    /// Its share of slots, from 1.
    pub weight: u32,
    /// Has a working hypervisor.
    pub runs_vms: bool,
    /// Accepts imports.
    pub holds_store: bool,
}

/// How active parents share the load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum PathPolicy {
    /// By turns.
    #[default]
    RoundRobin,
    /// To the one that would answer soonest.
    ServiceTime,
    /// To the one with the fewest commands outstanding.
    QueueLength,
}

/// One from whom a host reads.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Parent {
    /// Its name; absent for a foreign origin.
    pub host: Option<HostName>,
    /// Where it exports.
    pub endpoint: Arc<Endpoint>,
    /// Whether it has the whole image.
    pub origin: bool,
    /// Its depth; an origin has 0.
    pub depth: u32,
}

/// A host's place in one stripe's tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StripePlacement {
    /// Which stripe.
    pub stripe: StripeIndex,
    /// Share the load by `policy`.
    pub active: Vec<Parent>,
    /// In this order; their bytes are counted apart.
    pub fallbacks: Vec<Parent>,
    /// How the active ones share.
    pub policy: PathPolicy,
    /// Of the host that this is for; an origin has 0.
    pub depth: u32,
}

/// A host that may attach.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Child {
    /// Its name.
    pub host: HostName,
    /// In which stripe.
    pub stripe: StripeIndex,
    /// It holds no slot here and comes only while its own parents fail.
    pub fallback: bool,
}

/// All that a host needs to know of its place in one image's trees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// The image, its origins nearest first.
    pub image: Arc<Image>,
    /// When this was decided.
    pub epoch: Epoch,
    /// One for each stripe, by index.
    pub stripes: Vec<StripePlacement>,
    /// Who may attach.
    pub children: Vec<Child>,
}

/// How far an attachment has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum AttachState {
    /// Has a slot and exports, but may not be able to read yet.
    Pending,
    /// Its export is up.
    Ready,
}

/// A host's view of one image it is attached to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// The image.
    pub image: ImageId,
    /// Its content.
    pub digest: Digest,
    /// Of the placement that the host acts on.
    pub epoch: Epoch,
    /// Under which the host exports.
    pub endpoint: Option<Endpoint>,
    /// How far it has come.
    pub state: AttachState,
    /// What it acts on.
    pub stripes: Vec<StripePlacement>,
}

/// What is wrong with a parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    /// It shipped what the hash tree does not have.
    WrongBytes,
    /// It does not answer.
    Unreachable,
    /// It answers late.
    Slow,
}

/// A host's complaint about a parent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadParent {
    /// Reading what.
    pub image: ImageId,
    /// Which stripe.
    pub stripe: StripeIndex,
    /// The parent; absent for a foreign origin.
    pub host: Option<HostName>,
    /// Where it was read.
    pub portal: String,
    /// What is wrong.
    pub fault: Fault,
    /// How often since the last report.
    pub count: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_portal_is_a_host_and_a_port_and_an_ipv6_address_stands_in_brackets() {
        for good in [
            "10.0.0.1:3260",
            "[::1]:3260",
            "[fe80::10]:1",
            "san-1.example:65535",
        ] {
            assert_eq!(Portal::new(good).unwrap().to_string(), good);
        }
        for bad in [
            "",
            ":1",
            "a",
            "a:",
            "a:0",
            "a:65536",
            "a:+1",
            "::1:3260",
            "[::1]",
            "[x]:1",
            "a b:1",
            "a/b:1",
            "[fe80::1%eth0]:1",
        ] {
            assert_eq!(Portal::new(bad), Err(PortalError(bad.into())), "{bad}");
        }
        assert_ne!(Portal::new("10.0.0.1:3260"), Portal::new("10.0.0.10:3260"));
    }
}
