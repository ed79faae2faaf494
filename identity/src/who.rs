//! The parties, and how a certificate names them: the organizational unit says what somebody is, the common name who.

use std::fmt;
use std::str::FromStr;

use rustls::pki_types::CertificateDer;
use treeboot_types::HostName;

use crate::der;

/// What a person may do. Each may do all that the ones before it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Looks.
    Viewer,
    /// Makes, starts, stops and destroys VMs; attaches and detaches hosts.
    Operator,
    /// Everything, images too.
    Admin,
}

impl Role {
    /// All, from the least.
    pub const ALL: [Self; 3] = [Self::Viewer, Self::Operator, Self::Admin];

    /// As it is typed and shown.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Admin => "admin",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|role| role.as_str() == text)
            .ok_or_else(|| format!("'{text}' is no role; use admin, operator or viewer"))
    }
}

/// A person's name: what stands in logs and refusals.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Person(Box<str>);

/// Why a text is not a person's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no person's name; use 1 to 64 letters a-z, digits, '-', '.', '_' or '@'")]
pub struct PersonError(String);

impl Person {
    /// Longest name in bytes: what a certificate's common name holds (RFC 5280, appendix A.1, ub-common-name).
    const MAX_BYTES: usize = 64;

    /// Checks and wraps `name`.
    ///
    /// # Errors
    /// Empty, too long, or with a character outside the set.
    pub fn new(name: &str) -> Result<Self, PersonError> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'@');
        if name.is_empty() || name.len() > Self::MAX_BYTES || !name.bytes().all(allowed) {
            return Err(PersonError(name.chars().take(Self::MAX_BYTES).collect()));
        }
        Ok(Self(name.into()))
    }

    /// As text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Person {
    type Err = PersonError;
    fn from_str(text: &str) -> Result<Self, PersonError> {
        Self::new(text)
    }
}

/// One party.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Who {
    /// The coordinator.
    Coordinator,
    /// An agent, by its host.
    Host(HostName),
    /// A person, or a program that acts for one.
    Person {
        /// Their name.
        name: Person,
        /// What they may do.
        role: Role,
    },
}

impl Who {
    /// The organizational unit and the common name of its certificate.
    #[must_use]
    pub fn unit_and_name(&self) -> (&'static str, &str) {
        match self {
            Self::Coordinator => ("coordinator", "coordinator"),
            Self::Host(host) => ("host", host.as_str()),
            Self::Person { name, role } => (role.as_str(), name.as_str()),
        }
    }
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Coordinator => f.write_str("the coordinator"),
            Self::Host(host) => write!(f, "host '{host}'"),
            Self::Person { name, role } => write!(f, "{role} '{}'", name.as_str()),
        }
    }
}

/// What a certificate says of its holder. Whether an authority signed it is another matter ([`crate::tls`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certified {
    /// Whose it is.
    pub who: Who,
    /// From when it holds, in seconds since 1970.
    pub from: u64,
    /// Until when it holds, in seconds since 1970.
    pub until: u64,
}

/// A certificate that names nobody of ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the certificate names no host and no person of treeboot's: {0}")]
pub struct NotOurs(String);

impl Certified {
    /// Reads a certificate.
    ///
    /// # Errors
    /// It cannot be read, or its names are none that treeboot writes.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, NotOurs> {
        let parsed = der::certificate(certificate).ok_or_else(|| NotOurs("it cannot be read".into()))?;
        let (Some(unit), Some(name)) = (parsed.unit, parsed.name) else {
            return Err(NotOurs("it has no organizational unit, or no common name".into()));
        };
        let who = match unit {
            "coordinator" => Who::Coordinator,
            "host" => Who::Host(HostName::new(name).map_err(|error| NotOurs(error.to_string()))?),
            role => Who::Person {
                role: role.parse().map_err(NotOurs)?,
                name: Person::new(name).map_err(|error| NotOurs(error.to_string()))?,
            },
        };
        Ok(Self {
            who,
            from: parsed.from,
            until: parsed.until,
        })
    }

    /// When its holder should ask for the next one: two thirds of its life are over, so that a coordinator may be away for a third.
    #[must_use]
    pub fn renew_at(&self) -> u64 {
        self.from + self.until.saturating_sub(self.from) / 3 * 2
    }

    /// Whether it holds at a time, in seconds since 1970.
    #[must_use]
    pub fn holds(&self, now: u64) -> bool {
        (self.from..self.until).contains(&now)
    }

    /// Whether its holder should have the next one by now: it is time, or a clock that was ahead was set back to before it begins.
    #[must_use]
    pub fn is_due(&self, now: u64) -> bool {
        now < self.from || now >= self.renew_at()
    }
}
