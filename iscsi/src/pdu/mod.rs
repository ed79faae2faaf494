//! The PDUs of RFC 7143 §11 as types: parsing and printing in both directions, framing with padding and digests.
//!
//! [`Framing`] cuts a byte stream into [`Frame`]s (header, additional header, data segment) and checks digests;
//! [`Pdu::parse`] turns a header into a type, [`Pdu::encode`] back. Lengths are the business of the framing
//! alone: no type holds its data segment. Deliberately absent: I/O, and any rule about *when* a PDU may be sent.

mod data;
mod frame;
mod lun;
mod request;
mod response;
#[cfg(test)]
mod tests;

pub use data::{DataIn, R2t};
pub use frame::{Frame, FrameError, Framing, MAX_AHS_BYTES, Split};
pub use lun::LunField;
pub use request::{
    DataOut, LoginRequest, LogoutRequest, NopOut, ScsiCommand, Snack, TaskAttribute, TaskFunction,
    TaskManagementRequest, TextRequest,
};
pub use response::{
    AsyncMessage, LoginResponse, LogoutResponse, NopIn, Reject, Residual, ScsiResponse,
    TaskManagementResponse, TextResponse, reject_reason, task_response,
};

/// Length of a basic header segment in bytes.
pub const BHS_BYTES: usize = 48;

/// A basic header segment (RFC 7143 §11.2.1).
pub type Bhs = [u8; BHS_BYTES];

/// The tag that stands for "none" (RFC 7143 §11.2.1.8).
pub const NO_TAG: u32 = 0xffff_ffff;

/// Operation codes (RFC 7143 §11.2.1.2).
pub mod opcode {
    /// NOP-Out.
    pub const NOP_OUT: u8 = 0x00;
    /// SCSI Command.
    pub const SCSI_COMMAND: u8 = 0x01;
    /// Task Management Function Request.
    pub const TASK_MANAGEMENT_REQUEST: u8 = 0x02;
    /// Login Request.
    pub const LOGIN_REQUEST: u8 = 0x03;
    /// Text Request.
    pub const TEXT_REQUEST: u8 = 0x04;
    /// SCSI Data-Out.
    pub const DATA_OUT: u8 = 0x05;
    /// Logout Request.
    pub const LOGOUT_REQUEST: u8 = 0x06;
    /// SNACK Request.
    pub const SNACK: u8 = 0x10;
    /// NOP-In.
    pub const NOP_IN: u8 = 0x20;
    /// SCSI Response.
    pub const SCSI_RESPONSE: u8 = 0x21;
    /// Task Management Function Response.
    pub const TASK_MANAGEMENT_RESPONSE: u8 = 0x22;
    /// Login Response.
    pub const LOGIN_RESPONSE: u8 = 0x23;
    /// Text Response.
    pub const TEXT_RESPONSE: u8 = 0x24;
    /// SCSI Data-In.
    pub const DATA_IN: u8 = 0x25;
    /// Logout Response.
    pub const LOGOUT_RESPONSE: u8 = 0x26;
    /// Ready To Transfer.
    pub const R2T: u8 = 0x31;
    /// Asynchronous Message.
    pub const ASYNC_MESSAGE: u8 = 0x32;
    /// Reject.
    pub const REJECT: u8 = 0x3f;
}

/// Why a header is not a PDU that we know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PduError {
    /// No such operation code.
    #[error("a PDU with the unknown operation code {0:#04x}")]
    Opcode(u8),
    /// A field that holds what the standard does not define.
    #[error("a PDU of operation code {opcode:#04x} whose field '{field}' holds {value:#x}")]
    Field {
        /// The operation code.
        opcode: u8,
        /// The field, in the standard's words.
        field: &'static str,
        /// What it held.
        value: u32,
    },
}

/// Any PDU, without its data segment.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(
    missing_docs,
    reason = "each variant is named as its type, which is documented"
)]
pub enum Pdu {
    NopOut(NopOut),
    ScsiCommand(ScsiCommand),
    TaskManagementRequest(TaskManagementRequest),
    LoginRequest(LoginRequest),
    TextRequest(TextRequest),
    DataOut(DataOut),
    LogoutRequest(LogoutRequest),
    Snack(Snack),
    NopIn(NopIn),
    ScsiResponse(ScsiResponse),
    TaskManagementResponse(TaskManagementResponse),
    LoginResponse(LoginResponse),
    TextResponse(TextResponse),
    DataIn(DataIn),
    LogoutResponse(LogoutResponse),
    R2t(R2t),
    AsyncMessage(AsyncMessage),
    Reject(Reject),
}

macro_rules! each_pdu {
    ($($variant:ident = $opcode:ident),+ $(,)?) => {
        impl Pdu {
            /// Parses a header. Reserved bits are ignored, as RFC 7143 §11.2 asks of a receiver.
            ///
            /// # Errors
            /// [`PduError`] for an operation code or a field's value that the standard does not define.
            pub fn parse(bhs: &Bhs) -> Result<Self, PduError> {
                match bhs[0] & 0x3f {
                    $(opcode::$opcode => $variant::parse(bhs).map(Self::$variant),)+
                    other => Err(PduError::Opcode(other)),
                }
            }

            /// Prints the header with both segment lengths 0; [`Framing`] fills them in.
            pub fn encode(&self) -> Bhs {
                match self {
                    $(Self::$variant(pdu) => pdu.encode(),)+
                }
            }
        }

        $(impl From<$variant> for Pdu {
            fn from(pdu: $variant) -> Self {
                Self::$variant(pdu)
            }
        })+
    };
}

each_pdu! {
    NopOut = NOP_OUT,
    ScsiCommand = SCSI_COMMAND,
    TaskManagementRequest = TASK_MANAGEMENT_REQUEST,
    LoginRequest = LOGIN_REQUEST,
    TextRequest = TEXT_REQUEST,
    DataOut = DATA_OUT,
    LogoutRequest = LOGOUT_REQUEST,
    Snack = SNACK,
    NopIn = NOP_IN,
    ScsiResponse = SCSI_RESPONSE,
    TaskManagementResponse = TASK_MANAGEMENT_RESPONSE,
    LoginResponse = LOGIN_RESPONSE,
    TextResponse = TEXT_RESPONSE,
    DataIn = DATA_IN,
    LogoutResponse = LOGOUT_RESPONSE,
    R2t = R2T,
    AsyncMessage = ASYNC_MESSAGE,
    Reject = REJECT,
}

/// The bit that says "deliver at once" (RFC 7143 §11.2.1.1).
const IMMEDIATE: u8 = 0x40;
/// The bit that ends a sequence.
const FINAL: u8 = 0x80;

/// Reads of a fixed header at constant places, so that the bounds are the compiler's business.
trait Fields {
    fn u16_at<const AT: usize>(&self) -> u16;
    fn u32_at<const AT: usize>(&self) -> u32;
    fn u64_at<const AT: usize>(&self) -> u64;
    fn put16<const AT: usize>(&mut self, value: u16);
    fn put32<const AT: usize>(&mut self, value: u32);
    fn put64<const AT: usize>(&mut self, value: u64);
}

impl Fields for Bhs {
    fn u16_at<const AT: usize>(&self) -> u16 {
        const { assert!(AT + 2 <= BHS_BYTES) };
        u16::from_be_bytes([self[AT], self[AT + 1]])
    }

    fn u32_at<const AT: usize>(&self) -> u32 {
        const { assert!(AT + 4 <= BHS_BYTES) };
        u32::from_be_bytes([self[AT], self[AT + 1], self[AT + 2], self[AT + 3]])
    }

    fn u64_at<const AT: usize>(&self) -> u64 {
        const { assert!(AT + 8 <= BHS_BYTES) };
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self[AT..AT + 8]);
        u64::from_be_bytes(bytes)
    }

    fn put16<const AT: usize>(&mut self, value: u16) {
        const { assert!(AT + 2 <= BHS_BYTES) };
        self[AT..AT + 2].copy_from_slice(&value.to_be_bytes());
    }

    fn put32<const AT: usize>(&mut self, value: u32) {
        const { assert!(AT + 4 <= BHS_BYTES) };
        self[AT..AT + 4].copy_from_slice(&value.to_be_bytes());
    }

    fn put64<const AT: usize>(&mut self, value: u64) {
        const { assert!(AT + 8 <= BHS_BYTES) };
        self[AT..AT + 8].copy_from_slice(&value.to_be_bytes());
    }
}
