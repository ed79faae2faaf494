//! What can be told without a kernel: names, paths, what LIO's texts say, whose an object is, and that nothing is written twice.
//! That LIO takes it all is shown by the cases of `treeboot-kernel-cases iscsi`.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use treeboot_types::Iqn;

use super::*;
use crate::login::{Chap, Credentials, Secret};

/// A folder that looks like configfs as far as building a target asks.
fn fake() -> (tempfile::TempDir, Lio) {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir_all(folder.path().join("target/core")).unwrap();
    let lio = Lio::new(folder.path());
    (folder, lio)
}

fn image() -> Iqn {
    Iqn::of_image(&"debian@1".parse().unwrap())
}

fn host(name: &str) -> Iqn {
    Iqn::of_host(&name.parse().unwrap())
}

/// What LIO would have made of a backstore.
fn put_backstore(lio: &Lio, hba: &str, name: &str, info: &str) -> PathBuf {
    let path = lio.tree.target().join("core").join(hba).join(name);
    fs::create_dir_all(path.join("wwn")).unwrap();
    fs::create_dir_all(path.join("attrib")).unwrap();
    fs::write(path.join("enable"), "1\n").unwrap();
    fs::write(path.join("info"), info).unwrap();
    path
}

const IBLOCK_INFO: &str = "Status: ACTIVATED  Max Queue Depth: 0  SectorSize: 512  HwMaxSectors: 2560\n        \
     iBlock device: dm-0  UDEV PATH: /dev/dm-0  readonly: 1\n        Major: 254 Minor: 0  CLAIMED: IBLOCK\n";
const FILEIO_INFO: &str = "Status: DEACTIVATED  Max Queue Depth: 0  SectorSize: 512  HwMaxSectors: 16384\n        \
     TCM FILEIO ID: 0        File: /a b  Size: 9/c.img  Size: 1048576  Mode: Buffered-WCE Async: 0\n";

fn export(access: Access) -> Export {
    Export {
        name: image(),
        portals: vec!["127.0.0.1:3260".parse().unwrap(), "[::1]:3260".parse().unwrap()],
        luns: vec![(0, BackstoreName::new("data-a").unwrap())],
        access,
        writable: false,
    }
}

/// The folders that LIO itself makes in a target, which a plain folder has not.
fn put_groups(lio: &Lio, initiators: &[Iqn]) {
    let group = lio.target_path(&image()).join("tpgt_1");
    for folder in ["attrib", "param", "auth", "np", "lun", "acls"] {
        fs::create_dir_all(group.join(folder)).unwrap();
    }
    for initiator in initiators {
        for folder in ["attrib", "auth"] {
            fs::create_dir_all(group.join("acls").join(initiator.as_str()).join(folder)).unwrap();
        }
    }
}

#[test]
fn a_name_that_is_not_wholly_ours_is_nobodys_here() {
    assert_eq!(
        BackstoreName::new("data-0a").unwrap().as_str(),
        "treeboot-data-0a"
    );
    for name in [
        "treeboot-",
        "treeboot",
        "data",
        "Treeboot-a",
        "treeboot-a/b",
        "treeboot-a b",
        "xtreeboot-a",
    ] {
        assert!(BackstoreName::parse(name).is_err(), "{name}");
    }
    assert!(BackstoreName::new(&"a".repeat(200)).is_err());
}

#[test]
fn what_a_backstore_has_opened_is_read_from_its_info() {
    let (_folder, lio) = fake();
    put_backstore(&lio, "iblock_26111", "treeboot-data-a", IBLOCK_INFO);
    put_backstore(&lio, "fileio_26111", "treeboot-hash-a", FILEIO_INFO);
    put_backstore(&lio, "iblock_0", "treeboot-data-b", IBLOCK_INFO);
    put_backstore(&lio, "iblock_26111", "somebody-elses", IBLOCK_INFO);
    let half = put_backstore(&lio, "iblock_26111", "treeboot-half", "");
    fs::write(half.join("enable"), "0\n").unwrap();
    let found = lio.found().unwrap();
    let block = Backing::Block {
        path: "/dev/dm-0".into(),
    };
    let file = Backing::File {
        path: "/a b  Size: 9/c.img".into(),
        bytes: 1 << 20,
    };
    let got: Vec<_> = found
        .backstores
        .iter()
        .map(|b| (b.name.as_str(), b.backing.clone(), b.writable))
        .collect();
    assert_eq!(
        got,
        [
            ("treeboot-data-a", Some(block), false),
            ("treeboot-half", None, true),
            ("treeboot-hash-a", Some(file), true),
        ]
        .map(|(name, backing, writable)| (name, backing, writable))
    );
    fs::write(half.join("enable"), "1\n").unwrap();
    let error = lio.found().unwrap_err();
    assert!(matches!(error, LioError::Unreadable { .. }), "{error}");
}

#[test]
fn a_target_is_ours_by_its_name_and_by_all_of_its_backstores() {
    let (_folder, lio) = fake();
    put_backstore(&lio, "iblock_26111", "treeboot-data-a", IBLOCK_INFO);
    let put = |target: &str, backstore: Option<&str>| {
        let lun = lio.fabric().join(target).join("tpgt_1/lun/lun_0");
        fs::create_dir_all(&lun).unwrap();
        if let Some(backstore) = backstore {
            symlink(
                format!("../../../../../../target/core/{backstore}"),
                lun.join("x"),
            )
            .unwrap();
        }
    };
    let name = image().to_string();
    put(&name, Some("iblock_26111/treeboot-data-a"));
    put(&name.replace("debian", "half"), None);
    put(
        &name.replace("debian", "other-hba"),
        Some("iblock_0/treeboot-data-a"),
    );
    put(
        &name.replace("debian", "other-prefix"),
        Some("iblock_26111/data-a"),
    );
    put(
        &name.replace("treeboot", "treebooter"),
        Some("iblock_26111/treeboot-data-a"),
    );
    put("iqn.2026-11.org.example:a", Some("iblock_26111/treeboot-data-a"));
    fs::create_dir_all(lio.fabric().join(name.replace("debian", "groups")).join("tpgt_2")).unwrap();
    let found = lio.found().unwrap();
    let names: Vec<_> = found.targets.iter().map(|t| t.name.to_string()).collect();
    assert_eq!(names, [name.clone(), name.replace("debian", "half")]);
    for stranger in ["other-hba", "other-prefix", "groups"] {
        let stranger = Iqn::new(&name.replace("debian", stranger)).unwrap();
        let error = lio
            .remove_target(&stranger, std::time::Duration::ZERO)
            .unwrap_err();
        assert!(matches!(error, LioError::Stranger { .. }), "{error}");
    }
    let foreign = Iqn::new("iqn.2026-11.org.example:a").unwrap();
    let error = lio
        .remove_target(&foreign, std::time::Duration::ZERO)
        .unwrap_err();
    assert!(matches!(error, LioError::NotOurs(_)), "{error}");
    // A backstore that anybody exports is in use.
    let error = lio
        .remove_backstore(&BackstoreName::new("data-a").unwrap())
        .unwrap_err();
    let LioError::InUse { by, .. } = error else {
        panic!("{error}");
    };
    assert_eq!(by.len(), 3, "{by:?}");
}

#[test]
fn a_target_is_built_once_and_found_as_it_was_wanted() {
    let (_folder, lio) = fake();
    put_backstore(&lio, "iblock_26111", "treeboot-data-a", IBLOCK_INFO);
    let names: BTreeSet<Iqn> = [host("a"), host("b")].into();
    put_groups(&lio, &names.iter().cloned().collect::<Vec<_>>());
    let wanted = export(Access::Initiators(names.clone()));
    assert_eq!(lio.ensure_target(&wanted).unwrap(), Outcome::Changed);
    let before = lio.steps();
    assert_eq!(lio.ensure_target(&wanted).unwrap(), Outcome::Identity);
    assert_eq!(lio.steps(), before);
    let found = lio.found().unwrap().targets.pop().unwrap();
    assert_eq!(found.name, wanted.name);
    assert!(found.enabled && !found.anyone);
    assert_eq!(found.portals, wanted.portals);
    assert_eq!(found.initiators, names);
    let lun = FoundLun {
        lun: 0,
        backstore: Some(wanted.luns[0].1.clone()),
    };
    assert_eq!(found.luns, [lun]);
    let group = lio.target_path(&image()).join("tpgt_1");
    let read = |path: &str| fs::read_to_string(group.join(path)).unwrap();
    assert_eq!(read("attrib/demo_mode_write_protect"), "1");
    assert_eq!(read(&format!("acls/{}/lun_0/write_protect", host("a"))), "1");
    assert_eq!(read("attrib/authentication"), "0");
}

#[test]
fn enabling_is_the_last_step_and_a_stop_before_any_step_is_an_error() {
    let steps = |stop: u64| {
        let (folder, lio) = fake();
        put_backstore(&lio, "iblock_26111", "treeboot-data-a", IBLOCK_INFO);
        put_groups(&lio, &[host("a")]);
        let last = Arc::new(parking_lot::Mutex::new(PathBuf::new()));
        let count = Arc::new(AtomicU64::new(0));
        let observed = Lio::observed(folder.path(), {
            let (last, count) = (last.clone(), count.clone());
            Arc::new(move |step, _, path| {
                *last.lock() = path.to_path_buf();
                count.fetch_add(1, Ordering::Relaxed);
                step != stop
            })
        });
        let done = observed.ensure_target(&export(Access::Initiators([host("a")].into())));
        let last = last.lock().clone();
        (done, last, count.load(Ordering::Relaxed))
    };
    let (done, last, all) = steps(u64::MAX);
    done.unwrap();
    assert!(last.ends_with("tpgt_1/enable"), "{last:?}");
    for stop in 0..all {
        let (done, _, seen) = steps(stop);
        assert!(matches!(done, Err(LioError::Stopped { step }) if step == stop));
        assert_eq!(seen, stop + 1, "it went on after the stop");
    }
}

#[test]
fn secrets_reach_lio_and_no_error() {
    let secret = |text: &str| Secret::new(text).unwrap();
    let chap = Chap::mutual(
        Credentials::new("me", secret("a secret of mine")).unwrap(),
        Credentials::new("you", secret("a secret of yours")).unwrap(),
    )
    .unwrap();
    let (folder, lio) = fake();
    put_backstore(&lio, "iblock_26111", "treeboot-data-a", IBLOCK_INFO);
    put_groups(&lio, &[host("b")]);
    let group = lio.target_path(&image()).join("tpgt_1");
    let auth = group.join("auth");
    let read = |path: &str| fs::read_to_string(group.join(path)).unwrap_or_default();
    assert!(!lio.has_chap(&auth, Some(&chap)).unwrap());
    assert!(lio.set_chap(&auth, Some(&chap)).unwrap());
    assert!(!lio.set_chap(&auth, Some(&chap)).unwrap());
    assert_eq!(read("auth/password"), "a secret of mine");
    assert_eq!(read("auth/userid_mutual"), "you");
    assert!(lio.set_chap(&auth, None).unwrap());
    assert_eq!(read("auth/password"), "NULL");
    assert!(lio.has_chap(&auth, None).unwrap() && !lio.set_chap(&auth, None).unwrap());
    // Somebody without a secret is said to be so, where others have one.
    let access = Access::Each([(host("b"), None)].into());
    lio.ensure_target(&export(access)).unwrap();
    assert_eq!(read(&format!("acls/{}/attrib/authentication", host("b"))), "-1");
    let told = Lio::observed(
        folder.path(),
        Arc::new(|_, act, _| {
            assert!(!act.to_string().contains("secret of"), "{act}");
            true
        }),
    );
    fs::remove_dir_all(group.join("acls")).unwrap();
    fs::create_dir(group.join("acls")).unwrap();
    fs::write(group.join("attrib/generate_node_acls"), "1").unwrap();
    assert_eq!(
        told.ensure_target(&export(Access::Secret(chap))).unwrap(),
        Outcome::Changed
    );
    assert_eq!(read("auth/password"), "a secret of mine");
    assert_eq!(read("attrib/authentication"), "1");
    // LIO would take these for something else.
    for word in ["NULL and so on", "with a line's end\n", "with a zero\0 byte"] {
        let chap = Chap::one_way(Credentials::new("me", secret(word)).unwrap());
        let error = lio.ensure_target(&export(Access::Secret(chap))).unwrap_err();
        assert!(matches!(error, LioError::Chap { what: "secret", .. }), "{error}");
        assert!(!error.to_string().contains(word));
    }
}

#[test]
fn what_is_missing_is_said_with_the_command_to_type() {
    let folder = tempfile::tempdir().unwrap();
    let lio = Lio::new(folder.path());
    let error = lio.ensure_target(&export(Access::Anyone)).unwrap_err();
    assert!(matches!(error, LioError::NoConfigfs { .. }));
    assert!(error.to_string().contains("mount -t configfs none"), "{error}");
    assert_eq!(lio.found().unwrap(), Found::default());
    let (_folder, lio) = fake();
    let error = lio.ensure_target(&export(Access::Anyone)).unwrap_err();
    assert!(matches!(error, LioError::NoBackstore { lun: 0, .. }), "{error}");
    let mut foreign = export(Access::Anyone);
    foreign.name = Iqn::new("iqn.2026-11.org.example:a").unwrap();
    assert!(matches!(lio.ensure_target(&foreign), Err(LioError::NotOurs(_))));
    let error = LioError::NoModule {
        module: "target_core_mod",
        source: None,
    };
    assert!(error.to_string().contains("modprobe target_core_mod"));
}

#[test]
fn a_path_that_lio_would_misread_is_refused() {
    let (_folder, lio) = fake();
    let backstore = |backing| Backstore {
        name: BackstoreName::new("a").unwrap(),
        backing,
        writable: false,
        serial: "1".into(),
    };
    for path in [
        "/dev/a,readonly=0",
        "/dev/a\nb",
        "dev/a",
        &format!("/{}", "a".repeat(600)),
    ] {
        let error = lio
            .ensure_backstore(&backstore(Backing::Block { path: path.into() }))
            .unwrap_err();
        assert!(matches!(error, LioError::Path { .. }), "{error}");
    }
    // LIO would make the file.
    let missing = backstore(Backing::File {
        path: "/not/there".into(),
        bytes: 512,
    });
    let error = lio.ensure_backstore(&missing).unwrap_err();
    assert!(matches!(error, LioError::Device { .. }), "{error}");
}
