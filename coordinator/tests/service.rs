//! The daemon over real gRPC: bursts, restarts, pushes, leases, refusals.

use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tonic::Code;
use treeboot_coordinator::store::{MemoryStore, Store};
use treeboot_proto::v1;

mod fleet;

use fleet::{
    Client, DEADLINE, Host, add_image, client, endpoint, image, image_id, settings, start_at, start_with,
    tree,
};

/// No lease ends while a test runs that is not about leases.
const LONG_MS: u64 = 600_000;

fn patient() -> treeboot_coordinator::tree::Settings {
    settings(LONG_MS / 8, LONG_MS)
}

async fn fleet(client: &Client, hosts: usize) -> Vec<Host> {
    let mut fleet = Vec::new();
    for number in 0..hosts {
        let mut host = Host::connect(client.clone(), number).await;
        host.join().await.expect("joined");
        host.register().await;
        fleet.push(host);
    }
    fleet
}

#[tokio::test(flavor = "multi_thread")]
async fn a_burst_of_1000_hosts_is_admitted_at_once_and_a_restart_keeps_the_tree() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = start_at("127.0.0.1:0", dir.path(), patient()).await;
    let address = daemon.address();
    let mut admin = client(address).await;
    add_image(&mut admin).await;
    let connections: Vec<Client> = clients_of(address, 8).await;
    let mut connecting = JoinSet::new();
    for number in 0..1_000 {
        connecting.spawn(Host::connect(connections[number % 8].clone(), number));
    }
    let hosts = connecting.join_all().await;
    let began = Instant::now();
    let mut joining = JoinSet::new();
    for mut host in hosts {
        joining.spawn(async move {
            host.join().await.expect("joined");
            host
        });
    }
    let hosts = joining.join_all().await;
    println!("1,000 joins, durable and answered: {:?}", began.elapsed());
    let before = tree(&mut admin).await;
    assert_eq!(before.len(), 1_000);
    assert_eq!(before.values().map(|(depth, _)| *depth).max(), Some(9));
    drop(hosts);
    daemon.stop().await.unwrap();

    let began = Instant::now();
    let daemon = start_at(&address.to_string(), dir.path(), patient()).await;
    println!("restart with 1,000 hosts to serving: {:?}", began.elapsed());
    let mut admin = client(daemon.address()).await;
    assert_eq!(tree(&mut admin).await, before);
    daemon.stop().await.unwrap();
}

async fn clients_of(address: std::net::SocketAddr, count: usize) -> Vec<Client> {
    let mut clients = Vec::new();
    for _ in 0..count {
        clients.push(client(address).await);
    }
    clients
}

#[tokio::test(flavor = "multi_thread")]
async fn who_comes_back_after_a_restart_keeps_its_place_and_is_told_nothing_new() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = start_at("127.0.0.1:0", dir.path(), patient()).await;
    let address = daemon.address();
    let mut admin = client(address).await;
    add_image(&mut admin).await;
    let hosts = fleet(&admin, 7).await;
    let before = tree(&mut admin).await;
    // What was pushed has arrived before the state is written down.
    for host in hosts.iter().take(2) {
        let mut heard = host.heard.clone();
        let has_children = heard.wait_for(|h| h.placement.as_ref().is_some_and(|p| p.children.len() >= 2));
        tokio::time::timeout(DEADLINE, has_children)
            .await
            .unwrap()
            .unwrap();
    }
    daemon.stop().await.unwrap();
    let daemon = start_at(&address.to_string(), dir.path(), patient()).await;
    let mut admin = client(daemon.address()).await;
    for old in &hosts {
        let attachments = vec![old.attachment()];
        let mut back =
            Host::connect_as(admin.clone(), &old.name, &old.instance, &old.portal, attachments).await;
        back.beat(None).await;
        let heard = back.wait("the second acknowledgement", |h| h.acks >= 2).await;
        if let Some(placement) = heard.placement {
            // A push that was under way at the end is told again, and is no move.
            assert_eq!(placement.stripes, old.placement().stripes);
        }
    }
    assert_eq!(tree(&mut admin).await, before);
    daemon.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leave_gives_the_children_other_parents_by_push() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = start_at("127.0.0.1:0", dir.path(), patient()).await;
    let mut admin = client(daemon.address()).await;
    add_image(&mut admin).await;
    let mut hosts = fleet(&admin, 15).await;
    let leaver = hosts.remove(0);
    let mut orphans: Vec<Host> = hosts
        .into_iter()
        .filter(|h| h.parents() == [leaver.name.as_str()])
        .collect();
    assert_eq!(orphans.len(), 2);
    let mut leaver = leaver;
    let began = Instant::now();
    leaver.leave().await;
    for orphan in &mut orphans {
        let moved = |h: &fleet::Heard| {
            h.placement
                .as_ref()
                .is_some_and(|p| p.stripes[0].active.iter().all(|parent| parent.host != "h0"))
        };
        let heard = orphan.wait("another parent", moved).await;
        println!(
            "{}: told {:?} after the leave was called",
            orphan.name,
            heard.at.unwrap() - began
        );
    }
    leaver.wait("the end of its stream", |h| h.ended).await;
    assert!(!tree(&mut admin).await.contains_key("h0"));
    daemon.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_dies_is_evicted_and_its_children_hear_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = start_at("127.0.0.1:0", dir.path(), settings(50, 400)).await;
    let mut admin = client(daemon.address()).await;
    add_image(&mut admin).await;
    let mut hosts = Vec::new();
    for number in 0..7 {
        let mut host = Host::connect(admin.clone(), number).await;
        host.join().await.unwrap();
        hosts.push(host);
    }
    let dead = hosts.remove(0);
    let died = Instant::now();
    let mut beating = tokio::time::interval(Duration::from_millis(50));
    loop {
        beating.tick().await;
        for host in &mut hosts {
            let attachments = vec![host.attachment()];
            host.beat(Some(attachments)).await;
        }
        let left = tree(&mut admin).await;
        if !left.contains_key("h0") && hosts.iter().all(|h| h.parents() != ["h0"]) {
            assert_eq!(left.len(), 6, "all others live on");
            break;
        }
        assert!(died.elapsed() < DEADLINE, "{left:?}");
    }
    println!("lease 400 ms: gone and re-parented after {:?}", died.elapsed());
    drop(dead);
    daemon.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_have_codes_and_say_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = start_at("127.0.0.1:0", dir.path(), patient()).await;
    let mut admin = client(daemon.address()).await;
    let join = |host: &str, portal: &str| v1::JoinRequest {
        host: host.into(),
        instance: "instance".into(),
        image: Some(image_id()),
        endpoint: Some(endpoint(portal)),
    };
    let refused = |result: Result<tonic::Response<v1::JoinResponse>, tonic::Status>| {
        let status = result.unwrap_err();
        (status.code(), status.message().to_owned())
    };
    let (code, message) = refused(admin.join(join("a b", "10.0.0.1:3260")).await);
    assert!(
        code == Code::InvalidArgument && message.contains("'a b'"),
        "{message}"
    );
    let (code, message) = refused(admin.join(join("a", "::1:3260")).await);
    assert!(
        code == Code::InvalidArgument && message.contains("brackets"),
        "{message}"
    );
    let (code, message) = refused(admin.join(join("a", "10.0.0.1:3260")).await);
    assert!(
        code == Code::FailedPrecondition && message.contains("heartbeat stream"),
        "{message}"
    );
    let mut host = Host::connect_as(admin.clone(), "a", "instance", "10.0.0.1:3260", Vec::new()).await;
    let status = host.join().await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    add_image(&mut admin).await;
    host.join().await.unwrap();
    let older = v1::RegisterRequest {
        host: "a".into(),
        instance: "instance".into(),
        image: Some(image_id()),
        epoch: Some(v1::Epoch::default()),
    };
    assert_eq!(admin.register(older).await.unwrap_err().code(), Code::Aborted);
    let mut other = image();
    other.id = Some(image_id());
    other.digest = vec![4; 32];
    let status = admin
        .add_image(v1::AddImageRequest { image: Some(other) })
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::AlreadyExists);
    let remove = |force| v1::RemoveImageRequest {
        id: Some(image_id()),
        force,
    };
    assert_eq!(
        admin.remove_image(remove(false)).await.unwrap_err().code(),
        Code::FailedPrecondition
    );
    let second = Host::connect_as(admin.clone(), "a", "another", "10.0.0.9:3260", Vec::new()).await;
    let reason = second.heard.borrow().refused.clone().unwrap();
    assert!(
        reason.contains("host 'a'") && reason.contains("--name"),
        "{reason}"
    );
    admin.remove_image(remove(true)).await.unwrap();
    host.wait("the order to detach", |h| !h.detached.is_empty()).await;
    daemon.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn queries_show_hosts_images_trees_and_candidates() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = start_at("[::1]:0", dir.path(), patient()).await;
    let mut admin = client(daemon.address()).await;
    add_image(&mut admin).await;
    let hosts = fleet(&admin, 3).await;
    let listed = admin
        .list_hosts(v1::ListHostsRequest {})
        .await
        .unwrap()
        .into_inner()
        .hosts;
    assert_eq!(listed.len(), 3);
    assert!(listed.iter().all(|h| h.connected && h.attachments == 1));
    let images = admin
        .list_images(v1::ListImagesRequest {})
        .await
        .unwrap()
        .into_inner()
        .images;
    assert_eq!(images[0].chunk_bytes, 65536);
    let newest = v1::GetImageRequest {
        id: Some(v1::ImageId {
            name: "debian".into(),
            version: 0,
        }),
        role: String::new(),
    };
    assert!(admin.get_image(newest).await.is_ok());
    let search = v1::SearchRequest {
        image: Some(image_id()),
        host: hosts[0].name.clone(),
        limit: 2,
    };
    let found = admin.search(search).await.unwrap().into_inner().candidates;
    assert_eq!(found.len(), 2);
    assert!(found.iter().all(|c| !c.reason.is_empty()));
    daemon.stop().await.unwrap();
}

/// What a path answers over HTTP/1.1.
async fn said(address: std::net::SocketAddr, path: &str) -> std::io::Result<String> {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(address).await?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    Ok(text)
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_answered_that_is_not_durable_and_a_retry_works_when_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let store = std::sync::Arc::new(MemoryStore::default());
    let daemon = start_with("127.0.0.1:0", store.clone(), dir.path(), patient()).await;
    let mut admin = client(daemon.address()).await;
    add_image(&mut admin).await;
    let mut host = Host::connect(admin.clone(), 0).await;
    store.set_full(true);
    let status = host.join().await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("make room"), "{}", status.message());
    // Health says so; it is no reason to restart what serves from memory.
    let ready = said(daemon.address(), "/readyz").await.unwrap();
    assert!(
        ready.starts_with("HTTP/1.1 503") && ready.contains("make room"),
        "{ready}"
    );
    let alive = said(daemon.address(), "/healthz").await.unwrap();
    assert!(
        alive.starts_with("HTTP/1.1 200") && alive.contains("impaired"),
        "{alive}"
    );
    let figures = said(daemon.address(), "/metrics").await.unwrap();
    assert!(
        figures.contains("\ntreeboot_coordinator_record_failing 1\n"),
        "{figures}"
    );
    assert!(!figures.contains("record_write_errors_total 0\n"), "{figures}");
    let images = said(daemon.address(), "/v1/images/debian").await.unwrap();
    assert!(images.starts_with("HTTP/1.1 200"), "{images}");
    store.set_full(false);
    let placement = host.join().await.unwrap();
    let ready = said(daemon.address(), "/readyz").await.unwrap();
    assert!(ready.starts_with("HTTP/1.1 200"), "{ready}");
    assert_eq!(placement.stripes[0].depth, 1);
    let places = store.load().unwrap().into_iter();
    let places = places.filter(|(key, _)| matches!(key, treeboot_coordinator::tree::Key::Attachment(..)));
    assert_eq!(places.count(), 1);
    daemon.stop().await.unwrap();
}
