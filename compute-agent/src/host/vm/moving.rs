//! A VM that goes to another host, as its owner here sees it: each step is one entry of the journal and what follows from it.

use treeboot_hypervisor::VmSpec;
use treeboot_types::HostName;

use super::VmOwner;
use crate::desired::{Change, DiskState, Move, RunSpec, Stage};
use crate::host::base::Reply;
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
    Gone {
        /// The transfer by which it went.
        transfer: u64,
    },
    /// It stays, although the other host was asked and has not answered.
    TakeBack {
        /// The transfer, which is void from here on.
        transfer: u64,
    },
    /// The host that it came from knows so, or never will.
    Keep {
        /// The transfer that it came by.
        transfer: u64,
    },
    /// The host that it came from took it back.
    Lose {
        /// The transfer that it came by.
        transfer: u64,
    },
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

    pub(super) async fn keep(&mut self, disk: DiskState) -> Result<(), HostError> {
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
            MoveStep::Gone { transfer } => self.gone(transfer).await,
            MoveStep::TakeBack { transfer } => self.take_back(transfer).await,
            MoveStep::Keep { transfer } => self.keep_what_came(transfer).await,
            MoveStep::Lose { transfer } => self.lose(transfer).await,
        }
    }

    async fn leave(&mut self, transfer: u64, (to, address): (HostName, String)) -> Result<(), HostError> {
        self.check_settled()?;
        let there = self.there()?;
        if let Some(from) = &there.from {
            return Err(HostError::Unsure {
                vm: self.vm.clone(),
                from: from.host.to_string(),
            });
        }
        let run = self.run.as_ref().filter(|run| !run.vm.ended());
        let start = run.map(|run| Box::new(RunSpec::of(run.vm.spec())));
        self.keep(DiskState {
            ends: start.is_some(),
            moving: Some(Move::Leaving {
                transfer,
                to,
                address,
                stage: Stage::Stopping,
            }),
            start,
            ..there
        })
        .await
    }

    /// Done already it changes nothing, and what did not work is tried again.
    pub(super) async fn stay(&mut self, transfer: u64) -> Result<(), HostError> {
        let Ok(there) = self.there() else {
            // Somebody destroyed it before it was fenced.
            return Ok(());
        };
        if there.moving.is_some() {
            if !there.leaves_by(transfer) {
                // By now it goes by another one.
                return Ok(());
            }
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

    /// Done already it changes nothing: by now another VM may have the name.
    pub(super) async fn gone(&mut self, transfer: u64) -> Result<(), HostError> {
        let desired = self.shared.journal().desired();
        match desired.disks.get(&self.vm) {
            Some(there) if there.doomed => {}
            Some(there) if there.is_asked_by(transfer) => {
                // First: an agent that dies after the next entry would not know of it.
                self.remove_run_dir()?;
                let vm = self.vm.clone();
                let disk = DiskState {
                    doomed: true,
                    moving: None,
                    start: None,
                    ends: false,
                    ..there.clone()
                };
                let changes = [Change::Disk { vm: vm.clone(), disk }, Change::VmGone { vm }];
                self.shared.journal().commit(changes).await?;
            }
            _ => return Ok(()),
        }
        self.destroy(false).await
    }

    /// Somebody wants it to be stopped: then it stays so.
    pub(super) async fn stop_as_asked(&mut self, force: bool, reply: Reply<()>) {
        let desired = self.shared.journal().desired();
        let settled = desired.disks.get(&self.vm).is_some_and(DiskState::is_settled);
        match settled {
            true => match self.forget_start().await {
                Ok(()) => self.stop(force, reply).await,
                Err(error) => drop(reply.send(Err(error))),
            },
            // The move's own.
            false => self.stop(force, reply).await,
        }
    }

    /// What ran before a move that came to nothing runs again: after the agent's restart, and once a run that a predecessor told to end
    /// has ended.
    pub(super) async fn find_start(&mut self) {
        let desired = self.shared.journal().desired();
        let disk = desired.disks.get(&self.vm);
        let Some(disk) = disk.filter(|disk| disk.is_settled() && disk.start.is_some()) else {
            return;
        };
        let done = match (self.run.is_some(), disk.ends) {
            (false, _) => self.start_again().await,
            // It may be shutting down, which nobody can take back.
            (true, true) => {
                tracing::info!(vm = %self.vm, "it was told to end for a move that came to nothing, and is started again after that");
                let (reply, _nobody_waits) = tokio::sync::oneshot::channel();
                self.stop(false, reply).await;
                return;
            }
            (true, false) => self.forget_start().await,
        };
        if let Err(error) = done {
            tracing::error!(vm = %self.vm, error = %chain(&error), "a VM that ran before it was to move does not start again");
        }
    }
}
