//! A disk that comes from another VM, of this host or another one: taken in block by block, and given to a new VM once all of it is
//! there and durable.
//!
//! What a broken connection, or a killed agent, leaves is kept for [`RESUME_LIMIT`], so that the same transfer goes on from its end.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use treeboot_block::DeltaMeta;
use treeboot_block::layers::{Arrival, Incoming, arrivals};
use treeboot_proto::v1;
use treeboot_proto::v1::disk_part::Part;
use treeboot_types::{ImageId, ImageRef, VmName};

use super::vm::{VmMsg, VmOwner};
use super::{DiskOptions, Host, HostError, Shared, chain};
use crate::plane::user::delta_error;
use crate::plane::{PlaneError, Scope, Verb};
use crate::stack::Content;

/// How long a transfer that was broken off may be gone on with; a sender gives up before.
const RESUME_LIMIT: Duration = Duration::from_secs(45);
/// How long a transfer's older connection may take to end when a newer one has come.
const HANDOVER_LIMIT: Duration = Duration::from_secs(5);

/// How long nothing may be heard of a VM that moves here: its host stops it meanwhile.
const MOVE_LIMIT: Duration = Duration::from_secs(180);

/// Who receives what at the moment: one transfer for a VM.
#[derive(Default)]
pub(super) struct Seats {
    taken: Mutex<HashMap<VmName, Taken>>,
    /// What was broken off, and may be gone on with for a while.
    kept: Mutex<BTreeSet<(VmName, u64)>>,
    /// VMs that move here: by which transfer, and when something of it was heard last.
    moves: Mutex<HashMap<VmName, (u64, Instant)>>,
}

impl Seats {
    /// Whether somebody receives a VM's disk, or may go on with it.
    pub(super) fn claims(&self, vm: &VmName, transfer: Option<u64>) -> bool {
        let kept = |transfer| self.kept.lock().contains(&(vm.clone(), transfer));
        self.taken.lock().contains_key(vm) || self.moves.lock().contains_key(vm) || transfer.is_some_and(kept)
    }
}

#[derive(Clone)]
struct Taken {
    transfer: u64,
    /// Asks it to end: the same transfer has a newer connection.
    stop: CancellationToken,
    ended: CancellationToken,
}

/// The right to receive a VM's disk.
pub(super) struct Seat {
    shared: Arc<Shared>,
    vm: VmName,
    taken: Taken,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.shared.seats.taken.lock().remove(&self.vm);
        self.taken.ended.cancel();
    }
}

/// How a disk that is announced comes in.
pub enum Begun {
    /// Its VM has it already.
    Taken,
    /// From this byte of the disk on.
    From(Receiving, u64),
}

/// A disk that comes in.
pub struct Receiving {
    vm: VmName,
    image: ImageId,
    content: Content,
    transfer: u64,
    incoming: Arc<Incoming>,
    /// It is a layer of a VM that moves.
    layer: bool,
    // Last: its file is closed when the seat is free.
    seat: Seat,
}

async fn blocking<T: Send + 'static>(
    vm: &VmName,
    incoming: &Arc<Incoming>,
    work: impl FnOnce(&Incoming) -> Result<T, treeboot_block::DeltaError> + Send + 'static,
) -> Result<T, HostError> {
    let incoming = Arc::clone(incoming);
    let done = tokio::task::spawn_blocking(move || work(&incoming)).await;
    match done {
        Ok(done) => done.map_err(|error| delta_error(vm, error).into()),
        Err(error) => Err(HostError::Invalid(error.to_string())),
    }
}

impl Receiving {
    /// Ends when the same transfer has a newer connection.
    pub async fn outdated(&self) {
        self.seat.taken.stop.cancelled().await;
    }

    /// Takes one part; whether it was the last.
    ///
    /// # Errors
    /// Its checksum is wrong, it is not of this disk, it could not be written, or not all came.
    pub async fn take(&mut self, part: Part) -> Result<bool, HostError> {
        let refused = |why: String| HostError::Shipped {
            vm: self.vm.clone(),
            why,
        };
        let (offset, bytes, data) = match part {
            Part::Header(_) => return Err(refused("a second header came".into())),
            Part::GivenUp(_) => return Err(refused("the other side gave it up".into())),
            Part::Data(data) if crc32c::crc32c(&data.data) != data.checksum => {
                let why = format!("what came for byte {} of it is not what was sent", data.offset);
                return Err(refused(why));
            }
            Part::Data(mut data) => {
                // The disk's last block may be cut short.
                let bytes = data.data.len().next_multiple_of(4096);
                data.data.resize(bytes, 0);
                (data.offset, bytes as u64, Some(data.data))
            }
            // What is larger than any disk is refused as what lies outside of this one.
            Part::Zero(zero) => {
                let bytes = zero.bytes.checked_next_multiple_of(4096);
                (zero.offset, bytes.unwrap_or(u64::MAX), None)
            }
            Part::End(end) => {
                let came = blocking(&self.vm, &self.incoming, |incoming| Ok(incoming.blocks())).await?;
                let sent = (end.data_blocks, end.zero_blocks);
                return match came == sent {
                    true => Ok(true),
                    false => Err(refused(format!(
                        "{} blocks of data and {} of zeroes are there, of {} and {} that were sent",
                        came.0, came.1, sent.0, sent.1
                    ))),
                };
            }
        };
        let written = blocking(&self.vm, &self.incoming, move |incoming| {
            incoming.write(offset, bytes, data.as_deref())
        });
        written.await.map(|()| false)
    }

    /// Nothing of it is to stay.
    pub async fn discard(self) {
        if let Err(error) = blocking(&self.vm, &self.incoming, Incoming::discard).await {
            tracing::warn!(vm = %self.vm, error = %chain(&error), "a disk that is not wanted stays until the next start");
        }
    }
}

/// A disk all of which came.
pub(super) struct Received {
    image: ImageId,
    content: Content,
    transfer: u64,
    incoming: Arc<Incoming>,
}

impl VmOwner {
    /// Gives the VM, which is new, a disk that came.
    pub(super) async fn adopt(&mut self, disk: Received) -> Result<(), HostError> {
        let Received {
            image,
            content,
            transfer,
            incoming,
        } = disk;
        let finished = match self.host.has_taken(&self.vm, transfer) {
            Ok(false) => blocking(&self.vm, &incoming, Incoming::finish).await,
            Ok(true) => return Ok(()),
            Err(error) => Err(error),
        };
        if finished.is_err() {
            let _swept_at_the_next_start = blocking(&self.vm, &incoming, Incoming::discard).await;
        }
        // Its file is the new disk's from here on.
        drop(incoming);
        finished?;
        let made = match self.host.with_own_limit(DiskOptions::default()) {
            Ok(options) => self.make(image, content, options, Some(transfer)).await,
            Err(error) => Err(error),
        };
        if made.is_err() {
            // So that no other VM of the name gets it.
            self.shared.applier.plane.discard(&self.vm, None).await?;
        }
        made
    }
}

impl Host {
    /// Begins to take in a disk for a new VM, or goes on with it.
    ///
    /// # Errors
    /// The VM exists, the image is not what it was there, or there is no room.
    pub async fn receive(&self, header: v1::DiskHeader) -> Result<Begun, HostError> {
        self.can(Verb::Clone)?;
        let vm = VmName::new(&header.vm).map_err(|error| HostError::Invalid(error.to_string()))?;
        let image = treeboot_proto::image_id_or_newest(header.image.as_ref())
            .map_err(|error| HostError::Invalid(error.to_string()))?;
        let transfer = header.transfer;
        if header.runs {
            self.shared.hypervisor().await?;
        }
        let seat = self.seat(&vm, transfer).await?;
        if self.has_taken(&vm, transfer)? {
            return Ok(Begun::Taken);
        }
        let (image, content) = self
            .same_content(&vm, &image, &header.digest, header.bytes)
            .await?;
        let found = self.plane().inspect(&Scope::Disk(vm.clone())).await?;
        if found.deltas.contains_key(&vm) {
            return Err(HostError::Plane(PlaneError::Unfit {
                what: format!("a disk for VM '{vm}'"),
                why: "a delta that no VM owns has its name; move it away, or give the VM another name".into(),
            }));
        }
        if header.layer == Some(0) {
            return Err(HostError::Invalid("layer 0 has no name of its own".into()));
        }
        if header.layer.is_some() {
            self.heard_of_move(&vm, transfer);
        }
        let arrival = Arrival {
            vm: vm.clone(),
            transfer,
            layer: header.layer,
            meta: DeltaMeta {
                digest: content.digest,
                bytes: content.bytes,
            },
            data_bytes: header.data_bytes,
        };
        let begun = self.plane().receive(&arrival).await;
        let incoming = match begun {
            Ok(incoming) => incoming,
            Err(error) => {
                self.plane().discard(&vm, Some(transfer)).await?;
                return Err(error.into());
            }
        };
        let from = blocking(&vm, &incoming, |incoming| Ok(incoming.resume_at())).await?;
        let receiving = Receiving {
            vm,
            image,
            content,
            transfer,
            incoming,
            layer: header.layer.is_some(),
            seat,
        };
        Ok(Begun::From(receiving, from))
    }

    /// The image under a disk that comes, as it is here.
    ///
    /// # Errors
    /// It cannot be had, or is another one than where the disk comes from.
    pub(super) async fn same_content(
        &self,
        vm: &VmName,
        image: &ImageRef,
        digest: &[u8],
        bytes: u64,
    ) -> Result<(ImageId, Content), HostError> {
        let (image, content) = self.resolve(image).await?;
        match content.digest.0[..] == *digest && content.bytes == bytes {
            true => Ok((image, content)),
            false => Err(HostError::Shipped {
                vm: vm.clone(),
                why: format!("image {image} has another content here than there"),
            }),
        }
    }

    /// A VM is about to move here. Where nothing more is heard, what came of it is removed, unless it is this host's already.
    pub(super) fn heard_of_move(&self, vm: &VmName, transfer: u64) {
        let now = (transfer, Instant::now());
        let before = self.shared.seats.moves.lock().insert(vm.clone(), now);
        if before.is_some_and(|(before, _)| before == transfer) {
            return;
        }
        let (host, vm) = (self.clone(), vm.clone());
        self.shared.tasks.spawn(async move {
            let mut until = now.1 + MOVE_LIMIT;
            loop {
                tokio::select! {
                    () = host.shared.stop.cancelled() => return,
                    () = tokio::time::sleep_until(until) => {}
                }
                let seats = &host.shared.seats;
                let heard = seats.moves.lock().get(&vm).copied();
                let Some((_, heard)) = heard.filter(|(of, _)| *of == transfer) else {
                    return;
                };
                let receives = seats.taken.lock().contains_key(&vm);
                until = heard + MOVE_LIMIT;
                if receives {
                    until = Instant::now() + MOVE_LIMIT;
                } else if until <= Instant::now() {
                    match host.settle(&vm, transfer).await {
                        Ok(_) => return,
                        Err(error) => {
                            tracing::warn!(%vm, error = %chain(&error), "what came of a VM that did not move here stays for now");
                        }
                    }
                    until = Instant::now() + MOVE_LIMIT;
                }
            }
        });
    }

    /// Nothing more is expected of a VM that moves here.
    pub(super) fn moved_or_not(&self, vm: &VmName, transfer: u64) {
        let mut moves = self.shared.seats.moves.lock();
        if moves.get(vm).is_some_and(|(of, _)| *of == transfer) {
            moves.remove(vm);
        }
    }

    pub(super) async fn seat(&self, vm: &VmName, transfer: u64) -> Result<Seat, HostError> {
        loop {
            let other = {
                let mut seats = self.shared.seats.taken.lock();
                match seats.get(vm) {
                    Some(other) => other.clone(),
                    None => {
                        let taken = Taken {
                            transfer,
                            stop: CancellationToken::new(),
                            ended: CancellationToken::new(),
                        };
                        seats.insert(vm.clone(), taken.clone());
                        return Ok(Seat {
                            shared: Arc::clone(&self.shared),
                            vm: vm.clone(),
                            taken,
                        });
                    }
                }
            };
            if other.transfer != transfer {
                return Err(HostError::Arriving {
                    vm: vm.clone(),
                    host: self.shared.host().to_string(),
                });
            }
            other.stop.cancel();
            let ended = tokio::time::timeout(HANDOVER_LIMIT, other.ended.cancelled()).await;
            ended.map_err(|_| HostError::Shipped {
                vm: vm.clone(),
                why: "what came before is still being written".into(),
            })?;
        }
    }

    /// Whether a VM has the disk that a transfer brings.
    ///
    /// # Errors
    /// It has another one.
    pub(super) fn has_taken(&self, vm: &VmName, transfer: u64) -> Result<bool, HostError> {
        match self.desired().disks.get(vm) {
            None => Ok(false),
            Some(there) if there.transfer == Some(transfer) && !there.doomed => Ok(true),
            Some(there) if there.is_arriving() => Err(HostError::Arriving {
                vm: vm.clone(),
                host: self.shared.host().to_string(),
            }),
            Some(there) => Err(HostError::VmExists {
                vm: vm.clone(),
                host: self.shared.host().to_string(),
                have: there.image.clone(),
            }),
        }
    }

    /// All of a disk came: its VM gets it. A layer of one that moves waits for the others.
    ///
    /// # Errors
    /// [`HostError`]; nothing is left then.
    pub async fn received(&self, receiving: Receiving) -> Result<(), HostError> {
        let Receiving {
            vm,
            image,
            content,
            transfer,
            incoming,
            layer,
            seat,
        } = receiving;
        if layer {
            self.heard_of_move(&vm, transfer);
            return blocking(&vm, &incoming, Incoming::settle).await;
        }
        let disk = Received {
            image,
            content,
            transfer,
            incoming,
        };
        let adopted = self.ask_vm(&vm, |reply| VmMsg::Adopt { disk, reply }).await;
        drop(seat);
        adopted
    }

    /// The connection broke: what came is kept for a while.
    pub fn keep_for_a_while(&self, receiving: Receiving) {
        let (vm, transfer) = (receiving.vm.clone(), receiving.transfer);
        drop(receiving);
        tracing::info!(%vm, "a disk that came in was broken off");
        self.discard_later(vm, transfer);
    }

    fn discard_later(&self, vm: VmName, transfer: u64) {
        let host = self.clone();
        let kept = (vm.clone(), transfer);
        self.shared.seats.kept.lock().insert(kept.clone());
        self.shared.tasks.spawn(async move {
            tokio::select! {
                () = host.shared.stop.cancelled() => return,
                () = tokio::time::sleep(RESUME_LIMIT) => {}
            }
            let seats = &host.shared.seats;
            seats.kept.lock().remove(&kept);
            if seats.taken.lock().contains_key(&vm) || seats.moves.lock().contains_key(&vm) {
                // It is gone on with, or there is a newer one, which removed it.
                return;
            }
            match host.plane().discard(&vm, Some(transfer)).await {
                Ok(()) => tracing::info!(%vm, "what came in of a disk was removed: nobody went on with it"),
                Err(error) => {
                    tracing::warn!(%vm, error = %chain(&error), "what came in of a disk stays until the next start");
                }
            }
        });
    }

    /// Removes what came for a VM and nobody claims.
    pub(super) async fn discard_unclaimed(&self, vm: &VmName) -> Result<(), HostError> {
        let deltas = self.shared.settings.deltas_dir.clone();
        let found = tokio::task::spawn_blocking(move || arrivals(&deltas)).await;
        let found = found.map_err(|error| HostError::Invalid(error.to_string()))?;
        let found = found.map_err(|error| delta_error(vm, error))?;
        for (_, transfer) in found.iter().filter(|(of, _)| of == vm) {
            if !self.shared.seats.claims(vm, *transfer) {
                self.plane().discard(vm, *transfer).await?;
            }
        }
        Ok(())
    }

    /// At the start: what a predecessor began to take in may be gone on with for a while.
    pub(super) async fn take_up_arrivals(&self) {
        let desired = self.desired();
        for (vm, disk) in desired.disks.iter().filter(|(_, disk)| disk.is_arriving()) {
            self.heard_of_move(vm, disk.transfer.unwrap_or_default());
        }
        let owned = desired.disks.keys().cloned().collect();
        match self.plane().arrivals(owned).await {
            Ok(arrivals) => {
                for (vm, transfer) in arrivals {
                    self.discard_later(vm, transfer);
                }
            }
            Err(error) => {
                tracing::warn!(error = %chain(&error), "what came for VMs that are not there stays");
            }
        }
    }
}
