//! What this host exports to its children: bases as targets, who may use them, and in which state they are.

use std::collections::BTreeSet;
use std::sync::Arc;

use treeboot_block::Reader;
use treeboot_iscsi::login::Chap;
use treeboot_iscsi::scsi::AccessState;
use treeboot_iscsi::scsi::alua::PortGroup;
use treeboot_iscsi::target::{self, Book, Doorkeeper, LunSpec, TargetOptions, TargetSpec};
use treeboot_types::{DATA_LUN, Digest, HASH_LUN, ImageId, Iqn, VmName};

use super::{DRAIN, UserPlane, differs, failed, missing};
use crate::keys::Keys;
use crate::plane::PlaneError;
use crate::stack::{Access, FoundExport, Step};

impl UserPlane {
    pub(super) fn export(
        &self,
        step: &Step,
        image: &ImageId,
        digest: &Digest,
        access: &Access,
    ) -> Result<(), PlaneError> {
        let base = self
            .base(digest)
            .ok_or_else(|| missing(step, image, "its base"))?;
        if let Some(there) = self.state.lock().exports.get(image)
            && there.digest != *digest
        {
            return Err(differs(step, image).into());
        }
        let name = Iqn::of_image(image);
        let lun = |lun, device, ident| LunSpec {
            lun,
            device,
            serial: format!("{}-{lun}", digest.short()),
            product: format!("base {}", image.name),
            ident,
        };
        let mut ident = [0; 16];
        ident.copy_from_slice(&digest.0[..16]);
        let mut hash_ident = ident;
        hash_ident[15] ^= 1;
        let spec = TargetSpec {
            name: name.clone(),
            luns: vec![
                lun(DATA_LUN, base.cache.base(Reader::Child), ident),
                lun(HASH_LUN, base.cache.hash_device(), hash_ident),
            ],
            access: self.admitted(image, access),
        };
        let options = TargetOptions {
            port_group: self.port_group(),
            // A relay that is still attaching says so. Its children's reads are served all the same: they wait.
            access_state: match base.readable {
                true => AccessState::Optimized,
                false => AccessState::Attaching,
            },
            ..TargetOptions::default()
        };
        match self.server.add_target_with(spec, options) {
            Ok(()) => {}
            Err(target::AddTargetError::Exists(_)) => {
                self.server.set_access(&name, self.admitted(image, access));
            }
            Err(source) => return Err(failed(format!("exporting {image}"), source)),
        }
        let export = FoundExport {
            digest: *digest,
            access: access.clone(),
        };
        self.state.lock().exports.insert(image.clone(), export);
        if self.base(digest).is_some_and(|base| base.readable) {
            // It may have become so between the look above and the export.
            self.server.set_access_state(&name, None, AccessState::Optimized);
        }
        Ok(())
    }

    /// The same image on another host is another path to it.
    fn port_group(&self) -> PortGroup {
        let digest = treeboot_block::verity::sha256(format!("ports:{}", self.settings.host).as_bytes()).0;
        PortGroup::new(u16::from_be_bytes([digest[0], digest[1]])).unwrap_or(PortGroup::MIN)
    }

    /// The base can be read: its exports, those of now and those to come, are ready for everybody.
    pub(super) fn became_readable(&self, digest: &Digest) {
        let mut state = self.state.lock();
        if let Some(base) = state.bases.get_mut(digest) {
            base.readable = true;
        }
        let exports = state
            .exports
            .iter()
            .filter(|(_, export)| export.digest == *digest);
        let names: Vec<_> = exports.map(|(image, _)| Iqn::of_image(image)).collect();
        drop(state);
        for name in names {
            self.server.set_access_state(&name, None, AccessState::Optimized);
        }
    }

    pub(super) async fn unexport(&self, image: &ImageId) {
        let name = Iqn::of_image(image);
        self.server
            .set_access(&name, target::Access::Initiators(BTreeSet::new()));
        let shipped = self.server.stats(&name).map_or(0, |stats| stats.wire_bytes_out);
        self.server.remove_target(&name, DRAIN).await;
        let mut state = self.state.lock();
        if let Some(export) = state.exports.remove(image) {
            *state.shipped.entry(export.digest).or_default() += shipped;
        }
    }

    fn admitted(&self, image: &ImageId, access: &Access) -> target::Access {
        let listed = match access {
            Access::Anyone => None,
            Access::Hosts(hosts) => Some(hosts.iter().map(Iqn::of_host).collect()),
        };
        if self.settings.keys.is_secure() {
            return target::Access::Book(Book(Arc::new(Children {
                keys: Arc::clone(&self.settings.keys),
                target: Iqn::of_image(image),
                listed,
            })));
        }
        listed.map_or(target::Access::Anyone, target::Access::Initiators)
    }

    pub(super) fn set_access(&self, step: &Step, image: &ImageId, access: &Access) -> Result<(), PlaneError> {
        let admitted = self.admitted(image, access);
        if !self.server.set_access(&Iqn::of_image(image), admitted) {
            return Err(missing(step, image, "the export").into());
        }
        if let Some(export) = self.state.lock().exports.get_mut(image) {
            export.access = access.clone();
        }
        Ok(())
    }
}

/// Children of one export: which may come, and what each proves itself by.
struct Children {
    keys: Arc<Keys>,
    target: Iqn,
    /// `None`: every host of the cluster.
    listed: Option<BTreeSet<Iqn>>,
}

impl Doorkeeper for Children {
    fn asks(&self, initiator: &Iqn) -> Option<Chap> {
        let listed = self.listed.as_ref();
        if listed.is_some_and(|listed| !listed.contains(initiator)) {
            return None;
        }
        self.keys.child(initiator, &self.target)
    }
}

/// The front end of one VM.
struct FrontEnd {
    keys: Arc<Keys>,
    vm: VmName,
}

impl Doorkeeper for FrontEnd {
    fn asks(&self, initiator: &Iqn) -> Option<Chap> {
        (*initiator == Iqn::of_vm(&self.vm))
            .then(|| self.keys.disk(&self.vm))
            .flatten()
    }
}

/// Who may use a VM's disk: its own initiator, and nobody else's.
pub(super) fn front_end(keys: &Arc<Keys>, vm: &VmName) -> target::Access {
    if keys.is_secure() {
        let (keys, vm) = (Arc::clone(keys), vm.clone());
        return target::Access::Book(Book(Arc::new(FrontEnd { keys, vm })));
    }
    target::Access::Initiators([Iqn::of_vm(vm)].into())
}
