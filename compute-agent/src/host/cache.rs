//! The host's cache group: shown, and changed by a person.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use treeboot_block::{GroupReport, MemberSpec};
use treeboot_types::{Digest, ImageId, ImageRef};

use super::{Host, HostError};
use crate::plane::Verb;
use crate::plane::caching::{Caching, CachingError};

/// Between two looks at the members.
const PERIOD: Duration = Duration::from_secs(5);

/// Which image's part of the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CachedImage {
    /// By its name; the coordinator knows those that are not attached here.
    Named(ImageRef),
    /// By the beginning of its digest.
    Digest(String),
}

/// A change of the group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CacheChange {
    /// A directory more.
    Add(MemberSpec),
    /// A directory less; its files may be kept for whoever adds it again.
    Remove {
        /// The directory.
        path: PathBuf,
        /// Leave the files.
        keep_files: bool,
    },
    /// None of an image goes for others; or no longer so.
    Pin {
        /// The image.
        image: CachedImage,
        /// Whether it is to be pinned.
        pinned: bool,
    },
    /// What is there of an image goes.
    Drop(CachedImage),
}

/// What is in the group, with the names that this host has for its images.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CacheView {
    /// The group.
    pub group: GroupReport,
    /// The names of each of its images, in their order.
    pub names: Vec<Vec<ImageId>>,
}

impl Host {
    fn caching(&self) -> Result<Arc<Caching>, HostError> {
        self.can(Verb::Cache)?;
        let caching = self.plane().cache().cloned();
        caching.ok_or_else(|| HostError::Invalid("this plane has no cache group".into()))
    }

    /// How the cache group is.
    ///
    /// # Errors
    /// This plane has none.
    pub fn show_cache(&self) -> Result<CacheView, HostError> {
        let group = self.caching()?.report();
        let desired = self.desired();
        let names_of = |digest: &Digest| {
            let images = desired
                .images
                .iter()
                .filter(|(_, state)| state.content.digest == *digest);
            images.map(|(image, _)| image.clone()).collect()
        };
        let names = group.images.iter().map(|image| names_of(&image.digest)).collect();
        Ok(CacheView { group, names })
    }

    /// Changes the group. Returns how it is then, and how many bytes were dropped.
    ///
    /// # Errors
    /// It cannot be done; the error says why.
    pub async fn change_cache(&self, change: CacheChange) -> Result<(CacheView, u64), HostError> {
        let caching = self.caching()?;
        let found = match &change {
            CacheChange::Pin { image, .. } | CacheChange::Drop(image) => {
                Some(self.find_cached(&caching, image).await?)
            }
            CacheChange::Add(_) | CacheChange::Remove { .. } => None,
        };
        let changed = tokio::task::spawn_blocking(move || -> Result<u64, CachingError> {
            match (change, found) {
                (CacheChange::Add(spec), _) => caching.add(spec)?,
                (CacheChange::Remove { path, keep_files }, _) => caching.remove(&path, keep_files)?,
                (CacheChange::Pin { pinned, .. }, Some((digest, bytes))) => {
                    caching.pin(&digest, bytes, pinned)?
                }
                (CacheChange::Drop(_), Some((digest, _))) => {
                    return Ok(caching.group().drop_image(&digest)?);
                }
                (_, None) => {}
            }
            Ok(0)
        });
        let dropped = changed.await.map_err(|_| self.shared.stopping())?;
        let dropped = dropped.map_err(|source| HostError::Cache {
            host: self.shared.host().to_string(),
            source,
        })?;
        Ok((self.show_cache()?, dropped))
    }

    /// The digest of an image, and its size in bytes.
    async fn find_cached(&self, caching: &Caching, image: &CachedImage) -> Result<(Digest, u64), HostError> {
        let prefix = match image {
            CachedImage::Digest(prefix) => prefix,
            CachedImage::Named(reference) => {
                let desired = self.desired();
                let attached = desired.images.iter().rev().find(|(id, _)| {
                    id.name == reference.name && reference.version.is_none_or(|version| version == id.version)
                });
                if let Some((_, state)) = attached {
                    return Ok((state.content.digest, state.content.bytes));
                }
                let record = self.shared.link.image(reference).await?;
                return Ok((record.digest, record.bytes));
            }
        };
        let report = caching.report();
        let known = report.images.iter().map(|image| (image.digest, image.bytes));
        let pinned = caching.group().pins().into_iter();
        let mut found: Vec<_> = known
            .chain(pinned)
            .filter(|(digest, _)| digest.to_string().starts_with(prefix))
            .collect();
        found.dedup_by_key(|(digest, _)| *digest);
        match found[..] {
            [one] => Ok(one),
            [] => Err(HostError::Invalid(format!(
                "the cache holds no image whose digest begins with '{prefix}'; 'treeboot cache show' names them"
            ))),
            _ => Err(HostError::Invalid(format!(
                "'{prefix}' begins the digests of {} images; give more of it",
                found.len()
            ))),
        }
    }

    /// Looks from time to time at what may run out, or go.
    pub(super) async fn watch(self) {
        tokio::join!(self.watch_room(), self.watch_cache(), self.watch_limits());
    }

    /// Looks at the members from time to time: one that is gone is dropped.
    async fn watch_cache(&self) {
        let Some(caching) = self.plane().cache().cloned() else {
            return;
        };
        loop {
            let caching = Arc::clone(&caching);
            // A file system that hangs costs this one task and its thread.
            let look =
                tokio::task::spawn_blocking(move || caching.look(treeboot_identity::unix_now() * 1000));
            tokio::select! {
                () = self.shared.stop.cancelled() => return,
                _ = look => {}
            }
            tokio::select! {
                () = self.shared.stop.cancelled() => return,
                () = tokio::time::sleep(PERIOD) => {}
            }
        }
    }
}
