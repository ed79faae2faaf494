//! The secrets of edges, put into messages on their way to a host: the trees know nothing of them.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use treeboot_identity::Who;
use treeboot_identity::edges::EdgeKey;
use treeboot_identity::tls::Peer;
use treeboot_proto::v1;
use treeboot_types::{HostInfo, HostName, Iqn, PlaneKind};

use crate::owner::Handle;
use crate::tree::Forest;

/// What edges' secrets follow from; nothing where there is no authority.
#[derive(Debug, Clone, Default)]
pub struct Edges(Option<Arc<Inner>>);

#[derive(Debug)]
struct Inner {
    key: EdgeKey,
    /// As the hosts said last.
    planes: Mutex<HashMap<HostName, PlaneKind>>,
}

impl Edges {
    /// Secrets that follow from this key.
    #[must_use]
    pub fn of(key: EdgeKey) -> Self {
        let planes = Mutex::default();
        Self(Some(Arc::new(Inner { key, planes })))
    }

    /// A host says what it is.
    pub(super) fn saw(&self, info: &HostInfo) {
        if let Some(inner) = &self.0 {
            inner.planes.lock().insert(info.name.clone(), info.plane);
        }
    }

    /// Adds what the host needs to log in to each of its parents. Foreign origins have what secrets they have.
    pub(super) async fn fill(&self, peer: &Peer, owner: &Handle, placement: &mut v1::Placement) {
        if let (Some(inner), Some(child)) = (&self.0, host_of(peer)) {
            placement.secrets = inner.secrets(child, owner, &[placement]).await;
        }
    }

    /// Adds the key of the host's own exports: before it there is no place in a tree, so a parent knows its children's secrets before
    /// they come. And what the host needs for the places that it has, in case that the coordinator's key is another than when it got them.
    pub(super) async fn welcome(&self, peer: &Peer, owner: &Handle, welcome: &mut v1::Welcome) {
        let (Some(inner), Some(host)) = (&self.0, host_of(peer)) else {
            return;
        };
        welcome.export_key = Some(v1::ExportKey {
            key: inner.key.exports_of(host).to_bytes(),
        });
        let asked = host.clone();
        let places = owner.ask(move |forest| forest.placements_of(&asked)).await;
        let places: Vec<v1::Placement> = places.iter().flatten().map(Into::into).collect();
        let places: Vec<&v1::Placement> = places.iter().collect();
        welcome.secrets = inner.secrets(host, owner, &places).await;
    }
}

impl Inner {
    async fn secrets(
        &self,
        child: &HostName,
        owner: &Handle,
        places: &[&v1::Placement],
    ) -> Vec<v1::EdgeSecret> {
        let mut secrets: Vec<v1::EdgeSecret> = Vec::new();
        for stripe in places.iter().flat_map(|place| &place.stripes) {
            for parent in stripe.active.iter().chain(&stripe.fallbacks) {
                let Some(endpoint) = &parent.endpoint else {
                    continue;
                };
                let known = secrets
                    .iter()
                    .any(|s| s.host == parent.host && s.target == endpoint.target);
                let (false, Ok(host), Ok(target)) =
                    (known, HostName::new(&parent.host), Iqn::new(&endpoint.target))
                else {
                    continue;
                };
                let exports = self.key.exports_of(&host);
                // LIO holds a list, or one secret for everybody; an origin is open to every host of the cluster, so it has no list.
                let shared = parent.origin && self.plane(owner, &host).await == Some(PlaneKind::Kernel);
                secrets.push(v1::EdgeSecret {
                    host: parent.host.clone(),
                    target: endpoint.target.clone(),
                    secret: match shared {
                        true => exports.shared(&target),
                        false => exports.secret(child, &target),
                    },
                    user: if shared { target.to_string() } else { String::new() },
                });
            }
        }
        secrets
    }

    async fn plane(&self, owner: &Handle, host: &HostName) -> Option<PlaneKind> {
        if let Some(plane) = self.planes.lock().get(host) {
            return Some(*plane);
        }
        // Known from before this coordinator's start.
        let hosts = owner.ask(Forest::list_hosts).await.ok()?;
        let mut planes = self.planes.lock();
        for view in hosts {
            planes.entry(view.info.name).or_insert(view.info.plane);
        }
        planes.get(host).copied()
    }
}

/// Of whom the certificate is, not what the message says.
fn host_of(peer: &Peer) -> Option<&HostName> {
    match peer {
        Peer::Known {
            who: Who::Host(host), ..
        } => Some(host),
        _ => None,
    }
}
