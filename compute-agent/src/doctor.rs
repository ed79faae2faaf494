//! What a host holds against what it should hold, for a person: one finding a thing, and its condition.
//!
//! Pure. Whatever is not treeboot's is never seen by a plane's look, so it cannot be named here.

use std::time::Duration;

use treeboot_types::Digest;

use crate::stack::{Found, FoundDelta, FoundDevice, Wanted};

/// How a thing is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Condition {
    /// There, and wanted.
    Used,
    /// There, and kept for the next time.
    Kept,
    /// There, and wanted, and nearly as full as it may be; a person should see to it.
    Filling,
    /// There, and nobody claims it; mending removes it when that has been so for a while.
    Orphaned,
    /// There, and nobody knows whether it is claimed; a person must see to it.
    Unknown,
    /// Made or removed by half; mending removes it.
    HalfBuilt,
    /// Wanted, and not there; mending makes it.
    Missing,
    /// There, and of no use; a person must see to it.
    Damaged,
}

impl Condition {
    /// Whether mending does something about it.
    pub fn is_mended(self) -> bool {
        matches!(self, Self::Orphaned | Self::HalfBuilt | Self::Missing)
    }

    /// A word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Used => "used",
            Self::Kept => "kept",
            Self::Filling => "filling",
            Self::Orphaned => "orphaned",
            Self::Unknown => "unknown",
            Self::HalfBuilt => "half-built",
            Self::Missing => "missing",
            Self::Damaged => "damaged",
        }
    }
}

/// For how long nobody has claimed a thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Unclaimed {
    /// As far as the agent saw.
    pub so_far: Duration,
    /// Until mending removes it.
    pub left: Duration,
}

/// A thing of ours.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// How it is.
    pub condition: Condition,
    /// What kind of thing it is.
    pub kind: &'static str,
    /// Which.
    pub name: String,
    /// Why, where the condition does not say all: of what nobody claims, what it is and why nobody does.
    pub why: String,
    /// What mending does with it; empty where it does nothing.
    pub fix: String,
    /// Of what is orphaned.
    pub unclaimed: Option<Unclaimed>,
    /// The content that it belongs to, where it is a part of a base.
    pub content: Option<Digest>,
}

impl Finding {
    /// Nothing more is to be said of it.
    pub fn new(condition: Condition, kind: &'static str, name: impl ToString) -> Self {
        Self {
            condition,
            kind,
            name: name.to_string(),
            why: String::new(),
            fix: String::new(),
            unclaimed: None,
            content: None,
        }
    }

    /// With the reason.
    pub fn because(mut self, why: impl Into<String>) -> Self {
        self.why = why.into();
        self
    }

    /// What is to become of it.
    pub fn mended_by(mut self, fix: impl Into<String>) -> Self {
        self.fix = fix.into();
        self
    }

    fn of(mut self, content: Digest) -> Self {
        self.content = Some(content);
        self
    }

    /// What it is remembered by.
    pub fn key(&self) -> String {
        format!("{} {}", self.kind, self.name)
    }

    /// Nobody knows after all whether it is claimed.
    pub fn doubt(&mut self, why: impl Into<String>) {
        self.condition = Condition::Unknown;
        self.why = why.into();
        self.fix.clear();
        self.unclaimed = None;
    }

    /// It is nobody's, and the grace period is over.
    pub fn is_due(&self) -> bool {
        self.condition == Condition::Orphaned && self.unclaimed.is_some_and(|it| it.left.is_zero())
    }
}

/// What nobody claims of this kind, and what is done with it.
fn orphan(kind: &'static str, name: String) -> Finding {
    let (why, fix) = match kind {
        "paths" => (
            "sessions to parents of a content that no image here uses",
            "ends them",
        ),
        "base" => ("open, and no image here uses it", "closes it"),
        "export" => ("exported, and the journal has no such image", "ends the export"),
        "cache" => (
            "kept of a content that no image here uses, and not for the next time",
            "deletes it; it would be fetched again",
        ),
        "disk" => (
            "served, and the journal has no such VM",
            "ends serving it; its writes stay",
        ),
        "device" => ("there, and the journal has no such VM", "takes it away"),
        _ => (
            "what a VM wrote, and the journal has no such VM",
            "deletes it for good",
        ),
    };
    Finding::new(Condition::Orphaned, kind, name)
        .because(why)
        .mended_by(fix)
}

/// Everything of ours on a host, and what is missing. Whatever is orphaned has its grace period yet to be compared.
pub fn diagnose(wanted: &Wanted, found: &Found) -> Vec<Finding> {
    let mut findings = Vec::new();
    let used = |used: bool, kind, name: String| match used {
        true => Finding::new(Condition::Used, kind, name),
        false => orphan(kind, name),
    };
    let missing = |kind, name: String| Finding::new(Condition::Missing, kind, name);
    for digest in found.paths.keys() {
        let base = wanted.bases.get(digest);
        let is_used = base.is_some_and(|base| !base.sources.stripes.is_empty());
        findings.push(used(is_used, "paths", digest.to_string()).of(*digest));
    }
    for digest in found.bases.keys() {
        let is_used = wanted.bases.contains_key(digest);
        findings.push(used(is_used, "base", digest.to_string()).of(*digest));
    }
    for digest in wanted
        .bases
        .keys()
        .filter(|digest| !found.bases.contains_key(*digest))
    {
        findings.push(missing("base", digest.to_string()).of(*digest));
    }
    let exported = |image| wanted.bases.values().any(|base| base.exports.contains_key(image));
    for (image, export) in &found.exports {
        findings.push(used(exported(image), "export", image.to_string()).of(export.digest));
    }
    for (digest, base) in &wanted.bases {
        let absent = base
            .exports
            .keys()
            .filter(|image| !found.exports.contains_key(*image));
        findings.extend(absent.map(|image| missing("export", image.to_string()).of(*digest)));
    }
    for digest in &found.caches {
        let base = wanted.bases.get(digest);
        let finding = match base.is_some_and(|base| !base.backing.in_store()) {
            false if wanted.kept_caches.contains(digest) => {
                Finding::new(Condition::Kept, "cache", digest.to_string())
            }
            is_used => used(is_used, "cache", digest.to_string()),
        };
        findings.push(finding.of(*digest));
    }
    for digest in &found.stores {
        let base = wanted.bases.get(digest);
        let name = digest.to_string();
        let finding = match base.is_some_and(|base| base.backing.in_store()) {
            true => Finding::new(Condition::Used, "store", name),
            false if wanted.doomed_stores.contains(digest) => going("store", name),
            false => Finding::new(Condition::Unknown, "store", name)
                .because("no name of an image holds it; only a person may remove it"),
        };
        findings.push(finding.of(*digest));
    }
    for vm in found.disks.keys() {
        findings.push(used(wanted.disks.contains_key(vm), "disk", vm.to_string()));
    }
    for vm in wanted.disks.keys().filter(|vm| !found.disks.contains_key(*vm)) {
        findings.push(missing("disk", vm.to_string()));
    }
    for (vm, device) in &found.devices {
        findings.push(match (wanted.devices.contains(vm), device) {
            (false, _) => orphan("device", vm.to_string()),
            (true, FoundDevice::Whole) => Finding::new(Condition::Used, "device", vm.to_string()),
            (true, FoundDevice::Parts) => Finding::new(Condition::HalfBuilt, "device", vm.to_string()),
        });
    }
    for vm in wanted
        .devices
        .iter()
        .filter(|vm| !found.devices.contains_key(*vm))
    {
        findings.push(missing("device", vm.to_string()));
    }
    for leftover in &found.leftovers {
        findings.push(Finding::new(Condition::HalfBuilt, "leftover", leftover.clone()));
    }
    for (vm, delta) in &found.deltas {
        let name = vm.to_string();
        findings.push(match delta {
            FoundDelta::Damaged(why) => Finding::new(Condition::Damaged, "delta", name).because(why.clone()),
            _ if wanted.disks.contains_key(vm) => Finding::new(Condition::Used, "delta", name),
            _ if wanted.doomed_disks.contains(vm) => going("delta", name),
            _ if wanted.resting_disks.contains(vm) => Finding::new(Condition::Kept, "delta", name)
                .because("the VM is on its way between hosts; 'treeboot vm list' says how far"),
            _ => orphan("delta", name),
        });
    }
    findings
}

/// Its removal was begun; nobody has to wait for its end.
fn going(kind: &'static str, name: String) -> Finding {
    Finding::new(Condition::HalfBuilt, kind, name).because("its removal was begun")
}

#[cfg(test)]
mod tests {
    use treeboot_types::VmName;

    use super::*;
    use crate::stack::{Access, Backing, Content, FoundBase, FoundExport, Sources, WantedBase, WantedDisk};

    fn digest(n: u8) -> Digest {
        Digest([n; 32])
    }

    fn content(n: u8) -> Content {
        Content {
            digest: digest(n),
            bytes: 4096,
            chunk_bytes: 4096,
        }
    }

    #[test]
    fn each_thing_is_used_orphaned_half_built_or_missing() {
        let vm = |name: &str| VmName::new(name).unwrap();
        let disk = WantedDisk {
            digest: digest(1),
            bytes: 4096,
        };
        let base = |n| FoundBase {
            content: content(n),
            backing: Backing::Cache,
        };
        let wanted = Wanted {
            bases: [(
                digest(1),
                WantedBase {
                    content: content(1),
                    backing: Backing::Cache,
                    sources: Sources::default(),
                    exports: [("a@1".parse().unwrap(), Access::Anyone)].into(),
                },
            )]
            .into(),
            disks: [(vm("here"), disk), (vm("gone"), disk)].into(),
            ..Wanted::default()
        };
        let found = Found {
            bases: [(digest(1), base(1)), (digest(2), base(2))].into(),
            exports: [(
                "b@1".parse().unwrap(),
                FoundExport {
                    digest: digest(2),
                    access: Access::Anyone,
                },
            )]
            .into(),
            disks: [(vm("here"), digest(1))].into(),
            deltas: [
                (vm("here"), FoundDelta::Sound(disk)),
                (vm("stranger"), FoundDelta::Unopened),
            ]
            .into(),
            leftovers: ["stack:x".to_owned()].into(),
            ..Found::default()
        };
        let seen: Vec<_> = diagnose(&wanted, &found)
            .into_iter()
            .map(|finding| {
                format!(
                    "{} {} {}",
                    finding.condition.name(),
                    finding.kind,
                    &finding.name[..3]
                )
            })
            .collect();
        assert_eq!(
            seen,
            [
                "used base 010",
                "orphaned base 020",
                "orphaned export b@1",
                "missing export a@1",
                "used disk her",
                "missing disk gon",
                "half-built leftover sta",
                "used delta her",
                "orphaned delta str",
            ]
        );
    }
}
