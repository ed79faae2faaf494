//! The QEMU of a VM, as its owner here starts, watches and ends it.

use std::sync::Arc;
use std::time::Duration;

use treeboot_hypervisor::{Acceleration, DiskSource, Instance, RunningVm, StopMode, VmSpec};
use treeboot_types::Iqn;

use super::{Run, SHUTDOWN_LIMIT, VmOwner};
use crate::desired::{Change, VmState};
use crate::host::base::Reply;
use crate::host::report::{STATS_LIMIT, StartRequest, VmRun};
use crate::host::{DiskOptions, HostError, chain};
use crate::plane::DiskPlace;

impl VmOwner {
    pub(in crate::host) async fn start_run(&mut self, request: StartRequest) -> Result<(), HostError> {
        let asked = tokio::time::Instant::now();
        self.check_settled()?;
        if self.run.as_ref().is_some_and(|run| !run.vm.ended()) {
            // It runs, as was asked.
            return Ok(());
        }
        let hypervisor = self.shared.hypervisor().await?;
        match (
            &request.image,
            self.shared.journal().desired().disks.get(&self.vm),
        ) {
            (Some(image), _) => {
                let options = self.host.with_own_limit(DiskOptions::default())?;
                self.create(image, None, options).await?;
            }
            (None, Some(disk)) if !disk.doomed => self.reach_disk().await?,
            (None, _) => {
                return Err(HostError::Invalid(format!(
                    "VM '{}' has no disk yet; name the image to make it of",
                    self.vm
                )));
            }
        }
        let desired = self.shared.journal().desired();
        let disk = desired
            .disks
            .get(&self.vm)
            .ok_or_else(|| self.shared.stopping())?;
        let spec = VmSpec {
            name: self.vm.clone(),
            instance: Instance(disk.instance),
            disk: match self.shared.applier.plane.disk_place(&self.vm)? {
                DiskPlace::Lun(url) => DiskSource::Iscsi {
                    url,
                    initiator: Iqn::of_vm(&self.vm),
                    secret_file: self.secret_file()?,
                },
                DiskPlace::Device(path) => DiskSource::Device { path },
            },
            memory_mib: request.memory_mib,
            cpus: request.cpus,
            seed: Some(request.seed),
            ready: request.ready,
            network: true,
            run_dir: self.run_dir(),
        };
        let acceleration = match hypervisor.acceleration {
            Acceleration::Kvm => "kvm",
            Acceleration::Tcg => "tcg",
        };
        let image = disk.image.clone();
        // Desired before it runs: a QEMU that nobody remembers would go on for ever.
        self.note(VmState::Running).await;
        self.report.send_modify(|report| {
            report.image = Some(image);
            report.acceleration = acceleration;
            report.run = VmRun::Starting;
            report.ready_us = 0;
        });
        match treeboot_hypervisor::start(&hypervisor, spec).await {
            Ok(running) => {
                tracing::info!(vm = %self.vm, pid = running.pid(), "started");
                self.watch(running, request.ready_limit, asked);
                Ok(())
            }
            Err(error) => {
                let why = chain(&error);
                self.note(VmState::Failed { why }).await;
                Err(error.into())
            }
        }
    }

    /// Looks after a QEMU that runs.
    pub(super) fn watch(&mut self, running: RunningVm, limit: Duration, asked: tokio::time::Instant) {
        let vm = Arc::new(running);
        let (reading, guarding, report) = (Arc::clone(&vm), Arc::clone(&vm), self.report.clone());
        let ready = async move {
            let ready = reading.wait_ready(limit).await.map_err(|error| chain(&error))?;
            tracing::debug!(seen = %ready, "ready");
            report.send_modify(|report| report.ready_us = asked.elapsed().as_micros() as u64);
            Ok(())
        };
        self.report.send_modify(|report| {
            report.run = VmRun::Starting;
            report.running = Some(Arc::clone(&vm));
        });
        self.run = Some(Run {
            vm,
            ready: Some(Box::pin(ready)),
            ended: Box::pin(async move { guarding.supervise().await }),
            stopping: None,
            thawing: None,
            waiting: Vec::new(),
        });
        self.shared.board.changed.notify_one();
    }

    pub(super) async fn ready(&mut self, result: Result<(), String>) {
        if let Some(run) = &mut self.run {
            run.ready = None;
        }
        match result {
            Ok(()) => {
                tracing::info!(vm = %self.vm, "ready");
                self.report.send_modify(|report| report.run = VmRun::Ready);
            }
            Err(why) => {
                tracing::warn!(vm = %self.vm, reason = %why, "not ready");
                self.report.send_modify(|report| report.run = VmRun::Failed(why));
            }
        }
    }

    /// QEMU ended by itself: the guest shut down, or QEMU was killed.
    pub(super) async fn ended(&mut self) {
        let Some(run) = self.run.take() else {
            return;
        };
        let starting = run.ready.is_some();
        for reply in run.waiting {
            let _ = reply.send(Ok(()));
        }
        let said = match &self.report.borrow().run {
            VmRun::Failed(why) if run.stopping.is_none() => Some(why.clone()),
            _ => None,
        };
        let state = if let Some(why) = said {
            VmState::Failed { why }
        } else if starting && run.stopping.is_none() {
            let why = match run.ready {
                // It says what QEMU's last words were.
                Some(ready) => ready.await.err(),
                None => None,
            };
            VmState::Failed {
                why: why.unwrap_or_else(|| "QEMU ended before the guest was ready".into()),
            }
        } else {
            VmState::Stopped
        };
        self.note(state).await;
    }

    pub(super) async fn stop(&mut self, force: bool, reply: Reply<()>) {
        let Some(run) = &mut self.run else {
            // An agent that was killed while it ended a QEMU left a run that seems to have failed.
            if let Some(VmState::Failed { .. }) = self.shared.journal().desired().vms.get(&self.vm) {
                self.note(VmState::Stopped).await;
            }
            let _ = reply.send(Ok(()));
            return;
        };
        run.waiting.push(reply);
        if run.stopping.is_some() && !force {
            return;
        }
        let (vm, report) = (Arc::clone(&run.vm), self.report.clone());
        let mode = if force {
            StopMode::Quit
        } else {
            StopMode::Graceful {
                limit: SHUTDOWN_LIMIT,
            }
        };
        run.stopping = Some(Box::pin(async move {
            // The counters go with QEMU.
            if let Ok(Ok(stats)) = tokio::time::timeout(STATS_LIMIT, vm.block_stats()).await {
                report.send_modify(|report| report.stats = stats);
            }
            vm.stop(mode).await.map(|_| ()).map_err(HostError::from)
        }));
    }

    pub(super) async fn stopped(&mut self, result: Result<(), HostError>) {
        let Some(mut run) = self.run.take() else {
            return;
        };
        let waiting = std::mem::take(&mut run.waiting);
        match result {
            Ok(()) => {
                self.note(VmState::Stopped).await;
                for reply in waiting {
                    let _ = reply.send(Ok(()));
                }
                self.find_start().await;
            }
            Err(error) => {
                run.stopping = None;
                let text = chain(&error);
                self.run = Some(run);
                for reply in waiting {
                    let _ = reply.send(Err(HostError::Invalid(text.clone())));
                }
            }
        }
    }

    /// Writes down how the run stands, and shows it.
    pub(super) async fn note(&mut self, state: VmState) {
        let run = match &state {
            VmState::Running => VmRun::Starting,
            VmState::Stopped => VmRun::Stopped,
            VmState::Failed { why } => VmRun::Failed(why.clone()),
        };
        tracing::info!(vm = %self.vm, ?state, "run");
        let vm = self.vm.clone();
        if let Err(error) = self.shared.journal().commit([Change::Vm { vm, state }]).await {
            tracing::error!(vm = %self.vm, error = %chain(&error), "the VM's run is not written down");
        }
        self.report.send_modify(|report| {
            if run != VmRun::Starting {
                report.running = None;
            }
            report.run = run;
        });
        self.shared.board.changed.notify_one();
    }
}
