//! The attach trees as a pure state machine: events in, effects out.
//!
//! Deliberately absent: clocks (time is an argument), I/O, async, randomness and panics. Who waits for an answer, how
//! a placement travels and where the record is kept is the shell's business; it must only make what [`Effect::Save`]
//! says durable before it carries out any other effect of the same step.
//!
//! The laws, each a property test in `tests`: every host reaches an origin; no cycle; fan-out bounded; depth within
//! one level of the best; no slot without a lease; every step ends; an equal event changes nothing; what hosts were
//! told is what the trees say.

mod audit;
mod bar;
mod beat;
mod call;
mod census;
mod enter;
mod event;
mod graft;
mod home;
mod layer;
mod load;
mod place;
mod places;
mod policy;
mod publish;
mod query;
mod rebuild;
mod record;
mod scope;
mod shape;
mod stripe;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use treeboot_types::{
    AttachState, Attachment, BadParent, Child, Endpoint, Epoch, HostInfo, HostName, Image, ImageId,
    ImageName, ImageRef, PathPolicy, StripeIndex, StripePlacement, Tick,
};

pub use census::{Census, ImageCensus};
pub use event::{
    Answer, Beat, Call, CallId, Effect, Event, HostState, Note, Push, Refusal, Speaker, StreamId, Unwanted,
};
pub use load::LoadError;
pub use policy::{KAry, Policy, Role, Striped};
pub use query::{Candidate, HostView, TreeView, VertexView};
pub use record::{AttachmentRecord, Change, HeldOf, HeldShare, HostRecord, Key, Record};
pub use scope::{RACK_LABEL, ZONE_LABEL};

use crate::planted::{Bug, is_planted, planted};

use layer::Node;
use scope::Scope;
use stripe::Stripe;

/// How the trees are kept.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Shapes the trees.
    pub policy: Arc<dyn Policy>,
    /// Parents that a host reads from at once, each at 1/n of a slot; from 1.
    pub active_parents: u32,
    /// How active parents share the load.
    pub path_policy: PathPolicy,
    /// How often a host is to beat.
    pub beat_ms: u64,
    /// How long a host and its ready slots last without a beat.
    pub lease_ms: u64,
    /// How long a slot lasts that nobody registered and no beat mentions.
    pub pending_lease_ms: u64,
}

/// Most hosts that one coordinator knows: the fleet of the design.
pub const MAX_HOSTS: usize = 100_000;
/// Most versions of images in the record; each is a few hundred bytes and a tree.
pub const MAX_IMAGES: usize = 10_000;
/// Attachments of one host. A host holds as many caches and exports, so more is a runaway client.
pub const MAX_ATTACHMENTS: usize = 1_024;

/// All trees of all images, and the hosts.
#[derive(Debug)]
pub struct Forest {
    settings: Settings,
    /// The last one given out.
    epoch: Epoch,
    /// Whether this step gave one out.
    epoch_taken: bool,
    clock: LeaseClock,
    images: BTreeMap<ImageId, Grove>,
    /// The highest version that each name ever had.
    newest: BTreeMap<ImageName, u32>,
    hosts: BTreeMap<HostName, Host>,
    streams: BTreeMap<StreamId, HostName>,
    /// Of hosts that are gone: the attachments that had ended before, until no beat can be under way any more.
    left: BTreeMap<HostName, (u64, BTreeMap<ImageId, Epoch>)>,
    /// Images whose trees this step changed.
    changed: BTreeSet<ImageId>,
    /// Places whose record this step changed although their placement reads the same.
    unsaved: BTreeSet<(ImageId, HostName)>,
    /// Hosts that this step takes out: nobody is moved under them.
    dying: BTreeSet<HostName>,
    /// Attachments that hosts speak of and that have no place yet: the image is not known, or the window is open.
    claimed: BTreeMap<ImageId, BTreeMap<HostName, Attachment>>,
    /// While places are learned from hosts and not given out.
    window: Option<rebuild::Window>,
    window_ms: u64,
}

/// Time as leases count it: only while the coordinator listened. A process that was stopped for an hour, or a clock
/// that jumps, must not end every lease at once.
#[derive(Debug, Clone, Copy, Default)]
struct LeaseClock {
    last: Option<Tick>,
    heard_ms: u64,
}

/// The trees of one image.
#[derive(Debug)]
struct Grove {
    image: Arc<Image>,
    origin_endpoints: Vec<Arc<Endpoint>>,
    stripes: Vec<Stripe>,
    places: places::Places,
    /// The stripes that zones and racks are inner in; those that a host stands in.
    groups: BTreeMap<Scope, StripeIndex>,
    /// Hosts whose home this step changed.
    changed_homes: BTreeSet<HostName>,
    /// What the agents of its origins were told.
    origins_told: BTreeMap<HostName, Told>,
}

/// A host's place in the trees of an image.
#[derive(Debug)]
struct Place {
    endpoint: Arc<Endpoint>,
    state: AttachState,
    /// When its parents changed last.
    position: Epoch,
    joined: u64,
    /// Where it is a member: its rack, its zone or the fleet.
    scope: Scope,
    /// The stripe that it is inner in, where the policy tells stripes apart.
    home: StripeIndex,
    /// Stripes that it stands in: all, or the first alone where it cannot read them apart.
    stripes: usize,
    lease_until_ms: u64,
    told: Told,
    /// The stream on which its host spoke of it last.
    mentioned_on: Option<StreamId>,
    /// Paths that it may still act on and that `told` lacks.
    stale: bar::Paths,
    /// Since the coordinator's start it has not said what it acts on.
    unsure: bool,
    /// Paths of `told` whose hosts do not let it in yet.
    barred: bar::Paths,
    /// Paths that it is not told of yet.
    held_back: bar::Paths,
    /// Children of earlier places that it may still let in and that `told` lacks.
    lets_in: bar::Paths,
    /// Whom it may still let in is not known whole: it may act on a place that is forgotten.
    lets_in_others: bool,
    /// It acts on what it was told last.
    is_confirmed: bool,
}

/// The placement that a host was told last.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Told {
    epoch: Epoch,
    stripes: Vec<StripePlacement>,
    children: Vec<Child>,
}

#[derive(Debug)]
struct Host {
    info: HostInfo,
    stream: Option<StreamId>,
    /// Of the last state that it sent.
    digest: Option<Vec<u8>>,
    /// What that state lists.
    listed: BTreeSet<ImageId>,
    /// A place that the state lists was removed: whether the host knows of that its next one shows.
    is_outdated: bool,
    vms: u32,
    last_beat_ms: u64,
    lease_until_ms: u64,
    /// Attachments that ended, so that a late beat does not bring them back.
    ended: BTreeMap<ImageId, Epoch>,
    /// Paths that it may act on in images where it has no place.
    acts: BTreeMap<ImageId, bar::Paths>,
    /// Parents that it complained of and is not put under again.
    avoids: BTreeSet<Option<HostName>>,
    /// When a complaint of it, or about it, last moved somebody.
    moved_at_ms: Option<u64>,
    reported_by_it: Vec<BadParent>,
    wrong_bytes_reports: u64,
}

impl Forest {
    /// Trees without hosts and images.
    pub fn new(settings: Settings) -> Self {
        Self {
            window_ms: settings.lease_ms,
            window: None,
            claimed: BTreeMap::new(),
            settings,
            // Never zero, so that a host that was never told anything is behind everybody.
            epoch: Epoch {
                incarnation: 1,
                counter: 0,
            },
            epoch_taken: false,
            clock: LeaseClock::default(),
            images: BTreeMap::new(),
            newest: BTreeMap::new(),
            hosts: BTreeMap::new(),
            streams: BTreeMap::new(),
            left: BTreeMap::new(),
            changed: BTreeSet::new(),
            unsaved: BTreeSet::new(),
            dying: BTreeSet::new(),
        }
    }

    /// One event, at a time of a monotonic clock. Effects are appended to `out`.
    pub fn step(&mut self, now: Tick, event: Event, out: &mut Vec<Effect>) {
        self.advance(now, out);
        self.close_window(out);
        let (before, is_clock) = (out.len(), event == Event::Clock);
        match event {
            Event::Clock => {
                self.end_leases(out);
                self.publish(None, out);
            }
            Event::Beat(stream, beat) => {
                let sequence = beat.sequence;
                let taken = self.beat(stream, *beat, out);
                self.publish(None, out);
                if taken {
                    out.push(Effect::Push(stream, Push::Ack { sequence }));
                }
            }
            Event::StreamClosed(stream) => self.close_stream(stream),
            Event::Call(call, what) => {
                if let Some(what) = self.hold(call, *what) {
                    self.decide(call, what, out);
                }
            }
        }
        // The audit looks at everything, so it is for small trees, which show every law as well as large ones; and for steps
        // that did something, with the clock's for what they may have left.
        let is_ack = |effect: &Effect| matches!(effect, Effect::Push(_, Push::Ack { .. }));
        let is_quiet = || !is_clock && out.iter().skip(before).all(is_ack);
        debug_assert!(
            self.hosts.len() > 64 || is_planted() || is_quiet() || self.audit().is_ok(),
            "{:?}",
            self.audit()
        );
    }

    fn decide(&mut self, call: CallId, what: Call, out: &mut Vec<Effect>) {
        let outcome = self.call(what, out);
        let answered = match &outcome {
            Ok(call::Outcome::Joined(image, host)) => Some((image.clone(), host.clone())),
            _ => None,
        };
        self.publish(answered, out);
        let answer = outcome.map(|outcome| self.answer(outcome));
        if let Err(refusal) = &answer {
            out.push(Effect::Note(Note::Refused {
                refusal: refusal.clone(),
            }));
        }
        out.push(Effect::Answer(call, answer));
    }

    /// The last epoch that was given out.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// How the trees are kept.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    fn advance(&mut self, now: Tick, out: &mut Vec<Effect>) {
        let passed = self.clock.last.map_or(0, |last| now.since_ms(last));
        // The clock event comes at least every beat; what is beyond two of them was not listened to.
        let most = self.settings.beat_ms.saturating_mul(2);
        let counted = if planted(Bug::LeaseClockJumps) {
            passed
        } else {
            passed.min(most)
        };
        if counted < passed {
            out.push(Effect::Note(Note::Deaf {
                at: now,
                ms: passed - counted,
            }));
        }
        self.clock.heard_ms = self.clock.heard_ms.saturating_add(counted);
        self.clock.last = Some(self.clock.last.map_or(now, |last| last.max(now)));
    }

    /// The epoch of this step's decisions.
    fn take_epoch(&mut self) -> Epoch {
        if !self.epoch_taken {
            self.epoch_taken = true;
            let step = u64::from(self.epoch.counter == 0 || !planted(Bug::EpochReused));
            self.epoch.counter = self.epoch.counter.saturating_add(step);
        }
        self.epoch
    }

    fn end_leases(&mut self, out: &mut Vec<Effect>) {
        let now = self.clock.heard_ms;
        self.left.retain(|_, (until_ms, _)| *until_ms > now);
        let lost: BTreeSet<HostName> = self
            .hosts
            .iter()
            .filter(|(_, host)| host.lease_until_ms <= now)
            .map(|(name, _)| name.clone())
            .collect();
        let ended: Vec<(ImageId, HostName)> = self
            .images
            .iter()
            .flat_map(|(id, grove)| grove.places.iter().map(move |(host, place)| (id, host, place)))
            .filter(|(_, host, place)| place.lease_until_ms <= now && !lost.contains(*host))
            .filter(|_| !planted(Bug::LeaseLeaks))
            .map(|(id, host, _)| (id.clone(), host.clone()))
            .collect();
        self.dying = lost;
        for host in self.deepest_first(&self.dying) {
            let silent_ms = now.saturating_sub(self.hosts.get(&host).map_or(0, |h| h.last_beat_ms));
            self.drop_host(&host, out);
            out.push(Effect::Note(Note::HostLost { host, silent_ms }));
        }
        self.dying.clear();
        for (image, host) in ended {
            self.drop_place(&image, &host, out);
            self.tell_detached(
                &image,
                &host,
                Unwanted::place("its lease ended: nobody registered or mentioned it"),
                out,
            );
            out.push(Effect::Note(Note::LeaseEnded { host, image }));
        }
    }

    /// Hosts that go together go from the leaves upward, so that nobody is moved under one that goes next.
    fn deepest_first(&self, hosts: &BTreeSet<HostName>) -> Vec<HostName> {
        let depth = |host: &HostName| {
            let node = Node::Host(host.clone());
            let groves = self.images.values().filter(|g| g.places.contains_key(host));
            let depths = groves.flat_map(|g| (0..g.stripes.len()).filter_map(|s| g.depth(s, &node)));
            depths.max().unwrap_or(0)
        };
        let mut order: Vec<(u32, HostName)> = hosts.iter().map(|h| (depth(h), h.clone())).collect();
        order.sort_by(|a, b| b.cmp(a));
        order.into_iter().map(|(_, host)| host).collect()
    }

    /// A host is gone, with all its places.
    fn drop_host(&mut self, host: &HostName, out: &mut Vec<Effect>) {
        // What ends with it only now it did not give up, and may come back to.
        let known = self.hosts.get_mut(host);
        let ended = known.map(|h| std::mem::take(&mut h.ended)).unwrap_or_default();
        if !ended.is_empty() && self.left.len() < MAX_HOSTS {
            let until_ms = self.clock.heard_ms.saturating_add(self.settings.lease_ms);
            self.left.insert(host.clone(), (until_ms, ended));
        }
        let images: Vec<ImageId> = self
            .images
            .iter()
            .filter(|(_, grove)| grove.places.contains_key(host))
            .map(|(id, _)| id.clone())
            .collect();
        for image in images {
            self.drop_place(&image, host, out);
        }
        self.forget_claims(host);
        if let Some(host) = self.hosts.remove(host)
            && let Some(stream) = host.stream
        {
            self.streams.remove(&stream);
            out.push(Effect::Close(stream));
        }
        out.push(Effect::Save(Change::Delete(Key::Host(host.clone()))));
    }

    /// A host's place is free; its children get other parents.
    fn drop_place(&mut self, image: &ImageId, host: &HostName, out: &mut Vec<Effect>) {
        let Some(grove) = self.images.get_mut(image) else {
            return;
        };
        let Some(place) = grove.places.remove(host) else {
            return;
        };
        let around = place::Around {
            hosts: &self.hosts,
            dying: &self.dying,
            settings: &self.settings,
        };
        around.go(grove, host, &place.scope);
        self.changed.insert(image.clone());
        self.unsaved.remove(&(image.clone(), host.clone()));
        out.push(Effect::Save(Change::Delete(Key::Attachment(
            image.clone(),
            host.clone(),
        ))));
        let epoch = self.take_epoch();
        let mut paths = place.stale;
        if place.stripes > 1 {
            paths.extend(bar::paths_of(&place.told.stripes));
        }
        self.acts_without(image, host, paths);
        if let Some(host) = self.hosts.get_mut(host) {
            host.end(image.clone(), epoch);
        }
    }

    fn tell_detached(&mut self, image: &ImageId, host: &HostName, why: Unwanted, out: &mut Vec<Effect>) {
        let epoch = self.epoch;
        if let Some(stream) = self.hosts.get(host).and_then(|h| h.stream) {
            let detach = Push::Detach {
                image: image.clone(),
                epoch,
                why,
            };
            out.push(Effect::Push(stream, detach));
        }
    }

    fn close_stream(&mut self, stream: StreamId) {
        if let Some(name) = self.streams.remove(&stream)
            && let Some(host) = self.hosts.get_mut(&name)
            && host.stream == Some(stream)
        {
            host.stream = None;
        }
    }

    fn resolve(&self, image: &ImageRef) -> Result<ImageId, Refusal> {
        let unknown = || Refusal::UnknownImage {
            image: image.to_string(),
        };
        let id = match image.version {
            Some(version) => ImageId {
                name: image.name.clone(),
                version,
            },
            None => self
                .images
                .keys()
                .rfind(|id| id.name == image.name)
                .cloned()
                .ok_or_else(unknown)?,
        };
        if self.images.contains_key(&id) {
            Ok(id)
        } else {
            Err(unknown())
        }
    }
}

impl Host {
    /// Whether it may still act on a place in this image, although it has none: one that it had, or of which its state tells.
    fn may_act_in(&self, image: &ImageId) -> bool {
        self.digest.is_none()
            || self.listed.contains(image)
            || self.ended.contains_key(image)
            || self.acts.contains_key(image)
    }

    /// Remembers that an attachment ended.
    fn end(&mut self, image: ImageId, epoch: Epoch) {
        self.ended.insert(image, epoch);
        if self.ended.len() > MAX_ATTACHMENTS {
            // The oldest is the least likely to be mentioned by a beat that is still on its way.
            if let Some(oldest) = self
                .ended
                .iter()
                .min_by_key(|(_, epoch)| **epoch)
                .map(|(i, _)| i.clone())
            {
                self.ended.remove(&oldest);
            }
        }
    }
}

impl Grove {
    fn new(image: Image, settings: &Settings) -> Self {
        let mut grove = Self {
            stripes: (0..image.stripes).map(|_| Stripe::default()).collect(),
            origin_endpoints: Vec::new(),
            places: places::Places::default(),
            groups: BTreeMap::new(),
            changed_homes: BTreeSet::new(),
            origins_told: BTreeMap::new(),
            image: Arc::new(image),
        };
        grove.take_in_origins(settings);
        grove
    }

    /// Gives origins their slots and keeps their endpoints at hand.
    fn take_in_origins(&mut self, settings: &Settings) {
        let origins = &self.image.origins;
        self.origin_endpoints = origins.iter().map(|o| Arc::new(o.endpoint.clone())).collect();
        let stripes = self.image.stripes;
        for (index, stripe) in (0..).map(StripeIndex).zip(&mut self.stripes) {
            let shares = settings.shares(settings.policy.slots(index, stripes, Role::Origin));
            let fleet = stripe.open(&Scope::Fleet);
            for (origin, _) in (0..).zip(origins) {
                fleet.insert_root(Node::Origin(origin), shares);
            }
        }
    }

    /// Whether a host serves all of the image from its own store.
    fn is_origin(&self, host: &HostName) -> bool {
        self.origin_of(host).is_some()
    }

    fn origin_of(&self, host: &HostName) -> Option<u16> {
        let mut origins = (0..).zip(&self.image.origins);
        origins
            .find(|(_, o)| o.host.as_ref() == Some(host))
            .map(|(i, _)| i)
    }
}

impl Settings {
    /// Slots in shares.
    fn shares(&self, slots: u32) -> u32 {
        slots.saturating_mul(self.active_parents)
    }
}
