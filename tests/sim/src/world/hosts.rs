//! The hosts' side: agents start, beat, take steps and hear.

use treeboot_agent::link::talk::Talk;
use treeboot_agent::stack::{Access, Step};
use treeboot_coordinator::tree::{Beat, Push};

use super::super::check::Violation;
use super::super::edges;
use super::super::host::{Ask, Line, Message};
use super::super::scenario::BEAT_MS;
use super::super::volt::Request;
use super::{Event, World};

/// Longest wait for the first word on a stream, as the link has it.
const WELCOME_LIMIT_MS: u64 = 5_000;

impl World {
    pub(super) fn boot(&mut self, host: usize) {
        if self.hosts[host].up || self.hosts[host].gone {
            return;
        }
        self.say(|_| format!("h{host}: starts"));
        let mut asks = Vec::new();
        self.hosts[host].boot(&mut asks);
        self.asked(host, asks);
        let life = self.hosts[host].life;
        let ms = self.chance.within(5, 60);
        self.after(ms, Event::Connect(host, life));
    }

    pub(super) fn want(&mut self, host: usize) {
        if self.hosts[host].gone || self.hosts[host].wanted {
            return;
        }
        self.hosts[host].wanted = true;
        if self.hosts[host].up {
            self.tell(host, Message::Attach);
        }
    }

    pub(super) fn tell(&mut self, host: usize, message: Message) {
        if self.hosts[host].up {
            let mut asks = Vec::new();
            self.hosts[host].tell(message, &mut asks);
            self.asked(host, asks);
        }
    }

    pub(super) fn asked(&mut self, host: usize, asks: Vec<Ask>) {
        let life = self.hosts[host].life;
        let mut beats = false;
        let mut steps = false;
        for ask in asks {
            match ask {
                Ask::Call(what, epoch) => self.call(host, what, epoch),
                Ask::Settle(pause, epoch) => {
                    let ms = pause + self.chance.within(1, 8);
                    self.after(ms, Event::Settle(host, life, epoch));
                }
                Ask::Step => steps = true,
                Ask::Beat => beats = true,
                Ask::AskAgain => {
                    let ms = self.chance.within(500, 2_500);
                    self.after(ms, Event::AskAgain(host, life));
                }
            }
        }
        if steps {
            let ms = self.chance.within(0, 4);
            self.after(ms, Event::Step(host, life));
        }
        if beats && self.hosts[host].line.as_ref().is_some_and(|line| line.welcomed) {
            self.beat(host, false);
        }
    }

    pub(super) fn host_step(&mut self, host: usize) {
        let mut asks = Vec::new();
        // Looked at before the owner takes its next message, which may be a newer place.
        let step = self.hosts[host].apply_step();
        let outcome = self.check_step(host, step.as_ref());
        self.broken(outcome);
        self.hosts[host].go_on(&mut asks);
        self.asked(host, asks);
    }

    pub(super) fn check_step(&mut self, host: usize, step: Option<&Step>) -> Result<(), Violation> {
        let me = &self.hosts[host];
        let at = self.now;
        if let Some(why) = &me.violation {
            let (law, why) = ("a plan fits the host", format!("h{host}: {why}"));
            return Err(Violation { law, at, why });
        }
        let access = me
            .world
            .found
            .exports
            .get(&self.image)
            .map(|export| &export.access);
        let given = me.place().map(|place| &place.children);
        if let (Some(access), Some(given), Some(step), false) = (access, given, step, me.is_stored()) {
            let allowed = match access {
                Access::Anyone => false,
                Access::Hosts(hosts) => hosts.is_subset(given),
            };
            let law = match step {
                Step::SetPaths { .. } => Some("children of the old place go before new parents come"),
                _ if me.next_step().is_none() => Some("a target lets in whom it was given only"),
                _ => None,
            };
            if let Some(law) = law.filter(|_| !allowed) {
                let why = format!("h{host} lets in {access:?}, but was given {given:?}");
                return Err(Violation { law, at, why });
            }
        }
        let matters = matches!(
            step,
            Some(Step::SetPaths { .. } | Step::SetAccess { .. } | Step::Export { .. })
        );
        if matters {
            let stripes = self.stripes();
            edges::check_cycle(at, &self.hosts, host, stripes, true, &mut self.scratch)?;
        }
        Ok(())
    }

    pub(super) fn connect(&mut self, host: usize) {
        if !self.hosts[host].up || self.hosts[host].line.is_some() {
            return;
        }
        let life = self.hosts[host].life;
        if !self.volt.up || self.is_cut(host) {
            let spread = self.chance.draw();
            let ms = self.hosts[host].lose_line(spread) + if self.volt.up { 2_000 } else { 0 };
            self.after(ms, Event::Connect(host, life));
            return;
        }
        let conn = self.fresh();
        self.conns.insert(conn, (host, life));
        let unheard = std::mem::take(&mut self.hosts[host].unheard);
        self.hosts[host].line = Some(Line {
            conn,
            welcomed: false,
            heard: self.now,
            talk: Talk::new(unheard),
        });
        self.beat(host, true);
        self.after(WELCOME_LIMIT_MS, Event::Silence(host, life, conn));
    }

    pub(super) fn beat(&mut self, host: usize, asked: bool) {
        let speaker = self.hosts[host].speaker();
        let attached = self.hosts[host].place().is_some();
        let complaints = std::mem::take(&mut self.hosts[host].complaints);
        let (state, digest) = self.hosts[host].state().clone();
        let Some(line) = &mut self.hosts[host].line else {
            return;
        };
        let sign = line.talk.beat(&digest, complaints, asked);
        let conn = line.conn;
        let beat = Beat {
            sequence: sign.sequence,
            speaker,
            digest,
            state: sign.whole.then_some(state),
            bad_parents: sign.complaints,
        };
        if let Some(at) = self.travel(conn, host, false) {
            self.at(at, Event::Up(Request::Beat(conn, Box::new(beat), attached)));
        }
    }

    pub(super) fn lose(&mut self, host: usize) {
        let spread = self.chance.draw();
        let life = self.hosts[host].life;
        if let Some(conn) = self.hosts[host].line.as_ref().map(|line| line.conn) {
            self.broken.insert(conn);
            // The coordinator learns of it soon, or only by the next stream.
            if !self.is_cut(host) && self.chance.permille(700) {
                let ms = self.delay();
                self.after(ms, Event::Up(Request::Closed(conn)));
            }
        }
        let ms = self.hosts[host].lose_line(spread);
        self.after(ms, Event::Connect(host, life));
    }

    pub(super) fn silence(&mut self, host: usize, conn: u64) {
        let Some(line) = self.hosts[host].line.as_ref().filter(|line| line.conn == conn) else {
            return;
        };
        let limit = if line.welcomed {
            3 * BEAT_MS
        } else {
            WELCOME_LIMIT_MS
        };
        let due = line.heard + limit;
        if self.now >= due {
            self.say(|_| format!("h{host}: the coordinator is silent"));
            self.lose(host);
        } else {
            let life = self.hosts[host].life;
            self.at(due, Event::Silence(host, life, conn));
        }
    }

    pub(super) fn heard(&mut self, host: usize, conn: u64, push: Option<Box<Push>>) {
        let now = self.now;
        let Some(line) = self.hosts[host].line.as_mut().filter(|line| line.conn == conn) else {
            return;
        };
        line.heard = now;
        let Some(push) = push else {
            return self.lose(host);
        };
        let life = self.hosts[host].life;
        match *push {
            Push::Welcome { .. } => {
                let first = self.hosts[host]
                    .line
                    .as_mut()
                    .is_some_and(|line| !std::mem::replace(&mut line.welcomed, true));
                if first {
                    self.after(BEAT_MS, Event::Beat(host, life, conn));
                    self.tell(host, Message::Connected);
                }
            }
            Push::Ack { sequence } => {
                if let Some(line) = &mut self.hosts[host].line {
                    line.talk.acknowledged(sequence);
                }
            }
            Push::Placement(placement) => {
                let before = self.hosts[host].epoch();
                self.say(|_| format!("h{host}: {}", describe(&placement)));
                self.tell(host, Message::Placed(placement));
                let after = self.hosts[host].epoch();
                if let (Some(before), Some(after)) = (before, after)
                    && after < before
                {
                    let why = format!("h{host} went from {before} to {after}");
                    self.broken(Err(Violation {
                        law: "a host never goes back to an older place",
                        at: now,
                        why,
                    }));
                }
            }
            Push::SendState => self.beat(host, true),
            Push::Detach { epoch, why, .. } => {
                self.say(|_| format!("h{host}: told to detach by {epoch}: {}", why.reason));
                let before = self.hosts[host].epoch();
                self.tell(host, Message::Unwanted(epoch));
                if let Some(before) = before.filter(|before| *before > epoch)
                    && self.hosts[host].epoch().is_none()
                {
                    let why = format!("h{host} with {before} was detached by {epoch}");
                    self.broken(Err(Violation {
                        law: "an older wish to detach is not heeded",
                        at: now,
                        why,
                    }));
                }
            }
            Push::Refused(refusal) => {
                let why = format!("h{host} is not let in: {refusal}");
                self.broken(Err(Violation {
                    law: "nobody is refused for good",
                    at: now,
                    why,
                }));
            }
        }
    }
}

fn describe(placement: &treeboot_types::Placement) -> String {
    let name = |parent: &treeboot_types::Parent| {
        parent
            .host
            .as_ref()
            .map_or_else(|| parent.endpoint.portal.to_string(), ToString::to_string)
    };
    let stripes: Vec<String> = placement
        .stripes
        .iter()
        .map(|stripe| {
            let active: Vec<String> = stripe.active.iter().map(name).collect();
            let fallbacks: Vec<String> = stripe.fallbacks.iter().map(name).collect();
            format!(
                "at {} under {} ({})",
                stripe.depth,
                active.join(" "),
                fallbacks.join(" ")
            )
        })
        .collect();
    let children: Vec<String> = placement
        .children
        .iter()
        .map(|c| format!("{}{}/{}", c.host, if c.fallback { "?" } else { "" }, c.stripe.0))
        .collect();
    format!(
        "placed by {}: {}; children {}",
        placement.epoch,
        stripes.join("; "),
        children.join(" ")
    )
}
