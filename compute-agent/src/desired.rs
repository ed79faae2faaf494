//! What the host is to hold, as its own journal remembers it: the fold of [`Change`]s, and nothing else.
//!
//! It is enough to serve every base and every disk again after a restart, before anyone is asked. Deliberately
//! absent: what is really there (that is `inspect`'s word, and it outranks this one).

mod disk;
mod place;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use treeboot_types::{Digest, ImageId, VmName};

pub use disk::{DiskState, Move, OldHost, RunSpec, Stage};
pub use place::{Place, PlacedParent, PlacedStripe};

use crate::planted::{Bug, planted};
use crate::stack::{Access, Backing, Content, Sources, Wanted, WantedBase};

/// How many caches of images that nothing here uses any more stay on the disk: a fleet that is stopped and started
/// again boots warm, and the disk does not fill with every image that ever was. Where the cache group has a budget they go first.
pub const KEPT_CACHES: usize = 4;

/// How many moves to this host are remembered.
pub const KEPT_TRANSFERS: usize = 256;

/// An image that lies in this host's store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    /// Whole, or adopted.
    pub backing: Backing,
    /// Foreign targets that an adopted image's data comes from; none for a whole one.
    pub sources: Sources,
}

/// One name of an image on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageState {
    /// What it is.
    pub content: Content,
    /// It is to stay attached although no VM uses it.
    pub pinned: bool,
    /// The last place that the coordinator gave.
    pub place: Option<Place>,
    /// In the store here.
    pub stored: Option<Stored>,
}

/// How a VM was last started or ended; the rest lies in its run directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "run")]
pub enum VmState {
    /// It is to run.
    Running,
    /// It ended as it was meant to.
    Stopped,
    /// It ended otherwise.
    Failed {
        /// For people.
        why: String,
    },
}

/// All that is to be here.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Desired {
    /// Images, by name.
    pub images: BTreeMap<ImageId, ImageState>,
    /// Disks, by VM.
    pub disks: BTreeMap<VmName, DiskState>,
    /// VMs that were started here.
    pub vms: BTreeMap<VmName, VmState>,
    /// Caches that nothing uses and that stay, the latest last; at most [`KEPT_CACHES`].
    pub kept_caches: Vec<Digest>,
    /// Stores that are being deleted.
    pub doomed_stores: BTreeSet<Digest>,
    /// The coordinator's incarnation that knows all stored images; another one has to be told of them.
    pub announced_to: Option<u64>,
    /// Transfers by which VMs moved here, the latest last, at most [`KEPT_TRANSFERS`]: a host that did not hear so asks again, perhaps
    /// when the VM is gone already.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub taken: Vec<u64>,
    /// Transfers by which VMs went from this host, and which a person declared void because the other host was gone for good. All are kept:
    /// each is a person's word, and whoever comes back asks for it.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub taken_back: BTreeSet<u64>,
}

/// One change of what is desired: what the journal holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "change")]
pub enum Change {
    /// An image has a place in its trees, or a new one.
    Placed {
        /// The image.
        image: ImageId,
        /// What it is.
        content: Content,
        /// Where the host stands.
        place: Place,
    },
    /// An image is to stay, or need not, without a VM that uses it.
    Pinned {
        /// The image.
        image: ImageId,
        /// Whether it is to stay.
        pinned: bool,
    },
    /// An image is attached no more; it stays in the store where it was there.
    Detached {
        /// The image.
        image: ImageId,
        /// Its cache is kept for the next time.
        keep_cache: bool,
    },
    /// An image lies in the store.
    Stored {
        /// The image.
        image: ImageId,
        /// What it is.
        content: Content,
        /// In which form.
        stored: Stored,
    },
    /// An image's store is to be deleted, unless another name holds it.
    StoreDoomed {
        /// The image.
        image: ImageId,
    },
    /// It is deleted.
    StoreGone {
        /// The content.
        digest: Digest,
    },
    /// A VM has a disk.
    Disk {
        /// The VM.
        vm: VmName,
        /// Its disk.
        disk: DiskState,
    },
    /// A VM's disk is gone.
    DiskGone {
        /// The VM.
        vm: VmName,
    },
    /// A VM was started, or stopped.
    Vm {
        /// The VM.
        vm: VmName,
        /// How.
        state: VmState,
    },
    /// The coordinator of this incarnation was told of every stored image.
    Announced {
        /// The incarnation.
        incarnation: u64,
    },
    /// A VM is known no more.
    VmGone {
        /// The VM.
        vm: VmName,
    },
    /// A transfer to another host is void, whatever that host says.
    TakenBack {
        /// The transfer.
        transfer: u64,
    },
}

impl Change {
    /// A short name for logs and for tests that count changes.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Placed { .. } => "placed",
            Self::Pinned { .. } => "pinned",
            Self::Detached { .. } => "detached",
            Self::Stored { .. } => "stored",
            Self::StoreDoomed { .. } => "store_doomed",
            Self::StoreGone { .. } => "store_gone",
            Self::Disk { .. } => "disk",
            Self::DiskGone { .. } => "disk_gone",
            Self::Vm { .. } => "vm",
            Self::Announced { .. } => "announced",
            Self::VmGone { .. } => "vm_gone",
            Self::TakenBack { .. } => "taken_back",
        }
    }
}

impl Desired {
    /// Takes one change in. A change that says nothing new changes nothing.
    pub fn fold(&mut self, change: Change) {
        match change {
            Change::Placed {
                image,
                content,
                place,
            } => {
                self.kept_caches.retain(|kept| *kept != content.digest);
                let state = self
                    .images
                    .entry(image)
                    .or_insert_with(|| ImageState::new(content));
                state.content = content;
                state.place = Some(place);
            }
            Change::Pinned { image, pinned } => {
                if let Some(state) = self.images.get_mut(&image) {
                    state.pinned = pinned;
                }
            }
            Change::Detached { image, keep_cache } => self.detach(&image, keep_cache),
            Change::Stored {
                image,
                content,
                stored,
            } => {
                self.doomed_stores.remove(&content.digest);
                let state = self
                    .images
                    .entry(image)
                    .or_insert_with(|| ImageState::new(content));
                state.content = content;
                state.stored = Some(stored);
            }
            Change::StoreDoomed { image } => {
                let Some(state) = self.images.get_mut(&image) else {
                    return;
                };
                let digest = state.content.digest;
                state.stored = None;
                if state.place.is_none() {
                    self.images.remove(&image);
                }
                let held = |s: &ImageState| s.content.digest == digest && s.stored.is_some();
                if !self.images.values().any(held) {
                    self.doomed_stores.insert(digest);
                }
            }
            Change::StoreGone { digest } => {
                self.doomed_stores.remove(&digest);
            }
            Change::Disk { vm, disk } => {
                let taken = disk.transfer.filter(|_| disk.moving.is_none() && !disk.doomed);
                let before = self.disks.insert(vm, disk);
                if before.is_some_and(|before| before.is_arriving()) {
                    self.taken.extend(taken);
                    let excess = self.taken.len().saturating_sub(KEPT_TRANSFERS);
                    self.taken.drain(..excess);
                }
            }
            Change::DiskGone { vm } => {
                self.disks.remove(&vm);
            }
            Change::Vm { vm, state } => {
                self.vms.insert(vm, state);
            }
            Change::Announced { incarnation } => self.announced_to = Some(incarnation),
            Change::VmGone { vm } => {
                self.vms.remove(&vm);
            }
            Change::TakenBack { transfer } => {
                self.taken_back.insert(transfer);
            }
        }
    }

    fn detach(&mut self, image: &ImageId, keep_cache: bool) {
        let Some(state) = self.images.get_mut(image) else {
            return;
        };
        let digest = state.content.digest;
        state.place = None;
        state.pinned = false;
        if state.stored.is_none() {
            self.images.remove(image);
        }
        let attached = self.images.values().any(|s| s.content.digest == digest);
        self.kept_caches.retain(|kept| *kept != digest);
        if keep_cache && !attached {
            self.kept_caches.push(digest);
            let excess = self.kept_caches.len().saturating_sub(KEPT_CACHES);
            self.kept_caches.drain(..excess);
        }
    }

    /// VMs whose disks stand on `image` and are not being destroyed.
    pub fn disks_of(&self, image: &ImageId) -> impl Iterator<Item = &VmName> {
        self.disks
            .iter()
            .filter(move |(_, disk)| disk.image == *image && !disk.doomed)
            .map(|(vm, _)| vm)
    }

    /// The image's base is to be there: in the store, pinned, or under a disk.
    fn holds(&self, image: &ImageId, state: &ImageState) -> bool {
        state.stored.is_some()
            || (state.place.is_some() && (state.pinned || self.disks_of(image).next().is_some()))
    }

    /// The base of one content, where any image of it is to be here.
    pub fn wanted_base(&self, digest: Digest) -> Option<WantedBase> {
        let held = self
            .images
            .iter()
            .filter(|(id, state)| state.content.digest == digest && self.holds(id, state));
        let mut base: Option<WantedBase> = None;
        let mut attached = false;
        for (id, state) in held {
            let base = base.get_or_insert_with(|| WantedBase {
                content: state.content,
                backing: Backing::Cache,
                sources: Sources::default(),
                exports: BTreeMap::new(),
            });
            // A store serves anyone: whoever lost all its parents falls back to an origin, whose children the
            // coordinator does not have to list.
            let access = match (&state.stored, &state.place) {
                (None, Some(place)) if !planted(Bug::AnybodyLetIn) => Access::Hosts(place.children.clone()),
                _ => Access::Anyone,
            };
            base.exports.insert(id.clone(), access);
            match (&state.place, &state.stored) {
                // A base that VMs stand on is not changed under them: the store is used from the next attachment on.
                (Some(place), _) => {
                    if base.backing.in_store() {
                        base.backing = Backing::Cache;
                        base.sources = Sources::default();
                    }
                    attached = true;
                    merge(&mut base.sources, place.sources());
                }
                (None, Some(stored)) if !attached && base.backing != Backing::Store => {
                    base.backing = stored.backing;
                    base.sources = stored.sources.clone();
                }
                _ => {}
            }
        }
        base
    }

    /// What is wanted of one content.
    pub fn wanted_of(&self, digest: Digest) -> Wanted {
        Wanted {
            bases: self
                .wanted_base(digest)
                .map(|base| (digest, base))
                .into_iter()
                .collect(),
            kept_caches: self.kept_caches.iter().copied().collect(),
            doomed_stores: self.doomed_stores.clone(),
            ..Wanted::default()
        }
    }

    /// What is wanted of one VM's disk; its base is another's to keep.
    pub fn wanted_disk(&self, vm: &VmName) -> Wanted {
        let mut wanted = Wanted::default();
        match self.disks.get(vm) {
            Some(state) if state.doomed => {
                wanted.doomed_disks.insert(vm.clone());
            }
            Some(state) if !state.is_served() => {
                wanted.resting_disks.insert(vm.clone());
            }
            Some(state) => {
                wanted.standing.insert(state.disk.digest);
                wanted.devices.extend(state.device.then(|| vm.clone()));
                wanted
                    .limits
                    .extend(state.limit_bytes.map(|bytes| (vm.clone(), bytes)));
                wanted.disks.insert(vm.clone(), state.disk);
            }
            None => {}
        }
        wanted
    }

    /// All that follows from what is desired.
    pub fn wanted(&self) -> Wanted {
        let digests: BTreeSet<Digest> = self.images.values().map(|s| s.content.digest).collect();
        let bases = digests
            .into_iter()
            .filter_map(|d| Some((d, self.wanted_base(d)?)));
        let (doomed, live): (Vec<_>, Vec<_>) = self.disks.iter().partition(|(_, disk)| disk.doomed);
        let (live, resting): (Vec<_>, Vec<_>) = live.into_iter().partition(|(_, disk)| disk.is_served());
        let devices = live.iter().filter(|(_, state)| state.device);
        let limits = live
            .iter()
            .filter_map(|(vm, state)| Some(((*vm).clone(), state.limit_bytes?)));
        Wanted {
            limits: limits.collect(),
            devices: devices.map(|(vm, _)| (*vm).clone()).collect(),
            bases: bases.collect(),
            standing: BTreeSet::new(),
            disks: live
                .into_iter()
                .map(|(vm, state)| (vm.clone(), state.disk))
                .collect(),
            doomed_disks: doomed.into_iter().map(|(vm, _)| vm.clone()).collect(),
            resting_disks: resting.into_iter().map(|(vm, _)| vm.clone()).collect(),
            kept_caches: self.kept_caches.iter().copied().collect(),
            doomed_stores: self.doomed_stores.clone(),
        }
    }
}

impl ImageState {
    fn new(content: Content) -> Self {
        Self {
            content,
            pinned: false,
            place: None,
            stored: None,
        }
    }
}

/// Two names of one content share a base: it reads from the parents of both.
fn merge(into: &mut Sources, from: Sources) {
    if into.stripes.is_empty() {
        *into = from;
        return;
    }
    if into.stripes.len() != from.stripes.len() || into.unit_bytes != from.unit_bytes {
        return;
    }
    for (into, from) in into.stripes.iter_mut().zip(from.stripes) {
        for path in from.active {
            if !into.active.contains(&path) {
                into.active.push(path);
            }
        }
        for path in from.fallbacks {
            if !into.fallbacks.contains(&path) && !into.active.contains(&path) {
                into.fallbacks.push(path);
            }
        }
    }
}

#[cfg(test)]
mod tests;
