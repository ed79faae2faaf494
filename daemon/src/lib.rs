//! What the daemons share: options that may stand in a file, the log, word to the service manager, and HTTP beside gRPC.
//!
//! Deliberately absent: what any option or verb means. A daemon declares its options once, for clap; the file's keys are their long names.

#![forbid(unsafe_code)]

pub mod config;
pub mod http;
mod service;

pub use service::{log_to_stderr, notify_ready, take_all_files};
