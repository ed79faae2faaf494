//! VMs' disks on the user plane: their layers, and what is asked of these.

use std::collections::BTreeSet;
use std::sync::Arc;

use treeboot_block::layers::{
    Arrival, Arrivals, Directory, Frozen, Incoming, LayerReport, LayerTree, Snapshot, discard_incoming,
    discard_received, finish_layers, sweep_arrivals,
};
use treeboot_block::{BlockDevice, DeltaMeta, DiskFiles, LayerError, LayeredDisk};
use treeboot_types::VmName;

use super::files::blocking;
use super::{UserPlane, delta_error, failed, missing};
use crate::plane::{LayerBlocks, PlaneError};
use crate::stack::{LayerChange, Step, WantedDisk};

pub(super) fn meta(disk: WantedDisk) -> DeltaMeta {
    DeltaMeta {
        digest: disk.digest,
        bytes: disk.bytes,
    }
}

pub(super) fn layer_error(vm: &VmName, error: LayerError) -> PlaneError {
    match error {
        LayerError::Delta(error) => delta_error(vm, error),
        LayerError::Base(error) => failed(format!("the disk of VM '{vm}'"), error),
        source => PlaneError::Layers {
            vm: vm.clone(),
            source: Box::new(source),
        },
    }
}

impl UserPlane {
    pub(super) fn limit_disk(&self, vm: &VmName, bytes: Option<u64>) {
        let mut state = self.state.lock();
        match bytes {
            Some(bytes) => state.limits.insert(vm.clone(), bytes),
            None => state.limits.remove(vm),
        };
        if let Some(open) = state.disks.get(vm) {
            open.layers.set_limit(bytes);
        }
    }

    pub(super) async fn attach_device(&self, step: &Step, vm: &VmName) -> Result<(), PlaneError> {
        let open = self.state.lock().disks.get(vm).cloned();
        let open = open.ok_or_else(|| missing(step, vm, "its disk"))?;
        self.devices.attach(vm, open.layers).await
    }

    pub(super) async fn open_layers(
        &self,
        vm: &VmName,
        disk: WantedDisk,
        base: Arc<dyn BlockDevice>,
    ) -> Result<LayeredDisk, PlaneError> {
        let folder = Arc::new(Directory::new(&self.settings.deltas));
        let files = DiskFiles::new(folder, vm.clone(), meta(disk), self.boot);
        let vm = vm.clone();
        blocking(move || LayeredDisk::open(files, base).map_err(|error| layer_error(&vm, error))).await
    }

    pub(super) fn served(&self, vm: &VmName) -> Option<Arc<LayeredDisk>> {
        let state = self.state.lock();
        state.disks.get(vm).map(|open| Arc::clone(&open.layers))
    }

    pub(super) fn layers_of(&self, vm: &VmName) -> Result<Arc<LayeredDisk>, PlaneError> {
        self.served(vm).ok_or_else(|| PlaneError::Missing {
            what: format!("the disk of VM '{vm}'"),
        })
    }

    pub(super) async fn change_layers(
        &self,
        step: &Step,
        vm: &VmName,
        change: &LayerChange,
    ) -> Result<(), PlaneError> {
        let disk = self.served(vm).ok_or_else(|| missing(step, vm, "its disk"))?;
        let changed = match change {
            LayerChange::Snapshot {
                snapshot,
                created_unix_ms,
                frozen,
            } => {
                let snapshot = Snapshot {
                    name: snapshot.clone(),
                    created_unix_ms: *created_unix_ms,
                    frozen: *frozen,
                };
                disk.snapshot(snapshot).await.map(drop)
            }
            LayerChange::RollBack { snapshot } => disk.roll_back(snapshot).await,
            LayerChange::Forget { snapshot } => disk.forget(snapshot).await,
            LayerChange::Hold { transfer, snapshot } => match snapshot {
                Some(snapshot) => disk.hold_snapshot(snapshot, *transfer).await.map(drop),
                None => disk.hold(*transfer).await.map(drop),
            },
            LayerChange::HoldAll { transfer } => disk.hold_all(*transfer).await,
            LayerChange::Release { transfer } => disk.release(*transfer).await,
            LayerChange::Tidy => loop {
                match disk.tidy().await {
                    Ok(true) => {}
                    Ok(false) => break Ok(()),
                    Err(error) => break Err(error),
                }
            },
        };
        changed.map_err(|error| layer_error(vm, error))
    }

    pub(super) fn read_held(&self, vm: &VmName, transfer: u64) -> Result<Arc<Frozen>, PlaneError> {
        let held = self.served(vm).and_then(|disk| disk.held(transfer));
        held.map(Arc::new).ok_or_else(|| PlaneError::Missing {
            what: format!("what was held of VM '{vm}' for a transfer"),
        })
    }

    pub(super) async fn begin_receiving(&self, arrival: &Arrival) -> Result<Arc<Incoming>, PlaneError> {
        let (deltas, boot, arrival) = (self.settings.deltas.clone(), self.boot, arrival.clone());
        blocking(move || {
            let begun = Incoming::begin(&deltas, &arrival, boot);
            begun
                .map(Arc::new)
                .map_err(|error| delta_error(&arrival.vm, error))
        })
        .await
    }

    pub(super) async fn finish_arrival(
        &self,
        arrival: &Arrival,
        tree: &LayerTree,
        blocks: &LayerBlocks,
    ) -> Result<(), PlaneError> {
        let (deltas, boot) = (self.settings.deltas.clone(), self.boot);
        let (arrival, tree, blocks) = (arrival.clone(), tree.clone(), blocks.clone());
        blocking(move || {
            let finished = finish_layers(&deltas, &arrival, &tree, &blocks, boot);
            finished.map_err(|error| delta_error(&arrival.vm, error))
        })
        .await
    }

    pub(super) async fn discard_arrival(&self, vm: &VmName, transfer: Option<u64>) -> Result<(), PlaneError> {
        let (deltas, vm) = (self.settings.deltas.clone(), vm.clone());
        blocking(move || {
            let discarded = match transfer {
                Some(transfer) => discard_incoming(&deltas, &vm, transfer),
                None => discard_received(&deltas, &vm),
            };
            discarded.map_err(|error| delta_error(&vm, error))
        })
        .await
    }

    pub(super) async fn find_arrivals(
        &self,
        owned: BTreeSet<VmName>,
    ) -> Result<BTreeSet<(VmName, u64)>, PlaneError> {
        let (deltas, boot) = (self.settings.deltas.clone(), self.boot);
        let swept = blocking(move || {
            let swept = sweep_arrivals(&deltas, boot, |vm| owned.contains(vm));
            swept.map_err(|source| failed("removing disks that no VM was given".into(), source))
        });
        let Arrivals { resumable, swept } = swept.await?;
        for path in swept {
            tracing::info!(path = %path.display(), "removed a disk that came and that no VM was given");
        }
        Ok(resumable)
    }

    pub(super) async fn report_layers(
        &self,
        vm: &VmName,
        check: bool,
    ) -> Result<Vec<LayerReport>, PlaneError> {
        let disk = self.layers_of(vm)?;
        disk.report(check).await.map_err(|error| layer_error(vm, error))
    }
}
