//! A coordinator in this process and hosts that speak to it over real gRPC.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use treeboot_coordinator::daemon::{Daemon, listen};
use treeboot_coordinator::store::{SledStore, Store};
use treeboot_coordinator::tree::{KAry, Settings};
use treeboot_proto::v1::coordinator_client::CoordinatorClient;
use treeboot_proto::v1::{self, push};
use treeboot_types::PathPolicy;

pub(crate) type Client = CoordinatorClient<Channel>;

/// Long enough for a loaded machine, short enough to end.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

pub(crate) fn settings(beat_ms: u64, lease_ms: u64) -> Settings {
    Settings {
        policy: Arc::new(KAry { fan_out: 2 }),
        active_parents: 1,
        path_policy: PathPolicy::RoundRobin,
        beat_ms,
        lease_ms,
        pending_lease_ms: lease_ms,
    }
}

pub(crate) async fn start_at(address: &str, dir: &Path, settings: Settings) -> Daemon {
    let store = SledStore::open(dir).expect("a store");
    start_with(address, Arc::new(store), dir, settings).await
}

pub(crate) async fn start_with(
    address: &str,
    store: Arc<dyn Store>,
    dir: &Path,
    settings: Settings,
) -> Daemon {
    let listener = listen(address.parse().expect("an address"))
        .await
        .expect("a listener");
    Daemon::start_with(settings, store, listener, dir)
        .await
        .expect("a daemon")
}

pub(crate) async fn client(address: SocketAddr) -> Client {
    Client::connect(format!("http://{address}"))
        .await
        .expect("a connection")
}

pub(crate) fn image_id() -> v1::ImageId {
    v1::ImageId {
        name: "debian".into(),
        version: 1,
    }
}

pub(crate) fn image() -> v1::Image {
    v1::Image {
        id: Some(v1::ImageId {
            name: "debian".into(),
            version: 0,
        }),
        digest: vec![3; 32],
        bytes: 1 << 30,
        origins: vec![v1::Origin {
            endpoint: Some(endpoint("10.9.9.9:3260")),
            ..Default::default()
        }],
        ..Default::default()
    }
}

pub(crate) fn endpoint(portal: &str) -> v1::Endpoint {
    v1::Endpoint {
        portal: portal.into(),
        target: "iqn.2026-11.dev.treeboot:image:debian:1".into(),
        data_lun: 0,
        hash_lun: Some(1),
    }
}

pub(crate) async fn add_image(client: &mut Client) {
    let request = v1::AddImageRequest { image: Some(image()) };
    client.add_image(request).await.expect("an image");
}

/// What a host was pushed so far.
#[derive(Debug, Clone, Default)]
pub(crate) struct Heard {
    pub(crate) welcomes: usize,
    pub(crate) acks: u64,
    pub(crate) placement: Option<v1::Placement>,
    pub(crate) placements: usize,
    pub(crate) at: Option<Instant>,
    pub(crate) detached: Vec<String>,
    pub(crate) refused: Option<String>,
    pub(crate) ended: bool,
}

/// One agent, as far as the coordinator can tell.
pub(crate) struct Host {
    pub(crate) name: String,
    pub(crate) instance: String,
    pub(crate) portal: String,
    client: Client,
    beats: mpsc::Sender<v1::Beat>,
    pub(crate) heard: watch::Receiver<Heard>,
    pub(crate) joined: Option<v1::Placement>,
    sequence: u64,
}

impl Host {
    pub(crate) fn names(number: usize) -> (String, String) {
        (
            format!("h{number}"),
            format!("10.0.{}.{}:3260", number / 250, number % 250 + 1),
        )
    }

    /// Opens a stream and waits for the first push.
    pub(crate) async fn connect(client: Client, number: usize) -> Self {
        let (name, portal) = Self::names(number);
        Self::connect_as(client, &name, "instance", &portal, Vec::new()).await
    }

    pub(crate) async fn connect_as(
        mut client: Client,
        name: &str,
        instance: &str,
        portal: &str,
        attachments: Vec<v1::Attachment>,
    ) -> Self {
        let (beats, outgoing) = mpsc::channel(16);
        let (told, mut heard) = watch::channel(Heard::default());
        let mut host = Self {
            name: name.into(),
            instance: instance.into(),
            portal: portal.into(),
            client: client.clone(),
            beats,
            heard: heard.clone(),
            joined: None,
            sequence: 0,
        };
        host.beat(Some(attachments)).await;
        let stream = client
            .heartbeat(ReceiverStream::new(outgoing))
            .await
            .expect("a stream");
        let mut pushes = stream.into_inner();
        tokio::spawn(async move {
            while let Some(Ok(push)) = pushes.next().await {
                told.send_modify(|heard| heard.take(push.push));
            }
            told.send_modify(|heard| heard.ended = true);
        });
        let first = heard.wait_for(|h| h.welcomes > 0 || h.refused.is_some() || h.ended);
        tokio::time::timeout(DEADLINE, first)
            .await
            .expect("in time")
            .expect("a push");
        host
    }

    pub(crate) async fn beat(&mut self, attachments: Option<Vec<v1::Attachment>>) {
        self.sequence += 1;
        let state = attachments.map(|attachments| v1::HostState {
            info: Some(v1::HostInfo {
                name: self.name.clone(),
                instance: self.instance.clone(),
                portal: self.portal.clone(),
                ..Default::default()
            }),
            attachments,
            vms: 0,
        });
        let beat = v1::Beat {
            sequence: self.sequence,
            host: self.name.clone(),
            instance: self.instance.clone(),
            state_digest: vec![1],
            state,
            bad_parents: Vec::new(),
        };
        // The stream may have ended, which a test sees in what was heard.
        let _ = self.beats.send(beat).await;
    }

    pub(crate) async fn join(&mut self) -> Result<v1::Placement, tonic::Status> {
        let request = v1::JoinRequest {
            host: self.name.clone(),
            instance: self.instance.clone(),
            image: Some(image_id()),
            endpoint: Some(endpoint(&self.portal)),
        };
        let answer = self.client.join(request).await?.into_inner();
        let placement = answer.placement.expect("a placement");
        self.joined = Some(placement.clone());
        Ok(placement)
    }

    pub(crate) async fn register(&mut self) {
        let request = v1::RegisterRequest {
            host: self.name.clone(),
            instance: self.instance.clone(),
            image: Some(image_id()),
            epoch: self.placement().epoch,
        };
        self.client.register(request).await.expect("registered");
    }

    pub(crate) async fn leave(&mut self) {
        let request = v1::LeaveRequest {
            host: self.name.clone(),
            instance: self.instance.clone(),
        };
        self.client.leave(request).await.expect("left");
    }

    /// The newest placement, by answer or push.
    pub(crate) fn placement(&self) -> v1::Placement {
        let epoch = |p: &v1::Placement| p.epoch.map(|e| (e.incarnation, e.counter));
        let pushed = self.heard.borrow().placement.clone();
        let all = self.joined.clone().into_iter().chain(pushed);
        all.max_by_key(epoch).expect("a placement")
    }

    pub(crate) fn parents(&self) -> Vec<String> {
        let placement = self.placement();
        placement.stripes[0]
            .active
            .iter()
            .map(|p| p.host.clone())
            .collect()
    }

    pub(crate) fn attachment(&self) -> v1::Attachment {
        let placement = self.placement();
        v1::Attachment {
            image: Some(image_id()),
            digest: vec![3; 32],
            epoch: placement.epoch,
            endpoint: Some(endpoint(&self.portal)),
            state: v1::AttachState::Ready.into(),
            stripes: placement.stripes,
        }
    }

    pub(crate) async fn wait(&mut self, what: &str, condition: impl FnMut(&Heard) -> bool) -> Heard {
        let heard = tokio::time::timeout(DEADLINE, self.heard.wait_for(condition)).await;
        heard
            .unwrap_or_else(|_| panic!("{}: {what} did not come in time", self.name))
            .expect("the stream's task lives")
            .clone()
    }
}

impl Heard {
    fn take(&mut self, push: Option<push::Push>) {
        match push {
            Some(push::Push::Welcome(_)) => self.welcomes += 1,
            Some(push::Push::Ack(ack)) => self.acks = ack.sequence,
            Some(push::Push::Placement(placement)) => {
                self.placement = Some(placement);
                self.placements += 1;
                self.at = Some(Instant::now());
            }
            Some(push::Push::Detach(detach)) => self.detached.push(detach.reason),
            Some(push::Push::Refused(refused)) => self.refused = Some(refused.reason),
            Some(push::Push::SendState(_)) | None => {}
        }
    }
}

/// The tree as host → (depth, parents).
pub(crate) async fn tree(client: &mut Client) -> BTreeMap<String, (u32, Vec<String>)> {
    let request = v1::GetTreeRequest {
        image: Some(image_id()),
    };
    let answer = client.get_tree(request).await.expect("a tree").into_inner();
    let nodes = answer.nodes.into_iter().filter(|n| !n.origin);
    nodes.map(|n| (n.host, (n.depth, n.parents))).collect()
}
