//! A host's cache on devices of their own, of which the one fails that holds what a guest reads again and again.

use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use treeboot_tests::cluster::Cluster;
use treeboot_tests::daemon::Daemon;
use treeboot_tests::wait::wait_until;

use super::{Endurance, SOON};
use crate::cache::{await_failure, cache, divide};
use crate::room;

/// Of the 64 MiB that each device has. What one loses the other has room for, and two of them hold all of QEMU's image.
const BUDGET_MIB: u64 = 52;
/// ext4's own ioctl that makes its file system one whose device is gone: neither reads nor writes (`EXT4_IOC_SHUTDOWN`, without a last flush of its journal).
const FAIL: &str = r#"open(my $at, "<", $ARGV[0]) or die "open: $!"; my $how = pack("L", 2); ioctl($at, 0x8004587d, $how) or die "ioctl: $!";"#;

/// What a guest reads again and again: within one segment, so that one device has it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Part {
    pub(super) offset: u64,
    pub(super) bytes: usize,
}

impl Part {
    fn read(self, file: &Path) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.bytes];
        let file = std::fs::File::open(file)?;
        file.read_exact_at(&mut bytes, self.offset)?;
        Ok(bytes)
    }

    /// Where an image has blocks that no hole looks like.
    pub(super) fn of_content(image: &Path, bytes: usize) -> Result<Self> {
        let length = std::fs::metadata(image)?.len();
        let parts = (0..length / bytes as u64).map(|number| Self {
            offset: number * bytes as u64,
            bytes,
        });
        // What comes first is the file system's own.
        for part in parts.skip(8) {
            let read = part.read(image)?;
            if read.chunks(4096).all(|page| page.iter().any(|byte| *byte != 0)) {
                return Ok(part);
            }
        }
        bail!("the image is empty")
    }
}

/// The devices: two are members, and as often as one fails the next takes its place.
pub(super) struct Devices<'a> {
    cluster: &'a Cluster,
    host: &'a Daemon,
    members: Vec<PathBuf>,
    spare: Vec<PathBuf>,
    part: Part,
    expected: Vec<u8>,
}

impl<'a> Devices<'a> {
    /// Before the agent starts: it has a view of the machine's mounts of its own.
    pub(super) fn mount(cluster: &'a Cluster, losses: u32) -> Result<Self> {
        let host = &cluster.hosts[1];
        let mut members = Vec::new();
        for number in 0..losses + 2 {
            let name = format!("cache-{number}");
            let at = host.folder().join(&name);
            room::small(&cluster.path().join(name).with_extension("img"), &at)?;
            members.push(at);
        }
        let spare = members.split_off(2);
        Ok(Self {
            cluster,
            host,
            members,
            spare,
            part: Part::default(),
            expected: Vec::new(),
        })
    }

    /// The cache is on them from now on; this part of the image is looked for there.
    pub(super) async fn begin(&mut self, image: &Path, part: Part) -> Result<()> {
        self.part = part;
        self.expected = part.read(image)?;
        let members: Vec<_> = self.members.iter().map(|at| (at.as_path(), BUDGET_MIB)).collect();
        divide(self.cluster, self.host, &members).await
    }

    /// The devices that have all of the part.
    fn holding(&self) -> Vec<PathBuf> {
        let holds = |member: &&PathBuf| {
            let images = std::fs::read_dir(member).into_iter().flatten().flatten();
            let mut files = images.map(|image| image.path().join("data"));
            files.any(|file| self.part.read(&file).is_ok_and(|read| read == self.expected))
        };
        self.members.iter().filter(holds).cloned().collect()
    }

    /// The one fails that has the part; gives the other one.
    async fn fail(&self) -> Result<(PathBuf, PathBuf)> {
        let [lost] = &self.holding()[..] else {
            bail!("{:?} hold what is read, and not one", self.holding());
        };
        let other = self.members.iter().find(|member| *member != lost);
        let other = other.context("there are two")?.clone();
        let output = Command::new("perl").args(["-e", FAIL]).arg(lost).output()?;
        let words = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "the device does not fail: {words}");
        await_failure(self.host, lost).await?;
        Ok((lost.clone(), other))
    }

    /// Another one takes the place of the one that failed.
    async fn replace(&mut self, lost: &Path) -> Result<()> {
        let next = self.spare.pop().context("no device is left")?;
        cache(self.cluster, self.host, "remove", &lost.display().to_string()).await?;
        let member = format!("{}={BUDGET_MIB}M", next.display());
        cache(self.cluster, self.host, "add", &member).await?;
        self.members.retain(|member| member != lost);
        self.members.push(next);
        Ok(())
    }
}

impl Endurance<'_> {
    /// Each time the device fails that has what is read again and again; `again`: how often it was.
    pub(super) async fn lost_caches(
        &self,
        times: u32,
        devices: &mut Devices<'_>,
        again: impl Fn() -> Result<u64>,
    ) -> Result<()> {
        wait_until(SOON, "a device to have what is read", async || {
            Ok((!devices.holding().is_empty()).then_some(()))
        })
        .await?;
        self.rounds("a cache device lost, another given", times, async || {
            let (lost, other) = devices.fail().await?;
            let before = again()?;
            // The first of them may have begun before.
            wait_until(SOON, "the part to be read again", async || {
                Ok((again()? >= before + 2).then_some(()))
            })
            .await?;
            wait_until(SOON, "the other device to have it", async || {
                Ok(devices.holding().contains(&other).then_some(()))
            })
            .await?;
            devices.replace(&lost).await
        })
        .await
    }
}
