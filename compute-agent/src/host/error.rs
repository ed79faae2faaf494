//! What a person or a program is told when a verb fails.

use treeboot_types::{ImageId, VmName};

use crate::apply::ReachError;
use crate::journal::JournalError;
use crate::link::LinkError;
use crate::plane::PlaneError;

/// Why a verb failed.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// No such VM here.
    #[error("there is no VM '{vm}' on host '{host}'; `treeboot vm list` shows which there are")]
    UnknownVm {
        /// The VM.
        vm: VmName,
        /// This host.
        host: String,
    },
    /// The name is taken.
    #[error(
        "VM '{vm}' exists on host '{host}', made of {have}; destroy it first, or give the new one another name"
    )]
    VmExists {
        /// The VM.
        vm: VmName,
        /// This host.
        host: String,
        /// What it was made of.
        have: ImageId,
    },
    /// The image is there and is another one.
    #[error(
        "image {image} exists on host '{host}' with another content (digest {have}, not {given}); a version never \
         changes: import this one as a new version, without '@{}'", image.version
    )]
    ImageExists {
        /// The image.
        image: ImageId,
        /// This host.
        host: String,
        /// The beginning of its digest.
        have: String,
        /// That of what was to be imported.
        given: String,
    },
    /// Not attached and not in the store.
    #[error("image {image} is not attached to host '{host}'")]
    NotAttached {
        /// The image.
        image: ImageId,
        /// This host.
        host: String,
    },
    /// VMs stand on it.
    #[error("image {image} is in use on host '{host}' by VM {}; destroy the VMs first", some(.vms))]
    ImageInUse {
        /// The image.
        image: ImageId,
        /// This host.
        host: String,
        /// Who uses it.
        vms: Vec<VmName>,
    },
    /// The coordinator says no, or does not answer.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The host's own part failed.
    #[error("{what}")]
    Reach {
        /// What was to be reached.
        what: String,
        /// The reason.
        #[source]
        source: ReachError,
    },
    /// What was half done could not be taken back.
    #[error(
        "{cause}; taking back what was half done failed as well: {undo}. It is tried again at the next call"
    )]
    Undo {
        /// Why it failed first.
        cause: Box<HostError>,
        /// Why taking it back failed.
        undo: Box<HostError>,
    },
    /// Attached, and not readable within the caller's time.
    #[error(
        "image {image} is attached, but was not readable within {limit_ms} ms ({why}); the host goes on trying: see \
         `treeboot tree {image}`"
    )]
    NotReadable {
        /// The image.
        image: ImageId,
        /// The limit in milliseconds.
        limit_ms: u64,
        /// What was seen last.
        why: String,
    },
    /// The journal refused.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The plane refused.
    #[error(transparent)]
    Plane(#[from] PlaneError),
    /// No VM can run here.
    #[error("host '{host}' cannot run VMs")]
    NoHypervisor {
        /// This host.
        host: String,
        /// The reason, with the way out.
        #[source]
        source: std::sync::Arc<treeboot_hypervisor::ProbeError>,
    },
    /// QEMU did not start.
    #[error(transparent)]
    Start(#[from] treeboot_hypervisor::StartError),
    /// QEMU did not stop.
    #[error(transparent)]
    Stop(#[from] treeboot_hypervisor::StopError),
    /// The VM runs.
    #[error("VM '{vm}' runs; stop it first")]
    VmRuns {
        /// The VM.
        vm: VmName,
    },
    /// A guest was to hold its file systems still, and does not.
    #[error(
        "the file systems of VM '{vm}' cannot be frozen: {why}; `--freeze auto` takes the snapshot all the same, as a power failure would"
    )]
    NotFrozen {
        /// The VM.
        vm: VmName,
        /// The reason.
        why: String,
    },
    /// The request cannot be right.
    #[error("{0}")]
    Invalid(String),
    /// The import or the store.
    #[error(transparent)]
    Store(#[from] crate::store::StoreError),
    /// This host's plane cannot do it.
    #[error("{verb} cannot be done on host '{host}': {why}")]
    NotOnPlane {
        /// The verb.
        verb: &'static str,
        /// This host.
        host: String,
        /// Why, and what to do instead.
        why: &'static str,
    },
    /// The cache group.
    #[error("the cache of host '{host}': {source}")]
    Cache {
        /// This host.
        host: String,
        /// The reason.
        source: crate::plane::caching::CachingError,
    },
    /// The VM is known, but its disk is not there.
    #[error("VM '{vm}' has no disk on host '{host}'; `treeboot vm create {vm}` makes one")]
    NoDisk {
        /// The VM.
        vm: VmName,
        /// This host.
        host: String,
    },
    /// A front end is logged in to the disk.
    #[error(
        "{sessions} front ends are logged in to the disk of VM '{vm}' and would not see that it changes; end them first"
    )]
    DiskInUse {
        /// The VM.
        vm: VmName,
        /// How many.
        sessions: u32,
    },
    /// A disk that was shipped is not what was sent, or does not fit.
    #[error("the disk for VM '{vm}' was not taken: {why}")]
    Shipped {
        /// The new VM.
        vm: VmName,
        /// What is wrong.
        why: String,
    },
    /// Another transfer brings a disk for a VM of this name.
    #[error(
        "VM '{vm}' is being made on host '{host}' from another VM; wait for its end, or give this one another name"
    )]
    Arriving {
        /// The new VM.
        vm: VmName,
        /// This host.
        host: String,
    },
    /// The VM is on its way to another host.
    #[error("VM '{vm}' is moving to host '{to}'; wait for its end, or cancel it")]
    Moving {
        /// The VM.
        vm: VmName,
        /// The other host.
        to: String,
    },
    /// The other host was asked to take the VM, and has not said whether it did.
    #[error(
        "host '{to}' was asked to take VM '{vm}' and has not said whether it did, so that the VM runs nowhere; it is asked until it says so: \
         bring that host's agent back. Should it be gone for good: `treeboot migrate {vm} --take-back --gone {to}`"
    )]
    Undecided {
        /// The VM.
        vm: VmName,
        /// The other host.
        to: String,
    },
    /// The VM came from another host, which may have taken it back.
    #[error(
        "VM '{vm}' came from host '{from}', which has not said yet that it did not take it back, so that this is not done with it; that host is \
         asked until it says so: bring its agent back. Should it be gone for good: `treeboot migrate {vm} --take-back --gone {from}`"
    )]
    Unsure {
        /// The VM.
        vm: VmName,
        /// The host that it came from.
        from: String,
    },
    /// The VM came from another host, which took it back.
    #[error(
        "VM '{vm}' was taken back by host '{from}', which it came from; what is left of it on host '{host}' runs no more: \
         `treeboot vm destroy {vm} --host {host}` removes it"
    )]
    Lost {
        /// The VM.
        vm: VmName,
        /// The host that it came from.
        from: String,
        /// This host.
        host: String,
    },
    /// A VM that was to be taken back is the other host's.
    #[error("host '{to}' answers, and has taken VM '{vm}': it is there, and nothing is left of it here")]
    WasTaken {
        /// The VM.
        vm: VmName,
        /// The other host.
        to: String,
    },
    /// A host that was said to be gone is not.
    #[error(
        "host '{host}' is not gone: the coordinator hears its agent, and it will say itself whether it has VM '{vm}'; see that the agents reach \
         each other"
    )]
    NotGone {
        /// The VM.
        vm: VmName,
        /// The host.
        host: String,
    },
    /// A VM was to be taken back from a host that has nothing to do with it.
    #[error("whose VM '{vm}' is hangs on host '{on}', not on host '{gone}'")]
    OtherHost {
        /// The VM.
        vm: VmName,
        /// The host that is waited for.
        on: String,
        /// The host that was named.
        gone: String,
    },
    /// Whoever asked for it went away, or the agent ends.
    #[error("{what} was cancelled; nothing of it is left")]
    Cancelled {
        /// What.
        what: String,
    },
    /// Another host could not be reached, or said no.
    #[error("host '{host}': {}", status.message())]
    Peer {
        /// The host.
        host: treeboot_types::HostName,
        /// Its words.
        status: Box<tonic::Status>,
    },
    /// What was to be shipped cannot be read.
    #[error("the disk cannot be read")]
    Read(#[from] treeboot_block::BlockError),
    /// The layers of a disk.
    #[error("the disk of VM '{vm}' on host '{host}'")]
    Layers {
        /// The VM.
        vm: VmName,
        /// This host.
        host: String,
        /// The reason, with the way out.
        #[source]
        source: Box<treeboot_block::LayerError>,
    },
    /// What several calls had in common failed.
    #[error(transparent)]
    Shared(std::sync::Arc<HostError>),
    /// The agent ends.
    #[error("the agent of host '{host}' is stopping; try again when it is back")]
    Stopping {
        /// This host.
        host: String,
    },
}

impl HostError {
    /// Tells it to all who wait.
    pub(super) fn answer<T>(self, mut replies: Vec<super::base::Reply<T>>) {
        if replies.len() == 1
            && let Some(only) = replies.pop()
        {
            let _ = only.send(Err(self));
            return;
        }
        let shared = std::sync::Arc::new(self);
        for reply in replies {
            let _ = reply.send(Err(Self::Shared(std::sync::Arc::clone(&shared))));
        }
    }
}

impl HostError {
    /// Whether a transfer that ended so may be gone on with.
    pub(super) fn may_be_gone_on_with(&self) -> bool {
        use std::error::Error as _;
        use tonic::Code;
        // A status that has a source is our own connection's.
        matches!(self, Self::Peer { status, .. } if status.source().is_some()
            || matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Aborted))
    }
}

fn some(vms: &[VmName]) -> String {
    let names: Vec<_> = vms.iter().take(5).map(|vm| format!("'{vm}'")).collect();
    let more = vms.len().saturating_sub(names.len());
    if more > 0 {
        format!("{} and {more} more", names.join(", "))
    } else {
        names.join(", ")
    }
}

/// The whole chain of reasons in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let part = error.to_string();
        // A transparent wrapper says what its source says.
        if !text.ends_with(&part) {
            text.push_str(": ");
            text.push_str(&part);
        }
        source = error.source();
    }
    text
}
