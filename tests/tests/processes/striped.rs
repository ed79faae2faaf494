//! Two stripes: every host reads from two parents at once, and uploads an image about once, as the origin does.

use anyhow::{Context as _, Result, ensure};
use treeboot_proto::v1;
use treeboot_tests::cluster::{Cluster, Plan};
use treeboot_tests::image::Pattern;
use treeboot_tests::measure::{FleetFigures, HostFigures};
use treeboot_tests::reader::{log_in, read_whole};
use treeboot_tests::{fleet, measure};

use crate::support::{Machine, with_cluster};

const IMAGE: &str = "pattern";
const PATTERN: Pattern = Pattern {
    seed: 23,
    bytes: 24 << 20,
};
const HOSTS: usize = 7;

/// All hosts read all of the image at the same time, every block compared.
async fn read_everywhere(cluster: &Cluster) -> Result<()> {
    let sessions = cluster.hosts.iter().map(|host| log_in(host, IMAGE, host.name()));
    let sessions = futures_util::future::try_join_all(sessions).await?;
    let reads = sessions
        .iter()
        .map(|(session, lun)| read_whole(session, *lun, PATTERN));
    for (host, read) in cluster
        .hosts
        .iter()
        .zip(futures_util::future::try_join_all(reads).await?)
    {
        println!("{}: {read:?}", host.name());
    }
    Ok(())
}

/// In which stripes each host has children.
fn homes(tree: &v1::GetTreeResponse) -> Vec<(String, Vec<u32>)> {
    let hosts: std::collections::BTreeSet<&String> = tree
        .nodes
        .iter()
        .filter(|node| !node.origin)
        .map(|node| &node.host)
        .collect();
    let stripes = |host: &String| {
        let feeding = tree
            .nodes
            .iter()
            .filter(|node| node.host == *host && node.children > 0);
        feeding.map(|node| node.stripe).collect()
    };
    hosts
        .into_iter()
        .map(|host| (host.clone(), stripes(host)))
        .collect()
}

#[test]
fn in_two_stripes_every_host_and_the_origin_upload_an_image_about_once() -> Result<()> {
    let plan = Plan {
        hosts: HOSTS,
        ..Plan::default()
    };
    with_cluster("striped", Machine::Alone, plan, async |cluster| {
        let file = cluster.path().join("pattern.raw");
        PATTERN.write(&file)?;
        cluster.import(&file, IMAGE).await?;
        for host in &cluster.hosts {
            fleet::attach(host, IMAGE).await?;
        }
        let tree = measure::tree(cluster, IMAGE).await?;
        for (host, stripes) in homes(&tree) {
            ensure!(
                stripes.len() <= 1,
                "{host} feeds others in the stripes {stripes:?}"
            );
        }
        read_everywhere(cluster).await?;
        let figures = FleetFigures::collect(cluster, IMAGE).await?;
        let image = PATTERN.bytes as f64;
        for host in &figures.hosts {
            let HostFigures {
                shipped_wire_bytes,
                fetched_bytes,
                fallback_bytes,
                hash_bytes,
                ..
            } = host;
            let (up, down) = (*shipped_wire_bytes as f64 / image, *fetched_bytes as f64 / image);
            println!(
                "{}: up {up:.2}, down {down:.2} of the image; {hash_bytes} bytes of hashes, {fallback_bytes} from fallbacks",
                host.host
            );
            let limit = if host.depth == 0 { 1.1 } else { 1.2 };
            ensure!(up <= limit, "{} shipped {up:.2} of the image", host.host);
            ensure!(*fallback_bytes == 0, "{} read from fallbacks", host.host);
        }
        for host in &cluster.hosts {
            let base = measure::base_status(host, IMAGE).await?.context("attached")?;
            let used = base.paths.iter().filter(|path| path.active && path.bytes > 0);
            ensure!(
                used.map(|path| path.stripe).collect::<Vec<_>>() == [0, 1],
                "{} did not read both stripes from their parents: {:?}",
                host.name(),
                base.paths
            );
        }
        Ok(())
    })
}
