//! One run of `iscsi-perf` against one server, and what it cost whom; one run of `iperf3`.

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde::Serialize;
use treeboot_tests::scratch::Scratch;
use treeboot_tests::wait::wait_until;

use super::Server;

/// The logical block of both disks, in bytes.
const BLOCK_BYTES: u32 = 512;
/// Ticks of a second in `/proc` (proc(5)): the same on every architecture that we build for.
const TICKS_PER_SECOND: f64 = 100.0;
/// From the start of `iperf3 -s` to its first answer.
const IPERF_WITHIN: Duration = Duration::from_secs(10);

/// What clients ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Load {
    /// Of one read, in bytes.
    pub(super) bytes: u32,
    /// Reads that each client keeps under way.
    pub(super) depth: u32,
    /// Clients at once, each with a session of its own.
    pub(super) clients: u32,
    /// In any order, or one after the other.
    pub(super) random: bool,
}

impl Load {
    const fn new(kib: u32, depth: u32, clients: u32, random: bool) -> Self {
        Self {
            bytes: kib << 10,
            depth,
            clients,
            random,
        }
    }

    pub(super) fn name(&self) -> String {
        let clients = if self.clients == 1 { "client" } else { "clients" };
        let order = if self.random { "random" } else { "in order" };
        let Self { bytes, depth, .. } = self;
        format!(
            "{}K {order}, depth {depth}, {} {clients}",
            bytes >> 10,
            self.clients
        )
    }
}

pub(super) const LOADS: [Load; 8] = [
    Load::new(4, 1, 1, true),
    Load::new(4, 32, 1, true),
    Load::new(64, 8, 1, false),
    Load::new(512, 8, 1, false),
    Load::new(4, 1, 4, true),
    Load::new(4, 32, 4, true),
    Load::new(64, 8, 4, false),
    Load::new(512, 8, 4, false),
];

/// What came of one run.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Sample {
    /// Reads a second, all clients together.
    pub(super) iops: f64,
    /// Millions of bytes a second.
    pub(super) mb_per_s: f64,
    /// The server's processor time for a read, all its threads, user and system, in microseconds.
    pub(super) server_us: f64,
    /// The share of one processor that each client had; 1.0: it could not have asked for more.
    pub(super) client_busy: f64,
    /// Processors that neither the server nor the clients had: other people's work.
    pub(super) others_busy: f64,
}

/// Runs all clients of a load for some seconds.
///
/// # Errors
/// A client could not be started, or a read failed.
pub(super) async fn run(scratch: &Scratch, server: &Server, load: &Load, seconds: u32) -> Result<Sample> {
    let before = Ticks::now(server.pid)?;
    let began = Instant::now();
    let clients = (0..load.clients).map(|number| client(scratch, server, load, seconds, number));
    let rates = futures_util::future::try_join_all(clients).await?;
    let wall = began.elapsed().as_secs_f64();
    let after = Ticks::now(server.pid)?;

    let iops: f64 = rates.iter().sum();
    let reads = iops * f64::from(seconds);
    let used =
        |part: fn(&Ticks) -> u64| (part(&after).saturating_sub(part(&before))) as f64 / TICKS_PER_SECOND;
    let (served, asked, all) = (used(|t| t.server), used(|t| t.clients), used(|t| t.machine));
    Ok(Sample {
        iops,
        mb_per_s: iops * f64::from(load.bytes) / 1e6,
        server_us: served * 1e6 / reads.max(1.0),
        client_busy: asked / f64::from(load.clients) / f64::from(seconds),
        others_busy: ((all - served - asked) / wall).max(0.0),
    })
}

/// One `iscsi-perf`; gives its reads a second.
async fn client(scratch: &Scratch, server: &Server, load: &Load, seconds: u32, number: u32) -> Result<f64> {
    let mut command = scratch.command("iscsi-perf");
    command
        .arg("-i")
        .arg(format!("iqn.2026-11.org.example:client{number}"))
        .args(["-m", &load.depth.to_string()])
        .args(["-b", &(load.bytes / BLOCK_BYTES).to_string()])
        .args(["-t", &seconds.to_string()]);
    if load.random {
        command.arg("-r");
    }
    command.arg(&server.url);
    let output = tokio::process::Command::from(command)
        .output()
        .await
        .context("could not start iscsi-perf (apt-get install libiscsi-bin)")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let rate = average(&text);
    match rate {
        Some(rate) if output.status.success() => Ok(rate),
        _ => bail!(
            "iscsi-perf against {} ended with {}: {} {}",
            server.name,
            output.status,
            text.trim(),
            String::from_utf8_lossy(&output.stderr).trim()
        ),
    }
}

/// The last average that `iscsi-perf` printed: that of the whole run.
fn average(text: &str) -> Option<f64> {
    let (_, rest) = text.rsplit_once("iops average ")?;
    rest.split(' ').next()?.parse().ok()
}

/// Processor time in ticks.
#[derive(Debug, Clone, Copy)]
struct Ticks {
    /// Of the server.
    server: u64,
    /// Of all our children that have ended and were waited for: clients, because the servers still run.
    clients: u64,
    /// Of everybody.
    machine: u64,
}

impl Ticks {
    fn now(server: u32) -> Result<Self> {
        // proc(5), `stat`: utime and stime are fields 14 and 15, those of ended children 16 and 17.
        let server = fields(&format!("/proc/{server}/stat"))?;
        let own = fields("/proc/self/stat")?;
        let sum = |fields: &[u64]| fields.iter().sum();
        let get = |fields: &[u64], at: usize| fields.get(at - 3).copied().unwrap_or(0);
        let machine = std::fs::read_to_string("/proc/stat")?;
        let machine: Vec<u64> = numbers(machine.lines().next().unwrap_or_default());
        // The first is the line's name. user, nice, system, idle, iowait, irq, softirq; a hypervisor's share does not tell on us.
        let busy = [1, 2, 3, 6, 7].map(|at| machine.get(at).copied().unwrap_or(0));
        Ok(Self {
            server: get(&server, 14) + get(&server, 15),
            clients: get(&own, 16) + get(&own, 17),
            machine: sum(&busy),
        })
    }
}

/// The fields of a `stat` from the third on, as numbers; what is none is 0.
fn fields(path: &str) -> Result<Vec<u64>> {
    let stat = std::fs::read_to_string(path).with_context(|| format!("the server has ended: no {path}"))?;
    // The second field is the program's name, which may hold blanks and brackets.
    let (_, rest) = stat.rsplit_once(") ").context("a stat without a name")?;
    Ok(numbers(rest))
}

fn numbers(line: &str) -> Vec<u64> {
    line.split_whitespace()
        .map(|word| word.parse().unwrap_or(0))
        .collect()
}

/// What plain TCP streams carry over the loopback, in millions of bytes a second.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Carried {
    pub(super) one_stream: f64,
    pub(super) four_streams: f64,
}

/// A running `iperf3 -s`.
pub(super) struct Iperf {
    portal: SocketAddr,
}

impl Iperf {
    /// Starts it.
    ///
    /// # Errors
    /// It did not start.
    pub(super) async fn start(scratch: &Scratch, address: IpAddr) -> Result<Self> {
        // It cannot choose a port by itself, so one that was free a moment ago.
        let portal = TcpListener::bind((address, 0))?.local_addr()?;
        let log = std::fs::File::create(scratch.path().join("iperf3.log"))?;
        let mut child = scratch
            .command("iperf3")
            .args(["-s", "-B", &address.to_string(), "-p", &portal.port().to_string()])
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("could not start iperf3 (apt-get install iperf3)")?;
        let iperf = Self { portal };
        wait_until(IPERF_WITHIN, "iperf3 to answer", async || {
            if let Some(status) = child.try_wait()? {
                bail!("iperf3 ended with {status}");
            }
            // A few bytes, to see whether it is there.
            Ok(iperf.carry(scratch, &["-n", "64K"]).await.ok())
        })
        .await?;
        Ok(iperf)
    }

    /// One second with one stream and one with four.
    ///
    /// # Errors
    /// It does not answer.
    pub(super) async fn run(&self, scratch: &Scratch) -> Result<Carried> {
        Ok(Carried {
            one_stream: self.carry(scratch, &["-t", "1"]).await?,
            four_streams: self.carry(scratch, &["-t", "1", "-P", "4"]).await?,
        })
    }

    async fn carry(&self, scratch: &Scratch, args: &[&str]) -> Result<f64> {
        let mut command = scratch.command("iperf3");
        command
            .args(["-J", "-c", &self.portal.ip().to_string()])
            .args(["-p", &self.portal.port().to_string()])
            .args(args);
        let output = tokio::process::Command::from(command).output().await?;
        let value: serde_json::Value =
            serde_json::from_slice(&output.stdout).context("iperf3 gave no JSON")?;
        let bits = value["end"]["sum_received"]["bits_per_second"].as_f64();
        let error = || format!("iperf3: {}", value["error"].as_str().unwrap_or("no result"));
        Ok(bits.with_context(error)? / 8e6)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_average_is_that_of_the_whole_run() {
        let text = "connected\n\r00:00:01 - lba 9, iops current 21 (1 MB/s), iops average 22 (1 MB/s)         \
                    \riops average 23456 (91 MB/s)             \n\nfinished.\n";
        assert_eq!(average(text), Some(23_456.0));
        assert_eq!(average("Login Failed."), None);
    }

    #[test]
    fn processor_time_of_a_process_is_found_behind_its_name() {
        let ticks = Ticks::now(std::process::id()).expect("we run");
        assert!(ticks.machine >= ticks.server);
        assert_eq!(numbers("S 1 -1 23"), [0, 1, 0, 23]);
    }
}
