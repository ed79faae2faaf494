//! The end of a move that is not heard: the other host is asked on, wherever it is by then, and a person may speak for one that is gone for
//! good.
//!
//! What keeps a VM from running twice then: whoever took a VM tells the host that it came from until that host answers, and remembers that
//! it did not yet. The answer may be that the VM was taken back. An agent that starts with a VM of which it does not know that serves it to
//! nobody until it does ([`Move::Unsure`]). Deliberately absent: any clock that decides.

use std::time::Duration;

use tokio::time::Instant;
use treeboot_proto::v1;
use treeboot_types::{HostName, VmName};

use super::migrate::LONGEST_PAUSE;
use super::ship::{PAUSE, TAKE_LIMIT, peer};
use super::vm::{MoveStep, VmMsg};
use super::{Host, HostError, chain};
use crate::desired::{Move, OldHost, Stage};

/// How long a host that is said to be gone may take to say that it is not.
const LAST_ASKING_LIMIT: Duration = Duration::from_secs(10);
/// How long it is waited for a host that has only to hear that a VM has gone, and how often it is looked.
const NEWS_LIMIT: Duration = Duration::from_secs(2);
const LOOK: Duration = Duration::from_millis(5);
/// After how many attempts in vain the coordinator is asked where the host is now.
const ATTEMPTS_AT_ONE_ADDRESS: u32 = 3;

/// How a VM was taken back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TakenBack {
    /// It was here, and nothing was to be done.
    WasHere,
    /// The other host answered: it had not taken it, and never will.
    ByItsWord,
    /// It did not answer. Its copy, if there is one, counts no more.
    ByForce,
}

impl Host {
    /// Where a host is reached now, as far as the coordinator knows; else where it was.
    async fn new_address(&self, (host, address): (HostName, String)) -> (HostName, String) {
        let record = self.shared.link.host(&host).await;
        let now = record.ok().flatten().and_then(|record| record.info);
        match now.map(|info| info.agent_address) {
            Some(now) if !now.is_empty() && now != address => {
                tracing::info!(%host, old = %address, new = %now, "the host has another address");
                (host, now)
            }
            _ => (host, address),
        }
    }

    /// Asks until there is an answer, and acts on it.
    pub(super) fn ask_later(&self, vm: VmName, transfer: u64, to: (HostName, String)) {
        let host = self.clone();
        self.shared.tasks.spawn(async move {
            let (mut to, mut pause) = (to, PAUSE);
            for attempt in 1u32.. {
                let asked = tokio::select! {
                    () = host.shared.stop.cancelled() => return,
                    asked = host.ask_whether(&vm, transfer, &to) => asked,
                };
                match asked {
                    Ok(taken) => {
                        tracing::info!(%vm, to = %to.0, taken, "the other host has said whether it took the VM");
                        return host.end_move(&vm, transfer, taken).await;
                    }
                    Err(error) => {
                        tracing::debug!(%vm, to = %to.0, error = %chain(&error), "no word yet whether the VM was taken");
                    }
                }
                if host.pause(pause).await.is_err() {
                    return;
                }
                let asked = host.desired().disks.get(&vm).is_some_and(|disk| disk.is_asked_by(transfer));
                if !asked {
                    // It was heard otherwise, or taken back.
                    return;
                }
                if attempt % ATTEMPTS_AT_ONE_ADDRESS == 0 {
                    to = host.new_address(to).await;
                }
                pause = LONGEST_PAUSE.min(pause * 2);
            }
        });
    }

    /// Tells the host that a VM came from, until it answers; nothing is to be done where it did.
    pub(super) fn tell_old_host(&self, vm: &VmName) {
        let desired = self.desired();
        let disk = desired.disks.get(vm);
        let told = disk.filter(|disk| !disk.doomed && matches!(disk.moving, None | Some(Move::Unsure)));
        let Some((transfer, from)) = told.and_then(|disk| disk.transfer.zip(disk.from.clone())) else {
            return;
        };
        let (host, vm) = (self.clone(), vm.clone());
        self.shared.tasks.spawn(async move {
            let OldHost { host: from, address } = from;
            let (mut from, mut pause) = ((from, address), PAUSE);
            for attempt in 1u32.. {
                let answered = tokio::select! {
                    () = host.shared.stop.cancelled() => return,
                    told = host.tell_taken(&vm, transfer, &from) => told,
                };
                let ended = match answered {
                    Ok(true) => host.move_step(&vm, MoveStep::Lose { transfer }).await,
                    Ok(false) => host.move_step(&vm, MoveStep::Keep { transfer }).await,
                    Err(error) => Err(error),
                };
                match ended {
                    Ok(()) => return,
                    Err(error) => {
                        tracing::debug!(%vm, from = %from.0, error = %chain(&error), "the host that the VM came from does not know so yet");
                    }
                }
                if host.pause(pause).await.is_err() {
                    return;
                }
                if attempt % ATTEMPTS_AT_ONE_ADDRESS == 0 {
                    from = host.new_address(from).await;
                }
                pause = LONGEST_PAUSE.min(pause * 2);
            }
        });
    }

    /// A VM that has just come: a moment later the host that it came from knows so.
    ///
    /// # Errors
    /// It does not say so.
    pub(super) async fn wait_for_old_host(&self, vm: &VmName) -> Result<(), HostError> {
        let until = Instant::now() + NEWS_LIMIT;
        loop {
            let desired = self.desired();
            let Some(from) = desired.disks.get(vm).and_then(|disk| disk.from.clone()) else {
                return Ok(());
            };
            if Instant::now() >= until {
                return Err(HostError::Unsure {
                    vm: vm.clone(),
                    from: from.host.to_string(),
                });
            }
            self.pause(LOOK).await?;
        }
    }

    /// At the start, before anybody asks for anything: hosts that answer at once say whose the VMs are that came from them.
    pub(super) async fn hear_from_old_hosts(&self) {
        let until = Instant::now() + NEWS_LIMIT;
        let unsure = || {
            let desired = self.desired();
            desired
                .disks
                .values()
                .any(|disk| disk.moving == Some(Move::Unsure))
        };
        while unsure() && Instant::now() < until && self.pause(LOOK).await.is_ok() {}
    }

    /// Whether the host that a VM came from took it back.
    async fn tell_taken(
        &self,
        vm: &VmName,
        transfer: u64,
        from: &(HostName, String),
    ) -> Result<bool, HostError> {
        let mut client = self.reach(from).await?;
        let request = v1::VmTakenRequest {
            vm: vm.to_string(),
            transfer,
        };
        let answer = tokio::time::timeout(TAKE_LIMIT, client.vm_taken(request)).await;
        let silent = |_| tonic::Status::unavailable("it did not say whether it took the VM back");
        match answer.map_err(silent).and_then(|answer| answer) {
            Ok(answer) => Ok(answer.into_inner().taken_back),
            // An agent of a version that takes nothing back.
            Err(status) if status.code() == tonic::Code::Unimplemented => Ok(false),
            Err(status) => Err(peer(&from.0, status)),
        }
    }

    /// Another host took a VM by this transfer. Returns whether it was taken back from it.
    ///
    /// # Errors
    /// [`HostError`]; it is to be told again.
    pub async fn vm_taken(&self, request: v1::VmTakenRequest) -> Result<bool, HostError> {
        let vm = VmName::new(&request.vm).map_err(|error| HostError::Invalid(error.to_string()))?;
        let transfer = request.transfer;
        self.ask_vm(&vm, |reply| VmMsg::Taken { transfer, reply }).await
    }

    /// Makes a VM this host's that moved to or from a host which is gone for good, on a person's word. That host is asked once more.
    ///
    /// # Errors
    /// The host answers that it took the VM, or is not gone; or [`HostError`].
    pub async fn take_back(&self, vm: &VmName, gone: &HostName) -> Result<TakenBack, HostError> {
        self.known(vm)?;
        if self.shared.moves.is_moving(vm) {
            return Err(HostError::Moving {
                vm: vm.clone(),
                to: gone.to_string(),
            });
        }
        let desired = self.desired();
        let disk = desired.disks.get(vm).filter(|disk| !disk.doomed);
        let disk = disk.ok_or_else(|| HostError::NoDisk {
            vm: vm.clone(),
            host: self.shared.host().to_string(),
        })?;
        let step = match (&disk.moving, &disk.from) {
            (
                Some(Move::Leaving {
                    transfer,
                    to,
                    address,
                    stage: Stage::Asked,
                }),
                _,
            ) => {
                self.check_named(vm, to, gone)?;
                let to = (to.clone(), address.clone());
                let last = self.ask_whether(vm, *transfer, &to);
                if let Ok(Ok(taken)) = tokio::time::timeout(LAST_ASKING_LIMIT, last).await {
                    self.end_move(vm, *transfer, taken).await;
                    return match taken {
                        true => Err(HostError::WasTaken {
                            vm: vm.clone(),
                            to: gone.to_string(),
                        }),
                        false => Ok(TakenBack::ByItsWord),
                    };
                }
                MoveStep::TakeBack { transfer: *transfer }
            }
            (None | Some(Move::Unsure), Some(from)) => {
                self.check_named(vm, &from.host, gone)?;
                MoveStep::Keep {
                    transfer: disk.transfer.unwrap_or_default(),
                }
            }
            (None, None) => return Ok(TakenBack::WasHere),
            (Some(_), _) => {
                let error = HostError::of_move(vm, self.shared.host(), disk);
                return Err(error.unwrap_or_else(|| self.shared.stopping()));
            }
        };
        // Where the coordinator is away, too, there is the person's word alone.
        if let Ok(Some(record)) = self.shared.link.host(gone).await
            && record.connected
        {
            return Err(HostError::NotGone {
                vm: vm.clone(),
                host: gone.to_string(),
            });
        }
        let left = match step {
            MoveStep::TakeBack { transfer } => Some(transfer),
            _ => None,
        };
        self.move_step(vm, step).await?;
        if let Some(transfer) = left {
            // It is served, and runs again if it ran; what does not work of that now is tried again.
            self.end_move(vm, transfer, false).await;
        }
        tracing::warn!(%vm, %gone, "a person says that the host is gone for good: the VM is this host's");
        Ok(TakenBack::ByForce)
    }

    fn check_named(&self, vm: &VmName, on: &HostName, gone: &HostName) -> Result<(), HostError> {
        match on == gone {
            true => Ok(()),
            false => Err(HostError::OtherHost {
                vm: vm.clone(),
                on: on.to_string(),
                gone: gone.to_string(),
            }),
        }
    }
}
