//! One coordinator and many hosts, each with a key, a certificate and a connection of its own, beside a bare service with the same TLS
//! and messages: how long a fleet takes to have places, what it costs to keep it, how soon orphans have parents, how soon a restart serves.
//!
//! The server is a process of its own; all hosts are in this one and share the machine with it, so that times hold the hosts' work too.

pub(crate) mod bare;
mod hosts;
mod process;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;
use tonic::transport::{Channel, Endpoint};
use treeboot_identity::authority::{self, Authority};
use treeboot_identity::tls::Dialer;
use treeboot_identity::{Holder, Person, Role, Who};
use treeboot_proto::v1;
use treeboot_proto::v1::coordinator_client::CoordinatorClient;
use treeboot_tests::binaries::Binaries;
use treeboot_tests::scratch::Scratch;
use treeboot_tests::table::draw;
use treeboot_tests::wait::wait_until;

use hosts::{Arrival, BEAT, Host, Member, arrive, members};
use process::{Server, Usage};

/// A host is given up after so long a silence: the shortest that the coordinator takes, three beats and a half.
const LEASE: Duration = Duration::from_millis(17_500);
/// Hosts that die, one after the other.
const DEATHS: usize = 20;
const SOON: Duration = Duration::from_secs(120);

/// What to measure.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Options {
    /// Hosts.
    #[arg(long, default_value_t = 10_000)]
    hosts: usize,
    /// Hosts that connect or join at the same moment; the others wait their turn.
    #[arg(long, default_value_t = 10_000)]
    at_once: usize,
    /// How long the fleet is watched while it only beats, in seconds.
    #[arg(long, default_value_t = 30)]
    seconds: u64,
    /// Writes the figures to this file as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// Of one server.
#[derive(Debug, Serialize)]
struct Kept {
    /// From the common start until every host is connected and has its place, durable.
    burst_seconds: f64,
    join_ms: Percentiles,
    /// Attempts that a host had to make again.
    again: u64,
    /// Of one processor, while hosts only beat.
    steady_cpu_percent: f64,
    /// Resident memory then, all of it by the number of hosts.
    bytes_a_host: f64,
    /// Before the first host came.
    empty_bytes: u64,
    /// Processor time from the start until all had places.
    burst_cpu_seconds: f64,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct Percentiles {
    median: f64,
    p99: f64,
    most: f64,
}

impl Percentiles {
    fn of(mut sample: Vec<f64>) -> Self {
        sample.sort_by(f64::total_cmp);
        let at = |part: f64| {
            let last = sample.len().saturating_sub(1);
            sample.get((last as f64 * part) as usize).copied().unwrap_or(0.0)
        };
        Self {
            median: at(0.5),
            p99: at(0.99),
            most: at(1.0),
        }
    }
}

/// What `--json` writes.
#[derive(Debug, Serialize)]
struct Report {
    hosts: usize,
    at_once: usize,
    beat_seconds: u64,
    steady_seconds: u64,
    processors: usize,
    bare: Kept,
    coordinator: Kept,
    /// All exports told to be up, after the burst.
    register_seconds: f64,
    depth: u32,
    /// From "host lost" in the coordinator's log until a child of it has its new parents.
    orphan_ms: Percentiles,
    orphans: usize,
    /// From the start of the process after `kill -9` until it answers about the tree.
    restart_seconds: f64,
    /// Until every host is connected again, with its state told.
    all_back_seconds: f64,
    /// Hosts whose parents the restart changed.
    moved_by_restart: usize,
}

/// Measures and prints.
pub(crate) async fn run(options: &Options) -> Result<()> {
    let binaries = Binaries::locate()?;
    let scratch = Scratch::new(std::env::temp_dir().join("treeboot.evidence"))?;
    let state = scratch.path().join("state");
    let verb = |args: &[&str]| -> Result<()> {
        let mut command = scratch.command(binaries.coordinator());
        let status = command
            .args(args)
            .env("TREEBOOT_STATE", &state)
            .stdout(std::process::Stdio::null())
            .status()?;
        ensure!(
            status.success(),
            "treeboot-coordinator {args:?} ended with {status}"
        );
        Ok(())
    };
    verb(&["init"])?;
    let authority = Authority::open(&authority::dir(&state))?.context("an authority was made")?;
    eprintln!("bench: {} hosts get certificates", options.hosts);
    let members = members(&authority, options.hosts)?;
    let bench = Bench {
        options,
        scratch: &scratch,
        recording: Arc::new(AtomicBool::new(false)),
    };

    let mut command = scratch.command(std::env::current_exe()?);
    command.arg("coordinator-bare").arg("--state").arg(&state);
    let server = Server::start(&mut command, &bench.ready()).await?;
    let ((bare, _), _) = bench.keep("bare", &server, &members).await?;
    drop(server);

    let mut command = bench.coordinator(&binaries, &state, "127.0.0.1:0");
    let server = Server::start(&mut command, &bench.ready()).await?;
    let admin = admin(&authority)?;
    let mut client = connect(&admin, &server).await?;
    let request = v1::AddImageRequest {
        image: Some(hosts::image()),
    };
    client.add_image(request).await?;
    let (coordinator, kept) = bench.keep("coordinator", &server, &members).await?;
    let depth = bench.depth(&mut client).await?;
    let (orphans, dead) = bench.deaths(&server, &kept.hosts).await?;
    let address = server.address;
    let living = |host: &&Arc<Host>| !dead.iter().any(|name| name == host.name());
    let places: HashMap<String, v1::Placement> = (kept.hosts.iter().filter(living))
        .filter_map(|host| Some((host.name().to_owned(), host.placement()?)))
        .collect();
    drop(kept);
    drop(client);

    eprintln!("bench: kill -9 and a restart");
    drop(server);
    let before = bench.settled(&places);
    let began = Instant::now();
    let mut command = bench.coordinator(&binaries, &state, &address.to_string());
    let server = Server::start(&mut command, &bench.ready()).await?;
    let mut client = connect(&admin, &server).await?;
    bench.depth(&mut client).await?;
    let restart_seconds = began.elapsed().as_secs_f64();
    let living: Vec<Arc<Member>> = members
        .iter()
        .filter(|m| before.contains_key(m.name()))
        .cloned()
        .collect();
    let back = arrive(&living, address, options.at_once, &bench.recording, Some(&places)).await?;
    let after: HashMap<String, v1::Placement> = (back.hosts.iter())
        .filter_map(|host| Some((host.name().to_owned(), host.placement()?)))
        .collect();
    let after = bench.settled(&after);
    let moved = before
        .iter()
        .filter(|(name, parents)| after.get(*name) != Some(*parents));

    let report = Report {
        hosts: options.hosts,
        at_once: options.at_once,
        beat_seconds: BEAT.as_secs(),
        steady_seconds: options.seconds,
        processors: std::thread::available_parallelism()?.get(),
        bare,
        register_seconds: coordinator.1,
        coordinator: coordinator.0,
        depth,
        orphans: orphans.len(),
        orphan_ms: Percentiles::of(orphans),
        restart_seconds,
        all_back_seconds: back.seconds,
        moved_by_restart: moved.count(),
    };
    println!("{}", report.text());
    if let Some(file) = &options.json {
        std::fs::write(file, serde_json::to_string_pretty(&report)? + "\n")?;
    }
    scratch.pass();
    Ok(())
}

fn admin(authority: &Authority) -> Result<Dialer> {
    let who = Who::Person {
        name: Person::new("bench")?,
        role: Role::Admin,
    };
    let credentials = authority.issue(&who, Duration::from_secs(86_400))?;
    Ok(Dialer::mutual(&Holder::new(credentials), Who::Coordinator)?)
}

async fn connect(admin: &Dialer, server: &Server) -> Result<CoordinatorClient<Channel>> {
    let endpoint = Endpoint::from_shared(format!("http://{}", server.address))?;
    let client = CoordinatorClient::new(admin.connect(&endpoint).await?);
    // The tree of 10,000 hosts is a large answer.
    Ok(client.max_decoding_message_size(256 << 20))
}

struct Bench<'a> {
    options: &'a Options,
    scratch: &'a Scratch,
    recording: Arc<AtomicBool>,
}

impl Bench<'_> {
    fn ready(&self) -> PathBuf {
        self.scratch.path().join("ready.json")
    }

    fn coordinator(&self, binaries: &Binaries, state: &Path, listen: &str) -> Command {
        let mut command = self.scratch.command(binaries.coordinator());
        command
            .arg("--state")
            .arg(state)
            .args(["--listen", listen])
            .args(["--beat-ms", &BEAT.as_millis().to_string()])
            .args(["--lease-ms", &LEASE.as_millis().to_string()])
            .args(["--pending-lease-ms", &LEASE.as_millis().to_string()]);
        command
    }

    /// A fleet comes, registers, and is watched while it only beats.
    async fn keep(
        &self,
        what: &str,
        server: &Server,
        members: &[Arc<Member>],
    ) -> Result<((Kept, f64), Arrival)> {
        let empty = server.usage()?;
        eprintln!("bench: {what}: {} hosts come", members.len());
        let mut arrival = arrive(
            members,
            server.address,
            self.options.at_once,
            &self.recording,
            None,
        )
        .await?;
        let placed = server.usage()?;
        eprintln!("bench: {what}: all have places after {:.2} s", arrival.seconds);
        let join_ms = Percentiles::of(std::mem::take(&mut arrival.join_ms));
        let began = Instant::now();
        let registering = arrival.hosts.iter().map(|host| host.register());
        futures_util::future::try_join_all(registering).await?;
        let register_seconds = began.elapsed().as_secs_f64();
        eprintln!("bench: {what}: all exports are up after {register_seconds:.2} s more");
        // Two rounds of beats, until every state is told.
        tokio::time::sleep(BEAT * 2).await;
        let (from, began) = (server.usage()?, Instant::now());
        tokio::time::sleep(Duration::from_secs(self.options.seconds)).await;
        let (to, took): (Usage, _) = (server.usage()?, began.elapsed());
        let silent = arrival
            .hosts
            .iter()
            .filter(|host| host.acknowledged() == 0)
            .count();
        ensure!(
            silent == 0,
            "{silent} hosts' beats are not acknowledged by {what}"
        );
        let kept = Kept {
            burst_seconds: arrival.seconds,
            join_ms,
            again: arrival.again,
            steady_cpu_percent: (to.cpu_seconds - from.cpu_seconds) / took.as_secs_f64() * 100.0,
            bytes_a_host: to.bytes as f64 / members.len() as f64,
            empty_bytes: empty.bytes,
            burst_cpu_seconds: placed.cpu_seconds - empty.cpu_seconds,
        };
        eprintln!(
            "bench: {what}: {:.1} % of a processor, {:.1} KB a host",
            kept.steady_cpu_percent,
            kept.bytes_a_host / 1e3
        );
        Ok(((kept, register_seconds), arrival))
    }

    async fn depth(&self, client: &mut CoordinatorClient<Channel>) -> Result<u32> {
        let request = v1::GetTreeRequest {
            image: Some(hosts::image_id(0)),
        };
        let tree = client.get_tree(request).await?.into_inner();
        Ok(tree.nodes.iter().map(|node| node.depth).max().unwrap_or(0))
    }

    /// Inner hosts fall silent; for each child the milliseconds from the coordinator's notice to its new parents, and who fell silent.
    async fn deaths(&self, server: &Server, hosts: &[Arc<Host>]) -> Result<(Vec<f64>, Vec<String>)> {
        let children = |host: &Host| -> Vec<String> {
            let placement = host.placement().unwrap_or_default();
            let children = placement.children.iter().filter(|child| !child.fallback);
            children.map(|child| child.host.clone()).collect()
        };
        let by_name: HashMap<&str, &Arc<Host>> = hosts.iter().map(|host| (host.name(), host)).collect();
        // No two of one family, so that every orphan has one death behind it.
        let (mut dying, mut touched) = (Vec::new(), std::collections::HashSet::new());
        for host in hosts {
            let of_it = children(host);
            let family = of_it.iter().map(String::as_str).chain([host.name()]);
            let family: Vec<String> = family.map(str::to_owned).collect();
            if of_it.len() >= 2 && dying.len() < DEATHS && family.iter().all(|name| !touched.contains(name)) {
                touched.extend(family);
                dying.push((Arc::clone(host), of_it));
            }
        }
        ensure!(!dying.is_empty(), "nobody has children");
        eprintln!("bench: {} hosts with children fall silent", dying.len());
        self.recording.store(true, Ordering::Relaxed);
        dying.iter().for_each(|(host, _)| host.silence());
        let noticed = |host: &Host| server.said(&["host lost", &format!("host={} ", host.name())]);
        let all = wait_until(SOON, "all orphans to have parents", async || {
            let mut took = Vec::new();
            for (dead, orphans) in &dying {
                let Some(at) = noticed(dead) else {
                    return Ok(None);
                };
                for orphan in orphans {
                    let orphan = by_name
                        .get(orphan.as_str())
                        .context("an orphan that is no host")?;
                    // The log's line may be read a moment after the push that it came before.
                    let since = at - Duration::from_millis(200);
                    let Some(moved) = orphan.left(dead.name(), since) else {
                        return Ok(None);
                    };
                    took.push(moved.saturating_duration_since(at).as_secs_f64() * 1e3);
                }
            }
            Ok(Some(took))
        });
        let took = all.await?;
        self.recording.store(false, Ordering::Relaxed);
        let dead = dying.iter().map(|(host, _)| host.name().to_owned());
        Ok((took, dead.collect()))
    }

    /// Parents by host, of those that have any.
    fn settled(&self, places: &HashMap<String, v1::Placement>) -> HashMap<String, Vec<String>> {
        let parents = |placement: &v1::Placement| {
            let active = placement.stripes.iter().flat_map(|stripe| &stripe.active);
            active.map(|parent| parent.host.clone()).collect()
        };
        places
            .iter()
            .map(|(name, place)| (name.clone(), parents(place)))
            .collect()
    }
}

impl Report {
    fn text(&self) -> String {
        let row = |what: &str, bare: String, own: String, goal: &str| {
            vec![what.to_owned(), bare, own, goal.to_owned()]
        };
        let two = |number: f64, unit: &str| format!("{number:.2} {unit}");
        let one = |number: f64, unit: &str| format!("{number:.1} {unit}");
        let (bare, own) = (&self.bare, &self.coordinator);
        let none = || "-".to_owned();
        let rows = [
            row(
                "all have places, durable",
                two(bare.burst_seconds, "s"),
                two(own.burst_seconds, "s"),
                "15 s",
            ),
            row(
                "a join, median",
                one(bare.join_ms.median, "ms"),
                one(own.join_ms.median, "ms"),
                "-",
            ),
            row(
                "a join, 99 of 100",
                one(bare.join_ms.p99, "ms"),
                one(own.join_ms.p99, "ms"),
                "-",
            ),
            row(
                "attempts made again",
                bare.again.to_string(),
                own.again.to_string(),
                "-",
            ),
            row(
                "processor time of that",
                one(bare.burst_cpu_seconds, "s"),
                one(own.burst_cpu_seconds, "s"),
                "-",
            ),
            row(
                "steady, of a processor",
                one(bare.steady_cpu_percent, "%"),
                one(own.steady_cpu_percent, "%"),
                "20 %",
            ),
            row(
                "steady, memory a host",
                one(bare.bytes_a_host / 1e3, "KB"),
                one(own.bytes_a_host / 1e3, "KB"),
                "60 KB",
            ),
            row(
                "orphans' new parents, median",
                none(),
                one(self.orphan_ms.median, "ms"),
                "50 ms",
            ),
            row(
                "orphans' new parents, most",
                none(),
                one(self.orphan_ms.most, "ms"),
                "50 ms",
            ),
            row(
                "restart to serving",
                none(),
                two(self.restart_seconds, "s"),
                "2 s",
            ),
            row("all back after it", none(), two(self.all_back_seconds, "s"), "-"),
        ];
        let table = draw(&["what", "bare service", "coordinator", "goal"], &rows);
        format!(
            "{table}{} hosts, {} at once, a beat every {} s, {} processors for all; depth {}; {} orphans of {DEATHS} dead hosts; {} hosts \
             moved by the restart",
            self.hosts,
            self.at_once,
            self.beat_seconds,
            self.processors,
            self.depth,
            self.orphans,
            self.moved_by_restart
        )
    }
}
