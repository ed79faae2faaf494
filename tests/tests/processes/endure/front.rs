//! The front ends by which somebody writes to a VM's disk while others die.

use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use treeboot_proto::v1;
use treeboot_tests::cluster::Cluster;
use treeboot_tests::uml::{Guest, GuestSpec};
use treeboot_tests::wait::wait_until;
use treeboot_types::IscsiUrl;

use super::pauses::{AWK, LEAST_MS};
use super::{SOON, Sizes};

const SCRIPT: &str = include_str!("script.sh");
/// Writes and reads a second: often enough to see a pause of milliseconds, seldom enough for a guest in user mode.
const WRITES_PER_S: u32 = 300;
const READS_PER_S: u32 = 128;
/// For the rest of a pass, and for comparing the base.
const ENDS_WITHIN: Duration = Duration::from_secs(300);

/// In a guest: starts the kernel's initiator and logs in; `DISK` is then the block device.
const LOG_IN: &str = r#"
mkdir -p /etc/iscsi /tmp/host /tmp/work
mount -t hostfs -o "$FOLDER" none /tmp/host
echo "InitiatorName=$INITIATOR" > /etc/iscsi/initiatorname.iscsi
iscsid
node() { iscsiadm -m node -T "$TARGET" -p "$PORTAL" "$@"; }
node -o new
node -o update -n node.session.timeo.replacement_timeout -v 120
node -o update -n node.session.auth.authmethod -v CHAP
node -o update -n node.session.auth.username -v "$CHAP_USER"
node -o update -n node.session.auth.password -v "$CHAP_SECRET"
node --login
for try in $(seq 200); do
    disk=$(ls /sys/class/iscsi_session/session*/device/target*/*/block 2>/dev/null || true)
    if [ -n "$disk" ] && [ -b "/dev/$disk" ]; then break; fi
    sleep 0.1
done
DISK=/dev/$disk
STOP=/tmp/host/stop
AGAIN=/tmp/host/again
cd /tmp/work
"#;

/// Somebody who writes and reads until he is told to stop.
pub(super) enum Writer {
    /// On this host, through the block device.
    Here {
        child: Child,
        output: PathBuf,
        stop: PathBuf,
    },
    /// A kernel of its own, through its own initiator.
    Guest { guest: Guest, stop: PathBuf },
}

fn variables(cluster: &Cluster, sizes: Sizes) -> String {
    format!(
        "LEAST={LEAST_MS}\nWRITES={WRITES_PER_S}\nREADS={READS_PER_S}\nWRITTEN={}\nBYTES={}\nIMAGE='{}'\nAWK='{AWK}'\n",
        sizes.written,
        sizes.bytes(),
        cluster.path().join("image.raw").display()
    )
}

fn folder(cluster: &Cluster) -> PathBuf {
    cluster.path().join("writer")
}

impl Writer {
    pub(super) fn here(cluster: &Cluster, sizes: Sizes, device: &Path) -> Result<Self> {
        let folder = folder(cluster);
        std::fs::create_dir(&folder)?;
        let (stop, output) = (folder.join("stop"), folder.join("output.log"));
        let script = folder.join("script.sh");
        let text = format!(
            "{}DISK='{}'\nSTOP='{}'\nAGAIN=again\n{SCRIPT}",
            variables(cluster, sizes),
            device.display(),
            stop.display()
        );
        std::fs::write(&script, text)?;
        let log = std::fs::File::create(&output)?;
        let child = cluster
            .scratch()
            .command("sh")
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .arg("-eu")
            .arg(&script)
            .current_dir(&folder)
            .stdout(log.try_clone()?)
            .stderr(Stdio::from(log))
            .spawn()?;
        Ok(Self::Here { child, output, stop })
    }

    pub(super) async fn guest(cluster: &Cluster, sizes: Sizes, created: &v1::CreateResponse) -> Result<Self> {
        let disk = created.disk.as_ref().context("an answer without the disk")?;
        let secret = created.secret.as_ref().context("an answer without the secret")?;
        let url: IscsiUrl = disk.url.parse()?;
        let folder = folder(cluster);
        std::fs::create_dir(&folder)?;
        let script = format!(
            "{}FOLDER='{}'\nINITIATOR='{}'\nTARGET='{}'\nPORTAL='{}'\nCHAP_USER='{}'\nCHAP_SECRET='{}'\n{LOG_IN}{SCRIPT}",
            variables(cluster, sizes),
            folder.display(),
            disk.initiator,
            url.target,
            url.portal(),
            secret.user,
            secret.secret
        );
        let network = cluster.network.as_ref().context("hosts have links")?;
        let spec = GuestSpec {
            name: "writer",
            memory_mib: 256,
            modules: &["iscsi_tcp", "sd_mod", "crc32c_generic"],
            disk_bytes: None,
            script: &script,
        };
        Ok(Self::Guest {
            guest: Guest::start(cluster.scratch(), network, &spec).await?,
            stop: folder.join("stop"),
        })
    }

    /// How often it has read the first MiB of the base.
    pub(super) fn read_again(cluster: &Cluster) -> Result<u64> {
        let text = std::fs::read_to_string(folder(cluster).join("again"));
        text.map_or(Ok(0), |text| Ok(text.trim().parse()?))
    }

    /// Lets it come to its end; gives what it printed.
    ///
    /// # Errors
    /// It met an error, or bytes that are not those it wrote or the image's.
    pub(super) async fn finish(self) -> Result<String> {
        let output = match self {
            Self::Guest { guest, stop } => {
                std::fs::write(stop, "")?;
                guest.finish(ENDS_WITHIN).await?
            }
            Self::Here {
                mut child,
                output,
                stop,
            } => {
                std::fs::write(stop, "")?;
                let ended = wait_until(ENDS_WITHIN, "the writer to end", async || Ok(child.try_wait()?));
                let status = ended.await?;
                let text = std::fs::read_to_string(&output)?;
                ensure!(status.success(), "the writer ended with {status}: {text}");
                text
            }
        };
        ensure!(output.contains("WELL after"), "{output}");
        Ok(output)
    }

    /// # Errors
    /// It has ended: it met an error.
    pub(super) fn is_at_work(&mut self) -> Result<()> {
        if let Self::Here { child, output, .. } = self
            && let Some(status) = child.try_wait()?
        {
            bail!(
                "the writer ended with {status}: {}",
                std::fs::read_to_string(output)?
            );
        }
        Ok(())
    }

    /// Until it is at work for the first time.
    pub(super) async fn begins(&mut self, progress: impl Fn() -> Result<u64>) -> Result<()> {
        let before = progress()?;
        wait_until(SOON, "the writer to begin", async || {
            self.is_at_work()?;
            Ok((progress()? != before).then_some(()))
        })
        .await
    }
}
