//! Hosts as far as a coordinator can tell: each with its own key, certificate, connection and heartbeat stream, all in this process.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use parking_lot::Mutex;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use treeboot_identity::authority::Authority;
use treeboot_identity::tls::Dialer;
use treeboot_identity::{Holder, Who};
use treeboot_proto::v1;
use treeboot_proto::v1::coordinator_client::CoordinatorClient;
use treeboot_types::HostName;

/// A host beats so often.
pub(super) const BEAT: Duration = Duration::from_secs(5);
pub(super) const IMAGE: &str = "debian";
const CERTIFICATE_LIFE: Duration = Duration::from_secs(86_400);
/// As an agent: a call or a connection that fails is tried again.
const AGAIN_AFTER: Duration = Duration::from_millis(500);
const CONNECT_LIMIT: Duration = Duration::from_secs(30);
/// For one host to come, with all attempts.
const COMES_WITHIN: Duration = Duration::from_secs(180);
const INSTANCE: &str = "2f0d5e9c-0b7e-4c35-9a53-6f6a3c1f7d10";

/// A host that has a certificate and is not connected.
pub(super) struct Member {
    name: String,
    portal: String,
    dialer: Dialer,
}

/// Makes so many hosts with certificates of `authority`.
pub(super) fn members(authority: &Authority, hosts: usize) -> Result<Vec<Arc<Member>>> {
    let member = |number: usize| {
        let name = format!("h{number}");
        let who = Who::Host(HostName::new(&name)?);
        let credentials = authority.issue(&who, CERTIFICATE_LIFE)?;
        Ok(Arc::new(Member {
            dialer: Dialer::mutual(&Holder::new(credentials), Who::Coordinator)?,
            portal: format!(
                "10.{}.{}.{}:3260",
                number / 65_536,
                number / 256 % 256,
                number % 256
            ),
            name,
        }))
    };
    (0..hosts).map(member).collect()
}

/// What a host heard.
#[derive(Default)]
struct Heard {
    placement: Option<v1::Placement>,
    /// It reads otherwise than the state that was sent last.
    changed: bool,
    /// Who its parents were since when, while that is recorded.
    parents: Vec<(Instant, Vec<String>)>,
}

/// A connected host, which beats for as long as it is there and is not silenced.
pub(super) struct Host {
    member: Arc<Member>,
    client: CoordinatorClient<Channel>,
    heard: Arc<Mutex<Heard>>,
    acknowledged: watch::Receiver<u64>,
    reader: Ends,
    pulse: Ends,
}

/// A task that ends with what holds it.
struct Ends(AbortHandle);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What coming took.
pub(super) struct Arrival {
    pub(super) hosts: Vec<Arc<Host>>,
    /// From the common start until every host had what it came for.
    pub(super) seconds: f64,
    /// Of each host from its own call of `Join` to the answer.
    pub(super) join_ms: Vec<f64>,
    /// Attempts that failed and were made again.
    pub(super) again: u64,
}

/// All at the same moment, `at_once` connections and calls under way at a time: connect, open the heartbeat stream, join. With
/// `back` they come back to a place that they had.
pub(super) async fn arrive(
    members: &[Arc<Member>],
    address: SocketAddr,
    at_once: usize,
    recording: &Arc<AtomicBool>,
    back: Option<&HashMap<String, v1::Placement>>,
) -> Result<Arrival> {
    let permits = Arc::new(Semaphore::new(at_once));
    let again = Arc::new(AtomicU64::new(0));
    let began = Instant::now();
    let mut coming = JoinSet::new();
    for member in members {
        let (member, permits) = (Arc::clone(member), Arc::clone(&permits));
        let (again, recording) = (Arc::clone(&again), Arc::clone(recording));
        let place = back.and_then(|places| places.get(&member.name)).cloned();
        coming.spawn(async move {
            let _permit = permits.acquire_owned().await?;
            let come = async {
                loop {
                    match Host::come(&member, address, &recording, place.clone()).await {
                        Ok(host) => return host,
                        Err(error) => {
                            if again.fetch_add(1, Ordering::Relaxed) < 3 {
                                eprintln!("bench: {}: {error:#}; again", member.name);
                            }
                            tokio::time::sleep(AGAIN_AFTER).await;
                        }
                    }
                }
            };
            let host = tokio::time::timeout(COMES_WITHIN, come).await;
            host.with_context(|| format!("{} did not come within {COMES_WITHIN:?}", member.name))
        });
    }
    let (mut hosts, mut join_ms) = (Vec::new(), Vec::new());
    while let Some(host) = coming.join_next().await {
        let (host, took) = host??;
        hosts.push(Arc::new(host));
        join_ms.push(took.as_secs_f64() * 1e3);
    }
    Ok(Arrival {
        hosts,
        seconds: began.elapsed().as_secs_f64(),
        join_ms,
        again: again.load(Ordering::Relaxed),
    })
}

impl Host {
    async fn come(
        member: &Arc<Member>,
        address: SocketAddr,
        recording: &Arc<AtomicBool>,
        place: Option<v1::Placement>,
    ) -> Result<(Self, Duration)> {
        let endpoint = Endpoint::from_shared(format!("http://{address}"))?.connect_timeout(CONNECT_LIMIT);
        let channel = member.dialer.connect(&endpoint).await.context("no connection")?;
        let mut client = CoordinatorClient::new(channel);
        let (beats, outgoing) = mpsc::channel(8);
        let heard = Arc::new(Mutex::new(Heard {
            placement: place.clone(),
            ..Heard::default()
        }));
        beats.send(member.beat(1, place.as_ref(), true)).await?;
        let mut pushes = client
            .heartbeat(ReceiverStream::new(outgoing))
            .await?
            .into_inner();
        let first = pushes.message().await?.context("no welcome")?;
        if !matches!(first.push, Some(v1::push::Push::Welcome(_))) {
            bail!("not welcome: {first:?}");
        }
        let (acknowledge, acknowledged) = watch::channel(0);
        let (theirs, recording) = (Arc::clone(&heard), Arc::clone(recording));
        let reader = Ends(
            tokio::spawn(async move {
                while let Ok(Some(push)) = pushes.message().await {
                    match push.push {
                        Some(v1::push::Push::Placement(placement)) => {
                            theirs.lock().take(placement, &recording)
                        }
                        Some(v1::push::Push::Ack(ack)) => drop(acknowledge.send(ack.sequence)),
                        Some(v1::push::Push::SendState(_)) => theirs.lock().changed = true,
                        _ => {}
                    }
                }
            })
            .abort_handle(),
        );
        let pulse = Ends(tokio::spawn(pulse(Arc::clone(member), beats, Arc::clone(&heard))).abort_handle());
        let mut host = Self {
            member: Arc::clone(member),
            client,
            heard,
            acknowledged,
            reader,
            pulse,
        };
        let began = Instant::now();
        if place.is_none() {
            let answer = host.client.join(member.join()).await?.into_inner();
            let placement = answer.placement.context("no placement")?;
            host.heard.lock().take(placement, &AtomicBool::new(false));
        } else {
            let mut acknowledged = host.acknowledged.clone();
            acknowledged.wait_for(|sequence| *sequence >= 1).await?;
        }
        Ok((host, began.elapsed()))
    }

    pub(super) fn name(&self) -> &str {
        &self.member.name
    }

    pub(super) fn placement(&self) -> Option<v1::Placement> {
        self.heard.lock().placement.clone()
    }

    /// Says that its export is up.
    pub(super) async fn register(&self) -> Result<()> {
        let mut client = self.client.clone();
        loop {
            let epoch = self.heard.lock().placement.as_ref().and_then(|p| p.epoch);
            let request = v1::RegisterRequest {
                host: self.member.name.clone(),
                instance: INSTANCE.into(),
                image: Some(image_id(1)),
                epoch,
            };
            match client.register(request).await {
                Ok(_) => return Ok(()),
                // It was moved meanwhile; the newer placement is on its way.
                Err(status) if status.code() == tonic::Code::Aborted => tokio::task::yield_now().await,
                Err(status) => return Err(status.into()),
            }
        }
    }

    /// Falls silent, as a host whose power went: its connection stays as it is.
    pub(super) fn silence(&self) {
        self.pulse.0.abort();
        self.reader.0.abort();
    }

    /// The newest beat that the coordinator has answered.
    pub(super) fn acknowledged(&self) -> u64 {
        *self.acknowledged.borrow()
    }

    /// When it first had other parents than `gone`, after `since`.
    pub(super) fn left(&self, gone: &str, since: Instant) -> Option<Instant> {
        let heard = self.heard.lock();
        let without = |(at, parents): &&(Instant, Vec<String>)| {
            *at >= since && parents.iter().all(|parent| parent != gone)
        };
        heard.parents.iter().find(without).map(|(at, _)| *at)
    }
}

impl Heard {
    fn take(&mut self, placement: v1::Placement, recording: &AtomicBool) {
        let epoch = |p: &v1::Placement| p.epoch.map(|e| (e.incarnation, e.counter));
        if self
            .placement
            .as_ref()
            .is_some_and(|known| epoch(known) > epoch(&placement))
        {
            return;
        }
        if recording.load(Ordering::Relaxed) {
            self.parents.push((Instant::now(), parents(&placement)));
        }
        self.placement = Some(placement);
        self.changed = true;
    }
}

impl Member {
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    fn join(&self) -> v1::JoinRequest {
        v1::JoinRequest {
            host: self.name.clone(),
            instance: INSTANCE.into(),
            image: Some(image_id(1)),
            endpoint: Some(endpoint(&self.portal)),
        }
    }

    fn beat(&self, sequence: u64, placement: Option<&v1::Placement>, whole: bool) -> v1::Beat {
        let counter = placement.and_then(|p| p.epoch).map_or(0, |epoch| epoch.counter);
        let state = whole.then(|| v1::HostState {
            info: Some(v1::HostInfo {
                name: self.name.clone(),
                instance: INSTANCE.into(),
                agent_address: self.portal.replace(":3260", ":7401"),
                portal: self.portal.clone(),
                plane: v1::PlaneKind::User.into(),
                max_stripes: 16,
                version: env!("CARGO_PKG_VERSION").into(),
                weight: 1,
                runs_vms: true,
                ..Default::default()
            }),
            attachments: placement
                .map(|placement| v1::Attachment {
                    image: Some(image_id(1)),
                    digest: DIGEST.into(),
                    epoch: placement.epoch,
                    endpoint: Some(endpoint(&self.portal)),
                    state: v1::AttachState::Ready.into(),
                    stripes: placement.stripes.clone(),
                })
                .into_iter()
                .collect(),
            vms: 4,
        });
        v1::Beat {
            sequence,
            host: self.name.clone(),
            instance: INSTANCE.into(),
            state_digest: counter.to_be_bytes().repeat(4),
            state,
            bad_parents: Vec::new(),
        }
    }
}

/// Who a host reads from.
fn parents(placement: &v1::Placement) -> Vec<String> {
    let active = placement.stripes.iter().flat_map(|stripe| &stripe.active);
    active.map(|parent| parent.host.clone()).collect()
}

const DIGEST: [u8; 32] = [3; 32];

pub(super) fn image_id(version: u32) -> v1::ImageId {
    v1::ImageId {
        name: IMAGE.into(),
        version,
    }
}

pub(super) fn endpoint(portal: &str) -> v1::Endpoint {
    v1::Endpoint {
        portal: portal.into(),
        target: "iqn.2026-11.dev.treeboot:image:debian:1".into(),
        data_lun: 0,
        hash_lun: Some(1),
    }
}

/// An image on a foreign origin.
pub(super) fn image() -> v1::Image {
    v1::Image {
        id: Some(image_id(0)),
        digest: DIGEST.into(),
        bytes: 8 << 30,
        origins: vec![v1::Origin {
            endpoint: Some(endpoint("10.255.255.1:3260")),
            ..Default::default()
        }],
        ..Default::default()
    }
}

/// A sign of life every [`BEAT`], from one beat after the first: with the state where that changed, otherwise its digest.
async fn pulse(member: Arc<Member>, beats: mpsc::Sender<v1::Beat>, heard: Arc<Mutex<Heard>>) {
    let mut ticks = tokio::time::interval(BEAT);
    ticks.tick().await;
    for sequence in 2.. {
        ticks.tick().await;
        let beat = {
            let mut heard = heard.lock();
            let changed = std::mem::take(&mut heard.changed);
            member.beat(sequence, heard.placement.as_ref(), changed)
        };
        if beats.send(beat).await.is_err() {
            return;
        }
    }
}
