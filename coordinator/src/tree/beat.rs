//! What a sign of life brings: leases renewed, states compared, attachments taken over, complaints heard.

use std::collections::BTreeSet;

use treeboot_types::{
    AttachState, Attachment, BadParent, Endpoint, Epoch, Fault, HostInfo, HostName, ImageId,
};

use crate::planted::{Bug, planted};

use super::enter::Entered;
use super::layer::Node;
use super::place::At;
use super::scope::Scope;
use super::{
    Beat, Change, Effect, Forest, Grove, Host, HostRecord, HostState, Key, MAX_ATTACHMENTS, MAX_HOSTS, Note,
    Push, Record, Refusal, Speaker, StreamId, Unwanted, bar, place,
};

/// Complaints of one host that are kept for people to see; the oldest go.
const MAX_COMPLAINTS: usize = 16;
/// Parents that a host is not put under again; with more, the trouble is the host's own.
const MAX_AVOIDED: usize = 4;

impl Forest {
    /// Takes a beat in; false where it was refused or the host must first tell its state.
    pub(super) fn beat(&mut self, stream: StreamId, beat: Beat, out: &mut Vec<Effect>) -> bool {
        let speaker = &beat.speaker;
        let name = &speaker.host;
        if let Err(refusal) = self.admit_speaker(stream, speaker) {
            self.streams.remove(&stream);
            out.push(Effect::Note(Note::Refused {
                refusal: refusal.clone(),
            }));
            out.push(Effect::Push(stream, Push::Refused(refusal)));
            out.push(Effect::Close(stream));
            return false;
        }
        let is_new = !self.hosts.contains_key(name);
        match (&beat.state, is_new) {
            (None, true) => {
                out.push(Effect::Push(stream, Push::SendState));
                return false;
            }
            (Some(state), true) => {
                let mut host = Host::new(state);
                // A beat that was under way when it left is no later word on what it had given up before.
                host.ended = self.left.remove(name).map(|(_, ended)| ended).unwrap_or_default();
                self.hosts.insert(name.clone(), host);
                self.save_host(name, out);
                out.push(Effect::Note(Note::HostCame(name.clone())));
            }
            (_, false) => {}
        }
        self.bind(stream, name, out);
        if let Some(state) = beat.state {
            self.take_state(name, beat.digest, state, out);
        } else if self
            .hosts
            .get(name)
            .is_some_and(|h| h.is_outdated || h.digest.as_ref() != Some(&beat.digest))
        {
            out.push(Effect::Push(stream, Push::SendState));
        }
        self.renew(name);
        for complaint in beat.bad_parents.into_iter().take(MAX_COMPLAINTS) {
            self.complain(name, complaint, out);
        }
        true
    }

    fn admit_speaker(&self, stream: StreamId, speaker: &Speaker) -> Result<(), Refusal> {
        if let Some(bound) = self.streams.get(&stream)
            && *bound != speaker.host
        {
            return Err(Refusal::OtherHost {
                bound: bound.clone(),
                host: speaker.host.clone(),
            });
        }
        match self.hosts.get(&speaker.host) {
            Some(host) if host.info.instance != speaker.instance => Err(self.other_instance(speaker)),
            None if self.hosts.len() >= MAX_HOSTS => Err(Refusal::TooMany {
                what: "hosts",
                limit: MAX_HOSTS,
                way_out: "run a second coordinator for the rest of the fleet",
            }),
            _ => Ok(()),
        }
    }

    /// Ties a stream to its host and welcomes it.
    fn bind(&mut self, stream: StreamId, name: &HostName, out: &mut Vec<Effect>) {
        let Some(host) = self.hosts.get_mut(name) else {
            return;
        };
        if host.stream == Some(stream) {
            return;
        }
        // The agent came back before its old connection was known to be dead.
        if let Some(old) = host.stream.replace(stream) {
            self.streams.remove(&old);
            out.push(Effect::Close(old));
        }
        self.streams.insert(stream, name.clone());
        out.push(Effect::Push(stream, self.welcome()));
        let origins: Vec<ImageId> = self
            .images
            .iter()
            .filter(|(_, grove)| grove.is_origin(name))
            .map(|(id, _)| id.clone())
            .collect();
        for image in origins {
            // It may have missed something; if nothing changed since, this is what it knows.
            self.push_placement(&image, name, out);
            self.tell_origin(&image, name);
        }
    }

    fn welcome(&self) -> Push {
        Push::Welcome {
            epoch: self.epoch,
            beat_ms: self.settings.beat_ms,
            lease_ms: self.settings.lease_ms,
        }
    }

    fn save_host(&self, name: &HostName, out: &mut Vec<Effect>) {
        if let Some(host) = self.hosts.get(name) {
            let record = Record::Host(HostRecord {
                info: host.info.clone(),
            });
            out.push(Effect::Save(Change::Put(Key::Host(name.clone()), record)));
        }
    }

    /// Leases last from the newest beat: the host's own, and those of the places that its last state lists.
    fn renew(&mut self, name: &HostName) {
        let now = self.clock.heard_ms;
        let Some(host) = self.hosts.get_mut(name) else {
            return;
        };
        host.last_beat_ms = now;
        host.lease_until_ms = now.saturating_add(self.settings.lease_ms);
        for image in &host.listed {
            if let Some(place) = self.images.get_mut(image).and_then(|g| g.places.get_mut(name)) {
                let lease_ms = match place.state {
                    AttachState::Pending => self.settings.pending_lease_ms,
                    AttachState::Ready => self.settings.lease_ms,
                };
                place.lease_until_ms = place.lease_until_ms.max(now.saturating_add(lease_ms));
            }
        }
    }

    fn take_state(&mut self, name: &HostName, digest: Vec<u8>, state: HostState, out: &mut Vec<Effect>) {
        let Some(host) = self.hosts.get_mut(name) else {
            return;
        };
        host.digest = Some(digest);
        host.is_outdated = false;
        host.vms = state.vms;
        host.listed = state
            .attachments
            .iter()
            .take(MAX_ATTACHMENTS)
            .map(|a| a.image.clone())
            .collect();
        if host.info != state.info {
            let stands = |info: &HostInfo| (Scope::of(&info.labels), info.weight, info.max_stripes);
            let stands_otherwise = stands(&host.info) != stands(&state.info);
            host.info = state.info;
            self.save_host(name, out);
            if stands_otherwise {
                self.place_again(name);
            }
        }
        let newest = state
            .attachments
            .iter()
            .map(|a| a.epoch)
            .max()
            .unwrap_or_default();
        if newest > self.epoch {
            self.begin_incarnation(name, newest, out);
        }
        self.forget_claims(name);
        if let Some(host) = self.hosts.get_mut(name) {
            host.acts.retain(|image, _| host.listed.contains(image));
        }
        for attachment in state.attachments.into_iter().take(MAX_ATTACHMENTS) {
            self.compare(name, attachment, out);
        }
    }

    /// A host stands in another rack than before, or offers more or less: its places no longer suit it.
    fn place_again(&mut self, name: &HostName) {
        let around = place::Around {
            hosts: &self.hosts,
            dying: &self.dying,
            settings: &self.settings,
        };
        for (id, grove) in &mut self.images {
            let Some(place) = grove.places.get(name) else {
                continue;
            };
            let (old, joined) = (place.scope.clone(), place.joined);
            around.go(grove, name, &old);
            // There was room for it a moment ago, in as many stripes or fewer.
            let entered = around.enter(grove, name, joined);
            match (grove.places.get_mut(name), entered) {
                (Some(place), Some(entered)) => {
                    place.scope = entered.scope;
                    place.home = entered.home;
                    place.stripes = entered.stripes;
                    self.unsaved.insert((id.clone(), name.clone()));
                }
                // Its next state brings it back as one that the record lacks.
                _ => drop(grove.places.remove(name)),
            }
            self.changed.insert(id.clone());
        }
    }

    /// A host was told more than the record has: part of it was lost, and a new incarnation outranks what was.
    fn begin_incarnation(&mut self, host: &HostName, seen: Epoch, out: &mut Vec<Effect>) {
        self.epoch = Epoch {
            incarnation: seen.incarnation.saturating_add(1),
            // Goes on growing, so that what is ordered by it stays in order.
            counter: self.epoch.counter.max(seen.counter),
        };
        self.epoch_taken = false;
        self.take_epoch();
        out.push(Effect::Note(Note::StateLost {
            host: host.clone(),
            seen,
            now: self.epoch,
        }));
        self.open_window();
        // Agents with stores tell a new incarnation of their images.
        for stream in self.streams.keys() {
            out.push(Effect::Push(*stream, self.welcome()));
        }
    }

    /// Compares what a host says of one attachment with the record. What is equal changes nothing.
    fn compare(&mut self, name: &HostName, theirs: Attachment, out: &mut Vec<Effect>) {
        let id = theirs.image.clone();
        let Some(grove) = self.images.get(&id) else {
            // One that was removed here is to go; one that the coordinator never had must go on being served.
            if self.hosts.get(name).is_some_and(|h| h.ended.contains_key(&id)) {
                self.tell_detached(&id, name, Unwanted::image_removed(), out);
            } else {
                out.push(Effect::Note(Note::UnknownAttachment {
                    host: name.clone(),
                    image: id,
                }));
                // An origin may bring the image's record back.
                self.claim(name, theirs);
            }
            return;
        };
        if grove.is_origin(name) {
            return;
        }
        if self.window.is_some() {
            self.claim(name, theirs);
            return;
        }
        if grove.image.digest != theirs.digest {
            self.tell_detached(&id, name, Unwanted::other_content(), out);
            return;
        }
        let is_striped = grove.image.stripes > 1;
        let Some(place) = grove.places.get(name) else {
            let paths = bar::paths_of(&theirs.stripes);
            self.acts_without(&id, name, if is_striped { paths } else { bar::Paths::new() });
            let ended = self.hosts.get(name).and_then(|h| h.ended.get(&id)).copied();
            match ended {
                Some(ended) if theirs.epoch <= ended && !planted(Bug::RemovedComesBack) => {
                    self.tell_detached(&id, name, Unwanted::place_removed(), out);
                }
                _ => self.take_over(name, theirs, out),
            }
            return;
        };
        let (told, state) = (place.told.epoch, place.state);
        if is_striped {
            self.acts_on(&id, name, theirs.epoch == told, &theirs.stripes);
        }
        if let Some(endpoint) = theirs.endpoint
            && self.check_endpoint(&id, name, &endpoint).is_ok()
        {
            self.move_endpoint(&id, name, endpoint);
        }
        if theirs.state == AttachState::Ready && state == AttachState::Pending && theirs.epoch <= self.epoch {
            if let Some(place) = self.images.get_mut(&id).and_then(|g| g.places.get_mut(name)) {
                place.state = AttachState::Ready;
            }
            self.unsaved.insert((id.clone(), name.clone()));
        }
        // Placements are pushed when they change; those from before this stream may have been missed, and so may those that overtook
        // the answer by which the host learned that it is attached.
        let stream = self.hosts.get(name).and_then(|host| host.stream);
        let place = self.images.get_mut(&id).and_then(|g| g.places.get_mut(name));
        let is_first =
            place.is_some_and(|place| std::mem::replace(&mut place.mentioned_on, stream) != stream);
        if is_first && theirs.epoch != told {
            self.push_placement(&id, name, out);
        }
    }

    /// A host has an attachment that the record lacks: it keeps its place if that fits, or gets one.
    fn take_over(&mut self, name: &HostName, theirs: Attachment, out: &mut Vec<Effect>) {
        let id = theirs.image.clone();
        let Some(endpoint) = theirs.endpoint.clone() else {
            return;
        };
        if let Err(refusal) = self.check_endpoint(&id, name, &endpoint) {
            out.push(Effect::Note(Note::Refused {
                refusal: refusal.clone(),
            }));
            self.tell_detached(&id, name, Unwanted::place(refusal.to_string()), out);
            return;
        }
        let adopted = self.adopt(name, &theirs, endpoint.clone());
        if adopted {
            out.push(Effect::Note(Note::Attached {
                host: name.clone(),
                image: id,
                adopted: true,
            }));
        } else if let Err(refusal) = self.attach(&id, name, endpoint, theirs.state, out) {
            out.push(Effect::Note(Note::Refused { refusal }));
        }
    }

    /// Enters a place as its host has it; false if its parents are not there or have no room.
    fn adopt(&mut self, name: &HostName, theirs: &Attachment, endpoint: Endpoint) -> bool {
        let around = place::Around {
            hosts: &self.hosts,
            dying: &self.dying,
            settings: &self.settings,
        };
        let Some(grove) = self.images.get(&theirs.image) else {
            return false;
        };
        let (scope, stripes) = (around.scope_for(name), around.stands_in(grove, name));
        let Some(parents) = self.parents_as_told(grove, stripes, theirs) else {
            return false;
        };
        let mut ways = Vec::new();
        for (stripe, parents) in parents.iter().enumerate() {
            let at = At {
                stripe,
                scope: &scope,
            };
            let Some(way) = around.way_in(grove, at, name, parents, !planted(Bug::AdoptionWithoutRoom))
            else {
                return false;
            };
            ways.push(way);
        }
        let joined = self.take_epoch().counter;
        let around = place::Around {
            hosts: &self.hosts,
            dying: &self.dying,
            settings: &self.settings,
        };
        let Some(grove) = self.images.get_mut(&theirs.image) else {
            return false;
        };
        let home = around.home_for(grove, &scope, stripes);
        for (stripe, way) in ways.into_iter().enumerate() {
            around.link_in(grove, stripe, home, joined, way);
        }
        let entered = Entered { scope, home, stripes };
        self.note_place(&theirs.image, name, endpoint, theirs.state, (joined, entered));
        true
    }

    /// The parents that a host acts on, stripe by stripe, with the shares that they would give it.
    pub(super) fn parents_as_told(
        &self,
        grove: &Grove,
        stripes: usize,
        theirs: &Attachment,
    ) -> Option<Vec<Vec<(Node, u32)>>> {
        let wanted = self.settings.active_parents;
        let mut all = Vec::new();
        for index in grove.indices().take(stripes) {
            let told = theirs.stripes.iter().find(|s| s.stripe == index)?;
            let mut parents: Vec<(Node, u32)> = Vec::new();
            let count = u32::try_from(told.active.len()).ok()?;
            if count == 0 || count > wanted {
                return None;
            }
            for (turn, parent) in (0..count).zip(&told.active) {
                let node = grove.node_at(parent.host.as_ref(), &parent.endpoint)?;
                let shares = wanted / count + u32::from(turn < wanted % count);
                if parents.iter().any(|(known, _)| *known == node) {
                    return None;
                }
                parents.push((node, shares));
            }
            all.push(parents);
        }
        Some(all)
    }

    /// Counts a complaint, and moves somebody where that helps: not more often than once a lease.
    fn complain(&mut self, by: &HostName, of: BadParent, out: &mut Vec<Effect>) {
        let now = self.clock.heard_ms;
        let lease_ms = self.settings.lease_ms;
        let Some(parent) = self.parent_of(by, &of) else {
            // Not its parent: an ended edge, or a host that speaks ill of others.
            return;
        };
        if of.fault == Fault::WrongBytes
            && let Some(host) = of.host.as_ref().and_then(|h| self.hosts.get_mut(h))
        {
            host.wrong_bytes_reports = host.wrong_bytes_reports.saturating_add(of.count);
        }
        out.push(Effect::Note(Note::Complaint {
            by: by.clone(),
            of: of.clone(),
        }));
        let Some(host) = self.hosts.get_mut(by) else {
            return;
        };
        let same = |b: &BadParent| (&b.image, &b.host, b.fault) == (&of.image, &of.host, of.fault);
        match host.reported_by_it.iter_mut().find(|b| same(b)) {
            Some(known) => known.count = known.count.saturating_add(of.count),
            None => host.reported_by_it.push(of.clone()),
        }
        if host.reported_by_it.len() > MAX_COMPLAINTS {
            host.reported_by_it.remove(0);
        }
        // A parent that is slow or gone is its lease's business; one that ships wrong bytes is not to be waited for.
        if of.fault != Fault::WrongBytes || host.avoids.len() >= MAX_AVOIDED {
            return;
        }
        let recently = |host: &Host| {
            host.moved_at_ms
                .is_some_and(|at| now < at.saturating_add(lease_ms))
        };
        if recently(host) {
            return;
        }
        host.avoids.insert(of.host.clone());
        let accused_recently = of
            .host
            .as_ref()
            .and_then(|h| self.hosts.get(h))
            .is_some_and(recently);
        let around = place::Around {
            hosts: &self.hosts,
            dying: &self.dying,
            settings: &self.settings,
        };
        let Some(grove) = self.images.get_mut(&of.image) else {
            return;
        };
        let stripe = usize::from(of.stripe.0);
        let edge = grove.edge(stripe, by, &parent);
        let moved = edge.is_some_and(|(scope, member, node)| {
            let at = At {
                stripe,
                scope: &scope,
            };
            around.move_away(grove, at, &member, &node)
        });
        let scope = of
            .host
            .as_ref()
            .and_then(|accused| grove.scope_of(accused))
            .cloned();
        let demoted = match (&parent, &scope) {
            (Node::Host(_), Some(scope)) if !moved && !accused_recently => {
                around.demote(grove, At { stripe, scope }, &parent)
            }
            _ => false,
        };
        self.changed.insert(of.image);
        for (whom, did_move) in [(Some(by), moved || demoted), (of.host.as_ref(), demoted)] {
            if did_move && let Some(host) = whom.and_then(|h| self.hosts.get_mut(h)) {
                host.moved_at_ms = Some(now);
            }
        }
    }

    fn parent_of(&self, child: &HostName, complaint: &BadParent) -> Option<Node> {
        let grove = self.images.get(&complaint.image)?;
        let parents = grove.parents(complaint.stripe.0.into(), &Node::Host(child.clone()));
        let matches = |node: &Node| match (node, &complaint.host) {
            (Node::Host(host), Some(name)) => host == name,
            (Node::Origin(index), name) => {
                let origin = grove.image.origins.get(usize::from(*index));
                origin.is_some_and(|o| {
                    o.host == *name && (name.is_some() || o.endpoint.portal.as_str() == complaint.portal)
                })
            }
            (_, None) | (Node::Entrance | Node::Group(_), _) => false,
        };
        parents.into_keys().find(|node| matches(node))
    }
}

impl Host {
    fn new(state: &HostState) -> Self {
        Self::unheard(state.info.clone())
    }

    /// A host of which only the record speaks.
    pub(super) fn unheard(info: treeboot_types::HostInfo) -> Self {
        Self {
            info,
            stream: None,
            digest: None,
            listed: BTreeSet::new(),
            is_outdated: false,
            vms: 0,
            last_beat_ms: 0,
            lease_until_ms: 0,
            ended: std::collections::BTreeMap::new(),
            acts: std::collections::BTreeMap::new(),
            avoids: BTreeSet::new(),
            moved_at_ms: None,
            reported_by_it: Vec::new(),
            wrong_bytes_reports: 0,
        }
    }
}

impl Grove {
    /// The vertex that a host means by a parent: its name, or for an origin where it is served.
    fn node_at(&self, host: Option<&HostName>, endpoint: &Endpoint) -> Option<Node> {
        let mut origins = (0..).zip(&self.image.origins);
        let same = |o: &Endpoint| o.portal == endpoint.portal && o.target == endpoint.target;
        let origin = origins.find(|(_, o)| o.host.as_ref() == host && (host.is_some() || same(&o.endpoint)));
        match (origin, host) {
            (Some((index, _)), _) => Some(Node::Origin(index)),
            (None, Some(host)) => Some(Node::Host(host.clone())),
            (None, None) => None,
        }
    }
}
