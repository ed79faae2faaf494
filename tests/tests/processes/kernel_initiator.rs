//! The Linux kernel's own initiator (open-iscsi on iscsi_tcp), in a user-mode Linux guest, on `treeboot serve`.

use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use treeboot_tests::binaries::Binaries;
use treeboot_tests::need::{Need, require};
use treeboot_tests::network::Network;
use treeboot_tests::scratch::Scratch;
use treeboot_tests::uml::{self, Guest, GuestSpec};
use treeboot_tests::wait::wait_until;

use crate::support::{Machine, on_own_thread};

const TARGET: &str = "iqn.2026-11.org.example:disk";
const DISK_BYTES: u64 = 128 << 20;
/// For what the guest does; a healthy run takes 5 s.
const GUEST_LIMIT: Duration = Duration::from_secs(90);
const READY_WITHIN: Duration = Duration::from_secs(60);

/// What both sides prove to know, in files and in the initiator's settings.
const SECRET: &str = "the-guests-secret";
const MUTUAL_SECRET: &str = "the-targets-secret";

/// Starts the initiator's daemon and logs in, both digests and mutual CHAP demanded; `$disk` is then the block device.
const LOG_IN: &str = r#"
mkdir -p /etc/iscsi
echo "InitiatorName=iqn.2026-11.org.example:guest" > /etc/iscsi/initiatorname.iscsi
iscsid
iscsiadm -m discovery -t sendtargets -p $PORTAL | grep -F "$PORTAL,1 $TARGET"
node() { iscsiadm -m node -T $TARGET -p $PORTAL "$@"; }
node -o update -n node.conn[0].iscsi.HeaderDigest -v CRC32C
node -o update -n node.conn[0].iscsi.DataDigest -v CRC32C
node -o update -n node.session.timeo.replacement_timeout -v 60
node -o update -n node.session.auth.authmethod -v CHAP
node -o update -n node.session.auth.username -v guest
node -o update -n node.session.auth.password_in -v "$MUTUAL_SECRET"
node -o update -n node.session.auth.username_in -v target
node -o update -n node.session.auth.password -v not-the-guests-secret
if node --login; then echo "logged in with a wrong secret"; exit 1; fi
node -o update -n node.session.auth.password -v "$SECRET"
node -o update -n node.session.auth.password_in -v not-the-targets-secret
if node --login; then echo "took a target that does not know its secret"; exit 1; fi
node -o update -n node.session.auth.password_in -v "$MUTUAL_SECRET"
node --login
for digest in header_digest data_digest; do
    [ "$(cat /sys/class/iscsi_connection/connection*/$digest)" = 1 ]
done
for try in $(seq 100); do
    disk=$(ls /sys/class/iscsi_session/session*/device/target*/*/block 2>/dev/null || true)
    if [ -n "$disk" ] && [ -b /dev/$disk ]; then break; fi
    sleep 0.1
done
disk=/dev/$disk
[ "$(blockdev --getsize64 $disk)" = "$BYTES" ]
"#;

/// `treeboot serve` on a fresh sparse file, in the namespace of the network's hub.
struct Served {
    child: std::process::Child,
    portal: String,
}

impl Served {
    async fn start(scratch: &Scratch, network: &Network, port: u16) -> Result<Self> {
        let disk = scratch.path().join("disk.raw");
        if !disk.exists() {
            File::create(&disk)?.set_len(DISK_BYTES)?;
        }
        let portal = format!("{}:{port}", network.hub_address());
        let ready = scratch.path().join("ready.json");
        let _ = std::fs::remove_file(&ready);
        let child = scratch
            .command("ip")
            .args(["netns", "exec", network.hub_namespace()])
            .arg(Binaries::locate()?.cli())
            .arg("serve")
            .arg(&disk)
            .args(["--writable", "--name", TARGET, "--portal", &portal])
            .args(["--chap-user", "guest", "--chap-secret-file"])
            .arg(secret_file(scratch, "guest", SECRET)?)
            .args(["--mutual-user", "target", "--mutual-secret-file"])
            .arg(secret_file(scratch, "target", MUTUAL_SECRET)?)
            .arg("--ready-file")
            .arg(&ready)
            .spawn()?;
        wait_until(READY_WITHIN, "the target to serve", || async {
            Ok(ready.exists().then_some(()))
        })
        .await?;
        Ok(Self { child, portal })
    }

    fn variables(&self) -> String {
        let portal = &self.portal;
        format!(
            "PORTAL={portal}\nTARGET={TARGET}\nBYTES={DISK_BYTES}\nSECRET='{SECRET}'\nMUTUAL_SECRET='{MUTUAL_SECRET}'\n"
        )
    }

    fn kill(&mut self) -> Result<()> {
        // `ip netns exec` becomes the program, so this is the target's own pid.
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

fn secret_file(scratch: &Scratch, of: &str, secret: &str) -> Result<PathBuf> {
    let path = scratch.path().join(format!("{of}.secret"));
    std::fs::write(&path, secret)?;
    Ok(path)
}

fn machine_is_fit() -> bool {
    let programs = [
        Need::Program("iscsiadm", "open-iscsi"),
        Need::Program("modprobe", "kmod"),
        Need::Program("fio", "fio"),
        Need::Program("mkfs.ext4", "e2fsprogs"),
    ];
    require(&uml::NEEDS) && require(&programs)
}

async fn guest(scratch: &Scratch, network: &Network, script: &str) -> Result<Guest> {
    let modules = &["iscsi_tcp", "sd_mod", "ext4", "crc32c_generic"];
    Guest::start(
        scratch,
        network,
        &GuestSpec {
            name: "initiator",
            memory_mib: 192,
            modules,
            disk_bytes: None,
            script,
        },
    )
    .await
}

#[test]
fn the_kernel_makes_a_file_system_verifies_random_writes_and_discards() -> Result<()> {
    if !machine_is_fit() {
        return Ok(());
    }
    on_own_thread(Machine::Alone, async || {
        let scratch = Scratch::new(Binaries::locate()?.evidence().join("kernel-initiator"))?;
        let network = Network::new(&scratch, 0)?;
        let mut served = Served::start(&scratch, &network, 3260).await?;
        let script = served.variables()
            + LOG_IN
            + r#"
mkfs.ext4 -q $disk
mkdir /tmp/disk
mount $disk /tmp/disk
fio --name=verify --directory=/tmp/disk --size=24M --rw=randwrite --bsrange=512-128k --bs_unaligned=1 \
    --direct=0 --fsync=16 --verify=crc32c --ioengine=psync --minimal > /dev/null
umount /tmp/disk
fsck.ext4 -f -n $disk
blkdiscard -f $disk
[ "$(head -c 1048576 $disk | tr -d '\0' | wc -c)" = 0 ]
node --logout
"#;
        let guest = guest(&scratch, &network, &script).await?;
        guest.finish(GUEST_LIMIT).await?;
        // The discard gave the space back to the file's system.
        let allocated =
            std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(scratch.path().join("disk.raw"))?)
                * 512;
        assert!(
            allocated < 1 << 20,
            "{allocated} bytes are still allocated after the discard of everything"
        );
        served.kill()?;
        scratch.pass();
        Ok(())
    })
}

#[test]
fn a_target_killed_and_restarted_under_load_loses_nothing() -> Result<()> {
    if !machine_is_fit() {
        return Ok(());
    }
    on_own_thread(Machine::Alone, async || {
        let scratch = Scratch::new(Binaries::locate()?.evidence().join("kernel-initiator-kill"))?;
        let network = Network::new(&scratch, 0)?;
        let mut served = Served::start(&scratch, &network, 3260).await?;
        let script = served.variables()
            + LOG_IN
            + r#"
echo LOAD
fio --name=verify --filename=$disk --size=32M --time_based --runtime=6 --rw=randwrite --bs=4k --direct=1 --fsync=32 \
    --verify=crc32c --verify_fatal=1 --do_verify=1 --ioengine=psync --minimal > /dev/null
node --logout
"#;
        let mut guest = guest(&scratch, &network, &script).await?;
        guest.wait_for("LOAD", GUEST_LIMIT).await?;
        for _ in 0..2 {
            let written = written(&scratch)?;
            wait_until(GUEST_LIMIT, "the load to write", || async {
                Ok((self::written(&scratch)? != written).then_some(()))
            })
            .await?;
            served.kill()?;
            served = Served::start(&scratch, &network, 3260).await?;
        }
        guest
            .finish(GUEST_LIMIT)
            .await
            .context("after two kills of the target")?;
        served.kill()?;
        scratch.pass();
        Ok(())
    })
}

/// Changes whenever the target's file is written.
fn written(scratch: &Scratch) -> Result<std::time::SystemTime> {
    Ok(std::fs::metadata(scratch.path().join("disk.raw"))?.modified()?)
}
