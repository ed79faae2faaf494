//! When the record is lost, or a part of it: for a window of time nobody is given a place; the hosts tell where they stand, in any
//! order; then the trees are made from that, and only who fits nowhere is placed anew.

use std::collections::BTreeSet;
use std::sync::Arc;

use treeboot_types::{Attachment, Endpoint, Epoch, HostName, ImageId, StripeIndex};

use super::graft::{Claim, Claims};
use super::place::{Around, Parents};
use super::{
    AttachState, Call, CallId, Effect, Forest, Grove, MAX_HOSTS, Note, Place, Refusal, Settings, Stripe,
    Told, Unwanted, bar,
};

/// A window without placements.
#[derive(Debug)]
pub(super) struct Window {
    until_ms: u64,
    /// Calls that must not be decided before it closes.
    waiting: Vec<(CallId, Call)>,
}

impl Forest {
    /// Trees of which nothing is known: they are rebuilt from what hosts say within so many milliseconds of listening.
    pub fn rebuild(settings: Settings, window_ms: u64) -> Self {
        let mut forest = Self::new(settings);
        forest.window_ms = window_ms;
        forest.open_window();
        forest
    }

    /// How long hosts have to say where they stand, where the record turns out to be lost; a lease unless told otherwise.
    pub fn set_rebuild_window(&mut self, window_ms: u64) {
        self.window_ms = window_ms;
    }

    /// Whether places are being learned from the hosts and not given out.
    pub fn is_rebuilding(&self) -> bool {
        self.window.is_some()
    }

    pub(super) fn open_window(&mut self) {
        let until_ms = self.clock.heard_ms.saturating_add(self.window_ms);
        self.window.get_or_insert_with(|| Window {
            until_ms,
            waiting: Vec::new(),
        });
    }

    /// Keeps a call that would give somebody a place, or that speaks of one, until the window closes; gives back any other.
    pub(super) fn hold(&mut self, id: CallId, call: Call) -> Option<Call> {
        match (&mut self.window, call) {
            (Some(window), call @ (Call::Join { .. } | Call::Register { .. }))
                if window.waiting.len() < MAX_HOSTS =>
            {
                window.waiting.push((id, call));
                None
            }
            (_, call) => Some(call),
        }
    }

    /// Where the window is over: makes the trees, and decides what waited.
    pub(super) fn close_window(&mut self, out: &mut Vec<Effect>) {
        let is_over = |window: &mut Window| window.until_ms <= self.clock.heard_ms;
        let Some(window) = self.window.take_if(is_over) else {
            return;
        };
        let known: Vec<ImageId> = self.claimed.keys().cloned().collect();
        for image in known {
            self.settle_claims(&image, out);
        }
        self.publish(None, out);
        for (id, call) in window.waiting {
            self.decide(id, call, out);
        }
    }

    /// A host says where it stands; what it said before no longer counts.
    pub(super) fn forget_claims(&mut self, host: &HostName) {
        self.claimed.retain(|_, claims| {
            claims.remove(host);
            !claims.is_empty()
        });
    }

    pub(super) fn claim(&mut self, host: &HostName, theirs: Attachment) {
        let claims = self.claimed.entry(theirs.image.clone()).or_default();
        claims.insert(host.clone(), theirs);
    }

    /// In how many stripes hosts read an image already.
    pub(super) fn claimed_stripes(&self, image: &ImageId) -> Option<u16> {
        let claims = self.claimed.get(image)?.values();
        let most = claims.map(|theirs| theirs.stripes.len()).max()?;
        u16::try_from(most).ok().filter(|stripes| *stripes > 0)
    }

    /// Makes an image's trees anew from what its hosts said, and from the record for those who said nothing.
    pub(super) fn settle_claims(&mut self, image: &ImageId, out: &mut Vec<Effect>) {
        if !self.images.contains_key(image) {
            return;
        }
        let mut entitled = Vec::new();
        for (host, theirs) in self.claimed.remove(image).unwrap_or_default() {
            match self.check_claim(image, &host, &theirs, &entitled) {
                Ok(Some(endpoint)) => entitled.push((host, theirs, endpoint)),
                Ok(None) => {}
                Err(why) => self.tell_detached(image, &host, why, out),
            }
        }
        if entitled.is_empty() {
            return;
        }
        self.take_epoch();
        let mut claims = self.claims_of_record(image);
        for (host, theirs, endpoint) in &entitled {
            if let Some(claim) = self.enter_claim(image, host, theirs, endpoint) {
                claims.insert(host.clone(), claim);
            }
        }
        let around = Around {
            hosts: &self.hosts,
            dying: &BTreeSet::new(),
            settings: &self.settings,
        };
        let Some(grove) = self.images.get_mut(image) else {
            return;
        };
        grove.stripes = (0..grove.image.stripes).map(|_| Stripe::default()).collect();
        grove.groups.clear();
        grove.take_in_origins(&self.settings);
        let moved = around.graft(grove, &mut claims, true);
        grove.stripes.iter_mut().for_each(Stripe::touch_all);
        self.changed.insert(image.clone());
        for (host, ..) in entitled {
            self.unsaved.insert((image.clone(), host.clone()));
            if let Some(host) = self.hosts.get_mut(&host) {
                host.ended.remove(image);
            }
            out.push(Effect::Note(Note::Attached {
                adopted: !moved.contains(&host),
                host,
                image: image.clone(),
            }));
        }
    }

    /// The endpoint of a host that may keep what it says it has; none where it has no place to keep.
    fn check_claim(
        &self,
        image: &ImageId,
        host: &HostName,
        theirs: &Attachment,
        others: &[(HostName, Attachment, Endpoint)],
    ) -> Result<Option<Endpoint>, Unwanted> {
        let (Some(grove), Some(known)) = (self.images.get(image), self.hosts.get(host)) else {
            return Ok(None);
        };
        if grove.image.digest != theirs.digest {
            return Err(Unwanted::other_content());
        }
        if known.ended.get(image).is_some_and(|ended| theirs.epoch <= *ended) {
            return Err(Unwanted::place_removed());
        }
        let Some(endpoint) = theirs.endpoint.clone().filter(|_| !grove.is_origin(host)) else {
            return Ok(None);
        };
        let same = |other: &Endpoint| other.portal == endpoint.portal && other.target == endpoint.target;
        if let Some((holder, ..)) = others.iter().find(|(_, _, other)| same(other)) {
            let refusal = Refusal::EndpointTaken {
                portal: endpoint.portal.to_string(),
                image: image.clone(),
                holder: format!("host '{holder}'"),
            };
            return Err(Unwanted::place(refusal.to_string()));
        }
        Ok(Some(endpoint))
    }

    /// The places that are known already, as they stand.
    fn claims_of_record(&self, image: &ImageId) -> Claims {
        let Some(grove) = self.images.get(image) else {
            return Claims::new();
        };
        let claim = |(host, place): (&HostName, &Place)| {
            let node = super::Node::Host(host.clone());
            let parents = |stripe| grove.parents(stripe, &node).into_iter().collect();
            let claim = Claim {
                scope: place.scope.clone(),
                home: Some(place.home),
                joined: place.joined,
                parents: (0..place.stripes).map(parents).collect(),
            };
            (host.clone(), claim)
        };
        grove.places.iter().map(claim).collect()
    }

    fn enter_claim(
        &mut self,
        image: &ImageId,
        host: &HostName,
        theirs: &Attachment,
        endpoint: &Endpoint,
    ) -> Option<Claim> {
        let around = Around {
            hosts: &self.hosts,
            dying: &self.dying,
            settings: &self.settings,
        };
        let grove: &Grove = self.images.get(image)?;
        let (scope, stripes) = (around.scope_for(host), around.stands_in(grove, host));
        let parents = self.parents_as_told(grove, stripes, theirs);
        let lease_ms = match theirs.state {
            AttachState::Pending => self.settings.pending_lease_ms,
            AttachState::Ready => self.settings.lease_ms,
        };
        let place = Place {
            endpoint: Arc::new(endpoint.clone()),
            state: theirs.state,
            position: Epoch::default(),
            joined: theirs.epoch.counter,
            scope: scope.clone(),
            home: StripeIndex::default(),
            stripes,
            lease_until_ms: self.clock.heard_ms.saturating_add(lease_ms),
            told: Told::default(),
            stale: if stripes > 1 {
                bar::paths_of(&theirs.stripes)
            } else {
                bar::Paths::new()
            },
            unsure: false,
            barred: bar::Paths::new(),
            held_back: bar::Paths::new(),
            lets_in: bar::Paths::new(),
            lets_in_others: true,
            is_confirmed: false,
            mentioned_on: None,
        };
        self.images.get_mut(image)?.places.insert(host.clone(), place);
        Some(Claim {
            scope,
            home: None,
            joined: theirs.epoch.counter,
            parents: parents.unwrap_or_else(|| vec![Parents::new(); stripes]),
        })
    }
}
