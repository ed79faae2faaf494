//! A VM that goes to another host, as its owner here sees it: each step is one entry of the journal and what follows from it.

use treeboot_hypervisor::VmSpec;
use treeboot_types::HostName;

use super::VmOwner;
use crate::desired::{Change, DiskState, Move, RunSpec, Stage};
use crate::host::{HostError, chain, reach_error};
use crate::stack::{LayerChange, Step};

/// One step of a VM's way to another host.
pub(in crate::host) enum MoveStep {
    /// It is about to go: from here on nobody else changes it, and an agent that dies starts it again where it ran.
    Leave {
        /// The transfer.
        transfer: u64,
        /// Where it goes, and that host's agent.
        to: (HostName, String),
    },
    /// Its disk is served no more.
    Fence,
    /// The other host is about to be asked to take it.
    Ask,
    /// It stays: it is served again, and runs again where it ran.
    Stay {
        /// The transfer that came to nothing.
        transfer: u64,
    },
    /// It is the other host's: nothing of it is left here.
    Gone,
}

impl RunSpec {
    fn of(spec: &VmSpec) -> Self {
        Self {
            memory_mib: spec.memory_mib,
            cpus: spec.cpus,
            ready: spec.ready.clone(),
            seed: spec.seed.clone().unwrap_or_default(),
        }
    }
}

impl VmOwner {
    /// # Errors
    /// The VM is on its way between hosts.
    pub(in crate::host) fn check_settled(&self) -> Result<(), HostError> {
        let desired = self.shared.journal().desired();
        let disk = desired.disks.get(&self.vm);
        match disk.and_then(|disk| HostError::of_move(&self.vm, self.shared.host(), disk)) {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    fn there(&self) -> Result<DiskState, HostError> {
        let desired = self.shared.journal().desired();
        let there = desired.disks.get(&self.vm).filter(|disk| !disk.doomed);
        there.cloned().ok_or_else(|| HostError::NoDisk {
            vm: self.vm.clone(),
            host: self.shared.host().to_string(),
        })
    }

    async fn keep(&mut self, disk: DiskState) -> Result<(), HostError> {
        let vm = self.vm.clone();
        Ok(self.shared.journal().commit([Change::Disk { vm, disk }]).await?)
    }

    async fn at_stage(&mut self, new: Stage) -> Result<(), HostError> {
        let mut there = self.there()?;
        match &mut there.moving {
            Some(Move::Leaving { stage, .. }) => *stage = new,
            _ => {
                return Err(HostError::Invalid(format!(
                    "VM '{}' does not move any more",
                    self.vm
                )));
            }
        }
        self.keep(there).await
    }

    pub(super) async fn step_of_move(&mut self, step: MoveStep) -> Result<(), HostError> {
        match step {
            MoveStep::Leave { transfer, to } => self.leave(transfer, to).await,
            MoveStep::Fence => {
                self.at_stage(Stage::Fenced).await?;
                self.reach_disk().await
            }
            MoveStep::Ask => self.at_stage(Stage::Asked).await,
            MoveStep::Stay { transfer } => self.stay(transfer).await,
            MoveStep::Gone => self.gone().await,
        }
    }

    async fn leave(&mut self, transfer: u64, (to, address): (HostName, String)) -> Result<(), HostError> {
        self.check_settled()?;
        let there = self.there()?;
        let run = self.run.as_ref().filter(|run| !run.vm.ended());
        self.keep(DiskState {
            moving: Some(Move::Leaving {
                transfer,
                to,
                address,
                stage: Stage::Stopping,
            }),
            start: run.map(|run| Box::new(RunSpec::of(run.vm.spec()))),
            ..there
        })
        .await
    }

    /// Done already it changes nothing, and what did not work is tried again.
    async fn stay(&mut self, transfer: u64) -> Result<(), HostError> {
        let Ok(there) = self.there() else {
            // Somebody destroyed it before it was fenced.
            return Ok(());
        };
        if there.moving.is_some() {
            self.keep(DiskState {
                moving: None,
                ..there
            })
            .await?;
        }
        self.reach_disk().await?;
        let step = Step::Layers {
            vm: self.vm.clone(),
            layers: LayerChange::Release {
                transfer: Some(transfer),
            },
        };
        let name = step.name();
        let released = self.shared.applier.step(step).await;
        released.map_err(|source| reach_error(name, format_args!("VM '{}'", self.vm), source))?;
        self.tidy_layers();
        if let Err(error) = self.start_again().await {
            tracing::error!(vm = %self.vm, error = %chain(&error), "a VM that did not move does not start again");
        }
        Ok(())
    }

    async fn gone(&mut self) -> Result<(), HostError> {
        // First: an agent that dies after the next entry would not know of it.
        self.remove_run_dir()?;
        if let Ok(there) = self.there() {
            let vm = self.vm.clone();
            let disk = DiskState {
                doomed: true,
                moving: None,
                start: None,
                ..there
            };
            let changes = [Change::Disk { vm: vm.clone(), disk }, Change::VmGone { vm }];
            self.shared.journal().commit(changes).await?;
        }
        self.destroy(false).await
    }

    /// After the agent's restart: what ran before a move that came to nothing runs again.
    pub(super) async fn find_start(&mut self) {
        let desired = self.shared.journal().desired();
        let disk = desired.disks.get(&self.vm);
        if !disk.is_some_and(|disk| disk.is_served() && disk.start.is_some()) {
            return;
        }
        let running = self.run.is_some();
        let done = match running {
            true => self.forget_start().await,
            false => self.start_again().await,
        };
        if let Err(error) = done {
            tracing::error!(vm = %self.vm, error = %chain(&error), "a VM that ran before it was to move does not start again");
        }
    }
}
