//! A VM cloned to its own host and to another one: what it wrote, no more, through broken connections and kills; and what cannot be
//! cloned, of which nothing is left.

use std::os::unix::fs::FileExt as _;

use anyhow::{Context as _, Result, bail, ensure};
use treeboot_proto::v1;
use treeboot_proto::v1::agent_client::AgentClient;
use treeboot_tests::cluster::Cluster;
use treeboot_tests::daemon::Daemon;
use treeboot_tests::need::{Need, require};
use treeboot_tests::reader::log_in;
use treeboot_tests::relay::Relay;
use treeboot_tests::wait::wait_until;

use crate::support::{Machine, mount, refused, with_cluster};
use crate::written::*;

fn request(vm: &str, new_vm: &str, to: &Daemon, relay: &Relay) -> v1::CloneRequest {
    v1::CloneRequest {
        vm: vm.into(),
        destination: to.name().into(),
        new_vm: new_vm.into(),
        destination_address: relay.address.clone(),
        snapshot: String::new(),
    }
}

async fn begin(from: &Daemon, request: v1::CloneRequest) -> Result<tonic::Streaming<v1::CloneProgress>> {
    let mut client = from.agent().await?;
    Ok(AgentClient::clone(&mut client, request).await?.into_inner())
}

async fn end(mut stream: tonic::Streaming<v1::CloneProgress>) -> Result<v1::CloneResponse, tonic::Status> {
    loop {
        match stream.message().await? {
            Some(step) if step.result.is_none() => {}
            Some(step) => return Ok(step.result.unwrap_or_default()),
            None => return Err(tonic::Status::unknown("no result")),
        }
    }
}

#[test]
fn a_clone_has_what_its_vm_wrote_and_ships_no_more() -> Result<()> {
    with_cluster("clones", Machine::Shared, plan(2, true), async |cluster| {
        import(cluster).await?;
        let (here, there) = (&cluster.hosts[0], &cluster.hosts[1]);
        let (session, lun) = log_in(here, IMAGE, "web-1").await?;
        SPARSE.write(&session, lun).await?;
        cluster
            .treeboot(&["snapshot", "create", "web-1", "early"])
            .await?;
        SPARSE.filled(2).write(&session, lun).await?;
        // Its front end stays logged in.
        let told = cluster
            .treeboot(&["clone", "web-1", "web-2", "--to", "h2"])
            .await?;
        ensure!(
            told.contains("cloned 'web-1' to 'web-2' on host 'h2': 4.00 MiB"),
            "{told}"
        );
        let told = cluster.treeboot(&["clone", "web-1", "web-3", "--json"]).await?;
        let told: serde_json::Value = serde_json::from_str(&told)?;
        ensure!(
            told["host"] == "h1" && told["data_bytes"] == SPARSE.bytes() && told["sent_bytes"] == 0,
            "{told}"
        );
        cluster
            .treeboot(&["clone", "web-1", "web-4", "--to", "h2", "--snapshot", "early"])
            .await?;
        SPARSE.filled(3).write(&session, lun).await?;
        SPARSE.filled(2).check(there, "web-2").await?;
        SPARSE.filled(2).check(here, "web-3").await?;
        SPARSE.filled(1).check(there, "web-4").await?;
        drop(session);
        SPARSE.filled(3).check(here, "web-1").await?;

        // All that crosses the network, both ways, with what TLS adds.
        let relay = Relay::start(there.bound()?.rpc).await?;
        let shipped = end(begin(here, request("web-1", "web-5", there, &relay)).await?).await?;
        println!(
            "{} bytes of blocks, {} of messages, {} crossed the network",
            shipped.data_bytes,
            shipped.sent_bytes,
            relay.crossed()
        );
        ensure!(shipped.data_bytes == SPARSE.bytes(), "{shipped:?}");
        ensure!(relay.sent() > SPARSE.bytes(), "it did not go this way");
        ensure!(
            relay.crossed() * 100 <= SPARSE.bytes() * 105,
            "{} bytes crossed",
            relay.crossed()
        );

        there.kill()?;
        cluster.restart(there).await?;
        SPARSE.filled(2).check(there, "web-2").await?;
        SPARSE.filled(3).check(there, "web-5").await?;
        only(cluster, &[(there, &["web-2", "web-4", "web-5"])]).await
    })
}

#[test]
fn a_clone_goes_on_through_broken_connections_and_a_killed_destination() -> Result<()> {
    with_cluster(
        "clones-resumed",
        Machine::Shared,
        plan(2, false),
        async |cluster| {
            import(cluster).await?;
            let (here, there) = (&cluster.hosts[0], &cluster.hosts[1]);
            let (session, lun) = log_in(here, IMAGE, "web-1").await?;
            DENSE.write(&session, lun).await?;
            let relay = Relay::start(there.bound()?.rpc).await?;
            relay.hold_at(6 * MIB);
            let cloning = begin(here, request("web-1", "web-2", there, &relay)).await?;
            crossed(&relay, 6 * MIB).await?;
            relay.hold_at(11 * MIB);
            relay.break_off();
            crossed(&relay, 11 * MIB).await?;
            there.kill()?;
            relay.break_off();
            cluster.restart(there).await?;
            relay.open();
            let shipped = end(cloning).await?;
            println!("{shipped:?}, {} bytes crossed", relay.crossed());
            ensure!(shipped.resumed >= 2, "{shipped:?}");
            // Begun anew each time it would be 33 MiB.
            ensure!(relay.crossed() < 24 * MIB, "{} bytes crossed", relay.crossed());
            DENSE.check(there, "web-2").await?;
            only(cluster, &[(there, &["web-2"]), (here, &["web-1"])]).await
        },
    )
}

#[test]
fn of_a_clone_that_ends_early_nothing_is_left_and_the_same_call_succeeds() -> Result<()> {
    with_cluster(
        "clones-broken",
        Machine::Shared,
        plan(3, false),
        async |cluster| {
            import(cluster).await?;
            let (here, there, third) = (&cluster.hosts[0], &cluster.hosts[1], &cluster.hosts[2]);
            let (session, lun) = log_in(here, IMAGE, "web-1").await?;
            DENSE.write(&session, lun).await?;
            drop(session);
            for (args, code, part) in [
                (
                    &["clone", "web-9", "x"][..],
                    3,
                    "no connected host has a VM 'web-9'",
                ),
                (
                    &["clone", "web-1", "web-1"][..],
                    4,
                    "VM 'web-1' exists on host 'h1'",
                ),
                (
                    &["clone", "web-1", "x", "--to", "h9"][..],
                    3,
                    "the coordinator knows no host 'h9'",
                ),
                (
                    &["clone", "web-1", "x", "--snapshot", "late"][..],
                    3,
                    "there is no snapshot 'late'",
                ),
            ] {
                refused(cluster, args, code, part).await?;
            }

            // Whoever asked goes away.
            let relay = Relay::start(there.bound()?.rpc).await?;
            relay.hold_at(4 * MIB);
            let cloning = begin(here, request("web-1", "x", there, &relay)).await?;
            crossed(&relay, 4 * MIB).await?;
            // Another one of that name waits for its end; one of another name does not.
            let relay_2 = Relay::start(there.bound()?.rpc).await?;
            let error = end(begin(here, request("web-1", "x", there, &relay_2)).await?)
                .await
                .err()
                .context("two disks for one VM")?;
            ensure!(
                error.code() == tonic::Code::AlreadyExists && error.message().contains("is being made"),
                "{error}"
            );
            end(begin(here, request("web-1", "y", there, &relay_2)).await?).await?;
            drop(cloning);
            relay.open();
            only(cluster, &[(there, &["y"]), (here, &["web-1"])]).await?;

            // The source is killed in the middle.
            relay.hold_at(relay.sent() + 4 * MIB);
            let cloning = begin(here, request("web-1", "x", there, &relay)).await?;
            crossed(&relay, relay.sent() + 1).await?;
            here.kill()?;
            ensure!(end(cloning).await.is_err(), "its host is gone");
            cluster.restart(here).await?;
            relay.break_off();
            relay.open();
            cluster.wait_known().await?;
            end(begin(here, request("web-1", "x", there, &relay)).await?).await?;
            DENSE.check(there, "x").await?;
            only(cluster, &[(there, &["x", "y"]), (here, &["web-1"])]).await?;

            // The destination goes in the middle and stays away.
            let relay = Relay::start(third.bound()?.rpc).await?;
            relay.hold_at(4 * MIB);
            let cloning = begin(here, request("web-1", "z", third, &relay)).await?;
            crossed(&relay, 4 * MIB).await?;
            third.kill()?;
            relay.break_off();
            let error = end(cloning).await.err().context("its destination is gone")?;
            ensure!(
                error.code() == tonic::Code::Unavailable && error.message().contains("host 'h3'"),
                "{error}"
            );
            // It is still away when it is asked for.
            let error = end(begin(here, request("web-1", "z", third, &relay)).await?).await;
            let error = error.err().context("its destination is gone")?;
            ensure!(
                error.code() == tonic::Code::Unavailable && error.message().contains("host 'h3'"),
                "{error}"
            );
            only(cluster, &[(here, &["web-1"])]).await?;
            cluster.restart(third).await?;
            cluster.wait_known().await?;
            cluster.treeboot(&["clone", "web-1", "z", "--to", "h3"]).await?;
            DENSE.check(third, "z").await?;
            only(cluster, &[(third, &["z"])]).await
        },
    )
}

#[test]
fn a_clone_of_damaged_layers_of_an_image_that_is_gone_or_without_room_is_refused_with_the_place() -> Result<()>
{
    if !require(&[Need::Root]) {
        return Ok(());
    }
    crate::support::on_own_thread(Machine::Shared, async || {
        let cluster = Cluster::prepare("clones-refused", &plan(2, false))?;
        // A disk of 4 MiB for a delta of 16.
        let small = cluster.hosts[1].folder().join("state/deltas");
        mount(&["-t", "tmpfs", "-o", "size=4m", "tmpfs"], &small)?;
        cluster.restart(&cluster.coordinator).await?;
        cluster.start_agents().await?;
        import(&cluster).await?;
        let (here, there) = (&cluster.hosts[0], &cluster.hosts[1]);
        let (session, lun) = log_in(here, IMAGE, "web-1").await?;
        DENSE.write(&session, lun).await?;
        drop(session);
        let clone = ["clone", "web-1", "x", "--to", "h2"];
        refused(&cluster, &clone, 9, "no space left for the delta of VM 'x'").await?;
        only(&cluster, &[(there, &[]), (here, &["web-1"])]).await?;

        cluster
            .treeboot(&["snapshot", "create", "web-1", "before"])
            .await?;
        wait_until(SOON, "the checksums", async || {
            let request = v1::ListSnapshotsRequest { vm: "web-1".into() };
            let layers = here.agent().await?.list_snapshots(request).await?;
            let layers = layers.into_inner().layers;
            let sealed = layers
                .iter()
                .any(|layer| layer.snapshot == "before" && layer.sealed);
            Ok(sealed.then_some(()))
        })
        .await?;
        let Some(layer) = deltas(&cluster, here)?
            .into_iter()
            .find(|name| name.ends_with(".delta") || name.ends_with(".layer"))
        else {
            bail!("no layer: {:?}", deltas(&cluster, here)?);
        };
        let path = cluster.path().join("h1/state/deltas").join(&layer);
        let file = std::fs::OpenOptions::new().write(true).open(path)?;
        file.write_all_at(b"damage", (4 + 5) * BLOCK + 100)?;
        refused(
            &cluster,
            &["clone", "web-1", "x", "--snapshot", "before"],
            1,
            "has other bytes at 20480 of the disk than were written",
        )
        .await?;
        only(&cluster, &[(there, &[])]).await?;
        let left = deltas(&cluster, here)?;
        ensure!(!left.iter().any(|name| name.starts_with('x')), "{left:?}");

        let (session, lun) = log_in(here, IMAGE, "small").await?;
        SPARSE.filled(4).write(&session, lun).await?;
        drop(session);
        cluster
            .treeboot(&["image", "remove", "pattern@1", "--force"])
            .await?;
        refused(
            &cluster,
            &["clone", "small", "x", "--to", "h2"],
            3,
            "there is no image 'pattern@1'",
        )
        .await?;
        only(&cluster, &[(there, &[])]).await?;
        cluster.pass();
        Ok(())
    })
}
