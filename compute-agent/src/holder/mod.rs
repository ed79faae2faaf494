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
use rustix::process::{Resource, getrlimit};

pub(crate) use client::Holder;
use wire::Word;

/// The word of the agent's command line that makes it a holder; then comes the state directory.
pub const HOLDER: &str = "holder";

/// A new holder that nobody gives anything to ends after this.
const FIRST_WITHIN: Duration = Duration::from_secs(30);
/// How long one who has connected may take to say or to hear a word: less than others wait for an answer. The agent takes milliseconds.
const WORD_WITHIN: Duration = Duration::from_secs(2);
/// Descriptors held at most; the system's own limit of open files is lower on some hosts.
const MOST: usize = 16_384;
/// Open files left for the socket and its clients.
const SPARE: usize = 16;
/// The pause before the next look where the system has no room for a client, or a holder that starts does not listen yet.
const PAUSE: Duration = Duration::from_millis(5);

/// Serves until nothing is held any more. What goes wrong with one client ends that client only.
///
/// # Errors
/// The socket cannot be made, or another holder has it.
pub fn run(state: &Path) -> io::Result<()> {
    let socket = wire::listen(state)?;
    let most = most();
    let mut held = BTreeMap::new();
    let mut was_used = false;
    while !was_used || !held.is_empty() {
        let limit = (!was_used).then_some(FIRST_WITHIN);
        match readable(&socket, limit) {
            Ok(true) => {}
            Ok(false) => break,
            Err(_) => {
                pause();
                continue;
            }
        }
        match wire::accept(&socket, WORD_WITHIN) {
            // Its failure is its own; what is held stays.
            Ok(client) => drop(serve(&client, &mut held, most)),
            // No descriptor or no memory is left for it, or it is gone already.
            Err(_) => pause(),
        }
        // Whoever only looked whether a holder is there does not end a new one.
        was_used |= !held.is_empty();
    }
    wire::forget(state)
}

/// Does what one client says, until it has no more to say.
fn serve(client: &OwnedFd, held: &mut BTreeMap<String, OwnedFd>, most: usize) -> io::Result<()> {
    while readable(client, Some(WORD_WITHIN))? {
        match wire::receive(client)? {
            Some((Word::Put(name), Some(fd))) if held.len() < most => {
                held.insert(name, fd);
            }
            Some((Word::Drop(name), None)) => {
                held.remove(&name);
            }
            Some((Word::List, None)) => {
                for (name, fd) in &*held {
                    wire::send(client, &Word::Put(name.clone()), Some(fd))?;
                }
            }
            // Gone, no agent of ours, or more than can be held.
            _ => break,
        }
        wire::send(client, &Word::Done, None)?;
    }
    Ok(())
}

/// Descriptors that this process may hold, of those that the agent's limit of open files leaves it.
fn most() -> usize {
    let open = getrlimit(Resource::Nofile).current;
    let open = open.and_then(|open| usize::try_from(open).ok());
    open.map_or(MOST, |open| open.saturating_sub(SPARE).min(MOST))
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

#[expect(
    clippy::disallowed_methods,
    reason = "between two looks at a condition that nobody tells of"
)]
fn pause() {
    std::thread::sleep(PAUSE);
}

#[cfg(test)]
mod tests;
