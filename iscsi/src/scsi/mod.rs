//! SCSI for disks (SPC-4, SBC-3): CDBs, sense data, pages, reservations, and what each command does to a device.
//!
//! [`LogicalUnit::plan`] turns a CDB into an [`Action`]: a finished answer, or I/O for the target to carry out.
//! Deliberately absent: I/O and anything of iSCSI but the names of initiators.

pub mod action;
pub mod alua;
pub mod cdb;
pub mod inquiry;
pub mod kept;
mod medium;
pub mod mode;
pub mod opcodes;
pub mod reservation;
pub mod sense;
pub mod unit;

#[cfg(test)]
mod tests;

pub use action::{Action, OutAction};
pub use alua::AccessState;
pub use cdb::{Blocks, ByteCheck, Command};
pub use sense::{SENSE_BYTES, Sense, status};
pub use unit::{Identity, LogicalUnit, Nexus, NexusId};
