//! What can be told without iscsid and a kernel: what sysfs says, what goes into records, and that a call ends in time.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::time::Instant;

use super::*;
use crate::login::{Credentials, Secret};

const INITIATOR: &str = "iqn.2026-11.dev.treeboot:host:a";

/// sysfs and records in a folder, and a program in iscsiadm's place.
struct Fake {
    folder: tempfile::TempDir,
    open_iscsi: OpenIscsi,
}

impl Fake {
    fn new(program: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("iscsiadm");
        fs::write(&path, format!("#!/bin/sh\n{program}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let settings = Settings {
            units_within: Duration::from_millis(50),
            call_limit: Duration::from_secs(10),
            ..Settings::default()
        };
        let places = Places {
            program: path,
            sysfs: folder.path().join("sys"),
            databases: vec![folder.path().join("absent"), folder.path().join("etc")],
        };
        Self {
            open_iscsi: OpenIscsi::at(&"a".parse().unwrap(), settings, places),
            folder,
        }
    }

    fn put(&self, path: &str, text: &str) {
        let path = self.folder.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn put_session(&self, sid: u32, iface: &str, initiator: &str, state: &str) {
        let real = format!("sys/devices/platform/host{}/session{sid}", sid + 10);
        let class = format!("{real}/iscsi_session/session{sid}");
        self.put(&format!("{class}/ifacename"), &format!("{iface}\n"));
        self.put(&format!("{class}/initiatorname"), &format!("{initiator}\n"));
        self.put(&format!("{class}/targetname"), "iqn.2026-11.org.example:t\n");
        self.put(&format!("{class}/state"), &format!("{state}\n"));
        let root = self.folder.path();
        symlink(root.join(&real), root.join(format!("{class}/device"))).unwrap();
        let classes = root.join("sys/class/iscsi_session");
        fs::create_dir_all(&classes).unwrap();
        symlink(root.join(&class), classes.join(format!("session{sid}"))).unwrap();
        let connection = format!("sys/class/iscsi_connection/connection{sid}:0");
        let address = if sid.is_multiple_of(2) { "::1" } else { "10.0.0.1" };
        self.put(
            &format!("{connection}/persistent_address"),
            &format!("{address}\n"),
        );
        self.put(&format!("{connection}/persistent_port"), "3260\n");
        for (lun, name) in [(1, "sdb"), (0, "sda")] {
            let unit = format!("{real}/target3:0:0/3:0:0:{lun}/block/{name}");
            self.put(&format!("{unit}/dev"), &format!("8:{}\n", 16 * lun));
            self.put(&format!("{unit}/size"), "2048\n");
            self.put(&format!("{unit}/ro"), "1\n");
        }
        // Still being probed.
        self.put(&format!("{real}/target3:0:0/3:0:0:2/block/sdc/size"), "0\n");
    }
}

fn endpoint(address: &str) -> Endpoint {
    Endpoint {
        target: Iqn::new("iqn.2026-11.org.example:t").unwrap(),
        portal: format!("{address}:3260").parse().unwrap(),
    }
}

fn chap() -> Chap {
    Chap::mutual(
        Credentials::new("me", Secret::new("a secret = of mine").unwrap()).unwrap(),
        Credentials::new("you", Secret::new("a secret of yours").unwrap()).unwrap(),
    )
    .unwrap()
}

#[test]
fn only_sessions_through_our_interface_under_our_name_are_ours() {
    let fake = Fake::new("exit 0");
    assert_eq!(fake.open_iscsi.sessions().unwrap(), []);
    fake.put_session(1, "treeboot", INITIATOR, "LOGGED_IN");
    fake.put_session(2, "treeboot", INITIATOR, "FAILED");
    fake.put_session(3, "default", INITIATOR, "LOGGED_IN");
    fake.put_session(4, "treeboot", "iqn.2026-11.dev.treeboot:host:ab", "LOGGED_IN");
    fake.put_session(5, "treeboot2", INITIATOR, "LOGGED_IN");
    let sessions = fake.open_iscsi.sessions().unwrap();
    let seen: Vec<_> = sessions
        .iter()
        .map(|s| (s.sid, s.host, s.endpoint.clone(), s.state))
        .collect();
    assert_eq!(
        seen,
        [
            (1, 11, endpoint("10.0.0.1"), SessionState::LoggedIn),
            (2, 12, endpoint("[::1]"), SessionState::Failed),
        ]
    );
    let units = &sessions[0].units;
    assert_eq!(units.len(), 2, "{units:?}");
    let second = sessions[0].unit(1).unwrap();
    assert_eq!(
        second,
        &UnitDevice {
            lun: 1,
            name: "sdb".into(),
            major: 8,
            minor: 16,
            read_only: true,
            bytes: 1 << 20,
        }
    );
    assert_eq!(second.path(), Path::new("/dev/sdb"));
}

#[test]
fn a_session_that_is_there_is_not_made_again() {
    let fake = Fake::new("exit 99");
    fake.put_session(1, "treeboot", INITIATOR, "LOGGED_IN");
    fake.put_session(2, "treeboot", INITIATOR, "FREE");
    let open_iscsi = &fake.open_iscsi;
    assert_eq!(
        open_iscsi
            .login(&endpoint("10.0.0.1"), None, &[0, 1])
            .unwrap()
            .sid,
        1
    );
    // Its target is away: its devices are known all the same.
    let away = open_iscsi.login(&endpoint("[::1]"), None, &[0, 7]).unwrap();
    assert_eq!(
        (away.sid, away.state, away.units.len()),
        (2, SessionState::Free, 2)
    );
}

#[test]
fn every_documented_exit_code_has_a_meaning_and_a_failed_login_leaves_no_record() {
    for (code, meant) in [
        (15, None),
        (20, Some(ExitCode::NoDaemon)),
        (24, Some(ExitCode::Authentication)),
        (8, Some(ExitCode::TimedOut)),
        (12, Some(ExitCode::NoTransport)),
        (77, Some(ExitCode::Other(77))),
    ] {
        // `-o new` makes the record, `-o delete` removes it, a login fails.
        let fake = Fake::new(&format!(
            r#"cd "$(dirname "$0")"
               echo "$*" >> calls
               record=etc/nodes/iqn.2026-11.org.example:t/10.0.0.1,3260
               case "$*" in
               *"-m node"*"-o new") mkdir -p "$(dirname $record)"; echo "iface.iscsi_ifacename = treeboot" > $record ;;
               *"-o delete") rm $record ;;
               *--login) echo "said to people" >&2; exit {code} ;;
               esac"#
        ));
        let error = fake
            .open_iscsi
            .login(&endpoint("10.0.0.1"), Some(&chap()), &[0])
            .unwrap_err();
        match (&error, meant) {
            // It is there already, as iscsiadm says; but the kernel shows none.
            (OpenIscsiError::NoUnit { lun: 0, .. }, None) => {}
            (OpenIscsiError::Failed { code, said, .. }, Some(meant)) => {
                assert_eq!(*code, meant);
                assert_eq!(said, "said to people");
            }
            _ => panic!("{code}: {error}"),
        }
        assert!(!fake.open_iscsi.has_record(&endpoint("10.0.0.1")));
        let calls = fs::read_to_string(fake.folder.path().join("calls")).unwrap();
        assert!(!calls.contains("a secret"), "a secret on a command line: {calls}");
        assert!(
            calls.contains("node.session.timeo.replacement_timeout -v 1"),
            "{calls}"
        );
        assert!(
            calls.contains("iface.initiatorname -v iqn.2026-11.dev.treeboot:host:a"),
            "{calls}"
        );
    }
    let daemon = ExitCode::of(20).to_string();
    assert!(daemon.contains("systemctl start iscsid.socket"), "{daemon}");
}

#[test]
fn secrets_go_into_the_record_and_nowhere_else() {
    let fake = Fake::new("exit 0");
    let record = "etc/nodes/iqn.2026-11.org.example:t/10.0.0.1,3260";
    fake.put(
        record,
        "# BEGIN RECORD 2.1.8\niface.iscsi_ifacename = treeboot\nnode.session.auth.authmethod = CHAP\n\
         node.session.auth.password = an old one\nnode.session.auth.password_length = 10\n# END RECORD\n",
    );
    fake.open_iscsi
        .write_secrets(&endpoint("10.0.0.1"), Some(&chap()))
        .unwrap();
    let path = fake.folder.path().join(record);
    assert_eq!(
        fs::read_to_string(&path).unwrap(),
        "# BEGIN RECORD 2.1.8\niface.iscsi_ifacename = treeboot\nnode.session.auth.authmethod = CHAP\n\
         node.session.auth.password_length = 10\n\
         node.session.auth.username = me\nnode.session.auth.password = a secret = of mine\n\
         node.session.auth.username_in = you\nnode.session.auth.password_in = a secret of yours\n# END RECORD\n"
    );
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    // Nothing else is left beside the record.
    assert_eq!(fs::read_dir(fake.folder.path().join("etc")).unwrap().count(), 1);
    for bad in ["a secret with blanks ", "a secret\twith a tab"] {
        let chap = Chap::one_way(Credentials::new("me", Secret::new(bad).unwrap()).unwrap());
        let error = record::check(Some(&chap)).unwrap_err();
        assert!(!error.to_string().contains("a secret"), "{error}");
    }
}

#[test]
fn a_record_of_somebody_else_is_left_alone() {
    let fake = Fake::new("exit 99");
    let record = "etc/nodes/iqn.2026-11.org.example:t/10.0.0.1,3260";
    let text = "iface.iscsi_ifacename = default\n";
    fake.put(record, text);
    fake.put(
        "etc/ifaces/treeboot",
        "iface.transport_name = tcp\niface.initiatorname = iqn.2026-11.dev.treeboot:host:a\n",
    );
    let error = fake
        .open_iscsi
        .login(&endpoint("10.0.0.1"), None, &[0])
        .unwrap_err();
    assert!(matches!(error, OpenIscsiError::Stranger { .. }), "{error}");
    assert_eq!(fs::read_to_string(fake.folder.path().join(record)).unwrap(), text);
}

#[test]
fn a_call_that_hangs_is_killed_and_a_daemon_that_it_starts_is_not_waited_for() {
    let limit = Duration::from_millis(300);
    let run = |script: &str, limit| {
        let fake = Fake::new(script);
        let began = Instant::now();
        let done = run::run(&fake.open_iscsi.places.program, &["--version"], limit);
        (done, began.elapsed())
    };
    // The child of the shell holds the pipe open for as long as it runs.
    let (done, took) = run("echo begun >&2\nsleep 20 &\nwait", limit);
    assert!(matches!(done, Err(OpenIscsiError::Killed { .. })), "{done:?}");
    assert!(took < Duration::from_secs(5), "{took:?}");
    let (done, took) = run("sleep 20 &\nexit 0", Duration::from_secs(10));
    done.unwrap();
    assert!(took < Duration::from_secs(5), "{took:?}");
    // More than a pipe holds.
    let (done, _) = run(
        "head -c 300000 /dev/zero | tr '\\0' x >&2\necho the end >&2\nexit 6",
        Duration::from_secs(10),
    );
    let Err(OpenIscsiError::Failed { said, code, .. }) = done else {
        panic!("{done:?}");
    };
    assert_eq!(code, ExitCode::Database);
    assert!(said.ends_with("the end") && said.len() <= 401, "{said}");
    let missing = run::run(Path::new("/not/there/iscsiadm"), &[], limit).unwrap_err();
    assert!(
        missing.to_string().contains("apt-get install open-iscsi"),
        "{missing}"
    );
}

#[test]
fn a_machine_too_busy_to_start_iscsiadm_is_told_from_a_daemon_that_does_not_answer() {
    let mut fake = Fake::new("sleep 20");
    fake.put("sys/class/iscsi_transport/tcp", "");
    fake.open_iscsi.settings.start_limit = Duration::from_millis(100);
    let error = fake.open_iscsi.check().unwrap_err();
    assert!(matches!(error, OpenIscsiError::TooBusy { .. }), "{error}");
    assert!(error.to_string().contains("start the agent again"), "{error}");
}

#[test]
fn by_the_defaults_a_dead_parent_fails_within_five_seconds() {
    assert_eq!(Settings::default().fails_within(), Duration::from_secs(5));
}
