//! An agent that is killed again and again, wherever it is in its work.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use treeboot_agent::apply::Applier;
use treeboot_agent::conformance::Rig as _;
use treeboot_agent::journal::Journal;
use treeboot_agent::plane::Scope;
use treeboot_agent::plane::kernel::KernelPlane;
use treeboot_agent::stack::{Access, Backing, Content, Sources, Wanted, WantedBase, WantedDisk};
use treeboot_dm::group::Kind;
use treeboot_types::{HostName, ImageId, VmName};

use super::rig;

const KILLS: u64 = 20;
/// Building and removing take one to three seconds in a guest, so that kills fall into both.
const LONGEST_LIFE_MS: u64 = 4000;
/// A different one shows other moments.
const SEED: u64 = 20;

fn vms() -> [VmName; 2] {
    ["vm-0", "vm-1"].map(|name| name.parse().expect("a name"))
}

fn everything(id: &ImageId, content: Content, sources: &Sources) -> Wanted {
    let disk = WantedDisk {
        digest: content.digest,
        bytes: content.bytes,
    };
    let child: HostName = "child".parse().expect("a name");
    Wanted {
        bases: [(
            content.digest,
            WantedBase {
                content,
                backing: Backing::Cache,
                sources: sources.clone(),
                exports: [(id.clone(), Access::Hosts([child].into()))].into(),
            },
        )]
        .into(),
        disks: vms().map(|vm| (vm, disk)).into(),
        ..Wanted::default()
    }
}

fn nothing() -> Wanted {
    Wanted {
        doomed_disks: vms().into(),
        ..Wanted::default()
    }
}

/// The helper: builds and removes until it is killed.
pub(super) fn agent(args: &[String]) -> Result<()> {
    let [dir, id, content, sources] = args else {
        bail!("DIR IMAGE CONTENT SOURCES");
    };
    let (dir, id) = (Path::new(dir), id.parse()?);
    let (content, sources) = (serde_json::from_str(content)?, serde_json::from_str(sources)?);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let applier = Applier {
            plane: Arc::new(KernelPlane::open(rig::settings(dir, &Some(Kind::Bcache).into()))?),
            journal: Journal::open(dir)?.0,
        };
        loop {
            applier
                .reach(&Scope::All, &everything(&id, content, &sources))
                .await
                .context("building")?;
            applier.reach(&Scope::All, &nothing()).await.context("removing")?;
        }
    })
}

/// The case.
pub(super) async fn twenty_times() {
    let mut rig = rig::rig(Some(Kind::Bcache)).await;
    let image = rig.image(0);
    let json = |value: serde_json::Result<String>| value.expect("JSON");
    let mut state = std::env::var("TREEBOOT_SEED").map_or(SEED, |seed| seed.parse().expect("a number"));
    println!("TREEBOOT_SEED={state}");
    rig.away();
    for kill in 0..KILLS {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let life = Duration::from_millis(state % LONGEST_LIFE_MS);
        let mut command = Command::new(std::env::current_exe().expect("a path"));
        command
            .args(["helper", "plane-faults", "agent"])
            .arg(&rig.dir)
            .arg(image.id.to_string())
            .arg(json(serde_json::to_string(&image.content)))
            .arg(json(serde_json::to_string(&image.sources[0])));
        let mut child = tokio::process::Command::from(command)
            .kill_on_drop(true)
            .spawn()
            .expect("started");
        if let Ok(ended) = tokio::time::timeout(life, child.wait()).await {
            panic!("kill {kill}: the agent ended by itself: {ended:?}");
        }
        child.kill().await.expect("killed");
    }
    rig.back().await;
    let applier = Applier {
        plane: rig.plane(),
        journal: rig.journal(),
    };
    let all = everything(&image.id, image.content, &image.sources[0]);
    applier.reach(&Scope::All, &all).await.expect("built");
    for vm in &vms() {
        let read = rig.read_disk(vm, 0, image.bytes.len()).await.expect("readable");
        assert!(read == *image.bytes, "the disk of {vm} differs");
    }
    applier.reach(&Scope::All, &nothing()).await.expect("removed");
    drop(applier);
    assert_eq!(rig.residue().await, Vec::<String>::new());
    let found = rig.plane().inspect(&Scope::All).await.expect("a look");
    assert_eq!(found, treeboot_agent::stack::Found::default());
}
