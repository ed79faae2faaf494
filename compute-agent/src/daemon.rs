//! The parts put together: options, the state directory, the plane, the host, the service.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::service::Routes;
use treeboot_block::MemberSpec;
use treeboot_daemon::http::{self, FaceError, Vitals};
use treeboot_identity::gate::Gate;
use treeboot_identity::tls::{Acceptance, Connection, Dialer, Incoming, SetupError};
use treeboot_types::{HostName, Labels};

use crate::choice::{self, Places, PlaneOpenError, PlaneOptions};
use crate::face::Life;
use crate::host::{Host, HostError, Refused, Settings};
use crate::identity::{self, IdentityError, IdentityOptions};
use crate::journal::{Journal, JournalError};
use crate::keys::{Keys, KeysError};
use crate::plane::Plane;
use crate::rpc;

/// How long an orderly end waits for calls under way.
const DRAIN: Duration = Duration::from_secs(2);
/// Longest label in bytes, key and value each.
const MAX_LABEL_BYTES: usize = treeboot_proto::MAX_LABEL_BYTES;

/// What a person may choose.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// This host's name, its identity with the coordinator; each agent has its own.
    #[arg(long, env = "TREEBOOT_NAME", value_name = "HOST")]
    pub name: HostName,
    /// Where the journal, the VMs' writes and their run directories are kept.
    #[arg(long, env = "TREEBOOT_STATE", value_name = "DIR")]
    pub state: PathBuf,
    /// The coordinator.
    #[arg(
        long,
        env = "TREEBOOT_COORDINATOR",
        default_value = "http://127.0.0.1:7400",
        value_name = "URL"
    )]
    pub coordinator: String,
    /// Where the Agent service listens; port 0 takes a free one.
    #[arg(
        long,
        env = "TREEBOOT_LISTEN",
        default_value = "127.0.0.1:7401",
        value_name = "ADDR:PORT"
    )]
    pub listen: SocketAddr,
    /// Where the iSCSI target listens, for children and for the VMs of this host; port 0 takes a free one. VMs reconnect
    /// to it after a restart, so let it keep its port.
    #[arg(
        long,
        env = "TREEBOOT_PORTAL",
        default_value = "127.0.0.1:3260",
        value_name = "ADDR:PORT"
    )]
    pub portal: SocketAddr,
    /// The address or name by which others reach this host, where it listens on all (0.0.0.0).
    #[arg(long, env = "TREEBOOT_ADVERTISE", value_name = "ADDR")]
    pub advertise: Option<String>,
    /// Hold imported images here: the host is an origin.
    #[arg(long, env = "TREEBOOT_STORE", value_name = "DIR")]
    pub store: Option<PathBuf>,
    /// Cache images here, in this much of it; may be given several times. Without a size: in all the room that there is. [default: the
    /// state directory's `cache`]
    #[arg(
        long,
        env = "TREEBOOT_CACHE",
        value_name = "DIR[=SIZE]",
        value_delimiter = ',',
        value_parser = choice::member
    )]
    pub cache: Vec<MemberSpec>,
    /// How the host proves who it is.
    #[command(flatten)]
    pub identity: IdentityOptions,
    /// How blocks move.
    #[command(flatten)]
    pub plane: PlaneOptions,
    /// What describes the host, for instance rack=r1; may be given several times.
    #[arg(
        long = "label",
        env = "TREEBOOT_LABELS",
        value_delimiter = ',',
        value_name = "KEY=VALUE",
        value_parser = label
    )]
    pub labels: Vec<(String, String)>,
    /// Its share of slots, compared with other hosts'.
    #[arg(long, env = "TREEBOOT_WEIGHT", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub weight: u32,
    /// Write the bound addresses as JSON to this file once serving.
    #[arg(long, env = "TREEBOOT_READY_FILE", value_name = "FILE")]
    pub ready_file: Option<PathBuf>,
}

fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text
        .split_once('=')
        .ok_or_else(|| format!("'{text}' is no label; write KEY=VALUE, for instance rack=r1"))?;
    if key.is_empty() || key.len() > MAX_LABEL_BYTES || value.len() > MAX_LABEL_BYTES {
        return Err(format!(
            "the label '{text}' needs a key, and {MAX_LABEL_BYTES} bytes at most each"
        ));
    }
    Ok((key.into(), value.into()))
}

/// Why the daemon does not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
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
        "--insecure is for loopback addresses only, and {address} is none; for others join with a token: treeboot-coordinator token create"
    )]
    InsecureAddress {
        /// As given.
        address: SocketAddr,
    },
    /// Nobody would be asked who they are.
    #[error(
        "host '{host}' has no certificate, so {address} would be open to everybody; where the coordinator runs, make a token \
         (treeboot-coordinator token create --host {host}) and start the agent with --join-token-file, or say --insecure and listen on \
         loopback only"
    )]
    NoIdentity {
        /// Whose.
        host: HostName,
        /// As given.
        address: SocketAddr,
    },
    /// No identity.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// TLS.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// The secrets of iSCSI.
    #[error(transparent)]
    Keys(#[from] KeysError),
    /// The plane does not start.
    #[error(transparent)]
    Plane(#[from] PlaneOpenError),
    /// A file or directory of the state.
    #[error("cannot use {}", path.display())]
    State {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Two agents, one directory.
    #[error(
        "the state directory {} is in use by another agent; stop that one, or give this one a --state of its own",
        dir.display()
    )]
    InUse {
        /// The directory.
        dir: PathBuf,
    },
    /// The state is another host's.
    #[error(
        "the state directory {} belongs to host '{found}', not to '{given}'; give --name {found}, or another --state",
        dir.display()
    )]
    OtherHost {
        /// The directory.
        dir: PathBuf,
        /// Whose it is.
        found: String,
        /// As given.
        given: HostName,
    },
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The host does not start.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The coordinator does not let it in.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The HTTP face: a bug of ours.
    #[error(transparent)]
    Face(#[from] FaceError),
    /// The server ended by itself.
    #[error("the gRPC server ended")]
    Serve(#[source] tonic::transport::Error),
    /// The file that says it is ready.
    #[error("cannot write the ready file {}", path.display())]
    ReadyFile {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// An agent that serves.
pub struct Daemon {
    address: SocketAddr,
    portal: String,
    host: Host,
    stop: watch::Sender<bool>,
    server: JoinHandle<Result<(), tonic::transport::Error>>,
    refused: oneshot::Receiver<Refused>,
    _renewal: DropGuard,
    _lock: Flock<std::fs::File>,
}

fn state_error(path: &Path) -> impl FnOnce(io::Error) -> DaemonError {
    let path = path.to_owned();
    move |source| DaemonError::State { path, source }
}

impl Daemon {
    /// Serves what the journal says, then speaks to the coordinator.
    ///
    /// # Errors
    /// [`DaemonError`] says what is in the way.
    pub async fn start(options: &Options) -> Result<Self, DaemonError> {
        Self::start_over(options, |plane, journal| (plane, journal)).await
    }

    /// As [`Daemon::start`], over the plane and the journal that are made of those which there are.
    ///
    /// # Errors
    /// [`DaemonError`] says what is in the way.
    pub async fn start_over(
        options: &Options,
        over: impl FnOnce(Arc<dyn Plane>, Journal) -> (Arc<dyn Plane>, Journal),
    ) -> Result<Self, DaemonError> {
        let state = absolute(&options.state)?;
        std::fs::create_dir_all(&state).map_err(state_error(&state))?;
        let lock = lock(&state)?;
        let instance = instance(&state, &options.name)?;
        for address in [options.listen, options.portal] {
            if options.identity.insecure && !address.ip().is_loopback() {
                return Err(DaemonError::InsecureAddress { address });
            }
        }
        let coordinator = url(&options.coordinator);
        let listener = TcpListener::bind(options.listen).await;
        let listener = listener.map_err(|source| DaemonError::Listen {
            address: options.listen,
            source,
        })?;
        let address = listener.local_addr().map_err(state_error(&state))?;
        let own = identity::open(&options.identity, &state, &options.name, &coordinator).await?;
        let (acceptance, dialer, authority) = match &own {
            Some(own) => {
                let authority = own.holder.current().authority().clone();
                (Acceptance::mutual(&own.holder)?, own.dialer()?, Some(authority))
            }
            None => {
                let open = [options.listen, options.portal]
                    .into_iter()
                    .find(|address| !address.ip().is_loopback());
                if let Some(address) = open {
                    return Err(DaemonError::NoIdentity {
                        host: options.name.clone(),
                        address,
                    });
                }
                tracing::warn!(%address, "this host has no certificate and asks for none: whoever reaches it can use it");
                (Acceptance::Insecure, Dialer::Insecure, None)
            }
        };
        let keys = Arc::new(match &own {
            Some(_) => Keys::open(&state)?,
            None => Keys::none(),
        });
        let store = options.store.as_deref().map(absolute).transpose()?;
        let places = Places {
            host: options.name.clone(),
            cache: members(&options.cache, &state)?,
            state: state.clone(),
            store: store.clone(),
            portal: options.portal,
            advertise: options.advertise.clone(),
            keys: Arc::clone(&keys),
        };
        let plane = choice::open(&options.plane, places)?;
        let portal = plane.portal();
        let (journal, recovered) = Journal::open(&state)?;
        let (plane, journal) = over(plane, journal);
        if let Some(damage) = recovered.damage {
            // Mostly what a loss of power leaves of a record that nobody waited for.
            tracing::warn!(%damage, "the journal ended in a record that was not whole; it is repaired, and holds all before that");
        }
        for step in recovered.unfinished {
            tracing::info!(
                step = step.name(),
                "was half done when the agent ended; what is found decides"
            );
        }
        let settings = Settings {
            name: options.name.clone(),
            instance,
            deltas_dir: options.plane.deltas(&state),
            state_dir: state,
            store_dir: store,
            coordinator: coordinator.clone(),
            dialer: dialer.clone(),
            keys,
            agent_address: advertised(options.advertise.as_deref(), address),
            labels: options.labels.iter().cloned().collect::<Labels>(),
            weight: options.weight,
            delta_limit: options.plane.delta_limit,
        };
        let (host, refused) = Host::start(settings, plane, journal).await?;
        let (stop, stopped) = watch::channel(false);
        let renewal = CancellationToken::new();
        if let Some(own) = own {
            tokio::spawn(own.keep_new(dialer, coordinator, renewal.clone()));
        }
        let face = crate::face::face(authority.is_none());
        let life: Arc<dyn Vitals> = Arc::new(Life(host.clone()));
        let own = Routes::new(rpc::server(host.clone()));
        let services = http::services(&face, own, &life, stopped.clone())?;
        let router = http::router(&face, life, Gate::new(authority).over(services))?;
        let incoming = Incoming::new(listener, acceptance);
        let server = http::serve(incoming, Connection::is_http2, router, None, stopped);
        let daemon = Self {
            address,
            portal,
            host,
            stop,
            server: tokio::spawn(server),
            refused,
            _renewal: renewal.drop_guard(),
            _lock: lock,
        };
        if let Some(path) = &options.ready_file {
            daemon.write_ready_file(path)?;
        }
        Ok(daemon)
    }

    /// Where the Agent service listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where the target listens.
    pub fn portal(&self) -> &str {
        &self.portal
    }

    /// The host.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Waits until the agent must end by itself.
    pub async fn failed(&mut self) -> DaemonError {
        tokio::select! {
            Ok(refused) = &mut self.refused => refused.into(),
            ended = &mut self.server => match ended {
                Ok(Err(error)) => DaemonError::Serve(error),
                Ok(Ok(())) | Err(_) => DaemonError::State {
                    path: PathBuf::from("the gRPC server"),
                    source: io::Error::other("it ended by itself"),
                },
            },
        }
    }

    /// Ends in good order. VMs go on, and the host keeps its places: it is expected back.
    pub async fn stop(self) {
        // Nobody left to tell means that all has ended already.
        let _ = self.stop.send(true);
        self.host.end().await;
        let mut server = self.server;
        if tokio::time::timeout(DRAIN, &mut server).await.is_err() {
            server.abort();
            // Its listener is closed when the task has ended, not before: whoever starts anew wants the same address.
            let _ = server.await;
        }
    }

    fn write_ready_file(&self, path: &Path) -> Result<(), DaemonError> {
        let error = |source| DaemonError::ReadyFile {
            path: path.to_owned(),
            source,
        };
        let text = serde_json::json!({ "rpc": self.address.to_string(), "portal": self.portal }).to_string();
        let new = path.with_extension("new");
        std::fs::write(&new, text).map_err(error)?;
        std::fs::rename(&new, path).map_err(error)
    }
}

fn members(given: &[MemberSpec], state: &Path) -> Result<Vec<MemberSpec>, DaemonError> {
    if given.is_empty() {
        return Ok(vec![MemberSpec {
            path: state.join("cache"),
            budget: None,
        }]);
    }
    let each = given.iter().map(|spec| {
        Ok(MemberSpec {
            path: absolute(&spec.path)?,
            budget: spec.budget,
        })
    });
    each.collect()
}

fn absolute(path: &Path) -> Result<PathBuf, DaemonError> {
    std::path::absolute(path).map_err(state_error(path))
}

fn url(coordinator: &str) -> String {
    if coordinator.contains("://") {
        coordinator.into()
    } else {
        format!("http://{coordinator}")
    }
}

fn advertised(advertise: Option<&str>, bound: SocketAddr) -> String {
    match advertise {
        Some(host) if host.contains(':') => format!("[{host}]:{}", bound.port()),
        Some(host) => format!("{host}:{}", bound.port()),
        None => bound.to_string(),
    }
}

/// Keeps a second agent out of the directory; the kernel releases it with the process.
fn lock(state: &Path) -> Result<Flock<std::fs::File>, DaemonError> {
    let path = state.join("lock");
    let file = std::fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(state_error(&path))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        nix::errno::Errno::EWOULDBLOCK => DaemonError::InUse {
            dir: state.to_owned(),
        },
        errno => DaemonError::State {
            path,
            source: errno.into(),
        },
    })
}

/// The directory's own identity: made once, with the host's name, so that a restart is told from a second agent.
fn instance(state: &Path, name: &HostName) -> Result<String, DaemonError> {
    let path = state.join("instance");
    match std::fs::read_to_string(&path) {
        Ok(text) => {
            let (instance, found) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
            if found != name.as_str() {
                return Err(DaemonError::OtherHost {
                    dir: state.to_owned(),
                    found: found.into(),
                    given: name.clone(),
                });
            }
            Ok(instance.into())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let instance = format!("{:032x}", rand::random::<u128>());
            let new = path.with_extension("new");
            std::fs::write(&new, format!("{instance} {name}\n"))
                .and_then(|()| std::fs::File::open(&new)?.sync_all())
                .and_then(|()| std::fs::rename(&new, &path))
                .map_err(state_error(&path))?;
            Ok(instance)
        }
        Err(error) => Err(state_error(&path)(error)),
    }
}
