//! Members that come, go and fail while images are in use.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use treeboot_types::Digest;

use super::holding::NOWHERE;
use super::member::Member;
use super::{CacheGroup, Folder, GroupError, MemberFiles, MemberRoom, MemberSpec, open_image};
use crate::cache::map::PresentMap;
use crate::cache::shared::Key;
use crate::cache::{ImageContent, Region};

impl CacheGroup {
    /// Adds a directory, while images are in use; what lies in it is taken. One that failed is tried again. Blocks.
    ///
    /// # Errors
    /// [`GroupError`].
    pub fn add(&self, spec: MemberSpec) -> Result<(), GroupError> {
        let folder =
            Folder::open(&spec.path, spec.budget.is_some()).map_err(|source| GroupError::Directory {
                path: spec.path.clone(),
                source,
            })?;
        self.add_files(spec, Arc::new(folder))
    }

    pub(super) fn add_files(&self, spec: MemberSpec, files: Arc<dyn MemberFiles>) -> Result<(), GroupError> {
        let _one_at_a_time = self.opening.lock();
        let same = self
            .state
            .lock()
            .members
            .iter()
            .flatten()
            .find(|member| member.spec.path == spec.path)
            .cloned();
        if let Some(member) = same {
            if member.is_working() {
                return Err(GroupError::Exists { path: spec.path });
            }
            self.unseat(&member);
        }
        let path = spec.path.clone();
        let directory = |source| GroupError::Directory {
            path: path.clone(),
            source,
        };
        let images = files.images().map_err(directory)?;
        let member = Arc::new(Member::new(self.free_number()?, spec, Some(files)));
        self.seat(Arc::clone(&member));
        for digest in images {
            self.take_in(&member, &digest);
        }
        self.trim();
        match member.failure() {
            None => Ok(()),
            Some(why) => Err(directory(io::Error::other(why.to_owned()))),
        }
    }

    /// Takes what a new member has of an image.
    fn take_in(&self, member: &Arc<Member>, digest: &Digest) {
        let content = match self.find(digest) {
            Some(holding) => holding.content,
            None => match content_of(member, digest) {
                Ok(Some(content)) => content,
                // Another process's, or not of this format: whoever opens that image will say so.
                Ok(None) => return,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => return self.fail(member, &format!("it cannot be read: {error}")),
            },
        };
        let taken = match self.find(digest) {
            None => self.assemble(content).map(|_| ()),
            Some(holding) => {
                let _one_at_a_time = holding.making.lock();
                let part = open_image(member, &content, false);
                part.map(|part| {
                    part.into_iter()
                        .for_each(|part| self.adopt(&holding, Arc::new(part)))
                })
            }
        };
        if let Err(error) = taken {
            tracing::warn!(path = %member.spec.path.display(), image = %digest.short(), %error, "what lies here of an image is not used");
        }
    }

    /// Forgets a directory, while images are in use. Its files are removed, or kept for whoever adds it again. Blocks.
    ///
    /// # Errors
    /// It is no member.
    pub fn remove(&self, path: &Path, keep: bool) -> Result<(), GroupError> {
        let member = {
            let state = self.state.lock();
            let found = state
                .members
                .iter()
                .flatten()
                .find(|member| member.spec.path == path);
            found
                .cloned()
                .ok_or_else(|| GroupError::NoMember { path: path.into() })?
        };
        let worked = member.fail("it was removed".into());
        self.forget_member(&member);
        self.unseat(&member);
        if let (true, false, Some(files)) = (worked, keep, &member.files) {
            let removed = files
                .images()
                .and_then(|images| images.iter().try_for_each(|digest| files.remove(digest)));
            if let Err(error) = removed {
                tracing::warn!(path = %path.display(), %error, "the files of a directory that left the cache group are not all removed");
            }
        }
        Ok(())
    }

    fn unseat(&self, member: &Arc<Member>) {
        self.past_hits
            .fetch_add(member.hits.swap(0, Ordering::Relaxed), Ordering::Relaxed);
        let mut state = self.state.lock();
        for seat in &mut state.members {
            if seat.as_ref().is_some_and(|seated| Arc::ptr_eq(seated, member)) {
                *seat = None;
            }
        }
    }

    /// Drops a member whose I/O failed.
    pub(super) fn fail(&self, member: &Arc<Member>, why: &str) {
        if self.solitary || !member.fail(why.to_owned()) {
            return;
        }
        let lost_bytes = self.forget_member(member);
        tracing::error!(
            path = %member.spec.path.display(), why, lost_bytes,
            "a directory of the cache group is dropped; what it had is fetched again; 'treeboot cache add' takes it back once it works"
        );
    }

    /// Clears all that is said to lie in a member. Returns how many bytes that were.
    fn forget_member(&self, member: &Member) -> u64 {
        let state = self.state.lock();
        for holding in &state.holdings {
            let Some(part) = holding.part(member.number) else {
                continue;
            };
            let mut lost = 0;
            for region in [Region::Data, Region::Hash] {
                let half = holding.half(region);
                for (index, segment) in half.segments.iter().enumerate() {
                    if segment.place() != member.number {
                        continue;
                    }
                    let (first, last) = half.bits_of(index);
                    half.ready.clear_range(first, last, |_| ());
                    segment.set_place(NOWHERE);
                    segment.age();
                    if region == Region::Data {
                        let present = (first..=last).filter(|&index| part.present_data.get(index));
                        lost += present
                            .map(|index| u64::from(holding.span(Key::data(index)).1))
                            .sum::<u64>();
                    }
                }
            }
            holding.cached.fetch_sub(lost, Ordering::Relaxed);
            if let Some(slot) = holding.slots.write().get_mut(usize::from(member.number)) {
                *slot = None;
            }
        }
        let bytes = member.used();
        member.forget_all();
        bytes
    }

    pub(super) fn set_full(&self, member: &Member, full: bool) {
        let news = {
            let _state = self.state.lock();
            member.set_full(full)
        };
        let path = member.spec.path.display();
        match (news, full) {
            (false, _) => {}
            (true, true) => tracing::warn!(
                %path, used_bytes = member.used(),
                "the file system of a directory of the cache group is full; the directory does not grow, and what is new takes the place of what is old"
            ),
            (true, false) => tracing::info!(%path, "there is room for the cache again"),
        }
    }

    /// A look at the members from time to time: one that is gone is dropped, one without a budget whose file system is full by `is_full` does not
    /// grow until it is not. `unix_ms` is the time of whatever was read since the last look. Blocks.
    pub fn look(&self, unix_ms: u64, is_full: impl Fn(MemberRoom) -> bool) {
        for member in self.members() {
            match member.files.as_ref().map(|files| files.room()) {
                None => {}
                Some(Ok(room)) if !is_full(room) => self.set_full(&member, false),
                // A budget is a word about the others that use the file system; without one they come first.
                Some(Ok(_)) if member.spec.budget.is_none() => self.set_full(&member, true),
                Some(Ok(_)) => {}
                Some(Err(error)) => self.fail(&member, &format!("it is gone: {error}")),
            }
        }
        let holdings = self.state.lock().holdings.clone();
        for holding in holdings {
            if holding.read.swap(false, Ordering::Relaxed) {
                holding.last_use_ms.store(unix_ms, Ordering::Relaxed);
                for member in self.members() {
                    if holding.part(member.number).is_some()
                        && let Some(files) = &member.files
                    {
                        files.note_use(&holding.content.digest, unix_ms);
                    }
                }
            }
        }
    }

    /// What the members may hold together.
    pub(super) fn capacity(&self) -> u64 {
        let each = self.members().into_iter().map(|member| {
            let room = member.files.as_ref().and_then(|files| files.room().ok());
            let most = room.map_or(u64::MAX, |room| member.used().saturating_add(room.free_bytes));
            member.spec.budget.unwrap_or(most)
        });
        each.fold(0, u64::saturating_add)
    }
}

/// Which image a member's folder is of; `None` where that is not known.
fn content_of(member: &Member, digest: &Digest) -> io::Result<Option<ImageContent>> {
    let opened = member
        .files
        .as_ref()
        .map(|files| files.open(digest, false))
        .transpose()?
        .flatten();
    let Some(image) = opened else {
        return Ok(None);
    };
    let content = PresentMap::content(&*image.present)?;
    Ok(content.filter(|content| content.digest == *digest && content.check().is_ok()))
}
