//! What can go wrong with sessions.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use treeboot_types::Iqn;

use super::{Endpoint, IFACE};

/// iscsiadm's exit codes (its manual page, EXIT STATUS), as far as they tell callers apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitCode {
    /// 2, 32: no such session, or it is not connected.
    NoSession,
    /// 4: the portal cannot be reached.
    Connect,
    /// 5, 19: the target refused the login.
    LoginRefused,
    /// 6: the records cannot be read or locked.
    Database,
    /// 7: an argument or a record's key that this version does not know.
    Argument,
    /// 8, 11: no answer in time.
    TimedOut,
    /// 10: the logout failed.
    Logout,
    /// 12: iscsi_tcp is not loaded.
    NoTransport,
    /// 13: not root.
    NoRight,
    /// 15: the session is there already.
    SessionExists,
    /// 18, 20: iscsid does not run or answer.
    NoDaemon,
    /// 21: no record or session of this name.
    NothingFound,
    /// 24: name, secret, or not on the target's list.
    Authentication,
    /// 28, 29: in use; try again.
    Busy,
    /// Any other.
    Other(i32),
}

impl ExitCode {
    pub(super) fn of(code: i32) -> Self {
        match code {
            2 | 32 => Self::NoSession,
            4 => Self::Connect,
            5 | 19 => Self::LoginRefused,
            6 => Self::Database,
            7 => Self::Argument,
            8 | 11 => Self::TimedOut,
            10 => Self::Logout,
            12 => Self::NoTransport,
            13 => Self::NoRight,
            15 => Self::SessionExists,
            18 | 20 => Self::NoDaemon,
            21 => Self::NothingFound,
            24 => Self::Authentication,
            28 | 29 => Self::Busy,
            other => Self::Other(other),
        }
    }

    /// What it means and what to do.
    fn meaning(self) -> &'static str {
        match self {
            Self::NoSession => "there is no such session",
            Self::Connect => "the portal cannot be reached",
            Self::LoginRefused => "the target refused the login",
            Self::Database => {
                "open-iscsi's records cannot be read or locked; if no iscsiadm runs, remove /run/lock/iscsi/lock.write, which one \
                 that was killed left"
            }
            Self::Argument => {
                "this version of open-iscsi does not know an argument; 2.1.8 and later are known to work"
            }
            Self::TimedOut => "there was no answer in time",
            Self::Logout => "the logout failed",
            Self::NoTransport => "the kernel module iscsi_tcp is not loaded; as root: modprobe iscsi_tcp",
            Self::NoRight => "only root may; run the agent as root or use the user plane",
            Self::SessionExists => "the session is there already",
            Self::NoDaemon => {
                "iscsid (package open-iscsi) does not run; as root: systemctl start iscsid.socket, or iscsid where there is no systemd"
            }
            Self::NothingFound => "there is no such record or session",
            Self::Authentication => {
                "the target does not let this initiator in: its name is not on the list, or CHAP failed"
            }
            Self::Busy => "it is in use; try again",
            Self::Other(_) => "it says no more than that",
        }
    }
}

impl std::fmt::Display for ExitCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.meaning())
    }
}

/// Why a session is not as it was asked to be.
#[derive(Debug, thiserror::Error)]
pub enum OpenIscsiError {
    /// No iscsiadm.
    #[error("cannot run {} (apt-get install open-iscsi)", program.display())]
    NoProgram {
        /// What was to be run.
        program: PathBuf,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// The kernel has no iSCSI over TCP.
    #[error(
        "the kernel module iscsi_tcp is not loaded; as root: modprobe iscsi_tcp (it comes with the kernel's package, on Debian \
         linux-image-amd64; the cloud kernel has it not)"
    )]
    NoModule,
    /// iscsiadm failed.
    #[error("iscsiadm {command}: {code}{}", if said.is_empty() { String::new() } else { format!(" ({said})") })]
    Failed {
        /// Its arguments; no secret is among them.
        command: String,
        /// Its exit code.
        code: ExitCode,
        /// The end of what it printed, for people.
        said: String,
    },
    /// iscsiadm took too long, or was killed by somebody else.
    #[error("iscsiadm {command} did not end within {limit:?} and was killed; does iscsid still answer?")]
    Killed {
        /// Its arguments.
        command: String,
        /// The limit.
        limit: Duration,
    },
    /// Even its version, for which it asks nobody, iscsiadm did not say in time.
    #[error(
        "{} --version did not end within {limit:?} and was killed. It asks nobody, so this machine is too busy, or the disk on which \
         it lies hangs; start the agent again when `time {} --version` takes less", program.display(), program.display()
    )]
    TooBusy {
        /// What was run.
        program: PathBuf,
        /// The limit.
        limit: Duration,
    },
    /// The session is there, a unit is not.
    #[error("{endpoint} shows no LUN {lun} within {waited:?}; it shows {seen:?}")]
    NoUnit {
        /// The session.
        endpoint: Endpoint,
        /// The unit.
        lun: u16,
        /// How long it was waited for.
        waited: Duration,
        /// The units that came.
        seen: Vec<u16>,
    },
    /// A session outlived its logout.
    #[error("session {sid} to {endpoint} is still there {waited:?} after its logout")]
    Stays {
        /// The session.
        endpoint: Endpoint,
        /// Its number.
        sid: u32,
        /// How long it was waited for.
        waited: Duration,
    },
    /// sysfs cannot be read or written.
    #[error("cannot {what} {}", path.display())]
    Sysfs {
        /// `read` or `write`.
        what: &'static str,
        /// The attribute.
        path: PathBuf,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// A record of open-iscsi cannot be read or written.
    #[error("cannot {what} open-iscsi's record {}", path.display())]
    Record {
        /// `read`, `write` or `find`.
        what: &'static str,
        /// The record.
        path: PathBuf,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// Somebody else's record is where ours would be.
    #[error(
        "open-iscsi has a record of somebody else for {target} at {}, not of the interface {IFACE}; it is left alone. \
         iscsiadm -m node shows it", path.display()
    )]
    Stranger {
        /// The target.
        target: Iqn,
        /// The record.
        path: PathBuf,
    },
    /// A CHAP name or secret that open-iscsi cannot hold.
    #[error("open-iscsi cannot hold the CHAP {what}: {why}")]
    Chap {
        /// `name` or `secret`.
        what: &'static str,
        /// What is wrong with it.
        why: &'static str,
    },
}
