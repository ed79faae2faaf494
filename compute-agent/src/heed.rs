//! What the coordinator's word means to this host: pure, so that the owner task and the simulation judge alike.

use treeboot_types::{Epoch, ImageId, Placement, VmName};

use crate::desired::{Change, Desired, Place};
use crate::planted::{Bug, planted};

/// What comes of a placement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heeded {
    /// Nothing: an attachment that was just given up.
    NotAttached,
    /// Nothing: an origin is told of its children; it lets everybody in and has no parents.
    InStore,
    /// Nothing: it was decided before the one in force.
    Older {
        /// The one in force.
        current: Epoch,
    },
    /// The host's new place.
    Taken {
        /// To be learned.
        change: Box<Change>,
        /// Whether reads go elsewhere than before.
        moved: bool,
    },
}

/// Judges a placement.
pub fn placement(desired: &Desired, placement: &Placement) -> Heeded {
    let image = &placement.image.id;
    let Some(state) = desired.images.get(image) else {
        return Heeded::NotAttached;
    };
    if state.stored.is_some() {
        return Heeded::InStore;
    }
    let place = Place::of(placement);
    let old = match &state.place {
        Some(old) if old.epoch > place.epoch && !planted(Bug::OlderPlacementTaken) => {
            return Heeded::Older { current: old.epoch };
        }
        Some(old) => Some(old.sources()),
        None => None,
    };
    Heeded::Taken {
        moved: old.as_ref() != Some(&place.sources()),
        change: Box::new(Change::Placed {
            image: image.clone(),
            content: state.content,
            place,
        }),
    }
}

/// What comes of the coordinator's wish to end an attachment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// Nothing: there is none, or a later placement came since.
    Outdated,
    /// Nothing: a VM stands on it, whose base is never pulled from under it.
    InUse(VmName),
    /// It ends.
    Ends,
}

/// Judges the wish that an attachment end.
pub fn detach(desired: &Desired, image: &ImageId, epoch: Epoch) -> Ending {
    let place = desired.images.get(image).and_then(|state| state.place.as_ref());
    if place.is_none_or(|place| place.epoch > epoch) {
        return Ending::Outdated;
    }
    match desired.disks_of(image).next() {
        Some(vm) => Ending::InUse(vm.clone()),
        None => Ending::Ends,
    }
}

/// Attachments that nothing holds: the agent died between giving them up and saying so.
pub fn left_idle(desired: &Desired) -> Vec<Change> {
    let idle = desired.images.iter().filter(|(image, state)| {
        state.place.is_some() && !state.pinned && desired.disks_of(image).next().is_none()
    });
    idle.map(|(image, _)| Change::Detached {
        image: image.clone(),
        keep_cache: true,
    })
    .collect()
}
