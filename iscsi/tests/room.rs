//! A device without room: who comes again is told to, after a while; others are told that it failed.

#![allow(dead_code, reason = "the support is shared with other tests")]
#![allow(clippy::unwrap_used, reason = "a panic here is a test that fails")]

mod support;

use std::sync::Arc;
use std::time::Duration;

use support::{Client, TARGET, serve};
use tokio::sync::watch;
use tokio::time::timeout;
use treeboot_block::{BlockDevice, BlockError, Extent, Geometry, IoFuture, Provisioning};
use treeboot_iscsi::pdu::{
    LunField, Pdu, ScsiCommand, TaskAttribute, TaskFunction, TaskManagementRequest, task_response,
};
use treeboot_iscsi::scsi::{Sense, status};

/// No wait of a test is longer.
const DEADLINE: Duration = Duration::from_secs(60);
const BLOCK: [u8; 512] = [7; 512];

/// A device that has room or not, and counts what was tried.
struct Narrow {
    room: watch::Sender<bool>,
    tried: watch::Sender<usize>,
}

impl Narrow {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            room: watch::Sender::new(false),
            tried: watch::Sender::new(0),
        })
    }

    fn take(&self) -> Result<(), BlockError> {
        self.tried.send_modify(|tried| *tried += 1);
        match *self.room.borrow() {
            true => Ok(()),
            false => Err(BlockError::NoSpace {
                offset: 0,
                bytes: 512,
            }),
        }
    }
}

impl BlockDevice for Narrow {
    fn geometry(&self) -> Geometry {
        Geometry {
            bytes: 1 << 20,
            block_bytes: 512,
            physical_block_bytes: 512,
            read_only: false,
            thin: true,
        }
    }

    fn read<'a>(&'a self, _offset: u64, _buf: &'a mut [u8]) -> IoFuture<'a, ()> {
        Box::pin(async { Ok(()) })
    }

    fn write<'a>(&'a self, _offset: u64, _data: &'a [u8]) -> IoFuture<'a, ()> {
        Box::pin(async { self.take() })
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        Box::pin(async { self.take() })
    }

    fn discard(&self, _offset: u64, _bytes: u64) -> IoFuture<'_, ()> {
        Box::pin(async { self.take() })
    }

    fn extent(&self, _offset: u64, bytes: u64) -> IoFuture<'_, Extent> {
        let state = Provisioning::Mapped;
        Box::pin(async move { Ok(Extent { bytes, state }) })
    }
}

/// SYNCHRONIZE CACHE (10).
async fn flush(client: &mut Client) -> (u8, Option<Sense>) {
    let mut cdb = [0; 16];
    cdb[0] = 0x35;
    client.command(cdb, 0, None).await.0
}

#[tokio::test]
async fn linux_is_told_to_come_again_and_others_that_it_failed() {
    let device = Narrow::new();
    let (_server, portal) = serve(device.clone()).await;
    let mut linux = Client::login_as_linux(portal, TARGET).await;
    let mut other = Client::login(portal, TARGET, 1).await;
    let failed = |sense| (status::CHECK_CONDITION, Some(sense));
    let both = timeout(DEADLINE, async {
        assert_eq!(other.try_write(0, &BLOCK).await, failed(Sense::NO_SPACE));
        assert_eq!(flush(&mut other).await, failed(Sense::NO_SPACE));
        assert_eq!(linux.try_write(0, &BLOCK).await, failed(Sense::ALLOCATING));
        assert_eq!(flush(&mut linux).await, failed(Sense::ALLOCATING));
        device.room.send_replace(true);
        linux.write(0, &BLOCK).await;
        assert_eq!(flush(&mut linux).await, (status::GOOD, None));
    });
    both.await.unwrap();
}

#[tokio::test]
async fn who_gives_up_meanwhile_hears_no_more_of_it() {
    let device = Narrow::new();
    let (_server, portal) = serve(device.clone()).await;
    let mut linux = Client::login_as_linux(portal, TARGET).await;
    let mut cdb = [0; 16];
    (cdb[0], cdb[8]) = (0x2a, 1);
    let write = ScsiCommand {
        immediate: false,
        final_: true,
        read: false,
        write: true,
        attribute: TaskAttribute::Simple,
        lun: LunField(0),
        itt: 100,
        expected_bytes: 512,
        cmd_sn: linux.cmd_sn,
        exp_stat_sn: 0,
        cdb,
    };
    linux.cmd_sn = linux.cmd_sn.wrapping_add(1);
    linux.send(&write.into(), &BLOCK).await;
    let mut tried = device.tried.subscribe();
    timeout(DEADLINE, tried.wait_for(|tried| *tried == 1))
        .await
        .unwrap()
        .unwrap();
    let abort = TaskManagementRequest {
        immediate: true,
        function: TaskFunction::AbortTask,
        lun: LunField(0),
        itt: 1000,
        referenced_itt: 100,
        cmd_sn: linux.cmd_sn,
        exp_stat_sn: 0,
        ref_cmd_sn: linux.cmd_sn,
        exp_data_sn: 0,
    };
    linux.send(&abort.into(), &[]).await;
    let (answer, _) = timeout(DEADLINE, linux.receive()).await.unwrap();
    let Pdu::TaskManagementResponse(answer) = answer else {
        panic!("{answer:?}")
    };
    assert_eq!((answer.itt, answer.response), (1000, task_response::COMPLETE));
    // The next answer is the next command's.
    device.room.send_replace(true);
    linux.write(0, &BLOCK).await;
}
