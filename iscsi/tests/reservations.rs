//! Persistent reservations over real sockets, through restarts of the target.

#![allow(dead_code, reason = "the support is shared with other tests")]
#![allow(clippy::unwrap_used, reason = "a panic here is a test that fails")]

mod support;

use std::path::Path;
use std::sync::Arc;

use support::{Client, Memory, TARGET, spec};
use treeboot_block::BlockDevice;
use treeboot_iscsi::scsi::{Sense, status};
use treeboot_iscsi::target::{
    Access, AddTargetError, ReservationFile, Server, ServerConfig, TargetOptions, TargetSpec,
};

const REGISTER: u8 = 0;
const RESERVE: u8 = 1;
const RELEASE: u8 = 2;
const EXCLUSIVE_ACCESS: u8 = 3;

fn start(device: Arc<dyn BlockDevice>, file: Option<&Path>) -> Result<Server, AddTargetError> {
    start_spec(spec(device, Access::Anyone), file)
}

fn start_spec(spec: TargetSpec, file: Option<&Path>) -> Result<Server, AddTargetError> {
    let server = Server::bind(&["127.0.0.1:0".parse().unwrap()], ServerConfig::default()).unwrap();
    let file = file.map(|path| (0, ReservationFile::open(path).unwrap()));
    let options = TargetOptions {
        reservations: file.into_iter().collect(),
        ..TargetOptions::default()
    };
    server.add_target_with(spec, options)?;
    Ok(server)
}

async fn login(server: &Server, number: u8) -> Client {
    Client::login(server.local_addrs()[0], TARGET, number).await
}

async fn reserve_out(
    client: &mut Client,
    action: u8,
    kind: u8,
    key: u64,
    new: u64,
    aptpl: bool,
) -> (u8, Option<Sense>) {
    let mut cdb = [0; 16];
    (cdb[0], cdb[1], cdb[2], cdb[8]) = (0x5f, action, kind, 24);
    let mut parameters = key.to_be_bytes().to_vec();
    parameters.extend_from_slice(&new.to_be_bytes());
    parameters.extend_from_slice(&[0, 0, 0, 0, aptpl.into(), 0, 0, 0]);
    client.command(cdb, 24, Some(&parameters)).await.0
}

async fn reserve_in(client: &mut Client, action: u8) -> Vec<u8> {
    let mut cdb = [0; 16];
    (cdb[0], cdb[1], cdb[7]) = (0x5e, action, 1);
    let ((answer, _), data) = client.command(cdb, 256, None).await;
    assert_eq!(answer, status::GOOD);
    data
}

async fn read_status(client: &mut Client) -> u8 {
    let mut cdb = [0; 16];
    (cdb[0], cdb[8]) = (0x28, 1);
    client.command(cdb, 512, None).await.0.0
}

const DONE: (u8, Option<Sense>) = (status::GOOD, None);

#[tokio::test]
async fn a_reservation_with_aptpl_outlives_the_target() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.reservations");
    let memory = Arc::new(Memory::new(1 << 20, false));
    let server = start(memory.clone(), Some(&path)).unwrap();
    let mut holder = login(&server, 1).await;
    assert_eq!(
        reserve_in(&mut holder, 2).await[2..4],
        [0x01, 0x80],
        "it can, and does not yet"
    );
    assert_eq!(reserve_out(&mut holder, REGISTER, 0, 0, 0xa, true).await, DONE);
    assert_eq!(
        reserve_out(&mut holder, RESERVE, EXCLUSIVE_ACCESS, 0xa, 0, false).await,
        DONE
    );
    assert_eq!(reserve_in(&mut holder, 2).await[2..4], [0x01, 0x81]);
    // No shutdown: what was answered must be on the disk already.
    drop((holder, server));

    let server = wait_for_lock(memory.clone(), &path).await;
    let mut other = login(&server, 2).await;
    assert_eq!(read_status(&mut other).await, status::RESERVATION_CONFLICT);
    let mut holder = login(&server, 1).await;
    assert_eq!(read_status(&mut holder).await, status::GOOD);
    let keys = reserve_in(&mut holder, 0).await;
    assert_eq!(keys[..4], [0; 4], "the generation begins anew");
    assert_eq!(keys[8..16], 0xau64.to_be_bytes());
    assert_eq!(
        reserve_out(&mut holder, RELEASE, EXCLUSIVE_ACCESS, 0xa, 0, false).await,
        DONE
    );
    assert_eq!(read_status(&mut other).await, status::GOOD);
    // Registered again without APTPL, it is forgotten at the next start.
    assert_eq!(
        reserve_out(&mut holder, RESERVE, EXCLUSIVE_ACCESS, 0xa, 0, false).await,
        DONE
    );
    assert_eq!(reserve_out(&mut holder, REGISTER, 0, 0xa, 0xb, false).await, DONE);
    assert_eq!(read_status(&mut other).await, status::RESERVATION_CONFLICT);
    drop((holder, other, server));

    let server = wait_for_lock(memory, &path).await;
    let mut other = login(&server, 2).await;
    assert_eq!(read_status(&mut other).await, status::GOOD);
    assert_eq!(reserve_in(&mut other, 0).await[4..8], [0; 4]);
}

/// A server that was dropped ends in the background; the file is its own until then.
async fn wait_for_lock(device: Arc<dyn BlockDevice>, path: &Path) -> Server {
    until_free(path).await;
    start(device, Some(path)).unwrap()
}

async fn until_free(path: &Path) {
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(10);
    while let Err(error) = ReservationFile::open(path) {
        assert!(tokio::time::Instant::now() < deadline, "{error}");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn without_a_place_to_keep_it_aptpl_is_refused() {
    let server = start(Arc::new(Memory::new(1 << 20, false)), None).unwrap();
    let mut client = login(&server, 1).await;
    assert_eq!(reserve_in(&mut client, 2).await[2..4], [0x00, 0x80]);
    let (answer, sense) = reserve_out(&mut client, REGISTER, 0, 0, 0xa, true).await;
    assert_eq!(
        (answer, sense),
        (status::CHECK_CONDITION, Some(Sense::INVALID_FIELD_IN_PARAMETERS))
    );
    assert_eq!(reserve_out(&mut client, REGISTER, 0, 0, 0xa, false).await, DONE);
}

#[tokio::test]
async fn what_cannot_be_kept_is_refused_and_does_not_hold() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("inner/disk.reservations");
    std::fs::create_dir(folder.path().join("inner")).unwrap();
    let server = start(Arc::new(Memory::new(1 << 20, false)), Some(&path)).unwrap();
    let mut client = login(&server, 1).await;
    std::fs::remove_dir_all(folder.path().join("inner")).unwrap();
    let (answer, sense) = reserve_out(&mut client, REGISTER, 0, 0, 0xa, true).await;
    assert_eq!((answer, sense), (status::CHECK_CONDITION, Some(Sense::INTERNAL)));
    assert_eq!(
        reserve_in(&mut client, 0).await[4..8],
        [0; 4],
        "nobody is registered"
    );
}

#[tokio::test]
async fn reservations_of_another_disk_or_damaged_ones_stop_the_target() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("r");
    let memory = Arc::new(Memory::new(1 << 20, false));
    let server = start(memory.clone(), Some(&path)).unwrap();
    let mut client = login(&server, 1).await;
    assert_eq!(reserve_out(&mut client, REGISTER, 0, 0, 0xa, true).await, DONE);
    drop((client, server));
    until_free(&path).await;
    let mut other = spec(memory.clone(), Access::Anyone);
    other.luns[0].ident = [9; 16];
    let error = start_spec(other, Some(&path)).err().expect("another disk's");
    assert!(
        matches!(error, AddTargetError::Reservations { lun: 0, .. }),
        "{error}"
    );
    until_free(&path).await;
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(
        &path,
        text.replace("key 000000000000000a", "key 000000000000000b"),
    )
    .unwrap();
    let error = start(memory, Some(&path)).err().expect("a wrong sum");
    assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
}
