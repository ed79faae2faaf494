//! Where the programs under test are.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

/// The folder that holds the programs, told by whoever built them (`cargo xtask`).
pub const BIN_DIR: &str = "TREEBOOT_BIN_DIR";

/// The workspace's programs, all of one build.
#[derive(Debug, Clone)]
pub struct Binaries {
    folder: PathBuf,
}

impl Binaries {
    /// Those that [`BIN_DIR`] names; without it, those of the target folder this program lies in, brought up to date first.
    ///
    /// # Errors
    /// They cannot be built or are not there.
    pub fn locate() -> Result<Self> {
        if let Some(folder) = std::env::var_os(BIN_DIR) {
            return Self::in_folder(PathBuf::from(folder));
        }
        // target/PROFILE/deps/processes-1234 or target/PROFILE/treeboot-demo
        let own = std::env::current_exe().context("this program does not know where it is")?;
        let mut folder = own.parent().context("a program lies in a folder")?.to_path_buf();
        if folder.ends_with("deps") {
            folder.pop();
        }
        build(&folder)?;
        Self::in_folder(folder)
    }

    fn in_folder(folder: PathBuf) -> Result<Self> {
        for program in ["treeboot", "treeboot-coordinator", "treeboot-agent"] {
            let path = folder.join(program);
            if !path.is_file() {
                bail!(
                    "{} is not there; `cargo build --workspace` makes it",
                    path.display()
                );
            }
        }
        Ok(Self { folder })
    }

    /// The folder they are in.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The daemon that places hosts.
    #[must_use]
    pub fn coordinator(&self) -> PathBuf {
        self.folder.join("treeboot-coordinator")
    }

    /// The daemon on every host.
    #[must_use]
    pub fn agent(&self) -> PathBuf {
        self.folder.join("treeboot-agent")
    }

    /// What a person types.
    #[must_use]
    pub fn cli(&self) -> PathBuf {
        self.folder.join("treeboot")
    }

    /// A program of the tests' own, by its name.
    ///
    /// # Errors
    /// It is not built.
    pub fn test_program(&self, name: &str) -> Result<PathBuf> {
        let path = self.folder.join(name);
        if !path.is_file() {
            bail!(
                "{} is not there; `cargo build -p treeboot-tests --features kernel-plane --bins` makes it",
                path.display()
            );
        }
        Ok(path)
    }

    /// Where tests leave what a failure's reader needs: beside the programs.
    #[must_use]
    pub fn evidence(&self) -> PathBuf {
        self.folder.join("evidence")
    }
}

/// Runs cargo once a process; with the features of the whole workspace, so that it finds everything built already.
fn build(folder: &Path) -> Result<()> {
    static BUILT: parking_lot::Mutex<bool> = parking_lot::Mutex::new(false);
    let mut built = BUILT.lock();
    if *built {
        return Ok(());
    }
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--workspace", "--all-targets", "--quiet"]);
    if cfg!(feature = "kernel-plane") {
        cargo.args(["--features", "kernel-plane"]);
    }
    if folder.ends_with("release") {
        cargo.arg("--release");
    }
    let status = cargo
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()
        .context("could not start cargo")?;
    if !status.success() {
        bail!("cargo build ended with {status}");
    }
    *built = true;
    Ok(())
}
