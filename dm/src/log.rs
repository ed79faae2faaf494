//! The kernel's reasons. device-mapper answers a bad table with `EINVAL` and writes why into the kernel's log only, so the
//! log's lines since a call began are read from `/dev/kmsg`. Others write there too: only lines that name device-mapper, and
//! either the device or the kind of its target, are taken, and few of them. bcache answers and explains alike.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::OpenOptionsExt as _;

use rustix::fs::OFlags;

use crate::DeviceNumber;

/// A record never exceeds this (kernel `CONSOLE_EXT_LOG_MAX`).
const RECORD_BYTES: usize = 8192;

/// Records looked at after a call; a log that fills faster says nothing useful.
const MAX_RECORDS: usize = 512;

/// Lines that an error holds at most.
const MAX_LINES: usize = 4;

/// The log from a moment on.
pub(crate) struct KernelLog(Option<File>);

impl KernelLog {
    /// From now on. Without the right to read the log there will be no lines.
    pub(crate) fn from_now() -> Self {
        let open = || {
            let mut file = OpenOptions::new()
                .read(true)
                .custom_flags(OFlags::NONBLOCK.bits() as i32)
                .open("/dev/kmsg")?;
            file.seek(SeekFrom::End(0))?;
            Ok::<File, std::io::Error>(file)
        };
        Self(open().ok())
    }

    /// What device-mapper has said since about the device or about targets of the kinds.
    pub(crate) fn about(self, number: Option<DeviceNumber>, kinds: &[&str]) -> Vec<String> {
        select(&self.messages(), number, kinds)
    }

    /// What bcache has said since.
    pub(crate) fn of_bcache(self) -> Vec<String> {
        let mut lines = self.messages();
        lines.retain(|line| line.starts_with("bcache: "));
        let excess = lines.len().saturating_sub(MAX_LINES);
        lines.split_off(excess)
    }

    fn messages(mut self) -> Vec<String> {
        let mut messages = Vec::new();
        let mut record = vec![0; RECORD_BYTES];
        let Some(file) = &mut self.0 else {
            return messages;
        };
        for _ in 0..MAX_RECORDS {
            match file.read(&mut record) {
                Ok(0) => break,
                Ok(length) => {
                    let text = String::from_utf8_lossy(&record[..length]);
                    messages.extend(message(&text).map(str::to_owned));
                }
                // Records were overwritten before they were read; the next read goes on with the oldest that is left.
                Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
                Err(_) => break,
            }
        }
        messages
    }
}

/// The text of a record: `PRIORITY,SEQUENCE,TIME,FLAGS;TEXT`, then lines of properties. The kernel has escaped control
/// characters.
fn message(record: &str) -> Option<&str> {
    record.split_once(';')?.1.lines().next()
}

/// Lines that name the device, or, where there are none, those of the kinds.
fn select(messages: &[String], number: Option<DeviceNumber>, kinds: &[&str]) -> Vec<String> {
    let tails: Vec<&str> = messages
        .iter()
        .filter_map(|message| message.strip_prefix("device-mapper: "))
        .collect();
    let names_device = |tail: &&&str| {
        number.is_some_and(|number| {
            let number = number.to_string();
            tail.split([' ', '(', ')'])
                .any(|word| word.trim_end_matches([':', ',']) == number)
        })
    };
    let of_kind = |tail: &&&str| {
        kinds
            .iter()
            .any(|kind| tail.strip_prefix(kind).is_some_and(|rest| rest.starts_with(':')))
    };
    let mut lines: Vec<&str> = tails.iter().filter(names_device).copied().collect();
    if lines.is_empty() {
        lines = tails.iter().filter(of_kind).copied().collect();
    }
    lines.dedup();
    let excess = lines.len().saturating_sub(MAX_LINES);
    lines.drain(..excess);
    lines.into_iter().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NUMBER: DeviceNumber = DeviceNumber { major: 254, minor: 1 };

    #[test]
    fn only_lines_about_the_device_are_taken() {
        let log = [
            "device-mapper: table: 254:1: linear: Device lookup failed (-ENODEV)",
            "device-mapper: table: 254:11: linear: Device lookup failed (-ENODEV)",
            "table: 254:1: not ours",
            "device-mapper: ioctl: error adding target to table",
        ]
        .map(String::from);
        let lines = select(&log, Some(NUMBER), &["linear"]);
        assert_eq!(lines, ["table: 254:1: linear: Device lookup failed (-ENODEV)"]);
    }

    #[test]
    fn a_target_that_does_not_name_its_device_is_heard_by_its_kind() {
        let log = [
            "device-mapper: snapshots: Invalid exception store",
            "device-mapper: cache: could not load",
        ]
        .map(String::from);
        assert_eq!(select(&log, Some(NUMBER), &["cache"]), ["cache: could not load"]);
        assert!(select(&log, Some(NUMBER), &[]).is_empty());
    }

    #[test]
    fn a_record_gives_its_text_alone() {
        let record = "3,812,1094872,-;device-mapper: table: 254:1: x\n SUBSYSTEM=block\n";
        assert_eq!(message(record), Some("device-mapper: table: 254:1: x"));
        assert_eq!(message("no record"), None);
    }
}
