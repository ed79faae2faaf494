//! The coordinator's side of the network: its owner's turns, its writes and deaths, its messages, and calls to it.

use treeboot_coordinator::tree::{Call, CallId, Effect, Note, Push, Refusal, StreamId};
use treeboot_types::Epoch;

use super::super::bugs;
use super::super::check::Violation;
use super::super::host::{For, Message, Reply};
use super::super::scenario::BEAT_MS;
use super::super::volt::{Request, Stepped};
use super::{Event, Pending, World};

/// Longest wait for the answer to a call, as the link has it.
const CALL_LIMIT_MS: u64 = 5_000;

impl World {
    pub(super) fn turn_soon(&mut self) {
        if !self.turn_due && !self.volt.writing {
            self.turn_due = true;
            self.after(0, Event::Turn(self.volt.life));
        }
    }

    pub(super) fn owner_turn(&mut self) {
        let mut stepped: Vec<Stepped> = Vec::new();
        let to_write = self.volt.turn(self.now, &mut stepped);
        for step in stepped {
            self.counts.steps += 1;
            let settings = &self.scenario.settings;
            let (conns, calls) = (&self.conns, &self.calls);
            let whose = |effect: &Effect| match effect {
                Effect::Push(StreamId(conn), _) => conns.get(conn).map(|(host, _)| *host),
                Effect::Answer(CallId(id), _) => calls.get(id).map(|pending| pending.host),
                _ => None,
            };
            let outcome = self.memory.stepped(self.now, settings, &self.hosts, whose, &step);
            self.broken(outcome);
            for effect in &step.effects {
                if let Effect::Note(note) = effect
                    && !matches!(note, Note::Refused { .. })
                {
                    self.say(|_| format!("coordinator: {note:?}"));
                }
            }
        }
        if to_write {
            if bugs::is_answered_before_saved() {
                self.carry_out_early();
            }
            self.volt.writing = true;
            let ms = self.chance.within(1, 6);
            self.after(ms, Event::Written(self.volt.life));
        } else {
            self.carry_out();
        }
    }

    pub(super) fn written(&mut self) {
        if self.volt.paused_until > self.now {
            return self.at(self.volt.paused_until, Event::Written(self.volt.life));
        }
        self.volt.writing = false;
        if self.volt.full_until > self.now {
            let (calls, acks) = self.volt.not_written();
            for CallId(id) in calls {
                self.reply(id, Reply::Unavailable);
            }
            for (StreamId(conn), ack) in acks {
                self.push(conn, ack);
            }
            return;
        }
        let is_faulty = self.is_faulty();
        let dies = match self.volt.dies_at.as_mut().filter(|_| is_faulty) {
            Some((0, before, ms)) => Some((*before, *ms)),
            Some((writes, _, _)) => {
                *writes -= 1;
                None
            }
            None => None,
        };
        if let Some((true, ms)) = dies {
            return self.kill_volt(ms, "before a write");
        }
        self.volt.write();
        self.counts.writes += 1;
        if let Some((false, ms)) = dies {
            return self.kill_volt(ms, "after a write");
        }
        self.carry_out();
        if !self.volt.inbox.is_empty() {
            self.turn_soon();
        }
    }

    pub(super) fn carry_out(&mut self) {
        let effects = self.volt.carry_out();
        self.send_all(effects);
    }

    /// What the planted bug does: the world hears of it before the record does.
    pub(super) fn carry_out_early(&mut self) {
        let effects = self.volt.carry_out_unsaved();
        self.send_all(effects);
    }

    pub(super) fn send_all(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            let whom = match &effect {
                Effect::Push(StreamId(conn), _) => self.conns.get(conn).map(|(host, _)| *host),
                Effect::Answer(CallId(id), _) => self.calls.get(id).map(|pending| pending.host),
                _ => None,
            };
            if let Some(host) = whom {
                let outcome = self.memory.let_out(self.now, &self.hosts[host], &effect);
                self.broken(outcome);
            }
            match effect {
                Effect::Push(StreamId(conn), push) => self.push(conn, push),
                Effect::Close(StreamId(conn)) => {
                    self.volt.close(conn);
                    self.send_down(conn, None);
                }
                Effect::Answer(CallId(id), answer) => self.reply(id, Reply::Said(answer)),
                Effect::Save(_) | Effect::Note(_) => {}
            }
        }
    }

    pub(super) fn push(&mut self, conn: u64, push: Push) {
        if !self.volt.open.contains(&conn) {
            return;
        }
        let again = self.scenario.network.reorders
            && matches!(push, Push::Placement(_) | Push::Detach { .. })
            && self.chance.permille(self.scenario.network.doubled);
        if again {
            self.send_down(conn, Some(Box::new(push.clone())));
        }
        self.send_down(conn, Some(Box::new(push)));
    }

    pub(super) fn send_down(&mut self, conn: u64, push: Option<Box<Push>>) {
        let Some(&(host, life)) = self.conns.get(&conn) else {
            return;
        };
        let Some(at) = self.travel(conn, host, true) else {
            return;
        };
        self.at(at, Event::Down(host, life, conn, push));
    }

    /// When a stream's message arrives, if it does.
    pub(super) fn travel(&mut self, conn: u64, host: usize, down: bool) -> Option<u64> {
        let lost = self.is_faulty() && self.chance.permille(self.scenario.network.lost);
        if self.is_cut(host) || lost {
            self.broken.insert(conn);
        }
        if self.broken.contains(&conn) {
            return None;
        }
        let at = self.now + self.delay();
        let last = self.arrives.entry((conn, down)).or_default();
        let at = if self.scenario.network.reorders {
            at
        } else {
            at.max(*last)
        };
        *last = (*last).max(at);
        Some(at)
    }

    pub(super) fn kill_volt(&mut self, ms: u64, when: &str) {
        self.say(|_| format!("coordinator: dies {when}, back in {ms} ms"));
        self.counts.deaths += 1;
        if self.volt.record != self.volt.expected {
            let differs = self
                .volt
                .expected
                .iter()
                .find(|(k, v)| self.volt.record.get(k) != Some(v));
            let extra = self
                .volt
                .record
                .keys()
                .find(|k| !self.volt.expected.contains_key(*k));
            let why = format!("missing or other: {differs:?}; too much: {extra:?}");
            self.broken(Err(Violation {
                law: "the record is what the trees said",
                at: self.now,
                why,
            }));
        }
        let open: Vec<u64> = self.volt.open.iter().copied().collect();
        self.volt.die();
        for conn in open {
            if let Some(&(host, life)) = self.conns.get(&conn)
                && !self.is_cut(host)
            {
                let at = self.delay();
                self.after(at, Event::Down(host, life, conn, None));
            }
        }
        let waiting: Vec<u64> = self.calls.keys().copied().collect();
        for id in waiting {
            self.unavailable(id);
        }
        self.after(ms, Event::StartVolt);
    }

    pub(super) fn start_volt(&mut self) {
        if self.volt.up {
            return;
        }
        if let Err(why) = self.volt.start(self.now) {
            self.broken(Err(Violation {
                law: "the record can be loaded",
                at: self.now,
                why,
            }));
            return;
        }
        let outcome = self
            .memory
            .restarted(self.now, self.volt.forest.epoch(), &self.volt.record);
        self.broken(outcome);
        self.say(|world| format!("coordinator: back with {}", world.volt.forest.epoch()));
        self.turn_due = false;
        self.after(BEAT_MS / 4, Event::Clock(self.volt.life));
        self.turn_soon();
    }

    pub(super) fn unavailable(&mut self, id: u64) {
        if let Some(pending) = self.calls.get(&id) {
            let (host, life) = (pending.host, pending.life);
            let ms = self.delay() + 1;
            self.after(ms, Event::Reply(host, life, id, Reply::Unavailable));
        }
    }

    pub(super) fn reply(&mut self, id: u64, reply: Reply) {
        if let Some(pending) = self.calls.get(&id) {
            let (host, life) = (pending.host, pending.life);
            let lost = self.is_faulty() && self.chance.permille(self.scenario.network.lost);
            if !self.is_cut(host) && !lost {
                let ms = self.delay();
                self.after(ms, Event::Reply(host, life, id, reply));
            }
        }
    }

    pub(super) fn replied(&mut self, host: usize, life: u32, id: u64, reply: Reply) {
        let Some(pending) = self.calls.remove(&id) else {
            return;
        };
        if self.hosts[host].life == life {
            if let Reply::Said(Err(refusal)) = &reply
                && !matches!(refusal, Refusal::OtherEpoch { .. })
            {
                self.say(|_| format!("h{host}: {:?} refused: {refusal}", pending.what));
            }
            self.tell(host, Message::Reply(pending.what, reply));
        }
    }

    pub(super) fn call(&mut self, host: usize, what: For, epoch: Epoch) {
        let speaker = self.hosts[host].speaker();
        let image = self.image_ref.clone();
        let call = match what {
            For::Attach | For::Rejoin => Call::Join {
                speaker,
                image,
                endpoint: self.hosts[host].endpoint.clone(),
            },
            For::Register(epoch) => Call::Register {
                speaker,
                image,
                epoch,
            },
            For::Remove => Call::Remove {
                speaker,
                image,
                epoch,
            },
        };
        let id = self.fresh();
        let life = self.hosts[host].life;
        self.calls.insert(id, Pending { host, life, what });
        self.after(CALL_LIMIT_MS, Event::Reply(host, life, id, Reply::Unavailable));
        self.send_call(host, id, call);
    }

    pub(super) fn send_call(&mut self, host: usize, id: u64, call: Call) {
        let lost = self.is_faulty() && self.chance.permille(self.scenario.network.lost);
        if self.is_cut(host) || lost {
            return;
        }
        if self.is_faulty() && self.chance.permille(self.scenario.network.doubled) {
            // Its twin comes later; nobody waits for that one's answer.
            let twin = self.fresh();
            let ms = self.delay() + self.chance.within(0, 3_000);
            self.after(ms, Event::Up(Request::Call(twin, Box::new(call.clone()))));
        }
        let ms = self.delay();
        self.after(ms, Event::Up(Request::Call(id, Box::new(call))));
    }
}
