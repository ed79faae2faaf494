//! A group of paths to one image: the shell around [`Paths`], with sessions, timers and whoever waits.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Weak};

use bytes::Bytes;
use futures_util::future::{AbortHandle, Abortable, Aborted};
use futures_util::stream::{FuturesUnordered, StreamExt};
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;
use treeboot_types::{Iqn, Tick};

use super::connection::{Clock, Health};
use super::error::{CommandError, ConnectError, with_causes};
use super::paths::{
    Effect, Event, Failure, GroupTotals, Limits, LinkId, Lun, Outcome, PathId, PathPolicy, PathSpec,
    PathStats, Paths, ReadId,
};
use super::session::{Digests, Session, SessionOptions, SessionTimeouts};
use crate::scsi::alua::Reported;

/// How a group behaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathGroupOptions {
    /// Our name at every parent.
    pub initiator: Iqn,
    /// How reads are spread over the active paths.
    pub policy: PathPolicy,
    /// Bounds of a read's waiting.
    pub limits: Limits,
    /// Digests of each session.
    pub digests: Digests,
    /// Bounds of each session.
    pub timeouts: SessionTimeouts,
}

impl PathGroupOptions {
    /// The usual bounds, round-robin.
    pub fn new(initiator: Iqn) -> Self {
        Self {
            initiator,
            policy: PathPolicy::default(),
            limits: Limits::default(),
            digests: Digests::default(),
            timeouts: SessionTimeouts::default(),
        }
    }
}

/// Why a read failed: no path could serve it in time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no path gave {bytes} bytes at {offset} within {} ms: {}", failure.waited_ms, each(failure))]
pub struct ReadError {
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u32,
    /// What each path had to say.
    pub failure: Failure,
}

fn each(failure: &Failure) -> String {
    if failure.paths.is_empty() {
        return "no path is listed; the coordinator has given no parent".to_owned();
    }
    let each = failure
        .paths
        .iter()
        .map(|p| format!("{} ({}): {}", p.label, p.portal, p.why));
    each.collect::<Vec<_>>().join("; ")
}

/// How often a target is asked for the state of access to its unit while that is not one for reads. A change back comes
/// with no message of its own.
const ACCESS_AGAIN: std::time::Duration = std::time::Duration::from_millis(500);

/// What a waiting read is told.
enum Order {
    Ask {
        path: PathId,
        link: LinkId,
        lun: u16,
        session: Arc<Session>,
    },
    Drop {
        path: PathId,
        link: LinkId,
    },
    Fail(Failure),
}

struct Connected {
    /// The task that connects and then watches.
    task: tokio::task::AbortHandle,
    session: Option<Arc<Session>>,
}

struct State {
    paths: Paths,
    links: BTreeMap<LinkId, Connected>,
    readers: BTreeMap<ReadId, mpsc::UnboundedSender<Order>>,
    next_read: u64,
    effects: Vec<Effect>,
    /// When the timer task will look.
    armed: Tick,
}

/// Paths to one image, active ones and fallbacks. Reads go where the policy says and move when a path fails.
///
/// Dropping it ends its tasks and logs out of every session.
pub struct PathGroup {
    state: Mutex<State>,
    options: PathGroupOptions,
    clock: Clock,
    timer: Arc<Notify>,
    runtime: Handle,
    me: Weak<PathGroup>,
}

impl std::fmt::Debug for PathGroup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PathGroup")
            .field("initiator", &self.options.initiator)
            .finish_non_exhaustive()
    }
}

impl PathGroup {
    /// A group without paths. Call it within a tokio runtime, on which its tasks then run.
    pub fn new(options: PathGroupOptions) -> Arc<Self> {
        let runtime = Handle::current();
        let clock = Clock::start();
        let timer = Arc::new(Notify::new());
        let state = State {
            paths: Paths::new(options.policy, options.limits, rand::random()),
            links: BTreeMap::new(),
            readers: BTreeMap::new(),
            next_read: 0,
            effects: Vec::new(),
            armed: Tick(u64::MAX),
        };
        let group = Arc::new_cyclic(|me| Self {
            state: Mutex::new(state),
            options,
            clock,
            timer: timer.clone(),
            runtime,
            me: me.clone(),
        });
        group
            .runtime
            .spawn(run_timer(Arc::downgrade(&group), timer, clock));
        group
    }

    /// Takes a new placement. A path that stays (same portal, target and LUNs) keeps its session and figures,
    /// whatever its role; reads on a path that goes move at once.
    pub fn set_paths(&self, active: Vec<PathSpec>, fallbacks: Vec<PathSpec>) {
        self.step(Event::Listed { active, fallbacks });
    }

    /// Reads `bytes` from `offset` on; none of the paths in `avoid` is asked.
    ///
    /// # Errors
    /// [`ReadError`] once the bounds of [`Limits`] are over, or when every path refused for good.
    pub async fn read(
        &self,
        lun: Lun,
        offset: u64,
        bytes: u32,
        avoid: &[PathId],
    ) -> Result<(Bytes, PathId), ReadError> {
        let (orders_tx, mut orders) = mpsc::unbounded_channel();
        let read = {
            let mut state = self.state.lock();
            state.next_read += 1;
            let read = ReadId(state.next_read);
            state.readers.insert(read, orders_tx);
            read
        };
        // From here on a dropped future cancels the read.
        let cancel = Cancel { group: self, read };
        let avoid = avoid.to_vec();
        self.step(Event::Read { read, lun, avoid });
        let mut attempts = Attempts::default();
        loop {
            tokio::select! {
                biased;
                order = orders.recv() => match order {
                    Some(Order::Ask { path, link, lun, session }) => {
                        attempts.start(path, link, ask(session, lun, offset, bytes));
                    }
                    Some(Order::Drop { path, link }) => attempts.abort(path, link),
                    Some(Order::Fail(failure)) => return Err(ReadError { offset, bytes, failure }),
                    // The sender lives as long as the read is listed, and `cancel` is what ends that.
                    None => return Err(ReadError { offset, bytes, failure: Failure::default() }),
                },
                ended = attempts.next() => {
                    let Ended { path, link, took_us, result } = ended;
                    let outcome = match &result {
                        Ok(data) => Outcome::Bytes { bytes: data.len() as u64, service_us: took_us },
                        Err(CommandError::Lost(end)) => Outcome::SessionLost { why: with_causes(end) },
                        Err(error) => Outcome::Failed { why: with_causes(error), lasting: error.is_lasting() },
                    };
                    self.step(Event::Answered { read, path, link, outcome });
                    if let Ok(data) = result {
                        drop(cancel);
                        return Ok((data, path));
                    }
                }
            }
        }
    }

    /// Takes a path out: it shipped wrong bytes. It comes back no earlier than [`DISTRUST_MS`](super::DISTRUST_MS)
    /// later, by a [`set_paths`](Self::set_paths) that names it.
    pub fn distrust(&self, path: PathId) {
        self.step(Event::Distrusted { path });
    }

    /// Each listed path's figures, active paths first.
    pub fn stats(&self) -> Vec<PathStats> {
        self.state.lock().paths.stats()
    }

    /// The group's figures since it was made.
    pub fn totals(&self) -> GroupTotals {
        self.state.lock().paths.totals()
    }

    /// One event through the core. The effects are only messages and spawned tasks, so they are carried out
    /// under the lock, in the core's order.
    fn step(&self, event: Event) {
        let mut state = self.state.lock();
        self.step_locked(&mut state, event);
    }

    fn step_locked(&self, state: &mut State, event: Event) {
        let now = self.clock.now();
        let mut effects = std::mem::take(&mut state.effects);
        state.paths.step(now, event, &mut effects);
        for effect in effects.drain(..) {
            self.apply(state, effect);
        }
        state.effects = effects;
        if state.paths.wake_at() < state.armed {
            state.armed = state.paths.wake_at();
            self.timer.notify_one();
        }
    }

    fn apply(&self, state: &mut State, effect: Effect) {
        let tell = |state: &State, read: ReadId, order: Order| {
            if let Some(reader) = state.readers.get(&read) {
                // An error means that the read is just being dropped.
                drop(reader.send(order));
            }
        };
        match effect {
            Effect::Connect { path, link, spec } => {
                let task = self.runtime.spawn(run_link(self.me.clone(), path, link, spec));
                let connected = Connected {
                    task: task.abort_handle(),
                    session: None,
                };
                state.links.insert(link, connected);
            }
            Effect::Close { path, link } => {
                tracing::debug!(path = path.0, "path closed");
                if let Some(connected) = state.links.remove(&link) {
                    connected.task.abort();
                }
            }
            Effect::Issue {
                read,
                path,
                link,
                lun,
            } => {
                let session = state.links.get(&link).and_then(|link| link.session.clone());
                // A link that is up has its session: it is put there before the core hears of it.
                if let Some(session) = session {
                    tell(
                        state,
                        read,
                        Order::Ask {
                            path,
                            link,
                            lun,
                            session,
                        },
                    );
                }
            }
            Effect::Abandon { read, path, link } => tell(state, read, Order::Drop { path, link }),
            Effect::Fail { read, failure } => tell(state, read, Order::Fail(failure)),
        }
    }

    fn link_is_up(&self, path: PathId, link: LinkId, session: Arc<Session>, access: Reported) {
        let mut state = self.state.lock();
        if let Some(connected) = state.links.get_mut(&link) {
            connected.session = Some(session);
            // First, so that no read goes to a path that would refuse it.
            self.step_locked(&mut state, Event::Access { path, link, access });
            self.step_locked(&mut state, Event::Connected { path, link });
        }
    }

    fn link_is_lost(&self, path: PathId, link: LinkId, why: String) {
        let mut state = self.state.lock();
        self.step_locked(&mut state, Event::Lost { path, link, why });
        state.links.remove(&link);
    }
}

impl Drop for PathGroup {
    fn drop(&mut self) {
        for link in self.state.get_mut().links.values() {
            link.task.abort();
        }
        self.timer.notify_one();
    }
}

/// Ends a read in the core when its caller is gone; harmless when it has ended.
struct Cancel<'a> {
    group: &'a PathGroup,
    read: ReadId,
}

impl Drop for Cancel<'_> {
    fn drop(&mut self) {
        let mut state = self.group.state.lock();
        state.readers.remove(&self.read);
        self.group
            .step_locked(&mut state, Event::Cancelled { read: self.read });
    }
}

async fn ask(session: Arc<Session>, lun: u16, offset: u64, bytes: u32) -> Result<Bytes, CommandError> {
    session.read(lun, offset, bytes).await
}

struct Ended {
    path: PathId,
    link: LinkId,
    took_us: u64,
    result: Result<Bytes, CommandError>,
}

type Attempt = Pin<Box<dyn Future<Output = Result<Ended, Aborted>> + Send>>;

/// The attempts of one read, under way at once.
#[derive(Default)]
struct Attempts {
    running: FuturesUnordered<Attempt>,
    handles: Vec<(PathId, LinkId, AbortHandle)>,
}

impl Attempts {
    fn start(
        &mut self,
        path: PathId,
        link: LinkId,
        work: impl Future<Output = Result<Bytes, CommandError>> + Send + 'static,
    ) {
        let (handle, registration) = AbortHandle::new_pair();
        self.handles.push((path, link, handle));
        let begun = Instant::now();
        let timed = async move {
            let result = work.await;
            Ended {
                path,
                link,
                took_us: begun.elapsed().as_micros() as u64,
                result,
            }
        };
        self.running.push(Box::pin(Abortable::new(timed, registration)));
    }

    fn abort(&mut self, path: PathId, link: LinkId) {
        for (_, _, handle) in self.handles.extract_if(.., |(p, l, _)| (*p, *l) == (path, link)) {
            handle.abort();
        }
    }

    /// The next attempt that ends; waits for ever while there is none.
    async fn next(&mut self) -> Ended {
        loop {
            match self.running.next().await {
                Some(Ok(ended)) => return ended,
                Some(Err(Aborted)) => {}
                None => std::future::pending().await,
            }
        }
    }
}

/// Connects a path and watches its session to the end.
async fn run_link(group: Weak<PathGroup>, path: PathId, link: LinkId, spec: PathSpec) {
    let options = match group.upgrade() {
        Some(group) => SessionOptions {
            portal: spec.portal.clone(),
            target: spec.target.clone(),
            initiator: group.options.initiator.clone(),
            chap: spec.chap.clone(),
            digests: group.options.digests,
            timeouts: group.options.timeouts,
        },
        None => return,
    };
    let limit_ms = options.timeouts.connect_ms;
    let why = match super::connect::within(limit_ms, &spec.portal, open(options, &spec)).await {
        Ok((session, access)) => {
            let session = Arc::new(session);
            tracing::info!(path = path.0, label = %spec.label, portal = %spec.portal, "path up");
            let Some(strong) = group.upgrade() else { return };
            strong.link_is_up(path, link, session.clone(), access);
            drop(strong);
            watch(&group, path, link, (session, access), spec.data_lun).await
        }
        Err(error) => with_causes(&error),
    };
    if let Some(group) = group.upgrade() {
        tracing::info!(path = path.0, label = %spec.label, portal = %spec.portal, why, "path down");
        group.link_is_lost(path, link, why);
    }
}

/// A path is up once its session knows the sizes of its LUNs, so that a read is a single command, and in which state
/// the access to its data is.
async fn open(options: SessionOptions, spec: &PathSpec) -> Result<(Session, Reported), ConnectError> {
    let session = Session::connect(options).await?;
    let luns = [Some(spec.data_lun), spec.hash_lun];
    let capacities = luns.into_iter().flatten().map(|lun| {
        let session = &session;
        async move { (lun, session.capacity(lun).await) }
    });
    let capacities = futures_util::future::join_all(capacities);
    let (capacities, access) = tokio::join!(capacities, access(&session, spec.data_lun));
    for (lun, capacity) in capacities {
        capacity.map_err(|source| ConnectError::Lun {
            portal: spec.portal.clone(),
            target: spec.target.clone(),
            lun,
            source,
        })?;
    }
    Ok((session, access))
}

/// The state of access; the best where the target knows none or does not say.
async fn access(session: &Session, lun: u16) -> Reported {
    match session.access(lun).await {
        Ok(Some(access)) => access,
        Ok(None) => Reported::Optimized,
        Err(error) => {
            tracing::debug!(
                portal = session.portal(),
                why = with_causes(&error),
                "no state of access"
            );
            Reported::Optimized
        }
    }
}

/// Reports silence and changes of the state of access; ends with the session, and says why.
async fn watch(
    group: &Weak<PathGroup>,
    path: PathId,
    link: LinkId,
    (session, mut accessible): (Arc<Session>, Reported),
    lun: u16,
) -> String {
    let mut health = session.health();
    let mut news = session.access_news();
    // The group's own reference is the one that keeps the session alive.
    let weak = Arc::downgrade(&session);
    drop(session);
    let mut asking: Option<Pin<Box<dyn Future<Output = Reported> + Send>>> = None;
    loop {
        let now = health.borrow_and_update().clone();
        let silent = match now {
            Health::Fine => false,
            Health::Silent => true,
            Health::Ended(why) => return with_causes(&why),
        };
        let Some(strong) = group.upgrade() else {
            return String::new();
        };
        strong.step(Event::Suspected { path, link, silent });
        drop(strong);
        let settled = matches!(accessible, Reported::Optimized | Reported::NonOptimized);
        let ask = tokio::select! {
            changed = health.changed() => match changed {
                Ok(()) => false,
                Err(_) => return "the session's task is gone".to_owned(),
            },
            Some(access) = async { Some(asking.as_mut()?.await) }, if asking.is_some() => {
                asking = None;
                accessible = access;
                let Some(strong) = group.upgrade() else { return String::new() };
                strong.step(Event::Access { path, link, access });
                false
            }
            Ok(()) = news.changed(), if asking.is_none() => true,
            () = tokio::time::sleep(ACCESS_AGAIN), if !settled && asking.is_none() => true,
        };
        if ask && let Some(session) = weak.upgrade() {
            // What asking itself hears is no news.
            news.mark_unchanged();
            asking = Some(Box::pin(async move { access(&session, lun).await }));
        }
    }
}

/// Wakes the core when it wants to be.
async fn run_timer(group: Weak<PathGroup>, changed: Arc<Notify>, clock: Clock) {
    loop {
        let armed = match group.upgrade() {
            Some(group) => group.state.lock().armed,
            None => return,
        };
        tokio::select! {
            () = changed.notified() => continue,
            () = tokio::time::sleep_until(clock.instant(armed)) => {}
        }
        let Some(group) = group.upgrade() else { return };
        let mut state = group.state.lock();
        // Set before the step, so that an earlier wish made in it counts.
        state.armed = Tick(u64::MAX);
        if group.clock.now() >= state.paths.wake_at() {
            group.step_locked(&mut state, Event::Timer);
        }
        state.armed = state.armed.min(state.paths.wake_at());
    }
}
