//! A disk that boots by BIOS: a partition table, GRUB in the gap behind it, and one ext4 file system.
//!
//! Made without loop devices and without mounting, so that no root is needed: `grub-mkimage` makes GRUB's core, which is put
//! where `grub-install` would put it, and `mke2fs -d` fills the file system from a folder.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use super::{quietly, text};

/// Debian packages that [`assemble`] uses.
pub(super) const PACKAGES: &[&str] = &["grub-common", "grub-pc-bin", "e2fsprogs"];

/// What decides about the disk's bytes, for the key.
pub(super) const RECIPE: &[&str] = &[MODULES, FEATURES];

/// Where Debian keeps GRUB for BIOS.
const GRUB: &str = "/usr/lib/grub/i386-pc";
/// What GRUB's core holds: enough to read `grub.cfg` from the first partition and to boot Linux.
const MODULES: &str =
    "biosdisk part_msdos ext2 normal configfile linux serial terminal minicmd echo search search_label";
/// File system options: nothing is left for the guest to initialise at its first mount, which each VM would write again.
const FEATURES: &str = "lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0";

const SECTOR: u64 = 512;
/// First sector of the partition: 1 MiB, where every tool aligns it.
const FIRST_SECTOR: u32 = 2048;
/// Type of a Linux partition.
const LINUX: u8 = 0x83;
/// Bytes of boot code in the first sector; behind it come signature and partitions.
const BOOT_CODE_BYTES: usize = 440;

/// What goes onto a disk.
pub(super) struct Layout<'a> {
    /// Bytes of the disk; a multiple of 1 MiB.
    pub(super) bytes: u64,
    /// The tree of the file system, `/boot/grub/grub.cfg` included.
    pub(super) tree: &'a Path,
    /// Label of the file system.
    pub(super) label: &'a str,
    /// Bytes a inode: few inodes make a small table.
    pub(super) bytes_per_inode: u32,
    /// Disk signature, which is also the start of the partition's PARTUUID.
    pub(super) signature: u32,
    /// Words before `mke2fs`, for instance `fakeroot`.
    pub(super) wrapper: &'a [String],
}

/// Makes the disk at `path`.
pub(super) fn assemble(layout: &Layout<'_>, work: &Path, path: &Path) -> Result<()> {
    let disk = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)?;
    disk.set_len(layout.bytes)?;
    let core = core(work)?;
    let room = u64::from(FIRST_SECTOR - 1) * SECTOR;
    if core.len() as u64 > room {
        bail!(
            "GRUB's core has {} bytes; {room} fit before the partition",
            core.len()
        );
    }
    let first = first_sector(layout)?;
    disk.write_all_at(&first, 0)?;
    // The core's own first sector loads the rest from the sector behind it, as grub-mkimage has it.
    disk.write_all_at(&core, SECTOR)?;
    file_system(layout, path)?;
    disk.sync_all()?;
    Ok(())
}

fn core(work: &Path) -> Result<Vec<u8>> {
    let core = work.join("core.img");
    quietly(
        Command::new("grub-mkimage")
            .args([
                "--format=i386-pc",
                "--compression=auto",
                "--prefix=(hd0,msdos1)/boot/grub",
            ])
            .arg(format!("--directory={GRUB}"))
            .arg(format!("--output={}", text(&core)?))
            .args(MODULES.split(' ')),
    )?;
    std::fs::read(&core).with_context(|| format!("cannot read {}", core.display()))
}

fn first_sector(layout: &Layout<'_>) -> Result<[u8; SECTOR as usize]> {
    let path = Path::new(GRUB).join("boot.img");
    let mut boot = Vec::new();
    std::io::Read::read_to_end(
        &mut File::open(&path).with_context(|| format!("cannot read {}", path.display()))?,
        &mut boot,
    )?;
    let code = boot
        .get(..BOOT_CODE_BYTES)
        .with_context(|| format!("{} is too short", path.display()))?;
    let sectors =
        u32::try_from(layout.bytes / SECTOR).context("the disk is too large for its partition table")?;
    Ok(master_boot_record(code, layout.signature, sectors))
}

/// Boot code, signature, and one active partition that reaches to the end.
fn master_boot_record(code: &[u8], signature: u32, sectors: u32) -> [u8; SECTOR as usize] {
    let mut sector = [0; SECTOR as usize];
    sector[..code.len()].copy_from_slice(code);
    sector[440..444].copy_from_slice(&signature.to_le_bytes());
    let partition = &mut sector[446..462];
    partition[0] = 0x80;
    // Cylinders, heads and sectors are beyond what the fields hold; by convention they are then all ones.
    partition[1..4].copy_from_slice(&[0xfe, 0xff, 0xff]);
    partition[4] = LINUX;
    partition[5..8].copy_from_slice(&[0xfe, 0xff, 0xff]);
    partition[8..12].copy_from_slice(&FIRST_SECTOR.to_le_bytes());
    partition[12..16].copy_from_slice(&(sectors - FIRST_SECTOR).to_le_bytes());
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

fn file_system(layout: &Layout<'_>, path: &Path) -> Result<()> {
    let offset = u64::from(FIRST_SECTOR) * SECTOR;
    let kib = (layout.bytes - offset) / 1024;
    let mut words: Vec<String> = layout.wrapper.to_vec();
    words.extend(
        [
            "mke2fs",
            "-q",
            "-F",
            "-t",
            "ext4",
            "-b",
            "4096",
            "-m",
            "0",
            "-J",
            "size=8",
            "-O",
            "^resize_inode",
        ]
        .map(String::from),
    );
    words.extend([
        "-L".into(),
        layout.label.into(),
        "-i".into(),
        layout.bytes_per_inode.to_string(),
    ]);
    words.extend(["-E".into(), format!("offset={offset},{FEATURES}")]);
    words.extend([
        "-d".into(),
        text(layout.tree)?.into(),
        text(path)?.into(),
        format!("{kib}k"),
    ]);
    let (program, arguments) = words.split_first().context("there are words")?;
    quietly(Command::new(program).args(arguments))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_partition_begins_at_1_mib_and_ends_with_the_disk() {
        let sector = master_boot_record(&[0xeb; BOOT_CODE_BYTES], 0x1234_5678, 262_144);
        assert_eq!(sector[510..], [0x55, 0xaa]);
        assert_eq!(sector[440..444], [0x78, 0x56, 0x34, 0x12]);
        assert_eq!(sector[446 + 8..446 + 12], 2048u32.to_le_bytes());
        assert_eq!(sector[446 + 12..446 + 16], (262_144u32 - 2048).to_le_bytes());
    }
}
