//! An authority for a rig of daemons: made by the programs that a person would use.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use treeboot_identity::tls::Dialer;
use treeboot_identity::{Credentials, Holder, Who};
use treeboot_types::HostName;

use crate::binaries::Binaries;
use crate::daemon::Daemon;
use crate::scratch::Scratch;

/// Where an admin's identity lies in a rig's folder.
#[must_use]
pub fn admin_path(scratch: &Scratch) -> PathBuf {
    scratch.path().join("admin.pem")
}

/// Makes the authority in the coordinator's state directory, and an admin whose identity the coordinator's own client shows from now on;
/// gives a token that lets in so many hosts.
///
/// # Errors
/// `treeboot-coordinator` did not succeed; the error holds its words.
pub fn make(
    scratch: &Scratch,
    binaries: &Binaries,
    state: &Path,
    coordinator: &Daemon,
    hosts: usize,
) -> Result<String> {
    let say = |args: &[&str]| says(scratch, binaries, state, args);
    say(&["init"])?;
    let token = say(&["token", "create", "--ttl", "1d", "--uses", &hosts.to_string()])?;
    let admin = say(&["user", "create", "admin", "--role", "admin"])?;
    std::fs::write(admin_path(scratch), admin)?;
    coordinator.set_dialer(Dialer::mutual(&holder(scratch)?, Who::Coordinator)?);
    Ok(token.trim().to_owned())
}

/// Has the tests' client of an agent show the admin's identity.
///
/// # Errors
/// [`make`] was not called, or the agent's name is none.
pub fn trust(scratch: &Scratch, agent: &Daemon) -> Result<()> {
    let who = Who::Host(HostName::new(agent.name())?);
    agent.set_dialer(Dialer::mutual(&holder(scratch)?, who)?);
    Ok(())
}

fn holder(scratch: &Scratch) -> Result<Holder> {
    let admin = Credentials::load(&admin_path(scratch))?.context("there is no admin yet")?;
    Ok(Holder::new(admin))
}

/// Runs `treeboot-coordinator` with a verb on a state directory; gives its standard output.
///
/// # Errors
/// It did not succeed; the error holds its words.
pub fn says(scratch: &Scratch, binaries: &Binaries, state: &Path, args: &[&str]) -> Result<String> {
    let mut command = scratch.command(binaries.coordinator());
    let output = command
        .args(args)
        .env("TREEBOOT_STATE", state)
        .output()
        .context("could not start treeboot-coordinator")?;
    if !output.status.success() {
        bail!(
            "treeboot-coordinator {} ended with {}: {}",
            args.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8(output.stdout)?)
}
