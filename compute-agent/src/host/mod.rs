//! The host: who owns what, and the way to each owner.
//!
//! One task owns each content ([`base`]) and one each VM ([`vm`]); what is desired belongs to the journal. This module
//! finds or starts the owner of a thing and passes messages on; it holds no lock while it waits. Deliberately absent:
//! gRPC (that is `rpc`) and anything only one plane knows.

mod base;
mod cache;
mod error;
mod export;
mod layers;
mod limits;
mod many;
mod mend;
mod migrate;
mod receive;
mod reclaim;
mod remains;
mod report;
mod restore;
mod room;
mod secure;
mod ship;
mod stored;
mod take;
pub(crate) mod view;
mod vm;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OnceCell, mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use treeboot_hypervisor::{Hypervisor, ProbeError};
use treeboot_identity::Role;
use treeboot_types::{
    Attachment, Digest, HostInfo, HostName, Image, ImageId, ImageName, ImageRef, Labels, Portal, VmName,
};

use crate::apply::{Applier, ReachError};
use crate::desired::{Desired, VmState};
use crate::journal::Journal;
use crate::keys::Keys;
use crate::link::{Identity, Link, LinkEvent};
use crate::orphans::Ledger;
use crate::plane::{Plane, Scope};
use crate::stack::Content;

use base::{BaseMsg, BaseOwner, Hold};
use view::{Board, View};
use vm::{VmHandle, VmMsg};

pub use cache::{CacheChange, CacheView, CachedImage};
pub use error::{HostError, chain};
pub use export::{ExportRequest, Exported};
pub use layers::Snapshotted;
pub use limits::{DiskOptions, LimitLevel, Limited};
pub use migrate::{MigrateRequest, Moved};
pub use receive::{Begun, Receiving};
pub use reclaim::TakenBack;
pub use report::{MEMORY_MIB, READY_LIMIT, StartRequest, VmReport, VmRun};
pub use room::{Room, RoomLevel};
pub use ship::{CloneRequest, Phase, Progress, Shipped, Underway};
pub use stored::Imported;
pub use vm::Freeze;

/// How long a call waits for an attachment to be readable and registered. Levels of a cold tree become readable one
/// after the other within milliseconds each, so this is for parents that are down.
const ATTACH_LIMIT: Duration = Duration::from_secs(15);
/// How long the end of the agent waits for its tasks.
const END_LIMIT: Duration = Duration::from_secs(5);

/// What the host is told at its start.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Its name.
    pub name: HostName,
    /// Random, kept in the state directory.
    pub instance: String,
    /// Where VMs' run directories and the probe's result go.
    pub state_dir: PathBuf,
    /// Where VMs' writes go.
    pub deltas_dir: PathBuf,
    /// Where imports go; absent where the host is no origin.
    pub store_dir: Option<PathBuf>,
    /// The coordinator's URL.
    pub coordinator: String,
    /// How the coordinator is reached.
    pub dialer: treeboot_identity::tls::Dialer,
    /// The secrets of iSCSI.
    pub keys: Arc<Keys>,
    /// `host:port` of the Agent service, as others reach it.
    pub agent_address: String,
    /// Where it stands.
    pub labels: Labels,
    /// Its share of slots, from 1.
    pub weight: u32,
    /// The most bytes of blocks that a VM may write, where its disk was not given a limit of its own.
    pub delta_limit: Option<u64>,
}

/// What all owners share.
pub(crate) struct Shared {
    pub(crate) settings: Settings,
    pub(crate) applier: Applier,
    pub(crate) link: Link,
    pub(crate) board: Arc<Board>,
    pub(crate) portal: Portal,
    pub(crate) info: Arc<Mutex<HostInfo>>,
    pub(crate) tasks: TaskTracker,
    pub(crate) stop: CancellationToken,
    hypervisor: OnceCell<Result<Arc<Hypervisor>, Arc<ProbeError>>>,
    bases: Mutex<HashMap<Digest, mpsc::Sender<BaseMsg>>>,
    vms: Mutex<BTreeMap<VmName, VmHandle>>,
    imports: stored::Imports,
    /// Of VMs' writes, at the last look.
    room: Mutex<Option<Room>>,
    seats: receive::Seats,
    /// Since when nobody claims what is orphaned.
    orphans: Mutex<Ledger>,
    moves: migrate::Moves,
    /// Who may use what, as the coordinator said last.
    allowed: Mutex<BTreeSet<(ImageName, Role)>>,
}

/// The host. Clones share it.
#[derive(Clone)]
pub struct Host {
    shared: Arc<Shared>,
    started: tokio::time::Instant,
}

/// Why the agent must end by itself.
#[derive(Debug, thiserror::Error)]
#[error("the coordinator refuses this agent: {0}")]
pub struct Refused(pub String);

impl Shared {
    pub(crate) fn journal(&self) -> &Journal {
        &self.applier.journal
    }

    pub(crate) fn host(&self) -> &HostName {
        &self.settings.name
    }

    /// Brings one content to what is desired of it.
    pub(crate) async fn reach(&self, digest: Digest, what: &str) -> Result<(), HostError> {
        let wanted = self.journal().desired().wanted_of(digest);
        let reached = self.applier.reach(&Scope::Base(digest), &wanted).await;
        reached.map_err(|source| reach_error(what, digest.short(), source))
    }

    pub(crate) fn stopping(&self) -> HostError {
        HostError::Stopping {
            host: self.host().to_string(),
        }
    }

    /// The hypervisor, tried out at the first call.
    pub(crate) async fn hypervisor(&self) -> Result<Arc<Hypervisor>, HostError> {
        let probed = self
            .hypervisor
            .get_or_init(|| async {
                let probed = treeboot_hypervisor::probe(&self.settings.state_dir).await;
                probed
                    .and_then(|hypervisor| hypervisor.require_iscsi().map(|()| hypervisor))
                    .map(Arc::new)
                    .map_err(Arc::new)
            })
            .await;
        match probed {
            Ok(hypervisor) => Ok(Arc::clone(hypervisor)),
            Err(source) => Err(HostError::NoHypervisor {
                host: self.host().to_string(),
                source: Arc::clone(source),
            }),
        }
    }
}

fn reach_error(what: &str, name: impl ToString, source: ReachError) -> HostError {
    HostError::Reach {
        what: format!("{what} of {} failed", name.to_string()),
        source,
    }
}

impl Host {
    /// Serves again what the journal says, and only then speaks to the coordinator. Returns what ends the agent where the
    /// coordinator refuses it.
    ///
    /// # Errors
    /// The coordinator's address or the portal is none, or the journal refuses.
    pub async fn start(
        settings: Settings,
        plane: Arc<dyn Plane>,
        journal: Journal,
    ) -> Result<(Self, oneshot::Receiver<Refused>), HostError> {
        let applier = Applier { plane, journal };
        stored::find(&settings, &applier.journal).await?;
        restore::restore(&applier).await?;
        let portal = Portal::new(&applier.plane.portal()).map_err(|e| HostError::Invalid(e.to_string()))?;
        let info = Arc::new(Mutex::new(restore::host_info(&settings, applier.plane.as_ref())));
        let board = Arc::new(Board::default());
        let view = View {
            info: Arc::clone(&info),
            portal: portal.clone(),
            journal: applier.journal.clone(),
            board: Arc::clone(&board),
            plane: Arc::clone(&applier.plane),
        };
        let identity = Identity {
            host: settings.name.clone(),
            instance: settings.instance.clone(),
        };
        let stop = CancellationToken::new();
        let (link, events) = Link::start(
            &settings.coordinator,
            &settings.dialer,
            Arc::clone(&settings.keys),
            identity,
            view,
            stop.clone(),
        )?;
        let orphans = Mutex::new(Ledger::open(&settings.state_dir));
        let host = Self {
            shared: Arc::new(Shared {
                settings,
                orphans,
                applier,
                link,
                board,
                portal,
                info,
                tasks: TaskTracker::new(),
                stop,
                hypervisor: OnceCell::new(),
                bases: Mutex::default(),
                vms: Mutex::default(),
                imports: stored::Imports::default(),
                room: Mutex::default(),
                seats: receive::Seats::default(),
                moves: migrate::Moves::default(),
                allowed: Mutex::default(),
            }),
            started: tokio::time::Instant::now(),
        };
        host.take_up_arrivals().await;
        host.take_up_owners();
        host.take_up_moves();
        host.hear_from_old_hosts().await;
        let (refused, refusal) = oneshot::channel();
        let router = host.clone();
        host.shared
            .tasks
            .spawn(async move { router.route(events, refused).await });
        let rekeyed = host.clone();
        host.shared.tasks.spawn(async move { rekeyed.rekey().await });
        let prober = host.clone();
        host.shared.tasks.spawn(async move { prober.probe().await });
        host.shared.tasks.spawn(host.clone().watch());
        let doctor = host.clone();
        host.shared
            .tasks
            .spawn(async move { doctor.watch_orphans().await });
        Ok((host, refusal))
    }

    /// Owners for everything that is there already.
    fn take_up_owners(&self) {
        let desired = self.shared.journal().desired();
        for state in desired.images.values() {
            self.base(state.content.digest);
        }
        for vm in desired.disks.keys().chain(desired.vms.keys()) {
            self.vm(vm);
        }
    }

    /// Tries QEMU out, so that the coordinator and `host list` know before the first VM is started.
    async fn probe(&self) {
        let stop = self.shared.stop.clone();
        let runs_vms = tokio::select! {
            () = stop.cancelled() => return,
            probed = self.shared.hypervisor() => match probed {
                Ok(_) => true,
                Err(error) => {
                    tracing::info!(reason = %chain(&error), "this host runs no VMs");
                    false
                }
            }
        };
        self.shared.info.lock().runs_vms = runs_vms;
        self.shared.board.changed.notify_one();
    }

    async fn route(&self, mut events: mpsc::Receiver<LinkEvent>, refused: oneshot::Sender<Refused>) {
        let stop = self.shared.stop.clone();
        loop {
            let event = tokio::select! {
                () = stop.cancelled() => return,
                event = events.recv() => event,
            };
            match event {
                None => return,
                Some(LinkEvent::Refused { reason }) => {
                    let _ = refused.send(Refused(reason));
                    return;
                }
                Some(LinkEvent::Connected { epoch }) => {
                    stored::announce_all(self, epoch.incarnation);
                    let bases: Vec<_> = self.shared.bases.lock().values().cloned().collect();
                    for base in bases {
                        let _ = base.send(BaseMsg::Connected).await;
                    }
                }
                Some(LinkEvent::Placed(placement)) => {
                    let digest = placement.image.digest;
                    let _ = self.base(digest).send(BaseMsg::Placed(placement)).await;
                }
                Some(LinkEvent::Detach(unwanted)) => {
                    let Some(content) = self.content(&unwanted.image) else {
                        continue;
                    };
                    let message = BaseMsg::Unwanted(unwanted);
                    let _ = self.base(content.digest).send(message).await;
                }
            }
        }
    }

    fn base(&self, digest: Digest) -> mpsc::Sender<BaseMsg> {
        let mut bases = self.shared.bases.lock();
        let owner = bases
            .entry(digest)
            .or_insert_with(|| BaseOwner::start(&self.shared, digest));
        if owner.is_closed() {
            *owner = BaseOwner::start(&self.shared, digest);
        }
        owner.clone()
    }

    fn vm(&self, vm: &VmName) -> mpsc::Sender<VmMsg> {
        let mut vms = self.shared.vms.lock();
        match vms.get(vm) {
            Some(handle) if !handle.messages.is_closed() => handle.messages.clone(),
            _ => {
                let handle = vm::VmOwner::start(self, vm.clone());
                let messages = handle.messages.clone();
                vms.insert(vm.clone(), handle);
                messages
            }
        }
    }

    async fn ask_base<T>(
        &self,
        digest: Digest,
        message: impl FnOnce(base::Reply<T>) -> BaseMsg,
    ) -> Result<T, HostError> {
        let (reply, answer) = oneshot::channel();
        let sent = self.base(digest).send(message(reply)).await;
        sent.map_err(|_| self.shared.stopping())?;
        answer.await.map_err(|_| self.shared.stopping())?
    }

    async fn ask_vm<T>(
        &self,
        vm: &VmName,
        message: impl FnOnce(base::Reply<T>) -> VmMsg,
    ) -> Result<T, HostError> {
        let (reply, answer) = oneshot::channel();
        // An owner whose VM was just destroyed ends; the next one starts from what is desired then.
        let mut message = message(reply);
        loop {
            match self.vm(vm).send(message).await {
                Ok(()) => break,
                Err(_) if self.shared.stop.is_cancelled() => return Err(self.shared.stopping()),
                Err(mpsc::error::SendError(back)) => message = back,
            }
        }
        answer.await.map_err(|_| self.shared.stopping())?
    }

    fn content(&self, image: &ImageId) -> Option<Content> {
        self.desired().images.get(image).map(|state| state.content)
    }

    /// What is desired now.
    pub fn desired(&self) -> Arc<Desired> {
        self.shared.journal().desired()
    }

    /// What an image is: from what is here where its version is given, else from the coordinator.
    pub(super) async fn resolve(&self, image: &ImageRef) -> Result<(ImageId, Content), HostError> {
        if let Some(version) = image.version {
            let id = ImageId {
                name: image.name.clone(),
                version,
            };
            if let Some(content) = self.content(&id) {
                return Ok((id, content));
            }
        }
        let record: Image = self.shared.link.image(image).await?;
        let content = Content {
            digest: record.digest,
            bytes: record.bytes,
            chunk_bytes: record.chunk_bytes,
        };
        Ok((record.id, content))
    }

    /// Attaches an image for itself. Ends once it is registered.
    ///
    /// # Errors
    /// [`HostError`].
    pub async fn attach(&self, image: &ImageRef) -> Result<ImageId, HostError> {
        let (image, content) = self.resolve(image).await?;
        let attach = self.ask_base(content.digest, |reply| BaseMsg::Attach {
            image: image.clone(),
            content,
            hold: Hold::Pin,
            reply,
        });
        match tokio::time::timeout(ATTACH_LIMIT, attach).await {
            Ok(result) => result.map(|()| image),
            Err(_) => Err(HostError::NotReadable {
                why: self
                    .shared
                    .board
                    .problem(&image)
                    .unwrap_or_else(|| "no parent answered".into()),
                image,
                limit_ms: ATTACH_LIMIT.as_millis() as u64,
            }),
        }
    }

    /// Ends an attachment.
    ///
    /// # Errors
    /// VMs use it, or [`HostError`].
    pub async fn detach(&self, image: &ImageId) -> Result<(), HostError> {
        let Some(content) = self.content(image) else {
            return Ok(());
        };
        self.ask_base(content.digest, |reply| BaseMsg::Detach {
            image: image.clone(),
            reply,
        })
        .await
    }

    /// An image's attachment as it is now.
    pub fn attachment(&self, image: &ImageId) -> Option<Attachment> {
        view::attachment(&self.desired(), &self.shared.board, &self.shared.portal, image)
    }

    /// Where an image is exported here.
    pub fn endpoint(&self, image: &ImageId) -> treeboot_types::Endpoint {
        view::endpoint(&self.shared.portal, image)
    }

    /// Ends a VM and deletes its disk.
    ///
    /// # Errors
    /// [`HostError`].
    pub async fn destroy(&self, vm: &VmName, keep_base: bool) -> Result<(), HostError> {
        self.known(vm)?;
        self.ask_vm(vm, |reply| VmMsg::Destroy { keep_base, reply }).await
    }

    /// Starts a VM, with a new disk where it has none.
    ///
    /// # Errors
    /// [`HostError`].
    pub async fn start_vm(&self, vm: &VmName, request: StartRequest) -> Result<VmReport, HostError> {
        let request = Box::new(request);
        self.ask_vm(vm, |reply| VmMsg::Start { request, reply }).await?;
        Ok(self.report(vm).await)
    }

    /// Stops a VM; its disk stays.
    ///
    /// # Errors
    /// [`HostError`].
    pub async fn stop_vm(&self, vm: &VmName, force: bool) -> Result<VmReport, HostError> {
        self.known(vm)?;
        self.ask_vm(vm, |reply| VmMsg::Stop { force, reply }).await?;
        Ok(self.report(vm).await)
    }

    fn known(&self, vm: &VmName) -> Result<(), HostError> {
        let desired = self.desired();
        if desired.disks.contains_key(vm) || desired.vms.contains_key(vm) {
            return Ok(());
        }
        Err(HostError::UnknownVm {
            vm: vm.clone(),
            host: self.shared.host().to_string(),
        })
    }

    /// A VM's state, which changes as it is watched.
    ///
    /// # Errors
    /// There is no such VM.
    pub fn watch_vm(&self, vm: &VmName) -> Result<tokio::sync::watch::Receiver<VmReport>, HostError> {
        self.known(vm)?;
        self.vm(vm);
        let vms = self.shared.vms.lock();
        match vms.get(vm) {
            Some(handle) => Ok(handle.report.clone()),
            None => Err(self.shared.stopping()),
        }
    }

    /// A VM as it is now, with its disk's counters.
    pub async fn report(&self, vm: &VmName) -> VmReport {
        let report = self
            .shared
            .vms
            .lock()
            .get(vm)
            .map(|handle| handle.report.borrow().clone());
        match report {
            Some(report) => report.with_stats().await,
            None => VmReport::absent(vm.clone()),
        }
    }

    /// VMs that were started here.
    pub async fn vms(&self) -> Vec<VmReport> {
        let desired = self.desired();
        let reports = desired.vms.keys().map(|vm| self.report(vm));
        futures_util::future::join_all(reports).await
    }

    /// The plane.
    pub fn plane(&self) -> &dyn Plane {
        self.shared.applier.plane.as_ref()
    }

    /// What the host says of itself.
    pub fn info(&self) -> HostInfo {
        self.shared.info.lock().clone()
    }

    /// Whether the heartbeat stream stands.
    pub fn connected(&self) -> bool {
        self.shared.link.connected()
    }

    /// Why the journal cannot be written, if the newest attempt failed and one of this moment fails too.
    pub async fn journal_problem(&self) -> Option<String> {
        self.shared.journal().problem().await
    }

    /// Writes of the journal that failed, since the start.
    pub fn journal_errors(&self) -> u64 {
        self.shared.journal().errors()
    }

    /// Since the host started.
    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    /// Ends in good order: VMs go on, places are kept, exports close. What is durable stays.
    pub async fn end(&self) {
        self.shared.stop.cancel();
        self.shared.tasks.close();
        if tokio::time::timeout(END_LIMIT, self.shared.tasks.wait())
            .await
            .is_err()
        {
            tracing::warn!("some tasks did not end in time");
        }
        self.plane().close().await;
    }
}

fn is_running(state: Option<&VmState>) -> bool {
    state == Some(&VmState::Running)
}
