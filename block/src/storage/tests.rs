//! The file and the model behave alike; the model loses what it should.

use super::model::{Fault, ModelStorage};
use super::{FileStorage, OpenMode, Storage};
use crate::Provisioning;

fn file() -> (tempfile::TempDir, FileStorage) {
    let dir = tempfile::tempdir().unwrap();
    let file = FileStorage::open(&dir.path().join("f"), OpenMode::CreateNew).unwrap();
    (dir, file)
}

fn read(storage: &dyn Storage, offset: u64, bytes: usize) -> Vec<u8> {
    let mut buf = vec![0xEE; bytes];
    storage.read_at(offset, &mut buf).unwrap();
    buf
}

fn check_storage(storage: &dyn Storage) {
    assert!(storage.is_empty().unwrap());
    storage.write_at(4096, &[7; 8192]).unwrap();
    assert_eq!(storage.len().unwrap(), 12288);
    assert_eq!(read(storage, 0, 4096), [0; 4096]);
    assert_eq!(read(storage, 12288 - 512, 1024)[..512], [7; 512]);
    assert_eq!(read(storage, 12288 - 512, 1024)[512..], [0; 512]);
    let hole = storage.extent(0, 1 << 20).unwrap();
    assert_eq!((hole.bytes, hole.state), (4096, Provisioning::Hole));
    let data = storage.extent(4096, 1 << 20).unwrap();
    assert_eq!((data.bytes, data.state), (8192, Provisioning::Mapped));
    storage.punch(4096, 4096).unwrap();
    assert_eq!(read(storage, 4096, 4096), [0; 4096]);
    assert_eq!(storage.extent(4096, 512).unwrap().state, Provisioning::Hole);
    storage.sync().unwrap();
    storage.set_len(8192).unwrap();
    storage.set_len(12288).unwrap();
    assert_eq!(read(storage, 8192, 4096), [0; 4096]);
    assert_eq!(storage.allocated_bytes().unwrap(), 0);
}

#[test]
fn a_file_and_the_model_answer_alike() {
    check_storage(&ModelStorage::new());
    let (_dir, file) = file();
    check_storage(&file);
}

#[test]
fn what_was_just_written_can_be_read_without_waiting() {
    let (_dir, file) = file();
    file.write_at(0, &[9; 65536]).unwrap();
    let mut buf = vec![0; 65536];
    match file.try_read_at(0, &mut buf).unwrap() {
        Some(()) => assert!(buf.iter().all(|&byte| byte == 9)),
        None => assert!(
            !file.nowait.load(std::sync::atomic::Ordering::Relaxed),
            "the file system knows RWF_NOWAIT and would still block on its own cache"
        ),
    }
}

#[test]
fn a_second_writer_of_a_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    let first = FileStorage::open(&path, OpenMode::CreateNew).unwrap();
    for mode in [OpenMode::ReadOnly, OpenMode::ReadWrite] {
        let error = FileStorage::open(&path, mode).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
    }
    drop(first);
    let _reader = FileStorage::open(&path, OpenMode::ReadOnly).unwrap();
    FileStorage::open(&path, OpenMode::ReadOnly).unwrap();
}

#[test]
fn a_crash_loses_nothing_that_was_synced_and_may_lose_the_rest_by_sector() {
    let model = ModelStorage::new();
    model.write_at(0, &[1; 1024]).unwrap();
    model.sync().unwrap();
    model.write_at(0, &[2; 1024]).unwrap();
    let lost = model.crash(model.log_len(), &mut || false);
    assert_eq!(lost.to_vec(), [1; 1024]);
    let mut toggle = false;
    let torn = model.crash(model.log_len(), &mut || {
        toggle = !toggle;
        toggle
    });
    assert_eq!(torn.to_vec()[..512], [2; 512]);
    assert_eq!(torn.to_vec()[512..], [1; 512]);
    assert_eq!(model.killed(model.log_len(), &mut || false).to_vec(), [2; 1024]);
    assert!(model.crash(1, &mut || false).is_empty().unwrap());
}

#[test]
fn a_failed_sync_leaves_in_doubt_even_what_a_later_one_follows() {
    let model = ModelStorage::new();
    model.write_at(0, &[1; 512]).unwrap();
    model.fail_at(1, Fault::Io);
    assert!(model.sync().is_err());
    model.sync().unwrap();
    assert!(model.crash(model.log_len(), &mut || false).is_empty().unwrap());
}
