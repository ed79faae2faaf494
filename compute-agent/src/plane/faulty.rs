//! A plane that fails at a chosen step, as an error or as a crash: the tool behind "fail at k".

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use treeboot_types::{Digest, ImageId, Iqn, VmName};

use super::{
    Abilities, BaseStats, DiskPlace, DiskStats, LayerBlocks, ParentFault, Plane, PlaneError, PlaneFuture,
    PlaneKind, Scope, Trouble,
};
use crate::stack::{Found, Step};
use crate::witness::Witness;
use treeboot_block::LayeredDisk;
use treeboot_block::layers::{Arrival, Frozen, Incoming, LayerReport, LayerTree};

/// How the chosen step goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultMode {
    /// It is refused and not done; what comes later works.
    Error,
    /// The process dies before it.
    CrashBefore,
    /// It is done, and the process dies before anyone learns so.
    CrashAfter,
}

/// Passes everything on until the chosen step.
pub struct FaultyPlane {
    inner: Arc<dyn Plane>,
    applied: AtomicUsize,
    fault: Mutex<(usize, FaultMode)>,
    witness: Witness,
}

impl FaultyPlane {
    /// Fails at step `at`, counted from 0 and from now.
    pub fn new(inner: Arc<dyn Plane>, at: usize, mode: FaultMode) -> Self {
        Self {
            inner,
            applied: AtomicUsize::new(0),
            fault: Mutex::new((at, mode)),
            witness: Witness::default(),
        }
    }

    /// Fails at none, and tells of each.
    pub fn witnessed(inner: Arc<dyn Plane>, witness: Witness) -> Self {
        Self {
            witness,
            ..Self::new(inner, usize::MAX, FaultMode::Error)
        }
    }

    /// Fails at another step, counted from now.
    pub fn arm(&self, at: usize, mode: FaultMode) {
        let mut fault = self.fault.lock();
        self.applied.store(0, Ordering::Relaxed);
        *fault = (at, mode);
    }

    /// Whether the chosen step was reached.
    pub fn struck(&self) -> bool {
        self.applied.load(Ordering::Relaxed) > self.fault.lock().0
    }
}

impl Plane for FaultyPlane {
    fn kind(&self) -> PlaneKind {
        self.inner.kind()
    }

    fn abilities(&self) -> Abilities {
        self.inner.abilities()
    }

    fn inspect<'a>(&'a self, scope: &'a Scope) -> PlaneFuture<'a, Found> {
        self.inner.inspect(scope)
    }

    fn apply<'a>(&'a self, step: &'a Step) -> PlaneFuture<'a, ()> {
        let (at, mode) = *self.fault.lock();
        let number = self.applied.fetch_add(1, Ordering::Relaxed);
        let fault = PlaneError::Injected { at };
        let dead = number > at && mode != FaultMode::Error;
        Box::pin(async move {
            if dead {
                return Err(fault);
            }
            if number != at {
                return self.witness.around(step.name(), self.inner.apply(step)).await;
            }
            if mode == FaultMode::CrashAfter {
                self.inner.apply(step).await?;
            }
            Err(fault)
        })
    }

    fn readable(&self, digest: Digest) -> PlaneFuture<'_, ()> {
        self.inner.readable(digest)
    }

    fn base_stats(&self, digest: &Digest) -> Option<BaseStats> {
        self.inner.base_stats(digest)
    }

    fn disk_stats(&self, vm: &VmName) -> Option<DiskStats> {
        self.inner.disk_stats(vm)
    }

    fn access_map(&self, digest: &Digest) -> Vec<(u32, u32)> {
        self.inner.access_map(digest)
    }

    fn disk_place(&self, vm: &VmName) -> Result<DiskPlace, PlaneError> {
        self.inner.disk_place(vm)
    }

    fn layers<'a>(&'a self, vm: &'a VmName, check: bool) -> PlaneFuture<'a, Vec<LayerReport>> {
        self.inner.layers(vm, check)
    }

    fn device(&self, vm: &VmName) -> Option<PathBuf> {
        self.inner.device(vm)
    }

    fn held(&self, vm: &VmName, transfer: u64) -> Result<Arc<Frozen>, PlaneError> {
        self.inner.held(vm, transfer)
    }

    fn receive<'a>(&'a self, arrival: &'a Arrival) -> PlaneFuture<'a, Arc<Incoming>> {
        Box::pin(self.witness.around("receive", self.inner.receive(arrival)))
    }

    fn layered(&self, vm: &VmName) -> Result<Arc<LayeredDisk>, PlaneError> {
        self.inner.layered(vm)
    }

    fn finish<'a>(
        &'a self,
        arrival: &'a Arrival,
        tree: &'a LayerTree,
        blocks: &'a LayerBlocks,
    ) -> PlaneFuture<'a, ()> {
        Box::pin(
            self.witness
                .around("finish", self.inner.finish(arrival, tree, blocks)),
        )
    }

    fn discard<'a>(&'a self, vm: &'a VmName, transfer: Option<u64>) -> PlaneFuture<'a, ()> {
        Box::pin(self.witness.around("discard", self.inner.discard(vm, transfer)))
    }

    fn arrivals(&self, owned: BTreeSet<VmName>) -> PlaneFuture<'_, BTreeSet<(VmName, u64)>> {
        self.inner.arrivals(owned)
    }

    fn cache(&self) -> Option<&Arc<super::caching::Caching>> {
        self.inner.cache()
    }

    fn troubles(&self) -> Vec<Trouble> {
        self.inner.troubles()
    }

    fn rekey(&self) -> PlaneFuture<'_, ()> {
        self.inner.rekey()
    }

    fn take_faults(&self) -> Vec<ParentFault> {
        self.inner.take_faults()
    }

    fn portal(&self) -> String {
        self.inner.portal()
    }

    fn export_name(&self, image: &ImageId) -> Iqn {
        self.inner.export_name(image)
    }

    fn close(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        self.inner.close()
    }
}
