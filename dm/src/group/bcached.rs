//! Kind bcache: one cache set, and for each content a backing device of 16 local sectors, which hold its superblock, and the
//! verity device behind them.
//!
//! A set knows a backing device by its UUID, which follows from the content. Stopped and registered again it finds what was
//! cached; detached, its place in the set's table is marked for ever and no other device is given it, so a content that comes
//! later never meets a removed one's blocks.

use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use treeboot_types::Digest;

use super::Range;
use super::error::{GroupError, io_error};
use super::open::{Group, Health, cache_superblock};
use crate::bcache::{BackingSuperblock, Bcache, DATA_OFFSET, SUPERBLOCK, SUPERBLOCK_BYTES, Uuid};
use crate::table::Multipath;
use crate::{DeviceNumber, DmDevice, Line, Mapper, Mode, Sectors, Status, Table, Target, loops};

/// How a content's superblock file ends; before it stands the digest.
const SUFFIX: &str = ".superblock";

/// bcache has let go of a device after milliseconds, and seconds on a host that is busy.
const LETS_GO_WITHIN: Duration = Duration::from_secs(10);

/// I/O errors of a cache device that has failed: bcache's own default. Until the bases are moved, each is a read that went on
/// to the parents.
const ERRORS: u64 = 8;

/// Makes the set, or takes over the one that runs.
pub(super) fn start(group: &Group, is_new: bool) -> Result<(), GroupError> {
    let bcache = Bcache::new()?;
    if is_new {
        let superblock = cache_superblock(group)?.encode();
        write_superblock(&Mapper::path(&DmDevice::CacheData), &superblock)?;
    }
    let guard = DmDevice::CacheGuard;
    let runs = bcache.has_set(group.life());
    if runs && group.mapper.find(&guard)?.is_none() {
        // Of an agent before there were guards.
        return Err(GroupError::Other {
            folder: group.folder.clone(),
        });
    }
    let data = group.number(&DmDevice::CacheData)?;
    let table = Table::whole(
        group.layout.data.length(),
        Target::Multipath(Multipath::in_turn(&[data])),
    )?;
    group.mapper.ensure(&guard, &table, Mode::ReadWrite)?;
    if !runs {
        bcache.register(group.number(&guard)?, &Mapper::path(&guard))?;
    }
    Ok(())
}

pub(super) fn add(
    group: &Group,
    content: Digest,
    range: Range,
    verity: DeviceNumber,
) -> Result<Table, GroupError> {
    let bcache = Bcache::new()?;
    let file = superblock_file(&group.folder, &content);
    let wanted = BackingSuperblock {
        uuid: Uuid::of_content(&content),
        set: group.life(),
        data_offset: DATA_OFFSET,
    };
    if read_superblock(&file).is_none_or(|found| found != wanted) {
        let bytes = usize::try_from(DATA_OFFSET.bytes()).unwrap_or(0);
        fs::write(&file, vec![0; bytes]).map_err(io_error("write", &file))?;
        write_superblock(&file, &wanted.encode())?;
    }
    let head = loops::attach(&file, Mode::ReadWrite, 0)?;
    let offset = Sectors(0);
    let table = Table::new(vec![
        Line {
            start: offset,
            length: DATA_OFFSET,
            target: Target::Linear {
                device: head.number,
                offset,
            },
        },
        Line {
            start: DATA_OFFSET,
            length: range.length,
            target: Target::Linear {
                device: verity,
                offset,
            },
        },
    ])?;
    let device = DmDevice::Backing(content);
    group.mapper.ensure(&device, &table, Mode::ReadWrite)?;
    let below = group.number(&device)?;
    bcache.register(below, &Mapper::path(&device))?;
    bcache.attach(below, group.life())?;
    bcache.tune(below)?;
    let cached = number(group, &content)?;
    super::served(&group.mapper, content, cached, verity, range.length)
}

/// Out for ever.
pub(super) fn remove(group: &Group, content: &Digest) -> Result<(), GroupError> {
    group.mapper.remove(&DmDevice::Served(*content))?;
    if let Some(below) = group.mapper.number(&DmDevice::Backing(*content))? {
        Bcache::new()?.detach(below)?;
    }
    // Where it is not running, its place in the set stays taken by a UUID that no other content has.
    release(group, content)?;
    forget(&superblock_file(&group.folder, content))
}

/// Out for now.
pub(super) fn release(group: &Group, content: &Digest) -> Result<(), GroupError> {
    stop(&group.mapper, &group.folder, content)
}

/// The bcache device over a content.
pub(super) fn number(group: &Group, content: &Digest) -> Result<DeviceNumber, GroupError> {
    let below = group.number(&DmDevice::Backing(*content))?;
    let backing = Bcache::new()?.backing(below)?;
    backing
        .map(|backing| backing.number)
        .ok_or(GroupError::Absent(*content))
}

pub(super) fn health(group: &Group) -> Result<Health, GroupError> {
    let bcache = Bcache::new()?;
    if !bcache.has_set(group.life()) {
        // Its bases go on, uncached, by themselves.
        return Ok(Health::Failed("bcache has given the cache set up".into()));
    }
    let guard = group.mapper.status(&DmDevice::CacheGuard)?;
    if guard
        .iter()
        .any(|line| matches!(&line.status, Status::Multipath(paths) if paths.paths_up() == 0))
    {
        return Ok(Health::Failed("the cache device had an I/O error".into()));
    }
    match bcache.errors(group.life())? {
        errors if errors >= ERRORS => Ok(Health::Failed(format!(
            "the cache device has had {errors} I/O errors"
        ))),
        _ => Ok(Health::Good),
    }
}

/// Stops all that is left of a group, whose state may be lost.
pub(super) fn discard(mapper: &Mapper, folder: &Path, life: Option<Uuid>) -> Result<(), GroupError> {
    if let (Some(life), Ok(bcache)) = (life, Bcache::new()) {
        // A set that has just given itself up takes no more orders.
        let _ = bcache.let_fail(life);
    }
    for seen in mapper.list()? {
        if let DmDevice::Backing(content) = seen.device {
            stop(mapper, folder, &content)?;
        }
    }
    forget_superblocks(folder);
    let (Some(life), Ok(bcache)) = (life, Bcache::new()) else {
        return Ok(());
    };
    end_set(mapper, &bcache, life)
}

/// Ends the set, until its device can be removed.
pub(super) fn end_set(mapper: &Mapper, bcache: &Bcache, life: Uuid) -> Result<(), GroupError> {
    bcache.end_set(life)?;
    let_go(mapper, &DmDevice::CacheGuard)?;
    mapper.remove(&DmDevice::CacheGuard)?;
    Ok(())
}

/// bcache lets go of a device some time after it is gone from sysfs. One that somebody else holds shows when it is to be
/// removed.
fn let_go(mapper: &Mapper, device: &DmDevice) -> Result<(), GroupError> {
    let began = Instant::now();
    while mapper.find(device)?.is_some_and(|seen| seen.open_count > 0) && began.elapsed() < LETS_GO_WITHIN {
        pause();
    }
    Ok(())
}

#[expect(
    clippy::disallowed_methods,
    reason = "between two looks at a condition with a deadline; bcache tells nobody"
)]
fn pause() {
    std::thread::sleep(Duration::from_millis(10));
}

/// Removes what is left of superblocks of an earlier life.
pub(super) fn forget_superblocks(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().ends_with(SUFFIX) {
            // One that stays is not taken: its set is another.
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn stop(mapper: &Mapper, folder: &Path, content: &Digest) -> Result<(), GroupError> {
    mapper.remove(&DmDevice::Served(*content))?;
    let device = DmDevice::Backing(*content);
    if let Some(below) = mapper.number(&device)? {
        Bcache::new()?.stop(below)?;
        let_go(mapper, &device)?;
        mapper.remove(&device)?;
    }
    for found in loops::find(&superblock_file(folder, content))? {
        loops::detach(&found)?;
    }
    Ok(())
}

fn superblock_file(folder: &Path, content: &Digest) -> PathBuf {
    folder.join(format!("{content}{SUFFIX}"))
}

fn read_superblock(path: &Path) -> Option<BackingSuperblock> {
    let mut bytes = vec![0; SUPERBLOCK_BYTES];
    let mut file = File::open(path).ok()?;
    file.seek(SeekFrom::Start(SUPERBLOCK.bytes())).ok()?;
    file.read_exact(&mut bytes).ok()?;
    BackingSuperblock::decode(&bytes).ok()
}

fn write_superblock(path: &Path, superblock: &[u8]) -> Result<(), GroupError> {
    let put = |device: File| {
        device.write_all_at(superblock, SUPERBLOCK.bytes())?;
        device.sync_all()
    };
    OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(put)
        .map_err(io_error("write a superblock to", path))
}

fn forget(file: &Path) -> Result<(), GroupError> {
    match fs::remove_file(file) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(io_error("remove", file)(error)),
    }
}
