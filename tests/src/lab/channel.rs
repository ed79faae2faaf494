//! Commands in a lab host: one TCP connection a command, on the lab's control network, which no shaped or cut link touches.
//!
//! The client sends one line of JSON ([`Request`]), then frames; the server answers with frames. A frame is a kind (one byte), a length (four
//! bytes, big-endian) and so many bytes. A client that goes away ends its command: that is how a time limit is kept.
//!
//! Deliberately absent: authentication. Nothing but the lab's own namespace has a way there.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufWriter};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

use crate::wait::wait_until;

/// The longest frame that is accepted; the server sends what one read of a pipe gave.
pub const MAX_FRAME_BYTES: usize = 64 * 1024;
/// The longest first line.
pub const MAX_REQUEST_BYTES: usize = 256 * 1024;
/// For a connection: long, because whoever asked for the guest while it was down has noted that it is not there.
const CONNECT_WITHIN: Duration = Duration::from_secs(30);
/// For one attempt; the guest's kernel answers at once or is not there.
const ATTEMPT: Duration = Duration::from_secs(3);

/// What a frame holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// For the command's standard input; an empty one is its end.
    Input,
    /// From its standard output.
    Output,
    /// From its standard error.
    Error,
    /// Its exit status as text; the last frame.
    Exit,
}

impl Kind {
    const ALL: [Self; 4] = [Self::Input, Self::Output, Self::Error, Self::Exit];

    fn code(self) -> u8 {
        match self {
            Self::Input => b'i',
            Self::Output => b'o',
            Self::Error => b'e',
            Self::Exit => b'x',
        }
    }

    fn of(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.code() == code)
    }
}

/// What shall run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Request {
    /// The program and its arguments.
    pub argv: Vec<String>,
}

/// The first five bytes of a frame.
///
/// # Errors
/// No such kind, or too long: it is not our peer.
pub fn parse_header(header: [u8; 5]) -> io::Result<(Kind, usize)> {
    let [code, length @ ..] = header;
    let bytes = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
    match Kind::of(code) {
        Some(kind) if bytes <= MAX_FRAME_BYTES => Ok((kind, bytes)),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "not a frame of the lab's channel",
        )),
    }
}

/// The first five bytes of a frame of so many bytes, at most [`MAX_FRAME_BYTES`].
#[must_use]
pub fn header(kind: Kind, bytes: usize) -> [u8; 5] {
    let [a, b, c, d] = u32::try_from(bytes).unwrap_or(u32::MAX).to_be_bytes();
    [kind.code(), a, b, c, d]
}

/// How a command ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Output {
    /// Its exit status; 128 and the signal's number where a signal ended it.
    pub code: i32,
    /// What it printed.
    pub stdout: String,
    /// What it complained of.
    pub stderr: String,
}

/// A command under way. It is ended with this.
#[derive(Debug)]
pub struct Running {
    reader: OwnedReadHalf,
    writer: BufWriter<OwnedWriteHalf>,
    /// Output that is no whole line yet.
    rest: Vec<u8>,
    output: Output,
    ended: bool,
}

impl Running {
    /// Starts a command in the guest that listens at `address`.
    ///
    /// # Errors
    /// The guest does not answer within 30 s.
    pub async fn start(address: SocketAddr, argv: &[&str]) -> Result<Self> {
        let what = format!("an answer from {address}");
        let stream = wait_until(CONNECT_WITHIN, &what, async || {
            match tokio::time::timeout(ATTEMPT, TcpStream::connect(address)).await {
                Ok(Ok(stream)) => Ok(Some(stream)),
                Ok(Err(_)) | Err(_) => Ok(None),
            }
        })
        .await?;
        stream.set_nodelay(true)?;
        let (reader, writer) = stream.into_split();
        let mut running = Self {
            reader,
            writer: BufWriter::new(writer),
            rest: Vec::new(),
            output: Output::default(),
            ended: false,
        };
        let request = Request {
            argv: argv.iter().map(ToString::to_string).collect(),
        };
        let mut line = serde_json::to_vec(&request)?;
        line.push(b'\n');
        running.writer.write_all(&line).await?;
        running.writer.flush().await?;
        Ok(running)
    }

    /// Gives bytes to the command's standard input; none of them is its end.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn input(&mut self, bytes: &[u8]) -> Result<()> {
        // An empty slice has no chunk, and is to be sent all the same.
        let mut parts: Vec<&[u8]> = bytes.chunks(MAX_FRAME_BYTES).collect();
        if parts.is_empty() {
            parts.push(bytes);
        }
        for part in parts {
            self.writer.write_all(&header(Kind::Input, part.len())).await?;
            self.writer.write_all(part).await?;
        }
        self.writer.flush().await?;
        Ok(())
    }

    /// The two directions, for whoever moves the bytes alone.
    #[must_use]
    pub fn into_split(self) -> (OwnedReadHalf, BufWriter<OwnedWriteHalf>) {
        (self.reader, self.writer)
    }

    /// The next line of standard output, without its end; none once the command has ended.
    ///
    /// # Errors
    /// The connection broke before the command ended: the guest, or its time, is over.
    pub async fn next_line(&mut self) -> Result<Option<String>> {
        loop {
            if let Some(at) = self.rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=at).collect();
                return Ok(Some(String::from_utf8_lossy(&line[..at]).into_owned()));
            }
            if self.ended {
                return Ok(None);
            }
            let (kind, bytes) = read_frame(&mut self.reader).await?;
            self.take(kind, &bytes)?;
        }
    }

    fn take(&mut self, kind: Kind, bytes: &[u8]) -> Result<()> {
        match kind {
            Kind::Output => {
                self.rest.extend_from_slice(bytes);
                self.output.stdout += &String::from_utf8_lossy(bytes);
            }
            Kind::Error => self.output.stderr += &String::from_utf8_lossy(bytes),
            Kind::Exit => {
                self.output.code = String::from_utf8_lossy(bytes)
                    .parse()
                    .context("an exit status that is no number")?;
                self.ended = true;
            }
            Kind::Input => bail!("a frame that only the other side may send"),
        }
        Ok(())
    }

    /// Waits for the command's end.
    ///
    /// # Errors
    /// As [`Running::next_line`].
    pub async fn finish(mut self) -> Result<Output> {
        while !self.ended {
            let (kind, bytes) = read_frame(&mut self.reader).await?;
            self.take(kind, &bytes)?;
        }
        Ok(self.output)
    }
}

/// Reads one frame.
///
/// # Errors
/// The connection broke, or carries something else.
pub async fn read_frame(reader: &mut OwnedReadHalf) -> Result<(Kind, Vec<u8>)> {
    let mut header = [0; 5];
    let whole = reader.read_exact(&mut header).await;
    whole.context("the connection to the guest broke")?;
    let (kind, length) = parse_header(header)?;
    let mut bytes = vec![0; length];
    reader
        .read_exact(&mut bytes)
        .await
        .context("the connection to the guest broke")?;
    Ok((kind, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_of_an_unknown_kind_or_length_is_refused() {
        for kind in Kind::ALL {
            assert_eq!(parse_header(header(kind, 7)).unwrap(), (kind, 7));
        }
        assert!(parse_header(*b"q\0\0\0\x01").is_err());
        assert!(parse_header(header(Kind::Output, MAX_FRAME_BYTES + 1)).is_err());
    }
}
