//! A session's bookkeeping without I/O: the command window, and the data of a write (RFC 7143 §4.2.2, §4.2.5).
//!
//! Deliberately absent: retransmission (ErrorRecoveryLevel above 0) and several connections a session.

mod transfer;
mod window;

#[cfg(test)]
mod tests;

pub use transfer::{Solicitation, Transfer, TransferError, TransferLimits};
pub use window::{Admission, QUEUE_DEPTH, Window};
