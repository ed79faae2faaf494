//! File operations, on threads that may wait.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use treeboot_block::{CacheError, ChunkCache};

use super::failed;
use crate::plane::PlaneError;

/// How long a base that was just closed may hold its files: its owner task ends on its own.
const CLOSING_LIMIT: Duration = Duration::from_secs(2);
/// The pause between two looks at that.
const CLOSING_PAUSE: Duration = Duration::from_millis(2);

/// Opens a cache. One that was closed a moment ago may still hold its files.
pub(super) async fn open_cache(
    dir: PathBuf,
    open: impl Fn(&Path) -> Result<Arc<ChunkCache>, CacheError> + Clone + Send + 'static,
) -> Result<Arc<ChunkCache>, PlaneError> {
    let deadline = tokio::time::Instant::now() + CLOSING_LIMIT;
    loop {
        let (at, open) = (dir.clone(), open.clone());
        let opened = blocking(move || Ok(open(&at))).await?;
        match opened {
            Ok(cache) => return Ok(cache),
            Err(CacheError::InUse { .. }) if tokio::time::Instant::now() < deadline => {
                tokio::time::sleep(CLOSING_PAUSE).await;
            }
            Err(CacheError::Io { path, source }) => {
                return Err(PlaneError::io(format!("opening {}", path.display()), source));
            }
            Err(error @ (CacheError::Incomplete { .. } | CacheError::OtherImage { .. })) => {
                return Err(PlaneError::Damaged {
                    what: dir.display().to_string(),
                    why: error.to_string(),
                });
            }
            Err(error) => return Err(failed(format!("opening {}", dir.display()), error)),
        }
    }
}

/// What is not there is gone, as was wanted.
pub(super) fn gone(result: std::io::Result<()>) -> std::io::Result<()> {
    match result {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

pub(super) async fn remove_dir(dir: PathBuf) -> Result<(), PlaneError> {
    blocking(move || {
        let what = || format!("removing {}", dir.display());
        gone(std::fs::remove_dir_all(&dir)).map_err(|error| PlaneError::io(what(), error))
    })
    .await
}

/// File operations on a thread that may wait.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, PlaneError> + Send + 'static,
) -> Result<T, PlaneError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(failed("a file operation".into(), error)),
    }
}

/// Names in a directory; none where it is not there.
pub(super) fn names(dir: &Path) -> std::io::Result<Vec<String>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    names.collect()
}
