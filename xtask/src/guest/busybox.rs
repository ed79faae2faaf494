//! The busybox guest: Debian's cloud kernel, an initramfs that finds the root disk, and an ext4 root with a busybox.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use super::cpio::Archive;
use super::disk::{self, Layout};
use super::{quietly, text};
use crate::apt;

const INITRAMFS_INIT: &str = include_str!("busybox/initramfs-init.sh");
const INIT: &str = include_str!("busybox/init.sh");
const GRUB_CFG: &str = include_str!("busybox/grub.cfg");

/// For the key.
pub(super) const RECIPE: &[&str] = &[INITRAMFS_INIT, INIT, GRUB_CFG];

/// Bytes of the disk.
const DISK_BYTES: u64 = 96 * 1024 * 1024;
/// Debian's kernel for virtual machines; a package that depends on the real one.
const KERNEL: &str = "linux-image-cloud-amd64";
/// Kernel modules that the disk needs, in the order in which they are loaded.
const DISK_MODULES: &[&str] = &[
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci",
    "drivers/block/virtio_blk",
];
/// Kernel modules for the seed and the power button, likewise.
const ROOT_MODULES: &[&str] = &[
    "fs/nls/nls_cp437",
    "fs/nls/nls_ascii",
    "fs/nls/nls_utf8",
    "fs/fat/fat",
    "fs/fat/vfat",
    "drivers/acpi/button",
    "drivers/input/evdev",
    "drivers/char/virtio_console",
];
/// What freezes its file systems when the host asks; started where the seed says so.
const AGENT: &str = "qemu-guest-agent";
/// Packages with what the agent is linked to, beside glib's, whose name differs between releases.
const AGENT_PACKAGES: &[&str] = &["libc6", "libnuma1", "libpcre2-8-0", "libudev1", "liburing2"];
/// Files of these packages that it needs.
const AGENT_LIBRARIES: &[&str] = &[
    "libc.so.6",
    "libglib-2.0.so.0",
    "libgmodule-2.0.so.0",
    "libm.so.6",
    "libnuma.so.1",
    "libpcre2-8.so.0",
    "libudev.so.1",
    "liburing.so.2",
];
/// The dynamic loader, whose path is part of the ABI.
const LOADER: &str = "ld-linux-x86-64.so.2";

/// Makes the disk.
pub(super) fn build(work: &Path, out: &Path) -> Result<()> {
    apt::ensure_packages(disk::PACKAGES)?;
    let packages = work.join("packages");
    let kernel = apt::dependency(KERNEL, "linux-image-")?;
    let glib = apt::dependency(AGENT, "libglib2.0-0")?;
    let mut all = vec!["busybox-static", &kernel, AGENT, &glib];
    all.extend(AGENT_PACKAGES);
    apt::unpack(&all, &packages)?;
    let busybox =
        std::fs::read(packages.join("bin/busybox")).context("busybox-static holds no bin/busybox")?;
    let modules = only_entry(&packages.join("lib/modules"))?.join("kernel");
    let version = kernel.strip_prefix("linux-image-").unwrap_or(&kernel);

    let tree = work.join("tree");
    for dir in [
        "boot/grub",
        "bin",
        "sbin",
        "etc",
        "dev",
        "proc",
        "sys",
        "run",
        "tmp",
        "seed",
        "lib/modules",
        "lib/x86_64-linux-gnu",
        "lib64",
        "var/treeboot",
    ] {
        std::fs::create_dir_all(tree.join(dir))?;
    }
    put(&tree, "boot/grub/grub.cfg", GRUB_CFG.as_bytes(), 0o644)?;
    put(
        &tree,
        "boot/vmlinuz",
        &std::fs::read(packages.join("boot").join(format!("vmlinuz-{version}")))?,
        0o644,
    )?;
    put(&tree, "boot/initramfs", &initramfs(&busybox, &modules)?, 0o644)?;
    put(&tree, "bin/busybox", &busybox, 0o755)?;
    // Here and not at the first boot, where each VM would write the links to its own disk.
    for applet in quietly(Command::new(packages.join("bin/busybox")).arg("--list"))?.lines() {
        if applet != "busybox" {
            std::os::unix::fs::symlink("busybox", tree.join("bin").join(applet))?;
        }
    }
    put(&tree, "sbin/init", INIT.as_bytes(), 0o755)?;
    for module in ROOT_MODULES {
        let (name, bytes) = read_module(&modules, module)?;
        put(&tree, &format!("lib/modules/{name}"), &bytes, 0o644)?;
    }
    put_agent(&tree, &packages)?;
    let layout = Layout {
        bytes: DISK_BYTES,
        tree: &tree,
        label: "treeboot",
        bytes_per_inode: 65536,
        signature: 0x7472_6262,
        wrapper: &[],
    };
    disk::assemble(&layout, work, out)
}

fn put_agent(tree: &Path, packages: &Path) -> Result<()> {
    let agent = std::fs::read(packages.join("usr/sbin/qemu-ga")).context("there is no qemu-ga")?;
    put(tree, "sbin/qemu-ga", &agent, 0o755)?;
    let libraries = AGENT_LIBRARIES
        .iter()
        .map(|name| (format!("lib/x86_64-linux-gnu/{name}"), *name));
    for (to, name) in libraries.chain([(format!("lib64/{LOADER}"), LOADER)]) {
        let places = ["lib", "usr/lib"].map(|lib| packages.join(lib).join("x86_64-linux-gnu").join(name));
        let place = places.iter().find(|place| place.exists());
        let place = place.with_context(|| format!("no package holds {name}"))?;
        put(tree, &to, &std::fs::read(place)?, 0o755)?;
    }
    Ok(())
}

/// Left uncompressed: to unpack it costs an emulated processor more than the disk saves.
fn initramfs(busybox: &[u8], modules: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    for dir in ["bin", "dev", "proc", "sys", "root", "modules"] {
        archive.dir(dir);
    }
    archive.character_device("dev/console", 5, 1);
    archive.file("bin/busybox", 0o755, busybox);
    let mut order = String::new();
    for module in DISK_MODULES {
        let (name, bytes) = read_module(modules, module)?;
        archive.file(&format!("modules/{name}"), 0o644, &bytes);
        order.push_str(&name);
        order.push('\n');
    }
    archive.file("modules/order", 0o644, order.as_bytes());
    archive.file("init", 0o755, INITRAMFS_INIT.as_bytes());
    Ok(archive.finish())
}

fn read_module(modules: &Path, module: &str) -> Result<(String, Vec<u8>)> {
    let path = modules.join(format!("{module}.ko"));
    let name = path
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let bytes = std::fs::read(&path).with_context(|| format!("the kernel's package holds no {module}.ko"))?;
    let stripped = strip(&path)?.unwrap_or(bytes);
    Ok((name, stripped))
}

/// The module without its debugging symbols, where binutils are there to take them off.
fn strip(path: &Path) -> Result<Option<Vec<u8>>> {
    let stripped = path.with_extension("stripped");
    let done = Command::new("strip")
        .args(["--strip-debug", "-o", text(&stripped)?, text(path)?])
        .output();
    match done {
        Ok(output) if output.status.success() => Ok(Some(std::fs::read(&stripped)?)),
        _ => Ok(None),
    }
}

fn only_entry(dir: &Path) -> Result<PathBuf> {
    let entry = std::fs::read_dir(dir)
        .with_context(|| format!("cannot read {}", dir.display()))?
        .next();
    Ok(entry
        .with_context(|| format!("{} is empty", dir.display()))??
        .path())
}

fn put(tree: &Path, path: &str, bytes: &[u8], mode: u32) -> Result<()> {
    let path = tree.join(path);
    std::fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode))?;
    Ok(())
}
