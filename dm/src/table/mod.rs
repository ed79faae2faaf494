//! Tables: what a device-mapper device maps where (kernel `Documentation/admin-guide/device-mapper/`).
//!
//! A table prints in one canonical way, and what it prints parses back to an equal table. What the kernel reports
//! parses too, and prints again byte for byte, unless the kernel spells out a default; then it prints canonically.

mod cache;
mod multipath;
mod tokens;
mod verity;

use std::fmt;
use std::str::FromStr;

use crate::{DeviceNumber, Sectors};
pub use cache::{Cache, CacheMode};
pub use multipath::{Multipath, Path, PathGroup, PathSelector};
use tokens::Tokens;
pub use verity::{OnCorruption, Verity};

/// One device's whole mapping: lines that follow each other without a gap, from sector 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table(Vec<Line>);

/// A run of sectors and what serves it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// First sector of the run in the device.
    pub start: Sectors,
    /// Its length, at least 1.
    pub length: Sectors,
    /// What serves it.
    pub target: Target,
}

/// A target type with its parameters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A run of another device (`linear.rst`).
    Linear {
        /// The other device.
        device: DeviceNumber,
        /// Where the run begins there.
        offset: Sectors,
    },
    /// Every access fails.
    Error,
    /// Reads give zeroes, writes vanish (`zero.rst`).
    Zero,
    /// A run of another device, of which writes are said to be done and are not (`dm-flakey.rst`, `drop_writes`,
    /// always down). The filler of a cache group needs it below the cache.
    DropWrites {
        /// The other device.
        device: DeviceNumber,
        /// Where the run begins there.
        offset: Sectors,
    },
    /// Several paths to one disk.
    Multipath(Multipath),
    /// A small fast device before a large slow one (`cache.rst`).
    Cache(Cache),
    /// Copy-on-write over an origin (`snapshot.rst`).
    Snapshot {
        /// What unwritten chunks are read from.
        origin: DeviceNumber,
        /// Where written chunks go.
        delta: DeviceNumber,
        /// Whether the delta outlives the device.
        persistence: Persistence,
        /// Unit of copying: a power of two.
        chunk: Sectors,
    },
    /// Lets an origin be written beneath its snapshots (`snapshot.rst`).
    SnapshotOrigin {
        /// The origin.
        origin: DeviceNumber,
    },
    /// Checks every block against a hash tree (`verity.rst`).
    Verity(Verity),
    /// Fixed regions spread over paths (`switch.rst`). Which region goes where is set by messages, not here.
    Switch {
        /// Length of a region.
        region: Sectors,
        /// The paths, each with the sector at which the disk begins in it.
        paths: Vec<(DeviceNumber, Sectors)>,
    },
}

/// How a snapshot keeps its delta.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Persistence {
    /// Survives; invalid once it overflows (`P`).
    Persistent,
    /// Survives; user space is told of an overflow and may extend (`PO`).
    PersistentOverflow,
    /// Gone with the device (`N`).
    Transient,
}

/// Chunk of a disk's delta, 4 KiB: the block of file systems and of verity. A larger one makes each small write read the rest
/// of its chunk from the base, thus from the parents, and takes that much more room (decision 0102, docs/kernel-plane.md).
pub const DELTA_CHUNK: Sectors = Sectors(8);

/// With an up interval of 0, dm-flakey is in its down interval at any time, whatever its length; the longest says so.
const ALWAYS_DOWN: u32 = u32::MAX;

/// Why a text is not a table, or lines do not make one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// The text ends where a parameter must stand.
    #[error("the table line '{line}' ends before its {what}")]
    Missing {
        /// The line.
        line: String,
        /// The parameter.
        what: &'static str,
    },
    /// A parameter is not valid.
    #[error("in the table line '{line}', '{token}' is not a valid {what}")]
    Invalid {
        /// The line.
        line: String,
        /// The parameter.
        what: &'static str,
        /// What stands there.
        token: String,
    },
    /// Something stands behind the last parameter.
    #[error("the table line '{line}' goes on after its end, with '{token}'")]
    Trailing {
        /// The line.
        line: String,
        /// What stands there.
        token: String,
    },
    /// No line at all.
    #[error("the table has no lines")]
    Empty,
    /// A line does not begin where the one before it ends.
    #[error("the table line '{line}' must begin at sector {expected}, and no line may be empty")]
    Gap {
        /// The line.
        line: String,
        /// Where it must begin.
        expected: Sectors,
    },
    /// The device would be larger than 2^64 sectors.
    #[error("the table line '{line}' ends beyond what a device can hold")]
    TooLong {
        /// The line.
        line: String,
    },
}

impl Table {
    /// A table of `lines`.
    ///
    /// # Errors
    /// [`TableError`] where they leave a gap, overlap, do not begin at 0, or are empty.
    pub fn new(lines: Vec<Line>) -> Result<Self, TableError> {
        let mut expected = Sectors(0);
        for line in &lines {
            if line.start != expected || line.length == Sectors(0) {
                return Err(TableError::Gap {
                    line: line.to_string(),
                    expected,
                });
            }
            expected = expected
                .checked_add(line.length)
                .ok_or_else(|| TableError::TooLong {
                    line: line.to_string(),
                })?;
        }
        if lines.is_empty() {
            Err(TableError::Empty)
        } else {
            Ok(Self(lines))
        }
    }

    /// A table of one line over the whole device; `length` at least 1.
    ///
    /// # Errors
    /// [`TableError::Gap`] where `length` is 0.
    pub fn whole(length: Sectors, target: Target) -> Result<Self, TableError> {
        Self::new(vec![Line {
            start: Sectors(0),
            length,
            target,
        }])
    }

    /// The lines, in order.
    pub fn lines(&self) -> &[Line] {
        &self.0
    }

    /// Whether the other table maps the same. Of a multipath device the group to begin with is left out, because the
    /// kernel reports the group in use there; of a snapshot the chunk, because the kernel goes by the one that the delta was
    /// made with, and reports that.
    pub fn same_mapping(&self, other: &Self) -> bool {
        let wanted = |line: &Line| {
            let mut line = line.clone();
            match &mut line.target {
                Target::Multipath(multipath) => multipath.first_group = 0,
                Target::Snapshot { chunk, .. } => *chunk = Sectors(0),
                _ => {}
            }
            line
        };
        self.0.len() == other.0.len() && self.0.iter().zip(&other.0).all(|(a, b)| wanted(a) == wanted(b))
    }

    /// Size of the device.
    pub fn length(&self) -> Sectors {
        self.0
            .last()
            .map_or(Sectors(0), |line| Sectors(line.start.0 + line.length.0))
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, line) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{line}")?;
        }
        Ok(())
    }
}

impl FromStr for Table {
    type Err = TableError;
    fn from_str(text: &str) -> Result<Self, TableError> {
        Self::new(text.lines().map(str::parse).collect::<Result<_, _>>()?)
    }
}

impl Target {
    /// The kernel's name of the target type.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Linear { .. } => "linear",
            Self::Error => "error",
            Self::Zero => "zero",
            Self::DropWrites { .. } => "flakey",
            Self::Multipath(_) => "multipath",
            Self::Cache(_) => "cache",
            Self::Snapshot { .. } => "snapshot",
            Self::SnapshotOrigin { .. } => "snapshot-origin",
            Self::Verity(_) => "verity",
            Self::Switch { .. } => "switch",
        }
    }

    /// The kernel module that brings the target type.
    pub fn module(&self) -> &'static str {
        match self {
            Self::Linear { .. } | Self::Error => "dm-mod",
            Self::Zero => "dm-zero",
            Self::DropWrites { .. } => "dm-flakey",
            Self::Multipath(_) => "dm-multipath",
            Self::Cache(_) => "dm-cache",
            Self::Snapshot { .. } | Self::SnapshotOrigin { .. } => "dm-snapshot",
            Self::Verity(_) => "dm-verity",
            Self::Switch { .. } => "dm-switch",
        }
    }

    /// The module of the target's policy or path selector, where it has one.
    pub fn helper_module(&self) -> Option<&'static str> {
        match self {
            Self::Cache(_) => Some("dm-cache-smq"),
            Self::Multipath(multipath) => multipath.groups.first().map(|group| match group.selector {
                PathSelector::RoundRobin => "dm-round-robin",
                PathSelector::ServiceTime => "dm-service-time",
                PathSelector::QueueLength => "dm-queue-length",
            }),
            _ => None,
        }
    }

    /// The parameters as the kernel takes them.
    pub fn parameters(&self) -> String {
        match self {
            Self::Linear { device, offset } => format!("{device} {offset}"),
            Self::Error | Self::Zero => String::new(),
            Self::DropWrites { device, offset } => {
                format!("{device} {offset} 0 {ALWAYS_DOWN} 1 drop_writes")
            }
            Self::Multipath(multipath) => multipath.to_string(),
            Self::Cache(cache) => cache.to_string(),
            Self::Snapshot {
                origin,
                delta,
                persistence,
                chunk,
            } => {
                let persistence = match persistence {
                    Persistence::Persistent => "P",
                    Persistence::PersistentOverflow => "PO",
                    Persistence::Transient => "N",
                };
                format!("{origin} {delta} {persistence} {chunk}")
            }
            Self::SnapshotOrigin { origin } => origin.to_string(),
            Self::Verity(verity) => verity.to_string(),
            Self::Switch { region, paths } => {
                let mut text = format!("{} {region} 0", paths.len());
                for (device, offset) in paths {
                    text += &format!(" {device} {offset}");
                }
                text
            }
        }
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.start, self.length, self.target.kind())?;
        let parameters = self.target.parameters();
        if parameters.is_empty() {
            Ok(())
        } else {
            write!(f, " {parameters}")
        }
    }
}

impl FromStr for Line {
    type Err = TableError;
    fn from_str(text: &str) -> Result<Self, TableError> {
        let mut tokens = Tokens::new(text);
        let start = Sectors(tokens.number("first sector")?);
        let length = Sectors(tokens.number("length")?);
        let target = match tokens.next("target type")? {
            "linear" => Target::Linear {
                device: tokens.device("device")?,
                offset: tokens.sectors("offset")?,
            },
            "error" => Target::Error,
            "zero" => Target::Zero,
            "flakey" => parse_drop_writes(&mut tokens)?,
            "multipath" => Target::Multipath(Multipath::parse(&mut tokens)?),
            "cache" => Target::Cache(Cache::parse(&mut tokens)?),
            "snapshot" => parse_snapshot(&mut tokens)?,
            "snapshot-origin" => Target::SnapshotOrigin {
                origin: tokens.device("origin")?,
            },
            "verity" => Target::Verity(Verity::parse(&mut tokens)?),
            "switch" => parse_switch(&mut tokens)?,
            other => return Err(tokens.invalid("target type", other)),
        };
        tokens.end()?;
        Ok(Self {
            start,
            length,
            target,
        })
    }
}

fn parse_drop_writes(tokens: &mut Tokens<'_>) -> Result<Target, TableError> {
    let device = tokens.device("device")?;
    let offset = tokens.sectors("offset")?;
    let down = ALWAYS_DOWN.to_string();
    for (what, expected) in [
        ("up interval (0 is used)", "0"),
        ("down interval (the longest is used)", down.as_str()),
        ("number of features", "1"),
        ("feature (drop_writes is used)", "drop_writes"),
    ] {
        let token = tokens.next(what)?;
        if token != expected {
            return Err(tokens.invalid(what, token));
        }
    }
    Ok(Target::DropWrites { device, offset })
}

fn parse_snapshot(tokens: &mut Tokens<'_>) -> Result<Target, TableError> {
    Ok(Target::Snapshot {
        origin: tokens.device("origin")?,
        delta: tokens.device("delta")?,
        persistence: match tokens.next("persistence")? {
            "P" => Persistence::Persistent,
            "PO" => Persistence::PersistentOverflow,
            "N" => Persistence::Transient,
            other => return Err(tokens.invalid("persistence", other)),
        },
        chunk: tokens.sectors("chunk size")?,
    })
}

fn parse_switch(tokens: &mut Tokens<'_>) -> Result<Target, TableError> {
    let count = tokens.count("number of paths")?;
    let region = tokens.sectors("region size")?;
    match tokens.next("number of optional arguments")? {
        "0" => {}
        other => return Err(tokens.invalid("number of optional arguments", other)),
    }
    let path = |tokens: &mut Tokens<'_>| Ok((tokens.device("path")?, tokens.sectors("offset")?));
    let paths = (0..count).map(|_| path(tokens)).collect::<Result<_, _>>()?;
    Ok(Target::Switch { region, paths })
}

#[cfg(test)]
mod tests;
