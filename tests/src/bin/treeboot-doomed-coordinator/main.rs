//! `treeboot-coordinator` that is killed at a write of its record of the test's choice: before it, somewhere within it, or after it. What the
//! record was before and is to be after it is left in two files.

#![forbid(unsafe_code)]

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Parser;
use treeboot_coordinator::daemon::{Daemon, Options};
use treeboot_coordinator::store::{SledStore, Store, StoreError};
use treeboot_coordinator::tree::{Change, Key, Record};

#[derive(Debug, Parser)]
struct Arguments {
    #[command(flatten)]
    options: Options,
    /// The write at which it dies, from 1; 0: none
    #[arg(long, env = "TREEBOOT_DOOM_WRITE", default_value_t = 0)]
    write: u64,
    #[arg(long, env = "TREEBOOT_DOOM_WHEN", value_enum, default_value_t = When::Before)]
    when: When,
    /// For `within`: how long after the write began
    #[arg(long, env = "TREEBOOT_DOOM_MICROSECONDS", default_value_t = 0)]
    microseconds: u64,
    /// Where `before` and `after` are written
    #[arg(long, env = "TREEBOOT_DOOM_STATES", default_value = ".")]
    states: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum When {
    Before,
    Within,
    After,
}

#[derive(Debug)]
struct Doomed {
    store: SledStore,
    writes: AtomicU64,
    write: u64,
    when: When,
    after: Duration,
    states: PathBuf,
}

fn die() -> ! {
    // As the kernel would end it: nothing is closed, nothing is flushed.
    let _ = nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::Signal::SIGKILL);
    std::process::abort()
}

impl Doomed {
    fn leave_states(&self, changes: &[Change]) -> Result<()> {
        let mut records: std::collections::BTreeMap<Key, Record> = self.store.load()?.into_iter().collect();
        leave(&self.states.join("before"), &records)?;
        for change in changes {
            match change {
                Change::Put(key, record) => records.insert(key.clone(), record.clone()),
                Change::Delete(key) => records.remove(key),
            };
        }
        leave(&self.states.join("after"), &records)
    }
}

/// As `kills.rs` reads a record: a line an entry.
fn leave(path: &Path, records: &std::collections::BTreeMap<Key, Record>) -> Result<()> {
    let mut text = String::new();
    for (key, record) in records {
        writeln!(text, "{key:?} {record:?}")?;
    }
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

impl Store for Doomed {
    fn load(&self) -> Result<Vec<(Key, Record)>, StoreError> {
        self.store.load()
    }

    fn apply(&self, changes: &[Change]) -> Result<(), StoreError> {
        if self.writes.fetch_add(1, Ordering::Relaxed) + 1 != self.write {
            return self.store.apply(changes);
        }
        if let Err(error) = self.leave_states(changes) {
            eprintln!("the states cannot be left: {error:#}");
        }
        match self.when {
            When::Before => die(),
            When::Within => {
                let after = self.after;
                let (began, begins) = std::sync::mpsc::channel();
                std::thread::spawn(move || {
                    let _ = began.send(());
                    let since = std::time::Instant::now();
                    // A timer of the system's is too coarse for a write of some hundred microseconds.
                    while since.elapsed() < after {
                        std::hint::spin_loop();
                    }
                    die()
                });
                let _ = begins.recv();
                let _ = self.store.apply(changes);
                // It took less than that: killed after it, then.
                die()
            }
            When::After => {
                let _ = self.store.apply(changes);
                die()
            }
        }
    }
}

fn main() -> ExitCode {
    treeboot_daemon::log_to_stderr();
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        let doom = |store| -> Arc<dyn Store> {
            Arc::new(Doomed {
                store,
                writes: AtomicU64::new(0),
                write: arguments.write,
                when: arguments.when,
                after: Duration::from_micros(arguments.microseconds),
                states: arguments.states.clone(),
            })
        };
        let mut daemon = Daemon::start_over(&arguments.options, doom).await?;
        tokio::select! {
            _ = terminate.recv() => {}
            () = daemon.failed() => anyhow::bail!("the coordinator ended by itself"),
        }
        daemon.stop().await?;
        Ok(())
    })
}
