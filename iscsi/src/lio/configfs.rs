//! LIO's tree in configfs as a handful of operations; each that changes something is a step that a test can observe.
//!
//! Directories are objects: making one makes LIO make it, removing one ends it. Deliberately absent: what the objects mean.

use std::fmt;
use std::fs;
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::error::{Act, LioError};

/// Asked before each change; `false` stops the work with [`LioError::Stopped`]. For tests that fail at every step.
pub type Observer = dyn Fn(u64, &Act, &Path) -> bool + Send + Sync;

/// How often a state that cannot announce itself is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// How long an object that LIO says is busy is tried again. Commands in flight end within the limits of what lies below:
/// multipath gives up after seconds, disks after 30 s at most; whoever still hangs then hangs for good.
const BUSY_LIMIT: Duration = Duration::from_secs(10);

/// The mount point of configfs and what happens in it.
#[derive(Clone)]
pub(super) struct Tree {
    root: PathBuf,
    observer: Option<Arc<Observer>>,
    steps: Arc<AtomicU64>,
}

impl fmt::Debug for Tree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tree({})", self.root.display())
    }
}

impl Tree {
    pub(super) fn new(root: PathBuf, observer: Option<Arc<Observer>>) -> Self {
        Self {
            root,
            observer,
            steps: Arc::default(),
        }
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// `…/target`.
    pub(super) fn target(&self) -> PathBuf {
        self.root.join("target")
    }

    /// How many changes were begun so far.
    pub(super) fn steps(&self) -> u64 {
        self.steps.load(Ordering::Relaxed)
    }

    fn step(&self, act: &Act, path: &Path) -> Result<(), LioError> {
        let step = self.steps.fetch_add(1, Ordering::Relaxed);
        match &self.observer {
            Some(observer) if !observer(step, act, path) => Err(LioError::Stopped { step }),
            _ => Ok(()),
        }
    }

    /// An attribute's text without blanks around it; `None` where there is no such attribute.
    pub(super) fn read(&self, path: &Path) -> Result<Option<String>, LioError> {
        match fs::read(path) {
            Ok(bytes) => {
                let text = String::from_utf8_lossy(&bytes);
                Ok(Some(text.trim_matches([' ', '\n', '\t', '\0']).to_owned()))
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(source) => Err(refused(Act::Read, path, source)),
        }
    }

    /// The directories in a directory, sorted; none where it is absent.
    pub(super) fn folders(&self, path: &Path) -> Result<Vec<String>, LioError> {
        self.entries(path, |kind| kind.is_dir())
    }

    /// The links in a directory, each with what it leads to; none where it is absent.
    pub(super) fn links(&self, path: &Path) -> Result<Vec<(String, PathBuf)>, LioError> {
        let names = self.entries(path, |kind| kind.is_symlink())?;
        let mut links = Vec::new();
        for name in names {
            match fs::read_link(path.join(&name)) {
                Ok(to) => links.push((name, to)),
                // Removed by somebody else in this moment.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(source) => return Err(refused(Act::Read, &path.join(&name), source)),
            }
        }
        Ok(links)
    }

    fn entries(&self, path: &Path, wanted: impl Fn(fs::FileType) -> bool) -> Result<Vec<String>, LioError> {
        let read = |source| refused(Act::Read, path, source);
        let entries = match fs::read_dir(path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(read(source)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(read)?;
            match entry.file_type() {
                Ok(kind) if wanted(kind) => names.push(entry.file_name().to_string_lossy().into_owned()),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(source) => return Err(read(source)),
            }
        }
        names.sort();
        Ok(names)
    }

    /// Makes a directory; `false` where it is there.
    pub(super) fn make(&self, path: &Path) -> Result<bool, LioError> {
        if path.is_dir() {
            return Ok(false);
        }
        self.step(&Act::Make, path)?;
        match fs::create_dir(path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
            Err(source) => Err(refused(Act::Make, path, source)),
        }
    }

    /// Writes an attribute.
    pub(super) fn write(&self, path: &Path, value: &str) -> Result<(), LioError> {
        self.write_as(path, value.as_bytes(), Act::Write(value.to_owned()))
    }

    fn write_as(&self, path: &Path, value: &[u8], act: Act) -> Result<(), LioError> {
        self.step(&act, path)?;
        write(path, value).map_err(|source| refused(act, path, source))
    }

    /// Gives an attribute this value; `false` where it has it.
    pub(super) fn set(&self, path: &Path, value: &str) -> Result<bool, LioError> {
        if self.read(path)?.is_some_and(|found| found == value) {
            return Ok(false);
        }
        self.write(path, value)?;
        Ok(true)
    }

    /// The same where not every kernel has the attribute, or not for every device.
    pub(super) fn set_where_possible(&self, path: &Path, value: &str) -> Result<bool, LioError> {
        match self.set(path, value) {
            Err(LioError::Refused {
                act: Act::Write(_),
                source,
                ..
            }) => {
                tracing::debug!(path = %path.display(), value, %source, "LIO does not take this attribute");
                Ok(false)
            }
            other => other,
        }
    }

    /// Gives an attribute a value that must not be printed; `false` where it has it.
    pub(super) fn set_secret(&self, path: &Path, value: &[u8]) -> Result<bool, LioError> {
        if self.holds(path, value)? {
            return Ok(false);
        }
        self.write_as(path, value, Act::WriteSecret)?;
        Ok(true)
    }

    /// Does the attribute hold this value?
    pub(super) fn holds(&self, path: &Path, value: &[u8]) -> Result<bool, LioError> {
        match fs::read(path) {
            // The kernel ends what it shows with a line's end, where there is anything.
            Ok(found) => Ok(found.strip_suffix(b"\n").unwrap_or(&found) == value),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(source) => Err(refused(Act::Read, path, source)),
        }
    }

    /// Links `to` at `path`.
    pub(super) fn link(&self, to: &Path, path: &Path) -> Result<(), LioError> {
        let act = Act::Link(to.to_path_buf());
        self.step(&act, path)?;
        symlink(to, path).map_err(|source| refused(act, path, source))
    }

    /// Removes a link; it may be gone.
    pub(super) fn unlink(&self, path: &Path) -> Result<(), LioError> {
        self.step(&Act::Unlink, path)?;
        match fs::remove_file(path) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(source) => Err(refused(Act::Unlink, path, source)),
        }
    }

    /// Removes a directory that may be gone. While LIO says that it is busy it is tried again, up to [`BUSY_LIMIT`].
    pub(super) fn remove(&self, path: &Path) -> Result<(), LioError> {
        if !path.exists() {
            return Ok(());
        }
        self.step(&Act::Remove, path)?;
        let mut last = None;
        let done = wait_until(BUSY_LIMIT, || match fs::remove_dir(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Some(Ok(())),
            Err(error) if error.kind() == ErrorKind::ResourceBusy => {
                last = Some(error);
                None
            }
            other => Some(other),
        });
        match (done, last) {
            (Some(done), _) => done.map_err(|source| refused(Act::Remove, path, source)),
            (None, _) => Err(LioError::Busy {
                path: path.to_path_buf(),
                waited: BUSY_LIMIT,
            }),
        }
    }

    /// Removes a directory if nothing is in it.
    pub(super) fn remove_if_empty(&self, path: &Path) -> Result<(), LioError> {
        if !path.is_dir() || !self.folders(path)?.is_empty() {
            return Ok(());
        }
        self.step(&Act::Remove, path)?;
        match fs::remove_dir(path) {
            Ok(()) => Ok(()),
            // Gone, or used again by somebody else in this moment.
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::NotFound | ErrorKind::DirectoryNotEmpty | ErrorKind::ResourceBusy
                ) =>
            {
                Ok(())
            }
            Err(source) => Err(refused(Act::Remove, path, source)),
        }
    }
}

/// One call of write(2), as configfs wants it.
fn write(path: &Path, value: &[u8]) -> io::Result<()> {
    let mut file = fs::File::create(path)?;
    let written = file.write(value)?;
    if written == value.len() {
        Ok(())
    } else {
        Err(io::Error::new(
            ErrorKind::WriteZero,
            format!("the kernel took {written} of {} bytes", value.len()),
        ))
    }
}

pub(super) fn refused(act: Act, path: &Path, source: io::Error) -> LioError {
    let path = path.to_path_buf();
    let unprivileged = matches!(
        source.kind(),
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem
    ) && !rustix::process::geteuid().is_root();
    if unprivileged {
        LioError::NoRight { act, path, source }
    } else {
        LioError::Refused { act, path, source }
    }
}

/// Looks until there is a value, for at most `limit`. Neither configfs nor sysfs can be waited on.
pub(crate) fn wait_until<T>(limit: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + limit;
    loop {
        if let Some(found) = look() {
            return Some(found);
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return None;
        }
        std::thread::park_timeout(left.min(LOOK_EVERY));
    }
}
