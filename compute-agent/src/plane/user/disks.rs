//! VMs' disks on the user plane: their layers, and what is asked of these.

use std::sync::Arc;

use treeboot_block::layers::{Directory, LayerReport, Snapshot};
use treeboot_block::{BlockDevice, DiskFiles, LayerError, LayeredDisk};
use treeboot_types::VmName;

use super::files::blocking;
use super::{UserPlane, delta_error, failed, meta, missing};
use crate::plane::PlaneError;
use crate::stack::{LayerChange, Step, WantedDisk};

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
            } => {
                let snapshot = Snapshot {
                    name: snapshot.clone(),
                    created_unix_ms: *created_unix_ms,
                };
                disk.snapshot(snapshot).await.map(drop)
            }
            LayerChange::RollBack { snapshot } => disk.roll_back(snapshot).await,
            LayerChange::Forget { snapshot } => disk.forget(snapshot).await,
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

    pub(super) async fn report_layers(
        &self,
        vm: &VmName,
        check: bool,
    ) -> Result<Vec<LayerReport>, PlaneError> {
        let disk = self.served(vm).ok_or_else(|| PlaneError::Missing {
            what: format!("the disk of VM '{vm}'"),
        })?;
        disk.report(check).await.map_err(|error| layer_error(vm, error))
    }
}
