//! Hosts on links of one speed, which read the same image at the same moment from nothing: what each of them uploads, and when the
//! last of them has it all, for each shape of the trees.
//!
//! Every host is a network namespace with one link, shaped in both directions; bytes are those of the link, headers of all layers and
//! the control traffic included. The readers run in their host's namespace, so that only what goes between hosts is on a link.

use std::path::PathBuf;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use serde::Serialize;
use treeboot_tests::cluster::{Cluster, Plan};
use treeboot_tests::daemon::Daemon;
use treeboot_tests::image::Pattern;
use treeboot_tests::network::{self, Network};
use treeboot_tests::reader::{log_in, read_whole};
use treeboot_tests::stats::Median;
use treeboot_tests::table::draw;

const IMAGE: &str = "bench";
/// Width of the longest bar, in characters.
const BAR: usize = 40;

/// What to measure.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Options {
    /// Hosts, besides the origin.
    #[arg(long, default_value_t = 8)]
    hosts: usize,
    /// The image, in MiB.
    #[arg(long, default_value_t = 256)]
    mib: u64,
    /// Speed of every link, the origin's too, in Mbit/s, in each direction.
    #[arg(long, default_value_t = 100)]
    mbit: u32,
    /// Rounds; each runs every policy once.
    #[arg(long, default_value_t = 1)]
    rounds: u32,
    /// Writes the figures to this file as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// A shape of the trees, as the coordinator is told it.
struct Shape {
    name: &'static str,
    arguments: &'static [&'static str],
}

const SHAPES: [Shape; 3] = [
    Shape {
        name: "striped, 2 stripes",
        arguments: &["--policy", "striped", "--stripes", "2"],
    },
    Shape {
        name: "binary",
        arguments: &["--policy", "binary"],
    },
    Shape {
        name: "k-ary, fan-out 4",
        arguments: &["--policy", "k-ary", "--fan-out", "4"],
    },
];

/// One host's part in a run.
#[derive(Debug, Clone, Serialize)]
struct HostRun {
    host: String,
    /// From the common start to its last byte; the origin reads nothing.
    took_s: Option<f64>,
    uploaded_bytes: u64,
    downloaded_bytes: u64,
}

/// All hosts read the image once.
#[derive(Debug, Clone, Serialize)]
struct Run {
    shape: String,
    round: u32,
    hosts: Vec<HostRun>,
}

/// One shape over all rounds.
#[derive(Debug, Serialize)]
struct Summary {
    shape: String,
    /// Uploads by the image's size.
    origin: Median,
    busiest_host: Median,
    /// Until the last host had all, in seconds, and by the time that the image takes over one link.
    last_s: Median,
    last_by_link: Median,
    median_host_s: Median,
}

#[derive(Debug, Serialize)]
struct Report {
    hosts: usize,
    image_bytes: u64,
    link_mbit: u32,
    /// What the image takes over one link: the physical limit.
    link_s: f64,
    summaries: Vec<Summary>,
    runs: Vec<Run>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    ensure!(
        options.hosts > 0 && options.mib > 0 && options.mbit > 0 && options.rounds > 0,
        "nothing to measure: hosts, MiB, Mbit/s and rounds are from 1"
    );
    let mut runs = Vec::new();
    for round in 1..=options.rounds {
        // Each round begins with another shape, so that none is always the first.
        for turn in 0..SHAPES.len() {
            let shape = &SHAPES[(turn + round as usize - 1) % SHAPES.len()];
            eprintln!("bench: round {round}: {}", shape.name);
            // A thread for each, because whoever makes a network moves into it for good.
            let done = std::thread::scope(|scope| scope.spawn(|| one(options, shape, round)).join());
            let run = done.map_err(|_| anyhow!("the run of '{}' panicked", shape.name))??;
            eprintln!("bench: {}", run.line(options));
            runs.push(run);
        }
    }
    let report = Report::new(options, runs)?;
    println!("{}", report.text());
    if let Some(file) = &options.json {
        let mut json = serde_json::to_string_pretty(&report)?;
        json.push('\n');
        std::fs::write(file, json).with_context(|| format!("could not write {}", file.display()))?;
    }
    Ok(())
}

/// A cluster from nothing, until every host has read all.
fn one(options: &Options, shape: &Shape, round: u32) -> Result<Run> {
    let pattern = Pattern {
        seed: 4,
        bytes: options.mib << 20,
    };
    let plan = Plan {
        hosts: options.hosts,
        coordinator_args: shape.arguments.iter().map(ToString::to_string).collect(),
        namespaces: true,
        ..Plan::default()
    };
    let runtime = current_thread()?;
    let cluster = runtime.block_on(async {
        let cluster = Cluster::start("bench-links", &plan).await?;
        let file = cluster.path().join("image.raw");
        pattern.write(&file)?;
        cluster.import(&file, IMAGE).await?;
        Ok::<_, anyhow::Error>(cluster)
    })?;
    let network = cluster
        .network
        .as_ref()
        .context("a cluster without its network")?;
    let count = options.hosts + 1;
    for host in 0..count {
        network.shape_host(host, options.mbit)?;
    }
    let before = (0..count)
        .map(|host| network.link_bytes(host))
        .collect::<Result<Vec<_>>>()?;
    let took = read_everywhere(&cluster.hosts, network, pattern)?;
    let mut hosts = Vec::new();
    for (number, before) in before.into_iter().enumerate() {
        let after = network.link_bytes(number)?;
        let (host, took_s) = match number.checked_sub(1) {
            None => (cluster.origin.name(), None),
            Some(index) => (cluster.hosts[index].name(), Some(took[index].as_secs_f64())),
        };
        hosts.push(HostRun {
            host: host.to_owned(),
            took_s,
            uploaded_bytes: after.sent - before.sent,
            downloaded_bytes: after.received - before.received,
        });
    }
    cluster.pass();
    Ok(Run {
        shape: shape.name.to_owned(),
        round,
        hosts,
    })
}

fn current_thread() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?)
}

/// All hosts are attached, then all read at once, each by a thread in its own namespace; gives the time of each.
fn read_everywhere(hosts: &[Daemon], network: &Network, pattern: Pattern) -> Result<Vec<Duration>> {
    let ready = Barrier::new(hosts.len());
    std::thread::scope(|scope| {
        let readers: Vec<_> = (1..)
            .zip(hosts)
            .map(|(number, host)| {
                let ready = &ready;
                scope.spawn(move || {
                    let attached = network::enter(&network.namespace(number)).and_then(|()| {
                        let runtime = current_thread()?;
                        let session = runtime.block_on(log_in(host, IMAGE, host.name()))?;
                        Ok((runtime, session))
                    });
                    // Also by whoever failed, so that nobody waits for ever.
                    ready.wait();
                    let (runtime, (session, lun)) = attached?;
                    let began = Instant::now();
                    runtime.block_on(read_whole(&session, lun, pattern))?;
                    Ok(began.elapsed())
                })
            })
            .collect();
        let ended = hosts.iter().zip(readers).map(|(host, reader)| {
            let read = reader
                .join()
                .unwrap_or_else(|_| Err(anyhow!("its reader panicked")));
            read.with_context(|| format!("{} did not read the image", host.name()))
        });
        ended.collect()
    })
}

impl Run {
    fn uploads(&self, image_bytes: u64) -> impl Iterator<Item = f64> {
        self.hosts
            .iter()
            .map(move |host| host.uploaded_bytes as f64 / image_bytes as f64)
    }

    fn times(&self) -> Vec<f64> {
        let mut times: Vec<f64> = self.hosts.iter().filter_map(|host| host.took_s).collect();
        times.sort_by(f64::total_cmp);
        times
    }

    fn origin(&self, image_bytes: u64) -> f64 {
        self.uploads(image_bytes).next().unwrap_or(f64::NAN)
    }

    fn busiest(&self, image_bytes: u64) -> f64 {
        self.uploads(image_bytes).skip(1).fold(0.0, f64::max)
    }

    fn last(&self) -> f64 {
        self.times().last().copied().unwrap_or(f64::NAN)
    }

    fn line(&self, options: &Options) -> String {
        let image = options.mib << 20;
        format!(
            "{}: the origin uploaded {:.2} of the image, the busiest host {:.2}; the last host had all after {:.1} s",
            self.shape,
            self.origin(image),
            self.busiest(image),
            self.last()
        )
    }
}

impl Report {
    fn new(options: &Options, runs: Vec<Run>) -> Result<Self> {
        let image_bytes = options.mib << 20;
        let link_s = image_bytes as f64 * 8.0 / (f64::from(options.mbit) * 1e6);
        let summaries = SHAPES.iter().map(|shape| {
            let of = |value: &dyn Fn(&Run) -> f64| {
                let sample: Vec<f64> = runs
                    .iter()
                    .filter(|run| run.shape == shape.name)
                    .map(value)
                    .collect();
                Median::of(&sample).context("no round was measured")
            };
            Ok(Summary {
                shape: shape.name.to_owned(),
                origin: of(&|run| run.origin(image_bytes))?,
                busiest_host: of(&|run| run.busiest(image_bytes))?,
                last_s: of(&Run::last)?,
                last_by_link: of(&|run| run.last() / link_s)?,
                median_host_s: of(&|run| Median::of(&run.times()).map_or(f64::NAN, |times| times.median))?,
            })
        });
        Ok(Self {
            hosts: options.hosts,
            image_bytes,
            link_mbit: options.mbit,
            link_s,
            summaries: summaries.collect::<Result<_>>()?,
            runs,
        })
    }

    fn text(&self) -> String {
        let rows: Vec<Vec<String>> = self.summaries.iter().map(Summary::row).collect();
        let headings = [
            "policy",
            "origin uploads",
            "busiest host",
            "median host, s",
            "last host, s",
            "by the link's own time",
        ];
        let mut text = draw(&headings, &rows);
        text.push_str(&format!(
            "\nUploads by the image's size. {} hosts, {} MiB, links of {} Mbit/s: the image takes {:.1} s over one link.\n",
            self.hosts,
            self.image_bytes >> 20,
            self.link_mbit,
            self.link_s
        ));
        for summary in &self.summaries {
            if let Some(run) = self.runs.iter().rfind(|run| run.shape == summary.shape) {
                text.push_str(&bars(run, self.image_bytes));
            }
        }
        text
    }
}

impl Summary {
    fn row(&self) -> Vec<String> {
        vec![
            self.shape.clone(),
            format!("{:.2}", self.origin.median),
            format!("{:.2}", self.busiest_host.median),
            format!("{:.1}", self.median_host_s.median),
            format!("{:.1}", self.last_s.median),
            format!("{:.2}", self.last_by_link.median),
        ]
    }
}

/// Who uploaded how much, to look at.
fn bars(run: &Run, image_bytes: u64) -> String {
    let uploads: Vec<f64> = run.uploads(image_bytes).collect();
    let most = uploads.iter().copied().fold(1.0, f64::max);
    let rows: Vec<String> = run
        .hosts
        .iter()
        .zip(&uploads)
        .map(|(host, upload)| {
            let bar = "#".repeat((upload / most * BAR as f64).round() as usize);
            format!("{:>8} {upload:5.2} {bar}", host.host)
        })
        .collect();
    format!("\nuploads, {}\n{}\n", run.shape, rows.join("\n"))
}
