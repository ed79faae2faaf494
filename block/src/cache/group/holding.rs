//! What the group holds of one image, and in which member each part of it is.
//!
//! An image is cut in segments, and a segment lies in one member at a time. Bits are changed under the group's lock only; readers take no
//! lock. A reader notes a segment's generation before it reads and compares it afterwards: whatever takes bytes away raises it
//! before it does so, so that a reader that raced an eviction knows, and reads again.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};

use parking_lot::{Mutex, RwLock};

use super::folder::MemberImage;
use super::member::Member;
use crate::cache::bitmap::Bitmap;
use crate::cache::map::{Present, PresentMap};
use crate::cache::shared::Key;
use crate::cache::{
    CacheError, CacheFiles, Completeness, DATA_FILE, HASH_FILE, ImageContent, PRESENT_FILE, Region,
};
use crate::storage::{Storage, is_full};
use crate::verity::{BLOCK_LEN, VerityLayout};
use crate::{Extent, Provisioning};

/// What of an image goes, and comes, together. A chunk at the least.
pub const SEGMENT_BYTES: u64 = 1 << 20;
/// The segment lies nowhere.
pub(super) const NOWHERE: u8 = u8::MAX;
/// The segment is being taken away: nothing is stored in it meanwhile.
pub(super) const LEAVING: u8 = u8::MAX - 1;

/// Set by readers, cleared by the hand.
const USED: u8 = 0x80;
/// How many rounds of the hand a segment survives that was popular and is used no more.
const WARMEST: u8 = 3;

/// A part of an image that lies in one member.
pub(super) struct Segment {
    place: AtomicU8,
    warmth: AtomicU8,
    /// Chunks of it that are being written.
    pub(super) busy: AtomicU8,
    generation: AtomicU32,
}

impl Segment {
    fn new(place: u8) -> Self {
        Self {
            place: AtomicU8::new(place),
            warmth: AtomicU8::new(1),
            busy: AtomicU8::new(0),
            generation: AtomicU32::new(0),
        }
    }

    pub(super) fn place(&self) -> u8 {
        self.place.load(Ordering::Acquire)
    }

    pub(super) fn set_place(&self, place: u8) {
        self.place.store(place, Ordering::Release);
    }

    pub(super) fn begin_life(&self, place: u8) {
        self.warmth.store(1, Ordering::Relaxed);
        self.set_place(place);
    }

    /// What was read before is no longer there.
    pub(super) fn age(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
    }

    pub(super) fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    fn touch(&self) {
        if self.warmth.load(Ordering::Relaxed) & USED == 0 {
            self.warmth.fetch_or(USED, Ordering::Relaxed);
        }
    }

    /// The hand passes: whether the segment has cooled down. Use since its last passing warms it, disuse cools it.
    pub(super) fn has_cooled(&self) -> bool {
        let warmth = self.warmth.load(Ordering::Relaxed);
        let (used, degree) = (warmth & USED != 0, warmth & !USED);
        if used {
            self.warmth.store((degree + 1).min(WARMEST), Ordering::Relaxed);
        } else if degree > 0 {
            self.warmth.store(degree - 1, Ordering::Relaxed);
        }
        !used && degree == 0
    }
}

/// One of the two regions.
pub(super) struct Half {
    /// In a file and checked since the image was opened.
    pub(super) ready: Bitmap,
    pub(super) bits: u64,
    /// Chunks or hash blocks in a segment.
    pub(super) unit: u64,
    pub(super) segments: Box<[Segment]>,
}

impl Half {
    fn new(bits: u64, unit: u64, place: u8) -> Self {
        Self {
            ready: Bitmap::new(bits, false),
            bits,
            unit,
            segments: (0..bits.div_ceil(unit)).map(|_| Segment::new(place)).collect(),
        }
    }

    /// The first and the last bit of a segment.
    pub(super) fn bits_of(&self, segment: usize) -> (u64, u64) {
        let first = segment as u64 * self.unit;
        (first, (first + self.unit).min(self.bits) - 1)
    }
}

/// What one member has of an image.
pub(in crate::cache) struct Part {
    pub(in crate::cache) member: Arc<Member>,
    data: Arc<dyn Storage>,
    hash: Arc<dyn Storage>,
    pub(super) present_data: Bitmap,
    pub(super) present_hash: Bitmap,
    /// The lock keeps the words of the file in order.
    map: Mutex<Option<PresentMap>>,
    /// Of the map's file.
    pub(super) map_bytes: u64,
}

impl Part {
    pub(in crate::cache) fn storage(&self, region: Region) -> &Arc<dyn Storage> {
        match region {
            Region::Data => &self.data,
            Region::Hash => &self.hash,
        }
    }

    pub(super) fn present(&self, region: Region) -> &Bitmap {
        match region {
            Region::Data => &self.present_data,
            Region::Hash => &self.present_hash,
        }
    }

    /// Tells the file about a bit. One that cannot be written costs a fetch after the next start, nothing now.
    pub(super) fn note(&self, region: Region, bit: u64) {
        if let Some(map) = &*self.map.lock() {
            let _only_a_hint = map.write(region, self.present(region), bit);
        }
    }

    /// Gives back the space of bits that were cleared, after the map says so. Blocks.
    ///
    /// # Errors
    /// The operating system's.
    pub(super) fn forget(
        &self,
        holding: &Holding,
        region: Region,
        first: u64,
        last: u64,
    ) -> std::io::Result<()> {
        if let Some(map) = &*self.map.lock() {
            // A word of the map holds 64 bits.
            for word in first / 64..=last / 64 {
                match map.write(region, self.present(region), word * 64) {
                    // A file system that copies on write; the bit is a hint only.
                    Err(error) if is_full(&error) => {}
                    other => other?,
                }
            }
        }
        let (offset, _) = holding.span(Key { region, index: first });
        let (end, bytes) = holding.span(Key { region, index: last });
        match self
            .storage(region)
            .punch(offset, end + u64::from(bytes) - offset)
        {
            Err(error) if error.kind() == std::io::ErrorKind::Unsupported => Ok(()),
            other => other,
        }
    }

    /// Gives back the space of what no bit tells of: a process that was killed between a write and its bit, or between a bit and its hole.
    pub(super) fn sweep(&self, holding: &Holding) -> std::io::Result<()> {
        for (region, bitmap) in [
            (Region::Data, &self.present_data),
            (Region::Hash, &self.present_hash),
        ] {
            let storage = self.storage(region);
            let (_, unit) = holding.span(Key { region, index: 0 });
            if storage.allocated_bytes()? <= bitmap.count() * u64::from(unit) {
                continue;
            }
            let end = storage.len()?;
            let mut at = 0;
            while at < end {
                let Extent { bytes, state } = storage.extent(at, end - at)?;
                if state == Provisioning::Mapped {
                    let (first, last) = (at / u64::from(unit), (at + bytes - 1) / u64::from(unit));
                    for index in (first..=last).filter(|&index| !bitmap.get(index)) {
                        let _what_cannot_be_punched_stays =
                            storage.punch(index * u64::from(unit), u64::from(unit));
                    }
                }
                at += bytes.max(1);
            }
        }
        Ok(())
    }
}

/// Where a chunk or hash block is, at one moment.
pub(in crate::cache) struct Located {
    pub(in crate::cache) part: Arc<Part>,
    pub(super) generation: u32,
}

/// What the group holds of one image.
pub(in crate::cache) struct Holding {
    pub(in crate::cache) content: ImageContent,
    pub(in crate::cache) layout: VerityLayout,
    data: Half,
    hash: Half,
    /// By the members' numbers. Read for the time of a read that does not wait.
    pub(super) slots: RwLock<Vec<Option<Arc<Part>>>>,
    /// One part is made at a time, and none once `gone` is set.
    pub(super) making: Mutex<()>,
    pub(super) gone: AtomicBool,
    pub(super) users: AtomicUsize,
    /// Bytes of data that are there.
    pub(in crate::cache) cached: AtomicU64,
    /// Since the last look.
    pub(super) read: AtomicBool,
    pub(super) last_use_ms: AtomicU64,
}

impl Holding {
    /// Nothing yet.
    pub(super) fn new(content: ImageContent) -> Self {
        let unit = (SEGMENT_BYTES / u64::from(content.chunk_bytes)).max(1);
        Self::with_units(content, unit, NOWHERE)
    }

    /// All that it ever has lies in member 0, as one segment.
    pub(super) fn solitary(content: ImageContent, part: Part) -> Self {
        let holding = Self::with_units(content, content.chunks(), 0);
        let present = part.present_data.count();
        holding
            .cached
            .store(holding.bytes_of(&part.present_data, present), Ordering::Relaxed);
        holding.slots.write().push(Some(Arc::new(part)));
        holding
    }

    fn with_units(content: ImageContent, unit: u64, place: u8) -> Self {
        let layout = VerityLayout::new(content.bytes);
        Self {
            data: Half::new(content.chunks(), unit, place),
            // The hash tree stays together: it is small, and nothing is read without it.
            hash: Half::new(layout.hash_blocks(), layout.hash_blocks(), place),
            content,
            layout,
            slots: RwLock::default(),
            making: Mutex::new(()),
            gone: AtomicBool::new(false),
            users: AtomicUsize::new(0),
            cached: AtomicU64::new(0),
            read: AtomicBool::new(false),
            last_use_ms: AtomicU64::new(0),
        }
    }

    /// Bytes of a part's map.
    pub(super) fn map_bytes(&self) -> u64 {
        PresentMap::bytes_for(&self.content, &self.layout)
    }

    /// Bytes of data that `count` set bits stand for.
    pub(super) fn bytes_of(&self, present: &Bitmap, count: u64) -> u64 {
        let last = Key::data(self.content.chunks() - 1);
        let chunk = u64::from(self.content.chunk_bytes);
        let missing = match present.get(last.index) {
            true => chunk - u64::from(self.span(last).1),
            false => 0,
        };
        count * chunk - missing
    }

    pub(super) fn half(&self, region: Region) -> &Half {
        match region {
            Region::Data => &self.data,
            Region::Hash => &self.hash,
        }
    }

    pub(super) fn segment(&self, key: Key) -> &Segment {
        let half = self.half(key.region);
        &half.segments[(key.index / half.unit) as usize]
    }

    /// Where on its device, in bytes, and how long.
    pub(in crate::cache) fn span(&self, key: Key) -> (u64, u32) {
        match key.region {
            Region::Data => {
                let chunk = u64::from(self.content.chunk_bytes);
                let offset = key.index * chunk;
                (offset, (self.content.bytes - offset).min(chunk) as u32)
            }
            Region::Hash => (key.index * BLOCK_LEN as u64, BLOCK_LEN as u32),
        }
    }

    pub(in crate::cache) fn is_ready(&self, key: Key) -> bool {
        self.half(key.region).ready.get(key.index)
    }

    pub(super) fn part(&self, number: u8) -> Option<Arc<Part>> {
        self.slots.read().get(usize::from(number))?.clone()
    }

    /// Where a key is, if it is anywhere.
    pub(in crate::cache) fn locate(&self, key: Key) -> Option<Located> {
        let segment = self.segment(key);
        let generation = segment.generation.load(Ordering::Acquire);
        let part = self.part(segment.place())?;
        part.present(key.region)
            .get(key.index)
            .then_some(Located { part, generation })
    }

    /// Whether what was read from there since it was located is what was there.
    pub(in crate::cache) fn is_still(&self, key: Key, located: &Located) -> bool {
        // The read before is not moved after the look.
        fence(Ordering::Acquire);
        self.segment(key).generation.load(Ordering::Relaxed) == located.generation
    }

    /// A reader found it.
    pub(in crate::cache) fn touch(&self, key: Key, located: &Located) {
        self.segment(key).touch();
        self.note_hits(&located.part.member, 1);
    }

    fn note_hits(&self, member: &Member, hits: u64) {
        member.hits.fetch_add(hits, Ordering::Relaxed);
        if !self.read.load(Ordering::Relaxed) {
            self.read.store(true, Ordering::Relaxed);
        }
    }

    /// Fills `buf` from `offset` on if all of it is ready and can be read without waiting; else its content is unspecified. `unit` is
    /// the bytes of a chunk or hash block.
    pub(in crate::cache) fn read_now(&self, region: Region, unit: u64, offset: u64, buf: &mut [u8]) -> bool {
        let half = self.half(region);
        let end = offset + buf.len() as u64;
        let (first, last) = (offset / unit, (end - 1) / unit);
        let slots = self.slots.read();
        for index in first / half.unit..=last / half.unit {
            let segment = &half.segments[index as usize];
            let (low, high) = half.bits_of(index as usize);
            let (low, high) = (low.max(first), high.min(last));
            let generation = segment.generation.load(Ordering::Acquire);
            if !half.ready.all(low, high) {
                return false;
            }
            let Some(Some(part)) = slots.get(usize::from(segment.place())) else {
                return false;
            };
            let (from, to) = (offset.max(low * unit), end.min((high + 1) * unit));
            let buf = &mut buf[(from - offset) as usize..(to - offset) as usize];
            if !matches!(part.storage(region).try_read_at(from, buf), Ok(Some(()))) {
                return false;
            }
            fence(Ordering::Acquire);
            if segment.generation.load(Ordering::Relaxed) != generation {
                return false;
            }
            segment.touch();
            if region == Region::Data {
                self.note_hits(&part.member, high - low + 1);
            }
        }
        true
    }
}

/// Opens what a member has of an image.
///
/// # Errors
/// [`CacheError`].
pub(super) fn open_part(
    files: CacheFiles,
    content: &ImageContent,
    (data, hash): (Completeness, Completeness),
    member: Arc<Member>,
) -> Result<Part, CacheError> {
    let layout = VerityLayout::new(content.bytes);
    for (storage, completeness, bytes, name) in [
        (&files.data, data, layout.padded_bytes(), DATA_FILE),
        (&files.hash, hash, layout.hash_bytes(), HASH_FILE),
    ] {
        fit(&**storage, completeness, bytes, &files.directory.join(name))?;
    }
    let path = files.directory.join(PRESENT_FILE);
    let (map, present) = match files.present {
        None => (None, None),
        Some(storage) => match PresentMap::open(storage, &path, content, &layout) {
            Ok((map, present)) => (Some(map), Some(present)),
            // A cache without room is still a cache in memory.
            Err(CacheError::Io { source, .. }) if is_full(&source) => (None, None),
            Err(error) => return Err(error),
        },
    };
    let present = present.unwrap_or_else(|| Present {
        data: Bitmap::new(content.chunks(), false),
        hash: Bitmap::new(layout.hash_blocks(), false),
    });
    let or_all = |completeness, bits, partial| match completeness {
        Completeness::All => Bitmap::new(bits, true),
        Completeness::Partial => partial,
    };
    Ok(Part {
        member,
        data: files.data,
        hash: files.hash,
        present_data: or_all(data, content.chunks(), present.data),
        present_hash: or_all(hash, layout.hash_blocks(), present.hash),
        map_bytes: map.as_ref().map_or(0, PresentMap::bytes),
        map: Mutex::new(map),
    })
}

fn fit(storage: &dyn Storage, completeness: Completeness, bytes: u64, path: &Path) -> Result<(), CacheError> {
    let io = |source| CacheError::Io {
        path: path.into(),
        source,
    };
    let found = storage.len().map_err(io)?;
    match completeness {
        Completeness::All if found < bytes => Err(CacheError::Incomplete {
            path: path.into(),
            found_bytes: found,
            expected_bytes: bytes,
        }),
        Completeness::Partial if found != bytes => storage.set_len(bytes).map_err(io),
        _ => Ok(()),
    }
}

impl MemberImage {
    pub(super) fn into_files(self, directory: &Path) -> CacheFiles {
        CacheFiles {
            directory: directory.into(),
            data: self.data,
            hash: self.hash,
            present: Some(self.present),
        }
    }
}
