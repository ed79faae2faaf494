//! Debian packages that demo, tests and guests need: installed when we are root, named in one line to paste otherwise.
//!
//! Deliberately absent: other distributions' package managers, and removing what was installed.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

/// How long apt waits for another apt to finish, in seconds: unattended upgrades of a fresh machine take about this long.
const LOCK_TIMEOUT_S: u32 = 300;

/// Installs that each remove what another put there end after this many; one suffices where nothing conflicts, two where one does.
const MAX_ROUNDS: usize = 3;

/// The release of Debian that guests are made of where the host is no Debian.
const DEFAULT_RELEASE: &str = "bookworm";

/// Makes sure that all `packages` are installed.
///
/// As root the missing ones are installed by one `apt-get install`, without recommended packages and without questions;
/// the package lists are refreshed first where they are missing or too old for the install. Two xtasks at once wait for
/// each other (apt's own lock).
///
/// # Errors
/// Not root: the error is one line to paste. Not a Debian: the names of what is missing. apt failed: its last words.
pub(crate) fn ensure_packages(packages: &[&str]) -> Result<()> {
    // A package from elsewhere (a backport) that conflicts with a new one is removed by apt, and has to come back in the
    // release's own version: so what is missing is asked again after each install.
    for _ in 0..MAX_ROUNDS {
        let missing = missing(packages)?;
        if missing.is_empty() {
            return Ok(());
        }
        let names = missing.join(" ");
        if !nix::unistd::geteuid().is_root() {
            bail!(
                "needs Debian packages; paste: sudo apt-get update && sudo apt-get install -y --no-install-recommends {names}"
            );
        }
        eprintln!("xtask: installing {names}");
        if install(&missing).is_err() {
            // The lists are absent on a fresh container, or name versions that the mirror no longer has.
            refresh()?;
            install(&missing).with_context(|| format!("could not install {names}"))?;
        }
    }
    let missing = missing(packages)?;
    if missing.is_empty() {
        return Ok(());
    }
    bail!(
        "apt removes {} again whenever it installs the rest; `apt-get install -s {}` says why",
        missing.join(" "),
        packages.join(" ")
    )
}

/// The package that `package` depends on and whose name begins with `prefix`: what a name for "the newest" stands for.
///
/// # Errors
/// The package lists do not hold it.
pub(crate) fn dependency(package: &str, prefix: &str) -> Result<String> {
    let show = || {
        let output = Command::new("apt-cache")
            .args(["show", "--no-all-versions", package])
            .stdin(Stdio::null())
            .output()
            .context("no apt-cache here: not a Debian?")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok::<_, anyhow::Error>(depends(&text, prefix))
    };
    if let Some(found) = show()? {
        return Ok(found);
    }
    refresh()?;
    show()?.with_context(|| format!("the package lists hold no {package}; is this a Debian for amd64?"))
}

fn depends(record: &str, prefix: &str) -> Option<String> {
    let depends = record.lines().find_map(|line| line.strip_prefix("Depends: "))?;
    let names = depends
        .split([',', '|'])
        .map(|one| one.split_whitespace().next().unwrap_or_default());
    names
        .into_iter()
        .find(|name| name.starts_with(prefix))
        .map(str::to_owned)
}

/// The release of Debian that this host runs, and where it gets it from, as lines of a `sources.list`. On another system
/// both are those of [`DEFAULT_RELEASE`], from wherever mmdebstrap finds it.
///
/// # Errors
/// There is no apt.
pub(crate) fn debian_sources() -> Result<(String, String)> {
    let os = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let field = |name: &str| {
        os.lines()
            .find_map(|line| line.strip_prefix(name))
            .map(|value| value.trim_matches('"'))
    };
    let release = match (field("ID="), field("VERSION_CODENAME=")) {
        (Some("debian"), Some(release)) => release,
        _ => return Ok((DEFAULT_RELEASE.into(), String::new())),
    };
    let targets = || {
        let output = Command::new("apt-get")
            .args([
                "indextargets",
                "--format",
                "$(ORIGIN)|$(CODENAME)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)",
            ])
            .arg("Created-By: Packages")
            .stdin(Stdio::null())
            .output()
            .context("no apt-get here")?;
        Ok::<_, anyhow::Error>(sources(&String::from_utf8_lossy(&output.stdout), release))
    };
    let mut lines = targets()?;
    if lines.is_empty() {
        refresh()?;
        lines = targets()?;
    }
    Ok((release.to_owned(), lines))
}

/// Lines of a `sources.list` from what apt has fetched of `release`: its updates too, other releases and vendors not.
fn sources(targets: &str, release: &str) -> String {
    let mut lines = String::new();
    for target in targets.lines() {
        let fields: Vec<&str> = target.split('|').collect();
        let [origin, codename, uri, suite, component] = fields[..] else {
            continue;
        };
        let ours = codename == release
            || codename
                .strip_prefix(release)
                .is_some_and(|rest| rest.starts_with('-'));
        if origin == "Debian" && ours && !codename.ends_with("-backports") {
            let line = format!("deb {uri} {suite} {component}\n");
            if !lines.contains(&line) {
                lines.push_str(&line);
            }
        }
    }
    lines
}

/// Downloads packages and unpacks their files into `dir`, without installing anything. Needs no root.
///
/// # Errors
/// The mirror does not answer or does not have them, or there is no room.
pub(crate) fn unpack(packages: &[&str], dir: &Path) -> Result<()> {
    let downloads = dir.join(".downloads");
    std::fs::create_dir_all(&downloads).with_context(|| format!("cannot make {}", downloads.display()))?;
    let mut args = vec!["-o", "APT::Sandbox::User=root", "download"];
    args.extend(packages);
    if apt_in(&downloads, &args).is_err() {
        refresh()?;
        apt_in(&downloads, &args)?;
    }
    for file in std::fs::read_dir(&downloads)? {
        let file = file?.path();
        let output = Command::new("dpkg-deb")
            .arg("--extract")
            .args([&file, dir])
            .output()?;
        if !output.status.success() {
            bail!(
                "cannot unpack {}: {}",
                file.display(),
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
    }
    Ok(std::fs::remove_dir_all(&downloads)?)
}

/// Fetches the package lists, which only root can.
fn refresh() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("the package lists are missing or old; paste: sudo apt-get update");
    }
    apt(&["update"]).context("could not refresh the package lists")
}

/// Those of `packages` that are not installed, in the same order.
fn missing(packages: &[&str]) -> Result<Vec<String>> {
    let mut missing = Vec::new();
    for &package in packages {
        // One question a package: dpkg-query's exit status for several does not say which one it missed.
        let output = Command::new("dpkg-query")
            .args(["--show", "--showformat=${db:Status-Status}", package])
            .stdin(Stdio::null())
            .output()
            .with_context(|| {
                format!(
                    "no dpkg-query here: not a Debian? Install by hand what stands for: {}",
                    packages.join(" ")
                )
            })?;
        if !(output.status.success() && output.stdout == b"installed") {
            missing.push(package.to_owned());
        }
    }
    Ok(missing)
}

fn install(packages: &[String]) -> Result<()> {
    let mut args = vec!["install", "--yes", "--no-install-recommends"];
    args.extend(packages.iter().map(String::as_str));
    apt(&args)
}

/// One `apt-get` that asks nothing; its output is shown only when it fails.
fn apt(args: &[&str]) -> Result<()> {
    apt_in(Path::new("/"), args)
}

fn apt_in(dir: &Path, args: &[&str]) -> Result<()> {
    let output = Command::new("apt-get")
        .env("DEBIAN_FRONTEND", "noninteractive")
        .current_dir(dir)
        .arg("--quiet=2")
        .args(["-o", &format!("DPkg::Lock::Timeout={LOCK_TIMEOUT_S}")])
        .args(args)
        .stdin(Stdio::null())
        .output()
        .context("no apt-get here")?;
    if output.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = stderr.lines().collect();
    let tail = &lines[lines.len().saturating_sub(5)..];
    bail!("apt-get {} failed: {}", args.join(" "), tail.join(" / "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_come_from_where_the_host_comes_from_and_from_no_other_vendor() {
        let targets = "Debian|bookworm|http://m/debian/|bookworm|main\nDebian|bookworm-security|http://m/s/|bookworm-security|main\n\
                       Debian|bookworm-backports|http://m/debian/|bookworm-backports|main\nOther|bookworm|http://o/|bookworm|main\nrubbish\n";
        assert_eq!(
            sources(targets, "bookworm"),
            "deb http://m/debian/ bookworm main\ndeb http://m/s/ bookworm-security main\n"
        );
    }

    #[test]
    fn the_newest_kernel_is_what_its_name_depends_on() {
        let record = "Package: a\nDepends: x (= 1), linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)\n";
        assert_eq!(
            depends(record, "linux-image-").as_deref(),
            Some("linux-image-6.1.0-56-cloud-amd64")
        );
        assert_eq!(depends("Package: a\n", "linux-"), None);
    }

    #[test]
    fn what_is_installed_is_not_missing_and_what_does_not_exist_is() {
        let Ok(missing) = missing(&["dpkg", "treeboot-no-such-package"]) else {
            println!("SKIPPED: not a Debian");
            return;
        };
        assert_eq!(missing, ["treeboot-no-such-package"]);
    }
}
