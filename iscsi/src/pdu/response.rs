//! What a target sends (RFC 7143 §11.4, §11.6 to §11.9, §11.11, §11.13, §11.15, §11.17, §11.19).

use super::{Bhs, FINAL, Fields, LunField, PduError, opcode};

pub(super) fn header(opcode: u8, flags: u8) -> Bhs {
    let mut bhs = [0; super::BHS_BYTES];
    bhs[0] = opcode;
    bhs[1] = flags;
    bhs
}

pub(super) fn flag(set: bool, bit: u8) -> u8 {
    if set { bit } else { 0 }
}

/// By how many bytes a transfer missed what the initiator expected (RFC 7143 §11.4.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Residual {
    /// It met it.
    #[default]
    None,
    /// This many bytes could not be transferred, because the initiator expected less.
    Over(u32),
    /// This many bytes were expected and not transferred.
    Under(u32),
}

impl Residual {
    pub(super) fn flags(self) -> u8 {
        match self {
            Self::None => 0,
            Self::Over(_) => 0x04,
            Self::Under(_) => 0x02,
        }
    }

    pub(super) fn count(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Over(bytes) | Self::Under(bytes) => bytes,
        }
    }

    pub(super) fn parse(flags: u8, count: u32, opcode: u8) -> Result<Self, PduError> {
        match flags & 0x06 {
            0 => Ok(Self::None),
            0x04 => Ok(Self::Over(count)),
            0x02 => Ok(Self::Under(count)),
            both => Err(PduError::Field {
                opcode,
                field: "O and U",
                value: both.into(),
            }),
        }
    }
}

/// SCSI Response (RFC 7143 §11.4). Sense data, after a length of two bytes, may follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScsiResponse {
    /// What was left over.
    pub residual: Residual,
    /// 0: completed at the target; 1: target failure.
    pub response: u8,
    /// SCSI status, where `response` is 0.
    pub status: u8,
    /// The command's tag.
    pub itt: u32,
    /// For SNACK.
    pub snack_tag: u32,
    /// StatSN.
    pub stat_sn: u32,
    /// ExpCmdSN.
    pub exp_cmd_sn: u32,
    /// MaxCmdSN.
    pub max_cmd_sn: u32,
    /// How many R2T and Data-In PDUs the target sent for the command.
    pub exp_data_sn: u32,
}

impl ScsiResponse {
    /// Parses the header.
    ///
    /// # Errors
    /// An overflow and an underflow at once.
    pub fn parse(bhs: &Bhs) -> Result<Self, PduError> {
        Ok(Self {
            residual: Residual::parse(bhs[1], bhs.u32_at::<44>(), opcode::SCSI_RESPONSE)?,
            response: bhs[2],
            status: bhs[3],
            itt: bhs.u32_at::<16>(),
            snack_tag: bhs.u32_at::<20>(),
            stat_sn: bhs.u32_at::<24>(),
            exp_cmd_sn: bhs.u32_at::<28>(),
            max_cmd_sn: bhs.u32_at::<32>(),
            exp_data_sn: bhs.u32_at::<36>(),
        })
    }

    /// Prints the header.
    pub fn encode(&self) -> Bhs {
        let mut bhs = header(opcode::SCSI_RESPONSE, FINAL | self.residual.flags());
        bhs[2] = self.response;
        bhs[3] = self.status;
        bhs.put32::<16>(self.itt);
        bhs.put32::<20>(self.snack_tag);
        bhs.put32::<24>(self.stat_sn);
        bhs.put32::<28>(self.exp_cmd_sn);
        bhs.put32::<32>(self.max_cmd_sn);
        bhs.put32::<36>(self.exp_data_sn);
        bhs.put32::<44>(self.residual.count());
        bhs
    }
}

/// Responses to task management (RFC 7143 §11.6.1).
pub mod task_response {
    /// Function complete.
    pub const COMPLETE: u8 = 0;
    /// Task does not exist.
    pub const NO_TASK: u8 = 1;
    /// LUN does not exist.
    pub const NO_LUN: u8 = 2;
    /// Task still allegiant.
    pub const ALLEGIANT: u8 = 3;
    /// Task allegiance reassignment not supported.
    pub const NO_REASSIGNMENT: u8 = 4;
    /// Function not supported.
    pub const NOT_SUPPORTED: u8 = 5;
    /// Function rejected.
    pub const REJECTED: u8 = 255;
}

/// Task Management Function Response (RFC 7143 §11.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TaskManagementResponse {
    /// One of [`task_response`].
    pub response: u8,
    /// The request's tag.
    pub itt: u32,
    /// StatSN.
    pub stat_sn: u32,
    /// ExpCmdSN.
    pub exp_cmd_sn: u32,
    /// MaxCmdSN.
    pub max_cmd_sn: u32,
}

impl TaskManagementResponse {
    /// Parses the header; nothing in it can be wrong.
    ///
    /// # Errors
    /// None.
    pub fn parse(bhs: &Bhs) -> Result<Self, PduError> {
        Ok(Self {
            response: bhs[2],
            itt: bhs.u32_at::<16>(),
            stat_sn: bhs.u32_at::<24>(),
            exp_cmd_sn: bhs.u32_at::<28>(),
            max_cmd_sn: bhs.u32_at::<32>(),
        })
    }

    /// Prints the header.
    pub fn encode(&self) -> Bhs {
        let mut bhs = header(opcode::TASK_MANAGEMENT_RESPONSE, FINAL);
        bhs[2] = self.response;
        bhs.put32::<16>(self.itt);
        bhs.put32::<24>(self.stat_sn);
        bhs.put32::<28>(self.exp_cmd_sn);
        bhs.put32::<32>(self.max_cmd_sn);
        bhs
    }
}

/// Login Response (RFC 7143 §11.13). Text keys follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoginResponse {
    /// T: to the next stage.
    pub transit: bool,
    /// C: the keys go on in the next response.
    pub continues: bool,
    /// CSG, 0 to 3.
    pub current_stage: u8,
    /// NSG, 0 to 3.
    pub next_stage: u8,
    /// Highest version.
    pub version_max: u8,
    /// The version in force.
    pub version_active: u8,
    /// Copied from the request.
    pub isid: [u8; 6],
    /// The target's part of the session's name.
    pub tsih: u16,
    /// Copied from the request.
    pub itt: u32,
    /// StatSN.
    pub stat_sn: u32,
    /// ExpCmdSN.
    pub exp_cmd_sn: u32,
    /// MaxCmdSN.
    pub max_cmd_sn: u32,
    /// 0 success, 1 redirection, 2 the initiator's error, 3 the target's.
    pub status_class: u8,
    /// Detail of the class.
    pub status_detail: u8,
}

impl LoginResponse {
    /// Parses the header; stages are checked by the login itself.
    ///
    /// # Errors
    /// None.
    pub fn parse(bhs: &Bhs) -> Result<Self, PduError> {
        let mut isid = [0; 6];
        isid.copy_from_slice(&bhs[8..14]);
        Ok(Self {
            transit: bhs[1] & 0x80 != 0,
            continues: bhs[1] & 0x40 != 0,
            current_stage: bhs[1] >> 2 & 3,
            next_stage: bhs[1] & 3,
            version_max: bhs[2],
            version_active: bhs[3],
            isid,
            tsih: bhs.u16_at::<14>(),
            itt: bhs.u32_at::<16>(),
            stat_sn: bhs.u32_at::<24>(),
            exp_cmd_sn: bhs.u32_at::<28>(),
            max_cmd_sn: bhs.u32_at::<32>(),
            status_class: bhs[36],
            status_detail: bhs[37],
        })
    }

    /// Prints the header.
    pub fn encode(&self) -> Bhs {
        let flags = flag(self.transit, 0x80)
            | flag(self.continues, 0x40)
            | (self.current_stage & 3) << 2
            | self.next_stage & 3;
        let mut bhs = header(opcode::LOGIN_RESPONSE, flags);
        bhs[2] = self.version_max;
        bhs[3] = self.version_active;
        bhs[8..14].copy_from_slice(&self.isid);
        bhs.put16::<14>(self.tsih);
        bhs.put32::<16>(self.itt);
        bhs.put32::<24>(self.stat_sn);
        bhs.put32::<28>(self.exp_cmd_sn);
        bhs.put32::<32>(self.max_cmd_sn);
        bhs[36] = self.status_class;
        bhs[37] = self.status_detail;
        bhs
    }
}

/// Text Response (RFC 7143 §11.11). Text keys follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TextResponse {
    /// F: the target has no more to say.
    pub final_: bool,
    /// C: the keys go on in the next response.
    pub continues: bool,
    /// The logical unit that the next request must name.
    pub lun: LunField,
    /// The request's tag.
    pub itt: u32,
    /// The tag that the next request must bear; [`NO_TAG`](super::NO_TAG) at the end.
    pub ttt: u32,
    /// StatSN.
    pub stat_sn: u32,
    /// ExpCmdSN.
    pub exp_cmd_sn: u32,
    /// MaxCmdSN.
    pub max_cmd_sn: u32,
}

impl TextResponse {
    /// Parses the header; nothing in it can be wrong.
    ///
    /// # Errors
    /// None.
    pub fn parse(bhs: &Bhs) -> Result<Self, PduError> {
        Ok(Self {
            final_: bhs[1] & FINAL != 0,
            continues: bhs[1] & 0x40 != 0,
            lun: LunField(bhs.u64_at::<8>()),
            itt: bhs.u32_at::<16>(),
            ttt: bhs.u32_at::<20>(),
            stat_sn: bhs.u32_at::<24>(),
            exp_cmd_sn: bhs.u32_at::<28>(),
            max_cmd_sn: bhs.u32_at::<32>(),
        })
    }

    /// Prints the header.
    pub fn encode(&self) -> Bhs {
        let flags = flag(self.final_, FINAL) | flag(self.continues, 0x40);
        let mut bhs = header(opcode::TEXT_RESPONSE, flags);
        bhs.put64::<8>(self.lun.0);
        bhs.put32::<16>(self.itt);
        bhs.put32::<20>(self.ttt);
        bhs.put32::<24>(self.stat_sn);
        bhs.put32::<28>(self.exp_cmd_sn);
        bhs.put32::<32>(self.max_cmd_sn);
        bhs
    }
}

/// Asynchronous Message (RFC 7143 §11.9).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AsyncMessage {
    /// The logical unit, for a SCSI event.
    pub lun: LunField,
    /// StatSN.
    pub stat_sn: u32,
    /// ExpCmdSN.
    pub exp_cmd_sn: u32,
    /// MaxCmdSN.
    pub max_cmd_sn: u32,
    /// 0 SCSI event, 1 logout asked for, 2 connection dropped, 3 all connections dropped, 4 negotiation asked for.
    pub event: u8,
    /// Vendor's code.
    pub vendor_code: u8,
    /// The three parameters, by the event.
    pub parameters: [u16; 3],
}

impl AsyncMessage {
    /// Parses the header; nothing in it can be wrong.
    ///
    /// # Errors
    /// None.
    pub fn parse(bhs: &Bhs) -> Result<Self, PduError> {
        Ok(Self {
            lun: LunField(bhs.u64_at::<8>()),
            stat_sn: bhs.u32_at::<24>(),
            exp_cmd_sn: bhs.u32_at::<28>(),
            max_cmd_sn: bhs.u32_at::<32>(),
            event: bhs[36],
            vendor_code: bhs[37],
            parameters: [bhs.u16_at::<38>(), bhs.u16_at::<40>(), bhs.u16_at::<42>()],
        })
    }

    /// Prints the header.
    pub fn encode(&self) -> Bhs {
        let mut bhs = header(opcode::ASYNC_MESSAGE, FINAL);
        bhs.put64::<8>(self.lun.0);
        bhs.put32::<16>(super::NO_TAG);
        bhs.put32::<24>(self.stat_sn);
        bhs.put32::<28>(self.exp_cmd_sn);
        bhs.put32::<32>(self.max_cmd_sn);
        bhs[36] = self.event;
        bhs[37] = self.vendor_code;
        bhs.put16::<38>(self.parameters[0]);
        bhs.put16::<40>(self.parameters[1]);
        bhs.put16::<42>(self.parameters[2]);
        bhs
    }
}

/// Logout Response (RFC 7143 §11.15).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogoutResponse {
    /// 0 closed, 1 no such connection, 2 recovery not supported, 3 clean-up failed.
    pub response: u8,
    /// The request's tag.
    pub itt: u32,
    /// StatSN.
    pub stat_sn: u32,
    /// ExpCmdSN.
    pub exp_cmd_sn: u32,
    /// MaxCmdSN.
    pub max_cmd_sn: u32,
    /// Seconds to wait before a reconnect.
    pub time2wait_s: u16,
    /// Seconds that tasks are retained after that.
    pub time2retain_s: u16,
}

impl LogoutResponse {
    /// Parses the header; nothing in it can be wrong.
    ///
    /// # Errors
    /// None.
    pub fn parse(bhs: &Bhs) -> Result<Self, PduError> {
        Ok(Self {
            response: bhs[2],
            itt: bhs.u32_at::<16>(),
            stat_sn: bhs.u32_at::<24>(),
            exp_cmd_sn: bhs.u32_at::<28>(),
            max_cmd_sn: bhs.u32_at::<32>(),
            time2wait_s: bhs.u16_at::<40>(),
            time2retain_s: bhs.u16_at::<42>(),
        })
    }

    /// Prints the header.
    pub fn encode(&self) -> Bhs {
        let mut bhs = header(opcode::LOGOUT_RESPONSE, FINAL);
        bhs[2] = self.response;
        bhs.put32::<16>(self.itt);
        bhs.put32::<24>(self.stat_sn);
        bhs.put32::<28>(self.exp_cmd_sn);
        bhs.put32::<32>(self.max_cmd_sn);
        bhs.put16::<40>(self.time2wait_s);
        bhs.put16::<42>(self.time2retain_s);
        bhs
    }
}

/// NOP-In (RFC 7143 §11.19): a ping, or the answer to one. Ping data may follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NopIn {
    /// The logical unit, with a `ttt`.
    pub lun: LunField,
    /// The NOP-Out's tag in an answer; otherwise [`NO_TAG`](super::NO_TAG).
    pub itt: u32,
    /// Set where an answer is wanted; otherwise [`NO_TAG`](super::NO_TAG).
    pub ttt: u32,
    /// StatSN; not consumed by a ping.
    pub stat_sn: u32,
    /// ExpCmdSN.
    pub exp_cmd_sn: u32,
    /// MaxCmdSN.
    pub max_cmd_sn: u32,
}

impl NopIn {
    /// Parses the header; nothing in it can be wrong.
    ///
    /// # Errors
    /// None.
    pub fn parse(bhs: &Bhs) -> Result<Self, PduError> {
        Ok(Self {
            lun: LunField(bhs.u64_at::<8>()),
            itt: bhs.u32_at::<16>(),
            ttt: bhs.u32_at::<20>(),
            stat_sn: bhs.u32_at::<24>(),
            exp_cmd_sn: bhs.u32_at::<28>(),
            max_cmd_sn: bhs.u32_at::<32>(),
        })
    }

    /// Prints the header.
    pub fn encode(&self) -> Bhs {
        let mut bhs = header(opcode::NOP_IN, FINAL);
        bhs.put64::<8>(self.lun.0);
        bhs.put32::<16>(self.itt);
        bhs.put32::<20>(self.ttt);
        bhs.put32::<24>(self.stat_sn);
        bhs.put32::<28>(self.exp_cmd_sn);
        bhs.put32::<32>(self.max_cmd_sn);
        bhs
    }
}

/// Reasons of a Reject (RFC 7143 §11.17.1).
pub mod reject_reason {
    /// Data (payload) digest error.
    pub const DATA_DIGEST: u8 = 0x02;
    /// SNACK rejected.
    pub const SNACK: u8 = 0x03;
    /// Protocol error.
    pub const PROTOCOL_ERROR: u8 = 0x04;
    /// Command not supported.
    pub const NOT_SUPPORTED: u8 = 0x05;
    /// Immediate command rejected: too many of them.
    pub const IMMEDIATE_COMMAND: u8 = 0x06;
    /// Task in progress.
    pub const TASK_IN_PROGRESS: u8 = 0x07;
    /// Invalid data ACK.
    pub const INVALID_DATA_ACK: u8 = 0x08;
    /// Invalid PDU field.
    pub const INVALID_FIELD: u8 = 0x09;
    /// Out of resources.
    pub const OUT_OF_RESOURCES: u8 = 0x0a;
    /// Waiting for logout.
    pub const WAITING_FOR_LOGOUT: u8 = 0x0c;
}

/// Reject (RFC 7143 §11.17). The header of the refused PDU follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reject {
    /// One of [`reject_reason`].
    pub reason: u8,
    /// StatSN.
    pub stat_sn: u32,
    /// ExpCmdSN.
    pub exp_cmd_sn: u32,
    /// MaxCmdSN.
    pub max_cmd_sn: u32,
    /// DataSN or R2TSN, for a data digest error.
    pub data_sn: u32,
}

impl Reject {
    /// Parses the header; nothing in it can be wrong.
    ///
    /// # Errors
    /// None.
    pub fn parse(bhs: &Bhs) -> Result<Self, PduError> {
        Ok(Self {
            reason: bhs[2],
            stat_sn: bhs.u32_at::<24>(),
            exp_cmd_sn: bhs.u32_at::<28>(),
            max_cmd_sn: bhs.u32_at::<32>(),
            data_sn: bhs.u32_at::<36>(),
        })
    }

    /// Prints the header.
    pub fn encode(&self) -> Bhs {
        let mut bhs = header(opcode::REJECT, FINAL);
        bhs[2] = self.reason;
        bhs.put32::<16>(super::NO_TAG);
        bhs.put32::<24>(self.stat_sn);
        bhs.put32::<28>(self.exp_cmd_sn);
        bhs.put32::<32>(self.max_cmd_sn);
        bhs.put32::<36>(self.data_sn);
        bhs
    }
}
