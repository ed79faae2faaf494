//! The task that owns a session's socket: bytes in, bytes out, time. Every choice is in [`Exchange`] and
//! [`Liveness`].

use std::sync::Arc;

use bytes::BufMut;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use treeboot_types::Tick;

use super::error::{CommandError, SessionEnd};
use super::exchange::{Exchange, Incoming, Job, Notice, Place};
use super::liveness::{Liveness, Verdict};
use crate::pdu::{BHS_BYTES, FrameError};

/// Buffer for headers and small data segments in bytes. Larger segments are read past it, into their own buffer.
const INPUT_BYTES: usize = 16 * 1024;

/// Length of a digest in bytes (RFC 7143 §11.2.3).
const DIGEST_BYTES: usize = 4;

/// Reads from the socket before the task looks at its other business.
const READS_AT_ONCE: usize = 64;

/// How long a logout may take before the connection is simply closed.
const LOGOUT_MS: u64 = 500;

/// How long commands under way may take once the target has asked us to log out.
const DISMISSAL_MS: u64 = 2_000;

/// Milliseconds since a fixed moment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clock(Instant);

impl Clock {
    pub(super) fn start() -> Self {
        Self(Instant::now())
    }

    pub(super) fn now(self) -> Tick {
        Tick(self.0.elapsed().as_millis() as u64)
    }

    pub(super) fn instant(self, tick: Tick) -> Instant {
        // A year ahead stands for "never": the sum stays far from the clock's own end.
        const NEVER_MS: u64 = 365 * 24 * 3600 * 1000;
        self.0 + std::time::Duration::from_millis(tick.0.min(NEVER_MS))
    }
}

/// How a session is.
#[derive(Debug, Clone)]
pub(super) enum Health {
    /// Answering.
    Fine,
    /// It was pinged because it was silent.
    Silent,
    /// Over.
    Ended(SessionEnd),
}

/// The PDU whose bytes are arriving.
struct Arriving {
    incoming: Incoming,
    ahs_left: usize,
    data_left: usize,
    padding_left: usize,
    /// Bytes of the data digest that are to come.
    sum_left: usize,
    sum: [u8; DIGEST_BYTES],
    /// CRC32C of data and padding so far, where there is a data digest.
    crc: u32,
    side: Vec<u8>,
}

impl Arriving {
    fn is_whole(&self) -> bool {
        self.ahs_left + self.data_left + self.padding_left + self.sum_left == 0
    }

    /// Was what arrived as a whole also what was sent? Always so without a digest.
    fn is_sound(&self, digest: bool) -> bool {
        !digest || self.incoming.data_bytes == 0 || self.sum == self.crc.to_le_bytes()
    }
}

/// Why no more commands are taken.
struct Closing {
    why: SessionEnd,
    until: Tick,
    logout_sent: bool,
}

pub(super) struct Connection {
    stream: TcpStream,
    exchange: Exchange,
    liveness: Liveness,
    clock: Clock,
    jobs: mpsc::Receiver<Job>,
    health: watch::Sender<Health>,
    silent: bool,
    input: Box<[u8]>,
    input_start: usize,
    input_end: usize,
    arriving: Option<Arriving>,
    output: Vec<u8>,
    output_start: usize,
    closing: Option<Closing>,
    /// When the timer rings.
    armed: Tick,
}

impl Connection {
    pub(super) fn new(
        stream: TcpStream,
        exchange: Exchange,
        liveness: Liveness,
        clock: Clock,
        jobs: mpsc::Receiver<Job>,
        health: watch::Sender<Health>,
    ) -> Self {
        Self {
            stream,
            exchange,
            liveness,
            clock,
            jobs,
            health,
            silent: false,
            input: vec![0; INPUT_BYTES].into_boxed_slice(),
            input_start: 0,
            input_end: 0,
            arriving: None,
            output: Vec::new(),
            output_start: 0,
            closing: None,
            armed: Tick(0),
        }
    }

    /// Runs the session to its end.
    pub(super) async fn run(mut self) {
        let why = match self.serve().await {
            Ok(why) => why,
            // A connection that breaks while it is being closed is closed.
            Err(why) => self.closing.take().map_or(why, |closing| closing.why),
        };
        self.refuse_jobs(&why);
        self.exchange.end(&why);
    }

    /// Says that the session is over and ends what has not begun.
    fn refuse_jobs(&mut self, why: &SessionEnd) {
        self.health.send_replace(Health::Ended(why.clone()));
        self.jobs.close();
        while let Ok(mut job) = self.jobs.try_recv() {
            job.fail(CommandError::Lost(why.clone()));
        }
    }

    async fn serve(&mut self) -> Result<SessionEnd, SessionEnd> {
        let sleep = tokio::time::sleep_until(self.clock.instant(self.armed));
        tokio::pin!(sleep);
        loop {
            if let Some(end) = self.pump_in()? {
                return Ok(end);
            }
            self.take_jobs();
            if self.clock.now() >= self.armed {
                self.tick()?;
            }
            if let Some(end) = self.close_when_done() {
                return Ok(end);
            }
            self.pump_out()?;
            self.liveness.owed(self.clock.now(), self.exchange.outstanding());
            self.tell_health();
            let due = self.liveness.due();
            if due < self.armed {
                self.armed = due;
            }
            let at = self.clock.instant(self.armed);
            if sleep.deadline() != at {
                sleep.as_mut().reset(at);
            }
            let interest = match self.output.is_empty() {
                true => Interest::READABLE,
                false => Interest::READABLE | Interest::WRITABLE,
            };
            let may_take = self.closing.is_none() && self.exchange.has_room();
            tokio::select! {
                biased;
                ready = self.stream.ready(interest) => { ready.map_err(broken)?; }
                job = self.jobs.recv(), if may_take => self.take_job(job),
                () = &mut sleep => {}
            }
        }
    }

    fn take_jobs(&mut self) {
        while self.closing.is_none() && self.exchange.has_room() {
            match self.jobs.try_recv() {
                Ok(job) => self.take_job(Some(job)),
                Err(_) => return, // none now; that there will be none, `recv` tells
            }
        }
    }

    fn take_job(&mut self, job: Option<Job>) {
        let now = self.clock.now();
        match job {
            Some(job) => self.exchange.submit(now, job),
            None => self.close(SessionEnd::Closed, LOGOUT_MS),
        }
    }

    fn close(&mut self, why: SessionEnd, within_ms: u64) {
        let until = self.clock.now().after_ms(within_ms);
        self.closing.get_or_insert(Closing {
            why,
            until,
            logout_sent: false,
        });
        self.armed = self.armed.min(until);
    }

    /// Logs out once nobody waits for anything; ends when that takes too long.
    fn close_when_done(&mut self) -> Option<SessionEnd> {
        let closing = self.closing.as_mut()?;
        let now = self.clock.now();
        if now >= closing.until {
            return Some(closing.why.clone());
        }
        if !closing.logout_sent && self.exchange.wanted() == 0 {
            closing.logout_sent = true;
            closing.until = closing.until.min(now.after_ms(LOGOUT_MS));
            self.armed = self.armed.min(closing.until);
            self.exchange.logout();
        }
        None
    }

    fn tick(&mut self) -> Result<(), SessionEnd> {
        let now = self.clock.now();
        match self.liveness.poll(now) {
            Verdict::Fine => {}
            Verdict::Ping => self.exchange.ping(),
            Verdict::Dead { silent_ms } => return Err(SessionEnd::Silent { ms: silent_ms }),
        }
        let deadline = self.exchange.expire(now)?;
        self.armed = self.liveness.due();
        if let Some(deadline) = deadline {
            self.armed = self.armed.min(deadline);
        }
        if let Some(closing) = &self.closing {
            self.armed = self.armed.min(closing.until);
        }
        Ok(())
    }

    fn tell_health(&mut self) {
        if self.closing.is_none() && self.liveness.suspect() != self.silent {
            self.silent = self.liveness.suspect();
            self.health.send_replace(match self.silent {
                true => Health::Silent,
                false => Health::Fine,
            });
        }
    }

    fn pump_out(&mut self) -> Result<(), SessionEnd> {
        loop {
            if self.output_start == self.output.len() {
                self.output.clear();
                self.output_start = 0;
                self.exchange.produce(&mut self.output);
                if self.output.is_empty() {
                    return Ok(());
                }
            }
            match self.stream.try_write(&self.output[self.output_start..]) {
                Ok(sent) => self.output_start += sent,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(broken(error)),
            }
        }
    }

    /// Takes what has arrived; `Some` when the target ended the session in good order.
    fn pump_in(&mut self) -> Result<Option<SessionEnd>, SessionEnd> {
        for _ in 0..READS_AT_ONCE {
            if self.digest()? {
                let why = self.closing.as_ref().map(|closing| closing.why.clone());
                return Ok(Some(why.unwrap_or(SessionEnd::Dismissed)));
            }
            match self.receive() {
                Ok(0) => return Err(SessionEnd::ClosedByTarget),
                Ok(_) => self.liveness.heard(self.clock.now()),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(broken(error)),
            }
        }
        Ok(None)
    }

    /// One read from the socket, when the buffer holds nothing that [`digest`](Self::digest) could use.
    fn receive(&mut self) -> std::io::Result<usize> {
        if let Some(arriving) = &mut self.arriving
            && arriving.ahs_left == 0
            && arriving.data_left > 0
            && let Place::Slot(at) = arriving.incoming.place
        {
            let digest = self.exchange.data_digest();
            if let Some(sink) = self.exchange.sink(at) {
                let before = sink.len();
                let read = self.stream.try_read_buf(&mut sink.limit(arriving.data_left))?;
                if digest {
                    arriving.crc = crc32c::crc32c_append(arriving.crc, &sink[before..]);
                }
                arriving.data_left -= read;
                return Ok(read);
            }
        }
        self.input.copy_within(self.input_start..self.input_end, 0);
        self.input_end -= self.input_start;
        self.input_start = 0;
        let read = self.stream.try_read(&mut self.input[self.input_end..])?;
        self.input_end += read;
        Ok(read)
    }

    /// Works through the buffer; `true` at the session's end.
    fn digest(&mut self) -> Result<bool, SessionEnd> {
        loop {
            if self.arriving.is_none() {
                let buffered = &self.input[self.input_start..self.input_end];
                let Some(bhs) = buffered.first_chunk::<BHS_BYTES>() else {
                    return Ok(false);
                };
                let mut header_bytes = BHS_BYTES;
                if self.exchange.header_digest() {
                    // Nothing of a header is believed before its digest was seen; with the longest additional
                    // headers that is a fraction of the buffer.
                    header_bytes += usize::from(bhs[4]) * 4;
                    let (header, rest) = match buffered.split_at_checked(header_bytes) {
                        Some((header, rest)) if rest.len() >= DIGEST_BYTES => (header, rest),
                        _ => return Ok(false),
                    };
                    if rest[..DIGEST_BYTES] != crc32c::crc32c(header).to_le_bytes() {
                        return Err(SessionEnd::Protocol(FrameError::HeaderDigest.into()));
                    }
                    header_bytes += DIGEST_BYTES;
                }
                let incoming = self.exchange.header(bhs).map_err(SessionEnd::Protocol)?;
                self.input_start += header_bytes;
                let has_sum = self.exchange.data_digest() && incoming.data_bytes > 0;
                self.arriving = Some(Arriving {
                    ahs_left: if header_bytes == BHS_BYTES {
                        incoming.ahs_bytes
                    } else {
                        0
                    },
                    data_left: incoming.data_bytes,
                    padding_left: incoming.data_bytes.next_multiple_of(4) - incoming.data_bytes,
                    sum_left: if has_sum { DIGEST_BYTES } else { 0 },
                    sum: [0; DIGEST_BYTES],
                    crc: 0,
                    side: Vec::new(),
                    incoming,
                });
            }
            self.take_segment();
            let Some(arrived) = self.arriving.take_if(|arriving| arriving.is_whole()) else {
                return Ok(false);
            };
            if !arrived.is_sound(self.exchange.data_digest()) {
                // ErrorRecoveryLevel 0: the session ends, and its reads are made elsewhere (RFC 7143 §7.8).
                return Err(SessionEnd::Protocol(FrameError::DataDigest.into()));
            }
            let notice = self.exchange.finish(&arrived.incoming, &arrived.side);
            match notice.map_err(SessionEnd::Protocol)? {
                Notice::Nothing => {}
                Notice::Pong => self.liveness.ping_answered(),
                Notice::LogoutWanted => {
                    // To the outside this is the end: what comes next belongs on another path, now.
                    self.refuse_jobs(&SessionEnd::Dismissed);
                    self.close(SessionEnd::Dismissed, DISMISSAL_MS);
                }
                Notice::End => return Ok(true),
            }
        }
    }

    /// Moves what is buffered of the arriving PDU to where it belongs.
    fn take_segment(&mut self) {
        let digest = self.exchange.data_digest();
        let Some(arriving) = &mut self.arriving else {
            return;
        };
        let skip = |left: &mut usize, start: &mut usize, end: usize| {
            let some = (*left).min(end - *start);
            *left -= some;
            *start += some;
        };
        skip(&mut arriving.ahs_left, &mut self.input_start, self.input_end);
        let some = arriving.data_left.min(self.input_end - self.input_start);
        let data = &self.input[self.input_start..self.input_start + some];
        match arriving.incoming.place {
            Place::Slot(at) => {
                if let Some(sink) = self.exchange.sink(at) {
                    sink.put_slice(data);
                }
            }
            Place::Side => arriving.side.extend_from_slice(data),
            Place::Nowhere => {}
        }
        if digest {
            arriving.crc = crc32c::crc32c_append(arriving.crc, data);
        }
        arriving.data_left -= some;
        self.input_start += some;
        if arriving.data_left > 0 {
            return;
        }
        let padding_at = self.input_start;
        skip(&mut arriving.padding_left, &mut self.input_start, self.input_end);
        if digest {
            let padding = &self.input[padding_at..self.input_start];
            arriving.crc = crc32c::crc32c_append(arriving.crc, padding);
        }
        while arriving.padding_left == 0 && arriving.sum_left > 0 && self.input_start < self.input_end {
            arriving.sum[DIGEST_BYTES - arriving.sum_left] = self.input[self.input_start];
            arriving.sum_left -= 1;
            self.input_start += 1;
        }
    }
}

fn broken(error: std::io::Error) -> SessionEnd {
    SessionEnd::Broken(Arc::new(error))
}
