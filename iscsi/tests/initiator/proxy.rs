//! A TCP proxy that swallows, cuts and delays.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Pass,
    /// Bytes go in and none come out, either way; so does a stopped process or a cut link look.
    Swallow,
    /// Connections end, new ones too.
    Cut,
    /// Each piece from the target takes this many milliseconds.
    Delay(u64),
    /// One bit of each larger piece from the target is another.
    Change,
}

pub(crate) struct Proxy {
    pub(crate) addr: SocketAddr,
    mode: Arc<watch::Sender<Mode>>,
    accept: tokio::task::JoinHandle<()>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accept.abort();
        self.set(Mode::Cut);
    }
}

impl Proxy {
    pub(crate) async fn start(to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let mode = Arc::new(watch::Sender::new(Mode::Pass));
        let of_task = mode.clone();
        let accept = tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                if *of_task.borrow() == Mode::Cut {
                    continue;
                }
                tokio::spawn(carry(near, to, of_task.subscribe()));
            }
        });
        Self { addr, mode, accept }
    }

    pub(crate) fn portal(&self) -> String {
        self.addr.to_string()
    }

    pub(crate) fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }
}

async fn carry(near: TcpStream, to: SocketAddr, mode: watch::Receiver<Mode>) {
    let Ok(far) = TcpStream::connect(to).await else {
        return;
    };
    near.set_nodelay(true).unwrap();
    far.set_nodelay(true).unwrap();
    let (near_read, near_write) = near.into_split();
    let (far_read, far_write) = far.into_split();
    let mut cut = mode.clone();
    tokio::select! {
        () = pump(near_read, far_write, mode.clone(), false) => {}
        () = pump(far_read, near_write, mode, true) => {}
        _ = cut.wait_for(|mode| *mode == Mode::Cut) => {}
    }
}

async fn pump(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mode: watch::Receiver<Mode>,
    from_target: bool,
) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let read = match from.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(read) => read,
        };
        let now = *mode.borrow();
        match now {
            Mode::Swallow => continue,
            Mode::Delay(ms) if from_target => tokio::time::sleep(Duration::from_millis(ms)).await,
            Mode::Change if from_target && read > 4096 => buffer[read / 2] ^= 0x10,
            _ => {}
        }
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}
