//! What the host tells the coordinator of itself.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;
use treeboot_proto::v1;
use treeboot_types::{
    AttachState, Attachment, BadParent, DATA_LUN, Endpoint, Fault, HASH_LUN, HostInfo, ImageId, Iqn, Portal,
    StripeIndex,
};

use crate::desired::{Desired, Place};
use crate::journal::Journal;
use crate::link::HostView;
use crate::plane::{self, Plane};

/// Which attachments may be relied on, and why others may not yet.
#[derive(Debug, Default)]
pub(crate) struct Board {
    entries: Mutex<BTreeMap<ImageId, Readiness>>,
    /// Places that paths still follow while newer ones are being reached.
    acting: Mutex<BTreeMap<ImageId, Place>>,
    pub(crate) changed: Notify,
}

/// How far an attachment has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Readiness {
    Pending { problem: Option<String> },
    Ready,
}

impl Board {
    pub(crate) fn set(&self, image: &ImageId, readiness: Readiness) {
        let before = self.entries.lock().insert(image.clone(), readiness.clone());
        if before.as_ref() != Some(&readiness) {
            self.changed.notify_one();
        }
    }

    pub(crate) fn forget(&self, image: &ImageId) {
        self.acts_as_told(image);
        if self.entries.lock().remove(image).is_some() {
            self.changed.notify_one();
        }
    }

    /// A newer place is about to be reached. Until it is, the coordinator is told that this one is acted on.
    pub(crate) fn acts_on(&self, image: &ImageId, place: Place) {
        self.acting.lock().entry(image.clone()).or_insert(place);
    }

    /// The paths are those of the newest place.
    pub(crate) fn acts_as_told(&self, image: &ImageId) {
        self.acting.lock().remove(image);
    }

    pub(crate) fn is_ready(&self, image: &ImageId) -> bool {
        self.entries.lock().get(image) == Some(&Readiness::Ready)
    }

    pub(crate) fn problem(&self, image: &ImageId) -> Option<String> {
        match self.entries.lock().get(image) {
            Some(Readiness::Pending { problem }) => problem.clone(),
            _ => None,
        }
    }
}

/// The place under which an image is exported here.
pub(crate) fn endpoint(portal: &Portal, image: &ImageId) -> Endpoint {
    Endpoint {
        portal: portal.clone(),
        target: Iqn::of_image(image),
        data_lun: DATA_LUN,
        hash_lun: Some(HASH_LUN),
    }
}

/// An image's attachment, where it has a place.
pub(crate) fn attachment(
    desired: &Desired,
    board: &Board,
    portal: &Portal,
    image: &ImageId,
) -> Option<Attachment> {
    let state = desired.images.get(image)?;
    let newest = state.place.as_ref()?;
    let acting = board.acting.lock();
    let place = acting.get(image).unwrap_or(newest);
    Some(Attachment {
        image: image.clone(),
        digest: state.content.digest,
        epoch: place.epoch,
        endpoint: Some(endpoint(portal, image)),
        state: if board.is_ready(image) {
            AttachState::Ready
        } else {
            AttachState::Pending
        },
        stripes: place.told(),
    })
}

/// The view that the link reads.
pub(crate) struct View {
    pub(crate) info: Arc<Mutex<HostInfo>>,
    pub(crate) portal: Portal,
    pub(crate) journal: Journal,
    pub(crate) board: Arc<Board>,
    pub(crate) plane: Arc<dyn Plane>,
}

impl HostView for View {
    fn state(&self) -> v1::HostState {
        let desired = self.journal.desired();
        let attachments = desired
            .images
            .keys()
            .filter_map(|image| attachment(&desired, &self.board, &self.portal, image))
            .map(|attachment| (&attachment).into())
            .collect();
        let running = |state: &&crate::desired::VmState| **state == crate::desired::VmState::Running;
        v1::HostState {
            info: Some((&*self.info.lock()).into()),
            attachments,
            vms: desired.vms.values().filter(running).count() as u32,
        }
    }

    fn complaints(&mut self) -> Vec<v1::BadParent> {
        let desired = self.journal.desired();
        let faults = self.plane.take_faults();
        let complaint = |fault: plane::ParentFault| {
            let (image, _) = desired
                .images
                .iter()
                .find(|(_, state)| state.content.digest == fault.digest)?;
            let bad = BadParent {
                image: image.clone(),
                stripe: StripeIndex(u16::try_from(fault.stripe).ok()?),
                host: fault.host,
                portal: fault.portal,
                fault: match fault.fault {
                    plane::Fault::WrongBytes => Fault::WrongBytes,
                    plane::Fault::Unreachable => Fault::Unreachable,
                },
                count: fault.count,
            };
            Some((&bad).into())
        };
        faults.into_iter().filter_map(complaint).collect()
    }

    async fn changed(&mut self) {
        self.board.changed.notified().await;
    }
}
