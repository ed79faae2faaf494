//! The laws of a path group, under random events and by example.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use treeboot_types::{Iqn, Tick};

use super::links::backoff_ms;
use super::*;

fn spec(name: u8) -> PathSpec {
    PathSpec {
        portal: format!("10.0.0.{name}:3260"),
        target: Iqn::new("iqn.2026-11.dev.treeboot:image:a:1").unwrap(),
        label: format!("host{name}"),
        data_lun: 0,
        hash_lun: Some(1),
        chap: None,
    }
}

/// What the outside knows of a group, kept apart from the group's own books.
struct World {
    now: Tick,
    paths: Paths,
    limits: Limits,
    active: Vec<u8>,
    fallbacks: Vec<u8>,
    /// Which spec a path id stands for.
    names: BTreeMap<PathId, u8>,
    connecting: Vec<(PathId, LinkId)>,
    up: BTreeMap<PathId, LinkId>,
    silent: BTreeSet<PathId>,
    distrusted: BTreeMap<u8, Tick>,
    reads: BTreeMap<ReadId, Waiting>,
    next_read: u64,
    failed: Vec<(ReadId, Failure)>,
    active_bytes: u64,
    fallback_bytes: u64,
    issued: Vec<(ReadId, PathId)>,
    connects: Vec<(u8, Tick)>,
}

struct Waiting {
    started: Tick,
    avoid: Vec<PathId>,
    attempts: Vec<(PathId, LinkId)>,
    /// Paths that failed it, and when.
    failed_on: Vec<(PathId, Tick, bool)>,
    idle_since: Option<Tick>,
}

impl World {
    fn new(policy: PathPolicy) -> Self {
        let limits = Limits::default();
        Self {
            now: Tick(1_000),
            paths: Paths::new(policy, limits, 7),
            limits,
            active: Vec::new(),
            fallbacks: Vec::new(),
            names: BTreeMap::new(),
            connecting: Vec::new(),
            up: BTreeMap::new(),
            silent: BTreeSet::new(),
            distrusted: BTreeMap::new(),
            reads: BTreeMap::new(),
            next_read: 0,
            failed: Vec::new(),
            active_bytes: 0,
            fallback_bytes: 0,
            issued: Vec::new(),
            connects: Vec::new(),
        }
    }

    fn with(policy: PathPolicy, active: &[u8], fallbacks: &[u8]) -> Self {
        let mut world = Self::new(policy);
        world.list(active, fallbacks);
        world.connect_all();
        world
    }

    fn step(&mut self, event: Event) {
        let mut out = Vec::new();
        self.paths.step(self.now, event, &mut out);
        for effect in out {
            self.take(effect);
        }
    }

    fn take(&mut self, effect: Effect) {
        match effect {
            Effect::Connect { path, link, spec } => {
                let name = spec.portal["10.0.0.".len()..]
                    .split(':')
                    .next()
                    .unwrap()
                    .parse()
                    .unwrap();
                self.names.insert(path, name);
                assert!(self.distrusted.get(&name).is_none_or(|until| self.now >= *until));
                assert!(!self.up.contains_key(&path), "connects what is up");
                self.connecting.push((path, link));
                self.connects.push((name, self.now));
            }
            Effect::Close { path, link } => {
                let count = self.connecting.len() + self.up.len();
                self.connecting.retain(|c| *c != (path, link));
                self.up.retain(|p, l| (*p, *l) != (path, link));
                assert_eq!(
                    self.connecting.len() + self.up.len(),
                    count - 1,
                    "closes what is there"
                );
            }
            Effect::Issue { read, path, link, .. } => {
                self.check_choice(read, path, link);
                self.issued.push((read, path));
                let waiting = self.reads.get_mut(&read).unwrap();
                waiting.attempts.push((path, link));
                waiting.idle_since = None;
            }
            Effect::Abandon { read, path, link } => {
                let waiting = self.reads.get_mut(&read).unwrap();
                let count = waiting.attempts.len();
                waiting.attempts.retain(|a| *a != (path, link));
                assert_eq!(waiting.attempts.len(), count - 1);
                if waiting.attempts.is_empty() {
                    waiting.idle_since = Some(self.now);
                }
            }
            Effect::Fail { read, failure } => {
                self.reads.remove(&read).unwrap();
                self.failed.push((read, failure));
            }
        }
    }

    /// The law of choice, from the outside.
    fn check_choice(&self, read: ReadId, path: PathId, link: LinkId) {
        let waiting = &self.reads[&read];
        assert_eq!(self.up.get(&path), Some(&link), "asks a path that is up");
        assert!(!waiting.avoid.contains(&path), "asks a path that the read avoids");
        assert!(
            !waiting.attempts.iter().any(|a| a.0 == path),
            "asks twice at once"
        );
        assert!(waiting.attempts.len() < ATTEMPTS_AT_ONCE);
        let name = self.names[&path];
        if !self.active.contains(&name) {
            assert!(self.fallbacks.contains(&name), "asks a path that is listed");
            for (&other, _) in self
                .up
                .iter()
                .filter(|(other, _)| self.active.contains(&self.names[other]))
            {
                if self.state(other) == PathState::Suspect {
                    continue; // it may have stalled
                }
                assert!(
                    !self.can_serve(waiting, other),
                    "{path:?} is a fallback, {other:?} could serve"
                );
            }
        }
    }

    fn state(&self, id: PathId) -> PathState {
        let stats = self.paths.stats();
        stats
            .iter()
            .find(|path| path.id == id)
            .expect("a listed path")
            .state
    }

    fn can_serve(&self, waiting: &Waiting, path: PathId) -> bool {
        self.up.contains_key(&path)
            && !waiting.avoid.contains(&path)
            && !waiting.attempts.iter().any(|a| a.0 == path)
            && !waiting.failed_on.iter().any(|&(failed, at, lasting)| {
                failed == path && (lasting || self.now.since_ms(at) < COOLING_MS)
            })
    }

    fn list(&mut self, active: &[u8], fallbacks: &[u8]) {
        self.active = active.to_vec();
        self.fallbacks = fallbacks
            .iter()
            .copied()
            .filter(|f| !active.contains(f))
            .collect();
        self.step(Event::Listed {
            active: active.iter().map(|n| spec(*n)).collect(),
            fallbacks: fallbacks.iter().map(|n| spec(*n)).collect(),
        });
    }

    fn connect_all(&mut self) {
        while !self.connecting.is_empty() {
            self.connected(0);
        }
    }

    fn connected(&mut self, at: usize) {
        let (path, link) = self.connecting.remove(at);
        self.up.insert(path, link);
        self.silent.remove(&path);
        for waiting in self.reads.values_mut() {
            waiting
                .failed_on
                .retain(|(failed, _, lasting)| *failed != path || *lasting);
        }
        self.step(Event::Connected { path, link });
    }

    fn refuse(&mut self, at: usize) {
        let (path, link) = self.connecting.remove(at);
        let why = "connection refused".to_owned();
        self.step(Event::Lost { path, link, why });
    }

    fn path(&self, name: u8) -> PathId {
        *self.names.iter().rev().find(|(_, n)| **n == name).unwrap().0
    }

    fn lose(&mut self, path: PathId) {
        let Some(link) = self.up.remove(&path) else { return };
        let why = "reset by peer".to_owned();
        self.step(Event::Lost { path, link, why });
        // A read that was on it is elsewhere now, if there is an elsewhere.
        for (id, waiting) in &self.reads {
            let elsewhere = self.up.keys().any(|p| self.can_serve(waiting, *p));
            assert!(
                !waiting.attempts.is_empty() || !elsewhere || self.patient(waiting),
                "{id:?} is stuck"
            );
        }
    }

    /// The read may be waiting for an active path that was only just listed.
    fn patient(&self, waiting: &Waiting) -> bool {
        self.now.since_ms(waiting.started) < PATIENCE_MS
    }

    fn read(&mut self, avoid: Vec<PathId>) -> ReadId {
        self.next_read += 1;
        let read = ReadId(self.next_read);
        self.reads.insert(
            read,
            Waiting {
                started: self.now,
                avoid: avoid.clone(),
                attempts: Vec::new(),
                failed_on: Vec::new(),
                idle_since: Some(self.now),
            },
        );
        self.step(Event::Read {
            read,
            lun: Lun::Data,
            avoid,
        });
        read
    }

    fn answer(&mut self, read: ReadId, at: usize, bytes: u64) -> PathId {
        let (path, link) = self.reads.remove(&read).unwrap().attempts[at];
        match self.active.contains(&self.names[&path]) {
            true => self.active_bytes += bytes,
            false => self.fallback_bytes += bytes,
        }
        self.step(Event::Answered {
            read,
            path,
            link,
            outcome: Outcome::Bytes {
                bytes,
                service_us: 300,
            },
        });
        path
    }

    fn fail_attempt(&mut self, read: ReadId, at: usize, lasting: bool) {
        let now = self.now;
        let waiting = self.reads.get_mut(&read).unwrap();
        let (path, link) = waiting.attempts.remove(at);
        waiting.failed_on.push((path, now, lasting));
        if waiting.attempts.is_empty() {
            waiting.idle_since = Some(now);
        }
        let why = "medium error".to_owned();
        self.step(Event::Answered {
            read,
            path,
            link,
            outcome: Outcome::Failed { why, lasting },
        });
    }

    fn distrust(&mut self, path: PathId) {
        let name = self.names[&path];
        self.distrusted.insert(name, self.now.after_ms(DISTRUST_MS));
        self.step(Event::Distrusted { path });
        assert!(!self.up.keys().any(|p| self.names[p] == name));
    }

    /// Lets time pass; the timer comes exactly when it is asked for.
    fn advance(&mut self, ms: u64) {
        let end = self.now.after_ms(ms);
        for _ in 0..100_000 {
            let next = self.paths.wake_at();
            if next > end {
                self.now = end;
                self.check_bounds();
                return;
            }
            assert!(
                next > self.now,
                "a timer that does not move: {next:?} at {:?}",
                self.now
            );
            self.now = next;
            self.step(Event::Timer);
            self.check_bounds();
        }
        panic!("the timer spins");
    }

    /// The law of bounds, from the outside.
    fn check_bounds(&self) {
        for (id, waiting) in &self.reads {
            assert!(
                self.now.since_ms(waiting.started) < self.limits.read_ms,
                "{id:?} has no end"
            );
            if let Some(since) = waiting.idle_since {
                assert!(
                    self.now.since_ms(since) < self.limits.wait_ms,
                    "{id:?} waits without bound"
                );
            }
        }
    }

    fn check_totals(&self) {
        let totals = self.paths.totals();
        assert_eq!(totals.active_bytes, self.active_bytes);
        assert_eq!(totals.fallback_bytes, self.fallback_bytes);
        for path in self.paths.stats() {
            let up = self.up.contains_key(&path.id);
            assert_eq!(
                up,
                matches!(path.state, PathState::Up | PathState::Suspect),
                "{path:?}"
            );
        }
    }
}

#[derive(Debug, Clone)]
enum Action {
    Advance(u64),
    List(Vec<u8>, Vec<u8>),
    Read(u8),
    Answer(usize, usize),
    FailAttempt(usize, usize, bool),
    Connected(usize),
    Refused(usize),
    Lose(usize),
    Silent(usize, bool),
    Distrust(usize),
    Cancel(usize),
    StaleLoss(u64, u64),
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let names = || proptest::collection::vec(0u8..6, 0..4);
    let action = prop_oneof![
        3 => prop_oneof![0u64..20, 0u64..400, 0u64..12_000].prop_map(Action::Advance),
        1 => (names(), names()).prop_map(|(a, f)| Action::List(a, f)),
        6 => any::<u8>().prop_map(Action::Read),
        6 => (0usize..64, 0usize..3).prop_map(|(r, a)| Action::Answer(r, a)),
        2 => (0usize..64, 0usize..3, any::<bool>()).prop_map(|(r, a, l)| Action::FailAttempt(r, a, l)),
        6 => (0usize..8).prop_map(Action::Connected),
        2 => (0usize..8).prop_map(Action::Refused),
        2 => (0usize..8).prop_map(Action::Lose),
        1 => (0usize..8, any::<bool>()).prop_map(|(p, s)| Action::Silent(p, s)),
        1 => (0usize..8).prop_map(Action::Distrust),
        1 => (0usize..64).prop_map(Action::Cancel),
        1 => (0u64..9, 0u64..20).prop_map(|(p, l)| Action::StaleLoss(p, l)),
    ];
    proptest::collection::vec(action, 1..120)
}

impl World {
    fn act(&mut self, action: Action) {
        match action {
            Action::Advance(ms) => self.advance(ms),
            Action::List(active, fallbacks) => self.list(&active, &fallbacks),
            Action::Read(mask) => {
                let avoid = self
                    .names
                    .keys()
                    .copied()
                    .filter(|p| mask.wrapping_shr(p.0 as u32) & 3 == 3);
                let avoid = avoid.collect();
                self.read(avoid);
            }
            Action::Answer(read, at) => {
                if let Some((id, at)) = self.nth_attempt(read, at) {
                    self.answer(id, at, 4096);
                }
            }
            Action::FailAttempt(read, at, lasting) => {
                if let Some((id, at)) = self.nth_attempt(read, at) {
                    self.fail_attempt(id, at, lasting);
                }
            }
            Action::Connected(at) if at < self.connecting.len() => self.connected(at),
            Action::Refused(at) if at < self.connecting.len() => self.refuse(at),
            Action::Lose(at) => {
                if let Some(path) = self.up.keys().nth(at).copied() {
                    self.lose(path);
                }
            }
            Action::Silent(at, silent) => {
                if let Some((&path, &link)) = self.up.iter().nth(at) {
                    self.step(Event::Suspected { path, link, silent });
                }
            }
            Action::Distrust(at) => {
                if let Some(path) = self.names.keys().nth(at).copied() {
                    self.distrust(path);
                }
            }
            Action::Cancel(read) => {
                if let Some(id) = self.reads.keys().nth(read).copied() {
                    self.reads.remove(&id);
                    self.step(Event::Cancelled { read: id });
                }
            }
            Action::StaleLoss(path, link) => {
                let (path, link) = (PathId(path), LinkId(link));
                let current = self.up.get(&path) == Some(&link) || self.connecting.contains(&(path, link));
                if !current {
                    let why = "stale".to_owned();
                    self.step(Event::Lost { path, link, why });
                }
            }
            Action::Connected(_) | Action::Refused(_) => {}
        }
    }

    fn nth_attempt(&self, read: usize, at: usize) -> Option<(ReadId, usize)> {
        let mut under_way = self.reads.iter().filter(|(_, w)| !w.attempts.is_empty());
        let (id, waiting) = under_way.nth(read)?;
        Some((*id, at % waiting.attempts.len()))
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn every_read_ends_within_its_bound_and_is_asked_only_where_it_may(
        policy in prop_oneof![
            Just(PathPolicy::RoundRobin),
            Just(PathPolicy::ServiceTime),
            Just(PathPolicy::QueueLength)
        ],
        actions in actions(),
    ) {
        let mut world = World::new(policy);
        world.list(&[0, 1], &[2, 3]);
        for action in actions {
            world.act(action);
            world.check_bounds();
            world.check_totals();
        }
        // Nothing more happens: whatever is under way still ends.
        world.advance(world.limits.read_ms);
        prop_assert!(world.reads.is_empty());
        let stats = world.paths.stats();
        prop_assert!(stats.iter().all(|path| path.in_flight == 0));
    }

    #[test]
    fn with_a_path_that_works_no_read_fails(
        actions in actions(),
    ) {
        // Path 9 is always listed last, its connects always succeed, and it always answers.
        let mut world = World::new(PathPolicy::RoundRobin);
        world.list(&[0, 1], &[2, 9]);
        let serve = |world: &mut World| {
            while let Some(at) = world.connecting.iter().position(|(p, _)| world.names[p] == 9) {
                world.connected(at);
            }
            loop {
                let on_nine = world.reads.iter().find_map(|(id, waiting)| {
                    let at = waiting.attempts.iter().position(|(p, _)| world.names[p] == 9)?;
                    Some((*id, at))
                });
                let Some((read, at)) = on_nine else { break };
                world.answer(read, at, 4096);
            }
        };
        for action in actions {
            match action {
                Action::List(active, mut fallbacks) => {
                    fallbacks.retain(|f| !active.contains(f));
                    fallbacks.push(9);
                    world.list(&active, &fallbacks);
                }
                Action::Read(_) => { world.read(Vec::new()); }
                Action::FailAttempt(read, at, _) => {
                    if let Some((id, at)) = world.nth_attempt(read, at) {
                        world.fail_attempt(id, at, false);
                    }
                }
                Action::Lose(at) => {
                    let mut others = world.up.keys().copied().filter(|p| world.names[p] != 9);
                    if let Some(path) = others.nth(at) {
                        world.lose(path);
                    }
                }
                Action::Distrust(_) => {}
                Action::Advance(ms) => {
                    let end = world.now.after_ms(ms);
                    while world.now < end {
                        let next = world.paths.wake_at().min(end);
                        let by = next.since_ms(world.now);
                        world.advance(by);
                        serve(&mut world);
                    }
                }
                other => world.act(other),
            }
            serve(&mut world);
        }
        prop_assert!(world.failed.is_empty(), "{:?}", world.failed);
    }

    #[test]
    fn backoff_grows_within_its_bounds(seed in any::<u64>(), row in 1u32..100) {
        let delay = backoff_ms(seed, row);
        let full = 50u64.saturating_mul(1 << (row - 1).min(10)).min(2_000);
        prop_assert!(delay <= full && delay * 4 > full * 3, "{delay} of {full}");
    }
}

#[test]
fn round_robin_gives_each_path_its_turn() {
    let mut world = World::with(PathPolicy::RoundRobin, &[1, 2, 3], &[4]);
    let mut counts = BTreeMap::<PathId, u32>::new();
    for _ in 0..300 {
        let read = world.read(Vec::new());
        *counts.entry(world.answer(read, 0, 1)).or_default() += 1;
    }
    assert_eq!(counts.values().copied().collect::<Vec<_>>(), [100, 100, 100]);
    assert!(
        !world.names.values().any(|name| *name == 4),
        "nobody needed the fallback, and it was called"
    );
}

#[test]
fn a_path_that_comes_back_gets_its_share_and_no_more() {
    let mut world = World::with(PathPolicy::RoundRobin, &[1, 2], &[]);
    for _ in 0..10 {
        let read = world.read(Vec::new());
        world.answer(read, 0, 1);
    }
    world.lose(world.path(1));
    for _ in 0..50 {
        let read = world.read(Vec::new());
        world.answer(read, 0, 1);
    }
    world.advance(100);
    world.connect_all();
    let (mut one, path) = (0, world.path(1));
    for _ in 0..20 {
        let read = world.read(Vec::new());
        one += u32::from(world.answer(read, 0, 1) == path);
    }
    assert_eq!(one, 10);
}

#[test]
fn the_shortest_queue_and_the_quickest_path_are_preferred() {
    let mut world = World::with(PathPolicy::QueueLength, &[1, 2], &[]);
    let first = world.read(Vec::new());
    let second = world.read(Vec::new());
    let taken = [first, second].map(|r| world.reads[&r].attempts[0].0);
    assert_ne!(taken[0], taken[1]);
    let free = world.answer(second, 0, 1);
    let third = world.read(Vec::new());
    assert_eq!(world.reads[&third].attempts[0].0, free);

    let mut world = World::with(PathPolicy::ServiceTime, &[1, 2], &[]);
    let slow = world.path(1);
    let mut on_slow = 0;
    for _ in 0..40 {
        let read = world.read(Vec::new());
        let waiting = world.reads.remove(&read).unwrap();
        let (path, link) = waiting.attempts[0];
        let service_us = if path == slow { 50_000 } else { 500 };
        on_slow += u32::from(path == slow);
        let outcome = Outcome::Bytes { bytes: 1, service_us };
        let answered = Event::Answered {
            read,
            path,
            link,
            outcome,
        };
        world.step(answered);
    }
    assert!(on_slow <= 2, "{on_slow} reads went to the slow path");
    // After a while it gets another chance.
    world.advance(30_000);
    let reads: Vec<ReadId> = (0..2).map(|_| world.read(Vec::new())).collect();
    assert!(reads.iter().any(|r| world.reads[r].attempts[0].0 == slow));
}

#[test]
fn a_read_waits_a_moment_for_a_parent_that_is_attaching_then_takes_the_fallback() {
    let mut world = World::new(PathPolicy::RoundRobin);
    world.list(&[1], &[2]);
    let read = world.read(Vec::new());
    world.advance(PATIENCE_MS - 1);
    assert!(
        !world.names.values().any(|name| *name == 2),
        "the fallback is left alone"
    );
    world.advance(1);
    let at = world
        .connecting
        .iter()
        .position(|(p, _)| world.names[p] == 2)
        .unwrap();
    world.connected(at);
    assert_eq!(world.answer(read, 0, 1), world.path(2));

    let mut world = World::new(PathPolicy::RoundRobin);
    world.list(&[1], &[2]);
    let read = world.read(Vec::new());
    world.advance(100);
    world.connect_all();
    assert_eq!(world.answer(read, 0, 1), world.path(1));
    assert_eq!(world.paths.totals().fallback_bytes, 0);
}

#[test]
fn a_parent_that_never_connects_does_not_delay_reads_for_ever() {
    let mut world = World::new(PathPolicy::RoundRobin);
    world.list(&[1], &[2]);
    world.advance(HOPE_MS);
    let at = world
        .connecting
        .iter()
        .position(|(p, _)| world.names[p] == 2)
        .unwrap();
    world.connected(at);
    let read = world.read(Vec::new());
    assert_eq!(world.reads[&read].attempts.len(), 1);
}

#[test]
fn a_lost_parent_costs_nothing_while_another_is_up() {
    let mut world = World::with(PathPolicy::RoundRobin, &[1, 2], &[3]);
    let reads: Vec<ReadId> = (0..10).map(|_| world.read(Vec::new())).collect();
    world.lose(world.path(1));
    let two = world.path(2);
    assert!(reads.iter().all(|r| world.reads[r].attempts[0].0 == two));
    assert_eq!(world.paths.totals().moved, 5);
}

#[test]
fn a_silent_parent_makes_the_fallback_ready() {
    let mut world = World::with(PathPolicy::RoundRobin, &[1], &[2, 3]);
    let read = world.read(Vec::new());
    let one = world.path(1);
    let link = world.up[&one];
    world.step(Event::Suspected {
        path: one,
        link,
        silent: true,
    });
    assert_eq!(world.connecting.len(), 1, "the first fallback, not both");
    world.connect_all();
    world.advance(500);
    world.lose(one);
    assert_eq!(world.answer(read, 0, 1), world.path(2));
    assert!(!world.names.values().any(|name| *name == 3));
}

#[test]
fn fallbacks_are_tried_one_after_the_other_and_let_go_when_idle() {
    let mut world = World::with(PathPolicy::RoundRobin, &[1], &[2, 3, 4]);
    world.lose(world.path(1));
    assert_eq!(world.connecting.len(), 1);
    world.advance(STAGGER_MS);
    assert!(world.connecting.iter().any(|(p, _)| world.names[p] == 3));
    world.connect_all();
    let read = world.read(Vec::new());
    assert_eq!(world.answer(read, 0, 1), world.path(1), "the parent is back");
    world.advance(FALLBACK_IDLE_MS + STAGGER_MS);
    let up: Vec<u8> = world.up.keys().map(|p| world.names[p]).collect();
    assert_eq!(up, [1]);
}

#[test]
fn a_slow_read_is_hedged_and_the_first_answer_counts() {
    let mut world = World::with(PathPolicy::RoundRobin, &[1, 2], &[3]);
    let read = world.read(Vec::new());
    world.advance(world.limits.hedge_ms - 1);
    assert_eq!(world.reads[&read].attempts.len(), 1);
    world.advance(1);
    assert_eq!(world.reads[&read].attempts.len(), 2);
    world.answer(read, 1, 10);
    assert!(world.paths.stats().iter().all(|path| path.in_flight == 0));
    assert_eq!(world.paths.totals().hedges, 1);
}

#[test]
fn a_parent_that_answers_no_read_is_asked_now_and_then_until_it_does() {
    let mut world = World::with(PathPolicy::RoundRobin, &[1], &[2]);
    let (one, hedge_ms) = (world.path(1), world.limits.hedge_ms);
    let reads: Vec<ReadId> = (0..50).map(|_| world.read(Vec::new())).collect();
    world.advance(hedge_ms);
    assert_eq!(world.state(one), PathState::Suspect);
    world.connect_all();
    assert!(
        reads.iter().all(|read| world.reads[read].attempts.len() == 2),
        "all are hedged at once"
    );
    for read in reads {
        assert_ne!(world.answer(read, 1, 1), one);
    }
    let read = world.read(Vec::new());
    assert_ne!(world.answer(read, 0, 1), one, "further reads do not wait for it");
    world.advance(PROBE_MS);
    let probe = world.read(Vec::new());
    let other = world.read(Vec::new());
    assert_ne!(world.answer(other, 0, 1), one, "one probe, not two");
    assert_eq!(world.answer(probe, 0, 1), one);
    assert_eq!(world.state(one), PathState::Up);
}

#[test]
fn a_parent_that_is_only_overloaded_does_not_flood_the_fallback() {
    let mut world = World::with(PathPolicy::RoundRobin, &[1], &[2]);
    let reads: Vec<ReadId> = (0..50).map(|_| world.read(Vec::new())).collect();
    world.advance(world.limits.hedge_ms - 10);
    world.answer(reads[0], 0, 1);
    world.advance(20);
    world.connect_all();
    let hedged = reads[1..]
        .iter()
        .filter(|read| world.reads[read].attempts.len() == 2)
        .count();
    assert_eq!(hedged, FALLBACK_HEDGES);
}

#[test]
fn with_nothing_up_a_read_ends_with_what_each_path_said() {
    let mut world = World::new(PathPolicy::RoundRobin);
    world.list(&[1], &[2]);
    world.read(Vec::new());
    for _ in 0..200 {
        while !world.connecting.is_empty() {
            world.refuse(0);
        }
        world.advance(100);
    }
    let (_, failure) = &world.failed[0];
    assert_eq!(failure.waited_ms, world.limits.wait_ms);
    let said: Vec<_> = failure
        .paths
        .iter()
        .map(|p| (p.label.as_str(), p.why.as_str()))
        .collect();
    assert_eq!(
        said,
        [("host1", "connection refused"), ("host2", "connection refused")]
    );
}

#[test]
fn reconnects_have_growing_delays_and_never_stop() {
    let mut world = World::with(PathPolicy::RoundRobin, &[1], &[]);
    world.lose(world.path(1));
    for _ in 0..600 {
        while !world.connecting.is_empty() {
            world.refuse(0);
        }
        world.advance(50);
    }
    let times: Vec<u64> = world.connects.iter().map(|(_, at)| at.0).collect();
    let gaps: Vec<u64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!(
        gaps[0] <= 50 && gaps.iter().all(|gap| *gap <= BACKOFF_LAST_MS + 50),
        "{gaps:?}"
    );
    assert!(gaps.len() > 15, "{gaps:?}");
    assert!(*gaps.last().unwrap() >= 1_500);
}

#[test]
fn a_read_that_every_path_refuses_ends_at_once() {
    let mut world = World::with(PathPolicy::RoundRobin, &[1, 2], &[]);
    let read = world.read(Vec::new());
    world.fail_attempt(read, 0, true);
    assert!(world.failed.is_empty());
    world.fail_attempt(read, 0, true);
    assert_eq!(world.failed.len(), 1);
    assert_eq!(world.failed[0].1.waited_ms, 0);
}

#[test]
fn a_distrusted_path_stays_out_until_it_is_named_anew_after_its_time() {
    let mut world = World::with(PathPolicy::RoundRobin, &[1, 2], &[]);
    let one = world.path(1);
    world.distrust(one);
    world.list(&[2], &[]); // leaving the list and coming back is no way round
    world.list(&[1, 2], &[]);
    world.advance(DISTRUST_MS + 1);
    assert_eq!(world.up.len(), 1);
    world.list(&[1, 2], &[]);
    world.connect_all();
    assert_eq!(world.up.len(), 2);
}

#[test]
fn paths_that_stay_keep_their_session() {
    let mut world = World::with(PathPolicy::RoundRobin, &[1, 2], &[3]);
    let before = world.up.clone();
    let connects = world.connects.len();
    world.list(&[2, 4], &[1]);
    assert_eq!(world.connects.len(), connects + 1, "only the new one connects");
    assert!(before.iter().all(|(path, link)| world.up.get(path) == Some(link)));
    world.list(&[4], &[]);
    assert_eq!(world.up.len(), 0);
}
