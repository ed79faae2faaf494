//! A VM whose move ended otherwise than by the other host's answer, as its owner sees it: taken back, kept, or lost.

use treeboot_hypervisor::StopMode;

use super::VmOwner;
use crate::desired::{Change, DiskState, Move, VmState};
use crate::host::{HostError, chain};

impl VmOwner {
    /// Another host took it by this transfer: nothing of it is left here, unless the transfer is void. Returns whether it is.
    pub(super) async fn was_taken(&mut self, transfer: u64) -> Result<bool, HostError> {
        if self.shared.journal().desired().taken_back.contains(&transfer) {
            return Ok(true);
        }
        self.gone(transfer).await.map(|()| false)
    }

    /// From this entry on it is this host's, whatever the other one says. Done already it changes nothing.
    pub(super) async fn take_back(&mut self, transfer: u64) -> Result<(), HostError> {
        let desired = self.shared.journal().desired();
        if let Some(there) = desired.disks.get(&self.vm)
            && there.is_asked_by(transfer)
        {
            let vm = self.vm.clone();
            let disk = DiskState {
                moving: None,
                ..there.clone()
            };
            let changes = [Change::TakenBack { transfer }, Change::Disk { vm, disk }];
            self.shared.journal().commit(changes).await?;
            tracing::warn!(vm = %self.vm, transfer, "taken back from a host that is said to be gone");
        }
        Ok(())
    }

    /// What came by this transfer and is not known to be this host's yet.
    fn came_by(&self, transfer: u64) -> Option<DiskState> {
        let desired = self.shared.journal().desired();
        let there = desired.disks.get(&self.vm)?;
        let came = !there.doomed && there.transfer == Some(transfer) && there.from.is_some();
        let open = matches!(there.moving, None | Some(Move::Unsure));
        (came && open).then(|| there.clone())
    }

    /// The host that it came from does not claim it: it is served, and runs where it was to run.
    pub(super) async fn keep_what_came(&mut self, transfer: u64) -> Result<(), HostError> {
        let Some(there) = self.came_by(transfer) else {
            return Ok(());
        };
        let was_unsure = there.moving.is_some();
        self.keep(DiskState {
            moving: None,
            from: None,
            ..there
        })
        .await?;
        if was_unsure {
            if let Err(error) = self.reach_in_the_end().await {
                tracing::error!(vm = %self.vm, error = %chain(&error), "the disk of a VM that is known to be here is not served; the next start tries again");
            }
            self.find_start().await;
            self.tidy_layers();
        }
        Ok(())
    }

    /// The host that it came from took it back: it is run and served no more. Done already, what did not work is tried again.
    pub(super) async fn lose(&mut self, transfer: u64) -> Result<(), HostError> {
        if let Some(there) = self.came_by(transfer) {
            let from = there.from.as_ref().map(|from| from.host.to_string());
            tracing::error!(vm = %self.vm, from, "the host that this VM came from took it back; what is here runs no more, and is kept until it is destroyed");
            self.keep(DiskState {
                moving: Some(Move::Lost),
                start: None,
                ends: false,
                ..there
            })
            .await?;
        }
        self.end_if_lost().await?;
        self.reach_disk().await
    }

    /// A VM that is not this host's does not run here.
    pub(super) async fn end_if_lost(&mut self) -> Result<(), HostError> {
        let desired = self.shared.journal().desired();
        let is_lost = |disk: &DiskState| disk.moving == Some(Move::Lost);
        if !desired.disks.get(&self.vm).is_some_and(is_lost) {
            return Ok(());
        }
        if let Some(run) = self.run.take() {
            if let Err(error) = run.vm.stop(StopMode::Quit).await {
                self.run = Some(run);
                return Err(error.into());
            }
            for reply in run.waiting {
                let _ = reply.send(Ok(()));
            }
            self.note(VmState::Stopped).await;
        }
        Ok(())
    }
}
