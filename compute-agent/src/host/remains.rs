//! What VMs that nobody knows left on this host, and what the coordinator's record says of it without ground: looked for, each judged.
//!
//! An orphan is what nobody claims, and whoever could was asked and answered: the journal (which is whole, and at least as old as the
//! thing), QEMU by its monitor, the coordinator. Where one of them is silent or answers with an error the thing is *unknown*, and is
//! left alone. Deliberately absent: grace periods and removal (`mend`), and what the planner knows (`doctor`).

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use treeboot_block::layers;
use treeboot_hypervisor::{AdoptError, RunningVm, VmState};
use treeboot_types::VmName;

use super::{Host, chain};
use crate::desired::Desired;
use crate::doctor::{Condition, Finding};
use crate::journal;
use crate::stack::Found;

/// How long QEMU may take to say how it is, and the coordinator what it knows.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// What lies in this host's directories.
#[derive(Default)]
struct Lying {
    /// VMs that have a run directory, and when it was begun.
    runs: BTreeMap<VmName, Option<SystemTime>>,
    /// When what a VM wrote was last changed.
    written: BTreeMap<VmName, SystemTime>,
    /// Disks that came and that no VM has, each with its transfer where not all of it is there.
    arrivals: Vec<(VmName, Option<u64>)>,
    /// Until when the journal may have forgotten something.
    forgot: Option<SystemTime>,
}

/// Who runs on a VM's run directory.
pub(super) enum Run {
    /// Nobody.
    Over,
    /// A QEMU that answers.
    Answers(u32),
    /// It is not known, and why.
    Silent(String),
}

fn changed(path: &Path) -> std::io::Result<Option<SystemTime>> {
    match std::fs::metadata(path) {
        Ok(found) => found.modified().map(Some),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn entries(dir: &Path) -> std::io::Result<Vec<PathBuf>> {
    match std::fs::read_dir(dir) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn name_of(path: &Path) -> &str {
    path.file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default()
}

impl Lying {
    /// Looks. Blocks.
    fn look(state: &Path, deltas: &Path) -> Result<Self, String> {
        let mut found = Self::default();
        let io = |dir: &Path| {
            let dir = dir.display().to_string();
            move |error: std::io::Error| format!("{dir} cannot be looked at: {error}")
        };
        let vms = state.join("vms");
        for path in entries(&vms).map_err(io(&vms))? {
            if let Ok(vm) = VmName::new(name_of(&path)) {
                let begun = changed(&path.join(treeboot_hypervisor::SPEC_FILE)).map_err(io(&path))?;
                found.runs.insert(vm, begun);
            }
        }
        for path in entries(deltas).map_err(io(deltas))? {
            let Some((stem, _)) = name_of(&path).rsplit_once('.') else {
                continue;
            };
            let stem = stem.split_once('+').map_or(stem, |(vm, _)| vm);
            if let (Ok(vm), Some(at)) = (VmName::new(stem), changed(&path).map_err(io(&path))?) {
                let newest = found.written.entry(vm).or_insert(at);
                *newest = (*newest).max(at);
            }
        }
        found.arrivals = layers::arrivals(deltas).map_err(|error| chain(&error))?;
        found.forgot = journal::forgot(state).map_err(io(state))?;
        Ok(found)
    }
}

/// Finds out.
pub(super) async fn run_of(dir: &Path) -> Run {
    let running = match RunningVm::adopt(dir) {
        Ok(running) => running,
        Err(AdoptError::Nothing { .. } | AdoptError::NotRunning { .. }) => return Run::Over,
        Err(error) => return Run::Silent(chain(&error)),
    };
    let pid = running.pid();
    match tokio::time::timeout(ANSWER_LIMIT, running.state()).await {
        Ok(Ok(VmState::Ended)) => Run::Over,
        Ok(Ok(_)) => Run::Answers(pid),
        Ok(Err(error)) => Run::Silent(format!("QEMU (pid {pid}) runs: {}", chain(&error))),
        Err(_) => Run::Silent(format!("QEMU (pid {pid}) runs and does not answer")),
    }
}

/// Older than what the journal can know: nobody can say that nobody claims it.
fn is_before(at: Option<SystemTime>, forgot: Option<SystemTime>) -> bool {
    forgot.is_some_and(|forgot| at.is_none_or(|at| at <= forgot))
}

impl Host {
    /// What VMs left, each judged; `findings` that are deltas are judged anew.
    ///
    /// # Errors
    /// A directory cannot be looked at; nothing is known then.
    pub(super) async fn look_at_remains(&self, findings: &mut Vec<Finding>) -> Result<(), String> {
        let settings = &self.shared.settings;
        let (state, deltas) = (settings.state_dir.clone(), settings.deltas_dir.clone());
        let look = tokio::task::spawn_blocking(move || Lying::look(&state, &deltas));
        let lying = look.await.map_err(|error| error.to_string())??;
        let desired = self.desired();
        let mut busy = BTreeSet::new();
        let recorded = desired.vms.keys().filter(|vm| !desired.disks.contains_key(*vm));
        let unknown = lying.runs.keys().filter(|vm| !desired.vms.contains_key(*vm));
        let mut looked = Vec::new();
        for vm in unknown.chain(recorded) {
            let run = run_of(&self.run_dir(vm)).await;
            if !matches!(run, Run::Over) {
                busy.insert(vm.clone());
            }
            looked.push((vm, run));
        }
        // A VM that was started or destroyed while its QEMU was asked is somebody's.
        let now = self.desired();
        for (vm, run) in looked {
            let known = desired.vms.contains_key(vm);
            if known != now.vms.contains_key(vm) || known && now.disks.contains_key(vm) {
                continue;
            }
            let mut finding = judge_run(vm, known, run);
            let begun = lying.runs.get(vm).copied().flatten();
            if !known && finding.condition == Condition::Orphaned && is_before(begun, lying.forgot) {
                let dir = self.run_dir(vm);
                finding.doubt(forgotten(&format!(
                    "end its QEMU, if any, and remove {}",
                    dir.display()
                )));
            }
            findings.push(finding);
        }
        for finding in findings.iter_mut() {
            if finding.kind != "delta" || finding.condition != Condition::Orphaned {
                continue;
            }
            let Ok(vm) = VmName::new(&finding.name) else {
                continue;
            };
            if busy.contains(&vm) {
                finding.doubt("a QEMU of that name runs, which goes first");
            } else if is_before(lying.written.get(&vm).copied(), lying.forgot) {
                let dir = settings.deltas_dir.display();
                finding.doubt(forgotten(&format!("remove {dir}/{vm}.*")));
            }
        }
        findings.extend(self.unclaimed_arrivals(&now, lying.arrivals));
        Ok(())
    }

    fn unclaimed_arrivals(&self, desired: &Desired, arrivals: Vec<(VmName, Option<u64>)>) -> Vec<Finding> {
        let finding = |(vm, transfer): (VmName, Option<u64>)| {
            let claimed = self.shared.seats.claims(&vm, transfer) || desired.disks.contains_key(&vm);
            match claimed {
                true => Finding::new(Condition::Used, "incoming", vm),
                false => Finding::new(Condition::Orphaned, "incoming", vm)
                    .because(
                        "a clone that came in, wholly or by half; nobody goes on with it, and no VM has it",
                    )
                    .mended_by("deletes it"),
            }
        };
        arrivals.into_iter().map(finding).collect()
    }

    /// Records of images that name this host as an origin although it does not hold them.
    ///
    /// # Errors
    /// The coordinator does not say; then none of them is judged.
    pub(super) async fn groundless_records(&self, found: &Found) -> Result<Vec<Finding>, String> {
        if self.shared.settings.store_dir.is_none() {
            return Ok(Vec::new());
        }
        let asked = tokio::time::timeout(ANSWER_LIMIT, self.shared.link.images()).await;
        let unknown =
            |why: String| format!("it is not known whether records of images name this host in vain: {why}");
        let images = asked
            .map_err(|_| unknown("the coordinator does not answer".into()))?
            .map_err(|error| unknown(chain(&error)))?;
        let (desired, own) = (self.desired(), Some(self.shared.host()));
        let held = |image: &treeboot_types::Image| {
            let named = desired.images.get(&image.id);
            named.is_some_and(|state| state.stored.is_some() && state.content.digest == image.digest)
                || found.stores.contains(&image.digest)
                || desired.doomed_stores.contains(&image.digest)
        };
        let mut findings = Vec::new();
        for image in images {
            let is_own = |origin: &&treeboot_types::Origin| origin.host.as_ref() == own;
            let of_this_host = image.origins.iter().filter(is_own).count();
            if of_this_host == 0 || held(&image) {
                continue;
            }
            let name = image.id.to_string();
            findings.push(match of_this_host == image.origins.len() {
                true => Finding::new(Condition::Orphaned, "record", name)
                    .because("the coordinator names this host as the image's only origin, and its store does not hold it")
                    .mended_by("removes the record, unless hosts are attached to the image"),
                false => Finding::new(Condition::Damaged, "record", name).because(
                    "the coordinator names this host as an origin, and its store does not hold the image; others do: import it here \
                     again, or remove it with 'treeboot image remove'",
                ),
            });
        }
        Ok(findings)
    }

    pub(super) fn run_dir(&self, vm: &VmName) -> PathBuf {
        self.shared.settings.state_dir.join("vms").join(vm.as_str())
    }
}

fn forgotten(by_hand: &str) -> String {
    format!(
        "the journal was begun anew or mended after this was last changed and may have forgotten who claims it; if nobody does: {by_hand}"
    )
}

/// `known`: the journal has the VM, and no disk for it.
fn judge_run(vm: &VmName, known: bool, run: Run) -> Finding {
    let kind = if known { "vm" } else { "run" };
    let orphan = |why: String, fix: &str| {
        Finding::new(Condition::Orphaned, kind, vm)
            .because(why)
            .mended_by(fix)
    };
    match (run, known) {
        (Run::Over, true) => orphan(
            "the journal has the VM, but no disk for it, and no QEMU runs".into(),
            "forgets the VM and removes its run directory",
        ),
        (Run::Over, false) => orphan(
            "a QEMU's run directory; it runs no more, and the journal has no such VM".into(),
            "removes it, with the console's text",
        ),
        (Run::Answers(pid), false) => orphan(
            format!("QEMU (pid {pid}) runs, and the journal has no such VM"),
            "ends it and removes its run directory",
        ),
        (Run::Answers(pid), true) => Finding::new(Condition::Unknown, kind, vm).because(format!(
            "QEMU (pid {pid}) runs without a disk; end it with 'treeboot vm destroy {vm}'"
        )),
        (Run::Silent(why), _) => Finding::new(Condition::Unknown, kind, vm).because(format!(
            "nobody knows whether it is in use: {why}; see to it by hand"
        )),
    }
}
