//! What a session that does nothing costs the server in memory.
//!
//! `cargo run -p treeboot-iscsi --example idle_sessions -- target/debug/treeboot [SESSIONS]` starts `treeboot serve` on
//! an image of its own, logs sessions in (1,000), and reads the server's resident memory before, after, when each has read
//! and written 64 KiB, and when they have been idle for a while after that.

use std::error::Error;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use treeboot_iscsi::initiator::{Session, SessionOptions};
use treeboot_types::Iqn;

const TARGET: &str = "iqn.2026-11.dev.treeboot:idle";
const IMAGE_BYTES: u64 = 64 << 20;
/// Longer than two pings of the server, after which an idle session has given back what it does not need.
const IDLE: Duration = Duration::from_secs(40);
const TRANSFER_BYTES: u32 = 64 * 1024;

/// Ends the server whatever happens here.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Server {
    /// Resident memory in bytes.
    fn resident(&self) -> Result<u64, Box<dyn Error>> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib: u64 = line
            .and_then(|line| line.split_whitespace().next())
            .ok_or("no VmRSS")?
            .parse()?;
        Ok(kib * 1024)
    }
}

/// The server's portal, once it says that it is ready.
async fn portal(ready: &Path) -> Result<String, Box<dyn Error>> {
    let deadline = Instant::now() + Duration::from_secs(20);
    while Instant::now() < deadline {
        if let Ok(json) = std::fs::read_to_string(ready)
            && let Some((_, rest)) = json.split_once("\"portal\":")
            && let Some(portal) = rest.split('"').nth(1)
        {
            return Ok(portal.to_owned());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Err("the server is not ready in time".into())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let program = args.next().ok_or("usage: idle_sessions PROGRAM [SESSIONS]")?;
    let count: u64 = args.next().map_or(Ok(1000), |text| text.parse())?;
    let folder = tempfile::tempdir()?;
    let (image, ready) = (folder.path().join("disk.raw"), folder.path().join("ready"));
    std::fs::File::create(&image)?.set_len(IMAGE_BYTES)?;
    let server = Command::new(&program)
        .arg("serve")
        .arg(&image)
        .args([
            "--writable",
            "--portal",
            "127.0.0.1:0",
            "--name",
            TARGET,
            "--ready-file",
        ])
        .arg(&ready)
        .stdout(Stdio::null())
        .spawn()?;
    let server = Server(server);
    let portal = portal(&ready).await?;
    let session = || {
        let name = Iqn::new("iqn.2026-11.dev.treeboot:idle-client")?;
        let options = SessionOptions::new(portal.clone(), Iqn::new(TARGET)?, name);
        Ok::<_, Box<dyn Error>>(Session::connect(options))
    };
    // One that comes and goes first, so that what the server makes once is made.
    let first = session()?.await?;
    first.test_unit_ready(0).await?;
    first.close().await;
    let before = server.resident()?;
    let mut sessions = Vec::new();
    for _ in 0..count {
        let session = session()?.await?;
        session.test_unit_ready(0).await?;
        sessions.push(session);
    }
    let idle = server.resident()?;
    for (number, session) in (0u64..).zip(&sessions) {
        let offset = number * u64::from(TRANSFER_BYTES) % IMAGE_BYTES;
        let data = session.read(0, offset, TRANSFER_BYTES).await?;
        session.write(0, offset, data).await?;
    }
    let used = server.resident()?;
    tokio::time::sleep(IDLE).await;
    let rested = server.resident()?;
    let each = |after: u64| after.saturating_sub(before) / count.max(1);
    println!("{count} sessions with {program}: {before} bytes resident before them");
    println!("logged in: {idle} bytes, {} a session", each(idle));
    println!(
        "after 64 KiB read and written by each: {used} bytes, {} a session",
        each(used)
    );
    println!(
        "idle for {} s after that: {rested} bytes, {} a session",
        IDLE.as_secs(),
        each(rested)
    );
    Ok(())
}
