//! `tgtd`, the target that people have today: as a foreign origin, and as the peer of benches. Needs root (it locks its memory).

use std::fs;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::scratch::Scratch;
use crate::wait::wait_until;

/// From its start to its first answer.
const READY_WITHIN: Duration = Duration::from_secs(60);

/// How tgtd serves a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Disk {
    /// Write-protected.
    pub read_only: bool,
    /// Thin: it says that it gives space back.
    pub thin: bool,
    /// Logical block in bytes.
    pub block_bytes: u32,
    /// How many portals.
    pub portals: usize,
}

impl Default for Disk {
    fn default() -> Self {
        Self {
            read_only: false,
            thin: false,
            block_bytes: 512,
            portals: 1,
        }
    }
}

/// A running tgtd with one target, whose LUN 1 is a raw file.
#[derive(Debug)]
pub struct Tgt {
    child: Child,
    portals: Vec<SocketAddr>,
    target: String,
}

impl Tgt {
    /// Serves a raw file, write-protected where `read_only`.
    ///
    /// `name` tells it from others in the same scratch folder.
    ///
    /// # Errors
    /// It did not start, or refused the file.
    pub async fn serve(
        scratch: &Scratch,
        name: &str,
        address: IpAddr,
        file: &Path,
        read_only: bool,
    ) -> Result<Self> {
        let disk = Disk {
            read_only,
            ..Disk::default()
        };
        Self::serve_disk(scratch, name, address, file, disk).await
    }

    /// Serves a raw file as a disk of these properties.
    ///
    /// # Errors
    /// As [`Tgt::serve`].
    pub async fn serve_disk(
        scratch: &Scratch,
        name: &str,
        address: IpAddr,
        file: &Path,
        disk: Disk,
    ) -> Result<Self> {
        let folder = scratch.path().join(name);
        fs::create_dir_all(&folder)?;
        // It cannot choose a port by itself, so one that was free a moment ago.
        let free: Vec<TcpListener> = (0..disk.portals.max(1))
            .map(|_| TcpListener::bind((address, 0)))
            .collect::<std::io::Result<_>>()?;
        let portals: Vec<SocketAddr> = free
            .iter()
            .map(TcpListener::local_addr)
            .collect::<std::io::Result<_>>()?;
        drop(free);
        let socket = folder.join("control");
        let log = fs::File::create(folder.join("tgtd.log"))?;
        let child = scratch
            .command("tgtd")
            .args(["--foreground", "--iscsi"])
            .arg(format!("portal={}", portals[0]))
            .env("TGT_IPC_SOCKET", &socket)
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("could not start tgtd (apt-get install tgt)")?;
        let mut tgt = Self {
            child,
            portals: portals.clone(),
            target: format!("iqn.2026-11.org.example:{name}"),
        };
        let admin = |arguments: &str| -> Result<()> {
            let output = Command::new("tgtadm")
                .args(["--lld", "iscsi"])
                .args(arguments.split(' '))
                .env("TGT_IPC_SOCKET", &socket)
                .output()
                .context("could not start tgtadm")?;
            if !output.status.success() {
                bail!(
                    "tgtadm {arguments}: {}",
                    String::from_utf8_lossy(&output.stderr).trim()
                );
            }
            Ok(())
        };
        wait_until(READY_WITHIN, "tgtd to answer", async || {
            if let Some(status) = tgt.child.try_wait()? {
                bail!("tgtd ended with {status}");
            }
            Ok(admin("--mode target --op show").is_ok().then_some(()))
        })
        .await?;
        for portal in portals.iter().skip(1) {
            admin(&format!("--mode portal --op new --param portal={portal}"))?;
        }
        admin(&format!(
            "--mode target --op new --tid 1 --targetname {}",
            tgt.target
        ))?;
        admin(&format!(
            "--mode logicalunit --op new --tid 1 --lun 1 --blocksize {} --backing-store {}",
            disk.block_bytes,
            file.display()
        ))?;
        if disk.thin {
            admin("--mode logicalunit --op update --tid 1 --lun 1 --params thin_provisioning=1")?;
        }
        if disk.read_only {
            admin("--mode logicalunit --op update --tid 1 --lun 1 --params readonly=1")?;
        }
        admin("--mode target --op bind --tid 1 --initiator-address ALL")?;
        Ok(tgt)
    }

    /// The disk's URL.
    #[must_use]
    pub fn url(&self) -> String {
        self.url_at(self.portals[0])
    }

    /// The disk's URL by each of its portals.
    #[must_use]
    pub fn urls(&self) -> Vec<String> {
        self.portals.iter().map(|portal| self.url_at(*portal)).collect()
    }

    fn url_at(&self, portal: SocketAddr) -> String {
        format!("iscsi://{portal}/{}/1", self.target)
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its end without warning.
    ///
    /// # Errors
    /// It had ended already.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}
