//! Groups of paths: no read fails while any path works, and none waits long.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use treeboot_iscsi::initiator::{
    Lun, PathGroup, PathGroupOptions, PathPolicy, PathSpec, PathState, PathStats,
};
use treeboot_types::Iqn;

use crate::fake::{DISK_BYTES, Fake, Script, image, target};
use crate::proxy::{Mode, Proxy};
use crate::session::until;

fn group() -> Arc<PathGroup> {
    PathGroup::new(PathGroupOptions::new(
        Iqn::new("iqn.2026-11.org.example:host").unwrap(),
    ))
}

pub(crate) fn spec(portal: impl ToString, label: &str) -> PathSpec {
    PathSpec {
        portal: portal.to_string(),
        target: target(),
        label: label.to_owned(),
        data_lun: 0,
        hash_lun: Some(1),
        chap: None,
    }
}

fn of(group: &PathGroup, label: &str) -> PathStats {
    let stats = group.stats();
    stats
        .into_iter()
        .find(|path| path.label == label)
        .expect("a listed path")
}

async fn until_state(group: &PathGroup, label: &str, state: PathState) {
    until(|| of(group, label).state == state).await;
}

async fn read_ok(group: &PathGroup, offset: u64) -> Duration {
    let begun = Instant::now();
    let (data, _) = group.read(Lun::Data, offset, 65_536, &[]).await.expect("a read");
    assert!(data == image(0, offset, 65_536), "wrong bytes at {offset}");
    begun.elapsed()
}

/// Reads from `depth` tasks until told to stop; gives the longest time that one took, and how many there were.
struct Load {
    stop: Arc<AtomicBool>,
    tasks: Vec<tokio::task::JoinHandle<(Duration, u64)>>,
}

impl Load {
    fn start(group: &Arc<PathGroup>, depth: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let start = |seed| {
            let (group, stop) = (group.clone(), stop.clone());
            tokio::spawn(async move {
                let (mut longest, mut count) = (Duration::ZERO, 0u64);
                let mut at = seed;
                while !stop.load(Ordering::Relaxed) {
                    at = (at * 1_103_515_245 + 12_345) % (DISK_BYTES / 65_536);
                    longest = longest.max(read_ok(&group, at * 65_536).await);
                    count += 1;
                }
                (longest, count)
            })
        };
        let tasks = (0..depth).map(start).collect();
        Self { stop, tasks }
    }

    async fn finish(self) -> (Duration, u64) {
        self.stop.store(true, Ordering::Relaxed);
        let ends = futures_util::future::join_all(self.tasks).await;
        let ends = ends.into_iter().map(|end| end.expect("no read fails"));
        ends.fold((Duration::ZERO, 0), |(longest, count), (l, c)| {
            (longest.max(l), count + c)
        })
    }
}

async fn reads_grow(group: &PathGroup, by: u64) {
    let before = group.totals().reads;
    until(|| group.totals().reads >= before + by).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_active_paths_share_the_load_and_the_fallback_is_left_alone() {
    for policy in [
        PathPolicy::RoundRobin,
        PathPolicy::ServiceTime,
        PathPolicy::QueueLength,
    ] {
        let (a, b, f) = tokio::join!(
            Fake::start(Script::Honest),
            Fake::start(Script::Honest),
            Fake::start(Script::Honest)
        );
        let name = Iqn::new("iqn.2026-11.org.example:host").unwrap();
        let group = PathGroup::new(PathGroupOptions {
            policy,
            ..PathGroupOptions::new(name)
        });
        group.set_paths(
            vec![spec(a.addr, "a"), spec(b.addr, "b")],
            vec![spec(f.addr, "f")],
        );
        until_state(&group, "a", PathState::Up).await;
        until_state(&group, "b", PathState::Up).await;
        let load = Load::start(&group, 16);
        reads_grow(&group, 500).await;
        load.finish().await;
        let (on_a, on_b) = (of(&group, "a").reads, of(&group, "b").reads);
        assert!(
            on_a.min(on_b) * 4 > on_a.max(on_b),
            "{policy:?}: {on_a} and {on_b}"
        );
        if policy == PathPolicy::RoundRobin {
            assert!(on_a.abs_diff(on_b) <= 16, "{on_a} and {on_b}");
        }
        // A machine that stands still makes both active paths look silent, and then the fallback is rightly called; that
        // it is not even connected otherwise is tested in virtual time, beside the code.
        let totals = group.totals();
        assert!(totals.fallback_bytes * 4 < totals.active_bytes, "{totals:?}");
        assert_eq!(totals.active_bytes, (on_a + on_b) * 65_536);
    }
}

#[tokio::test]
async fn the_hash_tree_comes_from_its_own_lun() {
    let fake = Fake::start(Script::Honest).await;
    let group = group();
    group.set_paths(vec![spec(fake.addr, "a")], Vec::new());
    let (data, path) = group.read(Lun::Hash, 8192, 4096, &[]).await.expect("a read");
    assert_eq!(data, image(1, 8192, 4096));
    assert_eq!(path, of(&group, "a").id);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_parent_killed_under_load_fails_no_read_and_its_return_is_noticed() {
    let parent = Fake::start(Script::Honest).await;
    let origin = Fake::start(Script::Honest).await;
    let group = group();
    group.set_paths(
        vec![spec(parent.addr, "parent")],
        vec![spec(origin.addr, "origin")],
    );
    until_state(&group, "parent", PathState::Up).await;
    let load = Load::start(&group, 16);
    reads_grow(&group, 100).await;
    let at = parent.addr;
    drop(parent);
    until(|| group.totals().fallback_bytes > 100 * 65_536).await;
    let parent = Fake::start_at(Script::Honest, at).await;
    until_state(&group, "parent", PathState::Up).await;
    let on_origin = of(&group, "origin").reads;
    until(|| parent.reads() > 100).await;
    assert!(of(&group, "origin").reads <= on_origin + 16, "reads go home");
    let (longest, reads) = load.finish().await;
    println!("killed: longest read {longest:?} of {reads}");
    assert!(longest < Duration::from_millis(500), "{longest:?}");
    assert_eq!(group.totals().failed_reads, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_parent_that_falls_silent_stalls_reads_for_less_than_two_seconds() {
    let parent = Fake::start(Script::Honest).await;
    let proxy = Proxy::start(parent.addr).await;
    let origin = Fake::start(Script::Honest).await;
    let group = group();
    group.set_paths(
        vec![spec(proxy.addr, "parent")],
        vec![spec(origin.addr, "origin")],
    );
    until_state(&group, "parent", PathState::Up).await;
    let load = Load::start(&group, 16);
    reads_grow(&group, 100).await;
    proxy.set(Mode::Swallow);
    until(|| group.totals().fallback_bytes > 0).await;
    assert_eq!(of(&group, "parent").state, PathState::Down);
    let (longest, _) = load.finish().await;
    println!("silent: longest read {longest:?}");
    assert!((700..1_500).contains(&longest.as_millis()), "{longest:?}");
    // It stays down while it is silent, and comes back with its voice.
    proxy.set(Mode::Cut);
    proxy.set(Mode::Pass);
    until_state(&group, "parent", PathState::Up).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_that_is_cut_and_one_that_delays_fail_no_read() {
    let parent = Fake::start(Script::Honest).await;
    let proxy = Proxy::start(parent.addr).await;
    let origin = Fake::start(Script::Honest).await;
    let group = group();
    group.set_paths(
        vec![spec(proxy.addr, "parent")],
        vec![spec(origin.addr, "origin")],
    );
    until_state(&group, "parent", PathState::Up).await;
    let load = Load::start(&group, 4);
    reads_grow(&group, 50).await;
    proxy.set(Mode::Delay(5));
    reads_grow(&group, 50).await;
    assert_eq!(group.totals().fallback_bytes, 0, "slow is not dead");
    proxy.set(Mode::Cut);
    reads_grow(&group, 50).await;
    assert!(group.totals().fallback_bytes > 0);
    let (longest, _) = load.finish().await;
    println!("cut and delayed: longest read {longest:?}");
    assert!(longest < Duration::from_secs(2), "{longest:?}");
}

#[tokio::test]
async fn a_parent_that_is_alive_but_never_answers_is_hedged() {
    let parent = Fake::start(Script::DeafToReads).await;
    let origin = Fake::start(Script::Honest).await;
    let group = group();
    group.set_paths(
        vec![spec(parent.addr, "parent")],
        vec![spec(origin.addr, "origin")],
    );
    until_state(&group, "parent", PathState::Up).await;
    let took = read_ok(&group, 0).await;
    assert!((1_100..2_000).contains(&took.as_millis()), "{took:?}");
    assert_eq!(group.totals().hedges, 1);
    // It is not dead, but what comes next does not wait for it.
    assert_eq!(of(&group, "parent").state, PathState::Suspect);
    assert!(read_ok(&group, 65_536).await < Duration::from_millis(500));
}

#[tokio::test]
async fn a_parent_that_attaches_a_little_later_is_waited_for() {
    let parent = Fake::start(Script::NoLoginReply).await;
    let at = parent.addr;
    drop(parent);
    let origin = Fake::start(Script::Honest).await;
    let group = group();
    group.set_paths(vec![spec(at, "parent")], vec![spec(origin.addr, "origin")]);
    until(|| of(&group, "parent").failures > 0).await;
    let reading = tokio::spawn({
        let group = group.clone();
        async move { read_ok(&group, 0).await }
    });
    let _parent = Fake::start_at(Script::Honest, at).await;
    reading.await.expect("the read");
    assert_eq!(
        group.totals().fallback_bytes,
        0,
        "a cold burst does not land on the origin"
    );
}

#[tokio::test]
async fn wrong_bytes_are_fetched_elsewhere_and_their_path_is_asked_no_more() {
    let bad = Fake::start(Script::WrongBytes).await;
    let good = Fake::start(Script::Honest).await;
    let group = group();
    let paths = || vec![spec(bad.addr, "bad"), spec(good.addr, "good")];
    group.set_paths(paths(), Vec::new());
    until_state(&group, "bad", PathState::Up).await;
    until_state(&group, "good", PathState::Up).await;
    let (bad_id, good_id) = (of(&group, "bad").id, of(&group, "good").id);
    let (data, from) = group.read(Lun::Data, 0, 4096, &[good_id]).await.expect("a read");
    assert_eq!((from, &data[..2]), (bad_id, &[0xee, 0xee][..]));
    group.distrust(from);
    let (data, from) = group.read(Lun::Data, 0, 4096, &[bad_id]).await.expect("a read");
    assert_eq!((from, data), (good_id, image(0, 0, 4096).into()));
    let before = bad.reads();
    for at in 0..50 {
        read_ok(&group, at * 65_536).await;
    }
    group.set_paths(paths(), Vec::new());
    assert_eq!(
        (bad.reads(), of(&group, "bad").state),
        (before, PathState::Distrusted)
    );
}

#[tokio::test]
async fn a_parent_with_errors_sends_reads_on_and_a_lun_that_is_missing_is_named() {
    let bad = Fake::start(Script::MediumError).await;
    let good = Fake::start(Script::Honest).await;
    let group = group();
    group.set_paths(vec![spec(bad.addr, "bad")], vec![spec(good.addr, "good")]);
    until_state(&group, "bad", PathState::Up).await;
    assert!(read_ok(&group, 0).await < Duration::from_millis(500));
    let said = of(&group, "bad").last_failure.expect("a failure");
    assert!(said.contains("MEDIUM ERROR"), "{said}");

    let wrong = PathSpec {
        target: Iqn::new("iqn.2026-11.org.example:other").unwrap(),
        ..spec(good.addr, "wrong")
    };
    group.set_paths(vec![wrong], Vec::new());
    until(|| of(&group, "wrong").last_failure.is_some()).await;
    let said = of(&group, "wrong").last_failure.expect("a failure");
    assert!(
        said.contains("iqn.2026-11.org.example:other") && said.contains("no such target"),
        "{said}"
    );
}

#[tokio::test]
async fn with_no_path_a_read_ends_in_time_and_says_why() {
    let nobody = {
        let fake = Fake::start(Script::Honest).await;
        fake.addr
    };
    let mut options = PathGroupOptions::new(Iqn::new("iqn.2026-11.org.example:host").unwrap());
    options.limits.wait_ms = 500;
    let group = PathGroup::new(options);
    let begun = Instant::now();
    let error = group
        .read(Lun::Data, 0, 4096, &[])
        .await
        .expect_err("no path is listed");
    assert!(error.to_string().contains("no path is listed"), "{error}");
    group.set_paths(vec![spec(nobody, "parent")], Vec::new());
    let error = group
        .read(Lun::Data, 0, 4096, &[])
        .await
        .expect_err("nobody listens");
    assert!((1_000..2_000).contains(&begun.elapsed().as_millis()));
    assert!(
        error
            .to_string()
            .contains(&format!("parent ({nobody}): no connection")),
        "{error}"
    );
}

#[tokio::test]
async fn new_parents_take_over_at_once_and_old_ones_are_logged_out() {
    let old = Fake::start(Script::Honest).await;
    let new = Fake::start(Script::Honest).await;
    let group = group();
    group.set_paths(vec![spec(old.addr, "old")], Vec::new());
    read_ok(&group, 0).await;
    old.play(Script::DeafToReads);
    let stuck = tokio::spawn({
        let group = group.clone();
        async move { read_ok(&group, 65_536).await }
    });
    until(|| old.reads() == 2).await;
    group.set_paths(vec![spec(new.addr, "new")], Vec::new());
    let took = stuck.await.expect("the read");
    assert!(took < Duration::from_millis(500), "{took:?}");
    until(|| old.shared.logouts.load(Ordering::Relaxed) == 1).await;
    // A path that stays keeps its session.
    let sessions = new.shared.sessions.load(Ordering::Relaxed);
    group.set_paths(vec![spec(new.addr, "renamed")], vec![spec(old.addr, "old")]);
    read_ok(&group, 0).await;
    assert_eq!(new.shared.sessions.load(Ordering::Relaxed), sessions);
    drop(group);
    until(|| new.shared.logouts.load(Ordering::Relaxed) == 1).await;
}
