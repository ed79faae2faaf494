//! Command descriptor blocks as a type (SPC-4 §6, SBC-3 §5).

use super::opcodes::{self, Known};
use super::sense::Sense;

/// What VERIFY and WRITE AND VERIFY compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ByteCheck {
    /// Only that the medium can be read.
    Medium,
    /// Each byte with the data sent.
    All,
    /// Each block with the one block sent.
    Repeated,
}

/// A run of logical blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blocks {
    /// The first.
    pub lba: u64,
    /// How many.
    pub count: u64,
}

/// A command, with its fields in the standard's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "each field bears the standard's name")]
pub enum Command {
    TestUnitReady,
    RequestSense {
        descriptor: bool,
        allocation: u32,
    },
    Inquiry {
        page: Option<u8>,
        allocation: u32,
    },
    ModeSense {
        long: bool,
        no_block_descriptors: bool,
        control: u8,
        page: u8,
        subpage: u8,
        allocation: u32,
    },
    ModeSelect {
        long: bool,
        page_format: bool,
        save: bool,
        parameters: u32,
    },
    ReadCapacity10,
    ReadCapacity16 {
        allocation: u32,
    },
    Read {
        blocks: Blocks,
    },
    Write {
        blocks: Blocks,
        fua: bool,
    },
    WriteAndVerify {
        blocks: Blocks,
        check: ByteCheck,
    },
    Verify {
        blocks: Blocks,
        check: ByteCheck,
    },
    CompareAndWrite {
        blocks: Blocks,
    },
    OrWrite {
        blocks: Blocks,
        fua: bool,
    },
    ReadDefects {
        long: bool,
        lists: u8,
        allocation: u32,
    },
    SynchronizeCache {
        blocks: Blocks,
    },
    PreFetch {
        blocks: Blocks,
    },
    Unmap {
        parameters: u32,
        anchor: bool,
    },
    WriteSame {
        blocks: Blocks,
        unmap: bool,
        anchor: bool,
        no_data: bool,
    },
    GetLbaStatus {
        lba: u64,
        allocation: u32,
    },
    ReportLuns {
        select: u8,
        allocation: u32,
    },
    ReportOpcodes {
        timeouts: bool,
        options: u8,
        opcode: u8,
        action: u16,
        allocation: u32,
    },
    ReportTaskFunctions {
        extended: bool,
        allocation: u32,
    },
    ReportTargetPortGroups {
        extended: bool,
        allocation: u32,
    },
    Reserve,
    Release,
    PersistentReserveIn {
        action: u8,
        allocation: u32,
    },
    PersistentReserveOut {
        action: u8,
        scope: u8,
        kind: u8,
        parameters: u32,
    },
    StartStop {
        start: bool,
        load_eject: bool,
        power: u8,
    },
    SendDiagnostic {
        self_test: bool,
        self_test_code: u8,
        parameters: u32,
    },
}

fn u16_at(cdb: &[u8; 16], at: usize) -> u32 {
    u32::from(u16::from_be_bytes([cdb[at], cdb[at + 1]]))
}

fn u32_at(cdb: &[u8; 16], at: usize) -> u32 {
    u32::from_be_bytes([cdb[at], cdb[at + 1], cdb[at + 2], cdb[at + 3]])
}

fn u64_at(cdb: &[u8; 16], at: usize) -> u64 {
    u64::from(u32_at(cdb, at)) << 32 | u64::from(u32_at(cdb, at + 4))
}

/// The blocks of the four lengths of CDB, told apart by the group code in the upper three bits.
fn blocks(cdb: &[u8; 16]) -> Blocks {
    match cdb[0] >> 5 {
        0 => Blocks {
            lba: u64::from(u32_at(cdb, 0) & 0x001f_ffff),
            // 0 is 256 in CDBs of six bytes (SBC-3 §5.8).
            count: if cdb[4] == 0 { 256 } else { cdb[4].into() },
        },
        1 | 2 => Blocks {
            lba: u32_at(cdb, 2).into(),
            count: u16_at(cdb, 7).into(),
        },
        5 => Blocks {
            lba: u32_at(cdb, 2).into(),
            count: u32_at(cdb, 6).into(),
        },
        _ => Blocks {
            lba: u64_at(cdb, 2),
            count: u32_at(cdb, 10).into(),
        },
    }
}

impl Command {
    /// Parses a CDB. `thin`: the device gives space back, so it knows UNMAP.
    ///
    /// # Errors
    /// The [`Sense`] to send: an unknown operation code, or a bit that the command does not know.
    pub fn parse(cdb: &[u8; 16], thin: bool) -> Result<Self, Sense> {
        // Plain reads first: they are most of what a target does, and all their checks are here.
        if matches!(cdb[0], 0x28 | 0x88)
            && cdb[1] == 0
            && (cdb[0] == 0x28 && cdb[9] == 0 || cdb[0] == 0x88 && cdb[15] == 0)
        {
            return Ok(Self::Read { blocks: blocks(cdb) });
        }
        let entry = match opcodes::find(cdb[0], cdb[1], thin) {
            Known::Command(entry) => entry,
            Known::OtherAction => return Err(Sense::cdb_field(1, Some(4))),
            Known::No => return Err(Sense::INVALID_OPCODE),
        };
        if let Some((byte, bit)) = opcodes::reserved_bit(entry, cdb) {
            return Err(Sense::cdb_field(byte, Some(bit)));
        }
        Self::parse_known(cdb)
    }

    fn parse_known(cdb: &[u8; 16]) -> Result<Self, Sense> {
        let blocks = blocks(cdb);
        let flag = |byte: usize, bit: u8| cdb[byte] >> bit & 1 != 0;
        Ok(match cdb[0] {
            0x00 => Self::TestUnitReady,
            0x03 => Self::RequestSense {
                descriptor: flag(1, 0),
                allocation: cdb[4].into(),
            },
            0x08 => Self::Read { blocks },
            0x0a => Self::Write { blocks, fua: false },
            0x12 if !flag(1, 0) && cdb[2] != 0 => return Err(Sense::cdb_field(2, None)),
            0x12 => Self::Inquiry {
                page: flag(1, 0).then_some(cdb[2]),
                allocation: u16_at(cdb, 3),
            },
            0x15 | 0x55 => Self::ModeSelect {
                long: cdb[0] == 0x55,
                page_format: flag(1, 4),
                save: flag(1, 0),
                parameters: if cdb[0] == 0x55 {
                    u16_at(cdb, 7)
                } else {
                    cdb[4].into()
                },
            },
            0x16 => Self::Reserve,
            0x17 => Self::Release,
            0x1a | 0x5a => Self::ModeSense {
                long: cdb[0] == 0x5a,
                no_block_descriptors: flag(1, 3),
                control: cdb[2] >> 6,
                page: cdb[2] & 0x3f,
                subpage: cdb[3],
                allocation: if cdb[0] == 0x5a {
                    u16_at(cdb, 7)
                } else {
                    cdb[4].into()
                },
            },
            0x1b => Self::StartStop {
                start: flag(4, 0),
                load_eject: flag(4, 1),
                power: cdb[4] >> 4,
            },
            // DEVOFFL and UNITOFFL permit what our self-test does not do.
            0x1d => Self::SendDiagnostic {
                self_test: flag(1, 2),
                self_test_code: cdb[1] >> 5,
                parameters: u16_at(cdb, 3),
            },
            0x25 => Self::ReadCapacity10,
            0x28 | 0x88 | 0xa8 => {
                unprotected(cdb)?;
                Self::Read { blocks }
            }
            0x2a | 0x8a | 0xaa => {
                unprotected(cdb)?;
                Self::Write {
                    blocks,
                    fua: flag(1, 3),
                }
            }
            0x2e | 0x8e | 0xae => {
                unprotected(cdb)?;
                match byte_check(cdb)? {
                    ByteCheck::Repeated => return Err(Sense::cdb_field(1, Some(2))),
                    check => Self::WriteAndVerify { blocks, check },
                }
            }
            0x2f | 0x8f | 0xaf => {
                unprotected(cdb)?;
                Self::Verify {
                    blocks,
                    check: byte_check(cdb)?,
                }
            }
            0x34 | 0x90 => Self::PreFetch { blocks },
            0x37 => Self::ReadDefects {
                long: false,
                lists: cdb[2],
                allocation: u16_at(cdb, 7),
            },
            0xb7 => Self::ReadDefects {
                long: true,
                lists: cdb[1],
                allocation: u32_at(cdb, 6),
            },
            0x35 | 0x91 => Self::SynchronizeCache { blocks },
            0x41 | 0x93 => {
                unprotected(cdb)?;
                Self::WriteSame {
                    blocks,
                    unmap: flag(1, 3),
                    anchor: flag(1, 4),
                    no_data: cdb[0] == 0x93 && flag(1, 0),
                }
            }
            0x42 => Self::Unmap {
                parameters: u16_at(cdb, 7),
                anchor: flag(1, 0),
            },
            0x5e => Self::PersistentReserveIn {
                action: cdb[1] & 0x1f,
                allocation: u16_at(cdb, 7),
            },
            0x5f => Self::PersistentReserveOut {
                action: cdb[1] & 0x1f,
                scope: cdb[2] >> 4,
                kind: cdb[2] & 0x0f,
                parameters: u32_at(cdb, 5),
            },
            0x8b => {
                unprotected(cdb)?;
                Self::OrWrite {
                    blocks,
                    fua: flag(1, 3),
                }
            }
            0x89 => {
                unprotected(cdb)?;
                Self::CompareAndWrite {
                    blocks: Blocks {
                        lba: blocks.lba,
                        count: cdb[13].into(),
                    },
                }
            }
            0x9e if cdb[1] & 0x1f == 0x10 => Self::ReadCapacity16 {
                allocation: u32_at(cdb, 10),
            },
            0x9e => Self::GetLbaStatus {
                lba: blocks.lba,
                allocation: u32_at(cdb, 10),
            },
            0xa0 => Self::ReportLuns {
                select: cdb[2],
                allocation: u32_at(cdb, 6),
            },
            0xa3 => match cdb[1] & 0x1f {
                0x0a => Self::ReportTargetPortGroups {
                    extended: cdb[1] >> 5 == 1,
                    allocation: u32_at(cdb, 6),
                },
                0x0c => Self::ReportOpcodes {
                    timeouts: flag(2, 7),
                    options: cdb[2] & 7,
                    opcode: cdb[3],
                    action: u16_at(cdb, 4) as u16,
                    allocation: u32_at(cdb, 6),
                },
                _ => Self::ReportTaskFunctions {
                    extended: flag(2, 7),
                    allocation: u32_at(cdb, 6),
                },
            },
            _ => return Err(Sense::INVALID_OPCODE),
        })
    }
}

/// Protection information is not kept, so the PROTECT field must be 0 (SBC-3 §5.8).
fn unprotected(cdb: &[u8; 16]) -> Result<(), Sense> {
    if cdb[1] >> 5 == 0 {
        Ok(())
    } else {
        Err(Sense::cdb_field(1, Some(7)))
    }
}

fn byte_check(cdb: &[u8; 16]) -> Result<ByteCheck, Sense> {
    match cdb[1] >> 1 & 3 {
        0 => Ok(ByteCheck::Medium),
        1 => Ok(ByteCheck::All),
        3 => Ok(ByteCheck::Repeated),
        _ => Err(Sense::cdb_field(1, Some(2))),
    }
}
