//! For how long nobody has claimed what nobody claims: what a grace period is counted in.
//!
//! Counted is the time in which an agent looked and found a thing unclaimed, not the wall clock's: clocks jump, and while no agent runs
//! nobody asks. It outlives the agent in a small file; what is claimed again, or in doubt, is forgotten. Deliberately absent: which
//! things these are (`doctor`), and their removal (the host's).

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use treeboot_identity::files;

const FILE: &str = "orphans.json";

/// What is removed at the earliest when this long nobody has claimed it, unless a person says otherwise.
pub const GRACE: Duration = Duration::from_secs(600);

#[derive(Debug, Clone, Copy)]
struct Seen {
    /// Counted before this agent's first look at it.
    before: Duration,
    /// When that look was, since the agent's start.
    at: Duration,
}

impl Seen {
    fn so_far(&self, now: Duration) -> Duration {
        self.before.saturating_add(now.saturating_sub(self.at))
    }
}

/// What nobody claims, each since when. `now` is always the time since the agent's start.
#[derive(Debug)]
pub struct Ledger {
    path: PathBuf,
    seen: BTreeMap<String, Seen>,
    /// What earlier agents counted, in milliseconds, of what was not claimed since.
    before: BTreeMap<String, u64>,
    /// What the file holds.
    kept: BTreeMap<String, u64>,
}

impl Ledger {
    /// The ledger in the state directory, at the agent's start. One that cannot be read begins anew, and every grace period with it.
    pub fn open(state: &Path) -> Self {
        let path = state.join(FILE);
        let kept = match files::read_if_there(&path) {
            Ok(None) => Ok(BTreeMap::new()),
            Ok(Some(text)) => serde_json::from_slice(&text).map_err(io::Error::from),
            Err(error) => Err(error),
        };
        let kept: BTreeMap<String, u64> = kept.unwrap_or_else(|error| {
            tracing::warn!(path = %path.display(), %error, "not readable: what nobody claims is counted anew");
            BTreeMap::new()
        });
        Self {
            path,
            seen: BTreeMap::new(),
            before: kept.clone(),
            kept,
        }
    }

    /// Takes in what a look found unclaimed. What it did not find is forgotten, unless it is of a kind that the look was `blind` to.
    pub fn look(&mut self, now: Duration, orphans: &BTreeSet<String>, blind: impl Fn(&str) -> bool) {
        for key in orphans {
            let before = self.before.get(key).copied().unwrap_or_default();
            self.seen.entry(key.clone()).or_insert(Seen {
                before: Duration::from_millis(before),
                at: now,
            });
        }
        self.seen.retain(|key, _| orphans.contains(key) || blind(key));
        self.before.retain(|key, _| orphans.contains(key) || blind(key));
    }

    /// For how long nobody has claimed it.
    pub fn age(&self, now: Duration, key: &str) -> Duration {
        self.seen.get(key).map_or(Duration::ZERO, |seen| seen.so_far(now))
    }

    /// What is to be in the file, and where, if that is not there yet.
    pub fn unsaved(&mut self, now: Duration) -> Option<(PathBuf, Vec<u8>)> {
        let millis = |seen: &Seen| u64::try_from(seen.so_far(now).as_millis()).unwrap_or(u64::MAX);
        let mut wanted = self.before.clone();
        wanted.extend(self.seen.iter().map(|(key, seen)| (key.clone(), millis(seen))));
        if wanted == self.kept {
            return None;
        }
        let text = serde_json::to_vec(&wanted).ok()?;
        self.kept = wanted;
        Some((self.path.clone(), text))
    }
}

/// Writes what [`Ledger::unsaved`] gave. Blocks.
///
/// # Errors
/// The operating system's; the next look tries again.
pub fn save(path: &Path, text: &[u8]) -> io::Result<()> {
    files::write_private(path, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(keys: &[&str]) -> BTreeSet<String> {
        keys.iter().map(|key| (*key).to_owned()).collect()
    }

    fn secs(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    fn saved(ledger: &mut Ledger, now: Duration) {
        if let Some((path, text)) = ledger.unsaved(now) {
            save(&path, &text).unwrap();
        }
    }

    #[test]
    fn what_nobody_claims_grows_older_while_it_is_looked_at_and_over_restarts() {
        let dir = tempfile::tempdir().unwrap();
        let mut ledger = Ledger::open(dir.path());
        let all = |_: &str| false;
        ledger.look(secs(10), &keys(&["delta a", "run b"]), all);
        assert_eq!(ledger.age(secs(10), "delta a"), secs(0));
        assert_eq!(ledger.age(secs(25), "delta a"), secs(15));
        saved(&mut ledger, secs(25));
        assert_eq!(ledger.unsaved(secs(25)), None, "nothing new");
        // The next agent goes on where that one ended; the time between is not counted.
        let mut ledger = Ledger::open(dir.path());
        ledger.look(secs(3), &keys(&["delta a"]), all);
        assert_eq!(ledger.age(secs(4), "delta a"), secs(16));
        // What was claimed meanwhile begins anew.
        ledger.look(secs(5), &keys(&["delta a", "run b"]), all);
        assert_eq!(ledger.age(secs(6), "run b"), secs(1));
        // A look that is blind to a kind forgets nothing of it.
        ledger.look(secs(7), &keys(&["run b"]), |key| key.starts_with("delta"));
        assert_eq!(ledger.age(secs(7), "delta a"), secs(19));
        ledger.look(secs(8), &keys(&[]), all);
        assert_eq!(ledger.age(secs(9), "delta a"), secs(0));
        saved(&mut ledger, secs(9));
        assert_eq!(std::fs::read(dir.path().join(FILE)).unwrap(), b"{}");
    }

    #[test]
    fn a_damaged_ledger_begins_anew() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(FILE), "{\"delta a\": -1").unwrap();
        let mut ledger = Ledger::open(dir.path());
        ledger.look(secs(1), &keys(&["delta a"]), |_| false);
        assert_eq!(ledger.age(secs(1), "delta a"), secs(0));
    }

    #[test]
    fn a_host_without_orphans_has_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let mut ledger = Ledger::open(dir.path());
        ledger.look(secs(1), &keys(&[]), |_| false);
        assert_eq!(ledger.unsaved(secs(1)), None);
    }
}
