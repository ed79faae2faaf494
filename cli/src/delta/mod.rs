//! `treeboot delta …`: what VMs wrote.

mod export;
mod import;
mod qcow2;

use std::path::{Path, PathBuf};

use serde::Serialize;
use treeboot_block::layers::LayerReport;
use treeboot_block::{BootId, DeltaError};
use treeboot_proto::v1;
use treeboot_types::{HostName, VmName};

use crate::client::{Agent, Coordinator, Options};
use crate::failure::{Exit, Failure, chain};
use crate::output::{self, JsonFlag};
use crate::snapshot::{LayerJson, consistency};
use crate::vm::agent_with;

/// The unit in which a disk's blocks are counted.
const BLOCK_BYTES: u64 = 4096;

/// Verbs on deltas.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum DeltaVerb {
    Export(export::ExportArgs),
    Import(import::ImportArgs),
    /// Read all that a VM wrote, and say which layer is damaged and where
    #[command(
        after_help = "Example:\n  treeboot delta check web-1\n  treeboot delta check web-1 --offline /var/lib/treeboot/agent/deltas"
    )]
    Check {
        /// The VM's name
        vm: VmName,
        /// The host; looked up where it is left out
        #[arg(long)]
        host: Option<HostName>,
        /// Look at the files in this directory, of an agent that does not run
        #[arg(long, value_name = "DIR", conflicts_with = "host")]
        offline: Option<PathBuf>,
        #[command(flatten)]
        json: JsonFlag,
    },
}

/// A layer's check in `--json`.
#[derive(Debug, Serialize)]
struct CheckedJson {
    #[serde(flatten)]
    layer: LayerJson,
    base_blocks: u64,
    data_blocks: u64,
    zero_blocks: u64,
    /// In use for no block.
    stray_bytes: u64,
    damage: Vec<DamageJson>,
}

#[derive(Debug, Serialize)]
struct DamageJson {
    /// Of the disk, in bytes.
    offset: u64,
    bytes: u64,
    what: String,
}

/// Runs a verb.
pub(crate) async fn run(options: &Options, verb: DeltaVerb) -> Result<(), Failure> {
    let (vm, host, offline, json) = match verb {
        DeltaVerb::Export(args) => return export::run(options, args).await,
        DeltaVerb::Import(args) => return import::run(options, args).await,
        DeltaVerb::Check {
            vm,
            host,
            offline,
            json,
        } => (vm, host, offline, json),
    };
    let layers = match offline {
        Some(directory) => of_files(&directory, &vm)?,
        None => {
            let coordinator = Coordinator::connect(options).await?;
            let agent = agent_with(&coordinator, options, &vm, host).await?;
            of_agent(&agent, &vm).await?
        }
    };
    match json.json {
        true => output::print_json(&layers)?,
        false => output::print_text(&render(&vm, &layers))?,
    }
    let damaged = layers.iter().map(|layer| layer.damage.len()).sum::<usize>();
    match damaged {
        0 => Ok(()),
        places => Err(Failure::new(
            Exit::Failed,
            format!("what VM '{vm}' wrote is damaged in {places} places"),
        )
        .advice(
            "those bytes are not served; restore the file from a copy, roll back to a snapshot below it, or write them anew",
        )),
    }
}

async fn of_agent(agent: &Agent, vm: &VmName) -> Result<Vec<CheckedJson>, Failure> {
    let doing = format!("check what VM '{vm}' wrote on host '{}'", agent.host);
    let request = v1::CheckDeltaRequest { vm: vm.to_string() };
    let answer = agent
        .call(&doing, agent.client.clone().check_delta(request))
        .await?;
    let layers = answer.layers.into_iter().map(|mut layer| {
        let report = layer.report.take().unwrap_or_default();
        let damage = report.damage.into_iter().map(|damage| DamageJson {
            offset: damage.offset,
            bytes: damage.bytes,
            what: damage.what,
        });
        CheckedJson {
            damage: damage.collect(),
            layer: LayerJson::of(&layer),
            base_blocks: report.base_blocks,
            data_blocks: report.data_blocks,
            zero_blocks: report.zero_blocks,
            stray_bytes: report.stray_bytes,
        }
    });
    Ok(layers.collect())
}

fn of_files(directory: &Path, vm: &VmName) -> Result<Vec<CheckedJson>, Failure> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map_err(|error| Failure::io("cannot tell this boot from others", &error))?;
    let boot: BootId = boot
        .parse()
        .map_err(|error: treeboot_block::BootIdError| Failure::new(Exit::Failed, error.to_string()))?;
    let layers = treeboot_block::layers::check(directory, vm, boot).map_err(|error| {
        let exit = match &error {
            DeltaError::Missing { .. } => Exit::NotFound,
            DeltaError::InUse { .. } => Exit::Refused,
            _ => Exit::Failed,
        };
        let failure = Failure::new(exit, chain(&error));
        match exit {
            Exit::Refused => failure.advice("its agent runs: leave --offline out, and it is asked"),
            _ => failure,
        }
    })?;
    Ok(layers.into_iter().map(of_file).collect())
}

fn of_file(layer: LayerReport) -> CheckedJson {
    let LayerReport { check, snapshot, .. } = layer;
    CheckedJson {
        base_blocks: check.base_blocks,
        data_blocks: check.data_blocks,
        zero_blocks: check.zero_blocks,
        stray_bytes: check.stray_bytes,
        damage: check
            .damage
            .into_iter()
            .map(|damage| DamageJson {
                offset: damage.offset,
                bytes: damage.bytes,
                what: damage.what,
            })
            .collect(),
        layer: LayerJson {
            layer: layer.layer,
            parent: layer.parent,
            created_unix_ms: snapshot.as_ref().map(|snapshot| snapshot.created_unix_ms),
            consistency: snapshot.as_ref().map(|snapshot| consistency(snapshot.frozen)),
            snapshot: snapshot.map(|snapshot| snapshot.name.to_string()),
            live: layer.live,
            allocated_bytes: layer.allocated_bytes,
            sealed: check.sealed,
        },
    }
}

fn render(vm: &VmName, layers: &[CheckedJson]) -> String {
    let mut text = String::new();
    for checked in layers {
        let layer = &checked.layer;
        text += &format!(
            "layer {} of '{vm}' {}: {} of data, {} of zeroes, the rest is what lies below{}{}\n",
            layer.layer,
            layer.words(),
            output::bytes(checked.data_blocks * BLOCK_BYTES),
            output::bytes(checked.zero_blocks * BLOCK_BYTES),
            match checked.stray_bytes {
                0 => String::new(),
                bytes => format!("; {} in use for nothing", output::bytes(bytes)),
            },
            match layer.sealed {
                true => "; all checksums compared",
                false => "; no checksums: it is still written to",
            },
        );
        for damage in &checked.damage {
            text += &format!(
                "  damaged: {} at byte {} of the disk: {}\n",
                output::bytes(damage.bytes),
                damage.offset,
                damage.what
            );
        }
    }
    text
}
