//! An image's hash tree as a local file: fetched once, by our own initiator, from whichever parent has it, and checked against the root.
//!
//! So dm-verity reads its hashes from this host, children are served them from the file, and each hash block crosses each link once.

use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::StreamExt as _;
use treeboot_block::VerityLayout;
use treeboot_block::verity::{HashBlock, Parent, digest_in, sha256};
use treeboot_iscsi::initiator::{Lun, PathGroup, PathGroupOptions, PathId, PathSpec};
use treeboot_types::{Digest, Iqn, VERITY_BLOCK_BYTES};

use super::{blocking, failed};
use crate::keys::Keys;
use crate::plane::PlaneError;
use crate::plane::user::spec;
use crate::stack::{PathTo, Sources};

/// One read. Some targets split what is longer.
const PIECE_BYTES: u64 = 1 << 20;
/// Reads in flight: enough for a fast link, and 8 MiB of memory.
const IN_FLIGHT: usize = 8;
/// How often a tree with wrong blocks is fetched again; each time whoever sent a wrong block is not asked again.
const ATTEMPTS: usize = 4;
/// How long a read waits for a parent to be up. Short, because the content's owner waits too, and is asked again soon.
const WAIT_MS: u64 = 4_000;
/// Bytes of a block.
const BLOCK: u64 = VERITY_BLOCK_BYTES as u64;

/// A block of the tree that is not what the block above says.
struct Wrong {
    /// Its number on the hash device.
    block: u64,
}

/// Makes `file` hold the hash device of a content, superblock and tree, where it does not already.
///
/// # Errors
/// No path has it in the initiator's time, or all that have it send wrong blocks.
pub(super) async fn fetch(
    file: PathBuf,
    digest: Digest,
    bytes: u64,
    initiator: Iqn,
    keys: &Keys,
    sources: &Sources,
) -> Result<u64, PlaneError> {
    let layout = VerityLayout::new(bytes);
    if whole(&file, layout, digest).await? {
        return Ok(0);
    }
    let mut options = PathGroupOptions::new(initiator.clone());
    options.limits.wait_ms = WAIT_MS;
    let group = PathGroup::new(options);
    let stripes = &sources.stripes;
    let specs = |paths: fn(&crate::stack::StripePaths) -> &Vec<PathTo>| -> Vec<PathSpec> {
        let mut specs: Vec<PathSpec> = Vec::new();
        for path in stripes.iter().flat_map(paths) {
            let spec = spec(path, &initiator, keys);
            // Only ours have a hash tree, and the same parent may have several stripes.
            if path.endpoint.hash_lun.is_some() && !specs.contains(&spec) {
                specs.push(spec);
            }
        }
        specs
    };
    let active = specs(|stripe| &stripe.active);
    let mut fallbacks = specs(|stripe| &stripe.fallbacks);
    fallbacks.retain(|spec| !active.contains(spec));
    group.set_paths(active, fallbacks);
    let mut avoid: Vec<PathId> = Vec::new();
    for _ in 0..ATTEMPTS {
        let (tree, from) = read_tree(&group, layout, digest, &avoid).await?;
        let tree = Arc::new(tree);
        let checked = Arc::clone(&tree);
        let wrong = blocking(move || Ok(check(&checked, layout, digest))).await?;
        match wrong {
            Ok(()) => {
                store(file, tree).await?;
                return Ok(layout.hash_bytes());
            }
            Err(Wrong { block }) => {
                let piece = (block * BLOCK / PIECE_BYTES) as usize;
                let Some(&path) = from.get(piece) else { break };
                tracing::warn!(
                    content = %digest.short(), block,
                    "a parent shipped a wrong block of the hash tree; it is fetched elsewhere"
                );
                avoid.push(path);
            }
        }
    }
    Err(PlaneError::Damaged {
        what: format!(
            "the hash tree of content {} that the parents have",
            digest.short()
        ),
        why: "it does not lead to the content's digest".into(),
    })
}

/// The whole hash device, and who sent each piece.
async fn read_tree(
    group: &Arc<PathGroup>,
    layout: VerityLayout,
    digest: Digest,
    avoid: &[PathId],
) -> Result<(Vec<u8>, Vec<PathId>), PlaneError> {
    let total = layout.hash_bytes();
    let mut tree = Vec::new();
    tree.try_reserve_exact(total as usize)
        .map_err(|error| failed("room in memory for the hash tree", error))?;
    // The superblock follows from the root; what a parent says there is not asked.
    let mut from = Vec::new();
    let pieces = (0..total).step_by(PIECE_BYTES as usize).map(|offset| {
        let length = PIECE_BYTES.min(total - offset) as u32;
        async move { group.read(Lun::Hash, offset, length, avoid).await }
    });
    let mut pieces = futures_util::stream::iter(pieces).buffered(IN_FLIGHT);
    while let Some(piece) = pieces.next().await {
        let (bytes, path) = piece.map_err(|error| {
            failed(
                format!("reading the hash tree of content {}", digest.short()),
                error,
            )
        })?;
        tree.extend_from_slice(&bytes);
        from.push(path);
    }
    if let Some(first) = tree.get_mut(..BLOCK as usize) {
        first.copy_from_slice(&layout.superblock(&digest));
    }
    Ok((tree, from))
}

/// Checks every block of a hash device against the one above it, the top against the root.
fn check(tree: &[u8], layout: VerityLayout, root: Digest) -> Result<(), Wrong> {
    let block_at = |block: u64| tree.chunks_exact(BLOCK as usize).nth(block as usize);
    for block in 0..layout.hash_blocks() {
        let Some(HashBlock::Node { level, index }) = layout.locate(block) else {
            continue;
        };
        // The tree lies from the top down, so a block's own parent is checked before it.
        let expected = match layout.parent_of_node(level, index) {
            Parent::Root => Some(root),
            Parent::Slot { block, slot } => block_at(block).and_then(|node| digest_in(node, slot)),
        };
        if expected.is_none() || block_at(block).map(sha256) != expected {
            return Err(Wrong { block });
        }
    }
    Ok(())
}

/// Whether the file holds a tree that leads to the root. It is read once at each opening: the disk under it may have lost it.
async fn whole(file: &Path, layout: VerityLayout, digest: Digest) -> Result<bool, PlaneError> {
    let file = file.to_owned();
    blocking(move || {
        let what = || format!("reading {}", file.display());
        let open = match std::fs::File::open(&file) {
            Ok(open) => open,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(PlaneError::io(what(), error)),
        };
        let bytes = open
            .metadata()
            .map_err(|error| PlaneError::io(what(), error))?
            .len();
        if bytes != layout.hash_bytes() {
            return Ok(false);
        }
        let mut tree = vec![0; bytes as usize];
        open.read_exact_at(&mut tree, 0)
            .map_err(|error| PlaneError::io(what(), error))?;
        Ok(check(&tree, layout, digest).is_ok())
    })
    .await
}

async fn store(file: PathBuf, tree: Arc<Vec<u8>>) -> Result<(), PlaneError> {
    blocking(move || {
        let written = || {
            let new = file.with_extension("new");
            if let Some(dir) = file.parent() {
                std::fs::create_dir_all(dir)?;
            }
            let open = std::fs::File::create(&new)?;
            open.write_all_at(&tree, 0)?;
            open.sync_all()?;
            std::fs::rename(&new, &file)
        };
        written().map_err(|error| PlaneError::io(format!("writing {}", file.display()), error))
    })
    .await
}

#[cfg(test)]
mod tests {
    use treeboot_block::VerityBuilder;
    use treeboot_block::storage::{FileStorage, OpenMode};

    use super::*;

    #[test]
    fn every_wrong_block_of_a_tree_is_found() {
        let dir = tempfile::tempdir().unwrap();
        // Three levels: 128 × 128 blocks and one more.
        let bytes = (128 * 128 + 1) * BLOCK;
        let layout = VerityLayout::new(bytes);
        let path = dir.path().join("hash");
        let storage = FileStorage::open(&path, OpenMode::CreateNew).unwrap();
        let mut builder = VerityBuilder::new(layout, &storage);
        builder.update(&[7; BLOCK as usize]).unwrap();
        builder.skip_zeroes(bytes - 2 * BLOCK).unwrap();
        builder.update(&[9; BLOCK as usize]).unwrap();
        let root = builder.finish().unwrap();
        let tree = std::fs::read(&path).unwrap();
        assert!(check(&tree, layout, root).is_ok());
        assert!(check(&tree, layout, Digest([0; 32])).is_err());
        assert!(check(&tree[..tree.len() - 1], layout, root).is_err());
        for block in [1, 2, 3, 4, layout.hash_blocks() - 1] {
            let mut other = tree.clone();
            other[(block * BLOCK) as usize + 31] ^= 1;
            assert_eq!(
                check(&other, layout, root).err().map(|wrong| wrong.block),
                Some(block)
            );
        }
    }
}
