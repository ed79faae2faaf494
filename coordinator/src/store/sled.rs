//! The record in sled: one tree of keys, one atomic batch a decision, flushed before anybody hears of it.
//!
//! sled refuses everything after one failed write, so a record that could not be written is closed, and opened again for the next
//! batch. And sled takes a damaged tail of its log for a write that a crash cut short and leaves it out, so each batch also says how
//! many entries there are now and what they come to.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::fs::{FlockOperation, flock};

use crate::tree::{Change, Key, Record};

use super::codec::{self, Sum};
use super::{Store, StoreError};

type Cause = Box<dyn std::error::Error + Send + Sync>;

/// A record in a directory.
#[derive(Debug)]
pub struct SledStore {
    /// None after a write that failed.
    open: Mutex<Option<Opened>>,
    dir: PathBuf,
}

#[derive(Debug)]
struct Opened {
    db: sled::Db,
    /// Of what is in the record.
    sum: Sum,
}

/// Pages kept in memory. The record of 10,000 hosts is a few megabytes; sled's own default is a gigabyte.
const PAGES_BYTES: u64 = 16 << 20;
/// Where the record is, below the state directory.
const RECORD: &str = "record";
/// The key of [`Sum`].
const SUM: &str = "sum";

/// Where a record is closed, sled's own threads may hold its lock for a moment more; another coordinator holds it for good.
const LOCK_LIMIT: Duration = Duration::from_secs(2);
const LOCK_AGAIN: Duration = Duration::from_millis(20);

impl SledStore {
    /// Opens or makes the record in `dir`.
    ///
    /// # Errors
    /// [`StoreError::Locked`] where another process has it, [`StoreError::Newer`], [`StoreError::Damaged`] and [`StoreError::Lost`]
    /// where it cannot be relied on, otherwise [`StoreError::Open`].
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let opened = once_unlocked(|| Opened::new(dir))?;
        Ok(Self {
            open: Mutex::new(Some(opened)),
            dir: dir.into(),
        })
    }

    /// Puts the record of `dir` aside, whatever is in it, so that the next [`SledStore::open`] begins with an empty one. Gives the
    /// directory in which it is now; none where there was no record.
    ///
    /// # Errors
    /// [`StoreError::Locked`] where another process has it, [`StoreError::Open`] where it cannot be renamed.
    pub fn set_aside(dir: &Path) -> Result<Option<PathBuf>, StoreError> {
        let record = dir.join(RECORD);
        if !record.exists() {
            return Ok(None);
        }
        once_unlocked(|| {
            // The lock that sled holds; where the file is not there, or is none, nobody has the record open.
            match std::fs::File::open(record.join("db")) {
                Ok(file) if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() => {
                    Err(StoreError::Locked {
                        dir: dir.display().to_string(),
                    })
                }
                _ => Ok(()),
            }
        })?;
        let free = (1..).map(|number| dir.join(format!("{RECORD}.old-{number}")));
        let aside = free.into_iter().find(|path| !path.exists());
        let aside = aside.unwrap_or_else(|| dir.join("record.old"));
        std::fs::rename(&record, &aside).map_err(|error| cannot_open(dir, error))?;
        Ok(Some(aside))
    }
}

/// Tries again where somebody has the record, for [`LOCK_LIMIT`].
fn once_unlocked<T>(attempt: impl Fn() -> Result<T, StoreError>) -> Result<T, StoreError> {
    let until = Instant::now() + LOCK_LIMIT;
    loop {
        match attempt() {
            Err(StoreError::Locked { .. }) if Instant::now() < until => pause(),
            done => return done,
        }
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "nothing tells when a lock of another is released; the loop has a deadline"
)]
fn pause() {
    std::thread::sleep(LOCK_AGAIN);
}

fn cannot_open(dir: &Path, source: impl Into<Cause>) -> StoreError {
    StoreError::Open {
        dir: dir.display().to_string(),
        source: source.into(),
    }
}

/// sled panics at some kinds of damage; a record that cannot be read must not look like a fault of ours.
fn without_panic<T>(dir: &Path, work: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
        Err(StoreError::Unreadable {
            dir: dir.join(RECORD).display().to_string(),
            source: text.unwrap_or_else(|| "sled gave up".into()).into(),
        })
    })
}

impl Opened {
    fn new(dir: &Path) -> Result<Self, StoreError> {
        std::fs::create_dir_all(dir).map_err(|error| cannot_open(dir, error))?;
        let config = sled::Config::new()
            .path(dir.join(RECORD))
            .cache_capacity(PAGES_BYTES)
            // Every batch is flushed before it is answered, so a timer has nothing to do.
            .flush_every_ms(None);
        without_panic(dir, || {
            let db = config.open().map_err(|error| match error {
                // sled has no variant of its own for this.
                error if error.to_string().contains("could not acquire lock") => StoreError::Locked {
                    dir: dir.display().to_string(),
                },
                sled::Error::Io(error) => cannot_open(dir, error),
                error => StoreError::Unreadable {
                    dir: dir.join(RECORD).display().to_string(),
                    source: error.into(),
                },
            })?;
            let sum = check(dir, &db)?;
            Ok(Self { db, sum })
        })
    }

    fn apply(&mut self, changes: &[Change]) -> Result<(), Cause> {
        let mut batch = sled::Batch::default();
        let mut sum = self.sum;
        // What earlier changes of this batch made of a key.
        let mut made: HashMap<String, Option<Vec<u8>>> = HashMap::new();
        for change in changes {
            let (key, value) = match change {
                Change::Put(key, record) => (codec::key(key), Some(codec::value(record)?)),
                Change::Delete(key) => (codec::key(key), None),
            };
            match made.get(&key) {
                Some(earlier) => sum.without(&key, earlier.as_deref()),
                None => sum.without(&key, self.db.get(&key)?.as_deref()),
            }
            sum.with(&key, value.as_deref());
            match &value {
                Some(value) => batch.insert(key.as_bytes(), value.as_slice()),
                None => batch.remove(key.as_bytes()),
            }
            made.insert(key, value);
        }
        batch.insert(SUM, sum.value()?);
        self.db.apply_batch(batch)?;
        self.db.flush()?;
        self.sum = sum;
        Ok(())
    }
}

/// What the entries come to, which must be what the last batch said. A record from before there was such a word is taken as it is.
fn check(dir: &Path, db: &sled::Db) -> Result<Sum, StoreError> {
    let mut found = Sum::default();
    let mut said = None;
    for entry in db.iter() {
        let (key, value) = entry.map_err(|error| StoreError::Unreadable {
            dir: dir.join(RECORD).display().to_string(),
            source: error.into(),
        })?;
        // A later version may count otherwise, so its mark is looked for first.
        codec::json_of(&String::from_utf8_lossy(&key), &value)?;
        if key == SUM {
            said = Some(Sum::of_value(SUM, &value)?);
        } else {
            found.with(&String::from_utf8_lossy(&key), Some(&value));
        }
    }
    match said {
        Some(said) if said != found => Err(StoreError::Lost {
            dir: dir.display().to_string(),
            found: found.entries,
            said: said.entries,
        }),
        _ => Ok(found),
    }
}

impl Store for SledStore {
    fn load(&self) -> Result<Vec<(Key, Record)>, StoreError> {
        let mut open = self.open.lock();
        let opened = match open.take() {
            Some(opened) => opened,
            None => Opened::new(&self.dir)?,
        };
        let all = without_panic(&self.dir, || {
            let mut all = Vec::new();
            for entry in opened.db.iter() {
                let (key, value) = entry.map_err(|error| cannot_open(&self.dir, error))?;
                if key != SUM {
                    all.push(codec::entry(&key, &value)?);
                }
            }
            Ok(all)
        });
        *open = Some(opened);
        all
    }

    fn apply(&self, changes: &[Change]) -> Result<(), StoreError> {
        let mut open = self.open.lock();
        let mut opened = match open.take() {
            Some(opened) => opened,
            None => Opened::new(&self.dir)?,
        };
        let dir = || self.dir.display().to_string();
        let written = without_panic(&self.dir, || {
            opened
                .apply(changes)
                .map_err(|source| StoreError::Write { dir: dir(), source })
        });
        // Otherwise it is closed here, and opened again for the next batch.
        if written.is_ok() {
            *open = Some(opened);
        }
        written
    }
}
