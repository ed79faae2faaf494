//! Listening, and what a person or an agent asks of a server.

use std::collections::BTreeSet;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::Mutex;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::DuplexStream;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout, timeout_at};
use treeboot_types::Iqn;

use super::connection::Connection;
use super::login::{LoginFailure, login};
use super::registry::{Order, SessionHandle, Shared, Target, Unit};
use super::wire::Wire;
use super::{Access, AddTargetError, BindError, ServerConfig, TargetOptions, TargetSpec, TargetStats};
use crate::login::{Refusal, is_address};
use crate::scsi::{AccessState, Identity, LogicalUnit};

/// Connections that the kernel keeps until they are accepted.
const BACKLOG: i32 = 1024;
/// The pause after an accept that failed, for instance because the process has no more file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// The most logical units of a target.
const MAX_LUNS: usize = 256;
/// How long sessions that were told to close may take to finish writes in progress.
const CLOSE_LIMIT: Duration = Duration::from_secs(10);

/// A running target server. Dropping it stops listening; sessions end with their clients, or by
/// [`shutdown`](Self::shutdown).
pub struct Server {
    shared: Arc<Shared>,
    listeners: Mutex<Vec<JoinHandle<()>>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop_listening();
    }
}

impl Server {
    /// Listens on all `portals` (port 0: any free one). Call it within a tokio runtime.
    ///
    /// # Errors
    /// [`BindError`] names the first portal that cannot be had; none is listened on then.
    pub fn bind(portals: &[SocketAddr], config: ServerConfig) -> Result<Self, BindError> {
        if portals.is_empty() {
            return Err(BindError::NoPortal);
        }
        let listen = |&portal: &SocketAddr| {
            let listen = || -> std::io::Result<(TcpListener, SocketAddr)> {
                let socket = Socket::new(Domain::for_address(portal), Type::STREAM, Some(Protocol::TCP))?;
                if portal.is_ipv6() {
                    // An IPv4 portal on the same port is a portal of its own.
                    socket.set_only_v6(true)?;
                }
                socket.set_reuse_address(true)?;
                socket.bind(&portal.into())?;
                socket.listen(BACKLOG)?;
                from_std(socket.into())
            };
            listen().map_err(|source| BindError::Listen { portal, source })
        };
        let listeners = portals.iter().map(listen).collect::<Result<Vec<_>, _>>()?;
        Ok(Self::start(listeners, config))
    }

    /// Serves on a socket that listens already, for instance one handed over by a service manager.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn from_listener(listener: StdListener, config: ServerConfig) -> std::io::Result<Self> {
        Ok(Self::start(vec![from_std(listener)?], config))
    }

    /// A server without portals: it serves only what is handed to [`converse`](Self::converse).
    pub fn without_portals(config: ServerConfig) -> Self {
        Self::start(Vec::new(), config)
    }

    /// Serves one connection over a pipe in memory, from its first byte to its last, on the caller's task. So a fuzzer
    /// sees a panic where it happens, and needs no network.
    pub async fn converse(&self, pipe: DuplexStream) {
        let nobody = SocketAddr::from(([0, 0, 0, 0], 0));
        serve(Wire::Pipe(pipe), nobody, self.shared.clone()).await;
    }

    fn start(listeners: Vec<(TcpListener, SocketAddr)>, config: ServerConfig) -> Self {
        let portals = listeners.iter().map(|(_, addr)| *addr).collect();
        let shared = Arc::new(Shared::new(config, portals));
        let tasks = listeners
            .into_iter()
            .map(|(listener, _)| tokio::spawn(accept(listener, shared.clone())))
            .collect();
        Self {
            shared,
            listeners: Mutex::new(tasks),
        }
    }

    /// The portals, with the ports that they really have.
    pub fn local_addrs(&self) -> Vec<SocketAddr> {
        self.shared.portals.clone()
    }

    /// Serves a target from now on.
    ///
    /// # Errors
    /// [`AddTargetError`] says what is wrong with it.
    pub fn add_target(&self, spec: TargetSpec) -> Result<(), AddTargetError> {
        self.add_target_with(spec, TargetOptions::default())
    }

    /// Serves a target from now on, with more than most have.
    ///
    /// # Errors
    /// [`AddTargetError`] says what is wrong with it.
    pub fn add_target_with(&self, spec: TargetSpec, options: TargetOptions) -> Result<(), AddTargetError> {
        self.insert(target(spec, options)?)
    }

    /// Sends the initiators of a target that is not served here elsewhere, as [`redirect`](Self::redirect) does, until
    /// [`remove_target`](Self::remove_target). Discovery lists it with the portals of here.
    ///
    /// # Errors
    /// [`AddTargetError`]: the name is taken, the address is none, or the server stops.
    pub fn add_moved_target(
        &self,
        name: Iqn,
        address: &str,
        permanently: bool,
        access: Access,
    ) -> Result<(), AddTargetError> {
        if !is_address(address) {
            let address = address.into();
            return Err(AddTargetError::Address {
                target: name,
                address,
            });
        }
        let target = Target::new(name, Vec::new(), access);
        *target.moved.lock() = Some((address.to_owned(), permanently));
        self.insert(target)
    }

    fn insert(&self, target: Target) -> Result<(), AddTargetError> {
        let name = target.name.clone();
        let mut targets = self.shared.targets.lock();
        if self.shared.stopping.load(Ordering::Acquire) {
            return Err(AddTargetError::Stopping(name));
        }
        if targets.contains_key(&name) {
            return Err(AddTargetError::Exists(name));
        }
        targets.insert(name.clone(), Arc::new(target));
        drop(targets);
        self.shared.changed.notify_waiters();
        tracing::info!(target = %name, "target added");
        Ok(())
    }

    /// Changes who may log in, and ends the sessions of those who no longer may, or not with what they have proven: a
    /// new secret ends the sessions of the old one. `false`: no such target.
    pub fn set_access(&self, target: &Iqn, access: Access) -> bool {
        let Some(target) = self.shared.target(target) else {
            return false;
        };
        *target.access.lock() = access.clone();
        self.shared.changed.notify_waiters();
        close(
            target.sessions(|session| !access.honours(&session.port.name, &session.security)),
            "access was withdrawn",
        );
        true
    }

    /// Changes the state of access (ALUA) of one unit, or of all units, of a target; initiators are told with their next
    /// command. `false`: no such target or unit.
    pub fn set_access_state(&self, target: &Iqn, lun: Option<u16>, state: AccessState) -> bool {
        let Some(target) = self.shared.target(target) else {
            return false;
        };
        let wanted = |unit: &&Arc<Unit>| lun.is_none_or(|lun| unit.logical.number() == lun);
        let units: Vec<_> = target.units.iter().filter(wanted).collect();
        for unit in &units {
            unit.logical.set_access_state(state);
        }
        !units.is_empty()
    }

    /// Sends initiators that log in elsewhere, for now or `permanently` (RFC 7143 §11.13.5); `None`: no longer. `address`
    /// is `host[:port]`, an IPv6 address in brackets. Sessions stay; [`close_sessions`](Self::close_sessions) makes
    /// their initiators log in again. Only initiators that the target admits learn where to. `false`: no such target.
    pub fn redirect(&self, target: &Iqn, address: Option<&str>, permanently: bool) -> bool {
        let Some(target) = self
            .shared
            .target(target)
            .filter(|target| !target.units.is_empty())
        else {
            return false;
        };
        *target.moved.lock() = address.map(|address| (address.to_owned(), permanently));
        true
    }

    /// Removes a target: nobody logs in any more, initiators are asked to log out within `drain`, then sessions are
    /// closed. Returns once no session uses its devices. `false`: no such target.
    pub async fn remove_target(&self, name: &Iqn, drain: Duration) -> bool {
        let Some(target) = self.shared.target(name) else {
            return false;
        };
        target.removing.store(true, Ordering::Release);
        drain_target(&target, drain).await;
        self.shared.targets.lock().remove(name);
        tracing::info!(target = %name, "target removed");
        true
    }

    /// What a target did; `None`: no such target.
    pub fn stats(&self, target: &Iqn) -> Option<TargetStats> {
        self.shared.target(target).map(|target| target.stats())
    }

    /// The names of all targets.
    pub fn targets(&self) -> BTreeSet<Iqn> {
        self.shared.targets.lock().keys().cloned().collect()
    }

    /// Closes the sessions of one initiator, or of all, with a target. They may log in again.
    pub fn close_sessions(&self, target: &Iqn, initiator: Option<&Iqn>) {
        if let Some(target) = self.shared.target(target) {
            close(
                target.sessions(|session| initiator.is_none_or(|name| session.port.name == *name)),
                "it was asked for",
            );
        }
    }

    /// Stops listening, asks all initiators to log out within `drain`, then closes their sessions.
    pub async fn shutdown(&self, drain: Duration) {
        self.shared.stopping.store(true, Ordering::Release);
        self.stop_listening();
        let targets: Vec<_> = self.shared.targets.lock().values().cloned().collect();
        for target in &targets {
            target.removing.store(true, Ordering::Release);
        }
        futures_util::future::join_all(targets.iter().map(|target| drain_target(target, drain))).await;
        self.shared.targets.lock().clear();
    }

    fn stop_listening(&self) {
        for task in self.listeners.lock().drain(..) {
            task.abort();
        }
    }
}

fn from_std(listener: StdListener) -> std::io::Result<(TcpListener, SocketAddr)> {
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener)?;
    let addr = listener.local_addr()?;
    Ok((listener, addr))
}

fn close(sessions: Vec<Arc<SessionHandle>>, reason: &'static str) {
    for session in sessions {
        session.control.send(Order::Close(reason));
    }
}

/// Waits until no session is left, asking first and closing after `drain`.
async fn drain_target(target: &Target, drain: Duration) {
    if !drain.is_zero() {
        let seconds = u16::try_from(drain.as_secs().max(1)).unwrap_or(u16::MAX);
        for session in target.sessions(|_| true) {
            session.control.send(Order::AskLogout(seconds));
        }
        if until_idle(target, Instant::now() + drain).await {
            return;
        }
    }
    close(target.sessions(|_| true), "the target is being removed");
    if !until_idle(target, Instant::now() + CLOSE_LIMIT).await {
        tracing::warn!(target = %target.name, "a device still holds writes of a closed session");
    }
}

async fn until_idle(target: &Target, deadline: Instant) -> bool {
    loop {
        let ended = target.ended.notified();
        let mut ended = std::pin::pin!(ended);
        ended.as_mut().enable();
        if target.is_idle() {
            return true;
        }
        if timeout_at(deadline, ended).await.is_err() {
            return target.is_idle();
        }
    }
}

/// Checks a specification and makes the target.
fn target(spec: TargetSpec, mut options: TargetOptions) -> Result<Target, AddTargetError> {
    let mut luns = spec.luns;
    luns.sort_by_key(|lun| lun.lun);
    let wrong = |lun| AddTargetError::Lun {
        target: spec.name.clone(),
        lun,
    };
    if luns.first().is_none_or(|lun| lun.lun != 0) {
        return Err(AddTargetError::NoLunZero(spec.name));
    }
    if let Some(twice) = luns.windows(2).find(|pair| pair[0].lun == pair[1].lun) {
        return Err(wrong(twice[0].lun));
    }
    if let Some(over) = luns.iter().find(|lun| lun.lun > 0x3fff).or(luns.get(MAX_LUNS)) {
        return Err(wrong(over.lun));
    }
    let mut units = Vec::new();
    for lun in luns {
        let geometry = lun.device.geometry();
        let block = u64::from(geometry.block_bytes);
        let physical = u64::from(geometry.physical_block_bytes);
        let fits = matches!(block, 512 | 4096)
            && geometry.bytes > 0
            && geometry.bytes.is_multiple_of(block)
            && physical >= block
            && physical.is_power_of_two();
        if !fits {
            return Err(AddTargetError::Geometry {
                target: spec.name,
                lun: lun.lun,
                bytes: geometry.bytes,
                block_bytes: geometry.block_bytes,
            });
        }
        let serial = lun
            .serial
            .chars()
            .filter(char::is_ascii_graphic)
            .take(64)
            .collect();
        let identity = Identity {
            target: spec.name.clone(),
            serial,
            product: lun.product,
            ident: lun.ident,
        };
        let mut logical = LogicalUnit::new(lun.lun, identity, geometry)
            .in_port_group(options.port_group, options.access_state);
        if let Some(mut file) = options.reservations.remove(&lun.lun) {
            let (path, text) = (file.path().to_owned(), file.take_text());
            let unreadable = |source| AddTargetError::Reservations {
                target: spec.name.clone(),
                lun: lun.lun,
                path,
                source,
            };
            logical = logical
                .with_keeper(Box::new(file), text.as_deref())
                .map_err(unreadable)?;
        }
        units.push(Arc::new(Unit {
            target: spec.name.clone(),
            logical,
            device: lun.device,
            atomic: tokio::sync::RwLock::new(()),
        }));
    }
    Ok(Target::new(spec.name, units, spec.access))
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        match listener.accept().await {
            Ok((socket, peer)) => {
                // Replies must not wait for others to share a segment with.
                let _ = socket.set_nodelay(true);
                let socket = Wire::Tcp(socket);
                tokio::spawn(serve(socket, peer, shared.clone()));
            }
            Err(error) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "cannot accept a connection"
                );
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// One connection from its first byte to its last.
async fn serve(socket: Wire, peer: SocketAddr, shared: Arc<Shared>) {
    let (arrival, left) = shared.arrive();
    let logged_in = tokio::select! {
        result = timeout(shared.config.login_limit, login(socket, &shared)) => result,
        _ = left => return no_login(NoLogin::GaveWay, peer, &shared),
    };
    shared.depart(arrival);
    let ready = match logged_in {
        Ok(Ok(ready)) => ready,
        Ok(Err(failure)) => return no_login(NoLogin::Failed(failure), peer, &shared),
        Err(_) => return no_login(NoLogin::TookTooLong, peer, &shared),
    };
    let tsih = ready.established.tsih;
    Connection::serve(ready, peer, &shared).await;
    shared.release(tsih);
}

/// How a connection ended before it was a session.
enum NoLogin {
    GaveWay,
    TookTooLong,
    Failed(LoginFailure),
}

/// Says why a connection ended without a login; of a flood of them, now and then.
fn no_login(why: NoLogin, peer: SocketAddr, shared: &Shared) {
    if let NoLogin::Failed(LoginFailure::Ended) = why {
        // Who looks whether the port is open does this.
        return tracing::debug!(%peer, "the connection ended before its login");
    }
    let Some(withheld) = shared.brake.admit(Instant::now()) else {
        return;
    };
    if withheld > 0 {
        tracing::warn!(
            withheld,
            "as many lines about connections without a login were left out"
        );
    }
    match why {
        NoLogin::GaveWay => {
            let limit = shared.config.max_logins;
            tracing::warn!(%peer, limit, "closed before its login: too many connections wait for one");
        }
        NoLogin::TookTooLong => {
            tracing::warn!(%peer, limit = ?shared.config.login_limit, "closed: the login took too long");
        }
        NoLogin::Failed(LoginFailure::Refused(Refusal::Chap { initiator, why })) => {
            // Somebody's password is wrong, or somebody tries passwords.
            tracing::warn!(%initiator, %peer, reason = %why, "authentication failed");
        }
        NoLogin::Failed(LoginFailure::Refused(moved @ Refusal::Moved { .. })) => {
            // As it was told to.
            tracing::info!(%peer, %moved, "sent elsewhere");
        }
        NoLogin::Failed(error) => {
            tracing::warn!(%peer, error = &error as &dyn std::error::Error, "no login");
        }
    }
}
