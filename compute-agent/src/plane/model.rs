//! A plane in memory, over the planner's own rules of the layers: fast, exact, and with nothing of a real host.

use std::collections::{BTreeMap, HashMap};
use std::pin::Pin;

use parking_lot::Mutex;
use treeboot_types::{Digest, HostName, ImageId, VmName};

use super::{Abilities, BaseStats, DiskStats, ParentFault, Plane, PlaneError, PlaneFuture, PlaneKind, Scope};
use crate::stack::{Access, Found, FoundDelta, FoundDevice, Step, World};

const BLOCK: usize = 4096;

/// The model. Its bases read the bytes that [`ModelPlane::serve`] was given.
#[derive(Default)]
pub struct ModelPlane {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    world: World,
    contents: HashMap<Digest, Vec<u8>>,
    writes: HashMap<VmName, BTreeMap<u64, Vec<u8>>>,
}

impl ModelPlane {
    /// What parents have.
    pub fn serve(&self, digest: Digest, bytes: Vec<u8>) {
        self.state.lock().contents.insert(digest, bytes);
    }

    /// The process dies and starts again: what is on the disk stays.
    pub fn restart(&self) {
        let mut state = self.state.lock();
        let found = &state.world.found;
        state.world.found = Found {
            caches: found.caches.clone(),
            stores: found.stores.clone(),
            deltas: found.deltas.clone(),
            leftovers: found.leftovers.clone(),
            devices: found
                .devices
                .keys()
                .map(|vm| (vm.clone(), FoundDevice::Parts))
                .collect(),
            ..Found::default()
        };
    }

    /// Reads an export as `host` would.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn read_export(
        &self,
        image: &ImageId,
        host: &HostName,
        offset: u64,
        bytes: usize,
    ) -> Result<Vec<u8>, String> {
        let state = self.state.lock();
        let export = state.world.found.exports.get(image).ok_or("no such export")?;
        match &export.access {
            Access::Hosts(hosts) if !hosts.contains(host) => return Err("not allowed".into()),
            _ => {}
        }
        state.base(&export.digest, offset, bytes)
    }

    /// Reads a VM's disk.
    ///
    /// # Errors
    /// It is not served.
    pub fn read_disk(&self, vm: &VmName, offset: u64, bytes: usize) -> Result<Vec<u8>, String> {
        let state = self.state.lock();
        let digest = state.world.found.disks.get(vm).ok_or("no such disk")?;
        let mut out = state.base(digest, offset, bytes)?;
        for (n, block) in out.chunks_exact_mut(BLOCK).enumerate() {
            let at = offset / BLOCK as u64 + n as u64;
            if let Some(written) = state.writes.get(vm).and_then(|w| w.get(&at)) {
                block.copy_from_slice(written);
            }
        }
        Ok(out)
    }

    /// Writes whole blocks of a VM's disk.
    ///
    /// # Errors
    /// It is not served.
    pub fn write_disk(&self, vm: &VmName, offset: u64, data: &[u8]) -> Result<(), String> {
        let mut state = self.state.lock();
        if !state.world.found.disks.contains_key(vm) {
            return Err("no such disk".into());
        }
        let writes = state.writes.entry(vm.clone()).or_default();
        for (n, block) in data.chunks_exact(BLOCK).enumerate() {
            writes.insert(offset / BLOCK as u64 + n as u64, block.to_vec());
        }
        Ok(())
    }

    /// Everything that the model holds.
    pub fn found(&self) -> Found {
        self.state.lock().world.found.clone()
    }
}

impl State {
    fn base(&self, digest: &Digest, offset: u64, bytes: usize) -> Result<Vec<u8>, String> {
        let content = self.contents.get(digest).ok_or("no parent has it")?;
        let start = offset as usize;
        let part = content.get(start..start + bytes).ok_or("beyond the end")?;
        Ok(part.to_vec())
    }
}

fn scoped(found: &Found, scope: &Scope) -> Found {
    let mut found = found.clone();
    match scope {
        Scope::All => {}
        Scope::Base(digest) => {
            found.paths.retain(|d, _| d == digest);
            found.bases.retain(|d, _| d == digest);
            found.exports.retain(|_, export| export.digest == *digest);
            found.caches.retain(|d| d == digest);
            found.stores.retain(|d| d == digest);
            found.deltas.clear();
            found.disks.clear();
            found.limits.clear();
            found.devices.clear();
            found.leftovers.clear();
        }
        Scope::Disk(vm) => {
            found.deltas.retain(|v, _| v == vm);
            found.disks.retain(|v, _| v == vm);
            found.devices.retain(|v, _| v == vm);
            found.limits.retain(|v, _| v == vm);
            found = Found {
                devices: found.devices,
                limits: found.limits,
                deltas: found.deltas,
                disks: found.disks,
                ..Found::default()
            };
        }
    }
    found
}

impl Plane for ModelPlane {
    fn kind(&self) -> PlaneKind {
        PlaneKind::Model
    }

    fn abilities(&self) -> Abilities {
        Abilities {
            max_stripes: u32::MAX,
        }
    }

    fn inspect<'a>(&'a self, scope: &'a Scope) -> PlaneFuture<'a, Found> {
        Box::pin(async move { Ok(scoped(&self.state.lock().world.found, scope)) })
    }

    fn apply<'a>(&'a self, step: &'a Step) -> PlaneFuture<'a, ()> {
        Box::pin(async move {
            let mut state = self.state.lock();
            if let Step::Layers { vm, .. } = step {
                return Err(super::no_layers(vm, PlaneKind::Model));
            }
            state.world.apply(step)?;
            if let Step::DeleteDelta { vm } = step {
                state.writes.remove(vm);
            }
            Ok(())
        })
    }

    fn readable(&self, digest: Digest) -> PlaneFuture<'_, ()> {
        Box::pin(async move {
            if self.state.lock().contents.contains_key(&digest) {
                return Ok(());
            }
            Err(PlaneError::Missing {
                what: format!("a parent that has content {}", digest.short()),
            })
        })
    }

    fn base_stats(&self, digest: &Digest) -> Option<BaseStats> {
        let state = self.state.lock();
        state
            .world
            .found
            .bases
            .contains_key(digest)
            .then(BaseStats::default)
    }

    fn disk_stats(&self, vm: &VmName) -> Option<DiskStats> {
        let state = self.state.lock();
        let blocks = state.writes.get(vm).map_or(0, BTreeMap::len);
        match state.world.found.deltas.get(vm) {
            Some(FoundDelta::Sound(_)) => Some(DiskStats {
                delta_bytes: (blocks * BLOCK) as u64,
                ..DiskStats::default()
            }),
            _ => None,
        }
    }

    fn access_map(&self, _: &Digest) -> Vec<(u32, u32)> {
        Vec::new()
    }

    fn take_faults(&self) -> Vec<ParentFault> {
        Vec::new()
    }

    fn portal(&self) -> String {
        "model:3260".into()
    }

    fn close(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(async move { self.restart() })
    }
}
