//! Mounting a FUSE file system that is one file, without a helper program: needs CAP_SYS_ADMIN.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, umount2};

/// A type of our own, by which a mount of ours is known.
const TYPE: &str = "fuse.treeboot";

/// Mounts on the file; gives the connection, whose reads do not wait.
pub(super) fn mount(file: &Path, vm: &str) -> io::Result<OwnedFd> {
    let connection = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open("/dev/fuse")?;
    // The root is a regular file.
    let options = format!(
        "fd={},rootmode=100600,user_id=0,group_id=0",
        connection.as_raw_fd()
    );
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
    nix::mount::mount(Some(vm), file, Some(TYPE), flags, Some(options.as_str()))?;
    Ok(connection.into())
}

/// Whether a file system of ours is mounted there. It is not touched: its agent may be gone.
pub(super) fn is_mounted(file: &Path) -> io::Result<bool> {
    let Some(folder) = file.parent().and_then(|folder| folder.canonicalize().ok()) else {
        return Ok(false);
    };
    let file = folder.join(file.file_name().unwrap_or_default());
    // proc(5): the fifth field is the mount point, with octal escapes for spaces; the type comes behind a dash.
    let text = std::fs::read_to_string("/proc/self/mountinfo")?;
    Ok(text.lines().any(|line| {
        let (fields, kind) = line.split_once(" - ").unwrap_or_default();
        let at = fields.split(' ').nth(4).map(unescaped);
        kind.split(' ').next() == Some(TYPE) && at.as_deref().map(Path::new) == Some(&file)
    }))
}

/// proc(5) writes space, tab, newline and backslash as three octal digits.
fn unescaped(text: &str) -> String {
    let mut out = text.to_owned();
    for (escape, plain) in [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")] {
        out = out.replace(escape, plain);
    }
    out
}

/// Whether somebody holds the device for himself: a mounted file system, device-mapper.
pub(super) fn is_held(device: &Path) -> bool {
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_EXCL)
        .open(device);
    matches!(opened, Err(error) if error.raw_os_error() == Some(Errno::EBUSY as i32))
}

/// Ends the connection: whatever waits for an answer fails. The mount stays while somebody has the file open, and with it the name by which a loop
/// device over it is known.
pub(super) fn abort(file: &Path) -> io::Result<()> {
    if !is_mounted(file)? {
        return Ok(());
    }
    match end(file, MntFlags::MNT_FORCE) {
        Err(error) if error.raw_os_error() == Some(Errno::EBUSY as i32) => Ok(()),
        other => other,
    }
}

/// Unmounts, if anything of ours is mounted.
pub(super) fn unmount(file: &Path) -> io::Result<()> {
    while is_mounted(file)? {
        end(file, MntFlags::MNT_DETACH)?;
    }
    Ok(())
}

fn end(file: &Path, flags: MntFlags) -> io::Result<()> {
    match umount2(file, flags) {
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
