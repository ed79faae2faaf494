//! The words between agent and holder: packets of a Unix socket, a descriptor beside where there is one.

use std::fs::{self, File};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use rustix::net::{
    self, AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sockopt,
};
use rustix::process::Pid;

/// The socket in the state directory.
const SOCKET: &str = "holder.sock";
/// A word with a name of a VM, with room to spare.
const WORD_BYTES: usize = 1024;
/// Connections that may wait: the agent opens one at a time.
const BACKLOG: i32 = 8;

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Word {
    /// Keep this descriptor; to the agent: this one is kept.
    Put(String),
    /// Let it go.
    Drop(String),
    /// Give all.
    List,
    /// That was all, or it is done.
    Done,
}

/// The socket's address through its open directory: a path in the state directory may be longer than an address.
fn address(state: &Path) -> io::Result<(File, SocketAddrUnix)> {
    let directory = File::open(state)?;
    let path = format!("/proc/self/fd/{}/{SOCKET}", directory.as_raw_fd());
    Ok((directory, SocketAddrUnix::new(path)?))
}

fn socket() -> io::Result<OwnedFd> {
    Ok(net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

/// Takes the place of the holder, unless one serves there.
pub(super) fn listen(state: &Path) -> io::Result<OwnedFd> {
    if connect(state).is_ok() {
        return Err(io::ErrorKind::AddrInUse.into());
    }
    forget(state)?;
    let (_directory, address) = address(state)?;
    let socket = socket()?;
    net::bind(&socket, &address)?;
    fs::set_permissions(state.join(SOCKET), fs::Permissions::from_mode(0o600))?;
    net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

pub(super) fn forget(state: &Path) -> io::Result<()> {
    match fs::remove_file(state.join(SOCKET)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The process at the other end: of a connection to the holder, the one that listens.
pub(super) fn peer(socket: &OwnedFd) -> io::Result<Pid> {
    Ok(sockopt::socket_peercred(socket)?.pid)
}

pub(super) fn connect(state: &Path) -> io::Result<OwnedFd> {
    let (_directory, address) = address(state)?;
    let socket = socket()?;
    net::connect(&socket, &address)?;
    Ok(socket)
}

/// The next client, to which no word may take longer than `limit`.
pub(super) fn accept(socket: &OwnedFd, limit: Duration) -> io::Result<OwnedFd> {
    let client = net::accept_with(socket, SocketFlags::CLOEXEC)?;
    sockopt::set_socket_timeout(&client, sockopt::Timeout::Send, Some(limit))?;
    Ok(client)
}

pub(super) fn send(to: &OwnedFd, word: &Word, fd: Option<&OwnedFd>) -> io::Result<()> {
    let text = match word {
        Word::Put(name) => format!("put {name}"),
        Word::Drop(name) => format!("drop {name}"),
        Word::List => "list".to_owned(),
        Word::Done => "done".to_owned(),
    };
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<_> = fd.iter().map(|fd| fd.as_fd()).collect();
    if !fds.is_empty() && !beside.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let parts = [IoSlice::new(text.as_bytes())];
    net::sendmsg(to, &parts, &mut beside, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// The next word; `None` at the end, or where it is none.
pub(super) fn receive(from: &OwnedFd) -> io::Result<Option<(Word, Option<OwnedFd>)>> {
    let mut buffer = [0; WORD_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut beside = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut buffer)];
    let got = net::recvmsg(from, &mut parts, &mut beside, RecvFlags::CMSG_CLOEXEC)?;
    let fd = beside.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    let text = buffer.get(..got.bytes).unwrap_or_default();
    let Ok(text) = std::str::from_utf8(text) else {
        return Ok(None);
    };
    let word = match text.split_once(' ') {
        Some(("put", name)) => Word::Put(name.to_owned()),
        Some(("drop", name)) => Word::Drop(name.to_owned()),
        None if text == "list" => Word::List,
        None if text == "done" => Word::Done,
        _ => return Ok(None),
    };
    Ok(Some((word, fd)))
}
