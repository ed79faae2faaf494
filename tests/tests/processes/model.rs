//! The model test: random verbs in random order on two hosts, with kills of their agents, against a model that is a few maps. After
//! each verb the VMs are those of the model; disks and snapshots are read and compared with it. A verb in whose midst an agent is
//! killed is called again and then has been done once.
//!
//! `TREEBOOT_SEED` chooses another life, `TREEBOOT_MODEL_SECONDS` a longer one (`cargo xtask soak model`). Seeds that found
//! something stay in [`SEEDS`].

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use tonic::Code;
use treeboot_proto::v1;
use treeboot_proto::v1::agent_client::AgentClient;
use treeboot_tests::cluster::{Cluster, Plan};
use treeboot_tests::daemon::Daemon;
use treeboot_tests::fleet::last;
use treeboot_tests::image::Pattern;
use treeboot_tests::measure::newest;
use treeboot_tests::reader::{Blocks, check_blocks, log_in, write_blocks};
use treeboot_tests::wait::wait_until;

use crate::support::{Machine, on_own_thread_within};
use crate::written::BLOCK;

const IMAGE: &str = "pattern";
const PATTERN: Pattern = Pattern {
    seed: 79,
    bytes: 2 << 20,
};
const BLOCKS: u64 = PATTERN.bytes / BLOCK;
const SOON: Duration = Duration::from_secs(60);
/// In an ordinary run: how many verbs of each life.
const STEPS: u64 = 60;
/// What an ordinary run lives through.
const SEEDS: &[u64] = &[1];
const VMS: u64 = 5;
const SNAPSHOTS: u64 = 4;
const HOSTS: u64 = 2;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

#[derive(Debug, Clone, Default)]
struct Disk {
    now: Blocks,
    snapshots: BTreeMap<String, Blocks>,
}

#[derive(Debug, Clone)]
enum Verb {
    Create {
        vm: String,
        host: usize,
    },
    Write {
        vm: String,
        blocks: Vec<u64>,
        fill: u8,
    },
    Snapshot {
        vm: String,
        snapshot: String,
    },
    RollBack {
        vm: String,
        snapshot: String,
    },
    Delete {
        vm: String,
        snapshot: String,
    },
    Clone {
        vm: String,
        snapshot: Option<String>,
        new_vm: String,
        to: usize,
    },
    Migrate {
        vm: String,
        to: usize,
    },
    Destroy {
        vm: String,
    },
    Kill {
        host: usize,
    },
}

/// What there should be: VMs with their hosts. A name is used on one host at a time.
#[derive(Debug, Clone, Default)]
struct Model(BTreeMap<String, (usize, Disk)>);

impl Model {
    fn host(&self, vm: &str) -> Option<usize> {
        self.0.get(vm).map(|(host, _)| *host)
    }

    fn choose(&self, random: &mut Random) -> Verb {
        let vm = format!("vm-{}", random.below(VMS));
        let snapshot = format!("s{}", random.below(SNAPSHOTS));
        let host = random.below(HOSTS) as usize;
        match random.below(23) {
            0..=1 => Verb::Create {
                // A name of the other host would be another VM.
                host: self.host(&vm).unwrap_or(host),
                vm,
            },
            2..=7 => {
                let count = 1 + random.below(8);
                Verb::Write {
                    vm,
                    blocks: (0..count).map(|_| random.below(BLOCKS)).collect(),
                    fill: random.next() as u8,
                }
            }
            8..=10 => Verb::Snapshot { vm, snapshot },
            11 => Verb::RollBack { vm, snapshot },
            12..=13 => Verb::Delete { vm, snapshot },
            14..=16 => {
                let new_vm = format!("vm-{}", random.below(VMS));
                Verb::Clone {
                    vm,
                    snapshot: (random.below(3) == 0).then_some(snapshot),
                    to: self.host(&new_vm).unwrap_or(host),
                    new_vm,
                }
            }
            17 => Verb::Destroy { vm },
            18..=20 => Verb::Migrate { vm, to: host },
            _ => Verb::Kill { host },
        }
    }

    /// What the verb is to answer; where it is `Ok`, what there is then. A snapshot's name may be asked for again where nothing was
    /// written since, which only the disk knows.
    fn expect(&mut self, verb: &Verb) -> Code {
        let unknown = |there: bool| if there { Code::Ok } else { Code::NotFound };
        match verb {
            Verb::Kill { .. } => Code::Ok,
            Verb::Create { vm, host } => {
                self.0.entry(vm.clone()).or_insert((*host, Disk::default()));
                Code::Ok
            }
            Verb::Destroy { vm } => unknown(self.0.remove(vm).is_some()),
            Verb::Migrate { vm, to } => match self.0.get_mut(vm) {
                None => Code::NotFound,
                Some((host, _)) => {
                    *host = *to;
                    Code::Ok
                }
            },
            Verb::Write { vm, blocks, fill } => match self.0.get_mut(vm) {
                None => Code::NotFound,
                Some((_, disk)) => {
                    disk.now.extend(blocks.iter().map(|block| (*block, *fill)));
                    Code::Ok
                }
            },
            Verb::Snapshot { vm, snapshot } => match self.0.get_mut(vm) {
                None => Code::NotFound,
                Some((_, disk)) if disk.snapshots.contains_key(snapshot) => Code::AlreadyExists,
                Some((_, disk)) => {
                    disk.snapshots.insert(snapshot.clone(), disk.now.clone());
                    Code::Ok
                }
            },
            Verb::RollBack { vm, snapshot } => {
                let Some((_, disk)) = self.0.get_mut(vm) else {
                    return Code::NotFound;
                };
                let there = disk.snapshots.get(snapshot).cloned();
                disk.now = there.clone().unwrap_or_else(|| disk.now.clone());
                unknown(there.is_some())
            }
            Verb::Delete { vm, snapshot } => match self.0.get_mut(vm) {
                None => Code::NotFound,
                Some((_, disk)) => unknown(disk.snapshots.remove(snapshot).is_some()),
            },
            Verb::Clone {
                vm,
                snapshot,
                new_vm,
                to,
            } => {
                let Some((_, disk)) = self.0.get(vm) else {
                    return Code::NotFound;
                };
                let blocks = match snapshot {
                    None => Some(&disk.now),
                    Some(snapshot) => disk.snapshots.get(snapshot),
                };
                let Some(blocks) = blocks.cloned() else {
                    return Code::NotFound;
                };
                if self.0.contains_key(new_vm) {
                    return Code::AlreadyExists;
                }
                let disk = Disk {
                    now: blocks,
                    ..Disk::default()
                };
                self.0.insert(new_vm.clone(), (*to, disk));
                Code::Ok
            }
        }
    }
}

/// The code of a call; an error of the connection where the agent was killed meanwhile is its own.
fn code<T>(answer: Result<T, tonic::Status>) -> Result<Code, tonic::Status> {
    match answer {
        Ok(_) => Ok(Code::Ok),
        Err(status)
            if matches!(status.code(), Code::NotFound | Code::AlreadyExists)
                && std::error::Error::source(&status).is_none() =>
        {
            Ok(status.code())
        }
        Err(status) => Err(status),
    }
}

struct World<'a> {
    cluster: &'a Cluster,
    model: Model,
}

impl World<'_> {
    fn agent(&self, host: usize) -> Result<&Daemon> {
        self.cluster.hosts.get(host).context("a host")
    }

    async fn call(&self, agent: &Daemon, verb: &Verb) -> Result<Result<Code, tonic::Status>> {
        let mut client = agent.agent().await?;
        Ok(match verb {
            Verb::Kill { .. } => Ok(Code::Ok),
            Verb::Create { vm, .. } => {
                let request = v1::CreateRequest {
                    vm: vm.clone(),
                    image: Some(newest(IMAGE)),
                    device: false,
                    limit_bytes: None,
                };
                code(client.create(request).await)
            }
            Verb::Destroy { vm } => {
                let request = v1::DestroyRequest {
                    vm: vm.clone(),
                    instance_only: false,
                };
                code(client.destroy(request).await)
            }
            Verb::Write { vm, blocks, fill } => {
                if self.model.host(vm).is_none() {
                    return Ok(Ok(Code::NotFound));
                }
                let (session, lun) = log_in(agent, IMAGE, vm).await?;
                write_blocks(&session, lun, blocks, *fill).await?;
                Ok(Code::Ok)
            }
            Verb::Snapshot { vm, snapshot } => {
                let request = v1::SnapshotRequest {
                    vm: vm.clone(),
                    snapshot: snapshot.clone(),
                    ..v1::SnapshotRequest::default()
                };
                code(client.snapshot(request).await)
            }
            Verb::RollBack { vm, snapshot } => {
                let request = v1::RollBackRequest {
                    vm: vm.clone(),
                    snapshot: snapshot.clone(),
                };
                code(client.roll_back(request).await)
            }
            Verb::Delete { vm, snapshot } => {
                let request = v1::DeleteSnapshotRequest {
                    vm: vm.clone(),
                    snapshot: snapshot.clone(),
                };
                code(client.delete_snapshot(request).await)
            }
            Verb::Migrate { vm, to } => {
                let to = self.agent(*to)?;
                let request = v1::MigrateRequest {
                    vm: vm.clone(),
                    destination: to.name().into(),
                    destination_address: to.bound()?.rpc.to_string(),
                };
                match client.migrate(request).await {
                    Err(status) => code::<()>(Err(status)),
                    Ok(stream) => {
                        let ended = last(stream.into_inner(), |step| step.result.is_some());
                        code(ended.await)
                    }
                }
            }
            Verb::Clone {
                vm,
                snapshot,
                new_vm,
                to,
            } => {
                let to = self.agent(*to)?;
                let request = v1::CloneRequest {
                    vm: vm.clone(),
                    destination: to.name().into(),
                    new_vm: new_vm.clone(),
                    destination_address: to.bound()?.rpc.to_string(),
                    snapshot: snapshot.clone().unwrap_or_default(),
                };
                match AgentClient::clone(&mut client, request).await {
                    Err(status) => code::<()>(Err(status)),
                    Ok(stream) => {
                        let ended = last(stream.into_inner(), |step| step.result.is_some());
                        code(ended.await)
                    }
                }
            }
        })
    }

    /// Carries the verb out, with a kill in its midst where there is a moment for it, and compares the answer.
    async fn step(&mut self, verb: &Verb, kill_after: Option<Duration>) -> Result<()> {
        let on = match verb {
            Verb::Kill { host } | Verb::Create { host, .. } => *host,
            Verb::Write { vm, .. }
            | Verb::Snapshot { vm, .. }
            | Verb::RollBack { vm, .. }
            | Verb::Delete { vm, .. }
            | Verb::Clone { vm, .. }
            | Verb::Migrate { vm, .. }
            | Verb::Destroy { vm } => self.model.host(vm).unwrap_or_default(),
        };
        if let Verb::Kill { host } = verb {
            return self.restart(*host).await;
        }
        let agent = self.agent(on)?;
        let mut killed = false;
        if let Some(moment) = kill_after {
            tokio::select! {
                answer = self.call(agent, verb) => drop(answer),
                () = tokio::time::sleep(moment) => {}
            }
            // Perhaps it was done already, perhaps it never began.
            self.restart(match verb {
                Verb::Migrate { to, .. } if moment.as_micros() % 2 == 0 => *to,
                _ => on,
            })
            .await?;
            killed = true;
        }
        let before = self.model.clone();
        let mut after = self.model.clone();
        let expected = after.expect(verb);
        let seen = wait_until(SOON, "the verb", async || {
            match self.call(agent, verb).await? {
                Ok(code) => Ok(Some(code)),
                // Another front end is still seen as logged in for a moment.
                Err(status) if matches!(status.code(), Code::FailedPrecondition | Code::Unavailable) => {
                    Ok(None)
                }
                Err(status) => Err(status.into()),
            }
        })
        .await?;
        let same = match verb {
            // Nothing was written since: the same snapshot again.
            Verb::Snapshot { vm, snapshot } if expected == Code::AlreadyExists && seen == Code::Ok => before
                .0
                .get(vm)
                .is_some_and(|(_, disk)| disk.snapshots.get(snapshot) == Some(&disk.now)),
            // It was done before the kill.
            Verb::Destroy { .. } | Verb::Delete { .. } | Verb::Migrate { .. }
                if killed && expected == Code::Ok =>
            {
                matches!(seen, Code::Ok | Code::NotFound)
            }
            Verb::Clone { .. } | Verb::Snapshot { .. } if killed && expected == Code::Ok => {
                matches!(seen, Code::Ok | Code::AlreadyExists)
            }
            _ => seen == expected,
        };
        ensure!(same, "it answered {seen:?}, not {expected:?}");
        self.model = after;
        self.names().await
    }

    async fn restart(&self, host: usize) -> Result<()> {
        let agent = self.agent(host)?;
        agent.kill()?;
        self.cluster.restart(agent).await?;
        self.cluster.wait_known().await
    }

    /// The VMs of each host, and their snapshots, are the model's.
    async fn names(&self) -> Result<()> {
        for host in 0..HOSTS as usize {
            let mut client = self.agent(host)?.agent().await?;
            let listed = client.list(v1::ListRequest::default()).await?.into_inner();
            let mut seen: Vec<_> = listed.disks.into_iter().map(|disk| disk.vm).collect();
            seen.sort();
            let there = self.model.0.iter().filter(|(_, (on, _))| *on == host);
            let expected: Vec<_> = there.clone().map(|(vm, _)| vm.clone()).collect();
            ensure!(
                seen == expected,
                "on host {host} there are {seen:?}, not {expected:?}"
            );
            for (vm, (_, disk)) in there {
                let request = v1::ListSnapshotsRequest { vm: vm.clone() };
                let layers = client.list_snapshots(request).await?.into_inner().layers;
                let names = layers.into_iter().map(|layer| layer.snapshot);
                let mut seen: Vec<_> = names.filter(|name| !name.is_empty()).collect();
                seen.sort();
                let expected: Vec<_> = disk.snapshots.keys().cloned().collect();
                ensure!(
                    seen == expected,
                    "{vm} has the snapshots {seen:?}, not {expected:?}"
                );
            }
        }
        Ok(())
    }

    async fn content(&self, vm: &str) -> Result<()> {
        let Some((host, disk)) = self.model.0.get(vm) else {
            return Ok(());
        };
        let (session, lun) = log_in(self.agent(*host)?, IMAGE, vm).await?;
        check_blocks(&session, lun, PATTERN, &disk.now)
            .await
            .context(vm.to_owned())
    }

    /// Every disk and every snapshot of it; then all goes, and nothing is left.
    async fn end(&mut self) -> Result<()> {
        for (vm, (_, disk)) in self.model.0.clone() {
            self.content(&vm).await?;
            for snapshot in disk.snapshots.into_keys() {
                let vm = vm.clone();
                self.step(
                    &Verb::RollBack {
                        vm: vm.clone(),
                        snapshot,
                    },
                    None,
                )
                .await?;
                self.content(&vm).await?;
            }
            self.step(&Verb::Destroy { vm }, None).await?;
        }
        for host in &self.cluster.hosts {
            let dir = host.folder().join("state/deltas");
            let left: Vec<_> = std::fs::read_dir(dir)?.collect();
            ensure!(left.is_empty(), "{}: {left:?} is left", host.name());
        }
        Ok(())
    }
}

/// One life; how many verbs it had.
async fn live(cluster: &Cluster, seed: u64, until: impl Fn(u64) -> bool) -> Result<u64> {
    println!("model: TREEBOOT_SEED={seed}");
    let mut random = Random(seed);
    let mut world = World {
        cluster,
        model: Model::default(),
    };
    let mut step = 0;
    while !until(step) {
        let verb = world.model.choose(&mut random);
        let kill = (random.below(8) == 0 && !matches!(verb, Verb::Write { .. }))
            .then(|| Duration::from_micros(random.below(20_000)));
        let done = world.step(&verb, kill).await;
        done.with_context(|| format!("seed {seed}, step {step}: {verb:?}, killed after {kill:?}"))?;
        let vm = format!("vm-{}", random.below(VMS));
        let read = world.content(&vm).await;
        read.with_context(|| format!("seed {seed}, after step {step}: {verb:?}, killed after {kill:?}"))?;
        step += 1;
    }
    let ended = world.end().await;
    ended.with_context(|| format!("seed {seed}, at the end, after {step} steps"))?;
    Ok(step)
}

#[test]
fn random_verbs_on_several_hosts_through_kills_are_those_of_a_model() -> Result<()> {
    let number = |name: &str| {
        let text = std::env::var(name).ok();
        text.map(|text| text.parse::<u64>()).transpose()
    };
    let (seed, seconds) = (number("TREEBOOT_SEED")?, number("TREEBOOT_MODEL_SECONDS")?);
    let limit = Duration::from_secs(180 + seconds.unwrap_or(0));
    on_own_thread_within(limit, Machine::Shared, async move || {
        let plan = Plan {
            hosts: HOSTS as usize,
            ..Plan::default()
        };
        let cluster = Cluster::start("model", &plan).await?;
        let file = cluster.path().join("pattern.raw");
        PATTERN.write(&file)?;
        cluster.import(&file, IMAGE).await?;
        let began = Instant::now();
        let mut verbs = 0;
        match seconds {
            None => {
                for &seed in seed
                    .as_slice()
                    .iter()
                    .chain(SEEDS.iter().filter(|_| seed.is_none()))
                {
                    verbs += live(&cluster, seed, |step| step >= STEPS).await?;
                }
            }
            Some(seconds) => {
                let mut seed = seed.unwrap_or(1);
                while began.elapsed().as_secs() < seconds {
                    verbs += live(&cluster, seed, |step| step >= 4 * STEPS).await?;
                    seed = seed.wrapping_add(1);
                }
            }
        }
        println!("model: {verbs} verbs in {:.1} s", began.elapsed().as_secs_f64());
        if verbs == 0 {
            bail!("nothing was done");
        }
        cluster.pass();
        Ok(())
    })
}
