//! Frozen layers over a base, as one read-only device: which layer has a block is looked up in one map, however many layers
//! there are.

use std::sync::{Arc, OnceLock};

use crate::blocking::{self, read_storage};
use crate::delta::{BLOCK, Core, State};
use crate::runs::{self, Runs};
use crate::{BlockDevice, BlockError, Delta, Extent, Geometry, IoFuture, Provisioning};

/// Blocks in a page of the map: 16 KiB of memory for 64 MiB of disk.
const PAGE_BLOCKS: u64 = 16384;
/// Values of the map: below any layer, zeroes, and then the layers.
const BASE: u8 = 0;
const ZERO: u8 = 1;
const FIRST: u8 = 2;

/// For each block who has it. Pages where it is the base everywhere take no memory.
struct Map {
    pages: Box<[OnceLock<Box<[u8]>>]>,
}

impl Map {
    fn new(layers: &[Delta], blocks: u64) -> Self {
        let mut pages: Vec<Option<Box<[u8]>>> = vec![None; blocks.div_ceil(PAGE_BLOCKS) as usize];
        for (layer, number) in layers.iter().zip(FIRST..) {
            for (first, state, count) in layer.core().runs(u64::MAX) {
                for block in first..first + count {
                    let page = pages[(block / PAGE_BLOCKS) as usize]
                        .get_or_insert_with(|| vec![BASE; PAGE_BLOCKS as usize].into());
                    page[(block % PAGE_BLOCKS) as usize] = match state {
                        State::Zero => ZERO,
                        State::Data | State::Base => number,
                    };
                }
            }
        }
        Self {
            pages: pages
                .into_iter()
                .map(|page| page.map_or_else(OnceLock::new, OnceLock::from))
                .collect(),
        }
    }

    fn get(&self, block: u64) -> u8 {
        match self
            .pages
            .get((block / PAGE_BLOCKS) as usize)
            .and_then(OnceLock::get)
        {
            Some(page) => page[(block % PAGE_BLOCKS) as usize],
            None => BASE,
        }
    }

    /// Who has `block`, and how many blocks from there on, up to `most`, it has.
    fn run(&self, block: u64, most: u64) -> (u8, u64) {
        let who = self.get(block);
        let mut count = 1;
        while count < most {
            let next = block + count;
            let empty = next.is_multiple_of(PAGE_BLOCKS)
                && who == BASE
                && self
                    .pages
                    .get((next / PAGE_BLOCKS) as usize)
                    .is_some_and(|page| page.get().is_none());
            if empty {
                count += PAGE_BLOCKS;
            } else if self.get(next) == who {
                count += 1;
            } else {
                break;
            }
        }
        (who, count.min(most))
    }
}

/// Where the content of a run of blocks is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// In the base.
    Base,
    /// Nowhere: zeroes.
    Zero,
    /// In a layer.
    Data,
}

/// The layers, lowest first, over a base.
pub struct Frozen {
    base: Arc<dyn BlockDevice>,
    layers: Vec<Delta>,
    map: Map,
}

impl Frozen {
    /// `layers`, lowest first, over `base`. Nothing may be written to them any more, but for what merges copy.
    pub(super) fn new(base: Arc<dyn BlockDevice>, layers: Vec<Delta>) -> Self {
        let bytes = base.geometry().bytes;
        let map = Map::new(&layers, bytes.div_ceil(BLOCK));
        Self { base, layers, map }
    }

    fn layer(&self, who: u8) -> Option<&Arc<Core>> {
        let index = who.checked_sub(FIRST)?;
        self.layers.get(usize::from(index)).map(Delta::core)
    }

    /// The run of whole blocks that begins at `offset`, a multiple of 4096: where its content is and how long it is, at most
    /// `bytes`.
    pub fn content(&self, offset: u64, bytes: u64) -> (Content, u64) {
        let (who, run) = self.run(offset, bytes);
        let content = match who {
            BASE => Content::Base,
            ZERO => Content::Zero,
            _ => Content::Data,
        };
        (content, run)
    }
}

/// Reads whole blocks and compares them with their checksums.
fn read_sealed<'a>(core: &'a Arc<Core>, offset: u64, buf: &'a mut [u8]) -> IoFuture<'a, ()> {
    let bytes = buf.len() as u64;
    let (first, end) = (offset / BLOCK, (offset + bytes).div_ceil(BLOCK));
    let (start, count) = (first * BLOCK, end - first);
    Box::pin(async move {
        let fail = move |source| BlockError::Io { offset, source };
        let seal = match core.try_seal_of(first, count).map_err(fail)? {
            Some(seal) => seal,
            None => {
                let core = Arc::clone(core);
                blocking::run(move || core.seal_of(first, count).map_err(fail)).await?
            }
        };
        let wrong = if start == offset && bytes == count * BLOCK {
            read_storage(core.storage(), core.place(offset), offset, buf).await?;
            seal.wrong(buf)
        } else {
            let mut whole = vec![0; (count * BLOCK) as usize];
            read_storage(core.storage(), core.place(start), offset, &mut whole).await?;
            let from = (offset - start) as usize;
            buf.copy_from_slice(&whole[from..from + bytes as usize]);
            seal.wrong(&whole)
        };
        match wrong {
            None => Ok(()),
            // A merge took the seal off meanwhile, and may have changed checksums; the data of these blocks stays.
            Some(_) if !core.is_sealed() => Ok(()),
            Some(block) => {
                buf.fill(0);
                Err(BlockError::Corrupt {
                    what: format!(
                        "the layer '{}' has other bytes at {} of the disk than were written",
                        core.path().display(),
                        block * BLOCK
                    ),
                })
            }
        }
    })
}

impl Runs for Frozen {
    type Who = u8;

    fn run(&self, offset: u64, bytes: u64) -> (u8, u64) {
        let block = offset / BLOCK;
        let most = (offset + bytes).div_ceil(BLOCK) - block;
        let (who, count) = self.map.run(block, most);
        (who, ((block + count) * BLOCK - offset).min(bytes))
    }

    fn read_run<'a>(&'a self, who: u8, offset: u64, buf: &'a mut [u8]) -> IoFuture<'a, ()> {
        match (who, self.layer(who)) {
            (BASE, _) => self.base.read(offset, buf),
            (_, Some(core)) if core.is_sealed() => read_sealed(core, offset, buf),
            (_, Some(core)) => read_storage(core.storage(), core.place(offset), offset, buf),
            (_, None) => {
                buf.fill(0);
                blocking::ready(Ok(()))
            }
        }
    }
}

impl BlockDevice for Frozen {
    fn geometry(&self) -> Geometry {
        Geometry {
            physical_block_bytes: BLOCK as u32,
            read_only: true,
            thin: true,
            ..self.base.geometry()
        }
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> IoFuture<'a, ()> {
        runs::read(self, offset, buf)
    }

    fn write<'a>(&'a self, _: u64, _: &'a [u8]) -> IoFuture<'a, ()> {
        blocking::ready(Err(BlockError::ReadOnly))
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        blocking::ready(Ok(()))
    }

    fn discard(&self, _: u64, _: u64) -> IoFuture<'_, ()> {
        blocking::ready(Err(BlockError::ReadOnly))
    }

    fn extent(&self, offset: u64, bytes: u64) -> IoFuture<'_, Extent> {
        if let Err(error) = self.check_range(offset, bytes) {
            return blocking::ready(Err(error));
        }
        let bytes = bytes.max(u64::from(self.base.geometry().block_bytes));
        let (who, run) = self.run(offset, bytes);
        let state = match who {
            BASE => return self.base.extent(offset, run),
            ZERO => Provisioning::Hole,
            _ => Provisioning::Mapped,
        };
        blocking::ready(Ok(Extent { bytes: run, state }))
    }
}
