//! Backstores: devices and files that LIO has opened.

use std::fs;
use std::io::{Error, ErrorKind};
use std::path::{Path, PathBuf};

use super::{Act, Backing, Backstore, BackstoreName, Lio, LioError, Outcome};

/// The number of our HBAs, the folders of backstores of one kind. targetcli counts its own from 0, so it never puts one of its
/// backstores among ours; that a backstore lies here is one of the two marks by which it is ours.
pub(super) const HBA: u32 = 26_111;

/// Longest paths in bytes that LIO keeps (SE_UDEV_PATH_LEN, FD_MAX_DEV_NAME, each less its end).
const MAX_DEVICE_PATH_BYTES: usize = 511;
const MAX_FILE_PATH_BYTES: usize = 255;

/// The two kinds of backstores, by LIO's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Iblock,
    Fileio,
}

impl Kind {
    pub(super) const ALL: [Self; 2] = [Self::Iblock, Self::Fileio];

    fn of(backing: &Backing) -> Self {
        match backing {
            Backing::Block { .. } => Self::Iblock,
            Backing::File { .. } => Self::Fileio,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Iblock => "iblock",
            Self::Fileio => "fileio",
        }
    }

    fn module(self) -> &'static str {
        match self {
            Self::Iblock => "target_core_iblock",
            Self::Fileio => "target_core_file",
        }
    }

    /// The name of our HBA of this kind.
    pub(super) fn hba(self) -> String {
        format!("{}_{HBA}", self.name())
    }
}

/// What LIO says it has opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Opened {
    pub(super) backing: Backing,
    /// Known of a device only: LIO opens every file for writing.
    pub(super) writable: Option<bool>,
}

impl Lio {
    pub(super) fn hba_path(&self, kind: Kind) -> PathBuf {
        self.tree.target().join("core").join(kind.hba())
    }

    /// Where a backstore of ours is, if it is.
    pub(super) fn backstore_path(&self, name: &BackstoreName) -> Option<(Kind, PathBuf)> {
        Kind::ALL.into_iter().find_map(|kind| {
            let path = self.hba_path(kind).join(name.as_str());
            path.is_dir().then_some((kind, path))
        })
    }

    /// Makes LIO open a device or file. One that is open already is left alone; another device under the same name is
    /// closed first, unless a target still exports it. What an earlier attempt left half-made is made anew.
    ///
    /// # Errors
    /// [`LioError::Device`] where the device cannot be opened, [`LioError::InUse`] where another one under this name is
    /// exported, and what the kernel refuses.
    pub fn ensure_backstore(&self, wanted: &Backstore) -> Result<Outcome, LioError> {
        self.check()?;
        check_path(&wanted.backing)?;
        let kind = Kind::of(&wanted.backing);
        let mut outcome = Outcome::Created;
        if let Some((found, path)) = self.backstore_path(&wanted.name) {
            let opened = self.opened(found, &path)?;
            let same = opened.as_ref().is_some_and(|opened| {
                opened.backing == wanted.backing && opened.writable.is_none_or(|w| w == wanted.writable)
            });
            if same {
                let changed = self.tune(kind, &path, wanted)?;
                return Ok(if changed {
                    Outcome::Changed
                } else {
                    Outcome::Identity
                });
            }
            self.remove_backstore(&wanted.name)?;
            outcome = if opened.is_some() {
                Outcome::Changed
            } else {
                Outcome::Created
            };
        }
        let built = self.open(kind, wanted);
        if built.is_err() && !matches!(built, Err(LioError::Stopped { .. })) {
            // What stays behind is found and removed by the next attempt, or by whoever cleans up.
            if let Err(error) = self.remove_backstore(&wanted.name) {
                tracing::warn!(backstore = %wanted.name, %error, "a backstore that could not be made could not be removed either");
            }
        }
        built.map(|()| outcome)
    }

    fn open(&self, kind: Kind, wanted: &Backstore) -> Result<(), LioError> {
        let no_module = |error| match error {
            LioError::Refused {
                act: Act::Make,
                source,
                ..
            } => LioError::NoModule {
                module: kind.module(),
                source: Some(source),
            },
            other => other,
        };
        self.tree.make(&self.hba_path(kind)).map_err(no_module)?;
        let path = self.hba_path(kind).join(wanted.name.as_str());
        self.tree.make(&path)?;
        let control = match &wanted.backing {
            Backing::Block { path } => {
                let readonly = u8::from(!wanted.writable);
                format!("udev_path={},readonly={readonly}", path.display())
            }
            // Through the page cache, with a write cache that initiators can flush: without it LIO opens the file O_DSYNC.
            Backing::File { path, bytes } => {
                file_is_there(path, *bytes).map_err(|source| device(wanted, source))?;
                format!(
                    "fd_dev_name={},fd_dev_size={bytes},fd_buffered_io=1",
                    path.display()
                )
            }
        };
        self.tree.write(&path.join("control"), &control)?;
        match self.tree.write(&path.join("enable"), "1") {
            Err(LioError::Refused { source, .. }) => return Err(device(wanted, source)),
            other => other?,
        }
        self.tune(kind, &path, wanted).map(|_| ())
    }

    /// Sets what initiators see of an open backstore; whether anything changed.
    fn tune(&self, kind: Kind, path: &Path, wanted: &Backstore) -> Result<bool, LioError> {
        let mut changed = false;
        let serial = path.join("wwn/vpd_unit_serial");
        // Shown with words before it, and unchangeable once exported.
        let shown = self.tree.read(&serial)?.unwrap_or_default();
        if shown.rsplit(": ").next() != Some(wanted.serial.as_str()) {
            self.tree.write(&serial, &wanted.serial)?;
            changed = true;
        }
        let attribute = |name: &str| path.join("attrib").join(name);
        // Third-party copies let an initiator read one LUN through another; nobody here needs them.
        let mut fixed = vec![("emulate_3pc", "0")];
        if kind == Kind::Fileio {
            fixed.push(("is_nonrot", "1"));
        }
        if wanted.writable {
            // A discard gives space back and reads as zeroes; a device that cannot refuses it, and is served without.
            fixed.extend([
                ("emulate_tpu", "1"),
                ("emulate_tpws", "1"),
                ("unmap_zeroes_data", "1"),
            ]);
            fixed.extend([("emulate_pr", "1"), ("emulate_caw", "1")]);
        } else {
            // A reservation by one child would shut out its siblings, and nobody has use for one here.
            fixed.extend([
                ("emulate_tpu", "0"),
                ("emulate_tpws", "0"),
                ("emulate_pr", "0"),
                ("emulate_caw", "0"),
            ]);
        }
        for (name, value) in fixed {
            changed |= self.tree.set_where_possible(&attribute(name), value)?;
        }
        Ok(changed)
    }

    /// Closes a backstore; it may be gone.
    ///
    /// # Errors
    /// [`LioError::InUse`] names the targets that export it.
    pub fn remove_backstore(&self, name: &BackstoreName) -> Result<Outcome, LioError> {
        let mut outcome = Outcome::Identity;
        if self.runs() {
            if let Some((_, path)) = self.backstore_path(name) {
                let by = self.exporters(name)?;
                if !by.is_empty() {
                    return Err(LioError::InUse {
                        name: name.clone(),
                        by,
                    });
                }
                self.tree.remove(&path)?;
                outcome = Outcome::Changed;
            }
            for kind in Kind::ALL {
                self.tree.remove_if_empty(&self.hba_path(kind))?;
            }
        }
        Ok(outcome)
    }

    /// What LIO says that a backstore has opened; `None`: nothing, it is half-made.
    pub(super) fn opened(&self, kind: Kind, path: &Path) -> Result<Option<Opened>, LioError> {
        if self.tree.read(&path.join("enable"))?.as_deref() != Some("1") {
            return Ok(None);
        }
        let info = path.join("info");
        let text = self.tree.read(&info)?.unwrap_or_default();
        let opened = match kind {
            Kind::Iblock => parse_iblock(&text),
            Kind::Fileio => parse_fileio(&text),
        };
        match opened {
            Some(opened) => Ok(Some(opened)),
            None => Err(LioError::Unreadable { path: info, text }),
        }
    }
}

/// Between the words that LIO puts around a path.
fn between<'a>(text: &'a str, before: &str, after: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(before)?;
    rest.rfind(after).and_then(|at| rest.get(..at))
}

/// `iBlock device: dm-0  UDEV PATH: /dev/dm-0  readonly: 1`
fn parse_iblock(info: &str) -> Option<Opened> {
    let line = info.lines().find(|line| line.contains("UDEV PATH: "))?;
    let path = between(line, "UDEV PATH: ", "  readonly: ")?.into();
    let (_, readonly) = line.rsplit_once("  readonly: ")?;
    let writable = match readonly.trim() {
        "0" => Some(true),
        "1" => Some(false),
        _ => return None,
    };
    Some(Opened {
        backing: Backing::Block { path },
        writable,
    })
}

/// `TCM FILEIO ID: 0        File: /a.img  Size: 16777216  Mode: Buffered-WCE Async: 0`
fn parse_fileio(info: &str) -> Option<Opened> {
    let line = info.lines().find(|line| line.contains("File: "))?;
    let path = between(line, "File: ", "  Size: ")?.into();
    let (_, size) = line.rsplit_once("  Size: ")?;
    let bytes = size.split_whitespace().next()?.parse().ok()?;
    Some(Opened {
        backing: Backing::File { path, bytes },
        writable: None,
    })
}

fn device(wanted: &Backstore, source: Error) -> LioError {
    LioError::Device {
        name: wanted.name.clone(),
        device: wanted.backing.path().into(),
        source,
    }
}

/// LIO makes a file that is not there, and shows zeroes where a file is too short; neither is ever wanted.
fn file_is_there(path: &Path, bytes: u64) -> Result<(), Error> {
    let metadata = fs::metadata(path)?;
    if metadata.is_file() && metadata.len() >= bytes {
        return Ok(());
    }
    let what = format!("it is no file of at least {bytes} bytes");
    Err(Error::new(ErrorKind::InvalidInput, what))
}

fn check_path(backing: &Backing) -> Result<(), LioError> {
    let path = backing.path();
    let limit = match backing {
        Backing::Block { .. } => MAX_DEVICE_PATH_BYTES,
        Backing::File { .. } => MAX_FILE_PATH_BYTES,
    };
    let why = match path.to_str() {
        None => "it is not UTF-8",
        Some(text) if text.len() > limit => "it is too long",
        Some(text) if text.contains([',', '\n']) => {
            "LIO reads a comma or a line's end as the end of the path"
        }
        Some(text) if text.trim() != text || !path.is_absolute() => "it is not absolute",
        Some(_) => return Ok(()),
    };
    Err(LioError::Path {
        path: path.into(),
        why,
    })
}
