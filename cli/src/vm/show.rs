//! `vm show`: one VM, its disk, and what a front end needs to attach it.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;

use treeboot_proto::v1;
use treeboot_types::{IscsiUrl, VmName};

use super::list::VmJson;
use crate::client::{Agent, incomplete};
use crate::failure::{Exit, Failure};
use crate::output::{self, JsonFlag};

/// Where the disk's secret goes.
#[derive(Debug, clap::Args)]
pub(crate) struct SecretFile {
    /// Write the CHAP secret of the disk to this file, for its owner only; it is shown nowhere else
    #[arg(long, value_name = "FILE")]
    secret_file: Option<PathBuf>,
}

impl SecretFile {
    /// Writes the secret where one was asked for.
    pub(super) fn write(&self, secret: Option<v1::DiskSecret>) -> Result<(), Failure> {
        let Some(path) = &self.secret_file else {
            return Ok(());
        };
        let secret = secret.ok_or_else(|| {
            Failure::new(
                Exit::Usage,
                "the disk asks for no secret, so there is none to write",
            )
            .advice("leave --secret-file out; disks have secrets where the coordinator has an authority")
        })?;
        let written = std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .and_then(|mut file| file.write_all(secret.secret.as_bytes()));
        written.map_err(|error| {
            Failure::new(
                Exit::Failed,
                format!("cannot write the secret to {}: {error}", path.display()),
            )
            .advice("give a file that is not there yet, in a directory that you may write to")
        })
    }
}

/// `vm show`.
pub(super) async fn show(
    agent: &Agent,
    name: &VmName,
    secret: &SecretFile,
    json: JsonFlag,
) -> Result<(), Failure> {
    let vms = agent.vms().await?;
    let vm = vms.into_iter().find(|vm| vm.name == name.as_str());
    let disks = agent.disks().await?;
    let disk = disks.into_iter().find(|disk| disk.vm == name.as_str());
    if vm.is_none() && disk.is_none() {
        return Err(Failure::new(
            Exit::NotFound,
            format!("there is no VM '{name}' on host '{}'", agent.host),
        ));
    }
    if secret.secret_file.is_some() {
        let doing = format!("get the secret of the disk of '{name}' on host '{}'", agent.host);
        let request = v1::GetDiskSecretRequest { vm: name.to_string() };
        let answer = agent
            .call(&doing, agent.client.clone().get_disk_secret(request))
            .await?;
        secret.write(answer.secret)?;
    }
    let row = VmJson::of(&agent.host, vm, disk);
    if json.json {
        return output::print_json(&row);
    }
    let text = render(&row).ok_or_else(|| incomplete(&agent.peer, "url"))?;
    output::print_text(&text)
}

fn render(row: &VmJson) -> Option<String> {
    let mut text = format!(
        "{} on host '{}': {}, {} over {}\n",
        row.name,
        row.host,
        row.state,
        output::bytes(row.bytes),
        row.image
    );
    if let Some(device) = &row.device {
        text += &format!("  device     {device}\n");
        return Some(text);
    }
    if row.url.is_empty() {
        return Some(text);
    }
    let url: IscsiUrl = row.url.parse().ok()?;
    let initiator = row.initiator.as_deref().unwrap_or_default();
    let (portal, target, lun) = (url.portal(), &url.target, url.lun);
    text += &format!(
        "  disk       {}\n  initiator  {initiator} (no other is let in)\n",
        row.url
    );
    let mut qemu = String::new();
    let mut chap = String::new();
    if row.chap {
        text += &format!("  CHAP       name {initiator}, secret by --secret-file FILE\n");
        qemu = "-object secret,id=s,file=FILE ".into();
        chap = format!(",user={initiator},password-secret=s");
    }
    text += &format!(
        "  QEMU       {qemu}-blockdev driver=iscsi,node-name=d,transport=tcp,portal={portal},target={target},lun={lun},\
         initiator-name={initiator}{chap} -device virtio-blk-pci,drive=d\n"
    );
    text += &format!(
        "  iscsiadm   -m node -T {target} -p {portal} -I IFACE, where IFACE has iface.initiatorname = {initiator}{}\n",
        match row.chap {
            true => "; node.session.auth.authmethod = CHAP, .username and .password in the node's record",
            false => "",
        }
    );
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_front_end_needs_is_shown_and_the_secret_is_not() {
        let disk = v1::Disk {
            vm: "a".into(),
            url: "iscsi://10.0.0.2:3260/iqn.2026-11.dev.treeboot:disk:a/0".into(),
            initiator: "iqn.2026-11.dev.treeboot:vm:a".into(),
            chap: true,
            bytes: 1 << 30,
            ..Default::default()
        };
        let text = render(&VmJson::of("h", None, Some(disk.clone()))).unwrap();
        for part in [
            "initiator-name=iqn.2026-11.dev.treeboot:vm:a,user=iqn.2026-11.dev.treeboot:vm:a,password-secret=s",
            "portal=10.0.0.2:3260,target=iqn.2026-11.dev.treeboot:disk:a,lun=0",
            "-object secret,id=s,file=FILE",
        ] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
        let open = v1::Disk { chap: false, ..disk };
        let text = render(&VmJson::of("h", None, Some(open))).unwrap();
        assert!(!text.contains("secret"), "{text}");
    }

    #[test]
    fn the_secrets_file_is_its_owners() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let file = SecretFile {
            secret_file: Some(path.clone()),
        };
        assert!(file.write(None).is_err());
        let secret = v1::DiskSecret {
            user: "u".into(),
            secret: "s3cr3t".into(),
        };
        file.write(Some(secret.clone())).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "s3cr3t");
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert!(
            file.write(Some(secret)).is_err(),
            "what is there is not overwritten"
        );
    }
}
