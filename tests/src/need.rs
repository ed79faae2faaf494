//! What a test needs of the machine. It fails in CI and says `SKIPPED: reason` on a laptop; it is never silently green.

use std::path::{Path, PathBuf};

/// Something that not every machine has.
#[derive(Debug, Clone, Copy)]
pub enum Need {
    /// The right to make network namespaces and mounts.
    Root,
    /// A program on the PATH, and the Debian package that brings it.
    Program(&'static str, &'static str),
    /// A file below a folder of `/usr/lib`, such as this architecture's, and the Debian package that brings it.
    Library(&'static str, &'static str),
}

/// Where [`Need::Library`] finds a file.
#[must_use]
pub fn library(name: &str) -> Option<PathBuf> {
    let folders = std::fs::read_dir("/usr/lib").ok()?;
    let mut paths = folders.flatten().map(|folder| folder.path().join(name));
    paths.find(|path| path.is_file())
}

impl Need {
    fn missing(self) -> Option<String> {
        match self {
            Self::Root => (!nix::unistd::geteuid().is_root()).then(|| "not root".to_owned()),
            Self::Program(program, package) => {
                let path = std::env::var_os("PATH").unwrap_or_default();
                // tgtd and its like live in sbin, which is not on everybody's PATH.
                let found = std::env::split_paths(&path)
                    .chain([
                        Path::new("/usr/sbin").to_path_buf(),
                        Path::new("/sbin").to_path_buf(),
                    ])
                    .any(|folder| folder.join(program).is_file());
                (!found).then(|| format!("no {program} (apt-get install {package})"))
            }
            Self::Library(name, package) => library(name)
                .is_none()
                .then(|| format!("no {name} (apt-get install {package})")),
        }
    }
}

/// Whether the machine has all that a test needs; where not, prints why the test is skipped.
///
/// # Panics
/// Something is missing, and the environment says that this is CI (`CI` is set).
#[must_use]
pub fn require(needs: &[Need]) -> bool {
    let missing: Vec<String> = needs.iter().filter_map(|need| need.missing()).collect();
    if missing.is_empty() {
        return true;
    }
    let reasons = missing.join(", ");
    assert!(
        std::env::var_os("CI").is_none(),
        "CI lacks what a test needs: {reasons}"
    );
    println!("SKIPPED: {reasons}");
    false
}
