//! Messages to types and back. A conversion that can fail names the field that was wrong.

mod placement;

pub use placement::{
    MAX_LABEL_BYTES, MAX_LABELS, MAX_PARENTS, MAX_STRIPES, endpoint, instance, labels, new_image,
};

use treeboot_types::{Digest, Epoch, HostName, ImageId, ImageName, ImageRef, NameError};

use crate::v1;

/// Why a message is not valid; becomes INVALID_ARGUMENT.
#[derive(Debug, thiserror::Error)]
pub enum InvalidMessage {
    /// A field that must be there is not.
    #[error("the field '{0}' is missing")]
    Missing(&'static str),
    /// A name is not one.
    #[error("{0}")]
    Name(#[from] NameError),
    /// A value outside what is allowed.
    #[error("the field '{field}' is not valid: {why}")]
    Value {
        /// The field.
        field: &'static str,
        /// What is wrong, with the value.
        why: String,
    },
}

impl From<Epoch> for v1::Epoch {
    fn from(epoch: Epoch) -> Self {
        Self {
            incarnation: epoch.incarnation,
            counter: epoch.counter,
        }
    }
}

impl From<v1::Epoch> for Epoch {
    fn from(epoch: v1::Epoch) -> Self {
        Self {
            incarnation: epoch.incarnation,
            counter: epoch.counter,
        }
    }
}

impl From<&ImageId> for v1::ImageId {
    fn from(id: &ImageId) -> Self {
        Self {
            name: id.name.to_string(),
            version: id.version,
        }
    }
}

/// A message's image with its version.
///
/// # Errors
/// Missing, not a name, or without a version.
pub fn image_id(message: Option<&v1::ImageId>) -> Result<ImageId, InvalidMessage> {
    let reference = image_id_or_newest(message)?;
    let version = reference
        .version
        .ok_or(InvalidMessage::Missing("image.version"))?;
    Ok(ImageId {
        name: reference.name,
        version,
    })
}

/// A message's image, whose version may be left to the newest (0).
///
/// # Errors
/// Missing, or not a name.
pub fn image_id_or_newest(message: Option<&v1::ImageId>) -> Result<ImageRef, InvalidMessage> {
    let message = message.ok_or(InvalidMessage::Missing("image"))?;
    let version = (message.version != 0).then_some(message.version);
    Ok(ImageRef {
        name: ImageName::new(&message.name)?,
        version,
    })
}

impl From<&ImageRef> for v1::ImageId {
    fn from(reference: &ImageRef) -> Self {
        Self {
            name: reference.name.to_string(),
            version: reference.version.unwrap_or(0),
        }
    }
}

impl v1::Image {
    /// The image's digest.
    ///
    /// # Errors
    /// Not 32 bytes.
    pub fn parsed_digest(&self) -> Result<Digest, InvalidMessage> {
        Digest::from_slice(&self.digest).map_err(|error| InvalidMessage::Value {
            field: "digest",
            why: error.to_string(),
        })
    }
}

impl v1::Parent {
    /// The parent's host; absent for a foreign origin.
    ///
    /// # Errors
    /// Not a name.
    pub fn parsed_host(&self) -> Result<Option<HostName>, InvalidMessage> {
        if self.host.is_empty() {
            Ok(None)
        } else {
            Ok(Some(HostName::new(&self.host)?))
        }
    }
}
