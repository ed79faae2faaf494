//! What others have in LIO and open-iscsi, some of it under names that look like ours.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use treeboot_iscsi::lio::{CONFIGFS, LioError};
use treeboot_iscsi::target::Access;
use treeboot_types::Iqn;

use super::bench::{self, Bench, OWN_NAME};

/// All of a folder, as `find` would list it.
fn listing(path: &str) -> Result<String> {
    Ok(String::from_utf8(
        Command::new("find").arg(path).output()?.stdout,
    )?)
}

pub(crate) fn strangers_are_left_alone() -> Result<()> {
    let bench = Bench::new("strangers")?;
    let root = PathBuf::from(CONFIGFS).join("target");
    // A backstore with our prefix in another's HBA, one with another name in one of ours, and a target of our grammar over the first.
    let file = PathBuf::from("/run/treeboot-cases/strangers/other.img");
    fs::write(&file, vec![5; 1 << 20])?;
    let backstore = root.join("core/fileio_0/treeboot-mine");
    fs::create_dir_all(&backstore)?;
    fs::write(
        backstore.join("control"),
        format!("fd_dev_name={},fd_dev_size=1048576", file.display()),
    )?;
    fs::write(backstore.join("enable"), "1")?;
    let in_ours = root.join("core/fileio_26111/somebody-elses");
    fs::create_dir_all(&in_ours)?;
    let taken = Iqn::of_image(&"taken@1".parse()?);
    let group = root.join("iscsi").join(taken.as_str()).join("tpgt_1");
    let lun = group.join("lun/lun_0");
    fs::create_dir_all(root.join("iscsi"))?;
    fs::create_dir_all(&lun)?;
    symlink(&backstore, lun.join("x"))?;
    let portal = group.join("np/127.0.0.1:3261");
    fs::create_dir(&portal)?;
    fs::write(group.join("attrib/generate_node_acls"), "1")?;
    fs::write(group.join("attrib/authentication"), "0")?;
    fs::write(group.join("enable"), "1")?;
    // Names that only begin like ours.
    let alike = root.join("iscsi/iqn.2026-11.dev.treebooter:image:a:1/tpgt_1");
    fs::create_dir_all(&alike)?;
    // The machine's own session and record, to that target and, by record, to ours.
    let own = |args: &[&str]| {
        bench::command(
            "iscsiadm",
            &[
                &["-m", "node", "-T", taken.as_str(), "-p", "127.0.0.1:3261,1"],
                args,
            ]
            .concat(),
        )
    };
    own(&["-o", "new"])?;
    own(&["--login"])?;
    let before = (
        listing(&format!("{CONFIGFS}/target"))?,
        listing("/etc/iscsi/nodes")?,
    );

    ensure!(bench.lio.found()?.targets.is_empty() && bench.lio.found()?.backstores.is_empty());
    let (data, hashes, mut export) = bench.wanted(false, Access::Anyone);
    export.name = taken.clone();
    bench.lio.ensure_backstore(&data)?;
    bench.lio.ensure_backstore(&hashes)?;
    for error in [
        bench.lio.ensure_target(&export).err(),
        bench.lio.remove_target(&taken, Duration::ZERO).err(),
    ] {
        let error = error.context("a stranger's target was taken for ours")?;
        ensure!(matches!(error, LioError::Stranger { .. }), "{error}");
    }
    export.name = Iqn::new("iqn.2026-11.dev.treebooter:image:a:1")?;
    let error = bench
        .lio
        .ensure_target(&export)
        .err()
        .context("a name outside of the grammar")?;
    ensure!(matches!(error, LioError::NotOurs(_)), "{error}");
    // All that ours do, beside them.
    bench.export(false, Access::Anyone)?;
    bench.initiator.login(&bench.endpoint(), None, &[0, 1])?;
    let sessions = fs::read_dir("/sys/class/iscsi_session")?.count();
    ensure!(sessions == 2 && bench.initiator.sessions()?.len() == 1);
    bench.remove()?;
    ensure!(
        before
            == (
                listing(&format!("{CONFIGFS}/target"))?,
                listing("/etc/iscsi/nodes")?
            ),
        "something of others changed"
    );
    let mut names = Vec::new();
    for session in fs::read_dir("/sys/class/iscsi_session")?.flatten() {
        names.push(
            fs::read_to_string(session.path().join("initiatorname"))?
                .trim()
                .to_owned(),
        );
    }
    ensure!(names == [OWN_NAME], "{names:?}");

    // Its owner cleans up.
    own(&["--logout"])?;
    own(&["-o", "delete"])?;
    fs::write(group.join("enable"), "0")?;
    fs::remove_dir(portal)?;
    fs::remove_file(lun.join("x"))?;
    let alike_target = alike.parent().context("it has one")?.to_path_buf();
    let target = group.parent().context("it has one")?.to_path_buf();
    for folder in [
        lun,
        group,
        target,
        alike,
        alike_target,
        backstore,
        root.join("core/fileio_0"),
        in_ours,
    ] {
        fs::remove_dir(&folder).with_context(|| folder.display().to_string())?;
    }
    bench.end()
}
