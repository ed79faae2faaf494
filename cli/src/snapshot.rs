//! `treeboot snapshot …`: points in time of a VM's disk.

use serde::Serialize;
use treeboot_proto::v1;
use treeboot_types::{HostName, SnapshotName, VmName};

use crate::client::{Coordinator, Options, incomplete};
use crate::failure::{Exit, Failure};
use crate::output::{self, Align, JsonFlag, Table};
use crate::vm::agent_with;

/// Verbs on snapshots.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum SnapshotVerb {
    /// Take a snapshot of a VM's disk; the VM goes on meanwhile
    #[command(after_help = "Example:\n  treeboot snapshot create web-1 before-upgrade")]
    Create {
        /// The VM's name
        vm: VmName,
        /// The snapshot's name
        snapshot: SnapshotName,
        /// The host; looked up where it is left out
        #[arg(long)]
        host: Option<HostName>,
        #[command(flatten)]
        json: JsonFlag,
    },
    /// List the snapshots of a VM's disk
    #[command(after_help = "Example:\n  treeboot snapshot list web-1")]
    List {
        /// The VM's name
        vm: VmName,
        /// The host; looked up where it is left out
        #[arg(long)]
        host: Option<HostName>,
        #[command(flatten)]
        json: JsonFlag,
    },
    /// Give up what a VM wrote since a snapshot; the VM must be stopped
    #[command(
        after_help = "Example:\n  treeboot vm stop web-1 && treeboot snapshot rollback web-1 before-upgrade"
    )]
    Rollback {
        /// The VM's name
        vm: VmName,
        /// The snapshot's name
        snapshot: SnapshotName,
        /// The host; looked up where it is left out
        #[arg(long)]
        host: Option<HostName>,
    },
    /// Delete a snapshot; the VM's disk and its other snapshots stay as they are
    #[command(after_help = "Example:\n  treeboot snapshot delete web-1 before-upgrade")]
    Delete {
        /// The VM's name
        vm: VmName,
        /// The snapshot's name
        snapshot: SnapshotName,
        /// The host; looked up where it is left out
        #[arg(long)]
        host: Option<HostName>,
    },
}

/// A layer in `--json`.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct LayerJson {
    pub(crate) layer: u32,
    /// What it stands on; `null`: the base.
    pub(crate) parent: Option<u32>,
    /// Its snapshot's name; `null` where it has none.
    pub(crate) snapshot: Option<String>,
    pub(crate) created_unix_ms: Option<u64>,
    pub(crate) live: bool,
    pub(crate) allocated_bytes: u64,
    /// Its blocks have checksums.
    pub(crate) sealed: bool,
}

impl LayerJson {
    pub(crate) fn of(layer: &v1::Layer) -> Self {
        let named = !layer.snapshot.is_empty();
        Self {
            layer: layer.number,
            parent: layer.parent,
            snapshot: named.then(|| layer.snapshot.clone()),
            created_unix_ms: named.then_some(layer.created_unix_ms),
            live: layer.live,
            allocated_bytes: layer.allocated_bytes,
            sealed: layer.sealed,
        }
    }

    /// What a person calls it.
    pub(crate) fn words(&self) -> String {
        match (&self.snapshot, self.live) {
            (Some(snapshot), _) => snapshot.clone(),
            (None, true) => "(now)".into(),
            (None, false) => "(being merged)".into(),
        }
    }
}

/// Layers as a table.
pub(crate) fn table(layers: &[LayerJson]) -> String {
    let mut table = Table::new(&[
        ("SNAPSHOT", Align::Left),
        ("LAYER", Align::Right),
        ("OVER", Align::Right),
        ("SIZE", Align::Right),
        ("CHECKSUMS", Align::Left),
    ]);
    for layer in layers {
        table.row([
            layer.words(),
            layer.layer.to_string(),
            layer
                .parent
                .map_or_else(|| "base".into(), |parent| parent.to_string()),
            output::bytes(layer.allocated_bytes),
            if layer.sealed { "yes" } else { "no" }.to_owned(),
        ]);
    }
    table.render()
}

/// Runs a verb.
pub(crate) async fn run(options: &Options, verb: SnapshotVerb) -> Result<(), Failure> {
    let coordinator = Coordinator::connect(options).await?;
    match verb {
        SnapshotVerb::Create {
            vm,
            snapshot,
            host,
            json,
        } => {
            let agent = agent_with(&coordinator, options, &vm, host).await?;
            let doing = format!(
                "take the snapshot '{snapshot}' of VM '{vm}' on host '{}'",
                agent.host
            );
            let request = v1::SnapshotRequest {
                vm: vm.to_string(),
                snapshot: snapshot.to_string(),
            };
            let answer = agent.call(&doing, agent.client.clone().snapshot(request)).await?;
            let layer = answer.layer.ok_or_else(|| incomplete(&agent.peer, "layer"))?;
            let row = LayerJson::of(&layer);
            if json.json {
                return output::print_json(&row);
            }
            let how = match answer.created {
                true => "took",
                false => "nothing was written since",
            };
            output::print_text(&format!(
                "{how} '{snapshot}' of '{vm}' on host '{}': {} in this layer\n",
                agent.host,
                output::bytes(row.allocated_bytes)
            ))
        }
        SnapshotVerb::List { vm, host, json } => {
            let agent = agent_with(&coordinator, options, &vm, host).await?;
            let doing = format!("list the snapshots of VM '{vm}' on host '{}'", agent.host);
            let request = v1::ListSnapshotsRequest { vm: vm.to_string() };
            let answer = agent
                .call(&doing, agent.client.clone().list_snapshots(request))
                .await?;
            let rows: Vec<_> = answer.layers.iter().map(LayerJson::of).collect();
            let snapshots: Vec<_> = rows.iter().filter(|row| row.snapshot.is_some()).collect();
            if json.json {
                return output::print_json(&snapshots);
            }
            if snapshots.is_empty() {
                return output::print_text(&format!(
                    "'{vm}' has no snapshot; take one with 'treeboot snapshot create {vm} NAME'\n"
                ));
            }
            output::print_text(&table(&rows))
        }
        SnapshotVerb::Rollback { vm, snapshot, host } => {
            let agent = agent_with(&coordinator, options, &vm, host).await?;
            let doing = format!("roll VM '{vm}' on host '{}' back to '{snapshot}'", agent.host);
            let request = v1::RollBackRequest {
                vm: vm.to_string(),
                snapshot: snapshot.to_string(),
            };
            agent
                .call(&doing, agent.client.clone().roll_back(request))
                .await
                .map_err(|failure| match failure.exit {
                    Exit::Refused => failure.advice(format!("stop it: treeboot vm stop {vm}")),
                    _ => failure,
                })?;
            output::print_text(&format!(
                "'{vm}' on host '{}' is as it was at '{snapshot}'\n",
                agent.host
            ))
        }
        SnapshotVerb::Delete { vm, snapshot, host } => {
            let agent = agent_with(&coordinator, options, &vm, host).await?;
            let doing = format!(
                "delete the snapshot '{snapshot}' of VM '{vm}' on host '{}'",
                agent.host
            );
            let request = v1::DeleteSnapshotRequest {
                vm: vm.to_string(),
                snapshot: snapshot.to_string(),
            };
            agent
                .call(&doing, agent.client.clone().delete_snapshot(request))
                .await?;
            output::print_text(&format!(
                "deleted '{snapshot}' of '{vm}' on host '{}'\n",
                agent.host
            ))
        }
    }
}
