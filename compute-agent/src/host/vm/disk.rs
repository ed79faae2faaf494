//! Parts of `create`: a disk is made, one that is there becomes a device, and what failed is undone.

use treeboot_types::ImageId;

use super::VmOwner;
use crate::apply::ReachError;
use crate::desired::{Change, DiskState};
use crate::host::base::{BaseMsg, Hold};
use crate::host::{DiskOptions, HostError, chain};
use crate::plane::PlaneError;
use crate::stack::{Content, Obstacle, Step, WantedDisk};

impl VmOwner {
    /// A disk for the VM, which has none: an empty one, or the one that `transfer` brought.
    pub(in crate::host) async fn make(
        &mut self,
        image: ImageId,
        content: Content,
        options: DiskOptions,
        transfer: Option<u64>,
    ) -> Result<(), HostError> {
        let wanted = WantedDisk {
            digest: content.digest,
            bytes: content.bytes,
        };
        let disk = DiskState {
            device: options.device,
            transfer,
            limit_bytes: options.limit(),
            ..DiskState::new(image.clone(), wanted, rand::random())
        };
        let attach = self.host.ask_base(content.digest, |reply| BaseMsg::Attach {
            image: image.clone(),
            content,
            hold: Hold::Disk(self.vm.clone(), Box::new(disk)),
            reply,
        });
        // The secret is made meanwhile: both are synced to the disk.
        let ((), attached) = tokio::join!(self.shared.settings.keys.make_disk(&self.vm), attach);
        if let Err(error) = attached {
            self.shared.settings.keys.disk_gone(&self.vm).await;
            return Err(error);
        }
        match self.reach_disk().await {
            Ok(()) => {
                self.report.send_modify(|report| report.image = Some(image));
                Ok(())
            }
            Err(cause) => Err(match self.undo_create(&cause).await {
                Ok(()) => cause,
                Err(undo) => HostError::Undo {
                    cause: Box::new(cause),
                    undo: Box::new(undo),
                },
            }),
        }
    }

    /// The disk is there; asked for, it becomes a device, too. One that is a device stays one.
    pub(in crate::host) async fn have_device(
        &mut self,
        there: DiskState,
        device: bool,
    ) -> Result<(), HostError> {
        let new = device && !there.device;
        if new {
            self.note_device(&there, true).await?;
        }
        let reached = self.reach_disk().await;
        if let (Err(cause), true) = (&reached, new) {
            tracing::warn!(vm = %self.vm, error = %chain(cause), "the disk does not become a device");
            self.note_device(&there, false).await?;
            self.reach_disk().await?;
        }
        reached
    }

    /// Limits what the VM writes from now on; what stands still for want of room goes on where there is some now.
    pub(super) async fn limit(&mut self, bytes: Option<u64>) -> Result<(), HostError> {
        let desired = self.shared.journal().desired();
        let there = desired.disks.get(&self.vm).filter(|disk| !disk.doomed);
        let there = there.cloned().ok_or_else(|| HostError::UnknownVm {
            vm: self.vm.clone(),
            host: self.shared.host().to_string(),
        })?;
        if there.limit_bytes != bytes {
            let vm = self.vm.clone();
            let disk = DiskState {
                limit_bytes: bytes,
                ..there
            };
            self.shared.journal().commit([Change::Disk { vm, disk }]).await?;
        }
        self.reach_disk().await
    }

    async fn note_device(&mut self, there: &DiskState, device: bool) -> Result<(), HostError> {
        let (vm, there) = (self.vm.clone(), there.clone());
        let disk = DiskState { device, ..there };
        Ok(self.shared.journal().commit([Change::Disk { vm, disk }]).await?)
    }

    /// A delta that was there before is not this call's to delete.
    pub(super) async fn undo_create(&mut self, cause: &HostError) -> Result<(), HostError> {
        if matches!(cause, HostError::Reach { source, .. } if obstacle_of(source).is_some()) {
            let desired = self.shared.journal().desired();
            let image = desired.disks.get(&self.vm).map(|disk| disk.image.clone());
            let vm = self.vm.clone();
            self.shared.journal().commit([Change::DiskGone { vm }]).await?;
            if let Some(image) = image {
                self.release(image, false).await;
            }
            return Ok(());
        }
        self.delete_disk(false).await
    }

    pub(in crate::host) async fn delete_disk(&mut self, keep_base: bool) -> Result<(), HostError> {
        let desired = self.shared.journal().desired();
        let Some(there) = desired.disks.get(&self.vm) else {
            return Ok(());
        };
        let (vm, image) = (self.vm.clone(), there.image.clone());
        if !there.doomed {
            let disk = DiskState {
                doomed: true,
                ..there.clone()
            };
            let vm = vm.clone();
            // With the same write, so that an agent that is killed before the end keeps the base, too.
            let placed = desired
                .images
                .get(&image)
                .is_some_and(|state| state.place.is_some());
            let stays = (keep_base && placed).then(|| Change::Pinned {
                image: image.clone(),
                pinned: true,
            });
            let changes = stays.into_iter().chain([Change::Disk { vm, disk }]);
            self.shared.journal().commit(changes).await?;
        }
        self.reach_disk().await?;
        self.shared.journal().commit([Change::DiskGone { vm }]).await?;
        self.shared.settings.keys.disk_gone(&self.vm).await;
        self.release(image, keep_base).await;
        Ok(())
    }

    /// As [`VmOwner::delete_disk`], for somebody who asks: a disk whose device is in use is refused, and stays the VM's after the agent's
    /// next start, too.
    pub(super) async fn delete_disk_unless_used(&mut self, keep_base: bool) -> Result<(), HostError> {
        let before = self.shared.journal().desired();
        let deleted = self.delete_disk(keep_base).await;
        let there = before.disks.get(&self.vm).filter(|disk| !disk.doomed);
        let (Err(refusal), Some(disk)) = (&deleted, there.cloned()) else {
            return deleted;
        };
        if !is_in_use(refusal) {
            return deleted;
        }
        let (vm, image) = (self.vm.clone(), disk.image.clone());
        let was_pinned = before.images.get(&image).is_some_and(|state| state.pinned);
        let unpinned = (keep_base && !was_pinned).then_some(Change::Pinned { image, pinned: false });
        let changes = [Change::Disk { vm, disk }].into_iter().chain(unpinned);
        self.shared.journal().commit(changes).await?;
        if let Err(error) = self.reach_disk().await {
            tracing::warn!(vm = %self.vm, error = %chain(&error), "what was taken down before the refusal does not come back yet");
        }
        deleted
    }

    async fn release(&mut self, image: ImageId, keep: bool) {
        if let Some(content) = self.host.content(&image) {
            let released = BaseMsg::Released { image, keep };
            // Where the agent ends now, the next start gives the base up.
            let _ = self.host.base(content.digest).send(released).await;
        }
    }
}

/// Whether somebody has the disk's device open.
fn is_in_use(error: &HostError) -> bool {
    let HostError::Reach { source, .. } = error else {
        return false;
    };
    match source {
        ReachError::Step {
            step,
            source: PlaneError::Unfit { .. },
        } => matches!(**step, Step::DetachDevice { .. } | Step::StopDisk { .. }),
        _ => false,
    }
}

/// Whether a failure names this VM's delta, so that asking again is of no use.
fn obstacle_of(error: &ReachError) -> Option<&Obstacle> {
    match error {
        ReachError::Obstacles(obstacles) => obstacles.first(),
        _ => None,
    }
}
