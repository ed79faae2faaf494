//! Runs VMs: starts QEMU on a disk, talks QMP, reads the serial console, and gives each VM an identity of its own.
//!
//! - [`probe`] finds QEMU and tries out what it can do, by running a guest of 512 bytes.
//! - [`start`] runs a [`VmSpec`]; [`RunningVm::adopt`] finds a VM again after a restart of whoever started it.
//! - [`RunningVm`] waits for readiness as seen from outside, stops, and reads the disk's statistics.
//! - [`Seed`] makes the cloud-init NoCloud disk.
//!
//! A VM lives in its *run directory*, and nothing about it is kept elsewhere: `vm.json` (what was asked), `qemu.pid`,
//! `qmp.sock` (commands), `events.sock` (what QEMU tells), `agent.sock` (the guest
//! agent), `console.log` (the serial console), `qemu.log` (QEMU's own
//! words), `seed.img`. QEMU detaches itself into a session of its own, so that it outlives the process that started it.
//! Under systemd that process needs `KillMode=process`, since a service's processes are otherwise ended together.
//!
//! Deliberately absent: libvirt, disk formats (a disk is a LUN or a raw file), anything that knows images or trees, and a
//! task in the background: whoever holds a [`RunningVm`] decides when to look.

#![forbid(unsafe_code)]

mod boot_sector;
mod command;
mod console;
mod guest_agent;
mod probe;
mod process;
mod qmp;
mod seed;
mod spec;
mod vm;

pub use console::{io_errors, ready_line};
pub use guest_agent::{GuestAgent, GuestAgentError};
pub use probe::{Acceleration, Hypervisor, ProbeError, ProbeOptions, QEMU_PACKAGES, probe, probe_with};
pub use qmp::QmpError;
pub use seed::{Seed, SeedError};
pub use spec::{DiskSource, Instance, MAX_RUN_DIR_BYTES, Readiness, SPEC_FILE, SpecError, VmSpec};
pub use vm::{
    AdoptError, BlockStats, ReadyError, RunningVm, StartError, StopError, StopMode, Stopped, VmState, start,
};
