//! The group against the plain images, whatever is evicted, added, removed, pinned, broken or killed meanwhile.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::*;
use crate::Extent;
use crate::cache::tests::{Image, TestSource};
use crate::cache::{ChunkCache, Reader};
use crate::storage::Storage;

const MIB: u64 = 1 << 20;
/// What no digest keeps apart: metadata of the file system, and a chunk that is just being written.
const SLACK: u64 = SEGMENT_BYTES;

/// How a disk is.
#[derive(Default)]
struct Disk {
    broken: AtomicBool,
    full: AtomicBool,
    done: AtomicU64,
    /// From this operation on nothing is changed any more; 0: never.
    dies_at: AtomicU64,
}

impl Disk {
    fn read(&self) -> io::Result<()> {
        match self.broken.load(Ordering::SeqCst) {
            true => Err(io::Error::other("the test's disk is broken")),
            false => Ok(()),
        }
    }

    fn change(&self) -> io::Result<()> {
        self.read()?;
        let (done, dies_at) = (
            self.done.fetch_add(1, Ordering::SeqCst),
            self.dies_at.load(Ordering::SeqCst),
        );
        match dies_at > 0 && done >= dies_at {
            true => Err(io::Error::other("the test's process is dead")),
            false => Ok(()),
        }
    }
}

struct OnDisk {
    inner: Arc<dyn Storage>,
    disk: Arc<Disk>,
}

impl Storage for OnDisk {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.disk.read()?;
        self.inner.read_at(offset, buf)
    }

    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<Option<()>> {
        self.disk.read()?;
        // Longer, so that whatever races with it does.
        std::thread::yield_now();
        self.inner.try_read_at(offset, buf)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.disk.change()?;
        if self.disk.full.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        std::thread::yield_now();
        self.inner.write_at(offset, data)
    }

    fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.disk.change()?;
        self.inner.punch(offset, bytes)
    }

    fn sync(&self) -> io::Result<()> {
        self.inner.sync()
    }

    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.disk.change()?;
        self.inner.set_len(bytes)
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        self.inner.allocated_bytes()
    }

    fn extent(&self, offset: u64, bytes: u64) -> io::Result<Extent> {
        self.inner.extent(offset, bytes)
    }
}

/// A real directory on a disk that can break.
struct Place {
    folder: Folder,
    disk: Arc<Disk>,
}

impl MemberFiles for Place {
    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn open(&self, digest: &Digest, create: bool) -> io::Result<Option<MemberImage>> {
        self.disk.read()?;
        let wrap = |inner| {
            Arc::new(OnDisk {
                inner,
                disk: Arc::clone(&self.disk),
            }) as Arc<dyn Storage>
        };
        let image = self.folder.open(digest, create)?;
        Ok(image.map(|image| MemberImage {
            data: wrap(image.data),
            hash: wrap(image.hash),
            present: wrap(image.present),
        }))
    }

    fn remove(&self, digest: &Digest) -> io::Result<()> {
        self.disk.change()?;
        self.folder.remove(digest)
    }

    fn images(&self) -> io::Result<Vec<Digest>> {
        self.folder.images()
    }

    fn room(&self) -> io::Result<MemberRoom> {
        self.disk.read()?;
        self.folder.room()
    }

    fn last_use(&self, digest: &Digest) -> u64 {
        self.folder.last_use(digest)
    }

    fn note_use(&self, digest: &Digest, unix_ms: u64) {
        self.folder.note_use(digest, unix_ms);
    }
}

fn group() -> Arc<CacheGroup> {
    Arc::new(CacheGroup::empty(false, BTreeMap::new()))
}

fn add(group: &CacheGroup, path: &Path, budget: Option<u64>) -> Arc<Disk> {
    let disk = Arc::new(Disk::default());
    add_disk(group, path, budget, &disk);
    disk
}

fn add_disk(group: &CacheGroup, path: &Path, budget: Option<u64>, disk: &Arc<Disk>) {
    let place = Place {
        folder: Folder::open(path, budget.is_some()).unwrap(),
        disk: Arc::clone(disk),
    };
    let spec = MemberSpec {
        path: path.into(),
        budget,
    };
    group.add_files(spec, Arc::new(place)).unwrap();
}

/// Bytes of disk below a directory.
fn blocks(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let Ok(entries) = std::fs::read_dir(path) else {
        return 0;
    };
    let entries = entries.filter_map(|entry| {
        let entry = entry.ok()?;
        let found = entry.metadata().ok()?;
        Some(match found.is_dir() {
            true => blocks(&entry.path()),
            false => found.blocks() * 512,
        })
    });
    entries.sum()
}

/// Images that have nothing in common.
fn image(n: u8, bytes: u64) -> Arc<Image> {
    let data = (0..bytes / 512).flat_map(|sector| {
        let mut content = [n; 512];
        content[..8].copy_from_slice(&(sector * 2654435761).to_le_bytes());
        content
    });
    Arc::new(Image::new(data.collect(), 16 * 1024))
}

fn open(group: &Arc<CacheGroup>, image: &Arc<Image>) -> Arc<ChunkCache> {
    ChunkCache::open_in(group, image.content, Arc::new(TestSource::new(image))).unwrap()
}

async fn read(cache: &Arc<ChunkCache>, image: &Image, offset: usize, bytes: usize) {
    let mut buf = vec![0xEE; bytes];
    cache
        .base(Reader::Guest)
        .read(offset as u64, &mut buf)
        .await
        .unwrap();
    assert!(
        buf == image.data[offset..offset + bytes],
        "{bytes} bytes at {offset} are not the image's"
    );
}

/// All of it, chunk by chunk; each is stored before the next is asked for.
async fn scan(cache: &Arc<ChunkCache>, image: &Image) {
    for offset in (0..image.data.len()).step_by(128 * 1024) {
        read(cache, image, offset, (128 * 1024).min(image.data.len() - offset)).await;
        cache.quiesce().await;
    }
}

fn cached(group: &CacheGroup, image: &Image) -> u64 {
    let report = group.report();
    let found = report
        .images
        .iter()
        .find(|found| found.digest == image.content.digest);
    found.map_or(0, |found| found.cached_bytes)
}

/// A small generator of numbers (splitmix64).
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((mixed ^ (mixed >> 31)) % limit as u64) as usize
    }
}

fn seed() -> u64 {
    let given = std::env::var("TREEBOOT_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok());
    given.unwrap_or(0x5eed)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_image_larger_than_the_budget_is_read_right_and_the_disk_keeps_to_the_budget() {
    let dir = tempfile::tempdir().unwrap();
    let group = group();
    add(&group, &dir.path().join("a"), Some(2 * MIB));
    add(&group, &dir.path().join("b"), Some(3 * MIB));
    let large = image(1, 9 * MIB);
    let cache = open(&group, &large);
    for _ in 0..2 {
        scan(&cache, &large).await;
        assert!(blocks(&dir.path().join("a")) <= 2 * MIB + SLACK);
        assert!(blocks(&dir.path().join("b")) <= 3 * MIB + SLACK);
    }
    let report = group.report();
    assert!(
        report
            .members
            .iter()
            .all(|member| member.used_bytes <= member.budget.unwrap()),
        "{report:?}"
    );
    assert!(
        report.members.iter().all(|member| member.used_bytes > MIB),
        "both are used: {report:?}"
    );
    assert!(report.evictions >= 8, "{report:?}");
}

#[tokio::test]
async fn what_is_popular_stays_while_a_large_image_is_read_through() {
    let dir = tempfile::tempdir().unwrap();
    let group = group();
    add(&group, dir.path(), Some(4 * MIB));
    let (popular, large) = (image(1, MIB), image(2, 12 * MIB));
    let (cache, other) = (open(&group, &popular), open(&group, &large));
    scan(&cache, &popular).await;
    let before = cache.counters().chunk_misses;
    for offset in (0..large.data.len()).step_by(256 * 1024) {
        read(&other, &large, offset, 256 * 1024).await;
        other.quiesce().await;
        read(&cache, &popular, offset % popular.data.len(), 4096).await;
    }
    assert_eq!(cache.counters().chunk_misses, before, "{:?}", group.report());
}

#[tokio::test]
async fn what_nobody_uses_goes_first_and_what_is_pinned_stays() {
    let dir = tempfile::tempdir().unwrap();
    let group = group();
    add(&group, dir.path(), Some(4 * MIB));
    let [pinned, old, cold, used] = [1, 2, 3, 4].map(|n| image(n, MIB));
    let large = image(9, 6 * MIB);
    let error = group.pin(&large.content.digest, large.content.bytes).unwrap_err();
    assert!(
        matches!(error, GroupError::PinTooLarge { capacity_bytes, pinned_bytes: 0, .. } if capacity_bytes == 4 * MIB),
        "{error}"
    );
    group.pin(&pinned.content.digest, pinned.content.bytes).unwrap();
    for (n, content) in [&pinned, &old, &cold].into_iter().enumerate() {
        let cache = open(&group, content);
        scan(&cache, content).await;
        group.look(1000 + n as u64, |_| false);
    }
    let cache = open(&group, &used);
    // The last members of a cache are let go by its owner's task.
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(30);
    while group.report().images.iter().filter(|image| image.used).count() > 1 {
        assert!(tokio::time::Instant::now() < deadline, "{:?}", group.report());
        tokio::task::yield_now().await;
    }
    scan(&cache, &used).await;
    assert_eq!(cached(&group, &pinned), MIB);
    assert!(
        cached(&group, &old) < MIB,
        "the oldest went first: {:?}",
        group.report()
    );
    assert_eq!(
        (cached(&group, &cold), cached(&group, &used)),
        (MIB, MIB),
        "{:?}",
        group.report()
    );
    let other = open(&group, &large);
    scan(&other, &large).await;
    assert_eq!(cached(&group, &pinned), MIB);
    assert_eq!((cached(&group, &old), cached(&group, &cold)), (0, 0));
    let digest = &pinned.content.digest;
    assert!(matches!(group.drop_image(digest), Err(GroupError::Pinned { .. })));
    assert!(group.unpin(digest) && !group.unpin(digest));
    assert_eq!(group.drop_image(digest).unwrap(), MIB);
    assert_eq!(cached(&group, &pinned), 0);
}

#[tokio::test]
async fn an_old_cache_is_a_member_and_a_member_is_a_cache_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(1, 3 * MIB);
    let digest = image.content.digest.to_string();
    let source = || Arc::new(TestSource::new(&image));
    let alone = ChunkCache::open(
        &dir.path().join(&digest),
        image.content,
        source(),
        CacheOptions::default(),
    )
    .unwrap();
    scan(&alone, &image).await;
    drop(alone);
    let group = loop {
        let group = group();
        add(&group, dir.path(), None);
        if cached(&group, &image) > 0 {
            break group;
        }
        // The files are let go by the cache's task.
        tokio::task::yield_now().await;
    };
    assert_eq!(cached(&group, &image), 3 * MIB);
    let cache = open(&group, &image);
    scan(&cache, &image).await;
    assert_eq!(cache.counters().chunk_misses, 0);
    group.remove(dir.path(), true).unwrap();
    assert_eq!(cached(&group, &image), 0);
    scan(&cache, &image).await;
    let again = ChunkCache::open(
        &dir.path().join(&digest),
        image.content,
        source(),
        CacheOptions::default(),
    )
    .unwrap();
    scan(&again, &image).await;
    assert_eq!(again.counters().chunk_misses, 0);
}

#[tokio::test]
async fn a_member_that_fails_is_dropped_and_its_content_is_fetched_into_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let group = group();
    let disk = add(&group, &dir.path().join("a"), Some(8 * MIB));
    add(&group, &dir.path().join("b"), Some(7 * MIB));
    let image = image(1, 4 * MIB);
    let cache = open(&group, &image);
    scan(&cache, &image).await;
    assert!(group.report().members[0].used_bytes > 0);
    disk.broken.store(true, Ordering::SeqCst);
    scan(&cache, &image).await;
    let report = group.report();
    let MemberState::Failed(why) = &report.members[0].state else {
        panic!("{report:?}");
    };
    assert!(why.contains("cannot be read") && why.contains("broken"), "{why}");
    assert_eq!(
        (report.members[0].used_bytes, cached(&group, &image)),
        (0, 4 * MIB)
    );
    let before = cache.counters().chunk_misses;
    scan(&cache, &image).await;
    assert_eq!(
        cache.counters().chunk_misses,
        before,
        "all of it is in the other member"
    );
    // It is taken back when it works; what it had is not doubled.
    assert!(matches!(
        group.add(MemberSpec {
            path: dir.path().join("b"),
            budget: None
        }),
        Err(GroupError::Exists { .. })
    ));
    add(&group, &dir.path().join("a"), Some(8 * MIB));
    assert_eq!(cached(&group, &image), 4 * MIB);
    assert!(
        blocks(&dir.path().join("a")) < MIB,
        "what is doubled is given back"
    );
    scan(&cache, &image).await;
    assert_eq!(cache.counters().chunk_misses, before);
}

#[tokio::test]
async fn a_member_whose_file_system_is_full_does_not_grow_and_is_used_again_later() {
    let dir = tempfile::tempdir().unwrap();
    let group = group();
    let disk = add(&group, &dir.path().join("a"), None);
    let image = image(1, 4 * MIB);
    let cache = open(&group, &image);
    for offset in (0..2 * MIB as usize).step_by(64 * 1024) {
        read(&cache, &image, offset, 64 * 1024).await;
        cache.quiesce().await;
    }
    disk.full.store(true, Ordering::SeqCst);
    scan(&cache, &image).await;
    let report = group.report();
    assert_eq!(report.members[0].state, MemberState::Full);
    disk.full.store(false, Ordering::SeqCst);
    group.look(1, |_| false);
    assert_eq!(group.report().members[0].state, MemberState::Working);
    // A directory with something else mounted over it, or put in its place, is not this one.
    std::fs::rename(dir.path().join("a"), dir.path().join("moved")).unwrap();
    group.look(2, |_| false);
    assert!(matches!(group.report().members[0].state, MemberState::Failed(_)));
    scan(&cache, &image).await;
}

/// The law: whatever happens to the members, readers get the images' bytes.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn readers_see_the_images_whatever_happens_to_the_members() {
    let seed = seed();
    println!("TREEBOOT_SEED={seed}");
    let mut dice = Dice(seed);
    let dir = tempfile::tempdir().unwrap();
    let group = group();
    let path = |n: usize| dir.path().join(format!("member{n}"));
    let budgets = [2 * MIB, 3 * MIB, 1 << 19];
    let mut disks: [Option<Arc<Disk>>; 3] = [None, None, None];
    let images = [image(1, 5 * MIB), image(2, 3 * MIB), image(3, MIB + 512)];
    let mut caches: [Option<Arc<ChunkCache>>; 3] = [None, None, None];
    for round in 0..150 {
        let mut readers = vec![];
        for (image, cache) in images.iter().zip(&mut caches) {
            if dice.below(8) == 0 {
                *cache = None;
                continue;
            }
            let cache = cache.get_or_insert_with(|| open(&group, image));
            for _ in 0..4 {
                let sectors = image.data.len() / 512;
                let first = dice.below(sectors);
                let (offset, bytes) = (first * 512, (1 + dice.below((sectors - first).min(800))) * 512);
                let (cache, image) = (Arc::clone(cache), Arc::clone(image));
                readers.push(tokio::spawn(
                    async move { read(&cache, &image, offset, bytes).await },
                ));
            }
        }
        let which = dice.below(3);
        let (group_, image) = (Arc::clone(&group), Arc::clone(&images[dice.below(3)]));
        let event = dice.below(10);
        let (at, keep) = (path(which), dice.below(2) == 0);
        let disk = disks[which].clone();
        let budget = budgets[which];
        let changed = tokio::task::spawn_blocking(move || {
            match (event, &disk) {
                (0..=2, None) => return Some(Some(add(&group_, &at, Some(budget)))),
                (0, Some(_)) => {
                    group_.remove(&at, keep).unwrap();
                    return Some(None);
                }
                (1, Some(disk)) => {
                    // The next read or write drops it; a person takes it back.
                    disk.broken.store(true, Ordering::SeqCst);
                    group_.look(1, |_| false);
                    disk.broken.store(false, Ordering::SeqCst);
                    add_disk(&group_, &at, Some(budget), disk);
                }
                (3, _) => drop(group_.drop_image(&image.content.digest)),
                (4, _) => drop(group_.pin(&image.content.digest, image.content.bytes)),
                (5, _) => drop(group_.unpin(&image.content.digest)),
                (6, Some(disk)) => disk.full.store(true, Ordering::SeqCst),
                (7, Some(disk)) => {
                    disk.full.store(false, Ordering::SeqCst);
                    group_.look(1, |_| false);
                }
                _ => {}
            }
            None
        });
        if let Some(changed) = changed.await.unwrap() {
            disks[which] = changed;
        }
        for reader in readers {
            reader
                .await
                .unwrap_or_else(|error| panic!("round {round}: {error}"));
        }
        for cache in caches.iter().flatten() {
            cache.quiesce().await;
        }
        let report = group.report();
        for member in &report.members {
            assert!(
                member.used_bytes <= member.budget.unwrap(),
                "round {round}: {report:?}"
            );
            assert!(
                blocks(&member.path) <= member.budget.unwrap() + SLACK,
                "round {round}: {report:?}"
            );
        }
        for image in &report.images {
            assert!(image.cached_bytes <= image.bytes, "round {round}: {report:?}");
        }
    }
}

/// A process that is killed between any two changes of the disk leaves nothing that is served wrong or counted wrong.
#[test]
fn a_process_that_dies_amid_evictions_leaves_what_the_next_one_can_use() {
    let image = image(1, 3 * MIB);
    let budget = 3 * MIB / 2;
    for dies_at in (1..700).step_by(31) {
        let dir = tempfile::tempdir().unwrap();
        // With the runtime end the cache's tasks, and so their hold on the files.
        let live = |dies_at: u64| {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            runtime.block_on(async {
                let group = group();
                let disk = add(&group, dir.path(), Some(budget));
                let used = group.report().members[0].used_bytes;
                let held = blocks(dir.path());
                assert!(held <= used + 64 * 1024, "killed before: {held} bytes for {used}");
                disk.dies_at.store(dies_at, Ordering::SeqCst);
                let cache = open(&group, &image);
                scan(&cache, &image).await;
                assert!(blocks(dir.path()) <= budget + SLACK);
                cache.counters().chunk_misses
            })
        };
        live(dies_at);
        // What was done after the first death is not its own any more, and is dropped by the failure; so the second life begins with
        // what the first left.
        let misses = live(0);
        assert!(misses <= image.content.chunks(), "killed at {dies_at}: {misses}");
    }
}

#[test]
fn a_directory_that_cannot_be_used_is_told_and_the_others_are_used() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "no directory").unwrap();
    let spec = |path: &Path| MemberSpec {
        path: path.into(),
        budget: Some(MIB),
    };
    let bad = spec(&file.join("below"));
    assert!(matches!(
        CacheGroup::open(std::slice::from_ref(&bad), BTreeMap::new()),
        Err(GroupError::Directory { .. })
    ));
    let group = CacheGroup::open(&[bad.clone(), spec(&dir.path().join("good"))], BTreeMap::new()).unwrap();
    let report = group.report();
    assert!(
        matches!(&report.members[0].state, MemberState::Failed(why) if why.contains("below")),
        "{report:?}"
    );
    assert_eq!(report.members[1].state, MemberState::Working);
    assert!(matches!(
        group.remove(Path::new("/other"), false),
        Err(GroupError::NoMember { .. })
    ));
    group.remove(&bad.path, false).unwrap();
    assert_eq!(group.report().members.len(), 1);
}
