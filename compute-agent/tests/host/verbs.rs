//! The verbs over a model plane that fails at each step in turn: nothing is left, and a retry succeeds.

use std::sync::Arc;

use crate::common::*;
use tokio_util::sync::CancellationToken;
use treeboot_agent::host::{DiskOptions, Host, HostError, Settings};
use treeboot_agent::journal::Journal;
use treeboot_agent::plane::Plane;
use treeboot_agent::plane::faulty::{FaultMode, FaultyPlane};
use treeboot_agent::plane::model::ModelPlane;
use treeboot_agent::stack::Found;
use treeboot_proto::v1;
use treeboot_types::{HostName, Labels};

struct Rig {
    _dir: tempfile::TempDir,
    model: Arc<ModelPlane>,
    host: Host,
    play: Play,
    stop: CancellationToken,
}

/// A host over a model plane that fails at step `at`.
async fn rig(at: usize) -> Rig {
    let dir = tempfile::tempdir().unwrap();
    let play = Play::default();
    let stop = CancellationToken::new();
    let coordinator = play.start(None, stop.clone()).await;
    let digest = treeboot_types::Digest([7; 32]);
    play.0.lock().images.push(v1::Image {
        id: Some(v1::ImageId {
            name: "debian".into(),
            version: 1,
        }),
        digest: digest.0.to_vec(),
        bytes: 1 << 20,
        chunk_bytes: 65536,
        stripes: 1,
        stripe_unit_bytes: 1 << 20,
        origins: vec![v1::Origin {
            endpoint: Some(v1::Endpoint {
                portal: "origin:1".into(),
                target: "iqn.2026-11.dev.treeboot:image:debian:1".into(),
                data_lun: 0,
                hash_lun: Some(1),
            }),
            host: "origin".into(),
            labels: Default::default(),
        }],
        created_unix_ms: 0,
        allocated_bytes: 0,
    });
    let model = Arc::new(ModelPlane::default());
    model.serve(digest, content(256));
    let plane = FaultyPlane::new(Arc::clone(&model) as Arc<dyn Plane>, at, FaultMode::Error);
    let settings = Settings {
        name: HostName::new("h1").unwrap(),
        instance: "test".into(),
        state_dir: dir.path().to_owned(),
        deltas_dir: dir.path().to_owned(),
        store_dir: None,
        keys: Arc::new(treeboot_agent::keys::Keys::none()),
        dialer: treeboot_identity::tls::Dialer::Insecure,
        coordinator: format!("http://{coordinator}"),
        agent_address: "127.0.0.1:1".into(),
        labels: Labels::new(),
        weight: 1,
        delta_limit: None,
    };
    let journal = Journal::open(dir.path()).unwrap().0;
    let (host, _refused) = Host::start(settings, Arc::new(plane), journal).await.unwrap();
    Rig {
        _dir: dir,
        model,
        host,
        play,
        stop,
    }
}

impl Rig {
    async fn end(self) {
        self.host.end().await;
        self.stop.cancel();
    }
}

#[tokio::test]
async fn a_create_that_fails_at_any_step_leaves_nothing_and_its_retry_succeeds() {
    let image = "debian".parse().unwrap();
    let mut failed = 0;
    for at in 0..32 {
        let rig = rig(at).await;
        let result = rig.host.create(&vm("web-1"), &image).await;
        let Err(error) = result else {
            rig.end().await;
            break;
        };
        failed += 1;
        assert!(matches!(error, HostError::Reach { .. }), "{error}");
        until("the base is given up", || {
            rig.model.found() == Found::default() || kept(&rig)
        })
        .await;
        let desired = rig.host.desired();
        assert!(
            desired.disks.is_empty() && desired.images.is_empty(),
            "{desired:?}"
        );
        rig.host.create(&vm("web-1"), &image).await.unwrap();
        rig.model.write_disk(&vm("web-1"), 0, &[1; 4096]).unwrap();
        rig.end().await;
    }
    assert_eq!(failed, 5, "paths, base, export, delta, disk");
}

/// Nothing but a cache, which is kept for the next time.
fn kept(rig: &Rig) -> bool {
    let found = rig.model.found();
    let caches = found.caches.clone();
    found
        == Found {
            caches,
            ..Found::default()
        }
}

#[tokio::test]
async fn a_destroy_that_fails_at_any_step_is_finished_by_its_retry() {
    let image = "debian".parse().unwrap();
    for at in 5..10 {
        let rig = rig(at).await;
        rig.host.create(&vm("web-1"), &image).await.unwrap();
        let first = rig.host.destroy(&vm("web-1"), false).await;
        if first.is_err() {
            rig.host.destroy(&vm("web-1"), false).await.unwrap();
        }
        assert!(rig.model.found().deltas.is_empty());
        assert!(rig.host.desired().disks.is_empty());
        // The name is free, and the disk is new.
        rig.host.create(&vm("web-1"), &image).await.unwrap();
        let fresh = rig.model.read_disk(&vm("web-1"), 0, 4096).unwrap();
        assert_eq!(fresh, content(1));
        rig.end().await;
    }
}

#[tokio::test]
async fn each_verb_names_what_is_wrong_with_its_request() {
    let rig = rig(usize::MAX).await;
    let (host, image) = (&rig.host, "debian@1".parse().unwrap());
    host.create(&vm("web-1"), &image).await.unwrap();
    host.create(&vm("web-1"), &image).await.unwrap();
    let other = "debian@2".parse().unwrap();
    let error = host.create(&vm("web-1"), &other).await.unwrap_err();
    assert!(matches!(error, HostError::VmExists { .. }) && error.to_string().contains("debian@1"));
    let error = host.create(&vm("web-2"), &other).await.unwrap_err();
    assert!(error.to_string().contains("debian"), "{error}");
    for error in [
        host.destroy(&vm("nobody"), false).await.unwrap_err(),
        host.stop_vm(&vm("nobody"), true).await.unwrap_err(),
    ] {
        assert!(matches!(error, HostError::UnknownVm { .. }) && error.to_string().contains("'nobody'"));
    }
    let error = host.detach(&"debian@1".parse().unwrap()).await.unwrap_err();
    assert!(matches!(error, HostError::ImageInUse { .. }) && error.to_string().contains("'web-1'"));
    let error = host.drop_image(&"debian@1".parse().unwrap()).await.unwrap_err();
    assert!(error.to_string().contains("'h1'"), "{error}");
    assert_eq!(host.desired().disks.len(), 1);
    assert!(rig.play.0.lock().removed.is_empty());
    rig.end().await;
}

#[tokio::test]
async fn many_creates_at_once_share_one_attachment() {
    let rig = rig(usize::MAX).await;
    let image = "debian".parse().unwrap();
    let names: Vec<_> = (0..64).map(|n| vm(&format!("vm-{n}"))).collect();
    let creates = names.iter().map(|vm| rig.host.create(vm, &image));
    futures_util::future::try_join_all(creates).await.unwrap();
    assert_eq!(rig.model.found().disks.len(), 64);
    assert_eq!(rig.model.found().bases.len(), 1);
    let destroys = names.iter().map(|vm| rig.host.destroy(vm, false));
    futures_util::future::try_join_all(destroys).await.unwrap();
    until("the last disk takes the base with it", || {
        rig.model.found().bases.is_empty()
    })
    .await;
    until("the coordinator is told", || {
        rig.play.0.lock().removed.contains("h1")
    })
    .await;
    rig.end().await;
}

#[tokio::test]
async fn one_call_makes_many_disks_and_says_of_each_what_it_lacks() {
    let rig = rig(usize::MAX).await;
    let other = rig
        .host
        .create_many(
            vec![vm("vm-0")],
            &"nobody".parse().unwrap(),
            DiskOptions::default(),
        )
        .await;
    assert!(other.is_err(), "nobody knows the image, so nothing was begun");
    let names: Vec<_> = (0..300).map(|n| vm(&format!("vm-{n}"))).collect();
    let results = rig
        .host
        .create_many(
            names.clone(),
            &"debian@1".parse().unwrap(),
            DiskOptions::default(),
        )
        .await
        .unwrap();
    assert!(results.iter().all(Result::is_ok), "{results:?}");
    assert_eq!(rig.model.found().disks.len(), names.len());
    let desired = rig.host.desired();
    let identities: std::collections::BTreeSet<_> =
        desired.disks.values().map(|disk| disk.instance).collect();
    assert_eq!(identities.len(), names.len(), "each VM is somebody else");
    // The same call again changes nothing, and makes the one that is missing.
    rig.host.destroy(&names[7], false).await.unwrap();
    let results = rig
        .host
        .create_many(names.clone(), &"debian".parse().unwrap(), DiskOptions::default())
        .await
        .unwrap();
    assert!(results.iter().all(Result::is_ok), "{results:?}");
    assert_eq!(rig.model.found().disks.len(), names.len());
    rig.end().await;
}

#[tokio::test]
async fn many_disks_whose_base_fails_at_any_step_leave_nothing_and_a_retry_makes_them() {
    let image = "debian".parse().unwrap();
    let names: Vec<_> = (0..8).map(|n| vm(&format!("vm-{n}"))).collect();
    for at in 0..19 {
        let rig = rig(at).await;
        let results = rig
            .host
            .create_many(names.clone(), &image, DiskOptions::default())
            .await
            .unwrap();
        let missing = results.iter().filter(|result| result.is_err()).count();
        assert!(missing > 0, "step {at} was not reached");
        until("what failed is not desired any more", || {
            rig.host.desired().disks.len() == names.len() - missing
        })
        .await;
        let results = rig
            .host
            .create_many(names.clone(), &image, DiskOptions::default())
            .await
            .unwrap();
        assert!(results.iter().all(Result::is_ok), "at {at}: {results:?}");
        for name in &names {
            rig.model.write_disk(name, 0, &[1; 4096]).unwrap();
        }
        rig.end().await;
    }
}

#[tokio::test]
async fn a_plane_without_layers_refuses_snapshots_with_the_reason() {
    let rig = rig(usize::MAX).await;
    rig.host
        .create(&vm("web-1"), &"debian".parse().unwrap())
        .await
        .unwrap();
    let name = "a".parse().unwrap();
    let refused = rig.host.snapshot(&vm("web-1"), &name).await.unwrap_err();
    assert!(matches!(&refused, HostError::NotOnPlane { .. }), "{refused}");
    let unknown = rig.host.snapshot(&vm("web-2"), &name).await.unwrap_err();
    assert!(matches!(&unknown, HostError::UnknownVm { .. }), "{unknown}");
    rig.end().await;
}

#[tokio::test]
async fn a_disk_becomes_a_device_when_asked_and_a_failure_at_any_step_leaves_nothing() {
    let image = "debian".parse().unwrap();
    let mut failed = 0;
    for at in 0..32 {
        let rig = rig(at).await;
        let result = rig.host.create_device(&vm("web-1"), &image).await;
        if result.is_err() {
            failed += 1;
            until("nothing is left", || {
                rig.model.found() == Found::default() || kept(&rig)
            })
            .await;
            rig.host.create_device(&vm("web-1"), &image).await.unwrap();
        }
        assert_eq!(rig.model.found().devices.len(), 1, "at {at}");
        // Asked again without, it stays what it is; destroyed, it goes first.
        rig.host.create(&vm("web-1"), &image).await.unwrap();
        assert_eq!(rig.model.found().devices.len(), 1);
        if rig.host.destroy(&vm("web-1"), false).await.is_err() {
            rig.host.destroy(&vm("web-1"), false).await.unwrap();
        }
        assert!(rig.model.found().devices.is_empty() && rig.model.found().deltas.is_empty());
        rig.end().await;
        if result.is_ok() {
            break;
        }
    }
    assert_eq!(failed, 6, "paths, base, export, delta, disk, device");
    // A disk that is there already, at the one step that is left.
    let rig = rig(5).await;
    rig.host.create(&vm("web-2"), &image).await.unwrap();
    rig.host.create_device(&vm("web-2"), &image).await.unwrap_err();
    assert!(rig.model.found().devices.is_empty());
    rig.model.write_disk(&vm("web-2"), 0, &[1; 4096]).unwrap();
    rig.host.create_device(&vm("web-2"), &image).await.unwrap();
    assert_eq!(rig.model.found().devices.len(), 1);
    rig.end().await;
}
