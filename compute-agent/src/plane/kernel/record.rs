//! What the plane must know of its own work after the agent's death and cannot read from the kernel: files beside the journal.
//!
//! A record is written before what it speaks of is made and removed after it is gone, so that nothing of ours is ever on the host
//! without one. It is renamed into place and not synced: a power cut that loses it also loses the devices it speaks of.

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use treeboot_types::{Digest, Iqn, VmName};

use crate::stack::{Backing, Content, Sources, WantedDisk};

/// How a content's record ends.
const RECORD: &str = ".json";
/// How the file of a delta's blocks ends.
const BLOCKS: &str = ".cow";

/// A session with a parent: one for each target and portal.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct SessionKey {
    /// The target.
    pub(super) target: Iqn,
    /// Where it listens.
    pub(super) portal: SocketAddr,
}

/// An open base.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BaseRecord {
    /// What it is.
    pub(super) content: Content,
    /// Where it keeps its bytes.
    pub(super) backing: Backing,
}

/// All that is remembered of one content.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Record {
    /// Its paths, where they are set.
    pub(super) sources: Option<Sources>,
    /// Its base, where it is open or half open.
    pub(super) base: Option<BaseRecord>,
    /// Sessions that may stand.
    pub(super) sessions: BTreeSet<SessionKey>,
}

impl Record {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// The directory of the contents' records.
#[derive(Debug, Clone)]
pub(super) struct Records {
    dir: PathBuf,
    /// Held while a record is read, changed and written.
    change: Arc<Mutex<()>>,
}

impl Records {
    pub(super) fn open(dir: PathBuf) -> io::Result<Self> {
        std::fs::create_dir_all(&dir)?;
        Ok(Self {
            dir,
            change: Arc::default(),
        })
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        self.dir.join(format!("{digest}{RECORD}"))
    }

    /// What is remembered of a content; nothing where the file is missing or damaged.
    pub(super) fn load(&self, digest: &Digest) -> io::Result<Record> {
        read(&self.path(digest)).map(Option::unwrap_or_default)
    }

    /// Changes what is remembered; nothing is written where nothing changes.
    pub(super) fn update<T>(&self, digest: &Digest, change: impl FnOnce(&mut Record) -> T) -> io::Result<T> {
        let _one = self.change.lock();
        let before = self.load(digest)?;
        let mut after = before.clone();
        let result = change(&mut after);
        if after != before {
            self.save(digest, &after)?;
        }
        Ok(result)
    }

    /// Remembers it; a record of nothing is removed.
    fn save(&self, digest: &Digest, record: &Record) -> io::Result<()> {
        let path = self.path(digest);
        if record.is_empty() {
            return gone(std::fs::remove_file(path));
        }
        write(&path, record)
    }

    /// Contents that have a record.
    pub(super) fn digests(&self) -> io::Result<BTreeSet<Digest>> {
        let names = names(&self.dir)?;
        let digest = |name: &String| name.strip_suffix(RECORD)?.parse().ok();
        Ok(names.iter().filter_map(digest).collect())
    }
}

/// The directory of the VMs' deltas: for each a file of blocks, and one that says what they stand on. The delta is there as soon
/// as the second is.
#[derive(Debug, Clone)]
pub(super) struct Deltas {
    dir: PathBuf,
}

/// What a look at a delta's files shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum DeltaFiles {
    /// Both, and whole.
    Whole(WantedDisk),
    /// Blocks alone: made or removed by half.
    BlocksAlone,
    /// Not readable.
    Damaged(String),
}

impl Deltas {
    pub(super) fn open(dir: PathBuf) -> io::Result<Self> {
        std::fs::create_dir_all(&dir)?;
        Ok(Self { dir })
    }

    /// The file of blocks.
    pub(super) fn blocks(&self, vm: &VmName) -> PathBuf {
        self.dir.join(format!("{vm}{BLOCKS}"))
    }

    fn head(&self, vm: &VmName) -> PathBuf {
        self.dir.join(format!("{vm}{RECORD}"))
    }

    /// Makes an empty delta whose file of blocks has `bytes`; one that is there stays.
    pub(super) fn create(&self, vm: &VmName, disk: WantedDisk, bytes: u64) -> io::Result<()> {
        if self.head(vm).try_exists()? {
            return Ok(());
        }
        // Blocks that are there without a head are nobody's: they are emptied.
        let blocks = std::fs::File::create(self.blocks(vm))?;
        blocks.set_len(bytes)?;
        blocks.sync_all()?;
        let head = self.head(vm);
        write(&head, &disk)?;
        std::fs::File::open(&head)?.sync_all()?;
        std::fs::File::open(&self.dir)?.sync_all()
    }

    /// Removes a delta; the head goes first.
    pub(super) fn remove(&self, vm: &VmName) -> io::Result<()> {
        gone(std::fs::remove_file(self.head(vm)))?;
        gone(std::fs::remove_file(self.blocks(vm)))
    }

    /// What is there of a VM's delta.
    pub(super) fn look(&self, vm: &VmName) -> io::Result<Option<DeltaFiles>> {
        let blocks = self.blocks(vm).try_exists()?;
        if !self.head(vm).try_exists()? {
            return Ok(blocks.then_some(DeltaFiles::BlocksAlone));
        }
        Ok(Some(match read::<WantedDisk>(&self.head(vm))? {
            Some(_) if !blocks => DeltaFiles::Damaged(format!("{} is missing", self.blocks(vm).display())),
            Some(disk) => DeltaFiles::Whole(disk),
            None => DeltaFiles::Damaged(format!("{} cannot be read", self.head(vm).display())),
        }))
    }

    /// VMs of which there is anything.
    pub(super) fn vms(&self) -> io::Result<BTreeSet<VmName>> {
        let vm = |name: &String| {
            let stem = name.strip_suffix(RECORD).or_else(|| name.strip_suffix(BLOCKS))?;
            VmName::new(stem).ok()
        };
        Ok(names(&self.dir)?.iter().filter_map(vm).collect())
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    match serde_json::from_slice(&text) {
        Ok(value) => Ok(Some(value)),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "a record that cannot be read; it counts as none");
            Ok(None)
        }
    }
}

fn write(path: &Path, value: &impl Serialize) -> io::Result<()> {
    let text = serde_json::to_vec(value).map_err(io::Error::other)?;
    // Not `with_extension`: a VM's name may hold dots.
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    std::fs::write(&new, text)?;
    std::fs::rename(&new, path)
}

/// What is not there is gone, as was wanted.
pub(super) fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Names in a directory; none where it is not there.
pub(super) fn names(dir: &Path) -> io::Result<Vec<String>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    names.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(name: &str) -> VmName {
        VmName::new(name).unwrap()
    }

    #[test]
    fn a_record_of_nothing_is_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path().join("records")).unwrap();
        let digest = Digest([7; 32]);
        let record = Record {
            sources: Some(Sources::default()),
            ..Record::default()
        };
        records.save(&digest, &record).unwrap();
        assert_eq!(records.load(&digest).unwrap(), record);
        assert_eq!(records.digests().unwrap(), [digest].into());
        for _ in 0..2 {
            records.save(&digest, &Record::default()).unwrap();
            assert_eq!(records.digests().unwrap(), BTreeSet::new());
        }
    }

    #[test]
    fn a_delta_is_there_when_its_head_is() {
        let dir = tempfile::tempdir().unwrap();
        let deltas = Deltas::open(dir.path().into()).unwrap();
        let disk = WantedDisk {
            digest: Digest([1; 32]),
            bytes: 4096,
        };
        let name = vm("web.1");
        assert_eq!(deltas.look(&name).unwrap(), None);
        deltas.create(&name, disk, 1 << 20).unwrap();
        std::fs::write(deltas.blocks(&name), b"written").unwrap();
        deltas.create(&name, disk, 1 << 20).unwrap();
        assert_eq!(
            std::fs::read(deltas.blocks(&name)).unwrap(),
            b"written",
            "a delta that is there stays"
        );
        assert_eq!(deltas.look(&name).unwrap(), Some(DeltaFiles::Whole(disk)));
        assert_eq!(deltas.vms().unwrap(), [name.clone()].into());
        std::fs::remove_file(deltas.head(&name)).unwrap();
        assert_eq!(deltas.look(&name).unwrap(), Some(DeltaFiles::BlocksAlone));
        deltas.create(&name, disk, 4096).unwrap();
        assert_eq!(std::fs::read(deltas.blocks(&name)).unwrap(), [0; 4096]);
        deltas.remove(&name).unwrap();
        deltas.remove(&name).unwrap();
        assert_eq!(deltas.vms().unwrap(), BTreeSet::new());
    }
}
