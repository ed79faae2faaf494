//! When a guest stood still for its disk, and whether it does now.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Counted since this process started or adopted the VM.
#[derive(Debug, Default)]
pub(super) struct Pauses {
    count: AtomicU64,
    now: AtomicBool,
}

impl Pauses {
    /// It stands still. Whether it went on since the last time.
    pub(super) fn begin(&self) -> bool {
        let is_new = !self.now.swap(true, Ordering::Relaxed);
        self.count.fetch_add(u64::from(is_new), Ordering::Relaxed);
        is_new
    }

    /// It goes on. Whether it stood still.
    pub(super) fn end(&self) -> bool {
        self.now.swap(false, Ordering::Relaxed)
    }

    pub(super) fn now(&self) -> bool {
        self.now.load(Ordering::Relaxed)
    }

    pub(super) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }
}
