//! A fleet beside the trees: it carries out effects as the shell and the hosts would, and knows only what it was told.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use treeboot_types::{
    AttachState, Attachment, BadParent, Digest, Endpoint, Epoch, Fault, HostInfo, HostName, Image, ImageId,
    ImageRef, Iqn, Labels, Origin, PathPolicy, Placement, PlaneKind, Portal, StripeIndex, Tick,
};

use crate::tree::{
    Answer, AttachmentRecord, Beat, Call, CallId, Change, Effect, Event, Forest, HeldOf, HostState, KAry,
    Key, Note, Policy, Push, Record, Refusal, Settings, Speaker, StreamId, Striped, Unwanted, VertexView,
};

pub(super) const BEAT_MS: u64 = 1_000;
pub(super) const LEASE_MS: u64 = 8_000;
pub(super) const PENDING_MS: u64 = 5_000;

pub(super) fn name(host: &str) -> HostName {
    HostName::new(host).unwrap()
}

pub(super) fn host(number: usize) -> String {
    format!("h{number}")
}

pub(super) fn image_ref() -> ImageRef {
    "debian@1".parse().unwrap()
}

pub(super) fn image_id() -> ImageId {
    "debian@1".parse().unwrap()
}

pub(super) fn endpoint(portal: &str) -> Endpoint {
    Endpoint {
        portal: Portal::new(portal).unwrap(),
        target: Iqn::of_image(&image_id()),
        data_lun: 0,
        hash_lun: Some(1),
    }
}

pub(super) fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect()
}

pub(super) fn image(origins: Vec<Origin>) -> Image {
    Image {
        id: image_id(),
        digest: Digest([7; 32]),
        bytes: 1 << 20,
        chunk_bytes: 65536,
        stripes: 1,
        stripe_unit_bytes: 65536,
        origins,
        created_unix_ms: 0,
        allocated_bytes: 1 << 20,
    }
}

pub(super) fn foreign(portal: &str) -> Origin {
    Origin {
        endpoint: endpoint(portal),
        host: None,
        labels: Labels::new(),
    }
}

pub(super) fn settings(fan_out: u32, active_parents: u32) -> Settings {
    settings_of(Arc::new(KAry { fan_out }), active_parents)
}

pub(super) fn settings_of(policy: Arc<dyn Policy>, active_parents: u32) -> Settings {
    Settings {
        policy,
        active_parents,
        path_policy: PathPolicy::RoundRobin,
        beat_ms: BEAT_MS,
        lease_ms: LEASE_MS,
        pending_lease_ms: PENDING_MS,
    }
}

/// One agent, as far as the coordinator sees it.
#[derive(Debug, Clone, Default)]
pub(super) struct Agent {
    pub(super) instance: String,
    pub(super) portal: String,
    pub(super) labels: Labels,
    pub(super) max_stripes: u16,
    /// 0 counts as 1.
    pub(super) weight: u32,
    pub(super) stream: Option<StreamId>,
    pub(super) placements: BTreeMap<ImageId, Placement>,
    pub(super) states: BTreeMap<ImageId, AttachState>,
    pub(super) detached: Vec<(ImageId, Unwanted)>,
    pub(super) asked_for_state: usize,
    pub(super) refused: Option<Refusal>,
    pub(super) pushed: usize,
}

#[derive(Debug)]
pub(super) struct World {
    pub(super) forest: Forest,
    pub(super) now: Tick,
    pub(super) agents: BTreeMap<String, Agent>,
    pub(super) record: BTreeMap<Key, Record>,
    pub(super) notes: Vec<Note>,
    /// Who was pushed a placement, in order.
    pub(super) order: Vec<String>,
    /// Changes of the record in the last step.
    pub(super) saved: usize,
    by_stream: BTreeMap<StreamId, String>,
    next: u64,
}

impl World {
    pub(super) fn new(fan_out: u32, active_parents: u32) -> Self {
        let mut world = Self::empty(settings(fan_out, active_parents));
        world.add_image(image(vec![foreign("10.9.9.9:3260")])).unwrap();
        world
    }

    /// Images are read in so many stripes.
    pub(super) fn striped(stripes: u16, active_parents: u32) -> Self {
        let mut world = Self::empty(settings_of(Arc::new(Striped { stripes }), active_parents));
        world.add_image(image(vec![foreign("10.9.9.9:3260")])).unwrap();
        world
    }

    pub(super) fn empty(settings: Settings) -> Self {
        Self {
            forest: Forest::new(settings),
            now: Tick(1),
            agents: BTreeMap::new(),
            record: BTreeMap::new(),
            notes: Vec::new(),
            order: Vec::new(),
            saved: 0,
            by_stream: BTreeMap::new(),
            next: 0,
        }
    }

    fn next(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    pub(super) fn step(&mut self, event: Event) -> Option<Result<Answer, Refusal>> {
        let mut effects = Vec::new();
        self.forest.step(self.now, event, &mut effects);
        self.order.clear();
        self.saved = 0;
        let mut answer = None;
        for effect in effects {
            match effect {
                Effect::Save(Change::Put(key, record)) => {
                    self.saved += 1;
                    self.check_fence(&key, &record);
                    self.record.insert(key, record);
                }
                Effect::Save(Change::Delete(key)) => {
                    self.saved += 1;
                    self.record.remove(&key);
                }
                Effect::Push(stream, push) => self.push(stream, push),
                Effect::Close(stream) => {
                    if let Some(agent) = self.by_stream.remove(&stream)
                        && let Some(agent) = self.agents.get_mut(&agent)
                        && agent.stream == Some(stream)
                    {
                        agent.stream = None;
                    }
                }
                Effect::Answer(_, result) => answer = Some(result),
                Effect::Note(note) => self.notes.push(note),
            }
        }
        answer
    }

    /// Whose parents change is fenced off with what it was told before, even where it is not told of them yet.
    fn check_fence(&self, key: &Key, after: &Record) {
        if let (Some(Record::Attachment(before)), Record::Attachment(after)) = (self.record.get(key), after) {
            let parents = |record: &AttachmentRecord| -> Vec<Vec<HeldOf>> {
                let stripes = record.stripes.iter();
                stripes
                    .map(|held| held.iter().map(|h| h.of.clone()).collect())
                    .collect()
            };
            if before.joined == after.joined && parents(before) != parents(after) {
                assert_eq!(
                    after.position, after.epoch,
                    "{key:?} has other parents: {after:?}"
                );
            }
        }
    }

    fn push(&mut self, stream: StreamId, push: Push) {
        let Some(agent) = self.by_stream.get(&stream).and_then(|a| self.agents.get_mut(a)) else {
            return;
        };
        match push {
            Push::Placement(placement) => {
                agent.pushed += 1;
                self.order.push(self.by_stream[&stream].clone());
                agent.take(*placement);
            }
            Push::Detach { image, why, .. } => {
                agent.placements.remove(&image);
                agent.states.remove(&image);
                agent.detached.push((image, why));
            }
            Push::SendState => agent.asked_for_state += 1,
            Push::Refused(refusal) => agent.refused = Some(refusal),
            Push::Welcome { .. } | Push::Ack { .. } => {}
        }
    }

    pub(super) fn call(&mut self, call: Call) -> Result<Answer, Refusal> {
        let id = CallId(self.next());
        self.step(Event::Call(id, Box::new(call)))
            .expect("every call is answered")
    }

    pub(super) fn add_image(&mut self, image: Image) -> Result<Answer, Refusal> {
        self.call(Call::AddImage { image })
    }

    /// A host with a portal of its own, known to the coordinator.
    pub(super) fn come(&mut self, host: &str) {
        let number = self.agents.len() + 1;
        let portal = format!("10.0.{}.{}:3260", number / 250, number % 250);
        self.come_at(host, &portal, &[]);
    }

    pub(super) fn come_at(&mut self, host: &str, portal: &str, with: &[(&str, &str)]) {
        let agent = Agent {
            instance: format!("instance-of-{host}"),
            portal: portal.into(),
            labels: labels(with),
            max_stripes: 8,
            ..Agent::default()
        };
        self.agents.insert(host.into(), agent);
        self.connect(host);
    }

    /// Opens a new stream with a first beat.
    pub(super) fn connect(&mut self, host: &str) {
        let stream = StreamId(self.next());
        self.agents.get_mut(host).unwrap().stream = Some(stream);
        self.by_stream.insert(stream, host.into());
        self.beat(host);
    }

    pub(super) fn disconnect(&mut self, host: &str) {
        if let Some(stream) = self.agents.get_mut(host).unwrap().stream.take() {
            self.by_stream.remove(&stream);
            self.step(Event::StreamClosed(stream));
        }
    }

    pub(super) fn beat(&mut self, host: &str) {
        self.beat_with(host, true, Vec::new());
    }

    pub(super) fn beat_with(&mut self, host: &str, whole: bool, bad_parents: Vec<BadParent>) {
        let sequence = self.next();
        let agent = &self.agents[host];
        let Some(stream) = agent.stream else {
            return;
        };
        let beat = Beat {
            sequence,
            speaker: agent.speaker(host),
            digest: agent.digest(),
            state: whole.then(|| agent.state(host)),
            bad_parents,
        };
        self.step(Event::Beat(stream, Box::new(beat)));
    }

    pub(super) fn report(&mut self, host: &str, parent: &str, fault: Fault) {
        let complaint = BadParent {
            image: image_id(),
            stripe: StripeIndex(0),
            host: Some(name(parent)),
            portal: self.agents[parent].portal.clone(),
            fault,
            count: 1,
        };
        self.beat_with(host, true, vec![complaint]);
    }

    pub(super) fn join(&mut self, host: &str) -> Result<Placement, Refusal> {
        let agent = &self.agents[host];
        let answer = self.call(Call::Join {
            speaker: agent.speaker(host),
            image: image_ref(),
            endpoint: endpoint(&agent.portal),
        })?;
        let Answer::Joined(placement) = answer else {
            panic!("{answer:?} answers no join");
        };
        let agent = self.agents.get_mut(host).unwrap();
        agent.states.entry(image_id()).or_insert(AttachState::Pending);
        agent.take(placement.clone());
        Ok(placement)
    }

    pub(super) fn register(&mut self, host: &str) -> Result<Answer, Refusal> {
        let agent = &self.agents[host];
        let epoch = agent
            .placements
            .get(&image_id())
            .map(|p| p.epoch)
            .unwrap_or_default();
        self.register_at(host, epoch)
    }

    pub(super) fn register_at(&mut self, host: &str, epoch: Epoch) -> Result<Answer, Refusal> {
        let answer = self.call(Call::Register {
            speaker: self.agents[host].speaker(host),
            image: image_ref(),
            epoch,
        });
        if answer.is_ok() {
            let agent = self.agents.get_mut(host).unwrap();
            agent.states.insert(image_id(), AttachState::Ready);
        }
        answer
    }

    pub(super) fn remove(&mut self, host: &str) -> Result<Answer, Refusal> {
        let agent = &self.agents[host];
        let epoch = agent
            .placements
            .get(&image_id())
            .map(|p| p.epoch)
            .unwrap_or_default();
        let answer = self.call(Call::Remove {
            speaker: agent.speaker(host),
            image: image_ref(),
            epoch,
        });
        if answer.is_ok() {
            let agent = self.agents.get_mut(host).unwrap();
            agent.states.remove(&image_id());
            agent.placements.remove(&image_id());
        }
        answer
    }

    pub(super) fn leave(&mut self, host: &str) -> Result<Answer, Refusal> {
        let speaker = self.agents[host].speaker(host);
        let answer = self.call(Call::Leave { speaker });
        let agent = self.agents.get_mut(host).unwrap();
        agent.placements.clear();
        agent.states.clear();
        answer
    }

    /// A host that came, joined and registered.
    pub(super) fn grow(&mut self, host: &str) {
        self.come(host);
        self.join(host).unwrap();
        self.register(host).unwrap();
        self.beat(host);
    }

    /// Time passes in steps of the clock, while the given hosts beat.
    pub(super) fn pass(&mut self, ms: u64, beating: &[&str]) {
        let end = self.now.after_ms(ms);
        while self.now < end {
            let step = end.since_ms(self.now).min(BEAT_MS);
            self.now = self.now.after_ms(step);
            for host in beating {
                self.beat_with(host, false, Vec::new());
            }
            self.step(Event::Clock);
        }
    }

    /// All who are connected say what they act on, until nobody is told anything new.
    pub(super) fn hear_all(&mut self) {
        for _ in 0..8 {
            let before = self.forest.epoch();
            let agents = self.agents.iter().filter(|(_, agent)| agent.stream.is_some());
            let connected: Vec<String> = agents.map(|(host, _)| host.clone()).collect();
            connected.iter().for_each(|host| self.beat(host));
            if self.forest.epoch() == before {
                return;
            }
        }
    }

    /// The coordinator ends and starts from its record; streams break.
    pub(super) fn restart(&mut self) {
        let records = self.record.clone().into_iter().collect();
        let mut effects = Vec::new();
        let settings = self.forest.settings().clone();
        self.forest = Forest::load(settings, records, &mut effects).unwrap();
        assert!(effects.is_empty(), "a restart changes nothing: {effects:?}");
        self.by_stream.clear();
        self.agents.values_mut().for_each(|agent| agent.stream = None);
        self.now = Tick(1);
    }

    pub(super) fn depth(&self, host: &str) -> u32 {
        self.agents[host].placements[&image_id()].stripes[0].depth
    }

    pub(super) fn deepest(&self) -> u32 {
        let tree = self.forest.tree(&image_ref()).unwrap();
        tree.vertices.iter().map(|v| v.depth).max().unwrap_or(0)
    }

    pub(super) fn active(&self, host: &str) -> Vec<String> {
        let parents = &self.agents[host].placements[&image_id()].stripes[0].active;
        parents
            .iter()
            .map(|p| {
                p.host
                    .as_ref()
                    .map_or_else(|| p.endpoint.portal.to_string(), ToString::to_string)
            })
            .collect()
    }

    /// Hosts that joined and whose place nobody took away, as they know themselves.
    pub(super) fn attached(&self) -> BTreeSet<String> {
        let attached = self
            .agents
            .iter()
            .filter(|(_, a)| a.placements.contains_key(&image_id()));
        attached.map(|(host, _)| host.clone()).collect()
    }

    /// The oracle: it looks at nothing but what connected hosts were told, and asks the laws of that.
    pub(super) fn check_told(&self) -> Result<(), String> {
        let image = self.forest.image(&image_ref()).map_err(|e| e.to_string())?;
        (0..image.stripes).try_for_each(|stripe| self.check_told_of(usize::from(stripe)))
    }

    fn check_told_of(&self, index: usize) -> Result<(), String> {
        let fan_out = self.forest.settings().policy.fan_out();
        let active = self.forest.settings().active_parents;
        // The trees never have a second link into a rack (the audit sees to that), but a host may be told of one: a parent that
        // was given this host as a child in another stripe, and that cannot be told otherwise because it is not connected,
        // would let it in for both stripes, so those above stand in for it (`bar.rs`). That must be so for all of its parents,
        // else it reads from those that remain; and whoever is connected has said in `hear_all` what it acts on.
        let tree = self.forest.tree(&image_ref()).map_err(|e| e.to_string())?;
        let of_stripe = |v: &&VertexView| usize::from(v.stripe.0) == index && !v.origin;
        let vertices = tree.vertices.iter().filter(of_stripe);
        let parents: BTreeMap<&str, &Vec<String>> = vertices
            .filter_map(|v| Some((v.host.as_ref()?.as_str(), &v.parents)))
            .collect();
        let is_silent = |host: &String| self.agents.get(host).is_some_and(|a| a.stream.is_none());
        let stands_in =
            |host: &str| tree.image.stripes > 1 && parents.get(host).is_some_and(|p| p.iter().all(is_silent));
        // Who takes a stripe in for a rack.
        let mut heads: BTreeMap<(&str, &str), Vec<&str>> = BTreeMap::new();
        let mut load: BTreeMap<String, u32> = BTreeMap::new();
        for (host, agent) in &self.agents {
            let Some(placement) = agent
                .placements
                .get(&image_id())
                .filter(|_| agent.stream.is_some())
            else {
                continue;
            };
            let Some(stripe) = placement.stripes.get(index) else {
                if index > 0 && agent.max_stripes <= 1 {
                    continue;
                }
                return Err(format!("{host} has no stripe {index}"));
            };
            if usize::from(stripe.stripe.0) != index {
                return Err(format!("{host} has {} as stripe {index}", stripe.stripe));
            }
            if stripe.active.is_empty() || !stripe.fallbacks.iter().chain(&stripe.active).any(|p| p.origin) {
                return Err(format!("{host} is not led to an origin: {stripe:?}"));
            }
            for parent in stripe.active.iter().chain(&stripe.fallbacks) {
                if parent.depth >= stripe.depth {
                    return Err(format!("{host} at {} reads from {parent:?}", stripe.depth));
                }
                let Some(name) = &parent.host else {
                    continue;
                };
                let above = &self.agents[name.as_str()];
                let Some(theirs) = above.placements.get(&image_id()) else {
                    return Err(format!("{host} reads from {name}, which left"));
                };
                let mut children = theirs.children.iter();
                let told = children.any(|c| c.host.as_str() == host && c.stripe == stripe.stripe);
                if above.stream.is_some() && !told {
                    return Err(format!("{name} was not told of {host}"));
                }
            }
            for level in 1..=2 {
                let Some(group) = agent.group(level) else {
                    continue;
                };
                let named = |p: &treeboot_types::Parent| p.host.as_ref().map(|h| h.to_string());
                let above = |p| Some(self.agents.get(&named(p)?)?.group(level)? == group);
                if stripe.active.iter().any(|p| above(p) != Some(true)) && !stands_in(host) {
                    heads.entry(group).or_default().push(host);
                }
            }
            let count = u32::try_from(stripe.active.len()).unwrap();
            for (turn, parent) in (0..count).zip(&stripe.active) {
                let key = parent.host.as_ref().map_or("origin".into(), ToString::to_string);
                *load.entry(key).or_default() += active / count + u32::from(turn < active % count);
            }
        }
        if let Some((rack, heads)) = heads.iter().find(|(_, heads)| heads.len() > 1) {
            return Err(format!("stripe {index} comes into {rack:?} by {heads:?}"));
        }
        // Once for its own rack, and again where it is the head of that, and of a zone.
        let scopes = |host: &str| self.agents.get(host).map_or(1, |agent| 1 + agent.labels.len());
        let bound = |host: &str| fan_out * active * u32::try_from(scopes(host)).unwrap();
        match load.iter().find(|(host, shares)| **shares > bound(host)) {
            Some((host, shares)) if active == 1 => Err(format!("{host} feeds {shares}")),
            _ => Ok(()),
        }
    }

    /// In which stripes a host has children, and how many in all.
    pub(super) fn feeds(&self, host: &str) -> (BTreeSet<u16>, usize) {
        let tree = self.forest.tree(&image_ref()).unwrap();
        let of_host = tree
            .vertices
            .iter()
            .filter(|v| v.host.as_ref().is_some_and(|h| h.as_str() == host) && v.children > 0);
        let stripes: Vec<(u16, usize)> = of_host.map(|v| (v.stripe.0, v.children as usize)).collect();
        (
            stripes.iter().map(|s| s.0).collect(),
            stripes.iter().map(|s| s.1).sum(),
        )
    }
}

impl Agent {
    pub(super) fn speaker(&self, host: &str) -> Speaker {
        Speaker {
            host: name(host),
            instance: self.instance.clone(),
        }
    }

    /// As an agent does: an older placement than the one in force is not heeded.
    fn take(&mut self, placement: Placement) {
        let known = self.placements.get(&placement.image.id).map(|p| p.epoch);
        if known.is_none_or(|known| known <= placement.epoch) {
            self.placements.insert(placement.image.id.clone(), placement);
        }
    }

    fn digest(&self) -> Vec<u8> {
        format!("{:?}", (&self.states, &self.portal)).into_bytes()
    }

    /// Its zone (1), or its rack within its zone (2).
    fn group(&self, level: usize) -> Option<(&str, &str)> {
        let label = |key: &str| self.labels.get(key).map_or("", String::as_str);
        match level {
            1 if !label("zone").is_empty() => Some((label("zone"), "")),
            2 if !label("rack").is_empty() => Some((label("zone"), label("rack"))),
            _ => None,
        }
    }

    pub(super) fn info(&self, host: &str) -> HostInfo {
        HostInfo {
            name: name(host),
            instance: self.instance.clone(),
            agent_address: String::new(),
            portal: self.portal.clone(),
            plane: PlaneKind::User,
            max_stripes: self.max_stripes,
            labels: self.labels.clone(),
            version: "test".into(),
            weight: self.weight.max(1),
            runs_vms: true,
            holds_store: false,
        }
    }

    pub(super) fn state(&self, host: &str) -> HostState {
        let attachments = self.states.iter().filter_map(|(id, &state)| {
            let placement = self.placements.get(id)?;
            Some(Attachment {
                image: id.clone(),
                digest: placement.image.digest,
                epoch: placement.epoch,
                endpoint: Some(endpoint(&self.portal)),
                state,
                stripes: placement.stripes.clone(),
            })
        });
        HostState {
            info: self.info(host),
            attachments: attachments.collect(),
            vms: 0,
        }
    }
}
