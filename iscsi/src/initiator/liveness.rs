//! When a session is silent, when it is pinged and when it counts as dead. Pure: the clock is an argument.
//!
//! Silence is measured only while something is owed: a command without its response, or a ping without its
//! answer. Anything that the peer sends ends it, because a parent that is slow is not a parent that is gone.

use treeboot_types::Tick;

/// The bounds of silence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Silence {
    /// Silence in milliseconds after which the peer is pinged and the session is suspect.
    pub ping_ms: u64,
    /// Silence in milliseconds after which the session is dead.
    pub dead_ms: u64,
    /// Milliseconds after which a session with nothing to do is pinged, so that a dead peer is found before the
    /// next command has to wait for it.
    pub idle_ms: u64,
}

impl Default for Silence {
    fn default() -> Self {
        Self {
            ping_ms: 250,
            dead_ms: 750,
            idle_ms: 5_000,
        }
    }
}

/// A look at the clock that comes this much too late means that we ourselves were stopped or starved, and says
/// nothing about the peer.
const OWN_PAUSE_MS: u64 = 100;

/// What to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing.
    Fine,
    /// Send a ping.
    Ping,
    /// The peer is gone.
    Dead { silent_ms: u64 },
}

/// The record of one session.
#[derive(Debug)]
pub(super) struct Liveness {
    silence: Silence,
    heard: Tick,
    /// Since when something is owed.
    owed_since: Option<Tick>,
    ping_unanswered: bool,
    suspect: bool,
}

impl Liveness {
    pub(super) fn new(now: Tick, silence: Silence) -> Self {
        Self {
            silence,
            heard: now,
            owed_since: None,
            ping_unanswered: false,
            suspect: false,
        }
    }

    /// The peer sent something.
    pub(super) fn heard(&mut self, now: Tick) {
        self.heard = now;
        self.suspect = false;
    }

    /// A ping has its answer.
    pub(super) fn ping_answered(&mut self) {
        self.ping_unanswered = false;
    }

    /// The peer owes answers to `commands` commands.
    pub(super) fn owed(&mut self, now: Tick, commands: usize) {
        if commands == 0 && !self.ping_unanswered {
            self.owed_since = None;
        } else if self.owed_since.is_none() {
            self.owed_since = Some(now);
        }
    }

    /// Silent for [`Silence::ping_ms`] while it owes something.
    pub(super) fn suspect(&self) -> bool {
        self.suspect
    }

    /// When [`poll`](Self::poll) is due.
    pub(super) fn due(&self) -> Tick {
        match self.owed_since {
            None => self.heard.after_ms(self.silence.idle_ms),
            Some(since) if self.suspect => self.heard.max(since).after_ms(self.silence.dead_ms),
            Some(since) => self.heard.max(since).after_ms(self.silence.ping_ms),
        }
    }

    /// What to do at `now`. Call it only after all that has arrived was taken with [`heard`](Self::heard).
    pub(super) fn poll(&mut self, now: Tick) -> Verdict {
        if now < self.due() {
            return Verdict::Fine;
        }
        let late_ms = now.since_ms(self.due());
        let Some(owed_since) = self.owed_since else {
            self.owed_since = Some(now);
            self.ping_unanswered = true;
            return Verdict::Ping;
        };
        if self.suspect && late_ms <= OWN_PAUSE_MS {
            return Verdict::Dead {
                silent_ms: now.since_ms(self.heard.max(owed_since)),
            };
        }
        if late_ms > OWN_PAUSE_MS {
            self.owed_since = Some(now);
            return Verdict::Fine;
        }
        self.suspect = true;
        if self.ping_unanswered {
            return Verdict::Fine; // an idle ping is under way and will do
        }
        self.ping_unanswered = true;
        Verdict::Ping
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_that_owes_and_is_silent_is_pinged_then_dead() {
        let mut liveness = Liveness::new(Tick(0), Silence::default());
        liveness.owed(Tick(1_000), 1);
        assert_eq!(liveness.poll(Tick(1_249)), Verdict::Fine);
        assert_eq!(liveness.poll(Tick(1_250)), Verdict::Ping);
        assert!(liveness.suspect());
        assert_eq!(liveness.poll(Tick(1_749)), Verdict::Fine);
        assert_eq!(liveness.poll(Tick(1_750)), Verdict::Dead { silent_ms: 750 });
    }

    #[test]
    fn a_slow_peer_that_answers_pings_lives() {
        let mut liveness = Liveness::new(Tick(0), Silence::default());
        liveness.owed(Tick(0), 1);
        let mut now = Tick(0);
        let mut pings = 0;
        for _ in 0..100 {
            now = liveness.due();
            match liveness.poll(now) {
                Verdict::Ping => pings += 1,
                verdict => panic!("{verdict:?}"),
            }
            now = now.after_ms(400);
            assert_eq!(liveness.poll(now), Verdict::Fine);
            liveness.heard(now);
            liveness.ping_answered();
            liveness.owed(now, 1);
        }
        assert_eq!((pings, now.0), (100, 65_000));
    }

    #[test]
    fn an_idle_session_is_pinged_now_and_then_and_found_dead() {
        let mut liveness = Liveness::new(Tick(0), Silence::default());
        assert_eq!(liveness.poll(Tick(4_999)), Verdict::Fine);
        assert_eq!(liveness.poll(Tick(5_000)), Verdict::Ping);
        assert_eq!(liveness.poll(Tick(5_250)), Verdict::Fine);
        assert_eq!(liveness.poll(Tick(5_750)), Verdict::Dead { silent_ms: 750 });
    }

    #[test]
    fn a_pause_of_our_own_is_not_the_peers() {
        let mut liveness = Liveness::new(Tick(0), Silence::default());
        liveness.owed(Tick(0), 1);
        assert_eq!(liveness.poll(Tick(250)), Verdict::Ping);
        // We were stopped for ten seconds.
        assert_eq!(liveness.poll(Tick(10_000)), Verdict::Fine);
        assert_eq!(liveness.due(), Tick(10_750));
        assert_eq!(liveness.poll(Tick(10_750)), Verdict::Dead { silent_ms: 750 });
    }
}
