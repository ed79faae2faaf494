//! The agent's side: starts the holder where none runs, gives it descriptors and takes them back. All of it blocks for milliseconds.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{PidfdFlags, pidfd_open};

use super::wire::{self, Word};
use super::{pause, readable};

/// How long a holder may take to start.
const STARTS_WITHIN: Duration = Duration::from_secs(5);
/// How long it may take to answer.
const ANSWERS_WITHIN: Duration = Duration::from_secs(5);

/// The holder of one state directory.
#[derive(Debug, Clone)]
pub(crate) struct Holder {
    state: PathBuf,
    /// This program: `program holder DIR` is the holder.
    program: PathBuf,
}

impl Holder {
    pub(crate) fn new(state: &Path) -> Self {
        Self {
            state: state.to_owned(),
            // Also where the file was replaced by a newer one meanwhile.
            program: "/proc/self/exe".into(),
        }
    }

    /// What is held; nothing where no holder runs.
    pub(crate) fn held(&self) -> io::Result<BTreeMap<String, OwnedFd>> {
        let mut held = BTreeMap::new();
        let Some(socket) = self.connect()? else {
            return Ok(held);
        };
        wire::send(&socket, &Word::List, None)?;
        while let (Word::Put(name), Some(fd)) = answer(&socket)? {
            held.insert(name, fd);
        }
        Ok(held)
    }

    /// Has `fd` held, by a holder that is started where none runs. One that ends just then had nothing to hold, or died.
    pub(crate) fn put(&self, name: &str, fd: &OwnedFd) -> io::Result<()> {
        let began = Instant::now();
        loop {
            match self.put_once(name, fd) {
                Err(error) if has_ended(&error) && began.elapsed() < STARTS_WITHIN => pause(),
                other => return other,
            }
        }
    }

    fn put_once(&self, name: &str, fd: &OwnedFd) -> io::Result<()> {
        let socket = match self.connect()? {
            Some(socket) => socket,
            None => self.start()?,
        };
        wire::send(&socket, &Word::Put(name.to_owned()), Some(fd))?;
        done(answer(&socket)?)
    }

    /// Has it let go.
    pub(crate) fn drop_one(&self, name: &str) -> io::Result<()> {
        let Some(socket) = self.connect()? else {
            return Ok(());
        };
        let dropped = wire::send(&socket, &Word::Drop(name.to_owned()), None)
            .and_then(|()| answer(&socket))
            .and_then(done);
        match dropped {
            // It holds nothing any more.
            Err(error) if has_ended(&error) => Ok(()),
            other => other,
        }
    }

    /// What becomes readable when the holder that runs now ends; `None` where none runs.
    pub(crate) fn end(&self) -> io::Result<Option<OwnedFd>> {
        let Some(socket) = self.connect()? else {
            return Ok(None);
        };
        let pid = wire::peer(&socket)?;
        drop(socket);
        let end = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(end) => end,
            Err(Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // It lived all the time, so that the number is not another process's by now.
        match self.connect()? {
            Some(socket) if wire::peer(&socket)? == pid => Ok(Some(end)),
            _ => Ok(None),
        }
    }

    /// A connection to the holder; `None` where none runs. Any other failure must not look as if nothing were held.
    fn connect(&self) -> io::Result<Option<OwnedFd>> {
        match wire::connect(&self.state) {
            Ok(socket) => Ok(Some(socket)),
            Err(error) => match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Ok(None),
                _ => Err(error),
            },
        }
    }

    fn start(&self) -> io::Result<OwnedFd> {
        let mut child = Command::new(&self.program)
            .arg(super::HOLDER)
            .arg(&self.state)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            // Signals to the agent's group are not the holder's.
            .process_group(0)
            .spawn()?;
        let began = Instant::now();
        loop {
            match wire::connect(&self.state) {
                Ok(socket) => {
                    // Whoever is its parent has to see it end.
                    std::thread::Builder::new()
                        .name("holder's end".into())
                        .spawn(move || child.wait())?;
                    return Ok(socket);
                }
                Err(error) if began.elapsed() > STARTS_WITHIN => return Err(error),
                Err(_) => pause(),
            }
            if let Some(status) = child.try_wait()? {
                return Err(io::Error::other(format!("the holder ended with {status}")));
            }
        }
    }
}

fn answer(socket: &OwnedFd) -> io::Result<(Word, Option<OwnedFd>)> {
    if !readable(socket, Some(ANSWERS_WITHIN))? {
        return Err(io::ErrorKind::TimedOut.into());
    }
    wire::receive(socket)?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// Whether a holder that was spoken to is no more.
fn has_ended(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
    )
}

fn done((word, _): (Word, Option<OwnedFd>)) -> io::Result<()> {
    match word {
        Word::Done => Ok(()),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}
