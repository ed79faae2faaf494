//! What sessions that do nothing cost a server in memory.

use std::path::Path;

use anyhow::{Context as _, Result};
use futures_util::StreamExt as _;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::Serialize;
use treeboot_iscsi::initiator::{Session, SessionOptions};
use treeboot_tests::scratch::Scratch;
use treeboot_tests::tgt::Tgt;
use treeboot_types::{Iqn, IscsiUrl};

use super::{LOOPBACK, Server, serve};

/// Logins under way at once.
const LOGINS: usize = 16;
/// File descriptors beside those of the sessions.
const OTHER_FILES: u64 = 64;

/// Resident memory in KiB for each session.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Idle {
    sessions: u32,
    treeboot: Memory,
    tgt: Memory,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct Memory {
    /// Resident with one session, in KiB.
    one_kib: u64,
    /// Resident with all of them, in KiB.
    all_kib: u64,
}

impl Idle {
    pub(super) fn text(&self) -> String {
        let line = |name: &str, memory: &Memory| {
            let each = memory.all_kib.saturating_sub(memory.one_kib) as f64 / f64::from(self.sessions.max(1));
            format!(
                "{name}: {:.1} MiB with one session, {:.1} MiB with {}, {each:.1} KiB a session\n",
                memory.one_kib as f64 / 1024.0,
                memory.all_kib as f64 / 1024.0,
                self.sessions,
            )
        };
        format!(
            "Resident memory, sessions that do nothing\n{}{}",
            line("treeboot", &self.treeboot),
            line("tgt     ", &self.tgt)
        )
    }
}

/// Logs in so many times to a fresh server of each kind.
///
/// # Errors
/// A server does not start, or refuses a session.
pub(super) async fn measure(scratch: &Scratch, treeboot: &Path, disk: &Path, sessions: u32) -> Result<Idle> {
    allow_files(u64::from(sessions) + OTHER_FILES)?;
    let (mut child, server) = serve(scratch, treeboot, "treeboot-idle", disk).await?;
    let treeboot = memory(&server, sessions).await?;
    child.kill()?;
    child.wait()?;
    let tgtd = Tgt::serve(scratch, "tgt-idle", LOOPBACK, disk, false).await?;
    let server = Server {
        name: "tgt",
        pid: tgtd.pid(),
        url: tgtd.url(),
    };
    let tgt = memory(&server, sessions).await?;
    tgtd.kill()?;
    Ok(Idle {
        sessions,
        treeboot,
        tgt,
    })
}

async fn memory(server: &Server, sessions: u32) -> Result<Memory> {
    let url: IscsiUrl = server.url.parse()?;
    let connect = async |number: u32| -> Result<Session> {
        let initiator = Iqn::new(&format!("iqn.2026-11.org.example:idle{number}"))?;
        let options = SessionOptions::new(url.portal(), url.target.clone(), initiator);
        Session::connect(options)
            .await
            .with_context(|| format!("session {number} with {}", server.name))
    };
    let first = connect(0).await?;
    let one_kib = resident_kib(server.pid)?;
    let rest: Vec<Result<Session>> = futures_util::stream::iter(1..sessions)
        .map(connect)
        .buffer_unordered(LOGINS)
        .collect()
        .await;
    let rest = rest.into_iter().collect::<Result<Vec<_>>>()?;
    let all_kib = resident_kib(server.pid)?;
    drop((first, rest));
    Ok(Memory { one_kib, all_kib })
}

/// `VmRSS` of a process (proc(5), `status`).
fn resident_kib(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    number
        .and_then(|number| number.parse().ok())
        .context("a status without VmRSS")
}

/// Lets this process, and those it starts from now on, have so many files open.
fn allow_files(files: u64) -> Result<()> {
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|current| current >= files) {
        return Ok(());
    }
    let raised = Rlimit {
        current: Some(files),
        maximum: limit.maximum,
    };
    setrlimit(Resource::Nofile, raised)
        .with_context(|| format!("{files} open files are too many here; give fewer --idle-sessions"))
}
