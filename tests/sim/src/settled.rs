//! What must be so once nothing goes wrong any more.

use std::collections::{BTreeMap, BTreeSet};

use treeboot_coordinator::tree::{Settings, TreeView};
use treeboot_types::{AttachState, HostName};

use super::check::Memory;
use super::edges::{number_of, reaches_origin};
use super::host::Host;
use super::racks::depth_allowed;

/// Hosts that may come to a host: its children, and two levels below them while their own parents fail.
fn within_reach(children: &BTreeMap<(usize, u16), Vec<usize>>, host: usize) -> BTreeSet<usize> {
    let mut all = BTreeSet::new();
    let stripes: BTreeSet<u16> = children.keys().map(|(_, stripe)| *stripe).collect();
    for stripe in stripes {
        let mut row = vec![host];
        for _ in 0..3 {
            let below = row.iter().filter_map(|host| children.get(&(*host, stripe)));
            row = below.flatten().copied().collect();
            all.extend(row.iter().copied());
        }
    }
    all
}

/// Hosts that have no stream on which they were welcomed and need one, or that wait on a dead one; and which of it is so.
pub fn unconnected(
    hosts: &[Host],
    is_dead: impl Fn(u64) -> bool,
) -> impl Iterator<Item = (usize, &'static str)> {
    hosts.iter().enumerate().filter_map(move |(number, host)| {
        let needs = host.up && (host.wanted || host.is_stored());
        match &host.line {
            Some(line) if is_dead(line.conn) => Some((number, "waits on a dead stream")),
            Some(line) if line.welcomed => None,
            _ => needs.then_some((number, "is not connected")),
        }
    })
}

/// Whether everything but the streams is as it should be once nothing goes wrong any more; otherwise what is not yet.
///
/// # Errors
/// What is not settled.
pub fn settled(hosts: &[Host], tree: &TreeView, memory: &Memory, settings: &Settings) -> Result<(), String> {
    let stripes = usize::from(tree.image.stripes);
    let mut parents: BTreeMap<(usize, u16), (Vec<String>, u32)> = BTreeMap::new();
    let mut in_tree: BTreeMap<usize, AttachState> = BTreeMap::new();
    for vertex in tree.vertices.iter().filter(|v| !v.origin) {
        let number = vertex
            .host
            .as_ref()
            .and_then(number_of)
            .ok_or("a vertex without a host")?;
        in_tree.insert(number, vertex.state);
        parents.insert(
            (number, vertex.stripe.0),
            (vertex.parents.clone(), vertex.children),
        );
    }
    let mut children: BTreeMap<(usize, u16), Vec<usize>> = BTreeMap::new();
    for ((child, stripe), (above, _)) in &parents {
        for parent in above.iter().filter_map(|name| HostName::new(name).ok()) {
            if let Some(parent) = number_of(&parent) {
                children.entry((parent, *stripe)).or_default().push(*child);
            }
        }
    }
    for (number, host) in hosts.iter().enumerate().filter(|(_, host)| !host.is_stored()) {
        let name = &host.info.name;
        let wanted = host.up && host.wanted;
        match (wanted, in_tree.get(&number)) {
            (true, None) => return Err(format!("{name} has no place")),
            (false, Some(_)) => return Err(format!("{name} has a place and should not")),
            // What it says of itself when it is heard again would give it a place.
            (false, None) if host.up && (host.place().is_some() || !host.is_quiet()) => {
                return Err(format!("{name} is not done with the place that it had"));
            }
            (false, None) => continue,
            (true, Some(AttachState::Pending)) => return Err(format!("{name} is pending")),
            (true, Some(AttachState::Ready)) => {}
        }
        let Some(place) = host.place().filter(|_| host.ready) else {
            return Err(format!("{name} does not know that it is ready"));
        };
        if !host.is_quiet() {
            return Err(format!("{name} is busy"));
        }
        if place.epoch != memory.in_force(name) {
            return Err(format!(
                "{name} acts on {}, but {} is in force",
                place.epoch,
                memory.in_force(name)
            ));
        }
        if memory.waits(name) {
            return Err(format!("{name} is not told of all its paths yet"));
        }
        for (index, stripe) in (0u16..).zip(&place.stripes) {
            let Some((theirs, _)) = parents.get(&(number, index)) else {
                return Err(format!(
                    "{name} stands in stripe {index}, but the tree does not know"
                ));
            };
            let mut mine: Vec<String> = stripe
                .active
                .iter()
                .map(|p| {
                    p.path
                        .host
                        .as_ref()
                        .map_or_else(|| p.path.endpoint.portal.to_string(), ToString::to_string)
                })
                .collect();
            let mut theirs = theirs.clone();
            mine.sort();
            theirs.sort();
            if mine != theirs {
                return Err(format!("{name} was told {mine:?}, the tree says {theirs:?}"));
            }
        }
        if host.sources() != Some(&place.sources()) {
            return Err(format!("{name} reads through other paths than it was told"));
        }
        let below = within_reach(&children, number);
        let given: BTreeSet<usize> = place.children.iter().filter_map(number_of).collect();
        if below != given {
            return Err(format!(
                "{name} was given the children {given:?}, the tree has {below:?}"
            ));
        }
        let let_in = hosts
            .iter()
            .filter(|child| host.lets_in(&child.info.name))
            .count();
        if let_in != given.len() {
            return Err(format!(
                "{name} lets in {let_in} hosts, but was given {}",
                given.len()
            ));
        }
        if !reaches_origin(hosts, number, stripes, false, &|_, _| true) {
            return Err(format!("{name} reaches no origin through its parents"));
        }
    }
    let adopted = memory.adopted > 0;
    for stripe in 0..tree.image.stripes {
        let of_stripe = || tree.vertices.iter().filter(|v| !v.origin && v.stripe.0 == stripe);
        let count = of_stripe().count();
        let deepest = of_stripe().map(|v| v.depth).max().unwrap_or(0);
        // A host that comes back keeps its place where that fits, even a deep one; the next departure puts it right.
        let slack = |best: u32| if adopted { best.max(3) } else { 1 };
        let most = depth_allowed(settings, tree, stripe, &memory.stands, slack);
        if deepest > most {
            return Err(format!(
                "stripe {stripe} of {count} hosts is {deepest} deep, it may be {most}"
            ));
        }
    }
    Ok(())
}
