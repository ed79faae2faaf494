//! Whether the cache group serves, is being left, or is off, and what a person is told of it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use treeboot_types::Digest;

/// A group that is full is begun anew at most this often: where more contents are in use than it has places, it would otherwise
/// never do anything else.
const ANEW_EVERY: Duration = Duration::from_secs(3600);

/// Why the group is left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Why {
    /// It failed, for this reason; it is off for as long as this process lives.
    Failed(String),
    /// It has no place left in this life; the next life begins at once.
    Full,
}

/// What the group is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Phase {
    /// It serves, or would if there were a content.
    Serves,
    /// Bases go past it; whoever fills it must let go, then it is thrown away.
    Leaves(Why),
    /// It failed, and is thrown away.
    Off(String),
}

/// Held by whoever has one of the group's devices open.
pub(super) type Use = Arc<()>;

/// The one memory of all this.
#[derive(Debug)]
pub(super) struct Serving {
    state: Mutex<State>,
    users: Use,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    is_full: bool,
    strikes: u32,
    anew: Option<Instant>,
    /// Contents that are not cached though they should be, and why.
    left_out: BTreeMap<Digest, String>,
}

impl Default for Serving {
    fn default() -> Self {
        Self {
            state: Mutex::new(State {
                phase: Phase::Serves,
                is_full: false,
                strikes: 0,
                anew: None,
                left_out: BTreeMap::new(),
            }),
            users: Use::default(),
        }
    }
}

impl Serving {
    pub(super) fn phase(&self) -> Phase {
        self.state.lock().phase.clone()
    }

    pub(super) fn serves(&self) -> bool {
        self.state.lock().phase == Phase::Serves
    }

    /// One user more.
    pub(super) fn used(&self) -> Use {
        Arc::clone(&self.users)
    }

    /// Whether nobody has a device of the group open.
    pub(super) fn is_let_go(&self) -> bool {
        Arc::strong_count(&self.users) == 1
    }

    /// So many bases gave the cache up; gives how many in this life.
    pub(super) fn strike(&self, strikes: u32) -> u32 {
        let mut state = self.state.lock();
        state.strikes = state.strikes.saturating_add(strikes);
        state.strikes
    }

    /// A content found no place.
    pub(super) fn note_full(&self) {
        self.state.lock().is_full = true;
    }

    /// Whether a full group is to be begun anew now.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        let state = self.state.lock();
        let long_ago = state
            .anew
            .is_none_or(|then| now.duration_since(then) >= ANEW_EVERY);
        state.is_full && long_ago
    }

    /// From now on nobody new uses the group.
    pub(super) fn leave(&self, why: Why) {
        self.state.lock().phase = Phase::Leaves(why);
    }

    /// It is thrown away.
    pub(super) fn left(&self, now: Instant) {
        let mut state = self.state.lock();
        state.phase = match &state.phase {
            Phase::Leaves(Why::Failed(why)) => Phase::Off(why.clone()),
            Phase::Leaves(Why::Full) => {
                state.is_full = false;
                state.strikes = 0;
                state.anew = Some(now);
                Phase::Serves
            }
            other => other.clone(),
        };
    }

    /// Whether a content could be cached, and why not.
    pub(super) fn tell(&self, content: Digest, why: Option<String>) {
        let mut state = self.state.lock();
        match why {
            Some(why) => state.left_out.insert(content, why),
            None => state.left_out.remove(&content),
        };
    }

    /// What a person should know: of the group (`None`), and of each content that is not cached.
    pub(super) fn troubles(&self) -> Vec<(Option<Digest>, String)> {
        let state = self.state.lock();
        let failed = |why: &str| {
            format!(
                "the cache failed: {why}. Reads go to the parents; mend or replace the device, which may keep its label or begin with \
                 zeroes, then restart the agent: it begins the cache anew"
            )
        };
        let of_group = match &state.phase {
            Phase::Serves => None,
            Phase::Leaves(Why::Full) => {
                Some("the cache is full and is being begun anew; reads go to the parents".into())
            }
            Phase::Leaves(Why::Failed(why)) | Phase::Off(why) => Some(failed(why)),
        };
        // Where the group is off, that says it for all of them.
        let contents = state
            .left_out
            .iter()
            .filter(|_| of_group.is_none())
            .map(|(content, why)| {
                (
                    Some(*content),
                    format!("not cached, its reads go to the parents: {why}"),
                )
            });
        of_group
            .clone()
            .map(|why| (None, why))
            .into_iter()
            .chain(contents)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_that_failed_stays_off() {
        let (serving, now) = (Serving::default(), Instant::now());
        assert!(serving.serves() && serving.troubles().is_empty());
        serving.leave(Why::Failed("errors".into()));
        assert!(!serving.serves());
        serving.left(now);
        assert_eq!(serving.phase(), Phase::Off("errors".into()));
        serving.left(now);
        let [(None, why)] = &serving.troubles()[..] else {
            panic!("one trouble");
        };
        assert!(
            why.contains("errors") && why.contains("restart the agent"),
            "{why}"
        );
    }

    #[test]
    fn a_full_group_is_begun_anew_once_in_an_hour() {
        let (serving, now) = (Serving::default(), Instant::now());
        assert!(!serving.is_due(now));
        serving.note_full();
        assert!(serving.is_due(now));
        serving.leave(Why::Full);
        serving.left(now);
        assert!(serving.serves() && !serving.is_due(now));
        serving.note_full();
        assert!(!serving.is_due(now + ANEW_EVERY / 2), "it would never end");
        assert!(serving.is_due(now + ANEW_EVERY));
    }

    #[test]
    fn a_group_is_let_go_when_its_last_user_is_gone() {
        let serving = Serving::default();
        let users = (serving.used(), serving.used());
        assert!(!serving.is_let_go());
        drop(users);
        assert!(serving.is_let_go());
    }

    #[test]
    fn a_content_that_is_cached_after_all_is_no_trouble() {
        let (serving, content) = (Serving::default(), Digest([1; 32]));
        serving.tell(content, Some("no room".into()));
        assert_eq!(serving.troubles().len(), 1);
        serving.tell(content, None);
        assert_eq!(serving.troubles(), []);
    }
}
