//! What nobody claims on real hosts, as a person meets it: `treeboot doctor` finds and explains it, and removes it after its grace period;
//! never where somebody did not answer.

use std::path::Path;
use std::process::Output;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use treeboot_tests::cluster::{Cluster, Plan};
use treeboot_tests::image::Pattern;
use treeboot_tests::need::{Need, require};
use treeboot_tests::wait::wait_until;

use crate::support::{Machine, with_cluster};

const IMAGE: &str = "pattern";
const PATTERN: Pattern = Pattern {
    seed: 5,
    bytes: 4 << 20,
};
const SOON: Duration = Duration::from_secs(60);
/// Something is left to mend.
const PARTLY: i32 = 6;

async fn doctor(cluster: &Cluster, host: &str, args: &[&str]) -> Result<(Output, Value)> {
    let all = [&["doctor", "--host", host, "--json"], args].concat();
    let output = cluster.treeboot_output(&all).await?;
    let said = serde_json::from_slice(&output.stdout).unwrap_or_default();
    Ok((output, said))
}

/// The condition of each thing of these kinds.
fn conditions(said: &Value, kinds: &[&str]) -> Vec<(String, String)> {
    let text = |finding: &Value, field: &str| finding[field].as_str().unwrap_or_default().to_owned();
    let findings = said["findings"].as_array().map(Vec::as_slice).unwrap_or_default();
    let of_kind = findings
        .iter()
        .filter(|finding| kinds.contains(&text(finding, "kind").as_str()));
    of_kind
        .map(|finding| (text(finding, "kind"), text(finding, "condition")))
        .collect()
}

fn owned(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    let owned = pairs
        .iter()
        .map(|(kind, condition)| ((*kind).into(), (*condition).into()));
    owned.collect()
}

/// As if it were changed at this moment.
fn touch(path: &Path) -> Result<()> {
    let new = path.with_extension("now");
    std::fs::write(&new, "")?;
    let now = std::fs::metadata(&new)?.modified()?;
    std::fs::remove_file(&new)?;
    let file = std::fs::OpenOptions::new().write(true).open(path)?;
    file.set_modified(now).with_context(|| path.display().to_string())
}

#[test]
fn a_vm_that_the_journal_lost_is_left_alone_until_it_is_surely_nobodys() -> Result<()> {
    if !require(&[Need::Program("qemu-system-x86_64", "qemu-system-x86")]) {
        return Ok(());
    }
    with_cluster("orphans", Machine::Shared, Plan::default(), async |cluster| {
        let file = cluster.path().join("pattern.raw");
        PATTERN.write(&file)?;
        cluster.import(&file, IMAGE).await?;
        lost_vm(cluster).await?;
        silent_host(cluster).await?;
        record_without_a_host(cluster).await
    })
}

async fn lost_vm(cluster: &Cluster) -> Result<()> {
    let host = &cluster.hosts[0];
    let start = [
        "vm",
        "start",
        "web-1",
        "--image",
        IMAGE,
        "--host",
        host.name(),
        "--json",
    ];
    let started: Value = serde_json::from_str(&cluster.treeboot(&start).await?)?;
    let pid = started["pid"].as_u64().context("no pid")?;
    // An ended process whose parent does not ask has no command line any more.
    let qemu_runs = || std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty());
    let state = host.folder().join("state");
    let (delta, run) = (state.join("deltas/web-1.delta"), state.join("vms/web-1"));
    host.kill()?;
    std::fs::remove_file(state.join("journal"))?;
    host.start(cluster.scratch()).await?;
    cluster.wait_known().await?;

    // The journal may have forgotten the VM: nobody says that it is nobody's, however often and whatever is asked for.
    let kinds = ["run", "delta"];
    for _ in 0..2 {
        let (_, said) = doctor(cluster, host.name(), &["--fix", "--grace", "1ms"]).await?;
        let doubted = owned(&[("run", "unknown"), ("delta", "unknown")]);
        let mut found = conditions(&said, &kinds);
        found.sort_by(|a, b| b.cmp(a));
        ensure!(found == doubted, "{said:#}");
    }
    ensure!(delta.exists() && run.exists() && qemu_runs());

    // As if they were younger than the journal.
    touch(&delta)?;
    touch(&run.join("vm.json"))?;
    let (output, said) = doctor(cluster, host.name(), &["--fix"]).await?;
    ensure!(output.status.code() == Some(PARTLY), "{said:#}");
    ensure!(
        conditions(&said, &["run"]) == owned(&[("run", "orphaned")]),
        "{said:#}"
    );
    ensure!(delta.exists() && run.exists() && qemu_runs());
    // The QEMU goes first, and the grace period of what it wrote begins with that.
    let cleaned = wait_until(SOON, "the VM to be removed", || async {
        let (output, said) = doctor(cluster, host.name(), &["--fix", "--grace", "10ms"]).await?;
        Ok((output.status.success() && conditions(&said, &kinds).is_empty()).then_some(()))
    });
    cleaned.await?;
    ensure!(!delta.exists() && !run.exists() && !qemu_runs());
    Ok(())
}

/// Of a host that does not answer nothing is said.
async fn silent_host(cluster: &Cluster) -> Result<()> {
    let host = &cluster.hosts[0];
    host.freeze()?;
    let asked = cluster.treeboot_output(&["doctor", "--json", "--timeout", "1s", "--fix", "--grace", "1ms"]);
    let asked = asked.await;
    host.thaw()?;
    let output = asked?;
    let said: Value = serde_json::from_slice(&output.stdout)?;
    ensure!(output.status.code() == Some(PARTLY), "{said:#}");
    let findings = said["findings"].as_array().context("no findings")?;
    ensure!(findings.iter().all(|it| it["host"] != host.name()), "{said:#}");
    ensure!(said["failures"].to_string().contains(host.name()), "{said:#}");
    Ok(())
}

/// The origin lost its store; its image's record is in vain.
async fn record_without_a_host(cluster: &Cluster) -> Result<()> {
    let origin = &cluster.origin;
    let state = origin.folder().join("state");
    let record = async |fix: &[&str]| {
        let (output, said) = doctor(cluster, origin.name(), fix).await?;
        anyhow::Ok((output, conditions(&said, &["record"]), said))
    };
    let (_, there, said) = record(&["--fix", "--grace", "1ms"]).await?;
    ensure!(there.is_empty(), "{said:#}");
    origin.kill()?;
    std::fs::remove_file(state.join("journal"))?;
    let store = origin.folder().join("store");
    std::fs::remove_dir_all(&store)?;
    origin.start(cluster.scratch()).await?;
    cluster.wait_known().await?;
    let (output, there, said) = record(&["--fix"]).await?;
    ensure!(there == owned(&[("record", "orphaned")]), "{said:#}");
    ensure!(output.status.code() == Some(PARTLY), "{said:#}");
    let images = async || cluster.treeboot(&["image", "list", "--json"]).await;
    ensure!(images().await?.contains(IMAGE));
    let removed = wait_until(SOON, "the record to be removed", || async {
        let (output, there, _) = record(&["--fix", "--grace", "10ms"]).await?;
        Ok((output.status.success() && there.is_empty()).then_some(()))
    });
    removed.await?;
    ensure!(!images().await?.contains(IMAGE));
    Ok(())
}
