//! One session: what a target may do to it, and what its caller then sees.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use treeboot_iscsi::initiator::{CommandError, ConnectError, ProtocolError, Session, SessionEnd};

use crate::fake::{DISK_BYTES, Fake, Script, image, options};
use crate::proxy::{Mode, Proxy};

async fn connected(script: Script) -> (Fake, Session) {
    let fake = Fake::start(script).await;
    let session = Session::connect(options(&fake.addr.to_string()))
        .await
        .expect("a session");
    (fake, session)
}

/// Whatever a target does, a command ends soon.
async fn read_under(script: Script) -> CommandError {
    let (_fake, session) = connected(script).await;
    let read = tokio::time::timeout(Duration::from_secs(3), session.read(0, 4096, 65_536)).await;
    read.expect("the read ends").expect_err("the read fails")
}

async fn protocol_error_under(script: Script) -> ProtocolError {
    match read_under(script).await {
        CommandError::Lost(SessionEnd::Protocol(error)) => error,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_target_that_breaks_the_protocol_is_left_with_a_typed_error() {
    use ProtocolError as E;
    let too_much = protocol_error_under(Script::TooMuch).await;
    assert!(
        matches!(too_much, E::TooMuch { expected: 65_536, .. }),
        "{too_much:?}"
    );
    let offset = protocol_error_under(Script::WrongOffset).await;
    assert_eq!(
        offset,
        E::Offset {
            expected: 0,
            got: 512
        }
    );
    let data_sn = protocol_error_under(Script::WrongDataSn).await;
    assert_eq!(data_sn, E::DataSn { expected: 0, got: 3 });
    let huge = protocol_error_under(Script::HugeSegment).await;
    assert!(matches!(huge, E::Frame(_)), "{huge:?}");
    let unknown = protocol_error_under(Script::UnknownTask).await;
    assert!(matches!(unknown, E::UnknownTask { .. }), "{unknown:?}");
    let opcode = protocol_error_under(Script::UnknownOpcode).await;
    assert!(matches!(opcode, E::Pdu(_)), "{opcode:?}");
}

#[tokio::test]
async fn a_target_s_failures_are_typed() {
    let short = read_under(Script::Short).await;
    assert!(
        matches!(
            short,
            CommandError::Short {
                expected: 65_536,
                got: 32_768
            }
        ),
        "{short:?}"
    );
    let medium = read_under(Script::MediumError).await;
    assert!(
        matches!(medium, CommandError::Sense(sense) if sense.is_medium_error()),
        "{medium:?}"
    );
    let rejected = read_under(Script::RejectsReads).await;
    assert!(
        matches!(rejected, CommandError::Rejected { reason: 9 }),
        "{rejected:?}"
    );
    let died = read_under(Script::DiesInData).await;
    assert!(
        matches!(
            died,
            CommandError::Lost(SessionEnd::ClosedByTarget | SessionEnd::Broken(_))
        ),
        "{died:?}"
    );
}

#[tokio::test]
async fn a_login_that_goes_wrong_ends_in_time_with_the_portal_s_name() {
    for script in [
        Script::NoLoginReply,
        Script::Garbage,
        Script::EndlessLogin,
        Script::MovedTo("nonsense:port".to_owned()),
    ] {
        let fake = Fake::start(script.clone()).await;
        let mut options = options(&fake.addr.to_string());
        options.timeouts.connect_ms = 300;
        let begun = Instant::now();
        let error = Session::connect(options).await.expect_err("no session");
        assert!(begun.elapsed() < Duration::from_secs(2), "{script:?}");
        let named = match &script {
            Script::MovedTo(to) => to.clone(),
            _ => fake.addr.to_string(),
        };
        assert!(error.to_string().contains(&named), "{script:?}: {error}");
        if script == Script::NoLoginReply {
            assert!(
                matches!(error, ConnectError::TimedOut { ms: 300, .. }),
                "{error:?}"
            );
        }
    }
    let nobody = {
        let fake = Fake::start(Script::Honest).await;
        fake.addr.to_string()
    };
    let error = Session::connect(options(&nobody))
        .await
        .expect_err("nobody listens");
    assert!(matches!(error, ConnectError::Tcp { .. }), "{error:?}");
}

#[tokio::test]
async fn a_redirection_is_followed_and_a_circle_is_not_followed_for_ever() {
    let real = Fake::start(Script::Honest).await;
    let signpost = Fake::start(Script::MovedTo(real.addr.to_string())).await;
    let session = Session::connect(options(&signpost.addr.to_string()))
        .await
        .expect("a session");
    assert_eq!(session.peer(), real.addr);
    assert_eq!(session.read(0, 0, 512).await.expect("read"), image(0, 0, 512));

    signpost.play(Script::MovedTo(signpost.addr.to_string()));
    let error = Session::connect(options(&signpost.addr.to_string()))
        .await
        .expect_err("a circle");
    assert!(matches!(error, ConnectError::Redirects { .. }), "{error:?}");
}

#[tokio::test]
async fn ipv6_and_names_are_portals() {
    let Ok(listener) = tokio::net::TcpListener::bind("[::1]:0").await else {
        println!("SKIPPED: no IPv6 on the loopback");
        assert!(std::env::var_os("CI").is_none());
        return;
    };
    let at = listener.local_addr().expect("an address");
    drop(listener);
    let fake = Fake::start_at(Script::Honest, at).await;
    let session = Session::connect(options(&format!("[::1]:{}", at.port())))
        .await
        .expect("a session");
    assert_eq!(session.peer(), fake.addr);

    let fake = Fake::start(Script::Honest).await;
    let by_name = format!("localhost:{}", fake.addr.port());
    Session::connect(options(&by_name)).await.expect("a session");
}

#[tokio::test]
async fn attentions_and_busyness_are_waited_out_within_bounds() {
    let (fake, session) = connected(Script::Attention(6)).await;
    assert_eq!(session.read(0, 512, 512).await.expect("read"), image(0, 512, 512));
    assert_eq!(fake.reads(), 7);
    fake.play(Script::Attention(u64::MAX));
    let error = session.read(0, 512, 512).await.expect_err("never ready");
    assert!(
        matches!(error, CommandError::Status { status: 8 } | CommandError::Sense(_)),
        "{error:?}"
    );
    assert_eq!(fake.reads(), 7 + 9);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_reads_at_once_agree_with_the_image() {
    for script in [Script::Honest, Script::Pings, Script::NarrowWindow] {
        let (fake, session) = connected(script).await;
        let session = &session;
        let readers = (0..200u64).map(|reader| async move {
            let bytes = 512 * (1 + reader * 13 % 400);
            let offset = reader * 7919 * 512 % (DISK_BYTES - bytes);
            let lun = (reader % 2) as u16;
            let data = session.read(lun, offset, bytes as u32).await.expect("read");
            assert!(data == image(lun, offset, bytes), "wrong bytes at {offset}");
        });
        futures_util::future::join_all(readers).await;
        assert!(
            !fake.shared.window_broken.load(Ordering::Relaxed),
            "the command window is kept"
        );
    }
}

#[tokio::test]
async fn a_command_over_its_limit_is_aborted_and_the_session_lives() {
    let fake = Fake::start(Script::DeafToReads).await;
    let mut options = options(&fake.addr.to_string());
    options.timeouts.command_ms = 400;
    let session = Session::connect(options).await.expect("a session");
    let error = session.read(0, 0, 512).await.expect_err("no answer");
    assert!(matches!(error, CommandError::TimedOut { ms: 400 }), "{error:?}");
    fake.play(Script::Honest);
    assert_eq!(session.read(0, 0, 512).await.expect("read"), image(0, 0, 512));
}

#[tokio::test]
async fn a_silent_peer_is_dead_after_three_quarters_of_a_second() {
    let fake = Fake::start(Script::Honest).await;
    let proxy = Proxy::start(fake.addr).await;
    let session = Session::connect(options(&proxy.portal()))
        .await
        .expect("a session");
    session.read(0, 0, 512).await.expect("read");
    proxy.set(Mode::Swallow);
    let begun = Instant::now();
    let error = session.read(0, 0, 512).await.expect_err("silence");
    let took = begun.elapsed();
    assert!(
        matches!(error, CommandError::Lost(SessionEnd::Silent { .. })),
        "{error:?}"
    );
    assert!((700..1_500).contains(&took.as_millis()), "{took:?}");
}

#[tokio::test]
async fn a_slow_peer_that_answers_pings_is_not_dead() {
    let (_fake, session) = connected(Script::Slow(1_500)).await;
    session.capacity(0).await.expect("capacity");
    assert_eq!(session.read(0, 0, 512).await.expect("read"), image(0, 0, 512));
}

#[tokio::test]
async fn closing_logs_out_and_so_does_dropping() {
    let (fake, session) = connected(Script::Honest).await;
    session.read(0, 0, 512).await.expect("read");
    session.close().await;
    assert_eq!(fake.shared.logouts.load(Ordering::Relaxed), 1);
    let session = Session::connect(options(&fake.addr.to_string()))
        .await
        .expect("a session");
    drop(session);
    until(|| fake.shared.logouts.load(Ordering::Relaxed) == 2).await;
}

#[tokio::test]
async fn a_target_that_asks_for_a_logout_gets_it_after_the_reads_under_way() {
    let (fake, session) = connected(Script::AsksForLogout).await;
    assert_eq!(
        session.read(0, 0, 512).await.expect("the read under way"),
        image(0, 0, 512)
    );
    assert!(matches!(session.ended().await, SessionEnd::Dismissed));
    until(|| fake.shared.logouts.load(Ordering::Relaxed) == 1).await;
    let error = session.read(0, 0, 512).await.expect_err("the session is over");
    assert!(
        matches!(error, CommandError::Lost(SessionEnd::Dismissed)),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_target_that_pings_is_answered() {
    let (fake, session) = connected(Script::Pings).await;
    session.read(0, 0, 512).await.expect("read");
    until(|| fake.shared.pongs.load(Ordering::Relaxed) == 1).await;
}

#[tokio::test]
async fn a_read_that_nobody_waits_for_any_more_harms_nobody() {
    let (_fake, session) = connected(Script::Slow(100)).await;
    let dropped = tokio::time::timeout(Duration::from_millis(20), session.read(0, 0, 65_536)).await;
    assert!(dropped.is_err());
    // Its late data must not end up elsewhere.
    until(|| true).await;
    tokio::time::timeout(Duration::from_secs(5), async {
        loop {
            let read = tokio::time::timeout(Duration::from_millis(300), session.read(0, 4096, 512)).await;
            if let Ok(read) = read {
                assert_eq!(read.expect("read"), image(0, 4096, 512));
                return;
            }
        }
    })
    .await
    .expect("the session works on");
}

/// Waits for a condition, at most a minute: what takes milliseconds takes seconds beside compilers.
pub(crate) async fn until(condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < deadline, "the condition never holds");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
