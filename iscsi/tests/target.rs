//! The target over real sockets, spoken to PDU by PDU.

#[allow(dead_code, reason = "the other tests use the rest")]
mod support;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use support::{Client, Memory, TARGET, iqn, serve, serve_with};
use treeboot_block::{BlockDevice, BlockError, Extent, Geometry, IoFuture, Provisioning};
use treeboot_iscsi::pdu::{
    Framing, LunField, NO_TAG, NopOut, Pdu, Residual, ScsiCommand, TaskAttribute, TextRequest,
};
use treeboot_iscsi::scsi::{Sense, status};
use treeboot_iscsi::target::{Access, AddTargetError, ServerConfig};

#[tokio::test]
async fn several_connections_read_what_an_array_of_bytes_holds() {
    let memory = Arc::new(Memory::new(1 << 20, false));
    let (server, portal) = serve(memory.clone()).await;
    let mut oracle = vec![0u8; 1 << 20];
    let mut clients = Vec::new();
    for number in 0..3 {
        clients.push(Client::login(portal, TARGET, number).await);
    }
    // A fixed sequence of writes and reads, turn by turn on each connection; lengths reach over bursts.
    let mut state = 7u64;
    let mut random = |below: u64| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    for round in 0..200u64 {
        let client = &mut clients[(round % 3) as usize];
        let blocks = 1 + random(if round % 10 == 0 { 1000 } else { 16 });
        let lba = random(2048 - blocks);
        let range = (lba * 512) as usize..((lba + blocks) * 512) as usize;
        if random(2) == 0 {
            let data: Vec<u8> = (0..blocks * 512).map(|i| (i / 7 + round) as u8).collect();
            client.write(lba, &data).await;
            oracle[range].copy_from_slice(&data);
        } else {
            assert_eq!(
                client.read(lba, blocks as u32).await,
                oracle[range],
                "round {round}"
            );
        }
    }
    assert_eq!(memory.snapshot(), oracle);
    let stats = server.stats(&iqn(TARGET)).unwrap();
    assert_eq!(stats.sessions.len(), 3);
    assert!(stats.wire_bytes_out > stats.read_bytes && stats.wire_bytes_in > stats.written_bytes);
}

#[tokio::test]
async fn a_read_only_unit_refuses_writes_with_data_protect() {
    let (_server, portal) = serve(Arc::new(Memory::new(1 << 20, true))).await;
    let mut client = Client::login(portal, TARGET, 0).await;
    let (answer, sense) = client.try_write(0, &[1; 512]).await;
    assert_eq!(answer, status::CHECK_CONDITION);
    assert_eq!(sense, Some(Sense::WRITE_PROTECTED));
    assert_eq!(client.read(0, 1).await, [0; 512]);
}

#[tokio::test]
async fn garbage_before_the_login_ends_the_connection_and_no_other() {
    let (_server, portal) = serve(Arc::new(Memory::new(1 << 20, false))).await;
    let mut client = Client::login(portal, TARGET, 0).await;
    for garbage in [
        &b"GET / HTTP/1.1\r\nHost: example\r\n\r\nAnd so on, beyond a header."[..],
        &[0xff; 4096],
        &[0; 48],
    ] {
        let mut raw = Client::connect(portal).await;
        raw.send_bytes(garbage).await;
        assert!(raw.ends().await);
    }
    assert_eq!(client.read(0, 1).await, [0; 512]);
}

#[tokio::test]
async fn a_pdu_longer_than_agreed_ends_the_connection() {
    let (_server, portal) = serve(Arc::new(Memory::new(1 << 20, false))).await;
    let mut client = Client::login(portal, TARGET, 0).await;
    let mut bhs = Pdu::from(NopOut {
        immediate: true,
        lun: LunField(0),
        itt: 1,
        ttt: NO_TAG,
        cmd_sn: 0,
        exp_stat_sn: 0,
    })
    .encode();
    bhs[5..8].copy_from_slice(&[0xff, 0xff, 0xff]);
    client.send_bytes(&bhs).await;
    assert!(client.ends().await);
}

#[tokio::test]
async fn a_login_that_never_ends_is_ended_in_time() {
    let config = ServerConfig {
        login_limit: Duration::from_millis(200),
        ..ServerConfig::default()
    };
    let (_server, portal) = serve_with(Arc::new(Memory::new(1 << 20, false)), config, Access::Anyone).await;
    let mut silent = Client::connect(portal).await;
    assert!(silent.ends().await);
}

#[tokio::test]
async fn many_connections_that_say_nothing_keep_nobody_out() {
    let config = ServerConfig {
        max_logins: 8,
        ..ServerConfig::default()
    };
    let (_server, portal) = serve_with(Arc::new(Memory::new(1 << 20, false)), config, Access::Anyone).await;
    let mut silent = Vec::new();
    for _ in 0..100 {
        silent.push(Client::connect(portal).await);
    }
    let mut client = Client::login(portal, TARGET, 0).await;
    assert_eq!(client.read(0, 8).await, [0; 4096]);
    assert!(silent[0].ends().await, "the oldest gave way");
}

#[tokio::test]
async fn a_command_outside_the_window_is_ignored_and_a_gap_is_filled() {
    let (_server, portal) = serve(Arc::new(Memory::new(1 << 20, false))).await;
    let mut client = Client::login(portal, TARGET, 0).await;
    let ready = |itt: u32, cmd_sn: u32| ScsiCommand {
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
        cdb: [0; 16],
    };
    let next = client.cmd_sn;
    client.send(&ready(1, next.wrapping_sub(1)).into(), &[]).await;
    client
        .send(&ready(2, next.wrapping_add(100_000)).into(), &[])
        .await;
    client.send(&ready(4, next.wrapping_add(1)).into(), &[]).await;
    client.send(&ready(3, next).into(), &[]).await;
    let mut tags = Vec::new();
    for _ in 0..2 {
        let (Pdu::ScsiResponse(response), _) = client.receive().await else {
            panic!()
        };
        tags.push(response.itt);
    }
    assert_eq!(
        tags,
        [3, 4],
        "in the order of CmdSN; the others without an answer"
    );
}

#[tokio::test]
async fn digests_are_made_and_checked() {
    let (_server, portal) = serve(Arc::new(Memory::new(1 << 20, false))).await;
    let mut client = Client::login_with_digests(portal, TARGET).await;
    assert_eq!(
        client.framing,
        Framing {
            header_digest: true,
            data_digest: true,
            ..client.framing
        }
    );
    let data: Vec<u8> = (0..8192).map(|i| i as u8).collect();
    client.write(16, &data).await;
    assert_eq!(client.read(16, 16).await, data);
    let mut bytes = Vec::new();
    let nop = NopOut {
        immediate: true,
        lun: LunField(0),
        itt: 9,
        ttt: NO_TAG,
        cmd_sn: client.cmd_sn,
        exp_stat_sn: 0,
    };
    client.framing.append(&mut bytes, &nop.into(), b"ping");
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    client.send_bytes(&bytes).await;
    assert!(matches!(client.receive().await.0, Pdu::Reject(_)));
    assert!(client.ends().await);
}

#[tokio::test]
async fn only_those_on_the_list_log_in_and_taking_one_off_ends_its_session() {
    let allowed = Access::Initiators(BTreeSet::from([iqn("iqn.2026-11.test:client-0")]));
    let (server, portal) = serve_with(
        Arc::new(Memory::new(1 << 20, false)),
        ServerConfig::default(),
        allowed,
    )
    .await;
    assert_eq!(Client::try_login(portal, TARGET, 1).await.err(), Some((2, 2)));
    assert_eq!(
        Client::try_login(portal, "iqn.2026-11.test:absent", 0)
            .await
            .err(),
        Some((2, 3))
    );
    let mut client = Client::login(portal, TARGET, 0).await;
    assert!(server.set_access(&iqn(TARGET), Access::Initiators(BTreeSet::new())));
    assert!(client.ends().await);
}

#[tokio::test]
async fn a_removed_target_asks_for_a_logout_and_is_gone() {
    let memory = Arc::new(Memory::new(1 << 20, false));
    let (server, portal) = serve(memory.clone()).await;
    let spec = support::spec(memory, Access::Anyone);
    assert_eq!(server.add_target(spec), Err(AddTargetError::Exists(iqn(TARGET))));
    let mut client = Client::login(portal, TARGET, 0).await;
    let name = iqn(TARGET);
    let removal = server.remove_target(&name, Duration::from_millis(300));
    let client = async {
        assert!(matches!(client.receive().await.0, Pdu::AsyncMessage(message) if message.event == 1));
        assert!(client.ends().await);
    };
    assert!(tokio::join!(removal, client).0);
    assert_eq!(server.stats(&name), None);
    assert_eq!(Client::try_login(portal, TARGET, 0).await.err(), Some((2, 3)));
}

#[tokio::test]
async fn a_second_login_of_the_same_name_ends_the_first() {
    let (server, portal) = serve(Arc::new(Memory::new(1 << 20, false))).await;
    let mut first = Client::login(portal, TARGET, 0).await;
    let mut second = Client::login(portal, TARGET, 0).await;
    assert!(first.ends().await);
    assert_eq!(second.read(0, 1).await, [0; 512]);
    assert_eq!(server.stats(&iqn(TARGET)).unwrap().sessions.len(), 1);
}

#[tokio::test]
async fn discovery_lists_what_the_initiator_may_use() {
    let (_server, portal) = serve(Arc::new(Memory::new(1 << 20, false))).await;
    let text = Client::discover(portal).await;
    assert_eq!(text, format!("TargetName={TARGET}\0TargetAddress={portal},1\0"));
}

#[tokio::test]
async fn send_targets_answers_all_by_name_and_for_the_session_s_own() {
    let memory = Arc::new(Memory::new(1 << 20, false));
    let (server, portal) = serve(memory.clone()).await;
    let entry = |name: &str| format!("TargetName={name}\0TargetAddress={portal},1\0");
    let mut hidden = support::spec(memory.clone(), Access::Initiators(BTreeSet::new()));
    hidden.name = iqn("iqn.2026-11.test:hidden");
    server.add_target(hidden).unwrap();
    let mut other = support::spec(memory, Access::Anyone);
    other.name = iqn("iqn.2026-11.test:other");
    server.add_target(other).unwrap();
    let all = [entry(TARGET), entry("iqn.2026-11.test:other")].concat();
    let rejected = "SendTargets=Reject\0".to_owned();
    let mut discovery = Client::try_discovery(portal).await.unwrap();
    let mut normal = Client::login(portal, TARGET, 0).await;
    for (value, of_discovery, of_normal) in [
        // RFC 7143 appendix C: "All" must not be supported in an operational session, nothing is for those alone.
        ("All", all, rejected.clone()),
        ("", rejected, entry(TARGET)),
        (TARGET, entry(TARGET), entry(TARGET)),
        ("iqn.2026-11.test:hidden", String::new(), String::new()),
        ("iqn.2026-11.test:absent", String::new(), String::new()),
    ] {
        assert_eq!(
            discovery.text(&[("SendTargets", value)]).await,
            of_discovery,
            "'{value}'"
        );
        assert_eq!(
            normal.text(&[("SendTargets", value)]).await,
            of_normal,
            "'{value}'"
        );
    }
}

#[tokio::test]
async fn keys_that_may_come_after_the_login_take_effect_and_others_are_refused() {
    let memory = Arc::new(Memory::new(1 << 20, false));
    let (_server, portal) = serve(memory).await;
    let mut client = Client::login(portal, TARGET, 0).await;
    let data: Vec<u8> = (0..64 * 1024).map(|i| (i / 300) as u8).collect();
    client.write(0, &data).await;
    for bytes in [700, 4096, 10_000, 262_144] {
        let value = bytes.to_string();
        let keys = [
            ("MaxRecvDataSegmentLength", value.as_str()),
            ("InitiatorAlias", "me"),
        ];
        assert_eq!(client.text(&keys).await, "", "declarations have no answer");
        // What is longer than declared cannot be followed.
        client.framing.max_data_bytes = bytes;
        assert_eq!(client.read(0, 128).await, data);
        assert_eq!(
            client
                .command([0x12, 0, 0, 0, 96, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], 96, None)
                .await
                .1
                .len(),
            96
        );
    }
    for value in ["511", "16777216", "many", ""] {
        let keys = [("MaxRecvDataSegmentLength", value)];
        assert_eq!(
            client.text(&keys).await,
            "MaxRecvDataSegmentLength=Reject\0",
            "'{value}'"
        );
    }
    let keys = [
        ("HeaderDigest", "CRC32C"),
        ("MaxBurstLength", "512"),
        ("X-org.example", "1"),
    ];
    assert_eq!(
        client.text(&keys).await,
        "HeaderDigest=Reject\0MaxBurstLength=Reject\0X-org.example=NotUnderstood\0"
    );
    assert_eq!(client.read(0, 128).await, data);
    // A text that goes on and is never finished is forgotten by the next one.
    let begun = TextRequest {
        immediate: true,
        final_: false,
        continues: true,
        lun: LunField(0),
        itt: 1,
        ttt: NO_TAG,
        cmd_sn: client.cmd_sn,
        exp_stat_sn: 0,
    };
    client.send(&begun.into(), b"X-org.example.unfinished=").await;
    let (Pdu::TextResponse(more), _) = client.receive().await else {
        panic!("no text")
    };
    assert!(!more.final_ && more.ttt != NO_TAG);
    assert_eq!(client.text(&[("X-2", "1")]).await, "X-2=NotUnderstood\0");
}

/// A disk of a mebibyte whose blocks from some place on cannot be read.
struct Damaged {
    from: u64,
    as_if_attaching: bool,
}

impl BlockDevice for Damaged {
    fn geometry(&self) -> Geometry {
        Geometry {
            bytes: 1 << 20,
            block_bytes: 512,
            physical_block_bytes: 512,
            read_only: true,
            thin: false,
        }
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> IoFuture<'a, ()> {
        let bytes = buf.len() as u64;
        let error = match self.as_if_attaching {
            _ if offset + bytes <= self.from => None,
            true => Some(BlockError::Unavailable {
                what: "no parent yet".into(),
            }),
            false => Some(BlockError::Io {
                offset,
                source: std::io::Error::other("damaged"),
            }),
        };
        Box::pin(async move { error.map_or(Ok(()), Err) })
    }

    fn write<'a>(&'a self, _offset: u64, _data: &'a [u8]) -> IoFuture<'a, ()> {
        Box::pin(async { Err(BlockError::ReadOnly) })
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn discard(&self, _offset: u64, _bytes: u64) -> IoFuture<'_, ()> {
        Box::pin(async { Err(BlockError::ReadOnly) })
    }

    fn extent(&self, _offset: u64, bytes: u64) -> IoFuture<'_, Extent> {
        let state = Provisioning::Mapped;
        Box::pin(async move { Ok(Extent { bytes, state }) })
    }
}

#[tokio::test]
async fn a_self_test_says_whether_the_first_and_the_last_block_can_be_read() {
    let mut self_test = [0; 16];
    (self_test[0], self_test[1]) = (0x1d, 0x04);
    let failed = (status::CHECK_CONDITION, Some(Sense::FAILED_SELF_TEST));
    let not_ready = (status::CHECK_CONDITION, Some(Sense::BECOMING_READY));
    for (from, as_if_attaching, answer) in [
        (1 << 20, false, (status::GOOD, None)),
        ((1 << 20) - 512, false, failed),
        (0, false, failed),
        (0, true, not_ready),
    ] {
        let device = Damaged {
            from,
            as_if_attaching,
        };
        let (_server, portal) = serve(Arc::new(device)).await;
        let mut client = Client::login(portal, TARGET, 0).await;
        assert_eq!(client.command(self_test, 0, None).await.0, answer, "{from}");
    }
}

#[tokio::test]
async fn a_read_that_fails_on_its_way_says_how_much_is_missing_of_what_was_asked_for() {
    let device = Damaged {
        from: 128 * 1024,
        as_if_attaching: false,
    };
    let (_server, portal) = serve(Arc::new(device)).await;
    let mut client = Client::login(portal, TARGET, 0).await;
    // 256 KiB by the CDB; the initiator has room for 4096 bytes more, or for less.
    for (expected_bytes, blocks) in [(256 * 1024, 2u8), (260 * 1024, 2), (192 * 1024, 2)] {
        let mut cdb = [0; 16];
        (cdb[0], cdb[7]) = (0x28, blocks);
        let command = ScsiCommand {
            immediate: false,
            final_: true,
            read: true,
            write: false,
            attribute: TaskAttribute::Simple,
            lun: LunField(0),
            itt: expected_bytes,
            expected_bytes,
            cmd_sn: client.cmd_sn,
            exp_stat_sn: 0,
            cdb,
        };
        client.cmd_sn = client.cmd_sn.wrapping_add(1);
        client.send(&command.into(), &[]).await;
        let mut came = 0;
        let response = loop {
            match client.receive().await {
                (Pdu::DataIn(header), data) => {
                    assert_eq!((header.status, header.buffer_offset), (None, came));
                    came += data.len() as u32;
                }
                (Pdu::ScsiResponse(response), _) => break response,
                (other, _) => panic!("{other:?}"),
            }
        };
        assert_eq!((came, response.status), (128 * 1024, status::CHECK_CONDITION));
        assert_eq!(response.residual, Residual::Under(expected_bytes - came));
    }
}
