//! A VM that moves to another host over real daemons: no more than what it wrote crosses the network, and whatever dies, breaks or falls
//! silent meanwhile, it is on one of both hosts, and whole.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use treeboot_proto::v1;
use treeboot_tests::cluster::{Cluster, Plan};
use treeboot_tests::daemon::Daemon;
use treeboot_tests::need::{Need, require};
use treeboot_tests::reader::log_in;
use treeboot_tests::relay::Relay;
use treeboot_tests::wait::wait_until;
use treeboot_tests::{fleet, guest};

use crate::support::{Machine, mount, on_own_thread, refused, with_cluster};
use crate::written::*;

/// How a message begins that says how layers stand on each other, so that the relay knows the one that asks for the VM to be taken.
const MANIFEST: &[u8] = b"{\"version\":1,";

async fn begin(
    from: &Daemon,
    vm: &str,
    to: &Daemon,
    relay: &Relay,
) -> Result<tonic::Streaming<v1::MigrateProgress>> {
    let request = v1::MigrateRequest {
        vm: vm.into(),
        destination: to.name().into(),
        destination_address: relay.address.clone(),
    };
    Ok(from.agent().await?.migrate(request).await?.into_inner())
}

async fn end(
    mut stream: tonic::Streaming<v1::MigrateProgress>,
) -> Result<v1::MigrateResponse, tonic::Status> {
    loop {
        match stream.message().await? {
            Some(step) if step.result.is_none() => {}
            Some(step) => return Ok(step.result.unwrap_or_default()),
            None => return Err(tonic::Status::unknown("no result")),
        }
    }
}

/// It does not move, for this reason.
async fn stays(stream: tonic::Streaming<v1::MigrateProgress>, code: tonic::Code, part: &str) -> Result<()> {
    let error = end(stream).await.err().context("it moved")?;
    ensure!(
        error.code() == code && error.message().contains(part),
        "{error}, not {code:?} and '{part}'"
    );
    Ok(())
}

/// Its disk as this host tells of it.
async fn disk(host: &Daemon, vm: &str) -> Result<Option<v1::Disk>> {
    let listed = host.agent().await?.list(v1::ListRequest::default()).await?;
    let disks = listed.into_inner().disks;
    Ok(disks.into_iter().find(|disk| disk.vm == vm))
}

async fn secret(host: &Daemon, vm: &str) -> Result<String> {
    let request = v1::GetDiskSecretRequest { vm: vm.into() };
    let answer = host.agent().await?.get_disk_secret(request).await?;
    Ok(answer.into_inner().secret.context("no secret")?.secret)
}

async fn write(host: &Daemon, vm: &str, written: Written) -> Result<()> {
    let (session, lun) = log_in(host, IMAGE, vm).await?;
    written.write(&session, lun).await
}

#[test]
fn a_vm_that_moves_keeps_what_it_has_and_no_more_than_that_is_shipped() -> Result<()> {
    with_cluster("migrations", Machine::Shared, plan(2, true), async |cluster| {
        import(cluster).await?;
        let (here, there) = (&cluster.hosts[0], &cluster.hosts[1]);
        write(here, "web-1", SPARSE).await?;
        cluster
            .treeboot(&["snapshot", "create", "web-1", "early"])
            .await?;
        write(here, "web-1", SPARSE.filled(2)).await?;
        let before = secret(here, "web-1").await?;
        let told = cluster.treeboot(&["migrate", "web-1", "--to", "h2"]).await?;
        ensure!(
            told.contains("moved 'web-1' from host 'h1' to host 'h2': 8.00 MiB"),
            "{told}"
        );
        ensure!(secret(there, "web-1").await? == before, "it has another secret");
        let told = cluster
            .treeboot(&["migrate", "web-1", "--to", "h2", "--json"])
            .await?;
        let told: serde_json::Value = serde_json::from_str(&told)?;
        ensure!(told["moved"] == false && told["from_host"] == "h2", "{told}");
        SPARSE.filled(2).check(there, "web-1").await?;
        cluster
            .treeboot(&["snapshot", "rollback", "web-1", "early"])
            .await?;
        SPARSE.check(there, "web-1").await?;
        only(cluster, &[(here, &[])]).await?;

        // All that crosses the network, both ways, with what TLS adds. A front end writes on until the VM is to be stopped.
        write(here, "web-2", SPARSE.filled(5)).await?;
        let relay = Relay::start(there.bound()?.rpc).await?;
        let moved = end(begin(here, "web-2", there, &relay).await?).await?;
        println!(
            "{} bytes of blocks, {} of messages, {} crossed the network; stopped for {} ms",
            moved.data_bytes,
            moved.sent_bytes,
            relay.crossed(),
            moved.stopped_us / 1000
        );
        ensure!(
            moved.data_bytes == SPARSE.bytes() && moved.trouble.is_empty(),
            "{moved:?}"
        );
        ensure!(relay.sent() > SPARSE.bytes(), "it did not go this way");
        ensure!(
            relay.crossed() * 100 <= SPARSE.bytes() * 105,
            "{} bytes crossed",
            relay.crossed()
        );
        // And back, after a kill.
        there.kill()?;
        cluster.restart(there).await?;
        cluster.wait_known().await?;
        SPARSE.filled(5).check(there, "web-2").await?;
        cluster.treeboot(&["migrate", "web-2", "--to", "h1"]).await?;
        SPARSE.filled(5).check(here, "web-2").await?;
        only(cluster, &[(here, &["web-2"])]).await
    })
}

#[test]
fn a_vm_whose_hosts_die_or_fall_silent_is_on_one_of_them() -> Result<()> {
    with_cluster(
        "migrations-broken",
        Machine::Shared,
        plan(3, false),
        async |cluster| {
            import(cluster).await?;
            let (here, there, third) = (&cluster.hosts[0], &cluster.hosts[1], &cluster.hosts[2]);
            write(here, "web-1", DENSE).await?;
            for (args, code, part) in [
                (
                    &["migrate", "web-9", "--to", "h2"][..],
                    3,
                    "no connected host has a VM 'web-9'",
                ),
                (
                    &["migrate", "web-1", "--to", "h9"][..],
                    3,
                    "the coordinator knows no host 'h9'",
                ),
            ] {
                refused(cluster, args, code, part).await?;
            }
            // A name that is taken there.
            let relay = Relay::start(there.bound()?.rpc).await?;
            write(there, "web-2", SPARSE).await?;
            write(here, "web-2", SPARSE.filled(2)).await?;
            let error = begin(here, "web-2", there, &relay).await?;
            stays(
                error,
                tonic::Code::AlreadyExists,
                "VM 'web-2' exists on host 'h2'",
            )
            .await?;
            SPARSE.filled(2).check(here, "web-2").await?;
            SPARSE.check(there, "web-2").await?;
            // A host that is gone.
            third.kill()?;
            let silent = Relay::start(third.bound()?.rpc).await?;
            let error = begin(here, "web-2", third, &silent).await?;
            stays(error, tonic::Code::Unavailable, "host 'h3'").await?;
            cluster.restart(third).await?;

            // Whoever asked goes away; a second call for the VM waits for the end of the first.
            relay.hold_at(relay.sent() + 4 * MIB);
            let held = relay.sent() + MIB;
            let moving = begin(here, "web-1", there, &relay).await?;
            crossed(&relay, held).await?;
            let error = begin(here, "web-1", there, &relay).await?;
            stays(error, tonic::Code::FailedPrecondition, "is moving to host 'h2'").await?;
            drop(moving);
            relay.open();
            only(cluster, &[(there, &["web-2"]), (here, &["web-1", "web-2"])]).await?;
            DENSE.check(here, "web-1").await?;

            // The source is killed in the midst.
            relay.hold_at(relay.sent() + 4 * MIB);
            let held = relay.sent() + MIB;
            let moving = begin(here, "web-1", there, &relay).await?;
            crossed(&relay, held).await?;
            here.kill()?;
            ensure!(end(moving).await.is_err(), "its host is gone");
            cluster.restart(here).await?;
            relay.break_off();
            relay.open();
            cluster.wait_known().await?;
            DENSE.check(here, "web-1").await?;

            // The destination is killed in the midst, and comes back.
            relay.hold_at(relay.sent() + 4 * MIB);
            let held = relay.sent() + MIB;
            let moving = begin(here, "web-1", there, &relay).await?;
            crossed(&relay, held).await?;
            there.kill()?;
            relay.break_off();
            cluster.restart(there).await?;
            relay.open();
            let moved = end(moving).await?;
            ensure!(moved.resumed >= 1 && moved.trouble.is_empty(), "{moved:?}");
            DENSE.check(there, "web-1").await?;
            only(cluster, &[(there, &["web-1", "web-2"]), (here, &["web-2"])]).await
        },
    )
}

#[test]
fn where_the_answer_is_lost_the_other_host_tells_and_where_the_question_is_the_vm_runs_nowhere() -> Result<()>
{
    with_cluster(
        "migrations-silent",
        Machine::Shared,
        plan(2, false),
        async |cluster| {
            import(cluster).await?;
            let (here, there) = (&cluster.hosts[0], &cluster.hosts[1]);
            write(here, "web-1", SPARSE).await?;
            let relay = Relay::start(there.bound()?.rpc).await?;
            relay.mute_at(MANIFEST);
            let moved = end(begin(here, "web-1", there, &relay).await?).await?;
            ensure!(relay.is_mute(), "its host heard the answer");
            ensure!(!moved.was_there && moved.trouble.is_empty(), "{moved:?}");
            SPARSE.check(there, "web-1").await?;
            only(cluster, &[(there, &["web-1"]), (here, &[])]).await?;

            // The question itself is lost: until the host that was never asked says so, the VM runs nowhere.
            write(here, "web-2", SPARSE.filled(3)).await?;
            let relay = Relay::start(there.bound()?.rpc).await?;
            relay.swallow_at(MANIFEST);
            let moving = begin(here, "web-2", there, &relay).await?;
            wait_until(SOON, "it to be asked", async || {
                let asked = disk(here, "web-2").await?.and_then(|disk| disk.moving);
                Ok(asked.is_some_and(|moves| moves.asked).then_some(()))
            })
            .await?;
            let fenced = async || {
                let told = disk(here, "web-2").await?.context("it is gone here")?;
                let moves = told.moving.context("it does not move")?;
                ensure!(moves.to == "h2" && moves.asked, "{moves:?}");
                let listed = cluster.treeboot(&["vm", "list", "--host", "h1"]).await?;
                ensure!(listed.contains("host 'h2' has not said yet"), "{listed}");
                let (refused, words) = match log_in(here, IMAGE, "web-2").await {
                    Ok(_) => (false, String::new()),
                    Err(error) => (true, format!("{error:#}")),
                };
                ensure!(
                    refused && words.contains("has not said whether it did"),
                    "{words}"
                );
                refused_destroy(here).await
            };
            fenced().await?;
            // Its agent dies, and its successor knows no more. The other one is not gone, which the coordinator knows.
            here.kill()?;
            ensure!(end(moving).await.is_err(), "its host is gone");
            cluster.restart(here).await?;
            fenced().await?;
            cluster.wait_known().await?;
            let take_back = ["migrate", "web-2", "--take-back", "--gone", "h2", "--host", "h1"];
            refused(cluster, &take_back, 7, "host 'h2' is not gone").await?;
            relay.unmute();
            relay.break_off();
            wait_until(SOON, "it to stay", async || {
                let told = disk(here, "web-2").await?.context("it is gone")?;
                Ok(told.moving.is_none().then_some(()))
            })
            .await?;
            SPARSE.filled(3).check(here, "web-2").await?;
            only(cluster, &[(there, &["web-1"]), (here, &["web-2"])]).await?;
            cluster.wait_known().await?;
            cluster.treeboot(&["migrate", "web-2", "--to", "h2"]).await?;
            SPARSE.filled(3).check(there, "web-2").await?;

            // The other host is gone for good, or so it is said; and comes back.
            let relay = Relay::start(here.bound()?.rpc).await?;
            relay.swallow_at(MANIFEST);
            let moving = begin(there, "web-2", here, &relay).await?;
            wait_until(SOON, "it to be asked again", async || {
                let asked = disk(there, "web-2").await?.and_then(|disk| disk.moving);
                Ok(asked.is_some_and(|moves| moves.asked).then_some(()))
            })
            .await?;
            there.kill()?;
            here.kill()?;
            ensure!(end(moving).await.is_err(), "its host is gone");
            cluster.restart(there).await?;
            let gone = ["migrate", "web-2", "--take-back", "--gone", "h1"];
            wait_until(SOON, "it to be taken back", async || {
                let output = cluster.treeboot_output(&gone).await?;
                let told = String::from_utf8_lossy(&output.stdout);
                Ok(told.contains("by your word").then_some(()))
            })
            .await?;
            let told = cluster.treeboot(&gone).await?;
            ensure!(told.contains("is host 'h2''s already"), "{told}");
            cluster.restart(here).await?;
            cluster.wait_known().await?;
            SPARSE.filled(3).check(there, "web-2").await
        },
    )
}

async fn refused_destroy(host: &Daemon) -> Result<()> {
    let request = v1::DestroyRequest {
        vm: "web-2".into(),
        instance_only: false,
    };
    let error = host.agent().await?.destroy(request).await.err();
    let error = error.context("it was destroyed")?;
    ensure!(error.message().contains("has not said whether it did"), "{error}");
    Ok(())
}

#[test]
fn a_vm_that_cannot_move_stays_with_all_that_it_has() -> Result<()> {
    if !require(&[Need::Root]) {
        return Ok(());
    }
    on_own_thread(Machine::Shared, async || {
        let cluster = Cluster::prepare("migrations-refused", &plan(2, false))?;
        // A disk of 4 MiB for a delta of 16.
        let small = cluster.hosts[1].folder().join("state/deltas");
        mount(&["-t", "tmpfs", "-o", "size=4m", "tmpfs"], &small)?;
        cluster.restart(&cluster.coordinator).await?;
        cluster.start_agents().await?;
        import(&cluster).await?;
        let (here, there) = (&cluster.hosts[0], &cluster.hosts[1]);
        write(here, "web-1", DENSE).await?;
        let migrate = ["migrate", "web-1", "--to", "h2"];
        refused(&cluster, &migrate, 9, "no space left for the delta of VM 'web-1'").await?;
        only(&cluster, &[(there, &[]), (here, &["web-1"])]).await?;
        DENSE.check(here, "web-1").await?;

        let few = Written { blocks: 64, ..SPARSE };
        write(here, "web-2", few).await?;
        cluster
            .treeboot(&["image", "remove", "pattern@1", "--force"])
            .await?;
        let migrate = ["migrate", "web-2", "--to", "h2"];
        refused(&cluster, &migrate, 3, "there is no image 'pattern@1'").await?;
        only(&cluster, &[(there, &[]), (here, &["web-1", "web-2"])]).await?;
        cluster.pass();
        Ok(())
    })
}

#[test]
fn a_guest_that_runs_is_stopped_here_and_goes_on_there() -> Result<()> {
    let Some(file) = guest::busybox() else {
        return Ok(());
    };
    let plan = Plan {
        hosts: 2,
        ..Plan::default()
    };
    with_cluster("migrations-guest", Machine::Alone, plan, async move |cluster| {
        cluster.import(&file, "busybox").await?;
        let (here, there) = (&cluster.hosts[0], &cluster.hosts[1]);
        let order = guest::order("web-1", "busybox");
        let vm = fleet::boot(here, &order).await?;
        let first = guest::console(&vm)?;
        ensure!(first.contains(" boot 1, machine-id "), "{first}");
        let told = cluster.treeboot(&["migrate", "web-1", "--to", "h2"]).await?;
        println!("{told}");
        let vm = fleet::await_ready(there, "web-1", order.limit).await?;
        guest::check_no_errors(&vm)?;
        let second = guest::console(&vm)?;
        let identity = |console: &str| -> Option<String> {
            let rest = console.split(" machine-id ").nth(1)?;
            Some(rest.split(',').next()?.to_owned())
        };
        ensure!(second.contains(" boot 2, "), "{second}");
        ensure!(
            identity(&first).is_some() && identity(&first) == identity(&second),
            "{first}\n{second}"
        );
        ensure!(disk(here, "web-1").await?.is_none(), "it is here, too");
        ensure!(fleet::describe(here, "web-1").await.is_err(), "it runs here, too");

        // A host that goes silent at the wrong moment is undone, and the guest runs again where it was.
        let relay = Relay::start(here.bound()?.rpc).await?;
        let moving = begin(there, "web-1", here, &relay).await?;
        wait_until(Duration::from_secs(60), "the guest to be stopped", async || {
            let vm = fleet::describe(there, "web-1").await?;
            Ok((vm.state() == v1::VmState::Stopped).then_some(()))
        })
        .await?;
        drop(moving);
        let seen = wait_until(order.limit, "it to be on one of both", async || {
            for host in [here, there] {
                if let Ok(vm) = fleet::describe(host, "web-1").await
                    && vm.state() == v1::VmState::Ready
                {
                    return Ok(Some((host.name().to_owned(), guest::console(&vm)?)));
                }
            }
            Ok(None)
        });
        let (host, third) = seen.await?;
        println!("it runs on {host}");
        ensure!(third.contains(" boot 3, "), "{third}");
        ensure!(identity(&first) == identity(&third), "{third}");
        Ok(())
    })
}

#[test]
fn a_guest_that_shuts_down_for_a_move_when_its_agent_dies_runs_again() -> Result<()> {
    let Some(file) = guest::busybox() else {
        return Ok(());
    };
    let plan = Plan {
        hosts: 2,
        ..Plan::default()
    };
    with_cluster(
        "migrations-shutdown",
        Machine::Alone,
        plan,
        async move |cluster| {
            cluster.import(&file, "busybox").await?;
            let (here, there) = (&cluster.hosts[0], &cluster.hosts[1]);
            let order = guest::order_with_jobs("web-1", "busybox", &["slow_end=3"]);
            fleet::boot(here, &order).await?;
            let relay = Relay::start(there.bound()?.rpc).await?;
            let die_in_its_shutdown = async || -> Result<()> {
                let moving = begin(here, "web-1", there, &relay).await?;
                wait_until(order.limit, "the guest to go down", async || {
                    let vm = fleet::describe(here, "web-1").await?;
                    Ok(guest::console(&vm)?.contains(" going down").then_some(()))
                })
                .await?;
                here.kill()?;
                ensure!(end(moving).await.is_err(), "its host is gone");
                cluster.restart(here).await?;
                Ok(())
            };
            die_in_its_shutdown().await?;
            let again = async || {
                let vm = fleet::describe(here, "web-1").await?;
                let again = vm.state() == v1::VmState::Ready && guest::console(&vm)?.contains(" boot 2, ");
                Ok(again.then_some(()))
            };
            wait_until(order.limit, "it to run again", again).await?;
            ensure!(
                disk(here, "web-1").await?.context("no disk")?.moving.is_none(),
                "it moves"
            );

            // Who stops a VM wants it to be stopped, whatever was to follow.
            die_in_its_shutdown().await?;
            cluster.wait_known().await?;
            cluster.treeboot(&["vm", "stop", "web-1"]).await?;
            let vm = fleet::describe(here, "web-1").await?;
            ensure!(vm.state() == v1::VmState::Stopped, "{:?}", vm.state());
            // What came there stays for a while: nobody told that host.
            ensure!(disk(there, "web-1").await?.is_none(), "it is there, too");
            let stays = disk(here, "web-1")
                .await?
                .is_some_and(|disk| disk.moving.is_none());
            ensure!(stays, "it is not here");
            Ok(())
        },
    )
}
