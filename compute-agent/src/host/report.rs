//! What is asked of a VM's run, and how it is told.

use std::sync::Arc;
use std::time::Duration;

use treeboot_hypervisor::{BlockStats, Readiness, RunningVm, Seed};
use treeboot_types::{ImageId, ImageRef, VmName};

/// How long QEMU may take to tell its counters.
pub(super) const STATS_LIMIT: Duration = Duration::from_millis(500);
/// How long a guest may take to be ready, unless the request says otherwise: a Debian under translation on a busy
/// machine takes minutes.
pub const READY_LIMIT: Duration = Duration::from_secs(600);
/// Guest memory in MiB, unless the request says otherwise.
pub const MEMORY_MIB: u32 = 512;

/// How a VM is to be started.
#[derive(Debug, Clone)]
pub struct StartRequest {
    /// What its disk is made of where it has none.
    pub image: Option<ImageRef>,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Processors.
    pub cpus: u32,
    /// How readiness is seen.
    pub ready: Readiness,
    /// How long it may take.
    pub ready_limit: Duration,
    /// What a first boot learns.
    pub seed: Seed,
}

/// How a VM's run goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmRun {
    /// No run is known.
    Absent,
    /// Not ready yet.
    Starting,
    /// Seen from outside to be up.
    Ready,
    /// It ended as it was meant to.
    Stopped,
    /// It ended otherwise, or was not ready in time.
    Failed(String),
}

/// A VM as others see it.
#[derive(Debug, Clone)]
pub struct VmReport {
    /// Its name.
    pub name: VmName,
    /// What its disk was made of.
    pub image: Option<ImageId>,
    /// How its run goes.
    pub run: VmRun,
    /// From the request to its being ready, in microseconds; 0 before.
    pub ready_us: u64,
    /// kvm or tcg.
    pub acceleration: &'static str,
    /// QEMU's counters of the disk: the last ones known.
    pub stats: BlockStats,
    /// QEMU, while it runs; also its paths.
    pub running: Option<Arc<RunningVm>>,
}

impl VmReport {
    pub(super) fn absent(name: VmName) -> Self {
        Self {
            name,
            image: None,
            run: VmRun::Absent,
            ready_us: 0,
            acceleration: "",
            stats: BlockStats::default(),
            running: None,
        }
    }

    /// With QEMU's counters of this moment, where it tells them in time.
    pub async fn with_stats(mut self) -> Self {
        if let Some(running) = &self.running
            && let Ok(Ok(stats)) = tokio::time::timeout(STATS_LIMIT, running.block_stats()).await
        {
            self.stats = stats;
        }
        self
    }
}
