//! The fuzz functions. Each takes any bytes and panics where a law is broken.
//!
//! `targets/` hands them to libFuzzer (`cargo xtask soak`); the tests `fuzz` of the crates `treeboot-iscsi` and
//! `treeboot-dm` take these same files in and run them, without libFuzzer, over the seeds and mutations of them.

#![forbid(unsafe_code)]

pub mod dm;
pub mod iscsi;
