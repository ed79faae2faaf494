//! The doctor's part of the host: what is there against what should be, and the mending of it.
//!
//! What nobody claims is removed only when that has been so for a grace period, by the owner of its name, who looks once more.

use std::collections::BTreeSet;
use std::time::Duration;

use treeboot_types::{Digest, VmName};

use super::base::BaseMsg;
use super::vm::VmMsg;
use super::{Host, HostError, LimitLevel, chain};
use crate::doctor::{Condition, Finding, Unclaimed, diagnose};
use crate::plane::Scope;
use crate::stack::Step;

/// What is half-built for as long as this is nobody's work under way.
const HALF_BUILT_FOR: Duration = Duration::from_secs(2);

/// Rounds of looking for what is half-built.
const SWEEPS: u32 = 2;

/// Between two looks for what nobody claims: ten of them in the default grace period.
const LOOK_PERIOD: Duration = Duration::from_secs(60);

/// What a look at the whole host led to.
struct Look {
    findings: Vec<Finding>,
    /// Who did not answer, so that nothing of theirs was judged.
    silent: Vec<String>,
}

impl Host {
    /// Compares the whole host with what is desired; with `fix`, mends what can be mended first, through the owner of each thing, and
    /// removes what nobody has claimed for `grace`. Returns what is found then, and what could not be mended or not be known.
    ///
    /// # Errors
    /// The host cannot be looked at; nothing was removed then.
    pub async fn doctor(&self, fix: bool, grace: Duration) -> Result<(Vec<Finding>, Vec<String>), HostError> {
        let mut failures = if fix { self.mend(grace).await? } else { Vec::new() };
        let look = self.examine(grace, true).await?;
        failures.extend(look.silent);
        Ok((look.findings, failures))
    }

    /// Looks again and again, so that grace periods run while nobody asks.
    pub(super) async fn watch_orphans(&self) {
        loop {
            tokio::select! {
                () = self.shared.stop.cancelled() => return,
                () = tokio::time::sleep(LOOK_PERIOD) => {}
            }
            match self.examine(crate::orphans::GRACE, false).await {
                Ok(look) => {
                    let is_new = |finding: &&Finding| finding.unclaimed.is_some_and(|it| it.so_far.is_zero());
                    for finding in look.findings.iter().filter(is_new) {
                        let (kind, name, why) = (finding.kind, &finding.name, &finding.why);
                        tracing::warn!(kind, name, why, "nobody claims this; 'treeboot doctor' says more");
                    }
                }
                Err(error) => tracing::warn!(error = %chain(&error), "the host cannot be looked at"),
            }
        }
    }

    /// Everything, judged. The coordinator is asked only where `ask` says so.
    async fn examine(&self, grace: Duration, ask: bool) -> Result<Look, HostError> {
        let looked = self.look_at_all(ask).await;
        let orphans = match &looked {
            Ok(look) => {
                let of = look.findings.iter();
                let orphaned = of.filter(|finding| finding.condition == Condition::Orphaned);
                orphaned.map(Finding::key).collect()
            }
            // Nobody knows, so grace periods begin anew.
            Err(_) => BTreeSet::new(),
        };
        let now = self.uptime();
        let unsaved = {
            let mut ledger = self.shared.orphans.lock();
            ledger.look(now, &orphans, |key| !ask && key.starts_with("record "));
            ledger.unsaved(now)
        };
        if let Some((path, text)) = unsaved {
            let saved = tokio::task::spawn_blocking(move || crate::orphans::save(&path, &text)).await;
            if let Ok(Err(error)) = saved {
                tracing::warn!(%error, "since when nobody claims what is orphaned is not written down");
            }
        }
        let mut look = looked?;
        let ledger = self.shared.orphans.lock();
        for finding in &mut look.findings {
            if finding.condition == Condition::Orphaned {
                let so_far = ledger.age(now, &finding.key());
                finding.unclaimed = Some(Unclaimed {
                    so_far,
                    left: grace.saturating_sub(so_far),
                });
            }
        }
        Ok(look)
    }

    async fn look_at_all(&self, ask: bool) -> Result<Look, HostError> {
        let found = self.plane().inspect(&Scope::All).await?;
        let mut findings = diagnose(&self.desired().wanted(), &found);
        let troubles = self.plane().troubles().into_iter();
        findings.extend(troubles.map(|trouble| {
            Finding::new(Condition::Damaged, trouble.kind, trouble.name).because(trouble.why)
        }));
        for near in self.limited() {
            let is_its = |it: &&mut Finding| it.kind == "delta" && it.name == near.vm.as_str();
            if near.level() > LimitLevel::Enough
                && let Some(finding) = findings.iter_mut().find(is_its)
                && finding.condition == Condition::Used
            {
                finding.condition = Condition::Filling;
                finding.why = near.words();
            }
        }
        let mut silent = Vec::new();
        let mut doubt_all = None;
        if let Err(why) = self.look_at_remains(&mut findings).await {
            doubt_all = Some(why.clone());
            silent.push(why);
        }
        if let Some(why) = self.journal_problem().await {
            doubt_all = Some(why);
        }
        if ask {
            match self.groundless_records(&found).await {
                Ok(records) => findings.extend(records),
                Err(why) => silent.push(why),
            }
        }
        if let Some(why) = doubt_all {
            let orphaned = findings
                .iter_mut()
                .filter(|it| it.condition == Condition::Orphaned);
            orphaned.for_each(|finding| finding.doubt(format!("nobody knows whether it is claimed: {why}")));
        }
        Ok(Look { findings, silent })
    }

    async fn mend(&self, grace: Duration) -> Result<Vec<String>, HostError> {
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
        let findings = self.examine(grace, false).await?.findings;
        let due = |kinds: &'static [&'static str]| {
            let due = findings
                .iter()
                .filter(move |it| it.is_due() && kinds.contains(&it.kind));
            due.filter_map(|it| Some((it.kind, VmName::new(&it.name).ok()?)))
        };
        for (kind, vm) in due(&["run", "vm", "incoming"]) {
            if let Err(error) = self.bury(kind, &vm).await {
                note(format!("{kind} '{vm}'"), &error);
            }
        }
        // Disks before the bases that they stand on are given up.
        for (_, vm) in due(&["disk", "device"]) {
            let wanted = self.desired().wanted_disk(&vm);
            if let Err(error) = applier.reach(&Scope::Disk(vm.clone()), &wanted).await {
                note(format!("the disk of VM '{vm}'"), &error);
            }
        }
        for (kind, vm) in due(&["delta"]) {
            if let Err(error) = self.bury(kind, &vm).await {
                note(format!("{kind} '{vm}'"), &error);
            }
        }
        let desired = self.desired().wanted();
        for digest in contents_to_reach(&findings, &desired) {
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

    /// Removes what nobody claims of a VM's name.
    async fn bury(&self, kind: &'static str, vm: &VmName) -> Result<(), HostError> {
        let buried = self.ask_vm(vm, |reply| VmMsg::Bury { kind, reply }).await;
        if buried.is_ok() {
            tracing::info!(kind, %vm, "removed: nobody claimed it");
        }
        buried
    }
}

/// What is wanted, and what nobody has claimed for long enough; but not while something of it waits for the end of its grace period,
/// unless there is something to be made.
fn contents_to_reach(findings: &[Finding], wanted: &crate::stack::Wanted) -> BTreeSet<Digest> {
    let with = |condition: fn(&Finding) -> bool| -> BTreeSet<Digest> {
        let of = findings.iter().filter(|finding| condition(finding));
        of.filter_map(|finding| finding.content).collect()
    };
    let waiting = with(|it| it.condition == Condition::Orphaned && !it.is_due());
    let mut reached: BTreeSet<Digest> = wanted.bases.keys().copied().collect();
    reached.extend(with(Finding::is_due));
    reached.retain(|digest| !waiting.contains(digest));
    reached.extend(with(|it| {
        matches!(it.condition, Condition::Missing | Condition::HalfBuilt)
    }));
    reached
}
