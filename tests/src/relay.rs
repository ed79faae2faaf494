//! A TCP relay between two daemons: it counts the bytes that cross it, holds them back, and breaks.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Result;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Bytes that are passed on at once.
const BUFFER_BYTES: usize = 32 << 10;

#[derive(Debug)]
struct Shared {
    to: SocketAddr,
    /// Sent to the far side, and back.
    there: AtomicU64,
    back: AtomicU64,
    /// Up to how many bytes to the far side pass; the next ones wait.
    gate: watch::Sender<u64>,
    /// What is sent back is held, whatever it is.
    mute: watch::Sender<bool>,
    /// Once this is seen on its way to the far side, what is sent back is held; and whether it is held itself, too.
    mute_at: Mutex<Option<(Vec<u8>, bool)>>,
    /// Counts breaks: a connection ends when it changes.
    breaks: watch::Sender<u64>,
}

/// The relay; ends when it is dropped.
#[derive(Debug)]
pub struct Relay {
    /// `host:port` to connect to.
    pub address: String,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
        self.break_off();
    }
}

impl Relay {
    /// A relay to an address.
    ///
    /// # Errors
    /// The operating system's.
    pub async fn start(to: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind((to.ip(), 0)).await?;
        let address = listener.local_addr()?.to_string();
        let shared = Arc::new(Shared {
            to,
            there: AtomicU64::new(0),
            back: AtomicU64::new(0),
            gate: watch::Sender::new(u64::MAX),
            mute: watch::Sender::new(false),
            mute_at: Mutex::default(),
            breaks: watch::Sender::new(0),
        });
        let of_task = Arc::clone(&shared);
        let task = tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                tokio::spawn(pass(near, Arc::clone(&of_task)));
            }
        });
        Ok(Self {
            address,
            shared,
            task,
        })
    }

    /// Bytes of both directions that crossed it.
    #[must_use]
    pub fn crossed(&self) -> u64 {
        self.shared.there.load(Ordering::Relaxed) + self.shared.back.load(Ordering::Relaxed)
    }

    /// Bytes that went to the far side.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.shared.there.load(Ordering::Relaxed)
    }

    /// Holds everything back that is sent beyond so many bytes in all.
    pub fn hold_at(&self, bytes: u64) {
        self.shared.gate.send_replace(bytes);
    }

    /// Lets everything pass.
    pub fn open(&self) {
        self.hold_at(u64::MAX);
    }

    /// Holds every answer from when these bytes, which come in one part of a plain connection, go to the far side.
    pub fn mute_at(&self, bytes: &[u8]) {
        *self.shared.mute_at.lock() = Some((bytes.to_vec(), false));
    }

    /// As [`mute_at`](Self::mute_at), and what holds these bytes never comes to the far side.
    pub fn swallow_at(&self, bytes: &[u8]) {
        *self.shared.mute_at.lock() = Some((bytes.to_vec(), true));
    }

    /// Whether answers are held.
    #[must_use]
    pub fn is_mute(&self) -> bool {
        *self.shared.mute.borrow()
    }

    /// Lets answers pass again.
    pub fn unmute(&self) {
        *self.shared.mute_at.lock() = None;
        self.shared.mute.send_replace(false);
    }

    /// Breaks every connection that stands; new ones are taken.
    pub fn break_off(&self) {
        self.shared.breaks.send_modify(|breaks| *breaks += 1);
    }
}

impl Shared {
    fn swallows(&self, bytes: &[u8]) -> bool {
        let mute_at = self.mute_at.lock();
        match mute_at.as_ref() {
            Some((at, swallow)) if bytes.windows(at.len()).any(|part| part == at.as_slice()) => {
                self.mute.send_replace(true);
                *swallow
            }
            _ => false,
        }
    }
}

async fn pass(near: TcpStream, shared: Arc<Shared>) {
    let mut breaks = shared.breaks.subscribe();
    let Ok(far) = TcpStream::connect(shared.to).await else {
        return;
    };
    let _ = near.set_nodelay(true);
    let _ = far.set_nodelay(true);
    let ((mut near_in, mut near_out), (mut far_in, mut far_out)) = (near.into_split(), far.into_split());
    let mut gate = shared.gate.subscribe();
    let mut mute = shared.mute.subscribe();
    let there = async {
        let mut buffer = vec![0; BUFFER_BYTES];
        while let Ok(bytes @ 1..) = near_in.read(&mut buffer).await {
            let sent = shared.there.fetch_add(bytes as u64, Ordering::Relaxed);
            if gate.wait_for(|gate| sent < *gate).await.is_err() {
                return;
            }
            if shared.swallows(&buffer[..bytes]) {
                return std::future::pending().await;
            }
            if far_out.write_all(&buffer[..bytes]).await.is_err() {
                return;
            }
        }
    };
    let back = async {
        let mut buffer = vec![0; BUFFER_BYTES];
        while let Ok(bytes @ 1..) = far_in.read(&mut buffer).await {
            shared.back.fetch_add(bytes as u64, Ordering::Relaxed);
            if mute.wait_for(|mute| !*mute).await.is_err() {
                return;
            }
            if near_out.write_all(&buffer[..bytes]).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = there => {}
        () = back => {}
        _ = breaks.changed() => {}
    }
}
