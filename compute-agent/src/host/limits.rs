//! Limits of what VMs write, and the alarms before they are reached.
//!
//! A VM at its limit stands still, as one does whose host has no room left, and goes on when the limit is raised or when it discards what it
//! wrote; nothing is lost. Whoever runs it is to know before that. Deliberately absent: the counting (the plane's).

use std::collections::BTreeMap;
use std::time::Duration;

use treeboot_types::VmName;

use super::vm::VmMsg;
use super::{Host, HostError};
use crate::desired::DiskState;
use crate::plane::Verb;

/// Between two looks.
const PERIOD: Duration = Duration::from_secs(5);
/// The first alarm, in hundredths of the limit.
const HIGH: u64 = 80;
/// The second.
const CRITICAL: u64 = 95;
/// A smaller limit is a slip of the finger: a guest's boot writes more.
const LEAST_BYTES: u64 = 1 << 20;

/// How a disk is to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DiskOptions {
    /// As a block device of the host, too.
    pub device: bool,
    /// The most bytes of blocks that the VM may write; 0: no limit; `None`: as the host has it.
    pub limit_bytes: Option<u64>,
    /// The host's own limit was put in.
    settled: bool,
}

impl DiskOptions {
    /// Of these wishes.
    pub fn new(device: bool, limit_bytes: Option<u64>) -> Self {
        Self {
            device,
            limit_bytes,
            settled: false,
        }
    }

    /// What goes into the journal.
    pub(super) fn limit(self) -> Option<u64> {
        self.limit_bytes.filter(|bytes| *bytes > 0)
    }
}

/// How near a VM's writes are to their limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum LimitLevel {
    /// Far.
    Enough,
    /// Somebody should look.
    High,
    /// The VM stands still, or soon will.
    Critical,
}

/// A VM whose writes have a limit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limited {
    /// The VM.
    pub vm: VmName,
    /// Of blocks that it wrote and did not discard.
    pub data_bytes: u64,
    /// The most there may be.
    pub limit_bytes: u64,
}

impl Limited {
    /// How near it is.
    pub fn level(&self) -> LimitLevel {
        let parts = self.data_bytes.saturating_mul(100) / self.limit_bytes.max(1);
        match parts {
            CRITICAL.. => LimitLevel::Critical,
            HIGH.. => LimitLevel::High,
            _ => LimitLevel::Enough,
        }
    }
}

/// A disk that is there has the limit that it has.
pub(super) fn check_same(vm: &VmName, there: &DiskState, options: DiskOptions) -> Result<(), HostError> {
    match options.limit_bytes {
        Some(_) if !options.settled && options.limit() != there.limit_bytes => Err(HostError::Invalid(
            format!("VM '{vm}' has a disk with another limit; change it with 'treeboot vm limit {vm} SIZE'"),
        )),
        _ => Ok(()),
    }
}

impl Host {
    /// The host's own limit where none was wished for.
    ///
    /// # Errors
    /// The plane has no limits, or it is too small.
    pub(super) fn with_own_limit(&self, options: DiskOptions) -> Result<DiskOptions, HostError> {
        match options.limit_bytes {
            None => Ok(DiskOptions {
                limit_bytes: self.shared.settings.delta_limit,
                settled: true,
                ..options
            }),
            Some(bytes) => self.check_limit(bytes).map(|()| options),
        }
    }

    fn check_limit(&self, bytes: u64) -> Result<(), HostError> {
        if bytes == 0 {
            return Ok(());
        }
        self.can(Verb::Limit)?;
        match bytes < LEAST_BYTES {
            true => Err(HostError::Invalid(format!(
                "a limit of {bytes} bytes is less than a guest writes when it boots; give {LEAST_BYTES} or more, or 0 for none"
            ))),
            false => Ok(()),
        }
    }

    /// Limits what a VM writes, counted in blocks that it wrote and did not discard; 0: no limit. One that is below what is there
    /// lets the VM change what is there, and write no more.
    ///
    /// # Errors
    /// There is no such VM, the plane has no limits, or it is too small.
    pub async fn limit(&self, vm: &VmName, bytes: u64) -> Result<(), HostError> {
        self.known(vm)?;
        self.check_limit(bytes)?;
        let bytes = Some(bytes).filter(|bytes| *bytes > 0);
        self.ask_vm(vm, |reply| VmMsg::Limit { bytes, reply }).await
    }

    /// VMs whose writes have a limit, and how near they are.
    pub fn limited(&self) -> Vec<Limited> {
        let desired = self.desired();
        let limited = desired.disks.iter().filter_map(|(vm, disk)| {
            Some(Limited {
                vm: vm.clone(),
                limit_bytes: disk.limit_bytes.filter(|_| !disk.doomed)?,
                data_bytes: self.plane().disk_stats(vm)?.data_bytes,
            })
        });
        limited.collect()
    }

    /// Logs whenever a VM comes nearer to its limit, and when it has room again.
    pub(super) async fn watch_limits(&self) {
        let mut levels = BTreeMap::new();
        loop {
            let mut now = BTreeMap::new();
            for it in self.limited() {
                let before = levels.get(&it.vm).copied().unwrap_or(LimitLevel::Enough);
                it.tell(before);
                now.insert(it.vm.clone(), it.level());
            }
            levels = now;
            tokio::select! {
                () = self.shared.stop.cancelled() => return,
                () = tokio::time::sleep(PERIOD) => {}
            }
        }
    }
}

impl Limited {
    /// For a person.
    pub(super) fn words(&self) -> String {
        format!(
            "{} of the {} MiB that the VM may write are written, and it stands still where it wants more; raise its limit ('treeboot vm limit {} SIZE'), \
             or have it discard what it needs no more",
            self.data_bytes >> 20,
            self.limit_bytes >> 20,
            self.vm,
        )
    }

    /// A line in the log where the level is another than before.
    fn tell(&self, before: LimitLevel) {
        let Self {
            vm,
            data_bytes,
            limit_bytes,
        } = self;
        match self.level() {
            level if level == before => {}
            LimitLevel::Enough => tracing::info!(%vm, data_bytes, limit_bytes, "the VM may write again"),
            LimitLevel::High => tracing::warn!(
                %vm, data_bytes, limit_bytes,
                "the VM has written most of what it may; raise its limit with 'treeboot vm limit', or have it discard what it needs no more"
            ),
            LimitLevel::Critical => tracing::error!(
                %vm, data_bytes, limit_bytes,
                "the VM has written almost all that it may, and stands still where it wants more; raise its limit with 'treeboot vm limit', or \
                 have it discard what it needs no more"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alarms_come_at_four_fifths_and_at_nineteen_twentieths_of_a_limit() {
        for (data_bytes, level) in [
            (0, LimitLevel::Enough),
            (799, LimitLevel::Enough),
            (800, LimitLevel::High),
            (949, LimitLevel::High),
            (950, LimitLevel::Critical),
            (u64::MAX, LimitLevel::Critical),
        ] {
            let limited = Limited {
                vm: VmName::new("vm").unwrap(),
                data_bytes,
                limit_bytes: 1000,
            };
            assert_eq!(limited.level(), level, "{data_bytes}");
        }
    }
}
