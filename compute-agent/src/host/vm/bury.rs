//! Parts of `destroy`, and the removal of what nobody claims of a VM's name.

use treeboot_block::layers;
use treeboot_hypervisor::{RunningVm, StopMode};

use super::VmOwner;
use crate::desired::Change;
use crate::host::remains::{Run, run_of};
use crate::host::{HostError, reach_error};
use crate::plane::user::delta_error;
use crate::plane::{PlaneError, Scope};
use crate::stack::Wanted;

impl VmOwner {
    /// The journal knows no such VM.
    pub(super) fn is_nobody(&self) -> bool {
        let desired = self.shared.journal().desired();
        !desired.disks.contains_key(&self.vm) && !desired.vms.contains_key(&self.vm)
    }

    pub(super) fn remove_run_dir(&self) -> Result<(), HostError> {
        let dir = self.run_dir();
        match std::fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(PlaneError::io(format!("removing {}", dir.display()), error).into())
            }
            _ => Ok(()),
        }
    }

    /// Removes the run directory, and the VM from the journal. Its QEMU has ended.
    pub(super) async fn forget_run(&mut self) -> Result<(), HostError> {
        self.remove_run_dir()?;
        let vm = self.vm.clone();
        Ok(self.shared.journal().commit([Change::VmGone { vm }]).await?)
    }

    /// Removes what nobody claims, and does nothing where somebody does by now.
    pub(super) async fn bury(&mut self, kind: &'static str) -> Result<(), HostError> {
        let desired = self.shared.journal().desired();
        let has_disk = desired.disks.contains_key(&self.vm);
        let claimed = match kind {
            "run" => desired.vms.contains_key(&self.vm),
            _ => has_disk,
        };
        if claimed || self.run.is_some() {
            return Ok(());
        }
        let dir = self.run_dir();
        match (kind, run_of(&dir).await) {
            ("incoming", _) => self.host.discard_unclaimed(&self.vm).await,
            (_, Run::Silent(why)) => Err(HostError::Invalid(why)),
            ("run", Run::Answers(_)) => {
                if let Ok(running) = RunningVm::adopt(&dir) {
                    running.stop(StopMode::Quit).await?;
                }
                self.forget_run().await
            }
            (_, Run::Answers(pid)) => Err(HostError::Invalid(format!("QEMU (pid {pid}) runs"))),
            ("delta", Run::Over) => self.bury_delta().await,
            (_, Run::Over) => self.forget_run().await,
        }
    }

    async fn bury_delta(&mut self) -> Result<(), HostError> {
        let (deltas, vm) = (self.shared.settings.deltas_dir.clone(), self.vm.clone());
        let in_use = tokio::task::spawn_blocking(move || layers::is_in_use(&deltas, &vm)).await;
        let in_use = in_use.map_err(|error| HostError::Invalid(error.to_string()))?;
        if in_use.map_err(|error| delta_error(&self.vm, error))? {
            return Err(HostError::Invalid("another process has it open".into()));
        }
        let wanted = Wanted {
            doomed_disks: [self.vm.clone()].into(),
            ..Wanted::default()
        };
        let scope = Scope::Disk(self.vm.clone());
        let reached = self.shared.applier.reach(&scope, &wanted).await;
        reached.map_err(|source| {
            reach_error(
                "the removal",
                format_args!("the delta of VM '{}'", self.vm),
                source,
            )
        })?;
        self.shared.settings.keys.disk_gone(&self.vm).await;
        Ok(())
    }
}
