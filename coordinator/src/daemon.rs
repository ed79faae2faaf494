//! The parts put together: options, the listener, the record, the owner, the service.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::service::Routes;
use treeboot_daemon::http::{self, FaceError, Vitals};
use treeboot_identity::tls::{Connection, Incoming};
use treeboot_proto::v1::coordinator_server::CoordinatorServer;
use treeboot_types::PathPolicy;

use crate::face::Life;
use crate::identity::{Security, SecurityError, parse_life};
use crate::owner::{self, Health};
use crate::rpc::CoordinatorService;
use crate::store::{SledStore, Store, StoreError};
use crate::tree::{Change, Effect, Forest, KAry, Key, LoadError, Record, Settings, Striped};

/// How long an orderly end waits for calls under way.
const DRAIN: Duration = Duration::from_secs(5);
/// Ping on connections, so that a host that vanished without a word frees its connection.
const KEEPALIVE: Duration = Duration::from_secs(20);
/// Largest message that is taken in: the state of a host with [`crate::tree::MAX_ATTACHMENTS`] attachments.
const MAX_MESSAGE_BYTES: usize = 4 << 20;
/// Most children of one host: its uplink would be divided by as many.
pub const MAX_FAN_OUT: u32 = 64;
/// Most stripes of an image; a host holds as many sessions at least.
pub const MAX_STRIPES: u16 = 16;
/// Most parents that a host reads from at once.
pub const MAX_ACTIVE_PARENTS: u32 = 8;

/// What a person may choose.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Where to listen, for instance 127.0.0.1:7400; port 0 takes a free one.
    #[arg(
        long,
        env = "TREEBOOT_LISTEN",
        default_value = "127.0.0.1:7400",
        value_name = "ADDR:PORT"
    )]
    pub listen: SocketAddr,
    /// Where the record of images, hosts and trees is kept.
    #[arg(long, env = "TREEBOOT_STATE", value_name = "DIR")]
    pub state: PathBuf,
    /// The shape of the trees. A change is for images that are registered after it.
    #[arg(long, env = "TREEBOOT_POLICY", default_value = "striped")]
    pub policy: PolicyName,
    /// Stripes of an image with `--policy striped`; each host feeds so many others one stripe of it, and uploads about one image.
    #[arg(long, env = "TREEBOOT_STRIPES", default_value_t = 2, value_parser = clap::value_parser!(u16).range(2..=i64::from(MAX_STRIPES)))]
    pub stripes: u16,
    /// Children of each host and origin; with `--policy k-ary` only. [default: 2]
    #[arg(long, env = "TREEBOOT_FAN_OUT", value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_FAN_OUT)))]
    pub fan_out: Option<u32>,
    /// Parents that a host reads from at once, each at an equal part of a slot.
    #[arg(long, env = "TREEBOOT_ACTIVE_PARENTS", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_ACTIVE_PARENTS)))]
    pub active_parents: u32,
    /// How active parents share a host's reads.
    #[arg(long, env = "TREEBOOT_PATH_POLICY", default_value = "round-robin")]
    pub path_policy: PathPolicyName,
    /// How often a host gives a sign of life, in milliseconds.
    #[arg(long, env = "TREEBOOT_BEAT_MS", default_value_t = 1_000, value_parser = clap::value_parser!(u64).range(20..=600_000))]
    pub beat_ms: u64,
    /// How long a host may be silent, in milliseconds; at least 3.5 beats. [default: 8 beats]
    #[arg(long, env = "TREEBOOT_LEASE_MS")]
    pub lease_ms: Option<u64>,
    /// How long a slot lasts that nobody registered, in milliseconds; at least 3.5 beats. [default: 5 beats]
    #[arg(long, env = "TREEBOOT_PENDING_LEASE_MS")]
    pub pending_lease_ms: Option<u64>,
    /// Put the record aside and learn from the hosts where they stand: for a record that is lost or damaged. For one start, not for a
    /// unit file
    #[arg(long)]
    pub rebuild: bool,
    /// How long hosts have to say where they stand after the record was lost, in milliseconds; until then nobody gets a place. At least
    /// 3.5 beats. [default: --lease-ms]
    #[arg(long, env = "TREEBOOT_REBUILD_WINDOW_MS")]
    pub rebuild_window_ms: Option<u64>,
    /// Neither certificates nor tokens, for a laptop: listens on loopback only.
    #[arg(long, env = "TREEBOOT_INSECURE")]
    pub insecure: bool,
    /// How long a host's certificate holds, for instance 30d; a host renews it when two thirds of that are over.
    #[arg(long, env = "TREEBOOT_HOST_CERTIFICATE_LIFE", default_value = "30d", value_parser = parse_life, value_name = "TIME")]
    pub host_certificate_life: Duration,
    /// Write the bound address as JSON to this file once serving.
    #[arg(long, env = "TREEBOOT_READY_FILE", value_name = "FILE")]
    pub ready_file: Option<PathBuf>,
}

/// A [`tree::Policy`](crate::tree::Policy) as typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum PolicyName {
    /// Each host is inner in one of `--stripes` trees and a leaf in the others, so that it uploads an image once.
    Striped,
    /// Two children everywhere, as in the VirtMan paper.
    Binary,
    /// `--fan-out` children everywhere.
    KAry,
}

/// [`PathPolicy`] as typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum PathPolicyName {
    /// By turns.
    RoundRobin,
    /// To the one that would answer soonest.
    ServiceTime,
    /// To the one with the fewest commands outstanding.
    QueueLength,
}

/// Why the daemon does not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// A lease that one lost beat would end.
    #[error("--{flag} {given_ms} is too short: with --beat-ms {beat_ms} it must be at least {least_ms}")]
    Lease {
        /// Which.
        flag: &'static str,
        /// As given.
        given_ms: u64,
        /// As given.
        beat_ms: u64,
        /// What would do.
        least_ms: u64,
    },
    /// A pending lease beyond the lease.
    #[error(
        "--pending-lease-ms {pending_ms} is longer than --lease-ms {lease_ms}; a pending slot has the shorter one"
    )]
    PendingLease {
        /// As given.
        pending_ms: u64,
        /// As given.
        lease_ms: u64,
    },
    /// A number that the chosen shape has no use for.
    #[error(
        "--fan-out {given} is for --policy k-ary only; leave it out, or say --policy k-ary (trees of one stripe, in which inner hosts \
         upload an image {given} times)"
    )]
    FanOut {
        /// As given.
        given: u32,
    },
    /// Cannot listen.
    #[error("cannot listen on {address}; stop whoever uses it, or choose another address with --listen")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// `--insecure` for more than this machine.
    #[error(
        "--insecure is for loopback addresses only, and {address} is none; for others make an authority: treeboot-coordinator init"
    )]
    InsecureAddress {
        /// As given.
        address: SocketAddr,
    },
    /// Nobody would be asked who they are.
    #[error(
        "there is no authority in {}, so {address} would be open to everybody; make one: treeboot-coordinator init --state {} (hosts then \
         join by tokens, docs/security.md says how), or say --insecure and listen on loopback only", dir.display(), dir.display()
    )]
    NoAuthority {
        /// The state directory.
        dir: PathBuf,
        /// As given.
        address: SocketAddr,
    },
    /// `--insecure` where certificates are wanted.
    #[error("{} holds an authority, and --insecure would let everybody in; leave it out", dir.display())]
    InsecureAuthority {
        /// The state directory.
        dir: PathBuf,
    },
    /// The authority cannot be used.
    #[error(transparent)]
    Security(#[from] SecurityError),
    /// The record cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The record makes no trees.
    #[error("the record in {dir} does not fit together; {}", crate::store::WAY_OUT)]
    Load {
        /// Where it is.
        dir: String,
        /// What does not fit.
        #[source]
        source: LoadError,
    },
    /// The file that says it is ready.
    #[error("cannot write the ready file {path}")]
    ReadyFile {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The HTTP face: a bug of ours.
    #[error(transparent)]
    Face(#[from] FaceError),
    /// The server ended by itself.
    #[error("the gRPC server ended")]
    Serve(#[source] tonic::transport::Error),
}

impl From<PathPolicyName> for PathPolicy {
    fn from(name: PathPolicyName) -> Self {
        match name {
            PathPolicyName::RoundRobin => Self::RoundRobin,
            PathPolicyName::ServiceTime => Self::ServiceTime,
            PathPolicyName::QueueLength => Self::QueueLength,
        }
    }
}

impl Options {
    /// The times and shapes that follow from the options.
    ///
    /// # Errors
    /// A lease that a lost beat would end.
    pub fn settings(&self) -> Result<Settings, DaemonError> {
        let beat_ms = self.beat_ms;
        let lease_ms = self.lease_ms.unwrap_or(beat_ms * 8);
        let pending_lease_ms = self.pending_lease_ms.unwrap_or((beat_ms * 5).min(lease_ms));
        // Three beats, so that two may be lost, and half of one for a beat that comes late.
        let least_ms = beat_ms * 3 + beat_ms / 2;
        let leases = [
            ("lease-ms", lease_ms),
            ("pending-lease-ms", pending_lease_ms),
            ("rebuild-window-ms", self.rebuild_window_ms.unwrap_or(lease_ms)),
        ];
        if let Some((flag, given_ms)) = leases.into_iter().find(|(_, ms)| *ms < least_ms) {
            return Err(DaemonError::Lease {
                flag,
                given_ms,
                beat_ms,
                least_ms,
            });
        }
        if pending_lease_ms > lease_ms {
            return Err(DaemonError::PendingLease {
                pending_ms: pending_lease_ms,
                lease_ms,
            });
        }
        if let Some(given) = self.fan_out
            && self.policy != PolicyName::KAry
        {
            return Err(DaemonError::FanOut { given });
        }
        Ok(Settings {
            policy: match self.policy {
                PolicyName::Binary => Arc::new(KAry { fan_out: 2 }),
                PolicyName::KAry => Arc::new(KAry {
                    fan_out: self.fan_out.unwrap_or(2),
                }),
                PolicyName::Striped => Arc::new(Striped {
                    stripes: self.stripes,
                }),
            },
            active_parents: self.active_parents,
            path_policy: self.path_policy.into(),
            beat_ms,
            lease_ms,
            pending_lease_ms,
        })
    }
}

/// A coordinator that serves.
#[derive(Debug)]
pub struct Daemon {
    address: SocketAddr,
    health: watch::Receiver<Health>,
    stop: watch::Sender<bool>,
    server: JoinHandle<Result<(), tonic::transport::Error>>,
    owner: JoinHandle<()>,
}

impl Daemon {
    /// Opens the record in the state directory and serves.
    ///
    /// # Errors
    /// [`DaemonError`] says what is in the way.
    pub async fn start(options: &Options) -> Result<Self, DaemonError> {
        Self::start_over(options, |store| Arc::new(store)).await
    }

    /// As [`Daemon::start`], with something of the caller's around the record, for instance a fault.
    ///
    /// # Errors
    /// [`DaemonError`] says what is in the way.
    pub async fn start_over(
        options: &Options,
        keep: impl FnOnce(SledStore) -> Arc<dyn Store>,
    ) -> Result<Self, DaemonError> {
        let settings = options.settings()?;
        if options.insecure && !options.listen.ip().is_loopback() {
            return Err(DaemonError::InsecureAddress {
                address: options.listen,
            });
        }
        let security = Security::open(&options.state, options.host_certificate_life)?;
        if options.insecure && !security.is_none() {
            return Err(DaemonError::InsecureAuthority {
                dir: options.state.clone(),
            });
        }
        if security.is_none() && !options.listen.ip().is_loopback() {
            return Err(DaemonError::NoAuthority {
                dir: options.state.clone(),
                address: options.listen,
            });
        }
        // The listener first: it costs nothing and fails fast.
        let listener = listen(options.listen).await?;
        let (dir, rebuild) = (options.state.clone(), options.rebuild);
        let store = tokio::task::spawn_blocking(move || {
            if rebuild && let Some(aside) = SledStore::set_aside(&dir)? {
                tracing::warn!(record = %aside.display(), "the record was put aside; the trees are learned from the hosts");
            }
            SledStore::open(&dir)
        })
            .await
            .map_err(|error| StoreError::Open {
                dir: options.state.display().to_string(),
                source: error.into(),
            })??;
        let begin = Begin {
            settings,
            rebuild: options.rebuild,
            window_ms: options.rebuild_window_ms,
        };
        let daemon = Self::serve(begin, keep(store), listener, &options.state, security).await?;
        if let Some(path) = &options.ready_file {
            write_ready_file(path, daemon.address)?;
        }
        Ok(daemon)
    }

    /// Serves from any store on a bound listener, without certificates; `dir` names the store in errors.
    ///
    /// # Errors
    /// [`DaemonError`] where the record cannot be read.
    pub async fn start_with(
        settings: Settings,
        store: Arc<dyn Store>,
        listener: TcpListener,
        dir: &Path,
    ) -> Result<Self, DaemonError> {
        let begin = Begin {
            settings,
            rebuild: false,
            window_ms: None,
        };
        Self::serve(begin, store, listener, dir, Security::none()).await
    }

    async fn serve(
        begin: Begin,
        store: Arc<dyn Store>,
        listener: TcpListener,
        dir: &Path,
        security: Security,
    ) -> Result<Self, DaemonError> {
        let address = listener.local_addr().map_err(|source| DaemonError::Listen {
            address: SocketAddr::from(([0, 0, 0, 0], 0)),
            source,
        })?;
        if security.is_none() {
            tracing::warn!(
                %address,
                "no certificates are asked for: whoever reaches this address can place hosts and remove images; to \
                 change that: treeboot-coordinator init"
            );
        }
        let forest = load(begin, Arc::clone(&store), dir).await?;
        let (stop, stopped) = watch::channel(false);
        let (handle, owner) = owner::spawn(forest, store, stopped.clone());
        let health = handle.health();
        security.keep_new(stopped.clone());
        let face = crate::face::face(security.is_none());
        let life: Arc<dyn Vitals> = Arc::new(Life::new(handle.clone(), Instant::now()));
        let service = CoordinatorService::new(
            handle,
            security.registrar,
            security.edges,
            security.rules,
            stopped.clone(),
        );
        let service = CoordinatorServer::new(service).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let services = http::services(&face, Routes::new(service), &life, stopped.clone())?;
        let router = http::router(&face, life, security.gate.over(services))?;
        let incoming = Incoming::new(listener, security.acceptance);
        let server = http::serve(incoming, Connection::is_http2, router, Some(KEEPALIVE), stopped);
        Ok(Self {
            address,
            health,
            stop,
            server: tokio::spawn(server),
            owner,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How the owner of the trees is.
    pub fn health(&self) -> watch::Receiver<Health> {
        self.health.clone()
    }

    /// Ends in order: what was taken in is saved and answered, streams are closed, the record is released.
    ///
    /// # Errors
    /// [`DaemonError::Serve`] where the server had failed.
    pub async fn stop(self) -> Result<(), DaemonError> {
        // Nobody left to tell means that all has ended already.
        let _ = self.stop.send(true);
        let abort = self.server.abort_handle();
        let ended = tokio::time::timeout(DRAIN, self.server).await;
        abort.abort();
        if self.owner.await.is_err() {
            tracing::error!("the owner of the trees ended badly");
        }
        match ended {
            Ok(Ok(result)) => result.map_err(DaemonError::Serve),
            // Cut off: connections that did not end in time.
            Ok(Err(_)) | Err(_) => Ok(()),
        }
    }

    /// Waits until the server ends by itself, which it does only when something is wrong.
    pub async fn failed(&mut self) {
        tokio::select! {
            _ = &mut self.server => {}
            _ = &mut self.owner => {}
        }
    }
}

/// Binds, with an error that names the address.
///
/// # Errors
/// [`DaemonError::Listen`].
pub async fn listen(address: SocketAddr) -> Result<TcpListener, DaemonError> {
    TcpListener::bind(address)
        .await
        .map_err(|source| DaemonError::Listen { address, source })
}

/// How the trees begin.
struct Begin {
    settings: Settings,
    /// With a window in which hosts say where they stand.
    rebuild: bool,
    /// How long such a window is; a lease unless told otherwise.
    window_ms: Option<u64>,
}

async fn load(begin: Begin, store: Arc<dyn Store>, dir: &Path) -> Result<Forest, DaemonError> {
    let name = dir.display().to_string();
    let broken = |error: tokio::task::JoinError| StoreError::Open {
        dir: name.clone(),
        source: error.into(),
    };
    let reader = Arc::clone(&store);
    let records = tokio::task::spawn_blocking(move || reader.load())
        .await
        .map_err(broken)??;
    let count = records.len();
    let mut effects = Vec::new();
    let window_ms = begin.window_ms.unwrap_or(begin.settings.lease_ms);
    let mut forest = if begin.rebuild {
        Forest::rebuild(begin.settings, window_ms)
    } else {
        Forest::load(begin.settings, records, &mut effects).map_err(|source| DaemonError::Load {
            dir: name.clone(),
            source,
        })?
    };
    forest.set_rebuild_window(window_ms);
    // Also proves that the record can be written, before anybody relies on it.
    let mut changes: Vec<Change> = effects
        .into_iter()
        .filter_map(|effect| match effect {
            Effect::Save(change) => Some(change),
            _ => None,
        })
        .collect();
    changes.push(Change::Put(Key::Epoch, Record::Epoch(forest.epoch())));
    tokio::task::spawn_blocking(move || store.apply(&changes))
        .await
        .map_err(broken)??;
    tracing::info!(entries = count, epoch = %forest.epoch(), "record loaded");
    Ok(forest)
}

/// A reader sees the whole file or none.
fn write_ready_file(path: &Path, rpc: SocketAddr) -> Result<(), DaemonError> {
    let error = |source| DaemonError::ReadyFile {
        path: path.into(),
        source,
    };
    let text = serde_json::json!({ "rpc": rpc.to_string() }).to_string();
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    std::fs::write(&partial, text + "\n").map_err(error)?;
    std::fs::rename(&partial, path).map_err(error)
}
