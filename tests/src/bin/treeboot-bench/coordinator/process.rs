//! A server as a process of its own: started, measured from outside, killed.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use parking_lot::Mutex;
use serde::Serialize;
use treeboot_tests::wait::wait_until;

const READY_WITHIN: Duration = Duration::from_secs(60);
/// `/proc` counts processor time in these (`sysconf(_SC_CLK_TCK)`, 100 on every Linux that we know).
const TICKS_A_SECOND: f64 = 100.0;

/// It ends when this is dropped.
pub(super) struct Server {
    child: Child,
    pub(super) address: SocketAddr,
    log: Arc<Mutex<Vec<(Instant, String)>>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What it holds and has used.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Usage {
    /// Resident memory.
    pub(super) bytes: u64,
    /// Processor time, user and system.
    pub(super) cpu_seconds: f64,
}

impl Server {
    /// Starts `command`, which writes its address to `ready`; what it logs is kept with the time at which it came.
    pub(super) async fn start(command: &mut Command, ready: &Path) -> Result<Self> {
        let _ = std::fs::remove_file(ready);
        let mut child = command
            .arg("--ready-file")
            .arg(ready)
            .env("NO_COLOR", "1")
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("could not start {:?}", command.get_program()))?;
        let log = Arc::new(Mutex::new(Vec::new()));
        let stderr = child.stderr.take().context("a pipe")?;
        let lines = Arc::clone(&log);
        // For a person, where the measurement fails.
        let mut kept = std::fs::File::create(ready.with_extension("log"))?;
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                // Without it the measurement is what it is.
                let _ = writeln!(kept, "{line}");
                lines.lock().push((Instant::now(), line));
            }
        });
        let mut server = Self {
            child,
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            log,
        };
        let last = |log: &Mutex<Vec<(Instant, String)>>| log.lock().last().map(|(_, line)| line.clone());
        let ended = parking_lot::Mutex::new(&mut server.child);
        let log = Arc::clone(&server.log);
        server.address = wait_until(READY_WITHIN, "the server to be ready", async || {
            if let Some(status) = ended.lock().try_wait()? {
                bail!("it ended with {status}: {:?}", last(&log));
            }
            let Ok(text) = std::fs::read(ready) else {
                return Ok(None);
            };
            let value: serde_json::Value = serde_json::from_slice(&text)?;
            Ok(value["rpc"].as_str().and_then(|address| address.parse().ok()))
        })
        .await?;
        Ok(server)
    }

    pub(super) fn usage(&self) -> Result<Usage> {
        let proc = format!("/proc/{}", self.child.id());
        let status = std::fs::read_to_string(format!("{proc}/status"))?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib: u64 = resident
            .and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok())
            .context("no VmRSS")?;
        let stat = std::fs::read_to_string(format!("{proc}/stat"))?;
        // After the name, which may hold anything: state is field 3, utime 14, stime 15 (proc_pid_stat(5)).
        let (_, fields) = stat.rsplit_once(')').context("no name")?;
        let fields: Vec<&str> = fields.split_whitespace().collect();
        let ticks = |field: usize| fields.get(field - 3).and_then(|text| text.parse::<f64>().ok());
        let ticks = ticks(14).zip(ticks(15)).context("no times")?;
        Ok(Usage {
            bytes: kib * 1024,
            cpu_seconds: (ticks.0 + ticks.1) / TICKS_A_SECOND,
        })
    }

    /// When a line with these words first came.
    pub(super) fn said(&self, words: &[&str]) -> Option<Instant> {
        let log = self.log.lock();
        let has = |line: &str| words.iter().all(|word| line.contains(word));
        log.iter().find(|(_, line)| has(line)).map(|(at, _)| *at)
    }
}
