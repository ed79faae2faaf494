//! A disk that comes from elsewhere: its one layer is written in order, and counts once all of it is there.
//!
//! `VM.TRANSFER.BOOT.incoming` is a disk that is not all there. A killed process leaves it as far as it was written, so the same
//! transfer goes on from its end; after another boot of the machine nobody knows which part of it was written, and it is begun anew.
//! `VM.received` is one that is all there and durable, and that no VM has yet.

use std::path::{Path, PathBuf};

use treeboot_types::VmName;

use super::files::DELTA_SUFFIX;
use super::folder::{Directory, Folder};
use crate::delta::{BLOCK, BootId, Delta, DeltaError, DeltaMeta, State};
use crate::storage::OpenMode;

/// What the name of a disk that is not all there ends in.
const INCOMING_SUFFIX: &str = ".incoming";
/// What the name of one ends in that is, and that no VM has yet.
const RECEIVED_SUFFIX: &str = ".received";

/// Which disk comes in, and for whom.
#[derive(Debug, Clone)]
pub struct Arrival {
    /// The VM that is to have it.
    pub vm: VmName,
    /// The transfer, a random number.
    pub transfer: u64,
    /// Its base.
    pub meta: DeltaMeta,
    /// Bytes of data that are to come.
    pub data_bytes: u64,
}

/// A disk that is being received.
pub struct Incoming {
    folder: Directory,
    vm: VmName,
    file: String,
    delta: Delta,
}

fn boot_digits(boot: BootId) -> String {
    boot.0.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn incoming_name(vm: &VmName, transfer: u64, boot: BootId) -> String {
    format!("{vm}.{transfer:016x}.{}{INCOMING_SUFFIX}", boot_digits(boot))
}

/// The VM, the transfer and the boot of a name.
fn parse(file: &str) -> Option<(VmName, u64, &str)> {
    let mut parts = file.strip_suffix(INCOMING_SUFFIX)?.rsplitn(3, '.');
    let (boot, transfer, vm) = (parts.next()?, parts.next()?, parts.next()?);
    let transfer = u64::from_str_radix(transfer, 16).ok()?;
    Some((VmName::new(vm).ok()?, transfer, boot))
}

fn received_name(vm: &VmName) -> String {
    format!("{vm}{RECEIVED_SUFFIX}")
}

fn io(folder: &Directory, file: &str) -> impl FnOnce(std::io::Error) -> DeltaError {
    let path = folder.path(file);
    move |source| DeltaError::Io { path, source }
}

impl Incoming {
    /// Begins a transfer, or goes on with it where it was broken off in this boot. What came for the same VM by another transfer goes.
    /// Blocks.
    ///
    /// # Errors
    /// There is no room for it, or the operating system's.
    pub fn begin(directory: &Path, arrival: &Arrival, boot: BootId) -> Result<Self, DeltaError> {
        let folder = Directory::new(directory);
        let file = incoming_name(&arrival.vm, arrival.transfer, boot);
        for other in folder.names().map_err(io(&folder, ""))? {
            if other != file && parse(&other).is_some_and(|(vm, _, _)| vm == arrival.vm) {
                folder.remove(&other).map_err(io(&folder, &other))?;
            }
        }
        let path = folder.path(&file);
        let opened = match folder.open(&file, OpenMode::ReadWrite) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                folder.open(&file, OpenMode::CreateNew)
            }
            opened => opened,
        };
        let storage = opened.map_err(|source| DeltaError::of_opening(&path, source))?;
        let delta = Delta::open_in(storage, &path, folder.directory(), arrival.meta, boot)?;
        let incoming = Self {
            folder,
            vm: arrival.vm.clone(),
            file,
            delta,
        };
        incoming.check_room(arrival.data_bytes)?;
        Ok(incoming)
    }

    fn check_room(&self, data_bytes: u64) -> Result<(), DeltaError> {
        let fail = |source| DeltaError::Io {
            path: self.folder.path(&self.file),
            source,
        };
        let there = self.delta.allocated_bytes().map_err(fail)?;
        let room = rustix::fs::statvfs(self.folder.path("")).map_err(|error| fail(error.into()))?;
        match room.f_bavail.saturating_mul(room.f_frsize) >= data_bytes.saturating_sub(there) {
            true => Ok(()),
            false => Err(fail(std::io::ErrorKind::StorageFull.into())),
        }
    }

    /// Where the transfer is to go on, in bytes of the disk: all that comes before is there.
    pub fn resume_at(&self) -> u64 {
        let last = self.delta.core().runs(u64::MAX).last();
        last.map_or(0, |(first, _, count)| (first + count) * BLOCK)
    }

    /// Blocks of data and of zeroes that are there.
    pub fn blocks(&self) -> (u64, u64) {
        let mut blocks = (0, 0);
        for (_, state, count) in self.delta.core().runs(u64::MAX) {
            match state {
                State::Data => blocks.0 += count,
                State::Zero => blocks.1 += count,
                State::Base => {}
            }
        }
        blocks
    }

    /// Writes blocks from `offset` on: `data`, or where there is none `bytes` of zeroes. Both are whole blocks of 4096. Blocks.
    ///
    /// # Errors
    /// It is not within the disk, or the operating system's.
    pub fn write(&self, offset: u64, bytes: u64, data: Option<&[u8]>) -> Result<(), DeltaError> {
        let core = self.delta.core();
        let end = offset.checked_add(bytes);
        let whole = offset.is_multiple_of(BLOCK) && bytes.is_multiple_of(BLOCK) && bytes > 0;
        let fits = end.is_some_and(|end| end <= core.disk_bytes().next_multiple_of(BLOCK));
        let full = data.is_none_or(|data| data.len() as u64 == bytes);
        if !whole || !fits || !full {
            return Err(DeltaError::Damaged {
                path: self.folder.path(&self.file),
                what: format!("{bytes} bytes at {offset} came for it, which are no blocks of this disk"),
            });
        }
        core.put(offset / BLOCK, bytes / BLOCK, data)
            .map_err(io(&self.folder, &self.file))
    }

    /// All of it is there: makes it durable, for [`adopt`]. Blocks.
    ///
    /// # Errors
    /// The operating system's.
    pub fn finish(&self) -> Result<(), DeltaError> {
        let flushed = self.delta.core().flush_now();
        flushed.map_err(io(&self.folder, &self.file))?;
        rename(&self.folder, &self.file, &received_name(&self.vm))
    }

    /// It is not wanted any more. Blocks.
    ///
    /// # Errors
    /// The operating system's.
    pub fn discard(&self) -> Result<(), DeltaError> {
        self.folder
            .remove(&self.file)
            .map_err(io(&self.folder, &self.file))
    }
}

fn rename(folder: &Directory, from: &str, to: &str) -> Result<(), DeltaError> {
    let renamed = std::fs::rename(folder.path(from), folder.path(to))
        .and_then(|()| std::fs::File::open(folder.path("")))
        .and_then(|directory| directory.sync_all());
    renamed.map_err(io(folder, to))
}

/// Gives a VM the disk that was received for it. Whether there was one. Blocks.
///
/// # Errors
/// The operating system's.
pub fn adopt(directory: &Path, vm: &VmName) -> Result<bool, DeltaError> {
    let folder = Directory::new(directory);
    let from = received_name(vm);
    match folder.path(&from).try_exists().map_err(io(&folder, &from))? {
        true => rename(&folder, &from, &format!("{vm}{DELTA_SUFFIX}")).map(|()| true),
        false => Ok(false),
    }
}

/// A disk that was received and that no VM is to have goes. Blocks.
///
/// # Errors
/// The operating system's.
pub fn discard_received(directory: &Path, vm: &VmName) -> Result<(), DeltaError> {
    let folder = Directory::new(directory);
    let file = received_name(vm);
    folder.remove(&file).map_err(io(&folder, &file))
}

/// A transfer that was broken off and is not gone on with goes. Blocks.
///
/// # Errors
/// The operating system's.
pub fn discard_incoming(
    directory: &Path,
    vm: &VmName,
    transfer: u64,
    boot: BootId,
) -> Result<(), DeltaError> {
    let folder = Directory::new(directory);
    let file = incoming_name(vm, transfer, boot);
    folder.remove(&file).map_err(io(&folder, &file))
}

/// What a start finds of disks that came.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Arrivals {
    /// Transfers that may be gone on with, and their VMs.
    pub resumable: Vec<(VmName, u64)>,
    /// Files that were removed.
    pub swept: Vec<PathBuf>,
}

/// Disks that came and that no VM has yet, each with its transfer where not all of it is there. Blocks.
///
/// # Errors
/// The operating system's.
pub fn arrivals(directory: &Path) -> Result<Vec<(VmName, Option<u64>)>, DeltaError> {
    let folder = Directory::new(directory);
    let names = folder.names().map_err(io(&folder, ""))?;
    let arrival = |file: &String| match file.strip_suffix(RECEIVED_SUFFIX) {
        Some(vm) => Some((VmName::new(vm).ok()?, None)),
        None => parse(file).map(|(vm, transfer, _)| (vm, Some(transfer))),
    };
    Ok(names.iter().filter_map(arrival).collect())
}

/// Looks at disks that came: removes those that were received for a VM that is not `owned`, and those that came in
/// another boot. Blocks.
///
/// # Errors
/// The operating system's.
pub fn sweep_arrivals(
    directory: &Path,
    boot: BootId,
    owned: impl Fn(&VmName) -> bool,
) -> Result<Arrivals, DeltaError> {
    let folder = Directory::new(directory);
    let mut found = Arrivals::default();
    for file in folder.names().map_err(io(&folder, ""))? {
        let spare = if let Some((vm, transfer, of)) = parse(&file) {
            let same_boot = of == boot_digits(boot);
            if same_boot {
                found.resumable.push((vm, transfer));
            }
            !same_boot
        } else if let Some(vm) = file.strip_suffix(RECEIVED_SUFFIX) {
            VmName::new(vm).is_ok_and(|vm| !owned(&vm))
        } else {
            false
        };
        if spare {
            folder.remove(&file).map_err(io(&folder, &file))?;
            found.swept.push(folder.path(&file));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use treeboot_types::Digest;

    const META: DeltaMeta = DeltaMeta {
        digest: Digest([7; 32]),
        bytes: 1 << 20,
    };
    const BOOT: BootId = BootId([1; 16]);

    fn arrival(vm: &str, transfer: u64) -> Arrival {
        Arrival {
            vm: VmName::new(vm).unwrap(),
            transfer,
            meta: META,
            data_bytes: 1 << 20,
        }
    }

    fn names(directory: &Path) -> Vec<String> {
        let mut names = Directory::new(directory).names().unwrap();
        names.sort();
        names
    }

    #[test]
    fn a_transfer_that_broke_off_goes_on_in_the_same_boot_and_is_begun_anew_in_another() {
        let dir = tempfile::tempdir().unwrap();
        let (path, a) = (dir.path(), arrival("a", 1));
        let incoming = Incoming::begin(path, &a, BOOT).unwrap();
        assert_eq!(incoming.resume_at(), 0);
        incoming.write(8192, 4096, Some(&[5; 4096])).unwrap();
        incoming.write(16384, 8192, None).unwrap();
        // While it comes in nobody else takes its place.
        Incoming::begin(path, &a, BOOT).err().unwrap();
        drop(incoming);
        let incoming = Incoming::begin(path, &a, BOOT).unwrap();
        assert_eq!((incoming.resume_at(), incoming.blocks()), (24576, (1, 2)));
        drop(incoming);
        let incoming = Incoming::begin(path, &a, BootId([2; 16])).unwrap();
        assert_eq!(incoming.resume_at(), 0);
        drop(incoming);
        // Another transfer for the same VM, and one for a VM whose name begins alike.
        let other = Incoming::begin(path, &arrival("a", 2), BOOT).unwrap();
        let alike = Incoming::begin(path, &arrival("a.b", 3), BOOT).unwrap();
        assert_eq!(names(path).len(), 2);
        for bad in [
            (1, 4096, None),
            (1 << 20, 4096, None),
            (4096, u64::MAX - 4095, None),
            (0, u64::MAX, None),
            (0, 8192, Some(&[0; 4096][..])),
        ] {
            other.write(bad.0, bad.1, bad.2).unwrap_err();
        }
        alike.discard().unwrap();
        assert_eq!(arrivals(path).unwrap(), [(other.vm.clone(), Some(2))]);
        other.finish().unwrap();
        assert_eq!(arrivals(path).unwrap(), [(other.vm.clone(), None)]);
        drop((other, alike));
        assert_eq!(names(path), ["a.received"]);
        let a = VmName::new("a").unwrap();
        assert_eq!(
            sweep_arrivals(path, BOOT, |vm| *vm == a).unwrap(),
            Arrivals::default()
        );
        assert!(adopt(path, &a).unwrap() && !adopt(path, &a).unwrap());
        assert_eq!(names(path), ["a.delta"]);
        Delta::open(&path.join("a.delta"), META, BOOT).unwrap();
    }

    #[test]
    fn a_start_keeps_what_may_be_gone_on_with_and_removes_the_rest() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        drop(Incoming::begin(path, &arrival("a", 1), BOOT).unwrap());
        drop(Incoming::begin(path, &arrival("b", 2), BootId([9; 16])).unwrap());
        Incoming::begin(path, &arrival("c", 3), BOOT)
            .unwrap()
            .finish()
            .unwrap();
        std::fs::write(path.join("d.delta"), []).unwrap();
        let found = sweep_arrivals(path, BOOT, |_| false).unwrap();
        let a = VmName::new("a").unwrap();
        assert_eq!((found.resumable, found.swept.len()), (vec![(a.clone(), 1)], 2));
        discard_incoming(path, &a, 1, BOOT).unwrap();
        assert_eq!(names(path), ["d.delta"]);
    }

    #[test]
    fn what_has_no_room_is_refused_before_it_comes() {
        let dir = tempfile::tempdir().unwrap();
        let large = Arrival {
            data_bytes: u64::MAX,
            ..arrival("a", 1)
        };
        let error = Incoming::begin(dir.path(), &large, BOOT).err().unwrap();
        assert!(
            matches!(&error, DeltaError::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull)
        );
    }
}
