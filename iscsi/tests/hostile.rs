//! What an initiator may do wrong, from garbage before the login to ten thousand connections that say nothing. Each is
//! answered as RFC 7143 says, or its connection is closed; it is one line in the log, which the tests read; and nobody
//! else notices.

#![allow(clippy::unwrap_used, reason = "a panic here is a test that fails")]

#[allow(dead_code, reason = "the other tests use the rest")]
mod support;

use std::io::Write;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use support::{Client, Memory, TARGET, serve, serve_with};
use tokio::sync::Notify;
use tracing_subscriber::fmt::MakeWriter;
use treeboot_block::{BlockDevice, Extent, Geometry, IoFuture, Provisioning};
use treeboot_iscsi::login::{Terms, append_key};
use treeboot_iscsi::pdu::{
    DataOut, LoginRequest, LunField, NO_TAG, NopOut, Pdu, ScsiCommand, ScsiResponse, Snack, TaskAttribute,
    TaskFunction, TaskManagementRequest, TextRequest, reject_reason, task_response,
};
use treeboot_iscsi::scsi::{Sense, status};
use treeboot_iscsi::target::{Access, Server, ServerConfig};

/// The log of this thread, as a person sees it at the default level of the programs.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Log {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

impl Log {
    fn start() -> (Self, tracing::subscriber::DefaultGuard) {
        let log = Self::default();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::WARN)
            .with_ansi(false)
            .with_writer(log.clone())
            .finish();
        (log, tracing::subscriber::set_default(subscriber))
    }

    fn lines(&self) -> Vec<String> {
        let bytes = self.0.lock().unwrap().clone();
        let text = String::from_utf8(bytes).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    /// Exactly one line so far, and it says `what`; it is taken.
    async fn one_line(&self, what: &str) {
        let deadline = Instant::now() + Duration::from_secs(10);
        // The server writes it on this same thread, after the connection is closed.
        while self.lines().is_empty() && Instant::now() < deadline {
            tokio::task::yield_now().await;
        }
        let lines = self.lines();
        assert!(
            lines.len() == 1 && lines[0].contains(what),
            "'{what}' wanted: {lines:#?}"
        );
        assert!(lines[0].len() < 600, "{lines:?}");
        self.0.lock().unwrap().clear();
    }
}

fn memory() -> Arc<Memory> {
    Arc::new(Memory::new(1 << 20, false))
}

fn command(client: &mut Client, itt: u32, cdb: &[u8]) -> ScsiCommand {
    let cmd_sn = client.cmd_sn;
    client.cmd_sn = cmd_sn.wrapping_add(1);
    let mut padded = [0; 16];
    padded[..cdb.len()].copy_from_slice(cdb);
    ScsiCommand {
        immediate: false,
        final_: true,
        read: false,
        write: false,
        attribute: TaskAttribute::Simple,
        lun: LunField(0),
        itt,
        expected_bytes: 0,
        cmd_sn,
        exp_stat_sn: 0,
        cdb: padded,
    }
}

/// WRITE(10) of `blocks` at block 0.
fn write(client: &mut Client, itt: u32, blocks: u8) -> ScsiCommand {
    ScsiCommand {
        write: true,
        expected_bytes: u32::from(blocks) * 512,
        ..command(client, itt, &[0x2a, 0, 0, 0, 0, 0, 0, 0, blocks, 0])
    }
}

async fn response(client: &mut Client) -> (ScsiResponse, Option<Sense>) {
    match client.receive().await {
        (Pdu::ScsiResponse(response), data) => (response, data.get(2..).and_then(Sense::parse)),
        (other, _) => panic!("{other:?}"),
    }
}

async fn rejected(client: &mut Client) -> u8 {
    match client.receive().await {
        (Pdu::Reject(reject), header) => {
            assert_eq!(header.len(), 48, "the header that was refused comes back");
            reject.reason
        }
        (other, _) => panic!("{other:?}"),
    }
}

/// The session is as good as before.
async fn is_alive(client: &mut Client) {
    assert_eq!(client.read(8, 8).await, [0; 4096]);
}

fn login_request(continues: bool) -> LoginRequest {
    LoginRequest {
        transit: false,
        continues,
        current_stage: 1,
        next_stage: 0,
        version_max: 0,
        version_min: 0,
        isid: [0x80, 0, 0, 0, 0, 9],
        tsih: 0,
        itt: 0,
        cid: 0,
        cmd_sn: 1,
        exp_stat_sn: 0,
    }
}

fn names() -> Vec<u8> {
    let mut text = Vec::new();
    append_key(&mut text, "InitiatorName", "iqn.2026-11.test:hostile");
    append_key(&mut text, "TargetName", TARGET);
    text
}

async fn login_status(client: &mut Client) -> (u8, u8) {
    match client.receive().await.0 {
        Pdu::LoginResponse(response) => (response.status_class, response.status_detail),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn garbage_before_the_login_is_one_line_and_a_closed_connection() {
    let (log, _guard) = Log::start();
    let (_server, portal) = serve(memory()).await;
    let mut other = Client::login(portal, TARGET, 0).await;
    let read = Pdu::from(command(&mut other, 1, &[0x28])).encode();
    for garbage in [
        &b"GET / HTTP/1.1\r\nHost: x\r\n\r\nand more of it, a header long"[..],
        &[0xff; 64],
        &[0; 48],
        &read,
    ] {
        let mut raw = Client::connect(portal).await;
        raw.send_bytes(garbage).await;
        assert!(raw.ends().await);
        log.one_line("no login").await;
    }
    is_alive(&mut Client::login(portal, TARGET, 1).await).await;
}

#[tokio::test]
async fn a_login_that_never_ends_is_ended() {
    let (log, _guard) = Log::start();
    let config = ServerConfig {
        login_limit: Duration::from_millis(300),
        ..ServerConfig::default()
    };
    let (_server, portal) = serve_with(memory(), config, Access::Anyone).await;
    // Silent, half open, and a byte at a time.
    let mut silent = Client::connect(portal).await;
    assert!(silent.ends().await);
    log.one_line("took too long").await;
    let mut half = Client::connect(portal).await;
    half.send(&login_request(false).into(), &names()).await;
    assert_eq!(login_status(&mut half).await, (0, 0));
    assert!(half.ends().await);
    log.one_line("took too long").await;
    let mut slow = Client::connect(portal).await;
    for byte in Pdu::from(login_request(false)).encode() {
        slow.send_bytes(&[byte]).await;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(slow.ends().await);
    log.one_line("took too long").await;
    // Text that goes on, and rounds that go on.
    for text in [vec![b'x'; 8000], Vec::new()] {
        let mut endless = Client::connect(portal).await;
        let mut ended = (0, 0);
        for _ in 0..40 {
            endless.send(&login_request(true).into(), &text).await;
            ended = login_status(&mut endless).await;
            if ended != (0, 0) {
                break;
            }
        }
        assert_eq!(ended, (2, 0), "an initiator's error");
        assert!(endless.ends().await);
        log.one_line("goes on beyond").await;
    }
}

#[tokio::test]
async fn what_a_peer_writes_is_escaped_and_cut_in_the_log() {
    let (log, _guard) = Log::start();
    let (_server, portal) = serve(memory()).await;
    let nasty = format!(
        "a\n2026-11-21 ERROR all is lost \u{1b}[2J\u{202e}{}",
        "x".repeat(7000)
    );
    for key in [
        "InitiatorName",
        "TargetName",
        "SessionType",
        "HeaderDigest",
        "MaxBurstLength",
        "AuthMethod",
    ] {
        let mut client = Client::connect(portal).await;
        let mut text = Vec::new();
        append_key(&mut text, key, &nasty);
        text.extend(names());
        client.send(&login_request(false).into(), &text).await;
        assert_ne!(login_status(&mut client).await, (0, 0), "{key}");
        assert!(client.ends().await);
        log.one_line("no login").await;
    }
}

#[tokio::test]
async fn a_pdu_that_is_too_long_or_whose_digest_is_wrong_ends_the_connection() {
    let (log, _guard) = Log::start();
    let (_server, portal) = serve(memory()).await;
    let nop = |client: &Client| NopOut {
        immediate: true,
        lun: LunField(0),
        itt: 7,
        ttt: NO_TAG,
        cmd_sn: client.cmd_sn,
        exp_stat_sn: 0,
    };
    let mut long = Client::login(portal, TARGET, 0).await;
    let mut header = Pdu::from(nop(&long)).encode();
    header[5..8].copy_from_slice(&[0x04, 0x00, 0x01]);
    long.send_bytes(&header).await;
    assert!(long.ends().await);
    log.one_line("262145 bytes, while 262144 were agreed on").await;

    let mut digest = Client::login_with_digests(portal, TARGET).await;
    let mut bytes = Vec::new();
    digest.framing.append(&mut bytes, &nop(&digest).into(), b"ping");
    bytes[20] ^= 1;
    digest.send_bytes(&bytes).await;
    assert!(digest.ends().await);
    log.one_line("header digest is wrong").await;

    let mut digest = Client::login_with_digests(portal, TARGET).await;
    let mut bytes = Vec::new();
    digest.framing.append(&mut bytes, &nop(&digest).into(), b"ping");
    bytes[53] ^= 1;
    digest.send_bytes(&bytes).await;
    assert_eq!(rejected(&mut digest).await, reject_reason::DATA_DIGEST);
    assert!(digest.ends().await);
    log.one_line("data digest is wrong").await;
}

#[tokio::test]
async fn numbers_outside_of_the_window_are_ignored_and_a_gap_holds_no_more_than_the_window() {
    let (log, _guard) = Log::start();
    let (_server, portal) = serve(memory()).await;
    let mut client = Client::login(portal, TARGET, 0).await;
    let next = client.cmd_sn;
    for off in [
        next.wrapping_sub(1),
        next.wrapping_sub(1000),
        next.wrapping_add(128),
        next ^ 0x8000_0000,
    ] {
        let outside = ScsiCommand {
            cmd_sn: off,
            ..command(&mut client, off, &[0x00])
        };
        client.cmd_sn = next;
        client.send(&outside.into(), &[]).await;
    }
    is_alive(&mut client).await;
    log.one_line("outside of").await;
    // A gap with much behind it: two commands with 600 KB of data in all may wait, the next may not.
    let mut greedy = Client::login(portal, TARGET, 1).await;
    greedy.cmd_sn = greedy.cmd_sn.wrapping_add(1);
    for itt in 0..8 {
        let held = ScsiCommand {
            write: true,
            expected_bytes: 200_704,
            ..command(&mut greedy, itt, &[0x2a, 0, 0, 0, 0, 0, 0, 1, 0x88, 0])
        };
        greedy.send(&held.into(), &[1; 200_704]).await;
    }
    assert!(greedy.ends().await);
    log.one_line("a gap in CmdSN with too much data behind it").await;
}

#[tokio::test]
async fn an_abort_fills_the_gap_of_a_command_that_never_came() {
    let (_server, portal) = serve(memory()).await;
    let mut client = Client::login(portal, TARGET, 0).await;
    let missing = client.cmd_sn;
    client.cmd_sn = missing.wrapping_add(1);
    let waits = command(&mut client, 5, &[0x00]);
    client.send(&waits.into(), &[]).await;
    let abort = TaskManagementRequest {
        immediate: true,
        function: TaskFunction::AbortTask,
        lun: LunField(0),
        itt: 6,
        referenced_itt: 4,
        cmd_sn: client.cmd_sn,
        exp_stat_sn: 0,
        ref_cmd_sn: missing,
        exp_data_sn: 0,
    };
    client.send(&abort.into(), &[]).await;
    let mut seen = Vec::new();
    for _ in 0..2 {
        match client.receive().await.0 {
            Pdu::TaskManagementResponse(answer) => seen.push((answer.itt, answer.response)),
            Pdu::ScsiResponse(answer) => seen.push((answer.itt, answer.status)),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(seen, [(6, task_response::COMPLETE), (5, status::GOOD)]);
    // Outside of the window there is nothing to abort.
    let late = TaskManagementRequest {
        itt: 8,
        ref_cmd_sn: missing,
        cmd_sn: client.cmd_sn,
        ..abort
    };
    client.send(&late.into(), &[]).await;
    assert!(
        matches!(client.receive().await.0, Pdu::TaskManagementResponse(r) if r.response == task_response::NO_TASK)
    );
}

#[tokio::test]
async fn a_lun_that_is_not_there_and_cdbs_with_reserved_bits_get_their_sense() {
    let (log, _guard) = Log::start();
    let (_server, portal) = serve(memory()).await;
    let mut client = Client::login(portal, TARGET, 0).await;
    for lun in [
        LunField::new(1),
        LunField::new(0x3fff),
        LunField(u64::MAX),
        LunField(0xc101_0000_0000_0000),
    ] {
        let read = ScsiCommand {
            lun,
            read: true,
            expected_bytes: 512,
            ..command(&mut client, 1, &[0x28, 0, 0, 0, 0, 0, 0, 0, 1])
        };
        client.send(&read.into(), &[]).await;
        let (answer, sense) = response(&mut client).await;
        assert_eq!(
            (answer.status, sense),
            (status::CHECK_CONDITION, Some(Sense::NO_SUCH_UNIT))
        );
        let inquiry = ScsiCommand {
            cdb: command(&mut client, 0, &[0x12, 0, 0, 0, 96]).cdb,
            expected_bytes: 96,
            cmd_sn: client.cmd_sn.wrapping_sub(1),
            ..read
        };
        client.send(&inquiry.into(), &[]).await;
        let (Pdu::DataIn(_), data) = client.receive().await else {
            panic!()
        };
        assert_eq!(data[0], 0x7f, "nothing can be there");
    }
    let wrong = |cdb: &[u8], byte, bit| (cdb.to_vec(), Sense::cdb_field(byte, bit));
    for (cdb, expected) in [
        // Reserved bits, NACA, a group of reserved operation codes.
        wrong(&[0x00, 0x01], 1, Some(0)),
        wrong(&[0x00, 0, 0, 0, 0, 0x04], 5, Some(2)),
        wrong(&[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0x04], 9, Some(2)),
        wrong(
            &[0x88, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0x04],
            15,
            Some(2),
        ),
        wrong(&[0x28, 0x20, 0, 0, 0, 0, 0, 0, 1], 1, Some(7)),
        wrong(&[0x12, 0x02, 0, 0, 96], 1, Some(1)),
        (vec![0x7f; 16], Sense::INVALID_OPCODE),
        (vec![0xff; 16], Sense::INVALID_OPCODE),
    ] {
        let refused = ScsiCommand {
            read: true,
            expected_bytes: 512,
            ..command(&mut client, 2, &cdb)
        };
        client.send(&refused.into(), &[]).await;
        let (answer, sense) = response(&mut client).await;
        assert_eq!(answer.status, status::CHECK_CONDITION, "{cdb:02x?}");
        let code = |sense: Sense| (sense.key, sense.code);
        assert_eq!(sense.map(code), Some(code(expected)), "{cdb:02x?}");
    }
    is_alive(&mut client).await;
    assert_eq!(
        log.lines(),
        [""; 0],
        "SCSI has its own way to tell; guests probe all day"
    );
}

#[tokio::test]
async fn data_that_nobody_asked_for_fail_their_command_and_no_other() {
    let (log, _guard) = Log::start();
    let disk = memory();
    let (_server, portal) = serve(disk.clone()).await;
    let mut client = Client::login(portal, TARGET, 0).await;
    let out = |itt: u32, ttt: u32, data_sn: u32, at: u32, final_: bool| DataOut {
        final_,
        lun: LunField(0),
        itt,
        ttt,
        exp_stat_sn: 0,
        data_sn,
        buffer_offset: at,
    };
    // For a task that is not there.
    client.send(&out(77, NO_TAG, 0, 0, true).into(), &[1; 512]).await;
    client.send(&out(77, 5, 0, 0, true).into(), &[1; 512]).await;
    is_alive(&mut client).await;
    log.one_line("which no task has").await;
    // Beyond the burst, out of order, under a tag of no R2T, at another place.
    // TTT beyond the R2T's, DataSN, offset, bytes.
    for (itt, (off, data_sn, at, bytes)) in
        (100..).zip([(0, 0, 0, 8192), (0, 1, 0, 512), (9, 0, 0, 512), (0, 0, 1024, 512)])
    {
        let asks = write(&mut client, itt, 8);
        client.send(&asks.into(), &[]).await;
        let (Pdu::R2t(r2t), _) = client.receive().await else {
            panic!()
        };
        let data = vec![1; bytes];
        client
            .send(&out(itt, r2t.ttt + off, data_sn, at, false).into(), &data)
            .await;
        let (answer, sense) = response(&mut client).await;
        assert_eq!((answer.itt, sense), (itt, Some(Sense::DATA_PHASE)));
        // The rest of it, which is on its way already, is for nobody.
        client
            .send(&out(itt, r2t.ttt, 1, 512, true).into(), &[1; 3584])
            .await;
    }
    // After an abort.
    let asks = write(&mut client, 200, 8);
    client.send(&asks.into(), &[]).await;
    let (Pdu::R2t(r2t), _) = client.receive().await else {
        panic!()
    };
    let abort = TaskManagementRequest {
        immediate: true,
        function: TaskFunction::AbortTask,
        lun: LunField(0),
        itt: 201,
        referenced_itt: 200,
        cmd_sn: client.cmd_sn,
        exp_stat_sn: 0,
        ref_cmd_sn: asks.cmd_sn,
        exp_data_sn: 0,
    };
    client.send(&abort.into(), &[]).await;
    assert!(
        matches!(client.receive().await.0, Pdu::TaskManagementResponse(r) if r.response == task_response::COMPLETE)
    );
    client
        .send(&out(200, r2t.ttt, 0, 0, true).into(), &[1; 4096])
        .await;
    is_alive(&mut client).await;
    assert!(
        disk.snapshot().iter().all(|&byte| byte == 0),
        "nothing of it was written"
    );
    assert_eq!(log.lines(), [""; 0], "the first line was the only one");
}

#[tokio::test]
async fn more_immediate_data_than_agreed_on_fails_the_command() {
    let (log, _guard) = Log::start();
    let disk = memory();
    let (_server, portal) = serve(disk.clone()).await;
    let terms = Terms {
        first_burst_bytes: 1024,
        ..Terms::default()
    };
    let mut client = Client::login_with(portal, TARGET, 0, terms).await;
    let long = write(&mut client, 1, 4);
    client.send(&long.into(), &[1; 2048]).await;
    assert_eq!(response(&mut client).await.1, Some(Sense::UNEXPECTED_DATA));
    log.one_line("unsolicited data").await;
    // None at all were agreed on, and none of the other kind.
    let terms = Terms {
        immediate_data: false,
        initial_r2t: true,
        ..Terms::default()
    };
    let mut client = Client::login_with(portal, TARGET, 1, terms).await;
    let none = write(&mut client, 1, 4);
    client.send(&none.into(), &[1; 512]).await;
    assert_eq!(response(&mut client).await.1, Some(Sense::UNEXPECTED_DATA));
    let open = write(&mut client, 2, 4);
    client
        .send(
            &ScsiCommand {
                final_: false,
                ..open
            }
            .into(),
            &[],
        )
        .await;
    assert_eq!(response(&mut client).await.1, Some(Sense::UNEXPECTED_DATA));
    is_alive(&mut client).await;
    log.one_line("unsolicited data").await;
    assert!(disk.snapshot().iter().all(|&byte| byte == 0));
}

#[tokio::test]
async fn what_cannot_be_is_rejected_with_its_reason_and_the_session_goes_on() {
    let (log, _guard) = Log::start();
    let (_server, portal) = serve(memory()).await;
    let mut client = Client::login(portal, TARGET, 0).await;
    let snack = Snack {
        kind: 0,
        lun: LunField(0),
        itt: 1,
        ttt: NO_TAG,
        exp_stat_sn: 0,
        begin: 0,
        run: 0,
    };
    client.send(&snack.into(), &[]).await;
    assert_eq!(rejected(&mut client).await, reject_reason::SNACK);
    log.one_line("SNACK").await;
    let mut unknown = [0; 48];
    unknown[0] = 0x1d;
    client.send_bytes(&unknown).await;
    assert_eq!(rejected(&mut client).await, reject_reason::NOT_SUPPORTED);
    // A task attribute that is none; the next command does not wait for this one.
    let mut bad = Pdu::from(command(&mut client, 3, &[0x00])).encode();
    bad[1] |= 7;
    client.send_bytes(&bad).await;
    assert_eq!(rejected(&mut client).await, reject_reason::INVALID_FIELD);
    is_alive(&mut client).await;
    // A tag in use.
    let first = write(&mut client, 9, 8);
    client.send(&first.into(), &[]).await;
    assert!(matches!(client.receive().await.0, Pdu::R2t(_)));
    let twin = write(&mut client, 9, 8);
    client.send(&twin.into(), &[]).await;
    assert_eq!(rejected(&mut client).await, reject_reason::TASK_IN_PROGRESS);
    is_alive(&mut client).await;
    assert_eq!(log.lines(), [""; 0], "the first line was the only one");
    // What only a target may send, and a second login, are the end.
    let login = Pdu::from(login_request(false)).encode();
    for bytes in [[0x25; 48], login] {
        let mut client = Client::login(portal, TARGET, 1).await;
        let mut bytes = bytes;
        bytes[4..8].fill(0);
        client.send_bytes(&bytes).await;
        assert!(client.ends().await);
        log.one_line("session ended").await;
    }
}

#[tokio::test]
async fn text_without_end_is_refused() {
    let (log, _guard) = Log::start();
    let (_server, portal) = serve(memory()).await;
    let mut client = Client::login(portal, TARGET, 0).await;
    let request = |client: &mut Client, continues: bool, ttt: u32| {
        let cmd_sn = client.cmd_sn;
        client.cmd_sn = cmd_sn.wrapping_add(1);
        Pdu::from(TextRequest {
            immediate: false,
            final_: !continues,
            continues,
            lun: LunField(0),
            itt: 1,
            ttt,
            cmd_sn,
            exp_stat_sn: 0,
        })
    };
    for text in [vec![b'x'; 6000], Vec::new()] {
        let mut ttt = NO_TAG;
        let mut rounds = 0;
        let reason = loop {
            let next = request(&mut client, true, ttt);
            client.send(&next, &text).await;
            rounds += 1;
            match client.receive().await.0 {
                Pdu::TextResponse(response) => ttt = response.ttt,
                Pdu::Reject(reject) => break reject.reason,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(reason, reject_reason::OUT_OF_RESOURCES);
        assert!(rounds <= 33, "{rounds}");
    }
    log.one_line("without end").await;
    let many = b"SendTargets=All\0".repeat(1000);
    let next = request(&mut client, false, NO_TAG);
    client.send(&next, &many).await;
    assert_eq!(rejected(&mut client).await, reject_reason::PROTOCOL_ERROR);
    is_alive(&mut client).await;
}

/// A disk whose flushes never end.
struct Stuck(Memory, Notify);

impl BlockDevice for Stuck {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> IoFuture<'a, ()> {
        self.0.read(offset, buf)
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8]) -> IoFuture<'a, ()> {
        self.0.write(offset, data)
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        Box::pin(async {
            self.1.notified().await;
            Ok(())
        })
    }

    fn discard(&self, offset: u64, bytes: u64) -> IoFuture<'_, ()> {
        self.0.discard(offset, bytes)
    }

    fn extent(&self, _offset: u64, bytes: u64) -> IoFuture<'_, Extent> {
        let state = Provisioning::Mapped;
        Box::pin(async move { Ok(Extent { bytes, state }) })
    }
}

#[tokio::test]
async fn immediate_commands_are_bounded_too() {
    let disk = Arc::new(Stuck(Memory::new(1 << 20, false), Notify::new()));
    let (_server, portal) = serve(disk).await;
    let mut client = Client::login(portal, TARGET, 0).await;
    // No window holds an immediate command back.
    for itt in 0..2000 {
        let flush = ScsiCommand {
            immediate: true,
            ..command(&mut client, itt, &[0x91])
        };
        client.cmd_sn = flush.cmd_sn;
        client.send(&flush.into(), &[]).await;
    }
    for _ in 0..2000 - 256 {
        assert_eq!(response(&mut client).await.0.status, status::TASK_SET_FULL);
    }
}

#[tokio::test]
async fn discovery_sessions_count_as_sessions() {
    let (log, _guard) = Log::start();
    let config = ServerConfig {
        max_sessions: 4,
        ..ServerConfig::default()
    };
    let (_server, portal) = serve_with(memory(), config, Access::Anyone).await;
    let mut sessions = Vec::new();
    for _ in 0..4 {
        sessions.push(Client::try_discovery(portal).await.expect("a discovery session"));
    }
    assert_eq!(Client::try_discovery(portal).await.err(), Some((3, 2)));
    log.one_line("the limit of 4 sessions").await;
    drop(sessions.pop());
    let deadline = Instant::now() + Duration::from_secs(10);
    while Client::try_discovery(portal).await.is_err() {
        assert!(
            Instant::now() < deadline,
            "the place of a session that ended is free again"
        );
        tokio::task::yield_now().await;
    }
}

/// A server on a thread of its own, with its log.
struct Elsewhere {
    portal: SocketAddr,
    log: Log,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Elsewhere {
    fn start(config: ServerConfig) -> Self {
        let (told, hear) = std::sync::mpsc::channel();
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let thread = std::thread::spawn(move || {
            let (log, _guard) = Log::start();
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let (server, portal): (Server, _) = serve_with(memory(), config, Access::Anyone).await;
                told.send((portal, log)).unwrap();
                let _ = stopped.await;
                drop(server);
            });
        });
        let (portal, log) = hear.recv().unwrap();
        Self {
            portal,
            log,
            stop: Some(stop),
            thread: Some(thread),
        }
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            assert!(
                thread.join().is_ok() || std::thread::panicking(),
                "the server panicked"
            );
        }
    }
}

/// The median time of a read.
async fn median(client: &mut Client, reads: usize) -> Duration {
    let mut times = Vec::new();
    for _ in 0..reads {
        let began = Instant::now();
        assert_eq!(client.read(16, 8).await, [0; 4096]);
        times.push(began.elapsed());
    }
    times.sort_unstable();
    times[times.len() / 2]
}

fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib * 1024
}

/// Raises the limit of open files as far as it goes; gives how many connections may be held open.
fn room_for_connections() -> usize {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    let _ = setrlimit(Resource::Nofile, raised);
    let most = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    // The server's ends, the other tests and the standard streams need some, too.
    most.saturating_sub(1000).min(10_000) as usize
}

#[tokio::test]
async fn ten_thousand_connections_that_say_nothing_slow_nobody_and_fill_nothing() {
    let config = ServerConfig {
        max_logins: 64,
        ..ServerConfig::default()
    };
    let server = Elsewhere::start(config);
    let mut client = Client::login(server.portal, TARGET, 0).await;
    median(&mut client, 100).await;
    let quiet = median(&mut client, 300).await;
    let (before, count) = (resident_bytes(), room_for_connections());
    let portal = server.portal;
    let flood = std::thread::spawn(move || {
        let mut held = Vec::new();
        for _ in 0..count {
            // A refused one is as good: the kernel's queue is full.
            held.extend(std::net::TcpStream::connect(portal).ok());
        }
        held
    });
    let mut under = Vec::new();
    while !flood.is_finished() {
        under.push(median(&mut client, 20).await);
    }
    let held = flood.join().unwrap();
    under.push(median(&mut client, 300).await);
    under.sort_unstable();
    let (worst_typical, used) = (under[under.len() / 2], resident_bytes().saturating_sub(before));
    println!(
        "{} connections; a read takes {quiet:?} before, {worst_typical:?} during them; {used} bytes more",
        held.len()
    );
    assert!(held.len() >= count / 2, "only {} of {count}", held.len());
    // Both share this machine with the flood itself and the other tests.
    assert!(worst_typical < quiet * 20 + Duration::from_millis(20));
    assert!(used < 200 << 20, "{used} bytes for connections without a login");
    // Who comes now is served, while all of them are still open.
    is_alive(&mut Client::login(portal, TARGET, 1).await).await;
    let lines = server.log.lines();
    assert!((1..=120).contains(&lines.len()), "{} lines", lines.len());
    assert!(
        lines
            .iter()
            .all(|line| line.contains("too many connections") || line.contains("left out"))
    );
}

#[tokio::test]
async fn all_of_it_at_once_slows_no_other_session() {
    let config = ServerConfig {
        login_limit: Duration::from_millis(500),
        ..ServerConfig::default()
    };
    let server = Elsewhere::start(config);
    let portal = server.portal;
    let mut client = Client::login(portal, TARGET, 0).await;
    median(&mut client, 100).await;
    let quiet = median(&mut client, 300).await;
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let attackers = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let mut attacks = 0;
        runtime.block_on(async {
            while stopped.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
                attack(portal, attacks).await;
                attacks += 1;
            }
        });
        attacks
    });
    let mut under = Vec::new();
    for _ in 0..40 {
        under.push(median(&mut client, 20).await);
    }
    drop(stop);
    let attacks = attackers.join().unwrap();
    under.sort_unstable();
    let typical = under[under.len() / 2];
    println!("{attacks} attacks; a read takes {quiet:?} before, {typical:?} during them");
    assert!(attacks > 0);
    assert!(typical < quiet * 20 + Duration::from_millis(20));
    assert!(server.log.lines().len() < 2000);
}

/// One of many kinds of rudeness.
async fn attack(portal: SocketAddr, kind: u32) {
    match kind % 6 {
        0 => {
            let mut raw = Client::connect(portal).await;
            raw.send_bytes(&[0xa5; 4096]).await;
            raw.ends().await;
        }
        1 => drop(Client::connect(portal).await),
        2 => {
            let mut half = Client::connect(portal).await;
            half.send(&login_request(true).into(), &[b'a'; 8000]).await;
            login_status(&mut half).await;
        }
        3 => {
            let mut client = Client::login(portal, TARGET, 7).await;
            for itt in 0..200 {
                let outside = ScsiCommand {
                    cmd_sn: itt,
                    ..command(&mut client, itt, &[0x00])
                };
                client.send(&outside.into(), &[]).await;
            }
        }
        4 => {
            let mut client = Client::login(portal, TARGET, 8).await;
            for itt in 0..50 {
                let asks = write(&mut client, itt, 200);
                client.send(&asks.into(), &[]).await;
            }
        }
        _ => {
            let mut client = Client::login(portal, TARGET, 9).await;
            client.send_bytes(&[0x1d; 480]).await;
        }
    }
}
