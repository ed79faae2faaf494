//! dm-cache: the cache group of the kernel plane (kernel `cache.rst`, `cache-policies.rst`).

use std::fmt;

use super::{TableError, Tokens};
use crate::{DeviceNumber, Sectors};

/// A cache over an origin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cache {
    /// Holds what is cached where.
    pub metadata: DeviceNumber,
    /// Holds the cached blocks.
    pub data: DeviceNumber,
    /// What is cached.
    pub origin: DeviceNumber,
    /// Unit of caching: 64 to 2,097,152 sectors, a multiple of 64.
    pub block: Sectors,
    /// What happens to writes.
    pub mode: CacheMode,
    /// The second format of the metadata, which keeps dirty bits apart.
    pub metadata2: bool,
    /// The policy's name: `smq` or `default`.
    pub policy: String,
    /// The policy's settings, name and value.
    pub settings: Vec<(String, String)>,
}

/// What happens to writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheMode {
    /// To the origin and the cache: the cache may be lost at any time. The base uses nothing else.
    WriteThrough,
    /// To the cache alone: losing it loses data.
    WriteBack,
    /// Past the cache; for a cache whose content is not trusted.
    PassThrough,
}

impl CacheMode {
    fn name(self) -> &'static str {
        match self {
            Self::WriteThrough => "writethrough",
            Self::WriteBack => "writeback",
            Self::PassThrough => "passthrough",
        }
    }
}

impl Cache {
    pub(super) fn parse(tokens: &mut Tokens<'_>) -> Result<Self, TableError> {
        let metadata = tokens.device("metadata device")?;
        let data = tokens.device("cache device")?;
        let origin = tokens.device("origin")?;
        let block = tokens.sectors("block size")?;
        // Where the table does not say, the kernel writes back.
        let (mut mode, mut metadata2) = (CacheMode::WriteBack, false);
        for feature in tokens.list("features")? {
            match feature {
                "writethrough" => mode = CacheMode::WriteThrough,
                "writeback" => mode = CacheMode::WriteBack,
                "passthrough" => mode = CacheMode::PassThrough,
                "metadata2" => metadata2 = true,
                other => return Err(tokens.invalid("cache feature", other)),
            }
        }
        let policy = tokens.next("policy")?.to_owned();
        let words = tokens.list("policy settings")?;
        if words.len() % 2 == 1 {
            return Err(tokens.invalid(
                "number of policy settings (name and value)",
                &words.len().to_string(),
            ));
        }
        let settings = words
            .chunks_exact(2)
            .map(|pair| (pair[0].to_owned(), pair[1].to_owned()))
            .collect();
        Ok(Self {
            metadata,
            data,
            origin,
            block,
            mode,
            metadata2,
            policy,
            settings,
        })
    }
}

impl fmt::Display for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {} {} {}",
            self.metadata, self.data, self.origin, self.block
        )?;
        // The kernel reports `metadata2` before the mode.
        let (count, metadata2) = if self.metadata2 {
            (2, "metadata2 ")
        } else {
            (1, "")
        };
        write!(
            f,
            " {count} {metadata2}{} {} {}",
            self.mode.name(),
            self.policy,
            self.settings.len() * 2
        )?;
        self.settings
            .iter()
            .try_for_each(|(name, value)| write!(f, " {name} {value}"))
    }
}
