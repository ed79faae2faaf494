//! A running VM: started, adopted, awaited, stopped.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::Hypervisor;
use crate::command::{self, DISK_NODE};
use crate::console::{self, Tail, Verdict};
use crate::process::Process;
use crate::qmp::{Qmp, QmpError};
use crate::spec::{DiskSource, Readiness, RunDir, VmSpec};

mod error;
mod frozen;
mod pauses;
mod stats;

use pauses::Pauses;

pub use error::{AdoptError, ReadyError, StartError, StopError};
pub use stats::BlockStats;

/// Longest wait for QEMU to open its disk and detach: a parent may be silent for seconds while paths change.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How often a start is repeated because the port chosen for the guest was taken in the meantime.
const FORWARD_ATTEMPTS: u32 = 5;
/// Between two looks at the console. Polling a file costs 2 µs; inotify would save nothing that counts and cost a dependency.
const CONSOLE_PERIOD: Duration = Duration::from_millis(20);
/// Between two tries of a guest's port.
const PORT_PERIOD: Duration = Duration::from_millis(100);
/// Longest wait for a byte from a guest's port; a guest that is not up yet leaves the connection open and says nothing.
const PORT_LIMIT: Duration = Duration::from_secs(2);
/// Longest wait for QEMU to end after `quit`; it writes back what it holds.
const QUIT_LIMIT: Duration = Duration::from_secs(10);
/// Longest wait for a process to end after SIGKILL.
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// Most bytes of QEMU's last words in an error.
const MAX_WORDS_BYTES: usize = 600;

/// A VM that runs, or has run: every call finds out anew. Dropping it changes nothing.
#[derive(Debug)]
pub struct RunningVm {
    spec: VmSpec,
    process: Process,
    forward: Option<u16>,
    pauses: Pauses,
}

/// How to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopMode {
    /// The power button: the guest shuts down by itself within the limit, or QEMU is told to quit.
    Graceful {
        /// The limit.
        limit: Duration,
    },
    /// QEMU quits at once, as when the power fails; what the guest flushed is on the disk.
    Quit,
    /// SIGKILL.
    Kill,
}

/// How far a stop had to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stopped {
    /// It had ended already.
    Already,
    /// The guest shut down.
    Guest,
    /// QEMU quit.
    Quit,
    /// It was killed.
    Killed,
}

/// What QEMU says a VM is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmState {
    /// Its processors run.
    Running,
    /// It stands still because its disk answered with an error; [`RunningVm::resume`] repeats the request.
    DiskError,
    /// Anything else, in QEMU's words.
    Other(String),
    /// QEMU has ended.
    Ended,
}

/// Starts a VM. It runs when this returns: QEMU has opened its disk, and lives apart from this process.
///
/// Dropped half-way, the VM may run or not; [`RunningVm::adopt`] tells.
///
/// # Errors
/// [`StartError`]; no process is left behind then.
pub async fn start(hypervisor: &Hypervisor, spec: VmSpec) -> Result<RunningVm, StartError> {
    spec.check()?;
    if matches!(spec.disk, DiskSource::Iscsi { .. }) {
        hypervisor.require_iscsi()?;
    }
    if let Ok(vm) = RunningVm::adopt(&spec.run_dir) {
        return Err(StartError::Running {
            vm: spec.name,
            pid: vm.pid(),
        });
    }
    prepare(&spec)?;
    let mut attempt = 1;
    loop {
        let forward = match spec.ready {
            Readiness::Port { .. } => Some(free_port(&spec)?),
            Readiness::Console { .. } | Readiness::Started => None,
        };
        match launch(hypervisor, &spec, forward).await {
            // Somebody took the port between our look and QEMU's.
            Err(StartError::Qemu { words, .. })
                if words.contains("host forwarding") && attempt < FORWARD_ATTEMPTS =>
            {
                attempt += 1
            }
            Err(error) => return Err(error),
            Ok(vm) => {
                tracing::info!(vm = %vm.spec.name, pid = vm.pid(), "VM started");
                return Ok(vm);
            }
        }
    }
}

fn file_error(spec: &VmSpec, path: PathBuf) -> impl FnOnce(std::io::Error) -> StartError {
    let vm = spec.name.clone();
    move |source| StartError::File { vm, path, source }
}

/// Fills the run directory; what an earlier run left there goes.
fn prepare(spec: &VmSpec) -> Result<(), StartError> {
    use std::os::unix::fs::DirBuilderExt as _;
    let dir = RunDir(&spec.run_dir);
    // Whoever reaches the sockets owns the VM.
    let made = std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&spec.run_dir);
    made.map_err(file_error(spec, spec.run_dir.clone()))?;
    for path in [
        dir.pid(),
        dir.qmp(),
        dir.events(),
        dir.agent(),
        dir.console(),
        dir.log(),
        dir.launch_log(),
        dir.seed(),
    ] {
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(file_error(spec, path)(error));
            }
            _ => {}
        }
    }
    if let Some(seed) = &spec.seed {
        let image = seed.image(&spec.name, spec.instance)?;
        std::fs::write(dir.seed(), image).map_err(file_error(spec, dir.seed()))?;
    }
    Ok(())
}

/// Written before QEMU is started, so that a VM whose starter died is found by what it is.
fn write_spec(spec: &VmSpec, forward: Option<u16>) -> Result<(), StartError> {
    let path = RunDir(&spec.run_dir).spec();
    let text = json!({ "spec": spec, "forward": forward }).to_string();
    let draft = path.with_extension("json.new");
    let written = std::fs::write(&draft, text).and_then(|()| std::fs::rename(&draft, &path));
    written.map_err(file_error(spec, path))
}

fn free_port(spec: &VmSpec) -> Result<u16, StartError> {
    let bound = std::net::TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr());
    bound
        .map(|address| address.port())
        .map_err(file_error(spec, "a free TCP port of 127.0.0.1".into()))
}

async fn launch(
    hypervisor: &Hypervisor,
    spec: &VmSpec,
    forward: Option<u16>,
) -> Result<RunningVm, StartError> {
    write_spec(spec, forward)?;
    let dir = RunDir(&spec.run_dir);
    // A file and not a pipe: until QEMU has set up its log, the detached process holds it too.
    let log = std::fs::File::create(dir.launch_log()).map_err(file_error(spec, dir.launch_log()))?;
    let mut child = tokio::process::Command::new(&hypervisor.qemu)
        .args(command::arguments(spec, hypervisor.acceleration, forward))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .map_err(|source| StartError::Run {
            vm: spec.name.clone(),
            qemu: hypervisor.qemu.clone(),
            source,
        })?;
    match tokio::time::timeout(START_LIMIT, child.wait()).await {
        Ok(Ok(status)) if status.success() => RunningVm::adopt(&spec.run_dir).map_err(|_| StartError::Qemu {
            vm: spec.name.clone(),
            words: last_words(&dir),
        }),
        Ok(Ok(_)) => Err(StartError::Qemu {
            vm: spec.name.clone(),
            words: last_words(&dir),
        }),
        Ok(Err(source)) => Err(StartError::Run {
            vm: spec.name.clone(),
            qemu: hypervisor.qemu.clone(),
            source,
        }),
        Err(_) => {
            // The launcher waits for the detached process, which is in a session of its own: both have to go.
            let _ = child.kill().await;
            if let Ok(vm) = RunningVm::adopt(&spec.run_dir) {
                vm.process.kill();
                vm.process.wait_for(KILL_LIMIT).await;
            }
            let limit_ms = START_LIMIT.as_millis();
            Err(StartError::TimedOut {
                vm: spec.name.clone(),
                limit_ms,
                words: last_words(&dir),
            })
        }
    }
}

/// The end of what QEMU has said.
fn last_words(dir: &RunDir<'_>) -> String {
    let mut words = String::new();
    for path in [dir.launch_log(), dir.log()] {
        // A log that is not there has nothing to add.
        words.push_str(&String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()));
    }
    let words: Vec<&str> = words
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    let text = words.join("; ");
    let from = text.len().saturating_sub(MAX_WORDS_BYTES);
    let from = (from..text.len())
        .find(|&at| text.is_char_boundary(at))
        .unwrap_or(text.len());
    if text.is_empty() {
        "it said nothing".to_owned()
    } else {
        text[from..].to_owned()
    }
}

impl RunningVm {
    /// Finds the VM that was started in `run_dir`, by whichever process. Must be called inside a tokio runtime.
    ///
    /// A process counts as this VM's only if its command line names this very directory's pid file; so a number that has
    /// been given to somebody else, or a host that has booted since, is seen as "does not run".
    ///
    /// # Errors
    /// [`AdoptError`]: nothing there, or it has ended.
    pub fn adopt(run_dir: &Path) -> Result<Self, AdoptError> {
        let dir = RunDir(run_dir);
        let unreadable = |path: &Path| {
            let path = path.to_owned();
            |source| AdoptError::File { path, source }
        };
        let text = match std::fs::read(dir.spec()) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(AdoptError::Nothing { dir: run_dir.into() });
            }
            Err(error) => return Err(unreadable(&dir.spec())(error)),
        };
        let kept: Kept =
            serde_json::from_slice(&text).map_err(|error| unreadable(&dir.spec())(error.into()))?;
        let not_running = || AdoptError::NotRunning {
            vm: kept.spec.name.clone(),
            dir: run_dir.into(),
        };
        let pid = std::fs::read_to_string(dir.pid()).map_err(|_| not_running())?;
        let pid = pid.trim().parse().map_err(|_| not_running())?;
        // QEMU was given the path as it stands in the spec; `run_dir` may be another way to write it.
        let pid_file = RunDir(&kept.spec.run_dir).pid();
        let process = Process::open(pid, "-pidfile", &pid_file).map_err(unreadable(&dir.pid()))?;
        match process {
            Some(process) if !process.ended() => Ok(Self {
                spec: kept.spec,
                process,
                forward: kept.forward,
                pauses: Pauses::default(),
            }),
            _ => Err(not_running()),
        }
    }

    /// What was asked for.
    pub fn spec(&self) -> &VmSpec {
        &self.spec
    }

    /// QEMU's process.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// The file that QEMU writes the serial console to.
    pub fn console(&self) -> PathBuf {
        self.dir().console()
    }

    /// The host's port on 127.0.0.1 that leads to the port of [`Readiness::Port`].
    pub fn forwarded_port(&self) -> Option<u16> {
        self.forward
    }

    /// Whether QEMU has ended.
    pub fn ended(&self) -> bool {
        self.process.ended()
    }

    /// Returns once QEMU has ended.
    pub async fn wait_end(&self) {
        self.process.wait().await;
    }

    fn dir(&self) -> RunDir<'_> {
        RunDir(&self.spec.run_dir)
    }

    /// Waits until the guest is seen to be up, and resumes it as [`RunningVm::supervise`] does. Returns the line that told.
    ///
    /// # Errors
    /// [`ReadyError`]: QEMU ended, the guest panicked, or `limit` passed. The VM is left as it is.
    pub async fn wait_ready(&self, limit: Duration) -> Result<String, ReadyError> {
        let mut tail = Tail::new(self.console());
        let mut last = String::new();
        let deadline = tokio::time::sleep(limit);
        tokio::pin!(deadline);
        let supervised = self.supervise();
        tokio::pin!(supervised);
        let port = self.port_answers();
        tokio::pin!(port);
        let mut period = tokio::time::interval(CONSOLE_PERIOD);
        period.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        if self.spec.ready == Readiness::Started {
            return Ok("started".into());
        }
        let mut over = None;
        loop {
            // The console is looked at once more after the end: the line that matters may be its last.
            if let Some(verdict) = self.look(&mut tail, &mut last)? {
                return verdict;
            }
            match over {
                Some(ReadyOver::Ended) => {
                    return Err(ReadyError::Ended {
                        vm: self.spec.name.clone(),
                        words: self.words(&last),
                    });
                }
                Some(ReadyOver::TimedOut) => return Err(self.timed_out(limit, last)),
                None => {}
            }
            tokio::select! {
                () = &mut deadline => over = Some(ReadyOver::TimedOut),
                () = &mut supervised => over = Some(ReadyOver::Ended),
                answer = &mut port => return Ok(answer),
                _ = period.tick() => {}
            }
        }
    }

    /// What the console says, if it decides.
    fn look(
        &self,
        tail: &mut Tail,
        last: &mut String,
    ) -> Result<Option<Result<String, ReadyError>>, ReadyError> {
        let lines = tail.lines().map_err(|source| ReadyError::Console {
            vm: self.spec.name.clone(),
            source,
        })?;
        if let Some(line) = lines.iter().rev().find(|line| !line.trim().is_empty()) {
            last.clone_from(line);
        }
        let texts: &[String] = match &self.spec.ready {
            Readiness::Console { any_of } => any_of,
            Readiness::Port { .. } | Readiness::Started => &[],
        };
        Ok(console::verdict(&lines, texts).map(|verdict| match verdict {
            Verdict::Ready(line) => Ok(line),
            Verdict::Failed(line) => Err(ReadyError::Failed {
                vm: self.spec.name.clone(),
                line,
                console: self.console(),
            }),
        }))
    }

    fn timed_out(&self, limit: Duration, last: String) -> ReadyError {
        let limit_ms = limit.as_millis();
        ReadyError::TimedOut {
            vm: self.spec.name.clone(),
            limit_ms,
            last,
            console: self.console(),
        }
    }

    fn words(&self, last: &str) -> String {
        format!("{}; the console ends with '{last}'", last_words(&self.dir()))
    }

    /// Returns once the guest's port answers; never, where none is to be watched.
    async fn port_answers(&self) -> String {
        let (Readiness::Port { guest_port, send }, Some(port)) = (&self.spec.ready, self.forward) else {
            return std::future::pending().await;
        };
        let mut period = tokio::time::interval(PORT_PERIOD);
        period.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            period.tick().await;
            let answered = tokio::time::timeout(PORT_LIMIT, async {
                let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
                stream.write_all(send).await?;
                let mut byte = [0; 1];
                stream.read_exact(&mut byte).await
            });
            if matches!(answered.await, Ok(Ok(_))) {
                return format!("port {guest_port} answers");
            }
        }
    }

    /// What the VM is doing.
    ///
    /// # Errors
    /// [`QmpError`], while QEMU runs and does not answer.
    pub async fn state(&self) -> Result<VmState, QmpError> {
        let answer = match Qmp::ask(&self.dir().qmp(), "query-status", json!({})).await {
            Err(_) if self.ended() => return Ok(VmState::Ended),
            answer => answer?,
        };
        Ok(match answer.get("status").and_then(Value::as_str) {
            Some("running") => VmState::Running,
            Some("io-error") => VmState::DiskError,
            other => VmState::Other(other.unwrap_or("unknown").into()),
        })
    }

    /// What went through the disk since QEMU started.
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn block_stats(&self) -> Result<BlockStats, QmpError> {
        let socket = self.dir().qmp();
        let answer = Qmp::ask(&socket, "query-blockstats", json!({})).await?;
        let devices = answer.as_array().map(Vec::as_slice).unwrap_or_default();
        let disk = devices
            .iter()
            .find(|device| device.get("node-name").and_then(Value::as_str) == Some(DISK_NODE));
        match disk.and_then(|disk| disk.get("stats")) {
            Some(stats) => Ok(BlockStats::parse(stats)),
            None => Err(QmpError::Protocol {
                socket,
                found: "no statistics of the disk".into(),
            }),
        }
    }

    /// Stops the VM, going as far as it takes. The run directory stays, with the console in it.
    ///
    /// # Errors
    /// [`StopError`]: the process is there after SIGKILL.
    pub async fn stop(&self, mode: StopMode) -> Result<Stopped, StopError> {
        if self.ended() {
            return Ok(Stopped::Already);
        }
        if let StopMode::Graceful { limit } = mode
            && self.tell("system_powerdown").await
            && self.process.wait_for(limit).await
        {
            return Ok(Stopped::Guest);
        }
        if mode != StopMode::Kill && self.tell("quit").await && self.process.wait_for(QUIT_LIMIT).await {
            return Ok(Stopped::Quit);
        }
        self.process.kill();
        if self.process.wait_for(KILL_LIMIT).await {
            return Ok(Stopped::Killed);
        }
        Err(StopError::StillThere {
            vm: self.spec.name.clone(),
            pid: self.pid(),
        })
    }

    /// Whether QEMU took the command; `quit` may end it before it answers.
    async fn tell(&self, command: &str) -> bool {
        match Qmp::ask(&self.dir().qmp(), command, json!({})).await {
            Ok(_) | Err(QmpError::Io { .. }) => true,
            Err(error) => {
                tracing::warn!(vm = %self.spec.name, %error, "QEMU does not take '{command}'");
                false
            }
        }
    }
}

enum ReadyOver {
    Ended,
    TimedOut,
}

/// What `vm.json` holds.
#[derive(serde::Deserialize)]
struct Kept {
    spec: VmSpec,
    forward: Option<u16>,
}

#[cfg(test)]
mod tests;
