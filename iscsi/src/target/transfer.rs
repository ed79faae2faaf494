//! Commands with data from the initiator: collecting them, then carrying the command out.

use std::task::Context;

use super::connection::{Connection, Done, End, Ending, Gathering, Task, TaskKind, WRITING_LIMIT};
use super::execute;
use super::reply::residual;
use crate::pdu::{DataOut, LunField, Pdu, R2t, ScsiCommand};
use crate::scsi::{Action, OutAction, Sense, status};
use crate::session::{QUEUE_DEPTH, Transfer};

/// Tasks of a session with the immediate ones, which no window holds back.
pub(super) const MAX_TASKS: usize = 2 * QUEUE_DEPTH as usize;

impl Connection {
    /// A command with data from the initiator.
    pub(super) fn gather(
        &mut self,
        command: &ScsiCommand,
        place: usize,
        action: Action,
        data: &[u8],
        counted: bool,
        cx: &mut Context<'_>,
    ) {
        let expected = command.expected_bytes;
        let full = self.tasks.len() >= MAX_TASKS;
        let (then, called_for) = match action {
            _ if full => (Err(Ending::Status(status::TASK_SET_FULL)), 0),
            // These two need their data whole; anything else is an initiator's mistake, and no write.
            Action::Out {
                bytes,
                then: OutAction::CompareAndWrite { .. } | OutAction::WriteSame { .. },
            } if bytes != u64::from(expected) => (Err(Sense::INVALID_FIELD_IN_CDB.into()), 0),
            Action::Out { bytes, then } => (Ok(then), bytes),
            Action::Check(sense) => (Err(sense.into()), 0),
            Action::Conflict => (Err(Ending::Status(status::RESERVATION_CONFLICT)), 0),
            // The initiator says "write" of a command that is none: nothing goes either way.
            _ => (Err(Ending::Status(status::GOOD)), 0),
        };
        let wanted = if then.is_ok() {
            called_for.min(expected.into()) as u32
        } else {
            0
        };
        let buffer = Vec::with_capacity(data.len().min(wanted as usize));
        let transfer = Transfer::begin(self.limits, expected, wanted, data, command.final_, buffer);
        let transfer = match transfer {
            Ok(transfer) => transfer,
            Err(error) => {
                self.breach(&error);
                self.late_data = true;
                self.over(counted);
                return self.respond_check(command.itt, Sense::UNEXPECTED_DATA, expected);
            }
        };
        let serial = self.new_serial();
        let gathering = Gathering {
            transfer,
            unit: place,
            then,
            called_for,
        };
        self.writing_bytes += gathering.transfer.kept();
        if gathering.transfer.is_complete() {
            return self.gathered(command.itt, serial, counted, gathering, false, cx);
        }
        if let Some(lun) = command.lun.number() {
            self.changing.insert(serial, lun);
        }
        self.list(
            command.itt,
            serial,
            place,
            counted,
            TaskKind::Gathering(Box::new(gathering)),
        );
        self.solicit(command.itt);
    }

    /// Asks for more of a command's data, as far as the login and memory allow.
    pub(super) fn solicit(&mut self, itt: u32) {
        loop {
            // The oldest may always go on; the others wait until there is room.
            let may_go_on = self.writing_bytes < WRITING_LIMIT || self.is_oldest_write(itt);
            let ttt = self.next_ttt;
            let Some(Task {
                kind: TaskKind::Gathering(gathering),
                lun,
                ..
            }) = self.tasks.get_mut(&itt)
            else {
                return;
            };
            if !may_go_on {
                self.starved.push(itt);
                return;
            }
            let lun = LunField::new(*lun);
            let Some(asked) = gathering.transfer.solicit(ttt) else {
                return;
            };
            self.new_ttt();
            let r2t = R2t {
                lun,
                itt,
                ttt,
                stat_sn: self.stat_sn,
                exp_cmd_sn: self.window.expected(),
                max_cmd_sn: self.window.max(),
                r2t_sn: asked.r2t_sn,
                buffer_offset: asked.offset,
                desired_bytes: asked.bytes,
            };
            self.send(&Pdu::R2t(r2t), &[]);
        }
    }

    fn is_oldest_write(&self, itt: u32) -> bool {
        let gathering = |task: &&Task| matches!(task.kind, TaskKind::Gathering(_));
        let oldest = self
            .tasks
            .values()
            .filter(gathering)
            .map(|task| task.serial)
            .min();
        self.tasks.get(&itt).map(|task| task.serial) == oldest
    }

    pub(super) fn data_out(&mut self, out: &DataOut, data: &[u8], cx: &mut Context<'_>) -> Result<(), End> {
        let Some(Task {
            kind: TaskKind::Gathering(gathering),
            ..
        }) = self.tasks.get_mut(&out.itt)
        else {
            if !self.barrier.is_down() && self.kept_for_waiting(out, data) {
                return Ok(());
            }
            // For a task that was aborted or failed early: nothing is to be done with it.
            if !self.late_data {
                self.breach(&format_args!(
                    "Data-Out for the tag {:#x}, which no task has",
                    out.itt
                ));
            }
            return Ok(());
        };
        let before = gathering.transfer.kept();
        if let Err(error) = gathering
            .transfer
            .take(out.ttt, out.data_sn, out.buffer_offset, data, out.final_)
        {
            self.breach(&error);
            self.late_data = true;
            return self.refuse_data(out.itt);
        }
        self.writing_bytes += gathering.transfer.kept() - before;
        // A command that has failed already ends once nothing more is due.
        let over =
            gathering.transfer.is_complete() || gathering.then.is_err() && gathering.transfer.is_quiet();
        if !over {
            self.solicit(out.itt);
            return Ok(());
        }
        let Some(task) = self.tasks.remove(&out.itt) else {
            return Ok(());
        };
        if let TaskKind::Gathering(gathering) = task.kind {
            self.gathered(out.itt, task.serial, task.counted, *gathering, true, cx);
        }
        Ok(())
    }

    /// Data that break the order of their sequence: the command fails, and what is still on its way is ignored.
    fn refuse_data(&mut self, itt: u32) -> Result<(), End> {
        let Some(task) = self.tasks.remove(&itt) else {
            return Ok(());
        };
        self.changing.remove(&task.serial);
        self.over(task.counted);
        if let TaskKind::Gathering(gathering) = task.kind {
            self.writing_bytes = self.writing_bytes.saturating_sub(gathering.transfer.kept());
            let expected = gathering.transfer.expected();
            let sent = gathering.transfer.solicitations();
            self.respond(
                itt,
                status::CHECK_CONDITION,
                Some(Sense::DATA_PHASE),
                residual(expected, 0),
                sent,
            );
        }
        self.ended(task.serial);
        Ok(())
    }

    /// All data of a command are there.
    fn gathered(
        &mut self,
        itt: u32,
        serial: u64,
        counted: bool,
        gathering: Gathering,
        was_listed: bool,
        cx: &mut Context<'_>,
    ) {
        let Gathering {
            transfer,
            unit: place,
            then,
            called_for,
        } = gathering;
        let expected = transfer.expected();
        let solicitations = transfer.solicitations();
        let mut data = transfer.into_data();
        let Some(unit) = self.unit(place).cloned() else {
            return;
        };
        let block_bytes = unit.logical.geometry().block_bytes;
        let then = then.and_then(|then| fit(then, &mut data, called_for, block_bytes).map_err(Ending::from));
        let then = match then {
            Ok(then) => then,
            Err(ending) => {
                self.writing_bytes = self.writing_bytes.saturating_sub(data.len());
                self.changing.remove(&serial);
                self.over(counted);
                let (status, sense) = match ending {
                    Ending::Check(sense) => (status::CHECK_CONDITION, Some(sense)),
                    Ending::Status(status) => (status, None),
                };
                self.respond(itt, status, sense, residual(expected, called_for), solicitations);
                if was_listed {
                    self.ended(serial);
                }
                return;
            }
        };
        let lun = unit.logical.number();
        self.changing.insert(serial, lun);
        self.list(itt, serial, place, counted, TaskKind::Changing);
        let nexus = self.nexuses[place].clone();
        let written = if matches!(then, OutAction::Write { .. }) {
            data.len() as u64
        } else {
            0
        };
        let work = Box::pin(async move {
            let (outcome, buffer) = execute::out(unit, nexus, then, data).await;
            Done::Task {
                itt,
                serial,
                counted,
                outcome,
                reading: 0,
                expected,
                called_for,
                solicitations,
                written,
                buffer,
            }
        });
        self.launch(work, cx);
    }
}

/// Makes an action fit the data that came where the initiator sent less than the CDB calls for: whole blocks of a
/// write are written, a parameter list that is cut off is refused.
fn fit(then: OutAction, data: &mut Vec<u8>, called_for: u64, block_bytes: u32) -> Result<OutAction, Sense> {
    if data.len() as u64 >= called_for {
        return Ok(then);
    }
    let whole = data.len() / block_bytes as usize * block_bytes as usize;
    match then {
        OutAction::Write { .. } => {
            data.truncate(whole);
            Ok(then)
        }
        OutAction::Compare {
            offset,
            repeated: false,
            ..
        } => Ok(OutAction::Compare {
            offset,
            bytes: whole as u64,
            repeated: false,
        }),
        _ => Err(Sense::INVALID_FIELD_IN_CDB),
    }
}
