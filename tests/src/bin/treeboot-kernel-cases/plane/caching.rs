//! The cache under an agent that runs: a device that fails, several devices, one added, no place left.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use treeboot_agent::apply::Applier;
use treeboot_agent::conformance::{Rig as _, TestImage};
use treeboot_agent::plane::Scope;
use treeboot_agent::stack::{Backing, Wanted, WantedBase, WantedDisk};
use treeboot_dm::group::{Kind, SPACE, State, uncached};
use treeboot_dm::{DmDevice, Mapper, Sectors, Table, loops};
use treeboot_types::VmName;

use super::reading::Reading;
use super::rig::{self, KernelRig, Setup};
use super::until;
use crate::devices::{Failing, scratch};

/// As many as a case brings in within seconds.
const BLOCKS: usize = 2048;
/// Room for all that a case caches, and little else: a guest's disk is a file of the machine.
const DEVICE_BYTES: u64 = 160 << 20;
/// Reads that show that reading goes on.
const SOME: u64 = 100;

fn vm() -> VmName {
    "vm-0".parse().expect("a name")
}

/// The image attached, with a VM's disk.
pub(super) fn attached<'a>(images: impl IntoIterator<Item = &'a TestImage>) -> Wanted {
    let mut wanted = Wanted::default();
    for image in images {
        let base = WantedBase {
            content: image.content,
            backing: Backing::Cache,
            sources: image.sources[0].clone(),
            exports: [].into(),
        };
        wanted.bases.insert(image.content.digest, base);
        wanted.disks.entry(vm()).or_insert(WantedDisk {
            digest: image.content.digest,
            bytes: image.content.bytes,
        });
    }
    wanted
}

pub(super) async fn reach(rig: &KernelRig, wanted: &Wanted) {
    let applier = Applier {
        plane: rig.plane(),
        journal: rig.journal(),
    };
    applier.reach(&Scope::All, wanted).await.expect("reached");
}

pub(super) async fn leave(rig: &KernelRig) {
    let nothing = Wanted {
        doomed_disks: [vm()].into(),
        ..Wanted::default()
    };
    reach(rig, &nothing).await;
}

fn mapper() -> Mapper {
    Mapper::new().expect("device-mapper")
}

/// The table that a base has past the cache, and the one that it has now.
fn tables(image: &TestImage) -> (Table, Option<Table>) {
    let (mapper, digest) = (mapper(), image.content.digest);
    let verity = mapper
        .number(&DmDevice::Verity(digest))
        .expect("asked")
        .expect("there");
    let joined = loops::find(format!("/dev/dm-{}", verity.minor).as_ref()).expect("asked");
    let past = uncached(joined[0].number, Sectors(image.content.bytes / 512)).expect("a table");
    (past, mapper.table(&DmDevice::Base(digest)).expect("asked"))
}

fn is_cached(image: &TestImage) -> bool {
    let (past, now) = tables(image);
    now.is_some_and(|now| now != past)
}

fn filled(rig: &KernelRig, image: &TestImage) -> u64 {
    let stats = rig.plane().base_stats(&image.content.digest);
    stats.map_or(0, |stats| stats.cached_bytes)
}

fn group_devices() -> usize {
    let seen = mapper().list().expect("a list");
    let of_group = |device: &DmDevice| {
        matches!(
            device,
            DmDevice::Origins
                | DmDevice::CacheData
                | DmDevice::CacheMetadata
                | DmDevice::CacheGuard
                | DmDevice::Cached(_)
                | DmDevice::Served(_)
                | DmDevice::CacheGroup
                | DmDevice::Backing(_)
        )
    };
    seen.iter().filter(|seen| of_group(&seen.device)).count()
}

fn state_file(rig: &KernelRig) -> PathBuf {
    rig.dir.join("kernel/group/group")
}

fn state(rig: &KernelRig) -> State {
    let text = std::fs::read_to_string(state_file(rig)).expect("the group's state");
    text.parse().expect("a state")
}

fn base(image: &TestImage) -> PathBuf {
    Mapper::path(&DmDevice::Base(image.content.digest))
}

/// A cache device dies under the agent, while the image is read by a VM and otherwise: with bcache no read fails, with dm-cache none
/// after the base was moved; the agent says so, and its next start begins the cache anew.
pub(super) async fn a_device_dies(kind: Kind, while_filling: bool) {
    let failing = Failing::make(DEVICE_BYTES).expect("a device");
    let minor = failing.device().expect("a number").number.minor;
    let rate = if while_filling { 2 << 20 } else { 64 << 20 };
    let mut rig = rig::rig_with(Setup {
        devices: vec![format!("/dev/dm-{minor}").into()],
        fill_bytes_per_second: rate,
        blocks: BLOCKS,
        ..Some(kind).into()
    })
    .await;
    let image = rig.image(0);
    reach(&rig, &attached([&image])).await;
    let enough = if while_filling {
        image.content.bytes / 4
    } else {
        image.content.bytes
    };
    until("the filling", || filled(&rig, &image) >= enough).await;
    assert!(is_cached(&image), "the base is over the cache");
    assert_eq!(rig.plane().troubles(), []);
    let life = state(&rig).life;
    let readings = [base(&image), rig.disk(&vm())].map(|path| Reading::start(path, Arc::clone(&image.bytes)));
    for reading in &readings {
        reading.go_on(SOME).await;
    }

    failing.becomes("error").expect("it fails");
    let begun = Instant::now();
    until("the base past the cache", || !is_cached(&image)).await;
    let moved = begun.elapsed();
    until("the end of the group", || group_devices() == 0).await;
    let ended = begun.elapsed();
    let mut at_end = Vec::new();
    for reading in &readings {
        at_end.push(reading.go_on(2).await.errors);
    }
    for reading in &readings {
        reading.go_on(SOME).await;
    }
    println!(
        "{kind}{}: the base was past the dead cache after {} ms, the group gone after {} ms; {:?} reads failed, the longest took {} ms",
        if while_filling { " while it was filled" } else { "" },
        moved.as_millis(),
        ended.as_millis(),
        at_end,
        readings[1].tally().longest.as_millis(),
    );
    for (reading, errors) in readings.iter().zip(&at_end) {
        let now = reading.tally();
        assert_eq!(now.errors, *errors, "reads fail past the cache");
        assert_eq!(now.wrong, 0, "wrong bytes");
        assert!(kind == Kind::DmCache || now.errors == 0, "{now:?}");
    }
    let troubles = rig.plane().troubles();
    assert!(
        troubles.iter().any(|trouble| trouble.kind == "cache"
            && trouble.name == "group"
            && trouble.why.contains("restart")),
        "{troubles:?}"
    );

    failing.becomes(&failing.whole()).expect("it is mended");
    rig.restart().await;
    until("the base over a new cache", || is_cached(&image)).await;
    assert_ne!(state(&rig).life, life, "what the dead cache held is believed");
    until("the filling of the new cache", || filled(&rig, &image) > 0).await;
    assert_eq!(rig.plane().troubles(), []);
    for (reading, errors) in readings.into_iter().zip(at_end) {
        reading.go_on(SOME).await;
        let tally = reading.end();
        assert_eq!((tally.errors, tally.wrong), (errors, 0));
    }
    leave(&rig).await;
    failing.remove().expect("nobody uses it");
    assert_eq!(rig.residue().await, Vec::<String>::new());
}

fn cache_file(name: &str, mib: u64) -> PathBuf {
    let path = scratch(name).expect("a folder");
    std::fs::File::create(&path)
        .and_then(|file| file.set_len(mib << 20))
        .expect("a file");
    path
}

/// Two devices of different sizes; at the next start there is a third. dm-cache goes on with what it cached and grows, bcache begins
/// anew; no read fails.
pub(super) async fn several_devices(kind: Kind) {
    let mut rig = rig::rig_with(Setup {
        devices: vec![cache_file("first", 96), cache_file("second", 64)],
        fill_bytes_per_second: 64 << 20,
        blocks: BLOCKS,
        ..Some(kind).into()
    })
    .await;
    let image = rig.image(0);
    reach(&rig, &attached([&image])).await;
    until("the filling", || filled(&rig, &image) >= image.content.bytes).await;
    let length = || {
        let table = mapper().table(&DmDevice::CacheData).expect("asked");
        table.map_or(0, |table| table.length().0)
    };
    let (life, before) = (state(&rig).life, length());
    assert!(before > 140 << 11, "both devices are used: {before} sectors");
    let reading = Reading::start(rig.disk(&vm()), Arc::clone(&image.bytes));
    reading.go_on(SOME).await;

    rig.setup.devices.push(cache_file("third", 64));
    rig.restart().await;
    until("the larger cache", || {
        length() > before + (60 << 11) && is_cached(&image)
    })
    .await;
    match kind {
        Kind::DmCache => assert_eq!(state(&rig).life, life, "it grows and keeps what it has"),
        Kind::Bcache => assert_ne!(state(&rig).life, life, "a set has the size that it was made with"),
    }
    until("the filling, again", || {
        filled(&rig, &image) > 0 || kind == Kind::DmCache
    })
    .await;
    reading.go_on(SOME).await;
    let tally = reading.end();
    println!(
        "{kind}: from {before} to {} sectors, the longest of {} reads {} ms",
        length(),
        tally.reads,
        tally.longest.as_millis()
    );
    assert_eq!((tally.errors, tally.wrong), (0, 0));
    leave(&rig).await;
    assert_eq!(rig.residue().await, Vec::<String>::new());
}

/// All addresses of this life of the cache are used up: it is begun anew by itself, no read fails, and both images are cached then.
pub(super) async fn no_place_left(kind: Kind) {
    let mut rig = rig::rig(Some(kind)).await;
    let images = [rig.image(0), rig.image(1)];
    reach(&rig, &attached([&images[0]])).await;
    until("the first image in the cache", || is_cached(&images[0])).await;
    let before = state(&rig);
    rig.away();
    let text = before.to_string().replace(
        &format!("next {}", before.ranges.next()),
        &format!("next {}", Sectors(SPACE.0 - 128)),
    );
    std::fs::write(state_file(&rig), text).expect("written");
    rig.back().await;
    until("the first image taken over", || is_cached(&images[0])).await;
    assert_eq!(state(&rig).life, before.life);
    let reading = Reading::start(rig.disk(&vm()), Arc::clone(&images[0].bytes));
    reading.go_on(SOME).await;

    reach(&rig, &attached(&images)).await;
    until("both images in a new cache", || {
        state_file(&rig).exists() && images.iter().all(is_cached) && state(&rig).life != before.life
    })
    .await;
    until("no more trouble", || rig.plane().troubles().is_empty()).await;
    reading.go_on(SOME).await;
    let tally = reading.end();
    assert_eq!((tally.errors, tally.wrong), (0, 0));
    leave(&rig).await;
    assert_eq!(rig.residue().await, Vec::<String>::new());
}
