//! The cache against sources that are slow, wrong or gone, and disks that are full.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::join_all;
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use super::*;
use crate::storage::model::{Fault, ModelStorage};
use crate::verity::{VerityBuilder, VerityLayout};
use crate::{BlockError, Provisioning};

const CHUNK: u32 = 16 * 1024;

/// An image, its hash device and its digest.
pub(super) struct Image {
    pub(super) data: Vec<u8>,
    pub(super) hash: Vec<u8>,
    pub(super) content: ImageContent,
}

impl Image {
    pub(super) fn new(data: Vec<u8>, chunk_bytes: u32) -> Self {
        let hash = ModelStorage::new();
        let layout = VerityLayout::new(data.len() as u64);
        let mut builder = VerityBuilder::new(layout, &hash);
        builder.update(&data).unwrap();
        let content = ImageContent {
            digest: builder.finish().unwrap(),
            bytes: data.len() as u64,
            chunk_bytes,
        };
        Self {
            data,
            hash: hash.to_vec(),
            content,
        }
    }

    /// Each 512 bytes of it are unlike each other.
    pub(super) fn sample(bytes: usize) -> Self {
        let data = (0..bytes / 512).flat_map(|sector| {
            let mut content = [(sector % 251) as u8; 512];
            content[..8].copy_from_slice(&(sector as u64).to_le_bytes());
            content
        });
        Self::new(data.collect(), CHUNK)
    }

    fn region(&self, region: Region) -> &[u8] {
        match region {
            Region::Data => &self.data,
            Region::Hash => &self.hash,
        }
    }
}

/// A source with some paths, some of which deliver wrong bytes.
pub(super) struct TestSource {
    image: Arc<Image>,
    paths: u64,
    wrong: BTreeSet<SourceId>,
    /// So many fetches fail before one succeeds.
    failures: Mutex<u32>,
    /// Fetches wait for a permit.
    gate: Semaphore,
    fetches: Mutex<BTreeMap<(Region, u64), u32>>,
    reports: Mutex<Vec<(SourceId, Region, u64)>>,
}

impl TestSource {
    pub(super) fn new(image: &Arc<Image>) -> Self {
        Self {
            image: Arc::clone(image),
            paths: 3,
            wrong: BTreeSet::new(),
            failures: Mutex::new(0),
            gate: Semaphore::new(Semaphore::MAX_PERMITS),
            fetches: Mutex::default(),
            reports: Mutex::default(),
        }
    }

    fn fetches(&self, region: Region) -> u32 {
        let fetches = self.fetches.lock();
        fetches
            .iter()
            .filter(|((of, _), _)| *of == region)
            .map(|(_, count)| count)
            .sum()
    }
}

impl ChunkSource for TestSource {
    fn fetch<'a>(
        &'a self,
        region: Region,
        offset: u64,
        bytes: u32,
        avoid: &'a [SourceId],
    ) -> FetchFuture<'a> {
        Box::pin(async move {
            *self.fetches.lock().entry((region, offset)).or_default() += 1;
            self.gate.acquire().await.unwrap().forget();
            tokio::task::yield_now().await;
            let fails = {
                let mut failures = self.failures.lock();
                let fails = *failures > 0;
                *failures = failures.saturating_sub(1);
                fails
            };
            if fails {
                return Err(FetchError::Unavailable {
                    what: "the test's path is down".into(),
                });
            }
            let mut paths = (0..self.paths).map(SourceId);
            let source = paths.find(|path| !avoid.contains(path)).unwrap_or(SourceId(0));
            let start = offset as usize;
            let mut content = self.image.region(region)[start..start + bytes as usize].to_vec();
            if self.wrong.contains(&source) {
                let middle = content.len() / 2;
                content[middle] ^= 1;
            }
            Ok(Fetched {
                bytes: content.into(),
                source,
            })
        })
    }

    fn report_wrong(&self, source: SourceId, region: Region, offset: u64) {
        self.reports.lock().push((source, region, offset));
    }
}

#[derive(Default, Clone)]
pub(super) struct Disks {
    pub(super) data: Arc<ModelStorage>,
    pub(super) hash: Arc<ModelStorage>,
    pub(super) present: Arc<ModelStorage>,
}

impl Disks {
    pub(super) fn open(
        &self,
        content: ImageContent,
        source: Arc<dyn ChunkSource>,
        options: CacheOptions,
    ) -> Result<Arc<ChunkCache>, CacheError> {
        let files = CacheFiles {
            directory: "/cache".into(),
            data: self.data.clone(),
            hash: self.hash.clone(),
            present: Some(self.present.clone()),
        };
        ChunkCache::open_files(files, content, source, options)
    }
}

struct Setup {
    image: Arc<Image>,
    source: Arc<TestSource>,
    disks: Disks,
    cache: Arc<ChunkCache>,
}

fn setup(bytes: usize, change: impl FnOnce(&mut TestSource), options: CacheOptions) -> Setup {
    let image = Arc::new(Image::sample(bytes));
    let mut source = TestSource::new(&image);
    change(&mut source);
    let source = Arc::new(source);
    let disks = Disks::default();
    let cache = disks.open(image.content, source.clone(), options).unwrap();
    Setup {
        image,
        source,
        disks,
        cache,
    }
}

async fn read(device: &dyn BlockDevice, offset: u64, bytes: usize) -> Result<Vec<u8>, BlockError> {
    let mut buf = vec![0xEE; bytes];
    device.read(offset, &mut buf).await?;
    Ok(buf)
}

#[tokio::test]
async fn every_byte_is_the_images_and_the_second_read_is_ready_at_once() {
    // The last chunk and the last 4 KiB block are not whole.
    let Setup {
        image, cache, source, ..
    } = setup(40 * 16384 + 2560, |_| (), CacheOptions::default());
    let base = cache.base(Reader::Guest);
    assert_eq!(read(&*base, 0, image.data.len()).await.unwrap(), image.data);
    cache.quiesce().await;
    let mut buf = vec![0; image.data.len()];
    let ready = base.read(0, &mut buf).now_or_never();
    ready.expect("a hit is ready at the first poll").unwrap();
    assert!(buf == image.data);
    assert_eq!(source.fetches(Region::Data), 41);
    let counters = cache.counters();
    assert_eq!((counters.chunk_misses, counters.chunk_hits), (41, 41));
    assert_eq!(counters.cached_bytes, image.data.len() as u64);
    assert_eq!(counters.fetched_data_bytes, image.data.len() as u64);
    assert_eq!(counters.guest_read_bytes, 2 * image.data.len() as u64);
    assert_eq!(
        counters.guest_unique_bytes,
        image.data.len().next_multiple_of(4096) as u64
    );
}

#[tokio::test]
async fn a_hundred_readers_of_a_chunk_cause_one_fetch() {
    let Setup {
        image, cache, source, ..
    } = setup(
        1 << 20,
        |source| source.gate = Semaphore::new(0),
        CacheOptions::default(),
    );
    let (guest, child) = (cache.base(Reader::Guest), cache.base(Reader::Child));
    let readers = (0..100).map(|n| {
        let device = if n % 2 == 0 { &guest } else { &child };
        read(&**device, 16384 + (n % 4) * 4096, 4096)
    });
    let (results, ()) = tokio::join!(join_all(readers), async {
        while cache.counters().chunk_joined < 99 {
            tokio::task::yield_now().await;
        }
        source.gate.add_permits(Semaphore::MAX_PERMITS >> 1);
    });
    for (n, result) in results.into_iter().enumerate() {
        let offset = 16384 + (n % 4) * 4096;
        assert_eq!(result.unwrap(), image.data[offset..offset + 4096]);
    }
    assert_eq!(source.fetches(Region::Data), 1);
    assert_eq!(source.fetches(Region::Hash), 1 + 2 - 1, "one leaf, one top");
    let counters = cache.counters();
    assert_eq!((counters.chunk_misses, counters.chunk_joined), (1, 99));
    assert_eq!(
        (counters.guest_read_bytes, counters.child_read_bytes),
        (50 * 4096, 50 * 4096)
    );
}

#[tokio::test]
async fn the_misses_of_one_read_are_fetched_at_once() {
    let Setup { cache, source, .. } = setup(
        1 << 20,
        |source| source.gate = Semaphore::new(0),
        CacheOptions::default(),
    );
    let base = cache.base(Reader::Guest);
    tokio::join!(async { read(&*base, 8192, 16 * 16384).await.unwrap() }, async {
        // No permit was given yet: all are on their way together.
        while source.fetches(Region::Data) < 17 {
            tokio::task::yield_now().await;
        }
        source.gate.add_permits(Semaphore::MAX_PERMITS >> 1);
    });
}

#[tokio::test]
async fn no_more_chunks_are_on_their_way_than_allowed() {
    let options = CacheOptions {
        fetches: 4,
        ..CacheOptions::default()
    };
    let Setup {
        image, cache, source, ..
    } = setup(1 << 20, |source| source.gate = Semaphore::new(0), options);
    let base = cache.base(Reader::Guest);
    let (all, ()) = tokio::join!(read(&*base, 0, 1 << 20), async {
        while source.fetches(Region::Data) < 4 {
            tokio::task::yield_now().await;
        }
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert_eq!(source.fetches(Region::Data), 4);
        source.gate.add_permits(Semaphore::MAX_PERMITS >> 1);
    });
    assert!(all.unwrap() == image.data);
}

#[tokio::test]
async fn a_reader_that_leaves_does_not_take_the_fetch_with_it() {
    let Setup {
        image, cache, source, ..
    } = setup(
        1 << 20,
        |source| source.gate = Semaphore::new(0),
        CacheOptions::default(),
    );
    let base = cache.base(Reader::Guest);
    let first = {
        let base = cache.base(Reader::Guest);
        tokio::spawn(async move { read(&*base, 0, 512).await })
    };
    while source.fetches(Region::Data) == 0 {
        tokio::task::yield_now().await;
    }
    let second = tokio::spawn(async move { read(&*base, 512, 512).await });
    while cache.counters().chunk_joined == 0 {
        tokio::task::yield_now().await;
    }
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    source.gate.add_permits(Semaphore::MAX_PERMITS >> 1);
    assert_eq!(second.await.unwrap().unwrap(), image.data[512..1024]);
    assert_eq!(source.fetches(Region::Data), 1);
}

#[tokio::test]
async fn wrong_bytes_reach_nobody_and_their_path_is_reported_and_avoided() {
    let Setup {
        image,
        cache,
        source,
        disks,
    } = setup(
        1 << 20,
        |source| source.wrong = [SourceId(0), SourceId(1)].into(),
        CacheOptions::default(),
    );
    let base = cache.base(Reader::Guest);
    assert!(read(&*base, 0, 1 << 20).await.unwrap() == image.data);
    let reports = source.reports.lock().clone();
    assert!(reports.contains(&(SourceId(0), Region::Data, 0)));
    assert!(reports.contains(&(SourceId(1), Region::Data, 0)));
    assert!(reports.iter().any(|(_, region, _)| *region == Region::Hash));
    assert!(reports.iter().all(|(path, ..)| *path != SourceId(2)));
    assert_eq!(cache.counters().bad_chunks, reports.len() as u64);
    cache.quiesce().await;
    assert!(disks.data.to_vec() == image.data);
}

#[tokio::test]
async fn if_every_path_is_wrong_the_read_fails_after_bounded_tries() {
    let Setup { cache, source, .. } = setup(
        1 << 20,
        |source| source.wrong = (0..3).map(SourceId).collect(),
        CacheOptions::default(),
    );
    let base = cache.base(Reader::Guest);
    let error = read(&*base, 0, 512).await.unwrap_err();
    assert!(matches!(error, BlockError::Corrupt { .. }), "{error}");
    assert!(source.fetches(Region::Data) <= CacheOptions::default().tries);
    assert_eq!(cache.counters().cached_bytes, 0);
}

#[tokio::test(start_paused = true)]
async fn a_source_that_fails_a_few_times_is_asked_again_and_one_that_keeps_failing_is_told() {
    let Setup {
        image, cache, source, ..
    } = setup(
        1 << 20,
        |source| *source.failures.get_mut() = 3,
        CacheOptions::default(),
    );
    let base = cache.base(Reader::Guest);
    assert_eq!(read(&*base, 0, 512).await.unwrap(), image.data[..512]);
    *source.failures.lock() = u32::MAX;
    let error = read(&*base, 1 << 19, 512).await.unwrap_err();
    assert!(
        matches!(&error, BlockError::Unavailable { what } if what.contains("path is down")),
        "{error}"
    );
    *source.failures.lock() = 0;
    assert_eq!(
        read(&*base, 1 << 19, 512).await.unwrap(),
        image.data[1 << 19..][..512]
    );
}

#[tokio::test(start_paused = true)]
async fn a_source_that_never_answers_is_given_up() {
    let Setup { cache, .. } = setup(
        1 << 20,
        |source| source.gate = Semaphore::new(0),
        CacheOptions::default(),
    );
    let base = cache.base(Reader::Guest);
    let error = read(&*base, 0, 512).await.unwrap_err();
    assert!(matches!(error, BlockError::Unavailable { .. }), "{error}");
    assert!(cache.counters().longest_stall_us >= 15_000_000);
}

#[tokio::test(start_paused = true)]
async fn a_full_disk_passes_bytes_through_and_stores_again_when_there_is_room() {
    let Setup {
        image,
        cache,
        source,
        disks,
    } = setup(1 << 20, |_| (), CacheOptions::default());
    for disk in [&disks.data, &disks.hash, &disks.present] {
        disk.set_full(true);
    }
    let base = cache.base(Reader::Guest);
    for _ in 0..2 {
        assert!(read(&*base, 0, 1 << 20).await.unwrap() == image.data);
        cache.quiesce().await;
    }
    let counters = cache.counters();
    assert_eq!((counters.cached_bytes, counters.uncached_bytes), (0, 2 << 20));
    assert_eq!(source.fetches(Region::Data), 2 * 64);
    assert_eq!(
        source.fetches(Region::Hash),
        3,
        "hash blocks are remembered without a disk"
    );
    for disk in [&disks.data, &disks.hash, &disks.present] {
        disk.set_full(false);
    }
    tokio::time::advance(std::time::Duration::from_secs(6)).await;
    assert!(read(&*base, 0, 1 << 20).await.unwrap() == image.data);
    cache.quiesce().await;
    assert_eq!(cache.counters().cached_bytes, 1 << 20);
    assert_eq!(cache.counters().uncached_bytes, 2 << 20);
}

#[tokio::test]
async fn a_disk_without_room_for_the_map_is_still_a_cache() {
    let image = Arc::new(Image::sample(1 << 20));
    let disks = Disks::default();
    disks.present.set_full(true);
    let source = Arc::new(TestSource::new(&image));
    let cache = disks
        .open(image.content, source, CacheOptions::default())
        .unwrap();
    let base = cache.base(Reader::Guest);
    assert!(read(&*base, 0, 1 << 20).await.unwrap() == image.data);
}

#[tokio::test]
async fn what_is_cached_is_checked_again_after_opening_and_damage_is_fetched_anew() {
    let Setup {
        image,
        cache,
        source,
        disks,
    } = setup(1 << 20, |_| (), CacheOptions::default());
    read(&*cache.base(Reader::Guest), 0, 1 << 20).await.unwrap();
    cache.quiesce().await;
    drop(cache);
    let before = source.fetches(Region::Data);
    disks.data.damage(5 * 16384 + 100, &[1, 2, 3]);
    disks.hash.damage(2 * 4096 + 40, &[1, 2, 3]);
    let cache = disks
        .open(image.content, source.clone(), CacheOptions::default())
        .unwrap();
    assert_eq!(cache.counters().cached_bytes, 1 << 20);
    let base = cache.base(Reader::Guest);
    assert!(read(&*base, 0, 1 << 20).await.unwrap() == image.data);
    cache.quiesce().await;
    assert_eq!(source.fetches(Region::Data), before + 1);
    assert_eq!(source.fetches(Region::Hash), 3 + 1);
    assert_eq!(cache.counters().damaged_chunks, 2);
    assert_eq!(cache.counters().bad_chunks, 0);
    assert!(disks.data.to_vec() == image.data && disks.hash.to_vec()[4096..] == image.hash[4096..]);
}

#[tokio::test]
async fn a_warm_cache_is_read_without_its_source_and_at_once() {
    let Setup {
        image, cache, disks, ..
    } = setup(1 << 20, |_| (), CacheOptions::default());
    read(&*cache.base(Reader::Guest), 0, 1 << 20).await.unwrap();
    cache.quiesce().await;
    drop(cache);
    let cache = disks
        .open(image.content, Arc::new(NoSource), CacheOptions::default())
        .unwrap();
    let base = cache.base(Reader::Child);
    // The chunk and the hash blocks above it are checked within the first poll.
    let mut buf = [0; 512];
    let ready = base.read(16384, &mut buf).now_or_never();
    ready.expect("ready at the first poll").unwrap();
    assert_eq!(buf, image.data[16384..16384 + 512]);
    assert!(read(&*base, 0, 1 << 20).await.unwrap() == image.data);
}

#[tokio::test]
async fn the_hash_device_is_the_images_and_is_fetched_block_by_block() {
    let Setup {
        image, cache, source, ..
    } = setup(130 * 128 * 4096, |_| (), CacheOptions::default());
    let hash = cache.hash_device();
    assert_eq!(hash.geometry().bytes, image.hash.len() as u64);
    let last = image.hash.len() - 512;
    assert_eq!(read(&*hash, last as u64, 512).await.unwrap(), image.hash[last..]);
    assert_eq!(source.fetches(Region::Hash), 3, "the block and those above");
    assert!(read(&*hash, 0, image.hash.len()).await.unwrap() == image.hash);
    assert_eq!(source.fetches(Region::Hash), image.hash.len() as u32 / 4096 - 1);
    cache.quiesce().await;
    let mut buf = vec![0; 8192];
    let ready = hash.read(4096, &mut buf).now_or_never();
    ready.expect("ready at the first poll").unwrap();
    assert_eq!(buf, image.hash[4096..12288]);
}

#[tokio::test]
async fn zeroes_that_the_hash_tree_tells_of_are_neither_fetched_nor_stored() {
    let mut data = Image::sample(1 << 20).data;
    data[32768..1 << 19].fill(0);
    let image = Arc::new(Image::new(data, CHUNK));
    let source = Arc::new(TestSource::new(&image));
    let disks = Disks::default();
    let cache = disks
        .open(image.content, source.clone(), CacheOptions::default())
        .unwrap();
    let base = cache.base(Reader::Guest);
    let unknown = base.extent(0, 1 << 20).await.unwrap();
    assert_eq!((unknown.bytes, unknown.state), (1 << 20, Provisioning::Mapped));
    read(&*base, 0, 512).await.unwrap();
    assert!(read(&*base, 0, 1 << 20).await.unwrap() == image.data);
    cache.quiesce().await;
    assert!(read(&*base, 0, 1 << 20).await.unwrap() == image.data);
    assert_eq!(source.fetches(Region::Data), 64 - 30);
    assert_eq!(cache.counters().zero_chunks, 30);
    assert_eq!(
        disks.data.allocated_bytes().unwrap(),
        (1 << 20) - (1 << 19) + 32768
    );
    let extents = [
        (0, 32768, Provisioning::Mapped),
        (32768 + 512, (1 << 19) - 32768 - 512, Provisioning::Hole),
        (1 << 19, 1 << 19, Provisioning::Mapped),
    ];
    for (offset, bytes, state) in extents {
        let extent = base.extent(offset, (1 << 20) - offset).await.unwrap();
        assert_eq!((extent.bytes, extent.state), (bytes, state), "{offset}");
    }
}

#[tokio::test]
async fn a_store_serves_everything_and_an_adopted_image_fetches_its_data_only() {
    let image = Arc::new(Image::sample((1 << 20) + 512));
    let mut padded = image.data.clone();
    padded.resize(image.data.len().next_multiple_of(4096), 0);
    let disks = Disks {
        data: Arc::new(ModelStorage::with_content(&padded)),
        hash: Arc::new(ModelStorage::with_content(&image.hash)),
        present: Arc::default(),
    };
    let cache = disks
        .open(image.content, Arc::new(NoSource), CacheOptions::complete())
        .unwrap();
    let base = cache.base(Reader::Child);
    assert!(read(&*base, 0, image.data.len()).await.unwrap() == image.data);
    assert!(read(&*cache.hash_device(), 0, image.hash.len()).await.unwrap() == image.hash);
    drop((base, cache));

    disks.data.damage(70_000, &[0xAB; 3]);
    let cache = disks
        .open(image.content, Arc::new(NoSource), CacheOptions::complete())
        .unwrap();
    let error = read(&*cache.base(Reader::Child), 70_144, 512).await.unwrap_err();
    assert!(error.to_string().contains("import the image again"), "{error}");

    let adopted = Disks {
        hash: disks.hash.clone(),
        ..Disks::default()
    };
    let source = Arc::new(TestSource::new(&image));
    let options = CacheOptions {
        hash: Completeness::All,
        ..CacheOptions::default()
    };
    let cache = adopted.open(image.content, source.clone(), options).unwrap();
    let base = cache.base(Reader::Guest);
    assert!(read(&*base, 0, image.data.len()).await.unwrap() == image.data);
    assert_eq!(source.fetches(Region::Hash), 0);
    assert!(disks.open(image.content, source, options).is_ok());
}

#[tokio::test]
async fn a_disk_that_cannot_be_read_costs_a_fetch() {
    let Setup {
        image,
        cache,
        source,
        disks,
    } = setup(1 << 20, |_| (), CacheOptions::default());
    let base = cache.base(Reader::Guest);
    read(&*base, 0, 16384).await.unwrap();
    cache.quiesce().await;
    let now = disks.data.operations();
    (0..3).for_each(|k| disks.data.fail_at(now + k, Fault::Io));
    assert_eq!(read(&*base, 0, 16384).await.unwrap(), image.data[..16384]);
    assert_eq!(source.fetches(Region::Data), 2);
}

#[tokio::test]
async fn the_access_map_tells_the_order_of_first_reading() {
    let Setup { cache, .. } = setup(1 << 20, |_| (), CacheOptions::default());
    let (guest, child) = (cache.base(Reader::Guest), cache.base(Reader::Child));
    for (offset, bytes) in [(40960, 512), (0, 8192), (8192, 512), (4096, 40960)] {
        read(&*guest, offset, bytes).await.unwrap();
    }
    read(&*child, 1 << 19, 4096).await.unwrap();
    assert_eq!(cache.access_map(), [(10, 1), (0, 10)]);
    assert_eq!(cache.counters().guest_unique_bytes, 11 * 4096);
}

#[tokio::test]
async fn nobody_can_write() {
    let Setup { cache, .. } = setup(1 << 20, |_| (), CacheOptions::default());
    for device in [cache.base(Reader::Guest), cache.hash_device()] {
        assert!(matches!(
            device.write(0, &[0; 512]).await,
            Err(BlockError::ReadOnly)
        ));
        assert!(matches!(device.discard(0, 512).await, Err(BlockError::ReadOnly)));
        device.flush().await.unwrap();
    }
}

#[tokio::test]
async fn directories_that_cannot_be_this_images_cache_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let image = Image::sample(1 << 20);
    let open = |content, options| ChunkCache::open(dir.path(), content, Arc::new(NoSource), options).err();
    let complete = CacheOptions::complete();
    assert!(matches!(
        open(image.content, complete),
        Some(CacheError::Io { .. })
    ));
    for bytes in [0, 513, 1 << 60] {
        let content = ImageContent {
            bytes,
            ..image.content
        };
        let error = open(content, complete);
        assert!(matches!(error, Some(CacheError::Content { .. })), "{bytes}");
    }
    let content = ImageContent {
        chunk_bytes: 12288,
        ..image.content
    };
    assert!(open(content, complete).is_some());

    let partial = CacheOptions::default();
    let held = ChunkCache::open(dir.path(), image.content, Arc::new(NoSource), partial).unwrap();
    let error = open(image.content, partial).unwrap();
    assert!(matches!(error, CacheError::InUse { .. }), "{error}");
    let shared = Arc::downgrade(&held.shared);
    drop(held);
    while shared.strong_count() > 0 {
        tokio::task::yield_now().await;
    }

    let other = ImageContent {
        digest: Digest([7; 32]),
        ..image.content
    };
    let error = open(other, partial).unwrap();
    assert!(matches!(error, CacheError::OtherImage { .. }), "{error}");
    let path = dir.path().join(PRESENT_FILE);
    let mut header = std::fs::read(&path).unwrap();
    header[8] = 2;
    let sum = crate::verity::sha256(&header[..56]);
    header[56..88].copy_from_slice(&sum.0);
    std::fs::write(&path, &header).unwrap();
    let error = open(image.content, partial).unwrap();
    assert!(
        matches!(
            error,
            CacheError::Version {
                found: 2,
                known: 1,
                ..
            }
        ),
        "{error}"
    );
    // Damage is no reason to refuse: it is only a cache.
    header[20] ^= 1;
    std::fs::write(&path, &header).unwrap();
    assert!(open(image.content, partial).is_none());
    std::fs::write(dir.path().join(DATA_FILE), [0; 512]).unwrap();
}
