//! Files as block devices: hash trees, deltas, the cache's files where no device is given; and verity devices behind the page
//! cache, so that reads that meet are joined.
//!
//! A loop device of ours is known by its backing file and by a mark in its status ([`MARK`]); others are left alone. They
//! outlive the agent, so nothing here detaches by itself.

#[allow(
    unsafe_code,
    reason = "the loop driver is spoken to by ioctls that no crate here wraps"
)]
mod sys;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use self::sys::Way;
use crate::{DeviceNumber, Missing, Mode, Sectors};

const CONTROL: &str = "/dev/loop-control";

/// Begins the name in the status of every loop device of ours; then the end of the file's name.
pub const MARK: &str = "treeboot:";

/// The user plane's chunk.
const AHEAD_KIB: u32 = 64;

/// Others may take the free device that the kernel named before we do; then the next one is asked for.
const ATTEMPTS: usize = 64;

/// Somebody who has the device open closes it after milliseconds.
const LETS_GO_WITHIN: Duration = Duration::from_secs(10);

/// A file as a block device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoopDevice {
    /// Its number, for tables.
    pub number: DeviceNumber,
    /// Its node, `/dev/loopN`.
    pub path: PathBuf,
    /// The file beneath, as the kernel names it.
    pub file: PathBuf,
    /// Past the page cache. Where the file system cannot, the kernel quietly goes through it.
    pub direct: bool,
    /// Writes are refused.
    pub read_only: bool,
}

/// Why a loop device could not be made, changed or removed.
#[derive(Debug, thiserror::Error)]
pub enum LoopError {
    /// The host lacks something.
    #[error(transparent)]
    Missing(#[from] Missing),
    /// The file cannot be used.
    #[error("cannot {what} the file {}", file.display())]
    File {
        /// What was to be done.
        what: &'static str,
        /// The file.
        file: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The driver refuses.
    #[error("cannot {what} the loop device {}", path.display())]
    Device {
        /// What was to be done.
        what: &'static str,
        /// The device's node.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Every device that the kernel named as free was taken by somebody else meanwhile.
    #[error("no free loop device for {} after {ATTEMPTS} attempts", file.display())]
    NoneFree {
        /// The file.
        file: PathBuf,
    },
}

/// Makes `file` a block device, from byte `offset` of it to its end. One that is there already with this file, offset and
/// mode is given instead.
///
/// # Errors
/// [`LoopError`].
pub fn attach(file: &Path, mode: Mode, offset: u64) -> Result<LoopDevice, LoopError> {
    make(file, mode, offset, Way::Direct { block_bytes: 0 })
}

/// The same for a file whose reads and writes must be whole blocks of `block_bytes`: they are the device's logical blocks.
///
/// # Errors
/// [`LoopError`].
pub fn attach_in_blocks(file: &Path, mode: Mode, block_bytes: u32) -> Result<LoopDevice, LoopError> {
    make(file, mode, 0, Way::Direct { block_bytes })
}

/// Makes a device that reads `device` through the page cache, in logical blocks of `block_bytes`: of several reads of the same bytes that
/// meet, one goes down and the others wait for it. Read-only. The kernel carries out its reads one after the other, and reads ahead a
/// chunk at most, so that what a cache lacks is not read together with much that it has. One that is there already is given instead.
///
/// # Errors
/// [`LoopError`].
pub fn join_reads(device: &Path, block_bytes: u32) -> Result<LoopDevice, LoopError> {
    let device = canonical(device)?;
    let name = device.file_name().unwrap_or_default();
    let ahead = Path::new("/sys/class/block")
        .join(name)
        .join("queue/read_ahead_kb");
    // Whoever opens the device from now on reads that much ahead.
    fs::write(&ahead, AHEAD_KIB.to_string()).map_err(|source| of_file("write", &ahead, source))?;
    make(&device, Mode::ReadOnly, 0, Way::PageCache { block_bytes })
}

/// Takes away what [`join_reads`] made over `device`. Who still looks at it, as udev does, is waited for; `device` cannot be removed before.
///
/// # Errors
/// [`LoopError`].
pub fn part_reads(device: &Path) -> Result<(), LoopError> {
    let began = Instant::now();
    for found in find(device)? {
        while detach(&found)? && began.elapsed() < LETS_GO_WITHIN {
            pause();
        }
    }
    Ok(())
}

#[expect(
    clippy::disallowed_methods,
    reason = "between two looks at a condition with a deadline; the driver tells nobody"
)]
fn pause() {
    std::thread::sleep(Duration::from_millis(5));
}

fn make(file: &Path, mode: Mode, offset: u64, way: Way) -> Result<LoopDevice, LoopError> {
    let backing = OpenOptions::new()
        .read(true)
        .write(mode == Mode::ReadWrite)
        .open(file)
        .map_err(|source| of_file("open", file, source))?;
    for (found, at) in marked()? {
        if found.file == canonical(file)? && at == offset && found.read_only == (mode == Mode::ReadOnly) {
            return Ok(found);
        }
    }
    let control = control()?;
    for _ in 0..ATTEMPTS {
        let index = sys::get_free(&control).map_err(|source| LoopError::Device {
            what: "get the number of a free one from",
            path: CONTROL.into(),
            source: source.into(),
        })?;
        let path = PathBuf::from(format!("/dev/loop{index}"));
        let device = open(&path)?;
        let settings = sys::Settings {
            offset,
            read_only: mode == Mode::ReadOnly,
            way,
            name: mark(file),
        };
        match sys::configure(&device, &backing, &settings) {
            Ok(()) => {
                return look(index)?
                    .map(|(device, _)| device)
                    .ok_or_else(|| of_device("find", &path, io::ErrorKind::NotFound.into()));
            }
            Err(Errno::BUSY) => {}
            Err(source) => return Err(of_device("set up", &path, source.into())),
        }
    }
    Err(LoopError::NoneFree { file: file.into() })
}

/// The loop devices of ours over `file`; usually one.
///
/// # Errors
/// [`LoopError`].
pub fn find(file: &Path) -> Result<Vec<LoopDevice>, LoopError> {
    let file = match canonical(file) {
        Ok(file) => file,
        // A file that is gone is named by the kernel as it was.
        Err(_) => PathBuf::from(format!("{} (deleted)", file.display())),
    };
    Ok(list()?.into_iter().filter(|found| found.file == file).collect())
}

/// All loop devices of ours, by mark. The caller compares their files with its own directories.
///
/// # Errors
/// [`LoopError`].
pub fn list() -> Result<Vec<LoopDevice>, LoopError> {
    Ok(marked()?.into_iter().map(|(device, _)| device).collect())
}

/// Detaches the loop device, if it still has the file that `device` says; `false` where it has not. Where it is in use, the
/// kernel detaches it as soon as it no longer is.
///
/// # Errors
/// [`LoopError`].
pub fn detach(device: &LoopDevice) -> Result<bool, LoopError> {
    let Some(index) = index_of(&device.path) else {
        return Ok(false);
    };
    match look(index)? {
        Some((found, _)) if found.file == device.file => {}
        _ => return Ok(false),
    }
    let opened = open(&device.path)?;
    match sys::clear(&opened) {
        Ok(()) => Ok(true),
        Err(Errno::NXIO) => Ok(false),
        Err(source) => Err(of_device("detach", &device.path, source.into())),
    }
}

/// Takes the file's present size as the device's. A dm-snapshot over it uses the new room at its next allocation.
///
/// # Errors
/// [`LoopError`].
pub fn set_capacity(device: &LoopDevice) -> Result<(), LoopError> {
    let opened = open(&device.path)?;
    sys::set_capacity(&opened).map_err(|source| of_device("grow", &device.path, source.into()))
}

/// Size of a block device, by its node or number under `/dev`.
///
/// # Errors
/// [`LoopError::File`].
pub fn size(path: &Path) -> Result<Sectors, LoopError> {
    use std::io::{Seek as _, SeekFrom};
    let bytes = File::open(path)
        .and_then(|mut device| device.seek(SeekFrom::End(0)))
        .map_err(|source| of_file("ask for the size of", path, source))?;
    Ok(Sectors(bytes / 512))
}

/// All that carry our mark, each with its offset in bytes.
fn marked() -> Result<Vec<(LoopDevice, u64)>, LoopError> {
    let folder = Path::new("/sys/block");
    let entries = fs::read_dir(folder).map_err(|source| of_file("list", folder, source))?;
    let mut found = Vec::new();
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(index) = name
            .to_str()
            .and_then(|name| index_of(&Path::new("/dev").join(name)))
        else {
            continue;
        };
        // Most are unused, and opening those would make the kernel look for partitions.
        if entry.path().join("loop/backing_file").exists() {
            found.extend(look(index)?);
        }
    }
    Ok(found)
}

/// A loop device of ours, by its index; `None` where it is unused, gone or somebody else's.
fn look(index: u32) -> Result<Option<(LoopDevice, u64)>, LoopError> {
    let path = PathBuf::from(format!("/dev/loop{index}"));
    let opened = match File::open(&path) {
        Ok(opened) => opened,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(of_device("open", &path, source)),
    };
    let status = match sys::status(&opened) {
        Ok(status) => status,
        Err(Errno::NXIO) => return Ok(None),
        Err(source) => return Err(of_device("ask for", &path, source.into())),
    };
    if !status.name.starts_with(MARK.as_bytes()) {
        return Ok(None);
    }
    let folder = PathBuf::from(format!("/sys/block/loop{index}"));
    let read = |name: &str| fs::read_to_string(folder.join(name)).map(|text| text.trim_end().to_owned());
    let (Ok(file), Ok(number)) = (read("loop/backing_file"), read("dev")) else {
        // Detached since.
        return Ok(None);
    };
    let Ok(number) = number.parse() else {
        return Ok(None);
    };
    Ok(Some((
        LoopDevice {
            number,
            path,
            file: file.into(),
            direct: status.direct,
            read_only: status.read_only,
        },
        status.offset,
    )))
}

fn control() -> Result<File, LoopError> {
    File::open(CONTROL).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => Missing::Module { module: "loop" }.into(),
        io::ErrorKind::PermissionDenied => Missing::Root { path: CONTROL.into() }.into(),
        _ => of_device("use", Path::new(CONTROL), source),
    })
}

fn open(path: &Path) -> Result<File, LoopError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(|source| of_device("open", path, source))
}

fn index_of(path: &Path) -> Option<u32> {
    path.file_name()?.to_str()?.strip_prefix("loop")?.parse().ok()
}

fn canonical(file: &Path) -> Result<PathBuf, LoopError> {
    file.canonicalize()
        .map_err(|source| of_file("resolve the name of", file, source))
}

/// The mark and the end of the file's name, which is the part that tells files apart.
fn mark(file: &Path) -> Vec<u8> {
    let name = file.file_name().map(|name| name.to_string_lossy().into_owned());
    let name = name.unwrap_or_default();
    let room = sys::NAME_BYTES - 1 - MARK.len();
    let end = name.as_bytes();
    let end = &end[end.len().saturating_sub(room)..];
    [MARK.as_bytes(), end].concat()
}

fn of_file(what: &'static str, file: &Path, source: io::Error) -> LoopError {
    LoopError::File {
        what,
        file: file.into(),
        source,
    }
}

fn of_device(what: &'static str, path: &Path, source: io::Error) -> LoopError {
    LoopError::Device {
        what,
        path: path.into(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_fits_whatever_the_file_is_called() {
        let mark = mark(Path::new(&format!("/a/{}.delta", "x".repeat(200))));
        assert_eq!(mark.len(), sys::NAME_BYTES - 1);
        assert!(mark.starts_with(b"treeboot:x") && mark.ends_with(b".delta"));
    }

    #[test]
    fn only_a_whole_name_has_an_index() {
        let index = |name: &str| index_of(Path::new(name));
        assert_eq!(index("/dev/loop12"), Some(12));
        assert_eq!(index("/dev/loop12p1"), None);
        assert_eq!(index("/dev/loop-control"), None);
        assert_eq!(index("/dev/sda"), None);
    }
}
