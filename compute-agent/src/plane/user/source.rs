//! Where a base's missing chunks come from: for each stripe, a group of paths.
//!
//! An address belongs to the stripe whose turn its stripe unit is; the hash tree is asked for in the same way, since
//! every parent has all of it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use tokio::time::{Duration, Instant};
use treeboot_block::{ChunkSource, FetchError, FetchFuture, Fetched, Region, SourceId};
use treeboot_iscsi::initiator::{
    Lun, PathGroup, PathGroupOptions, PathId, PathPolicy, PathSpec, PathState, ReadError,
};
use treeboot_types::{Digest, HostName, Iqn};

use crate::keys::Keys;
use crate::plane::{Fault, ParentFault, PathStats};
use crate::stack::{PathTo, Sources, StripePaths};

/// Bits of a [`SourceId`] that hold the path; the stripe stands above them. A group counts its paths from 0 and
/// never has 2^48.
const PATH_BITS: u32 = 48;
/// How long a parent must be down before it is complained of: one that restarts, or that is only about to export, is
/// none of the coordinator's business.
const UNREACHABLE_AFTER: Duration = Duration::from_secs(3);

/// One stripe's paths.
struct Stripe {
    group: Arc<PathGroup>,
    policy: treeboot_types::PathPolicy,
    /// Whose portal it is.
    hosts: HashMap<String, HostName>,
}

/// The paths of a base, by stripe.
pub(super) struct StripedSource {
    digest: Digest,
    initiator: Iqn,
    keys: Arc<Keys>,
    /// One change of paths at a time: what is read of the old ones must be of the last.
    change: Mutex<()>,
    stripes: RwLock<Arc<Stripes>>,
    /// Bytes of groups that are gone.
    past: Mutex<Totals>,
    wrong: Mutex<BTreeMap<(u32, String), u64>>,
    down: Mutex<HashMap<(u32, u64), Down>>,
}

struct Stripes {
    unit_bytes: u64,
    stripes: Vec<Stripe>,
    sources: Sources,
}

#[derive(Default, Clone, Copy)]
struct Totals {
    active: u64,
    fallback: u64,
}

/// A path that is down.
struct Down {
    since: Instant,
    told: bool,
}

impl StripedSource {
    pub(super) fn new(digest: Digest, initiator: Iqn, keys: Arc<Keys>) -> Self {
        Self {
            digest,
            initiator,
            keys,
            change: Mutex::default(),
            stripes: RwLock::new(Arc::new(Stripes {
                unit_bytes: 1,
                stripes: Vec::new(),
                sources: Sources::default(),
            })),
            past: Mutex::default(),
            wrong: Mutex::default(),
            down: Mutex::default(),
        }
    }

    /// What it was given last.
    pub(super) fn sources(&self) -> Sources {
        self.stripes.read().sources.clone()
    }

    /// Takes new paths; those that stay keep their sessions. Waits for none.
    pub(super) fn set(&self, sources: &Sources) {
        let _one = self.change.lock();
        let old = Arc::clone(&self.stripes.read());
        let same_shape = old.stripes.len() == sources.stripes.len()
            && old
                .stripes
                .iter()
                .zip(&sources.stripes)
                .all(|(a, b)| a.policy == b.policy);
        let stripe = |(index, paths): (usize, &StripePaths)| {
            let group = match old.stripes.get(index) {
                Some(stripe) if same_shape => Arc::clone(&stripe.group),
                _ => PathGroup::new(PathGroupOptions {
                    policy: policy(paths.policy),
                    ..PathGroupOptions::new(self.initiator.clone())
                }),
            };
            let spec = |path: &PathTo| spec(path, &self.initiator, &self.keys);
            let specs = |paths: &[PathTo]| paths.iter().map(spec).collect();
            group.set_paths(specs(&paths.active), specs(&paths.fallbacks));
            Stripe {
                group,
                policy: paths.policy,
                hosts: hosts(paths),
            }
        };
        let stripes = sources.stripes.iter().enumerate().map(stripe).collect();
        if !same_shape {
            let mut past = self.past.lock();
            for stripe in &old.stripes {
                let totals = stripe.group.totals();
                past.active += totals.active_bytes;
                past.fallback += totals.fallback_bytes;
            }
        }
        *self.stripes.write() = Arc::new(Stripes {
            unit_bytes: sources.unit_bytes.max(1),
            stripes,
            sources: sources.clone(),
        });
    }

    /// Payload from active paths and from fallbacks.
    pub(super) fn totals(&self) -> (u64, u64) {
        let stripes = Arc::clone(&self.stripes.read());
        let mut totals = *self.past.lock();
        for stripe in &stripes.stripes {
            let group = stripe.group.totals();
            totals.active += group.active_bytes;
            totals.fallback += group.fallback_bytes;
        }
        (totals.active, totals.fallback)
    }

    pub(super) fn paths(&self) -> Vec<PathStats> {
        let stripes = Arc::clone(&self.stripes.read());
        let mut paths = Vec::new();
        for (index, stripe) in (0u32..).zip(&stripes.stripes) {
            paths.extend(stripe.group.stats().into_iter().map(|path| PathStats {
                stripe: index,
                host: stripe.hosts.get(&path.portal).cloned(),
                bytes: path.bytes(),
                portal: path.portal,
                active: path.active,
                state: state(path.state),
                in_flight: path.in_flight,
                failures: path.failures,
                service_time_us: path.service_time_us,
            }));
        }
        paths
    }

    /// Complaints since the last call.
    pub(super) fn take_faults(&self, now: Instant) -> Vec<ParentFault> {
        let stripes = Arc::clone(&self.stripes.read());
        let host = |stripe: u32, portal: &str| {
            let stripe = stripes.stripes.get(stripe as usize)?;
            stripe.hosts.get(portal).cloned()
        };
        let mut faults: Vec<_> = std::mem::take(&mut *self.wrong.lock())
            .into_iter()
            .map(|((stripe, portal), count)| ParentFault {
                digest: self.digest,
                stripe,
                host: host(stripe, &portal),
                portal,
                fault: Fault::WrongBytes,
                count,
            })
            .collect();
        let mut down = self.down.lock();
        let mut still = HashMap::new();
        for (index, stripe) in (0u32..).zip(&stripes.stripes) {
            for path in stripe.group.stats() {
                if !path.active || path.state != PathState::Down {
                    continue;
                }
                let key = (index, path.id.0);
                let mut entry = down.remove(&key).unwrap_or(Down {
                    since: now,
                    told: false,
                });
                if !entry.told && now.duration_since(entry.since) >= UNREACHABLE_AFTER {
                    entry.told = true;
                    faults.push(ParentFault {
                        digest: self.digest,
                        stripe: index,
                        host: host(index, &path.portal),
                        portal: path.portal,
                        fault: Fault::Unreachable,
                        count: path.failures,
                    });
                }
                still.insert(key, entry);
            }
        }
        *down = still;
        faults
    }

    fn at(&self, offset: u64) -> Option<(u64, Arc<PathGroup>)> {
        let stripes = self.stripes.read();
        let count = stripes.stripes.len() as u64;
        let index = (offset / stripes.unit_bytes).checked_rem(count)?;
        let stripe = stripes.stripes.get(index as usize)?;
        Some((index, Arc::clone(&stripe.group)))
    }
}

fn source_id(stripe: u64, path: PathId) -> SourceId {
    SourceId(stripe << PATH_BITS | path.0)
}

fn path_of(stripe: u64, source: SourceId) -> Option<PathId> {
    (source.0 >> PATH_BITS == stripe).then_some(PathId(source.0 & ((1 << PATH_BITS) - 1)))
}

impl ChunkSource for StripedSource {
    fn fetch<'a>(
        &'a self,
        region: Region,
        offset: u64,
        bytes: u32,
        avoid: &'a [SourceId],
    ) -> FetchFuture<'a> {
        Box::pin(async move {
            let Some((stripe, group)) = self.at(offset) else {
                return Err(FetchError::NoSource {
                    what: "no parent was given; the coordinator may still be away".into(),
                });
            };
            let lun = match region {
                Region::Data => Lun::Data,
                Region::Hash => Lun::Hash,
            };
            let avoid: Vec<_> = avoid
                .iter()
                .filter_map(|&source| path_of(stripe, source))
                .collect();
            let read = match group.read(lun, offset, bytes, &avoid).await {
                // Nobody else has it: one that shipped wrong bytes once is better than nobody, since all is checked.
                Err(_) if !avoid.is_empty() => group.read(lun, offset, bytes, &[]).await,
                read => read,
            };
            match read {
                Ok((bytes, path)) => Ok(Fetched {
                    bytes,
                    source: source_id(stripe, path),
                }),
                Err(error) => Err(unavailable(&error)),
            }
        })
    }

    fn report_wrong(&self, source: SourceId, region: Region, offset: u64) {
        let stripes = Arc::clone(&self.stripes.read());
        let index = source.0 >> PATH_BITS;
        let Some(stripe) = stripes.stripes.get(index as usize) else {
            return;
        };
        let path = PathId(source.0 & ((1 << PATH_BITS) - 1));
        let stats = stripe.group.stats();
        let portal = stats
            .iter()
            .find(|stats| stats.id == path)
            .map(|stats| stats.portal.clone());
        stripe.group.distrust(path);
        // A path that is listed no more was taken out by the coordinator meanwhile.
        if let Some(portal) = portal {
            tracing::warn!(
                content = %self.digest.short(), %portal, host = ?stripe.hosts.get(&portal), ?region, offset,
                "a parent shipped wrong bytes; they are fetched elsewhere"
            );
            *self.wrong.lock().entry((index as u32, portal)).or_default() += 1;
        }
    }
}

fn unavailable(error: &ReadError) -> FetchError {
    FetchError::Unavailable {
        what: error.to_string(),
    }
}

pub(in crate::plane) fn spec(path: &PathTo, initiator: &Iqn, keys: &Keys) -> PathSpec {
    let portal = path.endpoint.portal.to_string();
    PathSpec {
        label: path
            .host
            .as_ref()
            .map_or_else(|| portal.clone(), ToString::to_string),
        portal,
        target: path.endpoint.target.clone(),
        data_lun: path.endpoint.data_lun,
        hash_lun: path.endpoint.hash_lun,
        chap: keys.parent(initiator, path.host.as_ref(), &path.endpoint.target),
    }
}

fn hosts(paths: &StripePaths) -> HashMap<String, HostName> {
    let all = paths.active.iter().chain(&paths.fallbacks);
    all.filter_map(|path| Some((path.endpoint.portal.to_string(), path.host.clone()?)))
        .collect()
}

fn policy(policy: treeboot_types::PathPolicy) -> PathPolicy {
    match policy {
        treeboot_types::PathPolicy::RoundRobin => PathPolicy::RoundRobin,
        treeboot_types::PathPolicy::ServiceTime => PathPolicy::ServiceTime,
        treeboot_types::PathPolicy::QueueLength => PathPolicy::QueueLength,
    }
}

fn state(state: PathState) -> &'static str {
    match state {
        PathState::Standby => "standby",
        PathState::Connecting => "connecting",
        PathState::Up => "up",
        PathState::Suspect => "suspect",
        PathState::Down => "down",
        PathState::Distrusted => "distrusted",
    }
}
