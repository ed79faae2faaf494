//! iSCSI (RFC 7143): a target and an initiator.
//!
//! The cores have no I/O, no clock and no async: `pdu` (headers and framing), `login` (negotiation), `scsi`
//! (commands, sense data, pages), `session` (sequence numbers and transfers). `target` and `initiator` are the
//! tokio shells around them. `lio` and `open_iscsi` drive the kernel's own target and initiator instead; they block.

#![forbid(unsafe_code)]

pub mod initiator;
pub mod lio;
pub mod login;
pub mod open_iscsi;
pub mod pdu;
pub mod scsi;
pub mod session;
pub mod target;
