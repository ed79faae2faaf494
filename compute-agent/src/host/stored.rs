//! The host's store: taking images in, telling the coordinator of them, dropping them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::{Semaphore, mpsc};
use treeboot_proto::v1;
use treeboot_types::{Endpoint, HostName, Image, ImageId, ImageRef, IscsiUrl, Origin, Portal};

use super::base::BaseMsg;
use super::view::endpoint;
use super::{Host, HostError, Settings};
use crate::desired::{Change, Stored};
use crate::journal::Journal;
use crate::plane::PlaneKind;
use crate::stack::{Backing, PathTo, Sources, StripePaths};
use crate::store::{self, BaseImage, ImportHeader, Manifest, SentPart, StoreError, Written};

/// Imports at once: each holds a thread and up to [`PARTS`] parts of 1 MiB.
const IMPORTS: usize = 4;
/// Parts of an import that wait for the disk.
const PARTS: usize = 8;
/// Stripe unit in bytes of an image that is read in one stripe; a multiple of every chunk.
const STRIPE_UNIT_BYTES: u64 = 4 << 20;

/// Bounds imports.
pub(super) struct Imports {
    permits: Arc<Semaphore>,
}

impl Default for Imports {
    fn default() -> Self {
        Self {
            permits: Arc::new(Semaphore::new(IMPORTS)),
        }
    }
}

/// An image that was taken in.
#[derive(Debug, Clone)]
pub struct Imported {
    /// The coordinator's record.
    pub image: Image,
    /// Where its bytes are.
    pub directory: PathBuf,
    /// Whether the version is new.
    pub created: bool,
}

/// At the start: removes what imports left, and takes up images that the journal does not know (it was lost, or
/// the store comes from elsewhere).
pub(super) async fn find(settings: &Settings, journal: &Journal) -> Result<(), HostError> {
    let Some(dir) = settings.store_dir.as_deref() else {
        return Ok(());
    };
    let io = |doing| StoreError::io("the store", dir, doing);
    let swept = store::sweep(dir).map_err(io("swept"))?;
    if swept > 0 {
        tracing::info!(swept, "removed what interrupted imports left");
    }
    let mut changes = Vec::new();
    for found in store::scan(dir).map_err(io("read"))? {
        let manifest = match found {
            Ok(manifest) => manifest,
            Err(error) => {
                tracing::error!(error = %super::chain(&error), "not served");
                continue;
            }
        };
        let desired = journal.desired();
        if desired.doomed_stores.contains(&manifest.digest) {
            continue;
        }
        for image in &manifest.names {
            let known = desired
                .images
                .get(image)
                .is_some_and(|state| state.stored.is_some());
            if !known {
                tracing::info!(%image, "found in the store");
                changes.push(stored_change(image, &manifest));
            }
        }
    }
    if !changes.is_empty() {
        journal.commit(changes).await?;
    }
    Ok(())
}

fn stored_change(image: &ImageId, manifest: &Manifest) -> Change {
    let backing = if manifest.adopted_from.is_empty() {
        Backing::Store
    } else {
        Backing::Adopted
    };
    Change::Stored {
        image: image.clone(),
        content: manifest.content(),
        stored: Stored {
            backing,
            sources: foreign_sources(&manifest.adopted_from),
        },
    }
}

/// Where an adopted image's data is read: the first target, then the next ones as fallbacks.
fn foreign_sources(urls: &[IscsiUrl]) -> Sources {
    let mut paths: Vec<_> = urls.iter().filter_map(foreign_path).collect();
    if paths.is_empty() {
        return Sources::default();
    }
    let fallbacks = paths.split_off(1);
    Sources {
        unit_bytes: STRIPE_UNIT_BYTES,
        stripes: vec![StripePaths {
            active: paths,
            fallbacks,
            ..StripePaths::default()
        }],
    }
}

fn foreign_path(url: &IscsiUrl) -> Option<PathTo> {
    let endpoint = foreign_endpoint(url)?;
    Some(PathTo { host: None, endpoint })
}

fn foreign_endpoint(url: &IscsiUrl) -> Option<Endpoint> {
    Some(Endpoint {
        portal: Portal::new(&url.portal()).ok()?,
        target: url.target.clone(),
        data_lun: url.lun,
        hash_lun: None,
    })
}

fn manifest_of(store: &Path, digest: &treeboot_types::Digest) -> Result<Manifest, StoreError> {
    Manifest::load(&store.join(digest.to_string()))
}

/// Tells the coordinator of every stored image where it starts from another state than the one that was told.
pub(super) fn announce_all(host: &Host, incarnation: u64) {
    let desired = host.desired();
    if desired.announced_to == Some(incarnation) {
        return;
    }
    let images: Vec<_> = desired
        .images
        .iter()
        .filter(|(_, state)| state.stored.is_some())
        .map(|(image, _)| image.clone())
        .collect();
    let host = host.clone();
    host.shared.tasks.clone().spawn(async move {
        for image in images {
            match host.announce(&image, true).await {
                Ok(_) => tracing::info!(%image, "announced"),
                Err(error) => {
                    tracing::warn!(%image, error = %super::chain(&error), "the coordinator was not told of the image");
                    if matches!(&error, HostError::Link(link) if link.is_unavailable()) {
                        return;
                    }
                }
            }
        }
        if let Err(error) = host.shared.journal().learn(Change::Announced { incarnation }).await {
            tracing::warn!(%error, "the announcement is not written down");
        }
    });
}

impl Host {
    /// Where imports go.
    fn store(&self) -> Result<&Path, HostError> {
        self.shared.settings.store_dir.as_deref().ok_or_else(|| {
            let host = self.shared.host().to_string();
            StoreError::NoStore { host }.into()
        })
    }

    /// Takes an image in as its parts come.
    ///
    /// # Errors
    /// [`HostError`]; nothing is left then.
    pub async fn import(
        &self,
        image: ImageRef,
        header: ImportHeader,
        parts: mpsc::Receiver<SentPart>,
    ) -> Result<Imported, HostError> {
        let store = self.store()?.to_owned();
        header.check()?;
        let _permit = self.permit().await?;
        let writing = {
            let store = store.clone();
            tokio::task::spawn_blocking(move || store::write(&store, &header, parts))
        };
        let written = writing.await.map_err(|_| self.shared.stopping())??;
        self.take_in(image, store, written).await
    }

    /// An image of this store to make a new version of, and its unit of caching in bytes.
    ///
    /// # Errors
    /// It is not there, or only registered.
    pub fn base_of(&self, id: &ImageId) -> Result<(BaseImage, u32), HostError> {
        let (desired, store) = (self.desired(), self.store()?);
        let state = desired.images.get(id).filter(|state| state.stored.is_some());
        let content = state.ok_or_else(|| self.not_stored(id))?.content;
        let manifest = manifest_of(store, &content.digest)?;
        if let Some(url) = manifest.adopted_from.first() {
            return Err(StoreError::Elsewhere {
                image: id.clone(),
                host: self.shared.host().to_string(),
                at: url.to_string(),
            }
            .into());
        }
        let base = BaseImage {
            digest: content.digest,
            // The kernel's loop device cannot put blocks of several files together.
            share: self.plane().kind() != PlaneKind::Kernel,
        };
        Ok((base, content.chunk_bytes))
    }

    /// Gives a stored image that shares blocks with another version a copy of all of them, also while it is read. Whether it
    /// shared any, and the bytes of its data. `progress` hears done and total bytes.
    ///
    /// # Errors
    /// It is not there, or there is no room; it goes on sharing then.
    pub async fn flatten(
        &self,
        id: &ImageId,
        progress: impl FnMut(u64, u64) + Send + 'static,
    ) -> Result<(bool, u64), HostError> {
        let (base, _) = self.base_of(id)?;
        let dir = self.store()?.join(base.digest.to_string());
        let _permit = self.permit().await?;
        let name = id.to_string();
        let flattening = tokio::task::spawn_blocking(move || {
            let io = |doing| StoreError::io(&name, &dir, doing);
            let shared = store::flatten(&dir, progress).map_err(io("flattened"))?;
            let mut manifest = Manifest::load(&dir)?;
            if shared {
                manifest.base = None;
                manifest.allocated_bytes = store::data_bytes(&dir).map_err(io("read"))?;
                manifest.save(&dir).map_err(io("written"))?;
            }
            Ok::<_, StoreError>((shared, manifest.allocated_bytes))
        });
        let flattened = flattening.await.map_err(|_| self.shared.stopping())??;
        tracing::info!(image = %id, shared = flattened.0, "flattened");
        if flattened.0
            && let Err(error) = self.announce(id, true).await
        {
            // It is told when the coordinator starts anew.
            tracing::warn!(image = %id, error = %super::chain(&error), "the coordinator was not told how much the image takes");
        }
        Ok(flattened)
    }

    /// The channel through which an import's parts come.
    pub fn import_parts() -> (mpsc::Sender<SentPart>, mpsc::Receiver<SentPart>) {
        mpsc::channel(PARTS)
    }

    async fn permit(&self) -> Result<tokio::sync::OwnedSemaphorePermit, HostError> {
        let permits = Arc::clone(&self.shared.imports.permits);
        permits.acquire_owned().await.map_err(|_| self.shared.stopping())
    }

    /// Puts what was written into its place, exports it, and tells the coordinator. Each is undone where a later one fails.
    async fn take_in(
        &self,
        image: ImageRef,
        store: PathBuf,
        written: Written,
    ) -> Result<Imported, HostError> {
        let digest = written.manifest.digest;
        let before = manifest_of(&store, &digest).ok();
        let publishing = {
            let store = store.clone();
            tokio::task::spawn_blocking(move || written.publish(&store))
        };
        let directory = publishing.await.map_err(|_| self.shared.stopping())??;
        let result = match self.free_version(&image, digest).await {
            Ok(id) => self.record(&id, image.version.is_some(), &directory).await,
            Err(error) => Err(error),
        };
        match result {
            Ok((record, created)) => Ok(Imported {
                image: record,
                directory,
                created,
            }),
            Err(error) => {
                if before.is_none() {
                    remove_unless_named(&directory)?;
                }
                Err(error)
            }
        }
    }

    /// The version asked for; else the one that has this content; else the likely next one.
    async fn free_version(
        &self,
        image: &ImageRef,
        digest: treeboot_types::Digest,
    ) -> Result<ImageId, HostError> {
        let name = image.name.clone();
        if let Some(version) = image.version {
            return Ok(ImageId { name, version });
        }
        let versions = self.shared.link.versions(&name).await?;
        let same = versions.iter().find(|record| record.digest == digest);
        let next = versions
            .iter()
            .map(|record| record.id.version)
            .max()
            .unwrap_or(0)
            .saturating_add(1);
        let version = same.map_or(next, |record| record.id.version);
        Ok(ImageId { name, version })
    }

    /// Serves a stored image under a name, then records it at the coordinator. Where the coordinator chooses the version
    /// and chooses another one than was likely, that one is served instead.
    async fn record(&self, id: &ImageId, fixed: bool, directory: &Path) -> Result<(Image, bool), HostError> {
        let new_name = self.serve_as(id, directory).await?;
        let announced = self.announce(id, fixed).await;
        let moved = match &announced {
            Ok((record, _)) if record.id != *id => self.serve_as(&record.id, directory).await.map(|_| true),
            Ok(_) => Ok(false),
            Err(_) => Ok(true),
        };
        if new_name && moved.as_ref().is_ok_and(|moved| *moved) {
            self.unname(id, directory).await?;
        }
        moved?;
        announced
    }

    /// Exports a stored image under a name. Whether the name is new to it.
    async fn serve_as(&self, id: &ImageId, directory: &Path) -> Result<bool, HostError> {
        let mut manifest = Manifest::load(directory)?;
        if let Some(state) = self.desired().images.get(id)
            && state.content.digest != manifest.digest
        {
            return Err(HostError::ImageExists {
                image: id.clone(),
                host: self.shared.host().to_string(),
                have: state.content.digest.short(),
                given: manifest.digest.short(),
            });
        }
        let new_name = manifest.names.insert(id.clone());
        if new_name {
            let text = id.to_string();
            manifest
                .save(directory)
                .map_err(StoreError::io(&text, directory, "written"))?;
        }
        self.shared
            .journal()
            .commit([stored_change(id, &manifest)])
            .await?;
        if let Err(error) = self.changed(&manifest).await {
            if new_name {
                self.unname(id, directory).await?;
            }
            return Err(error);
        }
        Ok(new_name)
    }

    async fn changed(&self, manifest: &Manifest) -> Result<(), HostError> {
        self.ask_base(manifest.digest, |reply| BaseMsg::Changed { reply })
            .await
    }

    /// Takes a name from a stored image; the image itself goes with its last name.
    async fn unname(&self, id: &ImageId, directory: &Path) -> Result<(), HostError> {
        let mut manifest = Manifest::load(directory)?;
        manifest.names.remove(id);
        let io = |doing| StoreError::io(id.name.as_str(), directory, doing);
        if !manifest.names.is_empty() {
            manifest.save(directory).map_err(io("written"))?;
        }
        let image = id.clone();
        self.shared
            .journal()
            .commit([Change::StoreDoomed { image }])
            .await?;
        self.changed(&manifest).await?;
        let digest = manifest.digest;
        if self.desired().doomed_stores.contains(&digest) {
            self.shared
                .journal()
                .commit([Change::StoreGone { digest }])
                .await?;
        }
        Ok(())
    }

    /// Records a stored image at the coordinator, with this host and its foreign targets as origins.
    /// `fixed`: under this version and no other.
    async fn announce(&self, id: &ImageId, fixed: bool) -> Result<(Image, bool), HostError> {
        let state = self.desired().images.get(id).cloned();
        let stored = state.filter(|state| state.stored.is_some());
        let (Some(state), Ok(store)) = (stored, self.store()) else {
            return Err(self.not_stored(id));
        };
        let manifest = manifest_of(store, &state.content.digest)?;
        let mut origins = vec![self.own_origin(id)];
        origins.extend(
            manifest
                .adopted_from
                .iter()
                .filter_map(foreign_endpoint)
                .map(|endpoint| Origin {
                    endpoint,
                    host: None,
                    labels: Default::default(),
                }),
        );
        let version = if fixed { id.version } else { 0 };
        let record = v1::Image {
            id: Some(v1::ImageId {
                name: id.name.to_string(),
                version,
            }),
            digest: state.content.digest.0.to_vec(),
            bytes: state.content.bytes,
            chunk_bytes: state.content.chunk_bytes,
            stripes: 1,
            stripe_unit_bytes: STRIPE_UNIT_BYTES.max(state.content.chunk_bytes.into()),
            origins: origins.iter().map(Into::into).collect(),
            created_unix_ms: 0,
            allocated_bytes: manifest.allocated_bytes,
        };
        Ok(self.shared.link.add_image(record).await?)
    }

    fn own_origin(&self, id: &ImageId) -> Origin {
        let host: HostName = self.shared.host().clone();
        Origin {
            endpoint: endpoint(&self.shared.portal, id),
            host: Some(host),
            labels: self.shared.settings.labels.clone(),
        }
    }

    fn not_stored(&self, image: &ImageId) -> HostError {
        StoreError::NotStored {
            image: image.clone(),
            host: self.shared.host().to_string(),
        }
        .into()
    }

    /// Takes an image in from targets that already serve it: read once, in the order given and the next one where one
    /// fails; the hash tree is kept and the data stays there. `progress` hears done and total bytes.
    ///
    /// # Errors
    /// [`HostError`]; nothing is left then.
    pub async fn adopt(
        &self,
        image: ImageRef,
        urls: Vec<IscsiUrl>,
        progress: impl FnMut(u64, u64) + Send,
    ) -> Result<Imported, HostError> {
        let store = self.store()?.to_owned();
        let _permit = self.permit().await?;
        let name = image.to_string();
        let (bytes, group) =
            crate::plane::user::foreign::open(&self.shared.settings.name, &name, &urls).await?;
        let header = ImportHeader {
            image: name.clone(),
            bytes,
            chunk_bytes: treeboot_types::DEFAULT_CHUNK_BYTES,
            adopted_from: urls,
            base: None,
        };
        header.check()?;
        let (sender, parts) = Self::import_parts();
        let writing = {
            let store = store.clone();
            tokio::task::spawn_blocking(move || store::write(&store, &header, parts))
        };
        let read = crate::plane::user::foreign::read_all(&group, &name, bytes, &sender, progress).await;
        if let Err(error) = &read {
            // The writer removes what it has.
            let _ = sender.send(Err(error.to_string())).await;
        }
        drop(sender);
        let written = writing.await.map_err(|_| self.shared.stopping())?;
        read?;
        self.take_in(image, store, written?).await
    }

    /// Deletes an image from the store.
    ///
    /// # Errors
    /// It is not there, or VMs here stand on it.
    pub async fn drop_image(&self, id: &ImageId) -> Result<(), HostError> {
        let desired = self.desired();
        let stored = desired.images.get(id).filter(|state| state.stored.is_some());
        let (Some(state), Ok(store)) = (stored, self.store()) else {
            return Err(self.not_stored(id));
        };
        let vms: Vec<_> = desired.disks_of(id).cloned().collect();
        if !vms.is_empty() {
            return Err(HostError::ImageInUse {
                image: id.clone(),
                host: self.shared.host().to_string(),
                vms,
            });
        }
        let directory = store.join(state.content.digest.to_string());
        self.unname(id, &directory).await?;
        tracing::info!(image = %id, "dropped from the store");
        Ok(())
    }

    /// Manifests of what is in the store.
    pub fn stored(&self) -> Vec<(Manifest, PathBuf)> {
        let Ok(store) = self.store() else {
            return Vec::new();
        };
        let manifests = store::scan(store).unwrap_or_default();
        manifests
            .into_iter()
            .flatten()
            .map(|manifest| {
                let directory = store.join(manifest.digest.to_string());
                (manifest, directory)
            })
            .collect()
    }
}

/// An import that failed late leaves its directory only where another name already uses it.
fn remove_unless_named(directory: &Path) -> Result<(), HostError> {
    match Manifest::load(directory) {
        Ok(manifest) if !manifest.names.is_empty() => Ok(()),
        _ if !directory.exists() => Ok(()),
        _ => Ok(std::fs::remove_dir_all(directory).map_err(StoreError::io(
            "the import",
            directory,
            "removed",
        ))?),
    }
}
