//! What of the trees must outlive the process. Leases are not in it: they start anew with the process.

use serde::{Deserialize, Serialize};

use treeboot_types::{AttachState, Endpoint, Epoch, HostInfo, HostName, Image, ImageId, ImageName};

/// A key of the record.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// The last epoch that was given out.
    Epoch,
    /// The highest version that a name ever had, so that none is given twice.
    Newest(ImageName),
    /// An image.
    Image(ImageId),
    /// A host.
    Host(HostName),
    /// A host's place in an image's trees.
    Attachment(ImageId, HostName),
}

/// A value of the record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// Under [`Key::Epoch`].
    Epoch(Epoch),
    /// Under [`Key::Newest`].
    Newest(u32),
    /// Under [`Key::Image`].
    Image(Image),
    /// Under [`Key::Host`].
    Host(HostRecord),
    /// Under [`Key::Attachment`].
    Attachment(AttachmentRecord),
}

/// A change of the record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Writes, over what is there.
    Put(Key, Record),
    /// Removes, if it is there.
    Delete(Key),
}

impl Change {
    /// What it changes.
    pub fn key(&self) -> &Key {
        match self {
            Self::Put(key, _) | Self::Delete(key) => key,
        }
    }
}

/// A host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostRecord {
    /// What it says of itself.
    pub info: HostInfo,
}

/// A host's place in an image's trees.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachmentRecord {
    /// Under which it exports.
    pub endpoint: Endpoint,
    /// How far it has come.
    pub state: AttachState,
    /// When anything in its placement changed last.
    pub epoch: Epoch,
    /// When its parents changed last; whoever acts on an older one is fenced off.
    pub position: Epoch,
    /// The number of its joining, by which equals are ordered.
    pub joined: u64,
    /// The stripe that it is inner in, where the policy tells stripes apart.
    #[serde(default)]
    pub home: u16,
    /// Hosts, each with its stripe, that are not given it as a child until it says that it acts on this place.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub barred: Vec<(u16, HostName)>,
    /// Parents and fallbacks, each with its stripe, that it is not told of until they say that they act on having it as a child.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub held_back: Vec<(u16, HostName)>,
    /// Children of earlier places, each with its stripe, that it may still let in. That it acts on its newest place is not recorded, so
    /// after a restart it may let in fewer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lets_in: Vec<(u16, HostName)>,
    /// Whom it may still let in is not known whole.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub lets_in_others: bool,
    /// For each stripe, the parents with the shares that it holds of them.
    pub stripes: Vec<Vec<HeldShare>>,
}

/// Shares of one parent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldShare {
    /// Of whom.
    pub of: HeldOf,
    /// How many; a slot has as many shares as a host has active parents.
    pub shares: u32,
}

/// A parent in the record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeldOf {
    /// The image's origin with this index.
    Origin(u16),
    /// A host.
    Host(HostName),
}
