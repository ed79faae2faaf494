//! Fleets of real guests: what is shipped, what is seen, what stays.

use anyhow::{Context as _, Result, ensure};
use treeboot_proto::v1;
use treeboot_tests::cluster::{Cluster, Plan};
use treeboot_tests::measure::{self, FleetFigures};
use treeboot_tests::table::bytes;
use treeboot_tests::{fleet, guest};

use crate::support::{Machine, with_cluster};

const IMAGE: &str = "busybox";

/// Boots a VM on each of the deepest half of so many hosts, at once, and holds the origin to its limit.
fn the_origin_ships_little(hosts: usize, levels: u32) -> Result<()> {
    let Some(file) = guest::busybox() else {
        return Ok(());
    };
    let plan = Plan {
        hosts,
        ..Plan::default()
    };
    with_cluster(
        &format!("fleet-{hosts}"),
        Machine::Alone,
        plan,
        async move |cluster| {
            cluster.import(&file, IMAGE).await?;
            for host in &cluster.hosts {
                fleet::attach(host, IMAGE).await?;
            }
            let tree = measure::tree(cluster, IMAGE).await?;
            assert_eq!(tree.nodes.iter().map(|node| node.depth).max(), Some(levels));
            let deepest = &cluster.hosts[hosts / 2..];
            let orders: Vec<_> = deepest
                .iter()
                .map(|host| (host, guest::order(&format!("{}-vm", host.name()), IMAGE)))
                .collect();
            let boots = orders.iter().map(|(host, order)| fleet::boot(host, order));
            for vm in futures_util::future::try_join_all(boots).await? {
                println!("{} is up after {:.1} s", vm.name, vm.ready_us as f64 / 1e6);
            }
            for (host, order) in &orders {
                guest::check_no_errors(&fleet::describe(host, &order.vm).await?)?;
            }
            let figures = FleetFigures::collect(cluster, IMAGE).await?;
            println!(
                "{hosts} hosts: guests asked for {} in {} of chunks; the origin shipped {}; {} from fallbacks",
                bytes(figures.unique_bytes),
                bytes(figures.unique_chunk_bytes),
                bytes(figures.origin_bytes),
                bytes(figures.fallback_bytes)
            );
            ensure!(
                figures.unique_bytes > 1 << 20,
                "guests that read nothing: {figures:?}"
            );
            ensure!(
                figures.origin_bytes <= figures.origin_limit_bytes(),
                "the origin shipped more than {}: {figures:#?}",
                bytes(figures.origin_limit_bytes())
            );
            assert_eq!(figures.fallback_bytes, 0);
            Ok(())
        },
    )
}

#[test]
fn the_origin_ships_each_chunk_once_to_each_child_with_3_hosts() -> Result<()> {
    the_origin_ships_little(3, 2)
}

#[test]
fn the_origin_ships_each_chunk_once_to_each_child_with_7_hosts() -> Result<()> {
    the_origin_ships_little(7, 3)
}

#[test]
fn two_vms_on_a_host_fetch_each_chunk_once() -> Result<()> {
    let Some(file) = guest::busybox() else {
        return Ok(());
    };
    with_cluster("two-vms", Machine::Alone, Plan::default(), async move |cluster| {
        cluster.import(&file, IMAGE).await?;
        let host = &cluster.hosts[0];
        let orders = [guest::order("a", IMAGE), guest::order("b", IMAGE)];
        futures_util::future::try_join_all(orders.iter().map(|order| fleet::boot(host, order))).await?;
        let figures = FleetFigures::collect(cluster, IMAGE).await?;
        let of_host = figures
            .hosts
            .iter()
            .find(|figures| figures.host == host.name())
            .context("the host has a base")?;
        println!("{of_host:#?}");
        let data = of_host.fetched_bytes + of_host.fallback_bytes - of_host.hash_bytes;
        ensure!(
            data <= figures.unique_chunk_bytes,
            "fetched {data}, the guests' chunks are {}",
            figures.unique_chunk_bytes
        );
        ensure!(
            of_host.guest_read_bytes > of_host.guest_unique_bytes,
            "two guests read the same blocks"
        );
        Ok(())
    })
}

async fn digest(cluster: &Cluster) -> Result<String> {
    let shown = cluster.treeboot(&["image", "show", IMAGE, "--json"]).await?;
    let shown: serde_json::Value = serde_json::from_str(&shown)?;
    Ok(shown["digest"]
        .as_str()
        .context("an image has a digest")?
        .to_owned())
}

#[test]
fn a_vm_sees_its_own_writes_after_a_stop_and_nobody_elses_and_the_image_stays_as_it_was() -> Result<()> {
    let Some(file) = guest::busybox() else {
        return Ok(());
    };
    let plan = Plan {
        // Here the guests' own front ends have to prove themselves, too.
        secure: true,
        ..Plan::default()
    };
    with_cluster("writes", Machine::Alone, plan, async move |cluster| {
        cluster.import(&file, IMAGE).await?;
        let before = digest(cluster).await?;
        let host = &cluster.hosts[0];
        // Each writes a pattern of its own name at the same places; a guest that finds another's writes says so.
        let writes = ["a", "b"].map(|vm| guest::order_with_jobs(vm, IMAGE, &["write_mb=4"]));
        futures_util::future::try_join_all(writes.iter().map(|order| fleet::boot(host, order))).await?;
        for order in &writes {
            let vm = fleet::describe(host, &order.vm).await?;
            guest::check_no_errors(&vm)?;
            ensure!(
                guest::console(&vm)?.contains("boot 1"),
                "a new disk is at its first boot"
            );
            fleet::stop(host, &order.vm, true).await?;
        }
        let verifies = ["a", "b"].map(|vm| guest::order_with_jobs(vm, IMAGE, &["verify_mb=4"]));
        futures_util::future::try_join_all(verifies.iter().map(|order| fleet::boot(host, order))).await?;
        for order in &verifies {
            let vm = fleet::describe(host, &order.vm).await?;
            guest::check_no_errors(&vm)?;
            let console = guest::console(&vm)?;
            ensure!(console.contains("verified 4 MiB"), "{console}");
            ensure!(console.contains("boot 2"), "{console}");
            fleet::stop(host, &order.vm, true).await?;
        }
        assert_eq!(before, digest(cluster).await?);
        // A new VM's disk holds what the image holds, byte by byte, as a foreign program reads it.
        let request = v1::CreateRequest {
            vm: "untouched".into(),
            image: Some(measure::newest(IMAGE)),
            device: false,
            limit_bytes: None,
        };
        let created = host.agent().await?.create(request).await?.into_inner();
        let disk = created.disk.context("an answer without the disk")?;
        let url: treeboot_types::IscsiUrl = disk.url.parse()?;
        let secret = created.secret.context("an answer without the secret")?;
        let secret_file = cluster.path().join("untouched.secret");
        std::fs::write(&secret_file, &secret.secret)?;
        let object = format!("secret,id=s,file={}", secret_file.display());
        // By its own front end's name and secret, or it is not let in.
        let options = format!(
            "driver=raw,file.driver=iscsi,file.transport=tcp,file.portal={},file.target={},file.lun={},file.initiator-name={},\
             file.user={},file.password-secret=s",
            url.portal(),
            url.target,
            url.lun,
            disk.initiator,
            secret.user
        );
        let image = format!("driver=raw,file.driver=file,file.filename={}", file.display());
        let compared = tokio::process::Command::from({
            let mut command = cluster.scratch().command("qemu-img");
            command
                .args(["compare", "--object", &object, "--image-opts"])
                .args([&image, &options]);
            command
        })
        .output()
        .await?;
        ensure!(
            compared.status.success(),
            "{}{}",
            String::from_utf8_lossy(&compared.stdout),
            String::from_utf8_lossy(&compared.stderr)
        );
        Ok(())
    })
}
