//! device-mapper for treeboot: one grammar of names and typed tables.
//!
//! A table is built as values, printed once for the kernel and parsed back from what the kernel reports, so that
//! wanted and found can be compared. Deliberately absent: running `dmsetup`, and anything that knows images or
//! iSCSI beyond their names.

#![forbid(unsafe_code)]

pub mod name;
pub mod table;
mod unit;

pub use name::DmDevice;
pub use table::{Line, Table, TableError, Target};
pub use unit::{DeviceNumber, Sectors};
