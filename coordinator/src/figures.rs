//! What the owner counts as it goes, for `/metrics`: events since the start, each a counter that its owner alone adds to.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::tree::{Note, Push};

/// A number that only grows.
#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    pub(crate) fn add(&self, number: usize) {
        self.0.fetch_add(number as u64, Ordering::Relaxed);
    }

    #[allow(clippy::cast_precision_loss, reason = "a figure for people")]
    pub(crate) fn get(&self) -> f64 {
        self.0.load(Ordering::Relaxed) as f64
    }
}

/// All counters of the owner.
#[derive(Debug, Default)]
pub(crate) struct Figures {
    pub(crate) beats: Count,
    pub(crate) calls: Count,
    pub(crate) refusals: Count,
    pub(crate) hosts_came: Count,
    pub(crate) hosts_lost: Count,
    pub(crate) hosts_left: Count,
    pub(crate) placed: Count,
    pub(crate) adopted: Count,
    pub(crate) moved: Count,
    pub(crate) slot_leases_ended: Count,
    pub(crate) complaints: Count,
    pub(crate) deaf_ms: Count,
    pub(crate) pushed_placements: Count,
    pub(crate) slow_hosts: Count,
    pub(crate) writes: Count,
    pub(crate) write_errors: Count,
    pub(crate) write_us: Count,
}

impl Figures {
    /// Counts what the trees want said.
    pub(crate) fn note(&self, note: &Note) {
        match note {
            Note::HostCame(_) => self.hosts_came.add(1),
            Note::HostLost { .. } => self.hosts_lost.add(1),
            Note::HostLeft(_) => self.hosts_left.add(1),
            Note::Attached { adopted: false, .. } => self.placed.add(1),
            Note::Attached { adopted: true, .. } => self.adopted.add(1),
            Note::LeaseEnded { .. } => self.slot_leases_ended.add(1),
            Note::Moved { hosts, .. } => self.moved.add(*hosts),
            Note::Complaint { .. } => self.complaints.add(1),
            Note::Refused { .. } => self.refusals.add(1),
            Note::Deaf { ms, .. } => self.deaf_ms.add(usize::try_from(*ms).unwrap_or(usize::MAX)),
            Note::StateLost { .. } | Note::UnknownAttachment { .. } => {}
        }
    }

    /// Counts a message to a host.
    pub(crate) fn push(&self, push: &Push) {
        if let Push::Placement(_) = push {
            self.pushed_placements.add(1);
        }
    }

    /// Counts an attempt to make decisions durable.
    pub(crate) fn write(&self, took: Duration, failed: bool) {
        self.writes.add(1);
        self.write_errors.add(usize::from(failed));
        self.write_us
            .add(usize::try_from(took.as_micros()).unwrap_or(usize::MAX));
    }
}
