//! The file in which a unit's persistent reservations outlive a loss of power (SPC-4 §5.13.5).
//!
//! It is replaced as a whole: a new file beside it, made durable, then renamed over it, then the directory made
//! durable. A crash between any two of these leaves the old file or the new one.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use crate::scsi::kept::MAX_KEPT_BYTES;
use crate::scsi::reservation::Keeper;

/// Why a file cannot hold reservations.
#[derive(Debug, thiserror::Error)]
pub enum ReservationFileError {
    /// The operating system says no.
    #[error("the reservations in '{}' cannot be {doing}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried: "read" or the like.
        doing: &'static str,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// Another process has them.
    #[error("the reservations in '{}' are in use by another process, which must end first", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// Not text, or longer than ours ever are.
    #[error("'{}' does not hold reservations", path.display())]
    NotText {
        /// The file.
        path: PathBuf,
    },
}

/// A file for the reservations of one unit, which this process alone has.
#[derive(Debug)]
pub struct ReservationFile {
    path: PathBuf,
    /// What it held when it was opened.
    text: Option<String>,
    /// Held for as long as we live; it lies beside the file, because the file itself is replaced.
    lock: File,
}

impl Drop for ReservationFile {
    fn drop(&mut self) {
        // Closing is not enough: a process that is being started somewhere in this one has the descriptor, and with it the
        // lock, until it becomes its program.
        let _ = rustix::fs::flock(&self.lock, rustix::fs::FlockOperation::Unlock);
    }
}

fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(ending);
    path.with_file_name(name)
}

fn directory(path: &Path) -> &Path {
    path.parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

impl ReservationFile {
    /// Opens it, whether it exists or not; its directory must.
    ///
    /// # Errors
    /// [`ReservationFileError`]. What the text says is looked at when a target gets it.
    pub fn open(path: &Path) -> Result<Self, ReservationFileError> {
        let failed = |doing| {
            let path = path.to_owned();
            move |source| ReservationFileError::Io { path, doing, source }
        };
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(beside(path, ".lock"))
            .map_err(failed("locked"))?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).map_err(|error| {
            match error {
                rustix::io::Errno::WOULDBLOCK => ReservationFileError::InUse {
                    path: path.to_owned(),
                },
                other => failed("locked")(other.into()),
            }
        })?;
        let text = match File::open(path) {
            Ok(file) => {
                let mut bytes = Vec::new();
                file.take(MAX_KEPT_BYTES + 1)
                    .read_to_end(&mut bytes)
                    .map_err(failed("read"))?;
                let text = String::from_utf8(bytes).ok();
                let text = text.filter(|text| text.len() as u64 <= MAX_KEPT_BYTES);
                Some(text.ok_or_else(|| ReservationFileError::NotText {
                    path: path.to_owned(),
                })?)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(failed("read")(error)),
        };
        Ok(Self {
            path: path.to_owned(),
            text,
            lock,
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn take_text(&mut self) -> Option<String> {
        self.text.take()
    }

    /// Replaces the file; `step` is told before each step and may end the work there, as a crash would.
    fn replace(&self, text: &str, mut step: impl FnMut(u32) -> io::Result<()>) -> io::Result<()> {
        let new = beside(&self.path, ".new");
        step(0)?;
        let mut file = File::create(&new)?;
        step(1)?;
        let (half, rest) = text.as_bytes().split_at(text.len() / 2);
        file.write_all(half)?;
        step(2)?;
        file.write_all(rest)?;
        step(3)?;
        file.sync_all()?;
        step(4)?;
        std::fs::rename(&new, &self.path)?;
        step(5)?;
        File::open(directory(&self.path))?.sync_all()
    }
}

impl Keeper for ReservationFile {
    fn keep(&self, text: &str) -> io::Result<()> {
        self.replace(text, |_| Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEPS: u32 = 6;

    #[test]
    fn a_crash_at_any_step_leaves_the_old_or_the_new() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.reservations");
        for before in [None, Some("the old")] {
            for crash in 0..STEPS {
                let _ = std::fs::remove_file(&path);
                if let Some(old) = before {
                    std::fs::write(&path, old).unwrap();
                }
                let file = ReservationFile::open(&path).unwrap();
                let crashed = file.replace("the new", |step| match step == crash {
                    true => Err(io::Error::other("crash")),
                    false => Ok(()),
                });
                assert!(crashed.is_err());
                drop(file);
                let mut file = ReservationFile::open(&path).unwrap();
                let found = file.take_text();
                let expected = if crash == STEPS - 1 {
                    Some("the new")
                } else {
                    before
                };
                assert_eq!(found.as_deref(), expected, "crash before step {crash}");
                // What the crash left is in nobody's way.
                file.keep("the newest").unwrap();
                drop(file);
                let text = ReservationFile::open(&path).unwrap().take_text();
                assert_eq!(text.as_deref(), Some("the newest"));
            }
        }
    }

    #[test]
    fn what_cannot_be_had_is_an_error_that_names_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("r");
        let first = ReservationFile::open(&path).unwrap();
        let second = ReservationFile::open(&path).unwrap_err();
        assert!(matches!(second, ReservationFileError::InUse { .. }), "{second}");
        drop(first);
        std::fs::write(&path, [0xff; 10]).unwrap();
        let error = ReservationFile::open(&path).unwrap_err();
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        let nowhere = folder.path().join("absent/r");
        assert!(matches!(
            ReservationFile::open(&nowhere),
            Err(ReservationFileError::Io { .. })
        ));
    }
}
