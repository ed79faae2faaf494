//! Secrets and digests, our initiator against our target over real sockets.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use treeboot_iscsi::initiator::{
    CommandError, ConnectError, Digests, Lun, PathGroup, PathGroupOptions, PathState, Session, SessionEnd,
    SessionOptions,
};
use treeboot_iscsi::login::{Chap, ChapError, Credentials, DigestTerms, LoginError, Secret, Terms};
use treeboot_iscsi::target::{Access, Server, ServerConfig};
use treeboot_types::Iqn;

use crate::fake::{DISK_BYTES, image, options, target};
use crate::group::spec;
use crate::own::{Memory, serve_with};
use crate::proxy::{Mode, Proxy};
use crate::session::until;

const REQUIRED: Digests = Digests {
    header: DigestTerms::Require,
    data: DigestTerms::Require,
};

fn credentials(user: &str, secret: &str) -> Credentials {
    Credentials::new(user, Secret::new(secret).unwrap()).unwrap()
}

fn mutual(ours: &str, theirs: &str) -> Chap {
    Chap::mutual(credentials("host", ours), credentials("disk", theirs)).unwrap()
}

fn me() -> Iqn {
    options("").initiator
}

fn each(chap: Option<Chap>) -> Access {
    Access::Each(BTreeMap::from([(me(), chap)]))
}

fn serve(access: Access) -> (Server, SocketAddr) {
    let disk = Memory::new(image(0, 0, DISK_BYTES), false);
    let (server, at) = serve_with(vec![disk], ServerConfig::default());
    assert!(server.set_access(&target(), access));
    (server, at)
}

fn with(at: SocketAddr, chap: Option<Chap>) -> SessionOptions {
    SessionOptions {
        chap,
        ..options(&at.to_string())
    }
}

async fn refusal(options: SessionOptions) -> LoginError {
    match Session::connect(options).await {
        Err(ConnectError::Login { source, .. }) => source,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn only_who_knows_the_secrets_gets_a_session() {
    let right = mutual("the host's own secret", "the disk's own secret");
    let (server, at) = serve(each(Some(right.clone())));
    let session = Session::connect(with(at, Some(right.clone())))
        .await
        .expect("a session");
    assert_eq!(
        session.read(0, 4096, 8192).await.expect("read"),
        image(0, 4096, 8192)
    );

    let one_way = |user, secret| Some(Chap::one_way(credentials(user, secret)));
    Session::connect(with(at, one_way("host", "the host's own secret")))
        .await
        .expect("the target's proof is not asked for");
    for wrong in [
        None,
        one_way("host", "the host's wrong one"),
        one_way("guest", "the host's own secret"),
        Some(mutual("the host's wrong one", "the disk's own secret")),
    ] {
        let refused = LoginError::Refused { class: 2, detail: 1 };
        assert_eq!(refusal(with(at, wrong.clone())).await, refused, "{wrong:?}");
    }
    // The target that does not know its own is not used.
    let impostor = Some(mutual("the host's own secret", "the disk's other one"));
    assert_eq!(
        refusal(with(at, impostor)).await,
        LoginError::Chap(ChapError::Unproven)
    );
    let stranger = SessionOptions {
        initiator: Iqn::new("iqn.2026-11.org.example:stranger").unwrap(),
        ..with(at, Some(right.clone()))
    };
    assert_eq!(
        refusal(stranger).await,
        LoginError::Refused { class: 2, detail: 2 }
    );

    // What was proven stays good while it is what is asked for.
    assert!(server.set_access(&target(), Access::Secret(right.clone())));
    assert_eq!(session.read(0, 0, 512).await.expect("read"), image(0, 0, 512));
    assert!(server.set_access(&target(), Access::Anyone));
    assert_eq!(session.read(0, 0, 512).await.expect("read"), image(0, 0, 512));
    // Who proved nothing goes when a proof is asked for.
    let unproven = Session::connect(with(at, None)).await.expect("a session");
    assert!(server.set_access(&target(), Access::Secret(right.clone())));
    assert!(matches!(
        unproven.ended().await,
        SessionEnd::ClosedByTarget | SessionEnd::Broken(_)
    ));
    let other = mutual("the host's next secret", "the disk's next secret");
    assert!(server.set_access(&target(), each(Some(other))));
    assert!(matches!(
        session.ended().await,
        SessionEnd::ClosedByTarget | SessionEnd::Broken(_)
    ));
    // A target that asks for nothing is none that was meant.
    assert!(server.set_access(&target(), each(None)));
    Session::connect(with(at, None)).await.expect("a session");
    assert_eq!(
        refusal(with(at, Some(right))).await,
        LoginError::Refused { class: 2, detail: 1 }
    );
}

#[tokio::test]
async fn a_path_goes_on_with_its_next_secret() {
    let secrets = [
        mutual("the host's own secret", "the disk's own secret"),
        mutual("the host's next secret", "the disk's next secret"),
    ];
    let (server, at) = serve(each(Some(secrets[0].clone())));
    let group = PathGroup::new(PathGroupOptions::new(me()));
    let mut sessions = Vec::new();
    for chap in secrets {
        server.set_access(&target(), each(Some(chap.clone())));
        let path = treeboot_iscsi::initiator::PathSpec {
            hash_lun: None,
            chap: Some(chap),
            ..spec(at, "parent")
        };
        group.set_paths(vec![path], Vec::new());
        let (data, path) = group.read(Lun::Data, 65_536, 4096, &[]).await.expect("read");
        assert!(data == image(0, 65_536, 4096));
        sessions.push(path);
    }
    assert_eq!(sessions[0], sessions[1], "it is the same path");
    assert!(!format!("{:?}", group.stats()).contains("secret"));
}

#[tokio::test]
async fn digests_are_agreed_on_and_every_byte_arrives() {
    let (_server, at) = serve(Access::Anyone);
    let all = [
        DigestTerms::Never,
        DigestTerms::IfAsked,
        DigestTerms::Prefer,
        DigestTerms::Require,
    ];
    for (header, data) in all.into_iter().flat_map(|header| all.map(|data| (header, data))) {
        let options = SessionOptions {
            digests: Digests { header, data },
            ..options(&at.to_string())
        };
        let session = Session::connect(options).await.expect("a session");
        session.inquiry(0).await.expect("inquiry");
        assert_eq!(session.report_luns().await.expect("luns"), [0]);
        for (offset, bytes) in [(0, 512), (1 << 20, 65_536), (512, 3 << 20)] {
            let read = session.read(0, offset, bytes).await.expect("read");
            assert!(read == image(0, offset, bytes.into()), "{header:?} {data:?}");
            session.write(0, offset, read).await.expect("write");
        }
        let reads = (0..64u64).map(|n| session.read(0, n * 70_144, 69_632));
        for (n, read) in (0u64..).zip(futures_util::future::join_all(reads).await) {
            assert!(
                read.expect("read") == image(0, n * 70_144, 69_632),
                "{header:?} {data:?}"
            );
        }
        let beyond = session
            .read(0, DISK_BYTES, 512)
            .await
            .expect_err("beyond the end");
        assert!(matches!(beyond, CommandError::OutOfRange { .. }), "{beyond:?}");
        // Sense data, whose segment is padded.
        let missing = session.capacity(7).await.expect_err("no such LUN");
        assert!(matches!(missing, CommandError::Sense(_)), "{missing:?}");
    }
}

#[tokio::test]
async fn a_target_without_digests_is_refused_where_they_are_required() {
    let config = ServerConfig {
        terms: Terms {
            data_digest: DigestTerms::Never,
            ..Terms::default()
        },
        ..ServerConfig::default()
    };
    let (_server, at) = serve_with(vec![Memory::new(vec![0; 4096], true)], config);
    let options = |data| SessionOptions {
        digests: Digests {
            header: DigestTerms::Prefer,
            data,
        },
        ..options(&at.to_string())
    };
    Session::connect(options(DigestTerms::Prefer))
        .await
        .expect("a session");
    assert_eq!(
        refusal(options(DigestTerms::Require)).await,
        LoginError::Refused { class: 2, detail: 0 }
    );
}

#[tokio::test]
async fn what_was_changed_on_the_way_is_read_again_elsewhere() {
    let (_server, at) = serve(Access::Anyone);
    let proxy = Proxy::start(at).await;
    let group = PathGroup::new(PathGroupOptions {
        digests: REQUIRED,
        ..PathGroupOptions::new(me())
    });
    let path = |portal: SocketAddr, label| treeboot_iscsi::initiator::PathSpec {
        hash_lun: None,
        ..spec(portal, label)
    };
    group.set_paths(vec![path(proxy.addr, "bad")], vec![path(at, "good")]);
    until(|| group.stats()[0].state == PathState::Up).await;
    let (data, _) = group.read(Lun::Data, 0, 65_536, &[]).await.expect("read");
    assert!(data == image(0, 0, 65_536));
    proxy.set(Mode::Change);
    let reads = (0..32u64).map(|n| {
        let group: &Arc<PathGroup> = &group;
        async move { (n, group.read(Lun::Data, n * 65_536, 65_536, &[]).await) }
    });
    for (n, read) in futures_util::future::join_all(reads).await {
        let (data, _): (Bytes, _) = read.expect("read");
        assert!(data == image(0, n * 65_536, 65_536), "wrong bytes in read {n}");
    }
    let failure = group.stats()[0].last_failure.clone().expect("a failure");
    assert!(failure.contains("digest is wrong"), "{failure}");
    assert!(group.totals().fallback_bytes > 0);
}
