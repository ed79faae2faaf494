//! Runs the built program, and a coordinator and an agent that are played by this test.

// Each test binary uses its own part of this.
#![allow(dead_code)]
// A test that meets what it does not expect panics; clippy knows tests only by their attribute.
#![allow(clippy::unwrap_used)]

pub(crate) mod fake;

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// The longest that any command of these tests may take; a hang fails instead of blocking the suite.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// The built program, deaf to the environment of whoever runs the tests.
pub(crate) fn treeboot() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_treeboot"));
    command
        .env_remove("TREEBOOT_COORDINATOR")
        .env_remove("TREEBOOT_TIMEOUT")
        .stdin(Stdio::null());
    command
}

/// What a run of the program printed and ended with.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) exit: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Run {
    /// Of an output that is there.
    pub(crate) fn of(output: Output) -> Self {
        Self {
            exit: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Of a program that has ended and whose output was not read yet.
    pub(crate) fn of_ended(child: &mut Child) -> Self {
        let read = |from: Option<&mut dyn Read>| {
            let mut text = String::new();
            if let Some(from) = from {
                from.read_to_string(&mut text).unwrap();
            }
            text
        };
        let exit = child.wait().unwrap().code().unwrap_or(-1);
        let stdout = read(child.stdout.as_mut().map(|out| out as &mut dyn Read));
        let stderr = read(child.stderr.as_mut().map(|out| out as &mut dyn Read));
        Self { exit, stdout, stderr }
    }

    /// Standard output as JSON.
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Checks that it ended well.
    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.exit, 0, "{self:?}");
        self
    }

    /// Checks that it failed with this code, that the first line of the error holds these words, and that it says
    /// what to do.
    pub(crate) fn fails(self, exit: i32, words: &[&str]) -> Self {
        assert_eq!(self.exit, exit, "{self:?}");
        let error = self
            .stderr
            .lines()
            .skip_while(|line| !line.starts_with("treeboot: "))
            .collect::<Vec<_>>();
        let first = error
            .first()
            .unwrap_or_else(|| panic!("no line begins with 'treeboot: ': {self:?}"));
        for word in words {
            assert!(first.contains(word), "'{word}' is not in: {first}");
        }
        assert!(error.len() >= 2, "no line says what to do: {self:?}");
        for word in ["Status {", "Os {", "Custom {", "panicked", "RUST_BACKTRACE"] {
            assert!(!self.stderr.contains(word), "a debug dump: {self:?}");
        }
        self
    }
}

/// Runs the program with these arguments.
pub(crate) fn run(arguments: &[&str]) -> Run {
    Run::of(treeboot().args(arguments).output().unwrap())
}

/// Whether a program of a Debian package is there; where `CI` is set it must be.
pub(crate) fn has(program: &str, package: &str) -> bool {
    let there = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
        .any(|folder| folder.join(program).is_file());
    if !there {
        assert!(
            std::env::var_os("CI").is_none(),
            "{program} is not installed (Debian: {package})"
        );
        eprintln!("SKIPPED: {program} is not installed (Debian: {package})");
    }
    there
}

/// Runs another program, which must succeed; the answer is its standard output.
pub(crate) fn tool(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {errors}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Waits for a condition.
pub(crate) fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(
            begun.elapsed() < DEADLINE,
            "{what} did not happen within {DEADLINE:?}"
        );
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

/// The path as text.
pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
