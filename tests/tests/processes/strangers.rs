//! What a stranger tries against a cluster that asks for certificates: refused with a clear reason, and logged.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use tonic::{Code, Request, Status};
use treeboot_identity::authority::{self, Authority};
use treeboot_identity::tls::Dialer;
use treeboot_identity::token::{self, Gatebook};
use treeboot_identity::{Credentials, Holder, NewKey, Person, Role, Who, unix_now};
use treeboot_proto::v1;
use treeboot_proto::v1::agent_client::AgentClient;
use treeboot_proto::v1::coordinator_client::CoordinatorClient;
use treeboot_tests::cluster::{Cluster, Plan};
use treeboot_tests::daemon::Daemon;
use treeboot_tests::image::Pattern;
use treeboot_tests::wait::wait_until;
use treeboot_types::HostName;

use crate::support::{Machine, on_own_thread, with_cluster};

const IMAGE: &str = "pattern";
const PATTERN: Pattern = Pattern {
    seed: 31,
    bytes: 1 << 20,
};
const HOUR: Duration = Duration::from_secs(3600);
const SOON: Duration = Duration::from_secs(60);

fn secure(hosts: usize) -> Plan {
    Plan {
        hosts,
        secure: true,
        ..Plan::default()
    }
}

/// The cluster's own authority, as an administrator's hands have it.
fn authority(cluster: &Cluster) -> Result<Authority> {
    let dir = authority::dir(&cluster.coordinator_state());
    Authority::open(&dir)?.context("the cluster has an authority")
}

fn host(name: &str) -> Result<Who> {
    Ok(Who::Host(HostName::new(name)?))
}

fn person(name: &str, role: Role) -> Result<Who> {
    Ok(Who::Person {
        name: Person::new(name)?,
        role,
    })
}

/// A client of the coordinator that shows these credentials.
async fn coordinator(
    cluster: &Cluster,
    credentials: Credentials,
) -> Result<CoordinatorClient<tonic::transport::Channel>> {
    let dialer = Dialer::mutual(&Holder::new(credentials), Who::Coordinator)?;
    Ok(CoordinatorClient::new(
        cluster.coordinator.channel_by(&dialer).await?,
    ))
}

/// A client of an agent that shows these credentials.
async fn agent(daemon: &Daemon, credentials: Credentials) -> Result<AgentClient<tonic::transport::Channel>> {
    let dialer = Dialer::mutual(&Holder::new(credentials), host(daemon.name())?)?;
    Ok(AgentClient::new(daemon.channel_by(&dialer).await?))
}

fn refused<T>(answer: Result<T, Status>, code: Code, words: &str) -> Result<()> {
    let Err(status) = answer else {
        bail!("it was let in; expected {code:?}: {words}");
    };
    ensure!(
        status.code() == code && status.message().contains(words),
        "expected {code:?} with '{words}', got {status:?}"
    );
    Ok(())
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

/// A verb on a connection that TLS may refuse as late as with the first answer.
async fn cut_off(daemon: &Daemon, dialer: &Dialer, words: &str) -> Result<()> {
    let error = match daemon.channel_by(dialer).await {
        Err(error) => error,
        Ok(channel) => {
            let mut client = CoordinatorClient::new(channel);
            match client.list_hosts(v1::ListHostsRequest {}).await {
                Err(status) => status.into(),
                Ok(_) => bail!("a stranger was let in; expected: {words}"),
            }
        }
    };
    let said = error.chain().find_map(treeboot_identity::tls::words);
    ensure!(
        said.as_deref().is_some_and(|said| said.contains(words)),
        "expected '{words}', got {said:?} of {error:?}"
    );
    Ok(())
}

#[test]
fn a_cluster_with_an_authority_imports_attaches_and_shows_its_tree() -> Result<()> {
    with_cluster("secure", Machine::Shared, secure(2), async |cluster| {
        let file = cluster.path().join("pattern.raw");
        PATTERN.write(&file)?;
        cluster.import(&file, IMAGE).await?;
        cluster.treeboot(&["image", "attach", IMAGE, "--all"]).await?;
        let tree = cluster.treeboot(&["tree", IMAGE]).await?;
        ensure!(tree.contains("h1") && tree.contains("h2"), "{tree}");
        // A restart needs no token: the certificate is kept.
        let host = &cluster.hosts[0];
        host.set_env("TREEBOOT_JOIN_TOKEN", "");
        host.terminate().await?;
        cluster.restart(host).await?;
        cluster.wait_known().await
    })
}

#[test]
fn without_a_good_certificate_nobody_is_let_in() -> Result<()> {
    with_cluster("strangers", Machine::Shared, secure(1), async |cluster| {
        let own = authority(cluster)?;
        let fingerprint = own.fingerprint();
        // None.
        let channel = cluster
            .coordinator
            .channel_by(&Dialer::unnamed(fingerprint)?)
            .await?;
        let mut client = CoordinatorClient::new(channel);
        let answer = client.list_hosts(v1::ListHostsRequest {}).await;
        refused(answer, Code::Unauthenticated, "no certificate was shown")?;
        let answer = client
            .leave(v1::LeaveRequest {
                host: "h1".into(),
                instance: "x".into(),
            })
            .await;
        refused(answer, Code::Unauthenticated, "needs a host's certificate")?;
        logged(&cluster.coordinator, &["a request was refused", "ListHosts"]).await?;
        // Not TLS at all.
        let plain = cluster.coordinator.channel_by(&Dialer::Insecure).await;
        let spoken = match plain {
            Ok(channel) => CoordinatorClient::new(channel)
                .list_hosts(v1::ListHostsRequest {})
                .await
                .is_ok(),
            Err(_) => false,
        };
        ensure!(!spoken, "the coordinator answers without TLS");
        // Another authority's.
        let elsewhere = tempfile::tempdir()?;
        let other = Authority::create(elsewhere.path(), &[])?;
        let forged = other.issue(&person("eve", Role::Admin)?, HOUR)?;
        // They hold each other's authority for theirs only where they mean to: so take ours, with their certificate.
        let pem = forged.to_pem();
        let mixed = pem.replacen(
            &pem_of_authority(&forged),
            &pem_of_authority(&own.issue(&person("x", Role::Viewer)?, HOUR)?),
            1,
        );
        let mixed = Holder::new(Credentials::from_pem(mixed.as_bytes(), "the test")?);
        let dialer = Dialer::mutual(&mixed, Who::Coordinator)?;
        cut_off(&cluster.coordinator, &dialer, "of another authority than theirs").await?;
        let dialer = Dialer::mutual(&Holder::new(forged), Who::Coordinator)?;
        cut_off(&cluster.coordinator, &dialer, "of another authority than ours").await?;
        // An expired one, at the coordinator and at a host.
        let key = NewKey::generate()?;
        let now = unix_now();
        let who = person("late", Role::Admin)?;
        let late = own.certify_for(&key.request()?, &who, now - 7200, now - 3600)?;
        let late = Holder::new(key.with(late, own.certificate().to_vec())?);
        let dialer = Dialer::mutual(&late, Who::Coordinator)?;
        cut_off(&cluster.coordinator, &dialer, "it has expired").await?;
        logged(&cluster.coordinator, &["a connection was refused", "expired"]).await?;
        let daemon = &cluster.hosts[0];
        let dialer = Dialer::mutual(&late, host(daemon.name())?)?;
        cut_off(daemon, &dialer, "it has expired").await?;
        logged(daemon, &["a connection was refused", "expired"]).await?;
        // A host that poses as the coordinator is seen through by its name.
        let dialer = Dialer::mutual(&Holder::new(own.issue(&who, HOUR)?), Who::Coordinator)?;
        let error = daemon
            .channel_by(&dialer)
            .await
            .err()
            .context("h1 passed for the coordinator")?;
        let said = error.chain().find_map(treeboot_identity::tls::words);
        ensure!(
            said.as_deref() == Some("host 'h1' answers there, not the coordinator"),
            "{said:?}"
        );
        Ok(())
    })
}

/// The second block of an identity.
fn pem_of_authority(credentials: &Credentials) -> String {
    let pem = credentials.to_pem();
    let begin = pem.rfind("-----BEGIN CERTIFICATE").unwrap_or(0);
    let end = pem.rfind("-----BEGIN PRIVATE").unwrap_or(pem.len());
    pem[begin..end].to_owned()
}

#[test]
fn a_host_speaks_for_itself_only_and_in_its_own_time() -> Result<()> {
    with_cluster("speaks", Machine::Shared, secure(1), async |cluster| {
        let file = cluster.path().join("pattern.raw");
        PATTERN.write(&file)?;
        cluster.import(&file, IMAGE).await?;
        cluster.treeboot(&["image", "attach", IMAGE, "--all"]).await?;
        let own = authority(cluster)?;
        let instance = std::fs::read_to_string(cluster.hosts[0].folder().join("state/instance"))?;
        let instance = instance.split(' ').next().unwrap_or_default().to_owned();
        let image = Some(v1::ImageId {
            name: IMAGE.into(),
            version: 1,
        });
        let remove = |incarnation: u64| v1::RemoveRequest {
            host: "h1".into(),
            instance: instance.clone(),
            image: image.clone(),
            epoch: Some(v1::Epoch {
                incarnation,
                counter: 1,
            }),
        };
        let mut eve = coordinator(cluster, own.issue(&host("h9")?, HOUR)?).await?;
        let words = "a host speaks for itself only: this is host 'h9'";
        refused(eve.remove(remove(1)).await, Code::PermissionDenied, words)?;
        let leave = v1::LeaveRequest {
            host: "h1".into(),
            instance: instance.clone(),
        };
        refused(eve.leave(leave).await, Code::PermissionDenied, words)?;
        let beat = v1::Beat {
            sequence: 1,
            host: "h1".into(),
            instance: instance.clone(),
            ..Default::default()
        };
        let mut pushes = eve
            .heartbeat(futures_util::stream::iter([beat]))
            .await?
            .into_inner();
        let push = pushes.message().await?.context("a push")?.push;
        ensure!(
            matches!(&push, Some(v1::push::Push::Refused(refused)) if refused.reason.contains(words)),
            "{push:?}"
        );
        // Nor does a person pass for a host, or a host for a person.
        let mut admin = coordinator(cluster, own.issue(&person("root", Role::Admin)?, HOUR)?).await?;
        refused(
            admin.remove(remove(1)).await,
            Code::PermissionDenied,
            "Remove needs a host's certificate; this is admin 'root'",
        )?;
        refused(
            eve.list_hosts(v1::ListHostsRequest {}).await,
            Code::PermissionDenied,
            "ListHosts needs the role viewer; this is host 'h9'",
        )?;
        logged(&cluster.coordinator, &["for another host", "h9", "h1"]).await?;
        // The right host with an epoch that is over.
        let mut own_host = coordinator(cluster, own.issue(&host("h1")?, HOUR)?).await?;
        refused(own_host.remove(remove(0)).await, Code::Aborted, "epoch")?;
        let log = std::fs::read_to_string(cluster.coordinator.log_path())?;
        ensure!(log.contains("an epoch that is over was refused"), "{log}");
        let tree = cluster.treeboot(&["tree", IMAGE]).await?;
        ensure!(tree.contains("h1"), "h1 keeps its place: {tree}");
        Ok(())
    })
}

#[test]
fn roles_say_what_a_person_may_do() -> Result<()> {
    with_cluster("roles", Machine::Shared, secure(1), async |cluster| {
        let own = authority(cluster)?;
        let daemon = &cluster.hosts[0];
        let destroy = || v1::DestroyRequest {
            vm: "vm1".into(),
            instance_only: false,
        };
        let viewer = person("vera", Role::Viewer)?;
        let mut client = coordinator(cluster, own.issue(&viewer, HOUR)?).await?;
        client.list_hosts(v1::ListHostsRequest {}).await?;
        let remove = v1::RemoveImageRequest {
            id: Some(v1::ImageId {
                name: IMAGE.into(),
                version: 1,
            }),
            force: true,
        };
        let words = "RemoveImage needs the role admin; this is viewer 'vera'";
        refused(
            client.remove_image(remove.clone()).await,
            Code::PermissionDenied,
            words,
        )?;
        let mut client = agent(daemon, own.issue(&viewer, HOUR)?).await?;
        client.list_vms(v1::ListVmsRequest {}).await?;
        let words = "Destroy needs the role operator; this is viewer 'vera'";
        refused(client.destroy(destroy()).await, Code::PermissionDenied, words)?;
        logged(daemon, &["a request was refused", "vera", "Destroy"]).await?;
        // An operator may, and finds that there is no such VM; images are not theirs.
        let operator = person("otto", Role::Operator)?;
        let mut client = agent(daemon, own.issue(&operator, HOUR)?).await?;
        refused(client.destroy(destroy()).await, Code::NotFound, "vm1")?;
        let mut client = coordinator(cluster, own.issue(&operator, HOUR)?).await?;
        let words = "needs the role admin; this is operator 'otto'";
        refused(client.remove_image(remove).await, Code::PermissionDenied, words)?;
        // The same by bearer tokens, on connections without a certificate.
        let name = Person::new("vera")?;
        let text = token::bearer(&own, &name, Role::Viewer, HOUR)?;
        let ask = |text: &str| -> Result<_> {
            let mut request = Request::new(v1::ListHostsRequest {});
            request
                .metadata_mut()
                .insert("authorization", format!("Bearer {text}").parse()?);
            Ok(request)
        };
        let unnamed = Dialer::unnamed(own.fingerprint())?;
        let mut client = CoordinatorClient::new(cluster.coordinator.channel_by(&unnamed).await?);
        client.list_hosts(ask(&text)?).await?;
        let mut request = Request::new(v1::RemoveImageRequest::default());
        request
            .metadata_mut()
            .insert("authorization", format!("Bearer {text}").parse()?);
        refused(
            client.remove_image(request).await,
            Code::PermissionDenied,
            "this is viewer 'vera'",
        )?;
        let over = token::bearer(&own, &name, Role::Admin, Duration::ZERO)?;
        refused(
            client.list_hosts(ask(&over)?).await,
            Code::Unauthenticated,
            "has expired",
        )?;
        let elsewhere = tempfile::tempdir()?;
        let other = Authority::create(elsewhere.path(), &[])?;
        let forged = token::bearer(&other, &name, Role::Admin, HOUR)?;
        let words = "not one of this cluster's";
        refused(
            client.list_hosts(ask(&forged)?).await,
            Code::Unauthenticated,
            words,
        )
    })
}

#[test]
fn an_image_is_for_the_hosts_and_roles_that_its_labels_name() -> Result<()> {
    let plan = Plan {
        agent_args: ["--label", "tier=silver"].map(Into::into).to_vec(),
        ..secure(2)
    };
    with_cluster("labels", Machine::Shared, plan, async |cluster| {
        let file = cluster.path().join("pattern.raw");
        PATTERN.write(&file)?;
        let file = file.to_str().context("a path of letters")?;
        let rule = "hosts=name=h1|h7,tier=silver";
        let import = [
            "image",
            "import",
            file,
            IMAGE,
            "--label",
            rule,
            "--label",
            "role=admin",
        ];
        cluster.treeboot(&import).await?;
        let shown = cluster.treeboot(&["image", "show", IMAGE]).await?;
        ensure!(shown.contains(rule) && shown.contains("role=admin"), "{shown}");
        // h2 is refused where it looks the image up, and where it says that it is in the tree.
        cluster
            .treeboot(&["image", "attach", IMAGE, "--host", "h1"])
            .await?;
        let output = cluster
            .treeboot_output(&["image", "attach", IMAGE, "--host", "h2"])
            .await?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(
            !output.status.success() && said.contains("is for hosts with name=h1|h7"),
            "{said}"
        );
        logged(&cluster.coordinator, &["an image was refused", "h2"]).await?;
        let own = authority(cluster)?;
        let instance = std::fs::read_to_string(cluster.hosts[1].folder().join("state/instance"))?;
        let mut h2 = coordinator(cluster, own.issue(&host("h2")?, HOUR)?).await?;
        let join = v1::JoinRequest {
            host: "h2".into(),
            instance: instance.split(' ').next().unwrap_or_default().to_owned(),
            image: Some(treeboot_tests::measure::newest(IMAGE)),
            endpoint: Some(v1::Endpoint {
                portal: cluster.hosts[1].portal()?,
                target: format!("iqn.2026-11.dev.treeboot:image:{IMAGE}:1"),
                data_lun: 0,
                hash_lun: Some(1),
            }),
        };
        refused(h2.join(join).await, Code::PermissionDenied, "is for hosts with")?;
        let search = v1::SearchRequest {
            image: Some(treeboot_tests::measure::newest(IMAGE)),
            host: String::new(),
            limit: 0,
        };
        refused(
            h2.search(search.clone()).await,
            Code::PermissionDenied,
            "is for hosts with",
        )?;
        // Nor does it help to say that it holds the image.
        let image = h2
            .list_images(v1::ListImagesRequest {})
            .await?
            .into_inner()
            .images;
        let mut image = image.into_iter().next().context("an image")?;
        for origin in &mut image.origins {
            origin.host = "h2".into();
        }
        let add = v1::AddImageRequest { image: Some(image) };
        refused(
            h2.add_image(add).await,
            Code::PermissionDenied,
            "is for hosts with",
        )?;
        // A role below the one that it needs neither sees it nor makes a VM of it.
        let operator = person("otto", Role::Operator)?;
        let mut client = coordinator(cluster, own.issue(&operator, HOUR)?).await?;
        let images = client
            .list_images(v1::ListImagesRequest {})
            .await?
            .into_inner()
            .images;
        ensure!(images.is_empty(), "{images:?}");
        let words = "is for the role admin; this is the role operator";
        refused(client.search(search).await, Code::PermissionDenied, words)?;
        let label = v1::LabelImageRequest {
            name: IMAGE.into(),
            remove: vec!["role".into()],
            ..Default::default()
        };
        refused(
            client.label_image(label).await,
            Code::PermissionDenied,
            "LabelImage needs the role admin",
        )?;
        let create = || v1::CreateRequest {
            vm: "vm1".into(),
            image: Some(treeboot_tests::measure::newest(IMAGE)),
            device: false,
            limit_bytes: None,
        };
        let mut client = agent(&cluster.hosts[0], own.issue(&operator, HOUR)?).await?;
        refused(client.create(create()).await, Code::PermissionDenied, words)?;
        let header = v1::DiskHeader {
            vm: "vm1".into(),
            image: create().image,
            ..Default::default()
        };
        let part = Some(v1::disk_part::Part::Header(header));
        let disk = tokio_stream::iter([v1::DiskPart { part }]);
        refused(client.receive_disk(disk).await, Code::PermissionDenied, words)?;
        // The labels outlive a restart, and what they no longer forbid is allowed.
        cluster.coordinator.terminate().await?;
        cluster.restart(&cluster.coordinator).await?;
        cluster.wait_known().await?;
        let shown = cluster.treeboot(&["image", "show", IMAGE]).await?;
        ensure!(shown.contains("role=admin"), "{shown}");
        cluster
            .treeboot(&["image", "label", IMAGE, "--remove", "role", "--remove", "hosts"])
            .await?;
        client.create(create()).await?;
        cluster
            .treeboot(&["image", "attach", IMAGE, "--host", "h2"])
            .await?;
        Ok(())
    })
}

#[test]
fn a_token_lets_in_whom_it_is_for_once_and_in_time() -> Result<()> {
    with_cluster("tokens", Machine::Shared, secure(1), async |cluster| {
        let own = authority(cluster)?;
        let book = Gatebook::new(&own);
        let unnamed = Dialer::unnamed(own.fingerprint())?;
        let channel = cluster.coordinator.channel_by(&unnamed).await?;
        let enroll = async |host: &str, token: &str, request: &[u8]| {
            let request = v1::EnrollRequest {
                host: host.into(),
                token: token.into(),
                request: request.to_vec(),
            };
            CoordinatorClient::new(channel.clone()).enroll(request).await
        };
        let request = NewKey::generate()?.request()?;
        let another = NewKey::generate()?.request()?;
        let once = book.create(None, 1, HOUR)?.to_string();
        enroll("n1", &once, &request).await?;
        // An answer that was lost is given again; a second host is not let in.
        enroll("n1", &once, &request).await?;
        let words = "was used already, by 'n1'";
        refused(enroll("n1", &once, &another).await, Code::PermissionDenied, words)?;
        refused(enroll("n2", &once, &request).await, Code::PermissionDenied, words)?;
        let over = book.create(None, 1, Duration::ZERO)?.to_string();
        refused(
            enroll("n2", &over, &request).await,
            Code::PermissionDenied,
            "expired",
        )?;
        let meant = book.create(Some(HostName::new("n3")?), 1, HOUR)?.to_string();
        let words = "for host 'n3', not for 'n2'";
        refused(
            enroll("n2", &meant, &request).await,
            Code::PermissionDenied,
            words,
        )?;
        enroll("n3", &meant, &request).await?;
        let any = book.create(None, 1, HOUR)?.to_string();
        let words = "has joined already";
        refused(enroll("h1", &any, &request).await, Code::PermissionDenied, words)?;
        let elsewhere = tempfile::tempdir()?;
        let other = Authority::create(elsewhere.path(), &[])?;
        let foreign = Gatebook::new(&other).create(None, 1, HOUR)?.to_string();
        let words = "for another cluster";
        refused(
            enroll("n2", &foreign, &request).await,
            Code::PermissionDenied,
            words,
        )?;
        refused(
            enroll("n2", "a token", &request).await,
            Code::PermissionDenied,
            "no join token",
        )?;
        let mut guessed = any.clone().into_bytes();
        let place = any.len() - 70;
        guessed[place] = if guessed[place] == b'0' { b'1' } else { b'0' };
        let guessed = String::from_utf8(guessed)?;
        refused(
            enroll("n2", &guessed, &request).await,
            Code::PermissionDenied,
            "not known",
        )?;
        refused(
            enroll("n2", &any, b"not a request").await,
            Code::PermissionDenied,
            "not valid",
        )?;
        logged(&cluster.coordinator, &["a host may not join", "n2", "expired"]).await?;
        // A whole agent with a token that was used says so and ends.
        let mut daemon = Daemon::new(
            cluster.scratch(),
            treeboot_tests::daemon::DaemonSpec {
                name: "n4".into(),
                program: cluster.agent_path(),
                args: ["--name", "n4", "--state"].map(Into::into).to_vec(),
                address: std::net::Ipv4Addr::LOCALHOST.into(),
                portal: Some(0),
                namespace: None,
            },
        )?;
        daemon.add_args([cluster.path().join("n4/state")]);
        daemon.set_env("TREEBOOT_COORDINATOR", &cluster.coordinator.url()?);
        daemon.set_env("TREEBOOT_JOIN_TOKEN", &once);
        let error = daemon.start(cluster.scratch()).await.err().context("n4 joined")?;
        let error = format!("{error:#}");
        ensure!(
            error.contains("does not let host 'n4' join") && error.contains("used already"),
            "{error}"
        );
        Ok(())
    })
}

#[test]
fn a_certificate_is_renewed_before_it_ends() -> Result<()> {
    let plan = Plan {
        // Renewed after 20 s, and ten more for a machine that has much else to do.
        coordinator_args: ["--host-certificate-life", "30s"].map(Into::into).to_vec(),
        ..secure(1)
    };
    with_cluster("renewal", Machine::Shared, plan, async |cluster| {
        let host = &cluster.hosts[0];
        let path = host.folder().join("state/identity.pem");
        let end = || -> Result<u64> {
            let kept = Credentials::load(&path)?.context("the host keeps its identity")?;
            Ok(kept.certified().until)
        };
        let first = end()?;
        wait_until(SOON, "the next certificate", async || {
            Ok((end()? > first).then_some(()))
        })
        .await?;
        // Beyond the first one's end the host is heard, and answers.
        wait_until(SOON, "the first certificate's end", async || {
            Ok((unix_now() > first).then_some(()))
        })
        .await?;
        cluster.wait_known().await?;
        host.agent().await?.list_vms(v1::ListVmsRequest {}).await?;
        let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path)?.permissions());
        ensure!(mode & 0o777 == 0o600, "the identity's mode is {mode:o}");
        Ok(())
    })
}

#[test]
fn without_certificates_a_daemon_binds_loopback_only() -> Result<()> {
    on_own_thread(Machine::Shared, async || {
        let cluster = Cluster::prepare("insecure", &Plan::default())?;
        let refuse = |mut command: std::process::Command, args: &[&str]| -> Result<String> {
            let output = command.args(args).env("TREEBOOT_INSECURE", "true").output()?;
            ensure!(!output.status.success(), "it started");
            Ok(String::from_utf8_lossy(&output.stderr).into_owned())
        };
        let state = cluster.path().join("state");
        let state = state.to_str().context("a path of letters")?;
        let command = || cluster.scratch().command(cluster.coordinator_path());
        let said = refuse(command(), &["--state", state, "--listen", "0.0.0.0:0"])?;
        ensure!(
            said.contains("--insecure is for loopback addresses only"),
            "{said}"
        );
        let command = cluster.scratch().command(cluster.agent_path());
        let args = [
            "--name",
            "h1",
            "--state",
            state,
            "--listen",
            "127.0.0.1:0",
            "--portal",
            "0.0.0.0:0",
        ];
        let said = refuse(command, &args)?;
        ensure!(
            said.contains("--insecure is for loopback addresses only"),
            "{said}"
        );
        // Nor does one start that says nothing of it: it names both ways out.
        let silent = |mut command: std::process::Command, args: &[&str]| -> Result<String> {
            let output = command.args(args).output()?;
            ensure!(!output.status.success(), "it started");
            Ok(String::from_utf8_lossy(&output.stderr).into_owned())
        };
        let command = cluster.scratch().command(cluster.coordinator_path());
        let said = silent(command, &["--state", state, "--listen", "0.0.0.0:0"])?;
        ensure!(
            said.contains("treeboot-coordinator init --state") && said.contains("--insecure"),
            "{said}"
        );
        let command = cluster.scratch().command(cluster.agent_path());
        let said = silent(command, &args)?;
        ensure!(
            said.contains("token create --host h1") && said.contains("--insecure"),
            "{said}"
        );
        // Nor is it a way around an authority.
        cluster.coordinator_says(&["init"])?;
        let state = cluster.coordinator_state();
        let state = state.to_str().context("a path of letters")?;
        let command = cluster.scratch().command(cluster.coordinator_path());
        let said = refuse(command, &["--state", state, "--listen", "127.0.0.1:0"])?;
        ensure!(said.contains("holds an authority"), "{said}");
        cluster.pass();
        Ok(())
    })
}
