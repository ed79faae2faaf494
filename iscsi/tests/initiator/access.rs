//! States of access (ALUA), redirections and unsolicited data, with our own target on the other side.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use treeboot_block::BlockDevice;
use treeboot_iscsi::initiator::{
    AccessReported, CommandData, CommandError, ConnectError, Lun, PathGroup, PathGroupOptions, PathId,
    PathState, PathStats, RemoteDevice, Session,
};
use treeboot_iscsi::login::Terms;
use treeboot_iscsi::scsi::AccessState;
use treeboot_iscsi::target::{Access, AddTargetError, Server, ServerConfig};
use treeboot_types::Iqn;

use crate::fake::{image, options, target};
use crate::group::spec;
use crate::own::{Memory, serve_with};
use crate::session::until;

const BYTES: u64 = 4 << 20;

fn serve() -> (Server, SocketAddr) {
    serve_with(
        vec![
            Memory::new(image(0, 0, BYTES), false),
            Memory::new(image(1, 0, BYTES), true),
        ],
        ServerConfig::default(),
    )
}

fn set(server: &Server, state: AccessState) {
    assert!(server.set_access_state(&target(), None, state));
}

async fn connect(at: SocketAddr) -> Session {
    Session::connect(options(&at.to_string()))
        .await
        .expect("a session")
}

async fn read(session: &Session) -> Result<Bytes, CommandError> {
    session.read(0, 0, 4096).await
}

#[tokio::test]
async fn each_state_is_reported_and_does_what_it_says() {
    let (server, at) = serve();
    let session = connect(at).await;
    for (state, reported, refused) in [
        (AccessState::Optimized, AccessReported::Optimized, None),
        (AccessState::NonOptimized, AccessReported::NonOptimized, None),
        (AccessState::Standby, AccessReported::Standby, Some(0x0b)),
        (AccessState::Unavailable, AccessReported::Unavailable, Some(0x0c)),
        (
            AccessState::Transitioning,
            AccessReported::Transitioning,
            Some(0x0a),
        ),
        (AccessState::Attaching, AccessReported::Transitioning, None),
    ] {
        set(&server, state);
        assert_eq!(session.access(0).await.expect("an answer"), Some(reported));
        match (read(&session).await, refused) {
            (Ok(data), None) => assert_eq!(data, image(0, 0, 4096)),
            (Err(CommandError::Sense(sense)), Some(ascq)) => {
                assert_eq!((sense.key, sense.asc, sense.ascq), (2, 4, ascq), "{state:?}");
            }
            (result, _) => panic!("{state:?}: {result:?}"),
        }
        // Who comes now finds the disk, whatever its state.
        assert_eq!(connect(at).await.capacity(0).await.expect("a size").bytes, BYTES);
    }
    assert!(!server.set_access_state(&target(), Some(9), AccessState::Standby));
    // One unit alone.
    set(&server, AccessState::Optimized);
    assert!(server.set_access_state(&target(), Some(1), AccessState::Standby));
    assert_eq!(
        session.access(0).await.expect("0"),
        Some(AccessReported::Optimized)
    );
    assert_eq!(session.access(1).await.expect("1"), Some(AccessReported::Standby));
}

/// Reads until it is as it should be, seen by all paths and the one that answered. On a machine that stands still a read may go
/// elsewhere than to the best path, and only who reads from a path learns that it is refused.
async fn read_until(group: &PathGroup, what: &str, is_so: impl Fn(&[PathStats], PathId) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let (data, path) = group.read(Lun::Data, 0, 4096, &[]).await.expect("no read fails");
        assert_eq!(data, image(0, 0, 4096));
        if is_so(&group.stats(), path) {
            return;
        }
        assert!(Instant::now() < deadline, "never {what}");
    }
}

/// Reads until the path that answers is the one of this label.
async fn until_read_from(group: &PathGroup, label: &str) {
    let is_it =
        |paths: &[PathStats], path| paths.iter().any(|stats| stats.id == path && stats.label == label);
    read_until(group, &format!("read from {label}"), is_it).await;
}

async fn until_access(group: &PathGroup, label: &str, access: AccessReported) {
    let is_so = |paths: &[PathStats], _| {
        paths
            .iter()
            .any(|stats| stats.label == label && stats.access == access)
    };
    read_until(group, &format!("{access:?} on {label}"), is_so).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_take_the_best_path_and_follow_every_change() {
    let ((a, at_a), (b, at_b), (f, at_f)) = (serve(), serve(), serve());
    set(&b, AccessState::NonOptimized);
    let group = PathGroup::new(PathGroupOptions::new(
        Iqn::new("iqn.2026-11.org.example:host").unwrap(),
    ));
    group.set_paths(vec![spec(at_b, "b"), spec(at_a, "a")], vec![spec(at_f, "f")]);
    let of = |label: &str| {
        let stats = group.stats();
        stats
            .into_iter()
            .find(|path| path.label == label)
            .expect("listed")
    };
    until(|| of("a").state == PathState::Up && of("b").state == PathState::Up).await;
    let before = of("b").reads;
    for _ in 0..50 {
        until_read_from(&group, "a").await;
    }
    let others = of("b").reads - before;
    assert!(
        others < 20,
        "not optimized, so not asked while another is, unless that one is slow: {others}"
    );
    for refusing in [
        AccessState::Unavailable,
        AccessState::Standby,
        AccessState::Transitioning,
    ] {
        set(&a, refusing);
        until_access(&group, "a", refusing.reported()).await;
        until_read_from(&group, "b").await;
        for _ in 0..20 {
            until_read_from(&group, "b").await;
        }
        // The way back comes with no message of its own.
        set(&a, AccessState::Optimized);
        until(|| of("a").access == AccessReported::Optimized).await;
        until_read_from(&group, "a").await;
    }
    // No active path is accessible: the fallback is; and it is left again.
    for server in [&a, &b] {
        set(server, AccessState::Unavailable);
    }
    until_access(&group, "a", AccessReported::Unavailable).await;
    until_access(&group, "b", AccessReported::Unavailable).await;
    until_read_from(&group, "f").await;
    assert_ne!(of("a").state, PathState::Up);
    set(&b, AccessState::NonOptimized);
    until_read_from(&group, "b").await;
    assert_eq!(group.totals().failed_reads, 0);
    drop(f);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transition_of_the_only_path_is_waited_for_within_limits() {
    let (server, at) = serve();
    set(&server, AccessState::Transitioning);
    let group = PathGroup::new(PathGroupOptions::new(
        Iqn::new("iqn.2026-11.org.example:host").unwrap(),
    ));
    group.set_paths(vec![spec(at, "a")], Vec::new());
    until(|| group.stats()[0].access == AccessReported::Transitioning).await;
    let waiting = {
        let group = Arc::clone(&group);
        tokio::spawn(async move { group.read(Lun::Data, 0, 4096, &[]).await })
    };
    // It was refused at least once before the state changes.
    until(|| group.stats()[0].failures > 0).await;
    set(&server, AccessState::Optimized);
    let (data, _) = waiting.await.expect("no panic").expect("a read");
    assert_eq!(data, image(0, 0, 4096));

    set(&server, AccessState::Transitioning);
    let session = connect(at).await;
    assert!(matches!(read(&session).await, Err(CommandError::Sense(sense)) if sense.is_transition()));
    let device = tokio::spawn(RemoteDevice::connect(options(&at.to_string()), 0));
    let sessions = || {
        server.stats(&target()).map_or(0, |stats| {
            stats.sessions.iter().filter(|s| s.commands >= 3).count()
        })
    };
    until(|| sessions() >= 2).await;
    set(&server, AccessState::Optimized);
    let device = device.await.expect("no panic").expect("a device");
    let mut data = vec![0; 4096];
    device.read(0, &mut data).await.expect("a read");
    assert_eq!(data, image(0, 0, 4096));
}

#[tokio::test]
async fn a_target_sends_initiators_elsewhere_and_a_circle_ends() {
    let ((a, at_a), (b, at_b)) = (serve(), serve());
    for permanently in [false, true] {
        assert!(a.redirect(&target(), Some(&at_b.to_string()), permanently));
        let session = connect(at_a).await;
        assert_eq!(session.peer(), at_b);
        assert_eq!(read(&session).await.expect("a read"), image(0, 0, 4096));
    }
    assert!(b.redirect(&target(), Some(&at_a.to_string()), false));
    let error = Session::connect(options(&at_a.to_string()))
        .await
        .expect_err("a circle");
    assert!(
        matches!(error, ConnectError::Redirects { times: 2, .. }),
        "{error:?}"
    );
    assert!(a.redirect(&target(), None, false));
    assert_eq!(connect(at_b).await.peer(), at_a);
    // A stranger learns nothing of where the target is.
    assert!(a.redirect(&target(), Some(&at_b.to_string()), false));
    assert!(a.set_access(&target(), Access::Initiators([].into())));
    let error = Session::connect(options(&at_a.to_string()))
        .await
        .expect_err("a stranger");
    assert!(matches!(error, ConnectError::Login { .. }), "{error:?}");
}

#[tokio::test]
async fn a_target_that_was_never_here_can_be_elsewhere() {
    let ((a, _), (_b, at_b)) = (serve(), serve());
    let gone = Iqn::new("iqn.2026-11.org.example:gone").unwrap();
    let at = Server::bind(
        &["127.0.0.1:0".parse().expect("an address")],
        ServerConfig::default(),
    )
    .expect("a port");
    at.add_moved_target(target(), &at_b.to_string(), true, Access::Anyone)
        .expect("added");
    let session = connect(at.local_addrs()[0]).await;
    assert_eq!(session.peer(), at_b);
    assert_eq!(read(&session).await.expect("a read"), image(0, 0, 4096));
    // It has no units, so nobody can come back to it; its name is taken until it is removed.
    assert!(!at.redirect(&target(), None, false));
    let twice = at.add_moved_target(target(), "192.0.2.1", false, Access::Anyone);
    assert_eq!(twice, Err(AddTargetError::Exists(target())));
    let nowhere = a.add_moved_target(gone, "two words", false, Access::Anyone);
    assert!(
        matches!(nowhere, Err(AddTargetError::Address { .. })),
        "{nowhere:?}"
    );
    assert!(at.remove_target(&target(), std::time::Duration::ZERO).await);
    let error = Session::connect(options(&at.local_addrs()[0].to_string())).await;
    assert!(matches!(error, Err(ConnectError::Login { .. })), "{error:?}");
}

#[tokio::test]
async fn writes_arrive_whatever_was_agreed_on_unsolicited_data() {
    for (immediate_data, initial_r2t) in [(true, true), (true, false), (false, true), (false, false)] {
        for (max_recv_bytes, first_burst_bytes) in [(512, 512), (4096, 20_000), (65_536, 65_536), (8192, 512)]
        {
            let terms = Terms {
                immediate_data,
                initial_r2t,
                max_recv_bytes,
                first_burst_bytes,
                max_burst_bytes: 65_536,
                ..Terms::default()
            };
            let config = ServerConfig {
                terms,
                ..ServerConfig::default()
            };
            let (_server, at) = serve_with(vec![Memory::new(vec![0; 1 << 20], false)], config);
            let session = connect(at).await;
            let mut offset = 0;
            let lengths = [512, 4096, 19_968, 20_480, 65_536, 66_048, 200_192];
            let writes = lengths.iter().map(|&bytes| {
                let at = offset;
                offset += bytes;
                session.write(0, at, Bytes::from(image(0, at, bytes)))
            });
            // All at once, so that unsolicited data of several commands are on their way together.
            for written in futures_util::future::join_all(writes).await {
                written.unwrap_or_else(|error| panic!("{terms:?}: {error}"));
            }
            let all = session.read(0, 0, offset as u32).await.expect("a read");
            assert!(all == image(0, 0, offset), "{terms:?}");
        }
    }
}

#[tokio::test]
async fn a_command_that_nothing_else_is_for_is_carried_out() {
    let (_server, at) = serve();
    let session = connect(at).await;
    let report = session.command(0, &[0x5e, 2, 0, 0, 0, 0, 0, 0, 8, 0], CommandData::In(8));
    assert_eq!(report.await.expect("capabilities")[..2], [0, 8]);
    let nothing = session.command(0, &[0], CommandData::None).await;
    assert!(nothing.expect("ready").is_empty());
    let unknown = session.command(0, &[0xff], CommandData::None).await;
    assert!(matches!(unknown, Err(CommandError::Sense(sense)) if sense.is_invalid_opcode()));
}
