//! The daemon on every host: attaches images, caches them, gives VMs their disks and re-exports.
//!
//! `stack` plans (pure), `journal` remembers, `plane` carries out, `host` owns (one task a content, one a VM), `link` is the
//! way to the coordinator, `store` holds an origin's images, `rpc` is the `Agent` service,
//! `face` what is seen over HTTP.

#![forbid(unsafe_code)]

pub mod apply;
pub mod choice;
#[cfg(any(test, feature = "testing"))]
pub mod conformance;
pub mod daemon;
pub mod desired;
pub mod doctor;
mod face;
pub mod heed;
pub mod holder;
pub mod host;
pub mod identity;
pub mod journal;
pub mod keys;
pub mod link;
pub mod orphans;
pub mod plane;
pub mod planted;
pub mod rpc;
pub mod stack;
pub mod store;
pub mod witness;
