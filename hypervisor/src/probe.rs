//! Finds QEMU and tries out what it can do. Nothing is believed that was not seen: `/dev/kvm` may be there and hang, or be
//! emulated itself and slower than no acceleration at all; `iscsi` is listed as a driver even where its module is missing.

use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt as _;
use tokio::time::Instant;

use crate::boot_sector;

/// Debian packages that hold QEMU and its iSCSI driver.
pub const QEMU_PACKAGES: &[&str] = &["qemu-system-x86", "qemu-block-extra"];

/// QEMU's name in PATH.
const QEMU: &str = "qemu-system-x86_64";
/// Longest wait for QEMU to print something about itself: it loads 40 MiB of libraries from a cold disk.
const ASK_LIMIT: Duration = Duration::from_secs(20);
/// Longest boot of the probe guest under TCG: it takes 0.2 s, or ten times that on a machine that does much else.
const TCG_LIMIT: Duration = Duration::from_secs(30);
/// KVM must end the probe guest within this multiple of TCG's time and [`KVM_GRACE`]. Real KVM is as fast as TCG or faster;
/// one that is emulated took 3.0 s where TCG took 0.19 s, and hung on kernels.
const KVM_FACTOR: u32 = 2;
/// Added to [`KVM_FACTOR`], for the setting-up.
const KVM_GRACE: Duration = Duration::from_millis(300);
/// Most bytes taken of what QEMU prints.
const MAX_OUTPUT_BYTES: u64 = 64 * 1024;
/// Name of the remembered result.
const CACHE_FILE: &str = "hypervisor.json";
/// Raised when the probe changes, so that old results are not believed.
const CACHE_FORMAT: u32 = 1;

/// How guests' code is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Acceleration {
    /// By the processor.
    Kvm,
    /// By translation: some 10 times slower, and it works everywhere.
    Tcg,
}

/// A QEMU that has been tried out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hypervisor {
    /// The program.
    pub qemu: PathBuf,
    /// What it calls its version.
    pub version: String,
    /// The fastest acceleration that ran the probe guest.
    pub acceleration: Acceleration,
    /// Whether it can open `iscsi://` disks.
    pub iscsi: bool,
}

/// What the probe may use.
#[derive(Debug, Clone, Default)]
pub struct ProbeOptions {
    /// QEMU's path; looked for in PATH if there is none.
    pub qemu: Option<PathBuf>,
    /// Taken as it is instead of being probed.
    pub acceleration: Option<Acceleration>,
}

/// Why there is no hypervisor.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// Not installed.
    #[error("there is no {QEMU} in PATH; on Debian: apt-get install --no-install-recommends {}", QEMU_PACKAGES.join(" "))]
    NoQemu,
    /// Installed without the iSCSI driver.
    #[error(
        "{} {version} cannot open iscsi:// disks; on Debian: apt-get install qemu-block-extra (of the same version)",
        qemu.display()
    )]
    NoIscsi {
        /// The program.
        qemu: PathBuf,
        /// Its version.
        version: String,
    },
    /// It cannot be run.
    #[error("cannot run {}", qemu.display())]
    Run {
        /// The program.
        qemu: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It runs, but no guest does.
    #[error("{} does not run the probe guest: {found}; reinstall {}", qemu.display(), QEMU_PACKAGES.join(" and "))]
    NoGuest {
        /// The program.
        qemu: PathBuf,
        /// What happened instead.
        found: String,
    },
    /// A file of the probe.
    #[error("cannot write {} for the probe of QEMU", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl Hypervisor {
    /// # Errors
    /// [`ProbeError::NoIscsi`] names the package to install.
    pub fn require_iscsi(&self) -> Result<(), ProbeError> {
        if self.iscsi {
            return Ok(());
        }
        Err(ProbeError::NoIscsi {
            qemu: self.qemu.clone(),
            version: self.version.clone(),
        })
    }
}

/// [`probe_with`], with QEMU looked for in PATH and nothing taken for granted.
///
/// # Errors
/// See [`probe_with`].
pub async fn probe(dir: &Path) -> Result<Hypervisor, ProbeError> {
    probe_with(dir, &ProbeOptions::default()).await
}

/// Finds QEMU, tries its iSCSI driver, and runs the probe guest, which takes about half a second. The result is kept in
/// `dir/hypervisor.json` and holds until the host boots again or QEMU or the access to `/dev/kvm` changes; remove the file to
/// probe again.
///
/// # Errors
/// [`ProbeError`] says what is missing and how to get it. A missing iSCSI driver is no error here, see
/// [`Hypervisor::require_iscsi`].
pub async fn probe_with(dir: &Path, options: &ProbeOptions) -> Result<Hypervisor, ProbeError> {
    let qemu = match &options.qemu {
        Some(qemu) => qemu.clone(),
        None => find_in_path(std::env::var_os("PATH").as_deref()).ok_or(ProbeError::NoQemu)?,
    };
    let key = key(&qemu);
    let cache = dir.join(CACHE_FILE);
    if let Some(mut known) = remembered(&cache, &key) {
        known.acceleration = options.acceleration.unwrap_or(known.acceleration);
        return Ok(known);
    }
    std::fs::create_dir_all(dir).map_err(|source| ProbeError::File {
        path: dir.into(),
        source,
    })?;
    let version = version(&qemu).await?;
    let iscsi = iscsi(&qemu).await?;
    let acceleration = match options.acceleration {
        Some(acceleration) => acceleration,
        None => acceleration(dir, &qemu).await?,
    };
    let found = Hypervisor {
        qemu,
        version,
        acceleration,
        iscsi,
    };
    tracing::info!(qemu = %found.qemu.display(), version = found.version, acceleration = ?found.acceleration, iscsi, "probed QEMU");
    // What was not probed is not remembered, nor is a missing driver: it may be installed a minute later.
    if options.acceleration.is_none() && iscsi {
        remember(&cache, &key, &found)?;
    }
    Ok(found)
}

fn find_in_path(path: Option<&std::ffi::OsStr>) -> Option<PathBuf> {
    std::env::split_paths(path?)
        .map(|dir| dir.join(QEMU))
        .find(|file| file.is_file())
}

/// What the result depends on, beside the probe itself.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Key {
    format: u32,
    qemu: PathBuf,
    /// Size and modification time in nanoseconds: an upgrade changes them.
    qemu_file: Option<(u64, i128)>,
    boot_id: String,
    kvm: bool,
}

#[derive(Serialize, Deserialize)]
struct Remembered {
    key: Key,
    found: Hypervisor,
}

fn key(qemu: &Path) -> Key {
    use std::os::unix::fs::MetadataExt as _;
    let file = std::fs::metadata(qemu).ok();
    Key {
        format: CACHE_FORMAT,
        qemu: qemu.into(),
        qemu_file: file.map(|f| {
            (
                f.size(),
                i128::from(f.mtime()) * 1_000_000_000 + i128::from(f.mtime_nsec()),
            )
        }),
        boot_id: std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default(),
        kvm: kvm_opens(),
    }
}

fn kvm_opens() -> bool {
    std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok()
}

/// The remembered result, if it was found under the same circumstances. Anything unreadable counts as absent.
fn remembered(cache: &Path, key: &Key) -> Option<Hypervisor> {
    let text = std::fs::read(cache).ok()?;
    let remembered: Remembered = serde_json::from_slice(&text).ok()?;
    (remembered.key == *key && !key.boot_id.is_empty()).then_some(remembered.found)
}

fn remember(cache: &Path, key: &Key, found: &Hypervisor) -> Result<(), ProbeError> {
    let text = serde_json::json!({ "key": key, "found": found }).to_string();
    // Renamed into place: two agents may share the directory.
    let draft = cache.with_extension(format!("json.{}", std::process::id()));
    let written = std::fs::write(&draft, text).and_then(|()| std::fs::rename(&draft, cache));
    written.map_err(|source| ProbeError::File {
        path: cache.into(),
        source,
    })
}

async fn version(qemu: &Path) -> Result<String, ProbeError> {
    let output = run(qemu, &["--version"], ASK_LIMIT).await?;
    let line = output.text.lines().next().unwrap_or_default();
    match line.split_once("version ") {
        Some((_, version)) if output.succeeded() => Ok(version.trim().to_owned()),
        _ => Err(ProbeError::NoGuest {
            qemu: qemu.into(),
            found: format!("'--version' printed '{line}'"),
        }),
    }
}

/// Whether the driver is there: it is made to refuse a URL, which reaches no network.
async fn iscsi(qemu: &Path) -> Result<bool, ProbeError> {
    let words = [
        "-machine",
        "none",
        "-nodefaults",
        "-display",
        "none",
        "-drive",
        "if=none,format=raw,file=iscsi://nowhere",
    ];
    let output = run(qemu, &words, ASK_LIMIT).await?;
    Ok(!output.text.contains("Unknown protocol")
        && output.text.contains("iscsi://nowhere")
        && !output.text.contains("module"))
}

async fn acceleration(dir: &Path, qemu: &Path) -> Result<Acceleration, ProbeError> {
    sweep(dir);
    let disk = dir.join(format!("probe.{}.raw", std::process::id()));
    std::fs::write(&disk, boot_sector::disk()).map_err(|source| ProbeError::File {
        path: disk.clone(),
        source,
    })?;
    let result = fastest(qemu, &disk).await;
    // A left-over of 1 MiB is no reason to fail, and the next probe of this process overwrites it, one of another removes it.
    let _ = std::fs::remove_file(&disk);
    result
}

/// Removes what a probe left whose process was killed.
fn sweep(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_str().unwrap_or_default();
        let disk = name
            .strip_prefix("probe.")
            .and_then(|rest| rest.strip_suffix(".raw"));
        let draft = name
            .strip_prefix(CACHE_FILE)
            .and_then(|rest| rest.strip_prefix('.'));
        let pid = disk.or(draft).and_then(|pid| pid.parse::<u32>().ok());
        if pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

async fn fastest(qemu: &Path, disk: &Path) -> Result<Acceleration, ProbeError> {
    let (tcg, tcg_time) = boot(qemu, disk, "tcg", TCG_LIMIT).await?;
    if let Err(found) = tcg {
        return Err(ProbeError::NoGuest {
            qemu: qemu.into(),
            found,
        });
    }
    if !kvm_opens() {
        return Ok(Acceleration::Tcg);
    }
    let limit = tcg_time * KVM_FACTOR + KVM_GRACE;
    match boot(qemu, disk, "kvm", limit).await? {
        (Ok(()), _) => Ok(Acceleration::Kvm),
        (Err(found), _) => {
            tracing::warn!(
                found,
                limit_ms = limit.as_millis(),
                tcg_ms = tcg_time.as_millis(),
                "/dev/kvm is of no use; guests are emulated"
            );
            Ok(Acceleration::Tcg)
        }
    }
}

/// Runs the probe guest; what happened instead, if it did not end as it should, and how long it took.
async fn boot(
    qemu: &Path,
    disk: &Path,
    accelerator: &str,
    limit: Duration,
) -> Result<(Result<(), String>, Duration), ProbeError> {
    let disk = serde_json::json!({ "driver": "file", "node-name": "disk", "filename": disk.to_string_lossy(), "read-only": true });
    let disk = disk.to_string();
    let words = [
        "-accel",
        accelerator,
        "-machine",
        "pc",
        "-m",
        "16",
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-serial",
        "stdio",
        "-blockdev",
        &disk,
        "-device",
        "virtio-blk-pci,drive=disk,bootindex=0",
        "-device",
        "isa-debug-exit,iobase=0xf4,iosize=4",
        "-no-reboot",
    ];
    let begin = Instant::now();
    let output = run(qemu, &words, limit).await?;
    let took = begin.elapsed();
    let status = output.status.and_then(|status| status.code());
    let result = if status == Some(boot_sector::EXIT_STATUS) && output.text.contains(boot_sector::READY) {
        Ok(())
    } else if output.status.is_none() {
        Err(format!(
            "the guest did not end within {} ms under {accelerator}",
            limit.as_millis()
        ))
    } else {
        let line = output.text.lines().next().unwrap_or_default();
        Err(format!(
            "QEMU ended with status {status:?} under {accelerator} and said '{line}'"
        ))
    };
    Ok((result, took))
}

struct Output {
    /// `None`: it was ended at the limit.
    status: Option<ExitStatus>,
    /// stdout, then stderr.
    text: String,
}

impl Output {
    fn succeeded(&self) -> bool {
        self.status.is_some_and(|status| status.success())
    }
}

/// Runs QEMU to its end or to the limit; it is gone when this returns.
async fn run(qemu: &Path, words: &[&str], limit: Duration) -> Result<Output, ProbeError> {
    let failed = |source| ProbeError::Run {
        qemu: qemu.into(),
        source,
    };
    let mut child = tokio::process::Command::new(qemu)
        .args(words)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let out = child.stdout.take();
    let err = child.stderr.take();
    let ended = tokio::time::timeout(limit, async {
        let out = async {
            match out {
                Some(pipe) => pipe.take(MAX_OUTPUT_BYTES).read_to_end(&mut stdout).await,
                None => Ok(0),
            }
        };
        let err = async {
            match err {
                Some(pipe) => pipe.take(MAX_OUTPUT_BYTES).read_to_end(&mut stderr).await,
                None => Ok(0),
            }
        };
        let (out, err, status) = tokio::join!(out, err, child.wait());
        out?;
        err?;
        status
    })
    .await;
    let status = match ended {
        Ok(status) => Some(status.map_err(failed)?),
        Err(_) => {
            child.kill().await.map_err(failed)?;
            None
        }
    };
    let mut text = String::from_utf8_lossy(&stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&stderr));
    Ok(Output { status, text })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stand-in for QEMU.
    fn program(dir: &Path, body: &str) -> PathBuf {
        let path = dir.join("qemu");
        // Written by another process: a test beside us that forks while we hold the file open for writing would make it
        // "busy" for execution.
        let status = std::process::Command::new("sh")
            .args([
                "-c",
                r#"printf '#!/bin/sh\n%s\n' "$2" > "$1" && chmod 755 "$1""#,
                "sh",
            ])
            .args([path.as_os_str(), body.as_ref()])
            .status();
        assert!(status.expect("there is a shell").success());
        path
    }

    #[test]
    fn no_qemu_names_the_packages() {
        assert_eq!(find_in_path(None), None);
        assert_eq!(find_in_path(Some("/nowhere:/proc".as_ref())), None);
        let message = ProbeError::NoQemu.to_string();
        assert!(message.contains("qemu-system-x86 qemu-block-extra"), "{message}");
    }

    #[test]
    fn what_a_killed_probe_left_is_removed_and_nothing_else() {
        let dir = tempfile::tempdir().expect("a directory");
        // Pids end at 2^22 (proc(5), `pid_max`).
        let (dead, own) = (u32::MAX, std::process::id());
        let names = [
            format!("probe.{dead}.raw"),
            format!("{CACHE_FILE}.{dead}"),
            format!("probe.{own}.raw"),
            format!("{CACHE_FILE}.{own}"),
            CACHE_FILE.to_owned(),
            "probe.disk.raw".to_owned(),
        ];
        for name in &names {
            std::fs::write(dir.path().join(name), "").expect("written");
        }
        sweep(dir.path());
        let left = names.each_ref().map(|name| dir.path().join(name).exists());
        assert_eq!(left, [false, false, true, true, true, true]);
    }

    #[tokio::test]
    async fn a_qemu_without_the_driver_is_told_by_its_package() {
        let dir = tempfile::tempdir().expect("a directory");
        let body = r#"case "$1" in --version) echo "QEMU emulator version 9.9";; *) echo "Unknown protocol 'iscsi'" >&2; exit 1;; esac"#;
        let options = ProbeOptions {
            qemu: Some(program(dir.path(), body)),
            acceleration: Some(Acceleration::Tcg),
        };
        let found = probe_with(dir.path(), &options).await.expect("probes");
        assert_eq!(found.version, "9.9");
        let message = found.require_iscsi().expect_err("no driver").to_string();
        assert!(
            message.contains("qemu-block-extra") && message.contains("9.9"),
            "{message}"
        );
        assert!(
            !dir.path().join(CACHE_FILE).exists(),
            "a missing driver must not be remembered"
        );
    }

    #[tokio::test]
    async fn a_program_that_is_not_qemu_is_an_error() {
        let dir = tempfile::tempdir().expect("a directory");
        let options = ProbeOptions {
            qemu: Some(program(dir.path(), "echo hello")),
            acceleration: None,
        };
        let error = probe_with(dir.path(), &options).await.expect_err("no QEMU");
        assert!(matches!(error, ProbeError::NoGuest { .. }), "{error}");
        let options = ProbeOptions {
            qemu: Some("/nowhere/qemu".into()),
            acceleration: None,
        };
        let error = probe_with(dir.path(), &options).await.expect_err("no QEMU");
        assert!(matches!(error, ProbeError::Run { .. }), "{error}");
    }
}
