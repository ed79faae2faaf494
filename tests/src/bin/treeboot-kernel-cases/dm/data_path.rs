//! The targets of a stack in use: deltas, multipath, stripes.

use std::fs;

use anyhow::{Context as _, Result, bail, ensure};
use treeboot_dm::loops;
use treeboot_dm::status::SnapshotStatus;
use treeboot_dm::table::{Multipath, PathGroup, PathSelector, Persistence};
use treeboot_dm::{
    DeviceNumber, DmDevice, Mapper, MapperError, Mode, Outcome, Sectors, Status, Table, Target,
};
use treeboot_types::StripeIndex;

use super::{MIB, content, disk};
use crate::devices::{
    Image, bytes_read, direct, direct_writable, empty_loop, image_file, read, scratch, write,
};

pub(super) fn multipath(
    selector: PathSelector,
    groups: &[&[DeviceNumber]],
    queue_if_no_path: bool,
) -> Target {
    Target::Multipath(Multipath {
        queue_if_no_path,
        bio_based: false,
        groups: groups
            .iter()
            .map(|devices| PathGroup {
                selector,
                paths: devices
                    .iter()
                    .map(|&device| treeboot_dm::table::Path {
                        device,
                        throughput: 1,
                    })
                    .collect(),
            })
            .collect(),
        first_group: 1,
    })
}

pub(super) fn a_delta_grows() -> Result<()> {
    let mapper = Mapper::new()?;
    let image = Image::make(&mapper, 8 * MIB, 2)?;
    let path = scratch("delta")?;
    fs::File::create(&path)?.set_len(MIB)?;
    let delta = loops::attach(&path, Mode::ReadWrite, 0)?;
    let device = disk("web-1")?;
    let table = Table::whole(
        image.sectors(),
        Target::Snapshot {
            origin: image.verity,
            delta: delta.number,
            persistence: Persistence::Persistent,
            chunk: Sectors(8),
        },
    )?;
    mapper.ensure(&device, &table, Mode::ReadWrite)?;
    let status = |device: &DmDevice| -> Result<SnapshotStatus> {
        match mapper.status(device)?.first().map(|line| line.status.clone()) {
            Some(Status::Snapshot(status)) => Ok(status),
            other => bail!("{other:?}"),
        }
    };
    let opened = direct_writable(&Mapper::path(&device))?;
    let mut grown = 0;
    for block in 0..1024_u64 {
        write(&opened, block * 4096, &[block as u8; 4096])?;
        let SnapshotStatus::Active { used, total, .. } = status(&device)? else {
            bail!("{}", status(&device)?);
        };
        if used.0 + 512 > total.0 {
            fs::OpenOptions::new()
                .write(true)
                .open(&path)?
                .set_len(total.bytes() + MIB)?;
            loops::set_capacity(&delta)?;
            grown += 1;
        }
    }
    ensure!(grown >= 3, "it grew {grown} times");
    // It survives its device.
    drop(opened);
    mapper.remove(&device)?;
    mapper.ensure(&device, &table, Mode::ReadWrite)?;
    let opened = direct_writable(&Mapper::path(&device))?;
    for block in 0..1024_u64 {
        ensure!(
            read(&opened, block * 4096, 4096)? == [block as u8; 4096],
            "block {block}"
        );
    }
    ensure!(
        read(&opened, 1024 * 4096, 4096)? == crate::devices::block_of(2, 1024),
        "the base is gone"
    );
    // One that nobody lets grow is invalid once it is full, and says so.
    let mut at = 1024;
    let full = loop {
        if write(&opened, at * 4096, &[1; 4096]).is_err() {
            break status(&device)?;
        }
        at += 1;
        ensure!(at < 2048, "it never filled");
    };
    ensure!(full == SnapshotStatus::Invalid, "{full}");
    Ok(())
}

pub(super) fn multipath_fails_over() -> Result<()> {
    let mapper = Mapper::new()?;
    let (a, b) = (empty_loop("a", 4 * MIB)?, empty_loop("b", 4 * MIB)?);
    write(&direct_writable(&a.path)?, 0, &[1; 4096])?;
    write(&direct_writable(&b.path)?, 0, &[2; 4096])?;
    let device = DmDevice::Multipath(content(5), StripeIndex(0));
    let table = Table::whole(
        Sectors(8192),
        multipath(PathSelector::RoundRobin, &[&[a.number], &[b.number]], true),
    )?;
    mapper.ensure(&device, &table, Mode::ReadOnly)?;
    let opened = direct(&Mapper::path(&device))?;
    let up = || -> Result<usize> {
        match mapper.status(&device)?.first().map(|line| line.status.clone()) {
            Some(Status::Multipath(status)) => Ok(status.paths_up()),
            other => bail!("{other:?}"),
        }
    };
    ensure!(
        read(&opened, 0, 4096)? == [1; 4096] && up()? == 2,
        "not the first group"
    );
    mapper.message(&device, Sectors(0), &format!("fail_path {}", a.number))?;
    ensure!(read(&opened, 0, 4096)? == [2; 4096] && up()? == 1, "no fail-over");
    // The kernel reports the group in use; that is no reason to load the table again.
    ensure!(
        mapper.ensure(&device, &table, Mode::ReadOnly)? == Outcome::Identity,
        "a fail-over looks like another table"
    );
    mapper.message(&device, Sectors(0), &format!("reinstate_path {}", a.number))?;
    ensure!(up()? == 2, "not reinstated");
    let refused = mapper.message(&device, Sectors(0), "nonsense");
    ensure!(matches!(refused, Err(MapperError::Ioctl { .. })), "{refused:?}");
    Ok(())
}

/// dm-switch gives the stripe units to each stripe's multipath by turns, and verity over it sees one image. A parent that goes
/// moves its own stripe alone.
pub(super) fn two_stripes() -> Result<()> {
    const UNIT: Sectors = Sectors(128);
    let mapper = Mapper::new()?;
    let image = Image::make(&mapper, 8 * MIB, 3)?;
    let parent = |name: &str| -> Result<_> {
        Ok(loops::attach(
            &image_file(name, image.bytes, image.seed)?,
            Mode::ReadOnly,
            0,
        )?)
    };
    let parents = [parent("parent-0")?, parent("parent-1")?];
    let fallbacks = [parent("fallback-0")?, parent("fallback-1")?];
    let mut stripes = Vec::new();
    for (index, (parent, fallback)) in parents.iter().zip(&fallbacks).enumerate() {
        let device = DmDevice::Multipath(image.digest, StripeIndex(u16::try_from(index)?));
        let target = multipath(
            PathSelector::QueueLength,
            &[&[parent.number], &[fallback.number]],
            true,
        );
        mapper.ensure(&device, &Table::whole(image.sectors(), target)?, Mode::ReadOnly)?;
        let number = mapper.number(&device)?.context("no multipath")?;
        stripes.push((number, Sectors(0)));
    }
    let switch = DmDevice::Switch(image.digest);
    let table = Table::whole(
        image.sectors(),
        Target::Switch {
            region: UNIT,
            paths: stripes,
        },
    )?;
    mapper.ensure(&switch, &table, Mode::ReadOnly)?;
    let number = mapper.number(&switch)?.context("no switch")?;
    // The image's verity device, which was over its file, moves over the stripes.
    let [line] = image.table.lines() else {
        bail!("verity has one line");
    };
    let Target::Verity(mut verity) = line.target.clone() else {
        bail!("not verity: {line}");
    };
    verity.data = number;
    let device = DmDevice::Verity(image.digest);
    let table = Table::whole(image.sectors(), Target::Verity(verity))?;
    ensure!(
        mapper.ensure(&device, &table, Mode::ReadOnly)? == Outcome::Reloaded,
        "verity was not moved"
    );
    let path = Mapper::path(&device);
    let shipped = || -> Result<Vec<u64>> { parents.iter().chain(&fallbacks).map(bytes_read).collect() };
    let half = image.bytes / 2;
    // What a loop device counts goes on from whom it was before.
    let since = |before: &[u64]| -> Result<Vec<u64>> {
        Ok(shipped()?
            .iter()
            .zip(before)
            .map(|(after, before)| after - before)
            .collect())
    };
    let before = shipped()?;
    image.check(&path)?;
    let moved = since(&before)?;
    ensure!(moved == [half, half, 0, 0], "not by turns: {moved:?}");
    // Unit by unit, too.
    let opened = direct(&path)?;
    for unit in 0..4_u64 {
        let before = shipped()?;
        read(&opened, unit * UNIT.bytes(), usize::try_from(UNIT.bytes())?)?;
        let moved = since(&before)?;
        let by_turns = if unit % 2 == 0 {
            [UNIT.bytes(), 0]
        } else {
            [0, UNIT.bytes()]
        };
        ensure!(moved[..2] == by_turns, "unit {unit}: {moved:?}");
    }
    drop(opened);
    let before = shipped()?;
    mapper.message(
        &DmDevice::Multipath(image.digest, StripeIndex(0)),
        Sectors(0),
        &format!("fail_path {}", parents[0].number),
    )?;
    image.check(&path)?;
    let moved: Vec<u64> = shipped()?
        .iter()
        .zip(&before)
        .map(|(after, before)| after - before)
        .collect();
    ensure!(moved == [0, half, half, 0], "not its own stripe alone: {moved:?}");
    Ok(())
}
