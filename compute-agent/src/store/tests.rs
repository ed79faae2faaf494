//! Versions that share blocks: each reads as if it were alone, whatever becomes of the others.

use std::path::PathBuf;

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tempfile::TempDir;
use tokio::sync::mpsc;
use treeboot_block::cache::{NoSource, Reader};
use treeboot_block::{BlockError, CacheError, CacheOptions, ImageContent};
use treeboot_types::Digest;

use super::*;

const BLOCK: usize = 4096;
/// The last block is a short one.
const BYTES: usize = 300 * BLOCK - 1024;

/// A store and what its versions should be.
struct Store {
    dir: TempDir,
}

/// Parts: where, and how many bytes of what.
type Change = (usize, Vec<u8>);

impl Store {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn at(&self, digest: Digest) -> PathBuf {
        self.dir.path().join(digest.to_string())
    }

    fn import(&self, base: Option<BaseImage>, changes: &[Change]) -> Result<Manifest, StoreError> {
        self.import_of(BYTES, base, changes)
    }

    fn import_of(
        &self,
        bytes: usize,
        base: Option<BaseImage>,
        changes: &[Change],
    ) -> Result<Manifest, StoreError> {
        let header = ImportHeader {
            image: "debian".into(),
            bytes: bytes as u64,
            chunk_bytes: 65536,
            adopted_from: Vec::new(),
            base,
        };
        let (parts, inbox) = mpsc::channel(changes.len().max(1));
        for (offset, data) in changes {
            let part = ImportPart {
                offset: *offset as u64,
                data: data.clone().into(),
            };
            parts.try_send(Ok(part)).unwrap();
        }
        drop(parts);
        // It blocks, as on the thread that it has in an agent.
        let writing = || write(self.dir.path(), &header, inbox);
        let written = std::thread::scope(|scope| scope.spawn(writing).join().unwrap())?;
        let manifest = written.manifest.clone();
        written.publish(self.dir.path())?;
        Ok(manifest)
    }

    async fn read(&self, manifest: &Manifest) -> Result<Vec<u8>, BlockError> {
        let image = ImageContent {
            digest: manifest.digest,
            bytes: manifest.bytes,
            chunk_bytes: manifest.chunk_bytes,
        };
        let cache = loop {
            let source = std::sync::Arc::new(NoSource);
            match open(&self.at(manifest.digest), image, source, CacheOptions::complete()) {
                // The owner of the last one ends by itself.
                Err(CacheError::InUse { .. }) => tokio::task::yield_now().await,
                opened => break opened.unwrap(),
            }
        };
        let mut content = vec![0; BYTES];
        cache.base(Reader::Guest).read(0, &mut content).await?;
        let mut hash = vec![0; 4096];
        cache.hash_device().read(0, &mut hash).await?;
        Ok(content)
    }
}

fn over(digest: Digest) -> Option<BaseImage> {
    Some(BaseImage { digest, share: true })
}

fn random_image(random: &mut StdRng) -> Vec<u8> {
    let mut image = vec![0; BYTES];
    for block in image.chunks_mut(BLOCK) {
        if random.random_bool(0.7) {
            random.fill(block);
        }
    }
    image
}

/// Runs of whole blocks, in order; some are zeroes, and some are what is there.
fn random_changes(random: &mut StdRng, image: &mut [u8]) -> Vec<Change> {
    let mut changes = Vec::new();
    let mut at = random.random_range(0..40) * BLOCK;
    while at < BYTES {
        let end = (at + random.random_range(1..12) * BLOCK).min(BYTES);
        let part = &mut image[at..end];
        match random.random_range(0..4) {
            0 => part.fill(0),
            1 => {}
            _ => random.fill(part),
        }
        changes.push((at, part.to_vec()));
        at = end + random.random_range(0..80) * BLOCK;
    }
    changes
}

#[tokio::test]
async fn each_version_reads_as_if_it_were_alone_whatever_becomes_of_the_others() {
    for seed in 0..3 {
        let mut random = StdRng::seed_from_u64(seed);
        let store = Store::new();
        let mut image = random_image(&mut random);
        let first = store.import(None, &[(0, image.clone())]).unwrap();
        let mut versions = vec![(first, image.clone())];
        // Deeper than what may share, so that the last ones do not.
        for _ in 0..12 {
            let (below, content) = versions.last().unwrap();
            image = content.clone();
            let changes = random_changes(&mut random, &mut image);
            let version = store.import(over(below.digest), &changes).unwrap();
            versions.push((version, image.clone()));
            match random.random_range(0..4) {
                0 if versions.len() > 2 => {
                    let (gone, _) = versions.remove(random.random_range(0..versions.len() - 1));
                    std::fs::remove_dir_all(store.at(gone.digest)).unwrap();
                }
                1 => {
                    let (flat, _) = &versions[random.random_range(0..versions.len())];
                    flatten(&store.at(flat.digest), |_, _| {}).unwrap();
                    assert!(!shares(&store.at(flat.digest)));
                }
                _ => {}
            }
        }
        let alone = Store::new();
        for (version, content) in &versions {
            assert!(store.read(version).await.unwrap() == *content, "seed {seed}");
            // Content has one name, however it came.
            let imported = alone.import(None, &[(0, content.clone())]).unwrap();
            assert_eq!(imported.digest, version.digest, "seed {seed}");
        }
    }
}

#[tokio::test]
async fn what_is_alike_is_stored_once_and_a_version_outlives_its_base() {
    let store = Store::new();
    let mut random = StdRng::seed_from_u64(7);
    let mut image = vec![0; BYTES];
    random.fill(&mut image[..]);
    let base = store.import(None, &[(0, image.clone())]).unwrap();
    // One block is new, one is written as it was, one becomes zeroes.
    image[3 * BLOCK..4 * BLOCK].fill(9);
    let parts = [
        (3 * BLOCK, image[3 * BLOCK..5 * BLOCK].to_vec()),
        (9 * BLOCK, vec![0; BLOCK]),
    ];
    image[9 * BLOCK..10 * BLOCK].fill(0);
    let version = store.import(over(base.digest), &parts).unwrap();
    assert_eq!(version.base, Some(base.digest));
    assert_eq!(version.allocated_bytes, 2 * BLOCK as u64);
    assert_eq!(data_bytes(&store.at(version.digest)).unwrap(), BLOCK as u64);
    std::fs::remove_dir_all(store.at(base.digest)).unwrap();
    assert!(store.read(&version).await.unwrap() == image);
    // Flattened while it is open; what is open goes on.
    let flat = flatten(&store.at(version.digest), |_, _| {}).unwrap();
    assert!(flat && store.read(&version).await.unwrap() == image);
    assert!(!flatten(&store.at(version.digest), |_, _| {}).unwrap());
    assert!(data_bytes(&store.at(version.digest)).unwrap() >= (BYTES - 2 * BLOCK) as u64);
    // Copied where it may not share.
    let copied = BaseImage {
        digest: version.digest,
        share: false,
    };
    let copy = store.import(Some(copied), &[(0, vec![1; BLOCK])]).unwrap();
    assert!(copy.base.is_none() && !shares(&store.at(copy.digest)));
    image[..BLOCK].fill(1);
    assert!(store.read(&copy).await.unwrap() == image);
}

#[tokio::test]
async fn what_cannot_be_a_version_is_refused_and_damage_is_never_served() {
    let store = Store::new();
    let mut image = vec![5; BYTES];
    let base = store.import(None, &[(0, image.clone())]).unwrap();
    let names = || std::fs::read_dir(store.dir.path()).unwrap().count();
    let refused = store.import_of(BYTES + 4096, over(base.digest), &[]).unwrap_err();
    assert!(matches!(refused, StoreError::OtherSize { .. }), "{refused}");
    let refused = store.import(over(Digest([1; 32])), &[]).unwrap_err();
    assert!(matches!(refused, StoreError::Damaged { .. }), "{refused}");
    for parts in [vec![(512, vec![1; BLOCK])], vec![(0, vec![1; 512])]] {
        let refused = store.import(over(base.digest), &parts).unwrap_err();
        assert!(matches!(refused, StoreError::Part { .. }), "{refused}");
    }
    assert_eq!(names(), 1);
    // Its last block may be a short one.
    let tail = BYTES / BLOCK * BLOCK;
    image[tail..].fill(6);
    let version = store
        .import(over(base.digest), &[(tail, image[tail..].to_vec())])
        .unwrap();
    assert!(store.read(&version).await.unwrap() == image);
    // Which blocks are its own is damaged.
    let own = store.at(version.digest).join("own");
    let bytes = std::fs::read(&own).unwrap();
    let mut wrong = bytes.clone();
    wrong[20] ^= 1;
    std::fs::write(&own, &wrong).unwrap();
    let options = CacheOptions::complete();
    let content = ImageContent {
        digest: version.digest,
        bytes: BYTES as u64,
        chunk_bytes: 65536,
    };
    let opened = open(
        &store.at(version.digest),
        content,
        std::sync::Arc::new(NoSource),
        options,
    );
    assert!(opened.is_err());
    std::fs::write(&own, &bytes).unwrap();
    // So is the tree that a new version would take over.
    let hash = store.at(base.digest).join("hash");
    let mut tree = std::fs::read(&hash).unwrap();
    let last = tree.len() - BLOCK;
    tree[last] ^= 1;
    std::fs::write(&hash, &tree).unwrap();
    let refused = store
        .import(over(base.digest), &[(0, vec![1; BLOCK])])
        .unwrap_err();
    assert!(matches!(refused, StoreError::Damaged { .. }), "{refused}");
    assert_eq!(names(), 2);
}
