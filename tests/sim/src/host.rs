//! One host: what an agent's tasks do, in virtual time, over the agent's own pure parts. `Desired` is its journal, [`heed`] judges what the
//! coordinator says, [`plan`] plans, the planner's [`World`] is what the host holds, and [`Talk`] keeps its stream.
//!
//! Deliberately absent: any rule of its own about what a placement means.

use std::collections::VecDeque;

use treeboot_agent::desired::{Change, Desired, DiskState, Place};
use treeboot_agent::heed::{self, Ending, Heeded};
use treeboot_agent::link::talk::{Talk, state_digest};
use treeboot_agent::stack::{Access, Content, Sources, Step, WantedDisk, World, plan};
use treeboot_coordinator::tree::{Answer, HostState, Refusal, Speaker};
use treeboot_proto::v1;
use treeboot_types::{
    AttachState, Attachment, BadParent, Digest, Endpoint, Epoch, HostInfo, HostName, ImageId, Placement,
    VmName,
};

/// What the simulated fleet reads.
pub const CONTENT: Content = Content {
    digest: Digest([7; 32]),
    bytes: 1 << 30,
    chunk_bytes: 1 << 16,
};

/// First and longest pause before an attachment is tried again, as the owner task has them.
const RETRY_MS: (u64, u64) = (50, 2_000);
/// First and longest pause before a stream is tried again, as the link has them.
const BACKOFF_MS: (u64, u64) = (50, 2_000);

/// How a call ended, as the agent sees it.
#[derive(Debug, Clone)]
pub enum Reply {
    /// The coordinator's answer.
    Said(Result<Answer, Refusal>),
    /// Nobody answered in time, or at all.
    Unavailable,
}

/// What an agent's call is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum For {
    /// An attachment.
    Attach,
    /// A place anew, because the coordinator does not know the old one.
    Rejoin,
    /// A registration with this epoch.
    Register(Epoch),
    /// Giving the place up.
    Remove,
}

/// What the owner of the image is told.
#[derive(Debug, Clone)]
pub enum Message {
    /// People want the image here.
    Attach,
    /// They want it no more.
    Detach,
    /// The coordinator's word.
    Placed(Box<Placement>),
    /// The coordinator wants it no more.
    Unwanted(Epoch),
    /// The stream stands again.
    Connected,
    /// The base could be read, or not.
    Readable(bool, Epoch),
    /// A call's end.
    Reply(For, Reply),
}

/// What the owner asks of the world.
#[derive(Debug, Clone, PartialEq)]
pub enum Ask {
    /// Call the coordinator.
    Call(For, Epoch),
    /// Look after so many milliseconds whether the base can be read.
    Settle(u64, Epoch),
    /// Take the next step of the plan soon.
    Step,
    /// The state changed: beat.
    Beat,
    /// People see that the image is not attached, and ask again later.
    AskAgain,
}

/// What the owner is in the middle of. It takes one message at a time.
#[derive(Debug, Clone, PartialEq)]
enum Doing {
    Nothing,
    Waiting(For),
    /// Carrying a plan out; afterwards an attempt to become ready begins where it is told.
    Reaching {
        then_settle: bool,
    },
}

/// A stream to the coordinator.
#[derive(Debug)]
pub struct Line {
    /// Its number.
    pub conn: u64,
    /// The coordinator has welcomed the host.
    pub welcomed: bool,
    /// When anything was heard last.
    pub heard: u64,
    /// What was said.
    pub talk: Talk<BadParent>,
}

/// One host.
#[derive(Debug)]
pub struct Host {
    /// What it says of itself.
    pub info: HostInfo,
    /// Where it exports.
    pub endpoint: Endpoint,
    /// The image.
    pub image: ImageId,
    /// The agent runs.
    pub up: bool,
    /// It will not run again.
    pub gone: bool,
    /// Which of its lives this is; what was meant for an earlier one is dropped.
    pub life: u32,
    /// People want the image here.
    pub wanted: bool,
    /// By a VM; otherwise it is pinned.
    pub vm: bool,
    /// The journal.
    pub desired: Desired,
    /// What of it survives a loss of power.
    pub synced: Desired,
    /// What the host holds.
    pub world: World,
    /// The attachment can be relied on.
    pub ready: bool,
    /// The place that its paths still follow while it reaches a new one.
    pub acting: Option<Place>,
    /// The stream.
    pub line: Option<Line>,
    /// Complaints that no stream has got rid of.
    pub unheard: Vec<BadParent>,
    /// Complaints to come.
    pub complaints: Vec<BadParent>,
    /// Whether the state may have changed since it was told.
    pub changed: bool,
    /// Why a step could not be taken: a bug of the planner.
    pub violation: Option<String>,
    backoff_ms: u64,
    pause_ms: u64,
    unregistered: bool,
    doing: Doing,
    inbox: VecDeque<Message>,
    steps: VecDeque<Step>,
    cached: Option<(HostState, Vec<u8>)>,
}

impl Host {
    /// A host that is switched off and holds nothing.
    #[must_use]
    pub fn new(info: HostInfo, endpoint: Endpoint, image: ImageId, vm: bool) -> Self {
        Self {
            info,
            endpoint,
            image,
            up: false,
            gone: false,
            life: 0,
            wanted: false,
            vm,
            desired: Desired::default(),
            synced: Desired::default(),
            world: World::default(),
            ready: false,
            acting: None,
            line: None,
            unheard: Vec::new(),
            complaints: Vec::new(),
            changed: false,
            violation: None,
            backoff_ms: BACKOFF_MS.0,
            pause_ms: RETRY_MS.0,
            unregistered: false,
            doing: Doing::Nothing,
            inbox: VecDeque::new(),
            steps: VecDeque::new(),
            cached: None,
        }
    }

    /// Its name and instance.
    #[must_use]
    pub fn speaker(&self) -> Speaker {
        Speaker {
            host: self.info.name.clone(),
            instance: self.info.instance.clone(),
        }
    }

    /// Where the coordinator put it, as it knows.
    #[must_use]
    pub fn place(&self) -> Option<&Place> {
        self.desired.images.get(&self.image)?.place.as_ref()
    }

    /// The epoch of its place.
    #[must_use]
    pub fn epoch(&self) -> Option<Epoch> {
        self.place().map(|place| place.epoch)
    }

    /// The paths it reads through at this moment.
    #[must_use]
    pub fn sources(&self) -> Option<&Sources> {
        self.world.found.paths.get(&CONTENT.digest).filter(|_| self.up)
    }

    /// Whether it serves a child at this moment.
    #[must_use]
    pub fn lets_in(&self, child: &HostName) -> bool {
        let export = self.world.found.exports.get(&self.image).filter(|_| self.up);
        export.is_some_and(|export| match &export.access {
            Access::Anyone => true,
            Access::Hosts(hosts) => hosts.contains(child),
        })
    }

    /// Nothing is under way.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.doing == Doing::Nothing
            && self.inbox.is_empty()
            && self.complaints.is_empty()
            && self.unheard.is_empty()
    }

    /// The agent starts: what the journal says is served again before anyone is asked.
    pub fn boot(&mut self, asks: &mut Vec<Ask>) {
        self.up = true;
        self.life += 1;
        self.changed = true;
        let idle = heed::left_idle(&self.desired);
        if !idle.is_empty() {
            self.commit(idle);
        }
        let plan = plan(&self.desired.wanted(), &self.world.found);
        self.steps = plan.steps.into();
        self.doing = Doing::Reaching {
            then_settle: self.place().is_some(),
        };
        self.go_on(asks);
        if self.wanted != self.place().is_some() && !self.is_stored() {
            asks.push(Ask::AskAgain);
        }
    }

    /// The agent dies; with `power` the machine does.
    pub fn die(&mut self, power: bool) {
        self.up = false;
        self.life += 1;
        if power {
            self.desired = self.synced.clone();
        } else {
            self.synced = self.desired.clone();
        }
        let found = std::mem::take(&mut self.world.found);
        self.world.found.caches = found.caches;
        self.world.found.stores = found.stores;
        self.world.found.deltas = found.deltas;
        self.ready = false;
        self.acting = None;
        self.line = None;
        self.unheard.clear();
        self.complaints.clear();
        self.inbox.clear();
        self.steps.clear();
        self.doing = Doing::Nothing;
        self.unregistered = false;
        self.backoff_ms = BACKOFF_MS.0;
        self.pause_ms = RETRY_MS.0;
        self.cached = None;
    }

    /// Whether the image lies in its store.
    #[must_use]
    pub fn is_stored(&self) -> bool {
        self.desired
            .images
            .get(&self.image)
            .is_some_and(|state| state.stored.is_some())
    }

    /// The stream is gone. Returns after how many milliseconds the next one is tried.
    pub fn lose_line(&mut self, spread: u64) -> u64 {
        if let Some(line) = self.line.take() {
            if line.welcomed {
                self.backoff_ms = BACKOFF_MS.0;
            }
            self.unheard = line.talk.unheard();
        }
        let pause = self.backoff_ms;
        self.backoff_ms = (pause * 2).min(BACKOFF_MS.1);
        pause / 2 + pause / 2 * (spread % 1000) / 1000
    }

    /// The whole state and its digest.
    pub fn state(&mut self) -> &(HostState, Vec<u8>) {
        if self.changed || self.cached.is_none() {
            let state = HostState {
                info: self.info.clone(),
                attachments: self.attachment().into_iter().collect(),
                vms: 0,
            };
            let message = v1::HostState {
                info: Some((&state.info).into()),
                attachments: state.attachments.iter().map(Into::into).collect(),
                vms: state.vms,
            };
            let digest = state_digest(&message);
            self.cached = Some((state, digest));
            self.changed = false;
        }
        self.cached
            .get_or_insert_with(|| unreachable!("it was just made"))
    }

    fn attachment(&self) -> Option<Attachment> {
        let state = self.desired.images.get(&self.image)?;
        let place = self.acting.as_ref().or(state.place.as_ref())?;
        Some(Attachment {
            image: self.image.clone(),
            digest: state.content.digest,
            epoch: place.epoch,
            endpoint: Some(self.endpoint.clone()),
            state: if self.ready {
                AttachState::Ready
            } else {
                AttachState::Pending
            },
            stripes: place.told(),
        })
    }

    /// A message for the owner; what it asks is appended.
    pub fn tell(&mut self, message: Message, asks: &mut Vec<Ask>) {
        self.inbox.push_back(message);
        self.go_on(asks);
    }

    /// The step that comes next.
    #[must_use]
    pub fn next_step(&self) -> Option<&Step> {
        self.steps.front()
    }

    /// Takes the next step of the plan.
    pub fn apply_step(&mut self) -> Option<Step> {
        let step = self.steps.pop_front()?;
        if let Err(error) = self.world.apply(&step) {
            self.violation = Some(format!("a plan's step does not fit the host: {error}"));
        }
        Some(step)
    }

    /// Takes what waits, as far as it goes; what it asks is appended.
    pub fn go_on(&mut self, asks: &mut Vec<Ask>) {
        loop {
            match self.doing {
                Doing::Reaching { .. } if !self.steps.is_empty() => {
                    asks.push(Ask::Step);
                    break;
                }
                Doing::Reaching { then_settle } => {
                    self.doing = Doing::Nothing;
                    self.changed |= self.acting.take().is_some();
                    if then_settle {
                        self.settle(0, asks);
                    }
                }
                Doing::Waiting(what) => {
                    // The answer that is waited for; all else waits with it.
                    let answers = |m: &Message| matches!(m, Message::Reply(whose, _) if *whose == what);
                    let Some(at) = self.inbox.iter().position(answers) else {
                        break;
                    };
                    self.doing = Doing::Nothing;
                    if let Some(Message::Reply(whose, reply)) = self.inbox.remove(at) {
                        self.replied(whose, reply, asks);
                    }
                }
                Doing::Nothing => match self.inbox.pop_front() {
                    Some(message) => self.take(message, asks),
                    None => break,
                },
            }
        }
        if self.changed {
            asks.push(Ask::Beat);
        }
    }

    fn take(&mut self, message: Message, asks: &mut Vec<Ask>) {
        match message {
            Message::Attach => self.attach(asks),
            Message::Detach => self.detach(asks),
            Message::Placed(placement) => self.placed(&placement, false, asks),
            Message::Unwanted(epoch) => match heed::detach(&self.desired, &self.image, epoch) {
                Ending::Ends => self.forget(asks),
                Ending::Outdated => {}
                Ending::InUse(_) => self.rejoin(asks),
            },
            Message::Connected => {
                if std::mem::take(&mut self.unregistered) {
                    self.settle(0, asks);
                }
            }
            Message::Readable(true, epoch) => asks.push(Ask::Call(For::Register(epoch), epoch)),
            Message::Readable(false, _) => {
                if self.place().is_some() {
                    let pause = self.next_pause();
                    self.reach(false);
                    self.settle(pause, asks);
                }
            }
            Message::Reply(whose, reply) => self.replied(whose, reply, asks),
        }
    }

    fn attach(&mut self, asks: &mut Vec<Ask>) {
        if !self.wanted && self.place().is_some() {
            // The agent died before it was done, and people ask again.
            self.detach(asks);
        } else if !self.wanted || self.is_stored() {
        } else if self.place().is_some() {
            let hold = self.hold();
            self.commit(vec![hold]);
        } else if self.line.as_ref().is_some_and(|line| line.welcomed) {
            self.doing = Doing::Waiting(For::Attach);
            asks.push(Ask::Call(For::Attach, Epoch::default()));
        } else {
            asks.push(Ask::AskAgain);
        }
    }

    fn hold(&self) -> Change {
        let image = self.image.clone();
        if !self.vm {
            return Change::Pinned { image, pinned: true };
        }
        Change::Disk {
            vm: self.vm_name(),
            disk: DiskState::new(
                image,
                WantedDisk {
                    digest: CONTENT.digest,
                    bytes: CONTENT.bytes,
                },
                [1; 16],
            ),
        }
    }

    fn vm_name(&self) -> VmName {
        VmName::new("vm").unwrap_or_else(|_| unreachable!("it is a name"))
    }

    fn detach(&mut self, asks: &mut Vec<Ask>) {
        if self.vm {
            let vm = self.vm_name();
            self.commit(vec![Change::DiskGone { vm }]);
            // Its files are the VM owner's, which ends with it.
            self.world.found.disks.clear();
            self.world.found.deltas.clear();
        }
        if let Some(epoch) = self.epoch() {
            self.doing = Doing::Waiting(For::Remove);
            asks.push(Ask::Call(For::Remove, epoch));
        }
    }

    fn forget(&mut self, asks: &mut Vec<Ask>) {
        self.commit(vec![Change::Detached {
            image: self.image.clone(),
            keep_cache: true,
        }]);
        self.ready = false;
        self.acting = None;
        self.unregistered = false;
        self.pause_ms = RETRY_MS.0;
        self.reach(false);
        if self.wanted {
            asks.push(Ask::AskAgain);
        }
    }

    fn placed(&mut self, placement: &Placement, rejoined: bool, asks: &mut Vec<Ask>) {
        let Heeded::Taken { change, .. } = heed::placement(&self.desired, placement) else {
            return;
        };
        let old = self.place().cloned();
        self.acting = self.acting.take().or(old);
        self.desired.fold(*change);
        // In one stripe it is learned, not committed: a loss of power may take it.
        if placement.stripes.len() > 1 {
            self.synced = self.desired.clone();
        }
        self.reach(false);
        if !rejoined && std::mem::take(&mut self.unregistered) {
            self.settle(0, asks);
        }
    }

    fn replied(&mut self, whose: For, reply: Reply, asks: &mut Vec<Ask>) {
        match (whose, reply) {
            (For::Attach, Reply::Said(Ok(Answer::Joined(placement)))) => {
                if placement.stripes.is_empty() {
                    return;
                }
                let placed = Change::Placed {
                    image: self.image.clone(),
                    content: CONTENT,
                    place: Place::of(&placement),
                };
                let hold = self.hold();
                self.commit(vec![placed, hold]);
                self.reach(true);
            }
            (For::Attach, _) => asks.push(Ask::AskAgain),
            (For::Remove, _) => self.forget(asks),
            (For::Rejoin, Reply::Said(Ok(Answer::Joined(placement)))) => self.placed(&placement, true, asks),
            (For::Rejoin, _) => {}
            (For::Register(epoch), reply) => self.registered(epoch, reply, asks),
        }
    }

    fn registered(&mut self, epoch: Epoch, reply: Reply, asks: &mut Vec<Ask>) {
        let Some(current) = self.epoch() else {
            return;
        };
        match reply {
            Reply::Said(Ok(_)) => {
                self.pause_ms = RETRY_MS.0;
                self.changed |= !self.ready;
                self.ready = true;
            }
            Reply::Unavailable => {
                self.unregistered = true;
                if self.line.as_ref().is_some_and(|line| line.welcomed) {
                    self.unregistered = false;
                    let pause = self.next_pause();
                    self.settle(pause, asks);
                }
            }
            Reply::Said(Err(_)) if current > epoch => self.settle(0, asks),
            Reply::Said(Err(refusal)) => {
                let pause = self.next_pause();
                let is_stale = matches!(
                    refusal,
                    Refusal::OtherEpoch { .. } | Refusal::NotAttached { .. } | Refusal::UnknownHost { .. }
                );
                if is_stale && self.line.as_ref().is_some_and(|line| line.welcomed) {
                    self.rejoin(asks);
                }
                self.settle(pause, asks);
            }
        }
    }

    fn rejoin(&mut self, asks: &mut Vec<Ask>) {
        self.doing = Doing::Waiting(For::Rejoin);
        asks.push(Ask::Call(For::Rejoin, Epoch::default()));
    }

    fn settle(&mut self, pause: u64, asks: &mut Vec<Ask>) {
        if let Some(epoch) = self.epoch() {
            asks.push(Ask::Settle(pause, epoch));
        }
    }

    fn next_pause(&mut self) -> u64 {
        let pause = self.pause_ms;
        self.pause_ms = (pause * 2).min(RETRY_MS.1);
        pause
    }

    fn commit(&mut self, changes: Vec<Change>) {
        changes.into_iter().for_each(|change| self.desired.fold(change));
        self.synced = self.desired.clone();
        self.changed = true;
    }

    fn reach(&mut self, then_settle: bool) {
        let plan = plan(&self.desired.wanted_of(CONTENT.digest), &self.world.found);
        self.steps = plan.steps.into();
        self.doing = Doing::Reaching { then_settle };
    }
}
