//! What is told of the group.

use std::path::PathBuf;
use std::sync::atomic::Ordering;

use treeboot_types::Digest;

use super::CacheGroup;

/// How a member is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MemberState {
    /// It is used.
    Working,
    /// Its file system is full: it is used, and does not grow.
    Full,
    /// It is not used any more, because of this.
    Failed(String),
}

/// A member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberReport {
    /// The directory.
    pub path: PathBuf,
    /// Bytes that it may hold; `None`: until its file system is full.
    pub budget: Option<u64>,
    /// Bytes of its files.
    pub used_bytes: u64,
    /// How it is.
    pub state: MemberState,
    /// Chunk-sized parts of reads that it answered.
    pub hits: u64,
}

/// What the group holds of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageReport {
    /// The image.
    pub digest: Digest,
    /// Its size in bytes.
    pub bytes: u64,
    /// Bytes of its data that are there.
    pub cached_bytes: u64,
    /// None of it goes for others.
    pub pinned: bool,
    /// Whether this host has it open.
    pub used: bool,
    /// In milliseconds of Unix time, to within a few seconds; 0: not known.
    pub last_use_unix_ms: u64,
}

/// The group.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GroupReport {
    /// The members, in the order of their addition.
    pub members: Vec<MemberReport>,
    /// The images, by digest.
    pub images: Vec<ImageReport>,
    /// Chunk-sized parts of reads that were answered.
    pub hits: u64,
    /// Chunks that were fetched for lack of them.
    pub misses: u64,
    /// Segments that went.
    pub evictions: u64,
    /// Bytes of these.
    pub evicted_bytes: u64,
}

impl CacheGroup {
    /// How the group is.
    pub fn report(&self) -> GroupReport {
        let get = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let state = self.state.lock();
        let members: Vec<_> = state
            .members
            .iter()
            .flatten()
            .map(|member| MemberReport {
                path: member.spec.path.clone(),
                budget: member.spec.budget,
                used_bytes: member.used(),
                state: match member.failure() {
                    Some(why) => MemberState::Failed(why.into()),
                    None if member.is_full() => MemberState::Full,
                    None => MemberState::Working,
                },
                hits: get(&member.hits),
            })
            .collect();
        let mut images: Vec<_> = state
            .holdings
            .iter()
            .map(|holding| ImageReport {
                digest: holding.content.digest,
                bytes: holding.content.bytes,
                cached_bytes: get(&holding.cached),
                pinned: state.pins.contains_key(&holding.content.digest),
                used: holding.users.load(Ordering::Relaxed) > 0,
                last_use_unix_ms: get(&holding.last_use_ms),
            })
            .collect();
        images.sort_by_key(|image| image.digest);
        GroupReport {
            hits: get(&self.past_hits) + members.iter().map(|member| member.hits).sum::<u64>(),
            members,
            images,
            misses: get(&self.misses),
            evictions: get(&self.evictions),
            evicted_bytes: get(&self.evicted_bytes),
        }
    }

    /// The images of which something is there, or may come.
    pub fn digests(&self) -> Vec<Digest> {
        let state = self.state.lock();
        state
            .holdings
            .iter()
            .map(|holding| holding.content.digest)
            .collect()
    }

    /// The directories of the members that work.
    pub fn directories(&self) -> Vec<PathBuf> {
        self.members()
            .iter()
            .map(|member| member.spec.path.clone())
            .collect()
    }
}
