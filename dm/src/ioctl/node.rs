//! `/dev/mapper/NAME` on hosts without udev (the lab's guests, some appliances). Where udev runs, the nodes are its own.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::{DeviceNumber, DmDevice};

pub(super) fn path(device: &DmDevice) -> PathBuf {
    Path::new("/dev/mapper").join(device.to_string())
}

fn udev_runs() -> bool {
    Path::new("/run/udev/control").exists()
}

/// Makes the node point at the device, as udev would. A failure shows when somebody opens the node, by its name.
pub(super) fn ensure(device: &DmDevice, number: DeviceNumber) {
    if udev_runs() {
        return;
    }
    let (path, target) = (path(device), PathBuf::from(format!("../dm-{}", number.minor)));
    if fs::read_link(&path).is_ok_and(|found| found == target) {
        return;
    }
    match fs::remove_file(&path) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(_) => return,
    }
    let _ = symlink(target, path);
}

/// Removes the node where it is one of ours.
pub(super) fn remove(device: &DmDevice) {
    let path = path(device);
    if !udev_runs() && fs::read_link(&path).is_ok() {
        let _ = fs::remove_file(path);
    }
}
