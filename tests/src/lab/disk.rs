//! A VM's disk as a block device of its host, whatever the host's plane: by the kernel's own initiator at the agent's portal, or the
//! device-mapper path itself.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use treeboot_types::IscsiUrl;

use super::{KNOWN_WITHIN, Lab, LabHost};
use crate::wait::wait_until;

/// The words of `iscsiadm` for a target at a portal, and the device that a session of it gave. Used by both scripts below.
const NODE: &str = r#"
node() { iscsiadm -m node -T "$target" -p "$portal" -I "$iface" "$@"; }
device() {
    for session in /sys/class/iscsi_session/session*; do
        if [ "$(cat "$session/targetname" 2>/dev/null)" = "$target" ]; then
            # A session is there a moment before its units are.
            ls "$session"/device/target*/*:"$lun"/block 2>/dev/null || true
        fi
    done
}
"#;

/// Logs in and prints the device's path.
const LOG_IN: &str = r#"
if [ -z "$(device)" ]; then
    # The disk is for its VM's initiator, so the session gets that name, and its secret where there is one.
    iscsiadm -m iface -I "$iface" -o new >/dev/null 2>&1 || true
    iscsiadm -m iface -I "$iface" -o update -n iface.initiatorname -v "$initiator" >/dev/null
    node -o new >/dev/null
    node -o update -n node.startup -v manual
    node -o update -n node.session.timeo.replacement_timeout -v 20
    if [ -n "$secret" ]; then
        node -o update -n node.session.auth.authmethod -v CHAP
        node -o update -n node.session.auth.username -v "$initiator"
        node -o update -n node.session.auth.password -v "$secret"
    fi
    node --login >/dev/null
fi
for try in $(seq 200); do
    name=$(device)
    if [ -n "$name" ] && [ -b "/dev/$name" ]; then
        echo "/dev/$name"
        exit 0
    fi
    sleep 0.05
done
echo "no block device came of $target" >&2
exit 1
"#;

impl Lab {
    /// Creates a VM's disk on a host and gives its path as a block device there.
    ///
    /// # Errors
    /// The agent or the host's initiator refused.
    pub async fn create_disk(&self, host: &LabHost, vm: &str, image: &str) -> Result<String> {
        self.treeboot(&["vm", "create", vm, "--image", image, "--host", host.name()])
            .await?;
        self.disk(host, vm).await
    }

    /// The path of a VM's disk as a block device of its host; where the agent serves it as a LUN the host logs in first.
    ///
    /// # Errors
    /// There is no such disk, or the host's initiator cannot log in.
    pub async fn disk(&self, host: &LabHost, vm: &str) -> Result<String> {
        match self.place(host, vm).await? {
            Place::Device(path) => {
                host.sh(&format!("[ -b '{path}' ] || {{ echo 'no {path}' >&2; exit 1; }}"))
                    .await?;
                Ok(path)
            }
            Place::Lun(lun) => {
                let secret = self.secret(host, &lun).await?;
                let script = format!("secret={secret}\n{}{LOG_IN}", lun.variables()?);
                let path = host.sh(&script).await?;
                Ok(path.trim().to_owned())
            }
        }
    }

    /// Lets go of what [`Lab::disk`] took, so that the disk can be destroyed.
    ///
    /// # Errors
    /// The host's initiator cannot log out.
    pub async fn release_disk(&self, host: &LabHost, vm: &str) -> Result<()> {
        if let Place::Lun(lun) = self.place(host, vm).await? {
            host.sh(&format!(
                "{}node --logout >/dev/null\nnode -o delete\niscsiadm -m iface -I \"$iface\" -o delete >/dev/null || true",
                lun.variables()?
            ))
            .await?;
        }
        Ok(())
    }

    async fn place(&self, host: &LabHost, vm: &str) -> Result<Place> {
        // The coordinator may forget a host that was down in the very moment before its agent is back.
        let list = wait_until(KNOWN_WITHIN, "the host's list of VMs", async || {
            let output = self
                .treeboot_output(&["vm", "list", "--host", host.name(), "--json"])
                .await?;
            Ok(output.status.success().then_some(output.stdout))
        })
        .await?;
        let list: serde_json::Value = serde_json::from_slice(&list).context("a list of VMs")?;
        let row = list
            .as_array()
            .and_then(|vms| vms.iter().find(|one| one["name"] == vm))
            .with_context(|| format!("'{vm}' has no disk on {}: {list}", host.name()))?;
        if let Some(device) = row["device"].as_str() {
            return Ok(Place::Device(device.to_owned()));
        }
        let url = row["url"].as_str().context("a disk without a place")?;
        Ok(Place::Lun(Lun {
            vm: vm.to_owned(),
            url: url.parse()?,
            initiator: row["initiator"].as_str().context("an initiator")?.to_owned(),
            chap: row["chap"] == true,
        }))
    }

    /// The secret of a VM's disk; empty where it asks for none.
    async fn secret(&self, host: &LabHost, lun: &Lun) -> Result<String> {
        if !lun.chap {
            return Ok(String::new());
        }
        let file = self
            .scratch
            .path()
            .join(format!("{}-{}.secret", host.name(), lun.vm));
        let path = file.to_str().context("a path of letters")?;
        self.treeboot(&[
            "vm",
            "show",
            &lun.vm,
            "--host",
            host.name(),
            "--secret-file",
            path,
        ])
        .await?;
        let secret = std::fs::read_to_string(&file)?;
        std::fs::remove_file(&file)?;
        Ok(secret)
    }
}

/// Where a front end finds a disk.
enum Place {
    Device(String),
    Lun(Lun),
}

/// A disk that is served as a LUN.
struct Lun {
    vm: String,
    url: IscsiUrl,
    initiator: String,
    chap: bool,
}

impl Lun {
    fn variables(&self) -> Result<String> {
        let url = &self.url;
        let portal: SocketAddr = url
            .portal()
            .parse()
            .with_context(|| format!("the portal of {url} is no address"))?;
        Ok(format!(
            "target={}\nportal={portal}\nlun={}\niface=front-{}\ninitiator={}\n{NODE}",
            url.target, url.lun, self.vm, self.initiator
        ))
    }
}
