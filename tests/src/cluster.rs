//! A coordinator, an origin and hosts, each a process of its own.

use std::ffi::{OsStr, OsString};
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::authority;
use crate::binaries::Binaries;
use crate::daemon::{Daemon, DaemonSpec};
use crate::network::Network;
use crate::scratch::Scratch;
use crate::wait::wait_until;

/// For all hosts to be known to the coordinator after their start.
const KNOWN_WITHIN: Duration = Duration::from_secs(20);

/// What a cluster shall be like.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Hosts besides the origin.
    pub hosts: usize,
    /// Children a host, in trees of one stripe: 2 are the paper's. Without it the coordinator's own default is tried: two stripes.
    pub fan_out: Option<u32>,
    /// Parents that a host reads from at once.
    pub active_parents: u32,
    /// A program of the tests' own in the coordinator's place.
    pub coordinator_program: Option<&'static str>,
    /// The same for all agents.
    pub agent_program: Option<&'static str>,
    /// The hosts, but not the origin, move blocks through the kernel.
    pub kernel_plane: bool,
    /// Further arguments of the coordinator.
    pub coordinator_args: Vec<String>,
    /// Further arguments of every agent, the origin's too.
    pub agent_args: Vec<String>,
    /// Each host in a network namespace of its own. The calling thread moves into the hub's namespace. Implies [`Plan::secure`].
    pub namespaces: bool,
    /// Loopback over IPv6.
    pub ipv6: bool,
    /// The hosts' names by number, from 0; `h1`, `h2`, ... where there is none.
    pub names: Vec<String>,
    /// With an authority: hosts join by a token, and the tests' own clients and `treeboot` are an admin's.
    pub secure: bool,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            hosts: 1,
            fan_out: None,
            active_parents: 1,
            coordinator_program: None,
            agent_program: None,
            kernel_plane: false,
            coordinator_args: Vec::new(),
            agent_args: Vec::new(),
            namespaces: false,
            ipv6: false,
            names: Vec::new(),
            secure: false,
        }
    }
}

impl Plan {
    /// A host that is silent for so long is given up; it says twice a second that it lives.
    #[must_use]
    pub fn with_leases(mut self, lease: Duration) -> Self {
        let lease_ms = lease.as_millis().to_string();
        let words = [
            "--beat-ms",
            "500",
            "--lease-ms",
            &lease_ms,
            "--pending-lease-ms",
            &lease_ms,
        ];
        self.coordinator_args.extend(words.map(Into::into));
        self
    }
}

/// The processes. All end when it is dropped.
#[derive(Debug)]
pub struct Cluster {
    /// The coordinator.
    pub coordinator: Daemon,
    /// The agent that holds the store.
    pub origin: Daemon,
    /// The other agents.
    pub hosts: Vec<Daemon>,
    /// The network, where the hosts have namespaces. The origin is its host 0, `hosts[i]` its host i + 1.
    pub network: Option<Network>,
    binaries: Binaries,
    // Last: dropped after everything that belongs to it.
    scratch: Scratch,
}

impl Cluster {
    /// Starts everything and waits until the coordinator knows every host.
    ///
    /// `label` names the evidence that is kept when the test fails.
    ///
    /// # Errors
    /// A program is missing, or a daemon did not come up; the error holds the end of its log.
    pub async fn start(label: &str, plan: &Plan) -> Result<Self> {
        let cluster = Self::prepare(label, plan)?;
        cluster.coordinator.start(&cluster.scratch).await?;
        cluster.start_agents().await?;
        Ok(cluster)
    }

    /// Makes folders, addresses and namespaces, and starts nothing.
    ///
    /// # Errors
    /// A program is missing, or the folder or the network cannot be made.
    pub fn prepare(label: &str, plan: &Plan) -> Result<Self> {
        let binaries = Binaries::locate()?;
        let scratch = Scratch::new(binaries.evidence().join(label))?;
        let network = plan
            .namespaces
            .then(|| Network::new(&scratch, plan.hosts + 1))
            .transpose()?;
        if let Some(network) = &network {
            network.enter()?;
        }
        let addresses = Addresses::new(network.as_ref(), plan.ipv6);
        let coordinator = Daemon::new(
            &scratch,
            DaemonSpec {
                name: "coordinator".into(),
                program: match plan.coordinator_program {
                    Some(name) => binaries.test_program(name)?,
                    None => binaries.coordinator(),
                },
                args: coordinator_args(&scratch, plan),
                address: addresses.coordinator(),
                portal: None,
                namespace: None,
            },
        )?;
        let agent_program = match plan.agent_program {
            Some(name) => binaries.test_program(name)?,
            None => binaries.agent(),
        };
        let agent = |number: usize, name: &str| {
            Daemon::new(
                &scratch,
                DaemonSpec {
                    name: name.into(),
                    program: agent_program.clone(),
                    args: agent_args(&scratch, plan, name, number == 0),
                    address: addresses.host(number),
                    // LIO takes no free port by itself.
                    portal: Some(if plan.kernel_plane && number > 0 { 3260 } else { 0 }),
                    namespace: network.as_ref().map(|network| network.namespace(number)),
                },
            )
        };
        let origin = agent(0, "origin")?;
        let hosts = (1..=plan.hosts)
            .map(|number| match plan.names.get(number - 1) {
                Some(name) => agent(number, name),
                None => agent(number, &format!("h{number}")),
            })
            .collect::<Result<Vec<_>>>()?;
        let cluster = Self {
            coordinator,
            origin,
            hosts,
            network,
            binaries,
            scratch,
        };
        // Beyond loopback no daemon starts without.
        if plan.secure || plan.namespaces {
            cluster.secure()?;
        }
        Ok(cluster)
    }

    /// Makes the authority, a token for all hosts, and an admin.
    fn secure(&self) -> Result<()> {
        let (scratch, state) = (&self.scratch, self.coordinator_state());
        let hosts = self.agents().count();
        let token = authority::make(scratch, &self.binaries, &state, &self.coordinator, hosts)?;
        for agent in self.agents() {
            authority::trust(scratch, agent)?;
            agent.set_env("TREEBOOT_JOIN_TOKEN", &token);
        }
        Ok(())
    }

    /// Where the coordinator keeps its state.
    #[must_use]
    pub fn coordinator_state(&self) -> PathBuf {
        self.scratch.path().join("coordinator/state")
    }

    /// Runs `treeboot-coordinator` with a verb, on this cluster's state; gives its standard output.
    ///
    /// # Errors
    /// It did not succeed; the error holds its words.
    pub fn coordinator_says(&self, args: &[&str]) -> Result<String> {
        authority::says(&self.scratch, &self.binaries, &self.coordinator_state(), args)
    }

    /// Starts the origin and all hosts, at the same time, and waits until the coordinator knows them.
    ///
    /// # Errors
    /// The coordinator does not run, or an agent did not come up.
    pub async fn start_agents(&self) -> Result<()> {
        let url = self.coordinator.url()?;
        // All processes first, so that they start beside each other.
        let mut starting = Vec::new();
        for agent in self.agents() {
            starting.push(self.start_agent(agent, &url));
        }
        futures_util::future::try_join_all(starting).await?;
        self.wait_known().await
    }

    async fn start_agent(&self, agent: &Daemon, coordinator_url: &str) -> Result<Duration> {
        agent.set_env("TREEBOOT_COORDINATOR", coordinator_url);
        agent.start(&self.scratch).await
    }

    /// Starts one daemon again that was killed or ended; gives the time until it served.
    ///
    /// # Errors
    /// As [`Daemon::start`].
    pub async fn restart(&self, daemon: &Daemon) -> Result<Duration> {
        daemon.start(&self.scratch).await
    }

    /// Waits until the coordinator has every running agent's heartbeat.
    ///
    /// # Errors
    /// Not within 20 s; the error names who is missing.
    pub async fn wait_known(&self) -> Result<()> {
        let client = self.coordinator.coordinator().await?;
        let names: Vec<&str> = self
            .agents()
            .filter(|agent| agent.is_running())
            .map(Daemon::name)
            .collect();
        let missing = parking_lot::Mutex::new(Vec::new());
        let known = wait_until(KNOWN_WITHIN, "the coordinator to know all hosts", || {
            let mut client = client.clone();
            let (missing, names) = (&missing, &names);
            async move {
                let hosts = client
                    .list_hosts(treeboot_proto::v1::ListHostsRequest {})
                    .await?
                    .into_inner()
                    .hosts;
                let known = |name: &str| {
                    hosts.iter().any(|host| {
                        host.connected && host.info.as_ref().is_some_and(|info| info.name == name)
                    })
                };
                let absent: Vec<String> = names
                    .iter()
                    .filter(|name| !known(name))
                    .map(ToString::to_string)
                    .collect();
                let all = absent.is_empty();
                *missing.lock() = absent;
                Ok(all.then_some(()))
            }
        })
        .await;
        known.with_context(|| format!("missing: {}", missing.lock().join(", ")))
    }

    /// The origin, then the hosts.
    pub fn agents(&self) -> impl Iterator<Item = &Daemon> {
        std::iter::once(&self.origin).chain(&self.hosts)
    }

    /// An agent by its name.
    ///
    /// # Errors
    /// There is none.
    pub fn agent(&self, name: &str) -> Result<&Daemon> {
        self.agents()
            .find(|agent| agent.name() == name)
            .with_context(|| format!("no agent '{name}'"))
    }

    /// A folder for files of the test's own.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.scratch.path()
    }

    /// The folder to which all processes belong.
    #[must_use]
    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    /// Runs `treeboot` with this coordinator and gives what it said, whether it succeeded or not.
    ///
    /// # Errors
    /// It could not be started.
    pub async fn treeboot_output(&self, args: &[impl AsRef<OsStr>]) -> Result<Output> {
        let mut command = self.scratch.command(self.binaries.cli());
        command
            .args(args)
            .env("TREEBOOT_COORDINATOR", self.coordinator.url()?)
            .env("NO_COLOR", "1");
        let admin = authority::admin_path(&self.scratch);
        if admin.exists() {
            command.env("TREEBOOT_IDENTITY", admin);
        }
        tokio::process::Command::from(command)
            .kill_on_drop(true)
            .output()
            .await
            .context("could not start treeboot")
    }

    /// As [`Cluster::treeboot_output`], for a call that must succeed; gives its standard output.
    ///
    /// # Errors
    /// It did not succeed; the error holds the command and its words.
    pub async fn treeboot(&self, args: &[impl AsRef<OsStr>]) -> Result<String> {
        let output = self.treeboot_output(args).await?;
        if !output.status.success() {
            let args: Vec<_> = args.iter().map(|arg| arg.as_ref().to_string_lossy()).collect();
            bail!(
                "treeboot {} ended with {}: {}",
                args.join(" "),
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Imports a file as an image, at the origin.
    ///
    /// # Errors
    /// The import failed.
    pub async fn import(&self, file: &Path, name: &str) -> Result<()> {
        let args = [
            OsStr::new("image"),
            OsStr::new("import"),
            file.as_os_str(),
            OsStr::new(name),
        ];
        self.treeboot(&args).await?;
        Ok(())
    }

    /// Ends everything. A cluster that is dropped without it keeps its logs as evidence: a test failed.
    pub fn pass(self) {
        self.scratch.pass();
    }

    /// The program `treeboot-agent`.
    #[must_use]
    pub fn agent_path(&self) -> PathBuf {
        self.binaries.agent()
    }

    /// The program `treeboot-coordinator`.
    #[must_use]
    pub fn coordinator_path(&self) -> PathBuf {
        self.binaries.coordinator()
    }

    /// The program `treeboot`.
    #[must_use]
    pub fn cli_path(&self) -> PathBuf {
        self.binaries.cli()
    }
}

fn coordinator_args(scratch: &Scratch, plan: &Plan) -> Vec<OsString> {
    let mut args: Vec<OsString> = vec![
        "--state".into(),
        scratch.path().join("coordinator/state").into(),
        "--active-parents".into(),
        plan.active_parents.to_string().into(),
    ];
    if let Some(fan_out) = plan.fan_out {
        args.extend(["--policy", "k-ary", "--fan-out"].map(Into::into));
        args.push(fan_out.to_string().into());
    }
    args.extend(plan.coordinator_args.iter().map(Into::into));
    args
}

fn agent_args(scratch: &Scratch, plan: &Plan, name: &str, origin: bool) -> Vec<OsString> {
    let folder = scratch.path().join(name);
    let mut args: Vec<OsString> = vec![
        "--name".into(),
        name.into(),
        "--state".into(),
        folder.join("state").into(),
        "--cache".into(),
        folder.join("cache").into(),
    ];
    if origin {
        args.extend(["--store".into(), folder.join("store").into()]);
    } else if plan.kernel_plane {
        args.extend(["--plane".into(), "kernel".into()]);
    }
    args.extend(plan.agent_args.iter().map(Into::into));
    args
}

/// Which address each daemon has. On loopback a cluster has a network of its own, 127.A.B.0/24, so that a person who looks at
/// `ss` can tell clusters and hosts apart, and no two use one address.
struct Addresses<'a> {
    network: Option<&'a Network>,
    ipv6: bool,
    a: u8,
    b: u8,
}

impl<'a> Addresses<'a> {
    fn new(network: Option<&'a Network>, ipv6: bool) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let [_, _, high, low] =
            (std::process::id().wrapping_mul(31) + COUNT.fetch_add(1, Ordering::Relaxed)).to_be_bytes();
        Self {
            network,
            ipv6,
            a: 64 | (high & 63),
            b: low,
        }
    }

    fn coordinator(&self) -> IpAddr {
        match self.network {
            Some(network) => network.hub_address(),
            None => self.loopback(254),
        }
    }

    fn host(&self, number: usize) -> IpAddr {
        match self.network {
            Some(network) => network.address(number),
            None => self.loopback(u8::try_from(number + 1).unwrap_or(253)),
        }
    }

    fn loopback(&self, last: u8) -> IpAddr {
        if self.ipv6 {
            // Linux has one loopback address of IPv6; the ports tell the daemons apart.
            return IpAddr::V6(std::net::Ipv6Addr::LOCALHOST);
        }
        IpAddr::V4(Ipv4Addr::new(127, self.a, self.b, last))
    }
}
