//! Receiving: what each PDU of an initiator sets off.

use std::future::Future;
use std::task::{Context, Poll};

use super::connection::{Connection, Done, End, Flush, ReadTask, Task, TaskKind, Work};
use super::execute::{self, Outcome};
use super::registry::count;
use super::reply::residual;
use super::transfer::MAX_TASKS;
use crate::pdu::{Bhs, Pdu, PduError, ScsiCommand, TaskAttribute, opcode, reject_reason};
use crate::scsi::{Action, Sense, status, unit};
use crate::session::Admission;

/// A command that came too early.
pub(super) enum Held {
    /// It will be carried out in its turn.
    Pdu { bhs: Bhs, ahs: bool, data: Vec<u8> },
    /// It was refused, or aborted before it came: its number is passed over.
    Nothing,
}

/// Data of commands that came too early, in bytes. In a session of one connection none ever does, unless the
/// initiator left a gap.
const HELD_LIMIT: usize = 1 << 20;

impl Connection {
    /// Takes one PDU.
    pub(super) fn received(
        &mut self,
        bhs: &Bhs,
        ahs: &[u8],
        data: &[u8],
        cx: &mut Context<'_>,
    ) -> Result<(), End> {
        let pdu = match Pdu::parse(bhs) {
            Ok(pdu) => pdu,
            Err(error) => return self.malformed(error, bhs, cx),
        };
        let numbered = match &pdu {
            Pdu::ScsiCommand(c) => (!c.immediate).then_some(c.cmd_sn),
            Pdu::NopOut(n) => (!n.immediate).then_some(n.cmd_sn),
            Pdu::TaskManagementRequest(t) => (!t.immediate).then_some(t.cmd_sn),
            Pdu::TextRequest(t) => (!t.immediate).then_some(t.cmd_sn),
            Pdu::LogoutRequest(l) => (!l.immediate).then_some(l.cmd_sn),
            _ => None,
        };
        let Some(cmd_sn) = numbered else {
            return self.execute(pdu, bhs, !ahs.is_empty(), data, false, cx);
        };
        match self.window.admit(cmd_sn) {
            Admission::Ignore => {
                let (first, last) = (self.window.expected(), self.window.max());
                self.breach(&format_args!("CmdSN {cmd_sn} outside of {first} to {last}"));
                Ok(())
            }
            Admission::Later => self.hold(cmd_sn, bhs, !ahs.is_empty(), data),
            Admission::Now => {
                self.window.begin();
                self.execute(pdu, bhs, !ahs.is_empty(), data, true, cx)?;
                if self.held.is_empty() {
                    Ok(())
                } else {
                    self.unhold(cx)
                }
            }
        }
    }

    /// A header that is no PDU: it goes back.
    fn malformed(&mut self, error: PduError, bhs: &Bhs, cx: &mut Context<'_>) -> Result<(), End> {
        self.breach(&error);
        let reason = match error {
            PduError::Opcode(_) => reject_reason::NOT_SUPPORTED,
            PduError::Field { .. } => reject_reason::INVALID_FIELD,
        };
        // A command that is refused has come all the same: the next one must not wait for it.
        let command = matches!(
            error,
            PduError::Field {
                opcode: opcode::SCSI_COMMAND,
                ..
            }
        );
        let cmd_sn = u32::from_be_bytes([bhs[24], bhs[25], bhs[26], bhs[27]]);
        let counted = command && bhs[0] & 0x40 == 0 && self.window.admit(cmd_sn) != Admission::Ignore;
        if counted {
            self.unlearn(cmd_sn);
        }
        self.unhold(cx)?;
        self.reject(reason, bhs);
        Ok(())
    }

    /// Whatever has this number, or will have it, is passed over.
    pub(super) fn unlearn(&mut self, cmd_sn: u32) {
        if let Some(Held::Pdu { data, .. }) = self.held.insert(cmd_sn, Held::Nothing) {
            self.held_bytes -= data.len();
        }
    }

    fn hold(&mut self, cmd_sn: u32, bhs: &Bhs, ahs: bool, data: &[u8]) -> Result<(), End> {
        if self.held.contains_key(&cmd_sn) {
            return Ok(());
        }
        self.held_bytes += data.len();
        if self.held_bytes > HELD_LIMIT {
            return Err(End::Protocol("a gap in CmdSN with too much data behind it"));
        }
        let data = data.to_vec();
        self.held.insert(cmd_sn, Held::Pdu { bhs: *bhs, ahs, data });
        Ok(())
    }

    /// Takes the commands for which a gap was waited for.
    fn unhold(&mut self, cx: &mut Context<'_>) -> Result<(), End> {
        while let Some(held) = self.held.remove(&self.window.expected()) {
            self.window.begin();
            match held {
                Held::Nothing => self.window.end(),
                Held::Pdu { bhs, ahs, data } => {
                    self.held_bytes -= data.len();
                    let pdu = Pdu::parse(&bhs)?;
                    self.execute(pdu, &bhs, ahs, &data, true, cx)?;
                }
            }
        }
        Ok(())
    }

    fn execute(
        &mut self,
        pdu: Pdu,
        bhs: &Bhs,
        ahs: bool,
        data: &[u8],
        counted: bool,
        cx: &mut Context<'_>,
    ) -> Result<(), End> {
        if self.target.is_none()
            && !matches!(pdu, Pdu::TextRequest(_) | Pdu::LogoutRequest(_) | Pdu::NopOut(_))
        {
            // A discovery session has nothing else (RFC 7143 §4.3).
            self.over(counted);
            self.breach(&"a command in a discovery session");
            self.reject(reject_reason::PROTOCOL_ERROR, bhs);
            return Ok(());
        }
        match pdu {
            Pdu::ScsiCommand(command) => self.arrived(&command, bhs, ahs, data, counted, cx),
            Pdu::DataOut(out) => return self.data_out(&out, data, cx),
            Pdu::NopOut(nop) => self.nop(&nop, data, counted),
            Pdu::TaskManagementRequest(request) => {
                self.manage(&request, counted);
                if !counted && !self.held.is_empty() {
                    return self.unhold(cx);
                }
            }
            Pdu::TextRequest(request) => self.text(&request, bhs, data, counted),
            Pdu::LogoutRequest(request) => self.logout(&request, counted),
            Pdu::Snack(_) => {
                self.breach(&"SNACK, while ErrorRecoveryLevel is 0");
                self.reject(reject_reason::SNACK, bhs);
            }
            Pdu::LoginRequest(_) => return Err(End::Protocol("a login request after the login")),
            _ => return Err(End::Protocol("a PDU that only targets send")),
        }
        Ok(())
    }

    /// A SCSI command has come.
    fn arrived(
        &mut self,
        command: &ScsiCommand,
        bhs: &Bhs,
        ahs: bool,
        data: &[u8],
        counted: bool,
        cx: &mut Context<'_>,
    ) {
        count(&self.handle.counters.commands, 1);
        if self.tasks.contains_key(&command.itt) || self.barrier.holds(command.itt) {
            self.over(counted);
            self.breach(&format_args!("the tag {:#x} of a task in progress", command.itt));
            return self.reject(reject_reason::TASK_IN_PROGRESS, bhs);
        }
        let plain = command.attribute != TaskAttribute::Ordered && self.barrier.is_down();
        if !plain && self.must_wait(command) {
            return self.wait_in_order(command, ahs, data, counted);
        }
        self.scsi(command, ahs, data, counted, cx);
    }

    /// Carries out a SCSI command whose turn it is.
    pub(super) fn scsi(
        &mut self,
        command: &ScsiCommand,
        ahs: bool,
        data: &[u8],
        counted: bool,
        cx: &mut Context<'_>,
    ) {
        self.begin(command, ahs, data, counted, cx);
        if command.attribute == TaskAttribute::Ordered {
            self.ordered_began(command.itt);
        }
    }

    fn begin(&mut self, command: &ScsiCommand, ahs: bool, data: &[u8], counted: bool, cx: &mut Context<'_>) {
        let Some(target) = &self.target else { return };
        let number = command.lun.number();
        // LUNs are mostly few and dense, so the number is mostly the place.
        let place = number.and_then(|n| match target.luns.get(usize::from(n)) {
            Some(&at) if at == n => Some(usize::from(n)),
            _ => target.luns.iter().position(|&lun| lun == n),
        });
        let action = match place {
            _ if ahs || command.read && command.write => Action::Check(Sense::INVALID_FIELD_IN_CDB),
            Some(place) => target.units[place]
                .logical
                .plan(&self.nexuses[place], &command.cdb, &target.luns),
            None => unit::plan_without_unit(&command.cdb, &target.luns),
        };
        let place = place.unwrap_or(0);
        let expected = command.expected_bytes;
        let data_comes =
            command.write && (!command.final_ || !data.is_empty() || matches!(action, Action::Out { .. }));
        if data_comes {
            return self.gather(command, place, action, data, counted, cx);
        }
        let itt = command.itt;
        if self.tasks.len() >= MAX_TASKS {
            self.over(counted);
            return self.respond(itt, status::TASK_SET_FULL, None, residual(expected, 0), 0);
        }
        match action {
            Action::Read { offset, bytes } => {
                let total = if command.read {
                    bytes.min(expected.into()) as u32
                } else {
                    0
                };
                let left = residual(expected, bytes);
                if total == 0 {
                    self.over(counted);
                    return self.respond(itt, status::GOOD, None, left, 0);
                }
                if !self.is_even(place, total) {
                    if !self.has_room() {
                        // It would be held in memory as a whole; who splits blocks is rare, and comes again.
                        self.over(counted);
                        return self.respond(itt, status::TASK_SET_FULL, None, residual(expected, 0), 0);
                    }
                    return self.start(itt, place, action, expected, counted, cx);
                }
                let serial = self.new_serial();
                let read = ReadTask {
                    itt,
                    serial,
                    unit: place,
                    offset,
                    total,
                    sent: 0,
                    data_sn: 0,
                    residual: left,
                    counted,
                    listed: false,
                };
                if self.stalled.is_empty() {
                    self.read_on(read, cx);
                } else {
                    self.stall(read);
                }
            }
            Action::Good => {
                self.over(counted);
                self.respond(itt, status::GOOD, None, residual(expected, 0), 0);
            }
            Action::Data(data) => {
                self.over(counted);
                let expected = if command.read { expected } else { 0 };
                self.respond_data(itt, &data, expected);
            }
            Action::Check(sense) => {
                self.over(counted);
                self.respond_check(itt, sense, expected);
            }
            Action::Conflict => {
                self.over(counted);
                self.respond(itt, status::RESERVATION_CONFLICT, None, residual(expected, 0), 0);
            }
            // The initiator means to send nothing.
            Action::Out { bytes, .. } => {
                self.over(counted);
                self.respond(itt, status::GOOD, None, residual(expected, bytes), 0);
            }
            Action::Flush
            | Action::Verify { .. }
            | Action::SelfTest
            | Action::Discard { .. }
            | Action::LbaStatus { .. } => {
                self.start(itt, place, action, expected, counted, cx);
            }
        }
    }

    /// Do pieces of this many bytes in all, and bursts, end where blocks do? They nearly always do.
    fn is_even(&self, place: usize, total: u32) -> bool {
        let block = self
            .unit(place)
            .map_or(512, |unit| unit.logical.geometry().block_bytes);
        let lengths = [total, self.piece_bytes as u32, self.parameters.max_burst_bytes];
        lengths.iter().all(|length| length.is_multiple_of(block))
    }

    pub(super) fn new_serial(&mut self) -> u64 {
        self.next_serial += 1;
        self.next_serial
    }

    pub(super) fn list(&mut self, itt: u32, serial: u64, unit: usize, counted: bool, kind: TaskKind) {
        let lun = self.unit(unit).map_or(0, |unit| unit.logical.number());
        self.tasks.insert(
            itt,
            Task {
                serial,
                lun,
                counted,
                kind,
            },
        );
    }

    /// Begins what needs the device and no data from the initiator.
    fn start(
        &mut self,
        itt: u32,
        place: usize,
        action: Action,
        expected: u32,
        counted: bool,
        cx: &mut Context<'_>,
    ) {
        let Some(unit) = self.unit(place).cloned() else {
            return;
        };
        let serial = self.new_serial();
        let lun = unit.logical.number();
        let reading = match action {
            Action::Read { bytes, .. } => bytes as usize,
            _ => 0,
        };
        let (kind, work): (_, std::pin::Pin<Box<dyn Future<Output = Outcome> + Send>>) = match action {
            Action::Flush if self.changing.values().any(|&busy| busy == lun) => {
                // A flush is durable for the writes before it, so it waits for them.
                self.list(itt, serial, place, counted, TaskKind::Waiting);
                self.flushes.push(Flush {
                    itt,
                    serial,
                    unit: place,
                    expected,
                });
                return;
            }
            Action::Flush => (TaskKind::Reading, Box::pin(execute::flush(unit))),
            Action::Read { offset, bytes } => (
                TaskKind::Reading,
                Box::pin(execute::read_whole(unit, offset, bytes)),
            ),
            Action::Verify { offset, bytes } => {
                (TaskKind::Reading, Box::pin(execute::verify(unit, offset, bytes)))
            }
            Action::SelfTest => (TaskKind::Reading, Box::pin(execute::self_test(unit))),
            Action::Discard { offset, bytes } => {
                self.changing.insert(serial, lun);
                (
                    TaskKind::Changing,
                    Box::pin(execute::discard(unit, offset, bytes)),
                )
            }
            Action::LbaStatus { offset, allocation } => (
                TaskKind::Reading,
                Box::pin(execute::lba_status(unit, offset, allocation)),
            ),
            _ => return,
        };
        self.reading_bytes += reading;
        let work = Box::pin(async move {
            Done::Task {
                itt,
                serial,
                counted,
                outcome: work.await,
                reading,
                expected,
                called_for: 0,
                solicitations: 0,
                written: 0,
                buffer: Vec::new(),
            }
        });
        self.list(itt, serial, place, counted, kind);
        self.launch(work, cx);
    }

    /// Polls once; what is not done then waits among the others.
    pub(super) fn launch(&mut self, mut work: Work, cx: &mut Context<'_>) {
        match work.as_mut().poll(cx) {
            Poll::Ready(done) => self.done(done, cx),
            Poll::Pending => self.running.push(work),
        }
    }

    /// Starts the flushes whose writes have all ended.
    pub(super) fn release_flushes(&mut self, cx: &mut Context<'_>) {
        if self.flushes.is_empty() {
            return;
        }
        for flush in std::mem::take(&mut self.flushes) {
            let Some(unit) = self.unit(flush.unit).cloned() else {
                continue;
            };
            let lun = unit.logical.number();
            if self.changing.range(..flush.serial).any(|(_, &busy)| busy == lun) {
                self.flushes.push(flush);
                continue;
            }
            let Flush {
                itt,
                serial,
                expected,
                ..
            } = flush;
            let counted = self.tasks.get(&itt).is_some_and(|task| task.counted);
            if let Some(task) = self.tasks.get_mut(&itt) {
                task.kind = TaskKind::Reading;
            }
            self.launch(
                Box::pin(async move {
                    Done::Task {
                        itt,
                        serial,
                        counted,
                        outcome: execute::flush(unit).await,
                        reading: 0,
                        expected,
                        called_for: 0,
                        solicitations: 0,
                        written: 0,
                        buffer: Vec::new(),
                    }
                }),
                cx,
            );
        }
    }

    /// Goes on with large reads that waited for room, and with writes that waited for memory.
    pub(super) fn resume(&mut self, cx: &mut Context<'_>) {
        while self.has_room()
            && let Some(read) = self.stalled.pop_front()
        {
            self.read_on(read, cx);
        }
        for itt in std::mem::take(&mut self.starved) {
            self.solicit(itt);
        }
    }
}
