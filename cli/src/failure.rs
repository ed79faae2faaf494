//! What a person or a script is told when something did not work: one line that says what failed and with which
//! name, one that says what to do, and an exit code.
//!
//! Errors inside the crate are enums of facts; they become a [`Failure`] where the verb is known.

use std::fmt;
use std::process::ExitCode;

/// The exit codes of the program. They are an interface: `docs/cli.md` and `--help` list them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// It failed, for a reason that has no code of its own.
    Failed = 1,
    /// The command line is not valid: an option, a name, a number.
    Usage = 2,
    /// An image, a host, a VM or a file is not there.
    NotFound = 3,
    /// There is something of that name already, or the port is taken.
    Exists = 4,
    /// The coordinator or an agent cannot be reached.
    Unreachable = 5,
    /// Of several things some were done and some failed.
    Partly = 6,
    /// The present state does not allow it: an image in use, a host that runs no VMs.
    Refused = 7,
    /// It was not done within the time allowed.
    TimedOut = 8,
    /// No room left on a disk, or a limit is reached.
    NoRoom = 9,
    /// Ended by SIGINT or SIGTERM.
    Interrupted = 130,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Why a verb failed, in words for a person.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    /// What the program exits with.
    pub(crate) exit: Exit,
    /// What failed, with which name.
    pub(crate) what: String,
    /// What to do about it.
    pub(crate) advice: Option<String>,
}

impl Failure {
    /// A failure without advice.
    pub(crate) fn new(exit: Exit, what: impl Into<String>) -> Self {
        Self {
            exit,
            what: what.into(),
            advice: None,
        }
    }

    /// The same with what to do about it.
    pub(crate) fn advice(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }

    /// The failure of an input or output operation on what `what` names.
    pub(crate) fn io(what: impl fmt::Display, error: &std::io::Error) -> Self {
        use std::io::ErrorKind;
        let (exit, advice) = match error.kind() {
            ErrorKind::NotFound => (Exit::NotFound, "check the path"),
            ErrorKind::PermissionDenied => (
                Exit::Refused,
                "run as a user who may, or change the file's permissions",
            ),
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
                (Exit::NoRoom, "make room there, or choose another place")
            }
            _ => return Self::new(Exit::Failed, format!("{what}: {}", io_words(error))),
        };
        Self::new(exit, format!("{what}: {}", io_words(error))).advice(advice)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "treeboot: {}", self.what)?;
        match &self.advice {
            Some(advice) => write!(f, "\n  {advice}"),
            None => Ok(()),
        }
    }
}

/// The operating system's reason without its number: `no such file or directory`.
pub(crate) fn io_words(error: &std::io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or(&text);
    let mut letters = text.chars();
    match letters.next() {
        // "I/O error" keeps its capitals; "Connection refused" continues a sentence.
        Some(first)
            if letters
                .clone()
                .next()
                .is_some_and(|second| second.is_ascii_lowercase()) =>
        {
            first.to_ascii_lowercase().to_string() + letters.as_str()
        }
        _ => text.to_owned(),
    }
}

/// An error and its causes, joined by colons; a cause whose text its effect already holds is left out.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let words = match error.downcast_ref::<std::io::Error>() {
            Some(io) => io_words(io),
            None => error.to_string(),
        };
        if !text.to_lowercase().contains(&words.to_lowercase()) {
            text = format!("{text}: {words}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_one_line_of_what_and_one_of_advice() {
        let failure =
            Failure::new(Exit::NotFound, "there is no image 'a'").advice("see: treeboot image list");
        assert_eq!(
            failure.to_string(),
            "treeboot: there is no image 'a'\n  see: treeboot image list"
        );
    }

    #[test]
    fn the_operating_systems_words_have_no_numbers() {
        let error = std::io::Error::from_raw_os_error(2);
        assert_eq!(io_words(&error), "no such file or directory");
        assert_eq!(Failure::io("cannot open 'x'", &error).exit, Exit::NotFound);
    }
}
