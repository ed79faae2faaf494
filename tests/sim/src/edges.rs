//! Who reads from whom at this moment, as the hosts hold it, stale ones too: no cycle, and a way to an origin.

use treeboot_types::HostName;

use super::check::{Violation, violation};
use super::host::Host;

/// The actual edges of one stripe: a child that reads from a host that lets it in.
fn parents_of(hosts: &[Host], host: usize, stripe: usize, fallbacks: bool) -> impl Iterator<Item = usize> {
    let me = &hosts[host];
    let paths = me.sources().and_then(|sources| {
        let whole = sources.stripes.len() == 1;
        sources.stripes.get(if whole { 0 } else { stripe })
    });
    paths
        .into_iter()
        .flat_map(move |paths| {
            let others = if fallbacks { &paths.fallbacks[..] } else { &[] };
            paths.active.iter().chain(others)
        })
        .filter_map(|path| number_of(path.host.as_ref()?))
        .filter(move |&parent| hosts.get(parent).is_some_and(|p| p.lets_in(&me.info.name)))
}

/// The number in a host's name.
#[must_use]
pub fn number_of(host: &HostName) -> Option<usize> {
    host.as_str().strip_prefix('h')?.parse().ok()
}

/// Looks whether a host reads from itself, however far around. With `fallbacks` also over paths that are used only while parents fail.
///
/// # Errors
/// The circle.
pub fn check_cycle(
    now: u64,
    hosts: &[Host],
    from: usize,
    stripes: usize,
    fallbacks: bool,
    scratch: &mut Vec<u32>,
) -> Result<(), Violation> {
    for stripe in 0..stripes {
        scratch.clear();
        scratch.resize(hosts.len(), u32::MAX);
        let mut waiting: Vec<usize> = vec![from];
        while let Some(host) = waiting.pop() {
            for parent in parents_of(hosts, host, stripe, fallbacks) {
                if scratch[parent] == u32::MAX {
                    scratch[parent] = host as u32;
                    waiting.push(parent);
                }
                if parent == from {
                    let mut circle = vec![format!("h{from}")];
                    let mut at = host;
                    while at != from {
                        circle.push(format!("h{at}"));
                        at = scratch[at] as usize;
                    }
                    circle.reverse();
                    let why = format!(
                        "in stripe {stripe}, each reading from the next: {}",
                        circle.join(", ")
                    );
                    let law = if fallbacks {
                        "no cycle, fallbacks too"
                    } else {
                        "no cycle"
                    };
                    return violation(law, now, why);
                }
            }
        }
    }
    Ok(())
}

/// Whether what a host reads comes from an origin in the end. `linked` says whether two hosts reach each other.
pub fn reaches_origin(
    hosts: &[Host],
    from: usize,
    stripes: usize,
    fallbacks: bool,
    linked: &impl Fn(usize, usize) -> bool,
) -> bool {
    (0..stripes).all(|stripe| {
        let mut seen = vec![false; hosts.len()];
        let mut waiting = vec![from];
        seen[from] = true;
        while let Some(host) = waiting.pop() {
            let Some(sources) = hosts[host].sources() else {
                if hosts[host].up && hosts[host].is_stored() {
                    return true;
                }
                continue;
            };
            let whole = sources.stripes.len() == 1;
            let Some(paths) = sources.stripes.get(if whole { 0 } else { stripe }) else {
                continue;
            };
            let others = if fallbacks { &paths.fallbacks[..] } else { &[] };
            // A foreign origin is always there.
            if paths.active.iter().chain(others).any(|path| path.host.is_none()) {
                return true;
            }
            for parent in parents_of(hosts, host, stripe, fallbacks) {
                if !seen[parent] && linked(host, parent) {
                    seen[parent] = true;
                    waiting.push(parent);
                }
            }
        }
        false
    })
}
