//! Whatever a crash leaves in the cache's files, no wrong byte comes out.
//!
//! Nothing in a cache is ever synced, so after a power cut each sector of each write since the beginning is there or
//! not, in each file by itself: the crash points of the three files need not agree.

use std::sync::Arc;

use proptest::prelude::*;

use super::tests::{Disks, Image, TestSource};
use super::*;
use crate::storage::model::{ModelStorage, coin};

async fn read_all(cache: &Arc<ChunkCache>, bytes: usize, step: usize) -> Vec<u8> {
    let base = cache.base(Reader::Guest);
    let mut all = vec![0; bytes];
    for (n, part) in all.chunks_mut(step).enumerate() {
        base.read((n * step) as u64, part).await.unwrap();
    }
    all
}

/// Runs a cache for a while; what it wrote is in the disks' logs.
async fn fill(disks: &Disks, image: &Arc<Image>, reads: &[(usize, usize)]) {
    let source = Arc::new(TestSource::new(image));
    let cache = disks
        .open(image.content, source, CacheOptions::default())
        .unwrap();
    let base = cache.base(Reader::Guest);
    for &(sector, sectors) in reads {
        let offset = (sector * 512).min(image.data.len() - 512);
        let mut buf = vec![0; (sectors * 512).min(image.data.len() - offset)];
        base.read(offset as u64, &mut buf).await.unwrap();
        assert_eq!(buf, image.data[offset..offset + buf.len()]);
        cache.quiesce().await;
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap()
        .block_on(future)
}

const BYTES: usize = 300 * 4096 + 512;

async fn check_after(image: &Arc<Image>, disks: &Disks) {
    let source = Arc::new(TestSource::new(image));
    let cache = disks
        .open(image.content, source, CacheOptions::default())
        .unwrap();
    assert!(read_all(&cache, BYTES, 24 * 1024).await == image.data);
    let hash = cache.hash_device();
    let mut all = vec![0; image.hash.len()];
    hash.read(0, &mut all).await.unwrap();
    assert!(all == image.hash);
    cache.quiesce().await;
    // What was repaired stays repaired.
    assert!(read_all(&cache, BYTES, BYTES).await == image.data);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    #[test]
    fn at_every_crash_point_the_cache_serves_the_image_only(
        reads in prop::collection::vec((0usize..BYTES / 512, 1usize..400), 1..6),
        seed in any::<u64>(),
        others in any::<(prop::sample::Index, prop::sample::Index)>(),
    ) {
        block_on(async {
            let image = Arc::new(Image::sample(BYTES));
            let disks = Disks::default();
            fill(&disks, &image, &reads).await;
            let mut keep = coin(seed);
            for point in 0..=disks.data.log_len() {
                let (hash, present) = (disks.hash.log_len() + 1, disks.present.log_len() + 1);
                let crashed = Disks {
                    data: Arc::new(disks.data.crash(point, &mut keep)),
                    hash: Arc::new(disks.hash.crash((others.0.index(hash) + point) % hash, &mut keep)),
                    present: Arc::new(disks.present.crash((others.1.index(present) + point) % present, &mut keep)),
                };
                check_after(&image, &crashed).await;
            }
        });
    }

    #[test]
    fn a_file_full_of_rubbish_costs_fetches_only(
        spots in prop::collection::vec((0u8..3, any::<prop::sample::Index>(), any::<[u8; 16]>()), 1..20),
    ) {
        block_on(async {
            let image = Arc::new(Image::sample(BYTES));
            let disks = Disks::default();
            fill(&disks, &image, &[(0, BYTES / 512)]).await;
            let damage = |disk: &ModelStorage, at: &prop::sample::Index, rubbish: &[u8]| {
                disk.damage(at.index(disk.to_vec().len() - 16) as u64, rubbish);
            };
            for (which, at, rubbish) in &spots {
                match which {
                    0 => damage(&disks.data, at, rubbish),
                    1 => damage(&disks.hash, at, rubbish),
                    _ => damage(&disks.present, at, rubbish),
                }
            }
            check_after(&image, &disks).await;
        });
    }
}
