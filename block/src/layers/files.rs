//! The files of one disk's layers.
//!
//! In one directory: `VM.delta` is layer 0, `VM+N.layer` any other one, and `VM.layers` is the manifest, which only a disk has
//! that once had a second layer. No name of a VM holds a `+`. Whatever the manifest does not name counts for nothing: a layer is
//! made before the manifest names it, and removed after.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use treeboot_types::{Digest, VmName};

use super::disk::LayerReport;
use super::folder::{Directory, Folder};
use super::tree::{LayerId, LayerTree};
use crate::delta::{BootId, Delta, DeltaDamage, DeltaError, DeltaMeta, DeltaReport};
use crate::storage::OpenMode;

/// What the name of a disk's first delta ends in.
pub const DELTA_SUFFIX: &str = ".delta";
/// What the name of a manifest ends in.
pub const MANIFEST_SUFFIX: &str = ".layers";
/// What the name of any other layer ends in.
const LAYER_SUFFIX: &str = ".layer";

/// Where the layers of one disk are, and what they stand on.
#[derive(Clone)]
pub struct DiskFiles {
    folder: Arc<dyn Folder>,
    vm: VmName,
    meta: DeltaMeta,
    boot: BootId,
}

/// The name of the file of a VM's layer.
pub(super) fn layer_name(vm: &VmName, id: LayerId) -> String {
    match id {
        0 => format!("{vm}{DELTA_SUFFIX}"),
        id => format!("{vm}+{id}{LAYER_SUFFIX}"),
    }
}

/// The VM whose disk a file of the directory belongs to, where the file alone shows that there is a disk.
pub fn owner_of(file: &str) -> Option<VmName> {
    let name = file
        .strip_suffix(DELTA_SUFFIX)
        .or_else(|| file.strip_suffix(MANIFEST_SUFFIX))?;
    VmName::new(name).ok()
}

/// Removes the files of a VM's disk, the manifest last, so that what is left is seen until all of it is gone. Blocks.
///
/// # Errors
/// The operating system's.
pub fn delete(folder: &(impl Folder + Clone), vm: &VmName) -> Result<(), DeltaError> {
    // Which base they belong to does not matter any more.
    let meta = DeltaMeta {
        digest: Digest([0; 32]),
        bytes: 0,
    };
    DiskFiles::new(Arc::new(folder.clone()), vm.clone(), meta, BootId([0; 16])).delete()
}

/// Whether any process has a layer of this disk open. Blocks.
///
/// # Errors
/// The operating system's.
pub fn is_in_use(directory: &Path, vm: &VmName) -> Result<bool, DeltaError> {
    let folder: Arc<dyn Folder> = Arc::new(Directory::new(directory));
    let meta = DeltaMeta {
        digest: Digest([0; 32]),
        bytes: 0,
    };
    let files = DiskFiles::new(folder, vm.clone(), meta, BootId([0; 16]));
    for id in files.present()? {
        let name = files.layer(id);
        match files.folder.open(&name, OpenMode::ReadWrite) {
            Ok(_closed_at_once) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(true),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(files.io(&name)(error)),
        }
    }
    Ok(false)
}

/// Checks the layers of a disk that nobody serves: its manifest, then each file. `boot` is the machine's present one. Blocks.
///
/// # Errors
/// There is no such disk, somebody serves it, or its manifest cannot be read.
pub fn check(directory: &Path, vm: &VmName, boot: BootId) -> Result<Vec<LayerReport>, DeltaError> {
    let folder: Arc<dyn Folder> = Arc::new(Directory::new(directory));
    let mut meta = DeltaMeta {
        digest: Digest([0; 32]),
        bytes: 0,
    };
    let files = |meta| DiskFiles::new(Arc::clone(&folder), vm.clone(), meta, boot);
    let (tree, _) = files(meta).tree()?;
    for &id in tree.layers().keys() {
        let name = files(meta).layer(id);
        let path = folder.path(&name);
        match folder.open(&name, OpenMode::ReadOnly) {
            Ok(storage) => {
                let base = Delta::base_of(&*storage).map_err(|source| DeltaError::Io { path, source })?;
                meta = base.unwrap_or(meta);
            }
            Err(source) if source.kind() == io::ErrorKind::NotFound && tree.layers().len() > 1 => {}
            Err(source) => return Err(DeltaError::of_opening(&path, source)),
        }
    }
    files(meta).check(&tree)
}

impl DiskFiles {
    /// The files of `vm` in `folder`, over the base that `meta` names.
    pub fn new(folder: Arc<dyn Folder>, vm: VmName, meta: DeltaMeta, boot: BootId) -> Self {
        Self {
            folder,
            vm,
            meta,
            boot,
        }
    }

    /// The VM.
    pub fn vm(&self) -> &VmName {
        &self.vm
    }

    pub(super) fn meta(&self) -> DeltaMeta {
        self.meta
    }

    fn manifest(&self) -> String {
        format!("{}{MANIFEST_SUFFIX}", self.vm)
    }

    /// The name of a layer's file.
    pub fn layer(&self, id: LayerId) -> String {
        layer_name(&self.vm, id)
    }

    /// A layer's file, for errors.
    pub fn path(&self, id: LayerId) -> PathBuf {
        self.folder.path(&self.layer(id))
    }

    fn io(&self, file: &str) -> impl FnOnce(io::Error) -> DeltaError {
        let path = self.folder.path(file);
        move |source| DeltaError::Io { path, source }
    }

    /// What the manifest says, and whether there is one. Blocks.
    ///
    /// # Errors
    /// It is damaged, or cannot be read.
    pub fn tree(&self) -> Result<(LayerTree, bool), DeltaError> {
        let name = self.manifest();
        match self.folder.read(&name).map_err(self.io(&name))? {
            None => Ok((LayerTree::default(), false)),
            Some(bytes) => match LayerTree::decode(&bytes) {
                Ok(tree) => Ok((tree, true)),
                Err(what) => Err(DeltaError::Damaged {
                    path: self.folder.path(&name),
                    what,
                }),
            },
        }
    }

    /// Puts a new manifest in the old one's place: the moment at which a change counts. Blocks.
    ///
    /// # Errors
    /// The operating system's.
    pub fn save(&self, tree: &LayerTree) -> Result<(), DeltaError> {
        let name = self.manifest();
        self.folder.replace(&name, &tree.encode()).map_err(self.io(&name))
    }

    /// Opens a layer. Blocks.
    ///
    /// # Errors
    /// [`DeltaError`].
    pub fn open(&self, id: LayerId) -> Result<Delta, DeltaError> {
        self.open_file(id, OpenMode::ReadWrite)
    }

    /// Checks every layer while nobody serves the disk. Blocks.
    fn check(self, tree: &LayerTree) -> Result<Vec<LayerReport>, DeltaError> {
        let mut reports = vec![];
        for (&id, layer) in tree.layers() {
            let mut report = LayerReport {
                layer: id,
                parent: layer.parent,
                snapshot: layer.snapshot.clone(),
                live: id == tree.live(),
                allocated_bytes: 0,
                check: DeltaReport::default(),
            };
            let checked = self.open_file(id, OpenMode::ReadOnly).and_then(|delta| {
                report.allocated_bytes = delta.allocated_bytes().map_err(self.io(&self.layer(id)))?;
                delta.core().check().map_err(self.io(&self.layer(id)))
            });
            match checked {
                Ok(check) => report.check = check,
                Err(error @ DeltaError::InUse { .. }) => return Err(error),
                // One layer that cannot be opened does not keep the others from being looked at.
                Err(error) => report.check.damage.push(DeltaDamage {
                    offset: 0,
                    bytes: self.meta.bytes,
                    what: error.to_string(),
                }),
            }
            reports.push(report);
        }
        Ok(reports)
    }

    /// Makes a layer, in the place of one that the manifest never named. Blocks.
    ///
    /// # Errors
    /// [`DeltaError`].
    pub fn create(&self, id: LayerId) -> Result<Delta, DeltaError> {
        self.remove(id)?;
        self.open_file(id, OpenMode::CreateNew)
    }

    fn open_file(&self, id: LayerId, mode: OpenMode) -> Result<Delta, DeltaError> {
        let name = self.layer(id);
        let path = self.folder.path(&name);
        let storage = self.folder.open(&name, mode);
        let storage = storage.map_err(|source| DeltaError::of_opening(&path, source))?;
        Delta::open_in(storage, &path, self.folder.directory(), self.meta, self.boot)
    }

    /// Removes a layer's file. Blocks.
    ///
    /// # Errors
    /// The operating system's.
    pub fn remove(&self, id: LayerId) -> Result<(), DeltaError> {
        let name = self.layer(id);
        self.folder.remove(&name).map_err(self.io(&name))
    }

    /// Numbers of layers whose files are there. Blocks.
    fn present(&self) -> Result<Vec<LayerId>, DeltaError> {
        let names = self.folder.names().map_err(self.io(""))?;
        let begin = format!("{}+", self.vm);
        let number = |name: &String| {
            name.strip_prefix(&begin)?
                .strip_suffix(LAYER_SUFFIX)?
                .parse()
                .ok()
        };
        let mut present: Vec<LayerId> = names.iter().filter_map(number).collect();
        if names.contains(&self.layer(0)) {
            present.push(0);
        }
        Ok(present)
    }

    /// Removes files that the manifest does not name: what a change that was cut off left. Blocks.
    ///
    /// # Errors
    /// The operating system's.
    pub fn sweep(&self, tree: &LayerTree) -> Result<(), DeltaError> {
        for id in self.present()? {
            if !tree.layers().contains_key(&id) {
                self.remove(id)?;
            }
        }
        Ok(())
    }

    pub(super) fn delete(&self) -> Result<(), DeltaError> {
        let name = self.manifest();
        let manifest = self.folder.read(&name).map_err(self.io(&name))?;
        if manifest.is_some() {
            for id in self.present()? {
                self.remove(id)?;
            }
        }
        self.remove(0)?;
        self.folder.remove(&name).map_err(self.io(&name))
    }
}
