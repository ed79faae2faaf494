//! The laws, looked at from outside: over what hosts hold and were told, and over what the coordinator lets out. Nothing of the trees'
//! own indices is believed.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hasher as _};

use treeboot_coordinator::tree::{
    Answer, AttachmentRecord, Call, Change, Effect, Key, Note, Push, Record, Settings, TreeView,
};
use treeboot_types::{Epoch, HostName, Placement};

use super::host::Host;
use super::racks::{self, Stand, Stands};
use super::scenario::{BEAT_MS, LEASE_MS, PENDING_MS};
use super::volt::{Request, Stepped};

/// How late the owner may see what is due: its clock, a write, and a message's way.
const SLACK_MS: u64 = 1_500;

/// A broken law.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The law, as a short name that stays.
    pub law: &'static str,
    /// When, in milliseconds of virtual time.
    pub at: u64,
    /// Who, and what was seen.
    pub why: String,
}

/// What the coordinator let out about one host.
#[derive(Debug, Default, Clone)]
struct Told {
    /// Of the last placement.
    epoch: Epoch,
    hash: u64,
    /// When its parents changed last, as its record says.
    position: Epoch,
    parents: u64,
    /// When it took its place.
    joined: Option<Epoch>,
    /// Of the placement that is in force.
    in_force: Epoch,
    /// It is not told of all its paths yet.
    waits: bool,
    /// When a sign of life of the host was taken in last.
    beat: Option<u64>,
    /// The stream and the number of its newest one.
    newest: (u64, u64),
    /// When a sign of its attachment was taken in last.
    sign: Option<u64>,
    /// The same, but for beats that newer ones had overtaken.
    claim: Option<u64>,
    /// When a removal was taken in last.
    removed: Option<u64>,
}

/// What the checkers remember.
#[derive(Debug, Default)]
pub struct Memory {
    told: BTreeMap<HostName, Told>,
    /// The highest epoch that anybody was told.
    pub carried: Epoch,
    /// When the coordinator's present life began.
    pub started: u64,
    /// When it stood still, and for how long; the latest last.
    pub pauses: Vec<(u64, u64)>,
    /// How often parents of a host changed.
    pub moved: u64,
    /// What may move hosts: who came, went, complained.
    pub disturbances: u64,
    /// Hosts that came back to a place that the record lacked.
    pub adopted: u64,
    /// Where hosts stand, as the coordinator was told.
    pub stands: Stands,
    /// Some hosts offer another number of slots than others.
    is_odd: bool,
}

fn hash_of(value: &impl std::hash::Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

pub(super) fn violation<T>(law: &'static str, at: u64, why: String) -> Result<T, Violation> {
    Err(Violation { law, at, why })
}

impl Memory {
    /// Nothing was seen yet. `is_odd` where some hosts offer other numbers of slots than most.
    #[must_use]
    pub fn new(is_odd: bool) -> Self {
        Self {
            is_odd,
            ..Self::default()
        }
    }

    /// Milliseconds since `then` in which the coordinator ran and did not stand still.
    fn heard_since(&self, then: u64, now: u64) -> (u64, u64) {
        let then = then.max(self.started);
        let pauses = self.pauses.iter().filter(|(at, ms)| at + ms > then);
        let (mut still, mut count) = (0, 0);
        for (at, ms) in pauses {
            still += (at + ms).min(now).saturating_sub((*at).max(then));
            count += 1;
        }
        (now.saturating_sub(then).saturating_sub(still), count)
    }

    /// The coordinator starts again from its record.
    ///
    /// # Errors
    /// Somebody was told more than the record has.
    pub fn restarted(
        &mut self,
        now: u64,
        epoch: Epoch,
        record: &BTreeMap<Key, Record>,
    ) -> Result<(), Violation> {
        self.started = now;
        let known = record.iter().filter_map(|(key, record)| match (key, record) {
            (Key::Host(name), Record::Host(host)) => Some((name.clone(), Stand::of(&host.info.labels))),
            _ => None,
        });
        self.stands = known.collect();
        for told in self.told.values_mut() {
            // What ended is not in the record, and what was decided and not written never was.
            (told.removed, told.joined, told.in_force) = (None, None, Epoch::default());
        }
        for (key, record) in record {
            if let (Key::Attachment(_, host), Record::Attachment(record)) = (key, record) {
                let told = self.told.entry(host.clone()).or_default();
                told.joined = Some(joined_at(record));
                told.position = record.position;
                told.parents = parents_hash(record);
                told.in_force = record.epoch;
                told.waits = !record.held_back.is_empty();
            }
        }
        if epoch < self.carried {
            let why = format!("the record has {epoch}, but somebody was told {}", self.carried);
            return violation("told before it was durable", now, why);
        }
        Ok(())
    }

    /// Looks at one step of the trees. `whose` is the host that an effect is for.
    ///
    /// # Errors
    /// A broken law.
    pub fn stepped(
        &mut self,
        now: u64,
        settings: &Settings,
        hosts: &[Host],
        whose: impl Fn(&Effect) -> Option<usize>,
        step: &Stepped,
    ) -> Result<(), Violation> {
        let late_beat = match &step.request {
            Some(Request::Beat(conn, beat, attached)) => {
                if let Some(state) = &beat.state {
                    let stand = Stand::of(&state.info.labels);
                    self.stands.insert(beat.speaker.host.clone(), stand);
                }
                let told = self.told.entry(beat.speaker.host.clone()).or_default();
                told.beat = Some(now);
                // One that newer ones have overtaken says what was so before them: its host may want the place no more.
                let is_newest = (*conn, beat.sequence) > told.newest;
                if is_newest {
                    told.newest = (*conn, beat.sequence);
                }
                if *attached {
                    told.sign = Some(now);
                    told.claim = if is_newest { told.sign } else { told.claim };
                }
                if !beat.bad_parents.is_empty() {
                    self.disturbances += 1;
                }
                Some((beat.speaker.host.clone(), *attached))
            }
            Some(Request::Call(_, call)) => {
                self.called(now, call, &step.effects)?;
                None
            }
            _ => None,
        };
        for effect in &step.effects {
            match effect {
                Effect::Save(Change::Put(Key::Attachment(_, host), Record::Attachment(record))) => {
                    self.recorded(host, record);
                }
                Effect::Save(Change::Delete(Key::Attachment(_, host))) => {
                    self.disturbances += 1;
                    if let Some(told) = self.told.get_mut(host) {
                        told.joined = None;
                    }
                }
                Effect::Note(note) => self.noted(now, note, late_beat.as_ref())?,
                _ => {}
            }
            if let (Some(placement), Some(host)) = (placement_in(effect), whose(effect)) {
                self.check_placement(now, settings, &hosts[host], placement)?;
            }
        }
        Ok(())
    }

    fn called(&mut self, now: u64, call: &Call, effects: &[Effect]) -> Result<(), Violation> {
        let answer = effects.iter().find_map(|effect| match effect {
            Effect::Answer(_, answer) => Some(answer),
            _ => None,
        });
        match (call, answer) {
            (Call::Join { speaker, .. }, Some(Ok(_))) => {
                let told = self.told.entry(speaker.host.clone()).or_default();
                (told.sign, told.claim) = (Some(now), Some(now));
                told.removed = None;
            }
            (Call::Register { speaker, epoch, .. }, Some(Ok(_))) => {
                let told = self.told.entry(speaker.host.clone()).or_default();
                (told.sign, told.claim) = (Some(now), Some(now));
                if *epoch < told.position {
                    let why = format!(
                        "{} registered with {epoch}, but its parents changed at {}",
                        speaker.host, told.position
                    );
                    return violation("a registration on parents of old is refused", now, why);
                }
            }
            (Call::Remove { speaker, epoch, .. }, Some(Ok(_))) => {
                let told = self.told.entry(speaker.host.clone()).or_default();
                if let Some(joined) = told.joined.filter(|joined| epoch.counter < joined.counter) {
                    let why = format!(
                        "{} was removed with {epoch}, but it joined at {joined}",
                        speaker.host
                    );
                    return violation("a removal from before the joining is refused", now, why);
                }
                told.removed = Some(now);
            }
            _ => {}
        }
        Ok(())
    }

    fn recorded(&mut self, host: &HostName, record: &AttachmentRecord) {
        let told = self.told.entry(host.clone()).or_default();
        let parents = parents_hash(record);
        if told.joined.is_none() {
            told.joined = Some(joined_at(record));
            told.position = record.epoch;
            self.disturbances += 1;
        } else if told.parents != parents {
            told.position = record.epoch;
            self.moved += 1;
        }
        told.parents = parents;
        told.in_force = record.epoch;
        told.waits = !record.held_back.is_empty();
    }

    fn noted(&mut self, now: u64, note: &Note, beat: Option<&(HostName, bool)>) -> Result<(), Violation> {
        match note {
            Note::HostLost { host, .. } => {
                let since = self
                    .told
                    .get(host)
                    .and_then(|told| told.beat)
                    .unwrap_or(self.started);
                let (heard, pauses) = self.heard_since(since, now);
                if heard + 2 * BEAT_MS * (pauses + 1) + SLACK_MS < LEASE_MS {
                    let why = format!("{host} was evicted {heard} ms after its last beat");
                    return violation("nobody is evicted before the lease ends", now, why);
                }
            }
            Note::LeaseEnded { host, .. } => {
                let since = self
                    .told
                    .get(host)
                    .and_then(|told| told.claim)
                    .unwrap_or(self.started);
                let (heard, pauses) = self.heard_since(since, now);
                if heard + 2 * BEAT_MS * pauses + SLACK_MS < PENDING_MS {
                    let why = format!("{host} lost its place {heard} ms after it was mentioned last");
                    return violation("nobody is evicted before the lease ends", now, why);
                }
            }
            Note::Attached { host, adopted, .. } => {
                if *adopted {
                    self.adopted += 1;
                }
                let removed = self.told.get(host).and_then(|told| told.removed);
                if let (Some(removed), Some((_, _))) = (removed, beat)
                    && now < removed + SLACK_MS
                {
                    let why = format!("{host} was removed at {removed} ms and is back by a beat");
                    return violation("a beat that was under way brings nobody back", now, why);
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Looks at what leaves the coordinator.
    ///
    /// # Errors
    /// A broken law.
    pub fn let_out(&mut self, now: u64, host: &Host, effect: &Effect) -> Result<(), Violation> {
        let Some(placement) = placement_in(effect) else {
            return Ok(());
        };
        self.carried = self.carried.max(placement.epoch);
        let name = &host.info.name;
        let hash = hash_of(&(format!("{:?}", placement.stripes), &placement.children));
        let told = self.told.entry(name.clone()).or_default();
        if placement.epoch < told.epoch {
            let why = format!("{name} was told {} after {}", placement.epoch, told.epoch);
            return violation("epochs never go back", now, why);
        }
        if placement.epoch == told.epoch && hash != told.hash {
            let why = format!("{name} was told two places with {}", placement.epoch);
            return violation("an epoch names one decision", now, why);
        }
        (told.epoch, told.hash) = (placement.epoch, hash);
        Ok(())
    }

    /// No slot without a lease: whoever stands in a tree gave a sign of its attachment within the lease. And a stripe comes into a rack
    /// over one link.
    ///
    /// # Errors
    /// A leaked lease, or a second link.
    pub fn check_tree(&self, now: u64, tree: &TreeView) -> Result<(), Violation> {
        for vertex in tree.vertices.iter().filter(|v| !v.origin) {
            let Some(host) = &vertex.host else { continue };
            let since = self.told.get(host).and_then(|told| told.sign).unwrap_or(0);
            let (heard, _) = self.heard_since(since, now);
            // A beat that was under way when the attachment ended may still have been taken in.
            if heard > LEASE_MS + 3 * BEAT_MS + SLACK_MS {
                let why = format!("{host} holds a slot {heard} ms after its last sign");
                return violation("no slot without a lease", now, why);
            }
        }
        racks::check_links(tree, &self.stands).or_else(|(law, why)| violation(law, now, why))
    }

    /// The epoch of the placement that is in force for a host.
    #[must_use]
    pub fn in_force(&self, host: &HostName) -> Epoch {
        self.told.get(host).map(|told| told.in_force).unwrap_or_default()
    }

    /// Whether a host is not told of all its paths yet.
    #[must_use]
    pub fn waits(&self, host: &HostName) -> bool {
        self.told.get(host).is_some_and(|told| told.waits)
    }

    /// What one placement may say, whatever the trees are.
    fn check_placement(
        &self,
        now: u64,
        settings: &Settings,
        host: &Host,
        placement: &Placement,
    ) -> Result<(), Violation> {
        let name = &host.info.name;
        if host.is_stored() {
            return Ok(());
        }
        for stripe in &placement.stripes {
            let all = || stripe.active.iter().chain(&stripe.fallbacks);
            if let Some(parent) =
                all().find(|parent| parent.depth >= stripe.depth || parent.host.as_ref() == Some(name))
            {
                let why = format!("{name} at depth {} is to read from {parent:?}", stripe.depth);
                return violation("every edge leads to a smaller depth", now, why);
            }
            if stripe.active.is_empty() || !all().any(|parent| parent.origin) {
                let why = format!("{name} is led to no origin in {}", stripe.stripe);
                return violation("everybody is led to an origin", now, why);
            }
        }
        let weight = host.info.weight;
        racks::check_slots(settings, name, weight, placement, &self.stands, self.is_odd)
            .or_else(|(law, why)| violation(law, now, why))
    }
}

fn joined_at(record: &AttachmentRecord) -> Epoch {
    Epoch {
        incarnation: record.epoch.incarnation,
        counter: record.joined,
    }
}

fn parents_hash(record: &AttachmentRecord) -> u64 {
    let of = |held: &treeboot_coordinator::tree::HeldShare| format!("{:?}", held.of);
    let stripes = record.stripes.iter();
    let parents: Vec<Vec<String>> = stripes.map(|s| s.iter().map(of).collect()).collect();
    hash_of(&parents)
}

fn placement_in(effect: &Effect) -> Option<&Placement> {
    match effect {
        Effect::Push(_, Push::Placement(placement)) => Some(placement),
        Effect::Answer(_, Ok(Answer::Joined(placement))) => Some(placement),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use treeboot_coordinator::tree::{Beat, Speaker};
    use treeboot_types::ImageId;

    use super::*;

    fn beat(sequence: u64, attached: bool) -> Stepped {
        let speaker = Speaker {
            host: HostName::new("h0").unwrap(),
            instance: String::new(),
        };
        let beat = Beat {
            sequence,
            speaker,
            digest: Vec::new(),
            state: None,
            bad_parents: Vec::new(),
        };
        Stepped {
            request: Some(Request::Beat(1, Box::new(beat), attached)),
            effects: Vec::new(),
        }
    }

    /// Whether a lease that ends 2 s after the last of these beats, which come a second apart, ends too early.
    fn ends_too_early(beats: &[(u64, bool)]) -> bool {
        let settings = super::super::Scenario::new(1, 4).settings;
        let mut memory = Memory::new(false);
        let mut now = 60_000;
        for &(sequence, attached) in beats {
            now += 1_000;
            let step = beat(sequence, attached);
            memory.stepped(now, &settings, &[], |_| None, &step).unwrap();
        }
        let ended = Stepped {
            request: None,
            effects: vec![Effect::Note(Note::LeaseEnded {
                host: HostName::new("h0").unwrap(),
                image: "debian@1".parse::<ImageId>().unwrap(),
            })],
        };
        let outcome = memory.stepped(now + 2_000, &settings, &[], |_| None, &ended);
        outcome.is_err()
    }

    /// Seed 116 of 24 hosts: a beat from before the end of an attachment came after one from behind it.
    #[test]
    fn a_beat_that_was_overtaken_is_no_sign_that_its_host_wants_the_place_still() {
        assert!(ends_too_early(&[(1, true), (2, true), (3, true), (4, true)]));
        assert!(!ends_too_early(&[(1, true), (3, false), (4, false), (2, true)]));
        assert!(ends_too_early(&[(1, true), (3, false), (2, true), (4, true)]));
    }
}
