//! The connections under the paths: when to connect, when to try again, when to let go.

use treeboot_types::Tick;

use super::choice::hoped;
use super::{
    BACKOFF_FIRST_MS, BACKOFF_LAST_MS, DEPARTED_REMEMBERED, DISTRUST_MS, Departed, Effect, FALLBACK_IDLE_MS,
    HOPE_MS, LinkId, Path, PathId, PathSpec, PathState, Paths, ReadId, Role, STABLE_MS, STAGGER_MS,
};
use crate::scsi::alua::Reported;

/// A path's connection.
#[derive(Debug)]
pub(super) enum Link {
    /// None, and none wanted now.
    Standby,
    /// Under way.
    Connecting { link: LinkId },
    /// Logged in.
    Up {
        link: LinkId,
        since: Tick,
        suspect: bool,
    },
    /// None until the next try.
    Waiting { until: Tick },
    /// None: it shipped wrong bytes. A placement that names the path after `until` gives it another chance.
    Distrusted { until: Tick },
}

impl Link {
    pub(super) fn id(&self) -> Option<LinkId> {
        match self {
            Self::Connecting { link } | Self::Up { link, .. } => Some(*link),
            Self::Standby | Self::Waiting { .. } | Self::Distrusted { .. } => None,
        }
    }

    pub(super) fn is_distrusted(&self) -> bool {
        matches!(self, Self::Distrusted { .. })
    }
}

impl Path {
    /// Reads may be asked of it. One between two states may answer or refuse; a relay of ours answers.
    pub(super) fn is_accessible(&self) -> bool {
        !matches!(
            self.access,
            Reported::Standby | Reported::Unavailable | Reported::Offline
        )
    }

    pub(super) fn state(&self) -> PathState {
        match self.link {
            Link::Standby => PathState::Standby,
            Link::Connecting { .. } if self.failures_in_a_row == 0 => PathState::Connecting,
            Link::Connecting { .. } | Link::Waiting { .. } => PathState::Down,
            Link::Up { .. } if !self.is_accessible() => PathState::Suspect,
            Link::Up { suspect: true, .. } => PathState::Suspect,
            Link::Up { .. } if self.stalled.is_some() => PathState::Suspect,
            Link::Up { suspect: false, .. } => PathState::Up,
            Link::Distrusted { .. } => PathState::Distrusted,
        }
    }
}

impl Paths {
    /// Takes a new placement: paths that stay keep everything but their role and label.
    pub(super) fn list(
        &mut self,
        now: Tick,
        active: Vec<PathSpec>,
        fallbacks: Vec<PathSpec>,
        out: &mut Vec<Effect>,
    ) {
        let active = active.into_iter().map(|spec| (Role::Active, spec));
        let fallbacks = fallbacks.into_iter().map(|spec| (Role::Fallback, spec));
        let mut old = std::mem::take(&mut self.listed);
        for (role, spec) in active.chain(fallbacks) {
            if self.listed.iter().any(|path| path.spec.same_path(&spec)) {
                continue; // named twice: the first role counts
            }
            let stays = old.iter().position(|path| path.spec.same_path(&spec));
            let path = match stays.map(|at| old.remove(at)) {
                Some(path) => keep(now, path, role, spec),
                None => self.new_path(now, role, spec),
            };
            self.listed.push(path);
        }
        let mut moved = Vec::new();
        for path in old {
            if let Some(link) = path.link.id() {
                moved.extend(self.take_attempts(now, path.id, link, out));
                out.push(Effect::Close { path: path.id, link });
            }
            let distrusted_until = match path.link {
                Link::Distrusted { until } => until,
                _ => Tick(0),
            };
            if self.departed.len() == DEPARTED_REMEMBERED {
                self.departed.remove(0);
            }
            self.departed.push(Departed {
                id: path.id,
                spec: path.spec,
                distrusted_until,
            });
        }
        for index in 0..self.listed.len() {
            let path = &self.listed[index];
            if path.role == Role::Active && matches!(path.link, Link::Standby) {
                self.connect(index, out);
            }
        }
        self.totals.moved += moved.len() as u64;
        // A path that became a fallback while it was up is let go of when it is idle.
        self.demand.get_or_insert((now, now));
        // Also reads that wait: a path may have become an active one, or a fallback.
        self.advance_all(now, out);
    }

    fn new_path(&mut self, now: Tick, role: Role, spec: PathSpec) -> Path {
        let before = self.departed.iter().filter(|old| old.spec.same_path(&spec));
        let link = match before.map(|old| old.distrusted_until).max() {
            Some(until) if now < until => Link::Distrusted { until },
            _ => Link::Standby,
        };
        self.next_path += 1;
        Path {
            id: PathId(self.next_path),
            spec,
            role,
            link,
            access: Reported::Optimized,
            listed: now,
            ever_up: false,
            failures_in_a_row: 0,
            in_flight: 0,
            turn: 0,
            last_used: now,
            answered: now,
            stalled: None,
            service_us: 0,
            sampled: now,
            reads: 0,
            active_bytes: 0,
            fallback_bytes: 0,
            failures: 0,
            last_failure: None,
        }
    }

    fn connect(&mut self, index: usize, out: &mut Vec<Effect>) {
        self.next_link += 1;
        let link = LinkId(self.next_link);
        let path = &mut self.listed[index];
        path.link = Link::Connecting { link };
        path.access = Reported::Optimized;
        out.push(Effect::Connect {
            path: path.id,
            link,
            spec: path.spec.clone(),
        });
    }

    pub(super) fn connected(&mut self, now: Tick, id: PathId, link: LinkId, out: &mut Vec<Effect>) {
        let turn = self.turn;
        let Some(path) = self.listed.iter_mut().find(|path| path.id == id) else {
            return;
        };
        if !matches!(path.link, Link::Connecting { link: current } if current == link) {
            return;
        }
        path.link = Link::Up {
            link,
            since: now,
            suspect: false,
        };
        path.ever_up = true;
        path.stalled = None;
        path.last_used = now;
        // It joins the round at its end, so that it gets its share and no more.
        path.turn = path.turn.max(turn);
        for read in self.reads.values_mut() {
            read.cooling.retain(|(cooling, _)| *cooling != id);
        }
        self.advance_all(now, out);
    }

    /// The target said how the access to its unit is. Reads under way stay: the target carries them out or refuses them.
    pub(super) fn access(
        &mut self,
        now: Tick,
        id: PathId,
        of: LinkId,
        access: Reported,
        out: &mut Vec<Effect>,
    ) {
        let Some(path) = self.listed.iter_mut().find(|path| path.id == id) else {
            return;
        };
        if path.link.id() != Some(of) || path.access == access {
            return;
        }
        path.access = access;
        // What it refused in the old state it need not refuse in the new one.
        for read in self.reads.values_mut() {
            read.cooling.retain(|(cooling, _)| *cooling != id);
        }
        self.advance_all(now, out);
    }

    pub(super) fn suspected(&mut self, id: PathId, of: LinkId, silent: bool) {
        if let Some(path) = self.listed.iter_mut().find(|path| path.id == id)
            && let Link::Up { link, suspect, .. } = &mut path.link
            && *link == of
        {
            *suspect = silent;
        }
    }

    /// A connect failed or a session ended: the next try is set, and the path's reads move now.
    pub(super) fn lost(&mut self, now: Tick, id: PathId, of: LinkId, why: String, out: &mut Vec<Effect>) {
        let seed = self.seed;
        let Some(path) = self.listed.iter_mut().find(|path| path.id == id) else {
            return;
        };
        if path.link.id() != Some(of) {
            return;
        }
        let was_stable = matches!(path.link, Link::Up { since, .. } if now.since_ms(since) >= STABLE_MS);
        path.failures_in_a_row = if was_stable {
            1
        } else {
            path.failures_in_a_row.saturating_add(1)
        };
        path.failures += 1;
        path.last_failure = Some(why);
        let until = now.after_ms(backoff_ms(seed ^ id.0, path.failures_in_a_row));
        path.link = Link::Waiting { until };
        self.note(until);
        self.move_reads(now, id, of, out);
    }

    /// Takes a path out for shipping wrong bytes. Its reads under way move, too.
    pub(super) fn distrust(&mut self, now: Tick, id: PathId, out: &mut Vec<Effect>) {
        let until = now.after_ms(DISTRUST_MS);
        // Bytes are checked after they were read: by then the path may have left, and even have come back.
        let departed = self.departed.iter_mut().find(|old| old.id == id).map(|old| {
            old.distrusted_until = until;
            old.spec.clone()
        });
        let is_it = |path: &Path| match &departed {
            Some(spec) => path.spec.same_path(spec),
            None => path.id == id,
        };
        let Some(path) = self.listed.iter_mut().find(|path| is_it(path)) else {
            return;
        };
        let id = path.id;
        let link = path.link.id();
        path.link = Link::Distrusted { until };
        path.failures += 1;
        path.last_failure = Some("shipped wrong bytes".to_owned());
        if let Some(link) = link {
            out.push(Effect::Close { path: id, link });
            self.move_reads(now, id, link, out);
        }
    }

    fn move_reads(&mut self, now: Tick, id: PathId, link: LinkId, out: &mut Vec<Effect>) {
        let moved = self.take_attempts(now, id, link, out);
        self.totals.moved += moved.len() as u64;
        for read in moved {
            self.advance(now, read, out);
        }
    }

    /// Takes every attempt off a link; gives the reads that lost one.
    fn take_attempts(&mut self, now: Tick, path: PathId, link: LinkId, out: &mut Vec<Effect>) -> Vec<ReadId> {
        let mut lost = Vec::new();
        for (&id, read) in &mut self.reads {
            if let Some(at) = read
                .attempts
                .iter()
                .position(|a| (a.path, a.link) == (path, link))
            {
                read.attempts.swap_remove(at);
                if read.attempts.is_empty() {
                    read.waiting = Some(now);
                }
                lost.push(id);
                out.push(Effect::Abandon { read: id, path, link });
            }
        }
        if let Some(path) = self.listed.iter_mut().find(|p| p.id == path) {
            path.in_flight -= lost.len() as u32;
        }
        lost
    }

    /// Starts the connects whose delay is over.
    pub(super) fn expire_links(&mut self, now: Tick, out: &mut Vec<Effect>) {
        for index in 0..self.listed.len() {
            let path = &mut self.listed[index];
            let Link::Waiting { until } = path.link else {
                continue;
            };
            if until > now {
                self.note(until);
            } else if path.role == Role::Active {
                self.connect(index, out);
            } else {
                path.link = Link::Standby; // `tend_links` knows whether it is needed
            }
        }
    }

    /// Connects fallbacks while they are needed, one after the other, and lets go of them afterwards.
    ///
    /// They are needed when no active path answers, or when a read found no path. An active path that has just
    /// been listed gets its [`HOPE_MS`] first.
    pub(super) fn tend_links(&mut self, now: Tick, out: &mut Vec<Effect>) {
        let hungry = std::mem::take(&mut self.hungry);
        let mut active_answers = false;
        for path in &self.listed {
            if hoped(now, path) {
                active_answers = true;
                self.wake_at = self.wake_at.min(path.listed.after_ms(HOPE_MS));
            } else if path.role == Role::Active && path.state() == PathState::Up {
                active_answers = true;
            }
        }
        if hungry || !active_answers {
            let since = self.demand.map_or(now, |(since, _)| since);
            self.demand = Some((since, now));
            self.connect_fallbacks(now, since, hungry, out);
        } else if let Some((_, last)) = self.demand {
            self.release_fallbacks(now, last, out);
        }
    }

    fn connect_fallbacks(&mut self, now: Tick, since: Tick, hungry: bool, out: &mut Vec<Effect>) {
        let fallbacks = || self.listed.iter().filter(|path| path.role == Role::Fallback);
        if !hungry && fallbacks().any(|path| matches!(path.link, Link::Up { .. })) {
            return;
        }
        let under_way = fallbacks()
            .filter(|path| matches!(path.link, Link::Connecting { .. }))
            .count() as u64;
        let turns = 1 + now.since_ms(since) / STAGGER_MS;
        let mut more = turns.saturating_sub(under_way);
        for index in 0..self.listed.len() {
            let path = &self.listed[index];
            if path.role != Role::Fallback || !matches!(path.link, Link::Standby) {
                continue;
            }
            if more == 0 {
                self.note(since.after_ms(turns * STAGGER_MS));
                return;
            }
            more -= 1;
            self.connect(index, out);
        }
    }

    fn release_fallbacks(&mut self, now: Tick, last_needed: Tick, out: &mut Vec<Effect>) {
        let mut kept_until = None::<Tick>;
        for path in &mut self.listed {
            if path.role != Role::Fallback {
                continue;
            }
            let Some(link) = path.link.id() else { continue };
            let idle_at = last_needed.max(path.last_used).after_ms(FALLBACK_IDLE_MS);
            if now >= idle_at && path.in_flight == 0 {
                path.link = Link::Standby;
                path.failures_in_a_row = 0;
                out.push(Effect::Close { path: path.id, link });
            } else {
                let look_at = idle_at.max(now.after_ms(STAGGER_MS));
                kept_until = Some(kept_until.map_or(look_at, |at| at.min(look_at)));
            }
        }
        match kept_until {
            Some(at) => self.note(at),
            None => self.demand = None,
        }
    }
}

/// A path that the new placement names again.
fn keep(now: Tick, mut path: Path, role: Role, spec: PathSpec) -> Path {
    if matches!(path.link, Link::Distrusted { until } if now >= until) {
        path.link = Link::Standby;
        path.failures_in_a_row = 0;
    }
    if role == Role::Active && matches!(path.link, Link::Standby) {
        // It connects now, as a new path does.
        path.listed = now;
        path.ever_up = false;
    }
    path.role = role;
    path.spec.label = spec.label;
    path.spec.chap = spec.chap;
    path
}

/// The delay after the `row`th failure in a row: doubled each time, then shortened by up to a quarter, so that
/// the children of a parent that comes back do not all knock at once.
pub(super) fn backoff_ms(seed: u64, row: u32) -> u64 {
    let doublings = row.saturating_sub(1).min(16);
    let full = (BACKOFF_FIRST_MS << doublings).min(BACKOFF_LAST_MS);
    full - scatter(seed.wrapping_add(u64::from(row))) % (full / 4)
}

/// The finaliser of SplitMix64: equal seeds give equal delays, near seeds give unlike ones.
fn scatter(seed: u64) -> u64 {
    let z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
