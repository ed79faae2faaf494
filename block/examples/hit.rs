//! What a hit of the cache costs beside a plain `pread`, and what chunk sizes cost to check.
//!
//! `cargo run --release -p treeboot-block --example hit [DIR]`. The two are timed by turns, in blocks of reads, in CPU
//! time of this thread (all of it is done inline), so that whatever else the machine does disturbs little and falls on
//! both; the ratio is the median of the pairs, with its quartiles.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use rustix::time::{ClockId, clock_gettime};
use treeboot_block::cache::{DATA_FILE, HASH_FILE, NoSource};
use treeboot_block::storage::{FileStorage, OpenMode, Storage};
use treeboot_block::{
    BlockDevice, BootId, CacheOptions, ChunkCache, Delta, DeltaMeta, Disk, ImageContent, Reader,
    VerityBuilder, VerityLayout, verity,
};

const IMAGE_BYTES: u64 = 256 << 20;
const PAIRS: usize = 41;
const READS: u64 = 2000;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let parent = arguments.get(1).map_or_else(std::env::temp_dir, Into::into);
    let dir = tempfile::tempdir_in(parent).expect("a directory to work in");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_time()
        .build()
        .expect("a runtime");
    runtime.block_on(run(dir.path()));
}

async fn run(dir: &Path) {
    let layout = VerityLayout::new(IMAGE_BYTES);
    let data = FileStorage::open(&dir.join(DATA_FILE), OpenMode::Create).expect("data");
    let hash = FileStorage::open(&dir.join(HASH_FILE), OpenMode::Create).expect("hash");
    let mut builder = VerityBuilder::new(layout, &hash);
    let mut block = vec![0; 1 << 20];
    let begun = cpu_time();
    for number in 0..IMAGE_BYTES >> 20 {
        block.fill(number as u8);
        data.write_at(number << 20, &block).expect("room");
        builder.update(&block).expect("room");
    }
    let digest = builder.finish().expect("room");
    let rate = IMAGE_BYTES as f64 / (cpu_time() - begun).as_secs_f64() / 1e6;
    println!("store and hash {} MiB: {rate:.0} MB/s", IMAGE_BYTES >> 20);
    drop((data, hash));

    for bytes in [4096, 16384, 65536, 262_144] {
        let content = &vec![7u8; bytes];
        let time = median(PAIRS, || {
            timed(200, |_| {
                for part in content.chunks(4096) {
                    std::hint::black_box(verity::sha256(part));
                }
            })
        });
        println!("hash {:>3} KiB: {:>7.2} µs", bytes >> 10, us(time));
    }

    for chunk_bytes in [16 * 1024, 64 * 1024, 256 * 1024] {
        let content = ImageContent {
            digest,
            bytes: IMAGE_BYTES,
            chunk_bytes,
        };
        measure(dir, content).await;
    }
}

async fn measure(dir: &Path, content: ImageContent) {
    let cache = loop {
        match ChunkCache::open(dir, content, Arc::new(NoSource), CacheOptions::complete()) {
            Ok(cache) => break cache,
            // The cache before this one lets its files go when its owner task has ended.
            Err(_) => tokio::task::yield_now().await,
        }
    };
    let kib = content.chunk_bytes >> 10;
    let base = cache.base(Reader::Guest);
    let mut buf = vec![0; 4096];
    let chunk = u64::from(content.chunk_bytes);
    let begun = cpu_time();
    for number in 0..IMAGE_BYTES / chunk {
        base.read(number * chunk, &mut buf).await.expect("a read");
    }
    let first = (cpu_time() - begun) / (IMAGE_BYTES / chunk) as u32;
    println!(
        "chunk {kib:>3} KiB: first read of 4 KiB after opening {:.1} µs",
        us(first)
    );

    let raw = std::fs::File::open(dir.join(DATA_FILE)).expect("data");
    let meta = DeltaMeta {
        digest: content.digest,
        bytes: IMAGE_BYTES,
    };
    let delta = Delta::create(&dir.join(format!("delta{kib}")), meta, BootId([1; 16])).expect("a delta");
    let disk = Disk::new(cache.base(Reader::Guest), delta).expect("a disk");
    for bytes in [4096, 65536] {
        let mut buf = vec![0; bytes];
        let spots = IMAGE_BYTES / bytes as u64;
        let at = |n: u64| n.wrapping_mul(0x9E37_79B9_7F4A_7C15) % spots * bytes as u64;
        let mut ratios = [vec![], vec![]];
        let mut times = [vec![], vec![], vec![]];
        for _ in 0..PAIRS {
            let plain = timed(READS, |n| {
                std::os::unix::fs::FileExt::read_exact_at(&raw, &mut buf, at(n)).expect("a read");
            });
            let hit = timed(READS, |n| {
                base.read(at(n), &mut buf)
                    .now_or_never()
                    .expect("a hit")
                    .expect("a read");
            });
            let through_disk = timed(READS, |n| {
                disk.read(at(n), &mut buf)
                    .now_or_never()
                    .expect("a hit")
                    .expect("a read");
            });
            for (list, time) in times.iter_mut().zip([plain, hit, through_disk]) {
                list.push(time);
            }
            ratios[0].push(hit.as_secs_f64() / plain.as_secs_f64());
            ratios[1].push(through_disk.as_secs_f64() / plain.as_secs_f64());
        }
        let [plain, hit, through_disk] = times.map(|mut list| us(middle(&mut list)));
        println!(
            "chunk {kib:>3} KiB, read {:>2} KiB: pread {plain:.2} µs, cache {hit:.2} µs ({}), disk {through_disk:.2} µs ({})",
            bytes >> 10,
            quartiles(&mut ratios[0]),
            quartiles(&mut ratios[1]),
        );
    }
}

/// CPU time of this thread so far.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn timed(times: u64, mut work: impl FnMut(u64)) -> Duration {
    let begun = cpu_time();
    (0..times).for_each(&mut work);
    (cpu_time() - begun) / times as u32
}

fn median(times: usize, work: impl FnMut() -> Duration) -> Duration {
    let mut all: Vec<Duration> = std::iter::repeat_with(work).take(times).collect();
    middle(&mut all)
}

fn middle(all: &mut [Duration]) -> Duration {
    all.sort();
    all[all.len() / 2]
}

fn quartiles(ratios: &mut [f64]) -> String {
    ratios.sort_by(f64::total_cmp);
    let at = |part: usize| ratios[ratios.len() * part / 4];
    format!("× {:.2}, {:.2} to {:.2}", at(2), at(1), at(3))
}

fn us(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}
