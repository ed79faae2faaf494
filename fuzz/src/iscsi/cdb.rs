//! CDBs with their parameters, two sessions by turns, on a small unit.

use treeboot_block::Geometry;
use treeboot_iscsi::scsi::reservation::{InitiatorPort, Out};
use treeboot_iscsi::scsi::{Action, Identity, LogicalUnit, OutAction, unit};
use treeboot_types::Iqn;

/// Small, so that random addresses meet its end.
const BYTES: u64 = 256 * 4096;

/// The first byte is the unit; then commands: who, length of the parameters, CDB, parameters.
pub fn cdb(data: &[u8]) {
    let Some((&kind, mut rest)) = data.split_first() else {
        return;
    };
    let block_bytes = if kind & 1 == 0 { 512 } else { 4096 };
    let geometry = Geometry {
        bytes: BYTES,
        block_bytes,
        physical_block_bytes: 4096,
        read_only: kind & 2 != 0,
        thin: kind & 4 != 0,
    };
    let name = |text: &str| Iqn::new(text).expect("a name");
    let identity = Identity {
        target: name("iqn.2026-11.test:disk"),
        serial: "1".into(),
        product: "memory".into(),
        ident: [1; 16],
    };
    let logical = LogicalUnit::new(0, identity, geometry);
    let nexuses = [1, 2].map(|number| {
        logical.attach(InitiatorPort {
            name: name("iqn.2026-11.test:a"),
            isid: [0x80, 0, 0, 0, 0, number],
        })
    });
    while let Some((&[who, bytes], after)) = rest.split_first_chunk() {
        let Some((cdb, after)) = after.split_first_chunk::<16>() else {
            return;
        };
        let (parameters, after) = after.split_at(usize::from(bytes).min(after.len()));
        rest = after;
        let nexus = &nexuses[usize::from(who & 1)];
        let action = logical.plan(nexus, cdb, &[0, 1, 0x3fff]);
        check(&action, &geometry);
        match action {
            Action::Out {
                then: OutAction::Unmap,
                ..
            } => {
                for (offset, bytes) in logical.unmap_ranges(parameters).unwrap_or_default() {
                    inside(offset, bytes, &geometry);
                    assert!(bytes == 0 || !geometry.read_only, "a read-only unit changes");
                }
            }
            Action::Out {
                then: OutAction::ModeSelect { long },
                ..
            } => {
                let _ = logical.mode_select(nexus, long, parameters);
            }
            Action::Out {
                then: OutAction::Reserve { action, scope, kind },
                ..
            } => {
                let _ = logical.reserve_out(nexus, Out { action, scope, kind }, parameters);
            }
            _ => {}
        }
        check(&unit::plan_without_unit(cdb, &[0]), &geometry);
        if who & 0x80 != 0 {
            logical.reset();
        }
    }
    for nexus in &nexuses {
        logical.detach(nexus);
    }
}

fn inside(offset: u64, bytes: u64, geometry: &Geometry) {
    let end = offset.checked_add(bytes).expect("no overflow");
    assert!(end <= geometry.bytes, "{offset} + {bytes} is beyond the end");
    let block = u64::from(geometry.block_bytes);
    assert!(offset.is_multiple_of(block) && bytes.is_multiple_of(block));
}

fn check(action: &Action, geometry: &Geometry) {
    match *action {
        Action::Read { offset, bytes } | Action::Verify { offset, bytes } => {
            assert!(bytes <= unit::MAX_TRANSFER_BYTES);
            inside(offset, bytes, geometry);
        }
        Action::Discard { offset, bytes } => {
            inside(offset, bytes, geometry);
            assert!(!geometry.read_only, "a read-only unit changes");
        }
        Action::LbaStatus { offset, .. } => inside(offset, 0, geometry),
        Action::Data(ref data) => assert!(data.len() < 1 << 16, "{} bytes of an answer", data.len()),
        Action::Out { bytes, ref then } => {
            assert!(
                bytes <= 2 * unit::MAX_TRANSFER_BYTES,
                "{bytes} bytes are asked for"
            );
            let (range, changes) = match *then {
                OutAction::Write { offset, .. } => ((offset, bytes), true),
                OutAction::Compare { offset, bytes, .. } => ((offset, bytes), false),
                OutAction::CompareAndWrite { offset, bytes, .. } => ((offset, bytes), bytes > 0),
                OutAction::WriteSame { offset, bytes, .. } => ((offset, bytes), true),
                // What it names is in its parameters.
                OutAction::Unmap => ((0, 0), false),
                _ => ((0, 0), false),
            };
            inside(range.0, range.1, geometry);
            assert!(!(changes && geometry.read_only), "a read-only unit changes");
        }
        _ => {}
    }
}
