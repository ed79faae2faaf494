//! A VM's disk, and how far it is on its way from one host to another, as the journal keeps it.

use serde::{Deserialize, Serialize};
use treeboot_hypervisor::{Readiness, Seed};
use treeboot_types::{HostName, ImageId};

use crate::stack::WantedDisk;

/// How a disk stands that is on its way from one host to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "move")]
pub enum Move {
    /// It comes: all of it is here, and it is its VM's once this is journalled away. Until then it is served to nobody.
    Arriving,
    /// It came, and the agent ended before the host that it came from ([`DiskState::from`]) had said that it knows so: that host may have taken
    /// it back meanwhile. Until it says that it did not, the disk is served to nobody.
    Unsure,
    /// It came, and the host that it came from took it back. What is here is served to nobody, and kept until somebody destroys it.
    Lost,
    /// It goes.
    Leaving {
        /// The transfer, a random number.
        transfer: u64,
        /// Where it goes.
        to: HostName,
        /// `host:port` of that host's agent.
        address: String,
        /// How far it is.
        stage: Stage,
    },
}

/// How far a VM is that goes to another host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Its run ends; the disk is still served.
    Stopping,
    /// Its disk is served no more. It is still this host's VM.
    Fenced,
    /// The other host was asked to take it. Whose it is that host alone knows, until it says so.
    Asked,
}

/// How a VM is run: what its next start needs, where nobody gives it anew.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunSpec {
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Processors.
    pub cpus: u32,
    /// How readiness is seen.
    pub ready: Readiness,
    /// What a first boot learns.
    pub seed: Seed,
}

/// The host that a VM came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OldHost {
    /// Its name.
    pub host: HostName,
    /// `host:port` of its agent.
    pub address: String,
}

/// A VM's disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskState {
    /// The image it was made of.
    pub image: ImageId,
    /// Base and size.
    pub disk: WantedDisk,
    /// It is being destroyed: its name is free once its delta is gone.
    pub doomed: bool,
    /// Random: who the VM is for as long as its disk lives.
    pub instance: [u8; 16],
    /// It is a block device of the host, too.
    #[serde(default)]
    pub device: bool,
    /// The transfer that it came by, where it came from another VM: the same one is not taken twice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transfer: Option<u64>,
    /// It is on its way from or to another host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moving: Option<Move>,
    /// Where it came from, until that host has said that it knows so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<OldHost>,
    /// Its VM is to be started as soon as it is served: it ran before it moved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<Box<RunSpec>>,
    /// Its run was told to end so that it moves: whether it moves or stays, that is seen through before it is started again.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ends: bool,
    /// Its guest was asked to hold its file systems still, and has not said that they go on.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub frozen: bool,
    /// The most bytes of blocks that the VM may have written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit_bytes: Option<u64>,
}

impl DiskState {
    /// A disk that is served by the portal alone.
    pub fn new(image: ImageId, disk: WantedDisk, instance: [u8; 16]) -> Self {
        Self {
            image,
            disk,
            doomed: false,
            instance,
            device: false,
            transfer: None,
            moving: None,
            from: None,
            start: None,
            ends: false,
            frozen: false,
            limit_bytes: None,
        }
    }

    /// Front ends are let in.
    pub fn is_served(&self) -> bool {
        let moving = self.moving.as_ref();
        !self.doomed
            && moving.is_none_or(|moving| {
                matches!(
                    moving,
                    Move::Leaving {
                        stage: Stage::Stopping,
                        ..
                    }
                )
            })
    }

    /// It is this host's VM's, and on its way nowhere.
    pub fn is_settled(&self) -> bool {
        !self.doomed && self.moving.is_none()
    }

    /// It goes by this transfer.
    pub fn leaves_by(&self, by: u64) -> bool {
        matches!(&self.moving, Some(Move::Leaving { transfer, .. }) if *transfer == by && !self.doomed)
    }

    /// It goes by this transfer, and the other host was asked to take it.
    pub fn is_asked_by(&self, asked: u64) -> bool {
        matches!(
            &self.moving,
            Some(Move::Leaving { transfer, stage: Stage::Asked, .. }) if *transfer == asked && !self.doomed
        )
    }

    /// It comes, and is not a VM's yet.
    pub fn is_arriving(&self) -> bool {
        self.moving == Some(Move::Arriving)
    }
}
