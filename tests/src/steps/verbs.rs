//! The verbs: where each begins, its call, and what there is to be read afterwards.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::Duration;

use crate::cluster::Cluster;
use crate::daemon::Daemon;
use crate::fleet::{self, Order, last};
use crate::image::{BLOCK_BYTES, Pattern};
use crate::measure::newest;
use crate::reader::{Blocks, check_blocks, check_read, log_in, write_blocks};
use crate::wait::wait_until;
use anyhow::{Context as _, Result, ensure};
use tonic::{Code, Status};
use treeboot_proto::v1;
use treeboot_proto::v1::agent_client::AgentClient;
use treeboot_types::PlaneKind;

const MIB: u64 = 1 << 20;
const BLOCK: u64 = BLOCK_BYTES as u64;
pub(super) const IMAGE: &str = "pattern";
pub(super) const PATTERN: Pattern = Pattern {
    seed: 83,
    bytes: 2 * MIB,
};
/// Blocks, and what they are filled with.
type Written = (&'static [u64], u8);
/// What VMs write, first and later.
const FIRST: Written = (&[3, 7, 64, 65, 300], 1);
const LATER: Written = (&[7, 66, 301], 2);
/// Disks of one call.
const MANY: usize = 3;
/// Verbs are refused for a moment while a front end that is gone is still logged in, or a host that died is expected back.
const SOON: Duration = Duration::from_secs(60);

/// What is called: a verb of an agent, in one of its forms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "they are the verbs' names")]
pub enum Verb {
    Create,
    CreateDevice,
    CreateMany,
    Destroy,
    DestroyDevice,
    DestroyInstanceOnly,
    DestroyRunning,
    Start,
    Stop,
    Attach,
    Detach,
    Snapshot,
    RollBack,
    DeleteSnapshot,
    CloneHere,
    CloneThere,
    Migrate,
    Limit,
    Import,
    RemoveImage,
    Publish,
    Flatten,
}

/// Who dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Who has the image.
    Origin,
    /// Whose verb it is.
    Here,
    /// Where a clone or a VM goes.
    There,
}

use Role::{Here, Origin, There};

/// The agents, and names that no other test on this machine has.
pub(super) struct World<'a> {
    pub(super) cluster: &'a Cluster,
    pub(super) plane: PlaneKind,
    pub(super) vm: String,
}

/// What a call of `treeboot` said; it did not succeed.
fn said(error: anyhow::Error) -> Status {
    let words = format!("{error:#}");
    match words.contains("is not known") || words.contains("no image") {
        true => Status::not_found(words),
        false => Status::unavailable(words),
    }
}

fn status(error: anyhow::Error) -> Status {
    match error.downcast::<Status>() {
        Ok(status) => status,
        Err(error) => Status::unavailable(format!("{error:#}")),
    }
}

fn version(version: u32) -> Option<v1::ImageId> {
    let name = IMAGE.into();
    Some(v1::ImageId { name, version })
}

impl<'a> World<'a> {
    pub(super) fn new(cluster: &'a Cluster, plane: PlaneKind) -> Self {
        Self {
            cluster,
            plane,
            vm: format!("s{}", std::process::id()),
        }
    }

    pub(super) fn agent(&self, role: Role) -> &Daemon {
        match role {
            Origin => &self.cluster.origin,
            Here => &self.cluster.hosts[0],
            There => &self.cluster.hosts[1],
        }
    }

    fn copy(&self) -> String {
        format!("{}-copy", self.vm)
    }

    fn many(&self) -> Vec<String> {
        (0..MANY).map(|n| format!("{}-{n}", self.vm)).collect()
    }

    pub(super) fn file(&self) -> PathBuf {
        self.cluster.path().join("pattern.raw")
    }

    /// Agents that died meanwhile live again.
    pub(super) async fn revive(&self) -> Result<bool> {
        let mut revived = false;
        for agent in self.cluster.agents() {
            if !agent.is_running() {
                let ended = agent.wait_exit(SOON).await?;
                ensure!(
                    std::os::unix::process::ExitStatusExt::signal(&ended) == Some(9),
                    "{} ended with {ended}: {}",
                    agent.name(),
                    agent.log_tail()
                );
                self.cluster.restart(agent).await?;
                revived = true;
            }
        }
        if revived {
            self.cluster.wait_known().await?;
        }
        Ok(revived)
    }

    /// Calls until it succeeds, or says that there is nothing left to do, as `done` says.
    pub(super) async fn insist(
        &self,
        what: &str,
        done: &[Code],
        mut call: impl AsyncFnMut() -> Result<(), Status>,
    ) -> Result<()> {
        let words = parking_lot::Mutex::new(None);
        let called = wait_until(SOON, what, async || {
            self.revive().await?;
            match call().await {
                Ok(()) => Ok(Some(())),
                Err(status) if done.contains(&status.code()) => Ok(Some(())),
                Err(status) => {
                    let again = matches!(
                        status.code(),
                        // Cancelled: a connection that broke with the agent.
                        Code::Unavailable | Code::FailedPrecondition | Code::Unknown | Code::Cancelled
                    );
                    ensure!(again, "{what}: {status}");
                    *words.lock() = Some(status);
                    Ok(None)
                }
            }
        });
        called.await.with_context(|| format!("{:?}", words.lock()))
    }

    /// Nothing is on the hosts, and the origin has the one image.
    pub(super) async fn reset(&self) -> Result<()> {
        let mut names = self.many();
        names.extend([self.vm.clone(), self.copy()]);
        for agent in &self.cluster.hosts {
            self.insist("the VMs to be gone", &[], async || {
                let mut client = agent.agent().await.map_err(status)?;
                let listed = client.list(v1::ListRequest {}).await?.into_inner();
                let there = names
                    .iter()
                    .filter(|vm| listed.disks.iter().any(|disk| disk.vm == **vm));
                for vm in there {
                    let stopped = fleet::stop(agent, vm, true).await.map_err(status);
                    if let Err(status) = stopped
                        && status.code() != Code::NotFound
                    {
                        return Err(status);
                    }
                    let request = v1::DestroyRequest {
                        vm: vm.clone(),
                        instance_only: false,
                    };
                    client.destroy(request).await?;
                }
                Ok(())
            })
            .await?;
            for number in [1, 2] {
                let request = v1::DetachRequest {
                    image: version(number),
                };
                self.insist("it to be detached", &[Code::NotFound], async || {
                    let mut client = agent.agent().await.map_err(status)?;
                    client.detach(request.clone()).await.map(drop)
                })
                .await?;
            }
        }
        let made = [("pattern@2", version(2)), ("second@1", Some(newest("second")))];
        for (image, id) in made {
            let mut coordinator = self.cluster.coordinator.coordinator().await?;
            let request = v1::GetImageRequest {
                id,
                role: String::new(),
            };
            if coordinator.get_image(request).await.is_ok() {
                self.insist("the image to be removed", &[Code::NotFound], async || {
                    self.remove(image).await
                })
                .await?;
            }
        }
        Ok(())
    }

    pub(super) async fn call_until_done(&self, verb: Verb) -> Result<()> {
        self.insist(&format!("{verb:?}"), verb.done(), async || self.call(verb).await)
            .await
    }

    async fn remove(&self, image: &str) -> Result<(), Status> {
        let args = ["image", "remove", image, "--force"];
        self.cluster.treeboot(&args).await.map(drop).map_err(said)
    }

    async fn write(&self, vm: &str, (blocks, fill): Written) -> Result<()> {
        if self.plane == PlaneKind::Kernel {
            return write_device(self.device(vm).await?, (blocks, fill)).await;
        }
        let (session, lun) = log_in(self.agent(Here), IMAGE, vm).await?;
        write_blocks(&session, lun, blocks, fill).await
    }

    /// Where a disk of the kernel plane is; it is made where there is none.
    async fn device(&self, vm: &str) -> Result<PathBuf> {
        let request = v1::CreateRequest {
            vm: vm.to_owned(),
            image: version(1),
            device: false,
            limit_bytes: None,
        };
        let created = self.agent(Here).agent().await?.create(request).await?;
        let disk = created.into_inner().disk.context("an answer without the disk")?;
        Ok(disk.device.into())
    }

    /// As [`World::write`], and then a snapshot.
    async fn write_and_freeze(&self, what: Written, snapshot: &str) -> Result<()> {
        self.write(&self.vm, what).await?;
        self.snapshot(snapshot).await?;
        Ok(())
    }

    async fn snapshot(&self, snapshot: &str) -> Result<(), Status> {
        let mut client = self.agent(Here).agent().await.map_err(status)?;
        let request = v1::SnapshotRequest {
            vm: self.vm.clone(),
            snapshot: snapshot.into(),
            ..v1::SnapshotRequest::default()
        };
        client.snapshot(request).await.map(drop)
    }

    /// From nothing to where the verb begins.
    pub(super) async fn prepare(&self, verb: Verb) -> Result<()> {
        match verb {
            Verb::Create
            | Verb::CreateDevice
            | Verb::CreateMany
            | Verb::Start
            | Verb::Attach
            | Verb::Import => Ok(()),
            Verb::Destroy | Verb::DestroyInstanceOnly if self.plane == PlaneKind::Kernel => {
                self.write(&self.vm, FIRST).await
            }
            Verb::Destroy | Verb::DestroyInstanceOnly | Verb::Migrate | Verb::RollBack => {
                self.write_and_freeze(FIRST, "first").await?;
                self.write(&self.vm, LATER).await
            }
            Verb::DestroyDevice => self.call_until_done(Verb::CreateDevice).await,
            Verb::Stop | Verb::DestroyRunning => self.call_until_done(Verb::Start).await,
            Verb::Detach => self.call_until_done(Verb::Attach).await,
            Verb::Snapshot | Verb::CloneHere | Verb::CloneThere | Verb::Limit | Verb::Publish => {
                self.write(&self.vm, FIRST).await
            }
            Verb::DeleteSnapshot => {
                self.write_and_freeze(FIRST, "first").await?;
                self.write_and_freeze(LATER, "later").await
            }
            Verb::RemoveImage => self.call_until_done(Verb::Import).await,
            Verb::Flatten => {
                self.write(&self.vm, FIRST).await?;
                self.call_until_done(Verb::Publish).await
            }
        }
    }

    pub(super) async fn call(&self, verb: Verb) -> Result<(), Status> {
        let vm = self.vm.clone();
        let create = |device| v1::CreateRequest {
            vm: self.vm.clone(),
            image: version(1),
            device,
            limit_bytes: None,
        };
        let destroy = |instance_only| v1::DestroyRequest {
            vm: self.vm.clone(),
            instance_only,
        };
        let on = if verb == Verb::Flatten { Origin } else { Here };
        let mut client = self.agent(on).agent().await.map_err(status)?;
        match verb {
            Verb::Create => client.create(create(false)).await.map(drop),
            Verb::CreateDevice => client.create(create(true)).await.map(drop),
            Verb::CreateMany => {
                let request = v1::CreateManyRequest {
                    vms: self.many(),
                    image: version(1),
                    device: false,
                    limit_bytes: None,
                };
                let created = client.create_many(request).await?.into_inner().created;
                match created.into_iter().find(|created| created.code != 0) {
                    None => Ok(()),
                    Some(not) => Err(Status::unknown(not.error)),
                }
            }
            Verb::Destroy | Verb::DestroyDevice | Verb::DestroyRunning => {
                client.destroy(destroy(false)).await.map(drop)
            }
            Verb::DestroyInstanceOnly => client.destroy(destroy(true)).await.map(drop),
            Verb::Start => {
                let order = Order {
                    vm,
                    image: IMAGE.into(),
                    ready_line: "it has no system that could say so".into(),
                    limit: Duration::from_secs(3600),
                    memory_mib: 64,
                    user_data: String::new(),
                };
                fleet::start(self.agent(Here), &order)
                    .await
                    .map(drop)
                    .map_err(status)
            }
            Verb::Stop => fleet::stop(self.agent(Here), &vm, true).await.map_err(status),
            Verb::Attach => client
                .attach(v1::AttachRequest { image: version(1) })
                .await
                .map(drop),
            Verb::Detach => client
                .detach(v1::DetachRequest { image: version(1) })
                .await
                .map(drop),
            Verb::Snapshot => self.snapshot("first").await,
            Verb::RollBack => {
                let snapshot = "first".into();
                client
                    .roll_back(v1::RollBackRequest { vm, snapshot })
                    .await
                    .map(drop)
            }
            Verb::DeleteSnapshot => {
                let snapshot = "first".into();
                let request = v1::DeleteSnapshotRequest { vm, snapshot };
                client.delete_snapshot(request).await.map(drop)
            }
            Verb::CloneHere | Verb::CloneThere => {
                let to = self.agent(if verb == Verb::CloneHere { Here } else { There });
                let request = v1::CloneRequest {
                    vm,
                    destination: to.name().into(),
                    new_vm: self.copy(),
                    destination_address: to.bound().map_err(status)?.rpc.to_string(),
                    snapshot: String::new(),
                };
                let stream = AgentClient::clone(&mut client, request).await?;
                last(stream.into_inner(), |step| step.result.is_some()).await
            }
            Verb::Migrate => {
                let to = self.agent(There);
                let request = v1::MigrateRequest {
                    vm,
                    destination: to.name().into(),
                    destination_address: to.bound().map_err(status)?.rpc.to_string(),
                };
                let stream = client.migrate(request).await?;
                last(stream.into_inner(), |step| step.result.is_some()).await
            }
            Verb::Limit => {
                let limit_bytes = 8 * MIB;
                client
                    .limit_disk(v1::LimitDiskRequest { vm, limit_bytes })
                    .await
                    .map(drop)
            }
            Verb::Import => self.cluster.import(&self.file(), "second@1").await.map_err(said),
            Verb::RemoveImage => self.remove("second@1").await,
            Verb::Publish => {
                let args = ["publish", &vm, "pattern@2", "--host", "h1"];
                self.cluster.treeboot(&args).await.map(drop).map_err(said)
            }
            Verb::Flatten => {
                let request = v1::FlattenImageRequest { image: version(2) };
                let stream = client.flatten_image(request).await?;
                last(stream.into_inner(), |step| step.result.is_some()).await
            }
        }
    }

    /// What there is afterwards has the bytes that it should have.
    pub(super) async fn check(&self, verb: Verb) -> Result<()> {
        let vm = self.vm.as_str();
        match verb {
            Verb::Create
            | Verb::Destroy
            | Verb::DestroyDevice
            | Verb::DestroyInstanceOnly
            | Verb::DestroyRunning
            | Verb::Detach
            | Verb::Attach => self.holds(Here, vm, &[]).await,
            Verb::CreateMany => {
                for vm in self.many() {
                    self.write(&vm, FIRST).await?;
                    self.holds(Here, &vm, &[FIRST]).await?;
                }
                Ok(())
            }
            Verb::CreateDevice => {
                let path = PathBuf::from("/dev/treeboot").join(vm);
                write_device(path.clone(), FIRST).await?;
                check_device(path, blocks_of(&[FIRST])).await
            }
            Verb::Snapshot | Verb::Limit | Verb::RollBack => self.holds(Here, vm, &[FIRST]).await,
            Verb::DeleteSnapshot => {
                self.holds(Here, vm, &[FIRST, LATER]).await?;
                self.write(vm, FIRST).await?;
                self.roll_back_to(Here, "later").await?;
                self.holds(Here, vm, &[FIRST, LATER]).await
            }
            Verb::CloneHere => {
                self.holds(Here, vm, &[FIRST]).await?;
                self.holds(Here, &self.copy(), &[FIRST]).await
            }
            Verb::CloneThere => {
                self.holds(Here, vm, &[FIRST]).await?;
                self.holds(There, &self.copy(), &[FIRST]).await
            }
            Verb::Migrate => {
                self.holds(There, vm, &[FIRST, LATER]).await?;
                self.roll_back_to(There, "first").await?;
                self.holds(There, vm, &[FIRST]).await
            }
            Verb::Publish | Verb::Flatten => self.holds(There, &self.copy(), &[FIRST]).await,
            Verb::Start | Verb::Stop => Ok(()),
            Verb::RemoveImage => self.holds(There, vm, &[]).await,
            Verb::Import => {
                let (session, lun) = log_in(self.agent(There), "second", &self.copy()).await?;
                check_blocks(&session, lun, PATTERN, &Blocks::new()).await
            }
        }
    }

    async fn roll_back_to(&self, role: Role, snapshot: &str) -> Result<()> {
        self.insist("the roll-back", &[], async || {
            let mut client = self.agent(role).agent().await.map_err(status)?;
            let request = v1::RollBackRequest {
                vm: self.vm.clone(),
                snapshot: snapshot.into(),
            };
            client.roll_back(request).await.map(drop)
        })
        .await
    }

    async fn holds(&self, role: Role, vm: &str, written: &[Written]) -> Result<()> {
        let blocks = blocks_of(written);
        if self.plane == PlaneKind::Kernel {
            return check_device(self.device(vm).await?, blocks).await;
        }
        let (session, lun) = log_in(self.agent(role), IMAGE, vm).await?;
        let read = check_blocks(&session, lun, PATTERN, &blocks).await;
        read.with_context(|| format!("{vm} on {}", self.agent(role).name()))
    }
}

fn blocks_of(written: &[Written]) -> Blocks {
    let each = written
        .iter()
        .flat_map(|(blocks, fill)| blocks.iter().map(move |n| (*n, *fill)));
    each.collect()
}

async fn write_device(path: PathBuf, (blocks, fill): Written) -> Result<()> {
    let write = move || {
        let device = File::options().write(true).open(path)?;
        for block in blocks {
            device.write_all_at(&[fill; BLOCK_BYTES], block * BLOCK)?;
        }
        Ok(device.sync_all()?)
    };
    tokio::task::spawn_blocking(write).await?
}

async fn check_device(path: PathBuf, blocks: Blocks) -> Result<()> {
    let check = move || {
        let mut bytes = vec![0; usize::try_from(PATTERN.bytes)?];
        File::open(path)?.read_exact_at(&mut bytes, 0)?;
        check_read(0, &bytes, PATTERN, &blocks)
    };
    tokio::task::spawn_blocking(check).await?
}

impl Verb {
    /// What the same call may say where it was done already.
    pub(super) fn done(self) -> &'static [Code] {
        match self {
            Self::Destroy
            | Self::DestroyDevice
            | Self::DestroyInstanceOnly
            | Self::DestroyRunning
            | Self::Detach
            | Self::DeleteSnapshot
            | Self::Migrate
            | Self::RemoveImage => &[Code::NotFound],
            Self::Snapshot | Self::CloneHere | Self::CloneThere => &[Code::AlreadyExists],
            _ => &[],
        }
    }
}
