use std::collections::BTreeMap;

use treeboot_types::{
    AttachState, Digest, Endpoint, Epoch, HostInfo, Image, Iqn, Labels, Origin, PlaneKind, Portal,
};

use super::{FORMAT, MemoryStore, SledStore, Store, StoreError};
use crate::tree::{AttachmentRecord, Change, HeldOf, HeldShare, HostRecord, Key, Record};

fn epoch(counter: u64) -> Epoch {
    Epoch {
        incarnation: 1,
        counter,
    }
}

fn records() -> Vec<(Key, Record)> {
    let endpoint = Endpoint {
        portal: Portal::new("[::1]:3260").unwrap(),
        target: Iqn::new("iqn.2026-11.org.example:disk:1").unwrap(),
        data_lun: 0,
        hash_lun: Some(1),
    };
    let image = Image {
        id: "debian-12.5@3".parse().unwrap(),
        digest: Digest([9; 32]),
        bytes: 1 << 30,
        chunk_bytes: 65536,
        stripes: 1,
        stripe_unit_bytes: 65536,
        origins: vec![Origin {
            endpoint: endpoint.clone(),
            host: None,
            labels: Labels::from([("rack".into(), "1/ü \"x\"".into())]),
        }],
        created_unix_ms: 1,
        allocated_bytes: 2,
    };
    let info = HostInfo {
        name: "10.0.0.1".parse().unwrap(),
        instance: "x".into(),
        agent_address: "[::1]:7401".into(),
        portal: "[::1]:3260".into(),
        plane: PlaneKind::Kernel,
        max_stripes: 1,
        labels: Labels::new(),
        version: "1".into(),
        weight: 1,
        runs_vms: true,
        holds_store: false,
    };
    let held = |of| HeldShare { of, shares: 1 };
    let place = AttachmentRecord {
        endpoint,
        state: AttachState::Ready,
        epoch: epoch(5),
        position: epoch(4),
        joined: 3,
        home: 1,
        barred: vec![(1, "h7".parse().unwrap())],
        held_back: Vec::new(),
        lets_in: vec![(1, "h3".parse().unwrap())],
        lets_in_others: true,
        stripes: vec![vec![
            held(HeldOf::Origin(0)),
            held(HeldOf::Host("b".parse().unwrap())),
        ]],
    };
    vec![
        (Key::Epoch, Record::Epoch(epoch(7))),
        (Key::Newest(image.id.name.clone()), Record::Newest(3)),
        (Key::Image(image.id.clone()), Record::Image(image.clone())),
        (
            Key::Host(info.name.clone()),
            Record::Host(HostRecord { info: info.clone() }),
        ),
        (Key::Attachment(image.id, info.name), Record::Attachment(place)),
    ]
}

fn puts() -> Vec<Change> {
    records().into_iter().map(|(k, r)| Change::Put(k, r)).collect()
}

fn sorted(entries: Vec<(Key, Record)>) -> BTreeMap<Key, Record> {
    entries.into_iter().collect()
}

fn check_store(store: &dyn Store) {
    assert!(store.load().unwrap().is_empty());
    store.apply(&puts()).unwrap();
    assert_eq!(sorted(store.load().unwrap()), sorted(records()));
    let gone: Vec<Change> = records()
        .into_iter()
        .map(|(k, _)| Change::Delete(k))
        .skip(1)
        .collect();
    store.apply(&gone).unwrap();
    assert_eq!(store.load().unwrap(), [(Key::Epoch, Record::Epoch(epoch(7)))]);
}

#[test]
fn every_store_keeps_what_was_applied() {
    check_store(&MemoryStore::default());
    let dir = tempfile::tempdir().unwrap();
    check_store(&SledStore::open(dir.path()).unwrap());
}

#[test]
fn what_was_applied_is_there_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let store = SledStore::open(dir.path()).unwrap();
    store.apply(&puts()).unwrap();
    drop(store);
    let store = SledStore::open(dir.path()).unwrap();
    assert_eq!(sorted(store.load().unwrap()), sorted(records()));
}

#[test]
fn a_directory_in_use_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let _first = SledStore::open(dir.path()).unwrap();
    let error = SledStore::open(dir.path()).unwrap_err();
    assert!(matches!(&error, StoreError::Locked { .. }), "{error}");
    assert!(error.to_string().contains(&dir.path().display().to_string()));
}

/// Writes an entry behind the store's back.
fn spoil(dir: &std::path::Path, key: &str, value: &[u8]) -> StoreError {
    let db = sled::open(dir.join("record")).unwrap();
    db.insert(key, value).unwrap();
    db.flush().unwrap();
    drop(db);
    SledStore::open(dir).and_then(|store| store.load()).unwrap_err()
}

#[test]
fn an_entry_of_a_newer_format_is_refused_with_both_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let error = spoil(dir.path(), "epoch", &[FORMAT + 1, b'{', b'}']);
    assert!(matches!(error, StoreError::Newer { found, .. } if found == FORMAT + 1));
    let text = error.to_string();
    assert!(text.contains("format 2") && text.contains("up to 1"), "{text}");
}

#[test]
fn a_damaged_entry_is_named() {
    let cases: [(&str, &[u8]); 6] = [
        ("epoch", b""),
        ("epoch", b"\x01{\"incarnation\":"),
        ("host/a", b"\x01{}"),
        ("image/debian", b"\x01{}"),
        ("place/debian@1", b"\x01{}"),
        ("other", b"\x01{}"),
    ];
    for (key, value) in cases {
        let dir = tempfile::tempdir().unwrap();
        let error = spoil(dir.path(), key, value);
        assert!(
            matches!(&error, StoreError::Damaged { key: named, .. } if named == key),
            "{error}"
        );
    }
}

type Spoil = fn(&sled::Db);

#[test]
fn entries_that_are_gone_or_read_otherwise_are_noticed() {
    let spoils: [(&str, Spoil); 3] = [
        ("of 5 entries that were written it has 4", |db| {
            db.remove("newest/debian-12.5").unwrap().unwrap();
        }),
        ("of 5 entries that were written it has 6", |db| {
            db.insert("newest/other", b"\x013").unwrap();
        }),
        ("of 5 entries that were written it has 5", |db| {
            db.insert("newest/debian-12.5", b"\x014").unwrap();
        }),
    ];
    for (words, spoil) in spoils {
        let dir = tempfile::tempdir().unwrap();
        let store = SledStore::open(dir.path()).unwrap();
        // Twice, and in one batch twice: what counts is what is there in the end.
        store.apply(&puts()).unwrap();
        let twice: Vec<Change> = puts().into_iter().chain(puts()).collect();
        store.apply(&twice).unwrap();
        drop(store);
        assert_eq!(
            sorted(SledStore::open(dir.path()).unwrap().load().unwrap()),
            sorted(records())
        );
        let db = sled::open(dir.path().join("record")).unwrap();
        spoil(&db);
        db.flush().unwrap();
        drop(db);
        let error = SledStore::open(dir.path()).unwrap_err();
        assert!(matches!(&error, StoreError::Lost { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains(words) && text.contains("--rebuild"), "{text}");
    }
}

/// Every file of the record, and many places in it: cut short there, or with a byte turned. Where a log without its end reads as it was
/// some batches ago, the hosts' epochs tell (`tree::rebuild`); what must never be is a state that never was.
#[test]
fn damage_anywhere_in_the_files_is_noticed_or_leaves_what_was_once_there() {
    let dir = tempfile::tempdir().unwrap();
    let store = SledStore::open(dir.path()).unwrap();
    for number in 0..40 {
        let newest = Change::Put(
            Key::Newest("debian-12.5".parse().unwrap()),
            Record::Newest(number),
        );
        store.apply(&puts()).unwrap();
        store.apply(&[newest]).unwrap();
    }
    store.apply(&puts()).unwrap();
    drop(store);
    let files = std::fs::read_dir(dir.path().join("record")).unwrap();
    let files: Vec<_> = files
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_file())
        .collect();
    assert!(!files.is_empty());
    let mut noticed = 0;
    for path in files {
        let whole = std::fs::read(&path).unwrap();
        let name = path.file_name().unwrap();
        for at in (0..whole.len()).step_by((whole.len() / 48).max(1)) {
            for cut in [true, false] {
                let other = tempfile::tempdir().unwrap();
                let copy = other.path().join("record");
                copy_files(&dir.path().join("record"), &copy);
                let mut bytes = whole.clone();
                if cut {
                    bytes.truncate(at);
                } else {
                    bytes[at] ^= 0x41;
                }
                std::fs::write(copy.join(name), bytes).unwrap();
                match SledStore::open(other.path()).and_then(|store| store.load()) {
                    Ok(read) => assert!(was_once_there(&read), "{name:?} at {at}, cut {cut}: {read:?}"),
                    Err(error) => {
                        noticed += 1;
                        assert!(
                            matches!(
                                &error,
                                StoreError::Lost { .. }
                                    | StoreError::Unreadable { .. }
                                    | StoreError::Damaged { .. }
                                    | StoreError::Open { .. }
                            ),
                            "{name:?} at {at}, cut {cut}: {error}"
                        );
                    }
                }
            }
        }
    }
    println!("{noticed} damages were noticed");
}

/// Nothing, or all with some number for the newest version.
fn was_once_there(read: &[(Key, Record)]) -> bool {
    let numbered = |number| {
        let records = records().into_iter().map(|(key, record)| match key {
            Key::Newest(_) => (key, Record::Newest(number)),
            _ => (key, record),
        });
        sorted(records.collect())
    };
    let read = sorted(read.to_vec());
    read.is_empty() || (0..40).any(|number| read == numbered(number))
}

fn copy_files(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_files(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[test]
fn a_record_is_put_aside_unless_somebody_has_it() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(SledStore::set_aside(dir.path()).unwrap(), None);
    for number in 1..3 {
        let store = SledStore::open(dir.path()).unwrap();
        assert!(store.load().unwrap().is_empty());
        store.apply(&puts()).unwrap();
        let refused = SledStore::set_aside(dir.path()).unwrap_err();
        assert!(matches!(refused, StoreError::Locked { .. }), "{refused}");
        drop(store);
        let aside = SledStore::set_aside(dir.path()).unwrap().unwrap();
        assert_eq!(aside, dir.path().join(format!("record.old-{number}")));
        assert!(aside.join("db").exists());
    }
}

#[test]
fn a_state_directory_that_cannot_be_made_is_named() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let error = SledStore::open(file.path()).unwrap_err();
    assert!(matches!(&error, StoreError::Open { .. }), "{error}");
    assert!(error.to_string().contains(&file.path().display().to_string()));
}
