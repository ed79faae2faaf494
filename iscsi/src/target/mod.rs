//! The target: a server of many targets with many logical units on several portals.
//!
//! Each connection is a task that owns its socket and its session; targets and access lists are shared. A command
//! whose device answers at the first poll is answered without a task switch; replies to commands that came together
//! leave together. Deliberately absent: several connections a session, and ErrorRecoveryLevel above 0.

mod barrier;
mod buffers;
mod command;
mod connection;
mod execute;
mod login;
mod manage;
mod quiet;
mod registry;
mod reply;
mod reservation_file;
mod server;

mod transfer;
mod wire;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use treeboot_block::BlockDevice;
use treeboot_types::Iqn;

use crate::login::{Chap, PeerText, Security, Terms};
use crate::scsi::AccessState;
use crate::scsi::alua::{FIRST_PORT_GROUP, PortGroup};
use crate::scsi::kept::KeptError;

pub use reservation_file::{ReservationFile, ReservationFileError};
pub use server::Server;

/// How a server behaves.
#[derive(Debug, Clone, Copy)]
pub struct ServerConfig {
    /// What it brings to the negotiation of each login.
    pub terms: Terms,
    /// How long a login may take, from the connection's first moment on.
    pub login_limit: Duration,
    /// Connections that have not logged in. When one more comes, the oldest of them is closed, so that thousands that
    /// say nothing keep nobody out.
    pub max_logins: usize,
    /// Sessions in all.
    pub max_sessions: usize,
    /// How long the login of an initiator that may not (yet) use its target is held before it is refused. Where the
    /// coordinator tells a child of its parent and the parent of its child in the same moment, the child may be faster;
    /// a refusal would cost it a pause before its next attempt.
    pub patience: Duration,
    /// After this silence the initiator is pinged; after as much again without a sign of life the session ends.
    pub ping_after: Duration,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            terms: Terms::default(),
            login_limit: Duration::from_secs(10),
            max_logins: 256,
            max_sessions: 4096,
            patience: Duration::ZERO,
            ping_after: Duration::from_secs(15),
        }
    }
}

/// Who may log in to a target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Access {
    /// Everybody.
    Anyone,
    /// These, whose word is taken for their name.
    Initiators(BTreeSet<Iqn>),
    /// Everybody who knows this secret.
    Secret(Chap),
    /// These, each with its own secret; `None`: its word is taken.
    Each(BTreeMap<Iqn, Option<Chap>>),
    /// Whoever stands in a book that is looked into at each login. A secret that changes there ends no session.
    Book(Book),
}

/// Says what an initiator must prove; `None`: it may not log in.
pub trait Doorkeeper: Send + Sync {
    /// What this initiator proves itself by.
    fn asks(&self, initiator: &Iqn) -> Option<Chap>;
}

/// A shared [`Doorkeeper`]; one is equal to itself only.
#[derive(Clone)]
pub struct Book(pub Arc<dyn Doorkeeper>);

impl std::fmt::Debug for Book {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Book(…)")
    }
}

impl PartialEq for Book {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Book {}

impl Access {
    /// How this initiator proves itself; `None`: it may not log in.
    fn asks(&self, initiator: &Iqn) -> Option<Security> {
        match self {
            Self::Anyone => Some(Security::None),
            Self::Initiators(names) => names.contains(initiator).then_some(Security::None),
            Self::Secret(chap) => Some(Security::Chap(chap.clone())),
            Self::Each(names) => {
                let chap = names.get(initiator)?;
                Some(chap.clone().map_or(Security::None, Security::Chap))
            }
            Self::Book(book) => book.0.asks(initiator).map(Security::Chap),
        }
    }

    fn admits(&self, initiator: &Iqn) -> bool {
        self.asks(initiator).is_some()
    }

    /// Would who has logged in with this proof be let in again?
    fn honours(&self, initiator: &Iqn, proof: &Security) -> bool {
        let enough = |asked| match self {
            // It knew the secret of its day, and is still on the list.
            Self::Book(_) => *proof != Security::None,
            _ => asked == Security::None || asked == *proof,
        };
        self.asks(initiator).is_some_and(enough)
    }
}

/// A target to serve.
#[derive(Clone)]
pub struct TargetSpec {
    /// Its name.
    pub name: Iqn,
    /// Its logical units; LUN 0 must be among them, because initiators ask it for the others.
    pub luns: Vec<LunSpec>,
    /// Who may log in.
    pub access: Access,
}

/// A logical unit to serve.
#[derive(Clone)]
pub struct LunSpec {
    /// Its number, 0 to 16,383.
    pub lun: u16,
    /// What it reads and writes.
    pub device: Arc<dyn BlockDevice>,
    /// Unit serial number, printable ASCII of at most 64 characters.
    pub serial: String,
    /// Product identification, of which 16 characters are shown.
    pub product: String,
    /// What makes it the same disk on every path: equal wherever the same content is served.
    pub ident: [u8; 16],
}

/// What a target may have beyond a [`TargetSpec`].
#[derive(Debug)]
pub struct TargetOptions {
    /// Where the persistent reservations of a unit outlive a loss of power, by its number. Units without such a place
    /// refuse APTPL.
    pub reservations: BTreeMap<u16, ReservationFile>,
    /// The group of ports, and the relative port, that the target says it is. Targets that serve the same disk are
    /// paths of their own only if these differ.
    pub port_group: PortGroup,
    /// The state of access to its units; [`Server::set_access_state`] changes it.
    pub access_state: AccessState,
}

impl Default for TargetOptions {
    fn default() -> Self {
        Self {
            reservations: BTreeMap::new(),
            port_group: FIRST_PORT_GROUP,
            access_state: AccessState::default(),
        }
    }
}

/// Why a server cannot start.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// A portal's address cannot be had.
    #[error("cannot listen on {portal}{}", if source.kind() == std::io::ErrorKind::AddrInUse { ": another program has this port; choose another, or end that program" } else { "" })]
    Listen {
        /// The portal.
        portal: SocketAddr,
        /// The operating system's reason.
        #[source]
        source: std::io::Error,
    },
    /// There is no portal at all.
    #[error("a server needs at least one portal to listen on")]
    NoPortal,
}

/// Why a target cannot be served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddTargetError {
    /// The name is taken.
    #[error("the target '{0}' is served already")]
    Exists(Iqn),
    /// No LUN 0.
    #[error("the target '{0}' has no LUN 0")]
    NoLunZero(Iqn),
    /// A LUN's number twice or too high, or too many.
    #[error("the target '{target}' cannot have LUN {lun}: numbers are 0 to 16383, each once")]
    Lun {
        /// The target.
        target: Iqn,
        /// The number.
        lun: u16,
    },
    /// A device that no disk can be.
    #[error("LUN {lun} of '{target}' has {bytes} bytes in blocks of {block_bytes}: no disk is like that")]
    Geometry {
        /// The target.
        target: Iqn,
        /// The number.
        lun: u16,
        /// Its size.
        bytes: u64,
        /// Its block.
        block_bytes: u32,
    },
    /// What was kept of a unit's reservations cannot be read.
    #[error("the reservations of LUN {lun} of '{target}' in '{}' cannot be read", path.display())]
    Reservations {
        /// The target.
        target: Iqn,
        /// The number.
        lun: u16,
        /// Where they are kept.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: KeptError,
    },
    /// Nowhere to send its initiators.
    #[error("'{address}' is no address to send the initiators of '{target}' to")]
    Address {
        /// The target.
        target: Iqn,
        /// What was given.
        address: PeerText,
    },
    /// The server stops.
    #[error("the server is shutting down, so '{0}' cannot be added")]
    Stopping(Iqn),
}

/// What a target did since it was added.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TargetStats {
    /// Bytes sent, as counted on its sockets, logins included.
    pub wire_bytes_out: u64,
    /// Bytes received, likewise.
    pub wire_bytes_in: u64,
    /// Bytes of data read by initiators.
    pub read_bytes: u64,
    /// Bytes of data written by initiators.
    pub written_bytes: u64,
    /// SCSI commands.
    pub commands: u64,
    /// The sessions of the moment.
    pub sessions: Vec<SessionStats>,
}

/// What a session did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionStats {
    /// Who.
    pub initiator: Iqn,
    /// From where.
    pub peer: SocketAddr,
    /// Bytes sent on its socket.
    pub wire_bytes_out: u64,
    /// Bytes received.
    pub wire_bytes_in: u64,
    /// Bytes of data read.
    pub read_bytes: u64,
    /// Bytes of data written.
    pub written_bytes: u64,
    /// SCSI commands.
    pub commands: u64,
}
