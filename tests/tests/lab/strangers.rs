//! What others have on a kernel-plane host, with names like ours: it is there, unchanged, whatever the agent and `doctor --fix` do.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use treeboot_tests::lab::{Lab, LabHost};
use treeboot_tests::wait::wait_until;

/// Makes them: devices with our names and not our UUIDs, a loop device, a target with a backstore, a record and an interface of open-iscsi.
const MAKE: &str = r#"
truncate -s 4M /var/tmp/stranger.raw
loop=$(losetup -f --show /var/tmp/stranger.raw)
for name in treeboot:base:stranger treeboot:disk:web treeboot-mine; do
    dmsetup --noudevsync --noudevrules create "$name" --uuid "LVM-$name" --table "0 2048 linear $loop 0"
done
target=/sys/kernel/config/target
store=$target/core/fileio_0/treeboot-mine
mkdir -p $target/core/fileio_0 $store
echo fd_dev_name=/var/tmp/stranger.raw,fd_dev_size=4194304 > $store/control
echo 1 > $store/enable
tpg=$target/iscsi/iqn.2003-01.org.example:stranger/tpgt_1
mkdir -p $tpg/lun/lun_0
ln -s $store $tpg/lun/lun_0/stranger
iscsiadm -m iface -I stranger -o new >/dev/null
iscsiadm -m node -T iqn.2003-01.org.example:elsewhere -p 10.0.0.99:3260 -I stranger -o new >/dev/null
"#;

/// Says what there is of them.
const SHOW: &str = r#"
for name in treeboot:base:stranger treeboot:disk:web treeboot-mine; do
    echo "$name: $(dmsetup table "$name") $(dmsetup info -c --noheadings -o uuid,open,events "$name")"
done
losetup -j /var/tmp/stranger.raw
target=/sys/kernel/config/target
cat $target/core/fileio_0/treeboot-mine/info
find $target/iscsi/iqn.2003-01.org.example:stranger -type l
cat /etc/iscsi/ifaces/stranger
find /etc/iscsi/nodes/iqn.2003-01.org.example:elsewhere -type f
sha256sum /var/tmp/stranger.raw
"#;

/// What is the agent's own, by the marks that its objects have, but for the cache of contents that may be wanted again.
const OURS: &str = r#"
dmsetup info -c --noheadings -o uuid 2>/dev/null | grep ^TREEBOOT- | grep -v cache || true
losetup -nO back-file | grep /var/lib/treeboot | grep -v cache-device || true
ls -d /sys/kernel/config/target/core/*_26111/treeboot-* /sys/kernel/config/target/iscsi/iqn.2026-11.dev.treeboot:* 2>/dev/null || true
for session in /sys/class/iscsi_session/session*; do
    [ "$(cat $session/ifacename 2>/dev/null)" != treeboot ] || echo "$session"
done
"#;
/// Sessions are ended when nobody needs them any more, by a task of their own.
const GONE_WITHIN: Duration = Duration::from_secs(60);

/// Strangers on a host, as they were found.
pub(crate) struct Strangers(String);

impl Strangers {
    /// Puts them there.
    pub(crate) async fn make(host: &LabHost) -> Result<Self> {
        host.sh(MAKE).await?;
        Ok(Self(host.sh(SHOW).await?))
    }

    /// The agent's end and start, and `doctor --fix`, leave them as they are.
    pub(crate) async fn are_left_alone(&self, lab: &Lab, host: &LabHost) -> Result<()> {
        host.kill_agent().await?;
        host.start_agent().await?;
        lab.wait_host_known(host).await?;
        let told = lab
            .treeboot_output(&["doctor", "--host", host.name(), "--fix"])
            .await?;
        ensure!(
            told.status.success(),
            "doctor on {}: {}{}",
            host.name(),
            String::from_utf8_lossy(&told.stdout),
            String::from_utf8_lossy(&told.stderr)
        );
        let now = host.sh(SHOW).await?;
        ensure!(
            now == self.0,
            "strangers' things on {} were\n{}and are\n{now}",
            host.name(),
            self.0
        );
        Ok(())
    }
}

/// All VMs of a host being gone, and with them their images, nothing of the agent's is left on it but its cache.
pub(crate) async fn nothing_of_ours_is_left(host: &LabHost) -> Result<()> {
    let mut left = String::new();
    let gone = wait_until(GONE_WITHIN, "nothing to be left", async || {
        left = host.sh(OURS).await?;
        Ok(left.trim().is_empty().then_some(()))
    })
    .await;
    gone.with_context(|| format!("left on {}:\n{left}", host.name()))
}
