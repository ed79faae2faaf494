//! Kind dm-cache: one cache over the address space of all contents.
//!
//! From the bottom: `treeboot:origins` has each content at its range, as a target that passes reads on and drops writes, then
//! zeroes up to the end of the last block, and errors everywhere else. `treeboot:cache` is a dm-cache over it, in
//! **writeback** mode, because only then does smq take a block in at its first write. Only the filler writes. A block that it
//! wrote counts as dirty until dm-cache has written it back, to where writes vanish; the origin holds the same bytes.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use treeboot_types::Digest;

use super::error::{GroupError, io_error};
use super::open::{Group, Health};
use super::{BLOCK, Range, SPACE};
use crate::status::CacheStatus;
use crate::table::{Cache, CacheMode};
use crate::{DeviceNumber, DmDevice, Line, Mapper, Mode, Sectors, Status, Table, Target};

/// Metadata of any cache: 4 MiB, and for each block four times the 16 bytes that it takes (kernel `cache.rst`), so that
/// devices can be added. At least this much of the cache must be left for data.
const METADATA: u64 = 8192;

/// How long a content that goes waits for its last blocks to be written back, to where writes vanish. They are written
/// within seconds where nobody fills.
const CLEAN_WITHIN: Duration = Duration::from_secs(5);

/// Length of the metadata for a cache of `have`.
pub(super) fn metadata_for(have: Sectors) -> Sectors {
    Sectors((METADATA + have.0 / BLOCK.0 * 64 / 512).next_multiple_of(BLOCK.0))
}

/// Makes origins and cache, or takes over those that run.
pub(super) fn start(group: &Group, is_new: bool) -> Result<(), GroupError> {
    if is_new {
        // A metadata device that begins with zeroes is formatted.
        let path = Mapper::path(&DmDevice::CacheMetadata);
        let zeroes = vec![0; 4096];
        OpenOptions::new()
            .write(true)
            .open(&path)
            .and_then(|device| {
                device.write_all_at(&zeroes, 0)?;
                device.sync_all()
            })
            .map_err(io_error("clear", &path))?;
    }
    if group.mapper.find(&DmDevice::Origins)?.is_none() {
        load_origins(group, &[])?;
    }
    let table = cache_table(group)?;
    group
        .mapper
        .ensure(&DmDevice::CacheGroup, &table, Mode::ReadWrite)?;
    if let Some(CacheStatus::Counts(counts)) = status(group)? {
        let room = group.layout.data.length();
        if counts.usable() && counts.total < room.0 / BLOCK.0 {
            // dm-cache looks at the length of its data device when a table is loaded.
            group
                .mapper
                .reload(&DmDevice::CacheGroup, &table, Mode::ReadWrite)?;
        }
    }
    Ok(())
}

pub(super) fn add(
    group: &Group,
    content: Digest,
    range: Range,
    verity: DeviceNumber,
) -> Result<Table, GroupError> {
    let mut present = present(group)?;
    present.retain(|(other, _, _)| *other != content);
    present.push((content, range, verity));
    load_origins(group, &present)?;
    let device = DmDevice::Cached(content);
    let table = Table::whole(
        range.length,
        Target::Linear {
            device: group.number(&DmDevice::CacheGroup)?,
            offset: range.start,
        },
    )?;
    group.mapper.ensure(&device, &table, Mode::ReadOnly)?;
    let cached = group.number(&device)?;
    super::served(&group.mapper, content, cached, verity, range.length)
}

pub(super) fn take_out(group: &Group, content: &Digest, range: Range) -> Result<(), GroupError> {
    group.mapper.remove(&DmDevice::Served(*content))?;
    group.mapper.remove(&DmDevice::Cached(*content))?;
    let mut present = present(group)?;
    if !present.iter().any(|(other, _, _)| other == content) {
        return Ok(());
    }
    debug_assert!(range.room.0 > 0);
    wait_until_clean(group)?;
    present.retain(|(other, _, _)| other != content);
    load_origins(group, &present)
}

pub(super) fn health(group: &Group) -> Result<Health, GroupError> {
    Ok(match status(group)? {
        Some(CacheStatus::Counts(counts)) if counts.usable() => Health::Good,
        Some(CacheStatus::Counts(counts)) if counts.needs_check => {
            Health::Failed("dm-cache's metadata needs a check".into())
        }
        Some(CacheStatus::Counts(_)) => Health::Failed("dm-cache's metadata is read-only".into()),
        Some(CacheStatus::Fail | CacheStatus::Error) => Health::Failed("dm-cache has failed".into()),
        None => Health::Failed("there is no dm-cache".into()),
    })
}

pub(super) fn status(group: &Group) -> Result<Option<CacheStatus>, GroupError> {
    let lines = group.mapper.status(&DmDevice::CacheGroup)?;
    Ok(lines.into_iter().find_map(|line| match line.status {
        Status::Cache(status) => Some(status),
        _ => None,
    }))
}

/// Which contents the running origins have, by their lines.
fn present(group: &Group) -> Result<Vec<(Digest, Range, DeviceNumber)>, GroupError> {
    let Some(table) = group.mapper.table(&DmDevice::Origins)? else {
        return Ok(Vec::new());
    };
    let device_at = |range: &Range| {
        table.lines().iter().find_map(|line| match line.target {
            Target::DropWrites { device, .. } if line.start == range.start => Some(device),
            _ => None,
        })
    };
    Ok(group
        .contents()
        .filter_map(|(content, range)| Some((*content, *range, device_at(range)?)))
        .collect())
}

fn load_origins(group: &Group, present: &[(Digest, Range, DeviceNumber)]) -> Result<(), GroupError> {
    let table = origins_table(present)?;
    group.mapper.ensure(&DmDevice::Origins, &table, Mode::ReadWrite)?;
    Ok(())
}

fn origins_table(present: &[(Digest, Range, DeviceNumber)]) -> Result<Table, crate::TableError> {
    let mut sorted: Vec<_> = present.iter().collect();
    sorted.sort_by_key(|(_, range, _)| range.start);
    let mut lines: Vec<Line> = Vec::new();
    let mut start = Sectors(0);
    let mut push = |length: u64, target: Target| {
        if length > 0 {
            lines.push(Line {
                start,
                length: Sectors(length),
                target,
            });
            start = Sectors(start.0 + length);
        }
    };
    let mut at = 0;
    for (_, range, verity) in sorted {
        push(range.start.0.saturating_sub(at), Target::Error);
        push(
            range.length.0,
            Target::DropWrites {
                device: *verity,
                offset: Sectors(0),
            },
        );
        push(range.room.0 - range.length.0, Target::Zero);
        at = range.start.0 + range.room.0;
    }
    push(SPACE.0.saturating_sub(at), Target::Error);
    Table::new(lines)
}

fn cache_table(group: &Group) -> Result<Table, GroupError> {
    Ok(Table::whole(
        SPACE,
        Target::Cache(Cache {
            metadata: group.number(&DmDevice::CacheMetadata)?,
            data: group.number(&DmDevice::CacheData)?,
            origin: group.number(&DmDevice::Origins)?,
            block: BLOCK,
            mode: CacheMode::WriteBack,
            metadata2: true,
            policy: "smq".into(),
            settings: Vec::new(),
        }),
    )?)
}

/// Waits until nothing is dirty, so that no block of the content is written back to where errors will be. Where others
/// fill at the same time that may never be, and does no harm but lines in the kernel's log.
fn wait_until_clean(group: &Group) -> Result<(), GroupError> {
    let began = Instant::now();
    while let Some(CacheStatus::Counts(counts)) = status(group)? {
        if counts.dirty == 0 || !counts.usable() || began.elapsed() > CLEAN_WITHIN {
            break;
        }
        pause();
    }
    Ok(())
}

#[expect(
    clippy::disallowed_methods,
    reason = "between two looks at a condition with a deadline; dm-cache sends no event for it"
)]
fn pause() {
    std::thread::sleep(Duration::from_millis(20));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, length: u64) -> Range {
        Range {
            start: Sectors(start),
            length: Sectors(length),
            room: Sectors(length.next_multiple_of(128)),
        }
    }

    #[test]
    fn all_that_no_content_has_is_errors() {
        let verity = DeviceNumber { major: 254, minor: 3 };
        let present = [
            (Digest([2; 32]), range(512, 100), verity),
            (Digest([1; 32]), range(128, 256), verity),
        ];
        let end = SPACE.0;
        assert_eq!(
            origins_table(&present).unwrap().to_string(),
            format!(
                "0 128 error\n128 256 flakey 254:3 0 0 4294967295 1 drop_writes\n384 128 error\n\
                 512 100 flakey 254:3 0 0 4294967295 1 drop_writes\n612 28 zero\n640 {} error",
                end - 640
            )
        );
        assert_eq!(origins_table(&[]).unwrap().to_string(), format!("0 {end} error"));
    }
}
