//! A VM's disk as a block device of the host, on the user plane. That it outlives its agent is in `endure`.

use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use treeboot_proto::v1;
use treeboot_tests::cluster::{Cluster, Plan};
use treeboot_tests::daemon::Daemon;
use treeboot_tests::image::Pattern;
use treeboot_tests::measure::newest;
use treeboot_tests::need::{Need, require};
use treeboot_tests::wait::wait_until;

use crate::support::{Machine, with_cluster};

const NEEDS: [Need; 2] = [Need::Root, Need::Program("mkfs.ext4", "e2fsprogs")];
const IMAGE: &str = "base";
const BYTES: u64 = 64 << 20;
/// For what takes milliseconds on a machine that does nothing else.
const SOON: Duration = Duration::from_secs(60);
const WRITTEN_MIB: u32 = 16;

/// The device of one VM, of which nothing is left at the end, whatever fails.
pub(crate) struct Device {
    pub(crate) vm: String,
    mounts: PathBuf,
}

impl Device {
    /// A name that no other test on this machine has: `/dev/treeboot` is one for all.
    pub(crate) fn new(agent: &Daemon, name: &str) -> Self {
        Self {
            vm: format!("{name}-{}", std::process::id()),
            mounts: agent.folder().join("state/devices"),
        }
    }

    pub(crate) fn path(&self) -> PathBuf {
        PathBuf::from("/dev/treeboot").join(&self.vm)
    }

    pub(crate) fn request(&self) -> v1::CreateRequest {
        v1::CreateRequest {
            vm: self.vm.clone(),
            image: Some(newest(IMAGE)),
            device: true,
            limit_bytes: None,
        }
    }

    /// Nothing of it is on the machine any more. Whoever looks at a device at that moment delays its end.
    pub(crate) async fn is_gone(&self) -> Result<()> {
        let gone = wait_until(SOON, "the device to be gone", || async {
            Ok(self.left()?.is_empty().then_some(()))
        });
        gone.await.with_context(|| format!("{:?}", self.left()))
    }

    /// What of it is on the machine.
    fn left(&self) -> Result<Vec<String>> {
        let mut left = Vec::new();
        if self.path().symlink_metadata().is_ok() {
            left.push(self.path().display().to_string());
        }
        let loops = tool(
            "losetup",
            &["--list", "--noheadings", "--output", "NAME,BACK-FILE"],
        )?;
        // "/" is what is said of a file whose file system was unmounted below it.
        let ours = |line: &&str| {
            let file = line.split_whitespace().nth(1).unwrap_or_default();
            file == "/" || file.ends_with(&format!("/devices/{}", self.vm))
        };
        left.extend(loops.lines().filter(ours).map(str::to_owned));
        let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
        let at = self.mounts.join(&self.vm).display().to_string();
        left.extend(
            mounts
                .lines()
                .filter(|line| line.contains(&at))
                .map(str::to_owned),
        );
        Ok(left)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let file = self.mounts.join(&self.vm);
        // The connection first, so that nothing of it waits.
        let _ = nix::mount::umount2(
            &file,
            nix::mount::MntFlags::MNT_FORCE | nix::mount::MntFlags::MNT_DETACH,
        );
        if let Ok(device) = std::fs::read_link(self.path()) {
            let _ = tool("losetup", &["--detach", &device.display().to_string()]);
            let _ = std::fs::remove_file(self.path());
        }
    }
}

fn tool(program: &str, args: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .args(args)
        .output()
        .with_context(|| format!("could not start {program}"))?;
    if !output.status.success() {
        bail!("{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// Runs a program beside the daemons.
async fn aside(program: &'static str, args: Vec<String>) -> Result<String> {
    tokio::task::spawn_blocking(move || {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        tool(program, &args)
    })
    .await?
}

/// The holders of a cluster's devices.
pub(crate) fn holders(cluster: &Cluster) -> Vec<nix::unistd::Pid> {
    let mut all = cluster.scratch().processes();
    all.retain(|pid| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).any(|word| word == b"holder")
    });
    all
}

async fn import(cluster: &Cluster) -> Result<Pattern> {
    let pattern = Pattern {
        seed: 7,
        bytes: BYTES,
    };
    let file = cluster.path().join("image.raw");
    pattern.write(&file)?;
    cluster.import(&file, IMAGE).await?;
    Ok(pattern)
}

#[test]
fn a_device_is_the_disk_and_gives_room_back() -> Result<()> {
    if !require(&NEEDS) {
        return Ok(());
    }
    with_cluster("device-whole", Machine::Shared, Plan::default(), is_the_disk)
}

async fn is_the_disk(cluster: &Cluster) -> Result<()> {
    let pattern = import(cluster).await?;
    let host = &cluster.hosts[0];
    let device = Device::new(host, "whole");
    let answer = host.agent().await?.create(device.request()).await?.into_inner();
    let disk = answer.disk.context("a disk")?;
    ensure!(disk.device == device.path().display().to_string(), "{disk:?}");
    ensure!(disk.url.starts_with("iscsi://"), "{disk:?}");
    let path = device.path();
    let content = tokio::task::spawn_blocking(move || std::fs::read(path)).await??;
    ensure!(content.len() as u64 == BYTES, "{} bytes", content.len());
    ensure!(
        pattern.first_wrong_block(0, &content).is_none(),
        "not the image's bytes"
    );

    let output = format!("of={}", device.path().display());
    let count = format!("count={WRITTEN_MIB}");
    let random = ["if=/dev/urandom", &output, "bs=1M", &count, "conv=fsync"];
    aside("dd", random.map(str::to_owned).to_vec()).await?;
    // Room that a file system gives back is the host's again.
    let full = delta_bytes(host, &device).await?;
    aside("blkdiscard", vec![device.path().display().to_string()]).await?;
    let empty = delta_bytes(host, &device).await?;
    ensure!(
        full > u64::from(WRITTEN_MIB) << 20 && empty < 1 << 20,
        "{full} bytes, then {empty}"
    );

    let destroy = || v1::DestroyRequest {
        vm: device.vm.clone(),
        instance_only: false,
    };
    host.agent().await?.destroy(destroy()).await?;
    device.is_gone().await?;
    wait_until(SOON, "the holder to end", || async {
        Ok(holders(cluster).is_empty().then_some(()))
    })
    .await?;
    Ok(())
}

#[test]
fn a_device_in_use_stays_and_one_whose_holder_died_is_made_again() -> Result<()> {
    if !require(&NEEDS) {
        return Ok(());
    }
    with_cluster(
        "device-in-use",
        Machine::Shared,
        Plan::default(),
        in_use_and_without_holder,
    )
}

async fn in_use_and_without_holder(cluster: &Cluster) -> Result<()> {
    import(cluster).await?;
    let host = &cluster.hosts[0];
    let device = Device::new(host, "held");
    let create = v1::CreateRequest {
        device: false,
        limit_bytes: None,
        ..device.request()
    };
    let disk = host.agent().await?.create(create).await?.into_inner().disk;
    ensure!(disk.is_some_and(|disk| disk.device.is_empty()), "not asked for");
    // A disk that is there becomes a device, too; asked twice, it is the same.
    for _ in 0..2 {
        host.agent().await?.create(device.request()).await?;
    }
    aside(
        "mkfs.ext4",
        vec!["-q".into(), device.path().display().to_string()],
    )
    .await?;
    let at = cluster.path().join("mounted");
    std::fs::create_dir(&at)?;
    let place = [device.path().display().to_string(), at.display().to_string()];
    let mount = async || -> Result<Mounted> {
        aside("mount", place.to_vec()).await?;
        Ok(Mounted(at.clone()))
    };
    let mounted = mount().await?;
    let destroy = || v1::DestroyRequest {
        vm: device.vm.clone(),
        instance_only: false,
    };
    let refused = host.agent().await?.destroy(destroy()).await;
    let refused = refused.err().context("a device in use was destroyed")?;
    ensure!(refused.message().contains("in use"), "{refused}");
    let text = "still here";
    std::fs::write(at.join("file"), text)?;
    drop(mounted);
    // What was refused is not done later, either.
    host.kill()?;
    cluster.restart(host).await?;
    let mounted = mount().await?;
    ensure!(std::fs::read_to_string(at.join("file"))? == text);
    drop(mounted);

    host.agent().await?.destroy(destroy()).await?;
    device.is_gone().await?;

    // Agent and holder are both dead, as after an accident: what is left is made anew.
    host.agent().await?.create(device.request()).await?;
    host.kill()?;
    for pid in holders(cluster) {
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL)?;
    }
    cluster.restart(host).await?;
    let path = device.path();
    let read = tokio::task::spawn_blocking(move || std::fs::read(path)).await??;
    ensure!(read.len() as u64 == BYTES);
    host.agent().await?.destroy(destroy()).await?;
    device.is_gone().await?;
    Ok(())
}

#[test]
fn a_device_in_use_keeps_its_vm_on_its_host_and_moves_with_it_when_it_is_free() -> Result<()> {
    if !require(&NEEDS) {
        return Ok(());
    }
    let plan = Plan {
        hosts: 2,
        ..Plan::default()
    };
    with_cluster("device-moves", Machine::Shared, plan, async |cluster| {
        import(cluster).await?;
        let (here, there) = (&cluster.hosts[0], &cluster.hosts[1]);
        let (device, moved) = (Device::new(here, "moves"), Device::new(there, "moves"));
        here.agent().await?.create(device.request()).await?;
        let path = device.path();
        let text = b"written here".repeat(4096);
        let file = std::fs::OpenOptions::new()
            .write(true)
            .custom_flags(nix::libc::O_EXCL)
            .open(&path)?;
        let args = ["migrate", &device.vm, "--to", "h2"];
        let refused = cluster.treeboot_output(&args).await?;
        let words = String::from_utf8_lossy(&refused.stderr);
        ensure!(!refused.status.success() && words.contains("in use"), "{words}");
        let expected = text.clone();
        tokio::task::spawn_blocking(move || {
            file.write_all_at(&expected, 8192)?;
            file.sync_all()
        })
        .await??;
        let told = cluster.treeboot(&args).await?;
        ensure!(told.contains("moved") && !told.contains("not all"), "{told}");
        let (path, bytes) = (moved.path(), text.len());
        let read = tokio::task::spawn_blocking(move || {
            let mut read = vec![0; bytes];
            let file = std::fs::File::open(path)?;
            file.read_exact_at(&mut read, 8192)?;
            std::io::Result::Ok(read)
        });
        ensure!(read.await?? == text, "the device there holds something else");
        let destroy = v1::DestroyRequest {
            vm: moved.vm.clone(),
            instance_only: false,
        };
        there.agent().await?.destroy(destroy).await?;
        moved.is_gone().await?;
        device.is_gone().await
    })
}

/// A mounted file system.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::empty());
    }
}

async fn delta_bytes(host: &Daemon, device: &Device) -> Result<u64> {
    let disks = host
        .agent()
        .await?
        .list(v1::ListRequest {})
        .await?
        .into_inner()
        .disks;
    let disk = disks.into_iter().find(|disk| disk.vm == device.vm);
    Ok(disk.context("the disk is not listed")?.delta_bytes)
}
