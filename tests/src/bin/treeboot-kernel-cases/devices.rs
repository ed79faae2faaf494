//! What cases make devices of, and the sweep behind each.

use std::fs::{self, File};
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use treeboot_block::storage::{FileStorage, OpenMode};
use treeboot_block::verity::{VerityBuilder, VerityLayout};
use treeboot_dm::group::CacheDevice;
use treeboot_dm::loops::{self, LoopDevice};
use treeboot_dm::table::{OnCorruption, Verity};
use treeboot_dm::{DeviceNumber, DmDevice, Line, Mapper, Mode, Sectors, Table, Target};
use treeboot_types::{Digest, VERITY_BLOCK_BYTES};

/// Where the files beneath are, unless `TREEBOOT_CASES_DIR` names a folder to put them into: a tmpfs of the guest.
const FOLDER: &str = "/run/treeboot-cases";

/// A device of no name of ours, that a case makes fail.
pub(crate) const FAILING: &str = "failing";

/// 4 KiB pages and blocks divide everything here.
const ALIGNMENT: usize = 4096;

/// The path of a scratch file.
pub(crate) fn scratch(name: &str) -> Result<PathBuf> {
    let folder = folder();
    fs::create_dir_all(&folder)?;
    Ok(folder.join(name))
}

fn folder() -> PathBuf {
    std::env::var_os("TREEBOOT_CASES_DIR")
        .map_or_else(|| FOLDER.into(), |root| Path::new(&root).join("devices"))
}

/// A file of `bytes` whose content follows from `seed`: no two blocks of any two seeds are alike.
pub(crate) fn image_file(name: &str, bytes: u64, seed: u64) -> Result<PathBuf> {
    let path = scratch(name)?;
    let mut file = File::create(&path)?;
    for block in 0..bytes / ALIGNMENT as u64 {
        file.write_all(&block_of(seed, block))?;
    }
    Ok(path)
}

/// Block `index` of the content of `seed`.
pub(crate) fn block_of(seed: u64, index: u64) -> Vec<u8> {
    let mut state = (seed << 40 | index) + 1;
    let mut block = Vec::with_capacity(ALIGNMENT);
    while block.len() < ALIGNMENT {
        // xorshift64*
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        block.extend_from_slice(&state.wrapping_mul(0x2545_F491_4F6C_DD1D).to_le_bytes());
    }
    block
}

/// A file of zeroes as a block device.
pub(crate) fn empty_loop(name: &str, bytes: u64) -> Result<LoopDevice> {
    let path = scratch(name)?;
    File::create(&path)?.set_len(bytes)?;
    Ok(loops::attach(&path, Mode::ReadWrite, 0)?)
}

/// An image over a loop device with its hash tree over another, and the verity device above them.
#[derive(Clone)]
pub(crate) struct Image {
    pub(crate) digest: Digest,
    pub(crate) seed: u64,
    pub(crate) bytes: u64,
    pub(crate) data: LoopDevice,
    pub(crate) verity: DeviceNumber,
    pub(crate) table: Table,
}

impl Image {
    /// Makes all of it, verity device included.
    pub(crate) fn make(mapper: &Mapper, bytes: u64, seed: u64) -> Result<Self> {
        let file = image_file(&format!("image-{seed}"), bytes, seed)?;
        let hash_file = scratch(&format!("hashes-{seed}"))?;
        let layout = VerityLayout::new(bytes);
        let hashes = FileStorage::open(&hash_file, OpenMode::Create)?;
        let mut builder = VerityBuilder::new(layout, &hashes);
        for block in 0..bytes / ALIGNMENT as u64 {
            builder.update(&block_of(seed, block))?;
        }
        let digest = builder.finish()?;
        drop(hashes);
        let data = loops::attach(&file, Mode::ReadOnly, 0)?;
        let hashes = loops::attach(&hash_file, Mode::ReadOnly, 0)?;
        let table = Table::whole(
            Sectors(bytes / 512),
            Target::Verity(Verity {
                data: data.number,
                hashes: hashes.number,
                data_blocks: layout.data_blocks(),
                hash_start_block: 1,
                root: digest,
                on_corruption: OnCorruption::Fail,
                ignore_zero_blocks: false,
                check_at_most_once: false,
            }),
        )?;
        let device = DmDevice::Verity(digest);
        mapper.ensure(&device, &table, Mode::ReadOnly)?;
        let verity = mapper.number(&device)?.context("the verity device is gone")?;
        Ok(Self {
            digest,
            seed,
            bytes,
            data,
            verity,
            table,
        })
    }

    /// Sectors of the image.
    pub(crate) fn sectors(&self) -> Sectors {
        Sectors(self.bytes / 512)
    }

    /// What a group reads it from, as in the agent's stack: the verity device, through the page cache.
    pub(crate) fn joined(&self) -> Result<DeviceNumber> {
        Ok(loops::join_reads(&self.verity_node(), VERITY_BLOCK_BYTES)?.number)
    }

    fn verity_node(&self) -> PathBuf {
        PathBuf::from(format!("/dev/dm-{}", self.verity.minor))
    }

    /// Removes the verity device; its image must have left every group.
    pub(crate) fn remove(&self, mapper: &Mapper) -> Result<()> {
        loops::part_reads(&self.verity_node())?;
        mapper.remove(&DmDevice::Verity(self.digest))?;
        Ok(())
    }

    /// Bytes read from the image's data since its loop device was made.
    pub(crate) fn bytes_read(&self) -> Result<u64> {
        bytes_read(&self.data)
    }

    /// Every block of `path` is the image's.
    pub(crate) fn check(&self, path: &Path) -> Result<()> {
        match self.check_readable(path)? {
            (0, _) => Ok(()),
            (unreadable, why) => bail!("{unreadable} blocks of {} cannot be read: {why}", path.display()),
        }
    }

    /// Every block of `path` that can be read is the image's; gives how many cannot, and why the first.
    pub(crate) fn check_readable(&self, path: &Path) -> Result<(u64, String)> {
        let device = direct(path)?;
        let (mut unreadable, mut why) = (0, String::new());
        for block in 0..self.bytes / ALIGNMENT as u64 {
            match read(&device, block * ALIGNMENT as u64, ALIGNMENT) {
                Ok(found) => ensure!(
                    found == block_of(self.seed, block),
                    "block {block} of {} is not image {}'s",
                    path.display(),
                    self.seed
                ),
                Err(error) => {
                    if unreadable == 0 {
                        why = format!("{error:#}");
                    }
                    unreadable += 1;
                }
            }
        }
        Ok((unreadable, why))
    }
}

/// A cache device that can be made to fail.
pub(crate) struct Failing {
    pub(crate) below: LoopDevice,
    length: Sectors,
}

impl Failing {
    pub(crate) fn make(bytes: u64) -> Result<Self> {
        let below = empty_loop("cache", bytes)?;
        let length = loops::size(&below.path)?;
        let failing = Self { below, length };
        let table = failing.table(&failing.whole());
        command("dmsetup", &["create", FAILING, "--table", &table])?;
        Ok(failing)
    }

    /// What it is as long as it does not fail.
    pub(crate) fn whole(&self) -> String {
        format!("linear {} 0", self.below.number)
    }

    fn table(&self, target: &str) -> String {
        format!("0 {} {target}", self.length)
    }

    pub(crate) fn device(&self) -> Result<CacheDevice> {
        let asked = ["info", "-c", "--noheadings", "-o", "major,minor", FAILING];
        let number = command("dmsetup", &asked)?;
        Ok(CacheDevice {
            number: number.trim().parse().ok().context("no number")?,
            length: self.length,
        })
    }

    pub(crate) fn becomes(&self, target: &str) -> Result<()> {
        // What is under way when it begins to fail must not be waited for.
        command("dmsetup", &["suspend", "--nolockfs", FAILING])?;
        command("dmsetup", &["reload", FAILING, "--table", &self.table(target)])?;
        command("dmsetup", &["resume", FAILING]).map(drop)
    }

    /// Removes it, once nobody uses it.
    pub(crate) fn remove(self) -> Result<()> {
        command("dmsetup", &["remove", FAILING])?;
        loops::detach(&self.below)?;
        Ok(())
    }
}

/// Bytes read from a loop device, by the kernel's count; it goes on over the device's users.
pub(crate) fn bytes_read(device: &LoopDevice) -> Result<u64> {
    let name = device.path.file_name().context("a loop device has a name")?;
    let stat = fs::read_to_string(Path::new("/sys/block").join(name).join("stat"))?;
    let sectors: u64 = stat
        .split_ascii_whitespace()
        .nth(2)
        .context("no third number")?
        .parse()?;
    Ok(sectors * 512)
}

/// Opened for reading, past the page cache.
pub(crate) fn direct(path: &Path) -> Result<File> {
    fs::OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_DIRECT)
        .open(path)
        .with_context(|| format!("cannot open {}", path.display()))
}

/// Opened for reading and writing, past the page cache.
pub(crate) fn direct_writable(path: &Path) -> Result<File> {
    fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(nix::libc::O_DIRECT)
        .open(path)
        .with_context(|| format!("cannot open {}", path.display()))
}

/// Memory that direct I/O takes: where an aligned run of `length` begins in a longer vector.
fn aligned(length: usize) -> (Vec<u8>, usize) {
    let buffer = vec![0; length + ALIGNMENT];
    let start = buffer.as_ptr().align_offset(ALIGNMENT);
    (buffer, start)
}

/// `length` bytes at `offset`.
pub(crate) fn read(device: &File, offset: u64, length: usize) -> Result<Vec<u8>> {
    let (mut buffer, start) = aligned(length);
    device
        .read_exact_at(&mut buffer[start..start + length], offset)
        .with_context(|| format!("cannot read {length} bytes at {offset}"))?;
    Ok(buffer[start..start + length].to_vec())
}

/// Writes `data` at `offset`.
pub(crate) fn write(device: &File, offset: u64, data: &[u8]) -> Result<()> {
    let (mut buffer, start) = aligned(data.len());
    buffer[start..start + data.len()].copy_from_slice(data);
    device
        .write_all_at(&buffer[start..start + data.len()], offset)
        .with_context(|| format!("cannot write {} bytes at {offset}", data.len()))
}

/// A linear line over the whole of a device.
pub(crate) fn linear(device: DeviceNumber, length: Sectors) -> Result<Table> {
    Ok(Table::whole(
        length,
        Target::Linear {
            device,
            offset: Sectors(0),
        },
    )?)
}

/// Lines one behind another.
pub(crate) fn lines(targets: Vec<(u64, Target)>) -> Result<Table> {
    let mut start = Sectors(0);
    let mut line = |(length, target)| {
        let line = Line {
            start,
            length: Sectors(length),
            target,
        };
        start = Sectors(start.0 + length);
        line
    };
    Ok(Table::new(targets.into_iter().map(&mut line).collect())?)
}

/// Runs a program; gives what it printed.
pub(crate) fn command(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| format!("cannot start {program}"))?;
    if !output.status.success() {
        bail!(
            "{program} {arguments:?} ended with {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Asks again and again until there is an answer.
pub(crate) fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut ask: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let began = Instant::now();
    loop {
        if let Some(answer) = ask()? {
            return Ok(answer);
        }
        ensure!(
            began.elapsed() < limit,
            "{what} did not come within {} s",
            limit.as_secs()
        );
        pause();
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "between two looks at a condition with a deadline"
)]
fn pause() {
    std::thread::sleep(Duration::from_millis(20));
}

/// Forgets what was read through the page cache, so that the next read shows what the cache has.
pub(crate) fn drop_page_cache() -> Result<()> {
    Ok(fs::write("/proc/sys/vm/drop_caches", "1")?)
}

/// Removes what a case left, so that the next begins on an empty kernel. What cannot be removed shows in the next case.
pub(crate) fn sweep() {
    let _ = remove_devices();
    if let Err(error) = sweep_bcache().and_then(|()| remove_devices()) {
        println!("not swept: {error:#}");
    }
    let _ = command("dmsetup", &["remove", FAILING]);
    for device in loops::list().unwrap_or_default() {
        let _ = loops::detach(&device);
    }
    let _ = fs::remove_dir_all(folder());
}

fn remove_devices() -> Result<()> {
    let mapper = Mapper::new()?;
    // Those over others go first; bcache lets go of a device some time after it is gone from sysfs.
    let mut rounds = 0;
    wait_for("the end of the devices", Duration::from_secs(20), || {
        let found = mapper.list()?;
        for joined in loops::list()?
            .iter()
            .filter(|device| device.file.starts_with("/dev"))
        {
            let _ = loops::detach(joined);
        }
        for seen in found.iter().filter(|seen| seen.open_count == 0) {
            let _ = mapper.remove(&seen.device);
        }
        rounds += 1;
        let over = sets_and_devices_of_bcache()?;
        // Those that bcache holds go after it.
        Ok((found.is_empty() || (rounds > 8 && !over.is_empty())).then_some(()))
    })
}

fn sets_and_devices_of_bcache() -> Result<Vec<PathBuf>> {
    if !Path::new("/sys/fs/bcache").exists() {
        return Ok(Vec::new());
    }
    let mut files = below("/sys/block", "bcache/stop")?;
    files.extend(below("/sys/fs/bcache", "unregister")?);
    Ok(files)
}

fn sweep_bcache() -> Result<()> {
    for file in sets_and_devices_of_bcache()? {
        // A bcache device has its file at its backing device, too; either removes both.
        if let Err(error) = fs::write(&file, "1") {
            ensure!(
                error.kind() == ErrorKind::NotFound,
                "cannot write {}: {error}",
                file.display()
            );
        }
    }
    wait_for(
        "the end of bcache's devices and sets",
        Duration::from_secs(30),
        || Ok(sets_and_devices_of_bcache()?.is_empty().then_some(())),
    )
}

/// The files of this name in the folders of a folder.
fn below(folder: &str, name: &str) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder)?.flatten();
    let files = entries.map(|entry| entry.path().join(name));
    Ok(files.filter(|file| file.exists()).collect())
}
