//! A VM's root file system run from its disk's path in a host: what a container or a paravirtual guest on that host would do.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use treeboot_tests::lab::{Lab, Plane};

use crate::support::{import, local, with_lab};

const LIMIT: Duration = Duration::from_secs(240);
/// What the root file system holds, with the libraries that they need.
const PROGRAMS: [&str; 5] = ["dash", "cat", "sync", "ls", "sha256sum"];

/// Makes a root file system of a few of this machine's programs.
fn root_file_system(folder: &Path) -> Result<PathBuf> {
    let root = folder.join("root");
    fs::create_dir_all(root.join("bin"))?;
    fs::create_dir_all(root.join("var"))?;
    let mut libraries = BTreeSet::new();
    for program in PROGRAMS {
        let found = local("sh", &["-c", &format!("command -v {program}")])?;
        fs::copy(found.trim(), root.join("bin").join(program))?;
        let words = local("ldd", &[found.trim()])?;
        libraries.extend(
            words
                .split_whitespace()
                .filter(|word| word.starts_with('/'))
                .map(PathBuf::from),
        );
    }
    std::os::unix::fs::symlink("dash", root.join("bin/sh"))?;
    for library in libraries {
        let inside = root.join(library.strip_prefix("/")?);
        fs::create_dir_all(inside.parent().context("a library lies in a folder")?)?;
        fs::copy(&library, inside)?;
    }
    fs::write(
        root.join("run"),
        "#!/bin/sh\nset -e\n\
         boots=0\n[ ! -f /var/boots ] || read boots < /var/boots\n\
         boots=$((boots + 1))\necho $boots > /var/boots\nsync\n\
         echo \"root file system of $1, boot $boots\"\nsha256sum /bin/dash\n",
    )?;
    fs::set_permissions(
        root.join("run"),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )?;
    let image = folder.join("root.raw");
    fs::File::create(&image)?.set_len(32 << 20)?;
    let (root, path) = (root.display().to_string(), image.display().to_string());
    // Blocks of 4 KiB: verity, and so the kernel plane, has sectors of that size.
    local("mkfs.ext4", &["-q", "-F", "-b", "4096", "-d", &root, &path])?;
    Ok(image)
}

async fn scenario(lab: &Lab) -> Result<()> {
    let image = root_file_system(lab.scratch().path())?;
    import(lab, &image, "root").await?;
    let host = &lab.hosts[0];
    let first = lab.create_disk(host, "one", "root").await?;
    let second = lab.create_disk(host, "two", "root").await?;
    let run = async |disk: &str, vm: &str| {
        host.sh(&format!(
            "mkdir -p /tmp/vm\nmount -t ext4 '{disk}' /tmp/vm\nchroot /tmp/vm /run {vm}\numount /tmp/vm"
        ))
        .await
    };
    ensure!(run(&first, "one").await?.contains("of one, boot 1\n"));
    ensure!(run(&first, "one").await?.contains("of one, boot 2\n"));
    // Another VM's disk over the same base knows nothing of it.
    ensure!(run(&second, "two").await?.contains("of two, boot 1\n"));
    host.reboot(lab.scratch()).await?;
    lab.wait_known().await?;
    let first = lab.disk(host, "one").await?;
    let third = run(&first, "one").await?;
    ensure!(
        third.contains("of one, boot 3\n"),
        "after the host's reboot: {third}"
    );
    Ok(())
}

#[test]
fn a_root_file_system_runs_from_a_user_plane_disk() -> Result<()> {
    with_lab("lab-root-user", &[Plane::User], LIMIT, async |lab| {
        scenario(lab).await
    })
}

#[test]
fn a_root_file_system_runs_from_its_device_mapper_path() -> Result<()> {
    with_lab("lab-root-kernel", &[Plane::Kernel], LIMIT, async |lab| {
        scenario(lab).await
    })
}
