//! Who stands in an image's trees, by name and by where it exports: a join asks for both, and looking through all hosts for the
//! second would make a burst's cost grow with its square.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use treeboot_types::{Endpoint, HostName, Iqn, Portal};

use super::Place;

/// A map from names to places. A step asks for hundreds of them by name and seldom for all, so they are found by hash; whoever
/// walks over all of them does so in the order of their names, because equal events must do the same.
#[derive(Debug, Default)]
pub(super) struct Places {
    by_host: HashMap<HostName, Box<Place>>,
    names: BTreeSet<HostName>,
    by_export: HashMap<(Portal, Iqn), HostName>,
}

impl<'a> IntoIterator for &'a Places {
    type Item = (&'a HostName, &'a Place);
    type IntoIter = Box<dyn Iterator<Item = Self::Item> + 'a>;

    fn into_iter(self) -> Self::IntoIter {
        Box::new(self.iter())
    }
}

fn export(endpoint: &Endpoint) -> (Portal, Iqn) {
    (endpoint.portal.clone(), endpoint.target.clone())
}

impl Places {
    pub(super) fn len(&self) -> usize {
        self.by_host.len()
    }

    pub(super) fn get(&self, host: &HostName) -> Option<&Place> {
        self.by_host.get(host).map(Box::as_ref)
    }

    pub(super) fn contains_key(&self, host: &HostName) -> bool {
        self.by_host.contains_key(host)
    }

    /// By name.
    pub(super) fn keys(&self) -> impl Iterator<Item = &HostName> {
        self.names.iter()
    }

    /// By name.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&HostName, &Place)> {
        self.keys().filter_map(|host| Some((host, self.get(host)?)))
    }

    /// In no order.
    pub(super) fn values(&self) -> impl Iterator<Item = &Place> {
        self.by_host.values().map(Box::as_ref)
    }

    pub(super) fn insert(&mut self, host: HostName, place: Place) {
        self.remove(&host);
        self.by_export.insert(export(&place.endpoint), host.clone());
        self.names.insert(host.clone());
        self.by_host.insert(host, Box::new(place));
    }

    pub(super) fn remove(&mut self, host: &HostName) -> Option<Place> {
        let place = self.by_host.remove(host)?;
        self.names.remove(host);
        self.forget(host, &place.endpoint);
        Some(*place)
    }

    /// For all but its endpoint.
    pub(super) fn get_mut(&mut self, host: &HostName) -> Option<&mut Place> {
        self.by_host.get_mut(host).map(Box::as_mut)
    }

    /// All of them, for all but their endpoints.
    pub(super) fn each(&mut self, mut change: impl FnMut(&mut Place)) {
        self.by_host.values_mut().for_each(|place| change(place));
    }

    /// True where it is another than before.
    pub(super) fn set_endpoint(&mut self, host: &HostName, endpoint: Endpoint) -> bool {
        let Some(place) = self.by_host.get_mut(host).filter(|p| *p.endpoint != endpoint) else {
            return false;
        };
        let key = export(&endpoint);
        let old = std::mem::replace(&mut place.endpoint, Arc::new(endpoint));
        self.forget(host, &old);
        self.by_export.insert(key, host.clone());
        true
    }

    /// Who exports under the same portal and target.
    pub(super) fn holder(&self, endpoint: &Endpoint) -> Option<&HostName> {
        self.by_export.get(&export(endpoint))
    }

    fn forget(&mut self, host: &HostName, endpoint: &Endpoint) {
        let key = export(endpoint);
        if self.by_export.get(&key) == Some(host) {
            self.by_export.remove(&key);
        }
    }
}
