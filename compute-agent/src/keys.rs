//! The CHAP secrets of this host: of its exports, of its parents, of its VMs' disks.
//!
//! The coordinator gives the key of the exports with its welcome and each parent's secret with the placement; secrets of disks are
//! made here. All of them are kept in one file for the owner only, so that a host serves and reads after a restart without its
//! coordinator. They are in no journal, no message to others but the one that asks for a disk's, and in no `Debug`. Deliberately
//! absent: who may attach (the placement's word). A host without an identity has no secrets and asks for none.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use treeboot_identity::edges::ExportKey;
use treeboot_identity::files;
use treeboot_iscsi::login::{Chap, Credentials, Secret};
use treeboot_proto::v1;
use treeboot_types::{HostName, Iqn, VmName};

/// The file in the state directory.
const FILE: &str = "secrets.json";
/// Parents of one target whose secrets are kept: those of the last placement, and earlier ones up to this number, because an
/// answer may be overtaken by a newer push.
const PARENTS: usize = 256;

/// Why the secrets cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the secrets in {}", path.display())]
pub struct KeysError {
    path: PathBuf,
    #[source]
    source: std::io::Error,
}

/// A parent's secret as the coordinator gave it.
#[derive(PartialEq, Eq, Serialize, Deserialize)]
struct Given {
    /// The CHAP name; `None`: our initiator's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    user: Option<String>,
    secret: String,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct Held {
    /// The key of the exports.
    exports: Option<String>,
    /// By target and parent.
    parents: BTreeMap<Iqn, BTreeMap<HostName, Given>>,
    /// By VM.
    disks: BTreeMap<VmName, String>,
}

/// The secrets.
pub struct Keys {
    /// `None`: no authority, no secrets.
    path: Option<PathBuf>,
    held: Mutex<Held>,
    /// One writer of the file at a time.
    turn: tokio::sync::Mutex<()>,
    /// Changes that are to be in the file, and those that are.
    wanted: AtomicU64,
    kept: AtomicU64,
    /// Counts changes of secrets that were in use.
    changes: watch::Sender<u64>,
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Keys(…)")
    }
}

impl Keys {
    fn of(path: Option<PathBuf>, held: Held) -> Self {
        Self {
            path,
            held: Mutex::new(held),
            turn: tokio::sync::Mutex::new(()),
            wanted: AtomicU64::new(0),
            kept: AtomicU64::new(0),
            changes: watch::Sender::new(0),
        }
    }

    /// No authority: names are believed, and nobody is asked for a secret.
    #[must_use]
    pub fn none() -> Self {
        Self::of(None, Held::default())
    }

    /// The secrets in the state directory; none yet on a host that is new.
    ///
    /// # Errors
    /// [`KeysError`].
    pub fn open(state: &Path) -> Result<Self, KeysError> {
        let path = state.join(FILE);
        let text = match files::read_if_there(&path) {
            Ok(text) => text.unwrap_or_default(),
            Err(source) => return Err(KeysError { path, source }),
        };
        let held = match serde_json::from_slice(&text) {
            Ok(held) => held,
            Err(_) if text.is_empty() => Held::default(),
            Err(error) => {
                // The coordinator gives them again; a disk's secret is made anew. The error names a place, no value.
                tracing::warn!(file = %path.display(), line = error.line(), "the secrets are damaged and are asked for again");
                Held::default()
            }
        };
        Ok(Self::of(Some(path), held))
    }

    /// Whether iSCSI asks for secrets on this host.
    pub fn is_secure(&self) -> bool {
        self.path.is_some()
    }

    /// Changes of secrets that may be in use.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Takes the key of the exports, and the secrets of the parents of now.
    pub async fn welcomed(&self, welcome: &v1::Welcome) {
        let key = welcome.export_key.as_ref();
        self.take(
            key.and_then(|key| ExportKey::from_bytes(&key.key)),
            &welcome.secrets,
        )
        .await;
    }

    /// Takes the secrets of a place's parents.
    pub async fn placed(&self, placement: &v1::Placement) {
        self.take(None, &placement.secrets).await;
    }

    async fn take(&self, exports: Option<ExportKey>, secrets: &[v1::EdgeSecret]) {
        let (mut new, mut other) = (false, false);
        {
            let mut held = self.held.lock();
            if let Some(text) = exports.map(|key| key.to_text())
                && held.exports.as_ref() != Some(&text)
            {
                held.exports = Some(text);
                other = true;
            }
            for given in secrets {
                let (Ok(host), Ok(target)) = (HostName::new(&given.host), Iqn::new(&given.target)) else {
                    continue;
                };
                let parents = held.parents.entry(target).or_default();
                let given = Given {
                    user: Some(given.user.clone()).filter(|user| !user.is_empty()),
                    secret: given.secret.clone(),
                };
                match parents.get(&host) {
                    None => new = true,
                    Some(old) => other |= *old != given,
                }
                parents.insert(host, given);
                if parents.len() > PARENTS {
                    let last = |host: &HostName| secrets.iter().any(|s| s.host == host.as_str());
                    parents.retain(|host, _| last(host));
                }
            }
        }
        if other {
            self.changes.send_modify(|count| *count += 1);
        }
        if self.is_secure() && (new || other) {
            self.keep().await;
        }
    }

    /// Forgets the parents of an image that is attached no more.
    pub async fn detached(&self, target: &Iqn) {
        let there = self.held.lock().parents.remove(target).is_some();
        if there {
            self.keep().await;
        }
    }

    /// Has a secret for a VM's disk, made where there is none yet.
    pub async fn make_disk(&self, vm: &VmName) {
        if !self.is_secure() {
            return;
        }
        {
            let mut held = self.held.lock();
            if held.disks.contains_key(vm) {
                return;
            }
            held.disks
                .insert(vm.clone(), format!("{:032x}", rand::random::<u128>()));
        }
        self.keep().await;
    }

    /// The secret of a disk that comes from another host with its VM; one of its own where it had none.
    pub async fn take_disk(&self, vm: &VmName, secret: Option<String>) {
        let Some(secret) = secret.filter(|_| self.is_secure()) else {
            return self.make_disk(vm).await;
        };
        self.held.lock().disks.insert(vm.clone(), secret);
        self.keep().await;
    }

    /// Forgets a VM's disk: the next VM of the name gets another secret.
    pub async fn disk_gone(&self, vm: &VmName) {
        let there = self.held.lock().disks.remove(vm).is_some();
        if there {
            self.keep().await;
        }
    }

    async fn keep(&self) {
        let Some(path) = self.path.clone() else { return };
        let mine = self.wanted.fetch_add(1, Ordering::AcqRel) + 1;
        let _turn = self.turn.lock().await;
        // Those who waited share what was written meanwhile.
        if self.kept.load(Ordering::Acquire) >= mine {
            return;
        }
        let covered = self.wanted.load(Ordering::Acquire);
        let text = serde_json::to_vec(&*self.held.lock());
        let written = tokio::task::spawn_blocking(move || {
            let text = text.map_err(std::io::Error::other)?;
            files::write_private(&path, &text)
        });
        match written.await {
            Ok(Ok(())) => self.kept.store(covered, Ordering::Release),
            Ok(Err(error)) => {
                tracing::error!(%error, "secrets cannot be kept: after a restart this host needs its coordinator")
            }
            Err(_) => {
                tracing::error!("secrets cannot be kept: after a restart this host needs its coordinator")
            }
        }
    }

    /// What a child proves itself by at a target of this host; `None`: it cannot.
    pub fn child(&self, initiator: &Iqn, target: &Iqn) -> Option<Chap> {
        let exports = ExportKey::from_text(self.held.lock().exports.as_ref()?)?;
        chap(initiator.as_str(), exports.secret(&initiator.host()?, target))
    }

    /// What every reader of an origin proves itself by, where there is one secret for all.
    pub fn readers(&self, target: &Iqn) -> Option<Chap> {
        let exports = ExportKey::from_text(self.held.lock().exports.as_ref()?)?;
        chap(target.as_str(), exports.shared(target))
    }

    /// What this host proves itself by at a parent's target.
    pub fn parent(&self, own: &Iqn, parent: Option<&HostName>, target: &Iqn) -> Option<Chap> {
        let held = self.held.lock();
        let given = held.parents.get(target)?.get(parent?)?;
        chap(
            given.user.as_deref().unwrap_or(own.as_str()),
            given.secret.clone(),
        )
    }

    /// The secret of a VM's disk; its CHAP name is the initiator's.
    pub fn disk_secret(&self, vm: &VmName) -> Option<String> {
        self.held.lock().disks.get(vm).cloned()
    }

    /// What a VM's front end proves itself by.
    pub fn disk(&self, vm: &VmName) -> Option<Chap> {
        chap(Iqn::of_vm(vm).as_str(), self.disk_secret(vm)?)
    }
}

fn chap(user: &str, secret: String) -> Option<Chap> {
    let credentials = Credentials::new(user, Secret::new(secret).ok()?).ok()?;
    Some(Chap::one_way(credentials))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placement(secrets: &[(&str, &str)]) -> v1::Placement {
        v1::Placement {
            secrets: secrets
                .iter()
                .map(|(host, secret)| v1::EdgeSecret {
                    host: (*host).into(),
                    target: "iqn.2026-11.dev.treeboot:image:x:1".into(),
                    secret: (*secret).into(),
                    user: String::new(),
                })
                .collect(),
            ..v1::Placement::default()
        }
    }

    #[tokio::test]
    async fn secrets_outlive_a_restart_in_a_file_for_the_owner_only() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let (own, child) = (
            Iqn::of_host(&HostName::new("me").unwrap()),
            Iqn::of_host(&HostName::new("c").unwrap()),
        );
        let parent = HostName::new("p").unwrap();
        let target = Iqn::new("iqn.2026-11.dev.treeboot:image:x:1").unwrap();
        let vm = VmName::new("vm").unwrap();
        let keys = Keys::open(dir.path()).unwrap();
        let mut changes = keys.changes();
        assert_eq!(keys.child(&child, &target), None);
        let welcome = v1::Welcome {
            export_key: Some(v1::ExportKey { key: vec![7; 32] }),
            ..v1::Welcome::default()
        };
        keys.welcomed(&welcome).await;
        keys.placed(&placement(&[("p", "0123456789abcdef")])).await;
        keys.make_disk(&vm).await;
        let have = (
            keys.child(&child, &target),
            keys.parent(&own, Some(&parent), &target),
            keys.disk(&vm),
        );
        assert!(have.0.is_some() && have.1.is_some() && have.2.is_some());
        assert_eq!(keys.parent(&own, None, &target), None);
        assert_ne!(keys.child(&own, &target), have.0);
        assert!(!format!("{keys:?} {have:?}").contains("0123456789"));
        let again = Keys::open(dir.path()).unwrap();
        let same = (
            again.child(&child, &target),
            again.parent(&own, Some(&parent), &target),
            again.disk(&vm),
        );
        assert_eq!(have, same);
        let mode = std::fs::metadata(dir.path().join(FILE)).unwrap().permissions();
        assert_eq!(mode.mode() & 0o777, 0o600);
        changes.mark_unchanged();
        keys.placed(&placement(&[
            ("p", "0123456789abcdef"),
            ("q", "0123456789abcdef"),
        ]))
        .await;
        assert!(
            !changes.has_changed().unwrap(),
            "a new parent is no change of a secret"
        );
        keys.placed(&placement(&[("p", "fedcba9876543210")])).await;
        assert!(changes.has_changed().unwrap());
        keys.disk_gone(&vm).await;
        keys.make_disk(&vm).await;
        assert_ne!(
            keys.disk(&vm),
            have.2,
            "another VM of the name has another secret"
        );
    }

    #[tokio::test]
    async fn without_an_authority_there_are_no_secrets() {
        let keys = Keys::none();
        let vm = VmName::new("vm").unwrap();
        keys.make_disk(&vm).await;
        assert!(!keys.is_secure() && keys.disk(&vm).is_none());
    }
}
