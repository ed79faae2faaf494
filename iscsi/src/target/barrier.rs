//! ORDERED tasks (SAM-5): one begins when all before it in its session have ended, and those after it wait for its end.
//!
//! Every other command begins when it comes, so nothing else ever waits here. HEAD OF QUEUE tasks pass those that wait. The order
//! is kept among the commands of a session, over all units of its target; initiators do not share it.

use std::collections::VecDeque;
use std::task::Context;

use super::connection::{Connection, End, Task, TaskKind};
use super::reply::residual;
use super::transfer::MAX_TASKS;
use crate::pdu::{DataOut, ScsiCommand, TaskAttribute};
use crate::scsi::status;

/// Data that come with commands which wait, in bytes for each session: some bursts. Who sends more is told to come again.
const WAITING_BYTES: usize = 1 << 20;

/// A command that waits, with what came of its data.
struct Waiting {
    command: ScsiCommand,
    ahs: bool,
    data: Vec<u8>,
    counted: bool,
    unsolicited: Vec<(DataOut, Vec<u8>)>,
}

impl Waiting {
    fn bytes(&self) -> usize {
        let unsolicited: usize = self.unsolicited.iter().map(|(_, data)| data.len()).sum();
        self.data.len() + unsolicited
    }

    /// As others see it; no task in progress has this serial.
    fn task(&self) -> Task {
        Task {
            serial: 0,
            lun: self.command.lun.number().unwrap_or(u16::MAX),
            counted: self.counted,
            kind: TaskKind::Waiting,
        }
    }
}

/// What waits in a session, and for what.
#[derive(Default)]
pub(super) struct Barrier {
    waiting: VecDeque<Waiting>,
    bytes: usize,
    /// Tag and serial of the ORDERED task that is in progress.
    ordered: Option<(u32, u64)>,
}

impl Barrier {
    /// Nothing has to be looked at: the fast way of nearly every command.
    #[inline]
    pub(super) fn is_down(&self) -> bool {
        self.ordered.is_none() && self.waiting.is_empty()
    }

    pub(super) fn holds(&self, itt: u32) -> bool {
        self.waiting.iter().any(|waiting| waiting.command.itt == itt)
    }

    fn take(&mut self, at: usize) -> Option<Waiting> {
        let waiting = self.waiting.remove(at)?;
        self.bytes = self.bytes.saturating_sub(waiting.bytes());
        Some(waiting)
    }
}

impl Connection {
    /// Must the command wait, for an ORDERED one before it or because it is one?
    pub(super) fn must_wait(&mut self, command: &ScsiCommand) -> bool {
        match command.attribute {
            TaskAttribute::HeadOfQueue => false,
            _ if self.ordered_runs() || !self.barrier.waiting.is_empty() => true,
            TaskAttribute::Ordered => self.is_busy(),
            _ => false,
        }
    }

    fn is_busy(&self) -> bool {
        !self.tasks.is_empty() || !self.stalled.is_empty()
    }

    fn ordered_runs(&mut self) -> bool {
        let Some((itt, serial)) = self.barrier.ordered else {
            return false;
        };
        let listed = self.tasks.get(&itt).is_some_and(|task| task.serial == serial);
        let runs = listed || self.stalled.iter().any(|read| read.serial == serial);
        if !runs {
            self.barrier.ordered = None;
        }
        runs
    }

    /// Keeps a command until its turn comes.
    pub(super) fn wait_in_order(&mut self, command: &ScsiCommand, ahs: bool, data: &[u8], counted: bool) {
        let bytes = self.barrier.bytes + data.len();
        if self.barrier.waiting.len() >= MAX_TASKS || bytes > WAITING_BYTES {
            self.late_data = true;
            return self.come_again(command, counted);
        }
        self.barrier.bytes = bytes;
        self.barrier.waiting.push_back(Waiting {
            command: *command,
            ahs,
            data: data.to_vec(),
            counted,
            unsolicited: Vec::new(),
        });
    }

    fn come_again(&mut self, command: &ScsiCommand, counted: bool) {
        self.over(counted);
        let left = residual(command.expected_bytes, 0);
        self.respond(command.itt, status::TASK_SET_FULL, None, left, 0);
    }

    /// Unsolicited data: are they those of a command that waits?
    pub(super) fn kept_for_waiting(&mut self, out: &DataOut, data: &[u8]) -> bool {
        let mut waiting = self.barrier.waiting.iter();
        let Some(at) = waiting.position(|waiting| waiting.command.itt == out.itt) else {
            return false;
        };
        if self.barrier.bytes + data.len() > WAITING_BYTES {
            self.late_data = true;
            if let Some(waiting) = self.barrier.take(at) {
                self.come_again(&waiting.command, waiting.counted);
            }
        } else if let Some(waiting) = self.barrier.waiting.get_mut(at) {
            self.barrier.bytes += data.len();
            waiting.unsolicited.push((*out, data.to_vec()));
        }
        true
    }

    /// Begins what has waited long enough.
    pub(super) fn release_waiting(&mut self, cx: &mut Context<'_>) -> Result<(), End> {
        while !self.barrier.is_down() && !self.ordered_runs() && self.has_room() {
            let Some(first) = self.barrier.waiting.front() else {
                return Ok(());
            };
            if first.command.attribute == TaskAttribute::Ordered && self.is_busy() {
                return Ok(());
            }
            let Some(next) = self.barrier.take(0) else {
                return Ok(());
            };
            self.scsi(&next.command, next.ahs, &next.data, next.counted, cx);
            for (out, data) in &next.unsolicited {
                self.data_out(out, data, cx)?;
            }
        }
        Ok(())
    }

    /// Notes an ORDERED command that has begun, if it is still in progress.
    pub(super) fn ordered_began(&mut self, itt: u32) {
        let listed = self.tasks.get(&itt).map(|task| task.serial);
        let stalled = || {
            self.stalled
                .iter()
                .find(|read| read.itt == itt)
                .map(|read| read.serial)
        };
        self.barrier.ordered = listed.or_else(stalled).map(|serial| (itt, serial));
    }

    /// Takes out waiting commands that are aborted; none of them is answered. `false`: there was none.
    pub(super) fn abort_waiting(&mut self, which: impl Fn(u32, &Task) -> bool) -> bool {
        let before = self.barrier.waiting.len();
        let mut at = 0;
        while let Some(waiting) = self.barrier.waiting.get(at) {
            let task = waiting.task();
            if !which(waiting.command.itt, &task) {
                at += 1;
                continue;
            }
            self.barrier.take(at);
            self.late_data = true;
            self.over(task.counted);
        }
        self.barrier.waiting.len() < before
    }
}
