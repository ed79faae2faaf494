//! The cache group as the plane uses it: opened with the first content, thrown away with the last.
//!
//! A base is built past the cache and is usable at once. It goes over to the cache when a parent is up ([`super::keeper`]), because a
//! device that bcache makes is read by the kernel at once, and would wait for a parent together with everybody who wants the group.
//! It goes back where the cache fails. Its users notice neither. Deliberately absent: what is brought in and when.

use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use nix::sys::stat::{major, minor};
use parking_lot::Mutex;
use treeboot_dm::group::{CacheDevice, Config, Filler, Group, GroupError, Health, Kind, uncached};
use treeboot_dm::{DeviceNumber, DmDevice, Mode, Sectors, loops};
use treeboot_types::Digest;

use super::record::{self, BaseRecord, names};
use super::serving::{Phase, Serving, Use, Why};
use super::sys::{Sys, attach, detach, loop_error, mapper_error, record_error};
use super::tables::SECTOR;
use super::{base, failed};
use crate::plane::PlaneError;
use crate::stack::Backing;

/// The folder of the group's state, below the records.
const FOLDER: &str = "group";
/// So often a base may give the cache up, and not its parents, before the cache counts as failed.
const STRIKES: u32 = 8;
/// The cache device that is made where none is given, below the cache directory.
const FILE: &str = "cache-device";

/// How a host caches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheSettings {
    /// By what.
    pub kind: Kind,
    /// Block devices or files, always in the same order; none: a sparse file below the cache directory.
    pub devices: Vec<PathBuf>,
    /// Size of the file that is made where no device is given.
    pub file_bytes: u64,
    /// How fast an attached image is brought in; 0: only what is read is cached, and of kind dm-cache nothing.
    pub fill_bytes_per_second: u64,
}

/// The group, where it is open.
#[derive(Debug, Default)]
pub(super) struct Cached {
    /// Held by threads that may block, never by a task.
    group: Mutex<Option<Group>>,
    /// Whether it serves.
    pub(super) serving: Serving,
}

fn group_error(error: GroupError) -> PlaneError {
    failed("the cache group", error)
}

impl Sys {
    fn group_folder(&self) -> PathBuf {
        self.settings.state.join(FOLDER)
    }

    fn own_file(&self) -> PathBuf {
        self.settings.cache.join(FILE)
    }

    /// Opens the group where it is not; takes over one that runs.
    fn opened<'a>(&self, group: &'a mut Option<Group>) -> Result<&'a mut Group, PlaneError> {
        let missing = || PlaneError::Missing {
            what: "the cache group".into(),
        };
        if !self.cached.serving.serves() {
            return Err(missing());
        }
        if group.is_none() {
            let settings = self.settings.group.as_ref().ok_or_else(missing)?;
            let config = Config {
                kind: settings.kind,
                folder: self.group_folder(),
                devices: self.cache_devices(settings)?,
            };
            let opened = match Group::open(Arc::clone(&self.mapper), &config) {
                Err(GroupError::Other { .. }) => {
                    tracing::warn!("the cache that runs is not the one that is set; it is begun anew");
                    self.bypass()?;
                    Group::discard(&self.mapper, &config.folder).map_err(group_error)?;
                    Group::open(Arc::clone(&self.mapper), &config)
                }
                opened => opened,
            };
            *group = Some(opened.map_err(group_error)?);
        }
        group.as_mut().ok_or_else(missing)
    }

    fn cache_devices(&self, settings: &CacheSettings) -> Result<Vec<CacheDevice>, PlaneError> {
        if settings.devices.is_empty() {
            let path = self.own_file();
            let made = || {
                let file = std::fs::OpenOptions::new()
                    .create(true)
                    .truncate(false)
                    .write(true)
                    .open(&path)?;
                if file.metadata()?.len() == 0 {
                    file.set_len(settings.file_bytes)?;
                }
                Ok(())
            };
            made().map_err(|error| PlaneError::io(format!("making {}", path.display()), error))?;
            return Ok(vec![cache_device(&path)?]);
        }
        settings.devices.iter().map(|path| cache_device(path)).collect()
    }

    /// Gives every base the table that leads past the cache.
    fn bypass(&self) -> Result<(), PlaneError> {
        for seen in self.mapper.list().map_err(mapper_error)? {
            let DmDevice::Base(digest) = seen.device else {
                continue;
            };
            let record = self.records.load(&digest).map_err(record_error)?;
            if let Some(base) = record.base.filter(|base| base.backing == Backing::Cache) {
                let below = base::join_reads(self, &digest)?;
                let table = uncached(below, sectors(&base)).map_err(base::table_error)?;
                self.ensure(&seen.device, &table, Mode::ReadOnly)?;
            }
        }
        Ok(())
    }

    /// Whether nothing that a cache is for is left, neither in use nor kept.
    fn is_cache_unused(&self) -> Result<bool, PlaneError> {
        for digest in self.records.digests().map_err(record_error)? {
            let record = self.records.load(&digest).map_err(record_error)?;
            if record.base.is_some_and(|base| base.backing == Backing::Cache) {
                return Ok(false);
            }
        }
        let kept = names(&self.settings.cache).map_err(record_error)?;
        Ok(kept.iter().all(|name| name.parse::<Digest>().is_err()))
    }

    fn has_group_devices(&self) -> Result<bool, PlaneError> {
        let seen = self.mapper.list().map_err(mapper_error)?;
        Ok(seen.iter().any(|seen| {
            matches!(
                seen.device,
                DmDevice::Origins
                    | DmDevice::CacheData
                    | DmDevice::CacheMetadata
                    | DmDevice::CacheGuard
                    | DmDevice::CacheGroup
            )
        }))
    }
}

fn sectors(base: &BaseRecord) -> Sectors {
    Sectors(base.content.bytes / SECTOR)
}

/// A block device as it is, a file as a loop device.
fn cache_device(path: &Path) -> Result<CacheDevice, PlaneError> {
    let error = |error| PlaneError::io(format!("the cache device {}", path.display()), error);
    let metadata = std::fs::metadata(path).map_err(error)?;
    if metadata.file_type().is_block_device() {
        let part = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        let number = DeviceNumber {
            major: part(major(metadata.rdev())),
            minor: part(minor(metadata.rdev())),
        };
        return Ok(CacheDevice {
            number,
            length: loops::size(path).map_err(loop_error)?,
        });
    }
    Ok(CacheDevice {
        number: attach(path, Mode::ReadWrite)?.number,
        length: Sectors(metadata.len() / SECTOR),
    })
}

/// Takes a content in and moves its base over to the cache; gives what fills it, to be dropped when the group no longer serves.
pub(super) fn take_in(sys: &Sys, base: &BaseRecord) -> Result<(Filler, Use), PlaneError> {
    let digest = base.content.digest;
    let mut group = sys.cached.group.lock();
    let group = sys.opened(&mut group)?;
    let below = base::join_reads(sys, &digest)?;
    let added = group.add(digest, below, sectors(base));
    if added.as_ref().is_err_and(GroupError::is_full) {
        sys.cached.serving.note_full();
    }
    let table = added.map_err(group_error)?;
    sys.ensure(&DmDevice::Base(digest), &table, Mode::ReadOnly)?;
    let filler = group.filler(&digest, below).map_err(group_error)?;
    Ok((filler, sys.cached.serving.used()))
}

/// Takes a content out for now, its base being gone; what is cached of it is kept.
pub(super) fn release(sys: &Sys, digest: &Digest) -> Result<(), PlaneError> {
    let mut group = sys.cached.group.lock();
    let there = match &*group {
        Some(group) => group.contents().any(|(content, _)| content == digest),
        None => {
            let backing = sys.mapper.number(&DmDevice::Backing(*digest));
            let origins = sys.mapper.number(&DmDevice::Origins);
            backing.map_err(mapper_error)?.is_some() || origins.map_err(mapper_error)?.is_some()
        }
    };
    if !there {
        return Ok(());
    }
    if sys.settings.group.is_none() || !sys.cached.serving.serves() {
        // Made by an agent that was told to cache, or being left.
        sys.bypass()?;
        *group = None;
        return Group::discard(&sys.mapper, &sys.group_folder()).map_err(group_error);
    }
    sys.opened(&mut group)?.release(digest).map_err(group_error)
}

/// Takes a content out for ever.
pub(super) fn forget(sys: &Sys, digest: &Digest) -> Result<(), PlaneError> {
    let mut group = sys.cached.group.lock();
    if sys.settings.group.is_none() || group.is_none() && !sys.has_group_devices()? {
        // What a group that does not run holds of the content is found only by the same content, whose bytes are the same.
        return Ok(());
    }
    sys.opened(&mut group)?.remove(digest).map_err(group_error)
}

/// Whether a group, or some of one, is there that nobody needs.
pub(super) fn is_left_over(sys: &Sys) -> Result<bool, PlaneError> {
    let there = sys.group_folder().try_exists().map_err(record_error)?
        || sys.own_file().try_exists().map_err(record_error)?
        || sys.has_group_devices()?;
    Ok(there && sys.is_cache_unused()?)
}

/// Throws the group away where nobody needs it any more.
pub(super) fn end_if_unused(sys: &Sys) -> Result<(), PlaneError> {
    let mut group = sys.cached.group.lock();
    if !is_left_over(sys)? {
        return Ok(());
    }
    throw_away(sys, &mut group)
}

fn throw_away(sys: &Sys, group: &mut Option<Group>) -> Result<(), PlaneError> {
    *group = None;
    let folder = sys.group_folder();
    if folder.try_exists().map_err(record_error)? || sys.has_group_devices()? {
        std::fs::create_dir_all(&folder).map_err(record_error)?;
        Group::discard(&sys.mapper, &folder).map_err(group_error)?;
    }
    let given = sys.settings.group.iter().flat_map(|group| &group.devices);
    for path in given {
        detach(path)?;
    }
    detach(&sys.own_file())?;
    record::gone(std::fs::remove_file(sys.own_file())).map_err(record_error)?;
    record::gone(std::fs::remove_dir_all(&folder)).map_err(record_error)
}

/// Has every base ask again what it gave up; gives how many had given up the cache alone.
fn reinstate(sys: &Sys, group: &Group) -> Result<u32, PlaneError> {
    let mut strikes = 0;
    for (content, _) in group.contents() {
        strikes += u32::from(Group::reinstate(&sys.mapper, content).map_err(group_error)?);
    }
    Ok(strikes)
}

/// Looks whether the group still serves. Where it does not, every base goes past it at once, and when those who fill it have let go
/// of it, it is thrown away: one that failed for as long as this process lives, one that is full to be begun anew. To be called
/// again and again.
pub(super) fn watch(sys: &Sys) -> Result<(), PlaneError> {
    let mut group = sys.cached.group.lock();
    let serving = &sys.cached.serving;
    match (serving.phase(), &*group) {
        (Phase::Serves, Some(open)) => {
            let why = match open.health().map_err(group_error)? {
                Health::Failed(why) => {
                    tracing::error!(%why, "the cache has failed; reads go to the parents from now on");
                    Why::Failed(why)
                }
                Health::Good if serving.is_due(Instant::now()) => {
                    tracing::warn!("the cache has no place left for one more image; it is begun anew");
                    Why::Full
                }
                Health::Good => match reinstate(sys, open)? {
                    strikes if strikes > 0 && serving.strike(strikes) >= STRIKES => {
                        let why = format!("{STRIKES} times it could not be read, and the parents could");
                        tracing::error!(%why, "the cache has failed; reads go to the parents from now on");
                        Why::Failed(why)
                    }
                    _ => return Ok(()),
                },
            };
            serving.leave(why);
            sys.bypass()
        }
        (Phase::Leaves(_), _) => {
            sys.bypass()?;
            if !serving.is_let_go() {
                return Ok(());
            }
            *group = None;
            Group::discard(&sys.mapper, &sys.group_folder()).map_err(group_error)?;
            serving.left(Instant::now());
            tracing::info!("the cache group was thrown away");
            Ok(())
        }
        (Phase::Serves | Phase::Off(_), _) => Ok(()),
    }
}
