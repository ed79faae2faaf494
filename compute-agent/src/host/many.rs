//! Disks of VMs: of one, and of many at once.
//!
//! Each VM has its owner, as ever; what makes many quick is that they meet: at the base's owner, which writes those that wait down in one entry
//! of the journal, and at the journal's thread, whose writes share a sync. Deliberately absent: a second way to make a disk.

use futures_util::StreamExt as _;
use treeboot_types::{ImageId, ImageRef, VmName};

use super::vm::VmMsg;
use super::{DiskOptions, Host, HostError, base};
use crate::stack::Content;

/// Disks of one call that are made at the same time. Those that meet at the base share one write of the journal.
const CREATES_AT_ONCE: usize = base::INBOX;

impl Host {
    /// Gives a VM its disk.
    ///
    /// # Errors
    /// [`HostError`]; nothing is left of the disk then.
    pub async fn create(&self, vm: &VmName, image: &ImageRef) -> Result<(), HostError> {
        self.create_with(vm, image, DiskOptions::default()).await
    }

    /// Gives a VM its disk, as a block device of this host, too.
    ///
    /// # Errors
    /// [`HostError`]; nothing is left of the disk then, where it is a new one.
    pub async fn create_device(&self, vm: &VmName, image: &ImageRef) -> Result<(), HostError> {
        self.create_with(vm, image, DiskOptions::new(true, None)).await
    }

    /// Gives a VM its disk, as it is wished.
    ///
    /// # Errors
    /// [`HostError`]; nothing is left of the disk then, where it is a new one.
    pub async fn create_with(
        &self,
        vm: &VmName,
        image: &ImageRef,
        options: DiskOptions,
    ) -> Result<(), HostError> {
        let options = self.with_own_limit(options)?;
        self.create_known(vm, image, None, options).await
    }

    pub(super) async fn create_known(
        &self,
        vm: &VmName,
        image: &ImageRef,
        known: Option<(ImageId, Content)>,
        options: DiskOptions,
    ) -> Result<(), HostError> {
        let image = image.clone();
        self.ask_vm(vm, |reply| VmMsg::Create {
            image,
            known,
            options,
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
        options: DiskOptions,
    ) -> Result<Vec<Result<(), HostError>>, HostError> {
        let options = self.with_own_limit(options)?;
        let known = self.resolve(image).await?;
        let creates = vms.into_iter().map(|vm| {
            let (host, known) = (self.clone(), Some(known.clone()));
            async move { host.create_known(&vm, image, known, options).await }
        });
        Ok(futures_util::stream::iter(creates)
            .buffered(CREATES_AT_ONCE)
            .collect()
            .await)
    }
}
