//! The initiator: sessions to targets, and groups of paths to one image.
//!
//! Begin at [`PathGroup`] for reads that survive the loss of a parent, at [`Session`] for one connection, at
//! [`RemoteDevice`] for a LUN as a block device. The choices are in pure cores (`paths`, `liveness`, `exchange`);
//! what has sockets and clocks stands around them.

mod command;
mod connect;
mod connection;
mod error;
mod exchange;
mod group;
mod liveness;
mod paths;
mod remote;
mod session;

pub use crate::scsi::alua::Reported as AccessReported;
pub use command::{Capacity, Identity};
pub use connect::discover;
pub use error::{CommandError, ConnectError, ProtocolError, SenseCode, SessionEnd};
pub use group::{PathGroup, PathGroupOptions, ReadError};
pub use liveness::Silence;
pub use paths::{
    DISTRUST_MS, Failure, GroupTotals, HOPE_MS, Limits, Lun, PATIENCE_MS, PathFailure, PathId, PathPolicy,
    PathSpec, PathState, PathStats,
};
pub use remote::RemoteDevice;
pub use session::{CommandData, Digests, Session, SessionOptions, SessionTimeouts};
