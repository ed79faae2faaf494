//! open-iscsi's records, as far as its own program is not enough: secrets go into them by file, because iscsiadm takes
//! them by command line only, where every user of the host can read them.

use std::fs;
use std::io::{self, ErrorKind, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use treeboot_types::Iqn;

use super::error::OpenIscsiError;
use super::{Endpoint, IFACE, OpenIscsi};
use crate::login::{Chap, Credentials};

/// Longest value in bytes (VALUE_MAXVAL, less its end).
const MAX_VALUE_BYTES: usize = 255;

/// The values of a direction's name and secret, by key.
fn directions(chap: &Chap) -> [(&'static str, &'static str, Option<&Credentials>); 2] {
    [
        (
            "node.session.auth.username",
            "node.session.auth.password",
            Some(chap.initiator()),
        ),
        (
            "node.session.auth.username_in",
            "node.session.auth.password_in",
            chap.target(),
        ),
    ]
}

/// Can a record hold this?
pub(super) fn check(chap: Option<&Chap>) -> Result<(), OpenIscsiError> {
    let Some(chap) = chap else {
        return Ok(());
    };
    for (_, _, credentials) in directions(chap) {
        let Some(credentials) = credentials else {
            continue;
        };
        let values = [
            ("name", credentials.user().as_bytes()),
            ("secret", credentials.secret().expose()),
        ];
        for (what, value) in values {
            let why = match std::str::from_utf8(value) {
                Err(_) => "it is not text",
                Ok(text) if text.len() > MAX_VALUE_BYTES => "it is longer than 255 bytes",
                Ok(text) if text.contains(char::is_control) => "it holds a control character",
                Ok(text) if text.trim() != text => "a blank at its beginning or end would be lost",
                Ok(_) => continue,
            };
            return Err(OpenIscsiError::Chap { what, why });
        }
    }
    Ok(())
}

impl OpenIscsi {
    /// The record of an endpoint, if there is one: a file of portal and port for a record without a portal group's number, as
    /// ours are (a target may have any).
    pub(super) fn record_path(&self, endpoint: &Endpoint) -> Option<PathBuf> {
        let name = format!("{},{}", endpoint.portal.ip(), endpoint.portal.port());
        self.database()
            .map(|root| root.join("nodes").join(endpoint.target.as_str()).join(&name))
            .find(|path| path.is_file())
    }

    pub(super) fn iface_path(&self) -> Option<PathBuf> {
        self.database()
            .map(|root| root.join("ifaces").join(IFACE))
            .find(|path| path.is_file())
    }

    /// Is our interface record there and as it should be?
    pub(super) fn has_iface(&self) -> bool {
        let Some(text) = self.iface_path().and_then(|path| fs::read_to_string(path).ok()) else {
            return false;
        };
        value(&text, "iface.initiatorname") == Some(self.initiator.as_str())
            && value(&text, "iface.transport_name") == Some("tcp")
    }

    /// A record without a portal group's number may be anybody's; ours names our interface.
    pub(super) fn refuse_strangers_record(&self, endpoint: &Endpoint) -> Result<(), OpenIscsiError> {
        let Some(path) = self.record_path(endpoint) else {
            return Ok(());
        };
        let text = read(&path)?;
        // An empty one is what a full disk or a power cut left.
        if text.trim().is_empty() || value(&text, "iface.iscsi_ifacename") == Some(IFACE) {
            return Ok(());
        }
        Err(OpenIscsiError::Stranger {
            target: endpoint.target.clone(),
            path,
        })
    }

    /// Puts names and secrets into the record that iscsiadm has just written.
    pub(super) fn write_secrets(
        &self,
        endpoint: &Endpoint,
        chap: Option<&Chap>,
    ) -> Result<(), OpenIscsiError> {
        let Some(chap) = chap else {
            return Ok(());
        };
        let path = self.record_path(endpoint).ok_or_else(|| OpenIscsiError::Record {
            what: "find",
            path: self.places.databases.first().cloned().unwrap_or_default(),
            source: ErrorKind::NotFound.into(),
        })?;
        let text = with_secrets(&read(&path)?, chap);
        // Beside the records, so that nobody takes it for one, and moved over the record in one step.
        let root = path.ancestors().nth(3).unwrap_or(Path::new("/"));
        let draft = root.join(format!(".{IFACE}-{}", std::process::id()));
        let written = write_private(&draft, &text).and_then(|()| fs::rename(&draft, &path));
        written.map_err(|source| {
            // Nothing more can be done about a draft that cannot be removed.
            let _ = fs::remove_file(&draft);
            OpenIscsiError::Record {
                what: "write",
                path,
                source,
            }
        })
    }

    /// The endpoints of all records that name our interface.
    pub(super) fn records(&self) -> Vec<Endpoint> {
        let mut endpoints = Vec::new();
        for root in self.database() {
            for (target, folder) in entries(&root.join("nodes")) {
                let Ok(target) = Iqn::new(&target) else {
                    continue;
                };
                for (name, path) in entries(&folder) {
                    let ours = fs::read_to_string(&path)
                        .is_ok_and(|text| value(&text, "iface.iscsi_ifacename") == Some(IFACE));
                    if let Some(portal) = parse_name(&name).filter(|_| ours) {
                        let target = target.clone();
                        endpoints.push(Endpoint { target, portal });
                    }
                }
            }
        }
        endpoints
    }
}

/// `10.0.0.1,3260`
fn parse_name(name: &str) -> Option<SocketAddr> {
    let (address, port) = name.split_once(',')?;
    Some(SocketAddr::new(
        address.parse::<IpAddr>().ok()?,
        port.parse().ok()?,
    ))
}

fn entries(folder: &Path) -> Vec<(String, PathBuf)> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| (entry.file_name().to_string_lossy().into_owned(), entry.path()))
        .collect()
}

fn read(path: &Path) -> Result<String, OpenIscsiError> {
    fs::read_to_string(path).map_err(|source| OpenIscsiError::Record {
        what: "read",
        path: path.into(),
        source,
    })
}

/// The value of a key in a record: lines of `key = value`.
fn value<'a>(record: &'a str, key: &str) -> Option<&'a str> {
    record.lines().find_map(|line| {
        let (name, value) = line.split_once('=')?;
        (name.trim() == key).then(|| value.trim())
    })
}

/// The record with these names and secrets instead of any others.
fn with_secrets(record: &str, chap: &Chap) -> String {
    let keys = directions(chap);
    let is_secret = |line: &str| {
        let name = line.split('=').next().unwrap_or_default().trim();
        keys.iter()
            .any(|(user, secret, _)| name == *user || name == *secret)
    };
    let mut text = String::new();
    let mut put = false;
    let mut credentials = || {
        let mut lines = String::new();
        for (user, secret, credentials) in keys {
            if let Some(credentials) = credentials {
                let word = String::from_utf8_lossy(credentials.secret().expose());
                lines += &format!("{user} = {}\n{secret} = {word}\n", credentials.user());
            }
        }
        put = true;
        lines
    };
    let mut waiting = true;
    for line in record.lines().filter(|line| !is_secret(line)) {
        if waiting && line.starts_with("# END") {
            text += &credentials();
            waiting = false;
        }
        text += line;
        text.push('\n');
    }
    if waiting {
        text += &credentials();
    }
    debug_assert!(put);
    text
}

fn write_private(path: &Path, text: &str) -> io::Result<()> {
    // A draft of an earlier life may be there, and must not be followed if it is a link.
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(text.as_bytes())
}
