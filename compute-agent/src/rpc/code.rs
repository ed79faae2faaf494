//! Which status an error becomes.

use treeboot_block::{GroupError, LayerError};

use crate::host::HostError;
use crate::link::LinkError;
use crate::plane::PlaneError;
use crate::plane::caching::CachingError;
use crate::store::StoreError;

pub(super) fn of(error: &HostError) -> tonic::Code {
    use tonic::Code;
    match error {
        HostError::UnknownVm { .. }
        | HostError::NoDisk { .. }
        | HostError::NotAttached { .. }
        | HostError::Store(StoreError::NotStored { .. }) => Code::NotFound,
        HostError::VmExists { .. } | HostError::ImageExists { .. } => Code::AlreadyExists,
        HostError::ImageInUse { .. }
        | HostError::NoHypervisor { .. }
        | HostError::NotOnPlane { .. }
        | HostError::DiskInUse { .. }
        | HostError::Moving { .. }
        | HostError::Lost { .. }
        | HostError::WasTaken { .. }
        | HostError::NotGone { .. }
        | HostError::OtherHost { .. }
        | HostError::VmRuns { .. }
        | HostError::NotFrozen { .. }
        | HostError::Store(StoreError::NoStore { .. } | StoreError::Elsewhere { .. }) => {
            Code::FailedPrecondition
        }
        HostError::Link(LinkError::Unavailable { .. })
        | HostError::NotReadable { .. }
        | HostError::Undecided { .. }
        | HostError::Unsure { .. }
        | HostError::Stopping { .. }
        | HostError::Store(StoreError::Unreadable { .. }) => Code::Unavailable,
        HostError::Link(LinkError::Refused(status)) => status.code(),
        HostError::Link(LinkError::Invalid { .. }) | HostError::Journal(_) | HostError::Stop(_) => {
            Code::Internal
        }
        HostError::Invalid(_)
        | HostError::Store(
            StoreError::Size { .. }
            | StoreError::Chunk { .. }
            | StoreError::Part { .. }
            | StoreError::OtherSize { .. },
        ) => Code::InvalidArgument,
        HostError::Store(StoreError::Interrupted { .. }) => Code::Aborted,
        HostError::Store(StoreError::NoSpace { .. }) => Code::ResourceExhausted,
        HostError::Store(StoreError::Io { .. }) => Code::Internal,
        HostError::Store(StoreError::Damaged { .. }) => Code::DataLoss,
        HostError::Start(error) => match error {
            treeboot_hypervisor::StartError::Spec(_) | treeboot_hypervisor::StartError::Seed(_) => {
                Code::InvalidArgument
            }
            treeboot_hypervisor::StartError::Probe(_) => Code::FailedPrecondition,
            _ => Code::Internal,
        },
        HostError::Undo { cause, .. } => of(cause),
        HostError::Shared(cause) => of(cause),
        HostError::Reach { source, .. } => match source {
            crate::apply::ReachError::Inspect(plane)
            | crate::apply::ReachError::Step { source: plane, .. } => plane_code(plane),
            crate::apply::ReachError::Obstacles(_) => Code::FailedPrecondition,
            crate::apply::ReachError::Journal(_) => Code::Internal,
        },
        HostError::Plane(plane) => plane_code(plane),
        HostError::Layers { source, .. } => layer_code(source),
        HostError::Shipped { .. } => Code::Aborted,
        HostError::Arriving { .. } => Code::AlreadyExists,
        HostError::Cancelled { .. } => Code::Cancelled,
        HostError::Peer { status, .. } => status.code(),
        HostError::Cache { source, .. } => cache_code(source),
        HostError::Read(treeboot_block::BlockError::Corrupt { .. }) => Code::DataLoss,
        HostError::Read(_) => Code::Unavailable,
    }
}

fn cache_code(error: &CachingError) -> tonic::Code {
    use tonic::Code;
    match error {
        CachingError::Group(GroupError::NoMember { .. } | GroupError::Unknown { .. }) => Code::NotFound,
        CachingError::Group(GroupError::Exists { .. }) => Code::AlreadyExists,
        CachingError::Group(GroupError::Directory { .. } | GroupError::Pinned { .. }) => {
            Code::FailedPrecondition
        }
        CachingError::Group(GroupError::TooMany | GroupError::PinTooLarge { .. }) => Code::ResourceExhausted,
        CachingError::Save { .. } => Code::Internal,
    }
}

fn plane_code(error: &PlaneError) -> tonic::Code {
    use tonic::Code;
    match error {
        PlaneError::NoSpace { .. } => Code::ResourceExhausted,
        PlaneError::Damaged { .. } => Code::DataLoss,
        PlaneError::Missing { .. } => Code::NotFound,
        PlaneError::TooLong { .. } => Code::Unavailable,
        PlaneError::Unfit { .. } => Code::FailedPrecondition,
        PlaneError::Undo { cause, .. } => plane_code(cause),
        PlaneError::Layers { source, .. } => layer_code(source),
        PlaneError::Rule(_) | PlaneError::Failed { .. } | PlaneError::Injected { .. } => Code::Internal,
    }
}

fn layer_code(error: &LayerError) -> tonic::Code {
    use tonic::Code;
    use treeboot_block::layers::TreeError;
    match error {
        LayerError::Tree(TreeError::Exists { .. }) => Code::AlreadyExists,
        LayerError::Tree(TreeError::Unknown { .. }) => Code::NotFound,
        LayerError::Tree(TreeError::Full) => Code::ResourceExhausted,
        LayerError::Tree(TreeError::Held) => Code::FailedPrecondition,
        LayerError::Damaged { .. } => Code::DataLoss,
        LayerError::Busy | LayerError::Stopping => Code::Unavailable,
        LayerError::Delta(_) | LayerError::Base(_) => Code::Internal,
    }
}
