//! Measurements, not cases: `treeboot-kernel-cases measure [NAME…]` prints rows of the tables in `docs/kernel-plane.md`. No test
//! runs it, because how fast a machine is says nothing about whether the code is right.

use std::fs::File;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use treeboot_dm::group::{Kind, Pace};
use treeboot_dm::loops;
use treeboot_dm::status::SnapshotStatus;
use treeboot_dm::table::Persistence;
use treeboot_dm::{DmDevice, Mapper, Mode, Sectors, Status, Table, Target};

use crate::cache::{Bench, CACHE_BYTES, MIB, wait};
use crate::devices::{self, Image, direct, direct_writable, drop_page_cache, empty_loop, read, write};

pub(crate) const GROUP: crate::Group = crate::Group {
    name: "measure",
    cases: &[
        ("bcache", || cache_kind(Kind::Bcache)),
        ("dm_cache", || cache_kind(Kind::DmCache)),
        ("delta_chunks", delta_chunks),
    ],
    helpers: &[],
    sweep: devices::sweep,
};

const IMAGE_BYTES: u64 = 128 * MIB;

/// What a host reads at while it boots, and as fast as it goes.
const PACES: [Option<u64>; 2] = [Some(20_000_000), None];

/// Reads are as long as the user plane's chunks.
const READ_BYTES: usize = 65_536;

/// Who reads an image first.
#[derive(Debug, Clone, Copy)]
enum First {
    /// VMs and children, through the base.
    Readers,
    /// The agent's filler, through the base's cache.
    Filler,
    /// The filler, and again for what the cache missed.
    FillerTwice,
}

fn cache_kind(kind: Kind) -> Result<()> {
    println!(
        "ROW | kind | read first by | pace | time | shipped by the parent | cached after it | time of the next read | shipped in all |"
    );
    for pace in PACES {
        for first in [First::Readers, First::Filler, First::FillerTwice] {
            // What dm-cache is given it keeps.
            if !matches!((kind, first), (Kind::DmCache, First::FillerTwice)) {
                one(kind, pace, first)?;
                devices::sweep();
            }
        }
    }
    Ok(())
}

fn one(kind: Kind, pace: Option<u64>, first: First) -> Result<()> {
    let device = empty_loop("cache", CACHE_BYTES)?;
    let mut bench = Bench::open(kind, &[&device])?;
    let image = Image::make(&bench.mapper, IMAGE_BYTES, 1)?;
    bench.add(&image)?;
    let base = direct(&Mapper::path(&DmDevice::Base(image.digest)))?;
    let rate = pace.unwrap_or(u64::MAX);
    let begin = image.bytes_read()?;
    let began = Instant::now();
    match first {
        First::Readers => read_all(&base, IMAGE_BYTES, rate)?,
        First::Filler => drop(bench.fill(&image, rate)?),
        First::FillerTwice => {
            let mut filler = bench.fill(&image, rate)?;
            filler.again();
            while let Some(chunk) = filler.missing(0..filler.chunks()) {
                filler.fill(chunk)?;
            }
        }
    }
    let took = began.elapsed();
    let shipped = image.bytes_read()? - begin;
    drop_page_cache()?;
    let again = Instant::now();
    read_all(&base, IMAGE_BYTES, u64::MAX)?;
    let next = again.elapsed();
    let in_all = image.bytes_read()? - begin;
    // Not measured: that it is the image.
    bench.check(&image)?;
    let share = |bytes: u64| bytes as f64 / IMAGE_BYTES as f64;
    println!(
        "ROW | {kind} | {} | {} | {:.1} s | {:.3} × | {:.1} % | {:.1} s | {:.3} × |",
        match first {
            First::Readers => "VMs and children",
            First::Filler => "the filler",
            First::FillerTwice => "the filler, two rounds",
        },
        pace.map_or("full".into(), |rate| format!("{} MB/s", rate / 1_000_000)),
        took.as_secs_f64(),
        share(shipped),
        100.0 * (1.0 - share(in_all - shipped)),
        next.as_secs_f64(),
        share(in_all),
    );
    Ok(())
}

fn read_all(device: &File, bytes: u64, rate: u64) -> Result<()> {
    let began = Instant::now();
    let mut pace = Pace::new(rate, began.elapsed());
    for offset in (0..bytes).step_by(READ_BYTES) {
        read(device, offset, READ_BYTES)?;
        wait(pace.after(READ_BYTES as u64, began.elapsed()));
    }
    Ok(())
}

/// Chunks from 4 KiB to 128 KiB.
const CHUNKS: [u64; 6] = [8, 16, 32, 64, 128, 256];

fn delta_chunks() -> Result<()> {
    println!("ROW | chunk | time | written by the VM | delta | read from the base for it |");
    for chunk in CHUNKS.map(Sectors) {
        let mapper = Mapper::new()?;
        let image = Image::make(&mapper, IMAGE_BYTES, 1)?;
        let delta = empty_loop("delta", 2 * IMAGE_BYTES)?;
        let device = DmDevice::Disk("web-1".parse()?);
        let table = Table::whole(
            image.sectors(),
            Target::Snapshot {
                origin: image.verity,
                delta: delta.number,
                persistence: Persistence::Persistent,
                chunk,
            },
        )?;
        mapper.ensure(&device, &table, Mode::ReadWrite)?;
        let disk = direct_writable(&Mapper::path(&device))?;
        let before = image.bytes_read()?;
        let began = Instant::now();
        let written = boot_like_writes(&disk)?;
        let took = began.elapsed();
        let from_base = image.bytes_read()? - before;
        let used = match mapper.status(&device)?.first().map(|line| line.status.clone()) {
            Some(Status::Snapshot(SnapshotStatus::Active { used, .. })) => used,
            other => bail!("{other:?}"),
        };
        let mib = |bytes: u64| bytes as f64 / MIB as f64;
        println!(
            "ROW | {} KiB | {:.2} s | {:.1} MiB | {:.1} MiB | {:.1} MiB |",
            chunk.bytes() / 1024,
            took.as_secs_f64(),
            mib(written),
            mib(used.bytes()),
            mib(from_base),
        );
        drop(disk);
        mapper.remove(&device)?;
        loops::detach(&delta)?;
        devices::sweep();
    }
    Ok(())
}

/// What a booting system writes, in kind: a journal in runs of 16 KiB that goes round in 4 MiB, files of 64 KiB here and there,
/// and, most of all, single blocks of metadata and logs, many of them more than once; a flush after every 50. The same for
/// every chunk. Gives the bytes that it wrote.
fn boot_like_writes(disk: &File) -> Result<u64> {
    const WRITES: u64 = 3000;
    let blocks = IMAGE_BYTES / 4096;
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut random = |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    let (mut written, mut journal) = (0, 0);
    for index in 0..WRITES {
        let (at, length) = match random(100) {
            0..60 => (random(8) * 3001 % blocks + random(512), 1),
            60..85 => {
                journal = (journal + 4) % 1024;
                (blocks / 2 + journal, 4)
            }
            _ => (random(blocks - 16), 16),
        };
        let at = at.min(blocks - length);
        write(
            disk,
            at * 4096,
            &vec![index as u8; usize::try_from(length * 4096)?],
        )?;
        written += length * 4096;
        if index % 50 == 49 {
            disk.sync_data().context("a flush")?;
        }
    }
    Ok(written)
}
