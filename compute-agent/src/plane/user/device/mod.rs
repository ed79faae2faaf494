//! Disks as block devices of the host: a loop device over a FUSE file that this process serves.
//!
//! The file is its own file system's root, mounted on an empty file `STATE/devices/VM`, so that there is no name to look up and nothing else in it. The
//! connection behind it is held by the holder too (`crate::holder`): while no agent serves it, reads and writes wait, and the next one goes on with
//! it. Everything here but [`serve`] blocks, on threads that may.

mod keep;
mod mount;
mod serve;
mod wire;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use treeboot_block::BlockDevice;
use treeboot_dm::loops::{self, LoopDevice, LoopError};
use treeboot_types::VmName;

use super::failed;
use super::files::{blocking, gone, names};
use crate::holder::Holder;
use crate::plane::{PlaneError, links};
use crate::stack::FoundDevice;
use keep::Keeping;
use serve::Serving;

/// The folder of the mount points in the state directory.
const FOLDER: &str = "devices";
/// Whoever looks at every new device, as udev does, lets go after milliseconds.
const LETS_GO_WITHIN: Duration = Duration::from_secs(5);
/// The pause between two looks at that.
const PAUSE: Duration = Duration::from_millis(5);

/// The devices of one agent.
pub(super) struct Devices {
    folder: PathBuf,
    holder: Holder,
    serving: Served,
    keeping: Arc<Keeping>,
}

/// The disks that this agent serves as devices.
type Served = Arc<Mutex<BTreeMap<VmName, Arc<Serving>>>>;

impl Devices {
    /// `state` is the agent's state directory. Nothing is looked at or made yet.
    pub(super) fn new(state: &Path) -> Self {
        let (holder, serving) = (Holder::new(state), Served::default());
        Self {
            folder: state.join(FOLDER),
            keeping: Arc::new(Keeping::new(holder.clone(), Arc::clone(&serving))),
            holder,
            serving,
        }
    }

    /// Makes a disk a device, or goes on with the one that waits.
    pub(super) async fn attach(&self, vm: &VmName, disk: Arc<dyn BlockDevice>) -> Result<(), PlaneError> {
        if self.serves(vm) {
            return Ok(());
        }
        let place = self.place(vm);
        let block_bytes = disk.geometry().block_bytes;
        let (connection, taken_over) = blocking(move || place.connect()).await?;
        let serving = Serving::start(connection, disk, vm.to_string(), taken_over)
            .map_err(|error| PlaneError::io(format!("serving the device of VM '{vm}'"), error))?;
        self.serving.lock().insert(vm.clone(), Arc::new(serving));
        self.keeping.watch();
        let place = self.place(vm);
        let made = blocking(move || place.make_device(block_bytes)).await;
        if let Err(cause) = made {
            return Err(match self.detach(vm).await {
                Ok(()) => cause,
                Err(undo) => PlaneError::Undo {
                    cause: Box::new(cause),
                    undo: Box::new(undo),
                },
            });
        }
        Ok(())
    }

    /// Takes a device away, whatever there is of it.
    pub(super) async fn detach(&self, vm: &VmName) -> Result<(), PlaneError> {
        let (place, serves) = (self.place(vm), self.serves(vm));
        // Its pages are written while it is still served.
        blocking(move || place.remove_device(serves)).await?;
        let serving = self.serving.lock().remove(vm);
        if let Some(serving) = serving {
            serving.end().await;
        }
        let place = self.place(vm);
        let _not_held_again = self.keeping.pause().await;
        blocking(move || place.disconnect()).await
    }

    /// The agent ends: what waits then waits for the next one.
    pub(super) async fn close(&self) {
        let all: Vec<_> = std::mem::take(&mut *self.serving.lock()).into_values().collect();
        futures_util::future::join_all(all.iter().map(|serving| serving.end())).await;
    }

    fn serves(&self, vm: &VmName) -> bool {
        self.serving.lock().contains_key(vm)
    }

    fn place(&self, vm: &VmName) -> Place {
        Place {
            vm: vm.clone(),
            file: self.folder.join(vm.as_str()),
            holder: self.holder.clone(),
        }
    }

    /// The stable name of a device that works.
    pub(super) fn path(&self, vm: &VmName) -> Option<PathBuf> {
        self.serves(vm).then(|| links::path(vm))
    }

    /// What there is. Blocks.
    pub(super) fn look(
        &self,
    ) -> impl FnOnce(Option<&VmName>) -> std::io::Result<BTreeMap<VmName, FoundDevice>> + use<> {
        let (folder, serving) = (self.folder.clone(), Arc::clone(&self.serving));
        move |only| {
            // Names alone: asking a file whose agent is gone for its size would wait for an answer.
            let vms: Vec<VmName> = names(&folder)?
                .iter()
                .filter_map(|name| VmName::new(name).ok())
                .collect();
            let serving = serving.lock();
            let state = |vm: &VmName| match serving.contains_key(vm) && links::target(vm).is_some() {
                true => FoundDevice::Whole,
                false => FoundDevice::Parts,
            };
            let wanted = vms.into_iter().filter(|vm| only.is_none_or(|only| only == vm));
            Ok(wanted.map(|vm| (vm.clone(), state(&vm))).collect())
        }
    }
}

/// One device's place on the host.
struct Place {
    vm: VmName,
    /// The mount point.
    file: PathBuf,
    holder: Holder,
}

impl Place {
    fn io(&self, what: &'static str) -> impl Fn(std::io::Error) -> PlaneError {
        let what = format!("{what} the device of VM '{}' at {}", self.vm, self.file.display());
        move |error| PlaneError::io(what.clone(), error)
    }

    /// The connection that waits, or a new one.
    fn connect(&self) -> Result<(OwnedFd, bool), PlaneError> {
        let mounted = mount::is_mounted(&self.file).map_err(self.io("looking for"))?;
        if mounted {
            let held = self
                .holder
                .held()
                .map_err(self.io("taking over"))?
                .remove(self.vm.as_str());
            if let Some(connection) = held {
                return Ok((connection, true));
            }
        }
        // What the agent or the holder left when it died between two steps, or both did: nobody answers there any more.
        self.remove_device(false)?;
        self.disconnect()?;
        if let Some(folder) = self.file.parent() {
            std::fs::create_dir_all(folder).map_err(self.io("making"))?;
        }
        std::fs::File::create(&self.file).map_err(self.io("making"))?;
        let connection = mount::mount(&self.file, self.vm.as_str())
            .map_err(|error| unfit(error).unwrap_or_else(|error| self.io("mounting")(error)))?;
        if let Err(cause) = self.holder.put(self.vm.as_str(), &connection) {
            let cause = self.io("handing to the holder")(cause);
            drop(connection);
            self.disconnect()?;
            return Err(cause);
        }
        Ok((connection, false))
    }

    /// The loop device over the file, and its name.
    fn make_device(&self, block_bytes: u32) -> Result<(), PlaneError> {
        let device = match self.loop_device()? {
            Some(there) => there,
            None => loops::attach_in_blocks(&self.file, treeboot_dm::Mode::ReadWrite, block_bytes)
                .map_err(loop_error)?,
        };
        links::set(&self.vm, &device.path)
    }

    /// Ours are known by their mark and by the file, which is asked for no further: an agent that died may serve it no more.
    fn loop_device(&self) -> Result<Option<LoopDevice>, PlaneError> {
        let folder = self.file.parent().and_then(|folder| folder.canonicalize().ok());
        let Some(file) = folder.map(|folder| folder.join(self.vm.as_str())) else {
            return Ok(None);
        };
        let all = match loops::list() {
            Ok(all) => all,
            Err(LoopError::Missing(_)) => Vec::new(),
            Err(error) => return Err(loop_error(error)),
        };
        Ok(all.into_iter().find(|device| device.file == file))
    }

    /// Takes loop device and name away. `served`: its pages can be written.
    fn remove_device(&self, served: bool) -> Result<(), PlaneError> {
        let Some(device) = self.loop_device()? else {
            return links::remove(&self.vm, None);
        };
        if mount::is_held(&device.path) {
            return Err(PlaneError::Unfit {
                what: format!("the end of the device of VM '{}'", self.vm),
                why: format!(
                    "{} is in use on this host; unmount it, or close what has it open",
                    links::path(&self.vm).display()
                ),
            });
        }
        if !served {
            // Or its pages would wait for ever.
            mount::abort(&self.file).map_err(self.io("ending"))?;
        }
        links::remove(&self.vm, Some(&device.path))?;
        let began = Instant::now();
        while loops::detach(&device).map_err(loop_error)? && began.elapsed() < LETS_GO_WITHIN {
            pause();
        }
        Ok(())
    }

    /// Takes mount and connection away.
    fn disconnect(&self) -> Result<(), PlaneError> {
        mount::unmount(&self.file).map_err(self.io("unmounting"))?;
        self.holder
            .drop_one(self.vm.as_str())
            .map_err(self.io("letting go of"))?;
        gone(std::fs::remove_file(&self.file)).map_err(self.io("removing"))
    }
}

/// What lacks on this host, in words; else the error again.
fn unfit(error: std::io::Error) -> Result<PlaneError, std::io::Error> {
    let why = match error.kind() {
        std::io::ErrorKind::PermissionDenied => {
            "a block device needs root (CAP_SYS_ADMIN); run the agent as root"
        }
        std::io::ErrorKind::NotFound => "there is no /dev/fuse; type: modprobe fuse",
        _ => return Err(error),
    };
    Ok(PlaneError::Unfit {
        what: "a block device".into(),
        why: format!("{why}, or use the disk's iscsi:// URL"),
    })
}

fn loop_error(error: LoopError) -> PlaneError {
    match error {
        LoopError::Missing(missing) => PlaneError::Unfit {
            what: "a block device".into(),
            why: missing.to_string(),
        },
        other => failed("a loop device".into(), other),
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "between two looks at a condition with a deadline; the driver tells nobody"
)]
fn pause() {
    std::thread::sleep(PAUSE);
}
