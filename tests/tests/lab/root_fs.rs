//! A VM's root file system run from its disk's path in a host: what a container or a paravirtual guest on that host would do.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures_util::future::try_join_all;
use tokio::io::AsyncWriteExt as _;
use treeboot_tests::lab::{Lab, LabHost, Plane};
use treeboot_tests::wait::within;

use crate::rate;
use crate::strangers::{self, Strangers};
use crate::support::{import, local, with_lab};

const LIMIT: Duration = Duration::from_secs(240);
/// For a shell and one command.
const SHELL_LIMIT: Duration = Duration::from_secs(60);
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

async fn scenario(lab: &Lab, host: &LabHost) -> Result<()> {
    let vm = |number: &str| format!("{number}-{}", host.plane().name());
    let (one, two) = (vm("one"), vm("two"));
    let first = lab.create_disk(host, &one, "root").await?;
    let second = lab.create_disk(host, &two, "root").await?;
    let run = async |disk: &str, vm: &str| {
        host.sh(&format!(
            "mkdir -p /tmp/vm\nmount -t ext4 '{disk}' /tmp/vm\nchroot /tmp/vm /run {vm}\numount /tmp/vm"
        ))
        .await
    };
    let boot = |vm: &str, number: u32| format!("of {vm}, boot {number}\n");
    ensure!(run(&first, &one).await?.contains(&boot(&one, 1)));
    ensure!(run(&first, &one).await?.contains(&boot(&one, 2)));
    // Another VM's disk over the same base knows nothing of it.
    ensure!(run(&second, &two).await?.contains(&boot(&two, 1)));
    host.reboot(lab.scratch()).await?;
    lab.wait_host_known(host).await?;
    let first = lab.disk(host, &one).await?;
    let third = run(&first, &one).await?;
    ensure!(
        third.contains(&boot(&one, 3)),
        "after the reboot of {}: {third}",
        host.name()
    );
    lab.release_disk(host, &one).await
}

/// What `cargo xtask lab shell` becomes: a shell that finds the programs and the coordinator, and gives its status back.
async fn a_shell_finds_the_programs(lab: &Lab, host: &LabHost) -> Result<()> {
    let mut shell = tokio::process::Command::from(lab.scratch().command(lab.lab_program()?))
        .arg("shell")
        .arg("--state")
        .args([lab.scratch().path().as_os_str(), host.name().as_ref()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let mut input = shell.stdin.take().context("a pipe")?;
    input
        .write_all(b"treeboot host list --json | grep -c h1\nexit 3\n")
        .await?;
    drop(input);
    let output = within(SHELL_LIMIT, "the shell's end", shell.wait_with_output()).await??;
    ensure!(
        output.status.code() == Some(3) && !output.stdout.is_empty(),
        "a shell on {}: {output:?}",
        host.name()
    );
    Ok(())
}

/// A host of each plane. What its hosts are good for besides is shown in the same lab, because a lab takes its time to start: shaped links,
/// strangers that are left alone, and that nothing is left in the end.
#[test]
fn a_root_file_system_runs_from_a_disk_of_either_plane() -> Result<()> {
    with_lab("lab-root", &[Plane::User, Plane::Kernel], LIMIT, async |lab| {
        let image = root_file_system(lab.scratch().path())?;
        import(lab, &image, "root").await?;
        try_join_all(lab.hosts.iter().map(|host| scenario(lab, host))).await?;
        let kernel = &lab.hosts[1];
        a_shell_finds_the_programs(lab, kernel).await?;
        let strangers = Strangers::make(kernel).await?;
        rate::check(lab).await?;
        for vm in ["one-user", "two-user", "one-kernel", "two-kernel"] {
            lab.treeboot(&["vm", "destroy", vm]).await?;
        }
        strangers.are_left_alone(lab, kernel).await?;
        strangers::nothing_of_ours_is_left(kernel).await
    })
}
