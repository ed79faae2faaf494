//! What an initiator sends (RFC 7143 §11.3, §11.5, §11.7, §11.10, §11.12, §11.14, §11.16, §11.18).

use super::{Bhs, FINAL, Fields, IMMEDIATE, LunField, PduError, opcode};

fn header(opcode: u8, immediate: bool, flags: u8) -> Bhs {
    let mut bhs = [0; super::BHS_BYTES];
    bhs[0] = opcode | if immediate { IMMEDIATE } else { 0 };
    bhs[1] = flags;
    bhs
}

fn flag(set: bool, bit: u8) -> u8 {
    if set { bit } else { 0 }
}

/// How a task is ordered among others (SAM-5 §8.9).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskAttribute {
    /// Not said.
    Untagged,
    /// In any order.
    Simple,
    /// After all before, before all after.
    Ordered,
    /// Before all that wait.
    HeadOfQueue,
    /// Auto contingent allegiance.
    Aca,
}

impl TaskAttribute {
    fn parse(value: u8) -> Result<Self, PduError> {
        Ok(match value {
            0 => Self::Untagged,
            1 => Self::Simple,
            2 => Self::Ordered,
            3 => Self::HeadOfQueue,
            4 => Self::Aca,
            other => {
                return Err(PduError::Field {
                    opcode: opcode::SCSI_COMMAND,
                    field: "ATTR",
                    value: other.into(),
                });
            }
        })
    }

    fn code(self) -> u8 {
        match self {
            Self::Untagged => 0,
            Self::Simple => 1,
            Self::Ordered => 2,
            Self::HeadOfQueue => 3,
            Self::Aca => 4,
        }
    }
}

/// SCSI Command (RFC 7143 §11.3). Immediate data may follow as data segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScsiCommand {
    /// Not counted by CmdSN, delivered at once.
    pub immediate: bool,
    /// F: no unsolicited Data-Out follows.
    pub final_: bool,
    /// R: data-in is expected.
    pub read: bool,
    /// W: data-out is to come.
    pub write: bool,
    /// Ordering.
    pub attribute: TaskAttribute,
    /// The logical unit.
    pub lun: LunField,
    /// Initiator task tag.
    pub itt: u32,
    /// Expected data transfer length in bytes.
    pub expected_bytes: u32,
    /// CmdSN.
    pub cmd_sn: u32,
    /// ExpStatSN.
    pub exp_stat_sn: u32,
    /// The CDB, its end filled with zeroes.
    pub cdb: [u8; 16],
}

impl ScsiCommand {
    /// Parses the header.
    ///
    /// # Errors
    /// A task attribute that is not defined.
    #[inline]
    pub fn parse(bhs: &Bhs) -> Result<Self, PduError> {
        let mut cdb = [0; 16];
        cdb.copy_from_slice(&bhs[32..48]);
        Ok(Self {
            immediate: bhs[0] & IMMEDIATE != 0,
            final_: bhs[1] & FINAL != 0,
            read: bhs[1] & 0x40 != 0,
            write: bhs[1] & 0x20 != 0,
            attribute: TaskAttribute::parse(bhs[1] & 7)?,
            lun: LunField(bhs.u64_at::<8>()),
            itt: bhs.u32_at::<16>(),
            expected_bytes: bhs.u32_at::<20>(),
            cmd_sn: bhs.u32_at::<24>(),
            exp_stat_sn: bhs.u32_at::<28>(),
            cdb,
        })
    }

    /// Prints the header.
    pub fn encode(&self) -> Bhs {
        let flags =
            flag(self.final_, FINAL) | flag(self.read, 0x40) | flag(self.write, 0x20) | self.attribute.code();
        let mut bhs = header(opcode::SCSI_COMMAND, self.immediate, flags);
        bhs.put64::<8>(self.lun.0);
        bhs.put32::<16>(self.itt);
        bhs.put32::<20>(self.expected_bytes);
        bhs.put32::<24>(self.cmd_sn);
        bhs.put32::<28>(self.exp_stat_sn);
        bhs[32..48].copy_from_slice(&self.cdb);
        bhs
    }
}

/// NOP-Out (RFC 7143 §11.18): a ping, or the answer to one. Ping data may follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NopOut {
    /// Not counted by CmdSN.
    pub immediate: bool,
    /// The logical unit; copied from the NOP-In in an answer.
    pub lun: LunField,
    /// The ping's tag; [`NO_TAG`](super::NO_TAG) where no answer is wanted.
    pub itt: u32,
    /// Copied from the NOP-In in an answer; otherwise [`NO_TAG`](super::NO_TAG).
    pub ttt: u32,
    /// CmdSN.
    pub cmd_sn: u32,
    /// ExpStatSN.
    pub exp_stat_sn: u32,
}

impl NopOut {
    /// Parses the header; nothing in it can be wrong.
    ///
    /// # Errors
    /// None.
    pub fn parse(bhs: &Bhs) -> Result<Self, PduError> {
        Ok(Self {
            immediate: bhs[0] & IMMEDIATE != 0,
            lun: LunField(bhs.u64_at::<8>()),
            itt: bhs.u32_at::<16>(),
            ttt: bhs.u32_at::<20>(),
            cmd_sn: bhs.u32_at::<24>(),
            exp_stat_sn: bhs.u32_at::<28>(),
        })
    }

    /// Prints the header.
    pub fn encode(&self) -> Bhs {
        let mut bhs = header(opcode::NOP_OUT, self.immediate, FINAL);
        bhs.put64::<8>(self.lun.0);
        bhs.put32::<16>(self.itt);
        bhs.put32::<20>(self.ttt);
        bhs.put32::<24>(self.cmd_sn);
        bhs.put32::<28>(self.exp_stat_sn);
        bhs
    }
}

/// What a task management request asks (RFC 7143 §11.5.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskFunction {
    /// One task, by its tag.
    AbortTask,
    /// All of this session's tasks on the logical unit.
    AbortTaskSet,
    /// Ends an auto contingent allegiance.
    ClearAca,
    /// Every session's tasks on the logical unit.
    ClearTaskSet,
    /// Resets a logical unit.
    LogicalUnitReset,
    /// Resets all logical units of the target.
    TargetWarmReset,
    /// The same, and ends all sessions.
    TargetColdReset,
    /// Moves a task to another connection.
    TaskReassign,
    /// Any other code.
    Other(u8),
}

impl TaskFunction {
    fn from_code(code: u8) -> Self {
        match code {
            1 => Self::AbortTask,
            2 => Self::AbortTaskSet,
            3 => Self::ClearAca,
            4 => Self::ClearTaskSet,
            5 => Self::LogicalUnitReset,
            6 => Self::TargetWarmReset,
            7 => Self::TargetColdReset,
            8 => Self::TaskReassign,
            other => Self::Other(other),
        }
    }

    fn code(self) -> u8 {
        match self {
            Self::AbortTask => 1,
            Self::AbortTaskSet => 2,
            Self::ClearAca => 3,
            Self::ClearTaskSet => 4,
            Self::LogicalUnitReset => 5,
            Self::TargetWarmReset => 6,
            Self::TargetColdReset => 7,
            Self::TaskReassign => 8,
            Self::Other(code) => code & 0x7f,
        }
    }
}

/// Task Management Function Request (RFC 7143 §11.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TaskManagementRequest {
    /// Not counted by CmdSN.
    pub immediate: bool,
    /// What is asked.
    pub function: TaskFunction,
    /// The logical unit.
    pub lun: LunField,
    /// Initiator task tag of the request.
    pub itt: u32,
    /// The tag of the task to abort; [`NO_TAG`](super::NO_TAG) otherwise.
    pub referenced_itt: u32,
    /// CmdSN.
    pub cmd_sn: u32,
    /// ExpStatSN.
    pub exp_stat_sn: u32,
    /// The CmdSN of the task to abort.
    pub ref_cmd_sn: u32,
    /// ExpDataSN, for a reassignment.
    pub exp_data_sn: u32,
}

impl TaskManagementRequest {
    /// Parses the header; nothing in it can be wrong.
    ///
    /// # Errors
    /// None.
    pub fn parse(bhs: &Bhs) -> Result<Self, PduError> {
        Ok(Self {
            immediate: bhs[0] & IMMEDIATE != 0,
            function: TaskFunction::from_code(bhs[1] & 0x7f),
            lun: LunField(bhs.u64_at::<8>()),
            itt: bhs.u32_at::<16>(),
            referenced_itt: bhs.u32_at::<20>(),
            cmd_sn: bhs.u32_at::<24>(),
            exp_stat_sn: bhs.u32_at::<28>(),
            ref_cmd_sn: bhs.u32_at::<32>(),
            exp_data_sn: bhs.u32_at::<36>(),
        })
    }

    /// Prints the header.
    pub fn encode(&self) -> Bhs {
        let mut bhs = header(
            opcode::TASK_MANAGEMENT_REQUEST,
            self.immediate,
            FINAL | self.function.code(),
        );
        bhs.put64::<8>(self.lun.0);
        bhs.put32::<16>(self.itt);
        bhs.put32::<20>(self.referenced_itt);
        bhs.put32::<24>(self.cmd_sn);
        bhs.put32::<28>(self.exp_stat_sn);
        bhs.put32::<32>(self.ref_cmd_sn);
        bhs.put32::<36>(self.exp_data_sn);
        bhs
    }
}

/// Login Request (RFC 7143 §11.12). Text keys follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoginRequest {
    /// T: ready for the next stage.
    pub transit: bool,
    /// C: the keys go on in the next request.
    pub continues: bool,
    /// CSG, 0 to 3.
    pub current_stage: u8,
    /// NSG, 0 to 3.
    pub next_stage: u8,
    /// Highest version.
    pub version_max: u8,
    /// Lowest version.
    pub version_min: u8,
    /// The initiator's part of the session's name.
    pub isid: [u8; 6],
    /// The target's part; 0 for a new session.
    pub tsih: u16,
    /// Initiator task tag, the same through the login.
    pub itt: u32,
    /// Connection id.
    pub cid: u16,
    /// CmdSN; the session's first.
    pub cmd_sn: u32,
    /// ExpStatSN.
    pub exp_stat_sn: u32,
}

impl LoginRequest {
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
            version_min: bhs[3],
            isid,
            tsih: bhs.u16_at::<14>(),
            itt: bhs.u32_at::<16>(),
            cid: bhs.u16_at::<20>(),
            cmd_sn: bhs.u32_at::<24>(),
            exp_stat_sn: bhs.u32_at::<28>(),
        })
    }

    /// Prints the header.
    pub fn encode(&self) -> Bhs {
        let flags = flag(self.transit, 0x80)
            | flag(self.continues, 0x40)
            | (self.current_stage & 3) << 2
            | self.next_stage & 3;
        let mut bhs = header(opcode::LOGIN_REQUEST, true, flags);
        bhs[2] = self.version_max;
        bhs[3] = self.version_min;
        bhs[8..14].copy_from_slice(&self.isid);
        bhs.put16::<14>(self.tsih);
        bhs.put32::<16>(self.itt);
        bhs.put16::<20>(self.cid);
        bhs.put32::<24>(self.cmd_sn);
        bhs.put32::<28>(self.exp_stat_sn);
        bhs
    }
}

/// Text Request (RFC 7143 §11.10). Text keys follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TextRequest {
    /// Not counted by CmdSN.
    pub immediate: bool,
    /// F: the initiator has no more to say.
    pub final_: bool,
    /// C: the keys go on in the next request.
    pub continues: bool,
    /// The logical unit, where the target asked for it.
    pub lun: LunField,
    /// Initiator task tag.
    pub itt: u32,
    /// [`NO_TAG`](super::NO_TAG) in the first request, then what the target gave.
    pub ttt: u32,
    /// CmdSN.
    pub cmd_sn: u32,
    /// ExpStatSN.
    pub exp_stat_sn: u32,
}

impl TextRequest {
    /// Parses the header; nothing in it can be wrong.
    ///
    /// # Errors
    /// None.
    pub fn parse(bhs: &Bhs) -> Result<Self, PduError> {
        Ok(Self {
            immediate: bhs[0] & IMMEDIATE != 0,
            final_: bhs[1] & FINAL != 0,
            continues: bhs[1] & 0x40 != 0,
            lun: LunField(bhs.u64_at::<8>()),
            itt: bhs.u32_at::<16>(),
            ttt: bhs.u32_at::<20>(),
            cmd_sn: bhs.u32_at::<24>(),
            exp_stat_sn: bhs.u32_at::<28>(),
        })
    }

    /// Prints the header.
    pub fn encode(&self) -> Bhs {
        let flags = flag(self.final_, FINAL) | flag(self.continues, 0x40);
        let mut bhs = header(opcode::TEXT_REQUEST, self.immediate, flags);
        bhs.put64::<8>(self.lun.0);
        bhs.put32::<16>(self.itt);
        bhs.put32::<20>(self.ttt);
        bhs.put32::<24>(self.cmd_sn);
        bhs.put32::<28>(self.exp_stat_sn);
        bhs
    }
}

/// SCSI Data-Out (RFC 7143 §11.7). The data follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DataOut {
    /// F: ends a sequence.
    pub final_: bool,
    /// The logical unit, where `ttt` is set.
    pub lun: LunField,
    /// The command's tag.
    pub itt: u32,
    /// The R2T that asked for it; [`NO_TAG`](super::NO_TAG) for unsolicited data.
    pub ttt: u32,
    /// ExpStatSN.
    pub exp_stat_sn: u32,
    /// Place in the sequence, from 0.
    pub data_sn: u32,
    /// Place of the first byte in the command's data.
    pub buffer_offset: u32,
}

impl DataOut {
    /// Parses the header; nothing in it can be wrong.
    ///
    /// # Errors
    /// None.
    #[inline]
    pub fn parse(bhs: &Bhs) -> Result<Self, PduError> {
        Ok(Self {
            final_: bhs[1] & FINAL != 0,
            lun: LunField(bhs.u64_at::<8>()),
            itt: bhs.u32_at::<16>(),
            ttt: bhs.u32_at::<20>(),
            exp_stat_sn: bhs.u32_at::<28>(),
            data_sn: bhs.u32_at::<36>(),
            buffer_offset: bhs.u32_at::<40>(),
        })
    }

    /// Prints the header.
    pub fn encode(&self) -> Bhs {
        let mut bhs = header(opcode::DATA_OUT, false, flag(self.final_, FINAL));
        bhs.put64::<8>(self.lun.0);
        bhs.put32::<16>(self.itt);
        bhs.put32::<20>(self.ttt);
        bhs.put32::<28>(self.exp_stat_sn);
        bhs.put32::<36>(self.data_sn);
        bhs.put32::<40>(self.buffer_offset);
        bhs
    }
}

/// Logout Request (RFC 7143 §11.14).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogoutRequest {
    /// Not counted by CmdSN.
    pub immediate: bool,
    /// 0 closes the session, 1 the connection, 2 removes it for recovery.
    pub reason: u8,
    /// Initiator task tag.
    pub itt: u32,
    /// The connection meant.
    pub cid: u16,
    /// CmdSN.
    pub cmd_sn: u32,
    /// ExpStatSN.
    pub exp_stat_sn: u32,
}

impl LogoutRequest {
    /// Parses the header; nothing in it can be wrong.
    ///
    /// # Errors
    /// None.
    pub fn parse(bhs: &Bhs) -> Result<Self, PduError> {
        Ok(Self {
            immediate: bhs[0] & IMMEDIATE != 0,
            reason: bhs[1] & 0x7f,
            itt: bhs.u32_at::<16>(),
            cid: bhs.u16_at::<20>(),
            cmd_sn: bhs.u32_at::<24>(),
            exp_stat_sn: bhs.u32_at::<28>(),
        })
    }

    /// Prints the header.
    pub fn encode(&self) -> Bhs {
        let mut bhs = header(opcode::LOGOUT_REQUEST, self.immediate, FINAL | self.reason & 0x7f);
        bhs.put32::<16>(self.itt);
        bhs.put16::<20>(self.cid);
        bhs.put32::<24>(self.cmd_sn);
        bhs.put32::<28>(self.exp_stat_sn);
        bhs
    }
}

/// SNACK Request (RFC 7143 §11.16): asks for PDUs again; of no use at ErrorRecoveryLevel 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Snack {
    /// What is asked for again.
    pub kind: u8,
    /// The logical unit.
    pub lun: LunField,
    /// Initiator task tag.
    pub itt: u32,
    /// Target transfer tag or SNACK tag.
    pub ttt: u32,
    /// ExpStatSN.
    pub exp_stat_sn: u32,
    /// First number asked for.
    pub begin: u32,
    /// How many; 0 for all.
    pub run: u32,
}

impl Snack {
    /// Parses the header; nothing in it can be wrong.
    ///
    /// # Errors
    /// None.
    pub fn parse(bhs: &Bhs) -> Result<Self, PduError> {
        Ok(Self {
            kind: bhs[1] & 0x0f,
            lun: LunField(bhs.u64_at::<8>()),
            itt: bhs.u32_at::<16>(),
            ttt: bhs.u32_at::<20>(),
            exp_stat_sn: bhs.u32_at::<28>(),
            begin: bhs.u32_at::<40>(),
            run: bhs.u32_at::<44>(),
        })
    }

    /// Prints the header.
    pub fn encode(&self) -> Bhs {
        let mut bhs = header(opcode::SNACK, false, FINAL | self.kind & 0x0f);
        bhs.put64::<8>(self.lun.0);
        bhs.put32::<16>(self.itt);
        bhs.put32::<20>(self.ttt);
        bhs.put32::<28>(self.exp_stat_sn);
        bhs.put32::<40>(self.begin);
        bhs.put32::<44>(self.run);
        bhs
    }
}
