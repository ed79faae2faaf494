//! The doctor's part of the host: what is there against what should be, and the mending of it.

use std::time::Duration;

use super::base::BaseMsg;
use super::{Host, HostError, chain};
use crate::doctor::{Condition, Finding, diagnose};
use crate::plane::Scope;
use crate::stack::Step;

/// What is half-built for as long as this is nobody's work under way.
const HALF_BUILT_FOR: Duration = Duration::from_secs(2);

/// Rounds of looking for what is half-built.
const SWEEPS: u32 = 2;

impl Host {
    /// Compares the whole host with what is desired; with `fix`, mends what can be mended first, through the owner of each thing.
    /// Returns what is found then, and what could not be mended.
    ///
    /// # Errors
    /// The host cannot be looked at.
    pub async fn doctor(&self, fix: bool) -> Result<(Vec<Finding>, Vec<String>), HostError> {
        let failures = if fix { self.mend().await? } else { Vec::new() };
        let found = self.plane().inspect(&Scope::All).await?;
        let mut findings = diagnose(&self.desired().wanted(), &found);
        findings.extend(self.plane().troubles().into_iter().map(|trouble| Finding {
            condition: Condition::Damaged,
            kind: trouble.kind,
            name: trouble.name,
            why: trouble.why,
        }));
        Ok((findings, failures))
    }

    async fn mend(&self) -> Result<Vec<String>, HostError> {
        let mut failures = Vec::new();
        let mut note = |what: String, error: &dyn std::error::Error| {
            failures.push(format!("{what}: {}", chain(error)));
        };
        let applier = &self.shared.applier;
        // Twice, because a login that an agent had begun before it was killed may end while the first round waits.
        for _ in 0..SWEEPS {
            let before = self.plane().inspect(&Scope::All).await?;
            if before.leftovers.is_empty() {
                continue;
            }
            tokio::time::sleep(HALF_BUILT_FOR).await;
            let found = self.plane().inspect(&Scope::All).await?;
            for leftover in found.leftovers.intersection(&before.leftovers) {
                let sweep = Step::Sweep {
                    leftover: leftover.clone(),
                };
                if let Err(error) = applier.step(sweep).await {
                    note(leftover.clone(), &error);
                }
            }
        }
        let found = self.plane().inspect(&Scope::All).await?;
        let desired = self.desired().wanted();
        let mut digests = found.caches.clone();
        digests.extend(desired.bases.keys());
        digests.extend(found.paths.keys());
        digests.extend(found.bases.keys());
        digests.extend(found.exports.values().map(|export| export.digest));
        // Disks before the bases that they stand on are given up.
        let nobodys = found.disks.keys().chain(found.devices.keys());
        for vm in nobodys.filter(|vm| !desired.disks.contains_key(*vm)) {
            let wanted = self.desired().wanted_disk(vm);
            if let Err(error) = applier.reach(&Scope::Disk(vm.clone()), &wanted).await {
                note(format!("the disk of VM '{vm}'"), &error);
            }
        }
        for digest in digests {
            if let Err(error) = self.ask_base(digest, |reply| BaseMsg::Changed { reply }).await {
                note(format!("content {}", digest.short()), &error);
            }
        }
        for vm in desired.disks.keys().chain(&desired.doomed_disks) {
            let wanted = self.desired().wanted_disk(vm);
            if let Err(error) = applier.reach(&Scope::Disk(vm.clone()), &wanted).await {
                note(format!("the disk of VM '{vm}'"), &error);
            }
        }
        Ok(failures)
    }
}
