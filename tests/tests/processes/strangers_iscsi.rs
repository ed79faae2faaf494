//! What a stranger tries at the iSCSI portals of a cluster that has an authority: refused with a clear reason, and logged.

use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use treeboot_iscsi::initiator::{Session, SessionOptions};
use treeboot_iscsi::login::{Chap, Credentials, Secret};
use treeboot_proto::v1;
use treeboot_tests::cluster::{Cluster, Plan};
use treeboot_tests::daemon::Daemon;
use treeboot_tests::image::Pattern;
use treeboot_tests::measure::newest;
use treeboot_tests::reader;
use treeboot_tests::wait::wait_until;
use treeboot_types::{HostName, Iqn, IscsiUrl};

use crate::support::{Machine, with_cluster};

const IMAGE: &str = "pattern";
const PATTERN: Pattern = Pattern {
    seed: 37,
    bytes: 4 << 20,
};
const SOON: Duration = Duration::from_secs(60);

/// A chain: the origin feeds h1, h1 feeds h2.
fn chain(hosts: usize) -> Plan {
    Plan {
        hosts,
        fan_out: Some(1),
        secure: true,
        ..Plan::default()
    }
}

async fn attach_all(cluster: &Cluster) -> Result<()> {
    let file = cluster.path().join("pattern.raw");
    PATTERN.write(&file)?;
    cluster.import(&file, IMAGE).await?;
    // One after the other, so that each is the next one's parent.
    for host in &cluster.hosts {
        cluster
            .treeboot(&["image", "attach", IMAGE, "--host", host.name()])
            .await?;
    }
    Ok(())
}

fn initiator(host: &str) -> Result<Iqn> {
    Ok(Iqn::of_host(&HostName::new(host)?))
}

fn secret(text: &str, user: &Iqn) -> Result<Chap> {
    let secret = Secret::new(text)?;
    Ok(Chap::one_way(Credentials::new(user.as_str(), secret)?))
}

/// Tries to log in at a host's export of the image; gives the refusal's words.
async fn refused_at(daemon: &Daemon, initiator: &Iqn, chap: Option<Chap>) -> Result<String> {
    let target = Iqn::of_image(&format!("{IMAGE}@1").parse()?);
    let mut options = SessionOptions::new(daemon.portal()?, target, initiator.clone());
    options.chap = chap;
    match Session::connect(options).await {
        Ok(_) => bail!("{initiator} was let in at {}", daemon.name()),
        Err(error) => Ok(format!("{:#}", anyhow::Error::from(error))),
    }
}

async fn logged(daemon: &Daemon, words: &[&str]) -> Result<()> {
    let what = format!("a line in {}'s log with {words:?}", daemon.name());
    wait_until(SOON, &what, async || {
        let log = std::fs::read_to_string(daemon.log_path())?;
        let found = log
            .lines()
            .any(|line| line.contains("WARN") && words.iter().all(|word| line.contains(word)));
        Ok(found.then_some(()))
    })
    .await
}

/// Secrets that a host holds, as its file has them.
fn held(daemon: &Daemon) -> Result<serde_json::Value> {
    let path = daemon.folder().join("state/secrets.json");
    let mode = std::fs::metadata(&path)?.permissions().mode();
    ensure!(
        mode & 0o777 == 0o600,
        "the mode of {} is {mode:o}",
        path.display()
    );
    Ok(serde_json::from_slice(&std::fs::read(path)?)?)
}

/// Every text of 32 hexadecimal digits or more in a value: secrets and keys.
fn secrets(value: &serde_json::Value) -> Vec<String> {
    match value {
        serde_json::Value::String(text)
            if text.len() >= 32 && text.bytes().all(|b| b.is_ascii_hexdigit()) =>
        {
            vec![text.clone()]
        }
        serde_json::Value::Array(values) => values.iter().flat_map(secrets).collect(),
        serde_json::Value::Object(map) => map.values().flat_map(secrets).collect(),
        _ => Vec::new(),
    }
}

#[test]
fn nobody_attaches_to_a_hosts_portal_without_the_secret_of_the_edge() -> Result<()> {
    with_cluster("edges", Machine::Shared, chain(2), async |cluster| {
        attach_all(cluster).await?;
        let (h1, h2) = (&cluster.hosts[0], &cluster.hosts[1]);
        // Who is no child, whatever it brings; an origin has no list, and asks everybody for a secret.
        let eve = Iqn::new("iqn.2020-01.org.example:eve")?;
        for daemon in [h1, h2] {
            let said = refused_at(daemon, &eve, None).await?;
            ensure!(said.contains("not allowed") || said.contains("0x0202"), "{said}");
            logged(daemon, &["no login", "access list", "eve"]).await?;
        }
        refused_at(&cluster.origin, &eve, None).await?;
        logged(&cluster.origin, &["no login", "eve"]).await?;
        // A child's name without its secret, and with another.
        let child = initiator("h2")?;
        for daemon in [h1, &cluster.origin] {
            let said = refused_at(daemon, &child, None).await?;
            ensure!(said.contains("authenti"), "{said}");
            logged(daemon, &["host:h2", "authentication"]).await?;
            let guessed = secret("0123456789abcdef0123456789abcdef", &child)?;
            let said = refused_at(daemon, &child, Some(guessed)).await?;
            ensure!(said.contains("authenti"), "{said}");
            logged(daemon, &["authentication failed", "host:h2"]).await?;
        }
        // The secret of one edge opens no other: h2's for h1 is not h2's for the origin.
        let own = held(h2)?;
        let target = format!("{}", Iqn::of_image(&format!("{IMAGE}@1").parse()?));
        let for_h1 = own["parents"][&target]["h1"]["secret"]
            .as_str()
            .context("h2 has a secret for h1")?;
        let for_origin = own["parents"][&target]["origin"]["secret"]
            .as_str()
            .context("h2 has a secret for the origin, its last fallback")?;
        ensure!(for_h1 != for_origin, "two edges have one secret");
        refused_at(&cluster.origin, &child, Some(secret(for_h1, &child)?)).await?;
        let (other, chap) = (initiator("h1")?, secret(for_origin, &initiator("h1")?)?);
        refused_at(&cluster.origin, &other, Some(chap)).await?;
        // And with the right one the door opens.
        let mut options = SessionOptions::new(cluster.origin.portal()?, Iqn::new(&target)?, child.clone());
        options.chap = Some(secret(for_origin, &child)?);
        Session::connect(options).await?.close().await;
        // Nowhere else do secrets stand: logs, journals, what people are shown.
        let mut all = secrets(&own);
        all.extend(secrets(&held(h1)?));
        all.extend(secrets(&held(&cluster.origin)?));
        ensure!(all.len() >= 5, "{}", all.len());
        let status = cluster.treeboot(&["host", "list", "--json"]).await?;
        let tree = cluster.treeboot(&["tree", IMAGE, "--json"]).await?;
        let mut shown = vec![status, tree];
        for daemon in cluster.agents().chain([&cluster.coordinator]) {
            shown.push(std::fs::read_to_string(daemon.log_path())?);
        }
        for daemon in cluster.agents() {
            for entry in std::fs::read_dir(daemon.folder().join("state"))? {
                let entry = entry?;
                if entry.file_type()?.is_file() && entry.file_name() != "secrets.json" {
                    shown.push(String::from_utf8_lossy(&std::fs::read(entry.path())?).into_owned());
                }
            }
        }
        ensure!(
            !shown.iter().any(|text| all.iter().any(|s| text.contains(s))),
            "a secret is shown"
        );
        Ok(())
    })
}

#[test]
fn a_coordinator_that_restarts_gives_the_same_secrets_and_new_ones_end_no_session() -> Result<()> {
    with_cluster("edge-keys", Machine::Shared, chain(2), async |cluster| {
        attach_all(cluster).await?;
        let (h1, h2) = (&cluster.hosts[0], &cluster.hosts[1]);
        let before = held(h2)?;
        cluster.coordinator.kill()?;
        cluster.restart(&cluster.coordinator).await?;
        cluster.wait_known().await?;
        ensure!(
            held(h2)? == before,
            "the secrets changed with the coordinator's restart"
        );
        // A host that restarts while its coordinator is away reads on, by what it kept.
        cluster.coordinator.kill()?;
        h2.terminate().await?;
        cluster.restart(h2).await?;
        cluster.restart(&cluster.coordinator).await?;
        cluster.wait_known().await?;
        let (session, lun) = reader::log_in(h2, IMAGE, "vm1").await?;
        reader::read_whole(&session, lun, PATTERN).await?;
        // The coordinator's key is lost: everybody gets new secrets, and nobody's session ends.
        cluster.coordinator.kill()?;
        std::fs::remove_file(cluster.coordinator_state().join("identity/edges.key"))?;
        cluster.restart(&cluster.coordinator).await?;
        cluster.wait_known().await?;
        wait_until(SOON, "the new keys", async || {
            Ok(
                (held(h1)?["exports"] != before["exports"] && held(h2)?["exports"] != before["exports"])
                    .then_some(()),
            )
        })
        .await?;
        reader::read_whole(&session, lun, PATTERN).await?;
        for daemon in [h1, &cluster.origin] {
            let log = std::fs::read_to_string(daemon.log_path())?;
            ensure!(!log.contains("access was withdrawn"), "{}: {log}", daemon.name());
        }
        // Who logs in from now on does so by the new ones.
        let child = initiator("h2")?;
        let target = Iqn::of_image(&format!("{IMAGE}@1").parse()?);
        let of = |held: &serde_json::Value| -> Result<Chap> {
            let text = held["parents"][target.as_str()]["h1"]["secret"].as_str();
            secret(text.context("a secret for h1")?, &child)
        };
        wait_until(SOON, "h2's new secret for h1", async || {
            Ok((of(&held(h2)?)? != of(&before)?).then_some(()))
        })
        .await?;
        refused_at(h1, &child, Some(of(&before)?)).await?;
        let mut options = SessionOptions::new(h1.portal()?, target.clone(), child.clone());
        options.chap = Some(of(&held(h2)?)?);
        Session::connect(options).await?.close().await;
        session.close().await;
        Ok(())
    })
}

/// A VM's disk on a host: where it is, and what its front end proves itself by.
struct VmDisk {
    url: IscsiUrl,
    initiator: Iqn,
    chap: Option<Chap>,
}

async fn create(daemon: &Daemon, vm: &str) -> Result<VmDisk> {
    let request = v1::CreateRequest {
        vm: vm.into(),
        image: Some(newest(IMAGE)),
        device: false,
        limit_bytes: None,
    };
    let answer = daemon.agent().await?.create(request).await?.into_inner();
    let disk = answer.disk.context("a disk")?;
    let initiator = Iqn::new(&disk.initiator)?;
    ensure!(disk.chap == answer.secret.is_some(), "{disk:?}");
    let chap = answer
        .secret
        .map(|given| -> Result<Chap> {
            let credentials = Credentials::new(given.user, Secret::new(given.secret)?)?;
            Ok(Chap::one_way(credentials))
        })
        .transpose()?;
    Ok(VmDisk {
        url: disk.url.parse()?,
        initiator,
        chap,
    })
}

impl VmDisk {
    async fn connect(&self, initiator: &Iqn, chap: Option<Chap>) -> Result<Session, String> {
        let mut options = SessionOptions::new(self.url.portal(), self.url.target.clone(), initiator.clone());
        options.chap = chap;
        let session = Session::connect(options).await;
        session.map_err(|error| format!("{:#}", anyhow::Error::from(error)))
    }

    async fn refuses(&self, initiator: &Iqn, chap: Option<Chap>) -> Result<String> {
        match self.connect(initiator, chap).await {
            Ok(_) => bail!("{initiator} was let in at {}", self.url),
            Err(why) => Ok(why),
        }
    }
}

#[test]
fn a_vms_disk_is_for_that_vms_initiator_only() -> Result<()> {
    let plan = Plan {
        hosts: 1,
        secure: true,
        ..Plan::default()
    };
    with_cluster("vm-disks", Machine::Shared, plan, async |cluster| {
        attach_all(cluster).await?;
        let host = &cluster.hosts[0];
        let (own, other) = (create(host, "vm1").await?, create(host, "vm2").await?);
        // Another VM's initiator, with its own secret; a host's; a foreign one.
        for initiator in [
            other.initiator.clone(),
            initiator("h1")?,
            Iqn::new("iqn.2020-01.org.example:eve")?,
        ] {
            for chap in [None, other.chap.clone()] {
                own.refuses(&initiator, chap).await?;
            }
            logged(host, &["no login", "access list", "disk:vm1", initiator.as_str()]).await?;
        }
        // Its name without its secret, or with another's.
        let said = own.refuses(&own.initiator, None).await?;
        ensure!(said.contains("authenti"), "{said}");
        let held_now = held(host)?;
        let stolen = held_now["disks"]["vm2"].as_str().context("vm2 has a secret")?;
        let stolen = secret(stolen, &own.initiator)?;
        own.refuses(&own.initiator, Some(stolen)).await?;
        logged(host, &["authentication failed", "vm:vm1"]).await?;
        let session = own.connect(&own.initiator, own.chap.clone()).await;
        let session = session.map_err(anyhow::Error::msg)?;
        // It is the same after the agent's restart, and another once the VM is made anew.
        host.terminate().await?;
        cluster.restart(host).await?;
        session.close().await;
        cluster.wait_known().await?;
        let session = own.connect(&own.initiator, own.chap.clone()).await;
        session.map_err(anyhow::Error::msg)?.close().await;
        // What a person is shown: how to attach it, and the secret in a file of its own only.
        let file = cluster.path().join("vm1.secret");
        let path = file.to_str().context("a path of letters")?;
        let shown = cluster
            .treeboot(&["vm", "show", "vm1", "--secret-file", path])
            .await?;
        let json = cluster.treeboot(&["vm", "show", "vm1", "--json"]).await?;
        let given = std::fs::read_to_string(&file)?;
        ensure!(held(host)?["disks"]["vm1"] == given.as_str(), "another secret");
        ensure!(
            shown.contains("password-secret") && !shown.contains(&given),
            "{shown}"
        );
        ensure!(
            json.contains("\"chap\": true") && !json.contains(&given),
            "{json}"
        );
        let mode = std::fs::metadata(&file)?.permissions().mode();
        ensure!(mode & 0o777 == 0o600, "the mode of the secret's file is {mode:o}");
        cluster.treeboot(&["vm", "destroy", "vm1"]).await?;
        let again = create(host, "vm1").await?;
        ensure!(again.chap != own.chap, "a new VM has the old one's secret");
        again.refuses(&own.initiator, own.chap.clone()).await?;
        Ok(())
    })
}

#[test]
fn without_an_authority_a_disk_still_goes_by_its_vms_name() -> Result<()> {
    with_cluster("vm-names", Machine::Shared, Plan::default(), async |cluster| {
        attach_all(cluster).await?;
        let host = &cluster.hosts[0];
        let (own, other) = (create(host, "vm1").await?, create(host, "vm2").await?);
        ensure!(own.chap.is_none(), "there is nobody to give secrets");
        own.refuses(&other.initiator, None).await?;
        logged(host, &["no login", "access list", "disk:vm1", "vm:vm2"]).await?;
        let session = own.connect(&own.initiator, None).await;
        session.map_err(anyhow::Error::msg)?.close().await;
        Ok(())
    })
}
