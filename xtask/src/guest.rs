//! `cargo xtask guest`: disk images that boot through firmware from the disk, built once and kept.
//!
//! - [`busybox`]: boots in seconds, runs small jobs that tests ask for.
//! - [`debian`]: a real Debian with systemd and sshd.
//!
//! What they print and obey stands in `docs/guests.md`. Deliberately absent: a change of an image in place. A recipe that
//! changes gets another name; images that other recipes left are removed when a new one is done.

mod busybox;
mod cpio;
mod debian;
mod disk;

use std::fs::File;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use nix::fcntl::{Flock, FlockArg};

/// Raised when the code that builds changes what comes out.
const RECIPE: u32 = 1;
/// Names another folder for the images than `target/guest`.
const DIR_VARIABLE: &str = "TREEBOOT_GUEST_DIR";

/// Builds and finds the guests' disk images.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Builds a guest's image unless it is there, and prints its path.
    Build {
        /// Which guest.
        #[arg(value_enum)]
        kind: Kind,
    },
    /// Prints which guests there are, and which are built.
    List,
    /// Prints the path of a guest's image; fails if it is not built.
    Path {
        /// Which guest.
        #[arg(value_enum)]
        kind: Kind,
    },
}

/// A guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Kind {
    /// A kernel and a busybox: up in seconds.
    Busybox,
    /// Debian with systemd.
    Debian,
}

impl Kind {
    const ALL: [Self; 2] = [Self::Busybox, Self::Debian];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Busybox => "busybox",
            Self::Debian => "debian",
        }
    }

    /// Everything of ours that the image is made of.
    fn recipe(self) -> &'static [&'static str] {
        match self {
            Self::Busybox => busybox::RECIPE,
            Self::Debian => debian::RECIPE,
        }
    }
}

/// # Errors
/// A guest cannot be built, or is not there.
pub(crate) fn run(args: Args) -> Result<()> {
    match args.verb {
        Verb::Build { kind } => println!("{}", ensure(kind)?.display()),
        Verb::List => {
            for kind in Kind::ALL {
                let image = image(kind)?;
                match std::fs::metadata(&image) {
                    Ok(file) => println!(
                        "{}\t{} MiB\t{}",
                        kind.name(),
                        file.blocks() / 2048,
                        image.display()
                    ),
                    Err(_) => println!("{}\tnot built", kind.name()),
                }
            }
        }
        Verb::Path { kind } => {
            let image = image(kind)?;
            if !image.exists() {
                bail!(
                    "the {0} guest is not built; run: cargo xtask guest build {0}",
                    kind.name()
                );
            }
            println!("{}", image.display());
        }
    }
    Ok(())
}

/// The guest's image, built if it is not there. Two builds at once wait for each other.
///
/// # Errors
/// Packages are missing and we are not root, the mirror does not answer, or there is no room.
pub(crate) fn ensure(kind: Kind) -> Result<PathBuf> {
    let image = image(kind)?;
    if image.exists() {
        return Ok(image);
    }
    let dir = image.parent().context("an image has a folder")?;
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let lock = dir.join(format!("{}.lock", kind.name()));
    let lock = File::create(&lock).with_context(|| format!("cannot make {}", lock.display()))?;
    let lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, error)| error)?;
    if image.exists() {
        return Ok(image);
    }
    eprintln!(
        "xtask: building the {} guest, once; this takes up to two minutes",
        kind.name()
    );
    let work = tempfile::Builder::new()
        .prefix(&format!("{}-", kind.name()))
        .tempdir_in(dir)
        .with_context(|| format!("cannot make a folder in {}", dir.display()))?;
    let draft = work.path().join("disk.raw");
    match kind {
        Kind::Busybox => busybox::build(work.path(), &draft),
        Kind::Debian => debian::build(work.path(), &draft),
    }
    .with_context(|| format!("cannot build the {} guest", kind.name()))?;
    std::fs::rename(&draft, &image).with_context(|| format!("cannot make {}", image.display()))?;
    remove_others(kind, &image, dir)?;
    drop(lock);
    Ok(image)
}

/// Where the image is, or would be.
fn image(kind: Kind) -> Result<PathBuf> {
    let dir = match std::env::var_os(DIR_VARIABLE) {
        Some(dir) => std::path::absolute(dir)?,
        None => crate::workspace::target_dir()?.join("guest"),
    };
    Ok(dir.join(format!("{}-{:016x}.raw", kind.name(), key(kind))))
}

/// A number that changes with the recipe. A newer Rust may number otherwise; then the guest is built once more.
fn key(kind: Kind) -> u64 {
    let mut hasher = DefaultHasher::new();
    (RECIPE, kind.recipe(), disk::RECIPE).hash(&mut hasher);
    hasher.finish()
}

/// Removes the images that older recipes made, which nothing would name any more.
fn remove_others(kind: Kind, image: &Path, dir: &Path) -> Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let ours = name
            .strip_prefix(kind.name())
            .is_some_and(|rest| rest.starts_with('-') && rest.ends_with(".raw"));
        if ours && path != image {
            std::fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// Runs a command to its end in silence; its last words are the error.
fn quietly(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(std::process::Stdio::null()).output();
    let output = output.with_context(|| format!("cannot run {program}"))?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        let lines: Vec<&str> = words.lines().collect();
        bail!(
            "{program} ended with {}: {}",
            output.status,
            lines[lines.len().saturating_sub(8)..].join(" / ")
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A path as an argument inside a longer text.
fn text(path: &Path) -> Result<&str> {
    path.to_str()
        .with_context(|| format!("{} is not UTF-8", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_guest_has_a_name_of_its_own() {
        assert_ne!(key(Kind::Busybox), key(Kind::Debian));
        assert_eq!(key(Kind::Debian), key(Kind::Debian));
    }
}
