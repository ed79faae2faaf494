//! What dm-multipath reports (kernel `drivers/md/dm-mpath.c`, `multipath_status`).

use super::{StatusError, Words};
use crate::DeviceNumber;

/// What a multipath target says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MultipathStatus {
    /// Requests are being queued while a group is made ready. (That requests are queued because no path is up, the kernel
    /// does not report: see [`Self::paths_up`] and the table.)
    pub queueing: bool,
    /// Group in use or to be used next, counted from 1; 0 where there are none.
    pub group: u32,
    /// The groups, in the order of the table.
    pub groups: Vec<GroupStatus>,
}

/// A group of paths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupStatus {
    /// Whether it is in use.
    pub state: GroupState,
    /// Its paths, in the order of the table.
    pub paths: Vec<PathStatus>,
}

/// Whether a group is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupState {
    /// In use.
    Active,
    /// Could be used.
    Enabled,
    /// Passed over by order.
    Disabled,
}

/// A path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PathStatus {
    /// The SCSI disk.
    pub device: DeviceNumber,
    /// Not failed, as far as I/O has shown. The kernel never tries a failed path again by itself: message
    /// `reinstate_path MAJOR:MINOR`.
    pub up: bool,
    /// Times it has failed.
    pub failures: u32,
}

impl MultipathStatus {
    pub(super) fn parse(words: &mut Words<'_>) -> Result<Self, StatusError> {
        let features = words.list("features")?;
        let queueing = features.first().is_some_and(|word| *word != "0");
        words.list("hardware handler")?;
        let count = words.count("number of groups")?;
        let group = number(words, "group in use")?;
        let groups = (0..count)
            .map(|_| GroupStatus::parse(words))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            queueing,
            group,
            groups,
        })
    }

    /// Paths that are up, over all groups.
    pub fn paths_up(&self) -> usize {
        let paths = self.groups.iter().flat_map(|group| &group.paths);
        paths.filter(|path| path.up).count()
    }
}

impl GroupStatus {
    fn parse(words: &mut Words<'_>) -> Result<Self, StatusError> {
        let state = match words.next("state of a group")? {
            "A" => GroupState::Active,
            "E" => GroupState::Enabled,
            "D" => GroupState::Disabled,
            _ => return Err(words.error("state of a group of A, E or D")),
        };
        words.list("path selector's status")?;
        let count = words.count("number of paths")?;
        let arguments = words.count("number of path arguments")?;
        let paths = (0..count)
            .map(|_| {
                let path = PathStatus::parse(words)?;
                for _ in 0..arguments {
                    words.next("path argument")?;
                }
                Ok(path)
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { state, paths })
    }
}

impl PathStatus {
    fn parse(words: &mut Words<'_>) -> Result<Self, StatusError> {
        let device = words.next("path")?;
        Ok(Self {
            device: device.parse().map_err(|()| words.error("path"))?,
            up: match words.next("state of a path")? {
                "A" => true,
                "F" => false,
                _ => return Err(words.error("state of a path of A or F")),
            },
            failures: number(words, "number of failures")?,
        })
    }
}

fn number(words: &mut Words<'_>, what: &'static str) -> Result<u32, StatusError> {
    let number = words.number(what)?;
    u32::try_from(number).map_err(|_| words.error(what))
}
