//! A coordinator and one or two agents, played: they remember what they were asked and answer from tables.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};
use treeboot_proto::v1;
use treeboot_proto::v1::agent_server::{Agent, AgentServer};
use treeboot_proto::v1::coordinator_server::{Coordinator, CoordinatorServer};

type Answer<T> = Result<Response<T>, Status>;
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What the fakes know, and what they saw.
#[derive(Debug, Default)]
pub(crate) struct World {
    pub(crate) images: Vec<v1::Image>,
    pub(crate) hosts: Vec<v1::HostRecord>,
    pub(crate) nodes: Vec<v1::TreeNode>,
    /// By host.
    pub(crate) vms: BTreeMap<String, Vec<v1::Vm>>,
    pub(crate) disks: BTreeMap<String, Vec<v1::Disk>>,
    /// VMs that fail instead of being ready.
    pub(crate) failing: Vec<String>,
    /// Content of each import that was complete.
    pub(crate) imports: Vec<Vec<u8>>,
    /// Bytes of data that imports carried.
    pub(crate) import_payload: usize,
    /// Imports whose stream broke.
    pub(crate) broken_imports: usize,
    /// Imports are taken no further than their first part while this is set.
    pub(crate) hold_imports: bool,
    /// An error for every import.
    pub(crate) refuse_imports: Option<Status>,
    /// Names of requests that change something, in order.
    pub(crate) seen: Vec<String>,
}

/// The fakes, serving on loopback until dropped.
pub(crate) struct Fakes {
    pub(crate) world: Arc<Mutex<World>>,
    pub(crate) coordinator: String,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Drop for Fakes {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Fakes {
    /// A coordinator and an agent for each host: its name and its roles (`store`, `vms`, `silent`).
    pub(crate) fn start(hosts: &[(&str, &[&str])]) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let world = Arc::new(Mutex::new(World::default()));
        let coordinator = runtime.block_on(async {
            for (name, roles) in hosts {
                let agent = FakeAgent {
                    host: (*name).to_owned(),
                    world: Arc::clone(&world),
                };
                let address = serve(tonic::service::Routes::new(AgentServer::new(agent))).await;
                let record = v1::HostRecord {
                    info: Some(v1::HostInfo {
                        name: (*name).to_owned(),
                        agent_address: address.to_string(),
                        portal: "127.0.0.1:3260".into(),
                        plane: v1::PlaneKind::User.into(),
                        runs_vms: roles.contains(&"vms"),
                        holds_store: roles.contains(&"store"),
                        version: "0.1.0".into(),
                        ..Default::default()
                    }),
                    connected: !roles.contains(&"silent"),
                    silent_ms: 1500,
                    attachments: 1,
                    ..Default::default()
                };
                world.lock().unwrap().hosts.push(record);
            }
            let coordinator = FakeCoordinator {
                world: Arc::clone(&world),
            };
            serve(tonic::service::Routes::new(CoordinatorServer::new(coordinator))).await
        });
        Self {
            world,
            coordinator: format!("http://{coordinator}"),
            runtime: Some(runtime),
        }
    }

    /// Adds an image of one origin.
    pub(crate) fn with_image(self, name: &str, version: u32, origin: &str) -> Self {
        self.world
            .lock()
            .unwrap()
            .images
            .push(image(name, version, origin, 1 << 20));
        self
    }

    /// Runs the program against them.
    pub(crate) fn run(&self, arguments: &[&str]) -> super::Run {
        let mut command = super::treeboot();
        super::Run::of(
            command
                .env("TREEBOOT_COORDINATOR", &self.coordinator)
                .args(arguments)
                .output()
                .unwrap(),
        )
    }

    /// The requests seen so far that change something.
    pub(crate) fn seen(&self) -> Vec<String> {
        self.world.lock().unwrap().seen.clone()
    }
}

/// A record of an image.
pub(crate) fn image(name: &str, version: u32, origin: &str, bytes: u64) -> v1::Image {
    v1::Image {
        id: Some(v1::ImageId {
            name: name.into(),
            version,
        }),
        digest: vec![7; 32],
        bytes,
        chunk_bytes: 65536,
        stripes: 1,
        stripe_unit_bytes: 65536,
        origins: vec![v1::Origin {
            host: origin.into(),
            endpoint: Some(v1::Endpoint {
                portal: "127.0.0.1:3260".into(),
                target: format!("iqn.2026-11.dev.treeboot:image:{name}:{version}"),
                data_lun: 0,
                hash_lun: Some(1),
            }),
            ..Default::default()
        }],
        allocated_bytes: bytes / 2,
        ..Default::default()
    }
}

async fn serve(routes: tonic::service::Routes) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_routes(routes)
            .serve_with_incoming(incoming),
    );
    address
}

fn unused<T>() -> Answer<T> {
    Err(Status::unimplemented("the fake does not play this"))
}

struct FakeCoordinator {
    world: Arc<Mutex<World>>,
}

impl FakeCoordinator {
    fn find(&self, wanted: Option<v1::ImageId>) -> Result<v1::Image, Status> {
        let wanted = wanted.unwrap_or_default();
        let world = self.world.lock().unwrap();
        let fits = |image: &&v1::Image| {
            let id = image.id.clone().unwrap_or_default();
            id.name == wanted.name && (wanted.version == 0 || id.version == wanted.version)
        };
        world
            .images
            .iter()
            .rev()
            .find(fits)
            .cloned()
            .ok_or_else(|| Status::not_found(format!("there is no image '{}'", wanted.name)))
    }
}

#[tonic::async_trait]
impl Coordinator for FakeCoordinator {
    type HeartbeatStream = Answers<v1::Push>;

    async fn get_image(&self, request: Request<v1::GetImageRequest>) -> Answer<v1::GetImageResponse> {
        let image = Some(self.find(request.into_inner().id)?);
        Ok(Response::new(v1::GetImageResponse {
            image,
            labels: Default::default(),
        }))
    }
    async fn list_images(&self, _: Request<v1::ListImagesRequest>) -> Answer<v1::ListImagesResponse> {
        let images = self.world.lock().unwrap().images.clone();
        Ok(Response::new(v1::ListImagesResponse { images }))
    }
    async fn label_image(&self, _: Request<v1::LabelImageRequest>) -> Answer<v1::LabelImageResponse> {
        Err(Status::unimplemented("not in this play"))
    }
    async fn remove_image(
        &self,
        request: Request<v1::RemoveImageRequest>,
    ) -> Answer<v1::RemoveImageResponse> {
        let request = request.into_inner();
        let image = self.find(request.id)?;
        let mut world = self.world.lock().unwrap();
        if !world.nodes.is_empty() && !request.force {
            return Err(Status::failed_precondition(format!(
                "{} hosts are attached to it",
                world.nodes.len()
            )));
        }
        world.images.retain(|other| other.id != image.id);
        world.seen.push("remove image".into());
        Ok(Response::new(v1::RemoveImageResponse { image: Some(image) }))
    }
    async fn list_hosts(&self, _: Request<v1::ListHostsRequest>) -> Answer<v1::ListHostsResponse> {
        let hosts = self.world.lock().unwrap().hosts.clone();
        Ok(Response::new(v1::ListHostsResponse { hosts }))
    }
    async fn get_host(&self, _: Request<v1::GetHostRequest>) -> Answer<v1::GetHostResponse> {
        unused()
    }
    async fn get_tree(&self, request: Request<v1::GetTreeRequest>) -> Answer<v1::GetTreeResponse> {
        let image = Some(self.find(request.into_inner().image)?);
        let nodes = self.world.lock().unwrap().nodes.clone();
        let epoch = Some(v1::Epoch {
            incarnation: 1,
            counter: 9,
        });
        Ok(Response::new(v1::GetTreeResponse {
            image,
            epoch,
            fan_out: 2,
            nodes,
        }))
    }
    async fn join(&self, _: Request<v1::JoinRequest>) -> Answer<v1::JoinResponse> {
        unused()
    }
    async fn register(&self, _: Request<v1::RegisterRequest>) -> Answer<v1::RegisterResponse> {
        unused()
    }
    async fn search(&self, request: Request<v1::SearchRequest>) -> Answer<v1::SearchResponse> {
        let request = request.into_inner();
        self.find(request.image)?;
        let limit = request.limit as usize;
        let candidates = (0..3).map(|number| v1::Candidate {
            parent: Some(v1::Parent {
                host: format!("host-{number}"),
                endpoint: Some(v1::Endpoint {
                    portal: "127.0.0.1:3260".into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            state: v1::AttachState::Ready.into(),
            free_slots: number,
            reason: format!("for '{}'", request.host),
            stripe: number % 2,
        });
        Ok(Response::new(v1::SearchResponse {
            candidates: candidates.take(limit).collect(),
        }))
    }
    async fn remove(&self, _: Request<v1::RemoveRequest>) -> Answer<v1::RemoveResponse> {
        unused()
    }
    async fn enroll(&self, _: Request<v1::EnrollRequest>) -> Result<Response<v1::CertifyResponse>, Status> {
        Err(Status::unimplemented("not played"))
    }

    async fn renew(&self, _: Request<v1::RenewRequest>) -> Result<Response<v1::CertifyResponse>, Status> {
        Err(Status::unimplemented("not played"))
    }

    async fn leave(&self, _: Request<v1::LeaveRequest>) -> Answer<v1::LeaveResponse> {
        unused()
    }
    async fn heartbeat(&self, _: Request<Streaming<v1::Beat>>) -> Answer<Self::HeartbeatStream> {
        unused()
    }
    async fn add_image(&self, _: Request<v1::AddImageRequest>) -> Answer<v1::AddImageResponse> {
        unused()
    }
}

/// Counts an import as broken unless it was complete: its stream fails, or the server drops the whole call.
struct Unfinished(Option<Arc<Mutex<World>>>);

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(world) = &self.0 {
            world.lock().unwrap().broken_imports += 1;
        }
    }
}

struct FakeAgent {
    host: String,
    world: Arc<Mutex<World>>,
}

impl FakeAgent {
    fn note(&self, what: &str, name: &str) {
        self.world
            .lock()
            .unwrap()
            .seen
            .push(format!("{what} {name} on {}", self.host));
    }

    /// Puts the parts of an import together, as an agent does.
    async fn receive(
        &self,
        mut parts: Streaming<v1::ImportPart>,
    ) -> Result<(v1::ImportHeader, Vec<u8>), Status> {
        let mut header = v1::ImportHeader::default();
        let mut content = Vec::new();
        let (mut written, mut sent) = (0, 0);
        while let Some(part) = parts.next().await {
            match part?.part {
                Some(v1::import_part::Part::Header(first)) => {
                    content = vec![0; first.bytes as usize];
                    header = first;
                }
                Some(v1::import_part::Part::Zero(zero)) => panic!("an image's zeroes are holes: {zero:?}"),
                Some(v1::import_part::Part::Data(data)) => {
                    let first = data.offset as usize;
                    assert!(first >= written, "offsets grow");
                    assert!(
                        !data.data.is_empty() && data.data.len() <= 1 << 20,
                        "parts are bounded"
                    );
                    written = first + data.data.len();
                    content[first..written].copy_from_slice(&data.data);
                    sent += data.data.len() as u64;
                    self.world.lock().unwrap().import_payload += data.data.len();
                    while self.world.lock().unwrap().hold_imports {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                }
                Some(v1::import_part::Part::End(end)) => {
                    assert_eq!(end.data_bytes, sent);
                    return Ok((header, content));
                }
                None => return Err(Status::invalid_argument("an empty part")),
            }
        }
        Err(Status::aborted("the stream ended without a part that says so"))
    }
}

#[tonic::async_trait]
impl Agent for FakeAgent {
    type AccessMapStream = Answers<v1::AccessMapPart>;
    type CloneStream = Answers<v1::CloneProgress>;
    type MigrateStream = Answers<v1::MigrateProgress>;
    type ReceiveDiskStream = Answers<v1::DiskAnswer>;
    type ExportDiskStream = Answers<v1::DiskPart>;
    type FlattenImageStream = Answers<v1::FlattenProgress>;
    type AdoptImageStream = Answers<v1::AdoptProgress>;
    type WatchVmStream = Answers<v1::Vm>;

    async fn create(&self, request: Request<v1::CreateRequest>) -> Answer<v1::CreateResponse> {
        let request = request.into_inner();
        self.note("create", &request.vm);
        let disk = v1::Disk {
            url: format!(
                "iscsi://127.0.0.1:3260/iqn.2026-11.dev.treeboot:disk:{}/0",
                request.vm
            ),
            vm: request.vm,
            image: request.image,
            bytes: 1 << 20,
            ..Default::default()
        };
        self.world
            .lock()
            .unwrap()
            .disks
            .entry(self.host.clone())
            .or_default()
            .push(disk.clone());
        Ok(Response::new(v1::CreateResponse {
            disk: Some(disk),
            secret: None,
        }))
    }
    async fn create_many(&self, request: Request<v1::CreateManyRequest>) -> Answer<v1::CreateManyResponse> {
        let v1::CreateManyRequest { vms, image, .. } = request.into_inner();
        let mut created = Vec::new();
        for vm in vms {
            let image = image.clone();
            let one = Request::new(v1::CreateRequest {
                vm: vm.clone(),
                image,
                device: false,
                limit_bytes: None,
            });
            let disk = Agent::create(self, one).await?.into_inner().disk;
            created.push(v1::Created {
                vm,
                disk,
                ..v1::Created::default()
            });
        }
        Ok(Response::new(v1::CreateManyResponse { created }))
    }
    async fn get_disk_secret(
        &self,
        _: Request<v1::GetDiskSecretRequest>,
    ) -> Answer<v1::GetDiskSecretResponse> {
        Ok(Response::new(v1::GetDiskSecretResponse { secret: None }))
    }
    async fn limit_disk(&self, request: Request<v1::LimitDiskRequest>) -> Answer<v1::LimitDiskResponse> {
        let v1::LimitDiskRequest { vm, limit_bytes } = request.into_inner();
        let disk = v1::Disk {
            vm,
            limit_bytes,
            ..Default::default()
        };
        Ok(Response::new(v1::LimitDiskResponse { disk: Some(disk) }))
    }
    async fn destroy(&self, request: Request<v1::DestroyRequest>) -> Answer<v1::DestroyResponse> {
        let vm = request.into_inner().vm;
        self.note("destroy", &vm);
        let mut world = self.world.lock().unwrap();
        world
            .vms
            .entry(self.host.clone())
            .or_default()
            .retain(|found| found.name != vm);
        world
            .disks
            .entry(self.host.clone())
            .or_default()
            .retain(|found| found.vm != vm);
        Ok(Response::new(v1::DestroyResponse {}))
    }
    async fn list(&self, _: Request<v1::ListRequest>) -> Answer<v1::ListResponse> {
        let disks = self
            .world
            .lock()
            .unwrap()
            .disks
            .get(&self.host)
            .cloned()
            .unwrap_or_default();
        Ok(Response::new(v1::ListResponse { disks }))
    }
    async fn attach(&self, request: Request<v1::AttachRequest>) -> Answer<v1::AttachResponse> {
        self.note(
            "attach",
            &request.get_ref().image.clone().unwrap_or_default().name,
        );
        let attachment = v1::Attachment {
            image: request.into_inner().image,
            state: v1::AttachState::Ready.into(),
            ..Default::default()
        };
        Ok(Response::new(v1::AttachResponse {
            attachment: Some(attachment),
            took_us: 12_345,
        }))
    }
    async fn detach(&self, request: Request<v1::DetachRequest>) -> Answer<v1::DetachResponse> {
        self.note("detach", &request.into_inner().image.unwrap_or_default().name);
        Ok(Response::new(v1::DetachResponse {}))
    }
    async fn status(&self, _: Request<v1::StatusRequest>) -> Answer<v1::StatusResponse> {
        let status = v1::StatusResponse {
            coordinator_connected: true,
            uptime_ms: 4200,
            ..Default::default()
        };
        Ok(Response::new(status))
    }
    async fn doctor(&self, request: Request<v1::DoctorRequest>) -> Answer<v1::DoctorResponse> {
        let orphan = v1::Finding {
            condition: "orphaned".into(),
            kind: "base".into(),
            name: "0123".into(),
            mendable: true,
            ..Default::default()
        };
        let findings = if request.into_inner().fix {
            vec![]
        } else {
            vec![orphan]
        };
        Ok(Response::new(v1::DoctorResponse {
            findings,
            ..Default::default()
        }))
    }
    async fn import_image(&self, request: Request<Streaming<v1::ImportPart>>) -> Answer<v1::ImportResponse> {
        let refusal = self.world.lock().unwrap().refuse_imports.clone();
        if let Some(refusal) = refusal {
            return Err(refusal);
        }
        let mut unfinished = Unfinished(Some(Arc::clone(&self.world)));
        let (header, content) = self.receive(request.into_inner()).await?;
        unfinished.0 = None;
        let id = header.image.unwrap_or_default();
        let image = image(&id.name, id.version.max(1), &self.host, header.bytes);
        self.world.lock().unwrap().imports.push(content);
        let directory = "/store/0707".to_owned();
        let response = v1::ImportResponse {
            image: Some(image),
            directory,
            created: true,
        };
        Ok(Response::new(response))
    }
    async fn adopt_image(&self, request: Request<v1::AdoptRequest>) -> Answer<Self::AdoptImageStream> {
        let request = request.into_inner();
        self.note("adopt", &request.urls.join(","));
        let id = request.image.unwrap_or_default();
        let result = v1::ImportResponse {
            image: Some(image(&id.name, id.version.max(1), &self.host, 1 << 20)),
            directory: "/store/0707".into(),
            created: true,
        };
        let steps = [
            v1::AdoptProgress {
                done_bytes: 1 << 19,
                total_bytes: 1 << 20,
                result: None,
            },
            v1::AdoptProgress {
                done_bytes: 1 << 20,
                total_bytes: 1 << 20,
                result: Some(result),
            },
        ];
        Ok(Response::new(Box::pin(tokio_stream::iter(steps.map(Ok)))))
    }
    async fn drop_image(&self, request: Request<v1::DropImageRequest>) -> Answer<v1::DropImageResponse> {
        self.note("drop", &request.into_inner().image.unwrap_or_default().name);
        Ok(Response::new(v1::DropImageResponse {}))
    }
    async fn start_vm(&self, request: Request<v1::StartVmRequest>) -> Answer<v1::StartVmResponse> {
        let request = request.into_inner();
        self.note("start", &request.vm);
        let vm = v1::Vm {
            name: request.vm,
            image: request.image,
            state: v1::VmState::Starting.into(),
            console_path: "/run/console".into(),
            acceleration: "tcg".into(),
            ..Default::default()
        };
        self.world
            .lock()
            .unwrap()
            .vms
            .entry(self.host.clone())
            .or_default()
            .push(vm.clone());
        Ok(Response::new(v1::StartVmResponse { vm: Some(vm) }))
    }
    async fn stop_vm(&self, request: Request<v1::StopVmRequest>) -> Answer<v1::StopVmResponse> {
        let vm = request.into_inner().vm;
        self.note("stop", &vm);
        let mut world = self.world.lock().unwrap();
        let vms = world.vms.entry(self.host.clone()).or_default();
        let found = vms.iter_mut().find(|found| found.name == vm);
        let found = found.ok_or_else(|| Status::not_found(format!("there is no VM '{vm}'")))?;
        found.state = v1::VmState::Stopped.into();
        Ok(Response::new(v1::StopVmResponse {
            vm: Some(found.clone()),
        }))
    }
    async fn watch_vm(&self, request: Request<v1::WatchVmRequest>) -> Answer<Self::WatchVmStream> {
        let name = request.into_inner().vm;
        let mut world = self.world.lock().unwrap();
        let fails = world.failing.contains(&name);
        let vms = world.vms.entry(self.host.clone()).or_default();
        let vm = vms
            .iter_mut()
            .find(|vm| vm.name == name)
            .ok_or_else(|| Status::not_found("no such VM"))?;
        let starting = vm.clone();
        if fails {
            vm.state = v1::VmState::Failed.into();
            vm.error = "QEMU ended at once".into();
        } else {
            vm.state = v1::VmState::Ready.into();
            vm.ready_us = 2_500_000;
        }
        let steps = [Ok(starting), Ok(vm.clone())];
        Ok(Response::new(Box::pin(tokio_stream::iter(steps))))
    }
    async fn list_vms(&self, _: Request<v1::ListVmsRequest>) -> Answer<v1::ListVmsResponse> {
        let vms = self
            .world
            .lock()
            .unwrap()
            .vms
            .get(&self.host)
            .cloned()
            .unwrap_or_default();
        Ok(Response::new(v1::ListVmsResponse { vms }))
    }
    async fn snapshot(&self, _: Request<v1::SnapshotRequest>) -> Answer<v1::SnapshotResponse> {
        unused()
    }
    async fn list_snapshots(
        &self,
        _: Request<v1::ListSnapshotsRequest>,
    ) -> Answer<v1::ListSnapshotsResponse> {
        unused()
    }
    async fn roll_back(&self, _: Request<v1::RollBackRequest>) -> Answer<v1::RollBackResponse> {
        unused()
    }
    async fn delete_snapshot(
        &self,
        _: Request<v1::DeleteSnapshotRequest>,
    ) -> Answer<v1::DeleteSnapshotResponse> {
        unused()
    }
    async fn describe(&self, _: Request<v1::DescribeRequest>) -> Answer<v1::DescribeResponse> {
        unused()
    }
    async fn show_cache(&self, _: Request<v1::ShowCacheRequest>) -> Answer<v1::CacheReport> {
        unused()
    }
    async fn change_cache(&self, _: Request<v1::ChangeCacheRequest>) -> Answer<v1::CacheReport> {
        unused()
    }
    async fn pin_cached(&self, _: Request<v1::PinCachedRequest>) -> Answer<v1::CacheReport> {
        unused()
    }
    async fn drop_cached(&self, _: Request<v1::DropCachedRequest>) -> Answer<v1::DropCachedResponse> {
        unused()
    }
    async fn check_delta(&self, _: Request<v1::CheckDeltaRequest>) -> Answer<v1::CheckDeltaResponse> {
        unused()
    }
    async fn clone(&self, _: Request<v1::CloneRequest>) -> Answer<Self::CloneStream> {
        unused()
    }
    async fn receive_disk(&self, _: Request<Streaming<v1::DiskPart>>) -> Answer<Self::ReceiveDiskStream> {
        unused()
    }
    async fn export_disk(&self, _: Request<v1::ExportDiskRequest>) -> Answer<Self::ExportDiskStream> {
        unused()
    }
    async fn flatten_image(&self, _: Request<v1::FlattenImageRequest>) -> Answer<Self::FlattenImageStream> {
        unused()
    }
    async fn migrate(&self, _: Request<v1::MigrateRequest>) -> Answer<Self::MigrateStream> {
        unused()
    }
    async fn take_vm(&self, _: Request<v1::TakeVmRequest>) -> Answer<v1::TakeVmResponse> {
        unused()
    }
    async fn settle_vm(&self, _: Request<v1::SettleVmRequest>) -> Answer<v1::SettleVmResponse> {
        unused()
    }
    async fn vm_taken(&self, _: Request<v1::VmTakenRequest>) -> Answer<v1::VmTakenResponse> {
        unused()
    }
    async fn take_back_vm(&self, _: Request<v1::TakeBackVmRequest>) -> Answer<v1::TakeBackVmResponse> {
        unused()
    }
    async fn access_map(&self, _: Request<v1::AccessMapRequest>) -> Answer<Self::AccessMapStream> {
        unused()
    }
}
