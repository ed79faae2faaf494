//! What a person calls an image, opened as a device to read from.
//!
//! The format is told by content, never by a file's name. Raw and plain qcow2 are read here; what else `qemu-img`
//! reads is converted by it into a scratch file first. Deliberately absent: writing any format, and following
//! a name inside an image to another file (a backing file, an external data file), because whoever made the
//! image would then choose which files of this machine are read.

mod detect;
mod parts;
mod qcow2;
mod qemu_img;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use treeboot_block::{BlockDevice, BlockError, FileDevice, FileOptions, OpenError};

use crate::failure::{Exit, Failure, chain};

pub(crate) use detect::Format;
pub(crate) use parts::{FeedError, Parts, feed};
pub(crate) use qcow2::{Own, Qcow2, Qcow2Error};
pub(crate) use qemu_img::default_scratch;

/// Why a file cannot be taken as an image.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImportError {
    /// The operating system refused.
    #[error("cannot {doing} '{path}'")]
    Io {
        doing: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    /// Not a raw image that can be served.
    #[error(transparent)]
    Raw(#[from] OpenError),
    /// Its content says that it is something else.
    #[error("'{path}' is not a disk image but {what}")]
    NotAnImage { path: PathBuf, what: &'static str },
    /// A qcow2 image that cannot be read.
    #[error("cannot read the qcow2 image '{path}'")]
    Qcow2 { path: PathBuf, source: Qcow2Error },
    /// The format is read by `qemu-img`, which is not installed.
    #[error("'{path}' is a {what}, which needs qemu-img, and that is not installed")]
    NoQemuImg { path: PathBuf, what: String },
    /// `qemu-img` did not do it.
    #[error("qemu-img cannot read '{path}': {why}")]
    QemuImg { path: PathBuf, why: String },
    /// The image is a difference to another file.
    #[error("'{path}' holds only the difference to its backing file '{backing}'")]
    Backing { path: PathBuf, backing: String },
    /// The bytes could not be read.
    #[error("cannot read '{path}'")]
    Read { path: PathBuf, source: BlockError },
    /// Only raw images are written.
    #[error("'{path}' is a {format} image, and only raw images are served writable")]
    NotWritable { path: PathBuf, format: Format },
    /// Somebody writes to the file.
    #[error("'{path}' changed while it was read")]
    Changed { path: PathBuf },
}

impl ImportError {
    fn advice(&self) -> Option<String> {
        let advice = match self {
            Self::Raw(OpenError::Kind { .. }) => "name the image file itself".into(),
            Self::NotAnImage { what, .. } if what.contains("compressed") => {
                "decompress it first, then import the result".into()
            }
            Self::NotAnImage { path, .. } => {
                format!(
                    "if it is a raw disk image all the same: --format raw {}",
                    path.display()
                )
            }
            Self::NoQemuImg { .. } => {
                "install it (Debian: apt-get install qemu-utils), or convert the image elsewhere".into()
            }
            Self::Backing { path, .. } => format!(
                "join them into one image first: qemu-img convert -O qcow2 {} FLAT.qcow2",
                path.display()
            ),
            Self::QemuImg { why, .. } if why.contains("No space left") => {
                "make room there, or name a larger place with --scratch DIR".into()
            }
            Self::QemuImg { path, .. } => {
                format!("see what is wrong with it: qemu-img check {}", path.display())
            }
            Self::NotWritable { path, .. } => {
                format!(
                    "convert it first: qemu-img convert -O raw {} DISK.raw",
                    path.display()
                )
            }
            Self::Changed { .. } => "stop the VM or program that writes it, then import it again".into(),
            Self::Qcow2 { source, path } => return source.advice(path),
            _ => return None,
        };
        Some(advice)
    }
}

impl From<ImportError> for Failure {
    fn from(error: ImportError) -> Self {
        let io_error = match &error {
            ImportError::Io { source, .. }
            | ImportError::Raw(OpenError::Open { source, .. } | OpenError::Allocate { source, .. }) => {
                Some(source)
            }
            ImportError::Qcow2 {
                source: Qcow2Error::Io(source),
                ..
            } => Some(source),
            _ => None,
        };
        if let Some(io_error) = io_error {
            return Failure::io(&error, io_error);
        }
        let exit = match &error {
            ImportError::Raw(OpenError::InUse { .. })
            | ImportError::Changed { .. }
            | ImportError::NotWritable { .. } => Exit::Refused,
            ImportError::QemuImg { why, .. } if why.contains("No space left") => Exit::NoRoom,
            _ => Exit::Failed,
        };
        // Some say what to do in the same sentence, behind a semicolon.
        let text = chain(&error);
        match (error.advice(), text.split_once("; ")) {
            (Some(advice), _) => Failure::new(exit, text).advice(advice),
            (None, Some((what, advice))) => Failure::new(exit, what).advice(advice),
            (None, None) => Failure::new(exit, text),
        }
    }
}

/// How to open an image.
#[derive(Debug, Clone)]
pub(crate) struct OpenOptions {
    /// Overrides what the content says.
    pub(crate) format: Option<Format>,
    /// Where a format that is not read here is converted to.
    pub(crate) scratch: PathBuf,
    /// Logical block of the device in bytes: 512 or 4096.
    pub(crate) block_bytes: u32,
    /// Physical block of a raw image's device in bytes: 512 or 4096, at least `block_bytes`.
    pub(crate) physical_block_bytes: u32,
    /// A raw image's device is not thin; where it is writable its holes are filled.
    pub(crate) fully_allocated: bool,
    /// Writes go to the file, which must be raw.
    pub(crate) writable: bool,
}

/// An image ready to be read.
pub(crate) struct Source {
    /// Its bytes.
    pub(crate) device: Arc<dyn BlockDevice>,
    /// What it was.
    pub(crate) format: Format,
    /// Bytes of the disk that have storage in the file; what is a hole is not counted.
    pub(crate) stored_bytes: u64,
    stamp: Stamp,
    /// Holds the converted copy; deleted with this value.
    _scratch: Option<tempfile::TempDir>,
}

/// A file, and what tells whether somebody writes to it: its size and its time of change.
#[derive(Debug)]
pub(crate) struct Stamp {
    path: PathBuf,
    seen: (u64, Option<std::time::SystemTime>),
}

impl Stamp {
    /// Looks at a file.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn of(path: &Path) -> Result<(Self, std::fs::Metadata), ImportError> {
        let metadata = std::fs::metadata(path).map_err(|source| ImportError::Io {
            doing: "open",
            path: path.into(),
            source,
        })?;
        let seen = (metadata.len(), metadata.modified().ok());
        let path = path.into();
        Ok((Self { path, seen }, metadata))
    }

    /// Whether nobody wrote to the file since.
    pub(crate) fn is_unchanged(&self) -> bool {
        let now = std::fs::metadata(&self.path).map(|metadata| (metadata.len(), metadata.modified().ok()));
        now.is_ok_and(|now| now == self.seen)
    }
}

impl Source {
    /// Opens the image in `path`.
    ///
    /// # Errors
    /// [`ImportError`]: not there, not an image, damaged, or of a format that needs a program that is not installed.
    pub(crate) async fn open(path: &Path, options: &OpenOptions) -> Result<Self, ImportError> {
        let (stamp, metadata) = Stamp::of(path)?;
        let format = match options.format {
            Some(format) => format,
            // What is no regular file has no format to look for: a block device is raw, the rest is refused below.
            None if !metadata.is_file() => Format::Raw,
            None => detect::detect(path)?,
        };
        if options.writable && format != Format::Raw {
            return Err(ImportError::NotWritable {
                path: path.into(),
                format,
            });
        }
        let convert = async |driver: &str, what: String| {
            let dir = qemu_img::convert(path, driver, &what, &options.scratch).await?;
            let (device, stored_bytes) = open_raw(&dir.path().join(qemu_img::CONVERTED), options)?;
            Ok::<_, ImportError>((device, stored_bytes, Some(dir)))
        };
        let (device, stored_bytes, converted) = match format {
            Format::Raw => {
                let (device, stored_bytes) = open_raw(path, options)?;
                (device, stored_bytes, None)
            }
            Format::Qcow2 => match open_qcow2(path, options.block_bytes).await? {
                (image, None) => {
                    let stored_bytes = image.stored_bytes();
                    (Arc::new(image) as Arc<dyn BlockDevice>, stored_bytes, None)
                }
                // Validated before, because qemu-img reads what is cut off as zeroes.
                (_, Some(why)) => convert("qcow2", format!("qcow2 image with {why}")).await?,
            },
            Format::Foreign(foreign) => convert(foreign.driver(), format!("{foreign} image")).await?,
        };
        Ok(Self {
            device,
            format,
            stored_bytes,
            stamp,
            _scratch: converted,
        })
    }

    /// Whether a copy was made because the format is not read here.
    pub(crate) fn was_converted(&self) -> bool {
        self._scratch.is_some()
    }

    /// Whether nobody wrote to the file since it was opened.
    pub(crate) fn is_unchanged(&self) -> bool {
        self.stamp.is_unchanged()
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        &self.stamp.path
    }
}

/// A device and how many of its bytes have storage.
type Opened = (Arc<dyn BlockDevice>, u64);

fn open_raw(path: &Path, options: &OpenOptions) -> Result<Opened, ImportError> {
    let options = FileOptions {
        read_only: !options.writable,
        block_bytes: options.block_bytes,
        physical_block_bytes: options.physical_block_bytes,
        fully_allocated: options.fully_allocated,
    };
    let device = FileDevice::open(path, options)?;
    let stored_bytes = device.allocated_bytes().map_err(|source| ImportError::Io {
        doing: "look at",
        path: path.into(),
        source,
    })?;
    Ok((Arc::new(device), stored_bytes))
}

/// Opens and validates a qcow2 image; the text says why only `qemu-img` can read its content.
async fn open_qcow2(path: &Path, block_bytes: u32) -> Result<(Qcow2, Option<&'static str>), ImportError> {
    let owned = path.to_owned();
    let opened = tokio::task::spawn_blocking(move || Qcow2::open(&owned, block_bytes)).await;
    let opened = opened.unwrap_or_else(|_| Err(Qcow2Error::Io(io::Error::other("its reader failed"))));
    match opened {
        Ok(image) => {
            let foreign = image.needs_qemu_img();
            Ok((image, foreign))
        }
        Err(Qcow2Error::Backing(backing)) => Err(ImportError::Backing {
            path: path.into(),
            backing,
        }),
        Err(source) => Err(ImportError::Qcow2 {
            path: path.into(),
            source,
        }),
    }
}
