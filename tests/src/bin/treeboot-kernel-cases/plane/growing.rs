//! A delta that grows by steps, under a VM that writes all the time.

use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, Instant};

use treeboot_agent::conformance::Rig as _;
use treeboot_dm::group::Kind;
use treeboot_types::VmName;

use super::caching::{attached, leave, reach};
use super::rig::{self, Setup};

/// An eighth of what is written.
const STEP: u64 = 4 << 20;
const BLOCKS: usize = 8192;
/// What the VM writes at once.
const RUN: usize = 65_536;
/// Half a step every other look of the agent's, so that its looks are not the luck of the test.
const BYTES_PER_SECOND: u64 = 4 << 20;

pub(super) async fn by_steps() {
    let mut rig = rig::rig_with(Setup {
        delta_step: Some(STEP),
        blocks: BLOCKS,
        ..Some(Kind::Bcache).into()
    })
    .await;
    let image = rig.image(0);
    reach(&rig, &attached([&image])).await;
    let vm: VmName = "vm-0".parse().expect("a name");
    let delta = rig.dir.join("deltas");
    let size = || {
        let files = std::fs::read_dir(&delta).expect("a folder").flatten();
        let sizes = files.map(|file| file.metadata().map_or(0, |file| file.size()));
        sizes.max().unwrap_or(0)
    };
    let began_with = size();
    assert!(began_with <= STEP, "it begins with a step: {began_with}");
    let mut grown = 0;
    let begun = Instant::now();
    let bytes = image.bytes.len();
    for at in (0..bytes).step_by(RUN) {
        rig::write_device(
            &rig.disk(&vm),
            at as u64,
            &vec![at as u8 | 1; RUN.min(bytes - at)],
        )
        .unwrap_or_else(|error| panic!("the write at {at} with a delta of {} bytes: {error}", size()));
        let due = Duration::from_secs_f64(at as f64 / BYTES_PER_SECOND as f64);
        tokio::time::sleep(due.saturating_sub(begun.elapsed())).await;
        grown = grown.max(size());
    }
    println!("a delta of {began_with} bytes grew to {grown} by steps of {STEP}");
    assert!(grown > bytes as u64, "it holds all that was written: {grown}");
    // It survives a restart of the agent, as it is.
    rig.restart().await;
    for at in (0..bytes).step_by(RUN) {
        let read = rig::read_device(&rig.disk(&vm), at as u64, RUN.min(bytes - at)).expect("readable");
        assert!(
            read.iter().all(|byte| *byte == at as u8 | 1),
            "what was written at {at}"
        );
    }
    leave(&rig).await;
    assert_eq!(rig.residue().await, Vec::<String>::new());
}
