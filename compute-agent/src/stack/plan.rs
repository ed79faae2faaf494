//! Wanted and found to steps.

use std::collections::BTreeSet;

use treeboot_types::{Digest, ImageId, VmName};

use super::{Access, Found, FoundDelta, FoundDevice, Step, Wanted, WantedDisk};
use crate::planted::{Bug, planted};

/// What a plan cannot reach, and why; nothing of it was touched.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Obstacle {
    /// The VM's delta cannot be read.
    #[error("the delta of VM '{vm}' is damaged: {why}")]
    DeltaDamaged {
        /// The VM.
        vm: VmName,
        /// What is wrong.
        why: String,
    },
    /// The delta was made on another base or with another size.
    #[error(
        "the delta of VM '{vm}' was made on content {} with {} bytes, not on {} with {}; destroy the VM or use that image",
        found.digest.short(), found.bytes, wanted.digest.short(), wanted.bytes
    )]
    DeltaOfOther {
        /// The VM.
        vm: VmName,
        /// What the delta says.
        found: WantedDisk,
        /// What was asked for.
        wanted: WantedDisk,
    },
    /// The base under a disk is not among the wanted ones.
    #[error("VM '{vm}' stands on content {}, which is not attached", digest.short())]
    NoBase {
        /// The VM.
        vm: VmName,
        /// The base that is missing.
        digest: Digest,
    },
    /// The image should be in the store and is not.
    #[error("the store does not hold content {}; import the image again", digest.short())]
    StoreMissing {
        /// The content.
        digest: Digest,
    },
}

/// Steps in the order in which they are to be applied, and what they will not reach.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// The steps.
    pub steps: Vec<Step>,
    /// What stays undone.
    pub obstacles: Vec<Obstacle>,
}

/// The steps from `found` to `wanted`: first removals from the top down, then what is built, from the bottom up.
pub fn plan(wanted: &Wanted, found: &Found) -> Plan {
    let mut planner = Planner {
        wanted,
        found,
        plan: Plan::default(),
        disks_down: BTreeSet::new(),
        exports_down: BTreeSet::new(),
        bases_down: BTreeSet::new(),
        lost: BTreeSet::new(),
    };
    planner.choose();
    planner.remove();
    planner.build_bases();
    planner.build_disks();
    planner.plan
}

struct Planner<'a> {
    wanted: &'a Wanted,
    found: &'a Found,
    plan: Plan,
    disks_down: BTreeSet<VmName>,
    exports_down: BTreeSet<ImageId>,
    bases_down: BTreeSet<Digest>,
    /// Bases that cannot be opened.
    lost: BTreeSet<Digest>,
}

impl Planner<'_> {
    /// What has to go. A base that is open in another shape takes down all that stands on it; that is built
    /// again afterwards.
    fn choose(&mut self) {
        for (digest, base) in &self.wanted.bases {
            if base.backing.in_store() && !self.found.stores.contains(digest) {
                self.lost.insert(*digest);
                self.plan
                    .obstacles
                    .push(Obstacle::StoreMissing { digest: *digest });
            }
        }
        for (digest, base) in &self.found.bases {
            let stays = self
                .wanted
                .bases
                .get(digest)
                .is_some_and(|w| w.content == base.content && w.backing == base.backing);
            if !stays {
                self.bases_down.insert(*digest);
            }
        }
        for (image, export) in &self.found.exports {
            let stays = self
                .wanted
                .bases
                .get(&export.digest)
                .is_some_and(|w| w.exports.contains_key(image));
            if !stays || self.bases_down.contains(&export.digest) {
                self.exports_down.insert(image.clone());
            }
        }
        for (vm, digest) in &self.found.disks {
            let stays = self.wanted.disks.get(vm).is_some_and(|w| w.digest == *digest)
                && self.has_base(digest)
                && self.found.deltas.contains_key(vm);
            if !stays || self.bases_down.contains(digest) {
                self.disks_down.insert(vm.clone());
            }
        }
    }

    fn has_base(&self, digest: &Digest) -> bool {
        self.wanted.bases.contains_key(digest) || self.wanted.standing.contains(digest)
    }

    fn remove(&mut self) {
        let (wanted, found) = (self.wanted, self.found);
        let steps = &mut self.plan.steps;
        steps.extend(found.leftovers.iter().map(|leftover| Step::Sweep {
            leftover: leftover.clone(),
        }));
        // A device in parts is not taken away where it is wanted: somebody's I/O may wait in it.
        let goes = |vm: &VmName, device: FoundDevice| {
            !(wanted.devices.contains(vm) && wanted.disks.contains_key(vm))
                || device == FoundDevice::Whole && self.disks_down.contains(vm)
        };
        steps.extend(
            found
                .devices
                .iter()
                .filter(|(vm, device)| goes(vm, **device))
                .map(|(vm, _)| Step::DetachDevice { vm: vm.clone() }),
        );
        steps.extend(self.disks_down.iter().map(|vm| Step::StopDisk { vm: vm.clone() }));
        for vm in &wanted.doomed_disks {
            if found.deltas.contains_key(vm) && !wanted.disks.contains_key(vm) {
                steps.push(Step::DeleteDelta { vm: vm.clone() });
            }
        }
        steps.extend(
            self.exports_down
                .iter()
                .map(|image| Step::Unexport { image: image.clone() }),
        );
        steps.extend(self.bases_down.iter().map(|&digest| Step::CloseBase { digest }));
        for &digest in found.paths.keys() {
            if wanted
                .bases
                .get(&digest)
                .is_none_or(|w| w.sources.stripes.is_empty())
            {
                steps.push(Step::DropPaths { digest });
            }
        }
        for &digest in &found.caches {
            let used = wanted.bases.get(&digest).is_some_and(|w| !w.backing.in_store());
            if !used && !wanted.kept_caches.contains(&digest) {
                steps.push(Step::DropCache { digest });
            }
        }
        for &digest in &wanted.doomed_stores {
            let used = wanted.bases.get(&digest).is_some_and(|w| w.backing.in_store());
            if found.stores.contains(&digest) && !used {
                steps.push(Step::DropStore { digest });
            }
        }
    }

    fn build_bases(&mut self) {
        for (digest, base) in &self.wanted.bases {
            if self.lost.contains(digest) {
                continue;
            }
            let open = self.found.bases.contains_key(digest) && !self.bases_down.contains(digest);
            let repath =
                !base.sources.stripes.is_empty() && self.found.paths.get(digest) != Some(&base.sources);
            let mut accesses = Vec::new();
            for (image, access) in &base.exports {
                let present = self
                    .found
                    .exports
                    .get(image)
                    .filter(|_| !self.exports_down.contains(image));
                match present {
                    None => accesses.push(Step::Export {
                        image: image.clone(),
                        digest: *digest,
                        access: access.clone(),
                    }),
                    Some(export) if export.access != *access => {
                        // Children of the old place go before the new parents come: for a moment the host may
                        // know its new parents while one of its children is among them, and that would be a
                        // cycle.
                        let narrowed = export.access.narrowed_to(access);
                        if planted(Bug::ChildrenNotSet) {
                            continue;
                        }
                        if repath && narrowed != export.access && !planted(Bug::ParentsBeforeChildrenGo) {
                            self.plan.steps.push(set_access(image, &narrowed));
                        }
                        if !repath || narrowed != *access || planted(Bug::ParentsBeforeChildrenGo) {
                            accesses.push(set_access(image, access));
                        }
                    }
                    Some(_) => {}
                }
            }
            if repath {
                self.plan.steps.push(Step::SetPaths {
                    digest: *digest,
                    sources: base.sources.clone(),
                });
            }
            if !open {
                self.plan.steps.push(Step::OpenBase {
                    content: base.content,
                    backing: base.backing,
                });
            }
            self.plan.steps.append(&mut accesses);
        }
    }

    fn build_disks(&mut self) {
        for (vm, disk) in &self.wanted.disks {
            let served = self.found.disks.contains_key(vm) && !self.disks_down.contains(vm);
            if !self.has_base(&disk.digest) || self.lost.contains(&disk.digest) {
                self.plan.obstacles.push(Obstacle::NoBase {
                    vm: vm.clone(),
                    digest: disk.digest,
                });
                continue;
            }
            match self.found.deltas.get(vm) {
                Some(FoundDelta::Damaged(why)) => self.plan.obstacles.push(Obstacle::DeltaDamaged {
                    vm: vm.clone(),
                    why: why.clone(),
                }),
                Some(FoundDelta::Sound(found)) if found != disk => {
                    self.plan.obstacles.push(Obstacle::DeltaOfOther {
                        vm: vm.clone(),
                        found: *found,
                        wanted: *disk,
                    });
                }
                delta => {
                    if delta.is_none() {
                        self.plan.steps.push(Step::CreateDelta {
                            vm: vm.clone(),
                            disk: *disk,
                        });
                    }
                    // Before it is served, so that no write slips past it.
                    let limit = self
                        .found
                        .limits
                        .get(vm)
                        .filter(|_| !self.disks_down.contains(vm));
                    if self.wanted.limits.get(vm) != limit {
                        self.plan.steps.push(Step::LimitDisk {
                            vm: vm.clone(),
                            bytes: self.wanted.limits.get(vm).copied(),
                        });
                    }
                    if !served {
                        self.plan.steps.push(Step::ServeDisk {
                            vm: vm.clone(),
                            disk: *disk,
                        });
                    }
                    let works = self.found.devices.get(vm) == Some(&FoundDevice::Whole) && served;
                    if self.wanted.devices.contains(vm) && !works {
                        self.plan.steps.push(Step::AttachDevice { vm: vm.clone() });
                    }
                }
            }
        }
    }
}

fn set_access(image: &ImageId, access: &Access) -> Step {
    Step::SetAccess {
        image: image.clone(),
        access: access.clone(),
    }
}
