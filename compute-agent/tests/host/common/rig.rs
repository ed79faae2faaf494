//! An agent in this process whose plane fails or dies at a chosen step, over real files and a real target.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::TcpIncoming;
use treeboot_agent::host::{Host, Settings};
use treeboot_agent::journal::Journal;
use treeboot_agent::keys::Keys;
use treeboot_agent::plane::Plane as _;
use treeboot_agent::plane::faulty::{FaultMode, FaultyPlane};
use treeboot_agent::plane::user::{UserPlane, UserSettings};
use treeboot_types::{HostName, Iqn, Labels, SnapshotName};

use super::{SOON, loopback, read_all, session, until, vm};

pub const BLOCKS: usize = 64;
pub const BLOCK: usize = 4096;

/// One agent over a user plane that fails where it is told to.
pub struct Rig {
    pub host: Host,
    pub plane: Arc<FaultyPlane>,
    /// Of its service.
    pub address: SocketAddr,
    stop: CancellationToken,
}

impl Rig {
    pub async fn start(dir: &Path, name: &str, coordinator: SocketAddr) -> Self {
        let any = loopback();
        Self::start_at(dir, name, coordinator, any, any).await
    }

    /// One whose service and portal are where its predecessor's were.
    pub async fn start_at(
        dir: &Path,
        name: &str,
        coordinator: SocketAddr,
        at: SocketAddr,
        portal: SocketAddr,
    ) -> Self {
        Self::start_behind(dir, name, coordinator, at, portal, None).await
    }

    /// One that tells others to reach its service at another address.
    pub async fn start_behind(
        dir: &Path,
        name: &str,
        coordinator: SocketAddr,
        at: SocketAddr,
        portal: SocketAddr,
        advertised: Option<SocketAddr>,
    ) -> Self {
        let name = HostName::new(name).unwrap();
        let keys = Arc::new(Keys::none());
        // A predecessor's listeners go a moment after it ended.
        let until = tokio::time::Instant::now() + SOON;
        let mut listener = TcpListener::bind(at).await;
        while listener.is_err() && tokio::time::Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(5)).await;
            listener = TcpListener::bind(at).await;
        }
        let listener = listener.unwrap();
        let address = listener.local_addr().unwrap();
        let settings = UserSettings {
            host: name.clone(),
            state: dir.to_owned(),
            deltas: dir.join("deltas"),
            cache: vec![treeboot_block::MemberSpec {
                path: dir.join("cache"),
                budget: None,
            }],
            store: Some(dir.join("store")),
            portals: vec![portal],
            advertise: None,
            keys: Arc::clone(&keys),
        };
        let mut user = UserPlane::open(settings.clone());
        while user.is_err() && tokio::time::Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(5)).await;
            user = UserPlane::open(settings.clone());
        }
        let user = user.unwrap();
        let plane = Arc::new(FaultyPlane::new(Arc::new(user), usize::MAX, FaultMode::Error));
        let settings = Settings {
            name,
            instance: "test".into(),
            state_dir: dir.to_owned(),
            deltas_dir: dir.join("deltas"),
            store_dir: Some(dir.join("store")),
            keys,
            dialer: treeboot_identity::tls::Dialer::Insecure,
            coordinator: format!("http://{coordinator}"),
            agent_address: advertised.unwrap_or(address).to_string(),
            labels: Labels::new(),
            weight: 1,
            delta_limit: None,
        };
        let journal = Journal::open(dir).unwrap().0;
        let (host, _refused) = Host::start(settings, Arc::clone(&plane) as _, journal)
            .await
            .unwrap();
        let stop = CancellationToken::new();
        let server = tonic::transport::Server::builder()
            .add_service(treeboot_agent::rpc::server(host.clone()))
            .serve_with_incoming_shutdown(TcpIncoming::from(listener), stop.clone().cancelled_owned());
        tokio::spawn(server);
        Self {
            host,
            plane,
            address,
            stop,
        }
    }

    /// Ends in good order, as far as a host can whose plane is dead.
    pub async fn end(self) {
        self.stop.cancel();
        self.host.end().await;
    }

    /// Its service answers nobody any more; it lives on, and the coordinator hears it.
    pub fn fall_silent(&self) {
        self.stop.cancel();
    }

    pub async fn write(&self, name: &str, blocks: &[usize], fill: u8) {
        let session = self.front_end(name).await;
        for block in blocks {
            let data = vec![fill; BLOCK].into();
            session.write(0, (block * BLOCK) as u64, data).await.unwrap();
        }
        session.flush(0).await.unwrap();
    }

    pub async fn front_end(&self, name: &str) -> treeboot_iscsi::initiator::Session {
        let vm = vm(name);
        session(&self.plane.portal(), Iqn::of_disk(&vm), Iqn::of_vm(&vm))
            .await
            .unwrap()
    }

    pub async fn read(&self, name: &str) -> Vec<u8> {
        read_all(&self.front_end(name).await, BLOCKS * BLOCK).await
    }

    /// No front end is logged in, as the target sees it.
    pub async fn alone(&self, name: &str) {
        let vm = vm(name);
        until("the front ends are gone", || {
            self.plane.disk_stats(&vm).unwrap_or_default().sessions == 0
        })
        .await;
    }
}

pub fn snapshot(name: &str) -> SnapshotName {
    name.parse().unwrap()
}

pub fn files(dir: &Path) -> BTreeSet<String> {
    std::fs::read_dir(dir.join("deltas"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect()
}

pub fn with(content: &[u8], blocks: &[usize], fill: u8) -> Vec<u8> {
    let mut content = content.to_vec();
    for block in blocks {
        content[block * BLOCK..(block + 1) * BLOCK].fill(fill);
    }
    content
}
