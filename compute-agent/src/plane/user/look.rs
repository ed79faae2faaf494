//! What the user plane finds: in its own memory, and on the disk.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use treeboot_block::CacheGroup;
use treeboot_block::layers::{DELTA_SUFFIX, MANIFEST_SUFFIX, owner_of};
use treeboot_types::{Digest, VmName};

use super::UserPlane;
use super::files::{blocking, names};
use crate::plane::{PlaneError, Scope};
use crate::stack::{Found, FoundBase, FoundDelta};
use crate::store::Manifest;

impl UserPlane {
    pub(super) async fn look(&self, scope: &Scope) -> Result<Found, PlaneError> {
        let mut found = self.in_memory(scope);
        let look = Look {
            group: Arc::clone(self.caching.group()),
            store: self.settings.store.clone(),
            deltas: self.settings.deltas.clone(),
            scope: scope.clone(),
        };
        let devices = self.devices.look();
        let (caches, stores, deltas, devices) = blocking(move || {
            let io = |what: &str| {
                let what = format!("looking at {what}");
                move |error| PlaneError::io(what, error)
            };
            let caches = look.caches().map_err(io("the caches"))?;
            let stores = look.stores().map_err(io("the store"))?;
            let deltas = look.deltas().map_err(io("the deltas"))?;
            let devices = match &look.scope {
                Scope::All => devices(None),
                Scope::Disk(vm) => devices(Some(vm)),
                Scope::Base(_) => Ok(BTreeMap::new()),
            };
            let devices = devices.map_err(io("the devices"))?;
            Ok((caches, stores, deltas, devices))
        })
        .await?;
        found.caches = caches;
        found.stores = stores;
        found.devices = devices;
        let state = self.state.lock();
        // What is pinned is nobody's to drop, though no image here may need it.
        let pins = self.caching.group().pins();
        found
            .caches
            .retain(|digest| !pins.contains_key(digest) || state.bases.contains_key(digest));
        for vm in deltas {
            // The head of a delta is checked where it is opened.
            let delta = state
                .disks
                .get(&vm)
                .map_or(FoundDelta::Unopened, |open| FoundDelta::Sound(open.disk));
            found.deltas.insert(vm, delta);
        }
        Ok(found)
    }

    fn in_memory(&self, scope: &Scope) -> Found {
        let mut found = Found::default();
        let state = self.state.lock();
        let of_base = |digest: &Digest| match scope {
            Scope::All => true,
            Scope::Base(wanted) => wanted == digest,
            Scope::Disk(_) => false,
        };
        for (digest, source) in state.paths.iter().filter(|(digest, _)| of_base(digest)) {
            found.paths.insert(*digest, source.sources());
        }
        for (digest, base) in state.bases.iter().filter(|(digest, _)| of_base(digest)) {
            let base = FoundBase {
                content: base.content,
                backing: base.backing,
            };
            found.bases.insert(*digest, base);
        }
        let exports = state.exports.iter().filter(|(_, export)| of_base(&export.digest));
        found.exports = exports
            .map(|(image, export)| (image.clone(), export.clone()))
            .collect();
        let disks = state.disks.iter().filter(|(vm, _)| match scope {
            Scope::All => true,
            Scope::Base(_) => false,
            Scope::Disk(wanted) => wanted == *vm,
        });
        found.disks = disks.map(|(vm, open)| (vm.clone(), open.disk.digest)).collect();
        let limits = state.limits.iter().filter(|(vm, _)| match scope {
            Scope::All => true,
            Scope::Base(_) => false,
            Scope::Disk(wanted) => wanted == *vm,
        });
        found.limits = limits.map(|(vm, bytes)| (vm.clone(), *bytes)).collect();
        found
    }
}

/// A look at the disk.
struct Look {
    group: Arc<CacheGroup>,
    store: Option<PathBuf>,
    deltas: PathBuf,
    scope: Scope,
}

impl Look {
    /// Digests that are directories of `dir`, as far as the scope asks for them.
    fn digests(&self, dir: &std::path::Path) -> std::io::Result<BTreeSet<Digest>> {
        match &self.scope {
            Scope::All => Ok(names(dir)?.iter().filter_map(|name| name.parse().ok()).collect()),
            Scope::Base(digest) if dir.join(digest.to_string()).try_exists()? => Ok([*digest].into()),
            Scope::Base(_) | Scope::Disk(_) => Ok(BTreeSet::new()),
        }
    }

    fn caches(&self) -> std::io::Result<BTreeSet<Digest>> {
        let mut found: BTreeSet<_> = match &self.scope {
            Scope::All => self.group.digests().into_iter().collect(),
            Scope::Base(digest) => self
                .group
                .digests()
                .into_iter()
                .filter(|held| held == digest)
                .collect(),
            Scope::Disk(_) => BTreeSet::new(),
        };
        for directory in self.group.directories() {
            found.extend(self.digests(&directory)?);
        }
        Ok(found)
    }

    fn stores(&self) -> std::io::Result<BTreeSet<Digest>> {
        let Some(store) = &self.store else {
            return Ok(BTreeSet::new());
        };
        let mut stores = self.digests(store)?;
        stores.retain(|digest| Manifest::load(&store.join(digest.to_string())).is_ok());
        Ok(stores)
    }

    fn deltas(&self) -> std::io::Result<BTreeSet<VmName>> {
        match &self.scope {
            Scope::All => Ok(names(&self.deltas)?
                .iter()
                .filter_map(|name| owner_of(name))
                .collect()),
            Scope::Disk(vm) => {
                let there = |suffix| self.deltas.join(format!("{vm}{suffix}")).try_exists();
                // Its first layer may have been merged long ago; then there is a manifest.
                match there(DELTA_SUFFIX)? || there(MANIFEST_SUFFIX)? {
                    true => Ok([vm.clone()].into()),
                    false => Ok(BTreeSet::new()),
                }
            }
            Scope::Base(_) => Ok(BTreeSet::new()),
        }
    }
}
