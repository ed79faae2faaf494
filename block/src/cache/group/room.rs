//! Room for a chunk: which member gets it, and what goes for it.
//!
//! The hand is a generalised CLOCK: it goes round all segments of images in use, and a segment goes that cooled down ([`Segment::has_cooled`]).
//! Images that nobody uses go before all others, the one that was used longest ago first.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::holding::{Holding, LEAVING, NOWHERE, Part};
use super::member::Member;
use super::{CacheGroup, State};
use crate::cache::shared::Key;
use crate::cache::{CacheError, Region};
use crate::storage::is_full;

/// How often a chunk is tried in another member, or after more was evicted, before it is passed through.
const STORE_TRIES: usize = 8;
/// How many segments may go for one chunk: of those that hold a single chunk each, as many as a segment has, and then some, because others
/// take the room too.
const EVICTIONS: usize = 64;

/// Room that is taken for a chunk.
struct Claim {
    part: Arc<Part>,
    generation: u32,
    /// Bytes.
    length: u64,
}

/// A segment that goes: its bits are cleared already, its bytes are not.
pub(super) struct Victim {
    holding: Arc<Holding>,
    part: Arc<Part>,
    region: Region,
    segment: usize,
    bytes: u64,
}

enum Found {
    Room(Claim),
    /// The part is still to be made.
    Make(Arc<Member>),
    Evict(Victim),
    /// The segment is being taken away.
    Passing,
}

impl State {
    /// Takes a segment's bits, if it lies somewhere (in `only`) and nobody writes to it.
    pub(super) fn begin_eviction(
        &self,
        holding: &Arc<Holding>,
        region: Region,
        segment: usize,
        only: Option<u8>,
    ) -> Option<Victim> {
        let half = holding.half(region);
        let found = &half.segments[segment];
        let place = found.place();
        if place >= LEAVING
            || only.is_some_and(|only| only != place)
            || found.busy.load(Ordering::Relaxed) > 0
        {
            return None;
        }
        let part = holding.part(place)?;
        let (first, last) = half.bits_of(segment);
        half.ready.clear_range(first, last, |_| ());
        let mut bytes = 0;
        part.present(region).clear_range(first, last, |index| {
            bytes += u64::from(holding.span(Key { region, index }).1);
        });
        if region == Region::Data {
            holding.cached.fetch_sub(bytes, Ordering::Relaxed);
        }
        found.set_place(LEAVING);
        found.age();
        Some(Victim {
            holding: Arc::clone(holding),
            part,
            region,
            segment,
            bytes,
        })
    }

    /// What goes next, of member `only` where one is named.
    pub(super) fn next_victim(&mut self, only: Option<u8>) -> Option<Victim> {
        let pinned = |holding: &Holding| self.pins.contains_key(&holding.content.digest);
        let mut cold: Vec<_> = self
            .holdings
            .iter()
            .filter(|holding| holding.users.load(Ordering::Relaxed) == 0 && !pinned(holding))
            .collect();
        cold.sort_by_key(|holding| holding.last_use_ms.load(Ordering::Relaxed));
        for holding in cold {
            for region in [Region::Data, Region::Hash] {
                let segments = holding.half(region).segments.len();
                let found =
                    (0..segments).find_map(|segment| self.begin_eviction(holding, region, segment, only));
                if found.is_some() {
                    return found;
                }
            }
        }
        let segments: usize = self
            .holdings
            .iter()
            .map(|holding| holding.half(Region::Data).segments.len())
            .sum();
        // Each round cools what is not used; the warmest takes four.
        for _ in 0..segments.saturating_mul(5) {
            let (which, segment) = self.hand;
            let holding = self.holdings.get(which)?;
            self.hand = match segment + 1 < holding.half(Region::Data).segments.len() {
                true => (which, segment + 1),
                false => ((which + 1) % self.holdings.len(), 0),
            };
            let found = holding.half(Region::Data).segments.get(segment);
            let Some(found) = found.filter(|found| found.place() < LEAVING) else {
                continue;
            };
            if !pinned(holding)
                && only.is_none_or(|only| only == found.place())
                && found.has_cooled()
                && let Some(victim) = self.begin_eviction(holding, Region::Data, segment, only)
            {
                return Some(victim);
            }
        }
        None
    }

    /// The working member with the most room.
    fn roomiest(&self) -> Option<&Arc<Member>> {
        let working = self.members.iter().flatten().filter(|member| member.is_working());
        working.max_by_key(|member| member.free())
    }

    fn find_room(&mut self, holding: &Arc<Holding>, key: Key, length: u64) -> io::Result<Found> {
        let segment = holding.segment(key);
        if holding.gone.load(Ordering::Relaxed) || segment.place() == LEAVING {
            return Ok(Found::Passing);
        }
        let only = (segment.place() != NOWHERE).then(|| segment.place());
        let member = match only {
            Some(number) => self.members.get(usize::from(number)).and_then(Option::as_ref),
            None => self.roomiest(),
        };
        let Some(member) = member else {
            return Err(io::Error::other("no directory of the cache group works"));
        };
        let part = holding.part(member.number);
        let more = match part {
            Some(_) => 0,
            None => holding.map_bytes(),
        };
        if member.free() >= length + more {
            let Some(part) = part else {
                return Ok(Found::Make(Arc::clone(member)));
            };
            member.take(length);
            if only.is_none() {
                segment.begin_life(member.number);
            }
            segment.busy.fetch_add(1, Ordering::Relaxed);
            return Ok(Found::Room(Claim {
                part,
                generation: segment.generation(),
                length,
            }));
        }
        self.next_victim(only).map(Found::Evict).ok_or_else(|| {
            let reason = "what the cache holds is pinned or just being written";
            io::Error::new(io::ErrorKind::StorageFull, reason)
        })
    }
}

impl CacheGroup {
    /// Writes checked bytes to where there is room, then tells the map. Blocks.
    ///
    /// # Errors
    /// There is no room, or the operating system's where there is no other member.
    pub(in crate::cache) fn store(&self, holding: &Arc<Holding>, key: Key, bytes: &[u8]) -> io::Result<()> {
        let mut result = Ok(());
        for _ in 0..STORE_TRIES {
            let Some(claim) = self.claim(holding, key, bytes.len() as u64)? else {
                return Ok(());
            };
            result = write(holding, &claim.part, key, bytes);
            self.conclude(holding, key, &claim, result.is_ok());
            match &result {
                Ok(()) => {
                    claim.part.note(key.region, key.index);
                    return Ok(());
                }
                Err(_) if self.solitary => return result,
                Err(error) => self.write_failed(&claim.part.member, error),
            }
        }
        result
    }

    fn write_failed(&self, member: &Arc<Member>, error: &io::Error) {
        match is_full(error) {
            true => self.set_full(member, true),
            false => self.fail(member, &format!("it cannot be written: {error}")),
        }
    }

    /// `None`: the chunk's segment is just being taken away.
    fn claim(&self, holding: &Arc<Holding>, key: Key, length: u64) -> io::Result<Option<Claim>> {
        for _ in 0..EVICTIONS {
            let found = self.state.lock().find_room(holding, key, length)?;
            match found {
                Found::Room(claim) => return Ok(Some(claim)),
                Found::Passing => return Ok(None),
                Found::Make(member) => self.make_part(holding, &member),
                Found::Evict(victim) => self.evict(victim),
            }
        }
        Err(io::ErrorKind::StorageFull.into())
    }

    fn conclude(&self, holding: &Holding, key: Key, claim: &Claim, written: bool) {
        let _state = self.state.lock();
        let segment = holding.segment(key);
        segment.busy.fetch_sub(1, Ordering::Relaxed);
        if segment.generation() != claim.generation {
            // What was taken went with the member, or is still to be given back.
            if claim.part.member.is_working() {
                claim.part.member.give_back(claim.length);
            }
            return;
        }
        if !written || !claim.part.present(key.region).set(key.index) {
            claim.part.member.give_back(claim.length);
        } else if key.region == Region::Data {
            holding.cached.fetch_add(claim.length, Ordering::Relaxed);
        }
        if written {
            holding.half(key.region).ready.set(key.index);
        }
    }

    /// Takes the bytes of a segment whose bits are cleared. Blocks.
    pub(super) fn evict(&self, victim: Victim) {
        let Victim {
            holding,
            part,
            region,
            segment,
            bytes,
        } = victim;
        let (first, last) = holding.half(region).bits_of(segment);
        let result = match part.member.is_working() {
            true => part.forget(&holding, region, first, last),
            false => Ok(()),
        };
        {
            let _state = self.state.lock();
            holding.half(region).segments[segment].set_place(NOWHERE);
            if part.member.is_working() {
                part.member.give_back(bytes);
            }
        }
        self.evictions.fetch_add(1, Ordering::Relaxed);
        self.evicted_bytes.fetch_add(bytes, Ordering::Relaxed);
        if let Err(error) = result {
            self.fail(&part.member, &format!("space cannot be given back: {error}"));
        }
    }

    fn make_part(&self, holding: &Arc<Holding>, member: &Arc<Member>) {
        let _one_at_a_time = holding.making.lock();
        if holding.gone.load(Ordering::Relaxed) || holding.part(member.number).is_some() {
            return;
        }
        let digest = &holding.content.digest;
        let opened = super::open_image(member, &holding.content, true);
        match opened {
            Ok(Some(part)) => {
                // What lies there by accident is not known to be counted.
                self.adopt(holding, Arc::new(part));
            }
            Ok(None) => {}
            Err(CacheError::Io { source, .. }) => self.write_failed(member, &source),
            Err(error) => self.fail(member, &error.to_string()),
        }
        if !member.is_working()
            && let Some(files) = &member.files
        {
            // It was removed meanwhile; nothing is to be left there.
            let _nobody_is_told = files.remove(digest);
        }
    }

    /// Evicts until every member keeps to its budget. Blocks.
    pub(super) fn trim(&self) {
        loop {
            let victim = {
                let mut state = self.state.lock();
                let over = state
                    .members
                    .iter()
                    .flatten()
                    .find(|member| member.is_working() && member.is_over());
                let Some(number) = over.map(|member| member.number) else {
                    return;
                };
                state.next_victim(Some(number))
            };
            match victim {
                Some(victim) => self.evict(victim),
                None => return,
            }
        }
    }
}

fn write(holding: &Holding, part: &Part, key: Key, bytes: &[u8]) -> io::Result<()> {
    let (offset, length) = holding.span(key);
    let storage = part.storage(key.region);
    let zero = key.region == Region::Data && bytes.iter().all(|&byte| byte == 0);
    // Sparse stays sparse; a punch also removes what a damaged chunk has left.
    match zero && storage.punch(offset, u64::from(length)).is_ok() {
        true => Ok(()),
        false => storage.write_at(offset, bytes),
    }
}
