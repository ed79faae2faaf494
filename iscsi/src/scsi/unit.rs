//! A logical unit: what its commands mean for its device, and the state that initiators share.

mod reserve;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;
use treeboot_block::Geometry;
use treeboot_types::Iqn;

use super::action::{Action, OutAction};
use super::alua::{self, AccessState, PortGroup};
use super::cdb::{Blocks, ByteCheck, Command};
use super::inquiry;
use super::mode::{Asked, Modes};
use super::opcodes;
use super::reservation::{InitiatorPort, Keeper, Reservations};
use super::sense::Sense;

/// The longest transfer of one command. Initiators split at it; it bounds what one write makes us hold.
pub const MAX_TRANSFER_BYTES: u64 = 8 << 20;
/// The longest WRITE SAME: no longer than a transfer, so that what it did can be read back by one command.
pub const MAX_WRITE_SAME_BYTES: u64 = MAX_TRANSFER_BYTES;
/// Descriptors of one UNMAP.
pub const MAX_UNMAP_DESCRIPTORS: usize = 256;
/// Unit attentions that wait for one nexus; the oldest goes when there are more.
const MAX_ATTENTIONS: usize = 16;

/// Who a logical unit says it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The target it belongs to.
    pub target: Iqn,
    /// Unit serial number: printable ASCII.
    pub serial: String,
    /// Product identification: printable ASCII, 16 characters of it are shown.
    pub product: String,
    /// What makes it the same unit on every path: equal on all targets that serve the same disk.
    pub ident: [u8; 16],
}

/// One session's relation to a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NexusId(u64);

/// One session's relation to a unit, with what the path of every command looks at.
#[derive(Debug)]
pub struct Nexus {
    id: NexusId,
    port: InitiatorPort,
    /// A unit attention waits.
    attention: AtomicBool,
}

#[derive(Debug)]
struct Attached {
    nexus: Arc<Nexus>,
    attentions: VecDeque<Sense>,
}

#[derive(Debug, Default)]
struct State {
    attached: HashMap<NexusId, Attached>,
    reserved: Option<NexusId>,
    reservations: Reservations,
    access: AccessState,
    /// It was another one before.
    access_changed: bool,
}

/// A logical unit.
#[derive(Debug)]
pub struct LogicalUnit {
    number: u16,
    identity: Identity,
    pub(super) geometry: Geometry,
    group: PortGroup,
    next_nexus: AtomicU64,
    /// Something of [`State`] may forbid a command: look there first. Otherwise the path of a command takes no lock.
    guarded: AtomicBool,
    pub(super) write_cache: AtomicBool,
    pub(super) write_protect: AtomicBool,
    state: Mutex<State>,
    /// Held while a PERSISTENT RESERVE OUT is carried out, which may have to wait for a disk; `state` never is.
    changing: Mutex<()>,
    keeper: Option<Box<dyn Keeper>>,
}

impl LogicalUnit {
    /// A unit on a device of this geometry.
    pub fn new(number: u16, identity: Identity, geometry: Geometry) -> Self {
        let modes = Modes::default();
        Self {
            number,
            identity,
            geometry,
            group: alua::FIRST_PORT_GROUP,
            next_nexus: AtomicU64::new(1),
            guarded: AtomicBool::new(false),
            write_cache: AtomicBool::new(modes.write_cache),
            write_protect: AtomicBool::new(modes.write_protect),
            state: Mutex::default(),
            changing: Mutex::default(),
            keeper: None,
        }
    }

    /// In this group of ports, and at first in this state.
    #[must_use]
    pub fn in_port_group(mut self, group: PortGroup, access: AccessState) -> Self {
        self.group = group;
        self.state.get_mut().access = access;
        *self.guarded.get_mut() |= access.is_restricted();
        self
    }

    /// Changes the state of access; whoever would see another one is told with a unit attention.
    pub fn set_access_state(&self, access: AccessState) {
        let mut state = self.state.lock();
        let told = access.reported() != state.access.reported();
        state.access = access;
        state.access_changed |= told;
        for attached in state.attached.values_mut().filter(|_| told) {
            // Once is enough: who hears it asks for the state of that moment.
            attached
                .attentions
                .retain(|sense| *sense != Sense::ACCESS_STATE_CHANGED);
            tell(attached, Sense::ACCESS_STATE_CHANGED);
        }
        self.guard(&state);
    }

    /// Its number.
    pub fn number(&self) -> u16 {
        self.number
    }

    /// Its device's geometry.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// A session begins; its first command is told of the power-on (SAM-5 §5.14).
    pub fn attach(&self, port: InitiatorPort) -> Arc<Nexus> {
        let nexus = Arc::new(Nexus {
            id: NexusId(self.next_nexus.fetch_add(1, Ordering::Relaxed)),
            port,
            attention: AtomicBool::new(true),
        });
        let attached = Attached {
            nexus: nexus.clone(),
            attentions: VecDeque::from([Sense::POWER_ON]),
        };
        self.state.lock().attached.insert(nexus.id, attached);
        nexus
    }

    /// A session ends: its RESERVE goes with it, its registration stays.
    pub fn detach(&self, nexus: &Nexus) {
        let mut state = self.state.lock();
        state.attached.remove(&nexus.id);
        if state.reserved == Some(nexus.id) {
            state.reserved = None;
        }
        self.guard(&state);
    }

    /// A reset: reservations of the old kind go, modes return to their defaults, all are told.
    pub fn reset(&self) {
        let mut state = self.state.lock();
        state.reserved = None;
        self.set_modes(Modes::default());
        for attached in state.attached.values_mut() {
            attached.attentions.clear();
            tell(attached, Sense::BUS_DEVICE_RESET);
        }
        self.guard(&state);
    }

    fn tell_all_but(&self, state: &mut State, nexus: &Nexus, sense: Sense) {
        for attached in state.attached.values_mut().filter(|a| a.nexus.id != nexus.id) {
            tell(attached, sense);
        }
    }

    fn guard(&self, state: &State) {
        self.guarded.store(
            state.reserved.is_some() || state.reservations.is_held() || state.access.is_restricted(),
            Ordering::Release,
        );
    }

    fn modes(&self) -> Modes {
        Modes {
            write_cache: self.write_cache.load(Ordering::Relaxed),
            write_protect: self.write_protect.load(Ordering::Relaxed),
        }
    }

    fn set_modes(&self, modes: Modes) {
        self.write_cache.store(modes.write_cache, Ordering::Relaxed);
        self.write_protect.store(modes.write_protect, Ordering::Relaxed);
    }

    /// What a CDB comes to. `luns` are the numbers of all units of the target.
    pub fn plan(&self, nexus: &Nexus, cdb: &[u8; 16], luns: &[u16]) -> Action {
        let parsed = Command::parse(cdb, self.geometry.thin);
        if nexus.attention.load(Ordering::Acquire)
            && let Some(sense) = self.attention(nexus, &parsed)
        {
            return match parsed {
                Ok(Command::RequestSense {
                    descriptor,
                    allocation,
                }) => sense_data(sense, descriptor, allocation),
                _ => Action::Check(sense),
            };
        }
        match parsed {
            Ok(command)
                if self.guarded.load(Ordering::Acquire)
                    && let Some(refusal) = self.refusal(nexus, &command) =>
            {
                refusal
            }
            Ok(command) => self.carry_out(nexus, command, luns).unwrap_or_else(Action::Check),
            Err(sense) => Action::Check(sense),
        }
    }

    /// The unit attention that the command must report, if it is one that does (SAM-5 §5.14).
    fn attention(&self, nexus: &Nexus, command: &Result<Command, Sense>) -> Option<Sense> {
        if matches!(command, Ok(Command::Inquiry { .. } | Command::ReportLuns { .. })) {
            return None;
        }
        let mut state = self.state.lock();
        let attached = state.attached.get_mut(&nexus.id)?;
        let sense = attached.attentions.pop_front();
        nexus
            .attention
            .store(!attached.attentions.is_empty(), Ordering::Release);
        sense
    }

    fn carry_out(&self, nexus: &Nexus, command: Command, luns: &[u16]) -> Result<Action, Sense> {
        let block = u64::from(self.geometry.block_bytes);
        Ok(match command {
            Command::Read { blocks } => match self.transfer(blocks)? {
                (_, 0) => Action::Good,
                (offset, bytes) => Action::Read { offset, bytes },
            },
            Command::Write { blocks, fua } => self.write(blocks, fua, false)?,
            Command::TestUnitReady | Command::StartStop { .. } => self.no_motor(command)?,
            Command::RequestSense {
                descriptor,
                allocation,
            } => sense_data(Sense::NONE, descriptor, allocation),
            Command::Inquiry {
                page: None,
                allocation,
            } => data(inquiry::standard(Some(&self.identity)), allocation),
            Command::Inquiry {
                page: Some(page),
                allocation,
            } => {
                let page = inquiry::page(page, &self.identity, &self.geometry, self.group)
                    .ok_or(Sense::cdb_field(2, None))?;
                data(page, allocation)
            }
            Command::ModeSense {
                long,
                no_block_descriptors,
                control,
                page,
                subpage,
                allocation,
            } => {
                let asked = Asked {
                    long,
                    no_block_descriptors,
                    control,
                    page,
                    subpage,
                };
                let blocks = self.geometry.bytes / block;
                let protected = self.geometry.read_only;
                data(
                    self.modes()
                        .sense(asked, protected, blocks, self.geometry.block_bytes)?,
                    allocation,
                )
            }
            Command::ModeSelect { save: true, .. } => return Err(Sense::cdb_field(1, Some(0))),
            Command::ModeSelect {
                page_format: false, ..
            } => return Err(Sense::cdb_field(1, Some(4))),
            Command::ModeSelect { parameters: 0, .. } => Action::Good,
            Command::ModeSelect { long, parameters, .. } => Action::Out {
                bytes: parameters.into(),
                then: OutAction::ModeSelect { long },
            },
            Command::ReadCapacity10 => Action::Data(self.capacity_10()),
            Command::ReadCapacity16 { allocation } => data(self.capacity_16(), allocation),
            Command::WriteAndVerify { blocks, check } => self.write(blocks, true, check == ByteCheck::All)?,
            Command::Verify { blocks, check } => self.verify(blocks, check)?,
            Command::CompareAndWrite { blocks } => self.compare_and_write(blocks)?,
            Command::OrWrite { blocks, fua } => self.or_write(blocks, fua)?,
            Command::ReadDefects {
                long,
                lists,
                allocation,
            } => data(no_defects(long, lists), allocation),
            Command::SynchronizeCache { blocks } => {
                self.range(blocks)?;
                Action::Flush
            }
            // Reads come from the operating system's cache or over the network; a fetch ahead of time is the
            // cache's own business, so the range is only checked.
            Command::PreFetch { blocks } => {
                self.range(blocks)?;
                Action::Good
            }
            Command::Unmap { anchor: true, .. } => return Err(Sense::cdb_field(1, Some(0))),
            Command::Unmap { parameters, .. } => match parameters {
                0 => Action::Good,
                1..8 => return Err(Sense::PARAMETER_LENGTH),
                _ => Action::Out {
                    bytes: parameters.into(),
                    then: OutAction::Unmap,
                },
            },
            Command::WriteSame {
                blocks,
                unmap,
                anchor,
                no_data,
            } => self.write_same(blocks, unmap, anchor, no_data)?,
            Command::GetLbaStatus { lba, allocation } => {
                if lba >= self.geometry.bytes / block {
                    return Err(Sense::LBA_OUT_OF_RANGE);
                }
                Action::LbaStatus {
                    offset: lba * block,
                    allocation,
                }
            }
            Command::ReportLuns { select, allocation } => report_luns(luns, select, allocation)?,
            Command::ReportOpcodes {
                timeouts,
                options,
                opcode,
                action,
                allocation,
            } => data(
                opcodes::report(self.geometry.thin, timeouts, options, opcode, action)?,
                allocation,
            ),
            Command::ReportTaskFunctions { extended, allocation } => {
                // ATS, ATSS, CTSS, LURS, TRS.
                let mut out = vec![0xda, 0, 0, if extended { 12 } else { 0 }];
                out.resize(if extended { 16 } else { 4 }, 0);
                data(out, allocation)
            }
            Command::ReportTargetPortGroups { extended, allocation } => {
                let state = self.state.lock();
                let (access, changed) = (state.access, state.access_changed);
                data(
                    alua::port_groups(extended, self.group, access, changed),
                    allocation,
                )
            }
            Command::SendDiagnostic {
                self_test,
                self_test_code,
                parameters,
            } => send_diagnostic(self_test, self_test_code, parameters)?,
            Command::Reserve => self.reserve(nexus),
            Command::Release => self.release(nexus),
            Command::PersistentReserveIn { action, allocation } => {
                let report = self.state.lock().reservations.report(action);
                data(report.ok_or(Sense::cdb_field(1, Some(4)))?, allocation)
            }
            Command::PersistentReserveOut {
                parameters: 24,
                action,
                scope,
                kind,
            } => Action::Out {
                bytes: 24,
                then: OutAction::Reserve { action, scope, kind },
            },
            Command::PersistentReserveOut { .. } => return Err(Sense::PARAMETER_LENGTH),
        })
    }

    /// There is no motor, and a unit is shared: one initiator's STOP must not take a base from all the others. So
    /// starting and stopping are accepted and change nothing; ejecting and power conditions are refused.
    fn no_motor(&self, command: Command) -> Result<Action, Sense> {
        match command {
            Command::StartStop { load_eject: true, .. } => Err(Sense::cdb_field(4, Some(1))),
            Command::StartStop { power, .. } if power != 0 => Err(Sense::cdb_field(4, Some(7))),
            _ => Ok(Action::Good),
        }
    }

    /// The ranges of an UNMAP in bytes (SBC-3 §5.28.2).
    ///
    /// # Errors
    /// The [`Sense`] to send.
    pub fn unmap_ranges(&self, parameters: &[u8]) -> Result<Vec<(u64, u64)>, Sense> {
        let header = parameters.get(..8).ok_or(Sense::PARAMETER_LENGTH)?;
        let bytes = usize::from(u16::from_be_bytes([header[2], header[3]]));
        let list = &parameters[8..];
        // What was cut off by the parameter list length is not there (SBC-3); what is not whole is ignored.
        let list = &list[..bytes.min(list.len())];
        if list.len() / 16 > MAX_UNMAP_DESCRIPTORS {
            return Err(Sense::INVALID_FIELD_IN_PARAMETERS);
        }
        let ranges: Vec<(u64, u64)> = list
            .chunks_exact(16)
            .map(|descriptor| {
                let mut lba = [0; 8];
                lba.copy_from_slice(&descriptor[..8]);
                let mut count = [0; 4];
                count.copy_from_slice(&descriptor[8..12]);
                self.range(Blocks {
                    lba: u64::from_be_bytes(lba),
                    count: u32::from_be_bytes(count).into(),
                })
            })
            .collect::<Result<_, Sense>>()?;
        // No block is no write, on a write-protected unit too.
        if ranges.iter().any(|(_, bytes)| *bytes > 0) {
            self.writable()?;
        }
        Ok(ranges)
    }

    /// MODE SELECT with its parameters.
    ///
    /// # Errors
    /// The [`Sense`] to send.
    pub fn mode_select(&self, nexus: &Nexus, long: bool, parameters: &[u8]) -> Result<(), Sense> {
        let mut state = self.state.lock();
        let (old, new) = (self.modes(), self.modes().select(long, parameters)?);
        if old != new {
            self.set_modes(new);
            self.tell_all_but(&mut state, nexus, Sense::MODE_CHANGED);
        }
        Ok(())
    }
}

fn tell(attached: &mut Attached, sense: Sense) {
    if attached.attentions.len() >= MAX_ATTENTIONS {
        attached.attentions.pop_front();
    }
    attached.attentions.push_back(sense);
    attached.nexus.attention.store(true, Ordering::Release);
}

fn data(mut out: Vec<u8>, allocation: u32) -> Action {
    out.truncate(allocation as usize);
    match out.is_empty() {
        true => Action::Good,
        false => Action::Data(out),
    }
}

fn sense_data(sense: Sense, descriptor: bool, allocation: u32) -> Action {
    let out = if descriptor {
        sense.descriptor().to_vec()
    } else {
        sense.fixed().to_vec()
    };
    data(out, allocation)
}

/// SEND DIAGNOSTIC (SPC-4 §6.42): the default self-test, and nothing else. Without a test and without parameters it asks for
/// nothing, which is no error.
fn send_diagnostic(self_test: bool, self_test_code: u8, parameters: u32) -> Result<Action, Sense> {
    match (self_test_code, parameters, self_test) {
        (1.., _, _) => Err(Sense::cdb_field(1, Some(7))),
        (0, 1.., _) => Err(Sense::cdb_field(3, Some(7))),
        (0, 0, true) => Ok(Action::SelfTest),
        (0, 0, false) => Ok(Action::Good),
    }
}

/// READ DEFECT DATA (SBC-3 §5.18, §5.19): lists without an entry, in the format that was asked for. Defects of the disks below
/// are theirs to hide.
fn no_defects(long: bool, lists: u8) -> Vec<u8> {
    let mut out = vec![0; if long { 8 } else { 4 }];
    out[1] = lists & 0x1f;
    out
}

/// REPORT LUNS (SPC-4 §6.33).
fn report_luns(luns: &[u16], select: u8, allocation: u32) -> Result<Action, Sense> {
    let listed: &[u16] = match select {
        0 | 2 => luns,
        // Well-known logical units: none.
        1 => &[],
        _ => return Err(Sense::cdb_field(2, None)),
    };
    if allocation < 16 {
        return Err(Sense::cdb_field(6, None));
    }
    let mut out = ((listed.len() * 8) as u32).to_be_bytes().to_vec();
    out.extend_from_slice(&[0; 4]);
    for &lun in listed {
        out.extend_from_slice(&crate::pdu::LunField::new(lun).0.to_be_bytes());
    }
    Ok(data(out, allocation))
}

/// What a CDB for a LUN that does not exist comes to (SPC-4 §6.6.2, SAM-5 §5.13).
pub fn plan_without_unit(cdb: &[u8; 16], luns: &[u16]) -> Action {
    match Command::parse(cdb, true) {
        Ok(Command::Inquiry {
            page: None,
            allocation,
        }) => data(inquiry::standard(None), allocation),
        Ok(Command::ReportLuns { select, allocation }) => {
            report_luns(luns, select, allocation).unwrap_or_else(Action::Check)
        }
        Ok(Command::RequestSense {
            descriptor,
            allocation,
        }) => sense_data(Sense::NO_SUCH_UNIT, descriptor, allocation),
        _ => Action::Check(Sense::NO_SUCH_UNIT),
    }
}
