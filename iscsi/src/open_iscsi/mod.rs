//! open-iscsi, the kernel's iSCSI initiator: sessions through `iscsiadm`, devices through sysfs.
//!
//! `iscsiadm` is started from this module only, by exact names, with a time limit, and believed by its exit code alone; what it
//! prints goes into errors for people and is never parsed. Which sessions there are, and which devices, is read from sysfs.
//! A session is ours if it was made through our interface record [`IFACE`] by our initiator's name; the machine's own records
//! and sessions, and its `initiatorname.iscsi`, are never touched.
//!
//! Everything blocks, each call within [`Settings::call_limit`]. Deliberately absent: starting iscsid (the host's init does; an
//! error says how), discovery, and retries over time, which the agent's tasks make.

mod error;
mod record;
mod run;
mod session;
mod settings;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use treeboot_types::{HostName, Iqn};

use crate::lio::wait_until;
use crate::login::Chap;

pub use error::{ExitCode, OpenIscsiError};
pub use session::{SeenSession, SessionState, UnitDevice};
pub use settings::Settings;

/// The name of our interface record.
pub const IFACE: &str = "treeboot";

/// How long a session that is logged out may stay in sysfs, and a unit that is in use in it.
const GONE_WITHIN: Duration = Duration::from_secs(5);

/// One portal of one target.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Endpoint {
    /// The target.
    pub target: Iqn,
    /// Its address; names are resolved by the caller, because sysfs shows addresses.
    pub portal: SocketAddr,
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} at {}", self.target, self.portal)
    }
}

/// Where things are on this host.
#[derive(Debug, Clone)]
pub struct Places {
    /// `iscsiadm`.
    pub program: PathBuf,
    /// Where sysfs is mounted.
    pub sysfs: PathBuf,
    /// Where open-iscsi keeps its records; the first that exists counts.
    pub databases: Vec<PathBuf>,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            program: "iscsiadm".into(),
            sysfs: "/sys".into(),
            // Debian and its like; Fedora, SUSE and upstream since 2.1.9.
            databases: vec!["/etc/iscsi".into(), "/var/lib/iscsi".into()],
        }
    }
}

/// open-iscsi on this host, for one initiator name.
#[derive(Debug, Clone)]
pub struct OpenIscsi {
    initiator: Iqn,
    settings: Settings,
    places: Places,
}

impl OpenIscsi {
    /// For this host's sessions.
    pub fn new(host: &HostName, settings: Settings) -> Self {
        Self::at(host, settings, Places::default())
    }

    /// The same with everything elsewhere.
    pub fn at(host: &HostName, settings: Settings, places: Places) -> Self {
        Self {
            initiator: Iqn::of_host(host),
            settings,
            places,
        }
    }

    /// The name under which sessions are made.
    pub fn initiator(&self) -> &Iqn {
        &self.initiator
    }

    /// Is everything there that sessions need? iscsid is asked only by a login.
    ///
    /// # Errors
    /// [`OpenIscsiError::NoProgram`], [`OpenIscsiError::NoModule`], [`OpenIscsiError::TooBusy`].
    pub fn check(&self) -> Result<(), OpenIscsiError> {
        if !self.places.sysfs.join("class/iscsi_transport/tcp").exists() {
            return Err(OpenIscsiError::NoModule);
        }
        let limit = self.settings.start_limit;
        match run::run(&self.places.program, &["--version"], limit) {
            Err(OpenIscsiError::Killed { .. }) => Err(OpenIscsiError::TooBusy {
                program: self.places.program.clone(),
                limit,
            }),
            other => other,
        }
    }

    /// Makes a session and waits for its units. A session that is there already is kept as it is, with the secrets and
    /// timeouts that it was made with; then its units are waited for only while it is logged in, so that a session whose
    /// target is away for the moment is found with the devices that it has.
    ///
    /// # Errors
    /// [`OpenIscsiError::Failed`] with iscsiadm's exit code, [`OpenIscsiError::NoUnit`] where a unit of `luns` does not come.
    /// After an error of a new session nothing of it stays.
    pub fn login(
        &self,
        endpoint: &Endpoint,
        chap: Option<&Chap>,
        luns: &[u16],
    ) -> Result<SeenSession, OpenIscsiError> {
        if let Some(found) = self.session(endpoint)? {
            return match found.state {
                SessionState::LoggedIn => self.wait_for_units(endpoint, luns),
                _ => Ok(found),
            };
        }
        let made = self
            .make(endpoint, chap)
            .and_then(|()| self.wait_for_units(endpoint, luns));
        match made {
            Ok(session) => {
                self.limit_commands(&session)?;
                Ok(session)
            }
            Err(error) => {
                if let Err(undo) = self.logout(endpoint) {
                    tracing::warn!(%endpoint, error = %undo, "a session that failed could not be undone");
                }
                Err(error)
            }
        }
    }

    fn make(&self, endpoint: &Endpoint, chap: Option<&Chap>) -> Result<(), OpenIscsiError> {
        record::check(chap)?;
        self.make_iface()?;
        self.refuse_strangers_record(endpoint)?;
        let portal = endpoint.portal.to_string();
        let node = |rest: &[&str]| {
            let mut args = vec![
                "-m",
                "node",
                "-T",
                endpoint.target.as_str(),
                "-p",
                &portal,
                "-I",
                IFACE,
            ];
            args.extend(rest);
            self.iscsiadm(&args)
        };
        // Makes the record anew, with the host's defaults, if it is there.
        node(&["-o", "new"])?;
        let keys = self.settings.record(chap);
        let mut update = vec!["-o", "update"];
        for (key, value) in &keys {
            update.extend(["-n", key, "-v", value]);
        }
        node(&update)?;
        self.write_secrets(endpoint, chap)?;
        match node(&["--login"]) {
            // Somebody was faster; it is our session all the same.
            Err(OpenIscsiError::Failed {
                code: ExitCode::SessionExists,
                ..
            }) => Ok(()),
            other => other,
        }
    }

    /// Our interface record: our name instead of the machine's, over TCP.
    fn make_iface(&self) -> Result<(), OpenIscsiError> {
        if !self.has_iface() {
            // Made anew it would lose its name for a moment, and with sessions through it open-iscsi refuses that.
            if self.iface_path().is_none() {
                self.iscsiadm(&["-m", "iface", "-I", IFACE, "-o", "new"])?;
            }
            let name = self.initiator.as_str();
            let mut args = vec!["-m", "iface", "-I", IFACE, "-o", "update"];
            args.extend(["-n", "iface.transport_name", "-v", "tcp"]);
            args.extend(["-n", "iface.initiatorname", "-v", name]);
            self.iscsiadm(&args)?;
        }
        Ok(())
    }

    /// Ends a session, dead or alive, and forgets its record. One that is not there is no error.
    ///
    /// # Errors
    /// [`OpenIscsiError::Failed`], [`OpenIscsiError::Stays`] where the kernel still has the session after all.
    pub fn logout(&self, endpoint: &Endpoint) -> Result<(), OpenIscsiError> {
        let portal = endpoint.portal.to_string();
        let node = [
            "-m",
            "node",
            "-T",
            endpoint.target.as_str(),
            "-p",
            &portal,
            "-I",
            IFACE,
        ];
        let with = |last: &[&'static str]| {
            let mut args = node.to_vec();
            args.extend(last);
            match self.iscsiadm(&args) {
                Err(OpenIscsiError::Failed {
                    code: ExitCode::NothingFound | ExitCode::NoSession,
                    ..
                }) => Ok(()),
                other => other,
            }
        };
        if let Some(found) = self.session(endpoint)? {
            let mut done = with(&["--logout"]);
            // Its record may be gone; the session's number names it as exactly.
            if self.session(endpoint)?.is_some_and(|now| now.sid == found.sid) {
                let sid = found.sid.to_string();
                done = self.iscsiadm(&["-m", "session", "-r", &sid, "--logout"]);
            }
            let mut last = Ok(None);
            wait_until(GONE_WITHIN, || {
                last = self.session(endpoint);
                (!matches!(last, Ok(Some(_)))).then_some(())
            });
            match last? {
                Some(session) => {
                    done?;
                    return Err(OpenIscsiError::Stays {
                        endpoint: endpoint.clone(),
                        sid: session.sid,
                        waited: GONE_WITHIN,
                    });
                }
                None => tracing::debug!(%endpoint, sid = found.sid, "logged out"),
            }
        }
        if self.record_path(endpoint).is_none() {
            return Ok(());
        }
        match with(&["-o", "delete"]) {
            // A session under another name, of this host before it was renamed, still goes by this record.
            Err(OpenIscsiError::Failed {
                code: ExitCode::SessionExists,
                ..
            }) => Ok(()),
            other => other,
        }
    }

    /// Our sessions, from sysfs. Where the kernel has no iSCSI at all there are none.
    ///
    /// # Errors
    /// [`OpenIscsiError::Sysfs`].
    pub fn sessions(&self) -> Result<Vec<SeenSession>, OpenIscsiError> {
        session::all(&self.places.sysfs, &self.initiator)
    }

    /// Our session to this endpoint.
    ///
    /// # Errors
    /// [`OpenIscsiError::Sysfs`].
    pub fn session(&self, endpoint: &Endpoint) -> Result<Option<SeenSession>, OpenIscsiError> {
        let sessions = self.sessions()?;
        Ok(sessions.into_iter().find(|session| session.endpoint == *endpoint))
    }

    /// Has open-iscsi a record of ours for this endpoint?
    pub fn has_record(&self, endpoint: &Endpoint) -> bool {
        self.records().contains(endpoint)
    }

    /// Looks for units that the target shows newly, and at the size of those that are there.
    ///
    /// # Errors
    /// [`OpenIscsiError::Sysfs`].
    pub fn rescan(&self, session: &SeenSession) -> Result<(), OpenIscsiError> {
        session::rescan(&self.places.sysfs, session)
    }

    /// Forgets all that is ours: sessions, records, and the interface record.
    ///
    /// # Errors
    /// The first that could not be undone; the rest is tried all the same.
    pub fn forget_all(&self) -> Result<(), OpenIscsiError> {
        let mut first = Ok(());
        for session in self.sessions()? {
            first = first.and(self.logout(&session.endpoint));
        }
        for endpoint in self.records() {
            first = first.and(self.logout(&endpoint));
        }
        if self.iface_path().is_some() {
            let deleted = self.iscsiadm(&["-m", "iface", "-I", IFACE, "-o", "delete"]);
            first = first.and(deleted);
        }
        first
    }

    fn wait_for_units(&self, endpoint: &Endpoint, luns: &[u16]) -> Result<SeenSession, OpenIscsiError> {
        let mut last = Ok(None);
        let found = wait_until(self.settings.units_within, || {
            last = self.session(endpoint);
            match &last {
                Ok(Some(session)) => luns
                    .iter()
                    .all(|lun| session.unit(*lun).is_some())
                    .then(|| session.clone()),
                _ => None,
            }
        });
        if let Some(session) = found {
            return Ok(session);
        }
        let seen: Vec<u16> = last?
            .map(|session| session.units.iter().map(|unit| unit.lun).collect())
            .unwrap_or_default();
        let lun = luns.iter().copied().find(|lun| !seen.contains(lun));
        Err(OpenIscsiError::NoUnit {
            endpoint: endpoint.clone(),
            lun: lun.unwrap_or_default(),
            waited: self.settings.units_within,
            seen,
        })
    }

    /// The SCSI layer's own limits for a session's units.
    fn limit_commands(&self, session: &SeenSession) -> Result<(), OpenIscsiError> {
        let seconds = self.settings.command_s.to_string();
        let eh = self.settings.error_handling_s.to_string();
        for unit in &session.units {
            let device = unit.sysfs(&self.places.sysfs).join("device");
            session::write(&device.join("timeout"), &seconds)?;
            session::write(&device.join("eh_timeout"), &eh)?;
        }
        Ok(())
    }

    fn iscsiadm(&self, args: &[&str]) -> Result<(), OpenIscsiError> {
        run::run(&self.places.program, args, self.settings.call_limit)
    }

    fn database(&self) -> impl Iterator<Item = &Path> {
        self.places.databases.iter().map(PathBuf::as_path)
    }
}
