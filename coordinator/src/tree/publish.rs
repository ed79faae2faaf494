//! Who is told of what changed: placements are compared with what was told last, so that nobody is told twice.
//!
//! The order is part of the safety: first those who lose children, so that nobody feeds a host that moved; then from
//! the root downward, so that a parent knows its child before the child comes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use treeboot_types::{
    Child, Epoch, HostName, Image, ImageId, Parent, Placement, StripeIndex, StripePlacement,
};

use crate::planted::{Bug, planted};

use super::layer::Node;
use super::stripe::{Doubt, FALLBACK_LEVELS};
use super::{
    AttachmentRecord, Change, Effect, Forest, Grove, HeldOf, HeldShare, Key, Note, Place, Push, Record, Told,
    bar, place,
};

/// A placement that reads otherwise than what its host was told.
struct News {
    /// Children are taken away.
    takes: bool,
    depth: u32,
    host: HostName,
    image: ImageId,
    /// Until it is noted as such.
    told: Told,
    /// The host has other parents than before.
    moves: bool,
    /// Or may have, of which it is not told yet: registrations on what it was told before are refused.
    fences: bool,
    /// It had none before.
    is_new: bool,
}

impl Forest {
    /// Saves and sends what changed in this step; `answered` gets its placement as an answer instead.
    pub(super) fn publish(&mut self, answered: Option<(ImageId, HostName)>, out: &mut Vec<Effect>) {
        let mut news = self.news();
        if !news.is_empty() {
            let epoch = self.take_epoch();
            news.iter_mut().for_each(|n| n.told.epoch = epoch);
        }
        news.sort_by(|a, b| (!a.takes, a.depth, &a.host).cmp(&(!b.takes, b.depth, &b.host)));
        for item in &mut news {
            let Some(grove) = self.images.get_mut(&item.image) else {
                continue;
            };
            let told = std::mem::take(&mut item.told);
            if let Some(place) = grove.places.get_mut(&item.host) {
                if item.fences {
                    place.position = told.epoch;
                }
                if grove.image.stripes > 1 {
                    place.note_children(&told.children);
                }
                place.told = told;
                self.unsaved.insert((item.image.clone(), item.host.clone()));
            } else {
                grove.origins_told.insert(item.host.clone(), told);
            }
        }
        for (image, grove) in &mut self.images {
            let changed = std::mem::take(&mut grove.changed_homes).into_iter();
            self.unsaved.extend(changed.map(|host| (image.clone(), host)));
        }
        for (image, host) in std::mem::take(&mut self.unsaved) {
            if let Some(grove) = self.images.get(&image)
                && let Some(place) = grove.places.get(&host)
            {
                let record = record_of(grove, &host, place);
                out.push(Effect::Save(Change::Put(
                    Key::Attachment(image, host),
                    Record::Attachment(record),
                )));
            }
        }
        if std::mem::take(&mut self.epoch_taken) {
            out.push(Effect::Save(Change::Put(Key::Epoch, Record::Epoch(self.epoch))));
        }
        self.note_moves(&news, out);
        for item in news {
            // An answer may be lost, and a host that is attached already goes on without it.
            let is_attached = |host| {
                self.hosts
                    .get(host)
                    .is_some_and(|h| h.listed.contains(&item.image))
            };
            let told_otherwise = answered
                .as_ref()
                .is_some_and(|(i, h)| *i == item.image && *h == item.host && !is_attached(h));
            let is_kept_silent = item.takes && planted(Bug::LossOfChildrenNotTold);
            if !told_otherwise && !is_kept_silent {
                self.push_placement(&item.image, &item.host, out);
            }
        }
    }

    fn note_moves(&self, news: &[News], out: &mut Vec<Effect>) {
        let moved = |image: &ImageId| {
            let of_image = news.iter().filter(|n| n.image == *image);
            of_image.filter(|n| n.moves && !n.is_new).count()
        };
        let images: BTreeSet<&ImageId> = news.iter().map(|n| &n.image).collect();
        for image in images {
            let hosts = moved(image);
            if hosts > 0 {
                let image = image.clone();
                out.push(Effect::Note(Note::Moved { image, hosts }));
            }
        }
    }

    /// Tells a host its place in an image's trees as it is in force.
    pub(super) fn push_placement(&self, image: &ImageId, host: &HostName, out: &mut Vec<Effect>) {
        if let Some(stream) = self.hosts.get(host).and_then(|h| h.stream)
            && let Some(placement) = self.placement(image, host)
        {
            out.push(Effect::Push(stream, Push::Placement(Box::new(placement))));
        }
    }

    /// What a host was told last of every image that it is attached to.
    pub fn placements_of(&self, host: &HostName) -> Vec<Placement> {
        let attached = self
            .images
            .iter()
            .filter(|(_, grove)| grove.places.contains_key(host));
        attached
            .filter_map(|(image, _)| self.placement(image, host))
            .collect()
    }

    /// What a host was told last of an image.
    pub(super) fn placement(&self, image: &ImageId, host: &HostName) -> Option<Placement> {
        let grove = self.images.get(image)?;
        let told = match grove.places.get(host) {
            Some(place) => &place.told,
            None => grove.origins_told.get(host)?,
        };
        Some(Placement {
            image: self.image_for(grove, host),
            epoch: told.epoch,
            stripes: told.stripes.clone(),
            children: told.children.clone(),
        })
    }

    /// The record with its origins nearest first for a host.
    fn image_for(&self, grove: &Grove, host: &HostName) -> Arc<Image> {
        let order = self.origins_for(grove, host);
        if order.windows(2).all(|pair| pair[0] < pair[1]) {
            return grove.image.clone();
        }
        let mut image = Image::clone(&grove.image);
        image.origins = order
            .iter()
            .filter_map(|&i| grove.image.origins.get(usize::from(i)).cloned())
            .collect();
        Arc::new(image)
    }

    /// Indices of the origins, nearest first for a host.
    pub(super) fn origins_for(&self, grove: &Grove, host: &HostName) -> Vec<u16> {
        let around = place::Around {
            hosts: &self.hosts,
            dying: &self.dying,
            settings: &self.settings,
        };
        let mut order: Vec<u16> = (0..).zip(&grove.image.origins).map(|(i, _)| i).collect();
        let member = Node::Host(host.clone());
        order.sort_by_key(|&i| around.distance(&grove.image, i, &member));
        order
    }

    fn news(&mut self) -> Vec<News> {
        let mut news = Vec::new();
        for image in std::mem::take(&mut self.changed) {
            let Some(grove) = self.images.get_mut(&image) else {
                continue;
            };
            let touched = grove.take_touched();
            let Some(grove) = self.images.get(&image) else {
                continue;
            };
            let mut agents: BTreeMap<HostName, Doubt> = BTreeMap::new();
            for (node, doubt) in touched {
                if let Some(host) = grove.agent_of(&node) {
                    let known = agents.entry(host).or_default();
                    // An origin may not have been told of anything yet.
                    known.paths |= doubt.paths || node.is_root();
                    known.children |= doubt.children || node.is_root();
                }
            }
            let mut paths = BTreeMap::new();
            let mut hidden = BTreeSet::new();
            if grove.image.stripes > 1 {
                let in_doubt = agents.iter().filter(|(host, doubt)| {
                    let place = grove.places.get(host);
                    place.is_some_and(|place| doubt.paths || place.is_in_between())
                });
                let told: Vec<_> = in_doubt
                    .map(|(host, _)| (host.clone(), self.paths_to_tell(grove, host)))
                    .collect();
                let Some(grove) = self.images.get_mut(&image) else {
                    continue;
                };
                for (host, (stripes, held_back)) in told {
                    let barred = grove.places.get_mut(&host).map(|place| {
                        if !held_back.is_empty() || !place.held_back.is_empty() {
                            // The record names the parents that it has, of which it may be told nothing new; and what it was told
                            // before the last time may have been of others.
                            self.unsaved.insert((image.clone(), host.clone()));
                            place.position = place.told.epoch;
                            hidden.insert(host.clone());
                        }
                        place.held_back = held_back;
                        place.bar(&stripes)
                    });
                    for parent in barred.into_iter().flatten() {
                        agents.entry(parent).or_default().children = true;
                        self.unsaved.insert((image.clone(), host.clone()));
                    }
                    paths.insert(host, stripes);
                }
            }
            let Some(grove) = self.images.get(&image) else {
                continue;
            };
            news.extend(agents.into_iter().filter_map(|(host, doubt)| {
                let stripes = paths.remove(&host);
                let mut news = self.news_for(&image, grove, host, doubt, stripes)?;
                // What it was told last may have been of other parents than it has.
                news.fences |= hidden.contains(&news.host);
                Some(news)
            }));
        }
        news
    }

    /// `stripes` are the paths of the host, if they are known already.
    fn news_for(
        &self,
        image: &ImageId,
        grove: &Grove,
        host: HostName,
        doubt: Doubt,
        stripes: Option<Vec<StripePlacement>>,
    ) -> Option<News> {
        let nobody = Told::default();
        let (told, place) = match grove.places.get(&host) {
            Some(place) => (&place.told, Some(place)),
            None if grove.is_origin(&host) => (grove.origins_told.get(&host).unwrap_or(&nobody), None),
            None => return None,
        };
        let stripes = stripes.or_else(|| doubt.paths.then(|| self.paths_told(grove, &host)));
        let stripes = stripes.filter(|stripes| told.stripes != *stripes);
        let children = doubt.children.then(|| children(grove, &host));
        let children = children.filter(|children| told.children != *children);
        if stripes.is_none() && children.is_none() {
            return None;
        }
        let stripes = stripes.unwrap_or_else(|| told.stripes.clone());
        let children = children.unwrap_or_else(|| told.children.clone());
        // Foreign origins have no names, so they are told apart by where they are.
        let name = |p: &Parent| (p.host.clone(), p.host.is_none().then(|| p.endpoint.clone()));
        let parents = |stripes: &[StripePlacement]| -> Vec<Vec<_>> {
            stripes
                .iter()
                .map(|s| s.active.iter().map(name).collect())
                .collect()
        };
        let moves = place.is_some() && parents(&told.stripes) != parents(&stripes);
        Some(News {
            takes: told.children.iter().any(|child| !children.contains(child)),
            depth: stripes.iter().map(|s| s.depth).max().unwrap_or(0),
            image: image.clone(),
            moves,
            fences: moves,
            is_new: told.epoch == Epoch::default(),
            told: Told {
                epoch: told.epoch,
                stripes,
                children,
            },
            host,
        })
    }

    /// A host's placement as the trees have it.
    pub(super) fn view(&self, grove: &Grove, host: &HostName) -> (Vec<StripePlacement>, Vec<Child>) {
        (self.paths_told(grove, host), children(grove, host))
    }

    fn paths_told(&self, grove: &Grove, host: &HostName) -> Vec<StripePlacement> {
        let nothing = bar::Paths::new();
        let held_back = grove.places.get(host).map_or(&nothing, |place| &place.held_back);
        self.paths(grove, host, held_back)
    }

    /// From whom a host is to read by what is known now, and what is held back from it.
    fn paths_to_tell(&self, grove: &Grove, host: &HostName) -> (Vec<StripePlacement>, bar::Paths) {
        let nothing = bar::Paths::new();
        let paths = self.paths(grove, host, &nothing);
        let held_back = grove.held_back(host, &paths);
        if held_back.is_empty() {
            return (paths, held_back);
        }
        (self.paths(grove, host, &held_back), held_back)
    }

    /// From whom a host reads. For parents that are held back those above them stand in.
    fn paths(&self, grove: &Grove, host: &HostName, held_back: &bar::Paths) -> Vec<StripePlacement> {
        let origin = grove.origin_of(host);
        let node = origin.map_or_else(|| Node::Host(host.clone()), Node::Origin);
        let order = match origin {
            Some(_) => Vec::new(),
            None => self.origins_for(grove, host),
        };
        let mut stripes = Vec::new();
        for stripe in grove.indices() {
            let index = usize::from(stripe.0);
            let Some(depth) = grove.depth(index, &node) else {
                continue;
            };
            let parent = |n: &Node| grove.parent(stripe, n);
            let ancestors = grove.above(index, &node, FALLBACK_LEVELS + 1);
            let is_told = |n: &&Node| match n {
                Node::Host(name) if !held_back.is_empty() => !held_back.contains(&(stripe, name.clone())),
                _ => true,
            };
            let mut active: Vec<&Node> = ancestors.iter().take(1).flatten().filter(is_told).collect();
            let is_host = |n: &&Node| matches!(n, Node::Host(_));
            let hosts_above = ancestors.iter().skip(1).flatten().filter(is_host).filter(is_told);
            let origins: Vec<Node> = order.iter().map(|&i| Node::Origin(i)).collect();
            if active.is_empty() {
                let above = ancestors.iter().skip(1).map(|row| row.iter().find(is_told));
                active.extend(above.flatten().next().or(origins.first()));
            }
            let below = if planted(Bug::FallbackBelow) {
                grove.below(index, &node, 1)
            } else {
                Vec::new()
            };
            let fallbacks = below.iter().flatten().chain(hosts_above).chain(&origins);
            let fallbacks = fallbacks.filter(|n| !active.contains(n));
            stripes.push(StripePlacement {
                stripe,
                active: active.iter().filter_map(|n| parent(n)).collect(),
                fallbacks: fallbacks.filter_map(parent).collect(),
                policy: self.settings.path_policy,
                depth,
            });
        }
        stripes
    }
}

/// Who reads from a host.
fn children(grove: &Grove, host: &HostName) -> Vec<Child> {
    let origin = grove.origin_of(host);
    let node = origin.map_or_else(|| Node::Host(host.clone()), Node::Origin);
    let is_admitted = |child: &HostName, stripe| {
        let place = grove.places.get(child);
        origin.is_some() || place.is_none_or(|place| !place.is_barred(stripe, host))
    };
    let mut children = Vec::new();
    for stripe in grove.indices() {
        let index = usize::from(stripe.0);
        if grove.depth(index, &node).is_none() {
            continue;
        }
        // An origin lets in everybody, so it is told of its own children only.
        let levels = if origin.is_some() { 1 } else { FALLBACK_LEVELS + 1 };
        for (level, row) in grove.below(index, &node, levels).into_iter().enumerate() {
            let hosts = row.into_iter().filter_map(|n| match n {
                Node::Host(host) if is_admitted(&host, stripe) => Some(host),
                _ => None,
            });
            children.extend(hosts.map(|host| Child {
                host,
                stripe,
                fallback: level > 0,
            }));
        }
    }
    children
}

impl Grove {
    /// Of all stripes.
    pub(super) fn indices(&self) -> impl Iterator<Item = StripeIndex> + use<> {
        (0..self.image.stripes).map(StripeIndex)
    }

    /// The agent behind a vertex; none for a foreign origin.
    fn agent_of(&self, node: &Node) -> Option<HostName> {
        match node {
            Node::Host(host) => Some(host.clone()),
            Node::Origin(index) => self.image.origins.get(usize::from(*index))?.host.clone(),
            Node::Entrance | Node::Group(_) => None,
        }
    }

    /// A vertex as its children see it.
    pub(super) fn parent(&self, stripe: StripeIndex, node: &Node) -> Option<Parent> {
        let (host, endpoint, origin) = match node {
            Node::Host(host) => (Some(host.clone()), &self.places.get(host)?.endpoint, false),
            Node::Origin(index) => {
                let index = usize::from(*index);
                let host = self.image.origins.get(index)?.host.clone();
                (host, self.origin_endpoints.get(index)?, true)
            }
            Node::Entrance | Node::Group(_) => return None,
        };
        Some(Parent {
            host,
            endpoint: endpoint.clone(),
            origin,
            depth: self.depth(stripe.0.into(), node)?,
        })
    }
}

fn record_of(grove: &Grove, host: &HostName, place: &Place) -> AttachmentRecord {
    let node = Node::Host(host.clone());
    let held = |stripe: usize| {
        let parents = grove.parents(stripe, &node).into_iter();
        let held = parents.filter_map(|(node, shares)| {
            let of = match node {
                Node::Origin(index) => HeldOf::Origin(index),
                Node::Host(host) => HeldOf::Host(host),
                Node::Entrance | Node::Group(_) => return None,
            };
            Some(HeldShare { of, shares })
        });
        held.collect()
    };
    AttachmentRecord {
        endpoint: place.endpoint.as_ref().clone(),
        state: place.state,
        epoch: place.told.epoch,
        position: place.position,
        joined: place.joined,
        home: place.home.0,
        barred: recorded(&place.barred),
        held_back: recorded(&place.held_back),
        lets_in: recorded(&place.lets_in),
        lets_in_others: place.lets_in_others,
        stripes: (0..place.stripes).map(held).collect(),
    }
}

fn recorded(paths: &bar::Paths) -> Vec<(u16, HostName)> {
    paths
        .iter()
        .map(|(stripe, host)| (stripe.0, host.clone()))
        .collect()
}
