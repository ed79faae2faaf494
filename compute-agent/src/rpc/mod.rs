//! The `Agent` service: messages become types here, and errors become statuses, and nowhere else.

mod cache;
mod code;
mod convert;
mod streams;

pub(crate) use convert::status as status_of;

use std::sync::Arc;

use tonic::{Request, Response, Status};
use treeboot_identity::gate::Caller;
use treeboot_identity::{Role, Who};
use treeboot_proto::v1;
use treeboot_proto::v1::agent_server::Agent;
use treeboot_proto::{image_id, image_id_or_newest};
use treeboot_types::{HostName, ImageRef, Iqn, SnapshotName, VmName};

use crate::host::{CacheChange, DiskOptions, Host, HostError, Limited, chain};
use crate::plane::DiskPlace;

/// The service over one host.
pub struct Service {
    host: Host,
}

impl Service {
    /// Serves `host`.
    pub fn new(host: Host) -> Self {
        Self { host }
    }

    fn disk(&self, vm: &VmName) -> Result<v1::Disk, HostError> {
        let desired = self.host.desired();
        let state = desired.disks.get(vm).filter(|disk| !disk.is_arriving());
        let state = state.ok_or_else(|| HostError::UnknownVm {
            vm: vm.clone(),
            host: self.host.info().name.to_string(),
        })?;
        let stats = self.host.plane().disk_stats(vm).unwrap_or_default();
        let (url, device) = match self.host.plane().disk_place(vm)? {
            DiskPlace::Lun(url) => (url.to_string(), None),
            DiskPlace::Device(path) => (String::new(), Some(path)),
        };
        let device = self.host.plane().device(vm).or(device);
        Ok(v1::Disk {
            vm: vm.to_string(),
            image: Some((&state.image).into()),
            bytes: state.disk.bytes,
            initiator: match url.is_empty() {
                true => String::new(),
                false => Iqn::of_vm(vm).to_string(),
            },
            chap: !url.is_empty() && self.host.disk_secret(vm).is_some(),
            url,
            device: device.map_or_else(String::new, |path| path.display().to_string()),
            delta_bytes: stats.delta_bytes,
            read_bytes: stats.read_bytes,
            written_bytes: stats.written_bytes,
            sessions: stats.sessions,
            moving: convert::moving(state),
            data_bytes: stats.data_bytes,
            limit_bytes: state.limit_bytes.unwrap_or(0),
            limit_level: state.limit_bytes.map_or(0, |limit_bytes| {
                let limited = Limited {
                    vm: vm.clone(),
                    data_bytes: stats.data_bytes,
                    limit_bytes,
                };
                convert::limit_level(&limited).into()
            }),
        })
    }

    /// How one of many ended.
    fn created(&self, vm: &VmName, result: Result<(), HostError>) -> v1::Created {
        let mut created = v1::Created {
            vm: vm.to_string(),
            ..v1::Created::default()
        };
        match result.and_then(|()| self.disk(vm)) {
            Ok(disk) => {
                created.secret = self.secret_of(vm).filter(|_| disk.chap);
                created.disk = Some(disk);
            }
            Err(error) => {
                let status = status(error);
                created.code = status.code() as u32;
                created.error = status.message().to_owned();
            }
        }
        created
    }

    /// What the VM's front end proves itself by.
    fn secret_of(&self, vm: &VmName) -> Option<v1::DiskSecret> {
        Some(v1::DiskSecret {
            user: Iqn::of_vm(vm).to_string(),
            secret: self.host.disk_secret(vm)?,
        })
    }

    /// Whether whoever asks may use an image: the coordinator says which roles may. Hosts' own labels are looked at where it is attached.
    async fn may_use<T>(&self, request: &Request<T>, image: &ImageRef) -> Result<(), Status> {
        match person(request) {
            Some(role) if role < Role::Admin => self.host.may_use(image, role).await.map_err(status),
            _ => Ok(()),
        }
    }

    /// As [`may_use`](Self::may_use), of the image that a VM's disk stands on.
    async fn may_use_disk<T>(&self, request: &Request<T>, vm: &str) -> Result<(), Status> {
        let image = match self.host.desired().disks.get(&vm_name(vm)?) {
            None => return Ok(()),
            Some(state) => ImageRef {
                name: state.image.name.clone(),
                version: Some(state.image.version),
            },
        };
        self.may_use(request, &image).await
    }
}

/// Runs a verb to its end even if whoever asked goes away: half a verb is worse than a whole one that nobody waits for.
async fn whole<T: Send + 'static>(
    verb: impl Future<Output = Result<T, HostError>> + Send + 'static,
) -> Result<T, Status> {
    match tokio::spawn(verb).await {
        Ok(result) => result.map_err(status),
        Err(error) => Err(Status::internal(format!(
            "a bug ended the call, see the agent's log: {error}"
        ))),
    }
}

/// The role of the person who asks; none where a host does, or anybody may.
fn person<T>(request: &Request<T>) -> Option<Role> {
    match request.extensions().get::<Caller>() {
        Some(Caller(Who::Person { role, .. })) => Some(*role),
        _ => None,
    }
}

fn invalid(error: impl std::fmt::Display) -> Status {
    Status::invalid_argument(error.to_string())
}

fn snapshot_name(name: &str) -> Result<SnapshotName, Status> {
    SnapshotName::new(name).map_err(invalid)
}

fn vm_name(name: &str) -> Result<VmName, Status> {
    VmName::new(name).map_err(invalid)
}

/// An error as a status: the code for programs, the whole chain of reasons for people.
pub(crate) fn status(error: HostError) -> Status {
    use tonic::Code;
    let code = code::of(&error);
    if matches!(code, Code::Internal) {
        tracing::error!(error = %chain(&error), "a verb failed");
    }
    Status::new(code, chain(&error))
}

#[tonic::async_trait]
impl Agent for Service {
    async fn create(
        &self,
        request: Request<v1::CreateRequest>,
    ) -> Result<Response<v1::CreateResponse>, Status> {
        let image = image_id_or_newest(request.get_ref().image.as_ref()).map_err(invalid)?;
        self.may_use(&request, &image).await?;
        let request = request.into_inner();
        let options = DiskOptions::new(request.device, request.limit_bytes);
        let vm = vm_name(&request.vm)?;
        let (host, name) = (self.host.clone(), vm.clone());
        whole(async move { host.create_with(&name, &image, options).await }).await?;
        let disk = self.disk(&vm).map_err(status)?;
        let secret = self.secret_of(&vm).filter(|_| disk.chap);
        let disk = Some(disk);
        Ok(Response::new(v1::CreateResponse { disk, secret }))
    }

    async fn create_many(
        &self,
        request: Request<v1::CreateManyRequest>,
    ) -> Result<Response<v1::CreateManyResponse>, Status> {
        let image = image_id_or_newest(request.get_ref().image.as_ref()).map_err(invalid)?;
        self.may_use(&request, &image).await?;
        let request = request.into_inner();
        let options = DiskOptions::new(request.device, request.limit_bytes);
        let vms = convert::names_once(&request.vms)?;
        let (host, names) = (self.host.clone(), vms.clone());
        let results = whole(async move { host.create_many(names, &image, options).await }).await?;
        let created = vms
            .iter()
            .zip(results)
            .map(|(vm, result)| self.created(vm, result));
        Ok(Response::new(v1::CreateManyResponse {
            created: created.collect(),
        }))
    }

    async fn limit_disk(
        &self,
        request: Request<v1::LimitDiskRequest>,
    ) -> Result<Response<v1::LimitDiskResponse>, Status> {
        let v1::LimitDiskRequest { vm, limit_bytes } = request.into_inner();
        let vm = vm_name(&vm)?;
        let (host, name) = (self.host.clone(), vm.clone());
        whole(async move { host.limit(&name, limit_bytes).await }).await?;
        let disk = Some(self.disk(&vm).map_err(status)?);
        Ok(Response::new(v1::LimitDiskResponse { disk }))
    }

    async fn get_disk_secret(
        &self,
        request: Request<v1::GetDiskSecretRequest>,
    ) -> Result<Response<v1::GetDiskSecretResponse>, Status> {
        let vm = vm_name(&request.into_inner().vm)?;
        let disk = self.disk(&vm).map_err(status)?;
        let secret = self.secret_of(&vm).filter(|_| disk.chap);
        Ok(Response::new(v1::GetDiskSecretResponse { secret }))
    }

    async fn destroy(
        &self,
        request: Request<v1::DestroyRequest>,
    ) -> Result<Response<v1::DestroyResponse>, Status> {
        let request = request.into_inner();
        let vm = vm_name(&request.vm)?;
        let host = self.host.clone();
        whole(async move { host.destroy(&vm, request.instance_only).await }).await?;
        Ok(Response::new(v1::DestroyResponse {}))
    }

    async fn snapshot(
        &self,
        request: Request<v1::SnapshotRequest>,
    ) -> Result<Response<v1::SnapshotResponse>, Status> {
        let request = request.into_inner();
        let (vm, snapshot) = (vm_name(&request.vm)?, snapshot_name(&request.snapshot)?);
        let freeze = convert::freeze(request.freeze());
        let host = self.host.clone();
        let taken = whole(async move { host.snapshot_with(&vm, &snapshot, freeze).await }).await?;
        Ok(Response::new(v1::SnapshotResponse {
            layer: Some(convert::layer(&taken.layer, false)),
            created: taken.created,
            not_frozen: taken.not_frozen.unwrap_or_default(),
            trouble: taken.trouble.unwrap_or_default(),
        }))
    }

    async fn list_snapshots(
        &self,
        request: Request<v1::ListSnapshotsRequest>,
    ) -> Result<Response<v1::ListSnapshotsResponse>, Status> {
        let vm = vm_name(&request.into_inner().vm)?;
        let layers = self.host.layers(&vm, false).await.map_err(status)?;
        let layers = layers.iter().map(|layer| convert::layer(layer, false)).collect();
        Ok(Response::new(v1::ListSnapshotsResponse { layers }))
    }

    async fn roll_back(
        &self,
        request: Request<v1::RollBackRequest>,
    ) -> Result<Response<v1::RollBackResponse>, Status> {
        let request = request.into_inner();
        let (vm, snapshot) = (vm_name(&request.vm)?, snapshot_name(&request.snapshot)?);
        let host = self.host.clone();
        whole(async move { host.roll_back(&vm, &snapshot).await }).await?;
        Ok(Response::new(v1::RollBackResponse {}))
    }

    async fn delete_snapshot(
        &self,
        request: Request<v1::DeleteSnapshotRequest>,
    ) -> Result<Response<v1::DeleteSnapshotResponse>, Status> {
        let request = request.into_inner();
        let (vm, snapshot) = (vm_name(&request.vm)?, snapshot_name(&request.snapshot)?);
        let host = self.host.clone();
        whole(async move { host.delete_snapshot(&vm, &snapshot).await }).await?;
        Ok(Response::new(v1::DeleteSnapshotResponse {}))
    }

    async fn describe(
        &self,
        request: Request<v1::DescribeRequest>,
    ) -> Result<Response<v1::DescribeResponse>, Status> {
        let vm = vm_name(&request.into_inner().vm)?;
        let disk = self.disk(&vm).map_err(status)?;
        Ok(Response::new(convert::described(&self.host, &vm, disk).await))
    }

    async fn check_delta(
        &self,
        request: Request<v1::CheckDeltaRequest>,
    ) -> Result<Response<v1::CheckDeltaResponse>, Status> {
        let vm = vm_name(&request.into_inner().vm)?;
        let host = self.host.clone();
        let layers = whole(async move { host.layers(&vm, true).await }).await?;
        let layers = layers.iter().map(|layer| convert::layer(layer, true)).collect();
        Ok(Response::new(v1::CheckDeltaResponse { layers }))
    }

    type CloneStream = streams::Answers<v1::CloneProgress>;

    async fn clone(&self, request: Request<v1::CloneRequest>) -> Result<Response<Self::CloneStream>, Status> {
        self.may_use_disk(&request, &request.get_ref().vm).await?;
        let request = convert::clone_request(request.into_inner())?;
        let cloning = self.host.begin_clone(request);
        Ok(Response::new(streams::follow(cloning, convert::clone_progress)))
    }

    type ReceiveDiskStream = streams::Answers<v1::DiskAnswer>;

    async fn receive_disk(
        &self,
        request: Request<tonic::Streaming<v1::DiskPart>>,
    ) -> Result<Response<Self::ReceiveDiskStream>, Status> {
        let person = person(&request);
        let answers = streams::receive_disk(&self.host, person, request.into_inner()).await?;
        Ok(Response::new(answers))
    }

    type ExportDiskStream = streams::Answers<v1::DiskPart>;

    async fn export_disk(
        &self,
        request: Request<v1::ExportDiskRequest>,
    ) -> Result<Response<Self::ExportDiskStream>, Status> {
        self.may_use_disk(&request, &request.get_ref().vm).await?;
        let request = convert::export_request(request.into_inner())?;
        let exported = self.host.export(request).await.map_err(status)?;
        Ok(Response::new(streams::export(exported)))
    }

    type MigrateStream = streams::Answers<v1::MigrateProgress>;

    async fn migrate(
        &self,
        request: Request<v1::MigrateRequest>,
    ) -> Result<Response<Self::MigrateStream>, Status> {
        self.may_use_disk(&request, &request.get_ref().vm).await?;
        let request = convert::migrate_request(request.into_inner())?;
        let moving = self.host.begin_migration(request);
        Ok(Response::new(streams::follow(moving, convert::migrate_progress)))
    }

    async fn take_vm(
        &self,
        request: Request<v1::TakeVmRequest>,
    ) -> Result<Response<v1::TakeVmResponse>, Status> {
        let host = self.host.clone();
        let trouble = whole(async move { host.take_vm(request.into_inner()).await }).await?;
        Ok(Response::new(v1::TakeVmResponse { trouble }))
    }

    async fn settle_vm(
        &self,
        request: Request<v1::SettleVmRequest>,
    ) -> Result<Response<v1::SettleVmResponse>, Status> {
        let host = self.host.clone();
        let taken = whole(async move { host.settle_vm(request.into_inner()).await }).await?;
        Ok(Response::new(v1::SettleVmResponse { taken }))
    }

    async fn vm_taken(
        &self,
        request: Request<v1::VmTakenRequest>,
    ) -> Result<Response<v1::VmTakenResponse>, Status> {
        let host = self.host.clone();
        let taken_back = whole(async move { host.vm_taken(request.into_inner()).await }).await?;
        Ok(Response::new(v1::VmTakenResponse { taken_back }))
    }

    async fn take_back_vm(
        &self,
        request: Request<v1::TakeBackVmRequest>,
    ) -> Result<Response<v1::TakeBackVmResponse>, Status> {
        self.may_use_disk(&request, &request.get_ref().vm).await?;
        let v1::TakeBackVmRequest { vm, gone } = request.into_inner();
        let vm = VmName::new(&vm).map_err(invalid)?;
        let gone = HostName::new(&gone).map_err(invalid)?;
        let host = self.host.clone();
        let how = whole(async move { host.take_back(&vm, &gone).await }).await?;
        Ok(Response::new(v1::TakeBackVmResponse {
            how: convert::taken_back(how).into(),
        }))
    }

    async fn list(&self, _: Request<v1::ListRequest>) -> Result<Response<v1::ListResponse>, Status> {
        let desired = self.host.desired();
        let live = desired
            .disks
            .iter()
            .filter(|(_, disk)| !disk.doomed && !disk.is_arriving());
        let disks: Result<_, _> = live.map(|(vm, _)| self.disk(vm)).collect();
        let disks = disks.map_err(status)?;
        Ok(Response::new(v1::ListResponse { disks }))
    }

    async fn attach(
        &self,
        request: Request<v1::AttachRequest>,
    ) -> Result<Response<v1::AttachResponse>, Status> {
        let asked = tokio::time::Instant::now();
        let image: ImageRef = image_id_or_newest(request.get_ref().image.as_ref()).map_err(invalid)?;
        self.may_use(&request, &image).await?;
        let host = self.host.clone();
        let image = whole(async move { host.attach(&image).await }).await?;
        let attachment = self
            .host
            .attachment(&image)
            .map(|attachment| (&attachment).into());
        Ok(Response::new(v1::AttachResponse {
            attachment,
            took_us: asked.elapsed().as_micros() as u64,
        }))
    }

    async fn detach(
        &self,
        request: Request<v1::DetachRequest>,
    ) -> Result<Response<v1::DetachResponse>, Status> {
        let image = image_id(request.into_inner().image.as_ref()).map_err(invalid)?;
        let host = self.host.clone();
        whole(async move { host.detach(&image).await }).await?;
        Ok(Response::new(v1::DetachResponse {}))
    }

    async fn status(&self, _: Request<v1::StatusRequest>) -> Result<Response<v1::StatusResponse>, Status> {
        Ok(Response::new(convert::status(&self.host)))
    }

    async fn doctor(
        &self,
        request: Request<v1::DoctorRequest>,
    ) -> Result<Response<v1::DoctorResponse>, Status> {
        let v1::DoctorRequest { fix, grace_ms } = request.into_inner();
        let grace = grace_ms.map_or(crate::orphans::GRACE, std::time::Duration::from_millis);
        let host = self.host.clone();
        let (findings, failures) = whole(async move { host.doctor(fix, grace).await }).await?;
        let findings = findings.iter().map(convert::finding).collect();
        Ok(Response::new(v1::DoctorResponse { findings, failures }))
    }

    async fn show_cache(
        &self,
        _: Request<v1::ShowCacheRequest>,
    ) -> Result<Response<v1::CacheReport>, Status> {
        Ok(Response::new(cache::report(
            self.host.show_cache().map_err(status)?,
        )))
    }

    async fn change_cache(
        &self,
        request: Request<v1::ChangeCacheRequest>,
    ) -> Result<Response<v1::CacheReport>, Status> {
        let (host, change) = (self.host.clone(), cache::change(request.into_inner())?);
        let (view, _) = whole(async move { host.change_cache(change).await }).await?;
        Ok(Response::new(cache::report(view)))
    }

    async fn pin_cached(
        &self,
        request: Request<v1::PinCachedRequest>,
    ) -> Result<Response<v1::CacheReport>, Status> {
        let v1::PinCachedRequest { image, digest, unpin } = request.into_inner();
        let (host, image) = (self.host.clone(), cache::image(image, digest)?);
        let change = CacheChange::Pin {
            image,
            pinned: !unpin,
        };
        let (view, _) = whole(async move { host.change_cache(change).await }).await?;
        Ok(Response::new(cache::report(view)))
    }

    async fn drop_cached(
        &self,
        request: Request<v1::DropCachedRequest>,
    ) -> Result<Response<v1::DropCachedResponse>, Status> {
        let v1::DropCachedRequest { image, digest } = request.into_inner();
        let (host, change) = (self.host.clone(), CacheChange::Drop(cache::image(image, digest)?));
        let (_, dropped_bytes) = whole(async move { host.change_cache(change).await }).await?;
        Ok(Response::new(v1::DropCachedResponse { dropped_bytes }))
    }

    type AccessMapStream = streams::Answers<v1::AccessMapPart>;

    async fn access_map(
        &self,
        request: Request<v1::AccessMapRequest>,
    ) -> Result<Response<Self::AccessMapStream>, Status> {
        let image = image_id(request.into_inner().image.as_ref()).map_err(invalid)?;
        let desired = self.host.desired();
        let Some(state) = desired.images.get(&image) else {
            let host = self.host.info().name.to_string();
            return Err(status(HostError::NotAttached { image, host }));
        };
        let map = self.host.plane().access_map(&state.content.digest);
        Ok(Response::new(streams::access_map(map)))
    }

    async fn import_image(
        &self,
        request: Request<tonic::Streaming<v1::ImportPart>>,
    ) -> Result<Response<v1::ImportResponse>, Status> {
        let imported = streams::import(&self.host, request.into_inner()).await?;
        Ok(Response::new(convert::imported(&imported)))
    }

    type AdoptImageStream = streams::Answers<v1::AdoptProgress>;

    async fn adopt_image(
        &self,
        request: Request<v1::AdoptRequest>,
    ) -> Result<Response<Self::AdoptImageStream>, Status> {
        let request = request.into_inner();
        Ok(Response::new(streams::adopt(&self.host, &request)?))
    }

    async fn drop_image(
        &self,
        request: Request<v1::DropImageRequest>,
    ) -> Result<Response<v1::DropImageResponse>, Status> {
        let image = image_id(request.into_inner().image.as_ref()).map_err(invalid)?;
        let host = self.host.clone();
        whole(async move { host.drop_image(&image).await }).await?;
        Ok(Response::new(v1::DropImageResponse {}))
    }

    type FlattenImageStream = streams::Answers<v1::FlattenProgress>;

    async fn flatten_image(
        &self,
        request: Request<v1::FlattenImageRequest>,
    ) -> Result<Response<Self::FlattenImageStream>, Status> {
        let image = image_id(request.into_inner().image.as_ref()).map_err(invalid)?;
        Ok(Response::new(streams::flatten(&self.host, image)))
    }

    async fn start_vm(
        &self,
        request: Request<v1::StartVmRequest>,
    ) -> Result<Response<v1::StartVmResponse>, Status> {
        if request.get_ref().image.is_some() {
            let image = image_id_or_newest(request.get_ref().image.as_ref()).map_err(invalid)?;
            self.may_use(&request, &image).await?;
        }
        let request = request.into_inner();
        let vm = vm_name(&request.vm)?;
        let start = convert::start_request(request)?;
        let host = self.host.clone();
        let report = whole(async move { host.start_vm(&vm, start).await }).await?;
        let vm = Some(convert::vm(&report));
        Ok(Response::new(v1::StartVmResponse { vm }))
    }

    async fn stop_vm(
        &self,
        request: Request<v1::StopVmRequest>,
    ) -> Result<Response<v1::StopVmResponse>, Status> {
        let request = request.into_inner();
        let vm = vm_name(&request.vm)?;
        let host = self.host.clone();
        let report = whole(async move { host.stop_vm(&vm, request.force).await }).await?;
        let vm = Some(convert::vm(&report));
        Ok(Response::new(v1::StopVmResponse { vm }))
    }

    type WatchVmStream = streams::Answers<v1::Vm>;

    async fn watch_vm(
        &self,
        request: Request<v1::WatchVmRequest>,
    ) -> Result<Response<Self::WatchVmStream>, Status> {
        let vm = vm_name(&request.into_inner().vm)?;
        let watch = self.host.watch_vm(&vm).map_err(status)?;
        Ok(Response::new(streams::watch(watch)))
    }

    async fn list_vms(
        &self,
        _: Request<v1::ListVmsRequest>,
    ) -> Result<Response<v1::ListVmsResponse>, Status> {
        let reports = self.host.vms().await;
        let vms = reports.iter().map(convert::vm).collect();
        Ok(Response::new(v1::ListVmsResponse { vms }))
    }
}

/// The service, ready for a server.
pub fn server(host: Host) -> v1::agent_server::AgentServer<Service> {
    v1::agent_server::AgentServer::from_arc(Arc::new(Service::new(host)))
}
