//! Trees from the record, exactly as they were. Leases begin anew: how long nobody listened is not known.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use treeboot_types::{HostName, ImageId, StripeIndex};

use super::stripe::{Node, Stripe};
use super::{
    AttachmentRecord, Effect, Forest, Grove, HeldOf, Host, Key, Place, Record, Role, Settings, Told,
};

/// Why a record makes no trees.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// A value under a key of another kind.
    #[error("the record under {key} is not of its kind")]
    Kind {
        /// Which.
        key: String,
    },
    /// A place that names what is not there.
    #[error("host '{host}' has a place in image '{image}', but the record lacks {missing}")]
    Missing {
        /// Whose place.
        host: HostName,
        /// In which image.
        image: ImageId,
        /// What is not there.
        missing: String,
    },
    /// Parents that lead in a circle.
    #[error("the parents of host '{host}' in image '{image}' lead in a circle")]
    Circle {
        /// One of them.
        host: HostName,
        /// In which image.
        image: ImageId,
    },
}

impl Forest {
    /// Makes the trees that a record describes. `out` receives corrections of the record: a changed `--fan-out` leaves
    /// places as they are, but a changed rule of fallbacks tells hosts anew.
    ///
    /// # Errors
    /// [`LoadError`] names the entry that does not fit.
    pub fn load(
        settings: Settings,
        records: Vec<(Key, Record)>,
        out: &mut Vec<Effect>,
    ) -> Result<Self, LoadError> {
        let mut forest = Self::new(settings);
        let mut places: BTreeMap<ImageId, Vec<(HostName, AttachmentRecord)>> = BTreeMap::new();
        for (key, record) in records {
            match (key, record) {
                (Key::Epoch, Record::Epoch(epoch)) => forest.epoch = epoch,
                (Key::Newest(name), Record::Newest(version)) => {
                    forest.newest.insert(name, version);
                }
                (Key::Image(id), Record::Image(image)) => {
                    forest.images.insert(id, Grove::new(image, &forest.settings));
                }
                (Key::Host(name), Record::Host(record)) => {
                    let mut host = Host::unheard(record.info);
                    host.lease_until_ms = forest.settings.lease_ms;
                    forest.hosts.insert(name, host);
                }
                (Key::Attachment(image, host), Record::Attachment(record)) => {
                    places.entry(image).or_default().push((host, record));
                }
                (key, _) => {
                    return Err(LoadError::Kind {
                        key: format!("{key:?}"),
                    });
                }
            }
        }
        for (image, places) in places {
            forest.load_places(&image, places)?;
        }
        forest.remember_told(out);
        Ok(forest)
    }

    fn load_places(
        &mut self,
        image: &ImageId,
        places: Vec<(HostName, AttachmentRecord)>,
    ) -> Result<(), LoadError> {
        let missing = |host: &HostName, missing: String| LoadError::Missing {
            host: host.clone(),
            image: image.clone(),
            missing,
        };
        let Some((first, _)) = places.first() else {
            return Ok(());
        };
        let Some(grove) = self.images.get_mut(image) else {
            return Err(missing(first, format!("image '{image}'")));
        };
        let policy = &self.settings.policy;
        for (host, record) in &places {
            let Some(known) = self.hosts.get(host) else {
                return Err(missing(host, format!("host '{host}'")));
            };
            let role = Role::Host {
                home: StripeIndex(record.home),
                weight: known.info.weight,
            };
            let stands_in = grove.stripes.iter_mut().take(record.stripes.len());
            for (index, tree) in (0..).map(StripeIndex).zip(stands_in) {
                let shares = self
                    .settings
                    .shares(policy.slots(index, grove.image.stripes, role));
                tree.insert_host(host, shares, record.joined, []);
            }
        }
        for (index, tree) in grove.stripes.iter_mut().enumerate() {
            link_all(image, index, tree, &places)?;
        }
        for (host, record) in places {
            let place = Place {
                endpoint: Arc::new(record.endpoint),
                state: record.state,
                position: record.position,
                joined: record.joined,
                home: StripeIndex(record.home),
                stripes: record.stripes.len(),
                // The host's own lease is the longest; the state it sends decides on the rest.
                lease_until_ms: self.settings.lease_ms,
                told: Told {
                    epoch: record.epoch,
                    ..Told::default()
                },
            };
            grove.places.insert(host, place);
        }
        Ok(())
    }

    /// What hosts were told is what the trees say, because both were saved as one.
    fn remember_told(&mut self, out: &mut Vec<Effect>) {
        let mut views = Vec::new();
        for (id, grove) in &mut self.images {
            grove.stripes.iter_mut().for_each(|s| drop(s.take_touched()));
            let origins = grove.image.origins.iter().filter_map(|o| o.host.clone());
            let hosts: BTreeSet<HostName> = grove.places.keys().cloned().chain(origins).collect();
            views.extend(hosts.into_iter().map(|host| (id.clone(), host)));
        }
        let epoch = self.epoch;
        for (id, host) in views {
            let Some(grove) = self.images.get(&id) else {
                continue;
            };
            let (stripes, children) = self.view(grove, &host);
            let Some(grove) = self.images.get_mut(&id) else {
                continue;
            };
            match grove.places.get_mut(&host) {
                Some(place) => {
                    place.told.stripes = stripes;
                    place.told.children = children;
                }
                // When an origin's agent was told is not recorded: it is told again when it comes.
                None => {
                    let told = Told {
                        epoch,
                        stripes,
                        children,
                    };
                    grove.origins_told.insert(host, told);
                }
            }
        }
        self.epoch_taken = false;
        self.publish(None, out);
    }
}

/// Links hosts below their parents from the roots downward, so that each edge leads to a depth that is known.
fn link_all(
    image: &ImageId,
    index: usize,
    tree: &mut Stripe,
    places: &[(HostName, AttachmentRecord)],
) -> Result<(), LoadError> {
    type Held = Vec<(Node, u32)>;
    let mut waiting: BTreeMap<&HostName, Held> = BTreeMap::new();
    let mut below: BTreeMap<Node, Vec<&HostName>> = BTreeMap::new();
    let mut ready: Vec<&HostName> = Vec::new();
    let mut unplaced: BTreeMap<&HostName, usize> = BTreeMap::new();
    for (host, record) in places {
        let Some(held) = record.stripes.get(index) else {
            continue;
        };
        let mut parents = Vec::new();
        for share in held {
            let node = match &share.of {
                HeldOf::Origin(origin) => Node::Origin(*origin),
                HeldOf::Host(parent) => Node::Host(parent.clone()),
            };
            if tree.get(&node).is_none() {
                return Err(LoadError::Missing {
                    host: host.clone(),
                    image: image.clone(),
                    missing: format!("its parent {node:?}"),
                });
            }
            if matches!(node, Node::Host(_)) {
                *unplaced.entry(host).or_default() += 1;
                below.entry(node.clone()).or_default().push(host);
            }
            parents.push((node, share.shares));
        }
        if parents.is_empty() {
            return Err(LoadError::Missing {
                host: host.clone(),
                image: image.clone(),
                missing: "its parents".into(),
            });
        }
        waiting.insert(host, parents);
        if !unplaced.contains_key(host) {
            ready.push(host);
        }
    }
    while let Some(host) = ready.pop() {
        for (parent, shares) in waiting.remove(host).unwrap_or_default() {
            tree.link(host, &parent, shares);
        }
        for child in below.remove(&Node::Host(host.clone())).unwrap_or_default() {
            if let Some(left) = unplaced.get_mut(child) {
                *left -= 1;
                if *left == 0 {
                    ready.push(child);
                }
            }
        }
    }
    match waiting.into_keys().next() {
        None => Ok(()),
        Some(host) => Err(LoadError::Circle {
            host: host.clone(),
            image: image.clone(),
        }),
    }
}
