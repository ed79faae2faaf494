//! Secrets of the trees' edges: who may read whose export over iSCSI.
//!
//! The coordinator keeps one random key. Of it follows, for each host, the key of its exports, which the host gets with its welcome;
//! of that, for each child and each target, the secret of that one edge. So a parent knows the secret of every child before there is
//! one, a child gets its own with its placement and nobody else's, and nothing is stored but one key. Deliberately absent: which
//! edges there are. A target refuses whoever is not on its list, whatever secret it has.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use ring::hmac;
use treeboot_types::{HostName, Iqn};

use crate::{files, hex};

/// The file beside the authority.
const FILE: &str = "edges.key";
/// Bytes of a key.
const KEY_BYTES: usize = 32;
/// Bytes of a secret, before they are written as hexadecimal digits: 128 bits, and no initiator finds 32 characters too long.
const SECRET_BYTES: usize = 16;

/// Why the coordinator's key cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum EdgesError {
    /// The file.
    #[error("cannot read or write the key of the edges in {}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It holds something else.
    #[error(
        "{} is damaged: it should hold {} hexadecimal digits; restore it from a backup, or remove it, and hosts get new secrets as \
         they connect", path.display(), KEY_BYTES * 2
    )]
    Damaged {
        /// The file.
        path: PathBuf,
    },
}

fn mac(key: &[u8], what: &str, parts: &[&str]) -> [u8; KEY_BYTES] {
    let key = hmac::Key::new(hmac::HMAC_SHA256, key);
    let mut context = hmac::Context::with_key(&key);
    context.update(what.as_bytes());
    for part in parts {
        // Names hold no zero byte, so no two lists of names read alike.
        context.update(&[0]);
        context.update(part.as_bytes());
    }
    let mut bytes = [0; KEY_BYTES];
    bytes.copy_from_slice(context.sign().as_ref());
    bytes
}

fn parse(text: &str) -> Option<[u8; KEY_BYTES]> {
    let digits = text.trim().as_bytes();
    if digits.len() != KEY_BYTES * 2 {
        return None;
    }
    let mut bytes = [0; KEY_BYTES];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let digit = |d: u8| char::from(d).to_digit(16);
        *byte = (digit(*pair.first()?)? << 4 | digit(*pair.get(1)?)?) as u8;
    }
    Some(bytes)
}

/// The coordinator's key.
#[derive(Clone)]
pub struct EdgeKey([u8; KEY_BYTES]);

impl fmt::Debug for EdgeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EdgeKey(…)")
    }
}

impl EdgeKey {
    /// The key in the authority's directory, made where there is none yet.
    ///
    /// # Errors
    /// [`EdgesError`].
    pub fn open(dir: &Path) -> Result<Self, EdgesError> {
        let path = dir.join(FILE);
        let error = |source| EdgesError::File {
            path: path.clone(),
            source,
        };
        if let Some(text) = files::read_if_there(&path).map_err(error)? {
            let key = std::str::from_utf8(&text).ok().and_then(parse);
            return key.map(Self).ok_or(EdgesError::Damaged { path });
        }
        let key: [u8; KEY_BYTES] = rand::random();
        files::write_private(&path, format!("{}\n", hex(&key)).as_bytes()).map_err(error)?;
        Ok(Self(key))
    }

    /// The key of a host's exports.
    #[must_use]
    pub fn exports_of(&self, host: &HostName) -> ExportKey {
        ExportKey(mac(&self.0, "treeboot exports", &[host.as_str()]))
    }
}

/// The key of one host's exports.
#[derive(Clone, PartialEq, Eq)]
pub struct ExportKey([u8; KEY_BYTES]);

impl fmt::Debug for ExportKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ExportKey(…)")
    }
}

impl ExportKey {
    /// As it came over the wire.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// As it goes over the wire.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        self.0.to_vec()
    }

    /// As it is kept in a file.
    #[must_use]
    pub fn to_text(&self) -> String {
        hex(&self.0)
    }

    /// As [`to_text`](Self::to_text) wrote it.
    #[must_use]
    pub fn from_text(text: &str) -> Option<Self> {
        parse(text).map(Self)
    }

    /// What one child proves itself by at one target of this host: 32 hexadecimal digits.
    #[must_use]
    pub fn secret(&self, child: &HostName, target: &Iqn) -> String {
        let mac = mac(&self.0, "edge", &[child.as_str(), target.as_str()]);
        hex(mac.get(..SECRET_BYTES).unwrap_or(&mac))
    }

    /// What all readers of an origin prove themselves by where its kernel can hold one secret for everybody only: the CHAP name
    /// is then the target's.
    #[must_use]
    pub fn shared(&self, target: &Iqn) -> String {
        let mac = mac(&self.0, "origin", &[target.as_str()]);
        hex(mac.get(..SECRET_BYTES).unwrap_or(&mac))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_edge_has_a_secret_of_its_own_and_a_restart_gives_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let host = |name: &str| HostName::new(name).unwrap();
        let target = |name: &str| Iqn::new(&format!("iqn.2026-11.dev.treeboot:image:{name}:1")).unwrap();
        let secrets = || {
            let key = EdgeKey::open(dir.path()).unwrap();
            let mut all = Vec::new();
            for parent in ["a", "b"] {
                for child in ["a", "b", "ab"] {
                    for image in ["x", "y"] {
                        let exports = key.exports_of(&host(parent));
                        all.push(exports.secret(&host(child), &target(image)));
                    }
                }
            }
            all
        };
        let first = secrets();
        assert_eq!(first, secrets());
        let distinct: std::collections::BTreeSet<_> = first.iter().collect();
        assert_eq!(distinct.len(), first.len());
        assert!(
            first
                .iter()
                .all(|s| s.len() == 32 && s.bytes().all(|b| b.is_ascii_hexdigit()))
        );
        use std::os::unix::fs::PermissionsExt as _;
        let mode = std::fs::metadata(dir.path().join(FILE)).unwrap().permissions();
        assert_eq!(mode.mode() & 0o777, 0o600);
        std::fs::write(dir.path().join(FILE), "short").unwrap();
        assert!(matches!(
            EdgeKey::open(dir.path()),
            Err(EdgesError::Damaged { .. })
        ));
    }

    #[test]
    fn keys_do_not_print() {
        let dir = tempfile::tempdir().unwrap();
        let key = EdgeKey::open(dir.path()).unwrap();
        let exports = key.exports_of(&HostName::new("a").unwrap());
        assert_eq!(format!("{key:?} {exports:?}"), "EdgeKey(…) ExportKey(…)");
        assert_eq!(ExportKey::from_text(&exports.to_text()), Some(exports.clone()));
        assert_eq!(ExportKey::from_bytes(&exports.to_bytes()), Some(exports));
    }
}
