//! bcache's sysfs files (kernel `Documentation/admin-guide/bcache.rst`).

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::Uuid;
use crate::ioctl::holders;
use crate::log::KernelLog;
use crate::{DeviceNumber, Missing};

/// What bcache does behind a written file takes milliseconds, and seconds on a host that is busy.
const SETTLES_WITHIN: Duration = Duration::from_secs(20);

/// Between two looks at a file that is to change.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// bcache, by its sysfs files.
#[derive(Debug)]
pub struct Bcache {
    sys: PathBuf,
}

/// A registered backing device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    /// The device that was registered.
    pub below: DeviceNumber,
    /// The bcache device over it, `/dev/bcacheN`.
    pub number: DeviceNumber,
    /// The set that caches it. Without one it serves everything from below.
    pub set: Option<Uuid>,
}

/// What a backing device counts, in requests since it was registered. The kernel updates these every few seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Served from the cache, wholly.
    pub hits: u64,
    /// Not.
    pub misses: u64,
    /// Reads past the cache that could have been cached.
    pub bypassed: u64,
}

/// Why bcache did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum BcacheError {
    /// The host lacks something.
    #[error(transparent)]
    Missing(#[from] Missing),
    /// A file could not be read or written.
    #[error("cannot {what} with bcache through {}{}", path.display(), because(reason))]
    File {
        /// What was to be done.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel logged.
        reason: Vec<String>,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It was asked, and did not happen in time.
    #[error("bcache did not {what} within {} s ({})", SETTLES_WITHIN.as_secs(), path.display())]
    TimedOut {
        /// What was to happen.
        what: &'static str,
        /// The file that shows it.
        path: PathBuf,
    },
    /// A device over it is in use; stopping it would fail that device's I/O.
    #[error("the bcache device {number} is in use by {}", holders.join(", "))]
    InUse {
        /// The bcache device.
        number: DeviceNumber,
        /// The devices over it.
        holders: Vec<String>,
    },
    /// There is no such backing device or set.
    #[error("bcache knows no {0}")]
    Absent(String),
}

fn because(reason: &[String]) -> String {
    if reason.is_empty() {
        String::new()
    } else {
        format!(": {}", reason.join("; "))
    }
}

impl Bcache {
    /// The kernel's bcache.
    ///
    /// # Errors
    /// [`BcacheError::Missing`] where the module is not loaded.
    pub fn new() -> Result<Self, BcacheError> {
        Self::at(Path::new("/sys"))
    }

    /// A bcache whose files are below `sys`.
    ///
    /// # Errors
    /// [`BcacheError::Missing`] where there are none.
    pub fn at(sys: &Path) -> Result<Self, BcacheError> {
        if sys.join("fs/bcache/register").exists() {
            Ok(Self { sys: sys.into() })
        } else {
            Err(Missing::Module { module: "bcache" }.into())
        }
    }

    /// Registers a device by its superblock; nothing is done where it is registered and runs. A backing device that is registered and does
    /// not run is stopped and registered again: its set was away, or whoever registered it was killed meanwhile, whereupon the kernel starts
    /// none of the threads that it needs (`kthread_create`, which a fatal signal ends) and leaves it like that.
    ///
    /// # Errors
    /// [`BcacheError::File`] with the kernel's reason.
    pub fn register(&self, number: DeviceNumber, node: &Path) -> Result<(), BcacheError> {
        if self.does_not_run(number)? {
            self.stop(number)?;
        } else if self.folder(number).exists() {
            return Ok(());
        }
        self.write(
            "register a device",
            &self.sys.join("fs/bcache/register"),
            &node.to_string_lossy(),
        )?;
        // The call has done it, where it succeeds; the device's node may still be on its way.
        self.settled("register a device", &self.folder(number), |folder| {
            folder.exists()
        })
    }

    /// Whether the set runs.
    pub fn has_set(&self, set: Uuid) -> bool {
        self.set_folder(set).exists()
    }

    /// The backing device registered over `below`.
    ///
    /// # Errors
    /// [`BcacheError::File`].
    pub fn backing(&self, below: DeviceNumber) -> Result<Option<Backing>, BcacheError> {
        let folder = self.folder(below);
        let file = folder.join("dev/dev");
        let text = match fs::read_to_string(&file) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(failed("ask for a device", &file, Vec::new(), source)),
        };
        let number = text.trim_end().parse().map_err(|()| {
            let source = io::Error::new(ErrorKind::InvalidData, format!("'{}'", text.trim_end()));
            failed("ask for a device", &file, Vec::new(), source)
        })?;
        let set = fs::read_link(folder.join("cache"))
            .ok()
            .and_then(|link| link.file_name()?.to_str()?.parse().ok());
        Ok(Some(Backing { below, number, set }))
    }

    /// Attaches a backing device to a set; nothing is done where it is.
    ///
    /// # Errors
    /// [`BcacheError`]; one reason of the kernel's is that the set has no place left for one more image.
    pub fn attach(&self, below: DeviceNumber, set: Uuid) -> Result<(), BcacheError> {
        let folder = self.folder(below);
        match self.backing(below)? {
            None => return Err(BcacheError::Absent(format!("backing device {below}"))),
            Some(backing) if backing.set == Some(set) => return Ok(()),
            Some(_) => {}
        }
        self.write("attach a device", &folder.join("attach"), &set.to_string())?;
        self.settled("attach a device", &folder.join("cache"), |link| {
            fs::read_link(link).is_ok()
        })
    }

    /// Detaches a backing device from its set for ever: what is cached of it is never read again. It goes on, uncached.
    ///
    /// # Errors
    /// [`BcacheError`].
    pub fn detach(&self, below: DeviceNumber) -> Result<(), BcacheError> {
        let folder = self.folder(below);
        if !matches!(self.backing(below)?, Some(Backing { set: Some(_), .. })) {
            return Ok(());
        }
        self.write("detach a device", &folder.join("detach"), "1")?;
        self.settled("detach a device", &folder.join("cache"), |link| {
            fs::read_link(link).is_err()
        })
    }

    /// Whether a backing device is registered without a device over it. A cache device has no file to stop it by.
    fn does_not_run(&self, below: DeviceNumber) -> Result<bool, BcacheError> {
        Ok(self.folder(below).join("stop").exists() && self.backing(below)?.is_none())
    }

    /// Stops a backing device, also one that does not run; what is cached of it is kept for when it is registered again. Nothing is done
    /// where it is not registered.
    ///
    /// # Errors
    /// [`BcacheError::InUse`]: the kernel would stop it all the same, and fail what is over it.
    pub fn stop(&self, below: DeviceNumber) -> Result<(), BcacheError> {
        let folder = self.folder(below);
        match self.backing(below)? {
            Some(Backing { number, .. }) => {
                let holders = holders(&self.sys, number);
                if !holders.is_empty() {
                    return Err(BcacheError::InUse { number, holders });
                }
            }
            None if self.does_not_run(below)? => {}
            None => return Ok(()),
        }
        self.write("stop a device", &folder.join("stop"), "1")?;
        self.settled("stop a device", &folder, |folder| !folder.exists())
    }

    /// Lets the kernel give the set up at its next I/O error, as it would by itself with its defaults. For a set that nobody reads from
    /// any more: its garbage collection goes round for ever in a tree that cannot be written (`bch_btree_gc`, 6.1), and only a set that
    /// was given up ends it. Nothing is done where the set does not run.
    ///
    /// # Errors
    /// [`BcacheError::File`].
    pub fn let_fail(&self, set: Uuid) -> Result<(), BcacheError> {
        if !self.has_set(set) {
            return Ok(());
        }
        let file = self.set_folder(set).join("io_error_limit");
        self.write("let a set fail", &file, "1")
    }

    /// Ends the set: all is written, the cache device is let go. Backing devices must be stopped before.
    ///
    /// # Errors
    /// [`BcacheError`].
    pub fn end_set(&self, set: Uuid) -> Result<(), BcacheError> {
        let folder = self.set_folder(set);
        if !folder.exists() {
            return Ok(());
        }
        self.write("end the set", &folder.join("unregister"), "1")?;
        self.settled("end the set", &folder, |folder| !folder.exists())
    }

    /// Sets what the defaults get wrong for a base.
    ///
    /// # Errors
    /// [`BcacheError::File`].
    pub fn tune(&self, below: DeviceNumber) -> Result<(), BcacheError> {
        let folder = self.folder(below);
        for (file, value) in [
            // Cache long reads too.
            ("sequential_cutoff", "0"),
            // Parents that fail are multipath's business. The default of 64 errors would stop the device for good.
            ("io_error_limit", "2147483647"),
            // A failed cache leaves the device running, uncached: there is nothing dirty.
            ("cache_mode", "writethrough"),
            ("stop_when_cache_set_failed", "auto"),
        ] {
            self.write("tune a device", &folder.join(file), value)?;
        }
        if let Some(Backing { set: Some(set), .. }) = self.backing(below)? {
            let folder = self.set_folder(set);
            for (file, value) in [
                // Cache while the cache is busy, too.
                ("congested_read_threshold_us", "0"),
                ("congested_write_threshold_us", "0"),
                // While it gives a cache up, it fails all reads. What cannot be read from the cache is read from below, so it
                // need not: whoever looks at `errors` moves the bases first.
                ("io_error_limit", "4294967295"),
            ] {
                self.write("tune a set", &folder.join(file), value)?;
            }
        }
        Ok(())
    }

    /// I/O errors of the set's cache device, since it was registered; the kernel counts to 4,095 and begins again.
    ///
    /// # Errors
    /// [`BcacheError::File`].
    pub fn errors(&self, set: Uuid) -> Result<u64, BcacheError> {
        let path = self.set_folder(set).join("cache0/io_errors");
        let text = fs::read_to_string(&path)
            .map_err(|source| failed("ask for the errors", &path, Vec::new(), source))?;
        // What is no number is not none.
        Ok(text.trim_end().parse().unwrap_or(u64::MAX))
    }

    /// What a backing device counts.
    ///
    /// # Errors
    /// [`BcacheError::File`].
    pub fn stats(&self, below: DeviceNumber) -> Result<Stats, BcacheError> {
        let folder = self.folder(below).join("stats_total");
        let read = |file: &str| {
            let path = folder.join(file);
            let text = fs::read_to_string(&path)
                .map_err(|source| failed("ask for counts", &path, Vec::new(), source))?;
            // Large counts are printed shortened ("12.3k"); what is no plain number is left at the largest.
            Ok::<u64, BcacheError>(text.trim_end().parse().unwrap_or(u64::MAX))
        };
        Ok(Stats {
            hits: read("cache_hits")?,
            misses: read("cache_misses")?,
            bypassed: read("cache_bypass_misses")?,
        })
    }

    fn folder(&self, below: DeviceNumber) -> PathBuf {
        self.sys.join("dev/block").join(below.to_string()).join("bcache")
    }

    fn set_folder(&self, set: Uuid) -> PathBuf {
        self.sys.join("fs/bcache").join(set.to_string())
    }

    fn write(&self, what: &'static str, path: &Path, value: &str) -> Result<(), BcacheError> {
        let log = KernelLog::from_now();
        fs::write(path, value).map_err(|source| failed(what, path, log.of_bcache(), source))
    }

    /// Looks at `path` until `done`; the kernel tells nobody when it is.
    fn settled(
        &self,
        what: &'static str,
        path: &Path,
        done: impl Fn(&Path) -> bool,
    ) -> Result<(), BcacheError> {
        let began = Instant::now();
        while !done(path) {
            if began.elapsed() > SETTLES_WITHIN {
                return Err(BcacheError::TimedOut {
                    what,
                    path: path.into(),
                });
            }
            pause();
        }
        Ok(())
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "between two looks at a condition with a deadline; sysfs cannot be waited on"
)]
fn pause() {
    std::thread::sleep(LOOK_EVERY);
}

fn failed(what: &'static str, path: &Path, reason: Vec<String>, source: io::Error) -> BcacheError {
    BcacheError::File {
        what,
        path: path.into(),
        reason,
        source,
    }
}
