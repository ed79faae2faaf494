//! Data of reads, and the call for data of writes (RFC 7143 §11.7, §11.8).

use super::response::{Residual, flag, header};
use super::{Bhs, FINAL, Fields, LunField, PduError, opcode};

/// SCSI Data-In (RFC 7143 §11.7). The data follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DataIn {
    /// F: ends a sequence.
    pub final_: bool,
    /// A: asks for an acknowledgement (ErrorRecoveryLevel above 0).
    pub acknowledge: bool,
    /// The SCSI status (S bit), in the last PDU of a command that went well; with it `residual` counts.
    pub status: Option<u8>,
    /// What was left over; [`Residual::None`] without a status.
    pub residual: Residual,
    /// The logical unit, with `acknowledge`.
    pub lun: LunField,
    /// The command's tag.
    pub itt: u32,
    /// With `acknowledge`; otherwise [`NO_TAG`](super::NO_TAG).
    pub ttt: u32,
    /// StatSN, with a status; otherwise reserved.
    pub stat_sn: u32,
    /// ExpCmdSN.
    pub exp_cmd_sn: u32,
    /// MaxCmdSN.
    pub max_cmd_sn: u32,
    /// Place among the command's Data-In PDUs, from 0.
    pub data_sn: u32,
    /// Place of the first byte in the command's data.
    pub buffer_offset: u32,
}

impl DataIn {
    /// Parses the header.
    ///
    /// # Errors
    /// An overflow and an underflow at once.
    #[inline]
    pub fn parse(bhs: &Bhs) -> Result<Self, PduError> {
        let status = (bhs[1] & 0x01 != 0).then_some(bhs[3]);
        Ok(Self {
            final_: bhs[1] & FINAL != 0,
            acknowledge: bhs[1] & 0x40 != 0,
            status,
            residual: match status {
                Some(_) => Residual::parse(bhs[1], bhs.u32_at::<44>(), opcode::DATA_IN)?,
                None => Residual::None,
            },
            lun: LunField(bhs.u64_at::<8>()),
            itt: bhs.u32_at::<16>(),
            ttt: bhs.u32_at::<20>(),
            stat_sn: bhs.u32_at::<24>(),
            exp_cmd_sn: bhs.u32_at::<28>(),
            max_cmd_sn: bhs.u32_at::<32>(),
            data_sn: bhs.u32_at::<36>(),
            buffer_offset: bhs.u32_at::<40>(),
        })
    }

    /// Prints the header.
    #[inline]
    pub fn encode(&self) -> Bhs {
        let flags = flag(self.final_, FINAL) | flag(self.acknowledge, 0x40);
        let mut bhs = header(opcode::DATA_IN, flags);
        if let Some(status) = self.status {
            bhs[1] |= 0x01 | self.residual.flags();
            bhs[3] = status;
            bhs.put32::<44>(self.residual.count());
        }
        bhs.put64::<8>(self.lun.0);
        bhs.put32::<16>(self.itt);
        bhs.put32::<20>(self.ttt);
        bhs.put32::<24>(self.stat_sn);
        bhs.put32::<28>(self.exp_cmd_sn);
        bhs.put32::<32>(self.max_cmd_sn);
        bhs.put32::<36>(self.data_sn);
        bhs.put32::<40>(self.buffer_offset);
        bhs
    }
}

/// Ready To Transfer (RFC 7143 §11.8).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct R2t {
    /// The logical unit.
    pub lun: LunField,
    /// The command's tag.
    pub itt: u32,
    /// The tag that the Data-Out PDUs must bear.
    pub ttt: u32,
    /// The next StatSN; not consumed.
    pub stat_sn: u32,
    /// ExpCmdSN.
    pub exp_cmd_sn: u32,
    /// MaxCmdSN.
    pub max_cmd_sn: u32,
    /// Place among the command's R2Ts, from 0.
    pub r2t_sn: u32,
    /// Place of the first byte in the command's data.
    pub buffer_offset: u32,
    /// Bytes asked for.
    pub desired_bytes: u32,
}

impl R2t {
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
            r2t_sn: bhs.u32_at::<36>(),
            buffer_offset: bhs.u32_at::<40>(),
            desired_bytes: bhs.u32_at::<44>(),
        })
    }

    /// Prints the header.
    pub fn encode(&self) -> Bhs {
        let mut bhs = header(opcode::R2T, FINAL);
        bhs.put64::<8>(self.lun.0);
        bhs.put32::<16>(self.itt);
        bhs.put32::<20>(self.ttt);
        bhs.put32::<24>(self.stat_sn);
        bhs.put32::<28>(self.exp_cmd_sn);
        bhs.put32::<32>(self.max_cmd_sn);
        bhs.put32::<36>(self.r2t_sn);
        bhs.put32::<40>(self.buffer_offset);
        bhs.put32::<44>(self.desired_bytes);
        bhs
    }
}
