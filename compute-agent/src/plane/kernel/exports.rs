//! Exports: LIO targets over a base and its hash file, for the hosts that the coordinator named.

use std::collections::BTreeSet;
use std::time::Duration;

use treeboot_block::VerityLayout;
use treeboot_dm::{DmDevice, Mapper, Mode, Sectors};
use treeboot_iscsi::lio::{Backing as StoreOf, Backstore, BackstoreName, Export, FoundTarget, LioError};
use treeboot_iscsi::target;
use treeboot_types::{DATA_LUN, Digest, HASH_LUN, ImageId, Iqn};

use super::failed;
use super::record::BaseRecord;
use super::sys::Sys;
use super::tables::{self, SECTOR};
use crate::plane::PlaneError;
use crate::stack::{Access, FoundExport};

/// How long initiators of a target that goes may take to log out by themselves.
const DRAIN: Duration = Duration::from_millis(200);
/// What the data's backstore is called, before the digest.
const DATA: &str = "data-";
/// What the hash tree's backstore is called, before the digest.
const HASH: &str = "hash-";

fn lio_error(error: LioError) -> PlaneError {
    failed("LIO", error)
}

fn backstore(kind: &str, digest: &Digest) -> Result<BackstoreName, PlaneError> {
    BackstoreName::new(&format!("{kind}{digest}")).map_err(|error| failed("naming a backstore", error))
}

/// The content whose data or hashes a backstore shows.
fn digest_of(name: &BackstoreName) -> Option<Digest> {
    let rest = name
        .as_str()
        .strip_prefix(treeboot_iscsi::lio::BACKSTORE_PREFIX)?;
    let digest = rest.strip_prefix(DATA).or_else(|| rest.strip_prefix(HASH))?;
    digest.parse().ok()
}

/// Who may log in. A host whose secret is not known yet is left out until it is.
fn admitted(sys: &Sys, target: &Iqn, access: &Access) -> target::Access {
    let keys = &sys.settings.keys;
    match access {
        Access::Anyone if !keys.is_secure() => target::Access::Anyone,
        // LIO has one secret for everybody or none, so all readers of an origin share it.
        Access::Anyone => match keys.readers(target) {
            Some(chap) => target::Access::Secret(chap),
            None => target::Access::Initiators(BTreeSet::new()),
        },
        Access::Hosts(hosts) if !keys.is_secure() => {
            target::Access::Initiators(hosts.iter().map(Iqn::of_host).collect())
        }
        Access::Hosts(hosts) => {
            let each = hosts.iter().map(Iqn::of_host).filter_map(|initiator| {
                let chap = keys.child(&initiator, target)?;
                Some((initiator, Some(chap)))
            });
            target::Access::Each(each.collect())
        }
    }
}

/// Exports a base, or changes who may use its export.
pub(super) fn export(
    sys: &Sys,
    base: &BaseRecord,
    image: &ImageId,
    access: &Access,
) -> Result<(), PlaneError> {
    let digest = base.content.digest;
    let device = DmDevice::Export(digest);
    let below = sys.number(&DmDevice::Base(digest))?;
    let table = tables::linear(Sectors(base.content.bytes / SECTOR), below)
        .map_err(|error| failed("a table", error))?;
    sys.ensure(&device, &table, Mode::ReadOnly)?;
    let hash_file = sys
        .hash_file(&digest, base.backing)
        .ok_or_else(|| PlaneError::Missing {
            what: "the hash file".into(),
        })?;
    let (data, hash) = (backstore(DATA, &digest)?, backstore(HASH, &digest)?);
    for wanted in [
        Backstore {
            name: data.clone(),
            backing: StoreOf::Block {
                path: Mapper::path(&device),
            },
            writable: false,
            serial: format!("{}-{DATA_LUN}", digest.short()),
        },
        Backstore {
            name: hash.clone(),
            backing: StoreOf::File {
                path: hash_file,
                bytes: VerityLayout::new(base.content.bytes).hash_bytes(),
            },
            writable: false,
            serial: format!("{}-{HASH_LUN}", digest.short()),
        },
    ] {
        sys.lio.ensure_backstore(&wanted).map_err(lio_error)?;
    }
    let name = Iqn::of_image(image);
    let export = Export {
        access: admitted(sys, &name, access),
        name,
        portals: sys.settings.portals.clone(),
        luns: vec![(DATA_LUN, data), (HASH_LUN, hash)],
        writable: false,
    };
    // A child that knew the secret of its day goes on.
    sys.lio
        .change_secrets(&export.name, &export.access)
        .map_err(lio_error)?;
    sys.lio.ensure_target(&export).map(drop).map_err(lio_error)
}

/// Ends an export; the device and the backstores go with the last one of their content.
pub(super) fn unexport(sys: &Sys, name: &Iqn) -> Result<(), PlaneError> {
    let digest = targets(sys)?
        .iter()
        .find(|target| target.name == *name)
        .and_then(content);
    sys.lio.remove_target(name, DRAIN).map_err(lio_error)?;
    match digest {
        Some(digest) => drop_unused(sys, &digest),
        None => Ok(()),
    }
}

/// Removes the backstores of a content, and the device below, where no target has them.
pub(super) fn drop_unused(sys: &Sys, digest: &Digest) -> Result<(), PlaneError> {
    if targets(sys)?
        .iter()
        .any(|target| content(target) == Some(*digest))
    {
        return Ok(());
    }
    for kind in [DATA, HASH] {
        sys.lio
            .remove_backstore(&backstore(kind, digest)?)
            .map_err(lio_error)?;
    }
    sys.remove(&DmDevice::Export(*digest))
}

/// The content that a target exports, as far as it has come.
pub(super) fn content(target: &FoundTarget) -> Option<Digest> {
    let mut luns = target.luns.iter().filter_map(|lun| lun.backstore.as_ref());
    luns.find_map(digest_of)
}

/// All targets of ours.
pub(super) fn targets(sys: &Sys) -> Result<Vec<FoundTarget>, PlaneError> {
    Ok(sys.lio.found().map_err(lio_error)?.targets)
}

/// What LIO has of ours.
#[derive(Debug, Default)]
pub(super) struct Exported {
    /// Whole exports of images.
    pub(super) exports: Vec<(ImageId, FoundExport)>,
    /// Targets that are not whole.
    pub(super) half: Vec<Iqn>,
    /// Contents that have backstores and no target.
    pub(super) unused: BTreeSet<Digest>,
}

/// Looks at LIO.
pub(super) fn look(sys: &Sys) -> Result<Exported, PlaneError> {
    let found = sys.lio.found().map_err(lio_error)?;
    let mut exported = Exported::default();
    let mut used = BTreeSet::new();
    for target in found.targets {
        let digest = content(&target);
        used.extend(digest);
        let luns: Vec<u16> = target
            .luns
            .iter()
            .filter(|lun| lun.backstore.is_some())
            .map(|lun| lun.lun)
            .collect();
        let whole = target.enabled && luns == [DATA_LUN, HASH_LUN] && !target.portals.is_empty();
        let access = if target.anyone {
            Access::Anyone
        } else {
            Access::Hosts(target.initiators.iter().filter_map(Iqn::host).collect())
        };
        match (target.name.image(), digest) {
            (Some(image), Some(digest)) if whole => {
                exported.exports.push((image, FoundExport { digest, access }));
            }
            _ => exported.half.push(target.name),
        }
    }
    let stores = found.backstores.iter().filter_map(|store| digest_of(&store.name));
    exported.unused = stores.filter(|digest| !used.contains(digest)).collect();
    Ok(exported)
}

/// Bytes that the exports of a content sent, as far as LIO counts: it keeps whole MiB for each LUN.
pub(super) fn shipped_bytes(sys: &Sys, digest: &Digest) -> u64 {
    let targets = targets(sys).unwrap_or_default();
    let of_content = targets.iter().filter(|target| content(target) == Some(*digest));
    of_content
        .filter_map(|target| sys.lio.counters(&target.name).ok().flatten())
        .flat_map(|counters| counters.luns)
        .map(|lun| lun.read_mib << 20)
        .sum()
}
