//! Bugs that the simulation plants to see that its checkers bite (`docs/decisions/0125-bugs-are-planted-by-a-feature.md`).
//!
//! Without the feature `planted-bugs`, which nothing that is shipped has, [`planted`] is the constant `false`.

/// A bug of the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// An older placement replaces a newer one.
    OlderPlacementTaken,
    /// A relay lets in whoever comes.
    AnybodyLetIn,
    /// New parents come before the children of the old place are dropped.
    ParentsBeforeChildrenGo,
    /// A change of children is not taken to the export.
    ChildrenNotSet,
}

#[cfg(feature = "planted-bugs")]
mod switch {
    use std::cell::Cell;

    use super::Bug;

    thread_local! {
        static PLANTED: Cell<Option<Bug>> = const { Cell::new(None) };
    }

    /// Plants a bug in whatever this thread plans from now on; none takes it away.
    pub fn plant(bug: Option<Bug>) {
        PLANTED.set(bug);
    }

    pub(crate) fn planted(bug: Bug) -> bool {
        PLANTED.get() == Some(bug)
    }
}

#[cfg(feature = "planted-bugs")]
pub use switch::plant;
#[cfg(feature = "planted-bugs")]
pub(crate) use switch::planted;

#[cfg(not(feature = "planted-bugs"))]
pub(crate) const fn planted(_: Bug) -> bool {
    false
}
