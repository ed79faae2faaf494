//! Somebody else's process, held by a descriptor: signals reach exactly that process or nobody.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Most bytes of a command line that are looked at; ours have some 3 KiB.
const MAX_COMMAND_LINE_BYTES: usize = 128 * 1024;

/// A process that was known by its command line when it was opened. No child of ours: it is waited for by its descriptor.
#[derive(Debug)]
pub(crate) struct Process {
    pid: Pid,
    fd: AsyncFd<OwnedFd>,
}

impl Process {
    /// Opens the process `pid` if its command line holds `option` directly followed by `value`; `None` if there is no such
    /// process or it is another one.
    ///
    /// The descriptor is opened before the command line is read, so a reuse of the number in between is seen.
    pub(crate) fn open(pid: i32, option: &str, value: &Path) -> std::io::Result<Option<Self>> {
        // From 2 on: rustix panics at a negative number, and process 1 is never ours.
        let Some(pid) = (pid > 1).then(|| Pid::from_raw(pid)).flatten() else {
            return Ok(None);
        };
        let fd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH | rustix::io::Errno::INVAL) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let line = match std::fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())) {
            Ok(line) => line,
            Err(_) => return Ok(None),
        };
        if !holds(&line, option.as_bytes(), value.as_os_str().as_encoded_bytes()) {
            return Ok(None);
        }
        #[expect(
            deprecated,
            reason = "what it is blamed for (AsRawFd may lie) cannot happen with an OwnedFd; its successor is unsafe to call"
        )]
        let fd = AsyncFd::with_interest(fd, Interest::READABLE)?;
        Ok(Some(Self { pid, fd }))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Whether the process has ended.
    pub(crate) fn ended(&self) -> bool {
        // Signal 0 would reach a zombie too, and not every init reaps at once: a pidfd is readable from the end on.
        let mut polled = [rustix::event::PollFd::new(&self.fd, rustix::event::PollFlags::IN)];
        let now = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        matches!(rustix::event::poll(&mut polled, Some(&now)), Ok(n) if n > 0)
    }

    /// Returns once the process has ended.
    pub(crate) async fn wait(&self) {
        // The descriptor stays readable, so the guard may be dropped. An error means the runtime is going down: nothing to wait for.
        if self.fd.readable().await.is_err() {
            tracing::debug!(pid = self.pid(), "the wait for a process ended with its runtime");
        }
    }

    /// Waits at most `limit`; whether the process has ended.
    pub(crate) async fn wait_for(&self, limit: Duration) -> bool {
        tokio::time::timeout(limit, self.wait()).await.is_ok()
    }

    /// SIGKILL. Nothing happens to a process that has ended.
    pub(crate) fn kill(&self) {
        // ESRCH: it ended by itself, which is what was wanted.
        let _gone = pidfd_send_signal(self.fd.get_ref(), Signal::KILL);
    }
}

/// Whether `line` (words that end with NUL) holds `option` directly followed by `value`.
fn holds(line: &[u8], option: &[u8], value: &[u8]) -> bool {
    let line = line.get(..MAX_COMMAND_LINE_BYTES).unwrap_or(line);
    let mut words = line.split(|&byte| byte == 0);
    while let Some(word) = words.next() {
        if word == option && words.clone().next() == Some(value) {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_is_found_only_with_its_whole_value() {
        let line = b"qemu\0-pidfile\0/run/vm-1/qemu.pid\0-m\x00256\0";
        assert!(holds(line, b"-pidfile", b"/run/vm-1/qemu.pid"));
        assert!(!holds(line, b"-pidfile", b"/run/vm-1"));
        assert!(!holds(line, b"-pidfile", b"/run/vm-10/qemu.pid"));
        assert!(!holds(b"-pidfile", b"-pidfile", b"/x"));
        assert!(!holds(b"", b"-pidfile", b""));
    }

    #[tokio::test]
    async fn a_process_that_is_not_ours_is_not_opened() {
        let me = i32::try_from(std::process::id()).expect("pids fit");
        for pid in [me, 1, 0, -1, i32::MAX] {
            assert!(
                Process::open(pid, "-pidfile", Path::new("/nowhere"))
                    .expect("no error")
                    .is_none()
            );
        }
    }
}
