//! A guest that writes, syncs, verifies and reads its base while everything between it and its bytes ends, again and again: it sees pauses, never an error, and no
//! byte is lost. Once for each front end.
//!
//! `TREEBOOT_ENDURE_RESTARTS` and `TREEBOOT_ENDURE_KILLS` say how often each process is restarted and killed; `cargo xtask soak endure` is the long one.

mod caches;
mod front;
mod pauses;

use std::cell::RefCell;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use treeboot_proto::v1;
use treeboot_tests::cluster::{Cluster, Plan};
use treeboot_tests::daemon::Daemon;
use treeboot_tests::image::Pattern;
use treeboot_tests::need::{Need, require};
use treeboot_tests::wait::wait_until;
use treeboot_tests::{fleet, guest, measure, uml};

use crate::device::{Device, holders};
use crate::room;
use crate::support::{Machine, on_own_thread_within};
use caches::{Devices, Part};
use front::Writer;
use pauses::{Round, Seen, table};

const IMAGE: &str = "base";
/// For what takes milliseconds on a machine that does nothing else, and seconds where an initiator tries again.
const SOON: Duration = Duration::from_secs(60);
/// Who did nothing for so long stands still.
const STILL: Duration = Duration::from_secs(1);
/// How long a host that says nothing keeps its place: short, so that a loss for good is one soon.
const LEASE: Duration = Duration::from_secs(3);
/// Of one round, under emulation and with everything else at work; it takes 0.1 to 4 s.
const ROUND_LIMIT: Duration = Duration::from_secs(8);
const WRITER_NEEDS: [Need; 5] = [
    Need::Root,
    Need::Program("perl", "perl-base"),
    Need::Program("fio", "fio"),
    Need::Program("blkdiscard", "util-linux"),
    Need::Program("mkfs.ext4", "e2fsprogs"),
];

/// How often each process ends.
#[derive(Debug, Clone, Copy)]
struct Counts {
    restarts: u32,
    kills: u32,
}

impl Counts {
    fn from_environment() -> Self {
        let count = |name: &str, default| {
            let text = std::env::var(format!("TREEBOOT_ENDURE_{name}")).ok();
            text.and_then(|text| text.parse().ok()).unwrap_or(default)
        };
        Self {
            restarts: count("RESTARTS", 1),
            kills: count("KILLS", 2),
        }
    }

    fn each(self) -> u32 {
        self.restarts + self.kills
    }

    fn limit(self) -> Duration {
        Duration::from_secs(180) + ROUND_LIMIT * (5 * self.each())
    }
}

/// What of a disk is written, and what stays the image's, in bytes.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    written: u64,
    base: u64,
}

impl Sizes {
    /// The base is long enough that some of it is unread when the last parent dies.
    fn of(counts: Counts) -> Self {
        let many = u64::from(counts.each());
        Self {
            written: (1 + many / 2).min(32) << 20,
            base: (12 + 2 * many) << 20,
        }
    }

    fn bytes(self) -> u64 {
        self.written + self.base
    }

    /// The writer writes nothing while it verifies: at 8 MiB a second at least.
    fn still(self) -> Duration {
        STILL + Duration::from_secs(self.written >> 23)
    }

    /// The first MiB of the base.
    fn read_again(self) -> Part {
        Part {
            offset: self.written,
            bytes: 1 << 20,
        }
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "the writers' logs are in wall clock time"
)]
fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(u64::MAX))
}

/// The cluster around one writer: origin → h1 → h2, its disk on the last.
struct Endurance<'a> {
    cluster: &'a Cluster,
    host: &'a Daemon,
    image: &'a str,
    progress: Progress,
    rounds: RefCell<Vec<Round>>,
}

/// What changes whenever the writer got something done.
enum Progress {
    /// The writes that the block device has done.
    Device(PathBuf),
    /// The room that the disk takes.
    Delta,
    /// What the guest says of its rounds.
    Console(PathBuf),
}

impl<'a> Endurance<'a> {
    fn new(cluster: &'a Cluster, image: &'a str, progress: Progress) -> Self {
        Self {
            cluster,
            host: &cluster.hosts[1],
            image,
            progress,
            rounds: RefCell::default(),
        }
    }

    fn progress(&self) -> Result<u64> {
        match &self.progress {
            Progress::Delta => self.allocated(),
            Progress::Console(console) => Ok(std::fs::metadata(console)?.len()),
            Progress::Device(device) => {
                let device = std::fs::canonicalize(device)?;
                let name = device.file_name().context("a device has a name")?;
                let stat = std::fs::read_to_string(Path::new("/sys/block").join(name).join("stat"))?;
                // The kernel's Documentation/block/stat.rst: the fifth is the count of writes that are done.
                let writes = stat.split_whitespace().nth(4).context("no count of writes")?;
                Ok(writes.parse()?)
            }
        }
    }

    /// Bytes that the disk's files take: each block is written once, until all are discarded. That a file was changed says less: a write that finds no room changes it, too.
    fn allocated(&self) -> Result<u64> {
        let mut sectors = 0;
        let mut folders = vec![self.host.folder().join("state/deltas")];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder)? {
                // What is renamed or removed meanwhile says nothing.
                let Ok(entry) = entry else { continue };
                let Ok(about) = entry.metadata() else { continue };
                match about.is_dir() {
                    true => folders.push(entry.path()),
                    false => sectors += about.blocks(),
                }
            }
        }
        Ok(sectors * 512)
    }

    async fn writes_go_on(&self) -> Result<()> {
        let before = self.progress()?;
        wait_until(SOON, "the writer to go on", async || {
            Ok((self.progress()? != before).then_some(()))
        })
        .await
    }

    /// Bytes of the base that came from above.
    async fn fetched(&self) -> Result<u64> {
        let base = measure::base_status(self.host, self.image).await?;
        let counters = base.and_then(|base| base.counters).unwrap_or_default();
        Ok(counters.fetched_parent_bytes + counters.fetched_fallback_bytes)
    }

    async fn reads_go_on(&self) -> Result<()> {
        let before = self.fetched().await?;
        wait_until(SOON, "the reader to go on", async || {
            Ok((self.fetched().await? != before).then_some(()))
        })
        .await
    }

    /// Whom the disk's host reads its base from.
    async fn parent(&self) -> Result<&'a Daemon> {
        let name = wait_until(SOON, "a parent", async || {
            let tree = measure::tree(self.cluster, self.image).await?;
            let own = tree.nodes.into_iter().find(|node| node.host == self.host.name());
            Ok(own.and_then(|own| own.parents.into_iter().next()))
        });
        self.cluster.agent(&name.await?)
    }

    /// Does something so many times; the disk is written to before, and again after each.
    async fn rounds(
        &self,
        what: &'static str,
        times: u32,
        mut strike: impl AsyncFnMut() -> Result<()>,
    ) -> Result<()> {
        self.writes_go_on().await?;
        for number in 1..=times {
            let round = async {
                let from = now_ms();
                strike().await?;
                self.writes_go_on().await?;
                let to = now_ms();
                self.rounds.borrow_mut().push(Round { what, from, to });
                anyhow::Ok(())
            };
            round.await.with_context(|| format!("{what}, time {number}"))?;
        }
        Ok(())
    }

    /// Everything but the agent's own host; `reads`: somebody reads what is not in the cache yet.
    async fn others(&self, counts: Counts, reads: bool) -> Result<()> {
        let reads_go_on = async || match reads {
            true => self.reads_go_on().await,
            false => Ok(()),
        };
        self.rounds("the parent's agent killed, started", counts.kills, async || {
            let parent = self.parent().await?;
            parent.kill()?;
            self.cluster.restart(parent).await?;
            reads_go_on().await
        })
        .await?;
        let lost = self.parent().await?;
        self.rounds("the parent lost for good", 1, async || {
            lost.kill()?;
            reads_go_on().await?;
            wait_until(SOON, "another parent", async || {
                let tree = measure::tree(self.cluster, self.image).await?;
                let own = tree.nodes.iter().find(|node| node.host == self.host.name());
                let another = own.is_some_and(|own| {
                    !own.parents.is_empty() && !own.parents.iter().any(|name| name == lost.name())
                });
                Ok(another.then_some(()))
            })
            .await?;
            reads_go_on().await
        })
        .await?;
        self.rounds("the parent's agent restarted", counts.restarts, async || {
            let parent = self.parent().await?;
            parent.terminate().await?;
            self.cluster.restart(parent).await?;
            reads_go_on().await
        })
        .await?;
        let coordinator = &self.cluster.coordinator;
        self.rounds("the coordinator killed, started", counts.kills, async || {
            coordinator.kill()?;
            self.writes_go_on().await?;
            self.cluster.restart(coordinator).await?;
            Ok(())
        })
        .await?;
        self.rounds("the coordinator restarted", counts.restarts, async || {
            coordinator.terminate().await?;
            self.cluster.restart(coordinator).await?;
            Ok(())
        })
        .await
    }

    async fn agent(&self, counts: Counts) -> Result<()> {
        self.rounds("the agent killed, started", counts.kills, async || {
            self.host.kill()?;
            self.cluster.restart(self.host).await?;
            Ok(())
        })
        .await?;
        self.rounds("the agent restarted", counts.restarts, async || {
            self.host.terminate().await?;
            self.cluster.restart(self.host).await?;
            Ok(())
        })
        .await
    }

    async fn holder(&self, counts: Counts) -> Result<()> {
        self.rounds("the holder killed", counts.kills, async || {
            let held = |pid: &Pid| holds_a_connection(*pid);
            let holder = holders(self.cluster).into_iter().find(held);
            let holder = holder.context("no holder")?;
            kill(holder, Signal::SIGKILL)?;
            wait_until(SOON, "another holder", async || {
                let another = holders(self.cluster)
                    .into_iter()
                    .find(|pid| *pid != holder && held(pid));
                Ok(another.map(|_| ()))
            })
            .await
        })
        .await
    }

    /// `still`: nobody who has room does nothing for so long.
    async fn full_disk(&self, small: &Path, still: Duration) -> Result<()> {
        self.rounds("no room for a while", 1, async || {
            let hog = room::Hog::new(small)?;
            let (mut since, mut progress) = (Instant::now(), self.progress()?);
            wait_until(SOON, "the writer to stand still", async || {
                // What the writer discards is taken, too. It needs room for each of its writes.
                let before = std::mem::replace(&mut progress, self.progress()?);
                if hog.take_all()? || progress != before {
                    since = Instant::now();
                }
                Ok((since.elapsed() > still).then_some(()))
            })
            .await?;
            hog.remove()
        })
        .await
    }

    fn tell(&self, front_end: &str, seen: &Seen) {
        println!("{}", table(front_end, &self.rounds.borrow(), seen));
    }
}

fn holds_a_connection(pid: Pid) -> bool {
    let open = std::fs::read_dir(format!("/proc/{pid}/fd"));
    let links = open.into_iter().flatten().flatten();
    links
        .filter_map(|entry| std::fs::read_link(entry.path()).ok())
        .any(|file| file == Path::new("/dev/fuse"))
}

fn plan(namespaces: bool) -> Plan {
    let plan = Plan {
        hosts: 2,
        fan_out: Some(1),
        namespaces,
        ..Plan::default()
    };
    plan.with_leases(LEASE)
}

/// The cluster, its image and both hosts' places in the tree.
async fn start(cluster: &Cluster, image: &Path, name: &str) -> Result<()> {
    cluster.coordinator.start(cluster.scratch()).await?;
    cluster.start_agents().await?;
    cluster.import(image, name).await?;
    for host in &cluster.hosts {
        fleet::attach(host, name).await?;
    }
    Ok(())
}

fn pattern(cluster: &Cluster, sizes: Sizes) -> Result<PathBuf> {
    let file = cluster.path().join("image.raw");
    Pattern {
        seed: 171,
        bytes: sizes.bytes(),
    }
    .write(&file)?;
    Ok(file)
}

#[test]
fn a_block_device_outlives_everything_but_its_host() -> Result<()> {
    if !require(&WRITER_NEEDS) {
        return Ok(());
    }
    let counts = Counts::from_environment();
    on_own_thread_within(counts.limit(), Machine::Alone, async move || {
        let sizes = Sizes::of(counts);
        let cluster = Cluster::prepare("endure-device", &plan(false))?;
        let small = cluster.hosts[1].folder().join("state/deltas");
        room::small(&cluster.path().join("small.img"), &small)?;
        let mut devices = Devices::mount(&cluster, counts.kills)?;
        let image = pattern(&cluster, sizes)?;
        start(&cluster, &image, IMAGE).await?;
        devices.begin(&image, sizes.read_again()).await?;
        let device = Device::new(&cluster.hosts[1], "endures");
        let endurance = Endurance::new(&cluster, IMAGE, Progress::Device(device.path()));
        endurance.host.agent().await?.create(device.request()).await?;
        let mut writer = Writer::here(&cluster, sizes, &device.path())?;
        writer.begins(|| endurance.progress()).await?;
        let struck = async {
            endurance.others(counts, true).await?;
            let again = || Writer::read_again(&cluster);
            endurance.lost_caches(counts.kills, &mut devices, again).await?;
            endurance.holder(counts).await?;
            endurance.agent(counts).await?;
            endurance.full_disk(&small, sizes.still()).await
        };
        let struck = struck.await;
        // Its own words say more than that it did not go on.
        writer.is_at_work()?;
        struck?;
        let output = writer.finish().await?;
        endurance.tell("`/dev/treeboot/VM`", &Seen::parse(&output));
        let destroy = v1::DestroyRequest {
            vm: device.vm.clone(),
            instance_only: false,
        };
        endurance.host.agent().await?.destroy(destroy).await?;
        device.is_gone().await?;
        cluster.pass();
        Ok(())
    })
}

#[test]
fn the_kernels_initiator_outlives_everything_but_its_host() -> Result<()> {
    if !(require(&WRITER_NEEDS)
        && require(&uml::NEEDS)
        && require(&[Need::Program("iscsiadm", "open-iscsi")]))
    {
        return Ok(());
    }
    let counts = Counts::from_environment();
    on_own_thread_within(counts.limit(), Machine::Alone, async move || {
        let sizes = Sizes::of(counts);
        let cluster = Cluster::prepare("endure-initiator", &plan(true))?;
        let small = cluster.hosts[1].folder().join("state/deltas");
        room::small(&cluster.path().join("small.img"), &small)?;
        let mut devices = Devices::mount(&cluster, counts.kills)?;
        let image = pattern(&cluster, sizes)?;
        start(&cluster, &image, IMAGE).await?;
        devices.begin(&image, sizes.read_again()).await?;
        let endurance = Endurance::new(&cluster, IMAGE, Progress::Delta);
        let create = v1::CreateRequest {
            vm: "endures".into(),
            image: Some(measure::newest(IMAGE)),
            device: false,
            limit_bytes: None,
        };
        let created = endurance.host.agent().await?.create(create).await?.into_inner();
        let mut writer = Writer::guest(&cluster, sizes, &created).await?;
        writer.begins(|| endurance.progress()).await?;
        endurance.others(counts, true).await?;
        let again = || Writer::read_again(&cluster);
        endurance.lost_caches(counts.kills, &mut devices, again).await?;
        endurance.agent(counts).await?;
        endurance.full_disk(&small, sizes.still()).await?;
        let output = writer.finish().await?;
        endurance.tell("`iscsi://`, Linux's initiator", &Seen::parse(&output));
        cluster.pass();
        Ok(())
    })
}

/// When a guest's console grew, in ms, while `done` is not said.
fn watch_console(console: PathBuf, done: Arc<AtomicBool>) -> std::thread::JoinHandle<Vec<u64>> {
    std::thread::spawn(move || {
        let (mut times, mut bytes) = (Vec::new(), 0);
        while !done.load(Ordering::Relaxed) {
            let now = std::fs::metadata(&console).map_or(0, |file| file.len());
            if now != bytes {
                bytes = now;
                times.push(now_ms());
            }
            std::thread::park_timeout(Duration::from_millis(5));
        }
        times
    })
}

#[test]
#[ignore = "a soak: its guest is emulated; single deaths under it are in faults"]
fn qemu_outlives_everything_but_its_host() -> Result<()> {
    let (Some(file), true) = (guest::busybox(), require(&[Need::Root])) else {
        return Ok(());
    };
    let counts = Counts::from_environment();
    on_own_thread_within(counts.limit(), Machine::Alone, async move || {
        let cluster = Cluster::prepare("endure-qemu", &plan(false))?;
        let small = cluster.hosts[1].folder().join("state/deltas");
        room::small(&cluster.path().join("small.img"), &small)?;
        let mut devices = Devices::mount(&cluster, counts.kills)?;
        start(&cluster, &file, IMAGE).await?;
        let part = Part::of_content(&file, 256 << 10)?;
        devices.begin(&file, part).await?;
        let jobs = [
            format!("soak_again={}", part.offset >> 16),
            format!("soak_seconds={}", counts.limit().as_secs()),
        ];
        let mut order = guest::order_with_jobs("endures", IMAGE, &jobs.each_ref().map(String::as_str));
        order.ready_line = guest::UP.into();
        let vm = fleet::boot(&cluster.hosts[1], &order).await?;
        let endurance = Endurance::new(
            &cluster,
            IMAGE,
            Progress::Console(PathBuf::from(&vm.console_path)),
        );
        let done = Arc::new(AtomicBool::new(false));
        let watching = watch_console(PathBuf::from(&vm.console_path), Arc::clone(&done));
        let struck = async {
            endurance
                .rounds("nothing", counts.kills, async || endurance.writes_go_on().await)
                .await?;
            endurance.others(counts, false).await?;
            let again = || Ok(guest::console(&vm)?.matches(" round ").count() as u64);
            endurance.lost_caches(counts.kills, &mut devices, again).await?;
            endurance.agent(counts).await?;
            endurance.full_disk(&small, STILL).await?;
            endurance
                .rounds("nothing, again", 2, async || endurance.writes_go_on().await)
                .await
        };
        let struck = struck.await;
        done.store(true, Ordering::Relaxed);
        let Ok(times) = watching.join() else {
            bail!("the console was not watched");
        };
        struck?;
        let console = guest::console(&vm)?;
        let last = console.lines().rev().find(|line| line.contains(" round "));
        let last = last.context("the guest did nothing")?;
        anyhow::ensure!(last.trim_end().ends_with("errors 0"), "{last}");
        let after = fleet::describe(endurance.host, &order.vm).await?;
        anyhow::ensure!(after.pid == vm.pid, "it is another process");
        guest::check_no_errors(&after)?;
        println!("its last words: {last}");
        endurance.tell("`iscsi://`, QEMU", &Seen::at(&times));
        cluster.pass();
        Ok(())
    })
}
