//! Real processes under test: daemons as a person would start them, on addresses and in folders of their own, with their end assured.
//!
//! `tests/processes` and the programs `treeboot-demo` and `treeboot-bench` are written with it. Deliberately absent there: the daemons' crates.
//! What is tested is what is installed, over its own wires. Only the programs that die at a moment of the test's choice are made of them.

#![forbid(unsafe_code)]

pub mod authority;
pub mod binaries;
pub mod cluster;
pub mod daemon;
pub mod fleet;
pub mod guest;
pub mod http;
pub mod image;
pub mod lab;
pub mod measure;
pub mod need;
pub mod network;
pub mod reader;
pub mod relay;
pub mod scratch;
pub mod stats;
pub mod steps;
pub mod table;
pub mod tgt;
pub mod uml;
pub mod wait;
