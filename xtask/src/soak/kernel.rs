//! `cargo xtask soak kernel`: the kernel plane's stack with each step of building and removing failed and cut off, agents killed, cache
//! devices that fail, and the real agent killed at each moment of each verb, in user-mode Linux guests. It needs root and the packages of
//! `cargo xtask lab`.

use std::path::Path;

use anyhow::Result;

use super::{Outcome, log_of, logged};
use crate::workspace;

/// Runs it once, whatever it takes.
///
/// # Errors
/// cargo cannot be started.
pub(super) fn run(logs: &Path) -> Result<Outcome> {
    let mut cargo = workspace::cargo()?;
    cargo.args([
        "test",
        "--locked",
        "-p",
        "treeboot-tests",
        "--features",
        "kernel-plane",
        "--test",
        "kernel",
        "--",
        "--ignored",
        "--nocapture",
    ]);
    let log = log_of(logs, super::KERNEL);
    let (well, took, text) = logged(&mut cargo, &log)?;
    let ours = |line: &&str| {
        ["plane-faults: ", "plane-steps: "]
            .iter()
            .any(|group| line.starts_with(group))
    };
    for line in text.lines().filter(ours).filter(|line| line.contains(" kills, ")) {
        println!("{line}");
    }
    let cases = text.lines().filter(ours).filter(|line| line.ends_with(" ok"));
    let skipped = text.contains("SKIPPED");
    Ok(Outcome {
        name: super::KERNEL,
        seconds: took.as_secs(),
        executions: Some(cases.count() as u64),
        corpus: None,
        finding: (!well || skipped).then(|| format!("see {}", log.display())),
    })
}
