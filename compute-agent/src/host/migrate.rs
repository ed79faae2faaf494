//! A VM that goes to another host: shipped while it runs, stopped, shipped to its end, and given away by one question.
//!
//! Every layer of its disk goes by itself, as what clones ship goes (`ship`), so that its snapshots go with it. The other host's journal alone
//! says whose the VM is (`take`): before it is asked anything that goes wrong ends with the VM here as it was; once it was asked this host
//! keeps the VM fenced, through restarts, until the other one has said whether it took it. Silence is no answer.

use std::collections::BTreeMap;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use treeboot_block::LayeredDisk;
use treeboot_block::layers::{LayerId, SHIFT, TreeError};
use treeboot_proto::v1;
use treeboot_types::{HostName, Iqn, VmName};

use super::ship::{
    BLOCK, PATIENCE, PAUSE, Parcel, Phase, Progress, Shipped, TAKE_LIMIT, Underway, header, peer,
};
use super::vm::{MoveStep, VmMsg};
use super::{Host, HostError, chain};
use crate::desired::{DiskState, Move, Stage};
use crate::plane::{LayerBlocks, Verb};
use crate::stack::LayerChange;

/// How long a front end may stay logged in once the VM is stopped.
const FRONT_END_LIMIT: Duration = Duration::from_secs(20);
/// How often it is looked whether it is gone.
const LOOK: Duration = Duration::from_millis(50);
/// The longest pause before a host that does not answer is asked again.
pub(super) const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// What is asked of a move.
#[derive(Debug, Clone)]
pub struct MigrateRequest {
    /// The VM.
    pub vm: VmName,
    /// The host it goes to, and its agent's `host:port`.
    pub to: (HostName, String),
}

/// How a move ended.
#[derive(Debug, Clone, Default)]
pub struct Moved {
    /// What was shipped.
    pub shipped: Shipped,
    /// For how long its disk was served nowhere.
    pub stopped: Duration,
    /// Nothing was to be done.
    pub was_there: bool,
    /// What does not work there, for people; empty where all does.
    pub trouble: String,
}

/// VMs that are being moved by calls of this moment.
#[derive(Default)]
pub(super) struct Moves(Mutex<HashSet<VmName>>);

impl Moves {
    /// Whether a call of this moment moves it.
    pub(super) fn is_moving(&self, vm: &VmName) -> bool {
        self.0.lock().contains(vm)
    }
}

struct Turn<'a>(&'a Moves, &'a VmName);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.0.lock().remove(self.1);
    }
}

/// A move under way.
struct Moving<'a> {
    request: &'a MigrateRequest,
    transfer: u64,
    progress: &'a watch::Sender<Progress>,
    cancel: &'a CancellationToken,
    shipped: Shipped,
    /// Layers that are there, and what they have.
    sent: LayerBlocks,
}

impl Moving<'_> {
    fn what(&self) -> String {
        format!(
            "the move of VM '{}' to host '{}'",
            self.request.vm, self.request.to.0
        )
    }

    fn check_cancelled(&self) -> Result<(), HostError> {
        match self.cancel.is_cancelled() {
            true => Err(HostError::Cancelled { what: self.what() }),
            false => Ok(()),
        }
    }

    fn phase(&self, phase: Phase) {
        self.progress.send_modify(|progress| progress.phase = phase);
    }
}

/// Why a VM did not move.
enum Failed {
    /// Before the other host was asked to take it.
    Before(HostError),
    /// It was asked, and has not said whether it did.
    Undecided(HostError),
}

impl<E: Into<HostError>> From<E> for Failed {
    fn from(error: E) -> Self {
        Self::Before(error.into())
    }
}

impl Host {
    /// Moves a VM to another host, where it is started if it runs here. Where that fails or is cancelled before the other host was asked to
    /// take it, the VM is here as it was.
    pub fn begin_migration(&self, request: MigrateRequest) -> Underway<Moved> {
        let host = self.clone();
        Underway::begin(&self.shared.stop, async move |told, cancel| {
            host.migrate(&request, &told, &cancel).await
        })
    }

    async fn migrate(
        &self,
        request: &MigrateRequest,
        progress: &watch::Sender<Progress>,
        cancel: &CancellationToken,
    ) -> Result<Moved, HostError> {
        let (vm, to) = (&request.vm, &request.to.0);
        self.has_disk(vm)?;
        self.can(Verb::Migrate)?;
        if to == self.shared.host() {
            return Ok(Moved {
                was_there: true,
                ..Moved::default()
            });
        }
        let moves = &self.shared.moves;
        if !moves.0.lock().insert(vm.clone()) {
            return Err(HostError::Moving {
                vm: vm.clone(),
                to: to.to_string(),
            });
        }
        let _turn = Turn(moves, vm);
        self.wait_for_old_host(vm).await?;
        let mut moving = Moving {
            request,
            transfer: rand::random(),
            progress,
            cancel,
            shipped: Shipped::default(),
            sent: BTreeMap::new(),
        };
        let transfer = moving.transfer;
        match self.move_out(&mut moving).await {
            Ok(moved) => {
                self.end_move(vm, transfer, true).await;
                tracing::info!(%vm, %to, data_bytes = moved.shipped.data_bytes, stopped_ms = moved.stopped.as_millis() as u64, "moved");
                Ok(moved)
            }
            Err(Failed::Before(error)) => {
                // Where it is not heard, the other side waits its time, and removes what came.
                let _ = tokio::time::timeout(PATIENCE / 4, self.ask_whether(vm, transfer, &request.to)).await;
                self.end_move(vm, transfer, false).await;
                Err(error)
            }
            Err(Failed::Undecided(error)) => {
                tracing::error!(%vm, %to, error = %chain(&error), "whether the VM was taken is not known");
                self.ask_later(vm.clone(), transfer, request.to.clone());
                Err(HostError::Undecided {
                    vm: vm.clone(),
                    to: to.to_string(),
                })
            }
        }
    }

    pub(super) async fn move_step(&self, vm: &VmName, step: MoveStep) -> Result<(), HostError> {
        self.ask_vm(vm, |reply| VmMsg::Move { step, reply }).await
    }

    async fn move_out(&self, moving: &mut Moving<'_>) -> Result<Moved, Failed> {
        let (vm, transfer) = (&moving.request.vm, moving.transfer);
        self.change_layers(vm, LayerChange::HoldAll { transfer }).await?;
        {
            let disk = self.plane().layered(vm)?;
            let live = disk.tree().live();
            self.send_layers(moving, &disk, |layer| layer != live).await?;
        }
        moving.phase(Phase::Stopping);
        let to = moving.request.to.clone();
        self.move_step(vm, MoveStep::Leave { transfer, to }).await?;
        self.stop_vm(vm, false).await?;
        self.wait_for_front_ends(moving).await?;
        let disk = self.plane().layered(vm)?;
        let stopped = Instant::now();
        self.move_step(vm, MoveStep::Fence).await?;
        self.fence(vm, transfer, &disk).await?;
        moving.phase(Phase::Stopped);
        self.send_layers(moving, &disk, |_| true).await?;
        let layers = disk.tree().shipped().encode();
        drop(disk);
        moving.check_cancelled()?;
        moving.phase(Phase::Taking);
        let request = self.take_request(moving, layers)?;
        self.move_step(vm, MoveStep::Ask).await?;
        let trouble = self.give_away(moving, request).await?;
        Ok(Moved {
            shipped: moving.shipped,
            stopped: stopped.elapsed(),
            was_there: false,
            trouble,
        })
    }

    /// Nobody writes to the disk any more, and nobody else reads it.
    async fn fence(&self, vm: &VmName, transfer: u64, disk: &LayeredDisk) -> Result<(), HostError> {
        let layers = |source| HostError::Layers {
            vm: vm.clone(),
            host: self.shared.host().to_string(),
            source: Box::new(source),
        };
        disk.fence().await.map_err(layers)?;
        match disk.tree().held_by_another(transfer) {
            true => Err(layers(TreeError::Held.into())),
            false => Ok(()),
        }
    }

    async fn wait_for_front_ends(&self, moving: &Moving<'_>) -> Result<(), HostError> {
        let vm = &moving.request.vm;
        let until = Instant::now() + FRONT_END_LIMIT;
        loop {
            let sessions = self.plane().disk_stats(vm).unwrap_or_default().sessions;
            if sessions == 0 {
                return Ok(());
            }
            if Instant::now() >= until {
                let vm = vm.clone();
                return Err(HostError::DiskInUse { vm, sessions });
            }
            tokio::select! {
                () = moving.cancel.cancelled() => return moving.check_cancelled(),
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }

    /// Ships the layers that are meant and not there yet.
    async fn send_layers(
        &self,
        moving: &mut Moving<'_>,
        disk: &LayeredDisk,
        meant: impl Fn(LayerId) -> bool,
    ) -> Result<(), HostError> {
        let vm = &moving.request.vm;
        let desired = self.desired();
        let state = desired.disks.get(vm).ok_or_else(|| self.shared.stopping())?;
        let runs = state.start.is_some() || self.report(vm).await.running.is_some();
        let mut layers = Vec::new();
        let mut total = 0;
        for &id in disk.tree().layers().keys() {
            if !meant(id) || moving.sent.contains_key(&(id + SHIFT)) {
                continue;
            }
            let layer = disk.alone(id).ok_or_else(|| self.shared.stopping())?;
            let layer = Arc::new(layer);
            let blocks = self.count(&layer).await?;
            total += blocks.0 * BLOCK;
            layers.push((id + SHIFT, layer, blocks));
        }
        let mut before = moving.shipped.data_bytes;
        moving
            .progress
            .send_modify(|progress| progress.total_bytes = before + total);
        for (layer, disk, blocks) in layers {
            moving.check_cancelled()?;
            let mut parcel = Parcel {
                to: &moving.request.to,
                what: moving.what(),
                header: v1::DiskHeader {
                    transfer: moving.transfer,
                    data_bytes: total,
                    layer: Some(layer),
                    runs,
                    ..header(vm, state)
                },
                end: v1::DiskEnd {
                    data_blocks: blocks.0,
                    zero_blocks: blocks.1,
                },
                disk,
                progress: moving.progress,
                before,
                cancel: moving.cancel,
                shipped: Shipped::default(),
                heard: false,
            };
            self.send(&mut parcel).await?;
            let Shipped {
                sent_bytes, resumed, ..
            } = parcel.shipped;
            moving.shipped.sent_bytes += sent_bytes;
            moving.shipped.resumed += resumed;
            moving.sent.insert(layer, blocks);
            let bytes = blocks.0 * BLOCK;
            (before, total) = (before + bytes, total - bytes);
        }
        moving.shipped.data_bytes = before;
        Ok(())
    }

    fn take_request(&self, moving: &Moving<'_>, layers: Vec<u8>) -> Result<v1::TakeVmRequest, HostError> {
        let vm = &moving.request.vm;
        let desired = self.desired();
        let state = desired.disks.get(vm).ok_or_else(|| self.shared.stopping())?;
        let v1::DiskHeader {
            image, digest, bytes, ..
        } = header(vm, state);
        let run = state.start.as_deref().map(serde_json::to_vec).transpose();
        let run = run.map_err(|error| HostError::Invalid(error.to_string()))?;
        let ends = moving.sent.iter().map(|(&layer, blocks)| v1::LayerEnd {
            layer,
            data_blocks: blocks.0,
            zero_blocks: blocks.1,
        });
        Ok(v1::TakeVmRequest {
            vm: vm.to_string(),
            image,
            digest,
            bytes,
            transfer: moving.transfer,
            instance: state.instance.to_vec(),
            device: state.device,
            limit_bytes: state.limit_bytes.unwrap_or(0),
            secret: self.disk_secret(vm).map(|secret| v1::DiskSecret {
                user: Iqn::of_vm(vm).to_string(),
                secret,
            }),
            layers,
            ends: ends.collect(),
            run: run.unwrap_or_default(),
            source: self.shared.host().to_string(),
            source_address: self.shared.settings.agent_address.clone(),
        })
    }

    /// Gives it to the other host. That it took it, it also tells by itself, where its answer is lost.
    async fn give_away(&self, moving: &Moving<'_>, request: v1::TakeVmRequest) -> Result<String, Failed> {
        tokio::select! {
            () = self.has_gone(&moving.request.vm, moving.transfer) => Ok(String::new()),
            given = self.give(moving, request) => given,
        }
    }

    /// Ends once it is known here that another host took it.
    async fn has_gone(&self, vm: &VmName, transfer: u64) {
        loop {
            let desired = self.desired();
            if !desired
                .disks
                .get(vm)
                .is_some_and(|disk| disk.is_asked_by(transfer))
            {
                return;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Asks the other host to take it, and where no answer comes, whether it did.
    async fn give(&self, moving: &Moving<'_>, request: v1::TakeVmRequest) -> Result<String, Failed> {
        let (vm, to) = (&moving.request.vm, &moving.request.to);
        let until = Instant::now() + PATIENCE;
        let refused = loop {
            let error = match self.ask_to_take(to, &request).await {
                Ok(trouble) => return Ok(trouble),
                Err(error) => error,
            };
            tracing::warn!(%vm, to = %to.0, error = %chain(&error), "the VM was not taken, or the answer was lost");
            if !error.may_be_gone_on_with() || Instant::now() >= until {
                break error;
            }
            self.pause(PAUSE).await.map_err(Failed::Undecided)?;
        };
        let until = Instant::now() + PATIENCE;
        loop {
            match self.ask_whether(vm, moving.transfer, to).await {
                Ok(true) => return Ok(String::new()),
                Ok(false) => return Err(Failed::Before(refused)),
                Err(error) if Instant::now() >= until => return Err(Failed::Undecided(error)),
                Err(_) => self.pause(PAUSE).await.map_err(Failed::Undecided)?,
            }
        }
    }

    pub(super) async fn pause(&self, pause: Duration) -> Result<(), HostError> {
        tokio::select! {
            () = self.shared.stop.cancelled() => Err(self.shared.stopping()),
            () = tokio::time::sleep(pause) => Ok(()),
        }
    }

    async fn ask_to_take(
        &self,
        to: &(HostName, String),
        request: &v1::TakeVmRequest,
    ) -> Result<String, HostError> {
        let mut client = self.reach(to).await?;
        let answer = tokio::time::timeout(TAKE_LIMIT, client.take_vm(request.clone())).await;
        let silent = |_| tonic::Status::unavailable("it did not say whether it took the VM");
        let answer = answer.map_err(silent).and_then(|answer| answer);
        answer
            .map(|answer| answer.into_inner().trouble)
            .map_err(|status| peer(&to.0, status))
    }

    /// Whether the other host took it; where it says that it did not, it never will.
    pub(super) async fn ask_whether(
        &self,
        vm: &VmName,
        transfer: u64,
        to: &(HostName, String),
    ) -> Result<bool, HostError> {
        let mut client = self.reach(to).await?;
        let request = v1::SettleVmRequest {
            vm: vm.to_string(),
            transfer,
        };
        let answer = tokio::time::timeout(TAKE_LIMIT, client.settle_vm(request)).await;
        let silent = |_| tonic::Status::unavailable("it did not say whether it took the VM");
        let answer = answer.map_err(silent).and_then(|answer| answer);
        answer
            .map(|answer| answer.into_inner().taken)
            .map_err(|status| peer(&to.0, status))
    }

    /// The other host has spoken, or was never asked. What does not work now is tried again until the agent ends; its successor goes on.
    pub(super) async fn end_move(&self, vm: &VmName, transfer: u64, taken: bool) {
        let step = move || match taken {
            true => MoveStep::Gone { transfer },
            false => MoveStep::Stay { transfer },
        };
        let Err(error) = self.move_step(vm, step()).await else {
            return;
        };
        tracing::error!(%vm, taken, error = %chain(&error), "the end of a move does not work yet");
        let (host, vm) = (self.clone(), vm.clone());
        self.shared.tasks.spawn(async move {
            let mut pause = PAUSE;
            while host.pause(pause).await.is_ok() {
                match host.move_step(&vm, step()).await {
                    Ok(()) => return,
                    Err(error) => {
                        tracing::warn!(%vm, taken, error = %chain(&error), "the end of a move does not work yet");
                    }
                }
                pause = LONGEST_PAUSE.min(pause * 2);
            }
        });
    }

    /// At the start: what a predecessor asked is asked again.
    pub(super) fn take_up_moves(&self) {
        for (vm, disk) in &self.desired().disks {
            if let Some(Move::Leaving {
                transfer,
                to,
                address,
                stage: Stage::Asked,
            }) = disk.moving.clone()
            {
                self.ask_later(vm.clone(), transfer, (to, address));
            }
            self.tell_old_host(vm);
        }
    }
}

impl HostError {
    /// What is said of a VM that is on its way.
    pub(super) fn of_move(vm: &VmName, host: &HostName, disk: &DiskState) -> Option<Self> {
        let vm = vm.clone();
        let from = || {
            disk.from
                .as_ref()
                .map(|from| from.host.to_string())
                .unwrap_or_default()
        };
        Some(match disk.moving.as_ref()? {
            Move::Unsure => Self::Unsure { vm, from: from() },
            Move::Lost => Self::Lost {
                vm,
                from: from(),
                host: host.to_string(),
            },
            Move::Arriving => Self::Arriving {
                vm,
                host: host.to_string(),
            },
            Move::Leaving {
                to,
                stage: Stage::Asked,
                ..
            } => Self::Undecided {
                vm,
                to: to.to_string(),
            },
            Move::Leaving { to, .. } => Self::Moving {
                vm,
                to: to.to_string(),
            },
        })
    }
}
