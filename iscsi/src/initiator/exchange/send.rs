//! What goes out: commands within the window, data that was asked for, pings and answers to pings.

use super::{ABORT_BIT, Burst, Control, Exchange, LOGOUT_ITT, OUT_BYTES, PING_ITT};
use crate::pdu::{
    DataOut, LogoutRequest, LunField, NO_TAG, NopOut, ScsiCommand, TaskAttribute, TaskFunction,
    TaskManagementRequest,
};

impl Exchange {
    /// Appends what may be sent now, up to some [`OUT_BYTES`].
    pub(in crate::initiator) fn produce(&mut self, out: &mut Vec<u8>) {
        while let Some(control) = self.controls.pop_front() {
            self.send_control(control, out);
        }
        while out.len() < OUT_BYTES && self.send_burst(out) {}
        while out.len() < OUT_BYTES && self.window_is_open() {
            let Some(at) = self.waiting.pop_front() else { break };
            self.send_command(at, out);
            // Unsolicited data come in the order of their commands (RFC 7143 §4.2.5.2), so none stays behind.
            while out.len() < OUT_BYTES && self.send_burst(out) {}
        }
    }

    fn send_control(&mut self, control: Control, out: &mut Vec<u8>) {
        let (cmd_sn, exp_stat_sn) = (self.terms.cmd_sn, self.terms.exp_stat_sn);
        let nop = |lun, itt, ttt| NopOut {
            immediate: true,
            lun,
            itt,
            ttt,
            cmd_sn,
            exp_stat_sn,
        };
        match control {
            Control::Ping => {
                let pdu = nop(LunField::default(), PING_ITT, NO_TAG);
                self.framing.append(out, &pdu.into(), &[]);
            }
            Control::Pong { lun, ttt, data } => {
                self.framing.append(out, &nop(lun, NO_TAG, ttt).into(), &data);
            }
            Control::Abort { slot } => {
                let itt = self.itt(slot);
                let Some(task) = self.slots[slot].task.as_ref() else {
                    return;
                };
                let pdu = TaskManagementRequest {
                    immediate: true,
                    function: TaskFunction::AbortTask,
                    lun: task.job.lun,
                    itt: itt | ABORT_BIT,
                    referenced_itt: itt,
                    cmd_sn,
                    exp_stat_sn,
                    ref_cmd_sn: cmd_sn,
                    exp_data_sn: 0,
                };
                self.framing.append(out, &pdu.into(), &[]);
            }
            Control::Logout => {
                let pdu = LogoutRequest {
                    immediate: true,
                    reason: 0,
                    itt: LOGOUT_ITT,
                    cid: 0,
                    cmd_sn,
                    exp_stat_sn,
                };
                self.framing.append(out, &pdu.into(), &[]);
            }
        }
    }

    /// One Data-Out PDU of the first burst; `false` when there is none.
    fn send_burst(&mut self, out: &mut Vec<u8>) -> bool {
        let Some(burst) = self.bursts.front_mut() else {
            return false;
        };
        let task = self.slots.get_mut(burst.slot).and_then(|slot| slot.task.as_mut());
        let Some(task) = task else {
            self.bursts.pop_front();
            return true;
        };
        let end = burst.end.min(burst.at.saturating_add(self.terms.max_send_bytes));
        let last = end == burst.end;
        let pdu = DataOut {
            final_: last,
            lun: task.job.lun,
            itt: burst.itt,
            ttt: burst.ttt,
            exp_stat_sn: self.terms.exp_stat_sn,
            data_sn: burst.data_sn,
            buffer_offset: burst.at,
        };
        let data = task.job.write_data(burst.at, end);
        self.framing.append(out, &pdu.into(), &data);
        burst.at = end;
        burst.data_sn = burst.data_sn.wrapping_add(1);
        if last && burst.ttt == NO_TAG {
            self.bursts.pop_front();
        } else if last {
            task.r2ts = task.r2ts.saturating_sub(1);
            self.bursts.pop_front();
        }
        true
    }

    fn send_command(&mut self, at: usize, out: &mut Vec<u8>) {
        let itt = self.itt(at);
        let Some(task) = self.slots[at].task.as_mut() else {
            return;
        };
        if task.job.is_abandoned() {
            // Nobody waits for it, and the target does not know it yet.
            self.release(at);
            return;
        }
        task.sent = true;
        let job = &task.job;
        let immediate = job.write_data(0, self.terms.immediate_bytes.min(job.write_bytes()));
        let (came, first) = (
            immediate.len() as u32,
            self.terms.unsolicited_bytes.min(job.write_bytes()),
        );
        let goes_on = came < first;
        let pdu = ScsiCommand {
            immediate: false,
            final_: !goes_on,
            read: job.read_bytes() > 0,
            write: job.write_bytes() > 0,
            attribute: TaskAttribute::Simple,
            lun: job.lun,
            itt,
            expected_bytes: job.read_bytes().max(job.write_bytes()),
            cmd_sn: self.terms.cmd_sn,
            exp_stat_sn: self.terms.exp_stat_sn,
            cdb: job.cdb,
        };
        self.framing.append(out, &pdu.into(), &immediate);
        self.terms.cmd_sn = self.terms.cmd_sn.wrapping_add(1);
        if goes_on {
            self.bursts.push_back(Burst {
                slot: at,
                itt,
                ttt: NO_TAG,
                at: came,
                end: first,
                data_sn: 0,
            });
        }
    }
}
