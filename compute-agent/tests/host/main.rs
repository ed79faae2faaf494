//! A host's verbs under faults, over planes that fail or die at each step in turn, and with a coordinator, a QEMU and a guest agent that the
//! tests play. One program, so that all of it is compiled and linked once.

#![allow(clippy::unwrap_used, reason = "tests")]

mod chain;
mod common;
mod freeze;
mod layers;
mod migrate;
mod orphans;
mod take_back;
mod verbs;
