//! A connection in its full feature phase: one task that owns the socket and the session.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::time::{Instant, Sleep};
use treeboot_types::Iqn;

use super::barrier::Barrier;
use super::buffers::{Block, Input, Output, Pool};
use super::command::Held;
use super::execute::Outcome;
use super::login::Ready;
use super::registry::{Counters, Gate, Order, SessionHandle, Shared, Target, Ticket, Unit, count};
use super::wire::Wire;
use crate::login::{Established, Parameters};
use crate::pdu::{FrameError, Framing, NO_TAG, NopIn, Pdu, PduError, Reject, Split, reject_reason};
use crate::scsi::{Nexus, Sense};
use crate::session::{Transfer, TransferLimits, Window};

/// Replies that wait for the socket, in bytes; beyond it nothing is received and no piece is read. The kernel's send
/// buffer keeps the link busy; more here would only leave the processor's cache before it is sent.
const OUTPUT_LIMIT: usize = 256 * 1024;
/// Data of reads in progress on devices, in bytes.
const READING_LIMIT: usize = 8 << 20;
/// Data of writes that are asked for by R2T, in bytes. One write may always go on, however large.
pub(super) const WRITING_LIMIT: usize = 16 << 20;
/// The piece in which a large read goes from the device to the socket: it stays in the processor's cache between.
const PIECE_BYTES: usize = 128 * 1024;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    #[error("the initiator closed it")]
    Eof,
    #[error("the initiator logged out")]
    Logout,
    #[error("closed here: {0}")]
    Ordered(&'static str),
    #[error("no sign of life for twice {0:?}")]
    Silent(std::time::Duration),
    #[error("the connection failed")]
    Io(#[from] std::io::Error),
    #[error("the stream cannot be followed")]
    Frame(#[from] FrameError),
    #[error("a PDU that cannot be")]
    Pdu(#[from] PduError),
    #[error("against the protocol: {0}")]
    Protocol(&'static str),
}

/// A task that was not answered at once.
pub(super) struct Task {
    pub(super) serial: u64,
    pub(super) lun: u16,
    /// Its CmdSN counts.
    pub(super) counted: bool,
    pub(super) kind: TaskKind,
}

pub(super) enum TaskKind {
    /// Data are still to come.
    Gathering(Box<Gathering>),
    /// A flush that waits for writes before it.
    Waiting,
    /// On the device; dropping it has no consequence.
    Reading,
    /// On the device; it must end before an abort is answered.
    Changing,
    /// Aborted, and still on the device.
    Aborted,
}

/// A command whose data come.
pub(super) struct Gathering {
    pub(super) transfer: Transfer,
    pub(super) unit: usize,
    /// What to do with them, or how the command ends without.
    pub(super) then: Result<crate::scsi::OutAction, Ending>,
    /// Bytes that the CDB calls for.
    pub(super) called_for: u64,
}

/// How a command ends that has no use for its data. They are received first.
#[derive(Debug, Clone, Copy)]
pub(super) enum Ending {
    /// CHECK CONDITION.
    Check(Sense),
    /// A status without sense data.
    Status(u8),
}

impl From<Sense> for Ending {
    fn from(sense: Sense) -> Self {
        Self::Check(sense)
    }
}

/// A read on its way.
#[derive(Debug, Clone, Copy)]
pub(super) struct ReadTask {
    pub(super) itt: u32,
    pub(super) serial: u64,
    pub(super) unit: usize,
    pub(super) offset: u64,
    /// Bytes to send, and sent.
    pub(super) total: u32,
    pub(super) sent: u32,
    pub(super) data_sn: u32,
    pub(super) residual: crate::pdu::Residual,
    pub(super) counted: bool,
    /// It is in the table of tasks.
    pub(super) listed: bool,
}

/// What came back from a device.
pub(super) enum Done {
    Piece(ReadTask, Block, Result<(), Sense>),
    Task {
        itt: u32,
        serial: u64,
        /// Its CmdSN counts.
        counted: bool,
        outcome: Outcome,
        /// Bytes that count as being read.
        reading: usize,
        /// For the residual.
        expected: u32,
        called_for: u64,
        /// R2Ts sent.
        solicitations: u32,
        /// Bytes written, for the counters.
        written: u64,
        /// A buffer to use again.
        buffer: Vec<u8>,
    },
}

pub(super) type Work = Pin<Box<dyn Future<Output = Done> + Send>>;

/// A flush that waits for the writes before it.
pub(super) struct Flush {
    pub(super) itt: u32,
    pub(super) serial: u64,
    pub(super) unit: usize,
    pub(super) expected: u32,
}

/// A task management request whose answer waits for tasks to end.
pub(super) struct Abortion {
    pub(super) itt: u32,
    pub(super) counted: bool,
    pub(super) serials: Vec<u64>,
    /// Other sessions' tasks.
    pub(super) gate: Option<Gate>,
    /// All sessions end behind the answer: a cold reset.
    pub(super) is_cold: bool,
}

/// Tasks whose end another session waits for.
pub(super) struct Owed {
    pub(super) serials: Vec<u64>,
    /// Given back when they have ended.
    pub(super) _tickets: Vec<Ticket>,
}

/// See the module.
pub(super) struct Connection {
    pub(super) shared: Arc<Shared>,
    /// `None` in a discovery session.
    pub(super) target: Option<Arc<Target>>,
    pub(super) handle: Arc<SessionHandle>,
    pub(super) initiator: Iqn,
    pub(super) local: Option<SocketAddr>,
    /// One for each of the target's units.
    pub(super) nexuses: Vec<Arc<Nexus>>,
    pub(super) parameters: Parameters,
    pub(super) limits: TransferLimits,
    /// How what we send is laid out, and what comes.
    pub(super) sending: Framing,
    receiving: Framing,
    pub(super) piece_bytes: usize,
    socket: Wire,
    input: Input,
    pub(super) output: Output,
    pub(super) pool: Pool,
    pub(super) window: Window,
    pub(super) stat_sn: u32,
    /// Commands that came before one with a lower CmdSN.
    pub(super) held: BTreeMap<u32, Held>,
    pub(super) held_bytes: usize,
    pub(super) tasks: HashMap<u32, Task>,
    pub(super) next_serial: u64,
    pub(super) next_ttt: u32,
    /// Writes in progress, by serial: a flush waits for those before it.
    pub(super) changing: BTreeMap<u64, u16>,
    /// Writes whose next R2T waits for memory.
    pub(super) starved: Vec<u32>,
    pub(super) flushes: Vec<Flush>,
    pub(super) barrier: Barrier,
    pub(super) abortions: Vec<Abortion>,
    pub(super) owed: Vec<Owed>,
    /// Preemptions that wait for other sessions' tasks to end.
    pub(super) fences: Vec<(Gate, Done)>,
    pub(super) running: FuturesUnordered<Work>,
    /// Large reads whose next piece waits for room.
    pub(super) stalled: VecDeque<ReadTask>,
    pub(super) reading_bytes: usize,
    pub(super) writing_bytes: usize,
    /// Text of an answer that did not fit, and the tag under which the rest is asked for.
    pub(super) text_rest: Option<(u32, Vec<u8>)>,
    /// Text of a request that goes on.
    pub(super) text_request: Vec<u8>,
    /// How many requests it has come in so far.
    pub(super) text_parts: u32,
    /// Data may still come for commands that were answered before all of theirs had come, or aborted.
    pub(super) late_data: bool,
    /// What the initiator did against the protocol and was not thrown out for.
    breaches: u64,
    pub(super) end: Option<End>,
    timer: Pin<Box<Sleep>>,
    heard: bool,
    pinged: bool,
}

impl Connection {
    /// Serves a connection that has logged in, to its end.
    pub(super) async fn serve(ready: Ready, peer: SocketAddr, shared: &Arc<Shared>) {
        let established = ready.established.clone();
        let (target, handle) = if established.target.is_some() {
            match shared.begin(&established, peer).await {
                Some((target, handle)) => (Some(target), handle),
                None => return,
            }
        } else {
            (None, discovery_handle(&established, peer))
        };
        let name = target
            .as_ref()
            .map_or("discovery".to_owned(), |target| target.name.to_string());
        let initiator = established.initiator.clone();
        if target.is_some() {
            tracing::info!(target = %name, %initiator, %peer, "session begins");
        }
        let mut connection = Box::new(Self::new(ready, target, handle, shared.clone()));
        let end = std::future::poll_fn(|cx| connection.poll(cx)).await;
        let breaches = connection.breaches;
        connection.finish().await;
        match &end {
            End::Eof | End::Logout | End::Ordered(_) => {
                tracing::debug!(target = %name, %initiator, %peer, reason = %end, breaches, "session ended");
            }
            _ => {
                tracing::warn!(target = %name, %initiator, %peer, error = &end as &dyn std::error::Error, "session ended");
            }
        }
    }

    fn new(
        ready: Ready,
        target: Option<Arc<Target>>,
        handle: Arc<SessionHandle>,
        shared: Arc<Shared>,
    ) -> Self {
        let Established {
            parameters: p,
            initiator,
            cmd_sn,
            stat_sn,
            ..
        } = *ready.established;
        let framing = |max_data_bytes| Framing {
            header_digest: p.header_digest,
            data_digest: p.data_digest,
            max_data_bytes,
        };
        let units = target.iter().flat_map(|target| &target.units);
        let nexuses = units
            .map(|unit| unit.logical.attach(handle.port.clone()))
            .collect();
        count(&handle.counters.wire_in, ready.wire_in);
        count(&handle.counters.wire_out, ready.wire_out);
        let mut output = Output::default();
        output.push(ready.last_reply.into());
        let ping_after = shared.config.ping_after;
        Self {
            shared,
            target,
            handle,
            initiator,
            local: ready.socket.local_addr(),
            nexuses,
            parameters: p,
            limits: TransferLimits {
                immediate_data: p.immediate_data,
                initial_r2t: p.initial_r2t,
                first_burst_bytes: p.first_burst_bytes,
                max_burst_bytes: p.max_burst_bytes,
                max_outstanding_r2t: p.max_outstanding_r2t,
            },
            sending: framing(p.peer_max_recv_bytes),
            receiving: framing(p.max_recv_bytes),
            piece_bytes: piece_bytes(p.peer_max_recv_bytes),
            socket: ready.socket,
            input: ready.input,
            output,
            pool: Pool::default(),
            window: Window::new(cmd_sn),
            stat_sn,
            held: BTreeMap::new(),
            held_bytes: 0,
            tasks: HashMap::new(),
            next_serial: 0,
            next_ttt: 1,
            changing: BTreeMap::new(),
            starved: Vec::new(),
            flushes: Vec::new(),
            barrier: Barrier::default(),
            abortions: Vec::new(),
            owed: Vec::new(),
            fences: Vec::new(),
            running: FuturesUnordered::new(),
            stalled: VecDeque::new(),
            reading_bytes: 0,
            writing_bytes: 0,
            text_rest: None,
            text_request: Vec::new(),
            text_parts: 0,
            late_data: false,
            breaches: 0,
            end: None,
            timer: Box::pin(tokio::time::sleep(ping_after)),
            heard: false,
            pinged: false,
        }
    }

    pub(super) fn counters(&self) -> &Counters {
        &self.handle.counters
    }

    pub(super) fn unit(&self, index: usize) -> Option<&Arc<Unit>> {
        self.target.as_ref()?.units.get(index)
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        self.handle.control.register(cx.waker());
        match self.turn(cx) {
            Poll::Ready(Ok(end) | Err(end)) => Poll::Ready(end),
            Poll::Pending => Poll::Pending,
        }
    }

    /// Goes round until nothing moves: what others want, what devices gave, what came, what goes.
    fn turn(&mut self, cx: &mut Context<'_>) -> Poll<Result<End, End>> {
        loop {
            for order in self.handle.control.take() {
                self.obey(order)?;
            }
            self.pass_gates(cx);
            while !self.running.is_empty()
                && let Poll::Ready(Some(done)) = self.running.poll_next_unpin(cx)
            {
                self.done(done, cx);
            }
            self.parse(cx)?;
            self.release_waiting(cx)?;
            self.resume(cx);
            let written = match self.output.poll_flush(&mut self.socket, &mut self.pool, cx)? {
                Poll::Ready(bytes) => {
                    count(&self.handle.counters.wire_out, bytes as u64);
                    bytes
                }
                Poll::Pending => 0,
            };
            if let Some(end) = &self.end {
                if self.output.bytes() == 0 || matches!(end, End::Ordered(_)) {
                    return Poll::Ready(Ok(self.end.take().unwrap_or(End::Eof)));
                }
            } else if self.may_answer() {
                match self.input.poll_fill(&mut self.socket, cx)? {
                    Poll::Ready(0) => return Poll::Ready(Ok(End::Eof)),
                    Poll::Ready(bytes) => {
                        count(&self.handle.counters.wire_in, bytes as u64);
                        self.heard = true;
                        continue;
                    }
                    Poll::Pending => {}
                }
            }
            if written > 0 {
                continue;
            }
            if self.timer.as_mut().poll(cx).is_ready() {
                self.tick()?;
                continue;
            }
            return Poll::Pending;
        }
    }

    /// Notes what an initiator does against the protocol. Only the first is a line in an ordinary log, or a session
    /// could fill a disk with them.
    pub(super) fn breach(&mut self, what: &dyn std::fmt::Display) {
        self.breaches += 1;
        let (initiator, peer) = (&self.initiator, self.handle.peer);
        if self.breaches == 1 {
            tracing::warn!(%initiator, %peer, breach = %what, "against the protocol; more of it is logged at debug level");
        } else {
            tracing::debug!(%initiator, %peer, breach = %what, "against the protocol");
        }
    }

    /// May a piece of a read be begun?
    pub(super) fn has_room(&self) -> bool {
        self.may_answer() && self.reading_bytes < READING_LIMIT
    }

    /// May a PDU be taken? Not only while a device is slow: pings and task management must be heard then, and reads wait in
    /// [`Self::stalled`]; the window bounds how many.
    fn may_answer(&self) -> bool {
        self.output.bytes() < OUTPUT_LIMIT
    }

    fn parse(&mut self, cx: &mut Context<'_>) -> Result<(), End> {
        while self.end.is_none() && self.may_answer() {
            // The input is lent out while its PDU is looked at: what a PDU does never touches the input.
            let mut input = std::mem::replace(&mut self.input, Input::new());
            let result = match self.receiving.split(input.unparsed()) {
                Ok(Split::Frame(frame)) => {
                    let bytes = frame.bytes;
                    let result = self.received(frame.bhs, frame.ahs, frame.data, cx);
                    input.consume(bytes);
                    result.map(|()| true)
                }
                Ok(Split::Need(bytes)) => {
                    input.require(bytes);
                    Ok(false)
                }
                Err(error) => Err(error.into()),
            };
            self.input = input;
            match result {
                Ok(true) => {}
                Ok(false) => break,
                Err(End::Frame(FrameError::DataDigest)) => {
                    // ErrorRecoveryLevel 0: the initiator is told, then the connection ends (RFC 7143 §7.8).
                    let mut bhs = [0; crate::pdu::BHS_BYTES];
                    bhs.copy_from_slice(&self.input.unparsed()[..crate::pdu::BHS_BYTES]);
                    self.reject(reject_reason::DATA_DIGEST, &bhs);
                    self.end = Some(End::Frame(FrameError::DataDigest));
                }
                Err(end) => return Err(end),
            }
        }
        Ok(())
    }

    fn obey(&mut self, order: Order) -> Result<(), End> {
        match order {
            Order::Close(reason) => return Err(End::Ordered(reason)),
            Order::AskLogout(seconds) => self.ask_logout(seconds),
            Order::Abort(lun, tickets) => {
                let mut serials = self.abort_where(|task| task.lun == lun);
                // A preemption that waits itself has nothing on the device, and might wait for the one that is waiting here.
                let waits = |serial| {
                    let mut fences = self.fences.iter();
                    fences
                        .any(|(_, done)| matches!(done, Done::Task { serial: other, .. } if *other == serial))
                };
                serials.retain(|&serial| !waits(serial));
                if !serials.is_empty() {
                    let _tickets = tickets;
                    self.owed.push(Owed { serials, _tickets });
                }
            }
        }
        Ok(())
    }

    /// The ping's interval is over.
    fn tick(&mut self) -> Result<(), End> {
        let interval = self.shared.config.ping_after;
        if !self.heard && self.pinged {
            return Err(End::Silent(interval));
        }
        if !self.heard {
            // Who is idle keeps no buffers: there may be thousands of them.
            self.pool = Pool::default();
            self.input.rest();
            self.pinged = true;
            let ping = NopIn {
                lun: crate::pdu::LunField(0),
                itt: NO_TAG,
                ttt: self.new_ttt(),
                stat_sn: self.stat_sn,
                exp_cmd_sn: self.window.expected(),
                max_cmd_sn: self.window.max(),
            };
            self.send(&Pdu::NopIn(ping), &[]);
        } else {
            self.pinged = false;
        }
        self.heard = false;
        self.timer.as_mut().reset(Instant::now() + interval);
        Ok(())
    }

    /// After the end: writes in progress end first, because a new session of the same initiator must not be overtaken
    /// by them; then the session is gone.
    async fn finish(mut self: Box<Self>) {
        drop(std::mem::take(&mut self.flushes));
        while !self.changing.is_empty() {
            match self.running.next().await {
                Some(Done::Task { serial, .. }) => {
                    self.changing.remove(&serial);
                }
                Some(Done::Piece(..)) => {}
                None => break,
            }
        }
        let Some(target) = self.target.take() else { return };
        for (unit, nexus) in target.units.iter().zip(&self.nexuses) {
            unit.logical.detach(nexus);
        }
        target.remove(&self.handle);
    }

    /// A header that is refused goes back with the reason.
    pub(super) fn reject(&mut self, reason: u8, bhs: &crate::pdu::Bhs) {
        let reject = Reject {
            reason,
            stat_sn: self.next_stat_sn(),
            exp_cmd_sn: self.window.expected(),
            max_cmd_sn: self.window.max(),
            data_sn: 0,
        };
        self.send(&Pdu::Reject(reject), bhs);
    }
}

/// The piece of a read for who takes so many bytes at once: whole pages, so that no piece splits one.
pub(super) fn piece_bytes(peer_max_recv_bytes: u32) -> usize {
    match (peer_max_recv_bytes as usize).min(PIECE_BYTES) {
        bytes if bytes >= 4096 => bytes / 4096 * 4096,
        bytes => bytes,
    }
}

/// A discovery session is in no target's list; it needs a handle all the same.
fn discovery_handle(established: &Established, peer: SocketAddr) -> Arc<SessionHandle> {
    Arc::new(SessionHandle {
        port: crate::scsi::reservation::InitiatorPort {
            name: established.initiator.clone(),
            isid: established.isid,
        },
        peer,
        tsih: established.tsih,
        security: established.security.clone(),
        counters: Counters::default(),
        control: super::registry::Control::default(),
    })
}
