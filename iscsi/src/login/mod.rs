//! Login as state machines for both roles (RFC 7143 §6, §13): stages, text keys, their negotiation.
//!
//! [`TargetLogin`] and [`InitiatorLogin`] turn login PDUs into login PDUs; [`Negotiation`] holds the rules of every
//! key and serves both, [`Chap`] is how both sides prove who they are. Deliberately absent: I/O, time limits and the
//! random source (the shells'); other methods than CHAP; and authentication in discovery sessions, which list no more
//! than the targets that the initiator's name is admitted to.

mod chap;
mod initiator;
mod negotiation;
mod target;
#[cfg(test)]
mod tests;
mod text;

pub use chap::{
    Challenge, Chap, ChapError, ChapSetupError, Credentials, MAX_SECRET_BYTES, MAX_USER_BYTES,
    MIN_SECRET_BYTES, Secret,
};
pub use initiator::{InitiatorLogin, InitiatorOptions, LoginError, Progress};
pub use negotiation::{DigestTerms, Negotiation, NegotiationError, Parameters, Role, Terms};
pub(crate) use negotiation::{is_of_the_login, max_recv_bytes};
pub use target::{Directory, Refusal, Reply, TargetLogin, Then};
pub use text::{MAX_KEY_BYTES, MAX_VALUE_BYTES, PeerText, TextError, append_key, is_address, parse_keys};

use treeboot_types::Iqn;

/// Text of one login or text request, over all its PDUs, in bytes: several times what every known key together takes.
pub const MAX_REQUEST_TEXT_BYTES: usize = 16 * 1024;

/// How many login requests a login may take. The longest honest one has some ten.
pub const MAX_LOGIN_REQUESTS: u32 = 32;

/// The only portal group that a treeboot target has.
pub const PORTAL_GROUP_TAG: u16 = 1;

/// The stages of a login (RFC 7143 §11.12.3).
pub mod stage {
    /// SecurityNegotiation.
    pub const SECURITY: u8 = 0;
    /// LoginOperationalNegotiation.
    pub const OPERATIONAL: u8 = 1;
    /// FullFeaturePhase.
    pub const FULL_FEATURE: u8 = 3;
}

/// How an initiator proves who it is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Security {
    /// Not at all: AuthMethod=None.
    #[default]
    None,
    /// By CHAP.
    Chap(Chap),
}

/// What both sides know once a login has succeeded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Established {
    /// Who logged in.
    pub initiator: Iqn,
    /// The target; `None` in a discovery session.
    pub target: Option<Iqn>,
    /// The initiator's part of the session's name.
    pub isid: [u8; 6],
    /// The target's part of the session's name.
    pub tsih: u16,
    /// Connection id.
    pub cid: u16,
    /// What was proven.
    pub security: Security,
    /// What was agreed on.
    pub parameters: Parameters,
    /// The CmdSN of the first command.
    pub cmd_sn: u32,
    /// The StatSN of the first response.
    pub stat_sn: u32,
}

/// Statuses of a Login Response, class and detail (RFC 7143 §11.13.5).
pub mod status {
    /// Success.
    pub const SUCCESS: (u8, u8) = (0, 0);
    /// Target moved temporarily.
    pub const MOVED_TEMPORARILY: (u8, u8) = (1, 1);
    /// Target moved permanently.
    pub const MOVED_PERMANENTLY: (u8, u8) = (1, 2);
    /// Initiator error.
    pub const INITIATOR_ERROR: (u8, u8) = (2, 0);
    /// Authentication failure.
    pub const AUTHENTICATION_FAILURE: (u8, u8) = (2, 1);
    /// Authorization failure: not in the target's access list.
    pub const AUTHORIZATION_FAILURE: (u8, u8) = (2, 2);
    /// Target not found.
    pub const NOT_FOUND: (u8, u8) = (2, 3);
    /// Target removed.
    pub const TARGET_REMOVED: (u8, u8) = (2, 4);
    /// Unsupported version.
    pub const UNSUPPORTED_VERSION: (u8, u8) = (2, 5);
    /// Too many connections.
    pub const TOO_MANY_CONNECTIONS: (u8, u8) = (2, 6);
    /// Missing parameter.
    pub const MISSING_PARAMETER: (u8, u8) = (2, 7);
    /// Session type not supported.
    pub const SESSION_TYPE: (u8, u8) = (2, 9);
    /// Session does not exist.
    pub const NO_SESSION: (u8, u8) = (2, 10);
    /// Invalid request during login.
    pub const INVALID_DURING_LOGIN: (u8, u8) = (2, 11);
    /// Service unavailable.
    pub const SERVICE_UNAVAILABLE: (u8, u8) = (3, 1);
    /// Out of resources.
    pub const OUT_OF_RESOURCES: (u8, u8) = (3, 2);

    /// A status in words.
    pub fn describe(class: u8, detail: u8) -> &'static str {
        match (class, detail) {
            (0, _) => "success",
            (1, 1) => "target moved temporarily",
            (1, 2) => "target moved permanently",
            (2, 1) => "authentication failure",
            (2, 2) => "this initiator is not in the target's access list",
            (2, 3) => "no such target",
            (2, 4) => "target removed",
            (2, 5) => "unsupported version",
            (2, 6) => "too many connections",
            (2, 7) => "missing parameter",
            (2, 8) => "cannot be included in the session",
            (2, 9) => "session type not supported",
            (2, 10) => "session does not exist",
            (2, 11) => "invalid request during login",
            (2, _) => "initiator error",
            (3, 1) => "service unavailable",
            (3, 2) => "out of resources",
            (3, _) => "target error",
            _ => "unknown status",
        }
    }
}
