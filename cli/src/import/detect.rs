//! Which format a file has, by its content.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::ImportError;

/// How much of a file's beginning is looked at: every signature below lies within it.
const HEAD_BYTES: usize = 512;

/// The format of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// The disk's bytes as they are.
    Raw,
    /// qcow2 of version 2 or 3.
    Qcow2,
    /// What `qemu-img` reads.
    Foreign(Foreign),
}

/// Formats that are left to `qemu-img`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Foreign {
    Qcow1,
    Qed,
    Vmdk,
    Vdi,
    Vhd,
    Vhdx,
    Parallels,
    Dmg,
}

impl Foreign {
    /// The name of its driver in QEMU.
    pub(super) fn driver(self) -> &'static str {
        match self {
            Self::Qcow1 => "qcow",
            Self::Qed => "qed",
            Self::Vmdk => "vmdk",
            Self::Vdi => "vdi",
            Self::Vhd => "vpc",
            Self::Vhdx => "vhdx",
            Self::Parallels => "parallels",
            Self::Dmg => "dmg",
        }
    }
}

impl fmt::Display for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Qcow1 => "qcow (version 1)",
            Self::Vhd => "VHD",
            Self::Vmdk => "VMDK",
            Self::Vdi => "VDI",
            Self::Vhdx => "VHDX",
            other => other.driver(),
        })
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Raw => f.write_str("raw"),
            Self::Qcow2 => f.write_str("qcow2"),
            Self::Foreign(foreign) => foreign.fmt(f),
        }
    }
}

/// Files that people take for images. A raw image has no signature, so whatever is not known is raw; these however
/// are certainly something else: no boot sector begins like them.
const NOT_IMAGES: [(usize, &[u8], &str); 9] = [
    (0, b"\x7fELF", "an ELF program"),
    (0, b"\x1f\x8b", "a file compressed with gzip"),
    (0, b"\xfd7zXZ\0", "a file compressed with xz"),
    (0, b"\x28\xb5\x2f\xfd", "a file compressed with zstd"),
    (0, b"BZh", "a file compressed with bzip2"),
    (0, b"7z\xbc\xaf\x27\x1c", "an archive compressed with 7-Zip"),
    (0, b"PK\x03\x04", "a zip archive"),
    (
        257,
        b"ustar",
        "a tar archive (an OVA is one: unpack it and import its disk)",
    ),
    (
        0,
        b"# Disk DescriptorFile",
        "a VMDK descriptor, which names other files (import those, or make one file of them)",
    ),
];

/// Tells the format of a regular file.
pub(super) fn detect(path: &Path) -> Result<Format, ImportError> {
    let io_error = |doing| {
        move |source| ImportError::Io {
            doing,
            path: path.into(),
            source,
        }
    };
    let file = File::open(path).map_err(io_error("open"))?;
    let length = file.metadata().map_err(io_error("look at"))?.len();
    let mut head = vec![0; HEAD_BYTES.min(usize::try_from(length).unwrap_or(HEAD_BYTES))];
    file.read_exact_at(&mut head, 0).map_err(io_error("read"))?;
    let tail = read_tail(&file, length).map_err(io_error("read"))?;
    match of_content(&head, &tail, length) {
        Ok(format) => Ok(format),
        Err(what) => Err(ImportError::NotAnImage {
            path: path.into(),
            what,
        }),
    }
}

fn read_tail(file: &File, length: u64) -> io::Result<Vec<u8>> {
    let Some(offset) = length.checked_sub(512) else {
        return Ok(Vec::new());
    };
    let mut tail = vec![0; 512];
    file.read_exact_at(&mut tail, offset).map(|()| tail)
}

/// Tells the format by a file's first and last sector; or what the file is instead of an image.
fn of_content(head: &[u8], tail: &[u8], length: u64) -> Result<Format, &'static str> {
    let at =
        |offset: usize, signature: &[u8]| head.get(offset..).is_some_and(|rest| rest.starts_with(signature));
    let foreign = |foreign| Ok(Format::Foreign(foreign));
    if at(0, b"QFI\xfb") {
        return if at(4, &[0, 0, 0, 1]) {
            foreign(Foreign::Qcow1)
        } else {
            Ok(Format::Qcow2)
        };
    }
    for (signature, offset, format) in [
        (b"QED\0".as_slice(), 0, Foreign::Qed),
        (b"KDMV", 0, Foreign::Vmdk),
        (b"COWD", 0, Foreign::Vmdk),
        (b"\x7f\x10\xda\xbe", 0x40, Foreign::Vdi),
        (b"vhdxfile", 0, Foreign::Vhdx),
        (b"conectix", 0, Foreign::Vhd),
        (b"WithoutFreeSpace", 0, Foreign::Parallels),
        (b"WithouFreSpacExt", 0, Foreign::Parallels),
    ] {
        if at(offset, signature) {
            return foreign(format);
        }
    }
    if tail.starts_with(b"conectix") {
        return foreign(Foreign::Vhd);
    }
    if tail.starts_with(b"koly") {
        return foreign(Foreign::Dmg);
    }
    if let Some((_, _, what)) = NOT_IMAGES
        .iter()
        .find(|(offset, signature, _)| at(*offset, signature))
    {
        return Err(what);
    }
    // A disk's first sector holds a boot loader, a partition table, a file system or zeroes: never only text.
    let text = |byte: &u8| matches!(byte, b'\t' | b'\n' | b'\r' | 0x20..=0x7e);
    if length > 0 && !head.is_empty() && head.iter().all(text) {
        return Err("a text file");
    }
    Ok(Format::Raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_tells_the_format() {
        let sector = |offset: usize, signature: &[u8]| {
            let mut head = vec![0; 512];
            head[offset..offset + signature.len()].copy_from_slice(signature);
            head
        };
        let zero = || vec![0; 512];
        for (head, tail, expect) in [
            (zero(), zero(), Ok(Format::Raw)),
            (sector(510, b"\x55\xaa"), zero(), Ok(Format::Raw)),
            (sector(0, b"QFI\xfb\0\0\0\x03"), zero(), Ok(Format::Qcow2)),
            (
                sector(0, b"QFI\xfb\0\0\0\x01"),
                zero(),
                Ok(Format::Foreign(Foreign::Qcow1)),
            ),
            (
                sector(0x40, b"\x7f\x10\xda\xbe"),
                zero(),
                Ok(Format::Foreign(Foreign::Vdi)),
            ),
            (zero(), sector(0, b"conectix"), Ok(Format::Foreign(Foreign::Vhd))),
            (sector(0, b"\x7fELF"), zero(), Err("an ELF program")),
            (
                b"a text that goes on\n".repeat(30)[..512].to_vec(),
                zero(),
                Err("a text file"),
            ),
            (Vec::new(), Vec::new(), Ok(Format::Raw)),
        ] {
            assert_eq!(of_content(&head, &tail, head.len() as u64), expect);
        }
    }
}
