//! One daemon as a process: started, killed, frozen, thawed, started again on the same addresses.

use std::ffi::OsString;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use parking_lot::Mutex;
use tonic::transport::{Channel, Endpoint};
use treeboot_identity::tls::Dialer;
use treeboot_proto::v1::agent_client::AgentClient;
use treeboot_proto::v1::coordinator_client::CoordinatorClient;

use crate::scratch::Scratch;
use crate::wait::wait_until;

/// From a daemon's start to its ready file. A busy machine of two cores that runs guests is slow; a healthy start takes 50 ms.
const READY_WITHIN: Duration = Duration::from_secs(30);
/// From SIGTERM to its end.
const ENDS_WITHIN: Duration = Duration::from_secs(15);
/// For a connection on this machine.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);

/// The addresses that a daemon really bound.
#[derive(Debug, Clone, Copy)]
pub struct Bound {
    /// Its gRPC service.
    pub rpc: SocketAddr,
    /// Its iSCSI portal; a coordinator has none.
    pub portal: Option<SocketAddr>,
}

/// How a daemon is started.
#[derive(Debug)]
pub struct DaemonSpec {
    /// Its name: a host's, or `coordinator`.
    pub name: String,
    /// The program.
    pub program: PathBuf,
    /// Its arguments without the addresses and the ready file.
    pub args: Vec<OsString>,
    /// Where it listens; the ports are chosen by the system at the first start, and kept.
    pub address: IpAddr,
    /// The port of its iSCSI portal, where it has one; 0: a free one.
    pub portal: Option<u16>,
    /// The network namespace it runs in.
    pub namespace: Option<String>,
}

#[derive(Debug, Default)]
struct Running {
    child: Option<Child>,
    bound: Option<Bound>,
    /// How its service is reached, where it asks for certificates.
    dialer: Option<Dialer>,
    environment: Vec<(String, String)>,
}

/// A daemon, running or not.
#[derive(Debug)]
pub struct Daemon {
    spec: DaemonSpec,
    folder: PathBuf,
    running: Mutex<Running>,
}

impl Daemon {
    /// A daemon whose files lie in a folder of its name under the scratch folder; not yet started.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn new(scratch: &Scratch, spec: DaemonSpec) -> Result<Self> {
        let folder = scratch.path().join(&spec.name);
        fs::create_dir_all(&folder)?;
        Ok(Self {
            spec,
            folder,
            running: Mutex::default(),
        })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// The folder of its state, logs and caches.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Its log.
    #[must_use]
    pub fn log_path(&self) -> PathBuf {
        self.folder.join("daemon.log")
    }

    /// Arguments for the next start, after those it has.
    pub fn add_args(&mut self, args: impl IntoIterator<Item = impl Into<OsString>>) {
        self.spec.args.extend(args.into_iter().map(Into::into));
    }

    /// Sets a variable of its environment for all later starts.
    pub fn set_env(&self, variable: &str, value: &str) {
        let mut running = self.running.lock();
        running.environment.retain(|(name, _)| name != variable);
        running.environment.push((variable.to_owned(), value.to_owned()));
    }

    /// Starts the process and waits until it serves; gives the time that took.
    ///
    /// # Errors
    /// It is running already, ended at once (the error holds the end of its log), or was not ready in time.
    pub async fn start(&self, scratch: &Scratch) -> Result<Duration> {
        let began = Instant::now();
        let ready_file = self.spawn(scratch)?;
        let bound = wait_until(
            READY_WITHIN,
            &format!("{} to be ready", self.spec.name),
            || async {
                if let Some(status) = self.exited()? {
                    bail!("it ended with {status}: {}", self.log_tail());
                }
                match fs::read(&ready_file) {
                    Ok(json) => Ok(Some(self.parse_ready(&json)?)),
                    Err(_) => Ok(None),
                }
            },
        )
        .await
        .with_context(|| format!("could not start {}", self.spec.name))?;
        self.running.lock().bound = Some(bound);
        Ok(began.elapsed())
    }

    /// Starts the process without waiting; gives the file that will appear once it serves.
    ///
    /// # Errors
    /// It is running already, or could not be started.
    pub fn spawn(&self, scratch: &Scratch) -> Result<PathBuf> {
        let mut running = self.running.lock();
        if running.child.is_some() {
            bail!("{} is running already", self.spec.name);
        }
        let ready_file = self.folder.join("ready.json");
        let _ = fs::remove_file(&ready_file);
        let port = |bound: Option<SocketAddr>, first| bound.map_or(first, |address| address.port());
        let rpc = SocketAddr::new(self.spec.address, port(running.bound.map(|bound| bound.rpc), 0));
        let mut command = self.command(scratch);
        command.args(&self.spec.args).arg("--listen").arg(rpc.to_string());
        if let Some(first) = self.spec.portal {
            let port = port(running.bound.and_then(|bound| bound.portal), first);
            let portal = SocketAddr::new(self.spec.address, port);
            command.arg("--portal").arg(portal.to_string());
        }
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log_path())?;
        command
            .arg("--ready-file")
            .arg(&ready_file)
            .stdout(log.try_clone()?)
            .stderr(Stdio::from(log))
            .env("NO_COLOR", "1")
            .envs(running.environment.iter().cloned())
            .env_remove("NOTIFY_SOCKET");
        let child = command
            .spawn()
            .with_context(|| format!("could not start {}", self.spec.program.display()))?;
        running.child = Some(child);
        Ok(ready_file)
    }

    fn command(&self, scratch: &Scratch) -> Command {
        let Some(namespace) = &self.spec.namespace else {
            return scratch.command(&self.spec.program);
        };
        // `ip netns exec` becomes the program, so the pid is the program's.
        let mut command = scratch.command("ip");
        command.args(["netns", "exec", namespace]).arg(&self.spec.program);
        command
    }

    fn parse_ready(&self, json: &[u8]) -> Result<Bound> {
        let value: serde_json::Value = serde_json::from_slice(json).context("its ready file is not JSON")?;
        let address = |key: &str| -> Result<SocketAddr> {
            value[key]
                .as_str()
                .and_then(|text| text.parse().ok())
                .with_context(|| format!("its ready file has no address '{key}': {value}"))
        };
        Ok(Bound {
            rpc: address("rpc")?,
            portal: self.spec.portal.map(|_| address("portal")).transpose()?,
        })
    }

    fn exited(&self) -> Result<Option<std::process::ExitStatus>> {
        let mut running = self.running.lock();
        let Some(child) = &mut running.child else {
            bail!("{} is not running", self.spec.name);
        };
        Ok(child.try_wait()?)
    }

    /// Whether its process lives.
    #[must_use]
    pub fn is_running(&self) -> bool {
        matches!(self.exited(), Ok(None))
    }

    /// Waits until the process ends by itself.
    ///
    /// # Errors
    /// It is not running, or does not end within `limit`.
    pub async fn wait_exit(&self, limit: Duration) -> Result<std::process::ExitStatus> {
        let what = format!("the end of {}", self.spec.name);
        let status = wait_until(limit, &what, async || self.exited()).await?;
        self.running.lock().child = None;
        Ok(status)
    }

    /// Its last lines of log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        let log = fs::read_to_string(self.log_path()).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(8)..].join("\n")
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let running = self.running.lock();
        let child = running
            .child
            .as_ref()
            .with_context(|| format!("{} is not running", self.spec.name))?;
        let pid = i32::try_from(child.id()).context("a pid fits")?;
        kill(Pid::from_raw(pid), signal).with_context(|| format!("could not signal {}", self.spec.name))
    }

    /// The end without warning: SIGKILL. What it started lives on.
    ///
    /// # Errors
    /// It is not running.
    pub fn kill(&self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        let child = self.running.lock().child.take();
        if let Some(mut child) = child {
            child.wait()?;
        }
        Ok(())
    }

    /// The orderly end: SIGTERM.
    ///
    /// # Errors
    /// It is not running, or does not end in time.
    pub async fn terminate(&self) -> Result<std::process::ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        self.wait_exit(ENDS_WITHIN).await
    }

    /// Alive and silent: SIGSTOP.
    ///
    /// # Errors
    /// It is not running.
    pub fn freeze(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    /// Undoes [`Daemon::freeze`].
    ///
    /// # Errors
    /// It is not running.
    pub fn thaw(&self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    /// Its pid while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.running.lock().child.as_ref().map(Child::id)
    }

    /// The addresses it bound when it was last ready.
    ///
    /// # Errors
    /// It was never ready.
    pub fn bound(&self) -> Result<Bound> {
        self.running
            .lock()
            .bound
            .with_context(|| format!("{} was never ready", self.spec.name))
    }

    /// The URL of its gRPC service.
    ///
    /// # Errors
    /// It was never ready.
    pub fn url(&self) -> Result<String> {
        Ok(format!("http://{}", self.bound()?.rpc))
    }

    /// Its iSCSI portal as `address:port`.
    ///
    /// # Errors
    /// It was never ready or has no portal.
    pub fn portal(&self) -> Result<String> {
        let portal = self
            .bound()?
            .portal
            .with_context(|| format!("{} has no portal", self.spec.name))?;
        Ok(portal.to_string())
    }

    /// Sets how its service is reached from now on.
    pub fn set_dialer(&self, dialer: Dialer) {
        self.running.lock().dialer = Some(dialer);
    }

    async fn channel(&self) -> Result<Channel> {
        let dialer = self.running.lock().dialer.clone();
        self.channel_by(&dialer.unwrap_or(Dialer::Insecure)).await
    }

    /// A connection to its gRPC service, made by `dialer`.
    ///
    /// # Errors
    /// It does not answer, or the two do not trust each other.
    pub async fn channel_by(&self, dialer: &Dialer) -> Result<Channel> {
        let endpoint = Endpoint::from_shared(self.url()?)?.connect_timeout(CONNECT_WITHIN);
        dialer
            .connect(&endpoint)
            .await
            .with_context(|| format!("could not reach {}", self.spec.name))
    }

    /// A client of its `Agent` service.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn agent(&self) -> Result<AgentClient<Channel>> {
        Ok(AgentClient::new(self.channel().await?))
    }

    /// A client of its `Coordinator` service.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn coordinator(&self) -> Result<CoordinatorClient<Channel>> {
        Ok(CoordinatorClient::new(self.channel().await?))
    }
}
