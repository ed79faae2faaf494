//! A group over its devices: opened, asked, closed, thrown away.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use treeboot_types::Digest;

use super::error::{GroupError, io_error};
use super::label::{self, BEGIN, Label};
use super::probe::Probe;
use super::{BLOCK, Filler, Kind, Range, Ranges, State, StateFile, bcached, dm_cached};
use crate::bcache::{Bcache, CacheSuperblock, Uuid};
use crate::ioctl::holders;
use crate::{DeviceNumber, DmDevice, Line, Mapper, Mode, Sectors, Status, Table, Target};

/// Below this no kind has room for anything.
const LEAST: Sectors = Sectors(64 * 2048 + 8192);

/// A cache device: a disk, a partition, or a file as a loop device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheDevice {
    /// Its number.
    pub number: DeviceNumber,
    /// Its length.
    pub length: Sectors,
}

/// What a group is made of.
#[derive(Debug, Clone)]
pub struct Config {
    /// How it caches.
    pub kind: Kind,
    /// Where it keeps its state: local, and not on a cache device.
    pub folder: PathBuf,
    /// The cache devices, always in the same order. The label that each is given says when it was another's.
    pub devices: Vec<CacheDevice>,
}

/// Whether a group serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// It does.
    Good,
    /// It has failed, for this reason. Give every base the table of [`super::uncached`], then [`Group::discard`].
    Failed(String),
}

/// A cache group that is up.
#[derive(Debug)]
pub struct Group {
    pub(super) mapper: Arc<Mapper>,
    pub(super) folder: PathBuf,
    pub(super) state: StateFile,
    pub(super) layout: Layout,
    probe: Probe,
}

/// Where on the devices what is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layout {
    /// Kind dm-cache alone.
    pub(super) metadata: Option<Table>,
    pub(super) data: Table,
}

impl Group {
    /// Brings the group up over its devices, with what it cached before where that can be trusted, else empty. A group that
    /// runs already is taken over as it is; contents that are in it stay.
    ///
    /// # Errors
    /// [`GroupError::Foreign`]: nothing was written. [`GroupError::Other`]: rebuild it.
    pub fn open(mapper: Arc<Mapper>, config: &Config) -> Result<Self, GroupError> {
        let have = Sectors(config.devices.iter().map(|device| usable(device).0).sum());
        if have < LEAST {
            return Err(GroupError::TooSmall { have, need: LEAST });
        }
        fs::create_dir_all(&config.folder).map_err(io_error("make the folder", &config.folder))?;
        let boot = boot()?;
        let labels = config
            .devices
            .iter()
            .map(|device| label::read(device.number))
            .collect::<Result<Vec<_>, _>>()?;
        for (device, label) in config.devices.iter().zip(&labels) {
            if *label == Label::Foreign {
                return Err(GroupError::Foreign {
                    device: device.number,
                });
            }
        }
        for (device, label) in config.devices.iter().zip(&labels) {
            let holders = holders(Path::new("/sys"), device.number);
            if *label == Label::Blank && !holders.is_empty() {
                return Err(GroupError::InUse {
                    device: device.number,
                    holders,
                });
            }
        }
        let found = StateFile::read(&config.folder).map_err(io_error("read the state in", &config.folder))?;
        let found = found.filter(|file| continues(file.state(), config.kind, &labels, &boot));
        let running = mapper.find(&DmDevice::CacheData)?.is_some();
        if running && found.is_none() {
            return Err(GroupError::Other {
                folder: config.folder.clone(),
            });
        }
        let (state, is_new) = match found {
            Some(state) => (state, false),
            None => (begin_life(config, have, boot.clone())?, true),
        };
        let layout = Layout::new(state.state(), &config.devices)?;
        let mut group = Self {
            mapper,
            folder: config.folder.clone(),
            state,
            layout,
            probe: Probe::default(),
        };
        group.change(|state| {
            state.boot = boot;
            state.closed = false;
        })?;
        let life = group.life();
        for (index, device) in config.devices.iter().enumerate() {
            if labels.get(index) != Some(&Label::Member(life, index)) {
                label::write(device.number, life, index)?;
            }
        }
        group.ensure_devices()?;
        match group.kind() {
            Kind::DmCache => dm_cached::start(&group, is_new)?,
            Kind::Bcache => bcached::start(&group, is_new)?,
        }
        Ok(group)
    }

    /// Takes a content in, or finds it there, and gives the table of its base. `verity` has its checked bytes, `length` is that
    /// device's.
    ///
    /// # Errors
    /// [`GroupError`]; nothing of the content is left in use then.
    pub fn add(
        &mut self,
        content: Digest,
        verity: DeviceNumber,
        length: Sectors,
    ) -> Result<Table, GroupError> {
        let path = self.folder.clone();
        let range = self
            .state
            .place(content, length)
            .map_err(io_error("save the state in", path))?
            .map_err(|source| GroupError::Place { content, source })?;
        match self.kind() {
            Kind::DmCache => dm_cached::add(self, content, range, verity),
            Kind::Bcache => bcached::add(self, content, range, verity),
        }
    }

    /// Takes a content out for ever: its addresses become errors, and nobody reads what is cached of it again. Its base must
    /// be gone. Nothing is done where it is not in.
    ///
    /// # Errors
    /// [`GroupError`]; it can be tried again.
    pub fn remove(&mut self, content: &Digest) -> Result<(), GroupError> {
        if let Some(range) = self.range(content) {
            match self.kind() {
                Kind::DmCache => dm_cached::take_out(self, content, range)?,
                Kind::Bcache => bcached::remove(self, content)?,
            }
        }
        self.change(|state| {
            state.ranges.forget(content);
        })?;
        super::fill::forget(&self.folder, content);
        Ok(())
    }

    /// Takes a content out for now, as before a shutdown: what is cached of it is used when it is added again. Its base must
    /// be gone.
    ///
    /// # Errors
    /// [`GroupError`]; it can be tried again.
    pub fn release(&mut self, content: &Digest) -> Result<(), GroupError> {
        match (self.range(content), self.kind()) {
            (None, _) => Ok(()),
            (Some(range), Kind::DmCache) => dm_cached::take_out(self, content, range),
            (Some(_), Kind::Bcache) => bcached::release(self, content),
        }
    }

    /// What fills the cache with a content that is in the group. `verity` as given to [`Self::add`].
    ///
    /// # Errors
    /// [`GroupError::Absent`]; a device that cannot be opened.
    pub fn filler(&self, content: &Digest, verity: DeviceNumber) -> Result<Filler, GroupError> {
        let range = self.range(content).ok_or(GroupError::Absent(*content))?;
        let through = match self.kind() {
            Kind::DmCache => None,
            Kind::Bcache => Some(bcached::number(self, content)?),
        };
        Filler::open(self, content, range, verity, through)
    }

    /// Whether it serves: what the kernel says, and whether its devices can be read. To be asked every second or so.
    ///
    /// # Errors
    /// [`GroupError`]: the kernel could not be asked.
    pub fn health(&self) -> Result<Health, GroupError> {
        let health = match self.kind() {
            Kind::DmCache => dm_cached::health(self)?,
            Kind::Bcache => bcached::health(self)?,
        };
        Ok(match health {
            Health::Good => match self.probe.look(self.kind(), &self.layout) {
                Some(why) => Health::Failed(why),
                None => Health::Good,
            },
            failed @ Health::Failed(_) => failed,
        })
    }

    /// Has what is below the base of a content ask again whatever it gave up after an error: the cache, and verity, behind which no
    /// parent may have answered for too long. Until then all its reads fail where it gave up both. Says whether it gave up the cache
    /// alone. Nothing is done where the content is not cached.
    ///
    /// # Errors
    /// [`GroupError::Mapper`].
    pub fn reinstate(mapper: &Mapper, content: &Digest) -> Result<bool, GroupError> {
        let device = DmDevice::Served(*content);
        if mapper.find(&device)?.is_none() {
            return Ok(false);
        }
        let mut up = Vec::new();
        for line in mapper.status(&device)? {
            let Status::Multipath(status) = line.status else {
                continue;
            };
            for path in status.groups.iter().flat_map(|group| &group.paths) {
                up.push(path.up);
                if !path.up {
                    mapper.message(&device, Sectors(0), &format!("reinstate_path {}", path.device))?;
                }
            }
        }
        Ok(up == [false, true])
    }

    /// Contents that have a place, with their ranges. Whether each is in use, only the kernel knows.
    pub fn contents(&self) -> impl Iterator<Item = (&Digest, &Range)> {
        self.state.state().ranges.iter()
    }

    /// How it caches.
    pub fn kind(&self) -> Kind {
        self.state.state().kind
    }

    /// Ends the group in order. All contents must have been released. What is cached is used when it is opened again.
    ///
    /// # Errors
    /// [`GroupError`]; it can be tried again after [`Self::open`].
    pub fn close(mut self) -> Result<(), GroupError> {
        match self.kind() {
            Kind::DmCache => {
                self.mapper.remove(&DmDevice::CacheGroup)?;
                self.mapper.remove(&DmDevice::Origins)?;
            }
            Kind::Bcache => bcached::end_set(&self.mapper, &Bcache::new()?, self.life())?,
        }
        self.mapper.remove(&DmDevice::CacheData)?;
        self.mapper.remove(&DmDevice::CacheMetadata)?;
        self.change(|state| state.closed = true)
    }

    /// Throws away a group that has failed or is to be rebuilt, whatever is left of it, together with what it cached. No base
    /// may be over it. Cache devices that fail are not written to.
    ///
    /// # Errors
    /// [`GroupError`]; it can be tried again.
    pub fn discard(mapper: &Mapper, folder: &Path) -> Result<(), GroupError> {
        let found = StateFile::read(folder).map_err(io_error("read the state in", folder))?;
        // From here on the next opening begins a new life, whatever happens.
        let life = found.map(|file| file.state().life);
        StateFile::forget(folder).map_err(io_error("forget the state in", folder))?;
        super::fill::forget_all(folder);
        let seen = mapper.list()?;
        let served = seen
            .iter()
            .filter(|seen| matches!(seen.device, DmDevice::Served(_)));
        let cached = seen
            .iter()
            .filter(|seen| matches!(seen.device, DmDevice::Cached(_)));
        for seen in served.chain(cached) {
            mapper.remove(&seen.device)?;
        }
        mapper.remove(&DmDevice::CacheGroup)?;
        mapper.remove(&DmDevice::Origins)?;
        bcached::discard(mapper, folder, life)?;
        mapper.remove(&DmDevice::CacheGuard)?;
        mapper.remove(&DmDevice::CacheData)?;
        mapper.remove(&DmDevice::CacheMetadata)?;
        Ok(())
    }

    pub(super) fn life(&self) -> Uuid {
        self.state.state().life
    }

    pub(super) fn range(&self, content: &Digest) -> Option<Range> {
        self.state.state().ranges.get(content)
    }

    pub(super) fn change(&mut self, change: impl FnOnce(&mut State)) -> Result<(), GroupError> {
        let folder = self.folder.clone();
        self.state
            .change(change)
            .map_err(io_error("save the state in", folder))
    }

    /// The number of a device that must be there.
    pub(super) fn number(&self, device: &DmDevice) -> Result<DeviceNumber, GroupError> {
        match self.mapper.number(device)? {
            Some(number) => Ok(number),
            None => Err(crate::MapperError::Absent {
                device: device.clone(),
            }
            .into()),
        }
    }

    fn ensure_devices(&self) -> Result<(), GroupError> {
        if let Some(table) = &self.layout.metadata {
            self.mapper
                .ensure(&DmDevice::CacheMetadata, table, Mode::ReadWrite)?;
        }
        self.mapper
            .ensure(&DmDevice::CacheData, &self.layout.data, Mode::ReadWrite)?;
        Ok(())
    }
}

impl Layout {
    fn new(state: &State, devices: &[CacheDevice]) -> Result<Self, GroupError> {
        let mut rest = state.metadata;
        let (mut metadata, mut data) = (Vec::new(), Vec::new());
        for device in devices {
            let length = usable(device);
            // Metadata stands at the very beginning, so that devices can be added behind.
            let taken = Sectors(rest.0.min(length.0));
            rest = Sectors(rest.0 - taken.0);
            push(&mut metadata, device, BEGIN, taken);
            // Whole blocks, so that no block lies on two devices.
            let left = Sectors((length.0 - taken.0) / BLOCK.0 * BLOCK.0);
            push(&mut data, device, Sectors(BEGIN.0 + taken.0), left);
        }
        Ok(Self {
            metadata: if metadata.is_empty() {
                None
            } else {
                Some(Table::new(metadata)?)
            },
            data: Table::new(data)?,
        })
    }
}

/// Appends a run of a device, unless it is empty.
fn push(lines: &mut Vec<Line>, device: &CacheDevice, offset: Sectors, length: Sectors) {
    if length.0 > 0 {
        let start = lines
            .last()
            .map_or(Sectors(0), |line| Sectors(line.start.0 + line.length.0));
        lines.push(Line {
            start,
            length,
            target: Target::Linear {
                device: device.number,
                offset,
            },
        });
    }
}

fn usable(device: &CacheDevice) -> Sectors {
    Sectors(device.length.0.saturating_sub(BEGIN.0))
}

/// Whether what is on the devices is what the state says, and can be trusted.
fn continues(state: &State, kind: Kind, labels: &[Label], boot: &str) -> bool {
    let members = labels
        .iter()
        .enumerate()
        .take_while(|(index, label)| **label == Label::Member(state.life, *index))
        .count();
    let added = &labels[members..];
    let grown = added.iter().all(|label| *label == Label::Blank);
    // A set of bcache has the size that it was made with.
    let may_grow = kind == Kind::DmCache || added.is_empty();
    state.kind == kind && members > 0 && grown && may_grow && (state.closed || state.boot == boot)
}

fn begin_life(config: &Config, have: Sectors, boot: String) -> Result<StateFile, GroupError> {
    let life = random_uuid()?;
    let metadata = match config.kind {
        Kind::DmCache => dm_cached::metadata_for(have),
        Kind::Bcache => Sectors(0),
    };
    super::fill::forget_all(&config.folder);
    bcached::forget_superblocks(&config.folder);
    let state = State {
        kind: config.kind,
        life,
        boot,
        closed: false,
        metadata,
        ranges: Ranges::new(BLOCK),
    };
    StateFile::create(&config.folder, state).map_err(io_error("save the state in", &config.folder))
}

fn boot() -> Result<String, GroupError> {
    let path = "/proc/sys/kernel/random/boot_id";
    fs::read_to_string(path)
        .map(|text| text.trim_end().to_owned())
        .map_err(io_error("read", path))
}

fn random_uuid() -> Result<Uuid, GroupError> {
    let path = "/proc/sys/kernel/random/uuid";
    let text = fs::read_to_string(path).map_err(io_error("read", path))?;
    text.trim_end()
        .parse()
        .map_err(|error: crate::bcache::UuidError| io_error("understand", path)(std::io::Error::other(error)))
}

/// The superblock of the cache that this group's data device is to become.
pub(super) fn cache_superblock(group: &Group) -> Result<CacheSuperblock, GroupError> {
    let have = group.layout.data.length();
    CacheSuperblock::new(random_uuid()?, group.life(), have).ok_or(GroupError::TooSmall { have, need: LEAST })
}
