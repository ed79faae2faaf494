//! The owner of one VM on this host: its disk, and the QEMU that runs on it.
//!
//! One task for each VM, from the first message until its disk is gone. QEMU is a process of its own that outlives the
//! agent; after a restart the owner finds it again. Waiting for a guest (to be ready, to shut down) goes on beside the
//! messages, so that a VM that hangs can be stopped at any time.

mod bury;
mod disk;
mod moving;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use treeboot_hypervisor::{Acceleration, AdoptError, DiskSource, Instance, RunningVm, StopMode, VmSpec};
use treeboot_types::{ImageId, ImageRef, Iqn, VmName};

use super::base::{BaseMsg, Reply};
use super::receive::Received;
use super::report::{READY_LIMIT, STATS_LIMIT, StartRequest, VmReport, VmRun};
use super::take::Taking;
use super::{DiskOptions, Host, HostError, Shared, chain, is_running, limits, reach_error};
use crate::desired::{Change, DiskState, VmState};
use crate::plane::{DiskPlace, Scope};
use crate::stack::{Content, LayerChange};

pub(super) use moving::MoveStep;

/// Messages that may wait for one VM's owner.
const INBOX: usize = 16;
/// How long a guest may take to shut down before it is ended.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(30);
pub(super) enum VmMsg {
    /// `known`: what the image is, where whoever asks has found it out already.
    Create {
        image: ImageRef,
        known: Option<(ImageId, Content)>,
        options: DiskOptions,
        reply: Reply<()>,
    },
    Destroy {
        keep_base: bool,
        reply: Reply<()>,
    },
    Start {
        request: Box<StartRequest>,
        reply: Reply<()>,
    },
    Stop {
        force: bool,
        reply: Reply<()>,
    },
    Layers {
        change: LayerChange,
        reply: Reply<()>,
    },
    Adopt {
        disk: Received,
        reply: Reply<()>,
    },
    /// Limits what the VM writes, or does not.
    Limit {
        bytes: Option<u64>,
        reply: Reply<()>,
    },
    /// Removes what nobody claims of the VM's name.
    Bury {
        kind: &'static str,
        reply: Reply<()>,
    },
    /// A step of the VM's way to another host.
    Move {
        step: MoveStep,
        reply: Reply<()>,
    },
    /// It comes from another host. Answered with what does not work of it.
    Take {
        taking: Box<Taking>,
        reply: Reply<String>,
    },
    /// Whether it came by this transfer; if not, it never will.
    Settle {
        transfer: u64,
        reply: Reply<bool>,
    },
}

/// The way to an owner.
pub(super) struct VmHandle {
    pub(super) messages: mpsc::Sender<VmMsg>,
    pub(super) report: watch::Receiver<VmReport>,
}

type Waiting<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// A run of QEMU, with what is being waited for.
pub(super) struct Run {
    pub(super) vm: Arc<RunningVm>,
    /// Ends when the guest is ready, or will not be.
    ready: Option<Waiting<Result<(), String>>>,
    /// Ends with QEMU.
    ended: Waiting<()>,
    /// A shutdown under way, and who waits for it.
    stopping: Option<Waiting<Result<(), HostError>>>,
    waiting: Vec<Reply<()>>,
}

pub(super) struct VmOwner {
    pub(super) host: Host,
    pub(super) shared: Arc<Shared>,
    pub(super) vm: VmName,
    pub(super) report: watch::Sender<VmReport>,
    pub(super) run: Option<Run>,
}

/// What the owner's loop does next.
enum Next {
    Message(Option<VmMsg>),
    Ready(Result<(), String>),
    Ended,
    Stopped(Result<(), HostError>),
}

impl VmOwner {
    pub(super) fn start(host: &Host, vm: VmName) -> VmHandle {
        let (messages, inbox) = mpsc::channel(INBOX);
        let mut first = VmReport::absent(vm.clone());
        let desired = host.desired();
        first.image = desired.disks.get(&vm).map(|disk| disk.image.clone());
        first.run = match desired.vms.get(&vm) {
            None => VmRun::Absent,
            Some(VmState::Running) => VmRun::Starting,
            Some(VmState::Stopped) => VmRun::Stopped,
            Some(VmState::Failed { why }) => VmRun::Failed(why.clone()),
        };
        let (report, watched) = watch::channel(first);
        let owner = Self {
            host: host.clone(),
            shared: Arc::clone(&host.shared),
            vm,
            report,
            run: None,
        };
        host.shared.tasks.spawn(owner.run(inbox));
        VmHandle {
            messages,
            report: watched,
        }
    }

    async fn run(mut self, mut inbox: mpsc::Receiver<VmMsg>) {
        let stop = self.shared.stop.clone();
        self.find_again().await;
        self.find_start().await;
        loop {
            let next = tokio::select! {
                () = stop.cancelled() => return,
                next = next(&mut inbox, self.run.as_mut()) => next,
            };
            match next {
                Next::Message(None) => return,
                Next::Message(Some(message)) => {
                    if self.take(message).await {
                        // The disk is gone, and nobody new waits: the name is free.
                        inbox.close();
                    }
                }
                Next::Ready(result) => self.ready(result).await,
                Next::Ended => self.ended().await,
                Next::Stopped(result) => self.stopped(result).await,
            }
        }
    }

    /// After the agent's restart: QEMU runs on, or has ended meanwhile.
    async fn find_again(&mut self) {
        if self.shared.journal().desired().disks.contains_key(&self.vm) {
            // A disk of a time before there was an authority.
            self.shared.settings.keys.make_disk(&self.vm).await;
            self.release_layers().await;
            self.tidy_layers();
        }
        if !is_running(self.shared.journal().desired().vms.get(&self.vm)) {
            return;
        }
        match RunningVm::adopt(&self.run_dir()) {
            Ok(running) => {
                tracing::info!(vm = %self.vm, pid = running.pid(), "found again");
                self.watch(running, READY_LIMIT, tokio::time::Instant::now());
            }
            Err(AdoptError::Nothing { .. } | AdoptError::NotRunning { .. }) => {
                self.note(VmState::Failed {
                    why: "QEMU ended while the agent was away; start the VM again".into(),
                })
                .await;
            }
            Err(error) => {
                let why = chain(&error);
                self.note(VmState::Failed { why }).await;
            }
        }
    }

    /// Whether the VM's name is free after the message.
    async fn take(&mut self, message: VmMsg) -> bool {
        match message {
            VmMsg::Create {
                image,
                known,
                options,
                reply,
            } => {
                let result = self.create(&image, known, options).await;
                let failed = result.is_err();
                let _ = reply.send(result);
                failed && self.is_nobody()
            }
            VmMsg::Destroy { keep_base, reply } => {
                let result = self.destroy(keep_base).await;
                let gone = result.is_ok();
                let _ = reply.send(result);
                gone
            }
            VmMsg::Start { request, reply } => {
                let _ = reply.send(self.start_run(*request).await);
                false
            }
            VmMsg::Stop { force, reply } => {
                self.stop(force, reply).await;
                false
            }
            VmMsg::Layers { change, reply } => {
                let _ = reply.send(self.change_layers(change).await);
                false
            }
            VmMsg::Adopt { disk, reply } => {
                let _ = reply.send(self.adopt(disk).await);
                self.is_nobody()
            }
            VmMsg::Move { step, reply } => {
                let _ = reply.send(self.step_of_move(step).await);
                self.is_nobody()
            }
            VmMsg::Take { taking, reply } => {
                let _ = reply.send(self.take_over(*taking).await);
                self.is_nobody()
            }
            VmMsg::Settle { transfer, reply } => {
                let _ = reply.send(self.settle(transfer).await);
                self.is_nobody()
            }
            VmMsg::Limit { bytes, reply } => {
                let _ = reply.send(self.limit(bytes).await);
                self.is_nobody()
            }
            VmMsg::Bury { kind, reply } => {
                let _ = reply.send(self.bury(kind).await);
                self.is_nobody()
            }
        }
    }

    async fn create(
        &mut self,
        image: &ImageRef,
        known: Option<(ImageId, Content)>,
        options: DiskOptions,
    ) -> Result<(), HostError> {
        self.check_settled()?;
        let desired = self.shared.journal().desired();
        if let Some(there) = desired.disks.get(&self.vm) {
            if there.doomed {
                self.delete_disk(false).await?;
            } else {
                let same = there.image.name == image.name
                    && image.version.is_none_or(|version| version == there.image.version);
                if !same {
                    return Err(HostError::VmExists {
                        vm: self.vm.clone(),
                        host: self.shared.host().to_string(),
                        have: there.image.clone(),
                    });
                }
                limits::check_same(&self.vm, there, options)?;
                return self.have_device(there.clone(), options.device).await;
            }
        }
        let (image, content) = match known {
            Some(known) => known,
            None => self.host.resolve(image).await?,
        };
        self.make(image, content, options, None).await
    }

    pub(super) async fn reach_disk(&mut self) -> Result<(), HostError> {
        // Before it is served, so that nobody meets a disk whose secret is not known.
        self.shared.settings.keys.make_disk(&self.vm).await;
        let wanted = self.shared.journal().desired().wanted_disk(&self.vm);
        let reached = self
            .shared
            .applier
            .reach(&Scope::Disk(self.vm.clone()), &wanted)
            .await;
        reached.map_err(|source| reach_error("the disk", format_args!("VM '{}'", self.vm), source))
    }

    async fn destroy(&mut self, keep_base: bool) -> Result<(), HostError> {
        self.check_settled()?;
        if let Some(run) = self.run.take() {
            run.vm.stop(StopMode::Quit).await?;
            for reply in run.waiting {
                let _ = reply.send(Ok(()));
            }
        }
        self.delete_disk(keep_base).await?;
        self.forget_run().await?;
        self.report.send_replace(VmReport::absent(self.vm.clone()));
        self.shared.board.changed.notify_one();
        tracing::info!(vm = %self.vm, "destroyed");
        Ok(())
    }

    pub(super) async fn delete_disk(&mut self, keep_base: bool) -> Result<(), HostError> {
        let desired = self.shared.journal().desired();
        let Some(there) = desired.disks.get(&self.vm) else {
            return Ok(());
        };
        let (vm, image) = (self.vm.clone(), there.image.clone());
        if !there.doomed {
            let disk = DiskState {
                doomed: true,
                ..there.clone()
            };
            let vm = vm.clone();
            self.shared.journal().commit([Change::Disk { vm, disk }]).await?;
        }
        self.reach_disk().await?;
        self.shared.journal().commit([Change::DiskGone { vm }]).await?;
        self.shared.settings.keys.disk_gone(&self.vm).await;
        self.release(image, keep_base).await;
        Ok(())
    }

    async fn release(&mut self, image: ImageId, keep: bool) {
        if let Some(content) = self.host.content(&image) {
            let released = BaseMsg::Released { image, keep };
            // Where the agent ends now, the next start gives the base up.
            let _ = self.host.base(content.digest).send(released).await;
        }
    }

    pub(super) fn run_dir(&self) -> std::path::PathBuf {
        self.host.run_dir(&self.vm)
    }

    pub(super) async fn start_run(&mut self, request: StartRequest) -> Result<(), HostError> {
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
    fn watch(&mut self, running: RunningVm, limit: Duration, asked: tokio::time::Instant) {
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
            waiting: Vec::new(),
        });
        self.shared.board.changed.notify_one();
    }

    async fn ready(&mut self, result: Result<(), String>) {
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
    async fn ended(&mut self) {
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

    async fn stop(&mut self, force: bool, reply: Reply<()>) {
        let Some(run) = &mut self.run else {
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

    async fn stopped(&mut self, result: Result<(), HostError>) {
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
    async fn note(&mut self, state: VmState) {
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

async fn next(inbox: &mut mpsc::Receiver<VmMsg>, run: Option<&mut Run>) -> Next {
    let Some(run) = run else {
        return Next::Message(inbox.recv().await);
    };
    let ready = async {
        match &mut run.ready {
            Some(ready) => ready.await,
            None => std::future::pending().await,
        }
    };
    let stopping = async {
        match &mut run.stopping {
            Some(stopping) => stopping.await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        result = stopping => Next::Stopped(result),
        result = ready => Next::Ready(result),
        () = &mut run.ended => Next::Ended,
        message = inbox.recv() => Next::Message(message),
    }
}
