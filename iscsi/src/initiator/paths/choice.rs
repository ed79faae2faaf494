//! Which path serves a read now.

use treeboot_types::Tick;

use super::links::Link;
use super::{HOPE_MS, PATIENCE_MS, Path, PathPolicy, Paths, Read, Role};
use crate::scsi::alua::Reported;

/// A smoothed time halves for each such span without a sample, so that a path that was slow once is tried again.
const SAMPLE_HALVES_MS: u64 = 1_000;

impl Paths {
    /// The index of the path to ask: an active one by policy, else the first fallback in order.
    pub(super) fn choose(&self, now: Tick, read: &Read) -> Option<usize> {
        let candidates = self.listed.iter().enumerate();
        candidates
            .filter(|(_, path)| may_serve(now, path, read))
            .filter_map(|(index, path)| {
                let load = match path.role {
                    Role::Active => self.load(now, path),
                    Role::Fallback => (index as u64, 0),
                };
                Some((rank(now, path)?, load, index))
            })
            .min()
            .map(|(_, _, index)| index)
    }

    /// What the policy minimises; a tie goes to the path that was not chosen for longest.
    fn load(&self, now: Tick, path: &Path) -> (u64, u64) {
        let load = match self.policy {
            PathPolicy::RoundRobin => 0,
            PathPolicy::QueueLength => u64::from(path.in_flight),
            PathPolicy::ServiceTime => {
                let halvings = now.since_ms(path.sampled) / SAMPLE_HALVES_MS;
                let service_us = path.service_us.checked_shr(halvings as u32).unwrap_or(0);
                // Without any figure the queue alone decides, as if a read took a microsecond.
                service_us.max(1) * (u64::from(path.in_flight) + 1)
            }
        };
        (load, path.turn)
    }

    /// The read should wait a moment longer for active paths that are about to connect for the first time.
    pub(super) fn patient(&self, now: Tick, read: &Read) -> bool {
        now < read.started.after_ms(PATIENCE_MS)
            && self.listed.iter().any(|path| {
                hoped(now, path) && !read.avoid.contains(&path.id) && path.lun(read.lun).is_some()
            })
    }
}

/// The path is active and has only just been listed.
pub(super) fn hoped(now: Tick, path: &Path) -> bool {
    path.role == Role::Active
        && !path.ever_up
        && !path.link.is_distrusted()
        && now < path.listed.after_ms(HOPE_MS)
}

/// How willingly a path is asked, the least first; `None` where it cannot be asked.
fn rank(now: Tick, path: &Path) -> Option<u8> {
    let Link::Up { suspect, .. } = path.link else {
        return None;
    };
    if !path.is_accessible() {
        return None;
    }
    let stalled = path.stalled.is_some_and(|probe_at| now < probe_at);
    let access = match path.access {
        Reported::Optimized => 0,
        Reported::NonOptimized | Reported::BlockDependent => 1,
        // It says that it is between two states: it may make the read wait.
        _ => 2,
    };
    Some(match (path.role, stalled, suspect) {
        (Role::Active, false, false) => access,
        // A silent active path either speaks or is lost within half a second; until then it is still an active
        // path, and a fallback's link is the scarcer thing.
        (Role::Active, false, true) => 3,
        (Role::Fallback, false, false) => 4 + access,
        (Role::Fallback, false, true) => 7,
        // Alive, but it has answered no read for long.
        (Role::Active, true, _) => 8,
        (Role::Fallback, true, _) => 9,
    })
}

fn may_serve(now: Tick, path: &Path, read: &Read) -> bool {
    path.lun(read.lun).is_some()
        && !read.avoid.contains(&path.id)
        && !read.refused.contains(&path.id)
        && !read.attempts.iter().any(|attempt| attempt.path == path.id)
        && !read
            .cooling
            .iter()
            .any(|&(cooling, until)| cooling == path.id && now < until)
}
