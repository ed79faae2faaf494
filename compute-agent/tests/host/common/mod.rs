//! A coordinator that a test plays, and agents in this process.

#![allow(unreachable_pub, reason = "parts for the tests of this program")]

pub mod pair;
pub mod rig;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tokio_util::sync::CancellationToken;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};
use treeboot_agent::choice::PlaneOptions;
use treeboot_agent::daemon::{Daemon, Options};
use treeboot_agent::host::Host;
use treeboot_agent::identity::IdentityOptions;
use treeboot_agent::store::{ImportHeader, ImportPart};
use treeboot_iscsi::initiator::{Session, SessionOptions};
use treeboot_proto::v1;
use treeboot_proto::v1::coordinator_server::{Coordinator, CoordinatorServer};
use treeboot_types::{HostName, ImageId, Iqn, VmName};

pub const SOON: Duration = Duration::from_secs(20);

/// What the played coordinator knows and was told.
#[derive(Default)]
pub struct Played {
    pub images: Vec<v1::Image>,
    pub hosts: BTreeMap<String, v1::HostInfo>,
    pub states: BTreeMap<String, v1::HostState>,
    /// Who reads from whom; a host that is not named reads from the origin.
    pub parents: BTreeMap<String, String>,
    pub joined: BTreeSet<String>,
    pub registered: BTreeSet<String>,
    pub removed: BTreeSet<String>,
    pub complaints: Vec<v1::BadParent>,
    pub refuse: Option<String>,
    pub fail_add_image: bool,
    streams: BTreeMap<String, mpsc::Sender<Result<v1::Push, Status>>>,
    counter: u64,
}

#[derive(Clone, Default)]
pub struct Play(pub Arc<Mutex<Played>>);

impl Played {
    fn find(&self, id: Option<&v1::ImageId>) -> Result<v1::Image, Status> {
        let id = id.ok_or_else(|| Status::invalid_argument("no image"))?;
        let mut found: Vec<_> = self
            .images
            .iter()
            .filter(|image| {
                let have = image.id.as_ref().unwrap();
                have.name == id.name && (id.version == 0 || have.version == id.version)
            })
            .collect();
        found.sort_by_key(|image| image.id.as_ref().unwrap().version);
        let found = found.last().copied().cloned();
        found.ok_or_else(|| Status::not_found(format!("there is no image '{}'", id.name)))
    }

    fn endpoint(&self, host: &str, image: &v1::Image) -> v1::Endpoint {
        let id = treeboot_proto::image_id(image.id.as_ref()).unwrap();
        v1::Endpoint {
            portal: self.hosts[host].portal.clone(),
            target: Iqn::of_image(&id).to_string(),
            data_lun: 0,
            hash_lun: Some(1),
        }
    }

    pub fn placement(&self, host: &str, image: &v1::Image) -> v1::Placement {
        let origin = v1::Parent {
            host: image.origins[0].host.clone(),
            endpoint: image.origins[0].endpoint.clone(),
            origin: true,
            depth: 0,
        };
        let (active, fallbacks) = match self.parents.get(host) {
            Some(parent) => (
                v1::Parent {
                    host: parent.clone(),
                    endpoint: Some(self.endpoint(parent, image)),
                    origin: false,
                    depth: 1,
                },
                vec![origin],
            ),
            None => (origin, Vec::new()),
        };
        let children = self.parents.iter().filter(|(_, parent)| *parent == host);
        v1::Placement {
            secrets: Vec::new(),
            image: Some(image.clone()),
            epoch: Some(v1::Epoch {
                incarnation: 1,
                counter: self.counter,
            }),
            stripes: vec![v1::StripePlacement {
                stripe: 0,
                active: vec![active],
                fallbacks,
                policy: v1::PathPolicy::RoundRobin.into(),
                depth: 2,
            }],
            children: children
                .map(|(child, _)| v1::Child {
                    host: child.clone(),
                    stripe: 0,
                    fallback: false,
                })
                .collect(),
        }
    }

    fn push(&self, host: &str, push: v1::push::Push) {
        if let Some(stream) = self.streams.get(host) {
            let _ = stream.try_send(Ok(v1::Push { push: Some(push) }));
        }
    }
}

impl Play {
    /// Serves until `stop`; returns the URL.
    pub async fn start(&self, at: Option<SocketAddr>, stop: CancellationToken) -> SocketAddr {
        let listener = TcpListener::bind(at.unwrap_or(([127, 0, 0, 1], 0).into()))
            .await
            .unwrap();
        let address = listener.local_addr().unwrap();
        let server = tonic::transport::Server::builder()
            .add_service(CoordinatorServer::new(self.clone()))
            .serve_with_incoming_shutdown(TcpIncoming::from(listener), stop.cancelled_owned());
        tokio::spawn(server);
        address
    }

    /// Gives a host another parent and tells it and the parents.
    pub fn move_to(&self, host: &str, parent: Option<&str>) {
        let mut play = self.0.lock();
        play.counter += 1;
        match parent {
            Some(parent) => play.parents.insert(host.into(), parent.into()),
            None => play.parents.remove(host),
        };
        let image = play.images[0].clone();
        for told in play.joined.clone() {
            let placement = play.placement(&told, &image);
            play.push(&told, v1::push::Push::Placement(placement));
        }
    }

    /// A host's attachment is no longer wanted.
    pub fn end(&self, host: &str, drop_cache: bool) {
        let mut play = self.0.lock();
        play.counter += 1;
        let placement = play.placement(host, &play.images[0]);
        let detach = v1::Detach {
            image: play.images[0].id.clone(),
            epoch: placement.epoch,
            reason: "the test's".into(),
            drop_cache,
        };
        play.push(host, v1::push::Push::Detach(detach));
    }

    pub fn drop_streams(&self) {
        self.0.lock().streams.clear();
    }
}

type Pushes = Pin<Box<dyn Stream<Item = Result<v1::Push, Status>> + Send>>;

#[tonic::async_trait]
impl Coordinator for Play {
    async fn join(&self, request: Request<v1::JoinRequest>) -> Result<Response<v1::JoinResponse>, Status> {
        let request = request.into_inner();
        let mut play = self.0.lock();
        let image = play.find(request.image.as_ref())?;
        play.counter += 1;
        play.joined.insert(request.host.clone());
        let placement = Some(play.placement(&request.host, &image));
        Ok(Response::new(v1::JoinResponse { placement }))
    }

    async fn register(
        &self,
        request: Request<v1::RegisterRequest>,
    ) -> Result<Response<v1::RegisterResponse>, Status> {
        let request = request.into_inner();
        self.0.lock().registered.insert(request.host);
        let epoch = request.epoch;
        Ok(Response::new(v1::RegisterResponse { epoch }))
    }

    async fn search(&self, _: Request<v1::SearchRequest>) -> Result<Response<v1::SearchResponse>, Status> {
        Err(Status::unimplemented("not played"))
    }

    async fn remove(
        &self,
        request: Request<v1::RemoveRequest>,
    ) -> Result<Response<v1::RemoveResponse>, Status> {
        self.0.lock().removed.insert(request.into_inner().host);
        Ok(Response::new(v1::RemoveResponse {}))
    }

    async fn enroll(&self, _: Request<v1::EnrollRequest>) -> Result<Response<v1::CertifyResponse>, Status> {
        Err(Status::unimplemented("not played"))
    }

    async fn renew(&self, _: Request<v1::RenewRequest>) -> Result<Response<v1::CertifyResponse>, Status> {
        Err(Status::unimplemented("not played"))
    }

    async fn leave(&self, _: Request<v1::LeaveRequest>) -> Result<Response<v1::LeaveResponse>, Status> {
        Err(Status::unimplemented("not played"))
    }

    type HeartbeatStream = Pushes;

    async fn heartbeat(
        &self,
        request: Request<tonic::Streaming<v1::Beat>>,
    ) -> Result<Response<Pushes>, Status> {
        let mut beats = request.into_inner();
        let (pushes, stream) = mpsc::channel(64);
        let play = self.clone();
        tokio::spawn(async move {
            let mut first = true;
            let keep = pushes.downgrade();
            drop(pushes.clone());
            let mut own = Some(pushes);
            while let Some(Ok(beat)) = beats.next().await {
                let mut play = play.0.lock();
                play.complaints.extend(beat.bad_parents);
                if let Some(state) = beat.state {
                    play.hosts.insert(beat.host.clone(), state.info.clone().unwrap());
                    play.states.insert(beat.host.clone(), state);
                }
                if let Some(pushes) = own.take() {
                    play.streams.insert(beat.host.clone(), pushes);
                }
                let Some(pushes) = keep.upgrade() else {
                    return;
                };
                if let Some(reason) = play.refuse.clone() {
                    let refused = v1::push::Push::Refused(v1::Refused { reason });
                    let _ = pushes.try_send(Ok(v1::Push { push: Some(refused) }));
                    return;
                }
                if std::mem::take(&mut first) {
                    let welcome = v1::Welcome {
                        export_key: None,
                        secrets: Vec::new(),
                        epoch: Some(v1::Epoch {
                            incarnation: 1,
                            counter: play.counter,
                        }),
                        beat_ms: 50,
                        lease_ms: 1000,
                    };
                    let push = Some(v1::push::Push::Welcome(welcome));
                    let _ = pushes.try_send(Ok(v1::Push { push }));
                }
                let ack = v1::push::Push::Ack(v1::Ack {
                    sequence: beat.sequence,
                });
                let _ = pushes.try_send(Ok(v1::Push { push: Some(ack) }));
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn add_image(
        &self,
        request: Request<v1::AddImageRequest>,
    ) -> Result<Response<v1::AddImageResponse>, Status> {
        let mut image = request.into_inner().image.unwrap();
        let mut play = self.0.lock();
        if play.fail_add_image {
            return Err(Status::resource_exhausted("no more images"));
        }
        let same = play.images.iter().any(|have| have.digest == image.digest);
        let id = image.id.as_mut().unwrap();
        if id.version == 0 {
            id.version = 1;
        }
        if !same {
            play.images.push(image.clone());
        }
        Ok(Response::new(v1::AddImageResponse {
            image: Some(image),
            created: !same,
        }))
    }

    async fn get_image(
        &self,
        request: Request<v1::GetImageRequest>,
    ) -> Result<Response<v1::GetImageResponse>, Status> {
        let image = Some(self.0.lock().find(request.into_inner().id.as_ref())?);
        Ok(Response::new(v1::GetImageResponse {
            image,
            labels: Default::default(),
        }))
    }

    async fn list_images(
        &self,
        _: Request<v1::ListImagesRequest>,
    ) -> Result<Response<v1::ListImagesResponse>, Status> {
        let images = self.0.lock().images.clone();
        Ok(Response::new(v1::ListImagesResponse { images }))
    }

    async fn label_image(
        &self,
        _: Request<v1::LabelImageRequest>,
    ) -> Result<Response<v1::LabelImageResponse>, Status> {
        Err(Status::unimplemented("not in this play"))
    }

    async fn remove_image(
        &self,
        _: Request<v1::RemoveImageRequest>,
    ) -> Result<Response<v1::RemoveImageResponse>, Status> {
        Err(Status::unimplemented("not played"))
    }

    async fn list_hosts(
        &self,
        _: Request<v1::ListHostsRequest>,
    ) -> Result<Response<v1::ListHostsResponse>, Status> {
        Err(Status::unimplemented("not played"))
    }

    async fn get_host(
        &self,
        request: Request<v1::GetHostRequest>,
    ) -> Result<Response<v1::GetHostResponse>, Status> {
        let name = request.into_inner().host;
        let play = self.0.lock();
        let host = play.hosts.get(&name).map(|info| v1::HostRecord {
            info: Some(info.clone()),
            connected: play.streams.get(&name).is_some_and(|stream| !stream.is_closed()),
            ..v1::HostRecord::default()
        });
        Ok(Response::new(v1::GetHostResponse { host }))
    }

    async fn get_tree(
        &self,
        _: Request<v1::GetTreeRequest>,
    ) -> Result<Response<v1::GetTreeResponse>, Status> {
        Err(Status::unimplemented("not played"))
    }
}

/// An address of its own for each daemon: one that starts again on its old port must not find there the outgoing connection
/// of another process, which would come from 127.0.0.1.
fn loopback() -> SocketAddr {
    static COUNT: AtomicU8 = AtomicU8::new(1);
    let [.., b, c] = std::process::id().to_be_bytes();
    let d = COUNT.fetch_add(1, Ordering::Relaxed) % 250 + 1;
    SocketAddr::from(([127, b.max(1), c, d], 0))
}

/// Options of an agent below `dir`, on ports of its own.
pub fn options(dir: &Path, name: &str, coordinator: SocketAddr) -> Options {
    let free = loopback();
    Options {
        name: HostName::new(name).unwrap(),
        state: dir.join(name),
        coordinator: format!("http://{coordinator}"),
        listen: free,
        portal: free,
        advertise: None,
        store: (name == "origin").then(|| dir.join("store")),
        cache: Vec::new(),
        labels: Vec::new(),
        weight: 1,
        identity: IdentityOptions::default(),
        plane: PlaneOptions::default(),
        ready_file: None,
    }
}

/// An image of `blocks` blocks of 4 KiB, each another, with a hole.
pub fn content(blocks: usize) -> Vec<u8> {
    (0..blocks * 4096)
        .map(|i| match i / 4096 % 13 {
            5 => 0,
            _ => ((i / 4096 * 37) ^ (i % 253)) as u8,
        })
        .collect()
}

pub async fn import(host: &Host, name: &str, bytes: &[u8]) -> ImageId {
    let (parts, inbox) = Host::import_parts();
    let header = ImportHeader {
        image: name.into(),
        bytes: bytes.len() as u64,
        chunk_bytes: 65536,
        adopted_from: Vec::new(),
        base: None,
    };
    let importing = {
        let host = host.clone();
        let image = name.parse().unwrap();
        tokio::spawn(async move { host.import(image, header, inbox).await })
    };
    for (n, data) in bytes.chunks(1 << 18).enumerate() {
        let part = ImportPart {
            offset: (n << 18) as u64,
            data: data.to_vec().into(),
        };
        parts.send(Ok(part)).await.unwrap();
    }
    drop(parts);
    importing.await.unwrap().unwrap().image.id
}

pub async fn session(portal: &str, target: Iqn, initiator: Iqn) -> Result<Session, String> {
    let options = SessionOptions::new(portal, target, initiator);
    Session::connect(options).await.map_err(|error| error.to_string())
}

pub async fn disk(daemon: &Daemon, vm: &VmName) -> Session {
    session(daemon.portal(), Iqn::of_disk(vm), Iqn::of_vm(vm))
        .await
        .unwrap()
}

pub async fn read_all(session: &Session, bytes: usize) -> Vec<u8> {
    let mut all = Vec::new();
    for at in (0..bytes).step_by(1 << 18) {
        let length = (bytes - at).min(1 << 18) as u32;
        all.extend_from_slice(&session.read(0, at as u64, length).await.unwrap());
    }
    all
}

/// Waits on a condition with a deadline.
pub async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let waited = tokio::time::timeout(SOON, async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    });
    assert!(waited.await.is_ok(), "not in time: {what}");
}

pub fn vm(name: &str) -> VmName {
    VmName::new(name).unwrap()
}
