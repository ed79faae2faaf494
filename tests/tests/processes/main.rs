//! Laws that only real processes can show. One program for all of them, because every further one would be linked anew.

#![forbid(unsafe_code)]

mod attach;
mod bad_input;
mod boot;
mod bytes;
mod cache;
mod clock;
mod clones;
mod config;
mod device;
mod endure;
mod faults;
mod freeze;
mod harness;
mod http;
mod iscsi_suite;
mod kernel_initiator;
mod kills;
mod limits;
mod migrations;
mod model;
mod names;
mod orphans;
mod publish;
mod qcow2;
mod record;
mod room;
mod sectors;
mod serve;
mod snapshots;
mod steps;
mod strangers;
mod strangers_iscsi;
mod striped;
mod support;
mod written;
