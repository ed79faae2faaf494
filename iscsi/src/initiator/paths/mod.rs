//! The core of a path group: which path serves a read, and what happens when it does not.
//!
//! A pure state machine: [`Paths::step`] takes the time and an event and says what to do. It has no clock, no
//! sockets and no tasks; `initiator/group.rs` is the shell that has them. Deliberately absent: when a peer
//! counts as silent, which each session decides for itself ([`Liveness`](super::liveness::Liveness)).
//!
//! What always holds, and what `tests.rs` shows under random events:
//! - a read ends, with bytes or with an error, within [`Limits::read_ms`] whatever happens;
//! - a path that the read avoids, or that is distrusted, is never asked;
//! - a fallback is asked only when no active path can serve the read;
//! - when a path is lost, every read on it moves in the same step, if any other path can take it.

mod choice;
mod links;
#[cfg(test)]
mod tests;
mod types;

use std::collections::BTreeMap;

use treeboot_types::Tick;

use crate::scsi::alua::Reported;

use links::Link;
pub(super) use types::{Effect, Event, LinkId, Outcome, ReadId};
pub use types::{
    Failure, GroupTotals, Limits, Lun, PathFailure, PathId, PathPolicy, PathSpec, PathState, PathStats,
};

/// How long a read waits for active paths that are about to connect for the first time before it takes a
/// fallback. A parent that is itself attaching answers within some 50 ms a level of the tree; six levels fit.
pub const PATIENCE_MS: u64 = 300;

/// For how long after it was listed a path that never connected still counts as about to connect. Past this, a
/// dead parent in the list no longer costs each read its [`PATIENCE_MS`].
pub const HOPE_MS: u64 = 2_000;

/// Between the connects to one fallback and to the next while none of them is up: several logins' time on a
/// local network, and small beside the 2 s that a stall may last.
const STAGGER_MS: u64 = 150;

/// A fallback that was not needed for this long is disconnected, so that an origin does not hold an idle session
/// for each host of the fleet.
const FALLBACK_IDLE_MS: u64 = 30_000;

/// A path on which a read failed is not asked for the same read again for this long, unless it is reconnected.
const COOLING_MS: u64 = 100;

/// Attempts of one read under way at once: the first, and hedges. More would only load a network that is slow.
const ATTEMPTS_AT_ONCE: usize = 3;

/// Hedges on fallbacks under way at once while the slow path still answers others: a parent that is only
/// overloaded must not turn its children's load onto the origin.
const FALLBACK_HEDGES: usize = 4;

/// Until the next look at a read whose hedge had no room.
const HEDGE_AGAIN_MS: u64 = 50;

/// A path that is alive but answers no reads gets one this often, to see whether it does again.
const PROBE_MS: u64 = 2_000;

/// First and longest delay between connects to one path; doubled with each failure in a row.
const BACKOFF_FIRST_MS: u64 = 50;
const BACKOFF_LAST_MS: u64 = 2_000;

/// A session that lasted this long ends a row of failures.
const STABLE_MS: u64 = 2_000;

/// For how long a path that shipped wrong bytes stays out, even if it is listed anew.
pub const DISTRUST_MS: u64 = 60_000;

/// Paths remembered after they left the list, for the sake of distrust; the oldest is forgotten first. More
/// parents than a host sees in [`DISTRUST_MS`].
const DEPARTED_REMEMBERED: usize = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Active,
    Fallback,
}

/// One listed path.
#[derive(Debug)]
struct Path {
    id: PathId,
    spec: PathSpec,
    role: Role,
    link: Link,
    /// What the target says of it since it is connected.
    access: Reported,
    listed: Tick,
    ever_up: bool,
    /// Failures since the last stable session; the exponent of the backoff.
    failures_in_a_row: u32,
    in_flight: u32,
    /// The group's turn when this path was last chosen: the least goes next.
    turn: u64,
    last_used: Tick,
    /// When it last answered a read, in whatever way.
    answered: Tick,
    /// It has not answered reads for a hedge's time; set to when it is next tried.
    stalled: Option<Tick>,
    service_us: u64,
    sampled: Tick,
    reads: u64,
    active_bytes: u64,
    fallback_bytes: u64,
    failures: u64,
    last_failure: Option<String>,
}

/// A path that is no longer listed.
#[derive(Debug)]
struct Departed {
    id: PathId,
    spec: PathSpec,
    distrusted_until: Tick,
}

#[derive(Debug)]
struct Attempt {
    path: PathId,
    link: LinkId,
    issued: Tick,
}

#[derive(Debug)]
struct Read {
    lun: Lun,
    avoid: Vec<PathId>,
    started: Tick,
    attempts: Vec<Attempt>,
    /// Not before the tick on this path: it has just failed this read.
    cooling: Vec<(PathId, Tick)>,
    /// The path said that it will never serve this read.
    refused: Vec<PathId>,
    /// Since when no attempt is under way.
    waiting: Option<Tick>,
}

/// The state of a path group.
#[derive(Debug)]
pub(super) struct Paths {
    policy: PathPolicy,
    limits: Limits,
    /// In the order of the placement, active paths first.
    listed: Vec<Path>,
    /// The last paths that left the list.
    departed: Vec<Departed>,
    reads: BTreeMap<ReadId, Read>,
    next_path: u64,
    next_link: u64,
    turn: u64,
    seed: u64,
    wake_at: Tick,
    /// A read found no path in this step.
    hungry: bool,
    /// Since when, and until when last, fallbacks are needed.
    demand: Option<(Tick, Tick)>,
    totals: GroupTotals,
}

impl Paths {
    /// No paths yet. `seed` spreads the reconnects of many groups.
    pub(super) fn new(policy: PathPolicy, limits: Limits, seed: u64) -> Self {
        Self {
            policy,
            limits,
            listed: Vec::new(),
            departed: Vec::new(),
            reads: BTreeMap::new(),
            next_path: 0,
            next_link: 0,
            turn: 0,
            seed,
            wake_at: Tick(u64::MAX),
            hungry: false,
            demand: None,
            totals: GroupTotals::default(),
        }
    }

    /// When [`Event::Timer`] is due. It may come early, never late; only `step` changes it.
    pub(super) fn wake_at(&self) -> Tick {
        self.wake_at
    }

    /// Takes what happened at `now` and appends what to do.
    pub(super) fn step(&mut self, now: Tick, event: Event, out: &mut Vec<Effect>) {
        match event {
            Event::Listed { active, fallbacks } => self.list(now, active, fallbacks, out),
            Event::Connected { path, link } => self.connected(now, path, link, out),
            Event::Lost { path, link, why } => self.lost(now, path, link, why, out),
            Event::Access { path, link, access } => self.access(now, path, link, access, out),
            Event::Suspected { path, link, silent } => self.suspected(path, link, silent),
            Event::Read { read, lun, avoid } => self.begin(now, read, lun, avoid, out),
            Event::Answered {
                read,
                path,
                link,
                outcome,
            } => self.answered(now, read, (path, link), outcome, out),
            Event::Cancelled { read } => self.cancel(read),
            Event::Distrusted { path } => self.distrust(now, path, out),
            Event::Timer => self.timer(now, out),
        }
        self.tend_links(now, out);
        debug_assert_eq!(self.audit(), Ok(()));
    }

    fn begin(&mut self, now: Tick, id: ReadId, lun: Lun, avoid: Vec<PathId>, out: &mut Vec<Effect>) {
        let read = Read {
            lun,
            avoid,
            started: now,
            attempts: Vec::new(),
            cooling: Vec::new(),
            refused: Vec::new(),
            waiting: Some(now),
        };
        self.reads.insert(id, read);
        self.advance(now, id, out);
    }

    /// Gives a read what it needs now: a path, a hedge, or its end.
    fn advance(&mut self, now: Tick, id: ReadId, out: &mut Vec<Effect>) {
        let Some(read) = self.reads.get(&id) else { return };
        let overdue = now >= read.started.after_ms(self.limits.read_ms)
            || read
                .waiting
                .is_some_and(|since| now >= since.after_ms(self.limits.wait_ms));
        if overdue || self.hopeless(read) {
            self.fail(now, id, out);
            return;
        }
        let last = read.attempts.iter().map(|a| a.issued).max();
        match last {
            None => match self.choose(now, read) {
                Some(index) => self.issue(now, id, index, out),
                None if self.patient(now, read) => {}
                None => self.hungry = true,
            },
            Some(last) if now >= last.after_ms(self.limits.hedge_ms) => self.hedge(now, id, out),
            Some(_) => {}
        }
        self.note_read(now, id);
    }

    /// Asks one more path, because those that were asked take long.
    fn hedge(&mut self, now: Tick, id: ReadId, out: &mut Vec<Effect>) {
        let Some(read) = self.reads.get(&id) else { return };
        let mut all_stalled = true;
        for attempt in &read.attempts {
            let asked = self.listed.iter_mut().find(|path| path.id == attempt.path);
            if let Some(path) = asked {
                all_stalled &= path.has_stalled(now, attempt.issued, self.limits.hedge_ms);
            }
        }
        let full = read.attempts.len() >= ATTEMPTS_AT_ONCE;
        match self.choose(now, read) {
            _ if full && !all_stalled => {}
            Some(at) if self.listed[at].role == Role::Fallback && !all_stalled && !self.may_hedge(now) => {
                self.note(now.after_ms(HEDGE_AGAIN_MS));
            }
            Some(index) => {
                if full {
                    self.abandon_oldest(id, out);
                }
                self.issue(now, id, index, out);
            }
            None => self.hungry = true,
        }
    }

    /// Gives an attempt up, so that another path can be asked.
    fn abandon_oldest(&mut self, id: ReadId, out: &mut Vec<Effect>) {
        let Some(read) = self.reads.get_mut(&id) else {
            return;
        };
        let oldest = (0..read.attempts.len()).min_by_key(|at| read.attempts[*at].issued);
        let Some(oldest) = oldest.map(|at| read.attempts.swap_remove(at)) else {
            return;
        };
        if let Some(path) = self.listed.iter_mut().find(|path| path.id == oldest.path) {
            path.in_flight -= 1;
        }
        let Attempt { path, link, .. } = oldest;
        out.push(Effect::Abandon { read: id, path, link });
    }

    /// There is room for one more hedge on a fallback.
    fn may_hedge(&self, now: Tick) -> bool {
        let is_fallback = |id: PathId| self.listed.iter().any(|p| p.id == id && p.role == Role::Fallback);
        let hedges = self.reads.values().filter(|read| read.attempts.len() > 1);
        let recent = hedges.flat_map(|read| &read.attempts).filter(|attempt| {
            now.since_ms(attempt.issued) < self.limits.hedge_ms && is_fallback(attempt.path)
        });
        recent.count() < FALLBACK_HEDGES
    }

    /// Every listed path has refused the read for good, so waiting would be in vain.
    fn hopeless(&self, read: &Read) -> bool {
        read.attempts.is_empty()
            && !read.refused.is_empty()
            && self.listed.iter().all(|path| {
                read.refused.contains(&path.id)
                    || read.avoid.contains(&path.id)
                    || path.lun(read.lun).is_none()
                    || path.link.is_distrusted()
            })
    }

    fn issue(&mut self, now: Tick, id: ReadId, index: usize, out: &mut Vec<Effect>) {
        self.turn += 1;
        let path = &mut self.listed[index];
        let (Some(read), Link::Up { link, .. }) = (self.reads.get_mut(&id), &path.link) else {
            return;
        };
        let (link, Some(lun)) = (*link, path.lun(read.lun)) else {
            return;
        };
        if !read.attempts.is_empty() {
            self.totals.hedges += 1;
        }
        path.turn = self.turn;
        path.last_used = now;
        path.stalled = path.stalled.map(|_| now.after_ms(PROBE_MS));
        path.in_flight += 1;
        read.waiting = None;
        read.attempts.push(Attempt {
            path: path.id,
            link,
            issued: now,
        });
        out.push(Effect::Issue {
            read: id,
            path: path.id,
            link,
            lun,
        });
    }

    fn answered(
        &mut self,
        now: Tick,
        id: ReadId,
        (from, link): (PathId, LinkId),
        outcome: Outcome,
        out: &mut Vec<Effect>,
    ) {
        if let Outcome::SessionLost { why } = outcome {
            // If this link is already known as lost, the read has moved, and this changes nothing.
            self.lost(now, from, link, why, out);
            return;
        }
        let Some(read) = self.reads.get_mut(&id) else {
            return;
        };
        let Some(at) = read
            .attempts
            .iter()
            .position(|a| (a.path, a.link) == (from, link))
        else {
            return;
        };
        read.attempts.swap_remove(at);
        let Some(path) = self.listed.iter_mut().find(|p| p.id == from) else {
            return;
        };
        path.in_flight -= 1;
        path.answered = now;
        path.stalled = None;
        match outcome {
            Outcome::Bytes { bytes, service_us } => {
                path.sample(now, service_us);
                path.reads += 1;
                self.totals.reads += 1;
                let (of_path, of_group) = match path.role {
                    Role::Active => (&mut path.active_bytes, &mut self.totals.active_bytes),
                    Role::Fallback => (&mut path.fallback_bytes, &mut self.totals.fallback_bytes),
                };
                *of_path += bytes;
                *of_group += bytes;
                let took = now.since_ms(read.started);
                self.totals.longest_read_ms = self.totals.longest_read_ms.max(took);
                self.end(now, id);
            }
            Outcome::Failed { why, lasting } => {
                path.failures += 1;
                path.last_failure = Some(why);
                self.totals.moved += 1;
                if lasting {
                    read.refused.push(from);
                } else {
                    read.cooling.retain(|(path, _)| *path != from);
                    read.cooling.push((from, now.after_ms(COOLING_MS)));
                }
                if read.attempts.is_empty() {
                    read.waiting = Some(now);
                }
                self.advance(now, id, out);
            }
            Outcome::SessionLost { .. } => {}
        }
    }

    fn fail(&mut self, now: Tick, id: ReadId, out: &mut Vec<Effect>) {
        let Some(read) = self.reads.get(&id) else { return };
        let paths = self.listed.iter().map(|path| path.failure(read)).collect();
        let failure = Failure {
            waited_ms: now.since_ms(read.started),
            paths,
        };
        self.totals.failed_reads += 1;
        self.end(now, id);
        out.push(Effect::Fail { read: id, failure });
    }

    /// Forgets a read that has its answer. Attempts still under way were too slow: that is a sample, too.
    fn end(&mut self, now: Tick, id: ReadId) {
        let Some(read) = self.reads.remove(&id) else {
            return;
        };
        for attempt in read.attempts {
            if let Some(path) = self.listed.iter_mut().find(|p| p.id == attempt.path) {
                path.in_flight -= 1;
                path.sample(now, now.since_ms(attempt.issued) * 1_000);
            }
        }
    }

    fn cancel(&mut self, id: ReadId) {
        let Some(read) = self.reads.remove(&id) else {
            return;
        };
        for attempt in read.attempts {
            if let Some(path) = self.listed.iter_mut().find(|p| p.id == attempt.path) {
                path.in_flight -= 1;
            }
        }
    }

    fn timer(&mut self, now: Tick, out: &mut Vec<Effect>) {
        self.wake_at = Tick(u64::MAX);
        self.expire_links(now, out);
        self.advance_all(now, out);
    }

    /// Looks at every read again, oldest first: a path came up, or time has passed.
    fn advance_all(&mut self, now: Tick, out: &mut Vec<Effect>) {
        let ids: Vec<ReadId> = self.reads.keys().copied().collect();
        for id in ids {
            self.advance(now, id, out);
        }
    }

    /// Makes sure that the timer comes when this read's next deadline has.
    fn note_read(&mut self, now: Tick, id: ReadId) {
        let Some(read) = self.reads.get(&id) else { return };
        let mut next = read.started.after_ms(self.limits.read_ms);
        let mut consider = |at: Tick| {
            if at > now {
                next = next.min(at);
            }
        };
        match read.attempts.iter().map(|a| a.issued).max() {
            None => {
                consider(read.started.after_ms(PATIENCE_MS));
                if let Some(since) = read.waiting {
                    consider(since.after_ms(self.limits.wait_ms));
                }
            }
            Some(last) => consider(last.after_ms(self.limits.hedge_ms)),
        }
        for (_, until) in &read.cooling {
            consider(*until);
        }
        self.note(next);
    }

    fn note(&mut self, at: Tick) {
        self.wake_at = self.wake_at.min(at);
    }

    /// Each listed path's figures, active paths first.
    pub(super) fn stats(&self) -> Vec<PathStats> {
        let of = |path: &Path| PathStats {
            id: path.id,
            label: path.spec.label.clone(),
            portal: path.spec.portal.clone(),
            active: path.role == Role::Active,
            state: path.state(),
            access: path.access,
            in_flight: path.in_flight,
            reads: path.reads,
            active_bytes: path.active_bytes,
            fallback_bytes: path.fallback_bytes,
            failures: path.failures,
            service_time_us: path.service_us,
            last_failure: path.last_failure.clone(),
        };
        self.listed.iter().map(of).collect()
    }

    /// The group's figures.
    pub(super) fn totals(&self) -> GroupTotals {
        self.totals
    }

    /// Checks what must hold between two steps.
    fn audit(&self) -> Result<(), String> {
        for path in &self.listed {
            let attempts = self.reads.values().flat_map(|r| &r.attempts);
            let on_it = attempts.filter(|a| a.path == path.id).count();
            if on_it != path.in_flight as usize {
                return Err(format!(
                    "{:?} counts {} reads, has {on_it}",
                    path.id, path.in_flight
                ));
            }
        }
        for (id, read) in &self.reads {
            if read.attempts.is_empty() != read.waiting.is_some() {
                return Err(format!("{id:?} neither waits nor is under way"));
            }
            for attempt in &read.attempts {
                let listed = self.listed.iter().find(|p| p.id == attempt.path);
                if listed.and_then(|p| p.link.id()) != Some(attempt.link) {
                    return Err(format!("{id:?} is on {:?}, which is gone", attempt.path));
                }
            }
        }
        Ok(())
    }
}

impl Path {
    fn lun(&self, lun: Lun) -> Option<u16> {
        match lun {
            Lun::Data => Some(self.spec.data_lun),
            Lun::Hash => self.spec.hash_lun,
        }
    }

    /// Whether it has answered nothing for `after_ms`, though it owes an answer since `issued`; marks it if so.
    fn has_stalled(&mut self, now: Tick, issued: Tick, after_ms: u64) -> bool {
        let stalled = now.since_ms(self.answered.max(issued)) >= after_ms;
        if stalled && self.stalled.is_none() {
            self.stalled = Some(now.after_ms(PROBE_MS));
        }
        stalled
    }

    /// Smooths a read's time: an eighth of the new one, as TCP does with round trips (RFC 6298 §2).
    fn sample(&mut self, now: Tick, service_us: u64) {
        self.service_us = match self.service_us {
            0 => service_us.max(1),
            old => (old - old / 8 + service_us / 8).max(1),
        };
        self.sampled = now;
    }

    fn failure(&self, read: &Read) -> PathFailure {
        let why = if read.avoid.contains(&self.id) {
            "gave wrong bytes for this read before".to_owned()
        } else if self.link.is_distrusted() {
            "distrusted: it shipped wrong bytes".to_owned()
        } else if self.lun(read.lun).is_none() {
            "serves no hash tree".to_owned()
        } else if !self.is_accessible() {
            format!("the target says that the path is {:?}", self.access).to_lowercase()
        } else if read.attempts.iter().any(|a| a.path == self.id) {
            "has not answered".to_owned()
        } else {
            match (&self.last_failure, self.state()) {
                (Some(why), _) => why.clone(),
                (None, PathState::Connecting) => "is still connecting".to_owned(),
                (None, _) => "was not asked".to_owned(),
            }
        };
        PathFailure {
            label: self.spec.label.clone(),
            portal: self.spec.portal.clone(),
            why,
        }
    }
}
