//! How much there is of everything, for figures and for health. Counts what is at hand; walks over every place once.

use treeboot_types::{AttachState, Epoch, HostName, ImageId};

use super::layer::Node;
use super::scope::Scope;
use super::{Forest, Grove};

/// All trees, counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Census {
    /// The last decision.
    pub epoch: Epoch,
    /// Places are being learned from the hosts and not given out.
    pub rebuilding: bool,
    /// Hosts whose stream is open.
    pub connected: u64,
    /// Hosts that are silent, their leases not over yet.
    pub silent: u64,
    /// VMs on all hosts.
    pub vms: u64,
    /// By name and version.
    pub images: Vec<ImageCensus>,
}

/// An image's trees, counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageCensus {
    /// Which.
    pub id: ImageId,
    /// Its origins.
    pub origins: u64,
    /// Hosts whose export may be relied on.
    pub ready: u64,
    /// Hosts that have a place and no export yet.
    pub pending: u64,
    /// Hosts of both kinds that are silent.
    pub lost: u64,
    /// For each stripe the steps from an origin to the host that is farthest from one.
    pub depths: Vec<u32>,
}

impl Forest {
    /// Counts everything.
    pub fn census(&self) -> Census {
        let connected = self.hosts.values().filter(|host| host.stream.is_some()).count();
        Census {
            epoch: self.epoch,
            rebuilding: self.is_rebuilding(),
            connected: connected as u64,
            silent: (self.hosts.len() - connected) as u64,
            vms: self.hosts.values().map(|host| u64::from(host.vms)).sum(),
            images: self
                .images
                .iter()
                .map(|(id, grove)| self.count(id, grove))
                .collect(),
        }
    }

    fn count(&self, id: &ImageId, grove: &Grove) -> ImageCensus {
        let is_lost = |host: &HostName| self.hosts.get(host).is_none_or(|host| host.stream.is_none());
        let ready = grove
            .places
            .values()
            .filter(|place| place.state == AttachState::Ready)
            .count();
        ImageCensus {
            id: id.clone(),
            origins: grove.image.origins.len() as u64,
            ready: ready as u64,
            pending: (grove.places.len() - ready) as u64,
            lost: grove.places.keys().filter(|host| is_lost(host)).count() as u64,
            depths: (0..grove.stripes.len())
                .map(|stripe| grove.deepest(stripe))
                .collect(),
        }
    }
}

impl Grove {
    /// Steps from an origin to the host that is farthest from one.
    fn deepest(&self, stripe: usize) -> u32 {
        let layers = self
            .stripes
            .get(stripe)
            .into_iter()
            .flat_map(|stripe| stripe.layers());
        // Groups are no hosts, but each has a host at its entrance that stands where the group does.
        let depths = layers.map(|(scope, layer)| layer.deepest().saturating_add(self.base(stripe, scope)));
        depths.max().unwrap_or(0)
    }

    /// What is to be added to the depths in a layer.
    fn base(&self, stripe: usize, scope: &Scope) -> u32 {
        let mut scope = scope.clone();
        let mut base = 0u32;
        while let Some(outer) = scope.outer() {
            let group = Node::Group(scope);
            let vertex = self.layer(stripe, &outer).and_then(|layer| layer.get(&group));
            base = base.saturating_add(vertex.map_or(0, |vertex| vertex.depth.saturating_sub(1)));
            scope = outer;
        }
        base
    }
}
