//! dm-verity: nothing that is not the image's gets past it (kernel `verity.rst`).

use std::fmt;

use treeboot_types::{Digest, VERITY_BLOCK_BYTES};

use super::{TableError, Tokens};
use crate::DeviceNumber;

/// A device whose blocks are checked against a hash tree: format 1, SHA-256, blocks of 4 KiB, no salt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verity {
    /// The data.
    pub data: DeviceNumber,
    /// The hash tree.
    pub hashes: DeviceNumber,
    /// Blocks of data.
    pub data_blocks: u64,
    /// Block of `hashes` at which the tree begins: 1, behind the superblock.
    pub hash_start_block: u64,
    /// The root of the tree.
    pub root: Digest,
    /// What a wrong block leads to.
    pub on_corruption: OnCorruption,
    /// Blocks whose hash is a zero block's are not read at all.
    pub ignore_zero_blocks: bool,
    /// A block is checked at its first reading only.
    pub check_at_most_once: bool,
}

/// What a wrong block leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnCorruption {
    /// The read fails.
    Fail,
    /// It is logged, and the wrong bytes are read.
    Ignore,
    /// The machine restarts.
    Restart,
    /// The kernel panics.
    Panic,
}

impl Verity {
    pub(super) fn parse(tokens: &mut Tokens<'_>) -> Result<Self, TableError> {
        expect(tokens, "1", "verity format (1 is used)")?;
        let (data, hashes) = (tokens.device("data device")?, tokens.device("hash device")?);
        let block = VERITY_BLOCK_BYTES.to_string();
        expect(tokens, &block, "data block size (4096 is used)")?;
        expect(tokens, &block, "hash block size (4096 is used)")?;
        let data_blocks = tokens.number("number of data blocks")?;
        let hash_start_block = tokens.number("first hash block")?;
        expect(tokens, "sha256", "algorithm (sha256 is used)")?;
        let root = tokens.parsed("root digest")?;
        expect(tokens, "-", "salt (none is used)")?;
        let mut verity = Self {
            data,
            hashes,
            data_blocks,
            hash_start_block,
            root,
            on_corruption: OnCorruption::Fail,
            ignore_zero_blocks: false,
            check_at_most_once: false,
        };
        if tokens.peek().is_some() {
            for option in tokens.list("optional parameters")? {
                match option {
                    "ignore_corruption" => verity.on_corruption = OnCorruption::Ignore,
                    "restart_on_corruption" => verity.on_corruption = OnCorruption::Restart,
                    "panic_on_corruption" => verity.on_corruption = OnCorruption::Panic,
                    "ignore_zero_blocks" => verity.ignore_zero_blocks = true,
                    "check_at_most_once" => verity.check_at_most_once = true,
                    other => return Err(tokens.invalid("verity option", other)),
                }
            }
        }
        Ok(verity)
    }

    // In the order in which the kernel reports them.
    fn options(&self) -> Vec<&'static str> {
        let corruption = match self.on_corruption {
            OnCorruption::Fail => None,
            OnCorruption::Ignore => Some("ignore_corruption"),
            OnCorruption::Restart => Some("restart_on_corruption"),
            OnCorruption::Panic => Some("panic_on_corruption"),
        };
        let zero = self.ignore_zero_blocks.then_some("ignore_zero_blocks");
        let once = self.check_at_most_once.then_some("check_at_most_once");
        [corruption, zero, once].into_iter().flatten().collect()
    }
}

fn expect(tokens: &mut Tokens<'_>, expected: &str, what: &'static str) -> Result<(), TableError> {
    let token = tokens.next(what)?;
    if token == expected {
        Ok(())
    } else {
        Err(tokens.invalid(what, token))
    }
}

impl fmt::Display for Verity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let block = VERITY_BLOCK_BYTES;
        write!(
            f,
            "1 {} {} {block} {block} {}",
            self.data, self.hashes, self.data_blocks
        )?;
        write!(f, " {} sha256 {} -", self.hash_start_block, self.root)?;
        let options = self.options();
        if options.is_empty() {
            Ok(())
        } else {
            write!(f, " {} {}", options.len(), options.join(" "))
        }
    }
}
