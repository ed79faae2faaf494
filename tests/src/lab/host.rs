//! One host of the lab: a kernel, its disk, its links, the agent on it.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::channel::{Output, Running};
use super::inside::LISTENS;
use crate::network::Network;
use crate::scratch::Scratch;
use crate::uml::{Boot, Kernel, Link, make_disk};
use crate::wait::{wait_until, within};

/// From a kernel's start to its answering commands. Six at once on two busy cores take 10 s.
const UP_WITHIN: Duration = Duration::from_secs(120);
/// From a request to halt to the end of the kernel.
const HALTS_WITHIN: Duration = Duration::from_secs(60);
/// From an agent's start to its serving.
const AGENT_WITHIN: Duration = Duration::from_secs(60);
/// Where commands are taken, on the control network.
const CONTROL_PORT: u16 = 7000;
/// Sparse; caches and deltas fill it.
const DISK_BYTES: u64 = 16 << 30;

/// Loaded before anything runs on a host; the kernel finds the rest when it is asked for.
const MODULES: &[&str] = &[
    "loop",
    "dm_mod",
    "dm_multipath",
    "dm_round_robin",
    "dm_service_time",
    "dm_queue_length",
    "dm_switch",
    "dm_verity",
    "dm_snapshot",
    "dm_cache",
    "dm_cache_smq",
    "dm_flakey",
    "bcache",
    "configfs",
    "iscsi_tcp",
    "sd_mod",
    "target_core_mod",
    "target_core_iblock",
    "target_core_file",
    "iscsi_target_mod",
    "sha256_generic",
    "crc32c_generic",
    "sch_tbf",
];

/// How blocks move on a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Plane {
    /// All in the agent.
    User,
    /// Device-mapper, LIO and open-iscsi.
    Kernel,
}

impl Plane {
    /// As the agent's option has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Kernel => "kernel",
        }
    }
}

/// What a host shall be like.
#[derive(Debug, Clone)]
pub struct HostSpec {
    /// Its plane.
    pub plane: Plane,
    /// In MiB.
    pub memory_mib: u32,
    /// Further arguments of its agent.
    pub agent_args: Vec<String>,
    /// Lines for its shell at each boot, before the agent starts; one that fails ends the host.
    pub setup: String,
}

impl HostSpec {
    /// A host of this plane, of a size that serves.
    #[must_use]
    pub fn of(plane: Plane) -> Self {
        Self {
            plane,
            memory_mib: 160,
            agent_args: Vec::new(),
            setup: String::new(),
        }
    }
}

/// Which programs a host runs.
#[derive(Debug, Clone)]
pub(super) struct Programs {
    /// The folder of the daemons.
    pub(super) folder: PathBuf,
    /// The lab's own, which takes commands inside.
    pub(super) lab: PathBuf,
    /// The script that makes a machine a host.
    pub(super) provision: PathBuf,
    /// Lets the host's agent join.
    pub(super) token: String,
}

/// A host: its kernel runs, or not.
#[derive(Debug)]
pub struct LabHost {
    name: String,
    number: usize,
    plane: Plane,
    memory_mib: u32,
    folder: PathBuf,
    namespace: String,
    links: Vec<Link>,
    kernel: Mutex<Option<Kernel>>,
}

impl LabHost {
    /// Makes the host's files and links, and starts nothing.
    pub(super) fn prepare(
        scratch: &Scratch,
        network: &Network,
        programs: &Programs,
        coordinator: &str,
        number: usize,
        spec: &HostSpec,
    ) -> Result<Self> {
        let name = format!("h{number}");
        let folder = scratch.path().join(&name);
        fs::create_dir_all(&folder)?;
        make_disk(&folder.join("disk.raw"), DISK_BYTES)?;
        let links = vec![
            Link {
                tap: network.add_tap(number)?,
                address: network.guest_address(number)?,
            },
            Link {
                tap: network.add_control_tap(number)?,
                address: network.guest_control_address(number)?,
            },
        ];
        let host = Self {
            name,
            number,
            plane: spec.plane,
            memory_mib: spec.memory_mib,
            folder,
            namespace: network.hub_namespace().to_owned(),
            links,
            kernel: Mutex::new(None),
        };
        fs::write(
            host.folder.join("agent.sh"),
            host.agent_script(programs, coordinator, &spec.agent_args),
        )?;
        fs::write(
            host.folder.join("main.sh"),
            host.main_script(programs, &spec.setup),
        )?;
        Ok(host)
    }

    /// Its name: `h1`, `h2`, ...
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its number, from 1.
    #[must_use]
    pub fn number(&self) -> usize {
        self.number
    }

    /// Its plane.
    #[must_use]
    pub fn plane(&self) -> Plane {
        self.plane
    }

    /// Its address on the network that carries data.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        self.links[0].address
    }

    /// Where it takes commands.
    #[must_use]
    pub fn control(&self) -> SocketAddr {
        SocketAddr::new(self.links[1].address, CONTROL_PORT)
    }

    /// Its files on this machine.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What the guest's first process does once links and modules are there. It ends, and the guest halts, with the channel.
    fn main_script(&self, programs: &Programs, setup: &str) -> String {
        format!(
            // An agent that finds QEMU tries it, and a lab has no time for that: its hosts give disks, and run no VM.
            "rm -f /usr/bin/qemu-system-*\n\
             {provision} prepare\n\
             {setup}\n\
             sh {folder}/agent.sh\n\
             exec {lab} serve {control}\n",
            provision = programs.provision.display(),
            lab = programs.lab.display(),
            folder = self.folder.display(),
            control = self.control(),
        )
    }

    /// Starts the agent and leaves its pid; its log goes to the console, which outlives the guest.
    fn agent_script(&self, programs: &Programs, coordinator: &str, args: &[String]) -> String {
        let quoted: Vec<String> = args.iter().map(|arg| format!("'{arg}'")).collect();
        format!(
            "rm -f /run/treeboot-agent.json\n\
             export PATH={folder}:$PATH TREEBOOT_PLANE={plane} TREEBOOT_JOIN_TOKEN={token} NO_COLOR=1 TREEBOOT_LOG=${{TREEBOOT_LOG:-info}}\n\
             setsid {provision} run host {name} {address} {coordinator} --ready-file /run/treeboot-agent.json {args} \
             </dev/null >/dev/console 2>&1 &\n\
             echo $! > /run/treeboot-agent.pid\n",
            folder = programs.folder.display(),
            provision = programs.provision.display(),
            plane = self.plane.name(),
            token = programs.token,
            name = self.name,
            address = self.address(),
            args = quoted.join(" "),
        )
    }

    /// Starts the kernel, and its agent with it; does not wait.
    ///
    /// # Errors
    /// It runs already, or could not be started.
    pub fn boot(&self, scratch: &Scratch) -> Result<()> {
        let mut kernel = self.kernel.lock();
        if kernel.as_mut().is_some_and(Kernel::is_running) {
            bail!("{} runs already", self.name);
        }
        let disk = self.folder.join("disk.raw");
        let script = format!("exec sh -eu {}/main.sh", self.folder.display());
        let boot = Boot {
            folder: &self.folder,
            namespace: &self.namespace,
            links: &self.links,
            memory_mib: self.memory_mib,
            disk: Some(&disk),
            hostname: &self.name,
            modules: MODULES,
            script: &script,
        };
        *kernel = Some(boot.start(scratch)?);
        Ok(())
    }

    /// Waits until the host takes commands and its agent serves.
    ///
    /// # Errors
    /// Not in time, or the guest ended; the error holds the end of its console.
    pub async fn wait_up(&self) -> Result<()> {
        let what = format!("{} to take commands", self.name);
        // Its own word on the console costs nothing; to ask a guest again and again costs all of them time.
        let up = wait_until(UP_WITHIN, &what, async || {
            let kernel = self.kernel.lock();
            let output = kernel.as_ref().map(Kernel::output).unwrap_or_default();
            drop(kernel);
            if output.lines().any(|line| line.trim_end() == LISTENS) {
                return Ok(Some(()));
            }
            if !self.is_running() {
                bail!("the guest ended");
            }
            Ok(None)
        })
        .await;
        up.with_context(|| format!("its console ends with:\n{}", self.console_end()))?;
        self.wait_agent().await
    }

    /// Waits until the agent serves.
    ///
    /// # Errors
    /// Not in time, or it ended; the error holds the end of the host's console.
    pub async fn wait_agent(&self) -> Result<()> {
        let script = "pid=$(cat /run/treeboot-agent.pid)\n\
                      until [ -s /run/treeboot-agent.json ]; do\n\
                      kill -0 $pid 2>/dev/null || { echo 'the agent ended' >&2; exit 1; }\n\
                      sleep 0.1\ndone";
        self.sh_within(script, AGENT_WITHIN)
            .await
            .with_context(|| format!("the console ends with:\n{}", self.console_end()))?;
        Ok(())
    }

    /// Whether its kernel lives.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.kernel.lock().as_mut().is_some_and(Kernel::is_running)
    }

    /// The end of what it printed since its boot.
    #[must_use]
    pub fn console_end(&self) -> String {
        self.kernel
            .lock()
            .as_ref()
            .map(Kernel::console_end)
            .unwrap_or_default()
    }

    /// The power cut: the kernel and all that it runs end at once. What it had given to its disk is there at the next boot.
    pub fn kill(&self) {
        if let Some(mut kernel) = self.kernel.lock().take() {
            kernel.kill();
        }
    }

    /// Its time stops: it neither answers nor closes a connection.
    ///
    /// # Errors
    /// It does not run.
    pub fn freeze(&self) -> Result<()> {
        self.with_kernel(Kernel::freeze)
    }

    /// Undoes [`LabHost::freeze`].
    ///
    /// # Errors
    /// It does not run.
    pub fn thaw(&self) -> Result<()> {
        self.with_kernel(Kernel::thaw)
    }

    fn with_kernel(&self, what: impl FnOnce(&Kernel) -> Result<()>) -> Result<()> {
        let kernel = self.kernel.lock();
        what(
            kernel
                .as_ref()
                .with_context(|| format!("{} does not run", self.name))?,
        )
    }

    /// The orderly end: the front ends' sessions first, then the agent, then the kernel.
    ///
    /// # Errors
    /// It does not halt in time.
    pub async fn stop(&self) -> Result<()> {
        // A kernel that halts flushes its disks, and would wait for those of an agent that is gone. No session is no error here.
        let portal = self.address();
        self.sh(&format!("iscsiadm -m node -p {portal}:3260 --logout || true"))
            .await?;
        self.stop_agent().await?;
        // The guest is gone before it could say that the command has ended, and the command would end with the connection.
        let halting = self.start("sync; halt -f").await?;
        let kernel = self.kernel.lock().take();
        if let Some(mut kernel) = kernel {
            kernel.halted(HALTS_WITHIN).await?;
        }
        drop(halting);
        Ok(())
    }

    /// [`LabHost::stop`], then a boot.
    ///
    /// # Errors
    /// As both.
    pub async fn reboot(&self, scratch: &Scratch) -> Result<()> {
        self.stop().await?;
        self.boot(scratch)?;
        self.wait_up().await
    }

    /// [`LabHost::kill`], then a boot.
    ///
    /// # Errors
    /// It does not come up.
    pub async fn power_cycle(&self, scratch: &Scratch) -> Result<()> {
        self.kill();
        self.boot(scratch)?;
        self.wait_up().await
    }

    /// Ends the agent in order, where it runs.
    ///
    /// # Errors
    /// It does not end within 20 s, or the host does not answer.
    pub async fn stop_agent(&self) -> Result<()> {
        self.sh("pid=$(cat /run/treeboot-agent.pid)\n\
             kill $pid 2>/dev/null || exit 0\n\
             for try in $(seq 200); do kill -0 $pid 2>/dev/null || exit 0; sleep 0.1; done\n\
             echo 'the agent does not end' >&2; exit 1")
            .await?;
        Ok(())
    }

    /// Ends the agent without warning.
    ///
    /// # Errors
    /// It does not run, or the host does not answer.
    pub async fn kill_agent(&self) -> Result<()> {
        self.sh("pid=$(cat /run/treeboot-agent.pid)\nkill -9 $pid\n\
             while kill -0 $pid 2>/dev/null; do sleep 0.02; done")
            .await?;
        Ok(())
    }

    /// Starts the agent and waits until it serves.
    ///
    /// # Errors
    /// It does not start; the error holds the end of the host's console.
    pub async fn start_agent(&self) -> Result<()> {
        self.sh(&format!("sh {}/agent.sh", self.folder.display())).await?;
        self.wait_agent().await
    }

    /// Starts a command by `/bin/sh`; it is ended when what is returned is dropped.
    ///
    /// # Errors
    /// The host does not answer.
    pub async fn start(&self, script: &str) -> Result<Running> {
        Running::start(self.control(), &["/bin/sh", "-u", "-c", script])
            .await
            .with_context(|| self.name.clone())
    }

    /// Runs a script by `/bin/sh` to its end, well or not.
    ///
    /// # Errors
    /// The host does not answer, or the script does not end within `limit` and is ended.
    pub async fn run(&self, script: &str, limit: Duration) -> Result<Output> {
        let run = async {
            let mut running = self.start(script).await?;
            running.input(b"").await?;
            running.finish().await
        };
        let what = || format!("{}: {}", self.name, first_line(script));
        within(limit, &what(), run).await?.with_context(what)
    }

    /// Runs a script that must succeed, within a minute; gives its standard output.
    ///
    /// # Errors
    /// As [`LabHost::run`], or it failed: the error holds its words.
    pub async fn sh(&self, script: &str) -> Result<String> {
        self.sh_within(script, Duration::from_secs(60)).await
    }

    /// As [`LabHost::sh`], with a limit of its own.
    ///
    /// # Errors
    /// As [`LabHost::sh`].
    pub async fn sh_within(&self, script: &str, limit: Duration) -> Result<String> {
        let output = self.run(&format!("set -e\n{script}"), limit).await?;
        if output.code != 0 {
            bail!(
                "{}: {} ended with {}: {}{}",
                self.name,
                first_line(script),
                output.code,
                output.stdout,
                output.stderr
            );
        }
        Ok(output.stdout)
    }

    /// Lets the kernel run on when this process ends.
    pub(super) fn leave(&self) {
        if let Some(kernel) = self.kernel.lock().take() {
            kernel.leave();
        }
    }
}

fn first_line(script: &str) -> &str {
    script.lines().next().unwrap_or_default()
}
