//! The cache group: several directories as one budget, shared by the images of a host.
//!
//! Each member is a directory that stands by itself: a folder an image, in the format of the chunk cache, with what of that image lies
//! in it. An image is cut in segments; `holding` says in which member each is, `room` finds room for a chunk and chooses what goes for it.
//! A member whose I/O fails is dropped at once: what it had is fetched again and kept by the others.
//!
//! One lock for the group guards what is where; it is held for look-ups, never for I/O. Hits take no lock of the group.
//!
//! Deliberately absent: copies (a cache's copy is its parent), moving a segment from member to member, time.

mod folder;
mod holding;
mod member;
mod members;
mod report;
mod room;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use treeboot_types::Digest;

use super::shared::Key;
use super::{CacheError, CacheFiles, CacheOptions, Completeness, ImageContent, Region};
use crate::verity::VerityLayout;
use holding::{LEAVING, NOWHERE, open_part};
use member::Member;

pub use folder::{Folder, MemberFiles, MemberImage, MemberRoom};
pub use holding::SEGMENT_BYTES;
pub(super) use holding::{Holding, Located, Part};
pub use member::MemberSpec;
pub use report::{GroupReport, ImageReport, MemberReport, MemberState};

/// Members of one group. Their numbers stand in a byte for each segment.
pub const MAX_MEMBERS: usize = 64;

/// Why the group does not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum GroupError {
    /// The directory.
    #[error("the directory '{path}' cannot be a member of the cache group")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// It is one already.
    #[error("'{path}' is a member of the cache group already; to change its budget remove it first")]
    Exists {
        /// The directory.
        path: PathBuf,
    },
    /// It is none.
    #[error("'{path}' is no member of the cache group; 'treeboot cache show' names them")]
    NoMember {
        /// The directory.
        path: PathBuf,
    },
    /// There are enough.
    #[error("the cache group has {MAX_MEMBERS} members, and cannot have more")]
    TooMany,
    /// A pin that is too large.
    #[error(
        "image {digest} needs {need_bytes} bytes and cannot be pinned: the cache group may hold {capacity_bytes}, of which {pinned_bytes} are pinned \
         for others; add a directory, or unpin another image"
    )]
    PinTooLarge {
        /// The image.
        digest: Digest,
        /// All of it, and its hash tree.
        need_bytes: u64,
        /// Of the group.
        capacity_bytes: u64,
        /// By other pins.
        pinned_bytes: u64,
    },
    /// Pinned content is not dropped.
    #[error("image {digest} is pinned; unpin it first")]
    Pinned {
        /// The image.
        digest: Digest,
    },
    /// The group knows nothing of it.
    #[error("the cache group holds nothing of image {digest}")]
    Unknown {
        /// The image.
        digest: Digest,
    },
}

/// See the module.
pub struct CacheGroup {
    /// One image's directory with everything in it, as a store has it: nothing is evicted, and nobody drops it.
    solitary: bool,
    state: Mutex<State>,
    /// One image is opened at a time.
    opening: Mutex<()>,
    pub(super) misses: AtomicU64,
    /// Of members that are gone.
    past_hits: AtomicU64,
    evictions: AtomicU64,
    evicted_bytes: AtomicU64,
}

struct State {
    members: Vec<Option<Arc<Member>>>,
    holdings: Vec<Arc<Holding>>,
    /// Where the next victim is looked for: which holding, and which segment of it.
    hand: (usize, usize),
    /// The bytes that each pinned image needs.
    pins: BTreeMap<Digest, u64>,
}

/// A holding in use. Until it is dropped its content is not evicted before that of images that nobody uses.
pub(in crate::cache) struct Held {
    holding: Arc<Holding>,
}

impl Held {
    fn new(holding: Arc<Holding>) -> Self {
        holding.users.fetch_add(1, Ordering::Relaxed);
        holding.read.store(true, Ordering::Relaxed);
        Self { holding }
    }
}

impl Deref for Held {
    type Target = Arc<Holding>;
    fn deref(&self) -> &Self::Target {
        &self.holding
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.holding.users.fetch_sub(1, Ordering::Relaxed);
    }
}

impl CacheGroup {
    fn empty(solitary: bool, pins: BTreeMap<Digest, u64>) -> Self {
        Self {
            solitary,
            state: Mutex::new(State {
                members: Vec::new(),
                holdings: Vec::new(),
                hand: (0, 0),
                pins,
            }),
            opening: Mutex::new(()),
            misses: AtomicU64::new(0),
            past_hits: AtomicU64::new(0),
            evictions: AtomicU64::new(0),
            evicted_bytes: AtomicU64::new(0),
        }
    }

    /// Opens the directories, and finds what is in them. One that cannot be used is a member that failed. `pins` are the pinned images and
    /// the bytes that each needs. Blocks.
    ///
    /// # Errors
    /// None of them can be used.
    pub fn open(members: &[MemberSpec], pins: BTreeMap<Digest, u64>) -> Result<Arc<Self>, GroupError> {
        let group = Arc::new(Self::empty(false, pins));
        let mut first_error = None;
        for spec in members {
            let error = match group.add(spec.clone()) {
                Ok(()) => continue,
                Err(error) => error,
            };
            tracing::error!(path = %spec.path.display(), error = %chain(&error), "a directory of the cache group cannot be used; the others are");
            if let Ok(number) = group.free_number() {
                let member = Member::new(number, spec.clone(), None);
                member.fail(chain(&error));
                group.seat(Arc::new(member));
            }
            first_error.get_or_insert(error);
        }
        let works = group
            .state
            .lock()
            .members
            .iter()
            .flatten()
            .any(|member| member.is_working());
        match first_error {
            Some(error) if !works => Err(error),
            _ => Ok(group),
        }
    }

    /// A group of one image's files.
    pub(super) fn solitary(
        files: CacheFiles,
        content: ImageContent,
        options: &CacheOptions,
    ) -> Result<(Arc<Self>, Held), CacheError> {
        let spec = MemberSpec {
            path: files.directory.clone(),
            budget: None,
        };
        let member = Arc::new(Member::new(0, spec, None));
        let part = open_part(files, &content, (options.data, options.hash), Arc::clone(&member))?;
        let holding = Arc::new(Holding::solitary(content, part));
        let group = Self::empty(true, BTreeMap::new());
        group.seat(member);
        Ok((Arc::new(group), Held::new(holding)))
    }

    /// What the group holds of an image, and what it will. Blocks.
    ///
    /// # Errors
    /// [`CacheError`]: what lies there is another's or another process's.
    pub(super) fn hold(&self, content: ImageContent) -> Result<Held, CacheError> {
        let _one_at_a_time = self.opening.lock();
        let found = self.find(&content.digest);
        let holding = match found {
            Some(holding) if holding.content == content => holding,
            Some(_) => {
                return Err(CacheError::OtherImage {
                    path: PathBuf::from(content.digest.to_string()),
                    expected: content,
                });
            }
            None => self.assemble(content)?,
        };
        Ok(Held::new(holding))
    }

    fn find(&self, digest: &Digest) -> Option<Arc<Holding>> {
        let state = self.state.lock();
        let found = state
            .holdings
            .iter()
            .find(|holding| holding.content.digest == *digest);
        found.cloned()
    }

    fn members(&self) -> Vec<Arc<Member>> {
        let state = self.state.lock();
        let working = state
            .members
            .iter()
            .flatten()
            .filter(|member| member.is_working());
        working.cloned().collect()
    }

    /// Puts together what the members have of an image.
    fn assemble(&self, content: ImageContent) -> Result<Arc<Holding>, CacheError> {
        let holding = Arc::new(Holding::new(content));
        let mut last_use = 0;
        let mut parts = vec![];
        for member in self.members() {
            match open_image(&member, &content, false) {
                Ok(Some(part)) => {
                    let files = member.files.as_ref();
                    last_use = last_use.max(files.map_or(0, |files| files.last_use(&content.digest)));
                    parts.push(Arc::new(part));
                }
                Ok(None) => {}
                Err(CacheError::Io { path, source }) => {
                    self.fail(
                        &member,
                        &format!("'{}' cannot be opened: {source}", path.display()),
                    );
                }
                Err(error) => return Err(error),
            }
        }
        holding.last_use_ms.store(last_use, Ordering::Relaxed);
        self.state.lock().holdings.push(Arc::clone(&holding));
        parts.into_iter().for_each(|part| self.adopt(&holding, part));
        self.trim();
        Ok(holding)
    }

    /// Takes what a member has of an image; what another has already goes. Blocks.
    fn adopt(&self, holding: &Arc<Holding>, part: Arc<Part>) {
        let number = part.member.number;
        let mut doubled = vec![];
        {
            let state = self.state.lock();
            let seated = state.members.get(usize::from(number)).and_then(Option::as_ref);
            if !part.member.is_working() || !seated.is_some_and(|member| Arc::ptr_eq(member, &part.member)) {
                return;
            }
            for region in [Region::Data, Region::Hash] {
                let half = holding.half(region);
                let mut bytes = 0;
                for (index, segment) in half.segments.iter().enumerate() {
                    let (first, last) = half.bits_of(index);
                    if part.present(region).count_range(first, last) == 0 {
                        continue;
                    }
                    if segment.place() != NOWHERE {
                        part.present(region).clear_range(first, last, |_| ());
                        doubled.push((region, first, last));
                        continue;
                    }
                    for index in (first..=last).filter(|&index| part.present(region).get(index)) {
                        bytes += u64::from(holding.span(Key { region, index }).1);
                    }
                    segment.begin_life(number);
                }
                part.member.take(bytes);
                if region == Region::Data {
                    holding.cached.fetch_add(bytes, Ordering::Relaxed);
                }
            }
            part.member.take(part.map_bytes);
            let mut slots = holding.slots.write();
            let slot = usize::from(number);
            if slots.len() <= slot {
                slots.resize(slot + 1, None);
            }
            slots[slot] = Some(Arc::clone(&part));
        }
        let tidied = doubled
            .into_iter()
            .try_for_each(|(region, first, last)| part.forget(holding, region, first, last))
            .and_then(|()| part.sweep(holding));
        if let Err(error) = tidied {
            self.fail(&part.member, &format!("it cannot be tidied: {error}"));
        }
    }

    /// What was read at `located` is right: it need not be checked again.
    pub(super) fn confirm(&self, holding: &Holding, key: Key, located: &Located) {
        let _state = self.state.lock();
        if holding.is_still(key, located) {
            holding.half(key.region).ready.set(key.index);
        }
    }

    /// What was read at `located` is wrong: it is forgotten. `false` where it had gone before. Its bit in the map's file stays until the chunk
    /// is stored anew: it is a hint.
    pub(super) fn damaged(&self, holding: &Holding, key: Key, located: &Located) -> bool {
        let _state = self.state.lock();
        if !holding.is_still(key, located) {
            return false;
        }
        holding.half(key.region).ready.clear(key.index);
        if !located.part.present(key.region).clear(key.index) {
            return false;
        }
        let bytes = u64::from(holding.span(key).1);
        if key.region == Region::Data {
            holding.cached.fetch_sub(bytes, Ordering::Relaxed);
        }
        if !self.solitary {
            located.part.member.give_back(bytes);
        }
        true
    }

    /// What is at `located` cannot be read: its member is dropped. `true` where it is not, and the chunk alone is damaged.
    pub(super) fn read_failed(
        &self,
        holding: &Holding,
        key: Key,
        located: &Located,
        error: &dyn std::error::Error,
    ) -> bool {
        if self.solitary {
            return self.damaged(holding, key, located);
        }
        self.fail(
            &located.part.member,
            &format!("it cannot be read: {}", chain(error)),
        );
        false
    }

    /// A free number of a member.
    fn free_number(&self) -> Result<u8, GroupError> {
        let state = self.state.lock();
        let free = (0..MAX_MEMBERS).find(|&number| state.members.get(number).is_none_or(Option::is_none));
        free.and_then(|number| u8::try_from(number).ok())
            .ok_or(GroupError::TooMany)
    }

    fn seat(&self, member: Arc<Member>) {
        let mut state = self.state.lock();
        let number = usize::from(member.number);
        if state.members.len() <= number {
            state.members.resize(number + 1, None);
        }
        state.members[number] = Some(member);
    }

    /// Keeps an image of `bytes` bytes: none of it goes for others, from now on. It is not brought in.
    ///
    /// # Errors
    /// There would not be room for all of it.
    pub fn pin(&self, digest: &Digest, bytes: u64) -> Result<(), GroupError> {
        let need_bytes = bytes.saturating_add(VerityLayout::new(bytes).hash_bytes());
        let capacity_bytes = self.capacity();
        let mut state = self.state.lock();
        let others = state.pins.iter().filter(|(other, _)| *other != digest);
        let pinned_bytes = others.map(|(_, bytes)| bytes).sum::<u64>();
        if pinned_bytes.saturating_add(need_bytes) > capacity_bytes {
            return Err(GroupError::PinTooLarge {
                digest: *digest,
                need_bytes,
                capacity_bytes,
                pinned_bytes,
            });
        }
        state.pins.insert(*digest, need_bytes);
        Ok(())
    }

    /// Whether it was pinned.
    pub fn unpin(&self, digest: &Digest) -> bool {
        self.state.lock().pins.remove(digest).is_some()
    }

    /// The pinned images, and the bytes that each needs.
    pub fn pins(&self) -> BTreeMap<Digest, u64> {
        self.state.lock().pins.clone()
    }

    /// Gives up what the group holds of an image, but for its hash tree while it is in use; what is read later is fetched again. Returns
    /// how many bytes went. Blocks.
    ///
    /// # Errors
    /// It is pinned, or nothing is known of it.
    pub fn drop_image(&self, digest: &Digest) -> Result<u64, GroupError> {
        let holding = self.find(digest).ok_or(GroupError::Unknown { digest: *digest })?;
        if self.state.lock().pins.contains_key(digest) {
            return Err(GroupError::Pinned { digest: *digest });
        }
        let regions = match holding.users.load(Ordering::Relaxed) {
            0 => &[Region::Data, Region::Hash][..],
            _ => &[Region::Data],
        };
        let before = holding.cached.load(Ordering::Relaxed);
        for &region in regions {
            for segment in 0..holding.half(region).segments.len() {
                let victim = self.state.lock().begin_eviction(&holding, region, segment, None);
                victim.into_iter().for_each(|victim| self.evict(victim));
            }
        }
        Ok(before)
    }

    /// Removes all files of an image that nobody uses. Blocks.
    ///
    /// # Errors
    /// The operating system's, with the directory.
    pub fn forget(&self, digest: &Digest) -> Result<(), GroupError> {
        let _one_at_a_time = self.opening.lock();
        if let Some(holding) = self.find(digest) {
            let _none_is_made = holding.making.lock();
            holding.gone.store(true, Ordering::Relaxed);
            self.let_go(&holding);
        }
        for member in self.members() {
            let removed = member.files.as_ref().map_or(Ok(()), |files| files.remove(digest));
            if let Err(source) = removed {
                return Err(GroupError::Directory {
                    path: member.spec.path.clone(),
                    source,
                });
            }
        }
        Ok(())
    }

    fn let_go(&self, holding: &Arc<Holding>) {
        let mut state = self.state.lock();
        for region in [Region::Data, Region::Hash] {
            let half = holding.half(region);
            for (index, segment) in half
                .segments
                .iter()
                .enumerate()
                .filter(|(_, segment)| segment.place() < LEAVING)
            {
                let (first, last) = half.bits_of(index);
                half.ready.clear_range(first, last, |_| ());
                if let Some(part) = holding.part(segment.place()) {
                    part.present(region).clear_range(first, last, |index| {
                        part.member
                            .give_back(u64::from(holding.span(Key { region, index }).1));
                    });
                }
                segment.set_place(NOWHERE);
                segment.age();
            }
        }
        let parts: Vec<_> = holding.slots.write().drain(..).flatten().collect();
        for part in parts.iter().filter(|part| part.member.is_working()) {
            part.member.give_back(part.map_bytes);
        }
        holding.cached.store(0, Ordering::Relaxed);
        state.holdings.retain(|held| !Arc::ptr_eq(held, holding));
        state.hand = (0, 0);
    }
}

/// Opens what a member has of an image.
fn open_image(
    member: &Arc<Member>,
    content: &ImageContent,
    create: bool,
) -> Result<Option<Part>, CacheError> {
    let Some(files) = &member.files else {
        return Ok(None);
    };
    let directory = files.path().join(content.digest.to_string());
    let opened = files
        .open(&content.digest, create)
        .map_err(|source| match source.kind() {
            io::ErrorKind::WouldBlock => CacheError::InUse {
                path: directory.clone(),
            },
            _ => CacheError::Io {
                path: directory.clone(),
                source,
            },
        })?;
    let partial = (Completeness::Partial, Completeness::Partial);
    let part =
        opened.map(|image| open_part(image.into_files(&directory), content, partial, Arc::clone(member)));
    part.transpose()
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
