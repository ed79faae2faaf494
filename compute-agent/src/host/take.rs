//! A VM that moves here: its layers have come (`receive`), and now it becomes this host's.
//!
//! The moment is one entry of the journal, which ends [`Move::Arriving`]. Until it is written anything that goes wrong is undone and said to
//! the other host; from then on nothing is, whatever goes wrong. The other host asks by the transfer's number where it did not hear, and an
//! answer of "no" makes sure that it stays so.

use std::collections::BTreeMap;

use treeboot_block::DeltaMeta;
use treeboot_block::layers::{Arrival, LayerTree};
use treeboot_proto::v1;
use treeboot_types::{HostName, ImageId, VmName};

use super::base::{BaseMsg, Hold};
use super::report::StartRequest;
use super::vm::{VmMsg, VmOwner};
use super::{Host, HostError, chain};
use crate::desired::{Change, DiskState, Move, OldHost, RunSpec};
use crate::plane::{LayerBlocks, Verb};
use crate::stack::{Content, WantedDisk};

/// How often the disk of a VM that moved here is tried to be served before it is left to the next start.
const ATTEMPTS: u32 = 3;

/// A VM that moves here, all of which has come.
pub(super) struct Taking {
    image: ImageId,
    content: Content,
    instance: [u8; 16],
    device: bool,
    limit_bytes: Option<u64>,
    secret: Option<String>,
    start: Option<Box<RunSpec>>,
    from: Option<OldHost>,
    arrival: Arrival,
    tree: LayerTree,
    blocks: LayerBlocks,
}

fn invalid(error: impl std::fmt::Display) -> HostError {
    HostError::Invalid(error.to_string())
}

impl Host {
    /// Takes a VM that moves here. Returns what did not work of what follows the move, for people.
    ///
    /// # Errors
    /// [`HostError`]; it is not this host's then, and will not be.
    pub async fn take_vm(&self, request: v1::TakeVmRequest) -> Result<String, HostError> {
        self.can(Verb::Migrate)?;
        let vm = VmName::new(&request.vm).map_err(invalid)?;
        let transfer = request.transfer;
        let seat = self.seat(&vm, transfer).await?;
        let image = treeboot_proto::image_id_or_newest(request.image.as_ref()).map_err(invalid)?;
        let tree = LayerTree::decode(&request.layers).map_err(invalid)?;
        let start = match request.run.is_empty() {
            true => None,
            false => Some(serde_json::from_slice(&request.run).map_err(invalid)?),
        };
        let instance = request.instance.try_into();
        let instance = instance.map_err(|_| invalid("an identity has 16 bytes"))?;
        let ends = request.ends.iter();
        let blocks: BTreeMap<_, _> = ends
            .map(|end| (end.layer, (end.data_blocks, end.zero_blocks)))
            .collect();
        let same = self.same_content(&vm, &image, &request.digest, request.bytes);
        let (image, content) = match same.await {
            Ok(same) => same,
            Err(error) => {
                self.settle(&vm, transfer).await?;
                return Err(error);
            }
        };
        let taking = Taking {
            arrival: Arrival {
                vm: vm.clone(),
                transfer,
                layer: None,
                meta: DeltaMeta {
                    digest: content.digest,
                    bytes: content.bytes,
                },
                data_bytes: 0,
            },
            image,
            content,
            instance,
            device: request.device,
            limit_bytes: Some(request.limit_bytes).filter(|bytes| *bytes > 0),
            secret: request.secret.map(|secret| secret.secret),
            start,
            // One of a version that takes nothing back does not say.
            from: HostName::new(&request.source).ok().map(|host| OldHost {
                host,
                address: request.source_address,
            }),
            tree,
            blocks,
        };
        let taking = Box::new(taking);
        let taken = self.ask_vm(&vm, |reply| VmMsg::Take { taking, reply }).await;
        drop(seat);
        self.moved_or_not(&vm, transfer);
        if taken.is_ok() {
            self.tell_old_host(&vm);
        }
        taken
    }

    /// Whether a VM moved here by this transfer. Where it did not, what came of it is removed, and it never will.
    ///
    /// # Errors
    /// It is not known, or could not be removed.
    pub async fn settle_vm(&self, request: v1::SettleVmRequest) -> Result<bool, HostError> {
        let vm = VmName::new(&request.vm).map_err(invalid)?;
        // What still comes of it ends. Another transfer's seat is none of its business.
        let seat = self.seat(&vm, request.transfer).await;
        if let Err(error) = seat.as_ref().map(drop)
            && !matches!(error, HostError::Arriving { .. })
        {
            return seat.map(|_| false);
        }
        self.settle(&vm, request.transfer).await
    }

    pub(super) async fn settle(&self, vm: &VmName, transfer: u64) -> Result<bool, HostError> {
        let taken = self.ask_vm(vm, |reply| VmMsg::Settle { transfer, reply }).await?;
        self.moved_or_not(vm, transfer);
        Ok(taken)
    }
}

impl RunSpec {
    /// What a start needs that is asked for by nobody.
    fn request(&self) -> StartRequest {
        StartRequest {
            image: None,
            memory_mib: self.memory_mib,
            cpus: self.cpus,
            ready: self.ready.clone(),
            ready_limit: super::READY_LIMIT,
            seed: self.seed.clone(),
        }
    }
}

impl VmOwner {
    /// Makes a VM that came this host's.
    pub(super) async fn take_over(&mut self, taking: Taking) -> Result<String, HostError> {
        let transfer = taking.arrival.transfer;
        let desired = self.shared.journal().desired();
        if desired.taken.contains(&transfer) {
            // Its host did not hear so.
            return Ok(String::new());
        }
        // Another VM of the name is none of this call's business.
        self.host.has_taken(&self.vm, transfer)?;
        let taken = match self.prepare(&taking).await {
            Ok(disk) => {
                let vm = self.vm.clone();
                let taken = self.shared.journal().commit([Change::Disk { vm, disk }]).await;
                taken.map_err(HostError::from)
            }
            Err(error) => Err(error),
        };
        if let Err(cause) = taken {
            return Err(match self.give_up_arrival(transfer).await {
                Ok(()) => cause,
                Err(undo) => HostError::Undo {
                    cause: Box::new(cause),
                    undo: Box::new(undo),
                },
            });
        }
        tracing::info!(vm = %self.vm, image = %taking.image, "a VM moved here");
        self.report
            .send_modify(|report| report.image = Some(taking.image.clone()));
        let settled = self.settle_in(taking.device).await;
        self.tidy_layers();
        Ok(settled.err().map_or_else(String::new, |error| {
            let trouble = chain(&error);
            tracing::error!(vm = %self.vm, error = %trouble, "the VM moved here, and not all of it works");
            trouble
        }))
    }

    /// All that may fail before it is this host's. Returns the disk as it is to be then.
    async fn prepare(&mut self, taking: &Taking) -> Result<DiskState, HostError> {
        let Taking {
            image,
            content,
            arrival,
            ..
        } = taking;
        let plane = &self.shared.applier.plane;
        plane.finish(arrival, &taking.tree, &taking.blocks).await?;
        let wanted = WantedDisk {
            digest: content.digest,
            bytes: content.bytes,
        };
        let disk = DiskState {
            transfer: Some(arrival.transfer),
            from: taking.from.clone(),
            start: taking.start.clone(),
            limit_bytes: taking.limit_bytes,
            ..DiskState::new(image.clone(), wanted, taking.instance)
        };
        let arriving = DiskState {
            moving: Some(Move::Arriving),
            ..disk.clone()
        };
        self.host
            .ask_base(content.digest, |reply| BaseMsg::Attach {
                image: image.clone(),
                content: *content,
                hold: Hold::Disk(self.vm.clone(), Box::new(arriving)),
                reply,
            })
            .await?;
        let keys = &self.shared.settings.keys;
        keys.take_disk(&self.vm, taking.secret.clone()).await;
        Ok(disk)
    }

    /// Its disk as it is to be, where a few attempts are enough.
    pub(super) async fn reach_in_the_end(&mut self) -> Result<(), HostError> {
        let mut attempts = 0;
        while let Err(error) = self.reach_disk().await {
            attempts += 1;
            if attempts >= ATTEMPTS {
                return Err(error);
            }
        }
        Ok(())
    }

    /// It is this host's: it is served, and runs if it ran.
    async fn settle_in(&mut self, device: bool) -> Result<(), HostError> {
        self.reach_in_the_end().await?;
        let desired = self.shared.journal().desired();
        if let Some(there) = desired.disks.get(&self.vm).filter(|_| device) {
            self.have_device(there.clone(), true).await?;
        }
        self.start_again().await
    }

    /// Starts a VM that ran before it moved, or was stopped for a move that came to nothing.
    pub(super) async fn start_again(&mut self) -> Result<(), HostError> {
        let desired = self.shared.journal().desired();
        let there = desired.disks.get(&self.vm);
        let Some((there, spec)) = there.and_then(|disk| Some((disk, disk.start.clone()?))) else {
            return Ok(());
        };
        if there.ends {
            // Else a successor that finds it running would end it.
            let disk = DiskState {
                ends: false,
                ..there.clone()
            };
            let vm = self.vm.clone();
            self.shared.journal().commit([Change::Disk { vm, disk }]).await?;
        }
        let started = self.start_run(spec.request()).await;
        // What came of it is the run's to say.
        self.forget_start().await?;
        started
    }

    pub(super) async fn forget_start(&mut self) -> Result<(), HostError> {
        let desired = self.shared.journal().desired();
        let Some(there) = desired.disks.get(&self.vm).filter(|disk| disk.start.is_some()) else {
            return Ok(());
        };
        let disk = DiskState {
            start: None,
            ends: false,
            ..there.clone()
        };
        let vm = self.vm.clone();
        Ok(self.shared.journal().commit([Change::Disk { vm, disk }]).await?)
    }

    /// Whether the VM moved here by this transfer; if not, nothing of it is left.
    pub(super) async fn settle(&mut self, transfer: u64) -> Result<bool, HostError> {
        if self.shared.journal().desired().taken.contains(&transfer) {
            return Ok(true);
        }
        self.give_up_arrival(transfer).await?;
        Ok(false)
    }

    async fn give_up_arrival(&mut self, transfer: u64) -> Result<(), HostError> {
        let desired = self.shared.journal().desired();
        let plane = std::sync::Arc::clone(&self.shared.applier.plane);
        match desired.disks.get(&self.vm) {
            Some(there) if there.is_arriving() && there.transfer == Some(transfer) => {
                self.delete_disk(false).await?;
                plane.discard(&self.vm, None).await?;
            }
            Some(_) => {}
            None => plane.discard(&self.vm, None).await?,
        }
        Ok(plane.discard(&self.vm, Some(transfer)).await?)
    }
}
