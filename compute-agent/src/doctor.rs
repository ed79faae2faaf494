//! What a host holds against what it should hold, for a person: one finding a thing, and its condition.
//!
//! Pure. Whatever is not treeboot's is never seen by a plane's look, so it cannot be named here.

use crate::stack::{Found, FoundDelta, FoundDevice, Wanted};

/// How a thing is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Condition {
    /// There, and wanted.
    Used,
    /// There, and kept for the next time.
    Kept,
    /// There, and nobody wants it; mending removes it.
    Orphaned,
    /// There, and nobody knows whether it is wanted; a person must remove it.
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
            Self::Orphaned => "orphaned",
            Self::Unknown => "unknown",
            Self::HalfBuilt => "half-built",
            Self::Missing => "missing",
            Self::Damaged => "damaged",
        }
    }
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
    /// Why, where the condition does not say all.
    pub why: String,
}

/// Everything of ours on a host, and what is missing.
pub fn diagnose(wanted: &Wanted, found: &Found) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut add = |kind, name: String, condition| {
        findings.push(Finding {
            condition,
            kind,
            name,
            why: String::new(),
        });
    };
    let used = |used: bool| {
        if used {
            Condition::Used
        } else {
            Condition::Orphaned
        }
    };
    for digest in found.paths.keys() {
        let base = wanted.bases.get(digest);
        let is_used = base.is_some_and(|base| !base.sources.stripes.is_empty());
        add("paths", digest.to_string(), used(is_used));
    }
    for digest in found.bases.keys() {
        add(
            "base",
            digest.to_string(),
            used(wanted.bases.contains_key(digest)),
        );
    }
    for digest in wanted
        .bases
        .keys()
        .filter(|digest| !found.bases.contains_key(*digest))
    {
        add("base", digest.to_string(), Condition::Missing);
    }
    let exported = |image| wanted.bases.values().any(|base| base.exports.contains_key(image));
    for image in found.exports.keys() {
        add("export", image.to_string(), used(exported(image)));
    }
    for image in wanted.bases.values().flat_map(|base| base.exports.keys()) {
        if !found.exports.contains_key(image) {
            add("export", image.to_string(), Condition::Missing);
        }
    }
    for digest in &found.caches {
        let base = wanted.bases.get(digest);
        let condition = match base.is_some_and(|base| !base.backing.in_store()) {
            true => Condition::Used,
            false if wanted.kept_caches.contains(digest) => Condition::Kept,
            false => Condition::Orphaned,
        };
        add("cache", digest.to_string(), condition);
    }
    for digest in &found.stores {
        let condition = match wanted
            .bases
            .get(digest)
            .is_some_and(|base| base.backing.in_store())
        {
            true => Condition::Used,
            false if wanted.doomed_stores.contains(digest) => Condition::Orphaned,
            false => Condition::Unknown,
        };
        add("store", digest.to_string(), condition);
    }
    for vm in found.disks.keys() {
        add("disk", vm.to_string(), used(wanted.disks.contains_key(vm)));
    }
    for vm in wanted.disks.keys().filter(|vm| !found.disks.contains_key(*vm)) {
        add("disk", vm.to_string(), Condition::Missing);
    }
    for (vm, device) in &found.devices {
        let condition = match (wanted.devices.contains(vm), device) {
            (false, _) => Condition::Orphaned,
            (true, FoundDevice::Whole) => Condition::Used,
            (true, FoundDevice::Parts) => Condition::HalfBuilt,
        };
        add("device", vm.to_string(), condition);
    }
    for vm in wanted
        .devices
        .iter()
        .filter(|vm| !found.devices.contains_key(*vm))
    {
        add("device", vm.to_string(), Condition::Missing);
    }
    for leftover in &found.leftovers {
        add("leftover", leftover.clone(), Condition::HalfBuilt);
    }
    for (vm, delta) in &found.deltas {
        let (condition, why) = match delta {
            FoundDelta::Damaged(why) => (Condition::Damaged, why.clone()),
            _ if wanted.disks.contains_key(vm) => (Condition::Used, String::new()),
            _ if wanted.doomed_disks.contains(vm) => (Condition::Orphaned, String::new()),
            _ => (
                Condition::Unknown,
                "the journal does not know this VM; its writes are left alone".into(),
            ),
        };
        findings.push(Finding {
            condition,
            kind: "delta",
            name: vm.to_string(),
            why,
        });
    }
    findings
}

#[cfg(test)]
mod tests {
    use treeboot_types::{Digest, VmName};

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
                "unknown delta str",
            ]
        );
    }
}
