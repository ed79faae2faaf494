//! Sending: responses, data, and the numbers they bear.

use std::future::Future;
use std::task::Context;
use std::time::Duration;

use super::buffers::Block;
use super::connection::{Abortion, Connection, Done, ReadTask, TaskKind};
use super::execute::{self, Outcome, status_of};
use super::registry::{Gate, Order, Ticket, count};
use crate::pdu::{
    AsyncMessage, DataIn, LunField, NO_TAG, Pdu, Residual, ScsiResponse, TaskManagementResponse,
    task_response,
};
use crate::scsi::{SENSE_BYTES, Sense, status};

/// Who comes again does so 3 ms after its answer, with each of its commands: this is what it costs while there is no room. Aborts and the
/// end of a session wait for it.
const ROOM_PAUSE: Duration = Duration::from_millis(500);

/// What is left over of `expected` bytes when the command calls for `actual`.
pub(super) fn residual(expected: u32, actual: u64) -> Residual {
    let actual = u32::try_from(actual).unwrap_or(u32::MAX);
    match expected.cmp(&actual) {
        std::cmp::Ordering::Equal => Residual::None,
        std::cmp::Ordering::Less => Residual::Over(actual - expected),
        std::cmp::Ordering::Greater => Residual::Under(expected - actual),
    }
}

impl Connection {
    pub(super) fn next_stat_sn(&mut self) -> u32 {
        let stat_sn = self.stat_sn;
        self.stat_sn = stat_sn.wrapping_add(1);
        stat_sn
    }

    pub(super) fn new_ttt(&mut self) -> u32 {
        let ttt = self.next_ttt;
        self.next_ttt = match ttt.wrapping_add(1) {
            NO_TAG => 1,
            next => next,
        };
        ttt
    }

    /// Queues a PDU.
    pub(super) fn send(&mut self, pdu: &Pdu, data: &[u8]) {
        let mut block = self.pool.take(self.sending.frame_bytes(data.len()));
        let at = self.sending.data_at();
        block.as_mut()[at..at + data.len()].copy_from_slice(data);
        self.sending.seal(block.as_mut(), pdu.encode(), data.len());
        self.output.push(block);
    }

    /// The command is over: room in the window. Comes before its response, which tells of it.
    pub(super) fn over(&mut self, counted: bool) {
        if counted {
            self.window.end();
        }
    }

    /// A SCSI Response.
    pub(super) fn respond(
        &mut self,
        itt: u32,
        status: u8,
        sense: Option<Sense>,
        residual: Residual,
        exp_data_sn: u32,
    ) {
        let response = ScsiResponse {
            residual,
            response: 0,
            status,
            itt,
            snack_tag: 0,
            stat_sn: self.next_stat_sn(),
            exp_cmd_sn: self.window.expected(),
            max_cmd_sn: self.window.max(),
            exp_data_sn,
        };
        match sense {
            None => self.send(&Pdu::ScsiResponse(response), &[]),
            Some(sense) => {
                let mut data = [0; 2 + SENSE_BYTES];
                data[1] = SENSE_BYTES as u8;
                data[2..].copy_from_slice(&sense.fixed());
                self.send(&Pdu::ScsiResponse(response), &data);
            }
        }
    }

    /// A command that failed before any of its data moved.
    pub(super) fn respond_check(&mut self, itt: u32, sense: Sense, expected: u32) {
        self.respond(
            itt,
            status::CHECK_CONDITION,
            Some(sense),
            residual(expected, 0),
            0,
        );
    }

    /// Data from memory, then GOOD with the last of them.
    pub(super) fn respond_data(&mut self, itt: u32, data: &[u8], expected: u32) {
        let residual = residual(expected, data.len() as u64);
        let data = &data[..data.len().min(expected as usize)];
        if data.is_empty() {
            return self.respond(itt, status::GOOD, None, residual, 0);
        }
        count(&self.counters().read, data.len() as u64);
        let longest = self.parameters.peer_max_recv_bytes as usize;
        let burst = self.parameters.max_burst_bytes as usize;
        let (mut at, mut data_sn) = (0, 0);
        while at < data.len() {
            // A piece ends where a burst does.
            let bytes = (data.len() - at).min(longest).min(burst - at % burst);
            let last = (at + bytes == data.len()).then_some(residual);
            let header = self.data_in(itt, at as u32, data_sn, bytes, last);
            self.send(&Pdu::DataIn(header), &data[at..at + bytes]);
            at += bytes;
            data_sn += 1;
        }
    }

    /// The header of a Data-In; the last one bears the status.
    fn data_in(&mut self, itt: u32, at: u32, data_sn: u32, bytes: usize, last: Option<Residual>) -> DataIn {
        let burst = self.parameters.max_burst_bytes;
        // A sequence ends at the latest with MaxBurstLength (RFC 7143 §11.7.1).
        let ends_burst = (at % burst) + bytes as u32 >= burst;
        DataIn {
            final_: last.is_some() || ends_burst,
            acknowledge: false,
            status: last.map(|_| status::GOOD),
            residual: last.unwrap_or_default(),
            lun: LunField(0),
            itt,
            ttt: NO_TAG,
            stat_sn: if last.is_some() { self.next_stat_sn() } else { 0 },
            exp_cmd_sn: self.window.expected(),
            max_cmd_sn: self.window.max(),
            data_sn,
            buffer_offset: at,
        }
    }

    /// The length of the next piece; it ends where a burst does, so that a sequence can.
    fn next_piece(&self, read: &ReadTask) -> u32 {
        let burst = self.parameters.max_burst_bytes;
        let to_burst = burst - read.sent % burst;
        (read.total - read.sent)
            .min(self.piece_bytes as u32)
            .min(to_burst)
    }

    /// Reads pieces and queues them, as long as the device answers at once and there is room.
    pub(super) fn read_on(&mut self, mut read: ReadTask, cx: &mut Context<'_>) {
        loop {
            if !self.has_room() {
                return self.stall(read);
            }
            let Some(unit) = self.unit(read.unit).cloned() else {
                return;
            };
            let bytes = self.next_piece(&read);
            let at = self.sending.data_at();
            let block = self.pool.take(self.sending.frame_bytes(bytes as usize));
            let offset = read.offset + u64::from(read.sent);
            let mut work = Box::pin(execute::read(unit, offset, block, at, bytes as usize));
            match work.as_mut().poll(cx) {
                std::task::Poll::Ready((block, result)) => match self.piece(read, block, bytes, result) {
                    Some(next) => read = next,
                    None => return,
                },
                std::task::Poll::Pending => {
                    self.enlist(&mut read);
                    self.reading_bytes += bytes as usize;
                    self.running.push(Box::pin(async move {
                        let (block, result) = work.await;
                        Done::Piece(read, block, result)
                    }));
                    return;
                }
            }
        }
    }

    /// Has a read wait for room. It is a task as any other meanwhile: who aborts it must meet it.
    pub(super) fn stall(&mut self, mut read: ReadTask) {
        self.enlist(&mut read);
        self.stalled.push_back(read);
    }

    fn enlist(&mut self, read: &mut ReadTask) {
        if !read.listed {
            read.listed = true;
            self.list(read.itt, read.serial, read.unit, read.counted, TaskKind::Reading);
        }
    }

    /// A piece came: sends it. Gives the read back where more is to come.
    fn piece(
        &mut self,
        mut read: ReadTask,
        mut block: Block,
        bytes: u32,
        result: Result<(), Sense>,
    ) -> Option<ReadTask> {
        if let Err(sense) = result {
            self.pool.give(block);
            self.unlist(&read);
            self.over(read.counted);
            // What was sent before is data of a command that failed.
            let expected = match read.residual {
                Residual::Under(bytes) => read.total.saturating_add(bytes),
                Residual::None | Residual::Over(_) => read.total,
            };
            let residual = residual(expected, read.sent.into());
            self.respond(
                read.itt,
                status::CHECK_CONDITION,
                Some(sense),
                residual,
                read.data_sn,
            );
            return None;
        }
        let last = read.sent + bytes == read.total;
        if last {
            self.unlist(&read);
            self.over(read.counted);
        }
        let header = self.data_in(
            read.itt,
            read.sent,
            read.data_sn,
            bytes as usize,
            last.then_some(read.residual),
        );
        self.sending.seal(block.as_mut(), header.encode(), bytes as usize);
        self.output.push(block);
        count(&self.counters().read, bytes.into());
        read.sent += bytes;
        read.data_sn += 1;
        (!last).then_some(read)
    }

    fn unlist(&mut self, read: &ReadTask) {
        if read.listed {
            self.tasks.remove(&read.itt);
            self.ended(read.serial);
        }
    }

    /// Who comes again where there was no room is told to, after a while. `None`: so it will be.
    fn put_off(&mut self, mut done: Done, cx: &mut Context<'_>) -> Option<Done> {
        match &mut done {
            Done::Task {
                itt,
                serial,
                outcome: Outcome::Check(sense),
                ..
            } if *sense == Sense::NO_SPACE
                && self.handle.port.comes_again()
                && self.is_live(*itt, *serial) =>
            {
                *sense = Sense::ALLOCATING;
            }
            _ => return Some(done),
        }
        let later = async move {
            tokio::time::sleep(ROOM_PAUSE).await;
            done
        };
        self.launch(Box::pin(later), cx);
        None
    }

    /// A device gave an answer.
    pub(super) fn done(&mut self, done: Done, cx: &mut Context<'_>) {
        let Some(done) = self.put_off(done, cx) else {
            return;
        };
        match done {
            Done::Piece(read, block, result) => {
                let bytes = self.next_piece(&read);
                self.reading_bytes -= bytes as usize;
                if !self.is_live(read.itt, read.serial) {
                    self.pool.give(block);
                    self.drop_aborted(read.itt, read.serial, read.counted);
                } else if let Some(next) = self.piece(read, block, bytes, result) {
                    self.read_on(next, cx);
                }
            }
            Done::Task {
                itt,
                serial,
                outcome: Outcome::Preempted(ports),
                counted,
                reading,
                expected,
                called_for,
                solicitations,
                written,
                buffer,
            } => {
                // It is a task until theirs have ended, and answered then.
                let gate = self.preempted(itt, &ports);
                let outcome = Outcome::Good;
                let done = Done::Task {
                    itt,
                    serial,
                    counted,
                    outcome,
                    reading,
                    expected,
                    called_for,
                    solicitations,
                    written,
                    buffer,
                };
                self.fences.push((gate, done));
                self.pass_gates(cx);
            }
            Done::Task {
                itt,
                serial,
                counted,
                outcome,
                reading,
                expected,
                called_for,
                solicitations,
                written,
                buffer,
            } => {
                self.reading_bytes -= reading;
                self.changing.remove(&serial);
                self.writing_bytes = self.writing_bytes.saturating_sub(buffer.len());
                self.pool.give(buffer.into());
                let live = self.is_live(itt, serial);
                if live {
                    self.tasks.remove(&itt);
                    self.over(counted);
                    self.complete(itt, outcome, expected, called_for, solicitations, written);
                    self.ended(serial);
                } else {
                    self.drop_aborted(itt, serial, counted);
                }
                self.release_flushes(cx);
            }
        }
    }

    /// A command is done: its response.
    pub(super) fn complete(
        &mut self,
        itt: u32,
        outcome: Outcome,
        expected: u32,
        called_for: u64,
        solicitations: u32,
        written: u64,
    ) {
        let status = status_of(&outcome);
        match outcome {
            Outcome::Data(data) => self.respond_data(itt, &data, expected),
            Outcome::Check(sense) => {
                let residual = residual(expected, called_for);
                self.respond(itt, status, Some(sense), residual, solicitations);
            }
            Outcome::Good | Outcome::Conflict | Outcome::Preempted(_) => {
                count(&self.counters().written, written);
                let residual = residual(expected, called_for);
                self.respond(itt, status, None, residual, solicitations);
            }
        }
    }

    /// The tasks of these ports on the unit that the task `itt` is for are aborted, in all their sessions; the gate opens when
    /// they have ended.
    fn preempted(&self, itt: u32, ports: &[crate::scsi::reservation::InitiatorPort]) -> Gate {
        let (ticket, gate) = Ticket::new(&self.handle);
        if let (Some(target), Some(task)) = (&self.target, self.tasks.get(&itt)) {
            for session in target.sessions(|session| ports.contains(&session.port)) {
                session.control.send(Order::Abort(task.lun, vec![ticket.clone()]));
            }
        }
        gate
    }

    /// Answers what waited for other sessions' tasks.
    pub(super) fn pass_gates(&mut self, cx: &mut Context<'_>) {
        if !self.abortions.is_empty() {
            self.answer_abortions();
        }
        let mut at = 0;
        while let Some((gate, _)) = self.fences.get_mut(at) {
            if gate.is_open() {
                let (_, done) = self.fences.remove(at);
                self.done(done, cx);
            } else {
                at += 1;
            }
        }
    }

    fn is_live(&self, itt: u32, serial: u64) -> bool {
        self.tasks
            .get(&itt)
            .is_some_and(|task| task.serial == serial && !matches!(task.kind, TaskKind::Aborted))
    }

    /// The end of a task that was aborted: no response, but room, and an answer to who aborted it.
    fn drop_aborted(&mut self, itt: u32, serial: u64, counted: bool) {
        if self.tasks.get(&itt).is_some_and(|task| task.serial == serial) {
            self.tasks.remove(&itt);
        }
        self.over(counted);
        self.ended(serial);
    }

    /// A listed task is gone: whoever waits for that may have its answer.
    pub(super) fn ended(&mut self, serial: u64) {
        if !self.owed.is_empty() {
            for owed in &mut self.owed {
                owed.serials.retain(|&waited| waited != serial);
            }
            self.owed.retain(|owed| !owed.serials.is_empty());
        }
        if self.abortions.is_empty() {
            return;
        }
        for abortion in &mut self.abortions {
            abortion.serials.retain(|&waited| waited != serial);
        }
        self.answer_abortions();
    }

    /// Answers the task management requests that wait for nothing any more.
    pub(super) fn answer_abortions(&mut self) {
        let is_over = |abortion: &mut Abortion| {
            abortion.serials.is_empty() && abortion.gate.as_mut().is_none_or(Gate::is_open)
        };
        let ready: Vec<_> = self.abortions.extract_if(.., is_over).collect();
        for Abortion {
            itt,
            counted,
            is_cold,
            ..
        } in ready
        {
            self.over(counted);
            self.task_response(itt, task_response::COMPLETE);
            if is_cold {
                self.end_all("a cold reset of the target");
            }
        }
    }

    /// A Task Management Function Response.
    pub(super) fn task_response(&mut self, itt: u32, response: u8) {
        let response = TaskManagementResponse {
            response,
            itt,
            stat_sn: self.next_stat_sn(),
            exp_cmd_sn: self.window.expected(),
            max_cmd_sn: self.window.max(),
        };
        self.send(&Pdu::TaskManagementResponse(response), &[]);
    }

    /// Asynchronous Message: please log out (RFC 7143 §11.9.1, event 1).
    pub(super) fn ask_logout(&mut self, seconds: u16) {
        let message = AsyncMessage {
            lun: LunField(0),
            stat_sn: self.next_stat_sn(),
            exp_cmd_sn: self.window.expected(),
            max_cmd_sn: self.window.max(),
            event: 1,
            vendor_code: 0,
            parameters: [0, 0, seconds],
        };
        self.send(&Pdu::AsyncMessage(message), &[]);
    }
}
