//! Parents, coordinators and agents that end while guests boot over them: every VM comes up, no guest meets an error.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use treeboot_tests::cluster::{Cluster, Plan};
use treeboot_tests::daemon::Daemon;
use treeboot_tests::need::{Need, require};
use treeboot_tests::wait::wait_until;
use treeboot_tests::{fleet, guest, measure};

use crate::support::{Machine, with_cluster};

const IMAGE: &str = "busybox";
/// The stall that a guest may see when its parent is lost.
const STALL_LIMIT: Duration = Duration::from_secs(2);
/// A guest of 10 MiB is well under way when its parent has shipped this.
const UNDER_WAY_BYTES: u64 = 1 << 20;
const SOON: Duration = Duration::from_secs(60);

/// How a parent is lost.
#[derive(Debug, Clone, Copy)]
enum Loss {
    Killed,
    Frozen,
    CutOff,
}

/// A chain origin → h1 → h2 → h3 with VMs on h2 and h3; h1 is lost while they boot.
fn guests_boot_although_the_parent_is(loss: Loss) -> Result<()> {
    let Some(file) = guest::busybox() else {
        return Ok(());
    };
    let namespaces = matches!(loss, Loss::CutOff);
    if namespaces && !require(&[Need::Root, Need::Program("ip", "iproute2")]) {
        return Ok(());
    }
    let plan = Plan {
        hosts: 3,
        fan_out: Some(1),
        namespaces,
        ..Plan::default()
    };
    let label = format!("parent-{loss:?}").to_lowercase();
    with_cluster(&label, Machine::Alone, plan, async move |cluster| {
        cluster.import(&file, IMAGE).await?;
        for host in &cluster.hosts {
            fleet::attach(host, IMAGE).await?;
        }
        let parent = &cluster.hosts[0];
        let below = &cluster.hosts[1..];
        let orders: Vec<_> = below
            .iter()
            .map(|host| (host, guest::order(&format!("{}-vm", host.name()), IMAGE)))
            .collect();
        let booting =
            futures_util::future::try_join_all(orders.iter().map(|(host, order)| fleet::boot(host, order)));
        let lose = async {
            wait_until(SOON, "the parent to have shipped something", async || {
                let base = measure::base_status(parent, IMAGE).await?;
                let shipped = base
                    .and_then(|base| base.counters)
                    .map(|counters| counters.shipped_wire_bytes);
                Ok((shipped.unwrap_or(0) > UNDER_WAY_BYTES).then_some(()))
            })
            .await?;
            match loss {
                Loss::Killed => parent.kill(),
                Loss::Frozen => parent.freeze(),
                Loss::CutOff => cluster.network.as_ref().context("hosts have links")?.cut(1),
            }
        };
        let (booted, lost) = futures_util::future::join(booting, lose).await;
        lost?;
        for vm in booted? {
            println!("{} is up after {:.1} s", vm.name, vm.ready_us as f64 / 1e6);
        }
        for (host, order) in &orders {
            guest::check_no_errors(&fleet::describe(host, &order.vm).await?)?;
            check_stall(host).await?;
        }
        Ok(())
    })
}

/// The longest that one read of a host's base took is within the limit, and told.
async fn check_stall(host: &Daemon) -> Result<()> {
    let base = measure::base_status(host, IMAGE)
        .await?
        .context("the host has a base")?;
    let counters = base.counters.unwrap_or_default();
    let stall = Duration::from_micros(counters.longest_stall_us);
    println!(
        "{}: the longest read took {stall:?}; {} bytes from fallbacks",
        host.name(),
        counters.fetched_fallback_bytes
    );
    ensure!(stall < STALL_LIMIT, "{}: one read took {stall:?}", host.name());
    Ok(())
}

#[test]
fn guests_boot_although_their_parent_is_killed() -> Result<()> {
    guests_boot_although_the_parent_is(Loss::Killed)
}

#[test]
fn guests_boot_although_their_parent_is_frozen() -> Result<()> {
    guests_boot_although_the_parent_is(Loss::Frozen)
}

#[test]
fn guests_boot_although_their_parent_is_cut_off() -> Result<()> {
    guests_boot_although_the_parent_is(Loss::CutOff)
}

#[test]
fn guests_boot_although_the_coordinator_is_killed_and_it_comes_back_with_the_same_tree() -> Result<()> {
    let Some(file) = guest::busybox() else {
        return Ok(());
    };
    let plan = Plan {
        hosts: 3,
        ..Plan::default()
    };
    with_cluster(
        "coordinator-and-guests",
        Machine::Alone,
        plan,
        async move |cluster| {
            cluster.import(&file, IMAGE).await?;
            for host in &cluster.hosts {
                fleet::attach(host, IMAGE).await?;
            }
            let before = shape(cluster).await?;
            let (host, order) = (&cluster.hosts[2], guest::order("vm", IMAGE));
            fleet::start(host, &order).await?;
            cluster.coordinator.kill()?;
            fleet::await_ready(host, &order.vm, order.limit).await?;
            guest::check_no_errors(&fleet::describe(host, &order.vm).await?)?;
            check_stall(host).await?;
            cluster.restart(&cluster.coordinator).await?;
            cluster.wait_known().await?;
            assert_eq!(before, shape(cluster).await?);
            Ok(())
        },
    )
}

async fn shape(cluster: &Cluster) -> Result<Vec<(String, Vec<String>)>> {
    let tree = measure::tree(cluster, IMAGE).await?;
    let mut shape: Vec<_> = tree
        .nodes
        .into_iter()
        .map(|node| (node.host, node.parents))
        .collect();
    shape.sort();
    Ok(shape)
}

/// A guest writes, reads back and reads its base all the time; its agent ends and starts again under it.
fn a_guest_survives_its_agents_end(label: &str, kill: bool) -> Result<()> {
    let Some(file) = guest::busybox() else {
        return Ok(());
    };
    with_cluster(label, Machine::Alone, Plan::default(), async move |cluster| {
        cluster.import(&file, IMAGE).await?;
        let host = &cluster.hosts[0];
        let mut order = guest::order_with_jobs("soaked", IMAGE, &["soak_seconds=12"]);
        order.ready_line = guest::UP.into();
        let vm = fleet::boot(host, &order).await?;
        let rounds = async |least: usize| {
            wait_until(SOON, "the guest's next rounds", async || {
                let rounds = guest::console(&vm)?.matches(" round ").count();
                Ok((rounds >= least).then_some(rounds))
            })
            .await
        };
        let before = rounds(2).await?;
        if kill {
            host.kill()?;
        } else {
            host.terminate().await?;
        }
        let away = cluster.restart(host).await?;
        println!(
            "the agent served again {:.0} ms after its start",
            away.as_secs_f64() * 1e3
        );
        rounds(before + 2).await?;
        wait_until(SOON, "the guest's jobs to be done", async || {
            Ok(guest::console(&vm)?.contains(guest::JOBS_DONE).then_some(()))
        })
        .await?;
        ensure!(
            guest::console(&vm)?.contains("errors 0"),
            "the guest counted no errors"
        );
        let after = fleet::describe(host, &order.vm).await?;
        assert_eq!(after.pid, vm.pid);
        guest::check_no_errors(&after)
    })
}

#[test]
fn a_guest_sees_a_pause_and_no_error_when_its_agent_is_restarted() -> Result<()> {
    a_guest_survives_its_agents_end("agent-restarted", false)
}

#[test]
fn a_guest_sees_a_pause_and_no_error_when_its_agent_is_killed() -> Result<()> {
    a_guest_survives_its_agents_end("agent-killed", true)
}
