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
    SledStore::open(dir).unwrap().load().unwrap_err()
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

#[test]
fn a_state_directory_that_cannot_be_made_is_named() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let error = SledStore::open(file.path()).unwrap_err();
    assert!(matches!(&error, StoreError::Open { .. }), "{error}");
    assert!(error.to_string().contains(&file.path().display().to_string()));
}
