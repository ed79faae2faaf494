//! The loop: events by virtual time, messages over the modelled network, faults, and the checkers after every change.

mod coordinator;
mod faults;
mod hosts;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use treeboot_agent::desired::{Change, Stored};
use treeboot_agent::stack::{Backing, Sources};
use treeboot_coordinator::tree::{Call, Push};
use treeboot_types::{
    Endpoint, Epoch, HostInfo, HostName, Image, ImageId, ImageRef, Iqn, Labels, Origin, PlaneKind, Portal,
};

use super::chance::Chance;
use super::check::{Memory, Violation};
use super::edges;
use super::host::{CONTENT, For, Host, Message, Reply};
use super::scenario::{BEAT_MS, FAULTS_MS, LEASE_MS, Scenario};
use super::settled::{settled, unconnected};
use super::volt::{Request, Volt};
use super::{Counts, SETTLE_BEATS};

/// How long settled trees must stay as they are.
const REST_BEATS: u64 = 4;
/// In so long a host whose stream two late messages in a row took from it has another: before its lease ends, of which the silence
/// took three beats.
const RECONNECT_MS: u64 = LEASE_MS - 3 * BEAT_MS;
/// Lines of a trace that are kept: the last ones.
const TRACE_LINES: usize = 200_000;

enum Event {
    Fault(usize),
    Boot(usize),
    Want(usize),
    /// For a host in one of its lives.
    Step(usize, u32),
    Settle(usize, u32, Epoch),
    AskAgain(usize, u32),
    Connect(usize, u32),
    Beat(usize, u32, u64),
    Silence(usize, u32, u64),
    Down(usize, u32, u64, Option<Box<Push>>),
    Reply(usize, u32, u64, Reply),
    /// For the coordinator.
    Up(Request),
    Turn(u32),
    Clock(u32),
    Written(u32),
    StartVolt,
    Look,
}

struct Pending {
    host: usize,
    life: u32,
    what: For,
}

/// A simulated installation.
pub struct World {
    scenario: Scenario,
    now: u64,
    turn: u64,
    queue: BTreeMap<(u64, u64), Event>,
    chance: Chance,
    volt: Volt,
    hosts: Vec<Host>,
    image: ImageId,
    image_ref: ImageRef,
    memory: Memory,
    calls: BTreeMap<u64, Pending>,
    next_id: u64,
    /// Streams that lost a message: nothing more comes through. With their hosts.
    broken: BTreeSet<u64>,
    conns: BTreeMap<u64, (usize, u32)>,
    /// When the last message of a stream arrives, each way.
    arrives: BTreeMap<(u64, bool), u64>,
    /// Until when hosts are cut off the coordinator.
    cut: Vec<u64>,
    /// Sides of the present splits.
    splits: Vec<(u64, Vec<bool>)>,
    turn_due: bool,
    settled_at: Option<(u64, Epoch)>,
    /// When the last call that is under way arrives.
    call_arrives: u64,
    /// When the last beat of each host that was sent while it was attached arrives.
    claim_arrives: BTreeMap<HostName, u64>,
    /// Since when hosts are without a stream, as the looks found them.
    unconnected: BTreeMap<usize, u64>,
    unsettled: String,
    scratch: Vec<u32>,
    counts: Counts,
    trace: Option<VecDeque<String>>,
    violation: Option<Violation>,
}

impl World {
    /// An installation at its beginning.
    #[must_use]
    pub fn new(scenario: Scenario, trace: bool) -> Self {
        let image: ImageId = "debian@1"
            .parse()
            .unwrap_or_else(|_| unreachable!("it is a name"));
        let image_ref: ImageRef = "debian@1"
            .parse()
            .unwrap_or_else(|_| unreachable!("it is a name"));
        let mut hosts: Vec<Host> = Vec::new();
        let all = scenario.members.len() + usize::from(scenario.store_origin);
        for number in 0..all {
            let member = scenario.members.get(number);
            let endpoint = endpoint(
                &format!("10.0.{}.{}:3260", number / 250, number % 250 + 1),
                &image,
            );
            let labels = member.map(|m| m.stand).unwrap_or_default().labels();
            let info = HostInfo {
                name: HostName::new(&format!("h{number}")).unwrap_or_else(|_| unreachable!("it is a name")),
                instance: format!("instance-{number}"),
                agent_address: String::new(),
                portal: endpoint.portal.to_string(),
                plane: PlaneKind::User,
                max_stripes: if member.is_some_and(|m| m.whole) { 1 } else { 8 },
                labels,
                version: "sim".into(),
                weight: member.map_or(1, |m| m.weight),
                runs_vms: true,
                holds_store: member.is_none(),
            };
            let mut host = Host::new(info, endpoint, image.clone(), member.is_some_and(|m| m.vm));
            if member.is_none() {
                host.desired.fold(Change::Stored {
                    image: image.clone(),
                    content: CONTENT,
                    stored: Stored {
                        backing: Backing::Store,
                        sources: Sources::default(),
                    },
                });
                host.synced = host.desired.clone();
                host.world.found.stores.insert(CONTENT.digest);
            }
            hosts.push(host);
        }
        let mut world = Self {
            now: 0,
            turn: 0,
            queue: BTreeMap::new(),
            chance: Chance::new(scenario.seed, 2),
            volt: Volt::new(scenario.settings.clone()),
            cut: vec![0; hosts.len()],
            hosts,
            image,
            image_ref,
            memory: Memory::new(
                scenario
                    .members
                    .iter()
                    .any(|member| member.weight > 1 || member.whole),
            ),
            calls: BTreeMap::new(),
            next_id: 1,
            broken: BTreeSet::new(),
            conns: BTreeMap::new(),
            arrives: BTreeMap::new(),
            splits: Vec::new(),
            turn_due: false,
            settled_at: None,
            call_arrives: 0,
            claim_arrives: BTreeMap::new(),
            unconnected: BTreeMap::new(),
            unsettled: String::new(),
            scratch: Vec::new(),
            counts: Counts::default(),
            trace: trace.then(VecDeque::new),
            violation: None,
            scenario,
        };
        world.begin();
        world
    }

    fn begin(&mut self) {
        let mut origins: Vec<Origin> = (0..self.scenario.foreign_origins)
            .map(|number| Origin {
                endpoint: endpoint(&format!("10.9.9.{}:3260", number + 1), &self.image),
                host: None,
                labels: Labels::new(),
            })
            .collect();
        if self.scenario.store_origin
            && let Some(host) = self.hosts.last()
        {
            origins.push(Origin {
                endpoint: host.endpoint.clone(),
                host: Some(host.info.name.clone()),
                labels: Labels::new(),
            });
            self.at(0, Event::Boot(self.hosts.len() - 1));
        }
        let image = Image {
            id: self.image.clone(),
            digest: CONTENT.digest,
            bytes: CONTENT.bytes,
            chunk_bytes: CONTENT.chunk_bytes,
            stripes: 1,
            stripe_unit_bytes: 65536,
            origins,
            created_unix_ms: 0,
            allocated_bytes: CONTENT.bytes,
        };
        // Before anything goes wrong: images come from people, who see whether it worked.
        self.volt
            .inbox
            .push_back(Request::Call(0, Box::new(Call::AddImage { image })));
        self.owner_turn();
        for (number, member) in self.scenario.members.clone().into_iter().enumerate() {
            self.at(member.boots, Event::Boot(number));
            self.at(member.wants, Event::Want(number));
        }
        for (index, fault) in self.scenario.faults.iter().enumerate() {
            let key = (fault.at, self.turn);
            self.turn += 1;
            self.queue.insert(key, Event::Fault(index));
        }
        self.after(BEAT_MS, Event::Look);
        self.after(BEAT_MS / 4, Event::Clock(self.volt.life));
    }

    /// Runs to the end, or to the first broken law.
    #[must_use]
    pub fn run(mut self) -> (Option<Violation>, Counts, VecDeque<String>) {
        while self.violation.is_none() {
            let Some(((at, _), event)) = self.queue.pop_first() else {
                break;
            };
            self.now = at;
            self.counts.events += 1;
            self.take(event);
            let is_over = |(at, _)| self.now > at + REST_BEATS * BEAT_MS;
            if self.settled_at.is_some_and(is_over) && self.unconnected.is_empty() {
                break;
            }
        }
        self.counts.moved = self.memory.moved;
        self.counts.disturbances = self.memory.disturbances;
        self.counts.settled_ms = self.settled_at.map_or(0, |(at, _)| at.saturating_sub(FAULTS_MS));
        (self.violation, self.counts, self.trace.unwrap_or_default())
    }

    fn at(&mut self, at: u64, event: Event) {
        match &event {
            Event::Up(Request::Call(..)) => self.call_arrives = self.call_arrives.max(at),
            Event::Up(Request::Beat(_, beat, true)) => {
                let host = beat.speaker.host.clone();
                let last = self.claim_arrives.entry(host).or_default();
                *last = at.max(*last);
            }
            _ => {}
        }
        self.queue.insert((at.max(self.now), self.turn), event);
        self.turn += 1;
    }

    fn after(&mut self, ms: u64, event: Event) {
        self.at(self.now + ms, event);
    }

    fn say(&mut self, what: impl FnOnce(&Self) -> String) {
        if self.trace.is_some() {
            let line = format!("{:>7} {}", self.now, what(self));
            if let Some(trace) = &mut self.trace {
                if trace.len() == TRACE_LINES {
                    trace.pop_front();
                }
                trace.push_back(line);
            }
        }
    }

    fn broken(&mut self, outcome: Result<(), Violation>) {
        if let Err(violation) = outcome
            && self.violation.is_none()
        {
            self.violation = Some(violation);
        }
    }

    fn fresh(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn delay(&mut self) -> u64 {
        let network = self.scenario.network;
        if self.chance.permille(network.late) {
            self.chance.within(network.delay, 1_500)
        } else {
            self.chance.within(0, network.delay + 1)
        }
    }

    fn is_cut(&self, host: usize) -> bool {
        self.cut[host] > self.now
    }

    fn is_linked(&self, a: usize, b: usize) -> bool {
        let now = self.now;
        self.splits
            .iter()
            .all(|(until, side)| *until <= now || side[a] == side[b])
    }

    fn is_faulty(&self) -> bool {
        self.now < FAULTS_MS
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Fault(index) => {
                let fault = self.scenario.faults[index].clone();
                self.fault(&fault);
            }
            Event::Boot(host) => self.boot(host),
            Event::Want(host) => self.want(host),
            Event::Step(host, life) if self.hosts[host].life == life => self.host_step(host),
            Event::Settle(host, life, epoch) if self.hosts[host].life == life => {
                let stripes = self.stripes();
                let readable =
                    edges::reaches_origin(&self.hosts, host, stripes, true, &|a, b| self.is_linked(a, b));
                self.tell(host, Message::Readable(readable, epoch));
            }
            Event::AskAgain(host, life) if self.hosts[host].life == life && self.hosts[host].up => {
                self.tell(host, Message::Attach);
            }
            Event::Connect(host, life) if self.hosts[host].life == life => self.connect(host),
            Event::Beat(host, life, conn)
                if self.hosts[host].life == life && self.is_welcomed(host, conn) =>
            {
                self.beat(host, false);
                self.after(BEAT_MS, Event::Beat(host, life, conn));
            }
            Event::Silence(host, life, conn) if self.hosts[host].life == life => self.silence(host, conn),
            Event::Down(host, life, conn, push) if self.hosts[host].life == life => {
                self.heard(host, conn, push)
            }
            Event::Reply(host, life, id, reply) => self.replied(host, life, id, reply),
            // What arrives at a process that stands still is read by it a moment after it goes on.
            Event::Up(request) if self.volt.paused_until > self.now => {
                self.at(self.volt.paused_until + 2, Event::Up(request));
            }
            Event::Up(request) if self.volt.up => {
                self.volt.inbox.push_back(request);
                self.turn_soon();
            }
            Event::Up(Request::Call(id, _)) => self.unavailable(id),
            Event::Turn(life) if self.volt.life == life && self.volt.up => {
                self.turn_due = false;
                if self.volt.paused_until > self.now {
                    self.turn_due = true;
                    self.at(self.volt.paused_until, Event::Turn(life));
                } else if !self.volt.writing {
                    self.owner_turn();
                }
            }
            Event::Clock(life) if self.volt.life == life => {
                self.after(BEAT_MS / 4, Event::Clock(life));
                self.turn_soon();
            }
            Event::Written(life) if self.volt.life == life => self.written(),
            Event::StartVolt => self.start_volt(),
            Event::Look => self.look(),
            _ => {}
        }
    }

    fn is_welcomed(&self, host: usize, conn: u64) -> bool {
        let line = self.hosts[host].line.as_ref();
        line.is_some_and(|line| line.conn == conn && line.welcomed)
    }

    fn stripes(&self) -> usize {
        self.volt
            .forest
            .image(&self.image_ref)
            .map_or(1, |image| usize::from(image.stripes))
    }

    fn look(&mut self) {
        self.after(BEAT_MS, Event::Look);
        if !self.volt.up {
            return;
        }
        if self.now < self.volt.paused_until {
            return;
        }
        let tree = match self.volt.forest.tree(&self.image_ref) {
            Ok(tree) => tree,
            Err(refusal) => {
                let (law, at, why) = ("an image stays", self.now, refusal.to_string());
                return self.broken(Err(Violation { law, at, why }));
            }
        };
        let outcome = self.memory.check_tree(self.now, &tree);
        self.broken(outcome);
        if self.now <= FAULTS_MS {
            return;
        }
        let outcome = self
            .connected()
            .and_then(|()| settled(&self.hosts, &tree, &self.memory, &self.scenario.settings));
        // A call that comes twice, or late, changes the trees by right.
        let outcome = match self.settled_at {
            None if self.call_arrives >= self.now => Err("a call is under way".into()),
            // So does what a host said of itself before it gave its place up without the coordinator's knowing: a lease ends that.
            None if self.is_claim_under_way() => Err("an overtaken beat is under way".into()),
            _ => outcome,
        };
        match (outcome, self.settled_at) {
            (Ok(()), None) => {
                self.settled_at = Some((self.now, tree.epoch));
                self.counts.hosts = tree
                    .vertices
                    .iter()
                    .filter(|v| !v.origin && v.stripe.0 == 0)
                    .count() as u64;
                self.counts.deepest = tree
                    .vertices
                    .iter()
                    .map(|v| u64::from(v.depth))
                    .max()
                    .unwrap_or(0);
                let outcome = self.check_moves();
                self.broken(outcome);
            }
            (Ok(()), Some((_, epoch))) if epoch != tree.epoch => {
                let why = format!("it was settled at {epoch} and is at {} now", tree.epoch);
                let (law, at) = ("what is settled stays", self.now);
                self.broken(Err(Violation { law, at, why }));
            }
            (Ok(()), Some(_)) => {}
            (Err(why), Some(_)) => {
                let (law, at) = ("what is settled stays", self.now);
                self.broken(Err(Violation { law, at, why }));
            }
            (Err(why), None) if self.now > FAULTS_MS + SETTLE_BEATS * BEAT_MS => {
                let (law, at) = ("it settles once nothing goes wrong any more", self.now);
                self.broken(Err(Violation { law, at, why }));
            }
            (Err(why), None) => self.unsettled = why,
        }
    }

    /// Whether a beat is under way that says that its host is attached, which nobody wants it to be any more.
    fn is_claim_under_way(&self) -> bool {
        self.hosts.iter().any(|host| {
            let arrives = self.claim_arrives.get(&host.info.name);
            !host.wanted && !host.is_stored() && arrives.is_some_and(|at| *at >= self.now)
        })
    }

    /// Whether everybody has a stream that it needs. Where messages may be late, two such in a row are a silence for which a host takes its
    /// stream for dead, by right: what was settled is so still if it has another in time.
    fn connected(&mut self) -> Result<(), String> {
        let is_dead = |conn| self.broken.contains(&conn);
        let now: Vec<(usize, &str)> = unconnected(&self.hosts, is_dead).collect();
        self.unconnected
            .retain(|host, _| now.iter().any(|(other, _)| other == host));
        let by_right = self.settled_at.is_some() && self.scenario.network.late > 0;
        for (host, why) in now {
            let ms = self.now - *self.unconnected.entry(host).or_insert(self.now);
            if !by_right || ms > RECONNECT_MS {
                return Err(format!("h{host} {why}, for {ms} ms"));
            }
        }
        Ok(())
    }

    fn check_moves(&self) -> Result<(), Violation> {
        let most = super::MOVES_EACH * self.memory.disturbances + 2 * self.hosts.len() as u64;
        if self.memory.moved > most {
            return Err(Violation {
                law: "few move",
                at: self.now,
                why: format!(
                    "{} changes of parents for {} hosts that came, went or complained",
                    self.memory.moved, self.memory.disturbances
                ),
            });
        }
        Ok(())
    }
}

fn endpoint(portal: &str, image: &ImageId) -> Endpoint {
    Endpoint {
        portal: Portal::new(portal).unwrap_or_else(|_| unreachable!("it is a portal")),
        target: Iqn::of_image(image),
        data_lun: 0,
        hash_lun: Some(1),
    }
}
