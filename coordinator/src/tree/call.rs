//! The calls that change something.

use std::collections::BTreeSet;
use std::sync::Arc;

use treeboot_types::{AttachState, Endpoint, Epoch, HostName, Image, ImageId, ImageRef, Iqn};

use crate::planted::{Bug, planted};

use super::enter::Entered;
use super::layer::Node;
use super::scope::Scope;
use super::{
    Answer, Call, Change, Effect, Forest, Grove, Key, MAX_ATTACHMENTS, MAX_IMAGES, Note, Place, Record,
    Refusal, Speaker, Stripe, Told, Unwanted, bar, place,
};

/// Bytes of consecutive addresses that one stripe holds before the next one's turn: so few that a guest's read-ahead keeps
/// several parents busy, and so many that a parent's own reads are not torn into single chunks.
const STRIPE_UNIT_BYTES: u64 = 256 << 10;

/// What a call came to, before its answer can be written.
pub(super) enum Outcome {
    Joined(ImageId, HostName),
    Registered(Epoch),
    Removed,
    Left,
    Image { image: Image, created: bool },
}

impl Forest {
    pub(super) fn call(&mut self, call: Call, out: &mut Vec<Effect>) -> Result<Outcome, Refusal> {
        match call {
            Call::Join {
                speaker,
                image,
                endpoint,
            } => self.join(&speaker, &image, endpoint, out),
            Call::Register {
                speaker,
                image,
                epoch,
            } => self.register(&speaker, &image, epoch),
            Call::Remove {
                speaker,
                image,
                epoch,
            } => self.remove(&speaker, &image, epoch, out),
            Call::Leave { speaker } => self.leave(&speaker, out),
            Call::AddImage { image } => self.add_image(image, out),
            Call::RemoveImage { image, force } => self.remove_image(&image, force, out),
        }
    }

    pub(super) fn answer(&self, outcome: Outcome) -> Answer {
        match outcome {
            // Published just now, so there is one; the alternative is no panic but the truth.
            Outcome::Joined(image, host) => self
                .placement(&image, &host)
                .map_or(Answer::Removed, Answer::Joined),
            Outcome::Registered(epoch) => Answer::Registered(epoch),
            Outcome::Removed => Answer::Removed,
            Outcome::Left => Answer::Left,
            Outcome::Image { image, created } => Answer::Image { image, created },
        }
    }

    /// The speaker is a known host, and its own instance.
    fn identify(&self, speaker: &Speaker) -> Result<(), Refusal> {
        let host = self
            .hosts
            .get(&speaker.host)
            .ok_or_else(|| Refusal::UnknownHost {
                host: speaker.host.clone(),
            })?;
        if host.info.instance != speaker.instance {
            return Err(self.other_instance(speaker));
        }
        Ok(())
    }

    pub(super) fn other_instance(&self, speaker: &Speaker) -> Refusal {
        let holder = self.hosts.get(&speaker.host);
        Refusal::OtherInstance {
            host: speaker.host.clone(),
            holder: holder.map(|h| h.info.instance.clone()).unwrap_or_default(),
            asker: speaker.instance.clone(),
            lease_left_ms: holder.map_or(0, |h| h.lease_until_ms.saturating_sub(self.clock.heard_ms)),
        }
    }

    fn join(
        &mut self,
        speaker: &Speaker,
        image: &ImageRef,
        endpoint: Endpoint,
        out: &mut Vec<Effect>,
    ) -> Result<Outcome, Refusal> {
        self.identify(speaker)?;
        let id = self.resolve(image)?;
        let host = &speaker.host;
        if self.images.get(&id).is_some_and(|grove| grove.is_origin(host)) {
            // Its own store is all of the image, so it needs no place; it is told who its children are.
            self.tell_origin(&id, host);
            return Ok(Outcome::Joined(id, host.clone()));
        }
        let attached = self
            .images
            .values()
            .filter(|g| g.places.contains_key(host))
            .count();
        if attached >= MAX_ATTACHMENTS {
            return Err(Refusal::TooMany {
                what: "attachments of one host",
                limit: MAX_ATTACHMENTS,
                way_out: "remove those that are no longer used",
            });
        }
        self.check_endpoint(&id, host, &endpoint)?;
        let lease_until_ms = self.clock.heard_ms.saturating_add(self.settings.pending_lease_ms);
        if let Some(place) = self.images.get_mut(&id).and_then(|g| g.places.get_mut(host)) {
            place.lease_until_ms = place.lease_until_ms.max(lease_until_ms);
            self.move_endpoint(&id, host, endpoint);
            return Ok(Outcome::Joined(id, host.clone()));
        }
        self.attach(&id, host, endpoint, AttachState::Pending, out)?;
        Ok(Outcome::Joined(id, host.clone()))
    }

    /// Puts a host into all stripes of an image, in the free slots nearest the roots.
    pub(super) fn attach(
        &mut self,
        id: &ImageId,
        host: &HostName,
        endpoint: Endpoint,
        state: AttachState,
        out: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        let joined = self.take_epoch().counter;
        let Some(grove) = self.images.get_mut(id) else {
            return Err(Refusal::UnknownImage {
                image: id.to_string(),
            });
        };
        let around = place::Around {
            hosts: &self.hosts,
            dying: &self.dying,
            settings: &self.settings,
        };
        let Some(entered) = around.enter(grove, host, joined) else {
            // A policy without room for everybody; what was given is given back.
            self.changed.insert(id.clone());
            return Err(Refusal::TooMany {
                what: "hosts in this image's trees",
                limit: grove.places.len(),
                way_out: "raise --fan-out or add an origin",
            });
        };
        self.note_place(id, host, endpoint, state, (joined, entered));
        out.push(Effect::Note(Note::Attached {
            host: host.clone(),
            image: id.clone(),
            adopted: false,
        }));
        Ok(())
    }

    /// Notes the place of a host that stands in the stripes already.
    pub(super) fn note_place(
        &mut self,
        id: &ImageId,
        host: &HostName,
        endpoint: Endpoint,
        state: AttachState,
        (joined, entered): (u64, Entered),
    ) {
        let lease_ms = match state {
            AttachState::Pending => self.settings.pending_lease_ms,
            AttachState::Ready => self.settings.lease_ms,
        };
        let known = self.hosts.get_mut(host);
        let had_another = known.as_ref().is_none_or(|host| host.may_act_in(id));
        let unsure = known.as_ref().is_none_or(|host| host.digest.is_none());
        let stale = known.and_then(|host| host.acts.remove(id)).unwrap_or_default();
        if let Some(grove) = self.images.get_mut(id) {
            let place = Place {
                endpoint: Arc::new(endpoint),
                state,
                position: Epoch::default(),
                joined,
                scope: entered.scope,
                home: entered.home,
                stripes: entered.stripes,
                lease_until_ms: self.clock.heard_ms.saturating_add(lease_ms),
                told: Told::default(),
                stale,
                unsure,
                barred: bar::Paths::new(),
                held_back: bar::Paths::new(),
                lets_in: bar::Paths::new(),
                lets_in_others: had_another,
                is_confirmed: false,
                mentioned_on: None,
            };
            grove.places.insert(host.clone(), place);
            self.changed.insert(id.clone());
        }
        if let Some(host) = self.hosts.get_mut(host) {
            host.ended.remove(id);
        }
    }

    /// An export belongs to whom it was given to, for as long as that host's lease lasts.
    pub(super) fn check_endpoint(
        &self,
        id: &ImageId,
        host: &HostName,
        endpoint: &Endpoint,
    ) -> Result<(), Refusal> {
        let Some(grove) = self.images.get(id) else {
            return Ok(());
        };
        let same = |other: &Endpoint| other.portal == endpoint.portal && other.target == endpoint.target;
        let by_host = grove
            .places
            .holder(endpoint)
            .filter(|name| *name != host)
            .map(|name| format!("host '{name}'"));
        let holder = by_host.or_else(|| {
            let mut origins = grove.image.origins.iter();
            let origin = origins.find(|o| o.host.as_ref() != Some(host) && same(&o.endpoint))?;
            Some(match &origin.host {
                Some(name) => format!("the store of host '{name}'"),
                None => "an origin that is no host of ours".into(),
            })
        });
        match holder {
            None => Ok(()),
            Some(holder) => Err(Refusal::EndpointTaken {
                portal: endpoint.portal.to_string(),
                image: id.clone(),
                holder,
            }),
        }
    }

    /// A host exports under another endpoint than before, for instance after its restart.
    pub(super) fn move_endpoint(&mut self, id: &ImageId, host: &HostName, endpoint: Endpoint) {
        if let Some(grove) = self.images.get_mut(id)
            && grove.places.set_endpoint(host, endpoint)
            && let Some(scope) = grove.scope_of(host).cloned()
        {
            grove.touch(&scope, &Node::Host(host.clone()));
            self.changed.insert(id.clone());
            self.unsaved.insert((id.clone(), host.clone()));
        }
    }

    /// Has an origin's agent told of its children.
    pub(super) fn tell_origin(&mut self, id: &ImageId, host: &HostName) {
        if let Some(grove) = self.images.get_mut(id)
            && let Some(index) = grove.origin_of(host)
        {
            grove.touch(&Scope::Fleet, &Node::Origin(index));
            self.changed.insert(id.clone());
        }
    }

    fn register(&mut self, speaker: &Speaker, image: &ImageRef, epoch: Epoch) -> Result<Outcome, Refusal> {
        self.identify(speaker)?;
        let id = self.resolve(image)?;
        let host = &speaker.host;
        let lease_until_ms = self.clock.heard_ms.saturating_add(self.settings.lease_ms);
        let in_force = self.epoch;
        let grove = self.images.get_mut(&id);
        let Some(place) = grove.and_then(|g| g.places.get_mut(host)) else {
            let told = self.images.get(&id).and_then(|g| g.origins_told.get(host));
            return told
                .map(|told| Outcome::Registered(told.epoch))
                .ok_or_else(|| Refusal::NotAttached {
                    host: host.clone(),
                    image: id,
                });
        };
        if !planted(Bug::RegisterNotFenced) {
            fence(host, &id, epoch, place.position, in_force)?;
        }
        let current = place.told.epoch;
        place.lease_until_ms = place.lease_until_ms.max(lease_until_ms);
        if place.state != AttachState::Ready {
            place.state = AttachState::Ready;
            self.unsaved.insert((id, host.clone()));
        }
        Ok(Outcome::Registered(current))
    }

    fn remove(
        &mut self,
        speaker: &Speaker,
        image: &ImageRef,
        epoch: Epoch,
        out: &mut Vec<Effect>,
    ) -> Result<Outcome, Refusal> {
        self.identify(speaker)?;
        // What is not there is removed.
        let Ok(id) = self.resolve(image) else {
            return Ok(Outcome::Removed);
        };
        let host = &speaker.host;
        if let Some(place) = self.images.get(&id).and_then(|g| g.places.get(host)) {
            // Whoever knows that it joined may go, wherever it was moved since: a host that missed its last placement
            // must be able to leave. What is fenced off is a late removal from before it joined again.
            let since_joined = Epoch {
                incarnation: epoch.incarnation,
                counter: place.joined,
            };
            if !planted(Bug::RemoveNotFenced) {
                fence(host, &id, epoch, since_joined, self.epoch)?;
            }
            self.drop_place(&id, host, out);
            // A removal that was under way while its host joined again takes the place that the host has by now; its states stay
            // equal, so that it would never be told.
            if let Some(host) = self.hosts.get_mut(host) {
                host.is_outdated |= host.listed.contains(&id);
            }
        } else if epoch > Epoch::default()
            && epoch <= self.epoch
            && let Some(host) = self.hosts.get_mut(host)
        {
            // Its lease ended before; what it said while it had the place may still be under way.
            let ended = host.ended.get(&id).copied().unwrap_or_default();
            host.end(id, ended.max(epoch));
        }
        Ok(Outcome::Removed)
    }

    fn leave(&mut self, speaker: &Speaker, out: &mut Vec<Effect>) -> Result<Outcome, Refusal> {
        match self.identify(speaker) {
            Err(Refusal::UnknownHost { .. }) => return Ok(Outcome::Left),
            other => other?,
        }
        self.drop_host(&speaker.host, out);
        out.push(Effect::Note(Note::HostLeft(speaker.host.clone())));
        Ok(Outcome::Left)
    }

    fn add_image(&mut self, image: Image, out: &mut Vec<Effect>) -> Result<Outcome, Refusal> {
        let versions = || self.images.iter().filter(|(id, _)| id.name == image.id.name);
        let newest = self.newest.get(&image.id.name).copied().unwrap_or(0);
        let twin = match image.id.version {
            0 => versions().find(|(_, grove)| grove.image.digest == image.digest),
            version => versions().find(|(id, _)| id.version == version),
        };
        if let Some((id, _)) = twin {
            let id = id.clone();
            let mut image = image;
            if image.id.version == 0 {
                name_exports(&id, &mut image);
            }
            return self.add_origins(&id, image, out);
        }
        if self.images.len() >= MAX_IMAGES {
            return Err(Refusal::TooMany {
                what: "versions of images",
                limit: MAX_IMAGES,
                way_out: "remove those that are no longer used",
            });
        }
        let mut image = image;
        if image.id.version == 0 {
            image.id.version = newest.saturating_add(1);
            name_exports(&image.id.clone(), &mut image);
        }
        // Hosts that read it already read it in as many stripes as they were told then.
        let stripes = self.claimed_stripes(&image.id);
        image.stripes = stripes.unwrap_or_else(|| self.settings.policy.stripes());
        if image.stripes > 1 {
            let chunk = u64::from(image.chunk_bytes.max(1));
            image.stripe_unit_bytes = STRIPE_UNIT_BYTES.next_multiple_of(chunk);
        }
        let id = image.id.clone();
        self.take_epoch();
        let grove = Grove::new(image.clone(), &self.settings);
        self.images.insert(id.clone(), grove);
        let newest = newest.max(id.version);
        self.newest.insert(id.name.clone(), newest);
        out.push(Effect::Save(Change::Put(
            Key::Newest(id.name.clone()),
            Record::Newest(newest),
        )));
        if self.window.is_none() {
            self.settle_claims(&id, out);
        }
        self.image_changed(&id, out);
        Ok(Outcome::Image { image, created: true })
    }

    /// The version exists: who has it is added to those who had it.
    fn add_origins(&mut self, id: &ImageId, given: Image, out: &mut Vec<Effect>) -> Result<Outcome, Refusal> {
        let Some(grove) = self.images.get(id) else {
            return Err(Refusal::UnknownImage {
                image: id.to_string(),
            });
        };
        let have = &grove.image;
        if have.digest != given.digest {
            return Err(Refusal::ImageExists {
                image: id.clone(),
                have: have.digest.short(),
                given: given.digest.short(),
            });
        }
        let differs = [
            (have.bytes != given.bytes, "size"),
            (have.chunk_bytes != given.chunk_bytes, "chunk size"),
        ];
        if let Some((_, what)) = differs.into_iter().find(|(differs, _)| *differs) {
            return Err(Refusal::ImageDiffers {
                image: id.clone(),
                what,
            });
        }
        let mut image = Image::clone(have);
        // An origin may share blocks with another version that a second one, or itself later, has of its own.
        image.allocated_bytes = image.allocated_bytes.max(given.allocated_bytes);
        for origin in given.origins {
            if let Some(host) = &origin.host {
                self.check_endpoint(id, host, &origin.endpoint)?;
            }
            let mine = image.origins.iter().position(|o| match &origin.host {
                Some(_) => o.host == origin.host,
                None => {
                    o.endpoint.portal == origin.endpoint.portal && o.endpoint.target == origin.endpoint.target
                }
            });
            match mine {
                // A foreign registration of an agent's export must not make it foreign.
                Some(mine) if image.origins[mine].host == origin.host => image.origins[mine] = origin,
                Some(_) => {}
                None if image.origins.len() >= treeboot_proto::MAX_PARENTS => {
                    return Err(Refusal::TooMany {
                        what: "origins of one image",
                        limit: treeboot_proto::MAX_PARENTS,
                        way_out: "more would not be asked",
                    });
                }
                None => image.origins.push(origin),
            }
        }
        if image != *grove.image {
            // A host whose own store has the image needs a place in its trees no longer.
            let holders: BTreeSet<HostName> = image.origins.iter().filter_map(|o| o.host.clone()).collect();
            for host in holders {
                self.drop_place(id, &host, out);
            }
            if let Some(grove) = self.images.get_mut(id) {
                grove.image = Arc::new(image.clone());
                grove.take_in_origins(&self.settings);
            }
            self.take_epoch();
            self.image_changed(id, out);
        }
        Ok(Outcome::Image {
            image,
            created: false,
        })
    }

    /// Everybody's last fallbacks are the origins, so a change of them concerns all.
    fn image_changed(&mut self, id: &ImageId, out: &mut Vec<Effect>) {
        if let Some(grove) = self.images.get_mut(id) {
            grove.stripes.iter_mut().for_each(Stripe::touch_all);
            self.changed.insert(id.clone());
            let record = Record::Image(Image::clone(&grove.image));
            out.push(Effect::Save(Change::Put(Key::Image(id.clone()), record)));
        }
    }

    fn remove_image(
        &mut self,
        image: &ImageRef,
        force: bool,
        out: &mut Vec<Effect>,
    ) -> Result<Outcome, Refusal> {
        // Never the newest by default: what a removal means must stand in the request.
        let id = self.resolve(image)?;
        let hosts: Vec<HostName> = self
            .images
            .get(&id)
            .map(|g| g.places.keys().cloned().collect())
            .unwrap_or_default();
        if !hosts.is_empty() && !force {
            let some: Vec<&str> = hosts.iter().take(3).map(HostName::as_str).collect();
            return Err(Refusal::ImageInUse {
                image: id,
                count: hosts.len(),
                some: format!("such as {}", some.join(", ")),
            });
        }
        let epoch = self.take_epoch();
        let Some(grove) = self.images.remove(&id) else {
            return Err(Refusal::UnknownImage {
                image: id.to_string(),
            });
        };
        for host in &hosts {
            self.tell_detached(&id, host, Unwanted::image_removed(), out);
            let key = Key::Attachment(id.clone(), host.clone());
            out.push(Effect::Save(Change::Delete(key)));
            if let Some(host) = self.hosts.get_mut(host) {
                host.end(id.clone(), epoch);
            }
        }
        out.push(Effect::Save(Change::Delete(Key::Image(id))));
        let image = Image::clone(&grove.image);
        Ok(Outcome::Image {
            image,
            created: false,
        })
    }
}

/// Refuses whoever acts on parents that it no longer has, or on a decision that was never made here.
fn fence(
    host: &HostName,
    image: &ImageId,
    given: Epoch,
    position: Epoch,
    current: Epoch,
) -> Result<(), Refusal> {
    if given < position || given > current {
        return Err(Refusal::OtherEpoch {
            host: host.clone(),
            image: image.clone(),
            given,
            current: if given < position { position } else { current },
        });
    }
    Ok(())
}

/// An agent names its export by the image's version, which it learns only here where it left the choice to us.
fn name_exports(id: &ImageId, image: &mut Image) {
    for origin in image.origins.iter_mut().filter(|origin| origin.host.is_some()) {
        let named = origin.endpoint.target.image();
        if named.is_some_and(|named| named.name == id.name) {
            origin.endpoint.target = Iqn::of_image(id);
        }
    }
}
