//! The serial console, as QEMU writes it to a file: what it says about readiness, failure and disk errors.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use treeboot_types::VmName;

/// Longest line that is looked at; the rest of a longer one counts as lines of its own.
const MAX_LINE_BYTES: usize = 4096;
/// Most bytes taken at one look, so that a babbling guest does not hold up its host.
const MAX_READ_BYTES: usize = 1024 * 1024;
/// Most lines that [`io_errors`] returns.
const MAX_ERRORS: usize = 100;

/// What treeboot's own guests write once they are up, for [`Readiness::Console`](crate::Readiness::Console).
pub fn ready_line(name: &VmName) -> String {
    format!("treeboot: {name} is up")
}

/// What a guest says that will not come up any more.
const FAILURES: &[&str] = &[
    "Kernel panic - not syncing",
    "Attempted to kill init",
    "You are in emergency mode",
    "Give root password for maintenance",
    // initramfs-tools, when the root file system does not appear.
    "Dropping to a shell!",
    // GRUB, without its configuration or its disk.
    "grub rescue>",
];

/// What a guest says whose disk has failed it.
const IO_ERRORS: &[&str] = &[
    "I/O error",
    "treeboot: io error",
    "EXT4-fs error",
    "EXT4-fs warning",
    "Remounting filesystem read-only",
    "JBD2: Error",
    "blocked for more than",
];

/// The lines of a console file that report a disk error to the guest's kernel or to treeboot's guest, at most 100 of them.
///
/// # Errors
/// The file cannot be read.
pub fn io_errors(console: &Path) -> std::io::Result<Vec<String>> {
    let mut tail = Tail::new(console.into());
    let mut errors = Vec::new();
    loop {
        let lines = tail.lines()?;
        if lines.is_empty() || errors.len() >= MAX_ERRORS {
            errors.truncate(MAX_ERRORS);
            return Ok(errors);
        }
        errors.extend(
            lines
                .into_iter()
                .filter(|line| IO_ERRORS.iter().any(|text| line.contains(text))),
        );
    }
}

/// What a line means for a VM that is awaited.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Ready(String),
    Failed(String),
}

/// The first line that decides.
pub(crate) fn verdict(lines: &[String], ready: &[String]) -> Option<Verdict> {
    lines.iter().find_map(|line| {
        if ready.iter().any(|text| line.contains(text.as_str())) {
            Some(Verdict::Ready(line.clone()))
        } else if FAILURES.iter().any(|text| line.contains(text)) {
            Some(Verdict::Failed(line.clone()))
        } else {
            None
        }
    })
}

/// Reads a growing file.
pub(crate) struct Tail {
    path: PathBuf,
    offset: u64,
    /// The line that has not ended yet.
    partial: Vec<u8>,
}

impl Tail {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self {
            path,
            offset: 0,
            partial: Vec::new(),
        }
    }

    /// The lines that have come since the last call, without colours. The last may still be growing (a prompt does not
    /// end): it is returned again when it has grown. Empty: nothing new.
    pub(crate) fn lines(&mut self) -> std::io::Result<Vec<String>> {
        let file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut buffer = vec![0; 16 * 1024];
        let mut lines = Vec::new();
        let mut taken = 0;
        while taken < MAX_READ_BYTES {
            let read = file.read_at(&mut buffer, self.offset)?;
            if read == 0 {
                break;
            }
            self.offset += read as u64;
            taken += read;
            for &byte in &buffer[..read] {
                if byte == b'\n' || self.partial.len() == MAX_LINE_BYTES {
                    lines.push(plain(&self.partial));
                    self.partial.clear();
                }
                if byte != b'\n' {
                    self.partial.push(byte);
                }
            }
        }
        if taken > 0 && !self.partial.is_empty() {
            lines.push(plain(&self.partial));
        }
        Ok(lines)
    }
}

/// A line without terminal sequences and control characters.
fn plain(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(line);
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c == '\u{1b}' {
            // CSI sequences end with a letter or '~'; of others one character is dropped.
            if chars.next() == Some('[') {
                for c in chars.by_ref() {
                    if ('@'..='~').contains(&c) {
                        break;
                    }
                }
            }
        } else if !c.is_control() {
            out.push(c);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn ready(name: &str) -> Vec<String> {
        vec![ready_line(&VmName::new(name).expect("valid"))]
    }

    #[test]
    fn a_name_is_not_taken_for_a_longer_one() {
        let lines = ["[  1.0] x".to_owned(), "treeboot: vm-10 is up".to_owned()];
        assert_eq!(verdict(&lines, &ready("vm-1")), None);
        assert_eq!(
            verdict(&lines, &ready("vm-10")),
            Some(Verdict::Ready(lines[1].clone()))
        );
    }

    #[test]
    fn the_first_deciding_line_decides() {
        let lines = [
            "Kernel panic - not syncing: VFS".to_owned(),
            "treeboot: a is up".to_owned(),
        ];
        assert!(matches!(verdict(&lines, &ready("a")), Some(Verdict::Failed(_))));
    }

    #[test]
    fn a_growing_file_is_read_once_colours_and_prompts_included() {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        let mut tail = Tail::new(file.path().into());
        assert!(tail.lines().expect("reads").is_empty());
        file.write_all(b"\x1b[0;32m  OK  \x1b[0m up\r\nvm log")
            .expect("writes");
        assert_eq!(tail.lines().expect("reads"), ["  OK   up", "vm log"]);
        assert!(tail.lines().expect("reads").is_empty());
        file.write_all(b"in: ").expect("writes");
        assert_eq!(tail.lines().expect("reads"), ["vm login: "]);
        file.write_all(&[b'x'; MAX_LINE_BYTES * 3]).expect("writes");
        assert!(
            tail.lines()
                .expect("reads")
                .iter()
                .all(|line| line.len() <= MAX_LINE_BYTES)
        );
    }

    #[test]
    fn disk_errors_are_found_and_a_missing_file_has_none() {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        writeln!(
            file,
            "fine\nblk_update_request: I/O error, dev vda, sector 5\nfine"
        )
        .expect("writes");
        assert_eq!(io_errors(file.path()).expect("reads").len(), 1);
        assert!(
            io_errors(Path::new("/nowhere/console.log"))
                .expect("nothing there")
                .is_empty()
        );
    }
}
