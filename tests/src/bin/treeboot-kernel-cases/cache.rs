//! The cache group on a real kernel, both kinds.

mod failing;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use treeboot_dm::bcache::{Bcache, DATA_OFFSET};
use treeboot_dm::group::{CacheDevice, Config, Filler, Group, GroupError, Kind, Pace};
use treeboot_dm::loops::{self, LoopDevice};
use treeboot_dm::{DmDevice, Line, Mapper, Mode, Outcome, Sectors, Table, Target};

use crate::devices::{self, Image, command, direct, drop_page_cache, empty_loop, read, scratch, wait_for};

pub(crate) const GROUP: crate::Group = crate::Group {
    name: "cache",
    cases: &[
        ("bcache_fills_and_keeps_the_parents_out", || fills(Kind::Bcache)),
        ("dm_cache_fills_and_keeps_the_parents_out", || {
            fills(Kind::DmCache)
        }),
        ("bcache_never_serves_a_removed_images_bytes", || {
            a_removed_image(Kind::Bcache)
        }),
        ("dm_cache_never_serves_a_removed_images_bytes", || {
            a_removed_image(Kind::DmCache)
        }),
        ("bcache_images_come_and_go_while_others_are_read", || {
            images_come_and_go(Kind::Bcache)
        }),
        ("dm_cache_images_come_and_go_while_others_are_read", || {
            images_come_and_go(Kind::DmCache)
        }),
        ("bcache_is_taken_over_and_closed_and_found_again", || {
            found_again(Kind::Bcache)
        }),
        (
            "a_bcache_device_that_does_not_run_is_let_go",
            a_device_that_does_not_run,
        ),
        ("dm_cache_is_taken_over_and_closed_and_found_again", || {
            found_again(Kind::DmCache)
        }),
        ("dm_cache_that_dies_leaves_the_base_running", || {
            failing::a_cache_that_dies(Kind::DmCache)
        }),
        ("dm_cache_that_dies_while_filled_never_gives_wrong_bytes", || {
            failing::a_cache_that_dies_while_filled(Kind::DmCache)
        }),
        ("dm_cache_that_falters_never_gives_wrong_bytes", || {
            failing::a_cache_that_falters(Kind::DmCache)
        }),
        ("a_foreign_device_is_not_written_to", a_foreign_device),
        ("dm_cache_grows_in_use", dm_cache_grows),
    ],
    helpers: &[],
    sweep: devices::sweep,
};

/// Cache devices that fail. The kernel writes a line for each read that one fails, thousands in all: to its log, not the console.
pub(crate) const FAULTS: crate::Group = crate::Group {
    name: "cache-faults",
    cases: &[
        ("bcache_that_dies_leaves_the_base_running", || {
            failing::a_cache_that_dies(Kind::Bcache)
        }),
        ("bcache_that_dies_while_filled_never_gives_wrong_bytes", || {
            failing::a_cache_that_dies_while_filled(Kind::Bcache)
        }),
        ("bcache_that_takes_no_writes_never_gives_wrong_bytes", || {
            failing::a_cache_that_takes_no_writes(Kind::Bcache)
        }),
        ("dm_cache_that_takes_no_writes_never_gives_wrong_bytes", || {
            failing::a_cache_that_takes_no_writes(Kind::DmCache)
        }),
        ("bcache_that_falters_never_gives_wrong_bytes", || {
            failing::a_cache_that_falters(Kind::Bcache)
        }),
    ],
    helpers: &[],
    sweep: devices::sweep,
};

pub(crate) const MIB: u64 = 1 << 20;

/// A cache, sparse. bcache keeps the more of what is read the more buckets it has: this makes 16,384.
pub(crate) const CACHE_BYTES: u64 = 1032 * MIB;

/// Of a device that bcache has stopped.
const LETS_GO_WITHIN: Duration = Duration::from_secs(10);

/// What the filler goes at in every case; fast enough for bcache to keep nearly all.
const BYTES_PER_SECOND: u64 = 20_000_000;

/// A group over loop devices, with what makes bases over it.
pub(crate) struct Bench {
    pub(crate) mapper: Arc<Mapper>,
    pub(crate) config: Config,
    pub(crate) group: Group,
}

impl Bench {
    pub(crate) fn open(kind: Kind, devices: &[&LoopDevice]) -> Result<Self> {
        Self::over(
            kind,
            devices
                .iter()
                .map(|device| {
                    Ok(CacheDevice {
                        number: device.number,
                        length: loops::size(&device.path)?,
                    })
                })
                .collect::<Result<_>>()?,
        )
    }

    fn over(kind: Kind, devices: Vec<CacheDevice>) -> Result<Self> {
        if kind == Kind::Bcache {
            // As the agent's unit does.
            command("modprobe", &["bcache"])?;
        }
        let mapper = Arc::new(Mapper::new()?);
        let config = Config {
            kind,
            folder: scratch("group")?,
            devices,
        };
        Self::again(mapper, config)
    }

    fn again(mapper: Arc<Mapper>, config: Config) -> Result<Self> {
        let group = Group::open(Arc::clone(&mapper), &config)?;
        Ok(Self {
            mapper,
            config,
            group,
        })
    }

    /// In order; what it was made of is opened again by [`Bench::again`].
    fn close(self) -> Result<(Arc<Mapper>, Config)> {
        self.group.close()?;
        Ok((self.mapper, self.config))
    }

    /// Takes an image in and makes its base.
    pub(crate) fn add(&mut self, image: &Image) -> Result<Outcome> {
        let table = self.group.add(image.digest, image.joined()?, image.sectors())?;
        Ok(self
            .mapper
            .ensure(&DmDevice::Base(image.digest), &table, Mode::ReadOnly)?)
    }

    fn remove(&mut self, image: &Image) -> Result<()> {
        self.mapper.remove(&DmDevice::Base(image.digest))?;
        Ok(self.group.remove(&image.digest)?)
    }

    fn release(&mut self, image: &Image) -> Result<()> {
        self.mapper.remove(&DmDevice::Base(image.digest))?;
        Ok(self.group.release(&image.digest)?)
    }

    /// Every block of the base is the image's.
    pub(crate) fn check(&self, image: &Image) -> Result<()> {
        image.check(&Mapper::path(&DmDevice::Base(image.digest)))
    }

    /// Fills all of it at the pace.
    pub(crate) fn fill(&self, image: &Image, bytes_per_second: u64) -> Result<Filler> {
        let mut filler = self.group.filler(&image.digest, image.joined()?)?;
        let began = Instant::now();
        let mut pace = Pace::new(bytes_per_second, began.elapsed());
        while let Some(chunk) = filler.missing(0..filler.chunks()) {
            let bytes = filler.fill(chunk)?;
            wait(pace.after(bytes, began.elapsed()));
        }
        Ok(filler)
    }

    /// Reads every block of the base, checked, and gives the bytes that came from the image's source meanwhile.
    fn shipped(&self, image: &Image) -> Result<u64> {
        drop_page_cache()?;
        let before = image.bytes_read()?;
        self.check(image)?;
        Ok(image.bytes_read()? - before)
    }
}

#[expect(clippy::disallowed_methods, reason = "a pace is kept by waiting")]
pub(crate) fn wait(time: Duration) {
    thread::sleep(time);
}

fn fills(kind: Kind) -> Result<()> {
    let device = empty_loop("cache", CACHE_BYTES)?;
    let mut bench = Bench::open(kind, &[&device])?;
    // Not a multiple of the block, as images are not.
    let image = Image::make(&bench.mapper, 16 * MIB + 20 * 1024, 1)?;
    bench.add(&image)?;
    let before = image.bytes_read()?;
    let filler = bench.fill(&image, BYTES_PER_SECOND)?;
    filler.save()?;
    ensure!(filler.filled() == filler.chunks(), "{} filled", filler.filled());
    let filling = image.bytes_read()? - before;
    ensure!(
        filling <= image.bytes + 65_536,
        "filling read {filling} of {}",
        image.bytes
    );
    let after = bench.shipped(&image)?;
    println!(
        "{kind}: {filling} bytes to fill {}, {after} more to read it all",
        image.bytes
    );
    ensure!(after * 10 <= image.bytes, "{after} bytes were read again");
    if kind == Kind::DmCache {
        ensure!(
            after == 0,
            "dm-cache keeps every block that is written, yet {after} were read"
        );
    }
    // A later process knows what is filled.
    let again = bench.group.filler(&image.digest, image.joined()?)?;
    ensure!(again.filled() == again.chunks(), "forgotten: {}", again.filled());
    Ok(())
}

fn a_removed_image(kind: Kind) -> Result<()> {
    let device = empty_loop("cache", CACHE_BYTES)?;
    let mut bench = Bench::open(kind, &[&device])?;
    let (a, b) = (
        Image::make(&bench.mapper, 8 * MIB, 1)?,
        Image::make(&bench.mapper, 8 * MIB, 2)?,
    );
    let mut starts = BTreeSet::new();
    for round in 0..3 {
        let (comes, goes) = if round % 2 == 0 { (&a, &b) } else { (&b, &a) };
        bench.add(comes)?;
        bench.fill(comes, u64::MAX)?;
        bench.check(comes).with_context(|| format!("round {round}"))?;
        ensure!(
            bench.group.contents().all(|(content, _)| *content != goes.digest),
            "the removed image has a range"
        );
        for (_, range) in bench.group.contents() {
            ensure!(
                starts.insert(range.start.0),
                "the range at {} came again",
                range.start
            );
        }
        if kind == Kind::DmCache {
            // Where the image before was, there is nothing to be read.
            let cache = direct(&Mapper::path(&DmDevice::CacheGroup))?;
            let mut earlier: Vec<_> = starts.iter().copied().collect();
            earlier.pop();
            // The cache may still hold these blocks; nobody has a device over them.
            let origins = direct(&Mapper::path(&DmDevice::Origins))?;
            for start in earlier {
                ensure!(
                    read(&origins, start * 512, 4096).is_err(),
                    "a freed range can be read"
                );
            }
            drop(cache);
        }
        bench.remove(comes)?;
    }
    Ok(())
}

fn images_come_and_go(kind: Kind) -> Result<()> {
    let device = empty_loop("cache", CACHE_BYTES)?;
    let mut bench = Bench::open(kind, &[&device])?;
    let stays = Image::make(&bench.mapper, 4 * MIB, 1)?;
    bench.add(&stays)?;
    let (rounds, ended) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let reader = thread::spawn({
        let (rounds, ended) = (Arc::clone(&rounds), Arc::clone(&ended));
        let path = Mapper::path(&DmDevice::Base(stays.digest));
        let stays = stays.clone();
        move || -> Result<()> {
            while !ended.load(Ordering::Relaxed) {
                stays.check(&path)?;
                rounds.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        }
    });
    let outcome = (2..8).try_for_each(|seed| -> Result<()> {
        let image = Image::make(&bench.mapper, 2 * MIB, seed)?;
        bench.add(&image)?;
        bench.check(&image)?;
        let before = rounds.load(Ordering::Relaxed);
        wait_for("another round of the reader", Duration::from_secs(20), || {
            ensure!(!reader.is_finished(), "the reader has failed");
            Ok((rounds.load(Ordering::Relaxed) > before).then_some(()))
        })?;
        bench.remove(&image)?;
        image.remove(&bench.mapper)
    });
    ended.store(true, Ordering::Relaxed);
    reader
        .join()
        .map_err(|_| anyhow::anyhow!("the reader panicked"))??;
    outcome
}

fn found_again(kind: Kind) -> Result<()> {
    let device = empty_loop("cache", CACHE_BYTES)?;
    let mut bench = Bench::open(kind, &[&device])?;
    let image = Image::make(&bench.mapper, 8 * MIB, 1)?;
    bench.add(&image)?;
    bench.fill(&image, BYTES_PER_SECOND)?;
    // The agent is killed: another takes over what runs, and changes nothing.
    let open = direct(&Mapper::path(&DmDevice::Base(image.digest)))?;
    bench.group = Group::open(Arc::clone(&bench.mapper), &bench.config)?;
    ensure!(bench.add(&image)? == Outcome::Identity, "the base was changed");
    read(&open, 0, 4096)?;
    drop(open);
    let shipped = bench.shipped(&image)?;
    ensure!(
        shipped * 10 <= image.bytes,
        "{shipped} bytes of what was cached are gone"
    );
    // It ends in order and comes back.
    bench.release(&image)?;
    let (mapper, config) = bench.close()?;
    let left: Vec<_> = mapper.list()?.into_iter().map(|seen| seen.device).collect();
    ensure!(left == [DmDevice::Verity(image.digest)], "left behind: {left:?}");
    let mut bench = Bench::again(mapper, config)?;
    bench.add(&image)?;
    let shipped = bench.shipped(&image)?;
    ensure!(
        shipped * 10 <= image.bytes,
        "of a closed cache {shipped} bytes are gone"
    );
    // The power goes, and the machine comes up: what is cached is not trusted.
    bench.release(&image)?;
    let (mapper, config) = bench.close()?;
    let state = config.folder.join("group");
    let cut: Vec<String> = fs::read_to_string(&state)?
        .lines()
        .map(|line| match line.split(' ').next() {
            Some("closed") => "closed false".into(),
            Some("boot") => "boot another".into(),
            _ => line.into(),
        })
        .collect();
    fs::write(&state, cut.join("\n") + "\n")?;
    let mut bench = Bench::again(mapper, config)?;
    bench.add(&image)?;
    // But for what the kernel looks at when a device appears.
    let shipped = bench.shipped(&image)?;
    ensure!(
        shipped + 65_536 >= image.bytes,
        "a cache of before a power cut was used: only {shipped} bytes were read"
    );
    Ok(())
}

/// Registered, with nothing over it, as an agent leaves one that is killed while the kernel starts it. Here it waits for its set.
fn a_device_that_does_not_run() -> Result<()> {
    let device = empty_loop("cache", CACHE_BYTES)?;
    let mut bench = Bench::open(Kind::Bcache, &[&device])?;
    let image = Image::make(&bench.mapper, 8 * MIB, 1)?;
    bench.add(&image)?;
    bench.release(&image)?;
    let (mapper, config) = bench.close()?;
    // Attached once, its superblock says so, and the kernel does not let it run without.
    let superblock = config.folder.join(format!("{}.superblock", image.digest));
    let head = loops::attach(&superblock, Mode::ReadWrite, 0)?;
    let line = |start, length, device| Line {
        start,
        length,
        target: Target::Linear {
            device,
            offset: Sectors(0),
        },
    };
    let table = Table::new(vec![
        line(Sectors(0), DATA_OFFSET, head.number),
        line(DATA_OFFSET, image.sectors(), image.joined()?),
    ])?;
    let waits = DmDevice::Backing(image.digest);
    mapper.ensure(&waits, &table, Mode::ReadWrite)?;
    let below = mapper.number(&waits)?.context("it is there")?;
    let bcache = Bcache::new()?;
    let held = || -> Result<bool> { Ok(mapper.find(&waits)?.is_some_and(|seen| seen.open_count > 0)) };
    for _ in 0..2 {
        bcache.register(below, &Mapper::path(&waits))?;
        ensure!(
            bcache.backing(below)?.is_none() && held()?,
            "it runs without its set"
        );
    }
    bcache.stop(below)?;
    wait_for("the end of bcache's hold on it", LETS_GO_WITHIN, || {
        Ok((!held()?).then_some(()))
    })?;
    mapper.remove(&waits)?;
    loops::detach(&head)?;
    // What it had cached is found.
    let mut bench = Bench::again(mapper, config)?;
    bench.add(&image)?;
    bench.release(&image)
}

fn a_foreign_device() -> Result<()> {
    let device = empty_loop("disk", 160 * MIB)?;
    let path = scratch("disk")?;
    let disk = fs::OpenOptions::new().read(true).write(true).open(&path)?;
    disk.write_all_at(b"EFI PART", 0)?;
    disk.sync_all()?;
    let begin = || -> Result<Vec<u8>> {
        let mut bytes = vec![0; 8 << 20];
        disk.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    };
    let before = begin()?;
    match Bench::open(Kind::DmCache, &[&device]) {
        Err(error) => ensure!(
            matches!(error.downcast_ref(), Some(GroupError::Foreign { .. })),
            "{error:#}"
        ),
        Ok(_) => bail!("somebody's disk was taken"),
    }
    ensure!(begin()? == before, "somebody's disk was written to");
    ensure!(Mapper::new()?.list()?.is_empty(), "something was made");
    Ok(())
}

fn dm_cache_grows() -> Result<()> {
    let first = empty_loop("cache-1", 96 * MIB)?;
    let mut bench = Bench::open(Kind::DmCache, &[&first])?;
    let image = Image::make(&bench.mapper, 8 * MIB, 1)?;
    bench.add(&image)?;
    bench.fill(&image, u64::MAX)?;
    let second = empty_loop("cache-2", 96 * MIB)?;
    let total = |mapper: &Mapper| -> Result<String> {
        let lines = mapper.status(&DmDevice::CacheGroup)?;
        match lines.first().map(|line| line.status.clone()) {
            Some(treeboot_dm::Status::Cache(treeboot_dm::status::CacheStatus::Counts(counts))) => {
                Ok(counts.total.to_string())
            }
            other => bail!("{other:?}"),
        }
    };
    let before: u64 = total(&bench.mapper)?.parse()?;
    bench.config.devices.push(CacheDevice {
        number: second.number,
        length: Sectors(96 * MIB / 512),
    });
    bench.group = Group::open(Arc::clone(&bench.mapper), &bench.config)?;
    let after: u64 = total(&bench.mapper)?.parse()?;
    ensure!(after > before + 1400, "it grew from {before} to {after} blocks");
    ensure!(bench.shipped(&image)? == 0, "what was cached is gone");
    Ok(())
}
