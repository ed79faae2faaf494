//! The multi-VM lab in `vagrant/`: what can be checked of it without a hypervisor. `vagrant/README.md` says what was tried with one.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context as _, Result};
use treeboot_tests::binaries::Binaries;
use treeboot_tests::need::{Need, require};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../vagrant")
}

fn run(command: &mut Command) -> Result<Output> {
    let program = command.get_program().to_string_lossy().into_owned();
    command
        .current_dir(folder())
        .output()
        .with_context(|| format!("could not start {program}"))
}

fn words(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

#[test]
fn the_shell_scripts_have_no_lint() -> Result<()> {
    if !require(&[Need::Program("shellcheck", "shellcheck")]) {
        return Ok(());
    }
    let output = run(Command::new("shellcheck").args(["box.sh", "provision.sh", "test.sh"]))?;
    assert!(output.status.success(), "{}", words(&output));
    Ok(())
}

#[test]
fn vagrant_takes_the_file_for_each_number_of_hosts_and_either_plane() -> Result<()> {
    if !require(&[Need::Program("vagrant", "vagrant")]) {
        return Ok(());
    }
    let programs = Binaries::locate()?.folder().to_path_buf();
    let home = tempfile::tempdir()?;
    let validate = |hosts: &str, plane: &str| {
        run(Command::new("vagrant")
            .args(["validate", "--ignore-provider"])
            .env("TREEBOOT_PROGRAMS", &programs)
            .env("TREEBOOT_HOSTS", hosts)
            .env("TREEBOOT_PLANE", plane)
            // Where vagrant keeps what it knows of a person and of this folder.
            .env("VAGRANT_HOME", home.path().join("home"))
            .env("VAGRANT_DOTFILE_PATH", home.path().join("dot"))
            .env("HOME", home.path()))
    };
    for (hosts, plane) in [("4", "user"), ("1", "kernel")] {
        let output = validate(hosts, plane)?;
        assert!(output.status.success(), "{}", words(&output));
    }
    for (hosts, plane, said) in [
        ("0", "user", "TREEBOOT_HOSTS=0"),
        ("4", "none", "TREEBOOT_PLANE=none"),
    ] {
        let output = validate(hosts, plane)?;
        assert!(!output.status.success());
        assert!(words(&output).contains(said), "{}", words(&output));
    }
    Ok(())
}

#[test]
fn the_script_of_both_labs_refuses_what_it_does_not_know() -> Result<()> {
    let cases: [(&[&str], &str); 4] = [
        (&[], "Usage:"),
        (&["prepare", "more"], "Usage:"),
        (&["run", "host", "h1", "10.0.0.1"], "Usage:"),
        (
            &["run", "guest", "h1", "10.0.0.1", "http://10.0.0.254:7400"],
            "'guest' is not a role",
        ),
    ];
    for (args, said) in cases {
        let output = run(Command::new("bash").arg("provision.sh").args(args))?;
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(words(&output).contains(said), "{args:?}: {}", words(&output));
    }
    Ok(())
}
