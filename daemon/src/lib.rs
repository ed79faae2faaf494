//! What the daemons' command lines share: options that may stand in a file, the log, and word to the service manager.
//!
//! Deliberately absent: what any option means. A daemon declares its options once, for clap; the file's keys are their long names.

#![forbid(unsafe_code)]

pub mod config;
mod service;

pub use service::{log_to_stderr, notify_ready};
