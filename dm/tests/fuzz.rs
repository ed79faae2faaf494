//! The fuzz function of names, tables and status lines over its seeds and mutations of them, some seconds, without
//! libFuzzer; `cargo xtask soak` runs it for long.

#[path = "../../fuzz/src/dm.rs"]
#[allow(unreachable_pub, reason = "a library elsewhere")]
mod functions;
#[path = "../../fuzz/src/replay.rs"]
#[allow(unreachable_pub, reason = "the same")]
mod replay;

#[test]
fn whatever_parses_prints_what_parses_to_the_same() {
    replay::replay("dm", functions::text);
}
