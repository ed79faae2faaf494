//! The record in memory, for tests: it keeps what was applied, and fails when told to.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, PoisonError};

use crate::tree::{Change, Key, Record};

use super::{Store, StoreError};

/// A record that ends with the process.
#[derive(Debug, Default)]
pub struct MemoryStore {
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    records: BTreeMap<Key, Record>,
    batches: u64,
    full: bool,
}

impl MemoryStore {
    /// From now on writing fails as on a full disk, or works again.
    pub fn set_full(&self, full: bool) {
        self.lock().full = full;
    }

    /// How many batches were applied.
    pub fn batches(&self) -> u64 {
        self.lock().batches
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Kept> {
        // Whoever panicked with the lock held left whole entries behind.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store for MemoryStore {
    fn load(&self) -> Result<Vec<(Key, Record)>, StoreError> {
        let kept = self.lock();
        Ok(kept.records.iter().map(|(k, r)| (k.clone(), r.clone())).collect())
    }

    fn apply(&self, changes: &[Change]) -> Result<(), StoreError> {
        let mut kept = self.lock();
        if kept.full {
            return Err(StoreError::Write {
                dir: "memory".into(),
                source: io::Error::from(io::ErrorKind::StorageFull).into(),
            });
        }
        kept.batches += 1;
        for change in changes {
            match change {
                Change::Put(key, record) => kept.records.insert(key.clone(), record.clone()),
                Change::Delete(key) => kept.records.remove(key),
            };
        }
        Ok(())
    }
}
