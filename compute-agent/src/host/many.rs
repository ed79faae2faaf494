//! Disks of many VMs at once.
//!
//! Each VM has its owner, as ever; what makes many quick is that they meet: at the base's owner, which writes those that wait down in one entry
//! of the journal, and at the journal's thread, whose writes share a sync. Deliberately absent: a second way to make a disk.

use futures_util::StreamExt as _;
use treeboot_types::{ImageId, ImageRef, VmName};

use super::vm::VmMsg;
use super::{Host, HostError, base};
use crate::stack::Content;

/// Disks of one call that are made at the same time. Those that meet at the base share one write of the journal.
const CREATES_AT_ONCE: usize = base::INBOX;

impl Host {
    pub(super) async fn create_known(
        &self,
        vm: &VmName,
        image: &ImageRef,
        known: Option<(ImageId, Content)>,
        device: bool,
    ) -> Result<(), HostError> {
        let image = image.clone();
        self.ask_vm(vm, |reply| VmMsg::Create {
            image,
            known,
            device,
            reply,
        })
        .await
    }

    /// Gives many VMs their disks, each as [`create`](Self::create) does; what one lacks keeps no other from its disk. The results
    /// are in the VMs' order.
    ///
    /// # Errors
    /// Nobody knows the image, so that nothing was begun.
    pub async fn create_many(
        &self,
        vms: Vec<VmName>,
        image: &ImageRef,
        device: bool,
    ) -> Result<Vec<Result<(), HostError>>, HostError> {
        let known = self.resolve(image).await?;
        let creates = vms.into_iter().map(|vm| {
            let (host, known) = (self.clone(), Some(known.clone()));
            async move { host.create_known(&vm, image, known, device).await }
        });
        Ok(futures_util::stream::iter(creates)
            .buffered(CREATES_AT_ONCE)
            .collect()
            .await)
    }
}
