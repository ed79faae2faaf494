//! The guest's side of [`super::channel`]: threads and blocking calls, because a guest has one CPU and starts in a second.

use std::io::{self, BufRead as _, BufReader, Read, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use parking_lot::Mutex;

use super::channel::{Kind, MAX_FRAME_BYTES, MAX_REQUEST_BYTES, Request, header, parse_header};

/// For output that is still in the pipes when the command has ended. What it left in the background may hold them for ever.
const DRAINS_WITHIN: Duration = Duration::from_secs(2);

/// Printed, as a line of its own, once commands are taken.
pub const LISTENS: &str = "LAB-LISTENS";

/// Runs commands for whoever connects, until the guest halts.
///
/// # Errors
/// It cannot listen there.
pub fn serve(address: SocketAddr) -> Result<()> {
    let listener = TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
    println!("{LISTENS}");
    for stream in listener.incoming() {
        let Ok(stream) = stream else {
            continue;
        };
        std::thread::spawn(move || {
            if let Err(error) = one(stream) {
                eprintln!("lab channel: {error:#}");
            }
        });
    }
    Ok(())
}

type Sender = Arc<Mutex<TcpStream>>;

fn send(to: &Sender, kind: Kind, bytes: &[u8]) -> io::Result<()> {
    let mut frame = header(kind, bytes.len()).to_vec();
    frame.extend_from_slice(bytes);
    to.lock().write_all(&frame)
}

fn one(stream: TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    let sender: Sender = Arc::new(Mutex::new(stream.try_clone()?));
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    (&mut reader)
        .take(MAX_REQUEST_BYTES as u64)
        .read_until(b'\n', &mut line)?;
    let request: Request = serde_json::from_slice(&line).context("not a request")?;
    let mut child = match start(&request) {
        Ok(child) => child,
        Err(error) => {
            // As a shell says it.
            send(&sender, Kind::Error, format!("{error:#}\n").as_bytes())?;
            send(&sender, Kind::Exit, b"127")?;
            return Ok(());
        }
    };
    let (drained, all_drained) = mpsc::channel();
    let pipes = [
        (
            Kind::Output,
            child
                .stdout
                .take()
                .map(|pipe| Box::new(pipe) as Box<dyn Read + Send>),
        ),
        (
            Kind::Error,
            child
                .stderr
                .take()
                .map(|pipe| Box::new(pipe) as Box<dyn Read + Send>),
        ),
    ];
    for (kind, pipe) in pipes {
        let (sender, drained) = (Arc::clone(&sender), drained.clone());
        if let Some(pipe) = pipe {
            std::thread::spawn(move || {
                pump(pipe, kind, &sender);
                let _ = drained.send(());
            });
        }
    }
    drop(drained);
    let group = Pid::from_raw(i32::try_from(child.id()).context("a pid fits")?);
    let stdin = child.stdin.take();
    let finished = Arc::new(Mutex::new(false));
    let watched = Arc::clone(&finished);
    std::thread::spawn(move || {
        feed(&mut reader, stdin);
        // The client is gone. Once the child is reaped its number may be another's.
        let finished = watched.lock();
        if !*finished {
            let _ = killpg(group, Signal::SIGKILL);
        }
    });
    let code = wait(&mut child, &finished)?;
    while all_drained.recv_timeout(DRAINS_WITHIN).is_ok() {}
    send(&sender, Kind::Exit, code.to_string().as_bytes())?;
    let _ = sender.lock().shutdown(std::net::Shutdown::Both);
    Ok(())
}

/// Waits for the end and notes it before anybody can take the pid for a living one's.
fn wait(child: &mut Child, finished: &Mutex<bool>) -> Result<i32> {
    use nix::sys::wait::{Id, WaitPidFlag, waitid};
    let pid = Pid::from_raw(i32::try_from(child.id()).context("a pid fits")?);
    // Ended, and not yet reaped.
    waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT)?;
    let mut finished = finished.lock();
    *finished = true;
    let status = child.wait()?;
    Ok(status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or_default()))
}

fn start(request: &Request) -> Result<Child> {
    let (program, arguments) = request
        .argv
        .split_first()
        .context("a request without a program")?;
    Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .with_context(|| format!("could not start {program}"))
}

fn pump(mut pipe: Box<dyn Read + Send>, kind: Kind, to: &Sender) {
    let mut buffer = vec![0; MAX_FRAME_BYTES];
    while let Ok(count) = pipe.read(&mut buffer) {
        if count == 0 || send(to, kind, &buffer[..count]).is_err() {
            return;
        }
    }
}

/// Hands on what comes until the client goes away.
fn feed(reader: &mut impl Read, mut stdin: Option<ChildStdin>) {
    let mut head = [0; 5];
    while reader.read_exact(&mut head).is_ok() {
        let Ok((Kind::Input, length)) = parse_header(head) else {
            return;
        };
        let mut bytes = vec![0; length];
        if reader.read_exact(&mut bytes).is_err() {
            return;
        }
        if bytes.is_empty() {
            stdin = None;
        } else if let Some(pipe) = &mut stdin {
            // A command that reads no more is none of the channel's business.
            let _ = pipe.write_all(&bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::channel::Running;

    #[tokio::test]
    async fn a_command_gives_its_output_its_complaints_and_its_status() {
        let address = listening();
        let argv = ["sh", "-c", "echo out; echo err >&2; cat; exit 3"];
        let mut running = Running::start(address, &argv).await.unwrap();
        running.input(b"in\n").await.unwrap();
        running.input(b"").await.unwrap();
        assert_eq!(running.next_line().await.unwrap().as_deref(), Some("out"));
        let output = running.finish().await.unwrap();
        assert_eq!(
            (output.code, output.stdout.as_str(), output.stderr.as_str()),
            (3, "out\nin\n", "err\n")
        );
        let missing = Running::start(address, &["/no/such/program"]).await.unwrap();
        assert_eq!(missing.finish().await.unwrap().code, 127);
    }

    #[tokio::test]
    async fn a_client_that_goes_away_ends_its_command() {
        let address = listening();
        let argv = ["sh", "-c", "echo $$; read never"];
        let mut running = Running::start(address, &argv).await.unwrap();
        let pid = running.next_line().await.unwrap().unwrap();
        drop(running);
        crate::wait::wait_until(Duration::from_secs(10), "the command's end", async || {
            let gone = !std::path::Path::new(&format!("/proc/{pid}")).exists();
            Ok(gone.then_some(()))
        })
        .await
        .unwrap();
    }

    fn listening() -> SocketAddr {
        // A port that was free a moment ago.
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = free.local_addr().unwrap();
        drop(free);
        std::thread::spawn(move || serve(address));
        // The listener is there once a connection is accepted.
        while TcpStream::connect(address).is_err() {
            std::thread::yield_now();
        }
        address
    }
}
