//! Statuses and sense data (SAM-5 §5.3, SPC-4 §4.5).

/// SCSI statuses.
pub mod status {
    /// GOOD.
    pub const GOOD: u8 = 0x00;
    /// CHECK CONDITION: sense data tell why.
    pub const CHECK_CONDITION: u8 = 0x02;
    /// BUSY.
    pub const BUSY: u8 = 0x08;
    /// RESERVATION CONFLICT.
    pub const RESERVATION_CONFLICT: u8 = 0x18;
    /// TASK SET FULL.
    pub const TASK_SET_FULL: u8 = 0x28;
    /// TASK ABORTED.
    pub const TASK_ABORTED: u8 = 0x40;
}

/// Length of sense data in fixed format.
pub const SENSE_BYTES: usize = 18;

/// Why a command did not do what it was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sense {
    /// Sense key.
    pub key: u8,
    /// Additional sense code and its qualifier, as one number.
    pub code: u16,
    /// INFORMATION: for a miscompare the place in bytes, for others the LBA.
    pub information: Option<u32>,
    /// Which byte of the CDB (or of the parameters) is at fault, and which bit.
    pub field: Option<FieldPointer>,
}

/// Sense-key specific data of an ILLEGAL REQUEST (SPC-4 §4.5.2.4.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FieldPointer {
    /// In the CDB; otherwise in the parameter list.
    pub in_cdb: bool,
    /// The byte.
    pub byte: u16,
    /// The bit, where one is known.
    pub bit: Option<u8>,
}

macro_rules! senses {
    ($($(#[$doc:meta])* $name:ident = $key:literal, $code:literal;)+) => {
        impl Sense {
            $($(#[$doc])* pub const $name: Self = Self::new($key, $code);)+
        }
    };
}

senses! {
    /// NO SENSE.
    NONE = 0, 0x0000;
    /// NOT READY: initializing command required; the unit was stopped.
    STOPPED = 2, 0x0402;
    /// NOT READY: becoming ready, try again.
    BECOMING_READY = 2, 0x0401;
    /// NOT READY: logical unit not accessible, asymmetric access state transition.
    TRANSITION = 2, 0x040a;
    /// NOT READY: logical unit not accessible, target port in standby state.
    STANDBY = 2, 0x040b;
    /// NOT READY: logical unit not accessible, target port in unavailable state.
    UNAVAILABLE = 2, 0x040c;
    /// NOT READY: logical unit not ready, space allocation in progress.
    ALLOCATING = 2, 0x0414;
    /// MEDIUM ERROR: unrecovered read error.
    READ_ERROR = 3, 0x1100;
    /// MEDIUM ERROR: write error.
    WRITE_ERROR = 3, 0x0c00;
    /// HARDWARE ERROR: logical unit failed self-test.
    FAILED_SELF_TEST = 4, 0x3e03;
    /// HARDWARE ERROR: internal target failure.
    INTERNAL = 4, 0x4400;
    /// ILLEGAL REQUEST: parameter list length error.
    PARAMETER_LENGTH = 5, 0x1a00;
    /// ILLEGAL REQUEST: invalid command operation code.
    INVALID_OPCODE = 5, 0x2000;
    /// ILLEGAL REQUEST: logical block address out of range.
    LBA_OUT_OF_RANGE = 5, 0x2100;
    /// ILLEGAL REQUEST: invalid field in CDB.
    INVALID_FIELD_IN_CDB = 5, 0x2400;
    /// ILLEGAL REQUEST: logical unit not supported.
    NO_SUCH_UNIT = 5, 0x2500;
    /// ILLEGAL REQUEST: invalid field in parameter list.
    INVALID_FIELD_IN_PARAMETERS = 5, 0x2600;
    /// ILLEGAL REQUEST: invalid release of persistent reservation.
    INVALID_RELEASE = 5, 0x2604;
    /// ILLEGAL REQUEST: saving parameters not supported.
    NO_SAVING = 5, 0x3900;
    /// ILLEGAL REQUEST: invalid message error; a task attribute that is not supported.
    INVALID_MESSAGE = 5, 0x4900;
    /// ILLEGAL REQUEST: insufficient registration resources.
    NO_REGISTRATION_ROOM = 5, 0x5504;
    /// UNIT ATTENTION: power on, reset, or bus device reset. The general code, because `iscsi-ls` knows only this one.
    POWER_ON = 6, 0x2900;
    /// UNIT ATTENTION: a reset by a task management function.
    BUS_DEVICE_RESET = 6, 0x2903;
    /// UNIT ATTENTION: mode parameters changed.
    MODE_CHANGED = 6, 0x2a01;
    /// UNIT ATTENTION: reservations preempted.
    RESERVATIONS_PREEMPTED = 6, 0x2a03;
    /// UNIT ATTENTION: reservations released.
    RESERVATIONS_RELEASED = 6, 0x2a04;
    /// UNIT ATTENTION: registrations preempted.
    REGISTRATIONS_PREEMPTED = 6, 0x2a05;
    /// UNIT ATTENTION: asymmetric access state changed.
    ACCESS_STATE_CHANGED = 6, 0x2a06;
    /// DATA PROTECT: write protected.
    WRITE_PROTECTED = 7, 0x2700;
    /// DATA PROTECT: space allocation failed, write protect.
    NO_SPACE = 7, 0x2707;
    /// ABORTED COMMAND: not all unsolicited data came, or too much.
    DATA_PHASE = 0xb, 0x4b00;
    /// ABORTED COMMAND: unexpected unsolicited data.
    UNEXPECTED_DATA = 0xb, 0x0c0c;
    /// MISCOMPARE: miscompare during verify operation.
    MISCOMPARE = 0xe, 0x1d00;
}

impl Sense {
    const fn new(key: u8, code: u16) -> Self {
        Self {
            key,
            code,
            information: None,
            field: None,
        }
    }

    /// INVALID FIELD IN CDB that points at a byte.
    pub fn cdb_field(byte: u16, bit: Option<u8>) -> Self {
        let field = Some(FieldPointer {
            in_cdb: true,
            byte,
            bit,
        });
        Self {
            field,
            ..Self::INVALID_FIELD_IN_CDB
        }
    }

    /// INVALID FIELD IN PARAMETER LIST that points at a byte.
    pub fn parameter_field(byte: u16) -> Self {
        let field = Some(FieldPointer {
            in_cdb: false,
            byte,
            bit: None,
        });
        Self {
            field,
            ..Self::INVALID_FIELD_IN_PARAMETERS
        }
    }

    /// Prints the fixed format (SPC-4 §4.5.3).
    pub fn fixed(&self) -> [u8; SENSE_BYTES] {
        let mut out = [0; SENSE_BYTES];
        out[0] = 0x70;
        out[2] = self.key;
        if let Some(information) = self.information {
            out[0] |= 0x80;
            out[3..7].copy_from_slice(&information.to_be_bytes());
        }
        out[7] = (SENSE_BYTES - 8) as u8;
        out[12..14].copy_from_slice(&self.code.to_be_bytes());
        if let Some(field) = self.field {
            out[15] = 0x80 | if field.in_cdb { 0x40 } else { 0 } | field.bit.map_or(0, |bit| 0x08 | bit & 7);
            out[16..18].copy_from_slice(&field.byte.to_be_bytes());
        }
        out
    }

    /// Prints the descriptor format with what fits (SPC-4 §4.5.2).
    pub fn descriptor(&self) -> [u8; 8] {
        let [asc, ascq] = self.code.to_be_bytes();
        [0x72, self.key, asc, ascq, 0, 0, 0, 0]
    }

    /// Parses either format; `None` where there is too little or it is neither.
    pub fn parse(data: &[u8]) -> Option<Self> {
        let (key, code) = match data.first()? & 0x7f {
            0x70 | 0x71 => (*data.get(2)?, [*data.get(12)?, *data.get(13)?]),
            0x72 | 0x73 => (*data.get(1)?, [*data.get(2)?, *data.get(3)?]),
            _ => return None,
        };
        Some(Self::new(key & 0x0f, u16::from_be_bytes(code)))
    }
}
