//! The multipath device of a stripe, and what the kernel says of it.

use treeboot_dm::status::MultipathStatus;
use treeboot_dm::{DmDevice, Status};
use treeboot_types::{Digest, StripeIndex};

use super::{Sys, mapper_error};
use crate::plane::PlaneError;

/// The multipath device of a stripe.
pub(super) fn multipath(digest: Digest, index: usize) -> DmDevice {
    DmDevice::Multipath(digest, StripeIndex(u16::try_from(index).unwrap_or(u16::MAX)))
}

/// What the kernel says of it.
///
/// # Errors
/// It is not there, or does not answer.
pub(super) fn multipath_status(
    sys: &Sys,
    digest: Digest,
    index: usize,
) -> Result<MultipathStatus, PlaneError> {
    let device = multipath(digest, index);
    let lines = sys.mapper.status(&device).map_err(mapper_error)?;
    let status = lines.into_iter().find_map(|line| match line.status {
        Status::Multipath(status) => Some(status),
        _ => None,
    });
    status.ok_or_else(|| PlaneError::Missing {
        what: format!("the device {device}"),
    })
}
