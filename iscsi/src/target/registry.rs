//! What connections share: targets, units, sessions.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use futures_util::task::AtomicWaker;
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};
use treeboot_block::BlockDevice;
use treeboot_types::Iqn;

use super::quiet::Brake;
use super::{Access, ServerConfig, SessionStats, TargetStats};
use crate::login::{Challenge, Directory, Established, Refusal, Security};
use crate::scsi::LogicalUnit;
use crate::scsi::reservation::InitiatorPort;

/// A logical unit and its device.
pub(super) struct Unit {
    pub(super) target: Iqn,
    pub(super) logical: LogicalUnit,
    pub(super) device: Arc<dyn BlockDevice>,
    /// Writes share it, COMPARE AND WRITE has it alone.
    pub(super) atomic: tokio::sync::RwLock<()>,
}

/// Counters of one session; only its own connection adds to them.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) wire_out: AtomicU64,
    pub(super) wire_in: AtomicU64,
    pub(super) read: AtomicU64,
    pub(super) written: AtomicU64,
    pub(super) commands: AtomicU64,
}

/// Adds without the cost of an atomic addition: there is one writer.
pub(super) fn count(counter: &AtomicU64, by: u64) {
    counter.store(
        counter.load(Ordering::Relaxed).wrapping_add(by),
        Ordering::Relaxed,
    );
}

/// What others want of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Order {
    /// End now, for this reason.
    Close(&'static str),
    /// Ask the initiator to log out within so many seconds.
    AskLogout(u16),
    /// Abort the tasks on a unit: a reset, or a reservation taken away. Who ordered it waits for the tickets.
    Abort(u16, Vec<Ticket>),
}

/// Held by a session that was told to abort tasks, until those that change the device have ended there. Once nobody holds one of
/// its kind, who ordered it may say that it is done: a write that lands after a reset, or after a preemption, would be a write of
/// somebody who is shut out.
#[derive(Debug, Clone)]
pub(super) struct Ticket {
    /// `None` only while it is dropped.
    held: Option<Arc<()>>,
    asker: Weak<SessionHandle>,
}

impl Ticket {
    /// The first, and what tells its asker when none is left.
    pub(super) fn new(asker: &Arc<SessionHandle>) -> (Self, Gate) {
        let gate = Gate(Arc::new(()));
        let held = Some(Arc::clone(&gate.0));
        let asker = Arc::downgrade(asker);
        (Self { held, asker }, gate)
    }
}

impl PartialEq for Ticket {
    fn eq(&self, other: &Self) -> bool {
        match (&self.held, &other.held) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }
}

impl Eq for Ticket {}

impl Drop for Ticket {
    fn drop(&mut self) {
        // First given up, then told: whoever wakes must see it.
        self.held = None;
        if let Some(asker) = self.asker.upgrade() {
            asker.control.waker.wake();
        }
    }
}

/// Is open once no [`Ticket`] of its kind is left.
#[derive(Debug)]
pub(super) struct Gate(Arc<()>);

impl Gate {
    pub(super) fn is_open(&mut self) -> bool {
        Arc::get_mut(&mut self.0).is_some()
    }
}

/// The way to a connection from outside.
#[derive(Debug, Default)]
pub(super) struct Control {
    pending: AtomicBool,
    orders: Mutex<Vec<Order>>,
    waker: AtomicWaker,
}

impl Control {
    pub(super) fn send(&self, order: Order) {
        let mut orders = self.orders.lock();
        // Twice is once: however often others reset a unit, no more waits here than there are kinds of orders, and one ticket of
        // each request that others wait with.
        let same = |old: &&mut Order| match (&**old, &order) {
            (Order::Abort(a, _), Order::Abort(b, _)) => a == b,
            (a, b) => a == b,
        };
        match orders.iter_mut().find(same) {
            Some(Order::Abort(_, tickets)) => {
                if let Order::Abort(_, more) = order {
                    tickets.extend(more);
                }
            }
            Some(_) => {}
            None => orders.push(order),
        }
        drop(orders);
        self.pending.store(true, Ordering::Release);
        self.waker.wake();
    }

    pub(super) fn register(&self, waker: &std::task::Waker) {
        self.waker.register(waker);
    }

    pub(super) fn take(&self) -> Vec<Order> {
        if !self.pending.swap(false, Ordering::AcqRel) {
            return Vec::new();
        }
        std::mem::take(&mut self.orders.lock())
    }
}

/// A session as others see it.
#[derive(Debug)]
pub(super) struct SessionHandle {
    pub(super) port: InitiatorPort,
    pub(super) peer: SocketAddr,
    pub(super) tsih: u16,
    /// What the initiator has proven.
    pub(super) security: Security,
    pub(super) counters: Counters,
    pub(super) control: Control,
}

impl SessionHandle {
    fn stats(&self) -> SessionStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        SessionStats {
            initiator: self.port.name.clone(),
            peer: self.peer,
            wire_bytes_out: get(&self.counters.wire_out),
            wire_bytes_in: get(&self.counters.wire_in),
            read_bytes: get(&self.counters.read),
            written_bytes: get(&self.counters.written),
            commands: get(&self.counters.commands),
        }
    }
}

fn add(total: &mut TargetStats, session: &SessionStats) {
    total.wire_bytes_out += session.wire_bytes_out;
    total.wire_bytes_in += session.wire_bytes_in;
    total.read_bytes += session.read_bytes;
    total.written_bytes += session.written_bytes;
    total.commands += session.commands;
}

#[derive(Debug, Default)]
struct Sessions {
    live: HashMap<u16, Arc<SessionHandle>>,
    /// Sums of those that ended.
    past: TargetStats,
}

/// One target.
pub(super) struct Target {
    pub(super) name: Iqn,
    /// By LUN, ascending.
    pub(super) units: Vec<Arc<Unit>>,
    pub(super) luns: Vec<u16>,
    pub(super) access: Mutex<Access>,
    pub(super) removing: AtomicBool,
    /// Where initiators that log in are sent, and whether for good.
    pub(super) moved: Mutex<Option<(String, bool)>>,
    sessions: Mutex<Sessions>,
    /// A session ended.
    pub(super) ended: Notify,
}

impl Target {
    pub(super) fn new(name: Iqn, units: Vec<Arc<Unit>>, access: Access) -> Self {
        Self {
            name,
            luns: units.iter().map(|unit| unit.logical.number()).collect(),
            units,
            access: Mutex::new(access),
            removing: AtomicBool::new(false),
            moved: Mutex::default(),
            sessions: Mutex::default(),
            ended: Notify::new(),
        }
    }

    pub(super) fn stats(&self) -> TargetStats {
        let sessions = self.sessions.lock();
        let mut total = sessions.past.clone();
        for handle in sessions.live.values() {
            let session = handle.stats();
            add(&mut total, &session);
            total.sessions.push(session);
        }
        total
    }

    pub(super) fn insert(&self, handle: Arc<SessionHandle>) {
        self.sessions.lock().live.insert(handle.tsih, handle);
    }

    pub(super) fn remove(&self, handle: &SessionHandle) {
        let mut sessions = self.sessions.lock();
        sessions.live.remove(&handle.tsih);
        add(&mut sessions.past, &handle.stats());
        drop(sessions);
        self.ended.notify_waiters();
    }

    pub(super) fn is_idle(&self) -> bool {
        self.sessions.lock().live.is_empty()
    }

    /// The sessions for which `wanted` holds.
    pub(super) fn sessions(&self, wanted: impl Fn(&SessionHandle) -> bool) -> Vec<Arc<SessionHandle>> {
        self.sessions
            .lock()
            .live
            .values()
            .filter(|handle| wanted(handle))
            .cloned()
            .collect()
    }
}

/// A session's handle has 16 bits, and 0 is none.
const MAX_HANDLES: usize = u16::MAX as usize;

/// A connection that has not logged in; dropping the sender ends it.
struct Arrival {
    id: u64,
    _leave: oneshot::Sender<()>,
}

/// What all connections of a server share.
pub(super) struct Shared {
    pub(super) config: ServerConfig,
    pub(super) portals: Vec<SocketAddr>,
    pub(super) targets: Mutex<HashMap<Iqn, Arc<Target>>>,
    pub(super) stopping: AtomicBool,
    /// A target came, or somebody's access changed.
    pub(super) changed: Notify,
    /// For lines about connections without a login.
    pub(super) brake: Brake,
    handles: Mutex<Handles>,
    /// Challenges that wait for their answer; each is of one login under way.
    challenges: Mutex<BTreeSet<Vec<u8>>>,
    arrivals: Mutex<VecDeque<Arrival>>,
    next_arrival: AtomicU64,
}

#[derive(Default)]
struct Handles {
    used: HashSet<u16>,
    next: u16,
}

impl Shared {
    pub(super) fn new(config: ServerConfig, portals: Vec<SocketAddr>) -> Self {
        Self {
            config,
            portals,
            targets: Mutex::default(),
            stopping: AtomicBool::new(false),
            changed: Notify::new(),
            brake: Brake::default(),
            handles: Mutex::default(),
            challenges: Mutex::default(),
            arrivals: Mutex::default(),
            next_arrival: AtomicU64::new(0),
        }
    }

    pub(super) fn target(&self, name: &Iqn) -> Option<Arc<Target>> {
        self.targets.lock().get(name).cloned()
    }

    /// A connection came. Beyond the limit the oldest that has not logged in is closed.
    pub(super) fn arrive(&self) -> (u64, oneshot::Receiver<()>) {
        let (leave, left) = oneshot::channel();
        let id = self.next_arrival.fetch_add(1, Ordering::Relaxed);
        let mut arrivals = self.arrivals.lock();
        if arrivals.len() >= self.config.max_logins {
            arrivals.pop_front();
        }
        arrivals.push_back(Arrival { id, _leave: leave });
        (id, left)
    }

    /// It logged in, or is gone.
    pub(super) fn depart(&self, id: u64) {
        self.arrivals.lock().retain(|arrival| arrival.id != id);
    }

    /// Gives a session's handle back.
    pub(super) fn release(&self, tsih: u16) {
        self.handles.lock().used.remove(&tsih);
    }
}

/// What one login sees of the server, and what it leaves there until it ends.
pub(super) struct Desk {
    shared: Arc<Shared>,
    asked: Mutex<Option<Vec<u8>>>,
}

impl Desk {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            asked: Mutex::default(),
        }
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        if let Some(asked) = self.asked.get_mut() {
            self.shared.challenges.lock().remove(asked);
        }
    }
}

impl Directory for Desk {
    fn admit(&self, initiator: &Iqn, target: &Iqn) -> Result<Security, Refusal> {
        let found = self
            .shared
            .target(target)
            .ok_or_else(|| Refusal::NotFound(target.clone()))?;
        if self.shared.stopping.load(Ordering::Acquire) || found.removing.load(Ordering::Acquire) {
            return Err(Refusal::Unavailable(target.clone()));
        }
        let Some(security) = found.access.lock().asks(initiator) else {
            return Err(Refusal::Forbidden {
                initiator: initiator.clone(),
                target: target.clone(),
            });
        };
        if let Some((address, permanently)) = found.moved.lock().clone() {
            return Err(Refusal::Moved {
                target: target.clone(),
                address,
                permanently,
            });
        }
        let limit = self.shared.config.max_sessions;
        if self.shared.handles.lock().used.len() >= limit {
            return Err(Refusal::TooMany(limit));
        }
        Ok(security)
    }

    fn challenge(&self) -> Option<Challenge> {
        let mut asked = self.asked.lock();
        if asked.is_some() {
            return None; // a login has one challenge
        }
        let challenge = Challenge::from_os()?;
        let bytes = challenge.bytes().to_vec();
        if !self.shared.challenges.lock().insert(bytes.clone()) {
            return None; // a source that repeats itself is not random
        }
        *asked = Some(bytes);
        Some(challenge)
    }

    fn is_ours(&self, challenge: &[u8]) -> bool {
        self.shared.challenges.lock().contains(challenge)
    }

    fn has_session(&self, initiator: &Iqn, tsih: u16) -> bool {
        let targets: Vec<_> = self.shared.targets.lock().values().cloned().collect();
        targets.iter().any(|target| {
            !target
                .sessions(|s| s.tsih == tsih && s.port.name == *initiator)
                .is_empty()
        })
    }

    fn new_tsih(&self) -> Result<u16, Refusal> {
        let limit = self.shared.config.max_sessions.min(MAX_HANDLES);
        let mut handles = self.shared.handles.lock();
        // Discovery sessions are sessions too, and many logins may have been admitted at once.
        if handles.used.len() >= limit {
            return Err(Refusal::TooMany(limit));
        }
        loop {
            // Fewer than all are in use, so this ends.
            handles.next = handles.next.wrapping_add(1);
            let tsih = handles.next;
            if tsih != 0 && handles.used.insert(tsih) {
                return Ok(tsih);
            }
        }
    }
}

impl Shared {
    /// A session begins: an older one of the same name gives way first, and its writes have ended before the new one
    /// begins (RFC 7143 §6.3.5). `None` where the target or the permission has gone meanwhile.
    pub(super) async fn begin(
        &self,
        established: &Established,
        peer: SocketAddr,
    ) -> Option<(Arc<Target>, Arc<SessionHandle>)> {
        let target = self.target(established.target.as_ref()?)?;
        let handle = Arc::new(SessionHandle {
            port: InitiatorPort {
                name: established.initiator.clone(),
                isid: established.isid,
            },
            peer,
            tsih: established.tsih,
            security: established.security.clone(),
            counters: Counters::default(),
            control: Control::default(),
        });
        loop {
            let ended = target.ended.notified();
            let mut ended = std::pin::pin!(ended);
            ended.as_mut().enable();
            let older = target.sessions(|session| session.port == handle.port);
            if older.is_empty() {
                break;
            }
            for session in older {
                session
                    .control
                    .send(Order::Close("its initiator logged in again"));
            }
            ended.await;
        }
        target.insert(handle.clone());
        // Both may have changed during the login.
        let honoured = target.access.lock().honours(&handle.port.name, &handle.security);
        if target.removing.load(Ordering::Acquire) || !honoured {
            target.remove(&handle);
            return None;
        }
        Some((target, handle))
    }
}
