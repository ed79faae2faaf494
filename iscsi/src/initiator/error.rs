//! What can go wrong between an initiator and a target.

use std::fmt;
use std::io;
use std::sync::Arc;

use treeboot_types::Iqn;

use crate::login::{LoginError, TextError};
use crate::pdu::{FrameError, PduError};

/// Sense data of a CHECK CONDITION (SPC-4 §4.5), cut to what decisions need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SenseCode {
    /// Sense key.
    pub key: u8,
    /// Additional sense code.
    pub asc: u8,
    /// Additional sense code qualifier.
    pub ascq: u8,
}

/// NOT READY.
const NOT_READY: u8 = 0x2;
/// MEDIUM ERROR.
const MEDIUM_ERROR: u8 = 0x3;
/// ILLEGAL REQUEST.
const ILLEGAL_REQUEST: u8 = 0x5;
/// UNIT ATTENTION.
const UNIT_ATTENTION: u8 = 0x6;
/// DATA PROTECT.
const DATA_PROTECT: u8 = 0x7;

impl SenseCode {
    /// Parses sense data in fixed (70h, 71h) or descriptor (72h, 73h) format; `None` for anything else.
    pub fn parse(sense: &[u8]) -> Option<Self> {
        let at = |index: usize| sense.get(index).copied();
        match at(0)? & 0x7f {
            // In fixed format the codes may be cut off.
            0x70 | 0x71 => Some(Self {
                key: at(2)? & 0x0f,
                asc: at(12).unwrap_or(0),
                ascq: at(13).unwrap_or(0),
            }),
            0x72 | 0x73 => Some(Self {
                key: at(1)? & 0x0f,
                asc: at(2)?,
                ascq: at(3)?,
            }),
            _ => None,
        }
    }

    /// Something about the unit changed since the last command; the command was not carried out.
    pub fn is_unit_attention(self) -> bool {
        self.key == UNIT_ATTENTION
    }

    /// The state of access to the unit (ALUA) changed, or does not allow the command: who asks for the state learns more.
    pub fn is_about_access(self) -> bool {
        matches!(
            (self.key, self.asc, self.ascq),
            (UNIT_ATTENTION, 0x2a, 0x06) | (NOT_READY, 0x04, 0x0a..=0x0c)
        )
    }

    /// ASYMMETRIC ACCESS STATE TRANSITION: the same command may succeed in a moment.
    pub fn is_transition(self) -> bool {
        (self.key, self.asc, self.ascq) == (NOT_READY, 0x04, 0x0a)
    }

    /// INVALID COMMAND OPERATION CODE: the target does not know the command.
    pub fn is_invalid_opcode(self) -> bool {
        (self.key, self.asc) == (ILLEGAL_REQUEST, 0x20)
    }

    /// WRITE PROTECTED, for whatever reason but lack of space.
    pub fn is_write_protected(self) -> bool {
        self.key == DATA_PROTECT && !self.is_no_space()
    }

    /// SPACE ALLOCATION FAILED, WRITE PROTECT.
    pub fn is_no_space(self) -> bool {
        (self.key, self.asc, self.ascq) == (DATA_PROTECT, 0x27, 0x07)
    }

    /// MEDIUM ERROR.
    pub fn is_medium_error(self) -> bool {
        self.key == MEDIUM_ERROR
    }

    /// The same command will fail again.
    pub fn is_lasting(self) -> bool {
        matches!(self.key, ILLEGAL_REQUEST | DATA_PROTECT)
    }
}

impl fmt::Display for SenseCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.key {
            0x0 => "NO SENSE",
            0x1 => "RECOVERED ERROR",
            NOT_READY => "NOT READY",
            MEDIUM_ERROR => "MEDIUM ERROR",
            0x4 => "HARDWARE ERROR",
            ILLEGAL_REQUEST => "ILLEGAL REQUEST",
            UNIT_ATTENTION => "UNIT ATTENTION",
            DATA_PROTECT => "DATA PROTECT",
            0x8 => "BLANK CHECK",
            0xb => "ABORTED COMMAND",
            0xd => "VOLUME OVERFLOW",
            0xe => "MISCOMPARE",
            _ => "sense key",
        };
        write!(f, "{name} {:x}/{:02x}/{:02x}", self.key, self.asc, self.ascq)
    }
}

/// What a target did that the standard does not allow.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// The stream cannot be cut into PDUs.
    #[error("it sent {0}")]
    Frame(#[from] FrameError),
    /// A header that is no PDU.
    #[error("it sent {0}")]
    Pdu(#[from] PduError),
    /// A PDU that has no place here.
    #[error("it sent a PDU of operation code {opcode:#04x}, which is not expected {when}")]
    Unexpected {
        /// The operation code.
        opcode: u8,
        /// The state of affairs.
        when: &'static str,
    },
    /// An answer to nothing.
    #[error("it answered task {itt:#010x}, which does not exist")]
    UnknownTask {
        /// The tag.
        itt: u32,
    },
    /// Data that does not continue what came before.
    #[error("it sent data for offset {got} of a transfer, where {expected} is next")]
    Offset {
        /// The offset in bytes that would follow.
        expected: u32,
        /// The offset in bytes in the PDU.
        got: u32,
    },
    /// More than was asked for.
    #[error("it sent or asked for bytes up to {end} of a transfer of {expected}")]
    TooMuch {
        /// The transfer's length in bytes.
        expected: u32,
        /// Where the PDU's data would end.
        end: u64,
    },
    /// A Data-In PDU is missing.
    #[error("it sent the Data-In PDU {got} of a transfer, where {expected} is next")]
    DataSn {
        /// The number that would follow.
        expected: u32,
        /// The number in the PDU.
        got: u32,
    },
    /// Text that is not `key=value`.
    #[error("it sent {0}")]
    Text(#[from] TextError),
    /// A bound on rounds or lengths.
    #[error("it never comes to an end: {what}")]
    Endless {
        /// What has no end.
        what: &'static str,
    },
}

/// Why a session could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Not `host:port`.
    #[error("'{0}' is not a portal; one looks like host:3260, 10.0.0.1:3260 or [2001:db8::1]:3260")]
    Portal(String),
    /// The name has no address.
    #[error("the name of portal {portal} cannot be resolved")]
    Resolve {
        /// As it was given.
        portal: String,
        /// The resolver's reason.
        #[source]
        source: io::Error,
    },
    /// No TCP connection.
    #[error("no connection to portal {portal}")]
    Tcp {
        /// As it was given.
        portal: String,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// The connection broke during the login.
    #[error("portal {portal} ended the connection during the login")]
    Broken {
        /// As it was given.
        portal: String,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// The target refused the login, or the negotiation failed.
    #[error("no login to {target} at portal {portal}")]
    Login {
        /// As it was given.
        portal: String,
        /// The target; "discovery" for a discovery session.
        target: String,
        /// The reason.
        #[source]
        source: LoginError,
    },
    /// It did not speak as RFC 7143 says.
    #[error("portal {portal} broke the protocol")]
    Protocol {
        /// As it was given.
        portal: String,
        /// What it did.
        #[source]
        source: ProtocolError,
    },
    /// Too many redirections.
    #[error("the target {target} was moved {times} times in a row, the last time to {portal}")]
    Redirects {
        /// The target.
        target: String,
        /// How often.
        times: u32,
        /// Where to, the last time.
        portal: String,
    },
    /// No answer in time.
    #[error("portal {portal} did not complete the login within {ms} ms")]
    TimedOut {
        /// As it was given.
        portal: String,
        /// The limit.
        ms: u64,
    },
    /// The session is there, but not the LUN.
    #[error("portal {portal} serves no usable LUN {lun} in {target}")]
    Lun {
        /// As it was given.
        portal: String,
        /// The target.
        target: Iqn,
        /// The LUN.
        lun: u16,
        /// What it answered.
        #[source]
        source: CommandError,
    },
}

/// Why a session ended. It is one for all commands that were under way.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SessionEnd {
    /// We closed it.
    #[error("the session was closed on this side")]
    Closed,
    /// The target closed the connection.
    #[error("the target closed the connection")]
    ClosedByTarget,
    /// The connection broke.
    #[error("the connection broke")]
    Broken(#[source] Arc<io::Error>),
    /// Nothing came.
    #[error("the target was silent for {ms} ms while it owed answers")]
    Silent {
        /// How long.
        ms: u64,
    },
    /// The target did what it may not.
    #[error("the target broke the protocol")]
    Protocol(#[source] ProtocolError),
    /// The target asked us to log out, or said that it drops the connection.
    #[error("the target asked for the end of the session")]
    Dismissed,
    /// Commands outlived their time limit and their abortion, until there was no room for more.
    #[error("the target answers pings, but {commands} commands never ended")]
    Stuck {
        /// How many.
        commands: usize,
    },
}

/// Why a command failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CommandError {
    /// The session ended; the command may have been carried out.
    #[error("the session ended")]
    Lost(#[source] SessionEnd),
    /// No answer within the limit, though the target is alive.
    #[error("no answer within {ms} ms")]
    TimedOut {
        /// The limit.
        ms: u64,
    },
    /// CHECK CONDITION.
    #[error("the target reported {0}")]
    Sense(SenseCode),
    /// Another SCSI status than GOOD, or CHECK CONDITION without sense data.
    #[error("the target answered with SCSI status {status:#04x}")]
    Status {
        /// The status byte.
        status: u8,
    },
    /// An iSCSI response other than "completed at the target".
    #[error("the target could not complete the command (iSCSI response {response:#04x})")]
    TargetFailure {
        /// The response byte.
        response: u8,
    },
    /// The target rejected the PDU.
    #[error("the target rejected the command (reason {reason:#04x})")]
    Rejected {
        /// The reason byte.
        reason: u8,
    },
    /// Fewer bytes than asked for.
    #[error("the target sent {got} of {expected} bytes")]
    Short {
        /// Asked for.
        expected: u32,
        /// Sent.
        got: u32,
    },
    /// An answer that cannot be understood.
    #[error("the target's answer to {command} makes no sense")]
    Answer {
        /// The command.
        command: &'static str,
    },
    /// Beyond the unit's end, or not a multiple of its block.
    #[error(
        "{bytes} bytes at {offset} lie outside LUN {lun} of {lun_bytes} bytes, or not on its blocks of {block_bytes}"
    )]
    OutOfRange {
        /// The LUN.
        lun: u16,
        /// First byte.
        offset: u64,
        /// Length in bytes.
        bytes: u64,
        /// The LUN's size in bytes.
        lun_bytes: u64,
        /// Its logical block in bytes.
        block_bytes: u32,
    },
}

impl CommandError {
    /// The same command on the same session will fail again.
    pub fn is_lasting(&self) -> bool {
        match self {
            Self::Sense(sense) => sense.is_lasting(),
            Self::OutOfRange { .. } | Self::Answer { .. } => true,
            _ => false,
        }
    }
}

/// An error with all its causes in one line, for a place that keeps text.
pub(super) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sense_is_read_in_both_formats() {
        let fixed = [0x70, 0, 0x06, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x29, 0x01];
        let code = SenseCode::parse(&fixed).unwrap();
        assert!(code.is_unit_attention());
        assert_eq!(code.to_string(), "UNIT ATTENTION 6/29/01");
        assert_eq!(SenseCode::parse(&[0x72, 0x05, 0x21, 0x00]).unwrap().asc, 0x21);
        for bad in [&[][..], &[0x70], &[0x70, 0], &[0x72, 5, 0x21], &[0x11; 18]] {
            assert_eq!(SenseCode::parse(bad), None);
        }
    }
}
