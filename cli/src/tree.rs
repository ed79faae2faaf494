//! `treeboot tree IMAGE`: who reads an image from whom, one tree a stripe.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use serde::Serialize;
use treeboot_proto::v1;
use treeboot_types::ImageRef;

use crate::client::{Coordinator, Options, image_words};
use crate::failure::Failure;
use crate::output::{self, JsonFlag};

/// Show who reads an image from whom
///
/// One tree is drawn for each stripe. A host is pending (has a slot, cannot read yet), ready, or lost (silent; its
/// slot is freed when its lease ends).
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  treeboot tree debian\n  treeboot tree debian@2 --json | jq '.nodes | length'"
)]
pub(crate) struct TreeArgs {
    /// NAME or NAME@VERSION; without a version the newest
    image: ImageRef,
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

#[derive(Debug, Serialize)]
struct NodeJson {
    stripe: u32,
    host: Option<String>,
    portal: String,
    origin: bool,
    depth: u32,
    state: &'static str,
    parents: Vec<String>,
    children: u32,
    lease_left_ms: u64,
}

/// Runs the verb.
pub(crate) async fn run(options: &Options, args: TreeArgs) -> Result<(), Failure> {
    let tree = Coordinator::connect(options).await?.tree(&args.image).await?;
    if args.json.json {
        let image = tree.image.as_ref().and_then(|image| image.id.as_ref());
        return output::print_json(&TreeJson {
            image: image.map_or_else(|| image_words(&args.image), id_words),
            epoch: tree.epoch.into(),
            fan_out: tree.fan_out,
            nodes: tree
                .nodes
                .iter()
                .map(|node| NodeJson {
                    stripe: node.stripe,
                    host: (!node.host.is_empty()).then(|| node.host.clone()),
                    portal: node.portal.clone(),
                    origin: node.origin,
                    depth: node.depth,
                    state: state(node),
                    parents: node.parents.clone(),
                    children: node.children,
                    lease_left_ms: node.lease_left_ms,
                })
                .collect(),
        });
    }
    let mut text = String::new();
    if let Some(image) = &tree.image {
        let epoch = tree.epoch.unwrap_or_default();
        text += &format!(
            "{}  {}, fan-out {}, epoch {}.{}\n",
            image
                .id
                .as_ref()
                .map_or_else(|| image_words(&args.image), id_words),
            output::bytes(image.bytes),
            tree.fan_out,
            epoch.incarnation,
            epoch.counter,
        );
    }
    output::print_text(&(text + &draw(&tree.nodes)))
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

/// Draws one tree for each stripe, a newline behind each line. A node with several parents stands under the first;
/// nodes that no origin reaches come last, so that a damaged answer is still shown whole.
fn draw(nodes: &[v1::TreeNode]) -> String {
    let mut stripes: Vec<u32> = nodes.iter().map(|node| node.stripe).collect();
    stripes.sort_unstable();
    stripes.dedup();
    if stripes.is_empty() {
        return "no host is attached\n".to_owned();
    }
    let mut text = String::new();
    for stripe in &stripes {
        if stripes.len() > 1 {
            text += &format!("stripe {stripe}\n");
        }
        let nodes: Vec<&v1::TreeNode> = nodes.iter().filter(|node| node.stripe == *stripe).collect();
        text += &draw_stripe(&nodes);
    }
    text
}

fn draw_stripe(nodes: &[&v1::TreeNode]) -> String {
    let place: HashMap<&str, usize> = nodes
        .iter()
        .enumerate()
        .map(|(place, node)| (name(node), place))
        .collect();
    let mut children: Vec<Vec<usize>> = vec![Vec::new(); nodes.len()];
    for (child, node) in nodes.iter().enumerate().filter(|(_, node)| !node.origin) {
        let parent = node.parents.iter().find_map(|parent| place.get(parent.as_str()));
        if let Some(&parent) = parent.filter(|&&parent| parent != child) {
            children[parent].push(child);
        }
    }
    for list in &mut children {
        list.sort_by(|&a, &b| output::natural(name(nodes[a]), name(nodes[b])));
    }
    let mut order: Vec<usize> = (0..nodes.len()).collect();
    order.sort_by(|&a, &b| output::natural(name(nodes[a]), name(nodes[b])));
    let mut drawn = HashSet::new();
    let mut text = String::new();
    for &root in order.iter().filter(|&&root| nodes[root].origin) {
        draw_below(root, nodes, &children, &mut drawn, &mut text);
    }
    if drawn.len() < nodes.len() {
        text += "not under any origin:\n";
        // Those whose parent is not there at all first, so that a lost subtree keeps its shape.
        let is_child: HashSet<usize> = children.iter().flatten().copied().collect();
        let (bound, free): (Vec<usize>, Vec<usize>) =
            order.iter().partition(|place| is_child.contains(place));
        for root in free.into_iter().chain(bound) {
            if !drawn.contains(&root) {
                draw_below(root, nodes, &children, &mut drawn, &mut text);
            }
        }
    }
    text
}

/// Draws a node and all below it. Without recursion, so that no answer of a server can exhaust the stack.
fn draw_below(
    root: usize,
    nodes: &[&v1::TreeNode],
    children: &[Vec<usize>],
    drawn: &mut HashSet<usize>,
    text: &mut String,
) {
    // (node, what stands before its branch, its branch, what stands before its children's branches)
    let mut stack = vec![(root, String::new(), "", String::new())];
    while let Some((place, before, branch, below)) = stack.pop() {
        if !drawn.insert(place) {
            continue;
        }
        *text += &format!("{before}{branch}{}\n", label(nodes[place]));
        for (index, &child) in children[place].iter().enumerate().rev() {
            let last = index + 1 == children[place].len();
            let (branch, more) = if last {
                ("└─ ", "   ")
            } else {
                ("├─ ", "│  ")
            };
            stack.push((child, below.clone(), branch, format!("{below}{more}")));
        }
    }
}

fn label(node: &v1::TreeNode) -> String {
    let mut label = format!("{}  {}", output::printable(name(node)), state(node));
    if node.origin && !node.host.is_empty() {
        label += &format!(" {}", output::printable(&node.portal));
    }
    if state(node) == "lost" && node.lease_left_ms > 0 {
        label += &format!(
            ", lease ends in {}",
            output::duration(Duration::from_millis(node.lease_left_ms))
        );
    }
    if let [_, others @ ..] = node.parents.as_slice()
        && !others.is_empty()
    {
        label += &format!(", also under {}", output::printable(&others.join(", ")));
    }
    label
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A line is `[stripe/]name state [< parent[,parent]] [lease ms]`.
    fn check(input: &str, expect: &str) {
        let nodes: Vec<v1::TreeNode> = input
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .map(|line| {
                let words: Vec<&str> = line.split_whitespace().collect();
                let (stripe, host) = words[0].split_once('/').unwrap_or(("0", words[0]));
                let after = |word| words.iter().position(|&w| w == word).map(|at| words[at + 1]);
                let foreign = words[1] == "foreign";
                v1::TreeNode {
                    stripe: stripe.parse().unwrap(),
                    host: if foreign { String::new() } else { host.into() },
                    portal: if foreign {
                        host.into()
                    } else {
                        "10.0.0.1:3260".into()
                    },
                    origin: foreign || words[1] == "origin",
                    state: match words[1] {
                        "pending" => v1::AttachState::Pending,
                        _ => v1::AttachState::Ready,
                    }
                    .into(),
                    connected: words[1] != "lost" && !foreign,
                    parents: after("<").map_or(Vec::new(), |list| list.split(',').map(Into::into).collect()),
                    lease_left_ms: after("lease").map_or(0, |ms| ms.parse().unwrap()),
                    ..Default::default()
                }
            })
            .collect();
        let margin = expect
            .lines()
            .nth(1)
            .map_or(0, |line| line.len() - line.trim_start().len());
        let expect: String = expect
            .lines()
            .skip(1)
            .filter(|line| !line.trim().is_empty())
            .map(|line| format!("{}\n", line.get(margin..).unwrap_or("")))
            .collect();
        assert_eq!(draw(&nodes), expect, "\n{}", draw(&nodes));
    }

    #[test]
    fn a_tree_is_drawn_with_its_states() {
        check(
            "origin origin
             host-1 ready < origin
             host-2 ready < origin
             host-10 pending < host-1
             host-3 lost < host-1 lease 2500
             host-4 ready < host-2",
            "
            origin  origin 10.0.0.1:3260
            ├─ host-1  ready
            │  ├─ host-3  lost, lease ends in 2.50 s
            │  └─ host-10  pending
            └─ host-2  ready
               └─ host-4  ready
            ",
        );
    }

    #[test]
    fn each_stripe_has_a_tree() {
        check(
            "0/o origin
             0/a ready < o
             1/o origin
             1/b ready < o
             1/a ready < b",
            "
            stripe 0
            o  origin 10.0.0.1:3260
            └─ a  ready
            stripe 1
            o  origin 10.0.0.1:3260
            └─ b  ready
               └─ a  ready
            ",
        );
    }

    #[test]
    fn a_foreign_origin_goes_by_its_portal() {
        check(
            "[fd00::1]:3260 foreign
             a ready < [fd00::1]:3260",
            "
            [fd00::1]:3260  origin
            └─ a  ready
            ",
        );
    }

    #[test]
    fn several_parents_are_named_and_drawn_under_the_first() {
        check(
            "o origin
             a ready < o
             b ready < o
             c ready < a,b",
            "
            o  origin 10.0.0.1:3260
            ├─ a  ready
            │  └─ c  ready, also under b
            └─ b  ready
            ",
        );
    }

    #[test]
    fn what_no_origin_reaches_is_still_drawn_once_even_a_cycle() {
        check(
            "o origin
             child pending < gone-child
             gone-child ready < gone
             x ready < y
             y ready < x
             z ready < z",
            "
            o  origin 10.0.0.1:3260
            not under any origin:
            gone-child  ready
            └─ child  pending
            z  ready
            x  ready
            └─ y  ready
            ",
        );
    }

    #[test]
    fn nothing_attached_is_said() {
        check("", "\nno host is attached\n");
    }
}
