//! Against a slow oracle, and against `veritysetup`.

use std::process::Command;

use proptest::prelude::*;

use super::*;
use crate::storage::model::ModelStorage;
use crate::storage::{FileStorage, OpenMode, Storage};

/// The tree made level by level in memory, as the kernel's document says it.
fn oracle(data: &[u8]) -> (Vec<u8>, Digest) {
    let mut padded = data.to_vec();
    padded.resize(data.len().next_multiple_of(BLOCK_LEN), 0);
    let digests = |bytes: &[u8]| -> Vec<u8> {
        let mut level: Vec<u8> = bytes.chunks(BLOCK_LEN).flat_map(|b| sha256(b).0).collect();
        if bytes.len() > BLOCK_LEN {
            level.resize(level.len().next_multiple_of(BLOCK_LEN), 0);
        }
        level
    };
    let mut levels = vec![];
    let mut below = padded;
    while below.len() > BLOCK_LEN {
        below = digests(&below);
        levels.push(below.clone());
    }
    let root = Digest(digests(&below).try_into().unwrap());
    let tree = levels.into_iter().rev().flatten();
    let superblock = VerityLayout::new(data.len() as u64).superblock(&root);
    (superblock.into_iter().chain(tree).collect(), root)
}

/// `true`: this many zeroes; `false`: this many bytes of something.
type Piece = (bool, usize);

fn build(pieces: &[Piece], split: usize) -> (Vec<u8>, Vec<u8>, Digest) {
    let total = pieces.iter().map(|piece| piece.1).sum::<usize>();
    let layout = VerityLayout::new(total as u64);
    let hash = ModelStorage::new();
    let mut builder = VerityBuilder::new(layout, &hash);
    let mut data = vec![];
    for &(zero, bytes) in pieces {
        if zero {
            builder.skip_zeroes(bytes as u64).unwrap();
            data.resize(data.len() + bytes, 0);
        } else {
            let some: Vec<u8> = (0..bytes).map(|i| (i / 7 + data.len()) as u8).collect();
            some.chunks(split).for_each(|part| builder.update(part).unwrap());
            data.extend(some);
        }
    }
    let root = builder.finish().unwrap();
    assert_eq!(hash.len().unwrap(), layout.hash_bytes());
    (data, hash.to_vec(), root)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn the_builder_agrees_with_the_oracle(
        pieces in prop::collection::vec((any::<bool>(), (1usize..3000).prop_map(|n| n * 512)), 1..6),
        split in prop::sample::select(vec![512, 4096, 5000, 65536]),
    ) {
        let (data, hash, root) = build(&pieces, split);
        let (expected_hash, expected_root) = oracle(&data);
        prop_assert_eq!(root, expected_root);
        prop_assert!(hash == expected_hash);
    }
}

#[test]
fn sizes_around_each_new_level_have_the_levels_of_the_kernel() {
    for (blocks, levels, hash_blocks) in [
        (1, 0, 1),
        (2, 1, 2),
        (128, 1, 2),
        (129, 2, 1 + 1 + 2),
        (128 * 128, 2, 1 + 1 + 128),
        (128 * 128 + 1, 3, 1 + 1 + 2 + 129),
    ] {
        let layout = VerityLayout::new(blocks * 4096);
        assert_eq!(
            (layout.levels(), layout.hash_blocks()),
            (levels, hash_blocks),
            "{blocks}"
        );
        assert_eq!(
            layout,
            VerityLayout {
                data_bytes: blocks * 4096,
                ..VerityLayout::new(blocks * 4096 - 512)
            }
        );
        // Every block of the tree is reached from below and leads to the root.
        for block in 1..layout.hash_blocks() {
            let Some(HashBlock::Node { level, index }) = layout.locate(block) else {
                panic!("{block} is nowhere");
            };
            match layout.parent_of_node(level, index) {
                Parent::Root => assert_eq!(block, 1),
                Parent::Slot { block: parent, .. } => assert!(parent < block),
            }
        }
        assert_eq!(layout.locate(layout.hash_blocks()), None);
    }
}

#[test]
fn too_much_and_too_little_data_are_errors() {
    let hash = ModelStorage::new();
    let mut builder = VerityBuilder::new(VerityLayout::new(8192), &hash);
    assert!(builder.update(&[0; 8193]).is_err());
    builder.update(&[0; 4096]).unwrap();
    assert_eq!(builder.done_bytes(), 4096);
    assert_eq!(
        builder.finish().unwrap_err().kind(),
        std::io::ErrorKind::UnexpectedEof
    );
}

#[test]
fn a_tebibyte_of_zeroes_is_hashed_in_a_moment() {
    /// Counts what would be written.
    struct Counting(std::sync::atomic::AtomicU64);
    impl Storage for Counting {
        fn read_at(&self, _: u64, _: &mut [u8]) -> std::io::Result<()> {
            unreachable!()
        }
        fn try_read_at(&self, _: u64, _: &mut [u8]) -> std::io::Result<Option<()>> {
            unreachable!()
        }
        fn write_at(&self, _: u64, data: &[u8]) -> std::io::Result<()> {
            self.0
                .fetch_add(data.len() as u64, std::sync::atomic::Ordering::Relaxed);
            Ok(())
        }
        fn punch(&self, _: u64, _: u64) -> std::io::Result<()> {
            unreachable!()
        }
        fn sync(&self) -> std::io::Result<()> {
            unreachable!()
        }
        fn len(&self) -> std::io::Result<u64> {
            unreachable!()
        }
        fn set_len(&self, _: u64) -> std::io::Result<()> {
            unreachable!()
        }
        fn allocated_bytes(&self) -> std::io::Result<u64> {
            unreachable!()
        }
        fn extent(&self, _: u64, _: u64) -> std::io::Result<crate::Extent> {
            unreachable!()
        }
    }
    let hash = Counting(0.into());
    let layout = VerityLayout::new(1 << 40);
    let mut builder = VerityBuilder::new(layout, &hash);
    builder.skip_zeroes(1 << 40).unwrap();
    builder.finish().unwrap();
    assert_eq!(hash.0.into_inner(), layout.hash_bytes());
}

#[test]
fn a_tree_of_digests_is_the_tree_of_their_data() {
    for bytes in [4096u64, 512, 3 * 4096, 130 * 4096 - 512, 300 * 4096] {
        let layout = VerityLayout::new(bytes);
        let data: Vec<u8> = (0..bytes).map(|at| (at / 700) as u8).collect();
        let (hash, again) = (ModelStorage::new(), ModelStorage::new());
        let mut builder = VerityBuilder::new(layout, &hash);
        builder.update(&data).unwrap();
        let root = builder.finish().unwrap();
        let mut digests = vec![root.0; 1];
        if let Some(at) = layout.data_digests() {
            let mut read = vec![0; layout.data_blocks() as usize * 32];
            hash.read_at(at, &mut read).unwrap();
            digests = read.as_chunks::<32>().0.to_vec();
        }
        // One block as data, wherever it is, the others as digests.
        for middle in [0, digests.len() / 2, digests.len() - 1] {
            let mut builder = VerityBuilder::new(layout, &again);
            builder.update_digests(&digests[..middle]).unwrap();
            let block = middle * 4096..((middle + 1) * 4096).min(bytes as usize);
            builder.update(&data[block.clone()]).unwrap();
            if block.end < bytes as usize {
                builder.update_digests(&digests[middle + 1..]).unwrap();
            }
            assert_eq!(builder.finish().unwrap(), root, "{bytes} bytes, block {middle}");
        }
        let mut builder = VerityBuilder::new(layout, &again);
        builder.update(&data[..512]).unwrap();
        assert!(bytes == 512 || builder.update_digests(&digests[..1]).is_err());
    }
}

#[test]
fn veritysetup_agrees() {
    if Command::new("veritysetup").arg("--version").output().is_err() {
        assert!(
            std::env::var_os("CI").is_none(),
            "veritysetup is missing: apt install cryptsetup-bin"
        );
        eprintln!("SKIPPED: veritysetup is not installed (apt install cryptsetup-bin)");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (case, blocks) in [1u64, 2, 128, 129, 128 * 128 + 1].into_iter().enumerate() {
        let data_path = dir.path().join(format!("data{case}"));
        let hash_path = dir.path().join(format!("hash{case}"));
        let data = FileStorage::open(&data_path, OpenMode::CreateNew).unwrap();
        let hash = FileStorage::open(&hash_path, OpenMode::CreateNew).unwrap();
        let layout = VerityLayout::new(blocks * 4096 - 512);
        data.set_len(layout.padded_bytes()).unwrap();
        let mut builder = VerityBuilder::new(layout, &hash);
        // Something at the start and in the last block, a hole between.
        let first = vec![case as u8 + 1; 4096.min(layout.data_bytes() as usize)];
        data.write_at(0, &first).unwrap();
        builder.update(&first).unwrap();
        let rest = layout.data_bytes() - first.len() as u64;
        if rest > 0 {
            builder.skip_zeroes(rest - 512).unwrap();
            data.write_at(layout.data_bytes() - 512, &[9; 512]).unwrap();
            builder.update(&[9; 512]).unwrap();
        }
        let root = builder.finish().unwrap();
        let verify = |root: &str| {
            Command::new("veritysetup")
                .arg("verify")
                .args([&data_path, &hash_path])
                .arg(root)
                .output()
                .unwrap()
        };
        let output = verify(&root.to_string());
        assert!(output.status.success(), "{blocks} blocks: {output:?}");
        let wrong = Digest([case as u8; 32]);
        assert!(!verify(&wrong.to_string()).status.success());
    }
}
