//! Exports that change while they are in use.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use treeboot_iscsi::lio::Outcome;
use treeboot_iscsi::open_iscsi::{OpenIscsi, SessionState, Settings};
use treeboot_iscsi::target::Access;
use treeboot_types::Iqn;

use super::bench::{self, Bench, chap, is, wait};

fn list(of: &[&OpenIscsi]) -> Access {
    Access::Initiators(of.iter().map(|initiator| initiator.initiator().clone()).collect())
}

fn another() -> Result<OpenIscsi> {
    Ok(OpenIscsi::new(&"another-host".parse()?, Settings::default()))
}

pub(crate) fn changes_while_in_use() -> Result<()> {
    let bench = Bench::new("changes")?;
    let (data, hashes, whole) = bench.wanted(false, list(&[&bench.initiator]));
    let mut export = whole.clone();
    export.luns.truncate(1);
    export.portals.truncate(1);
    bench.build(&data, &hashes, &export)?;
    let session = bench.initiator.login(&bench.endpoint(), None, &[0])?;
    ensure!(session.units.len() == 1, "{session:?}");
    let sid = session.sid;
    let is_kept = |luns: usize| -> Result<()> {
        let now = bench
            .initiator
            .session(&bench.endpoint())?
            .context("the session")?;
        ensure!(now.sid == sid && now.state == SessionState::LoggedIn, "{now:?}");
        ensure!(now.units.len() == luns, "{now:?}");
        Ok(())
    };
    // A LUN, a portal and an initiator more, while the session goes on.
    let other = another()?;
    export = whole.clone();
    export.access = list(&[&bench.initiator, &other]);
    is(bench.lio.ensure_target(&export)?, Outcome::Changed)?;
    bench.initiator.rescan(&session)?;
    wait("LUN 1", || {
        let now = bench.initiator.session(&bench.endpoint())?;
        Ok(now.filter(|session| {
            session
                .unit(1)
                .is_some_and(|unit| unit.bytes == bench.hashes.len() as u64)
        }))
    })?;
    is_kept(2)?;
    // The interface record now has the other's name; our session goes on under its own.
    other.login(&bench.endpoint_6(), None, &[0, 1])?;
    let found = bench.lio.found()?.targets.pop().context("the target")?;
    ensure!(found.sessions.len() == 2, "{found:?}");
    // The other one has to go; ours stays.
    export.access = list(&[&bench.initiator]);
    is(bench.lio.ensure_target(&export)?, Outcome::Changed)?;
    wait("the other's session to end", || {
        let found = bench.lio.found()?.targets.pop().context("the target")?;
        Ok((found.sessions == [bench.initiator.initiator().clone()]).then_some(()))
    })?;
    is_kept(2)?;
    other.logout(&bench.endpoint_6())?;
    // A LUN fewer.
    export.luns.truncate(1);
    is(bench.lio.ensure_target(&export)?, Outcome::Changed)?;
    is(bench.lio.remove_backstore(&hashes.name)?, Outcome::Changed)?;
    let unit = session.unit(0).context("LUN 0")?;
    bench::wait_for_node(unit)?;
    bench::expect(&bench::read_all(&unit.path())?, &bench.data)?;
    // A backstore shared by two images' targets.
    let mut second = export.clone();
    second.name = Iqn::of_image(&"second-name@1".parse()?);
    is(bench.lio.ensure_target(&second)?, Outcome::Created)?;
    let mut endpoint = bench.endpoint();
    endpoint.target = second.name.clone();
    let session = bench.initiator.login(&endpoint, None, &[0])?;
    let unit = session.unit(0).context("LUN 0")?;
    bench::wait_for_node(unit)?;
    bench::expect(&bench::read_all(&unit.path())?, &bench.data)?;
    bench.initiator.logout(&endpoint)?;
    is(
        bench.lio.remove_target(&second.name, Duration::ZERO)?,
        Outcome::Changed,
    )?;
    is_kept(2)?;
    bench.end()
}

pub(crate) fn who_was_once_let_in_is_not_for_ever() -> Result<()> {
    let bench = Bench::new("once")?;
    let (data, hashes, mut export) = bench.wanted(false, Access::Anyone);
    bench.build(&data, &hashes, &export)?;
    let other = another()?;
    let session = other.login(&bench.endpoint(), None, &[0, 1])?;
    for unit in &session.units {
        ensure!(unit.read_only, "{unit:?} can be written by anybody");
    }
    let found = bench.lio.found()?.targets.pop().context("the target")?;
    ensure!(
        found.anyone && found.sessions == [other.initiator().clone()],
        "{found:?}"
    );
    export.access = list(&[&bench.initiator]);
    is(bench.lio.ensure_target(&export)?, Outcome::Changed)?;
    wait("the session to end", || {
        let session = other.session(&bench.endpoint())?.context("the session")?;
        Ok((session.state != SessionState::LoggedIn).then_some(()))
    })?;
    other.forget_all()?;
    ensure!(
        other.login(&bench.endpoint(), None, &[0]).is_err(),
        "it was let in again"
    );
    bench.initiator.login(&bench.endpoint(), None, &[0, 1])?;
    bench.end()
}

pub(crate) fn a_new_secret_ends_old_sessions() -> Result<()> {
    let bench = Bench::new("secret")?;
    let name = bench.initiator.initiator().clone();
    for each in [true, false] {
        let access = |chap| {
            if each {
                Access::Each([(name.clone(), Some(chap))].into())
            } else {
                Access::Secret(chap)
            }
        };
        bench.export(false, access(chap()?))?;
        bench
            .initiator
            .login(&bench.endpoint(), Some(&chap()?), &[0, 1])?;
        let new = bench::chap_of("another secret altogether", bench::TARGET_SECRET)?;
        bench.export(false, access(new.clone()))?;
        wait("the session to end", || {
            let session = bench
                .initiator
                .session(&bench.endpoint())?
                .context("the session")?;
            Ok((session.state != SessionState::LoggedIn).then_some(()))
        })?;
        bench.initiator.logout(&bench.endpoint())?;
        ensure!(
            bench
                .initiator
                .login(&bench.endpoint(), Some(&chap()?), &[0])
                .is_err(),
            "the old secret still works"
        );
        bench.initiator.login(&bench.endpoint(), Some(&new), &[0, 1])?;
        bench.initiator.logout(&bench.endpoint())?;
    }
    bench.end()
}
