//! The cache group over real daemons: an image larger than the budget, members that come, go and fail while it is read, pins, restarts and
//! kills. Every byte that is read is compared with the image.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use treeboot_identity::tls::Dialer;
use treeboot_proto::v1;
use treeboot_tests::cluster::{Cluster, Plan};
use treeboot_tests::daemon::Daemon;
use treeboot_tests::image::Pattern;
use treeboot_tests::need::{Need, require};
use treeboot_tests::reader::{log_in, read_whole};
use treeboot_tests::wait::wait_until;

use crate::room::small;
use crate::support::{Machine, with_cluster};

pub(crate) const MIB: u64 = 1 << 20;
const LARGE: (&str, Pattern) = (
    "large",
    Pattern {
        seed: 91,
        bytes: 32 * MIB,
    },
);
const SMALL: (&str, Pattern) = (
    "small",
    Pattern {
        seed: 92,
        bytes: 4 * MIB,
    },
);
/// A segment, the unit in which the group evicts: what a file system's own metadata may add.
const SLACK: u64 = MIB;
const SOON: Duration = Duration::from_secs(60);

/// Bytes of disk below a directory.
fn blocks(path: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(path) else {
        return 0;
    };
    let sizes = entries.filter_map(|entry| {
        let entry = entry.ok()?;
        let found = entry.metadata().ok()?;
        Some(match found.is_dir() {
            true => blocks(&entry.path()),
            false => found.blocks() * 512,
        })
    });
    sizes.sum()
}

async fn import(cluster: &Cluster) -> Result<()> {
    for (name, pattern) in [LARGE, SMALL] {
        let file = cluster.path().join(name);
        pattern.write(&file)?;
        cluster.import(&file, name).await?;
    }
    Ok(())
}

/// Reads all of an image at a host, by a VM's front end.
async fn read(agent: &Daemon, (name, pattern): (&str, Pattern)) -> Result<()> {
    let (session, lun) = log_in(agent, name, &format!("reader-of-{name}")).await?;
    let read = read_whole(&session, lun, pattern).await;
    read.with_context(|| format!("{name} at {}", agent.name()))?;
    Ok(())
}

/// Goes on reading until `done`, then once more.
async fn read_until(agent: &Daemon, done: &AtomicBool) -> Result<()> {
    let (session, lun) = log_in(agent, LARGE.0, "reader-of-large").await?;
    let mut last = false;
    loop {
        read_whole(&session, lun, LARGE.1).await?;
        if last {
            return Ok(());
        }
        last = done.load(Ordering::Relaxed);
    }
}

async fn show(agent: &Daemon) -> Result<v1::CacheReport> {
    let request = v1::ShowCacheRequest {};
    Ok(agent.agent().await?.show_cache(request).await?.into_inner())
}

async fn cached(agent: &Daemon, name: &str) -> Result<v1::CachedImage> {
    let report = show(agent).await?;
    let found = report
        .images
        .into_iter()
        .find(|image| image.images.iter().any(|id| id.name == name));
    found.with_context(|| format!("nothing of {name} is cached"))
}

/// `treeboot cache VERB --host HOST …`
pub(crate) async fn cache(cluster: &Cluster, host: &Daemon, verb: &str, what: &str) -> Result<String> {
    cluster
        .treeboot(&["cache", verb, "--host", host.name(), what])
        .await
}

/// Puts the host's cache into directories with budgets, in MiB.
pub(crate) async fn divide(cluster: &Cluster, host: &Daemon, members: &[(&Path, u64)]) -> Result<()> {
    for (path, mib) in members {
        cache(cluster, host, "add", &format!("{}={mib}M", path.display())).await?;
    }
    let first = host.folder().join("cache");
    cache(cluster, host, "remove", &first.display().to_string()).await?;
    Ok(())
}

fn keeps_to(members: &[(&Path, u64)]) -> Result<()> {
    for (path, mib) in members {
        let used = blocks(path);
        ensure!(
            used <= mib * MIB + SLACK,
            "{} has {used} bytes of {mib} MiB",
            path.display()
        );
    }
    Ok(())
}

#[test]
fn a_cache_group_keeps_its_budget_and_readers_see_the_image_whatever_its_members_do() -> Result<()> {
    let plan = Plan {
        hosts: 2,
        // The second host reads through the first one.
        fan_out: Some(1),
        ..Plan::default()
    };
    with_cluster("cache", Machine::Shared, plan, async |cluster| {
        import(cluster).await?;
        let (host, child) = (&cluster.hosts[0], &cluster.hosts[1]);
        let place = |name: &str| host.folder().join(name);
        let (a, b, c): (PathBuf, PathBuf, PathBuf) = (place("a"), place("b"), place("c"));
        let members = [(a.as_path(), 9), (b.as_path(), 5)];
        divide(cluster, host, &members).await?;
        larger_than_the_budget(host, child, &members).await?;
        members_come_and_go(cluster, host, [&a, &b, &c]).await?;
        pinned(cluster, host).await?;
        let now = [(b.as_path(), 5), (c.as_path(), 12)];
        killed_and_restarted(cluster, host, &now).await
    })
}

async fn larger_than_the_budget(host: &Daemon, child: &Daemon, members: &[(&Path, u64)]) -> Result<()> {
    for _ in 0..2 {
        read(host, LARGE).await?;
        keeps_to(members)?;
    }
    let report = show(host).await?;
    let budgets: Vec<_> = report
        .members
        .iter()
        .map(|member| member.budget_bytes / MIB)
        .collect();
    ensure!(budgets == [9, 5], "{report:?}");
    ensure!(
        report.evictions > 10 && report.members.iter().all(|member| member.used_bytes > MIB),
        "{report:?}"
    );
    // What went is fetched again for a child, too.
    read(child, LARGE).await?;
    keeps_to(members)
}

async fn members_come_and_go(cluster: &Cluster, host: &Daemon, [a, b, c]: [&Path; 3]) -> Result<()> {
    let done = AtomicBool::new(false);
    let changes = async {
        cache(cluster, host, "add", &format!("{}=12M", c.display())).await?;
        wait_until(SOON, "the new member to be used", || async {
            let report = show(host).await?;
            let member = report
                .members
                .iter()
                .find(|member| member.directory == c.display().to_string());
            Ok(member
                .is_some_and(|member| member.used_bytes > 2 * MIB)
                .then_some(()))
        })
        .await?;
        cache(cluster, host, "remove", &a.display().to_string()).await?;
        done.store(true, Ordering::Relaxed);
        anyhow::Ok(())
    };
    let (read, changed) = tokio::join!(read_until(host, &done), changes);
    changed?;
    read?;
    ensure!(blocks(a) == 0, "the files of a removed member are left");
    keeps_to(&[(b, 5), (c, 12)])?;
    let again = cache(cluster, host, "add", &format!("{}=12M", c.display())).await;
    ensure!(again.is_err_and(|error| error.to_string().contains("is a member")));
    let none = cache(cluster, host, "remove", &a.display().to_string()).await;
    ensure!(none.is_err_and(|error| error.to_string().contains("is no member")));
    Ok(())
}

async fn pinned(cluster: &Cluster, host: &Daemon) -> Result<()> {
    let refused = cache(cluster, host, "pin", LARGE.0).await;
    let words = refused
        .err()
        .context("an image was pinned for which there is no room")?
        .to_string();
    ensure!(words.contains("may hold 17825792"), "{words}");
    read(host, SMALL).await?;
    cache(cluster, host, "pin", SMALL.0).await?;
    let before = wait_until(SOON, "all of a small image to be there", || async {
        read(host, SMALL).await?;
        let found = cached(host, SMALL.0).await?;
        Ok((found.cached_bytes == SMALL.1.bytes).then_some(found))
    })
    .await?;
    ensure!(before.pinned, "{before:?}");
    read(host, LARGE).await?;
    let after = cached(host, SMALL.0).await?;
    ensure!(
        after.cached_bytes == before.cached_bytes,
        "{before:?} became {after:?}"
    );
    let kept = cache(cluster, host, "drop", SMALL.0).await;
    ensure!(kept.is_err_and(|error| error.to_string().contains("is pinned")));
    Ok(())
}

async fn killed_and_restarted(cluster: &Cluster, host: &Daemon, members: &[(&Path, u64)]) -> Result<()> {
    // Killed amid evictions: whoever reads then is cut off, and nobody sees wrong bytes afterwards.
    let evictions = show(host).await?.evictions;
    let on_and_on = AtomicBool::new(false);
    let reading = read_until(host, &on_and_on);
    let killing = async {
        wait_until(SOON, "evictions", || async {
            Ok((show(host).await?.evictions > evictions + 4).then_some(()))
        })
        .await?;
        host.kill()
    };
    tokio::select! {
        biased;
        killed = killing => killed?,
        read = reading => bail!("the reading ended before the kill: {read:?}"),
    }
    host.start(cluster.scratch()).await?;
    keeps_to(members)?;
    let small = cached(host, SMALL.0).await?;
    ensure!(small.pinned && small.cached_bytes > 3 * MIB, "{small:?}");
    let misses = show(host).await?.misses;
    read(host, SMALL).await?;
    let report = show(host).await?;
    ensure!(
        report.misses == misses,
        "what was pinned was fetched again: {report:?}"
    );
    read(host, LARGE).await?;
    keeps_to(members)?;
    // In good order, all that was there is there.
    let before = show(host).await?;
    host.terminate().await?;
    cluster.restart(host).await?;
    let after = show(host).await?;
    let sum = |report: &v1::CacheReport| report.images.iter().map(|image| image.cached_bytes).sum::<u64>();
    // What was being stored when it ended may have taken the place of a segment.
    ensure!(sum(&after) + SLACK >= sum(&before), "{before:?} became {after:?}");
    cache(cluster, host, "unpin", SMALL.0).await?;
    cache(cluster, host, "drop", SMALL.0).await?;
    ensure!(cached(host, SMALL.0).await?.cached_bytes == 0);
    read(host, SMALL).await
}

#[test]
fn a_member_that_fails_is_dropped_and_told_and_readers_notice_nothing() -> Result<()> {
    const NEEDS: [Need; 2] = [Need::Root, Need::Program("mkfs.ext4", "e2fsprogs")];
    if !require(&NEEDS) {
        return Ok(());
    }
    with_cluster("cache-fails", Machine::Shared, Plan::default(), async |cluster| {
        import(cluster).await?;
        let host = &cluster.hosts[0];
        let place = |name: &str| host.folder().join(name);
        let (broken, gone, good) = (place("broken"), place("gone"), place("good"));
        for (at, image) in [(&broken, "broken.img"), (&gone, "gone.img")] {
            small(&cluster.path().join(image), at)?;
        }
        divide(cluster, host, &[(&broken, 12), (&gone, 12), (&good, 8)]).await?;
        read(host, LARGE).await?;
        let done = AtomicBool::new(false);
        let failures = async {
            // The file system gives up, as after an error of its device: it takes no more writes.
            mount_program(
                "mount",
                &["-o".as_ref(), "remount,abort".as_ref(), broken.as_os_str()],
            )?;
            await_failure(host, &broken).await?;
            // It is no longer where it was; what is open still works, and is not relied on.
            mount_program("umount", &["-l".as_ref(), gone.as_os_str()])?;
            await_failure(host, &gone).await?;
            done.store(true, Ordering::Relaxed);
            anyhow::Ok(())
        };
        let (read, failed) = tokio::join!(read_until(host, &done), failures);
        failed?;
        read?;
        told(cluster, host, &broken).await?;
        // The directory under the lost file system is a directory, too.
        cache(cluster, host, "add", &format!("{}=4M", gone.display())).await?;
        cache(cluster, host, "remove", &broken.display().to_string()).await?;
        ensure!(
            cluster
                .treeboot(&["doctor"])
                .await
                .is_ok_and(|text| !text.contains("damaged"))
        );
        self::read(host, LARGE).await?;
        keeps_to(&[(&gone, 4), (&good, 8)])
    })
}

fn mount_program(program: &str, args: &[&std::ffi::OsStr]) -> Result<()> {
    let output = Command::new(program).args(args).output()?;
    ensure!(
        output.status.success(),
        "{program}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

pub(crate) async fn await_failure(host: &Daemon, directory: &Path) -> Result<()> {
    wait_until(SOON, "the failed member to be dropped", || async {
        let report = show(host).await?;
        let failed = report.members.iter().find(|member| {
            member.state() == v1::CacheMemberState::Failed
                && member.directory == directory.display().to_string()
        });
        Ok(failed.map(|_| ()))
    })
    .await
}

/// The alarm is wherever somebody may look.
async fn told(cluster: &Cluster, host: &Daemon, directory: &Path) -> Result<()> {
    let directory = directory.display().to_string();
    let doctor = cluster.treeboot_output(&["doctor"]).await?;
    let doctor = String::from_utf8_lossy(&doctor.stdout).into_owned();
    ensure!(
        doctor
            .lines()
            .any(|line| line.contains("damaged") && line.contains(&directory)),
        "{doctor}"
    );
    let shown = cluster.treeboot(&["host", "show", host.name()]).await?;
    ensure!(
        shown.contains(&format!("CACHE DIRECTORY DROPPED: {directory}")),
        "{shown}"
    );
    let metrics = treeboot_tests::http::get(&host.channel_by(&Dialer::Insecure).await?, "/metrics")
        .await?
        .text;
    let line = format!("treeboot_agent_cache_member_failed{{directory=\"{directory}\"}} 1");
    ensure!(metrics.contains(&line), "{metrics}");
    Ok(())
}
