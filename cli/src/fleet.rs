//! `treeboot fleet …`: many VMs of one image, spread evenly over the hosts that run VMs.

use std::time::{Duration, Instant};

use serde::Serialize;
use treeboot_proto::v1;
use treeboot_types::{HostName, ImageRef, VmName};

use crate::client::{Agent, Coordinator, Options, PARALLEL_CALLS, find_host, host_name, incomplete};
use crate::failure::{Exit, Failure};
use crate::output::{self, Align, JsonFlag, Progress, Table};
use crate::parallel;
use crate::tree::id_words;
use crate::vm::{self, Machine, MachineArgs, ReadyArgs, VmJson};

/// The most VMs of one command: ten times the paper's fleet, and each costs a stream while it is awaited.
const MAX_FLEET: u32 = 10_000;

/// Verbs on fleets.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum FleetVerb {
    Boot(Box<BootArgs>),
    /// Stop the VMs of a fleet on all hosts
    #[command(after_help = "Example:\n  treeboot fleet stop\n  treeboot fleet stop --prefix web --destroy")]
    Stop {
        /// The fleet: its VMs are PREFIX-1, PREFIX-2, …
        #[arg(long, default_value = "fleet")]
        prefix: VmName,
        /// Delete their private disks as well
        #[arg(long)]
        destroy: bool,
        /// Stop at once, as if the power were cut
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        json: JsonFlag,
    },
}

/// Boot many VMs of one image, spread evenly over the hosts that run VMs
///
/// Waits until each VM is ready or has failed. VMs that failed stay for inspection.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  treeboot fleet boot --image debian --count 16\n  \
                        treeboot fleet boot --image debian --count 4 --prefix web --hosts host-1,host-2 --ready-port 22")]
pub(crate) struct BootArgs {
    /// NAME or NAME@VERSION; without a version the newest
    #[arg(long)]
    image: ImageRef,
    /// How many VMs
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_FLEET)))]
    count: u32,
    /// The VMs are called PREFIX-1, PREFIX-2, …
    #[arg(long, default_value = "fleet")]
    prefix: VmName,
    /// Only these hosts; all connected hosts that run VMs where it is left out
    #[arg(long, value_delimiter = ',', value_name = "HOST")]
    hosts: Vec<HostName>,
    /// How many VMs are asked for at once; all of them are then awaited at once
    #[arg(long, default_value_t = PARALLEL_CALLS, value_name = "N")]
    parallel: usize,
    #[command(flatten)]
    machine: MachineArgs,
    #[command(flatten)]
    ready: ReadyArgs,
    #[command(flatten)]
    json: JsonFlag,
}

/// `--json` of `fleet boot`.
#[derive(Debug, Serialize)]
struct BootJson {
    image: String,
    vms_ready: usize,
    vms_failed: usize,
    /// From the command to the last VM's being ready or failed.
    elapsed_us: u64,
    vms: Vec<BootedJson>,
}

#[derive(Debug, Serialize)]
struct BootedJson {
    name: String,
    host: String,
    state: &'static str,
    /// From the agent's receiving the request to the VM's being ready.
    ready_us: Option<u64>,
    /// The same, seen from here.
    elapsed_us: Option<u64>,
    error: Option<String>,
}

/// `--json` of `fleet stop`.
#[derive(Debug, Serialize)]
struct StoppedJson {
    name: String,
    host: String,
    state: &'static str,
    error: Option<String>,
}

/// Runs a verb.
pub(crate) async fn run(options: &Options, verb: FleetVerb) -> Result<(), Failure> {
    match verb {
        FleetVerb::Boot(args) => boot(options, *args).await,
        FleetVerb::Stop {
            prefix,
            destroy,
            force,
            json,
        } => stop(options, &prefix, destroy, force, json).await,
    }
}

async fn boot(options: &Options, args: BootArgs) -> Result<(), Failure> {
    let names = names(&args.prefix, args.count)?;
    let machine = args.machine.read()?;
    let coordinator = Coordinator::connect(options).await?;
    let image = coordinator.image(&args.image).await?.id;
    let image = image.ok_or_else(|| incomplete("the coordinator", "image.id"))?;
    let all = coordinator.hosts().await?;
    let hosts = choose_hosts(&all, &args.hosts)?;
    refuse_taken(&all, &names, &args.prefix, options.timeout).await?;
    // One connection a host carries the requests and the streams of all its VMs.
    let agents = parallel::each(hosts, PARALLEL_CALLS, |host| async move {
        Agent::connect(&host, options.timeout).await
    });
    let agents: Vec<Agent> = agents.await.into_iter().collect::<Result<_, _>>()?;
    eprintln!(
        "booting {} of {} on {}; Ctrl-C leaves those that were started, 'treeboot fleet stop --prefix {} --destroy' ends them",
        output::plural(names.len(), "VM"),
        id_words(&image),
        output::plural(agents.len(), "host"),
        args.prefix,
    );
    let begun = Instant::now();
    let rows = boot_all(&names, &agents, &args, &machine, &image).await;
    let failures: Vec<Failure> = rows.iter().filter_map(|(_, failure)| failure.clone()).collect();
    let vms: Vec<BootedJson> = rows.into_iter().map(|(row, _)| row).collect();
    let result = BootJson {
        image: id_words(&image),
        vms_ready: vms.len() - failures.len(),
        vms_failed: failures.len(),
        elapsed_us: micros(begun.elapsed()),
        vms,
    };
    if args.json.json {
        output::print_json(&result)?;
    } else {
        output::print_text(&render_boot(&result))?;
    }
    parallel::brief("VM", result.vms.len(), &failures)
}

/// Starts all VMs, the hosts by turns, and waits for all of them. Asking is bounded; waiting costs one stream a VM
/// and is not, because a VM that boots slowly must not hold up the start of others.
async fn boot_all(
    names: &[VmName],
    agents: &[Agent],
    args: &BootArgs,
    machine: &Machine,
    image: &v1::ImageId,
) -> Vec<(BootedJson, Option<Failure>)> {
    let asking = tokio::sync::Semaphore::new(args.parallel.max(1));
    let progress = std::sync::Mutex::new(Progress::of_items("VMs ready", names.len() as u64));
    let vms: Vec<(&VmName, &Agent)> = names.iter().zip(agents.iter().cycle()).collect();
    let rows = parallel::each(vms, names.len(), |(name, agent)| {
        let (asking, progress) = (&asking, &progress);
        async move {
            let request = machine.request(name.as_str(), Some(image.clone()), args.ready.message());
            let booted = boot_one(agent, request, args.ready.limit(), asking).await;
            if let Ok(mut progress) = progress.lock() {
                match &booted {
                    Ok(_) => progress.step(),
                    Err(failure) => progress.note(&failure.what),
                }
            }
            let row = BootedJson {
                name: name.to_string(),
                host: agent.host.clone(),
                state: if booted.is_ok() { "ready" } else { "failed" },
                ready_us: booted.as_ref().ok().map(|(vm, _)| vm.ready_us),
                elapsed_us: booted.as_ref().ok().map(|(_, elapsed)| micros(*elapsed)),
                error: booted.as_ref().err().map(|failure| failure.what.clone()),
            };
            (row, booted.err())
        }
    })
    .await;
    if let Ok(progress) = progress.into_inner() {
        progress.finish();
    }
    rows
}

async fn boot_one(
    agent: &Agent,
    request: v1::StartVmRequest,
    limit: Duration,
    asking: &tokio::sync::Semaphore,
) -> Result<(v1::Vm, Duration), Failure> {
    let permit = asking.acquire().await;
    let begun = Instant::now();
    let vm = vm::start_one(agent, request, limit).await?;
    drop(permit);
    let vm = vm::until_ready(agent, vm, limit).await?;
    Ok((vm, begun.elapsed()))
}

/// `PREFIX-1` to `PREFIX-COUNT`, each checked before anything is sent.
fn names(prefix: &VmName, count: u32) -> Result<Vec<VmName>, Failure> {
    let named: Result<Vec<_>, _> = (1..=count)
        .map(|number| VmName::new(&format!("{prefix}-{number}")))
        .collect();
    named.map_err(|error| Failure::new(Exit::Usage, error.to_string()).advice("give a shorter --prefix"))
}

/// Whether `vm` is of the fleet `prefix`: `web-1` is of `web`, `web-db-1` is not.
fn is_of_fleet(vm: &str, prefix: &VmName) -> bool {
    let number = vm
        .strip_prefix(prefix.as_str())
        .and_then(|rest| rest.strip_prefix('-'));
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

/// The hosts that were named, or all that run VMs.
fn choose_hosts(all: &[v1::HostRecord], named: &[HostName]) -> Result<Vec<v1::HostRecord>, Failure> {
    if named.is_empty() {
        let hosts: Vec<_> = all.iter().filter(|host| vm::runs_vms(host)).cloned().collect();
        return if hosts.is_empty() {
            Err(vm::no_host_runs_vms())
        } else {
            Ok(hosts)
        };
    }
    crate::image::distinct(named)
        .iter()
        .map(|name| {
            let host = find_host(all, name)?;
            if !host.connected {
                return Err(Failure::new(Exit::Unreachable, format!("the host '{name}' is not connected"))
                    .advice("see whether treeboot-agent runs there, or leave it out of --hosts"));
            }
            if !vm::runs_vms(&host) {
                return Err(Failure::new(Exit::Refused, format!("the host '{name}' does not run VMs"))
                    .advice("it has no working hypervisor (Debian: qemu-system-x86 qemu-block-extra); leave it out of --hosts"));
            }
            Ok(host)
        })
        .collect()
}

/// Refuses names that are taken on any host, before anything is started.
async fn refuse_taken(
    hosts: &[v1::HostRecord],
    names: &[VmName],
    prefix: &VmName,
    timeout: Duration,
) -> Result<(), Failure> {
    let connected: Vec<_> = hosts.iter().filter(|host| vm::runs_vms(host)).cloned().collect();
    // A host that does not answer is skipped: whether it matters shows when it is asked to start a VM.
    let (rows, _) = vm::of_hosts(connected, timeout).await;
    let wanted: std::collections::HashSet<&str> = names.iter().map(VmName::as_str).collect();
    let taken: Vec<&VmJson> = rows
        .iter()
        .filter(|row| wanted.contains(row.name.as_str()))
        .collect();
    match taken.as_slice() {
        [] => Ok(()),
        [first, others @ ..] => {
            let more = if others.is_empty() {
                String::new()
            } else {
                format!(" and {} more of this fleet", others.len())
            };
            Err(Failure::new(
                Exit::Exists,
                format!("the VM '{}' exists on host '{}'{more}", first.name, first.host),
            )
            .advice(format!(
                "give another --prefix, or end that fleet: treeboot fleet stop --prefix {prefix} --destroy"
            )))
        }
    }
}

fn render_boot(result: &BootJson) -> String {
    let mut table = Table::new(&[
        ("VM", Align::Left),
        ("HOST", Align::Left),
        ("STATE", Align::Left),
        ("READY AFTER", Align::Right),
        ("", Align::Left),
    ]);
    for row in &result.vms {
        table.row([
            row.name.clone(),
            row.host.clone(),
            row.state.to_owned(),
            row.ready_us
                .map(|us| output::duration(Duration::from_micros(us)))
                .unwrap_or_default(),
            row.error.clone().unwrap_or_default(),
        ]);
    }
    let mut times: Vec<u64> = result.vms.iter().filter_map(|row| row.ready_us).collect();
    times.sort_unstable();
    let times = match (times.first(), times.get(times.len() / 2), times.last()) {
        (Some(&first), Some(&median), Some(&last)) => {
            let words = |us| output::duration(Duration::from_micros(us));
            format!(
                "; ready after {} (first), {} (median), {} (last)",
                words(first),
                words(median),
                words(last)
            )
        }
        _ => String::new(),
    };
    format!(
        "{}{} of {} of {} ready in {}{times}\n",
        table.render(),
        result.vms_ready,
        output::plural(result.vms.len(), "VM"),
        result.image,
        output::duration(Duration::from_micros(result.elapsed_us)),
    )
}

async fn stop(
    options: &Options,
    prefix: &VmName,
    destroy: bool,
    force: bool,
    json: JsonFlag,
) -> Result<(), Failure> {
    let mut hosts = Coordinator::connect(options).await?.hosts().await?;
    hosts.retain(|host| host.connected);
    let (rows, mut failures) = vm::of_hosts(hosts.clone(), options.timeout).await;
    let silent = failures.len();
    let fleet: Vec<VmJson> = rows
        .into_iter()
        .filter(|row| is_of_fleet(&row.name, prefix))
        .collect();
    if fleet.is_empty() && failures.is_empty() {
        return Err(Failure::new(
            Exit::NotFound,
            format!("no connected host has a VM of the fleet '{prefix}'"),
        )
        .advice("see which there are: treeboot vm list"));
    }
    let count = fleet.len() + silent;
    let hosts = &hosts;
    let results = parallel::each(fleet, PARALLEL_CALLS, |row| async move {
        let done = stop_one(hosts, &row, destroy, force, options.timeout).await;
        let stopped = StoppedJson {
            state: if done.is_err() {
                "failed"
            } else if destroy {
                "destroyed"
            } else {
                "stopped"
            },
            error: done.as_ref().err().map(|failure| failure.what.clone()),
            name: row.name,
            host: row.host,
        };
        (stopped, done.err())
    })
    .await;
    let mut rows = Vec::new();
    for (row, failure) in results {
        rows.push(row);
        failures.extend(failure);
    }
    if json.json {
        output::print_json(&rows)?;
    } else {
        let done = rows.iter().filter(|row| row.error.is_none()).count();
        let verb = if destroy { "destroyed" } else { "stopped" };
        output::print_text(&format!(
            "{verb} {} of the fleet '{prefix}'\n",
            output::plural(done, "VM")
        ))?;
    }
    parallel::verdict("VM", count, &failures)
}

async fn stop_one(
    hosts: &[v1::HostRecord],
    row: &VmJson,
    destroy: bool,
    force: bool,
    timeout: Duration,
) -> Result<(), Failure> {
    let record = hosts.iter().find(|host| host_name(host) == row.host);
    let record = record.ok_or_else(|| incomplete("the coordinator", "host"))?;
    let agent = Agent::connect(record, timeout).await?;
    if destroy {
        return vm::destroy(&agent, &row.name, false).await;
    }
    match row.state {
        "created" | "stopped" => Ok(()),
        // One that was not ready in time counts as failed, and its QEMU still runs.
        _ => vm::stop(&agent, &row.name, force).await,
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fleets_vms_are_its_prefix_and_a_number() {
        let prefix = VmName::new("web").unwrap();
        assert_eq!(
            names(&prefix, 2).unwrap(),
            [VmName::new("web-1").unwrap(), VmName::new("web-2").unwrap()]
        );
        for (name, is) in [
            ("web-1", true),
            ("web-10", true),
            ("web", false),
            ("web-", false),
            ("web-db-1", false),
            ("webs-1", false),
        ] {
            assert_eq!(is_of_fleet(name, &prefix), is, "{name}");
        }
        let long = VmName::new(&"a".repeat(62)).unwrap();
        assert_eq!(names(&long, 1).unwrap_err().exit, Exit::Usage);
    }

    #[test]
    fn only_hosts_that_run_vms_are_chosen_and_a_named_one_must() {
        let host = |name: &str, connected, runs_vms| v1::HostRecord {
            info: Some(v1::HostInfo {
                name: name.into(),
                runs_vms,
                ..Default::default()
            }),
            connected,
            ..Default::default()
        };
        let all = [
            host("a", true, true),
            host("b", true, false),
            host("c", false, true),
        ];
        let name = |name| vec![HostName::new(name).unwrap()];
        assert_eq!(choose_hosts(&all, &[]).unwrap().len(), 1);
        assert_eq!(choose_hosts(&all, &name("b")).unwrap_err().exit, Exit::Refused);
        assert_eq!(
            choose_hosts(&all, &name("c")).unwrap_err().exit,
            Exit::Unreachable
        );
        assert_eq!(choose_hosts(&all, &name("d")).unwrap_err().exit, Exit::NotFound);
        assert_eq!(choose_hosts(&all[1..], &[]).unwrap_err().exit, Exit::NotFound);
    }

    #[test]
    fn the_table_ends_with_the_first_the_median_and_the_last() {
        let row = |name: &str, ready_us: Option<u64>, error: Option<&str>| BootedJson {
            name: name.into(),
            host: "h".into(),
            state: if ready_us.is_some() { "ready" } else { "failed" },
            ready_us,
            elapsed_us: ready_us,
            error: error.map(Into::into),
        };
        let result = BootJson {
            image: "debian@1".into(),
            vms_ready: 2,
            vms_failed: 1,
            elapsed_us: 3_000_000,
            vms: vec![
                row("w-1", Some(2_000_000), None),
                row("w-2", Some(1_500_000), None),
                row("w-3", None, Some("no")),
            ],
        };
        assert_eq!(
            render_boot(&result),
            "VM   HOST  STATE   READY AFTER\n\
             w-1  h     ready        2.00 s\n\
             w-2  h     ready        1.50 s\n\
             w-3  h     failed               no\n\
             2 of 3 VMs of debian@1 ready in 3.00 s; ready after 1.50 s (first), 2.00 s (median), 2.00 s (last)\n"
        );
    }
}
