//! The cache group of a host: what was configured, what was changed since, and what of that outlives the agent.
//!
//! The configured directories are members from the start. What is added, removed and pinned while the agent runs stands in one small file of the
//! state directory. Everything here may block.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use treeboot_block::{CacheGroup, GroupError, GroupReport, MemberSpec, MemberState};
use treeboot_types::Digest;

use super::Trouble;
use crate::host::{Room, RoomLevel};

/// The file in the state directory.
const FILE: &str = "cache-group.json";

/// Why a change of the group failed.
#[derive(Debug, thiserror::Error)]
pub enum CachingError {
    /// The group refuses.
    #[error(transparent)]
    Group(#[from] GroupError),
    /// It is done, and the next agent will not know.
    #[error("it is done, but '{}' cannot be written: after its next start the agent does not know of it", path.display())]
    Save {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
}

/// What outlives the agent.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Kept {
    /// Members beside the configured ones.
    added: Vec<KeptMember>,
    /// Configured ones that are members no more.
    removed: Vec<PathBuf>,
    /// The bytes that each pinned image needs, by digest.
    pins: BTreeMap<String, u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct KeptMember {
    path: PathBuf,
    budget_bytes: Option<u64>,
}

/// See the module.
pub struct Caching {
    group: Arc<CacheGroup>,
    configured: Vec<MemberSpec>,
    file: PathBuf,
    /// One change at a time.
    kept: Mutex<Kept>,
}

impl Caching {
    /// Opens the group: the configured members and what was changed since.
    ///
    /// # Errors
    /// None of the directories can be used.
    pub fn open(state: &Path, configured: Vec<MemberSpec>) -> Result<Self, GroupError> {
        let file = state.join(FILE);
        let kept = load(&file);
        let members: Vec<_> = configured
            .iter()
            .filter(|spec| !kept.removed.contains(&spec.path))
            .cloned()
            .chain(kept.added.iter().map(|member| MemberSpec {
                path: member.path.clone(),
                budget: member.budget_bytes,
            }))
            .collect();
        let pins = kept
            .pins
            .iter()
            .filter_map(|(digest, bytes)| Some((digest.parse().ok()?, *bytes)));
        Ok(Self {
            group: CacheGroup::open(&members, pins.collect())?,
            configured,
            file,
            kept: Mutex::new(kept),
        })
    }

    /// The group.
    pub fn group(&self) -> &Arc<CacheGroup> {
        &self.group
    }

    /// How the group is.
    pub fn report(&self) -> GroupReport {
        self.group.report()
    }

    /// Adds a directory.
    ///
    /// # Errors
    /// [`CachingError`].
    pub fn add(&self, spec: MemberSpec) -> Result<(), CachingError> {
        let mut kept = self.kept.lock();
        self.group.add(spec.clone())?;
        kept.removed.retain(|path| *path != spec.path);
        kept.added.retain(|member| member.path != spec.path);
        if !self.configured.contains(&spec) {
            // One that is configured with another budget has this one from now on.
            if self
                .configured
                .iter()
                .any(|configured| configured.path == spec.path)
            {
                kept.removed.push(spec.path.clone());
            }
            kept.added.push(KeptMember {
                path: spec.path,
                budget_bytes: spec.budget,
            });
        }
        self.save(&kept)
    }

    /// Forgets a directory.
    ///
    /// # Errors
    /// [`CachingError`].
    pub fn remove(&self, path: &Path, keep_files: bool) -> Result<(), CachingError> {
        let mut kept = self.kept.lock();
        self.group.remove(path, keep_files)?;
        kept.added.retain(|member| member.path != path);
        if self.configured.iter().any(|spec| spec.path == path)
            && !kept.removed.iter().any(|removed| removed == path)
        {
            kept.removed.push(path.into());
        }
        self.save(&kept)
    }

    /// Keeps an image of `bytes` bytes, or no longer.
    ///
    /// # Errors
    /// [`CachingError`].
    pub fn pin(&self, digest: &Digest, bytes: u64, pinned: bool) -> Result<(), CachingError> {
        let mut kept = self.kept.lock();
        match pinned {
            true => self.group.pin(digest, bytes)?,
            false => {
                self.group.unpin(digest);
            }
        }
        let pins = self.group.pins().into_iter();
        kept.pins = pins.map(|(digest, bytes)| (digest.to_string(), bytes)).collect();
        self.save(&kept)
    }

    fn save(&self, kept: &Kept) -> Result<(), CachingError> {
        let write = || -> io::Result<()> {
            let new = self.file.with_extension("new");
            std::fs::write(&new, serde_json::to_vec_pretty(kept)?)?;
            std::fs::File::open(&new)?.sync_all()?;
            std::fs::rename(&new, &self.file)
        };
        write().map_err(|source| CachingError::Save {
            path: self.file.clone(),
            source,
        })
    }

    /// What is wrong with members.
    pub fn troubles(&self) -> Vec<Trouble> {
        let members = self.report().members.into_iter();
        let told = members.filter_map(|member| {
            let why = match member.state {
                // One that is full is used; `treeboot cache show` says so.
                MemberState::Working | MemberState::Full => return None,
                MemberState::Failed(why) => format!(
                    "{why}; it is dropped, and what it had is fetched again; mend it and say 'treeboot cache add', or 'treeboot cache remove'"
                ),
            };
            Some(Trouble {
                kind: "cache",
                name: member.path.display().to_string(),
                why,
            })
        });
        told.collect()
    }

    /// A look at the members, from time to time.
    pub fn look(&self, unix_ms: u64) {
        self.group.look(unix_ms, |room| {
            let room = Room {
                free_bytes: room.free_bytes,
                size_bytes: room.size_bytes,
            };
            room.level() == RoomLevel::Full
        });
    }
}

fn load(file: &Path) -> Kept {
    let read = std::fs::read(file);
    match read.map(|bytes| serde_json::from_slice(&bytes)) {
        Ok(Ok(kept)) => kept,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Kept::default(),
        Ok(Err(error)) => {
            tracing::warn!(file = %file.display(), %error, "what was changed of the cache group is not known any more; the configured directories are used");
            Kept::default()
        }
        Err(error) => {
            tracing::warn!(file = %file.display(), %error, "what was changed of the cache group cannot be read; the configured directories are used");
            Kept::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(caching: &Caching) -> Vec<(PathBuf, Option<u64>)> {
        let members = caching.report().members.into_iter();
        members.map(|member| (member.path, member.budget)).collect()
    }

    #[test]
    fn what_was_added_removed_and_pinned_is_so_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let spec = |name: &str, budget| MemberSpec {
            path: dir.path().join(name),
            budget,
        };
        let configured = vec![spec("a", None), spec("b", Some(1 << 20))];
        let open = || Caching::open(dir.path(), configured.clone()).unwrap();
        let digest = Digest([7; 32]);
        {
            let caching = open();
            assert_eq!(paths(&caching).len(), 2);
            caching.add(spec("c", Some(2 << 20))).unwrap();
            caching.remove(&dir.path().join("b"), false).unwrap();
            caching.pin(&digest, 4096, true).unwrap();
            assert!(matches!(
                caching.remove(&dir.path().join("b"), false),
                Err(CachingError::Group(GroupError::NoMember { .. }))
            ));
        }
        {
            let caching = open();
            let c = (dir.path().join("c"), Some(2 << 20));
            assert_eq!(paths(&caching), [(dir.path().join("a"), None), c]);
            assert!(caching.group().pins().contains_key(&digest));
            caching.pin(&digest, 4096, false).unwrap();
            caching.add(spec("b", Some(3 << 20))).unwrap();
        }
        let caching = open();
        assert!(paths(&caching).contains(&(dir.path().join("b"), Some(3 << 20))));
        assert!(caching.group().pins().is_empty());
        drop(caching);
        std::fs::write(dir.path().join(FILE), "{").unwrap();
        assert_eq!(paths(&open()).len(), 2);
    }

    #[test]
    fn a_directory_that_goes_is_a_trouble() {
        let dir = tempfile::tempdir().unwrap();
        let spec = |name: &str| MemberSpec {
            path: dir.path().join(name),
            budget: None,
        };
        let caching = Caching::open(dir.path(), vec![spec("a"), spec("b")]).unwrap();
        caching.look(1);
        assert_eq!(caching.troubles(), []);
        std::fs::remove_dir_all(dir.path().join("a")).unwrap();
        caching.look(2);
        let [trouble] = &caching.troubles()[..] else {
            panic!("{:?}", caching.troubles());
        };
        assert!(
            trouble.kind == "cache" && trouble.why.contains("treeboot cache add"),
            "{trouble:?}"
        );
        caching.add(spec("a")).unwrap();
        assert_eq!(caching.troubles(), []);
    }
}
