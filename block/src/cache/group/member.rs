//! A member of the group: a directory with a budget.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use super::folder::MemberFiles;

/// A directory that the group may use, and how much of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberSpec {
    /// The directory.
    pub path: PathBuf,
    /// Bytes that its files may have; `None`: until its file system is full.
    pub budget: Option<u64>,
}

pub(in crate::cache) struct Member {
    /// Its place in [`Holding`](super::holding::Holding)'s tables.
    pub(super) number: u8,
    pub(super) spec: MemberSpec,
    /// `None` where it could not be used from the beginning.
    pub(super) files: Option<Arc<dyn MemberFiles>>,
    /// How much it may hold now: the budget, or less while its file system is full.
    limit: AtomicU64,
    /// Bytes of its files, as they are known. Changed under the group's lock.
    used: AtomicU64,
    pub(super) hits: AtomicU64,
    failed: OnceLock<String>,
}

impl Member {
    pub(super) fn new(number: u8, spec: MemberSpec, files: Option<Arc<dyn MemberFiles>>) -> Self {
        Self {
            number,
            limit: AtomicU64::new(spec.budget.unwrap_or(u64::MAX)),
            spec,
            files,
            used: AtomicU64::new(0),
            hits: AtomicU64::new(0),
            failed: OnceLock::new(),
        }
    }

    pub(super) fn is_working(&self) -> bool {
        self.failed.get().is_none()
    }

    /// Why it is not used any more.
    pub(super) fn failure(&self) -> Option<&str> {
        self.failed.get().map(String::as_str)
    }

    /// Whether it worked until now.
    pub(super) fn fail(&self, why: String) -> bool {
        self.failed.set(why).is_ok()
    }

    pub(super) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    pub(super) fn free(&self) -> u64 {
        self.limit.load(Ordering::Relaxed).saturating_sub(self.used())
    }

    pub(super) fn is_over(&self) -> bool {
        self.used() > self.limit.load(Ordering::Relaxed)
    }

    pub(super) fn take(&self, bytes: u64) {
        self.used.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn give_back(&self, bytes: u64) {
        debug_assert!(self.used() >= bytes, "{} of {}", bytes, self.used());
        let _infallible = self
            .used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
                Some(used.saturating_sub(bytes))
            });
    }

    pub(super) fn forget_all(&self) {
        self.used.store(0, Ordering::Relaxed);
    }

    /// Its file system has no more room: it does not grow until it has.
    pub(super) fn is_full(&self) -> bool {
        self.limit.load(Ordering::Relaxed) < self.spec.budget.unwrap_or(u64::MAX)
    }

    /// Sets whether it may grow; whether that is news.
    pub(super) fn set_full(&self, full: bool) -> bool {
        let was = self.is_full();
        let budget = self.spec.budget.unwrap_or(u64::MAX);
        self.limit.store(
            if full { budget.min(self.used()) } else { budget },
            Ordering::Relaxed,
        );
        was != full
    }
}
