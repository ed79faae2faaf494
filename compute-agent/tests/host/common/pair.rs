//! Two agents in this process between which a VM moves.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;
use treeboot_agent::host::{HostError, MigrateRequest, Moved};
use treeboot_agent::plane::Plane as _;

use super::rig::*;
use super::*;

/// Two hosts, and a VM on the first that has written, was snapshot, and has written on.
pub struct Pair {
    pub dirs: [tempfile::TempDir; 2],
    pub hosts: [Option<Rig>; 2],
    /// Where each one's service and portal were at first.
    at: [(SocketAddr, SocketAddr); 2],
    /// The way to the first one's service that it tells others.
    pub gate: Gate,
    pub coordinator: std::net::SocketAddr,
    pub stop: CancellationToken,
    pub old: Vec<u8>,
    pub written: Vec<u8>,
}

impl Pair {
    pub async fn start() -> Self {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let stop = CancellationToken::new();
        let coordinator = Play::default().start(None, stop.clone()).await;
        let (gate, any) = (Gate::open().await, loopback());
        let advertised = Some(gate.address);
        let h1 = Rig::start_behind(dirs[0].path(), "h1", coordinator, any, any, advertised).await;
        gate.leads_to(h1.address);
        let h2 = Rig::start(dirs[1].path(), "h2", coordinator).await;
        until("both are known", || h1.host.connected() && h2.host.connected()).await;
        let base = content(BLOCKS);
        let image = import(&h1.host, "debian", &base).await;
        let image = format!("{}@{}", image.name, image.version).parse().unwrap();
        h1.host.create(&vm("web-1"), &image).await.unwrap();
        h1.write("web-1", &[1, 2, 3], 1).await;
        h1.host.snapshot(&vm("web-1"), &snapshot("old")).await.unwrap();
        h1.write("web-1", &[3, 4], 2).await;
        h1.alone("web-1").await;
        let old = with(&base, &[1, 2, 3], 1);
        Self {
            written: with(&old, &[3, 4], 2),
            old,
            dirs,
            at: [&h1, &h2].map(|rig| (rig.address, rig.plane.portal().parse().unwrap())),
            hosts: [Some(h1), Some(h2)],
            gate,
            coordinator,
            stop,
        }
    }

    pub fn host(&self, n: usize) -> &Rig {
        self.hosts[n].as_ref().unwrap()
    }

    /// It dies, and its successor finds what it left.
    pub async fn replace(&mut self, n: usize) {
        let old = self.hosts[n].take().unwrap();
        let (address, portal) = (old.address, old.plane.portal().parse().unwrap());
        old.end().await;
        self.start_at(n, address, portal).await;
    }

    /// It comes back where it was, or elsewhere.
    pub async fn come_back(&mut self, n: usize, where_it_was: bool) {
        let (address, portal) = match where_it_was {
            true => self.at[n],
            false => (loopback(), loopback()),
        };
        self.start_at(n, address, portal).await;
        until("it is known again", || self.host(n).host.connected()).await;
    }

    async fn start_at(&mut self, n: usize, address: SocketAddr, portal: SocketAddr) {
        let (name, advertised) = [("h1", Some(self.gate.address)), ("h2", None)][n];
        let dir = self.dirs[n].path();
        let rig = Rig::start_behind(dir, name, self.coordinator, address, portal, advertised).await;
        self.hosts[n] = Some(rig);
    }

    pub fn request(&self) -> MigrateRequest {
        let to = self.host(1);
        MigrateRequest {
            vm: vm("web-1"),
            to: (to.host.info().name, to.address.to_string()),
        }
    }

    pub async fn migrate(&self) -> Result<Moved, HostError> {
        let underway = self.host(0).host.begin_migration(self.request());
        underway.end.await.unwrap()
    }

    /// On which hosts it is, where that is decided.
    pub fn whereabouts(&self) -> Option<usize> {
        let web = vm("web-1");
        let desired = [0, 1].map(|n| self.host(n).host.desired());
        let there = desired.iter().map(|desired| desired.disks.get(&web));
        let there: Vec<_> = there.collect();
        match there.as_slice() {
            [Some(disk), None] if disk.moving.is_none() && !disk.doomed => Some(0),
            [None, Some(disk)] if disk.moving.is_none() && !disk.doomed => Some(1),
            _ => None,
        }
    }

    /// It is on this host with all that it had, and nothing else is on either.
    pub async fn settled(&self, n: usize, what: &str) {
        let reason = format!("{what}: the VM is on host {n} alone");
        until(&reason, || self.whereabouts() == Some(n)).await;
        let rig = self.host(n);
        let web = vm("web-1");
        until(&format!("{what}: it is served"), || {
            rig.plane.disk_stats(&web).is_some()
        })
        .await;
        let reason = format!("{what}: nothing is left on the other");
        until(&reason, || files(self.dirs[1 - n].path()).is_empty()).await;
        assert!(rig.read("web-1").await == self.written, "{what}: its disk");
        rig.alone("web-1").await;
        // Where the merging itself went wrong, the next change goes on with it.
        rig.host.snapshot(&web, &snapshot("poke")).await.unwrap();
        rig.host.delete_snapshot(&web, &snapshot("poke")).await.unwrap();
        let layers = async || rig.host.layers(&web, false).await.unwrap();
        let waited = tokio::time::timeout(SOON, async {
            while layers().await.len() != 2 || files(self.dirs[n].path()).len() != 3 {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        });
        let settled = waited.await;
        let left = files(self.dirs[n].path());
        assert!(
            settled.is_ok(),
            "{what}: left are {left:?} of {:?}",
            layers().await
        );
    }

    pub async fn end(mut self) {
        for host in &mut self.hosts {
            host.take().unwrap().end().await;
        }
        self.stop.cancel();
    }
}

/// How a message begins that says how layers stand on each other: the question whether a VM is taken has it.
const MANIFEST: &[u8] = b"{\"version\":1,";

/// A way to a host.
#[derive(Clone)]
pub struct Gate {
    pub address: SocketAddr,
    way: Arc<Mutex<Way>>,
    cut: CancellationToken,
}

#[derive(Clone, Copy)]
struct Way {
    to: Option<SocketAddr>,
    /// No answer comes back once it was asked to take a VM.
    loses_answers: bool,
    lost: bool,
}

impl Gate {
    pub async fn open() -> Self {
        let listener = TcpListener::bind(loopback()).await.unwrap();
        let gate = Self {
            address: listener.local_addr().unwrap(),
            way: Arc::new(Mutex::new(Way {
                to: None,
                loses_answers: false,
                lost: false,
            })),
            cut: CancellationToken::new(),
        };
        let (way, cut) = (Arc::clone(&gate.way), gate.cut.clone());
        tokio::spawn(async move {
            while let Ok((here, _)) = listener.accept().await {
                let to = way.lock().to;
                if let Some(to) = to
                    && let Ok(there) = TcpStream::connect(to).await
                {
                    pass(here, there, &way, &cut);
                }
            }
        });
        gate
    }

    pub fn leads_to(&self, to: SocketAddr) {
        self.way.lock().to = Some(to);
    }

    /// New connections end at once.
    pub fn close(&self) {
        self.way.lock().to = None;
    }

    /// Connections end.
    pub fn cut(&self) {
        self.cut.cancel();
    }

    pub fn loses_answers(&self) {
        self.way.lock().loses_answers = true;
    }
}

fn pass(here: TcpStream, there: TcpStream, way: &Arc<Mutex<Way>>, cut: &CancellationToken) {
    let (mut from, mut back) = here.into_split();
    let (mut answers, mut into) = there.into_split();
    let (asks, hears) = (Arc::clone(way), Arc::clone(way));
    let asking = async move {
        let mut buffer = vec![0; 65536];
        while let Ok(count @ 1..) = from.read(&mut buffer).await {
            let bytes = &buffer[..count];
            let asked = bytes.windows(MANIFEST.len()).any(|window| window == MANIFEST);
            if asked {
                let mut way = asks.lock();
                way.lost = way.loses_answers;
            }
            if into.write_all(bytes).await.is_err() {
                return;
            }
        }
    };
    let answering = async move {
        let mut buffer = vec![0; 65536];
        while let Ok(count @ 1..) = answers.read(&mut buffer).await {
            let lost = hears.lock().lost;
            if !lost && back.write_all(&buffer[..count]).await.is_err() {
                return;
            }
        }
    };
    let cut = cut.clone();
    tokio::spawn(async move {
        tokio::select! {
            () = cut.cancelled() => {}
            ((), ()) = async { tokio::join!(asking, answering) } => {}
        }
    });
}
