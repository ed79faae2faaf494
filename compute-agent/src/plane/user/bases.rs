//! Bases: a cache or a store, opened over its paths.

use std::path::PathBuf;
use std::sync::Arc;

use treeboot_block::{CacheOptions, ChunkCache, ChunkSource, Completeness, GroupError, ImageContent};
use treeboot_types::Digest;

use super::files::{blocking, open_cache};
use super::{OpenBase, UserPlane, differs, missing};
use crate::plane::PlaneError;
use crate::stack::{Backing, Content, Step, Violation};

impl UserPlane {
    pub(super) async fn open_base(
        &self,
        step: &Step,
        content: &Content,
        backing: Backing,
    ) -> Result<(), PlaneError> {
        let digest = content.digest;
        if let Some(open) = self.base(&digest) {
            if open.content == *content && open.backing == backing {
                return Ok(());
            }
            return Err(differs(step, digest.short()).into());
        }
        let source: Arc<dyn ChunkSource> = match (backing, self.state.lock().paths.get(&digest)) {
            (Backing::Store, _) => Arc::new(treeboot_block::cache::NoSource),
            (_, Some(source)) => Arc::clone(source) as Arc<dyn ChunkSource>,
            (_, None) => return Err(missing(step, digest.short(), "paths").into()),
        };
        let image = ImageContent {
            digest,
            bytes: content.bytes,
            chunk_bytes: content.chunk_bytes,
        };
        let cache = match backing {
            Backing::Cache => {
                let group = Arc::clone(self.caching.group());
                let what = PathBuf::from(format!("the cache of {}", digest.short()));
                open_cache(what, move |_| {
                    ChunkCache::open_in(&group, image, Arc::clone(&source))
                })
                .await?
            }
            Backing::Store | Backing::Adopted => {
                let dir = self
                    .store_dir(&digest)
                    .ok_or_else(|| missing(step, digest.short(), "a store"))?;
                let options = match backing {
                    Backing::Store => CacheOptions::complete(),
                    _ => CacheOptions {
                        hash: Completeness::All,
                        ..CacheOptions::default()
                    },
                };
                open_cache(dir, move |dir| {
                    crate::store::open(dir, image, Arc::clone(&source), options)
                })
                .await?
            }
        };
        self.state.lock().bases.insert(
            digest,
            OpenBase {
                content: *content,
                backing,
                cache,
                readable: backing == Backing::Store,
            },
        );
        Ok(())
    }

    pub(super) async fn drop_cache(&self, step: &Step, digest: &Digest) -> Result<(), PlaneError> {
        if self.base(digest).is_some_and(|base| !base.backing.in_store()) {
            return Err(Violation::InUse {
                step: step.name(),
                what: digest.short(),
                user: "its base".into(),
            }
            .into());
        }
        let (group, digest) = (Arc::clone(self.caching.group()), *digest);
        blocking(move || {
            group.forget(&digest).map_err(|error| match error {
                GroupError::Directory { path, source } => PlaneError::io(
                    format!("removing {} in {}", digest.short(), path.display()),
                    source,
                ),
                other => super::failed(format!("removing the cache of {}", digest.short()), other),
            })
        })
        .await
    }
}
