//! Names and addresses: compared whole, of any family, one agent each.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use treeboot_tests::cluster::{Cluster, Plan};
use treeboot_tests::daemon::{Daemon, DaemonSpec};
use treeboot_tests::image::Pattern;
use treeboot_tests::reader::{log_in, read_whole};
use treeboot_tests::wait::wait_until;
use treeboot_tests::{fleet, measure};

use crate::support::{Machine, with_cluster};

const IMAGE: &str = "pattern";
const PATTERN: Pattern = Pattern {
    seed: 23,
    bytes: 2 << 20,
};
const SOON: Duration = Duration::from_secs(30);

async fn import_attach_read(cluster: &Cluster) -> Result<()> {
    let file = cluster.path().join("pattern.raw");
    PATTERN.write(&file)?;
    cluster.import(&file, IMAGE).await?;
    for host in &cluster.hosts {
        fleet::attach(host, IMAGE).await?;
    }
    for host in &cluster.hosts {
        let (session, lun) = log_in(host, IMAGE, &format!("reader-{}", host.name())).await?;
        read_whole(&session, lun, PATTERN).await?;
    }
    Ok(())
}

#[test]
fn everything_works_over_ipv6() -> Result<()> {
    let plan = Plan {
        hosts: 2,
        fan_out: Some(1),
        ipv6: true,
        ..Plan::default()
    };
    with_cluster("ipv6", Machine::Shared, plan, async |cluster| {
        import_attach_read(cluster).await?;
        let tree = measure::tree(cluster, IMAGE).await?;
        ensure!(
            tree.nodes.iter().all(|node| node.portal.starts_with("[::1]:")),
            "portals in brackets: {tree:?}"
        );
        Ok(())
    })
}

#[test]
fn hosts_and_images_whose_names_begin_alike_are_not_taken_for_each_other() -> Result<()> {
    let plan = Plan {
        hosts: 3,
        fan_out: Some(1),
        names: ["10.0.0.1", "10.0.0.10", "10.0.0.100"]
            .map(str::to_owned)
            .to_vec(),
        ..Plan::default()
    };
    with_cluster("alike", Machine::Shared, plan, async |cluster| {
        import_attach_read(cluster).await?;
        let other = Pattern { seed: 24, ..PATTERN };
        let file = cluster.path().join("other.raw");
        other.write(&file)?;
        let alike = format!("{IMAGE}-1");
        cluster.import(&file, &alike).await?;
        let host = &cluster.hosts[0];
        fleet::attach(host, &alike).await?;
        let (session, lun) = log_in(host, &alike, "other").await?;
        read_whole(&session, lun, other).await?;
        // The first one goes; those that begin like it stay.
        host.terminate().await?;
        wait_until(SOON, "the host's place to be free", async || {
            let tree = measure::tree(cluster, IMAGE).await?;
            let there = tree
                .nodes
                .iter()
                .any(|node| node.host == host.name() && node.connected);
            Ok((!there).then_some(()))
        })
        .await?;
        let tree = measure::tree(cluster, IMAGE).await?;
        for name in ["10.0.0.10", "10.0.0.100"] {
            ensure!(
                tree.nodes.iter().any(|node| node.host == name && node.connected),
                "{name} is gone too: {tree:?}"
            );
        }
        Ok(())
    })
}

#[test]
fn a_second_agent_of_one_name_is_refused_and_ends() -> Result<()> {
    with_cluster("one-name", Machine::Shared, Plan::default(), async |cluster| {
        let first = &cluster.hosts[0];
        let folder = cluster.path().join("second");
        let mut second = Daemon::new(
            cluster.scratch(),
            DaemonSpec {
                name: "second".into(),
                program: cluster.agent_path(),
                args: vec![
                    "--name".into(),
                    first.name().into(),
                    "--state".into(),
                    folder.join("state").into(),
                    "--cache".into(),
                    folder.join("cache").into(),
                ],
                address: first.bound()?.rpc.ip(),
                portal: Some(0),
                namespace: None,
            },
        )?;
        second.add_args(["--coordinator", &cluster.coordinator.url()?]);
        second.spawn(cluster.scratch())?;
        let status = second.wait_exit(SOON).await.context("the second agent goes on")?;
        ensure!(!status.success(), "it ended with {status}");
        let log = second.log_tail();
        ensure!(
            log.contains(first.name()),
            "its last words do not name the host: {log}"
        );
        cluster.wait_known().await
    })
}

#[test]
fn a_port_that_is_taken_is_named_and_nothing_is_left_behind() -> Result<()> {
    with_cluster("port-taken", Machine::Shared, Plan::default(), async |cluster| {
        let taken = cluster.hosts[0].portal()?;
        let folder = cluster.path().join("late");
        let output = cluster
            .scratch()
            .command(cluster.agent_path())
            .args(["--name", "late", "--portal", &taken, "--listen", "127.0.0.1:0"])
            .args(["--coordinator", &cluster.coordinator.url()?, "--state"])
            .arg(folder.join("state"))
            .output()?;
        ensure!(!output.status.success(), "it ended with {}", output.status);
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(
            words.contains(&taken),
            "its words do not name the address: {words}"
        );
        let known = cluster.treeboot(&["host", "list", "--json"]).await?;
        ensure!(!known.contains("late"), "{known}");
        Ok(())
    })
}
