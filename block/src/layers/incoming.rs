//! A disk that comes from elsewhere: each of its layers is written in order, and counts once all of it is there.
//!
//! `VM.TRANSFER.BOOT.incoming` is a disk that is not all there. A killed process leaves it as far as it was written, so the same
//! transfer goes on from its end; after another boot of the machine nobody knows which part of it was written, and it is begun anew.
//! `VM.received` is one that is all there and durable, and that no VM has yet. A disk of one layer is a delta then. One that keeps its
//! layers (a VM that moves) comes as `VM+N.TRANSFER.BOOT.incoming`, and is received by its manifest, `VM+layers.received`, the renaming of
//! which makes it a disk.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use treeboot_types::VmName;

use super::files::{DELTA_SUFFIX, MANIFEST_SUFFIX, layer_name};
use super::folder::{Directory, Folder};
use super::tree::{LayerId, LayerTree};
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
    /// Which of the disk's layers, where it keeps them; not 0.
    pub layer: Option<LayerId>,
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

fn incoming_name(vm: &VmName, layer: Option<LayerId>, transfer: u64, boot: BootId) -> String {
    let layer = layer.map_or_else(String::new, |layer| format!("+{layer}"));
    format!(
        "{vm}{layer}.{transfer:016x}.{}{INCOMING_SUFFIX}",
        boot_digits(boot)
    )
}

/// The VM, whether it is a layer of several, the transfer and the boot of a name.
fn parse(file: &str) -> Option<(VmName, bool, u64, &str)> {
    let mut parts = file.strip_suffix(INCOMING_SUFFIX)?.rsplitn(3, '.');
    let (boot, transfer, vm) = (parts.next()?, parts.next()?, parts.next()?);
    let transfer = u64::from_str_radix(transfer, 16).ok()?;
    let (vm, layered) = vm.split_once('+').map_or((vm, false), |(vm, _)| (vm, true));
    Some((VmName::new(vm).ok()?, layered, transfer, boot))
}

fn received_name(vm: &VmName) -> String {
    format!("{vm}{RECEIVED_SUFFIX}")
}

/// The manifest of a disk that was received with its layers.
fn received_layers_name(vm: &VmName) -> String {
    format!("{vm}+layers{RECEIVED_SUFFIX}")
}

/// For whom a disk is that was received.
fn received_for(file: &str) -> Option<VmName> {
    let name = file.strip_suffix(RECEIVED_SUFFIX)?;
    VmName::new(name.split_once('+').map_or(name, |(vm, _)| vm)).ok()
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
        let file = incoming_name(&arrival.vm, arrival.layer, arrival.transfer, boot);
        let ours = |transfer, of: &str| transfer == arrival.transfer && of == boot_digits(boot);
        for other in folder.names().map_err(io(&folder, ""))? {
            if parse(&other).is_some_and(|(vm, _, transfer, of)| vm == arrival.vm && !ours(transfer, of)) {
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

    /// All of this layer is there: makes it durable, for [`finish_layers`]. Blocks.
    ///
    /// # Errors
    /// The operating system's.
    pub fn settle(&self) -> Result<(), DeltaError> {
        let flushed = self.delta.core().flush_now();
        flushed.map_err(io(&self.folder, &self.file))
    }

    /// All of it is there: makes it durable, for [`adopt`]. Blocks.
    ///
    /// # Errors
    /// The operating system's.
    pub fn finish(&self) -> Result<(), DeltaError> {
        self.settle()?;
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

/// All layers of a disk came: makes them the disk that was received, for [`adopt`]. What is done already stays so. Blocks.
///
/// # Errors
/// A layer is not there, has not all blocks, or the operating system's.
pub fn finish_layers(
    directory: &Path,
    arrival: &Arrival,
    tree: &LayerTree,
    blocks: &BTreeMap<LayerId, (u64, u64)>,
    boot: BootId,
) -> Result<(), DeltaError> {
    let folder = Directory::new(directory);
    let Arrival { vm, transfer, .. } = arrival;
    let manifest = received_layers_name(vm);
    let mut renames = Vec::new();
    for &id in tree.layers().keys() {
        let (from, to) = (incoming_name(vm, Some(id), *transfer, boot), layer_name(vm, id));
        let wrong = |what: String| DeltaError::Damaged {
            path: folder.path(&from),
            what,
        };
        if !folder.path(&from).try_exists().map_err(io(&folder, &from))? {
            // It was renamed by an earlier attempt, which wrote the manifest before.
            let begun = folder.read(&manifest).map_err(io(&folder, &manifest))? == Some(tree.encode());
            match begun && folder.path(&to).try_exists().map_err(io(&folder, &to))? {
                true => continue,
                false => return Err(wrong(format!("layer {id} of it did not come"))),
            }
        }
        let layer = Arrival {
            layer: Some(id),
            data_bytes: 0,
            ..arrival.clone()
        };
        let came = Incoming::begin(directory, &layer, boot)?.blocks();
        let sent = blocks.get(&id).copied().unwrap_or_default();
        if came != sent {
            let what = format!("layer {id} of it has {came:?} blocks of data and zeroes, not {sent:?}");
            return Err(wrong(what));
        }
        renames.push((from, to));
    }
    // From here on it is found by its manifest, whatever is renamed already.
    let saved = folder.replace(&manifest, &tree.encode());
    saved.map_err(io(&folder, &manifest))?;
    renames
        .iter()
        .try_for_each(|(from, to)| rename(&folder, from, to))
}

/// Gives a VM the disk that was received for it. Whether there was one. Blocks.
///
/// # Errors
/// The operating system's.
pub fn adopt(directory: &Path, vm: &VmName) -> Result<bool, DeltaError> {
    let folder = Directory::new(directory);
    for (from, suffix) in [
        (received_name(vm), DELTA_SUFFIX),
        (received_layers_name(vm), MANIFEST_SUFFIX),
    ] {
        if folder.path(&from).try_exists().map_err(io(&folder, &from))? {
            return rename(&folder, &from, &format!("{vm}{suffix}")).map(|()| true);
        }
    }
    Ok(false)
}

/// A disk that was received and that no VM is to have goes. Blocks.
///
/// # Errors
/// The operating system's.
pub fn discard_received(directory: &Path, vm: &VmName) -> Result<(), DeltaError> {
    let folder = Directory::new(directory);
    let manifest = received_layers_name(vm);
    let layers = folder.read(&manifest).map_err(io(&folder, &manifest))?;
    // A manifest is there whole or not at all.
    let tree = layers.and_then(|text| LayerTree::decode(&text).ok());
    let layers = tree.iter().flat_map(|tree| tree.layers().keys());
    let files = layers.map(|id| layer_name(vm, *id));
    for file in files.chain([manifest, received_name(vm)]) {
        folder.remove(&file).map_err(io(&folder, &file))?;
    }
    Ok(())
}

/// A transfer that was broken off and is not gone on with goes, with all layers of it that came. Blocks.
///
/// # Errors
/// The operating system's.
pub fn discard_incoming(directory: &Path, vm: &VmName, transfer: u64) -> Result<(), DeltaError> {
    let folder = Directory::new(directory);
    for file in folder.names().map_err(io(&folder, ""))? {
        if parse(&file).is_some_and(|(of, _, number, _)| of == *vm && number == transfer) {
            folder.remove(&file).map_err(io(&folder, &file))?;
        }
    }
    Ok(())
}

/// What a start finds of disks that came.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Arrivals {
    /// Transfers that may be gone on with, and their VMs.
    pub resumable: BTreeSet<(VmName, u64)>,
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
    let arrival = |file: &String| match received_for(file) {
        Some(vm) => Some((vm, None)),
        None => parse(file).map(|(vm, _, transfer, _)| (vm, Some(transfer))),
    };
    let arrivals: BTreeSet<_> = names.iter().filter_map(arrival).collect();
    Ok(arrivals.into_iter().collect())
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
        if let Some((vm, _, transfer, of)) = parse(&file) {
            if of == boot_digits(boot) {
                found.resumable.insert((vm, transfer));
                continue;
            }
            folder.remove(&file).map_err(io(&folder, &file))?;
        } else {
            match received_for(&file) {
                Some(vm) if !owned(&vm) => discard_received(directory, &vm)?,
                _ => continue,
            }
        }
        found.swept.push(folder.path(&file));
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
            layer: None,
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
        assert_eq!((found.resumable, found.swept.len()), ([(a.clone(), 1)].into(), 2));
        discard_incoming(path, &a, 1).unwrap();
        assert_eq!(names(path), ["d.delta"]);
    }

    #[test]
    fn a_disk_with_its_layers_is_one_by_its_manifest_and_goes_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        let mut tree = LayerTree::default();
        tree.hold_all(9).unwrap();
        let tree = tree.shipped();
        assert_eq!((tree.live(), tree.held()), (2, false));
        tree.audit().unwrap();
        let layer = |id| Arrival {
            layer: Some(id),
            ..arrival("a", 1)
        };
        let blocks = BTreeMap::from([(1, (1, 0)), (2, (0, 2))]);
        let finish = || finish_layers(path, &arrival("a", 1), &tree, &blocks, BOOT);
        let first = Incoming::begin(path, &layer(1), BOOT).unwrap();
        first.write(8192, 4096, Some(&[5; 4096])).unwrap();
        first.settle().unwrap();
        finish().unwrap_err();
        let second = Incoming::begin(path, &layer(2), BOOT).unwrap();
        drop(first);
        finish().unwrap_err();
        second.write(0, 8192, None).unwrap();
        second.settle().unwrap();
        drop(second);
        for owned in [true, false] {
            finish().unwrap();
            finish().unwrap();
            assert_eq!(names(path), ["a+1.layer", "a+2.layer", "a+layers.received"]);
            sweep_arrivals(path, BOOT, |_| owned).unwrap();
            assert_eq!(names(path).len(), if owned { 3 } else { 0 });
            if owned {
                assert!(adopt(path, &VmName::new("a").unwrap()).unwrap());
                assert_eq!(names(path), ["a+1.layer", "a+2.layer", "a.layers"]);
                let a = VmName::new("a").unwrap();
                let reports = super::super::check(path, &a, BOOT).unwrap();
                assert!(
                    reports.iter().all(|report| report.check.damage.is_empty()),
                    "{reports:?}"
                );
                super::super::delete(&Directory::new(path), &a).unwrap();
                for (id, blocks) in &blocks {
                    let again = Incoming::begin(path, &layer(*id), BOOT).unwrap();
                    let data = [5; 4096];
                    let data = (blocks.0 > 0).then_some(&data[..]);
                    again.write(0, (blocks.0 + blocks.1) * BLOCK, data).unwrap();
                }
            }
        }
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
