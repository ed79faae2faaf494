//! Tables print as they parse, and broken texts are refused by name.

use proptest::collection::vec;
use proptest::prelude::*;
use treeboot_types::Digest;

use super::*;

fn device() -> impl Strategy<Value = DeviceNumber> {
    (0..4096_u32, 0..1_048_576_u32).prop_map(|(major, minor)| DeviceNumber { major, minor })
}

fn sectors() -> impl Strategy<Value = Sectors> {
    (0..u64::MAX / 4).prop_map(Sectors)
}

fn multipath() -> impl Strategy<Value = Target> {
    use PathSelector::{QueueLength, RoundRobin, ServiceTime};
    let selector = prop::sample::select(vec![RoundRobin, ServiceTime, QueueLength]);
    let group = (selector, vec((device(), 0..=100_u32), 0..4)).prop_map(|(selector, paths)| PathGroup {
        selector,
        paths: paths
            .into_iter()
            .map(|(device, t)| Path {
                device,
                throughput: if selector == ServiceTime { t } else { 1 },
            })
            .collect(),
    });
    (any::<[bool; 2]>(), vec(group, 0..4), any::<u32>()).prop_map(|(features, groups, first_group)| {
        let [queue_if_no_path, bio_based] = features;
        Target::Multipath(Multipath {
            queue_if_no_path,
            bio_based,
            groups,
            first_group,
        })
    })
}

fn cache() -> impl Strategy<Value = Target> {
    let mode = prop::sample::select(vec![
        CacheMode::WriteThrough,
        CacheMode::WriteBack,
        CacheMode::PassThrough,
    ]);
    let settings = vec(("[a-z_]{1,8}", "[0-9]{1,6}"), 0..3);
    (
        device(),
        device(),
        device(),
        sectors(),
        mode,
        any::<bool>(),
        "[a-z]{1,8}",
        settings,
    )
        .prop_map(
            |(metadata, data, origin, block, mode, metadata2, policy, settings)| {
                Target::Cache(Cache {
                    metadata,
                    data,
                    origin,
                    block,
                    mode,
                    metadata2,
                    policy,
                    settings,
                })
            },
        )
}

fn verity() -> impl Strategy<Value = Target> {
    use OnCorruption::{Fail, Ignore, Panic, Restart};
    let on = prop::sample::select(vec![Fail, Ignore, Restart, Panic]);
    (
        device(),
        device(),
        any::<u64>(),
        any::<u64>(),
        any::<[u8; 32]>(),
        on,
        any::<bool>(),
        any::<bool>(),
    )
        .prop_map(
            |(data, hashes, data_blocks, hash_start_block, root, on_corruption, ignore_zero_blocks, once)| {
                Target::Verity(Verity {
                    data,
                    hashes,
                    data_blocks,
                    hash_start_block,
                    root: Digest(root),
                    on_corruption,
                    ignore_zero_blocks,
                    check_at_most_once: once,
                })
            },
        )
}

fn target() -> impl Strategy<Value = Target> {
    use Persistence::{Persistent, PersistentOverflow, Transient};
    let persistence = prop::sample::select(vec![Persistent, PersistentOverflow, Transient]);
    prop_oneof![
        (device(), sectors()).prop_map(|(device, offset)| Target::Linear { device, offset }),
        Just(Target::Error),
        Just(Target::Zero),
        (device(), sectors()).prop_map(|(device, offset)| Target::DropWrites { device, offset }),
        multipath(),
        cache(),
        (device(), device(), persistence, sectors()).prop_map(|(origin, delta, persistence, chunk)| {
            Target::Snapshot {
                origin,
                delta,
                persistence,
                chunk,
            }
        }),
        device().prop_map(|origin| Target::SnapshotOrigin { origin }),
        verity(),
        (sectors(), vec((device(), sectors()), 1..5))
            .prop_map(|(region, paths)| Target::Switch { region, paths }),
    ]
}

fn table() -> impl Strategy<Value = Table> {
    vec((1..1_u64 << 40, target()), 1..6).prop_map(|lines| {
        let mut start = Sectors(0);
        let mut line = |(length, target)| {
            let line = Line {
                start,
                length: Sectors(length),
                target,
            };
            start = Sectors(start.0 + length);
            line
        };
        Table::new(lines.into_iter().map(&mut line).collect()).unwrap()
    })
}

proptest! {
    #[test]
    fn a_table_prints_as_it_parses(table in table()) {
        prop_assert_eq!(table.to_string().parse::<Table>(), Ok(table));
    }

    #[test]
    fn no_text_makes_the_parser_panic(text in "[0-9a-z: -]{0,80}") {
        let _ = text.parse::<Table>();
    }

    #[test]
    fn a_line_cut_short_or_doubled_never_panics(table in table(), cut in any::<prop::sample::Index>()) {
        let text = table.to_string();
        let _ = text[..cut.index(text.len())].parse::<Table>();
        let doubled = format!("{text} {text}").parse::<Table>();
        prop_assert!(doubled.is_err());
    }
}

#[test]
fn lines_as_the_kernel_reports_them_print_again_byte_for_byte() {
    let root = "ab".repeat(32);
    for line in [
        "0 2048 linear 7:0 384",
        "0 8 error",
        "0 8 zero",
        "0 2048 flakey 7:0 384 0 4294967295 1 drop_writes",
        "0 131072 multipath 2 queue_mode bio 0 2 1 round-robin 0 1 1 254:3 1 round-robin 0 1 1 254:2 1",
        "0 131072 multipath 1 queue_if_no_path 0 2 1 round-robin 0 2 1 8:16 1 8:32 1 round-robin 0 1 1 8:48 1",
        "0 131072 multipath 0 0 1 1 service-time 0 2 2 8:16 1 1 8:32 1 2",
        "0 131072 multipath 0 0 1 1 queue-length 0 1 1 8:16 1",
        "0 131072 cache 254:2 254:1 254:0 128 2 metadata2 writethrough smq 0",
        "0 131072 cache 254:2 254:1 254:0 128 1 writethrough smq 2 migration_threshold 2048",
        "0 131072 snapshot 254:0 7:1 P 16",
        "0 131072 snapshot-origin 254:0",
        &format!("0 131072 verity 1 254:0 254:1 4096 4096 16384 1 sha256 {root} - 1 check_at_most_once"),
        &format!("0 131072 verity 1 254:0 254:1 4096 4096 16384 1 sha256 {root} -"),
        "0 131072 switch 2 128 0 254:3 0 254:4 0",
    ] {
        assert_eq!(line.parse::<Line>().unwrap().to_string(), line);
    }
}

#[test]
fn a_broken_line_is_refused_with_the_line_and_the_word() {
    let check = |line: &str, word: &str| {
        let error = line.parse::<Line>().unwrap_err().to_string();
        assert!(error.contains(line) && error.contains(word), "{error}");
    };
    check("0 8 linear 7:0", "ends before its offset");
    check("0 8 linear seven 0", "'seven'");
    check("0 8 linear 7:0 0 0", "goes on after its end");
    check("0 8 thin-pool 7:0", "'thin-pool'");
    check("0 8 flakey 7:0 0 1 2 1 drop_writes", "'1'");
    check("0 8 flakey 7:0 0 0 4294967295 1 error_writes", "'error_writes'");
    check("0 8 multipath 1 pg_init_retries 0 0 0", "'pg_init_retries'");
    check("0 8 multipath 0 0 99999999 1", "'99999999'");
    check(
        "0 8 multipath 0 0 1 1 round-robin 0 1 2 8:16 1 1",
        "number of path arguments",
    );
    check("0 8 snapshot 1:1 1:2 X 8", "'X'");
    check("0 8 switch 1 8 3 a b c 1:1 0", "'3'");
    check("0 8 cache 1:1 1:2 1:3 128 0 smq 1 lonely", "policy settings");
}

#[test]
fn a_gap_an_overlap_and_an_empty_line_are_refused() {
    assert_eq!("".parse::<Table>(), Err(TableError::Empty));
    for text in ["1 8 zero", "0 8 zero\n9 8 zero", "0 8 zero\n7 8 zero", "0 0 zero"] {
        assert!(
            matches!(text.parse::<Table>(), Err(TableError::Gap { .. })),
            "{text}"
        );
    }
    let text = format!("0 {0} zero\n{0} {0} zero", u64::MAX);
    assert!(matches!(text.parse::<Table>(), Err(TableError::TooLong { .. })));
    assert_eq!(
        "0 8 zero\n8 8 error".parse::<Table>().unwrap().length(),
        Sectors(16)
    );
}

#[test]
fn what_the_kernel_reports_of_its_own_makes_no_difference() {
    let parse = |text: &str| text.parse::<Table>().unwrap();
    let groups = "round-robin 0 1 1 8:16 1 round-robin 0 1 1 8:48 1";
    let wanted = parse(&format!("0 64 multipath 0 0 2 1 {groups}"));
    assert!(wanted.same_mapping(&parse(&format!("0 64 multipath 0 0 2 2 {groups}"))));
    assert!(!wanted.same_mapping(&parse(&format!(
        "0 64 multipath 1 queue_if_no_path 0 2 1 {groups}"
    ))));
    assert!(!wanted.same_mapping(&parse("0 64 zero")));
    let told = "0 64 multipath 3 retain_attached_hw_handler queue_mode bio 0 1 1 round-robin 0 1 1 254:3 1 ";
    assert_eq!(
        parse(told),
        parse("0 64 multipath 2 queue_mode bio 0 1 1 round-robin 0 1 1 254:3 1")
    );
    let snapshot = parse("0 64 snapshot 7:0 7:1 P 8");
    assert!(snapshot.same_mapping(&parse("0 64 snapshot 7:0 7:1 P 32")));
    assert!(!snapshot.same_mapping(&parse("0 64 snapshot 7:0 7:2 P 8")));
}
