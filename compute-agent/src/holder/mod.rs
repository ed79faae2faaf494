//! A small process that keeps file descriptors for the agent: what it holds outlives the agent, whatever ends that.
//!
//! It holds the FUSE connections of block devices, which end with their last descriptor. It has one thread, no file of its own but its socket, and ends
//! when it holds nothing any more. Deliberately absent: any use of what it holds. An upgrade of the agent leaves the old holder running; the words between the
//! two are three and do not change.

mod client;
mod wire;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{self, SocketFlags};

pub(crate) use client::Holder;
use wire::Word;

/// The word of the agent's command line that makes it a holder; then comes the state directory.
pub const HOLDER: &str = "holder";

/// A new holder that nobody gives anything to ends after this.
const FIRST_WITHIN: Duration = Duration::from_secs(30);
/// How long one who has connected may take for a word; the agent says all it has to within milliseconds.
const WORD_WITHIN: Duration = Duration::from_secs(5);
/// Descriptors held at most; the system's own limit of open files is lower on most hosts.
const MOST: usize = 16_384;

/// Serves until nothing is held any more.
///
/// # Errors
/// The socket cannot be made, or another holder has it.
pub fn run(state: &Path) -> io::Result<()> {
    let socket = wire::listen(state)?;
    let mut held: BTreeMap<String, OwnedFd> = BTreeMap::new();
    let mut limit = Some(FIRST_WITHIN);
    loop {
        if !readable(&socket, limit)? {
            break;
        }
        let client = net::accept_with(&socket, SocketFlags::CLOEXEC)?;
        while readable(&client, Some(WORD_WITHIN))? {
            match wire::receive(&client) {
                Ok(Some((Word::Put(name), Some(fd)))) if held.len() < MOST => {
                    held.insert(name, fd);
                    limit = None;
                    wire::send(&client, &Word::Done, None)?;
                }
                Ok(Some((Word::Drop(name), None))) => {
                    held.remove(&name);
                    wire::send(&client, &Word::Done, None)?;
                }
                Ok(Some((Word::List, None))) => {
                    for (name, fd) in &held {
                        wire::send(&client, &Word::Put(name.clone()), Some(fd))?;
                    }
                    wire::send(&client, &Word::Done, None)?;
                }
                // Gone, or no agent of ours.
                _ => break,
            }
        }
        // Whoever only looked whether a holder is there does not end a new one.
        if held.is_empty() && limit.is_none() {
            break;
        }
    }
    wire::forget(state)
}

/// Whether something came within the limit.
fn readable(socket: &OwnedFd, limit: Option<Duration>) -> io::Result<bool> {
    let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
    loop {
        let mut polled = [PollFd::new(socket, PollFlags::IN)];
        match poll(&mut polled, limit.as_ref()) {
            Ok(count) => return Ok(count > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests;
