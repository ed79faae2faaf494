//! Trees from the record, exactly as they were. Leases begin anew: how long nobody listened is not known.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use treeboot_types::{HostName, ImageId, StripeIndex};

use super::graft::{Claim, Claims};
use super::layer::Node;
use super::place::Around;
use super::{AttachmentRecord, Effect, Forest, Grove, HeldOf, Host, Key, Place, Record, Settings, Told, bar};

/// Hosts that one coordinator lets in in a second, on a slow machine that does other work too: 800 were measured on two quiet cores,
/// 250 on busy ones.
const HANDSHAKES_A_SECOND: u64 = 200;

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

type Places = BTreeMap<HostName, AttachmentRecord>;

impl Forest {
    /// Makes the trees that a record describes. `out` receives corrections of the record: a changed `--fan-out` leaves
    /// places as they are, but a changed rule of fallbacks tells hosts anew, and hosts whose places do not suit their racks
    /// get others.
    ///
    /// # Errors
    /// [`LoadError`] names the entry that does not fit.
    pub fn load(
        settings: Settings,
        records: Vec<(Key, Record)>,
        out: &mut Vec<Effect>,
    ) -> Result<Self, LoadError> {
        let mut forest = Self::new(settings);
        let mut places: BTreeMap<ImageId, Places> = BTreeMap::new();
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
                    places.entry(image).or_default().insert(host, record);
                }
                (key, _) => {
                    return Err(LoadError::Kind {
                        key: format!("{key:?}"),
                    });
                }
            }
        }
        for (image, places) in places {
            let moved = forest.load_places(&image, places)?;
            forest.remember_told(&image, moved);
        }
        forest.remember_origins_told();
        forest.let_hosts_come_back();
        forest.epoch_taken = false;
        forest.publish(None, out);
        Ok(forest)
    }

    /// All hosts of the record come at one moment, and shaking hands with thousands takes longer than a lease may be: those that wait
    /// for their turn are not to be given up meanwhile.
    fn let_hosts_come_back(&mut self) {
        let turns = u64::try_from(self.hosts.len()).unwrap_or(u64::MAX) / HANDSHAKES_A_SECOND;
        let until = self.settings.lease_ms.saturating_add(turns.saturating_mul(1_000));
        for host in self.hosts.values_mut() {
            host.lease_until_ms = until;
        }
        let groves = self.images.values_mut();
        groves.for_each(|grove| grove.places.each(|place| place.lease_until_ms = until));
    }

    /// True where somebody was placed anew.
    fn load_places(&mut self, image: &ImageId, places: Places) -> Result<bool, LoadError> {
        let missing = |host: &HostName, missing: String| LoadError::Missing {
            host: host.clone(),
            image: image.clone(),
            missing,
        };
        let Some(grove) = self.images.get_mut(image) else {
            return match places.first_key_value() {
                Some((host, _)) => Err(missing(host, format!("image '{image}'"))),
                None => Ok(false),
            };
        };
        let around = Around {
            hosts: &self.hosts,
            dying: &BTreeSet::new(),
            settings: &self.settings,
        };
        if let Some(host) = places.keys().find(|host| !self.hosts.contains_key(host)) {
            return Err(missing(host, format!("host '{host}'")));
        }
        for stripe in 0..grove.stripes.len() {
            check_parents(image, grove, stripe, &places)?;
        }
        let mut claims = Claims::new();
        for (host, record) in places {
            let scope = around.scope_for(&host);
            let stands = record.stripes.iter().take(grove.stripes.len());
            let held =
                |held: &Vec<super::HeldShare>| held.iter().map(|h| (node_of(&h.of), h.shares)).collect();
            let claim = Claim {
                scope: scope.clone(),
                home: Some(StripeIndex(record.home)),
                joined: record.joined,
                parents: stands.map(held).collect(),
            };
            let place = Place {
                endpoint: Arc::new(record.endpoint),
                state: record.state,
                position: record.position,
                joined: record.joined,
                scope,
                home: StripeIndex(record.home),
                stripes: claim.parents.len(),
                // The host's own lease is the longest; the state it sends decides on the rest.
                lease_until_ms: self.settings.lease_ms,
                told: Told {
                    epoch: record.epoch,
                    ..Told::default()
                },
                stale: bar::Paths::new(),
                unsure: true,
                barred: paths(record.barred),
                held_back: paths(record.held_back),
                lets_in: paths(record.lets_in),
                lets_in_others: record.lets_in_others,
                is_confirmed: false,
                mentioned_on: None,
            };
            grove.places.insert(host.clone(), place);
            claims.insert(host, claim);
        }
        Ok(!around.graft(grove, &mut claims, false).is_empty())
    }

    /// What hosts were told is what the trees say, because both were saved as one; but where somebody was placed anew, all are told.
    fn remember_told(&mut self, image: &ImageId, moved: bool) {
        let Some(grove) = self.images.get_mut(image) else {
            return;
        };
        if moved {
            self.changed.insert(image.clone());
            return;
        }
        drop(grove.take_touched());
        let hosts: Vec<HostName> = grove.places.keys().cloned().collect();
        let Some(grove) = self.images.get(image) else {
            return;
        };
        let views = hosts.into_iter().map(|host| (self.view(grove, &host), host));
        let views: Vec<_> = views.collect();
        let Some(grove) = self.images.get_mut(image) else {
            return;
        };
        for ((stripes, children), host) in views {
            if let Some(place) = grove.places.get_mut(&host) {
                place.told.stripes = stripes;
                place.told.children = children;
            }
        }
    }

    /// When an origin's agent was told is not recorded: it is told again when it comes.
    fn remember_origins_told(&mut self) {
        let epoch = self.epoch;
        let mut told = Vec::new();
        for (id, grove) in &self.images {
            let agents = grove.image.origins.iter().filter_map(|o| o.host.as_ref());
            for host in agents.filter(|host| !grove.places.contains_key(host)) {
                let (stripes, children) = self.view(grove, host);
                let known = Told {
                    epoch,
                    stripes,
                    children,
                };
                told.push((id.clone(), host.clone(), known));
            }
        }
        for (id, host, known) in told {
            if let Some(grove) = self.images.get_mut(&id) {
                grove.origins_told.insert(host, known);
            }
        }
    }
}

fn paths(recorded: Vec<(u16, HostName)>) -> bar::Paths {
    let paths = recorded.into_iter();
    paths.map(|(stripe, host)| (StripeIndex(stripe), host)).collect()
}

fn node_of(held: &HeldOf) -> Node {
    match held {
        HeldOf::Origin(index) => Node::Origin(*index),
        HeldOf::Host(host) => Node::Host(host.clone()),
    }
}

/// Every parent is there, and following them ends at an origin.
fn check_parents(image: &ImageId, grove: &Grove, stripe: usize, places: &Places) -> Result<(), LoadError> {
    let mut below: BTreeMap<&HostName, Vec<&HostName>> = BTreeMap::new();
    let mut unplaced: BTreeMap<&HostName, usize> = BTreeMap::new();
    let mut ready = Vec::new();
    for (host, record) in places {
        let Some(held) = record.stripes.get(stripe) else {
            continue;
        };
        let missing = |missing: String| LoadError::Missing {
            host: host.clone(),
            image: image.clone(),
            missing,
        };
        if held.is_empty() {
            return Err(missing("its parents".into()));
        }
        let mut hosts = 0;
        for share in held {
            let stands = |parent: &HostName| places.get(parent).is_some_and(|p| stripe < p.stripes.len());
            match &share.of {
                HeldOf::Origin(index) if usize::from(*index) < grove.image.origins.len() => {}
                HeldOf::Host(parent) if stands(parent) => {
                    below.entry(parent).or_default().push(host);
                    hosts += 1;
                }
                HeldOf::Origin(index) => return Err(missing(format!("its parent, origin {index}"))),
                HeldOf::Host(parent) => return Err(missing(format!("its parent '{parent}'"))),
            }
        }
        unplaced.insert(host, hosts);
        if hosts == 0 {
            ready.push(host);
        }
    }
    while let Some(host) = ready.pop() {
        unplaced.remove(host);
        for child in below.remove(host).unwrap_or_default() {
            if let Some(left) = unplaced.get_mut(child) {
                *left -= 1;
                if *left == 0 {
                    ready.push(child);
                }
            }
        }
    }
    match unplaced.into_keys().next() {
        None => Ok(()),
        Some(host) => Err(LoadError::Circle {
            host: host.clone(),
            image: image.clone(),
        }),
    }
}
