//! A real Linux kernel as an ordinary process: user-mode Linux (Debian's `user-mode-linux`), which carries iscsi_tcp, dm, LIO and bcache as
//! modules. The guest sees the machine's files through hostfs, read-only beneath an overlay of its own, so that nothing is copied in
//! and nothing it writes stays; its only link is a tap on the bridge of a [`Network`].
//!
//! A guest runs one shell script as root and halts. What the script prints is the guest's console, and the way to wait for it.

use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::need::Need;
use crate::network::Network;
use crate::scratch::Scratch;
use crate::wait::wait_until;

/// What a test that runs such guests asks of the machine.
pub const NEEDS: [Need; 2] = [Need::Root, Need::Program("linux.uml", "user-mode-linux")];

/// From the start of the process to the first line of the script; 3 s on an idle machine.
const BOOTS_WITHIN: Duration = Duration::from_secs(60);

/// The guests' addresses count from here, above those of a network's hosts.
const FIRST_ADDRESS: u8 = 200;

/// Printed around the script's output.
const BEGIN: &str = "UML-BEGIN";
const EXIT: &str = "UML-EXIT";

/// A guest: starting, running or halted.
#[derive(Debug)]
pub struct Guest {
    child: Child,
    console: PathBuf,
    /// Its address on the network's bridge.
    pub address: IpAddr,
}

/// What a guest is made of.
#[derive(Debug, Clone)]
pub struct GuestSpec<'a> {
    /// A short name, for its console's file.
    pub name: &'a str,
    /// In MiB.
    pub memory_mib: u32,
    /// Kernel modules to load before the script, without `.ko`.
    pub modules: &'a [&'a str],
    /// What to run, for `/bin/sh -eu`.
    pub script: &'a str,
}

impl Guest {
    /// Starts a guest on the network's bridge and waits until its script begins.
    ///
    /// # Errors
    /// It cannot be started, or its script did not begin in time; the error holds the end of its console.
    pub async fn start(scratch: &Scratch, network: &Network, spec: &GuestSpec<'_>) -> Result<Self> {
        static COUNT: AtomicU8 = AtomicU8::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed) % 50;
        let address = IpAddr::V4(Ipv4Addr::new(10, 0, 0, FIRST_ADDRESS + count));
        let folder = scratch.path().join(format!("uml-{}-{count}", spec.name));
        fs::create_dir_all(&folder)?;
        let tap = network.add_tap(usize::from(count))?;
        fs::write(folder.join("script.sh"), spec.script)?;
        let init = folder.join("init.sh");
        fs::write(
            &init,
            init_script(&folder.display().to_string(), address, spec.modules),
        )?;
        fs::set_permissions(&init, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        let console = folder.join("console.log");
        let output = File::create(&console)?;
        let child = scratch
            .command("ip")
            .args([
                "netns",
                "exec",
                network.hub_namespace(),
                "linux.uml",
                "rootfstype=hostfs",
                "rootflags=/",
                "ro",
                "quiet",
            ])
            .arg(format!("mem={}M", spec.memory_mib))
            .arg(format!("init={}", init.display()))
            .arg(format!("uml_dir={}/", folder.display()))
            .arg("umid=guest")
            .args(["con=null", "con0=null,fd:1"])
            .arg(format!("vec0:transport=tap,ifname={tap},depth=128,gro=1"))
            .stdout(output.try_clone()?)
            .stderr(Stdio::from(output))
            .spawn()
            .context("could not start linux.uml (apt-get install user-mode-linux)")?;
        let mut guest = Self {
            child,
            console,
            address,
        };
        guest.wait_for(BEGIN, BOOTS_WITHIN).await?;
        Ok(guest)
    }

    /// All that the guest has printed.
    #[must_use]
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.console).unwrap_or_default()).into_owned()
    }

    /// Waits for a line that holds `text`.
    ///
    /// # Errors
    /// It did not come in time, or the guest ended without it; the error holds the end of the console.
    pub async fn wait_for(&mut self, text: &str, limit: Duration) -> Result<()> {
        let seen = wait_until(limit, &format!("'{text}' on the guest's console"), || {
            let ended = self.child.try_wait();
            let found = self.output().lines().any(|line| line.contains(text));
            async move {
                match (found, ended?) {
                    (true, _) => Ok(Some(())),
                    (false, Some(status)) => bail!("the guest ended with {status}"),
                    (false, None) => Ok(None),
                }
            }
        })
        .await;
        seen.with_context(|| format!("the guest's console ends with:\n{}", self.console_end()))
    }

    /// Waits until the script has ended well and the guest has halted; gives all that was printed.
    ///
    /// # Errors
    /// The script failed, or did not end in time; the error holds the end of the console.
    pub async fn finish(mut self, limit: Duration) -> Result<String> {
        self.wait_for(EXIT, limit).await?;
        let output = self.output();
        if !output.lines().any(|line| line.trim_end() == format!("{EXIT} 0")) {
            bail!(
                "the guest's script failed; its console ends with:\n{}",
                self.console_end()
            );
        }
        let halted: Result<ExitStatus> = wait_until(BOOTS_WITHIN, "the guest to halt", || {
            let ended = self.child.try_wait();
            async move { Ok(ended?) }
        })
        .await;
        halted?;
        Ok(output)
    }

    fn console_end(&self) -> String {
        let output = self.output();
        let lines: Vec<&str> = output.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Its helper processes carry the scratch folder's mark and are ended with it; this ends the kernel itself at once.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The guest's first process: an overlay over the machine's files, the kernel's file systems, the modules, the link; then the script.
fn init_script(folder: &str, address: IpAddr, modules: &[&str]) -> String {
    format!(
        r#"#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
if [ "${{1-}}" != inside ]; then
    mount -n -t tmpfs overlay /mnt
    mkdir /mnt/upper /mnt/work /mnt/root
    insmod /usr/lib/uml/modules/$(uname -r)/kernel/fs/overlayfs/overlay.ko
    mount -n -t overlay overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work /mnt/root
    exec chroot /mnt/root /bin/sh {folder}/init.sh inside
fi
mount -n -t proc proc /proc
mount -n -t sysfs sys /sys
mount -n -t devtmpfs dev /dev
mount -n -t tmpfs run /run
mkdir -p /run/lock /lib/modules
ln -sfn /usr/lib/uml/modules/$(uname -r) /lib/modules/$(uname -r)
for module in {modules}; do modprobe $module || echo "no module $module"; done
ip link set lo up
ip link set vec0 up
ip addr add {address}/24 dev vec0
echo {BEGIN}
/bin/sh -eu {folder}/script.sh
echo {EXIT} $?
halt -f
"#,
        modules = modules.join(" "),
    )
}
