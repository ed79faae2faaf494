//! LIO and open-iscsi on a real kernel, over loopback in one guest.

mod bench;
mod changes;
mod faults;
mod strangers;

use std::collections::BTreeSet;
use std::io;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bench::{Bench, SECRET, TARGET_SECRET, chap, expect};
use treeboot_iscsi::initiator::{RemoteDevice, SessionOptions};
use treeboot_iscsi::lio::{Lio, LioError, Outcome};
use treeboot_iscsi::login::Chap;
use treeboot_iscsi::open_iscsi::{ExitCode, OpenIscsi, OpenIscsiError, SessionState, Settings};
use treeboot_iscsi::target::Access;

use crate::Group;

pub(crate) const GROUP: Group = Group {
    name: "iscsi",
    cases: &[
        // First, because the others load what is missing.
        ("what-is-missing-is-named", what_is_missing_is_named),
        (
            "every-initiator-reads-every-export",
            every_initiator_reads_every_export,
        ),
        ("writes-go-where-they-may", writes_go_where_they_may),
        ("who-may-not-log-in-is-refused", who_may_not_log_in_is_refused),
        (
            "wanting-it-twice-changes-nothing",
            wanting_it_twice_changes_nothing,
        ),
        ("a-restart-finds-all", a_restart_finds_all),
        ("changes-while-in-use", changes::changes_while_in_use),
        (
            "who-was-once-let-in-is-not-for-ever",
            changes::who_was_once_let_in_is_not_for_ever,
        ),
        (
            "a-new-secret-ends-old-sessions",
            changes::a_new_secret_ends_old_sessions,
        ),
        ("strangers-are-left-alone", strangers::strangers_are_left_alone),
        ("removal-drains", faults::removal_drains),
        (
            "removal-ends-who-does-not-leave",
            faults::removal_ends_who_does_not_leave,
        ),
        ("fail-at-every-step", faults::fail_at_every_step),
        ("killed-at-every-step", faults::killed_at_every_step),
        (
            "a-dead-parent-fails-within-seconds",
            faults::a_dead_parent_fails_within_seconds,
        ),
        (
            "a-silent-parent-fails-within-seconds",
            faults::a_silent_parent_fails_within_seconds,
        ),
        (
            "iscsid-restarts-under-a-session",
            faults::iscsid_restarts_under_a_session,
        ),
    ],
    helpers: &[
        ("serve", bench::serve),
        ("build", faults::build_until),
        ("remove", faults::remove_until),
    ],
    // Each case clears its bench itself, and shows that nothing is left.
    sweep: || {},
};

fn what_is_missing_is_named() -> Result<()> {
    let lio = Lio::default();
    let sessions = OpenIscsi::new(&"case-host".parse()?, Settings::default());
    if bench::is_prepared() {
        // Somebody loaded all of it before; the rest can be seen all the same.
        lio.check()?;
    } else {
        let error = lio.check().err().context("LIO is said to be there")?;
        ensure!(matches!(error, LioError::NoConfigfs { .. }), "{error}");
        ensure!(error.to_string().contains("mount -t configfs"), "{error}");
        ensure!(lio.found()?.targets.is_empty());
        bench::mount_configfs()?;
        let error = lio.check().err().context("LIO is said to be there")?;
        ensure!(error.to_string().contains("modprobe target_core_mod"), "{error}");
        let error = sessions.check().err().context("iscsi_tcp is said to be there")?;
        ensure!(error.to_string().contains("modprobe iscsi_tcp"), "{error}");
        ensure!(sessions.sessions()?.is_empty());
    }
    bench::load_modules()?;
    lio.check()?;
    sessions.check()?;
    // A device that is not there, and one that somebody else holds, are named with the kernel's reason.
    let bench = Bench::new("missing")?;
    let mut data = bench.block_backstore(false);
    bench.detach_loop()?;
    data.backing = treeboot_iscsi::lio::Backing::Block {
        path: "/dev/not-there".into(),
    };
    let error = lio
        .ensure_backstore(&data)
        .err()
        .context("a device that is not there")?;
    let text = format!("{:#}", anyhow::Error::from(error));
    ensure!(
        text.contains("/dev/not-there") && text.contains("No such file"),
        "{text}"
    );
    if !bench::iscsid_runs() {
        let error = bench.initiator.login(&bench.endpoint(), None, &[0]);
        let error = error.err().context("a login without iscsid")?;
        ensure!(
            matches!(
                error,
                OpenIscsiError::Failed {
                    code: ExitCode::NoDaemon,
                    ..
                }
            ),
            "{error}"
        );
        ensure!(
            error.to_string().contains("systemctl start iscsid.socket"),
            "{error}"
        );
    }
    bench.end()
}

fn every_initiator_reads_every_export() -> Result<()> {
    let bench = Bench::new("reads")?;
    bench.export(
        false,
        Access::Each([(bench.initiator.initiator().clone(), Some(chap()?))].into()),
    )?;
    for endpoint in [bench.endpoint(), bench.endpoint_6()] {
        // The kernel's initiator.
        let session = bench.initiator.login(&endpoint, Some(&chap()?), &[0, 1])?;
        ensure!(session.state == SessionState::LoggedIn);
        ensure!(session.endpoint == endpoint);
        for (lun, bytes) in [(0, &bench.data), (1, &bench.hashes)] {
            let unit = session.unit(lun).context("a LUN")?;
            ensure!(unit.read_only, "LUN {lun} is writable");
            ensure!(
                unit.bytes == bytes.len() as u64,
                "LUN {lun} has {} bytes",
                unit.bytes
            );
            bench::wait_for_node(unit)?;
            expect(&bench::read_all(&unit.path())?, bytes)?;
        }
        // Ours, on the kernel's target.
        let mut options = SessionOptions::new(
            endpoint.portal.to_string(),
            endpoint.target.clone(),
            bench.initiator.initiator().clone(),
        );
        options.chap = Some(chap()?);
        for (lun, bytes) in [(0, &bench.data), (1, &bench.hashes)] {
            expect(&bench::read_remote(options.clone(), lun)?, bytes)?;
        }
        let counters = bench.lio.counters(&endpoint.target)?.context("counters")?;
        let mine = &counters.sessions;
        ensure!(!mine.is_empty() && counters.session_count >= 1, "{counters:?}");
        let read: u64 = mine.iter().map(|session| session.read_bytes).sum();
        ensure!(read > 0, "{counters:?}");
        bench.initiator.logout(&endpoint)?;
        ensure!(bench.initiator.sessions()?.is_empty());
    }
    let counters = bench.lio.counters(&bench.target)?.context("counters")?;
    let data = counters.luns.first().context("LUN 0")?;
    let mib = (bench.data.len() >> 20) as u64;
    // Four times the whole: two initiators over two portals. Probing reads a little more.
    ensure!((4 * mib..=5 * mib).contains(&data.read_mib), "{counters:?}");
    bench.end()
}

fn writes_go_where_they_may() -> Result<()> {
    let bench = Bench::new("writes")?;
    let name = bench.initiator.initiator().clone();
    bench.export(true, Access::Initiators(BTreeSet::from([name.clone()])))?;
    let session = bench.initiator.login(&bench.endpoint(), None, &[0, 1])?;
    for lun in [0, 1] {
        let unit = session.unit(lun).context("a LUN")?;
        ensure!(!unit.read_only, "LUN {lun} is write-protected");
        bench::wait_for_node(unit)?;
        bench::write_at(&unit.path(), 8192, &[7; 4096])?;
        let file = bench::read_all(bench.file(lun))?;
        ensure!(
            file.get(8192..12288) == Some(&[7; 4096][..]),
            "LUN {lun}: the file does not hold it"
        );
    }
    bench.initiator.logout(&bench.endpoint())?;
    // The same backstores, opened for reading only.
    bench.remove()?;
    bench.export(false, Access::Initiators(BTreeSet::from([name.clone()])))?;
    let session = bench.initiator.login(&bench.endpoint(), None, &[0, 1])?;
    for lun in [0, 1] {
        let unit = session.unit(lun).context("a LUN")?;
        bench::wait_for_node(unit)?;
        let error = bench::write_at(&unit.path(), 0, &[9; 4096])
            .err()
            .context("it was written")?;
        let error = error.downcast::<io::Error>()?;
        ensure!(matches!(error.raw_os_error(), Some(1 | 13 | 30)), "{error}");
    }
    // Whoever does not ask first is refused as well.
    let options = SessionOptions::new(bench.endpoint().portal.to_string(), bench.target.clone(), name);
    for lun in [0, 1] {
        let refused = bench::block_on(async {
            let device = RemoteDevice::connect(options.clone(), lun).await?;
            Ok(device.session().write(lun, 0, vec![9; 512].into()).await.err())
        })?;
        ensure!(refused.is_some(), "LUN {lun} was written");
    }
    bench.end()
}

fn who_may_not_log_in_is_refused() -> Result<()> {
    let bench = Bench::new("refused")?;
    let name = bench.initiator.initiator().clone();
    let refused = |initiator: &OpenIscsi, chap: Option<&Chap>| -> Result<()> {
        let error = initiator
            .login(&bench.endpoint(), chap, &[0])
            .err()
            .context("it was let in")?;
        ensure!(
            matches!(
                error,
                OpenIscsiError::Failed {
                    code: ExitCode::Authentication,
                    ..
                }
            ),
            "{error}"
        );
        ensure!(!error.to_string().contains(SECRET), "the error tells the secret");
        ensure!(initiator.sessions()?.is_empty() && !initiator.has_record(&bench.endpoint()));
        Ok(())
    };
    bench.export(false, Access::Each([(name, Some(chap()?))].into()))?;
    let other = OpenIscsi::new(&"another-host".parse()?, Settings::default());
    refused(&other, Some(&chap()?)).context("an initiator that is not on the list")?;
    refused(&bench.initiator, None).context("without a secret")?;
    let wrong = bench::chap_of("not-the-right-secret", TARGET_SECRET)?;
    refused(&bench.initiator, Some(&wrong)).context("with a wrong secret")?;
    // A target that cannot prove itself is refused by the initiator.
    let wrong = bench::chap_of(SECRET, "not-the-targets-secret")?;
    let error = bench.initiator.login(&bench.endpoint(), Some(&wrong), &[0]);
    ensure!(error.is_err(), "a target without proof was believed");
    // And still: the right one gets in.
    bench
        .initiator
        .login(&bench.endpoint(), Some(&chap()?), &[0, 1])?;
    bench.end()
}

fn wanting_it_twice_changes_nothing() -> Result<()> {
    let bench = Bench::new("twice")?;
    for access in [
        Access::Anyone,
        Access::Secret(chap()?),
        Access::Initiators(BTreeSet::from([bench.initiator.initiator().clone()])),
        Access::Each([(bench.initiator.initiator().clone(), Some(chap()?))].into()),
    ] {
        let (data, hashes, export) = bench.wanted(false, access);
        for _ in 0..2 {
            bench.lio.ensure_backstore(&data)?;
            bench.lio.ensure_backstore(&hashes)?;
            bench.lio.ensure_target(&export)?;
        }
        let before = bench.lio.steps();
        ensure!(bench.lio.ensure_backstore(&data)? == Outcome::Identity);
        ensure!(bench.lio.ensure_backstore(&hashes)? == Outcome::Identity);
        ensure!(
            bench.lio.ensure_target(&export)? == Outcome::Identity,
            "{:?}",
            export.access
        );
        ensure!(bench.lio.steps() == before);
        let error = bench
            .lio
            .remove_backstore(&data.name)
            .err()
            .context("a backstore in use")?;
        ensure!(matches!(error, LioError::InUse { .. }), "{error}");
    }
    // A backstore that was taken away and comes back with another size is opened anew.
    bench.remove()?;
    ensure!(bench.lio.remove_target(&bench.target, Duration::ZERO)? == Outcome::Identity);
    bench.end()
}

fn a_restart_finds_all() -> Result<()> {
    let bench = Bench::new("restart")?;
    let name = bench.initiator.initiator().clone();
    let access = Access::Initiators(BTreeSet::from([name.clone()]));
    let (data, hashes, export) = bench.wanted(false, access);
    bench.build(&data, &hashes, &export)?;
    let session = bench.initiator.login(&bench.endpoint(), None, &[0, 1])?;
    // As a process that knows nothing would see it.
    let found = Lio::default().found()?;
    let [target] = &found.targets[..] else {
        anyhow::bail!("{found:?}");
    };
    ensure!(
        target.name == export.name && target.enabled && !target.anyone,
        "{target:?}"
    );
    ensure!(
        target.portals.iter().collect::<BTreeSet<_>>() == export.portals.iter().collect(),
        "{target:?}"
    );
    let luns: Vec<_> = target
        .luns
        .iter()
        .map(|lun| (lun.lun, lun.backstore.clone()))
        .collect();
    let wanted: Vec<_> = export
        .luns
        .iter()
        .map(|(lun, name)| (*lun, Some(name.clone())))
        .collect();
    ensure!(luns == wanted, "{target:?}");
    ensure!(target.initiators == BTreeSet::from([name.clone()]), "{target:?}");
    ensure!(target.sessions == [name], "{target:?}");
    for (found, wanted) in found.backstores.iter().zip([&data, &hashes]) {
        ensure!(
            found.name == wanted.name && found.backing.as_ref() == Some(&wanted.backing),
            "{found:?}"
        );
    }
    ensure!(found.backstores.len() == 2 && !found.backstores[0].writable);
    let again = OpenIscsi::new(&bench::HOST.parse()?, Settings::default());
    ensure!(again.sessions()? == std::slice::from_ref(&session));
    ensure!(
        again.login(&bench.endpoint(), None, &[0, 1])? == session,
        "another session was made"
    );
    bench.end()
}
