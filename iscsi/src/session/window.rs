//! CmdSN, ExpCmdSN, MaxCmdSN.

/// How many commands a session may have in progress. Deep queues of initiators have 32 to 128.
pub const QUEUE_DEPTH: u32 = 128;

/// What becomes of a command that has just arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// It is next.
    Now,
    /// One before it is missing: keep it.
    Later,
    /// Outside the window, or seen before: it is ignored without an answer (RFC 7143 §4.2.2.1).
    Ignore,
}

/// The window of a session.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    expected: u32,
    in_progress: u32,
}

impl Window {
    /// A window that begins with `first`.
    pub fn new(first: u32) -> Self {
        Self {
            expected: first,
            in_progress: 0,
        }
    }

    /// ExpCmdSN.
    #[inline]
    pub fn expected(&self) -> u32 {
        self.expected
    }

    /// MaxCmdSN: it moves only when commands end, so that a session cannot queue without bound.
    #[inline]
    pub fn max(&self) -> u32 {
        let room = QUEUE_DEPTH.saturating_sub(self.in_progress);
        self.expected.wrapping_add(room).wrapping_sub(1)
    }

    /// Where a command that is not immediate stands.
    #[inline]
    pub fn admit(&self, cmd_sn: u32) -> Admission {
        let ahead = cmd_sn.wrapping_sub(self.expected);
        let room = QUEUE_DEPTH.saturating_sub(self.in_progress);
        match ahead {
            _ if ahead >= room => Admission::Ignore,
            0 => Admission::Now,
            _ => Admission::Later,
        }
    }

    /// The command that is next has been taken.
    #[inline]
    pub fn begin(&mut self) {
        self.expected = self.expected.wrapping_add(1);
        self.in_progress += 1;
    }

    /// A command that was taken has been answered or dropped.
    #[inline]
    pub fn end(&mut self) {
        debug_assert!(self.in_progress > 0, "each end has its begin");
        self.in_progress = self.in_progress.saturating_sub(1);
    }
}
