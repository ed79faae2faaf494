//! What can be asked without changing anything.

use std::collections::BTreeSet;
use std::sync::Arc;

use treeboot_types::{
    AttachState, BadParent, Epoch, HostInfo, HostName, Image, ImageId, ImageRef, Parent, StripeIndex,
};

use super::stripe::{Node, Stripe, Vertex};
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
}

/// An export that a host could read from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
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
        for (stripe, tree) in (0..).map(StripeIndex).zip(&grove.stripes) {
            let views = tree
                .vertices()
                .filter_map(|(n, v)| self.vertex(grove, stripe, n, v));
            vertices.extend(views);
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

    fn vertex(&self, grove: &Grove, stripe: StripeIndex, node: &Node, vertex: &Vertex) -> Option<VertexView> {
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
        Some(VertexView {
            stripe,
            portal: parent.endpoint.portal.to_string(),
            origin: parent.origin,
            depth: vertex.depth,
            state: place.map_or(AttachState::Ready, |p| p.state),
            connected: self.is_connected(parent.host.as_ref()),
            parents: vertex.parents.keys().filter_map(name).collect(),
            children: u32::try_from(vertex.children.len()).unwrap_or(u32::MAX),
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
        for (stripe, tree) in (0..).map(StripeIndex).zip(&grove.stripes) {
            let below = below(tree, seeker);
            let eligible = tree.vertices().filter(|(node, _)| !below.contains(node));
            found.extend(eligible.filter_map(|(node, v)| {
                let parent = grove.parent(stripe, node)?;
                let place = parent.host.as_ref().and_then(|h| grove.places.get(h));
                let state = place.map_or(AttachState::Ready, |p| p.state);
                let free_slots = v.free() / self.settings.active_parents.max(1);
                let connected = self.is_connected(parent.host.as_ref());
                let near = self.nearness(grove, node, seeker);
                let is_pending = state == AttachState::Pending;
                let rank = (
                    !connected,
                    free_slots == 0,
                    v.depth,
                    near,
                    is_pending,
                    v.used,
                    v.joined,
                );
                Some((rank, parent, state, free_slots))
            }));
        }
        found.sort_by(|a, b| (a.0, &a.1.host).cmp(&(b.0, &b.1.host)));
        let best = found.into_iter().take(limit);
        let best = best.map(
            |((lost, full, depth, near, pending, ..), parent, state, free_slots)| Candidate {
                reason: reason(lost, full, depth, near, pending, free_slots),
                parent,
                state,
                free_slots,
            },
        );
        Ok(best.collect())
    }

    fn nearness(&self, grove: &Grove, node: &Node, seeker: Option<&HostName>) -> u8 {
        let around = place::Around {
            hosts: &self.hosts,
            dying: &self.dying,
            settings: &self.settings,
        };
        match (node, seeker) {
            (Node::Origin(index), Some(seeker)) => around.distance(&grove.image, *index, seeker),
            _ => 2,
        }
    }
}

/// Whom a host cannot read from: itself and all that read from it.
fn below(tree: &Stripe, seeker: Option<&HostName>) -> BTreeSet<Node> {
    let Some(seeker) = seeker else {
        return BTreeSet::new();
    };
    let node = Node::Host(seeker.clone());
    let mut below: BTreeSet<Node> = tree.below(&node, usize::MAX).into_iter().flatten().collect();
    below.insert(node);
    below
}

fn reason(lost: bool, full: bool, depth: u32, near: u8, pending: bool, free_slots: u32) -> String {
    let what = match depth {
        0 => "origin".to_owned(),
        1 => "1 step from an origin".to_owned(),
        steps => format!("{steps} steps from an origin"),
    };
    let room = if full {
        "no slot free".to_owned()
    } else {
        format!("{free_slots} slot(s) free")
    };
    let mut parts = vec![what, room];
    parts.extend(match near {
        0 => Some("same rack".to_owned()),
        1 => Some("same zone".to_owned()),
        _ => None,
    });
    parts.extend(pending.then(|| "still attaching".to_owned()));
    parts.extend(lost.then(|| "its agent is not connected".to_owned()));
    parts.join(", ")
}

fn unknown(id: &ImageId) -> Refusal {
    Refusal::UnknownImage {
        image: id.to_string(),
    }
}
