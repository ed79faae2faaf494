//! Real agents in a chain, over real sessions, under a coordinator that the test plays.

use crate::common::*;
use tokio_util::sync::CancellationToken;
use treeboot_agent::daemon::{Daemon, DaemonError};
use treeboot_proto::v1;
use treeboot_types::{ImageId, Iqn};

struct Chain {
    dir: tempfile::TempDir,
    play: Play,
    coordinator: std::net::SocketAddr,
    stop: CancellationToken,
    origin: Daemon,
    hosts: Vec<Daemon>,
    image: ImageId,
    bytes: Vec<u8>,
}

/// An origin, and hosts each below the one before.
async fn chain(names: &[&str]) -> Chain {
    let dir = tempfile::tempdir().unwrap();
    let play = Play::default();
    let stop = CancellationToken::new();
    let coordinator = play.start(None, stop.clone()).await;
    for pair in names.windows(2) {
        play.0.lock().parents.insert(pair[1].into(), pair[0].into());
    }
    let origin = Daemon::start(&options(dir.path(), "origin", coordinator))
        .await
        .unwrap();
    let bytes = content(1000);
    let image = import(origin.host(), "debian", &bytes).await;
    let mut hosts = Vec::new();
    for name in names {
        hosts.push(
            Daemon::start(&options(dir.path(), name, coordinator))
                .await
                .unwrap(),
        );
    }
    until("all hosts are known", || {
        play.0.lock().hosts.len() == names.len() + 1
    })
    .await;
    Chain {
        dir,
        play,
        coordinator,
        stop,
        origin,
        hosts,
        image,
        bytes,
    }
}

impl Chain {
    fn stats(&self, host: usize) -> treeboot_agent::plane::BaseStats {
        let host = self.hosts[host].host();
        let digest = host.desired().images[&self.image].content.digest;
        host.plane().base_stats(&digest).unwrap()
    }

    async fn end(self) {
        for host in self.hosts {
            host.stop().await;
        }
        self.origin.stop().await;
        self.stop.cancel();
    }

    async fn restart(&mut self, host: usize, orderly: bool) {
        let old = self.hosts.remove(host);
        let name = old.host().info().name.to_string();
        let (listen, portal) = (old.address(), old.portal().parse().unwrap());
        if orderly {
            old.stop().await;
        } else {
            // As near to a kill as one process gets: sessions are cut, nothing is said to anyone.
            old.host().end().await;
            old.stop().await;
        }
        let mut options = options(self.dir.path(), &name, self.coordinator);
        options.listen = listen;
        options.portal = portal;
        let begun = std::time::Instant::now();
        let daemon = loop {
            match Daemon::start(&options).await {
                // Another test's child holds what its parent had open, until it is what it is to be.
                Err(DaemonError::Listen { .. } | DaemonError::Plane(_)) if begun.elapsed() < SOON => {
                    tokio::task::yield_now().await;
                }
                started => break started.unwrap(),
            }
        };
        self.hosts.insert(host, daemon);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_are_the_same_at_each_level_and_each_chunk_crosses_each_link_once() {
    let chain = chain(&["h1", "h2", "h3"]).await;
    for host in &chain.hosts {
        host.host().attach(&"debian".parse().unwrap()).await.unwrap();
    }
    // Two VMs on the last host, both read everything.
    for name in ["a", "b"] {
        let vm = vm(name);
        chain.hosts[2]
            .host()
            .create(&vm, &"debian@1".parse().unwrap())
            .await
            .unwrap();
        let session = disk(&chain.hosts[2], &vm).await;
        assert!(read_all(&session, chain.bytes.len()).await == chain.bytes);
        session.close().await;
    }
    let chunks = chain.bytes.len().div_ceil(65536) as u64;
    for level in 0..3 {
        let stats = chain.stats(level);
        assert!(stats.chunk_misses <= chunks, "level {level}: {stats:?}");
        assert!(
            stats.parent_bytes <= (chunks + 4) * 65536,
            "level {level}: {stats:?}"
        );
        assert_eq!(stats.fallback_bytes, 0);
        assert_eq!(stats.bad_chunks, 0);
    }
    let unique = chain.stats(2).guest_unique_bytes;
    assert_eq!(unique, chain.bytes.len() as u64);
    // The base itself is the same at the first level too, read as its child does.
    let parent = &chain.hosts[0];
    let child = chain.hosts[1].host().info().name;
    let session = session(parent.portal(), Iqn::of_image(&chain.image), Iqn::of_host(&child)).await;
    assert!(read_all(&session.unwrap(), chain.bytes.len()).await == chain.bytes);
    let registered = chain.play.0.lock().registered.clone();
    assert_eq!(registered.into_iter().collect::<Vec<_>>(), ["h1", "h2", "h3"]);
    chain.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_whose_place_is_gone_keeps_its_cache_and_one_whose_image_is_gone_drops_it() {
    let chain = chain(&["h1"]).await;
    let host = chain.hosts[0].host();
    for (drop_cache, kept) in [(false, 1), (true, 0)] {
        host.attach(&"debian".parse().unwrap()).await.unwrap();
        chain.play.end("h1", drop_cache);
        until("the attachment's end", || host.desired().images.is_empty()).await;
        assert_eq!(host.desired().kept_caches.len(), kept);
    }
    chain.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_is_no_child_is_refused_by_a_base() {
    let chain = chain(&["h1", "h2"]).await;
    chain.hosts[0]
        .host()
        .attach(&"debian".parse().unwrap())
        .await
        .unwrap();
    let target = Iqn::of_image(&chain.image);
    let stranger = Iqn::new("iqn.2026-11.dev.treeboot:host:h20").unwrap();
    assert!(session(chain.hosts[0].portal(), target, stranger).await.is_err());
    chain.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_keeps_disks_and_serves_them_without_the_coordinator() {
    let mut chain = chain(&["h1", "h2"]).await;
    let image = "debian@1".parse().unwrap();
    for host in &chain.hosts {
        host.host().attach(&image).await.unwrap();
    }
    let vm = vm("web-1");
    chain.hosts[1].host().create(&vm, &image).await.unwrap();
    let session = disk(&chain.hosts[1], &vm).await;
    let written = vec![0xa5; 3 * 4096];
    session.write(0, 8192, written.clone().into()).await.unwrap();
    session.close().await;
    let mut expected = chain.bytes.clone();
    expected[8192..8192 + written.len()].copy_from_slice(&written);
    // The coordinator goes first: a restart needs nothing but the journal.
    chain.stop.cancel();
    chain.play.drop_streams();
    for orderly in [true, false] {
        chain.restart(1, orderly).await;
        let session = disk(&chain.hosts[1], &vm).await;
        assert!(read_all(&session, expected.len()).await == expected);
        session.close().await;
        assert_eq!(chain.hosts[1].host().desired().disks.len(), 1);
    }
    // What needs the coordinator says who is missing; what does not, works.
    let host = chain.hosts[1].host();
    let error = host
        .create(&crate::common::vm("web-2"), &"other".parse().unwrap())
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains(&chain.coordinator.to_string()),
        "{error}"
    );
    host.create(&crate::common::vm("web-2"), &image).await.unwrap();
    host.destroy(&vm, false).await.unwrap();
    assert_eq!(host.desired().disks.len(), 1);
    // It is back: the attachments are told again.
    chain.play.0.lock().states.clear();
    let stop = CancellationToken::new();
    chain.play.start(Some(chain.coordinator), stop.clone()).await;
    until("both hosts are back", || {
        let play = chain.play.0.lock();
        ["h1", "h2"].iter().all(|host| {
            play.states
                .get(*host)
                .is_some_and(|state| state.attachments.len() == 1)
        })
    })
    .await;
    chain.end().await;
    stop.cancel();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_bytes_of_a_parent_reach_nobody_and_are_reported() {
    let chain = chain(&["h1", "h2"]).await;
    let image = "debian@1".parse().unwrap();
    for host in &chain.hosts {
        host.host().attach(&image).await.unwrap();
    }
    // The parent reads everything, and so has checked it; then its cache changes under it.
    let vm = vm("warm");
    chain.hosts[0].host().create(&vm, &image).await.unwrap();
    assert!(read_all(&disk(&chain.hosts[0], &vm).await, chain.bytes.len()).await == chain.bytes);
    let digest = chain.hosts[0].host().desired().images[&chain.image]
        .content
        .digest;
    let data = chain
        .dir
        .path()
        .join("h1/cache")
        .join(digest.to_string())
        .join("data");
    until("the parent has stored it", || {
        chain.stats(0).cached_bytes + 65536 * 80 >= chain.bytes.len() as u64
            && std::fs::metadata(&data).is_ok_and(|meta| meta.len() > 0)
    })
    .await;
    {
        use std::os::unix::fs::FileExt as _;
        let file = std::fs::OpenOptions::new().write(true).open(&data).unwrap();
        for at in (0..chain.bytes.len() as u64).step_by(65536) {
            file.write_all_at(b"poison", at + 512).unwrap();
        }
    }
    chain.hosts[1].host().create(&vm, &image).await.unwrap();
    assert!(read_all(&disk(&chain.hosts[1], &vm).await, chain.bytes.len()).await == chain.bytes);
    let stats = chain.stats(1);
    assert!(stats.bad_chunks > 0 && stats.fallback_bytes > 0, "{stats:?}");
    until("the coordinator is told", || {
        chain
            .play
            .0
            .lock()
            .complaints
            .iter()
            .any(|bad| bad.host == "h1" && bad.fault() == v1::bad_parent::Fault::WrongBytes)
    })
    .await;
    chain.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_place_under_reads_is_taken_without_an_error() {
    let chain = chain(&["h1", "h2"]).await;
    let image = "debian@1".parse().unwrap();
    for host in &chain.hosts {
        host.host().attach(&image).await.unwrap();
    }
    let vm = vm("web-1");
    chain.hosts[1].host().create(&vm, &image).await.unwrap();
    let session = disk(&chain.hosts[1], &vm).await;
    let reading = async { assert!(read_all(&session, chain.bytes.len()).await == chain.bytes) };
    let moving = async {
        for n in 0..6 {
            chain
                .play
                .move_to("h2", if n % 2 == 0 { None } else { Some("h1") });
            tokio::task::yield_now().await;
        }
        chain.play.move_to("h2", None);
    };
    futures_util::future::join(reading, moving).await;
    let reads_from_origin = || {
        let place = chain.hosts[1].host().attachment(&chain.image);
        place.is_some_and(|place| place.stripes[0].active[0].origin)
    };
    until("the last place is taken", reads_from_origin).await;
    chain.end().await;
}

#[tokio::test]
async fn an_agent_that_the_coordinator_refuses_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let play = Play::default();
    play.0.lock().refuse = Some("another agent already serves as host 'h1'".into());
    let stop = CancellationToken::new();
    let coordinator = play.start(None, stop.clone()).await;
    let mut daemon = Daemon::start(&options(dir.path(), "h1", coordinator))
        .await
        .unwrap();
    let error = tokio::time::timeout(SOON, daemon.failed()).await.unwrap();
    assert!(
        matches!(error, DaemonError::Refused(_)) && error.to_string().contains("'h1'"),
        "{error}"
    );
    daemon.stop().await;
}

#[tokio::test]
async fn one_state_directory_is_for_one_agent_and_one_name() {
    let dir = tempfile::tempdir().unwrap();
    let nowhere = ([127, 0, 0, 1], 1).into();
    let first = Daemon::start(&options(dir.path(), "h1", nowhere)).await.unwrap();
    let second = Daemon::start(&options(dir.path(), "h1", nowhere)).await;
    assert!(matches!(second, Err(DaemonError::InUse { .. })));
    let mut taken = options(dir.path(), "h2", nowhere);
    taken.portal = first.portal().parse().unwrap();
    let error = Daemon::start(&taken).await.err().unwrap();
    let text = treeboot_agent::host::chain(&error);
    assert!(text.contains(first.portal()), "{text}");
    first.stop().await;
    let mut other = options(dir.path(), "h3", nowhere);
    other.state = dir.path().join("h1");
    assert!(matches!(
        Daemon::start(&other).await,
        Err(DaemonError::OtherHost { .. })
    ));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_import_that_fails_leaves_nothing() {
    use treeboot_agent::host::Host;
    use treeboot_agent::store::{ImportHeader, ImportPart};
    let chain = chain(&[]).await;
    let store = chain.dir.path().join("store");
    let names = || std::fs::read_dir(&store).unwrap().count();
    assert_eq!(names(), 1);
    let header = |bytes| ImportHeader {
        image: "second".into(),
        bytes,
        chunk_bytes: 65536,
        adopted_from: Vec::new(),
        base: None,
    };
    let part = |offset| ImportPart {
        offset,
        data: vec![7; 4096].into(),
    };
    let attempts = [
        (header(0), vec![]),
        (header(1000), vec![]),
        (header(8192), vec![Ok(part(0)), Err("gone away".to_owned())]),
        (header(8192), vec![Ok(part(4096)), Ok(part(0))]),
        (header(8192), vec![Ok(part(8192))]),
    ];
    let host = chain.origin.host();
    for (header, parts) in attempts {
        let (sender, inbox) = Host::import_parts();
        let sending = async move {
            for part in parts {
                let _ = sender.send(part).await;
            }
        };
        let importing = host.import("second".parse().unwrap(), header, inbox);
        let (result, ()) = futures_util::future::join(importing, sending).await;
        assert!(result.unwrap_err().to_string().contains("second"));
        assert_eq!(names(), 1);
    }
    // The coordinator says no at the very end.
    chain.play.0.lock().fail_add_image = true;
    let (sender, inbox) = Host::import_parts();
    sender.send(Ok(part(0))).await.unwrap();
    drop(sender);
    let result = host.import("second".parse().unwrap(), header(8192), inbox).await;
    assert!(result.is_err());
    assert_eq!(names(), 1);
    assert_eq!(host.desired().images.len(), 1);
    // And the same content under the same name is no new image.
    chain.play.0.lock().fail_add_image = false;
    assert_eq!(import(host, "debian", &chain.bytes).await, chain.image);
    assert_eq!(names(), 1);
    chain.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_import_is_complete_only_if_its_last_part_says_so() {
    use treeboot_proto::v1;
    use treeboot_proto::v1::import_part::Part;
    let chain = chain(&[]).await;
    let store = chain.dir.path().join("store");
    let names = || std::fs::read_dir(&store).unwrap().count();
    let before = names();
    let address = format!("http://{}", chain.origin.address());
    let mut client = v1::agent_client::AgentClient::connect(address).await.unwrap();
    let header = Part::Header(v1::ImportHeader {
        image: Some(v1::ImageId {
            name: "second".into(),
            version: 0,
        }),
        bytes: 8192,
        chunk_bytes: 0,
        base: None,
    });
    let data = Part::Data(v1::ImportData {
        offset: 0,
        data: vec![7; 4096],
    });
    let end = |data_bytes| Part::End(v1::ImportEnd { data_bytes });
    let attempts = [
        (vec![header.clone(), data.clone()], false),
        (vec![header.clone(), data.clone(), end(8192)], false),
        (vec![header.clone(), header.clone(), end(0)], false),
        (vec![header, data, end(4096)], true),
    ];
    for (parts, complete) in attempts {
        let parts: Vec<_> = parts
            .into_iter()
            .map(|part| v1::ImportPart { part: Some(part) })
            .collect();
        let imported = client.import_image(tokio_stream::iter(parts)).await;
        assert_eq!(imported.is_ok(), complete, "{imported:?}");
        assert_eq!(names(), before + usize::from(complete));
    }
    chain.end().await;
}
