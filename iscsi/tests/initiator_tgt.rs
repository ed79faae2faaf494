//! The initiator against `tgt` (Debian package `tgt`), a target that is not ours.
//!
//! Without tgt these tests print `SKIPPED: reason`, and fail where the environment has `CI`.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use treeboot_block::{BlockDevice, BlockError};
use treeboot_iscsi::initiator::{
    CommandError, ConnectError, Digests, RemoteDevice, Session, SessionOptions, discover,
};
use treeboot_iscsi::login::{Chap, ChapError, Credentials, DigestTerms, LoginError, Secret};
use treeboot_types::Iqn;

const TARGET: &str = "iqn.2026-11.org.example:disk";
const DISK_BYTES: u64 = 16 << 20;

/// A private tgtd with one disk as LUN 1; ended when dropped.
struct Tgt {
    daemon: Child,
    port: u16,
    /// tgtd allows 0 to 32767 here; 0 is that of the system's own tgtd.
    control: u16,
    disk: tempfile::NamedTempFile,
}

impl Drop for Tgt {
    fn drop(&mut self) {
        self.daemon.kill().expect("tgtd is our child");
        self.daemon.wait().expect("tgtd is our child");
    }
}

impl Tgt {
    /// `None` where this machine cannot run one.
    fn start() -> Option<Self> {
        let port = free_port();
        let control = (port & 0x7fff).max(1);
        let daemon = Command::new("tgtd")
            .args(["-f", "--control-port", &control.to_string()])
            .args(["--iscsi", &format!("portal=127.0.0.1:{port}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let daemon = match daemon {
            Ok(daemon) => daemon,
            Err(error) => return skipped(&format!("tgtd does not start: {error} (apt install tgt)")),
        };
        let disk = tempfile::NamedTempFile::new().expect("a temporary file");
        disk.as_file().set_len(DISK_BYTES).expect("a sparse file");
        let tgt = Self {
            daemon,
            port,
            control,
            disk,
        };
        let deadline = Instant::now() + Duration::from_secs(10);
        while !tgt.admin("--op new --mode target --tid 1 -T", TARGET) {
            if Instant::now() > deadline {
                return skipped("tgtd takes no orders (it needs root)");
            }
            std::thread::yield_now();
        }
        assert!(tgt.admin(
            "--op new --mode logicalunit --tid 1 --lun 1 -b",
            path_of(tgt.disk.path())
        ));
        assert!(tgt.admin("--op bind --mode target --tid 1 -I", "ALL"));
        Some(tgt)
    }

    fn admin(&self, words: &str, last: &str) -> bool {
        let status = Command::new("tgtadm")
            .args(["--control-port", &self.control.to_string(), "--lld", "iscsi"])
            .args(words.split(' '))
            .arg(last)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        status.is_ok_and(|status| status.success())
    }

    fn options(&self, target: &str) -> SessionOptions {
        SessionOptions::new(
            format!("127.0.0.1:{}", self.port),
            Iqn::new(target).expect("a name"),
            Iqn::new("iqn.2026-11.org.example:initiator").expect("a name"),
        )
    }
}

fn path_of(path: &Path) -> &str {
    path.to_str().expect("temporary names are ASCII")
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address").port()
}

fn skipped<T>(reason: &str) -> Option<T> {
    println!("SKIPPED: {reason}");
    assert!(std::env::var_os("CI").is_none(), "CI must not skip: {reason}");
    None
}

fn pattern(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) as u8
    };
    (0..bytes).map(|_| next()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tgt_is_found_asked_read_and_written() {
    let Some(tgt) = Tgt::start() else { return };
    let options = tgt.options(TARGET);
    let found = discover(&options.portal, &options.initiator, 3_000)
        .await
        .expect("discovery");
    assert_eq!(found, [(options.target.clone(), vec![options.portal.clone()])]);

    let session = Session::connect(options).await.expect("a session");
    assert_eq!(session.report_luns().await.expect("luns"), [0, 1]);
    assert_eq!(session.inquiry(1).await.expect("inquiry").vendor, "IET");
    session.test_unit_ready(1).await.expect("ready");
    let capacity = session.capacity(1).await.expect("capacity");
    assert_eq!((capacity.bytes, capacity.block_bytes), (DISK_BYTES, 512));

    // Below and above what travels with the command, and more than one command.
    for (offset, bytes) in [
        (0, 512),
        (4096, 65_536),
        (1 << 20, 700_000 / 512 * 512),
        (2 << 20, 3 << 20),
    ] {
        let data = Bytes::from(pattern(offset, bytes));
        session.write(1, offset, data.clone()).await.expect("write");
        let read = session.read(1, offset, bytes as u32).await.expect("read");
        assert_eq!(read, data);
    }
    session.flush(1).await.expect("flush");
    let on_disk = std::fs::read(tgt.disk.path()).expect("the disk's file");
    assert_eq!(on_disk[4096..4096 + 65_536], pattern(4096, 65_536));

    let beyond = session
        .read(1, DISK_BYTES, 512)
        .await
        .expect_err("beyond the end");
    assert!(
        matches!(beyond, CommandError::OutOfRange { lun: 1, .. }),
        "{beyond}"
    );
    let missing = session.capacity(7).await.expect_err("no such LUN");
    assert!(
        matches!(missing, CommandError::Sense(sense) if sense.is_lasting()),
        "{missing}"
    );
    session.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_reads_at_once_of_tgt_agree_with_its_file() {
    let Some(tgt) = Tgt::start() else { return };
    let oracle = pattern(42, DISK_BYTES as usize);
    std::fs::write(tgt.disk.path(), &oracle).expect("the disk's file");
    let session = Session::connect(tgt.options(TARGET)).await.expect("a session");
    let (session, oracle) = (&session, &oracle);
    let readers = (0..32u64).map(|reader| async move {
        let mut at = reader * 7_919;
        for _ in 0..50 {
            at = (at * 31 + 17) % (DISK_BYTES / 4096 - 64);
            let bytes = 4096 * (1 + at % 32);
            let read = session.read(1, at * 4096, bytes as u32).await.expect("read");
            assert!(
                read == oracle[(at * 4096) as usize..][..bytes as usize],
                "wrong bytes at {at}"
            );
        }
    });
    futures_util::future::join_all(readers).await;
}

#[tokio::test]
async fn tgt_s_refusals_are_named() {
    let Some(tgt) = Tgt::start() else { return };
    let refused = Session::connect(tgt.options("iqn.2026-11.org.example:other")).await;
    let error = refused.expect_err("there is no such target");
    assert!(matches!(error, ConnectError::Login { .. }), "{error:?}");
    assert!(
        error.to_string().contains("iqn.2026-11.org.example:other"),
        "{error}"
    );
    let error = RemoteDevice::connect(tgt.options(TARGET), 0)
        .await
        .expect_err("LUN 0 is a controller");
    assert!(matches!(error, ConnectError::Lun { lun: 0, .. }), "{error:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_unit_of_tgt_is_a_block_device_until_tgt_is_gone() {
    let Some(tgt) = Tgt::start() else { return };
    let device = RemoteDevice::connect(tgt.options(TARGET), 1)
        .await
        .expect("a device");
    assert_eq!(device.geometry().bytes, DISK_BYTES);
    assert!(!device.geometry().read_only);
    let data = pattern(1, 200 * 512);
    device.write(512, &data).await.expect("write");
    device.discard(512, 512).await.expect("discard");
    device.flush().await.expect("flush");
    let mut read = vec![1; data.len()];
    device.read(512, &mut read).await.expect("read");
    assert_eq!((&read[..512], &read[512..]), (&[0; 512][..], &data[512..]));
    assert!(matches!(
        device.read(DISK_BYTES, &mut read).await,
        Err(BlockError::OutOfRange { .. })
    ));
    drop(tgt);
    let gone = device.read(0, &mut read).await.expect_err("tgt is gone");
    assert!(matches!(gone, BlockError::Unavailable { .. }), "{gone}");
}

#[tokio::test]
async fn tgt_and_we_authenticate_to_each_other_and_check_digests() {
    let Some(tgt) = Tgt::start() else { return };
    let account = |user: &str, secret| {
        assert!(tgt.admin(
            &format!("--op new --mode account --user {user} --password"),
            secret
        ));
    };
    account("host", "0123456789abcdef");
    account("disk", "fedcba9876543210");
    let bind = "--op bind --mode account --tid 1 --user";
    assert!(tgt.admin(bind, "host"));
    assert!(tgt.admin(&format!("{bind} disk"), "--outgoing"));
    for digest in ["HeaderDigest", "DataDigest"] {
        let update = format!("--op update --mode target --tid 1 --name {digest} --value");
        assert!(tgt.admin(&update, "CRC32C"));
    }
    let of =
        |user, secret| Credentials::new(user, Secret::new(secret).expect("a secret")).expect("credentials");
    let ours = of("host", "0123456789abcdef");
    let options = |chap| SessionOptions {
        chap: Some(chap),
        digests: Digests {
            header: DigestTerms::Require,
            data: DigestTerms::Require,
        },
        ..tgt.options(TARGET)
    };
    let mutual = |secret| Chap::mutual(ours.clone(), of("disk", secret)).expect("two secrets");
    for chap in [mutual("fedcba9876543210"), Chap::one_way(ours.clone())] {
        let session = Session::connect(options(chap)).await.expect("a session");
        let data = Bytes::from(pattern(3, 300 * 512));
        session.write(1, 512, data.clone()).await.expect("write");
        assert_eq!(session.read(1, 512, 300 * 512).await.expect("read"), data);
        session.close().await;
    }
    let login = |error| match error {
        ConnectError::Login { source, .. } => source,
        other => panic!("{other:?}"),
    };
    let impostor = Session::connect(options(mutual("0000000000000000"))).await;
    let error = login(impostor.expect_err("tgt does not know this secret"));
    assert_eq!(error, LoginError::Chap(ChapError::Unproven));
    let wrong = Chap::one_way(of("host", "0000000000000000"));
    let error = login(
        Session::connect(options(wrong))
            .await
            .expect_err("not our secret"),
    );
    assert_eq!(error, LoginError::Refused { class: 2, detail: 1 });
}
