//! The directory in which disks' layers and manifests lie: narrow, so that a model can stand in for it in tests.

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::storage::{FileStorage, OpenMode, Storage};

/// A directory. All operations block.
pub trait Folder: Send + Sync + 'static {
    /// Opens a file.
    ///
    /// # Errors
    /// As [`FileStorage::open`].
    fn open(&self, name: &str, mode: OpenMode) -> io::Result<Arc<dyn Storage>>;

    /// Removes a file; one that is not there is removed.
    ///
    /// # Errors
    /// The operating system's.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// All of a small file; `None` where it is not there.
    ///
    /// # Errors
    /// The operating system's.
    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>>;

    /// Puts a file in the place of whatever has its name: either the old or the new one is there, whatever happens. Durable once
    /// it returns, and so are all files made before.
    ///
    /// # Errors
    /// The operating system's; which of both is there is not known then.
    fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()>;

    /// The names in it.
    ///
    /// # Errors
    /// The operating system's.
    fn names(&self) -> io::Result<Vec<String>>;

    /// Where it is in the file system, if it is there.
    fn directory(&self) -> Option<PathBuf> {
        None
    }

    /// For errors.
    fn path(&self, name: &str) -> PathBuf;
}

/// A directory of the file system.
#[derive(Debug, Clone)]
pub struct Directory {
    path: PathBuf,
}

impl Directory {
    /// The directory `path`.
    pub fn new(path: &Path) -> Self {
        Self { path: path.into() }
    }
}

/// What a file is called before it takes its place.
const NEW: &str = ".new";

impl Folder for Directory {
    fn open(&self, name: &str, mode: OpenMode) -> io::Result<Arc<dyn Storage>> {
        Ok(Arc::new(FileStorage::open(&self.path.join(name), mode)?))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        match std::fs::remove_file(self.path.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }

    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        match std::fs::read(self.path.join(name)) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let new = self.path.join(format!("{name}{NEW}"));
        let mut file = std::fs::File::create(&new)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&new, self.path.join(name))?;
        std::fs::File::open(&self.path)?.sync_all()
    }

    fn names(&self) -> io::Result<Vec<String>> {
        let entries = std::fs::read_dir(&self.path)?;
        let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
        names.collect()
    }

    fn directory(&self) -> Option<PathBuf> {
        Some(self.path.clone())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}
