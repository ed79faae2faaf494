//! dm-multipath: the parents of a stripe (kernel `drivers/md/dm-mpath.c`, `dm-queue-length.rst`, `dm-service-time.rst`).

use std::fmt;

use super::{TableError, Tokens};
use crate::DeviceNumber;

/// Requests that go to one path before the next is considered; 1 spreads the most evenly.
const REPEAT_COUNT: u32 = 1;

/// Several paths to one disk, in groups of falling priority.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Multipath {
    /// Requests wait while no path is up, instead of failing. Whoever sets it must end the waiting in time
    /// (message `fail_if_no_path`).
    pub queue_if_no_path: bool,
    /// Over devices that take no requests, only I/O as it comes, as all of device-mapper's own and bcache's (`queue_mode bio`).
    pub bio_based: bool,
    /// The groups; the first with a path that is up is used.
    pub groups: Vec<PathGroup>,
    /// Group to begin with, counted from 1; 0 where there are no groups.
    pub first_group: u32,
}

/// Paths that share the load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathGroup {
    /// How.
    pub selector: PathSelector,
    /// The paths.
    pub paths: Vec<Path>,
}

/// How a group shares its load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PathSelector {
    /// By turns.
    RoundRobin,
    /// The path with the shortest estimated service time.
    ServiceTime,
    /// The path with the fewest requests in flight.
    QueueLength,
}

/// One path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Path {
    /// The SCSI disk.
    pub device: DeviceNumber,
    /// Relative throughput, 0 to 100; only [`PathSelector::ServiceTime`] reads it.
    pub throughput: u32,
}

impl PathSelector {
    fn name(self) -> &'static str {
        match self {
            Self::RoundRobin => "round-robin",
            Self::ServiceTime => "service-time",
            Self::QueueLength => "queue-length",
        }
    }

    fn path_arguments(self) -> usize {
        if self == Self::ServiceTime { 2 } else { 1 }
    }
}

impl Multipath {
    /// Devices of device-mapper or bcache that hold the same bytes: the first serves until it fails, then the next, and one that has
    /// failed is not asked again until it is reinstated.
    pub fn in_turn(devices: &[DeviceNumber]) -> Self {
        let groups = devices.iter().map(|&device| PathGroup {
            selector: PathSelector::RoundRobin,
            paths: vec![Path {
                device,
                throughput: 1,
            }],
        });
        Self {
            queue_if_no_path: false,
            bio_based: true,
            groups: groups.collect(),
            first_group: u32::from(!devices.is_empty()),
        }
    }

    pub(super) fn parse(tokens: &mut Tokens<'_>) -> Result<Self, TableError> {
        let (mut queue_if_no_path, mut bio_based) = (false, false);
        let features = tokens.list("features")?;
        let mut words = features.iter();
        while let Some(word) = words.next() {
            match *word {
                "queue_if_no_path" => queue_if_no_path = true,
                // The kernel says so of all that are based on bios, and takes it from nobody.
                "retain_attached_hw_handler" => {}
                "queue_mode" if words.next() == Some(&"bio") => bio_based = true,
                other => return Err(tokens.invalid("multipath feature", other)),
            }
        }
        if let Some(handler) = tokens.list("hardware handler arguments")?.first() {
            return Err(tokens.invalid("hardware handler (none is used)", handler));
        }
        let count = tokens.count("number of path groups")?;
        let first_group = tokens.parsed("first path group")?;
        let groups = (0..count)
            .map(|_| PathGroup::parse(tokens))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            queue_if_no_path,
            bio_based,
            groups,
            first_group,
        })
    }
}

impl PathGroup {
    fn parse(tokens: &mut Tokens<'_>) -> Result<Self, TableError> {
        let selector = match tokens.next("path selector")? {
            "round-robin" => PathSelector::RoundRobin,
            "service-time" => PathSelector::ServiceTime,
            "queue-length" => PathSelector::QueueLength,
            other => return Err(tokens.invalid("path selector", other)),
        };
        if let Some(argument) = tokens.list("path selector arguments")?.first() {
            return Err(tokens.invalid("path selector argument (there are none)", argument));
        }
        let count = tokens.count("number of paths")?;
        let arguments = tokens.count("number of path arguments")?;
        if arguments != selector.path_arguments() {
            return Err(tokens.invalid("number of path arguments", &arguments.to_string()));
        }
        let paths = (0..count)
            .map(|_| Path::parse(tokens, selector))
            .collect::<Result<_, _>>()?;
        Ok(Self { selector, paths })
    }
}

impl Path {
    fn parse(tokens: &mut Tokens<'_>, selector: PathSelector) -> Result<Self, TableError> {
        let device = tokens.device("path")?;
        let _repeat: u32 = tokens.parsed("repeat count")?;
        let throughput = if selector == PathSelector::ServiceTime {
            tokens.parsed("relative throughput")?
        } else {
            1
        };
        Ok(Self { device, throughput })
    }
}

impl fmt::Display for Multipath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // In the kernel's order.
        let features = match (self.queue_if_no_path, self.bio_based) {
            (false, false) => "0",
            (true, false) => "1 queue_if_no_path",
            (false, true) => "2 queue_mode bio",
            (true, true) => "3 queue_if_no_path queue_mode bio",
        };
        write!(f, "{features} 0 {} {}", self.groups.len(), self.first_group)?;
        for PathGroup { selector, paths } in &self.groups {
            write!(
                f,
                " {} 0 {} {}",
                selector.name(),
                paths.len(),
                selector.path_arguments()
            )?;
            for Path { device, throughput } in paths {
                write!(f, " {device} {REPEAT_COUNT}")?;
                if *selector == PathSelector::ServiceTime {
                    write!(f, " {throughput}")?;
                }
            }
        }
        Ok(())
    }
}
