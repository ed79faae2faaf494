//! The owner of one content on this host: its place in the trees, its base, its exports.
//!
//! One task for each content. It alone asks the coordinator for a place of its images, plans and applies what follows,
//! and registers once the base can be read. It takes one message at a time; reading and registering go on beside it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{mpsc, oneshot};
use treeboot_types::{Digest, Epoch, ImageId, Iqn, Placement, VmName};

use super::view::{Readiness, endpoint};
use super::{HostError, Shared};
use crate::desired::{Change, DiskState, Place};
use crate::heed::{self, Ending, Heeded};
use crate::link::{LinkError, Unwanted};
use crate::plane::PlaneFuture;
use crate::stack::Content;

/// Messages that may wait for the owner. A burst of creates on one host is tens; beyond it, who asks waits.
pub(super) const INBOX: usize = 128;
/// First and longest pause before a base that could not be read is tried again.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// Why a base is to be there.
pub(super) enum Hold {
    /// For itself; answered once it is registered.
    Pin,
    /// For a VM's disk, which is then desired; answered once the base is open.
    Disk(VmName, Box<DiskState>),
}

pub(super) type Reply<T> = oneshot::Sender<Result<T, HostError>>;

pub(super) enum BaseMsg {
    /// Have the image attached.
    Attach {
        image: ImageId,
        content: Content,
        hold: Hold,
        reply: Reply<()>,
    },
    /// A VM's disk is gone. `keep` pins the base.
    Released { image: ImageId, keep: bool },
    /// End the attachment.
    Detach { image: ImageId, reply: Reply<()> },
    /// The coordinator's word.
    Placed(Box<Placement>),
    /// The coordinator wants it no more.
    Unwanted(Unwanted),
    /// The stream to the coordinator stands again.
    Connected,
    /// What is desired of this content changed elsewhere (the store).
    Changed { reply: Reply<()> },
}

/// Why one image is to be there, and who is to be told: one who pins it, or as many as give it to disks.
struct Attach {
    image: ImageId,
    content: Content,
    holds: Vec<Hold>,
    replies: Vec<Reply<()>>,
}

impl Attach {
    /// Disks whose VMs wait already share one write of the journal and one look at the base. `held` is the message that ended them.
    fn with_those_that_wait(
        mut self,
        held: &mut Option<BaseMsg>,
        inbox: &mut mpsc::Receiver<BaseMsg>,
    ) -> Self {
        while self.holds.len() < INBOX && matches!(self.holds.last(), Some(Hold::Disk(..))) {
            match inbox.try_recv() {
                Ok(BaseMsg::Attach {
                    image,
                    hold: hold @ Hold::Disk(..),
                    reply,
                    ..
                }) if image == self.image => {
                    self.holds.push(hold);
                    self.replies.push(reply);
                }
                Ok(other) => {
                    *held = Some(other);
                    break;
                }
                Err(_) => break,
            }
        }
        self
    }
}

async fn next(held: &mut Option<BaseMsg>, inbox: &mut mpsc::Receiver<BaseMsg>) -> Option<BaseMsg> {
    match held.take() {
        Some(message) => Some(message),
        None => inbox.recv().await,
    }
}

/// How an attempt to become ready ended.
enum Settled {
    /// Registered with this epoch.
    Registered,
    /// The base cannot be read.
    Unreadable(String),
    /// The coordinator did not take it.
    Unregistered(LinkError),
}

type Settling = std::pin::Pin<Box<dyn Future<Output = (ImageId, Epoch, Settled)> + Send>>;

pub(super) struct BaseOwner {
    shared: Arc<Shared>,
    digest: Digest,
    settling: FuturesUnordered<Settling>,
    /// Who waits for an image's being registered.
    waiting: BTreeMap<ImageId, Vec<Reply<()>>>,
    /// The pause before an image's next attempt.
    pauses: BTreeMap<ImageId, Duration>,
    /// Images to register as soon as the coordinator is back.
    unregistered: Vec<ImageId>,
}

impl BaseOwner {
    pub(super) fn start(shared: &Arc<Shared>, digest: Digest) -> mpsc::Sender<BaseMsg> {
        let (sender, inbox) = mpsc::channel(INBOX);
        let owner = Self {
            shared: Arc::clone(shared),
            digest,
            settling: FuturesUnordered::new(),
            waiting: BTreeMap::new(),
            pauses: BTreeMap::new(),
            unregistered: Vec::new(),
        };
        shared.tasks.spawn(owner.run(inbox));
        sender
    }

    async fn run(mut self, mut inbox: mpsc::Receiver<BaseMsg>) {
        let stop = self.shared.stop.clone();
        let attached: Vec<_> = self.attached().collect();
        for image in attached {
            self.settle(&image, Duration::ZERO);
        }
        let mut held = None;
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                message = next(&mut held, &mut inbox) => match message {
                    Some(BaseMsg::Attach { image, content, hold, reply }) => {
                        let attach = Attach { image, content, holds: vec![hold], replies: vec![reply] };
                        let attach = attach.with_those_that_wait(&mut held, &mut inbox);
                        self.attach(attach).await;
                    }
                    Some(message) => self.take(message).await,
                    None => return,
                },
                Some((image, epoch, settled)) = self.settling.next() => {
                    self.settled(image, epoch, settled).await;
                }
            }
        }
    }

    /// Images of this content that have a place.
    fn attached(&self) -> impl Iterator<Item = ImageId> + use<> {
        let desired = self.shared.journal().desired();
        let digest = self.digest;
        let images: Vec<_> = desired
            .images
            .iter()
            .filter(|(_, state)| state.content.digest == digest && state.place.is_some())
            .map(|(image, _)| image.clone())
            .collect();
        images.into_iter()
    }

    fn place_epoch(&self, image: &ImageId) -> Option<Epoch> {
        let desired = self.shared.journal().desired();
        desired.images.get(image)?.place.as_ref().map(|place| place.epoch)
    }

    async fn take(&mut self, message: BaseMsg) {
        match message {
            BaseMsg::Attach {
                image,
                content,
                hold,
                reply,
            } => {
                let (holds, replies) = (vec![hold], vec![reply]);
                self.attach(Attach {
                    image,
                    content,
                    holds,
                    replies,
                })
                .await;
            }
            BaseMsg::Released { image, keep } => {
                if let Err(error) = self.released(&image, keep).await {
                    tracing::warn!(%image, error = %super::chain(&error), "the base is not given up yet");
                }
            }
            BaseMsg::Detach { image, reply } => {
                let result = self.detach(&image).await;
                let _ = reply.send(result);
            }
            BaseMsg::Placed(placement) => self.placed(&placement).await,
            BaseMsg::Unwanted(unwanted) => self.unwanted(unwanted).await,
            BaseMsg::Connected => {
                for image in std::mem::take(&mut self.unregistered) {
                    self.settle(&image, Duration::ZERO);
                }
            }
            BaseMsg::Changed { reply } => {
                let result = self.reach("the image's export").await;
                let _ = reply.send(result);
            }
        }
    }

    async fn attach(&mut self, attach: Attach) {
        let Attach {
            image,
            content,
            holds,
            replies,
        } = attach;
        let desired = self.shared.journal().desired();
        let state = desired.images.get(&image);
        let stored = state.is_some_and(|state| state.stored.is_some());
        let had_place = state.is_some_and(|state| state.place.is_some());
        drop(desired);
        let waits = holds.iter().any(|hold| matches!(hold, Hold::Pin));
        let disks = holds.iter().filter_map(|hold| match hold {
            Hold::Pin => None,
            Hold::Disk(vm, _) => Some(vm.clone()),
        });
        let undo: Vec<VmName> = disks.collect();
        let result = self
            .attach_steps(&image, content, holds, stored || had_place)
            .await;
        match result {
            Err(cause) => {
                let answer = match self.take_back(&image, undo, stored || had_place).await {
                    Ok(()) => cause,
                    Err(undo) => HostError::Undo {
                        cause: Box::new(cause),
                        undo: Box::new(undo),
                    },
                };
                answer.answer(replies);
            }
            Ok(()) if stored || self.shared.board.is_ready(&image) || !waits => {
                if !stored && !had_place {
                    self.settle(&image, Duration::ZERO);
                }
                for reply in replies {
                    let _ = reply.send(Ok(()));
                }
            }
            Ok(()) => {
                self.waiting.entry(image.clone()).or_default().extend(replies);
                if !had_place {
                    self.settle(&image, Duration::ZERO);
                }
            }
        }
    }

    async fn attach_steps(
        &mut self,
        image: &ImageId,
        content: Content,
        holds: Vec<Hold>,
        there: bool,
    ) -> Result<(), HostError> {
        let mut changes = Vec::new();
        if !there {
            let endpoint = endpoint(&self.shared.portal, image);
            let placement = self.shared.link.join(image, &endpoint).await?;
            if placement.image.digest != self.digest {
                return Err(HostError::Invalid(format!(
                    "the coordinator's record of {image} changed its content while it was being attached; try again"
                )));
            }
            let image = image.clone();
            let place = Place::of(&placement);
            changes.push(Change::Placed {
                image,
                content,
                place,
            });
        }
        changes.extend(holds.into_iter().map(|hold| match hold {
            Hold::Pin => Change::Pinned {
                image: image.clone(),
                pinned: true,
            },
            Hold::Disk(vm, disk) => Change::Disk { vm, disk: *disk },
        }));
        self.shared.journal().commit(changes).await?;
        self.reach("the attachment").await
    }

    /// Undoes an attachment that failed on its way.
    async fn take_back(
        &mut self,
        image: &ImageId,
        vms: Vec<VmName>,
        was_there: bool,
    ) -> Result<(), HostError> {
        if !vms.is_empty() {
            // Their deltas were not made yet.
            let gone = vms.into_iter().map(|vm| Change::DiskGone { vm });
            self.shared.journal().commit(gone).await?;
        }
        if was_there {
            return Ok(());
        }
        match self.place_epoch(image) {
            Some(epoch) => self.give_up(image, epoch, false).await,
            None => Ok(()),
        }
    }

    async fn released(&mut self, image: &ImageId, keep: bool) -> Result<(), HostError> {
        let desired = self.shared.journal().desired();
        let Some(state) = desired.images.get(image) else {
            return Ok(());
        };
        if keep && !state.pinned && state.place.is_some() {
            let image = image.clone();
            return Ok(self
                .shared
                .journal()
                .commit([Change::Pinned { image, pinned: true }])
                .await?);
        }
        let idle = !state.pinned && desired.disks_of(image).next().is_none();
        match state.place.as_ref().map(|place| place.epoch) {
            Some(epoch) if idle => self.give_up(image, epoch, true).await,
            _ => Ok(()),
        }
    }

    async fn detach(&mut self, image: &ImageId) -> Result<(), HostError> {
        let desired = self.shared.journal().desired();
        let vms: Vec<_> = desired.disks_of(image).cloned().collect();
        if !vms.is_empty() {
            return Err(HostError::ImageInUse {
                image: image.clone(),
                host: self.shared.host().to_string(),
                vms,
            });
        }
        match self.place_epoch(image) {
            Some(epoch) => self.give_up(image, epoch, true).await,
            None => Ok(()),
        }
    }

    /// Ends an attachment: the coordinator first, so that children are placed anew while they can still read here.
    async fn give_up(&mut self, image: &ImageId, epoch: Epoch, keep_cache: bool) -> Result<(), HostError> {
        if let Err(error) = self.shared.link.remove(image, epoch).await {
            // The next beat lists what is attached, so the coordinator learns of it anyway.
            tracing::warn!(%image, error = %super::chain(&error), "the coordinator was not told of the detachment");
        }
        self.forget(image, keep_cache).await
    }

    async fn forget(&mut self, image: &ImageId, keep_cache: bool) -> Result<(), HostError> {
        let kept = self.shared.journal().desired().kept_caches.clone();
        self.shared
            .journal()
            .commit([Change::Detached {
                image: image.clone(),
                keep_cache,
            }])
            .await?;
        self.shared.settings.keys.detached(&Iqn::of_image(image)).await;
        self.shared.board.forget(image);
        self.pauses.remove(image);
        self.unregistered.retain(|other| other != image);
        self.waiting.remove(image);
        tracing::info!(%image, "detached");
        self.reach("the detachment").await?;
        // Keeping this cache may have been the end of an older one, which is no other owner's while it is idle.
        let desired = self.shared.journal().desired();
        for digest in kept.into_iter().filter(|old| !desired.kept_caches.contains(old)) {
            if digest != self.digest {
                self.shared.reach(digest, "the removal of an old cache").await?;
            }
        }
        Ok(())
    }

    async fn placed(&mut self, placement: &Placement) {
        let image = &placement.image.id;
        let desired = self.shared.journal().desired();
        let epoch = placement.epoch;
        let (change, moved) = match heed::placement(&desired, placement) {
            Heeded::Taken { change, moved } => (*change, moved),
            Heeded::InStore => return,
            Heeded::NotAttached => {
                tracing::debug!(%image, "a placement of an image that is not attached");
                return;
            }
            Heeded::Older { current } => {
                tracing::debug!(%image, given = %epoch, %current, "an older placement");
                return;
            }
        };
        if moved {
            let active = placement.stripes.iter().flat_map(|stripe| &stripe.active);
            let parents: Vec<_> = active.map(|p| (&p.host, &p.endpoint.portal)).collect();
            tracing::info!(%image, %epoch, ?parents, "a new place");
        }
        if let Some(old) = desired.images.get(image).and_then(|state| state.place.clone()) {
            self.shared.board.acts_on(image, old);
        }
        // In one stripe a host that acts on an old place reads from nobody below it. In several it may, so the coordinator keeps such
        // hosts apart until they say that they act on the new place; a loss of power must not take that word back.
        let journal = self.shared.journal();
        let written = if placement.stripes.len() > 1 {
            journal.commit([change]).await
        } else {
            journal.learn(change).await
        };
        if let Err(error) = written {
            tracing::error!(%image, %error, "the new place is not taken");
            return;
        }
        if let Err(error) = self.reach("the new place").await {
            tracing::error!(%image, error = %super::chain(&error), "the new place is not reached; the old one stands");
        }
        self.shared.board.changed.notify_one();
        if self.unregistered.contains(image) {
            self.unregistered.retain(|other| other != image);
            self.settle(image, Duration::ZERO);
        }
    }

    async fn unwanted(&mut self, unwanted: Unwanted) {
        let Unwanted {
            image,
            epoch,
            reason,
            drop_cache,
        } = unwanted;
        match heed::detach(&self.shared.journal().desired(), &image, epoch) {
            Ending::Ends => {}
            Ending::Outdated => return,
            Ending::InUse(vm) => {
                // Whoever removed the image by force learns it here.
                tracing::warn!(%image, %vm, reason, "the coordinator wants the image detached, but VMs use it: it stays");
                // Where only the place was lost, it gets another one.
                self.rejoin(&image).await;
                return;
            }
        }
        tracing::info!(%image, reason, "the coordinator wants the image detached");
        if let Err(error) = self.forget(&image, !drop_cache).await {
            tracing::warn!(%image, error = %super::chain(&error), "detached, but not all of it is gone");
        }
    }

    async fn reach(&mut self, what: &str) -> Result<(), HostError> {
        self.shared.reach(self.digest, what).await?;
        for (image, state) in &self.shared.journal().desired().images {
            if state.content.digest == self.digest {
                self.shared.board.acts_as_told(image);
            }
        }
        Ok(())
    }

    /// Begins an attempt to read the base and to register it, after a pause.
    fn settle(&mut self, image: &ImageId, pause: Duration) {
        let Some(epoch) = self.place_epoch(image) else {
            return;
        };
        if !self.shared.board.is_ready(image) && self.shared.board.problem(image).is_none() {
            self.shared.board.set(image, Readiness::Pending { problem: None });
        }
        let (shared, image, digest) = (Arc::clone(&self.shared), image.clone(), self.digest);
        self.settling.push(Box::pin(async move {
            if !pause.is_zero() {
                tokio::time::sleep(pause).await;
            }
            let readable: PlaneFuture<'_, ()> = shared.applier.plane.readable(digest);
            if let Err(error) = readable.await {
                return (image, epoch, Settled::Unreadable(super::chain(&error)));
            }
            let settled = match shared.link.register(&image, epoch).await {
                Ok(_) => Settled::Registered,
                Err(error) => Settled::Unregistered(error),
            };
            (image, epoch, settled)
        }));
    }

    async fn settled(&mut self, image: ImageId, epoch: Epoch, settled: Settled) {
        let Some(current) = self.place_epoch(&image) else {
            return;
        };
        let problem = match settled {
            Settled::Registered => {
                self.pauses.remove(&image);
                self.shared.board.set(&image, Readiness::Ready);
                for reply in self.waiting.remove(&image).unwrap_or_default() {
                    let _ = reply.send(Ok(()));
                }
                tracing::info!(%image, epoch = %current, "attached and registered");
                return;
            }
            Settled::Unreadable(why) => {
                let pause = self.next_pause(&image);
                tracing::debug!(%image, reason = %why, "the base cannot be read yet");
                // Nor may it be open: a plane whose base needs its parents cannot open it while they are away.
                if let Err(error) = self.reach("the attachment").await {
                    tracing::debug!(%image, error = %super::chain(&error), "nor can it be opened yet");
                }
                self.settle(&image, pause);
                why
            }
            Settled::Unregistered(error) if error.is_unavailable() => {
                let why = error.to_string();
                self.unregistered.push(image.clone());
                if self.shared.link.connected() {
                    // The stream came back before this was noted.
                    self.unregistered.retain(|other| *other != image);
                    let pause = self.next_pause(&image);
                    self.settle(&image, pause);
                }
                why
            }
            Settled::Unregistered(error) if current > epoch => {
                // A newer place came meanwhile; act on that one.
                self.settle(&image, Duration::ZERO);
                error.to_string()
            }
            Settled::Unregistered(error) => {
                let pause = self.next_pause(&image);
                if error.is_stale() {
                    self.rejoin(&image).await;
                }
                self.settle(&image, pause);
                error.to_string()
            }
        };
        let problem = Some(problem);
        self.shared.board.set(&image, Readiness::Pending { problem });
    }

    /// The coordinator does not know this attachment (any more): asks for a place anew.
    async fn rejoin(&mut self, image: &ImageId) {
        match self
            .shared
            .link
            .join(image, &endpoint(&self.shared.portal, image))
            .await
        {
            Ok(placement) => self.placed(&placement).await,
            Err(error) => {
                tracing::warn!(%image, error = %super::chain(&error), "no place in the tree; the old one stands")
            }
        }
    }

    fn next_pause(&mut self, image: &ImageId) -> Duration {
        let pause = self.pauses.entry(image.clone()).or_insert(RETRY.0);
        let this = *pause;
        *pause = (this * 2).min(RETRY.1);
        this
    }
}
