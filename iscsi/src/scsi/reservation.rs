//! Persistent reservations (SPC-4 §5.13) as a state machine of one logical unit.
//!
//! With APTPL they outlive a loss of power, where the unit has a [`Keeper`]; [`kept`](super::kept) is what it keeps.
//! Deliberately absent: SPEC_I_PT, ALL_TG_PT and REGISTER AND MOVE, and REPORT CAPABILITIES says so.

use treeboot_types::Iqn;

use super::sense::Sense;

/// The initiator port that a registration belongs to: it outlives the session.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct InitiatorPort {
    /// The initiator's name.
    pub name: Iqn,
    /// Its part of the session's name.
    pub isid: [u8; 6],
}

/// The ISIDs of open-iscsi begin so, in each of its versions: an OUI, Cisco's (RFC 7143 §11.12.5). QEMU's are random, and begin with 80h.
const OPEN_ISCSI: [u8; 3] = [0x00, 0x02, 0x3d];

impl InitiatorPort {
    /// Whether it repeats for minutes what is NOT READY and gives up what is DATA PROTECT: Linux's own does
    /// (docs/decisions/0173-linuxs-initiator-waits-for-room.md).
    pub fn comes_again(&self) -> bool {
        self.isid.starts_with(&OPEN_ISCSI)
    }
}

/// Where registrations and the reservation of a unit outlive the process.
pub trait Keeper: std::fmt::Debug + Send + Sync {
    /// Keeps `text` in place of what was kept before; returns once that is durable. A crash at any moment leaves
    /// either the one or the other. It blocks its thread.
    ///
    /// # Errors
    /// What the operating system says; then either of the two may be kept.
    fn keep(&self, text: &str) -> std::io::Result<()>;
}

/// Types of a persistent reservation (SPC-4 table 62).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only the holder writes.
    WriteExclusive = 1,
    /// Only the holder reads and writes.
    ExclusiveAccess = 3,
    /// Only registrants write.
    WriteExclusiveRegistrants = 5,
    /// Only registrants read and write.
    ExclusiveAccessRegistrants = 6,
    /// Only registrants write; all of them hold it.
    WriteExclusiveAll = 7,
    /// Only registrants read and write; all of them hold it.
    ExclusiveAccessAll = 8,
}

impl Kind {
    pub(super) fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            1 => Self::WriteExclusive,
            3 => Self::ExclusiveAccess,
            5 => Self::WriteExclusiveRegistrants,
            6 => Self::ExclusiveAccessRegistrants,
            7 => Self::WriteExclusiveAll,
            8 => Self::ExclusiveAccessAll,
            _ => return None,
        })
    }

    fn for_registrants(self) -> bool {
        !matches!(self, Self::WriteExclusive | Self::ExclusiveAccess)
    }

    fn held_by_all(self) -> bool {
        matches!(self, Self::WriteExclusiveAll | Self::ExclusiveAccessAll)
    }

    fn allows_reads(self) -> bool {
        matches!(
            self,
            Self::WriteExclusive | Self::WriteExclusiveRegistrants | Self::WriteExclusiveAll
        )
    }
}

/// What a command needs of a reservation that somebody else holds (SPC-4 table 51, SBC-3 table 13).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Allowed whatever is reserved.
    Always,
    /// Like a read of the medium.
    Read,
    /// Like a write to the medium.
    Write,
}

/// The most registrations of a unit: far more than a cluster has nodes, and a bound on what peers can make us keep.
pub const MAX_REGISTRATIONS: usize = 256;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Registration {
    pub(super) port: InitiatorPort,
    pub(super) key: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Held {
    /// The holder; of a kind that all registrants hold, whoever reserved it.
    pub(super) holder: InitiatorPort,
    pub(super) kind: Kind,
}

/// The registrations and the reservation of one unit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reservations {
    /// PRGENERATION; it begins with 0 at each start, whatever is kept (SPC-4 §5.13.2).
    generation: u32,
    pub(super) registrations: Vec<Registration>,
    pub(super) held: Option<Held>,
    /// There is a [`Keeper`]: PTPL_C.
    pub(super) can_keep: bool,
    /// APTPL of the last registration: PTPL_A.
    pub(super) kept: bool,
}

/// Why a PERSISTENT RESERVE OUT was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// Status RESERVATION CONFLICT.
    Conflict,
    /// CHECK CONDITION.
    Check(Sense),
}

/// A PERSISTENT RESERVE OUT.
#[derive(Debug, Clone, Copy)]
pub struct Out {
    /// Service action.
    pub action: u8,
    /// SCOPE.
    pub scope: u8,
    /// TYPE.
    pub kind: u8,
}

/// Unit attentions that a change causes, and whose tasks it aborts.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Consequences {
    /// Who is told what.
    pub attentions: Vec<(InitiatorPort, Sense)>,
    /// Whose tasks are aborted.
    pub aborts: Vec<InitiatorPort>,
}

const PARAMETER_BYTES: usize = 24;

impl Reservations {
    /// Does the reservation forbid `access` to this port?
    pub fn conflicts(&self, port: &InitiatorPort, access: Access) -> bool {
        let Some(held) = &self.held else { return false };
        if access == Access::Always || self.holds(port) {
            return false;
        }
        if held.kind.for_registrants() && self.key_of(port).is_some() {
            return false;
        }
        !(access == Access::Read && held.kind.allows_reads())
    }

    /// Is there a reservation?
    pub fn is_held(&self) -> bool {
        self.held.is_some()
    }

    /// Are there registrations? RESERVE (6) conflicts with them.
    pub fn is_registered(&self, port: &InitiatorPort) -> bool {
        self.key_of(port).is_some()
    }

    /// They are to outlive a loss of power.
    pub fn is_kept(&self) -> bool {
        self.kept
    }

    /// Says that there is a [`Keeper`] from now on.
    pub fn allow_keeping(&mut self) {
        self.can_keep = true;
    }

    /// Nobody registered.
    pub fn is_empty(&self) -> bool {
        self.registrations.is_empty()
    }

    fn key_of(&self, port: &InitiatorPort) -> Option<u64> {
        self.registrations.iter().find(|r| r.port == *port).map(|r| r.key)
    }

    fn holds(&self, port: &InitiatorPort) -> bool {
        self.held.as_ref().is_some_and(|held| {
            held.holder == *port || held.kind.held_by_all() && self.key_of(port).is_some()
        })
    }

    /// PERSISTENT RESERVE IN (SPC-4 §6.15).
    pub fn report(&self, action: u8) -> Option<Vec<u8>> {
        let mut out = self.generation.to_be_bytes().to_vec();
        out.extend_from_slice(&[0; 4]);
        match action {
            0 => self
                .registrations
                .iter()
                .for_each(|r| out.extend_from_slice(&r.key.to_be_bytes())),
            1 => {
                if let Some(held) = &self.held {
                    let key = if held.kind.held_by_all() {
                        0
                    } else {
                        self.key_of(&held.holder).unwrap_or(0)
                    };
                    out.extend_from_slice(&key.to_be_bytes());
                    out.extend_from_slice(&[0, 0, 0, 0, 0, held.kind as u8, 0, 0]);
                }
            }
            2 => {
                // CRH no, SIP_C no, ATP_C no, PTPL_C; TMV, ALLOW COMMANDS 0, PTPL_A; the mask of all six types.
                let (can_keep, kept) = (u8::from(self.can_keep), u8::from(self.kept));
                return Some(vec![0, 8, can_keep, 0x80 | kept, 0xea, 0x01, 0, 0]);
            }
            3 => self
                .registrations
                .iter()
                .for_each(|r| self.full_status(r, &mut out)),
            _ => return None,
        }
        let bytes = (out.len() - 8) as u32;
        out[4..8].copy_from_slice(&bytes.to_be_bytes());
        Some(out)
    }

    fn full_status(&self, registration: &Registration, out: &mut Vec<u8>) {
        let holds = self.holds(&registration.port);
        out.extend_from_slice(&registration.key.to_be_bytes());
        out.extend_from_slice(&[0; 4]);
        let kind = self
            .held
            .as_ref()
            .filter(|_| holds)
            .map_or(0, |held| held.kind as u8);
        out.extend_from_slice(&[u8::from(holds), kind, 0, 0, 0, 0]);
        out.extend_from_slice(&1u16.to_be_bytes());
        // iSCSI TransportID with an ISID (SPC-4 §7.6.4.6).
        let isid: String = registration
            .port
            .isid
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let mut name = format!("{},i,0x{isid}", registration.port.name).into_bytes();
        name.resize((name.len() + 1).next_multiple_of(4).max(20), 0);
        out.extend_from_slice(&((name.len() + 4) as u32).to_be_bytes());
        out.extend_from_slice(&[0x45, 0]);
        out.extend_from_slice(&(name.len() as u16).to_be_bytes());
        out.extend_from_slice(&name);
    }

    /// PERSISTENT RESERVE OUT (SPC-4 §6.16).
    ///
    /// # Errors
    /// [`Refused`]; nothing has changed then.
    pub fn change(
        &mut self,
        port: &InitiatorPort,
        out: Out,
        parameters: &[u8],
    ) -> Result<Consequences, Refused> {
        const LENGTH: Refused = Refused::Check(Sense::PARAMETER_LENGTH);
        if parameters.len() != PARAMETER_BYTES {
            return Err(LENGTH);
        }
        let number = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&parameters[at..at + 8]);
            u64::from_be_bytes(bytes)
        };
        let (key, action_key, flags) = (number(0), number(8), parameters[20]);
        // APTPL means something to the two registrations only; the others ignore it (SPC-4 table 218).
        let aptpl = matches!(out.action, 0 | 6).then_some(flags & 0x01 != 0);
        // SPEC_I_PT and ALL_TG_PT are not supported, APTPL only with a keeper.
        if flags & 0x0c != 0 || aptpl == Some(true) && !self.can_keep {
            return Err(Refused::Check(Sense::parameter_field(20)));
        }
        let mut consequences = Consequences::default();
        if !matches!(out.action, 0 | 6) && self.key_of(port) != Some(key) {
            return Err(Refused::Conflict);
        }
        if matches!(out.action, 1 | 2 | 4 | 5) && out.scope != 0 {
            return Err(Refused::Check(Sense::cdb_field(2, Some(7))));
        }
        match out.action {
            0 | 6 => self.register(
                port,
                (out.action == 0).then_some(key),
                action_key,
                &mut consequences,
            )?,
            1 => self.reserve(port, out.kind)?,
            2 => self.release(port, out.kind, &mut consequences)?,
            3 => self.clear(port, &mut consequences),
            4 | 5 => self.preempt(port, out, action_key, &mut consequences)?,
            _ => return Err(Refused::Check(Sense::cdb_field(1, Some(4)))),
        }
        self.kept = aptpl.unwrap_or(self.kept);
        Ok(consequences)
    }

    fn register(
        &mut self,
        port: &InitiatorPort,
        key: Option<u64>,
        new: u64,
        consequences: &mut Consequences,
    ) -> Result<(), Refused> {
        let current = self.key_of(port);
        if let Some(key) = key
            && key != current.unwrap_or(0)
        {
            return Err(Refused::Conflict);
        }
        match (current, new) {
            (None, 0) => {}
            (None, key) => {
                if self.registrations.len() >= MAX_REGISTRATIONS {
                    return Err(Refused::Check(Sense::NO_REGISTRATION_ROOM));
                }
                self.registrations.push(Registration {
                    port: port.clone(),
                    key,
                });
            }
            (Some(_), 0) => self.unregister(port, consequences),
            (Some(_), key) => {
                for registration in self.registrations.iter_mut().filter(|r| r.port == *port) {
                    registration.key = key;
                }
            }
        }
        self.generation = self.generation.wrapping_add(1);
        Ok(())
    }

    fn unregister(&mut self, port: &InitiatorPort, consequences: &mut Consequences) {
        self.registrations.retain(|r| r.port != *port);
        let Some(held) = self.held.clone() else { return };
        let ends = match held.kind.held_by_all() {
            true => self.registrations.is_empty(),
            false => held.holder == *port,
        };
        if ends {
            self.held = None;
            if held.kind.for_registrants() {
                self.tell_others(port, Sense::RESERVATIONS_RELEASED, consequences);
            }
        }
    }

    fn tell_others(&self, port: &InitiatorPort, sense: Sense, consequences: &mut Consequences) {
        let others = self.registrations.iter().filter(|r| r.port != *port);
        consequences
            .attentions
            .extend(others.map(|r| (r.port.clone(), sense)));
    }

    fn reserve(&mut self, port: &InitiatorPort, kind: u8) -> Result<(), Refused> {
        let kind = Kind::from_code(kind).ok_or(Refused::Check(Sense::cdb_field(2, Some(3))))?;
        match &self.held {
            Some(held) if !self.holds(port) || held.kind != kind => Err(Refused::Conflict),
            Some(_) => Ok(()),
            None => {
                self.held = Some(Held {
                    holder: port.clone(),
                    kind,
                });
                Ok(())
            }
        }
    }

    fn release(
        &mut self,
        port: &InitiatorPort,
        kind: u8,
        consequences: &mut Consequences,
    ) -> Result<(), Refused> {
        let Some(held) = &self.held else { return Ok(()) };
        if !self.holds(port) {
            return Ok(());
        }
        if Kind::from_code(kind) != Some(held.kind) {
            return Err(Refused::Check(Sense::INVALID_RELEASE));
        }
        let told = held.kind.for_registrants();
        self.held = None;
        if told {
            self.tell_others(port, Sense::RESERVATIONS_RELEASED, consequences);
        }
        Ok(())
    }

    fn clear(&mut self, port: &InitiatorPort, consequences: &mut Consequences) {
        self.tell_others(port, Sense::RESERVATIONS_PREEMPTED, consequences);
        self.registrations.clear();
        self.held = None;
        self.generation = self.generation.wrapping_add(1);
    }

    fn preempt(
        &mut self,
        port: &InitiatorPort,
        out: Out,
        victim: u64,
        consequences: &mut Consequences,
    ) -> Result<(), Refused> {
        let all = self.held.as_ref().is_some_and(|held| held.kind.held_by_all());
        let holder_key = self.held.as_ref().and_then(|held| self.key_of(&held.holder));
        let takes_over = match &self.held {
            Some(_) if all => victim == 0,
            Some(_) => holder_key == Some(victim),
            None => false,
        };
        if victim == 0 && !takes_over {
            return Err(Refused::Check(Sense::parameter_field(8)));
        }
        let kind = match takes_over {
            true => Some(Kind::from_code(out.kind).ok_or(Refused::Check(Sense::cdb_field(2, Some(3))))?),
            false => None,
        };
        let hit = |r: &Registration| (r.key == victim || takes_over && all) && (r.port != *port);
        let hits: Vec<_> = self
            .registrations
            .iter()
            .filter(|r| hit(r))
            .map(|r| r.port.clone())
            .collect();
        if hits.is_empty() && !takes_over && self.key_of(port) != Some(victim) {
            return Err(Refused::Conflict);
        }
        self.registrations.retain(|r| !hit(r));
        if !takes_over && self.key_of(port) == Some(victim) {
            self.unregister(port, consequences);
        }
        let tell = |port: &InitiatorPort| (port.clone(), Sense::REGISTRATIONS_PREEMPTED);
        consequences.attentions.extend(hits.iter().map(tell));
        if let Some(kind) = kind {
            let changed = self.held.as_ref().is_some_and(|held| held.kind != kind);
            self.held = Some(Held {
                holder: port.clone(),
                kind,
            });
            if changed {
                self.tell_others(port, Sense::RESERVATIONS_RELEASED, consequences);
            }
        }
        if out.action == 5 {
            consequences.aborts = hits;
        }
        self.generation = self.generation.wrapping_add(1);
        Ok(())
    }
}
