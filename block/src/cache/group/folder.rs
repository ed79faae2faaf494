//! A member's place: a directory with one folder an image.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use treeboot_types::Digest;

use crate::cache::{DATA_FILE, HASH_FILE, PRESENT_FILE};
use crate::storage::{FileStorage, OpenMode, Storage};

/// The file that is made, and removed, to learn whether a directory can be written and gives space back.
const PROBE_FILE: &str = ".treeboot-probe";

/// What a member holds of one image, opened.
pub struct MemberImage {
    /// The image's chunks.
    pub data: Arc<dyn Storage>,
    /// Its hash tree.
    pub hash: Arc<dyn Storage>,
    /// What of the two is there.
    pub present: Arc<dyn Storage>,
}

/// Room in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemberRoom {
    /// That may still be written.
    pub free_bytes: u64,
    /// In all.
    pub size_bytes: u64,
}

/// Where a member's files are. Everything here may block.
pub trait MemberFiles: Send + Sync + 'static {
    /// The directory, for people.
    fn path(&self) -> &Path;

    /// Opens an image's files, and makes them where asked to; `None` where they are not there.
    ///
    /// # Errors
    /// The operating system's; [`io::ErrorKind::WouldBlock`] where another process has them.
    fn open(&self, digest: &Digest, create: bool) -> io::Result<Option<MemberImage>>;

    /// Removes an image's files; none is fine.
    ///
    /// # Errors
    /// The operating system's.
    fn remove(&self, digest: &Digest) -> io::Result<()>;

    /// Which images have files.
    ///
    /// # Errors
    /// The operating system's.
    fn images(&self) -> io::Result<Vec<Digest>>;

    /// How much room is left.
    ///
    /// # Errors
    /// The directory is no longer what it was.
    fn room(&self) -> io::Result<MemberRoom>;

    /// When an image was last used, in milliseconds of Unix time; 0 where that is not known.
    fn last_use(&self, digest: &Digest) -> u64;

    /// Notes when an image was last used. A hint: nobody is told where it cannot be kept.
    fn note_use(&self, digest: &Digest, unix_ms: u64);
}

/// A directory of the file system.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    /// Device and inode: what is mounted over it, or put in its place, is another directory.
    identity: (u64, u64),
}

impl Folder {
    /// The directory at `path`, which is made where it is missing.
    ///
    /// # Errors
    /// It cannot be made or written. [`io::ErrorKind::Unsupported`]: its file system cannot give back the space of a part of
    /// a file, and that is what `evicts` asks for.
    pub fn open(path: &Path, evicts: bool) -> io::Result<Self> {
        std::fs::create_dir_all(path)?;
        let probe = path.join(PROBE_FILE);
        let file = FileStorage::open(&probe, OpenMode::Create)?;
        let probed = file.write_at(0, &[1; 4096]).and_then(|()| file.punch(0, 4096));
        std::fs::remove_file(&probe)?;
        match probed {
            Err(error) if !evicts && error.kind() == io::ErrorKind::Unsupported => {}
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                let reason = "its file system cannot give back the space of a part of a file, so it can have no budget";
                return Err(io::Error::new(io::ErrorKind::Unsupported, reason));
            }
            // A full one can be a member: what is in it can be read, and room may come.
            Err(error) if crate::storage::is_full(&error) => {}
            other => other?,
        }
        let found = std::fs::metadata(path)?;
        Ok(Self {
            path: path.into(),
            identity: (found.dev(), found.ino()),
        })
    }

    fn folder(&self, digest: &Digest) -> PathBuf {
        self.path.join(digest.to_string())
    }
}

impl MemberFiles for Folder {
    fn path(&self) -> &Path {
        &self.path
    }

    fn open(&self, digest: &Digest, create: bool) -> io::Result<Option<MemberImage>> {
        let folder = self.folder(digest);
        match create {
            true => std::fs::create_dir_all(&folder)?,
            false if !folder.join(PRESENT_FILE).try_exists()? => return Ok(None),
            false => {}
        }
        let open = |name| -> io::Result<Arc<dyn Storage>> {
            Ok(Arc::new(FileStorage::open(&folder.join(name), OpenMode::Create)?))
        };
        Ok(Some(MemberImage {
            data: open(DATA_FILE)?,
            hash: open(HASH_FILE)?,
            present: open(PRESENT_FILE)?,
        }))
    }

    fn remove(&self, digest: &Digest) -> io::Result<()> {
        match std::fs::remove_dir_all(self.folder(digest)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    fn images(&self) -> io::Result<Vec<Digest>> {
        let mut found = vec![];
        for entry in std::fs::read_dir(&self.path)? {
            found.extend(entry?.file_name().to_string_lossy().parse::<Digest>().ok());
        }
        found.sort_unstable();
        Ok(found)
    }

    fn room(&self) -> io::Result<MemberRoom> {
        let found = std::fs::metadata(&self.path)?;
        if (found.dev(), found.ino()) != self.identity {
            return Err(io::Error::other("another directory is in its place"));
        }
        let room = rustix::fs::statvfs(&self.path)?;
        Ok(MemberRoom {
            free_bytes: room.f_bavail.saturating_mul(room.f_frsize),
            size_bytes: room.f_blocks.saturating_mul(room.f_frsize),
        })
    }

    fn last_use(&self, digest: &Digest) -> u64 {
        let changed =
            std::fs::metadata(self.folder(digest).join(PRESENT_FILE)).and_then(|found| found.modified());
        let since = changed.ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        since.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
    }

    fn note_use(&self, digest: &Digest, unix_ms: u64) {
        let time: Option<SystemTime> = UNIX_EPOCH.checked_add(Duration::from_millis(unix_ms));
        let file = std::fs::File::open(self.folder(digest).join(PRESENT_FILE));
        if let (Ok(file), Some(time)) = (file, time) {
            let _only_a_hint = file.set_modified(time);
        }
    }
}
