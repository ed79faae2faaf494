//! `treeboot-agent` that is killed right before or right after a step, or a change of its journal, of the test's choice.
//!
//! In the folder `TREEBOOT_DOOM` the test writes a file `doom`, `LIFE NUMBER`: from then on moments are counted, from 1, and the one of
//! that number is the last. A `LIFE` that is another begins to count anew. Each moment's name is added to the file `moments`.

#![forbid(unsafe_code)]

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use clap::Parser;
use parking_lot::Mutex;
use tokio::signal::unix::{SignalKind, signal};
use treeboot_agent::daemon::{Daemon, Options};
use treeboot_agent::holder::{self, HOLDER};
use treeboot_agent::plane::faulty::FaultyPlane;
use treeboot_agent::witness::{Moment, Witness};

#[derive(Debug, Parser)]
struct Arguments {
    #[command(flatten)]
    options: Options,
    /// Where its doom is written
    #[arg(long, env = "TREEBOOT_DOOM")]
    doom: PathBuf,
}

/// Which life, and how many of its moments there were.
#[derive(Debug, Default)]
struct Count {
    life: String,
    moments: u64,
}

/// The life, and the number of its last moment, that are written.
fn written(folder: &Path) -> Option<(String, u64)> {
    let doom = std::fs::read_to_string(folder.join("doom")).ok()?;
    let (life, number) = doom.trim().split_once(' ')?;
    Some((life.to_owned(), number.parse().ok()?))
}

/// Leaves the moment's name; whether it is the last.
fn is_last(folder: &Path, count: &Mutex<Count>, moment: Moment<'_>) -> Result<bool> {
    let Some((life, last)) = written(folder) else {
        return Ok(false);
    };
    let mut count = count.lock();
    if count.life != life {
        *count = Count { life, moments: 0 };
    }
    count.moments += 1;
    let mut file = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(folder.join("moments"))?;
    writeln!(file, "{moment}")?;
    if count.moments == last {
        // Whoever is started next has no doom.
        std::fs::remove_file(folder.join("doom"))?;
        // Still with the lock: no other step comes to its own moment meanwhile. As the kernel would end it: nothing is closed.
        nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::Signal::SIGKILL)?;
    }
    Ok(count.moments == last)
}

fn main() -> ExitCode {
    let mut words = std::env::args_os().skip(1);
    let ended = match (words.next(), words.next()) {
        // It starts itself as the holder of what outlives it.
        (Some(word), Some(state)) if word == HOLDER => holder::run(Path::new(&state)).map_err(Into::into),
        _ => {
            treeboot_daemon::log_to_stderr();
            run(&Arguments::parse())
        }
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let (folder, count) = (arguments.doom.clone(), Mutex::new(Count::default()));
    let witness = Witness::new(move |moment| match is_last(&folder, &count, moment) {
        Ok(false) => {}
        Ok(true) => std::process::abort(),
        Err(error) => eprintln!("the moment cannot be counted: {error:#}"),
    });
    let runtime = tokio::runtime::Runtime::new().context("no runtime")?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut daemon = Daemon::start_over(&arguments.options, |plane, journal| {
            let plane = FaultyPlane::witnessed(plane, witness.clone());
            (Arc::new(plane), journal.witnessed(witness))
        })
        .await?;
        let failed = tokio::select! {
            _ = terminate.recv() => None,
            error = daemon.failed() => Some(error),
        };
        daemon.stop().await;
        failed.map_or(Ok(()), |error| Err(error.into()))
    })
}
