//! Sessions and their devices, from sysfs.

use std::fs;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use treeboot_types::Iqn;

use super::error::OpenIscsiError;
use super::{Endpoint, IFACE};

/// How a session is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SessionState {
    /// Commands go through.
    LoggedIn,
    /// The connection is lost, commands wait for it.
    Failed,
    /// The wait is over, commands fail at once; iscsid goes on trying to reconnect.
    Free,
}

/// A session of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeenSession {
    /// Its number.
    pub sid: u32,
    /// The SCSI host that it is.
    pub host: u32,
    /// Where it goes.
    pub endpoint: Endpoint,
    /// How it is.
    pub state: SessionState,
    /// Its units that are block devices, by LUN.
    pub units: Vec<UnitDevice>,
}

impl SeenSession {
    /// The device of a LUN.
    pub fn unit(&self, lun: u16) -> Option<&UnitDevice> {
        self.units.iter().find(|unit| unit.lun == lun)
    }
}

/// A unit that is a block device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnitDevice {
    /// Its LUN.
    pub lun: u16,
    /// The kernel's name, `sda`.
    pub name: String,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Is it write-protected?
    pub read_only: bool,
    /// Size in bytes.
    pub bytes: u64,
}

impl UnitDevice {
    /// Its node where devtmpfs or udev makes it.
    pub fn path(&self) -> PathBuf {
        Path::new("/dev").join(&self.name)
    }

    /// Its folder in sysfs.
    pub(super) fn sysfs(&self, sysfs: &Path) -> PathBuf {
        sysfs.join("class/block").join(&self.name)
    }
}

/// All sessions through our interface under this name.
pub(super) fn all(sysfs: &Path, initiator: &Iqn) -> Result<Vec<SeenSession>, OpenIscsiError> {
    let mut sessions = Vec::new();
    for name in folder(&sysfs.join("class/iscsi_session"))? {
        let Some(sid) = name.strip_prefix("session").and_then(|sid| sid.parse().ok()) else {
            continue;
        };
        if let Some(session) = one(sysfs, initiator, sid)? {
            sessions.push(session);
        }
    }
    sessions.sort_by_key(|session| session.sid);
    Ok(sessions)
}

/// `None`: it is not ours, or gone while it was looked at.
fn one(sysfs: &Path, initiator: &Iqn, sid: u32) -> Result<Option<SeenSession>, OpenIscsiError> {
    let class = sysfs.join(format!("class/iscsi_session/session{sid}"));
    let attribute = |name: &str| read(&class.join(name));
    let is_ours = attribute("ifacename")?.as_deref() == Some(IFACE)
        && attribute("initiatorname")?.as_deref() == Some(initiator.as_str());
    if !is_ours {
        return Ok(None);
    }
    let target = attribute("targetname")?.and_then(|name| Iqn::new(&name).ok());
    let connection = sysfs.join(format!("class/iscsi_connection/connection{sid}:0"));
    let address = read(&connection.join("persistent_address"))?.and_then(|a| a.parse::<IpAddr>().ok());
    let port = read(&connection.join("persistent_port"))?.and_then(|port| port.parse().ok());
    let (Some(target), Some(address), Some(port)) = (target, address, port) else {
        return Ok(None);
    };
    let state = match attribute("state")?.as_deref() {
        Some("LOGGED_IN") => SessionState::LoggedIn,
        Some("FREE") => SessionState::Free,
        _ => SessionState::Failed,
    };
    let device = class.join("device");
    let Some(host) = host_of(&device) else {
        return Ok(None);
    };
    Ok(Some(SeenSession {
        sid,
        host,
        endpoint: Endpoint {
            target,
            portal: SocketAddr::new(address, port),
        },
        state,
        units: units(&device)?,
    }))
}

/// A session's folder lies in that of its SCSI host: `…/host3/session7`.
fn host_of(device: &Path) -> Option<u32> {
    let real = fs::canonicalize(device).ok()?;
    let host = real.parent()?.file_name()?.to_str()?;
    host.strip_prefix("host")?.parse().ok()
}

/// `…/targetH:C:T/H:C:T:L/block/sdX`
fn units(device: &Path) -> Result<Vec<UnitDevice>, OpenIscsiError> {
    let mut units = Vec::new();
    for target in folder(device)? {
        if !target.starts_with("target") {
            continue;
        }
        let target = device.join(target);
        for unit in folder(&target)? {
            let Some(lun) = unit.rsplit(':').next().and_then(|lun| lun.parse().ok()) else {
                continue;
            };
            let block = target.join(&unit).join("block");
            for name in folder(&block)? {
                units.extend(block_device(&block.join(&name), lun, name)?);
            }
        }
    }
    units.sort_by_key(|unit| unit.lun);
    Ok(units)
}

fn block_device(folder: &Path, lun: u16, name: String) -> Result<Option<UnitDevice>, OpenIscsiError> {
    let numbers = read(&folder.join("dev"))?;
    let numbers = numbers
        .as_deref()
        .and_then(|dev| dev.split_once(':'))
        .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    let sectors = read(&folder.join("size"))?.and_then(|size| size.parse::<u64>().ok());
    // A disk without a size is not yet there: its probing goes on after the login.
    let (Some((major, minor)), Some(sectors @ 1..)) = (numbers, sectors) else {
        return Ok(None);
    };
    Ok(Some(UnitDevice {
        lun,
        name,
        major,
        minor,
        read_only: read(&folder.join("ro"))?.as_deref() == Some("1"),
        bytes: sectors * 512,
    }))
}

/// Looks for new units on a session's host, and at the size of the known ones.
pub(super) fn rescan(sysfs: &Path, session: &SeenSession) -> Result<(), OpenIscsiError> {
    let host = sysfs.join(format!("class/scsi_host/host{}/scan", session.host));
    write(&host, "- - -")?;
    for unit in &session.units {
        write(&unit.sysfs(sysfs).join("device/rescan"), "1")?;
    }
    Ok(())
}

/// What lies in a folder; nothing where it is gone.
fn folder(path: &Path) -> Result<Vec<String>, OpenIscsiError> {
    let failed = |source| OpenIscsiError::Sysfs {
        what: "read",
        path: path.into(),
        source,
    };
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if is_gone(&error) => return Ok(Vec::new()),
        Err(source) => return Err(failed(source)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.map_err(failed)?.file_name();
        names.push(name.to_string_lossy().into_owned());
    }
    Ok(names)
}

/// An attribute; `None` where it is gone with its session.
fn read(path: &Path) -> Result<Option<String>, OpenIscsiError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(error) if is_gone(&error) => Ok(None),
        Err(source) => Err(OpenIscsiError::Sysfs {
            what: "read",
            path: path.into(),
            source,
        }),
    }
}

/// sysfs says one of these for what is being removed, and ENOTCONN for what a lost connection does not know.
fn is_gone(error: &std::io::Error) -> bool {
    let gone = [
        ErrorKind::NotFound,
        ErrorKind::NotADirectory,
        ErrorKind::NotConnected,
    ];
    gone.contains(&error.kind()) || matches!(error.raw_os_error(), Some(19 | 6 | 22))
}

pub(super) fn write(path: &Path, value: &str) -> Result<(), OpenIscsiError> {
    fs::write(path, value).map_err(|source| OpenIscsiError::Sysfs {
        what: "write",
        path: path.into(),
        source,
    })
}
