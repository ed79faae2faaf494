//! The words of a path group: what it is told, what it does, what it reports.

use treeboot_types::Iqn;

use crate::login::Chap;
use crate::scsi::alua::Reported;

/// A path among all that a group ever had; never reused within one group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PathId(pub u64);

/// A read among all of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(in crate::initiator) struct ReadId(pub(in crate::initiator) u64);

/// One connection of a path, among all of a group: what is said of an earlier one is ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(in crate::initiator) struct LinkId(pub(in crate::initiator) u64);

/// Where a path leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathSpec {
    /// `host:port`; an IPv6 address in brackets.
    pub portal: String,
    /// The target there.
    pub target: Iqn,
    /// For people and counters: the host's name, or that of an origin.
    pub label: String,
    /// The LUN that holds the data.
    pub data_lun: u16,
    /// The LUN that holds the hash tree, where the target serves one.
    pub hash_lun: Option<u16>,
    /// What we and the target prove ourselves by. Other ones count from the path's next session on; a target to which
    /// they matter ends the old session.
    pub chap: Option<Chap>,
}

impl PathSpec {
    /// Two specs that differ only in their label or their secrets are one path.
    pub(super) fn same_path(&self, other: &Self) -> bool {
        self.portal == other.portal
            && self.target == other.target
            && self.data_lun == other.data_lun
            && self.hash_lun == other.hash_lun
    }
}

/// What a read is for; each path knows its own LUN numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lun {
    /// The image's data.
    Data,
    /// Its hash tree.
    Hash,
}

/// How reads are spread over the active paths that are up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PathPolicy {
    /// By turns.
    #[default]
    RoundRobin,
    /// To the path whose smoothed time for a read, times the reads that it has, is least.
    ServiceTime,
    /// To the path with the fewest reads in flight.
    QueueLength,
}

/// A path's state, as people see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PathState {
    /// A fallback that nobody needs now; it connects when an active path falters.
    Standby,
    /// Connecting for the first time since it was listed.
    Connecting,
    /// Logged in and answering.
    Up,
    /// Logged in, but silent, or alive and not answering reads, or out of use by its own word (ALUA).
    Suspect,
    /// Lost, or refused; it is tried again with growing delays.
    Down,
    /// It shipped wrong bytes.
    Distrusted,
}

/// The bounds of a group's waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// A read for which no path is up ends with an error after this many milliseconds.
    pub wait_ms: u64,
    /// A read ends after this many milliseconds whatever happens.
    pub read_ms: u64,
    /// A read that a path which is alive has not answered for this long is asked of another as well.
    pub hedge_ms: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            wait_ms: 10_000,
            // A guest's own limit on a disk command is 30 s (Linux, SCSI); an answer later than that helps nobody.
            read_ms: 30_000,
            // Longer than a child's parent needs to notice a dead grandparent (750 ms) and to read elsewhere.
            hedge_ms: 1_200,
        }
    }
}

/// One path's figures.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathStats {
    /// The path.
    pub id: PathId,
    /// [`PathSpec::label`].
    pub label: String,
    /// [`PathSpec::portal`].
    pub portal: String,
    /// Listed as active, not as a fallback.
    pub active: bool,
    /// Its state.
    pub state: PathState,
    /// What the target last said of the access to its unit (ALUA).
    pub access: Reported,
    /// Reads that it has not answered.
    pub in_flight: u32,
    /// Reads that it answered.
    pub reads: u64,
    /// Bytes that it answered while it was active.
    pub active_bytes: u64,
    /// Bytes that it answered while it was a fallback.
    pub fallback_bytes: u64,
    /// Failed connects, lost sessions and failed reads.
    pub failures: u64,
    /// Smoothed time of a read in microseconds; 0 before the first.
    pub service_time_us: u64,
    /// What went wrong last.
    pub last_failure: Option<String>,
}

impl PathStats {
    /// Bytes that the path answered in either role.
    pub fn bytes(&self) -> u64 {
        self.active_bytes + self.fallback_bytes
    }
}

/// A group's figures since it was made, paths that left included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GroupTotals {
    /// Bytes that active paths answered.
    pub active_bytes: u64,
    /// Bytes that fallbacks answered.
    pub fallback_bytes: u64,
    /// Reads that were answered.
    pub reads: u64,
    /// Reads that ended with an error.
    pub failed_reads: u64,
    /// Attempts that were moved because their path was lost or answered with an error.
    pub moved: u64,
    /// Second attempts beside a slow first.
    pub hedges: u64,
    /// The longest time in milliseconds from a read's start to its answer.
    pub longest_read_ms: u64,
}

/// What happened.
#[derive(Debug)]
pub(in crate::initiator) enum Event {
    /// The placement changed. Paths that stay keep their session and their figures.
    Listed {
        active: Vec<PathSpec>,
        fallbacks: Vec<PathSpec>,
    },
    /// A connect that was asked for succeeded.
    Connected { path: PathId, link: LinkId },
    /// A connect failed, or a session ended.
    Lost { path: PathId, link: LinkId, why: String },
    /// The target said in which state the access to its unit is; before it does, the best is assumed.
    Access {
        path: PathId,
        link: LinkId,
        access: Reported,
    },
    /// A session fell silent, or spoke again.
    Suspected {
        path: PathId,
        link: LinkId,
        silent: bool,
    },
    /// A read wants to be served.
    Read {
        read: ReadId,
        lun: Lun,
        avoid: Vec<PathId>,
    },
    /// An attempt ended.
    Answered {
        read: ReadId,
        path: PathId,
        link: LinkId,
        outcome: Outcome,
    },
    /// Nobody waits for the read any more.
    Cancelled { read: ReadId },
    /// The path shipped wrong bytes.
    Distrusted { path: PathId },
    /// [`Paths::wake_at`] has come.
    Timer,
}

/// How an attempt ended.
#[derive(Debug)]
pub(in crate::initiator) enum Outcome {
    /// With bytes.
    Bytes { bytes: u64, service_us: u64 },
    /// With an error of this read alone. `lasting`: the same read will fail on this path again.
    Failed { why: String, lasting: bool },
    /// With the end of the session; the same as [`Event::Lost`], seen earlier.
    SessionLost { why: String },
}

/// What the shell must do.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::initiator) enum Effect {
    /// Connect, and report [`Event::Connected`] or [`Event::Lost`].
    Connect {
        path: PathId,
        link: LinkId,
        spec: PathSpec,
    },
    /// End the session, or the connect that is under way.
    Close { path: PathId, link: LinkId },
    /// Ask this path for the read.
    Issue {
        read: ReadId,
        path: PathId,
        link: LinkId,
        lun: u16,
    },
    /// The attempt is no longer wanted; the read goes on elsewhere or waits.
    Abandon {
        read: ReadId,
        path: PathId,
        link: LinkId,
    },
    /// The read has failed.
    Fail { read: ReadId, failure: Failure },
}

/// Why a read failed: what each path had to say.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Failure {
    /// Milliseconds from the read's start.
    pub waited_ms: u64,
    /// Each listed path.
    pub paths: Vec<PathFailure>,
}

/// One path's part in a [`Failure`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathFailure {
    /// [`PathSpec::label`].
    pub label: String,
    /// [`PathSpec::portal`].
    pub portal: String,
    /// Why it did not serve the read.
    pub why: String,
}
