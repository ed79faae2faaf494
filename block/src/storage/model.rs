//! A model of storage that can crash and fail, for tests.
//!
//! [`ModelStorage`] answers like a file and logs every operation. [`ModelStorage::crash`] gives what a machine
//! could find after it stopped at any point of that log: of the writes that no later `sync` covered, each
//! 512-byte sector is kept or dropped by itself, in any combination. [`ModelStorage::killed`] gives what a process
//! could find that replaces one killed at that point, while the operating system lived on.

use std::collections::BTreeMap;
use std::io;

use parking_lot::Mutex;

use super::Storage;
use crate::{Extent, Provisioning};

/// The unit in bytes that a disk writes wholly or not at all.
pub const SECTOR_BYTES: usize = 512;

type Sector = [u8; SECTOR_BYTES];

#[derive(Debug, Clone)]
enum Operation {
    Write { offset: u64, data: Vec<u8> },
    Punch { offset: u64, bytes: u64 },
    SetLen(u64),
    Sync { ok: bool },
}

impl Operation {
    /// Its first sectors, for as long as `keep` says so.
    fn cut(&self, keep: &mut dyn FnMut() -> bool) -> Option<Self> {
        let mut kept = |offset: u64, bytes: usize| {
            let whole = pieces(offset, bytes).take_while(|_| keep());
            whole.map(|(_, range, _)| range.len()).sum::<usize>()
        };
        match self {
            Self::Write { offset, data } => {
                let data = data[..kept(*offset, data.len())].to_vec();
                (!data.is_empty()).then_some(Self::Write {
                    offset: *offset,
                    data,
                })
            }
            Self::Punch { offset, bytes } => {
                let bytes = kept(*offset, *bytes as usize) as u64;
                (bytes > 0).then_some(Self::Punch {
                    offset: *offset,
                    bytes,
                })
            }
            Self::SetLen(bytes) => keep().then_some(Self::SetLen(*bytes)),
            Self::Sync { .. } => None,
        }
    }
}

/// Which error an operation is to give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// ENOSPC; only writes, punches and changes of length give it.
    NoSpace,
    /// EIO; reads and syncs give it too.
    Io,
}

#[derive(Debug, Clone, Default)]
struct Content {
    sectors: BTreeMap<u64, Sector>,
    bytes: u64,
}

impl Content {
    fn read(&self, offset: u64, buf: &mut [u8]) {
        buf.fill(0);
        for (sector, range, at) in pieces(offset, buf.len()) {
            if let Some(content) = self.sectors.get(&sector) {
                buf[at..at + range.len()].copy_from_slice(&content[range]);
            }
        }
    }

    /// Writes those sectors of `data` for which `keep` says so.
    fn write(&mut self, offset: u64, data: &[u8], keep: &mut dyn FnMut() -> bool) {
        for (sector, range, at) in pieces(offset, data.len()) {
            if keep() {
                let end = sector * SECTOR_BYTES as u64 + range.end as u64;
                let content = self.sectors.entry(sector).or_insert([0; SECTOR_BYTES]);
                content[range.clone()].copy_from_slice(&data[at..at + range.len()]);
                self.bytes = self.bytes.max(end);
            }
        }
    }

    fn punch(&mut self, offset: u64, bytes: u64, keep: &mut dyn FnMut() -> bool) {
        for (sector, range, _) in pieces(offset, bytes as usize) {
            if keep() {
                if range.len() == SECTOR_BYTES {
                    self.sectors.remove(&sector);
                } else if let Some(content) = self.sectors.get_mut(&sector) {
                    content[range].fill(0);
                }
            }
        }
    }

    fn set_len(&mut self, bytes: u64) {
        if bytes < self.bytes {
            let first_gone = bytes.div_ceil(SECTOR_BYTES as u64);
            self.sectors.split_off(&first_gone);
            if let Some(last) = self.sectors.get_mut(&(bytes / SECTOR_BYTES as u64)) {
                last[(bytes % SECTOR_BYTES as u64) as usize..].fill(0);
            }
        }
        self.bytes = bytes;
    }

    fn apply(&mut self, operation: &Operation, keep: &mut dyn FnMut() -> bool) {
        match operation {
            Operation::Write { offset, data } => self.write(*offset, data, keep),
            Operation::Punch { offset, bytes } => self.punch(*offset, *bytes, keep),
            Operation::SetLen(bytes) => {
                if keep() {
                    self.set_len(*bytes);
                }
            }
            Operation::Sync { .. } => {}
        }
    }
}

/// The sectors that a run touches: (sector, its bytes, where they are in the run).
fn pieces(offset: u64, bytes: usize) -> impl Iterator<Item = (u64, std::ops::Range<usize>, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        (at < bytes).then(|| {
            let position = offset + at as u64;
            let first = (position % SECTOR_BYTES as u64) as usize;
            let length = (SECTOR_BYTES - first).min(bytes - at);
            let piece = (position / SECTOR_BYTES as u64, first..first + length, at);
            at += length;
            piece
        })
    })
}

/// A coin whose throws follow from `seed` (SplitMix64), for `keep` of [`ModelStorage::crash`].
pub fn coin(seed: u64) -> impl FnMut() -> bool {
    let mut state = seed;
    move || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ (mixed >> 31)) & 1 == 1
    }
}

#[derive(Debug, Default)]
struct State {
    content: Content,
    /// What was there before the log began.
    initial: Content,
    log: Vec<Operation>,
    /// Operations so far, reads too.
    operations: u64,
    faults: BTreeMap<u64, Fault>,
    /// From this operation on every write that needs room gives ENOSPC.
    full: bool,
    /// Reads and writes are answered without waiting only if set.
    never_ready: bool,
}

/// In-memory storage with a log; see the module.
#[derive(Debug, Default)]
pub struct ModelStorage {
    state: Mutex<State>,
}

impl ModelStorage {
    /// Empty storage.
    pub fn new() -> Self {
        Self::default()
    }

    /// Storage that holds `data`, durable, with an empty log.
    pub fn with_content(data: &[u8]) -> Self {
        let mut content = Content::default();
        content.write(0, data, &mut || true);
        Self::from_content(content)
    }

    fn from_content(content: Content) -> Self {
        Self {
            state: Mutex::new(State {
                initial: content.clone(),
                content,
                ..State::default()
            }),
        }
    }

    /// How many changes and syncs the log holds: the crash points are `0..=log_len()`.
    pub fn log_len(&self) -> usize {
        self.state.lock().log.len()
    }

    /// Operations so far, reads too: what [`fail_at`](Self::fail_at) counts.
    pub fn operations(&self) -> u64 {
        self.state.lock().operations
    }

    /// The `k`-th operation from the start (the first is 0) is to fail. A failing write has stored the first half
    /// of its sectors; a failing sync leaves in doubt what it should have made durable.
    pub fn fail_at(&self, k: u64, fault: Fault) {
        self.state.lock().faults.insert(k, fault);
    }

    /// From now on there is, or is not, room for what is written.
    pub fn set_full(&self, full: bool) {
        self.state.lock().full = full;
    }

    /// From now on [`Storage::try_read_at`] says, or does not say, that it would block.
    pub fn set_never_ready(&self, never_ready: bool) {
        self.state.lock().never_ready = never_ready;
    }

    /// What a power cut after the first `prefix` operations of the log could leave. `keep` is asked for each
    /// sector of each write that was not made durable.
    pub fn crash(&self, prefix: usize, keep: &mut dyn FnMut() -> bool) -> Self {
        let state = self.state.lock();
        let log = &state.log[..prefix.min(state.log.len())];
        // A write is durable if the first sync after it succeeded; a failed sync may have lost it for good.
        let mut durable = vec![false; log.len()];
        let mut since = 0;
        for (index, operation) in log.iter().enumerate() {
            if let Operation::Sync { ok } = operation {
                durable[since..index].fill(*ok);
                since = index + 1;
            }
        }
        let mut content = state.initial.clone();
        for (operation, durable) in log.iter().zip(durable) {
            content.apply(operation, &mut || durable || keep());
        }
        Self::from_content(content)
    }

    /// What the successor of a process killed after the first `prefix` operations finds: all of them, and of the
    /// next one the first sectors, for as long as `keep` says so.
    pub fn killed(&self, prefix: usize, keep: &mut dyn FnMut() -> bool) -> Self {
        let state = self.state.lock();
        let prefix = prefix.min(state.log.len());
        let mut log = state.log[..prefix].to_vec();
        log.extend(state.log.get(prefix).and_then(|next| next.cut(keep)));
        let mut content = state.initial.clone();
        log.iter()
            .for_each(|operation| content.apply(operation, &mut || true));
        Self {
            // The operating system's cache lives on, and so does the log: a later power cut may still lose it.
            state: Mutex::new(State {
                content,
                initial: state.initial.clone(),
                log,
                ..State::default()
            }),
        }
    }

    /// All bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        let state = self.state.lock();
        let mut all = vec![0; state.content.bytes as usize];
        state.content.read(0, &mut all);
        all
    }

    /// Changes bytes behind the back of whoever uses the storage, durable and outside the log: damage.
    pub fn damage(&self, offset: u64, data: &[u8]) {
        let mut state = self.state.lock();
        state.content.write(offset, data, &mut || true);
        state.initial.write(offset, data, &mut || true);
    }
}

impl State {
    fn begin(&mut self) -> Option<Fault> {
        let number = self.operations;
        self.operations += 1;
        self.faults.remove(&number)
    }

    fn change(&mut self, operation: Operation) -> io::Result<()> {
        let fault = match self.begin() {
            None if self.full && !matches!(operation, Operation::Punch { .. }) => Some(Fault::NoSpace),
            fault => fault,
        };
        let Some(fault) = fault else {
            self.content.apply(&operation, &mut || true);
            self.log.push(operation);
            return Ok(());
        };
        if let Operation::Write { offset, mut data } = operation {
            data.truncate(data.len() / 2 / SECTOR_BYTES * SECTOR_BYTES);
            if !data.is_empty() {
                let part = Operation::Write { offset, data };
                self.content.apply(&part, &mut || true);
                self.log.push(part);
            }
        }
        Err(error(fault))
    }
}

fn error(fault: Fault) -> io::Error {
    match fault {
        Fault::NoSpace => io::ErrorKind::StorageFull.into(),
        // EIO has no kind of its own; 5 is its number on every Linux (errno(3)).
        Fault::Io => io::Error::from_raw_os_error(5),
    }
}

impl Storage for ModelStorage {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut state = self.state.lock();
        if state.begin() == Some(Fault::Io) {
            return Err(error(Fault::Io));
        }
        state.content.read(offset, buf);
        Ok(())
    }

    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<Option<()>> {
        if self.state.lock().never_ready {
            return Ok(None);
        }
        self.read_at(offset, buf).map(Some)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.state.lock().change(Operation::Write {
            offset,
            data: data.to_vec(),
        })
    }

    fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.state.lock().change(Operation::Punch { offset, bytes })
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.state.lock();
        let ok = state.begin() != Some(Fault::Io);
        state.log.push(Operation::Sync { ok });
        if ok { Ok(()) } else { Err(error(Fault::Io)) }
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.state.lock().content.bytes)
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.state.lock().change(Operation::SetLen(bytes))
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        Ok((self.state.lock().content.sectors.len() * SECTOR_BYTES) as u64)
    }

    fn extent(&self, offset: u64, bytes: u64) -> io::Result<Extent> {
        let state = self.state.lock();
        let end = offset.saturating_add(bytes);
        let sector_bytes = SECTOR_BYTES as u64;
        let first = offset / sector_bytes;
        let mapped = state.content.sectors.contains_key(&first);
        let run_end = if mapped {
            let mut sector = first;
            while state.content.sectors.contains_key(&sector) && sector * sector_bytes < end {
                sector += 1;
            }
            sector * sector_bytes
        } else {
            let next = state.content.sectors.range(first..).next();
            next.map_or(end, |(sector, _)| sector * sector_bytes)
        };
        Ok(Extent {
            bytes: run_end.min(end) - offset,
            state: if mapped {
                Provisioning::Mapped
            } else {
                Provisioning::Hole
            },
        })
    }
}
