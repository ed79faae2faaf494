//! What a fleet's hosts counted, put together: who shipped what, and what guests really asked for.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use serde::Serialize;
use treeboot_proto::v1;

use crate::cluster::Cluster;
use crate::daemon::Daemon;

/// The unit in which guests' reads are told apart.
pub const BLOCK_BYTES: u64 = 4096;

/// One agent's share. All in bytes where the name does not say otherwise; "wire" is what sockets carried, headers too.
#[derive(Debug, Clone, Default, Serialize)]
pub struct HostFigures {
    /// Its name.
    pub host: String,
    /// Its depth in the tree; the origin has 0.
    pub depth: u32,
    /// Sent to children.
    pub shipped_wire_bytes: u64,
    /// Got from its active parents.
    pub fetched_bytes: u64,
    /// Got from fallbacks.
    pub fallback_bytes: u64,
    /// Of both, the hash tree's part.
    pub hash_bytes: u64,
    /// Asked of its base by VMs.
    pub guest_read_bytes: u64,
    /// Distinct 4 KiB blocks of these.
    pub guest_unique_bytes: u64,
    /// Asked of its base by children.
    pub child_read_bytes: u64,
    /// Parts of reads, each at most a chunk, that were in the cache.
    pub cache_hits: u64,
    /// Fetches that were begun.
    pub cache_misses: u64,
    /// Reads that waited for another's fetch.
    pub cache_joined: u64,
    /// Chunks that came and were not what the hash tree says.
    pub bad_chunks: u64,
    /// Held in the cache.
    pub cached_bytes: u64,
    /// The longest that one read of the base took, in microseconds.
    pub longest_stall_us: u64,
}

/// The whole fleet.
#[derive(Debug, Clone, Default, Serialize)]
pub struct FleetFigures {
    /// Sent by the origin's sockets.
    pub origin_bytes: u64,
    /// Distinct 4 KiB blocks that guests asked for, over all hosts.
    pub unique_bytes: u64,
    /// The chunks in which these blocks lie: what chunks add to blocks is the difference.
    pub unique_chunk_bytes: u64,
    /// Got from fallbacks, by all hosts together.
    pub fallback_bytes: u64,
    /// A chunk of this image.
    pub chunk_bytes: u64,
    /// Children of the origin, in the stripe in which it has most: 2 in the paper's tree, 1 in two stripes.
    pub origin_children: u32,
    /// Every agent, the origin first.
    pub hosts: Vec<HostFigures>,
}

impl FleetFigures {
    /// Asks every running agent, and the coordinator for the tree.
    ///
    /// # Errors
    /// One of them does not answer.
    pub async fn collect(cluster: &Cluster, image: &str) -> Result<Self> {
        let tree = tree(cluster, image).await?;
        let record = tree.image.clone().context("a tree without its image")?;
        let chunk_bytes = u64::from(record.chunk_bytes).max(BLOCK_BYTES);
        let mut figures = Self {
            chunk_bytes,
            origin_children: tree
                .nodes
                .iter()
                .filter(|node| node.origin)
                .map(|node| node.children)
                .max()
                .unwrap_or(0),
            ..Self::default()
        };
        let mut blocks = BTreeSet::new();
        for agent in cluster.agents().filter(|agent| agent.is_running()) {
            let Some(base) = base_status(agent, image).await? else {
                continue;
            };
            let counters = base.counters.unwrap_or_default();
            let depth = tree
                .nodes
                .iter()
                .find(|node| node.host == agent.name())
                .map_or(0, |node| node.depth);
            figures
                .hosts
                .push(HostFigures::of(agent.name(), depth, &counters));
            blocks.extend(accessed_blocks(agent, record.id.clone()).await?);
        }
        figures.origin_bytes = figures
            .hosts
            .iter()
            .filter(|host| host.host == cluster.origin.name())
            .map(|host| host.shipped_wire_bytes)
            .sum();
        figures.fallback_bytes = figures.hosts.iter().map(|host| host.fallback_bytes).sum();
        figures.unique_bytes = blocks.len() as u64 * BLOCK_BYTES;
        let chunks: BTreeSet<u64> = blocks
            .iter()
            .map(|block| block * BLOCK_BYTES / chunk_bytes)
            .collect();
        // The last chunk of an image may be short.
        figures.unique_chunk_bytes = chunks
            .iter()
            .map(|chunk| chunk_bytes.min(record.bytes.saturating_sub(chunk * chunk_bytes)))
            .sum();
        Ok(figures)
    }

    /// The most that the origin may have shipped: each distinct chunk once to each of its children, and 5 % for headers, the hash
    /// tree and repeats.
    #[must_use]
    pub fn origin_limit_bytes(&self) -> u64 {
        u64::from(self.origin_children) * self.unique_chunk_bytes * 105 / 100
    }
}

impl HostFigures {
    fn of(host: &str, depth: u32, counters: &v1::BaseCounters) -> Self {
        Self {
            host: host.to_owned(),
            depth,
            shipped_wire_bytes: counters.shipped_wire_bytes,
            fetched_bytes: counters.fetched_parent_bytes,
            fallback_bytes: counters.fetched_fallback_bytes,
            hash_bytes: counters.fetched_hash_bytes,
            guest_read_bytes: counters.guest_read_bytes,
            guest_unique_bytes: counters.guest_unique_bytes,
            child_read_bytes: counters.child_read_bytes,
            cache_hits: counters.chunk_hits,
            cache_misses: counters.chunk_misses,
            cache_joined: counters.chunk_joined,
            bad_chunks: counters.bad_chunks,
            cached_bytes: counters.cached_bytes,
            longest_stall_us: counters.longest_stall_us,
        }
    }
}

/// An image's tree as the coordinator sees it.
///
/// # Errors
/// The coordinator does not answer, or does not know the image.
pub async fn tree(cluster: &Cluster, image: &str) -> Result<v1::GetTreeResponse> {
    let mut coordinator = cluster.coordinator.coordinator().await?;
    let request = v1::GetTreeRequest {
        image: Some(newest(image)),
    };
    Ok(coordinator.get_tree(request).await?.into_inner())
}

/// A host's view of one image it is attached to, where it is.
///
/// # Errors
/// The agent does not answer.
pub async fn base_status(agent: &Daemon, image: &str) -> Result<Option<v1::BaseStatus>> {
    let status = agent
        .agent()
        .await?
        .status(v1::StatusRequest {})
        .await?
        .into_inner();
    let of_image = |base: &v1::BaseStatus| {
        base.attachment
            .as_ref()
            .and_then(|attachment| attachment.image.as_ref())
            .is_some_and(|id| id.name == image)
    };
    Ok(status.bases.into_iter().find(of_image))
}

/// The 4 KiB blocks that VMs of one host asked for.
async fn accessed_blocks(agent: &Daemon, image: Option<v1::ImageId>) -> Result<Vec<u64>> {
    let mut parts = agent
        .agent()
        .await?
        .access_map(v1::AccessMapRequest { image })
        .await?
        .into_inner();
    let mut blocks = Vec::new();
    while let Some(part) = parts.message().await? {
        for (first, count) in part.first_blocks.iter().zip(&part.counts) {
            let first = u64::from(*first);
            blocks.extend(first..first + u64::from(*count));
        }
    }
    Ok(blocks)
}

/// The newest version of an image, by name.
#[must_use]
pub fn newest(image: &str) -> v1::ImageId {
    v1::ImageId {
        name: image.to_owned(),
        version: 0,
    }
}
