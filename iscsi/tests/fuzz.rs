//! The fuzz functions over their seeds and mutations of them, some seconds each, without libFuzzer. `cargo xtask soak`
//! runs the same functions under libFuzzer for long.
//!
//! `cargo test -p treeboot-iscsi --test fuzz -- --ignored` makes the seeds anew, from what our own initiator and target
//! say to each other and from the table of commands.

#![allow(clippy::unwrap_used, reason = "a panic here is a test that fails")]

#[path = "../../fuzz/src/iscsi/mod.rs"]
#[allow(unreachable_pub, reason = "a library elsewhere")]
mod functions;
#[path = "../../fuzz/src/replay.rs"]
#[allow(unreachable_pub, reason = "the same")]
mod replay;
#[allow(dead_code, reason = "the other tests use the rest")]
mod support;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use treeboot_iscsi::initiator::{Digests, Session, SessionOptions};
use treeboot_iscsi::login::DigestTerms;
use treeboot_iscsi::pdu::{
    DataOut, Framing, LogoutRequest, LunField, NO_TAG, NopOut, Pdu, ScsiCommand, Snack, Split, TaskAttribute,
    TaskFunction, TaskManagementRequest, TextRequest,
};
use treeboot_iscsi::scsi::opcodes;

#[test]
fn any_bytes_are_cut_into_pdus_or_refused() {
    replay::replay("pdu", functions::pdu);
}

#[test]
fn any_login_text_is_answered_or_refused() {
    replay::replay("login", functions::login);
}

#[test]
fn any_cdb_stays_within_its_unit() {
    replay::replay("cdb", functions::cdb);
}

#[test]
fn any_session_ends_with_its_stream_and_is_answered_in_pdus() {
    replay::replay("session", functions::session);
}

fn save(target: &str, name: &str, seed: &[u8]) {
    let folder = replay::seeds_of(target);
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join(name), seed).unwrap();
}

/// What went each way over a connection.
type Tape = Arc<Mutex<(Vec<u8>, Vec<u8>)>>;

/// What our initiator and our target say to each other.
async fn record(digests: DigestTerms) -> (Vec<u8>, Vec<u8>) {
    let (_server, portal) = support::serve(Arc::new(support::Memory::new(1 << 16, false))).await;
    let tape = Tape::default();
    let tap = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = tap.local_addr().unwrap();
    let of_task = tape.clone();
    let copy = tokio::spawn(async move {
        let (near, _) = tap.accept().await.unwrap();
        let far = TcpStream::connect(portal).await.unwrap();
        let (mut near_read, mut near_write) = near.into_split();
        let (mut far_read, mut far_write) = far.into_split();
        let up = async {
            let mut buffer = [0; 4096];
            while let Ok(bytes @ 1..) = near_read.read(&mut buffer).await {
                of_task.lock().unwrap().0.extend_from_slice(&buffer[..bytes]);
                far_write.write_all(&buffer[..bytes]).await.unwrap();
            }
            drop(far_write);
        };
        let down = async {
            let mut buffer = [0; 4096];
            while let Ok(bytes @ 1..) = far_read.read(&mut buffer).await {
                of_task.lock().unwrap().1.extend_from_slice(&buffer[..bytes]);
                let _ = near_write.write_all(&buffer[..bytes]).await;
            }
        };
        tokio::join!(up, down);
    });
    let target = support::iqn(support::TARGET);
    let mut options = SessionOptions::new(addr.to_string(), target, support::iqn("iqn.2026-11.test:seed"));
    options.digests = Digests {
        header: digests,
        data: digests,
    };
    let session = Session::connect(options).await.unwrap();
    session.test_unit_ready(0).await.unwrap();
    session.report_luns().await.unwrap();
    session.inquiry(0).await.unwrap();
    session.is_write_protected(0).await.unwrap();
    session.write(0, 512, vec![7; 1024].into()).await.unwrap();
    assert_eq!(session.read(0, 512, 512).await.unwrap(), [7; 512][..]);
    session.flush(0).await.unwrap();
    assert!(session.read(9, 0, 512).await.is_err());
    session.close().await;
    copy.await.unwrap();
    let tape = tape.lock().unwrap();
    tape.clone()
}

/// One PDU of each kind in a stream; `login` gets its texts, with their stages.
fn cut(mut stream: &[u8], digests: bool, pdus: &mut BTreeMap<u8, Vec<u8>>, login: &mut Vec<u8>) {
    let mut framing = Framing::LOGIN;
    framing.max_data_bytes = 1 << 20;
    let mut full = false;
    while !stream.is_empty() {
        let Ok(Split::Frame(frame)) = framing.split(stream) else {
            panic!("our own stream");
        };
        let opcode = frame.bhs[0] & 0x3f;
        if matches!(opcode, 0x03 | 0x23) {
            login.push(frame.bhs[1]);
            login.extend_from_slice(&(frame.data.len() as u16).to_be_bytes());
            login.extend_from_slice(frame.data);
            full = frame.bhs[1] & 0x83 == 0x83;
        }
        let layout = 0xf0 | if framing.header_digest { 3 } else { 0 };
        let mut seed = vec![layout];
        seed.extend_from_slice(&stream[..frame.bytes]);
        pdus.entry(opcode).or_insert(seed);
        stream = &stream[frame.bytes..];
        if full && digests {
            (framing.header_digest, framing.data_digest) = (true, true);
        }
    }
}

#[tokio::test]
#[ignore = "makes the committed seeds anew"]
async fn seeds() {
    for (name, digests) in [("plain", DigestTerms::Never), ("digests", DigestTerms::Require)] {
        let (up, down) = record(digests).await;
        let mut pdus = BTreeMap::new();
        for (side, stream) in [(0, &up), (2, &down)] {
            let mut login = vec![side];
            cut(stream, digests == DigestTerms::Require, &mut pdus, &mut login);
            save("login", &format!("{name}-{side}"), &login);
        }
        for (opcode, seed) in pdus {
            save("pdu", &format!("{name}-{opcode:02x}"), &seed);
        }
        save("session", &format!("raw-{name}"), &functions::raw(&up));
    }
    let mut chap = vec![1];
    for (flags, text) in [
        (
            0x01,
            "InitiatorName=iqn.2026-11.test:a\0TargetName=iqn.2026-11.test:b\0AuthMethod=CHAP,None\0"
                .to_owned(),
        ),
        (0x01, "CHAP_A=7,5\0".to_owned()),
        (
            0x81,
            format!(
                "CHAP_N=user\0CHAP_R=0x{}\0CHAP_I=1\0CHAP_C=0x{}\0",
                "5a".repeat(32),
                "01".repeat(16)
            ),
        ),
    ] {
        chap.push(flags);
        chap.extend_from_slice(&(text.len() as u16).to_be_bytes());
        chap.extend_from_slice(text.as_bytes());
    }
    save("login", "chap", &chap);
    chap[0] = 3;
    save("login", "chap-of-target", &chap);
    seeds_of_cdbs();
    seeds_of_sessions();
}

/// A plausible CDB of each command, its fields where the length of its kind has them.
fn cdbs() -> Vec<[u8; 16]> {
    let table = opcodes::TABLE.iter();
    table
        .map(|entry| {
            let mut cdb = [0; 16];
            cdb[0] = entry.opcode;
            cdb[1] = entry.action.unwrap_or(0);
            match entry.opcode >> 5 {
                // SEND DIAGNOSTIC has a test instead of parameters.
                0 if entry.opcode == 0x1d => cdb[1] = 0x04,
                0 => cdb[4] = 24,
                1 | 2 => cdb[8] = 24,
                5 => cdb[9] = 24,
                _ => cdb[13] = 1,
            }
            cdb
        })
        .collect()
}

fn seeds_of_cdbs() {
    let mut all = vec![4];
    for (number, cdb) in cdbs().into_iter().enumerate() {
        let mut one = vec![number as u8 % 8];
        let mut record = vec![0, 24];
        record.extend_from_slice(&cdb);
        let mut parameters = [0; 24];
        parameters[1] = 22;
        parameters[3] = 16;
        parameters[19] = 1;
        record.extend_from_slice(&parameters);
        // The first command hears of the power-on.
        one.extend_from_slice(&[0; 18]);
        one.extend_from_slice(&record);
        save("cdb", &format!("{:02x}-{:02x}", cdb[0], cdb[1]), &one);
        all.extend_from_slice(&record);
    }
    save("cdb", "all", &all);
}

fn seeds_of_sessions() {
    let command = |itt: u32, cdb: [u8; 16], bytes: u32, write: bool| ScsiCommand {
        immediate: false,
        final_: true,
        read: !write && bytes > 0,
        write,
        attribute: TaskAttribute::Simple,
        lun: LunField(0),
        itt,
        expected_bytes: bytes,
        cmd_sn: 0,
        exp_stat_sn: 0,
        cdb,
    };
    let cdb = |opcode: u8, blocks: u8| {
        let mut cdb = [0; 16];
        cdb[0] = opcode;
        cdb[13] = blocks;
        cdb
    };
    let out = |itt: u32, ttt: u32, at: u32, final_: bool| DataOut {
        final_,
        lun: LunField(0),
        itt,
        ttt,
        exp_stat_sn: 0,
        data_sn: 0,
        buffer_offset: at,
    };
    let attention = command(0, [0; 16], 0, false);

    // Every command, one after another, each with data.
    let mut all = vec![0];
    for (number, cdb) in cdbs().into_iter().enumerate() {
        let writes = matches!(
            cdb[0],
            0x0a | 0x15 | 0x2a | 0x2e | 0x2f | 0x41 | 0x42 | 0x55 | 0x5f | 0x89..=0x8f | 0x93 | 0xaa
        );
        let one = command(number as u32 & 7, cdb, if writes { 24 } else { 512 }, writes);
        functions::framed(&mut all, 0, &one.into(), if writes { &[0; 24] } else { &[] });
    }
    save("session", "every-command", &all);

    // A write in bursts of 512 that are asked for; TTTs count from 1.
    let mut bursts = vec![8 | 16];
    functions::framed(&mut bursts, 0, &attention.into(), &[]);
    functions::framed(&mut bursts, 0, &command(1, cdb(0x8a, 2), 1024, true).into(), &[]);
    functions::framed(&mut bursts, 0, &out(1, 1, 0, true).into(), &[1; 512]);
    functions::framed(&mut bursts, 0, &out(1, 2, 512, true).into(), &[2; 512]);
    functions::framed(&mut bursts, 0, &command(2, cdb(0x88, 4), 2048, false).into(), &[]);
    save("session", "bursts", &bursts);

    // Unsolicited data with digests, COMPARE AND WRITE, then pings.
    let mut unsolicited = vec![1 | 2 | 4];
    functions::framed(&mut unsolicited, 0, &attention.into(), &[]);
    let open = ScsiCommand {
        final_: false,
        ..command(1, cdb(0x8a, 2), 1024, true)
    };
    functions::framed(&mut unsolicited, 0, &open.into(), &[3; 100]);
    functions::framed(&mut unsolicited, 0, &out(1, NO_TAG, 100, true).into(), &[3; 924]);
    functions::framed(
        &mut unsolicited,
        0,
        &command(2, cdb(0x89, 1), 1024, true).into(),
        &[3; 1024],
    );
    let ping = NopOut {
        immediate: true,
        lun: LunField(0),
        itt: 3,
        ttt: NO_TAG,
        cmd_sn: 0,
        exp_stat_sn: 0,
    };
    functions::framed(&mut unsolicited, 0, &ping.into(), b"ping");
    save("session", "unsolicited", &unsolicited);

    // Everything that is no command, over a write that waits for its data.
    let mut others = vec![0];
    functions::framed(&mut others, 0, &attention.into(), &[]);
    functions::framed(&mut others, 0, &command(1, cdb(0x8a, 2), 1024, true).into(), &[]);
    functions::framed(&mut others, 0, &command(2, cdb(0x91, 0), 0, false).into(), &[]);
    for function in 1..9 {
        let request = TaskManagementRequest {
            immediate: function % 2 == 0,
            function: TaskFunction::Other(function),
            lun: LunField(0),
            itt: 4,
            referenced_itt: 1,
            cmd_sn: 0,
            exp_stat_sn: 0,
            ref_cmd_sn: 0,
            exp_data_sn: 0,
        };
        functions::framed(&mut others, 0, &request.into(), &[]);
    }
    let text = TextRequest {
        immediate: false,
        final_: true,
        continues: false,
        lun: LunField(0),
        itt: 5,
        ttt: NO_TAG,
        cmd_sn: 0,
        exp_stat_sn: 0,
    };
    functions::framed(
        &mut others,
        2,
        &text.into(),
        b"SendTargets=\0MaxRecvDataSegmentLength=700\0X-other=1\0",
    );
    let snack = Snack {
        kind: 0,
        lun: LunField(0),
        itt: 1,
        ttt: NO_TAG,
        exp_stat_sn: 0,
        begin: 0,
        run: 0,
    };
    functions::framed(&mut others, 0, &snack.into(), &[]);
    let logout = LogoutRequest {
        immediate: false,
        reason: 0,
        itt: 6,
        cid: 0,
        cmd_sn: 0,
        exp_stat_sn: 0,
    };
    functions::framed(&mut others, 0, &Pdu::from(logout), &[]);
    save("session", "others", &others);
    let mut discovery = vec![0x40];
    functions::framed(&mut discovery, 2, &text.into(), b"SendTargets=All\0");
    functions::framed(&mut discovery, 0, &logout.into(), &[]);
    save("session", "discovery", &discovery);
}
