//! Names, tables, ioctls and loop devices on a real kernel.

mod data_path;

use std::fs::{self, OpenOptions};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use treeboot_dm::loops;
use treeboot_dm::table::{Cache, CacheMode, PathSelector, Persistence};
use treeboot_dm::{
    DeviceNumber, DmDevice, Mapper, MapperError, Missing, Mode, Outcome, Sectors, Table, Target,
};
use treeboot_types::{Digest, StripeIndex};

use crate::Group;
use crate::devices::{
    self, Image, command, direct, direct_writable, empty_loop, linear, lines, read, scratch, wait_for, write,
};

pub(crate) const GROUP: Group = Group {
    name: "dm",
    cases: &[
        ("tables_print_back_as_the_kernel_reports_them", tables_print_back),
        ("a_reload_keeps_io_going", a_reload_keeps_io_going),
        (
            "a_refused_table_leaves_the_old_one_running",
            a_refused_table_leaves_the_old_one_running,
        ),
        (
            "a_resume_that_cannot_be_undone_says_so",
            a_resume_that_cannot_be_undone,
        ),
        (
            "strangers_with_our_names_are_left_alone",
            strangers_are_left_alone,
        ),
        ("a_device_in_use_is_named_with_its_holders", a_device_in_use),
        ("what_is_missing_is_named_with_the_command", what_is_missing),
        ("loop_devices_are_found_again_and_grow", loop_devices),
        ("a_delta_grows_before_it_fills", data_path::a_delta_grows),
        (
            "two_stripes_take_turns_over_their_multipaths",
            data_path::two_stripes,
        ),
        (
            "multipath_follows_messages_and_fails_over",
            data_path::multipath_fails_over,
        ),
    ],
    helpers: &[],
    sweep: devices::sweep,
};

const MIB: u64 = 1 << 20;

fn content(byte: u8) -> Digest {
    Digest([byte; 32])
}

fn disk(name: &str) -> Result<DmDevice> {
    Ok(DmDevice::Disk(name.parse()?))
}

/// Made, reported, found equal, removed.
fn round_trip(mapper: &Mapper, device: &DmDevice, table: &Table, mode: Mode) -> Result<()> {
    let why = || format!("with the table\n{table}");
    ensure!(
        mapper.ensure(device, table, mode).with_context(why)? == Outcome::Created,
        "{device} was there"
    );
    let reported = mapper.table(device)?.context("no table")?;
    ensure!(
        reported.to_string() == table.to_string(),
        "the kernel reports '{reported}' for '{table}'"
    );
    mapper.status(device)?;
    mapper.deps(device)?;
    ensure!(
        mapper.ensure(device, table, mode)? == Outcome::Identity,
        "{device} was changed without need"
    );
    let node = Mapper::path(device);
    ensure!(node.exists(), "no node {}", node.display());
    ensure!(mapper.remove(device)?, "{device} was gone");
    ensure!(!mapper.remove(device)?, "{device} was removed twice");
    ensure!(!node.exists(), "the node {} stayed", node.display());
    Ok(())
}

fn tables_print_back() -> Result<()> {
    let mapper = Mapper::new()?;
    let (data, metadata) = (empty_loop("b", 4 * MIB)?, empty_loop("c", 4 * MIB)?);
    let (a, b, c) = (empty_loop("a", 4 * MIB)?.number, data.number, metadata.number);
    let offset = Sectors(0);
    let all = Sectors(8192);
    let check = |device: DmDevice, mode, target: Target| {
        round_trip(&mapper, &device, &Table::whole(all, target)?, mode)
    };
    check(
        disk("linear")?,
        Mode::ReadWrite,
        Target::Linear { device: a, offset },
    )?;
    check(disk("error")?, Mode::ReadWrite, Target::Error)?;
    check(disk("zero")?, Mode::ReadWrite, Target::Zero)?;
    check(
        DmDevice::Origins,
        Mode::ReadWrite,
        Target::DropWrites { device: a, offset },
    )?;
    let persistence = Persistence::Persistent;
    for chunk in [8, 32, 128].map(Sectors) {
        let (origin, delta) = (a, b);
        // A delta keeps the chunk that it was made with.
        write(&direct_writable(&data.path)?, 0, &[0; 4096])?;
        check(
            disk("snapshot")?,
            Mode::ReadWrite,
            Target::Snapshot {
                origin,
                delta,
                persistence,
                chunk,
            },
        )?;
    }
    check(
        disk("origin")?,
        Mode::ReadWrite,
        Target::SnapshotOrigin { origin: a },
    )?;
    let paths = vec![(a, offset), (b, offset)];
    let region = Sectors(128);
    check(
        DmDevice::Switch(content(1)),
        Mode::ReadOnly,
        Target::Switch { region, paths },
    )?;
    for selector in [
        PathSelector::RoundRobin,
        PathSelector::ServiceTime,
        PathSelector::QueueLength,
    ] {
        check(
            DmDevice::Multipath(content(1), StripeIndex(0)),
            Mode::ReadOnly,
            data_path::multipath(selector, &[&[a, b], &[c]], true),
        )?;
    }
    for (mode, metadata2) in [
        (CacheMode::WriteBack, true),
        (CacheMode::WriteThrough, false),
        (CacheMode::PassThrough, true),
    ] {
        check(
            DmDevice::CacheGroup,
            Mode::ReadWrite,
            Target::Cache(Cache {
                metadata: c,
                data: b,
                origin: a,
                block: Sectors(128),
                mode,
                metadata2,
                policy: "smq".into(),
                settings: vec![("migration_threshold".into(), "8192".into())],
            }),
        )?;
        // Another mode wants metadata of its own.
        write(&direct_writable(&metadata.path)?, 0, &[0; 4096])?;
    }
    // Verity, of a real image; `Image::make` has made it once already.
    let image = Image::make(&mapper, 2 * MIB, 1)?;
    let device = DmDevice::Verity(image.digest);
    image.check(&Mapper::path(&device))?;
    mapper.remove(&device)?;
    round_trip(&mapper, &device, &image.table, Mode::ReadOnly)?;
    // Several lines.
    let table = lines(vec![
        (16, Target::Linear { device: a, offset }),
        (48, Target::Zero),
        (1 << 42, Target::Error),
    ])?;
    round_trip(&mapper, &DmDevice::Backing(content(2)), &table, Mode::ReadWrite)
}

fn a_reload_keeps_io_going() -> Result<()> {
    let mapper = Mapper::new()?;
    let (a, b) = (empty_loop("a", 4 * MIB)?, empty_loop("b", 4 * MIB)?);
    let device = disk("web-1")?;
    let tables = [linear(a.number, Sectors(8192))?, linear(b.number, Sectors(8192))?];
    mapper.ensure(&device, &tables[0], Mode::ReadWrite)?;
    let opened = direct_writable(&Mapper::path(&device))?;
    let (done, ended) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let writer = thread::spawn({
        let (done, ended) = (Arc::clone(&done), Arc::clone(&ended));
        move || -> Result<()> {
            while !ended.load(Ordering::Relaxed) {
                let at = done.load(Ordering::Relaxed) % 1024 * 4096;
                write(&opened, at, &[0xa5; 4096])?;
                read(&opened, at, 4096)?;
                done.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        }
    });
    let mut failed = None;
    for round in 1..=60_usize {
        let before = done.load(Ordering::Relaxed);
        match mapper.ensure(&device, &tables[round % 2], Mode::ReadWrite) {
            Ok(Outcome::Reloaded) => {}
            other => failed = Some(format!("round {round}: {other:?}")),
        }
        let went_on = wait_for("another write", Duration::from_secs(10), || {
            Ok((done.load(Ordering::Relaxed) > before).then_some(()))
        });
        if let Err(error) = went_on {
            failed = Some(format!("round {round}: {error}"));
        }
        if failed.is_some() {
            break;
        }
    }
    ended.store(true, Ordering::Relaxed);
    writer
        .join()
        .map_err(|_| anyhow::anyhow!("the writer panicked"))??;
    match failed {
        Some(why) => bail!(why),
        None => Ok(()),
    }
}

fn a_refused_table_leaves_the_old_one_running() -> Result<()> {
    let mapper = Mapper::new()?;
    let a = empty_loop("a", 4 * MIB)?;
    let device = disk("web-1")?;
    let good = linear(a.number, Sectors(8192))?;
    mapper.ensure(&device, &good, Mode::ReadWrite)?;
    let opened = direct_writable(&Mapper::path(&device))?;
    write(&opened, 0, &[7; 4096])?;
    let offset = Sectors(0);
    let beyond = lines(vec![
        (8, Target::Zero),
        (
            16384,
            Target::Linear {
                device: a.number,
                offset,
            },
        ),
    ])?;
    let nobody = DeviceNumber {
        major: 240,
        minor: 77,
    };
    let absent = linear(nobody, Sectors(8))?;
    for (table, line, reason) in [
        (&beyond, "8 16384 linear", "too small for target"),
        (&absent, "0 8 linear 240:77 0", "Device lookup failed"),
    ] {
        let error = mapper
            .ensure(&device, table, Mode::ReadWrite)
            .err()
            .context("it was taken")?;
        let text = error.to_string();
        ensure!(matches!(error, MapperError::Refused { .. }), "{error:?}");
        ensure!(
            text.contains(line) && text.contains(reason) && text.contains("treeboot:disk:web-1"),
            "the error does not name line and reason: {text}"
        );
        ensure!(
            mapper.table(&device)?.as_ref() == Some(&good),
            "the table changed"
        );
        let seen = mapper.find(&device)?.context("it is gone")?;
        ensure!(!seen.suspended && !seen.waiting_table, "{seen:?}");
        ensure!(read(&opened, 0, 4096)? == [7; 4096], "other bytes");
        // A device that was to be made with such a table is not left behind.
        let other = disk("web-2")?;
        ensure!(
            mapper.ensure(&other, table, Mode::ReadWrite).is_err(),
            "it was taken"
        );
        ensure!(mapper.find(&other)?.is_none(), "{other} was left behind");
    }
    Ok(())
}

/// A table that loads and cannot be resumed, nor can the old one: a cache that would shrink below what it holds dirty gives
/// its metadata up.
fn a_resume_that_cannot_be_undone() -> Result<()> {
    let mapper = Mapper::new()?;
    let (origin, data, metadata) = (
        empty_loop("origin", 8 * MIB)?,
        empty_loop("data", 8 * MIB)?,
        empty_loop("metadata", 4 * MIB)?,
    );
    mapper.ensure(
        &DmDevice::CacheData,
        &linear(data.number, Sectors(16384))?,
        Mode::ReadWrite,
    )?;
    let cache = |threshold: &str| -> Result<Table> {
        Ok(Table::whole(
            Sectors(16384),
            Target::Cache(Cache {
                metadata: metadata.number,
                data: mapper.number(&DmDevice::CacheData)?.context("no cache data")?,
                origin: origin.number,
                block: Sectors(64),
                mode: CacheMode::WriteBack,
                metadata2: true,
                policy: "smq".into(),
                settings: vec![("migration_threshold".into(), threshold.into())],
            }),
        )?)
    };
    mapper.ensure(&DmDevice::CacheGroup, &cache("2048")?, Mode::ReadWrite)?;
    let opened = direct_writable(&Mapper::path(&DmDevice::CacheGroup))?;
    for block in 0..256_u64 {
        write(&opened, block * 32768, &[block as u8; 32768])?;
    }
    drop(opened);
    mapper.ensure(
        &DmDevice::CacheData,
        &linear(data.number, Sectors(8192))?,
        Mode::ReadWrite,
    )?;
    match mapper.ensure(&DmDevice::CacheGroup, &cache("4096")?, Mode::ReadWrite) {
        Err(
            error @ MapperError::Undo {
                left: "suspended", ..
            },
        ) => {
            ensure!(error.to_string().contains("treeboot:cache"), "{error}");
        }
        other => bail!("{other:?}"),
    }
    // It can be removed all the same.
    ensure!(mapper.remove(&DmDevice::CacheGroup)?, "it was gone");
    Ok(())
}

fn strangers_are_left_alone() -> Result<()> {
    let mapper = Mapper::new()?;
    let ours = disk("web-1")?;
    let table = Table::whole(Sectors(8), Target::Zero)?;
    mapper.ensure(&ours, &table, Mode::ReadWrite)?;
    let strangers = [
        ("treeboot:disk:web-10", "LVM-abcdef"),
        ("treeboot:disk:web-2", "TREEBOOT-treeboot:disk:web-20"),
        ("treeboot:disk:Web", "TREEBOOT-treeboot:disk:Web"),
        ("treeboot-disk-web-1", "TREEBOOT-x"),
    ];
    for (name, uuid) in strangers {
        command("dmsetup", &["create", name, "-u", uuid, "--table", "0 8 zero"])?;
    }
    command(
        "dmsetup",
        &["create", "treeboot:disk:web-3", "--table", "0 8 zero"],
    )?;
    let found: Vec<DmDevice> = mapper.list()?.into_iter().map(|seen| seen.device).collect();
    ensure!(found == [ours.clone()], "taken for ours: {found:?}");
    for name in ["web-10", "web-2", "web-3"] {
        let device = disk(name)?;
        let refused = |outcome: Result<(), MapperError>| match outcome {
            Err(MapperError::Stranger { .. }) => Ok(()),
            other => bail!("{device}: {other:?}"),
        };
        refused(mapper.remove(&device).map(drop))?;
        refused(mapper.ensure(&device, &table, Mode::ReadWrite).map(drop))?;
        refused(mapper.suspend(&device))?;
        refused(mapper.message(&device, Sectors(0), "x").map(drop))?;
    }
    // Removing ours by its name takes no other with it.
    ensure!(mapper.remove(&ours)?, "ours was gone");
    let left = command("dmsetup", &["ls"])?;
    for (name, _) in strangers {
        ensure!(left.contains(name), "{name} is gone: {left}");
        command("dmsetup", &["remove", name])?;
    }
    command("dmsetup", &["remove", "treeboot:disk:web-3"]).map(drop)
}

fn a_device_in_use() -> Result<()> {
    let mapper = Mapper::new()?;
    let a = empty_loop("a", 4 * MIB)?;
    let (below, above) = (DmDevice::Base(content(3)), disk("web-1")?);
    mapper.ensure(&below, &linear(a.number, Sectors(64))?, Mode::ReadWrite)?;
    let number = mapper.number(&below)?.context("no base")?;
    mapper.ensure(&above, &linear(number, Sectors(64))?, Mode::ReadWrite)?;
    match mapper.remove(&below) {
        Err(error @ MapperError::InUse { .. }) => {
            ensure!(error.to_string().contains("treeboot:disk:web-1"), "{error}");
        }
        other => bail!("{other:?}"),
    }
    let opened = direct(&Mapper::path(&above))?;
    match mapper.remove(&above) {
        Err(error @ MapperError::InUse { .. }) => {
            ensure!(error.to_string().contains("a mount or a program"), "{error}");
        }
        other => bail!("{other:?}"),
    }
    drop(opened);
    mapper.remove(&above)?;
    mapper.remove(&below).map(drop).map_err(Into::into)
}

fn what_is_missing() -> Result<()> {
    // The module of a target.
    let mapper = Mapper::new()?;
    let _ = command("modprobe", &["-r", "dm-zero"]);
    let modprobe = fs::read_to_string("/proc/sys/kernel/modprobe")?;
    fs::write("/proc/sys/kernel/modprobe", "/bin/false")?;
    let outcome = mapper.ensure(
        &disk("web-1")?,
        &Table::whole(Sectors(8), Target::Zero)?,
        Mode::ReadWrite,
    );
    fs::write("/proc/sys/kernel/modprobe", modprobe.trim_end())?;
    match outcome {
        Err(MapperError::Missing(missing @ Missing::Module { module: "dm-zero" })) => {
            let text = missing.to_string();
            ensure!(
                text.contains("modprobe dm-zero") && text.contains("linux-image"),
                "{text}"
            );
        }
        other => bail!("{other:?}"),
    }
    ensure!(mapper.list()?.is_empty(), "a device was left behind");
    // device-mapper itself.
    let (control, hidden) = ("/dev/mapper/control", "/dev/mapper/control.hidden");
    fs::rename(control, hidden)?;
    let outcome = Mapper::new();
    fs::rename(hidden, control)?;
    match outcome {
        Err(MapperError::Missing(Missing::Module { module: "dm-mod" })) => {}
        other => bail!("{other:?}"),
    }
    // The right.
    let nobody = nix::unistd::Uid::from_raw(65534);
    nix::unistd::seteuid(nobody)?;
    let outcome = Mapper::new();
    nix::unistd::seteuid(nix::unistd::Uid::from_raw(0))?;
    match outcome {
        Err(MapperError::Missing(missing @ Missing::Root { .. })) => {
            ensure!(missing.to_string().contains("sudo"), "{missing}");
        }
        other => bail!("{other:?}"),
    }
    Ok(())
}

fn loop_devices() -> Result<()> {
    let path = scratch("file")?;
    fs::write(&path, vec![1; 1 << 16])?;
    let first = loops::attach(&path, Mode::ReadWrite, 0)?;
    ensure!(
        loops::attach(&path, Mode::ReadWrite, 0)? == first,
        "attached twice"
    );
    ensure!(loops::find(&path)? == [first.clone()], "{:?}", loops::find(&path));
    let read_only = loops::attach(&path, Mode::ReadOnly, 4096)?;
    ensure!(
        read_only.number != first.number && read_only.read_only,
        "{read_only:?}"
    );
    ensure!(loops::size(&read_only.path)? == Sectors(120), "wrong size");
    // Somebody else's, over a file of the same name in another folder.
    let stranger = scratch("other")?;
    fs::write(&stranger, vec![2; 1 << 16])?;
    let theirs = command("losetup", &["-f", "--show", &stranger.to_string_lossy()])?;
    ensure!(
        loops::find(&stranger)?.is_empty(),
        "a stranger's was taken for ours"
    );
    ensure!(loops::list()?.len() == 2, "{:?}", loops::list());
    OpenOptions::new().write(true).open(&path)?.set_len(1 << 17)?;
    loops::set_capacity(&first)?;
    ensure!(loops::size(&first.path)? == Sectors(256), "it did not grow");
    ensure!(
        loops::detach(&first)? && loops::detach(&read_only)?,
        "not detached"
    );
    ensure!(!loops::detach(&first)?, "detached twice");
    ensure!(loops::list()?.is_empty(), "{:?}", loops::list());
    command("losetup", &["-d", theirs.trim_end()]).map(drop)
}
