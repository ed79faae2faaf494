//! `treeboot describe VM`: one VM with all that is known of it.

use serde::Serialize;
use treeboot_proto::v1;
use treeboot_types::{HostName, VmName};

use crate::client::{Coordinator, Options};
use crate::failure::Failure;
use crate::output::{self, JsonFlag};
use crate::snapshot::{self, LayerJson};
use crate::vm::{VmJson, agent_with};

/// Describe one VM: its image, disk, layers, front ends, and where its image is read
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  treeboot describe web-1\n  treeboot describe web-1 --json | jq .layers")]
pub(crate) struct DescribeArgs {
    /// The VM's name
    name: VmName,
    /// The host; looked up where it is left out
    #[arg(long)]
    host: Option<HostName>,
    #[command(flatten)]
    json: JsonFlag,
}

/// A VM in `--json`: as in `vm list`, and more.
#[derive(Debug, Serialize)]
struct Described {
    #[serde(flatten)]
    vm: VmJson,
    layers: Vec<LayerJson>,
    /// Where the image is read; empty on its origin.
    parents: Vec<ParentJson>,
}

#[derive(Debug, Serialize)]
struct ParentJson {
    stripe: u32,
    host: String,
    portal: String,
    /// `false`: a fallback.
    active: bool,
}

fn parents(attachment: &v1::Attachment) -> Vec<ParentJson> {
    let stripes = attachment.stripes.iter();
    stripes
        .flat_map(|stripe| {
            let of = |active| {
                move |parent: &v1::Parent| ParentJson {
                    stripe: stripe.stripe,
                    host: parent.host.clone(),
                    portal: parent
                        .endpoint
                        .as_ref()
                        .map(|endpoint| endpoint.portal.clone())
                        .unwrap_or_default(),
                    active,
                }
            };
            let active = stripe.active.iter().map(of(true));
            active
                .chain(stripe.fallbacks.iter().map(of(false)))
                .collect::<Vec<_>>()
        })
        .collect()
}

/// `describe`.
pub(crate) async fn run(options: &Options, args: DescribeArgs) -> Result<(), Failure> {
    let coordinator = Coordinator::connect(options).await?;
    let agent = agent_with(&coordinator, options, &args.name, args.host).await?;
    let doing = format!("describe VM '{}' on host '{}'", args.name, agent.host);
    let request = v1::DescribeRequest {
        vm: args.name.to_string(),
    };
    let answer = agent.call(&doing, agent.client.clone().describe(request)).await?;
    let described = Described {
        layers: answer.layers.iter().map(LayerJson::of).collect(),
        parents: answer.attachment.as_ref().map(parents).unwrap_or_default(),
        vm: VmJson::of(&agent.host, answer.run, answer.disk),
    };
    match args.json.json {
        true => output::print_json(&described),
        false => output::print_text(&render(&described)),
    }
}

fn render(described: &Described) -> String {
    let vm = &described.vm;
    let mut text = format!(
        "{} on host '{}': {}, {} over {}\n  disk       {}\n  front ends {} logged in; {} read, {} written since the agent's start\n",
        vm.name,
        vm.host,
        vm.state,
        output::bytes(vm.bytes),
        vm.image,
        vm.place(),
        vm.sessions,
        output::bytes(vm.read_bytes),
        output::bytes(vm.written_bytes),
    );
    if let Some(to) = &vm.moves_to {
        text += &format!("  moves to   host '{to}'\n");
    }
    if let Some(error) = &vm.error {
        text += &format!("  failed     {error}\n");
    }
    for parent in described.parents.iter().filter(|parent| parent.active) {
        text += &format!(
            "  reads      stripe {} from {} ({})\n",
            parent.stripe,
            match parent.host.is_empty() {
                true => "a target that is no host's",
                false => &parent.host,
            },
            parent.portal
        );
    }
    let limit = vm.limit_bytes.map_or_else(String::new, |limit| {
        let (data, limit) = (output::bytes(vm.data_bytes), output::bytes(limit));
        match vm.limit_level {
            Some("enough") | None => format!("; {data} of blocks, of {limit} that it may write"),
            Some(level) => format!("; {data} of blocks, of {limit} that it may write: {level}"),
        }
    });
    text += &format!("  writes     {} in use{limit}\n", output::bytes(vm.delta_bytes));
    if !described.layers.is_empty() {
        text += "layers, the oldest first\n";
        for line in snapshot::table(&described.layers).lines() {
            text += &format!("  {line}\n");
        }
    }
    text
}
