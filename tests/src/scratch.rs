//! A folder whose processes, mounts and namespaces end with it: when it is dropped, on a panic, on Ctrl-C, and, after a kill -9 of
//! this program, when the next one starts.
//!
//! Processes are known by a mark in their environment, which a daemon's own children inherit (QEMU outlives its agent), so nothing
//! that somebody else started can be met.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Once;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use parking_lot::Mutex;

/// The mark: this variable holds the folder to which a process belongs.
pub const MARK: &str = "TREEBOOT_SCRATCH";

/// Start of every folder's name; short, because a Unix socket's path has at most 107 bytes.
const PREFIX: &str = "treeboot-";

/// The file that holds the pid and the start of whoever ends the folder.
const OWNER: &str = "owner";

/// How long killed processes may take to be gone: the kernel frees a guest's memory first.
const GONE_WITHIN: Duration = Duration::from_secs(10);

/// When a folder of which it cannot be told whether its owner lives is removed all the same.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(24 * 3600);

/// Folders of this process that are not yet ended.
static LIVE: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// The folder.
#[derive(Debug)]
pub struct Scratch {
    folder: PathBuf,
    evidence: PathBuf,
    passed: bool,
}

impl Scratch {
    /// Makes a folder, after ending what earlier programs left behind.
    ///
    /// `evidence` is where logs are copied to when it is dropped without [`Scratch::pass`].
    ///
    /// # Errors
    /// The temporary folder cannot be written.
    pub fn new(evidence: PathBuf) -> Result<Self> {
        sweep();
        watch_signals();
        let folder = tempfile::Builder::new()
            .prefix(PREFIX)
            .tempdir()
            .context("could not make a temporary folder")?
            .keep();
        Self::own(folder, evidence)
    }

    /// As [`Scratch::new`], in a folder of the caller's choice that is not there yet and that nobody's sweep ends:
    /// [`end_left`] does, once it is left.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn in_folder(folder: &Path, evidence: PathBuf) -> Result<Self> {
        watch_signals();
        if let Some(above) = folder.parent() {
            fs::create_dir_all(above)?;
        }
        fs::create_dir(folder).with_context(|| format!("could not make {}", folder.display()))?;
        Self::own(folder.to_path_buf(), evidence)
    }

    fn own(folder: PathBuf, evidence: PathBuf) -> Result<Self> {
        LIVE.lock().push(folder.clone());
        let scratch = Self {
            folder,
            evidence,
            passed: false,
        };
        let own = std::process::id();
        fs::write(
            scratch.folder.join(OWNER),
            format!("{own} {} {}", started(own).unwrap_or(0), namespace_of_pids()),
        )?;
        Ok(scratch)
    }

    /// The folder itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.folder
    }

    /// A command whose process belongs to the folder. It has a process group of its own, so that Ctrl-C reaches us alone and the
    /// end has an order.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        use std::os::unix::process::CommandExt as _;
        let mut command = Command::new(program);
        command
            .env(MARK, &self.folder)
            .process_group(0)
            .stdin(std::process::Stdio::null());
        command
    }

    /// Notes a network namespace before it is made, to be deleted at the end.
    ///
    /// # Errors
    /// The note cannot be written.
    pub fn own_namespace(&self, name: &str) -> Result<()> {
        let mut file = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.folder.join("namespaces"))?;
        writeln!(file, "{name}")?;
        Ok(())
    }

    /// Ends everything; no evidence is needed.
    pub fn pass(mut self) {
        self.passed = true;
    }

    /// Lets everything in it run on, without an owner: [`end_left`] ends it.
    pub fn leave(self) {
        let _ = fs::remove_file(self.folder.join(OWNER));
        LIVE.lock().retain(|folder| *folder != self.folder);
        std::mem::forget(self);
    }

    /// Copies logs and consoles to where they outlive the folder; gives that place.
    ///
    /// # Errors
    /// They cannot be written there.
    pub fn keep_evidence(&self) -> Result<PathBuf> {
        // What an earlier failure left would only mislead.
        let _ = fs::remove_dir_all(&self.evidence);
        keep_logs(&self.folder, &self.folder, &self.evidence)
            .with_context(|| format!("the logs could not be kept in {}", self.evidence.display()))?;
        Ok(self.evidence.clone())
    }

    /// Pids of the living processes that belong here.
    #[must_use]
    pub fn processes(&self) -> Vec<Pid> {
        processes_of(&self.folder)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !self.passed {
            match self.keep_evidence() {
                Ok(evidence) => eprintln!("the logs are kept in {}", evidence.display()),
                Err(error) => eprintln!("{error:#}"),
            }
        }
        end(&self.folder);
        LIVE.lock().retain(|folder| *folder != self.folder);
    }
}

/// Ends what programs left that did not live to do it themselves.
fn sweep() {
    static SWEPT: Once = Once::new();
    SWEPT.call_once(|| {
        let Ok(entries) = fs::read_dir(std::env::temp_dir()) else {
            return;
        };
        for entry in entries.flatten() {
            let folder = entry.path();
            if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
                continue;
            }
            if let Some(Owner { alive: false, .. }) = owner(&folder) {
                end(&folder);
            }
        }
    });
}

/// Ends a folder that was left ([`Scratch::leave`]), or whose owner did not live to end it.
///
/// # Errors
/// Its owner lives.
pub fn end_left(folder: &Path) -> Result<()> {
    if let Some(Owner { pid, alive: true }) = owner(folder) {
        bail!(
            "{} is process {pid}'s, which is at work there; end that one first",
            folder.display()
        );
    }
    end(folder);
    if folder.exists() {
        bail!("{} could not be removed", folder.display());
    }
    Ok(())
}

struct Owner {
    pid: u32,
    alive: bool,
}

/// Whose folder it is, where it is anybody's.
fn owner(folder: &Path) -> Option<Owner> {
    let text = fs::read_to_string(folder.join(OWNER)).ok()?;
    let mut words = text.split_whitespace();
    let pid = words.next()?.parse().ok()?;
    let start: u64 = words.next()?.parse().ok()?;
    // Pids of another namespace say nothing here: a run in a container that shares this folder may well go on.
    let elsewhere = words
        .next()
        .and_then(|namespace| namespace.parse::<u64>().ok())
        .is_some_and(|namespace| namespace != namespace_of_pids());
    Some(Owner {
        pid,
        alive: started(pid) == Some(start) || (elsewhere && !is_old(folder)),
    })
}

/// On Ctrl-C, a termination or the terminal's end: everything is ended and removed, then this process too.
fn watch_signals() {
    static WATCHING: Once = Once::new();
    WATCHING.call_once(|| {
        std::thread::spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime without I/O of its own can be built");
            runtime.block_on(async {
                use tokio::signal::unix::{SignalKind, signal};
                let mut signals = [
                    SignalKind::interrupt(),
                    SignalKind::terminate(),
                    SignalKind::hangup(),
                ]
                .map(|kind| signal(kind).expect("a signal that can be caught"));
                let [interrupt, terminate, hangup] = &mut signals;
                let code = tokio::select! {
                    _ = interrupt.recv() => 130,
                    _ = terminate.recv() => 143,
                    _ = hangup.recv() => 129,
                };
                // Held to the end, so that nothing new begins meanwhile.
                let live = LIVE.lock();
                for folder in live.iter() {
                    end(folder);
                }
                eprintln!("\ninterrupted: all processes ended, all files removed");
                // The threads under test cannot be unwound from here, and what destructors would do is done.
                #[allow(clippy::disallowed_methods)]
                std::process::exit(code);
            });
        });
    });
}

/// The namespace in which our pids mean something, by its inode.
fn namespace_of_pids() -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    fs::metadata("/proc/self/ns/pid").map_or(0, |namespace| namespace.ino())
}

/// No run takes as long as it has been there.
fn is_old(folder: &Path) -> bool {
    let made = fs::metadata(folder).and_then(|folder| folder.modified());
    made.is_ok_and(|made| made.elapsed().is_ok_and(|age| age > FORGOTTEN_AFTER))
}

/// When a process started, in ticks since boot: with the pid, its identity (proc(5), `stat`, field 22).
fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name, which may hold blanks and brackets.
    let (_, rest) = stat.rsplit_once(") ")?;
    rest.split(' ').nth(19)?.parse().ok()
}

fn processes_of(folder: &Path) -> Vec<Pid> {
    use std::os::unix::ffi::OsStrExt as _;
    let mut mark = format!("{MARK}=").into_bytes();
    mark.extend_from_slice(folder.as_os_str().as_bytes());
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            // Empty for a process that has ended and is not yet reaped.
            let environment = fs::read(entry.path().join("environ")).ok()?;
            let marked = environment
                .split(|byte| *byte == 0)
                .any(|variable| variable == mark);
            (marked && pid.unsigned_abs() != std::process::id()).then_some(Pid::from_raw(pid))
        })
        .collect()
}

fn end(folder: &Path) {
    let began = Instant::now();
    // Again and again: an agent may start a guest between our look and its end.
    loop {
        let processes = processes_of(folder);
        if processes.is_empty() {
            break;
        }
        for pid in processes {
            // Gone in the meantime is as good.
            let _ = kill(pid, Signal::SIGKILL);
        }
        if began.elapsed() > GONE_WITHIN {
            eprintln!("some processes of {} do not end", folder.display());
            break;
        }
        std::thread::park_timeout(Duration::from_millis(5));
    }
    unmount_below(folder);
    if let Ok(namespaces) = fs::read_to_string(folder.join("namespaces")) {
        for namespace in namespaces.lines() {
            let _ = Command::new("ip")
                .args(["netns", "delete", namespace])
                .stderr(std::process::Stdio::null())
                .status();
        }
    }
    if let Err(error) = fs::remove_dir_all(folder)
        && folder.exists()
    {
        eprintln!("could not remove {}: {error}", folder.display());
    }
}

fn unmount_below(folder: &Path) {
    let Ok(mounts) = fs::read_to_string("/proc/self/mounts") else {
        return;
    };
    let below = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
        .filter(|point| Path::new(point).starts_with(folder));
    for point in below {
        // Lazily: a killed process gives its memory back, by which we know it, a moment before its files.
        let _ = Command::new("umount").args(["--lazy", point]).status();
    }
}

/// Copies what is small and telling: logs, consoles and ready files, not caches.
fn keep_logs(folder: &Path, root: &Path, evidence: &Path) -> std::io::Result<()> {
    const TELLING: &[&str] = &["log", "txt", "json", "console"];
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            keep_logs(&path, root, evidence)?;
            continue;
        }
        let name = entry.file_name().to_string_lossy().into_owned();
        let telling = TELLING.iter().any(|end| name.ends_with(end)) || name.contains("console");
        if telling && entry.file_type()?.is_file() {
            let relative = path.strip_prefix(root).unwrap_or(&path);
            let to = evidence.join(relative);
            if let Some(above) = to.parent() {
                fs::create_dir_all(above)?;
            }
            fs::copy(&path, &to)?;
        }
    }
    Ok(())
}
