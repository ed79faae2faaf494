//! What can go wrong with a VM.

use std::path::PathBuf;

use treeboot_types::VmName;

use crate::{ProbeError, SeedError, SpecError};

/// Why a VM did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// What was asked cannot be.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// QEMU lacks something.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// The identity cannot be made.
    #[error(transparent)]
    Seed(#[from] SeedError),
    /// It runs already.
    #[error("VM {vm} runs already, as process {pid}; stop it first or adopt it")]
    Running {
        /// The VM.
        vm: VmName,
        /// Its process.
        pid: u32,
    },
    /// A file of the run directory.
    #[error("cannot prepare {} for VM {vm}", path.display())]
    File {
        /// The VM.
        vm: VmName,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The program cannot be run.
    #[error("cannot run {} for VM {vm}", qemu.display())]
    Run {
        /// The VM.
        vm: VmName,
        /// The program.
        qemu: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// QEMU gave up.
    #[error("QEMU did not start VM {vm}: {words}")]
    Qemu {
        /// The VM.
        vm: VmName,
        /// Its last words.
        words: String,
    },
    /// QEMU did not get that far; it has been ended.
    #[error("QEMU did not start VM {vm} within {limit_ms} ms; does its disk's portal answer? {words}")]
    TimedOut {
        /// The VM.
        vm: VmName,
        /// The limit.
        limit_ms: u128,
        /// What it said until then.
        words: String,
    },
}

/// Why a run directory has no VM to adopt.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// No VM was ever started there.
    #[error("there is no VM in {}", dir.display())]
    Nothing {
        /// The directory.
        dir: PathBuf,
    },
    /// It was, and has ended.
    #[error("VM {vm} in {} does not run; start it", dir.display())]
    NotRunning {
        /// The VM.
        vm: VmName,
        /// The directory.
        dir: PathBuf,
    },
    /// A file there is unreadable.
    #[error("cannot read {}; if the VM runs, end it by hand and remove the directory", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// Why a VM is not ready.
#[derive(Debug, thiserror::Error)]
pub enum ReadyError {
    /// QEMU has ended.
    #[error("QEMU of VM {vm} ended before the guest was ready: {words}")]
    Ended {
        /// The VM.
        vm: VmName,
        /// QEMU's last words and the console's last line.
        words: String,
    },
    /// The guest has given up.
    #[error("the guest of VM {vm} has failed: {line}; see {}", console.display())]
    Failed {
        /// The VM.
        vm: VmName,
        /// What it said.
        line: String,
        /// Its console.
        console: PathBuf,
    },
    /// Not in time.
    #[error("VM {vm} was not ready within {limit_ms} ms; its console ends with '{last}', see {}", console.display())]
    TimedOut {
        /// The VM.
        vm: VmName,
        /// The limit.
        limit_ms: u128,
        /// The console's last line.
        last: String,
        /// Its console.
        console: PathBuf,
    },
    /// The console cannot be read.
    #[error("cannot read the console of VM {vm}")]
    Console {
        /// The VM.
        vm: VmName,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// Why a VM did not stop.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// Not even SIGKILL ended it, so it waits inside the kernel.
    #[error(
        "process {pid} of VM {vm} does not end after SIGKILL; it waits in the kernel, look at /proc/{pid}/stack"
    )]
    StillThere {
        /// The VM.
        vm: VmName,
        /// Its process.
        pid: u32,
    },
}
