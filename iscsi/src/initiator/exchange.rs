//! The initiator's side of the full feature phase, without I/O: tags, the command window, data in both
//! directions, responses.
//!
//! The shell (`connection.rs`) reads a header, asks [`Exchange::header`] where the data segment belongs, reads it
//! there, and calls [`Exchange::finish`]; what is to be sent comes from [`Exchange::produce`]. So the bytes of a
//! read go from the socket into the buffer that its caller gets.

mod job;
mod send;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};
use treeboot_types::Tick;

pub(super) use job::{Completed, Job, Transfer};

use super::error::{CommandError, ProtocolError, SenseCode, SessionEnd};
use crate::pdu::{Bhs, DataIn, FrameError, Framing, LunField, NO_TAG, Pdu, R2t, Residual, ScsiResponse};

/// Commands under way at once on one session. Depth 128 fills a 10 Gbit/s link with 64 KiB reads at 7 ms.
pub(super) const SLOTS: usize = 128;

/// The longest data segment in bytes that we accept: one PDU for every read up to this size.
pub(super) const MAX_RECEIVE_BYTES: u32 = 1 << 20;

/// The longest data segment in bytes of anything but Data-In: sense data, text, ping data, a rejected header.
const MAX_SIDE_BYTES: u32 = 64 * 1024;

/// Bytes prepared for the socket at once; the rest of a write waits in its caller's buffer.
const OUT_BYTES: usize = 256 * 1024;

/// R2Ts of one command that wait to be served. A target may have as many outstanding as was negotiated.
const R2TS_AT_ONCE: usize = 16;

/// Answers to a target's pings that wait to be sent. An honest target has one outstanding.
const CONTROLS_AT_ONCE: usize = 64;

/// Tags that no command has: the low half of a command's tag is its slot.
const PING_ITT: u32 = 0xffff_fff0;
const LOGOUT_ITT: u32 = 0xffff_fff1;
/// Set in the tag of the request that aborts the command of the same slot.
const ABORT_BIT: u32 = 0x8000;

/// GOOD (SAM-5 §5.3).
const GOOD: u8 = 0x00;
/// CHECK CONDITION.
const CHECK_CONDITION: u8 = 0x02;

/// What was agreed on at login, as far as it matters here.
#[derive(Debug, Clone, Copy)]
pub(super) struct Terms {
    /// A CRC32C follows each header.
    pub(super) header_digest: bool,
    /// A CRC32C follows data.
    pub(super) data_digest: bool,
    /// The longest data segment in bytes that the target accepts.
    pub(super) max_send_bytes: u32,
    /// The most that a write sends with its command, in bytes; 0 without immediate data.
    pub(super) immediate_bytes: u32,
    /// The most that a write sends without being asked, immediate data included, in bytes; 0 with InitialR2T=Yes.
    pub(super) unsolicited_bytes: u32,
    /// The session's first CmdSN.
    pub(super) cmd_sn: u32,
    /// The next StatSN.
    pub(super) exp_stat_sn: u32,
    /// The highest CmdSN that the target takes now.
    pub(super) max_cmd_sn: u32,
}

/// Where a PDU's data segment goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// To the end of [`Exchange::sink`] of this slot.
    Slot(usize),
    /// To a buffer that [`Exchange::finish`] gets.
    Side,
    /// Nowhere: nobody waits for it any more.
    Nowhere,
}

/// A header whose data segment is still to come.
#[derive(Debug)]
pub(super) struct Incoming {
    pub(super) pdu: Pdu,
    pub(super) place: Place,
    pub(super) data_bytes: usize,
    /// Additional header segments, which we have no use for.
    pub(super) ahs_bytes: usize,
}

/// What a finished PDU means beyond the commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Notice {
    Nothing,
    /// Our ping was answered.
    Pong,
    /// The target wants us to log out.
    LogoutWanted,
    /// The target drops the connection, or has answered our logout.
    End,
}

#[derive(Debug)]
struct Slot {
    /// The high half of the tag: tells this command from earlier ones in the same slot.
    generation: u16,
    task: Option<Task>,
}

#[derive(Debug)]
struct Task {
    job: Job,
    sent: bool,
    /// Bytes that came in, or the data of a read that nobody wants any more.
    buffer: BytesMut,
    received: u32,
    data_sn: u32,
    deadline: Tick,
    aborting: bool,
    r2ts: usize,
}

#[derive(Debug)]
struct Burst {
    slot: usize,
    itt: u32,
    ttt: u32,
    at: u32,
    end: u32,
    data_sn: u32,
}

#[derive(Debug)]
enum Control {
    Ping,
    Pong { lun: LunField, ttt: u32, data: Vec<u8> },
    Abort { slot: usize },
    Logout,
}

/// One session's books.
#[derive(Debug)]
pub(super) struct Exchange {
    terms: Terms,
    framing: Framing,
    command_ms: u64,
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// Commands that were not sent yet, in order.
    waiting: VecDeque<usize>,
    bursts: VecDeque<Burst>,
    controls: VecDeque<Control>,
}

impl Exchange {
    pub(super) fn new(terms: Terms, command_ms: u64) -> Self {
        let slot = |_| Slot {
            generation: 0,
            task: None,
        };
        Self {
            terms,
            framing: Framing {
                header_digest: terms.header_digest,
                data_digest: terms.data_digest,
                max_data_bytes: MAX_RECEIVE_BYTES,
            },
            command_ms,
            slots: (0..SLOTS).map(slot).collect(),
            free: (0..SLOTS).rev().collect(),
            waiting: VecDeque::new(),
            bursts: VecDeque::new(),
            controls: VecDeque::new(),
        }
    }

    /// A CRC32C follows each header that comes.
    pub(super) fn header_digest(&self) -> bool {
        self.framing.header_digest
    }

    /// A CRC32C follows data that come.
    pub(super) fn data_digest(&self) -> bool {
        self.framing.data_digest
    }

    /// A command can be taken.
    pub(super) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Commands that were taken and have not ended.
    pub(super) fn outstanding(&self) -> usize {
        SLOTS - self.free.len()
    }

    /// Commands that somebody still waits for.
    pub(super) fn wanted(&self) -> usize {
        let tasks = self.slots.iter().filter_map(|slot| slot.task.as_ref());
        tasks.filter(|task| !task.job.is_abandoned()).count()
    }

    /// Takes a command; there must be [room](Self::has_room).
    pub(super) fn submit(&mut self, now: Tick, job: Job) {
        let Some(at) = self.free.pop() else {
            debug_assert!(false, "the caller asks for room first");
            return;
        };
        let slot = &mut self.slots[at];
        slot.generation = slot.generation.wrapping_add(1);
        slot.task = Some(Task {
            job,
            sent: false,
            buffer: BytesMut::new(),
            received: 0,
            data_sn: 0,
            deadline: now.after_ms(self.command_ms),
            aborting: false,
            r2ts: 0,
        });
        self.waiting.push_back(at);
    }

    /// Asks the target for a sign of life.
    pub(super) fn ping(&mut self) {
        self.controls.push_back(Control::Ping);
    }

    /// Asks for the end of the session.
    pub(super) fn logout(&mut self) {
        self.controls.push_back(Control::Logout);
    }

    /// Ends what is over its limit; gives the earliest deadline of the rest.
    ///
    /// # Errors
    /// [`SessionEnd::Stuck`] when commands outlived even their abortion and no slot is left.
    pub(super) fn expire(&mut self, now: Tick) -> Result<Option<Tick>, SessionEnd> {
        let mut earliest = None::<Tick>;
        let mut stuck = 0;
        for at in 0..SLOTS {
            let Some(task) = &mut self.slots[at].task else {
                continue;
            };
            if task.aborting {
                stuck += 1;
            } else if now < task.deadline {
                earliest = Some(earliest.map_or(task.deadline, |e| e.min(task.deadline)));
            } else {
                task.job.fail(CommandError::TimedOut { ms: self.command_ms });
                if task.sent {
                    task.aborting = true;
                    self.controls.push_back(Control::Abort { slot: at });
                } else {
                    self.waiting.retain(|waiting| *waiting != at);
                    self.release(at);
                }
            }
        }
        if stuck == SLOTS {
            return Err(SessionEnd::Stuck { commands: stuck });
        }
        Ok(earliest)
    }

    /// Ends every command with the session.
    pub(super) fn end(&mut self, why: &SessionEnd) {
        for at in 0..SLOTS {
            if let Some(task) = &mut self.slots[at].task {
                task.job.fail(CommandError::Lost(why.clone()));
                self.release(at);
            }
        }
        self.waiting.clear();
        self.bursts.clear();
    }

    fn release(&mut self, at: usize) -> Option<Task> {
        let task = self.slots[at].task.take();
        if task.is_some() {
            self.free.push(at);
        }
        task
    }

    fn itt(&self, at: usize) -> u32 {
        u32::from(self.slots[at].generation) << 16 | at as u32
    }

    fn find(&self, itt: u32) -> Result<usize, ProtocolError> {
        let at = (itt & 0xffff) as usize;
        match self.slots.get(at) {
            Some(slot) if self.itt(at) == itt && slot.task.as_ref().is_some_and(|t| t.sent) => Ok(at),
            _ => Err(ProtocolError::UnknownTask { itt }),
        }
    }

    fn task(&mut self, at: usize) -> Result<&mut Task, ProtocolError> {
        let itt = self.itt(at);
        let task = self.slots.get_mut(at).and_then(|slot| slot.task.as_mut());
        task.ok_or(ProtocolError::UnknownTask { itt })
    }

    /// Where the data segment of [`Place::Slot`] is appended.
    pub(super) fn sink(&mut self, at: usize) -> Option<&mut BytesMut> {
        self.slots.get_mut(at)?.task.as_mut().map(|task| &mut task.buffer)
    }

    /// Takes a header and says where its data segment goes.
    ///
    /// # Errors
    /// What the target did against the rules; the session is over.
    pub(super) fn header(&mut self, bhs: &Bhs) -> Result<Incoming, ProtocolError> {
        let data_bytes = u32::from_be_bytes([0, bhs[5], bhs[6], bhs[7]]);
        let ahs_bytes = usize::from(bhs[4]) * 4;
        let pdu = Pdu::parse(bhs)?;
        let limit = match &pdu {
            Pdu::DataIn(_) => MAX_RECEIVE_BYTES,
            _ => MAX_SIDE_BYTES,
        };
        if data_bytes > limit {
            let bytes = data_bytes;
            return Err(FrameError::TooLong { bytes, limit }.into());
        }
        let place = match &pdu {
            Pdu::DataIn(data_in) => self.place(data_in, data_bytes)?,
            _ => Place::Side,
        };
        Ok(Incoming {
            pdu,
            place,
            data_bytes: data_bytes as usize,
            ahs_bytes,
        })
    }

    fn place(&mut self, pdu: &DataIn, data_bytes: u32) -> Result<Place, ProtocolError> {
        let at = self.find(pdu.itt)?;
        let task = self.task(at)?;
        let expected = task.job.read_bytes();
        let end = u64::from(pdu.buffer_offset) + u64::from(data_bytes);
        if end > u64::from(expected) {
            return Err(ProtocolError::TooMuch { expected, end });
        }
        // A final PDU without data carries only the status; its offset means nothing.
        if pdu.buffer_offset != task.received && data_bytes > 0 {
            return Err(ProtocolError::Offset {
                expected: task.received,
                got: pdu.buffer_offset,
            });
        }
        if pdu.data_sn != task.data_sn {
            return Err(ProtocolError::DataSn {
                expected: task.data_sn,
                got: pdu.data_sn,
            });
        }
        if task.job.is_abandoned() {
            task.buffer = BytesMut::new();
            return Ok(Place::Nowhere);
        }
        if task.buffer.capacity() == 0 {
            task.buffer.reserve(expected as usize);
        }
        Ok(Place::Slot(at))
    }

    /// Takes a PDU whose data segment has arrived; `side` is that of [`Place::Side`].
    ///
    /// # Errors
    /// What the target did against the rules; the session is over.
    pub(super) fn finish(&mut self, incoming: &Incoming, side: &[u8]) -> Result<Notice, ProtocolError> {
        match &incoming.pdu {
            Pdu::DataIn(pdu) => self.data_in(pdu, incoming.data_bytes as u32),
            Pdu::ScsiResponse(pdu) => self.response(pdu, side),
            Pdu::R2t(pdu) => self.r2t(pdu),
            Pdu::NopIn(pdu) => {
                self.window(pdu.exp_cmd_sn, pdu.max_cmd_sn);
                if pdu.itt != NO_TAG {
                    self.status(pdu.stat_sn);
                    return Ok(if pdu.itt == PING_ITT {
                        Notice::Pong
                    } else {
                        Notice::Nothing
                    });
                }
                if pdu.ttt != NO_TAG {
                    self.pong(pdu.lun, pdu.ttt, side)?;
                }
                Ok(Notice::Nothing)
            }
            Pdu::TaskManagementResponse(pdu) => {
                self.window(pdu.exp_cmd_sn, pdu.max_cmd_sn);
                self.status(pdu.stat_sn);
                // Aborted, or ended before: either way no response to the command follows.
                if let Ok(at) = self.find(pdu.itt & !ABORT_BIT)
                    && pdu.itt & ABORT_BIT != 0
                    && self.task(at)?.aborting
                {
                    self.drop_bursts(at);
                    self.release(at);
                }
                Ok(Notice::Nothing)
            }
            Pdu::AsyncMessage(pdu) => {
                self.window(pdu.exp_cmd_sn, pdu.max_cmd_sn);
                self.status(pdu.stat_sn);
                Ok(match pdu.event {
                    1 => Notice::LogoutWanted,
                    2 | 3 => Notice::End,
                    _ => Notice::Nothing,
                })
            }
            Pdu::Reject(pdu) => {
                self.window(pdu.exp_cmd_sn, pdu.max_cmd_sn);
                self.status(pdu.stat_sn);
                self.rejected(pdu.reason, side)
            }
            Pdu::LogoutResponse(pdu) => {
                self.status(pdu.stat_sn);
                Ok(Notice::End)
            }
            other => Err(ProtocolError::Unexpected {
                opcode: other.encode()[0] & 0x3f,
                when: "in the full feature phase",
            }),
        }
    }

    fn data_in(&mut self, pdu: &DataIn, data_bytes: u32) -> Result<Notice, ProtocolError> {
        self.window(pdu.exp_cmd_sn, pdu.max_cmd_sn);
        let at = self.find(pdu.itt)?;
        let task = self.task(at)?;
        task.received += data_bytes;
        task.data_sn = task.data_sn.wrapping_add(1);
        if let Some(status) = pdu.status {
            self.status(pdu.stat_sn);
            let result = match status {
                GOOD => Ok(pdu.residual),
                status => Err(CommandError::Status { status }),
            };
            self.complete(at, result);
        }
        Ok(Notice::Nothing)
    }

    fn response(&mut self, pdu: &ScsiResponse, side: &[u8]) -> Result<Notice, ProtocolError> {
        self.window(pdu.exp_cmd_sn, pdu.max_cmd_sn);
        self.status(pdu.stat_sn);
        let at = self.find(pdu.itt)?;
        let result = match (pdu.response, pdu.status) {
            (0, GOOD) => Ok(pdu.residual),
            (0, CHECK_CONDITION) => Err(sense_of(side).map_or(
                CommandError::Status {
                    status: CHECK_CONDITION,
                },
                CommandError::Sense,
            )),
            (0, status) => Err(CommandError::Status { status }),
            (response, _) => Err(CommandError::TargetFailure { response }),
        };
        self.complete(at, result);
        Ok(Notice::Nothing)
    }

    fn complete(&mut self, at: usize, result: Result<Residual, CommandError>) {
        self.drop_bursts(at);
        if let Some(mut task) = self.release(at) {
            match result {
                Ok(residual) => task.job.complete(Completed {
                    data: task.buffer.freeze(),
                    residual,
                }),
                Err(error) => task.job.fail(error),
            }
        }
    }

    fn drop_bursts(&mut self, at: usize) {
        self.bursts.retain(|burst| burst.slot != at);
    }

    fn r2t(&mut self, pdu: &R2t) -> Result<Notice, ProtocolError> {
        self.window(pdu.exp_cmd_sn, pdu.max_cmd_sn);
        let at = self.find(pdu.itt)?;
        let task = self.task(at)?;
        let expected = task.job.write_bytes();
        let end = u64::from(pdu.buffer_offset) + u64::from(pdu.desired_bytes);
        if end > u64::from(expected) || pdu.desired_bytes == 0 {
            return Err(ProtocolError::TooMuch { expected, end });
        }
        if pdu.ttt == NO_TAG {
            return Err(ProtocolError::UnknownTask { itt: NO_TAG });
        }
        task.r2ts += 1;
        if task.r2ts > R2TS_AT_ONCE {
            return Err(ProtocolError::Endless {
                what: "the R2Ts of one command",
            });
        }
        self.bursts.push_back(Burst {
            slot: at,
            itt: pdu.itt,
            ttt: pdu.ttt,
            at: pdu.buffer_offset,
            end: end as u32,
            data_sn: 0,
        });
        Ok(Notice::Nothing)
    }

    fn pong(&mut self, lun: LunField, ttt: u32, data: &[u8]) -> Result<(), ProtocolError> {
        if self.controls.len() >= CONTROLS_AT_ONCE {
            return Err(ProtocolError::Endless {
                what: "the target's pings",
            });
        }
        let data = data
            .iter()
            .copied()
            .take(self.terms.max_send_bytes as usize)
            .collect();
        self.controls.push_back(Control::Pong { lun, ttt, data });
        Ok(())
    }

    fn rejected(&mut self, reason: u8, header: &[u8]) -> Result<Notice, ProtocolError> {
        let bhs = header.first_chunk::<{ crate::pdu::BHS_BYTES }>();
        let command = match bhs.map(Pdu::parse) {
            Some(Ok(Pdu::ScsiCommand(command))) => self.find(command.itt).ok(),
            Some(Ok(Pdu::DataOut(data))) => self.find(data.itt).ok(),
            // A target that does not know how to abort answers nothing else.
            Some(Ok(Pdu::TaskManagementRequest(_))) => return Ok(Notice::Nothing),
            Some(Ok(Pdu::NopOut(_))) => return Ok(Notice::Pong),
            _ => None,
        };
        match command {
            Some(at) => {
                self.complete(at, Err(CommandError::Rejected { reason }));
                Ok(Notice::Nothing)
            }
            None => Err(ProtocolError::Unexpected {
                opcode: crate::pdu::opcode::REJECT,
                when: "for what we sent",
            }),
        }
    }

    /// MaxCmdSN only grows (RFC 7143 §4.2.2.1, serial number arithmetic).
    fn window(&mut self, exp_cmd_sn: u32, max_cmd_sn: u32) {
        let at_least_closed = max_cmd_sn.wrapping_sub(exp_cmd_sn.wrapping_sub(1)) as i32 >= 0;
        if at_least_closed && (max_cmd_sn.wrapping_sub(self.terms.max_cmd_sn) as i32) > 0 {
            self.terms.max_cmd_sn = max_cmd_sn;
        }
    }

    fn status(&mut self, stat_sn: u32) {
        self.terms.exp_stat_sn = stat_sn.wrapping_add(1);
    }

    fn window_is_open(&self) -> bool {
        self.terms.max_cmd_sn.wrapping_sub(self.terms.cmd_sn) as i32 >= 0
    }
}

/// The sense data of a response's data segment (RFC 7143 §11.4.7.2).
fn sense_of(side: &[u8]) -> Option<SenseCode> {
    let (length, rest) = side.split_first_chunk::<2>()?;
    let sense = rest.get(..usize::from(u16::from_be_bytes(*length)))?;
    SenseCode::parse(sense)
}

/// No bytes at all.
const NO_DATA: Bytes = Bytes::new();
