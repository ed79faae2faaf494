//! A guest that stands still for its disk is counted, and resumed.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

use super::{RunningVm, VmState};
use crate::qmp::{Qmp, QmpError};

/// First and longest wait before a guest that stands still for a disk error is resumed.
const RESUME_BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// A guest that meets no error for so long after it was resumed goes on.
const GOES_ON_AFTER: Duration = Duration::from_secs(1);

/// Counted since this process started or adopted the VM.
#[derive(Debug, Default)]
pub(super) struct Pauses {
    count: AtomicU64,
    now: AtomicBool,
}

impl Pauses {
    /// It stands still. Whether it went on since the last time.
    pub(super) fn begin(&self) -> bool {
        let is_new = !self.now.swap(true, Ordering::Relaxed);
        self.count.fetch_add(u64::from(is_new), Ordering::Relaxed);
        is_new
    }

    /// It goes on. Whether it stood still.
    pub(super) fn end(&self) -> bool {
        self.now.swap(false, Ordering::Relaxed)
    }

    pub(super) fn now(&self) -> bool {
        self.now.load(Ordering::Relaxed)
    }

    pub(super) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }
}

impl RunningVm {
    /// Whether the guest stands still because its disk answers with errors, for instance for want of room. It is resumed again and again.
    pub fn is_paused(&self) -> bool {
        self.pauses.now()
    }

    /// How often it stood still since this process knows it.
    pub fn pauses(&self) -> u64 {
        self.pauses.count()
    }

    /// Keeps the guest going: whenever it stands still for a disk error, it is resumed after a moment, and repeats the
    /// request, so that it never sees the error. Returns once QEMU has ended. Safe to drop at any point; one at a time, since
    /// QEMU tells its events to one listener.
    pub async fn supervise(&self) {
        let mut backoff = RESUME_BACKOFF.0;
        while !self.ended() {
            let watched = async {
                let mut events = Qmp::connect(&self.dir().events()).await?;
                // What happened before we listened.
                if self.state().await? == VmState::DiskError {
                    return Ok(true);
                }
                let stops = async {
                    while let Some(event) = events.event().await? {
                        let stopped = event.data.get("action").and_then(Value::as_str) == Some("stop");
                        if event.name == "BLOCK_IO_ERROR" && stopped {
                            return Ok::<_, QmpError>(true);
                        }
                    }
                    Ok(false)
                };
                tokio::pin!(stops);
                tokio::select! {
                    stops = &mut stops => return stops,
                    () = tokio::time::sleep(GOES_ON_AFTER) => {}
                }
                if self.pauses.end() {
                    tracing::info!(vm = %self.spec.name, "the guest goes on");
                }
                stops.await
            };
            let began = Instant::now();
            let paused = tokio::select! {
                () = self.process.wait() => return,
                paused = watched => paused,
            };
            if began.elapsed() > RESUME_BACKOFF.1 {
                backoff = RESUME_BACKOFF.0;
            }
            if matches!(paused, Ok(true)) && self.pauses.begin() {
                tracing::warn!(vm = %self.spec.name, "the disk answered with an error; the guest is paused, and resumed until it goes on");
            }
            if self.process.wait_for(backoff).await {
                return;
            }
            backoff = (backoff * 2).min(RESUME_BACKOFF.1);
            match paused {
                Ok(true) => {
                    if let Err(error) = self.resume().await {
                        tracing::warn!(vm = %self.spec.name, %error, "cannot resume the guest; trying again");
                    }
                }
                // QEMU hung up: it is about to end, or somebody else listens.
                Ok(false) => {}
                Err(error) => {
                    tracing::debug!(vm = %self.spec.name, %error, "cannot watch QEMU's events; trying again")
                }
            }
        }
    }

    /// Lets a paused guest go on; what failed is repeated. Nothing happens to one that runs.
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn resume(&self) -> Result<(), QmpError> {
        Qmp::ask(&self.dir().qmp(), "cont", json!({})).await.map(drop)
    }
}
