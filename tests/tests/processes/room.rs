//! No room for a VM's writes: it stands still until there is, and sees nothing of it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use treeboot_proto::v1;
use treeboot_tests::cluster::{Cluster, Plan};
use treeboot_tests::need::{Need, require};
use treeboot_tests::wait::wait_until;
use treeboot_tests::{fleet, guest};

use crate::support::{Machine, mount, on_own_thread};

const NEEDS: [Need; 2] = [Need::Root, Need::Program("mkfs.ext4", "e2fsprogs")];
const IMAGE: &str = "busybox";
const DISK_MIB: u64 = 64;
/// What is left of the file system at first: less than a guest writes.
const LEFT_MIB: u64 = 12;
const WRITTEN: &str = "write_mb=24";
/// Under emulation, beside other tests.
const SOON: Duration = Duration::from_secs(100);

/// A small file system at a folder.
pub(crate) fn small(image: &Path, at: &Path) -> Result<()> {
    std::fs::File::create(image)?.set_len(DISK_MIB << 20)?;
    let made = Command::new("mkfs.ext4")
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .args(["-q", "-m0"])
        .arg(image)
        .status()?;
    ensure!(made.success(), "mkfs.ext4 ended with {made}");
    mount(&["-o".as_ref(), "loop".as_ref(), image.as_os_str()], at)
}

/// A file that takes a file system's room.
pub(crate) struct Hog {
    path: PathBuf,
    file: std::fs::File,
}

impl Hog {
    pub(crate) fn new(small: &Path) -> Result<Self> {
        let path = small.join("hog");
        let file = std::fs::File::create(&path)?;
        Ok(Self { path, file })
    }

    /// Takes all that there is but so many bytes; says whether there was anything to take.
    fn take_all_but(&self, left: u64) -> Result<bool> {
        let room = nix::sys::statvfs::fstatvfs(&self.file)?;
        let free = room.blocks_available() * room.fragment_size();
        let Some(bytes) = free.checked_sub(left).filter(|bytes| *bytes > 0) else {
            return Ok(false);
        };
        let bytes = self.file.metadata()?.len() + bytes;
        let flags = nix::fcntl::FallocateFlags::empty();
        match nix::fcntl::fallocate(&self.file, flags, 0, i64::try_from(bytes)?) {
            // Somebody else took it first, or it is kept for the file system's own tables.
            Err(nix::errno::Errno::ENOSPC) => Ok(false),
            other => Ok(other.map(|()| true)?),
        }
    }

    pub(crate) fn take_all(&self) -> Result<bool> {
        self.take_all_but(0)
    }

    pub(crate) fn remove(self) -> Result<()> {
        Ok(std::fs::remove_file(self.path)?)
    }
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
        small(&cluster.path().join("small.img"), &deltas)?;
        cluster.coordinator.start(cluster.scratch()).await?;
        cluster.start_agents().await?;
        cluster.import(&file, IMAGE).await?;
        stands_still(&cluster, &deltas).await?;
        cluster.pass();
        Ok(())
    })
}

async fn stands_still(cluster: &Cluster, small: &Path) -> Result<()> {
    let host = &cluster.hosts[0];
    let hog = Hog::new(small)?;
    hog.take_all_but(LEFT_MIB << 20)?;
    let order = guest::order_with_jobs("full", IMAGE, &[WRITTEN, "verify_mb=24"]);
    fleet::start(host, &order).await?;
    fleet::await_paused(host, &order.vm, SOON).await?;
    let told = wait_until(SOON, "its host to say so", || async {
        let status = host.agent().await?.status(v1::StatusRequest {}).await?;
        let level = status.into_inner().room.map(|room| room.level());
        Ok((level == Some(v1::RoomLevel::Full)).then_some(()))
    });
    told.await?;
    // Its agent's end changes nothing.
    host.kill()?;
    host.start(cluster.scratch()).await?;
    fleet::await_paused(host, &order.vm, SOON).await?;
    let console = guest::console(&fleet::describe(host, &order.vm).await?)?;
    ensure!(!console.contains("wrote"), "there was room: {console}");
    hog.remove()?;
    let vm = fleet::await_ready(host, &order.vm, SOON).await?;
    let console = guest::console(&vm)?;
    ensure!(
        console.contains("wrote 24 MiB") && console.contains("verified 24 MiB"),
        "{console}"
    );
    ensure!(!vm.paused && vm.pauses > 0, "{vm:?}");
    guest::check_no_errors(&vm)
}
