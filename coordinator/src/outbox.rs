//! What was decided and not told yet: the discipline that nothing is told before it is durable, as a value without I/O.
//!
//! The owner task and the simulation both go through it, so that what is simulated is what runs.

use std::collections::{BTreeMap, HashSet};

use crate::planted::{Bug, planted};
use crate::tree::{CallId, Change, Effect, Key, Note, Push, StreamId};

/// Decisions that wait for the record.
#[derive(Debug, Default)]
pub struct Outbox {
    /// Changes that are not durable yet, the newest of each key.
    unsaved: BTreeMap<Key, Change>,
    /// Effects that wait for them.
    held: Vec<Effect>,
}

impl Outbox {
    /// Takes a step's effects in. What is worth a line in the log needs not wait and is handed back.
    pub fn take(&mut self, effects: Vec<Effect>) -> Vec<Note> {
        let mut notes = Vec::new();
        for effect in effects {
            match effect {
                Effect::Save(Change::Delete(_)) if planted(Bug::RemovalNotSaved) => {}
                Effect::Save(change) => {
                    self.unsaved.insert(change.key().clone(), change);
                }
                Effect::Note(note) => notes.push(note),
                other => self.held.push(other),
            }
        }
        notes
    }

    /// What is to be made durable, as one.
    pub fn unsaved(&self) -> impl ExactSizeIterator<Item = &Change> {
        self.unsaved.values()
    }

    /// It is durable: what may be carried out now, in this order.
    pub fn saved(&mut self) -> Vec<Effect> {
        self.unsaved.clear();
        without_outdated(std::mem::take(&mut self.held))
    }

    /// It could not be made durable: these calls are to be told so, and these acknowledgements go out, because that a beat came is true
    /// whatever is kept. Other pushes wait, because a host must not act on what may be forgotten; they do not pile up meanwhile.
    pub fn not_saved(&mut self) -> (Vec<CallId>, Vec<(StreamId, Push)>) {
        let (mut calls, mut acks) = (Vec::new(), Vec::new());
        let mut held = std::mem::take(&mut self.held);
        held.retain(|effect| match effect {
            Effect::Answer(call, _) => {
                calls.push(*call);
                false
            }
            Effect::Push(stream, ack @ Push::Ack { .. }) => {
                acks.push((*stream, ack.clone()));
                false
            }
            _ => true,
        });
        self.held = without_outdated(held);
        (calls, acks)
    }
}

/// Of several placements for one host and image only the last is worth sending.
fn without_outdated(effects: Vec<Effect>) -> Vec<Effect> {
    let mut seen = HashSet::new();
    let mut kept: Vec<Effect> = effects
        .into_iter()
        .rev()
        .filter(|effect| match effect {
            Effect::Push(stream, Push::Placement(p)) => seen.insert((*stream, p.image.id.clone())),
            _ => true,
        })
        .collect();
    kept.reverse();
    kept
}
