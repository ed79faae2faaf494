//! Starting `iscsiadm`, the only program that this crate starts.

use std::io::Read as _;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::error::{ExitCode, OpenIscsiError};

/// Of what the program prints so much is kept, its end.
const SAID_BYTES: usize = 400;

/// How long a killed child may take to be gone before it is left to a thread of its own.
const DIES_WITHIN: Duration = Duration::from_secs(1);

/// Runs `iscsiadm` for at most `limit`.
pub(super) fn run(program: &Path, args: &[&str], limit: Duration) -> Result<(), OpenIscsiError> {
    let command = args.join(" ");
    let mut child = Command::new(program)
        .args(args)
        // Messages that go into errors in one language, and no pager or terminal.
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|source| OpenIscsiError::NoProgram {
            program: program.into(),
            source,
        })?;
    let mut said = Vec::new();
    let ended = wait(&mut child, limit, &mut said);
    if !ended {
        kill(child);
        return Err(OpenIscsiError::Killed { command, limit });
    }
    let code = child.wait().ok().and_then(|status| status.code());
    match code {
        Some(0) => Ok(()),
        Some(code) => Err(OpenIscsiError::Failed {
            command,
            code: ExitCode::of(code),
            said: last_of(&said),
        }),
        None => Err(OpenIscsiError::Killed { command, limit }),
    }
}

/// Waits until the child has ended, keeping the end of what it says; `false`: the limit passed. What its own children print
/// later (iscsiadm may start the daemon) is not waited for.
fn wait(child: &mut Child, limit: Duration, said: &mut Vec<u8>) -> bool {
    let end = Instant::now() + limit;
    let mut pipe = child.stderr.take();
    let Ok(process) = pidfd_open(Pid::from_child(child), PidfdFlags::empty()) else {
        // A kernel before 5.3: without its handle there is only looking.
        return crate::lio::wait_until(limit, || child.try_wait().ok().flatten()).is_some();
    };
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        let mut watched = vec![PollFd::new(&process, PollFlags::IN)];
        if let Some(pipe) = &pipe {
            watched.push(PollFd::from_borrowed_fd(pipe.as_fd(), PollFlags::IN));
        }
        let timeout = Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        // Interrupted: look again.
        let _ = poll(&mut watched, Some(&timeout));
        let is_ready = |index: usize| watched.get(index).is_some_and(|fd| !fd.revents().is_empty());
        let (ended, speaks) = (is_ready(0), is_ready(1));
        drop(watched);
        if speaks && !read_some(&mut pipe, said) {
            pipe = None;
        }
        // What it said last is read before it is let go.
        if ended && !speaks {
            return true;
        }
    }
}

/// One read, which does not wait because there is something; `false` at the end.
fn read_some(pipe: &mut Option<ChildStderr>, said: &mut Vec<u8>) -> bool {
    let mut buf = [0; 512];
    match pipe.as_mut().map(|pipe| pipe.read(&mut buf)) {
        Some(Ok(n)) if n > 0 => {
            said.extend_from_slice(buf.get(..n).unwrap_or_default());
            let surplus = said.len().saturating_sub(SAID_BYTES);
            said.drain(..surplus);
            true
        }
        _ => false,
    }
}

fn kill(mut child: Child) {
    // It has ended by itself in this moment, or ends now.
    let _ = child.kill();
    let gone = crate::lio::wait_until(DIES_WITHIN, || child.try_wait().ok().flatten());
    if gone.is_none() {
        // It hangs in the kernel; whoever waits for it must not be a caller.
        std::thread::spawn(move || child.wait());
    }
}

/// The last of what was said, on one line.
fn last_of(said: &[u8]) -> String {
    let text = String::from_utf8_lossy(said);
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    lines.join("; ").escape_debug().to_string()
}
