//! The owner of one VM on this host: its disk, and the QEMU that runs on it.
//!
//! One task for each VM, from the first message until its disk is gone. QEMU is a process of its own that outlives the
//! agent; after a restart the owner finds it again. Waiting for a guest (to be ready, to shut down) goes on beside the
//! messages, so that a VM that hangs can be stopped at any time.

mod bury;
mod disk;
mod frozen;
mod moving;
mod run;
mod taken;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use treeboot_hypervisor::{AdoptError, RunningVm, StopMode};
use treeboot_types::{ImageId, ImageRef, SnapshotName, VmName};

use super::base::Reply;
use super::receive::Received;
use super::report::{READY_LIMIT, StartRequest, VmReport, VmRun};
use super::take::Taking;
use super::{DiskOptions, Host, HostError, Shared, chain, is_running, limits, reach_error};
use crate::desired::VmState;
use crate::plane::Scope;
use crate::stack::{Content, LayerChange};

pub use frozen::Freeze;
pub(super) use frozen::Held;
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
    Snapshot {
        snapshot: SnapshotName,
        freeze: Freeze,
        reply: Reply<Held>,
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
    /// Another host has taken it by this transfer. Answered with whether that is void.
    Taken {
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
    /// Ends when the guest goes on that held its file systems still.
    thawing: Option<Waiting<()>>,
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
    Thawed,
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
        if let Err(error) = self.end_if_lost().await {
            tracing::error!(vm = %self.vm, error = %chain(&error), "a VM that is another host's does not end");
        }
        self.find_frozen().await;
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
                Next::Thawed => self.thawed().await,
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
                self.stop_as_asked(force, reply).await;
                false
            }
            VmMsg::Layers { change, reply } => {
                let _ = reply.send(self.change_layers(change).await);
                false
            }
            VmMsg::Snapshot {
                snapshot,
                freeze,
                reply,
            } => {
                let _ = reply.send(self.snapshot(snapshot, freeze).await);
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
            VmMsg::Taken { transfer, reply } => {
                let _ = reply.send(self.was_taken(transfer).await);
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
        match self.check_settled() {
            Ok(()) => {}
            // It may have been lost before it was served once.
            Err(HostError::Lost { .. }) => self.shared.applier.plane.discard(&self.vm, None).await?,
            Err(error) => return Err(error),
        }
        if let Some(run) = self.run.take() {
            run.vm.stop(StopMode::Quit).await?;
            for reply in run.waiting {
                let _ = reply.send(Ok(()));
            }
        }
        self.delete_disk_unless_used(keep_base).await?;
        self.forget_run().await?;
        self.report.send_replace(VmReport::absent(self.vm.clone()));
        self.shared.board.changed.notify_one();
        tracing::info!(vm = %self.vm, "destroyed");
        Ok(())
    }

    pub(super) fn run_dir(&self) -> std::path::PathBuf {
        self.host.run_dir(&self.vm)
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
    let thawing = async {
        match &mut run.thawing {
            Some(thawing) => thawing.await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        result = stopping => Next::Stopped(result),
        result = ready => Next::Ready(result),
        () = &mut run.ended => Next::Ended,
        () = thawing => Next::Thawed,
        message = inbox.recv() => Next::Message(message),
    }
}
