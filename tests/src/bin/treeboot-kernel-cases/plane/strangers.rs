//! Things of others that look like ours.

use std::process::Command;

use treeboot_agent::conformance::{self, Rig as _};
use treeboot_agent::plane::Scope;
use treeboot_agent::stack::Found;
use treeboot_dm::group::Kind;

use super::rig;

fn command(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().expect("started");
    assert!(
        output.status.success(),
        "{program} {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// A device with the name of a VM's disk and a base, and a loop device over a file in our directory, made by somebody else.
pub(super) async fn are_left_alone() {
    let rig = rig::rig(Some(Kind::Bcache)).await;
    let base = format!("treeboot:base:{}", "ab".repeat(32));
    let names = [base.as_str(), "treeboot:disk:somebodys", "treeboot-disk-vm-0"];
    for name in names {
        command(
            "dmsetup",
            &[
                "create",
                name,
                "--uuid",
                &format!("OTHER-{name}"),
                "--table",
                "0 8 zero",
            ],
        );
    }
    let file = rig.dir.join("cache").join("somebodys");
    std::fs::write(&file, [0; 8192]).expect("written");
    let file = file.display().to_string();
    let device = command("losetup", &["--find", "--show", &file]);

    let look = async || rig.plane().inspect(&Scope::All).await.expect("a look");
    assert_eq!(look().await, Found::default(), "none of it is seen");
    conformance::build_and_remove(&rig).await;
    assert_eq!(look().await, Found::default());

    for name in names {
        assert_eq!(command("dmsetup", &["table", name]), "0 8 zero");
        command("dmsetup", &["remove", name]);
    }
    assert!(command("losetup", &["--noheadings", "--output", "BACK-FILE", &device]).contains("somebodys"));
    command("losetup", &["--detach", &device]);
    std::fs::remove_file(&file).expect("removed");
    assert_eq!(rig.residue().await, Vec::<String>::new());
}
