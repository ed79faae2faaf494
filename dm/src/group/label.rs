//! The first 4 KiB of every cache device: whose it is, and which. A device with anything else there is never written to.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use super::error::{GroupError, io_error};
use crate::bcache::Uuid;
use crate::{DeviceNumber, Sectors};

/// What the group uses of a device begins here.
pub(super) const BEGIN: Sectors = Sectors(2048);

const LABEL_BYTES: usize = 4096;

/// What the first bytes of a device say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Label {
    /// Zeroes.
    Blank,
    /// A device of a life of a group, and its place in it.
    Member(Uuid, usize),
    /// Anything else.
    Foreign,
}

/// The node by which the kernel and udev name a device, or that of the kernel's own tree.
pub(super) fn node(device: DeviceNumber) -> PathBuf {
    let by_number = PathBuf::from(format!("/dev/block/{device}"));
    if by_number.exists() {
        return by_number;
    }
    // Without udev there is only the kernel's own name.
    let uevent = std::fs::read_to_string(format!("/sys/dev/block/{device}/uevent")).unwrap_or_default();
    uevent
        .lines()
        .find_map(|line| line.strip_prefix("DEVNAME="))
        .map_or(by_number, |name| PathBuf::from("/dev").join(name))
}

pub(super) fn read(device: DeviceNumber) -> Result<Label, GroupError> {
    let path = node(device);
    let mut bytes = vec![0; LABEL_BYTES];
    File::open(&path)
        .and_then(|file| file.read_exact_at(&mut bytes, 0))
        .map_err(io_error("read the label of", &path))?;
    Ok(parse(&bytes))
}

pub(super) fn write(device: DeviceNumber, life: Uuid, index: usize) -> Result<(), GroupError> {
    let path = node(device);
    let mut bytes = format!("treeboot-cache-device 1 {life} {index}\n").into_bytes();
    bytes.resize(LABEL_BYTES, 0);
    let put = |file: File| {
        file.write_all_at(&bytes, 0)?;
        file.sync_all()
    };
    OpenOptions::new()
        .write(true)
        .open(&path)
        .and_then(put)
        .map_err(io_error("write the label of", &path))
}

fn parse(bytes: &[u8]) -> Label {
    if bytes.iter().all(|&byte| byte == 0) {
        return Label::Blank;
    }
    let line = bytes.split(|&byte| byte == b'\n').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    let words: Vec<&str> = line.split(' ').collect();
    match words.as_slice() {
        ["treeboot-cache-device", "1", life, index] => match (life.parse(), index.parse()) {
            (Ok(life), Ok(index)) => Label::Member(life, index),
            _ => Label::Foreign,
        },
        _ => Label::Foreign,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_zeroes_and_our_own_label_are_not_foreign() {
        let life = Uuid([3; 16]);
        assert_eq!(parse(&[0; 4096]), Label::Blank);
        let ours = format!("treeboot-cache-device 1 {life} 2\n\0\0");
        assert_eq!(parse(ours.as_bytes()), Label::Member(life, 2));
        for foreign in [
            "EFI PART",
            "treeboot-cache-device 2 x 1\n",
            "treeboot-cache-device 1 x 1\n",
        ] {
            assert_eq!(parse(foreign.as_bytes()), Label::Foreign, "{foreign}");
        }
    }
}
