//! The paths of a content: sessions with its parents under dm-multipath, kept by one task.
//!
//! The task brings what is there to what is set, again and again: it logs in (each parent by itself, so that none waits for another),
//! loads a multipath table where the devices differ from those that were loaded, takes failed paths back once their session is up,
//! goes back to the parents once one of them is up, and ends the queueing of reads that no path can serve. It never fails because of
//! one parent. Deliberately absent: the devices above multipath, but for the one that verity reads from.

mod choose;
mod reads;
mod seen;
mod status;

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use treeboot_dm::status::MultipathStatus;
use treeboot_dm::{DeviceNumber, Sectors};
use treeboot_types::{Digest, HostName, Portal};

use super::base;
use super::links::{self, Link};
use super::record::{BaseRecord, SessionKey};
use super::sys::{Sys, block_bytes, mapper_error, record_error, within};
use super::tables::StripeDevices;
use crate::host::chain;
use crate::plane::PlaneError;
use crate::stack::{Backing, PathTo, Sources};
use choose::{NOTHING, PATIENCE, all, choose, same_parents};
use reads::Reads;
use status::{multipath, multipath_status};

/// Between two looks at sessions and paths. A failed path is passed over by the kernel at once; this is how soon it is taken back.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long setting paths waits for the first logins, so that whoever comes next usually finds them up.
const SETTLE_LIMIT: Duration = Duration::from_secs(3);
/// First and longest pause before a login that failed is tried again.
const RETRY: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(10));
/// How long a parent must be down before it is complained of: one that restarts, or that is only about to export, is none of the
/// coordinator's business.
const UNREACHABLE_AFTER: Duration = Duration::from_secs(3);
/// How long parents must have been up before reads go back to them from a fallback, so that one that flaps is left alone.
const BACK_AFTER: Duration = Duration::from_secs(2);

/// How a login that is not there yet goes.
enum Attempt {
    Running,
    Failed {
        again: Instant,
        pause: Duration,
        why: String,
    },
}

/// What the kernel does with reads while no path is up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waiting {
    Queue,
    Fail,
}

struct Stripe {
    /// What was loaded last.
    devices: StripeDevices,
    /// Since when no path is up.
    none_up: Option<Instant>,
    /// Since when a parent is up.
    parent_up: Option<Instant>,
    waiting: Waiting,
}

impl Default for Stripe {
    fn default() -> Self {
        Self {
            devices: StripeDevices::default(),
            none_up: None,
            parent_up: None,
            waiting: Waiting::Queue,
        }
    }
}

/// A path as it was seen last.
#[derive(Debug, Clone)]
struct PathView {
    stripe: u32,
    host: Option<HostName>,
    portal: Portal,
    active: bool,
    device: Option<DeviceNumber>,
    state: &'static str,
    failures: u64,
}

#[derive(Default)]
struct State {
    sources: Sources,
    /// Until when fallbacks that were not in use are left out, where no parent is up.
    patient_until: Option<Instant>,
    /// Set while devices stand on the paths.
    base: Option<BaseRecord>,
    /// What was built for `base` and for which shape of sources.
    built: bool,
    stripes: Vec<Stripe>,
    attempts: HashMap<SessionKey, Attempt>,
    /// Addresses of portals that are written as names.
    names: HashMap<Portal, SocketAddr>,
    paths: Vec<PathView>,
    down: HashMap<(u32, Portal), (Instant, bool)>,
    read: Reads,
}

impl State {
    /// The session that a path needs; `None` where its portal's name is not looked up yet.
    fn key(&self, path: &PathTo) -> Option<SessionKey> {
        let portal = &path.endpoint.portal;
        let known = || self.names.get(portal).copied();
        Some(SessionKey {
            target: path.endpoint.target.clone(),
            portal: links::literal(portal).or_else(known)?,
        })
    }
}

/// The paths of one content.
pub(super) struct Feed {
    digest: Digest,
    sys: Arc<Sys>,
    state: Mutex<State>,
    /// One pass at a time; also held while the devices above are built or removed.
    pub(super) pass: tokio::sync::Mutex<()>,
    wake: Notify,
    passed: Notify,
    task: Mutex<Option<AbortHandle>>,
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Feed {
    /// Starts keeping a content's paths. `base`: what stands on them already, found after a restart.
    pub(super) fn start(
        sys: &Arc<Sys>,
        digest: Digest,
        sources: Sources,
        base: Option<BaseRecord>,
    ) -> Arc<Self> {
        let feed = Arc::new(Self {
            digest,
            sys: Arc::clone(sys),
            state: Mutex::new(State {
                // What was found after a restart has readers already.
                patient_until: base.is_none().then(|| Instant::now() + PATIENCE),
                sources,
                built: base.is_some(),
                base,
                ..State::default()
            }),
            pass: tokio::sync::Mutex::default(),
            wake: Notify::new(),
            passed: Notify::new(),
            task: Mutex::default(),
        });
        let keeper = tokio::spawn(keep(Arc::downgrade(&feed)));
        *feed.task.lock() = Some(keeper.abort_handle());
        feed.wake.notify_one();
        feed
    }

    /// Ends the task; the kernel's part stays.
    pub(super) fn stop(&self) {
        if let Some(task) = self.task.lock().take() {
            task.abort();
        }
    }

    /// Waits for logins under way, so that none makes a session behind the end of the others. Call it when the task was stopped.
    pub(super) async fn logins_ended(&self) {
        let running = || {
            let state = self.state.lock();
            state.attempts.values().any(|a| matches!(a, Attempt::Running))
        };
        while running() {
            let _ = tokio::time::timeout(LOOK_EVERY, self.wake.notified()).await;
        }
    }

    /// What was set last.
    pub(super) fn sources(&self) -> Sources {
        self.state.lock().sources.clone()
    }

    /// Takes new paths and waits a bounded moment for the first logins. Those that stay keep their sessions.
    pub(super) async fn set(&self, sources: &Sources) {
        {
            let mut state = self.state.lock();
            if state.sources == *sources {
                return;
            }
            if !same_parents(&state.sources, sources) {
                state.patient_until = Some(Instant::now() + PATIENCE);
            }
            state.sources = sources.clone();
            // A parent that is named anew is tried at once.
            state
                .attempts
                .retain(|_, attempt| matches!(attempt, Attempt::Running));
        }
        self.wake.notify_one();
        let _ = tokio::time::timeout(SETTLE_LIMIT, self.settled()).await;
    }

    /// Ends when each active path is up or was tried.
    async fn settled(&self) {
        loop {
            let passed = self.passed.notified();
            {
                let state = self.state.lock();
                let current = state.paths.len() == all(&state.sources).count();
                let tried = |path: &PathView| path.state != "connecting";
                if current && state.paths.iter().filter(|path| path.active).all(tried) {
                    return;
                }
            }
            passed.await;
        }
    }

    /// Builds what verity reads from and keeps it from now on. Call it with [`Self::pass`] held.
    pub(super) async fn build(self: &Arc<Self>, base: BaseRecord) -> Result<DeviceNumber, PlaneError> {
        let links = self.links().await?;
        let sources = self.sources();
        let devices = self.devices(&sources, base.content.bytes, &links);
        let (sys, digest) = (Arc::clone(&self.sys), self.digest);
        let (given, chosen) = (sources.clone(), devices.clone());
        let data = within("building the paths", move || {
            base::feed(&sys, digest, base.content.bytes, &given, &chosen)
        })
        .await?;
        let mut state = self.state.lock();
        state.base = Some(base);
        state.stripes = devices
            .into_iter()
            .map(|devices| Stripe {
                devices,
                ..Stripe::default()
            })
            .collect();
        Ok(data)
    }

    /// From now on the task may change what stands: verity is over it.
    pub(super) fn built(&self) {
        self.state.lock().built = true;
        self.wake.notify_one();
    }

    /// Nothing stands on the paths any more. Call it with [`Self::pass`] held.
    pub(super) fn unbuilt(&self) {
        let mut state = self.state.lock();
        state.base = None;
        state.built = false;
        state.stripes.clear();
    }

    /// Reads that no parent answers fail from now on, instead of waiting: nobody is to read any more.
    pub(super) async fn let_waiting_reads_fail(&self) -> Result<(), PlaneError> {
        let stripes = self.state.lock().stripes.len();
        let (sys, digest) = (Arc::clone(&self.sys), self.digest);
        within("telling the paths", move || {
            for index in 0..stripes {
                sys.mapper
                    .message(&multipath(digest, index), Sectors(0), "fail_if_no_path")
                    .map_err(mapper_error)?;
            }
            Ok(())
        })
        .await
    }

    async fn links(&self) -> Result<HashMap<SessionKey, Link>, PlaneError> {
        let sys = Arc::clone(&self.sys);
        within("looking at the sessions", move || links::look(&sys)).await
    }

    /// The devices of each stripe: those of sessions that are up, and of others that were used before and may come back.
    fn devices(
        &self,
        sources: &Sources,
        bytes: u64,
        links: &HashMap<SessionKey, Link>,
    ) -> Vec<StripeDevices> {
        let state = self.state.lock();
        let patient = state.patient_until.is_some_and(|until| Instant::now() < until);
        (0..)
            .zip(&sources.stripes)
            .map(|(index, paths): (usize, _)| {
                let loaded = state
                    .stripes
                    .get(index)
                    .map_or(&NOTHING, |stripe| &stripe.devices);
                let device = |path: &PathTo| {
                    let link = links.get(&state.key(path)?)?;
                    let device = *link.devices.get(&path.endpoint.data_lun)?;
                    // A session that is not up blocks whoever opens its disk; one that is loaded is open.
                    let usable = loaded.holds(device)
                        || link.up && block_bytes(device).is_some_and(|size| size >= bytes);
                    usable.then_some(device)
                };
                choose(paths, loaded, patient, device)
            })
            .collect()
    }

    /// One pass.
    async fn pass(self: &Arc<Self>) -> Result<(), PlaneError> {
        let _one = self.pass.lock().await;
        self.look_up_names().await?;
        let links = self.links().await?;
        let (sources, base) = {
            let state = self.state.lock();
            (state.sources.clone(), state.base.filter(|_| state.built))
        };
        self.log_in(&sources, &links);
        let mut status = Vec::new();
        if let Some(base) = base
            && base.backing != Backing::Store
            && !sources.stripes.is_empty()
        {
            self.load(base, &sources, &links).await?;
            status = self.mend(sources.stripes.len(), &links).await?;
        }
        self.see(&sources, &links, &status);
        self.log_out(&sources).await
    }

    /// Looks up the names of portals that are not addresses.
    async fn look_up_names(&self) -> Result<(), PlaneError> {
        let unknown: Vec<Portal> = {
            let state = self.state.lock();
            let portals = all(&state.sources).filter(|(_, _, path)| state.key(path).is_none());
            portals.map(|(_, _, path)| path.endpoint.portal.clone()).collect()
        };
        if unknown.is_empty() {
            return Ok(());
        }
        let found = within("looking up the parents' names", move || {
            let found = unknown
                .into_iter()
                .filter_map(|portal| Some((links::resolve(&portal)?, portal)));
            Ok(found.collect::<Vec<_>>())
        })
        .await?;
        let mut state = self.state.lock();
        state
            .names
            .extend(found.into_iter().map(|(address, portal)| (portal, address)));
        Ok(())
    }

    /// Begins the logins that are due.
    fn log_in(self: &Arc<Self>, sources: &Sources, links: &HashMap<SessionKey, Link>) {
        let now = Instant::now();
        for (_, _, path) in all(sources) {
            let Some(key) = self.state.lock().key(path) else {
                continue;
            };
            let lun = path.endpoint.data_lun;
            if links
                .get(&key)
                .is_some_and(|link| link.devices.contains_key(&lun))
            {
                self.state.lock().attempts.remove(&key);
                continue;
            }
            let pause = {
                let mut state = self.state.lock();
                let pause = match state.attempts.get(&key) {
                    Some(Attempt::Running) => continue,
                    Some(Attempt::Failed { again, .. }) if *again > now => continue,
                    // Those that others wait for are tried often: each is about to export.
                    Some(Attempt::Failed { .. }) if state.patient_until.is_some_and(|until| now < until) => {
                        RETRY.0
                    }
                    Some(Attempt::Failed { pause, .. }) => (*pause * 2).min(RETRY.1),
                    None => RETRY.0,
                };
                state.attempts.insert(key.clone(), Attempt::Running);
                pause
            };
            let feed = Arc::downgrade(self);
            let (sys, digest) = (Arc::clone(&self.sys), self.digest);
            let parent = path.host.clone();
            tokio::spawn(async move {
                let (asked, of) = (key.clone(), digest);
                let done = within(format!("logging in to {}", key.portal), move || {
                    // Noted before it is done, so that no session of ours is ever unknown.
                    sys.records
                        .update(&of, |record| record.sessions.insert(asked.clone()))
                        .map_err(record_error)?;
                    links::log_in(&sys, &asked, parent.as_ref(), lun)
                })
                .await;
                let Some(feed) = feed.upgrade() else { return };
                if let Err(error) = done {
                    let why = chain(&error);
                    tracing::debug!(content = %digest.short(), portal = %key.portal, reason = %why, "a parent is not up");
                    feed.state.lock().attempts.insert(
                        key,
                        Attempt::Failed {
                            again: Instant::now() + pause,
                            pause,
                            why,
                        },
                    );
                } else {
                    feed.state.lock().attempts.remove(&key);
                }
                feed.wake.notify_one();
            });
        }
    }

    /// Loads the tables that differ from what was loaded last.
    async fn load(
        &self,
        base: BaseRecord,
        sources: &Sources,
        links: &HashMap<SessionKey, Link>,
    ) -> Result<(), PlaneError> {
        let devices = self.devices(sources, base.content.bytes, links);
        let same = {
            let state = self.state.lock();
            state.stripes.len() == devices.len()
                && state.stripes.iter().zip(&devices).all(|(a, b)| a.devices == *b)
        };
        if same {
            return Ok(());
        }
        let (sys, digest) = (Arc::clone(&self.sys), self.digest);
        let (given, chosen) = (sources.clone(), devices.clone());
        within("changing the paths", move || {
            let data = base::feed(&sys, digest, base.content.bytes, &given, &chosen)?;
            base::check(&sys, &base.content, base.backing, data)?;
            base::drop_surplus(&sys, digest, given.stripes.len())
        })
        .await?;
        let mut state = self.state.lock();
        state.stripes.truncate(devices.len());
        state.stripes.resize_with(devices.len(), Stripe::default);
        for (stripe, devices) in state.stripes.iter_mut().zip(devices) {
            stripe.devices = devices;
            stripe.waiting = Waiting::Queue;
        }
        Ok(())
    }

    /// Takes paths back, goes back to the parents, and ends or begins the queueing.
    async fn mend(
        &self,
        stripes: usize,
        links: &HashMap<SessionKey, Link>,
    ) -> Result<Vec<MultipathStatus>, PlaneError> {
        let up: HashSet<DeviceNumber> = links
            .values()
            .filter(|link| link.up)
            .flat_map(|link| link.devices.values().copied())
            .collect();
        let (sys, digest) = (Arc::clone(&self.sys), self.digest);
        let status = within("looking at the paths", move || {
            (0..stripes)
                .map(|index| multipath_status(&sys, digest, index))
                .collect::<Result<Vec<_>, _>>()
        })
        .await?;
        let now = Instant::now();
        let mut messages = Vec::new();
        {
            let mut state = self.state.lock();
            for (index, (stripe, status)) in state.stripes.iter_mut().zip(&status).enumerate() {
                let mut tell = |text: String| messages.push((index, text));
                let paths = || status.groups.iter().flat_map(|group| &group.paths);
                for path in paths() {
                    match (path.up, up.contains(&path.device)) {
                        (false, true) => tell(format!("reinstate_path {}", path.device)),
                        (true, false) => tell(format!("fail_path {}", path.device)),
                        _ => {}
                    }
                }
                let is_up = |device: &DeviceNumber| up.contains(device);
                if stripe.devices.active.iter().any(is_up) {
                    let since = *stripe.parent_up.get_or_insert(now);
                    let elsewhere = status.group > 1 && now.duration_since(since) >= BACK_AFTER;
                    if elsewhere {
                        tell("switch_group 1".into());
                    }
                } else {
                    stripe.parent_up = None;
                }
                let any = paths().any(|path| up.contains(&path.device));
                if any {
                    stripe.none_up = None;
                    if stripe.waiting == Waiting::Fail {
                        stripe.waiting = Waiting::Queue;
                        tell("queue_if_no_path".into());
                    }
                } else {
                    let since = *stripe.none_up.get_or_insert(now);
                    let limit = self.sys.settings.queue_limit;
                    if stripe.waiting == Waiting::Queue && now.duration_since(since) >= limit {
                        stripe.waiting = Waiting::Fail;
                        tell("fail_if_no_path".into());
                        tracing::warn!(
                            content = %self.digest.short(), stripe = index, limit_s = limit.as_secs(),
                            "no parent answers; reads fail from now on instead of waiting"
                        );
                    }
                }
            }
        }
        if !messages.is_empty() {
            let (sys, digest) = (Arc::clone(&self.sys), self.digest);
            within("telling the paths", move || {
                for (index, text) in messages {
                    let device = multipath(digest, index);
                    tracing::debug!(%device, message = %text, "multipath");
                    sys.mapper
                        .message(&device, Sectors(0), &text)
                        .map_err(mapper_error)?;
                }
                Ok(())
            })
            .await?;
        }
        Ok(status)
    }

    /// Ends sessions that no path needs any more.
    async fn log_out(&self, sources: &Sources) -> Result<(), PlaneError> {
        let needed: HashSet<SessionKey> = {
            let state = self.state.lock();
            let keys = all(sources).map(|(_, _, path)| state.key(path));
            // A name that cannot be looked up at the moment may be that of any session.
            match keys.collect() {
                Some(needed) => needed,
                None => return Ok(()),
            }
        };
        let (sys, digest) = (Arc::clone(&self.sys), self.digest);
        let running: HashSet<SessionKey> = {
            let state = self.state.lock();
            let running = state.attempts.iter();
            running
                .filter(|(_, attempt)| matches!(attempt, Attempt::Running))
                .map(|(key, _)| key.clone())
                .collect()
        };
        within("ending sessions", move || {
            let record = sys.records.load(&digest).map_err(record_error)?;
            for key in record.sessions {
                if needed.contains(&key) || running.contains(&key) {
                    continue;
                }
                end(&sys, &digest, &key)?;
            }
            Ok(())
        })
        .await
    }
}

async fn keep(feed: Weak<Feed>) {
    loop {
        let Some(now) = feed.upgrade() else { return };
        let _ = tokio::time::timeout(LOOK_EVERY, now.wake.notified()).await;
        if let Err(error) = now.pass().await {
            tracing::warn!(content = %now.digest.short(), error = %chain(&error), "the paths are not as they should be; tried again");
        }
        now.passed.notify_waiters();
    }
}

/// Logs out and forgets the session.
pub(super) fn end(sys: &Sys, digest: &Digest, key: &SessionKey) -> Result<(), PlaneError> {
    links::log_out(sys, key)?;
    sys.records
        .update(digest, |record| record.sessions.remove(key))
        .map_err(record_error)
        .map(drop)
}
