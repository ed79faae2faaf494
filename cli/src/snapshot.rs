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
    #[command(
        after_help = "A guest that runs qemu-guest-agent holds its file systems still for that moment, so that the snapshot holds them as after an \
                      orderly end ('frozen'). Else it holds what a power failure would leave ('crash-consistent').\n\n\
                      Example:\n  treeboot snapshot create web-1 before-upgrade\n  treeboot snapshot create web-1 before-upgrade --freeze require"
    )]
    Create {
        /// The VM's name
        vm: VmName,
        /// The snapshot's name
        snapshot: SnapshotName,
        /// Whether the guest is to hold its file systems still: where its agent answers, or else not at all, or never
        #[arg(long, value_enum, default_value_t, value_name = "WHEN")]
        freeze: FreezeArg,
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

/// When a guest is to hold its file systems still.
#[derive(Debug, Clone, Copy, Default, clap::ValueEnum)]
pub(crate) enum FreezeArg {
    /// Where a guest agent answers
    #[default]
    Auto,
    /// There is no snapshot otherwise
    Require,
    /// The guest is not asked
    Never,
}

impl From<FreezeArg> for v1::Freeze {
    fn from(freeze: FreezeArg) -> Self {
        match freeze {
            FreezeArg::Auto => Self::Auto,
            FreezeArg::Require => Self::Require,
            FreezeArg::Never => Self::Never,
        }
    }
}

/// What `snapshot create` says in `--json`.
#[derive(Debug, Serialize)]
struct TakenJson {
    #[serde(flatten)]
    layer: LayerJson,
    /// Why the guest's file systems were not frozen; `null` where they were.
    not_frozen: Option<String>,
    /// Why they may still be.
    trouble: Option<String>,
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
    /// frozen, or crash-consistent; `null` where it is no snapshot.
    pub(crate) consistency: Option<&'static str>,
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
            consistency: named.then(|| consistency(layer.frozen)),
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

/// What a snapshot's file systems are like.
pub(crate) fn consistency(frozen: bool) -> &'static str {
    match frozen {
        true => "frozen",
        false => "crash-consistent",
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
        ("CONSISTENCY", Align::Left),
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
            layer.consistency.unwrap_or_default().to_owned(),
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
            freeze,
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
                freeze: v1::Freeze::from(freeze).into(),
            };
            let answer = agent.call(&doing, agent.client.clone().snapshot(request)).await?;
            let layer = answer.layer.ok_or_else(|| incomplete(&agent.peer, "layer"))?;
            let row = LayerJson::of(&layer);
            let said = |text: String| (!text.is_empty()).then_some(text);
            let (not_frozen, trouble) = (said(answer.not_frozen), said(answer.trouble));
            if json.json {
                return output::print_json(&TakenJson {
                    layer: row,
                    not_frozen,
                    trouble,
                });
            }
            let how = match answer.created {
                true => "took",
                false => "nothing was written since",
            };
            let mut text = format!(
                "{how} '{snapshot}' of '{vm}' on host '{}': {} in this layer, {}",
                agent.host,
                output::bytes(row.allocated_bytes),
                consistency(layer.frozen)
            );
            if let Some(why) = not_frozen.filter(|_| answer.created) {
                text += &format!(" ({})", output::printable(&why));
            }
            text.push('\n');
            if let Some(trouble) = trouble {
                text += &format!("  {}\n", output::printable(&trouble));
            }
            output::print_text(&text)
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
