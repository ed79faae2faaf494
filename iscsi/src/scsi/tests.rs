use proptest::prelude::*;
use treeboot_block::Geometry;
use treeboot_types::Iqn;

use super::reservation::InitiatorPort;
use super::*;

fn geometry(read_only: bool, thin: bool) -> Geometry {
    Geometry {
        bytes: 1 << 20,
        block_bytes: 512,
        physical_block_bytes: 4096,
        read_only,
        thin,
    }
}

fn unit(read_only: bool, thin: bool) -> LogicalUnit {
    with_geometry(geometry(read_only, thin))
}

fn with_geometry(geometry: Geometry) -> LogicalUnit {
    let identity = Identity {
        target: Iqn::new("iqn.a:t").unwrap(),
        serial: "S1".into(),
        product: "disk".into(),
        ident: [7; 16],
    };
    LogicalUnit::new(0, identity, geometry)
}

fn port(number: u8) -> InitiatorPort {
    InitiatorPort {
        name: Iqn::new("iqn.a:i").unwrap(),
        isid: [number; 6],
    }
}

/// A nexus that has heard of the power-on.
fn ready(unit: &LogicalUnit, number: u8) -> std::sync::Arc<Nexus> {
    let nexus = unit.attach(port(number));
    assert_eq!(plan(unit, &nexus, &[0]), Action::Check(Sense::POWER_ON));
    nexus
}

fn plan(unit: &LogicalUnit, nexus: &Nexus, cdb: &[u8]) -> Action {
    let mut whole = [0; 16];
    whole[..cdb.len()].copy_from_slice(cdb);
    unit.plan(nexus, &whole, &[0, 1])
}

#[test]
fn reads_of_all_lengths_name_the_same_bytes() {
    let unit = unit(false, true);
    let nexus = ready(&unit, 1);
    let expected = Action::Read {
        offset: 512 * 3,
        bytes: 1024,
    };
    for cdb in [
        &[0x08, 0, 0, 3, 2, 0][..],
        &[0x28, 0, 0, 0, 0, 3, 0, 0, 2, 0],
        &[0x28, 0x18, 0, 0, 0, 3, 0, 0, 2, 0],
        &[0xa8, 0, 0, 0, 0, 3, 0, 0, 0, 2, 0, 0],
        &[0x88, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 2, 0, 0],
    ] {
        assert_eq!(plan(&unit, &nexus, cdb), expected, "{cdb:x?}");
    }
    let six = plan(&unit, &nexus, &[0x08, 0, 0, 0, 0, 0]);
    assert_eq!(
        six,
        Action::Read {
            offset: 0,
            bytes: 256 * 512
        }
    );
}

#[test]
fn what_lies_outside_or_is_reserved_is_refused() {
    let unit = unit(false, false);
    let nexus = ready(&unit, 1);
    let last = [0x28, 0, 0, 0, 7, 0xff, 0, 0, 2, 0];
    assert_eq!(plan(&unit, &nexus, &last), Action::Check(Sense::LBA_OUT_OF_RANGE));
    let huge = [
        0x88, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1, 0, 0,
    ];
    assert_eq!(plan(&unit, &nexus, &huge), Action::Check(Sense::LBA_OUT_OF_RANGE));
    let protect = [0x28, 0x20, 0, 0, 0, 0, 0, 0, 1, 0];
    assert_eq!(
        plan(&unit, &nexus, &protect),
        Action::Check(Sense::cdb_field(1, Some(7)))
    );
    let reserved = [0x28, 0x01, 0, 0, 0, 0, 0, 0, 1, 0];
    assert_eq!(
        plan(&unit, &nexus, &reserved),
        Action::Check(Sense::cdb_field(1, Some(0)))
    );
    assert_eq!(plan(&unit, &nexus, &[0xc0]), Action::Check(Sense::INVALID_OPCODE));
    // UNMAP exists only where it does something.
    assert_eq!(
        plan(&unit, &nexus, &[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0]),
        Action::Check(Sense::INVALID_OPCODE)
    );
}

/// As `docs/iscsi.md` lists it.
#[test]
fn what_is_not_done_is_refused_with_the_sense_that_the_docs_list() {
    let unit = unit(false, true);
    let nexus = ready(&unit, 1);
    let opcode = |opcode, action| ([opcode, action, 0, 0, 0, 0, 0, 0, 0, 0], Sense::INVALID_OPCODE);
    for (cdb, sense) in [
        opcode(0x83, 0x00), // EXTENDED COPY
        opcode(0x83, 0x11), // WRITE USING TOKEN
        opcode(0x84, 0x00), // RECEIVE COPY RESULTS
        opcode(0x9c, 0x00), // WRITE ATOMIC (16)
        opcode(0x48, 0x01), // SANITIZE
        opcode(0x04, 0x00), // FORMAT UNIT
        opcode(0x07, 0x00), // REASSIGN BLOCKS
        opcode(0x1c, 0x00), // RECEIVE DIAGNOSTIC RESULTS
        opcode(0x1e, 0x00), // PREVENT ALLOW MEDIUM REMOVAL
        opcode(0x3b, 0x00), // WRITE BUFFER
        opcode(0x3c, 0x00), // READ BUFFER
        opcode(0x4c, 0x00), // LOG SELECT
        opcode(0x4d, 0x00), // LOG SENSE
        opcode(0x7f, 0x00), // commands of 32 bytes
        opcode(0xa4, 0x0a), // SET TARGET PORT GROUPS
        opcode(0xa2, 0x00), // SECURITY PROTOCOL IN
        // Service actions of commands that are known.
        ([0x5f, 7, 0, 0, 0, 0, 0, 0, 24, 0], Sense::cdb_field(1, Some(4))),
        ([0x9e, 0x11, 0, 0, 0, 0, 0, 0, 0, 0], Sense::cdb_field(1, Some(4))),
        ([0xa3, 0x05, 0, 0, 0, 0, 0, 0, 0, 0], Sense::cdb_field(1, Some(4))),
        // LOEJ, RDPROTECT, NACA.
        ([0x1b, 0, 0, 0, 2, 0, 0, 0, 0, 0], Sense::cdb_field(4, Some(1))),
        ([0x28, 0x20, 0, 0, 0, 0, 0, 0, 1, 0], Sense::cdb_field(1, Some(7))),
        ([0x28, 0, 0, 0, 0, 0, 0, 0, 1, 4], Sense::cdb_field(9, Some(2))),
    ] {
        assert_eq!(plan(&unit, &nexus, &cdb), Action::Check(sense), "{cdb:02x?}");
    }
}

#[test]
fn the_default_self_test_is_the_only_diagnostic_and_every_unit_has_it() {
    for (read_only, thin) in [(false, true), (false, false), (true, true), (true, false)] {
        let unit = unit(read_only, thin);
        let nexus = ready(&unit, 1);
        for (cdb, action) in [
            ([0x1d, 0x04, 0, 0, 0, 0], Action::SelfTest),
            // DEVOFFL and UNITOFFL only permit.
            ([0x1d, 0x07, 0, 0, 0, 0], Action::SelfTest),
            // Neither a test nor a parameter: nothing is asked for.
            ([0x1d, 0x00, 0, 0, 0, 0], Action::Good),
            // A background short self-test; and with SELFTEST beside it.
            (
                [0x1d, 0x20, 0, 0, 0, 0],
                Action::Check(Sense::cdb_field(1, Some(7))),
            ),
            (
                [0x1d, 0x24, 0, 0, 0, 0],
                Action::Check(Sense::cdb_field(1, Some(7))),
            ),
            // A parameter list; PF, for pages of it; the reserved bit; NACA.
            (
                [0x1d, 0x04, 0, 0, 4, 0],
                Action::Check(Sense::cdb_field(3, Some(7))),
            ),
            (
                [0x1d, 0x00, 0, 1, 0, 0],
                Action::Check(Sense::cdb_field(3, Some(7))),
            ),
            (
                [0x1d, 0x10, 0, 0, 0, 0],
                Action::Check(Sense::cdb_field(1, Some(4))),
            ),
            (
                [0x1d, 0x0c, 0, 0, 0, 0],
                Action::Check(Sense::cdb_field(1, Some(3))),
            ),
            (
                [0x1d, 0x04, 1, 0, 0, 0],
                Action::Check(Sense::cdb_field(2, Some(0))),
            ),
            (
                [0x1d, 0x04, 0, 0, 0, 4],
                Action::Check(Sense::cdb_field(5, Some(2))),
            ),
        ] {
            assert_eq!(plan(&unit, &nexus, &cdb), action, "{cdb:02x?}");
        }
        // REPORT SUPPORTED OPERATION CODES of this one.
        let report = [0xa3, 0x0c, 1, 0x1d, 0, 0, 0, 0, 0, 255, 0, 0];
        let listed = vec![0, 3, 0, 6, 0x1d, 0xe7, 0, 0xff, 0xff, 0];
        assert_eq!(plan(&unit, &nexus, &report), Action::Data(listed));
    }
}

#[test]
fn the_control_page_says_that_each_session_has_a_task_set_of_its_own() {
    let unit = unit(false, true);
    let nexus = ready(&unit, 1);
    let page = |control: u8| match plan(&unit, &nexus, &[0x1a, 0x08, control << 6 | 0x0a, 0, 255, 0]) {
        Action::Data(modes) => modes[4..].to_vec(),
        other => panic!("{other:?}"),
    };
    for control in [0, 2] {
        // TST 1; unrestricted reordering, QERR 0; TAS 0; BUSY TIMEOUT without limit.
        let expected = [0x0a, 10, 0x20, 0x10, 0, 0, 0, 0, 0xff, 0xff, 0, 0];
        assert_eq!(page(control), expected, "PC {control}");
    }
    assert_eq!(page(1), [0x0a, 10, 0, 0, 0x08, 0, 0, 0, 0, 0, 0, 0]);
    // TST cannot be changed.
    let mut list = vec![0; 4];
    list.extend(page(0));
    list[4 + 2] = 0;
    assert_eq!(
        unit.mode_select(&nexus, false, &list),
        Err(Sense::parameter_field(6))
    );
}

#[test]
fn a_read_only_unit_refuses_every_write_and_says_so_in_mode_sense() {
    let unit = unit(true, true);
    let nexus = ready(&unit, 1);
    for cdb in [
        &[0x0a, 0, 0, 0, 1, 0][..],
        &[0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0],
        &[0x2e, 0, 0, 0, 0, 0, 0, 0, 1, 0],
        &[0x41, 0, 0, 0, 0, 0, 0, 0, 1, 0],
        &[0x41, 0x08, 0, 0, 0, 0, 0, 0, 1, 0],
        &[0x8b, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0],
        &[0x89, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0],
    ] {
        assert_eq!(
            plan(&unit, &nexus, cdb),
            Action::Check(Sense::WRITE_PROTECTED),
            "{cdb:x?}"
        );
    }
    let Action::Data(modes) = plan(&unit, &nexus, &[0x1a, 0, 0x3f, 0, 255, 0]) else {
        panic!()
    };
    assert_eq!(modes[2] & 0x80, 0x80);
}

/// The parameter list of an UNMAP of one range.
fn unmap_list(lba: u64, count: u32) -> Vec<u8> {
    let mut list = vec![0, 22, 0, 16, 0, 0, 0, 0];
    list.extend_from_slice(&lba.to_be_bytes());
    list.extend_from_slice(&count.to_be_bytes());
    list.resize(24, 0);
    list
}

#[test]
fn protection_stops_changes_only_and_after_what_is_wrong_with_the_command() {
    let unit = unit(true, true);
    let nexus = ready(&unit, 1);
    for opcode in [0x2a, 0x2e, 0x8a, 0x8b, 0x8e, 0xaa, 0xae] {
        let mut cdb = [0; 16];
        cdb[0] = opcode;
        assert_eq!(plan(&unit, &nexus, &cdb), Action::Good, "no block by {opcode:#x}");
        // The last byte of the address, then one block.
        let (lba, count) = match opcode >> 5 {
            1 => (4, 8),
            5 => (4, 9),
            _ => (8, 13),
        };
        (cdb[lba], cdb[count]) = (0x08, 1);
        assert_eq!(
            plan(&unit, &nexus, &cdb),
            Action::Check(Sense::LBA_OUT_OF_RANGE),
            "{opcode:#x}"
        );
    }
    assert_eq!(
        plan(&unit, &nexus, &[0x41, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        Action::Check(Sense::INVALID_FIELD_IN_CDB)
    );
    assert_eq!(unit.unmap_ranges(&unmap_list(0, 8)), Err(Sense::WRITE_PROTECTED));
    assert_eq!(unit.unmap_ranges(&unmap_list(5, 0)), Ok(vec![(5 * 512, 0)]));
}

#[test]
fn or_write_is_planned_as_a_write_of_its_own() {
    let unit = unit(false, true);
    let nexus = ready(&unit, 1);
    let fua = [0x8b, 0x08, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 2, 0, 0];
    assert_eq!(
        plan(&unit, &nexus, &fua),
        Action::Out {
            bytes: 1024,
            then: OutAction::OrWrite {
                offset: 3 * 512,
                durable: true
            }
        }
    );
    let protect = [0x8b, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0];
    assert_eq!(
        plan(&unit, &nexus, &protect),
        Action::Check(Sense::cdb_field(1, Some(7)))
    );
}

#[test]
fn a_compare_of_no_block_still_looks_at_the_data() {
    let unit = unit(false, true);
    let nexus = ready(&unit, 1);
    let Action::Out { bytes: 0, .. } = plan(&unit, &nexus, &[0x89]) else {
        panic!("the target must see that data came for none")
    };
}

#[test]
fn defect_lists_are_empty_and_in_the_format_asked_for() {
    let unit = unit(false, true);
    let nexus = ready(&unit, 1);
    let short = [0x37, 0, 0x1d, 0, 0, 0, 0, 0, 32, 0];
    assert_eq!(plan(&unit, &nexus, &short), Action::Data(vec![0, 0x1d, 0, 0]));
    let long = [0xb7, 0x0b, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0];
    assert_eq!(
        plan(&unit, &nexus, &long),
        Action::Data(vec![0, 0x0b, 0, 0, 0, 0, 0, 0])
    );
}

/// A vital product data page without its header.
fn page(unit: &LogicalUnit, code: u8) -> Vec<u8> {
    let nexus = ready(unit, 9);
    let Action::Data(page) = plan(unit, &nexus, &[0x12, 1, code, 0, 255, 0]) else {
        panic!("page {code:#x}")
    };
    page[4..].to_vec()
}

#[test]
fn provisioning_is_told_as_it_is() {
    for (read_only, thin, provisioning, descriptors) in [
        (false, true, [0, 0xe4, 2, 0], 256),
        (true, true, [0, 0x84, 2, 0], 256),
        (false, false, [0, 0, 0, 0], 0),
        (true, false, [0, 0, 0, 0], 0),
    ] {
        let unit = unit(read_only, thin);
        assert_eq!(page(&unit, 0xb2), provisioning, "{read_only} {thin}");
        let limits = page(&unit, 0xb0);
        assert_eq!(
            limits[20..24],
            u32::to_be_bytes(descriptors),
            "{read_only} {thin}"
        );
        let nexus = ready(&unit, 1);
        let capacity = [0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0];
        let Action::Data(capacity) = plan(&unit, &nexus, &capacity) else {
            panic!()
        };
        assert_eq!(capacity[14], if thin { 0xc0 } else { 0 });
    }
}

#[test]
fn storage_comes_in_4_kib_whatever_the_physical_block() {
    for (physical_block_bytes, exponent) in [(512, 0), (4096, 3)] {
        let unit = with_geometry(Geometry {
            physical_block_bytes,
            ..geometry(false, true)
        });
        let limits = page(&unit, 0xb0);
        // OPTIMAL TRANSFER LENGTH GRANULARITY and OPTIMAL UNMAP GRANULARITY.
        assert_eq!((&limits[2..4], &limits[24..28]), (&[0, 8][..], &[0, 0, 0, 8][..]));
        assert_eq!(unit.capacity_16()[13], exponent);
    }
}

#[test]
fn a_reserve_shuts_others_out_until_its_session_ends() {
    let unit = unit(false, false);
    let (a, b) = (ready(&unit, 1), ready(&unit, 2));
    assert_eq!(plan(&unit, &a, &[0x16]), Action::Good);
    assert_eq!(plan(&unit, &b, &[0x16]), Action::Conflict);
    assert_eq!(plan(&unit, &b, &[0x00]), Action::Conflict);
    assert_eq!(plan(&unit, &b, &[0x17]), Action::Good);
    assert_eq!(plan(&unit, &b, &[0x00]), Action::Conflict);
    unit.detach(&a);
    assert_eq!(plan(&unit, &b, &[0x00]), Action::Good);
}

fn reserve_out(unit: &LogicalUnit, nexus: &Nexus, action: u8, kind: u8, key: u64, new: u64) -> bool {
    let mut parameters = [0; 24];
    parameters[..8].copy_from_slice(&key.to_be_bytes());
    parameters[8..16].copy_from_slice(&new.to_be_bytes());
    let out = reservation::Out {
        action,
        scope: 0,
        kind,
    };
    unit.reserve_out(nexus, out, &parameters).is_ok()
}

#[test]
fn a_write_exclusive_reservation_lets_others_read_and_outlives_the_session() {
    let unit = unit(false, false);
    let (a, b) = (ready(&unit, 1), ready(&unit, 2));
    let read = [0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    let write = [0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    assert!(reserve_out(&unit, &a, 0, 0, 0, 0xa));
    assert!(!reserve_out(&unit, &a, 1, 1, 0xb, 0), "a wrong key");
    assert!(reserve_out(&unit, &a, 1, 1, 0xa, 0));
    assert!(matches!(plan(&unit, &b, &read), Action::Read { .. }));
    assert_eq!(plan(&unit, &b, &write), Action::Conflict);
    unit.detach(&a);
    assert_eq!(plan(&unit, &b, &write), Action::Conflict);
    // Preempted, the old holder is told, and shut out in turn.
    assert!(reserve_out(&unit, &b, 0, 0, 0, 0xb));
    let a = ready(&unit, 1);
    assert!(reserve_out(&unit, &b, 4, 1, 0xb, 0xa));
    assert_eq!(
        plan(&unit, &a, &[0]),
        Action::Check(Sense::REGISTRATIONS_PREEMPTED)
    );
    assert_eq!(plan(&unit, &a, &write), Action::Conflict);
    assert!(matches!(plan(&unit, &b, &write), Action::Out { .. }));
}

proptest! {
    #[test]
    fn no_cdb_and_no_parameters_make_a_unit_panic(
        cdb in any::<[u8; 16]>(),
        parameters in prop::collection::vec(any::<u8>(), 0..64),
        thin in any::<bool>(),
        known in any::<prop::sample::Index>(),
    ) {
        let unit = unit(false, thin);
        let nexus = ready(&unit, 1);
        let mut cdb = cdb;
        for round in 0..2 {
            if let Action::Out { then, bytes } = unit.plan(&nexus, &cdb, &[0]) {
                prop_assert!(bytes <= unit::MAX_TRANSFER_BYTES);
                match then {
                    OutAction::Unmap => drop(unit.unmap_ranges(&parameters)),
                    OutAction::ModeSelect { long } => drop(unit.mode_select(&nexus, long, &parameters)),
                    OutAction::Reserve { action, scope, kind } => {
                        let out = reservation::Out { action, scope, kind };
                        drop(unit.reserve_out(&nexus, out, &parameters));
                    }
                    _ => {}
                }
            }
            if round == 0 {
                // Again with only bits that the command knows.
                let entry = known.get(opcodes::TABLE);
                cdb.iter_mut().zip(entry.usage).for_each(|(byte, mask)| *byte &= mask);
                cdb[0] = entry.opcode;
                if let Some(action) = entry.action {
                    cdb[1] = cdb[1] & 0xe0 | action;
                }
            }
        }
    }

    #[test]
    fn a_planned_transfer_lies_within_the_device(lba in any::<u64>(), count in any::<u32>(), near in 0u64..3000) {
        let unit = unit(false, true);
        let nexus = ready(&unit, 1);
        for lba in [lba, near] {
            let mut cdb = [0; 16];
            cdb[0] = 0x88;
            cdb[2..10].copy_from_slice(&lba.to_be_bytes());
            cdb[10..14].copy_from_slice(&(count % 4096).to_be_bytes());
            let fits = lba.checked_add(u64::from(count % 4096)).is_some_and(|end| end <= 2048);
            match unit.plan(&nexus, &cdb, &[0]) {
                Action::Read { offset, bytes } => {
                    prop_assert!(fits && offset + bytes <= 1 << 20);
                }
                Action::Good => prop_assert_eq!(count % 4096, 0),
                _ => prop_assert!(!fits),
            }
        }
    }
}

#[test]
fn the_table_of_commands_is_sorted_and_each_of_its_commands_parses() {
    let keys: Vec<_> = opcodes::TABLE.iter().map(|e| (e.opcode, e.action)).collect();
    assert!(keys.is_sorted());
    for entry in opcodes::TABLE {
        let mut cdb = [0; 16];
        cdb[0] = entry.opcode;
        cdb[1] = entry.action.unwrap_or(0);
        assert_ne!(
            Command::parse(&cdb, true),
            Err(Sense::INVALID_OPCODE),
            "{:#x}",
            entry.opcode
        );
    }
}

#[test]
fn sense_data_prints_as_it_parses() {
    let sense = Sense {
        information: Some(5),
        ..Sense::MISCOMPARE
    };
    let printed = sense.fixed();
    assert_eq!(printed[3..7], [0, 0, 0, 5]);
    assert_eq!(Sense::parse(&printed), Some(Sense::MISCOMPARE));
    assert_eq!(Sense::parse(&sense.descriptor()), Some(Sense::MISCOMPARE));
    assert_eq!(Sense::parse(&printed[..5]), None);
}
