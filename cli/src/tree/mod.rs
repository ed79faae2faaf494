//! `treeboot tree IMAGE`: who reads an image from whom, one tree a stripe; once, or followed live.

mod draw;
mod watch;

use serde::Serialize;
use treeboot_proto::v1;
use treeboot_types::ImageRef;

use crate::client::{Coordinator, Options, image_words};
use crate::failure::Failure;
use crate::output::{self, JsonFlag};

/// Show who reads an image from whom
///
/// One tree is drawn for each stripe, with each host's zone and rack. A host is pending (has a slot, cannot read yet), ready, or
/// lost (silent; its slot is freed when its lease ends). An arrow stands at a host over which a stripe comes into a rack or a zone.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  treeboot tree debian\n  treeboot tree debian --watch\n  treeboot tree debian@2 --json | jq '.nodes | length'"
)]
pub(crate) struct TreeArgs {
    /// NAME or NAME@VERSION; without a version the newest
    image: ImageRef,
    /// Draw so many levels below the origins, and say how many hosts are below them
    #[arg(long, value_name = "LEVELS")]
    depth: Option<usize>,
    /// Follow the tree until Ctrl-C: drawn anew on a terminal, elsewhere a line for each change
    #[arg(long)]
    pub(crate) watch: bool,
    #[command(flatten)]
    json: JsonFlag,
}

/// `--json` of `tree`.
#[derive(Debug, Serialize)]
struct TreeJson {
    image: String,
    epoch: EpochJson,
    fan_out: u32,
    nodes: Vec<NodeJson>,
}

/// An epoch, whose parts are compared in this order.
#[derive(Debug, Serialize)]
pub(crate) struct EpochJson {
    incarnation: u64,
    counter: u64,
}

impl From<Option<v1::Epoch>> for EpochJson {
    fn from(epoch: Option<v1::Epoch>) -> Self {
        let epoch = epoch.unwrap_or_default();
        Self {
            incarnation: epoch.incarnation,
            counter: epoch.counter,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct NodeJson {
    stripe: u32,
    host: Option<String>,
    portal: String,
    origin: bool,
    depth: u32,
    state: &'static str,
    zone: Option<String>,
    rack: Option<String>,
    weight: u32,
    parents: Vec<String>,
    children: u32,
    lease_left_ms: u64,
}

impl From<&v1::TreeNode> for NodeJson {
    fn from(node: &v1::TreeNode) -> Self {
        let said = |word: &String| (!word.is_empty()).then(|| word.clone());
        Self {
            stripe: node.stripe,
            host: said(&node.host),
            portal: node.portal.clone(),
            origin: node.origin,
            depth: node.depth,
            state: state(node),
            zone: said(&node.zone),
            rack: said(&node.rack),
            weight: node.weight,
            parents: node.parents.clone(),
            children: node.children,
            lease_left_ms: node.lease_left_ms,
        }
    }
}

/// Runs the verb.
pub(crate) async fn run(options: &Options, args: TreeArgs) -> Result<(), Failure> {
    let coordinator = Coordinator::connect(options).await?;
    if args.watch {
        return watch::run(&coordinator, &args).await;
    }
    let tree = coordinator.tree(&args.image).await?;
    if args.json.json {
        let image = tree.image.as_ref().and_then(|image| image.id.as_ref());
        return output::print_json(&TreeJson {
            image: image.map_or_else(|| image_words(&args.image), id_words),
            epoch: tree.epoch.into(),
            fan_out: tree.fan_out,
            nodes: tree.nodes.iter().map(Into::into).collect(),
        });
    }
    let text = title(&args.image, &tree) + &draw::draw(&tree.nodes, args.depth);
    output::print_text(&text)
}

/// The line above all stripes.
fn title(asked: &ImageRef, tree: &v1::GetTreeResponse) -> String {
    let Some(image) = &tree.image else {
        return String::new();
    };
    let epoch = tree.epoch.unwrap_or_default();
    format!(
        "{}  {}, fan-out {}, epoch {}.{}\n",
        image.id.as_ref().map_or_else(|| image_words(asked), id_words),
        output::bytes(image.bytes),
        tree.fan_out,
        epoch.incarnation,
        epoch.counter,
    )
}

/// `name@version`.
pub(crate) fn id_words(id: &v1::ImageId) -> String {
    format!("{}@{}", output::printable(&id.name), id.version)
}

/// One word for where a node stands: `origin`, `pending`, `ready` or `lost`.
fn state(node: &v1::TreeNode) -> &'static str {
    match (node.connected, node.state()) {
        // Nobody beats for a foreign origin, so its silence says nothing.
        _ if node.origin && (node.connected || node.host.is_empty()) => "origin",
        (false, _) => "lost",
        (true, v1::AttachState::Ready) => "ready",
        (true, _) => "pending",
    }
}

/// How others name a node: its host, or the portal of a foreign origin.
fn name(node: &v1::TreeNode) -> &str {
    if node.host.is_empty() {
        &node.portal
    } else {
        &node.host
    }
}
