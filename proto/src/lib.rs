//! The services of treeboot as gRPC, and the only conversions between messages and `treeboot-types`.
//!
//! Deliberately absent: decisions. Whoever receives a message parses it here, once, into types.

#![forbid(unsafe_code)]

mod codec;
mod convert;
mod secret;

pub use convert::{
    InvalidMessage, MAX_LABEL_BYTES, MAX_LABELS, MAX_PARENTS, MAX_STRIPES, endpoint, image_id,
    image_id_or_newest, instance, labels, new_image,
};

/// The descriptors of all messages and services with their comments: an encoded `FileDescriptorSet`.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// The generated messages and services of `treeboot.v1`.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod v1 {
    tonic::include_proto!("treeboot.v1");
}
