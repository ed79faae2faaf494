//! The Debian guest: the host's release by `mmdebstrap`, with the cloud kernel, systemd and sshd, and our reader of the seed.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};

use super::disk::{self, Layout};
use super::{quietly, text};
use crate::apt;

const IDENTITY: &str = include_str!("debian/identity.sh");
const IDENTITY_UNIT: &str = include_str!("debian/treeboot-identity.service");
const READY: &str = include_str!("debian/ready.sh");
const READY_UNIT: &str = include_str!("debian/treeboot-ready.service");
const NETWORK: &str = include_str!("debian/80-dhcp.network");
const GRUB_CFG: &str = include_str!("debian/grub.cfg");
const CUSTOMIZE: &str = include_str!("debian/customize.sh");
const DRIVERS: &str = include_str!("debian/drivers.conf");

/// For the key.
pub(super) const RECIPE: &[&str] = &[
    IDENTITY,
    IDENTITY_UNIT,
    READY,
    READY_UNIT,
    NETWORK,
    GRUB_CFG,
    CUSTOMIZE,
    DRIVERS,
    PACKAGES,
];

/// Bytes of the disk; what is not used is not there.
const DISK_BYTES: u64 = 2 * 1024 * 1024 * 1024;
/// What is installed beside Debian's essential packages.
const PACKAGES: &str =
    "linux-image-cloud-amd64,systemd-sysv,udev,dbus,kmod,initramfs-tools,lz4,openssh-server,iproute2,procps";

/// Makes the disk.
pub(super) fn build(work: &Path, out: &Path) -> Result<()> {
    let root = nix::unistd::geteuid().is_root();
    let mut packages = vec!["mmdebstrap"];
    packages.extend(disk::PACKAGES);
    if !root {
        // mmdebstrap then works in a user namespace, and the file system is filled under a faked root.
        packages.extend(["fakeroot", "uidmap"]);
    }
    apt::ensure_packages(&packages)?;
    let tar = work.join("root.tar");
    debootstrap(work, &tar)?;
    let tree = work.join("tree");
    std::fs::create_dir_all(&tree)?;
    let wrapper: Vec<String> = if root {
        vec![]
    } else {
        ["fakeroot", "-i", "STATE", "-s", "STATE"]
            .map(String::from)
            .to_vec()
    };
    let wrapper: Vec<String> = wrapper
        .into_iter()
        .map(|word| {
            if word == "STATE" {
                work.join("owners").to_string_lossy().into_owned()
            } else {
                word
            }
        })
        .collect();
    if !root {
        std::fs::write(work.join("owners"), "")?;
    }
    unpack(&wrapper, &tar, &tree)?;
    let layout = Layout {
        bytes: DISK_BYTES,
        tree: &tree,
        label: "treeboot",
        bytes_per_inode: 65536,
        signature: 0x7472_6464,
        wrapper: &wrapper,
    };
    disk::assemble(&layout, work, out)?;
    // What a folder of the kernel's holds may be read-only; the temporary folder must go all the same.
    std::fs::remove_dir_all(&tree).with_context(|| format!("cannot remove {}", tree.display()))
}

fn debootstrap(work: &Path, tar: &Path) -> Result<()> {
    let files = work.join("files");
    write(&files, "usr/lib/treeboot/identity", IDENTITY, 0o755)?;
    write(&files, "usr/lib/treeboot/ready", READY, 0o755)?;
    write(
        &files,
        "usr/lib/systemd/system/treeboot-identity.service",
        IDENTITY_UNIT,
        0o644,
    )?;
    write(
        &files,
        "usr/lib/systemd/system/treeboot-ready.service",
        READY_UNIT,
        0o644,
    )?;
    write(&files, "etc/systemd/network/80-dhcp.network", NETWORK, 0o644)?;
    write(&files, "boot/grub/grub.cfg", GRUB_CFG, 0o644)?;
    // Before the kernel's package makes its initrd: only the drivers of a virtual machine, quickly unpacked.
    let early = work.join("early");
    write(&early, "etc/initramfs-tools/conf.d/treeboot", DRIVERS, 0o644)?;
    write(
        &early,
        "etc/initramfs-tools/modules",
        "virtio_pci\nvirtio_blk\nvirtio_net\n",
        0o644,
    )?;
    let customize = work.join("customize.sh");
    write(work, "customize.sh", CUSTOMIZE, 0o755)?;

    let (release, sources) = apt::debian_sources()?;
    let list = work.join("sources.list");
    std::fs::write(&list, sources)?;
    let mut command = Command::new("mmdebstrap");
    command
        .args(["--variant=essential", "--format=tar", "--quiet"])
        .arg(format!("--include={PACKAGES}"));
    command.args([
        "--aptopt=APT::Install-Recommends \"false\"",
        "--aptopt=DPkg::options \"--force-confold\"",
    ]);
    for folder in ["doc", "man", "info", "locale", "bug", "lintian"] {
        command.arg(format!("--dpkgopt=path-exclude=/usr/share/{folder}/*"));
    }
    command.arg(format!("--essential-hook=sync-in {} /", text(&early)?));
    command.arg(format!("--customize-hook=sync-in {} /", text(&files)?));
    command.arg(format!("--customize-hook={} \"$1\"", text(&customize)?));
    command.arg(release).arg(tar).arg(&list);
    quietly(&mut command)?;
    Ok(())
}

fn unpack(wrapper: &[String], tar: &Path, tree: &Path) -> Result<()> {
    let mut words = wrapper.to_vec();
    words.extend(
        [
            "tar",
            "--extract",
            "--numeric-owner",
            "--preserve-permissions",
            "--xattrs",
            "--xattrs-include=*",
        ]
        .map(String::from),
    );
    words.extend([
        "--file".into(),
        text(tar)?.into(),
        "--directory".into(),
        text(tree)?.into(),
    ]);
    let (program, arguments) = words.split_first().context("there are words")?;
    quietly(Command::new(program).args(arguments))?;
    std::fs::remove_file(tar)?;
    Ok(())
}

fn write(tree: &Path, path: &str, content: &str, mode: u32) -> Result<()> {
    let path = tree.join(path);
    let dir = path.parent().context("a file has a folder")?;
    std::fs::create_dir_all(dir)?;
    std::fs::write(&path, content).with_context(|| format!("cannot write {}", path.display()))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode))?;
    Ok(())
}
