//! No room for a VM's writes: it stands still until there is, and sees nothing of it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use treeboot_proto::v1;
use treeboot_tests::cluster::{Cluster, Plan};
use treeboot_tests::need::{Need, require};
use treeboot_tests::wait::wait_until;
use treeboot_tests::{fleet, guest};

use crate::support::{Machine, on_own_thread};

const NEEDS: [Need; 2] = [Need::Root, Need::Program("mkfs.ext4", "e2fsprogs")];
const IMAGE: &str = "busybox";
const DISK_MIB: u64 = 64;
/// What is left of the file system at first: less than a guest writes.
const LEFT_MIB: u64 = 12;
const WRITTEN: &str = "write_mb=24";
/// Under emulation, beside other tests.
const SOON: Duration = Duration::from_secs(100);

/// A small file system of its own below a folder.
struct Small(PathBuf);

impl Small {
    fn mount(image: &Path, at: &Path) -> Result<Self> {
        std::fs::create_dir_all(at)?;
        std::fs::File::create(image)?.set_len(DISK_MIB << 20)?;
        tool("mkfs.ext4", &["-q".as_ref(), "-m0".as_ref(), image.as_os_str()])?;
        tool(
            "mount",
            &["-o".as_ref(), "loop".as_ref(), image.as_os_str(), at.as_os_str()],
        )?;
        Ok(Self(at.to_owned()))
    }

    fn free_bytes(&self) -> Result<u64> {
        let room = nix::sys::statvfs::statvfs(&self.0)?;
        Ok(room.blocks_available() * room.fragment_size())
    }

    /// Takes all of it but `left` bytes.
    fn fill(&self, left: u64) -> Result<PathBuf> {
        let hog = self.0.join("hog");
        let bytes = self
            .free_bytes()?
            .checked_sub(left)
            .context("it is smaller than that")?;
        let file = std::fs::File::create(&hog)?;
        nix::fcntl::fallocate(
            &file,
            nix::fcntl::FallocateFlags::empty(),
            0,
            i64::try_from(bytes)?,
        )?;
        Ok(hog)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

fn tool(program: &str, args: &[&std::ffi::OsStr]) -> Result<()> {
    let output = Command::new(program)
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .args(args)
        .output()
        .with_context(|| format!("could not start {program}"))?;
    if !output.status.success() {
        bail!("{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

#[test]
fn a_guest_on_a_full_disk_stands_still_and_goes_on_when_there_is_room() -> Result<()> {
    let (Some(file), true) = (guest::busybox(), require(&NEEDS)) else {
        return Ok(());
    };
    on_own_thread(Machine::Alone, async move || {
        let cluster = Cluster::prepare("room", &Plan::default())?;
        let host = &cluster.hosts[0];
        let deltas = host.folder().join("state/deltas");
        let small = Small::mount(&cluster.path().join("small.img"), &deltas)?;
        cluster.coordinator.start(cluster.scratch()).await?;
        cluster.start_agents().await?;
        cluster.import(&file, IMAGE).await?;
        stands_still(&cluster, &small).await?;
        host.terminate().await?;
        drop(small);
        cluster.pass();
        Ok(())
    })
}

async fn stands_still(cluster: &Cluster, small: &Small) -> Result<()> {
    let host = &cluster.hosts[0];
    let hog = small.fill(LEFT_MIB << 20)?;
    let order = guest::order_with_jobs("full", IMAGE, &[WRITTEN, "verify_mb=24"]);
    fleet::start(host, &order).await?;
    let stands_still = async || {
        let paused = wait_until(SOON, "the guest to stand still", || async {
            let vm = fleet::describe(host, &order.vm).await?;
            Ok(vm.paused.then_some(()))
        });
        paused.await
    };
    stands_still().await?;
    let status = host
        .agent()
        .await?
        .status(v1::StatusRequest {})
        .await?
        .into_inner();
    ensure!(
        status
            .room
            .is_some_and(|room| room.level() == v1::RoomLevel::Full),
        "{:?}",
        status.room
    );
    // Its agent's end changes nothing.
    host.kill()?;
    host.start(cluster.scratch()).await?;
    stands_still().await?;
    let console = guest::console(&fleet::describe(host, &order.vm).await?)?;
    ensure!(!console.contains("wrote"), "there was room: {console}");
    std::fs::remove_file(hog)?;
    let vm = fleet::await_ready(host, &order.vm, SOON).await?;
    let console = guest::console(&vm)?;
    ensure!(
        console.contains("wrote 24 MiB") && console.contains("verified 24 MiB"),
        "{console}"
    );
    ensure!(!vm.paused && vm.pauses > 0, "{vm:?}");
    guest::check_no_errors(&vm)
}
