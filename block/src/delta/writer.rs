//! Whatever changes a delta: writes, discards, flushes. All of it blocks and runs on blocking threads, to its end even
//! if nobody waits any more, so that a dropped future leaves no half-changed map.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Core;
use super::format::{BLOCK, BLOCKS_A_WORD, BOOT_OFFSET, Boot, DURABLE_OFFSET, encode_boot, encode_header};
use super::map::State;
use crate::storage::write_error;
use crate::{BlockError, blocking};

/// Bytes copied at once where data is stored again.
const COPY_BYTES: u64 = 1 << 20;

/// What whoever changes the delta must know.
#[derive(Default)]
pub(super) struct Writer {
    /// The file has its header, its length and this boot's volatile map.
    begun: bool,
    /// Words of the map that the durable map does not have yet.
    dirty: BTreeSet<u64>,
    /// Something was written since the last sync began.
    unsynced: bool,
    /// A sync failed: what was in the operating system's cache may never reach the disk, and a later sync would not
    /// say so again. All of it must be written again first.
    doubtful: bool,
    directory_synced: bool,
    /// It is a frozen layer: a write that nobody waits for any more and that comes late is refused.
    frozen: bool,
}

impl Writer {
    /// After another process of the same boot; what that one did not flush is ours to flush. `whole`: the file has
    /// its full length.
    pub(super) fn same_boot(dirty: BTreeSet<u64>, doubtful: bool, whole: bool) -> Self {
        Self {
            begun: whole,
            dirty,
            unsynced: true,
            doubtful,
            directory_synced: false,
            frozen: false,
        }
    }
}

impl Writer {
    fn refuse_frozen(&self) -> Result<(), BlockError> {
        match self.frozen {
            true => Err(BlockError::Unavailable {
                what: "a snapshot was made while the write was given up".into(),
            }),
            false => Ok(()),
        }
    }
}

/// A write, rounded out to whole blocks.
pub(crate) struct BlockWrite {
    /// What is to be written, in bytes of the disk.
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
    /// Whole blocks from the first block touched to the last. Around what is to be written it holds the base's bytes
    /// where the block was the base's when the write began, else anything.
    pub(crate) blocks: Vec<u8>,
}

impl Core {
    pub(crate) fn path(&self) -> &std::path::Path {
        &self.path
    }

    pub(crate) fn disk_bytes(&self) -> u64 {
        self.layout.disk_bytes
    }

    pub(crate) fn state(&self, block: u64) -> State {
        self.map.get(block)
    }

    pub(crate) fn run(&self, block: u64, most: u64) -> (State, u64) {
        self.map.run(block, most)
    }

    pub(crate) fn storage(&self) -> &Arc<dyn crate::storage::Storage> {
        &self.storage
    }

    /// Where in the file the disk's byte `offset` is.
    pub(crate) fn place(&self, offset: u64) -> u64 {
        self.layout.data_offset + offset
    }

    /// Stores a write.
    pub(crate) fn write(&self, mut write: BlockWrite) -> Result<(), BlockError> {
        let mut writer = self.writer.lock();
        writer.refuse_frozen()?;
        let fail = |error| write_error(error, write.offset, write.bytes);
        let first = write.offset / BLOCK;
        let end_byte = write.offset + write.bytes;
        let end = end_byte.div_ceil(BLOCK);
        let start_byte = first * BLOCK;
        if !self.may_have(&self.map.changes(first, end, State::Data)) {
            return Err(fail(io::ErrorKind::StorageFull.into()));
        }
        self.begin(&mut writer).map_err(fail)?;
        // Around the written bytes: a block of data keeps what it has, a zero block gets zeroes, the base's is copied.
        let (mut from, mut to) = (start_byte, end * BLOCK);
        match self.map.get(first) {
            State::Data => from = write.offset,
            State::Zero => write.blocks[..(write.offset - start_byte) as usize].fill(0),
            State::Base => {}
        }
        match self.map.get(end - 1) {
            State::Data => to = end_byte,
            State::Zero => write.blocks[(end_byte - start_byte) as usize..].fill(0),
            State::Base => {}
        }
        let data = &write.blocks[(from - start_byte) as usize..(to - start_byte) as usize];
        writer.unsynced = true;
        self.storage.write_at(self.place(from), data).map_err(fail)?;
        self.change_map(&mut writer, first, end, State::Data)
            .map_err(fail)
    }

    /// From now on writes and discards are refused, or are taken again.
    pub(crate) fn set_frozen(&self, frozen: bool) {
        self.writer.lock().frozen = frozen;
    }

    /// Takes the blocks from `first` on over from a layer below: those that are the base's here. `data` has whole blocks where
    /// they are data there; without it they are zero.
    pub(crate) fn take_over(&self, first: u64, count: u64, data: Option<&[u8]>) -> io::Result<()> {
        let mut writer = self.writer.lock();
        let mut block = first;
        let end = first + count;
        while block < end {
            let (state, run) = self.map.run(block, end - block);
            if state == State::Base {
                self.begin(&mut writer)?;
                writer.unsynced = true;
                let to = match data {
                    None => State::Zero,
                    Some(data) => {
                        let at = ((block - first) * BLOCK) as usize;
                        let part = &data[at..at + (run * BLOCK) as usize];
                        self.storage.write_at(self.place(block * BLOCK), part)?;
                        State::Data
                    }
                };
                self.change_map(&mut writer, block, block + run, to)?;
            }
            block += run;
        }
        Ok(())
    }

    /// Takes blocks in that come from elsewhere, whatever was there. `data` has whole blocks; without it they are zero.
    pub(crate) fn put(&self, first: u64, count: u64, data: Option<&[u8]>) -> io::Result<()> {
        let mut writer = self.writer.lock();
        self.begin(&mut writer)?;
        writer.unsynced = true;
        let place = self.place(first * BLOCK);
        let state = match data {
            None => State::Zero,
            Some(data) => {
                self.storage.write_at(place, data)?;
                State::Data
            }
        };
        self.change_map(&mut writer, first, first + count, state)?;
        if data.is_none() {
            let _only_space = self.storage.punch(place, count * BLOCK);
        }
        Ok(())
    }

    /// Makes the blocks `first..end` zero and gives their space back.
    pub(crate) fn discard(&self, first: u64, end: u64) -> Result<(), BlockError> {
        let mut writer = self.writer.lock();
        writer.refuse_frozen()?;
        let (offset, bytes) = (first * BLOCK, (end - first) * BLOCK);
        let fail = |error| write_error(error, offset, bytes);
        if self.map.run(first, end - first) == (State::Zero, end - first) {
            return Ok(());
        }
        self.begin(&mut writer).map_err(fail)?;
        writer.unsynced = true;
        self.change_map(&mut writer, first, end, State::Zero)
            .map_err(fail)?;
        // The map alone makes the blocks zero. Space that is not given back now is used again by a later write.
        let _only_space = self.storage.punch(self.place(offset), bytes);
        Ok(())
    }

    /// The map's change, in the file, then in memory.
    fn change_map(&self, writer: &mut Writer, first: u64, end: u64, state: State) -> io::Result<()> {
        let changes = self.map.changes(first, end, state);
        if let Err(error) = self.write_words(self.layout.volatile_offset, &changes) {
            // Part of it may be in the file. Put back what memory has, so that a kill now leaves the old state.
            let old: Vec<(u64, u64)> = changes
                .iter()
                .map(|&(index, _)| (index, self.map.word(index)))
                .collect();
            let _best_effort = self.write_words(self.layout.volatile_offset, &old);
            return Err(error);
        }
        self.count(&changes);
        for (index, word) in changes {
            self.map.set_word(index, word);
            writer.dirty.insert(index);
        }
        Ok(())
    }

    /// Writes words of a map, ascending, neighbours together.
    fn write_words(&self, map_offset: u64, words: &[(u64, u64)]) -> io::Result<()> {
        for run in words.chunk_by(|a, b| a.0 + 1 == b.0) {
            let bytes: Vec<u8> = run.iter().flat_map(|(_, word)| word.to_le_bytes()).collect();
            self.storage.write_at(map_offset + run[0].0 * 8, &bytes)?;
        }
        Ok(())
    }

    /// Before the first change since opening: length, header, and a volatile map of this boot.
    fn begin(&self, writer: &mut Writer) -> io::Result<()> {
        if writer.begun {
            return Ok(());
        }
        if self.storage.len()? < self.layout.file_bytes {
            self.storage.set_len(self.layout.file_bytes)?;
        }
        self.storage.write_at(0, &encode_header(&self.meta))?;
        self.renew_volatile_map()?;
        self.write_boot(false)?;
        writer.begun = true;
        writer.unsynced = true;
        Ok(())
    }

    /// What an earlier boot left in the volatile map goes; what the durable map had comes.
    fn renew_volatile_map(&self) -> io::Result<()> {
        let offset = self.layout.volatile_offset;
        if let Err(error) = self.storage.punch(offset, self.layout.map_bytes) {
            if error.kind() != io::ErrorKind::Unsupported {
                return Err(error);
            }
            let zeroes = vec![0; BLOCK as usize];
            for page in (0..self.layout.map_bytes).step_by(BLOCK as usize) {
                self.storage.write_at(offset + page, &zeroes)?;
            }
        }
        let words: Vec<(u64, u64)> = self
            .map
            .used_words()
            .map(|index| (index, self.map.word(index)))
            .collect();
        self.write_words(offset, &words)
    }

    fn write_boot(&self, doubtful: bool) -> io::Result<()> {
        let boot = Boot {
            id: self.boot,
            doubtful,
        };
        self.storage.write_at(BOOT_OFFSET, &encode_boot(&boot))
    }

    /// Makes every write that has ended durable. Flushes that come while one runs share the next.
    pub(crate) async fn flush(self: &Arc<Self>) -> Result<(), BlockError> {
        let mine = self.flushes_wanted.fetch_add(1, Ordering::AcqRel) + 1;
        let _turn = self.turn.lock().await;
        if self.flushes_done.load(Ordering::Acquire) >= mine {
            return Ok(());
        }
        let covered = self.flushes_wanted.load(Ordering::Acquire);
        let core = Arc::clone(self);
        blocking::run(move || core.flush_now().map_err(|error| write_error(error, 0, 0))).await?;
        self.flushes_done.fetch_max(covered, Ordering::AcqRel);
        Ok(())
    }

    pub(crate) fn flush_now(&self) -> io::Result<()> {
        // `turn` is let go when a caller leaves, this is not.
        let _alone = self.flushing.lock();
        let (words, was_doubtful, sync_directory) = {
            let mut writer = self.writer.lock();
            let was_doubtful = writer.doubtful;
            if was_doubtful {
                self.store_again(&mut writer)?;
            }
            if !writer.unsynced {
                return Ok(());
            }
            writer.unsynced = false;
            writer.doubtful = false;
            let dirty = std::mem::take(&mut writer.dirty);
            // The words of this moment: what changes during the sync may not be synced by it.
            let words: Vec<(u64, u64)> = dirty
                .into_iter()
                .map(|index| (index, self.map.word(index)))
                .collect();
            (words, was_doubtful, !writer.directory_synced)
        };
        let result = self.make_durable(&words, sync_directory);
        let mut writer = self.writer.lock();
        match result {
            Ok(()) => {
                writer.directory_synced = true;
                if was_doubtful {
                    self.write_boot(false)?;
                }
                Ok(())
            }
            Err((step, error)) => {
                writer.unsynced = true;
                writer.dirty.extend(words.iter().map(|(index, _)| *index));
                // A write that failed can be tried again; a sync that failed cannot be trusted again, nor can what
                // was being stored again for that reason.
                writer.doubtful = step == Step::Sync || was_doubtful;
                if writer.doubtful {
                    tracing::error!(
                        path = %self.path.display(), %error,
                        "a delta could not be made durable; the next flush stores all of it again"
                    );
                    // For a successor in this boot. If even this fails the disk is gone for good.
                    let _best_effort = self.write_boot(true);
                }
                Err(error)
            }
        }
    }

    fn make_durable(&self, words: &[(u64, u64)], sync_directory: bool) -> Result<(), (Step, io::Error)> {
        let sync = || self.storage.sync().map_err(|error| (Step::Sync, error));
        if sync_directory && let Some(directory) = &self.directory {
            let folder = std::fs::File::open(directory);
            folder
                .and_then(|folder| folder.sync_all())
                .map_err(|error| (Step::Sync, error))?;
        }
        sync()?;
        if !words.is_empty() {
            self.write_words(DURABLE_OFFSET, words)
                .map_err(|error| (Step::Write, error))?;
            sync()?;
        }
        Ok(())
    }

    /// Writes everything again, so that the next sync has it to write.
    fn store_again(&self, writer: &mut Writer) -> io::Result<()> {
        self.storage.set_len(self.layout.file_bytes)?;
        self.storage.write_at(0, &encode_header(&self.meta))?;
        let used: Vec<u64> = self.map.used_words().collect();
        for index in used {
            let first = index * BLOCKS_A_WORD;
            let end = (first + BLOCKS_A_WORD).min(self.layout.blocks);
            let mut block = first;
            while block < end {
                let (state, count) = self.map.run(block, (end - block).min(COPY_BYTES / BLOCK));
                if state == State::Data {
                    let mut bytes = vec![0; (count * BLOCK) as usize];
                    let place = self.place(block * BLOCK);
                    self.storage.read_at(place, &mut bytes)?;
                    self.storage.write_at(place, &bytes)?;
                }
                block += count;
            }
            writer.dirty.insert(index);
        }
        writer.unsynced = true;
        Ok(())
    }
}

/// What failed in making a delta durable.
#[derive(PartialEq, Eq)]
enum Step {
    Write,
    Sync,
}
