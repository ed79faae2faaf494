//! A host as a value, with the rules that every plane has: the oracle of the planner's tests, and the state of
//! the model plane.

use treeboot_types::{Digest, ImageId, VmName};

use super::{Backing, Found, FoundBase, FoundDelta, FoundDevice, FoundExport, Step};

/// A step that no plane could carry out where it stands: a bug of the planner.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Something that still stands on it.
    #[error("{step} of {what} while {user} stands on it")]
    InUse {
        /// The step.
        step: &'static str,
        /// What it would remove.
        what: String,
        /// Who uses it.
        user: String,
    },
    /// What it stands on is not there.
    #[error("{step} of {what} without {missing}")]
    Missing {
        /// The step.
        step: &'static str,
        /// What it would build.
        what: String,
        /// What is not there.
        missing: String,
    },
    /// It is there in another shape.
    #[error("{step} of {what}, which is there in another shape")]
    Differs {
        /// The step.
        step: &'static str,
        /// What it would build.
        what: String,
    },
}

/// What a host holds, changed by steps.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct World {
    /// As `inspect` would see it.
    pub found: Found,
}

impl World {
    /// Carries out one step.
    ///
    /// # Errors
    /// [`Violation`] where the step breaks a rule of the layers; nothing changed then.
    pub fn apply(&mut self, step: &Step) -> Result<(), Violation> {
        let found = &mut self.found;
        match step {
            Step::Sweep { leftover } => {
                found.leftovers.remove(leftover);
            }
            Step::DetachDevice { vm } => {
                found.devices.remove(vm);
            }
            Step::AttachDevice { vm } => {
                if !found.disks.contains_key(vm) {
                    return Err(missing(step, vm, &"its disk"));
                }
                found.devices.insert(vm.clone(), FoundDevice::Whole);
            }
            Step::StopDisk { vm } => {
                if found.devices.get(vm) == Some(&FoundDevice::Whole) {
                    return Err(in_use(step, vm, &"its device"));
                }
                found.disks.remove(vm);
                found.limits.remove(vm);
            }
            Step::LimitDisk { vm, bytes } => {
                match bytes {
                    Some(bytes) => found.limits.insert(vm.clone(), *bytes),
                    None => found.limits.remove(vm),
                };
            }
            Step::DeleteDelta { vm } => {
                if found.disks.contains_key(vm) {
                    return Err(in_use(step, vm, &format!("the disk of {vm}")));
                }
                found.deltas.remove(vm);
                found.limits.remove(vm);
            }
            Step::Unexport { image } => {
                found.exports.remove(image);
            }
            Step::CloseBase { digest } => {
                self.unused(step, digest)?;
                self.found.bases.remove(digest);
            }
            Step::DropPaths { digest } => {
                // An open base with a whole store behind it needs no path.
                found.paths.remove(digest);
            }
            Step::DropCache { digest } => {
                if found.bases.get(digest).is_some_and(|b| !b.backing.in_store()) {
                    return Err(in_use(step, digest, &"its base"));
                }
                found.caches.remove(digest);
            }
            Step::DropStore { digest } => {
                if found.bases.get(digest).is_some_and(|b| b.backing.in_store()) {
                    return Err(in_use(step, digest, &"its base"));
                }
                found.stores.remove(digest);
            }
            Step::SetPaths { digest, sources } => {
                found.paths.insert(*digest, sources.clone());
            }
            Step::OpenBase { content, backing } => {
                let digest = content.digest;
                if *backing == Backing::Cache && !found.paths.contains_key(&digest) {
                    return Err(missing(step, &digest, &"paths"));
                }
                if backing.in_store() && !found.stores.contains(&digest) {
                    return Err(missing(step, &digest, &"its store"));
                }
                let base = FoundBase {
                    content: *content,
                    backing: *backing,
                };
                match found.bases.get(&digest) {
                    Some(open) if *open != base => return Err(differs(step, &digest)),
                    Some(_) => {}
                    None => {
                        found.bases.insert(digest, base);
                    }
                }
                if *backing == Backing::Cache {
                    found.caches.insert(digest);
                }
            }
            Step::Export {
                image,
                digest,
                access,
            } => self.export(step, image, digest, access)?,
            Step::SetAccess { image, access } => match found.exports.get_mut(image) {
                Some(export) => export.access = access.clone(),
                None => return Err(missing(step, image, &"the export")),
            },
            Step::CreateDelta { vm, disk } => match found.deltas.get(vm) {
                Some(FoundDelta::Sound(there)) if there == disk => {}
                Some(FoundDelta::Unopened) => {}
                Some(_) => return Err(differs(step, vm)),
                None if found.disks.contains_key(vm) => return Err(in_use(step, vm, &"its disk")),
                None => {
                    found.deltas.insert(vm.clone(), FoundDelta::Sound(*disk));
                }
            },
            Step::ServeDisk { vm, disk } => {
                if !found.bases.contains_key(&disk.digest) {
                    return Err(missing(step, vm, &"its base"));
                }
                match found.deltas.get(vm) {
                    Some(FoundDelta::Sound(there)) if there == disk => {}
                    Some(FoundDelta::Unopened) => {
                        found.deltas.insert(vm.clone(), FoundDelta::Sound(*disk));
                    }
                    _ => return Err(missing(step, vm, &"its delta")),
                }
                match found.disks.get(vm) {
                    Some(digest) if *digest != disk.digest => return Err(differs(step, vm)),
                    _ => {
                        found.disks.insert(vm.clone(), disk.digest);
                    }
                }
            }
            Step::Layers { vm, .. } => {
                if !found.disks.contains_key(vm) {
                    return Err(missing(step, vm, &"its disk"));
                }
            }
        }
        Ok(())
    }

    fn export(
        &mut self,
        step: &Step,
        image: &ImageId,
        digest: &Digest,
        access: &super::Access,
    ) -> Result<(), Violation> {
        if !self.found.bases.contains_key(digest) {
            return Err(missing(step, image, &"its base"));
        }
        let export = FoundExport {
            digest: *digest,
            access: access.clone(),
        };
        match self.found.exports.get(image) {
            Some(there) if there.digest != *digest => Err(differs(step, image)),
            _ => {
                self.found.exports.insert(image.clone(), export);
                Ok(())
            }
        }
    }

    fn unused(&self, step: &Step, digest: &Digest) -> Result<(), Violation> {
        let export = self.found.exports.iter().find(|(_, e)| e.digest == *digest);
        if let Some((image, _)) = export {
            return Err(in_use(step, digest, &format!("the export {image}")));
        }
        let disk: Option<(&VmName, _)> = self.found.disks.iter().find(|(_, d)| *d == digest);
        match disk {
            Some((vm, _)) => Err(in_use(step, digest, &format!("the disk of {vm}"))),
            None => Ok(()),
        }
    }
}

fn in_use(step: &Step, what: &dyn std::fmt::Display, user: &dyn std::fmt::Display) -> Violation {
    Violation::InUse {
        step: step.name(),
        what: what.to_string(),
        user: user.to_string(),
    }
}

fn missing(step: &Step, what: &dyn std::fmt::Display, missing: &dyn std::fmt::Display) -> Violation {
    Violation::Missing {
        step: step.name(),
        what: what.to_string(),
        missing: missing.to_string(),
    }
}

fn differs(step: &Step, what: &dyn std::fmt::Display) -> Violation {
    Violation::Differs {
        step: step.name(),
        what: what.to_string(),
    }
}
