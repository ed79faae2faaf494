//! Reads of a device that go on beside what a case does, each compared with what it should give.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::rig::read_device;

/// One read.
const RUN: usize = 65_536;

/// What came of the reads so far.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Tally {
    pub(crate) reads: u64,
    pub(crate) errors: u64,
    pub(crate) wrong: u64,
    pub(crate) longest: Duration,
}

/// A thread that reads a device round and round.
pub(crate) struct Reading {
    tally: Arc<Mutex<Tally>>,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Reading {
    pub(crate) fn start(path: PathBuf, bytes: Arc<Vec<u8>>) -> Self {
        let (tally, ended) = (Arc::<Mutex<Tally>>::default(), Arc::<AtomicBool>::default());
        let thread = std::thread::spawn({
            let (tally, ended) = (Arc::clone(&tally), Arc::clone(&ended));
            move || {
                for at in (0..bytes.len()).step_by(RUN).cycle() {
                    if ended.load(Ordering::Relaxed) {
                        return;
                    }
                    let expected = &bytes[at..(at + RUN).min(bytes.len())];
                    let begun = Instant::now();
                    let read = read_device(&path, at as u64, expected.len());
                    let mut tally = tally.lock();
                    tally.longest = tally.longest.max(begun.elapsed());
                    tally.reads += 1;
                    match read {
                        Ok(read) => tally.wrong += u64::from(read != expected),
                        Err(_) => tally.errors += 1,
                    }
                }
            }
        });
        Self {
            tally,
            ended,
            thread: Some(thread),
        }
    }

    pub(crate) fn tally(&self) -> Tally {
        *self.tally.lock()
    }

    /// Waits until `more` further reads were tried.
    pub(crate) async fn go_on(&self, more: u64) -> Tally {
        let from = self.tally().reads;
        super::until("further reads", || self.tally().reads >= from + more).await;
        self.tally()
    }

    pub(crate) fn end(mut self) -> Tally {
        self.ended.store(true, Ordering::Relaxed);
        self.thread
            .take()
            .map(JoinHandle::join)
            .expect("not ended")
            .expect("no panic");
        self.tally()
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}
