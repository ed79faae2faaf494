//! Several parents: stripes that are read apart, and a parent that dies while it is read from.

use std::sync::Arc;
use std::time::{Duration, Instant};

use treeboot_agent::apply::Applier;
use treeboot_agent::conformance::{Rig as _, TestImage};
use treeboot_agent::plane::{PathStats, Scope};
use treeboot_agent::stack::{Backing, Sources, StripePaths, Wanted, WantedBase};
use treeboot_dm::{DmDevice, Mapper};

use super::rig::{self, KernelRig};
use crate::devices::drop_page_cache;

/// Small, so that a small image has many.
const UNIT_BYTES: u64 = 65536;
/// A parent that is cut is passed over at once; one that says nothing after 5 s. This is far more, and an end.
const LONGEST_READ: Duration = Duration::from_secs(30);

async fn attach(rig: &KernelRig, image: &TestImage, stripes: Vec<StripePaths>) {
    let base = WantedBase {
        content: image.content,
        backing: Backing::Cache,
        sources: Sources {
            unit_bytes: UNIT_BYTES,
            stripes,
        },
        exports: [].into(),
    };
    let wanted = Wanted {
        bases: [(image.content.digest, base)].into(),
        ..Wanted::default()
    };
    let applier = Applier {
        plane: rig.plane(),
        journal: rig.journal(),
    };
    applier.reach(&Scope::All, &wanted).await.expect("attached");
    rig.plane()
        .readable(image.content.digest)
        .await
        .expect("readable");
}

/// Reads the whole base and says how long it took.
async fn read(image: &TestImage) -> Duration {
    let path = Mapper::path(&DmDevice::Base(image.content.digest));
    let bytes = Arc::clone(&image.bytes);
    let begun = Instant::now();
    let reading = tokio::task::spawn_blocking(move || {
        let read = rig::read_device(&path, 0, bytes.len()).expect("readable");
        assert!(read == *bytes, "other bytes");
    });
    reading.await.expect("the same bytes");
    begun.elapsed()
}

fn paths(rig: &KernelRig, image: &TestImage) -> Vec<PathStats> {
    let stats = rig.plane().base_stats(&image.content.digest);
    stats.expect("an open base").paths
}

/// Each stripe comes from its own parent.
pub(super) async fn two_stripes() {
    let rig = rig::rig(None).await;
    let image = rig.image(0);
    let stripes = image.sources.iter().map(|sources| sources.stripes[0].clone());
    attach(&rig, &image, stripes.collect()).await;
    read(&image).await;
    for path in paths(&rig, &image) {
        let half = image.content.bytes / 2;
        assert!(
            path.bytes + 2 * UNIT_BYTES >= half && path.bytes <= half + 4 * UNIT_BYTES,
            "half of {} each: {path:?}",
            image.content.bytes
        );
    }
}

/// No read fails, whether it was an active parent that died or all of them.
pub(super) async fn a_parent_dies() {
    let rig = rig::rig(None).await;
    let image = rig.image(0);
    let [first, second] = [0, 1].map(|n: usize| image.sources[n].stripes[0].active[0].clone());
    let stripe = StripePaths {
        active: vec![first],
        fallbacks: vec![second],
        ..StripePaths::default()
    };
    attach(&rig, &image, vec![stripe]).await;
    read(&image).await;
    rig.kill_parent(0).await;
    let mut longest = Duration::ZERO;
    for _ in 0..5 {
        drop_page_cache().expect("dropped");
        longest = longest.max(read(&image).await);
    }
    println!(
        "the longest read over the death of the only active parent: {} ms",
        longest.as_millis()
    );
    assert!(longest < LONGEST_READ, "{longest:?}");
    assert!(
        paths(&rig, &image)
            .iter()
            .any(|path| !path.active && path.bytes >= image.content.bytes),
        "the fallback served"
    );
}
