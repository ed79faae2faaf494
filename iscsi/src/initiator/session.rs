//! One session: one connection to one target, many commands in flight.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot, watch};
use treeboot_types::Iqn;

use super::command::{self, Capacity, Cdb, Identity};
use super::connect::{self, Who};
use super::connection::{Clock, Connection, Health};
use super::error::{CommandError, ConnectError, SessionEnd};
use super::exchange::{Completed, Exchange, Job, SLOTS, Transfer};
use super::liveness::{Liveness, Silence};
use crate::login::{Chap, DigestTerms};
use crate::scsi::alua::{self, Reported};

/// The most that one command reads or writes; longer requests are split. It fits one Data-In PDU.
const MAX_COMMAND_BYTES: u32 = 1 << 20;

/// How often a command is repeated after UNIT ATTENTION, BUSY or TASK SET FULL. A unit has at most a handful of
/// attentions to report, and with doubling delays this is some 1.3 s of BUSY.
const REPEATS: u32 = 8;

/// The first delay after BUSY; doubled each time.
const BUSY_FIRST_MS: u64 = 5;

/// BUSY and TASK SET FULL (SAM-5 §5.3).
const BUSY: u8 = 0x08;
const TASK_SET_FULL: u8 = 0x28;

/// Time limits of a session, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionTimeouts {
    /// For name, TCP connection and login together, redirections included.
    pub connect_ms: u64,
    /// For one command; after it the command is aborted.
    pub command_ms: u64,
    /// When the target counts as silent.
    pub silence: Silence,
}

impl Default for SessionTimeouts {
    fn default() -> Self {
        Self {
            connect_ms: 3_000,
            // As long as a guest's own limit on a disk command (Linux, SCSI).
            command_ms: 30_000,
            silence: Silence::default(),
        }
    }
}

/// What is wanted of the CRC32C digests after headers and data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Digests {
    /// After headers.
    pub header: DigestTerms,
    /// After data.
    pub data: DigestTerms,
}

impl Default for Digests {
    /// None: images are checked against their hash tree; TCP and Ethernet have their own sums.
    fn default() -> Self {
        Self {
            header: DigestTerms::Never,
            data: DigestTerms::Never,
        }
    }
}

/// Where to log in, and as whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionOptions {
    /// `host:port`; an IPv6 address in brackets.
    pub portal: String,
    /// The target there.
    pub target: Iqn,
    /// Our name.
    pub initiator: Iqn,
    /// What we prove ourselves by, and the target to us; `None`: nobody does. With it, a target that does not ask for
    /// CHAP is refused.
    pub chap: Option<Chap>,
    /// Digests.
    pub digests: Digests,
    /// Time limits.
    pub timeouts: SessionTimeouts,
}

impl SessionOptions {
    /// Without CHAP and digests, with the usual time limits.
    pub fn new(portal: impl Into<String>, target: Iqn, initiator: Iqn) -> Self {
        Self {
            portal: portal.into(),
            target,
            initiator,
            chap: None,
            digests: Digests::default(),
            timeouts: SessionTimeouts::default(),
        }
    }
}

/// Which data a [`command`](Session::command) has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CommandData {
    /// None.
    None,
    /// Up to so many bytes from the target.
    In(u32),
    /// These, for the target.
    Out(Bytes),
}

/// A session in full feature phase. Dropping it logs out in the background.
#[derive(Debug)]
pub struct Session {
    jobs: mpsc::Sender<Job>,
    health: watch::Receiver<Health>,
    capacities: Mutex<BTreeMap<u16, Capacity>>,
    /// How often something was heard of another state of access.
    access_news: watch::Sender<u64>,
    portal: String,
    target: Iqn,
    peer: SocketAddr,
}

impl Session {
    /// Connects and logs in. Call it within a tokio runtime.
    ///
    /// # Errors
    /// [`ConnectError`] names the portal and says what it did.
    pub async fn connect(options: SessionOptions) -> Result<Self, ConnectError> {
        let SessionOptions {
            portal,
            target,
            initiator,
            chap,
            digests,
            timeouts,
        } = options;
        let who = Who {
            initiator: &initiator,
            target: Some(&target),
            chap: chap.as_ref(),
            digests,
        };
        let log_in = connect::log_in(&portal, who);
        let logged_in = connect::within(timeouts.connect_ms, &portal, log_in).await?;
        let clock = Clock::start();
        // A full house of commands under way, and as many on their way to the task.
        let (jobs, queue) = mpsc::channel(SLOTS);
        let (health_tx, health) = watch::channel(Health::Fine);
        let connection = Connection::new(
            logged_in.stream,
            Exchange::new(logged_in.terms, timeouts.command_ms),
            Liveness::new(clock.now(), timeouts.silence),
            clock,
            queue,
            health_tx,
        );
        tokio::spawn(connection.run());
        Ok(Self {
            jobs,
            health,
            capacities: Mutex::default(),
            access_news: watch::Sender::new(0),
            portal,
            target,
            peer: logged_in.peer,
        })
    }

    /// The portal as it was given.
    pub fn portal(&self) -> &str {
        &self.portal
    }

    /// The target.
    pub fn target(&self) -> &Iqn {
        &self.target
    }

    /// The address that it is connected to, after redirections.
    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// Waits for the session's end and says why it ended.
    pub async fn ended(&self) -> SessionEnd {
        let mut health = self.health.clone();
        let ended = health.wait_for(|health| matches!(health, Health::Ended(_))).await;
        match ended.as_deref() {
            Ok(Health::Ended(why)) => why.clone(),
            // The task died without a word; only a bug of ours can do that.
            _ => SessionEnd::Closed,
        }
    }

    /// Changes when a command hears that the state of access to a unit changed or forbids it.
    pub(super) fn access_news(&self) -> watch::Receiver<u64> {
        self.access_news.subscribe()
    }

    /// How the session is, and its changes.
    pub(super) fn health(&self) -> watch::Receiver<Health> {
        self.health.clone()
    }

    /// Logs out, and waits for that. Commands under way end first.
    pub async fn close(self) {
        let Self { jobs, mut health, .. } = self;
        drop(jobs);
        // An error means that the task is gone already.
        drop(health.wait_for(|health| matches!(health, Health::Ended(_))).await);
    }

    /// Reads `bytes` from `offset` on, both multiples of the unit's block.
    ///
    /// # Errors
    /// [`CommandError`]; never fewer bytes than asked for.
    pub async fn read(&self, lun: u16, offset: u64, bytes: u32) -> Result<Bytes, CommandError> {
        let block = self.check(lun, offset, bytes.into()).await?;
        if bytes <= MAX_COMMAND_BYTES {
            return self.read_one(lun, block, offset, bytes).await;
        }
        let mut whole = BytesMut::with_capacity(bytes as usize);
        while (whole.len() as u64) < u64::from(bytes) {
            let at = whole.len() as u64;
            let some = (u64::from(bytes) - at).min(MAX_COMMAND_BYTES.into()) as u32;
            whole.extend_from_slice(&self.read_one(lun, block, offset + at, some).await?);
        }
        Ok(whole.freeze())
    }

    async fn read_one(&self, lun: u16, block: u32, offset: u64, bytes: u32) -> Result<Bytes, CommandError> {
        let cdb = command::read(offset / u64::from(block), bytes / block);
        let data = self.perform(lun, cdb, Transfer::Read(bytes)).await?.data;
        if data.len() == bytes as usize {
            return Ok(data);
        }
        Err(CommandError::Short {
            expected: bytes,
            got: data.len() as u32,
        })
    }

    /// Writes `data` from `offset` on, both multiples of the unit's block.
    ///
    /// # Errors
    /// [`CommandError`]; the data may then be written in part.
    pub async fn write(&self, lun: u16, offset: u64, data: Bytes) -> Result<(), CommandError> {
        let block = self.check(lun, offset, data.len() as u64).await?;
        let mut at = 0;
        while at < data.len() {
            let end = data.len().min(at + MAX_COMMAND_BYTES as usize);
            let part = data.slice(at..end);
            let cdb = command::write((offset + at as u64) / u64::from(block), part.len() as u32 / block);
            let expected = part.len() as u32;
            let done = self.perform(lun, cdb, Transfer::Write(part)).await?;
            if let crate::pdu::Residual::Under(left) = done.residual {
                let got = expected.saturating_sub(left);
                return Err(CommandError::Short { expected, got });
            }
            at = end;
        }
        Ok(())
    }

    /// Makes every ended write durable (SYNCHRONIZE CACHE).
    ///
    /// # Errors
    /// [`CommandError`].
    pub async fn flush(&self, lun: u16) -> Result<(), CommandError> {
        let done = self
            .perform(lun, command::synchronize_cache(), Transfer::None)
            .await;
        done.map(drop)
    }

    /// The unit's size; asked for once a session.
    ///
    /// # Errors
    /// [`CommandError`].
    pub async fn capacity(&self, lun: u16) -> Result<Capacity, CommandError> {
        if let Some(known) = self.known_capacity(lun) {
            return Ok(known);
        }
        const BYTES: u32 = 32;
        let long = self
            .perform(lun, command::read_capacity_16(BYTES), Transfer::Read(BYTES))
            .await;
        let capacity = match long {
            Ok(done) => command::parse_capacity_16(&done.data),
            // A target that is too old for the long form.
            Err(CommandError::Sense(sense)) if sense.is_invalid_opcode() => {
                let short = self
                    .perform(lun, command::read_capacity_10(), Transfer::Read(8))
                    .await?;
                command::parse_capacity_10(&short.data)
            }
            Err(error) => return Err(error),
        };
        let capacity = capacity.ok_or(CommandError::Answer {
            command: "READ CAPACITY",
        })?;
        self.capacities.lock().insert(lun, capacity);
        Ok(capacity)
    }

    fn known_capacity(&self, lun: u16) -> Option<Capacity> {
        self.capacities.lock().get(&lun).copied()
    }

    /// The LUNs of the target (REPORT LUNS), at most 2,048 of them.
    ///
    /// # Errors
    /// [`CommandError`].
    pub async fn report_luns(&self) -> Result<Vec<u16>, CommandError> {
        const BYTES: u32 = 8 + 2_048 * 8;
        let done = self
            .perform(0, command::report_luns(BYTES), Transfer::Read(BYTES))
            .await?;
        command::parse_luns(&done.data).ok_or(CommandError::Answer {
            command: "REPORT LUNS",
        })
    }

    /// What the unit says it is (standard INQUIRY).
    ///
    /// # Errors
    /// [`CommandError`].
    pub async fn inquiry(&self, lun: u16) -> Result<Identity, CommandError> {
        const BYTES: u16 = 96;
        let done = self
            .perform(lun, command::inquiry(BYTES), Transfer::Read(BYTES.into()))
            .await?;
        command::parse_inquiry(&done.data).ok_or(CommandError::Answer { command: "INQUIRY" })
    }

    /// In which state the access to the unit is by way of this target (ALUA); `None`: the target knows no such states.
    ///
    /// # Errors
    /// [`CommandError`].
    pub async fn access(&self, lun: u16) -> Result<Option<Reported>, CommandError> {
        const BYTES: u16 = 1024;
        let get = |cdb| self.perform(lun, cdb, Transfer::Read(BYTES.into()));
        let standard = self
            .perform(lun, command::inquiry(36), Transfer::Read(36))
            .await?;
        if alua::tpgs(&standard.data) == 0 {
            return Ok(None);
        }
        let (page, report) = tokio::join!(
            get(command::inquiry_page(0x83, BYTES)),
            get(command::report_target_port_groups(BYTES.into())),
        );
        let group = alua::own_group(&page?.data);
        alua::state_of(&report?.data, group)
            .map(Some)
            .ok_or(CommandError::Answer {
                command: "REPORT TARGET PORT GROUPS",
            })
    }

    /// Carries out a command that no other function is for; `cdb` has up to 16 bytes. Gives the data that came in.
    ///
    /// # Errors
    /// [`CommandError`].
    pub async fn command(&self, lun: u16, cdb: &[u8], data: CommandData) -> Result<Bytes, CommandError> {
        let mut whole = [0; 16];
        for (to, from) in whole.iter_mut().zip(cdb) {
            *to = *from;
        }
        let transfer = match data {
            CommandData::None => Transfer::None,
            CommandData::In(bytes) => Transfer::Read(bytes),
            CommandData::Out(data) => Transfer::Write(data),
        };
        self.perform(lun, whole, transfer).await.map(|done| done.data)
    }

    /// Whether the unit takes commands (TEST UNIT READY); clears its unit attentions.
    ///
    /// # Errors
    /// [`CommandError`].
    pub async fn test_unit_ready(&self, lun: u16) -> Result<(), CommandError> {
        let done = self
            .perform(lun, command::test_unit_ready(), Transfer::None)
            .await;
        done.map(drop)
    }

    /// Whether the unit refuses writes (MODE SENSE); a target that does not say takes them.
    ///
    /// # Errors
    /// [`CommandError`], where the unit could not be asked.
    pub async fn is_write_protected(&self, lun: u16) -> Result<bool, CommandError> {
        const BYTES: u8 = 252;
        let done = self
            .perform(lun, command::mode_sense_6(BYTES), Transfer::Read(BYTES.into()))
            .await;
        match done {
            Ok(done) => Ok(done.data.get(2).is_some_and(|byte| byte & 0x80 != 0)),
            Err(CommandError::Sense(sense)) if sense.is_lasting() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Checks a range; gives the block size.
    async fn check(&self, lun: u16, offset: u64, bytes: u64) -> Result<u32, CommandError> {
        let capacity = match self.known_capacity(lun) {
            Some(known) => known,
            None => self.capacity(lun).await?,
        };
        let block = u64::from(capacity.block_bytes);
        let aligned = offset.is_multiple_of(block) && bytes.is_multiple_of(block) && bytes > 0;
        match offset.checked_add(bytes) {
            Some(end) if aligned && end <= capacity.bytes => Ok(capacity.block_bytes),
            _ => Err(CommandError::OutOfRange {
                lun,
                offset,
                bytes,
                lun_bytes: capacity.bytes,
                block_bytes: capacity.block_bytes,
            }),
        }
    }

    /// Carries a command out, again where the target asks for patience.
    async fn perform(&self, lun: u16, cdb: Cdb, transfer: Transfer) -> Result<Completed, CommandError> {
        let mut busy_ms = BUSY_FIRST_MS;
        for _ in 0..REPEATS {
            match self.perform_once(lun, cdb, transfer.clone()).await {
                Err(CommandError::Sense(sense)) if sense.is_unit_attention() => {}
                Err(CommandError::Status {
                    status: BUSY | TASK_SET_FULL,
                }) => {
                    tokio::time::sleep(Duration::from_millis(busy_ms)).await;
                    busy_ms *= 2;
                }
                other => return other,
            }
        }
        self.perform_once(lun, cdb, transfer).await
    }

    async fn perform_once(&self, lun: u16, cdb: Cdb, transfer: Transfer) -> Result<Completed, CommandError> {
        let (reply, answer) = oneshot::channel();
        if self.jobs.send(Job::new(lun, cdb, transfer, reply)).await.is_err() {
            return Err(CommandError::Lost(self.ended().await));
        }
        match answer.await {
            Ok(result) => {
                if matches!(&result, Err(CommandError::Sense(sense)) if sense.is_about_access()) {
                    self.access_news.send_modify(|news| *news = news.wrapping_add(1));
                }
                result
            }
            Err(_) => Err(CommandError::Lost(self.ended().await)),
        }
    }
}
