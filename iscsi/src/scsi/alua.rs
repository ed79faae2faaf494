//! Asymmetric logical unit access (SPC-4 §5.11): in which state a path to a unit is, and what it then still does.
//!
//! Implicit only: the target's side sets the state, initiators read it (REPORT TARGET PORT GROUPS) and are told of
//! changes (ASYMMETRIC ACCESS STATE CHANGED). Each target has one port in one group, so that the state of a group is
//! that of one path. Deliberately absent: SET TARGET PORT GROUPS, LBA-dependent states, PREF.

use std::num::NonZeroU16;

use super::cdb::Command;
use super::sense::Sense;

/// ASYMMETRIC ACCESS STATE as it is reported (SPC-4 table 305).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reported {
    /// Active/optimized.
    Optimized,
    /// Active/non-optimized.
    NonOptimized,
    /// Standby.
    Standby,
    /// Unavailable.
    Unavailable,
    /// Logical block dependent.
    BlockDependent,
    /// Offline.
    Offline,
    /// Transitioning between states.
    Transitioning,
}

impl Reported {
    /// Its code.
    pub fn code(self) -> u8 {
        match self {
            Self::Optimized => 0x0,
            Self::NonOptimized => 0x1,
            Self::Standby => 0x2,
            Self::Unavailable => 0x3,
            Self::BlockDependent => 0x4,
            Self::Offline => 0xe,
            Self::Transitioning => 0xf,
        }
    }

    /// The state of a code; `None` for reserved ones.
    pub fn from_code(code: u8) -> Option<Self> {
        Some(match code & 0x0f {
            0x0 => Self::Optimized,
            0x1 => Self::NonOptimized,
            0x2 => Self::Standby,
            0x3 => Self::Unavailable,
            0x4 => Self::BlockDependent,
            0xe => Self::Offline,
            0xf => Self::Transitioning,
            _ => return None,
        })
    }
}

/// The state of a unit on this target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AccessState {
    /// Everything works, and as well as anywhere.
    #[default]
    Optimized,
    /// Everything works; another path, if there is one, works better.
    NonOptimized,
    /// Ready to take over; commands that touch the medium are refused.
    Standby,
    /// Out of use; commands that touch the medium are refused.
    Unavailable,
    /// Between two states; commands that touch the medium are refused with the advice to try again.
    Transitioning,
    /// Between two states, and it says so; commands that touch the medium are carried out all the same, and wait for
    /// their data as long as the device does. SPC-4 §5.11.2.5 leaves that open. A relay that is itself attaching.
    Attaching,
}

impl AccessState {
    /// What initiators are told.
    pub fn reported(self) -> Reported {
        match self {
            Self::Optimized => Reported::Optimized,
            Self::NonOptimized => Reported::NonOptimized,
            Self::Standby => Reported::Standby,
            Self::Unavailable => Reported::Unavailable,
            Self::Transitioning | Self::Attaching => Reported::Transitioning,
        }
    }

    /// Does it refuse anything?
    pub fn is_restricted(self) -> bool {
        matches!(self, Self::Standby | Self::Unavailable | Self::Transitioning)
    }

    /// The [`Sense`] of a command that this state does not allow.
    pub fn refuses(self, command: &Command) -> Option<Sense> {
        let sense = match self {
            Self::Optimized | Self::NonOptimized | Self::Attaching => return None,
            Self::Standby => Sense::STANDBY,
            Self::Unavailable => Sense::UNAVAILABLE,
            Self::Transitioning => Sense::TRANSITION,
        };
        let allowed = match command {
            // What asks about the unit is answered always: an initiator that comes now shall find the disk it expects.
            Command::Inquiry { .. }
            | Command::ReportLuns { .. }
            | Command::RequestSense { .. }
            | Command::ReportTargetPortGroups { .. }
            | Command::ReportOpcodes { .. }
            | Command::ReportTaskFunctions { .. }
            | Command::ReadCapacity10
            | Command::ReadCapacity16 { .. }
            | Command::ModeSense { .. }
            | Command::PersistentReserveIn { .. } => true,
            // A path in standby must be able to fence the others before it takes over, and SPC-4 has it answer a self-test.
            Command::PersistentReserveOut { .. }
            | Command::ModeSelect { .. }
            | Command::SendDiagnostic { .. } => self == Self::Standby,
            _ => false,
        };
        (!allowed).then_some(sense)
    }
}

/// Which port and which group of ports a target is: of all targets that serve the same unit, each has its own.
pub type PortGroup = NonZeroU16;

/// The group of a target of which nobody said anything else.
pub const FIRST_PORT_GROUP: PortGroup = NonZeroU16::MIN;

/// What a group supports: all states but offline and block dependent (SPC-4 table 306).
const SUPPORTED: u8 = 0x8f;
/// STATUS CODE: the state was altered by implicit behaviour.
const IMPLICIT: u8 = 0x02;

/// REPORT TARGET PORT GROUPS (SPC-4 §6.37) of one group with one port of the same number. `changed`: the state is not
/// the first one.
pub fn port_groups(extended: bool, group: PortGroup, state: AccessState, changed: bool) -> Vec<u8> {
    let [high, low] = group.get().to_be_bytes();
    let status = if changed { IMPLICIT } else { 0 };
    let descriptor = [
        state.reported().code(),
        SUPPORTED,
        high,
        low,
        0,
        status,
        0,
        1,
        0,
        0,
        high,
        low,
    ];
    let mut out = Vec::new();
    let bytes = descriptor.len() as u32 + if extended { 4 } else { 0 };
    out.extend_from_slice(&bytes.to_be_bytes());
    if extended {
        // No IMPLICIT TRANSITION TIME: initiators take their own.
        out.extend_from_slice(&[0x10, 0, 0, 0]);
    }
    out.extend_from_slice(&descriptor);
    out
}

/// The TPGS field of standard INQUIRY data; 0: the target knows nothing of access states.
pub fn tpgs(inquiry: &[u8]) -> u8 {
    inquiry.get(5).map_or(0, |byte| byte >> 4 & 3)
}

/// The target port group in a device identification page (SPC-4 §7.8.5.2.7), the initiator's half.
pub fn own_group(page: &[u8]) -> Option<u16> {
    let mut rest = page.get(4..)?;
    while let [_, kind, _, bytes, after @ ..] = rest {
        let value = after.get(..usize::from(*bytes))?;
        // ASSOCIATION 1 (port), DESIGNATOR TYPE 5.
        if kind & 0x3f == 0x15
            && let [_, _, high, low] = value
        {
            return Some(u16::from_be_bytes([*high, *low]));
        }
        rest = &after[usize::from(*bytes)..];
    }
    None
}

/// The state of a group in the data of REPORT TARGET PORT GROUPS; where only one is listed, its.
pub fn state_of(report: &[u8], group: Option<u16>) -> Option<Reported> {
    let bytes = u32::from_be_bytes(*report.first_chunk()?) as usize;
    let list = report.get(4..)?;
    let mut list = &list[..bytes.min(list.len())];
    let mut seen = Vec::new();
    while let [state, _, high, low, _, _, _, ports, after @ ..] = list {
        seen.push((u16::from_be_bytes([*high, *low]), Reported::from_code(*state)));
        list = after.get(usize::from(*ports) * 4..).unwrap_or(&[]);
    }
    match (&seen[..], group) {
        (_, Some(group)) => seen.iter().find(|(id, _)| *id == group)?.1,
        ([(_, only)], None) => *only,
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STATES: [AccessState; 6] = [
        AccessState::Optimized,
        AccessState::NonOptimized,
        AccessState::Standby,
        AccessState::Unavailable,
        AccessState::Transitioning,
        AccessState::Attaching,
    ];

    #[test]
    fn what_is_reported_reads_as_what_is() {
        let group = PortGroup::new(0x1234).unwrap();
        for state in STATES {
            for extended in [false, true] {
                let report = port_groups(extended, group, state, true);
                // The initiator asks for the short form; the long one has four more bytes.
                if !extended {
                    assert_eq!(state_of(&report, Some(0x1234)), Some(state.reported()));
                    assert_eq!(state_of(&report, None), Some(state.reported()));
                    assert_eq!(state_of(&report, Some(1)), None);
                }
                assert_eq!(
                    report.len(),
                    4 + u32::from_be_bytes(*report.first_chunk().unwrap()) as usize
                );
            }
            assert_eq!(
                Reported::from_code(state.reported().code()),
                Some(state.reported())
            );
        }
    }

    #[test]
    fn each_state_refuses_what_the_standard_says() {
        let read = Command::Read {
            blocks: crate::scsi::Blocks { lba: 0, count: 1 },
        };
        for (state, sense) in [
            (AccessState::Optimized, None),
            (AccessState::NonOptimized, None),
            (AccessState::Standby, Some(0x040b)),
            (AccessState::Unavailable, Some(0x040c)),
            (AccessState::Transitioning, Some(0x040a)),
            (AccessState::Attaching, None),
        ] {
            for command in [&read, &Command::TestUnitReady] {
                let refused = state.refuses(command);
                assert_eq!(refused.map(|sense| sense.code), sense);
                assert!(refused.is_none_or(|sense| sense.key == 2), "NOT READY");
            }
            assert_eq!(state.is_restricted(), sense.is_some());
            for always in [
                Command::Inquiry {
                    page: None,
                    allocation: 36,
                },
                Command::ReportTargetPortGroups {
                    extended: false,
                    allocation: 64,
                },
                Command::ReadCapacity10,
            ] {
                assert_eq!(state.refuses(&always), None);
            }
        }
    }

    proptest! {
        #[test]
        fn no_answer_makes_the_initiators_half_panic(data in prop::collection::vec(any::<u8>(), 0..80), group in any::<Option<u16>>()) {
            let _ = (tpgs(&data), own_group(&data), state_of(&data, group));
        }
    }
}
