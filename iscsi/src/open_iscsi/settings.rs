//! What our sessions are like, and why.

use std::time::Duration;

use crate::initiator::Digests;
use crate::login::{Chap, DigestTerms};

/// Time limits and sizes of a session. The defaults make a path over a dead parent fail within 5 s, so that dm-multipath goes on
/// with the next one; a path that comes back within a second is never lost at all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Seconds of silence after which the target is pinged. 1 is the least; a ping a second costs nothing.
    pub ping_after_s: u32,
    /// Seconds that a ping may take. Two, because a parent whose processor is taken away for a second is not dead; longer only
    /// makes a silent death (a link cut, a host without power) last longer.
    pub ping_answer_s: u32,
    /// Seconds from a connection's loss until commands fail (`replacement_timeout`), instead of waiting for the connection to come
    /// back. One: dm-multipath waits better than a path does, because it has others.
    pub replacement_s: u32,
    /// Seconds for one attempt to connect and log in. There is one attempt a call; whoever calls repeats.
    pub login_s: u32,
    /// Seconds for a logout's answer, which a dead target never gives.
    pub logout_s: u32,
    /// Seconds for the answer to ABORT TASK, LOGICAL UNIT RESET and TARGET RESET each, after which the connection is dropped.
    pub abort_s: u32,
    /// Seconds for one SCSI command. Only a parent that answers pings and no reads meets it: one that waits for its own
    /// parent, and that takes up to 5 s to fail over itself. Less than three times that would make all of a subtree
    /// leave for its fallbacks, the origin among them, when one host near the root fails over.
    pub command_s: u32,
    /// Seconds for each step of the SCSI layer's error handling.
    pub error_handling_s: u32,
    /// Commands outstanding in a session, a power of two, and at each unit.
    pub commands: u32,
    /// See above.
    pub unit_commands: u32,
    /// CRC32C digests. None by default: dm-verity checks every block.
    pub digests: Digests,
    /// How long units may take to appear after a login.
    pub units_within: Duration,
    /// How long one call of iscsiadm may take before it is killed. A login to a dead portal takes `login_s` and a second.
    pub call_limit: Duration,
    /// How long iscsiadm may take to say its version when the agent starts. It asks nobody for that, so only a machine that is
    /// too busy to start programs meets this limit, and there patience is better than an agent that ends.
    pub start_limit: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            ping_after_s: 1,
            ping_answer_s: 2,
            replacement_s: 1,
            login_s: 3,
            logout_s: 2,
            abort_s: 2,
            command_s: 15,
            error_handling_s: 3,
            commands: 128,
            unit_commands: 64,
            digests: Digests::default(),
            units_within: Duration::from_secs(5),
            call_limit: Duration::from_secs(15),
            start_limit: Duration::from_secs(60),
        }
    }
}

impl Settings {
    /// The longest time from a parent's death to failed commands, by these settings: silence, ping, replacement, and a
    /// second of the timers' own grain.
    pub fn fails_within(&self) -> Duration {
        Duration::from_secs(u64::from(
            self.ping_after_s + self.ping_answer_s + self.replacement_s + 1,
        ))
    }

    /// The keys of a node record, without secrets.
    pub(super) fn record(&self, chap: Option<&Chap>) -> Vec<(&'static str, String)> {
        let digest = |terms| match terms {
            DigestTerms::Never => "None",
            DigestTerms::IfAsked => "None,CRC32C",
            DigestTerms::Prefer => "CRC32C,None",
            DigestTerms::Require => "CRC32C",
        };
        let mut keys: Vec<(&str, String)> = vec![
            // Nothing at boot logs in by our records; the agent does.
            ("node.startup", "manual".into()),
            ("node.conn[0].startup", "manual".into()),
            ("node.session.nr_sessions", "1".into()),
            ("node.session.scan", "auto".into()),
            (
                "node.session.timeo.replacement_timeout",
                self.replacement_s.to_string(),
            ),
            (
                "node.conn[0].timeo.noop_out_interval",
                self.ping_after_s.to_string(),
            ),
            (
                "node.conn[0].timeo.noop_out_timeout",
                self.ping_answer_s.to_string(),
            ),
            ("node.conn[0].timeo.login_timeout", self.login_s.to_string()),
            ("node.conn[0].timeo.logout_timeout", self.logout_s.to_string()),
            ("node.session.initial_login_retry_max", "1".into()),
            ("node.session.err_timeo.abort_timeout", self.abort_s.to_string()),
            (
                "node.session.err_timeo.lu_reset_timeout",
                self.abort_s.to_string(),
            ),
            (
                "node.session.err_timeo.tgt_reset_timeout",
                self.abort_s.to_string(),
            ),
            ("node.session.cmds_max", self.commands.to_string()),
            ("node.session.queue_depth", self.unit_commands.to_string()),
            (
                "node.conn[0].iscsi.HeaderDigest",
                digest(self.digests.header).into(),
            ),
            ("node.conn[0].iscsi.DataDigest", digest(self.digests.data).into()),
        ];
        if chap.is_some() {
            keys.push(("node.session.auth.authmethod", "CHAP".into()));
            keys.push(("node.session.auth.chap_algs", "SHA256,MD5".into()));
        } else {
            keys.push(("node.session.auth.authmethod", "None".into()));
        }
        keys
    }
}
