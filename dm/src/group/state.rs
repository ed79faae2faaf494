//! What a cache group must remember: the life of its cache, whether it was closed, and every range, each before it is used.
//! One small text file, replaced whole.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::{Kind, Range, RangeError, Ranges};
use crate::Sectors;
use crate::bcache::Uuid;
use treeboot_types::Digest;

const FILE: &str = "group";
const HEADING: &str = "treeboot-cache-group 1";

/// A cache group's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    /// How it caches.
    pub kind: Kind,
    /// This life of the cache: a new one begins with an empty cache. Kind bcache: the set's UUID.
    pub life: Uuid,
    /// The boot of the machine in which it was opened last.
    pub boot: String,
    /// It was closed in order since. A cache that was not, and whose machine was restarted, is thrown away.
    pub closed: bool,
    /// Kind dm-cache: length of the metadata, fixed for this life.
    pub metadata: Sectors,
    /// The ranges of this life.
    pub ranges: Ranges,
}

/// Why a text is no state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line} of the cache group's state is not understood: '{text}'")]
pub struct StateError {
    /// Counted from 1.
    pub line: usize,
    /// What stands there.
    pub text: String,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{HEADING}")?;
        writeln!(f, "kind {}", self.kind)?;
        writeln!(f, "life {}", self.life)?;
        writeln!(f, "boot {}", self.boot)?;
        writeln!(f, "closed {}", self.closed)?;
        writeln!(f, "metadata {}", self.metadata)?;
        writeln!(f, "block {}", self.ranges.block())?;
        writeln!(f, "next {}", self.ranges.next())?;
        for (content, range) in self.ranges.iter() {
            writeln!(f, "content {content} {} {}", range.start, range.length)?;
        }
        writeln!(f, "end")
    }
}

impl FromStr for State {
    type Err = StateError;
    fn from_str(text: &str) -> Result<Self, StateError> {
        let mut lines = text.lines().enumerate();
        let mut take = |word: &str| -> Result<String, StateError> {
            let (number, line) = lines.next().unwrap_or((0, ""));
            let value = line.strip_prefix(word).and_then(|rest| rest.strip_prefix(' '));
            value.map(str::to_owned).ok_or_else(|| broken(number, line))
        };
        if take("treeboot-cache-group")? != "1" {
            return Err(broken(0, text.lines().next().unwrap_or_default()));
        }
        let kind = parse(1, &take("kind")?)?;
        let life = parse(2, &take("life")?)?;
        let boot = take("boot")?;
        let closed = parse(4, &take("closed")?)?;
        let metadata = Sectors(parse(5, &take("metadata")?)?);
        let block = Sectors(parse(6, &take("block")?)?);
        let next = Sectors(parse(7, &take("next")?)?);
        let mut placed = Vec::new();
        let mut ended = false;
        for (number, line) in lines {
            let words: Vec<&str> = line.split(' ').collect();
            match words.as_slice() {
                ["content", content, start, length] if !ended => placed.push((
                    parse::<Digest>(number, content)?,
                    Sectors(parse(number, start)?),
                    Sectors(parse(number, length)?),
                )),
                ["end"] if !ended => ended = true,
                _ => return Err(broken(number, line)),
            }
        }
        let ranges = Ranges::restore(block, next, &placed).filter(|_| ended && block.0 > 0);
        Ok(Self {
            kind,
            life,
            boot,
            closed,
            metadata,
            ranges: ranges.ok_or_else(|| broken(7, "ranges that do not fit together, or no end"))?,
        })
    }
}

fn parse<T: FromStr>(line: usize, text: &str) -> Result<T, StateError> {
    text.parse().map_err(|_| broken(line, text))
}

fn broken(line: usize, text: &str) -> StateError {
    StateError {
        line: line + 1,
        text: text.chars().take(120).collect(),
    }
}

/// The state's file.
#[derive(Debug)]
pub struct StateFile {
    path: PathBuf,
    state: State,
}

impl StateFile {
    /// Reads the state in `folder`; `None` where there is none, or none that can be read: then a new life begins, because
    /// an address whose use is not known could be another image's.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn read(folder: &Path) -> io::Result<Option<Self>> {
        let path = folder.join(FILE);
        match fs::read(&path) {
            Ok(bytes) => Ok(String::from_utf8_lossy(&bytes)
                .parse()
                .ok()
                .map(|state| Self { path, state })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes a first state.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn create(folder: &Path, state: State) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        let path = folder.join(FILE);
        write(&path, &state)?;
        Ok(Self { path, state })
    }

    /// Removes the state in `folder`, so that the next life is a new one.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn forget(folder: &Path) -> io::Result<()> {
        match fs::remove_file(folder.join(FILE)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => File::open(folder)?.sync_all(),
        }
    }

    /// What is saved.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Saves a changed state; it is not changed where it cannot be saved.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn change(&mut self, change: impl FnOnce(&mut State)) -> io::Result<()> {
        let mut changed = self.state.clone();
        change(&mut changed);
        if changed != self.state {
            write(&self.path, &changed)?;
            self.state = changed;
        }
        Ok(())
    }

    /// The content's range; a new one is saved before this gives it.
    ///
    /// # Errors
    /// [`RangeError`] within, where there is none; outside, it cannot be written.
    pub fn place(&mut self, content: Digest, length: Sectors) -> io::Result<Result<Range, RangeError>> {
        let mut placed = Err(RangeError::Exhausted);
        self.change(|state| placed = state.ranges.place(content, length))?;
        Ok(placed)
    }
}

/// Whole or not at all, and there after a power cut.
fn write(path: &Path, state: &State) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = File::create(&new)?;
    file.write_all(state.to_string().as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    match path.parent() {
        Some(folder) => File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> State {
        let mut ranges = Ranges::new(Sectors(128));
        ranges.place(Digest([1; 32]), Sectors(1000)).unwrap();
        ranges.place(Digest([2; 32]), Sectors(1)).unwrap();
        ranges.forget(&Digest([1; 32]));
        State {
            kind: Kind::DmCache,
            life: Uuid([7; 16]),
            boot: "0d7b".into(),
            closed: false,
            metadata: Sectors(8192),
            ranges,
        }
    }

    #[test]
    fn a_state_prints_as_it_parses() {
        assert_eq!(state().to_string().parse(), Ok(state()));
    }

    #[test]
    fn a_state_cut_anywhere_is_none() {
        let text = state().to_string();
        // Without its last line break it is whole still.
        for cut in 0..text.len() - 1 {
            assert!(text[..cut].parse::<State>().is_err(), "{cut}");
        }
        assert!(format!("{text}end\n").parse::<State>().is_err());
    }
}
