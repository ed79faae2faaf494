//! A directory in memory that dies at a chosen operation, and what is left of it then.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::folder::Folder;
use crate::Extent;
use crate::storage::model::ModelStorage;
use crate::storage::{OpenMode, Storage};

/// Counts the operations of all files and of the directory; from the chosen one on every one fails.
#[derive(Debug)]
pub(super) struct Life {
    done: AtomicU64,
    dies_at: AtomicU64,
}

impl Life {
    fn step(&self) -> io::Result<()> {
        match self.done.fetch_add(1, Ordering::Relaxed) < self.dies_at.load(Ordering::Relaxed) {
            true => Ok(()),
            false => Err(io::Error::other("dead")),
        }
    }
}

#[derive(Debug, Clone)]
struct Entry {
    file: Arc<ModelStorage>,
    /// The directory's own entry is on the disk.
    durable: bool,
}

#[derive(Debug, Default, Clone)]
struct State {
    files: BTreeMap<String, Entry>,
    /// Removed, and back after a power cut that comes before the directory is synced.
    removed: BTreeMap<String, Entry>,
    small: BTreeMap<String, Vec<u8>>,
}

#[derive(Debug)]
pub(super) struct ModelFolder {
    life: Arc<Life>,
    state: Mutex<State>,
}

struct Mortal {
    file: Arc<ModelStorage>,
    life: Arc<Life>,
}

impl ModelFolder {
    /// A directory with the empty files `names`.
    pub(super) fn new(names: &[&str]) -> Self {
        let entry = || Entry {
            file: Arc::new(ModelStorage::new()),
            durable: true,
        };
        let state = State {
            files: names.iter().map(|name| ((*name).to_owned(), entry())).collect(),
            ..State::default()
        };
        Self::of(state)
    }

    fn of(state: State) -> Self {
        Self {
            life: Arc::new(Life {
                done: AtomicU64::new(0),
                dies_at: AtomicU64::new(u64::MAX),
            }),
            state: Mutex::new(state),
        }
    }

    /// After so many operations all fail.
    pub(super) fn die_after(&self, operations: u64) {
        self.life.dies_at.store(operations, Ordering::Relaxed);
    }

    pub(super) fn operations(&self) -> u64 {
        self.life.done.load(Ordering::Relaxed)
    }

    /// Changes bytes of a file behind everybody's back.
    pub(super) fn damage(&self, name: &str, offset: u64, data: &[u8]) {
        self.state.lock().files[name].file.damage(offset, data);
    }

    /// What the next process finds: after a power cut, or after a kill.
    pub(super) fn after(&self, power_cut: bool, keep: &mut dyn FnMut() -> bool) -> Self {
        let state = self.state.lock().clone();
        let mut next = State {
            small: state.small,
            ..State::default()
        };
        let crashed = |file: &ModelStorage, keep: &mut dyn FnMut() -> bool| match power_cut {
            true => file.crash(file.log_len(), keep),
            false => file.killed(file.log_len(), keep),
        };
        for (name, entry) in state.files {
            if entry.durable || !power_cut || keep() {
                let file = Arc::new(crashed(&entry.file, keep));
                let durable = entry.durable || power_cut;
                next.files.insert(name, Entry { file, durable });
            }
        }
        for (name, entry) in state.removed {
            if power_cut && keep() && !next.files.contains_key(&name) {
                let file = Arc::new(crashed(&entry.file, keep));
                next.files.insert(name, Entry { file, durable: true });
            }
        }
        Self::of(next)
    }
}

impl Folder for ModelFolder {
    fn open(&self, name: &str, mode: OpenMode) -> io::Result<Arc<dyn Storage>> {
        self.life.step()?;
        let mut state = self.state.lock();
        let file = match (state.files.get(name), mode) {
            (Some(_), OpenMode::CreateNew) => return Err(io::ErrorKind::AlreadyExists.into()),
            (Some(entry), _) => Arc::clone(&entry.file),
            (None, OpenMode::CreateNew) => {
                let file = Arc::new(ModelStorage::new());
                let entry = Entry {
                    file: Arc::clone(&file),
                    durable: false,
                };
                state.files.insert(name.into(), entry);
                file
            }
            (None, _) => return Err(io::ErrorKind::NotFound.into()),
        };
        Ok(Arc::new(Mortal {
            file,
            life: Arc::clone(&self.life),
        }))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.life.step()?;
        let mut state = self.state.lock();
        if let Some(entry) = state.files.remove(name)
            && entry.durable
        {
            state.removed.insert(name.into(), entry);
        }
        state.small.remove(name);
        Ok(())
    }

    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        self.life.step()?;
        Ok(self.state.lock().small.get(name).cloned())
    }

    fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.life.step()?;
        {
            let mut state = self.state.lock();
            state.small.insert(name.into(), bytes.into());
            state.removed.clear();
            state.files.values_mut().for_each(|entry| entry.durable = true);
        }
        // Done, and nobody hears of it: the other way to die.
        self.life.step()
    }

    fn names(&self) -> io::Result<Vec<String>> {
        self.life.step()?;
        let state = self.state.lock();
        Ok(state.files.keys().chain(state.small.keys()).cloned().collect())
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from("/deltas").join(name)
    }
}

impl Storage for Mortal {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.life.step()?;
        self.file.read_at(offset, buf)
    }
    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<Option<()>> {
        self.life.step()?;
        self.file.try_read_at(offset, buf)
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.life.step()?;
        self.file.write_at(offset, data)
    }
    fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.life.step()?;
        self.file.punch(offset, bytes)
    }
    fn sync(&self) -> io::Result<()> {
        self.life.step()?;
        self.file.sync()
    }
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }
    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.life.step()?;
        self.file.set_len(bytes)
    }
    fn allocated_bytes(&self) -> io::Result<u64> {
        self.file.allocated_bytes()
    }
    fn extent(&self, offset: u64, bytes: u64) -> io::Result<Extent> {
        self.file.extent(offset, bytes)
    }
}
