//! What is there of ours: read from device-mapper, LIO, open-iscsi, the loop devices and the files, at each look.
//!
//! A layer that is not whole is a leftover, by a name of this module's own: its kind, a colon, and what it is of. Sweeping takes all of
//! it away. Whatever does not carry our marks is not seen here at all.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use treeboot_dm::{DmDevice, Mapper, Seen, loops};
use treeboot_types::{Digest, Iqn, VmName};

use super::record::{BaseRecord, DeltaFiles, Record, SessionKey, names};
use super::sys::{Sys, loop_error, mapper_error, record_error};
use super::{base, cached, disks, exports, feed, links};
use crate::plane::{PlaneError, Scope, links as stable};
use crate::stack::{Backing, Found, FoundBase, FoundDelta, FoundDevice};
use crate::store::Manifest;

/// A half-built or half-removed base and its paths.
const STACK: &str = "stack";
/// Sessions of a content whose paths were dropped by half.
const SESSIONS: &str = "sessions";
/// A session that no record knows.
const SESSION: &str = "session";
/// A half-made target.
const TARGET: &str = "target";
/// Backstores of a content without a target.
const BACKSTORES: &str = "backstores";
/// A cache group that nothing is in, or some of one.
const CACHE: &str = "cache";
/// A disk without a delta, or a delta's loop device without a disk.
const DISK: &str = "disk";
/// A delta's blocks without a head.
const DELTA: &str = "delta";

/// What the kernel has of ours.
struct Kernel {
    devices: Vec<Seen>,
    loops: Vec<loops::LoopDevice>,
}

impl Kernel {
    fn look(sys: &Sys) -> Result<Self, PlaneError> {
        Ok(Self {
            devices: sys.mapper.list().map_err(mapper_error)?,
            loops: loops::list().map_err(loop_error)?,
        })
    }

    /// The device, where it maps something.
    fn mapped(&self, device: &DmDevice) -> bool {
        let seen = self.devices.iter().find(|seen| seen.device == *device);
        seen.is_some_and(|seen| seen.mapped)
    }

    fn has_loop(&self, file: Option<&Path>) -> bool {
        let Some(file) = file.and_then(|file| file.canonicalize().ok()) else {
            return false;
        };
        self.loops.iter().any(|device| device.file == file)
    }

    /// The base of a record, where all of it is there: a device holds what is below it, so the top one and the one that is checked
    /// first stand for the rest.
    fn base(&self, digest: &Digest, record: &Record) -> Option<BaseRecord> {
        let whole = self.mapped(&DmDevice::Base(*digest)) && self.mapped(&DmDevice::Verity(*digest));
        record.base.filter(|_| whole)
    }

    /// Whether anything of a content's stack is there.
    fn any(&self, sys: &Sys, digest: &Digest) -> bool {
        let device = self
            .devices
            .iter()
            .any(|seen| base::content_of(&seen.device) == Some(digest));
        let files = [
            sys.hash_file(digest, Backing::Cache),
            sys.hash_file(digest, Backing::Store),
            sys.data_file(digest),
        ];
        device || files.iter().any(|file| self.has_loop(file.as_deref()))
    }
}

/// Everything of ours in the scope.
pub(super) fn look(sys: &Sys, scope: &Scope) -> Result<Found, PlaneError> {
    let kernel = Kernel::look(sys)?;
    let mut found = Found::default();
    if !matches!(scope, Scope::Disk(_)) {
        look_at_contents(sys, scope, &kernel, &mut found)?;
        look_at_exports(sys, scope, &mut found)?;
        look_at_files(sys, scope, &mut found).map_err(record_error)?;
    }
    if !matches!(scope, Scope::Base(_)) {
        look_at_disks(sys, scope, &kernel, &mut found)?;
    }
    if *scope == Scope::All {
        look_at_sessions(sys, &mut found)?;
        if cached::is_left_over(sys)? {
            found.leftovers.insert(format!("{CACHE}:group"));
        }
    }
    Ok(found)
}

fn look_at_contents(sys: &Sys, scope: &Scope, kernel: &Kernel, found: &mut Found) -> Result<(), PlaneError> {
    let digests: BTreeSet<Digest> = match scope {
        Scope::Base(digest) => [*digest].into(),
        _ => {
            let devices = kernel
                .devices
                .iter()
                .filter_map(|seen| base::content_of(&seen.device).copied());
            let mut digests: BTreeSet<_> = devices.collect();
            digests.extend(sys.records.digests().map_err(record_error)?);
            digests
        }
    };
    for digest in digests {
        let record = sys.records.load(&digest).map_err(record_error)?;
        match kernel.base(&digest, &record) {
            Some(BaseRecord { content, backing }) => {
                found.bases.insert(digest, FoundBase { content, backing });
            }
            None if record.base.is_some() || kernel.any(sys, &digest) => {
                found.leftovers.insert(format!("{STACK}:{digest}"));
            }
            None => {}
        }
        match record.sources {
            Some(sources) => {
                found.paths.insert(digest, sources);
            }
            None if !record.sessions.is_empty() => {
                found.leftovers.insert(format!("{SESSIONS}:{digest}"));
            }
            None => {}
        }
    }
    Ok(())
}

fn look_at_exports(sys: &Sys, scope: &Scope, found: &mut Found) -> Result<(), PlaneError> {
    let of = |digest: &Digest| match scope {
        Scope::Base(wanted) => wanted == digest,
        _ => true,
    };
    let exported = exports::look(sys)?;
    let exports = exported.exports.into_iter();
    found.exports = exports.filter(|(_, export)| of(&export.digest)).collect();
    if *scope == Scope::All {
        let half = exported.half.iter();
        found
            .leftovers
            .extend(half.map(|name| format!("{TARGET}:{name}")));
    }
    let unused = exported.unused.iter().filter(|digest| of(digest));
    found
        .leftovers
        .extend(unused.map(|digest| format!("{BACKSTORES}:{digest}")));
    Ok(())
}

fn look_at_files(sys: &Sys, scope: &Scope, found: &mut Found) -> std::io::Result<()> {
    let digests = |dir: &Path| -> std::io::Result<BTreeSet<Digest>> {
        match scope {
            Scope::Base(digest) if dir.join(digest.to_string()).try_exists()? => Ok([*digest].into()),
            Scope::Base(_) | Scope::Disk(_) => Ok(BTreeSet::new()),
            Scope::All => Ok(names(dir)?.iter().filter_map(|name| name.parse().ok()).collect()),
        }
    };
    found.caches = digests(&sys.settings.cache)?;
    if let Some(store) = &sys.settings.store {
        found.stores = digests(store)?;
        found
            .stores
            .retain(|digest| Manifest::load(&store.join(digest.to_string())).is_ok());
    }
    Ok(())
}

/// Stable names that lead to disks of ours.
fn look_at_names(scope: &Scope, kernel: &Kernel, found: &mut Found) {
    let named = match scope {
        Scope::Disk(vm) => stable::target(vm)
            .map(|to| (vm.clone(), to))
            .into_iter()
            .collect(),
        _ => stable::all(),
    };
    for (vm, to) in named {
        let device = DmDevice::Disk(vm.clone());
        if to == Mapper::path(&device) {
            let state = match kernel.mapped(&device) {
                true => FoundDevice::Whole,
                false => FoundDevice::Parts,
            };
            found.devices.insert(vm, state);
        }
    }
}

fn look_at_disks(sys: &Sys, scope: &Scope, kernel: &Kernel, found: &mut Found) -> Result<(), PlaneError> {
    let served: BTreeMap<&VmName, &Seen> = kernel
        .devices
        .iter()
        .filter_map(|seen| match &seen.device {
            DmDevice::Disk(vm) => Some((vm, seen)),
            _ => None,
        })
        .collect();
    let vms: BTreeSet<VmName> = match scope {
        Scope::Disk(vm) => [vm.clone()].into(),
        _ => {
            let mut vms = sys.deltas.vms().map_err(record_error)?;
            vms.extend(served.keys().map(|vm| (*vm).clone()));
            vms
        }
    };
    look_at_names(scope, kernel, found);
    for vm in vms {
        let files = sys.deltas.look(&vm).map_err(record_error)?;
        let device = served.get(&vm);
        let attached = kernel.has_loop(Some(&sys.deltas.blocks(&vm)));
        let disk = match files {
            Some(DeltaFiles::Whole(disk)) => {
                let delta = match device.map(|_| disks::status(sys, &vm)).transpose()?.flatten() {
                    Some(treeboot_dm::status::SnapshotStatus::Invalid) => FoundDelta::Damaged(
                        "dm-snapshot calls it invalid: it was full, or a write to it failed".into(),
                    ),
                    _ => FoundDelta::Sound(disk),
                };
                found.deltas.insert(vm.clone(), delta);
                Some(disk)
            }
            Some(DeltaFiles::Damaged(why)) => {
                found.deltas.insert(vm.clone(), FoundDelta::Damaged(why));
                None
            }
            Some(DeltaFiles::BlocksAlone) => {
                found.leftovers.insert(format!("{DELTA}:{vm}"));
                continue;
            }
            None => None,
        };
        match (device, disk) {
            (Some(seen), Some(disk)) if seen.mapped => {
                found.disks.insert(vm, disk.digest);
            }
            (Some(_), _) => {
                found.leftovers.insert(format!("{DISK}:{vm}"));
            }
            (None, _) if attached => {
                found.leftovers.insert(format!("{DISK}:{vm}"));
            }
            (None, _) => {}
        }
    }
    Ok(())
}

/// Sessions of ours that no record knows: those of an agent that lost its state.
fn look_at_sessions(sys: &Sys, found: &mut Found) -> Result<(), PlaneError> {
    let mut known = BTreeSet::new();
    for digest in sys.records.digests().map_err(record_error)? {
        known.extend(sys.records.load(&digest).map_err(record_error)?.sessions);
    }
    for key in links::look(sys)?.into_keys() {
        if !known.contains(&key) {
            found
                .leftovers
                .insert(format!("{SESSION}:{},{}", key.target, key.portal));
        }
    }
    Ok(())
}

/// The base of a content, where it is open and whole.
pub(super) fn whole_base(sys: &Sys, digest: &Digest) -> Result<Option<BaseRecord>, PlaneError> {
    let record = sys.records.load(digest).map_err(record_error)?;
    Ok(Kernel::look(sys)?.base(digest, &record))
}

/// Who stands on a base.
pub(super) fn user_of(sys: &Sys, digest: &Digest) -> Result<Option<String>, PlaneError> {
    let targets = exports::targets(sys)?;
    if let Some(target) = targets
        .iter()
        .find(|target| exports::content(target) == Some(*digest))
    {
        return Ok(Some(format!("the export {}", target.name)));
    }
    for seen in sys.mapper.list().map_err(mapper_error)? {
        if let DmDevice::Disk(vm) = &seen.device
            && let Some(DeltaFiles::Whole(disk)) = sys.deltas.look(vm).map_err(record_error)?
            && disk.digest == *digest
        {
            return Ok(Some(format!("the disk of VM '{vm}'")));
        }
    }
    Ok(None)
}

/// Takes down a content's stack and forgets that it was there.
pub(super) fn close(sys: &Sys, digest: &Digest) -> Result<(), PlaneError> {
    base::tear_down(sys, digest)?;
    sys.records
        .update(digest, |record| record.base = None)
        .map_err(record_error)
}

/// Ends the sessions of a content whose paths are dropped.
pub(super) fn end_sessions(sys: &Sys, digest: &Digest) -> Result<(), PlaneError> {
    let record = sys.records.load(digest).map_err(record_error)?;
    for key in &record.sessions {
        feed::end(sys, digest, key)?;
    }
    Ok(())
}

/// Takes a leftover away.
pub(super) fn sweep(sys: &Sys, leftover: &str) -> Result<(), PlaneError> {
    let Some((kind, what)) = leftover.split_once(':') else {
        return Ok(());
    };
    let digest = || what.parse::<Digest>().ok();
    match kind {
        STACK => digest().map_or(Ok(()), |digest| {
            exports::drop_unused(sys, &digest)?;
            close(sys, &digest)
        }),
        SESSIONS => digest().map_or(Ok(()), |digest| end_sessions(sys, &digest)),
        CACHE => cached::end_if_unused(sys),
        BACKSTORES => digest().map_or(Ok(()), |digest| exports::drop_unused(sys, &digest)),
        TARGET => Iqn::new(what).map_or(Ok(()), |name| exports::unexport(sys, &name)),
        SESSION => match what.rsplit_once(',').map(|(t, p)| (Iqn::new(t), p.parse())) {
            Some((Ok(target), Ok(portal))) => links::log_out(sys, &SessionKey { target, portal }),
            _ => Ok(()),
        },
        DISK => VmName::new(what).map_or(Ok(()), |vm| disks::stop(sys, &vm)),
        DELTA => VmName::new(what).map_or(Ok(()), |vm| {
            disks::stop(sys, &vm)?;
            disks::delete(sys, &vm)
        }),
        _ => Ok(()),
    }
}
