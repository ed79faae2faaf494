//! What dm-cache reports (kernel `cache.rst`, "Status").

use super::{StatusError, Words};
use crate::Sectors;

/// What a cache says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CacheStatus {
    /// It works, or works still: see [`CacheCounts::usable`].
    Counts(CacheCounts),
    /// Its metadata could not be written or read. Every access fails until it is repaired or thrown away.
    Fail,
    /// The kernel could not find out.
    Error,
}

/// What a cache counts. Hits and misses are of bios since the cache was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheCounts {
    /// Metadata blocks in use.
    pub metadata_used: u64,
    /// Metadata blocks there are.
    pub metadata_total: u64,
    /// Unit of caching.
    pub block: Sectors,
    /// Blocks in use.
    pub used: u64,
    /// Blocks there are.
    pub total: u64,
    /// Reads served from the cache.
    pub read_hits: u64,
    /// Reads served from the origin.
    pub read_misses: u64,
    /// Writes to a cached block.
    pub write_hits: u64,
    /// Writes to another.
    pub write_misses: u64,
    /// Blocks moved out.
    pub demotions: u64,
    /// Blocks moved in.
    pub promotions: u64,
    /// Blocks that differ from the origin, as far as dm-cache knows.
    pub dirty: u64,
    /// The metadata can be written (`rw`).
    pub writable: bool,
    /// The metadata must be checked before the cache can be used again (`needs_check`).
    pub needs_check: bool,
}

impl CacheStatus {
    pub(super) fn parse(words: &mut Words<'_>) -> Result<Self, StatusError> {
        let first = words.next("metadata block size")?;
        match first {
            "Fail" => return Ok(Self::Fail),
            "Error" => return Ok(Self::Error),
            _ => {}
        }
        let (metadata_used, metadata_total) = words.fraction("use of metadata")?;
        let block = Sectors(words.number("block size")?);
        let (used, total) = words.fraction("use of the cache")?;
        let read_hits = words.number("read hits")?;
        let read_misses = words.number("read misses")?;
        let write_hits = words.number("write hits")?;
        let write_misses = words.number("write misses")?;
        let demotions = words.number("demotions")?;
        let promotions = words.number("promotions")?;
        let dirty = words.number("dirty blocks")?;
        words.list("features")?;
        words.list("core arguments")?;
        words.next("policy")?;
        words.list("policy arguments")?;
        let writable = match words.next("metadata mode")? {
            "rw" => true,
            "ro" => false,
            _ => return Err(words.error("metadata mode of rw or ro")),
        };
        let needs_check = match words.next("needs_check")? {
            "needs_check" => true,
            "-" => false,
            _ => return Err(words.error("needs_check or -")),
        };
        Ok(Self::Counts(CacheCounts {
            metadata_used,
            metadata_total,
            block,
            used,
            total,
            read_hits,
            read_misses,
            write_hits,
            write_misses,
            demotions,
            promotions,
            dirty,
            writable,
            needs_check,
        }))
    }

    /// Whether reads through the cache can be trusted to end well and new blocks to be kept.
    pub fn healthy(&self) -> bool {
        matches!(self, Self::Counts(counts) if counts.usable())
    }
}

impl CacheCounts {
    /// Whether the metadata is whole and can be written.
    pub fn usable(&self) -> bool {
        self.writable && !self.needs_check
    }
}
