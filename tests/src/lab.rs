//! A lab of real Linux hosts on one machine, without a hypervisor: a network namespace with a bridge, a coordinator and an origin as processes
//! in it, and hosts that are user-mode Linux guests, each with its kernel, its disk file and its agent.
//!
//! A host has two links: one that carries data, shaped or cut on request, and one for control, so that a host that is cut off can still be
//! asked what it sees. Work from within the lab's namespace: [`Lab::enter`].
//!
//! The tests have a lab of their own each, which ends with them; `treeboot-lab up` leaves one running ([`Lab::leave`]) that `down` ends.

pub mod channel;
pub mod disk;
pub mod host;
pub mod inside;
pub mod model;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use crate::authority;
use crate::binaries::Binaries;
use crate::daemon::{Daemon, DaemonSpec};
use crate::need::Need;
use crate::network::Network;
use crate::scratch::{self, Scratch};
use crate::uml;
use crate::wait::wait_until;

pub use host::{HostSpec, LabHost, Plane};

/// What a lab asks of the machine.
pub const NEEDS: [Need; 9] = [
    uml::NEEDS[0],
    uml::NEEDS[1],
    uml::NEEDS[2],
    uml::NEEDS[3],
    Need::Program("ip", "iproute2"),
    Need::Program("tc", "iproute2"),
    Need::Program("iscsid", "open-iscsi"),
    Need::Program("bash", "bash"),
    Need::Program("dmsetup", "dmsetup"),
];

/// More would not fit into the lab's network, nor into a machine.
pub const MAX_HOSTS: usize = 60;
/// For all hosts to be known to the coordinator once their agents serve.
const KNOWN_WITHIN: Duration = Duration::from_secs(60);
/// What `up` leaves for `shell`.
const STATE_FILE: &str = "lab.json";

/// What a lab shall be like.
#[derive(Debug, Clone, Default)]
pub struct LabSpec {
    /// The hosts besides the origin, [`MAX_HOSTS`] at most.
    pub hosts: Vec<HostSpec>,
    /// Children a host, in trees of one stripe: 2 are the paper's. Without it the coordinator's own default is tried: two stripes.
    pub fan_out: Option<u32>,
    /// Speed of every link in both directions, the origin's too, in Mbit/s; without it they are as fast as the machine.
    pub rate_mbit: Option<u32>,
    /// Further arguments of the coordinator.
    pub coordinator_args: Vec<String>,
}

/// What is known of a lab that another process left running.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Left {
    /// The namespace in which everything is.
    pub namespace: String,
    /// The coordinator's URL, inside of the namespace.
    pub coordinator: String,
    /// Its programs' folder.
    pub programs: PathBuf,
    /// An admin's identity.
    pub identity: PathBuf,
    /// The hosts.
    pub hosts: Vec<LeftHost>,
}

/// A host of a lab that another process left running.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LeftHost {
    /// Its name.
    pub name: String,
    /// Its plane.
    pub plane: Plane,
    /// Where it takes commands.
    pub control: SocketAddr,
}

/// The lab. All ends when it is dropped, unless it is left.
#[derive(Debug)]
pub struct Lab {
    /// The coordinator, a process in the lab's namespace.
    pub coordinator: Daemon,
    /// The agent that holds the store, a process with a link of its own.
    pub origin: Daemon,
    /// The hosts.
    pub hosts: Vec<LabHost>,
    /// The network.
    pub network: Network,
    binaries: Binaries,
    // Last: dropped after everything that belongs to it.
    scratch: Scratch,
}

impl Lab {
    /// Starts a lab in a temporary folder, and moves the calling thread into its namespace. `label` names the evidence that is kept
    /// when the test fails.
    ///
    /// # Errors
    /// A program is missing, or a daemon or a guest did not come up; the error holds the end of its log or console.
    pub async fn start(label: &str, spec: &LabSpec) -> Result<Self> {
        let binaries = Binaries::locate()?;
        let scratch = Scratch::new(binaries.evidence().join(label))?;
        Self::start_in(scratch, binaries, spec, &mut |_| {}).await
    }

    /// Starts a lab in a folder that stays, which is to be left ([`Lab::leave`]); says what it does.
    ///
    /// # Errors
    /// As [`Lab::start`], or there is a lab already.
    pub async fn up(folder: &Path, spec: &LabSpec, say: &mut dyn FnMut(&str)) -> Result<Self> {
        let binaries = Binaries::locate()?;
        if folder.exists() {
            bail!(
                "there is a lab in {} already; `cargo xtask lab down` ends it",
                folder.display()
            );
        }
        let scratch = Scratch::in_folder(folder, binaries.evidence().join("lab"))?;
        Self::start_in(scratch, binaries, spec, say).await
    }

    async fn start_in(
        scratch: Scratch,
        binaries: Binaries,
        spec: &LabSpec,
        say: &mut dyn FnMut(&str),
    ) -> Result<Self> {
        if spec.hosts.len() > MAX_HOSTS {
            bail!(
                "{} hosts are more than a lab holds, {MAX_HOSTS}",
                spec.hosts.len()
            );
        }
        let network = Network::new(&scratch, 1)?;
        network.add_control()?;
        network.enter()?;
        let lab = Self::with_daemons(scratch, binaries, network, spec)?;
        // The daemons listen beyond loopback, so they want to know who asks.
        let token = authority::make(
            &lab.scratch,
            &lab.binaries,
            &lab.scratch.path().join("coordinator/state"),
            &lab.coordinator,
            spec.hosts.len() + 1,
        )?;
        authority::trust(&lab.scratch, &lab.origin)?;
        lab.coordinator.start(&lab.scratch).await?;
        let url = lab.coordinator.url()?;
        say(&format!("the coordinator serves at {url}"));
        let mut lab = lab;
        lab.add_hosts(&url, &token, spec)?;
        for host in &lab.hosts {
            host.boot(&lab.scratch)?;
        }
        say(&format!("{} hosts boot", lab.hosts.len()));
        lab.origin.set_env("TREEBOOT_COORDINATOR", &url);
        lab.origin.set_env("TREEBOOT_JOIN_TOKEN", &token);
        lab.origin.start(&lab.scratch).await?;
        futures_util::future::try_join_all(lab.hosts.iter().map(LabHost::wait_up)).await?;
        say("all agents serve");
        if let Some(rate) = spec.rate_mbit {
            lab.shape(rate).await?;
            say(&format!("every link carries {rate} Mbit/s"));
        }
        lab.wait_known().await?;
        fs::write(
            lab.scratch.path().join(STATE_FILE),
            serde_json::to_vec_pretty(&lab.state()?)?,
        )?;
        Ok(lab)
    }

    fn with_daemons(scratch: Scratch, binaries: Binaries, network: Network, spec: &LabSpec) -> Result<Self> {
        let folder = |name: &str| scratch.path().join(name);
        let mut args: Vec<OsString> = vec!["--state".into(), folder("coordinator").join("state").into()];
        if let Some(fan_out) = spec.fan_out {
            args.extend(["--policy", "k-ary", "--fan-out"].map(Into::into));
            args.push(fan_out.to_string().into());
        }
        args.extend(spec.coordinator_args.iter().map(Into::into));
        let coordinator = Daemon::new(
            &scratch,
            DaemonSpec {
                name: "coordinator".into(),
                program: binaries.coordinator(),
                args,
                address: network.hub_address(),
                portal: None,
                namespace: None,
            },
        )?;
        let place = folder("origin");
        let args: Vec<OsString> = vec![
            "--name".into(),
            "origin".into(),
            "--state".into(),
            place.join("state").into(),
            "--cache".into(),
            place.join("cache").into(),
            "--store".into(),
            place.join("store").into(),
        ];
        let origin = Daemon::new(
            &scratch,
            DaemonSpec {
                name: "origin".into(),
                program: binaries.agent(),
                args,
                address: network.address(0),
                portal: Some(0),
                namespace: Some(network.namespace(0)),
            },
        )?;
        Ok(Self {
            coordinator,
            origin,
            hosts: Vec::new(),
            network,
            binaries,
            scratch,
        })
    }

    fn add_hosts(&mut self, coordinator: &str, token: &str, spec: &LabSpec) -> Result<()> {
        let folder = self.binaries.folder().to_path_buf();
        let programs = host::Programs {
            lab: self.binaries.test_program("treeboot-lab")?,
            folder,
            provision: provision_script(),
            token: token.to_owned(),
        };
        for (number, spec) in (1..).zip(&spec.hosts) {
            let host = LabHost::prepare(&self.scratch, &self.network, &programs, coordinator, number, spec)?;
            self.hosts.push(host);
        }
        Ok(())
    }

    fn state(&self) -> Result<Left> {
        Ok(Left {
            namespace: self.network.hub_namespace().to_owned(),
            coordinator: self.coordinator.url()?,
            programs: self.binaries.folder().to_path_buf(),
            identity: authority::admin_path(&self.scratch),
            hosts: self
                .hosts
                .iter()
                .map(|host| LeftHost {
                    name: host.name().to_owned(),
                    plane: host.plane(),
                    control: host.control(),
                })
                .collect(),
        })
    }

    /// Gives every link this speed, in both directions.
    ///
    /// # Errors
    /// `tc` failed, here or on a host.
    pub async fn shape(&self, rate_mbit: u32) -> Result<()> {
        self.network.shape_host(0, rate_mbit)?;
        for host in &self.hosts {
            // Towards the host at the bridge's end of its link, from it at its own.
            self.network.shape_tap(host.number(), rate_mbit)?;
            host.sh(&format!(
                "tc qdisc replace dev vec0 root {}",
                Network::shape(rate_mbit)
            ))
            .await?;
        }
        Ok(())
    }

    /// Gives every link the machine's speed again.
    ///
    /// # Errors
    /// A link was not shaped, or `tc` failed.
    pub async fn unshape(&self) -> Result<()> {
        self.network.unshape_host(0)?;
        for host in &self.hosts {
            self.network.unshape_tap(host.number())?;
            host.sh("tc qdisc del dev vec0 root").await?;
        }
        Ok(())
    }

    /// Waits until the coordinator has the heartbeat of the origin and of every running host.
    ///
    /// # Errors
    /// Not within 60 s.
    pub async fn wait_known(&self) -> Result<()> {
        let running = || {
            let hosts = self.hosts.iter().filter(|host| host.is_running());
            ["origin"].into_iter().chain(hosts.map(LabHost::name)).collect()
        };
        self.wait_beats("the coordinator to know all hosts", running)
            .await
    }

    /// Waits until the coordinator has a host's heartbeat.
    ///
    /// # Errors
    /// Not within 60 s.
    pub async fn wait_host_known(&self, host: &LabHost) -> Result<()> {
        let what = format!("the coordinator to know {}", host.name());
        self.wait_beats(&what, || vec![host.name()]).await
    }

    async fn wait_beats<'a>(&'a self, what: &str, names: impl Fn() -> Vec<&'a str>) -> Result<()> {
        wait_until(KNOWN_WITHIN, what, async || {
            let list: serde_json::Value = self.json(&["host", "list", "--json"]).await?;
            let known = |name: &str| {
                list.as_array().is_some_and(|hosts| {
                    hosts
                        .iter()
                        .any(|host| host["name"] == name && host["connected"] == true)
                })
            };
            Ok(names().into_iter().all(known).then_some(()))
        })
        .await
    }

    /// A host by its name.
    ///
    /// # Errors
    /// There is none.
    pub fn host(&self, name: &str) -> Result<&LabHost> {
        self.hosts
            .iter()
            .find(|host| host.name() == name)
            .with_context(|| format!("no host '{name}'"))
    }

    /// Runs `treeboot` in the lab's namespace and gives what it said, whether it succeeded or not.
    ///
    /// # Errors
    /// It could not be started.
    pub async fn treeboot_output(&self, args: &[impl AsRef<OsStr>]) -> Result<Output> {
        let mut command = self.scratch.command(self.binaries.cli());
        command
            .args(args)
            .env("TREEBOOT_COORDINATOR", self.coordinator.url()?)
            .env("TREEBOOT_IDENTITY", authority::admin_path(&self.scratch))
            .env("NO_COLOR", "1");
        tokio::process::Command::from(command)
            .kill_on_drop(true)
            .output()
            .await
            .context("could not start treeboot")
    }

    /// As [`Lab::treeboot_output`], for a call that must succeed; gives its standard output.
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

    /// As [`Lab::treeboot`], for a call with `--json`.
    ///
    /// # Errors
    /// It did not succeed, or did not answer with JSON.
    pub async fn json(&self, args: &[&str]) -> Result<serde_json::Value> {
        let text = self.treeboot(args).await?;
        serde_json::from_str(&text).with_context(|| format!("treeboot {}: not JSON", args.join(" ")))
    }

    /// The folder to which everything belongs.
    #[must_use]
    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    /// The program that the lab runs inside of its hosts.
    ///
    /// # Errors
    /// It is not built.
    pub fn lab_program(&self) -> Result<PathBuf> {
        self.binaries.test_program("treeboot-lab")
    }

    /// Ends everything. A lab that is dropped without it keeps its logs as evidence: a test failed.
    pub fn pass(self) {
        self.scratch.pass();
    }

    /// Lets everything run on; `down` ends it.
    pub fn leave(self) {
        for host in &self.hosts {
            host.leave();
        }
        self.scratch.leave();
    }
}

/// What a lab in this folder left for those who come later.
///
/// # Errors
/// There is no lab, or it did not come up.
pub fn left(folder: &Path) -> Result<Left> {
    let text = fs::read(folder.join(STATE_FILE)).with_context(|| {
        format!(
            "no lab runs in {}; `cargo xtask lab up` starts one",
            folder.display()
        )
    })?;
    serde_json::from_slice(&text)
        .context("the lab's file is not understood; `cargo xtask lab down` removes it")
}

/// Ends the lab in this folder and removes all of it: processes, namespaces, files. Whether there was one.
///
/// # Errors
/// It is still coming up, in another process.
pub fn down(folder: &Path) -> Result<bool> {
    if !folder.exists() {
        return Ok(false);
    }
    scratch::end_left(folder)?;
    Ok(true)
}

/// The script that makes a machine a host, the same for the lab and for `vagrant/`.
#[must_use]
pub fn provision_script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .map(|root| root.join("vagrant/provision.sh"))
        .unwrap_or_default()
}
