//! The record in sled: one tree of keys, one atomic batch a decision, flushed before anybody hears of it.

use std::path::Path;

use crate::tree::{Change, Key, Record};

use super::{Store, StoreError, codec};

/// A record in a directory.
#[derive(Debug)]
pub struct SledStore {
    db: sled::Db,
    dir: String,
}

/// Pages kept in memory. The record of 10,000 hosts is a few megabytes; sled's own default is a gigabyte.
const PAGES_BYTES: u64 = 16 << 20;

impl SledStore {
    /// Opens or makes the record in `dir`.
    ///
    /// # Errors
    /// [`StoreError::Locked`] where another process has it, otherwise [`StoreError::Open`].
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let name = dir.display().to_string();
        let open = |source: Box<dyn std::error::Error + Send + Sync>| StoreError::Open {
            dir: name.clone(),
            source,
        };
        std::fs::create_dir_all(dir).map_err(|error| open(error.into()))?;
        let config = sled::Config::new()
            .path(dir.join("record"))
            .cache_capacity(PAGES_BYTES)
            // Every batch is flushed before it is answered, so a timer has nothing to do.
            .flush_every_ms(None);
        let db = config.open().map_err(|error| {
            // sled has no variant of its own for this.
            if error.to_string().contains("could not acquire lock") {
                StoreError::Locked { dir: name.clone() }
            } else {
                open(error.into())
            }
        })?;
        Ok(Self { db, dir: name })
    }

    fn failed(&self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> StoreError {
        StoreError::Write {
            dir: self.dir.clone(),
            source: source.into(),
        }
    }
}

impl Store for SledStore {
    fn load(&self) -> Result<Vec<(Key, Record)>, StoreError> {
        let mut all = Vec::new();
        for entry in self.db.iter() {
            let (key, value) = entry.map_err(|error| StoreError::Open {
                dir: self.dir.clone(),
                source: error.into(),
            })?;
            all.push(codec::entry(&key, &value)?);
        }
        Ok(all)
    }

    fn apply(&self, changes: &[Change]) -> Result<(), StoreError> {
        let mut batch = sled::Batch::default();
        for change in changes {
            match change {
                Change::Put(key, record) => {
                    let value = codec::value(record).map_err(|error| self.failed(error))?;
                    batch.insert(codec::key(key).into_bytes(), value);
                }
                Change::Delete(key) => batch.remove(codec::key(key).into_bytes()),
            }
        }
        self.db.apply_batch(batch).map_err(|error| self.failed(error))?;
        self.db.flush().map_err(|error| self.failed(error))?;
        Ok(())
    }
}
