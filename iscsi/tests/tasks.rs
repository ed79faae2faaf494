//! Tasks on the wire: ORDERED ones wait and are waited for, HEAD OF QUEUE passes what waits; what aborting them comes to.

#![allow(dead_code, reason = "the support is shared with other tests")]
#![allow(clippy::unwrap_used, reason = "a panic here is a test that fails")]

mod support;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use support::{Client, TARGET, serve};
use tokio::sync::watch;
use tokio::time::timeout;
use treeboot_block::{BlockDevice, BlockError, Extent, Geometry, IoFuture, Provisioning};
use treeboot_iscsi::login::Terms;
use treeboot_iscsi::pdu::{
    DataOut, LunField, NO_TAG, NopOut, Pdu, ScsiCommand, TaskAttribute, TaskFunction, TaskManagementRequest,
    task_response,
};
use treeboot_iscsi::scsi::{Sense, status};
use treeboot_iscsi::target::{Access, Server, ServerConfig};

/// No wait of a test is longer.
const DEADLINE: Duration = Duration::from_secs(60);

/// A device that notes what begins, by block, and ends it when it is told to.
struct Slow {
    begun: watch::Sender<Vec<u64>>,
    may_end: watch::Sender<BTreeSet<u64>>,
    written: Mutex<Vec<u8>>,
}

impl Slow {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            begun: watch::Sender::new(Vec::new()),
            may_end: watch::Sender::new(BTreeSet::new()),
            written: Mutex::default(),
        })
    }

    async fn act(&self, offset: u64) -> Result<(), BlockError> {
        let block = offset / 512;
        self.begun.send_modify(|begun| begun.push(block));
        let mut may_end = self.may_end.subscribe();
        may_end.wait_for(|blocks| blocks.contains(&block)).await.unwrap();
        Ok(())
    }

    fn end(&self, block: u64) {
        self.may_end.send_modify(|blocks| {
            blocks.insert(block);
        });
    }

    /// Waits until so many operations have begun; which, and in which order.
    async fn until_begun(&self, count: usize) -> Vec<u64> {
        let mut begun = self.begun.subscribe();
        let reached = timeout(DEADLINE, begun.wait_for(|begun| begun.len() >= count)).await;
        reached.expect("operations to begin").unwrap().clone()
    }
}

impl BlockDevice for Slow {
    fn geometry(&self) -> Geometry {
        Geometry {
            bytes: 1 << 20,
            block_bytes: 512,
            physical_block_bytes: 512,
            read_only: false,
            thin: false,
        }
    }

    fn read<'a>(&'a self, offset: u64, _buf: &'a mut [u8]) -> IoFuture<'a, ()> {
        Box::pin(self.act(offset))
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8]) -> IoFuture<'a, ()> {
        Box::pin(async move {
            self.act(offset).await?;
            self.written.lock().unwrap().extend_from_slice(data);
            Ok(())
        })
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn discard(&self, offset: u64, _bytes: u64) -> IoFuture<'_, ()> {
        Box::pin(self.act(offset))
    }

    fn extent(&self, _offset: u64, bytes: u64) -> IoFuture<'_, Extent> {
        let state = Provisioning::Mapped;
        Box::pin(async move { Ok(Extent { bytes, state }) })
    }
}

fn command(client: &mut Client, block: u8, attribute: TaskAttribute, opcode: u8, blocks: u8) -> ScsiCommand {
    let cmd_sn = client.cmd_sn;
    client.cmd_sn = cmd_sn.wrapping_add(1);
    let mut cdb = [0; 16];
    (cdb[0], cdb[5], cdb[8]) = (opcode, block, blocks);
    ScsiCommand {
        immediate: false,
        final_: true,
        read: opcode == 0x28,
        write: opcode == 0x2a,
        attribute,
        lun: LunField(0),
        itt: block.into(),
        expected_bytes: u32::from(blocks) * 512,
        cmd_sn,
        exp_stat_sn: 0,
        cdb,
    }
}

/// READ (10) of one block, whose tag is the block's number.
async fn read(client: &mut Client, block: u8, attribute: TaskAttribute) {
    let pdu = command(client, block, attribute, 0x28, 1);
    client.send(&pdu.into(), &[]).await;
}

/// The tag and status of the next command to end.
async fn ended(client: &mut Client) -> (u32, u8) {
    match client.receive().await.0 {
        Pdu::DataIn(data) => (data.itt, data.status.unwrap()),
        Pdu::ScsiResponse(response) => (response.itt, response.status),
        other => panic!("{other:?}"),
    }
}

/// Asks for a task management function at once.
async fn manage(client: &mut Client, function: TaskFunction, referenced_itt: u32) {
    let request = TaskManagementRequest {
        immediate: true,
        function,
        lun: LunField(0),
        itt: 1000,
        referenced_itt,
        cmd_sn: client.cmd_sn,
        exp_stat_sn: 0,
        // It is looked at only where the task never came.
        ref_cmd_sn: client.cmd_sn,
        exp_data_sn: 0,
    };
    client.send(&request.into(), &[]).await;
}

/// The next that comes is FUNCTION COMPLETE.
async fn complete(client: &mut Client) {
    match client.receive().await.0 {
        Pdu::TaskManagementResponse(answer) => {
            assert_eq!((answer.itt, answer.response), (1000, task_response::COMPLETE));
        }
        other => panic!("{other:?}"),
    }
}

async fn ready(client: &mut Client) -> (u8, Option<Sense>) {
    client.command([0; 16], 0, None).await.0
}

#[tokio::test]
async fn an_ordered_task_waits_for_those_before_it_and_those_after_it_wait_for_it() {
    let device = Slow::new();
    let (_server, portal) = serve(device.clone()).await;
    let mut client = Client::login(portal, TARGET, 0).await;
    let mut other = Client::login(portal, TARGET, 1).await;
    for (block, attribute) in [
        (1, TaskAttribute::Simple),
        (2, TaskAttribute::Untagged),
        (3, TaskAttribute::Ordered),
        (4, TaskAttribute::Simple),
        (5, TaskAttribute::Ordered),
        (6, TaskAttribute::HeadOfQueue),
    ] {
        read(&mut client, block, attribute).await;
    }
    assert_eq!(device.until_begun(3).await, [1, 2, 6]);
    // Another session's tasks are not held up.
    read(&mut other, 9, TaskAttribute::Simple).await;
    assert_eq!(device.until_begun(4).await, [1, 2, 6, 9]);
    for block in [1, 2] {
        device.end(block);
        assert_eq!(ended(&mut client).await, (block as u32, status::GOOD));
    }
    device.end(6);
    assert_eq!(ended(&mut client).await, (6, status::GOOD));
    assert_eq!(device.until_begun(5).await, [1, 2, 6, 9, 3]);
    read(&mut client, 7, TaskAttribute::HeadOfQueue).await;
    assert_eq!(device.until_begun(6).await, [1, 2, 6, 9, 3, 7]);
    device.end(7);
    assert_eq!(ended(&mut client).await, (7, status::GOOD));
    device.end(3);
    assert_eq!(ended(&mut client).await, (3, status::GOOD));
    assert_eq!(device.until_begun(7).await, [1, 2, 6, 9, 3, 7, 4]);
    device.end(4);
    assert_eq!(ended(&mut client).await, (4, status::GOOD));
    assert_eq!(device.until_begun(8).await, [1, 2, 6, 9, 3, 7, 4, 5]);
    device.end(5);
    assert_eq!(ended(&mut client).await, (5, status::GOOD));
    // Nothing is left over that would hold up what comes now.
    read(&mut client, 10, TaskAttribute::Simple).await;
    device.until_begun(9).await;
}

#[tokio::test]
async fn an_ordered_task_that_is_aborted_while_it_waits_holds_up_nobody() {
    let device = Slow::new();
    let (_server, portal) = serve(device.clone()).await;
    let mut client = Client::login(portal, TARGET, 0).await;
    for (block, attribute) in [
        (1, TaskAttribute::Simple),
        (2, TaskAttribute::Ordered),
        (3, TaskAttribute::Simple),
    ] {
        read(&mut client, block, attribute).await;
    }
    device.until_begun(1).await;
    manage(&mut client, TaskFunction::AbortTask, 2).await;
    complete(&mut client).await;
    assert_eq!(device.until_begun(2).await, [1, 3]);
    device.end(3);
    assert_eq!(ended(&mut client).await, (3, status::GOOD));
    // All of a unit's tasks: those that wait are among them.
    read(&mut client, 4, TaskAttribute::Ordered).await;
    manage(&mut client, TaskFunction::AbortTaskSet, NO_TAG).await;
    complete(&mut client).await;
    read(&mut client, 5, TaskAttribute::Ordered).await;
    assert_eq!(device.until_begun(3).await, [1, 3, 5]);
}

#[tokio::test]
async fn a_write_that_waits_keeps_its_data_and_too_much_of_it_is_told_to_come_again() {
    let device = Slow::new();
    let (_server, portal) = serve(device.clone()).await;
    let terms = Terms {
        first_burst_bytes: 64 * 1024,
        ..Terms::default()
    };
    let mut client = Client::login_with(portal, TARGET, 0, terms).await;
    read(&mut client, 1, TaskAttribute::Simple).await;
    device.until_begun(1).await;
    let write = ScsiCommand {
        final_: false,
        ..command(&mut client, 2, TaskAttribute::Ordered, 0x2a, 3)
    };
    client.send(&write.into(), &[1; 512]).await;
    for (data_sn, byte) in [(0, 2), (1, 3)] {
        let out = DataOut {
            final_: data_sn == 1,
            lun: LunField(0),
            itt: 2,
            ttt: NO_TAG,
            exp_stat_sn: 0,
            data_sn,
            buffer_offset: 512 * (1 + data_sn),
        };
        client.send(&out.into(), &[byte; 512]).await;
    }
    // 32 KiB with each: the bound of a mebibyte is met before the window's.
    let mut full = None;
    for tag in 3..60 {
        let write = command(&mut client, tag, TaskAttribute::Simple, 0x2a, 64);
        client.send(&write.into(), &[tag; 32 * 1024]).await;
        if tag >= 34 {
            full = Some(ended(&mut client).await);
            break;
        }
    }
    assert_eq!(full, Some((34, status::TASK_SET_FULL)));
    device.end(1);
    assert_eq!(ended(&mut client).await, (1, status::GOOD));
    assert_eq!(device.until_begun(2).await, [1, 2]);
    device.end(2);
    assert_eq!(ended(&mut client).await, (2, status::GOOD));
    let written = device.written.lock().unwrap().clone();
    assert_eq!(written, [[1; 512], [2; 512], [3; 512]].concat());
    for tag in 3..34 {
        device.end(tag);
        assert_eq!(ended(&mut client).await, (tag as u32, status::GOOD));
    }
}

#[tokio::test]
async fn an_abort_is_answered_when_the_device_is_done_with_the_write_and_the_write_is_not() {
    let device = Slow::new();
    let (_server, portal) = serve(device.clone()).await;
    let mut client = Client::login(portal, TARGET, 0).await;
    let write = command(&mut client, 1, TaskAttribute::Simple, 0x2a, 1);
    client.send(&write.into(), &[1; 512]).await;
    device.until_begun(1).await;
    manage(&mut client, TaskFunction::AbortTask, 1).await;
    let ping = NopOut {
        immediate: true,
        lun: LunField(0),
        itt: 2000,
        ttt: NO_TAG,
        cmd_sn: client.cmd_sn,
        exp_stat_sn: 0,
    };
    client.send(&ping.into(), &[]).await;
    let first = client.receive().await.0;
    assert!(
        matches!(first, Pdu::NopIn(pong) if pong.itt == 2000),
        "answered while the device may still write: {first:?}"
    );
    device.end(1);
    complete(&mut client).await;
    assert_eq!(ready(&mut client).await, (status::GOOD, None));
}

#[tokio::test]
async fn clearing_the_task_set_ends_the_tasks_of_its_own_session_only() {
    for function in [TaskFunction::ClearTaskSet, TaskFunction::AbortTaskSet] {
        let device = Slow::new();
        let (_server, portal) = serve(device.clone()).await;
        let mut one = Client::login(portal, TARGET, 1).await;
        let mut two = Client::login(portal, TARGET, 2).await;
        read(&mut one, 1, TaskAttribute::Simple).await;
        device.until_begun(1).await;
        read(&mut two, 2, TaskAttribute::Simple).await;
        read(&mut two, 3, TaskAttribute::Ordered).await;
        device.until_begun(2).await;
        manage(&mut two, function, NO_TAG).await;
        complete(&mut two).await;
        for block in 1..=3 {
            device.end(block);
        }
        // None of its own is answered; the other's is, and nobody is told anything: SPC-4 has a task set for each nexus.
        assert_eq!(ready(&mut two).await, (status::GOOD, None), "{function:?}");
        assert_eq!(ended(&mut one).await, (1, status::GOOD), "{function:?}");
        assert_eq!(ready(&mut one).await, (status::GOOD, None), "{function:?}");
    }
}

#[tokio::test]
async fn a_reset_ends_the_tasks_of_all_sessions_and_tells_them() {
    for (function, told) in [
        (TaskFunction::LogicalUnitReset, Sense::BUS_DEVICE_RESET),
        (TaskFunction::TargetWarmReset, Sense::BUS_DEVICE_RESET),
    ] {
        let device = Slow::new();
        let (_server, portal) = serve(device.clone()).await;
        let mut one = Client::login(portal, TARGET, 1).await;
        let mut two = Client::login(portal, TARGET, 2).await;
        read(&mut one, 1, TaskAttribute::Simple).await;
        device.until_begun(1).await;
        manage(&mut two, function, NO_TAG).await;
        complete(&mut two).await;
        assert_eq!(
            ready(&mut one).await,
            (status::CHECK_CONDITION, Some(told)),
            "{function:?}"
        );
        device.end(1);
        assert_eq!(ready(&mut one).await, (status::GOOD, None), "{function:?}");
    }
}

/// Sends a ping, which is answered before anything else: what was asked for before still waits.
async fn still_waits(client: &mut Client) {
    let ping = NopOut {
        immediate: true,
        lun: LunField(0),
        itt: 2000,
        ttt: NO_TAG,
        cmd_sn: client.cmd_sn,
        exp_stat_sn: 0,
    };
    client.send(&ping.into(), &[]).await;
    let first = client.receive().await.0;
    assert!(
        matches!(first, Pdu::NopIn(pong) if pong.itt == 2000),
        "answered while another session's write is on the device: {first:?}"
    );
}

#[tokio::test]
async fn a_reset_is_answered_when_the_writes_of_all_sessions_have_ended() {
    for function in [TaskFunction::LogicalUnitReset, TaskFunction::TargetWarmReset] {
        let device = Slow::new();
        let (_server, portal) = serve(device.clone()).await;
        let mut one = Client::login(portal, TARGET, 1).await;
        let mut two = Client::login(portal, TARGET, 2).await;
        let write = command(&mut one, 1, TaskAttribute::Simple, 0x2a, 1);
        one.send(&write.into(), &[1; 512]).await;
        device.until_begun(1).await;
        manage(&mut two, function, NO_TAG).await;
        still_waits(&mut two).await;
        device.end(1);
        complete(&mut two).await;
        let told = (status::CHECK_CONDITION, Some(Sense::BUS_DEVICE_RESET));
        assert_eq!(ready(&mut one).await, told, "{function:?}");
        // A session that ends instead is waited for no longer than its write takes.
        let write = command(&mut one, 2, TaskAttribute::Simple, 0x2a, 1);
        one.send(&write.into(), &[1; 512]).await;
        device.until_begun(2).await;
        assert_eq!(ready(&mut two).await, told, "{function:?}");
        manage(&mut two, function, NO_TAG).await;
        still_waits(&mut two).await;
        drop(one);
        still_waits(&mut two).await;
        device.end(2);
        complete(&mut two).await;
    }
}

#[tokio::test]
async fn a_cold_reset_is_answered_before_it_ends_all_sessions() {
    let device = Slow::new();
    let (_server, portal) = serve(device.clone()).await;
    let mut one = Client::login(portal, TARGET, 1).await;
    let mut two = Client::login(portal, TARGET, 2).await;
    let write = command(&mut one, 1, TaskAttribute::Simple, 0x2a, 1);
    one.send(&write.into(), &[1; 512]).await;
    device.until_begun(1).await;
    manage(&mut two, TaskFunction::TargetColdReset, NO_TAG).await;
    still_waits(&mut two).await;
    device.end(1);
    complete(&mut two).await;
    assert!(two.ends().await, "the session that asked goes on");
    assert!(one.ends().await, "the other session goes on");
}

/// PERSISTENT RESERVE OUT.
async fn reserve_out(client: &mut Client, tag: u8, action: u8, key: u64, action_key: u64) {
    let mut pdu = command(client, tag, TaskAttribute::Simple, 0x2a, 0);
    pdu.cdb = [0; 16];
    (pdu.cdb[0], pdu.cdb[1], pdu.cdb[2], pdu.cdb[8]) = (0x5f, action, 1, 24);
    pdu.expected_bytes = 24;
    let mut list = [0; 24];
    list[..8].copy_from_slice(&key.to_be_bytes());
    list[8..16].copy_from_slice(&action_key.to_be_bytes());
    client.send(&pdu.into(), &list).await;
}

#[tokio::test]
async fn a_preemption_is_answered_when_the_writes_of_the_preempted_have_ended() {
    let (device, other_device) = (Slow::new(), Slow::new());
    let server = Server::bind(&["127.0.0.1:0".parse().unwrap()], ServerConfig::default()).unwrap();
    let mut spec = support::spec(device.clone(), Access::Anyone);
    let mut other = support::spec(other_device.clone(), Access::Anyone).luns.remove(0);
    other.lun = 1;
    spec.luns.push(other);
    server.add_target(spec).unwrap();
    let portal = server.local_addrs()[0];
    let mut old = Client::login(portal, TARGET, 1).await;
    let mut new = Client::login(portal, TARGET, 2).await;
    for (client, key) in [(&mut old, 1), (&mut new, 2)] {
        reserve_out(client, 1, 0, 0, key).await;
        assert_eq!(ended(client).await, (1, status::GOOD));
    }
    let write = command(&mut old, 1, TaskAttribute::Simple, 0x2a, 1);
    old.send(&write.into(), &[1; 512]).await;
    device.until_begun(1).await;
    // On the other unit nobody is preempted.
    let mut read = command(&mut old, 9, TaskAttribute::Simple, 0x28, 1);
    read.lun = LunField::new(1);
    let attention = ScsiCommand {
        cdb: [0; 16],
        itt: 8,
        read: false,
        expected_bytes: 0,
        cmd_sn: read.cmd_sn,
        ..read
    };
    read.cmd_sn = read.cmd_sn.wrapping_add(1);
    old.cmd_sn = read.cmd_sn.wrapping_add(1);
    old.send(&attention.into(), &[]).await;
    assert_eq!(ended(&mut old).await, (8, status::CHECK_CONDITION));
    old.send(&read.into(), &[]).await;
    other_device.until_begun(1).await;
    reserve_out(&mut new, 5, 5, 2, 1).await;
    still_waits(&mut new).await;
    device.end(1);
    assert_eq!(ended(&mut new).await, (5, status::GOOD));
    let told = (status::CHECK_CONDITION, Some(Sense::REGISTRATIONS_PREEMPTED));
    assert_eq!(ready(&mut old).await, told);
    other_device.end(9);
    assert_eq!(ended(&mut old).await, (9, status::GOOD));
}

/// READ (10) of half a mebibyte from a block on, by a tag of its own.
async fn read_much(client: &mut Client, itt: u32, block: u8) {
    let mut pdu = command(client, block, TaskAttribute::Simple, 0x28, 0);
    (pdu.itt, pdu.expected_bytes, pdu.cdb[7]) = (itt, 512 * 1024, 4);
    client.send(&pdu.into(), &[]).await;
}

#[tokio::test]
async fn who_asks_for_more_than_a_stuck_device_gives_is_still_heard() {
    let device = Slow::new();
    let (_server, portal) = serve(device.clone()).await;
    let mut client = Client::login(portal, TARGET, 0).await;
    // More than may be read from devices at once: 8 MiB in pieces of 128 KiB.
    for itt in 0..80 {
        read_much(&mut client, itt, 1 + (itt % 2) as u8).await;
    }
    device.until_begun(64).await;
    let ping = NopOut {
        immediate: true,
        lun: LunField(0),
        itt: 2000,
        ttt: NO_TAG,
        cmd_sn: client.cmd_sn,
        exp_stat_sn: 0,
    };
    client.send(&ping.into(), b"are you there?").await;
    let (pong, data) = client.receive().await;
    assert!(matches!(pong, Pdu::NopIn(pong) if pong.itt == 2000), "{pong:?}");
    assert_eq!(data, b"are you there?");
    // One that waits for its turn, and one that the device has.
    for referenced in [79, 0] {
        manage(&mut client, TaskFunction::AbortTask, referenced).await;
        complete(&mut client).await;
    }
    // A piece has 128 KiB, so each read touches these blocks.
    for piece in 0..4 {
        for block in [1, 2] {
            device.end(block + 256 * piece);
        }
    }
    let mut answered = BTreeSet::new();
    while answered.len() < 78 {
        match client.receive().await.0 {
            Pdu::DataIn(data) if data.status.is_some() => assert!(answered.insert(data.itt)),
            Pdu::DataIn(data) => assert!((1..79).contains(&data.itt), "{data:?}"),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(answered, (1..79).collect());
    assert_eq!(ready(&mut client).await, (status::GOOD, None));
}

#[tokio::test]
async fn a_long_read_whose_data_are_on_their_way_is_aborted_too() {
    for function in [TaskFunction::AbortTask, TaskFunction::AbortTaskSet] {
        // The device answers at once, so the read waits for nothing but the socket.
        let (_server, portal) = serve(Arc::new(support::Memory::new(8 << 20, false))).await;
        let mut client = Client::login(portal, TARGET, 0).await;
        let mut pdu = command(&mut client, 0, TaskAttribute::Simple, 0x28, 0);
        (pdu.itt, pdu.expected_bytes, pdu.cdb[7]) = (7, 8 << 20, 0x40);
        client.send(&pdu.into(), &[]).await;
        manage(&mut client, function, 7).await;
        let mut came = 0;
        let answer = loop {
            match client.receive().await {
                (Pdu::DataIn(header), data) => {
                    assert_eq!(header.status, None, "the read was not aborted");
                    came += data.len();
                }
                (Pdu::TaskManagementResponse(answer), _) => break answer.response,
                (other, _) => panic!("{other:?}"),
            }
        };
        assert_eq!(answer, task_response::COMPLETE, "after {came} bytes");
        // None of its data comes after the answer.
        assert_eq!(ready(&mut client).await, (status::GOOD, None), "{function:?}");
    }
}
