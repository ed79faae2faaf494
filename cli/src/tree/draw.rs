//! Trees as text. States and places stand in columns of their own, so that what is wrong catches the eye among hundreds of hosts.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::time::Duration;

use treeboot_proto::v1;

use super::{name, state};
use crate::output;

/// Beyond this width of names the columns are ragged rather than far away.
const MAX_NAME_COLUMN: usize = 48;

/// A line of a drawing.
struct Line {
    /// Branches and name.
    name: String,
    state: &'static str,
    /// Over it a stripe comes into a rack or a zone.
    arrow: bool,
    more: String,
}

/// One stripe, ready to be drawn.
struct Stripe<'a> {
    nodes: Vec<&'a v1::TreeNode>,
    /// Of each node, by their names.
    children: Vec<Vec<usize>>,
    /// Where each node stands under its first parent that is there.
    parent: Vec<Option<usize>>,
    /// Levels that are drawn below the origins.
    levels: usize,
}

/// Draws one tree for each stripe, a newline behind each line, down to `levels` below the origins. A node with several parents
/// stands under the first; nodes that no origin reaches come last, so that a damaged answer is still shown whole.
pub(super) fn draw(nodes: &[v1::TreeNode], levels: Option<usize>) -> String {
    let stripes: BTreeSet<u32> = nodes.iter().map(|node| node.stripe).collect();
    if stripes.is_empty() {
        return "no host is attached\n".to_owned();
    }
    let mut text = String::new();
    let mut arrows = false;
    for number in &stripes {
        let stripe = Stripe::new(nodes.iter().filter(|node| node.stripe == *number), levels);
        if stripes.len() > 1 {
            text += &format!("stripe {number}: ");
        }
        text += &stripe.summary();
        let lines = stripe.lines();
        arrows |= lines.iter().any(|line| line.arrow);
        text += &render(&lines);
    }
    if arrows {
        text += "→ over this host the stripe comes into its rack or zone\n";
    }
    text
}

/// The deepest level of any stripe.
pub(super) fn deepest(nodes: &[v1::TreeNode]) -> usize {
    nodes.iter().map(|node| node.depth as usize).max().unwrap_or(0)
}

impl<'a> Stripe<'a> {
    fn new(nodes: impl Iterator<Item = &'a v1::TreeNode>, levels: Option<usize>) -> Self {
        let mut nodes: Vec<&v1::TreeNode> = nodes.collect();
        nodes.sort_by(|a, b| output::natural(name(a), name(b)));
        let place: HashMap<&str, usize> = (0..)
            .zip(&nodes)
            .map(|(place, node)| (name(node), place))
            .collect();
        let mut children: Vec<Vec<usize>> = vec![Vec::new(); nodes.len()];
        let mut above = vec![None; nodes.len()];
        for (child, node) in nodes.iter().enumerate().filter(|(_, node)| !node.origin) {
            let parent = node.parents.iter().find_map(|parent| place.get(parent.as_str()));
            if let Some(&parent) = parent.filter(|&&parent| parent != child) {
                children[parent].push(child);
                above[child] = Some(parent);
            }
        }
        Self {
            nodes,
            children,
            parent: above,
            levels: levels.unwrap_or(usize::MAX),
        }
    }

    fn summary(&self) -> String {
        let hosts = || self.nodes.iter().filter(|node| !node.origin);
        let deepest = hosts().map(|node| node.depth).max().unwrap_or(0);
        counted(hosts().copied(), &format!(", {deepest} deep")) + "\n"
    }

    fn lines(&self) -> Vec<Line> {
        let mut drawn = HashSet::new();
        let mut lines = Vec::new();
        let all = 0..self.nodes.len();
        for root in all.clone().filter(|&root| self.nodes[root].origin) {
            self.below(root, &mut drawn, &mut lines);
        }
        if drawn.len() < self.nodes.len() {
            lines.push(Line {
                name: "not under any origin:".into(),
                state: "",
                arrow: false,
                more: String::new(),
            });
            // Those whose parent is not there at all first, so that a lost subtree keeps its shape.
            let (bound, free): (Vec<usize>, Vec<usize>) =
                all.partition(|&place| self.parent[place].is_some());
            for root in free.into_iter().chain(bound) {
                if !drawn.contains(&root) {
                    self.below(root, &mut drawn, &mut lines);
                }
            }
        }
        lines
    }

    /// A node and all below it. Without recursion, so that no answer of a server can exhaust the stack.
    fn below(&self, root: usize, drawn: &mut HashSet<usize>, lines: &mut Vec<Line>) {
        // (node, its level, what stands before its branch, its branch, what stands before its children's branches)
        let mut stack = vec![(root, 0, String::new(), "", String::new())];
        while let Some((place, level, before, branch, below)) = stack.pop() {
            if !drawn.insert(place) {
                continue;
            }
            lines.push(self.line(place, format!("{before}{branch}")));
            let children = &self.children[place];
            if level >= self.levels && !children.is_empty() {
                let hidden = self.hide(place, drawn);
                let words = counted(hidden.iter().map(|&place| self.nodes[place]), " below");
                lines.push(Line {
                    name: format!("{below}└─ … {words}"),
                    state: "",
                    arrow: false,
                    more: String::new(),
                });
                continue;
            }
            for (index, &child) in children.iter().enumerate().rev() {
                let last = index + 1 == children.len();
                let (branch, more) = if last {
                    ("└─ ", "   ")
                } else {
                    ("├─ ", "│  ")
                };
                stack.push((child, level + 1, below.clone(), branch, format!("{below}{more}")));
            }
        }
    }

    /// All below a node, which count as drawn.
    fn hide(&self, place: usize, drawn: &mut HashSet<usize>) -> Vec<usize> {
        let mut hidden = Vec::new();
        let mut stack = self.children[place].clone();
        while let Some(place) = stack.pop() {
            if drawn.insert(place) {
                hidden.push(place);
                stack.extend(&self.children[place]);
            }
        }
        hidden
    }

    fn line(&self, place: usize, branches: String) -> Line {
        let node = self.nodes[place];
        let state = state(node);
        let mut more = Vec::new();
        let label = |key: &str, value: &str| {
            (!value.is_empty()).then(|| format!("{key} {}", output::printable(value)))
        };
        if node.origin && !node.host.is_empty() {
            more.push(output::printable(&node.portal));
        }
        more.extend(label("zone", &node.zone));
        more.extend(label("rack", &node.rack));
        if node.weight > 1 {
            more.push(format!("weight {}", node.weight));
        }
        if state == "lost" && node.lease_left_ms > 0 {
            let left = Duration::from_millis(node.lease_left_ms);
            more.push(format!("lease ends in {}", output::duration(left)));
        }
        if let [_, others @ ..] = node.parents.as_slice()
            && !others.is_empty()
        {
            more.push(format!("also under {}", output::printable(&others.join(", "))));
        }
        let parent = self.parent[place].map(|parent| self.nodes[parent]);
        let arrow = parent.is_some_and(|parent| {
            let into_rack = !node.rack.is_empty() && node.rack != parent.rack;
            let into_zone = node.zone != parent.zone && (!node.zone.is_empty() || !node.rack.is_empty());
            into_rack || into_zone
        });
        Line {
            name: branches + &output::printable(name(node)),
            state,
            arrow,
            more: more.join(", "),
        }
    }
}

/// `12 hosts, 3 deep: 10 ready, 1 pending, 1 lost`, without the states that nobody is in.
fn counted<'a>(hosts: impl Iterator<Item = &'a v1::TreeNode>, more: &str) -> String {
    let states: Vec<&str> = hosts.map(state).collect();
    let words = ["ready", "pending", "lost", "origin"].iter().filter_map(|word| {
        let count = states.iter().filter(|state| *state == word).count();
        (count > 0).then(|| format!("{count} {word}"))
    });
    let words: Vec<String> = words.collect();
    let colon = if words.is_empty() { "" } else { ": " };
    format!(
        "{}{more}{colon}{}",
        output::plural(states.len(), "host"),
        words.join(", ")
    )
}

/// The lines with their columns under each other.
fn render(lines: &[Line]) -> String {
    let width = |text: &str| text.chars().count();
    let named = lines.iter().filter(|line| !line.state.is_empty());
    let names = named
        .clone()
        .map(|line| width(&line.name))
        .max()
        .unwrap_or(0)
        .min(MAX_NAME_COLUMN);
    let states = named.map(|line| line.state.len()).max().unwrap_or(0);
    let arrows = lines.iter().any(|line| line.arrow);
    let mut text = String::new();
    for line in lines {
        let arrow = match (arrows, line.arrow) {
            (false, _) => "",
            (true, true) => "→ ",
            (true, false) => "  ",
        };
        let whole = format!(
            "{:names$}  {:states$}  {arrow}{}",
            line.name, line.state, line.more
        );
        text += whole.trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests;
