//! What can be asked without changing anything.

use std::collections::BTreeSet;
use std::sync::Arc;

use treeboot_types::{
    AttachState, BadParent, Epoch, HostInfo, HostName, Image, ImageId, ImageRef, Parent, StripeIndex,
};

use super::layer::Node;
use super::scope::{RACK_LABEL, Scope, ZONE_LABEL};
use super::{Forest, Grove, Refusal, place};

/// A host as people see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostView {
    /// What it says of itself.
    pub info: HostInfo,
    /// Whether a stream is open.
    pub connected: bool,
    /// Since its last beat, in milliseconds.
    pub silent_ms: u64,
    /// How many images it is attached to.
    pub attachments: u32,
    /// How many VMs it runs.
    pub vms: u32,
    /// Its complaints.
    pub reported_by_it: Vec<BadParent>,
    /// How often its children complained of wrong bytes.
    pub wrong_bytes_reports: u64,
}

/// The trees of an image as people see them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TreeView {
    /// The record.
    pub image: Arc<Image>,
    /// The last decision.
    pub epoch: Epoch,
    /// Slots of a host.
    pub fan_out: u32,
    /// By stripe, then depth, then name.
    pub vertices: Vec<VertexView>,
}

/// One vertex of a tree as people see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VertexView {
    /// In which stripe.
    pub stripe: StripeIndex,
    /// Its name; none for a foreign origin.
    pub host: Option<HostName>,
    /// Where it exports.
    pub portal: String,
    /// Whether it is an origin.
    pub origin: bool,
    /// 0 for an origin.
    pub depth: u32,
    /// How far it has come.
    pub state: AttachState,
    /// Whether its agent's stream is open; a foreign origin has none and counts as connected.
    pub connected: bool,
    /// Names of hosts, or portals of foreign origins.
    pub parents: Vec<String>,
    /// How many hosts read from it.
    pub children: u32,
    /// What is left of its lease, in milliseconds; 0 for an origin, which holds no slot.
    pub lease_left_ms: u64,
    /// The zone that its host names, or nothing.
    pub zone: String,
    /// The rack that its host names, or nothing.
    pub rack: String,
    /// Its host's share of slots; 0 for a foreign origin.
    pub weight: u32,
}

/// An export that a host could read from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Of which stripe it could be read.
    pub stripe: StripeIndex,
    /// Who and where.
    pub parent: Parent,
    /// How far it has come.
    pub state: AttachState,
    /// Slots that nobody holds; a part of one counts as none.
    pub free_slots: u32,
    /// Why it stands at this place.
    pub reason: String,
}

impl Forest {
    /// An image's record.
    ///
    /// # Errors
    /// [`Refusal::UnknownImage`].
    pub fn image(&self, image: &ImageRef) -> Result<Arc<Image>, Refusal> {
        let id = self.resolve(image)?;
        let grove = self.images.get(&id);
        grove.map(|g| g.image.clone()).ok_or_else(|| unknown(&id))
    }

    /// All images, by name and version.
    pub fn list_images(&self) -> Vec<Arc<Image>> {
        self.images.values().map(|grove| grove.image.clone()).collect()
    }

    /// What describes a host that beats.
    pub fn host_labels(&self, host: &HostName) -> Option<treeboot_types::Labels> {
        Some(self.hosts.get(host)?.info.labels.clone())
    }

    /// All hosts, by name.
    pub fn list_hosts(&self) -> Vec<HostView> {
        let attachments = |name: &HostName| {
            let groves = self.images.values();
            groves.filter(|g| g.places.contains_key(name)).count()
        };
        let view = |(name, host): (&HostName, &super::Host)| HostView {
            info: host.info.clone(),
            connected: host.stream.is_some(),
            silent_ms: self.clock.heard_ms.saturating_sub(host.last_beat_ms),
            attachments: u32::try_from(attachments(name)).unwrap_or(u32::MAX),
            vms: host.vms,
            reported_by_it: host.reported_by_it.clone(),
            wrong_bytes_reports: host.wrong_bytes_reports,
        };
        self.hosts.iter().map(view).collect()
    }

    /// An image's trees.
    ///
    /// # Errors
    /// [`Refusal::UnknownImage`].
    pub fn tree(&self, image: &ImageRef) -> Result<TreeView, Refusal> {
        let id = self.resolve(image)?;
        let grove = self.images.get(&id).ok_or_else(|| unknown(&id))?;
        let mut vertices = Vec::new();
        for stripe in grove.indices() {
            let nodes = grove.nodes();
            vertices.extend(nodes.filter_map(|node| self.vertex(grove, stripe, &node)));
        }
        vertices.sort_by(|a, b| {
            (a.stripe, a.depth, &a.host, &a.portal).cmp(&(b.stripe, b.depth, &b.host, &b.portal))
        });
        Ok(TreeView {
            image: grove.image.clone(),
            epoch: self.epoch,
            fan_out: self.settings.policy.fan_out(),
            vertices,
        })
    }

    fn vertex(&self, grove: &Grove, stripe: StripeIndex, node: &Node) -> Option<VertexView> {
        let index = usize::from(stripe.0);
        let depth = grove.depth(index, node)?;
        let parent = grove.parent(stripe, node)?;
        let place = parent.host.as_ref().and_then(|h| grove.places.get(h));
        let name = |node: &Node| {
            let parent = grove.parent(stripe, node)?;
            Some(
                parent
                    .host
                    .map_or_else(|| parent.endpoint.portal.to_string(), Into::into),
            )
        };
        let info = parent.host.as_ref().and_then(|host| self.hosts.get(host));
        let info = info.map(|host| &host.info);
        let label = |key| {
            info.and_then(|info| info.labels.get(key))
                .cloned()
                .unwrap_or_default()
        };
        Some(VertexView {
            stripe,
            zone: label(ZONE_LABEL),
            rack: label(RACK_LABEL),
            weight: info.map_or(0, |info| info.weight),
            portal: parent.endpoint.portal.to_string(),
            origin: parent.origin,
            depth,
            state: place.map_or(AttachState::Ready, |p| p.state),
            connected: self.is_connected(parent.host.as_ref()),
            parents: grove.parents(index, node).keys().filter_map(name).collect(),
            children: u32::try_from(grove.children(index, node).len()).unwrap_or(u32::MAX),
            lease_left_ms: place.map_or(0, |p| p.lease_until_ms.saturating_sub(self.clock.heard_ms)),
            host: parent.host,
        })
    }

    fn is_connected(&self, host: Option<&HostName>) -> bool {
        host.is_none_or(|h| self.hosts.get(h).is_some_and(|h| h.stream.is_some()))
    }

    /// Exports of an image for a host, best first, at most `limit`.
    ///
    /// # Errors
    /// [`Refusal::UnknownImage`].
    pub fn search(
        &self,
        image: &ImageRef,
        seeker: Option<&HostName>,
        limit: usize,
    ) -> Result<Vec<Candidate>, Refusal> {
        let id = self.resolve(image)?;
        let grove = self.images.get(&id).ok_or_else(|| unknown(&id))?;
        let mut found = Vec::new();
        for stripe in grove.indices() {
            let index = usize::from(stripe.0);
            let below = below(grove, index, seeker);
            let rack = seeker.and_then(|seeker| self.rack_with_a_link(grove, index, seeker));
            for node in grove.nodes().filter(|node| !below.contains(node)) {
                let (Some(depth), Some(parent)) = (grove.depth(index, &node), grove.parent(stripe, &node))
                else {
                    continue;
                };
                let place = parent.host.as_ref().and_then(|h| grove.places.get(h));
                let state = place.map_or(AttachState::Ready, |p| p.state);
                let stands = grove.stands(index, &node);
                let vertices = stands
                    .iter()
                    .filter_map(|(scope, member)| grove.layer(index, scope)?.get(member));
                let (free, used) = vertices.fold((0u32, 0u32), |(free, used), v| {
                    (free.saturating_add(v.free()), used.saturating_add(v.used))
                });
                let free_slots = free / self.settings.active_parents.max(1);
                let why = Why {
                    lost: !self.is_connected(parent.host.as_ref()),
                    full: free_slots == 0,
                    crosses: rack
                        .as_ref()
                        .is_some_and(|rack| stands.iter().all(|(s, _)| s != rack)),
                    depth,
                    near: seeker.map_or(2, |seeker| self.nearness(grove, &node, seeker)),
                    pending: state == AttachState::Pending,
                };
                let joined = place.map_or(0, |p| p.joined);
                let candidate = Candidate {
                    stripe,
                    reason: String::new(),
                    parent,
                    state,
                    free_slots,
                };
                found.push((why, used, joined, candidate));
            }
        }
        found.sort_by(|a, b| {
            let (one, other) = (&a.3.parent.host, &b.3.parent.host);
            (a.0, a.1, a.2, one, a.3.stripe).cmp(&(b.0, b.1, b.2, other, b.3.stripe))
        });
        let best = found.into_iter().take(limit);
        let best = best.map(|(why, _, _, candidate)| Candidate {
            reason: why.text(candidate.free_slots),
            ..candidate
        });
        Ok(best.collect())
    }

    /// The seeker's rack or zone, if others of it read the image already.
    fn rack_with_a_link(&self, grove: &Grove, stripe: usize, seeker: &HostName) -> Option<Scope> {
        let scope = self.around().scope_for(seeker);
        let layer = grove.layer(stripe, &scope)?;
        let own = Node::Host(seeker.clone());
        let has_others = layer.members().any(|member| *member != own);
        (has_others && scope != Scope::Fleet).then_some(scope)
    }

    fn nearness(&self, grove: &Grove, node: &Node, seeker: &HostName) -> u8 {
        let around = self.around();
        match node {
            Node::Origin(index) => around.distance(&grove.image, *index, &Node::Host(seeker.clone())),
            Node::Host(host) => {
                let (theirs, own) = (around.scope_for(host), around.scope_for(seeker));
                match (&theirs, &own) {
                    (Scope::Rack(..), _) if theirs == own => 0,
                    _ => {
                        let zones = |scope: &Scope| scope.outward().into_iter().rev().nth(1);
                        let is_zone = |scope: &Scope| matches!(scope, Scope::Zone(_));
                        let same = zones(&theirs) == zones(&own) && zones(&own).is_some_and(|s| is_zone(&s));
                        if same { 1 } else { 2 }
                    }
                }
            }
            Node::Entrance | Node::Group(_) => 2,
        }
    }

    fn around(&self) -> place::Around<'_> {
        place::Around {
            hosts: &self.hosts,
            dying: &self.dying,
            settings: &self.settings,
        }
    }
}

/// Why a candidate stands where it stands: what counts most comes first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Why {
    lost: bool,
    full: bool,
    /// Its rack has others to read from.
    crosses: bool,
    depth: u32,
    /// 0 in one rack, 1 in one zone, 2 elsewhere.
    near: u8,
    pending: bool,
}

impl Why {
    fn text(self, free_slots: u32) -> String {
        let what = match self.depth {
            0 => "origin".to_owned(),
            1 => "1 step from an origin".to_owned(),
            steps => format!("{steps} steps from an origin"),
        };
        let room = match free_slots {
            _ if self.full => "no slot free".to_owned(),
            1 => "1 slot free".to_owned(),
            slots => format!("{slots} slots free"),
        };
        let mut parts = vec![what, room];
        parts.extend(match self.near {
            0 => Some("same rack".to_owned()),
            1 => Some("same zone".to_owned()),
            _ => None,
        });
        let crosses = "a second link into its rack";
        parts.extend(self.crosses.then(|| crosses.to_owned()));
        parts.extend(self.pending.then(|| "still attaching".to_owned()));
        parts.extend(self.lost.then(|| "its agent is not connected".to_owned()));
        parts.join(", ")
    }
}

/// Whom a host cannot read from: itself and all that read from it.
fn below(grove: &Grove, stripe: usize, seeker: Option<&HostName>) -> BTreeSet<Node> {
    let Some(seeker) = seeker else {
        return BTreeSet::new();
    };
    let node = Node::Host(seeker.clone());
    let below = grove.below(stripe, &node, usize::MAX).into_iter().flatten();
    let mut below: BTreeSet<Node> = below.collect();
    below.insert(node);
    below
}

impl Grove {
    /// Origins and hosts.
    fn nodes(&self) -> impl Iterator<Item = Node> {
        let origins = (0..)
            .zip(&self.image.origins)
            .map(|(index, _)| Node::Origin(index));
        origins.chain(self.places.keys().cloned().map(Node::Host))
    }
}

fn unknown(id: &ImageId) -> Refusal {
    Refusal::UnknownImage {
        image: id.to_string(),
    }
}
