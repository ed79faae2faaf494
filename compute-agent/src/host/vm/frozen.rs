//! A snapshot of a VM that runs: its guest holds its file systems still meanwhile, where a guest agent in it does so.
//!
//! That it is held still is journalled before it is asked, and until the guest has said that it goes on it is asked to go on: after whatever
//! went wrong, beside everything else, and by the agent's successors.

use std::sync::Arc;
use std::time::Duration;

use treeboot_hypervisor::{GuestAgentError, RunningVm};
use treeboot_types::SnapshotName;

use super::VmOwner;
use crate::desired::{Change, DiskState};
use crate::host::{HostError, chain};
use crate::stack::LayerChange;

/// Between two attempts to have a guest go on.
const THAW_PAUSE: Duration = Duration::from_secs(2);

/// Whether a guest is to hold its file systems still while a snapshot is taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Freeze {
    /// Where an agent in it answers.
    #[default]
    Auto,
    /// There is no snapshot otherwise.
    Require,
    /// It is not asked.
    Never,
}

/// How a snapshot was taken.
#[derive(Debug, Clone, Default)]
pub(in crate::host) struct Held {
    /// Why the guest did not hold still; `None` where it did.
    pub(in crate::host) not_frozen: Option<String>,
    /// Why it may do so still.
    pub(in crate::host) trouble: Option<String>,
}

impl VmOwner {
    /// Takes a snapshot. Whatever comes of it, a guest that was asked to hold still is asked to go on.
    pub(super) async fn snapshot(
        &mut self,
        snapshot: SnapshotName,
        freeze: Freeze,
    ) -> Result<Held, HostError> {
        self.check_settled()?;
        let frozen = match (freeze, self.has_snapshot(&snapshot).await?) {
            (Freeze::Never, _) => Err("nobody asked for more".to_owned()),
            // Nothing is taken, or nothing was written since.
            (_, true) => Err("there is a snapshot of the name".to_owned()),
            (Freeze::Auto | Freeze::Require, false) => match self.freeze().await {
                Err(why) if freeze == Freeze::Require => {
                    let vm = self.vm.clone();
                    return Err(HostError::NotFrozen { vm, why });
                }
                frozen => frozen,
            },
        };
        let change = LayerChange::Snapshot {
            snapshot,
            created_unix_ms: treeboot_identity::unix_now() * 1000,
            frozen: frozen.is_ok(),
        };
        let taken = self.change_layers(change).await;
        let thawed = match frozen {
            Ok(()) => self.thaw().await,
            Err(_) => Ok(()),
        };
        taken.map(|()| Held {
            not_frozen: frozen.err(),
            trouble: thawed.err(),
        })
    }

    async fn has_snapshot(&mut self, snapshot: &SnapshotName) -> Result<bool, HostError> {
        let layers = self.shared.applier.plane.layers(&self.vm, false).await?;
        let named = |name: &SnapshotName| name == snapshot;
        Ok(layers
            .iter()
            .any(|layer| layer.snapshot.as_ref().is_some_and(|s| named(&s.name))))
    }

    /// The QEMU that runs.
    fn running(&self) -> Option<Arc<RunningVm>> {
        let run = self.run.as_ref().filter(|run| !run.vm.ended());
        run.map(|run| Arc::clone(&run.vm))
    }

    async fn freeze(&mut self) -> Result<(), String> {
        let running = self.running();
        let running = running.ok_or_else(|| "the VM does not run in a QEMU of this agent".to_owned())?;
        let agent = running.guest_agent().await.map_err(|error| chain(&error))?;
        self.note_frozen(true).await.map_err(|error| chain(&error))?;
        let error = match agent.freeze().await {
            Ok(count) => {
                tracing::debug!(vm = %self.vm, count, "the guest holds its file systems still");
                return Ok(());
            }
            Err(error) => error,
        };
        let why = chain(&error);
        // It may hold some still all the same, unless it does nothing of that kind.
        let refused = |error: &GuestAgentError| matches!(error, GuestAgentError::Refused { .. });
        match running.thaw().await {
            Err(again) if !(refused(&error) && refused(&again)) => {
                self.thaw_later();
                Err(format!("{why}; {}", still_frozen(&again)))
            }
            _ => {
                self.note_frozen(false).await.map_err(|error| chain(&error))?;
                Err(why)
            }
        }
    }

    /// Has the guest go on. Where that does not work it is tried until it does, and said why.
    async fn thaw(&mut self) -> Result<(), String> {
        let thawed = match self.running() {
            Some(running) => match running.thaw().await {
                Err(_) if running.ended() => Ok(()),
                thawed => thawed.map(drop),
            },
            None => Ok(()),
        };
        match thawed {
            Ok(()) => self.note_frozen(false).await.map_err(|error| chain(&error)),
            Err(error) => {
                let trouble = still_frozen(&error);
                tracing::error!(vm = %self.vm, trouble, "the guest does not go on yet");
                self.thaw_later();
                Err(trouble)
            }
        }
    }

    /// Has the guest go on, beside everything else.
    pub(super) fn thaw_later(&mut self) {
        let Some(run) = &mut self.run else {
            return;
        };
        let (running, vm) = (Arc::clone(&run.vm), self.vm.clone());
        run.thawing = Some(Box::pin(async move {
            while !running.ended() {
                match running.thaw().await {
                    Ok(count) => {
                        tracing::info!(%vm, count, "the guest goes on");
                        return;
                    }
                    Err(error) => {
                        tracing::warn!(%vm, error = %chain(&error), "the guest does not go on yet");
                    }
                }
                tokio::time::sleep(THAW_PAUSE).await;
            }
        }));
    }

    /// At the agent's start: a predecessor may have ended before the guest went on.
    pub(super) async fn find_frozen(&mut self) {
        let desired = self.shared.journal().desired();
        if !desired.disks.get(&self.vm).is_some_and(|disk| disk.frozen) {
            return;
        }
        match self.run.is_some() {
            true => self.thaw_later(),
            false => self.thawed().await,
        }
    }

    /// It goes on, or has ended.
    pub(super) async fn thawed(&mut self) {
        if let Some(run) = &mut self.run {
            run.thawing = None;
        }
        if let Err(error) = self.note_frozen(false).await {
            tracing::warn!(vm = %self.vm, error = %chain(&error), "that the guest goes on is not written down; it is asked again at the next start");
        }
    }

    async fn note_frozen(&mut self, frozen: bool) -> Result<(), HostError> {
        let desired = self.shared.journal().desired();
        match desired.disks.get(&self.vm) {
            Some(there) if there.frozen != frozen => {
                let disk = DiskState {
                    frozen,
                    ..there.clone()
                };
                let vm = self.vm.clone();
                Ok(self.shared.journal().commit([Change::Disk { vm, disk }]).await?)
            }
            _ => Ok(()),
        }
    }
}

fn still_frozen(error: &GuestAgentError) -> String {
    format!(
        "the guest may still hold its file systems still ({}); it is asked to go on until it says so",
        chain(error)
    )
}
