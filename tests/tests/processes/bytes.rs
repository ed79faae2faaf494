//! No wrong byte, whatever lies in a cache, whoever serves the image: whole reads of an image whose every block is known.

use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use treeboot_iscsi::initiator::Session;
use treeboot_proto::v1;
use treeboot_tests::cluster::{Cluster, Plan};
use treeboot_tests::daemon::Daemon;
use treeboot_tests::image::Pattern;
use treeboot_tests::need::{Need, require};
use treeboot_tests::reader::{log_in, read_whole};
use treeboot_tests::tgt::Tgt;
use treeboot_tests::wait::wait_until;
use treeboot_tests::{fleet, measure};

use crate::support::{Machine, with_cluster};

const IMAGE: &str = "pattern";
const PATTERN: Pattern = Pattern {
    seed: 11,
    bytes: 24 << 20,
};
const SOON: Duration = Duration::from_secs(30);
/// What a read may take when a parent is lost.
const STALL_LIMIT: Duration = Duration::from_secs(2);

async fn import_and_attach(cluster: &Cluster) -> Result<()> {
    let file = cluster.path().join("pattern.raw");
    PATTERN.write(&file)?;
    cluster.import(&file, IMAGE).await?;
    for host in &cluster.hosts {
        fleet::attach(host, IMAGE).await?;
    }
    Ok(())
}

/// A session with a new VM's disk: what is read there comes from the image alone.
async fn session(host: &Daemon) -> Result<(Session, u16)> {
    log_in(host, IMAGE, &format!("reader-{}", host.name())).await
}

async fn counters(host: &Daemon) -> Result<v1::BaseCounters> {
    let base = measure::base_status(host, IMAGE).await?.context("attached")?;
    base.counters.context("counted")
}

fn chain(hosts: usize) -> Plan {
    Plan {
        hosts,
        fan_out: Some(1),
        ..Plan::default()
    }
}

#[test]
fn three_levels_below_the_origin_every_byte_is_the_images_and_crossed_each_link_once() -> Result<()> {
    with_cluster("whole-read", Machine::Shared, chain(3), async |cluster| {
        import_and_attach(cluster).await?;
        let (session, lun) = session(&cluster.hosts[2]).await?;
        let read = read_whole(&session, lun, PATTERN).await?;
        println!("cold through three levels: {read:?}");
        let again = read_whole(&session, lun, PATTERN).await?;
        println!("warm: {again:?}");
        for host in &cluster.hosts {
            let counters = counters(host).await?;
            let data =
                counters.fetched_parent_bytes + counters.fetched_fallback_bytes - counters.fetched_hash_bytes;
            ensure!(data <= PATTERN.bytes, "{} fetched {data} bytes", host.name());
            assert_eq!(counters.bad_chunks, 0);
        }
        Ok(())
    })
}

/// All cache files of an agent that hold an image's data.
fn cached_data(agent: &Daemon) -> Result<Vec<PathBuf>> {
    fn find(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                find(&path, found)?;
            } else if path.ends_with("data") {
                found.push(path);
            }
        }
        Ok(())
    }
    let mut found = Vec::new();
    find(&agent.folder().join("cache"), &mut found)?;
    ensure!(!found.is_empty(), "{} has no cache", agent.name());
    Ok(found)
}

/// Turns a bit in every block of a cache, under a running agent that has checked them all.
fn corrupt_cache(agent: &Daemon) -> Result<()> {
    for path in cached_data(agent)? {
        let file = fs::OpenOptions::new().read(true).write(true).open(&path)?;
        for offset in (0..file.metadata()?.size()).step_by(4096) {
            let mut byte = [0];
            file.read_exact_at(&mut byte, offset + 100)?;
            byte[0] ^= 0x10;
            file.write_all_at(&byte, offset + 100)?;
        }
    }
    Ok(())
}

#[test]
fn a_parent_that_ships_wrong_bytes_is_reported_and_nobody_sees_them() -> Result<()> {
    with_cluster("wrong-bytes", Machine::Shared, chain(2), async |cluster| {
        import_and_attach(cluster).await?;
        let [parent, child] = &cluster.hosts[..] else {
            anyhow::bail!("two hosts");
        };
        // The parent fetches and checks everything; from now on it serves without looking.
        let (at_parent, lun) = session(parent).await?;
        read_whole(&at_parent, lun, PATTERN).await?;
        corrupt_cache(parent)?;
        let (at_child, lun) = session(child).await?;
        let read = read_whole(&at_child, lun, PATTERN).await?;
        println!("over a parent that lies: {read:?}");
        // Every block of the parent's is wrong, so what was read well came from elsewhere: a fallback, or the parent that the
        // coordinator gave as soon as it was told.
        let seen = counters(child).await?;
        println!(
            "{} bad chunks, {} bytes from fallbacks",
            seen.bad_chunks, seen.fetched_fallback_bytes
        );
        ensure!(seen.bad_chunks > 0, "the child met no bad chunk: {seen:?}");
        wait_until(SOON, "the parent's being reported", async || {
            let mut coordinator = cluster.coordinator.coordinator().await?;
            let hosts = coordinator
                .list_hosts(v1::ListHostsRequest {})
                .await?
                .into_inner()
                .hosts;
            let reported = hosts.iter().any(|host| {
                host.info.as_ref().is_some_and(|info| info.name == parent.name())
                    && host.wrong_bytes_reports > 0
            });
            Ok(reported.then_some(()))
        })
        .await
    })
}

#[test]
fn a_cache_corrupted_while_its_agent_was_down_is_not_believed() -> Result<()> {
    with_cluster("corrupt-restart", Machine::Shared, chain(1), async |cluster| {
        import_and_attach(cluster).await?;
        let host = &cluster.hosts[0];
        let (first, lun) = session(host).await?;
        read_whole(&first, lun, PATTERN).await?;
        host.kill()?;
        corrupt_cache(host)?;
        cluster.restart(host).await?;
        let (again, lun) = wait_until(SOON, "the base to be exported again", async || {
            Ok(session(host).await.ok())
        })
        .await?;
        read_whole(&again, lun, PATTERN).await?;
        Ok(())
    })
}

#[test]
fn a_read_goes_on_while_the_parent_dies_freezes_and_comes_back() -> Result<()> {
    with_cluster("read-under-faults", Machine::Shared, chain(3), async |cluster| {
        import_and_attach(cluster).await?;
        let leaf = &cluster.hosts[2];
        let (session, lun) = session(leaf).await?;
        let faults = async {
            for (parent, freeze) in [(&cluster.hosts[1], true), (&cluster.hosts[0], false)] {
                let before = counters(leaf).await?.fetched_parent_bytes;
                wait_until(SOON, "the read to be under way", async || {
                    let counters = counters(leaf).await?;
                    let fetched = counters.fetched_parent_bytes + counters.fetched_fallback_bytes;
                    Ok((fetched > before + (1 << 20) || fetched >= PATTERN.bytes).then_some(()))
                })
                .await?;
                if freeze {
                    parent.freeze()?;
                } else {
                    parent.kill()?;
                }
            }
            Ok::<_, anyhow::Error>(())
        };
        let (read, faults) = futures_util::future::join(read_whole(&session, lun, PATTERN), faults).await;
        faults?;
        let read = read?;
        println!("over two lost parents: {read:?}");
        ensure!(read.longest < STALL_LIMIT, "one read took {:?}", read.longest);
        cluster.hosts[1].thaw()
    })
}

#[test]
fn a_cache_without_room_keeps_what_fits_and_reads_go_on() -> Result<()> {
    if !require(&[Need::Root]) {
        return Ok(());
    }
    crate::support::on_own_thread(Machine::Shared, async || {
        let cluster = Cluster::prepare("full-cache", &chain(2))?;
        // A disk of 4 MiB for an image of 24.
        let full = cluster.hosts[0].folder().join("cache");
        fs::create_dir_all(&full)?;
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=4m", "tmpfs"])
            .arg(&full)
            .status()?;
        ensure!(mounted.success(), "mount ended with {mounted}");
        cluster.restart(&cluster.coordinator).await?;
        cluster.start_agents().await?;
        import_and_attach(&cluster).await?;
        let (session, lun) = session(&cluster.hosts[1]).await?;
        read_whole(&session, lun, PATTERN).await?;
        let counters = counters(&cluster.hosts[0]).await?;
        // What came first made way for what came later, and the directory says why it does not grow.
        ensure!(
            (1 << 20..4 << 20).contains(&counters.cached_bytes),
            "{counters:?}"
        );
        let mut agent = cluster.hosts[0].agent().await?;
        let status = agent.status(v1::StatusRequest {}).await?.into_inner();
        let states: Vec<_> = status.cache_members.iter().map(|member| member.state()).collect();
        ensure!(states == [v1::CacheMemberState::Full], "{states:?}");
        cluster.pass();
        Ok(())
    })
}

#[test]
fn a_foreign_target_is_an_origin_and_another_takes_its_place_when_it_dies() -> Result<()> {
    if !require(&[Need::Root, Need::Program("tgtd", "tgt")]) {
        return Ok(());
    }
    with_cluster("foreign", Machine::Shared, chain(2), async |cluster| {
        let file = cluster.path().join("pattern.raw");
        PATTERN.write(&file)?;
        let address = cluster.origin.bound()?.rpc.ip();
        let near = Tgt::serve(cluster.scratch(), "near", address, &file, true).await?;
        let far = Tgt::serve(cluster.scratch(), "far", address, &file, true).await?;
        let (near_url, far_url) = (near.url(), far.url());
        cluster
            .treeboot(&["image", "register", &near_url, &far_url, "--name", IMAGE])
            .await?;
        let in_store: u64 = fs_bytes(&cluster.origin.folder().join("store"))?;
        ensure!(
            in_store < PATTERN.bytes / 10,
            "only the hash tree is kept here, not {in_store} bytes"
        );
        for host in &cluster.hosts {
            fleet::attach(host, IMAGE).await?;
        }
        let leaf = &cluster.hosts[1];
        let (session, lun) = session(leaf).await?;
        let half = Pattern {
            bytes: PATTERN.bytes / 2,
            ..PATTERN
        };
        read_whole(&session, lun, half).await?;
        near.kill()?;
        let read = read_whole(&session, lun, PATTERN).await?;
        println!("over a dead foreign origin: {read:?}");
        far.kill()
    })
}

/// Bytes that a folder's files take on the disk.
fn fs_bytes(folder: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        bytes += if metadata.is_dir() {
            fs_bytes(&entry.path())?
        } else {
            // stat(2): st_blocks counts 512 bytes each.
            metadata.blocks() * 512
        };
    }
    Ok(bytes)
}
