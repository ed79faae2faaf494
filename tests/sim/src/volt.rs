//! The coordinator's process: the real trees and the real outbox, with the owner task's turns in virtual time and a record that can end
//! the process at any of its writes.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use treeboot_coordinator::outbox::Outbox;
use treeboot_coordinator::tree::{
    Beat, Call, CallId, Change, Effect, Event, Forest, Key, Note, Push, Record, Settings, StreamId,
};
use treeboot_types::Tick;

use super::scenario::BEAT_MS;

/// What waits for the owner.
#[derive(Debug, Clone)]
pub enum Request {
    /// A beat, and whether its host was attached when it was sent.
    Beat(u64, Box<Beat>, bool),
    /// A stream's end.
    Closed(u64),
    /// A call; its number, and who made it.
    Call(u64, Box<Call>),
}

/// What an event brought about, for the checkers.
#[derive(Debug)]
pub struct Stepped {
    /// What was stepped.
    pub request: Option<Request>,
    /// What came of it.
    pub effects: Vec<Effect>,
}

/// The process, running or not.
#[derive(Debug)]
pub struct Volt {
    /// Whether it runs.
    pub up: bool,
    /// Which of its lives this is.
    pub life: u32,
    /// The trees; those of the last life while it does not run.
    pub forest: Forest,
    /// What is on the disk.
    pub record: BTreeMap<Key, Record>,
    /// What should be: told by the trees alone, without the outbox.
    pub expected: BTreeMap<Key, Record>,
    /// Changes that belong to the next write.
    pub next_expected: Vec<Change>,
    /// Streams that it holds.
    pub open: BTreeSet<u64>,
    /// Waits for the owner.
    pub inbox: VecDeque<Request>,
    /// The record is being written.
    pub writing: bool,
    /// Until when it stands still.
    pub paused_until: u64,
    /// Until when its disk is full.
    pub full_until: u64,
    /// Writes to come before it dies: how many, whether before the record has it, and for how long.
    pub dies_at: Option<(u64, bool, u64)>,
    /// Batches written.
    pub writes: u64,
    closed: BTreeSet<u64>,
    /// Changes of which the world heard already: a planted bug.
    early: Vec<Change>,
    outbox: Outbox,
    started: u64,
    looked: u64,
}

impl Volt {
    /// A coordinator that runs, with nothing in its record.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self {
            up: true,
            life: 1,
            forest: Forest::new(settings),
            record: BTreeMap::new(),
            expected: BTreeMap::new(),
            next_expected: Vec::new(),
            open: BTreeSet::new(),
            inbox: VecDeque::new(),
            writing: false,
            paused_until: 0,
            full_until: 0,
            dies_at: None,
            writes: 0,
            closed: BTreeSet::new(),
            early: Vec::new(),
            outbox: Outbox::default(),
            started: 0,
            looked: 0,
        }
    }

    /// The owner's turn: all that waits is stepped, then the clock where it is due. Returns whether something is to be
    /// written.
    pub fn turn(&mut self, now: u64, stepped: &mut Vec<Stepped>) -> bool {
        while let Some(request) = self.inbox.pop_front() {
            let event = match &request {
                Request::Beat(conn, beat, _) => {
                    if self.closed.contains(conn) {
                        continue;
                    }
                    self.open.insert(*conn);
                    Event::Beat(StreamId(*conn), beat.clone())
                }
                Request::Closed(conn) => {
                    self.close(*conn);
                    Event::StreamClosed(StreamId(*conn))
                }
                Request::Call(id, call) => Event::Call(CallId(*id), call.clone()),
            };
            self.step(now, event, Some(request), stepped);
        }
        if now >= self.looked + BEAT_MS / 4 {
            self.looked = now;
            self.step(now, Event::Clock, None, stepped);
        }
        self.outbox.unsaved().len() > 0
    }

    fn step(&mut self, now: u64, event: Event, request: Option<Request>, stepped: &mut Vec<Stepped>) {
        let mut effects = Vec::new();
        self.forest.step(Tick(now - self.started), event, &mut effects);
        self.next_expected
            .extend(effects.iter().filter_map(|effect| match effect {
                Effect::Save(change) => Some(change.clone()),
                _ => None,
            }));
        // Notes are for the log, and here for the checkers, which get all effects.
        let _: Vec<Note> = self.outbox.take(effects.clone());
        stepped.push(Stepped { request, effects });
    }

    /// A stream is of no use any more.
    pub fn close(&mut self, conn: u64) {
        self.open.remove(&conn);
        self.closed.insert(conn);
    }

    /// The record takes the batch.
    pub fn write(&mut self) {
        self.writes += 1;
        let mut batch = std::mem::take(&mut self.early);
        batch.extend(self.outbox.unsaved().cloned());
        apply(&mut self.record, batch);
        apply(&mut self.expected, std::mem::take(&mut self.next_expected));
    }

    /// What may be carried out now that the record has it.
    pub fn carry_out(&mut self) -> Vec<Effect> {
        self.outbox.saved()
    }

    /// What a planted bug carries out before the record has it.
    pub fn carry_out_unsaved(&mut self) -> Vec<Effect> {
        self.early.extend(self.outbox.unsaved().cloned());
        self.outbox.saved()
    }

    /// The record could not be written; who waits is told so.
    pub fn not_written(&mut self) -> (Vec<CallId>, Vec<(StreamId, Push)>) {
        self.outbox.not_saved()
    }

    /// The process ends, whatever it was doing.
    pub fn die(&mut self) {
        self.up = false;
        self.life += 1;
        self.writing = false;
        self.dies_at = None;
        self.paused_until = 0;
        self.inbox.clear();
        self.next_expected.clear();
        self.early.clear();
        self.outbox = Outbox::default();
        let open = std::mem::take(&mut self.open);
        self.closed.extend(open);
    }

    /// It starts from its record, as the daemon does: corrections of the record are written before anything else.
    ///
    /// # Errors
    /// The record makes no trees.
    pub fn start(&mut self, now: u64) -> Result<(), String> {
        let settings = self.forest.settings().clone();
        let records = self.record.clone().into_iter().collect();
        let mut effects = Vec::new();
        self.forest = Forest::load(settings, records, &mut effects).map_err(|error| error.to_string())?;
        let mut changes: Vec<Change> = effects
            .into_iter()
            .filter_map(|effect| match effect {
                Effect::Save(change) => Some(change),
                _ => None,
            })
            .collect();
        changes.push(Change::Put(Key::Epoch, Record::Epoch(self.forest.epoch())));
        apply(&mut self.expected, changes.clone());
        apply(&mut self.record, changes);
        self.up = true;
        self.started = now;
        self.looked = now;
        Ok(())
    }
}

fn apply(record: &mut BTreeMap<Key, Record>, changes: Vec<Change>) {
    for change in changes {
        match change {
            Change::Put(key, value) => {
                record.insert(key, value);
            }
            Change::Delete(key) => {
                record.remove(&key);
            }
        }
    }
}
