//! The busybox guest of `cargo xtask guest build busybox`: up in seconds, and it does small jobs that a test asks for
//! (`docs/guests.md`).

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use treeboot_proto::v1;

use crate::fleet::Order;

/// Names the guest's disk image; `cargo xtask test` sets it.
pub const BUSYBOX: &str = "TREEBOOT_GUEST_BUSYBOX";

/// What it prints when it is up.
pub const UP: &str = " is up, boot ";
/// What it prints when all that was asked of it is done.
pub const JOBS_DONE: &str = " jobs done";
/// What it and Linux print when a disk does not do as it should.
const WRONG: &[&str] = &["io error", "I/O error", "Kernel panic", "EXT4-fs error"];

/// A boot takes 3 s of one core under emulation; a machine of two cores may have eight of them to do, and a build besides.
const LIMIT: Duration = Duration::from_secs(120);
/// It lives in 64 MiB.
const MEMORY_MIB: u32 = 96;

/// The guest's disk image; where it is not built, the test that needs it is skipped, or fails in CI.
///
/// # Panics
/// It is not built, and the environment says that this is CI (`CI` is set).
#[must_use]
pub fn busybox() -> Option<PathBuf> {
    let found = std::env::var_os(BUSYBOX)
        .map(PathBuf::from)
        .or_else(newest_built)
        .filter(|file| file.is_file());
    if found.is_none() {
        let reason = "no busybox guest (cargo xtask guest build busybox)";
        assert!(
            std::env::var_os("CI").is_none(),
            "CI lacks what a test needs: {reason}"
        );
        println!("SKIPPED: {reason}");
    }
    found
}

fn newest_built() -> Option<PathBuf> {
    let own = std::env::current_exe().ok()?;
    let target = own.ancestors().find(|folder| folder.ends_with("target"))?;
    let built = std::fs::read_dir(target.join("guest")).ok()?.flatten();
    built
        .filter(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            name.starts_with("busybox-") && name.ends_with(".raw")
        })
        .max_by_key(|entry| entry.metadata().and_then(|file| file.modified()).ok())
        .map(|entry| entry.path())
}

/// A VM of the guest that is ready when it is up.
#[must_use]
pub fn order(vm: &str, image: &str) -> Order {
    Order {
        vm: vm.to_owned(),
        image: image.to_owned(),
        ready_line: UP.into(),
        limit: LIMIT,
        memory_mib: MEMORY_MIB,
        user_data: String::new(),
    }
}

/// A VM of the guest that is ready when it has done these jobs, `key=value` each.
#[must_use]
pub fn order_with_jobs(vm: &str, image: &str, jobs: &[&str]) -> Order {
    Order {
        ready_line: JOBS_DONE.into(),
        user_data: jobs.join("\n"),
        ..order(vm, image)
    }
}

/// What a VM printed so far.
///
/// # Errors
/// The console cannot be read.
pub fn console(vm: &v1::Vm) -> Result<String> {
    let bytes = std::fs::read(Path::new(&vm.console_path))
        .with_context(|| format!("no console of {} at {}", vm.name, vm.console_path))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Checks that neither the hypervisor nor the guest met an error of its disk.
///
/// # Errors
/// One did; the error holds its line.
pub fn check_no_errors(vm: &v1::Vm) -> Result<()> {
    if vm.io_errors > 0 {
        bail!(
            "{}: the hypervisor counted {} errors of its disk",
            vm.name,
            vm.io_errors
        );
    }
    let console = console(vm)?;
    let wrong = console
        .lines()
        .find(|line| WRONG.iter().any(|words| line.contains(words)));
    match wrong {
        Some(line) => bail!("{}: {line}", vm.name),
        None => Ok(()),
    }
}
