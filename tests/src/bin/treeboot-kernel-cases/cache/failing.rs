//! Cache devices that fail, for good and at times.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use treeboot_dm::group::{self, Group, Health, Kind};
use treeboot_dm::{DeviceNumber, DmDevice, Mapper, Mode, Outcome};

use super::{BYTES_PER_SECOND, Bench, CACHE_BYTES, MIB, wait};
use crate::devices::{FAILING, Failing, Image, command, direct, empty_loop};

/// Three times down, at least.
const FALTERS_FOR: Duration = Duration::from_secs(6);

/// bcache's journal waits 100 ms for more to write.
const SETTLES: Duration = Duration::from_secs(1);

/// Time for some rounds of reads.
const DEAD_FOR: Duration = Duration::from_secs(2);

pub(super) fn a_cache_that_dies(kind: Kind) -> Result<()> {
    let failing = Failing::make(CACHE_BYTES)?;
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
    let failing = Failing::make(CACHE_BYTES)?;
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

/// A device that can be read and takes no writes, as a worn flash drive: what was not written must not count as cached.
pub(super) fn a_cache_that_takes_no_writes(kind: Kind) -> Result<()> {
    let failing = Failing::make(CACHE_BYTES)?;
    let mut bench = Bench::over(kind, vec![failing.device()?])?;
    let image = Image::make(&bench.mapper, 8 * MIB, 1)?;
    bench.add(&image)?;
    let base = DmDevice::Base(image.digest);
    let mut filler = bench.group.filler(&image.digest, image.verity)?;
    // Past what bcache writes of its own when a device is attached.
    wait(SETTLES);
    failing.becomes(&format!(
        "flakey {} 0 0 {} 1 error_writes",
        failing.below.number,
        u32::MAX
    ))?;
    let mut not_filled = 0;
    for chunk in 0..filler.chunks() {
        not_filled += u64::from(filler.fill(chunk).is_err());
    }
    // A wrong block is an error of this call.
    let (unreadable, _) = image.check_readable(&Mapper::path(&base))?;
    println!(
        "{kind}: of {} chunks {not_filled} could not be filled, {unreadable} blocks not be read",
        filler.chunks()
    );
    if kind == Kind::Bcache {
        goes_on_by_itself(&bench, &image, unreadable)?;
    }
    let uncached = group::uncached(image.verity, image.sectors())?;
    bench.mapper.ensure(&base, &uncached, Mode::ReadOnly)?;
    bench.check(&image)?;
    drop(filler);
    let Bench { mapper, config, .. } = bench;
    Group::discard(&mapper, &config.folder)?;
    mapper.remove(&base)?;
    failing.remove()
}

/// What bcache cannot read from the cache it reads from below, and it says that there were errors.
fn goes_on_by_itself(bench: &Bench, image: &Image, unreadable: u64) -> Result<()> {
    ensure!(unreadable == 0, "{unreadable} blocks could not be read");
    let health = bench.group.health()?;
    ensure!(health != Health::Good, "nobody sees that the cache fails");
    bench.check(image)
}
