//! Bugs that the simulation plants to see that its checkers bite (`docs/decisions/0125-bugs-are-planted-by-a-feature.md`).
//!
//! Without the feature `planted-bugs`, which nothing that is shipped has, [`planted`] is the constant `false`.

/// A bug of the coordinator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// A place outlives its lease.
    LeaseLeaks,
    /// Whatever time passed counts for leases, heard or not.
    LeaseClockJumps,
    /// A registration on parents that the host no longer has is taken.
    RegisterNotFenced,
    /// A late removal takes away the place of a later joining.
    RemoveNotFenced,
    /// A share that was given counts as free.
    SlotTwice,
    /// A fallback is a host that stands below.
    FallbackBelow,
    /// A host changes its home and keeps its children in the old one.
    HomeWithChildren,
    /// A host that the record lacks is put under parents that have no room.
    AdoptionWithoutRoom,
    /// A beat that was under way brings back what was removed.
    RemovedComesBack,
    /// A host whose children were taken away is not told.
    LossOfChildrenNotTold,
    /// A removal stays in the record.
    RemovalNotSaved,
    /// What is decided under one number differs.
    EpochReused,
    /// A departure plants the whole tree anew.
    MovesEverybody,
}

#[cfg(feature = "planted-bugs")]
mod switch {
    use std::cell::Cell;

    use super::Bug;

    thread_local! {
        static PLANTED: Cell<Option<Bug>> = const { Cell::new(None) };
    }

    /// Plants a bug in whatever this thread steps from now on; none takes it away.
    pub fn plant(bug: Option<Bug>) {
        PLANTED.set(bug);
    }

    pub(crate) fn is_planted() -> bool {
        PLANTED.get().is_some()
    }

    pub(crate) fn planted(bug: Bug) -> bool {
        PLANTED.get() == Some(bug)
    }
}

#[cfg(feature = "planted-bugs")]
pub use switch::plant;
#[cfg(feature = "planted-bugs")]
pub(crate) use switch::{is_planted, planted};

#[cfg(not(feature = "planted-bugs"))]
pub(crate) const fn is_planted() -> bool {
    false
}

#[cfg(not(feature = "planted-bugs"))]
pub(crate) const fn planted(_: Bug) -> bool {
    false
}
