//! The ioctls: devices are made, changed, asked and removed as values of this crate.
//!
//! Three rules, each because its opposite has left hosts with I/O that hangs:
//! - A table is loaded before anything stops. A refused table leaves the old one running.
//! - Old and new table change places in **one** call: a resume with a table waiting suspends, swaps and resumes by itself. So
//!   a process that is killed leaves the device with either table, and never suspended.
//! - Whoever does not have both our name and our UUID is not touched.

mod error;
mod node;

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use devicemapper::{DM, DevId, DeviceInfo, DmFlags, DmName, DmOptions, DmUuid};

use crate::log::KernelLog;
use crate::status::StatusLine;
use crate::{DeviceNumber, DmDevice, Line, Missing, Mode, Sectors, Status, Table};
pub use error::{MapperError, Refusal};
use error::{errno, missing_module, refused_late};

const CONTROL: &str = "/dev/mapper/control";

/// Neither a file system's freeze nor a flush of what is queued is needed to swap tables that map the same content, and
/// both can wait for a device that is waiting for the swap.
const SWAP: DmFlags = DmFlags::DM_NOFLUSH.union(DmFlags::DM_SKIP_LOCKFS);

/// The kernel's device-mapper.
pub struct Mapper {
    dm: DM,
}

/// What was done to reach a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The device was made.
    Created,
    /// It was there with another table.
    Reloaded,
    /// It was there with this table.
    Identity,
}

/// A device of ours that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Which.
    pub device: DmDevice,
    /// Its number.
    pub number: DeviceNumber,
    /// How often it is open: by devices over it, mounts, programs.
    pub open_count: u32,
    /// Its I/O waits.
    pub suspended: bool,
    /// It maps something. A half-made device does not.
    pub mapped: bool,
    /// A table is loaded that is not used yet.
    pub waiting_table: bool,
    /// It is read-only.
    pub read_only: bool,
}

impl Mapper {
    /// Opens device-mapper's control node.
    ///
    /// # Errors
    /// [`MapperError::Missing`] without root or the module; [`MapperError::Control`] for anything else.
    pub fn new() -> Result<Self, MapperError> {
        // Opened here once before, because the crate's error does not keep the reason.
        File::open(CONTROL).map_err(|error| match error.kind() {
            io::ErrorKind::PermissionDenied => MapperError::Missing(Missing::Root { path: CONTROL.into() }),
            io::ErrorKind::NotFound => MapperError::Missing(Missing::Module { module: "dm-mod" }),
            _ => match error.raw_os_error().map(rustix::io::Errno::from_raw_os_error) {
                Some(rustix::io::Errno::NODEV | rustix::io::Errno::NXIO) => {
                    MapperError::Missing(Missing::Module { module: "dm-mod" })
                }
                _ => MapperError::Control(error),
            },
        })?;
        let dm = DM::new().map_err(|error| MapperError::Control(errno(error)))?;
        Ok(Self { dm })
    }

    /// All devices of ours. Those of others, and those that only look like ours, are left out.
    ///
    /// # Errors
    /// [`MapperError::List`].
    pub fn list(&self) -> Result<Vec<Seen>, MapperError> {
        let names = self
            .dm
            .list_devices()
            .map_err(|error| MapperError::List(errno(error)))?;
        let mut seen = Vec::new();
        for (name, _, _) in names {
            let Ok(device) = name.to_string().parse::<DmDevice>() else {
                continue;
            };
            match self.find(&device) {
                Ok(Some(found)) => seen.push(found),
                Ok(None) | Err(MapperError::Stranger { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(seen)
    }

    /// The device, where it is there and ours.
    ///
    /// # Errors
    /// [`MapperError::Stranger`] where it has our name and is not ours; [`MapperError::Ioctl`].
    pub fn find(&self, device: &DmDevice) -> Result<Option<Seen>, MapperError> {
        let name = device.to_string();
        let info = match self.dm.device_info(&id(&name)) {
            Ok(info) => info,
            Err(error) => {
                let source = errno(error);
                return if is(&source, rustix::io::Errno::NXIO) {
                    Ok(None)
                } else {
                    Err(failed("ask for", device, Vec::new(), source))
                };
            }
        };
        let uuid = info.uuid().map(ToString::to_string);
        if DmDevice::recognise(&name, uuid.as_deref()).is_err() {
            return Err(MapperError::Stranger {
                device: device.clone(),
                uuid,
            });
        }
        Ok(Some(Seen::new(device, &info)))
    }

    /// The device's number; `None` where it is not there.
    ///
    /// # Errors
    /// As [`Self::find`].
    pub fn number(&self, device: &DmDevice) -> Result<Option<DeviceNumber>, MapperError> {
        Ok(self.find(device)?.map(|seen| seen.number))
    }

    /// The node by which programs open it: `/dev/mapper/NAME`. Where no udev runs, [`Self::ensure`] makes it.
    pub fn path(device: &DmDevice) -> PathBuf {
        node::path(device)
    }

    /// What the device maps; `None` where it is not there or maps nothing.
    ///
    /// # Errors
    /// [`MapperError::Table`] where it is none that this crate makes; as [`Self::find`].
    pub fn table(&self, device: &DmDevice) -> Result<Option<Table>, MapperError> {
        let lines = self.raw(device, DmFlags::DM_STATUS_TABLE)?;
        if lines.is_empty() {
            return Ok(None);
        }
        let text: Vec<String> = lines.iter().map(raw_line).collect();
        text.join("\n")
            .parse()
            .map(Some)
            .map_err(|source| MapperError::Table {
                device: device.clone(),
                source,
            })
    }

    /// What the device's targets report; empty where it is not there or maps nothing. Flushes nothing.
    ///
    /// # Errors
    /// [`MapperError::Status`]; as [`Self::find`].
    pub fn status(&self, device: &DmDevice) -> Result<Vec<StatusLine>, MapperError> {
        self.raw(device, DmFlags::DM_NOFLUSH)?
            .into_iter()
            .map(|(start, length, kind, text)| {
                Ok(StatusLine {
                    start: Sectors(start),
                    length: Sectors(length),
                    status: Status::parse(&kind, &text).map_err(|source| MapperError::Status {
                        device: device.clone(),
                        source,
                    })?,
                })
            })
            .collect()
    }

    /// The devices that its table uses, each once.
    ///
    /// # Errors
    /// [`MapperError::Absent`]; as [`Self::find`].
    pub fn deps(&self, device: &DmDevice) -> Result<Vec<DeviceNumber>, MapperError> {
        let name = self.own(device)?;
        let deps = self
            .dm
            .table_deps(&id(&name), DmOptions::default())
            .map_err(|error| failed("ask for the parts of", device, Vec::new(), errno(error)))?;
        Ok(deps.into_iter().map(number).collect())
    }

    /// Makes the device map `table`, whatever it is now; nothing is done where it does already.
    ///
    /// # Errors
    /// [`MapperError::Refused`]: the old table, if any, goes on. [`MapperError::Undo`]: it could not be made to.
    pub fn ensure(&self, device: &DmDevice, table: &Table, mode: Mode) -> Result<Outcome, MapperError> {
        let Some(seen) = self.find(device)? else {
            return self.create(device, table, mode);
        };
        let current = if seen.mapped {
            // A table that is not understood is not the one that is wanted.
            self.table(device).ok().flatten()
        } else {
            None
        };
        let same = seen.read_only == (mode == Mode::ReadOnly)
            && current.is_some_and(|current| current.same_mapping(table));
        if same {
            if seen.waiting_table {
                self.forget_waiting(device)?;
            }
            if seen.suspended {
                self.resume(device)?;
            }
            node::ensure(device, seen.number);
            return Ok(Outcome::Identity);
        }
        self.replace(device, &seen, table, mode)?;
        node::ensure(device, seen.number);
        Ok(Outcome::Reloaded)
    }

    /// Loads the table that a device has once more, for targets that look at what is below them only then.
    ///
    /// # Errors
    /// As [`Self::ensure`]; [`MapperError::Absent`].
    pub fn reload(&self, device: &DmDevice, table: &Table, mode: Mode) -> Result<(), MapperError> {
        let Some(seen) = self.find(device)? else {
            return Err(MapperError::Absent {
                device: device.clone(),
            });
        };
        self.replace(device, &seen, table, mode)
    }

    fn replace(&self, device: &DmDevice, seen: &Seen, table: &Table, mode: Mode) -> Result<(), MapperError> {
        let old = self.raw(device, DmFlags::DM_STATUS_TABLE)?;
        self.load(device, seen.number, table, mode)?;
        if let Err(first) = self.resume(device) {
            let first = refused_late(table, first);
            let old_mode = if seen.read_only {
                Mode::ReadOnly
            } else {
                Mode::ReadWrite
            };
            return Err(self.back_to(device, seen.number, &old, old_mode, first));
        }
        Ok(())
    }

    /// Stops the device's I/O until [`Self::resume`]: what is in flight is waited for, what comes waits.
    ///
    /// # Errors
    /// [`MapperError::Absent`], [`MapperError::Ioctl`]; as [`Self::find`].
    pub fn suspend(&self, device: &DmDevice) -> Result<(), MapperError> {
        let name = self.own(device)?;
        let flags = SWAP | DmFlags::DM_SUSPEND;
        self.dm
            .device_suspend(&id(&name), DmOptions::default().set_flags(flags))
            .map(drop)
            .map_err(|error| failed("suspend", device, Vec::new(), errno(error)))
    }

    /// Lets I/O go on, with the loaded table where one is waiting.
    ///
    /// # Errors
    /// [`MapperError::Absent`], [`MapperError::Ioctl`]; as [`Self::find`].
    pub fn resume(&self, device: &DmDevice) -> Result<(), MapperError> {
        let name = self.own(device)?;
        let log = KernelLog::from_now();
        self.dm
            .device_suspend(&id(&name), DmOptions::default().set_flags(SWAP))
            .map(drop)
            .map_err(|error| {
                let kinds = ["table", "cache", "snapshots", "multipath", "switch", "verity"];
                failed("resume", device, log.about(None, &kinds), errno(error))
            })
    }

    /// Removes the device; `false` where it was not there. Waits up to 0.8 s for whoever looks at it in passing.
    ///
    /// # Errors
    /// [`MapperError::InUse`]; as [`Self::find`].
    pub fn remove(&self, device: &DmDevice) -> Result<bool, MapperError> {
        let Some(seen) = self.find(device)? else {
            return Ok(false);
        };
        let name = device.to_string();
        match self.dm.device_remove(&id(&name), DmOptions::default()) {
            Ok(_) => {
                node::remove(device);
                Ok(true)
            }
            Err(error) => {
                let source = errno(error);
                if is(&source, rustix::io::Errno::NXIO) {
                    return Ok(false);
                }
                if !is(&source, rustix::io::Errno::BUSY) {
                    return Err(failed("remove", device, Vec::new(), source));
                }
                Err(MapperError::InUse {
                    device: device.clone(),
                    number: seen.number,
                    open_count: self.find(device)?.map_or(seen.open_count, |now| now.open_count),
                    holders: holders(Path::new("/sys"), seen.number),
                })
            }
        }
    }

    /// Sends a message to the target at `sector`; gives its answer, where it has one.
    ///
    /// # Errors
    /// [`MapperError::Absent`], [`MapperError::Ioctl`]; as [`Self::find`].
    pub fn message(
        &self,
        device: &DmDevice,
        sector: Sectors,
        text: &str,
    ) -> Result<Option<String>, MapperError> {
        let name = self.own(device)?;
        let log = KernelLog::from_now();
        self.dm
            .target_msg(&id(&name), Some(sector.0), text)
            .map(|(_, answer)| answer)
            .map_err(|error| {
                let kinds = ["table", "cache", "snapshots", "multipath", "switch", "verity"];
                failed("send a message to", device, log.about(None, &kinds), errno(error))
            })
    }

    fn create(&self, device: &DmDevice, table: &Table, mode: Mode) -> Result<Outcome, MapperError> {
        let (name, uuid) = (device.to_string(), device.uuid());
        let info = self
            .dm
            .device_create(dm_name(&name), Some(dm_uuid(&uuid)), options(mode))
            .map_err(|error| failed("make", device, Vec::new(), errno(error)))?;
        let number = number(info.device());
        let made = self
            .load(device, number, table, mode)
            .and_then(|()| self.resume(device).map_err(|error| refused_late(table, error)));
        match made {
            Ok(()) => {
                node::ensure(device, number);
                Ok(Outcome::Created)
            }
            Err(first) => match self.remove(device) {
                Ok(_) => Err(first),
                Err(source) => Err(MapperError::Undo {
                    first: first.into(),
                    left: "without a table",
                    source: source.into(),
                }),
            },
        }
    }

    fn load(
        &self,
        device: &DmDevice,
        number: DeviceNumber,
        table: &Table,
        mode: Mode,
    ) -> Result<(), MapperError> {
        let lines: Vec<_> = table.lines().iter().map(|line| raw(line, line.start)).collect();
        let Err((source, reason)) = self.try_load(device, number, &lines, mode) else {
            return Ok(());
        };
        // The kernel does not say which line. Each one alone does, read as the whole of the device.
        let mut refusal = Refusal { line: None, reason };
        if let [line] = table.lines() {
            refusal.line = Some(line.to_string());
        } else {
            for line in table.lines() {
                if let Err((_, reason)) = self.try_load(device, number, &[raw(line, Sectors(0))], mode) {
                    refusal = Refusal {
                        line: Some(line.to_string()),
                        reason,
                    };
                    break;
                }
            }
            self.forget_waiting(device)?;
        }
        if let Some(missing) = missing_module(table, &refusal.reason) {
            return Err(missing.into());
        }
        Err(MapperError::Refused {
            device: device.clone(),
            refusal,
            source,
        })
    }

    fn try_load(
        &self,
        device: &DmDevice,
        number: DeviceNumber,
        lines: &[RawLine],
        mode: Mode,
    ) -> Result<(), (io::Error, Vec<String>)> {
        let name = device.to_string();
        let log = KernelLog::from_now();
        self.dm
            .table_load(&id(&name), lines, options(mode))
            .map(drop)
            .map_err(|error| {
                let mut kinds: Vec<&str> = lines.iter().map(|(_, _, kind, _)| kind.as_str()).collect();
                kinds.push("snapshots");
                kinds.dedup();
                (errno(error), log.about(Some(number), &kinds))
            })
    }

    /// After a resume that failed: lets I/O go on, with the old table, and says whether that could be done.
    fn back_to(
        &self,
        device: &DmDevice,
        number: DeviceNumber,
        old: &[RawLine],
        mode: Mode,
        first: MapperError,
    ) -> MapperError {
        match self.find(device) {
            Ok(Some(seen)) if !seen.suspended => return first,
            _ => {}
        }
        // The kernel swaps tables before it resumes, so either of the two may be the one that waits.
        let again = self.resume(device).or_else(|source| {
            if old.is_empty() || self.try_load(device, number, old, mode).is_err() {
                return Err(source);
            }
            self.resume(device)
        });
        match again {
            Ok(()) => first,
            Err(source) => MapperError::Undo {
                first: first.into(),
                left: "suspended",
                source: source.into(),
            },
        }
    }

    fn forget_waiting(&self, device: &DmDevice) -> Result<(), MapperError> {
        let name = device.to_string();
        self.dm
            .table_clear(&id(&name))
            .map(drop)
            .map_err(|error| failed("clear the waiting table of", device, Vec::new(), errno(error)))
    }

    fn raw(&self, device: &DmDevice, flags: DmFlags) -> Result<Vec<RawLine>, MapperError> {
        if self.find(device)?.is_none() {
            return Ok(Vec::new());
        }
        let name = device.to_string();
        match self
            .dm
            .table_status(&id(&name), DmOptions::default().set_flags(flags))
        {
            Ok((_, lines)) => Ok(lines),
            Err(error) => {
                let source = errno(error);
                if is(&source, rustix::io::Errno::NXIO) {
                    Ok(Vec::new())
                } else {
                    Err(failed("ask for the table of", device, Vec::new(), source))
                }
            }
        }
    }

    /// The device's name, where it is there and ours.
    fn own(&self, device: &DmDevice) -> Result<String, MapperError> {
        match self.find(device)? {
            Some(_) => Ok(device.to_string()),
            None => Err(MapperError::Absent {
                device: device.clone(),
            }),
        }
    }
}

impl std::fmt::Debug for Mapper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mapper").finish_non_exhaustive()
    }
}

impl Seen {
    fn new(device: &DmDevice, info: &DeviceInfo) -> Self {
        let flags = info.flags();
        Self {
            device: device.clone(),
            number: number(info.device()),
            open_count: u32::try_from(info.open_count()).unwrap_or(0),
            suspended: flags.contains(DmFlags::DM_SUSPEND),
            mapped: flags.contains(DmFlags::DM_ACTIVE_PRESENT),
            waiting_table: flags.contains(DmFlags::DM_INACTIVE_PRESENT),
            read_only: flags.contains(DmFlags::DM_READONLY),
        }
    }
}

/// First sector, length, kind, parameters.
type RawLine = (u64, u64, String, String);

fn raw(line: &Line, start: Sectors) -> RawLine {
    let target = &line.target;
    (start.0, line.length.0, target.kind().into(), target.parameters())
}

fn raw_line((start, length, kind, parameters): &RawLine) -> String {
    format!("{start} {length} {kind} {parameters}")
}

fn options(mode: Mode) -> DmOptions {
    DmOptions::default().set_flags(match mode {
        Mode::ReadOnly => DmFlags::DM_READONLY,
        Mode::ReadWrite => DmFlags::empty(),
    })
}

fn id(name: &str) -> DevId<'_> {
    DevId::Name(dm_name(name))
}

fn dm_name(name: &str) -> &DmName {
    DmName::new(name).expect("a name of ours is short and ASCII, as the tests of `name` show")
}

fn dm_uuid(uuid: &str) -> &DmUuid {
    DmUuid::new(uuid).expect("a UUID of ours is short and ASCII, as the tests of `name` show")
}

fn number(device: devicemapper::Device) -> DeviceNumber {
    DeviceNumber {
        major: device.major,
        minor: device.minor,
    }
}

fn is(error: &io::Error, errno: rustix::io::Errno) -> bool {
    error.raw_os_error() == Some(errno.raw_os_error())
}

fn failed(what: &'static str, device: &DmDevice, reason: Vec<String>, source: io::Error) -> MapperError {
    MapperError::Ioctl {
        what,
        device: device.clone(),
        reason,
        source,
    }
}

/// Names of the block devices over a device: of device-mapper's, their own names.
pub(crate) fn holders(sys: &Path, number: DeviceNumber) -> Vec<String> {
    let folder = sys.join("dev/block").join(number.to_string()).join("holders");
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut names: Vec<String> = entries
        .flatten()
        .map(|entry| match fs::read_to_string(entry.path().join("dm/name")) {
            Ok(name) => name.trim_end().to_owned(),
            Err(_) => entry.file_name().to_string_lossy().into_owned(),
        })
        .collect();
    names.sort();
    names
}
