//! The daemons' configuration file, as a person meets it.

use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context as _, Result, ensure};
use treeboot_tests::binaries::Binaries;

/// Runs `PROGRAM --config FILE ARGUMENTS`, with nothing of ours in the environment but `variable`.
fn run(program: &Path, file: &Path, arguments: &[&str], variable: Option<(&str, &str)>) -> Result<Output> {
    let mut command = Command::new(program);
    command
        .env_clear()
        .envs(variable)
        .arg("--config")
        .arg(file)
        .args(arguments);
    command
        .output()
        .with_context(|| format!("could not start {}", program.display()))
}

/// Who said what of a daemon's options.
fn settings(output: &Output) -> Result<Vec<(String, String, String)>> {
    let words = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{words}");
    let json: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let list = json["settings"].as_array().context("a list")?;
    let word = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    Ok(list
        .iter()
        .map(|setting| {
            let values = setting["values"].as_array().into_iter().flatten();
            let values: Vec<String> = values.map(word).collect();
            (word(&setting["key"]), word(&setting["from"]), values.join(" "))
        })
        .collect())
}

#[test]
fn an_option_of_a_daemon_may_stand_in_a_file_and_check_says_who_said_what() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let binaries = Binaries::locate()?;
    let file = folder.path().join("agent.toml");
    std::fs::write(
        &file,
        "name = 'h1'\nstate = 'state'\nweight = 3\n[label]\nrack = 'a'\n",
    )?;
    let check = ["--weight", "2", "config", "check", "--json"];
    let variable = Some(("TREEBOOT_LISTEN", "127.0.0.1:7"));
    let told = settings(&run(&binaries.agent(), &file, &check, variable)?)?;
    for expected in [
        ("name", "file", "h1"),
        ("label", "file", "rack=a"),
        ("weight", "flag", "2"),
        ("listen", "environment", "127.0.0.1:7"),
        ("coordinator", "default", "http://127.0.0.1:7400"),
    ] {
        let expected = (expected.0.into(), expected.1.into(), expected.2.into());
        ensure!(told.contains(&expected), "{expected:?} is not in {told:?}");
    }
    ensure!(!folder.path().join("state").exists(), "a check made the state");
    Ok(())
}

#[test]
fn a_file_that_a_start_would_refuse_is_refused_by_check_with_the_name() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let program = Binaries::locate()?.coordinator();
    let file = folder.path().join("coordinator.toml");
    for (text, expected) in [
        (
            "state = 's'\nbeat = 1",
            "there is no option 'beat'; did you mean 'beat-ms'?",
        ),
        ("state = 's'\nbeat-ms = 'soon'", "'beat-ms' stands in"),
        ("state = 's'\nlease-ms = 1", "lease"),
        ("state = ", "is not TOML"),
    ] {
        std::fs::write(&file, text)?;
        for arguments in [&["config", "check"][..], &[]] {
            let output = run(&program, &file, arguments, None)?;
            let words = String::from_utf8_lossy(&output.stderr);
            ensure!(!output.status.success(), "{text}: {words}");
            ensure!(words.contains(expected), "{text}: {words}");
        }
    }
    Ok(())
}
