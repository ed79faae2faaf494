//! Lines as Linux 6.1 reported them, and broken ones.

use proptest::prelude::*;

use super::*;
use crate::DeviceNumber;

#[test]
fn a_cache_reports_its_counts_or_its_failure() {
    let line = "8 27/4096 128 512/1024 100 200 3 512 0 512 4 2 metadata2 writeback 2 migration_threshold 2048 smq 0 rw -";
    let Ok(Status::Cache(CacheStatus::Counts(counts))) = Status::parse("cache", line) else {
        panic!("{line}");
    };
    assert_eq!((counts.used, counts.total, counts.promotions), (512, 1024, 512));
    assert!(counts.usable());
    let failed = line.replace("rw -", "ro needs_check");
    let Ok(Status::Cache(status)) = Status::parse("cache", &failed) else {
        panic!("{failed}");
    };
    assert!(!status.healthy());
    assert_eq!(
        Status::parse("cache", "Fail"),
        Ok(Status::Cache(CacheStatus::Fail))
    );
}

#[test]
fn a_multipath_device_reports_its_paths() {
    let line = "2 0 0 0 2 1 A 0 2 0 8:16 A 0 8:32 F 3 E 0 1 2 8:48 A 0 0 1";
    let Ok(Status::Multipath(status)) = Status::parse("multipath", line) else {
        panic!("{line}");
    };
    assert_eq!((status.queueing, status.group, status.paths_up()), (false, 1, 2));
    assert_eq!(status.groups[1].state, GroupState::Enabled);
    assert_eq!(
        status.groups[0].paths[1],
        PathStatus {
            device: DeviceNumber { major: 8, minor: 32 },
            up: false,
            failures: 3
        }
    );
}

#[test]
fn snapshots_and_verity_report_their_state() {
    let check = |kind: &str, line: &str, status| assert_eq!(Status::parse(kind, line), Ok(status));
    check(
        "snapshot",
        "1040/2048 16",
        Status::Snapshot(SnapshotStatus::Active {
            used: Sectors(1040),
            total: Sectors(2048),
            metadata: Sectors(16),
        }),
    );
    check("snapshot", "Invalid", Status::Snapshot(SnapshotStatus::Invalid));
    check("snapshot", "Overflow", Status::Snapshot(SnapshotStatus::Overflow));
    check("verity", "V", Status::Verity(VerityStatus::Valid));
    check("verity", "C 0", Status::Verity(VerityStatus::Corrupted));
    check("switch", "", Status::Quiet);
}

#[test]
fn a_broken_status_is_refused_with_its_text() {
    for (kind, line) in [
        ("verity", ""),
        ("verity", "X"),
        ("snapshot", "12/x 0"),
        ("snapshot", "12/24"),
        ("cache", "8 27/4096 128 512/1024 100"),
        ("multipath", "2 0 0 0 99999999 1 A"),
        ("multipath", "2 0 0 0 1 1 A 0 1 0 nine A 0"),
    ] {
        let error = Status::parse(kind, line).unwrap_err().to_string();
        assert!(
            error.contains(&format!("'{line}'")) && error.contains(kind),
            "{error}"
        );
    }
}

proptest! {
    #[test]
    fn no_text_makes_the_parser_panic(text in "[0-9AEF:/ a-z-]{0,120}") {
        for kind in ["multipath", "cache", "snapshot", "verity", "switch"] {
            let _ = Status::parse(kind, &text);
        }
    }
}
