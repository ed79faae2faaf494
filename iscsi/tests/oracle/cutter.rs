//! A proxy that cuts each connection after a number of bytes in either direction, at any place within a PDU.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};

pub(crate) struct Cutter {
    pub(crate) addr: SocketAddr,
    pub(crate) cuts: Arc<AtomicU64>,
    accept: tokio::task::JoinHandle<()>,
}

impl Drop for Cutter {
    fn drop(&mut self) {
        self.accept.abort();
    }
}

impl Cutter {
    pub(crate) async fn start(to: SocketAddr, seed: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let cuts = Arc::new(AtomicU64::new(0));
        let cut_count = cuts.clone();
        let accept = tokio::spawn(async move {
            let mut random = StdRng::seed_from_u64(seed);
            while let Ok((near, _)) = listener.accept().await {
                // Some in the login, most between some hundred bytes and a megabyte, by powers of two.
                let budget = |random: &mut StdRng| {
                    let most = 1u64 << random.random_range(7..=20);
                    random.random_range(1..=most)
                };
                let budgets = (budget(&mut random), budget(&mut random));
                let reset = random.random();
                tokio::spawn(carry(near, to, budgets, reset, cut_count.clone()));
            }
        });
        Self { addr, cuts, accept }
    }
}

async fn carry(near: TcpStream, to: SocketAddr, budgets: (u64, u64), reset: bool, cuts: Arc<AtomicU64>) {
    let Ok(far) = TcpStream::connect(to).await else {
        return;
    };
    for socket in [&near, &far] {
        socket.set_nodelay(true).unwrap();
        if reset {
            let socket = socket2::SockRef::from(socket);
            socket.set_linger(Some(Duration::ZERO)).unwrap();
        }
    }
    let (near_read, near_write) = near.into_split();
    let (far_read, far_write) = far.into_split();
    let cut = tokio::select! {
        cut = pump(near_read, far_write, budgets.0) => cut,
        cut = pump(far_read, near_write, budgets.1) => cut,
    };
    cuts.fetch_add(cut.into(), Ordering::Relaxed);
}

/// `true`: the budget is used up.
async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut budget: u64) -> bool {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let read = match from.read(&mut buffer).await {
            Ok(0) | Err(_) => return false,
            Ok(read) => read as u64,
        };
        let cut = read >= budget;
        let some = if cut { budget } else { read } as usize;
        if to.write_all(&buffer[..some]).await.is_err() {
            return false;
        }
        if cut {
            return true;
        }
        budget = budget.saturating_sub(read).max(1);
    }
}
