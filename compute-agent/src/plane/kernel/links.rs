//! Sessions with parents, as the paths need them.

use std::collections::{BTreeMap, HashMap};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs as _};
use std::time::Duration;

use treeboot_dm::DeviceNumber;
use treeboot_iscsi::open_iscsi::{Endpoint, OpenIscsiError, SessionState};
use treeboot_types::{HostName, Portal};

use super::failed;
use super::record::SessionKey;
use super::sys::Sys;
use crate::plane::PlaneError;

/// A session that stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Link {
    /// Commands go through.
    pub(super) up: bool,
    /// Its disks, by LUN.
    pub(super) devices: BTreeMap<u16, DeviceNumber>,
}

fn error(error: OpenIscsiError) -> PlaneError {
    failed("open-iscsi", error)
}

fn endpoint(key: &SessionKey) -> Endpoint {
    Endpoint {
        target: key.target.clone(),
        portal: key.portal,
    }
}

/// The address of a portal; a name is looked up, which may block.
pub(super) fn resolve(portal: &Portal) -> Option<SocketAddr> {
    literal(portal).or_else(|| portal.as_str().to_socket_addrs().ok()?.next())
}

/// The address of a portal that is written as one.
pub(super) fn literal(portal: &Portal) -> Option<SocketAddr> {
    portal.as_str().parse().ok()
}

/// All sessions of ours.
pub(super) fn look(sys: &Sys) -> Result<HashMap<SessionKey, Link>, PlaneError> {
    let sessions = sys.iscsi.sessions().map_err(error)?.into_iter().map(|session| {
        let key = SessionKey {
            target: session.endpoint.target.clone(),
            portal: session.endpoint.portal,
        };
        let number = |major, minor| DeviceNumber { major, minor };
        let units = session.units.iter();
        let link = Link {
            up: session.state == SessionState::LoggedIn,
            devices: units
                .map(|unit| (unit.lun, number(unit.major, unit.minor)))
                .collect(),
        };
        (key, link)
    });
    Ok(sessions.collect())
}

/// How long a portal may take to accept a connection, before a login is tried at all.
const ACCEPTS_WITHIN: Duration = Duration::from_secs(1);

/// Makes a session and waits for the LUN's disk.
pub(super) fn log_in(
    sys: &Sys,
    key: &SessionKey,
    parent: Option<&HostName>,
    lun: u16,
) -> Result<(), PlaneError> {
    // iscsid waits many seconds for a portal that is not there, and for as long nothing else can be tried. A parent that is only about to
    // export is there in a moment.
    TcpStream::connect_timeout(&key.portal, ACCEPTS_WITHIN)
        .map(drop)
        .map_err(|error| failed(format!("no portal at {}", key.portal), error))?;
    let chap = sys.settings.keys.parent(&sys.initiator, parent, &key.target);
    let session = sys.iscsi.login(&endpoint(key), chap.as_ref(), &[lun]);
    session.map(drop).map_err(error)
}

/// Ends a session; it may be gone.
pub(super) fn log_out(sys: &Sys, key: &SessionKey) -> Result<(), PlaneError> {
    sys.iscsi.logout(&endpoint(key)).map_err(error)
}
