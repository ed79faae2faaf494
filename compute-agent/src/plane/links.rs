//! The stable names of block devices: symbolic links `/dev/treeboot/VM`.
//!
//! The folder is one for all agents of a machine, so a name that leads to somebody else's device is left alone.

use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use treeboot_types::VmName;

use super::PlaneError;

/// Where the links are. A machine's `/dev` is empty again after a restart, as its devices are.
const FOLDER: &str = "/dev/treeboot";

/// The link of a VM.
pub(in crate::plane) fn path(vm: &VmName) -> PathBuf {
    Path::new(FOLDER).join(vm.as_str())
}

/// Where it leads, if it is there.
pub(in crate::plane) fn target(vm: &VmName) -> Option<PathBuf> {
    std::fs::read_link(path(vm)).ok()
}

/// All links, with where they lead.
#[cfg_attr(
    not(feature = "kernel-plane"),
    expect(dead_code, reason = "the user plane's devices are files of its own, too")
)]
pub(in crate::plane) fn all() -> Vec<(VmName, PathBuf)> {
    let Ok(entries) = std::fs::read_dir(FOLDER) else {
        return Vec::new();
    };
    let link = |entry: std::fs::DirEntry| {
        let vm = VmName::new(entry.file_name().to_str()?).ok()?;
        Some((vm, std::fs::read_link(entry.path()).ok()?))
    };
    entries.flatten().filter_map(link).collect()
}

/// Makes the link. One that leads to another device that is there is left.
pub(in crate::plane) fn set(vm: &VmName, to: &Path) -> Result<(), PlaneError> {
    let path = path(vm);
    let io = |error| PlaneError::io(format!("making {}", path.display()), error);
    match target(vm) {
        Some(there) if there == to => return Ok(()),
        Some(there) if there.exists() => {
            return Err(PlaneError::Unfit {
                what: path.display().to_string(),
                why: format!(
                    "it leads to {}, of another agent on this machine; give the VM another name, or destroy that one",
                    there.display()
                ),
            });
        }
        _ => {}
    }
    std::fs::create_dir_all(FOLDER).map_err(io)?;
    let new = Path::new(FOLDER).join(format!(".{vm}.new"));
    gone(std::fs::remove_file(&new)).map_err(io)?;
    symlink(to, &new)
        .and_then(|()| std::fs::rename(&new, &path))
        .map_err(io)
}

/// Takes the link away, where it leads to `to`, or to nothing.
pub(in crate::plane) fn remove(vm: &VmName, to: Option<&Path>) -> Result<(), PlaneError> {
    let path = path(vm);
    match target(vm) {
        Some(there) if Some(there.as_path()) == to || !there.exists() => {}
        _ => return Ok(()),
    }
    gone(std::fs::remove_file(&path))
        .map_err(|error| PlaneError::io(format!("removing {}", path.display()), error))
}

fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
