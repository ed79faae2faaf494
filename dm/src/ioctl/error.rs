//! Why a call failed, said so that a person can act on it.

use std::fmt;
use std::io;

use crate::status::StatusError;
use crate::{DeviceNumber, DmDevice, Missing, Table, TableError, Target};

/// Why device-mapper did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum MapperError {
    /// The host lacks something.
    #[error(transparent)]
    Missing(#[from] Missing),
    /// device-mapper's control node cannot be used.
    #[error("cannot use /dev/mapper/control")]
    Control(#[source] io::Error),
    /// A device with this name is there, and its UUID says that it is somebody else's.
    #[error("the device '{device}' is not treeboot's: its UUID is {}; it is left alone", uuid.as_deref().unwrap_or("empty"))]
    Stranger {
        /// What was asked for.
        device: DmDevice,
        /// What it has.
        uuid: Option<String>,
    },
    /// There is no such device.
    #[error("there is no device '{device}'")]
    Absent {
        /// What was asked for.
        device: DmDevice,
    },
    /// The kernel refuses a table. What the device mapped before it still maps; a device that was made for this table is
    /// gone again.
    #[error("the kernel refuses a table of '{device}': {refusal}")]
    Refused {
        /// The device.
        device: DmDevice,
        /// The line and the reason.
        refusal: Refusal,
        /// The error's number.
        #[source]
        source: io::Error,
    },
    /// A device is in use and cannot be removed.
    #[error(
        "the device '{device}' ({number}) is in use: open {open_count} times, held by {}",
        Holders(holders)
    )]
    InUse {
        /// The device.
        device: DmDevice,
        /// Its number.
        number: DeviceNumber,
        /// How often it is open.
        open_count: u32,
        /// Names of the block devices over it. A mount or a program that has it open is not among them.
        holders: Vec<String>,
    },
    /// Another call failed.
    #[error("cannot {what} the device '{device}'{}", Because(reason))]
    Ioctl {
        /// What was to be done.
        what: &'static str,
        /// The device.
        device: DmDevice,
        /// What the kernel logged about it.
        reason: Vec<String>,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// All devices could not be listed.
    #[error("cannot list device-mapper's devices")]
    List(#[source] io::Error),
    /// A call failed, and what was to undo its effects failed too: the device needs `treeboot doctor --fix`.
    #[error("{first}; and the device is left {left} because that could not be undone")]
    Undo {
        /// The first failure.
        first: Box<MapperError>,
        /// The state that it is left in.
        left: &'static str,
        /// Why it could not be undone.
        #[source]
        source: Box<MapperError>,
    },
    /// What the kernel reports as table is none that treeboot makes.
    #[error("the table of '{device}' is none of treeboot's")]
    Table {
        /// The device.
        device: DmDevice,
        /// What is wrong with it.
        #[source]
        source: TableError,
    },
    /// What the kernel reports as status cannot be understood.
    #[error("the status of '{device}' cannot be understood")]
    Status {
        /// The device.
        device: DmDevice,
        /// What is wrong with it.
        #[source]
        source: StatusError,
    },
}

/// What the kernel refused, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The line; `None` where each alone is taken, and only all together are not.
    pub line: Option<String>,
    /// What the kernel logged; empty where its log cannot be read or says nothing.
    pub reason: Vec<String>,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.line {
            Some(line) => write!(f, "the line '{line}'")?,
            None => f.write_str("its lines together")?,
        }
        if self.reason.is_empty() {
            f.write_str(" (the kernel's log says nothing)")
        } else {
            write!(f, ": {}", self.reason.join("; "))
        }
    }
}

struct Holders<'a>(&'a [String]);

impl fmt::Display for Holders<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            f.write_str("no block device (a mount or a program)")
        } else {
            f.write_str(&self.0.join(", "))
        }
    }
}

struct Because<'a>(&'a [String]);

impl fmt::Display for Because<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            Ok(())
        } else {
            write!(f, ": {}", self.0.join("; "))
        }
    }
}

/// The kernel's answer in an error of the `devicemapper` crate.
pub(super) fn errno(error: devicemapper::DmError) -> io::Error {
    match error {
        devicemapper::DmError::Core(devicemapper::errors::Error::Ioctl(_, _, _, errno)) => {
            io::Error::from_raw_os_error(*errno as i32)
        }
        other => io::Error::other(other.to_string()),
    }
}

/// Some of what is wrong with a table the kernel sees only when it is to be used; that is a refusal like any other.
pub(super) fn refused_late(table: &Table, error: MapperError) -> MapperError {
    match error {
        MapperError::Ioctl {
            device,
            reason,
            source,
            ..
        } if !reason.is_empty() => MapperError::Refused {
            device,
            refusal: Refusal {
                line: line_of(table, &reason),
                reason,
            },
            source,
        },
        other => other,
    }
}

/// The line that a late reason means: the only one, or the one whose place below the kernel names.
fn line_of(table: &Table, reason: &[String]) -> Option<String> {
    if let [line] = table.lines() {
        return Some(line.to_string());
    }
    let line = table.lines().iter().find(|line| {
        let (Target::Linear { offset, .. } | Target::DropWrites { offset, .. }) = line.target else {
            return false;
        };
        let place = format!("start={offset}, len={},", line.length);
        reason.iter().any(|reason| reason.contains(&place))
    })?;
    Some(line.to_string())
}

/// The module whose absence the kernel's reason tells of.
pub(super) fn missing_module(table: &Table, reason: &[String]) -> Option<Missing> {
    let says = |text: &str| reason.iter().any(|line| line.contains(text));
    let module = table.lines().iter().find_map(|line| {
        let target = &line.target;
        if says(&format!("{}: unknown target type", target.kind())) {
            Some(target.module())
        } else if says("unknown path selector type") || says("Error creating cache's policy") {
            target.helper_module()
        } else {
            None
        }
    })?;
    Some(Missing::Module { module })
}
