//! What people and machines get wrong: an error that names the thing and the way out, and nothing left behind.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use treeboot_proto::v1;
use treeboot_tests::cluster::{Cluster, Plan};
use treeboot_tests::fleet;
use treeboot_tests::image::Pattern;
use treeboot_tests::measure::newest;
use treeboot_tests::need::{Need, require};
use treeboot_tests::wait::{wait_until, within};

use crate::support::{Machine, on_own_thread, with_cluster};

const IMAGE: &str = "pattern";
const PATTERN: Pattern = Pattern {
    seed: 31,
    bytes: 12 << 20,
};
const SOON: Duration = Duration::from_secs(30);

/// Runs `treeboot` where it must fail; gives its words.
async fn refused(cluster: &Cluster, args: &[&str]) -> Result<String> {
    let output = within(SOON, "the refusal", cluster.treeboot_output(args)).await??;
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        !output.status.success(),
        "treeboot {} succeeded: {words}",
        args.join(" ")
    );
    ensure!(
        words.lines().any(|line| line.starts_with("treeboot: ")),
        "{words}"
    );
    Ok(words)
}

#[test]
fn names_that_are_none_are_refused_by_every_process_with_the_name() -> Result<()> {
    with_cluster("bad-names", Machine::Shared, Plan::default(), async |cluster| {
        let file = cluster.path().join("pattern.raw");
        PATTERN.write(&file)?;
        let file = file.to_string_lossy().into_owned();
        for name in ["a:b", "a/b", "a b", "ä", "", "A", "..", "a..b", "-a"] {
            let words = refused(cluster, &["image", "import", &file, name]).await?;
            ensure!(words.contains(&format!("'{name}'")), "{name}: {words}");
            // The services themselves, for whoever does not come through the program.
            let request = v1::CreateRequest {
                vm: name.into(),
                image: Some(newest(IMAGE)),
                device: false,
                limit_bytes: None,
            };
            let status = cluster.hosts[0].agent().await?.create(request).await;
            let status = status.expect_err("a name that is none");
            assert_eq!(status.code(), tonic::Code::InvalidArgument, "{name}: {status}");
            let request = v1::GetTreeRequest {
                image: Some(newest(name)),
            };
            let status = cluster.coordinator.coordinator().await?.get_tree(request).await;
            let status = status.expect_err("a name that is none");
            assert_eq!(status.code(), tonic::Code::InvalidArgument, "{name}: {status}");
        }
        let listed = cluster.treeboot(&["image", "list", "--json"]).await?;
        assert_eq!(
            serde_json::from_str::<serde_json::Value>(&listed)?,
            serde_json::json!([])
        );
        Ok(())
    })
}

#[test]
fn what_exists_already_and_what_does_not_is_named() -> Result<()> {
    with_cluster("exists", Machine::Shared, Plan::default(), async |cluster| {
        let file = cluster.path().join("pattern.raw");
        PATTERN.write(&file)?;
        let name = format!("{IMAGE}@1");
        cluster.import(&file, &name).await?;
        let other = cluster.path().join("other.raw");
        Pattern { seed: 32, ..PATTERN }.write(&other)?;
        let words = refused(cluster, &["image", "import", &other.to_string_lossy(), &name]).await?;
        ensure!(words.contains(&name), "{words}");
        // The same content again is no error: the result is as asked.
        cluster.import(&file, &name).await?;
        for args in [
            &["tree", "nobody"][..],
            &["image", "show", "nobody"],
            &["image", "remove", "nobody"],
            &["vm", "create", "v", "--image", "nobody", "--host", "h1"],
        ] {
            let words = refused(cluster, args).await?;
            ensure!(words.contains("nobody"), "{words}");
        }
        let words = refused(
            cluster,
            &["vm", "create", "v", "--image", IMAGE, "--host", "nowhere"],
        )
        .await?;
        ensure!(words.contains("nowhere"), "{words}");
        let vms = cluster.treeboot(&["vm", "list", "--json"]).await?;
        ensure!(!vms.contains("\"v\""), "{vms}");
        Ok(())
    })
}

#[test]
fn an_agent_that_cannot_reach_its_coordinator_says_so_and_attaches_once_it_can() -> Result<()> {
    with_cluster(
        "no-coordinator",
        Machine::Shared,
        Plan::default(),
        async |cluster| {
            let file = cluster.path().join("pattern.raw");
            PATTERN.write(&file)?;
            cluster.import(&file, IMAGE).await?;
            let url = cluster.coordinator.url()?;
            cluster.coordinator.kill()?;
            let host = &cluster.hosts[0];
            host.kill()?;
            cluster.restart(host).await?;
            let attempt = within(SOON, "the refusal", fleet::attach(host, IMAGE)).await?;
            let error = format!("{:#}", attempt.expect_err("no coordinator to ask"));
            ensure!(error.contains(url.trim_start_matches("http://")), "{error}");
            let log = fs::read_to_string(host.log_path())?;
            ensure!(log.contains("cannot be reached") && log.contains(&url), "{log}");
            let words = refused(cluster, &["image", "list"]).await?;
            ensure!(words.contains(&url), "{words}");
            cluster.restart(&cluster.coordinator).await?;
            wait_until(SOON, "the host to attach", async || {
                Ok(fleet::attach(host, IMAGE).await.ok())
            })
            .await?;
            Ok(())
        },
    )
}

#[test]
fn an_import_without_room_is_refused_and_leaves_nothing_behind() -> Result<()> {
    if !require(&[Need::Root]) {
        return Ok(());
    }
    on_own_thread(Machine::Shared, async || {
        let cluster = Cluster::prepare("full-store", &Plan::default())?;
        let store = cluster.origin.folder().join("store");
        fs::create_dir_all(&store)?;
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=4m", "tmpfs"])
            .arg(&store)
            .status()?;
        ensure!(mounted.success(), "mount ended with {mounted}");
        cluster.restart(&cluster.coordinator).await?;
        cluster.start_agents().await?;
        let file = cluster.path().join("pattern.raw");
        PATTERN.write(&file)?;
        let words = refused(&cluster, &["image", "import", &file.to_string_lossy(), IMAGE]).await?;
        println!("{words}");
        ensure!(words.contains(IMAGE) || words.contains("store"), "{words}");
        let listed = cluster.treeboot(&["image", "list", "--json"]).await?;
        assert_eq!(
            serde_json::from_str::<serde_json::Value>(&listed)?,
            serde_json::json!([])
        );
        let space = nix::sys::statvfs::statvfs(&store)?;
        ensure!(
            space.blocks_available() > space.blocks() * 9 / 10,
            "the failed import keeps its room: {} of {} blocks are free",
            space.blocks_available(),
            space.blocks()
        );
        cluster.pass();
        Ok(())
    })
}
