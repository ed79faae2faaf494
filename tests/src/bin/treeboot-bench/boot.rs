//! One guest booted from the same disk in three ways, by turns: what QEMU itself counts for its reads.
//!
//! Boot times under emulation hide I/O, so they are no measure; `query-blockstats` is. Each way has a disk of its own that it writes
//! to, and boots it once before the rounds: treeboot's cache is then warm, and so is the page cache for all three.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::Serialize;
use treeboot_hypervisor::{
    Acceleration, DiskSource, Hypervisor, Instance, Readiness, Seed, StopMode, VmSpec,
};
use treeboot_proto::v1;
use treeboot_tests::cluster::{Cluster, Plan};
use treeboot_tests::measure::newest;
use treeboot_tests::stats::Median;
use treeboot_tests::table::draw;
use treeboot_tests::tgt::Tgt;
use treeboot_types::{Iqn, IscsiUrl, VmName};

/// The image's name.
const IMAGE: &str = "bench";

/// What to measure.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Options {
    /// The disk image to boot.
    #[arg(long)]
    image: PathBuf,
    /// Measured boots of each kind.
    #[arg(long, default_value_t = 9)]
    rounds: u32,
    /// The text on the serial console that says a VM is up.
    #[arg(long, default_value = "login:")]
    ready_line: String,
    /// For how many seconds a VM may take to be up.
    #[arg(long, default_value_t = 300)]
    boot_limit_s: u64,
    /// Memory of a VM in MiB.
    #[arg(long, default_value_t = 256)]
    memory_mib: u32,
    /// Writes the figures to this file as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// One boot's reads.
#[derive(Debug, Clone, Copy, Serialize)]
struct Boot {
    read_operations: u64,
    read_bytes: u64,
    read_time_ns: u64,
}

impl Boot {
    fn ns_per_read(self) -> f64 {
        self.read_time_ns as f64 / self.read_operations.max(1) as f64
    }
}

#[derive(Debug, Clone, Copy, Serialize)]
struct Round {
    raw: Boot,
    tgt: Boot,
    treeboot: Boot,
}

#[derive(Debug, Serialize)]
struct Report {
    rounds: Vec<Round>,
    raw_us: Median,
    tgt_us: Median,
    treeboot_us: Median,
    /// Of each round's own pair; to reach: 0.7.
    treeboot_by_tgt: Median,
    treeboot_by_raw: Median,
    acceleration: Acceleration,
}

pub(crate) async fn run(options: &Options) -> Result<()> {
    let say = |what: &str| eprintln!("bench: {what}");
    let cluster = Cluster::start(
        "bench-boot",
        &Plan {
            hosts: 1,
            ..Plan::default()
        },
    )
    .await?;
    let folder = cluster.path().to_path_buf();
    let hypervisor = treeboot_hypervisor::probe(&folder)
        .await
        .context("no hypervisor")?;
    let bench = Bench {
        hypervisor,
        options: options.clone(),
        folder: folder.clone(),
    };

    let raw = folder.join("raw.raw");
    let behind_tgt = folder.join("tgt.raw");
    for copy in [&raw, &behind_tgt] {
        raw_copy(&options.image, copy)?;
    }
    let address = cluster.origin.bound()?.rpc.ip();
    let tgt = Tgt::serve(cluster.scratch(), "tgt", address, &behind_tgt, false).await?;
    cluster.import(&options.image, IMAGE).await?;
    let request = v1::CreateRequest {
        vm: "bench".into(),
        image: Some(newest(IMAGE)),
        device: false,
        limit_bytes: None,
    };
    let disk = cluster.hosts[0]
        .agent()
        .await?
        .create(request)
        .await?
        .into_inner()
        .disk
        .context("a disk")?;

    let initiator = Iqn::of_vm(&VmName::new("bench")?);
    let iscsi = |url: &str| -> Result<DiskSource> {
        Ok(DiskSource::Iscsi {
            url: url.parse::<IscsiUrl>()?,
            initiator: initiator.clone(),
            secret_file: None,
        })
    };
    let ways = [
        ("raw", DiskSource::Raw { path: raw }),
        ("tgt", iscsi(&tgt.url())?),
        ("treeboot", iscsi(&disk.url)?),
    ];
    let mut rounds = Vec::new();
    for number in 0..=options.rounds {
        // Each round begins with another way, so that none is always the first.
        let mut boots = [None; 3];
        for turn in 0..3 {
            let which = (turn + number as usize) % 3;
            let (name, source) = &ways[which];
            boots[which] = Some(bench.boot(name, source.clone()).await?);
        }
        let [Some(raw), Some(tgt), Some(treeboot)] = boots else {
            continue;
        };
        let round = Round { raw, tgt, treeboot };
        say(&format!(
            "{}: raw {:.0} µs, tgt {:.0} µs, treeboot {:.0} µs a read",
            if number == 0 {
                "warm-up".to_owned()
            } else {
                format!("round {number}")
            },
            round.raw.ns_per_read() / 1e3,
            round.tgt.ns_per_read() / 1e3,
            round.treeboot.ns_per_read() / 1e3,
        ));
        if number > 0 {
            rounds.push(round);
        }
    }
    tgt.kill()?;
    let report = Report::new(rounds, bench.hypervisor.acceleration)?;
    println!("{}", report.text());
    if let Some(file) = &options.json {
        let mut json = serde_json::to_string_pretty(&report)?;
        json.push('\n');
        std::fs::write(file, json).with_context(|| format!("could not write {}", file.display()))?;
    }
    cluster.pass();
    Ok(())
}

/// A raw copy of an image of any format, with its holes.
fn raw_copy(from: &Path, to: &Path) -> Result<()> {
    let status = std::process::Command::new("qemu-img")
        .args(["convert", "-O", "raw"])
        .arg(from)
        .arg(to)
        .status()
        .context("could not start qemu-img (apt-get install qemu-utils)")?;
    anyhow::ensure!(status.success(), "qemu-img convert ended with {status}");
    Ok(())
}

struct Bench {
    hypervisor: Hypervisor,
    options: Options,
    folder: PathBuf,
}

impl Bench {
    async fn boot(&self, name: &str, disk: DiskSource) -> Result<Boot> {
        let run_dir = self.folder.join(format!("vm-{name}"));
        let _ = std::fs::remove_dir_all(&run_dir);
        let vm = treeboot_hypervisor::start(
            &self.hypervisor,
            VmSpec {
                name: VmName::new("bench")?,
                // The same in all boots, so that the guest does the same work.
                instance: Instance([0x5a; 16]),
                disk,
                memory_mib: self.options.memory_mib,
                cpus: 1,
                seed: Some(Seed::default()),
                ready: Readiness::Console {
                    any_of: vec![self.options.ready_line.clone()],
                },
                network: false,
                run_dir,
            },
        )
        .await?;
        let limit = Duration::from_secs(self.options.boot_limit_s);
        vm.wait_ready(limit)
            .await
            .with_context(|| format!("from {name}"))?;
        let stats = vm.block_stats().await?;
        vm.stop(StopMode::Quit).await?;
        Ok(Boot {
            read_operations: stats.read_operations,
            read_bytes: stats.read_bytes,
            read_time_ns: stats.read_time_ns,
        })
    }
}

impl Report {
    fn new(rounds: Vec<Round>, acceleration: Acceleration) -> Result<Self> {
        let of = |value: &dyn Fn(&Round) -> f64| {
            let sample: Vec<f64> = rounds.iter().map(value).collect();
            Median::of(&sample).context("no round was measured")
        };
        let treeboot = |round: &Round| round.treeboot.ns_per_read();
        Ok(Self {
            raw_us: of(&|round| round.raw.ns_per_read() / 1e3)?,
            tgt_us: of(&|round| round.tgt.ns_per_read() / 1e3)?,
            treeboot_us: of(&|round| treeboot(round) / 1e3)?,
            treeboot_by_tgt: of(&|round| treeboot(round) / round.tgt.ns_per_read())?,
            treeboot_by_raw: of(&|round| treeboot(round) / round.raw.ns_per_read())?,
            rounds,
            acceleration,
        })
    }

    fn text(&self) -> String {
        let row = |name: &str, median: &Median| {
            vec![
                name.to_owned(),
                format!("{:.2}", median.median),
                format!("{:.2} to {:.2}", median.low, median.high),
                format!("{:.1} %", median.confidence * 100.0),
            ]
        };
        draw(
            &["a read took, in µs", "median", "interval", "confidence"],
            &[
                row("raw file", &self.raw_us),
                row("tgt", &self.tgt_us),
                row("treeboot, warm", &self.treeboot_us),
                row("treeboot by tgt", &self.treeboot_by_tgt),
                row("treeboot by raw", &self.treeboot_by_raw),
            ],
        )
    }
}
