//! The initiator against our own target: real devices, and a tree of hosts.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use treeboot_block::{BlockDevice, BlockError, Extent, Geometry, IoFuture, Provisioning};
use treeboot_iscsi::initiator::{
    CommandError, Lun, PathGroup, PathGroupOptions, PathSpec, PathState, RemoteDevice, Session, discover,
};
use treeboot_iscsi::target::{Access, LunSpec, Server, ServerConfig, TargetSpec};
use treeboot_types::Iqn;

use crate::fake::{DISK_BYTES, image, options, target};
use crate::proxy::{Mode, Proxy};
use crate::session::until;

/// A disk in memory.
pub(crate) struct Memory {
    bytes: Mutex<Vec<u8>>,
    read_only: bool,
}

impl Memory {
    pub(crate) fn new(bytes: Vec<u8>, read_only: bool) -> Arc<Self> {
        Arc::new(Self {
            bytes: Mutex::new(bytes),
            read_only,
        })
    }
}

fn geometry(bytes: u64, read_only: bool) -> Geometry {
    Geometry {
        bytes,
        block_bytes: 512,
        physical_block_bytes: 4096,
        read_only,
        thin: false,
    }
}

impl BlockDevice for Memory {
    fn geometry(&self) -> Geometry {
        geometry(self.bytes.lock().len() as u64, self.read_only)
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> IoFuture<'a, ()> {
        let result = self.check_range(offset, buf.len() as u64);
        if result.is_ok() {
            buf.copy_from_slice(&self.bytes.lock()[offset as usize..][..buf.len()]);
        }
        Box::pin(std::future::ready(result))
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8]) -> IoFuture<'a, ()> {
        let result = self.check_range(offset, data.len() as u64);
        if result.is_ok() {
            self.bytes.lock()[offset as usize..][..data.len()].copy_from_slice(data);
        }
        Box::pin(std::future::ready(result))
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn discard(&self, _: u64, _: u64) -> IoFuture<'_, ()> {
        Box::pin(std::future::ready(Err(BlockError::Unsupported {
            what: "discard",
        })))
    }

    fn extent(&self, _: u64, bytes: u64) -> IoFuture<'_, Extent> {
        let state = Provisioning::Mapped;
        Box::pin(std::future::ready(Ok(Extent { bytes, state })))
    }
}

/// A host's base without its cache: every read goes to the parents.
struct Relay(Arc<PathGroup>);

impl BlockDevice for Relay {
    fn geometry(&self) -> Geometry {
        geometry(DISK_BYTES, true)
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> IoFuture<'a, ()> {
        Box::pin(async move {
            match self.0.read(Lun::Data, offset, buf.len() as u32, &[]).await {
                Ok((data, _)) => {
                    buf.copy_from_slice(&data);
                    Ok(())
                }
                Err(error) => Err(BlockError::Unavailable {
                    what: error.to_string(),
                }),
            }
        })
    }

    fn write<'a>(&'a self, _: u64, _: &'a [u8]) -> IoFuture<'a, ()> {
        Box::pin(std::future::ready(Err(BlockError::ReadOnly)))
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn discard(&self, _: u64, _: u64) -> IoFuture<'_, ()> {
        Box::pin(std::future::ready(Err(BlockError::ReadOnly)))
    }

    fn extent(&self, _: u64, bytes: u64) -> IoFuture<'_, Extent> {
        let state = Provisioning::Mapped;
        Box::pin(std::future::ready(Ok(Extent { bytes, state })))
    }
}

fn serve(devices: Vec<Arc<dyn BlockDevice>>) -> (Server, SocketAddr) {
    serve_with(devices, ServerConfig::default())
}

pub(crate) fn serve_with(devices: Vec<Arc<dyn BlockDevice>>, config: ServerConfig) -> (Server, SocketAddr) {
    let server = Server::bind(&[SocketAddr::from(([127, 0, 0, 1], 0))], config).unwrap();
    let luns = (0..).zip(devices).map(|(lun, device)| LunSpec {
        lun,
        device,
        serial: format!("serial{lun}"),
        product: "TEST".to_owned(),
        ident: [lun as u8; 16],
    });
    server
        .add_target(TargetSpec {
            name: target(),
            luns: luns.collect(),
            access: Access::Anyone,
        })
        .unwrap();
    let at = server.local_addrs()[0];
    (server, at)
}

fn small_random(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
    *state >> 33
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_target_is_found_and_its_units_are_read_and_written() {
    let (server, at) = serve(vec![
        Memory::new(image(0, 0, 1 << 20), true),
        Memory::new(vec![0; 8 << 20], false),
    ]);
    let options = options(&at.to_string());
    let found = discover(&options.portal, &options.initiator, 3_000)
        .await
        .expect("discovery");
    assert_eq!(found, [(target(), vec![at.to_string()])]);
    let session = Session::connect(options).await.expect("a session");
    assert_eq!(session.report_luns().await.expect("luns"), [0, 1]);
    assert_eq!(session.inquiry(0).await.expect("inquiry").product, "TEST");
    assert_eq!(
        session.capacity(1).await.expect("capacity").physical_block_bytes,
        4096
    );
    assert!(session.is_write_protected(0).await.expect("mode sense"));
    assert!(!session.is_write_protected(1).await.expect("mode sense"));
    let refused = session
        .write(0, 0, vec![0; 512].into())
        .await
        .expect_err("read-only");
    assert!(
        matches!(refused, CommandError::Sense(sense) if sense.is_write_protected()),
        "{refused}"
    );
    for bytes in [512, 60_000 / 512 * 512, 300_000 / 512 * 512, 3 << 20] {
        let data = Bytes::from(image(9, bytes as u64, bytes as u64));
        session.write(1, 1 << 20, data.clone()).await.expect("write");
        assert_eq!(session.read(1, 1 << 20, bytes as u32).await.expect("read"), data);
    }
    session.flush(1).await.expect("flush");
    session.close().await;
    until(|| {
        server
            .stats(&target())
            .is_some_and(|stats| stats.sessions.is_empty())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_and_writes_at_once_agree_with_an_oracle() {
    let (_server, at) = serve(vec![Memory::new(vec![0; 32 << 20], false)]);
    let session = Session::connect(options(&at.to_string()))
        .await
        .expect("a session");
    // Each of 32 has a mebibyte of its own, and an oracle of it.
    let workers = (0..32u64).map(|worker| {
        let session = &session;
        async move {
            let mut oracle = vec![0; 1 << 20];
            let mut state = worker + 1;
            for _ in 0..60 {
                let blocks = 1 + small_random(&mut state) % 256;
                let at = small_random(&mut state) % (2048 - blocks) * 512;
                let range = at as usize..(at + blocks * 512) as usize;
                if small_random(&mut state).is_multiple_of(2) {
                    let data = image(worker as u16, small_random(&mut state) * 8, blocks * 512);
                    oracle[range].copy_from_slice(&data);
                    session
                        .write(0, (worker << 20) + at, data.into())
                        .await
                        .expect("write");
                } else {
                    let data = session.read(0, (worker << 20) + at, blocks as u32 * 512).await;
                    assert!(data.expect("read") == oracle[range], "wrong bytes");
                }
            }
        }
    });
    futures_util::future::join_all(workers).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_unit_of_ours_is_a_block_device() {
    let (server, at) = serve(vec![
        Memory::new(vec![1; 4 << 20], false),
        Memory::new(vec![2; 1 << 20], true),
    ]);
    let device = RemoteDevice::connect(options(&at.to_string()), 0)
        .await
        .expect("a device");
    let fixed = RemoteDevice::connect(options(&at.to_string()), 1)
        .await
        .expect("a device");
    assert!(fixed.geometry().read_only && !device.geometry().read_only);
    assert!(matches!(
        fixed.write(0, &[0; 512]).await,
        Err(BlockError::ReadOnly)
    ));
    device.discard(512, 1 << 20).await.expect("discard");
    let mut read = vec![9; 2 << 20];
    device.read(0, &mut read).await.expect("read");
    let zeroed = 512..512 + (1 << 20);
    assert!(
        read.iter()
            .enumerate()
            .all(|(at, byte)| *byte == u8::from(!zeroed.contains(&at)))
    );
    server.shutdown(Duration::ZERO).await;
    let gone = device.read(0, &mut read).await.expect_err("the server is gone");
    assert!(matches!(gone, BlockError::Unavailable { .. }), "{gone}");
}

/// A host of the tree: it reads from its parents and serves its children.
struct Host {
    group: Arc<PathGroup>,
    /// What its children connect to: its server behind a proxy.
    proxy: Proxy,
    _server: Server,
}

impl Host {
    async fn join(parent: SocketAddr, origin: SocketAddr) -> Self {
        let name = Iqn::new("iqn.2026-11.org.example:host").unwrap();
        let group = PathGroup::new(PathGroupOptions::new(name));
        let spec = |portal: SocketAddr, label: &str| PathSpec {
            portal: portal.to_string(),
            target: target(),
            label: label.to_owned(),
            data_lun: 0,
            hash_lun: None,
            chap: None,
        };
        group.set_paths(vec![spec(parent, "parent")], vec![spec(origin, "origin")]);
        let (server, at) = serve(vec![Arc::new(Relay(group.clone()))]);
        Self {
            group,
            proxy: Proxy::start(at).await,
            _server: server,
        }
    }

    async fn read(&self, at: u64) -> Duration {
        let begun = Instant::now();
        let (data, _) = self.group.read(Lun::Data, at, 65_536, &[]).await.expect("a read");
        assert!(data == image(0, at, 65_536), "wrong bytes at {at}");
        begun.elapsed()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_host_stalls_reads_two_and_three_levels_below_for_less_than_two_seconds() {
    let (_origin, origin) = serve(vec![Memory::new(image(0, 0, DISK_BYTES), true)]);
    let one = Host::join(origin, origin).await;
    let two = Host::join(one.proxy.addr, origin).await;
    let three = Host::join(two.proxy.addr, origin).await;
    let four = Host::join(three.proxy.addr, origin).await;
    for at in 0..20 {
        four.read(at * 65_536).await;
    }
    assert_eq!(four.group.totals().fallback_bytes, 0);
    one.proxy.set(Mode::Swallow);
    let reads = (0..16u64).map(|at| four.read(at * 65_536));
    let stalls = futures_util::future::join_all(reads).await;
    let longest = stalls.iter().max().unwrap();
    println!("silent three levels above: longest read {longest:?}");
    assert!(*longest < Duration::from_millis(1_900), "{longest:?}");
    assert_eq!(two.group.stats()[0].state, PathState::Down);
    assert!(two.group.totals().fallback_bytes > 0);
    // Those below kept their parents: these were alive all the time.
    assert_eq!(four.group.stats()[0].state, PathState::Up);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chain_of_hosts_that_start_at_once_leaves_the_origin_to_its_child() {
    let (origin_server, origin) = serve(vec![Memory::new(image(0, 0, DISK_BYTES), true)]);
    let one = Host::join(origin, origin).await;
    let two = Host::join(one.proxy.addr, origin).await;
    let three = Host::join(two.proxy.addr, origin).await;
    let took = three.read(0).await;
    println!("first read through three hosts that were attaching: {took:?}");
    assert!(took < Duration::from_millis(500), "{took:?}");
    let sessions = origin_server.stats(&target()).expect("the target").sessions.len();
    assert_eq!(sessions, 1, "only the first host is the origin's child");
}
