//! What the agent means to do, what it did, and what is to be here: one append-only file.
//!
//! [`Journal::commit`] changes what is desired and ends when that is durable. [`Journal::note`] records a step's
//! intent or outcome: it survives the agent's death at once, a power cut only with the next commit, because after
//! a power cut nothing but files is left and `inspect` outranks the notes anyway. One thread owns the file, so
//! that many commits at once share one `fdatasync`. `docs/decisions/0030` says why this is not sled.

mod frame;

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};

use crate::desired::{Change, Desired};
use crate::stack::Step;
use crate::witness::Witness;

/// Entries that may wait for the file's thread; beyond it, who writes waits.
const QUEUE: usize = 256;

/// The file is written anew once it has grown by this much: reading it at start stays a matter of milliseconds.
const COMPACT_AFTER_BYTES: u64 = 4 << 20;

const FILE: &str = "journal";
const NEW_FILE: &str = "journal.new";
const DAMAGED_FILE: &str = "journal.damaged";
/// Its time says until when the journal may have forgotten what it knew: it was begun anew then, or mended.
const FORGOT_FILE: &str = "journal.forgot";

/// Version of the records. A journal of a later one is refused rather than misread.
const FORMAT: u32 = 1;

/// Why the journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The operating system refused.
    #[error("the journal {path} cannot be {doing}; check the disk's room and rights")]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// It was written by a later version.
    #[error("the journal {path} has format {found}, and this agent reads {FORMAT}; use the newer agent")]
    Format {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// A record is too long or cannot be encoded.
    #[error("a journal record cannot be encoded")]
    Encode(#[source] serde_json::Error),
    /// The thread that owns the file is gone.
    #[error("the journal is closed")]
    Closed,
}

/// How a step ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// As meant.
    Done,
    /// Not; the reason is for people.
    Failed(String),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Record {
    Format(u32),
    Snapshot(Box<Desired>),
    Change(Change),
    Intent { id: u64, step: Step },
    Outcome { id: u64, outcome: Outcome },
}

/// What the journal held when it was opened.
#[derive(Debug, Default)]
pub struct Recovered {
    /// Steps that were begun and whose end is not known.
    pub unfinished: Vec<Step>,
    /// Why the file's end was dropped, where it was.
    pub damage: Option<String>,
    /// There was none.
    pub begun: bool,
}

/// A step that was announced and is not yet settled.
#[derive(Debug)]
#[must_use]
pub struct IntentId(u64);

struct Entry {
    records: Vec<Record>,
    durable: bool,
    done: oneshot::Sender<Result<(), JournalError>>,
}

/// How writing went so far.
#[derive(Debug, Default)]
struct Trouble {
    /// Attempts that failed.
    errors: u64,
    /// Why the newest one did.
    now: Option<String>,
}

/// The open journal. Clones share it.
#[derive(Debug, Clone)]
pub struct Journal {
    entries: mpsc::Sender<Entry>,
    desired: watch::Receiver<Arc<Desired>>,
    trouble: watch::Receiver<Trouble>,
    next_intent: Arc<std::sync::atomic::AtomicU64>,
    witness: Witness,
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Entry")
            .field("records", &self.records)
            .finish_non_exhaustive()
    }
}

impl Journal {
    /// Opens the journal in `dir`, an empty one where there is none. The file is written anew first, so that what
    /// was replayed is one record again.
    ///
    /// # Errors
    /// [`JournalError`]; a damaged end is no error but reported in [`Recovered`], and kept beside the journal.
    pub fn open(dir: &Path) -> Result<(Self, Recovered), JournalError> {
        let path = dir.join(FILE);
        let (desired, recovered) = replay(&path)?;
        if recovered.begun || recovered.damage.is_some() {
            // Before the file that says otherwise is in its place.
            let forgot = dir.join(FORGOT_FILE);
            let why = recovered.damage.as_deref().unwrap_or("begun anew");
            std::fs::write(&forgot, why).map_err(io_error(&forgot, "written"))?;
        }
        let file = rewrite(dir, &desired)?;
        Ok((Self::over(dir, path, file, desired)?, recovered))
    }

    /// Over a file that holds what is desired.
    fn over(dir: &Path, path: PathBuf, file: JournalFile, desired: Desired) -> Result<Self, JournalError> {
        let (entries, inbox) = mpsc::channel(QUEUE);
        let (published, watched) = watch::channel(Arc::new(desired));
        let (told, trouble) = watch::channel(Trouble::default());
        let writer = Writer {
            dir: dir.to_owned(),
            path,
            file,
            published,
            trouble: told,
        };
        std::thread::Builder::new()
            .name("journal".into())
            .spawn(move || writer.run(inbox))
            .map_err(|source| JournalError::Io {
                path: dir.join(FILE),
                doing: "given a thread",
                source,
            })?;
        Ok(Self {
            entries,
            desired: watched,
            trouble,
            next_intent: Arc::default(),
            witness: Witness::default(),
        })
    }

    /// The same journal, of whose changes somebody is told.
    #[must_use]
    pub fn witnessed(self, witness: Witness) -> Self {
        Self { witness, ..self }
    }

    /// What is desired now.
    pub fn desired(&self) -> Arc<Desired> {
        self.desired.borrow().clone()
    }

    /// Changes what is desired; durable once this ends.
    ///
    /// # Errors
    /// [`JournalError`]; nothing changed then.
    pub async fn commit(&self, changes: impl IntoIterator<Item = Change>) -> Result<(), JournalError> {
        let changes: Vec<_> = changes.into_iter().collect();
        let what = changes.first().map_or("nothing", Change::name);
        let records = changes.into_iter().map(Record::Change).collect();
        self.witness.around(what, self.write(records, true)).await
    }

    /// Changes what is desired by what somebody else will say again (the coordinator, of a place in one stripe): it survives the
    /// agent's death, and a power cut may take it.
    ///
    /// # Errors
    /// [`JournalError`]; nothing changed then.
    pub async fn learn(&self, change: Change) -> Result<(), JournalError> {
        let (what, records) = (change.name(), vec![Record::Change(change)]);
        self.witness.around(what, self.write(records, false)).await
    }

    /// Announces a step.
    ///
    /// # Errors
    /// [`JournalError`]; the step must not be begun then.
    pub async fn intend(&self, step: &Step) -> Result<IntentId, JournalError> {
        let id = self
            .next_intent
            .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let step = step.clone();
        self.write(vec![Record::Intent { id, step }], false).await?;
        Ok(IntentId(id))
    }

    /// Records how an announced step ended.
    ///
    /// # Errors
    /// [`JournalError`]; after a restart the step counts as half done then.
    pub async fn settle(&self, intent: IntentId, outcome: Outcome) -> Result<(), JournalError> {
        let id = intent.0;
        self.write(vec![Record::Outcome { id, outcome }], false).await
    }

    /// Why it cannot be written, if the newest attempt failed and one of this moment fails too.
    pub async fn problem(&self) -> Option<String> {
        self.trouble.borrow().now.as_ref()?;
        // Nothing may be due for long, and the disk have room again.
        let _ = self.write(Vec::new(), true).await;
        self.trouble.borrow().now.clone()
    }

    /// Attempts to write that failed, since it was opened.
    pub fn errors(&self) -> u64 {
        self.trouble.borrow().errors
    }

    async fn write(&self, records: Vec<Record>, durable: bool) -> Result<(), JournalError> {
        let (done, ended) = oneshot::channel();
        let entry = Entry {
            records,
            durable,
            done,
        };
        self.entries.send(entry).await.map_err(|_| JournalError::Closed)?;
        ended.await.map_err(|_| JournalError::Closed)?
    }
}

/// Until when the journal in `dir` may have forgotten what it knew; `None` where it never was mended or begun anew.
///
/// # Errors
/// The operating system's.
pub fn forgot(dir: &Path) -> io::Result<Option<std::time::SystemTime>> {
    match std::fs::metadata(dir.join(FORGOT_FILE)) {
        Ok(found) => found.modified().map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

struct Writer {
    dir: PathBuf,
    path: PathBuf,
    file: JournalFile,
    published: watch::Sender<Arc<Desired>>,
    trouble: watch::Sender<Trouble>,
}

struct JournalFile {
    file: File,
    /// Bytes of whole records.
    bytes: u64,
    compacted_bytes: u64,
}

impl Writer {
    fn run(mut self, mut inbox: mpsc::Receiver<Entry>) {
        while let Some(first) = inbox.blocking_recv() {
            let mut batch = vec![first];
            while batch.len() < QUEUE {
                match inbox.try_recv() {
                    Ok(entry) => batch.push(entry),
                    Err(_) => break,
                }
            }
            self.write(batch);
            if self.file.bytes > self.file.compacted_bytes + COMPACT_AFTER_BYTES {
                let desired = self.published.borrow().clone();
                match rewrite(&self.dir, &desired) {
                    Ok(file) => self.file = file,
                    // The old file is still whole and open: go on with it.
                    Err(error) => {
                        tracing::warn!(%error, "the journal cannot be compacted");
                        self.file.compacted_bytes = self.file.bytes;
                    }
                }
            }
        }
    }

    /// Writes a batch in one go. On failure the file is cut back, so that a record is there wholly or not at all.
    fn write(&mut self, batch: Vec<Entry>) {
        let mut bytes = Vec::new();
        let mut accepted = Vec::with_capacity(batch.len());
        for entry in batch {
            let before = bytes.len();
            let encoded = entry
                .records
                .iter()
                .try_for_each(|record| frame::encode(record, &mut bytes));
            match encoded {
                Ok(()) => accepted.push(entry),
                Err(error) => {
                    bytes.truncate(before);
                    let _ = entry.done.send(Err(JournalError::Encode(error)));
                }
            }
        }
        let durable = accepted.iter().any(|entry| entry.durable);
        let written = if bytes.is_empty() {
            self.try_again()
        } else {
            let written = self.file.append(&bytes, durable);
            if let Err(source) = &written {
                tracing::error!(error = %source, path = %self.path.display(), "the journal cannot be written");
            }
            written
        };
        self.note(&written);
        let mut accepted = accepted;
        if written.is_ok() {
            // All at once: readers of the old state make the first fold a copy of everything.
            self.fold(accepted.iter_mut().flat_map(|entry| entry.records.drain(..)));
        }
        for entry in accepted {
            let answer = match &written {
                Ok(()) => Ok(()),
                Err(source) => Err(JournalError::Io {
                    path: self.path.clone(),
                    doing: "written",
                    source: io::Error::new(source.kind(), source.to_string()),
                }),
            };
            // Whoever asked may have gone; the record stands.
            let _ = entry.done.send(answer);
        }
    }
}

impl Writer {
    /// With nothing to write: whether it could be. Only a write of something tells, and a new file is the one that does no harm.
    fn try_again(&mut self) -> io::Result<()> {
        if self.trouble.borrow().now.is_some() {
            let desired = self.published.borrow().clone();
            self.file = rewrite(&self.dir, &desired).map_err(|error| match error {
                JournalError::Io { source, .. } => source,
                other => io::Error::other(other),
            })?;
        }
        Ok(())
    }

    fn note(&self, written: &io::Result<()>) {
        let why = written.as_ref().err().map(|source| {
            format!(
                "{} cannot be written: {source}; make room or mend the disk",
                self.path.display()
            )
        });
        self.trouble.send_if_modified(|trouble| {
            trouble.errors += u64::from(why.is_some());
            let changed = trouble.now != why;
            trouble.now = why;
            changed
        });
    }

    fn fold(&self, records: impl Iterator<Item = Record>) {
        self.published.send_if_modified(|desired| {
            let mut changed = false;
            for record in records {
                if let Record::Change(change) = record {
                    Arc::make_mut(desired).fold(change);
                    changed = true;
                }
            }
            changed
        });
    }
}

impl JournalFile {
    fn append(&mut self, bytes: &[u8], durable: bool) -> io::Result<()> {
        let result = self
            .file
            .write_all(bytes)
            .and_then(|()| if durable { self.file.sync_data() } else { Ok(()) });
        match result {
            Ok(()) => {
                self.bytes += bytes.len() as u64;
                Ok(())
            }
            Err(error) => {
                self.file.set_len(self.bytes)?;
                self.file.seek(SeekFrom::Start(self.bytes))?;
                Err(error)
            }
        }
    }
}

fn io_error(path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> JournalError {
    let path = path.to_owned();
    move |source| JournalError::Io { path, doing, source }
}

fn replay(path: &Path) -> Result<(Desired, Recovered), JournalError> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let begun = Recovered {
                begun: true,
                ..Recovered::default()
            };
            return Ok((Desired::default(), begun));
        }
        Err(error) => return Err(io_error(path, "opened")(error)),
    };
    let decoded: frame::Decoded<Record> = frame::decode(&mut file).map_err(io_error(path, "read"))?;
    let mut desired = Desired::default();
    let mut pending = std::collections::BTreeMap::new();
    for record in decoded.records {
        match record {
            Record::Format(FORMAT) => {}
            Record::Format(found) => {
                return Err(JournalError::Format {
                    path: path.to_owned(),
                    found,
                });
            }
            Record::Snapshot(snapshot) => desired = *snapshot,
            Record::Change(change) => desired.fold(change),
            Record::Intent { id, step } => {
                pending.insert(id, step);
            }
            Record::Outcome { id, .. } => {
                pending.remove(&id);
            }
        }
    }
    if decoded.damage.is_some() {
        let aside = path.with_file_name(DAMAGED_FILE);
        std::fs::copy(path, &aside).map_err(io_error(&aside, "written"))?;
    }
    let damage = decoded.damage.map(|why| {
        format!(
            "{why} behind byte {}; the file as it was is kept as {DAMAGED_FILE}",
            decoded.good_bytes
        )
    });
    let recovered = Recovered {
        unfinished: pending.into_values().collect(),
        damage,
        begun: false,
    };
    Ok((desired, recovered))
}

/// Writes a fresh file that says the same, and puts it in the old one's place.
fn rewrite(dir: &Path, desired: &Desired) -> Result<JournalFile, JournalError> {
    let new = dir.join(NEW_FILE);
    let path = dir.join(FILE);
    let mut bytes = Vec::new();
    for record in [
        Record::Format(FORMAT),
        Record::Snapshot(Box::new(desired.clone())),
    ] {
        frame::encode(&record, &mut bytes).map_err(JournalError::Encode)?;
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .open(&new)
        .map_err(io_error(&new, "made"))?;
    file.write_all(&bytes)
        .and_then(|()| file.sync_all())
        .map_err(io_error(&new, "written"))?;
    std::fs::rename(&new, &path).map_err(io_error(&path, "replaced"))?;
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(io_error(dir, "synced"))?;
    Ok(JournalFile {
        file,
        bytes: bytes.len() as u64,
        compacted_bytes: bytes.len() as u64,
    })
}

#[cfg(test)]
mod tests;
