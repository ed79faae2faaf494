//! A real Linux kernel as an ordinary process: user-mode Linux (Debian's `user-mode-linux`), which carries iscsi_tcp, dm, LIO and bcache as
//! modules. The guest sees the machine's files through hostfs, read-only beneath an overlay of its own, so that nothing is copied in.
//! What it writes is gone with it, or lies on a disk file of its own and is there at the next boot. Its only links are taps on the bridges
//! of a [`Network`].
//!
//! A [`Kernel`] is any such guest; a [`Guest`] is one that runs one shell script as root and halts. What the script prints is the guest's
//! console, and the way to wait for it.

use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use crate::need::Need;
use crate::network::Network;
use crate::scratch::Scratch;
use crate::wait::wait_until;

/// What a test that runs such guests asks of the machine.
pub const NEEDS: [Need; 4] = [
    Need::Root,
    Need::Program("linux.uml", "user-mode-linux"),
    Need::Program("modprobe", "kmod"),
    Need::Program("mkfs.ext4", "e2fsprogs"),
];

/// From the start of the process to the first line of the script; 3 s on an idle machine.
const BOOTS_WITHIN: Duration = Duration::from_secs(60);

/// The guests' addresses count from here, above those of a network's hosts.
const FIRST_ADDRESS: u8 = 200;

/// Printed around the script's output.
const BEGIN: &str = "UML-BEGIN";
const EXIT: &str = "UML-EXIT";

/// Where a guest finds its disk's file system.
pub const DISK_MOUNT: &str = "/mnt/disk";

/// A link of a guest: the tap it ends in, and the guest's own address on it (a network of 24 bits). The first is `vec0` inside.
#[derive(Debug, Clone)]
pub struct Link {
    /// The tap, in the namespace where the guest runs.
    pub tap: String,
    /// The guest's address.
    pub address: IpAddr,
}

impl Link {
    /// An address of its own that a reboot does not change: who knew the guest before would ask for the old one for seconds.
    fn mac(&self) -> String {
        let [a, b, c, d] = match self.address {
            IpAddr::V4(address) => address.octets(),
            IpAddr::V6(address) => {
                let [.., a, b, c, d] = address.octets();
                [a, b, c, d]
            }
        };
        // The second bit of the first byte: of nobody's making.
        format!("02:00:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
    }
}

/// How a kernel is started.
#[derive(Debug)]
pub struct Boot<'a> {
    /// A folder for its init script, console and sockets; kept from boot to boot.
    pub folder: &'a Path,
    /// The network namespace in which its taps are.
    pub namespace: &'a str,
    /// Its links.
    pub links: &'a [Link],
    /// In MiB.
    pub memory_mib: u32,
    /// A file with an ext4 file system ([`make_disk`]), which holds all that the guest writes; without it that lies in its memory.
    pub disk: Option<&'a Path>,
    /// What the guest calls itself.
    pub hostname: &'a str,
    /// Kernel modules to load before the script, without `.ko`.
    pub modules: &'a [&'a str],
    /// What to run, for `/bin/sh -eu`; the guest halts when it ends.
    pub script: &'a str,
}

impl Boot<'_> {
    /// Starts the kernel and does not wait.
    ///
    /// # Errors
    /// Its files cannot be written, or it cannot be started.
    pub fn start(&self, scratch: &Scratch) -> Result<Kernel> {
        fs::create_dir_all(self.folder)?;
        fs::write(self.folder.join("script.sh"), self.script)?;
        let init = self.folder.join("init.sh");
        fs::write(&init, self.init_script())?;
        fs::set_permissions(&init, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        let console = self.folder.join("console.log");
        let output = File::options().create(true).append(true).open(&console)?;
        let from = output.metadata()?.len();
        let mut command = scratch.command("ip");
        command
            .args([
                "netns",
                "exec",
                self.namespace,
                "linux.uml",
                "rootfstype=hostfs",
                "rootflags=/",
                "ro",
                "quiet",
            ])
            .arg(format!("mem={}M", self.memory_mib))
            .arg(format!("init={}", init.display()))
            // Beneath its working directory: a socket's path has at most 107 bytes.
            .args(["uml_dir=./", "umid=uml"])
            .current_dir(self.folder)
            .args(["con=null", "con0=null,fd:1"]);
        for (number, link) in self.links.iter().enumerate() {
            command.arg(format!(
                "vec{number}:transport=tap,ifname={},mac={},depth=128,gro=1",
                link.tap,
                link.mac()
            ));
        }
        if let Some(disk) = self.disk {
            command.arg(format!("ubda={}", disk.display()));
        }
        let child = command
            .stdout(output.try_clone()?)
            .stderr(Stdio::from(output))
            .spawn()
            .context("could not start linux.uml (apt-get install user-mode-linux)")?;
        Ok(Kernel { child, console, from })
    }

    /// The guest's first process: an overlay over the machine's files, the kernel's file systems, the modules, the links; then the script.
    fn init_script(&self) -> String {
        let folder = self.folder.display();
        let writes = match self.disk {
            Some(_) => "mount -n -t ext4 /dev/ubda /mnt/disk",
            None => ":",
        };
        let mut links = String::new();
        for (number, link) in self.links.iter().enumerate() {
            links += &format!(
                "ip link set vec{number} up\nip addr add {}/24 dev vec{number}\n",
                link.address
            );
        }
        format!(
            r#"#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
if [ "${{1-}}" != inside ]; then
    mount -n -t tmpfs overlay /mnt
    mkdir /mnt/disk /mnt/root
    insmod /usr/lib/uml/modules/$(uname -r)/kernel/fs/overlayfs/overlay.ko
    {writes}
    mkdir -p /mnt/disk/upper /mnt/disk/work
    mount -n -t overlay overlay -o lowerdir=/,upperdir=/mnt/disk/upper,workdir=/mnt/disk/work /mnt/root
    mkdir -p /mnt/root{DISK_MOUNT}
    mount -n --bind /mnt/disk /mnt/root{DISK_MOUNT}
    exec chroot /mnt/root /bin/sh {folder}/init.sh inside
fi
mount -n -t proc proc /proc
mount -n -t sysfs sys /sys
mount -n -t devtmpfs dev /dev
mkdir -p /dev/pts
mount -n -t devpts devpts /dev/pts
mount -n -t tmpfs run /run
mkdir -p /run/lock /lib/modules
ln -sfn /usr/lib/uml/modules/$(uname -r) /lib/modules/$(uname -r)
hostname {hostname}
modprobe -a {modules} || echo "some module is missing"
ip link set lo up
{links}echo {BEGIN}
/bin/sh -eu {folder}/script.sh
echo {EXIT} $?
sync
halt -f
"#,
            hostname = self.hostname,
            modules = match self.modules {
                [] => "loop".to_owned(),
                modules => modules.join(" "),
            },
        )
    }
}

/// Makes a guest's disk: a sparse file with an ext4 file system.
///
/// # Errors
/// The file cannot be made, or mkfs.ext4 failed.
pub fn make_disk(path: &Path, bytes: u64) -> Result<()> {
    File::create_new(path)
        .and_then(|file| file.set_len(bytes))
        .with_context(|| format!("could not make {}", path.display()))?;
    let output = std::process::Command::new("mkfs.ext4")
        .args(["-q", "-F", "-J", "size=8"])
        // Tables are written when they are needed, so that a file of gigabytes is made in milliseconds.
        .args(["-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard"])
        .arg(path)
        .env("PATH", with_sbin())
        .output()
        .context("could not start mkfs.ext4 (apt-get install e2fsprogs)")?;
    if !output.status.success() {
        bail!("mkfs.ext4: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// The PATH with the folders of the system's administration, which not everybody has on theirs.
fn with_sbin() -> String {
    format!(
        "{}:/usr/sbin:/sbin",
        std::env::var("PATH").unwrap_or_else(|_| "/usr/bin:/bin".into())
    )
}

/// A running or ended kernel. It is killed when dropped, unless [`Kernel::leave`] was called.
#[derive(Debug)]
pub struct Kernel {
    child: Child,
    console: PathBuf,
    /// Where this boot's output begins in the console.
    from: u64,
}

impl Kernel {
    /// All that this boot has printed.
    #[must_use]
    pub fn output(&self) -> String {
        let all = fs::read(&self.console).unwrap_or_default();
        let from = usize::try_from(self.from).unwrap_or(usize::MAX).min(all.len());
        String::from_utf8_lossy(&all[from..]).into_owned()
    }

    /// The end of what it has printed.
    #[must_use]
    pub fn console_end(&self) -> String {
        let output = self.output();
        let lines: Vec<&str> = output.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }

    /// The pid of the kernel's process, which is its process group too.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
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

    /// Waits until the kernel has halted.
    ///
    /// # Errors
    /// Not in time; the error holds the end of the console.
    pub async fn halted(&mut self, limit: Duration) -> Result<ExitStatus> {
        let halted = wait_until(limit, "the guest to halt", || {
            let ended = self.child.try_wait();
            async move { Ok(ended?) }
        })
        .await;
        let status =
            halted.with_context(|| format!("the guest's console ends with:\n{}", self.console_end()))?;
        // A kernel that halts leaves no process; one that died may leave those that did its I/O.
        self.kill();
        Ok(status)
    }

    /// Whether its process lives.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// The power cut: all of the kernel's processes end at once, those that write its disk too.
    pub fn kill(&mut self) {
        if let Ok(group) = i32::try_from(self.child.id()) {
            let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Stops the kernel's time: it neither runs nor answers, and its connections stay.
    ///
    /// # Errors
    /// It is not running.
    pub fn freeze(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    /// Undoes [`Kernel::freeze`].
    ///
    /// # Errors
    /// It is not running.
    pub fn thaw(&self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    /// To the kernel alone: what it runs as processes it traces, and would take the signal for theirs.
    fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).context("a pid fits")?;
        kill(Pid::from_raw(pid), signal).context("the guest does not run")
    }

    /// Lets it run on when this process ends.
    pub fn leave(self) {
        std::mem::forget(self);
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A guest that runs one script: starting, running or halted.
#[derive(Debug)]
pub struct Guest {
    kernel: Kernel,
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
    /// Size of a disk for what the guest writes; without it that lies in its memory.
    pub disk_bytes: Option<u64>,
    /// What to run, for `/bin/sh -eu`.
    pub script: &'a str,
}

/// How a guest's script ended.
#[derive(Debug)]
pub struct Ended {
    /// The script's exit status; none where the guest ended before its script did.
    pub code: Option<i32>,
    /// All that was printed.
    pub output: String,
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
        let disk = spec
            .disk_bytes
            .map(|bytes| {
                let path = folder.join("disk.raw");
                make_disk(&path, bytes).map(|()| path)
            })
            .transpose()?;
        let links = [Link {
            tap: network.add_tap(usize::from(count))?,
            address,
        }];
        let boot = Boot {
            folder: &folder,
            namespace: network.hub_namespace(),
            links: &links,
            memory_mib: spec.memory_mib,
            disk: disk.as_deref(),
            hostname: spec.name,
            modules: spec.modules,
            script: spec.script,
        };
        let mut guest = Self {
            kernel: boot.start(scratch)?,
            address,
        };
        guest.wait_for(BEGIN, BOOTS_WITHIN).await?;
        Ok(guest)
    }

    /// Waits for a line that holds `text`.
    ///
    /// # Errors
    /// It did not come in time, or the guest ended without it; the error holds the end of the console.
    pub async fn wait_for(&mut self, text: &str, limit: Duration) -> Result<()> {
        self.kernel.wait_for(text, limit).await
    }

    /// Waits until the script has ended well and the guest has halted; gives all that was printed.
    ///
    /// # Errors
    /// The script failed, or did not end in time; the error holds the end of the console.
    pub async fn finish(mut self, limit: Duration) -> Result<String> {
        self.wait_for(EXIT, limit).await?;
        let ended = ended(self.kernel.output());
        if ended.code != Some(0) {
            bail!(
                "the guest's script failed; its console ends with:\n{}",
                self.kernel.console_end()
            );
        }
        self.kernel.halted(BOOTS_WITHIN).await?;
        Ok(ended.output)
    }

    /// Waits until the guest has ended, well or not, and kills it where it has not in time.
    pub async fn end(mut self, limit: Duration) -> Ended {
        // Not in time is told by the missing code.
        let _ = self.kernel.halted(limit).await;
        ended(self.kernel.output())
    }
}

fn ended(output: String) -> Ended {
    let code = output
        .lines()
        .find_map(|line| line.trim_end().strip_prefix(EXIT)?.trim().parse().ok());
    Ended { code, output }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_keeps_its_mac_over_a_reboot() {
        let link = |address: [u8; 4]| Link {
            tap: "tap1".into(),
            address: IpAddr::from(address),
        };
        assert_eq!(link([10, 0, 0, 11]).mac(), "02:00:0a:00:00:0b");
        assert_ne!(link([10, 0, 0, 11]).mac(), link([10, 255, 0, 11]).mac());
    }

    #[test]
    fn a_scripts_end_is_told_from_its_absence() {
        assert_eq!(ended("UML-BEGIN\r\nwords\r\nUML-EXIT 3\r\n".into()).code, Some(3));
        assert_eq!(ended("UML-BEGIN\nKernel panic\n".into()).code, None);
    }
}
