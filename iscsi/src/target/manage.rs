//! What is no SCSI command: pings, task management, text requests, logout.

use std::net::SocketAddr;

use super::connection::{Abortion, Connection, End, Task, TaskKind, piece_bytes};
use super::registry::{Gate, Order, Ticket};
use crate::login::{
    MAX_REQUEST_TEXT_BYTES, PORTAL_GROUP_TAG, append_key, is_of_the_login, max_recv_bytes, parse_keys,
};
use crate::pdu::{
    Bhs, LogoutRequest, LogoutResponse, NO_TAG, NopIn, NopOut, Pdu, TaskFunction, TaskManagementRequest,
    TextRequest, TextResponse, reject_reason, task_response,
};
use crate::session::{Admission, QUEUE_DEPTH};

/// Task management requests that wait for tasks to end; immediate ones are held back by no window.
const MAX_ABORTIONS: usize = QUEUE_DEPTH as usize;
/// Keys of one text request: far more than exist.
const MAX_KEYS: usize = 64;
/// Text requests that one text may come in: the longest that is taken fits two.
const MAX_TEXT_PARTS: u32 = 32;

impl Connection {
    pub(super) fn nop(&mut self, nop: &NopOut, data: &[u8], counted: bool) {
        self.over(counted);
        if nop.itt == NO_TAG {
            // The answer to our ping; that something came was noted.
            return;
        }
        let data = &data[..data.len().min(self.parameters.peer_max_recv_bytes as usize)];
        let answer = NopIn {
            lun: nop.lun,
            itt: nop.itt,
            ttt: NO_TAG,
            stat_sn: self.next_stat_sn(),
            exp_cmd_sn: self.window.expected(),
            max_cmd_sn: self.window.max(),
        };
        self.send(&Pdu::NopIn(answer), data);
    }

    pub(super) fn manage(&mut self, request: &TaskManagementRequest, counted: bool) {
        let Some(target) = self.target.clone() else { return };
        if self.abortions.len() >= MAX_ABORTIONS {
            self.over(counted);
            return self.task_response(request.itt, task_response::REJECTED);
        }
        let place = request
            .lun
            .number()
            .and_then(|n| target.luns.iter().position(|&lun| lun == n));
        let of_target = matches!(
            request.function,
            TaskFunction::TargetWarmReset | TaskFunction::TargetColdReset
        );
        let (Some(place), false) = (place, of_target) else {
            if of_target {
                self.reset_target(request, counted);
            } else {
                self.over(counted);
                self.task_response(request.itt, task_response::NO_LUN);
            }
            return;
        };
        let unit = &target.units[place];
        let lun = unit.logical.number();
        let serials = match request.function {
            TaskFunction::AbortTask => {
                match self.tasks.get(&request.referenced_itt).map(|task| task.serial) {
                    Some(serial) => self.abort_where(|task| task.serial == serial),
                    None => {
                        self.over(counted);
                        let waited = self.abort_waiting(|itt, _| itt == request.referenced_itt);
                        let response = match waited {
                            true => task_response::COMPLETE,
                            false => self.abort_early(request),
                        };
                        return self.task_response(request.itt, response);
                    }
                }
            }
            // Each session has a task set of its own (TST 1 in the control mode page), so both mean the same tasks (RFC 7143
            // §11.5.1), and nobody else has anything to be told.
            TaskFunction::AbortTaskSet | TaskFunction::ClearTaskSet => {
                self.abort_where(|task| task.lun == lun)
            }
            TaskFunction::LogicalUnitReset => {
                unit.logical.reset();
                let gate = self.abort_of_others(&[lun]);
                let serials = self.abort_where(|task| task.lun == lun);
                return self.answer_when_ended(Abortion {
                    itt: request.itt,
                    counted,
                    serials,
                    gate: Some(gate),
                    is_cold: false,
                });
            }
            TaskFunction::TaskReassign => {
                self.over(counted);
                return self.task_response(request.itt, task_response::NO_REASSIGNMENT);
            }
            _ => {
                self.over(counted);
                return self.task_response(request.itt, task_response::NOT_SUPPORTED);
            }
        };
        self.answer_when_ended(Abortion {
            itt: request.itt,
            counted,
            serials,
            gate: None,
            is_cold: false,
        });
    }

    /// Aborts a command that has not come yet: its number is passed over when its turn comes (RFC 7143 §11.6.1).
    fn abort_early(&mut self, request: &TaskManagementRequest) -> u8 {
        let cmd_sn = request.ref_cmd_sn;
        let before = (cmd_sn.wrapping_sub(request.cmd_sn) as i32) < 0;
        if !before || self.window.admit(cmd_sn) == Admission::Ignore {
            return task_response::NO_TASK;
        }
        self.unlearn(cmd_sn);
        task_response::COMPLETE
    }

    fn answer_when_ended(&mut self, abortion: Abortion) {
        self.abortions.push(abortion);
        self.answer_abortions();
    }

    fn reset_target(&mut self, request: &TaskManagementRequest, counted: bool) {
        let Some(target) = self.target.clone() else { return };
        for unit in &target.units {
            unit.logical.reset();
        }
        let gate = self.abort_of_others(&target.luns);
        let serials = self.abort_where(|_| true);
        self.answer_when_ended(Abortion {
            itt: request.itt,
            counted,
            serials,
            gate: Some(gate),
            is_cold: request.function == TaskFunction::TargetColdReset,
        });
    }

    /// Ends the sessions of the target, this one too, once what it has to say was said.
    pub(super) fn end_all(&mut self, why: &'static str) {
        self.order_others(&Order::Close(why));
        self.end = Some(End::Ordered(why));
    }

    /// Has the other sessions abort their tasks on these units; the gate opens when they have ended.
    fn abort_of_others(&self, luns: &[u16]) -> Gate {
        let (ticket, gate) = Ticket::new(&self.handle);
        for &lun in luns {
            self.order_others(&Order::Abort(lun, vec![ticket.clone()]));
        }
        gate
    }

    fn order_others(&self, order: &Order) {
        let Some(target) = &self.target else { return };
        for session in target.sessions(|session| session.tsih != self.handle.tsih) {
            session.control.send(order.clone());
        }
    }

    /// Aborts tasks: none of them is answered. Gives the serials of those that must end on their device first.
    pub(super) fn abort_where(&mut self, which: impl Fn(&Task) -> bool) -> Vec<u64> {
        self.abort_waiting(|_, task| which(task));
        let mut waits = Vec::new();
        let hit: Vec<u32> = self
            .tasks
            .iter()
            .filter(|(_, task)| which(task))
            .map(|(&itt, _)| itt)
            .collect();
        for itt in hit {
            let Some(task) = self.tasks.get_mut(&itt) else {
                continue;
            };
            let serial = task.serial;
            self.late_data = true;
            match &mut task.kind {
                TaskKind::Changing => {
                    task.kind = TaskKind::Aborted;
                    waits.push(serial);
                }
                TaskKind::Aborted => waits.push(serial),
                // The window's room comes back when the device is done with it.
                TaskKind::Reading => {
                    let stalled = self.stalled.iter().any(|read| read.serial == serial);
                    let counted = task.counted;
                    self.stalled.retain(|read| read.serial != serial);
                    self.tasks.remove(&itt);
                    if stalled {
                        self.over(counted);
                    }
                }
                TaskKind::Gathering(gathering) => {
                    self.writing_bytes = self.writing_bytes.saturating_sub(gathering.transfer.kept());
                    let counted = task.counted;
                    self.tasks.remove(&itt);
                    self.changing.remove(&serial);
                    self.over(counted);
                }
                TaskKind::Waiting => {
                    let counted = task.counted;
                    self.tasks.remove(&itt);
                    self.flushes.retain(|flush| flush.serial != serial);
                    self.over(counted);
                }
            }
        }
        waits
    }

    pub(super) fn logout(&mut self, request: &LogoutRequest, counted: bool) {
        self.over(counted);
        // 2 would keep the connection's tasks for another one.
        let response = match request.reason {
            0 | 1 => 0,
            _ => 2,
        };
        let answer = LogoutResponse {
            response,
            itt: request.itt,
            stat_sn: self.next_stat_sn(),
            exp_cmd_sn: self.window.expected(),
            max_cmd_sn: self.window.max(),
            time2wait_s: self.parameters.time2wait_s,
            time2retain_s: 0,
        };
        self.send(&Pdu::LogoutResponse(answer), &[]);
        if response == 0 {
            self.end = Some(End::Logout);
        }
    }

    pub(super) fn text(&mut self, request: &TextRequest, bhs: &Bhs, data: &[u8], counted: bool) {
        self.over(counted);
        if request.ttt == NO_TAG {
            // A new negotiation; one that was not finished is forgotten (RFC 7143 §11.10.4).
            self.text_request.clear();
            self.text_parts = 0;
            self.text_rest = None;
        }
        if let Some((ttt, rest)) = self.text_rest.take_if(|(ttt, _)| *ttt == request.ttt) {
            debug_assert_eq!(ttt, request.ttt);
            return self.text_answer(request, rest);
        }
        if request.ttt != NO_TAG && self.text_parts == 0 || request.continues && request.final_ {
            self.breach(&"a text request out of order");
            return self.reject(reject_reason::PROTOCOL_ERROR, bhs);
        }
        self.text_parts += 1;
        if self.text_request.len() + data.len() > MAX_REQUEST_TEXT_BYTES || self.text_parts > MAX_TEXT_PARTS {
            self.text_request = Vec::new();
            self.text_parts = 0;
            self.breach(&"a text request without end");
            return self.reject(reject_reason::OUT_OF_RESOURCES, bhs);
        }
        self.text_request.extend_from_slice(data);
        if request.continues {
            let ttt = self.new_ttt();
            return self.text_response(request, ttt, false, &[]);
        }
        let whole = std::mem::take(&mut self.text_request);
        self.text_parts = 0;
        let keys = match parse_keys(&whole) {
            Ok(keys) if are_distinct(&keys) => keys,
            _ => {
                self.breach(&"a text request that is no text, or has a key twice, or too many");
                return self.reject(reject_reason::PROTOCOL_ERROR, bhs);
            }
        };
        let mut out = Vec::new();
        for (key, value) in keys {
            match key {
                "SendTargets" => self.send_targets(value, &mut out),
                "MaxRecvDataSegmentLength" => match max_recv_bytes(value) {
                    Ok(bytes) if self.send_at_most(bytes) => {}
                    Ok(_) => return self.reject(reject_reason::OUT_OF_RESOURCES, bhs),
                    Err(_) => append_key(&mut out, key, "Reject"),
                },
                // A declaration that needs no answer.
                "InitiatorAlias" => {}
                _ if is_of_the_login(key) => append_key(&mut out, key, "Reject"),
                _ => append_key(&mut out, key, "NotUnderstood"),
            }
        }
        self.text_answer(request, out);
    }

    /// The initiator takes data segments of so many bytes from now on (RFC 7143 §13.12). `false`: not while what is longer is on
    /// its way.
    fn send_at_most(&mut self, bytes: u32) -> bool {
        let busy = !self.running.is_empty() || !self.stalled.is_empty() || !self.tasks.is_empty();
        if busy {
            // Less than it takes is never wrong.
            return bytes >= self.parameters.peer_max_recv_bytes;
        }
        self.parameters.peer_max_recv_bytes = bytes;
        self.sending.max_data_bytes = bytes;
        self.piece_bytes = piece_bytes(bytes);
        true
    }

    /// Answers with as much as fits; the initiator asks for the rest.
    fn text_answer(&mut self, request: &TextRequest, mut out: Vec<u8>) {
        let longest = (self.parameters.peer_max_recv_bytes as usize).min(64 * 1024);
        if out.len() <= longest {
            return self.text_response(request, NO_TAG, true, &out);
        }
        let rest = out.split_off(longest);
        let ttt = self.new_ttt();
        self.text_response(request, ttt, false, &out);
        self.text_rest = Some((ttt, rest));
    }

    fn text_response(&mut self, request: &TextRequest, ttt: u32, final_: bool, text: &[u8]) {
        let response = TextResponse {
            final_,
            continues: !final_ && !text.is_empty(),
            lun: request.lun,
            itt: request.itt,
            ttt,
            stat_sn: self.next_stat_sn(),
            exp_cmd_sn: self.window.expected(),
            max_cmd_sn: self.window.max(),
        };
        self.send(&Pdu::TextResponse(response), text);
    }

    /// SendTargets (RFC 7143 appendix C): `All` in a discovery session, nothing in another one (that means the session's own
    /// target), a name in both. Only what the initiator may use is listed.
    fn send_targets(&self, value: &str, out: &mut Vec<u8>) {
        if matches!((&self.target, value), (Some(_), "All") | (None, "")) {
            return append_key(out, "SendTargets", "Reject");
        }
        let mut targets: Vec<_> = match (&self.target, value) {
            (None, "All") => self.shared.targets.lock().values().cloned().collect(),
            (Some(own), "") => vec![own.clone()],
            (_, name) => self
                .shared
                .targets
                .lock()
                .values()
                .filter(|t| t.name.as_str() == name)
                .cloned()
                .collect(),
        };
        targets.retain(|target| {
            let removing = target.removing.load(std::sync::atomic::Ordering::Acquire);
            !removing && target.access.lock().admits(&self.initiator)
        });
        targets.sort_by(|a, b| a.name.cmp(&b.name));
        let mut portals: Vec<_> = self.local.into_iter().collect();
        // Other portals, where they have an address that can be given away.
        portals.extend(
            self.shared
                .portals
                .iter()
                .filter(|portal| !portal.ip().is_unspecified()),
        );
        for portal in &mut portals {
            if let SocketAddr::V6(portal) = portal {
                // The number of an interface of ours means nothing to others.
                portal.set_scope_id(0);
            }
        }
        let mut seen = std::collections::HashSet::new();
        portals.retain(|portal| seen.insert(*portal));
        for target in targets {
            append_key(out, "TargetName", target.name.as_str());
            for portal in &portals {
                append_key(out, "TargetAddress", &format!("{portal},{PORTAL_GROUP_TAG}"));
            }
        }
    }
}

/// A key that came twice would be answered twice: `SendTargets` a thousand times, for one.
fn are_distinct(keys: &[(&str, &str)]) -> bool {
    let names: std::collections::HashSet<_> = keys.iter().map(|(key, _)| key).collect();
    keys.len() <= MAX_KEYS && names.len() == keys.len()
}
