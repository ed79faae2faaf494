//! Where the workspace is, and cargo runs in it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

/// The workspace's root: cargo tells it to whatever it runs.
///
/// # Errors
/// xtask was not started by cargo.
pub(crate) fn root() -> Result<PathBuf> {
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR").context("start it as `cargo xtask`")?;
    let root = Path::new(&manifest)
        .parent()
        .context("the manifest of xtask has no folder above it")?;
    Ok(root.to_path_buf())
}

/// Where cargo puts what it builds.
///
/// # Errors
/// As [`root`].
pub(crate) fn target_dir() -> Result<PathBuf> {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => Ok(root()?.join(dir)),
        None => Ok(root()?.join("target")),
    }
}

/// The cargo that started xtask, to be run at the root as a person would run it there: what cargo told xtask of its own package would have
/// some dependencies built again, whose build scripts look at these variables.
///
/// # Errors
/// As [`root`].
pub(crate) fn cargo() -> Result<Command> {
    at_the_root(Command::new(program()))
}

/// As [`cargo`], for what takes the processor only where nobody else wants it.
///
/// # Errors
/// As [`root`].
pub(crate) fn patient_cargo() -> Result<Command> {
    let mut nice = Command::new("nice");
    nice.args(["-n", "19"]).arg(program());
    at_the_root(nice)
}

fn program() -> std::ffi::OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

fn at_the_root(mut cargo: Command) -> Result<Command> {
    cargo.current_dir(root()?);
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            cargo.env_remove(&name);
        }
    }
    Ok(cargo)
}

/// Runs a command to its end, its output ours.
///
/// # Errors
/// It could not be started, or did not end well; the error holds the whole command line.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("could not start {command:?}"))?;
    if !status.success() {
        bail!("{} ended with {status}", line_of(command));
    }
    Ok(())
}

fn line_of(command: &Command) -> String {
    let mut line = Path::new(command.get_program())
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    for argument in command.get_args() {
        line.push(' ');
        line.push_str(&argument.to_string_lossy());
    }
    line
}
