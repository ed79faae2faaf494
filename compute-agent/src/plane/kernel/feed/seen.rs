//! What the task of a content's paths saw, for counters and complaints.

use std::collections::{BTreeMap, HashMap};

use tokio::time::Instant;
use treeboot_dm::status::MultipathStatus;
use treeboot_types::Portal;

use super::{Attempt, Feed, PathView, UNREACHABLE_AFTER, Waiting, all};
use crate::plane::kernel::links::Link;
use crate::plane::kernel::record::SessionKey;
use crate::plane::kernel::sys::block_counts;
use crate::plane::{Fault, ParentFault, PathStats};
use crate::stack::Sources;

impl Feed {
    /// Takes [`Self::let_waiting_reads_fail`] back, at the next pass that sees a path up.
    pub(in crate::plane::kernel) fn let_reads_wait_again(&self) {
        for stripe in &mut self.state.lock().stripes {
            stripe.waiting = Waiting::Fail;
        }
    }

    /// Whether a parent or a fallback is up for every stripe.
    pub(in crate::plane::kernel) fn is_up(&self) -> bool {
        let state = self.state.lock();
        let up = |stripe: usize| {
            let mut paths = state.paths.iter();
            paths.any(|path| path.stripe as usize == stripe && path.state == "up")
        };
        state.built && !state.stripes.is_empty() && (0..state.stripes.len()).all(up)
    }

    /// Notes what was seen, for counters and complaints.
    pub(super) fn see(
        &self,
        sources: &Sources,
        links: &HashMap<SessionKey, Link>,
        status: &[MultipathStatus],
    ) {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let mut paths = Vec::new();
        for (stripe, active, path) in all(sources) {
            let key = state.key(path);
            let link = key.as_ref().and_then(|key| links.get(key));
            let attempt = key.as_ref().and_then(|key| state.attempts.get(key));
            let device = link.and_then(|link| link.devices.get(&path.endpoint.data_lun).copied());
            let seen = device.and_then(|device| {
                let groups = status.get(stripe as usize)?.groups.iter();
                groups
                    .flat_map(|group| &group.paths)
                    .find(|path| path.device == device)
            });
            paths.push(PathView {
                stripe,
                host: path.host.clone(),
                active,
                device,
                state: match (link, device) {
                    (Some(link), Some(_)) if link.up => "up",
                    (Some(_), _) => "down",
                    (None, _) if key.is_none() || matches!(attempt, Some(Attempt::Failed { .. })) => "down",
                    (None, _) => "connecting",
                },
                failures: seen.map_or(0, |path| path.failures.into()),
                portal: path.endpoint.portal.clone(),
            });
        }
        state.read.see(paths.iter().filter_map(|path| {
            let device = path.device?;
            Some((device, path.active, block_counts(device)?.read_bytes))
        }));
        let now = Instant::now();
        let mut down = HashMap::new();
        for path in paths.iter().filter(|path| path.active && path.state != "up") {
            let at = (path.stripe, path.portal.clone());
            let since = state.down.remove(&at).unwrap_or((now, false));
            down.insert(at, since);
        }
        state.down = down;
        state.paths = paths;
    }

    /// Counters of the paths.
    pub(in crate::plane::kernel) fn path_stats(&self) -> Vec<PathStats> {
        let paths = self.state.lock().paths.clone();
        let stats = |path: PathView| {
            let counts = path.device.and_then(block_counts).unwrap_or_default();
            PathStats {
                stripe: path.stripe,
                host: path.host,
                portal: path.portal.to_string(),
                active: path.active,
                state: path.state,
                in_flight: u32::try_from(counts.in_flight).unwrap_or(u32::MAX),
                bytes: counts.read_bytes,
                failures: path.failures,
                service_time_us: (counts.read_ms * 1000).checked_div(counts.reads).unwrap_or(0),
            }
        };
        paths.into_iter().map(stats).collect()
    }

    /// Payload from parents and from fallbacks since the agent started keeping these paths.
    pub(in crate::plane::kernel) fn totals(&self) -> (u64, u64) {
        let state = self.state.lock();
        state
            .read
            .totals(|device| block_counts(device).map(|counts| counts.read_bytes))
    }

    /// Why a content that cannot be read cannot.
    pub(in crate::plane::kernel) fn why(&self) -> String {
        let state = self.state.lock();
        let mut reasons: BTreeMap<String, String> = BTreeMap::new();
        for (key, attempt) in &state.attempts {
            if let Attempt::Failed { why, .. } = attempt {
                reasons.insert(key.portal.to_string(), why.clone());
            }
        }
        let each = reasons
            .into_iter()
            .map(|(portal, why)| format!("{portal}: {why}"));
        each.collect::<Vec<_>>().join("; ")
    }

    /// Complaints since the last call.
    pub(in crate::plane::kernel) fn take_faults(&self, now: Instant) -> Vec<ParentFault> {
        let mut state = self.state.lock();
        let mut due = Vec::new();
        for ((stripe, portal), (since, told)) in &mut state.down {
            if !*told && now.duration_since(*since) >= UNREACHABLE_AFTER {
                *told = true;
                due.push((*stripe, portal.clone()));
            }
        }
        let fault = |(stripe, portal): (u32, Portal)| {
            let path = state
                .paths
                .iter()
                .find(|path| path.stripe == stripe && path.portal == portal);
            ParentFault {
                digest: self.digest,
                stripe,
                host: path.and_then(|path| path.host.clone()),
                portal: portal.to_string(),
                fault: Fault::Unreachable,
                count: path.map_or(1, |path| path.failures.max(1)),
            }
        };
        due.into_iter().map(fault).collect()
    }
}
