//! Each step of a plan, carried out.
//!
//! A step looks before it acts: what is done already is left, what does not fit is a [`Violation`], and what it began and could not
//! finish it takes down.

use std::sync::Arc;

use treeboot_dm::{DmDevice, Mapper};
use treeboot_types::{Digest, ImageId, Iqn, VERITY_BLOCK_BYTES, VmName};

use super::feed::Feed;
use super::record::{BaseRecord, DeltaFiles};
use super::sys::{mapper_error, record_error, within};
use super::{KernelPlane, base, disks, exports, hashes, look, record};
use crate::plane::{PlaneError, PlaneKind, Scope, Verb, links as stable, no_layers};
use crate::stack::{Access, Backing, Content, Sources, Step, Violation, WantedDisk};

impl KernelPlane {
    async fn set_paths(&self, digest: Digest, sources: &Sources) -> Result<(), PlaneError> {
        let (sys, given) = (Arc::clone(&self.sys), sources.clone());
        within("noting the paths", move || {
            sys.records
                .update(&digest, |record| record.sources = Some(given))
                .map_err(record_error)
        })
        .await?;
        let feed = {
            let mut feeds = self.feeds.lock();
            let new = || Feed::start(&self.sys, digest, Sources::default(), None);
            Arc::clone(feeds.entry(digest).or_insert_with(new))
        };
        feed.set(sources).await;
        Ok(())
    }

    async fn drop_paths(&self, digest: Digest) -> Result<(), PlaneError> {
        let feed = self.feeds.lock().remove(&digest);
        if let Some(feed) = &feed {
            feed.stop();
        }
        let _idle = match &feed {
            Some(feed) => Some(feed.pass.lock().await),
            None => None,
        };
        if let Some(feed) = &feed {
            feed.logins_ended().await;
        }
        let sys = Arc::clone(&self.sys);
        within("dropping the paths", move || {
            look::end_sessions(&sys, &digest)?;
            sys.records
                .update(&digest, |record| record.sources = None)
                .map_err(record_error)
        })
        .await
    }

    async fn open_base(&self, step: &Step, content: Content, backing: Backing) -> Result<(), PlaneError> {
        let digest = content.digest;
        if !content.bytes.is_multiple_of(u64::from(VERITY_BLOCK_BYTES)) {
            return Err(PlaneError::Unfit {
                what: format!("content {}", digest.short()),
                why: format!(
                    "it has {} bytes, and the kernel plane checks and serves blocks of {VERITY_BLOCK_BYTES}; pad the file to a \
                     multiple of that (truncate -s %{VERITY_BLOCK_BYTES} FILE) and import it again, or attach it on a host of the \
                     user plane",
                    content.bytes
                ),
            });
        }
        let dir = self.sys.store_dir(&digest);
        if backing == Backing::Store && dir.is_some_and(|dir| crate::store::shares(&dir)) {
            return Err(PlaneError::Unfit {
                what: format!("content {}", digest.short()),
                why: "it shares blocks with the version that it was published from, and the kernel's loop device cannot put them together; start \
                      the agent with the user plane and run 'treeboot image flatten'"
                    .into(),
            });
        }
        let base = BaseRecord { content, backing };
        let found = self.look(Scope::Base(digest)).await?;
        if let Some(open) = found.bases.get(&digest) {
            if open.content == content && open.backing == backing {
                return Ok(());
            }
            return Err(differs(step, digest.short()).into());
        }
        let feed = self
            .feed(&digest)
            .filter(|feed| !feed.sources().stripes.is_empty());
        let file = self
            .sys
            .hash_file(&digest, backing)
            .ok_or_else(|| missing(step, digest.short(), "a store"))?;
        match (backing, &feed) {
            (Backing::Store, _) => {}
            (_, None) => return Err(missing(step, digest.short(), "paths").into()),
            (Backing::Adopted, Some(_)) => {}
            (Backing::Cache, Some(feed)) => {
                let (initiator, sources) = (self.sys.initiator.clone(), feed.sources());
                let keys = Arc::clone(&self.sys.settings.keys);
                hashes::fetch(file, digest, content.bytes, initiator, &keys, &sources).await?;
            }
        }
        // Nothing changes the paths while what stands on them is built.
        let _pass = match &feed {
            Some(feed) => Some(feed.pass.lock().await),
            None => None,
        };
        let built = self.build_base(base, feed.as_ref()).await;
        if let Err(error) = built {
            if let Some(feed) = &feed {
                feed.unbuilt();
            }
            let sys = Arc::clone(&self.sys);
            let undone = within("taking down what was built", move || look::close(&sys, &digest)).await;
            return match undone {
                Ok(()) => Err(error),
                Err(undo) => Err(PlaneError::Undo {
                    cause: Box::new(error),
                    undo: Box::new(undo),
                }),
            };
        }
        if let Some(feed) = feed.as_ref().filter(|_| backing != Backing::Store) {
            feed.built();
            self.keep(feed, base);
        }
        self.bases.lock().insert(digest);
        Ok(())
    }

    async fn build_base(&self, base: BaseRecord, feed: Option<&Arc<Feed>>) -> Result<(), PlaneError> {
        let digest = base.content.digest;
        let sys = Arc::clone(&self.sys);
        within("noting the base", move || {
            sys.records
                .update(&digest, |record| record.base = Some(base))
                .map_err(record_error)
        })
        .await?;
        let data = match (base.backing, feed) {
            (Backing::Cache | Backing::Adopted, Some(feed)) => Some(feed.build(base).await?),
            _ => None,
        };
        let sys = Arc::clone(&self.sys);
        within("building the base", move || {
            let data = match data {
                Some(data) => data,
                None => base::stored_data(&sys, &base.content)?,
            };
            let checked = base::check(&sys, &base.content, base.backing, data)?;
            let below = match base.backing {
                Backing::Cache | Backing::Adopted => base::join_reads(&sys, &digest)?,
                // The page cache has the store's file as it is.
                Backing::Store => checked,
            };
            base::finish(&sys, &base.content, below)
        })
        .await
    }

    async fn close_base(&self, step: &Step, digest: Digest) -> Result<(), PlaneError> {
        let feed = self.feed(&digest);
        let _pass = match &feed {
            Some(feed) => Some(feed.pass.lock().await),
            None => None,
        };
        let (sys, name) = (Arc::clone(&self.sys), step.name());
        within("looking who uses the base", move || {
            match look::user_of(&sys, &digest)? {
                None => Ok(()),
                Some(user) => Err(Violation::InUse {
                    step: name,
                    what: digest.short(),
                    user,
                }
                .into()),
            }
        })
        .await?;
        let keeper = self.keepers.lock().remove(&digest);
        let closed = async {
            if let Some(keeper) = keeper {
                if let Some(feed) = &feed {
                    feed.let_waiting_reads_fail().await?;
                }
                keeper.end().await?;
            }
            let sys = Arc::clone(&self.sys);
            within("closing the base", move || look::close(&sys, &digest)).await
        }
        .await;
        if closed.is_err()
            && let Some(feed) = &feed
        {
            // What is left of it goes on as before.
            feed.let_reads_wait_again();
        }
        closed?;
        if let Some(feed) = &feed {
            feed.unbuilt();
        }
        self.bases.lock().remove(&digest);
        Ok(())
    }

    async fn export(
        &self,
        step: &Step,
        image: &ImageId,
        digest: Digest,
        access: &Access,
    ) -> Result<(), PlaneError> {
        let found = self.look(Scope::All).await?;
        if let Some(there) = found.exports.get(image)
            && there.digest != digest
        {
            return Err(differs(step, image).into());
        }
        let Some(base) = found.bases.get(&digest) else {
            return Err(missing(step, image, "its base").into());
        };
        let base = BaseRecord {
            content: base.content,
            backing: base.backing,
        };
        let (sys, image, access) = (Arc::clone(&self.sys), image.clone(), access.clone());
        within(format!("exporting {image}"), move || {
            let exported = exports::export(&sys, &base, &image, &access);
            if exported.is_err()
                && !exports::look(&sys)?
                    .exports
                    .iter()
                    .any(|(there, _)| *there == image)
            {
                // Nothing half-made stays.
                exports::unexport(&sys, &Iqn::of_image(&image))?;
                exports::drop_unused(&sys, &digest)?;
            }
            exported
        })
        .await
    }

    async fn unexport(&self, image: &ImageId) -> Result<(), PlaneError> {
        let (sys, name) = (Arc::clone(&self.sys), Iqn::of_image(image));
        within(format!("ending the export of {image}"), move || {
            exports::unexport(&sys, &name)
        })
        .await
    }

    async fn set_access(&self, step: &Step, image: &ImageId, access: &Access) -> Result<(), PlaneError> {
        let found = self.look(Scope::All).await?;
        match found.exports.get(image) {
            Some(export) if export.access == *access => Ok(()),
            Some(export) => self.export(step, image, export.digest, access).await,
            None => Err(missing(step, image, "the export").into()),
        }
    }

    /// Gives every export the secrets of the moment.
    pub(super) async fn rekey_exports(&self) -> Result<(), PlaneError> {
        let found = self.look(Scope::All).await?;
        let sys = Arc::clone(&self.sys);
        within("changing secrets", move || {
            for (image, export) in &found.exports {
                if let Some(base) = found.bases.get(&export.digest) {
                    let base = BaseRecord {
                        content: base.content,
                        backing: base.backing,
                    };
                    exports::export(&sys, &base, image, &export.access)?;
                }
            }
            Ok(())
        })
        .await
    }

    async fn create_delta(&self, step: &Step, vm: &VmName, disk: WantedDisk) -> Result<(), PlaneError> {
        let (sys, vm, differs) = (Arc::clone(&self.sys), vm.clone(), differs(step, vm));
        within(format!("making the delta of VM '{vm}'"), move || {
            match sys.deltas.look(&vm).map_err(record_error)? {
                None | Some(DeltaFiles::BlocksAlone) => disks::create(&sys, &vm, disk),
                Some(DeltaFiles::Whole(there)) if there == disk => Ok(()),
                Some(_) => Err(differs.into()),
            }
        })
        .await
    }

    async fn delete_delta(&self, step: &Step, vm: &VmName) -> Result<(), PlaneError> {
        let (sys, vm, name) = (Arc::clone(&self.sys), vm.clone(), step.name());
        within(format!("removing the delta of VM '{vm}'"), move || {
            let device = DmDevice::Disk(vm.clone());
            if sys.mapper.find(&device).map_err(mapper_error)?.is_some() {
                return Err(Violation::InUse {
                    step: name,
                    what: vm.to_string(),
                    user: "its disk".into(),
                }
                .into());
            }
            disks::delete(&sys, &vm)
        })
        .await
    }

    async fn serve_disk(&self, step: &Step, vm: &VmName, wanted: WantedDisk) -> Result<(), PlaneError> {
        let (sys, name) = (Arc::clone(&self.sys), vm.clone());
        let (no_base, no_delta, other) = (
            missing(step, vm, "its base"),
            missing(step, vm, "its delta"),
            differs(step, vm),
        );
        within(format!("serving the disk of VM '{vm}'"), move || {
            let base = look::whole_base(&sys, &wanted.digest)?.ok_or(no_base)?;
            if wanted.bytes > base.content.bytes || !wanted.bytes.is_multiple_of(u64::from(VERITY_BLOCK_BYTES)) {
                return Err(PlaneError::Unfit {
                    what: format!("the disk of VM '{name}'"),
                    why: format!(
                        "it is to have {} bytes, and its base has {}; on the kernel plane a disk is as large as its base",
                        wanted.bytes, base.content.bytes
                    ),
                });
            }
            match sys.deltas.look(&name).map_err(record_error)? {
                Some(DeltaFiles::Whole(there)) if there == wanted => {}
                Some(DeltaFiles::Whole(_)) => return Err(other.into()),
                Some(DeltaFiles::Damaged(why)) => {
                    return Err(PlaneError::Damaged {
                        what: format!("the delta of VM '{name}'"),
                        why,
                    });
                }
                None | Some(DeltaFiles::BlocksAlone) => return Err(no_delta.into()),
            }
            disks::serve(&sys, &name, wanted).map(drop)
        })
        .await?;
        self.disks.lock().insert(vm.clone());
        Ok(())
    }

    async fn stop_disk(&self, vm: &VmName) -> Result<(), PlaneError> {
        let (sys, name) = (Arc::clone(&self.sys), vm.clone());
        within(format!("ending the disk of VM '{vm}'"), move || {
            disks::stop(&sys, &name)
        })
        .await?;
        self.disks.lock().remove(vm);
        Ok(())
    }

    async fn drop_cache(&self, step: &Step, digest: Digest) -> Result<(), PlaneError> {
        let (sys, name) = (Arc::clone(&self.sys), step.name());
        within("dropping the cache", move || {
            if look::whole_base(&sys, &digest)?.is_some_and(|base| !base.backing.in_store()) {
                return Err(in_use(name, &digest).into());
            }
            base::drop_cache(&sys, &digest)
        })
        .await
    }

    async fn drop_store(&self, step: &Step, digest: Digest) -> Result<(), PlaneError> {
        let (sys, name) = (Arc::clone(&self.sys), step.name());
        within("dropping the store", move || {
            if look::whole_base(&sys, &digest)?.is_some_and(|base| base.backing.in_store()) {
                return Err(in_use(name, &digest).into());
            }
            let Some(dir) = sys.store_dir(&digest) else {
                return Ok(());
            };
            let error = |error| PlaneError::io(format!("removing {}", dir.display()), error);
            // Out of sight first: half a store must never look like one, and what is hidden is swept at the next start.
            let hidden = dir.with_file_name(format!("{}dropped-{digest}", crate::store::UNFINISHED));
            record::gone(std::fs::rename(&dir, &hidden)).map_err(error)?;
            record::gone(std::fs::remove_dir_all(&hidden)).map_err(error)
        })
        .await
    }

    pub(super) async fn carry_out(&self, step: &Step) -> Result<(), PlaneError> {
        match step {
            Step::Sweep { leftover } => {
                let (sys, leftover) = (Arc::clone(&self.sys), leftover.clone());
                within("sweeping", move || look::sweep(&sys, &leftover)).await
            }
            Step::DetachDevice { vm } => {
                let (sys, vm) = (Arc::clone(&self.sys), vm.clone());
                within(format!("ending the device of VM '{vm}'"), move || {
                    let device = DmDevice::Disk(vm.clone());
                    // What is in use keeps its name.
                    sys.unused(&device)?;
                    stable::remove(&vm, Some(&Mapper::path(&device)))
                })
                .await
            }
            Step::AttachDevice { vm } => stable::set(vm, &Mapper::path(&DmDevice::Disk(vm.clone()))),
            Step::StopDisk { vm } => self.stop_disk(vm).await,
            Step::DeleteDelta { vm } => self.delete_delta(step, vm).await,
            Step::Unexport { image } => self.unexport(image).await,
            Step::CloseBase { digest } => self.close_base(step, *digest).await,
            Step::DropPaths { digest } => self.drop_paths(*digest).await,
            Step::DropCache { digest } => self.drop_cache(step, *digest).await,
            Step::DropStore { digest } => self.drop_store(step, *digest).await,
            Step::SetPaths { digest, sources } => self.set_paths(*digest, sources).await,
            Step::OpenBase { content, backing } => self.open_base(step, *content, *backing).await,
            Step::Export {
                image,
                digest,
                access,
            } => self.export(step, image, *digest, access).await,
            Step::SetAccess { image, access } => self.set_access(step, image, access).await,
            Step::CreateDelta { vm, disk } => self.create_delta(step, vm, *disk).await,
            Step::LimitDisk { vm, .. } => Err(PlaneError::Unfit {
                what: format!("a limit of what VM '{vm}' writes"),
                why: Verb::Limit.refusal(PlaneKind::Kernel).unwrap_or_default().into(),
            }),
            Step::ServeDisk { vm, disk } => self.serve_disk(step, vm, *disk).await,
            Step::Layers { vm, .. } => Err(no_layers(vm, PlaneKind::Kernel)),
        }
    }
}

fn missing(step: &Step, what: impl ToString, missing: &str) -> Violation {
    Violation::Missing {
        step: step.name(),
        what: what.to_string(),
        missing: missing.into(),
    }
}

fn differs(step: &Step, what: impl ToString) -> Violation {
    Violation::Differs {
        step: step.name(),
        what: what.to_string(),
    }
}

fn in_use(step: &'static str, digest: &Digest) -> Violation {
    Violation::InUse {
        step,
        what: digest.short(),
        user: "its base".into(),
    }
}
