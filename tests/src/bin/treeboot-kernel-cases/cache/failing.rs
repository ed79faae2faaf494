//! Cache devices that fail, for good and at times.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use treeboot_dm::group::{self, CacheDevice, Group, Health, Kind};
use treeboot_dm::loops::{self, LoopDevice};
use treeboot_dm::{DeviceNumber, DmDevice, Mapper, Mode, Outcome, Sectors};

use super::{BYTES_PER_SECOND, Bench, CACHE_BYTES, MIB};
use crate::devices::{FAILING, Image, command, direct, empty_loop};

/// Three times down, at least.
const FALTERS_FOR: Duration = Duration::from_secs(6);

/// Time for some rounds of reads.
const DEAD_FOR: Duration = Duration::from_secs(2);

/// A cache device that can be made to fail.
struct Failing {
    below: LoopDevice,
    length: Sectors,
}

impl Failing {
    fn make() -> Result<Self> {
        let below = empty_loop("cache", CACHE_BYTES)?;
        let length = loops::size(&below.path)?;
        let failing = Self { below, length };
        let table = failing.table(&failing.whole());
        command("dmsetup", &["create", FAILING, "--table", &table])?;
        Ok(failing)
    }

    fn whole(&self) -> String {
        format!("linear {} 0", self.below.number)
    }

    fn table(&self, target: &str) -> String {
        format!("0 {} {target}", self.length)
    }

    fn device(&self) -> Result<CacheDevice> {
        let asked = ["info", "-c", "--noheadings", "-o", "major,minor", FAILING];
        let number = command("dmsetup", &asked)?;
        Ok(CacheDevice {
            number: number.trim().parse().ok().context("no number")?,
            length: self.length,
        })
    }

    fn becomes(&self, target: &str) -> Result<()> {
        // What is under way when it begins to fail must not be waited for.
        command("dmsetup", &["suspend", "--nolockfs", FAILING])?;
        command("dmsetup", &["reload", FAILING, "--table", &self.table(target)])?;
        command("dmsetup", &["resume", FAILING]).map(drop)
    }
}

pub(super) fn a_cache_that_dies(kind: Kind) -> Result<()> {
    let failing = Failing::make()?;
    let mut bench = Bench::over(kind, vec![failing.device()?])?;
    let image = Image::make(&bench.mapper, 8 * MIB, 1)?;
    bench.add(&image)?;
    bench.fill(&image, BYTES_PER_SECOND)?;
    let health = bench.group.health()?;
    ensure!(health == Health::Good, "{health:?}");
    failing.becomes("error")?;
    let base = DmDevice::Base(image.digest);
    let (unreadable, _) = image.check_readable(&Mapper::path(&base))?;
    println!(
        "{kind}: of {} blocks {unreadable} could not be read",
        image.bytes / 4096
    );
    if kind == Kind::Bcache {
        goes_on_by_itself(&bench, &image, unreadable)?;
    }
    let uncached = group::uncached(image.verity, image.sectors())?;
    bench.mapper.ensure(&base, &uncached, Mode::ReadOnly)?;
    bench.check(&image)?;
    let Bench {
        mapper,
        config,
        group,
    } = bench;
    drop(group);
    Group::discard(&mapper, &config.folder)?;
    let left: BTreeSet<_> = mapper.list()?.into_iter().map(|seen| seen.device).collect();
    ensure!(
        left == BTreeSet::from([DmDevice::Verity(image.digest), base.clone()]),
        "left behind: {left:?}"
    );
    // The device is replaced, the group begins anew, and the base moves over it in use.
    let open = direct(&Mapper::path(&base))?;
    let fresh = empty_loop("fresh", CACHE_BYTES)?;
    let mut bench = Bench::open(kind, &[&fresh])?;
    ensure!(bench.add(&image)? == Outcome::Reloaded, "the base was not moved");
    bench.check(&image)?;
    drop(open);
    bench.mapper.remove(&base)?;
    bench.group.release(&image.digest)?;
    bench.group.close()?;
    command("dmsetup", &["remove", FAILING]).map(drop)
}

/// A device that is there one second and gone the next, while the cache is filled and read.
pub(super) fn a_cache_that_falters(kind: Kind) -> Result<()> {
    fails_while_filled(kind, |below| format!("flakey {below} 0 1 1"), FALTERS_FOR)
}

/// A device that is gone for good in the middle of a filling.
pub(super) fn a_cache_that_dies_while_filled(kind: Kind) -> Result<()> {
    fails_while_filled(kind, |_| "error".into(), DEAD_FOR)
}

fn fails_while_filled(kind: Kind, failure: fn(DeviceNumber) -> String, time: Duration) -> Result<()> {
    let failing = Failing::make()?;
    let mut bench = Bench::over(kind, vec![failing.device()?])?;
    let image = Image::make(&bench.mapper, 8 * MIB, 1)?;
    bench.add(&image)?;
    let base = DmDevice::Base(image.digest);
    let mut filler = bench.group.filler(&image.digest, image.verity)?;
    // Half of it is cached before.
    for chunk in 0..filler.chunks() / 2 {
        filler.fill(chunk)?;
    }
    failing.becomes(&failure(failing.below.number))?;
    let began = Instant::now();
    let (mut rounds, mut unreadable, mut not_filled) = (0, 0, 0);
    while began.elapsed() < time {
        for chunk in filler.chunks() / 2..filler.chunks() {
            not_filled += u64::from(filler.fill(chunk).is_err());
        }
        unreadable += image.check_readable(&Mapper::path(&base))?.0;
        rounds += 1;
    }
    println!(
        "{kind}: {rounds} rounds of {} blocks, {unreadable} could not be read; {not_filled} chunks could not be filled",
        image.bytes / 4096
    );
    if kind == Kind::Bcache {
        goes_on_by_itself(&bench, &image, unreadable)?;
    }
    // Past the cache all of it can be read again, also while the cache goes on to fail.
    let uncached = group::uncached(image.verity, image.sectors())?;
    bench.mapper.ensure(&base, &uncached, Mode::ReadOnly)?;
    bench.check(&image)?;
    drop(filler);
    let Bench { mapper, config, .. } = bench;
    Group::discard(&mapper, &config.folder)?;
    mapper.remove(&base)?;
    command("dmsetup", &["remove", FAILING]).map(drop)
}

/// What bcache cannot read from the cache it reads from below, and it says that there were errors.
fn goes_on_by_itself(bench: &Bench, image: &Image, unreadable: u64) -> Result<()> {
    ensure!(unreadable == 0, "{unreadable} blocks could not be read");
    let health = bench.group.health()?;
    ensure!(health != Health::Good, "nobody sees that the cache fails");
    bench.check(image)
}
