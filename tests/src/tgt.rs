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
const READY_WITHIN: Duration = Duration::from_secs(10);

/// A running tgtd with one target, whose LUN 1 is a raw file.
#[derive(Debug)]
pub struct Tgt {
    child: Child,
    portal: SocketAddr,
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
        let folder = scratch.path().join(name);
        fs::create_dir_all(&folder)?;
        // It cannot choose a port by itself, so one that was free a moment ago.
        let portal = TcpListener::bind((address, 0))?.local_addr()?;
        let socket = folder.join("control");
        let log = fs::File::create(folder.join("tgtd.log"))?;
        let child = scratch
            .command("tgtd")
            .args(["--foreground", "--iscsi"])
            .arg(format!("portal={portal}"))
            .env("TGT_IPC_SOCKET", &socket)
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("could not start tgtd (apt-get install tgt)")?;
        let mut tgt = Self {
            child,
            portal,
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
        admin(&format!(
            "--mode target --op new --tid 1 --targetname {}",
            tgt.target
        ))?;
        admin(&format!(
            "--mode logicalunit --op new --tid 1 --lun 1 --backing-store {}",
            file.display()
        ))?;
        if read_only {
            admin("--mode logicalunit --op update --tid 1 --lun 1 --params readonly=1")?;
        }
        admin("--mode target --op bind --tid 1 --initiator-address ALL")?;
        Ok(tgt)
    }

    /// The disk's URL.
    #[must_use]
    pub fn url(&self) -> String {
        format!("iscsi://{}/{}/1", self.portal, self.target)
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
