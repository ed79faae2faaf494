//! Formats that are not read here: `qemu-img` converts them into a sparse raw file that lives as long as the import.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde::Deserialize;
use tempfile::TempDir;
use tokio::process::Command;

use super::ImportError;
use crate::output::printable;

/// The converted file's name inside the scratch directory.
pub(super) const CONVERTED: &str = "disk.raw";

/// What is looked at of `qemu-img info --output=json`.
#[derive(Debug, Deserialize)]
struct Info {
    #[serde(rename = "backing-filename")]
    backing: Option<String>,
    #[serde(default)]
    encrypted: bool,
}

/// Where large temporary files go: `TMPDIR`, and else the directory that outlives a restart and is a disk's, not
/// memory's (FHS 3.0 §5.15).
pub(crate) fn default_scratch() -> PathBuf {
    std::env::var_os("TMPDIR")
        .filter(|dir| !dir.is_empty())
        .map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from)
}

/// Converts `path`, which QEMU's `driver` reads, into `CONVERTED` of a new directory under `scratch`.
///
/// The driver is always named, so that content never chooses another one. Dropping the future ends the program and
/// removes the directory.
pub(super) async fn convert(
    path: &Path,
    driver: &str,
    what: &str,
    scratch: &Path,
) -> Result<TempDir, ImportError> {
    // An absolute path begins with a slash, so QEMU does not take what stands before a colon for a protocol.
    let absolute = std::fs::canonicalize(path).map_err(|source| ImportError::Io {
        doing: "open",
        path: path.into(),
        source,
    })?;
    let missing = || ImportError::NoQemuImg {
        path: path.into(),
        what: what.to_owned(),
    };
    let failed = |why: String| ImportError::QemuImg {
        path: path.into(),
        why,
    };
    let info = run(
        Command::new("qemu-img")
            .args(["info", "--output=json", "-f", driver])
            .arg(&absolute),
        &missing,
        &failed,
    )
    .await?;
    let info: Info =
        serde_json::from_slice(&info).map_err(|error| failed(format!("its answer is not valid: {error}")))?;
    if let Some(backing) = info.backing {
        return Err(ImportError::Backing {
            path: path.into(),
            backing: printable(&backing),
        });
    }
    if info.encrypted {
        return Err(failed("it is encrypted".into()));
    }
    let dir = tempfile::Builder::new()
        .prefix("treeboot-import-")
        .tempdir_in(scratch)
        .map_err(|source| ImportError::Io {
            doing: "make a temporary directory in",
            path: scratch.into(),
            source,
        })?;
    eprintln!(
        "converting '{}' ({what}) with qemu-img into {}",
        path.display(),
        dir.path().display()
    );
    let mut command = Command::new("qemu-img");
    command
        .args(["convert", "-f", driver, "-O", "raw", "-S", "4k"])
        .arg(&absolute)
        .arg(dir.path().join(CONVERTED));
    run(&mut command, &missing, &failed).await?;
    Ok(dir)
}

async fn run(
    command: &mut Command,
    missing: &impl Fn() -> ImportError,
    failed: &impl Fn(String) -> ImportError,
) -> Result<Vec<u8>, ImportError> {
    let output = command
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|error| {
            if error.kind() == std::io::ErrorKind::NotFound {
                missing()
            } else {
                failed(error.to_string())
            }
        })?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    let last = errors
        .lines()
        .rfind(|line| !line.trim().is_empty())
        .unwrap_or("it gave no reason");
    Err(failed(printable(last.trim_start_matches("qemu-img: "))))
}
