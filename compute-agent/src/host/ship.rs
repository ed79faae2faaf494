//! A disk, or a layer of one, on its way: what was written, block by block and in order, to this host or another one; and clones.
//!
//! The layers are frozen and held while they are read, so what arrives is one point in time however long it takes. A connection that
//! breaks is made again, and the transfer goes on where it ended. Deliberately absent: the base, which the other host reads by its
//! own place in the tree.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use treeboot_block::BlockDevice as _;
use treeboot_block::layers::{Content as Where, Frozen};
use treeboot_identity::Who;
use treeboot_proto::v1;
use treeboot_proto::v1::agent_client::AgentClient;
use treeboot_proto::v1::disk_answer::Answer;
use treeboot_proto::v1::disk_part::Part;
use treeboot_types::{HostName, SnapshotName, VmName};

use super::receive::Begun;
use super::{Host, HostError, chain};
use crate::desired::DiskState;
use crate::plane::Verb;
use crate::stack::LayerChange;

/// Bytes of data in one part.
pub(super) const PART_BYTES: u64 = 256 << 10;
/// Bytes of zeroes in one part, which carries none of them.
const ZERO_BYTES: u64 = 1 << 30;
/// Parts that wait for the network.
const PARTS: usize = 8;
pub(super) const BLOCK: u64 = 4096;
/// How often a host that never answered is tried, and the pause before.
const ATTEMPTS: u32 = 3;
pub(super) const PAUSE: Duration = Duration::from_millis(500);
/// How long a transfer that has begun is tried to be gone on with while nothing arrives. The other side keeps what came for longer.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);
/// For the connection to the other host.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// How often a connection is tried while nothing comes, and how long it may be silent then.
const KEEPALIVE: Duration = Duration::from_secs(4);
/// For the other host's first answer: it may ask the coordinator.
const ANSWER_LIMIT: Duration = Duration::from_secs(15);
/// How long the other host's disk may take for what waits.
const STALL_LIMIT: Duration = Duration::from_secs(60);
/// For the other host to sync a disk and to attach its image.
pub(super) const TAKE_LIMIT: Duration = Duration::from_secs(180);
/// For the other host to hear that nothing is to be kept.
pub(super) const FAREWELL_LIMIT: Duration = Duration::from_secs(2);

/// What is asked of a clone.
#[derive(Debug, Clone)]
pub struct CloneRequest {
    /// The VM that is copied.
    pub vm: VmName,
    /// The point in time; now where there is none.
    pub snapshot: Option<SnapshotName>,
    /// The host of the new one, and its agent's `host:port`.
    pub to: (HostName, String),
    /// The new one.
    pub new_vm: VmName,
}

/// What was shipped.
#[derive(Debug, Clone, Copy, Default)]
pub struct Shipped {
    /// Blocks of data that the new VM has, in bytes.
    pub data_bytes: u64,
    /// Messages that went out, in bytes; 0 on the same host.
    pub sent_bytes: u64,
    /// How often a connection that was lost was made again.
    pub resumed: u32,
}

/// What a transfer does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Phase {
    /// It ships what was frozen while its VM goes on.
    #[default]
    Running,
    /// The VM is being stopped.
    Stopping,
    /// It ships what was written until the VM had stopped.
    Stopped,
    /// The other host takes the VM.
    Taking,
}

/// How far a transfer is, in bytes of data.
#[derive(Debug, Clone, Copy, Default)]
pub struct Progress {
    /// Shipped.
    pub done_bytes: u64,
    /// In all, as far as it is known.
    pub total_bytes: u64,
    /// What it does.
    pub phase: Phase,
}

/// A clone or a move under way.
pub struct Underway<T> {
    /// How far it is.
    pub progress: watch::Receiver<Progress>,
    /// Ends it.
    pub cancel: CancellationToken,
    /// How it ends.
    pub end: JoinHandle<Result<T, HostError>>,
}

impl<T: Send + 'static> Underway<T> {
    pub(super) fn begin<F>(
        stop: &CancellationToken,
        work: impl FnOnce(watch::Sender<Progress>, CancellationToken) -> F,
    ) -> Self
    where
        F: Future<Output = Result<T, HostError>> + Send + 'static,
    {
        let (told, progress) = watch::channel(Progress::default());
        let cancel = stop.child_token();
        let end = tokio::spawn(work(told, cancel.clone()));
        Self {
            progress,
            cancel,
            end,
        }
    }
}

/// Everything of a disk that is not the base's, in order.
pub(super) struct Reader {
    disk: Arc<Frozen>,
    at: u64,
}

impl Reader {
    pub(super) fn new(disk: Arc<Frozen>) -> Self {
        Self { disk, at: 0 }
    }

    /// The next part; `None` at the end.
    pub(super) async fn next(&mut self) -> Result<Option<Part>, treeboot_block::BlockError> {
        let bytes = self.disk.geometry().bytes;
        while self.at < bytes {
            let offset = self.at;
            let (content, run) = self.disk.content(offset, (bytes - offset).min(PART_BYTES));
            self.at += run;
            match content {
                Where::Base => {}
                Where::Zero => {
                    while self.at < bytes && self.at - offset < ZERO_BYTES {
                        match self.disk.content(self.at, (bytes - self.at).min(PART_BYTES)) {
                            (Where::Zero, run) => self.at += run,
                            _ => break,
                        }
                    }
                    let bytes = self.at - offset;
                    return Ok(Some(Part::Zero(v1::DiskZero { offset, bytes })));
                }
                Where::Data => {
                    let mut data = vec![0; run as usize];
                    self.disk.read(offset, &mut data).await?;
                    let checksum = crc32c::crc32c(&data);
                    return Ok(Some(Part::Data(v1::DiskData {
                        offset,
                        data,
                        checksum,
                    })));
                }
            }
        }
        Ok(None)
    }
}

/// Blocks of data and of zeroes below `end`. Looks at no block.
fn count(disk: &Frozen, end: u64) -> (u64, u64) {
    let end = end.min(disk.geometry().bytes);
    let (mut data, mut zero, mut at) = (0, 0, 0);
    while at < end {
        let (content, run) = disk.content(at, (end - at).min(PART_BYTES));
        match content {
            Where::Base => {}
            Where::Zero => zero += run.div_ceil(BLOCK),
            Where::Data => data += run.div_ceil(BLOCK),
        }
        at += run;
    }
    (data, zero)
}

/// A disk on its way.
pub(super) struct Parcel<'a> {
    /// Where it goes: the host, and its agent's `host:port`.
    pub(super) to: &'a (HostName, String),
    /// For people, who are told that it was cancelled.
    pub(super) what: String,
    pub(super) header: v1::DiskHeader,
    pub(super) end: v1::DiskEnd,
    pub(super) disk: Arc<Frozen>,
    pub(super) progress: &'a watch::Sender<Progress>,
    /// Bytes of data that had been shipped before it was begun.
    pub(super) before: u64,
    pub(super) cancel: &'a CancellationToken,
    pub(super) shipped: Shipped,
    /// The other side answered once.
    pub(super) heard: bool,
}

pub(super) fn peer(host: &HostName, status: tonic::Status) -> HostError {
    HostError::Peer {
        host: host.clone(),
        status: Box::new(status),
    }
}

impl Parcel<'_> {
    fn peer(&self, status: tonic::Status) -> HostError {
        peer(&self.to.0, status)
    }

    fn cancelled(&self) -> HostError {
        HostError::Cancelled {
            what: self.what.clone(),
        }
    }

    async fn done_below(&self, at: u64) {
        let disk = Arc::clone(&self.disk);
        let counted = tokio::task::spawn_blocking(move || count(&disk, at)).await;
        let done = self.before + counted.unwrap_or_default().0 * BLOCK;
        self.progress.send_modify(|progress| progress.done_bytes = done);
    }

    fn sent(&mut self, part: &Part) {
        if let Part::Data(data) = part {
            let bytes = (data.data.len() as u64).next_multiple_of(BLOCK);
            self.progress.send_modify(|progress| progress.done_bytes += bytes);
        }
    }
}

/// What a VM's disk is, for whom it is shipped to.
pub(super) fn header(vm: &VmName, disk: &DiskState) -> v1::DiskHeader {
    v1::DiskHeader {
        vm: vm.to_string(),
        image: Some((&disk.image).into()),
        digest: disk.disk.digest.0.to_vec(),
        bytes: disk.disk.bytes,
        ..v1::DiskHeader::default()
    }
}

impl Host {
    /// Blocks of data and of zeroes of a disk. Looks at no block.
    pub(super) async fn count(&self, disk: &Arc<Frozen>) -> Result<(u64, u64), HostError> {
        let disk = Arc::clone(disk);
        let counted = tokio::task::spawn_blocking(move || count(&disk, u64::MAX)).await;
        counted.map_err(|_| self.shared.stopping())
    }

    /// Gives a new VM, here or on another host, the disk that a VM has, or had at a snapshot. The VM goes on meanwhile. Where it fails
    /// or is cancelled, nothing is left.
    pub fn begin_clone(&self, request: CloneRequest) -> Underway<Shipped> {
        let host = self.clone();
        Underway::begin(&self.shared.stop, async move |told, cancel| {
            host.clone_vm(&request, &told, &cancel).await
        })
    }

    async fn clone_vm(
        &self,
        request: &CloneRequest,
        progress: &watch::Sender<Progress>,
        cancel: &CancellationToken,
    ) -> Result<Shipped, HostError> {
        self.has_disk(&request.vm)?;
        self.can(Verb::Clone)?;
        let transfer: u64 = rand::random();
        let hold = LayerChange::Hold {
            transfer,
            snapshot: request.snapshot.clone(),
        };
        self.change_layers(&request.vm, hold).await?;
        let shipped = self.ship(request, transfer, progress, cancel).await;
        let release = LayerChange::Release {
            transfer: Some(transfer),
        };
        if let Err(error) = self.change_layers(&request.vm, release).await {
            // The next start lets it go.
            tracing::warn!(vm = %request.vm, error = %chain(&error), "the clone's hold stays for now");
        }
        let shipped = shipped?;
        tracing::info!(vm = %request.vm, to = %request.to.0, new = %request.new_vm, data_bytes = shipped.data_bytes, "cloned");
        Ok(shipped)
    }

    async fn ship(
        &self,
        request: &CloneRequest,
        transfer: u64,
        progress: &watch::Sender<Progress>,
        cancel: &CancellationToken,
    ) -> Result<Shipped, HostError> {
        let disk = self.plane().held(&request.vm, transfer)?;
        let desired = self.desired();
        let state = desired
            .disks
            .get(&request.vm)
            .ok_or_else(|| self.shared.stopping())?;
        let (data_blocks, zero_blocks) = self.count(&disk).await?;
        let data_bytes = data_blocks * BLOCK;
        progress.send_modify(|progress| progress.total_bytes = data_bytes);
        let mut parcel = Parcel {
            to: &request.to,
            what: format!("the clone of VM '{}' to '{}'", request.vm, request.new_vm),
            header: v1::DiskHeader {
                transfer,
                data_bytes,
                ..header(&request.new_vm, state)
            },
            end: v1::DiskEnd {
                data_blocks,
                zero_blocks,
            },
            disk,
            progress,
            before: 0,
            cancel,
            shipped: Shipped {
                data_bytes,
                ..Shipped::default()
            },
            heard: false,
        };
        match request.to.0 == *self.shared.host() {
            true => self.copy_here(&mut parcel).await?,
            false => self.send(&mut parcel).await?,
        }
        Ok(parcel.shipped)
    }

    async fn copy_here(&self, parcel: &mut Parcel<'_>) -> Result<(), HostError> {
        let Begun::From(mut receiving, _) = self.receive(parcel.header.clone()).await? else {
            return Ok(());
        };
        let mut reader = Reader {
            disk: Arc::clone(&parcel.disk),
            at: 0,
        };
        let copied = async {
            while let Some(part) = reader.next().await? {
                if parcel.cancel.is_cancelled() {
                    return Err(parcel.cancelled());
                }
                parcel.sent(&part);
                receiving.take(part).await?;
            }
            receiving.take(Part::End(parcel.end)).await
        };
        match copied.await {
            Ok(_) => self.received(receiving).await,
            Err(error) => {
                receiving.discard().await;
                Err(error)
            }
        }
    }

    /// Ships it, through connections that break.
    pub(super) async fn send(&self, parcel: &mut Parcel<'_>) -> Result<(), HostError> {
        let mut attempts = 0;
        let mut arrived = tokio::time::Instant::now();
        loop {
            let before = parcel.progress.borrow().done_bytes;
            let broken = match self.attempt(parcel).await {
                Ok(()) => return Ok(()),
                Err(error) if error.may_be_gone_on_with() => error,
                Err(error) => return Err(error),
            };
            attempts += 1;
            if parcel.progress.borrow().done_bytes > before {
                arrived = tokio::time::Instant::now();
            }
            let over = match parcel.heard {
                false => attempts >= ATTEMPTS,
                true => arrived.elapsed() > PATIENCE,
            };
            if over {
                let why = match &broken {
                    HostError::Peer { status, .. } => status.message().to_owned(),
                    other => chain(other),
                };
                return Err(parcel.peer(tonic::Status::unavailable(match parcel.heard {
                    false => why,
                    true => format!(
                        "the connection was lost for more than {} s ({why})",
                        PATIENCE.as_secs()
                    ),
                })));
            }
            tracing::warn!(vm = %parcel.header.vm, to = %parcel.to.0, error = %chain(&broken), "the transfer broke off and is gone on with");
            parcel.shipped.resumed += 1;
            tokio::select! {
                () = parcel.cancel.cancelled() => return Err(parcel.cancelled()),
                () = tokio::time::sleep(PAUSE) => {}
            }
        }
    }

    /// Another host's agent.
    pub(super) async fn reach(
        &self,
        (host, address): &(HostName, String),
    ) -> Result<AgentClient<tonic::transport::Channel>, HostError> {
        let dialer = self.shared.settings.dialer.to(Who::Host(host.clone()));
        let dialer = dialer.map_err(|error| HostError::Invalid(error.to_string()))?;
        let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{address}"))
            .map_err(|error| HostError::Invalid(format!("'{address}' is no address: {error}")))?
            .connect_timeout(CONNECT_LIMIT)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE)
            .keep_alive_while_idle(true);
        let connected = dialer.connect(&endpoint).await;
        let connected = connected.map_err(|error| peer(host, tonic::Status::unavailable(chain(&error))));
        connected.map(AgentClient::new)
    }

    /// One connection, from where the other side wants to go on.
    async fn attempt(&self, parcel: &mut Parcel<'_>) -> Result<(), HostError> {
        let mut client = self.reach(parcel.to).await?;
        let (parts, stream) = mpsc::channel(PARTS);
        let of = |part| v1::DiskPart { part: Some(part) };
        // There is room for one.
        let _ = parts.try_send(of(Part::Header(parcel.header.clone())));
        let silent = |what: &str, limit: Duration| {
            tonic::Status::unavailable(format!("{what} within {} s", limit.as_secs()))
        };
        let begun = client.receive_disk(ReceiverStream::new(stream));
        let mut answers = match tokio::time::timeout(ANSWER_LIMIT, begun).await {
            Ok(Ok(response)) => response.into_inner(),
            Ok(Err(status)) => return Err(parcel.peer(status)),
            Err(_) => return Err(parcel.peer(silent("no answer", ANSWER_LIMIT))),
        };
        let mut reader = match answer(parcel, &mut answers, ANSWER_LIMIT).await? {
            Answer::Taken(_) => return Ok(()),
            Answer::WantedFrom(at) => Reader {
                disk: Arc::clone(&parcel.disk),
                at,
            },
        };
        parcel.heard = true;
        parcel.done_below(reader.at).await;
        loop {
            let next = match reader.next().await {
                Ok(part) => part,
                Err(error) => {
                    farewell(&parts, &mut answers).await;
                    return Err(error.into());
                }
            };
            let last = next.is_none();
            let part = next.unwrap_or(Part::End(parcel.end));
            let permit = tokio::select! {
                () = parcel.cancel.cancelled() => {
                    farewell(&parts, &mut answers).await;
                    return Err(parcel.cancelled());
                }
                // It has no reason to speak now but to refuse.
                early = answers.message() => return Err(parcel.peer(match early {
                    Err(status) => status,
                    Ok(_) => tonic::Status::aborted("it took no more of the disk"),
                })),
                permit = tokio::time::timeout(STALL_LIMIT, parts.reserve()) => permit,
            };
            let Ok(permit) = permit else {
                return Err(parcel.peer(silent("nothing was taken", STALL_LIMIT)));
            };
            let Ok(permit) = permit else {
                return Err(match answer(parcel, &mut answers, ANSWER_LIMIT).await {
                    Err(error) => error,
                    Ok(_) => parcel.peer(tonic::Status::unavailable("the connection ended")),
                });
            };
            parcel.sent(&part);
            let message = of(part);
            parcel.shipped.sent_bytes += prost::Message::encoded_len(&message) as u64;
            permit.send(message);
            if last {
                break;
            }
        }
        match answer(parcel, &mut answers, TAKE_LIMIT).await? {
            Answer::Taken(_) => Ok(()),
            Answer::WantedFrom(_) => Err(parcel.peer(tonic::Status::aborted("it began again"))),
        }
    }
}

async fn answer(
    parcel: &Parcel<'_>,
    answers: &mut tonic::Streaming<v1::DiskAnswer>,
    limit: Duration,
) -> Result<Answer, HostError> {
    let status = match tokio::time::timeout(limit, answers.message()).await {
        Ok(Ok(Some(v1::DiskAnswer { answer: Some(answer) }))) => return Ok(answer),
        Ok(Ok(_)) => tonic::Status::unavailable("it said nothing"),
        Ok(Err(status)) => status,
        Err(_) => tonic::Status::unavailable(format!("no answer within {} s", limit.as_secs())),
    };
    Err(parcel.peer(status))
}

/// Nothing of it is to be kept. Where this is not heard, the other side waits its time, and removes it then.
async fn farewell(parts: &mpsc::Sender<v1::DiskPart>, answers: &mut tonic::Streaming<v1::DiskAnswer>) {
    let part = Some(Part::GivenUp(v1::DiskGivenUp {}));
    let said = async {
        let _ = parts.send(v1::DiskPart { part }).await;
        let _ = answers.message().await;
    };
    let _ = tokio::time::timeout(FAREWELL_LIMIT, said).await;
}
