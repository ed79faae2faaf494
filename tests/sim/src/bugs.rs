//! The bugs that can be planted, and how: one switch for each thread, off unless a test turns it.

use std::cell::Cell;

use treeboot_agent::planted as agent;
use treeboot_coordinator::planted as coordinator;

/// Where a bug is planted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// In the trees or the outbox.
    Coordinator(coordinator::Bug),
    /// In the agent's planning.
    Agent(agent::Bug),
    /// In the order that the owner task keeps: answered, then saved.
    AnsweredBeforeSaved,
}

/// All of them, with the names by which they are asked for.
pub const ALL: &[(&str, Bug)] = &[
    ("lease-leaks", Bug::Coordinator(coordinator::Bug::LeaseLeaks)),
    (
        "lease-clock-jumps",
        Bug::Coordinator(coordinator::Bug::LeaseClockJumps),
    ),
    (
        "register-not-fenced",
        Bug::Coordinator(coordinator::Bug::RegisterNotFenced),
    ),
    (
        "remove-not-fenced",
        Bug::Coordinator(coordinator::Bug::RemoveNotFenced),
    ),
    ("slot-twice", Bug::Coordinator(coordinator::Bug::SlotTwice)),
    (
        "fallback-below",
        Bug::Coordinator(coordinator::Bug::FallbackBelow),
    ),
    (
        "home-with-children",
        Bug::Coordinator(coordinator::Bug::HomeWithChildren),
    ),
    (
        "adoption-without-room",
        Bug::Coordinator(coordinator::Bug::AdoptionWithoutRoom),
    ),
    (
        "removed-comes-back",
        Bug::Coordinator(coordinator::Bug::RemovedComesBack),
    ),
    (
        "loss-of-children-not-told",
        Bug::Coordinator(coordinator::Bug::LossOfChildrenNotTold),
    ),
    (
        "removal-not-saved",
        Bug::Coordinator(coordinator::Bug::RemovalNotSaved),
    ),
    ("epoch-reused", Bug::Coordinator(coordinator::Bug::EpochReused)),
    (
        "moves-everybody",
        Bug::Coordinator(coordinator::Bug::MovesEverybody),
    ),
    (
        "older-placement-taken",
        Bug::Agent(agent::Bug::OlderPlacementTaken),
    ),
    ("anybody-let-in", Bug::Agent(agent::Bug::AnybodyLetIn)),
    (
        "parents-before-children-go",
        Bug::Agent(agent::Bug::ParentsBeforeChildrenGo),
    ),
    ("children-not-set", Bug::Agent(agent::Bug::ChildrenNotSet)),
    ("answered-before-saved", Bug::AnsweredBeforeSaved),
];

thread_local! {
    static ANSWERED_BEFORE_SAVED: Cell<bool> = const { Cell::new(false) };
}

/// The bug of a name.
#[must_use]
pub fn find(name: &str) -> Option<Bug> {
    ALL.iter().find(|(known, _)| *known == name).map(|(_, bug)| *bug)
}

/// Plants a bug in all that this thread simulates from now on; none takes it away. Without the feature `planted-bugs` there is
/// nothing to plant.
pub fn plant(bug: Option<Bug>) {
    ANSWERED_BEFORE_SAVED.set(bug == Some(Bug::AnsweredBeforeSaved));
    #[cfg(feature = "planted-bugs")]
    {
        coordinator::plant(match bug {
            Some(Bug::Coordinator(bug)) => Some(bug),
            _ => None,
        });
        agent::plant(match bug {
            Some(Bug::Agent(bug)) => Some(bug),
            _ => None,
        });
    }
}

pub(super) fn is_answered_before_saved() -> bool {
    ANSWERED_BEFORE_SAVED.get()
}
