//! Snapshots of VMs' disks: taken, listed, gone back to, deleted; and the merging that follows.

use std::sync::Arc;

use treeboot_block::LayerError;
use treeboot_block::layers::{LayerReport, TreeError};
use treeboot_types::{SnapshotName, VmName};

use super::vm::{Freeze, VmMsg, VmOwner};
use super::{Host, HostError, Shared, chain, reach_error};
use crate::apply::ReachError;
use crate::plane::{PlaneError, Verb};
use crate::stack::{LayerChange, Step};

/// A snapshot that was taken.
#[derive(Debug)]
pub struct Snapshotted {
    /// What is frozen.
    pub layer: LayerReport,
    /// It was not there before.
    pub created: bool,
    /// Why the guest did not hold its file systems still; `None` where it did.
    pub not_frozen: Option<String>,
    /// Why it may do so still, for people.
    pub trouble: Option<String>,
}

/// So that a wrong name is not answered by a reason that has nothing to do with it.
async fn find_snapshot(shared: &Shared, vm: &VmName, snapshot: &SnapshotName) -> Result<(), HostError> {
    let layers = shared.applier.plane.layers(vm, false).await?;
    let names = layers.into_iter().filter_map(|layer| layer.snapshot);
    let known: Vec<_> = names.map(|snapshot| snapshot.name).collect();
    match known.contains(snapshot) {
        true => Ok(()),
        false => Err(HostError::Layers {
            vm: vm.clone(),
            host: shared.host().to_string(),
            source: Box::new(LayerError::Tree(TreeError::Unknown {
                snapshot: snapshot.clone(),
                known,
            })),
        }),
    }
}

impl VmOwner {
    /// One change of the disk's layers, which the disk's owner is asked for, so that none meets another.
    pub(super) async fn change_layers(&mut self, change: LayerChange) -> Result<(), HostError> {
        if !matches!(change, LayerChange::Release { .. }) {
            self.check_settled()?;
        }
        if let LayerChange::RollBack { snapshot } = &change {
            find_snapshot(&self.shared, &self.vm, snapshot).await?;
            if self.run.as_ref().is_some_and(|run| !run.vm.ended()) {
                let vm = self.vm.clone();
                return Err(HostError::VmRuns { vm });
            }
            let stats = self.shared.applier.plane.disk_stats(&self.vm);
            let sessions = stats.unwrap_or_default().sessions;
            if sessions > 0 {
                let vm = self.vm.clone();
                return Err(HostError::DiskInUse { vm, sessions });
            }
        }
        // It may have lost its base when the agent started.
        self.reach_disk().await?;
        let step = Step::Layers {
            vm: self.vm.clone(),
            layers: change,
        };
        let name = step.name();
        let changed = self.shared.applier.step(step).await;
        changed.map_err(|error| match error {
            ReachError::Step {
                source: PlaneError::Layers { vm, source },
                ..
            } => HostError::Layers {
                vm,
                host: self.shared.host().to_string(),
                source,
            },
            source => reach_error(name, format_args!("VM '{}'", self.vm), source),
        })?;
        self.tidy_layers();
        Ok(())
    }

    /// At the agent's start: transfers of its predecessor are no more.
    pub(super) async fn release_layers(&mut self) {
        let (plane, vm) = (Arc::clone(&self.shared.applier.plane), self.vm.clone());
        let layers = plane.layers(&vm, false).await.unwrap_or_default();
        if layers.len() < 2 {
            return;
        }
        let step = Step::Layers {
            vm,
            layers: LayerChange::Release { transfer: None },
        };
        if let Err(error) = self.shared.applier.step(step).await {
            tracing::warn!(vm = %self.vm, error = %chain(&error), "layers of a transfer that is over stay");
        }
    }

    /// Merges what no snapshot needs and gives frozen layers their checksums, beside everything else. What ends it early is gone on
    /// with at the next change, or the next start.
    pub(super) fn tidy_layers(&self) {
        if Verb::Snapshot.refusal(self.shared.applier.plane.kind()).is_some() {
            return;
        }
        let shared = Arc::clone(&self.shared);
        let vm = self.vm.clone();
        self.shared.tasks.spawn(async move {
            let stop = shared.stop.clone();
            let tidying = async {
                // Nearly every disk has one layer, and nothing to be noted.
                let layers = shared.applier.plane.layers(&vm, false).await?;
                if layers.len() < 2 {
                    return Ok(());
                }
                let step = Step::Layers {
                    vm: vm.clone(),
                    layers: LayerChange::Tidy,
                };
                match shared.applier.step(step).await {
                    Err(ReachError::Step { source, .. }) => Err(source),
                    _ => Ok(()),
                }
            };
            let done = tokio::select! {
                done = tidying => done,
                () = stop.cancelled() => return,
            };
            match done {
                Ok(()) | Err(PlaneError::Missing { .. } | PlaneError::Rule(_)) => {}
                Err(PlaneError::Layers { source, .. }) if matches!(*source, LayerError::Stopping) => {}
                Err(error) => {
                    tracing::warn!(%vm, error = %chain(&error), "layers that no snapshot needs are still there");
                }
            }
        });
    }
}

impl Host {
    /// Whether this host's plane can do a verb.
    ///
    /// # Errors
    /// It cannot; the error says why.
    pub fn can(&self, verb: Verb) -> Result<(), HostError> {
        match verb.refusal(self.plane().kind()) {
            None => Ok(()),
            Some(why) => Err(HostError::NotOnPlane {
                verb: verb.name(),
                host: self.shared.host().to_string(),
                why,
            }),
        }
    }

    pub(super) fn has_disk(&self, vm: &VmName) -> Result<(), HostError> {
        self.known(vm)?;
        match self.desired().disks.get(vm) {
            Some(disk) if !disk.doomed => match HostError::of_move(vm, self.shared.host(), disk) {
                Some(error) => Err(error),
                None => Ok(()),
            },
            _ => Err(HostError::NoDisk {
                vm: vm.clone(),
                host: self.shared.host().to_string(),
            }),
        }
    }

    pub(super) async fn change_layers(&self, vm: &VmName, change: LayerChange) -> Result<(), HostError> {
        self.has_disk(vm)?;
        self.can(Verb::Snapshot)?;
        self.ask_vm(vm, |reply| VmMsg::Layers { change, reply }).await
    }

    /// Takes a snapshot of a VM's disk, which may run. Returns its layer, and whether it is new.
    ///
    /// # Errors
    /// [`HostError`]; nothing changed then.
    pub async fn snapshot(
        &self,
        vm: &VmName,
        snapshot: &SnapshotName,
    ) -> Result<(LayerReport, bool), HostError> {
        let taken = self.snapshot_with(vm, snapshot, Freeze::Auto).await?;
        Ok((taken.layer, taken.created))
    }

    /// Takes a snapshot of a VM's disk, while which the guest holds its file systems still, or not.
    ///
    /// # Errors
    /// [`HostError`]; nothing changed then.
    pub async fn snapshot_with(
        &self,
        vm: &VmName,
        snapshot: &SnapshotName,
        freeze: Freeze,
    ) -> Result<Snapshotted, HostError> {
        let named = |layer: &LayerReport| layer.snapshot.as_ref().is_some_and(|s| s.name == *snapshot);
        let before = self.layers(vm, false).await?;
        let held = self.ask_vm(vm, |reply| VmMsg::Snapshot {
            snapshot: snapshot.clone(),
            freeze,
            reply,
        });
        let held = held.await?;
        let layers = self.layers(vm, false).await?;
        let taken = layers.into_iter().find(named);
        let layer = taken.ok_or_else(|| HostError::Layers {
            vm: vm.clone(),
            host: self.shared.host().to_string(),
            // Somebody deleted it a moment ago.
            source: Box::new(LayerError::Tree(TreeError::Unknown {
                snapshot: snapshot.clone(),
                known: Vec::new(),
            })),
        })?;
        tracing::info!(%vm, %snapshot, not_frozen = held.not_frozen, "a snapshot was taken");
        Ok(Snapshotted {
            layer,
            created: !before.iter().any(named),
            not_frozen: held.not_frozen,
            trouble: held.trouble,
        })
    }

    /// Goes back to a snapshot of a VM's disk; what was written since is gone.
    ///
    /// # Errors
    /// The VM runs, or [`HostError`].
    pub async fn roll_back(&self, vm: &VmName, snapshot: &SnapshotName) -> Result<(), HostError> {
        let snapshot = snapshot.clone();
        tracing::info!(%vm, %snapshot, "rolling back");
        self.change_layers(vm, LayerChange::RollBack { snapshot }).await
    }

    /// Deletes a snapshot; the VM's disk and other snapshots stay as they are.
    ///
    /// # Errors
    /// [`HostError`].
    pub async fn delete_snapshot(&self, vm: &VmName, snapshot: &SnapshotName) -> Result<(), HostError> {
        let snapshot = snapshot.clone();
        tracing::info!(%vm, %snapshot, "deleting a snapshot");
        self.change_layers(vm, LayerChange::Forget { snapshot }).await
    }

    /// The layers of a VM's disk, the oldest first; with `check` all of them are read.
    ///
    /// # Errors
    /// [`HostError`].
    pub async fn layers(&self, vm: &VmName, check: bool) -> Result<Vec<LayerReport>, HostError> {
        self.has_disk(vm)?;
        self.can(match check {
            true => Verb::CheckDelta,
            false => Verb::Snapshot,
        })?;
        Ok(self.plane().layers(vm, check).await?)
    }
}
