//! Disks against a byte array, and deltas that are not what they should be.

use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::join_all;
use proptest::prelude::*;

use super::format::SECTOR;
use super::*;
use crate::storage::model::{Fault, ModelStorage};
use crate::{BlockDevice, BlockError, Disk, Extent, Geometry, IoFuture, Provisioning};

pub(crate) const SECTOR_BYTES: u64 = 512;
/// Not a multiple of 4 KiB, and more than one word of the map.
pub(crate) const DISK_BYTES: u64 = 40 * 4096 + 3 * 512;
pub(crate) const META: DeltaMeta = DeltaMeta {
    digest: Digest([0xD1; 32]),
    bytes: DISK_BYTES,
};
pub(crate) const BOOT: BootId = BootId([1; 16]);
pub(crate) const NEXT_BOOT: BootId = BootId([2; 16]);

/// A base in memory whose every sector tells its number.
pub(crate) struct Base(pub(crate) u64);

pub(crate) fn base_sector(sector: u64) -> [u8; 512] {
    pattern(1_000_000 + sector)
}

/// 512 bytes that tell `tag`; 0 is zeroes.
pub(crate) fn pattern(tag: u64) -> [u8; 512] {
    let mut content = [0; 512];
    for eight in content.as_chunks_mut::<8>().0 {
        *eight = tag.to_le_bytes();
    }
    content
}

impl BlockDevice for Base {
    fn geometry(&self) -> Geometry {
        Geometry {
            bytes: self.0,
            block_bytes: 512,
            physical_block_bytes: 4096,
            read_only: true,
            thin: true,
        }
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> IoFuture<'a, ()> {
        self.check_range(offset, buf.len() as u64).unwrap();
        Box::pin(async move {
            tokio::task::yield_now().await;
            for (n, sector) in buf.chunks_mut(512).enumerate() {
                sector.copy_from_slice(&base_sector(offset / 512 + n as u64));
            }
            Ok(())
        })
    }

    fn write<'a>(&'a self, _: u64, _: &'a [u8]) -> IoFuture<'a, ()> {
        unreachable!("a base is never written")
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        unreachable!("a base is never flushed")
    }

    fn discard(&self, _: u64, _: u64) -> IoFuture<'_, ()> {
        unreachable!("a base is never written")
    }

    fn extent(&self, _: u64, bytes: u64) -> IoFuture<'_, Extent> {
        Box::pin(std::future::ready(Ok(Extent {
            bytes,
            state: Provisioning::Mapped,
        })))
    }
}

pub(crate) fn open(storage: &Arc<ModelStorage>, boot: BootId) -> Disk {
    let delta = Delta::open_storage(storage.clone(), Path::new("/deltas/vm"), META, boot).unwrap();
    Disk::new(Arc::new(Base(DISK_BYTES)), delta).unwrap()
}

pub(crate) async fn read_all(disk: &Disk) -> Vec<u8> {
    let mut all = vec![0xEE; disk.geometry().bytes as usize];
    disk.read(0, &mut all).await.unwrap();
    all
}

pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap()
        .block_on(future)
}

#[derive(Debug, Clone)]
enum Step {
    Write {
        sector: u64,
        sectors: u64,
    },
    Discard {
        sector: u64,
        sectors: u64,
    },
    Read {
        sector: u64,
        sectors: u64,
    },
    Flush,
    /// In the same boot, or flushed and in the next one.
    Reopen {
        next_boot: bool,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let place = || (0..DISK_BYTES / 512, 1u64..40);
    prop_oneof![
        6 => place().prop_map(|(sector, sectors)| Step::Write { sector, sectors }),
        3 => place().prop_map(|(sector, sectors)| Step::Discard { sector, sectors }),
        3 => place().prop_map(|(sector, sectors)| Step::Read { sector, sectors }),
        1 => Just(Step::Flush),
        1 => any::<bool>().prop_map(|next_boot| Step::Reopen { next_boot }),
    ]
}

async fn agrees_with_an_array(steps: Vec<Step>, mut open: impl FnMut(BootId) -> Disk) {
    let mut expected: Vec<u8> = (0..DISK_BYTES / 512).flat_map(base_sector).collect();
    let mut boot = BOOT;
    let mut disk = Some(open(boot));
    for (tag, step) in (1u64..).zip(steps) {
        let now = disk.as_ref().unwrap();
        let span = |sector: u64, sectors: u64| {
            let from = (sector * 512) as usize;
            from..(from + (sectors * 512) as usize).min(expected.len())
        };
        match step {
            Step::Write { sector, sectors } => {
                let span = span(sector, sectors);
                let data = pattern(tag).repeat(span.len() / 512);
                now.write(sector * 512, &data).await.unwrap();
                expected[span].copy_from_slice(&data);
            }
            Step::Discard { sector, sectors } => {
                let span = span(sector, sectors);
                now.discard(sector * 512, span.len() as u64).await.unwrap();
                expected[span].fill(0);
            }
            Step::Read { sector, sectors } => {
                let span = span(sector, sectors);
                let mut buf = vec![0xEE; span.len()];
                now.read(sector * 512, &mut buf).await.unwrap();
                assert!(buf == expected[span]);
            }
            Step::Flush => now.flush().await.unwrap(),
            Step::Reopen { next_boot } => {
                if next_boot {
                    now.flush().await.unwrap();
                    boot.0[15] += 1;
                }
                drop(disk.take());
                disk = Some(open(boot));
            }
        }
        let all = read_all(disk.as_ref().unwrap()).await;
        let wrong = (0..all.len()).find(|&at| all[at] != expected[at]);
        assert_eq!(wrong, None, "first wrong byte after step {tag}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn a_disk_on_the_model_reads_like_a_byte_array(steps in prop::collection::vec(step(), 1..40)) {
        let storage = Arc::new(ModelStorage::new());
        block_on(agrees_with_an_array(steps, |boot| open(&storage, boot)));
    }

    #[test]
    fn a_disk_on_a_file_reads_like_a_byte_array(steps in prop::collection::vec(step(), 1..25)) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm");
        drop(Delta::create(&path, META, BOOT).unwrap());
        block_on(agrees_with_an_array(steps, |boot| {
            let delta = Delta::open(&path, META, boot).unwrap();
            Disk::new(Arc::new(Base(DISK_BYTES)), delta).unwrap()
        }));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn writers_of_one_block_at_once_lose_nothing() {
    for round in 0..20 {
        let disk = open(&Arc::new(ModelStorage::new()), BOOT);
        let writes = (0..DISK_BYTES / 512).map(|sector| {
            let disk = &disk;
            async move { disk.write(sector * 512, &pattern(sector + 1)).await.unwrap() }
        });
        join_all(writes).await;
        let all = read_all(&disk).await;
        for (sector, content) in all.chunks(512).enumerate() {
            assert_eq!(
                content,
                pattern(sector as u64 + 1),
                "round {round}, sector {sector}"
            );
        }
    }
}

#[tokio::test]
async fn a_fresh_delta_is_an_empty_file_and_a_discarded_block_gives_its_space_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm");
    let meta = DeltaMeta {
        bytes: 1 << 36,
        ..META
    };
    let delta = Delta::create(&path, meta, BOOT).unwrap();
    let disk = Disk::new(Arc::new(Base(meta.bytes)), delta).unwrap();
    disk.flush().await.unwrap();
    let mut buf = [0; 512];
    disk.read(4096, &mut buf).await.unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);
    disk.write(1 << 35, &[7; 1 << 20]).await.unwrap();
    disk.flush().await.unwrap();
    let full = disk.delta().allocated_bytes().unwrap();
    assert!((1 << 20..(1 << 20) + 65536).contains(&full), "{full}");
    let extent = disk.extent(1 << 35, 1 << 21).await.unwrap();
    assert_eq!((extent.bytes, extent.state), (1 << 20, Provisioning::Mapped));
    disk.discard(1 << 35, 1 << 20).await.unwrap();
    assert!(disk.delta().allocated_bytes().unwrap() < 65536);
    let extent = disk.extent(1 << 35, 1 << 21).await.unwrap();
    assert_eq!((extent.bytes, extent.state), (1 << 20, Provisioning::Hole));
}

#[tokio::test]
async fn data_in_memory_is_read_at_the_first_poll_also_where_states_mix() {
    let disk = open(&Arc::new(ModelStorage::new()), BOOT);
    disk.write(0, &[1; 8192]).await.unwrap();
    disk.discard(4096, 4096).await.unwrap();
    let mut buf = [9; 8192];
    let ready = disk.read(0, &mut buf).now_or_never();
    ready.expect("ready at the first poll").unwrap();
    assert_eq!((buf[4095], buf[4096]), (1, 0));
}

#[tokio::test]
async fn flushes_at_once_share_a_sync_and_a_flush_of_nothing_costs_none() {
    let storage = Arc::new(ModelStorage::new());
    let disk = open(&storage, BOOT);
    disk.write(0, &[1; 4096]).await.unwrap();
    let before = storage.log_len();
    let flushes = join_all((0..50).map(|_| disk.flush())).await;
    assert!(flushes.into_iter().all(|flush| flush.is_ok()));
    // Data, map; perhaps nothing for those that came during the first.
    assert_eq!(storage.log_len() - before, 3, "sync, map, sync");
    disk.flush().await.unwrap();
    assert_eq!(storage.log_len() - before, 3);
    disk.write(0, &[2; 4096]).await.unwrap();
    disk.flush().await.unwrap();
    assert_eq!(
        storage.log_len() - before,
        5,
        "a write in place, and one sync: the map is as it was"
    );
}

#[tokio::test]
async fn no_room_is_said_and_what_was_there_stays() {
    let storage = Arc::new(ModelStorage::new());
    let disk = open(&storage, BOOT);
    storage.set_full(true);
    for _ in 0..2 {
        let error = disk.write(0, &[1; 4096]).await.unwrap_err();
        assert!(matches!(
            error,
            BlockError::NoSpace {
                offset: 0,
                bytes: 4096
            }
        ));
    }
    let untouched: Vec<u8> = (0..DISK_BYTES / 512).flat_map(base_sector).collect();
    assert!(read_all(&disk).await == untouched);
    storage.set_full(false);
    disk.write(0, &[1; 4096]).await.unwrap();
    storage.set_full(true);
    assert!(disk.write(4096, &[2; 4096]).await.is_err());
    assert!(matches!(disk.flush().await, Err(BlockError::NoSpace { .. })));
    storage.set_full(false);
    disk.flush().await.unwrap();
    let all = read_all(&disk).await;
    assert!(all[..4096] == [1; 4096] && all[4096..] == untouched[4096..]);
    let lost = Arc::new(storage.crash(storage.log_len(), &mut || false));
    assert!(read_all(&open(&lost, NEXT_BOOT)).await == all);
}

#[tokio::test]
async fn after_a_failed_sync_the_next_flush_stores_everything_again() {
    for reopen in [false, true] {
        let storage = Arc::new(ModelStorage::new());
        let mut disk = open(&storage, BOOT);
        disk.write(0, &[1; 8192]).await.unwrap();
        disk.flush().await.unwrap();
        disk.write(4096, &[2; 8192]).await.unwrap();
        storage.fail_at(storage.operations(), Fault::Io);
        assert!(matches!(disk.flush().await, Err(BlockError::Io { .. })));
        if reopen {
            drop(disk);
            disk = open(&storage, BOOT);
        }
        disk.flush().await.unwrap();
        let lost = Arc::new(storage.crash(storage.log_len(), &mut || false));
        assert!(
            read_all(&open(&lost, NEXT_BOOT)).await == read_all(&disk).await,
            "{reopen}"
        );
    }
}

fn error_of(content: &[u8], meta: DeltaMeta) -> DeltaError {
    let storage = Arc::new(ModelStorage::with_content(content));
    Delta::open_storage(storage, Path::new("/deltas/vm"), meta, BOOT).unwrap_err()
}

#[test]
fn a_file_that_is_not_this_disks_delta_is_refused_with_what_to_do() {
    let storage = Arc::new(ModelStorage::new());
    block_on(async {
        let disk = open(&storage, BOOT);
        disk.write(0, &[1; 512]).await.unwrap();
        disk.flush().await.unwrap();
    });
    let sound = storage.to_vec();
    let changed = |at: usize, byte: u8| {
        let mut content = sound.clone();
        content[at] ^= byte;
        content
    };
    let other = DeltaMeta {
        digest: Digest([9; 32]),
        ..META
    };
    let mut headless = sound.clone();
    headless[..SECTOR].fill(0);
    let cases = [
        (error_of(&sound, other), "attach the image it was made on"),
        (error_of(&sound[..sound.len() - 1], META), "cut off"),
        (error_of(&changed(3, 1), META), "not a delta"),
        (error_of(&changed(8, 2), META), "newer"),
        (error_of(&changed(20, 1), META), "checksum"),
        (error_of(&headless, META), "header is gone"),
        (error_of(&changed(DURABLE_OFFSET as usize, 2), META), "block 0"),
    ];
    for (error, word) in cases {
        let text = error.to_string();
        assert!(text.contains("/deltas/vm") && text.contains(word), "{text}");
    }
}

#[test]
fn a_delta_is_made_once_and_held_by_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm");
    assert!(matches!(
        Delta::open(&path, META, BOOT),
        Err(DeltaError::Missing { .. })
    ));
    let delta = Delta::create(&path, META, BOOT).unwrap();
    assert!(matches!(
        Delta::create(&path, META, BOOT),
        Err(DeltaError::Exists { .. })
    ));
    assert!(matches!(
        Delta::open(&path, META, BOOT),
        Err(DeltaError::InUse { .. })
    ));
    let error = Disk::new(Arc::new(Base(4096)), delta).err().unwrap();
    assert_eq!((error.base_bytes, error.delta_bytes), (4096, DISK_BYTES));
}

#[test]
fn a_boot_id_is_a_uuid() {
    let id: BootId = "0102030405060708-090a-0b0c0d0e0f10\n".parse().unwrap();
    assert_eq!(id.0, std::array::from_fn(|i| i as u8 + 1));
    for bad in ["", "01", "g1020304-0506-0708-090a-0b0c0d0e0f10"] {
        assert!(bad.parse::<BootId>().is_err(), "{bad}");
    }
}
