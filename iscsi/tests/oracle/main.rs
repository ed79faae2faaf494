//! Random commands of several initiators on one unit, over connections that are cut at any byte, against what every
//! block may hold: no acknowledged write is lost, no read is torn within a block, and what was not acknowledged happened
//! or did not.
//!
//! The commands and the cuts are the same in every run (not the machine's timing). `TREEBOOT_SEED` gives others,
//! `TREEBOOT_ORACLE_SECONDS` more of them; `cargo xtask soak` does both.

#![allow(clippy::unwrap_used, reason = "a panic here is a test that fails")]

mod client;
mod cutter;
mod history;
#[path = "../support/mod.rs"]
#[allow(dead_code, reason = "the other tests use the rest")]
mod support;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use treeboot_block::{BlockDevice, BlockError, Extent, Geometry, IoFuture, Provisioning};
use treeboot_iscsi::initiator::{Session, SessionOptions};
use treeboot_iscsi::login::{DigestTerms, Terms};
use treeboot_iscsi::scsi::{Sense, status};
use treeboot_iscsi::target::{Access, Server, ServerConfig};

use client::{Answer, Client};
use cutter::Cutter;
use history::{BLOCK, Effect, History, Value, bytes_of, value_of};
use support::{TARGET, iqn, serve_with};

/// Few, so that initiators meet.
const BLOCKS: u64 = 192;
/// The longest transfer in blocks.
const LONGEST: u64 = 40;
/// Workers that speak PDUs, and workers that use our initiator.
const RAW: usize = 3;
const OURS: usize = 2;

/// A disk with a cache that a power cut empties.
struct Disk {
    bytes: Mutex<Vec<u8>>,
    stable: Mutex<Vec<u8>>,
    turns: AtomicU64,
}

impl Disk {
    fn new() -> Self {
        let bytes = vec![0; BLOCKS as usize * BLOCK];
        Self {
            stable: Mutex::new(bytes.clone()),
            bytes: Mutex::new(bytes),
            turns: AtomicU64::new(0),
        }
    }

    fn snapshot(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().clone()
    }

    fn cut_power(&self) {
        self.bytes
            .lock()
            .unwrap()
            .clone_from(&self.stable.lock().unwrap());
    }

    /// At once, a turn later, or really later.
    async fn dawdle(&self) {
        match self.turns.fetch_add(1, Ordering::Relaxed) % 7 {
            0..=2 => {}
            3..=5 => tokio::task::yield_now().await,
            _ => tokio::time::sleep(Duration::from_millis(1)).await,
        }
    }
}

impl BlockDevice for Disk {
    fn geometry(&self) -> Geometry {
        Geometry {
            bytes: BLOCKS * BLOCK as u64,
            block_bytes: BLOCK as u32,
            physical_block_bytes: BLOCK as u32,
            read_only: false,
            thin: true,
        }
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> IoFuture<'a, ()> {
        Box::pin(async move {
            self.check_range(offset, buf.len() as u64)?;
            self.dawdle().await;
            // As disks do: whole blocks, one by one.
            for (at, block) in buf.chunks_mut(BLOCK).enumerate() {
                let at = offset as usize + at * BLOCK;
                block.copy_from_slice(&self.bytes.lock().unwrap()[at..at + block.len()]);
            }
            self.dawdle().await;
            Ok(())
        })
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8]) -> IoFuture<'a, ()> {
        Box::pin(async move {
            self.check_range(offset, data.len() as u64)?;
            self.dawdle().await;
            for (at, block) in data.chunks(BLOCK).enumerate() {
                let at = offset as usize + at * BLOCK;
                self.bytes.lock().unwrap()[at..at + block.len()].copy_from_slice(block);
                if at.is_multiple_of(8 * BLOCK) {
                    self.dawdle().await;
                }
            }
            Ok(())
        })
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        Box::pin(async move {
            let now = self.snapshot();
            self.dawdle().await;
            *self.stable.lock().unwrap() = now;
            Ok(())
        })
    }

    fn discard(&self, offset: u64, bytes: u64) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.check_range(offset, bytes)?;
            self.dawdle().await;
            self.bytes.lock().unwrap()[offset as usize..(offset + bytes) as usize].fill(0);
            Ok(())
        })
    }

    fn extent(&self, _offset: u64, bytes: u64) -> IoFuture<'_, Extent> {
        let state = Provisioning::Mapped;
        Box::pin(async move { Ok::<_, BlockError>(Extent { bytes, state }) })
    }
}

/// What a command is for the history.
#[derive(Debug)]
enum Meaning {
    /// GOOD: all these happened. An unknown end: each may have.
    Effects(Vec<(u64, Effect)>),
    Read {
        lba: u64,
        blocks: u64,
    },
    /// COMPARE AND WRITE, or VERIFY with the byte check (`new` is `None`), of one block.
    Compare {
        lba: u64,
        old: Value,
        new: Option<Value>,
    },
}

struct Sent {
    from: u64,
    meaning: Meaning,
}

struct Shared {
    history: History,
    next_value: AtomicU64,
    commands: AtomicU64,
    lost: AtomicU64,
    logins: AtomicU64,
}

impl Shared {
    /// Room for the places of one operation's blocks.
    fn new_value(&self) -> Value {
        self.next_value.fetch_add(1, Ordering::Relaxed) << 8
    }
}

/// The blocks of a command with data, and their bytes.
fn written(shared: &Shared, lba: u64, blocks: u64) -> (Vec<u8>, Vec<(u64, Effect)>) {
    let value = shared.new_value();
    let data = (0..blocks).flat_map(|at| bytes_of(value + at)).collect();
    let effects = (0..blocks).map(|at| (lba + at, Effect::Sets(value + at)));
    (data, effects.collect())
}

fn cdb(opcode: u8, flags: u8, lba: u64, blocks: u64) -> [u8; 16] {
    let mut cdb = [0; 16];
    cdb[..2].copy_from_slice(&[opcode, flags]);
    cdb[2..10].copy_from_slice(&lba.to_be_bytes());
    cdb[10..14].copy_from_slice(&(blocks as u32).to_be_bytes());
    cdb
}

struct Command {
    cdb: [u8; 16],
    out: Vec<u8>,
    expected: u32,
    meaning: Meaning,
}

fn choose(random: &mut StdRng, shared: &Shared, seen: &HashMap<u64, Value>) -> Command {
    let blocks = match random.random_range(0..4) {
        0 => random.random_range(1..=LONGEST),
        _ => random.random_range(1..=4),
    };
    let lba = random.random_range(0..=BLOCKS - blocks);
    let command = |cdb, out, expected, meaning| Command {
        cdb,
        out,
        expected,
        meaning,
    };
    let zeroes = |lba: u64, blocks: u64| (lba..lba + blocks).map(|lba| (lba, Effect::Sets(0)));
    match random.random_range(0..100) {
        0..35 => {
            let expected = blocks as u32 * BLOCK as u32;
            command(
                cdb(0x88, 0, lba, blocks),
                Vec::new(),
                expected,
                Meaning::Read { lba, blocks },
            )
        }
        35..65 => {
            let (data, effects) = written(shared, lba, blocks);
            let fua = if random.random_ratio(1, 8) { 0x08 } else { 0 };
            command(cdb(0x8a, fua, lba, blocks), data, 0, Meaning::Effects(effects))
        }
        65..70 => {
            // WRITE AND VERIFY without the byte check: somebody else may write in between.
            let (data, effects) = written(shared, lba, blocks);
            command(cdb(0x8e, 0, lba, blocks), data, 0, Meaning::Effects(effects))
        }
        70..78 => {
            let unmap = random.random();
            let value = if unmap { 0 } else { shared.new_value() };
            let effects = (lba..lba + blocks).map(|lba| (lba, Effect::Sets(value)));
            let flags = if unmap { 0x08 } else { 0 };
            let meaning = Meaning::Effects(effects.collect());
            command(
                cdb(0x93, flags, lba, blocks),
                bytes_of(value).to_vec(),
                0,
                meaning,
            )
        }
        78..84 => {
            let second = random.random_range(0..BLOCKS - 3);
            let ranges = [(lba, blocks), (second, 3)];
            let overlap = lba < second + 3 && second < lba + blocks;
            let ranges = &ranges[..if overlap { 1 } else { 2 }];
            let mut list = vec![0; 8];
            for (lba, blocks) in ranges {
                list.extend_from_slice(&lba.to_be_bytes());
                list.extend_from_slice(&(*blocks as u32).to_be_bytes());
                list.extend_from_slice(&[0; 4]);
            }
            let bytes = list.len() as u16;
            list[..2].copy_from_slice(&(bytes - 2).to_be_bytes());
            list[2..4].copy_from_slice(&(bytes - 8).to_be_bytes());
            let mut cdb = [0; 16];
            cdb[0] = 0x42;
            cdb[7..9].copy_from_slice(&bytes.to_be_bytes());
            let effects = ranges.iter().flat_map(|&(lba, blocks)| zeroes(lba, blocks));
            command(cdb, list, 0, Meaning::Effects(effects.collect()))
        }
        84..90 => {
            let (old, new) = (seen.get(&lba).copied().unwrap_or(0), shared.new_value());
            let mut data = bytes_of(old).to_vec();
            data.extend_from_slice(&bytes_of(new));
            let mut cdb = cdb(0x89, 0, lba, 0);
            cdb[13] = 1;
            let new = Some(new);
            command(cdb, data, 0, Meaning::Compare { lba, old, new })
        }
        90..95 => {
            let old = seen.get(&lba).copied().unwrap_or(0);
            let meaning = Meaning::Compare { lba, old, new: None };
            command(cdb(0x8f, 0x02, lba, 1), bytes_of(old).to_vec(), 0, meaning)
        }
        _ => command(cdb(0x91, 0, 0, 0), Vec::new(), 0, Meaning::Effects(Vec::new())),
    }
}

/// Says what an answered command means.
fn learn(shared: &Shared, who: usize, sent: Sent, answer: &Answer, seen: &mut HashMap<u64, Value>) {
    let over = |effects: &[(u64, Effect)]| shared.history.over(who, sent.from, true, effects);
    let good = answer.status == status::GOOD;
    let miscompare = answer
        .sense
        .is_some_and(|sense| sense.key == Sense::MISCOMPARE.key);
    match sent.meaning {
        Meaning::Effects(effects) if good => {
            for (lba, effect) in &effects {
                if let Effect::Sets(value) = effect {
                    seen.insert(*lba, *value);
                }
            }
            over(&effects);
        }
        Meaning::Read { lba, blocks } if good => {
            assert_eq!(answer.data.len(), blocks as usize * BLOCK);
            let mut effects = Vec::new();
            for (lba, block) in (lba..).zip(answer.data.chunks(BLOCK)) {
                let value =
                    value_of(block).unwrap_or_else(|| panic!("block {lba} was read torn: {block:02x?}"));
                seen.insert(lba, value);
                effects.push((lba, Effect::Sees(value)));
            }
            over(&effects);
        }
        Meaning::Compare { lba, old, new } if good => {
            let effect = new.map_or(Effect::Sees(old), |new| Effect::Swaps(old, new));
            seen.insert(lba, new.unwrap_or(old));
            over(&[(lba, effect)]);
        }
        Meaning::Compare { lba, old, .. } if miscompare => {
            seen.remove(&lba);
            over(&[(lba, Effect::SeesNot(old))]);
        }
        meaning => panic!(
            "{meaning:?} ended with status {} and {:?}",
            answer.status, answer.sense
        ),
    }
}

/// A command whose connection is gone, and whose session too: it happened before now, or never.
fn forget(shared: &Shared, who: usize, sent: Sent) {
    shared.lost.fetch_add(1, Ordering::Relaxed);
    match sent.meaning {
        Meaning::Effects(effects) => shared.history.over(who, sent.from, false, &effects),
        Meaning::Compare {
            lba,
            old,
            new: Some(new),
        } => {
            shared
                .history
                .over(who, sent.from, false, &[(lba, Effect::Swaps(old, new))]);
        }
        Meaning::Compare { new: None, .. } | Meaning::Read { .. } => {}
    }
}

/// An initiator of PDUs, from one login to the next.
async fn raw_worker(
    shared: Arc<Shared>,
    cutter: SocketAddr,
    server: SocketAddr,
    who: usize,
    seed: u64,
    until: Instant,
) {
    let mut random = StdRng::seed_from_u64(seed);
    let terms = terms_of(who);
    let mut sent: HashMap<u32, Sent> = HashMap::new();
    let mut seen = HashMap::new();
    loop {
        let over = Instant::now() >= until;
        // At the end no cut is in the way: the login tells that the session before is over.
        let portal = if over { server } else { cutter };
        let Ok(mut client) = Client::login(portal, who as u8, terms).await else {
            continue;
        };
        shared.logins.fetch_add(1, Ordering::Relaxed);
        // The same name and ISID: the target ended the old session, and its writes, before it let this one in.
        for (_, sent) in sent.drain() {
            forget(&shared, who, sent);
        }
        if over {
            return;
        }
        // The first command hears of the power-on.
        let (_, asked) = client.command(&mut random, [0; 16], Vec::new(), 0).await;
        if asked.is_err() || client.answer(&mut random).await.is_err() {
            continue;
        }
        let depth = random.random_range(1..=6);
        loop {
            let over = Instant::now() >= until;
            if over && client.in_flight() == 0 {
                return;
            }
            if !over && client.in_flight() < depth && client.may_send() {
                let command = choose(&mut random, &shared, &seen);
                let from = shared.history.now();
                shared.commands.fetch_add(1, Ordering::Relaxed);
                let (itt, result) = client
                    .command(&mut random, command.cdb, command.out, command.expected)
                    .await;
                let meaning = command.meaning;
                sent.insert(itt, Sent { from, meaning });
                if result.is_err() {
                    break;
                }
                continue;
            }
            match client.answer(&mut random).await {
                Ok(answer) => {
                    let sent = sent.remove(&answer.itt).expect("the answer to a command of ours");
                    learn(&shared, who, sent, &answer, &mut seen);
                }
                Err(_) => break,
            }
        }
    }
}

/// Each its own way: plain; digests on everything; everything asked for, in small bursts.
fn terms_of(who: usize) -> Terms {
    match who {
        0 => Terms::default(),
        1 => Terms {
            header_digest: DigestTerms::Require,
            data_digest: DigestTerms::Require,
            first_burst_bytes: 4096,
            ..Terms::default()
        },
        _ => Terms {
            initial_r2t: true,
            immediate_data: false,
            max_burst_bytes: 2560,
            first_burst_bytes: 512,
            max_recv_bytes: 1536,
            max_outstanding_r2t: 2,
            ..Terms::default()
        },
    }
}

/// Our own initiator, as a program uses it: reads, writes and flushes side by side.
async fn session_worker(
    shared: Arc<Shared>,
    cutter: SocketAddr,
    server: Arc<Server>,
    who: usize,
    seed: u64,
    until: Instant,
) {
    let mut random = StdRng::seed_from_u64(seed);
    let name = iqn(&format!("iqn.2026-11.test:ours-{who}"));
    let mut seen = HashMap::new();
    let mut unknown = Vec::new();
    while Instant::now() < until {
        let options = SessionOptions::new(cutter.to_string(), iqn(TARGET), name.clone());
        let Ok(session) = Session::connect(options).await else {
            continue;
        };
        shared.logins.fetch_add(1, Ordering::Relaxed);
        while Instant::now() < until {
            let mut work = Vec::new();
            for _ in 0..random.random_range(1..=5) {
                let blocks = random.random_range(1..=LONGEST);
                let lba = random.random_range(0..=BLOCKS - blocks);
                work.push((lba, blocks, random.random_range(0..10), shared.history.now()));
            }
            shared.commands.fetch_add(work.len() as u64, Ordering::Relaxed);
            let answers = work.into_iter().map(|(lba, blocks, kind, from)| {
                let (shared, session) = (&shared, &session);
                async move {
                    let offset = lba * BLOCK as u64;
                    match kind {
                        0..5 => {
                            let bytes = blocks as u32 * BLOCK as u32;
                            let read = session.read(0, offset, bytes).await;
                            let meaning = Meaning::Read { lba, blocks };
                            (Sent { from, meaning }, read.map(|data| data.to_vec()))
                        }
                        5..9 => {
                            let (data, effects) = written(shared, lba, blocks);
                            let done = session.write(0, offset, Bytes::from(data)).await;
                            let meaning = Meaning::Effects(effects);
                            (Sent { from, meaning }, done.map(|()| Vec::new()))
                        }
                        _ => {
                            let done = session.flush(0).await;
                            let meaning = Meaning::Effects(Vec::new());
                            (Sent { from, meaning }, done.map(|()| Vec::new()))
                        }
                    }
                }
            });
            let answers = futures_util::future::join_all(answers).await;
            let mut lost = false;
            for (sent, result) in answers {
                match result {
                    Ok(data) => {
                        let answer = Answer {
                            itt: 0,
                            status: status::GOOD,
                            sense: None,
                            data,
                        };
                        // `from` is before the command and this is after its answer, so it holds.
                        learn(&shared, who, sent, &answer, &mut seen);
                    }
                    Err(_) => {
                        lost = true;
                        unknown.push(sent);
                    }
                }
            }
            if lost {
                break;
            }
        }
        drop(session);
        // Every session has an ISID of its own, so the next login does not end this one.
        until_gone(&server, &name).await;
        for sent in unknown.drain(..) {
            forget(&shared, who, sent);
        }
    }
}

async fn until_gone(server: &Server, initiator: &treeboot_types::Iqn) {
    let deadline = Instant::now() + Duration::from_secs(20);
    let there = || {
        let stats = server.stats(&iqn(TARGET)).expect("the target is there");
        stats
            .sessions
            .iter()
            .any(|session| session.initiator == *initiator)
    };
    while there() {
        assert!(Instant::now() < deadline, "a session outlives its connection");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn from_env(name: &str) -> Option<u64> {
    Some(std::env::var(name).ok()?.parse().expect("a number"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_acknowledged_write_is_lost_and_no_block_is_torn_whatever_is_cut() {
    let seed = from_env("TREEBOOT_SEED").unwrap_or(0x5eed);
    let seconds = from_env("TREEBOOT_ORACLE_SECONDS").unwrap_or(8);
    println!("TREEBOOT_SEED={seed} repeats the commands and the cuts");
    let mut random = StdRng::seed_from_u64(seed);
    let disk = Arc::new(Disk::new());
    let (server, portal) = serve_with(disk.clone(), ServerConfig::default(), Access::Anyone).await;
    let server = Arc::new(server);
    let cutter = Cutter::start(portal, random.random()).await;
    let shared = Arc::new(Shared {
        history: History::default(),
        next_value: AtomicU64::new(1),
        commands: AtomicU64::new(0),
        lost: AtomicU64::new(0),
        logins: AtomicU64::new(0),
    });
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut steps = 0;
    let mut rounds = 0;
    while Instant::now() < end {
        let before = disk.snapshot();
        let until = Instant::now() + Duration::from_millis(700);
        let mut workers = Vec::new();
        for who in 0..RAW {
            let seed = random.random();
            workers.push(tokio::spawn(raw_worker(
                shared.clone(),
                cutter.addr,
                portal,
                who,
                seed,
                until,
            )));
        }
        for who in RAW..RAW + OURS {
            let (seed, server) = (random.random(), server.clone());
            workers.push(tokio::spawn(session_worker(
                shared.clone(),
                cutter.addr,
                server,
                who,
                seed,
                until,
            )));
        }
        for worker in workers {
            worker
                .await
                .unwrap_or_else(|panic| panic!("seed {seed}: {panic}"));
        }
        // What is flushed survives a power cut.
        let options = SessionOptions::new(portal.to_string(), iqn(TARGET), iqn("iqn.2026-11.test:flusher"));
        let session = Session::connect(options).await.unwrap();
        session.flush(0).await.unwrap();
        session.close().await;
        disk.cut_power();
        let checked = shared.history.check(&before, &disk.snapshot());
        steps += checked.unwrap_or_else(|why| panic!("seed {seed}, round {rounds}: {why}"));
        rounds += 1;
    }
    let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let (commands, cuts, lost) = (get(&shared.commands), get(&cutter.cuts), get(&shared.lost));
    println!(
        "{rounds} rounds, {commands} commands, {steps} block operations explained, {} logins, {cuts} connections cut, \
         {lost} commands without an answer",
        get(&shared.logins)
    );
    assert!(
        commands > 200 && cuts > 20 && lost > 20,
        "the run was too small to show anything"
    );
}
