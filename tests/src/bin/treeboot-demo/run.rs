//! The demo's course: start, import, attach, boot, measure.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use treeboot_proto::v1;
use treeboot_tests::cluster::{Cluster, Plan};
use treeboot_tests::daemon::Daemon;
use treeboot_tests::fleet::{self, Order};
use treeboot_tests::measure::{self, FleetFigures};
use treeboot_tests::table::bytes;

use crate::Options;
use crate::report::{Report, VmReport};

/// The image's name in the demo.
const IMAGE: &str = "demo";

/// Between two lines of progress while VMs boot.
const PROGRESS_EVERY: Duration = Duration::from_secs(5);

pub(crate) async fn run(options: &Options) -> Result<Report> {
    let began = Instant::now();
    let say = |what: &str| eprintln!("demo: {:>5.1} s  {what}", began.elapsed().as_secs_f64());
    if !options.image.is_file() {
        bail!("{} is not a file", options.image.display());
    }

    let cluster = Cluster::start(
        "demo",
        &Plan {
            hosts: usize::from(options.hosts),
            ..Plan::default()
        },
    )
    .await?;
    say(&format!(
        "a coordinator, an origin and {} hosts run, each a process of its own ({} to {})",
        options.hosts,
        cluster.origin.portal()?,
        cluster
            .hosts
            .last()
            .context("a demo has at least one host")?
            .portal()?,
    ));

    say(&format!("importing {}", options.image.display()));
    import(&cluster, options).await?;

    let attach_ms = attach(&cluster).await?;
    let slowest = attach_ms.values().copied().fold(0.0, f64::max);
    say(&format!(
        "{} hosts attached, the slowest in {slowest:.1} ms",
        attach_ms.len()
    ));

    let placed = places(&cluster, options).await?;
    let orders: Vec<(usize, Order)> = placed
        .iter()
        .map(|(host, vm)| {
            let order = Order {
                vm: vm.clone(),
                image: IMAGE.into(),
                ready_line: options.ready_line.clone(),
                limit: options.boot_limit(),
                memory_mib: options.memory_mib,
                user_data: String::new(),
            };
            (*host, order)
        })
        .collect();
    say(&format!(
        "booting {} VMs on the {} deepest hosts",
        orders.len(),
        orders.len() / usize::from(options.vms_per_host)
    ));
    let vms = boot(&cluster, &orders, &say).await?;

    let figures = FleetFigures::collect(&cluster, IMAGE).await?;
    let tree = cluster.treeboot(&["tree", IMAGE]).await?;
    let report = Report::new(options, figures, vms, attach_ms);
    println!("\n{}", tree.trim_end());
    println!("\n{}", report.text());
    if let Some(file) = &options.json {
        std::fs::write(file, report.json()?)
            .with_context(|| format!("could not write {}", file.display()))?;
    }
    if report.vms_failed == 0 {
        cluster.pass();
    }
    Ok(report)
}

async fn import(cluster: &Cluster, options: &Options) -> Result<()> {
    // Its progress is for the person who watches.
    let mut command = cluster.scratch().command(cluster.cli_path());
    command
        .args(["image", "import"])
        .arg(&options.image)
        .arg(OsStr::new(IMAGE))
        .env("TREEBOOT_COORDINATOR", cluster.coordinator.url()?)
        .stdout(Stdio::inherit())
        .stderr(Stdio::inherit());
    let status = tokio::process::Command::from(command)
        .kill_on_drop(true)
        .status()
        .await
        .context("could not start treeboot")?;
    if !status.success() {
        bail!("the import ended with {status}");
    }
    Ok(())
}

/// Attaches every host, one after the other so that the tree's shape is the same in every demo; gives each one's milliseconds.
async fn attach(cluster: &Cluster) -> Result<BTreeMap<String, f64>> {
    let mut took = BTreeMap::new();
    for host in &cluster.hosts {
        let (answer, _) = fleet::attach(host, IMAGE).await?;
        took.insert(host.name().to_owned(), answer.took_us as f64 / 1000.0);
    }
    Ok(took)
}

/// VMs for the deeper half of the hosts: (number of the host, name of the VM).
async fn places(cluster: &Cluster, options: &Options) -> Result<Vec<(usize, String)>> {
    let tree = measure::tree(cluster, IMAGE).await?;
    let depth_of = |host: &Daemon| {
        let node = tree.nodes.iter().find(|node| node.host == host.name());
        node.map_or(0, |node| node.depth)
    };
    let mut hosts: Vec<usize> = (0..cluster.hosts.len()).collect();
    hosts.sort_by_key(|host| std::cmp::Reverse((depth_of(&cluster.hosts[*host]), *host)));
    hosts.truncate(cluster.hosts.len().div_ceil(2));
    hosts.sort_unstable();
    let mut placed = Vec::new();
    for host in hosts {
        for number in 1..=options.vms_per_host {
            placed.push((host, format!("{}-vm{number}", cluster.hosts[host].name())));
        }
    }
    Ok(placed)
}

async fn boot(cluster: &Cluster, orders: &[(usize, Order)], say: &dyn Fn(&str)) -> Result<Vec<VmReport>> {
    let mut booting: FuturesUnordered<_> = orders
        .iter()
        .map(|(host, order)| async move {
            let agent = &cluster.hosts[*host];
            let booted = fleet::boot(agent, order).await;
            // The counters of this moment, not of some time after.
            let vm = fleet::describe(agent, &order.vm)
                .await
                .unwrap_or_else(|_| v1::Vm {
                    name: order.vm.clone(),
                    ..v1::Vm::default()
                });
            let failure = booted.err().map(|error| format!("{error:#}"));
            VmReport::new(agent.name(), &vm, failure)
        })
        .collect();
    let mut reports = Vec::new();
    let mut progress = tokio::time::interval(PROGRESS_EVERY);
    progress.tick().await;
    loop {
        tokio::select! {
            booted = booting.next() => {
                let Some(report) = booted else { break };
                say(&match &report.error {
                    None => format!("{} is ready after {:.1} s", report.name, report.boot_seconds.unwrap_or(0.0)),
                    Some(error) => format!("{} failed: {error}", report.name),
                });
                reports.push(report);
            }
            _ = progress.tick() => {
                let shipped = match measure::base_status(&cluster.origin, IMAGE).await {
                    Ok(Some(base)) => base.counters.unwrap_or_default().shipped_wire_bytes,
                    _ => 0,
                };
                say(&format!(
                    "{} of {} VMs are ready; the origin has shipped {}",
                    reports.len(),
                    orders.len(),
                    bytes(shipped)
                ));
            }
        }
    }
    reports.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(reports)
}
