//! Who stands in an image's trees, by name and by where it exports: a join asks for both, and looking through all hosts for the
//! second would make a burst's cost grow with its square.

use std::collections::{BTreeMap, HashMap};
use std::ops::Deref;
use std::sync::Arc;

use treeboot_types::{Endpoint, HostName, Iqn, Portal};

use super::Place;

/// Read as a map from names to places.
#[derive(Debug, Default)]
pub(super) struct Places {
    by_host: BTreeMap<HostName, Place>,
    by_export: HashMap<(Portal, Iqn), HostName>,
}

impl Deref for Places {
    type Target = BTreeMap<HostName, Place>;

    fn deref(&self) -> &Self::Target {
        &self.by_host
    }
}

impl<'a> IntoIterator for &'a Places {
    type Item = (&'a HostName, &'a Place);
    type IntoIter = std::collections::btree_map::Iter<'a, HostName, Place>;

    fn into_iter(self) -> Self::IntoIter {
        self.by_host.iter()
    }
}

fn export(endpoint: &Endpoint) -> (Portal, Iqn) {
    (endpoint.portal.clone(), endpoint.target.clone())
}

impl Places {
    pub(super) fn insert(&mut self, host: HostName, place: Place) {
        self.remove(&host);
        self.by_export.insert(export(&place.endpoint), host.clone());
        self.by_host.insert(host, place);
    }

    pub(super) fn remove(&mut self, host: &HostName) -> Option<Place> {
        let place = self.by_host.remove(host)?;
        self.forget(host, &place.endpoint);
        Some(place)
    }

    /// For all but its endpoint.
    pub(super) fn get_mut(&mut self, host: &HostName) -> Option<&mut Place> {
        self.by_host.get_mut(host)
    }

    /// All of them, for all but their endpoints.
    pub(super) fn each(&mut self, change: impl FnMut(&mut Place)) {
        self.by_host.values_mut().for_each(change);
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
